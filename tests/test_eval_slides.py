import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_line
from PIL import Image

import eval_bach
import eval_slides
import model

OSTEOSARCOMA = ROOT.parent / "shared" / "data" / "osteosarcoma"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Heads of 200 steps at a larger rate: the protocol's own take seconds a fold."""
    monkeypatch.setattr(eval_slides, "MAX_STEPS", 200)
    monkeypatch.setattr(eval_bach, "LR", 0.01)


def keys(image_dir, **changes):
    return {"image_dir": str(image_dir), "groups": "", "views": "resize", "input_px": 16, "mpp": 0.5, "image_mpp": 0.0,
            "concat": False, "device": "cpu"} | changes


class Colours(torch.nn.Module):
    """A stand-in for a tile encoder: mean and deviation of the three channels."""

    def forward(self, x):
        return {"cls": torch.cat([x.mean((2, 3)), x.std((2, 3))], 1), "patches": x.flatten(2).transpose(1, 2)}


def samples_of(config):
    return eval_slides.find_samples(config["image_dir"], config["groups"])


def row_of(config, backbone, mean=(0.5,) * 3, std=(0.5,) * 3):
    pixels, score = eval_slides.load(config)
    view = eval_bach.view_of(config)
    return score(eval_bach.embed(backbone, pixels, mean, std, "cpu", view), view)


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
    classes = [str(i) for i in range(int(labels.max()) + 1)]
    return eval_slides.find_folds("x", labels, classes, groups, None, parts=3)[0]


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


def test_no_image_is_scored_by_heads_or_neighbours_that_saw_its_group(monkeypatch):
    features, labels, groups, folds = leaky(groups_seen=True)
    fit, knn, calls = eval_bach.fit_heads, eval_bach.knn, []
    monkeypatch.setattr(eval_bach, "fit_heads", lambda *a: calls.append((a[2], a[3])) or fit(*a))
    monkeypatch.setattr(eval_bach, "knn", lambda *a: calls.append(a[2:4]) or knn(*a))
    row = eval_slides.probe(features, labels, groups, folds)
    assert all(0.35 < row[k] < 0.65 for k in ("balanced", "knn")) and len(calls) == 10, row  # chance
    for f in range(5):
        (train, selection), (outside, test) = calls[2 * f], calls[2 * f + 1]
        parts = [set(groups[i].tolist()) for i in (train, selection, test)]
        assert parts[0] | parts[1] == set(groups[outside].tolist()) and (folds[test] == f).all() and len(test) == 48
        assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
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


# folders

def test_folder_is_read_in_order_and_scored(tiles, capsys):
    samples = samples_of(keys(tiles))
    names = sorted(str(i) for i in range(12))
    assert samples.names == [f"{c}/{i}.png" for c in ("green", "red") for i in names]
    assert samples.classes == ["green", "red"] and samples.labels.tolist() == [0] * 12 + [1] * 12
    assert samples.groups.tolist() == 2 * [int(i) // 2 for i in names]
    assert samples.folds.tolist() == 2 * [int(i) // 2 % 3 for i in names]
    with Image.open(tiles / "red" / "3.png") as image:
        want = eval_bach.shrink(torch.from_numpy(np.array(image)).permute(2, 0, 1), 16)
    assert torch.equal(eval_slides.load(keys(tiles))[0][samples.names.index("red/3.png")], want)
    row = row_of(keys(tiles), Colours())
    assert "no groups.csv" not in capsys.readouterr().out
    assert row == json.loads(json.dumps(row)) == row_of(keys(tiles), Colours())
    assert (row["images"], row["classes"], row["groups"]) == (24, ["green", "red"], 6)
    assert len(row["seeds"]) == 5 and len(row["folds"]) == 3 and len(row["recall"]) == 2
    assert {"image_dir", "std", "se_groups", "knn", "effective_rank", "mean_cosine"} < row.keys()
    assert min(row["balanced"], row["knn"]) > 0.9 and sum(map(sum, row["confusion"])) == 24 * 5


def test_a_folder_without_a_table_is_split_by_image_with_a_warning(tiles, capsys):
    pytest.importorskip("sklearn")
    (tiles / "groups.csv").unlink()
    samples = samples_of(keys(tiles))
    assert samples.groups.tolist() == list(range(24)) and len(samples.folds.unique()) == 5
    assert "images of one patient may be on both sides" in capsys.readouterr().out
    mine = tiles.parent / "mine.csv"
    with pytest.raises(ValueError, match="mine.csv: no such csv"):
        samples_of(keys(tiles, groups=str(mine)))
    groups_csv(mine, [line.rsplit(",", 1)[0] for line in ROWS], "file,patient")
    samples = samples_of(keys(tiles, groups=str(mine)))
    assert int(samples.groups.max()) == 5
    assert all(len(samples.folds[samples.groups == i].unique()) == 1 for i in range(6))
    assert capsys.readouterr().out == ""


def test_bare_names_gaps_in_folds_and_what_spreadsheets_write_are_understood(tiles):
    want = samples_of(keys(tiles)).folds[:12]  # of green
    (tiles / "red" / "3.png").rename(tiles / "red" / "last.TIFF")
    rows = [line.replace("red/3.png", "last.TIFF").replace("green/", "green\\") for line in reversed(ROWS)]
    rows = [row[:-1] + row[-1].replace("3", "5") for row in rows]  # folds numbered with a gap
    (tiles / "groups.csv").write_text("\ufefffile, patient, fold,note\r\n" + "\r\n".join(f"./{r}," for r in rows))
    samples = samples_of(keys(tiles))
    assert len(samples.names) == 24 and "red/last.TIFF" in samples.names and len(samples.groups.unique()) == 6
    assert torch.equal(samples.folds[:12], want)


def test_tiles_at_a_scale(tiles):
    config = keys(tiles, views="tiles", mpp=0.5, image_mpp=0.4, concat=True)
    assert eval_slides.load(config)[0][0].shape == (3, 19, 16)
    assert "at 0.5 um/px from 0.4, 24 images" in row_of(config, Colours())["protocol"]
    with pytest.raises(ValueError, match=r"views=tiles needs its images' um/px; give --image_mpp="):
        eval_slides.load(config | {"image_mpp": 0.0})


def test_whatever_changes_the_number_shows_in_the_protocol(tiles, monkeypatch):
    monkeypatch.setattr(eval_bach, "fit_heads", lambda x, *a: (None, None, torch.zeros(a[3], len(x), dtype=torch.long)))

    def protocol(**changes):
        return row_of(keys(tiles, **changes), Colours())["protocol"]
    seen = [protocol(), protocol(input_px=8), protocol(concat=True)]
    for module, changes in (
            (eval_slides, {"MAX_STEPS": 100, "SEED": 1, "RUNS": 2}),
            (eval_bach, {"LR": 1e-3, "WEIGHT_DECAY": 0.0, "WARM_EPOCHS": 0, "WARM_FACTOR": 0.5, "BATCH": 8,
                         "PATIENCE": 9, "NEIGHBOURS": 5, "KNN_TEMP": 1.0})):
        for name, value in changes.items():
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


def test_command(script, tiles, tmp_path):
    torch.manual_seed(0)
    vit = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 7, "config": {}}, tmp_path / "7.pth")
    command = ["eval_slides.py", f"--weights={tmp_path}/7.pth", "--input_px=28", "--device=cpu"]
    row = json.loads(script(*command, f"--image_dir={tiles}").splitlines()[-1])
    assert row["image_dir"] == str(tiles) and row["step"] == 7 and 0 <= row["balanced"] <= 1
    with pytest.raises(SystemExit, match="^eval_slides: image_dir=nowhere: no such folder$"):
        script(*command, "--image_dir=nowhere")


# bad input

GREEN, HEADER = ROWS[:12], "file,patient,fold"


@pytest.mark.parametrize("lines, message", [
    (["file;patient;fold", *ROWS], "its columns are ['file;patient;fold']; the first line must be file,patient or"),
    (["file,patient", "red/0.png,M\xfcller"], "not a readable csv in UTF-8"),
    ([HEADER, *ROWS, "red/99.png,P1,1"], "line 26: no images in the class folders are called 'red/99.png'"),
    ([HEADER, "3.png,P1,1"], "line 2: 2 images in the class folders are called '3.png'; write class/name"),
    ([HEADER, *ROWS[2:]], "groups.csv: 2 of 24 images are not listed, such as green/0.png"),
    ([HEADER, *ROWS, ROWS[3]], "line 26: green/3.png is listed twice; delete one"),
    ([HEADER, "green/0.png,P0,1.5", *ROWS[1:]], "line 2: fold is '1.5', not a whole number"),
    ([HEADER, "green/0.png,P0,", *ROWS[1:]], "line 2: fold is '', not a whole number"),
    ([HEADER, "green/0.png,,1", *ROWS[1:]], "line 2: no patient; each line needs patient"),
    ([HEADER, "green/0.png,P0,2", *ROWS[1:]], "patient P0 is in folds 2 and 1; put all that is of a patient in"),
    ([HEADER, *(line.replace(",3", ",2") for line in ROWS)], "the folds are [1, 2]; give at least 3 (to train, select"),
    (["file,patient", *(line[:-2] for line in GREEN), *(f"red/{i}.png,P{i % 2}" for i in range(12))],
     "groups (patients) of class red: 2; 3 are needed, to train, select and test; add patients, or merge"),
    ([HEADER, *(f"green/{i}.png,P{i},{3 + i % 2}" for i in range(12)),
      *(f"red/{i}.png,Q{i % 3},{1 + i % 3 // 2}" for i in range(12))],
     "when fold 0 (from 0) tests and the next one selects, nothing of class red is left to train on")])
def test_bad_tables_are_refused_in_one_line(tiles, lines, message):
    (tiles / "groups.csv").write_text("\n".join(lines) + "\n", encoding="latin-1")
    with one_line(re.escape(message)):
        eval_slides.load(keys(tiles))


@pytest.mark.parametrize("damage, message", [
    (lambda red: [file.unlink() for file in red.glob("[0-9]*")], "red: no .jpg .jpeg .png .tif .tiff in this class"),
    (lambda red: (red / "more").mkdir(), "red/more: a folder in a class folder would be left out; move its images up"),
    (lambda red: red.rename(red.parent.parent / "red"), "green as class folders; put the images of each of"),
    (lambda red: [(red.parent / c).rename(red.parent.parent / c) for c in ("red", "green")], "nothing as class"),
    (lambda red: (red / "5.png").write_bytes(b"no picture"), "red/5.png: not a readable image")])
def test_bad_folders_are_refused_in_one_line(tiles, damage, message):
    damage(tiles / "red")
    with one_line(re.escape(message)):
        eval_slides.load(keys(tiles))


def test_scikit_learn_is_needed_for_made_folds_alone(tiles, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    samples_of(keys(tiles))
    (tiles / "groups.csv").unlink()
    with pytest.raises(ValueError, match="pip install scikit-learn, or give groups.csv a column fold"):
        samples_of(keys(tiles))


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
def test_osteosarcoma_tiles(tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    toy = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))
    cases = osteosarcoma(tmp_path / "three", two_classes=False, by_case=True)
    with pytest.raises(ValueError, match=r"groups \(patients\) of class Non-Viable-Tumor: 2; 3 are needed"):
        samples_of(keys(cases))
    for folder, groups, folds in ((osteosarcoma(tmp_path / "two", True, True), 4, 3),
                                  (osteosarcoma(tmp_path / "blocks", False, False), 26, 5)):
        for backbone in (toy, Colours()):
            row = row_of(keys(folder, input_px=56), backbone, *model.NORMS["imagenet"])
            assert (row["images"], row["groups"], len(row["folds"])) == (60, groups, folds)
            assert len(row["classes"]) == (2 if folds == 3 else 3) and 0 < row["balanced"] < 1
            assert 0.02 < row["se_groups"] < 0.3
