"""
What a stack of blocks costs beside its own matrix products and attention: the rows of docs/memory.md's CPU table.

    python bench/blocks.py                  process time on one core, over that of products and attention alone
    python bench/blocks.py --task=host      ms of Python per step of a ViT-g whose tensors are tiny
    python bench/blocks.py --task=traffic   GB that elementwise work of a ViT-g step moves, counted on meta tensors

A time is the smallest of `repeats` rounds in which all rows take turns: trust the ratios. glibc maps tensors of more
than 32 MB anew each time, and rows pay for page faults that no GPU has. MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=17179869184, set before the start, leave them out.
"""
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import sharding
from configurator import configure

task = "time"      # or "host", "traffic"
depth = 12         # blocks of width 384
images = 8         # with 2 crops of 257 tokens and 8 of 50 each
repeats = 6

aten = torch.ops.aten
FREE = sharding.PRODUCTS | {aten.convolution.default, aten.convolution_backward.default, aten.detach.default,
                            aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}


def products_alone(arch, shapes):
    """Forward and backward of a stack's matrix products and attention at the kept crops; results are thrown away."""
    kept = model.draw_kept(shapes, arch.drop_path, "cpu")[1]
    D, hidden, T = arch.embed_dim, arch.ffn_hidden, sum(B * N for B, N in kept)
    sizes = [(D, 3 * D), (D, D), (D, hidden), (hidden, D)]
    layers = [[torch.randn(*size) for size in ((T, i), (o, i), (o,), (T, o))] for i, o in sizes]
    heads = [torch.randn(3, B, arch.num_heads, N, D // arch.num_heads) for B, N in kept]

    def run():
        for _ in range(arch.depth):
            for x, weight, bias, grad in layers:
                torch.addmm(bias, x, weight.t())
                grad @ weight
                grad.t() @ x
            for q, k, v in heads:
                out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
                aten._scaled_dot_product_flash_attention_for_cpu_backward(out, q, k, v, out, sums, 0.0, False)
    return run


def stack(arch, shapes, mode="none"):
    """A step of the blocks alone: drop path's draws, forward and backward."""
    blocks = model.ViT(arch).blocks
    sharding.checkpoint_activations(blocks, mode)
    x = torch.randn(sum(B * N for B, N in shapes), arch.embed_dim, requires_grad=True)

    def run():
        out = x
        for block in blocks:
            kept = [model.draw_kept(shapes, arch.drop_path, "cpu") if arch.drop_path else None for _ in range(2)]
            out = block(out, shapes, [None] * len(shapes), kept)
        out.backward(x.detach())
        blocks.zero_grad()
    return run


def step(nets, crops):
    """What a step does with the backbones: the teacher's forward, the student's forward and backward."""
    with torch.no_grad():
        nets["teacher"](crops[0])
    outs = nets["student"](crops)
    tensors = [out[key] for out in outs for key in ("cls", "patches")]
    torch.autograd.backward(tensors, [torch.empty_like(t) for t in tensors])
    nets["student"].zero_grad()


def tiny(mesh, mode="none"):
    """A step of 40 blocks in which Python is all that takes time; `mesh` None leaves FSDP2 out."""
    arch = replace(model.ARCHS["dinov2_vitg14_reg"], embed_dim=16, num_heads=1, ffn_hidden=16, pos_grid=2)
    nets = {"student": model.ViT(replace(arch, drop_path=0.4)), "teacher": model.ViT(arch).requires_grad_(False).eval()}
    sharding.checkpoint_activations(nets["student"].blocks, mode)
    for name, net in nets.items() if mesh else ():
        sharding.shard(torch.nn.ModuleDict({"backbone": net}), mesh, bf16=False, trained=name == "student")
    return partial(step, nets, [torch.randn(4, 3, 28, 28), torch.randn(16, 3, 14, 14)])


class Traffic(TorchDispatchMode):
    """
    Counts bytes that elementwise operations read and write: all their inputs and outputs, but of gathers and scatters
    only the rows that move. Matrix products, attention and convolutions are left out.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        moved = tree_leaves((args, kwargs, out))
        if op in (aten.index.Tensor, aten.index_select.default):
            moved = [out, out]
        if op is aten.index_copy.default:
            moved = [out, out, args[3], args[3]]
        if not op.is_view and op not in FREE:
            self.bytes += sum(held(t) for t in moved if torch.is_tensor(t))
        return out


def held(t):
    """Bytes of a tensor, expanded dimensions once."""
    return t.element_size() * torch.Size(n for n, stride in zip(t.shape, t.stride()) if stride or n == 0).numel()


class Attention(torch.autograd.Function):
    """Attention's results with the strides of flash kernels; meta tensors would take the formula apart."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        return (grad.new_empty(grad.transpose(1, 2).shape).transpose(1, 2),) * 3


def traffic(mode):
    """GB of a step of vitg.py's backbones in bf16; heads, losses and optimizer are left out."""
    torch.set_default_dtype(torch.bfloat16)
    F.scaled_dot_product_attention = Attention.apply
    arch = replace(model.ARCHS["dinov2_vitg14_reg"], pos_grid=16)
    with torch.device("meta"):
        nets = {"student": model.ViT(replace(arch, drop_path=0.4)), "teacher": model.ViT(arch).eval()}
        crops = [torch.empty(96, 3, 224, 224), torch.empty(384, 3, 98, 98)]
    sharding.checkpoint_activations(nets["student"].blocks, mode)
    with Traffic() as count:
        step(nets, crops)
    return count.bytes / 1e9


def best_times(sides):
    """{name: seconds of process time}: the least of `repeats` rounds of {name: function}, after one that warms up."""
    best = dict.fromkeys(sides, float("inf"))
    for i in range(repeats + 1):
        for name, function in sides.items():
            start = time.process_time()
            function()
            if i:
                best[name] = min(best[name], time.process_time() - start)
    return best


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}")
    if task == "traffic":
        print({mode: round(traffic(mode)) for mode in sharding.CHECKPOINTING})
    elif task == "host":
        mesh = sharding.begin("cpu")
        sides = {"plain": tiny(None)} | {f"FSDP2, {mode}": tiny(mesh, mode) for mode in sharding.CHECKPOINTING}
        for name, seconds in best_times(sides).items():
            print(f"{name:18} {1000 * seconds:5.0f} ms")
    else:
        shapes = [(2 * images, 257), (8 * images, 50)]
        for drop in (0.0, 0.4):
            arch = replace(model.ARCHS["dinov2_vits14"], depth=depth, drop_path=drop)
            sides = {mode: stack(arch, shapes, mode) for mode in sharding.CHECKPOINTING}
            found = best_times({"products alone": products_alone(arch, shapes), **sides})
            for name, seconds in found.items():
                print(f"drop path {drop}, {name:14} {seconds:6.2f} s {seconds / found['products alone']:6.3f}")
