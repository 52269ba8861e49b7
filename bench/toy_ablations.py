"""
The toy's evidence: each of config/ablate on its parent with several seeds, from scratch and from pretrained weights.

    python bench/toy_ablations.py                   # all that is not done yet, two at a time; some two hours on two cores
    python bench/toy_ablations.py --only=kde        # of these the ones with "kde" in their name
    python eval_bach.py --runs='out/ablations/toy_?,out/ablations/toy_[!c]*'

Runs go on where they stopped. What tables and figures are made of (no weights) is copied from each finished run to
`record`, which the project keeps: its tests rebuild the README's table from there, and compute some steps again.
"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure

seeds = 3
jobs = 2                   # at a time, one thread each: small products gain little from a second
only = ""                  # part of a run's name
out = "out/ablations"
record = "docs/toy_runs"   # "" = nowhere

ABLATIONS = {  # parent: what is tried on it, the first being itself; in the order of what is asked most
    "toy": ("", "kde_openmidnight", "koleo", "noreg"),
    "toy_continue": ("", "kde_openmidnight", "koleo", "noreg", "pos_random"),
    "toy ": ("clip30", "kde_weight001", "norm_half", "level_sampling"),
}
KEPT = ("config.json", "source.diff", "bach.jsonl", "metrics.jsonl")


def commands():
    """{folder's name: arguments of train.py}."""
    found = {}
    for parent, names in ABLATIONS.items():
        parent = parent.strip()
        for seed in range(seeds):
            for name in names:
                files = [f"config/{parent}.py"] + [f"config/ablate/{name}.py"] * bool(name)
                folder = f"{parent}{'_' * bool(name)}{name}_{seed}"
                found[folder] = [*files, f"--seed={seed}", f"--out_dir={out}/{folder}"]
    return {folder: args for folder, args in found.items() if only in folder}


def prepare():
    """The worlds, the list of tiles and the pretrained encoder, where they are not there yet."""
    def run(*args):
        subprocess.run([sys.executable, *args], cwd=ROOT, check=True)
    run("prepare/toy.py")
    run("prepare/toy.py", "--seed=1", "--out=data/toy_other")
    if not (ROOT / "data/toy/levels.txt").exists():
        run("prepare/levels.py", "--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128", "--passes=350")


def keep(folder):
    if record:
        os.makedirs(ROOT / record / folder, exist_ok=True)
        for name in KEPT:
            shutil.copy(ROOT / out / folder / name, ROOT / record / folder / name)


def start(folder, args):
    log = open(ROOT / out / f"{folder}.log", "a")
    resume = ["--resume=true"] if list((ROOT / out / folder).glob("ckpt/[0-9]*")) else []
    if not resume:
        shutil.rmtree(ROOT / out / folder, ignore_errors=True)
    return subprocess.Popen([sys.executable, "train.py", *args, *resume], cwd=ROOT, stdout=log, stderr=log,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(folder):
    log = ROOT / out / f"{folder}.log"
    return log.exists() and "\ndone: " in log.read_text()


def main():
    os.makedirs(ROOT / out, exist_ok=True)
    prepare()
    waiting = [(folder, args) for folder, args in commands().items() if not finished(folder)]
    running, failed = {}, []
    pretrain = ROOT / "out/toy_pretrain/teacher/300.pth"
    if not pretrain.exists() and any("continue" in folder for folder, _ in waiting):
        waiting.insert(0, ("toy_pretrain", ["config/toy_pretrain.py", f"--out_dir={out}/toy_pretrain"]))
    print(f"{len(waiting)} runs to go")
    while waiting or running:
        for folder, process in list(running.items()):
            if process.poll() is not None:
                del running[folder]
                ok = process.returncode == 0
                print(f"{time.strftime('%H:%M:%S')} {folder}: {'done' if ok else f'failed, see {out}/{folder}.log'}", flush=True)
                keep(folder) if ok else failed.append(folder)
                if folder == "toy_pretrain" and ok:
                    os.makedirs(pretrain.parent, exist_ok=True)
                    shutil.copy(ROOT / out / folder / "teacher/300.pth", pretrain)
        ready = [w for w in waiting if "continue" not in w[0] or pretrain.exists()]
        if ready and len(running) < jobs:
            waiting.remove(ready[0])
            running[ready[0][0]] = start(*ready[0])
        elif waiting and not running:
            break
        else:
            time.sleep(1)
    for folder in (f for f in commands() if finished(f)):
        keep(folder)
    if failed or waiting:
        raise SystemExit(f"toy_ablations: failed: {', '.join(failed)}; not started: {', '.join(w[0] for w in waiting)}")


if __name__ == "__main__":
    configure(globals())
    main()
