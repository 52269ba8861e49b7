"""
Time and memory of training steps on one GPU, against that GPU's own ceilings and the goals.

    python bench/step.py --commit=$(git rev-parse --short HEAD)    # all rows, in less than 9 minutes
    python bench/step.py --only=fp8                                # rows with fp8 in their name
    python bench/step.py --device=cpu --out=out/step_cpu.jsonl     # toy sizes: only shows that it runs

Each row is printed and appended to `out` as soon as it is measured; what fails is a row with its reason. Copy the file
to docs/step.jsonl: bench/configs.py makes docs/memory.md's table of it. Of rows with one name the last counts.

Ceilings come first: a large product in bf16 and in e4m3, a large copy (read and write). A step is one of train.py on
random tiles, without weights, saves and BACH, timed by its last row of metrics.jsonl: the run's second half, data
included, compilation not. Its share of the ceiling is that of the bf16 product, in the products that bench/budget.py
counts. Plain losses are those that one would write down first.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import benchmark

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import fp8
import model
import sources
from bench import budget
from configurator import configure
from prepare.stats import train_config

out = "out/step.jsonl"
only = ""            # measure rows with this in their name; "" = all
device = "cuda"
steps = 24           # of a run of train.py; the second half is timed
limit = 510          # seconds for all rows, a third of it for one; what is not done by then has no time
commit = "unknown"   # for the table's heading; the GPU's machine may have no git

ROOT = Path(__file__).resolve().parent.parent
UNITS = {"product in bf16": "TFLOP/s", "product in e4m3": "TFLOP/s", "copy": "GB/s", "augment": "ms", "losses": "ms",
         "plain losses": "ms"}
TRAIN = {  # row: train.py's command line
    "vitg bf16": "config/vitg.py",
    "vitg fp8": "config/vitg.py --fp8=on",
    "vitg bf16, eager": "config/vitg.py --compile=false",
    "vithplus bf16": "config/vithplus.py",
    "vit7b bf16, 8 blocks": "config/vit7b.py --depth=8 --fp8=off",
    "vit7b fp8, 8 blocks": "config/vit7b.py --depth=8"}
GOALS = {"augment": 5, "vitg bf16": 450, "vitg bf16, eager": 500, "vithplus bf16": 360}  # ms at most
GAINS = [("plain losses", "losses", 2.5), ("vitg bf16", "vitg fp8", 1.2),
         ("vit7b bf16, 8 blocks", "vit7b fp8, 8 blocks", 1.3)]  # slower, faster, times at least
TOY = """--arch=toy --depth=1 --batch_size=2 --global_px=56 --local_px=28 --local_crops=2 --rope_rescale=0 --fp8=off
--compile=false --workers=0 --dino_prototypes=64 --ibot_prototypes=64 --dino_hidden=64 --ibot_hidden=64"""
SCRIPT = """
import runpy
import checkpoint
checkpoint.export = checkpoint.Saver.save = lambda *args: None  # ViT-g would write 24 GB
runpy.run_path("train.py", run_name="__main__")
"""


# ---- what is measured -----------------------------------------------------------------------------------------------


def seconds(function):
    return benchmark.Timer("function()", globals={"function": function}).blocked_autorange().median


def ceiling(name, folder):
    size = 8192 if device == "cuda" else 64
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    if name == "copy":
        return {"value": 4e-9 * size**2 / seconds(lambda: a.copy_(b))}
    product = (lambda: a @ b.t()) if name == "product in bf16" else (lambda: fp8.e4m3_product(a8, b8))
    return {"value": 2e-12 * size**3 / seconds(product)}


def command_line(flags, folder):
    more = f"""--slides= --tiles={folder}/tiles --weights= --bach_dir= --device={device} --max_steps={steps} --workers=8
    --log_interval={steps // 2} --save_interval=0 --out_dir={folder}/run {TOY if device == "cpu" else ""}"""
    return f"{flags} {more}".split()


def augment(name, folder):
    """Of vitg.py's batch, from pinned memory."""
    config = train_config(command_line("config/vitg.py", folder))
    dataset = data.Batches(sources.open_source(config), config, config["global_px"] // 14)
    batch = next(iter(data.loader(dataset, range(1), 0, device)))

    def both():
        for kind in ("global", "local"):
            data.augment(batch[f"{kind}_crops"], batch[f"{kind}_colour"], config, device)
    return {"value": 1000 * seconds(both)}


def plain_sinkhorn(logits, temp):
    """SwAV, algorithm 1, as it is printed: the matrix itself is normalised, by prototypes and by samples."""
    q = (logits.float() / temp).exp()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def plain_cross_entropy(logits, targets, temp):
    return -(targets * F.log_softmax(logits.float() / temp, dim=-1)).sum(-1)


def losses(name, folder):
    """Targets, cross-entropy and its gradient at the masked patches of vitg.py's batch."""
    shape = (3379, 131072) if device == "cuda" else (16, 64)
    logits = torch.rand(2, *shape, device=device).bfloat16() * 2 - 1
    sinkhorn, cross_entropy = model.sinkhorn, model.cross_entropy
    if name == "plain losses":
        sinkhorn, cross_entropy = plain_sinkhorn, plain_cross_entropy

    def both():
        student = logits[1].detach().requires_grad_()
        cross_entropy(student, sinkhorn(logits[0], 0.07), 0.1).mean().backward()
    return {"value": 1000 * seconds(both)}


def run(argv, folder, left):
    """Run train.py, for `left` seconds at most. Returns its last row and the last line that it said."""
    shutil.rmtree(f"{folder}/run", ignore_errors=True)
    with open(f"{folder}/log", "w") as log:
        command = [sys.executable, "-c", SCRIPT, *argv]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            log.write(f"\nno time left, {left:.0f} s were")
        finally:  # after a Ctrl-C, too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and its workers
                process.wait()
    text, metrics = Path(folder, "log").read_text(), Path(folder, "run/metrics.jsonl")
    said = "out of memory" if "OutOfMemory" in text else (text.strip() or "nothing").splitlines()[-1]
    return json.loads(metrics.read_text().splitlines()[-1]) if metrics.exists() else {"step": 0}, said


def train(name, folder, left):
    """What happens after the last step's row takes nothing from it."""
    argv = command_line(TRAIN[name], folder)
    planned = budget.estimate(train_config(argv), 1)
    row = {"tflop": planned["tflop"], "images": planned["images"], "dry_run_gb": planned["memory_gb"]}
    last, said = run(argv, folder, left)
    if last["step"] < steps:
        return row | {"why": said}
    row |= {key: last[key] for key in ("data_wait", "peak_gb") if key in last}
    return row | {"value": 1000 * planned["images"] / last["images_per_s"]}


# ---- rows and their table -------------------------------------------------------------------------------------------


def record(name, function, *arguments):
    try:
        row = function(*arguments)
    except Exception as e:  # of any kind: the rows after it must still come
        row = {"why": f"{type(e).__name__}: {e}".splitlines()[0]}
    with open(out, "a") as file:
        file.write(json.dumps({"row": name, **row}) + "\n")
    print(name, row, flush=True)


def read(path):
    """{name: row} of a file of rows; {} without one."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["row"]: row for row in rows}


def table(rows):
    """The table of {name: row}. What is not measured is empty."""
    lines = ["Nothing is measured yet:"]
    if "machine" in rows:
        lines = ["{gpu}, torch {torch}, commit {commit}:".format(**rows["machine"])]
    lines += ["", "| row | measured | goal | of the ceiling | peak GB | dry run GB |", "|---" * 6 + "|"]
    top = rows.get("product in bf16", {}).get("value")
    for name in (*UNITS, *TRAIN):
        row, unit = rows.get(name, {}), UNITS.get(name, "ms")
        measured, share = row.get("why", ""), ""
        if "value" in row:
            measured = f"{row['value']:.3g} {unit}"
        if "value" in row and "tflop" in row and top:
            share = f"{100 * row['tflop'] / (row['value'] / 1000) / top:.0f} %"
        goal = f"<= {GOALS[name]} {unit}" if name in GOALS else ""
        peak, planned = [f"{row[key]:.1f}" if key in row else "" for key in ("peak_gb", "dry_run_gb")]
        lines.append(f"| {name} | {measured} | {goal} | {share} | {peak} | {planned} |")
    for slower, faster, least in GAINS:
        pair = [rows.get(name, {}).get("value") for name in (slower, faster)]
        gain = f"{pair[0] / pair[1]:.2f} x" if all(pair) else ""
        lines.append(f"| {slower} over {faster} | {gain} | >= {least:.2f} x | | | |")
    return "\n".join(lines)


def main(folder):
    end = time.time() + limit
    os.makedirs(Path(out).parent, exist_ok=True)
    os.makedirs(f"{folder}/tiles")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(f"{folder}/tiles/{i:02d}.jpg")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "a CPU at toy sizes"
    record("machine", dict, {"gpu": gpu, "torch": torch.__version__, "commit": commit})
    kinds = {"augment": augment, "losses": losses, "plain losses": losses}
    for name in UNITS:
        if only in name:
            record(name, kinds.get(name, ceiling), name, folder)
    torch.cuda.empty_cache()  # the runs have processes of their own
    for name in TRAIN:
        if only in name:
            record(name, train, name, folder, min(end - time.time(), limit / 3))
    print("\n" + table(read(out)))


if __name__ == "__main__":
    configure(globals())
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
