"""
What reading slides costs and how exact it is: python prepare/toy.py && python bench/reads.py (three minutes)

grid    ms per tile of a slide's grid. `opened` is OpenMidnight's way: it opens the slide for each tile. `regions` opens
        it once and reads neighbours together; `naive` does so with exact_reads=False. gain = opened / regions.
exact   random places with tissue, against the pixels that a level stores: the share of their sharpness (variance of the
        Laplacian) that is kept, its 5 % quantile, and the mean error in grey levels.
All sides take turns and open their own slides, so that none finds its pixels in OpenSlide's cache. A cost is the least
process time of all rounds: trust the ratios.
"""
import sys
from pathlib import Path

import numpy as np
import openslide

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from bench.data import fastest, machine
from configurator import configure

slides = "data/toy/slides/*"  # glob
slide_mpp = 0.0    # um/px of every slide; 0 = as the files say
mpps = (0.5, 1.0)  # um/px of the grids
tile_px = 224
tiles = 128        # per grid, at most
places = 32        # per level, at most
repeats = 3        # rounds


def by_regions(path, xy, mpp, exact=True):
    slide = wsi.Slide(path, slide_mpp or None, exact)
    for rows in slide.regions(xy, tile_px, mpp):
        slide.read_tiles(xy[rows], tile_px, mpp)


def by_opening(path, xy, level, px):
    for place in xy.tolist():
        with openslide.OpenSlide(path) as slide:
            slide.read_region(place, level, (px, px)).convert("RGB").resize((tile_px, tile_px))


def grid_row(slide, mpp):
    xy, (level, extent) = slide.grid(tile_px, mpp)[0][:tiles], slide._plan(tile_px, mpp)
    sides = {"opened": lambda: by_opening(slide.path, xy, level, int(extent.max())),
             "regions": lambda: by_regions(slide.path, xy, mpp),
             "naive": lambda: by_regions(slide.path, xy, mpp, exact=False)}
    opened, regions, naive = fastest(repeats, max(1, len(xy)), sides).values()
    return opened, regions, naive, opened / regions


def sharpness(tile):
    gray = tile.astype(float).mean(2)
    return (np.diff(gray, 2, axis=0)[:, 1:-1] + np.diff(gray, 2, axis=1)[1:-1]).var()


def exact_row(slide, level, exact):
    """[sharpness, its 5 % quantile, error], near the level's corner: it is read from there without interpolation."""
    size, rng = np.minimum(slide.level_dimensions[level], 8192).tolist(), np.random.default_rng(level)
    stored = np.asarray(slide._handle().read_region((0, 0), level, size).convert("RGB"))
    reader, kept, errors = wsi.Slide(slide.path, slide_mpp or None, exact), [], []
    for _ in range(places):
        place = slide.random_tissue(rng, tile_px, slide.level_mpp[level])
        x, y = np.rint(place / slide.level_scale[level]).astype(int)
        truth = stored[max(y, 0):y + tile_px, max(x, 0):x + tile_px]
        if truth.shape == (tile_px, tile_px, 3):  # wholly inside
            tile = reader.read_level(*place, tile_px, level)
            kept.append(sharpness(tile) / sharpness(truth))
            errors.append(abs(tile - truth.astype(float)).mean())
    return [np.mean(kept), np.quantile(kept, 0.05), np.mean(errors)] if kept else [np.nan] * 3


def show(slide, what, row):
    print(f"{Path(slide.path).name:28} {what:9} |", *(f"{value:7.2f}" for value in row))


if __name__ == "__main__":
    configure(globals())
    print(f"{machine()}\n\n{'grid':38} |  opened regions   naive    gain")
    print(f"{'exact reads':38} |   sharp     5 %   error   naive: the same")
    for path in wsi.expand(slides, "slides"):
        slide = wsi.Slide(path, slide_mpp or None)
        for mpp in [mpp for mpp in mpps if max(slide.mpp_xy) <= mpp * wsi.MAX_ENLARGE]:
            show(slide, f"{mpp} um/px", grid_row(slide, mpp))
        for level in range(1, len(slide.level_mpp)):
            show(slide, f"level {level}", exact_row(slide, level, exact=True) + exact_row(slide, level, exact=False))
