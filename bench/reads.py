"""
Reading slides: regions against one read a tile, and exact reads against OpenSlide's own at level > 0.

    python prepare/toy.py && python bench/reads.py                     # three minutes on one core
    python bench/reads.py --slides='/data/TCGA/*.svs' --weights=out/toy/teacher/300.pth

Grid, in ms a tile: the first `tiles` of a slide's grid that lie wholly inside.
    open          to open and close the slide, for comparison
    regions       slide.regions and slide.read_tiles: one read covers many tiles, the slide stays open
    a tile        slide.read for each tile, the slide stays open
    opened        OpenMidnight's way: for each tile open the slide, one read_region of the same level, convert("RGB")
    naive         as regions, with exact_reads = False: the pixels of `opened`
    gain          opened / regions
    off           mean difference of regions from opened, and of naive from opened, in grey levels

OpenSlide composites each pixel that it returns, at 0.9 ms a 256 px tile, 4 x that where it interpolates. Both sides of
`gain` pay that, so it is large where opening or decoding is dear: files of scanner size, JPEG 2000; not the toy's.

Exact: random places with tissue of a level, against the pixels that it stores (the level read from its corner in one
go, where OpenSlide does not interpolate).
    sharp         variance of the Laplacian, as a share of that of the stored pixels: mean and 5 % quantile
    error         mean absolute difference from the stored pixels, in grey levels
    cosine        between the class tokens of an exact and a naive read of a place: mean, 5 % quantile, least; `others`
                  is the mean cosine between exact reads of different places of the slide. with --weights

A cost is the least process time of `repeats` rounds in which all columns take turns: trust the ratios.
"""
import sys
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_bach
import model
import wsi
from bench.data import fastest, machine
from configurator import configure

slides = "data/toy/slides/*"  # glob
slide_mpp = 0.0    # um/px of every slide; 0 = as the files say
mpps = (0.5, 1.0)  # um/px of the grids
tile_px = 256      # of the grids
tiles = 128        # a grid, at most
region_mb = 16     # of a region, as in wsi.py
places = 32        # random ones a level
place_px = 224     # a multiple of the encoder's patch
repeats = 3
weights = ""       # a teacher export or released file, for the cosines
arch = ""          # in model.ARCHS, where the file does not say
norm = None        # of the encoder, as in train.py

CORNER = 8192      # px of a level, from its corner, that are held in memory


# ---- grid -----------------------------------------------------------------------------------------------------------


def by_regions(slide, xy, mpp, c):
    """uint8 (n, size, size, 3)"""
    tiles = np.zeros((len(xy), c["tile_px"], c["tile_px"], 3), np.uint8)
    for rows in slide.regions(xy, c["tile_px"], mpp, c["region_mb"]):
        tiles[rows], errors = slide.read_tiles(xy[rows], c["tile_px"], mpp)
        assert not errors, errors
    return tiles


def by_opening(slide, xy, mpp, c):
    """One bare read_region a tile, each of a slide opened for it; shrunk where no level has the mpp."""
    level = max((i for i, m in enumerate(slide.level_mpp) if m <= mpp * (1 + wsi.TOLERANCE)), default=0)
    ratio, size = mpp / slide.level_mpp[level], c["tile_px"]
    side = size if abs(ratio - 1) <= wsi.TOLERANCE else round(size * ratio)
    tiles = []
    for x, y in xy.tolist():
        with openslide.OpenSlide(slide.path) as one:
            tile = one.read_region((x, y), level, (side, side)).convert("RGB")
        tiles.append(np.asarray(tile if side == size else tile.resize((size, size), Image.BILINEAR)))
    return np.stack(tiles)


def grid_row(slide, naive, mpp, c):
    xy, _ = slide.grid(c["tile_px"], mpp)
    xy = xy[(xy + slide.extent(c["tile_px"], mpp) <= slide.dimensions).all(1)][: c["tiles"]]  # wholly inside
    if not len(xy):
        raise wsi.SlideError(f"{slide.path}: no tile with tissue at {mpp} um/px")
    sides = {
        "regions": lambda: by_regions(slide, xy, mpp, c),
        "a tile": lambda: [slide.read(x, y, c["tile_px"], mpp) for x, y in xy.tolist()],
        "opened": lambda: by_opening(slide, xy, mpp, c),
        "naive": lambda: by_regions(naive, xy, mpp, c),
    }
    ms, theirs = fastest(c["repeats"], len(xy), sides), sides["opened"]().astype(float)
    ms |= fastest(c["repeats"], 1, {"open": lambda: openslide.OpenSlide(slide.path).close()})
    off = [np.abs(sides[name]() - theirs).mean() for name in ("regions", "naive")]
    costs = "".join(f"{ms[name]:8.2f}" for name in ("open", *sides))
    gain = ms["opened"] / ms["regions"]
    print(f"{Path(slide.path).name[:28]:28} {mpp:5} {len(xy):5}{costs} {gain:6.1f}x {off[0]:7.2f} {off[1]:5.2f}")
    return gain


# ---- exact reads ----------------------------------------------------------------------------------------------------


def sharpness(tile):
    g = tile.astype(float).mean(2)
    return (4 * g[1:-1, 1:-1] - g[:-2, 1:-1] - g[2:, 1:-1] - g[1:-1, :-2] - g[1:-1, 2:]).var()


def stored_places(slide, level, c):
    """(xy, stored): random places with tissue near the level's corner, and the level's pixels there."""
    (w, h), scale, rng = slide.level_dimensions[level], slide.level_scale[level], np.random.default_rng(level)
    with openslide.OpenSlide(slide.path) as one:
        stored = np.asarray(one.read_region((0, 0), level, (min(w, CORNER), min(h, CORNER))).convert("RGB"))
    xy = [slide.random_tissue(rng, c["place_px"], slide.level_mpp[level]) for _ in range(20 * c["places"])]
    last = np.array(stored.shape[1::-1]) - c["place_px"] - 1
    inside = [(x, y) for x, y in xy if 0 < x < last[0] * scale[0] and 0 < y < last[1] * scale[1]]
    return inside[: c["places"]], stored


def nearest(tile, stored, x, y):
    """(error, window): of the four windows of whole pixels around (x, y), the one nearest to the tile."""
    px = len(tile)
    windows = [stored[j : j + px, i : i + px] for j in (int(y), int(y) + 1) for i in (int(x), int(x) + 1)]
    return min(((np.abs(tile.astype(float) - w).mean(), w) for w in windows), key=lambda pair: pair[0])


def exact_rows(exact, naive, vit, c):
    """The figures of each level above 0, printed."""
    rows = []
    for level in range(1, len(exact.level_scale)):
        xy, stored = stored_places(exact, level, c)
        if not xy:
            print(f"left out: {exact.path}: level {level} has no tissue near its corner")
            continue
        sides = {name: lambda s=s: [s.read_level(x, y, c["place_px"], level) for x, y in xy]
                 for name, s in (("exact", exact), ("naive", naive))}
        row, reads = list(fastest(c["repeats"], len(xy), sides).values()), [side() for side in sides.values()]
        for tiles in reads:
            row += against_stored(tiles, stored, np.array(xy) / exact.level_scale[level])
        rows.append(row + (cosine(vit, reads, c) if vit else []))
        print_row(f"{Path(exact.path).name[:28]:28} {level:3} {exact.level_scale[level][0]:8.4f} {len(xy):4}", rows[-1])
    return rows


def print_row(head, row):
    print(f"{head} {row[0]:6.2f} {row[1]:6.2f} |{row[2]:6.2f} {row[3]:5.2f} {row[4]:6.2f} |{row[5]:6.2f} {row[6]:5.2f} "
          f"{row[7]:6.2f} |" + "".join(f" {v:6.4f}" for v in row[8:]))


def against_stored(tiles, stored, at):
    """[mean share of the stored sharpness, its 5 % quantile, mean error]"""
    pairs = [nearest(tile, stored, x, y) for tile, (x, y) in zip(tiles, at)]
    share = [sharpness(tile) / sharpness(window) for tile, (_, window) in zip(tiles, pairs)]
    return [np.mean(share), np.quantile(share, 0.05), np.mean([error for error, _ in pairs])]


def cosine(vit, reads, c):
    """[mean, 5 % quantile, least of exact against naive, mean between exact reads of different places]"""
    pixels = (torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) for tiles in reads)
    a, b = (torch.nn.functional.normalize(eval_bach.embed(vit, p, *model.norm_values(c["norm"]), "cpu"), dim=1)
            for p in pixels)
    same, others = (a * b).sum(1), (a @ a.T)[~torch.eye(len(a), dtype=torch.bool)]
    return [v.item() for v in (same.mean(), same.quantile(0.05), same.min(), others.mean())]


def skipping(run, *arguments):
    """run(...), or None with a line where a slide cannot serve."""
    try:
        return run(*arguments)
    except wsi.SlideError as e:
        print(f"left out: {e}")


if __name__ == "__main__":
    c = configure(globals())
    torch.set_num_threads(1)
    print(machine())
    pairs = []
    for path in wsi.expand(c["slides"], "slides"):
        pair = skipping(lambda: [wsi.Slide(path, c["slide_mpp"] or None, exact) for exact in (True, False)])
        pairs += [pair] if pair else []
    print(f"\n{'grid, ms a tile':28}   mpp tiles    open regions  a tile  opened   naive    gain     off")
    gains = [skipping(grid_row, *pair, mpp, c) for pair in pairs for mpp in c["mpps"]]
    gains = [gain for gain in gains if gain] or [float("nan")]
    print(f"gain: {min(gains):.1f}x to {max(gains):.1f}x, geometric mean {np.exp(np.mean(np.log(gains))):.1f}x")
    vit = model.load_backbone(c["weights"], c["arch"] or None) if c["weights"] else None
    print(f"\n{'':46} ms a tile     | exact               | naive               | cosine")
    print(f"{'exact reads':28} lvl   factor    n  exact  naive | sharp   5 %  error | sharp   5 %  error |"
          "   mean    5 %  least others")
    rows = [row for pair in pairs for row in skipping(exact_rows, *pair, vit, c) or []]
    if rows:
        print_row(f"{f'mean of {len(rows)} levels':46}", np.mean(rows, 0))
