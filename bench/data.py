"""
What a tile costs one core, which decides how many workers a GPU needs.

    python prepare/toy.py && python bench/data.py                      # half a minute
    python bench/data.py --images='/data/tiles/*.jpg' --slides='/data/TCGA/*.svs'

    decode            a JPEG in memory
    worker            what a data worker does, data.Batches[step]: decode, uint8 crops, colour parameters, masks
    everything        worker, then data.augment on the same core, to normalised float32
    ... clipped HED   the same with hed = "openmidnight"
    worker, slides    worker on tiles read from slides; each visit opens its slide and finds its mask in mask_dir

A figure is the smallest process time over `repeats` rounds in which all rows take turns: trust the ratios.
"""
import io
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import sources
import wsi
from configurator import configure
from prepare.stats import train_keys

images = "data/toy/bach/ICIAR2018_BACH_Challenge/Photos/*/*.tif"  # glob; JPEGs are made of their top-left corners
slides = "data/toy/slides/*"  # glob; "" = none
tile_px = 256
tiles = 48            # per round, a multiple of batch
batch = 8             # images per batch; augment of so many stays in a CPU's cache
repeats = 5


class Memory:
    """A source of JPEGs in memory."""

    def __init__(self, paths):
        self.jpegs = []
        for i in range(tiles):
            file = io.BytesIO()
            tile = Image.open(paths[i * len(paths) // tiles]).convert("RGB").crop((0, 0, tile_px, tile_px))
            tile.save(file, "JPEG", quality=90)
            self.jpegs.append(file.getvalue())

    def read(self, n, attempt=0):
        return sources.decode(self.jpegs[n], f"tile {n}"), {}


def machine():
    """One line: what the figures were measured on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"one core of {platform.machine()}; torch {torch.__version__}; commit {git.stdout.strip()}"


def fastest(repeats, count, sides):
    """{name: ms of process time per tile}: the best of `repeats` rounds, in each of which every side runs once."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], (time.process_time() - start) / count * 1000)
    return best


def worker(source, keys):
    """The batches of a round, made by a data worker that has just started."""
    dataset = data.Batches(source, keys, keys["global_px"] // 14)
    batches = [dataset[step] for step in range(tiles // batch)]
    if "masks" not in batches[0]:
        raise wsi.SlideError(batches[0]["bad"][0])
    return batches


def everything(source, keys):
    for made in worker(source, keys):
        for kind in ("global", "local"):
            data.augment(made[f"{kind}_crops"], made[f"{kind}_colour"], keys, "cpu")


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    keys = train_keys() | {"batch_size": batch}
    memory = Memory(wsi.expand(images, "images"))
    sides = {
        "decode": lambda: [memory.read(n) for n in range(tiles)],
        "worker": lambda: worker(memory, keys),
        "everything": lambda: everything(memory, keys),
        "everything, clipped HED": lambda: everything(memory, keys | {"hed": "openmidnight"})}
    with tempfile.TemporaryDirectory() as mask_dir:
        for mpp in keys["mpps"] if slides else ():
            fly = keys | {"mpps": (mpp,), "mask_dir": mask_dir, "open_slides": 1}
            try:
                worker(sources.Slides(slides, fly), fly)  # the masks are made here
            except wsi.SlideError as e:
                print(f"slides at {mpp} um/px are left out: {e}")
                continue
            sides[f"worker, slides at {mpp} um/px"] = lambda fly=fly: worker(sources.Slides(slides, fly), fly)
        ms = fastest(repeats, tiles, sides)
    print(f"{machine()}\n\n{'':30}    ms/tile  tiles/s/core")
    for name, t in ms.items():
        print(f"{name:30} {t:10.2f} {1000 / t:13.0f}")
