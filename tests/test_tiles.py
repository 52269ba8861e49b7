"""Tiles, coordinates and features: what is written, that nothing damaged is, and that a rerun ends what was stopped."""
import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from PIL import Image

import eval_bach
import model
import wsi
from configurator import configure
from places import open_features
from prepare import coords, features, slides, tiles, toy


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Slides are written to in/, results to out/, below a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def config(script, out="out", **keys):
    """The keys of a script with its defaults, except for smaller tiles, and without processes of its own."""
    defaults = configure({**vars(slides), **vars(script)}, [])
    assert keys.keys() <= defaults.keys()
    return defaults | {"slides": "in/*.*", "out": out, "tile_px": 128, "workers": 0} | keys


def cut(out="out", **keys):
    tiles.main(config(tiles, out, **keys))


def fails(script, out="out", **keys):
    """Run a script on slides of which some fail; its text."""
    with pytest.raises(SystemExit, match="slides failed, see") as error:
        script.main(config(script, out, **keys))
    return str(error.value)


def failures(out="out"):
    with open(f"{out}/failed.csv", newline="") as f:
        return {Path(row["slide"]).name: row["reason"] for row in csv.DictReader(f)}


def tissue(w, h, seed=0):
    """A piece of pink and purple tissue that fills most of a white picture."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-30, 30, (h // 4, w // 4, 3))
    image = np.full((h // 4, w // 4, 3), 244)
    image[h // 32:-h // 32, w // 32:-w // 32] = (190, 110, 170)
    image = np.where(image < 244, image + noise, image).astype(np.uint8)
    return Image.fromarray(image).resize((w, h), Image.BICUBIC)


def write(name="a.tif", size=(1024, 768), mpp=0.5, factors=(1, 4), seed=0, folder="in"):
    Path(folder).mkdir(exist_ok=True)
    toy.write_tiff(Path(folder, name), tissue(*size, seed), mpp, factors)
    return f"{folder}/{name}"


def damage(path, count):
    """Wipe the headers of JPEG tiles in the middle of level 0."""
    data, at = bytearray(Path(path).read_bytes()), []
    while (start := data.find(b"\xff\xd8\xff", at[-1] + 1 if at else 0)) >= 0:
        at.append(start)
    for start in at[40:40 + count]:
        data[start:start + 16] = bytes(16)
    Path(path).write_bytes(data)


def sidecar(out="out", name="a"):
    return SimpleNamespace(**json.loads(Path(out, f"{name}.json").read_text()))


def shard(out="out", name="a"):
    """{place: pixels} by the sidecar's offsets, checked against what tarfile finds; every shard must be sound."""
    s, found = sidecar(out, name), {}
    data = Path(out, s.tar).read_bytes()
    assert len(data) == s.bytes
    with tarfile.open(Path(out, s.tar)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert list(members)[1::2] == [key.replace(".jpg", ".json") for key in list(members)[::2]]
    for offset, size, x, y, mpp, share in zip(s.offset, s.size, s.x, s.y, s.mpp, s.tissue, strict=True):
        key, jpeg = f"{name}_{round(1000 * mpp)}nm_{x}_{y}", data[offset:offset + size]
        about = {"slide": os.path.basename(s.slide), "patient": s.patient, "x": x, "y": y, "mpp": mpp, "tissue": share}
        assert members[f"{key}.jpg"] == jpeg and json.loads(members[f"{key}.json"]) == about
        found[x, y, mpp] = np.asarray(Image.open(io.BytesIO(jpeg)))
    assert len(found) == len(s.x) == len(members) / 2
    return found


def hidden(out="out"):
    return [f for f in os.listdir(out) if f.startswith(".")]


def start(patch, *flags):
    """prepare/tiles.py after some lines of Python, in a process group of its own."""
    imports = "import os, signal, time\nfrom prepare import slides, tiles"  # without torch
    code = f"{imports}\n{patch}\nslides.run('tiles', tiles.main, vars(tiles))"
    command = [sys.executable, "-c", code, "--slides=in/*", "--out=out", "--tile_px=128", *flags]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


# tiles

def test_a_shard_holds_the_pixels_of_the_grid_at_each_scale_and_a_second_run_the_same_bytes():
    path, name = write("TCGA-A1-B2C3.x.tif"), "TCGA-A1-B2C3_x"
    cut(mpps=(0.5, 0.8))
    slide, s, pixels = wsi.Slide(path), sidecar("out", name), shard("out", name)
    wanted = {mpp: slide.grid(128, mpp) for mpp in (0.5, 0.8)}
    places = {(x, y, mpp): share for mpp, (xy, tissue) in wanted.items() for (x, y), share in zip(xy.tolist(), tissue)}
    written = {(x, y, mpp): share for x, y, mpp, share in zip(s.x, s.y, s.mpp, s.tissue)}
    assert written == pytest.approx(places, abs=1e-3)
    assert (s.patient, s.slide, s.tile_px, s.bad, s.skipped) == ("TCGA-A1-B2C3", path, 128, {}, {})
    for (x, y, mpp), tile in pixels.items():
        assert np.abs(tile.astype(int) - slide.read(x, y, 128, mpp)).mean() < 4, (x, y, mpp)
    cut("2", mpps=(0.5, 0.8), workers=2)
    assert Path("2", s.tar).read_bytes() == Path("out", s.tar).read_bytes()


def test_a_rerun_does_nothing_and_other_keys_are_refused_before_anything_is_done(monkeypatch):
    write()
    cut()
    before = {f: os.stat(f"out/{f}").st_mtime_ns for f in os.listdir("out")}
    monkeypatch.setattr(tiles, "write_tiles", lambda *a: 1 / 0)  # may not even be tried
    cut(workers=2, mask_dir="x")
    with pytest.raises(ValueError, match=r"keys.json: tile_px was 128 and is 64 now; use another --out"):
        cut(tile_px=64)
    with pytest.raises(ValueError, match="script was 'tiles' and is 'coords' now; use another --out"):
        coords.main(config(coords))
    monkeypatch.setitem(wsi.TISSUE, "otsu", (9, 40))
    with pytest.raises(ValueError, match=r"TISSUE was .*\[8, 40\].* and is .*\[9, 40\].* now"):
        cut()
    assert before == {f: os.stat(f"out/{f}").st_mtime_ns for f in os.listdir("out")}


@pytest.mark.parametrize("keys", [
    {"overlap": 128}, {"mpps": ()}, {"mpps": (0.5, 0.5001)}, {"mpps": (0.0,)}, {"part": "0/2"}, {"part": "3/2"},
    {"part": "2"}, {"out": ""}])
def test_keys_that_make_no_sense_are_refused(keys):
    write()
    with pytest.raises(ValueError, match=next(iter(keys))):
        cut(**keys)


def test_slides_that_would_share_a_name_are_refused():
    for folder in "ab":
        write("s.1.tif", size=(256, 256), folder=folder)
    assert slides.slides_of(config(tiles, slides="a/*"), {}) == {"a/s.1.tif": "s_1"}
    assert slides.slides_of(config(tiles, slides="a/*"), {}, dots=True) == {"a/s.1.tif": "s.1"}
    with pytest.raises(ValueError, match="a/s.1.tif and b/s.1.tif would share the name s_1: give each folder its own"):
        cut(slides="[ab]/*")
    Path("a/s.1.xml").touch()
    with pytest.raises(ValueError, match=r"share the name s_1: narrow the pattern, such as 'a/\*.svs', or rename"):
        cut(slides="a/*")


def test_a_random_sample_is_of_the_grid_and_a_function_of_the_seed_and_the_slides_name():
    path = write()
    sample = {"tiles_per_slide": 9, "tissue_share": 0.3, "mpps": (0.5, 0.8)}
    for i, keys in enumerate([{}, {}, {"seed": 1}, {"mpps": (0.8,)}]):
        cut(str(i), **sample | keys)
    found = [shard(str(i)) for i in range(4)]
    assert [sum(mpp == wanted for _, _, mpp in found[0]) for wanted in (0.5, 0.8)] == [9, 9]  # shard: all distinct
    grid = {(x, y, mpp) for mpp in (0.5, 0.8) for x, y in wsi.Slide(path).grid(128, mpp)[0].tolist()}
    assert found[0].keys() == found[1].keys() != found[2].keys() and found[0].keys() | found[2].keys() < grid
    assert found[3].keys() < found[0].keys()  # a scale does not depend on the others asked for
    assert all(wsi.is_tissue(tile, 0.25) for tile in found[0].values())
    cut("5", tiles_per_slide=999)
    assert {(x, y) for x, y, _ in shard("5")} == {(x, y) for x, y, mpp in grid if mpp == 0.5}  # there are no more


def test_a_scale_that_a_slide_is_too_coarse_for_is_noted_and_the_others_are_written(capsys):
    write()
    cut(mpps=(0.25, 0.5))
    reason = "asked for 0.25 um/px, but the slide has 0.5"
    assert set(sidecar().mpp) == {0.5} and reason in sidecar().skipped["0.25"] and reason in capsys.readouterr().out
    assert reason in fails(tiles, "other", mpps=(0.25,))


# bad input

def test_bad_slides_are_listed_with_reasons_the_others_are_done_and_a_repaired_one_leaves_the_list():
    write()
    whole = Path(write("cut.tif")).read_bytes()
    Path("in/cut.tif").write_bytes(whole[:len(whole) // 2])
    short = write("short.tif", factors=(1,), size=(2048, 1536))
    os.truncate(short, os.path.getsize(short) * 6 // 10)
    toy.write_tiff(Path("in/glass.tif"), Image.new("RGB", (600, 500), (244, 244, 244)), 0.5)
    toy.write_tiff(Path("in/bare.tif"), tissue(600, 500), 1e4 / 0.5)  # junk for an mpp
    text, reasons = fails(tiles, workers=2), failures()
    assert "4 of 5 slides failed" in text and "glass.tif: no t" in text
    assert set(reasons) == {"cut.tif", "short.tif", "glass.tif", "bare.tif"} and "no usable mpp" in reasons["bare.tif"]
    assert "tiles are damaged" in reasons["short.tif"] or "not a slide" in reasons["short.tif"]
    assert shard() and not hidden()
    Path("in/cut.tif").write_bytes(whole)
    assert "3 of 5" in fails(tiles)
    assert set(failures()) == {"short.tif", "glass.tif", "bare.tif"} and shard("out", "cut")


def test_what_could_not_be_found_is_in_the_list_of_failures_but_fails_nothing(capsys):
    """The bug: a link that leads nowhere was said once among a thousand lines, and no file had it."""
    write()
    Path("in/gone.tif").symlink_to("nowhere.tif")
    Path("in/twice.tif").symlink_to("a.tif")
    Path("mpp.csv").write_text("slide,mpp\na,0.5\nb,0.5\n")
    cut(mpp_table="mpp.csv")
    assert failures() == {"gone.tif": "a link to nowhere.tif: No such file or directory"} and shard()
    assert "left out: mpp.csv: 1 of 2 rows match no slide, such as 'b'" in capsys.readouterr().out
    cut("parts", part="2/2")
    assert not Path("parts/failed.2of2.csv").exists(), "named by the first part alone"


def test_a_damaged_tile_is_counted_and_never_written_and_a_slide_of_them_fails(capsys, monkeypatch):
    path = write(size=(3072, 2304))
    damage(path, 1)
    cut(tile_px=256)
    damaged, pixels = {tuple(map(float, key.split(","))) for key in sidecar().bad}, shard()
    assert 1 <= len(damaged) <= 4 and not damaged & pixels.keys()
    xy, _ = wsi.Slide(path).grid(256, 0.5)
    assert len(pixels) + len(damaged) == len(xy)
    assert all(100 < tile.mean() < 240 and tile.std() > 3 for tile in pixels.values())
    assert f"{len(damaged)} damaged ones left out" in capsys.readouterr().out
    damage(path, 12)
    monkeypatch.setattr(wsi.Slide, "check_levels", lambda slide: None)  # it may come across the damage first
    assert "tiles are damaged, such as cannot read x=" in fails(tiles, "2", tile_px=256)
    assert sorted(os.listdir("2")) == ["failed.csv", "keys.json"]


# many processes

SLOW = """
signal.signal(signal.SIGINT, signal.default_int_handler)
jpeg, write_tiles = tiles.jpeg, tiles.write_tiles
tiles.jpeg = lambda *a: time.sleep(0.05) or jpeg(*a)
def logged(path, name, *a):
    open("log", "a").write(f"{os.getpid()} {name}\\n")
    return write_tiles(path, name, *a)
tiles.write_tiles = logged
"""


@pytest.mark.parametrize("victim", ["worker", "parent", "ctrl-c"])
def test_after_a_kill_the_folder_is_sound_no_process_is_left_and_a_rerun_completes(victim):
    for i in range(3):
        write(f"{i}.tif", seed=i)
    process, log = start(SLOW), Path("log")
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
    (pid, name), (other, _) = (line.split() for line in log.read_text().splitlines())
    if victim == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(int(pid) if victim == "worker" else process.pid, signal.SIGKILL)
    _, text = process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in (pid, other)))
    done = [f.stem for f in Path("out").glob("?.json")]
    assert all(shard("out", name) for name in done)
    if victim == "worker":
        assert f"/{name}.tif: its process died: Killed" in text and "1 of 3 slides failed" in text and len(done) == 2
        assert list(failures()) == [f"{name}.tif"]
    if victim == "ctrl-c":
        assert text == "tiles: interrupted\n" and not hidden()
    cut()
    assert all(shard("out", str(i)) for i in range(3)) and not hidden() and not Path("out/failed.csv").exists()


def test_parts_that_run_at_once_share_a_folder_and_do_each_slide_once():
    for i in range(5):
        write(f"{i}.tif", size=(512, 384), seed=i)
    Path("in/1.tif").write_bytes(b"no slide")
    parts = [start("", f"--part={i}/2") for i in (1, 2)]
    texts = [part.communicate(timeout=60)[0] for part in parts]
    assert "3 slides done, 0 were done before, 0 failed" in texts[0] and parts[0].returncode == 0
    assert "1 slides done, 0 were done before, 1 failed" in texts[1] and parts[1].returncode == 1
    assert all(shard("out", name) for name in "0234") and not hidden()
    assert 'in/1.tif,"not a slide' in Path("out/failed.2of2.csv").read_text()
    assert not Path("out/failed.1of2.csv").exists()


def test_progress_is_short_and_each_failure_is_named(capsys, monkeypatch):
    for i in range(3):
        write(f"{i}.tif", size=(512, 384), seed=i)
    Path("in/3.tif").write_bytes(b"no slide")
    fails(tiles)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "in/3.tif: not a slide" in lines[0], "3 slides were done in less than slides.SECONDS"
    monkeypatch.setattr(slides, "SECONDS", -1)
    fails(tiles, "again")
    lines = [line for line in capsys.readouterr().out.splitlines() if "in/3.tif" not in line]
    assert lines[1] == "tiles: 2 of 4 slides, 0 failed, 0 min left" and len(lines) == 5
    assert max(map(len, lines)) <= 80


def test_a_full_disk_stops_with_one_line_and_leaves_what_is_done():
    write()
    write("small.tif", size=(512, 384))
    cut(slides="in/small.tif")
    process = start("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))")
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and text.startswith("tiles: out: ") and text.count("\n") == 1
    assert "File too large; what is done is kept" in text
    assert shard("out", "small") and sorted(os.listdir("out")) == ["keys.json", "small.json", "small.tar"]
    cut()
    assert shard()


# coordinates

TRIDENT = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
           "overlap": 0, "name": "a", "savetodir": "x", "level0_width": 1024, "level0_height": 768}
LEVEL0 = {key: value for key, value in TRIDENT.items() if key != "patch_size"}
CLAM = {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0), "downsampled_level_dim": (256, 192),
        "level_dim": (256, 192), "name": "a", "save_path": "x"}


def write_h5(xy, attrs):
    with pytest.importorskip("h5py").File("a.h5", "w") as h5:
        h5.create_dataset("coords", data=np.array(xy)).attrs.update(attrs)


@pytest.mark.parametrize("mpp", [0.5, 0.37])
def test_coordinates_read_back_as_the_same_places_and_scale(mpp):
    pytest.importorskip("h5py")
    slide = wsi.Slide(write("a.b.svs", mpp=0.2527, size=(2048, 1536)))
    coords.main(config(coords, mpp=mpp, workers=2))
    xy, size, read_mpp = coords.read_coords("out/a.b_patches.h5", slide)
    places, _ = slide.grid(128, mpp)
    assert len(xy) and np.array_equal(xy, places)
    true = slide.extent(128, mpp)[0] * slide.mpp  # um
    assert size * read_mpp == pytest.approx(true, rel=0.005)
    assert size == 128 and read_mpp == pytest.approx(mpp, rel=0.03)
    cut("tiles", coords="out")
    s = sidecar("tiles", "a_b")
    assert sorted(zip(s.x, s.y)) == sorted(map(tuple, xy.tolist())) and s.tile_px == size
    assert set(s.mpp) == {read_mpp} and set(s.tissue) == {None} and shard("tiles", "a_b")


@pytest.mark.parametrize("xy, attrs, mpp", [
    ([(0, 512)], TRIDENT, 2 * 0.2527), ([(0, 512)], CLAM, 4 * 0.2527), ([(0.0, 512.0)], TRIDENT | {
        "patch_size": 256.0, "patch_size_level0": np.array([512]), "level0_width": 1024.0}, 2 * 0.2527)])
def test_coordinates_as_trident_and_clam_write_them_or_in_whole_floats_give_the_true_scale(xy, attrs, mpp):
    write_h5(xy, attrs)
    xy, size, read_mpp = coords.read_coords("a.h5", wsi.Slide(write(mpp=0.2527)))
    assert (xy.tolist(), xy.dtype) == ([[0, 512]], np.int32)
    assert (size, type(size)) == (256, int) and read_mpp == pytest.approx(mpp)


@pytest.mark.parametrize("xy, attrs, reason", [
    ([(0, 512)], TRIDENT | {"level0_width": 999}, "places of another slide"),
    ([(0, 512)], CLAM | {"patch_level": 7}, "a patch_level of this slide"),
    ([(0, 512)], {}, "coords lack patch_size_level0"),
    ([(50000, 50000)], {"patch_size": 128, "patch_level": 0}, "places of another slide"),
    ([(0, 0, 128, 128, 0)], {"patch_size": 128, "patch_level": 0}, "coords of shape (1, 5)"),
    ([(0, 0)], {"patch_size": 0, "patch_level": 0}, "patch_size 0"),
    ([(0, 512)], CLAM | {"level_dim": (999, 999)}, "places of another slide"),
    ([(0, 0), (np.nan, 512)], {"patch_size": 128, "patch_level": 0}, "1 of 2 lie outside its (1024, 768) px, such"),
    ([(0, 0), (0, -512)], {"patch_size": 512, "patch_level": 0}, "px, such as row 1, [0, -512]"),
    ([(0, 512.5)], TRIDENT, "coords are float64 and no whole px, such as [0.0, 512.5]"),
    ([(b"0", b"512")], TRIDENT, "coords are |S3 and no whole px"), (5, TRIDENT, "scalar"),
    (np.zeros((0, 2)), TRIDENT, "N > 0"),
    ([(0, 512)], TRIDENT | {"patch_size": 256.5}, "patch_size is np.float64(256.5), not 1 whole numbers"),
    ([(0, 512)], TRIDENT | {"patch_size": "256"}, "patch_size is '256'"), ([(0, 512)], LEVEL0, "coords lack"),
    ([(0, 512)], TRIDENT | {"patch_size_level0": np.nan}, "patch_size_level0 is np.float64(nan)"),
    ([(0, 512)], CLAM | {"patch_level": [0, 1]}, "patch_level is array([0, 1])"),
    ([(0, 512)], CLAM | {"level_dim": 5}, "not 2 whole numbers"), (None, TRIDENT, "group")])
def test_places_of_another_slide_or_of_odd_types_are_refused_and_never_cut_to_whole_numbers(xy, attrs, reason):
    h5py, slide = pytest.importorskip("h5py"), wsi.Slide(write())
    with h5py.File("a.h5", "w") as h5:
        coords_of = h5.create_group("coords") if xy is None else h5.create_dataset("coords", data=np.array(xy))
        coords_of.attrs.update(attrs)
    with one_line(f"^a.h5: .*{re.escape(reason)}"):
        coords.read_coords("a.h5", slide)


def test_without_h5py_coordinates_say_what_to_install_and_slides_without_a_file_fail_alone(monkeypatch):
    pytest.importorskip("h5py")
    write()
    assert "no a_patches.h5 or a.h5 in coords=nowhere" in fails(tiles, coords="nowhere")
    Path("a.h5").write_bytes(b"junk")
    assert "a.h5: neither TRIDENT's nor CLAM's" in fails(tiles, "junk", coords=".")
    monkeypatch.setattr(coords, "h5py", None)
    for script, keys in ((coords, {}), (tiles, {"coords": "."})):
        with pytest.raises(ValueError, match="pip install h5py"):
            script.main(config(script, **keys))


# features

@pytest.fixture
def encoder():
    """Keys of features for a random encoder."""
    torch.manual_seed(0)
    vit = model.ViT(model.ARCHS["toy"])
    vit.init_weights()
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 5, "config": {"norm": "half"}}, "5.pth")
    return {"tile_px": 112, "weights": "5.pth", "device": "cpu"}


def direct(path, xy, mean=(0.5,) * 3, std=(0.5,) * 3):
    """Class tokens of tiles read one by one."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    slide, vit = wsi.Slide(path), model.load_backbone("5.pth").eval()
    x = np.stack([slide.read(x, y, 112, 0.5) for x, y in xy.tolist()])
    with torch.no_grad():
        return vit((torch.tensor(x).permute(0, 3, 1, 2) / 255 - mean) / std)["cls"].numpy()


def test_features_are_the_encoders_of_the_grid_in_its_order(encoder, monkeypatch):
    monkeypatch.setattr(wsi, "BLOCK", 150)  # several, so that workers return them out of the grid's order
    h5py = pytest.importorskip("h5py")
    path = write("a.b.tif", size=(512, 384))
    keys = config(features, **encoder, workers=2, batch_size=5)
    features.main(keys)
    with h5py.File("out/a.b.h5") as h5:
        found, xy, about, attrs = h5["features"][:], h5["coords"][:], dict(h5["features"].attrs), h5["coords"].attrs
        assert attrs["patch_size_level0"] == 112 and attrs["name"] == "a.b"
    assert found.dtype == np.float16 and found.shape == (len(xy), 128)
    assert np.array_equal(xy, wsi.Slide(path).grid(112, 0.5)[0]) and len(xy) > 5
    assert np.abs(found - direct(path, xy)).max() < 0.01 and np.ptp(found, axis=0).max() > 0.05
    assert (about["weights"], about["mpp"], about["tile_px"], len(about["weights_sha256"])) == ("5.pth", 0.5, 112, 64)
    before = os.stat("out/a.b.h5").st_mtime_ns
    features.main(keys | {"workers": 0})
    assert os.stat("out/a.b.h5").st_mtime_ns == before
    with pytest.raises(ValueError, match="norm was .* use another --out"):
        features.main(keys | {"norm": "imagenet"})
    with pytest.raises(ValueError, match="tile_px=128: not a multiple of the patch of 14 px"):
        features.main(keys | {"tile_px": 128, "out": "other"})
    features.main(keys | {"coords": "out", "out": "again"})  # from the places of a features file
    with h5py.File("again/a.b.h5") as h5:
        assert np.array_equal(h5["coords"][:], xy) and np.abs(h5["features"][:] - found).max() < 0.01


def test_features_of_a_folder_and_of_a_safetensors_file_are_the_pths_and_few_tiles_are_said_once(encoder, capsys):
    st = pytest.importorskip("safetensors.torch")
    for name in "ab":
        write(f"{name}.tif", size=(512, 384))
    os.mkdir("hf")
    st.save_file(model.load_backbone("5.pth").state_dict(), "hf/model.safetensors")
    Path("hf/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    coords.say_few.cache_clear()
    found = {}
    for i, weights in enumerate(("5.pth", "hf/", "hf/model.safetensors")):
        features.main(config(features, f"out{i}", **encoder | {"weights": weights, "arch": "toy", "mpp": 1.5}))
        x, _, about = open_features(next(str(p) for p in Path(f"out{i}").iterdir() if p.stem == "a"))
        found[about["weights"]] = about["weights_sha256"], np.array(x)
    assert capsys.readouterr().out.count("a slide has fewer than 4 tiles") == 1
    (_, x), (sha256, y), (same, z) = (found[name] for name in ("5.pth", "hf", "model.safetensors"))
    assert np.array_equal(x, y) and np.array_equal(y, z) and len(x) == 2
    assert sha256 == same == hashlib.sha256(Path("hf/model.safetensors").read_bytes()).hexdigest()


def test_tiles_that_do_not_divide_into_patches_are_resized_to_the_encoders_input_and_it_is_said(encoder):
    """TRIDENT's 256 px with patches of 14 px, in small: places of 120 px for an encoder that was trained at 112 px."""
    h5py = pytest.importorskip("h5py")
    path = write(size=(512, 384))
    stored = torch.load("5.pth")
    torch.save(stored | {"config": stored["config"] | {"global_px": 112}}, "5.pth")
    coords.main(config(coords, "places", tile_px=120))
    keys = config(features, **encoder | {"tile_px": 0})
    features.main(keys | {"coords": "places"})
    with h5py.File("out/a.h5") as h5:
        found, xy, about = h5["features"][:], h5["coords"][:], dict(h5["features"].attrs)
    assert (about["tile_px"], about["input_px"], about["mpp"]) == (120, 112, 0.5)
    vit, slide = model.load_backbone("5.pth").eval(), wsi.Slide(path)
    pixels = torch.tensor(np.stack([slide.read(x, y, 120, 0.5) for x, y in xy.tolist()])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = vit(torch.stack([eval_bach.resize(image, 112, 112) for image in pixels]) / 255 * 2 - 1)["cls"]
    assert np.abs(found - expected.numpy()).max() < 0.02 and np.ptp(found, axis=0).max() > 0.05
    features.main(keys | {"out": "grid"})  # its own tile size, where none is stated
    with h5py.File("grid/a.h5") as h5:
        assert h5["features"].attrs["tile_px"] == h5["features"].attrs["input_px"] == 112


def test_a_killed_reader_costs_its_own_slide(encoder, monkeypatch):
    write(size=(512, 384))
    monkeypatch.setattr(features, "read_some", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    text = fails(features, **encoder, workers=1)
    assert "a.tif: RuntimeError: DataLoader worker" in text and not hidden()


def test_an_encoder_that_fails_stops_the_features(encoder, monkeypatch):
    write(size=(512, 384))
    monkeypatch.setattr(model.ViT, "forward", lambda *a: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(OSError, match="the encoder failed: The size of tensor a .*; what is done is kept"):
        features.main(config(features, **encoder))


def test_without_h5py_features_are_npz_and_damaged_tiles_have_none(encoder, monkeypatch):
    monkeypatch.setattr(coords, "h5py", None)
    path = write(size=(3072, 2304))
    sound, _ = wsi.Slide(path).grid(112, 0.5)
    damage(path, 1)
    features.main(config(features, **encoder, norm="imagenet"))
    with np.load("out/a.npz") as found:
        assert found["features"].shape == (len(found["coords"]), 128) and found["tile_px"] == 112
        xy, damaged = found["coords"], int(found["damaged"])
        pick = slice(None, None, 49)
        expected = direct(path, xy[pick], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert np.abs(found["features"][pick] - expected).max() < 0.02
    assert damaged > 0 and len(xy) + damaged == len(sound)
    assert [p for p in sound.tolist() if p in xy.tolist()] == xy.tolist()
