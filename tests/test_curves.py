"""Curves and comparisons of runs, on small folders written here."""
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import curves

ROOT = Path(__file__).parent.parent
ROWS = [{"step": step, "bach": bach, "std": 0.01, "seeds": [bach], "plateau": 0.69, "effective_rank": 99.5,
         "mean_cosine": 0.25} for step, bach in ((0, 0.7), (500, 0.75), (1000, 0.8))]
CONFIG = {"out_dir": "", "seed": 0, "max_steps": 300, "kde": "uniformity", "mpps": [0.5, 1.0], "workers": 1}


def run_folder(path, rows, end="\n"):
    path.mkdir(parents=True)
    (path / "bach.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]) + json.dumps(rows[-1]) + end)


def run(path, bach, every=100, size=32, speeds=(), source="", protocol="p", std=0.01, **config):
    """A run's folder: BACH at steps 0, every, ...; images/s of logged steps; config.json is CONFIG with changes."""
    run_folder(path, [{"step": i * every, "images": i * every * size, "bach": b, "std": std, "protocol": protocol}
                      for i, b in enumerate(bach)])
    steps = range(0, every * len(bach), every)
    speeds = [None, *speeds] + [50.0] * len(bach)
    rows = [{"step": step, "images_per_s": speed} for step, speed in zip(steps, speeds)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "config.json").write_text(json.dumps(CONFIG | {"out_dir": str(path)} | config))
    if source:
        (path / "source.diff").write_text(source)


def shown(capsys, *patterns, parent="", out=""):
    """Printed rows of the first table by the run's name, as lists of words, and the whole text."""
    capsys.readouterr()
    curves.show(",".join(map(str, patterns)), parent, str(out))
    text = capsys.readouterr().out
    first = text.split("\n\n")[0]
    return {line.split()[0]: line.split() for line in first.splitlines() if line[:1] not in ("", " ")}, text


def under(text, name):
    """What stands under a row, in one line."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == [name]) + 1
    last = next(i for i in range(first, len(lines)) if lines[i][:1] != " ")
    return " ".join(" ".join(lines[first:last]).split())


def command(*flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "eval_bach.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True)


# one run


def test_curve_table():
    lines = curves.curve_table(ROWS + [{"step": 1500, "bach": 0.8, "knn": None}]).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["500", "0.7500", "+-", "0.0100", "0.6900", "99.5", "0.2500"]
    assert lines[4].split()[:2] == ["1500", "0.8000"] and len({len(line) for line in lines}) == 1
    more = curves.curve_table(ROWS + [ROWS[0] | {"clean": 0.61, "clean_std": 0.02, "knn": 0.55}]).splitlines()
    assert more[0].startswith(lines[0]) and more[1].startswith(lines[1]) and len({len(line) for line in more}) == 1
    assert more[4].split()[-4:] == ["0.6100", "+-", "0.0200", "0.5500"] and more[1].split()[-1] == "nan"


def test_rows_of_a_resumed_and_running_run(tmp_path):
    run_folder(tmp_path / "a", ROWS + [ROWS[1] | {"bach": 0.9}, ROWS[2]], end="")
    rows = curves.read_rows(tmp_path / "a" / "bach.jsonl")
    assert [r["step"] for r in rows] == [0, 500, 1000] and [r["bach"] for r in rows] == [0.7, 0.9, 0.8]
    for bad in ("{\n", "[1]\n", '{"bach": 1}\n', '{"step": "1"}\n', '{"step": null}\n'):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match="bad.jsonl: each line must be a JSON object with a step"):
            curves.read_rows(tmp_path / "bad.jsonl")


def test_runs_command(tmp_path):
    pytest.importorskip("matplotlib")
    run_folder(tmp_path / "first", ROWS)
    run_folder(tmp_path / "second", ROWS[:1])
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "file").write_text("")
    done = command(f"--runs={tmp_path}/first")
    assert done.returncode == 0, done.stderr
    assert "0.7500 +- 0.0100" in done.stdout and done.stdout.splitlines()[-1] == str(tmp_path / "first" / "bach.png")
    assert Image.open(tmp_path / "first" / "bach.png").size == (960, 600)
    done = command(f"--runs={tmp_path}/*", f"--parent={tmp_path}/second", f"--out={tmp_path}/x.png")
    assert done.returncode == 0, done.stderr
    assert f"\nparent: second ({tmp_path}/second)\n" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/x.png" and Image.open(tmp_path / "x.png").size == (1440, 810)


def test_the_picture_is_at_the_runs_common_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name in ("out/a", "out/sub/b", "c"):
        run_folder(tmp_path / name, ROWS)
    for runs, place in (("out/a/", "out/a/bach.png"), ("out/a,out/sub/b", "out/bach.png"), ("*,out/a", "bach.png"),
                        (f"{tmp_path}/out/*,out/sub/b", f"{tmp_path}/out/bach.png")):
        assert shown(capsys, runs)[1].splitlines()[-1] == place


def test_runs_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_folder(tmp_path / "a", ROWS)
    curves.show(str(tmp_path / "a"))
    assert capsys.readouterr().out.splitlines()[-1].endswith("bach.png not written: pip install matplotlib")


def test_neither_torch_nor_matplotlib_is_imported_before_it_is_needed():
    code = "import sys, curves; assert not {'torch', 'matplotlib', 'eval_bach'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# groups of repeats


@pytest.fixture
def tableonly(monkeypatch):
    """The table is under test: no pictures, which take a second each."""
    monkeypatch.setattr(curves, "plot", lambda *_: None)


def test_repeats_are_one_row_and_every_other_run_its_own(tmp_path, tableonly, capsys):
    for seed, end in enumerate((0.70, 0.80, 0.75)):
        free = {"seed": seed, "workers": seed, "wandb_project": "x" * seed}
        run(tmp_path / f"toy_{seed}", [0.35, 0.5 + 0.1 * seed, 0.85, end], **free)
    run(tmp_path / "toy_kde_0", [0.35, 0.35, 0.35, 0.40], kde="openmidnight")
    run(tmp_path / "toy_mpp-s0", [0.35, 0.35, 0.35, 0.41], mpps=[0.5])
    run(tmp_path / "toy_mpp-s1", [0.35, 0.35, 0.35, 0.41], mpps=[0.5], seed=1)
    rows, text = shown(capsys, tmp_path / "*")
    assert text.startswith(f"parent: toy ({tmp_path}/toy_0, {tmp_path}/toy_1, {tmp_path}/toy_2)\n")
    assert rows["toy"][1:] == ["3", "0.850", "200", "0.750", "+-", "0.050", "parent", "-", "-", "50.0", "9,600"]
    assert rows["toy_kde_0"][1:5] == ["1", "0.400", "300", "0.400"] and rows["toy_mpp"][1] == "2"
    lines = text.splitlines()  # under a run that is done and changes nothing there is no line
    assert lines[2].startswith("toy ") and lines[3].startswith("toy_kde_0 ")
    assert under(text, "toy_kde_0") == "changed: kde='openmidnight'" and under(text, "toy_mpp") == "changed: mpps=[0.5]"
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 120
    rows, text = shown(capsys, tmp_path / "*", parent="toy_mpp")
    assert list(rows)[2:5] == ["toy_mpp", "toy", "toy_kde_0"] and "parent" in rows["toy_mpp"]
    assert under(text, "toy_kde_0") == "changed: kde='openmidnight', mpps=[0.5, 1.0]"
    assert shown(capsys, tmp_path / "*", parent=f"{tmp_path}/toy_mpp-s1/")[1] == text


@pytest.mark.parametrize("change, stated", [
    ({"size": 64}, "changed: 64 images a step"),  # the same batch_size, on twice the GPUs
    ({"source": "train.py\n" + "b" * 40 + "\n"}, "changed: code='bbbbbbb'"),
    ({"protocol": "p, teacher in bf16"}, "changed: nothing"),
    ({"slides": "elsewhere/*"}, "changed: nothing; not in the parent's config.json: slides='elsewhere/*'"),
])
def test_what_makes_a_run_no_repeat(change, stated, tmp_path, tableonly, capsys):
    run(tmp_path / "a_0", [0.3, 0.4, 0.5, 0.6], **({"source": "x\n" + "a" * 40 + "\n"} if "source" in change else {}))
    run(tmp_path / "a_1", [0.3, 0.4, 0.5, 0.6], seed=1, **change)
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a_1"][1] == "1" and under(text, "a_1").endswith(stated)
    assert ("other protocol" in text) == ("protocol" in change)
    _, text = shown(capsys, tmp_path / "*", parent="a_1")
    if "slides" in change:
        assert under(text, "a_0").endswith("changed: nothing; not in its own config.json: slides='elsewhere/*'")


def test_only_changes_to_code_count_as_code(tmp_path):
    hunk = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-1\n+{1}\n"

    def code(*files):
        head = f"train.py --seed={len(files)}\n{'a' * 40}\n M README.md\n?? notes{len(files)}.py\n"
        (tmp_path / "source.diff").write_text(head + "".join(hunk.format(name, text) for name, text in files))
        return curves.read_code(str(tmp_path))

    assert curves.read_code(str(tmp_path)) == "unknown"
    assert code() == code(("README.md", 2), ("config/a.py", 2), ("tests/t.py", 2)) == "aaaaaaa"
    edited = code(("README.md", 2), ("model.py", 2), ("docs/x.png", 3))
    assert edited.startswith("aaaaaaa+") and edited == code(("model.py", 2)) != code(("model.py", 3))


def test_one_seed_twice_is_said(tmp_path, tableonly, capsys):
    for name in ("a_0", "a_0_again_1"):
        run(tmp_path / name, [0.3, 0.4, 0.5, 0.6])
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a_0..a_0_again_1"][1] == "2" and "a seed more than once" in under(text, "a_0..a_0_again_1")


def test_groups_never_share_a_name(tmp_path, tableonly, capsys):
    for i, kde in enumerate(("uniformity", "koleo", "uniformity", "koleo")):
        run(tmp_path / f"exp_{i}", [0.3, 0.4, 0.5, 0.6], kde=kde, seed=i)
    assert {"exp_0..exp_2", "exp_1..exp_3"} <= shown(capsys, tmp_path / "*")[0].keys()


# noise


def test_threshold_is_student_s_test_with_a_pooled_deviation():
    def group(*ends):
        return curves.Group("", [], list(ends), [300], np.array(ends)[:, None], "p")

    a, b, c = group(0.70, 0.60, 0.65), group(0.55, 0.60), group(0.8)
    pooled = math.sqrt((2 * statistics.variance([0.70, 0.60, 0.65]) + statistics.variance([0.55, 0.60])) / 3)
    limit, s, free = curves.noise([a, b, c], b, a, 300)
    assert (s, free) == (pytest.approx(pooled), 3) and limit == pytest.approx(3.182 * pooled * math.sqrt(1 / 2 + 1 / 3))
    assert curves.noise([a, b, c], c, a, 300)[0] == pytest.approx(3.182 * pooled * math.sqrt(1 + 1 / 3))
    assert curves.noise([c, group(0.7)], c, c, 300)[0] == 0.02  # nothing is known of seeds
    close = group(0.7, 0.7001, 0.7)
    assert curves.noise([close], close, close, 300)[0] == 0.02  # whatever the seeds say, there are 132 images
    other = group(0.1, 0.9)._replace(protocol="q")
    assert curves.noise([a, b, c, other], b, a, 300) == (limit, s, free)
    assert curves.noise([a, b, c, other._replace(x=[200], protocol="p")], b, a, 300) == (limit, s, free)


def test_equal_experiments_are_beyond_noise_in_one_of_twenty_comparisons():
    rng, beyond, n = np.random.default_rng(0), 0, 4000
    for ends in rng.normal(0.7, 0.05, (n, 2, 3, 1)):
        a, b = (curves.Group("", [], [0] * 3, [300], e, "p") for e in ends)
        beyond += "beyond" in curves.against(a, b, [a, b])
    assert 0.04 < beyond / n < 0.06  # with a factor of 2 instead of Student's t it is 0.116


def test_quantiles_of_student_s_t():
    scipy = pytest.importorskip("scipy.stats")
    for free in range(1, 40):
        seeds = curves.Group("", [], [0] * (free + 1), [0], np.linspace(0, 1, free + 1)[:, None], "p")
        limit, s, _ = curves.noise([seeds], seeds, seeds, 0)
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
    assert rows["b_0"][5:8] == ["-0.010", "within", "0.020"] and "spread of seeds is unknown" in text


def test_how_crowded_class_tokens_are_stands_in_a_table_and_a_figure_of_its_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, seed, kde, bach, rank, cosine in (
            ("a_0", 0, "koleo", [0.3, 0.4, 0.5], (30, 10, 20), (0.9, 0.95, 0.5)),
            ("a_1", 1, "koleo", [0.3, 0.2, 0.5], (30, 12, 24), (0.9, 0.97, 0.6)),
            ("b", 0, "none", [0.3, 0.4, 0.5], (30, 5, 2), (0.9, 0.99, 1.0))):
        run(tmp_path / name, bach, seed=seed, kde=kde)
        rows = [json.loads(line) for line in (tmp_path / name / "bach.jsonl").open()]
        rows = [row | {"effective_rank": r, "mean_cosine": c} for row, r, c in zip(rows, rank, cosine)]
        (tmp_path / name / "bach.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        logged = [{"step": 0}] + [{"step": s, "cls_rank": 9 - s / 100, "cls_cosine": 0.8} for s in (100, 200)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    text = shown(capsys, tmp_path / "*", out=tmp_path / "x.png")[1]
    lines = [line.split() for line in text.split("\n\n")[1].splitlines()]
    assert lines[1] == ("a 0.300 +- 0.000 0.050 +- 0.071 0.500 +- 0.000 30.0 11.0 22.0 +- 2.8 "
                        "0.900 0.960 0.550 +- 0.071").split()
    assert lines[2] == "b 0.300 0.000 0.500 30.0 2.0 2.0 0.900 1.000 1.000".split()
    assert Image.open(tmp_path / "x.png").size == (1440, 810)
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 100, "cls_rank": 3}\n{"step": 200, "cls_cosine": null}\n')
    rows = [json.loads(line) for line in (tmp_path / "b/bach.jsonl").open()]
    rows[1].pop("mean_cosine")
    (tmp_path / "b/bach.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(capsys, tmp_path / "*", out=tmp_path / "x.png")[1]  # what is not there is a dash, and not drawn
    assert "b 0.300 0.000 0.500 30.0 2.0 2.0 0.900 - 1.000".split() in [line.split() for line in text.splitlines()]
    with_curve = np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(int)
    for name in ("a_0", "a_1", "b"):
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 200}\n')
    shown(capsys, tmp_path / "*", out=tmp_path / "x.png")
    assert np.abs(np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(int) - with_curve).mean() > 1


# the dip at the start


@pytest.mark.parametrize("mean, want", [
    ([0.70, 0.71, 0.72], None),
    ([0.70, 0.70, 0.72], None),
    ([0.70, 0.66, 0.68, 0.70, 0.60], (0.04, 300)),       # a fall after the first one was regained is not the dip
    ([0.70, 0.71, 0.66, 0.73], (0.04, 200)),             # from the last point that was not below
    ([0.70, 0.66, 0.68], (0.04, None)),                  # not regained yet
    ([0.70], None),
])
def test_depth_and_length_of_the_dip(mean, want):
    got = curves.dip([100 * i for i in range(len(mean))], np.array(mean))
    assert got == (want and (pytest.approx(want[0]), want[1]))


def test_a_curve_without_step_0_has_no_dip_and_an_endless_one_says_never(tmp_path, tableonly, capsys):
    assert curves.dip([100, 200], np.array([0.7, 0.6])) is None
    run(tmp_path / "a", [0.70, 0.66, 0.68, 0.69])
    run(tmp_path / "b", [0.70, 0.66, 0.71, 0.69], kde="koleo")
    rows, _ = shown(capsys, tmp_path / "*")
    assert rows["a"][-4:-2] == ["0.040", "never"] and rows["b"][-4:-2] == ["0.040", "200"]


# runs that go on, that stopped, that are damaged


def test_a_repeat_that_lags_takes_nothing_from_the_others(tmp_path, tableonly, capsys):
    run(tmp_path / "a_0", [0.3, 0.4, 0.5, 0.6])
    run(tmp_path / "a_1", [0.3, 0.4, 0.5, 0.7], seed=1)
    run(tmp_path / "a_2", [0.3, 0.9], seed=2)
    with open(tmp_path / "a_2/bach.jsonl", "a") as f:
        f.write('{"step": 200, "ba')
    os.utime(tmp_path / "a_2/bach.jsonl", (1e9, 1e9))
    now = os.path.getmtime(tmp_path / "a_2/metrics.jsonl")
    os.utime(tmp_path / "a_2/metrics.jsonl", (now - 185, now - 185))
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1:7] == ["2", "0.650", "300", "0.650", "+-", "0.071"]
    assert under(text, "a") == "2 of 3 done; a_2 at step 100 of 300, last row 3 min ago, not in the mean"
    run(tmp_path / "a_3", [0.3], seed=3)  # images a step are not known yet: still a repeat
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1] == "2" and "a_3 at step 0 of 300" in under(text, "a")


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
    assert rows["b"][5:8] == ["+0.050", "beyond", "0.020"] and "; compared after 200 steps; " in under(text, "b")


def test_runs_of_other_batch_sizes_are_compared_at_equal_numbers_of_images(tmp_path, tableonly, capsys):
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6])
    run(tmp_path / "b", [0.3, 0.45], size=64, batch_size=64)
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["b"][1:8] == ["1", "0.450", "6,400", "0.450", "-0.050", "beyond", "0.020"]
    assert "in images seen, not steps" in text and "compared after 6,400 images" in under(text, "b")


def test_images_per_second_leave_out_the_first_row(tmp_path, tableonly, capsys):
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6], speeds=(1, 80, 82))
    run(tmp_path / "b", [0.3, 0.4, 0.5, 0.6], kde="koleo")
    (tmp_path / "b/metrics.jsonl").unlink()
    rows, _ = shown(capsys, tmp_path / "*")
    assert rows["a"][-2] == "81.0" and rows["b"][-2] == "nan"


@pytest.mark.parametrize("config", [None, '{"seed": 0,', "[1]"])
def test_without_a_config_a_run_stands_for_itself(config, tmp_path, tableonly, capsys):
    for name in "ab":
        run_folder(tmp_path / name, ROWS)
        if config:
            (tmp_path / name / "config.json").write_text(config)
    rows, text = shown(capsys, tmp_path / "*")
    assert rows["a"][1] == rows["b"][1] == "1" and "changed: unknown, no config.json" in under(text, "b")
    assert "b at step 1000 of ?, last row 0 min ago" in under(text, "b") and rows["b"][-1] == "nan"


def test_runs_that_have_just_begun_are_named(tmp_path, tableonly, capsys):
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"se')
    run(tmp_path / "c", [0.3])
    (tmp_path / "c/bach.jsonl").write_text('{"step": 0, "bach": null}\n{"step": 100, "bach": NaN}\n{"step": 200}\n')
    rows, text = shown(capsys, tmp_path / "*")
    assert text.count("no point of the curve yet") == 2 and text.startswith(f"{tmp_path}/b: no point") and "a" in rows
    assert "b: no point of the curve yet" in shown(capsys, tmp_path / "b")[1]


@pytest.mark.parametrize("file", ["bach.jsonl", "metrics.jsonl"])
def test_a_damaged_file_is_named_once_the_others_are_shown(file, tmp_path, capsys, tableonly):
    for name in "abc":
        run(tmp_path / name, [0.3, 0.4, 0.5, 0.6], kde=name)
    lines = (tmp_path / f"b/{file}").read_text().splitlines(keepends=True)
    (tmp_path / f"b/{file}").write_text(lines[0] + lines[1][:9] + "".join(lines[2:]))
    with pytest.raises(ValueError, match=f"/b/{file}: each line must be a JSON object") as e:
        shown(capsys, tmp_path / "*")
    assert "\n" not in str(e.value)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][2:5] == ["a", "c", "changed:"]
    with pytest.raises(ValueError, match=f"/b/{file}: each line.*; parent=b: no such run with a curve; there are a, c"):
        shown(capsys, tmp_path / "*", parent="b")


def test_the_command_shows_the_rest_and_fails_with_one_line(tmp_path):
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6])
    run_folder(tmp_path / "b", ROWS)
    (tmp_path / "b/bach.jsonl").write_text('{"step": 0, "ba\n{"step": 1, "bach": 0.5}\n')
    done = command(f"--runs={tmp_path}/*", f"--out={tmp_path}/x.png")
    assert done.returncode == 1 and done.stderr.startswith(f"eval_bach: {tmp_path}/b/bach.jsonl: each line must")
    assert len(done.stderr.splitlines()) == 1 and "0.6000 +- 0.0100" in done.stdout


def test_no_match_and_no_such_parent_are_one_line(tmp_path, tableonly, capsys):
    with pytest.raises(ValueError, match="^runs=nowhere/.*: no folder with a bach.jsonl; train with bach_dir set"):
        curves.show("nowhere/*")
    run(tmp_path / "a", [0.3, 0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match="^parent=out/b: no such run with a curve; there are a$"):
        shown(capsys, tmp_path / "*", parent="out/b")


def test_every_kind_of_curve_can_be_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for i in range(9):  # more than there are colours
        run(tmp_path / f"high_{i}", [0.8, 0.9], std=None if i else 0.01, kde=str(i))
    for seed in range(2):
        run(tmp_path / f"low-s{seed}", [0.3, 0.4, 0.5, 0.6], seed=seed)
    for runs in ("*", "low*", "high_0"):
        path = shown(capsys, tmp_path / runs, out=tmp_path / "x.png")[1].splitlines()[-1]
        with Image.open(path) as page:
            assert np.asarray(page.convert("L")).std() > 10
