"""prepare/heatmap.py: similarity of places, scores of a probe, and a picture of either."""
import csv

import numpy as np
import pytest
from PIL import Image

from prepare import heatmap
from prepare.toy import write_tiff

FEATURES = np.ones((12, 2), np.float16)
COORDS = np.stack(np.meshgrid(np.arange(3), np.arange(4)), -1).reshape(-1, 2) * 40
CONFIG = dict(slide="", features="", context="", x=0, y=0, scores="", column="", out="")


@pytest.fixture
def world(tmp_path):
    """A slide of 3 x 4 places whose left column has one feature and whose others have another, and its context."""
    write_tiff(tmp_path / "a.svs", Image.new("RGB", (120, 160), (220, 150, 190)), 0.5)
    features = np.where(COORDS[:, :1] == 0, [1.0, 0.0], [0.0, 1.0]).astype(np.float16)
    about = dict(mpp=0.5, tile_px=40, patch_size_level0=40, level0_mpp=0.5)
    np.savez(tmp_path / "a.npz", features=features, coords=COORDS, **about)
    np.savez(tmp_path / "c.npz", features=features, coords=COORDS, context=features[:, ::-1].copy(), **about)
    with open(tmp_path / "scores.csv", "w", newline="") as f:
        csv.writer(f).writerows([("slide", "x", "y", "tumor"), ("a", 20, 20, 0.9), ("b", 20, 20, 0.1)])
    keys = dict(slide=tmp_path / "a.svs", features=tmp_path / "a.npz", out=tmp_path / "out.png")
    return CONFIG | {key: str(value) for key, value in keys.items()}, tmp_path


def test_similarity_is_the_cosine_of_centred_features():
    features = np.array([[3, 1], [1, 1], [2, 5], [2, 1]], np.float16)  # their mean is (2, 2)
    z = features - np.float32(2)
    expected = z @ z[0] / np.linalg.norm(z, axis=1) / np.linalg.norm(z[0])
    assert np.allclose(heatmap.similarity(features, 0), expected, atol=1e-4)


def test_a_picture_of_similarity_and_one_of_scores(world, capsys):
    pytest.importorskip("matplotlib")
    config, folder = world
    heatmap.main(config | {"context": str(folder / "c.npz"), "x": 100, "y": 60})
    assert "raw features, features in context of 12 places" in capsys.readouterr().out
    with Image.open(folder / "out.png") as image:
        assert image.width > 1000
    heatmap.main(config | {"scores": str(folder / "scores.csv"), "column": "tumor"})
    assert "tumor of 12 places" in capsys.readouterr().out


def test_the_chosen_place_is_the_nearest_and_scores_are_this_slides(world):
    config, folder = world
    _, centres, about = heatmap.open_features(config["features"])
    panels, chosen, _ = heatmap.panels_of(config | {"x": 100, "y": 60}, centres, about["level0_mpp"])
    assert chosen.tolist() == [50, 30]
    places, values = panels["raw features"]
    assert (np.sign(values) == np.where(places[:, 0] == 10, -1, 1)).all()
    scores = config | {"scores": str(folder / "scores.csv"), "column": "tumor"}
    panels, chosen, label = heatmap.panels_of(scores, centres, about["level0_mpp"])
    assert chosen is None and label == "score" and panels["tumor"][1].tolist() == [0.9]
    with pytest.raises(ValueError, match="no column lung"):
        heatmap.panels_of(scores | {"column": "lung"}, centres, 0.5)
    with pytest.raises(ValueError, match="give --slide"):
        heatmap.main(CONFIG)


@pytest.mark.parametrize("keys, limits", [({"x": 100, "y": 60}, (-1, 1)), ({"column": "tumor"}, (0, 1))], ids=str)
def test_squares_lie_on_their_tiles_and_colours_span_the_range(world, monkeypatch, keys, limits):
    plt = pytest.importorskip("matplotlib.pyplot")
    config, folder = world
    (folder / "scores.csv").write_text("\ufeffslide,x,y,tumor\na,60,100,0.9\n", encoding="utf-8")  # of a spreadsheet
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    heatmap.main(config | keys | ({"scores": str(folder / "scores.csv")} if "column" in keys else {}))
    axis = drawn[0].axes[1]
    (squares,) = axis.collections
    boxes = [path.get_extents().get_points().ravel().tolist() for path in squares.get_paths()]
    expected = [[20, 40, 40, 60]] if "column" in keys else [[x / 2, y / 2, x / 2 + 20, y / 2 + 20] for x, y in COORDS]
    assert boxes == expected and squares.get_clim() == limits
    assert [mark.get_bbox().bounds for mark in axis.patches] == [(40, 20, 20, 20)] * ("x" in keys)


def changed(folder, source, to, **arrays):
    """A copy of a file of features, with other arrays; its path."""
    with np.load(folder / source) as found:
        np.savez(folder / to, **{**found, **arrays})
    return str(folder / to)


def write_scores(folder, *rows):
    with open(folder / "own.csv", "w", newline="") as f:
        csv.writer(f).writerows([("slide", "x", "y", "tumor"), *rows])
    return {"scores": str(folder / "own.csv"), "column": "tumor"}


@pytest.mark.parametrize("text, keys", {
    "c.npz: context of another slide or other": lambda d: {"context": changed(d, "c.npz", "c.npz", features=FEATURES)},
    "c.npz: context of another slide": lambda d: {"context": changed(d, "c.npz", "c.npz", coords=COORDS + 40)},
    "a.npz: features of another slide than .*b.svs": lambda d: {"slide": str((d / "a.svs").rename(d / "b.svs"))},
    "a.npz: features of another slide than .*a.svs": lambda d: {"features": changed(d, "a.npz", "a.npz",
                                                                                    level0_width=121)},
    "no place at x=900, y=60: the nearest has its centre at x=100, y=60 .* 20.0 tiles away": lambda d: {"x": 900},
    "no place at x=500, y=20: .* x=100, y=20": lambda d: write_scores(d, ("a", 20, 20, 1), ("a", 500, 20, 0)),
    "own.csv: no place of slide a": lambda d: write_scores(d, ("a.svs", 20, 20, 1)),
    "own.csv: a: x, y and tumor must be there and numbers": lambda d: write_scores(d, ("a", "", "", 1)),
    "own.csv: a: tumor must lie between 0 and 1": lambda d: write_scores(d, ("a", 20, 20, 1.5)),
}.items())
def test_what_does_not_belong_to_the_slide_is_refused(world, text, keys):
    config, folder = world
    with pytest.raises(ValueError, match=text):
        heatmap.main(config | {"y": 60} | keys(folder))


@pytest.mark.parametrize("x, place", [(0, 20), (59, 60), (135, 100)])
def test_the_chosen_place_may_lie_a_tile_off_and_is_printed(world, capsys, x, place):
    pytest.importorskip("matplotlib")
    heatmap.main(world[0] | {"x": x, "y": 60})
    assert f"of 12 places; the black square has its centre at x={place}, y=60" in capsys.readouterr().out
