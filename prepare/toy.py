"""
A small synthetic pathology world, made offline in half a minute: slides to pretrain on, a BACH folder to evaluate on.

    python prepare/toy.py                             # writes data/toy
    python prepare/toy.py --out=/scratch/toy --seed=1

    data/toy/slides/toy*.svs, toy*.tif                10 pyramidal slides of 0.25, 0.364 or 0.5 um/px, one per patient
    data/toy/bach/ICIAR2018_BACH_Challenge/Photos/    400 images in BACH's layout: 860 x 645 um on 512 x 384 px

The test is meant to be fair: a network has to see how cells are arranged, because colour and amounts do not tell the
kinds apart. Each picture draws its number of nuclei, its white area and its loads of haematoxylin and eosin without
regard to its kind. The kind only decides where most of the nuclei and holes go; a second, random one gets up to 0.35.

    Benign     many small round glands, each a ring of nuclei around a small lumen
    InSitu     few large solid round nests with a sharp border
    Invasive   cords, one to three cells wide, that follow the fibres of the stroma
    Normal     few large round glands with two rings of nuclei and an open lumen

White area that no lumen takes becomes fat; nuclei that no structure takes become stroma. Structures are 15 to 250 um
large, so they show at 0.5 to 3 um/px. Each patient has a stain and a scanner and, in BACH, images of some kinds only:
colour hints at the kind in eva's training images, and misleads in its validation images, whose patients are others with
shifted stains. Slides are patchworks of all kinds, from patients of their own. Pixels depend on the seed alone.
"""
import io
import json
import math
import multiprocessing
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure, run

out = "data/toy"  # folder to write
seed = 0          # another seed is another world
workers = 2       # processes; the pixels do not depend on it

VERSION = 1  # raise it when pixels change: a world of another version is then made anew
KINDS = {    # file prefix, range of the radius in um, range of lumen radius / radius, rings of nuclei; in label order
    "Benign": ("b", (15, 28), (0.3, 0.5), 1),
    "InSitu": ("is", (50, 110), (0, 0), 99),
    "Invasive": ("iv", None, None, None),
    "Normal": ("n", (36, 66), (0.5, 0.65), 2),
}
VAL = [(41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368)]  # eva's validation ranges of the 400 images
SLIDES = [  # format, um/px, level factors, width and height in mm
    ("svs", 0.5, (1, 4), 2.8, 2.4),
    ("tif", 0.364, (1, 2, 4), 2.6, 2.3),
    ("svs", 0.25, (1, 4, 16), 2.2, 2.0),
    ("tif", 0.5, (1, 2, 4), 2.6, 2.6),
    ("svs", 0.5, (1, 2.97, 7.9), 2.4, 2.8),
    ("tif", 0.25, (1, 2, 4, 8), 2.0, 2.2),
    ("svs", 0.364, (1, 4), 2.5, 2.4),
    ("tif", 0.5, (1, 4), 2.4, 2.6),
    ("svs", 0.5, (1, 2, 4), 2.8, 2.3),
    ("tif", 0.5, (1, 2.97, 7.9), 2.5, 2.5),
]
RENDER_UM = 0.5  # slides are drawn at this pixel size, then resized to their own
COARSE_UM = 8    # outlines and regions are drawn on this grid
BACH_UM = 1.68   # 4 x BACH's 0.42
TILE = 256       # px
PENS = [(45, 70, 175), (35, 140, 80), (35, 35, 40)]  # blue, green, black
STAINS = np.array([[0.65, 0.70, 0.29], [0.09, 0.95, 0.25]])  # haematoxylin and eosin: densities in red, green, blue
TURN = 2 * np.pi
ROUND = np.linspace(0, TURN, 40, endpoint=False)  # angles of an outline's points


# ---- tissue: positions in um, x to the right and y down; `scene` collects what lies where ----------------------------


def unit(angle):
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def noise(rng, shape, cell):
    """Smooth noise (H, W) with mean 0, standard deviation about 0.7, and blobs of about `cell` px."""
    coarse = [int(side / cell) + 3 for side in shape]
    small = rng.standard_normal(coarse, dtype=np.float32)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.BICUBIC))


def blob(rng, centre, r, wobble):
    """A closed outline (40, 2) around centre: a circle of radius r with dents of about `wobble` * r."""
    waves = np.arange(2, 6)[:, None]
    depth = rng.standard_normal((4, 1)) / waves
    phase = rng.uniform(0, TURN, (4, 1))
    dents = depth * np.cos(waves * ROUND + phase)
    radius = r * (1 + wobble * dents.sum(0))
    return centre + radius[:, None] * unit(ROUND)


def claim(rng, scene, r):
    """Find a random free place for a circle of radius r, and take it; None if 20 tries fail."""
    tries = rng.uniform(-r / 2, scene.size + r / 2, (20, 2))
    others = np.reshape(scene.taken, (-1, 3))
    distance = np.linalg.norm(tries[:, None] - others[:, :2], axis=2)
    gaps = distance - others[:, 2] - r
    free = tries[(gaps > 2).all(1)]
    if not len(free):
        return None
    scene.taken.append((*free[0], r))
    return free[0]


def glands(rng, scene, count, radius, lumen, rings):
    """Round structures, until about `count` nuclei or the space are used up."""
    while count > 0:
        r = rng.uniform(*radius)
        centre = claim(rng, scene, r)
        if centre is None:
            return
        edge = blob(rng, centre, r, 0.1)
        hole = rng.uniform(*lumen)
        scene.epithelium.append(edge)
        scene.lumen.append(centre + (edge - centre) * hole)
        dents = np.linalg.norm(edge - centre, axis=1) / r
        for ring in np.arange(r - 5, max(r * hole, 3), -9)[:rings]:  # 9 um apart, from the border inwards
            angle = np.arange(0, TURN, 8 / ring) + rng.uniform(0, TURN)
            reach = ring * np.interp(angle, ROUND, dents, period=TURN)
            jitter = rng.normal(0, 0.8 if hole else 2, (len(angle), 2))
            places = centre + reach[:, None] * unit(angle) + jitter
            scene.cells.append(np.column_stack([places, angle]))
            count -= len(angle)


def cords(rng, scene, count):
    """Strands of cells, 8.5 um apart, that follow the fibres, until `count` nuclei are used up."""
    while count > 0:
        length, width = rng.integers(4, 30), rng.integers(1, 4)
        drift = rng.normal(0, 0.3)
        path = [rng.uniform(0, scene.size)]
        for _ in range(length):
            heading = unit(scene.flow(path[-1]) + drift)
            path.append(path[-1] + 8.5 * heading)
        steps = np.diff(path, axis=0)
        path = np.array(path[:-1])
        angle = np.arctan2(steps[:, 1], steps[:, 0])
        normal = steps[:, ::-1] * (-1, 1) / 8.5
        for k in range(width):
            offset = k - (width - 1) / 2
            row = path + normal * offset * 8.5
            row += rng.normal(0, 1.5, row.shape)
            scene.cells.append(np.column_stack([row, angle]))
        uneven = 1 + 0.2 * rng.standard_normal((length, 1))
        half = (width * 4.5 + 1) * uneven
        left, right = path + normal * half, path - normal * half
        scene.epithelium.append(np.concatenate([left, right[::-1]]))
        scene.taken += [(x, y, half[0, 0]) for x, y in path[::3]]
        count -= length * width


def fibres(rng, shape, um):
    """Eosin of the stroma (H, W), mean 0, and a function: positions (..., 2) to directions of the fibres, rad (...)."""
    turn = rng.uniform(0, TURN)
    bend = noise(rng, shape, 150 / um)
    wide = noise(rng, shape, 15 / um)
    y, x = (np.arange(side, dtype=np.float32) * um for side in shape)
    distance = np.add.outer(y * math.sin(turn), x * math.cos(turn))
    phase = distance / rng.uniform(2, 4)
    phase += rng.uniform(4, 10) * bend
    gy, gx = np.gradient(phase[::8, ::8])
    along = np.arctan2(gx, -gy)  # a fibre is a line of equal phase
    rows, columns = along.shape

    def flow(places):
        cells = (places / (8 * um)).clip(0).astype(int)
        column, row = np.moveaxis(cells, -1, 0)
        return along[row.clip(max=rows - 1), column.clip(max=columns - 1)]

    lines = 0.2 * np.sin(phase + 1.5 * wide) * (1 + wide)
    return lines + 0.2 * bend, flow


def paint(outlines, shape, um):
    """Mask (H, W) float32: 1 inside the outlines."""
    image = Image.new("L", shape[::-1])
    for outline in outlines:
        ImageDraw.Draw(image).polygon((outline / um).ravel().tolist(), fill=1)
    return np.asarray(image, np.float32)


def stamp(canvas, nuclei, um):
    """Draw soft ellipses (n, 6: x, y, angle, long and short half axis, load) into canvas (H, W), in place."""
    nuclei = nuclei[np.argsort(nuclei[:, 3])].astype(np.float32)
    for group in np.array_split(nuclei, len(nuclei) // 500 + 1):
        if len(group):
            stamp_group(canvas, group, um)


def stamp_group(canvas, nuclei, um):
    """The same for nuclei of similar size, which share a window; the last is the longest."""
    height, width = canvas.shape
    window = int(np.ceil(nuclei[-1, 3] * 1.15 / um))
    dy, dx = np.mgrid[-window:window + 1, -window:window + 1].astype(np.float32)
    x, y, angle, a, b, load = nuclei.T[:, :, None, None]
    column = np.rint(x / um) + dx
    row = np.rint(y / um) + dy
    px = column * um - x
    py = row * um - y
    c, s = np.cos(angle), np.sin(angle)
    along = (c * px + s * py) / a
    across = (c * py - s * px) / b
    distance = np.sqrt(along ** 2 + across ** 2)
    value = load * np.minimum((1.15 - distance) / 0.35, 1)
    seen = distance < 1.15
    seen &= (row >= 0) & (row < height)
    seen &= (column >= 0) & (column < width)
    places = row[seen].astype(int), column[seen].astype(int)
    np.maximum.at(canvas, places, value[seen])


def tissue(rng, kind, shape, um):
    """Loads of haematoxylin and eosin (2, H, W) float32: mean about 1, deviation about the same for all kinds."""
    scene = SimpleNamespace(size=np.multiply(shape[::-1], um), cells=[], epithelium=[], lumen=[], taken=[])
    area = scene.size.prod()  # um2
    stroma, scene.flow = fibres(rng, shape, um)
    nuclei = rng.uniform(3000, 4500) * area / 1e6  # 3000-4500 per mm2
    white = rng.uniform(0.08, 0.18) * area
    structures(rng, scene, kind, nuclei)
    lumen = paint(scene.lumen, shape, um)
    fat = paint(fat_cells(rng, scene, white - lumen.mean() * area), shape, um)
    solid = (1 - lumen) * (1 - fat)
    epithelium = paint(scene.epithelium, shape, um) * solid

    h = 0.08 * epithelium
    cells = np.concatenate([np.zeros((0, 3)), *scene.cells])
    size, n = rng.uniform(3.2, 4.6), len(cells)  # um, the long half axis
    long = size * rng.lognormal(0, 0.12, n)
    short = size * rng.uniform(0.65, 0.9, n)
    cells = np.column_stack([cells, long, short])
    others = spindles(rng, scene, max(int(nuclei) - n, 0), solid > epithelium, um)
    for group in (cells, others):
        load = rng.uniform(0.7, 1.2, len(group))
        stamp(h, np.column_stack([group, load]), um)
    h *= 1 + 0.15 * noise(rng, shape, max(1, 1 / um))  # chromatin
    e = ((1 + stroma) * (1 - epithelium) + 0.8 * epithelium) * solid
    gains = rng.uniform((1.4, 0.35), (1.9, 0.5))
    return np.stack([scaled(load, gain) for load, gain in zip((h, e), gains)])


def structures(rng, scene, kind, nuclei):
    """Glands and cords of the kind, and a few of another one; stroma keeps a part of the nuclei."""
    inside, main = rng.uniform(0.5, 0.8) * nuclei, rng.uniform(0.65, 1)
    other = rng.choice(list(KINDS))
    parts = [(kind, main * inside), (other, (1 - main) * inside)]
    parts.sort(key=lambda part: part[0] != "Invasive")  # cords avoid nothing, so they come first
    for name, count in parts:
        if name == "Invasive":
            cords(rng, scene, count)
        else:
            glands(rng, scene, count, *KINDS[name][1:])


def fat_cells(rng, scene, area):
    """Outlines of round holes, until they have that area in um2 or the space is used up."""
    found = []
    while area > 0:
        r = rng.uniform(8, 26)
        centre = claim(rng, scene, r)
        if centre is None:
            break
        found.append(blob(rng, centre, r, 0.15))
        area -= np.pi * r * r
    return found


def scaled(load, gain):
    """A load with mean 1 and deviation `gain`, cut off at 0."""
    gain = np.float32(gain / (np.float64(load.std()) + 1e-6))
    return np.maximum((load - load.mean()) * gain + 1, 0)


def spindles(rng, scene, count, stroma, um):
    """Nuclei of the stroma along its fibres (n, 5): of `count` random places those in the mask `stroma` (H, W)."""
    places = rng.uniform(0, scene.size, (count, 2))
    column, row = (places / um).astype(int).T
    places = places[stroma[row, column]]
    n = len(places)
    angle = scene.flow(places) + rng.normal(0, 0.3, n)
    return np.column_stack([places, angle, rng.uniform(4, 7, n), rng.uniform(1.5, 2.5, n)])


def patient(rng, shift=0.0):
    """Densities of a load of 1 (2 stains, 3 colours) and the glass in grey levels (3,); `shift` moves the hues."""
    stains = STAINS + rng.normal(0, 0.06, (2, 3))
    stains += shift * np.array([[-0.08, 0, 0.05], [0.08, 0, -0.06]])
    norm = np.linalg.norm(stains, axis=1, keepdims=True)
    stains *= rng.lognormal(np.log([[0.30], [0.32]]), 0.2) / norm
    return stains, rng.uniform(225, 250) + rng.normal(0, 3, 3)


def develop(rng, loads, stains, glass):
    """An image of loads (S, H, W), stains (S, 3) and glass (3,) by Beer-Lambert's law, with a camera's noise."""
    image = np.empty((*loads.shape[1:], 3), np.uint8)
    for top in range(0, len(image), 256):  # strips stay in the cache
        strip = loads[:, top:top + 256]
        grain = 1.5 * rng.standard_normal(strip.shape[1:], dtype=np.float32)
        for c in range(3):
            density = np.tensordot(stains[:, c].astype(np.float32), strip, 1)
            light = np.float32(glass[c]) * np.exp(-density)
            image[top:top + 256, :, c] = np.clip(light + grain, 0, 255)
    return Image.fromarray(image)


def shape_of(size, um):
    """Rows and columns of `um` in a size (width, height) in um."""
    return tuple(int(side / um) for side in size[::-1])


def patchwork(rng, size):
    """
    Where a slide's tissue is, on a grid of COARSE_UM: mask float32 (h, w), the number of each place's region (h, w),
    and how many regions there are; the outline of its first piece and that one's centre, in um.
    """
    shape = shape_of(size, COARSE_UM)
    pieces = int(rng.integers(1, 3))
    centres = [((i + 0.5) / pieces * size[0], size[1] / 2) for i in range(pieces)]
    outlines = [blob(rng, 0, 1, 0.12) * size * (0.43 / pieces, 0.43) + centre for centre in centres]
    inside = paint(outlines, shape, COARSE_UM)
    grid = [max(1, round(side / 550)) for side in size]  # regions of about 550 um with uneven borders
    corners = np.argwhere(np.ones(grid))
    sites = (corners + rng.uniform(0.15, 0.85, corners.shape)) * np.divide(size, grid)
    uneven = 60 * np.stack([noise(rng, shape, 25), noise(rng, shape, 25)])
    y, x = np.mgrid[:shape[0], :shape[1]] * COARSE_UM + uneven
    distances = [(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in sites]
    return inside, np.argmin(distances, 0), len(sites), outlines[0], centres[0]


def add_region(rng, loads, mask, kind, um):
    """Add tissue of a kind to the loads (2, H, W), in place, where a mask on the grid of COARSE_UM is 1."""
    places = np.argwhere(mask)
    (top, left), (bottom, right) = places.min(0), places.max(0) + 1
    y0, y1, x0, x1 = (int(side * COARSE_UM / um) for side in (top, bottom, left, right))
    view = loads[:, y0:y1, x0:x1]
    shape = view.shape[1:]
    edge = Image.fromarray(mask[top:bottom, left:right])
    edge = edge.resize(shape[::-1], Image.BILINEAR)
    patch = tissue(rng, kind, shape, um) * edge
    gains = rng.lognormal(0, 0.15, (2, 1, 1))
    view += patch * gains.astype(np.float32)


def slide_loads(rng, size, um):
    """Loads of haematoxylin, eosin and pen (3, H, W) of a patchwork of the kinds, size (width, height) um."""
    inside, region, count, outline, centre = patchwork(rng, size)
    loads = np.zeros((3, *shape_of(size, um)), np.float32)
    for i, kind in enumerate(rng.permutation(np.resize(list(KINDS), count))):
        mask = inside * (region == i)
        if mask.any():
            add_region(rng, loads[:2], mask, kind, um)
    stroke = np.roll(outline, rng.integers(40), 0)[:rng.integers(6, 16)]
    points = ((stroke - centre) * 1.1 + centre) / um
    pen = Image.new("L", loads.shape[:0:-1])
    ImageDraw.Draw(pen).line(points.ravel().tolist(), fill=1, width=int(rng.uniform(80, 140) / um), joint="curve")
    loads[2] = pen
    return loads


def make_slide(folder, seed, number, spec):
    suffix, mpp, factors, *size = spec
    rng = np.random.default_rng([seed, 1, number])
    size = np.multiply(size, 1000)  # um
    stains, glass = patient(rng)
    pen = -np.log(np.divide(PENS[number % 3], 255))
    loads = slide_loads(rng, size, RENDER_UM)
    image = develop(rng, loads, np.vstack([stains, pen]), glass)
    image = image.resize([round(side / mpp) for side in size], Image.BILINEAR)
    write_tiff(folder / f"toy{number:02d}.{suffix}", image, mpp, factors)


# ---- files: tifffile would need imagecodecs for JPEG tiles, and pillow stores JPEG as RGB strips, three times as large


def write_tiff(path, image, mpp, factors=(1,)):
    """A pyramidal TIFF of JPEG tiles that OpenSlide opens: as Aperio if path ends in .svs, else as generic TIFF."""
    power = 20 if mpp > 0.3 else 40
    density = ("2I", round(1e7 / mpp), 1000)  # px per cm, as a fraction
    with open(path, "wb") as file:
        file.write(b"II*\0\0\0\0\0")
        link, level = 4, image  # link: where the position of the next directory goes
        for factor in factors:
            level = level.resize([round(side / factor) for side in image.size], Image.BILINEAR)
            tiles = [(file.tell(), file.write(data)) for data in jpegs(level)]
            starts, lengths = zip(*tiles)
            text = f"Aperio Image Library v12.0.0\n{level.width}x{level.height} JPEG/RGB|AppMag = {power}|MPP = {mpp}\0"
            tags = {  # 254: a reduced level? 259: JPEG; 262: YCbCr; 270: description; 296: cm; 530: halved chroma
                254: ("I", int(factor > 1)), 256: ("I", level.width), 257: ("I", level.height), 258: ("H", 8, 8, 8),
                259: ("H", 7), 262: ("H", 6), 270: ("B", *text.encode()), 277: ("H", 3), 282: density, 283: density,
                296: ("H", 3), 322: ("I", TILE), 323: ("I", TILE), 324: ("I", *starts), 325: ("I", *lengths),
                530: ("H", 2, 2)}
            if path.suffix != ".svs":
                del tags[270]
            link = write_directory(file, tags, link)


def write_directory(file, tags, link):
    """Append {code: (format, values...)}, put its position at `link`, return where the next directory's goes."""
    kinds = {"B": 2, "H": 3, "I": 4, "2I": 5}  # TIFF's numbers for text, 16 bit, 32 bit and fractions
    entries = struct.pack("<H", len(tags))
    for code, (kind, *values) in tags.items():
        count = 1 if kind == "2I" else len(values)
        data = struct.pack("<" + kind * count, *values)
        if len(data) > 4:  # a longer value stands before the directory, whose entry holds its position
            where = file.tell()
            file.write(data)
            data = struct.pack("<I", where)
        entries += struct.pack("<HHI", code, kinds[kind], count) + data.ljust(4, b"\0")
    start = file.tell()
    file.write(entries + b"\0\0\0\0")
    file.seek(link)
    file.write(struct.pack("<I", start))
    return file.seek(0, 2) - 4


def jpegs(image):
    """JPEG streams of the tiles of an image, row by row; tiles are white beyond its edge."""
    for top in range(0, image.height, TILE):
        for left in range(0, image.width, TILE):
            tile, buffer = Image.new("RGB", (TILE, TILE), "white"), io.BytesIO()
            tile.paste(image, (-left, -top))
            tile.save(buffer, "JPEG", quality=80)
            yield buffer.getvalue()


# ---- BACH and all of it ---------------------------------------------------------------------------------------------


def make_image(folder, seed, index, size):
    """Image `index` of 400 in eva's order, of size (width, height) px."""
    label, number = divmod(index, 100)
    kind = list(KINDS)[label]
    val = any(a <= index < b for a, b in VAL)
    people = np.random.default_rng([seed, 2, val, label]).permutation(12 if val else 28)
    who = people[index % (len(people) // 2)]  # half of the patients have this kind
    stains, glass = patient(np.random.default_rng([seed, 3, val, who]), shift=float(val))
    rng = np.random.default_rng([seed, 4, index])
    loads = tissue(rng, kind, size[::-1], BACH_UM)
    stains = stains * rng.lognormal(0, 0.15, (2, 1))
    image = develop(rng, loads, stains, glass)
    write_tiff(folder / kind / f"{KINDS[kind][0]}{number + 1:03d}.tif", image, BACH_UM)


def build(out, seed=0, workers=2, slides=SLIDES, images=range(400), size=(512, 384)):
    """
    Write `slides` (as SLIDES) and the BACH `images` (indices), `size` px large, below the folder `out`.

    Returns False if all that is there already. Unfinished or other output of this script is replaced; ValueError if
    `out` holds anything else.
    """
    out, wanted = Path(out), json.dumps([VERSION, seed, slides, list(images), size])
    marker, photos = out / "toy.json", out / "bach/ICIAR2018_BACH_Challenge/Photos"
    if marker.exists() and marker.read_text() == wanted:
        return False
    if not marker.exists() and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files, but none of a toy world; name another folder with --out=")
    for folder in (out / "slides", out / "bach"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (out / "slides", *(photos / kind for kind in KINDS)):
        folder.mkdir(parents=True)
    marker.write_text("unfinished")
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(make_slide, [(out / "slides", seed, i, spec) for i, spec in enumerate(slides)], chunksize=1)
        pool.starmap(make_image, [(photos, seed, i, size) for i in images], chunksize=1)
    marker.write_text(wanted)
    return True


def main():
    state = "written" if build(out, seed, workers) else "are there already"
    print(f"{out}: {len(SLIDES)} slides and 400 images {state}; next: python train.py config/toy.py")


if __name__ == "__main__":
    configure(globals())
    run("toy", main)
