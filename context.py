"""
Whole-slide context: a slide encoder over frozen tile features, trained by masked feature modelling.

    features       python prepare/features.py --slides='data/TCGA/**/*.svs' --weights=teacher.pth --mpp=1.0 \\
                       --out=data/features_1.0
    one core       python context.py config/context_toy.py --features=data/features_1.0
    8 GPUs         torchrun --nproc_per_node=8 context.py config/context.py --features=data/features_1.0
    two scales     torchrun ... context.py config/context.py --features=data/features_1.0,data/features_2.0
    after a stop   the same command with --resume=true
    embed          python context.py --task=embed --features=data/features_1.0 --weights=out/context/30000.pth \\
                       --out=data/context

A slide is a set of places; each has the feature of a tile and a centre in um. A window is the places nearest to a
random one. Blocks of it are hidden, and a transformer with rotary positions predicts the features there. The number to
watch is the loss over that of the neighbours' mean: at 1 nothing has been learnt. Window n is a pure function of (seed,
n), so runs resume exactly, and ranks share a batch as in train.py.
"""
import functools
import glob
import os
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import default_collate

import checkpoint
import data
import model
import sharding
from configurator import configure

# ---- run ------------------------------------------------------------------------------------------------------------
task = "train"           # or "embed": write one file of contextual features per slide
features = ""            # folder of prepare/features.py; several scales: FOLDER,FOLDER, the first has the places
out_dir = "out/context"  # of a training: config.json, metrics.jsonl, ckpt/, <step>.pth; must be empty unless resuming
train_slides = ""        # file of names, one per line, to train on; keep test patients out of it. "" = all in features
weights = ""             # of --task=embed: a <step>.pth
out = ""                 # of --task=embed: the folder to write
part = ""                # of --task=embed: "3/16" = every 16th slide, from the third on
seed = 0
max_steps = 30_000
resume = False           # continue from the newest complete checkpoint in out_dir
device = ""              # "cuda" or "cpu"; "" = cuda if there is one
log_interval = 10        # write a row every N steps; skipped steps and signals are checked only then
save_interval = 2500     # steps between checkpoints and exports; also at the end; 0 = only there
keep_checkpoints = 2     # keep the newest N checkpoints; 0 = all
max_bad_steps = 10       # skipped steps (loss or gradient not finite) before the run stops
workers = 4              # data processes per rank
# ---- windows --------------------------------------------------------------------------------------------------------
window = 256             # places of the first scale; of others, as many as cover the same area
mask_share = 0.5         # of the places that are hidden, those of the coarsest scale counted
mask_block = (4, 25)     # places per block, drawn evenly: 2 x 2 to 5 x 5
pitch = 0.0              # um between neighbouring places, the unit of positions; 0 = as tile and overlap imply
free_rotation = True     # turn windows by any angle; False = by quarters
scale_embedding = True   # tell the network each place's log2 um/px; matters with several scales only
subtract_mean = False    # predict the difference to the slide's mean feature, else stain and composition count too
# ---- network --------------------------------------------------------------------------------------------------------
width = 768
depth = 6
heads = 12
registers = 4
layerscale = 1.0         # first value
periods = (2.0, 64.0)    # shortest and longest wave of the rotary positions, in pitches; geometric between
# ---- optimizer: AdamW -----------------------------------------------------------------------------------------------
batch_size = 128         # windows per rank
base_lr = 1e-3           # at a global batch of 1024; scaled by the square root of the batch
min_lr = 1e-6
warmup_steps = 1500
betas = (0.9, 0.95)
weight_decay = 0.05
clip_grad = 1.0          # max gradient norm; 0 = off

CLIP = 5.0               # standardised features beyond are outliers
STATED = "weights_sha256", "norm", "mpp", "tile_px"  # what features must share with those of the training

# ---- features on disk -----------------------------------------------------------------------------------------------


def open_features(path):
    """
    A file of prepare/features.py: (features, a memory map (N, D); centres of the tiles, float32 (N, 2) in um; what the
    file states, a dict). Raises ValueError if it is another kind of file, compressed, or without a place.
    """
    try:
        where, xy, about = (open_npz if path.endswith(".npz") else open_h5)(path)
        shape, dtype, offset = where
        about = {key: np.asarray(value).tolist() for key, value in about.items()}
        side = about["patch_size_level0"]
        um = about.get("level0_mpp") or about["tile_px"] * about["mpp"] / side  # the latter is off by rounding
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: not features as prepare/features.py writes them ({e})") from None
    if len(shape) != 2 or not shape[0] or xy.shape != (shape[0], 2):
        raise ValueError(f"{path}: features {shape} and coords {xy.shape}: not (N, D) and (N, 2) with places")
    if offset is None:
        raise ValueError(f"{path}: features are chunked or compressed and cannot be mapped; write them again")
    about["width"] = shape[1]
    return np.memmap(path, dtype, "r", offset, shape), ((xy + side / 2) * um).astype(np.float32), about


def open_npz(path):
    """((shape, dtype, offset) of the features, coords, the rest) of an .npz; savez stores arrays as they are."""
    with np.load(path) as arrays, zipfile.ZipFile(path) as archive, open(path, "rb") as f:
        entry = archive.getinfo("features.npy")
        f.seek(entry.header_offset + 26)
        f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)  # the name and the extra field
        np.lib.format.read_magic(f)
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        offset = None if entry.compress_type else f.tell()
        return (shape, dtype, offset), arrays["coords"], {k: arrays[k] for k in arrays.files[2:]}


def open_h5(path):
    import h5py
    with h5py.File(path) as h5:
        stored, coords = h5["features"], h5["coords"]
        return (stored.shape, stored.dtype, stored.id.get_offset()), coords[:], {**stored.attrs, **coords.attrs}


def reference_pitch(about):
    return about["mpp"] * (about["tile_px"] - about.get("overlap", 0))


def check_features(centres, about, trained, pitch):
    """ValueError where features are not of the kind that was trained on (`trained` is `about` of those), or coordinates
    in another unit: the nearest of a place's neighbours is about a pitch away."""
    if about["width"] != trained["width"]:
        raise ValueError(f"features are {about['width']} wide, those of the training {trained['width']}")
    for key in STATED:
        a, b = about.get(key), trained.get(key)
        same = a == b if isinstance(a, str) or None in (a, b) else np.allclose(a, b, rtol=0.02)
        if not same and None not in (a, b):
            raise ValueError(f"{key} is {a}, that of the training {b}: features of another encoder, scale or norm")
    some = centres[:: len(centres) // 16 + 1]
    apart = [np.partition(np.hypot(*(centres - place).T), 1)[1] for place in some if len(centres) > 1]
    apart = np.quantile(apart or [pitch], 0.1)
    if not 0.7 < apart / pitch < 1.5:
        raise ValueError(f"neighbours are {apart:.4g} um apart instead of {pitch:.4g}: coordinates in another unit than "
                         "level-0 px? If they are right, state --pitch")


# ---- windows --------------------------------------------------------------------------------------------------------


def nearest(centres, at, count):
    """Indices of the `count` places that are nearest to a point, nearest first; all if there are fewer."""
    distance = np.square(centres - at).sum(1)
    some = np.argpartition(distance, count - 1)[:count] if count < len(distance) else np.arange(len(distance))
    return some[np.argsort(distance[some], kind="stable")]


def draw_blocks(rng, points, count, block):
    """bool (N,): exactly `count` of points (N, 2), in blocks: a visible place and its nearest visible neighbours."""
    hidden = np.zeros(len(points), bool)
    left = count
    while left:
        visible = np.flatnonzero(~hidden)
        size = min(rng.integers(block[0], block[1] + 1), left)
        centre = points[rng.choice(visible)]
        hidden[visible[nearest(points[visible], centre, size)]] = True
        left -= size
    return hidden


def overlap(points, side, others, other_side):
    """bool (N,): which square tiles around points (N, 2) overlap one around `others` (M, 2) by a tenth or more."""
    reach = (side + other_side) / 2 - 0.1 * min(side, other_side)
    return (np.abs(points[:, None] - others).max(2) < reach).any(1)


def hide(rng, points, sides, share, block):
    """
    What a window hides and what of it is predicted, two bool per place and scale; points are lists of (N, 2) in um.
    Blocks of the coarsest scale are drawn, exactly `share` of its places. Tiles within are predicted. Tiles of another
    scale that overlap what is predicted are hidden too, because they show its pixels.
    """
    coarse = int(np.argmax(sides))
    chosen = draw_blocks(rng, points[coarse], round(share * len(points[coarse])), block)
    region = points[coarse][chosen], sides[coarse]
    wanted = [chosen if i == coarse else overlap(points[i], -0.2 * sides[i], *region) for i in range(len(sides))]
    hidden = [own.copy() for own in wanted]
    for i in range(len(sides)):
        for j in set(range(len(sides))) - {i}:
            hidden[i] |= overlap(points[i], sides[i], points[j][wanted[j]], sides[j])
    return np.concatenate(hidden), np.concatenate(wanted)


def turned(rng, points, free):
    """Points (N, 2) turned by a random angle, or by quarters, and flipped in half of the cases."""
    angle = rng.random() * 4
    angle = np.pi / 2 * (angle if free else int(angle))
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) * [rng.choice([-1, 1]), 1]


def to_nm(points):
    """Points in um -> int32 in nm, because FSDP2 casts a network's floating-point inputs to bf16."""
    return torch.from_numpy(np.rint(points * 1000).astype(np.int32))


class Windows(torch.utils.data.Dataset):
    """
    windows[step] are the B windows of one rank, N places each, those of the first scale first:

        features   (B, N, C) as stored
        places     int32 (B, N, 2) in nm from the place that the window is around, turned and flipped
        hidden     bool (B, N), what the network does not see; wanted: those of them that it is to predict
        slide      int64 (B), the slide's number
    """

    def __init__(self, slides, counts, sides, config, rank=0, world=1, offset=0):
        self.slides, self.counts, self.sides, self.config = slides, counts, sides, config
        self.rank, self.world, self.offset = rank, world, offset

    def __getitem__(self, step):
        numbers = data.sample_numbers(step, self.rank, self.world, self.config["batch_size"], self.offset)
        return default_collate([self.window(n) for n in numbers])

    def window(self, n):
        config, rng = self.config, np.random.default_rng((self.config["seed"], n))
        number = rng.integers(len(self.slides))
        maps, centres = self.slides[number]
        at = rng.choice(centres[0])
        rows = [nearest(places, at, count) for places, count in zip(centres, self.counts)]
        points = [places[r] - at for places, r in zip(centres, rows)]
        hidden, wanted = hide(rng, points, self.sides, config["mask_share"], config["mask_block"])
        places = turned(rng, np.concatenate(points), config["free_rotation"])
        tiles = np.concatenate([np.memmap(*where)[r] for where, r in zip(maps, rows)])
        return {"features": torch.from_numpy(tiles), "places": to_nm(places), "slide": number,
                "hidden": torch.from_numpy(hidden), "wanted": torch.from_numpy(wanted)}


# ---- network --------------------------------------------------------------------------------------------------------


class SlideEncoder(nn.Module):
    """model.py's blocks over the places of a window. No class token, because nothing would train it."""

    def __init__(self, config, channels, pitch):
        super().__init__()
        self.config, self.pitch, D = config, pitch, config["width"]
        assert D % (4 * config["heads"]) == 0, (D, config["heads"])  # sine and cosine of two axes
        arch = model.ViTConfig(1, D, config["depth"], config["heads"], "mlp", 4 * D)
        self.input = nn.Linear(channels, D)
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.registers = nn.Parameter(torch.empty(1, config["registers"], D))
        self.scale = nn.Linear(1, D)
        self.blocks = nn.ModuleList(model.Block(arch) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(D, eps=arch.norm_eps)
        self.output = nn.Linear(D, channels)

    @torch.no_grad()
    def init_tensor(self, name, t, generator=None):
        """First values, in place: those of model.ViT."""
        if name.endswith("gamma"):
            t.fill_(self.config["layerscale"])
        elif "norm" in name:
            t.fill_(name.endswith("weight"))
        elif name.endswith("bias"):
            t.zero_()
        else:
            nn.init.trunc_normal_(t, std=0.02, generator=generator)

    def rope(self, places):
        """int32 (B, N, 2) in nm -> sin and cos, each (B, 1, N, head_dim): positions in pitches, never per window."""
        low, high = self.config["periods"]
        steps = torch.linspace(0, 1, self.config["width"] // self.config["heads"] // 4, device=places.device)
        turns = (places.double() / (1000 * self.pitch)).float()[..., None] / (low * (high / low) ** steps)
        angles = (2 * torch.pi * turns).flatten(2).tile(2)[:, None]
        return angles.sin(), angles.cos()

    def forward(self, features, places, hidden, log_mpp, layer=0):
        """
        Standardised features (B, N, C), places int32 (B, N, 2) in nm, hidden bool (B, N), log2 um/px (N, 1) -> context
        (B, N, D) after `layer` blocks (0 = all) and the norm, and predicted features (B, N, C).
        """
        x = torch.where(hidden[..., None], self.mask_token, self.input(features))
        if self.config["scale_embedding"]:
            x = x + self.scale(log_mpp)
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        shapes, ropes = [x.shape[:2]], [self.rope(places)]
        x = x.flatten(0, 1)
        for block in self.blocks[: layer or None]:
            x = block(x, shapes, ropes)
        x = self.norm(x).unflatten(0, shapes[0])[:, self.registers.shape[1] :].contiguous()
        return x, self.output(x)


# ---- objective ------------------------------------------------------------------------------------------------------


def distance(predicted, target):
    """smooth-L1 + 0.5 (1 - cosine) of (..., C) -> (...)."""
    smooth = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    return smooth + 0.5 * (1 - F.cosine_similarity(predicted, target, dim=-1))


def losses(predicted, target, places, hidden, wanted):
    """
    Of one scale, means over the wanted places of each window, then over windows (4,): the loss, and what it would be
    for zero, for the mean of the window's visible places, and for their mean weighted by 1 / distance^2.
    """
    seen = (~hidden).float()
    mean = (seen[:, None] @ target) / seen.sum(1).clamp(min=1)[:, None, None]
    near = seen[:, None] / (torch.cdist(places.float(), places.float()).square() + 1)
    neighbours = near @ target / near.sum(2, keepdim=True).clamp(min=1e-30)
    guesses = [predicted.float(), torch.zeros_like(target), mean.expand_as(target), neighbours]
    each = torch.stack([distance(guess, target) for guess in guesses])  # (4, B, N)
    return ((each * wanted).sum(2) / wanted.sum(1).clamp(min=1)).mean(1)


def standardise(features, mean, std):
    return ((features.float() - mean) / std).clamp(-CLIP, CLIP)


# ---- embedding ------------------------------------------------------------------------------------------------------


def load_encoder(path):
    """(SlideEncoder on the CPU, header) of a file that training has exported. Raises ValueError if it is another file."""
    header = model.read_pth(path)
    if "slides" not in header:
        raise ValueError(f"{path}: not a slide encoder; context.py exports them as out_dir/<step>.pth")
    net = empty_encoder(header)
    net.load_state_dict(header.pop("teacher"))
    return net.eval(), header


def empty_encoder(header):
    return SlideEncoder(header["config"], header["mean"].shape[1], header["pitch"])


def random_encoder(header, seed):
    """The SlideEncoder of that header, untrained: the control that every result is compared with."""
    net = nn.ModuleDict({"backbone": empty_encoder(header)})
    sharding.materialize(net, "cpu", seed)
    return net["backbone"].eval()


@torch.inference_mode()
def embed_slide(net, header, features, centres_um, device="cpu", layer=0):
    """
    Context of each place, float32 (N, width): windows of the training's size around places that no window has had
    among its inner quarter, until there are none, averaged. features (N, C) and centres (N, 2), or lists of them, one
    per scale, and context is that of the first. Slides smaller than a window are embedded whole.
    """
    scales = [(features, centres_um)] if isinstance(centres_um, np.ndarray) else list(zip(features, centres_um))
    features, centres = zip(*scales)
    net, total, times = net.to(device), np.zeros((len(centres[0]), header["config"]["width"]), np.float32), 0
    todo, times = np.ones(len(total), bool), np.zeros((len(total), 1), np.float32)
    mean, std, log_mpp = header["mean"], header["std"], header["mpps"].log2()
    while todo.any():
        at = centres[0][todo.argmax()]
        rows = [nearest(places, at, count) for places, count in zip(centres, header["counts"])]
        x = [standardise(torch.from_numpy(f[r]), mean[i], std[i]) for i, (f, r) in enumerate(zip(features, rows))]
        places = to_nm(np.concatenate([c[r] - at for c, r in zip(centres, rows)]))
        scale = torch.cat([log_mpp[i].expand(len(r), 1) for i, r in enumerate(rows)])
        hidden = torch.zeros(1, len(places), dtype=torch.bool)
        inputs = [t.to(device) for t in (torch.cat(x)[None], places[None], hidden, scale)]
        total[rows[0]] += net(*inputs, layer)[0][0, : len(rows[0])].float().cpu().numpy()
        times[rows[0]] += 1
        todo[rows[0][: max(len(rows[0]) // 4, 1)]] = False
    return total / times


def embed_file(path, name, file, part, config, net, header, device):
    """A job of prepare/slides.py's walk: features, context and coords of one slide, and its mean features."""
    from prepare.coords import write_h5
    opened = [open_features(found) for found in (path, *others(name, config["features"].split(",")[1:]))]
    features, centres, abouts = zip(*opened)
    for places, about, trained in zip(centres, abouts, header["about"]):
        check_features(places, about, trained, config["pitch"] or reference_pitch(trained))
    if not np.isfinite(features[0]).all():
        raise ValueError("features that are not finite")
    context = embed_slide(net, header, features, centres, device)
    coords = (open_npz if path.endswith(".npz") else open_h5)(path)[1]
    arrays = {"features": features[0], "context": context.astype(np.float16), "coords": coords,
              "mean_raw": features[0].mean(0, np.float32), "mean_context": context.mean(0)}
    if file.endswith(".h5"):
        write_h5(part, arrays, {"features": abouts[0]} | dict.fromkeys(list(arrays)[1:], {}))
    else:
        with open(part, "wb") as f:
            np.savez(f, **arrays, **abouts[0])
    os.replace(part, file)
    return f"{len(context)} places"


def others(name, folders):
    return [files_of(folder)[name] for folder in folders]


def files_of(folder):
    """{slide: path} of the features in a folder."""
    return {Path(path).stem: path for path in sorted(glob.glob(f"{folder}/*.npz") + glob.glob(f"{folder}/*.h5"))}


def embed():
    from prepare.slides import walk
    net, header = load_encoder(weights)
    keys = {"slides": features.split(",")[0] + "/*.[hn][5p]*", "out": out, "names": "stem", "part": part, "overlap": 0,
            "tile_px": 1, "features": features, "pitch": pitch}
    job = functools.partial(embed_file, net=net, header=header, device=dev)
    walk("context", keys, job, ".h5", 0, {"encoder": header["step"]})


# ---- training -------------------------------------------------------------------------------------------------------


def open_slides(folders, names):
    """
    ([(name, stores per scale, centres per scale)] of the slides that can be trained on, `about` per scale, messages of
    those that cannot). A store is np.memmap's arguments, because 11,000 open files are too many.
    """
    slides, bad, first = [], [], None
    for name in names:
        try:
            opened = [open_features(files[name]) for files in folders]
            abouts = [about for _, _, about in opened]
            first = first or abouts
            pitches = [pitch or reference_pitch(about) for about in first]
            for (_, centres, about), trained, unit in zip(opened, first, pitches):
                check_features(centres, about, trained, unit)
            centres = [c for _, c, _ in opened]
            if any(len(c) < k for c, k in zip(centres, counts_of(first))):
                raise ValueError(f"{len(centres[0])} places are fewer than a window")
            maps = [(f.filename, f.dtype, "r", f.offset, f.shape) for f, _, _ in opened]
            slides.append((name, maps, centres))
        except (ValueError, KeyError) as e:
            bad.append(f"left out: {name}: {e}")
    return slides, first, bad


def counts_of(abouts):
    sides = [about["mpp"] * about["tile_px"] for about in abouts]
    return [max(round(window * (sides[0] / side) ** 2), 4) for side in sides]


def statistics(slides, rank, world):
    """Means (slides, scales, C), mean squares likewise; NaN where features are not finite. Every rank reads its share."""
    found = torch.zeros(len(slides), 2, len(slides[0][1]), slides[0][1][0][4][1])
    for i in range(rank, len(slides), world):
        for j, where in enumerate(slides[i][1]):
            x = np.memmap(*where).astype(np.float32)
            found[i, 0, j] = torch.from_numpy(x.mean(0))
            found[i, 1, j] = torch.from_numpy(np.square(x).mean(0))
    return found


if __name__ == "__main__":
    config = configure(globals())
    world, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    dev = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def say(message):
        if rank == 0:
            print(message, flush=True)

    def stop(message):
        raise SystemExit(f"context.py: {message}")

    if task == "embed":
        try:
            embed()
        except (ValueError, OSError) as e:
            stop(e)
        sys.exit()
    if rank == 0 and not resume and os.path.isdir(out_dir) and os.listdir(out_dir):
        stop(f"{out_dir} is not empty: continue with --resume=true, delete it, or choose another --out_dir")
    if dev == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(1)
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group("nccl" if dev == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    os.makedirs(out_dir, exist_ok=True)
    folders = [files_of(folder) for folder in features.split(",")]
    names = sorted(folders[0])
    if train_slides:
        names = sorted(set(open(train_slides).read().split()) & set(names))
    slides, abouts, bad = open_slides(folders, names)
    for line in bad:
        say(line)
    if not slides:
        stop(f"features = {features}: no slide to train on")
    found = statistics(slides, rank, world).to(dev)
    dist.all_reduce(found)
    whole = found.isfinite().flatten(1).all(1).tolist()
    for (name, *_), good in zip(slides, whole):
        if not good:
            say(f"left out: {name}: features that are not finite")
    slides = [slide for slide, good in zip(slides, whole) if good]
    found = found[torch.tensor(whole, device=dev)]
    mean = found[:, 0].mean(0)  # every slide counts the same, as it does in windows
    std = (found[:, 1].mean(0) - mean.square()).clamp(min=1e-8).sqrt()
    slide_means = (found[:, 0] - mean) / std
    counts = counts_of(abouts)
    sides = [about["mpp"] * about["tile_px"] for about in abouts]
    mpps = torch.tensor([about["mpp"] for about in abouts], dtype=torch.float32)
    log_mpp = mpps.log2().repeat_interleave(torch.tensor(counts))[:, None].to(dev)
    unit = pitch or reference_pitch(abouts[0])
    header = {"config": config, "slides": [name for name, *_ in slides], "mean": mean.cpu(), "std": std.cpu(),
              "about": abouts, "pitch": unit, "counts": counts, "mpps": mpps}
    with torch.device("meta"):
        net = nn.ModuleDict({"backbone": SlideEncoder(config, mean.shape[1], unit)})
    mesh = init_device_mesh(dev, (world,))
    sharding.shard(net, mesh, bf16=dev == "cuda", trained=True)
    sharding.materialize(net, dev, seed)
    optimizer = torch.optim.AdamW(model.param_groups(net), lr=0.0, betas=betas, fused=True)
    for p in net.parameters():
        optimizer.state[p] = {"step": torch.zeros((), device=dev), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    windows = batch_size * world
    peak_lr = base_lr * (windows / 1024) ** 0.5
    progress = {"step": 0, "bad_steps": 0, "samples": 0}
    checkpoint.begin_folder(out_dir, config, None, say)
    stores = [(maps, centres) for _, maps, centres in slides]
    batches = iter(torch.utils.data.DataLoader(Windows(stores, counts, sides, config, rank, world), batch_size=None,
                                               num_workers=workers, sampler=range(max_steps)))
    clock = time.time()
    for step in range(max_steps):
        lr = model.cosine_schedule(step, peak_lr, min_lr, max_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay * group["wd_scale"]
        batch = {k: v.to(dev, non_blocking=True) for k, v in next(batches).items()}
        parts = batch["features"].split(counts, 1)
        parts = [standardise(x, m, s) for x, m, s in zip(parts, mean, std)]
        x = torch.cat(parts, 1)  # (B, N, C)
        _, predicted = net["backbone"](x, batch["places"], batch["hidden"], log_mpp)
        if subtract_mean:
            parts = [x - slide_means[batch["slide"], i][:, None] for i, x in enumerate(parts)]
        places, hidden, wanted = (batch[k].split(counts, 1) for k in ("places", "hidden", "wanted"))
        terms = torch.stack([losses(*scale) for scale in zip(predicted.split(counts, 1), parts, places, hidden, wanted)])
        totals = terms.detach().clone()
        dist.all_reduce(totals)
        totals /= world  # (scales, 4)
        loss = terms[:, 0].sum() if len(counts) == 1 else (terms[:, 0] / totals[:, 3]).mean()
        loss.backward()
        norms = sharding.clip_gradients(net, clip_grad)
        finite = torch.isfinite(torch.cat([totals.flatten(), norms])).all()
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % log_interval == 0 or done == max_steps:
            row = {"step": done, "loss": loss.item(), "lr": lr, "grad_norm": norms.item()}
            for i, values in enumerate(totals.tolist()):
                tail = f"_{i}" if i else ""
                row |= {f"{k}{tail}": v for k, v in zip(("predicted", "zero", "mean", "neighbours"), values)}
                row[f"loss/neighbours{tail}"] = values[0] / values[3]
            row["windows_per_s"] = done * windows / (time.time() - clock)
            if rank == 0:
                checkpoint.append_row(f"{out_dir}/metrics.jsonl", row)
            say(f"step {done}/{max_steps}: loss {row['loss']:.4f}, of neighbours {row['loss/neighbours']:.3f}, "
                f"{row['windows_per_s']:.1f} windows/s")
    checkpoint.export(out_dir, sharding.gathered(net["backbone"]), header | {"step": max_steps})
    dist.destroy_process_group()
