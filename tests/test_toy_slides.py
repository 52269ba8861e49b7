"""The labelled toy slides: what the labels leave equal, equal pixels from equal seeds, and cells that are read back."""
import csv
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare import toy_slides
from prepare.toy_slides import P, Q


def neighbourhoods(grid):
    """Counts of the 3 x 3 neighbourhoods, those at the edge padded."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(grid, 1, constant_values=-1), (3, 3))
    return Counter(map(bytes, np.ascontiguousarray(windows).reshape(-1, 9)))


@pytest.mark.parametrize("number", range(20))
def test_distance_leaves_the_neighbourhoods_equal(number):
    labels = np.random.default_rng(number).integers(2, size=3).tolist()
    near, far = (toy_slides.cells(0, number, [*labels, distance]) for distance in (0, 1))
    assert neighbourhoods(near) == neighbourhoods(far)
    assert not np.array_equal(near, far)
    for grid, gaps in ((near, toy_slides.NEAR), (far, toy_slides.FAR)):
        above, below = np.argwhere(grid == P), np.argwhere(grid == Q)
        assert len(above) == len(below) == toy_slides.PAIRS
        found = {gap for gap in gaps if {(y + gap, x) for y, x in above.tolist()} == set(map(tuple, below.tolist()))}
        assert len(found) == 1, (above, below)


def test_arrangement_keeps_the_cells_and_the_squares():
    for number in range(20):
        placed, permuted = (toy_slides.cells(0, number, [1, 1, arrangement, 0]) for arrangement in (0, 1))
        squares = [Counter(bytes(grid[y:y + 2, x:x + 2].copy()) for y in range(0, toy_slides.SIDE, 2)
                           for x in range(0, toy_slides.STRIP, 2)) for grid in (placed, permuted)]
        assert squares[0] == squares[1] and not np.array_equal(placed, permuted)
        assert np.array_equal(placed[:, toy_slides.STRIP:], permuted[:, toy_slides.STRIP:])


def test_arrangement_shows_in_the_cells():
    """How often neighbours in the strip are alike tells most slides apart: nothing can learn what is not there."""
    alike = np.zeros((2, 60))
    for arrangement in (0, 1):
        for number in range(60):
            strip = toy_slides.cells(0, number, [number % 2, 0, arrangement, 0])[:, :toy_slides.STRIP]
            alike[arrangement, number] = (strip[1:] == strip[:-1]).mean() + (strip[:, 1:] == strip[:, :-1]).mean()
    assert (alike[0][:, None] > alike[1]).mean() > 0.97


def test_labels_are_balanced_in_each_patient():
    labels = toy_slides.draw_labels(0, 40, 6).reshape(40, 6, 4)
    assert (labels.sum(1) == 3).all()
    assert abs(np.corrcoef(labels.reshape(-1, 4).T) - np.eye(4)).max() < 0.2


def test_slides_are_drawn_and_read(tmp_path):
    for out in ("a", "b"):
        toy_slides.build(tmp_path / out, seed=3, patients=1, per_patient=2, workers=1)
    with open(tmp_path / "a/labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == ["t000", "t001"] and {row["patient"] for row in rows} == {"p00"}
    for row in rows:
        path = tmp_path / f"a/slides/{row['slide']}.tif"
        assert path.read_bytes() == (tmp_path / f"b/slides/{row['slide']}.tif").read_bytes()
        with closing(wsi.Slide(path)) as slide:
            xy, _ = slide.grid(28, 0.5)
            tiles, errors = slide.read_tiles(xy, 28, 0.5)
        assert len(xy) == toy_slides.SIDE**2 and not errors  # all cells, row by row
        labels = [int(row[task]) for task in toy_slides.TASKS]
        kinds = toy_slides.cells(3, int(row["slide"][1:]), labels).ravel()
        red = tiles[:, 9:19, 9:19, 0].mean((1, 2))
        assert red[kinds == P].max() < red[kinds == toy_slides.STROMA].min()  # a dark nucleus in the middle
