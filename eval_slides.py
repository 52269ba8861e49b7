"""
Frozen features scored on your own labels, by patient: labelled tiles, labelled slides, or labelled places of slides.

    python eval_slides.py --image_dir=data/crc --weights=out/run/teacher/5000.pth     # tiles; several: a.pth,b.pth
    python eval_slides.py --features=data/features_1.0 --context=data/context --labels=labels.csv   # slides
    python eval_slides.py --features=data/features_1.0 --context=data/context --places=places.csv   # places

The last line is one JSON object. No sample has a say in its own score, and each patient is in one fold only.

Tiles: {image_dir}/{class}/*.{jpg,jpeg,png,tif,tiff} of any size. {image_dir}/groups.csv or --groups=FILE says which
patient each image is from:

    file,patient,fold          class/name, or the name alone where only one class has it
    tumor/a_001.png,P01,0      fold is optional, a published split; without it we make 5 folds (needs scikit-learn)

Fold f tests, fold f + 1 stops and selects the heads, and the others train. Read `balanced` with `se_groups`, its
standard error over patients, which is a rough guess below ten of them. std is the deviation over the seeds of the
heads and says nothing about other patients.

Slides and places: labels.csv has slide,patient,label, places.csv also x,y, a tile's centre in level-0 px; time,event
instead of label ask for survival; fold is optional. Does context help? Each row is compared with the mean of raw
features (places: with the raw feature) by a bootstrap over patients; "none" marks a difference whose 95 % interval
holds 0. With --encoder=FILE the table has two controls: the same encoder untrained, and trained but shown shuffled
coordinates when it is tested. A gain that they have too is not learnt context.
"""
import csv
import hashlib
import json
import os
import re
import statistics
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import eval_bach
import listing
import model
import wsi
from configurator import configure
from context import load_encoder, random_encoder
from places import agreeing, embed_slide, files_of, open_features

# ---- the protocol, with that of the heads in eval_bach.py: changing any of these invalidates earlier rows ------------
FOLDS = 5                       # fewer where a class has fewer groups, at least 3
SHOTS, SUPPORT_SETS = 16, 1000  # images per class, and how often they are drawn
RUNS, SEED, MAX_STEPS = eval_bach.RUNS, eval_bach.SEED, eval_bach.MAX_STEPS
CHUNK = 20                      # support sets drawn at a time, which bounds the memory
DRAWS = 1000                    # of patients, in the bootstrap
CS = tuple(10.0**e for e in range(-3, 3))  # that the regression may choose from
# ----------------------------------------------------------------------------------------------------------------------
TYPES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
CONTEXT, RANDOM, SHUFFLED = "raw, context", "raw, untrained context", "raw, shuffled context"  # rows of the table


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
    unread = {}
    folders = [os.path.basename(path) for path, is_folder, _ in listing.scan(image_dir, unread) if is_folder]
    classes = sorted(name for name in folders if name != "__MACOSX")
    if len(classes) < 2:
        raise ValueError(f"image_dir={image_dir}: {' '.join(classes) or 'nothing'} as class folders; put the images of "
                         "each of two or more classes in a subfolder of its own")
    images, labels = [], []
    for label, name in enumerate(classes):
        folder = os.path.join(image_dir, name)
        entries = listing.scan(folder, unread)
        if nested := [path for path, is_folder, _ in entries if is_folder]:
            raise ValueError(f"{nested[0]}: a folder in a class folder would be left out; move its images up")
        names = [os.path.basename(path) for path, *_ in entries if path.lower().endswith(TYPES)]
        for path, reason in unread.items():  # fewer images are another number
            raise ValueError(f"{path}: {reason}; {len(unread)} such in {image_dir}: mend or remove them")
        if not names:
            raise ValueError(f"{folder}: no {' '.join(TYPES)} in this class folder; fill it or move it away")
        images += [f"{name}/{image}" for image in sorted(names)]
        labels += [label] * len(names)
    return images, labels, classes


def read_csv(path, needed):
    """(columns, [(line, {column: text})]) of a csv in UTF-8 that has the needed columns. Raises ValueError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            table = csv.DictReader(f, skipinitialspace=True)
            lines, columns = [(table.line_num, row) for row in table], table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a readable csv in UTF-8 ({e})") from e
    head = ",".join(needed)
    if not set(needed) <= set(columns):
        raise ValueError(f"{path}: its columns are {columns}; the first line must be {head} or {head},fold")
    stripped = []
    for line, row in lines:
        stripped.append((line, {key: (row[key] or "").strip() for key in columns}))
    return columns, stripped


def read_groups(path, files):
    """The patient of each of files, and their folds counted from 0, or None if the csv has no such column."""
    columns, lines = read_csv(path, ("file", "patient"))
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


def check_folds(path, patients, folds, least=3):
    """The folds counted from 0. ValueError if there are fewer than `least`, or if a patient is in two of them."""
    home, numbers = {}, sorted(set(folds))
    for patient, fold in zip(patients, folds):
        if home.setdefault(patient, fold) != fold:
            raise ValueError(f"{path}: patient {patient} is in folds {home[patient]} and {fold}; put all images of a "
                             "patient in one fold")
    if len(numbers) < least:
        raise ValueError(f"{path}: the folds are {numbers}; give at least {least} (to train, "
                         f"{'select ' * (least > 2)}and test), or leave the column out")
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


def make_folds(labels, groups, k, seed=None):
    """k folds (n,) of whole groups with like shares of the classes; seed None draws nothing. Needs scikit-learn."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise ValueError("to make folds: pip install scikit-learn, or give groups.csv a column fold") from None
    folds = torch.empty_like(labels)
    splitter = StratifiedGroupKFold(k, shuffle=seed is not None, random_state=seed)
    parts = splitter.split(labels, labels.numpy(), groups.numpy())
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
    G, C = int(groups.max()) + 1, onehot.shape[1]
    of_group = counts.new_zeros(2, G, C).index_add_(1, groups, counts)
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
    offsets = (means * centre[:, None]).sum(-1, keepdim=True)
    dots = means @ query.T - offsets
    squares = centre.square().sum(1, keepdim=True)
    norms = query.square().sum(1) - 2 * centre @ query.T + squares  # (S, n)
    tiny = torch.finfo(x.dtype).tiny
    z_m = dots / norms.clamp(min=tiny).sqrt()[:, None]
    return (z_m - means.square().sum(-1, keepdim=True) / 2).argmax(1)


def few_shot(features, labels, folds, shots):
    """Balanced accuracy for each of SUPPORT_SETS draws; the support of an image comes from outside its fold."""
    x = features - features.mean(0)  # simple_shot centres anyway, but a direction common to all would cost it digits
    predicted = torch.empty(SUPPORT_SETS, len(x), dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    for train, selection, test in splits(folds):
        outside = torch.cat([train, selection])
        classes = int(labels.max()) + 1
        pools = [outside[labels[outside] == label] for label in range(classes)]
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


# ---- labelled slides and places, from features ----------------------------------------------------------------------


class Labels(NamedTuple):
    """What is known of n labelled slides, or places of slides, before any feature is read."""

    slides: list          # n names of feature files
    where: np.ndarray     # float (n, 2), centres of places in level-0 px; (n, 0) for slides
    labels: torch.Tensor  # (n,) indices into classes; of survival, whether the event was seen
    classes: list         # C names, sorted
    groups: torch.Tensor  # (n,) 0 .. G - 1, one per patient
    patients: list        # G names, sorted
    folds: torch.Tensor   # (repeats, n)
    owners: dict          # {slide: patient} of all slides in the csv, also of those without features
    time: np.ndarray      # float (n,), of survival; else zeros


def find_labels(config, files):
    """The Labels of the csv in config; `files` are the slides that have features. Raises ValueError."""
    path, column = config["places"] or config["labels"], config["label"]
    if not path:
        raise ValueError("features need labels: give --labels=FILE (slides) or --places=FILE")
    columns, lines = read_csv(path, ("slide", "patient"))
    survival = {"time", "event"} <= set(columns)
    column = "event" if survival else column
    kept = ["x", "y"] if config["places"] else []
    if missing := {column, *kept} - set(columns):
        raise ValueError(f"{path}: there is no column {min(missing)} among {columns}; --label names the labels' column")
    owners = {row["slide"]: row["patient"] for _, row in lines}
    files = sound(files, owners)
    absent = sorted(set(owners) - set(files))
    if absent:
        print(f"{path}: {len(absent)} slides have no features, such as {absent[0]}: left out")
    lines = [(line, row) for line, row in lines if row["slide"] in files]
    rows = [row for _, row in lines]
    slides = [row["slide"] for row in rows]
    if unlabelled := sorted(set(files) - set(slides)):
        print(f"{path}: {len(unlabelled)} slides with features have no label, such as {unlabelled[0]}: left out")
    check_lines(path, lines, column, [*kept, *({"fold", "time"} & set(columns))], not kept)
    classes = sorted({row[column] for row in rows})
    patients = sorted({row["patient"] for row in rows})
    if len(classes) < 2:
        raise ValueError(f"{path}: {' '.join(classes) or 'no class'} in column {column}; 2 or more are needed")
    if survival and classes != ["0", "1"]:
        raise ValueError(f"{path}: event must be 0 (not seen) or 1, and is {' '.join(classes)}")
    labels = torch.from_numpy(np.searchsorted(classes, [row[column] for row in rows]))
    groups = torch.from_numpy(np.searchsorted(patients, [row["patient"] for row in rows]))
    if "fold" in columns:
        stated = [int(row["fold"]) for row in rows]
        folds = torch.tensor([check_folds(path, [row["patient"] for row in rows], stated, least=2)])
    else:
        folds = draw_folds(path, labels, groups, config["repeats"])
    check_classes(path, labels, classes, folds)
    where = np.array([[row[key] for key in kept] for row in rows], float)
    time = np.array([row["time"] if survival else 0 for row in rows], float)
    return Labels(slides, where, labels, classes, groups, patients, folds, owners, time)


def sound(files, names):
    """Of files {slide: path}, those that are readable, finite and of one kind; the named ones that are not are said."""
    slides, _ = agreeing([files], sorted(set(files) & set(names)), print, apart=False)
    good = set()
    for slide in slides:
        if np.isfinite(np.memmap(*slide.maps[0])).all():
            good.add(slide.name)
        else:
            print(f"left out: {slide.name}: features that are not finite")
    return {name: path for name, path in files.items() if name in good or name not in names}


def check_lines(path, lines, column, numbers, one_each):
    """
    ValueError if a line (number, row) has no patient or label, or no number where one must be; or a slide two lines,
    where it may have one each.
    """
    times = Counter(row["slide"] for _, row in lines)
    for line, row in lines:
        patient, label, slide = row["patient"], row[column], row["slide"]
        if not patient or not label:
            raise ValueError(f"{path}, line {line}: patient '{patient}', {column} '{label}'; give both")
        for key in numbers:
            if not re.fullmatch(r"-?[0-9.]+(e[-+]?[0-9]+)?", row[key].strip()):
                raise ValueError(f"{path}, line {line}: {key} is '{row[key]}', not a number")
        if one_each and times[slide] > 1:
            raise ValueError(f"{path}, line {line}: slide {slide} is listed twice; delete one of the lines")


def draw_folds(path, labels, groups, repeats):
    """Folds (repeats, n) of whole patients. ValueError if a class has one patient only."""
    by_class = [groups[labels == label].unique() for label in labels.unique()]
    fewest = min(map(len, by_class))
    if fewest < 2:
        raise ValueError(f"{path}: a class has one patient only; train and test need one each")
    k = min(fewest, FOLDS)
    return torch.stack([make_folds(labels, groups, k, SEED + repeat) for repeat in range(repeats)])


def check_classes(path, labels, classes, folds):
    """ValueError if a fold leaves no sample of a class to train on."""
    for split in folds:
        for f in split.unique().tolist():
            if absent := set(range(len(classes))) - set(labels[split != f].tolist()):
                raise ValueError(f"{path}: when fold {f} (from 0) tests, nothing of class {classes[min(absent)]} is "
                                 "left to train on; give other folds")


def check_unseen(found, slides, allowed, pattern):
    """A text if the encoder was trained on a slide of these patients, each of whom is tested in some fold; else "".
    ValueError unless that is allowed."""
    tested = set(found.patients) | {wsi.patient_of(name, pattern) for name in found.slides}
    trained = {found.owners.get(name, name) for name in slides} | {wsi.patient_of(name, pattern) for name in slides}
    seen = sorted({found.owners.get(name, name) for name in tested & trained})
    if not seen:
        return ""
    text = f"the encoder was trained on slides of {len(seen)} of these patients, such as {seen[0]}"
    if not allowed:
        raise ValueError(f"{text}; train it without them (context.py --train_slides), or --allow_seen=true")
    return text


def neighbours(raw, centres):
    """The mean of each 3 x 3 neighbourhood, of the places that there are: (N, D) from (N, D) and centres (N, 2)."""
    from sklearn.neighbors import NearestNeighbors
    if len(centres) < 2:
        return raw
    near = NearestNeighbors().fit(centres)
    pitch = np.median(near.kneighbors(n_neighbors=1)[0])
    graph = near.radius_neighbors_graph(centres, 1.5 * pitch)  # a place is in its own neighbourhood
    return graph @ raw / np.asarray(graph.sum(1)).reshape(-1, 1)


def readouts(raw, contexts, centres, places):
    """{row of the table: (N, D') per place, or (D',) of the slide} from raw features and {row: context (N, D_c)}."""
    near = neighbours(raw, centres)
    beside = {name: np.concatenate([raw, own], 1) for name, own in contexts.items()}
    if places:
        return {"raw": raw, "raw, 3x3 mean": np.concatenate([raw, near], 1), **beside}
    moments = np.concatenate([raw, near, near**2], 1)
    found = {"mean": raw.mean(0), "max": raw.max(0), "moments": moments.mean(0)}
    return found | {name: own.mean(0) for name, own in beside.items()}


def contexts_of(slide, stored, encoder, raw, centres, hide):
    """{row: context (N, D_c)}: as stored, and the controls of an encoder: (trained, untrained, its header)."""
    found = {} if stored is None else {CONTEXT: np.asarray(stored, np.float32)}
    if encoder:
        trained, untrained, header, device = encoder
        order = np.random.default_rng(zlib.crc32(slide.encode())).permutation(len(raw))
        found[RANDOM] = embed_slide(untrained, header, raw, centres, device, hide=hide)
        found[SHUFFLED] = embed_slide(trained, header, raw, centres[order], device, hide=hide)
    return found


def context_keys(folder):
    """{"encoder": sha256, "trained_on": slides} of a folder of context.py --task=embed. Raises ValueError."""
    path = os.path.join(folder, "keys.json")
    try:
        with open(path) as f:
            keys = json.load(f)
        return {"encoder": keys["encoder"], "trained_on": keys["trained_on"]}
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{path}: does not say which slides the encoder was trained on ({type(e).__name__}); make "
                         "the folder with context.py --task=embed") from None


def read_slides(config, found):
    """
    ({row: (n, D')}, bags, text of the encoder). bags are [(raw (N, D), context (N, D_c) or None)] of slides, mapped
    from disk; [] for places. A place is given to the nearest tile.
    """
    encoder, text = None, ""
    if config["context"]:
        made = context_keys(config["context"])
        text = check_unseen(found, made["trained_on"], config["allow_seen"], config["patient"])
    if config["encoder"]:
        net, header = load_encoder(config["encoder"])
        if not config["context"] or made["encoder"] != model.sha256_of(config["encoder"]):
            raise ValueError("--encoder is for controls: give the file with which --context was made, and that folder")
        encoder = net, random_encoder(header, SEED), header, config["device"]
    files = files_of(config["features"])
    stored = files_of(config["context"]) if config["context"] else {}
    rows, bags, is_places = {}, [], found.where.shape[1] > 0
    for slide in dict.fromkeys(found.slides):
        features, centres, about = open_features(files[slide])
        own, hide = open_context(slide, stored, features) if stored else (None, 0)
        contexts = contexts_of(slide, own, encoder, features, centres, hide)
        vectors = readouts(np.asarray(features, np.float32), contexts, centres, is_places)
        if is_places:
            mine = [i for i, name in enumerate(found.slides) if name == slide]
            um = about.get("level0_mpp", about["side"] / about["patch_size_level0"])
            nearest = nearest_tiles(slide, found.where[mine] * um, centres, about["pitch"])
            vectors = {name: own[nearest] for name, own in vectors.items()}
        else:
            mine = [found.slides.index(slide)]
            bags.append((features, own))
        for name, own in vectors.items():
            if name not in rows:
                rows[name] = np.zeros((len(found.slides), own.shape[-1]), np.float32)
            rows[name][mine] = own
    return rows, bags, text


def open_context(slide, stored, features):
    """(context of a slide's places (N, D_c), mapped; --hide of its making). ValueError if it is of other features."""
    if slide not in stored:
        raise ValueError(f"{slide}: no context; run context.py --task=embed on its features")
    own, _, about = open_features(stored[slide], "context")
    read, _, _ = open_features(stored[slide])
    if not np.array_equal(read, features):
        raise ValueError(f"{stored[slide]}: context of other features than {slide}'s; embed them again")
    return own, about.get("hide", 0)


def nearest_tiles(slide, where, centres, pitch):
    """Index of the tile whose centre is nearest to each place (n, 2), in um. ValueError if it is a tile away."""
    from sklearn.neighbors import NearestNeighbors
    distance, index = NearestNeighbors(n_neighbors=1).fit(centres).kneighbors(where)
    if (distance > pitch).any():
        raise ValueError(f"{slide}: {int((distance > pitch).sum())} places are more than a tile from any feature; are "
                         "x and y level-0 px of the centre?")
    return index[:, 0]


# ---- probes: out-of-fold predictions, and what they are worth --------------------------------------------------------


def regression(x, labels, groups, C):
    """
    Logistic regression as in Patho-Bench: C = 0.5, balanced classes, nothing scaled. C = None chooses it from CS
    by balanced accuracy on inner folds of whole patients.
    """
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    keys = dict(class_weight="balanced", max_iter=10_000)
    if C is None:
        inner = [(fit.numpy(), held.numpy()) for fit, held in inner_splits(labels, groups)]
        keys |= dict(Cs=CS, cv=inner, scoring="balanced_accuracy", l1_ratios=(0,),
                     use_legacy_attributes=False)
        return LogisticRegressionCV(**keys).fit(x, labels)
    return LogisticRegression(C=C, **keys).fit(x, labels)


def inner_splits(labels, groups):
    """[(fit, held)] indices of up to three folds of whole patients."""
    fewest = min(len(groups[labels == label].unique()) for label in labels.unique())
    folds = make_folds(labels, groups, max(min(fewest, 3), 2), SEED)
    return [fit_and_held(folds == f) for f in folds.unique()]


def fit_and_held(held):
    """(indices to fit on, indices held out) of bool (n,)."""
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def cox(x, time, event):
    """Cox regression with elastic net (Patho-Bench's, alpha 0.07, l1 0.5)."""
    try:
        from sksurv.linear_model import CoxnetSurvivalAnalysis
    except ImportError:
        raise ValueError("columns time and event need scikit-survival: pip install scikit-survival") from None
    outcome = np.array(list(zip(event, time)), [("event", bool), ("time", float)])
    return CoxnetSurvivalAnalysis(alphas=[0.07], l1_ratio=0.5).fit(x, outcome)


def out_of_fold(found, fit):
    """What fit(train, test) -> (n_test, C) predicts for each sample outside its fold: (repeats, n, C)."""
    predicted = torch.zeros(*found.folds.shape, len(found.classes))
    for repeat, folds in enumerate(found.folds):
        for f in folds.unique():
            train, test = fit_and_held(folds == f)
            predicted[repeat, test] = fit(train, test).float()
    return predicted


def linear_probe(found, x, at_test, C):
    """Out-of-fold predictions from features x (n, D); those that are tested may be others, at_test."""
    def fit(train, test):
        if found.time.any():
            event = found.labels[train] == 1
            risk = cox(x[train], found.time[train], event).predict(at_test[test])
            return torch.tensor(np.stack([-risk, risk], 1))
        probe = regression(x[train], found.labels[train], found.groups[train], C)
        return torch.from_numpy(probe.predict_proba(at_test[test]))
    return out_of_fold(found, fit)


# attention MIL (Ilse et al. 2018) as three groups train it; which one is chosen inside each fold
MIL = {
    "patho-bench": dict(width=512, gated=False, dropout=0.25, lr=3e-4, weight_decay=1e-5, batch=1, epochs=20),
    "eva": dict(width=128, gated=True, dropout=0.0, lr=1e-3, weight_decay=0.01, batch=32, epochs=100),
    "titan": dict(width=512, gated=True, dropout=0.25, lr=1e-4, weight_decay=1e-5, batch=1, epochs=20),
}
BAG = 2048  # places of a slide per training step


class AttentionMIL(torch.nn.Module):
    """keys (N, D_k) decide how much each of values (N, D_v) counts: logits (C,)."""

    def __init__(self, key_dim, value_dim, classes, width, gated, dropout):
        super().__init__()
        drop = torch.nn.Dropout(dropout)
        self.key = torch.nn.Sequential(torch.nn.Linear(key_dim, width), torch.nn.ReLU(), drop)
        self.value = torch.nn.Sequential(torch.nn.Linear(value_dim, width), torch.nn.ReLU(), drop)
        self.tanh = torch.nn.Linear(width, width)
        self.gate = torch.nn.Linear(width, width) if gated else None
        self.score = torch.nn.Linear(width, 1)
        self.classify = torch.nn.Linear(width, classes)

    def forward(self, keys, values):
        keys = self.key(keys)
        hidden = self.tanh(keys).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(keys).sigmoid()
        weights = self.score(hidden).softmax(0)  # (N, 1)
        return self.classify((weights * self.value(values)).sum(0))


def train_mil(bags, labels, classes, setting, seed):
    """An AttentionMIL of bags [(keys, values)], last epoch, with a cosine schedule; classes count equally."""
    torch.manual_seed(seed)
    settings = dict(MIL[setting])
    lr, weight_decay, batch, epochs = (settings.pop(key) for key in ("lr", "weight_decay", "batch", "epochs"))
    net = AttentionMIL(*(t.shape[1] for t in bags[0]), classes, **settings)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    counts = labels.bincount(minlength=classes)
    weights = len(labels) / (classes * counts)
    for _ in range(epochs):
        for part in torch.randperm(len(bags)).split(batch):
            optimizer.zero_grad()
            for i in part.tolist():
                some = torch.randperm(len(bags[i][0]))[:BAG].numpy()
                logits = net(*(tensor(t, some) for t in bags[i]))
                loss = F.cross_entropy(logits, labels[i]) * weights[labels[i]]
                (loss / len(part)).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def tensor(mapped, rows=slice(None)):
    return torch.from_numpy(np.asarray(mapped[rows], np.float32))


@torch.no_grad()
def apply_mil(net, bags):
    return torch.stack([net(*map(tensor, bag)).softmax(0) for bag in bags])


@eval_bach.one_thread()
def mil_probe(found, bags):
    """Out-of-fold predictions of attention MIL from bags [(keys, values)]; the setting is chosen inside each fold."""
    classes = len(found.classes)

    def fit(train, test):
        labels = found.labels[train]
        rest, held = inner_splits(labels, found.groups[train])[0]
        mine = [bags[i] for i in train]
        nets = [train_mil([mine[i] for i in rest], labels[rest], classes, setting, SEED) for setting in MIL]
        chosen = [apply_mil(net, [mine[i] for i in held]).argmax(1)[None] for net in nets]
        scores = [eval_bach.balanced_accuracy(own, labels[held]).item() for own in chosen]
        best = list(MIL)[scores.index(max(scores))]
        return apply_mil(train_mil(mine, labels, classes, best, SEED), [bags[i] for i in test])
    return out_of_fold(found, fit)


def resampled(predicted, found, weights):
    """Balanced accuracy, mean over repeats, for each row of weights (B, G): how often each patient was drawn. (B,)."""
    hits = (predicted.argmax(2) == found.labels).double().mean(0)
    onehot = F.one_hot(found.labels).double()
    counts = torch.stack([hits[:, None] * onehot, onehot])  # (2, n, C)
    of_patient = counts.new_zeros(2, len(found.patients), onehot.shape[1])
    of_patient.index_add_(1, found.groups, counts)
    right, all_of = weights @ of_patient  # (B, C)
    return (right / all_of).nanmean(1)  # a draw may be without a class


def concordance(predicted, found, weights):
    """The same for survival: the c-index of pairs of one fold, since the risks of two folds are of two fits."""
    time, event = torch.from_numpy(found.time), found.labels == 1
    outlived = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    drawn = weights[:, found.groups]  # (B, n): how often each sample was drawn
    scores = []
    for folds, risk in zip(found.folds, predicted[..., 1]):
        pairs = (event[:, None] & outlived & (folds[:, None] == folds)).double()
        higher = risk[:, None] > risk
        right = pairs * (higher.double() + 0.5 * (risk[:, None] == risk))
        both = [((drawn @ counted) * drawn).sum(1) for counted in (right, pairs)]
        scores.append(torch.where(both[1] > 0, both[0] / both[1], 0.5))  # without a pair there is nothing to tell
    return torch.stack(scores).mean(0)


def area_under_curve(predicted, found):
    """
    Macro AUROC, one class against the rest: mean over folds, and a class counts in a fold that has it and others. None
    if no fold has two classes.
    """
    from sklearn.metrics import roc_auc_score
    onehot = F.one_hot(found.labels).numpy()
    areas = []
    for folds, own in zip(found.folds, predicted.numpy()):
        for test in (folds.numpy() == f for f in folds.unique()):
            share = onehot[test].mean(0)
            told = (share > 0) & (share < 1)
            if told.any():
                areas.append(roc_auc_score(onehot[test][:, told], own[test][:, told], average="macro"))
    return statistics.mean(areas) if areas else None


def compare(name, predicted, mean, found):
    """
    A row of the table from out-of-fold predictions (repeats, n, C) and those of the mean of raw features.

    balanced: balanced accuracy, or the c-index of survival; auroc: of area_under_curve; difference to the mean,
    and low and high, its 95 % interval by a bootstrap over patients (paired: both rows see the same draws).
    """
    score = concordance if found.time.any() else resampled
    G = len(found.patients)
    drawn = torch.randint(G, (DRAWS, G), generator=torch.Generator().manual_seed(SEED))
    weights = F.one_hot(drawn, G).sum(1).double()
    once = torch.ones(1, G).double()
    gain = score(predicted, found, weights) - score(mean, found, weights)
    low, high = gain.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    balanced = score(predicted, found, once).item()
    row = {"row": name, "balanced": balanced, "difference": balanced - score(mean, found, once).item(),
           "low": low, "high": high}
    if not found.time.any():
        row["auroc"] = area_under_curve(predicted, found)
    return row


def score_features(config):
    """The rows of one csv of labelled slides or places, printed as a table as they are done; returns them as a dict."""
    files = files_of(config["features"])
    found = find_labels(config, files)
    rows, bags, text = read_slides(config, found)
    first = next(iter(rows)) if found.where.shape[1] else "mean"
    at_test = {name: own for name, own in rows.items()}
    if SHUFFLED in rows:
        rows[SHUFFLED] = rows[CONTEXT]  # the probe is trained on places in their true order
    mean = linear_probe(found, rows[first], rows[first], 0.5)
    done = []
    metric = "c-index" if found.time.any() else "balanced"
    print(f"{'':28}{metric:>8}   auroc  C tuned   difference to {first} and its 95 % interval")
    for name, x in {first: rows[first], **rows}.items():
        predicted = linear_probe(found, x, at_test[name], 0.5)
        row = compare(name, predicted, mean, found)
        if config["write"] and name == (CONTEXT if CONTEXT in rows else first):
            write_scores(config["write"], found, predicted)
        if not found.time.any():
            row["tuned"] = compare(name, linear_probe(found, x, at_test[name], None), mean, found)["balanced"]
        done.append(show(row, name == first))
    if bags and not found.time.any():
        once = found._replace(folds=found.folds[:1])  # it takes minutes
        kinds = {"attention MIL": [(raw, raw) for raw, _ in bags]}
        if config["context"]:
            kinds["attention of context on raw"] = [(own, raw) for raw, own in bags]
        for name, pairs in kinds.items():
            done.append(show(compare(name, mil_probe(once, pairs), mean[:1], once)))
    kind = "places" if found.where.shape[1] else "slides"
    repeats, k = len(found.folds), int(found.folds.max()) + 1
    listed = str([found.slides, found.folds.tolist()])
    checksum = hashlib.sha256(listed.encode()).hexdigest()[:8]
    protocol = (f"{kind}: {len(found.slides)} of {len(found.patients)} patients, {repeats} x {k} folds {checksum}, "
                + ("Cox, elastic net" if found.time.any() else "logistic regression C 0.5 balanced"))
    for row in done:
        row["seen"] = text
    if text:
        print(f"allowed, so the rows of context are too good: {text}")
    return {"rows": done, "classes": found.classes, "seen": text, "protocol": protocol}


def write_scores(path, found, predicted):
    """A csv of out-of-fold probabilities (repeats, n, C), their mean over repeats, for prepare/heatmap.py."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["slide", "x", "y", "label", *found.classes])
        for i, scores in enumerate(predicted.mean(0).tolist()):
            where = found.where[i].tolist() or ["", ""]
            label = found.classes[found.labels[i]]
            writer.writerow([found.slides[i], *where, label, *scores])


def show(row, is_mean=False):
    """Print a row of the table, and return it."""
    text = f"{row['row']:27}"
    for key in ("balanced", "auroc", "tuned"):
        text += " " * 9 if row.get(key) is None else f"{row[key]:9.3f}"
    if not is_mean:
        low, high = row["low"], row["high"]
        text += f"   {row['difference']:+8.3f}"
        text += f"  [{low:+.3f}, {high:+.3f}]"
        text += "" if low > 0 or high < 0 else "  none"
    print(text, flush=True)
    return row


def main(config):
    if not config["features"]:
        eval_bach.score_files("eval_slides", config, lambda: load(config))
        return
    try:
        print(json.dumps(score_features(config)))
    except (ValueError, OSError) as e:
        raise SystemExit(f"eval_slides: {e}") from e


if __name__ == "__main__":
    # ---- labelled tiles
    weights = ""      # files or folders, with commas between: of this project, or any that docs/weights.md lists
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
    # ---- labelled slides or places
    features = ""     # folder of prepare/features.py
    context = ""      # folder of context.py --task=embed; "" = no rows of context
    encoder = ""      # the file it was made with, for the two controls; "" = none
    labels = ""       # csv of slide, patient and label
    places = ""       # csv of slide, x, y, patient and label
    label = "label"   # column of the labels
    write = ""        # csv of each sample's out-of-fold probabilities, with context if there is any; "" = none
    repeats = 5       # times that folds are drawn, where the csv gives none
    allow_seen = False  # score slides of patients that the encoder was trained on; shows in the row
    patient = r"TCGA-\w\w-\w{4}"  # pattern of the patient in the names of the slides that an encoder was trained on
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configure(globals())
    main(config)
