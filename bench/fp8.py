"""
What fp8 gains on a GPU: one block of each backbone, forward and backward, in bf16 and fp8, eager and compiled.

    python bench/fp8.py                    # on one GPU; both sides interleaved, the least of several

Tokens are those of a step's student in ViT-g at 48 images with drop path 0.4; speeds in TFLOP/s are of the linear
layers' and attention's products over the whole time. The first line has the ceilings of the same run: one large product
in either type. No GPU has run it yet. A CPU emulates e4m3; that the script runs is seen in a minute by
    python bench/fp8.py --device=cpu --tokens=522 --size=256 --repeats=1 --archs='("dinov2_vits14_reg",)'
"""
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fp8
import model
from configurator import configure

archs = ("dinov2_vits14_reg", "dinov2_vitl14_reg", "dinov3_vith16plus", "dinov2_vitg14_reg", "dinov3_vit7b16")
tokens = 27_144      # crops of 261 tokens: 256 patches, class token, four registers
size = 8192          # side of the matrices of the ceilings
repeats = 20
compiled = (False, True)
device = "cuda"


def seconds(function, *args):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def least(functions):
    """The least time of each function, called in turns; twice before the clock runs."""
    times = [[seconds(f) for f in functions] for _ in range(repeats + 2)][2:]
    return [min(column) for column in zip(*times)]


def step(block, x, shapes, ropes):
    block.zero_grad(set_to_none=True)
    y = block(x, shapes, ropes)
    y.backward(y)


def blocks(c, compile):
    """The same block in bf16 and in fp8."""
    plain = model.ViT(model.replace(c, depth=1, layerscale=1.0)).bfloat16()
    pair = [plain.blocks[0], fp8.to_fp8(copy.deepcopy(plain), force=True).blocks[0]]
    if compile:
        for block in pair:
            block.compile(fullgraph=True, dynamic=False)
    return pair


def compare(name, compile):
    c, n = model.ARCHS[name], 261
    x = torch.randn(tokens // n * n, c.embed_dim).bfloat16().requires_grad_()
    rope = model.Rope(c)(16, 16) if c.pos == "rope" else None
    calls = [lambda b=b: step(b, x, [(tokens // n, n)], [rope]) for b in blocks(c, compile)]
    bf16, in_fp8 = least(calls)
    linear = 8 * c.embed_dim**2 + (6 if c.ffn == "swiglu" else 4) * c.embed_dim * c.ffn_hidden
    tflop = 3 * len(x) * (linear + 4 * n * c.embed_dim) / 1e12
    print(f"{name:20} {'compiled' if compile else 'eager':8} bf16 {1e3 * bf16:7.2f} ms {tflop / bf16:4.0f} TFLOP/s, "
          f"fp8 {1e3 * in_fp8:7.2f} ms {tflop / in_fp8:4.0f} TFLOP/s, {bf16 / in_fp8:.2f} x", flush=True)


def ceilings():
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    times = least([lambda: a @ b.t(), lambda: fp8.e4m3_product(a8, b8), lambda: fp8.product(a, b)])
    speeds = [2 * size**3 / t / 1e12 for t in times]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, products of {size} x {size}: bf16 {speeds[0]:.0f}, e4m3 "
          f"{speeds[1]:.0f}, e4m3 with quantising (eager) {speeds[2]:.0f} TFLOP/s")


if __name__ == "__main__":
    configure(globals())
    if device == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        raise SystemExit("bench/fp8.py: needs a GPU with fp8 (Ada, Hopper or newer); --device=cpu shows that it runs")
    torch.manual_seed(0)
    torch.set_default_device(device)
    ceilings()
    for arch in archs:
        for mode in compiled:
            compare(arch, mode)
