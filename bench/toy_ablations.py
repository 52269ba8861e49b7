"""
The toy's evidence: each of config/ablate on its parent with several seeds, from scratch and from pretrained weights.

    python bench/toy_ablations.py                             # all that is not done yet: two hours on two cores
    python bench/toy_ablations.py --only=kde                  # only runs with "kde" in their name
    python bench/toy_ablations.py --labelled=NCT-CRC-HE-100K  # and on real tiles, a folder per class
    python curves.py --runs='out/ablations/scratch/*' --parent=recipe         # or continued/*, tiles/*

After a stop, the same command resumes. At the end, what tables and figures need of the runs (no weights) is copied to
docs/toy_runs: tests rebuild the README's table from it and compute some steps again.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure

jobs = 2                   # runs at a time, with one thread each: small products gain little from a second
only = ""                  # part of a run's name
labelled = ""              # folder of labelled tiles, a folder per class; "" = no runs on real tiles
out = "out/ablations"

ROOT = Path(__file__).resolve().parent.parent
TERMS = "kde_openmidnight", "koleo", "noreg"              # other spreading terms, or none
STRENGTHS = "clip30", "kde_weight005", "kde_weight001"    # the same, stronger or weaker
ABLATIONS = {  # folder: parent, seeds, what is tried on it ("recipe": nothing)
    "scratch": ("toy", range(5), ("recipe", *TERMS, *STRENGTHS, "norm_half", "level_sampling")),
    # with the pretraining's seed 0 continued runs would draw the very heads and positions that the encoder began with,
    # and random positions would look harmless
    "continued": ("toy_continue", range(1, 6), ("recipe", *TERMS, "pos_random")),
    "tiles": ("toy_tiles", range(3), ("recipe", *TERMS, *STRENGTHS)),
}
PRETRAIN, ENCODER = "pretrain/toy_0", "out/toy_pretrain/teacher/300.pth"
PROBED = 100  # of the labelled tiles of a class, about; the others are trained on


def commands():
    """{folder of a run: arguments of train.py}, the pretraining after the runs from scratch."""
    found = {}
    for folder, (parent, seeds, names) in ABLATIONS.items():
        for seed in seeds:
            for name in names:
                files = [f"config/{parent}.py"] + ([] if name == "recipe" else [f"config/ablate/{name}.py"])
                found[f"{folder}/{name}_{seed}"] = [*files, f"--seed={seed}"]
        if folder == "scratch":
            found[PRETRAIN] = ["config/toy_pretrain.py", "--seed=0"]
    return found


def split(folder):
    """Link every n-th tile of each class to data/labelled, about PROBED of them, and the others to data/unlabelled."""
    for kind in sorted(Path(folder).iterdir()):
        tiles = sorted(kind.iterdir())
        for number, tile in enumerate(tiles):
            part = "unlabelled" if number % max(len(tiles) // PROBED, 2) else "labelled"
            link = ROOT / "data" / part / kind.name / tile.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(tile.resolve())


def python(*args, **keys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads gives other results
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, **keys)


def finished(place):
    if not (place / "bach.jsonl").exists():
        return False
    steps = [json.loads(line)["step"] for line in (place / "bach.jsonl").read_text().splitlines()]
    return json.loads((place / "config.json").read_text())["max_steps"] in steps


def run(job):
    """Train a run to its end, unless it is there; returns whether that worked."""
    folder, args = job
    place = ROOT / out / folder
    if not finished(place):
        resume = any(place.glob("ckpt/[0-9]*"))
        if not resume:
            shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{place}.log", "a") as log:
            flags = ["--device=cpu", f"--out_dir={out}/{folder}", f"--resume={resume}"]
            python("train.py", *args, *flags, stdout=log, stderr=log)
        print(f"{time.strftime('%H:%M')} {folder}: {'done' if finished(place) else 'failed'}", flush=True)
    return finished(place)


def record(folder):
    """Copy a run to docs/toy_runs. Not before all have begun, because each notes what git sees changed."""
    place = ROOT / "docs/toy_runs" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "source.diff", "bach.jsonl", "metrics.jsonl"):
        shutil.copy(ROOT / out / folder / name, place)


if __name__ == "__main__":
    configure(globals())
    python("prepare/toy.py", check=True)
    python("prepare/toy.py", "--seed=1", "--out=data/toy_other", check=True)
    if not (ROOT / "data/toy/levels.txt").exists():
        python("prepare/levels.py", "--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128",
               "--passes=350", check=True)
    if labelled:
        split(labelled)
    every = commands()
    runs = {folder: args for folder, args in every.items()
            if only in folder and (labelled or not folder.startswith("tiles"))}
    later = {folder: args for folder, args in runs.items() if folder.startswith("continued")}
    if later:
        runs[PRETRAIN] = every[PRETRAIN]
    with ThreadPool(jobs) as pool:
        done = pool.map(run, [job for job in runs.items() if job[0] not in later], chunksize=1)
        if finished(ROOT / out / PRETRAIN):
            (ROOT / ENCODER).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / out / PRETRAIN / "teacher/300.pth", ROOT / ENCODER)
        done += pool.map(run, later.items(), chunksize=1)
    if not all(done):
        raise SystemExit(f"toy_ablations: {done.count(False)} of {len(done)} runs failed; see {out}/*/*.log")
    for folder in runs:
        record(folder)
