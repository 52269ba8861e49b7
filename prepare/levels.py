"""
A sample list as OpenMidnight's: a random tile with tissue from each pyramid level of each slide, again and again.

    python prepare/levels.py --slides='data/TCGA/**/*.svs' --out=data/levels.txt --passes=1000
    python prepare/levels.py --slides='data/toy/slides/*' --out=data/toy/levels.txt --tile_px=128 --passes=350

Lines are `path x y level`: (x, y) is a corner in level-0 pixels, uniform over the slide, from which tile_px pixels are
read at the level. Up to `draws` places are tried until `tissue_share` of one passes Midnight's HSV rule. So every
level of every slide has the same share of the tiles, whatever its um/px; train.py's `mpps` asks for scales instead.
OpenMidnight's list has 29 million lines, and its tissue test saw black outside the slide where ours sees white.
A tile takes about 5 ms. For many slides make lists of parts of them at the same time, and join them by `cat`.
"""
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import listing
import wsi
from configurator import configure, run

slides = ""         # glob of whole-slide images
out = ""            # the list; must not exist
passes = 100        # tiles of each level of each slide
tile_px = 224
draws = 1000        # places tried for one tile
tissue_share = 0.6
seed = 0


def lines(slide, number):
    """Yields `path x y level` for each level, `passes` times; a level without enough tissue is given up."""
    rng = np.random.default_rng((seed, number))
    levels = [level for level in range(len(slide.level_mpp)) if level not in slide.left_out]
    high = np.maximum(np.subtract(slide.dimensions, tile_px), 0) + 1  # as theirs: level-0 pixels at any level
    for _ in range(passes):
        for level in list(levels):
            for x, y in rng.integers(high, size=(draws, 2)).tolist():
                if wsi.tissue_share(slide.read_level(x, y, tile_px, level)) > tissue_share:
                    yield f"{slide.path} {x} {y} {level}\n"
                    break
            else:
                levels.remove(level)


def main():
    if not slides or not out or os.path.exists(out):
        raise ValueError(f"give --slides='*.svs' and an --out=FILE that does not exist yet (out = {out!r})")
    found, left_out = listing.find(slides, "slides")
    paths, unfinished = wsi.one_each(found, left_out), f"{out}.unfinished"
    listing.say_left_out(left_out, tqdm.write)
    with open(unfinished, "w") as file:
        for number, path in enumerate(listing.bar(paths, "slides", unit="slide")):
            try:
                file.writelines(lines(wsi.Slide(path, mpp=1.0), number))  # its um/px does not matter
            except wsi.SlideError as e:
                tqdm.write(f"no more tiles of this one: {e}")
    if not os.path.getsize(unfinished):
        os.remove(unfinished)
        raise ValueError(f"no tile with tissue in {len(paths):,} slides; see tissue_share")
    os.replace(unfinished, out)
    print(f"{out}: tiles of {len(paths):,} slides")


if __name__ == "__main__":
    configure(globals())
    run("levels", main)
