"""The benchmarks: their PIL recipe is the recipe, and the scripts still run."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_bach
import model
from bench import data as bench
from bench import losses

ROOT = Path(__file__).parents[1]


def stained(size):
    """Smooth purple to pink noise, uint8 (size, size, 3): all of it passes for tissue."""
    noise = np.random.default_rng(0).random((size // 8, size // 8, 1)) * [60, 90, 40]
    return np.asarray(Image.fromarray(np.uint8([150, 80, 150] + noise)).resize((size, size), Image.BICUBIC))


def test_the_pil_recipes_hed_equals_scikit_image():
    z = np.load(ROOT / "tests/golden/hed.npz")
    for i in range(3):
        np.testing.assert_allclose(bench.float64_hed(z["rgb"], z[f"shift{i}"]), z[f"rgb{i}"], atol=1e-10)


def test_the_columns_that_are_compared_make_the_same_picture():
    """A benchmark that flatters itself would leave something out."""
    keys = {**bench.train_keys(), "hed": "openmidnight"}
    rng, norm = np.random.default_rng(0), torch.tensor(model.norm_values(keys["norm"]))
    tile = stained(96)
    rows = torch.stack([data.colour_parameters(rng, keys, 0.5) for _ in range(40)])
    crops = torch.from_numpy(tile.copy()).permute(2, 0, 1).expand(40, -1, -1, -1)
    ours = data.augment(crops, rows, keys, "cpu")
    theirs = torch.stack([bench.normalise(bench.pil_colour(Image.fromarray(tile), row), norm) for row in rows])
    plain = bench.normalise(Image.fromarray(tile), norm)
    off = (ours - theirs).abs().mean((1, 2, 3)) * 255 * norm[1].mean()  # grey levels
    assert off.max() < 4 and off.mean() < 1.5, off
    assert ((theirs - plain).abs().mean((1, 2, 3)) * 255 * norm[1].mean()).mean() > 10


def test_the_pil_recipes_crops_have_the_area_and_aspect_of_ours():
    ramp = np.stack(np.broadcast_arrays(np.arange(256)[None], np.arange(256)[:, None], 0), 2).astype(np.uint8)
    tile, pixels = Image.fromarray(ramp), torch.from_numpy(ramp).permute(2, 0, 1)[None]
    rng, sides = np.random.default_rng(0), []
    for _ in range(300):
        theirs = torch.from_numpy(np.array(bench.pil_crop(tile, rng, (0.05, 0.32), 32))).permute(2, 0, 1)
        sides.append([[int(crop[i].max()) - int(crop[i].min()) for i in (0, 1)]
                      for crop in (theirs, data.crop_and_flip(pixels, rng, (0.05, 0.32), 32))])
    sides = np.sort(np.array(sides), axis=0)  # (crops, whose, width and height)
    assert np.abs(sides[:, 0] - sides[:, 1]).mean() < 6, sides.mean(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and one slide whose lower level is 2.003 times as coarse."""
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path_factory.mktemp("bench")
    level0 = stained(1280)
    for i in range(2):
        Image.fromarray(level0[:300, 200 * i : 200 * i + 300]).save(folder / f"{i}.png")
    with tifffile.TiffWriter(folder / "slide.tif") as tif:
        for i, px in enumerate((1280, 639)):
            tif.write(np.asarray(Image.fromarray(level0).resize((px, px), Image.BILINEAR)), tile=(256, 256),
                      photometric="rgb", subfiletype=int(i > 0), metadata=None, compression=None,
                      resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return folder


def run(monkeypatch, capsys, script, **keys):
    monkeypatch.setattr(sys, "argv", [script, *(f"--{k}={v}" for k, v in keys.items())])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().out


def test_the_data_benchmark_prints_its_tables(folder, monkeypatch, capsys):
    text = run(monkeypatch, capsys, "bench/data.py", images=folder / "*.png", slides=folder / "*.tif", tiles=2, batch=1,
               repeats=1)
    for row in ("decode", "worker", "everything, clipped HED", "PIL", "worker, slides at 0.5 um/px"):
        assert f"\n{row}" in text, text
    assert "at 0.25 um/px are left out" in text and text.count("left out") == 1, text  # a slide of 0.5 um/px
    assert text.count(" 384 x") == 4, text


def test_the_reading_benchmark_prints_its_tables(folder, monkeypatch, capsys):
    torch.manual_seed(0)
    torch.save({"teacher": model.ViT(model.ARCHS["toy"]).state_dict(), "arch": "toy"}, folder / "toy.pth")
    text = run(monkeypatch, capsys, "bench/reads.py", slides=folder / "*.tif", tiles=4, places=3, tile_px=64,
               place_px=56, repeats=1, weights=folder / "toy.pth")
    grids = [line.split() for line in text.splitlines() if line.startswith("slide.tif")]
    assert [row[1] for row in grids] == ["0.5", "1.0", "1"] and "left out" not in text, text
    exact, naive = (list(map(float, side.split())) for side in text.splitlines()[-1].split("|")[1:3])
    assert abs(exact[0] - 1) < 0.1 and exact[2] <= naive[2], text  # sharpness and error against the stored pixels


def test_the_probe_benchmark_prints_its_line(monkeypatch, capsys):
    monkeypatch.setattr(eval_bach, "PATIENCE", eval_bach.PATIENCE)  # the script sets it
    text = run(monkeypatch, capsys, "bench/probe.py", width=8, steps=20, loop_steps=10, repeats=1)
    assert text.splitlines()[-1].startswith("5 heads x 20 steps at width 8, one core: "), text


def test_the_losses_keep_one_gradient_beside_targets_and_logits_and_move_a_sixth():
    """Counted on tensors without data, through a cache of 32 MB: bf16, an eighth of ViT-g's 3,379 rows."""
    found = losses.counted(422, 131072, 32e6)
    N = 422 * 131072
    moved, peak = (dict(zip(found, x)) for x in zip(*found.values()))
    assert moved["sinkhorn"] / N == pytest.approx(2 * 2 + 5 * 4, rel=0.02)
    assert moved["total"] / N == pytest.approx(2 * 2 + 5 * 4 + 2 * 2 + 4 + 2 * 2, rel=0.02)
    assert moved["total, plain"] > 6 * moved["total"]
    assert peak["sinkhorn"] / N == pytest.approx(4, rel=0.03)
    assert peak["total"] / N == pytest.approx(4 + 2, rel=0.07) and peak["total, plain"] / N > 11.9


def test_what_the_losses_benchmark_counts_is_what_operations_do():
    with losses.Traffic(cache=1000) as t:
        a, b = torch.ones(400), torch.ones(100)  # 1600 bytes do not fit and are written, 400 do
        b.mul_(2)
        assert (t.moved, t.peak, t.live) == (1600, 2000, 2000)
        a.mul_(2)  # read and written, and b is driven out
        assert t.moved == 3 * 1600 + 400
        b = a[:200] + 1  # the view costs nothing; half of it is read, and the sum stays in the cache
        assert (t.moved, t.peak, t.live) == (3 * 1600 + 400 + 800, 2800, 2400)


def test_the_losses_benchmark_prints_its_tables_and_both_sides_agree(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "bench/losses.py", rows=6, prototypes=64, full_rows=6, full_prototypes=64,
               repeats=1)
    assert text.count("\nsinkhorn ") == 2 and text.count("\ntotal, plain ") == 1, text
    teacher, student = torch.randn(2, 6, 64)
    both = losses.sides(teacher, student, torch.rand(6))
    for name in ("sinkhorn", "total"):
        torch.testing.assert_close(both[name](), both[f"{name}, plain"](), atol=1e-6, rtol=1e-4)
