"""
What fp8 gains on a GPU: one block of each backbone, forward and backward, in bf16 and fp8, eager and compiled.

    python bench/fp8.py                    # on one GPU; both sides take turns, each time is the least of several

The number of tokens is that of a student's step in ViT-g with 48 images and drop path 0.4. TFLOP/s count the products
of linear layers and attention over the whole time. The first line has the ceilings: one large product in each type. No
GPU has run it yet. A CPU, which emulates e4m3, shows in some minutes that the script runs:
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
size = 8192          # side of the ceilings' matrices
repeats = 20
compiled = (False, True)
device = "cuda"


def fastest(*functions):
    """The least time of each function in seconds. They take turns; two rounds warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = [float("inf")] * len(functions)
    for turn in range(repeats + 2):
        for i, function in enumerate(functions):
            wait()
            start = time.perf_counter()
            function()
            wait()
            if turn >= 2:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def compare(name, compile):
    arch, n = model.replace(model.ARCHS[name], depth=1, layerscale=1.0), 261
    x = torch.randn(tokens // n * n, arch.embed_dim).bfloat16().requires_grad_()
    rope = model.Rope(arch)(16, 16) if arch.pos == "rope" else None
    plain = model.ViT(arch).bfloat16()
    quantized = fp8.to_fp8(copy.deepcopy(plain), force=True)

    def step(block):
        block.zero_grad(set_to_none=True)
        y = block(x, [(tokens // n, n)], [rope])
        y.backward(y)

    for net in (plain, quantized) if compile else ():
        net.blocks[0].compile(fullgraph=True, dynamic=False)
    bf16, in_fp8 = fastest(lambda: step(plain.blocks[0]), lambda: step(quantized.blocks[0]))
    linear = 8 * arch.embed_dim**2 + (6 if arch.ffn == "swiglu" else 4) * arch.embed_dim * arch.ffn_hidden
    tflop = 3e-12 * len(x) * (linear + 4 * n * arch.embed_dim)
    print(f"{name:20} {'compiled' if compile else 'eager':8} bf16 {1e3 * bf16:7.2f} ms {tflop / bf16:4.0f} TFLOP/s, "
          f"fp8 {1e3 * in_fp8:7.2f} ms {tflop / in_fp8:4.0f} TFLOP/s, {bf16 / in_fp8:.2f} x", flush=True)


if __name__ == "__main__":
    configure(globals())
    if device == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        raise SystemExit("bench/fp8.py: needs a GPU with fp8 (Ada, Hopper or newer); --device=cpu shows that it runs")
    torch.manual_seed(0)
    torch.set_default_device(device)
    a, b = torch.randn(2, size, size).bfloat16()
    (a8, _), (b8, _) = fp8.quantize(a), fp8.quantize(b)
    times = fastest(lambda: a @ b.t(), lambda: fp8.e4m3_product(a8, b8), lambda: fp8.product(a, b))
    bf16, e4m3, quantizing = (2e-12 * size**3 / t for t in times)
    print(f"torch {torch.__version__}, {device}, products of {size} x {size}: bf16 {bf16:.0f}, e4m3 {e4m3:.0f}, "
          f"e4m3 with quantizing (eager) {quantizing:.0f} TFLOP/s")
    for arch in archs:
        for mode in compiled:
            compare(arch, mode)
