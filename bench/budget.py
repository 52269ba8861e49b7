"""
The formula sheet of a run: parameters, FLOPs, memory and time on one GPU, before one is rented.

    python train.py config/vitg.py --dry_run=true --world_size=8 --step_seconds=0.72

Memory is an estimate in bytes per rank: it counts model.py's tensors at the moments of a step when most is held. It
leaves out what torch.compile saves and the allocator's fragments. Whoever edits Block edits block_bytes too; until
then the estimate is off, and nothing else: a run only warns. tests/test_budget.py measures it on a CPU.
"""
import math

import torch

import data
import model

CONTEXT = 2e9  # bytes of CUDA's context, libraries and NCCL's buffers; a guess
MODES = ("none", "selective", "full")


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
    width, hidden, patch_size = arch.embed_dim, arch.ffn_hidden, arch.patch_size
    ffn = (3 if arch.ffn == "swiglu" else 2) * hidden

    def forward(views, column):
        total = 0
        for view in views:
            tokens, count = view[1], view[column]
            block = tokens * (8 * width**2 + 2 * ffn * width + 4 * tokens * width)
            patches = view[0] * (tokens - 1 - arch.registers)
            total += arch.depth * count * block + patches * 2 * arch.in_channels * patch_size**2 * width
        return total / 1e12

    heads = 0
    views = 2 + config["local_crops"]
    rows = {"dino": (3 * views + 2) * config["batch_size"], "ibot": 4 * masked_patches(config, arch)}
    for name, count in rows.items():
        inner, out = config[f"{name}_hidden"], config[f"{name}_bottleneck"]
        heads += count * 2 * (width * inner + inner**2 + inner * out + out * config[f"{name}_prototypes"]) / 1e12
    seen = crops(config, arch)
    return {"student": 3 * forward(seen, 2), "teacher": forward(seen[:1], 0), "heads": heads}


def block_bytes(config, arch, mode, size):
    """(what a block keeps for its backward, what its backward holds beside that), `size` bytes per number."""
    width, hidden, gated, rope = arch.embed_dim, arch.ffn_hidden, arch.ffn == "swiglu", arch.pos == "rope"
    dropping = config["drop_path"] > 0
    tokens = sum(count * each for count, each, _ in crops(config, arch))
    branch = sum(kept * each for _, each, kept in crops(config, arch))
    rows = 16 * branch * dropping  # int64 indices of both branches
    # two norms and their outputs, qkv, attention, projection and two scaled branches: 11 widths; rope keeps rotated
    # copies of q and k; a SwiGLU keeps both halves, the activation and the product; statistics are fp32
    none = size * branch * (11 * width + 2 * width * rope + (4 if gated else 2) * hidden)
    none += 4 * branch * (arch.num_heads + 4) + rows
    products = size * branch * (6 * width + (2 if gated else 1) * hidden) + 4 * branch * arch.num_heads
    kept = {"none": none, "selective": size * tokens * width + products + rows, "full": size * tokens * width + rows}
    widest = 2 * hidden - width if gated else hidden
    working = size * (tokens * width + branch * (width * dropping + widest))
    return kept[mode], working + none - kept[mode]


def memory(config, net, world, mode, size):
    """{moment: {part: bytes}} of a step; `net` is model.build's ModuleDict, `size` the bytes of a computed number."""
    arch, batch = net["backbone"].arch, config["batch_size"]
    whole = {name: sum(p.numel() for p in part.parameters()) for name, part in net.items()}
    block = sum(p.numel() for p in net["backbone"].blocks[0].parameters())
    rest = whole["backbone"] - arch.depth * block
    shard = 4 * sum(whole.values()) / world
    own = {name: 4 * count / world for name, count in {**whole, "block": block}.items()}
    always = {"parameters": shard, "optimizer": 2 * shard, "teacher": shard}
    (global_crops, global_tokens, _), *_ = seen = crops(config, arch)
    tokens = sum(count * each for count, each, _ in seen)
    pixels = 3 * batch * (2 * config["global_px"] ** 2 + config["local_crops"] * config["local_px"] ** 2)
    inputs = pixels * (4 + 2 * (size == 2)) + size * arch.embed_dim * (2 * tokens + global_crops * global_tokens)
    kept, working = block_bytes(config, arch, mode, size)
    rows = {"dino": (2 + config["local_crops"]) * batch, "ibot": masked_patches(config, arch)}
    targets = {"dino": 2 * batch, "ibot": rows["ibot"]}
    held, work = 0, 0  # by the heads when losses are computed: activations, logits, targets, the logits' gradients
    for name, count in rows.items():
        last = config[f"{name}_bottleneck"] * config[f"{name}_prototypes"]
        inner = arch.embed_dim + 4 * config[f"{name}_hidden"] + 2 * config[f"{name}_bottleneck"]
        normed = config["head_weight_norm"] * last * (size + 4 * (size == 2))  # normalised prototypes
        logits = size * count * config[f"{name}_prototypes"]
        part = 3 * (1 << (23 if size == 2 else 20))  # three fp32 copies of one of model.py's _chunks
        work = max(work, 4 * min(part, 2 * count * config[f"{name}_prototypes"]))
        held += size * count * inner + normed + 2 * logits + 4 * targets[name] * config[f"{name}_prototypes"]
    heads = whole["dino_head"] + whole["ibot_head"]
    buffers = size * (rest + block) + 4 * heads + size * arch.embed_dim * arch.ffn_hidden
    ahead = 0 if world == 1 else size * block * max(config["prefetch"], 1)
    reduced = 4 * block if arch.depth > 1 else 0
    everything = own["backbone"] + own["dino_head"] + own["ibot_head"]
    last = own["dino_head"] + own["ibot_head"] + own["block"]
    full = inputs + arch.depth * kept
    return {
        "losses": {**always, "gathered": size * (rest + heads), "activations": full, "heads": held + work},
        "last block": {**always, "gradients": last, "gathered": buffers + ahead, "activations": full + working},
        "first block": {**always, "gradients": everything - 4 * rest / world, "gathered": buffers + reduced,
                        "activations": inputs + kept + working},
        "optimizer": {**always, "gradients": everything}}

def estimate(config, world=1):
    """What a run with train.py's keys costs on each of `world` ranks, as a dict of numbers; memory in GB by mode."""
    with torch.device("meta"):
        net = model.build(config)
    arch, images = net["backbone"].arch, config["batch_size"] * world
    on_gpu = config["device"] != "cpu"
    by_mode, parts = {}, {}
    for mode in MODES:
        moments = memory(config, net, world, mode, 2 if on_gpu else 4)
        parts[mode] = max(moments.values(), key=lambda held: sum(held.values()))
        by_mode[mode] = (sum(parts[mode].values()) + CONTEXT * on_gpu) / 1e9
    mode = config["activation_checkpointing"]
    cost, seen = tflop(config, arch), crops(config, arch)
    backbone, everything = (sum(p.numel() for p in part.parameters()) for part in (net["backbone"], net))
    return {
        "backbone": backbone, "heads": everything - backbone, "images": images, "cost": cost, "by_mode": by_mode,
        "tflop": sum(cost.values()), "recomputed_tflop": cost["student"] / 3 if mode == "full" else 0.0,
        "memory_gb": by_mode[mode], "memory_parts": {name: held / 1e9 for name, held in parts[mode].items()},
        "tokens": sum(count * each for count, each, _ in seen),
        "kept_tokens": sum(kept * each for _, each, kept in seen),
        "masked": masked_patches(config, arch), "peak_lr": config["base_lr"] * math.sqrt(images / 1024),
        "checkpoint_gb": 16e-9 * everything, "teacher_gb": 4e-9 * backbone}


def report(config, world, limit_gb):
    """(text of a dry run, a warning or ""): what `estimate` says, against `limit_gb` of memory where that is not 0."""
    found, steps = estimate(config, world), config["max_steps"]
    seconds, peak = config["step_seconds"], config["gpu_tflops"]
    warning = ""
    if limit_gb and found["memory_gb"] > limit_gb:
        warning = (f"does not fit: about {found['memory_gb']:.1f} of {limit_gb:.3g} GB per GPU; try "
                   "--activation_checkpointing=selective or full, a smaller --batch_size, or more ranks")
    lines = [
        f"{config['arch']}: {found['backbone'] / 1e6:,.1f} M parameters, heads {found['heads'] / 1e6:,.1f} M",
        f"batch: {config['batch_size']} images x {world} ranks = {found['images']}; {steps:,} steps are "
        f"{steps * found['images'] / 1e6:,.2f} M images",
        f"tokens: {found['tokens']:,} per rank, {found['kept_tokens']:,} of them in each residual branch; "
        f"{found['masked']:,} masked patches",
        f"compute: {found['tflop']:.4g} TFLOP per step and rank ("
        + ", ".join(f"{name} {value:.4g}" for name, value in found["cost"].items())
        + f"), and {found['recomputed_tflop']:.4g} to compute blocks again",
        f"learning rate: {found['peak_lr']:.4g} at its peak = {config['base_lr']:g} x sqrt({found['images']} / 1024)",
        "memory per rank in GB, at the fullest moment: "
        + ", ".join(f"{name} {held:.3g}" for name, held in found["memory_parts"].items()),
        "memory by activation_checkpointing: "
        + "   ".join(f"{mode} {held:.3g}" for mode, held in found["by_mode"].items()),
        f"checkpoint: {found['checkpoint_gb']:.3g} GB; a teacher is {found['teacher_gb']:.3g} GB"]
    if seconds:
        lines.append(f"at {seconds:g} s per step: MFU {found['tflop'] / seconds / peak:.1%} of {peak:g} TFLOP/s, "
                     f"{found['images'] / seconds:.0f} images/s, {steps * seconds / 3600:.1f} hours")
    return "\n".join([*lines, warning or f"fits: about {found['memory_gb']:.3g} GB per GPU"]), warning
