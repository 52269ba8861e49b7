"""The benchmarks still run, and both sides of a comparison compute the same."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import losses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, and a slide at 0.5 um/px whose lower level is 2.003 times as coarse; all passes for tissue."""
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path_factory.mktemp("bench")
    noise = np.random.default_rng(0).random((160, 160, 1)) * [60, 90, 40]
    image = Image.fromarray(np.uint8([150, 80, 150] + noise)).resize((1280, 1280), Image.BICUBIC)
    for i in range(2):
        image.crop((200 * i, 0, 200 * i + 300, 300)).save(folder / f"{i}.png")
    with tifffile.TiffWriter(folder / "slide.tif") as tif:
        for i, px in enumerate((1280, 639)):
            tif.write(np.asarray(image.resize((px, px), Image.BILINEAR)), tile=(256, 256), photometric="rgb",
                      subfiletype=int(i > 0), metadata=None, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, **keys):
        monkeypatch.setattr(sys, "argv", [script, *(f"--{k}={v}" for k, v in keys.items())])
        runpy.run_path(str(ROOT / "bench" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_data_benchmark_prints_its_table(folder, run):
    text = run("data.py", images=folder / "*.png", slides=folder / "*.tif", tiles=2, batch=1, repeats=1)
    for row in ("decode", "worker", "everything, clipped HED", "worker, slides at 0.5 um/px"):
        assert f"\n{row}" in text, text
    assert "at 0.25 um/px are left out" in text and text.count("left out") == 1, text


def test_the_reading_benchmark_prints_its_table_and_exact_reads_are_nearer_to_what_is_stored(folder, run):
    text = run("reads.py", slides=folder / "*.tif", tiles=4, places=3, tile_px=64, repeats=1)
    rows = {tuple(line.partition("|")[0].split()[1:]): line.partition("|")[2].split() for line in text.splitlines()
            if line.startswith("slide.tif")}
    assert list(rows) == [("0.5", "um/px"), ("1.0", "um/px"), ("level", "1")], text
    sharp, _, error, naive_sharp, _, naive_error = map(float, rows["level", "1"])
    assert abs(sharp - 1) < 0.1 and sharp >= naive_sharp and error <= naive_error, text


def test_the_losses_benchmark_prints_its_table_and_both_sides_agree(run):
    text = run("losses.py", rows=6, prototypes=64, repeats=1)
    assert text.count("\nsinkhorn") == 2 and text.count("\ntotal") == 2, text
    teacher, student = torch.randn(2, 6, 64)
    both = losses.sides(teacher, student, torch.rand(6))
    for name in ("sinkhorn", "total"):
        torch.testing.assert_close(both[name](), both[f"{name}, plain"](), atol=1e-6, rtol=1e-4)
