"""
Time and memory of training steps on one GPU, against what that GPU can do and against the goals.

    python bench/step.py --commit=$(git rev-parse --short HEAD)    # all rows, in less than 9 minutes
    python bench/step.py --only=fp8                                # rows with fp8 in their name
    python bench/step.py --device=cpu --out=/tmp/step.jsonl        # toy sizes: only shows that it runs

Each row is printed and appended to `out` as soon as it is there, and what fails is a row with its reason. Copy that file
to docs/step.jsonl, and `python bench/configs.py` makes docs/memory.md's table of it; of a row's repeats the last counts.

The ceilings come first: one large product in bf16 and in e4m3, and a large copy, read and write. A step is train.py's on
random tiles, without weights, saves and BACH. Its time is that of the run's second half, by the last row of
metrics.jsonl, so it includes data loading and leaves out compilation. Its share of the ceiling is that of the bf16
product, in the matrix products that bench/budget.py counts. "Plain" losses are written as one would write them down.
"""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import benchmark

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import fp8
import model
import sources
from bench import budget
from configurator import configure
from prepare.stats import train_config

out = "out/step.jsonl"
only = ""             # measure rows with this in their name; "" = all
device = "cuda"
steps = 30            # of a run of train.py; the second half is timed
limit = 510           # seconds for everything; a run that is not done by then is a row without a time
commit = "unknown"    # for the table's heading; the GPU's machine may have no git

TRAIN = {  # row: train.py's command line; batches are the configs'
    "vitg compiled bf16": "config/vitg.py", "vitg compiled fp8": "config/vitg.py --fp8=on",
    "vitg eager bf16": "config/vitg.py --compile=false", "vithplus compiled bf16": "config/vithplus.py",
    "vit7b, 8 blocks, bf16": "config/vit7b.py --depth=8 --fp8=off", "vit7b, 8 blocks, fp8": "config/vit7b.py --depth=8"}
BEFORE = {"product in bf16": "TFLOP/s", "product in e4m3": "TFLOP/s", "copy": "GB/s", "augment": "ms", "losses": "ms",
          "losses, plain": "ms"}
UNITS = BEFORE | dict.fromkeys(TRAIN, "ms")
GOALS = {"augment": 5, "vitg compiled bf16": 450, "vitg eager bf16": 500, "vithplus compiled bf16": 360}  # at most
RATIOS = {  # row: (slower row, faster row, at least)
    "losses, gain": ("losses, plain", "losses", 2.5), "vitg, gain of fp8": (*list(TRAIN)[:2], 1.2),
    "vit7b, gain of fp8": (*list(TRAIN)[-2:], 1.3)}
TOY = ("--arch=toy --depth=1 --batch_size=2 --global_px=56 --local_px=28 --local_crops=2 --rope_rescale=0 --workers=0 "
       "--compile=false --fp8=off --dino_prototypes=64 --ibot_prototypes=64")
SCRIPT = """
import runpy
import checkpoint
checkpoint.export = checkpoint.Saver.save = lambda *args: None  # ViT-g would write 24 GB
runpy.run_path("train.py", run_name="__main__")
"""


# ---- what is measured -----------------------------------------------------------------------------------------------


def seconds(function):
    return benchmark.Timer("function()", globals={"function": function}).blocked_autorange().median


def ceiling(name):
    size = 8192 if device == "cuda" else 64
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    if name == "copy":
        return {"value": 4e-9 * size**2 / seconds(lambda: a.copy_(b))}
    product = (lambda: a @ b.t()) if name == "product in bf16" else (lambda: fp8.e4m3_product(a8, b8))
    return {"value": 2e-12 * size**3 / seconds(product)}


def command_line(flags, folder):
    toy = TOY.split() if device == "cpu" else ["--workers=8"]
    run = f"--max_steps={steps} --log_interval={steps // 2} --save_interval=0 --out_dir={folder}/run".split()
    return [*flags.split(), "--slides=", f"--tiles={folder}/tiles", "--weights=", "--bach_dir=", f"--device={device}",
            *run, *toy]


def augment(folder):
    """Of a batch of vitg.py, copied to the device from pinned memory."""
    config = train_config(command_line("config/vitg.py", folder))
    dataset = data.Batches(sources.open_source(config), config, config["global_px"] // 14)
    batch = next(iter(data.loader(dataset, range(1), 0, device)))

    def both():
        for kind in ("global", "local"):
            data.augment(batch[f"{kind}_crops"], batch[f"{kind}_colour"], config, device)
    return {"value": 1000 * seconds(both)}


def plain_sinkhorn(logits, temp, iterations=3):
    """SwAV, algorithm 1, as it is printed: the matrix itself is normalised, by prototypes and by samples."""
    q = (logits.float() / temp).exp()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def plain_cross_entropy(logits, targets, temp):
    return -(targets * F.log_softmax(logits.float() / temp, dim=-1)).sum(-1)


def losses(name):
    """Targets, cross-entropy and its gradient at the masked patches of a ViT-g's batch."""
    rows, prototypes = (3379, 131072) if device == "cuda" else (16, 64)
    logits = torch.rand(2, rows, prototypes, device=device).bfloat16() * 2 - 1
    plain = name == "losses, plain"
    sinkhorn = plain_sinkhorn if plain else model.sinkhorn
    cross_entropy = plain_cross_entropy if plain else model.cross_entropy

    def both():
        student = logits[1].detach().requires_grad_()
        cross_entropy(student, sinkhorn(logits[0], 0.07), 0.1).mean().backward()
    found = {"value": 1000 * seconds(both)}
    return found if plain else found | {"gb": 36e-9 * rows * prototypes}  # 24 bytes per logit by sinkhorn (counted), 12


def train(flags, folder, left):
    """A run of train.py that may take `left` seconds. What happens after the last step's row takes nothing from it."""
    argv, began = command_line(flags, folder), time.time()
    planned = budget.estimate(train_config(argv), 1)
    found = {"dry_run_gb": planned["memory_gb"], "tflop": planned["tflop"], "images": planned["images"]}
    rmtree(f"{folder}/run", ignore_errors=True)
    with open(f"{folder}/log", "w") as log:
        run = subprocess.Popen([sys.executable, "-c", SCRIPT, *argv], cwd=ROOT, stdout=log, stderr=log,
                               start_new_session=True)
        try:
            run.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            log.write(f"no time left after {time.time() - began:.0f} s\n")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # its workers too
    rows = Path(folder, "run/metrics.jsonl")
    last = json.loads(rows.read_text().splitlines()[-1]) if rows.exists() else {"step": 0}
    if last["step"] == steps:
        measured = {k: last[k] for k in ("images_per_s", "data_wait", "peak_gb") if k in last}
        return found | {"value": 1000 * planned["images"] / last["images_per_s"], **measured}
    said = Path(folder, "log").read_text().strip()
    return found | {"why": "out of memory" if "OutOfMemory" in said else (said.splitlines() or ["it ended"])[-1]}


# ---- rows and their table -------------------------------------------------------------------------------------------


def record(name, function, *arguments):
    try:
        row = function(*arguments)
    except Exception as e:  # of any kind: the rows after it must still come
        row = {"why": "out of memory" if "out of memory" in str(e) else f"{type(e).__name__}: {e}".splitlines()[0]}
    with open(out, "a") as file:
        file.write(json.dumps({"row": name, **row}) + "\n")
    print(name, row, flush=True)


def read(path):
    """{name: row} of a file of rows; none where there is no file."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = map(json.loads, lines)
    return {row["row"]: row for row in rows}


def share(row, rows):
    """How much of the machine's ceiling a row reaches, as text."""
    for work, name in (("tflop", "product in bf16"), ("gb", "copy")):
        top = rows.get(name, {}).get("value")
        if top and work in row and "value" in row:
            return f"{100 * row[work] / (row['value'] / 1000) / top:.0f} %"
    return ""


def table(rows):
    """docs/memory.md's table of {name: row}; what is not measured is empty."""
    machine = rows.get("machine")
    heading = "{gpu}, torch {torch}, commit {commit}:".format(**machine) if machine else "Nothing is measured yet:"
    lines = [heading, "", "| row | measured | goal | of the ceiling | peak GB | dry run GB |", "|---" * 6 + "|"]
    for name, unit in UNITS.items():
        row = rows.get(name, {})
        measured = f"{row['value']:.3g} {unit}" if "value" in row else row.get("why", "")
        goal = f"<= {GOALS[name]} {unit}" if name in GOALS else ""
        held = [f"{row[key]:.1f}" if key in row else "" for key in ("peak_gb", "dry_run_gb")]
        lines.append(" | ".join([f"| {name}", measured, goal, share(row, rows), *held]) + " |")
    for name, (slower, faster, least) in RATIOS.items():
        pair = [rows.get(side, {}).get("value") for side in (slower, faster)]
        gain = f"{pair[0] / pair[1]:.2f} x" if all(pair) else ""
        lines.append(f"| {name} | {gain} | >= {least:.2f} x | | | |")
    return "\n".join(lines)


def main(folder):
    began = time.time()
    os.makedirs(Path(out).parent, exist_ok=True)
    os.makedirs(f"{folder}/tiles")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(f"{folder}/tiles/{i:02d}.jpg")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "a CPU at toy sizes"
    record("machine", dict, {"gpu": gpu, "torch": torch.__version__, "commit": commit})
    for name in BEFORE:
        if only in name:
            function = augment if name == "augment" else losses if "losses" in name else ceiling
            record(name, function, folder if name == "augment" else name)
    if device == "cuda":
        torch.cuda.empty_cache()
    for name, flags in TRAIN.items():
        if only in name:
            record(name, train, flags, folder, limit - (time.time() - began))
    print("\n" + table(read(out)))


if __name__ == "__main__":
    import tempfile
    configure(globals())
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
