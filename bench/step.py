"""
Training steps on one GPU, as train.py makes them: docs/memory.md's table of speed and memory, a row a case.

    python bench/step.py                     # all cases; each is a run of train.py on random tiles
    python bench/step.py --case=vitg        # one of them
    python bench/step.py --device=cpu --case=tiny --steps=4     # only shows that it runs

The first line has the ceilings of the same run: one large product in bf16 and in e4m3, and a copy. Speed is from the
last row of metrics.jsonl, so that data loading, logging and the first steps' compilation are in or out as in training.
"""
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fp8
from configurator import configure

case = ""            # one of vitg, vithplus, vit7b (8 of its blocks) and tiny; "" = the first three
modes = ("eager bf16", "compiled bf16", "eager fp8", "compiled fp8")
size = 8192          # side of the ceilings' matrices
steps = 40           # the second half is timed
device = "cuda"

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"vitg": ["config/vitg.py"], "vithplus": ["config/vithplus.py"], "vit7b": ["config/vit7b.py", "--depth=8"],
         "tiny": ["config/toy.py", "--batch_size=4", "--global_px=56", "--local_px=28"]}


def seconds(function):
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ceilings():
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    calls = [lambda: a @ b.t(), lambda: fp8.e4m3_product(a8, b8), lambda: a.copy_(b)]
    bf16, e4m3, copy = (min(seconds(f) for _ in range(20)) for f in calls)
    return 2e-12 * size**3 / bf16, 2e-12 * size**3 / e4m3, 4e-12 * size**2 / copy


def random_tiles(folder):
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(f"{folder}/{i:02d}.jpg")


def measure(case, mode, folder):
    flags = [*FLAGS[case], "--slides=", f"--tiles={folder}/tiles", "--weights=", "--bach_dir=", f"--device={device}",
             f"--max_steps={steps}", f"--log_interval={steps // 2}", "--save_interval=0", f"--out_dir={folder}/run",
             f"--compile={'compiled' in mode}", f"--fp8={'force' if 'fp8' in mode else 'off'}"]
    subprocess.run(["rm", "-rf", f"{folder}/run"])
    run = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    text = run.stdout + run.stderr
    planned = re.search(r"^total ([\d.]+)", text, re.M)
    planned = planned[1] if planned else "?"
    if run.returncode:
        why = "out of memory" if "OutOfMemory" in text else text.strip().splitlines()[-1]
        return f"| {case} | {mode} | {why} | | | | | {planned} |"
    row = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")][-1]
    config = json.load(open(f"{folder}/run/config.json"))
    tflop = float(re.search(r"([\d.]+) TFLOP a step", text)[1])
    s = config["batch_size"] / row["images_per_s"]
    return (f"| {case} | {mode} | {config['activation_checkpointing']} | {s:.3f} | {row['images_per_s']:.1f} | "
            f"{100 * tflop / s / 989:.0f} % | {row.get('peak_gb', '')} | {planned} |")


if __name__ == "__main__":
    configure(globals())
    if case not in ("", *FLAGS) or steps < 2:
        raise SystemExit(f"bench/step.py: case = {case!r}, steps = {steps}: one of {', '.join(FLAGS)}; 2 or more")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("bench/step.py: needs a GPU; --device=cpu --case=tiny shows that it runs")
        bf16, e4m3, copy = ceilings()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit.strip()}: products of {size} "
              f"in bf16 {bf16:.0f}, in e4m3 {e4m3:.0f} TFLOP/s, copies {copy:.2f} TB/s\n")
    print("| case | mode | checkpointing | s a step | images/s | MFU | peak GB | dry run GB |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tiles").mkdir()
        random_tiles(f"{folder}/tiles")
        for name in [case] if case else ("vitg", "vithplus", "vit7b"):
            for mode in modes:
                print(measure(name, mode, folder), flush=True)
