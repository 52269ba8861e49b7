"""
Teacher targets, cross-entropy and its gradient at the masked patches: model.py's against the loss as one would write it
down (the matrix of Sinkhorn rescaled in place, log_softmax under autograd).

    python bench/losses.py                          # a minute; process time, one thread, least of several, interleaved
    python bench/losses.py --device=cuda --rows=3379 --prototypes=131072       # wall time, bf16 logits, measured memory

The second table is counted, not timed: the same code runs on tensors without data (meta), at ViT-g's masked patches of
48 images in bf16, through a cache of cache_mb. Peak is what it allocates beside the two logits, which come first.
"""
import sys
import time
from collections import OrderedDict
from pathlib import Path
from weakref import finalize

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure

rows, prototypes = 256, 32768             # that are timed
full_rows, full_prototypes = 3379, 131072  # that are counted
cache_mb = 32     # last-level cache of the machine in mind; an H100 has 50
repeats = 9
device = "cpu"
teacher_temp, student_temp = 0.07, 0.1


# ---- the loss as one would write it down ----------------------------------------------------------------------------


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


def sides(teacher, student, weights):
    """{name: what to time}; both kinds of "total" return the gradient (M, K) of the student's logits."""
    def total(sinkhorn, cross_entropy):
        x = student.detach().requires_grad_()
        with torch.no_grad():
            targets = sinkhorn(teacher, teacher_temp)
        loss = (cross_entropy(x, targets, student_temp) * weights).sum()
        del targets
        loss.backward()
        return x.grad
    return {"sinkhorn, plain": lambda: plain_sinkhorn(teacher, teacher_temp),
            "sinkhorn": lambda: model.sinkhorn(teacher, teacher_temp),
            "total, plain": lambda: total(plain_sinkhorn, plain_cross_entropy),
            "total": lambda: total(model.sinkhorn, model.cross_entropy)}


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """
    Bytes that operations allocate and move, on any device, meta included. `peak`: most bytes of new storages alive at
    once. `moved`: bytes between memory and a least-recently-used cache of whole tensors (views); what is freed before
    its turn to be evicted was never written.
    """

    def __init__(self, cache):
        super().__init__()
        self.cache, self.held, self.lines = cache, 0, OrderedDict()  # (storage, start, elements) -> (bytes, dirty)
        self.live, self.peak, self.moved = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        storages = {t.untyped_storage()._cdata for t in known}
        for t in (t for t in made if t.untyped_storage()._cdata not in storages):
            self.allocate(t.untyped_storage())
        name, written = func.__name__.split(".")[0], {id(t) for t in made}
        if any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns) or "empty" in name:
            return out  # a view, or memory as it is: nothing is read or written
        for t in known if "new_" not in name else ():
            self.touch(t, read=id(t) not in written or name.endswith("_"), write=False)  # out=... is not read
        for t in made:
            self.touch(t, read=False, write=True)
        return out

    def allocate(self, storage):
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, storage, size):
        self.live -= size
        for line in [k for k in self.lines if k[0] == storage]:
            self.held -= self.lines.pop(line)[0]

    def touch(self, t, read, write):
        line, size = (t.untyped_storage()._cdata, t.storage_offset(), t.numel()), t.numel() * t.element_size()
        known, dirty = self.lines.pop(line, (0, False))
        self.moved += size if read and not known else 0
        self.held += size - known
        self.lines[line] = (size, dirty or write)
        while self.held > self.cache:
            self.evict()

    def evict(self):
        size, dirty = self.lines.popitem(last=False)[1]
        self.held -= size
        self.moved += size * dirty


def counted(rows, prototypes, cache):
    """{name: (bytes moved, peak bytes beside the logits)} of sides() with bf16 logits of that size; no data needed."""
    logits = [torch.empty(rows, prototypes, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    found = {}
    for name, side in sides(*logits, torch.empty(rows, device="meta")).items():
        with Traffic(cache) as traffic:
            result = side()
        while traffic.lines:
            traffic.evict()
        found[name] = (traffic.moved, traffic.peak)
        del result
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


def clock():
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def fastest(sides):
    """{name: seconds}, least of `repeats` interleaved rounds."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, side in sides.items():
            start = clock()
            side()
            best[name] = min(best[name], clock() - start)
    return best


def cosines(g, dtype):
    """Logits (rows, prototypes) as a head's: cosines between random directions of 64 dimensions."""
    x, w = (F.normalize(torch.randn(n, 64, generator=g, device=device), dim=1) for n in (rows, prototypes))
    return (x @ w.T).to(dtype)


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    both = sides(cosines(g, dtype), cosines(g, dtype), torch.rand(rows, generator=g, device=device))
    seconds = fastest(both)
    print(f"torch {torch.__version__}, {device}, {rows} x {prototypes} in {str(dtype)[6:]}: ms plain, ours, ratio")
    for name in ("sinkhorn", "total"):
        a, b = seconds[f"{name}, plain"], seconds[name]
        print(f"{name:10} {1000 * a:8.1f} {1000 * b:8.1f} {a / b:6.2f}")
    if device != "cpu":
        for name, side in both.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side()
            print(f"{name:16} peak {(torch.cuda.max_memory_allocated() - before) / 1e9:6.2f} GB beside the logits")
    print(f"\n{full_rows} x {full_prototypes} in bfloat16, counted: GB moved, GB at the peak beside the logits")
    for name, (moved, peak) in counted(full_rows, full_prototypes, cache_mb * 1e6).items():
        print(f"{name:16} {moved / 1e9:6.1f} {peak / 1e9:6.2f}")
