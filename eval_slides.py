"""
The same probe on any folder of labelled tiles, patients kept apart: BACH's 132 images decide little alone.

    python eval_bach.py --weights=out/run/teacher/5000.pth --image_dir=data/crc        # last line: one JSON object
    python eval_bach.py --weights=a.pth,b.pth --image_dir=data/crc --views=tiles --mpp=0.5 --image_mpp=0.25

data: {image_dir}/{class}/*.{jpg,jpeg,png,tif,tiff} of any size, and in {image_dir}/groups.csv or --groups=FILE

    file,patient,fold          class/name, or the name alone where only one class has it
    tumor/a_001.png,P01,0      fold is optional, a published split; without it 5 folds are made (needs scikit-learn)

Fold f tests, fold f + 1 stops and selects, the others train: no image has a say in its own score, and a patient is in
one fold only. Read `balanced` with `se_groups`, its error over patients (a rough guess below ten of them), not with
std, the spread over single head seeds, which tells nothing of other patients.
"""
import csv
import hashlib
import os
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

import eval_bach

# ---- the protocol, beside the head's in eval_bach.py: changing any of these invalidates every earlier row ----
FOLDS = 5                       # fewer where a class has fewer groups, at least 3
SHOTS, SUPPORT_SETS = 16, 1000  # images of each class, and draws of them
RUNS, SEED, MAX_STEPS = eval_bach.RUNS, eval_bach.SEED, eval_bach.MAX_STEPS
CHUNK = 20                      # support sets drawn at a time, which bounds the memory
# ---------------------------------------------------------------------------------------------------------------
TYPES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class Folder(NamedTuple):
    files: list           # n times class/name, sorted
    labels: torch.Tensor  # (n,) places in classes
    classes: list         # C names of subfolders, sorted
    groups: torch.Tensor  # (n,) 0 .. G - 1, a patient each
    folds: torch.Tensor   # (n,) 0 .. k - 1
    pixels: list          # n uint8 (3, h, w)


def load(c):
    """
    The Folder that eval_bach.py's keys c name, in memory once for all weights (150 KB a tile at 224 px). ValueError for
    bad input: before any image is read, but for an unreadable one.
    """
    view, image_dir = eval_bach.view_of(c), c["image_dir"]
    if view.mpp and c["image_mpp"] <= 0:
        raise ValueError(f"image_dir={image_dir}: views=tiles needs its images' um/px; give --image_mpp=0.25, say")
    files, labels, classes = find_images(image_dir)
    table, patients, folds = c["groups"] or os.path.join(image_dir, "groups.csv"), files, None
    if c["groups"] or os.path.exists(table):
        patients, folds = read_groups(table, files)
    else:
        print(f"{image_dir}: no groups.csv, so each image is its own group; images of one patient may be on both sides "
              "of a split, which flatters", flush=True)
    place = {name: i for i, name in enumerate(sorted(set(patients)))}
    labels, groups = torch.tensor(labels), torch.tensor([place[name] for name in patients])
    folds = find_folds(image_dir, labels, classes, groups, folds)
    pixels = eval_bach.load_images([os.path.join(image_dir, file) for file in files], view, c["image_mpp"])
    return Folder(files, labels, classes, groups, folds, pixels)


def find_images(image_dir):
    """Files as class/name, the label of each, and the classes. Hidden names and what macOS zips leave do not count."""
    if not os.path.isdir(image_dir):
        raise ValueError(f"image_dir={image_dir}: no such folder")
    classes = sorted(e.name for e in os.scandir(image_dir) if e.is_dir() and e.name[0] != "." and e.name != "__MACOSX")
    if len(classes) < 2:
        raise ValueError(f"image_dir={image_dir}: {' '.join(classes) or 'nothing'} as class folders; put the images of "
                         "each of two or more classes in a subfolder of its own")
    files = [[f"{name}/{file}" for file in sorted(os.listdir(os.path.join(image_dir, name)))
              if file.lower().endswith(TYPES) and file[0] != "."] for name in classes]
    nested = [e.path for name in classes for e in os.scandir(os.path.join(image_dir, name)) if e.is_dir()]
    if nested := [path for path in nested if os.path.basename(path)[0] != "."]:
        raise ValueError(f"{nested[0]}: a folder in a class folder, which would be left out; put its images beside it")
    if empty := [name for name, found in zip(classes, files) if not found]:
        raise ValueError(f"{os.path.join(image_dir, empty[0])}: no {' '.join(TYPES)} directly in this class folder; "
                         "fill it or move it away")
    return sum(files, []), [label for label, found in enumerate(files) for _ in found], classes


def read_groups(path, files):
    """The patient of each of files, and their folds, counted from 0, or None if the csv has no such column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            table = csv.DictReader(f, skipinitialspace=True)
            lines, columns = [(table.line_num, row) for row in table], table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a readable csv in UTF-8 ({e})") from e
    if missing := {"file", "patient"} - set(columns):
        raise ValueError(f"{path}: no column {' and '.join(sorted(missing))} but {columns}; its first line must be "
                         "file,patient or file,patient,fold")
    rows, places = {}, {}
    for file in files:
        places.setdefault(file, []).append(file)
        places.setdefault(file.split("/")[1], []).append(file)
    for line, row in lines:
        name, patient, fold = ((row.get(key) or "").strip() for key in ("file", "patient", "fold"))
        found = places.get(name.replace("\\", "/").removeprefix("./"), [])
        if len(found) != 1:
            raise ValueError(f"{path}, line {line}: {len(found) or 'no'} images in the class folders are called "
                             f"'{name}'; write class/name, and leave out files that are not there")
        if found[0] in rows:
            raise ValueError(f"{path}, line {line}: {found[0]} is listed twice; delete one of the lines")
        if not patient or "fold" in columns and not fold.isdecimal():
            raise ValueError(f"{path}, line {line}: patient '{patient}', fold '{fold}'; give each image a patient, and "
                             "a whole number as its fold or no column fold")
        rows[found[0]] = patient, fold
    if missing := [file for file in files if file not in rows]:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} images are not listed, such as {missing[0]}; add "
                         "them or move them away")
    patients, folds = zip(*(rows[file] for file in files))
    return patients, check_folds(path, patients, [int(fold) for fold in folds]) if "fold" in columns else None


def check_folds(path, patients, folds):
    """The folds counted from 0. ValueError if a number is left out or a patient is in two of them."""
    home, numbers = {}, sorted(set(folds))
    for patient, fold in zip(patients, folds):
        if home.setdefault(patient, fold) != fold:
            raise ValueError(f"{path}: patient {patient} is in folds {home[patient]} and {fold}; put all images of a "
                             "patient in one fold")
    if len(numbers) < 3 or numbers[-1] - numbers[0] != len(numbers) - 1:
        raise ValueError(f"{path}: the folds are {numbers[:10]}; number at least 3 (to train, select and test) without "
                         "a gap, or leave the column out")
    return [fold - numbers[0] for fold in folds]


def find_folds(image_dir, labels, classes, groups, folds):
    """Folds (n,): the given ones, or made if None. ValueError if a class has too few groups or none to train on."""
    fewest, name = min((len(groups[labels == label].unique()), name) for label, name in enumerate(classes))
    if fewest < 3:
        raise ValueError(f"image_dir={image_dir}: groups (patients) of class {name}: {fewest}; 3 are needed, to train, "
                         "select and test; add patients, or merge or drop the class")
    if folds is None and fewest < FOLDS:
        print(f"{image_dir}: {fewest} folds, not {FOLDS}: class {name} has no more groups", flush=True)
    folds = make_folds(labels, groups, min(fewest, FOLDS)) if folds is None else torch.tensor(folds)
    for f, (train, _, _) in enumerate(splits(folds)):
        if absent := sorted(set(range(len(classes))) - set(labels[train].tolist())):
            raise ValueError(f"image_dir={image_dir}: when fold {f} (from 0) tests and the next one selects, no image "
                             f"of class {classes[absent[0]]} is left to train on; give other folds in groups.csv")
    return folds


def make_folds(labels, groups, k):
    """k folds (n,) of whole groups with like shares of the classes; no randomness. ValueError without scikit-learn."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise ValueError("to make folds: pip install scikit-learn, or give groups.csv a column fold") from None
    folds = torch.empty_like(labels)
    for f, (_, test) in enumerate(StratifiedGroupKFold(k).split(labels, labels.numpy(), groups.numpy())):
        folds[torch.from_numpy(test)] = f
    assert len(folds.unique()) == k, folds.bincount()
    return folds


def splits(folds):
    """(train, selection, test) places for each fold f of k: f tests, the next one selects."""
    k = int(folds.max()) + 1
    masks = [((folds != f) & (folds != (f + 1) % k), folds == (f + 1) % k, folds == f) for f in range(k)]
    return [tuple(mask.nonzero()[:, 0] for mask in parts) for parts in masks]


def standard_error(predicted, labels, groups):
    """
    Of the heads' mean balanced accuracy, predicted being (R, n): the delete-one-group jackknife, sqrt((G - 1) / G
    sum_g (s_g - mean s)^2) with s_g the score without group g (Tukey 1958; it errs upwards, Efron and Stein 1981).

    Nothing is drawn, and no class is ever absent. Other patients to test are in it, other patients to train on are not.
    """
    onehot = F.one_hot(labels).double()  # (n, C)
    counts = torch.stack([(predicted == labels).double().mean(0)[:, None] * onehot, onehot])  # hits and images
    of_group = counts.new_zeros(2, int(groups.max()) + 1, onehot.shape[1]).index_add_(1, groups, counts)
    hits, images = of_group.sum(1, keepdim=True) - of_group  # (G, C) without group g
    s = (hits / images).mean(1)
    return ((s - s.mean()).square().sum() * (len(s) - 1) / len(s)).sqrt().item()


def simple_shot(x, support, query):
    """
    Classes (S, n) of query (n, D) by S support sets of K images a class, places (S, C, K) in x (m, D): centred by the
    mean of the set, L2-normalised, nearest class mean (SimpleShot's CL2N, Wang et al. 2019; nanopath's 16-shot).
    """
    images = x[support]
    centre = images.mean((1, 2))  # (S, D)
    means = F.normalize(images - centre[:, None, None], dim=-1).mean(2)  # (S, C, D)
    # with z = (q - centre) / |q - centre|, the nearest m has the largest z.m - |m|^2 / 2: products do for all
    dots = means @ query.T - (means * centre[:, None]).sum(-1, keepdim=True)
    norms = query.square().sum(1) - 2 * centre @ query.T + centre.square().sum(1, keepdim=True)  # (S, n)
    z_m = dots / norms.clamp(min=torch.finfo(x.dtype).tiny).sqrt()[:, None]
    return (z_m - means.square().sum(-1, keepdim=True) / 2).argmax(1)


def few_shot(features, labels, folds, shots):
    """Balanced accuracy with each of SUPPORT_SETS draws; an image's support comes from outside its fold."""
    x = features - features.mean(0)  # simple_shot centres anyway; a direction common to all would cost it digits
    predicted, generator = torch.empty(SUPPORT_SETS, len(x), dtype=torch.long), torch.Generator().manual_seed(SEED)
    for train, selection, test in splits(folds):
        outside = torch.cat([train, selection])
        pools = [outside[labels[outside] == label] for label in range(int(labels.max()) + 1)]
        for rows in predicted.split(CHUNK):
            draws = [pool[torch.rand(len(rows), len(pool), generator=generator).topk(shots).indices] for pool in pools]
            rows[:, test] = simple_shot(x, torch.stack(draws, 1), x[test])
    return eval_bach.balanced_accuracy(predicted, labels)


def probe(features, labels, groups, folds):
    """Scores of features (n, D), of each image by heads, neighbours and support sets outside its fold; see score."""
    predicted, neighbours = torch.empty(RUNS, len(labels), dtype=torch.long), torch.empty(1, len(labels)).long()
    by_fold, shots = [], SHOTS
    for train, selection, test in splits(folds):
        heads = eval_bach.fit_heads(features, labels, train, selection, RUNS, SEED, MAX_STEPS)[2][:, test]
        outside, predicted[:, test] = torch.cat([train, selection]), heads
        by_fold.append(eval_bach.balanced_accuracy(heads, labels[test]).mean().item())
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


def score(c, data, backbone, mean, std):
    """
    The row of one backbone on data, load(c)'s Folder. ValueError for features that are not finite.

    balanced: mean over heads of the balanced accuracy of all images; std: their sample deviation; seeds: the values;
    se_groups: error over groups; folds: mean over heads in each; recall (a class) and confusion (rows are true): mean
    or sum over heads; knn; shot16, its deviation over support sets, and the shots it had; protocol: rows that differ
    in it cannot be compared.
    """
    view = eval_bach.view_of(c)
    features = eval_bach.embed(backbone, data.pixels, mean, std, c["device"], view)
    spread = eval_bach.collapse_metrics(features)
    row = probe(features, data.labels, data.groups, data.folds)
    if row["shots"] < SHOTS:
        print(f"{c['image_dir']}: shot16 has {row['shots']} shots, the images that a class has outside some fold")
    listed = "".join(f"{file},{fold}\n" for file, fold in zip(data.files, data.folds.tolist()))
    view = f"{view} from {c['image_mpp']:g}" if view.mpp else view
    n, G = len(data.files), int(data.groups.max()) + 1
    row["protocol"] = (
        f"folder: {view}, {n} images of {G} groups in {len(row['folds'])} folds, files and folds "
        f"{hashlib.sha256(listed.encode()).hexdigest()[:8]}, {eval_bach.heads_protocol(RUNS, SEED, MAX_STEPS)}, "
        f"{eval_bach.NEIGHBOURS} neighbours temp {eval_bach.KNN_TEMP:g}, {row['shots']} shots x {SUPPORT_SETS}")
    return {"image_dir": c["image_dir"], "images": n, "classes": data.classes, "groups": G, **row, **spread}
