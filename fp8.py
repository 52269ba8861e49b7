"""
fp8 for the linear layers of a backbone's blocks. train.py's key is `fp8`. It is applied from outside, by
to_fp8(backbone), after the network is built and before activation checkpointing, torch.compile and FSDP2.

What it replaces: the bf16 products of qkv, proj and the MLP or SwiGLU. A layer has three products; two of them, the
forward (x W^T) and the input's gradient (g W), run in e4m3, 4 exponent and 3 mantissa bits. NVIDIA's data sheets call
tensor cores twice as fast in it (H100: 1,979 instead of 989 TFLOP/s).
The insight: one scale per row instead of one per tensor. A tensor's single scale is set by its largest token, and
tokens here differ by orders of magnitude (class token, registers). The quietest tokens then drown, while the mean error
looks fine. With a scale for each row of both factors, every token and every channel uses the whole range of e4m3. Rows
are the dimensions that a product keeps, so their scales can be applied to its result. The product itself has no scales:
that is cuBLAS's fast kernel, and the only form that CPU and CUDA take in both torch 2.11 and 2.13.
How it differs: each product has 3-4 % of noise (28-30 dB; the worst token 27), fresh in every layer. After six blocks
it is 20-23 dB (pytest -s tests/test_fp8.py -k gates). The weight's gradient stays in bf16, because it sums over tokens,
whose scales could not be applied to the result, and because it is what AdamW sees.
What it costs: no lasting memory, since weights, saved activations and all-gathers stay in bf16. But each factor is
read twice, to find its scales and to cast it. torch.compile fuses these passes into their neighbours. Without it they
eat the gain, as they do in narrow layers, and an fp32 (M, N) is held twice for a moment.
Measured: no GPU has run bench/step.py. torchao's traffic model, at an H100's 78 % of peak, expects that products and
casts of all linear layers are 1.34 x as fast in ViT-g and 1.42 x in the 7B. Off: fp8 = "off", the default.

Sources: Micikevicius et al., FP8 formats for deep learning (2022). torchao calls per-row scales with a bf16 weight
gradient rowwise_with_gw_hp. DINOv3's 7B differs: it has one scale for the whole W in the input's gradient.
"""
from contextlib import contextmanager

import torch
from torch import nn

MIN_WIDTH = 1024  # of a backbone: torchao's model, before all other costs, says 0.91 x at 384, 1.15 at 768, 1.24 here
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0


def quantize(x):
    """
    x (M, K) with any strides -> its e4m3 copy (M, K), row-major, and fp32 scales (M, 1): row by row x = copy * scale.

    The largest magnitude of a row becomes 448 whatever the rounding (the tests try all), so nothing needs clamping. A
    cast takes up to 464, 3.6 % more, and a compiler that finds amax before a rounding to bf16 is off by 0.4 %. To leave
    the clamp out is also safer: torchao reports that torch 2.14.0.dev compiles one beside a transposed fp8 store into
    NaN (triton issue 11111). Zeros stay zeros. A row with NaN or inf keeps NaN, which the trainer's check must see.
    """
    amax = x.abs().amax(1, keepdim=True).float()  # times 1 / 448: what a GPU makes of a division by a constant
    scale = torch.where(amax > 1e-30, amax * (1 / E4M3_MAX), 1.0)  # below, a GPU may flush to zero
    return (x / scale).to(E4M3, memory_format=torch.contiguous_format), scale


def e4m3_product(a, b):
    """a (M, K) @ b (N, K)^T in e4m3 -> bf16 (M, N). We refuse what CUDA refuses; a CPU would take it."""
    for x in (a, b):
        assert x.dtype == E4M3 and x.is_contiguous(), f"{x.dtype}, strides {x.stride()} of {tuple(x.shape)}"
    assert a.shape[1] == b.shape[1] and not a.shape[1] % 16 and not b.shape[0] % 16, (a.shape, b.shape)
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # the default is e4m3


def product(a, b):
    """a (M, K) @ b (N, K)^T, both bf16, in e4m3 with a scale per row of each -> bf16 (M, N)."""
    (a, scale_a), (b, scale_b) = quantize(a), quantize(b)
    return (e4m3_product(a, b) * scale_a * scale_b.t()).to(torch.bfloat16)


class Fp8Product(torch.autograd.Function):
    """x (M, K) @ weight (N, K)^T, all bf16. M may be any number, also 0."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
                grad.t() @ x if ctx.needs_input_grad[1] else None)


class Fp8Linear(nn.Linear):
    """A linear layer in fp8; it also stands in for MaskedBiasLinear. Inputs of any float type compute in bf16."""

    def forward(self, x):
        y = Fp8Product.apply(x.reshape(-1, self.in_features).bfloat16(), self.weight.bfloat16())
        if self.bias is not None:
            bias = self.bias * self.bias_mask if hasattr(self, "bias_mask") else self.bias
            y = y + bias.bfloat16()  # cast last: FSDP2's policy leaves the mask, a buffer, in fp32
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def to_fp8(backbone, force=False):
    """
    Switch the linear layers of a ViT's blocks to fp8, in place. Only their class changes, so parameters, buffers and
    optimizer groups stay the same objects under the same names. Patch embedding and heads are left alone. Raises
    ValueError for a ViT narrower than MIN_WIDTH, unless forced, and for a layer whose sizes CUDA does not take.
    """
    width = backbone.arch.embed_dim
    if width < MIN_WIDTH and not force:
        raise ValueError(f"fp8 = 'on': below width {MIN_WIDTH} fp8 saves no time, and this backbone's is {width}; "
                         "fp8 = 'off', or 'force' to run it anyway")
    layers = {k: m for k, m in backbone.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise ValueError(f"{name} is {layer.in_features} -> {layer.out_features}: fp8 needs multiples of 16; "
                             "choose other widths, or fp8 = 'off'")
    for layer in layers.values():
        layer.plain, layer.__class__ = layer.__class__, Fp8Linear
    torch.compiler.allow_in_graph(Fp8Product)  # otherwise compiled full checkpointing keeps its outputs in torch 2.11
    return backbone


@contextmanager
def without_fp8(backbone):
    """
    Within it, the layers are the plain ones: a probe scores what is exported, and its effective rank, which should show
    a collapse, is not that of the noise. Compiled blocks run eagerly: torch 2.11 would use the fp8 layers' graph.
    """
    layers = [m for m in backbone.modules() if isinstance(m, Fp8Linear)]
    for layer in layers:
        layer.__class__ = layer.plain
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer in layers:
            layer.__class__ = Fp8Linear
