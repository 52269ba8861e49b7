"""
A sample list as OpenMidnight's: from each pyramid level of each slide a random tile with tissue, again and again.

    python prepare/levels.py --slides='data/TCGA/**/*.svs' --out=data/levels.txt --passes=1000
    python prepare/levels.py --slides='data/toy/slides/*' --out=data/toy/levels.txt --tile_px=128 --passes=350

Lines `path x y level`: the path as the glob gives it; the corner in level-0 pixels, uniform over the slide, from which
tile_px pixels are read at the level. Of `draws` places the first is taken of which `tissue_share` passes Midnight's HSV
rule. So every level of every slide has an equal share of the tiles, whatever its um/px, where train.py's `mpps` asks
for scales. OpenMidnight's list has 29 million lines and black, not white, outside the slide when tissue is judged.
A tile takes some 5 ms: of many slides make several lists at once, of a part of the slides each, and join them by `cat`.
"""
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from configurator import configure

slides = ""         # glob of whole-slide images
out = ""            # the list; must not exist
passes = 100        # tiles of each level of each slide
tile_px = 224
draws = 1000        # places tried for one tile
tissue_share = 0.6
seed = 0


def lines(slide, number):
    """A text `path x y level` for each level with enough tissue, `passes` times; a level without is given up."""
    rng, levels = np.random.default_rng((seed, number)), list(range(len(slide.level_mpp)))
    high = np.maximum(np.subtract(slide.dimensions, tile_px), 0) + 1  # as theirs: level-0 pixels at whatever level
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
    if min(passes, tile_px, draws) < 1:
        raise ValueError("passes, tile_px and draws must be at least 1")
    paths, written = wsi.expand(slides, "slides"), 0
    try:
        with open(f"{out}.unfinished", "w") as file:
            for number, path in enumerate(tqdm(paths, "slides", unit="slide")):
                try:
                    for line in lines(wsi.Slide(path, mpp=1.0), number):  # its um/px does not matter
                        file.write(line)
                        written += 1
                except wsi.SlideError as e:
                    tqdm.write(f"no more tiles of this one: {e}")
        if not written:
            raise ValueError(f"no tile with tissue in {len(paths):,} slides; see tissue_share")
        os.replace(f"{out}.unfinished", out)
    finally:
        if os.path.exists(f"{out}.unfinished"):
            os.remove(f"{out}.unfinished")
    print(f"{out}: {written:,} tiles of {len(paths):,} slides")


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except (ValueError, OSError) as e:
        raise SystemExit(f"levels: {e}")
