"""
Speed and memory of training steps on one GPU, as train.py makes them: the rows of docs/memory.md's table.

    python bench/step.py                     # all cases; each is a run of train.py on random tiles
    python bench/step.py --case=vitg         # one of them
    python bench/step.py --device=cpu --case=tiny --steps=4     # only shows that it runs

The first line has the machine's ceilings: one large product in bf16 and in e4m3, and a copy. Speed is that of the last
row of metrics.jsonl, so it includes data loading and logging, and leaves out the compilation in the first steps.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils import benchmark

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fp8
from bench import budget
from configurator import configure
from prepare.stats import train_config

case = ""            # one of vitg, vithplus, vit7b (8 of its blocks) and tiny; "" = the first three
modes = ("eager bf16", "compiled bf16", "eager fp8", "compiled fp8")
size = 8192          # side of the ceilings' matrices
steps = 40           # the second half is timed
device = "cuda"

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"vitg": ["config/vitg.py"], "vithplus": ["config/vithplus.py"], "vit7b": ["config/vit7b.py", "--depth=8"],
         "tiny": ["config/toy.py", "--batch_size=4", "--global_px=56", "--local_px=28"]}
TRAIN = """
import runpy
import checkpoint
checkpoint.export = checkpoint.Saver.save = lambda *args: None  # ViT-g would write 24 GB
runpy.run_path("train.py", run_name="__main__")
"""


def seconds(function):
    return benchmark.Timer("function()", globals={"function": function}).blocked_autorange().median


def print_ceilings():
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    bf16 = 2e-12 * size**3 / seconds(lambda: a @ b.t())
    e4m3 = 2e-12 * size**3 / seconds(lambda: fp8.e4m3_product(a8, b8))
    copy = 4e-12 * size**2 / seconds(lambda: a.copy_(b))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: products of {size} in bf16 {bf16:.0f}, in e4m3 "
          f"{e4m3:.0f} TFLOP/s, copies {copy:.2f} TB/s\n")


def measure(case, mode, folder):
    """The table's row of one run of train.py. What happens after the last step's row takes nothing from it."""
    out = f"{folder}/run"
    shutil.rmtree(out, ignore_errors=True)
    flags = [*FLAGS[case], "--slides=", f"--tiles={folder}/tiles", "--weights=", "--bach_dir=", f"--device={device}",
             f"--max_steps={steps}", f"--log_interval={steps // 2}", "--save_interval=0", f"--out_dir={out}",
             f"--compile={'compiled' in mode}", f"--fp8={'force' if 'fp8' in mode else 'off'}"]
    planned = budget.estimate(train_config(flags), 1)
    run = subprocess.run([sys.executable, "-c", TRAIN, *flags], cwd=ROOT, capture_output=True, text=True)
    metrics = Path(out, "metrics.jsonl")
    row = json.loads(metrics.read_text().splitlines()[-1]) if metrics.exists() else {"step": 0}
    if row["step"] < steps:
        why = "out of memory" if "OutOfMemory" in run.stderr else (run.stdout + run.stderr).strip().splitlines()[-1]
        return f"| {case} | {mode} | {why} | | | | | {planned['memory_gb']:.1f} |"
    config = json.loads(Path(out, "config.json").read_text())
    step = config["batch_size"] / row["images_per_s"]
    return (f"| {case} | {mode} | {config['activation_checkpointing']} | {step:.3f} | {row['images_per_s']:.1f} | "
            f"{100 * planned['tflop'] / step / 989:.0f} % | {row.get('peak_gb', '')} | {planned['memory_gb']:.1f} |")


if __name__ == "__main__":
    configure(globals())
    if device == "cuda":
        print_ceilings()
    print("| case | mode | checkpointing | s per step | images/s | MFU | peak GB | dry run GB |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tiles").mkdir()
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(f"{folder}/tiles/{i:02d}.jpg")
        for name in [case] if case else ("vitg", "vithplus", "vit7b"):
            for mode in modes:
                print(measure(name, mode, folder), flush=True)
