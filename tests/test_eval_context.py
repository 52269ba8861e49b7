"""eval_slides.py on features: labelled slides and labelled places, by patient."""
import csv
import hashlib
import json
import re
import sys

import numpy as np
import pytest
import torch

import context
import eval_bach
import eval_slides
import places

pytest.importorskip("sklearn")

CONFIG = dict(write="", features="", context="", encoder="", labels="", places="",
              label="label", repeats=1, allow_seen=False,
              patient=r"P\d\d", device="cpu")
SIDE = 100.0  # um


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two settings of attention MIL that train for seconds, and few draws of the bootstrap."""
    quick = dict(width=8, gated=True, dropout=0.0, lr=0.02, weight_decay=0.0, batch=4, epochs=3)
    monkeypatch.setattr(eval_slides, "MIL", {"quick": quick, "plain": quick | dict(gated=False, epochs=1)})
    monkeypatch.setattr(eval_slides, "DRAWS", 200)
    monkeypatch.setattr(eval_slides, "FOLDS", 3)
    monkeypatch.setattr(eval_slides, "CS", (0.1, 1.0))


def write(path, features, coords, **more):
    about = dict(mpp=1.0, tile_px=100, patch_size_level0=100, overlap=0, level0_mpp=1.0)
    np.savez(path, features=features.astype(np.float16), coords=coords, **about, **more)


def table(path, header, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.fixture
def world(tmp_path):
    """
    24 slides of 12 patients, 5 x 6 places, in which class b has a shifted mean in its features. In context, the place's
    row of the grid is known, which features do not tell.
    """
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(5), np.arange(6))
    coords = np.stack([x, y], -1).reshape(-1, 2) * 100
    for folder in ("features", "context"):
        (tmp_path / folder).mkdir()
    rows, places = [], []
    for i in range(24):
        name, patient, label = f"P{i // 2:02d}-{i}", f"P{i // 2:02d}", "ab"[i // 2 % 2]
        features = rng.normal(0, 1, (30, 8)) + (label == "b") * 0.8
        own = np.concatenate([rng.normal(0, 0.1, (30, 7)), coords[:, 1:] / 100], 1)
        write(tmp_path / f"features/{name}.npz", features, coords)
        write(tmp_path / f"context/{name}.npz", features, coords, context=own.astype(np.float16))
        rows.append((name, patient, label))
        places += [(name, patient, x + 50, y + 50, "top" if y < 300 else "bottom") for x, y in coords.tolist()]
    (tmp_path / "context/keys.json").write_text(json.dumps({"encoder": "x", "trained_on": []}))
    table(tmp_path / "labels.csv", ("slide", "patient", "label"), rows)
    table(tmp_path / "places.csv", ("slide", "patient", "x", "y", "label"), places)
    return tmp_path


def score(world, **changes):
    folders = {key: str(world / key) for key in ("features", "context")}
    changes = {key: str(value) if key in ("labels", "places") and value else value for key, value in changes.items()}
    found = eval_slides.score_features({**CONFIG, **folders, **changes})
    return {row["row"]: row for row in found["rows"]}, found


def test_slides_are_told_by_their_mean_and_rows_are_compared_with_it(world, capsys):
    rows, found = score(world, labels=world / "labels.csv")
    assert list(rows) == ["mean", "max", "moments", "raw, context", "attention MIL", "attention of context on raw"]
    assert rows["mean"]["balanced"] > 0.9 and rows["mean"]["auroc"] > 0.95 and rows["mean"]["difference"] == 0
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows.values())
    assert "24 of 12 patients, 1 x 3 folds" in found["protocol"]
    assert re.search(r"raw, context +\d\.\d+ .*none", capsys.readouterr().out)


def test_places_are_told_by_context_alone(world):
    """Rows of the grid are noise to a place's own feature and known in its context; the interval excludes 0."""
    rows, _ = score(world, places=world / "places.csv", write=str(world / "scores.csv"))
    lines = list(csv.DictReader(open(world / "scores.csv")))
    assert len(lines) == 720 and {"slide", "x", "y", "top", "bottom"} <= set(lines[0])
    assert all((float(line["top"]) > 0.5) == (line["label"] == "top") for line in lines)
    assert list(rows) == ["raw", "raw, 3x3 mean", "raw, context"]
    assert rows["raw"]["balanced"] < 0.62 and rows["raw, context"]["balanced"] > 0.95
    assert rows["raw, context"]["low"] > 0.2


def test_folds_keep_patients_whole_and_each_sample_is_predicted_by_others(world):
    files = eval_slides.files_of(str(world / "features"))
    found = eval_slides.find_labels({**CONFIG, "labels": str(world / "labels.csv"), "repeats": 2}, files)
    for folds in found.folds:
        assert all(len(folds[found.groups == g].unique()) == 1 for g in range(12))
    assert (found.folds[0] != found.folds[1]).any(), "repeats draw other folds"
    seen = []

    def fit(train, test):
        seen.append((set(train.tolist()), set(test.tolist())))
        return torch.ones(len(test), 2)

    predicted = eval_slides.out_of_fold(found, fit)
    assert (predicted == 1).all() and all(not train & test for train, test in seen)


def test_the_bootstrap_draws_patients_and_is_paired(world):
    files = eval_slides.files_of(str(world / "features"))
    found = eval_slides.find_labels({**CONFIG, "labels": str(world / "labels.csv")}, files)
    right = torch.nn.functional.one_hot(found.labels).float()[None]
    wrong = right.clone()
    wrong[0, :2] = wrong[0, :2].flip(1)  # one patient of class a, both slides
    row = eval_slides.compare("x", wrong, right, found)
    assert row["balanced"] == pytest.approx(1 - 2 / 12 / 2) and row["difference"] == pytest.approx(-1 / 12)
    assert row["high"] == 0 and row["low"] < -0.1  # some draws are without that patient
    same = eval_slides.compare("x", wrong, wrong, found)
    assert same["low"] == same["high"] == 0, "paired: equal rows differ in no draw"
    weights = torch.ones(1, 12).double()
    weights[0, 0] = 0
    assert eval_slides.resampled(wrong, found, weights).item() == 1, "without the patient nothing is wrong"


def test_neighbourhoods_are_three_by_three():
    x, y = np.meshgrid(np.arange(4), np.arange(4))
    centres = np.stack([x, y], -1).reshape(-1, 2) * SIDE
    raw = np.arange(16.0, dtype=np.float32)[:, None]
    near = eval_slides.neighbours(raw, centres)
    grid = np.arange(16).reshape(4, 4)
    assert near[0] == grid[:2, :2].mean() and near[5] == grid[:3, :3].mean()
    assert (eval_slides.neighbours(raw[:1], centres[:1]) == raw[:1]).all()


def test_attention_reads_keys_and_pools_values():
    torch.manual_seed(0)
    net = eval_slides.AttentionMIL(2, 3, 2, 8, True, 0.0).eval()
    keys, values = torch.randn(5, 2), torch.randn(5, 3)
    order = torch.randperm(5)
    torch.testing.assert_close(net(keys, values), net(keys[order], values[order]))
    assert not torch.allclose(net(keys, values), net(keys, values[order]))


def encoder(world, slides, mpp=1.0):
    config = dict(width=8, heads=1, depth=1, registers=1, layerscale=1.0, periods=(2.0, 16.0), scale_embedding=False,
                  window=16, centre=False)
    about = dict(mpp=mpp, tile_px=100, side=100.0, pitch=100.0, width=8, count=16)
    header = {"config": config, "about": [about], "slides": slides, "mean": torch.zeros(1, 8), "std": torch.ones(1, 8)}
    net = context.random_encoder(header, 1)
    torch.save({"teacher": net.state_dict(), **header, "step": 1}, world / "encoder.pth")
    sha256 = hashlib.sha256((world / "encoder.pth").read_bytes()).hexdigest()
    (world / "context/keys.json").write_text(json.dumps({"encoder": sha256, "trained_on": slides}))
    return str(world / "encoder.pth")


def test_controls_are_rows_and_a_seen_patient_is_refused(world):
    keys = dict(labels=world / "labels.csv")
    rows, _ = score(world, **keys, encoder=encoder(world, ["P77-0"]))
    assert {"raw, untrained context", "raw, shuffled context"} <= set(rows)
    leak = encoder(world, ["P03-99"])  # another slide of a patient that is tested
    with pytest.raises(ValueError, match="trained on slides of 1 of these patients, such as P03.*--allow_seen"):
        score(world, **keys, encoder=leak)
    with pytest.raises(ValueError, match="trained on slides of 1"):
        score(world, **keys)  # without --encoder, too
    rows, found = score(world, **keys, encoder=leak, allow_seen=True)
    assert "P03" in found["seen"] and all("P03" in row["seen"] for row in rows.values())
    (world / "context/keys.json").write_text(json.dumps({"encoder": "another", "trained_on": []}))
    with pytest.raises(ValueError, match="with which --context was made"):
        score(world, **keys, encoder=leak)
    (world / "context/keys.json").unlink()
    with pytest.raises(ValueError, match="does not say which slides"):
        score(world, **keys)


def test_bad_tables_are_one_line(world):
    names = [f"P{i // 2:02d}-{i}" for i in range(24)]
    path, header = world / "bad.csv", ("slide", "patient", "label")
    good = [(name, name[:3], "ab"[i // 2 % 2]) for i, name in enumerate(names)]
    for rows, message in [
            ([(n, p, "a") for n, p, _ in good], "a in column label; 2 or more"),
            ([*good, good[0]], "P00-0 is listed twice"),
            ([(good[0][0], "", "a"), *good[1:]], "line 2: patient ''"),
            ([(n, p, "b" if p == "P01" else "a") for n, p, _ in good], "one patient only")]:
        table(path, header, rows)
        with pytest.raises(ValueError, match=re.escape(message)):
            score(world, labels=path)
    for fold, message in [(lambda i: i % 2, "patient P00 is in folds 0 and 1"), (lambda i: 0, "give at least 2"),
                          (lambda i: i // 2 % 2, "nothing of class")]:
        table(path, (*header, "fold"), [(*row, fold(i)) for i, row in enumerate(good)])
        with pytest.raises(ValueError, match=message):
            score(world, labels=path)
    table(path, ("slide", "patient", "x", "y", "label"), [(n, p, 5000, 50, label) for n, p, label in good])
    with pytest.raises(ValueError, match="1 places are more than a tile from any feature"):
        score(world, places=path)
    table(path, ("slide", "patient"), [row[:2] for row in good])
    with pytest.raises(ValueError, match="no column label"):
        score(world, labels=path)


def test_a_label_without_a_slide_and_a_slide_without_a_label_are_said(world, capsys):
    lines = (world / "labels.csv").read_text().splitlines()
    (world / "labels.csv").write_text("\n".join([*lines[:-1], "elsewhere,P99,a"]) + "\n")
    score(world, labels=world / "labels.csv")
    out = capsys.readouterr().out
    assert "1 slides have no features, such as elsewhere: left out" in out
    assert "1 slides with features have no label, such as P11-23: left out" in out


def test_context_of_other_features_is_refused(world):
    name = "P05-10.npz"
    with np.load(world / "context" / name) as f:
        arrays = dict(f)
    arrays["features"] = arrays["features"] + np.float16(1)
    np.savez(world / "context" / name, **arrays)
    with pytest.raises(ValueError, match="P05-10.*other features"):
        score(world, labels=world / "labels.csv")
    (world / "context" / name).unlink()
    with pytest.raises(ValueError, match="P05-10: no context"):
        score(world, labels=world / "labels.csv")


def test_survival_is_scored_by_the_c_index(world):
    pytest.importorskip("sksurv")
    rng = np.random.default_rng(0)
    with open(world / "labels.csv") as f:
        rows = [(row["slide"], row["patient"], rng.exponential(2 if row["label"] == "b" else 20), int(i > 7))
                for i, row in enumerate(csv.DictReader(f))]
    table(world / "survival.csv", ("slide", "patient", "time", "event"), rows)
    rows, found = score(world, labels=world / "survival.csv")
    assert rows["mean"]["balanced"] > 0.6 and "auroc" not in rows["mean"] and "Cox" in found["protocol"]


def found_of(labels, time, folds):
    """Labels of patients with one slide each."""
    n = len(labels)
    return eval_slides.Labels([f"s{i}" for i in range(n)], np.zeros((n, 0)), torch.tensor(labels), ["0", "1"],
                              torch.arange(n), [f"p{i}" for i in range(n)], torch.tensor([folds]), {}, np.array(time))


def test_scores_compare_samples_of_one_fold():
    """A fold's fit may be off by a constant: over all folds together the order would be wrong."""
    found = found_of([0, 1, 0, 1], [4.0, 1.0, 4.0, 1.0], [0, 0, 1, 1])
    risk = torch.tensor([0.1, 0.2, 0.7, 0.8])
    predicted = torch.stack([1 - risk, risk], 1)[None]
    assert eval_slides.area_under_curve(predicted, found) == 1
    assert eval_slides.concordance(predicted, found, torch.ones(1, 4).double()).tolist() == [1.0]
    one_class = found_of([0, 1, 1, 1], [4.0, 1.0, 4.0, 1.0], [0, 0, 1, 1])  # the second fold cannot tell
    assert eval_slides.area_under_curve(predicted, one_class) == 1


def test_the_c_index_by_hand():
    """Ties in risk count half; of two at one time, the one whose event was seen is the earlier."""
    found = found_of([1, 1, 0, 0], [1.0, 2.0, 2.0, 3.0], [0, 0, 0, 0])
    predicted = torch.tensor([[0.0, 0.9], [0.0, 0.3], [0.0, 0.5], [0.0, 0.3]])[None]
    weights = torch.tensor([[1, 1, 1, 1], [2, 1, 0, 1]]).double()
    # pairs: 0 before 1, 2, 3, right; 1 before 2, wrong; 1 before 3, a tie. Drawn twice, a pair counts twice.
    assert np.allclose(eval_slides.concordance(predicted, found, weights), [3.5 / 5, 4.5 / 5])


def test_controls_are_of_the_untrained_net_and_of_shuffled_places(monkeypatch):
    calls = []
    monkeypatch.setattr(eval_slides, "embed_slide", lambda *args, hide: calls.append((*args, hide)) or args[2])
    raw, centres = np.zeros((9, 2)), np.arange(18.0).reshape(9, 2)
    eval_slides.contexts_of("s", None, ("trained", "untrained", {}, "cpu"), raw, centres, 3)
    (first, _, _, at, _, hide), (second, _, _, moved, _, _) = calls
    assert (first, second, hide) == ("untrained", "trained", 3) and np.array_equal(at, centres)
    assert not np.array_equal(moved, centres) and sorted(moved.tolist()) == centres.tolist()


def test_a_patient_is_known_by_the_csv_too(world):
    """The encoder was trained on another slide of a tested patient, one whose features are not there."""
    (world / "context/keys.json").write_text(json.dumps({"encoder": "x", "trained_on": ["gone"]}))
    with open(world / "labels.csv", "a") as f:
        f.write("gone,P03,b\n")
    with pytest.raises(ValueError, match="trained on slides of 1 of these patients, such as P03"):
        score(world, labels=world / "labels.csv", patient="the csv alone knows them")
    (world / "context/keys.json").write_text(json.dumps({"encoder": "x", "trained_on": ["P03-6", "P03-7", "P04-8"]}))
    with pytest.raises(ValueError, match="trained on slides of 2 of these patients, such as P03"):
        score(world, labels=world / "labels.csv", patient="the csv alone knows them")


def test_slides_that_cannot_be_scored_are_left_out_by_name(world, capsys):
    """NaN, another width, no place: one line each. A slide with one place is scored."""
    for number, (count, width, value) in enumerate([(30, 8, np.nan), (30, 4, 0), (0, 8, 0), (1, 8, 0)]):
        path = str(world / f"features/P0{number}-{2 * number}.npz")
        write(path, np.full((count, width), value), np.stack([np.arange(count), np.arange(count)], 1) * 100)
    rows, found = score(world, labels=world / "labels.csv", context="")
    assert "21 of 12 patients" in found["protocol"] and "attention MIL" in rows
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in sorted(lines)] == ["P00-0", "P01-2", "P02-4"]


@pytest.mark.parametrize("column, value", [("x", ""), ("y", "nan"), ("fold", "a")])
def test_a_number_that_is_none_is_named(world, column, value):
    with open(world / "places.csv") as f:
        rows = [row | {"fold": "0"} for row in csv.DictReader(f)]
    rows[4][column] = value
    table(world / "places.csv", list(rows[0]), [row.values() for row in rows])
    with pytest.raises(ValueError, match=f"places.csv, line 6: {column} is '{value}', not a number"):
        score(world, places=world / "places.csv")


def test_the_command_ends_with_one_json_object(world, capsys, monkeypatch):
    config = {**CONFIG, "features": str(world / "features"), "labels": str(world / "labels.csv"), "repeats": 1}
    eval_slides.main(config)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row"] for row in found["rows"]] == ["mean", "max", "moments", "attention MIL"]
    with pytest.raises(SystemExit, match="^eval_slides: .*no such|not a readable csv"):
        eval_slides.main({**config, "labels": str(world / "none.csv")})
    assert sys.modules["eval_slides"]


class Mean(torch.nn.Module):
    """A stand-in for a tile encoder of width 8."""

    def forward(self, x):
        return {"cls": x.mean((1, 2, 3))[:, None] * torch.linspace(1, 2, 8), "patches": x.flatten(2).mT}


def test_a_bach_image_is_a_small_slide(world):
    """Its feature is the mean of [tile, context] over its tiles, and neighbours matter: not the tiles' mean alone."""
    path = encoder(world, [], mpp=10.0)
    view = eval_bach.View(px=10, mpp=10.0, context=path)
    image = (torch.rand(3, 20, 30) * 255).to(torch.uint8)
    swapped = torch.cat([image[:, :, 20:], image[:, :, 10:20], image[:, :, :10]], 2)  # tiles change places
    pool = eval_bach.context_pool(view, path)
    features = eval_bach.embed(Mean(), [image, swapped], (0.5,) * 3, (0.5,) * 3, "cpu", view, pool=pool)
    plain = eval_bach.embed(Mean(), [image, swapped], (0.5,) * 3, (0.5,) * 3, "cpu", view._replace(context=""))
    assert features.shape == (2, 16)
    torch.testing.assert_close(features[:, :8], plain)
    net, header = context.load_encoder(path)
    tiles = eval_bach.tiles(image, 10)
    of_tiles = eval_bach.embed(Mean(), tiles, (0.5,) * 3, (0.5,) * 3, "cpu", view._replace(context=""))
    centres = np.array([[x, y] for y in (50, 150) for x in (50, 150, 250)], np.float32)
    own = places.embed_slide(net, header, of_tiles.numpy(), centres)
    torch.testing.assert_close(features[0, 8:], torch.from_numpy(own.mean(0)))
    assert "context of" in str(view)
    with pytest.raises(ValueError, match="trained on tiles of 100 um"):
        eval_bach.context_pool(view._replace(mpp=5.0), path)
    keys = dict(views="context", context="none.pth", input_px=10, mpp=1.0, concat=False)
    with pytest.raises(ValueError, match="needs a slide encoder's file"):
        eval_bach.view_of(keys)
