"""
What a run will hold and cost on one GPU, before one is rented: train.py's --dry_run=true prints `report`.

Memory is followed through a step, in bytes: sharded fp32 numbers that are always there, and what comes and goes at the
moments when most is held: both losses, the heads' backward, the backward of the last block (all activations are
there) and of the first (all gradients are), the optimizer. Counted are the tensors that autograd keeps of model.py's
code as it is, what FSDP2 gathers, and what one block's backward makes; tests/test_budget.py measures them on a CPU. Not
counted: what torch.compile saves, the allocator's fragments, work spaces of libraries.
"""
import math

import data

CONTEXT = 2e9          # CUDA's context, libraries and NCCL's buffers; an estimate
HOST_COPY = 25e9       # bytes a second from a GPU to pinned host memory, PCIe 4; pageable memory takes up to four times
MODES = ("none", "selective", "full")


def shapes(net):
    """{FSDP2 group: its parameters' shapes} of a ModuleDict {backbone, dino_head, ibot_head}; "block": each of them."""
    parts = {"block": net["backbone"].blocks[0], "dino": net["dino_head"], "ibot": net["ibot_head"]}
    root = [tuple(p.shape) for name, p in net["backbone"].named_parameters() if not name.startswith("blocks.")]
    return {"root": root} | {name: [tuple(p.shape) for p in part.parameters()] for name, part in parts.items()}


def count(shapes, world=1):
    """Numbers on the fullest rank, the first: FSDP2 gives every rank the same rows of a tensor, rounded up."""
    return sum(-(-rows // world) * math.prod(rest) for rows, *rest in shapes)


def crops(k, c):
    """[(crops, tokens of each, crops in a residual branch)] of global and local crops."""
    views = [(2 * k["batch_size"], k["global_px"]), (k["local_crops"] * k["batch_size"], k["local_px"])]
    keep = 1 - k["drop_path"]
    return [(n, (px // c.patch_size) ** 2 + 1 + c.registers, max(int(n * keep), 1)) for n, px in views if n]


def block(k, c, e, mode):
    """(bytes that a block keeps for its backward, bytes that its backward makes beside them), e bytes a number."""
    D, H, swiglu, rope, dropping = c.embed_dim, c.ffn_hidden, c.ffn == "swiglu", c.pos == "rope", k["drop_path"] > 0
    T = sum(n * N for n, N, _ in crops(k, c))
    K = sum(kept * N for _, N, kept in crops(k, c))  # tokens in a branch
    rows = 16 * K * dropping  # their indices, int64, for both branches
    # inputs of two norms, qkv 3, attention's output, projection, two scaled branches and the norms' outputs: 11 D; rope
    # keeps rotated copies of q and k; a SwiGLU both halves, its activation and its product. fp32: statistics
    none = e * K * (11 * D + 2 * D * rope + (4 if swiglu else 2) * H) + 4 * K * (c.num_heads + 4) + rows
    products = e * K * (6 * D + (2 if swiglu else 1) * H) + 4 * K * c.num_heads
    kept = {"none": none, "selective": e * T * D + products + rows, "full": e * T * D + rows}[mode]
    work = e * (T * D + K * (D * dropping + (2 * H - D if swiglu else H)))  # gradients of the branch's widest part
    if k["fp8"] != "off":
        work = e * (T * D + K * D * dropping) + K * (8 * H + D)  # eager: a product's fp32 rescaling, twice its size
    return kept, work + none - kept


def moments(k, c, net, world, e, mode):
    """{moment: {part: bytes}} of a step; k: train.py's keys, c: ViTConfig, net: train.py's build() on meta."""
    groups, D, L, B = shapes(net), c.embed_dim, c.depth, k["batch_size"]
    whole = {name: count(s) for name, s in groups.items()}
    own = {name: 4 * count(s, world) for name, s in groups.items()}
    everything = L * own["block"] + own["root"] + own["dino"] + own["ibot"]
    (n_global, N_global, _), T = crops(k, c)[0], sum(n * N for n, N, _ in crops(k, c))
    pixels = 3 * B * (2 * k["global_px"] ** 2 + k["local_crops"] * k["local_px"] ** 2)
    kept, work = block(k, c, e, mode)
    rows = {"dino": (2 + k["local_crops"]) * B,
            "ibot": sum(data.mask_counts(2 * B, k["global_px"] // c.patch_size, k["mask_prob"], k["mask_ratio"]))}
    P = {h: k[f"{h}_prototypes"] for h in rows}
    last = {h: k[f"{h}_bottleneck"] * P[h] for h in rows}  # numbers of the prototypes
    normed = k["head_weight_norm"]  # the prototypes, normalised, for the backward
    head = {h: e * n * (D + 4 * k[f"{h}_hidden"] + 2 * k[f"{h}_bottleneck"]) + normed * last[h] * (e + 4 * (e == 2))
            for h, n in rows.items()}
    logits = {h: e * n * P[h] for h, n in rows.items()}
    targets = 4 * (2 * B * P["dino"] + rows["ibot"] * P["ibot"])
    chunk = {h: 4 * min(3 * max(1 << (23 if e == 2 else 20), P[h]), 2 * n * P[h]) for h, n in rows.items()}
    always = {"parameters": everything, "optimizer": 2 * everything, "teacher": everything}
    inputs = pixels * (4 + 2 * (e == 2)) + e * D * (T + n_global * N_global) + e * T * D  # also embedded, and normed
    gathered, at = e * (whole["root"] + whole["dino"] + whole["ibot"]), {}

    def put(name, gradients, gathered, blocks, working, losses):
        at[name] = {**always, "gradients": gradients, "gathered": gathered, "activations": inputs + blocks * kept,
                    "working": working, "losses": losses}

    heads = head["dino"] + head["ibot"] + logits["dino"] + logits["ibot"] + targets + logits["dino"]
    put("DINO loss", 0, gathered, L, 0, heads + 12 * B * P["dino"] + chunk["dino"])
    put("iBOT loss", 0, gathered, L, 0, heads + logits["ibot"] + chunk["ibot"])
    for h, before, left in (("ibot", 0, head["dino"] + logits["dino"]), ("dino", own["ibot"], 0)):
        backward = max(logits[h] + e * last[h], 8 * last[h] * normed)
        put(f"{h} head", before, gathered + 4 * whole["ibot"] * (h == "dino"), L, 0, head[h] + left + backward)
    ahead = 0 if world == 1 else max(k["prefetch"], 1)
    for name, i in (("last block", L - 1), ("first block", 0)):
        buffers = e * whole["block"] * (1 + min(i, ahead)) + 4 * whole["block"] * (i < L - 1)  # fp32: to reduce
        buffers += e * whole["root"] + 4 * (whole["ibot"] + whole["dino"]) + e * D * c.ffn_hidden
        put(name, own["ibot"] + own["dino"] + own["block"] * (L - 1 - i), buffers, i + 1, work, 0)
    put("optimizer", everything, 0, 0, 0, 0)
    return at


def fullest(k, c, net, world, e, mode=None, **changes):
    """(moment, {part: bytes}) when most is held; `changes` are of the keys."""
    k = {**k, **changes}
    at = moments(k, c, net, world, e, mode or k["activation_checkpointing"])
    name = max(at, key=lambda name: sum(at[name].values()))
    return name, at[name] | ({"CUDA": CONTEXT} if e == 2 else {})


def total(*args, **changes):
    return sum(fullest(*args, **changes)[1].values())


def remedy(k, c, net, world, e, limit, tflop):
    """
    A change after which it fits, as text, None if it fits: what is kept, which changes no result, then fewer images,
    then more ranks.
    """
    if not limit or (held := total(k, c, net, world, e)) <= limit:
        return None
    text = f"does not fit: {held / 1e9:.1f} of {limit / 1e9:.3g} GB a GPU (gpu_memory_gb); "
    now = k["activation_checkpointing"]
    for mode, more in (("selective", "elementwise work once more"), ("full", f"{tflop:.3g} TFLOP more a step")):
        if MODES.index(mode) > MODES.index(now) and (held := total(k, c, net, world, e, mode)) <= limit:
            return text + f"--activation_checkpointing={mode} needs {held / 1e9:.1f} GB ({more})"
    fitting = [b for b in range(2, k["batch_size"]) if total(k, c, net, world, e, "full", batch_size=b) <= limit]
    if fitting:
        return text + f"--activation_checkpointing=full --batch_size={fitting[-1]} does (blocks are computed twice)"
    for ranks in range(8 * (world // 8 + 1), 1025, 8):
        if total(k, c, net, ranks, e, "full") <= limit:
            return text + f"{ranks} ranks with --activation_checkpointing=full do"
    return text + "nor does it on 1024 ranks: a smaller batch_size and more ranks, or another arch"


def report(k, c, net, world, e, limit, peak_lr, heads, masked):
    """
    (text, remedy or None). k, c, net, world: see moments; e: bytes of a computed number, 2 on a GPU, 4 on a CPU; limit:
    bytes of a GPU, 0 = any; heads, masked: as step_tflop takes them.
    """
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.items()}
    backbone, all_parts, B = parts["backbone"], sum(parts.values()), k["batch_size"]
    seen, images = crops(k, c), B * world
    cost = step_tflop(c, B, k["global_px"], k["local_px"], k["local_crops"], k["drop_path"], heads, masked)
    tflop, again = sum(cost.values()), cost["student"] / 3
    moment, held = fullest(k, c, net, world, e)
    modes = "   ".join(f"{mode} {total(k, c, net, world, e, mode) / 1e9:.3g}" for mode in MODES)
    lines = [
        f"{k['arch']}: {backbone / 1e6:,.1f} M parameters, heads {(all_parts - backbone) / 1e6:,.1f} M",
        f"batch: {B} images x {world} ranks = {images}; {k['max_steps']:,} steps are "
        f"{k['max_steps'] * images / 1e6:,.2f} M images",
        "tokens: " + " + ".join(f"{n} x {N} {name}" for (n, N, _), name in zip(seen, ("global", "local")))
        + f" = {sum(n * N for n, N, _ in seen):,} a rank, {sum(kept * N for _, N, kept in seen):,} of them in each "
        f"residual branch; {masked:,} masked patches",
        f"compute: {tflop:.4g} TFLOP a step and rank ({', '.join(f'{name} {v:.4g}' for name, v in cost.items())})"
        + (f"; {again:.4g} more to compute blocks again" if k["activation_checkpointing"] == "full" else ""),
        f"learning rate: {peak_lr:.4g} at its peak = {k['base_lr']:g} x sqrt({images} / 1024)"]
    if s := k["step_seconds"]:
        lines += [f"at {s:g} s a step: MFU {tflop / s / k['gpu_tflops']:.1%} of {k['gpu_tflops']:g} TFLOP/s, "
                  f"{images / s:.0f} images/s, {k['max_steps'] * s / 3600:.1f} hours"]
    lines += [f"memory a rank in GB (1e9 bytes), at the fullest moment ({moment}): "
              + ", ".join(f"{name} {v / 1e9:.3g}" for name, v in held.items()),
              f"memory by activation_checkpointing: {modes}"
              + ("; torch.compile keeps less than none says, it is not modelled" if k["compile"] else "")]
    rest = f" of {limit / 1e9:.3g} GB: {(limit - sum(held.values())) / 1e9:.3g} left for fragments" if limit else ""
    lines += [f"total {sum(held.values()) / 1e9:.3g}{rest}",
              f"checkpoint: {16e-9 * all_parts:.3g} GB, {16e-9 * all_parts / world:.3g} a rank, whose copy to the host "
              f"takes {16 * all_parts / world / HOST_COPY:.2g} s or more; a teacher is {4e-9 * backbone:.3g} GB"]
    return "\n".join(lines), remedy(k, c, net, world, e, limit, again)


# ---- cost of a step -------------------------------------------------------------------------------------------------


def forward_tflop(c, crops, px, drop_path=0.0):
    """TFLOP of a forward of `crops` crops of side px as executed under drop path; 2 a multiply-add, GEMMs only."""
    n = (px // c.patch_size) ** 2
    N, D, kept = n + 1 + c.registers, c.embed_dim, max(int(crops * (1 - drop_path)), 1)
    block = N * (8 * D * D + (6 if c.ffn == "swiglu" else 4) * D * c.ffn_hidden + 4 * N * D)
    return (c.depth * kept * block + crops * n * 2 * c.in_channels * c.patch_size**2 * D) / 1e12


def step_tflop(c, images, global_px, local_px, local_crops, drop_path, heads, masked):
    """
    TFLOP of a step with `images` images and `masked` masked patches: {"student", "teacher", "heads"}. Backward = 2 x
    forward; recomputation and elementwise work are not counted. `heads` = {"dino": (hidden, bottleneck, prototypes),
    "ibot": ...}.
    """
    student = forward_tflop(c, 2 * images, global_px, drop_path)
    student += forward_tflop(c, local_crops * images, local_px, drop_path) if local_crops else 0
    row = {k: 2 * (c.embed_dim * h + h * h + h * b + b * p) / 1e12 for k, (h, b, p) in heads.items()}
    head = (3 * (2 + local_crops) + 2) * images * row["dino"] + (3 + 1) * masked * row["ibot"]
    return {"student": 3 * student, "teacher": forward_tflop(c, 2 * images, global_px), "heads": head}
