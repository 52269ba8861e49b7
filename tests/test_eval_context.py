"""eval_slides.py on features: labelled slides, cases and places, by patient; eval_bach.py's view of context."""
import csv
import hashlib
import json
import os
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line

import context
import eval_bach
import eval_slides
import model
import places

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

CONFIG = dict(image_dir="", write="", features="", context="", encoder="", retrained="", labels="", places="",
              label="label", repeats=1, mil=False, patient=r"P\d\d", device="cpu")
UM = 0.5  # um/px of level 0
NAMES = [f"P{i // 2:02d}-{i}" for i in range(16)]
QUICK = dict(width=8, gated=True, dropout=0.0, lr=0.02, weight_decay=0.0, batch=4, epochs=3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two settings of attention MIL that train for seconds, and few draws of the bootstrap."""
    monkeypatch.setattr(eval_slides, "MIL", {"quick": QUICK, "plain": QUICK | dict(gated=False, epochs=1)})
    monkeypatch.setattr(eval_slides, "DRAWS", 200)
    monkeypatch.setattr(eval_slides, "FOLDS", 2)
    monkeypatch.setattr(eval_slides, "CS", (0.1, 1.0))


def write(path, features, coords, **more):
    """Tiles of 100 um, 200 px of level 0."""
    about = dict(mpp=1.0, tile_px=100, patch_size_level0=200, overlap=0, level0_mpp=UM)
    np.savez(path, **{"features": features.astype(np.float16), "coords": coords, **about, **more})


def table(path, header, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def embedded(folder, encoder="x", trained_on=()):
    """keys.json as context.py --task=embed writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "keys.json").write_text(json.dumps({"encoder": encoder, "trained_on": list(trained_on)}))


def edit(path, **arrays):
    """Change arrays and attributes of an .npz."""
    with np.load(path) as f:
        found = dict(f)
    np.savez(path, **found | arrays)


@pytest.fixture
def world(tmp_path):
    """
    16 slides of 8 patients, 5 x 6 places, in which class b has a shifted mean in its features. In context, the place's
    row of the grid is known, which features do not tell.
    """
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(5), np.arange(6))
    coords = np.stack([x, y], -1).reshape(-1, 2) * 200
    (tmp_path / "features").mkdir()
    embedded(tmp_path / "context")
    rows, spots = [], []
    for i, name in enumerate(NAMES):
        patient, label = name[:3], "ab"[i // 2 % 2]
        features = rng.normal(0, 1, (30, 8)) + (label == "b") * 0.8
        own = np.concatenate([rng.normal(0, 0.1, (30, 7)), coords[:, 1:] / 200], 1)
        write(tmp_path / f"features/{name}.npz", features, coords)
        write(tmp_path / f"context/{name}.npz", features, coords, context=own.astype(np.float16))
        rows.append((name, patient, label))
        spots += [(name, patient, x + 100, y + 100, "top" if y < 600 else "bottom") for x, y in coords.tolist()]
    table(tmp_path / "labels.csv", ("slide", "patient", "label"), rows)
    table(tmp_path / "places.csv", ("slide", "patient", "x", "y", "label"), spots)
    return tmp_path


def keys_of(world, **changes):
    folders = {key: str(world / key) for key in ("features", "context", "retrained") if (world / key).is_dir()}
    if not {"labels", "places"} & set(changes):
        changes["labels"] = world / "labels.csv"
    return {**CONFIG, **folders, **{k: str(v) if isinstance(v, os.PathLike) else v for k, v in changes.items()}}


def score(world, **changes):
    found = {}
    eval_slides.score_features(keys_of(world, **changes), found)
    return {row["row"]: row for row in found["rows"]}, found


def labels_of(world, **changes):
    config = keys_of(world, **changes)
    return eval_slides.find_labels(config, [eval_slides.files_of(config["features"])])


@pytest.fixture
def seen(monkeypatch):
    """What reaches linear probes, {C: [(x, at_test)]}, which then are not fitted."""
    calls = {0.5: [], None: []}

    def probe(found, x, at_test, C):
        calls[C].append((x, at_test))
        return torch.zeros(*found.folds.shape, len(found.classes))
    monkeypatch.setattr(eval_slides, "linear_probe", probe)
    return calls


def found_of(labels, folds, groups=None, time=None):
    """Samples of patients with one slide each, if no groups are given."""
    n = len(labels)
    groups = torch.arange(n) if groups is None else torch.as_tensor(groups)
    time = time and torch.tensor(time).double()
    return eval_slides.Samples([(f"s{i}",) for i in range(n)], torch.tensor(labels), ["0", "1"], groups,
                               torch.tensor([folds]), "slides", time=time)


# rows

def test_cases_are_told_by_their_mean_and_rows_are_compared_with_it(world, capsys, monkeypatch):
    compare, means = eval_slides.compare, []
    monkeypatch.setattr(eval_slides, "compare", lambda *a: means.append(a[2]) or compare(*a))
    rows, found = score(world, mil=True, repeats=2)
    assert all(torch.equal(mean, means[0]) for mean in means[:-2]) and means[0].shape[0] == 2
    assert all(torch.equal(mean, means[0][:1]) for mean in means[-2:]), "attention MIL has the first folds"
    assert list(rows) == ["mean", "max", "moments", "stats: raw", "raw, context", "stats: raw, context",
                          "attention MIL", "attention of context on raw"]
    assert rows["mean"]["balanced"] > 0.9 and rows["mean"]["auroc"] > 0.95 and rows["mean"]["difference"] == 0
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows.values())
    assert found["protocol"].startswith("cases: 8 of 8 patients, 2 x 2 folds")
    assert rows["mean"]["repeats"] == 2 and rows["attention MIL"]["repeats"] == 1
    out, bars = capsys.readouterr()
    assert re.search(r"raw, context +\d\.\d+ .*none\n", out) and out.count("  1 of 2 repeats\n") == 2
    assert "attention MIL: 100%" in bars and max(map(len, re.split("[\r\n]", bars))) <= 80


def test_places_are_told_by_context_alone(world):
    """Rows of the grid are noise to a place's own feature and known in its context; the interval excludes 0."""
    rows, _ = score(world, places=world / "places.csv", write=str(world / "scores.csv"), mil=True)
    lines = list(csv.DictReader(open(world / "scores.csv")))
    assert len(lines) == 480 and {"slide", "x", "y", "top", "bottom"} <= set(lines[0])
    assert all((float(line["top"]) > 0.5) == (line["label"] == "top") for line in lines)
    assert list(rows) == ["raw", "raw, 3x3 mean", "raw, context"]
    assert rows["raw"]["balanced"] < 0.62 and rows["raw, context"]["balanced"] > 0.95
    assert rows["raw, context"]["low"] > 0.2


def test_readouts_by_hand():
    """Of all places, not of one; the 3 x 3 mean is of the places that there are."""
    x, y = np.meshgrid(np.arange(4), np.arange(4))
    centres = np.stack([x, y], -1).reshape(-1, 2) * 100.0
    rng = np.random.default_rng(0)
    raw, own = rng.normal(size=(16, 2)), rng.normal(size=(16, 3))
    grid = raw.reshape(4, 4, 2)
    near = [grid[max(i // 4 - 1, 0) : i // 4 + 2, max(i % 4 - 1, 0) : i % 4 + 2].mean((0, 1)) for i in range(16)]
    near = np.array(near)
    summary = [np.concatenate([a.mean(0), a.std(0), a.max(0)]) for a in (raw, own)]
    expected = {"mean": raw.mean(0), "max": raw.max(0), "moments": np.r_[raw.mean(0), near.mean(0), (near**2).mean(0)],
                "stats: raw": summary[0], "k": np.r_[raw.mean(0), own.mean(0)], "stats: k": np.r_[*summary]}
    found = eval_slides.readouts(raw, {"k": own}, centres, "slides")
    assert list(found) == list(expected) and all(np.allclose(found[name], expected[name]) for name in expected)
    expected = {"raw": raw, "raw, 3x3 mean": np.c_[raw, near], "k": np.c_[raw, own]}
    found = eval_slides.readouts(raw, {"k": own}, centres, "places")
    assert list(found) == list(expected) and all(np.allclose(found[name], expected[name]) for name in expected)
    assert (eval_slides.neighbours(raw[:1], centres[:1]) == raw[:1]).all()
    assert np.allclose(eval_slides.stats(np.stack([raw, raw + 1])), [summary[0], summary[0] + [1, 1, 0, 0, 1, 1]])


@pytest.mark.parametrize("column, kind, n", [
    (lambda i: "ab"[i // 2 % 2], "cases", 8),   # no patient has two labels
    (lambda i: "ab"[i % 2], "slides", 16)])     # a slide's label
def test_a_patients_slides_are_one_case_where_he_has_one_label(world, seen, column, kind, n):
    """A case is the mean of its slides' vectors, and one bag of all their places."""
    path = world / "labels.csv"
    table(path, ("slide", "patient", "label"), [(name, name[:3], column(i)) for i, name in enumerate(NAMES)])
    found = labels_of(world)
    files = eval_slides.files_of(str(world / "features"))
    stored, _ = eval_slides.open_contexts(keys_of(world))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    rows, bags = eval_slides.read_slides(found, [files], stored, {}, "cpu")
    assert before is None or len(os.listdir("/proc/self/fd")) <= before + 2, "thousands of slides would be too many"
    assert found.kind == kind and len(found.names) == len(bags) == n
    for names, vector, bag in zip(found.names, rows["max"], bags):
        of_slides = [np.float32(eval_slides.open_features(files[name])[0]).max(0) for name in names]
        assert len(names) == 16 // n and np.allclose(vector, np.mean(of_slides, 0))
        keys, values = eval_slides.read_bag(bag[::-1], "cpu", 1000)
        assert len(values) == 30 * len(names) and values.mean() == pytest.approx(float(rows["mean"][0].mean()), abs=3)
    eval_slides.write_scores(world / "scores.csv", found, torch.zeros(1, n, 2))
    assert [line["slide"] for line in csv.DictReader(open(world / "scores.csv"))] == NAMES


def test_places_without_a_tile_are_left_out_by_slide(world, capsys):
    """As where tissue was not tiled; only where most are off, it is the unit."""
    with open(world / "places.csv", "a") as f:
        f.write("P00-0,P00,5000,50,top\nP03-6,P03,100,-900,top\nP00-0,P00,5000,150,top\nP00-0,P00,100,100,top\n")
    found = labels_of(world, places=world / "places.csv")
    assert len(found.names) == 481 and found.where[:, :2].max() == 1100 and found.where[:, :2].min() == 100
    assert found.names[-1] == ("P00-0",), "the order of the csv stays: folds are drawn by it"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert lines == [f"left out: {name}: {n} places are more than a tile from any feature"
                     for name, n in (("P00-0", 2), ("P03-6", 1))]


@pytest.mark.parametrize("stated", [{}, {"level0_mpp": 0.6}], ids=str)
def test_places_are_in_the_px_of_their_slide(tmp_path, stated):
    """The um/px of level 0 that the file states, else a tile's side over its extent."""
    coords = np.stack([np.arange(20), np.zeros(20, int)], 1) * 200
    about = dict(mpp=1.0, tile_px=100, patch_size_level0=200, overlap=0)
    np.savez(tmp_path / "a.npz", features=np.ones((20, 2), np.float16), coords=coords, **about, **stated)
    rows = [{"slide": "a", "x": x, "y": y} for x, y in coords + 100.0]
    assert eval_slides.on_tiles(rows, {"a": str(tmp_path / "a.npz")}) == rows
    assert [row["tile"] for row in rows] == list(range(20))


# probes

def test_the_headline_is_balanced_logistic_regression_with_a_c_of_a_half(world):
    """As Patho-Bench fits it, against scikit-learn by hand, on classes of unequal size."""
    lines = [(name, name[:3], "ab"[name[:3] in ("P01", "P03", "P05")], i // 2 % 8 // 4) for i, name in enumerate(NAMES)]
    table(world / "labels.csv", ("slide", "patient", "label", "fold"), lines)
    for name in NAMES:
        edit(world / f"features/{name}.npz", features=np.random.default_rng(int(name[4:])).normal(size=(30, 8)))
    rows, _ = score(world, context="")
    files = eval_slides.files_of(str(world / "features"))
    x = np.stack([np.float32(eval_slides.open_features(files[name])[0]).mean(0) for name in NAMES])
    x = x.reshape(8, 2, 8).mean(1)
    y, folds = np.array([0, 1, 0, 1, 0, 1, 0, 0]), np.arange(8) // 4
    proba = np.zeros(8)
    for f in range(2):
        fit = LogisticRegression(C=0.5, class_weight="balanced", max_iter=10_000).fit(x[folds != f], y[folds != f])
        proba[folds == f] = fit.predict_proba(x[folds == f])[:, 1]
    areas = [roc_auc_score(y[folds == f], proba[folds == f]) for f in range(2)]
    assert rows["mean"]["balanced"] == pytest.approx(balanced_accuracy_score(y, proba > 0.5))
    assert rows["mean"]["auroc"] == pytest.approx(np.mean(areas))


def test_regression_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 3)) * 5, torch.arange(40) % 4 // 3
    found = found_of(labels.tolist(), (np.arange(40) // 20).tolist())
    predicted = eval_slides.linear_probe(found, x, -x, 0.01)  # what is tested may be other features
    fit = LogisticRegression(C=0.01, class_weight="balanced", max_iter=10_000).fit(x[20:], labels[20:])
    assert np.allclose(predicted[0, :20], fit.predict_proba(-x[:20]), atol=1e-5)


def test_c_is_chosen_on_inner_folds_of_whole_patients(monkeypatch):
    groups, labels = torch.arange(36) // 3, torch.arange(36) // 3 % 2
    x = np.random.default_rng(0).normal(size=(36, 3)) + labels.numpy()[:, None]
    probe = eval_slides.regression(x, labels, groups, None)
    assert len(probe.cv) == 3 and probe.param_grid["C"] == eval_slides.CS and probe.scoring == "balanced_accuracy"
    for fit, held in probe.cv:
        assert not set(groups[fit].tolist()) & set(groups[held].tolist()) and len(fit) + len(held) == 36
    with monkeypatch.context() as patch:
        patch.setattr(eval_slides, "make_folds", lambda *a: labels)  # a fold would hold all of a class
        assert not eval_slides.inner_splits(labels, groups)
    few = eval_slides.regression(x[:9], labels[:9], groups[:9], None)  # class 1 is of one patient
    assert isinstance(few, LogisticRegression) and few.C == 0.5


def bags_of(world, name, arrays):
    """A bag of the maps of arrays, each a file of its own."""
    maps = []
    for i, array in enumerate(arrays):
        np.asarray(array, np.float16).tofile(world / f"{name}{i}")
        maps.append((str(world / f"{name}{i}"), np.float16, "r", 0, np.shape(array)))
    return maps


def test_a_bag_pairs_keys_and_values_of_all_its_slides(tmp_path):
    values = [np.arange(8).reshape(4, 2), 8 + np.arange(6).reshape(3, 2)]
    keys = [100 + own[:, :1] for own in values]
    bag = bags_of(tmp_path, "k", keys), bags_of(tmp_path, "v", values)
    found, of_values = eval_slides.read_bag(bag, "cpu", 1000)
    assert torch.equal(of_values, torch.arange(14.0).view(7, 2)) and torch.equal(found, 100 + of_values[:, :1])
    some = [eval_slides.read_bag(bag, "cpu", 5) for _ in range(9)]
    assert all(len(own) == 5 and torch.equal(k, 100 + own[:, :1]) for k, own in some)
    assert len({tuple(own[:, 0].tolist()) for _, own in some}) > 1
    net = eval_slides.AttentionMIL(1, 2, 2, QUICK).eval()
    torch.testing.assert_close(net(found, of_values), net(found.flip(0), of_values.flip(0)))
    assert not torch.allclose(net(found, of_values), net(found.flip(0), of_values))


def test_attention_mil_learns_each_bags_label_and_classes_count_equally(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_slides, "MIL", {"quick": QUICK | dict(epochs=25)})
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1])
    told = [bags_of(tmp_path, f"t{i}", [np.full((5, 2), float(y))]) for i, y in enumerate(labels)]
    net = eval_slides.train_mil([(maps, maps) for maps in told], labels, 2, "quick", "cpu")
    assert torch.equal(eval_slides.apply_mil(net, [(maps, maps) for maps in told], "cpu").argmax(1), labels)
    same = [bags_of(tmp_path, f"s{i}", [np.ones((5, 2))]) for i in range(8)]
    net = eval_slides.train_mil([(maps, maps) for maps in same], labels, 2, "quick", "cpu")
    assert eval_slides.apply_mil(net, [(same[0], same[0])], "cpu")[0, 0].item() == pytest.approx(0.5, abs=0.15)


def test_the_best_setting_of_mil_is_taken_and_attention_is_of_context(world, monkeypatch):
    """A net here is the name of its setting; `plain` alone is right."""
    found, calls, fitted = labels_of(world), [], []

    def train(bags, labels, classes, setting, device):
        fitted.append((setting, len(bags)))
        return setting

    def apply(net, bags, device):
        calls.append((net, bags))
        labels = torch.tensor([int(values[0][0].split("-")[-1][:-4]) // 2 % 2 for _, values in bags])
        return F.one_hot(labels if net == "plain" else 1 - labels, 2).float()
    monkeypatch.setattr(eval_slides, "train_mil", train)
    monkeypatch.setattr(eval_slides, "apply_mil", apply)
    rows, _ = score(world, mil=True)
    assert rows["attention MIL"]["balanced"] == 1 and rows["attention of context on raw"]["balanced"] == 1
    assert [setting for setting, _ in fitted] == ["quick", "plain", "plain"] * 4  # 2 folds of 2 rows
    assert fitted[2][1] == 4 > fitted[0][1]  # chosen inside the fold
    for net, bags in calls:
        for keys, values in bags:
            where = [path.split("/")[-2] for path, *_ in (*keys, *values)]
            assert where in (["features"] * 4, ["context"] * 2 + ["features"] * 2)
            assert keys is values or keys[0][-1] == (30, 8) and keys[0][-2] != values[0][-2]
    assert "context" in calls[-1][1][0][0][0][0] and found.kind == "cases"


def test_a_setting_of_mil_is_chosen_on_patients_that_it_was_not_trained_on(monkeypatch):
    groups, labels = torch.arange(48) // 3, torch.arange(48) // 24
    found, pairs = found_of(labels.tolist(), (groups % 2).tolist(), groups), []
    monkeypatch.setattr(eval_slides, "train_mil", lambda bags, *a: bags)
    monkeypatch.setattr(eval_slides, "apply_mil",
                        lambda net, bags, device: pairs.append((net, bags)) or torch.zeros(len(bags), 2))
    eval_slides.mil_probe(found, groups.tolist(), "MIL", "cpu")  # a bag here is its patient
    assert len(pairs) == 6 and not any(set(fit) & set(held) for fit, held in pairs)


def test_folds_keep_patients_whole_and_each_sample_is_predicted_by_others(world):
    found = labels_of(world, places=world / "places.csv", repeats=2)
    for folds in found.folds:
        assert all(len(folds[found.groups == g].unique()) == 1 for g in range(8))
    assert (found.folds[0] != found.folds[1]).any(), "repeats draw other folds"
    pairs = []

    def fit(train, test):
        pairs.append((set(found.groups[train].tolist()), set(found.groups[test].tolist())))
        return torch.ones(len(test), 2)

    assert (eval_slides.out_of_fold(found, fit) == 1).all()
    assert all(not train & test and len(train | test) == 8 for train, test in pairs)


# what a score is worth

def test_the_bootstrap_draws_patients_and_is_paired():
    found = found_of([0] * 6 + [1] * 6, [0, 1] * 6, np.arange(12) // 2)
    right = F.one_hot(found.labels).float()[None]
    wrong = right.clone()
    wrong[0, :2] = wrong[0, :2].flip(1)  # one patient of class 0, both slides
    row = eval_slides.compare("x", wrong, right, found)
    assert row["balanced"] == pytest.approx(1 - 2 / 6 / 2) and row["difference"] == pytest.approx(-1 / 6)
    assert row["high"] == 0 and row["low"] < -0.2  # some draws are without that patient
    same = eval_slides.compare("x", wrong, wrong, found)
    assert same["low"] == same["high"] == 0, "paired: equal rows differ in no draw"
    weights = (torch.arange(6) > 0).double()[None]
    without = eval_slides.resampled(wrong.argmax(2), found.labels, found.groups, weights)
    assert without.item() == 1, "without the patient nothing is wrong"


def test_the_interval_is_of_95_percent(monkeypatch):
    """200 patients of a class, a quarter of whom are wrong: by the normal approximation."""
    monkeypatch.setattr(eval_slides, "DRAWS", 1000)
    found = found_of([0] * 200 + [1] * 200, [0, 1] * 200)
    right = F.one_hot(found.labels).float()[None]
    wrong = right.clone()
    wrong[0, ::4] = wrong[0, ::4].flip(1)
    row = eval_slides.compare("x", wrong, right, found)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)


def test_scores_compare_samples_of_one_fold():
    """A fold's fit may be off by a constant: over all folds together the order would be wrong."""
    found = found_of([0, 1, 0, 1], [0, 0, 1, 1], time=[4.0, 1.0, 4.0, 1.0])
    risk = torch.tensor([0.1, 0.2, 0.7, 0.8])
    predicted = torch.stack([1 - risk, risk], 1)[None]
    assert eval_slides.area_under_curve(predicted, found) == 1
    assert eval_slides.concordance(predicted, found, torch.ones(1, 4).double()).tolist() == [1.0]
    one_class = found_of([0, 1, 1, 1], [0, 0, 1, 1])  # the second fold cannot tell
    assert eval_slides.area_under_curve(predicted, one_class) == 1


def test_the_c_index_by_hand():
    """Ties in risk count half; of two at one time, the one whose event was seen is the earlier."""
    found = found_of([1, 1, 0, 0], [0, 0, 0, 0], time=[1.0, 2.0, 2.0, 3.0])
    predicted = torch.tensor([[0.0, 0.9], [0.0, 0.3], [0.0, 0.5], [0.0, 0.3]])[None]
    weights = torch.tensor([[1, 1, 1, 1], [2, 1, 0, 1]]).double()
    # pairs: 0 before 1, 2, 3, right; 1 before 2, wrong; 1 before 3, a tie. Drawn twice, a pair counts twice.
    assert np.allclose(eval_slides.concordance(predicted, found, weights), [3.5 / 5, 4.5 / 5])


class Cox:
    """A stand-in for scikit-survival's regression: the risk is the mean feature, since class b dies early."""

    def __init__(self, alphas, l1_ratio):
        assert alphas == [0.07] and l1_ratio == 0.5

    def fit(self, x, outcome):
        assert outcome.dtype.names == ("event", "time") and outcome["event"].dtype == bool  # in this order
        assert len(x) == len(outcome) == 4 and set(outcome["time"]) <= {*range(1, 9)}
        assert (outcome["event"] == (outcome["time"] > 2)).all()
        return self

    def predict(self, x):
        return x.mean(1)


@pytest.mark.parametrize("real", [False, True])
def test_survival_is_scored_by_the_c_index(world, monkeypatch, real):
    """Of cases: a patient has one time. The two that leave first are censored."""
    if real:
        pytest.importorskip("sksurv")
    else:
        linear_model = types.SimpleNamespace(CoxnetSurvivalAnalysis=Cox)
        monkeypatch.setitem(sys.modules, "sksurv", types.SimpleNamespace(linear_model=linear_model))
        monkeypatch.setitem(sys.modules, "sksurv.linear_model", linear_model)
    times = [7, 1, 8, 3, 5, 4, 6, 2]  # of the patients; the odd ones are of class b
    rows = [(name, name[:3], times[i // 2], int(times[i // 2] > 2)) for i, name in enumerate(NAMES)]
    table(world / "survival.csv", ("slide", "patient", "time", "event"), rows)
    rows, found = score(world, labels=world / "survival.csv", mil=True)
    assert rows["mean"]["balanced"] > 0.6 and not {"auroc", "tuned"} & set(rows["mean"])
    assert "cases: 8 of 8" in found["protocol"] and "Cox" in found["protocol"] and "attention MIL" not in rows
    assert labels_of(world, labels=world / "survival.csv", label="event").time is None  # a column of labels wins
    table(world / "times.csv", ("slide", "patient", "time", "event"), SURVIVAL[:-1] + [(*SURVIVAL[-1][:2], 99, 1)])
    assert labels_of(world, labels=world / "times.csv").kind == "slides", "a patient has two times"
    monkeypatch.setitem(sys.modules, "sksurv.linear_model", None)
    with pytest.raises(ValueError, match="need scikit-survival: pip install"):
        score(world, labels=world / "survival.csv")


# contexts and controls

def encoder(world, slides, mpp=1.0, scales=1, **stated):
    """A slide encoder's file, and context/keys.json that names it."""
    config = dict(width=8, heads=1, depth=1, registers=1, layerscale=1.0, periods=(2.0, 16.0), scale_embedding=False,
                  window=16, centre=False)
    about = [dict(mpp=mpp * 2**i, tile_px=100, side=100.0 * 2**i, pitch=100.0 * 2**i, width=8, count=16, **stated)
             for i in range(scales)]
    header = {"config": config, "about": about, "slides": slides, "mean": torch.zeros(scales, 8),
              "std": torch.ones(scales, 8)}
    net = context.random_encoder(header, 1)
    torch.save({"teacher": net.state_dict(), **header, "step": 1}, world / "encoder.pth")
    sha256 = hashlib.sha256((world / "encoder.pth").read_bytes()).hexdigest()
    embedded(world / "context", sha256, slides)
    return str(world / "encoder.pth")


@pytest.mark.parametrize("scales", [1, 2])
def test_controls_are_of_the_untrained_net_and_of_shuffled_places(world, seen, monkeypatch, scales):
    """They are made as the stored context was, with its --hide, of all scales; the probe of the shuffled is not."""
    calls = []

    def embed(net, header, features, centres, device, hide):
        calls.append((net, header["config"].get("shuffle", False), list(features), list(centres), hide))
        return np.full((len(features[0]), 8), len(calls) % 2, np.float32)
    monkeypatch.setattr(eval_slides, "embed_slide", embed)
    path = encoder(world, ["P77-0"], scales=scales)
    (world / "coarse").mkdir()
    for name in NAMES:
        edit(world / f"context/{name}.npz", hide=3)
        write(world / f"coarse/{name}.npz", np.ones((9, 8)), np.indices((3, 3)).reshape(2, 9).T * 400, mpp=2.0,
              patch_size_level0=400)
    folders = ",".join([str(world / "features"), str(world / "coarse")][:scales])
    rows, _ = score(world, encoder=path, features=folders)
    names = [f"{start}raw, {kind}context" for kind in ("", "untrained ", "shuffled ") for start in ("", "stats: ")]
    assert list(rows) == ["mean", "max", "moments", "stats: raw", *names] and len(calls) == 32
    net, header = context.load_encoder(path)
    untrained = context.random_encoder(header, eval_slides.SEED)
    for i, (used, shuffle, features, centres, hide) in enumerate(calls):
        same = net if i % 2 else untrained
        assert all(torch.equal(a, b) for a, b in zip(used.state_dict().values(), same.state_dict().values()))
        assert shuffle == bool(i % 2) and hide == 3
        assert [own.shape for own in features] == [(30, 8), (9, 8)][:scales] and len(centres) == scales
    probed = dict(zip(rows, seen[0.5]))
    for start, width in (("", 8), ("stats: ", 24)):
        trained, tested = probed[f"{start}raw, shuffled context"]
        assert trained is probed[f"{start}raw, context"][0] and (tested[:, width:] == 0).all()
        untrained, tested = probed[f"{start}raw, untrained context"]
        assert untrained is tested
    assert len(seen[None]) == len(rows)
    if scales == 2:
        with one_line("features of 1 scales, and the encoder reads 2"):
            monkeypatch.setattr(eval_slides, "embed_slide", places.embed_slide)
            score(world, encoder=path)


def test_an_encoder_reads_what_it_was_trained_on(world, seen):
    score(world, encoder=encoder(world, []))
    with one_line(r"P00-0: features of another encoder, norm or scale: mpp is 1.0, not 4.0"):
        score(world, encoder=encoder(world, [], mpp=4.0))
    with one_line("with which --context was made, and that folder"):
        score(world, encoder=encoder(world, []), context="")
    with one_line("with which --context was made"):
        embedded(world / "context", "another")
        score(world, encoder=str(world / "encoder.pth"))
    (world / "context/keys.json").unlink()
    with one_line("does not say which slides"):
        score(world)


def test_an_encoder_trained_on_shuffled_places_is_a_row(world, seen):
    """`retrained` is a folder like --context, made in the same way."""
    embedded(world / "retrained", "y")
    for name in NAMES:
        with np.load(world / f"context/{name}.npz") as f:
            np.savez(world / f"retrained/{name}.npz", **dict(f) | {"context": np.zeros((30, 8), np.float16)})
    rows, _ = score(world)
    probed = dict(zip(rows, seen[0.5]))
    trained, tested = probed["raw, retrained context"]
    assert trained is tested and (trained[:, 8:] == 0).all() and (probed["raw, context"][0][:, 8:] != 0).any()
    edit(world / "retrained/P00-0.npz", hide=2)
    with one_line(r"P00-0: --context and --retrained were made with other --hide"):
        score(world)
    embedded(world / "retrained", "x")
    with one_line("by the encoder of --context"):
        score(world)
    embedded(world / "retrained", "y", ["P03-99"])
    with one_line("trained on slides of 1 of these patients, such as P03"):
        score(world)


def test_a_seen_patient_is_refused(world, seen):
    embedded(world / "context", "x", ["P03-99"])  # another slide of a patient that is tested
    with one_line("trained on slides of 1 of these patients, such as P03; train it without them"):
        score(world)
    embedded(world / "context", "x", ["gone"])  # by the csv, a slide of P03 whose features are not there
    with open(world / "labels.csv", "a") as f:
        f.write("gone,P03,b\n")
    with one_line("trained on slides of 1 of these patients, such as P03"):
        score(world, patient="the csv alone knows them")
    embedded(world / "context", "x", ["P03-6", "P03-7", "P04-8"])
    with one_line("trained on slides of 2 of these patients, such as P03"):
        score(world, patient="the csv alone knows them")


def test_context_of_other_features_is_refused_and_a_slide_without_is_left_out(world, seen, capsys):
    (world / "context/P06-12.npz").unlink()
    _, found = score(world)
    assert "left out: P06-12: not in every folder" in capsys.readouterr().out and "8 of 8" in found["protocol"]
    with np.load(world / "context/P05-10.npz") as f:
        edit(world / "context/P05-10.npz", features=f["features"] + np.float16(1))
    with one_line("P05-10.*other features"):
        score(world)
    with np.load(world / "features/P05-10.npz") as f:
        edit(world / "context/P05-10.npz", features=f["features"], coords=f["coords"][::-1])
    with one_line("P05-10.*other features or places"):
        score(world)


# bad input

LABELLED = [(name, name[:3], "ab"[i // 2 % 2]) for i, name in enumerate(NAMES)]
SURVIVAL = [(name, name[:3], 1 + i // 2, i // 2 % 2) for i, name in enumerate(NAMES)]
PLACED = [(name, name[:3], 100, 100, "ab"[i % 2]) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize("columns, rows, message", [
    ("label", [(n, p, "a") for n, p, _ in LABELLED], "a in column label; 2 or more"),
    ("label", [*LABELLED, LABELLED[0]], "line 18: P00-0 is listed twice"),
    ("label", [(NAMES[0], "", "a"), *LABELLED[1:]], "line 2: no patient"),
    ("label", [*LABELLED[:3], (NAMES[3], "P01", ""), *LABELLED[4:]], "line 5: no label"),
    ("label", [(n, p, "b" if p == "P01" else "a") for n, p, _ in LABELLED],
     "groups (patients) of class b: 1; 2 are needed, to train and test"),
    ("label", [(f"{n}.svs", p, y) for n, p, y in LABELLED], "none of its slides is left to score; its names must be"),
    ("grade", LABELLED, "no column label"),
    ("label,fold", [(*row, i % 2) for i, row in enumerate(LABELLED)], "patient P00 is in folds 0 and 1"),
    ("label,fold", [(*row, 0) for row in LABELLED], "give at least 2"),
    ("label,fold", [(*row, i // 2 % 2) for i, row in enumerate(LABELLED)], "nothing of class"),
    ("label,fold", [(*row, 0.5) for row in LABELLED], "line 2: fold is '0.5', not a whole number"),
    ("time,event", [(n, p, "1.2.3", e) for n, p, _, e in SURVIVAL], "line 2: time is '1.2.3', not a number"),
    ("time,event", [(n, p, -t, e) for n, p, t, e in SURVIVAL], "line 2: time is '-1', not a number above 0"),
    ("time,event", [(n, p, t, "yes" if e else "no") for n, p, t, e in SURVIVAL], "event must be 0 (not seen) or 1"),
    ("x,y,label", [(n, p, 5000, 50, label) for n, p, label in LABELLED], "P00-0: 1 places are more than a tile from"),
    *[("x,y,label", [PLACED[0], (*PLACED[1][:3], value, "b"), *PLACED[2:]], f"line 3: y is '{value}', not a number")
      for value in ("", "nan", "1.2.3", "1e", "inf")]])
def test_bad_tables_are_one_line(world, seen, columns, rows, message):
    table(world / "bad.csv", ("slide", "patient", *columns.split(",")), rows)
    with one_line(re.escape(message)):
        score(world, **{"places" if columns[0] == "x" else "labels": world / "bad.csv"})


def test_what_cannot_be_scored_is_left_out_by_name(world, seen, capsys):
    """NaN, another width, no place; a label without a slide and the reverse. A slide with one place is scored."""
    for number, (count, width, value) in enumerate([(30, 8, np.nan), (30, 4, 0), (0, 8, 0), (1, 8, 0)]):
        path = str(world / f"features/P0{number}-{2 * number}.npz")
        write(path, np.full((count, width), value), np.stack([np.arange(count), np.arange(count)], 1) * 200)
    table(world / "labels.csv", ("slide", "patient", "label"), [*LABELLED[:-1], ("elsewhere", "P99", "a")])
    _, found = score(world, context="")
    assert "cases: 8 of 8 patients" in found["protocol"]
    out = capsys.readouterr().out
    lines = sorted(line for line in out.splitlines() if line.startswith("left out: "))
    assert [line.split(": ")[1] for line in lines] == ["P00-0", "P01-2", "P02-4"]
    assert "1 slides have no features, such as elsewhere: left out" in out
    assert "1 slides with features have no label, such as P07-15: left out" in out


def test_a_class_of_few_patients_is_scored_without_choosing_inside(world, capsys):
    """Two patients of class b: one to train on, so nothing can be chosen. The rest goes on."""
    rows = [(n, p, "ab"[p in ("P01", "P03")]) for n, p, _ in LABELLED]
    table(world / "labels.csv", ("slide", "patient", "label"), rows)
    rows, _ = score(world, mil=True, context="")
    assert rows["attention MIL"]["balanced"] > 0 and rows["mean"]["tuned"] == rows["mean"]["balanced"]
    assert "too few patients to choose by: C is 0.5" in capsys.readouterr().out
    eval_slides.say_caveats(found_of([0] * 5 + [1] * 3, [0, 1] * 4))  # two of class 1 to train on, or one
    assert "too few patients to choose by" in capsys.readouterr().out


def test_the_command_ends_with_one_json_object_whatever_stops_it(world, seen, capsys, monkeypatch):
    config = keys_of(world, context="", mil=True)
    eval_slides.main(config)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row"] for row in found["rows"]] == ["mean", "max", "moments", "stats: raw", "attention MIL"]
    for changes, message in (({"labels": str(world / "none.csv")}, "no such csv"), ({"repeats": 0}, "1 or more"),
                             ({"places": "p.csv"}, "give either --labels"), ({"image_dir": "x"}, "give one of them"),
                             ({"write": "no/such.csv"}, "No such file.*no/such.csv"),
                             ({"patient": "("}, "no regular expression")):
        with one_line(f"^eval_slides: .*{message}"):
            eval_slides.main({**config, **changes})
    assert "{" not in capsys.readouterr().out
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    monkeypatch.setattr(eval_slides, "mil_probe", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    with one_line("^eval_slides: stopped$"):
        eval_slides.main(config)
    signal.signal(signal.SIGTERM, before)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row"] for row in found["rows"]] == ["mean", "max", "moments", "stats: raw"]


# BACH

class Mean(torch.nn.Module):
    """A stand-in for a tile encoder of width 8."""

    def forward(self, x):
        return {"cls": x.mean((1, 2, 3))[:, None] * torch.linspace(1, 2, 8), "patches": x.flatten(2).mT}


HALF = (0.5,) * 3, (0.5,) * 3


def test_a_bach_image_is_a_small_slide(world):
    """Its feature is the mean of [tile, context] over its tiles, and neighbours matter: not the tiles' mean alone."""
    path = encoder(world, [], mpp=10.0)
    view = eval_bach.View(px=100, mpp=10.0, context=path)
    image = (torch.rand(3, 200, 300) * 255).to(torch.uint8)
    swapped = torch.cat([image[:, :, 200:], image[:, :, 100:200], image[:, :, :100]], 2)  # tiles change places
    pool = eval_bach.context_pool(view, path, HALF)
    features = eval_bach.embed(Mean(), [image, swapped], *HALF, "cpu", view, pool=pool)
    plain = eval_bach.embed(Mean(), [image, swapped], *HALF, "cpu", view._replace(context=""))
    assert features.shape == (2, 16)
    torch.testing.assert_close(features[:, :8], plain)
    net, header = context.load_encoder(path)
    of_tiles = eval_bach.embed(Mean(), eval_bach.tiles(image, 100), *HALF, "cpu", view._replace(context=""))
    centres = np.array([[x, y] for y in (500, 1500) for x in (500, 1500, 2500)], np.float32)
    own = places.embed_slide(net, header, of_tiles.numpy(), centres)
    torch.testing.assert_close(features[0, 8:], torch.from_numpy(own.mean(0)))
    assert "context of" in str(view)


@pytest.mark.parametrize("stated, changes, norm, message", [
    ({}, {}, HALF, ""),
    (dict(norm=[[0.5] * 3] * 2), {}, HALF, ""),
    (dict(norm=[[0.5] * 3] * 2), {}, ((0.48, 0.45, 0.4), (0.22, 0.22, 0.22)), "norm is .*0.48.*, not .*0.5"),
    (dict(norm="by hand"), {}, HALF, "norm is .*, not by hand"),
    (dict(weights_sha256="0123"), {}, HALF, "weights_sha256 is .*, not 0123"),
    ({}, dict(mpp=2.0), HALF, "mpp is 2.0, not 1.0"),
    ({}, dict(px=200), HALF, "tile_px is 200, not 100"),
    (dict(scales=2), {}, HALF, "reads 2 scales")])
def test_an_encoder_of_other_tiles_is_refused_for_bach(world, stated, changes, norm, message):
    path = encoder(world, [], **stated)
    view = eval_bach.View(px=100, mpp=1.0, context=path)._replace(**changes)
    if not message:
        assert eval_bach.context_pool(view, path, norm)
        return
    with one_line(f"encoder.pth: .*{message}"):
        eval_bach.context_pool(view, path, norm)
    keys = dict(views="context", context="none.pth", input_px=10, mpp=1.0, concat=False)
    with one_line("needs a slide encoder's file"):
        eval_bach.view_of(keys)


@pytest.mark.parametrize("norm, used", [("half", HALF), (None, model.NORMS["imagenet"])])
def test_the_norm_that_is_checked_is_the_one_that_is_used(tmp_path, monkeypatch, norm, used):
    path, calls = str(tmp_path / "7.pth"), []
    torch.save({"teacher": model.ViT(model.ARCHS["toy"]).state_dict(), "arch": "toy", "config": {}}, path)
    (tmp_path / "encoder.pth").touch()
    monkeypatch.setattr(eval_bach, "context_pool", lambda *a: calls.append(a[1:]))
    monkeypatch.setattr(eval_bach, "embed", lambda backbone, pixels, mean, std, *a, **k: calls.append((mean, std)))
    config = dict(views="context", context=str(tmp_path / "encoder.pth"), input_px=28, mpp=1.0, concat=False, arch="",
                  device="cpu")
    eval_bach.score_file(path, norm, config, None, lambda features, view: {})
    assert calls == [(path, used), used]


def test_patients_that_nothing_tells_are_said(world, seen, capsys):
    """The fault: an encoder trained on slides of tested patients was scored in silence where the csv lists none of
    its slides."""
    score(world, encoder=encoder(world, ["other-1", "P77-0"]))
    out = capsys.readouterr().out
    assert "patients of 1 slides that the encoder was trained on are unknown, such as other-1: " in out
    assert "only 8 patients: the intervals are rough guesses" in out
