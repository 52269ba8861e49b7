"""
A frozen tile encoder scored on labelled tiles of your own, by patient.

    python eval_slides.py --weights=out/run/teacher/5000.pth --image_dir=data/crc     # the last line is one JSON object
    python eval_slides.py --weights=a.pth,b.pth --image_dir=data/crc --views=tiles --mpp=0.5 --image_mpp=0.25

data: {image_dir}/{class}/*.{jpg,jpeg,png,tif,tiff} of any size. {image_dir}/groups.csv or --groups=FILE says which
patient each image is from:

    file,patient,fold          class/name, or the name alone where only one class has it
    tumor/a_001.png,P01,0      fold is optional, a published split; without it we make 5 folds (needs scikit-learn)

Fold f tests, fold f + 1 stops and selects the heads, and the others train. No image has a say in its own score, and
each patient is in one fold only. Read `balanced` with `se_groups`, its standard error over patients, which is a rough
guess below ten of them. std is the deviation over the seeds of the heads and says nothing about other patients.
"""
import csv
import hashlib
import os
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

import eval_bach
from configurator import configure

# ---- the protocol, with that of the heads in eval_bach.py: changing any of these invalidates earlier rows ------------
FOLDS = 5                       # fewer where a class has fewer groups, at least 3
SHOTS, SUPPORT_SETS = 16, 1000  # images per class, and how often they are drawn
RUNS, SEED, MAX_STEPS = eval_bach.RUNS, eval_bach.SEED, eval_bach.MAX_STEPS
CHUNK = 20                      # support sets drawn at a time, which bounds the memory
# ----------------------------------------------------------------------------------------------------------------------
TYPES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class Samples(NamedTuple):
    """What is known of n samples before any of them is read."""

    files: list           # n times class/name, sorted
    labels: torch.Tensor  # (n,) indices into classes
    classes: list         # C names, sorted
    groups: torch.Tensor  # (n,) 0 .. G - 1, one per patient
    folds: torch.Tensor   # (n,) 0 .. k - 1


def find_samples(image_dir, groups=""):
    """The Samples of a folder with a subfolder per class; groups is a csv, "" = groups.csv in it. Raises ValueError."""
    files, labels, classes = find_images(image_dir)
    table, patients, folds = groups or os.path.join(image_dir, "groups.csv"), files, None
    if groups or os.path.exists(table):
        patients, folds = read_groups(table, files)
    else:
        print(f"{image_dir}: no groups.csv, so each image is its own group; images of one patient may be on both sides "
              "of a split, which flatters", flush=True)
    numbers = {name: i for i, name in enumerate(sorted(set(patients)))}
    labels = torch.tensor(labels)
    groups = torch.tensor([numbers[name] for name in patients])
    return Samples(files, labels, classes, groups, find_folds(image_dir, labels, classes, groups, folds))


def find_images(image_dir):
    """Files as class/name, their labels, and the classes. Hidden names and what macOS leaves in zips do not count."""
    if not os.path.isdir(image_dir):
        raise ValueError(f"image_dir={image_dir}: no such folder")
    folders = [e.name for e in os.scandir(image_dir) if e.is_dir()]
    classes = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
    if len(classes) < 2:
        raise ValueError(f"image_dir={image_dir}: {' '.join(classes) or 'nothing'} as class folders; put the images of "
                         "each of two or more classes in a subfolder of its own")
    files, labels = [], []
    for label, name in enumerate(classes):
        folder = os.path.join(image_dir, name)
        entries = [e for e in os.scandir(folder) if e.name[0] != "."]
        if nested := [e.path for e in entries if e.is_dir()]:
            raise ValueError(f"{nested[0]}: a folder in a class folder would be left out; move its images up")
        found = sorted(f"{name}/{e.name}" for e in entries if e.name.lower().endswith(TYPES))
        if not found:
            raise ValueError(f"{folder}: no {' '.join(TYPES)} in this class folder; fill it or move it away")
        files += found
        labels += [label] * len(found)
    return files, labels, classes


def read_groups(path, files):
    """The patient of each of files, and their folds counted from 0, or None if the csv has no such column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            table = csv.DictReader(f, skipinitialspace=True)
            lines, columns = [(table.line_num, row) for row in table], table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a readable csv in UTF-8 ({e})") from e
    if not {"file", "patient"} <= set(columns):
        raise ValueError(f"{path}: its columns are {columns}; the first line must be file,patient or file,patient,fold")
    full_names = {}  # of a full name or a bare one
    for file in files:
        full_names.setdefault(file, []).append(file)
        full_names.setdefault(file.split("/")[1], []).append(file)
    patients, folds = {}, {}
    for line, row in lines:
        name, patient, fold = ((row.get(key) or "").strip() for key in ("file", "patient", "fold"))
        found = full_names.get(name.replace("\\", "/").removeprefix("./"), [])
        if len(found) != 1:
            raise ValueError(f"{path}, line {line}: {len(found) or 'no'} images in the class folders are called "
                             f"'{name}'; write class/name, and leave out files that are not there")
        if found[0] in patients:
            raise ValueError(f"{path}, line {line}: {found[0]} is listed twice; delete one of the lines")
        if not patient or "fold" in columns and not fold.isdecimal():
            raise ValueError(f"{path}, line {line}: patient '{patient}', fold '{fold}'; give each image a patient, and "
                             "a whole number as its fold or no column fold")
        patients[found[0]], folds[found[0]] = patient, fold
    if missing := [file for file in files if file not in patients]:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} images are not listed, such as {missing[0]}; add "
                         "them or move them away")
    patients = [patients[file] for file in files]
    if "fold" not in columns:
        return patients, None
    return patients, check_folds(path, patients, [int(folds[file]) for file in files])


def check_folds(path, patients, folds):
    """The folds counted from 0. ValueError if there are too few, or if a patient is in two of them."""
    home, numbers = {}, sorted(set(folds))
    for patient, fold in zip(patients, folds):
        if home.setdefault(patient, fold) != fold:
            raise ValueError(f"{path}: patient {patient} is in folds {home[patient]} and {fold}; put all images of a "
                             "patient in one fold")
    if len(numbers) < 3:
        raise ValueError(f"{path}: the folds are {numbers}; give at least 3 (to train, select and test), or leave the "
                         "column out")
    return [numbers.index(fold) for fold in folds]


def find_folds(image_dir, labels, classes, groups, folds):
    """Folds (n,): the given ones, or made if None. ValueError if a class has too few groups or none to train on."""
    counts = [len(groups[labels == label].unique()) for label in range(len(classes))]
    fewest = min(counts)
    name = classes[counts.index(fewest)]
    if fewest < 3:
        raise ValueError(f"image_dir={image_dir}: groups (patients) of class {name}: {fewest}; 3 are needed, to train, "
                         "select and test; add patients, or merge or drop the class")
    if folds is None and fewest < FOLDS:
        print(f"{image_dir}: {fewest} folds, not {FOLDS}: class {name} has no more groups", flush=True)
    folds = make_folds(labels, groups, min(fewest, FOLDS)) if folds is None else torch.tensor(folds)
    for f, (train, _, _) in enumerate(splits(folds)):
        if absent := set(range(len(classes))) - set(labels[train].tolist()):
            raise ValueError(f"image_dir={image_dir}: when fold {f} (from 0) tests and the next one selects, no image "
                             f"of class {classes[min(absent)]} is left to train on; give other folds in groups.csv")
    return folds


def make_folds(labels, groups, k):
    """k folds (n,) of whole groups with like shares of the classes; no randomness. ValueError without scikit-learn."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise ValueError("to make folds: pip install scikit-learn, or give groups.csv a column fold") from None
    folds = torch.empty_like(labels)
    parts = StratifiedGroupKFold(k).split(labels, labels.numpy(), groups.numpy())
    for f, (_, test) in enumerate(parts):
        folds[torch.from_numpy(test)] = f
    assert len(folds.unique()) == k, folds.bincount()
    return folds


def splits(folds):
    """(train, selection, test) indices for each fold f of k: f tests and the next one selects."""
    k = int(folds.max()) + 1
    for f in range(k):
        test, selection = folds == f, folds == (f + 1) % k
        yield [mask.nonzero()[:, 0] for mask in (~test & ~selection, selection, test)]


def standard_error(predicted, labels, groups):
    """
    Standard error of the heads' mean balanced accuracy over groups; predicted is (R, n).

    It is the delete-one-group jackknife, sqrt((G - 1) / G sum_g (s_g - mean s)^2) with s_g the score without group g
    (Tukey 1958), which errs upwards (Efron and Stein 1981). Nothing is drawn, and no class is ever absent. It covers
    the choice of patients to test, not the choice of patients to train on.
    """
    onehot = F.one_hot(labels).double()  # (n, C)
    share = (predicted == labels).double().mean(0)  # of the heads that are right
    counts = torch.stack([share[:, None] * onehot, onehot])  # hits and images
    of_group = counts.new_zeros(2, int(groups.max()) + 1, onehot.shape[1]).index_add_(1, groups, counts)
    hits, images = of_group.sum(1, keepdim=True) - of_group  # (G, C) without group g
    s = (hits / images).mean(1)
    squares = (s - s.mean()).square().sum()
    return (squares * (len(s) - 1) / len(s)).sqrt().item()


def simple_shot(x, support, query):
    """
    Classes (S, n) of query (n, D), for S support sets of K images per class: indices (S, C, K) into x (m, D).

    Features are centred by the mean of the set and L2-normalised; the nearest class mean wins (SimpleShot's CL2N, Wang
    et al. 2019; nanopath's 16-shot).
    """
    images = x[support]
    centre = images.mean((1, 2))  # (S, D)
    means = F.normalize(images - centre[:, None, None], dim=-1).mean(2)  # (S, C, D)
    # with z = (q - centre) / |q - centre| the nearest mean m has the largest z.m - |m|^2 / 2, so that products suffice
    dots = means @ query.T - (means * centre[:, None]).sum(-1, keepdim=True)
    norms = query.square().sum(1) - 2 * centre @ query.T + centre.square().sum(1, keepdim=True)  # (S, n)
    z_m = dots / norms.clamp(min=torch.finfo(x.dtype).tiny).sqrt()[:, None]
    return (z_m - means.square().sum(-1, keepdim=True) / 2).argmax(1)


def few_shot(features, labels, folds, shots):
    """Balanced accuracy for each of SUPPORT_SETS draws; the support of an image comes from outside its fold."""
    x = features - features.mean(0)  # simple_shot centres anyway, but a direction common to all would cost it digits
    predicted = torch.empty(SUPPORT_SETS, len(x), dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    for train, selection, test in splits(folds):
        outside = torch.cat([train, selection])
        pools = [outside[labels[outside] == label] for label in range(int(labels.max()) + 1)]
        for rows in predicted.split(CHUNK):
            support = []
            for pool in pools:
                drawn = torch.rand(len(rows), len(pool), generator=generator).topk(shots).indices
                support.append(pool[drawn])
            rows[:, test] = simple_shot(x, torch.stack(support, 1), x[test])
    return eval_bach.balanced_accuracy(predicted, labels)


def probe(features, labels, groups, folds):
    """Scores of features (n, D), each sample's by heads, neighbours and support sets outside its fold; see score."""
    predicted = torch.empty(RUNS, len(labels), dtype=torch.long)
    neighbours = torch.empty(1, len(labels), dtype=torch.long)
    by_fold, shots = [], SHOTS
    for train, selection, test in splits(folds):
        _, _, classes = eval_bach.fit_heads(features, labels, train, selection, RUNS, SEED, MAX_STEPS)
        predicted[:, test] = classes[:, test]
        balanced = eval_bach.balanced_accuracy(classes[:, test], labels[test])
        by_fold.append(balanced.mean().item())
        outside = torch.cat([train, selection])
        neighbours[:, test] = eval_bach.knn(features, labels, outside, test)
        shots = min(shots, int(labels[outside].bincount().min()))
    seeds = eval_bach.balanced_accuracy(predicted, labels).tolist()
    draws = few_shot(features, labels, folds, shots)
    return {
        "balanced": statistics.mean(seeds), "std": statistics.stdev(seeds),
        "se_groups": standard_error(predicted, labels, groups), "seeds": seeds, "folds": by_fold,
        "recall": eval_bach.recalls(predicted, labels).mean(0).tolist(),
        "confusion": eval_bach.confusion(predicted, labels),
        "knn": eval_bach.balanced_accuracy(neighbours, labels).item(),
        "shot16": draws.mean().item(), "shot16_std": draws.std().item(), "shots": shots,
    }


def score(config, samples, features, view):
    """
    The row of features (n, D) of samples. ValueError for features that are not finite.

    balanced: mean over heads of the balanced accuracy of all samples; std: its sample deviation; seeds: the values;
    se_groups: standard error over groups; folds: mean over heads in each; recall (per class) and confusion (rows are
    true classes): mean or sum over heads; knn; shot16, its deviation over support sets, and the shots it had; protocol:
    rows that differ in it cannot be compared.
    """
    files, labels, classes, groups, folds = samples
    image_dir, n, G = config["image_dir"], len(files), int(groups.max()) + 1
    collapse = eval_bach.collapse_metrics(features)
    row = probe(features, labels, groups, folds)
    if row["shots"] < SHOTS:
        print(f"{image_dir}: shot16 has {row['shots']} shots, the images that a class has outside some fold")
    listed = [f"{file},{fold}\n" for file, fold in zip(files, folds.tolist())]
    checksum = hashlib.sha256("".join(listed).encode()).hexdigest()[:8]
    scale = f" from {config['image_mpp']:g}" if view.mpp else ""
    row["protocol"] = (
        f"folder: {view}{scale}, {n} images of {G} groups in {len(row['folds'])} folds, files and folds {checksum}, "
        f"{eval_bach.heads_protocol(RUNS, SEED, MAX_STEPS)}, {eval_bach.NEIGHBOURS} neighbours temp "
        f"{eval_bach.KNN_TEMP:g}, {row['shots']} shots x {SUPPORT_SETS}")
    return {"image_dir": image_dir, "images": n, "classes": classes, "groups": G, **row, **collapse}


def load(config):
    """The images that config names, in memory once for all weights (150 KB per tile at 224 px), and their score."""
    image_dir, view = config["image_dir"], eval_bach.view_of(config)
    if view.mpp and config["image_mpp"] <= 0:
        raise ValueError(f"image_dir={image_dir}: views=tiles needs its images' um/px; give --image_mpp=0.25, say")
    samples = find_samples(image_dir, config["groups"])
    paths = [os.path.join(image_dir, file) for file in samples.files]
    pixels, _ = eval_bach.load_images(paths, view, config["image_mpp"])
    return pixels, lambda features, view: score(config, samples, features, view)


if __name__ == "__main__":
    weights = ""      # files or Hugging Face folders, with commas between: released, of this project, OpenMidnight's
    image_dir = ""    # folder of labelled tiles, with a subfolder for each class
    groups = ""       # csv of file, patient and perhaps fold; "" = groups.csv in image_dir, if there is one
    views = "resize"  # to input_px; "tiles" = a grid of tiles at mpp, averaged: another protocol
    mpp = 0.5         # um/px of the tiles
    image_mpp = 0.0   # um/px of the images, which views=tiles needs
    input_px = eval_bach.SIZE  # side of the network's input; another size is another protocol
    concat = False    # class token and mean patch: another protocol
    arch = ""         # name in model.ARCHS; "" = as the file tells
    norm = None       # "imagenet", "half" (Midnight, Kaiko), (mean, std); None = the model's own; one each: half,,half
    dry_run = False   # say what would be scored, and stop
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configure(globals())
    eval_bach.score_files("eval_slides", config, lambda: load(config))
