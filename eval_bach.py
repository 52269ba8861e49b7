"""
The BACH probe: how well does a frozen tile encoder tell four kinds of breast tissue apart?

    python eval_bach.py --weights=out/run/teacher/5000.pth --bach_dir=data/BACH   # the last line is one JSON object
    python eval_bach.py --weights=a.pth,b.pth,midnight/ --norm=imagenet,imagenet,half --bach_dir=data/BACH   # a table
    python eval_bach.py --weights=... --bach_dir=... --views=tiles --mpp=0.5      # or --input_px=392, --concat=true
    python eval_bach.py --weights=... --bach_dir=... --views=context --context=out/context/30000.pth --mpp=1.0
    python eval_bach.py config/baselines.py               # checkpoints that we have not trained

We follow kaiko-ai/eva v0.4.5 (offline BACH) step by step: 400 images of 2048x1536 px at 0.42 um/px are resized to
224 px (2.88 um/px, a field of 645 um); linear heads on the class token are scored by balanced accuracy.

Read the number with care. There is no test split: the same 132 images of 24 patients stop, select and score. The score
is a maximum over up to 6,250 epochs, 0.005-0.03 above the plateau. One image weighs 0.005-0.011 and the binomial
standard error is about 0.025 at 0.92, so a difference below 0.02 is no evidence. std covers only the heads' seeds.
`clean` selects on 50 of the training images and scores the 132 once (Thunder's split, github.com/MICS-Lab/thunder).

data: {bach_dir}/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/{b,is,iv,n}001..100.tif
from zenodo.org/records/3632035. The licence, CC BY-NC-ND 4.0, forbids passing on resized copies.
"""
import importlib
import json
import math
import os
import re
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

import model
import sources
from configurator import configure
from rundir import on_rank_0, read_text

# ---- the protocol: changing any of these invalidates earlier rows; all except the ranges show in `protocol` ----------
CLASSES = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}  # label = position; value = file prefix
TRAIN_RANGES = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))  # the rest: validation
SIZE = 224           # px, shorter side and centre crop
LR = 3e-4            # AdamW, otherwise torch's defaults
WEIGHT_DECAY = 0.01  # eva with its locked jsonargparse; from 4.34 on its config silently gives 0 (mean moves < 0.001)
WARM_EPOCHS = 5      # eva names no schedule and so gets torch's ConstantLR: a third of lr for five epochs
WARM_FACTOR = 1 / 3
BATCH = 256          # two steps per epoch, of 256 and of 12 images
PATIENCE = 1250      # a head stops after so many epochs without a strict increase
RUNS, SEED, MAX_STEPS = 5, 42, 12500  # head r is seeded with SEED + r
# ---- the same for clean and knn, which are not named in `protocol` ---------------------------------------------------
SELECT_RANGES = ((15, 25), (110, 120), (200, 210), (305, 315), (380, 390))  # of the 268; `clean` selects on these
NEIGHBOURS, KNN_TEMP = 20, 0.07  # DINO's kNN
# ----------------------------------------------------------------------------------------------------------------------
BACH_MPP, BACH_SIZE = 0.42, "2048x1536 px"  # of the released images; only --views=tiles depends on them


def indices(ranges):
    return [i for first, end in ranges for i in range(first, end)]


TRAIN_INDEX = indices(TRAIN_RANGES)                               # 268
VAL_INDEX = sorted(set(range(400)) - set(TRAIN_INDEX))            # 132
SELECT_INDEX = indices(SELECT_RANGES)                             # 50
FIT_INDEX = sorted(set(TRAIN_INDEX) - set(SELECT_INDEX))          # 218
LABELS = torch.arange(400) // 100
BACH_ZIP = "https://zenodo.org/api/records/3632035/files/ICIAR2018_BACH_Challenge.zip/content"  # 10.4 GB
REMEDY = "bach_dir must hold ICIAR2018_BACH_Challenge/ as unzipped from zenodo.org/records/3632035"


class View(NamedTuple):
    """Which part of an image enters the network, and which part of the output is its feature."""

    px: int = SIZE        # side of the network's input
    mpp: float = 0.0      # um/px of tiles of px x px whose features are averaged; 0 = resize to px and crop the centre
    concat: bool = False  # class token and mean patch (2D, as in the Midnight paper), else the class token (D, as eva)
    context: str = ""     # file of a slide encoder that reads the tiles; the feature is the mean of [tile, context]

    def __str__(self):
        feature = "cls+patches" if self.concat else "cls"
        feature += f"+context of {self.context}" if self.context else ""
        if self.mpp:
            return f"{feature} of tiles {self.px} px at {self.mpp:g} um/px"
        return f"{feature} {self.px} px"


def how_to_get(path):
    """The command that gets what is missing at `path`, by the names of the configs: weights, BACH, slides."""
    folder, name = os.path.split(path.rstrip("/"))
    if path.startswith("data/toy/"):
        return "python prepare/toy.py"
    if path.startswith("data/TCGA"):
        return "python prepare/tcga.py --project=TCGA-BRCA lists slides, says how to fetch them"
    if name == "BACH":
        return (f"mkdir -p {path} && wget -c -O bach.zip {BACH_ZIP} && unzip -q bach.zip "
                f"'ICIAR2018_BACH_Challenge/Photos/*' -x '*/._*' -d {path}")
    if found := re.fullmatch(r"(dinov2_vit[sblg]14)(_reg4)?_pretrain\.pth", name):
        return f"wget -P {folder or '.'} https://dl.fbaipublicfiles.com/dinov2/{found[1]}/{name}"
    if name.startswith("dinov3_vit"):
        return ("accept the licence at ai.meta.com/resources/models-and-libraries/dinov3-downloads, then "
                f"wget -O {path} 'LINK' with the link of the e-mail")
    if name == "midnight":
        return f"hf download kaiko-ai/midnight --local-dir {path}"
    if name == "teacher_checkpoint.pth":
        return f"hf download SophontAI/OpenMidnight {name} --local-dir {folder or '.'}"
    return "docs/data.md and docs/weights.md say where data and weights come from"


def bach_files(bach_dir):
    """
    Paths of the 400 images in eva's order, so that image i has label i // 100.

    One .tif too many or too few would shift later images across the split unnoticed. A class folder must therefore hold
    exactly b001.tif .. b100.tif (and so on), else ValueError. Files of other types and hidden ones are ignored.
    """
    paths = []
    for name, prefix in CLASSES.items():
        folder = os.path.join(bach_dir, "ICIAR2018_BACH_Challenge", "Photos", name)
        expected = {f"{prefix}{i:03d}.tif" for i in range(1, 101)}
        found = os.listdir(folder) if os.path.isdir(folder) else []
        found = {file for file in found if file.lower().endswith(".tif") and file[0] != "."}
        if extra := found - expected:
            raise ValueError(f"{folder}: unexpected {min(extra)}; delete or rename it")
        if missing := expected - found:
            remedy = "" if os.path.isdir(bach_dir) else f": {how_to_get(bach_dir)}"
            raise ValueError(f"{folder}: {len(found)} of 100 images, {min(missing)} is missing; {REMEDY}{remedy}")
        paths += [os.path.join(folder, file) for file in sorted(expected)]
    return paths


def resize(image, h, w):
    """uint8 (3, H, W) -> (3, h, w), bit-equal to torchvision's v2 Resize(antialias=True)."""
    return F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True)[0]


def shrink(image, px=SIZE):
    """uint8 (3, H, W) -> (3, px, px), bit-equal to torchvision's v2 Resize(px, antialias=True) and CenterCrop(px)."""
    _, h, w = image.shape
    short, long = sorted((h, w))
    long_px = int(px * long / short)
    h, w = (px if side == short else long_px for side in (h, w))
    top = round((h - px) / 2)
    left = round((w - px) / 2)
    return resize(image, h, w)[:, top : top + px, left : left + px]


def read_image(path, view=View(), mpp=BACH_MPP):
    """
    The first page of an image file of mpp um/px: uint8 (3, h, w), and the file's size as "WxH px".

    It is resized and cropped to the view's px, or resized to the view's mpp to be cut into tiles. ValueError if it
    cannot be decoded, or is too coarse or too small for such tiles.
    """
    try:
        pixels = sources.decode(path, f"{path}: not a readable image")
    except OSError as e:
        raise ValueError(f"{e}; mend it, or fetch or unzip it again") from None
    height, width, _ = pixels.shape
    size = f"{width}x{height} px"
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if not view.mpp:
        return shrink(image, view.px), size
    scale = mpp / view.mpp
    if scale > 1.03:
        raise ValueError(f"{path}: --mpp={view.mpp:g} is finer than the image's {mpp:g} um/px")
    h, w = round(height * scale), round(width * scale)
    if min(h, w) < view.px:
        raise ValueError(f"{path}: {w}x{h} px at --mpp={view.mpp:g}, smaller than a tile of --input_px={view.px}")
    return resize(image, h, w), size


def load_images(paths, view=View(), mpp=BACH_MPP):
    """read_image of all paths: their tensors and their sizes, in order."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: read_image(path, view, mpp), paths))
    return [image for image, _ in found], [size for _, size in found]


def load_pixels(bach_dir, view=View(), mpp=0.0):
    """
    BACH's images in the order of bach_files: uint8 (400, 3, px, px), 60 MB at 224 px.

    A view of tiles gets a list of (3, h, w), 2.7 GB at 0.5 um/px. mpp is the images' um/px; 0 = BACH's own. ValueError
    if a file is damaged or differs in size from the first.
    """
    paths = bach_files(bach_dir)
    images, sizes = load_images(paths, view, mpp or BACH_MPP)
    for path, size in zip(paths, sizes):
        if size != sizes[0]:
            raise ValueError(f"{path}: {size}, unlike the first image's {sizes[0]}; {REMEDY}")
    if not view.mpp:
        return torch.stack(images)
    if not mpp and sizes[0] != BACH_SIZE:
        raise ValueError(f"{paths[0]}: {sizes[0]}, not BACH's {BACH_SIZE}: its um/px is unknown; give --image_mpp")
    return images


def corners(shape, px):
    """[(y, x)] of the fewest tiles of px x px that cover (h, w), evenly spaced; one if that is px x px."""
    starts = []
    for side in shape:
        last = math.ceil(side / px) - 1
        starts.append([round(i * (side - px) / max(last, 1)) for i in range(last + 1)])
    return [(y, x) for y in starts[0] for x in starts[1]]


def tiles(image, px):
    """uint8 (3, h, w) -> (T, 3, px, px), the tiles at its corners."""
    return torch.stack([image[:, y : y + px, x : x + px] for y, x in corners(image.shape[1:], px)])


def context_pool(view, weights, norm):
    """
    `pool` of embed for a view with context: an image is a small slide, and its feature the mean of [tile, context].
    ValueError if the slide encoder was trained on features of another encoder than `weights`, or of other tiles.
    """
    slide_encoder = importlib.import_module("context")  # by name: training reads this file, and never that one
    net, header = slide_encoder.load_encoder(view.context)
    first, *others = header["about"]
    stated = {"mpp": view.mpp, "tile_px": view.px, "norm": norm, "width": first["width"]}
    stated["weights_sha256"] = model.sha256_of(weights)
    try:
        slide_encoder.places.check(np.zeros((1, 2)), stated, first)
    except ValueError as e:
        raise ValueError(f"{view.context}: {e}") from None
    if others:
        raise ValueError(f"{view.context}: reads {1 + len(others)} scales, and an image is read at one")

    def pool(of_tiles, image):
        centres = np.array(corners(image.shape[1:], view.px), np.float32)[:, ::-1] + view.px / 2
        own = slide_encoder.places.embed_slide(net, header, of_tiles.cpu().numpy(), centres * view.mpp)
        return torch.cat([of_tiles.cpu(), torch.from_numpy(own)], 1).mean(0)

    return pool


@torch.no_grad()
def embed(backbone, pixels, mean, std, device, view=View(), pool=None, batch_size=0):
    """
    Features of n uint8 images, a tensor (n, 3, h, w) or a list, as float32 (n, D) on the CPU; (n, 2D) with the mean
    patch. An image larger than the view's px gets the mean over its tiles, or pool(features of its tiles, image). mean
    and std (3 numbers each) are those by which the model was trained.

    This is a collective when torch.distributed runs: rank r embeds images r, r + world, ... and every rank returns all
    features. Repeats fill up the last round, because a sharded backbone needs equally many forward calls on all ranks.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rounds = math.ceil(len(pixels) / world)
    mine = (torch.arange(rounds) * world + rank) % len(pixels)
    mean, std = (torch.tensor(own, dtype=torch.float32, device=device).view(3, 1, 1) for own in (mean, std))
    batch_size = batch_size or (64 if "cuda" in str(device) else 16)  # 16 fit a core's cache: the toy is 1.3 x as fast
    training = [m for m in backbone.modules() if m.training]
    most = max(len(corners(image.shape[1:], view.px)) for image in pixels)  # tiles per image

    def forward(x):
        x = x.to(device).float() * (1 / 255)
        out = backbone((x - mean) / std)
        cls = out["cls"].float()
        return torch.cat([cls, out["patches"].float().mean(1)], 1) if view.concat else cls

    features = []
    backbone.eval()
    try:
        for batch in mine.split(max(batch_size // most, 1)):
            cut = [tiles(pixels[i], view.px) for i in batch]
            of_tiles = torch.cat([forward(part) for part in torch.cat(cut).split(batch_size)])
            by_image = of_tiles.split([len(c) for c in cut])
            features += [pool(own, pixels[i]) if pool else own.mean(0) for own, i in zip(by_image, batch)]
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

    effective_rank is exp(entropy of the normalised singular values) of the centred features (Roy and Vetterli 2007):
    the number of dimensions in use, 1 to min(n - 1, D). Centring removes a direction that all images share, which would
    hide the others. mean_cosine, over all pairs of images, shows that direction. A single point gives 1 and 1; an
    isotropic cloud gives nearly full rank and 0.
    """
    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"features of {bad} of {len(features)} images are not finite: NaN in the weights or "
                         "overflow; use an earlier checkpoint")
    x = features.double()
    s = torch.linalg.svdvals(x - x.mean(0))
    s = s[s > x.norm() * max(x.shape) * torch.finfo(torch.float32).eps]  # below: rounding noise around one point
    p = s / s.sum()
    entropy = (-p * p.log()).sum()
    z = F.normalize(x, dim=1)
    pairs = z.sum(0).square().sum() - z.square().sum()
    return {"effective_rank": float(entropy.exp()), "mean_cosine": float(pairs / (len(x) * (len(x) - 1)))}


def recalls(predicted, labels):
    """Recall of each class that occurs in labels (n,), for predictions (R, n): float32 (R, classes present)."""
    onehot = F.one_hot(labels).float()
    onehot = onehot[:, onehot.any(0)]
    return (predicted == labels).float() @ onehot / onehot.sum(0)  # whole numbers: equal hits give equal floats


def balanced_accuracy(predicted, labels):
    """Mean recall over the classes that occur in labels (n,), for predictions (R, n): float32 (R,)."""
    return recalls(predicted, labels).mean(1)


def confusion(predicted, labels):
    """How often class i (row) was called j (column) by all R heads together, as a list of lists."""
    classes = int(max(labels.max(), predicted.max())) + 1
    counts = torch.bincount((labels * classes + predicted).flatten(), minlength=classes**2)
    return counts.view(classes, classes).tolist()


def knn(features, labels, train_index, test_index):
    """
    Classes (n_test,) by vote of the nearest training features in cosine, weighted by exp(cosine / temperature): DINO's
    kNN (Wu et al. 2018). Nothing is trained or selected.
    """
    z = F.normalize(features, dim=1)
    onehot = F.one_hot(labels)[train_index]
    predicted = []
    for part in torch.as_tensor(test_index).split(1024):
        cosines = z[part] @ z[train_index].T
        near = cosines.topk(min(NEIGHBOURS, len(train_index)), 1)
        weights = (near.values / KNN_TEMP).exp()
        votes = onehot[near.indices] * weights[..., None]  # (n_test, k, C)
        predicted.append(votes.sum(1).argmax(1))
    return torch.cat(predicted)


@contextmanager
def one_thread():
    """Products as small as the heads' gain nothing from more threads, which cost minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def heads_loss(heads, x, y, batch):
    """Sum of the cross entropies of heads (R, C, D+1), each the mean over its row of batch (R, B), indices into x."""
    if len(x) <= 4 * BATCH:  # every head scores all of x: at this N it is cheaper than gathering R batches
        of_all = F.cross_entropy(heads @ x.T, y.expand(len(heads), -1), reduction="none")
        losses = of_all.gather(1, batch)
    else:
        losses = F.cross_entropy(heads @ x[batch].mT, y[batch], reduction="none")
    return losses.mean(1).sum()  # (R, B)


@one_thread()
def fit_heads(features, labels, train_index, val_index, runs, seed, max_steps):
    """
    Train `runs` linear heads side by side. AdamW works element by element, so each trains as if it were alone.

    Returns balanced accuracy on val_index after each epoch (epochs, runs), each head's best epoch, and the classes
    (runs, n) that it gave to all n images there. Head r draws from its own generator: first (C, D+1) values of
    U(-1/sqrt(D), 1/sqrt(D)) as nn.Linear does, where the last column is the bias, then one permutation per epoch.
    """
    everything = torch.cat([features, torch.ones_like(features[:, :1])], 1)  # the bias meets a constant feature
    x, y = everything[train_index], labels[train_index]
    x_val, y_val = everything[val_index], labels[val_index]
    generators = [torch.Generator().manual_seed(seed + r) for r in range(runs)]
    bound = features.shape[1] ** -0.5
    shape = int(labels.max()) + 1, x.shape[1]
    heads = [torch.empty(shape, dtype=x.dtype).uniform_(-bound, bound, generator=g) for g in generators]
    heads = torch.stack(heads).requires_grad_()  # (R, C, D+1)
    optimizer = torch.optim.AdamW([heads], lr=LR, weight_decay=WEIGHT_DECAY)
    epochs = max_steps // math.ceil(len(x) / BATCH)
    balanced = torch.zeros(epochs, runs)
    predicted = torch.zeros(runs, len(features), dtype=torch.long)
    best = torch.full((runs,), -1.0)
    best_epoch = torch.zeros(runs, dtype=torch.long)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = LR * WARM_FACTOR if epoch < WARM_EPOCHS else LR
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators])  # (R, N)
        for batch in order.split(BATCH, 1):
            optimizer.zero_grad()
            heads_loss(heads, x, y, batch).backward()
            optimizer.step()
        trained = heads.detach()
        balanced[epoch] = balanced_accuracy((trained @ x_val.T).argmax(1), y_val)
        stopped = epoch - best_epoch > PATIENCE  # keeps training with the others; later gains are ignored
        better = (balanced[epoch] > best) & ~stopped
        if better.any():
            best[better] = balanced[epoch, better]
            best_epoch[better] = epoch
            predicted[better] = (trained @ everything.T).argmax(1)[better]
        if (epoch - best_epoch >= PATIENCE).all():
            break
    return balanced, best_epoch.tolist(), predicted


def heads_protocol(runs, seed, max_steps):
    return (f"{runs} heads from seed {seed}, AdamW {LR:g} wd {WEIGHT_DECAY:g} warm {WARM_EPOCHS}x{WARM_FACTOR:.3g} "
            f"batch {BATCH}, {max_steps} steps, patience {PATIENCE}")


def probe(features, runs=RUNS, seed=SEED, max_steps=MAX_STEPS, view=View()):
    """
    eva's linear probe of BACH's features (400, D), on the CPU. The global random state stays as it is.

    bach: mean over heads of the best balanced accuracy on VAL_INDEX; std: its sample deviation; seeds: the values;
    accuracy (plain), recall (per class) and confusion (rows are true classes): at the same epochs, mean or sum over
    heads; plateau: mean balanced accuracy over the last fifth of each head's epochs; epochs: the number of these;
    protocol: rows that differ in it cannot be compared. It takes at most 10 s at D = 128 and 20 s at 1536 on one core.
    """
    balanced, best, predicted = fit_heads(features, LABELS, TRAIN_INDEX, VAL_INDEX, runs, seed, max_steps)
    predicted, truth = predicted[:, VAL_INDEX], LABELS[VAL_INDEX]
    epochs = [min(epoch + PATIENCE + 1, len(balanced)) for epoch in best]
    seeds = [balanced[epoch, r].item() for r, epoch in enumerate(best)]
    plateaus = [balanced[int(0.8 * end) : end, r].mean().item() for r, end in enumerate(epochs)]
    return {
        "bach": statistics.mean(seeds),
        "std": statistics.stdev(seeds),
        "seeds": seeds,
        "accuracy": (predicted == truth).double().mean().item(),
        "recall": recalls(predicted, truth).mean(0).tolist(),
        "confusion": confusion(predicted, truth),
        "plateau": statistics.mean(plateaus),
        "epochs": epochs,
        "protocol": f"eva-bach: {view}, {len(TRAIN_INDEX)}/{len(VAL_INDEX)}, {heads_protocol(runs, seed, max_steps)}",
    }


def second_opinions(features):
    """
    Balanced accuracies on eva's 132 images to read beside its own, from BACH's features (400, D).

    clean, with clean_std over heads: the same heads fitted to 218 images and selected on 50 others, so that nothing is
    selected on the 132 (Thunder's split). knn: from the 268 training images.
    """
    truth = LABELS[VAL_INDEX]
    steps = MAX_STEPS // 2  # 218 images are one batch: as many epochs as eva's
    _, _, predicted = fit_heads(features, LABELS, FIT_INDEX, SELECT_INDEX, RUNS, SEED, steps)
    clean = balanced_accuracy(predicted[:, VAL_INDEX], truth).tolist()
    neighbours = knn(features, LABELS, TRAIN_INDEX, VAL_INDEX)[None]
    return {"clean": statistics.mean(clean), "clean_std": statistics.stdev(clean),
            "knn": balanced_accuracy(neighbours, truth).item()}


def bach_row(features, view=View()):
    """A row of bach.jsonl except its step, from BACH's features (400, D). ValueError if they are not finite."""
    collapse = collapse_metrics(features)
    return probe(features, view=view) | second_opinions(features) | collapse


def curve_point(backbone, pixels, norm, dev, note, before_exit, score=bach_row):
    """
    The score(features, view) of a teacher in training, embedded by all ranks; {} except on rank 0.

    Rank 0 fits the heads alone: if that fails, it costs the point and not the run, and the row is {"bach": None,
    "bach_error"}. If the forward fails on one rank, the others hang in a collective. We then write the file `note`,
    call before_exit() and stop; the resumed run finds the note and skips this evaluation.
    """
    start = time.time()
    failed = on_rank_0(f"{note} cannot be read", lambda: read_text(note))  # other nodes may list it later
    if failed is not None:
        return {"bach": None, "bach_error": failed}
    try:
        features = embed(backbone, pixels, *norm, dev)
    except Exception as e:
        with open(note, "w") as f:
            f.write(one_line(e))
        before_exit()
        raise
    if dist.get_rank() != 0:
        return {}
    try:
        row = {"embed_seconds": round(time.time() - start, 1), **score(features, View())}
        json.dumps(row)  # what cannot be written fails here
    except Exception as e:
        return {"bach": None, "bach_error": one_line(e)}
    row["protocol"] += ", teacher in bf16" if dev == "cuda" else ""  # eva embeds in fp32
    return {**row, "seconds": round(time.time() - start, 1)}


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- the command line, shared with eval_slides.py -------------------------------------------------------------------

weights = ""      # files or folders, with commas between: of this project, or any that docs/weights.md lists
views = "resize"  # to input_px; "tiles" = a grid of tiles at mpp, averaged, and "context" (BACH): other protocols
mpp = 0.5         # um/px of the tiles
image_mpp = 0.0   # um/px of the images, which views = "tiles" needs; 0 = BACH's own
input_px = SIZE   # side of the network's input; another size is another protocol
concat = False    # class token and mean patch: another protocol
arch = ""         # name in model.ARCHS; "" = as the file tells
norm = None       # "imagenet", "half" (Midnight, Kaiko), (mean, std); None = the model's own; one each: half,,half
dry_run = False   # say what would be scored, and stop
device = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("bach", "balanced", "std", "se_groups", "plateau", "clean", "accuracy", "knn")  # of the table


def table(rows):
    keys = [key for key in COLUMNS if key in rows[0]]
    width = max(len(row["weights"]) for row in rows)
    lines = ["weights".ljust(width) + "".join(key.rjust(11) for key in keys)]
    for row in rows:
        numbers = [f"{row[key]:11.4f}" for key in keys]
        lines.append(row["weights"].ljust(width) + "".join(numbers))
    return "\n".join(lines)


def view_of(config):
    if config["views"] not in ("resize", "tiles", "context"):
        raise ValueError(f"views = {config['views']!r}; known: 'resize' (eva's), 'tiles', 'context'")
    if config["input_px"] <= 0 or config["mpp"] <= 0:
        raise ValueError(f"input_px = {config['input_px']}, mpp = {config['mpp']}: both must be more than 0")
    mpp = 0.0 if config["views"] == "resize" else config["mpp"]
    context = config["context"] if config["views"] == "context" else ""
    if config["views"] == "context" and (not os.path.isfile(context) or config["concat"]):
        raise ValueError(f"context = {context!r}: views = 'context' needs a slide encoder's file, and no concat")
    return View(config["input_px"], mpp, config["concat"], context)


def weight_files(config):
    """[(file, norm)] of the weights in config; norm None = as the file states. ValueError for keys that do not fit."""
    files = [file.strip() for file in config["weights"].split(",") if file.strip()]
    norm = config["norm"]
    norms = [name.strip() or None for name in norm.split(",")] if isinstance(norm, str) else [norm]
    if not files or len(norms) not in (1, len(files)):
        raise ValueError(f"weights, norm: {len(files)} files, {len(norms)} norms; give --weights=FILE, several with "
                         "commas between, and one norm for all or one for each")
    for norm in norms:
        model.norm_values(norm)
    return list(zip(files, norms * (len(files) // len(norms))))


def score_file(file, norm, config, pixels, score=bach_row):
    """The row of one weight file: score(features, view) of images, and which weights and which norm gave it."""
    start, view = time.time(), view_of(config)
    backbone = model.load_backbone(file, config["arch"] or None).to(config["device"])
    if view.px % backbone.arch.patch_size:
        raise ValueError(f"{file}: input_px = {view.px} is no multiple of its patch, {backbone.arch.patch_size} px")
    mean, std = model.stored_norm(file) if norm is None else model.norm_values(norm)
    pool = context_pool(view, file, (mean, std)) if view.context else None
    row = score(embed(backbone, pixels, mean, std, config["device"], view, pool), view)
    stored = model.read_header(file)
    return {**row, "norm": (mean, std), "weights": file, "arch": config["arch"] or stored.get("arch"),
            "step": stored.get("step"), "seconds": round(time.time() - start, 1)}


def score_files(name, config, load):
    """
    Score each weight file of `config`; print a table and a JSON object for each, and for all if there are several.

    load() reads the images, once, and returns them with their score(features, view). A file that is missing or fails is
    named, and the others are still scored. SystemExit if there is such a file, or with lines that start with `name`,
    all that is missing at once, if nothing can be scored.
    """
    try:
        files, view = weight_files(config), view_of(config)
    except ValueError as e:
        raise SystemExit(f"{name}: {e}") from e
    missing = {file: how_to_get(file) for file, _ in files if not os.path.exists(file)}
    if config["dry_run"]:
        for file, norm in files:
            remedy = f", no such file; {missing[file]}" if file in missing else ""
            print(f"{file}: {view}, norm {norm or 'as the file states'}{remedy}")
        return
    said = [f"{name}: {file}: no such weight file; {remedy}" for file, remedy in missing.items()]
    there = [(file, norm) for file, norm in files if file not in missing]
    try:
        pixels, score = load()
    except (ValueError, OSError) as e:
        raise SystemExit("\n".join([*said, f"{name}: {e}"])) from e
    if not there:
        raise SystemExit("\n".join(said))
    for line in said:
        print(line, file=sys.stderr, flush=True)
    rows = []
    for file, norm in there:
        try:
            rows.append(score_file(file, norm, config, pixels, score))
        except (ValueError, OSError, RuntimeError) as e:  # the last: out of memory
            print(f"{name}: {file}: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        else:
            print(table(rows[-1:]), json.dumps(rows[-1]), sep="\n", flush=True)
    if len(rows) > 1:
        print(table(rows), json.dumps({"rows": rows}), sep="\n")
    if len(rows) < len(files):
        raise SystemExit(1)


if __name__ == "__main__":
    bach_dir = ""     # folder that holds ICIAR2018_BACH_Challenge/
    context = ""      # of views = "context", the same tiles read by this slide encoder (context.py)
    config = configure(globals())
    score_files("eval_bach", config, lambda: (load_pixels(bach_dir, view_of(config), image_mpp), bach_row))
