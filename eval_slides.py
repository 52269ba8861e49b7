"""
Frozen features scored on your own labels, by patient: labelled tiles, labelled slides, or labelled places of slides.

    python eval_slides.py --image_dir=data/crc --weights=out/run/teacher/5000.pth     # tiles; several: a.pth,b.pth
    python eval_slides.py --features=data/features_1.0 --context=data/context --labels=labels.csv   # slides
    python eval_slides.py --features=data/features_1.0 --context=data/context --places=places.csv   # places

The last line is one JSON object; after a stop, of the rows that were done. Each patient is in one fold only.

Tiles: {image_dir}/{class}/*.{jpg,jpeg,png,tif,tiff} of any size. {image_dir}/groups.csv or --groups=FILE says which
patient each image is from:

    file,patient,fold          class/name, or the name alone where only one class has it
    tumor/a_001.png,P01,0      fold is optional, a published split; without it we make 5 folds (needs scikit-learn)

Fold f tests, fold f + 1 stops and selects the heads, and the others train. Read `balanced` with `se_groups`, its
standard error over patients, a rough guess below ten of them; std is over the seeds of the heads only.

Slides and places: labels.csv has slide,patient,label, places.csv also x,y, a tile's centre in level-0 px; time,event
instead of label ask for survival; fold is optional. Where no patient has two labels, a patient's slides are one case.
Each row is compared with the mean of raw features (places: with the raw feature) by a bootstrap over patients; "none"
marks a difference whose 95 % interval holds 0. docs/context.md has the rows and their controls.
"""
import csv
import hashlib
import json
import math
import os
import re
import signal
import statistics
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import eval_bach
import listing
import model
import rundir
import wsi
from configurator import configure
from context import load_encoder, random_encoder
from eval_bach import MAX_STEPS, RUNS, SEED
from places import agreeing, check, embed_slide, files_of, map_of, open_features

# ---- the protocol, with that of the heads in eval_bach.py: changing any of these invalidates earlier rows ------------
FOLDS = 5    # fewer where a class has fewer groups, at least 3 for tiles
DRAWS = 1000 # of patients, in the bootstrap
CS = tuple(10.0**e for e in range(-3, 3))  # that the regression may choose from
# attention MIL (Ilse et al. 2018) close to how three groups train it; which one is chosen inside each fold. eva's MLP
# and its early stopping differ, and so do our class weights
MIL = {
    "patho-bench": dict(width=512, gated=False, dropout=0.25, lr=3e-4, weight_decay=1e-5, batch=1, epochs=20),
    "eva": dict(width=128, gated=True, dropout=0.0, lr=1e-3, weight_decay=0.01, batch=32, epochs=100),
    "titan": dict(width=512, gated=True, dropout=0.25, lr=1e-4, weight_decay=1e-5, batch=1, epochs=20),
}
BAG = 2048   # places of a slide or case per training step
# ----------------------------------------------------------------------------------------------------------------------
AS_IN_TRAINING = dict(groups="", views="resize", mpp=0.5, image_mpp=0.0, input_px=eval_bach.SIZE, concat=False)
TYPES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
ROLES = {2: "train and test", 3: "train, select and test"}  # of folds
CONTEXT, RANDOM, SHUFFLED, RETRAINED = (f"raw, {kind}context" for kind in ("", "untrained ", "shuffled ", "retrained "))

# ---- csv files, and folds of patients --------------------------------------------------------------------------------


def read_csv(path, needed):
    """(columns, [(line, {column: text})]) of a csv in UTF-8 that has the needed columns. Raises ValueError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            table = csv.DictReader(f, skipinitialspace=True)
            lines, columns = [(table.line_num, row) for row in table], table.fieldnames or []
    except FileNotFoundError:
        raise ValueError(f"{path}: no such csv") from None
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a readable csv in UTF-8 ({e})") from e
    head = ",".join(needed)
    if not set(needed) <= set(columns):
        raise ValueError(f"{path}: its columns are {columns}; the first line must be {head} or {head},fold")
    for _, row in lines:
        for key in columns:
            row[key] = (row[key] or "").strip()
    return columns, lines


def check_lines(path, lines, texts, numbers, once=""):
    """
    Make floats of the numbers. ValueError if a line (number, row) has no text or no number where one must be, or if
    what stands in its column `once` stands in an earlier line too.
    """
    seen = set()
    for line, row in lines:
        for key in texts:
            if not row[key]:
                raise ValueError(f"{path}, line {line}: no {key}; each line needs {' and '.join(texts)}")
        for key in numbers:
            text, kind = row[key], {"fold": "whole number", "time": "number above 0"}.get(key, "number")
            try:
                row[key] = float(text)
            except ValueError:
                row[key] = math.nan
            bad = key == "fold" and row[key] % 1 or key == "time" and row[key] <= 0
            if bad or not math.isfinite(row[key]):
                raise ValueError(f"{path}, line {line}: {key} is '{text}', not a {kind}")
        if once and row[once] in seen:
            raise ValueError(f"{path}, line {line}: {row[once]} is listed twice; delete one of the lines")
        seen.add(row.get(once))


def stated_folds(path, rows, least):
    """
    The folds of checked rows counted from 0, or None without such a column. ValueError if there are fewer than `least`,
    or if a patient is in two of them.
    """
    if "fold" not in rows[0]:
        return None
    home = {}
    for row in rows:
        patient, fold = row["patient"], int(row["fold"])
        if home.setdefault(patient, fold) != fold:
            raise ValueError(f"{path}: patient {patient} is in folds {home[patient]} and {fold}; put all that is of a "
                             "patient in one fold")
    numbers = sorted(set(home.values()))
    if len(numbers) < least:
        raise ValueError(f"{path}: the folds are {numbers}; give at least {least} (to {ROLES[least]}), or leave "
                         "the column out")
    return [numbers.index(home[row["patient"]]) for row in rows]


def find_folds(path, labels, classes, groups, stated, parts, seeds=(None,)):
    """
    Folds (repeats, n): the stated ones, or drawn once for each seed. `parts` are 2, to train and test, or 3, where the
    fold after the tested one selects. ValueError if a class has too few groups, or none to train on in some fold.
    """
    counts = [len(groups[labels == label].unique()) for label in range(len(classes))]
    fewest = min(counts)
    name = classes[counts.index(fewest)]
    if fewest < parts:
        raise ValueError(f"{path}: groups (patients) of class {name}: {fewest}; {parts} are needed, to "
                         f"{ROLES[parts]}; add patients, or merge or drop the class")
    if stated is not None:
        drawn = torch.tensor([stated])
    else:
        if fewest < FOLDS:
            print(f"{path}: {fewest} folds, not {FOLDS}: class {name} has no more groups", flush=True)
        drawn = torch.stack([make_folds(labels, groups, min(fewest, FOLDS), seed) for seed in seeds])
    selects = " and the next one selects" if parts == 3 else ""
    for folds in drawn:
        for f, (train, _, _) in enumerate(splits(folds, parts)):
            if absent := set(range(len(classes))) - set(labels[train].tolist()):
                raise ValueError(f"{path}: when fold {f} (from 0) tests{selects}, nothing of class "
                                 f"{classes[min(absent)]} is left to train on; give other folds")
    return drawn


def make_folds(labels, groups, k, seed=None):
    """k folds (n,) of whole groups with like shares of the classes; seed None draws nothing. Needs scikit-learn."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise ValueError("to make folds: pip install scikit-learn, or give groups.csv a column fold") from None
    folds = torch.empty_like(labels)
    splitter = StratifiedGroupKFold(k, shuffle=seed is not None, random_state=seed)
    for f, (_, test) in enumerate(splitter.split(labels, labels.numpy(), groups.numpy())):
        folds[torch.from_numpy(test)] = f
    assert len(folds.unique()) == k, folds.bincount()
    return folds


def splits(folds, parts=3):
    """(train, selection, test) indices for each fold f of k: f tests and the next one selects, if parts is 3."""
    k = int(folds.max()) + 1
    for f in range(k):
        test = folds == f
        selection = (folds == (f + 1) % k) & (parts > 2)
        train = ~test & ~selection
        yield [mask.nonzero()[:, 0] for mask in (train, selection, test)]


def inner_splits(labels, groups):
    """[(fit, held)] indices of up to three folds of whole patients; those that leave no class out of `fit`."""
    classes = labels.unique()
    fewest = min(len(groups[labels == label].unique()) for label in classes)
    if fewest < 2:
        return []
    folds = make_folds(labels, groups, min(fewest, 3), SEED)
    found = [(fit.numpy(), held.numpy()) for fit, _, held in splits(folds, 2)]
    return [(fit, held) for fit, held in found if len(labels[fit].unique()) == len(classes)]


# ---- labelled tiles -------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """What is known of n samples before any of them is read."""

    names: list           # n times class/name of a tile, sorted; or a tuple, the slides of a case or the slide of one
    labels: torch.Tensor  # (n,) indices into classes; of survival, whether the event was seen
    classes: list         # C names, sorted
    groups: torch.Tensor  # (n,) 0 .. G - 1, one per patient
    folds: torch.Tensor   # (n,) 0 .. k - 1 of tiles, else (repeats, n)
    kind: str = "tiles"   # or "slides", "cases", "places"
    owners: dict = None   # {slide: patient} of all slides in the csv, also of those without features
    time: torch.Tensor = None  # float64 (n,), of survival
    where: np.ndarray = None  # of places: float (n, 3), their centres in level-0 px and the number of the tile there


def find_samples(image_dir, groups=""):
    """The Samples of a folder with a subfolder per class; groups is a csv, "" = groups.csv in it. Raises ValueError."""
    files, labels, classes = find_images(image_dir)
    table, patients, stated = groups or os.path.join(image_dir, "groups.csv"), files, None
    if groups or os.path.exists(table):
        patients, stated = read_groups(table, files)
    else:
        print(f"{image_dir}: no groups.csv, so each image is its own group; images of one patient may be on both sides "
              "of a split, which flatters", flush=True)
    labels, (_, groups) = torch.tensor(labels), numbered(patients)
    folds, = find_folds(image_dir, labels, classes, groups, stated, parts=3)
    return Samples(files, labels, classes, groups, folds)


def numbered(names):
    """(the different names, sorted; the number of each in them (n,))."""
    different, numbers = np.unique(names, return_inverse=True)
    return different.tolist(), torch.from_numpy(numbers)


def find_images(image_dir):
    """Files as class/name, their labels, and the classes. Hidden names do not count, as in listing.py."""
    if not os.path.isdir(image_dir):
        raise ValueError(f"image_dir={image_dir}: no such folder")
    unread = {}
    classes = sorted(os.path.basename(path) for path, is_folder, *_ in listing.scan(image_dir, unread) if is_folder)
    if len(classes) < 2:
        raise ValueError(f"image_dir={image_dir}: {' '.join(classes) or 'nothing'} as class folders; put the images of "
                         "each of two or more classes in a subfolder of its own")
    images, labels = [], []
    for label, name in enumerate(classes):
        folder = os.path.join(image_dir, name)
        entries = listing.scan(folder, unread)
        if nested := [path for path, is_folder, *_ in entries if is_folder]:
            raise ValueError(f"{nested[0]}: a folder in a class folder would be left out; move its images up")
        names = [os.path.basename(path) for path, *_ in entries if path.lower().endswith(TYPES)]
        for path, reason in unread.items():  # fewer images are another number
            raise ValueError(f"{path}: {reason}; {len(unread)} such in {image_dir}: mend or remove them")
        if not names:
            raise ValueError(f"{folder}: no {' '.join(TYPES)} in this class folder; fill it or move it away")
        images += [f"{name}/{image}" for image in sorted(names)]
        labels += [label] * len(names)
    return images, labels, classes


def read_groups(path, files):
    """The patient of each of files, and their folds counted from 0, or None if the csv has no such column."""
    columns, lines = read_csv(path, ("file", "patient"))
    full_names = {}  # of a full name or a bare one
    for file in files:
        full_names.setdefault(file, []).append(file)
        full_names.setdefault(file.split("/")[1], []).append(file)
    for line, row in lines:
        found = full_names.get(row["file"].replace("\\", "/").removeprefix("./"), [])
        if len(found) != 1:
            raise ValueError(f"{path}, line {line}: {len(found) or 'no'} images in the class folders are called "
                             f"'{row['file']}'; write class/name, and leave out files that are not there")
        row["file"] = found[0]
    check_lines(path, lines, ["patient"], {"fold"} & set(columns), once="file")
    of_file = {row["file"]: row for _, row in lines}
    if missing := [file for file in files if file not in of_file]:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} images are not listed, such as {missing[0]}; add "
                         "them or move them away")
    rows = [of_file[file] for file in files]
    return [row["patient"] for row in rows], stated_folds(path, rows, least=3)


def resampled(predicted, labels, groups, weights):
    """
    Balanced accuracy of predicted (R, n), mean over R, for each row of weights (B, G): how often a group counts. A row
    may be without a class.
    """
    onehot = F.one_hot(labels).double()  # (n, C)
    share = (predicted == labels).double().mean(0)
    counts = torch.stack([share[:, None] * onehot, onehot])
    of_group = counts.new_zeros(2, weights.shape[1], onehot.shape[1]).index_add_(1, groups, counts)
    right, all_of = weights @ of_group  # (B, C)
    return (right / all_of).nanmean(1)


def standard_error(predicted, labels, groups):
    """
    Standard error of the heads' mean balanced accuracy over groups, which are tested; predicted is (R, n).

    It is the delete-one-group jackknife, sqrt((G - 1) / G sum_g (s_g - mean s)^2) with s_g the score without group g
    (Tukey 1958), which errs upwards (Efron and Stein 1981).
    """
    G = int(groups.max()) + 1
    s = resampled(predicted, labels, groups, 1 - torch.eye(G).double())
    squares = (s - s.mean()).square().sum()
    return (squares * (G - 1) / G).sqrt().item()


def probe(features, labels, groups, folds):
    """Scores of features (n, D), each sample's by heads and neighbours outside its fold; see score."""
    predicted = torch.empty(RUNS, len(labels), dtype=torch.long)
    neighbours = torch.empty(1, len(labels), dtype=torch.long)
    by_fold = []
    for train, selection, test in splits(folds):
        _, _, classes = eval_bach.fit_heads(features, labels, train, selection, RUNS, SEED, MAX_STEPS)
        predicted[:, test] = classes[:, test]
        balanced = eval_bach.balanced_accuracy(classes[:, test], labels[test])
        by_fold.append(balanced.mean().item())
        outside = torch.cat([train, selection])
        neighbours[:, test] = eval_bach.knn(features, labels, outside, test)
    seeds = eval_bach.balanced_accuracy(predicted, labels).tolist()
    return {
        "balanced": statistics.mean(seeds), "std": statistics.stdev(seeds),
        "se_groups": standard_error(predicted, labels, groups), "seeds": seeds, "folds": by_fold,
        "recall": eval_bach.recalls(predicted, labels).mean(0).tolist(),
        "confusion": eval_bach.confusion(predicted, labels),
        "knn": eval_bach.balanced_accuracy(neighbours, labels).item(),
    }


def score(config, samples, features, view):
    """
    The row of features (n, D) of samples. ValueError for features that are not finite.

    balanced: mean over heads of the balanced accuracy of all samples; std, seeds: its sample deviation and the values;
    se_groups: standard error over groups; folds: mean over heads in each; recall (per class) and confusion (rows are
    true classes): mean or sum over heads; protocol: rows that differ in it cannot be compared.
    """
    image_dir, n, G = config["image_dir"], len(samples.names), int(samples.groups.max()) + 1
    collapse = eval_bach.collapse_metrics(features)
    row = probe(features, samples.labels, samples.groups, samples.folds)
    listed = [f"{file},{fold}\n" for file, fold in zip(samples.names, samples.folds.tolist())]
    scale = f" from {config['image_mpp']:g}" if view.mpp else ""
    row["protocol"] = (
        f"folder: {view}{scale}, {n} images of {G} groups in {len(row['folds'])} folds, files and folds "
        f"{checksum(''.join(listed))}, {eval_bach.heads_protocol(RUNS, SEED, MAX_STEPS)}, {eval_bach.NEIGHBOURS} "
        f"neighbours temp {eval_bach.KNN_TEMP:g}")
    return {"image_dir": image_dir, "images": n, "classes": samples.classes, "groups": G, **row, **collapse}


def checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load(config):
    """The images that config names, in memory once for all weights (150 KB per tile at 224 px), and their score."""
    image_dir, view = config["image_dir"], eval_bach.view_of(config)
    if view.mpp and config["image_mpp"] <= 0:
        raise ValueError(f"image_dir={image_dir}: views=tiles needs its images' um/px; give --image_mpp=0.25, say")
    samples = find_samples(image_dir, config["groups"])
    paths = [os.path.join(image_dir, file) for file in samples.names]
    pixels, _ = eval_bach.load_images(paths, view, config["image_mpp"])
    return pixels, lambda features, view: score(config, samples, features, view)


# ---- labelled slides and places, from features ----------------------------------------------------------------------


def find_labels(config, files):
    """Samples by the csv in config; `files` are {slide: path} of each folder that slides must be in. ValueError."""
    path, column = config["places"] or config["labels"], config["label"]
    if not path or (config["places"] and config["labels"]):
        raise ValueError("features need labels: give either --labels=FILE (slides) or --places=FILE")
    if config["repeats"] < 1:
        raise ValueError(f"repeats = {config['repeats']}: give 1 or more")
    kept = ["x", "y"] if config["places"] else []
    columns, lines = read_csv(path, ["slide", "patient"])
    survival = column not in columns and {"time", "event"} <= set(columns)
    outcome = ["event", "time"] if survival else [column]
    if missing := {*kept, *outcome} - set(columns):
        raise ValueError(f"{path}: there is no column {min(missing)} among {columns}; --label names the labels' column")
    owners = {row["slide"]: row["patient"] for _, row in lines}
    slides = sound(path, files, set(owners))
    lines = [(line, row) for line, row in lines if row["slide"] in slides]
    if not lines:
        raise ValueError(f"{path}: none of its slides is left to score; its names must be those of "
                         "the files of features, without their ending")
    numbers = {*kept, *outcome[1:], "fold"} & set(columns)
    check_lines(path, lines, ["slide", "patient", outcome[0]], numbers, once="" if kept else "slide")
    rows = [row for _, row in lines]
    rows = on_tiles(rows, files[0]) if kept else rows
    stated = stated_folds(path, rows, least=2)
    kind, samples = samples_of(rows, outcome, kept)
    first = [rows[own[0]] for own in samples]
    classes, labels = numbered([row[outcome[0]] for row in first])
    _, groups = numbered([row["patient"] for row in first])
    if len(classes) < 2:
        raise ValueError(f"{path}: {classes[0]} in column {outcome[0]}; 2 or more are needed")
    if survival and classes != ["0", "1"]:
        raise ValueError(f"{path}: event must be 0 (not seen) or 1, and is {' '.join(classes)}")
    stated = stated and [stated[own[0]] for own in samples]
    folds = find_folds(path, labels, classes, groups, stated, 2, range(SEED, SEED + config["repeats"]))
    names = [tuple(rows[i]["slide"] for i in own) for own in samples]
    time = torch.tensor([row["time"] for row in first]).double() if survival else None
    where = np.array([[row["x"], row["y"], row["tile"]] for row in first]) if kept else None
    return Samples(names, labels, classes, groups, folds, kind, owners, time, where)


def samples_of(rows, outcome, places):
    """("places", "slides" or "cases", the numbers of the rows of each sample): cases if no patient has two outcomes."""
    cases = {}
    for i, row in enumerate(rows):
        cases.setdefault(row["patient"], []).append(i)
    outcomes = {tuple(row[key] for key in ("patient", *outcome)) for row in rows}
    if places or len(outcomes) > len(cases) or len(cases) == len(rows):
        return "places" if places else "slides", [[i] for i in range(len(rows))]
    return "cases", list(cases.values())


def sound(path, files, named):
    """The slides named in the csv at `path` that are in all folders, finite and of one kind; the others are said."""
    if absent := sorted(named - set(files[0])):
        print(f"{path}: {len(absent)} slides have no features, such as {absent[0]}: left out")
    if unlabelled := sorted(set(files[0]) - named):
        print(f"{path}: {len(unlabelled)} slides with features have no label, such as {unlabelled[0]}: left out")
    slides, _ = agreeing(files, sorted(named & set(files[0])), print, apart=False)
    good = set()
    for slide in slides:
        if all(np.isfinite(np.memmap(*where)).all() for where in slide.maps):
            good.add(slide.name)
        else:
            print(f"left out: {slide.name}: features that are not finite")
    return good


def check_unseen(found, slides, pattern):
    """ValueError if an encoder was trained on slides of these patients, each of whom is tested in some fold."""
    def patients(names):
        return {found.owners.get(name, name) for name in names} | {wsi.patient_of(name, pattern) for name in names}

    if unknown := [name for name in slides if name not in found.owners and wsi.patient_of(name, pattern) == name]:
        print(f"patients of {len(unknown)} slides that the encoder was trained on are unknown, such as {unknown[0]}: "
              "whether they are tested cannot be told; list these slides in the csv, or give --patient")
    tested = patients([name for own in found.names for name in own])
    if seen := sorted({found.owners.get(name, name) for name in tested & patients(slides)}):
        raise ValueError(f"the encoder was trained on slides of {len(seen)} of these patients, such as {seen[0]}; "
                         "train it without them (context.py --train_slides)")


def neighbours(raw, centres):
    """The mean of each 3 x 3 neighbourhood, of the places that there are: (N, D) from (N, D) and centres (N, 2)."""
    from sklearn.neighbors import NearestNeighbors
    if len(centres) < 2:
        return raw
    near = NearestNeighbors().fit(centres)
    pitch = np.median(near.kneighbors(n_neighbors=1)[0])
    graph = near.radius_neighbors_graph(centres, 1.5 * pitch)  # a place is in its own neighbourhood
    return graph @ raw / np.asarray(graph.sum(1)).reshape(-1, 1)


def stats(x):
    """Mean, deviation and maximum over the places of (..., N, C): (..., 3 C)."""
    return np.concatenate([x.mean(-2), x.std(-2), x.max(-2)], -1)


def readouts(raw, contexts, centres, kind):
    """{row of the table: (N, D') per place, or (D',) of the slide} from raw features and {row: context (N, D_c)}."""
    near = neighbours(raw, centres)
    if kind == "places":
        beside = {name: np.concatenate([raw, own], 1) for name, own in contexts.items()}
        return {"raw": raw, "raw, 3x3 mean": np.concatenate([raw, near], 1), **beside}
    found = {"mean": raw.mean(0), "max": raw.max(0)}
    found["moments"] = np.concatenate([raw.mean(0), near.mean(0), (near**2).mean(0)])
    found["stats: raw"] = stats(raw)
    for name, own in contexts.items():
        found[name] = np.concatenate([raw.mean(0), own.mean(0)])
        found[f"stats: {name}"] = np.concatenate([stats(raw), stats(own)])
    return found


def context_keys(folder):
    """(sha256 of the encoder, slides that it was trained on) of a folder of context.py --task=embed. ValueError."""
    path = os.path.join(folder, "keys.json")
    keys = rundir.parse(rundir.read_text(path))
    if not {"encoder", "trained_on"} <= keys.keys():
        raise ValueError(f"{path}: does not say which slides the encoder was trained on; make the folder with "
                         "context.py --task=embed")
    return keys["encoder"], keys["trained_on"]


def open_contexts(config):
    """({row: {slide: path}}, {row: context_keys}) of the folders of stored contexts. Raises ValueError."""
    folders = {CONTEXT: config["context"], RETRAINED: config["retrained"]}
    keys = {row: context_keys(folder) for row, folder in folders.items() if folder}
    if len({encoder for encoder, _ in keys.values()}) < len(keys):
        raise ValueError("--retrained is by the encoder of --context, not by one that was trained with --shuffle=true")
    return {row: files_of(folders[row]) for row in keys}, keys


def open_controls(path, keys):
    """{row: (net, header)} of the encoder at `path` before training, and after, with places shuffled. ValueError."""
    net, header = load_encoder(path)
    if CONTEXT not in keys or keys[CONTEXT][0] != model.sha256_of(path):
        raise ValueError("--encoder is for controls: give the file with which --context was made, and that folder")
    shuffling = {**header, "config": {**header["config"], "shuffle": True}}
    return {RANDOM: (random_encoder(header, SEED), header), SHUFFLED: (net, shuffling)}


def contexts_of(slide, scales, stored, controls, device):
    """
    {row: context (N, D_c)} of a slide, stored ones mapped, from open_features of its files, one per scale. ValueError
    if a stored one is of other features, or if they were made with several --hide.
    """
    features, centres, about = zip(*scales)
    contexts, hides = {}, set()
    for name, files in stored.items():
        path = files[slide]
        contexts[name], where, made = open_features(path, "context")
        hides.add(made.get("hide", 0))
        if not (np.array_equal(open_features(path)[0], features[0]) and np.array_equal(where, centres[0])):
            raise ValueError(f"{path}: context of other features or places than {slide}'s; embed them again")
    if len(hides) > 1:
        raise ValueError(f"{slide}: --context and --retrained were made with other --hide: {sorted(hides)}")
    for name, (net, header) in controls.items():
        try:
            for scale in zip(centres, about, header["about"]):
                check(*scale)
        except ValueError as e:
            raise ValueError(f"{slide}: {e}") from None
        contexts[name] = embed_slide(net, header, features, centres, device, min(hides))
    return contexts


def read_slides(found, files, stored, controls, device):
    """({row: (n, D')}, bags). A bag is the maps of a sample's (features, contexts), see mil_probe."""
    of_slide = {}  # its samples
    for i, names in enumerate(found.names):
        for slide in names:
            of_slide.setdefault(slide, []).append(i)
    rows, bags = {}, [([], []) for _ in found.names]
    for slide, mine in listing.bar(of_slide.items(), "slides", leave=False):
        scales = [open_features(own[slide]) for own in files]
        raw, centres, _ = scales[0]
        contexts = contexts_of(slide, scales, stored, controls, device)
        for maps, array in zip(bags[mine[0]], (raw, contexts.get(CONTEXT))):
            if array is not None:
                maps.append(map_of(array))
        contexts = {name: np.asarray(own, np.float32) for name, own in contexts.items()}
        vectors = readouts(np.asarray(raw, np.float32), contexts, centres, found.kind)
        if found.kind == "places":
            index = found.where[mine, 2].astype(int)
            vectors = {name: own[index] for name, own in vectors.items()}
        for name, own in vectors.items():
            if name not in rows:
                rows[name] = np.zeros((len(found.names), own.shape[-1]), np.float32)
            rows[name][mine] += own / len(found.names[mine[0]])
    return rows, bags


def on_tiles(rows, files):
    """
    The rows of places that have a tile, the nearest: its number is row["tile"]. The others are said. ValueError where
    most of a slide's have none.
    """
    from sklearn.neighbors import NearestNeighbors
    of_slide = {}
    for row in rows:
        of_slide.setdefault(row["slide"], []).append(row)
    for slide, own in of_slide.items():
        _, centres, about = open_features(files[slide])
        um = about.get("level0_mpp", about["side"] / about["patch_size_level0"])
        points = um * np.array([[row["x"], row["y"]] for row in own])
        distance, index = NearestNeighbors(n_neighbors=1).fit(centres).kneighbors(points)
        off = distance > about["pitch"]
        text = f"{slide}: {off.sum()} places are more than a tile from any feature"
        if off.mean() > 0.5:
            raise ValueError(f"{text}; are x and y level-0 px of the centre?")
        if off.any():
            print(f"left out: {text}")
        for row, tile in zip(own, np.where(off, -1, index)[:, 0]):
            row["tile"] = tile
    return [row for row in rows if row["tile"] >= 0]


# ---- slides and places: out-of-fold predictions ---------------------------------------------------------------------


def out_of_fold(found, fit):
    """What fit(train, test) -> (n_test, C) predicts for each sample outside its fold: (repeats, n, C)."""
    predicted = torch.zeros(*found.folds.shape, len(found.classes))
    for repeat, folds in enumerate(found.folds):
        for train, _, test in splits(folds, 2):
            predicted[repeat, test] = fit(train, test).float()
    return predicted


def linear_probe(found, x, at_test, C):
    """Out-of-fold predictions from features x (n, D); those that are tested may be others, at_test."""
    def fit(train, test):
        labels = found.labels[train]
        if found.time is not None:
            risk = cox(x[train], found.time[train], labels == 1).predict(at_test[test])
            return torch.tensor(np.stack([-risk, risk], 1))
        probe = regression(x[train], labels, found.groups[train], C)
        return torch.from_numpy(probe.predict_proba(at_test[test]))
    return out_of_fold(found, fit)


def regression(x, labels, groups, C):
    """
    Logistic regression as in Patho-Bench: C = 0.5, balanced classes, nothing scaled. C = None chooses it from CS by
    balanced accuracy on inner folds of whole patients; 0.5 where a class has too few patients for them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    probe = LogisticRegression(C=C or 0.5, class_weight="balanced", max_iter=10_000)
    inner = inner_splits(labels, groups) if C is None else []
    if inner:
        probe = GridSearchCV(probe, {"C": CS}, cv=inner, scoring="balanced_accuracy")
    return probe.fit(x, labels)


def cox(x, time, event):
    """Cox regression with elastic net (Patho-Bench's, alpha 0.07, l1 0.5)."""
    try:
        from sksurv.linear_model import CoxnetSurvivalAnalysis
    except ImportError:
        raise ValueError("columns time and event need scikit-survival: pip install scikit-survival") from None
    outcome = np.array(list(zip(event, time)), [("event", bool), ("time", float)])
    return CoxnetSurvivalAnalysis(alphas=[0.07], l1_ratio=0.5).fit(x, outcome)


class AttentionMIL(torch.nn.Module):
    """keys (N, D_k) decide how much each of values (N, D_v) counts: logits (C,)."""

    def __init__(self, key_dim, value_dim, classes, setting):
        super().__init__()
        width, nn = setting["width"], torch.nn
        drop = nn.Dropout(setting["dropout"])
        self.key = nn.Sequential(nn.Linear(key_dim, width), nn.ReLU(), drop)
        self.value = nn.Sequential(nn.Linear(value_dim, width), nn.ReLU(), drop)
        self.tanh = nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if setting["gated"] else None
        self.score = nn.Linear(width, 1)
        self.classify = nn.Linear(width, classes)

    def forward(self, keys, values):
        keys = self.key(keys)
        hidden = self.tanh(keys).tanh()
        if self.gate:
            hidden = hidden * self.gate(keys).sigmoid()
        weights = self.score(hidden).softmax(0)  # (N, 1)
        return self.classify((weights * self.value(values)).sum(0))


def train_mil(bags, labels, classes, setting, device):
    """An AttentionMIL of bags (see mil_probe), last epoch, with a cosine schedule; classes count equally."""
    torch.manual_seed(SEED)
    setting = MIL[setting]
    dims = [maps[0][-1][1] for maps in bags[0]]
    net = AttentionMIL(*dims, classes, setting).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=setting["lr"], weight_decay=setting["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting["epochs"])
    weights = len(labels) / (classes * labels.bincount(minlength=classes))
    labels, weights = labels.to(device), weights.to(device)
    for _ in range(setting["epochs"]):
        for part in torch.randperm(len(bags)).split(setting["batch"]):
            optimizer.zero_grad()
            for i in part.tolist():
                logits = net(*read_bag(bags[i], device, BAG))
                loss = F.cross_entropy(logits, labels[i]) * weights[labels[i]]
                (loss / len(part)).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def read_bag(bag, device, count):
    """(keys (N, D_k), values (N, D_v)), float32, of `count` random places of a bag, or of all if it has fewer."""
    keys, values = bag
    ends = np.cumsum([shape[0] for *_, shape in values])
    chosen = np.split(torch.randperm(ends[-1]).numpy() < count, ends[:-1])

    def read(maps):
        parts = [np.memmap(*where)[own] for where, own in zip(maps, chosen)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)

    of_values = read(values)
    return of_values if keys is values else read(keys), of_values


@torch.no_grad()
def apply_mil(net, bags, device):
    return torch.stack([net(*read_bag(bag, device, np.inf)).softmax(0).cpu() for bag in bags])


@eval_bach.one_thread()
def mil_probe(found, bags, name, device):
    """
    Out-of-fold predictions of attention MIL. A bag is (keys, values), both a list of arguments of np.memmap. The
    setting is chosen inside each fold; it is the first where a class has too few patients for that.
    """
    classes, k = len(found.classes), int(found.folds.max()) + 1
    bar = listing.bar(desc=name, total=len(found.folds) * k * (len(MIL) + 1), unit="fit")

    def fit(train, test):
        labels, mine = found.labels[train], [bags[i] for i in train]
        scores = dict.fromkeys(MIL, 0.0)
        for rest, held in inner_splits(labels, found.groups[train])[:1]:
            for setting in MIL:
                net = train_mil([mine[i] for i in rest], labels[rest], classes, setting, device)
                guess = apply_mil(net, [mine[i] for i in held], device).argmax(1)
                scores[setting] = eval_bach.balanced_accuracy(guess[None], labels[held]).item()
                bar.update()
        net = train_mil(mine, labels, classes, max(scores, key=scores.get), device)
        bar.update()
        return apply_mil(net, [bags[i] for i in test], device)

    with bar:
        return out_of_fold(found, fit)


# ---- the table: what a score is worth --------------------------------------------------------------------------------


def concordance(predicted, found, weights):
    """`resampled` of survival: the c-index of pairs of one fold, since the risks of two folds are of two fits. (B,)."""
    time, event = found.time, found.labels == 1
    outlived = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    drawn = weights[:, found.groups]  # (B, n): how often each sample was drawn
    scores = []
    for folds, risk in zip(found.folds, predicted[..., 1]):
        pairs = (event[:, None] & outlived & (folds[:, None] == folds)).double()
        right = pairs * (1 + (risk[:, None] - risk).sign()) / 2  # a tie in risk counts half
        hits, all_of = (((drawn @ counted) * drawn).sum(1) for counted in (right, pairs))
        scores.append(torch.where(all_of > 0, hits / all_of, 0.5))  # without a pair there is nothing to tell
    return torch.stack(scores).mean(0)


def area_under_curve(predicted, found):
    """Macro AUROC, one class against the rest, mean over folds; a class counts in a fold that has it and others."""
    from sklearn.metrics import roc_auc_score
    onehot = F.one_hot(found.labels).numpy()
    areas = []
    for folds, own in zip(found.folds, predicted.numpy()):
        for _, _, test in splits(folds, 2):
            share = onehot[test].mean(0)
            told = (share > 0) & (share < 1)
            if told.any():
                areas.append(roc_auc_score(onehot[test][:, told], own[test][:, told], average="macro"))
    return statistics.mean(areas) if areas else None


def compare(name, predicted, mean, found):
    """
    A row of the table from out-of-fold predictions (repeats, n, C) and those of the mean of raw features.

    balanced: balanced accuracy, or the c-index of survival; auroc: of area_under_curve; difference to the mean, and low
    and high, its 95 % interval by a bootstrap over patients (paired: both rows see the same draws).
    """
    G = int(found.groups.max()) + 1
    drawn = torch.randint(G, (DRAWS, G), generator=torch.Generator().manual_seed(SEED))
    drawn = torch.stack([own.bincount(minlength=G) for own in drawn])
    weights = torch.cat([torch.ones(1, G), drawn]).double()  # the first is the sample itself

    def score(own):
        if found.time is not None:
            return concordance(own, found, weights)
        return resampled(own.argmax(2), found.labels, found.groups, weights)

    scores = score(predicted)
    gain = scores - score(mean)
    low, high = gain[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    row = {"row": name, "balanced": scores[0].item(), "difference": gain[0].item(), "low": low, "high": high,
           "repeats": len(found.folds)}
    if found.time is None:
        row["auroc"] = area_under_curve(predicted, found)
    return row


def score_features(config, table):
    """The rows of one csv of labelled slides or places, printed, and added to the dict `table` as they are done."""
    files = [files_of(folder) for folder in config["features"].split(",")]
    stored, keys = open_contexts(config)
    found = find_labels(config, [*files, *stored.values()])
    check_unseen(found, {slide for _, own in keys.values() for slide in own}, config["patient"])
    controls = open_controls(config["encoder"], keys) if config["encoder"] else {}
    if config["write"]:
        open(config["write"], "a").close()  # a path that cannot be written is known before minutes of fitting
    rows, bags = read_slides(found, files, stored, controls, config["device"])
    survival, first, mean = found.time is not None, next(iter(rows)), None  # what all are compared with
    table |= {"rows": [], "classes": found.classes, "protocol": protocol_of(found)}
    say_caveats(found)
    print(f"{'':60}difference to {first}")
    print(f"{'':30}{'c-index' if survival else 'balanced':>8}   auroc  C tuned   and 95 % interval")
    for name, at_test in rows.items():
        x = rows[name.replace(SHUFFLED, CONTEXT)]  # the probe is trained on places in their true order
        predicted = linear_probe(found, x, at_test, 0.5)
        mean = predicted if name == first else mean
        row = compare(name, predicted, mean, found)
        if not survival:
            tuned = linear_probe(found, x, at_test, None)
            row["tuned"] = compare(name, tuned, mean, found)["balanced"]
        table["rows"].append(row)
        show(row, name == first)
        if config["write"] and name == (CONTEXT if CONTEXT in rows else first):
            write_scores(config["write"], found, predicted)
    if not config["mil"] or survival or found.kind == "places":
        return
    once = found._replace(folds=found.folds[:1])  # it takes minutes
    kinds = {"attention MIL": [(raw, raw) for raw, _ in bags]}
    if config["context"]:
        kinds["attention of context on raw"] = [(own, raw) for raw, own in bags]
    for name, pairs in kinds.items():
        table["rows"].append(compare(name, mil_probe(once, pairs, name, config["device"]), mean[:1], once))
        show(table["rows"][-1], False, f"  1 of {len(found.folds)} repeats")


def protocol_of(found):
    listed = checksum(str([found.names, found.folds.tolist()]))
    probe = "logistic regression C 0.5 balanced" if found.time is None else "Cox, elastic net"
    return (f"{found.kind}: {len(found.names)} of {int(found.groups.max()) + 1} patients, {len(found.folds)} x "
            f"{int(found.folds.max()) + 1} folds {listed}, {probe}")


def say_caveats(found):
    patients = int(found.groups.max()) + 1
    if patients < 10:
        print(f"only {patients} patients: the intervals are rough guesses")
    trained = [train for folds in found.folds for train, _, _ in splits(folds, 2)]
    inner = [inner_splits(found.labels[train], found.groups[train]) for train in trained]
    if found.time is None and not all(inner):
        print("a class has too few patients to choose by: C is 0.5 and attention MIL is Patho-Bench's in some folds")


def write_scores(path, found, predicted):
    """A csv of out-of-fold probabilities (repeats, n, C), their mean over repeats, for prepare/heatmap.py."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["slide", "x", "y", "label", *found.classes])
        for i, scores in enumerate(predicted.mean(0).tolist()):
            where = found.where[i, :2].tolist() if found.kind == "places" else ["", ""]
            for slide in found.names[i]:
                writer.writerow([slide, *where, found.classes[found.labels[i]], *scores])


def show(row, is_mean, note=""):
    text = f"{row['row']:29}"
    for key in ("balanced", "auroc", "tuned"):
        text += " " * 9 if row.get(key) is None else f"{row[key]:9.3f}"
    if not is_mean:
        low, high = row["low"], row["high"]
        text += f"   {row['difference']:+8.3f}  [{low:+.3f}, {high:+.3f}]"
        text += "" if low > 0 or high < 0 else "  none"
    print(text + note, flush=True)


def main(config):
    if not config["features"]:
        eval_bach.score_files("eval_slides", config, lambda: load(config))
        return
    if config["image_dir"]:
        raise SystemExit("eval_slides: --features is of slides and --image_dir of tiles: give one of them")
    table = {}
    try:
        score_features(config, table)
    except (ValueError, OSError) as e:
        raise SystemExit(f"eval_slides: {e}") from e
    except re.error as e:
        raise SystemExit(f"eval_slides: patient = {config['patient']!r} is no regular expression: {e}") from e
    except KeyboardInterrupt:
        raise SystemExit("eval_slides: stopped") from None
    finally:
        if table.get("rows"):
            print(json.dumps(table), flush=True)


if __name__ == "__main__":
    # ---- labelled tiles, with the keys of eval_bach.py
    image_dir = ""    # folder of labelled tiles, with a subfolder for each class
    groups = ""       # csv of file, patient and perhaps fold; "" = groups.csv in image_dir, if there is one
    # ---- labelled slides or places
    features = ""     # folder of prepare/features.py; of two scales FOLDER,FOLDER, and rows of raw are the first's
    context = ""      # folder of context.py --task=embed; "" = no rows of context
    encoder = ""      # the file it was made with, for two controls; "" = none
    retrained = ""    # a third: folder of embed, by an encoder trained with --shuffle=true; "" = none
    labels = ""       # csv of slide, patient and label
    places = ""       # csv of slide, x, y, patient and label
    label = "label"   # column of the labels
    mil = True        # rows of attention MIL of slides, by far the slowest (docs/context.md)
    write = ""        # csv of each sample's out-of-fold probabilities, with context if there is any; "" = none
    repeats = 5       # times that folds are drawn, where the csv gives none
    patient = r"TCGA-\w\w-\w{4}"  # pattern of the patient in the names of the slides that an encoder was trained on
    config = configure({**vars(eval_bach), **globals()}, shared="eval_bach.py")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(config)
