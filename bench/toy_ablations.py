"""
The toy's evidence: each of config/ablate on its parent with several seeds, from scratch and from pretrained weights.

    python bench/toy_ablations.py                   # all that is not done yet: two hours on two cores
    python bench/toy_ablations.py --only=kde        # of these the ones with "kde" in their name
    python eval_bach.py --runs='out/ablations/scratch/*' --parent=recipe     # or out/ablations/continued/*

Runs go on where they stopped. What tables and figures are made of (no weights) is copied from each finished run to
`record`, which the project keeps: its tests rebuild the README's table from there, and compute some steps again.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure

ROOT = Path(__file__).resolve().parent.parent

seeds = 3
jobs = 2                   # at a time, one thread each: small products gain little from a second
only = ""                  # part of a run's name
out = "out/ablations"
record = "docs/toy_runs"   # "" = nowhere

ABLATIONS = [  # folder, parent, what is tried on it ("recipe": nothing); in the order of what is asked most
    ("scratch", "toy", ("recipe", "kde_openmidnight", "koleo", "noreg")),
    ("continued", "toy_continue", ("recipe", "kde_openmidnight", "koleo", "noreg", "pos_random")),
    ("scratch", "toy", ("clip30", "kde_weight001", "norm_half", "level_sampling")),
]
PRETRAIN, ENCODER = "pretrain/toy_0", "out/toy_pretrain/teacher/300.pth"
KEPT = ("config.json", "source.diff", "bach.jsonl", "metrics.jsonl")


def commands():
    """
    {folder of a run: arguments of train.py}. Continued runs begin at seed 1: the pretraining's, 0, would draw the very
    heads and positions that the encoder began with, and so make random positions look harmless.
    """
    found = {}
    for folder, parent, names in ABLATIONS:
        first = int(folder == "continued")
        for seed, name in ((seed, name) for seed in range(first, first + seeds) for name in names):
            files = [f"config/{parent}.py"] + [f"config/ablate/{name}.py"] * (name != "recipe")
            found[f"{folder}/{name}_{seed}"] = files + [f"--seed={seed}"]
    return {folder: args for folder, args in found.items() if only in folder}


def prepare():
    """The worlds and the list of tiles, where they are not there yet."""
    def run(*args):
        subprocess.run([sys.executable, *args], cwd=ROOT, check=True)
    run("prepare/toy.py")
    run("prepare/toy.py", "--seed=1", "--out=data/toy_other")
    if not (ROOT / "data/toy/levels.txt").exists():
        run("prepare/levels.py", "--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128",
            "--passes=350")


def start(folder, args):
    place = ROOT / out / folder
    resume = ["--resume=true"] if list(place.glob("ckpt/[0-9]*")) else []
    if not resume:
        shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place.parent, exist_ok=True)
    command = [sys.executable, "train.py", *args, "--device=cpu", f"--out_dir={out}/{folder}", *resume]
    with open(f"{place}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(folder):
    rows, config = ROOT / out / folder / "bach.jsonl", ROOT / out / folder / "config.json"
    if not rows.exists() or not config.exists():
        return False
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    return json.loads(config.read_text())["max_steps"] in steps


def keep(folder):
    """What a finished run leaves in `record`; of the pretraining also the encoder."""
    if folder == PRETRAIN:
        os.makedirs((ROOT / ENCODER).parent, exist_ok=True)
        shutil.copy(ROOT / out / folder / "teacher/300.pth", ROOT / ENCODER)
    if record:
        os.makedirs(ROOT / record / folder, exist_ok=True)
        for name in KEPT:
            shutil.copy(ROOT / out / folder / name, ROOT / record / folder / name)


def main():
    prepare()
    runs = commands()
    if any(folder.startswith("continued") for folder in runs):
        runs = {PRETRAIN: ["config/toy_pretrain.py"]} | runs
    waiting, running, failed = [folder for folder in runs if not finished(folder)], {}, []
    print(f"{len(waiting)} of {len(runs)} runs to go", flush=True)
    while waiting or running:
        for folder, process in list(running.items()):
            if process.poll() is not None:
                del running[folder]
                print(f"{time.strftime('%H:%M')} {folder}: {'failed' if process.returncode else 'done'}", flush=True)
                failed += [folder] * bool(process.returncode)
                if not process.returncode:
                    keep(folder)
        ready = [folder for folder in waiting if not folder.startswith("continued") or finished(PRETRAIN)]
        if not ready and not running:
            break
        if ready and len(running) < jobs:
            waiting.remove(ready[0])
            running[ready[0]] = start(ready[0], runs[ready[0]])
        else:
            time.sleep(1)
    for folder in filter(finished, runs):
        keep(folder)
    if failed or waiting:
        raise SystemExit(f"toy_ablations: failed, see {out}/*/*.log: {', '.join(failed)}; not started: {len(waiting)}")


if __name__ == "__main__":
    configure(globals())
    main()
