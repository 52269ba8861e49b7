"""
The formula sheet of a run: parameters, FLOPs, memory, disk and time on one GPU, before one is rented.

    python train.py config/vitg.py --dry_run=true --world_size=8 --step_seconds=0.72

Memory is an estimate in bytes per rank: it counts model.py's tensors at the moments of a step when most is held. It
leaves out what torch.compile saves and the allocator's fragments. Whoever edits Block edits block_bytes too; until
then the estimate is off, and nothing else: a run only warns. tests/test_budget.py measures it on a CPU.
"""
import math
import os

import torch

import checkpoint
import data
import model

CONTEXT = 2e9  # bytes of CUDA's context, libraries and NCCL's buffers; a guess
MODES = ("none", "selective", "full")
SUMMARY = """\
{arch}: {backbone:,.1f} M parameters, heads {heads:,.1f} M
batch: {batch_size} images x {world} ranks = {images}; {max_steps:,} steps are {total:,} images
"""
DETAILS = """\
tokens: {tokens:,} per rank, {kept_tokens:,} of them in each residual branch; {masked:,} masked patches
compute: {tflop:.4g} TFLOP per step and rank (student {cost[student]:.4g}, teacher {cost[teacher]:.4g}, heads \
{cost[heads]:.4g}), and {recomputed_tflop:.4g} to compute blocks again
learning rate: {peak_lr:.4g} at its peak = {base_lr:g} x sqrt({images} / 1024)
memory per rank in GB, at the fullest moment: {parts}
memory by activation_checkpointing: none {by_mode[none]:.3g}   selective {by_mode[selective]:.3g}   \
full {by_mode[full]:.3g}
disk: {checkpoints} checkpoints of {checkpoint_gb:.3g} GB and {teachers} teachers of {teacher_gb:.3g} GB stay; at \
most {disk_gb:.3g} GB, while a new one is written
"""


def crops(config, arch):
    """[(crops, tokens of each, crops that take part in a residual branch)], global crops first."""
    views = [(2, config["global_px"]), (config["local_crops"], config["local_px"])]
    found = []
    for count, px in views:
        total = count * config["batch_size"]
        tokens = (px // arch.patch_size) ** 2 + 1 + arch.registers
        found += [(total, tokens, max(int(total * (1 - config["drop_path"])), 1))] if total else []
    return found


def masked_patches(config, arch):
    """Masked patches of a rank's batch: a constant, so that shapes are static."""
    grid = config["global_px"] // arch.patch_size
    return sum(data.mask_counts(2 * config["batch_size"], grid, config["mask_prob"], config["mask_ratio"]))


def tflop(config, arch):
    """TFLOP of a step per rank, two per multiply-add, matrix products only: {"student", "teacher", "heads"}."""
    width = arch.embed_dim
    ffn = (3 if arch.ffn == "swiglu" else 2) * arch.ffn_hidden
    seen = crops(config, arch)

    def forward(views, column):  # 0: all crops take part in each branch, 2: those that drop path keeps
        total = 0
        for view in views:
            tokens = view[1]
            block = tokens * (8 * width**2 + 2 * ffn * width + 4 * tokens * width)
            patches = view[0] * (tokens - 1 - arch.registers)
            embedding = 2 * arch.in_channels * arch.patch_size**2 * width
            total += arch.depth * view[column] * block + patches * embedding
        return total / 1e12

    heads = 0
    rows = {"dino": (3 * (2 + config["local_crops"]) + 2) * config["batch_size"],
            "ibot": 4 * masked_patches(config, arch)}
    for name, count in rows.items():
        inner, out = config[f"{name}_hidden"], config[f"{name}_bottleneck"]
        products = width * inner + inner**2 + inner * out + out * config[f"{name}_prototypes"]
        heads += count * 2 * products / 1e12
    return {"student": 3 * forward(seen, 2), "teacher": forward(seen[:1], 0), "heads": heads}


def block_bytes(config, arch, mode, size):
    """(what a block keeps for its backward, what its backward holds beside that), `size` bytes per number."""
    width, hidden, gated = arch.embed_dim, arch.ffn_hidden, arch.ffn == "swiglu"
    dropping = config["drop_path"] > 0
    tokens = sum(count * each for count, each, _ in crops(config, arch))
    branch = sum(kept * each for _, each, kept in crops(config, arch))
    rows = 16 * branch * dropping  # int64 indices of both branches
    # two norms and their outputs, qkv, attention, projection and two scaled branches: 11 widths; rope keeps rotated
    # copies of q and k; a SwiGLU keeps both halves, the activation and the product; statistics are fp32
    numbers = 11 * width + (4 if gated else 2) * hidden
    if arch.pos == "rope":
        numbers += 2 * width
    none = size * branch * numbers + 4 * branch * (arch.num_heads + 4) + rows
    kept = none
    if mode != "none":
        kept = size * tokens * width + rows
    if mode == "selective":  # the products too
        products = 6 * width + (2 if gated else 1) * hidden
        kept += size * branch * products + 4 * branch * arch.num_heads
    widest = 2 * hidden - width if gated else hidden
    working = size * (tokens * width + branch * (width * dropping + widest))
    return kept, working + none - kept


def head_bytes(config, arch, size):
    """Of both heads when losses are computed: activations, logits, the logits' gradients, targets, and a work space."""
    held, work = 0, 0
    batch, masked = config["batch_size"], masked_patches(config, arch)
    for name, rows, targets in (("dino", (2 + config["local_crops"]) * batch, 2 * batch), ("ibot", masked, masked)):
        prototypes, bottleneck = config[f"{name}_prototypes"], config[f"{name}_bottleneck"]
        inner = arch.embed_dim + 4 * config[f"{name}_hidden"] + 2 * bottleneck
        held += size * rows * (inner + 2 * prototypes)
        held += 4 * targets * prototypes
        if config["head_weight_norm"]:  # normalised prototypes
            held += bottleneck * prototypes * (size + 4 * (size == 2))
        part = 3 * (1 << (23 if size == 2 else 20))  # three fp32 copies of one of model.py's _chunks
        work = max(work, 4 * min(part, 2 * rows * prototypes))
    return held + work


def shards(config, world):
    """Ranks over which a network is sharded: all, or those of a node, 8 unless a launch states another number."""
    return min(world, int(os.environ.get("LOCAL_WORLD_SIZE") or 8)) if config["hybrid"] else world


def numbers(part):
    return sum(p.numel() for p in part.parameters())


def memory(config, net, world, mode, size):
    """
    {moment: {part: bytes}} of a step on each of `world` ranks that share a network; `net` is model.build's ModuleDict,
    `size` the bytes of a computed number.
    """
    arch, batch = net["backbone"].arch, config["batch_size"]
    backbone, block = numbers(net["backbone"]), numbers(net["backbone"].blocks[0])
    rest = backbone - arch.depth * block
    heads = numbers(net) - backbone
    whole = 4 * numbers(net) / world
    always = {"parameters": whole, "optimizer": 2 * whole, "teacher": whole}
    seen = crops(config, arch)
    tokens = sum(count * each for count, each, _ in seen)
    tokens_of_global = seen[0][0] * seen[0][1]
    pixels = 2 * config["global_px"] ** 2 + config["local_crops"] * config["local_px"] ** 2
    inputs = 3 * batch * pixels * (4 + 2 * (size == 2))
    inputs += size * arch.embed_dim * (2 * tokens + tokens_of_global)
    kept, working = block_bytes(config, arch, mode, size)
    full = inputs + arch.depth * kept
    buffers = size * (rest + block) + 4 * heads + size * arch.embed_dim * arch.ffn_hidden
    ahead = 0 if world == 1 else size * block * max(config["prefetch"], 1)
    reduced = 4 * block if arch.depth > 1 else 0
    return {
        "losses": {**always, "gathered": size * (rest + heads), "activations": full,
                   "heads": head_bytes(config, arch, size)},
        "last block": {**always, "gradients": 4 * (heads + block) / world, "gathered": buffers + ahead,
                       "activations": full + working},
        "first block": {**always, "gradients": whole - 4 * rest / world, "gathered": buffers + reduced,
                        "activations": inputs + kept + working},
        "optimizer": {**always, "gradients": whole}}


def stay(config, keep):
    """How many checkpoints or exports an uninterrupted run leaves, where the newest `keep` stay (0 = all)."""
    interval, last = config["save_interval"], config["max_steps"]
    steps = [*range(interval, last, interval), last] if interval else [last]
    return len(steps) - len(checkpoint.needless(steps, keep, config["keep_every"]))


def disk(config, checkpoint_gb, teacher_gb):
    """How many checkpoints and teachers a run leaves on its disk, and GB at most: an old one goes after a new one."""
    checkpoints, teachers = stay(config, config["keep_checkpoints"]), stay(config, config["keep_teachers"])
    most = (checkpoints + (config["keep_checkpoints"] > 0)) * checkpoint_gb
    most += (teachers + (config["keep_teachers"] > 0)) * teacher_gb
    return {"checkpoints": checkpoints, "teachers": teachers, "disk_gb": most}


def estimate(config, world=1):
    """What a run with train.py's keys costs on each of `world` ranks, as a dict of numbers; memory in GB by mode."""
    with torch.device("meta"):
        net = model.build(config)
    arch, images = net["backbone"].arch, config["batch_size"] * world
    on_gpu = config["device"] != "cpu"
    by_mode, parts = {}, {}
    for mode in MODES:
        moments = memory(config, net, shards(config, world), mode, 2 if on_gpu else 4)
        parts[mode] = max(moments.values(), key=lambda held: sum(held.values()))
        by_mode[mode] = (sum(parts[mode].values()) + CONTEXT * on_gpu) / 1e9
    mode = config["activation_checkpointing"]
    cost, seen = tflop(config, arch), crops(config, arch)
    backbone, everything = numbers(net["backbone"]), numbers(net)
    sizes = {"checkpoint_gb": 16e-9 * everything, "teacher_gb": 4e-9 * backbone}
    return {
        "backbone": backbone / 1e6, "heads": (everything - backbone) / 1e6, "images": images,
        "tokens": sum(count * each for count, each, _ in seen),
        "kept_tokens": sum(kept * each for _, each, kept in seen), "masked": masked_patches(config, arch),
        "cost": cost, "tflop": sum(cost.values()), "recomputed_tflop": cost["student"] / 3 if mode == "full" else 0.0,
        "by_mode": by_mode, "memory_gb": by_mode[mode],
        "memory_parts": {name: held / 1e9 for name, held in parts[mode].items()},
        "peak_lr": config["base_lr"] * math.sqrt(images / 1024),
        **sizes, **disk(config, **sizes)}


def report(config, world, limit_gb, details=True):
    """
    (text of a dry run, a warning or ""): what `estimate` says, against `limit_gb` of memory where that is not 0. The
    start of a run leaves out the details.
    """
    found = estimate(config, world)
    total = config["max_steps"] * found["images"]
    parts = ", ".join(f"{name} {held:.3g}" for name, held in found["memory_parts"].items())
    text = SUMMARY + DETAILS * details
    text = text.format(**{**config, **found}, world=world, total=total, parts=parts)
    seconds = config["step_seconds"]
    if seconds:
        flops, hours = found["tflop"] / seconds, config["max_steps"] * seconds / 3600
        text += (f"at {seconds:g} s per step: MFU {flops / config['gpu_tflops']:.1%} of {config['gpu_tflops']:g} "
                 f"TFLOP/s, {found['images'] / seconds:.0f} images/s, {hours:.1f} hours\n")
    held = found["memory_gb"]
    if limit_gb and held > limit_gb:
        warning = (f"does not fit: about {held:.1f} of {limit_gb:.3g} GB per GPU; try "
                   "--activation_checkpointing=selective or full, a smaller --batch_size, or more ranks")
        return text + warning, warning
    return text + (f"fits: about {held:.3g} GB per GPU" if limit_gb else f"memory: about {held:.3g} GB per rank"), ""
