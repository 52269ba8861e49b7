"""
What the BACH probe costs on one core: five heads side by side against five nn.Linear, one after the other.

    python bench/probe.py                  # two minutes; process time, the least of several, both sides interleaved

Early stopping is switched off: a probe that stops is cheaper. The straight loop is timed over fewer steps, per step.
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_bach
from configurator import configure

width = 1536         # of ViT-g's class token
steps = 12_500       # of a whole probe
loop_steps = 500     # of the straight loop, all five heads
repeats = 2

SPLIT = eval_bach.LABELS, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX


def straight_loop(features, steps):
    """eva's probe as one would write it down, five times; returns the balanced accuracies after each epoch."""
    labels, train, val = SPLIT
    x, y, x_val, y_val = features[train], labels[train], features[val], labels[val]
    balanced = []
    for seed in range(eval_bach.RUNS):
        torch.manual_seed(eval_bach.SEED + seed)
        head = torch.nn.Linear(features.shape[1], 4)
        optimizer = torch.optim.AdamW(head.parameters(), lr=eval_bach.LR)
        for _ in range(steps // 2):
            for batch in torch.randperm(len(x)).split(eval_bach.BATCH):
                optimizer.zero_grad()
                F.cross_entropy(head(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                balanced.append(eval_bach.balanced_accuracy(head(x_val).argmax(1)[None], y_val).item())
    return balanced


def timed(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    eval_bach.PATIENCE = steps
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, width, generator=g), dim=1)
    features = torch.randn(400, width, generator=g) + 4 * centres[eval_bach.LABELS]
    ours, loop = [], []
    for _ in range(repeats):
        loop.append(timed(straight_loop, features, loop_steps))
        ours.append(timed(eval_bach.probe, features, *SPLIT, eval_bach.RUNS, eval_bach.SEED, steps))
    whole = min(loop) * steps / loop_steps
    print(f"{eval_bach.RUNS} heads x {steps} steps at width {width}, one core: {min(ours):.1f} s; straight loop "
          f"{whole:.1f} s from {loop_steps} steps; {whole / min(ours):.1f} x")
