"""
What OpenMidnight's list of 29 million tiles costs a node: time to index it, memory shared, memory a worker adds.

    python bench/sample_list.py --lines=29_000_000     # a minute, 1.6 GB of text in `folder`, removed at the end
"""
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import sources
from configurator import configure

lines = 1_000_000
folder = "out/bench_list"  # is made, and removed
workers = 8


def write(file, lines):
    rng = np.random.default_rng(0)
    with open(file, "w") as f:
        for start in range(0, lines, 1_000_000):
            n = min(1_000_000, lines - start)
            columns = (rng.integers(0, high, n).tolist() for high in (12_000, 100_000, 100_000, 4))
            f.writelines(f"/data/TCGA/TCGA-AA-{slide:05d}-01Z-00-DX1.svs {x} {y} {level}\n"
                         for slide, x, y, level in zip(*columns))


def anonymous():
    """MB of this process that it shares with nobody."""
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("Anonymous:")) / 1e3


if __name__ == "__main__":
    configure(globals())
    os.makedirs(folder)
    file = os.path.join(folder, "list.txt")
    write(file, lines)
    for what in ("indexed", "opened again"):
        start = time.time()
        source = sources.open_source({**data.train_keys(), "sample_list": file})
        print(f"{what} in {time.time() - start:.3f} s: {source.about}, {source.table.nbytes / 1e6:.0f} MB mapped")
    for worker in range(workers):
        if os.fork() == 0:
            before = anonymous()
            np.add.reduce(source.table["slide"], dtype=np.int64)  # touches every page
            print(f"worker {worker}: {anonymous() - before:.1f} MB of its own", flush=True)
            os._exit(0)
    for _ in range(workers):
        os.wait()
    shutil.rmtree(folder)
