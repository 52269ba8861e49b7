"""
The network, its heads, losses, schedules and weight files. Importing this module touches no device, file or network.

One ViT serves DINOv2 (learned positions, patch 14) and DINOv3 (axial RoPE, patch 16). Parameter names follow the
released files of the family that `arch.pos` selects. So Meta's weights load strictly, and our exports load in other
people's code:
    "learned" -> DINOv2: pos_embed, register_tokens, mlp.w12    "rope" -> DINOv3: rope_embed, storage_tokens, mlp.w1, w2

Vocabulary: B images or crops, N tokens per crop, T tokens of a whole batch, M masked patches, D width, K prototypes,
L local crops per image. Batches are crop-major: crop 0 of every image, then crop 1 of every image.
"""
import hashlib
import math
import os
import pathlib
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- architectures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    patch_size: int = 14
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    ffn: str = "mlp"  # "mlp" (GELU) or "swiglu"
    ffn_hidden: int = 1536
    registers: int = 0
    pos: str = "learned"  # "learned" (DINOv2) or "rope" (DINOv3)
    pos_grid: int = 37  # side of the learned position table; Meta's is for 518 px
    pos_antialias: bool = True  # filter when the table is resampled to another grid; Meta's first models do not
    pos_offset: float = 0.0  # added to the side of the grid in those models, against rounding; it shifts the map
    rope_base: float = 100.0
    qkv_bias: bool = True
    mask_k_bias: bool = False  # DINOv3 masks the key's bias out
    norm_eps: float = 1e-6
    local_cls_norm: bool = False  # DINOv3 7B: in training, local crops have their own norm of class and registers
    layerscale: float = 1e-5  # first value; at 1e-5 the class token of an untrained network sees next to nothing
    drop_path: float = 0.0  # share of the crops that skip a residual branch in training; uniform over depth
    in_channels: int = 3
    rope_rescale: float = 0.0  # in training, positions are multiplied by a log-uniform factor from [1/r, r]; 0 = off


# patch size; then width, depth, heads, kind of MLP and its hidden width
_dinov2 = partial(ViTConfig, 14, pos_antialias=False, pos_offset=0.1)
_dinov3 = partial(ViTConfig, 16, registers=4, pos="rope", mask_k_bias=True, norm_eps=1e-5)
ARCHS = {
    "dinov2_vits14": _dinov2(384, 12, 6, "mlp", 1536),
    "dinov2_vitb14": _dinov2(768, 12, 12, "mlp", 3072),
    "dinov2_vitl14": _dinov2(1024, 24, 16, "mlp", 4096),
    "dinov2_vitg14": _dinov2(1536, 40, 24, "swiglu", 4096),
    "dinov3_vits16": _dinov3(384, 12, 6, "mlp", 1536),
    "dinov3_vitb16": _dinov3(768, 12, 12, "mlp", 3072),
    "dinov3_vitl16": _dinov3(1024, 24, 16, "mlp", 4096),
    "dinov3_vith16plus": _dinov3(1280, 32, 20, "swiglu", 5120),
    "dinov3_vit7b16": _dinov3(4096, 40, 32, "swiglu", 8192, qkv_bias=False, local_cls_norm=True),
    "toy": ViTConfig(14, 128, 4, 2, "mlp", 512, registers=4, pos_grid=16, layerscale=1.0),  # minutes on two cores
}
_later = {"registers": 4, "pos_antialias": True, "pos_offset": 0.0}  # Meta's second series of DINOv2
ARCHS |= {f"{name}_reg": replace(arch, **_later) for name, arch in ARCHS.items() if name.startswith("dinov2")}
# tile encoders of pathology with other sizes than Meta's; docs/weights.md lists those that load
ARCHS |= {
    "uni": ViTConfig(16, 1024, 24, 16, "mlp", 4096),  # and Phikon-v2
    "uni2_h": ViTConfig(14, 1536, 24, 24, "swiglu", 4096, 8),
    "virchow": ViTConfig(14, 1280, 32, 16, "swiglu", 3416),  # heads of 80
    "virchow2": ViTConfig(14, 1280, 32, 16, "swiglu", 3416, 4),
    "gigapath": ViTConfig(16, 1536, 40, 24, "swiglu", 4096),
    "hibou_b": ViTConfig(14, 768, 12, 12, "swiglu", 2048, 4),
    "hibou_l": ViTConfig(14, 1024, 24, 16, "swiglu", 2736, 4),
}

# train.py's key pos_interp: how positions are resampled to local crops; "offset" is OpenMidnight's release
POS_INTERP = {"": {}, "offset": {"pos_antialias": False, "pos_offset": 0.1}}

# ---- normalisation of the input -------------------------------------------------------------------------------------

NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # mean and std; Meta's released backbones
         "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Midnight, Kaiko
         "h_optimus": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
         "hibou": ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))}


def norm_values(norm, name="norm"):
    """(mean, std) of RGB in 0-1, from a name in NORMS, (mean, std) itself, or None for imagenet. Raises ValueError."""
    norm = "imagenet" if norm is None else norm
    values = NORMS.get(norm) if isinstance(norm, str) else norm
    try:
        mean, std = (tuple(map(float, rgb)) for rgb in values)
        if len(mean) == len(std) == 3 and all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std):
            return mean, std
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} = {norm!r}: give {', '.join(map(repr, NORMS))}, or (mean, std) of three numbers each, "
                     "of pixels from 0 to 1")


# ---- blocks ---------------------------------------------------------------------------------------------------------
# tokens of all resolutions travel as one flat (T, D) tensor; `shapes` lists (B, N) per resolution. norms and linear
# layers see all tokens at once, which halves the all-gathers of sharded weights; attention runs once per resolution.


def named_tensors(module):
    return [*module.named_parameters(), *module.named_buffers()]


def split(flat, shapes):
    """(T, D) -> one (B * N, D) per resolution."""
    return flat.split([B * N for B, N in shapes])


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return x * self.gamma


class MaskedBiasLinear(nn.Linear):
    """DINOv3's qkv projection: a fixed mask switches the key's bias off. In the released files below 7B it is zero."""

    def __init__(self, dim, out):
        super().__init__(dim, out)
        self.register_buffer("bias_mask", torch.empty(out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.heads = arch.num_heads
        D = arch.embed_dim
        masked = arch.qkv_bias and arch.mask_k_bias
        self.qkv = MaskedBiasLinear(D, 3 * D) if masked else nn.Linear(D, 3 * D, bias=arch.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x, shapes, ropes):
        out = []
        for qkv, (B, N), rope in zip(split(self.qkv(x), shapes), shapes, ropes):
            qkv = qkv.view(B, N, 3, self.heads, -1).unbind(2)  # dimension 2 first would cost the backward a copy
            q, k, v = (t.transpose(1, 2) for t in qkv)  # each (B, heads, N, head_dim)
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, -1))
        return self.proj(torch.cat(out))


class Mlp(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.fc1 = nn.Linear(arch.embed_dim, arch.ffn_hidden)
        self.fc2 = nn.Linear(arch.ffn_hidden, arch.embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(gate) * value. DINOv2 stores gate and value as one matrix w12, DINOv3 as w1 and w2."""

    def __init__(self, arch):
        super().__init__()
        D, hidden = arch.embed_dim, arch.ffn_hidden
        self.fused = arch.pos == "learned"
        if self.fused:
            self.w12 = nn.Linear(D, 2 * hidden)
        else:
            self.w1 = nn.Linear(D, hidden)
            self.w2 = nn.Linear(D, hidden)
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.embed_dim, eps=arch.norm_eps)
        self.attn = Attention(arch)
        self.ls1 = LayerScale(arch.embed_dim)
        self.norm2 = nn.LayerNorm(arch.embed_dim, eps=arch.norm_eps)
        self.mlp = SwiGLU(arch) if arch.ffn == "swiglu" else Mlp(arch)
        self.ls2 = LayerScale(arch.embed_dim)

    def forward(self, x, shapes, ropes, kept=(None, None)):
        """x (T, D) -> (T, D). `kept` holds draw_kept's crops per branch, None for all. No random number is drawn."""
        x = residual(x, shapes, kept[0], lambda x, shapes: self.ls1(self.attn(self.norm1(x), shapes, ropes)))
        return residual(x, shapes, kept[1], lambda x, shapes: self.ls2(self.mlp(self.norm2(x))))


def draw_kept(shapes, drop, device):
    """
    Drop path (DINOv2, section 5). The usual form computes a branch for all crops and zeroes it for some. Here a random
    subset of exactly max(int(B * (1 - drop)), 1) crops per resolution takes part, and the branch is added to it times B
    / kept. The expectation is the same. At 0.4 a ViT-g step costs a third less. Off: drop_path = 0.

    Returns (rows, kept_shapes): the kept crops' rows of the flat tokens, and (kept crops, N) per resolution.
    """
    rows, kept_shapes, start = [], [], 0
    for B, N in shapes:
        keep = max(int(B * (1 - drop)), 1)
        crops = torch.randperm(B, device=device)[:keep]
        rows_of_crops = start + crops[:, None] * N + torch.arange(N, device=device)
        rows.append(rows_of_crops.flatten())
        kept_shapes.append((keep, N))
        start += B * N
    return torch.cat(rows), kept_shapes


class _Take(torch.autograd.Function):
    """
    x (T, D) -> x, and its kept rows (K, D). _Put's backward hands on the gradient of all of x, kept rows included, and
    what returns for these has it in it already. So rows are replaced here, where the backward of x[rows] would fill
    zeros and add, after a sort on CUDA. Gradients are equal to the bit; a ViT-g step moves 604 GB instead of 732 for
    elementwise work, with the 20 of qkv's gradient (bench/blocks.py of commit d48e104). Off: x[rows] and
    x.index_put((rows,), sums).
    """

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad, kept):
        return grad.index_copy(0, ctx.saved_tensors[0], kept), None


class _Put(torch.autograd.Function):
    """x (T, D) with its kept rows replaced by subset + weight * change. It keeps nothing but the rows' indices."""

    @staticmethod
    def forward(ctx, x, subset, change, rows, shapes, weights):
        ctx.save_for_backward(rows)
        ctx.shapes, ctx.weights = shapes, weights
        parts = zip(split(subset, shapes), split(change, shapes), weights)
        return x.index_copy(0, rows, torch.cat([s.add(c, alpha=weight) for s, c, weight in parts]))

    @staticmethod
    def backward(ctx, grad):
        kept = grad.index_select(0, ctx.saved_tensors[0])
        change = torch.cat([g * weight for g, weight in zip(split(kept, ctx.shapes), ctx.weights)])
        return grad, kept, change, None, None, None


def residual(x, shapes, kept, branch):
    """x + branch(x) for x (T, D); with `kept` from draw_kept, only for those crops, and weighted."""
    if kept is None:
        return x + branch(x, shapes)
    rows, kept_shapes = kept
    weights = [B / keep for (B, _), (keep, _) in zip(shapes, kept_shapes)]
    x, subset = _Take.apply(x, rows)
    return _Put.apply(x, subset, branch(subset, kept_shapes), rows, kept_shapes, weights)


class Rope(nn.Module):
    """Axial rotary positions of DINOv3: patch centres lie in (-1, 1) per axis at every resolution."""

    def __init__(self, arch):
        super().__init__()
        self.register_buffer("periods", torch.empty(arch.embed_dim // arch.num_heads // 4))

    def forward(self, h, w, rescale=0.0):
        """sin and cos, each (h * w, head_dim): channels are [y | x], twice. `rescale` is ViTConfig's rope_rescale."""
        y, x = ((torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1 for n in (h, w))
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(h * w, 2, 1)
        if rescale:
            limit = math.log(rescale)
            coords = coords * coords.new_empty(1).uniform_(-limit, limit).exp()
        angles = (2 * math.pi * coords / self.periods.float()).flatten(1).tile(2)
        return angles.sin(), angles.cos()


def rotate(x, sin, cos):
    """
    Rotate the last N tokens of x (B, heads, tokens, head_dim) in fp32. Class token and registers in front stay. sin and
    cos are (N, head_dim), or (B, 1, N, head_dim) where every crop has positions of its own (context.py).
    """
    N = sin.shape[-2]
    prefix, patches = x.split([x.shape[2] - N, N], dim=2)
    p = patches.float()
    a, b = p.chunk(2, dim=-1)
    turned = p * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([prefix, turned.to(x.dtype)], dim=2)


def rope_periods(arch):
    """Rounded to bf16, as the released files hold them. All later arithmetic is in fp32."""
    d = arch.embed_dim // arch.num_heads // 4
    return (arch.rope_base ** (torch.arange(d) / d)).bfloat16().float()


class PatchEmbed(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.proj = nn.Conv2d(arch.in_channels, arch.embed_dim, arch.patch_size, stride=arch.patch_size)

    def forward(self, x):
        return self.proj(x)


class ViT(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.arch = arch
        D = arch.embed_dim
        assert D % arch.num_heads == 0, (D, arch.num_heads)
        self.registers_name = "register_tokens" if arch.pos == "learned" else "storage_tokens"
        self.patch_embed = PatchEmbed(arch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        if arch.registers:
            setattr(self, self.registers_name, nn.Parameter(torch.empty(1, arch.registers, D)))
        if arch.pos == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + arch.pos_grid**2, D))
        else:
            self.rope_embed = Rope(arch)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(D, eps=arch.norm_eps)
        if arch.local_cls_norm:
            self.local_cls_norm = nn.LayerNorm(D, eps=arch.norm_eps)
        self.init_weights()

    def init_weights(self):
        for name, tensor in named_tensors(self):
            self.init_tensor(name, tensor)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """Give the parameter or buffer `name` its first values, in place, as in DINOv2 and DINOv3."""
        arch = self.arch
        if name.endswith("gamma"):
            t.fill_(arch.layerscale)
        elif "norm" in name:
            t.fill_(name.endswith("weight"))
        elif name in ("cls_token", self.registers_name):
            t.normal_(std=1e-6 if arch.pos == "learned" else 0.02, generator=generator)
        elif name.startswith("patch_embed."):
            bound = (arch.in_channels * arch.patch_size**2) ** -0.5  # as torch's convolutions
            t.uniform_(-bound, bound, generator=generator)
        elif name == "rope_embed.periods":
            t.copy_(rope_periods(arch))
        elif name.endswith("bias_mask"):
            t.view(3, -1).copy_(torch.tensor([[1.0], [0.0], [1.0]]))  # queries, keys, values
        elif name == "mask_token" or name.endswith(".bias"):
            t.zero_()
        else:
            assert name == "pos_embed" or name.startswith("blocks."), f"no first values are known for {name}"
            nn.init.trunc_normal_(t, std=0.02, generator=generator)

    def forward(self, x, mask=None):
        """
        x (B, C, H, W) and mask (B, N) bool or None -> {"cls": (B, D), "registers": (B, R, D), "patches": (B, N, D)}
        after the final norm. H and W may be any multiple of the patch size. Masked patches enter as the mask token.
        A list of batches (global crops, local crops) with a list of masks gives a list of such dicts.
        """
        if torch.is_tensor(x):
            return self.forward([x], [mask])[0]
        arch, masks = self.arch, mask or [None] * len(x)
        grids = [(images.shape[2] // arch.patch_size, images.shape[3] // arch.patch_size) for images in x]
        tokens = [self.embed(*crops) for crops in zip(x, masks, grids)]
        shapes = [tuple(t.shape[:2]) for t in tokens]
        flat = torch.cat([t.flatten(0, 1) for t in tokens])
        ropes = [None] * len(x)
        drop, rescale = (arch.drop_path, arch.rope_rescale) if self.training else (0, 0)
        for i, block in enumerate(self.blocks):
            if arch.pos == "rope" and (i == 0 or rescale):  # DINOv3 draws a new factor per block and resolution
                ropes = [self.rope_embed(*grid, rescale) for grid in grids]
            kept = [draw_kept(shapes, drop, flat.device) if drop else None for _ in range(2)]
            flat = block(flat, shapes, ropes, kept)
        crops = [t.view(*shape, -1) for t, shape in zip(split(flat, shapes), shapes)]
        return [self.finish(t, local=i == 1) for i, t in enumerate(crops)]

    def embed(self, images, mask, grid):
        """(B, C, H, W) -> (B, 1 + R + N, D): class token, registers, patches row by row."""
        arch, (B, _, H, W) = self.arch, images.shape
        assert H % arch.patch_size == W % arch.patch_size == 0, f"{H} x {W} px do not divide by {arch.patch_size}"
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
        if arch.pos == "learned":
            table = self.pos_embed
            if grid != (arch.pos_grid, arch.pos_grid):
                table = resample_pos_embed(table, grid, arch.pos_antialias, arch.pos_offset)
            x = x + table
        if arch.registers:  # they come after the positions, because they have none
            registers = getattr(self, self.registers_name).expand(B, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def finish(self, x, local):
        """The dict of forward, after the final norm, from x (B, 1 + R + N, D)."""
        prefix = 1 + self.arch.registers
        head, patches = x.split([prefix, x.shape[1] - prefix], dim=1)
        own_norm = self.arch.local_cls_norm and self.training and local
        head = self.local_cls_norm(head) if own_norm else self.norm(head)
        return {"cls": head[:, 0].contiguous(), "registers": head[:, 1:].contiguous(), "patches": self.norm(patches)}


def resample_pos_embed(pos_embed, grid, antialias=True, offset=0.0):
    """
    Resample a learned position table (1, 1 + g*g, D) to `grid`, a side or (h, w): (1, 1 + h*w, D), bicubic, in fp32.
    The class token's entry stays. DINOv2's first models have no antialias and offset = 0.1: they scale the map by
    (side + 0.1) / g, which is not the same as resampling it to `side` (DINOv2, interpolate_pos_encoding).
    """
    h, w = (grid, grid) if isinstance(grid, int) else grid
    cls, table = pos_embed.float().split([1, pos_embed.shape[1] - 1], dim=1)
    g = math.isqrt(table.shape[1])
    assert g * g == table.shape[1], f"position table of {table.shape[1]} entries is not square"
    table = table.view(1, g, g, -1).permute(0, 3, 1, 2)
    size = {"scale_factor": ((h + offset) / g, (w + offset) / g)} if offset else {"size": (h, w)}
    table = F.interpolate(table, mode="bicubic", antialias=antialias, **size)
    assert table.shape[2:] == (h, w), (table.shape, h, w)
    table = table.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([cls, table], dim=1).to(pos_embed.dtype)


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are weight_g * weight_v / |weight_v|, under DINOv2's key names."""

    def __init__(self, dim, out):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out, 1))
        self.weight_v = nn.Parameter(torch.empty(out, dim))

    def forward(self, x):
        norm = self.weight_v.float().norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g.float() / norm).to(x.dtype))


class DINOHead(nn.Module):
    """
    (..., in_dim) -> (..., prototypes) logits: MLP, L2 normalisation of the bottleneck, prototypes (DINO, section 3).
    weight_norm = True is DINOv2's last layer, whose logits are cosines while weight_g is 1. False is DINOv3's.
    """

    def __init__(self, in_dim, prototypes, hidden=2048, bottleneck=256, layers=3, weight_norm=True):
        super().__init__()
        widths = [in_dim] + [hidden] * (layers - 1) + [bottleneck]
        stack = []
        for a, b in zip(widths, widths[1:]):
            stack += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*stack[:-1])
        last = WeightNormLinear if weight_norm else partial(nn.Linear, bias=False)
        self.last_layer = last(bottleneck, prototypes)
        for name, tensor in named_tensors(self):
            self.init_tensor(name, tensor)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """As ViT.init_tensor."""
        if name.endswith("weight_v"):
            bound = t.shape[1] ** -0.5  # as torch's linear layers
            t.uniform_(-bound, bound, generator=generator)
        elif name.endswith(("weight_g", "bias")):
            t.fill_(name.endswith("weight_g"))
        else:
            nn.init.trunc_normal_(t, std=0.02, generator=generator)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))


def run_arch(config):
    """
    The ViTConfig that train.py's keys ask for, its position table on the grid of the global crops. ValueError if crops
    are no multiple of the patch, or if keys of learned positions are set for rotary ones, or the other way round.
    """
    arch, patch = ARCHS[config["arch"]], ARCHS[config["arch"]].patch_size
    for key in ("global_px", "local_px"):
        px = config[key]
        if px < patch or px % patch:
            nearest = max(round(px / patch), 1) * patch
            raise ValueError(f"{key} = {px} is no multiple of {config['arch']}'s patch of {patch}; nearest: {nearest}")
    if arch.pos == "rope" and (config["pos_interp"] or config["pos_embed_init"] == "random"):
        raise ValueError(f"pos_interp and pos_embed_init are for learned positions; {config['arch']}'s are rotary")
    if arch.pos == "learned" and config["rope_rescale"]:
        raise ValueError(f"rope_rescale is for rotary positions; {config['arch']}'s are learned: leave it at 0")
    return replace(arch, pos_grid=config["global_px"] // arch.patch_size, drop_path=config["drop_path"],
                   rope_rescale=config["rope_rescale"], depth=config["depth"] or arch.depth)


def build(config):
    """The ModuleDict {"backbone", "dino_head", "ibot_head"} of a student or a teacher, by train.py's keys."""
    arch = replace(run_arch(config), **POS_INTERP[config["pos_interp"]])
    net = nn.ModuleDict({"backbone": ViT(arch)})
    for name in ("dino", "ibot"):
        sizes = [config[f"{name}_{size}"] for size in ("prototypes", "hidden", "bottleneck")]
        net[f"{name}_head"] = DINOHead(arch.embed_dim, *sizes, weight_norm=config["head_weight_norm"])
    return net


# ---- teacher targets and losses, in fp32 whatever the logits' type --------------------------------------------------


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op)
    return x


class _AllGather(torch.autograd.Function):
    """x (n, D) of every rank -> (ranks * n, D). The gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather(list(out.chunk(dist.get_world_size())), x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = all_reduce(grad.contiguous())
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _chunks(*tensors):
    """Views of (..., M, K) along M. One takes 4 MB in fp32 and stays in cache; on a GPU 32, because launches cost."""
    x = tensors[0]
    numbers = 1 << (23 if x.is_cuda else 20)
    rows = max(numbers * x.shape[-2] // max(x.numel(), 1), 1)
    return zip(*(t.split(rows, dim=-2) for t in tensors))


@torch.no_grad()
def sinkhorn(logits, temp, iterations=3):
    """
    Teacher logits (M, K) -> fp32 target probabilities (M, K). In turns, every prototype gets an equal share of the
    batch of all ranks, and every row is made to sum to 1 (SwAV, algorithm 1).

    The usual form rescales the matrix in place, time and again. But E = exp(logits / temp) can stay as it is: only one
    scale per prototype and one per row change, and constants cancel. So an iteration passes over E once, for the rows'
    scales and the next sums over rows, and only these K sums cross ranks. E must be in fp32; bf16 is off by 2e-3. Only
    the result is held. 3379 x 131072 bf16 logits move 10.6 GB instead of 72 (counted); 256 x 32768 on one EPYC core is
    2.1 times as fast (bench/losses.py of commit d9241fd). Off: centering = "softmax".
    """
    q = torch.empty_like(logits, dtype=torch.float32)
    top = all_reduce(logits.max().float()[None] / temp, dist.ReduceOp.MAX)  # global: a row's own would not cancel
    sums, tiny = q.new_zeros(q.shape[1]), torch.finfo(q.dtype).tiny
    for x, e in _chunks(logits, q):
        torch.add(-top, x, alpha=1 / temp, out=e).exp_()  # top has a dimension: bf16 logits are promoted
        sums.addmv_(e.T, e.new_ones(len(e)))
    for left in reversed(range(iterations)):
        # with the clamps, a prototype or row that underflowed gets nothing rather than NaN
        columns, sums = 1 / all_reduce(sums).clamp(min=tiny), torch.zeros_like(sums)
        for (e,) in _chunks(q):
            rows = 1 / (e @ columns).clamp(min=tiny)
            if left:
                sums.addmv_(e.T, rows)
            else:
                e.mul_(columns).mul_(rows[:, None])
    return q


@torch.no_grad()
def softmax_center(logits, center, temp):
    """Teacher logits (M, K) -> target probabilities by centring and sharpening (DINO, section 3.1)."""
    return F.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def update_center(center, logits, momentum=0.9):
    """The next center (1, K): momentum * center + (1 - momentum) * mean of the logits (M, K) over all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mean = all_reduce(logits.float().mean(0, keepdim=True)) / world
    return center.lerp(mean, 1 - momentum)


class _CrossEntropy(torch.autograd.Function):
    """
    -sum_k targets log softmax(logits / temp): logits (..., M, K), targets (M, K) whose rows sum to 1 -> (..., M).

    Under autograd, log_softmax keeps a copy of the logits in fp32, and its backward makes more. But a row's gradient is
    (softmax - targets) / temp times that of its loss, and only the latter is unknown in the forward. So the forward
    makes the rest, in the logits' type, and keeps nothing else: logits and targets may be freed. The backward scales it
    in place; a second backward is refused. It equals autograd's up to rounding. 3379 x 131072 in bf16: 5.3 GB are moved
    instead of 34, and 3.6 GB held instead of 6.2, targets included (counted). With sinkhorn it is 1.5 times as fast on
    one EPYC core (bench/losses.py of commit d9241fd). Off: -(targets * log_softmax(logits.float() / temp, -1)).sum(-1)
    """

    @staticmethod
    def forward(ctx, logits, targets, temp):
        grad, loss = torch.empty_like(logits), []
        for x, t, g in _chunks(logits, targets, grad):
            logp = F.log_softmax(x.float() / temp, dim=-1)
            loss.append(-(t * logp).sum(-1))
            torch.sub(logp.exp_(), t, out=g)
        ctx.save_for_backward(grad)
        ctx.temp = temp
        return torch.cat(loss, dim=-1)

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        for g, scale in _chunks(grad, grad_loss[..., None] / ctx.temp):
            g.mul_(scale)
        return grad, None, None


cross_entropy = _CrossEntropy.apply  # (logits, targets, temp)


def dino_loss(global_logits, local_logits, targets, temp=0.1):
    """
    Student logits of global (2B, K) and local (L*B, K) crops, teacher targets (2B, K) -> two scalars to be added.
    Each global crop is predicted from the other one and from every local crop. Terms are means over images; they are
    summed and divided by their number, 2 + 2L (DINOv2; the pair of global crops counts 2).
    """
    B = len(targets) // 2
    terms = 2 + 2 * (len(local_logits) // B)
    swapped = targets.roll(B, 0)
    loss_global = cross_entropy(global_logits, swapped, temp).mean() * 2 / terms
    both = (targets[:B] + targets[B:]) / 2  # a local crop meets both targets, and the loss is linear in the target
    local = cross_entropy(local_logits.view(-1, B, local_logits.shape[-1]), both, temp)
    return loss_global, local.mean(1).sum() * 2 / terms


def ibot_loss(logits, targets, weights, crops, temp=0.1):
    """
    Student logits and teacher targets (M, K) at the masked patches -> scalar (iBOT, equation 2; DINOv2): the sum of
    cross-entropies times `weights` (M), 1 / masked patches of the crop, over the number of global crops, masked or not.
    """
    return (cross_entropy(logits, targets, temp) * weights).sum() / crops


def koleo_loss(x):
    """-mean log distance of x (n, D) to its nearest neighbour on the sphere, within the rank (Sablayrolles 2019)."""
    z = F.normalize(x.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


def kde_loss(x, kappa=5.0):
    """
    mean_i [logsumexp_{j != i} kappa z_i.z_j - log(n - 1)] over x (n, D) of all ranks, n > 1: the log of a von
    Mises-Fisher density estimate at each point. It falls when points spread (Wang and Isola 2020, uniformity).
    """
    z = everyone = F.normalize(x.float(), dim=-1)
    first = 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone, first = _AllGather.apply(z), dist.get_rank() * len(z)
    own = torch.eye(len(z), len(everyone), dtype=torch.bool, device=z.device).roll(first, 1)
    assert len(everyone) > 1, "a density needs at least two images in the global batch"
    densities = (kappa * z @ everyone.T).masked_fill(own, -math.inf).logsumexp(1)
    return densities.mean() - math.log(len(everyone) - 1)


def kde_loss_openmidnight(x, kappa=5.0):
    """
    -mean_i log sum_j exp(kappa z_i.z_j) over x (n, D) of this rank, j = i included: OpenMidnight's released code. Its
    sign rewards collapse, as it is lowest when all points coincide. We keep it to reproduce that run, but in fp32.
    """
    z = F.normalize(x.float(), dim=-1)
    return -((kappa * z @ z.T).exp().sum(1) + 1e-9).log().mean()


# ---- optimisation: parameter groups, schedules ----------------------------------------------------------------------


def param_groups(student, layer_decay=1.0, patch_embed_lr=0.2):
    """
    AdamW groups of a ModuleDict {backbone, *_head}: a list of {"params", "lr_scale", "wd_scale", "last_layer"}.
    DINOv2's rules: biases, norms and layer-scale have no weight decay, but tokens, positions and prototypes do. Block i
    of L learns at layer_decay^(L - i), what comes before at layer_decay^(L + 1), patches also times patch_embed_lr.
    """
    depth, groups = len(student["backbone"].blocks), {}
    for name, p in student.named_parameters():
        if not p.requires_grad:
            continue
        part, _, local = name.partition(".")
        layer = depth if "norm" in local else -1
        if local.startswith("blocks."):
            layer = int(local.split(".")[1])
        lr = layer_decay ** (depth - layer) if part == "backbone" else 1.0
        lr *= patch_embed_lr if "patch_embed" in local else 1.0
        wd = 0.0 if local.endswith("bias") or "norm" in local or "gamma" in local else 1.0
        last = "last_layer" in local
        group = dict(params=[], lr_scale=lr, wd_scale=wd, last_layer=last)
        groups.setdefault((lr, wd, last), group)["params"].append(p)
    return list(groups.values())


def cosine_schedule(step, base, final, total, warmup=0, start=0.0):
    """Linear from `start` to `base` at step warmup - 1, cosine to `final` at `total`, then constant (DINOv2)."""
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    if step >= total:
        return final
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def schedules(step, config, peak_lr):
    """
    What changes with the step, from train.py's keys: {"lr", "last_layer_lr" (of the prototypes), "wd", "momentum" (of
    the teacher), "teacher_temp"}. golden/schedules.npz holds the values of OpenMidnight's current recipe.
    """
    total, temp = config["schedule_steps"] or config["max_steps"], config["teacher_temp"]
    lr = cosine_schedule(step, peak_lr, config["min_lr"], total, config["warmup_steps"])
    warm = config["teacher_temp_warmup"]
    return {"lr": lr,
            "last_layer_lr": 0.0 if step < config["freeze_last_layer"] else lr,
            "wd": cosine_schedule(step, config["weight_decay"], config["weight_decay_end"], total),
            "momentum": cosine_schedule(step, config["momentum"], config["momentum_end"], total),
            "teacher_temp": cosine_schedule(step, temp, temp, warm, warm, config["teacher_temp_start"])}


# ---- weight files ---------------------------------------------------------------------------------------------------


def load_backbone(path, arch=None):
    """
    Read a tile encoder: a ViT on the CPU in fp32. The file may be a released DINOv2 or DINOv3, this project's
    {"teacher": ...} or one in Hugging Face's or timm's layout (docs/weights.md lists them). The architecture is
    inferred from the tensors. `arch`, a name in ARCHS or a ViTConfig, is a check, and needed only where nothing tells
    it (heads of sizes that are not in ARCHS). Raises ValueError, naming the file, if it is missing or does not fit.
    """
    state, arch = open_weights(path, arch)
    with torch.device("meta"):
        vit = ViT(arch)
    vit.load_state_dict({name: t.float() for name, t in state.items()}, strict=True, assign=True)
    return vit


def first_weights(path, arch, pos_embed_init="resample"):
    """
    {name: tensor} from which a ViT of that ViTConfig starts training; rows are read from the mapped file when they are
    taken. A learned position table is resampled to the grid of `arch`, or left out with "random", and drawn then.
    """
    state, _ = open_weights(path, arch)
    if arch.pos == "learned":
        table = state.pop("pos_embed")
        if table.shape[1] != 1 + arch.pos_grid**2:
            table = resample_pos_embed(table.float(), arch.pos_grid, arch.pos_antialias, arch.pos_offset)
        if pos_embed_init != "random":
            state["pos_embed"] = table
    return state


def stored_norm(path):
    """
    (mean, std) that a weight file states. This project's teachers do; a JSON file beside Hugging Face's or timm's must
    (ValueError). A .pth with Meta's names gets ImageNet's; DINOv3's satellite models and Hibou's differ: pass theirs.
    """
    from prepare import convert
    stored = {} if is_hugging_face(path) else convert.read_stored(path)
    config = convert.header_of(stored).get("config", {})
    if not config and not (stored and convert.released_names(convert.backbone_tensors(path, stored))):
        return norm_values(convert.stored_norm(path), f"{path}: norm")
    former = (config["norm_mean"], config["norm_std"]) if "norm_mean" in config else None  # keys of older teachers
    return norm_values(config.get("norm", former), f"{path}: norm")


def read_header(path):
    """What this project's teacher file states about itself: {"arch", "step", "config"}; {} for any other file."""
    from prepare import convert
    return {} if is_hugging_face(path) else convert.header_of(convert.read_stored(path))


def sha256_of(path):
    """Of a weight file; of a folder or of shards, of all files one after the other."""
    from prepare import convert
    digest = hashlib.sha256()
    for file in convert.weight_files(pathlib.Path(path)):
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # continues it
    return digest.hexdigest()


def is_hugging_face(path):
    return os.path.isdir(path) or str(path).endswith(".safetensors")


def open_weights(path, arch=None):
    """({name: tensor} under our ViT's names, its ViTConfig) of a weight file; see load_backbone."""
    from prepare import convert
    asked, stored = known_arch(path, arch), convert.read_stored(path)
    header = convert.header_of(stored)
    told = header.get("arch") or {}  # a name in ARCHS, or {field of ViTConfig: value} from prepare/convert.py
    if isinstance(told, str):
        asked, told = asked or known_arch(path, told), {}
    told = told | POS_INTERP.get(header.get("config", {}).get("pos_interp"), {})
    tensors = convert.backbone_tensors(path, stored)
    convert.check_values(path, tensors)
    state, more = convert.released(path, tensors, asked)
    return state, fitting_arch(path, state, asked, told | more)


def known_arch(path, arch):
    if isinstance(arch, str) and arch not in ARCHS:
        raise ValueError(f"{path}: unknown arch '{arch}'; known: {', '.join(ARCHS)}")
    return ARCHS.get(arch, arch)


def fitting_arch(path, state, asked, told):
    """
    The ViTConfig whose tensors have exactly these names and shapes: `asked`, or the inferred one if None, with the
    fields that the file tells. Raises ValueError if there is none, or if the file contradicts `asked`.
    """
    arch = asked or infer_arch(path, state)
    for key, value in told.items() if asked else ():
        if getattr(arch, key) != value and not key.startswith("pos"):  # how positions are resampled is the file's say
            raise ValueError(f"{path}: weights of another architecture: {key} is {value}, not {getattr(arch, key)}")
    if "pos_embed" in state:
        told = told | {"pos_grid": math.isqrt(state["pos_embed"].shape[1] - 1)}
    arch = replace(arch, **told)
    if not arch.num_heads:
        raise ValueError(f"{path}: nothing tells its number of heads, as no model in model.ARCHS has its width and "
                         "MLP; state arch=...")
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in ViT(arch).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        texts = [f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'known')}" for name in wrong[:4]]
        raise ValueError(f"{path}: weights of another architecture: {len(wrong)} tensors do not fit: "
                         f"{'; '.join(texts)}; it looks like {looks_like(infer_arch(path, state))}; state another with "
                         "arch=...")
    return arch


SIZES = ("embed_dim", "ffn", "ffn_hidden", "depth", "patch_size", "registers", "pos")


def of_sizes(arch, sizes=SIZES):
    """The names in ARCHS of architectures with these fields of `arch`."""
    wanted = [getattr(arch, key) for key in sizes]
    return [name for name, other in ARCHS.items() if [getattr(other, key) for key in sizes] == wanted]


def looks_like(arch):
    if names := of_sizes(arch):
        return " or ".join(names)
    sizes = ", ".join(f"{key} {getattr(arch, key)}" for key in SIZES)
    return f"no model in model.ARCHS ({sizes})"


def infer_arch(path, state):
    """The ViTConfig that names and shapes imply; what they do not tell is as in the family's models. num_heads is None
    where neither RoPE's periods nor a model in ARCHS of the same width and MLP tell it."""
    swiglu = "blocks.0.mlp.w3.weight" in state
    down = state.get(f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight")  # (D, hidden)
    patches = state.get("patch_embed.proj.weight")  # (D, C, P, P)
    if patches is None or down is None:
        names = ", ".join(list(state)[:3]) or "no tensors"
        raise ValueError(f"{path}: there is no DINOv2 or DINOv3 backbone in this file, as it lacks the weights of the "
                         f"patches or of the first block's MLP; it holds {names}")
    D, hidden = down.shape
    rope = "rope_embed.periods" in state or "storage_tokens" in state
    tokens = state.get("storage_tokens" if rope else "register_tokens")
    registers = 0 if tokens is None else tokens.shape[1]
    family = "dinov3_vits16" if rope else "dinov2_vits14_reg" if registers else "dinov2_vits14"
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    arch = replace(
        ARCHS[family], patch_size=patches.shape[2], in_channels=patches.shape[1], embed_dim=D,
        depth=len(blocks), registers=registers,
        ffn="swiglu" if swiglu else "mlp", ffn_hidden=hidden,
        qkv_bias=any(name.endswith("qkv.bias") for name in state),
        local_cls_norm="local_cls_norm.weight" in state)
    known = of_sizes(arch, ("embed_dim", "ffn", "ffn_hidden"))
    heads = ARCHS[known[0]].num_heads if known else None
    if "rope_embed.periods" in state:
        heads = D // len(state["rope_embed.periods"]) // 4
    return replace(arch, num_heads=heads)
