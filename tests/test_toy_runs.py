"""The recorded toy runs: the pages show what they say, and the code still computes what they recorded."""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import curves
from bench import configs, toy_ablations
from prepare.stats import train_config

RECORD = ROOT / "docs/toy_runs"
RUNS = toy_ablations.commands()
STEPS = 10  # until the first row of metrics.jsonl
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # as recorded


def rows(folder, file="metrics.jsonl"):
    return {row["step"]: row for row in map(json.loads, (folder / file).open())}


def test_every_ablation_is_recorded_to_its_end_with_all_its_seeds_by_one_commit():
    commits = set()
    for folder in RUNS:
        config = json.loads((RECORD / folder / "config.json").read_text())
        metrics, bach = rows(RECORD / folder), rows(RECORD / folder, "bach.jsonl")
        assert max(bach) == config["max_steps"] == max(metrics), folder
        assert any("cls_rank" in row and "cls_cosine" in row for row in metrics.values())
        source = (RECORD / folder / "source.diff").read_text()
        assert not re.search(r"(?m)^diff --git a/(?!config/|tests/)\S+\.py ", source), "changed code"
        commits |= set(re.findall(r"(?m)^[0-9a-f]{40}$", source))
    assert {str(p.parent.relative_to(RECORD)) for p in RECORD.rglob("config.json")} == set(RUNS)
    for folder, (_, seeds, names) in toy_ablations.ABLATIONS.items():
        used = {name: len(group.used) for name, group in configs.groups(folder).items()}
        assert used == dict.fromkeys(names, len(seeds))
    assert len(commits) == 1


@pytest.mark.parametrize("folder", RUNS)
def test_a_recorded_run_s_config_is_its_launch_line_s(folder):
    """A default or a config that has changed since leaves its runs behind. A key that came later does not matter."""
    *files, seed = RUNS[folder]
    now = json.loads(json.dumps(train_config([*(f"{ROOT}/{file}" for file in files), seed])))
    then = json.loads((RECORD / folder / "config.json").read_text())
    assert [k for k in then if k in now and k not in curves.REPEAT and then[k] != now[k]] == []
    assert then["seed"] == now["seed"]


@pytest.mark.parametrize("page, tables", [("README.md", 1), ("docs/toy.md", 3)])
def test_pages_show_what_the_code_computes_and_a_changed_row_is_noticed(page, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    assert configs.fill(text, tmp_path) == text, "run python bench/configs.py"
    assert len(re.findall(configs.TABLE, text)) == tables
    wrong = re.sub(r"(?m)^((    koleo|\| ablate/koleo).*)0\.", r"\g<1>9.", text)
    assert wrong.count("9.") >= text.count("9.") + tables and configs.fill(wrong, tmp_path) == text


@pytest.mark.parametrize("path", sorted((ROOT / "config/ablate").glob("*.py")), ids=lambda path: path.stem)
def test_a_header_s_result_is_the_record_s(path):
    text = path.read_text()
    for folder, (_, seeds, _) in toy_ablations.ABLATIONS.items():
        against = configs.against(folder, path.stem)
        assert against == "-" or re.search(rf"{folder}: .*, {re.escape(against)}, {len(seeds)} seeds", text)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    levels = ["--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128", "--passes=350"]
    for script, *flags in (["toy"], ["toy", "--seed=1", "--out=data/toy_other"], ["levels", *levels]):
        subprocess.run([sys.executable, ROOT / f"prepare/{script}.py", *flags], cwd=folder, check=True, env=ENV)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("folder", [f for f in RUNS if f.endswith("_0") and not f.startswith("tiles")])
def test_the_code_still_computes_what_was_recorded(folder, worlds):
    """
    The first steps of a run again, from slides to losses; BACH at step 0 for the recipe. Continued runs need weights
    that take a quarter of an hour, so of these the pretraining is begun again. Real tiles are not at hand here.
    """
    bach = [] if "recipe" in folder else ["--bach_dir="]
    schedule = json.loads((RECORD / folder / "config.json").read_text())["max_steps"]
    files = [f"{ROOT}/{a}" if a.endswith(".py") else a for a in RUNS[folder]]
    flags = [f"--max_steps={STEPS}", "--save_interval=0", f"--schedule_steps={schedule}", f"--out_dir=out/{folder}"]
    command = [sys.executable, ROOT / "train.py", *files, *flags, *bach, "--device=cpu"]
    done = subprocess.run(command, cwd=worlds, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    if not bach:
        now, then = (rows(place / folder, "bach.jsonl")[0] for place in (worlds / "out", RECORD))
        keys = ("bach", "effective_rank", "mean_cosine")
        assert {k: now[k] for k in keys} == pytest.approx({k: then[k] for k in keys}, rel=1e-2)
    now, then = (rows(place / folder)[STEPS] for place in (worlds / "out", RECORD))
    scheduled = ("lr", "wd", "teacher_temp")
    assert {k: now[k] for k in scheduled} == pytest.approx({k: then[k] for k in scheduled}, rel=1e-3)
    tight, loose = ("loss", "dino", "ibot"), ("kde", "grad_norm", "cls_rank", "cls_cosine")
    for keys, limits in ((tight, dict(rel=1e-3)), (loose, dict(rel=0.05, abs=0.01))):  # another processor rounds anew
        assert {k: now[k] for k in keys} == pytest.approx({k: then[k] for k in keys}, **limits)
