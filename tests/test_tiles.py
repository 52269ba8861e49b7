"""Tiles, coordinates and features: what is written, that nothing damaged is, and that every kind of stop can go on."""
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import wsi
from prepare import features, slides, tiles, toy

ROOT = Path(__file__).parents[1]


def config(folder, out, **keys):
    """The keys of wsi.py's command line, with its defaults but for smaller tiles."""
    c = {f"mask_{key}": value for key, value in wsi.TISSUE.items()}
    c |= {"slides": f"{folder}/*.*", "out": str(out), "slide_mpp": 0.0, "mpp_from_objective": False,
          "exact_reads": True, "names": "stem", "patient": r"TCGA-\w\w-\w{4}", "mask_dir": "", "mpps": (0.5,),
          "tile_px": 128, "overlap": 0, "min_tissue": 0.25, "tissue_share": 0.0, "tiles_per_slide": 0, "coords": "",
          "coords_format": "trident", "jpeg_quality": 90, "weights": "", "arch": "", "batch_size": 5, "device": "cpu",
          "norm": None, "region_mb": 4, "workers": 0, "seed": 0}
    assert keys.keys() <= c.keys()
    return c | keys


def tissue(w, h, seed=0):
    """A piece of pink and purple tissue that fills most of a white picture."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-30, 30, (h // 4, w // 4, 3))
    image = np.full((h // 4, w // 4, 3), 244)
    image[h // 32:-h // 32, w // 32:-w // 32] = (190, 110, 170)
    image = np.where(image < 244, image + noise, image).astype(np.uint8)
    return Image.fromarray(image).resize((w, h), Image.BICUBIC)


def write(folder, name="a.tif", size=(1024, 768), mpp=0.5, factors=(1, 4), seed=0):
    Path(folder).mkdir(exist_ok=True)
    toy.write_tiff(Path(folder) / name, tissue(*size, seed), mpp, factors)
    return str(Path(folder) / name)


def damage(path, count):
    """Wipe the headers of JPEG tiles in the middle of level 0."""
    data, at = bytearray(Path(path).read_bytes()), []
    while (start := data.find(b"\xff\xd8\xff", at[-1] + 1 if at else 0)) >= 0:
        at.append(start)
    for start in at[40:40 + count]:
        data[start:start + 16] = bytes(16)
    Path(path).write_bytes(data)


def fails(task, c):
    """Run a task that ends with an error; its text."""
    with pytest.raises(SystemExit) as error:
        task(c)
    assert error.value.code not in (0, None)
    return str(error.value)


def failures(out):
    with open(Path(out) / "failed.csv", newline="") as f:
        return {Path(row["slide"]).name: row["reason"] for row in csv.DictReader(f)}


def sidecar(out, name="a"):
    return SimpleNamespace(**json.loads((Path(out) / f"{name}.json").read_text()))


def shard(out, name="a"):
    """{place: pixels} by the sidecar's offsets, checked against what tarfile finds; every shard must be sound."""
    s, found = sidecar(out, name), {}
    data = (Path(out) / s.tar).read_bytes()
    assert len(data) == s.bytes
    with tarfile.open(Path(out) / s.tar) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert list(members)[1::2] == [key.replace(".jpg", ".json") for key in list(members)[::2]]
    for offset, size, x, y, mpp, share in zip(s.offset, s.size, s.x, s.y, s.mpp, s.tissue, strict=True):
        key, jpeg = f"{name}_{round(1000 * mpp)}nm_{x}_{y}", data[offset:offset + size]
        assert members[f"{key}.jpg"] == jpeg
        about = json.loads(members[f"{key}.json"])
        assert about == {"slide": os.path.basename(s.slide), "patient": s.patient, "x": x, "y": y, "mpp": mpp,
                         "tissue": share}
        found[x, y, mpp] = np.asarray(Image.open(io.BytesIO(jpeg)))
    assert len(found) == len(s.x) == len(members) / 2
    return found


def hidden(out):
    return [f for f in os.listdir(out) if f.startswith(".")]


def script(text, *arguments):
    """A Python process in the repository's root."""
    return subprocess.Popen([sys.executable, "-c", text, *map(str, arguments)], cwd=ROOT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


# tiles

def test_a_shard_holds_the_pixels_of_the_grid_at_each_scale(tmp_path):
    path, out = write(tmp_path / "in", "TCGA-A1-B2C3.x.tif"), tmp_path / "out"
    tiles.tiles(config(tmp_path / "in", out, mpps=(0.5, 0.8)))
    slide, name = wsi.Slide(path), "TCGA-A1-B2C3_x"
    s, pixels = sidecar(out, name), shard(out, name)
    wanted = {mpp: slide.grid(128, mpp) for mpp in (0.5, 0.8)}
    places = {(x, y, mpp): share for mpp, (xy, tissue) in wanted.items() for (x, y), share in zip(xy.tolist(), tissue)}
    written = {(x, y, mpp): share for x, y, mpp, share in zip(s.x, s.y, s.mpp, s.tissue)}
    assert written == pytest.approx(places, abs=1e-3)
    assert (s.patient, s.slide, s.tile_px, s.bad, s.skipped) == ("TCGA-A1-B2C3", path, 128, {}, {})
    for (x, y, mpp), tile in pixels.items():
        assert np.abs(tile.astype(int) - slide.read(x, y, 128, mpp)).mean() < 4, (x, y, mpp)


def test_a_rerun_does_nothing_and_other_keys_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    write(tmp_path / "in")
    out = tmp_path / "out"
    tiles.tiles(config(tmp_path / "in", out))
    before = {f: os.stat(out / f).st_mtime_ns for f in os.listdir(out) if f != "failed.csv"}
    monkeypatch.setattr(slides, "attempt", None)  # may not even be tried
    tiles.tiles(config(tmp_path / "in", out, workers=2, region_mb=9, mask_dir=str(tmp_path / "x")))
    with pytest.raises(ValueError, match=r"keys.tiles.json: tile_px was 128 and is 64 now; use another --out"):
        tiles.tiles(config(tmp_path / "in", out, tile_px=64))
    with pytest.raises(ValueError, match=r"mask_otsu was \[8, 40\] and is \[9, 40\] now"):
        tiles.tiles(config(tmp_path / "in", out, mask_otsu=(9, 40)))
    with pytest.raises(ValueError, match="holds the output of --task=tiles; use another --out"):
        slides.settle("features", config(tmp_path / "in", out), {})
    assert before == {f: os.stat(out / f).st_mtime_ns for f in os.listdir(out) if f != "failed.csv"}


@pytest.mark.parametrize("keys", [{"overlap": 128}, {"mpps": ()}, {"mpps": (0.5, 0.5001)}, {"mpps": (0.0,)}])
def test_keys_that_make_no_sense_are_refused(tmp_path, keys):
    write(tmp_path / "in")
    with pytest.raises(ValueError, match=f"{next(iter(keys))}="):
        tiles.tiles(config(tmp_path / "in", tmp_path / "out", **keys))


def test_a_random_sample_is_distinct_and_a_function_of_the_seed_and_the_slides_name(tmp_path):
    write(tmp_path / "in")
    sample = {"tiles_per_slide": 15, "tissue_share": 0.3, "mpps": (0.5, 0.8)}
    for i, keys in enumerate([{}, {"region_mb": 1}, {"seed": 1}, {"mpps": (0.8,)}]):
        tiles.tiles(config(tmp_path / "in", tmp_path / str(i), **sample | keys))
    found = [shard(tmp_path / str(i)) for i in range(4)]
    assert [sum(mpp == wanted for _, _, mpp in found[0]) for wanted in (0.5, 0.8)] == [15, 15]  # shard: all distinct
    assert found[0].keys() == found[1].keys() and not found[0].keys() & found[2].keys()
    assert sidecar(tmp_path / "0").skipped == {}
    assert found[3].keys() < found[0].keys()  # a scale does not depend on the others asked for
    assert all(wsi.is_tissue(tile, 0.25) for tile in found[0].values())
    write(tmp_path / "small", size=(120, 96), mpp=2.0, factors=(1,))
    tiles.tiles(config(tmp_path / "small", tmp_path / "4", tile_px=8, mpps=(2.0,), tiles_per_slide=600))
    assert len(shard(tmp_path / "4")) == 600  # of 8000 places
    tiles.tiles(config(tmp_path / "in", tmp_path / "5", tiles_per_slide=15, min_tissue=1.0, tile_px=512))
    assert sidecar(tmp_path / "5").skipped["0.5"].endswith("of 15 tiles, after 20 draws")


def test_two_runs_write_the_same_bytes(tmp_path):
    write(tmp_path / "in")
    for out in "01":
        tiles.tiles(config(tmp_path / "in", tmp_path / out))
    assert (tmp_path / "0/a.tar").read_bytes() == (tmp_path / "1/a.tar").read_bytes()


def test_a_scale_that_a_slide_is_too_coarse_for_is_noted_and_the_others_are_written(tmp_path):
    write(tmp_path / "in")
    tiles.tiles(config(tmp_path / "in", tmp_path / "out", mpps=(0.25, 0.5)))
    s = sidecar(tmp_path / "out")
    assert set(s.mpp) == {0.5} and "asked for 0.25 um/px, but the slide has 0.5" in s.skipped["0.25"]
    assert "asked for 0.25" in fails(tiles.tiles, config(tmp_path / "in", tmp_path / "other", mpps=(0.25,)))


# bad input

def test_bad_slides_are_listed_with_reasons_the_others_are_done_and_a_repaired_one_leaves_the_list(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    good = write(folder)
    write(folder, "cut.tif")
    whole = (folder / "cut.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[:len(whole) // 2])
    toy.write_tiff(folder / "glass.tif", Image.new("RGB", (600, 500), (244, 244, 244)), 0.5)
    toy.write_tiff(folder / "bare.tif", tissue(600, 500), 1e4 / 0.5)  # junk for an mpp
    text = fails(tiles.tiles, config(folder, out, workers=2))
    assert "3 of 4 slides failed" in text and "glass.tif: no t" in text
    reasons = failures(out)
    assert set(reasons) == {"cut.tif", "glass.tif", "bare.tif"} and "no usable mpp" in reasons["bare.tif"]
    assert shard(out) and not hidden(out)
    (folder / "cut.tif").write_bytes(whole)
    assert "2 of 4" in fails(tiles.tiles, config(folder, out))
    assert set(failures(out)) == {"glass.tif", "bare.tif"} and shard(out, "cut")
    tiles.tiles(config(folder, out, slides=good))  # another list does not clear the rest
    assert set(failures(out)) == {"glass.tif", "bare.tif"}


def test_a_damaged_tile_is_counted_and_never_written_and_a_slide_of_them_fails(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    path = write(folder, size=(3072, 2304))
    damage(path, 1)
    tiles.tiles(config(folder, out, tile_px=256))
    s, pixels = sidecar(out), shard(out)
    damaged = {tuple(map(float, key.split(","))) for key in s.bad}
    assert 1 <= len(damaged) <= 4 and not damaged & pixels.keys()
    xy, _ = wsi.Slide(path).grid(256, 0.5)
    assert len(pixels) + len(damaged) == len(xy)
    assert all(100 < tile.mean() < 240 and tile.std() > 3 for tile in pixels.values())
    assert f"{len(damaged)} damaged ones left out" in capsys.readouterr().out
    damage(path, 12)
    monkeypatch.setattr(wsi.Slide, "check_levels", lambda slide: None)  # it may come across the damage first
    text = fails(tiles.tiles, config(folder, tmp_path / "2", tile_px=256))
    assert "tiles are damaged, such as cannot read x=" in text
    assert sorted(os.listdir(tmp_path / "2")) == ["failed.csv", "keys.tiles.json"]


SLOW = """
import sys, time
from prepare import tiles
from tests.test_tiles import config
jpeg = tiles.jpeg
tiles.jpeg = lambda *a: time.sleep(0.05) or jpeg(*a)
tiles.tiles(config(sys.argv[1], sys.argv[2], workers=2))
"""


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_after_kill_9_the_folder_is_sound_no_process_is_left_and_a_rerun_completes(tmp_path, victim):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        write(folder, f"{i}.tif", seed=i)
    process = script(SLOW, folder, out)
    wait_for(lambda: out.exists() and len([f for f in hidden(out) if f.endswith(".part")]) == 2)
    workers = [int(f.split(".")[-2]) for f in hidden(out)]
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    _, text = process.communicate(timeout=60)
    assert process.returncode != 0
    if victim == "worker":
        assert "a worker process was killed" in text and "rerun goes on" in text and "Traceback" not in text
        assert not hidden(out)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    for name in {Path(f).stem for f in os.listdir(out) if f[0].isdigit() and f.endswith(".json")}:
        shard(out, name)
    tiles.tiles(config(folder, out))
    assert all(shard(out, str(i)) for i in range(3)) and not hidden(out)


TWO = """
import sys
from prepare import tiles
from tests.test_tiles import config
write_tiles = tiles.write_tiles
def logged(path, *a):
    open(sys.argv[3], "a").write(path + "\\n")
    return write_tiles(path, *a)
tiles.write_tiles = logged
tiles.tiles(config(sys.argv[1], sys.argv[2]))
"""


def test_two_processes_on_one_folder_do_each_slide_once(tmp_path):
    folder, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    for i in range(6):
        write(folder, f"{i}.tif", seed=i)
    processes = [script(TWO, folder, out, log) for _ in range(2)]
    for process in processes:
        assert "0 failed" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert sorted(log.read_text().split()) == [str(folder / f"{i}.tif") for i in range(6)]
    assert all(shard(out, str(i)) for i in range(6)) and not hidden(out)


def test_a_claim_of_another_node_is_respected_until_it_is_old(tmp_path):
    write(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    claim = out / ".a.node7.cluster.4242.part"
    claim.touch()
    c = config(tmp_path / "in", out)
    job = (tiles.write_tiles, str(tmp_path / "in/a.tif"), "a", str(out / "a.json"), c)
    assert slides.attempt(*job)[0] == "busy" and hidden(out) == [claim.name]
    os.utime(claim, (0, time.time() - slides.STALE - 1))
    assert slides.attempt(*job)[0] == "done" and not hidden(out)
    assert slides.attempt(*job)[0] == "before"


FULL = """
import resource, sys
from prepare import tiles
from tests.test_tiles import config
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
tiles.tiles(config(sys.argv[1], sys.argv[2], workers=1))
"""


def test_a_full_disk_stops_with_one_line_and_leaves_what_is_done(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    write(folder)
    write(folder, "small.tif", size=(512, 384))
    tiles.tiles(config(folder, out, slides=f"{folder}/small.tif"))
    process = script(FULL, folder, out)
    text = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 1 and "File too large" in text[-1] and "rerun goes on" in text[-1]
    assert not any("Traceback" in line for line in text)
    assert shard(out, "small")
    assert sorted(os.listdir(out)) == ["failed.csv", "keys.tiles.json", "small.json", "small.tar"]
    tiles.tiles(config(folder, out))
    assert shard(out)


def test_the_command_line_writes_shards_that_train_py_reads(tmp_path):
    write(tmp_path / "in")
    command = [sys.executable, "wsi.py", "--task=tiles", f"--slides={tmp_path}/in/*.tif", "--tile_px=128"]
    done = subprocess.run([*command, f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) < 6 and "1 slides done" in done.stdout  # no bar where nobody sees it
    assert len(shard(tmp_path / "out")) > 20
    command += [f"--slides={tmp_path}/none/*.svs", f"--out={tmp_path}/none"]
    empty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert empty.returncode == 1 and "no file matches" in empty.stderr and "Traceback" not in empty.stderr
    assert not (tmp_path / "none").exists()


# coordinates

@pytest.mark.parametrize("kind, mpp, file", [
    ("trident", 0.5, "a.b_patches.h5"), ("clam", 0.5, "a.b.h5"),
    ("trident", 0.37, "a.b_patches.h5"), ("clam", 0.37, "a.b.h5"), ("clam", 1.03, "a.b.h5")])
def test_coordinates_read_back_as_the_same_places_and_scale(tmp_path, kind, mpp, file):
    pytest.importorskip("h5py")
    path = write(tmp_path / "in", "a.b.svs", mpp=0.2527, size=(2048, 1536))
    c = config(tmp_path / "in", tmp_path / "out", mpps=(mpp,), coords_format=kind, workers=2)
    tiles.coords(c)
    slide = wsi.Slide(path)
    xy, size, read_mpp = tiles.read_coords(tmp_path / "out" / file, slide)
    places, _ = slide.grid(128, mpp)
    assert len(xy) and np.array_equal(xy, places)
    true = slide.extent(128, mpp)[0] * slide.mpp  # um
    assert size * read_mpp == pytest.approx(true, rel=0.005)
    assert kind == "clam" or (size == 128 and read_mpp == pytest.approx(mpp, rel=0.03))
    tiles.coords(c | {"workers": 0})  # done
    if mpp == 0.37:
        tiles.tiles(config(tmp_path / "in", tmp_path / "tiles", coords=str(tmp_path / "out")))
        s = sidecar(tmp_path / "tiles", "a_b")
        assert sorted(zip(s.x, s.y)) == sorted(map(tuple, xy.tolist())) and s.tile_px == size
        assert set(s.mpp) == {read_mpp} and min(s.tissue) > 0.15


def test_coordinates_as_trident_and_clam_write_them_give_the_true_scale(tmp_path):
    h5py = pytest.importorskip("h5py")
    slide = wsi.Slide(write(tmp_path / "in", mpp=0.2527))
    trident = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
               "overlap": 0, "name": "a", "savetodir": "x", "level0_width": 1024, "level0_height": 768}
    clam = {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0), "downsampled_level_dim": (256, 192),
            "level_dim": (256, 192), "name": "a", "save_path": "x"}
    for attrs, mpp in ((trident, 2 * 0.2527), (clam, 4 * 0.2527)):
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5.create_dataset("coords", data=np.array([[0, 512]])).attrs.update(attrs)
        xy, size, read_mpp = tiles.read_coords(tmp_path / "a.h5", slide)
        assert (xy.tolist(), size) == ([[0, 512]], 256) and read_mpp == pytest.approx(mpp)
    (tmp_path / "b.h5").write_bytes(b"cut short")
    with pytest.raises(wsi.SlideError, match="b.h5: neither"):
        tiles.read_coords(tmp_path / "b.h5", slide)
    for attrs in (trident | {"level0_width": 999}, clam | {"patch_level": 7}, {}):
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5.create_dataset("coords", data=np.array([[0, 512]])).attrs.update(attrs)
        with pytest.raises(wsi.SlideError, match="a.h5: "):
            tiles.read_coords(tmp_path / "a.h5", slide)


def test_without_h5py_coordinates_say_what_to_install_and_slides_without_a_file_fail_alone(tmp_path, monkeypatch):
    write(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ValueError, match="pip install h5py"):
            tiles.coords(config(tmp_path / "in", tmp_path / "out"))
        with pytest.raises(ValueError, match="pip install h5py"):
            tiles.tiles(config(tmp_path / "in", tmp_path / "out", coords=str(tmp_path / "empty")))
    pytest.importorskip("h5py")
    text = fails(tiles.tiles, config(tmp_path / "in", tmp_path / "out", coords=str(tmp_path / "empty")))
    assert "no a_patches.h5 or a.h5 in coords=" in text


# features

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch, model = pytest.importorskip("torch"), pytest.importorskip("model")
    torch.manual_seed(0)
    vit, path = model.ViT(model.ARCHS["toy"]), tmp_path_factory.mktemp("weights") / "5.pth"
    vit.init_weights()
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 5, "config": {"norm": "half"}}, path)
    return str(path)


def direct(path, weights, xy, mean=(0.5,) * 3, std=(0.5,) * 3):
    """Class tokens of tiles read one by one."""
    import torch

    import model
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    slide, vit = wsi.Slide(path), model.load_backbone(weights).eval()
    x = np.stack([slide.read(x, y, 112, 0.5) for x, y in xy.tolist()])
    with torch.no_grad():
        return vit((torch.tensor(x).permute(0, 3, 1, 2) / 255 - mean) / std)["cls"].numpy()


def test_features_are_the_encoders_of_the_grid_in_its_order(tmp_path, teacher):
    h5py = pytest.importorskip("h5py")
    path, out = write(tmp_path / "in", "a.b.tif", size=(512, 384)), tmp_path / "out"
    c = config(tmp_path / "in", out, tile_px=112, weights=teacher, workers=2, region_mb=1)
    features.features(c)
    with h5py.File(out / "a.b.h5") as h5:
        found, xy, about, attrs = h5["features"][:], h5["coords"][:], dict(h5["features"].attrs), h5["coords"].attrs
        assert attrs["patch_size_level0"] == 112 and attrs["name"] == "a.b"
    assert found.dtype == np.float16 and found.shape == (len(xy), 128)
    assert np.array_equal(xy, wsi.Slide(path).grid(112, 0.5)[0]) and len(xy) > 5
    assert np.abs(found - direct(path, teacher, xy)).max() < 0.01 and np.ptp(found, axis=0).max() > 0.05
    assert (about["weights"], about["mpp"], about["tile_px"], len(about["weights_sha256"])) == ("5.pth", 0.5, 112, 64)
    before = os.stat(out / "a.b.h5").st_mtime_ns
    features.features(c | {"workers": 0})
    assert os.stat(out / "a.b.h5").st_mtime_ns == before
    with pytest.raises(ValueError, match="norm was .* use another --out"):
        features.features(c | {"norm": "imagenet"})
    with pytest.raises(ValueError, match="tile_px=128: not a multiple of the patch of 14 px"):
        features.features(c | {"tile_px": 128, "out": str(tmp_path / "other")})
    features.features(c | {"coords": str(out), "out": str(tmp_path / "again")})  # from the places of a features file
    with h5py.File(tmp_path / "again/a.b.h5") as h5:
        assert np.array_equal(h5["coords"][:], xy) and np.abs(h5["features"][:] - found).max() < 0.01


def test_a_killed_reader_stops_the_features_with_one_line(tmp_path, teacher, monkeypatch):
    write(tmp_path / "in")
    monkeypatch.setattr(features, "read_region", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    c = config(tmp_path / "in", tmp_path / "out", tile_px=112, weights=teacher, workers=1)
    assert "a worker process was killed" in fails(features.features, c) and not hidden(tmp_path / "out")


def test_without_h5py_features_are_npz_and_damaged_tiles_have_none(tmp_path, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    path, out = write(tmp_path / "in", size=(3072, 2304)), tmp_path / "out"
    sound, _ = wsi.Slide(path).grid(112, 0.5)
    damage(path, 1)
    features.features(config(tmp_path / "in", out, tile_px=112, weights=teacher, norm="imagenet", batch_size=64))
    with np.load(out / "a.npz") as found:
        assert found["features"].shape == (len(found["coords"]), 128) and found["tile_px"] == 112
        xy, damaged = found["coords"], int(found["damaged"])
        pick = slice(None, None, 49)
        expected = direct(path, teacher, xy[pick], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert np.abs(found["features"][pick] - expected).max() < 0.02
    assert damaged > 0 and len(xy) + damaged == len(sound)
    assert [p for p in sound.tolist() if p in xy.tolist()] == xy.tolist()


def kill_itself_on_b(path, name, file, c, claim):
    if name == "b":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return tiles.write_tiles(path, name, file, c, claim)


def test_a_slide_that_kills_its_process_is_named_and_keeps_no_other_from_being_done(tmp_path):
    for k, name in enumerate("abcd"):
        write(tmp_path / "in", f"{name}.tif", size=(512, 384), seed=k)
    c = config(tmp_path / "in", tmp_path / "out", workers=2)
    for _ in range(2):
        text = fails(lambda c: slides.walk("tiles", c, kill_itself_on_b, ".json", c["workers"]), c)
    assert {f.stem for f in (tmp_path / "out").glob("*.tar")} == set("acd") and not hidden(tmp_path / "out")
    assert failures(tmp_path / "out") == {"b.tif": slides.KILLED} and "b.tif" in text
    tiles.tiles(c)  # without the bug that killed it
    assert (tmp_path / "out" / "b.tar").exists() and not failures(tmp_path / "out")


def test_places_of_another_slide_or_of_another_tool_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    write(tmp_path / "in")
    for k, (xy, attrs, reason) in enumerate((
            ([(50000, 50000)], {"patch_size": 128, "patch_level": 0}, "places of another slide"),
            ([(0, 0, 128, 128, 0)], {"patch_size": 128, "patch_level": 0}, "coords of shape (1, 5)"),
            ([(0, 0)], {"patch_size": 0, "patch_level": 0}, "patch_size 0"))):
        folder = tmp_path / f"coords{k}"
        folder.mkdir()
        with h5py.File(folder / "a.h5", "w") as h5:
            h5.create_dataset("coords", data=np.array(xy)).attrs.update(attrs)
        fails(tiles.tiles, config(tmp_path / "in", tmp_path / f"out{k}", coords=str(folder)))
        assert reason in failures(tmp_path / f"out{k}")["a.tif"]


def test_a_slide_cut_in_half_fails_instead_of_being_done_with_what_is_left(tmp_path):
    path = write(tmp_path / "in", factors=(1,), size=(2048, 1536))
    os.truncate(path, os.path.getsize(path) * 6 // 10)
    fails(tiles.tiles, config(tmp_path / "in", tmp_path / "out"))
    reason = failures(tmp_path / "out")["a.tif"]
    assert "tiles are damaged" in reason or "not a slide" in reason


def test_slides_of_one_name_from_two_folders_do_not_pass_for_done(tmp_path):
    for k in "12":
        (tmp_path / k).mkdir()
        write(tmp_path / k, "slide.tif", size=(512, 384), seed=int(k))
    out = tmp_path / "out"
    tiles.tiles(config(tmp_path / "1", out))
    with pytest.raises(ValueError, match="slide.json is of .*/1/slide.tif, not of .*/2/slide.tif: use another --out"):
        tiles.tiles(config(tmp_path / "2", out))
    (tmp_path / "1").rename(tmp_path / "moved")
    tiles.tiles(config(tmp_path / "moved", out))  # the same slide from elsewhere


def test_scales_that_a_slide_lacks_are_counted_in_the_summary(tmp_path, capsys):
    write(tmp_path / "in", size=(512, 384))
    tiles.tiles(config(tmp_path / "in", tmp_path / "out", mpps=(0.1, 0.5)))
    assert "1 slides lack some of mpps" in capsys.readouterr().out and "0.1" in sidecar(tmp_path / "out").skipped
