"""Curves and comparisons of runs, on small folders written here."""
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line
from PIL import Image

import curves
from bench import configs

CONFIG = {"out_dir": "", "seed": 0, "max_steps": 300, "kde": "uniformity", "mpps": [0.5, 1.0], "workers": 1}
COMMIT = "train.py config/toy.py\n" + "a" * 40 + "\n M README.md\n"


def run(path, bach, protocol="p", source=COMMIT, rank=(), cosine=(), **config):
    """A run's folder: BACH, and perhaps collapse metrics, at steps 0, 100, ...; config.json is CONFIG with changes."""
    path.mkdir(parents=True)
    rows = [{"step": 100 * i, "bach": b, "std": 0.01, "protocol": protocol} for i, b in enumerate(bach)]
    for key, numbers in (("effective_rank", rank), ("mean_cosine", cosine)):
        for row, number in zip(rows, numbers):
            row[key] = number
    (path / "bach.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps(CONFIG | {"out_dir": str(path)} | config))
    (path / "source.diff").write_text(source)


def shown(capsys, *patterns, parent="", out=""):
    """Printed rows of the first table by the run's name, as lists of words, and the whole text."""
    capsys.readouterr()
    curves.show(",".join(map(str, patterns)), parent, str(out))
    text = capsys.readouterr().out
    first = text.split("\n\n")[0]
    return {line.split()[0]: line.split() for line in first.splitlines() if line[:1] != " "}, text


def under(text, name):
    """What stands under a row of the first table, in one line."""
    lines = text.split("\n\n")[0].splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[0] == name) + 1
    last = next(i for i in range(first, len(lines)) if lines[i][:1] != " ")
    return "; ".join(line.strip() for line in lines[first:last])


@pytest.fixture
def tableonly(monkeypatch):
    """The table is under test: no pictures, which take a second each."""
    monkeypatch.setattr(curves, "plot", lambda *_: None)


# one run

def test_rows_of_a_resumed_and_running_run(tmp_path):
    path = tmp_path / "bach.jsonl"
    rows = [{"step": step, "bach": bach} for step, bach in ((0, 0.7), (500, 0.75), (1000, 0.8), (500, 0.9))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')
    assert [(step, row["bach"]) for step, row in curves.read_rows(path).items()] == [(0, 0.7), (500, 0.9), (1000, 0.8)]
    for bad in ("{\n", "[1]\n", '{"bach": 1}\n', '{"step": null}\n'):
        path.write_text(bad)
        with pytest.raises(ValueError, match="bach.jsonl: each line must be a JSON object with a step"):
            curves.read_rows(path)


def test_command(script, tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path / "first", [0.7, 0.75, 0.8], rank=(9, 8, 7))
    run(tmp_path / "second", [0.7], kde="koleo")
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "file").write_text("")

    def command(*flags):
        return [line for line in script("curves.py", *flags).splitlines() if not line.startswith("config: ")]

    *_, last, path = command(f"--runs={tmp_path}/first")
    assert last.split() == ["200", "0.8000", "0.0100", "nan", "7.0000", "nan", "nan", "nan", "nan"]
    assert path == f"{tmp_path}/first/curves.png" and Image.open(path).size[0] == 1440
    lines = command(f"--runs={tmp_path}/*", f"--parent={tmp_path}/second", f"--out={tmp_path}/x.png")
    assert [line.split()[0] for line in lines[:2]] == ["run", "second"] and lines[-1] == f"{tmp_path}/x.png"
    with Image.open(tmp_path / "x.png") as page:
        assert np.asarray(page.convert("L")).std() > 10
    for flag, message in ((f"--runs={tmp_path}/*", "parent=nowhere: no such run with a curve; there are first, second"),
                          ("--runs=nowhere/*", "runs=nowhere/*: no folder with a row in metrics.jsonl or bach.jsonl")):
        with one_line(f"^curves: .*{re.escape(message)}"):
            command(flag, "--parent=nowhere")


def test_the_picture_is_at_the_runs_common_folder(tmp_path, monkeypatch, capsys, tableonly):
    monkeypatch.chdir(tmp_path)
    for name in ("out/a", "out/sub/b", "c"):
        run(Path(name), [0.7, 0.8])
    for runs, folder in (("out/a/", "out/a/"), ("out/a,out/sub/b", "out/"), ("*,out/a", "")):
        assert shown(capsys, runs)[1].splitlines()[-1] == f"{folder}curves.png"


def test_neither_torch_nor_matplotlib_is_needed_for_the_tables(tmp_path, monkeypatch, capsys):
    code = "import sys, curves; assert not {'torch', 'matplotlib', 'eval_bach'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path / "a", [0.7])
    assert shown(capsys, tmp_path / "a")[1].endswith("curves.png not written: pip install matplotlib\n")


# runs without BACH

def metrics(path, rows, **config):
    """A run's folder with metrics.jsonl alone."""
    run(path, [], **config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(steps, shift=0.0):
    """Rows as train.py writes them."""
    first = {"step": 0, "loss": None, "lr": None}
    return [first] + [{"step": s, "loss": 11 + shift - s / 100, "grad_norm": 2.0, "lr": 1e-4 * s, "cls_rank": 9.0,
                       "cls_cosine": 0.5, "images_per_s": 30.0} for s in range(10, steps + 1, 10)]


CONTEXT = [{"step": s, "loss": 0.8, "neighbours": 0.9, "loss/neighbours": 0.89, "lr": 1e-3, "grad_norm": 0.3,
            "windows_per_s": 40.0} for s in (10, 20)]


def test_a_run_without_bach_has_a_table_of_what_it_logged(tmp_path, tableonly, capsys):
    metrics(tmp_path / "a", trained(500))
    lines = shown(capsys, tmp_path / "a")[1].splitlines()
    assert lines[0].split() == ["step", "loss", "grad_norm", "lr", "cls_rank", "cls_cosine", "images_per_s"]
    assert lines[1].split()[:2] == ["10", "10.9"] and lines[20].split()[:2] == ["500", "6"] and len(lines) == 22
    metrics(tmp_path / "empty", trained(0))  # has only begun
    with pytest.raises(ValueError, match="no folder with a row in metrics.jsonl or bach.jsonl"):
        curves.show(f"{tmp_path}/empty")


def test_runs_with_and_without_bach_stand_together(tmp_path, tableonly, capsys):
    for seed in range(2):
        metrics(tmp_path / f"short_{seed}", trained(20, seed), seed=seed)
    metrics(tmp_path / "ctx", CONTEXT, task="train")
    rows, text = shown(capsys, tmp_path / "*")
    head, *lines = [line.split() for line in text.splitlines()[:-1]]
    assert head[4:6] == ["step", "loss/neighbours"] and [line[:3] for line in lines] == [
        [f"{tmp_path}/ctx", "20", "0.89"], [f"{tmp_path}/short_0", "20", "nan"], [f"{tmp_path}/short_1", "20", "nan"]]
    with pytest.raises(ValueError, match="^parent=ctx: .*; no run here has .* leave parent out$"):
        shown(capsys, tmp_path / "*", parent="ctx")
    run(tmp_path / "z", [0.3, 0.4, 0.5, 0.6])
    rows, text = shown(capsys, tmp_path / "*", parent="z")
    assert rows["z"][1:4] == ["1", "0.600", "300"] and "no score, last row" in text and rows.keys() & {"ctx"} == set()


def test_a_curve_of_image_dir_is_compared_like_bach_s(tmp_path, tableonly, capsys):
    tables = {}
    for key in ("bach", "balanced"):
        for name, last in (("recipe_0", 0.6), ("recipe_1", 0.64), ("clip30_0", 0.9)):
            place = tmp_path / key / name
            run(place, [0.4, last], rank=[9, 8], cosine=[0.2, 0.3], seed=name[-1], kde=name[0], max_steps=100)
            text = (place / "bach.jsonl").read_text()
            (place / "bach.jsonl").write_text(text.replace('"bach"', f'"{key}"'))
        tables[key] = shown(capsys, tmp_path / key / "*", parent="recipe")[1].rpartition(str(tmp_path))[0]
    assert tables["bach"] == tables["balanced"] and "+0.280 within 0.440" in tables["bach"]
    one = shown(capsys, tmp_path / "balanced/clip30_0")[1].splitlines()
    assert one[0].split()[:3] == ["step", "balanced", "std"] and one[2].split()[:2] == ["100", "0.9000"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, as matplotlib's objects."""
    figure = pytest.importorskip("matplotlib.figure")
    found = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: found.append(self))
    return found


def colours(figure):
    return {text.get_text().split()[0]: line.get_color() for text, line in
            zip(figure.legends[0].get_texts(), figure.legends[0].get_lines())}


def test_a_panel_per_metric_with_its_name_on_the_axis(tmp_path, drawn, capsys):
    metrics(tmp_path / "a", trained(500 * 10))
    run(tmp_path / "b", [0.3, 0.4], rank=(9, 8), cosine=(0.9, 0.8), kde="none")
    metrics(tmp_path / "ctx", CONTEXT, task="train")
    metrics(tmp_path / "tiles", [{"step": step, "balanced": 0.5} for step in (0, 10)], image_dir="x")
    for name, labels in (("a", "loss grad_norm lr cls_rank cls_cosine images_per_s"), ("*", curves.PANELS),
                         ("tiles", "balanced"),
                         ("b", "bach effective_rank mean_cosine"),
                         ("ctx", "loss/neighbours loss grad_norm lr windows_per_s")):
        shown(capsys, tmp_path / name)
        panels = drawn[-1].axes
        labels = labels.split() if isinstance(labels, str) else labels
        assert [panel.get_ylabel() for panel in panels] == [curves.PANELS[key] for key in labels]
        assert {panel.get_xlabel() for panel in panels} == {"step"}
    points = len(drawn[0].axes[0].get_lines()[1].get_xdata())
    assert points == curves.MAX_POINTS  # 500 rows would hide each other


def test_a_point_whose_probe_failed_has_no_score(tmp_path):
    (tmp_path / "bach.jsonl").write_text('{"step": 0, "bach": 0.5}\n{"step": 5, "bach": null, "bach_error": "x"}\n')
    assert [row.get("score") for row in curves.read_rows(tmp_path / "bach.jsonl").values()] == [0.5, None]
    assert "score" not in curves.read_rows(tmp_path / "bach.jsonl")[5]


def test_a_single_point_is_drawn(tmp_path, drawn, capsys):
    run(tmp_path / "one", [0.3])
    run(tmp_path / "two", [0.3, 0.4], kde="koleo")
    shown(capsys, tmp_path / "*")
    markers = [line.get_marker() for line in drawn[0].axes[0].get_lines() if len(line.get_xdata())]
    assert markers == ["o", ""]


def test_a_name_has_one_colour_in_every_figure(tmp_path, drawn, capsys):
    names = ["recipe", *(path.stem for path in (ROOT / "config/ablate").glob("*.py"))]
    for name in names:
        run(tmp_path / name, [0.3, 0.4], kde=name)
    shown(capsys, tmp_path / "*")
    shown(capsys, tmp_path / "koleo", tmp_path / "noreg", parent="noreg")
    everyone, two = map(colours, drawn)
    assert len(set(everyone.values())) == len(names) and two == {name: everyone[name] for name in ("koleo", "noreg")}


@pytest.mark.parametrize("groups", [curves.MAX_BANDS, curves.MAX_BANDS + 1])
def test_many_bands_become_lines(groups, tmp_path, drawn, capsys):
    for i in range(groups):
        for seed in range(2):
            run(tmp_path / f"{'abcdefg'[i]}_{seed}", [0.3, 0.4 + 0.1 * seed], seed=seed, kde=str(i))
    shown(capsys, tmp_path / "*")
    panel, few = drawn[0].axes[0], groups <= curves.MAX_BANDS
    assert len(panel.collections) == groups * few  # bands
    assert sum(len(line.get_xdata()) > 0 for line in panel.get_lines()) == groups * (1 if few else 3)


def test_tensorboard_gets_every_number(tmp_path, tableonly, capsys, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, key, value, step):
            told.append((self.folder, key, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("fake"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    metrics(tmp_path / "a/x", trained(20))
    run(tmp_path / "b/x", [0.3])
    curves.show(f"{tmp_path}/*/x", tensorboard="tb")
    assert {("tb/a/x", "loss", 10.8, 20), ("tb/b/x", "bach", 0.3, 0)} <= set(told)
    assert not any(isinstance(value, str) or value is None or key == "score" for _, key, value, _ in told)


# groups of repeats

def test_repeats_are_one_row_and_every_other_run_its_own(tmp_path, tableonly, capsys):
    for seed, end in enumerate((0.70, 0.80, 0.75)):
        free = {"seed": seed, "workers": seed, "wandb_project": "x" * seed}
        run(tmp_path / f"toy_{seed}", [0.35, 0.5 + 0.1 * seed, 0.85, end], **free)
    run(tmp_path / "toy_kde", [0.35, 0.35, 0.35, 0.40], kde="openmidnight")
    for seed in range(2):
        run(tmp_path / f"toy_mpp-s{seed}", [0.35, 0.35, 0.35, 0.41], mpps=[0.5], seed=seed)
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["toy"][1:] == ["3", "0.850", "200", "0.750", "+-", "0.050", "parent", "0.000", "0"]
    assert rows["toy_kde"][1:5] == ["1", "0.400", "300", "0.400"] and rows["toy_mpp"][1] == "2"
    assert under(text, "toy_kde") == "changed: kde='openmidnight'" and under(text, "toy_mpp") == "changed: mpps=[0.5]"
    assert under(text, "toy") == ""  # nothing is said of a run that is done and changes nothing
    rows, text = shown(capsys, tmp_path / "*", parent="toy_mpp")
    assert list(rows)[1:4] == ["toy_mpp", "toy", "toy_kde"] and "parent" in rows["toy_mpp"]
    assert under(text, "toy_kde") == "changed: kde='openmidnight', mpps=[0.5, 1.0]"
    assert shown(capsys, tmp_path / "*", parent=f"{tmp_path}/toy_mpp-s1/")[1] == text


@pytest.mark.parametrize("change, stated", [
    ({"source": COMMIT.replace("a", "b")}, "changed: code='bbbbbbb'"),
    ({"source": COMMIT + "diff --git a/model.py b/model.py\n+1\n"}, "changed: code='aaaaaaa+"),
    ({"source": "train.py\n"}, "changed: code='unknown'"),
    ({"protocol": "p, teacher in bf16"}, "changed: protocol='p, teacher in bf16'"),
    ({"slides": "elsewhere/*"}, "changed: slides='elsewhere/*'")])
def test_what_makes_a_run_no_repeat(change, stated, tmp_path, tableonly, capsys):
    run(tmp_path / "a_0", [0.3, 0.4, 0.5, 0.6])
    run(tmp_path / "a_1", [0.3, 0.4, 0.5, 0.6], **{"seed": 1, **change})
    rows, text = shown(capsys, tmp_path / "*")
    name = f"{tmp_path}/a_1"  # both would be called a
    assert rows[name][1] == "1" and under(text, name).startswith(stated)
    assert ("other protocol" in text) == ("protocol" in change)


def test_without_a_config_a_run_stands_for_itself(tmp_path, tableonly, capsys):
    for name in "ab":
        run(tmp_path / name, [0.3, 0.4])
        (tmp_path / name / "config.json").unlink()
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1] == rows["b"][1] == "1" and "changed: unknown, no config.json" in under(text, "b")


def test_one_seed_twice_is_said(tmp_path, tableonly, capsys):
    for name in ("a_0", "a_1"):
        run(tmp_path / name, [0.3, 0.4, 0.5, 0.6])
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1] == "2" and "one seed occurs twice" in under(text, "a")


# noise

def group(*ends, **changes):
    return curves.Group("", [], list(ends), [300], np.array(ends)[:, None], "p")._replace(**changes)


def test_threshold_is_student_s_test_with_a_pooled_deviation():
    a, b, c = group(0.70, 0.60, 0.65), group(0.55, 0.60), group(0.8)
    pooled = math.sqrt((2 * statistics.variance([0.70, 0.60, 0.65]) + statistics.variance([0.55, 0.60])) / 3)
    limit, s, free = curves.noise([a, b, c], b, a, 300)
    assert (s, free) == (pytest.approx(pooled), 3) and limit == pytest.approx(3.182 * pooled * math.sqrt(1 / 2 + 1 / 3))
    assert curves.noise([a, b, c], c, a, 300)[0] == pytest.approx(3.182 * pooled * math.sqrt(1 + 1 / 3))
    assert curves.noise([c, group(0.7)], c, c, 300)[0] == 0.02  # nothing is known of seeds
    close = group(0.7, 0.7001, 0.7)
    assert curves.noise([close], close, close, 300)[0] == 0.02  # whatever the seeds say, there are 132 images
    for other in (group(0.1, 0.9, protocol="q"), group(0.1, 0.9, x=[200])):
        assert curves.noise([a, b, c, other], b, a, 300) == (limit, s, free)


def test_quantiles_of_student_s_t():
    scipy = pytest.importorskip("scipy.stats")
    for free in range(1, 40):
        seeds = group(*np.linspace(0, 1, free + 1))
        limit, s, _ = curves.noise([seeds], seeds, seeds, 300)
        assert limit / s / math.sqrt(2 / (free + 1)) == pytest.approx(scipy.t.ppf(0.975, free), abs=3e-3)


def test_within_and_beyond_are_said_with_the_limit(tmp_path, tableonly, capsys):
    for seed in range(3):
        run(tmp_path / f"a_{seed}", [0.3, 0.4, 0.5, 0.7 + 0.01 * seed], seed=seed)
        run(tmp_path / f"b_{seed}", [0.3, 0.4, 0.5, 0.69 + 0.01 * seed], seed=seed, kde="koleo")
    run(tmp_path / "c", [0.3, 0.4, 0.5, 0.8], kde="none")
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["b"][7:10] == ["-0.010", "within", "0.023"] and rows["c"][5:8] == ["+0.090", "beyond", "0.032"]
    assert "sd of seeds s = 0.010, 4 degrees of freedom" in text
    rows, text = shown(capsys, tmp_path / "*_0", tmp_path / "c")
    assert rows["b"][5:8] == ["-0.010", "within", "0.020"] and "s = nan, 0 degrees of freedom" in text


# collapse metrics and the dip

def test_start_dip_end_and_collapse_metrics_stand_in_a_table_of_their_own(tmp_path, tableonly, capsys):
    run(tmp_path / "a_0", [0.3, 0.4, 0.5], rank=(30, 10, 20), cosine=(0.9, 0.95, 0.5))
    run(tmp_path / "a_1", [0.3, 0.2, 0.5], rank=(30, 12, 24), cosine=(0.9, 0.97, 0.6), seed=1)
    run(tmp_path / "b", [0.3, 0.4, 0.5], rank=(30, 5, 2), cosine=(0.9,), kde="none")
    lines = [line.split() for line in shown(capsys, tmp_path / "*")[1].split("\n\n")[1].splitlines()]
    assert lines[1] == ("a 0.300 +- 0.000 0.050 +- 0.071 0.500 +- 0.000 30.0 11.0 22.0 +- 2.8 "
                        "0.900 0.960 0.550 +- 0.071").split()
    assert lines[2] == "b 0.300 0.000 0.500 30.0 2.0 2.0 0.900 nan nan".split()


@pytest.mark.parametrize("mean, depth, length", [
    ([0.70, 0.71, 0.72], 0, 0),
    ([0.70, 0.70, 0.72], 0, 0),
    ([0.70, 0.66, 0.68, 0.70, 0.60], 0.04, 300),       # a fall after the first recovery is not the dip
    ([0.70, 0.71, 0.66, 0.73], 0.04, 200),             # from the last point that was not below
    ([0.70, 0.66, 0.68], 0.04, math.inf),              # not recovered yet
    ([0.70], 0, 0)])
def test_depth_and_length_of_the_dip(mean, depth, length):
    x = [100 * i for i in range(len(mean))]
    assert curves.dip(x, np.array(mean)) == (pytest.approx(depth), length)
    assert np.isnan(curves.dip([step + 100 for step in x], np.array(mean))).all()  # without step 0


# runs that have not ended

def test_a_repeat_that_lags_takes_nothing_from_the_others(tmp_path, tableonly, capsys):
    run(tmp_path / "a_0", [0.3, 0.4, 0.5, 0.6])
    run(tmp_path / "a_1", [0.3, 0.4, 0.5, 0.7], seed=1)
    run(tmp_path / "a_2", [0.3, 0.9], seed=2)
    (tmp_path / "a_3").mkdir()  # has no point yet
    (tmp_path / "a_3/config.json").write_text("{}")
    with open(tmp_path / "a_2/bach.jsonl", "a") as f:
        f.write('{"step": 200, "ba')
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1:7] == ["2", "0.650", "300", "0.650", "+-", "0.071"]
    assert under(text, "a") == f"{tmp_path}/a_2 at step 100 of 300, not in the mean"


def test_a_repeat_that_is_ahead_does_not_leave_the_others_behind(tmp_path, tableonly, capsys):
    for seed, bach in enumerate(([0.3, 0.4, 0.5, 0.9], [0.3, 0.6, 0.5], [0.3, 0.4, 0.5])):
        run(tmp_path / f"a_{seed}", bach, seed=seed)
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1:7] == ["3", "0.533", "200", "0.500", "+-", "0.000"] and "not in the mean" not in text
    rows, _ = shown(capsys, tmp_path / "a_1,", tmp_path / "a_2")
    assert rows["a"][1:4] == ["2", "0.550", "100"]  # a point of one of them, not 150


def test_an_unfinished_run_is_compared_where_both_have_a_point(tmp_path, tableonly, capsys):
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6])
    run(tmp_path / "b", [0.3, 0.45, 0.55], kde="koleo")
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["b"][5:8] == ["+0.050", "beyond", "0.020"] and f"{tmp_path}/b at step 200 of 300" in under(text, "b")


# what the pages say of differences

def unproven(text):
    """What a page's prose calls beyond or within the noise, and no table of docs/toy_runs does."""
    prose = " ".join(re.sub(configs.TABLE, "", text).replace("within or beyond", "").split())
    for name, verdict in set(re.findall(r"(\w+) ([+-][.\d]+ (?:within|beyond) [.\d]+\d)", prose)):
        if verdict in [configs.against(folder, name) for folder in configs.FOLDERS]:
            prose = prose.replace(f"{name} {verdict}", "")
    return re.findall(r".{,40}(?:beyond|[+-][.\d]+ within).{,20}", prose)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_beyond_is_said_only_with_the_verdict_of_a_table(page):
    assert unproven((ROOT / page).read_text()) == []


def test_claims_that_no_table_carries_are_refused():
    assert not unproven("It was koleo +0.178 beyond 0.094, within or beyond what\nseeds explain.")
    for claim in ("koleo +0.049 beyond 0.058", "koleo +0.178 within 0.094", "it does not dip beyond the noise"):
        assert unproven(f"continued, {claim}")
