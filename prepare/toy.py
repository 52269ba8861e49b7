"""
A small synthetic pathology world, offline, in half a minute: slides to pretrain on and a BACH folder to evaluate on.

    python prepare/toy.py                             # writes data/toy
    python prepare/toy.py --out=/scratch/toy --seed=1

    data/toy/slides/toy*.svs, toy*.tif                10 pyramidal slides of 0.25, 0.364 or 0.5 um/px, one patient each
    data/toy/bach/ICIAR2018_BACH_Challenge/Photos/    400 images in BACH's layout; 512 x 384 px, BACH's 860 x 645 um

The test is meant to be fair: a network has to see how cells are arranged, since nothing simpler tells the kinds apart.
A picture draws a budget of nuclei, a budget of white area, and loads of haematoxylin and eosin, all without looking at
its kind; the kind says where most of the nuclei and holes go (and a second kind, at random, gets up to 0.35 of them):

    Benign     many small round glands, each a ring of nuclei around a small lumen
    InSitu     few large solid round nests with a sharp border
    Invasive   cords, one to three cells wide, that follow the fibres of the stroma
    Normal     few large round glands with two rings of nuclei and an open lumen

White area that no lumen takes is fat; nuclei that no structure takes are stroma. Structures are 15 to 250 um large, so
they show at 0.5 to 3 um/px. Each patient has a stain and a scanner and, in BACH, gives images of some kinds only: in
eva's training images colour hints at the kind, in its validation images, of other patients with shifted stains, it
misleads. Slides are patchworks of the kinds, from patients of their own. Pixels are a pure function of the seed.
"""
import io
import json
import math
import multiprocessing
import shutil
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

out = "data/toy"  # folder to write
seed = 0          # another seed is another world
workers = 2       # processes; the pixels do not depend on it

VERSION = 1  # to be raised when pixels change: outputs of another version are rebuilt
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
BACH_UM = 1.68   # 4 x BACH's 0.42
TILE = 256       # px
PENS = [(45, 70, 175), (35, 140, 80), (35, 35, 40)]  # blue, green, black


# tissue: positions in um, x to the right and y down; `w` collects what is where

def noise(rng, shape, cell):
    """Smooth noise (H, W) of mean 0 and standard deviation near 0.7, whose blobs are about `cell` px wide."""
    small = rng.standard_normal((int(shape[0] / cell) + 3, int(shape[1] / cell) + 3), dtype=np.float32)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.BICUBIC))


def blob(rng, centre, r, wobble):
    """A closed outline (40, 2) around centre: a circle of radius r, dented by about `wobble` * r."""
    t, k = np.linspace(0, 2 * np.pi, 40, endpoint=False), np.arange(2, 6)[:, None]
    dents = (rng.standard_normal((4, 1)) / k * np.cos(k * t + rng.uniform(0, 2 * np.pi, (4, 1)))).sum(0)
    return centre + (r * (1 + wobble * dents) * [np.cos(t), np.sin(t)]).T


def claim(rng, w, r):
    """Find a random free place for a circle of radius r, and take it; None if 20 tries fail."""
    tries, others = rng.uniform(-r / 2, w.size + r / 2, (20, 2)), np.reshape(w.taken, (-1, 3))
    gaps = np.linalg.norm(tries[:, None] - others[:, :2], axis=2) - others[:, 2] - r
    free = tries[(gaps > 2).all(1)]
    w.taken += [(*p, r) for p in free[:1]]
    return free[0] if len(free) else None


def glands(rng, w, count, radius, lumen, rings):
    """Round structures, until about `count` nuclei are spent or the space is."""
    while count > 0 and (centre := claim(rng, w, r := rng.uniform(*radius))) is not None:
        edge, hole = blob(rng, centre, r, 0.1), rng.uniform(*lumen)
        w.epithelium.append(edge)
        w.lumen.append(centre + (edge - centre) * hole)
        dents = np.linalg.norm(edge - centre, axis=1) / r
        for rho in np.arange(r - 5, max(r * hole, 3), -9)[:rings]:  # 9 um apart, from the border inwards
            t = np.arange(0, 2 * np.pi, 8 / rho) + rng.uniform(0, 2 * np.pi)
            reach = rho * np.interp(t, np.linspace(0, 2 * np.pi, 40, endpoint=False), dents, period=2 * np.pi)
            ring = centre + (reach * [np.cos(t), np.sin(t)]).T + rng.normal(0, 0.8 if hole else 2, (len(t), 2))
            w.cells.append(np.column_stack([ring, t]))
            count -= len(t)


def cords(rng, w, count):
    """Strands of cells, 8.5 um apart, that follow the fibres, until `count` nuclei are spent."""
    while count > 0:
        length, width, drift = rng.integers(4, 30), rng.integers(1, 4), rng.normal(0, 0.3)
        path = [rng.uniform(0, w.size)]
        for _ in range(length):
            a = w.flow(path[-1]) + drift
            path.append(path[-1] + 8.5 * np.array([np.cos(a), np.sin(a)]))
        path, step = np.array(path[:-1]), np.diff(path, axis=0)
        angle, normal = np.arctan2(step[:, 1], step[:, 0]), step[:, ::-1] * (-1, 1) / 8.5
        for k in range(width):
            row = path + normal * (k - (width - 1) / 2) * 8.5
            w.cells.append(np.column_stack([row + rng.normal(0, 1.5, row.shape), angle]))
        half = (width * 4.5 + 1) * (1 + 0.2 * rng.standard_normal((length, 1)))
        w.epithelium.append(np.concatenate([path + normal * half, (path - normal * half)[::-1]]))
        w.taken += [(*p, half[0, 0]) for p in path[::3]]
        count -= length * width


def fibres(rng, shape, um):
    """Eosin of the stroma (H, W), mean 0, and a function: positions (..., 2) -> direction of the fibres, rad (...)."""
    turn, bend, wide = rng.uniform(0, 2 * np.pi), noise(rng, shape, 150 / um), noise(rng, shape, 15 / um)
    x, y = (np.arange(n, dtype=np.float32) * um for n in shape[::-1])
    phase = np.add.outer(y * math.sin(turn), x * math.cos(turn)) / rng.uniform(2, 4) + rng.uniform(4, 10) * bend
    gy, gx = np.gradient(phase[::8, ::8])
    along = np.arctan2(gx, -gy)  # a fibre is a line of equal phase

    def flow(p):
        i = np.clip(p / (8 * um), 0, np.subtract(along.shape[::-1], 1)).astype(int)
        return along[i[..., 1], i[..., 0]]

    return 0.2 * np.sin(phase + 1.5 * wide) * (1 + wide) + 0.2 * bend, flow


def paint(outlines, shape, um):
    """Mask (H, W) float32: 1 inside the outlines."""
    image = Image.new("L", shape[::-1])
    for p in outlines:
        ImageDraw.Draw(image).polygon((p / um).ravel().tolist(), fill=1)
    return np.asarray(image, np.float32)


def stamp(canvas, nuclei, um):
    """Draw soft ellipses (n, 6: x, y, angle, long and short half axis, load) into canvas (H, W), in place."""
    nuclei = nuclei[np.argsort(nuclei[:, 3])].astype(np.float32)  # those of one window size together
    for n in np.array_split(nuclei, len(nuclei) // 500 + 1) if len(nuclei) else []:
        r = int(np.ceil(n[-1, 3] * 1.15 / um))
        dy, dx = np.mgrid[-r:r + 1, -r:r + 1].astype(np.float32)
        x, y, angle, a, b, load = n.T[:, :, None, None]
        col, row = np.rint(x / um) + dx, np.rint(y / um) + dy
        px, py, c, s = col * um - x, row * um - y, np.cos(angle), np.sin(angle)
        d = np.sqrt(((c * px + s * py) / a) ** 2 + ((c * py - s * px) / b) ** 2)
        seen = (d < 1.15) & (row >= 0) & (row < canvas.shape[0]) & (col >= 0) & (col < canvas.shape[1])
        value = (load * np.minimum((1.15 - d) / 0.35, 1))[seen]
        np.maximum.at(canvas, (row[seen].astype(int), col[seen].astype(int)), value)


def tissue(rng, kind, shape, um):
    """Loads of haematoxylin and eosin (2, H, W) float32 of a picture: mean about 1, spread independent of the kind."""
    w = SimpleNamespace(size=np.multiply(shape[::-1], um), cells=[], epithelium=[], lumen=[], fat=[], taken=[])
    area = w.size.prod()
    stroma, w.flow = fibres(rng, shape, um)
    nuclei, white = rng.uniform(3000, 4500) * area / 1e6, rng.uniform(0.08, 0.18) * area  # 3000-4500 per mm2; um2
    inside, main = rng.uniform(0.5, 0.8) * nuclei, rng.uniform(0.65, 1)
    parts = [(kind, main * inside), (rng.choice(list(KINDS)), (1 - main) * inside)]
    for name, count in sorted(parts, key=lambda part: part[0] != "Invasive"):  # cords first: they avoid nothing
        glands(rng, w, count, *KINDS[name][1:]) if KINDS[name][1] else cords(rng, w, count)
    lumen = paint(w.lumen, shape, um)
    white -= lumen.mean() * area
    while white > 0 and (centre := claim(rng, w, r := rng.uniform(8, 26))) is not None:
        w.fat.append(blob(rng, centre, r, 0.15))
        white -= np.pi * r * r
    solid = (1 - lumen) * (1 - paint(w.fat, shape, um))
    epithelium = paint(w.epithelium, shape, um) * solid

    cells, size = np.concatenate([np.zeros((0, 3)), *w.cells]), rng.uniform(3.2, 4.6)  # long half axis, um
    n = len(cells)
    cells = np.column_stack([cells, size * rng.lognormal(0, 0.12, n), size * rng.uniform(0.65, 0.9, n)])
    spots = rng.uniform(0, w.size, (max(int(nuclei) - n, 0), 2))
    spots = spots[(solid > epithelium)[tuple((spots / um).astype(int).T[::-1])]]
    n = len(spots)
    angle = w.flow(spots) + rng.normal(0, 0.3, n)
    spindles = np.column_stack([spots, angle, rng.uniform(4, 7, n), rng.uniform(1.5, 2.5, n)])
    h = 0.08 * epithelium
    for group in (cells, spindles):
        stamp(h, np.column_stack([group, rng.uniform(0.7, 1.2, len(group))]), um)
    h *= 1 + 0.15 * noise(rng, shape, max(1, 1 / um))  # chromatin
    e = ((1 + stroma) * (1 - epithelium) + 0.8 * epithelium) * solid
    gain = rng.uniform((1.4, 0.35), (1.9, 0.5)) / (np.array([h.std(), e.std()], np.float64) + 1e-6)
    return np.stack([np.maximum((m - m.mean()) * np.float32(g) + 1, 0) for m, g in zip((h, e), gain)])


# stains and scanners

def patient(rng, shift=0.0):
    """Densities of a load of 1 (2 stains, 3 colours) and the glass in grey levels (3,); `shift` moves the hues."""
    stains = np.array([[0.65, 0.70, 0.29], [0.09, 0.95, 0.25]]) + rng.normal(0, 0.06, (2, 3))
    stains += shift * np.array([[-0.08, 0, 0.05], [0.08, 0, -0.06]])
    stains *= rng.lognormal(np.log([[0.30], [0.32]]), 0.2) / np.linalg.norm(stains, axis=1, keepdims=True)
    return stains, rng.uniform(225, 250) + rng.normal(0, 3, 3)


def develop(rng, loads, stains, glass):
    """Beer-Lambert and camera noise: uint8 (H, W, 3) of loads (S, H, W), stains (S, 3) and glass (3,)."""
    image = np.empty((*loads.shape[1:], 3), np.uint8)
    for top in range(0, len(image), 256):  # strips stay in the cache
        strip = loads[:, top:top + 256]
        grain = 1.5 * rng.standard_normal(strip.shape[1:], dtype=np.float32)
        for c in range(3):
            density = np.tensordot(stains[:, c].astype(np.float32), strip, 1)
            image[top:top + 256, :, c] = np.clip(np.float32(glass[c]) * np.exp(-density) + grain, 0, 255)
    return Image.fromarray(image)


# slides

def slide_loads(rng, size, um):
    """Loads of haematoxylin, eosin and pen (3, H, W) of a patchwork of the kinds, size (width, height) um."""
    coarse = 8  # um: the grid of outlines and regions
    small, shape = (tuple(int(s / step) for s in size[::-1]) for step in (coarse, um))
    pieces = int(rng.integers(1, 3))
    centres = [((i + 0.5) / pieces * size[0], size[1] / 2) for i in range(pieces)]
    outlines = [blob(rng, 0, 1, 0.12) * size * (0.43 / pieces, 0.43) + c for c in centres]
    inside = paint(outlines, small, coarse)
    grid = [max(1, round(s / 550)) for s in size]  # regions of about 550 um with uneven borders
    sites = (np.argwhere(np.ones(grid)) + rng.uniform(0.15, 0.85, (np.prod(grid), 2))) * np.divide(size, grid)
    y, x = np.mgrid[:small[0], :small[1]] * coarse + 60 * np.stack([noise(rng, small, 25), noise(rng, small, 25)])
    region = np.argmin([(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in sites], 0)

    loads = np.zeros((3, *shape), np.float32)
    for i, kind in enumerate(rng.permutation(np.resize(list(KINDS), len(sites)))):
        mask = inside * (region == i)
        if mask.any():
            (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0) + 1
            part = [int(n * coarse / um) for n in (top, bottom, left, right)]
            view = loads[:2, part[0]:part[1], part[2]:part[3]]
            edge = Image.fromarray(mask[top:bottom, left:right]).resize(view.shape[:0:-1], Image.BILINEAR)
            view += tissue(rng, kind, view.shape[1:], um) * edge * rng.lognormal(0, 0.15, (2, 1, 1)).astype(np.float32)
    stroke = np.roll(outlines[0], rng.integers(40), 0)[:rng.integers(6, 16)]
    pen = Image.new("L", shape[::-1])
    points = ((stroke - centres[0]) * 1.1 + centres[0]) / um
    ImageDraw.Draw(pen).line(points.ravel().tolist(), fill=1, width=int(rng.uniform(80, 140) / um), joint="curve")
    loads[2] = pen
    return loads


def make_slide(folder, seed, number, spec):
    suffix, mpp, factors, *size = spec
    rng, size = np.random.default_rng([seed, 1, number]), np.multiply(size, 1000)
    stains, glass = patient(rng)
    pen = -np.log(np.divide(PENS[number % 3], 255))
    image = develop(rng, slide_loads(rng, size, RENDER_UM), np.vstack([stains, pen]), glass)
    image = image.resize([round(s / mpp) for s in size], Image.BILINEAR)
    write_tiff(folder / f"toy{number:02d}.{suffix}", image, mpp, factors)


# files: tifffile would need imagecodecs for JPEG tiles, and pillow stores JPEG as RGB strips, three times the size

def write_tiff(path, image, mpp, factors=(1,)):
    """A pyramidal TIFF of JPEG tiles that OpenSlide opens: as Aperio if path ends in .svs, else as generic TIFF."""
    with open(path, "wb") as file:
        file.write(b"II*\0\0\0\0\0")
        link, level = 4, image  # link: where the position of the next directory goes
        for k, factor in enumerate(factors):
            level = level.resize([round(s / factor) for s in image.size], Image.BILINEAR)
            tiles = [(file.tell(), file.write(data)) for data in jpegs(level)]
            power, size = 20 if mpp > 0.3 else 40, f"{level.width}x{level.height}"
            text = f"Aperio Image Library v12.0.0\n{size} JPEG/RGB|AppMag = {power}|MPP = {mpp}\0".encode()
            density = struct.pack("<2I", round(1e7 / mpp), 1000)  # px per cm, as a fraction
            tags = [  # 254: a reduced level? 259: JPEG; 262: YCbCr; 296: cm; 530: halved chroma
                (254, "I", [int(k > 0)]), (256, "I", [level.width]), (257, "I", [level.height]), (258, "H", [8, 8, 8]),
                (259, "H", [7]), (262, "H", [6]), (270, "s", text), (277, "H", [3]), (282, "r", density),
                (283, "r", density), (296, "H", [3]), (322, "I", [TILE]), (323, "I", [TILE]),
                (324, "I", [t[0] for t in tiles]), (325, "I", [t[1] for t in tiles]), (530, "H", [2, 2])]
            tags = [t for t in tags if t[0] != 270 or path.suffix == ".svs"]
            link = write_directory(file, tags, link)


def write_directory(file, tags, link):
    """Append a TIFF directory of (code, type, values), put its position at `link`, return where the next one's goes."""
    entries = struct.pack("<H", len(tags))
    for code, kind, values in tags:
        data = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{kind}", *values)
        count = 1 if kind == "r" else len(values)
        if len(data) > 4:  # longer values stand in front, the entry holds their position
            where = file.tell()
            file.write(data)
            data = struct.pack("<I", where)
        entries += struct.pack("<HHI", code, {"s": 2, "H": 3, "I": 4, "r": 5}[kind], count) + data.ljust(4, b"\0")
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
            tile.paste(image.crop((left, top, min(left + TILE, image.width), min(top + TILE, image.height))))
            tile.save(buffer, "JPEG", quality=80)
            yield buffer.getvalue()


# BACH

def make_image(folder, seed, index, size):
    """Image `index` of 400 in eva's order, of size (width, height) px."""
    kind, val = list(KINDS)[index // 100], any(a <= index < b for a, b in VAL)
    people = np.random.default_rng([seed, 2, val, index // 100]).permutation(12 if val else 28)
    who = people[index % (len(people) // 2)]  # half of the patients have this kind
    stains, glass = patient(np.random.default_rng([seed, 3, val, who]), shift=float(val))
    rng = np.random.default_rng([seed, 4, index])
    loads = tissue(rng, kind, size[::-1], BACH_UM)
    image = develop(rng, loads, stains * rng.lognormal(0, 0.15, (2, 1)), glass)
    write_tiff(folder / kind / f"{KINDS[kind][0]}{index % 100 + 1:03d}.tif", image, BACH_UM)


# all of it

def build(out, seed=0, workers=2, slides=SLIDES, images=range(400), size=(512, 384)):
    """
    Write `slides` (as SLIDES) and the BACH `images` (indices), `size` px large, below the folder `out`.

    False if all that is there already. Unfinished or other output of this script is replaced; ValueError if `out` holds
    anything else.
    """
    out, wanted = Path(out), json.dumps([VERSION, seed, slides, list(images), size])
    marker, photos = out / "toy.json", out / "bach" / "ICIAR2018_BACH_Challenge" / "Photos"
    if marker.exists() and marker.read_text() == wanted:
        return False
    if not marker.exists() and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files, but none of a toy world; name another folder with --out=")
    for folder in (out / "slides", out / "bach"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (out / "slides", *(photos / kind for kind in KINDS)):
        folder.mkdir(parents=True)
    marker.write_text("unfinished")
    jobs = [(make_slide, out / "slides", seed, i, spec) for i, spec in enumerate(slides)]
    jobs += [(make_image, photos, seed, i, size) for i in images]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        list(pool.imap_unordered(call, jobs))
    marker.write_text(wanted)
    return True


def call(job):
    job[0](*job[1:])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from configurator import configure

    configure(globals())
    started = time.time()
    try:
        new = build(out, seed, workers)
    except ValueError as e:
        raise SystemExit(f"toy: {e}")
    for i, (suffix, mpp, factors, *size) in enumerate(SLIDES):
        levels = ", ".join(map(str, factors))
        print(f"{out}/slides/toy{i:02d}.{suffix}: {size[0]} x {size[1]} mm at {mpp} um/px, levels 1 / ({levels})")
    total = sum(p.stat().st_size for p in Path(out).rglob("*") if p.is_file()) / 1e6
    took = f"{time.time() - started:.0f} s" if new else "complete already, nothing done"
    print(f"{out}/bach: 400 images; {total:.0f} MB in all, {took}")
    print("next: python train.py config/toy.py")
