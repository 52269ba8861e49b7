"""
The BACH probe: how well does a frozen tile encoder tell four kinds of breast tissue apart?

    python eval_bach.py --weights=out/run/teacher/5000.pth --bach_dir=data/bach   # last line: one JSON object
    python eval_bach.py --weights=a.pth,b.pth,midnight/ --norm=imagenet,imagenet,half --bach_dir=data/bach   # a table
    python eval_bach.py --weights=... --bach_dir=... --views=tiles --mpp=0.5      # or --input_px=392, --concat=true
    python eval_bach.py --weights=... --image_dir=DIR     # other labelled tiles, a subfolder a class: eval_slides.py
    python eval_bach.py config/baselines.py               # checkpoints before any training of ours
    python eval_bach.py --runs='out/*'                    # compare training runs, a table and a PNG: curves.py

Follows kaiko-ai/eva v0.4.5 (offline BACH) step by step: 400 images of 2048x1536 px at 0.42 um/px, shrunk to 224 px
(2.88 um/px, a field of 645 um), CLS, linear heads, balanced accuracy. Read the number with care: there is no test
split, the same 132 images of 24 patients stop, select and score, and the score is a maximum over up to 6,250 epochs,
some 0.005-0.03 above the plateau. One image weighs 0.005-0.011, the binomial standard error is about 0.025 at 0.92: a
difference below 0.02 is no evidence. std is the spread over head seeds alone. `clean` selects on 50 of the training
images instead and scores the 132 once (Thunder's split, https://github.com/MICS-Lab/thunder).

data: {bach_dir}/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/{b,is,iv,n}001..100.tif
from zenodo.org/records/3632035 (CC BY-NC-ND 4.0: pass no resized copies on). train.py calls embed and bach_row.
"""
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import model
from configurator import configure

# ---- the protocol: changing any of these invalidates every earlier row; all but the ranges show in `protocol` ----
CLASSES = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}  # label = position; value = file prefix
TRAIN_RANGES = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))  # the rest: validation
SIZE = 224           # px, shorter side and centre crop
LR = 3e-4            # AdamW, torch's defaults but for the next line
WEIGHT_DECAY = 0.01  # eva with its locked jsonargparse; from 4.34 on its config silently gives 0 (mean moves < 0.001)
WARM_EPOCHS = 5      # eva names no schedule and so gets torch's ConstantLR: a third of lr for five epochs
WARM_FACTOR = 1 / 3
BATCH = 256          # two steps an epoch, of 256 and of 12 images
PATIENCE = 1250      # epochs without a strict increase until a head stops
RUNS, SEED, MAX_STEPS = 5, 42, 12500  # head r is seeded with SEED + r
# ---- and of the second opinions, which bear no protocol of their own ---------------------------------------------
SELECT_RANGES = ((15, 25), (110, 120), (200, 210), (305, 315), (380, 390))  # of the 268, what `clean` selects on
NEIGHBOURS, KNN_TEMP = 20, 0.07  # of the kNN, DINO's
# ------------------------------------------------------------------------------------------------------------------
BACH_MPP, BACH_SIZE = 0.42, "2048x1536 px"  # of the released images; only --views=tiles depends on them


def indices(ranges):
    return [i for first, end in ranges for i in range(first, end)]


TRAIN_INDEX = indices(TRAIN_RANGES)                               # 268
VAL_INDEX = sorted(set(range(400)) - set(TRAIN_INDEX))            # 132
SELECT_INDEX = indices(SELECT_RANGES)                             # 50
FIT_INDEX = sorted(set(TRAIN_INDEX) - set(SELECT_INDEX))          # 218
LABELS = torch.arange(400) // 100
REMEDY = "bach_dir must hold ICIAR2018_BACH_Challenge/ as unzipped from zenodo.org/records/3632035"


class View(NamedTuple):
    """What of an image enters the network, and what of the network's output is its feature."""

    px: int = SIZE        # side of the network's input
    mpp: float = 0.0      # um/px of a grid of px x px tiles whose features are averaged; 0 = shrink to px, centre crop
    concat: bool = False  # class token and mean patch (2D, the Midnight paper's), not the class token alone (eva's)

    def __str__(self):
        return ("cls+patches" if self.concat else "cls") + (" of tiles" if self.mpp else "") + f" {self.px} px" + (
            f" at {self.mpp:g} um/px" if self.mpp else "")


def bach_files(bach_dir):
    """
    Paths of the 400 images in eva's order, so that image i has label i // 100.

    bach_dir is the folder that holds ICIAR2018_BACH_Challenge/, that folder itself, or its Photos/. One .tif too few or
    too many would shift all later images across the split unnoticed, so a class folder that does not hold exactly
    b001.tif .. b100.tif (and so on) raises ValueError. Files of other types are ignored.
    """
    places = [os.path.join(bach_dir, *sub) for sub in (["ICIAR2018_BACH_Challenge", "Photos"], ["Photos"], [])]
    photos = next((p for p in places if any(os.path.isdir(os.path.join(p, name)) for name in CLASSES)), None)
    if photos is None:
        raise ValueError(f"bach_dir={bach_dir}: no folder Photos/ with {', '.join(CLASSES)}; {REMEDY}")
    paths = []
    for folder, prefix in ((os.path.join(photos, name), prefix) for name, prefix in CLASSES.items()):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder}: class folder is missing; {REMEDY}")
        expected = [f"{prefix}{i:03d}.tif" for i in range(1, 101)]
        found = {name for name in os.listdir(folder) if name.lower().endswith(".tif")}
        if extra := sorted(found - set(expected)):
            raise ValueError(f"{folder}: unexpected {', '.join(extra[:3])} beside {expected[0]} .. {expected[-1]}; "
                             "delete or rename (macOS leaves ._ files)")
        if missing := sorted(set(expected) - found):
            raise ValueError(f"{folder}: {len(found)} of 100 images, {', '.join(missing[:3])} missing; {REMEDY}")
        paths += [os.path.join(folder, name) for name in expected]
    return paths


def resize(image, h, w):
    """uint8 (3, H, W) -> (3, h, w) as torchvision's v2 Resize(antialias=True) does, to the last bit."""
    return F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True)[0]


def shrink(image, px=SIZE):
    """uint8 (3, H, W) -> (3, px, px): torchvision's v2 Resize(px, antialias) and CenterCrop(px) to the last bit."""
    short, long = sorted(image.shape[1:])
    h, w = (px if side == short else int(px * long / short) for side in image.shape[1:])
    top, left = round((h - px) / 2), round((w - px) / 2)
    return resize(image, h, w)[:, top : top + px, left : left + px]


def read_image(path, view=View(), mpp=BACH_MPP):
    """
    The first page of an image file of mpp um/px as (uint8 (3, h, w), "WxH px"): cropped to the view's px, or whole at
    its mpp, to be cut into tiles. ValueError if it cannot be decoded or is too coarse or too small for such tiles.
    """
    try:
        with Image.open(path) as page:
            if page.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel, mode {page.mode}: convert it")
            pixels = np.array(page.convert("RGB"))
    except Exception as e:  # pillow raises OSError, SyntaxError, KeyError, struct.error, ... on a damaged file
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{path}: not a readable image ({reason}); fetch or unzip it again") from e
    image, size = torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), f"{pixels.shape[1]}x{pixels.shape[0]} px"
    if not view.mpp:
        return shrink(image, view.px), size
    scale = mpp / view.mpp
    if scale > 1.03:
        raise ValueError(f"{path}: --mpp={view.mpp:g} is finer than the image's {mpp:g} um/px; give {mpp:g} or more")
    h, w = (round(side * scale) for side in image.shape[1:])
    if min(h, w) < view.px:
        raise ValueError(f"{path}: {w}x{h} px at {view.mpp:g} um/px, smaller than a tile of {view.px} px; give a "
                         "smaller --mpp or --input_px, or --views=resize")
    return resize(image, h, w), size


def load_images(paths, view=View(), mpp=BACH_MPP, one_size=False, threads=8):
    """A list of read_image's tensors in the order of paths. ValueError for a damaged file or, if asked, an odd size."""
    images, expected, pool = [], None, ThreadPoolExecutor(threads)
    try:
        for path, (image, size) in zip(paths, pool.map(lambda path: read_image(path, view, mpp), paths)):
            expected = expected or size
            if one_size and size != expected:
                raise ValueError(f"{path}: {size}, but {os.path.basename(paths[0])} has {expected}; {REMEDY}")
            images.append(image)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def load_pixels(bach_dir, view=View(), mpp=0.0):
    """uint8 (400, 3, 224, 224), 60 MB, in the order of bach_files; tiles need a list of (3, h, w), 2.7 GB at 0.5."""
    paths = bach_files(bach_dir)
    if view.mpp and not mpp and (size := read_image(paths[0])[1]) != BACH_SIZE:
        raise ValueError(f"{paths[0]}: {size}, not BACH's {BACH_SIZE} at {BACH_MPP} um/px; for tiles give --image_mpp")
    images = load_images(paths, view, mpp or BACH_MPP, one_size=True)
    return images if view.mpp else torch.stack(images)


def tiles(image, px):
    """uint8 (3, h, w) -> (T, 3, px, px): the fewest tiles that cover it, evenly spaced; an image of px x px is one."""
    tops, lefts = ([round(i * (side - px) / max(n - 1, 1)) for i in range(n)]
                   for side, n in ((side, math.ceil(side / px)) for side in image.shape[1:]))
    return torch.stack([image[:, y : y + px, x : x + px] for y in tops for x in lefts])


@torch.no_grad()
def embed(backbone, pixels, mean, std, device, view=View(), batch_size=64):
    """
    Features of n uint8 images, a tensor (n, 3, h, w) or a list, as float32 (n, D), or (n, 2D) with the mean patch, on
    the CPU; an image larger than the view's px is the mean over its tiles. mean and std (3 numbers each) are the
    model's own.

    A collective when torch.distributed runs: rank r embeds images r, r + world, ..., padded with repeats so that a
    sharded backbone sees equally many forward calls everywhere, and every rank returns all features.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = (torch.arange(-(-len(pixels) // world)) * world + rank) % len(pixels)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    training = [m for m in backbone.modules() if m.training]
    backbone.eval()
    most = max(math.ceil(image.shape[1] / view.px) * math.ceil(image.shape[2] / view.px) for image in pixels)
    features = []

    def forward(x):
        out = backbone((x.to(device).float() * (1 / 255) - mean) / std)
        x = out["cls"].float()
        return torch.cat([x, out["patches"].float().mean(1)], 1) if view.concat else x
    try:
        for batch in mine.split(max(batch_size // most, 1)):
            cut = [tiles(pixels[i], view.px) for i in batch]
            x = torch.cat([forward(part) for part in torch.cat(cut).split(batch_size)])
            features += [x_image.mean(0) for x_image in x.split([len(c) for c in cut])]
    finally:
        for m in training:
            m.training = True
    features = torch.stack(features)  # (n / world, D)
    if world > 1:
        parts = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(parts, features)
        features = torch.stack(parts, 1).flatten(0, 1)[: len(pixels)]  # image i is row i // world of rank i % world
    return features.cpu()


def collapse_metrics(features):
    """
    Two signs of collapse in features (n, D): {"effective_rank", "mean_cosine"}. ValueError if a feature is not finite.

    effective_rank is exp(entropy of the normalised singular values), Roy and Vetterli 2007, of the centred features:
    the dimensions in use, 1 to min(n - 1, D). A direction common to all images, which would hide these, is left to
    mean_cosine, over all pairs of images. A single point gives 1 and 1, an isotropic cloud nearly full rank and 0.
    """
    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"features of {bad} of {len(features)} images are not finite: NaN in the weights or "
                         "overflow; use an earlier checkpoint")
    x = features.double()
    s = torch.linalg.svdvals(x - x.mean(0))
    s = s[s > x.norm() * max(x.shape) * torch.finfo(torch.float32).eps]  # below: rounding noise around one point
    p, z = s / s.sum(), F.normalize(x, dim=1)
    pairs = z.sum(0).square().sum() - z.square().sum()
    return {"effective_rank": float((-p * p.log()).sum().exp()), "mean_cosine": float(pairs / (len(x) * (len(x) - 1)))}


def cross_entropy_grad(heads, x, onehot, weight):
    """
    Gradient of the mean cross entropy of R heads (C*R, D+1) at x (N, D+1), each on its own batch; onehot is (C, 1, N).

    weight (R, N) is 1/B on the B images of that head's batch, else 0: at this N, masking beats gathering R batches.
    d loss / d logits = (softmax - onehot) / B.
    """
    probs = (heads @ x.T).view(len(onehot), *weight.shape).softmax(0)
    return ((probs - onehot) * weight).flatten(0, 1) @ x


def batch_grad(heads, x, onehot, batch):
    """cross_entropy_grad, each head on its own row of batch (R, B): indices into x (N, D+1)."""
    R, B = batch.shape
    if len(x) <= 4 * BATCH:
        return cross_entropy_grad(heads, x, onehot, torch.zeros(R, len(x), dtype=x.dtype).scatter_(1, batch, 1 / B))
    own, weight = heads.view(len(onehot), R, -1).unbind(1), torch.full((1, B), 1 / B, dtype=x.dtype)
    grads = [cross_entropy_grad(h, x[b], onehot[..., b], weight) for h, b in zip(own, batch)]
    return torch.stack(grads, 1).flatten(0, 1)


def recalls(predicted, labels):
    """Share of hits in each class that occurs in labels (n,), by predictions (R, n): float32 (R, classes present)."""
    onehot = F.one_hot(labels).float()
    onehot = onehot[:, onehot.any(0)]
    return (predicted == labels).float() @ onehot / onehot.sum(0)  # whole numbers: equal hits give equal floats


def balanced_accuracy(predicted, labels):
    """Mean of the recalls of predictions (R, n) over the classes that occur in labels (n,): float32 (R,)."""
    return recalls(predicted, labels).mean(1)


def confusion(predicted, labels):
    """How often class i (row) was called j (column) by all R heads together: a list of lists."""
    classes = int(max(labels.max(), predicted.max())) + 1
    counts = torch.bincount((labels * classes + predicted).flatten(), minlength=classes**2)
    return counts.view(classes, classes).tolist()


def knn(features, labels, train_index, test_index):
    """
    Classes (n_test,) by the 20 nearest training features in cosine, votes weighted exp(cosine / 0.07) (Wu et al. 2018,
    DINO's kNN). Nothing is trained or selected.
    """
    z = F.normalize(features, dim=1)
    onehot, predicted = F.one_hot(labels)[train_index], []
    for part in torch.as_tensor(test_index).split(1024):
        near = (z[part] @ z[train_index].T).topk(min(NEIGHBOURS, len(train_index)), 1)
        votes = onehot[near.indices] * (near.values / KNN_TEMP).exp()[..., None]  # (n_test, k, C)
        predicted.append(votes.sum(1).argmax(1))
    return torch.cat(predicted)


@contextmanager
def one_thread():
    """Products as small as the heads' gain nothing from more threads, which on a busy machine cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
@torch.no_grad()
def fit_heads(features, labels, train_index, val_index, runs, seed, max_steps):
    """
    Train `runs` linear heads side by side (AdamW is element-wise, so they do not meet); see probe.

    Returns balanced accuracy on val_index after each epoch (epochs, runs), each head's best epoch, and the classes
    (runs, n) that it gave all n images there.
    Head r draws from its own generator: (C, D+1) values of U(-1/sqrt(D), 1/sqrt(D)) as nn.Linear does, the last column
    being the bias, which meets a constant feature of 1; then one permutation an epoch.
    """
    everything = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    onehot = F.one_hot(labels).T[:, None].to(features.dtype)[..., train_index]
    x, x_val, y_val = everything[train_index], everything[val_index], labels[val_index]
    generators = [torch.Generator().manual_seed(seed + r) for r in range(runs)]
    bound, shape = features.shape[1] ** -0.5, (len(onehot), x.shape[1])
    heads = [torch.empty(shape, dtype=x.dtype).uniform_(-bound, bound, generator=g) for g in generators]
    heads = torch.stack(heads, 1).flatten(0, 1)  # (C*R, D+1)
    optimizer = torch.optim.AdamW([heads], lr=LR, weight_decay=WEIGHT_DECAY)

    def classes(x):
        return (heads @ x.T).view(len(onehot), runs, len(x)).argmax(0)  # (R, N)

    epochs = max_steps // -(-len(x) // BATCH)
    balanced, predicted = torch.zeros(epochs, runs), torch.zeros(runs, len(features), dtype=torch.long)
    best, best_epoch = torch.full((runs,), -1.0), torch.zeros(runs, dtype=torch.long)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = LR * WARM_FACTOR if epoch < WARM_EPOCHS else LR
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators])  # (R, N)
        for batch in order.split(BATCH, 1):
            heads.grad = batch_grad(heads, x, onehot, batch)
            optimizer.step()
        balanced[epoch] = balanced_accuracy(classes(x_val), y_val)
        better = (balanced[epoch] > best) & (epoch - best_epoch <= PATIENCE)  # a stopped head trains on but is closed
        if better.any():
            best[better], best_epoch[better] = balanced[epoch, better], epoch
            predicted[better] = classes(everything)[better]
        if (epoch - best_epoch >= PATIENCE).all():
            break
    return balanced, best_epoch.tolist(), predicted


def heads_protocol(runs, seed, max_steps):
    return (f"{runs} heads from seed {seed}, AdamW {LR:g} wd {WEIGHT_DECAY:g} warm {WARM_EPOCHS}x{WARM_FACTOR:.3g} "
            f"batch {BATCH}, {max_steps} steps, patience {PATIENCE}")


def probe(features, labels, train_index, val_index, runs=RUNS, seed=SEED, max_steps=MAX_STEPS, view=View()):
    """
    eva's linear probe of features (n, D) with labels (n,), on the CPU; leaves the global random state alone.

    bach: mean over heads of the best balanced accuracy on val_index; std: their sample deviation; seeds: the values;
    accuracy (plain), recall (a class) and confusion (rows are true): at the same epochs, mean or sum over heads;
    plateau: balanced, over the last fifth of each head's epochs; epochs: how many these were; protocol: rows that
    differ in it cannot be compared. At most 6 s at D = 128, 15 s at 1536, on one core.
    """
    balanced, best, predicted = fit_heads(features, labels, train_index, val_index, runs, seed, max_steps)
    predicted, truth = predicted[:, val_index], labels[val_index]
    epochs = [min(epoch + PATIENCE + 1, len(balanced)) for epoch in best]
    seeds = [balanced[best[r], r].item() for r in range(runs)]
    return {
        "bach": statistics.mean(seeds),
        "std": statistics.stdev(seeds) if runs > 1 else 0.0,
        "seeds": seeds,
        "accuracy": (predicted == truth).double().mean().item(),
        "recall": recalls(predicted, truth).mean(0).tolist(),
        "confusion": confusion(predicted, truth),
        "plateau": statistics.mean(balanced[int(0.8 * epochs[r]) : epochs[r], r].mean().item() for r in range(runs)),
        "epochs": epochs,
        "protocol": f"eva-bach: {view}, {len(train_index)}/{len(val_index)}, {heads_protocol(runs, seed, max_steps)}",
    }


def second_opinions(features):
    """
    Of BACH's features (400, D), balanced accuracies on eva's 132 images to read beside its own: clean, with its
    clean_std over heads: the same heads fitted to 218 images and stopped and chosen on 50 others, so that nothing is
    selected on the 132 (Thunder's split); knn: from the 268 training images.
    """
    steps = MAX_STEPS // 2  # 218 images are one batch: as many epochs as eva's
    predicted = fit_heads(features, LABELS, FIT_INDEX, SELECT_INDEX, RUNS, SEED, steps)[2][:, VAL_INDEX]
    clean = balanced_accuracy(predicted, LABELS[VAL_INDEX]).tolist()
    neighbours = knn(features, LABELS, TRAIN_INDEX, VAL_INDEX)[None]
    return {"clean": statistics.mean(clean), "clean_std": statistics.stdev(clean),
            "knn": balanced_accuracy(neighbours, LABELS[VAL_INDEX]).item()}


def bach_row(features, view=View()):
    """One row of bach.jsonl but for its step, from BACH's features (400, D). ValueError if they are not finite."""
    row = collapse_metrics(features)
    return probe(features, LABELS, TRAIN_INDEX, VAL_INDEX, view=view) | second_opinions(features) | row


# ---- the command line -----------------------------------------------------------------------------------------------

COLUMNS = ("bach", "balanced", "std", "se_groups", "plateau", "clean", "accuracy", "knn", "shot16")  # of the table


def table(rows):
    """Plain text, a line for each row of a weight file."""
    keys, width = [k for k in COLUMNS if k in rows[0]], max(len(row["weights"]) for row in rows)
    lines = [f"{'weights':{width}}" + "".join(f"{k:>11}" for k in keys)]
    return "\n".join(lines + [f"{row['weights']:{width}}" + "".join(f"{row[k]:11.4f}" for k in keys) for row in rows])


def view_of(c):
    if c["views"] not in ("resize", "tiles"):
        raise ValueError(f"views = {c['views']!r}; known: 'resize' (eva's), 'tiles'")
    for key in ("input_px", "mpp"):
        if c[key] <= 0:
            raise ValueError(f"{key} = {c[key]}: must be more than 0")
    return View(c["input_px"], c["mpp"] if c["views"] == "tiles" else 0.0, c["concat"])


def score_file(file, norm, c, data):
    """The row of one weight file; data are the images."""
    start, view = time.time(), view_of(c)
    backbone = model.load_backbone(file, c["arch"] or None).to(c["device"])
    if view.px % backbone.arch.patch_size or backbone.arch.in_channels != 3:
        raise ValueError(f"{file}: takes {backbone.arch.in_channels} channels in patches of "
                         f"{backbone.arch.patch_size} px, not RGB at input_px = {view.px}")
    mean, std = model.stored_norm(file) if norm is None else model.norm_values(norm)
    if c["image_dir"]:
        import eval_slides
        row = eval_slides.score(c, data, backbone, mean, std)
    else:
        row = bach_row(embed(backbone, data, mean, std, c["device"], view), view)
    stored = model.read_header(file)
    return {**row, "norm": (mean, std), "weights": file, "arch": c["arch"] or stored.get("arch"),
            "step": stored.get("step"), "seconds": round(time.time() - start, 1)}


def score(c):
    """Rows of all weight files, printed as they are done, and the number of files that failed, which are named."""
    files = [file.strip() for file in c["weights"].split(",") if file.strip()]
    norms = [name.strip() or None for name in c["norm"].split(",")] if isinstance(c["norm"], str) else [c["norm"]]
    if not files or bool(c["bach_dir"]) == bool(c["image_dir"]):
        raise ValueError("give --weights=FILE and either --bach_dir=DIR or --image_dir=DIR, or else --runs='out/*'")
    if len(norms) not in (1, len(files)):
        raise ValueError(f"norm: {len(norms)} for {len(files)} weight files; give one for all or one for each")
    norms = norms if len(norms) > 1 else norms * len(files)
    if c["arch"] and c["arch"] not in model.ARCHS:
        raise ValueError(f"unknown arch '{c['arch']}'; known: {', '.join(model.ARCHS)}")
    for norm in norms:
        model.norm_values(norm)
    start, view = time.time(), view_of(c)
    if c["dry_run"]:
        for file, norm in zip(files, norms, strict=True):
            found = "" if os.path.exists(file) else ", no such file"
            print(f"{file}: {view}, norm {norm or 'as the file states'}{found}")
        return [], 0
    if missing := [file for file in files if not os.path.exists(file)]:
        raise ValueError(f"{', '.join(missing)}: no such weight file")
    if c["image_dir"]:
        import eval_slides
        data = eval_slides.load(c)
    else:
        data = load_pixels(c["bach_dir"], view, c["image_mpp"])
    print(f"read the images in {time.time() - start:.0f} s", flush=True)
    rows = []
    for file, norm in zip(files, norms, strict=True):
        try:
            rows.append(score_file(file, norm, c, data))
        except (ValueError, OSError, RuntimeError) as e:  # the last: out of memory
            reason = " ".join(str(e).split())
            print(f"eval_bach: {reason if file in reason else f'{file}: {reason}'}", file=sys.stderr, flush=True)
            continue
        shown = ", ".join(f"{k} {rows[-1][k]:.4f}" for k in COLUMNS if k in rows[-1])
        print(f"{file}: {shown}, {rows[-1]['seconds']:.0f} s", json.dumps(rows[-1]), sep="\n", flush=True)
    return rows, len(files) - len(rows)


if __name__ == "__main__":
    weights = ""      # files or Hugging Face folders, with commas between: released, of this project, OpenMidnight's
    bach_dir = ""     # folder that holds ICIAR2018_BACH_Challenge/
    image_dir = ""    # instead of bach_dir: a folder of labelled tiles, a subfolder for each class
    groups = ""       # its csv of file, patient and perhaps fold; "" = groups.csv in image_dir, if there is one
    runs = ""         # instead of all these: run folders, a quoted glob
    parent = ""       # of these, the one that the others are compared with; "" = the first
    out = ""          # file of their figure; "" = bach.png in the folder that they share
    views = "resize"  # to 224 px, eva's; "tiles" = a grid of tiles at mpp, averaged: another protocol
    mpp = 0.5         # um/px of the tiles
    image_mpp = 0.0   # um/px of image_dir's images, which tiles need; 0 = 0.42 for BACH
    input_px = SIZE   # another size is another protocol
    concat = False    # class token and mean patch: another protocol
    arch = ""         # name in model.ARCHS; "" = as the file tells
    norm = None       # "imagenet", "half" (Midnight, Kaiko), (mean, std); None = the model's own; one each: half,,half
    dry_run = False   # say what would be probed, and stop
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configure(globals())
    try:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device = {device!r}, but torch sees no GPU; --device=cpu runs without")
        if runs:
            import curves
            raise SystemExit(curves.show(runs, parent, out))
        rows, failed = score(config)
    except (ValueError, OSError) as e:
        raise SystemExit(f"eval_bach: {e}")
    if len(rows) > 1:
        print(table(rows), json.dumps({"rows": rows}), sep="\n")
    raise SystemExit(min(failed, 1))
