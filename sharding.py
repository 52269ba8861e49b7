"""
How student and teacher are spread over the ranks, and what a block keeps for its backward.

All of it is applied from outside, in this order. model.py knows nothing of it, and parameters keep their names:

    with torch.device("meta"):               shapes without memory
        net = build()
    checkpoint_activations, compile_blocks   change a block's forward
    shard                                    FSDP2: each block is a group, the rest of the backbone one, each head one
    materialize                              memory for this rank's rows, filled with NaN, then first values

At most one tensor is whole at a time. materialize draws it, or takes this rank's rows of a mapped weight file, which a
node reads once for all its ranks; gathered brings a network to rank 0's host memory tensor by tensor.
"""
import atexit
import functools
import math
import os
import time
import zlib
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import all_reduce, named_tensors
from rundir import agree

CHECKPOINTING = ("none", "selective", "full")
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = {  # what they call rank, rank on the node, and ranks
    "srun --kill-on-bad-exit=1": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),  # as torchrun and mpirun do
    "mpiexec": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")}
JOIN = timedelta(minutes=5)  # for all ranks to meet; collectives have longer
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default,  # addmm: mm with a bias
            aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default}


def launched():
    """(world, rank) as torchrun or a batch script states them; (1, 0) without one."""
    world, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK") or "0"
    if not (world.isdecimal() and rank.isdecimal() and int(world)):
        raise SystemExit(f"WORLD_SIZE = {world!r}, RANK = {rank!r}: these must be numbers, 1 or more and 0 or more")
    return int(world), int(rank)


def check_launch(world, rank, dev):
    """SystemExit if ranks would wait for each other forever, or if each task would be a run of its own."""
    for command, (task, on_node, tasks) in LAUNCHERS.items():
        number, count = os.environ.get(task) or "0", os.environ.get(tasks) or "1"
        if not os.environ.get("RANK") and (number, count) != ("0", "1"):
            raise SystemExit(f"{task} = {number}, {tasks} = {count} without RANK: each task would be a run of its own; "
                             f"launch with {command} bash -c 'MASTER_ADDR=HOST MASTER_PORT=29500 RANK=${task} "
                             f"LOCAL_RANK=${on_node} WORLD_SIZE=${tasks} python ...', HOST being the first node; for "
                             "one process, unset both")
    needed = (*LAUNCH, "LOCAL_RANK") if dev == "cuda" else LAUNCH
    missing = [name for name in needed if not os.environ.get(name)]
    port = os.environ.get("MASTER_PORT") or "0"
    sound = port.isdecimal() and int(port) < 2**16 and rank < world
    if 0 < len(missing) < len(needed) or not sound:
        raise SystemExit(f"rank {rank} of {world} ranks, MASTER_PORT = {port}, not set: {', '.join(missing) or 'none'};"
                         f" launch with torchrun --nproc_per_node=N, or set all of {', '.join(needed)}; for one "
                         "process, set none")


@functools.cache
def linger():
    """
    Once per process: let gloo's threads drop the tensors that they sent before Python ends. Python 3.11 ends a thread
    that asks for the GIL later, and on a busy machine one in twenty finished runs ended with "terminate called".
    """
    atexit.register(time.sleep, 0.5)


def mesh_shape(world, hybrid):
    """(ranks,), or with `hybrid` (nodes, ranks of a node as torchrun states them). FSDP2 shards over the last."""
    if not hybrid:
        return (world,)
    on_node = os.environ.get("LOCAL_WORLD_SIZE") or ("1" if world == 1 else "0")
    if not on_node.isdecimal() or not int(on_node) or world % int(on_node):
        raise SystemExit(f"LOCAL_WORLD_SIZE = {on_node} of {world} ranks: hybrid = True needs the same number of ranks "
                         "on each node, as torchrun states it; hybrid = False shards over all of them")
    return world // int(on_node), int(on_node)


def begin(dev, hybrid=False):
    """Join the processes of a launch, "cuda" or "cpu": their DeviceMesh. Without torchrun it is one process."""
    world, rank = launched()
    check_launch(world, rank, dev)
    shape = mesh_shape(world, hybrid)
    if dev == "cuda":
        gpu, gpus = os.environ.get("LOCAL_RANK") or "0", torch.cuda.device_count()
        if not gpu.isdecimal() or int(gpu) >= gpus:
            raise SystemExit(f"LOCAL_RANK = {gpu}, and this process sees {gpus} GPUs: it needs one rank per GPU of a "
                             "node, all of which each rank sees")
        torch.cuda.set_device(int(gpu))
    else:
        torch.set_num_threads(1)  # results depend on the number of threads, and busy cores slow several of them down
    linger()
    store = dist.HashStore()
    if os.environ.get("RANK"):
        try:
            store = next(dist.rendezvous("env://", rank, world, timeout=JOIN))[0]
        except dist.DistError as e:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise SystemExit(f"rank {rank} of {world} ranks met no other at {place} within {JOIN}: choose a free "
                             "MASTER_PORT, MASTER_ADDR as all nodes know the first one, and start all ranks ("
                             f"{str(e).splitlines()[0]})") from None
        store.set_timeout(timedelta(minutes=30))
    dist.init_process_group("nccl" if dev == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(minutes=30))  # NCCL's 10 are short for rank 0 to read 7.4 GB of BACH
    if hybrid and len(set(agree("", lambda: shape))) > 1:
        raise SystemExit("LOCAL_WORLD_SIZE differs between nodes: hybrid = True needs the same number of ranks on "
                         "each; hybrid = False shards over all of them")
    return init_device_mesh(dev, shape, mesh_dim_names=("nodes", "ranks")[-len(shape):])


def products_only(context, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks, mode):
    """
    Activation checkpointing (Chen et al. 2016). Usually every operation of a block's forward saves what its backward
    needs: 11 D + 4 H numbers per token (D width, H hidden width of a SwiGLU). Instead, the backward computes it again.
    With "full" it starts from the block's input, D numbers, at the cost of another forward. With "selective" results of
    matrix products and attention are kept too, 7 D + 2 H numbers, and only elementwise work is repeated. These are the
    same operations on the same numbers, so gradients are equal to the bit. No generator's state is kept, because a
    block draws no random numbers. Off: "none".
    """
    assert mode in CHECKPOINTING, mode
    if mode == "none":
        return
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, products_only)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def compile_blocks(blocks):
    """
    torch.compile of the blocks' forward; FSDP2's hooks stay outside. Shapes are static, so all blocks of the student
    share one graph and those of the teacher another, both compiled in the first step. Elementwise work is fused.
    Without, a ViT-g step moves 604 GB for it, or 765 if blocks are computed again: 180 and 228 ms at the 3.35 TB/s of
    an H100 (counted on meta tensors by bench/blocks.py of commit d48e104; no GPU has measured it).
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)


def shard(net, mesh, bf16, trained, prefetch=1):
    """
    FSDP2 for a ModuleDict {backbone, *_head}. Shards are in fp32; with `bf16` they are gathered and computed in bf16,
    and gradients are reduced in fp32. While a block computes, `prefetch` others are gathered.
    """
    types = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    policy = partial(MixedPrecisionPolicy, **types)
    blocks = list(net["backbone"].blocks)
    for block in blocks:  # inputs are in bf16 already, and the rotary angles must stay in fp32
        fully_shard(block, mesh=mesh, mp_policy=policy(cast_forward_inputs=False))
    for part in net.values():
        # the teacher has no backward after which its parts would be resharded. unless told to, they would stay
        # gathered: a second copy in memory, to which the average would be written, and lost at the next save
        fully_shard(part, mesh=mesh, mp_policy=policy(), reshard_after_forward=None if trained else True)
    for i, block in enumerate(blocks) if prefetch else ():
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(i - prefetch, 0) : i][::-1])


# ---- memory and values ----------------------------------------------------------------------------------------------


def local(t):
    """This rank's rows of a sharded tensor; a plain tensor (a buffer) itself."""
    return getattr(t, "_local_tensor", t)


@torch.no_grad()
def materialize(net, device, seed, backbone=None):
    """
    Memory on `device` and first values for a ModuleDict {backbone, *_head} that was built on meta.

    Memory is filled with NaN, so that a forgotten tensor shows in the first loss. A tensor of the backbone takes its
    rows from `backbone` ({name: tensor}, model.first_weights) if it is named there. Any other is drawn by init_tensor,
    from a seed that is made of `seed` and its name: values do not depend on the number of ranks.
    """
    net.to_empty(device=device)
    for _, t in named_tensors(net):
        local(t).fill_(math.nan)
    for part, module in net.items():
        given = backbone or {} if part == "backbone" else {}
        for name, t in named_tensors(module):
            copy_rows(t, given[name] if name in given else draw(module, f"{part}.{name}", t.shape, device, seed))


def draw(module, name, shape, device, seed):
    """The whole tensor `name`, "part.name in the module", drawn on `device`."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0].item()
    whole = torch.full(shape, math.nan, device=device)
    module.init_tensor(name.partition(".")[2], whole, torch.Generator(device).manual_seed(entropy))
    return whole


def copy_rows(t, whole):
    """Copy this rank's rows of `whole` to t. FSDP2 shards the first dimension in equal chunks, rounded up."""
    mine = local(t)
    if mine is not t:
        rows, rank = math.ceil(len(t) / t.device_mesh.shape[-1]), t.device_mesh.get_coordinate()[-1]
        whole = whole[rank * rows : (rank + 1) * rows]
    assert whole.shape == mine.shape, (whole.shape, mine.shape)  # copy_ would broadcast
    mine.copy_(whole)


@torch.no_grad()
def copy_net(target, source):
    """Memory for `target`, built on meta and sharded like `source`, and the values of `source`."""
    target.to_empty(device=local(next(source.parameters())).device)
    for (_, a), (_, b) in zip(named_tensors(target), named_tensors(source), strict=True):
        local(a).copy_(local(b))


def gathered(module):
    """
    Yield (name, tensor) of a sharded module's state dict: the whole tensor in host memory on rank 0, None on the other
    ranks. A collective. On the device at most one tensor is whole, 0.27 GB for the largest of the 7B's backbone.
    """
    for name, t in module.state_dict().items():
        whole = t.full_tensor() if hasattr(t, "full_tensor") else t
        host = whole.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
        del whole  # before the next one comes
        yield name, host


# ---- a step's arithmetic on shards: optimizer, clipping, teacher average --------------------------------------------


def adamw(groups, betas, dev):
    """
    AdamW with its moments from the start, so that every checkpoint is complete. The loop sets `found_inf`: a step that
    is not finite then leaves weights and moments as they were, without waiting for the device.
    """
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)  # others do not read found_inf and would write NaN
    for p in (p for group in groups for p in group["params"]):
        optimizer.state[p] = {"step": torch.zeros((), device=dev), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def update_ema(teacher, student, momentum, wanted=None):
    """
    teacher = momentum * teacher + (1 - momentum) * student, in place, on this rank's shards of each parameter.

    If `wanted`, a bool on the device, is False, the teacher stays as it is: so a step can be skipped without waiting
    for the device. With `wanted`, CUDA averages one tensor per launch, some hundred launches; the bits are equal.
    """
    t = [local(p) for p in teacher.parameters()]
    s = [local(p) for p in student.parameters()]
    assert [p.shape for p in t] == [p.shape for p in s], "teacher and student are not sharded alike"
    share = 1 - momentum
    torch._foreach_lerp_(t, s, share if wanted is None else [torch.where(wanted, share, 0.0)] * len(t))


@torch.no_grad()
def clip_gradients(student, max_norm):
    """
    Clip the gradient of each part of a ModuleDict to the norm max_norm, in place, as DINOv2 does; 0 leaves them.

    Norms are global, summed over ranks. Returns (parts,) norms before clipping, the same on every rank.
    """
    mesh = getattr(next(student.parameters()), "device_mesh", None)
    copies = mesh.size() / mesh.shape[-1] if mesh else 1  # nodes of a hybrid mesh, as each adds the same squares
    grads = []
    for part in student.values():
        grads.append([local(p.grad) for p in part.parameters() if p.grad is not None])
    squares = [torch.stack(torch._foreach_norm(g)).square().sum() for g in grads]
    norms = (all_reduce(torch.stack(squares)) / copies).sqrt()
    for g, norm in zip(grads, norms) if max_norm else ():
        torch._foreach_mul_(g, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norms
