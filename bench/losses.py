"""
Time of teacher targets, cross-entropy and its gradient at the masked patches: model.py's functions against the same
loss as one would write it down (Sinkhorn's matrix rescaled in place, log_softmax under autograd).

    python bench/losses.py                          # a minute on a CPU: process time of one thread
    python bench/losses.py --device=cuda --rows=3379 --prototypes=131072       # ViT-g's: wall time and peak memory
Both sides take turns; each time is the least of `repeats`.
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure

rows, prototypes = 256, 32768
repeats = 9
device = "cpu"  # logits are in fp32 there, in bf16 on "cuda"
teacher_temp, student_temp = 0.07, 0.1


def plain_sinkhorn(logits, temp, iterations=3):
    """SwAV, algorithm 1, as it is printed: the matrix itself is normalised, by prototypes and by samples."""
    q = (logits.float() / temp).exp()
    B, K = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0)
        q /= K
        q /= q.sum(1, keepdim=True)
        q /= B
    q *= B
    return q


def plain_cross_entropy(logits, targets, temp):
    return -(targets * F.log_softmax(logits.float() / temp, dim=-1)).sum(-1)


def gradient(sinkhorn, cross_entropy, teacher, student, weights):
    """The gradient (M, K) of the weighted loss by the student's logits."""
    x = student.detach().requires_grad_()
    targets = sinkhorn(teacher, teacher_temp).detach()
    loss = (cross_entropy(x, targets, student_temp) * weights).sum()
    del targets
    loss.backward()
    return x.grad


def sides(teacher, student, weights):
    """{name: function to time}; both kinds of "total" return the gradient."""
    logits = teacher, student, weights
    return {"sinkhorn, plain": lambda: plain_sinkhorn(teacher, teacher_temp),
            "sinkhorn": lambda: model.sinkhorn(teacher, teacher_temp),
            "total, plain": lambda: gradient(plain_sinkhorn, plain_cross_entropy, *logits),
            "total": lambda: gradient(model.sinkhorn, model.cross_entropy, *logits)}


def clock():
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function):
    start = clock()
    function()
    return clock() - start


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = []
    for _ in ("teacher", "student"):  # as a head's: cosines between random directions of 64 dimensions
        x, w = (F.normalize(torch.randn(n, 64, device=device), dim=1) for n in (rows, prototypes))
        logits.append((x @ w.T).to(torch.float32 if device == "cpu" else torch.bfloat16))
    functions = sides(*logits, torch.rand(rows, device=device))
    rounds = [{name: seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    print(f"torch {torch.__version__}, {device}, {rows} x {prototypes}")
    for name, function in functions.items():
        text = f"{name:16}{1000 * min(times[name] for times in rounds):8.1f} ms"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            text += f", {(torch.cuda.max_memory_allocated() - before) / 1e9:6.2f} GB at the peak beside the logits"
        print(text)
