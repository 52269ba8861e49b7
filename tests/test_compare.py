"""prepare/compare.py and prepare/stats.py: two preprocessings side by side, and the colours of a source."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_wsi import PINK, flat, pyramid, texture, write_slide

import sources
import wsi
from prepare import compare, stats

ROOT = Path(__file__).parents[1]


def tissue(w, h):
    return np.where(np.random.default_rng(0).random((h, w, 1)) < 0.3, PINK, (130, 80, 160)).astype(np.uint8)


class Fake:
    """A source of given (tile, slide, x, y, mpp); an exception instead of a tile is raised."""

    def __init__(self, tiles):
        self.tiles, self.about = tiles, f"{len(tiles)} tiles"

    def read(self, n, attempt=0):
        tile, *where = self.tiles[n % len(self.tiles)]
        if isinstance(tile, Exception):
            raise tile
        return tile, dict(zip(("slide", "x", "y", "mpp"), where))


def compared(tmp_path, monkeypatch, a, b, samples):
    monkeypatch.setattr(sources, "open_source", lambda config: Fake(config["tiles"]))
    keys = stats.train_keys()
    compare.compare({"a": keys | {"tiles": a}, "b": keys | {"tiles": b}}, samples, str(tmp_path / "out"))
    rows = list(csv.DictReader(open(tmp_path / "out/compare.csv")))
    return [[row for row in rows if row["side"] == side] for side in "ab"]


def test_compare_measures_black_white_scale_and_unreadable_tiles(tmp_path, monkeypatch, capsys):
    half = flat(PINK)
    half[:16], half[16:32], half[32:48] = 0, 255, (0, 0, 200)
    a, b = compared(tmp_path, monkeypatch, [(half, "s", 0, 0, 0.25), (OSError("damaged"), "s", 0, 0, 0.25)],
                    [(tissue(64, 64), "s", 0, 0, 1.0), (tissue(64, 64), "s", 0, 0, float("nan"))], 4)
    assert [len(a), len(b)] == [2, 4]
    assert (float(a[0]["black"]), float(a[0]["white"]), float(a[0]["tissue"])) == (0.25, 0.25, 0.5)
    assert (float(a[0]["field_um"]), float(b[0]["field_um"])) == (16, 64)
    assert float(b[0]["sharpness"]) > 100 and b[0]["overlapped"] == ""  # no such slide, so its places mean nothing
    lines = dict(line.split(" | ", 1) for line in capsys.readouterr().out.splitlines() if " | " in line)
    table = {label.strip(): text.split(" | ") for label, text in lines.items()}
    assert [text.strip() for text in table["unreadable"]] == ["2", "0"]
    assert table["field_um"][0].split() == ["16"] * 4


def test_compare_finds_tiles_that_repeat_each_other_and_places_that_overlap(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "s.tif", [texture(1024, 900)], (0.25, 0.25))
    slide = wsi.Slide(path)
    tile = slide.read(0, 0, 128, 0.5)  # 256 level-0 px wide
    noisy = np.clip(tile + np.random.default_rng(0).integers(-2, 3, tile.shape), 0, 255).astype(np.uint8)
    third = np.concatenate([tile[:, :64], slide.read(500, 300, 128, 0.5)[:, 64:]], 1)
    alike = [(tile, path, 0, 0, 0.5), (noisy, "other", 0, 0, 0.5), (third, path, 500, 300, 0.5)]
    a, _ = compared(tmp_path, monkeypatch, alike, alike, 3)
    assert [row["near_duplicate"] for row in a] == ["1", "1", "0"]
    assert [row["overlapped"] for row in a] == ["0", "", "0"]  # there is no slide "other" to say what its pixels are
    places = [(0, 0), (100, 0), (400, 0), (550, 0), (400, 500)]  # 61 % of the first two is shared, 41 % of the next two
    a, _ = compared(tmp_path, monkeypatch, [(tile, path, x, y, 0.5) for x, y in places], alike, 5)
    assert [row["overlapped"] for row in a] == ["1", "1", "0", "0", "0"]


def test_compare_shows_the_scales_of_a_level_list_against_slides_read_at_a_target(tmp_path):
    lines = []
    keys = stats.train_keys() | dict(tile_px=64, mpps=(0.5,), tissue_share=0.0)
    for mpp in (0.25, 0.36):
        path = write_slide(tmp_path / f"{mpp}.tif", pyramid(tissue(1024, 1024), 2), (mpp, mpp))
        lines += [f"{path} {x} 64 {level}" for x in (64, 264, 464) for level in (0, 1)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    sides = {"a": keys | {"sample_list": str(tmp_path / "list.txt")}, "b": keys | {"slides": str(tmp_path / "*.tif")}}
    rows = compare.compare(sides, 12, str(tmp_path / "out"))
    assert {round(row["mpp"], 2) for row in rows["a"]} == {0.25, 0.36, 0.5, 0.72}
    assert [row["mpp"] for row in rows["b"]] == [0.5] * 12 and {row["field_um"] for row in rows["b"]} == {32}
    assert min(row["tissue"] for row in rows["a"]) > 0.9
    assert Image.open(tmp_path / "out/compare.png").size == (1200, 600)


def test_compare_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    compared(tmp_path, monkeypatch, [(flat(PINK), "s", 0, 0, 0.5)], [(flat(PINK), "s", 0, 0, 0.5)], 1)
    assert "matplotlib" in capsys.readouterr().out and os.listdir(tmp_path / "out") == ["compare.csv"]


# ---- stats ----


def clustered(rng, slides, tiles, spread=30):
    """Tiles of flat colours: one colour per slide, plus noise per tile."""
    colours = 150 + spread * rng.standard_normal((slides, 1, 3))
    values = np.clip(colours + 8 * rng.standard_normal((slides, tiles, 3)), 0, 255).astype(np.uint8)
    return [(np.broadcast_to(values[i, j], (2, 2, 3)), f"s{i}", 0, 0, 0.5) for i in range(slides) for j in range(tiles)]


def test_stats_are_numpys_over_all_pixels_and_can_be_pasted(capsys):
    rng = np.random.default_rng(0)
    tiles = [(rng.integers(0, 256, (8 + i, 8, 3), np.uint8), f"{name}{i % 4}", 0, 0, 0.5)
             for i, name in enumerate(["s"] * 8 + ["TCGA-AB-1234-"] * 4)]
    tiles.append((OSError("damaged"), "s0", 0, 0, 0.5))
    result = stats.colour_stats(Fake(tiles), {"samples": 13, "seed": 0, "patient": r"TCGA-\w\w-\w{4}"})
    stats.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    pixels = np.concatenate([tile.reshape(-1, 3) for tile, *_ in tiles[:-1]]) / 255
    assert result["mean"] == pytest.approx(pixels.mean(0)) and result["std"] == pytest.approx(pixels.std(0))
    assert (result["tiles"], result["patients"], result["unreadable"]) == (12, 5, 1)
    pasted = {}
    exec(next(line for line in lines if line.startswith("norm =")), pasted)
    assert np.allclose(pasted["norm"], [result["mean"], result["std"]], atol=1e-4)
    assert lines[-3] == "12 tiles of 5 patients, 1 unreadable"


def test_intervals_of_stats_cover_the_truth_although_tiles_of_a_slide_are_alike(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    rng, hits, naive = np.random.default_rng(0), [], []
    for _ in range(60):
        tiles = clustered(rng, 30, 5)
        result = stats.colour_stats(Fake(tiles), {"samples": 150, "seed": 0, "patient": "none"})
        low, high = np.array(result["mean_ci95"]) * 255
        hits.append((low < 149.5) & (149.5 < high))  # uint8 cuts half a level off
        naive.append(high - low > 2 * 1.96 * np.array(result["std"]) * 255 / np.sqrt(150))
    assert 0.87 < np.mean(hits) < 0.99, np.mean(hits)
    assert np.mean(naive) > 0.95  # wider than if the tiles were independent


def test_no_readable_tile_is_an_error_for_stats_and_compare(tmp_path, monkeypatch):
    broken = [(OSError("damaged"), "s", 0, 0, 0.5)]
    with pytest.raises(ValueError, match="none of 5 tiles"):
        stats.colour_stats(Fake(broken), {"samples": 5, "seed": 0, "patient": "none"})
    with pytest.raises(ValueError, match="none of 5 tiles of side b"):
        compared(tmp_path, monkeypatch, [(flat(PINK), "s", 0, 0, 0.5)], broken, 5)


# ---- the command lines ----


def run(script, *arguments):
    return subprocess.run([sys.executable, ROOT / "prepare" / script, *arguments], capture_output=True, text=True)


def test_train_keys_are_the_keys_of_train_py():
    keys = stats.train_keys()
    assert keys["batch_size"] == 48 and keys["norm"] is None and keys["mpps"][0] == 0.25
    assert not {"rank", "config", "data", "__builtins__"} & set(keys)


@pytest.mark.slow
def test_the_scripts_take_train_pys_keys_and_configs_and_say_what_is_missing(tmp_path):
    for k in range(6):
        Image.fromarray(np.full((40, 40, 3), (200, 100 + 10 * k, 150), np.uint8)).save(tmp_path / f"{k}.png")
    config = tmp_path / "a.py"
    config.write_text(f"tiles = {str(tmp_path)!r}\nseed = 3\n")
    done = run("stats.py", config, "--samples=6")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["mean"] == pytest.approx([200 / 255, 125 / 255, 150 / 255])
    done = run("compare.py", f"--a={config}", f"--b={config} --seed=4", "--samples=6", f"--out={tmp_path}/out")
    assert done.returncode == 0 and (tmp_path / "out/compare.csv").is_file(), done.stderr
    assert "config: seed = 4" in done.stdout
    for script, argument, message in (("stats.py", "--samples=1", "set exactly one of slides"),
                                      ("stats.py", "--tile=x", "did you mean 'tiles'"),
                                      ("compare.py", f"--a={config}", "--b='...' --out=")):
        failed = run(script, argument)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
