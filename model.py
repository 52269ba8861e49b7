"""
The network, its heads, losses, schedules and weight files. Importing touches no device, file or network.

One ViT serves DINOv2 (learned positions, patch 14) and DINOv3 (axial RoPE, patch 16). Parameter names follow the
released file of the family that `config.pos` selects, so Meta's weights load strictly and our exports load in other
people's code:
    "learned" -> DINOv2: pos_embed, register_tokens, mlp.w12    "rope" -> DINOv3: rope_embed, storage_tokens, mlp.w1, w2

Vocabulary: B images or crops, N tokens a crop, T tokens of a whole batch, D width, K prototypes, G global and L local
crops. Batches are crop-major: crop 0 of every image, then crop 1 of every image.
"""
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import weight_files

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
    pos_grid: int = 37  # side of the learned table: 518 px / 14
    pos_antialias: bool = True  # when resampled to another grid; off in Meta's models without registers
    pos_offset: float = 0.0  # 0.1 in those models: a guard against rounding that shifts the map
    rope_base: float = 100.0
    qkv_bias: bool = True
    mask_k_bias: bool = False  # DINOv3: the key's bias is masked out
    norm_eps: float = 1e-6
    local_cls_norm: bool = False  # DINOv3 7B: in training, local crops' class and registers have their own norm
    layerscale: float = 1e-5  # initial value; at 1e-5 an untrained network's class token sees next to nothing
    drop_path: float = 0.0  # share of the batch that skips a residual branch in training; uniform over depth
    in_channels: int = 3
    rope_rescale: float = 0.0  # training: patch coordinates times a log-uniform factor in [1/r, r]; 0 = off


def _dinov2(width, depth, heads, registers=0, ffn="mlp", hidden=None):
    old = registers == 0  # Meta trained these before the antialiased resampling
    hidden = hidden or 4 * width
    return ViTConfig(14, width, depth, heads, ffn, hidden, registers, pos_antialias=not old, pos_offset=0.1 * old)


def _dinov3(width, depth, heads, ffn="mlp", hidden=None, **big):
    hidden = hidden or 4 * width
    return ViTConfig(16, width, depth, heads, ffn, hidden, 4, "rope", mask_k_bias=True, norm_eps=1e-5, **big)


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
ARCHS = {f"dinov2_vit{s}14": _dinov2(*size) for s, size in _SIZES.items()}
ARCHS |= {"dinov2_vitg14": _dinov2(1536, 40, 24, ffn="swiglu", hidden=4096)}
ARCHS |= {f"{name}_reg": replace(c, registers=4, pos_antialias=True, pos_offset=0.0) for name, c in ARCHS.items()}
ARCHS |= {f"dinov3_vit{s}16": _dinov3(*size) for s, size in _SIZES.items()}
ARCHS["dinov3_vith16plus"] = _dinov3(1280, 32, 20, "swiglu", 5120)
ARCHS["dinov3_vit7b16"] = _dinov3(4096, 40, 32, "swiglu", 8192, qkv_bias=False, local_cls_norm=True)
ARCHS["toy"] = ViTConfig(14, 128, 4, 2, "mlp", 512, registers=4, pos_grid=16, layerscale=1.0)  # minutes on two cores

POS_INTERP = {"": {}, "offset": weight_files.OFFSET}  # train.py's key

# ---- normalisation of the input -------------------------------------------------------------------------------------

NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # mean and std; Meta's released backbones
         "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}  # Midnight, Kaiko


def norm_values(norm):
    """(mean, std), three numbers each, of a name in NORMS, of None (imagenet) or of (mean, std) itself."""
    values = NORMS["imagenet"] if norm is None else NORMS.get(norm) if isinstance(norm, str) else norm
    try:
        mean, std = ((float(r), float(g), float(b)) for r, g, b in values)
        if all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std):
            return mean, std
    except (TypeError, ValueError):
        pass
    raise ValueError(f"norm = {norm!r}: give {', '.join(map(repr, NORMS))}, or (mean, std) of three numbers each, "
                     "of pixels from 0 to 1")


def stored_norm(path):
    """
    (mean, std) that a weight file states: this project's teachers, preprocessor_config.json beside Hugging Face's
    (ValueError without). ImageNet's for any other .pth; DINOv3's satellite models differ: state theirs as `norm`.
    """
    norm = weight_files.norm(path)
    try:
        return norm_values(norm)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# blocks. tokens of all resolutions travel as one flat (T, D) tensor: norms and linear layers see all of them at once,
# which halves the sharded all-gathers of two separate calls; attention runs once per resolution, on (B, N) in
# `shapes`.


def named_tensors(module):
    return [*module.named_parameters(), *module.named_buffers()]


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return x * self.gamma


class MaskedBiasLinear(nn.Linear):
    """DINOv3's qkv projection: a fixed mask switches the key's bias off (released: all zero below 7B)."""

    def __init__(self, dim, out):
        super().__init__(dim, out)
        self.register_buffer("bias_mask", torch.empty(out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        masked = c.qkv_bias and c.mask_k_bias
        self.qkv = (MaskedBiasLinear(c.embed_dim, 3 * c.embed_dim) if masked
                    else nn.Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias))
        self.proj = nn.Linear(c.embed_dim, c.embed_dim)

    def forward(self, x, shapes, ropes):
        out = []
        for qkv, (B, N), rope in zip(self.qkv(x).split([B * N for B, N in shapes]), shapes, ropes):
            q, k, v = qkv.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, -1))
        return self.proj(torch.cat(out))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.embed_dim, c.ffn_hidden)
        self.fc2 = nn.Linear(c.ffn_hidden, c.embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(gate) * value; DINOv2 stores gate and value as one matrix w12, DINOv3 as w1 and w2."""

    def __init__(self, c):
        super().__init__()
        self.fused = c.pos == "learned"
        if self.fused:
            self.w12 = nn.Linear(c.embed_dim, 2 * c.ffn_hidden)
        else:
            self.w1 = nn.Linear(c.embed_dim, c.ffn_hidden)
            self.w2 = nn.Linear(c.embed_dim, c.ffn_hidden)
        self.w3 = nn.Linear(c.ffn_hidden, c.embed_dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.attn = Attention(c)
        self.ls1 = LayerScale(c.embed_dim)
        self.norm2 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp = SwiGLU(c) if c.ffn == "swiglu" else Mlp(c)
        self.ls2 = LayerScale(c.embed_dim)

    def forward(self, x, shapes, ropes, kept=(None, None)):
        """x (T, D); `kept`: draw_kept's crops that take part in each branch, None for all. Draws no random number."""
        x = residual(x, shapes, kept[0], lambda x, shapes: self.ls1(self.attn(self.norm1(x), shapes, ropes)))
        return residual(x, shapes, kept[1], lambda x, shapes: self.ls2(self.mlp(self.norm2(x))))


def draw_kept(shapes, drop, device):
    """
    Drop path over the batch: (rows of the flat tokens that a branch sees, their [(crops, N)] by resolution).

    Instead of zeroing the branch of the dropped crops, it is computed on a random subset of exactly max(int(B * (1 -
    drop)), 1) crops per resolution and added back times B / kept (DINOv2, section 5). The expectation is the same; at
    0.4 a ViT-g step costs a third less. Off: drop_path = 0.
    """
    rows, kept, start = [], [], 0
    for B, N in shapes:
        keep = max(int(B * (1 - drop)), 1)
        crops = torch.randperm(B, device=device)[:keep]
        rows.append((start + crops[:, None] * N + torch.arange(N, device=device)).flatten())
        kept.append((keep, N))
        start += B * N
    return torch.cat(rows), kept


def residual(x, shapes, kept, branch):
    """x + branch(x); of the kept crops only, weighted, where `kept` is given."""
    if kept is None:
        return x + branch(x, shapes)
    rows, kept = kept
    subset, sizes = x[rows], [B * N for B, N in kept]
    parts = zip(subset.split(sizes), branch(subset, kept).split(sizes), shapes, kept)
    parts = [s.add(o, alpha=B / keep) for s, o, (B, _), (keep, _) in parts]
    return x.index_put((rows,), torch.cat(parts))  # index_add_ would keep the branch's output: 8 % of activations


class Rope(nn.Module):
    """Axial rotary positions of DINOv3: patch centres in (-1, 1) per axis at every resolution."""

    def __init__(self, c):
        super().__init__()
        self.register_buffer("periods", torch.empty(c.embed_dim // c.num_heads // 4))

    def forward(self, h, w, rescale=None):
        """sin and cos, each (h * w, head_dim): first half of the channels is [y | x], the second half repeats it."""
        y, x = ((torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1 for n in (h, w))
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(h * w, 2, 1)
        coords = coords if rescale is None else coords * rescale
        angles = (2 * math.pi * coords / self.periods.float()).flatten(1).tile(2)
        return angles.sin(), angles.cos()


def rotate(x, sin, cos):
    """Rotate the patches of x (B, heads, N, head_dim) in fp32; class and registers in front stay."""
    prefix, patches = x.split([x.shape[2] - sin.shape[0], sin.shape[0]], dim=2)
    p = patches.float()
    a, b = p.chunk(2, dim=-1)
    return torch.cat([prefix, (p * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)], dim=2)


def rope_periods(c):
    """The released files hold them rounded to bf16; all later arithmetic is fp32."""
    d = c.embed_dim // c.num_heads // 4
    return (c.rope_base ** (torch.arange(d) / d)).bfloat16().float()


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Conv2d(c.in_channels, c.embed_dim, c.patch_size, stride=c.patch_size)

    def forward(self, x):
        return self.proj(x)


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.arch = config
        assert c.embed_dim % c.num_heads == 0, (c.embed_dim, c.num_heads)
        self.registers_name = "register_tokens" if c.pos == "learned" else "storage_tokens"
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, c.embed_dim))
        if c.registers:
            setattr(self, self.registers_name, nn.Parameter(torch.empty(1, c.registers, c.embed_dim)))
        if c.pos == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + c.pos_grid**2, c.embed_dim))
        else:
            self.rope_embed = Rope(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        if c.local_cls_norm:
            self.local_cls_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.init_weights()

    def init_weights(self):
        for name, tensor in named_tensors(self):
            self.init_tensor(name, tensor)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """
        Give the parameter or buffer `name` its first values, in place. Linears and positions: normal, std 0.02; tokens:
        1e-6 (DINOv2) or 0.02 (DINOv3); patches as torch's convolutions.
        """
        c = self.arch
        if name.endswith("gamma"):
            t.fill_(c.layerscale)
        elif "norm" in name:
            t.fill_(name.endswith("weight"))
        elif name in ("cls_token", self.registers_name):
            t.normal_(std=1e-6 if c.pos == "learned" else 0.02, generator=generator)
        elif name.startswith("patch_embed."):
            bound = (c.in_channels * c.patch_size**2) ** -0.5
            t.uniform_(-bound, bound, generator=generator)
        elif name == "rope_embed.periods":
            t.copy_(rope_periods(c))
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
        after the final norm. A list of batches (global crops, local crops) with a list of masks -> a list of such
        dicts. H and W may be any multiple of the patch size. Masked patches enter as the mask token.
        """
        if torch.is_tensor(x):
            return self.forward([x], [mask])[0]
        c, masks = self.arch, mask or [None] * len(x)
        grids = [(i.shape[2] // c.patch_size, i.shape[3] // c.patch_size) for i in x]
        tokens = [self.embed(images, m, grid) for images, m, grid in zip(x, masks, grids)]
        shapes = [tuple(t.shape[:2]) for t in tokens]
        flat, ropes = torch.cat([t.flatten(0, 1) for t in tokens]), [None] * len(x)
        rescale, drop = (c.rope_rescale, c.drop_path) if self.training else (0, 0)
        for i, block in enumerate(self.blocks):
            if c.pos == "rope" and (i == 0 or rescale):  # DINOv3 draws a new rescaling per block and resolution
                ropes = [self.rope_embed(*grid, self.draw_rescale(rescale)) for grid in grids]
            kept = [draw_kept(shapes, drop, flat.device) if drop else None for _ in range(2)]
            flat = block(flat, shapes, ropes, kept)
        parts = flat.split([B * N for B, N in shapes])
        return [self.finish(p.view(*shape, -1), local=i == 1) for i, (p, shape) in enumerate(zip(parts, shapes))]

    def draw_rescale(self, r):
        if not r:
            return None
        return torch.empty(1, device=self.rope_embed.periods.device).uniform_(-math.log(r), math.log(r)).exp()

    def embed(self, images, mask, grid):
        """(B, C, H, W) -> (B, 1 + R + N, D): class token, registers, patches in rows."""
        c, (B, _, H, W) = self.arch, images.shape
        assert H % c.patch_size == W % c.patch_size == 0, f"{H} x {W} px is no multiple of the patch, {c.patch_size}"
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
        if c.pos == "learned":
            table = self.pos_embed
            if grid != (c.pos_grid, c.pos_grid):
                table = resample_pos_embed(table, grid, c.pos_antialias, c.pos_offset)
            x = x + table
        if c.registers:  # after the positions: registers have none
            x = torch.cat([x[:, :1], getattr(self, self.registers_name).expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def finish(self, x, local):
        R = 1 + self.arch.registers
        head, patches = x.split([R, x.shape[1] - R], dim=1)
        own = self.arch.local_cls_norm and self.training and local
        head = (self.local_cls_norm if own else self.norm)(head)
        return {"cls": head[:, 0].contiguous(), "registers": head[:, 1:].contiguous(), "patches": self.norm(patches)}


def resample_pos_embed(pos_embed, grid, antialias=True, offset=0.0):
    """
    Bicubic resampling of a learned position table (1, 1 + g*g, D) to `grid` (side, or (h, w)): (1, 1 + h*w, D).

    The class token's slot is kept. offset = 0.1 without antialias is what DINOv2's first models did: the map is
    scaled by (side + 0.1) / g, which is not the same as resampling to `side`. Computed in fp32 (DINOv2,
    interpolate_pos_encoding).
    """
    h, w = (grid, grid) if isinstance(grid, int) else grid
    cls, table = pos_embed.float().split([1, pos_embed.shape[1] - 1], dim=1)
    g = math.isqrt(table.shape[1])
    assert g * g == table.shape[1], f"position table of {table.shape[1]} entries is not square"
    table = table.view(1, g, g, -1).permute(0, 3, 1, 2)
    size = dict(scale_factor=((h + offset) / g, (w + offset) / g)) if offset else dict(size=(h, w))
    table = F.interpolate(table, mode="bicubic", antialias=antialias, **size)
    assert table.shape[2:] == (h, w), (table.shape, h, w)
    return torch.cat([cls, table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(pos_embed.dtype)


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
    weight_norm = True is DINOv2's last layer (logits are cosines while weight_g stays 1), False is DINOv3's plain one.
    """

    def __init__(self, in_dim, prototypes, hidden=2048, bottleneck=256, layers=3, weight_norm=True):
        super().__init__()
        dims = [in_dim] + [hidden] * (layers - 1) + [bottleneck]
        stack = [m for a, b in zip(dims, dims[1:]) for m in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*stack[:-1])
        last = WeightNormLinear if weight_norm else partial(nn.Linear, bias=False)
        self.last_layer = last(bottleneck, prototypes)
        for name, tensor in named_tensors(self):
            self.init_tensor(name, tensor)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """As ViT.init_tensor: normal, std 0.02; the rows of a normalised last layer as torch's linears."""
        if name.endswith("weight_v"):
            t.uniform_(-(t.shape[1] ** -0.5), t.shape[1] ** -0.5, generator=generator)
        elif name.endswith(("weight_g", "bias")):
            t.fill_(name.endswith("weight_g"))
        else:
            nn.init.trunc_normal_(t, std=0.02, generator=generator)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))


# ---- teacher targets and losses, in fp32 whatever the logits' type --------------------------------------------------


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op)
    return x


class _AllGather(torch.autograd.Function):
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
    """Views of (..., M, K) along M; what is made of one, 4 MB in fp32 (a GPU: 32, launches cost), stays in cache."""
    x = tensors[0]
    rows = max((1 << (23 if x.is_cuda else 20)) * x.shape[-2] // max(x.numel(), 1), 1)
    return zip(*(t.split(rows, dim=-2) for t in tensors))


@torch.no_grad()
def sinkhorn(logits, temp, iterations=3):
    """
    Teacher logits (M, K) -> fp32 target probabilities (M, K): every prototype gets an equal share of the batch of all
    ranks, then every row sums to 1, alternately (SwAV, algorithm 1). The usual form rescales the matrix, here E =
    exp(logits / temp) stays fixed (in fp32; bf16 is off by 2e-3) and only its two scaling vectors change; constants
    cancel. A chunk of E serves its rows and the next iteration's prototype sums, and only these K sums cross ranks.
    3379 x 131072 of bf16: 10.6 GB moved (logits read twice, E read three times, written twice) for 72, none held but
    the result. 256 x 32768 on one EPYC core: 2.1 times as fast (bench/losses.py).
    """
    q = torch.empty_like(logits, dtype=torch.float32)
    top = all_reduce(logits.max().float()[None] / temp, dist.ReduceOp.MAX)  # global: a row's own would not cancel
    sums, tiny = q.new_zeros(q.shape[1]), torch.finfo(q.dtype).tiny
    for x, e in _chunks(logits, q):
        torch.add(-top, x, alpha=1 / temp, out=e).exp_()  # top has a dimension: bf16 logits are promoted
        sums.addmv_(e.T, e.new_ones(len(e)))
    for left in reversed(range(iterations)):
        # a prototype or row that underflowed gets nothing, not NaN
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
    """Teacher logits (B, K) -> target probabilities by centring and sharpening (DINO, section 3.1)."""
    return F.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def update_center(center, logits, momentum=0.9):
    """The next center: momentum * center (1, K) + (1 - momentum) * mean of logits (B, K) over all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mean = all_reduce(logits.float().mean(0, keepdim=True)) / world
    return center.lerp(mean, 1 - momentum)


class _CrossEntropy(torch.autograd.Function):
    """
    -sum_k targets log softmax(logits / temp): logits (..., M, K), targets (M, K) whose rows sum to 1 -> (..., M).

    Autograd keeps the fp32 log-softmax and makes more in the backward. But the gradient is (softmax - targets) / temp
    times that of the row's loss, all at hand while the loss is computed: it is made there, in the logits' type, and is
    all that is kept (logits and targets may be freed); the backward scales it in place, and a second one is refused.
    3379 x 131072 of bf16: 5.3 GB moved for 34, 3.6 held at most (targets 1.8) for 6.2. With sinkhorn 1.5 times as fast.
    Off: -(targets * log_softmax(logits.float() / temp, -1)).sum(-1)
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
    Student logits of the global (2B, K) and local (L*B, K) crops against teacher targets (2B, K) -> two scalars to be
    added.

    Each global crop is predicted from the other one and from every local crop: terms are means over images, summed, and
    divided by their number, 2 + 2L (DINOv2; the global pair counts 2).
    """
    B, terms = len(targets) // 2, 2 + 2 * (2 * len(local_logits) // len(targets))
    swapped = targets.roll(B, 0)
    loss_global = cross_entropy(global_logits, swapped, temp).mean() * 2 / terms
    both = (targets[:B] + targets[B:]) / 2  # a local crop meets both targets, and cross-entropy is linear in the target
    local = cross_entropy(local_logits.view(-1, B, local_logits.shape[-1]), both, temp)
    return loss_global, local.mean(1).sum() * 2 / terms


def ibot_loss(logits, targets, weights, crops, temp=0.1):
    """
    Student and teacher at the masked patches (M, K) -> scalar: sum of cross-entropies times weights (M), 1 / (masked
    patches of that crop), over the number of global crops, unmasked ones included (iBOT, equation 2; DINOv2).
    """
    return (cross_entropy(logits, targets, temp) * weights).sum() / crops


def koleo_loss(x):
    """-mean log distance of x (n, D) to its nearest neighbour on the sphere, in the rank (Sablayrolles 2019)."""
    z = F.normalize(x.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


def kde_loss(x, kappa=5.0):
    """
    mean_i [logsumexp_{j != i} kappa z_i.z_j - log(n - 1)] over x (n, D) of all ranks: the log of a von Mises-Fisher
    density estimate at each point, lowest when points spread over the sphere (Wang and Isola 2020, uniformity); n > 1.
    """
    z, first = F.normalize(x.float(), dim=-1), 0
    everyone = z
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone, first = _AllGather.apply(z), dist.get_rank() * len(z)
    own = torch.eye(len(z), len(everyone), dtype=torch.bool, device=z.device).roll(first, 1)
    assert len(everyone) > 1, "a density needs at least two images in the global batch"
    return (kappa * z @ everyone.T).masked_fill(own, -math.inf).logsumexp(1).mean() - math.log(len(everyone) - 1)


def kde_loss_openmidnight(x, kappa=5.0):
    """
    -mean_i log sum_j exp(kappa z_i.z_j) over x (n, D) of this rank, j = i included: OpenMidnight's released code. Its
    sign rewards collapse (lowest when all points coincide); kept to reproduce that run, but in fp32.
    """
    z = F.normalize(x.float(), dim=-1)
    return -((kappa * z @ z.T).exp().sum(1) + 1e-9).log().mean()


# ---- optimisation: parameter groups, schedules ----------------------------------------------------------------------


def param_groups(student, layer_decay=1.0, patch_embed_lr=0.2):
    """
    AdamW groups of a ModuleDict {backbone, *_head}: {"params", "lr_scale", "wd_scale", "last_layer"}.

    DINOv2's rules: no weight decay for biases, norms and layer-scale (tokens, positions and the prototypes do decay);
    the patch embedding learns at 0.2 x; block i of L at layer_decay^(L - i), tokens and patches at layer_decay^(L +
    1).
    """
    depth, groups, seen = len(student["backbone"].blocks), {}, set()
    for name, p in student.named_parameters():
        if not p.requires_grad:
            continue
        module, _, local = name.partition(".")
        layer = int(local.split(".")[1]) if local.startswith("blocks.") else depth if "norm" in local else -1
        lr = layer_decay ** (depth - layer) if module == "backbone" else 1.0
        lr *= patch_embed_lr if "patch_embed" in local else 1.0
        wd = 0.0 if local.endswith("bias") or "norm" in local or "gamma" in local else 1.0
        key = (lr, wd, "last_layer" in local)
        groups.setdefault(key, []).append(p)
        assert id(p) not in seen, f"{name} is in two groups"
        seen.add(id(p))
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    assert seen == trainable, f"{len(seen)} of {len(trainable)} trainable parameters are in a group"
    return [{"params": p, "lr_scale": lr, "wd_scale": wd, "last_layer": last} for (lr, wd, last), p in groups.items()]


def cosine_schedule(step, base, final, total, warmup=0, start=0.0):
    """Linear from `start` to `base` at step warmup - 1, cosine to `final` at `total`, then constant (DINOv2)."""
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    if step >= total:
        return final
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def schedules(step, c, peak_lr):
    """
    What changes with the step, by train.py's keys `c`: {"lr", "last_layer_lr" (of the heads' prototypes), "wd",
    "momentum", "teacher_temp"}, DINOv2's rules; golden/schedules.npz holds them for OpenMidnight's current recipe.
    """
    total, temp = c["schedule_steps"] or c["max_steps"], c["teacher_temp"]
    lr = cosine_schedule(step, peak_lr, c["min_lr"], total, c["warmup_steps"])
    warm = c["teacher_temp_warmup"]
    return {"lr": lr, "last_layer_lr": 0.0 if step < c["freeze_last_layer"] else lr,
            "wd": cosine_schedule(step, c["weight_decay"], c["weight_decay_end"], total),
            "momentum": cosine_schedule(step, c["momentum"], c["momentum_end"], total),
            "teacher_temp": cosine_schedule(step, temp, temp, warm, warm, c["teacher_temp_start"])}


# ---- weight files ---------------------------------------------------------------------------------------------------


def load_backbone(path, arch=None):
    """
    Read a tile encoder: a released DINOv2 or DINOv3 .pth, this project's {"teacher": ...}, OpenMidnight's {"teacher":
    {"backbone.*"}} with chunked block names, or a Hugging Face folder or .safetensors file (weight_files.py). Returns a
    ViT on the CPU in fp32, its configuration read off the tensors and a config.json beside them.

    `arch` (a name in ARCHS or a ViTConfig) is only needed where these do not tell (a head width other than 64) or as a
    check. Raises ValueError naming the file when it is missing, not such a file, or of another architecture.
    """
    state, config = open_weights(path, arch)
    with torch.device("meta"):
        vit = ViT(config)
    whole = {k: weight_files.rows(v).float() for k, v in state.items()}
    vit.load_state_dict(whole, strict=True, assign=True)
    return vit


def open_weights(path, arch=None):
    """
    ({name: tensor}, ViTConfig) of a weight file, with all the names and shapes of that ViT; see load_backbone. Nothing
    is read yet: weight_files.rows takes what it needs from the mapped file, in the file's type.
    """
    state, stored_arch, told = read_weights(path)
    try:
        config = infer_config(path, state, arch or stored_arch, told)
    except (AttributeError, IndexError, KeyError, ValueError) as e:  # shapes or names as no backbone has them
        raise ValueError(str(e) if str(path) in str(e) else f"{path}: of no known layout ({e}); state arch=...")
    if told is not None and config.pos == "rope":  # transformers leaves these two out of its files
        state["rope_embed.periods"] = rope_periods(config)
        if config.local_cls_norm:  # for training only; it starts as the norm that it stands in for
            state |= {f"local_cls_{k}": v.clone() for k, v in state.items() if k.startswith("norm.")}
    with torch.device("meta"):
        ours = ViT(config).state_dict()
    wrong = [k for k in ours.keys() & state.keys() if ours[k].shape != weight_files.shape(state[k])]
    missing, unknown = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    if missing or unknown or wrong:
        lists = [f"{what} {len(k)} ({', '.join(k[:4])})"
                 for what, k in (("missing", missing), ("unknown", unknown), ("other shape", sorted(wrong))) if k]
        raise ValueError(f"{path}: keys do not fit the architecture ({'; '.join(lists)}); state another with arch=...")
    return state, config


def read_weights(path):
    """weight_files.read's (state dict under released names, arch stored in the file or None, told); ValueError."""
    state, arch, told = weight_files.read(path)
    needed = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    if missing := [k for k in needed if k not in state]:
        raise ValueError(f"{path}: no DINOv2 or DINOv3 backbone in this file: it has no {' or '.join(missing)}")
    return state, arch, told


def infer_config(path, state, arch=None, told=None):
    """The ViTConfig that shapes imply; what they cannot tell comes from `told`, `arch` or the family's defaults."""
    if isinstance(arch, str) and arch not in ARCHS:
        raise ValueError(f"unknown arch '{arch}'; known: {', '.join(ARCHS)}")
    D, C, p, _ = state["patch_embed.proj.weight"].shape
    rope = "rope_embed.periods" in state or "storage_tokens" in state or (told or {}).get("pos") == "rope"
    tokens = state.get("storage_tokens" if rope else "register_tokens")
    swiglu = "blocks.0.mlp.w3.weight" in state
    hidden = state["blocks.0.mlp.w3.weight"].shape[1] if swiglu else len(state.get("blocks.0.mlp.fc1.weight", ()))
    found = dict(patch_size=p, embed_dim=D, in_channels=C, pos="rope" if rope else "learned", ffn_hidden=hidden,
                 depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
                 ffn="swiglu" if swiglu else "mlp", registers=0 if tokens is None else tokens.shape[1],
                 qkv_bias=any(k.endswith("attn.qkv.bias") for k in state))
    if "rope_embed.periods" in state:
        found["num_heads"] = D // (4 * len(state["rope_embed.periods"]))
    if told is None:
        told = dict(local_cls_norm="local_cls_norm.weight" in state)
    elif rope and arch is None and "num_heads" not in told:
        raise ValueError(f"{path}: no config.json beside it, which tells the heads; put it there or state arch=...")
    found |= told
    old = not rope and not found["registers"]
    guess = ViTConfig(num_heads=max(D // 64, 1), norm_eps=1e-5 if rope else 1e-6, mask_k_bias=rope,
                      pos_antialias=not old, pos_offset=0.1 * old)
    base = guess if arch is None else ARCHS[arch] if isinstance(arch, str) else arch
    asked = arch if isinstance(arch, str) else "the given config"
    for key, value in found.items():
        if arch is not None and getattr(base, key) != value and key not in ("pos_antialias", "pos_offset"):
            raise ValueError(f"{path}: weights of another architecture: {key} is {value} in the file, "
                             f"{getattr(base, key)} in {asked}")
    grid = math.isqrt(state["pos_embed"].shape[1] - 1) if "pos_embed" in state else base.pos_grid
    return replace(base, **found, pos_grid=grid)


def first_weights(path, c, pos_embed_init="resample"):
    """
    {name: tensor} that a ViT of configuration `c` starts its training from, as open_weights. The learned position table
    is resampled to its grid, or left out, to be drawn, with pos_embed_init = "random" (OpenMidnight's released run).
    """
    state, _ = open_weights(path, c)
    if c.pos == "learned" and pos_embed_init == "random":
        del state["pos_embed"]
    elif c.pos == "learned" and state["pos_embed"].shape[1] != 1 + c.pos_grid**2:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"].float(), c.pos_grid, c.pos_antialias, c.pos_offset)
    return state


def read_header(path):
    """What this project's teacher file states about itself: {"arch", "step", "config"}; {} for any other file."""
    stored = {} if weight_files.is_hugging_face(path) else weight_files.read_pth(path)
    return {k: stored[k] for k in ("arch", "step", "config") if k in stored} if "teacher" in stored else {}
