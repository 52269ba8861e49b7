"""
What a tile of a source costs one core, which decides how many workers a GPU needs. It takes train.py's keys.

    python bench/data.py --shards=data/tiles
    python bench/data.py config/vitg.py --slides='data/TCGA/**/*.svs' --mask_dir=data/masks

    tile          reading one, and decoding it
    batch         what a data worker does, data.Batches[step]: tiles, uint8 crops, colour parameters, masks
    everything    a batch, then data.augment on the same core, to normalised float32

A figure is the smallest process time over `repeats` rounds in which all rows take turns: trust the ratios. The round
before them, which opens slides and finds their masks, does not count.
"""
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import model
import sources
from configurator import configure, run
from prepare.stats import train_keys

repeats = 5  # rounds, beside train.py's keys


def augmented(batch, config):
    for kind in ("global", "local") if config["local_crops"] else ("global",):
        data.augment(batch[f"{kind}_crops"], batch[f"{kind}_colour"], config, "cpu")


def main(config):
    torch.set_num_threads(1)
    n = config["batch_size"]
    source = sources.open_source(config)
    batches = data.Batches(source, config, config["global_px"] // model.ARCHS[config["arch"]].patch_size)
    if batches[0]["bad"]:
        raise ValueError(batches[0]["bad"][0])
    sides = {"tile": lambda: [source.read(i) for i in range(n)],
             "batch": lambda: batches[0],
             "everything": lambda: augmented(batches[0], config)}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(config["repeats"]):
        for name, function in sides.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "unknown"
    print(f"{source.about}\none core of {platform.machine()}; torch {torch.__version__}; commit {commit}")
    print(f"{'':12} ms/tile  tiles/s/core")
    for name, seconds in best.items():
        print(f"{name:12} {1000 * seconds / n:7.2f} {n / seconds:13.0f}")


if __name__ == "__main__":
    config = configure({**train_keys(), **globals()}, shared="train.py")
    run("bench/data.py", main, config)
