"""
fp8 for the linear layers of a backbone's blocks, applied from outside: to_fp8(backbone) after it is built, before
activation checkpointing (whose selective list needs aten._scaled_mm), torch.compile and FSDP2. train.py's key is `fp8`.

What it replaces: every bf16 product of qkv, proj and the MLP or SwiGLU. Two of a layer's three products, the forward
(x W^T) and the input's gradient (g W), run in e4m3, 4 exponent and 3 mantissa bits, on tensor cores that NVIDIA's data
sheets call twice as fast (H100: 1,979 instead of 989 TFLOP/s).
The insight: one scale a row. A tensor's one scale is set by its loudest token, and tokens here differ by orders of
magnitude (class token, registers): the quietest drown, while the mean error looks fine. With a scale for each row of
both factors, each token and each channel uses all of e4m3's range. Rows are the kept dimensions of a product, so their
scales factor out, and the product itself is the plain unscaled one: cuBLAS's fast kernel, and the only form that CPU
and CUDA take in torch 2.11 and 2.13 alike.
How it differs: 3-4 % of noise a product (28-30 dB; a token's worst 27), fresh in every layer; 20-23 dB after six blocks
(pytest -s tests/test_fp8.py -k gates). The weight's gradient stays in bf16: it sums over tokens, whose scales would not
factor out, and it is what AdamW sees.
What it costs: no memory that stays (weights, saved activations and all-gathers stay bf16; parameters and checkpoints
stay what they are), but a pass over each factor to find its scales and one to cast it. torch.compile fuses these into
their neighbours; without it they eat the gain, as in narrow layers, and hold (M, N) in fp32 twice for a moment.
Measured: no GPU has run bench/fp8.py yet. torchao's traffic model at an H100's 78 % of peak expects products and casts
of all linear layers 1.34 x as fast in ViT-g, 1.42 x in the 7B. Switch off: fp8 = "off", the default.

Sources: Micikevicius et al., FP8 formats for deep learning (2022); per-row scales with a bf16 weight gradient are what
torchao names rowwise_with_gw_hp. DINOv3's 7B differs in one scale for all of W in the input's gradient.
"""
from contextlib import contextmanager

import torch
from torch import nn

MIN_WIDTH = 1024  # of a backbone: that model, before all other costs, says 0.91 x at 384, 1.15 at 768, 1.24 at 1024
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0


def quantize(x):
    """
    x (M, K), any strides -> its e4m3 copy (M, K), row-major, and fp32 scales (M, 1): x = copy * scale, row by row.

    A row's largest magnitude lands on 448 whatever the rounding (the tests try all), so there is nothing to clamp: a
    cast takes up to 464, 3.6 % more, and a compiler that finds amax before a rounding to bf16 is off by 0.4 %. Better
    so: torchao reports that torch 2.14.0.dev compiles a clamp beside a transposed fp8 store into NaN (triton issue
    11111). Zeros stay zeros. A row with NaN or inf keeps NaN, which the trainer's finite check must see.
    """
    amax = x.abs().amax(1, keepdim=True).float()  # times 1 / 448: what a GPU makes of a division by a constant
    scale = torch.where(amax > 1e-30, amax * (1 / E4M3_MAX), 1.0)  # below, a GPU may flush to zero
    return (x / scale).to(E4M3, memory_format=torch.contiguous_format), scale


def e4m3_product(a, b):
    """a (M, K) @ b (N, K)^T in e4m3 -> bf16 (M, N). Takes only what CUDA does; a CPU would take more, in silence."""
    for x in (a, b):
        assert x.dtype == E4M3 and x.is_contiguous(), f"{x.dtype}, strides {x.stride()} of {tuple(x.shape)}"
    assert a.shape[1] == b.shape[1] and not a.shape[1] % 16 and not b.shape[0] % 16, (a.shape, b.shape)
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # the default is e4m3


def product(a, b):
    """a (M, K) @ b (N, K)^T in e4m3 with a scale for each row of either, both bf16 -> bf16 (M, N)."""
    (a, scale_a), (b, scale_b) = quantize(a), quantize(b)
    return (e4m3_product(a, b) * scale_a * scale_b.t()).to(torch.bfloat16)


class Fp8Product(torch.autograd.Function):
    """x (M, K) @ weight (N, K)^T, all bf16; M is free, 0 included."""

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
    """A linear layer in fp8, DINOv3's with the masked key bias included. Inputs of any float type compute in bf16."""

    def forward(self, x):
        y = Fp8Product.apply(x.reshape(-1, self.in_features).bfloat16(), self.weight.bfloat16())
        if self.bias is not None:
            bias = self.bias * self.bias_mask if hasattr(self, "bias_mask") else self.bias
            y = y + bias.bfloat16()  # cast last: the mask is an fp32 buffer, which FSDP2's policy leaves alone
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def to_fp8(backbone, force=False):
    """
    Switch the linear layers of a ViT's blocks to fp8, in place: only their class changes, so parameters, buffers and
    optimizer groups are the same objects under the same names. Patch embedding and heads stay as they are. ValueError
    for a ViT narrower than MIN_WIDTH, unless forced, and naming a layer whose sizes CUDA's product does not take.
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
    torch.compiler.allow_in_graph(Fp8Product)  # else full checkpointing, compiled by torch 2.11, keeps its outputs
    return backbone


@contextmanager
def without_fp8(backbone):
    """
    Within it, the layers are what they were: a probe scores what is exported, and its effective rank, which should show
    a collapse, is not that of the noise. Compiled blocks run eagerly: a graph of torch 2.11 does not notice the change.
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
