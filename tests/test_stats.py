"""prepare/stats.py: colours to paste as norm, their intervals, what else preprocessing changes; bench/data.py runs."""
import json

import numpy as np
import pytest
from PIL import Image
from test_wsi import PINK, flat

from prepare import stats

KEYS = {"seed": 0, "patient": r"TCGA-\w\w-\w{4}"}


class Fake:
    """A source of given (tile, slide, x, y, mpp); an exception instead of a tile is raised."""

    def __init__(self, tiles):
        self.tiles, self.about = tiles, f"{len(tiles)} tiles"

    def read(self, n, attempt=0):
        tile, *where = self.tiles[n % len(self.tiles)]
        if isinstance(tile, Exception):
            raise tile
        return tile, dict(zip(("slide", "x", "y", "mpp"), where))


def clustered(rng, slides, tiles, spread=30):
    """Tiles of flat colours: one colour per slide, plus noise per tile."""
    colours = 150 + spread * rng.standard_normal((slides, 1, 3))
    values = np.clip(colours + 8 * rng.standard_normal((slides, tiles, 3)), 0, 255).astype(np.uint8)
    return [(np.broadcast_to(values[i, j], (3, 3, 3)), f"s{i}", 0, 0, 0.5) for i in range(slides) for j in range(tiles)]


def test_stats_are_numpys_over_all_pixels_and_can_be_pasted(capsys):
    rng = np.random.default_rng(0)
    tiles = [(rng.integers(0, 256, (8 + i, 8, 3), np.uint8), f"{name}{i % 4}", 0, 0, 0.5)
             for i, name in enumerate(["s"] * 8 + ["TCGA-AB-1234-"] * 4)]
    tiles.append((OSError("damaged"), "s0", 0, 0, 0.5))
    result = stats.tile_stats(Fake(tiles), KEYS | {"samples": 13})
    stats.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    pixels = np.concatenate([tile.reshape(-1, 3) for tile, *_ in tiles[:-1]]) / 255
    assert result["mean"] == pytest.approx(pixels.mean(0)) and result["std"] == pytest.approx(pixels.std(0))
    assert (result["tiles"], result["patients"], result["unreadable"]) == (12, 5, 1)
    pasted = {}
    exec(next(line for line in lines if line.startswith("norm =")), pasted)
    assert np.allclose(pasted["norm"], [result["mean"], result["std"]], atol=1e-4)
    assert lines[-3] == "12 tiles of 5 patients, 1 unreadable, 0.0% near-duplicates"


def test_intervals_of_stats_cover_the_truth_although_tiles_of_a_slide_are_alike(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    rng, hits, naive = np.random.default_rng(0), [], []
    for _ in range(60):
        tiles = clustered(rng, 30, 5)
        result = stats.tile_stats(Fake(tiles), KEYS | {"samples": 150})
        low, high = np.array(result["mean_ci95"]) * 255
        hits.append((low < 149.5) & (149.5 < high))  # uint8 cuts half a level off
        naive.append(high - low > 2 * 1.96 * np.array(result["std"]) * 255 / np.sqrt(150))
    assert 0.87 < np.mean(hits) < 0.99, np.mean(hits)
    assert np.mean(naive) > 0.95  # wider than if the tiles were independent


def test_scale_black_white_tissue_sharpness_and_repeated_tiles_are_measured():
    half = flat(PINK)
    half[:16], half[16:32], half[32:48] = 0, 255, (0, 0, 200)
    noise = np.random.default_rng(0).integers(90, 160, (64, 64, 3), np.uint8)
    tiles = [(half, "s", 0, 0, 0.25)] * 2 + [(noise, "s", 0, 0, 1.0), (noise + np.uint8(2), "t", 0, 0, float("nan"))]
    found = stats.tile_stats(Fake(tiles), KEYS | {"samples": 2})
    assert (found["black"], found["white"], found["tissue"]) == ([0.25] * 4, [0.25] * 4, [0.5] * 4)
    assert (found["mpp"], found["width_um"], found["near_duplicates"]) == ([0.25] * 4, [16] * 4, 1)
    other = stats.tile_stats(Fake(tiles[1:]), KEYS | {"samples": 3})
    assert other["mpp"][1] == 0.625 and other["sharpness"][2] > 100 and other["near_duplicates"] == pytest.approx(2 / 3)
    assert "mpp" not in stats.tile_stats(Fake(tiles[3:]), KEYS | {"samples": 1})  # nobody knows it


def test_no_readable_tile_is_an_error():
    with pytest.raises(ValueError, match="none of 5 tiles could be read: damaged"):
        stats.tile_stats(Fake([(OSError("damaged"), "s", 0, 0, 0.5)]), KEYS | {"samples": 5})


def test_train_keys_are_the_keys_of_train_py():
    keys = stats.train_keys()
    assert keys["batch_size"] == 48 and keys["norm"] is None and keys["mpps"][0] == 0.25
    assert not {"rank", "config", "data", "__builtins__"} & set(keys)


def test_the_script_takes_train_pys_keys_and_configs_and_says_what_is_missing(script, tmp_path):
    for k in range(6):
        Image.fromarray(np.full((40, 40, 3), (200, 100 + 10 * k, 150), np.uint8)).save(tmp_path / f"{k}.png")
    config = tmp_path / "a.py"
    config.write_text(f"tiles = {str(tmp_path)!r}\nseed = 3\n")
    found = json.loads(script("prepare/stats.py", config, "--samples=6").splitlines()[-1])
    assert found["mean"] == pytest.approx([200 / 255, 125 / 255, 150 / 255])
    for flag, message in (("--samples=1", "set exactly one of slides"), ("--tile=x", "did you mean 'tiles'")):
        with pytest.raises(SystemExit, match=message):
            script("prepare/stats.py", flag)


def test_the_data_benchmark_prints_its_table_and_names_what_it_cannot_read(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # and needs no git
    command = ["bench/data.py", f"--tiles={tmp_path}", "--batch_size=1", "--repeats=1"]
    Image.effect_noise((256, 256), 60).save(tmp_path / "0.png")
    text = script(*command)
    assert text.startswith("config: ") and "1 of 1 tiles in a folder" in text and "commit unknown" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["tile", "batch", "everything"]
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"^bench/data.py: .*0\.png"):
        script(*command)
