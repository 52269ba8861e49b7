import json
import os
import re
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_bach
import eval_slides
import model

ROOT = Path(__file__).parent.parent
OSTEOSARCOMA = ROOT.parent / "shared" / "data" / "osteosarcoma"
HALF = (0.5,) * 3, (0.5,) * 3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Heads of 200 steps at a larger rate, and few support sets: the protocol's own take seconds a fold."""
    monkeypatch.setattr(eval_slides, "MAX_STEPS", 200)
    monkeypatch.setattr(eval_bach, "LR", 0.01)
    monkeypatch.setattr(eval_slides, "SUPPORT_SETS", 50)


def keys(image_dir, **changes):
    return {"image_dir": str(image_dir), "groups": "", "views": "resize", "input_px": 16, "mpp": 0.5, "image_mpp": 0.0,
            "concat": False, "device": "cpu"} | changes


class Colours(torch.nn.Module):
    """A stand-in for a tile encoder: mean and deviation of the three channels."""

    def forward(self, x):
        return {"cls": torch.cat([x.mean((2, 3)), x.std((2, 3))], 1), "patches": x.flatten(2).transpose(1, 2)}


def groups_csv(path, rows, header="file,patient,fold"):
    path.write_text("\n".join([header, *rows]) + "\n")


ROWS = [f"{name}/{i}.png,P{i // 2},{1 + i // 2 % 3}" for name in ("green", "red") for i in range(12)]


@pytest.fixture
def tiles(tmp_path):
    """24 tiles of two classes told by colour, of six patients, in the published folds 1, 2, 3."""
    rng, root = np.random.default_rng(0), tmp_path / "tiles"
    for channel, name in ((1, "green"), (0, "red")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 120, (24, 20 + i, 3)) + 90 * (np.arange(3) == channel)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
        (root / name / "._0.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    groups_csv(root / "groups.csv", ROWS)
    return root


def data_of(labels, groups):
    """Folds of labels and groups, made."""
    pytest.importorskip("sklearn")
    return eval_slides.find_folds("x", labels, [str(i) for i in range(int(labels.max()) + 1)], groups, None)


# folds


def test_folds_keep_groups_whole_and_classes_in_proportion():
    g = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 60, (600,), generator=g)
    labels = (torch.rand(600, generator=g) < 0.25).long()
    folds = data_of(labels, groups)
    assert len(folds.unique()) == 5 and torch.equal(folds, data_of(labels, groups))
    assert all(len(folds[groups == i].unique()) == 1 for i in range(60))
    counts = torch.stack([folds[labels == c].bincount() for c in range(2)]).double()
    assert (counts / counts.mean(1, keepdim=True) - 1).abs().max() < 0.15
    for f, (train, selection, test) in enumerate(eval_slides.splits(folds)):
        assert sorted([*train.tolist(), *selection.tolist(), *test.tolist()]) == list(range(600))
        assert folds[test].unique().tolist() == [f] and folds[selection].unique().tolist() == [(f + 1) % 5]


def test_a_class_of_few_groups_lowers_the_number_of_folds(capsys):
    labels, groups = torch.tensor([0] * 10 + [1] * 8), torch.arange(18)
    groups[10:] = 10 + torch.arange(8) // 2  # four groups
    assert len(data_of(labels, groups).unique()) == 4
    assert capsys.readouterr().out == "x: 4 folds, not 5: class 1 has no more groups\n"


def leaky(groups_seen):
    """Features that are the group's and nothing else, under labels drawn for each group."""
    g = torch.Generator().manual_seed(1)
    groups = torch.arange(240) // 4
    labels = torch.randperm(60, generator=g)[groups] % 2
    features = 20 * F.one_hot(groups).float() + 0.1 * torch.randn(240, 60, generator=g)
    seen = groups if groups_seen else torch.arange(240)
    return features, labels, seen, data_of(labels, seen)


def test_no_image_is_scored_by_heads_neighbours_or_supports_that_saw_its_group(monkeypatch):
    features, labels, groups, folds = leaky(groups_seen=True)
    fit, knn, shot, calls = eval_bach.fit_heads, eval_bach.knn, eval_slides.simple_shot, []
    monkeypatch.setattr(eval_bach, "fit_heads", lambda *a: calls.append((a[2], a[3])) or fit(*a))
    monkeypatch.setattr(eval_bach, "knn", lambda *a: calls.append(a[2:4]) or knn(*a))
    monkeypatch.setattr(eval_slides, "simple_shot", lambda *a: calls.append(a[1]) or shot(*a))
    row = eval_slides.probe(features, labels, groups, folds)
    assert all(0.35 < row[k] < 0.65 for k in ("balanced", "knn", "shot16")), row  # chance
    for f in range(5):
        (train, selection), (outside, test) = calls[2 * f], calls[2 * f + 1]
        parts = [set(groups[i].tolist()) for i in (train, selection, test)]
        assert parts[0] | parts[1] == set(groups[outside].tolist()) and (folds[test] == f).all() and len(test) == 48
        assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    assert len(calls) == 10 + 5 * 3  # then the support sets, in chunks, fold after fold
    for i, support in enumerate(calls[10:]):
        assert not (folds[support] == i // 3).any() and support.shape[1:] == (2, 16)
        assert all((labels[support[:, c]] == c).all() for c in range(2))
        assert all(len(s.unique()) == 32 for s in support)
    leak = eval_slides.probe(*leaky(groups_seen=False))
    assert leak["balanced"] > 0.95 and leak["knn"] > 0.95  # what the groups are there for


def test_scores_are_of_pooled_predictions(monkeypatch):
    """Heads scripted to call every image of fold f by (label + (f == 0)) % 2 but head 4, which is always right."""
    labels, folds = torch.arange(12) % 2, torch.arange(12) // 4
    wrong = (labels + (folds == 0)) % 2
    monkeypatch.setattr(eval_bach, "fit_heads", lambda *a: (None, None, torch.stack([wrong] * 4 + [labels])))
    row = eval_slides.probe(torch.randn(12, 4), labels, torch.arange(12), folds)
    assert row["seeds"] == pytest.approx([2 / 3] * 4 + [1]) and row["balanced"] == pytest.approx(11 / 15)
    assert row["std"] == pytest.approx(np.std([2 / 3] * 4 + [1], ddof=1)) and row["folds"] == pytest.approx([0.2, 1, 1])
    assert row["recall"] == pytest.approx([11 / 15] * 2) and row["confusion"] == [[22, 8], [8, 22]]


# standard error


def test_standard_error_equals_a_straight_jackknife_and_the_binomial_without_groups():
    g = torch.Generator().manual_seed(0)
    labels, groups = torch.arange(300) % 3, torch.randint(0, 40, (300,), generator=g)
    predicted = torch.where(torch.rand(5, 300, generator=g) < 0.7, labels, (labels + 1) % 3)
    s = [eval_bach.balanced_accuracy(predicted[:, groups != i], labels[groups != i]).mean().item() for i in range(40)]
    expected = np.sqrt(39 / 40 * np.square(s - np.mean(s)).sum())
    assert eval_slides.standard_error(predicted, labels, groups) == pytest.approx(expected, rel=1e-4)
    one = predicted[:1]
    p = eval_bach.recalls(one, labels)[0].double()
    binomial = (p * (1 - p) / 100).sum().sqrt().item() / 3
    alone = eval_slides.standard_error(one, labels, torch.arange(300))
    assert alone == pytest.approx(binomial, rel=0.01)
    copies = one.repeat_interleave(4, 1), labels.repeat_interleave(4)  # four tiles a patient that agree are no news
    assert eval_slides.standard_error(*copies, torch.arange(1200) // 4) == pytest.approx(alone)
    assert eval_slides.standard_error(*copies, torch.arange(1200)) == pytest.approx(alone / 2, rel=0.01)


# 16-shot


def straight_shot(x, support, query):
    """One support set, one query at a time."""
    centre = torch.cat([x[s] for s in support]).mean(0)
    means = [F.normalize(x[s] - centre, dim=1).mean(0) for s in support]
    return [int(torch.stack([(F.normalize(q - centre, dim=0) - m).norm() for m in means]).argmin()) for q in query]


@pytest.mark.parametrize("dtype, offset", [(torch.float64, 0), (torch.float64, 3), (torch.float32, 0)])
def test_simple_shot_equals_a_straight_loop(dtype, offset):
    g = torch.Generator().manual_seed(0)
    x, query = (torch.randn(n, 6, generator=g, dtype=dtype) + offset for n in (30, 25))
    support = torch.stack([torch.randperm(30, generator=g)[:12].view(3, 4) for _ in range(7)])
    predicted = eval_slides.simple_shot(x, support, query)
    assert predicted.tolist() == [straight_shot(x, s, query) for s in support]
    assert 0.5 < F.one_hot(predicted).double().mean((0, 1)).mul(3).min()  # all classes occur


def test_few_shot_survives_a_common_direction_and_repeats_itself():
    g = torch.Generator().manual_seed(0)
    labels, folds = torch.arange(90) % 3, torch.arange(90) // 30
    x = torch.randn(90, 8, generator=g) + torch.eye(3, 8)[labels]
    state = torch.get_rng_state()
    near, far = (eval_slides.few_shot(x + shift, labels, folds, 5) for shift in (0, 1e4))
    assert near.shape == (50,) and near.mean() > 0.5 and near.std() > 0
    assert (near - far).abs().mean() < 0.002  # 0.02 if the digits are lost
    assert torch.equal(near, eval_slides.few_shot(x, labels, folds, 5)) and torch.equal(state, torch.get_rng_state())


# folders


def test_folder_is_read_in_order_and_scored(tiles, capsys):
    data = eval_slides.load(keys(tiles))
    names = sorted(str(i) for i in range(12))
    assert data.files == [f"{c}/{i}.png" for c in ("green", "red") for i in names] and data.classes == ["green", "red"]
    assert data.labels.tolist() == [0] * 12 + [1] * 12
    assert data.groups.tolist() == 2 * [int(i) // 2 for i in names]
    assert data.folds.tolist() == 2 * [int(i) // 2 % 3 for i in names]
    with Image.open(tiles / "red" / "3.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(data.pixels[data.files.index("red/3.png")], eval_bach.shrink(pixels, 16))
    row = eval_slides.score(keys(tiles), data, Colours(), *HALF)
    out = capsys.readouterr().out
    assert f"{tiles}: shot16 has 8 shots" in out and "no groups.csv" not in out
    assert row == json.loads(json.dumps(row)) == eval_slides.score(keys(tiles), data, Colours(), *HALF)
    assert (row["images"], row["classes"], row["groups"], row["shots"]) == (24, ["green", "red"], 6, 8)
    assert len(row["seeds"]) == 5 and len(row["folds"]) == 3 and len(row["recall"]) == 2
    assert {"image_dir", "std", "se_groups", "knn", "shot16_std", "effective_rank", "mean_cosine"} < row.keys()
    assert min(row["balanced"], row["knn"], row["shot16"]) > 0.9 and sum(map(sum, row["confusion"])) == 24 * 5


def test_a_folder_without_a_table_is_split_by_image_with_a_warning(tiles, capsys):
    pytest.importorskip("sklearn")
    (tiles / "groups.csv").rename(tiles.parent / "mine.csv")
    data = eval_slides.load(keys(tiles))
    assert data.groups.tolist() == list(range(24)) and len(data.folds.unique()) == 5
    assert "images of one patient may be on both sides" in capsys.readouterr().out
    bare = [line.rsplit(",", 1)[0] for line in ROWS]
    groups_csv(tiles.parent / "mine.csv", bare, "file,patient")
    data = eval_slides.load(keys(tiles, groups=str(tiles.parent / "mine.csv")))
    assert int(data.groups.max()) == 5 and all(len(data.folds[data.groups == i].unique()) == 1 for i in range(6))
    assert capsys.readouterr().out == ""


def test_a_bare_name_and_what_spreadsheets_write_are_understood(tiles):
    (tiles / "red" / "3.png").rename(tiles / "red" / "last.TIFF")
    rows = [line.replace("red/3.png", "last.TIFF").replace("green/", "green\\") for line in reversed(ROWS)]
    (tiles / "groups.csv").write_text("\ufefffile, patient, fold,note\r\n" + "\r\n".join(f"./{r}," for r in rows))
    data = eval_slides.load(keys(tiles))
    assert len(data.files) == 24 and "red/last.TIFF" in data.files and len(data.groups.unique()) == 6


def test_tiles_at_a_scale(tiles):
    c = keys(tiles, views="tiles", mpp=0.5, image_mpp=0.4, concat=True)
    data = eval_slides.load(c)
    assert data.pixels[0].shape == (3, 19, 16)
    row = eval_slides.score(c, data, Colours(), *HALF)
    assert "at 0.5 um/px from 0.4, 24 images" in row["protocol"]
    with pytest.raises(ValueError, match=r"views=tiles needs its images' um/px; give --image_mpp="):
        eval_slides.load(c | {"image_mpp": 0.0})


def test_whatever_changes_the_number_shows_in_the_protocol(tiles, monkeypatch):
    monkeypatch.setattr(eval_bach, "fit_heads", lambda x, *a: (None, None, torch.zeros(a[3], len(x), dtype=torch.long)))

    def protocol(**changes):
        c = keys(tiles, **changes)
        return eval_slides.score(c, eval_slides.load(c), Colours(), *HALF)["protocol"]
    seen = [protocol(), protocol(input_px=8), protocol(concat=True)]
    for module, name, value in ((eval_slides, "MAX_STEPS", 100), (eval_slides, "SEED", 1), (eval_slides, "RUNS", 2),
                                (eval_slides, "SHOTS", 3), (eval_slides, "SUPPORT_SETS", 7), (eval_bach, "LR", 1e-3),
                                (eval_bach, "WEIGHT_DECAY", 0.0), (eval_bach, "WARM_EPOCHS", 0),
                                (eval_bach, "WARM_FACTOR", 0.5), (eval_bach, "BATCH", 8), (eval_bach, "PATIENCE", 9),
                                (eval_bach, "NEIGHBOURS", 5), (eval_bach, "KNN_TEMP", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            seen.append(protocol())
    assert protocol() == seen[0]
    groups_csv(tiles / "groups.csv", [line[:-1] + str(int(line[-1]) % 3) for line in ROWS])  # folds in another order
    seen.append(protocol())
    (tiles / "red" / "0.png").rename(tiles / "red" / "zero.png")
    groups_csv(tiles / "groups.csv", [line.replace("red/0.png", "zero.png") for line in ROWS])
    seen.append(protocol())
    assert len(set(seen)) == len(seen), seen


def test_command(tiles, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    vit = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 7, "config": {}}, tmp_path / "7.pth")
    monkeypatch.setattr(sys, "argv", ["eval_bach.py", f"--weights={tmp_path}/7.pth", f"--image_dir={tiles}",
                                      "--input_px=28", "--device=cpu"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "eval_bach.py"), run_name="__main__")
    assert not e.value.code
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["image_dir"] == str(tiles) and row["step"] == 7 and 0 <= row["balanced"] <= 1


# bad input


def broken(tiles, what):
    """Damage the folder or its table; the remedy of each is in the test below."""
    red, rows, header = tiles / "red", list(ROWS), "file,patient,fold"
    if what == "empty":
        for file in red.glob("[0-9]*"):
            file.unlink()
    elif what == "single":
        red.rename(tiles.parent / "red")
    elif what == "unreadable":
        (red / "5.png").write_bytes(b"no picture")
    elif what == "header":
        header = "file;patient;fold"
    elif what == "latin":
        return (tiles / "groups.csv").write_bytes(b"file,patient\nred/0.png,M\xfcller\n")
    elif what == "few":
        header = "file,patient"
        rows = [f"green/{i}.png,P{i}" for i in range(12)] + [f"red/{i}.png,P{i % 2}" for i in range(12)]
    elif what == "untrained":
        rows = [f"green/{i}.png,P{i},{3 + i % 2}" for i in range(12)]
        rows += [f"red/{i}.png,Q{i % 3},{1 + i % 3 // 2}" for i in range(12)]
    else:
        rows = {"nowhere": [*rows, "red/99.png,P1,1"], "ambiguous": ["3.png,P1,1"], "unlisted": rows[2:],
                "twice": [*rows, rows[3]], "float": ["green/0.png,P0,1.5", *rows[1:]],
                "blank": ["green/0.png,P0,", *rows[1:]], "nobody": ["green/0.png,,1", *rows[1:]],
                "parted": ["green/0.png,P0,2", *rows[1:]], "gap": [line.replace(",3", ",5") for line in rows],
                "two": [line.replace(",3", ",2") for line in rows]}[what]
    groups_csv(tiles / "groups.csv", rows, header)


@pytest.mark.parametrize("what, message", [
    ("empty", "red: no .jpg .jpeg .png .tif .tiff directly in this class folder; fill it or move it away"),
    ("single", "green as class folders; put the images of each of two or more classes in a subfolder"),
    ("unreadable", "red/5.png: not a readable image"),
    ("header", "groups.csv: no column file and patient but ['file;patient;fold']; its first line must be file,patient"),
    ("latin", "groups.csv: not a readable csv in UTF-8"),
    ("nowhere", "groups.csv, line 26: no images in the class folders are called 'red/99.png'"),
    ("ambiguous", "groups.csv, line 2: 2 images in the class folders are called '3.png'; write class/name"),
    ("unlisted", "groups.csv: 2 of 24 images are not listed, such as green/0.png"),
    ("twice", "groups.csv, line 26: green/3.png is listed twice; delete one"),
    ("float", "groups.csv, line 2: patient 'P0', fold '1.5'; give each image a patient, and a whole number"),
    ("blank", "groups.csv, line 2: patient 'P0', fold ''; give"),
    ("nobody", "groups.csv, line 2: patient '', fold '1'; give each image a patient"),
    ("parted", "groups.csv: patient P0 is in folds 2 and 1; put all images of a patient in one fold"),
    ("gap", "groups.csv: the folds are [1, 2, 5]; number at least 3 (to train, select and test) without a gap"),
    ("two", "groups.csv: the folds are [1, 2]; number at least 3"),
    ("few", "groups (patients) of class red: 2; 3 are needed, to train, select and test; add patients, or merge"),
    ("untrained", "when fold 0 (from 0) tests and the next one selects, no image of class red is left to train on"),
])
def test_bad_folders_and_tables_are_refused_in_one_line(tiles, what, message):
    broken(tiles, what)
    with pytest.raises(ValueError) as e:
        eval_slides.load(keys(tiles))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_folders_and_tables_that_are_not_there(tmp_path, tiles):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        eval_slides.load(keys(tmp_path / "nowhere"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="flat: nothing as class folders"):
        eval_slides.load(keys(tmp_path / "flat"))
    with pytest.raises(ValueError, match="nowhere.csv: not a readable csv"):
        eval_slides.load(keys(tiles, groups=str(tmp_path / "nowhere.csv")))


def test_scikit_learn_is_needed_for_made_folds_alone(tiles, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    eval_slides.load(keys(tiles))
    (tiles / "groups.csv").unlink()
    with pytest.raises(ValueError, match="pip install scikit-learn, or give groups.csv a column fold"):
        eval_slides.load(keys(tiles))


def test_features_that_are_not_finite(tiles):
    data = eval_slides.load(keys(tiles))
    with pytest.raises(ValueError, match="features of 24 of 24 images are not finite"):
        eval_slides.score(keys(tiles), data, Colours(), (float("nan"),) * 3, HALF[1])


# real tiles


def osteosarcoma(root, two_classes, by_case):
    """Links to the 60 tiles in class folders, and their cases or blocks (a case is a patient and has many blocks)."""
    rows = []
    for path in sorted(OSTEOSARCOMA.glob("*.jpg")):
        name, rest = path.name.split("___")
        name = "Tumor" if two_classes and name != "Non-Tumor" else name
        group = re.match(r"Case-\d+|P\d+" if by_case else r".*?(?=-\d+-\d+_)", rest)[0]
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / path.name).symlink_to(path)
        rows.append(f"{path.name},{group}")
    groups_csv(root / "groups.csv", rows, "file,patient")
    return root


@pytest.mark.skipif(not OSTEOSARCOMA.is_dir(), reason="the osteosarcoma tiles are not here")
def test_osteosarcoma_tiles(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    if os.environ.get("FULL"):  # FULL=1 pytest -s -k osteosarcoma: the protocol's own lengths and its rows, 20 s
        monkeypatch.undo()
    torch.manual_seed(0)
    toy = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))
    cases = osteosarcoma(tmp_path / "three", two_classes=False, by_case=True)
    with pytest.raises(ValueError, match=r"groups \(patients\) of class Non-Viable-Tumor: 2; 3 are needed"):
        eval_slides.load(keys(cases))
    for folder, groups, folds in ((osteosarcoma(tmp_path / "two", True, True), 4, 3),
                                  (osteosarcoma(tmp_path / "blocks", False, False), 26, 5)):
        c = keys(folder, input_px=224)
        data = eval_slides.load(c)
        for backbone in (toy, Colours()):
            start = time.time()
            row = eval_slides.score(c, data, backbone, *model.NORMS["imagenet"])
            print({k: v for k, v in row.items() if k != "image_dir"}, f"{time.time() - start:.1f} s")
            assert (row["images"], row["groups"], len(row["folds"])) == (60, groups, folds)
            assert len(row["classes"]) == (2 if folds == 3 else 3) and 0 < row["balanced"] < 1
            assert 0.02 < row["se_groups"] < 0.3
