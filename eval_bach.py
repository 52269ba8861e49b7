"""
The BACH probe: how well does a frozen tile encoder tell four kinds of breast tissue apart?

    python eval_bach.py --weights=out/run/teacher/5000.pth --bach_dir=data/bach   # last line: one JSON object
    python eval_bach.py --runs='out/*'                                            # table and PNG of training runs

Follows kaiko-ai/eva v0.4.5 (offline BACH) step by step: 400 images of 2048x1536 px at 0.42 um/px, shrunk to 224 px
(2.88 um/px, a field of 645 um), CLS, linear heads, balanced accuracy. Read the number with care: there is no test
split, the same 132 images of 24 patients stop, select and score, and the score is a maximum over up to 6,250 epochs,
some 0.005-0.03 above the plateau. One image weighs 0.005-0.011, the binomial standard error is about 0.025 at 0.92: a
difference below 0.02 is no evidence. std is the spread over head seeds alone.

data: {bach_dir}/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/{b,is,iv,n}001..100.tif
from zenodo.org/records/3632035 (CC BY-NC-ND 4.0: resized copies must not be passed on). train.py imports evaluate().
"""
import glob
import json
import os
import statistics
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import model
from configurator import configure

# ---- the protocol: changing any of these invalidates every earlier row (and changes the `protocol` string) ----
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
# ---------------------------------------------------------------------------------------------------------------

TRAIN_INDEX = [i for first, end in TRAIN_RANGES for i in range(first, end)]
VAL_INDEX = sorted(set(range(400)) - set(TRAIN_INDEX))
LABELS = torch.arange(400) // 100
REMEDY = "bach_dir must hold ICIAR2018_BACH_Challenge/ as unzipped from zenodo.org/records/3632035"


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


def shrink(image):
    """uint8 (3, H, W) -> (3, 224, 224): torchvision's v2 Resize(224, antialias) and CenterCrop(224) to the last bit."""
    short, long = sorted(image.shape[1:])
    h, w = (SIZE if side == short else int(SIZE * long / short) for side in image.shape[1:])
    image = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = round((h - SIZE) / 2), round((w - SIZE) / 2)
    return image[:, top : top + SIZE, left : left + SIZE]


def read_image(path):
    """The first page of a TIFF as (shrunk uint8 (3, 224, 224), "WxH px"); ValueError if it cannot be decoded."""
    try:
        with Image.open(path) as page:
            pixels = np.array(page.convert("RGB"))
    except Exception as e:  # pillow raises OSError, SyntaxError, KeyError, struct.error, ... on a damaged file
        raise ValueError(f"{path}: not a readable TIFF ({type(e).__name__}: {e}); {REMEDY}") from e
    return shrink(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()), f"{pixels.shape[1]}x{pixels.shape[0]} px"


def load_pixels(bach_dir, threads=8):
    """uint8 (400, 3, 224, 224), 60 MB, in the order of bach_files. ValueError for a damaged file or an odd size."""
    paths, images, expected = bach_files(bach_dir), [], None
    with ThreadPoolExecutor(threads) as pool:
        for path, (image, size) in zip(paths, pool.map(read_image, paths)):
            expected = expected or size
            if size != expected:
                raise ValueError(f"{path}: {size}, but {os.path.basename(paths[0])} has {expected}; {REMEDY}")
            images.append(image)
    return torch.stack(images)


@torch.no_grad()
def embed(backbone, pixels, mean, std, device, batch_size=64):
    """
    CLS of uint8 pixels (n, 3, S, S) as float32 (n, D) on the CPU; mean and std (3 numbers each) are the model's own.

    A collective when torch.distributed runs: rank r embeds images r, r + world, ..., padded with repeats so that a
    sharded backbone sees equally many forward calls everywhere, and every rank returns all features.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = (torch.arange(-(-len(pixels) // world)) * world + rank) % len(pixels)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    training = [m for m in backbone.modules() if m.training]
    backbone.eval()
    batches = ((pixels[i].to(device).float() * (1 / 255) - mean) / std for i in mine.split(batch_size))
    features = torch.cat([backbone(x)["cls"].float() for x in batches])  # (n / world, D)
    for m in training:
        m.training = True
    if world > 1:
        parts = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(parts, features)
        features = torch.stack(parts, 1).flatten(0, 1)[: len(pixels)]  # image i is row i // world of rank i % world
    return features.cpu()


def spread(features):
    """
    Two signs of collapse in features (n, D): {"effective_rank", "mean_cosine"}. ValueError if a feature is not finite.

    effective_rank is exp(entropy of the normalised singular values), Roy and Vetterli 2007, of the centred features:
    the dimensions in use, 1 to min(n - 1, D). A direction common to all images, which would hide these, is left to
    mean_cosine, over all pairs of images. A single point gives 1 and 1, an isotropic cloud nearly full rank and 0.
    """
    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"features of {bad} of {len(features)} images are not finite: NaN in the weights or overflow")
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


def accuracies(heads, x, onehot):
    """Balanced accuracy (mean of the classes' recalls) and plain accuracy of R heads, each (R,)."""
    hits = (heads @ x.T).view(len(onehot), -1, len(x)).argmax(0) == onehot.argmax(0)  # (R, N)
    counts = hits.to(x.dtype) @ onehot[:, 0].T  # whole numbers: equal hits give equal floats, a tie is no increase
    return (counts / onehot.sum((1, 2))).mean(1), counts.sum(1) / len(x)


@torch.no_grad()
def fit_heads(features, labels, train_index, val_index, runs, seed, max_steps):
    """
    Train `runs` linear heads side by side (AdamW is element-wise, so they do not meet); see probe.

    Returns balanced and plain validation accuracy after each epoch, both (epochs, runs), and each head's best epoch.
    Head r draws from its own generator: (C, D+1) values of U(-1/sqrt(D), 1/sqrt(D)) as nn.Linear does, the last column
    being the bias, which meets a constant feature of 1; then one permutation an epoch.
    """
    x = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    onehot = F.one_hot(labels).T[:, None].to(x.dtype)
    x, x_val, onehot, onehot_val = x[train_index], x[val_index], onehot[..., train_index], onehot[..., val_index]
    generators = [torch.Generator().manual_seed(seed + r) for r in range(runs)]
    bound, shape = features.shape[1] ** -0.5, (len(onehot), x.shape[1])
    heads = [torch.empty(shape, dtype=x.dtype).uniform_(-bound, bound, generator=g) for g in generators]
    heads = torch.stack(heads, 1).flatten(0, 1)  # (C*R, D+1)
    optimizer = torch.optim.AdamW([heads], lr=LR, weight_decay=WEIGHT_DECAY)

    epochs = max_steps // -(-len(x) // BATCH)
    balanced, plain = torch.zeros(2, epochs, runs, dtype=x.dtype)
    best, best_epoch = torch.full((runs,), -1, dtype=x.dtype), torch.zeros(runs, dtype=torch.long)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = LR * WARM_FACTOR if epoch < WARM_EPOCHS else LR
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators])  # (R, N)
        for batch in order.split(BATCH, 1):
            weight = torch.zeros(order.shape, dtype=x.dtype).scatter_(1, batch, 1 / batch.shape[1])
            heads.grad = cross_entropy_grad(heads, x, onehot, weight)
            optimizer.step()
        balanced[epoch], plain[epoch] = accuracies(heads, x_val, onehot_val)
        better = (balanced[epoch] > best) & (epoch - best_epoch <= PATIENCE)  # a stopped head trains on but is closed
        best[better], best_epoch[better] = balanced[epoch, better], epoch
        if (epoch - best_epoch >= PATIENCE).all():
            break
    return balanced, plain, best_epoch.tolist()


def probe(features, labels, train_index, val_index, runs=RUNS, seed=SEED, max_steps=MAX_STEPS):
    """
    eva's linear probe of features (n, D) with labels (n,), on the CPU; leaves the global random state alone.

    bach: mean over heads of the best balanced accuracy on val_index; std: their sample deviation; seeds: the values;
    accuracy: plain, at the same epochs; plateau: balanced, over the last fifth of each head's epochs; epochs: how many
    these were; protocol: rows that differ in it cannot be compared. At most 6 s at D = 128, 15 s at 1536, on one core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more, which on a busy machine cost minutes
    balanced, plain, best = fit_heads(features, labels, train_index, val_index, runs, seed, max_steps)
    torch.set_num_threads(threads)
    epochs = [min(epoch + PATIENCE + 1, len(balanced)) for epoch in best]
    seeds = [balanced[best[r], r].item() for r in range(runs)]
    return {
        "bach": statistics.mean(seeds),
        "std": statistics.stdev(seeds) if runs > 1 else 0.0,
        "seeds": seeds,
        "accuracy": statistics.mean(plain[best[r], r].item() for r in range(runs)),
        "plateau": statistics.mean(balanced[int(0.8 * epochs[r]) : epochs[r], r].mean().item() for r in range(runs)),
        "epochs": epochs,
        "protocol": f"eva-bach: cls {SIZE} px, {len(train_index)}/{len(val_index)}, {runs} heads from seed {seed}, "
                    f"AdamW {LR:g} wd {WEIGHT_DECAY:g} warm {WARM_EPOCHS}x{WARM_FACTOR:.3g} batch {BATCH}, "
                    f"{max_steps} steps, patience {PATIENCE}",
    }


def evaluate(backbone, pixels, mean, std, device):
    """One row of bach.jsonl but for its step. Call it on all ranks; those above 0 return None once all is embedded."""
    features = embed(backbone, pixels, mean, std, device)
    row = spread(features)  # before ranks part: non-finite features raise on all, so that none waits for a dead one
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    return probe(features, LABELS, TRAIN_INDEX, VAL_INDEX) | row


def read_rows(path):
    """Rows of a bach.jsonl by step. A resumed run repeats steps: the later row counts; an unfinished line does not."""
    try:
        with open(path) as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
        return [row for _, row in sorted({row["step"]: row for row in rows}.items())]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: each line must be a JSON object with a step ({type(e).__name__}: {e})") from e


def curve_table(rows):
    """Plain-text table of bach.jsonl rows, one line a row; nan for what a row lacks."""
    lines = [f"{'step':>8}  {'BACH +- std':>16}  {'plateau':>7}  {'eff. rank':>9}  {'mean cosine':>11}"]
    keys = ("std", "plateau", "effective_rank", "mean_cosine")
    for row in rows:
        std, plateau, rank, cos = (row.get(k, float("nan")) for k in keys)
        lines.append(f"{row['step']:>8}  {row['bach']:.4f} +- {std:6.4f}  {plateau:7.4f}  {rank:9.1f}  {cos:11.4f}")
    return "\n".join(lines)


def plot_curves(rows, title, path):
    """The curve of bach.jsonl rows with its band of +- std over heads, as a PNG. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    steps, mean, std = (np.array([row[k] for row in rows]) for k in ("step", "bach", "std"))
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="balanced accuracy, 132 images", title=title)
    axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0, label="+- std over heads")
    axes.plot(steps, mean, marker="o", markersize=3, label="mean over heads")
    axes.axhline(0.25, color="gray", linewidth=0.8, linestyle="--", label="chance")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def show_runs(pattern):
    folders = [d for d in sorted(glob.glob(pattern)) if os.path.exists(os.path.join(d, "bach.jsonl"))]
    if not folders:
        raise ValueError(f"runs={pattern}: no folder with a bach.jsonl; train with bach_dir set to get one")
    for folder in folders:
        rows, path = read_rows(os.path.join(folder, "bach.jsonl")), os.path.join(folder, "bach.png")
        print(f"{folder}\n{curve_table(rows)}")
        try:
            plot_curves(rows, os.path.basename(os.path.abspath(folder)), path)
            print(path)
        except ImportError:
            print(f"{path} not written: pip install matplotlib")


def score_weights(weights, bach_dir, arch, device, norm=None):
    if not weights or not bach_dir:
        raise ValueError(f"give --weights=FILE and --bach_dir=DIR, or --runs='out/*'; {REMEDY}")
    started = time.time()
    backbone = model.load_backbone(weights, arch or None).to(device)
    file = torch.load(weights, map_location="cpu", mmap=True, weights_only=True) if zipfile.is_zipfile(weights) else {}
    mean, std = model.stored_norm(weights) if norm is None else model.norm_values(norm)
    pixels = load_pixels(bach_dir)
    print(f"read {weights} and {len(pixels)} images in {time.time() - started:.0f} s; norm = {(mean, std)}")
    row = evaluate(backbone, pixels, mean, std, device)
    print(f"BACH {row['bach']:.4f} +- {row['std']:.4f} over {len(row['seeds'])} heads, plateau {row['plateau']:.4f}, "
          f"effective rank {row['effective_rank']:.1f}, mean cosine {row['mean_cosine']:.4f}")
    row |= {"norm": (mean, std), "weights": weights, "arch": arch or file.get("arch"), "step": file.get("step")}
    print(json.dumps(row))


if __name__ == "__main__":
    weights = ""      # a released DINOv2 or DINOv3 file, or a teacher of this project
    bach_dir = ""     # folder that holds ICIAR2018_BACH_Challenge/
    runs = ""         # instead of these two: run folders, a quoted glob
    arch = ""         # name in model.ARCHS; "" = as the file tells
    norm = None       # "imagenet", "half" (Midnight, Kaiko), (mean, std); None = the teacher's own, else imagenet
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configure(globals())
    try:
        if runs:
            show_runs(runs)
        else:
            score_weights(weights, bach_dir, arch, device, norm)
    except (ValueError, OSError) as e:
        raise SystemExit(f"eval_bach: {e}")
