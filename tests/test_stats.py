"""prepare/stats.py: colours to paste as norm, their intervals, what else preprocessing changes; bench/data.py runs."""
import json

import numpy as np
import pytest
from PIL import Image
from test_wsi import PINK, flat

from prepare import stats

KEYS = {"seed": 0, "patient": r"TCGA-\w\w-\w{4}", "tiles": ""}


class Fake:
    """A source of given (tile, slide, x, y, mpp); an exception instead of a tile is raised."""

    def __init__(self, tiles):
        self.tiles, self.size = tiles, len(tiles)

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
    result, _, _ = stats.tile_stats(Fake(tiles), KEYS | {"samples": 20})  # the source has 13
    stats.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    pixels = np.concatenate([tile.reshape(-1, 3) for tile, *_ in tiles[:-1]]) / 255
    assert result["mean"] == pytest.approx(pixels.mean(0)) and result["std"] == pytest.approx(pixels.std(0))
    assert (result["tiles"], result["unreadable"]) == (12, 1)
    assert (result["patients"], result["files_without_patient"]) == (1, 4)
    pasted = {}
    exec(next(line for line in lines if line.startswith("norm =")), pasted)
    assert np.allclose(pasted["norm"], [result["mean"], result["std"]], atol=1e-4)
    assert lines[-4] == "12 tiles, 1 unreadable, 0 of unknown um/px, 0.0% near-duplicates"
    assert lines[-3] == "patients by --patient=TCGA-\\w\\w-\\w{4}: 1; files that tell none: 4, each counts as one"


def test_intervals_of_stats_cover_the_truth_although_tiles_of_a_slide_are_alike(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    rng, hits, naive = np.random.default_rng(0), [], []
    for _ in range(60):
        tiles = clustered(rng, 30, 5)
        result, _, _ = stats.tile_stats(Fake(tiles), KEYS | {"samples": 150})
        low, high = np.array(result["mean_ci95"]) * 255
        hits.append((low < 149.5) & (149.5 < high))  # uint8 cuts half a level off
        naive.append(high - low > 2 * 1.96 * np.array(result["std"]) * 255 / np.sqrt(150))
    assert 0.87 < np.mean(hits) < 0.99, np.mean(hits)
    assert np.mean(naive) > 0.95  # wider than if the tiles were independent


def test_scale_black_white_tissue_sharpness_and_repeated_tiles_are_measured(capsys):
    half = flat(PINK)
    half[:16], half[16:32], half[32:48] = 0, 255, (0, 0, 200)
    noise = np.random.default_rng(0).integers(90, 160, (64, 64, 3), np.uint8)
    tiles = [(half, "s", 0, 0, 0.25)] * 2 + [(noise, "s", 0, 0, 1.0), (noise + np.uint8(2), "t", 0, 0, float("nan"))]
    found, _, _ = stats.tile_stats(Fake(tiles), KEYS | {"samples": 2})
    assert (found["black"], found["white"], found["tissue"]) == ([0.25] * 4, [0.25] * 4, [0.5] * 4)
    assert (found["mpp"], found["width_um"], found["near_duplicates"]) == ([0.25] * 4, [16] * 4, 1)
    other, _, _ = stats.tile_stats(Fake(tiles[1:]), KEYS | {"samples": 3})
    assert other["mpp"][1] == 0.625 and other["sharpness"][2] > 100 and other["near_duplicates"] == pytest.approx(2 / 3)
    assert other["unknown_mpp"] == 1
    nobody, _, _ = stats.tile_stats(Fake(tiles[3:]), KEYS | {"samples": 1})
    stats.show(nobody)
    assert "mpp" not in nobody and "mpp         unknown" in capsys.readouterr().out


@pytest.mark.parametrize("size, share", [(4, 0.5), (None, 0)])
def test_what_is_drawn_twice_is_no_duplicate(size, share):
    """A source is read at most once; of one without a size, places of one slide may be drawn again."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(3)]
    source = Fake([(noise[i], f"s{i}", 0, 0, 0.5) for i in (0, 0, 1, 2)])
    if size is None:
        del source.size
    found, rows, _ = stats.tile_stats(source, KEYS | {"samples": 12})
    assert (found["tiles"], found["near_duplicates"]) == (size or 12, share) and len(rows) == found["tiles"]


def test_patients_are_those_of_groups_csv_then_of_the_pattern(tmp_path):
    (tmp_path / "groups.csv").write_text("file,patient\nA/0.png,one\n1.png,one\nA/2.png,two\n")
    names = [f"{tmp_path}/A/{name}.png" for name in ("0", "1", "2", "TCGA-AB-1234", "3")]
    source = Fake([(flat(PINK), name, 0, 0, float("nan")) for name in names])
    found, _, _ = stats.tile_stats(source, KEYS | {"samples": 9, "tiles": str(tmp_path)})
    assert (found["patients"], found["files_without_patient"]) == (3, 1)
    assert found["patients_by"].startswith(f"{tmp_path}/groups.csv, else --patient=TCGA")


def drawn(monkeypatch, sides):
    """(texts, axes) of the picture of sides {name: tiles}."""
    figure, made = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda self, file, dpi: made.append(self))
    stats.draw({name: stats.tile_stats(Fake(tiles), KEYS | {"samples": 30}) for name, tiles in sides.items()}, "")
    parts = made[0].subfigs
    texts = [text.get_text() for part in parts for text in part.texts]
    texts += [text.get_text() for part in parts for entry in part.legends for text in entry.get_texts()]
    return texts, [axes for part in parts for axes in part.axes]


def test_a_picture_has_six_tiles_a_side_at_one_scale_and_names_the_sides_by_their_paths(monkeypatch):
    a = [(flat(PINK, 64), f"s{i}", 0, 0, 0.5) for i in range(20)]
    b = [(flat(PINK, 64), f"s{i}", 0, 0, 1.0) for i in range(20)]
    texts, axes = drawn(monkeypatch, {"data/a": a, "data/b": b})
    assert any(text.startswith("data/a: 6 of 20 tiles, all at one scale") for text in texts)
    assert {"data/a: 20 tiles", "data/b: 20 tiles"} <= set(texts)
    assert [x.get_xlabel() for x in axes[:6]] == list(stats.MEASURES.values())
    assert {x.get_ylabel() for x in axes[:6]} == {"tiles (%)"}
    sheet = axes[6:]
    assert len(sheet) == 12 and all(len(x.images) == 1 and x.get_xlim() == (0, 64) for x in sheet)
    widths = [np.ptp(x.images[0].get_extent()[:2]) for x in sheet]
    assert widths == [32] * 6 + [64] * 6, "um"
    for x in (sheet[0], sheet[6]):
        assert x.lines[0].get_xdata().tolist() == [0, 20] and x.texts[0].get_text() == "20 um"


def test_a_picture_says_where_um_px_are_unknown(monkeypatch):
    a = [(flat(PINK, 64), f"s{i}", 0, 0, 0.5) for i in range(4)]
    b = [(flat(PINK, 80), f"s{i}", 0, 0, float("nan")) for i in range(5)]
    _, axes = drawn(monkeypatch, {"a": a, "b": b})
    assert [text.get_text() for text in axes[0].texts] == ["unknown for 5 of 5 tiles"]
    assert axes[12].get_title() == "80 px, um/px unknown" and not axes[12].lines and axes[6].lines
    assert [len(x.images) for x in axes[6:]] == [1] * 4 + [0] * 2 + [1] * 5 + [0]


def test_no_readable_tile_is_an_error():
    with pytest.raises(ValueError, match="none of 1 tiles could be read: damaged"):
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
    against = f"--tiles={tmp_path} --norm=((0.5,0.5,0.5),(0.5,0.5,0.5))"
    flags = "--samples=6", f"--against={against}", f"--picture={tmp_path}.png"
    lines = script("prepare/stats.py", config, *flags).splitlines()
    assert Image.open(f"{tmp_path}.png").width == 1950
    assert any(line.startswith(f"{tmp_path} by {config}: ") for line in lines)
    assert any(line.startswith(f"{tmp_path} by {against}: ") for line in lines)
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
