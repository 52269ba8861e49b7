"""
How student and teacher come to lie on the ranks, and what a block keeps for its backward. Applied from outside, in the
order in which each must see the one before; model.py knows of none of it, and parameters keep their names:

    with torch.device("meta"):               shapes, no memory
        net = build()
    checkpoint_activations, compile_blocks   change a block's forward
    shard                                    FSDP2: each block a group, the rest of the backbone one, each head one
    materialize                              memory for this rank's rows, NaN in it, then first values

Nothing whole ever exists but one tensor at a time: materialize draws it, or takes this rank's rows of a mapped weight
file, which a node reads once for all its ranks; gathered brings a net to rank 0's host memory tensor by tensor.
"""
import math
import zlib
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import weight_files
from model import all_reduce, named_tensors

CHECKPOINTING = ("none", "selective", "full")
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default,  # addmm: mm with a bias
            aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default}


def products_only(context, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks, mode):
    """
    Activation checkpointing (Chen et al. 2016). Instead of keeping what every operation of a block's forward saves, the
    backward computes it again from what was kept: with "full" the block's input, 1 D of 11 D + 4 H a token (D width, H
    hidden width of a SwiGLU), for another forward; with "selective" the input and all results of matrix products and
    attention, 7 D + 2 H, for the elementwise work alone. The same operations on the same numbers: gradients are equal
    to the bit. A block draws no random numbers, so no generator's state is kept either. Off: "none".
    """
    assert mode in CHECKPOINTING, mode
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, products_only)}
    for block in blocks if mode != "none" else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                                **contexts if mode == "selective" else {})


def compile_blocks(blocks):
    """
    torch.compile of the blocks' forward, FSDP2's hooks left outside: shapes are static and all blocks share one graph a
    use (student, teacher), compiled in the first step. Fuses the elementwise work, where a ViT-g step moves 329 GB.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)


def shard(net, mesh, bf16, trained, prefetch=1):
    """
    FSDP2 over all ranks of a ModuleDict {backbone, *_head}: fp32 shards; with `bf16` gathered and computed in bf16 and
    reduced in fp32. While a block computes, the next `prefetch` blocks, in backward those before, are being gathered.
    """
    types = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    policy = partial(MixedPrecisionPolicy, **types)
    blocks = list(net["backbone"].blocks)
    for block in blocks:  # inputs are in bf16 already, and the rotary angles must stay in fp32
        fully_shard(block, mesh=mesh, mp_policy=policy(cast_forward_inputs=False))
    for part in net.values():
        # without a backward to do it, the teacher's own parts stay gathered unless told to reshard: a second copy in
        # memory, and an average that is written to the copy and lost at the next save
        fully_shard(part, mesh=mesh, mp_policy=policy(), reshard_after_forward=None if trained else True)
    for i, block in enumerate(blocks) if prefetch else ():
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(i - prefetch, 0) : i][::-1])


# ---- memory and values ----------------------------------------------------------------------------------------------


def local(t):
    """This rank's rows of a sharded tensor; a plain one (a buffer) itself."""
    return getattr(t, "_local_tensor", t)


def own_rows(t):
    """(start, stop) of this rank's rows in the whole tensor: FSDP2 shards the first dimension in even chunks."""
    if local(t) is t:
        return 0, None
    rows, rank = math.ceil(len(t) / t.device_mesh.size()), t.device_mesh.get_local_rank()
    return rank * rows, (rank + 1) * rows


@torch.no_grad()
def materialize(net, device, seed, backbone=None):
    """
    Memory on `device` for a ModuleDict {backbone, *_head} that was built on meta; NaN everywhere, so that a forgotten
    tensor shows in the first loss; then first values: the rows of `backbone` ({name: tensor}, model.first_weights)
    where it has the name, else init_tensor's draw, from a seed of its own (`seed` and the name), the same on any number
    of ranks.
    """
    net.to_empty(device=device)
    for _, t in named_tensors(net):
        local(t).fill_(math.nan)
    for part, module in net.items():
        given = backbone or {} if part == "backbone" else {}
        for name, t in named_tensors(module):
            copy_rows(t, given[name] if name in given else draw(module, f"{part}.{name}", t.shape, device, seed))


def draw(module, name, shape, device, seed):
    """The whole tensor of that name, drawn on `device`."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0].item()
    whole = torch.full(shape, math.nan, device=device)
    module.init_tensor(name.partition(".")[2], whole, torch.Generator(device).manual_seed(entropy))
    return whole


def copy_rows(t, whole):
    rows = weight_files.rows(whole, *own_rows(t))
    assert rows.shape == local(t).shape, (rows.shape, local(t).shape)  # copy_ would broadcast
    local(t).copy_(rows)


@torch.no_grad()
def copy_net(target, source):
    """Memory and values of `source`, sharded alike, for `target`, which was built on meta."""
    target.to_empty(device=local(next(source.parameters())).device)
    for (_, a), (_, b) in zip(named_tensors(target), named_tensors(source), strict=True):
        local(a).copy_(local(b))


def gathered(module):
    """
    Yield (name, whole tensor in rank 0's host memory, None on other ranks) of a sharded module's state dict. A
    collective. On the device there is never more than one whole tensor, 0.27 GB for the largest of the 7B's backbone.
    """
    for name, t in module.state_dict().items():
        whole = t.full_tensor() if hasattr(t, "full_tensor") else t
        host = whole.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
        del whole  # before the next one comes
        yield name, host


# ---- a step's arithmetic over shards: clipping, teacher average ------------------------------------------------------


@torch.no_grad()
def update_ema(teacher, student, momentum, wanted=None):
    """
    teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter, on this rank's shards. Where
    `wanted`, a bool on the device, is False, the teacher stays: a skipped step needs no look at the device. (With it,
    CUDA averages tensor by tensor, some hundred launches; the bits are the same.)
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    t, s = zip(*((getattr(a, "_local_tensor", a), getattr(b, "_local_tensor", b)) for a, b in pairs))
    assert all(a.shape == b.shape for a, b in zip(t, s)), "teacher and student are not sharded alike"
    share = 1 - momentum
    torch._foreach_lerp_(t, s, share if wanted is None else [torch.where(wanted, share, 0.0)] * len(t))


@torch.no_grad()
def clip_gradients(student, max_norm):
    """
    Clip every part of a ModuleDict to a gradient norm of max_norm (0 = leave them), in place, each on its own as
    DINOv2. Norms are over all ranks' shards. Returns the norms before clipping (parts,), the same on every rank.
    """
    grads = [[getattr(p.grad, "_local_tensor", p.grad) for p in part.parameters() if p.grad is not None]
             for part in student.values()]
    norms = all_reduce(torch.stack([torch.stack(torch._foreach_norm(g)).square().sum() for g in grads])).sqrt()
    for g, norm in zip(grads, norms):
        if max_norm:
            torch._foreach_mul_(g, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norms
