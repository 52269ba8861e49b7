"""
Labelled toy slides, cells on a grid. The labels differ in what a reader has to see: amounts, places or distances.

    python prepare/toy_slides.py                                      # writes data/toy_slides: 10 seconds on two cores
    python prepare/features.py --slides='data/toy_slides/slides/*' --weights=out/toy/teacher/300.pth \\
        --out=data/toy_slides/features --tile_px=28 --workers=0          # the places are the cells

    data/toy_slides/slides/t000.tif ...   400 slides of 40 patients, 20 x 20 cells of 14 um, at 0.5 um/px
    data/toy_slides/labels.csv            slide,patient,composition,focus,arrangement,distance

Each slide has all four labels, drawn independently; each patient has as many slides of either class. To the left is a
strip of epithelium, cells of kinds A and B in patches. To the right is stroma with isolated cells of kinds P and Q.

    composition   0.4 or 0.6 of the strip are B
    focus         a square of 2 x 2 cells of a kind of their own lies somewhere in the strip, or does not
    arrangement   the strip is in place, or its squares of 2 x 2 cells are permuted
    distance      below each P lies its Q, 3 or 4 cells away or 8 to 10, as far in all of a slide

In `distance` no two of these cells lie in one 3 x 3 neighbourhood, and none is near another tissue or the edge. So two
slides that differ in this label alone have equal histograms of cells and of 3 x 3 neighbourhoods. Neither amounts, nor
a choice of tiles, nor a filter of that size tells them apart. Cells and pixels depend on the seed alone.
"""
import csv
import multiprocessing
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure
from prepare import toy

out = "data/toy_slides"  # folder to write
seed = 0                 # another seed is another set
patients = 40
per_patient = 10         # slides, an even number
workers = 2              # processes; the pixels do not depend on it

TASKS = "composition", "focus", "arrangement", "distance"
STROMA, A, B, FOCUS, P, Q = range(6)
SIDE, STRIP, BLOCK = 20, 6, 2   # cells: of the slide, of the epithelium's width, of a square that is permuted
PAIRS = 6                       # of P and Q
NEAR, FAR = (3, 4), (8, 9, 10)  # cells from each P down to its Q, one of these in all of a slide
CELL_UM, UM = 14, 0.5           # side of a cell; um/px
RING_UM = 3.5                   # radius at which the nuclei of a cell stand
KINDS = {  # in order: nuclei per cell, their long and short half axis in um, their load; load of eosin in the cell
    STROMA: (1, 4.5, 1.6, 1.0, 1.0),
    A: (1, 4.0, 3.5, 1.2, 0.7),
    B: (4, 2.4, 2.0, 2.2, 1.8),
    FOCUS: (2, 3.2, 2.8, 2.8, 0.3),
    P: (1, 6.2, 5.5, 2.8, 1.0),
    Q: (1, 2.2, 1.8, 1.6, 0.05),  # a vessel: nearly white
}


# ---- cells: arrays (SIDE, SIDE) of kinds -----------------------------------------------------------------------------


def epithelium(rng, composition, focus, arrangement):
    """The strip (SIDE, STRIP): patches of A and B; the same draws whatever the labels are."""
    field = toy.noise(rng, (SIDE, STRIP), STRIP)
    share = (0.4, 0.6)[composition] + rng.normal(0, 0.03)
    limit = np.quantile(field, 1 - share)
    strip = np.where(field > limit, B, A)
    rows, columns = SIDE // BLOCK, STRIP // BLOCK
    squares = strip.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)  # a view
    place = tuple(rng.integers((rows, columns)))
    if focus:
        squares[place] = FOCUS
    order = rng.permutation(rows * columns)
    if arrangement:
        flat = squares.reshape(-1, BLOCK, BLOCK)
        squares = flat[order].reshape(squares.shape)
    return squares.swapaxes(1, 2).reshape(SIDE, STRIP)


def pairs(rng, distance):
    """Rows and columns (2 * PAIRS, 2) of P, its Q, P, its Q, ...: 3 or more apart, 2 from the edges of the stroma."""
    gap = rng.choice(FAR if distance else NEAR)
    found, tries = [], 0
    while len(found) < 2 * PAIRS:
        tries += 1
        if tries % 2000 == 0:  # no space is left: begin anew
            found = []
        row, column = rng.integers((2, STRIP + 2), SIDE - 2)
        pair = [(row, column), (row + gap, column)]
        apart = np.abs(np.reshape(found, (-1, 1, 2)) - pair).max(2)
        if row + gap < SIDE - 2 and (apart > 2).all():
            found += pair
    return np.array(found)


def cells(seed, number, labels):
    """Kinds (SIDE, SIDE) of slide `number`, for its labels in the order of TASKS."""
    *others, distance = labels
    grid = np.full((SIDE, SIDE), STROMA)
    grid[:, :STRIP] = epithelium(np.random.default_rng([seed, 1, number]), *others)
    rows, columns = pairs(np.random.default_rng([seed, 2, number]), distance).T
    grid[rows, columns] = [P, Q] * PAIRS
    return grid


# ---- pixels ----------------------------------------------------------------------------------------------------------


def nuclei(rng, grid):
    """(n, 6) for toy.stamp: x, y, angle, long and short half axis, load. The nuclei of a cell stand in a ring."""
    table = np.array(list(KINDS.values()))[grid.ravel()]  # (cells, 5)
    count = table[:, 0].astype(int)
    cell = np.repeat(np.arange(grid.size), count)  # of each nucleus
    number = np.arange(len(cell)) - (np.cumsum(count) - count)[cell]  # 0, 1, ... within its cell
    angle = toy.TURN * number / count[cell]
    angle += rng.uniform(0, toy.TURN, grid.size)[cell]
    reach = np.where(count > 1, RING_UM, 0)[cell]
    row, column = np.unravel_index(cell, grid.shape)
    xy = (np.column_stack([column, row]) + 0.5) * CELL_UM
    xy += reach[:, None] * toy.unit(angle)
    xy += rng.normal(0, 0.7, xy.shape)
    axes = table[cell, 1:3]
    axes *= rng.lognormal(0, 0.08, (len(cell), 1))
    return np.column_stack([xy, angle, axes, table[cell, 3]])


def draw(rng, grid, stains, glass):
    """The picture of a grid of cells."""
    px = int(CELL_UM / UM)
    eosin = np.array(list(KINDS.values()), np.float32)[grid, 4]
    eosin = eosin.repeat(px, 0).repeat(px, 1)
    haematoxylin = np.zeros_like(eosin)
    toy.stamp(haematoxylin, nuclei(rng, grid), UM)
    eosin *= 1 + 0.2 * toy.noise(rng, eosin.shape, 8)
    return toy.develop(rng, np.stack([haematoxylin, eosin]), stains, glass)


def make_slide(folder, seed, number, patient, labels):
    rng = np.random.default_rng([seed, 3, number])
    stains, glass = toy.patient(np.random.default_rng([seed, 4, patient]))
    image = draw(rng, cells(seed, number, labels), stains, glass)
    toy.write_tiff(folder / f"t{number:03d}.tif", image, UM)


def draw_labels(seed, patients, per_patient):
    """Labels (slides, tasks): in each task half of a patient's slides are 1, in an order of its own."""
    rng = np.random.default_rng([seed, 0])
    halves = np.arange(per_patient) % 2
    labels = []
    for _ in range(patients):
        orders = [rng.permutation(halves) for _ in TASKS]
        labels += np.transpose(orders).tolist()
    return np.array(labels)


def build(out, seed=0, patients=40, per_patient=6, workers=2):
    """Write slides and labels.csv below the folder `out`; files of the same names are replaced."""
    out = Path(out)
    folder = out / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    jobs, lines = [], []
    for number, labels in enumerate(draw_labels(seed, patients, per_patient)):
        patient = number // per_patient
        jobs.append((folder, seed, number, patient, labels))
        lines.append([f"t{number:03d}", f"p{patient:02d}", *labels])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(make_slide, jobs)
    with open(out / "labels.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide", "patient", *TASKS])
        table.writerows(lines)


if __name__ == "__main__":
    configure(globals())
    build(out, seed, patients, per_patient, workers)
    print(f"{out}: {patients * per_patient} slides of {patients} patients")
