"""
Whole-slide context: a slide encoder over frozen tile features, trained by masked feature modelling.

    tile features  python prepare/features.py --slides='TCGA/*.svs' --weights=teacher.pth --mpp=1.0 --out=features_1.0
    one core       python context.py config/context_toy.py --features=FOLDER
    one node       torchrun --nproc_per_node=8 context.py config/context.py --features=features_1.0
    two scales     torchrun --nproc_per_node=8 context.py config/context.py --features=features_1.0,features_2.0
    after a stop   the same command with --resume=true
    embed          python context.py --task=embed --features=features_1.0 --weights=out/context/30000.pth --out=context

A place is a tile's feature and its centre in um. In windows of places (places.py) blocks are hidden, and a transformer
with rotary positions predicts their features. The number to watch is loss/neighbours, the loss over that of a weighted
mean of visible neighbours: at 1 nothing has been learnt. A step is a pure function of (config, seed, step).
"""
import json
import math
import os
import signal
import sys
import time

import torch
from torch import nn

import checkpoint
import data
import model
import places
import rundir
import sharding
from configurator import configure
from prepare import convert

# ---- run ------------------------------------------------------------------------------------------------------------
task = "train"           # or "embed": one file per slide with its places' context
features = ""            # folder of prepare/features.py; several scales: FOLDER,FOLDER, and context is the first's
train_slides = ""        # file with a slide's name per line, to train on: leave test patients out; "" = all
out_dir = "out/context"  # of training: config.json, metrics.jsonl, ckpt/, <step>.pth; must be empty unless resuming
weights = ""             # of embed: a <step>.pth
out = ""                 # of embed: folder to write
hide = 0                 # of embed: read places while they are hidden, one in N at a time; 0 = while they are seen
part = ""                # of embed: "3/16" = every 16th slide, from the third on
device = ""              # "cuda" or "cpu"; "" = cuda if there is one
seed = 0
max_steps = 30_000
resume = False           # continue from the newest complete checkpoint in out_dir
log_interval = 10        # write a row every N steps; skipped steps and signals are checked only then
save_interval = 2500     # steps between exports, and checkpoints, of which two stay; also at the end; 0 = only there
max_bad_steps = 10       # skipped steps (loss or gradient not finite) before the run stops
workers = 4              # data processes per rank
# ---- windows --------------------------------------------------------------------------------------------------------
window = 256             # places of the first scale; of another, as many as cover that area
shuffle = False          # a control: places of each slide change places before windows are made, also in embed
mask_share = 0.5         # of the places that are hidden; with several scales, of the coarsest's
mask_block = (4, 25)     # places per block, drawn evenly: 2 x 2 to 5 x 5
turns = True             # windows are turned by any angle and flipped; False where directions mean something
subtract_mean = False    # predict differences to the slide's mean feature, which carries stain and composition
centre = False           # see such differences, too: stain is then nothing that the network has to tell apart
rare = 0.0               # weight of a place in the loss: (squared distance to its window's mean)^rare; 0 = equal
# ---- network --------------------------------------------------------------------------------------------------------
width = 768
depth = 6
heads = 12
registers = 4
periods = (4.0, 64.0)    # waves of rotary positions, in pitches of the first scale: the shortest and the longest
scale_embedding = True   # add log2 um/px times a learnt vector; matters with several scales
# ---- optimizer: AdamW -----------------------------------------------------------------------------------------------
batch_size = 128         # windows per rank
base_lr = 1e-3           # at a global batch of 1024; scaled by the square root of the batch
warmup_steps = 1500
betas = (0.9, 0.95)
weight_decay = 0.05
clip_grad = 1.0          # max gradient norm; 0 = off

# ---- network --------------------------------------------------------------------------------------------------------


class SlideEncoder(nn.Module):
    """model.py's blocks over a window's places. There is no class token, because nothing would train one."""

    def __init__(self, config, about):
        super().__init__()
        self.config, self.about = config, about
        D, C = config["width"], about[0]["width"]
        assert D % (4 * config["heads"]) == 0, (D, config["heads"])  # a head has sines and cosines of x and y
        self.input = nn.Linear(C, D)
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.register_tokens = nn.Parameter(torch.empty(1, config["registers"], D))
        self.log2_mpp = nn.Parameter(torch.empty(1, D))
        arch = model.ViTConfig(1, D, config["depth"], config["heads"], "mlp", 4 * D)
        self.blocks = nn.ModuleList(model.Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(D, eps=arch.norm_eps)
        self.output = nn.Linear(D, C)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """Give the parameter `name` its first values, in place."""
        if name.endswith("bias"):
            t.zero_()
        elif "norm" in name or name.endswith("gamma"):
            t.fill_(1)
        else:
            nn.init.trunc_normal_(t, std=t.shape[-1] ** -0.5, generator=generator)  # 0.02 is slow at small widths

    def forward(self, parts, nm, hidden):
        """
        parts: standardised features (B, N_s, C) per scale; nm: places, int32 (B, N, 2) in nm; hidden: bool (B, N) ->
        context (B, N, D), after the final norm; predicted features (B * N, C).
        """
        x = torch.where(hidden[..., None], self.mask_token, self.input(torch.cat(parts, 1)))
        if self.config["scale_embedding"]:
            logs = [math.log2(scale["mpp"]) for scale in self.about]
            x = x + torch.cat([log * self.log2_mpp.expand(part.shape[1], -1) for log, part in zip(logs, parts)])
        x = torch.cat([self.register_tokens.expand(len(x), -1, -1), x], 1)
        shape, rope = x.shape, self.rope(nm)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, [shape[:2]], [rope])
        x = self.norm(x).view(shape)[:, -nm.shape[1] :].contiguous()
        return x, self.output(x.flatten(0, 1))

    def rope(self, nm):
        """sin and cos, each (B, 1, N, head_dim). Positions are in pitches, never relative to the window's size."""
        low, high = self.config["periods"]
        steps = torch.linspace(0, 1, self.config["width"] // self.config["heads"] // 4, device=nm.device)
        periods = low * (high / low) ** steps
        positions = nm.float() / (1000 * self.about[0]["pitch"])
        positions = positions - positions.mean(1, keepdim=True)  # registers are not turned: they stand in the middle
        angles = 2 * math.pi * positions[..., None] / periods  # (B, N, 2, d)
        angles = angles.flatten(2).tile(2)[:, None]
        return angles.sin(), angles.cos()


# ---- encoders -------------------------------------------------------------------------------------------------------


def tflop_of_a_window(net, n):
    """TFLOP of a training step per window of n places: two per multiply-add, backward twice forward, products only."""
    width, tokens = net.config["width"], n + net.config["registers"]
    products = sum(p.numel() for p in net.blocks.parameters() if p.dim() == 2) * tokens
    products += (net.input.weight.numel() + net.output.weight.numel()) * n
    products += 2 * net.config["depth"] * tokens**2 * width  # attention: with keys, and with values
    return 6 * products / 1e12


def load_encoder(path):
    """(SlideEncoder on the CPU, header) of an export of training. Raises ValueError if it is another file."""
    header = convert.read_stored(path) if os.path.isfile(path) else {}
    if "slides" not in header:
        raise ValueError(f"{path}: no slide encoder; context.py writes them to out_dir/<step>.pth")
    net = SlideEncoder(header["config"], header["about"])
    net.load_state_dict(header.pop("teacher"))
    return net.eval(), header


def random_encoder(header, seed):
    """An untrained SlideEncoder of that header: the control that a result is compared with."""
    net = nn.ModuleDict({"backbone": SlideEncoder(header["config"], header["about"])})
    sharding.materialize(net, "cpu", seed)
    return net["backbone"].eval()


# ---- training -------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    dev = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world, rank = sharding.launched()
    windows = batch_size * world  # per step
    progress = {"step": 0, "bad_steps": 0, "samples": 0}

    def say(message):
        if rank == 0:
            print(message, flush=True)

    def stop(message):
        raise SystemExit(f"context.py: {message}")

    if task not in ("train", "embed") or device not in ("", "cpu", "cuda") or not 0 < mask_share < 1:
        stop("task is train or embed, device is cpu or cuda, mask_share lies between 0 and 1")
    if not 1 <= mask_block[0] <= mask_block[1] or not 1 <= mask_share * window < window - 1 or hide < 0 or hide == 1:
        stop(f"window = {window}, mask_share = {mask_share}, mask_block = {mask_block}, hide = {hide}: some places are "
             "hidden and some seen, blocks are (fewest, most), and hide is 0, or 2 or more")
    if min(width, heads, depth) < 1 or width % (4 * heads) or registers < 0 or min(periods) <= 0 or batch_size < 1:
        stop(f"width = {width}, heads = {heads}, depth = {depth}, registers = {registers}, periods = {periods}, "
             f"batch_size = {batch_size}: give a width that is a multiple of 4 x heads, 1 block or more, 0 registers "
             "or more, periods above 0, and 1 window or more")
    if task == "embed" and not (weights and out):
        stop("embed needs --weights=FILE, of training, and --out=FOLDER")
    try:  # what users state, and the files that it names
        if task == "embed":
            net, header = load_encoder(weights)
            places.embed_files(config, net, header, dev)
            sys.exit()
        mesh = sharding.begin(dev)
        rundir.claim(out_dir, resume, say)
        slides, about, found = places.training_set(features.split(","), train_slides, window, dev, say)
        if shuffle:
            slides = [places.shuffle_slide(slide) for slide in slides]
    except (ValueError, OSError) as e:
        stop(e)
    names = [slide.name for slide in slides]  # eval_slides.py refuses patients of these
    kept = {key: config[key] for key in ("heads", "periods", "scale_embedding", "centre", "subtract_mean", "shuffle")}
    kept |= {"slides": names, "features": [[scale.get(key) for key in places.STATED] for scale in about]}
    kept = json.dumps(kept)  # what the shapes of a checkpoint do not tell
    counts = [scale["count"] for scale in about]
    mean, square = found.mean(0)  # (scales, C); every slide counts the same, as in windows
    std = (square - mean.square()).clamp(min=1e-8).sqrt()
    with torch.device("meta"):
        net = nn.ModuleDict({"backbone": SlideEncoder(config, about)})
    tflop = tflop_of_a_window(net["backbone"], sum(counts)) * windows
    say(f"{sum(p.numel() for p in net.parameters()) / 1e6:,.1f} M parameters; {batch_size} windows x {world} ranks of "
        f"{sum(counts)} places are {tflop:.3g} TFLOP per step, {tflop * max_steps / 1e3:.3g} PFLOP in {max_steps:,} "
        f"steps; writes to {out_dir}")
    sharding.shard(net, mesh, bf16=dev == "cuda", trained=True)
    sharding.materialize(net, dev, seed)
    optimizer = sharding.adamw(model.param_groups(net), betas, dev)
    saver = checkpoint.Saver(f"{out_dir}/ckpt", 2, 0, say)

    def state():
        tensors = checkpoint.tensors(net, optimizer)
        return {**tensors, "mean": mean, "std": std, "progress": dict(progress), "kept": kept}

    def save(done, wait):
        header = {"config": config, "about": about, "slides": names}
        header |= {"step": done, "mean": mean.cpu(), "std": std.cpu()}
        checkpoint.export(out_dir, sharding.gathered(net["backbone"]), header)
        say(f"exported: {out_dir}/{done}.pth")
        saver.save(done, state())
        if wait:
            saver.finish()

    def log(means, row):
        """Write a row: the loss, and the same of guesses that need no network, per scale. Returns loss/neighbours."""
        for scale, values in zip(about, means.tolist()):
            tail = f"_{scale['mpp']:g}" if len(about) > 1 else ""
            row |= dict(zip((guess + tail for guess in ("loss", "zero", "mean", "neighbours")), values))
        row["loss/neighbours"] = ratio = (means[:, 0] / means[:, 3]).mean().item()
        rundir.append_row(f"{out_dir}/metrics.jsonl", row)
        say(f"step {row['step']}: loss/neighbours {ratio:.3f}, {row['windows_per_s']:.1f} windows/s")
        return ratio

    if resume:
        loaded = state()
        checkpoint.load(f"{out_dir}/ckpt", loaded, say)
        before = json.loads(loaded["kept"])
        for key, value in json.loads(kept).items():
            if before.get(key) != value:
                stop(f"resume: the run was trained on other {key} than now: go back to those, or start anew")
        progress |= loaded["progress"]
    step = progress["step"] if resume else None
    rundir.on_rank_0("the run cannot begin", lambda: rundir.begin_folder(out_dir, config, step, say))
    signals = rundir.catch_signals()
    dataset = places.Windows(slides, about, config, rank, world, progress["samples"] - progress["step"] * windows)
    batches = iter(data.loader(dataset, range(progress["step"], max_steps), workers, dev))
    bad_steps = torch.tensor(progress["bad_steps"], device=dev)  # counted on the device, so that no step waits for it
    began, before = time.time(), progress["step"]
    for step in range(progress["step"], max_steps):
        lr = model.cosine_schedule(step, base_lr * math.sqrt(windows / 1024), 0.0, max_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay * group["wd_scale"]
        batch = {k: v.to(dev, non_blocking=True) for k, v in next(batches).items()}
        parts = [places.standardise(*scale) for scale in zip(batch["features"].split(counts, 1), mean, std)]
        slide_means = places.standardise(found[batch["slide"], 0], mean, std).split(1, 1)  # (B, 1, C) per scale
        centred = [part - own for part, own in zip(parts, slide_means)]
        _, predicted = net["backbone"](centred if centre else parts, batch["places"], batch["hidden"])
        predicted = predicted.view(batch["features"].shape)
        parts = centred if subtract_mean else parts
        pieces = [x.split(counts, 1) for x in (predicted, batch["places"], batch["hidden"], batch["wanted"])]
        terms = torch.stack([places.window_losses(*scale, rare) for scale in zip(parts, *pieces)])  # (scales, 4)
        means = model.all_reduce(terms.detach() / world)
        loss = terms[0, 0] if len(about) == 1 else (terms[:, 0] / means[:, 3]).mean()  # no scale outweighs another
        loss.backward()
        norms = sharding.clip_gradients(net, clip_grad)
        finite = torch.isfinite(torch.cat([means.flatten(), norms])).all()  # equal on all ranks
        optimizer.found_inf = (~finite).float()  # with it, fused AdamW leaves weights and moments as they were
        optimizer.step()
        optimizer.zero_grad()
        bad_steps += ~finite
        progress["step"] = done = step + 1
        progress["samples"] += windows
        last = done == max_steps
        logging = last or done % log_interval == 0
        saving = last or (save_interval and done % save_interval == 0)
        if not (logging or saving):
            continue
        progress["bad_steps"] = bad_steps.item()
        preempted = model.all_reduce(torch.tensor(len(signals), device=dev)).item() > 0
        if progress["bad_steps"] > max_bad_steps:
            stop(f"{progress['bad_steps']} steps were not finite (max_bad_steps = {max_bad_steps})")
        if logging:
            speed = (done - before) * windows / (time.time() - began)
            ratio = log(means, {**progress, "lr": lr, "grad_norm": norms.item(), "windows_per_s": speed})
            began, before = time.time(), done
        if last and not (means[:, 0] < means[:, 1:].amin(1)).all():
            say(f"loss/neighbours = {ratio:.3f}: nothing was learnt that a guess without a network does not tell: zero "
                "or the mean, also of visible neighbours")
        if saving or preempted:
            save(done, wait=last or preempted)
        if preempted and not last:
            say(f"stopped by a signal after step {done}; resume by:\n    {rundir.resume_command()}")
            break
    del batches  # its workers end now
    torch.distributed.destroy_process_group()
    if signal.SIGINT in signals:
        os.kill(os.getpid(), signal.SIGINT)  # as train.py

