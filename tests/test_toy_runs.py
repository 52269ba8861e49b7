"""The recorded toy runs: the pages show what they say, and the code still computes what they recorded."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
import configs  # noqa: E402
import toy_ablations  # noqa: E402

import curves  # noqa: E402
import data  # noqa: E402

RECORD = ROOT / "docs/toy_runs"
RUNS = toy_ablations.commands() | {toy_ablations.PRETRAIN: ["config/toy_pretrain.py", "--seed=0"]}
STEPS = 10  # until the first row of metrics.jsonl
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # as recorded


def rows(folder, file="metrics.jsonl"):
    return {row["step"]: row for row in map(json.loads, (folder / file).open())}


def test_every_ablation_is_recorded_to_its_end_with_three_seeds_by_one_commit():
    for folder in RUNS:
        config = json.loads((RECORD / folder / "config.json").read_text())
        assert max(rows(RECORD / folder, "bach.jsonl")) == config["max_steps"] == max(rows(RECORD / folder)), folder
    assert {str(p.parent.relative_to(RECORD)) for p in RECORD.rglob("config.json")} == set(RUNS)
    for folder in configs.FOLDERS:
        found = configs.groups(folder)
        assert all(len(group.used) == 3 and all(run.crowding for run in group.used) for group in found.values())
        codes = {group.runs[0].setting["code"] for group in found.values()}
        assert len(codes) == 1 and "+" not in (code := codes.pop()) and code != "unknown", codes


def test_a_recorded_run_s_config_is_its_launch_line_s():
    """A default or a config that has changed since leaves its runs behind; a new key at its default does not."""
    from test_configs import resolve

    defaults = json.loads(json.dumps(data.train_keys()))
    for folder, (*files, seed) in RUNS.items():
        now = json.loads(json.dumps(resolve(*(ROOT / file for file in files))))
        then = defaults | json.loads((RECORD / folder / "config.json").read_text())
        assert not (k := [k for k in now if k not in curves.REPEAT and then[k] != now[k]]), (folder, k)
        assert then["seed"] == int(seed.split("=")[1])


@pytest.mark.parametrize("name, tables", [("README.md", 3), ("docs/toy.md", 2)])
def test_pages_show_what_the_code_computes_and_a_changed_row_is_noticed(name, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text, brief = (ROOT / name).read_text(), name == "README.md"
    assert configs.page(text, str(tmp_path), brief) == text, "run python bench/configs.py"
    assert len(re.findall(configs.COMMAND, text)) + len(re.findall(configs.TABLE, text)) == tables
    lines = [line for line in text.splitlines() if line.startswith(("    recipe ", "    koleo ", "| vitg_koleo.py"))]
    assert len(lines) >= tables
    for line in lines:
        wrong = text.replace(line, line.replace("0.", "0.9", 1))
        assert wrong != text == configs.page(wrong, str(tmp_path), brief), line


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for flags in ([], ["--seed=1", "--out=data/toy_other"]):
        subprocess.run([sys.executable, ROOT / "prepare/toy.py", *flags], cwd=folder, check=True, env=ENV)
    levels = ["--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128", "--passes=350"]
    subprocess.run([sys.executable, ROOT / "prepare/levels.py", *levels], cwd=folder, check=True, env=ENV)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("folder", [f for f in RUNS if f.endswith("_0")])
def test_the_code_still_computes_what_was_recorded(folder, worlds):
    """
    The first steps of a run anew, from slides to losses; BACH at step 0 for the recipe. Continued runs need weights
    that take a quarter of an hour: of these it is the pretraining that is begun again.
    """
    bach = [] if "recipe" in folder else ["--bach_dir="]
    schedule = json.loads((RECORD / folder / "config.json").read_text())["max_steps"]
    files = [f"{ROOT}/{a}" if a.endswith(".py") else a for a in RUNS[folder]]
    flags = [f"--max_steps={STEPS}", "--save_interval=0", f"--schedule_steps={schedule}", f"--out_dir=out/{folder}"]
    command = [sys.executable, ROOT / "train.py", *files, *flags, *bach, "--device=cpu"]
    done = subprocess.run(command, cwd=worlds, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    now, then = (rows(place / folder) for place in (worlds / "out", RECORD))
    tight, loose = ("loss", "dino", "ibot", "lr", "wd", "teacher_temp"), ("kde", "grad_norm", "cls_rank", "cls_cosine")
    for keys, limits in ((tight, dict(rel=1e-3)), (loose, dict(rel=0.05, abs=0.01))):  # another processor rounds anew
        a, b = ({k: of[STEPS][k] for k in keys} for of in (now, then))
        assert a == pytest.approx(b, **limits)
    if not bach:
        a, b = (rows(place / folder, "bach.jsonl")[0] for place in (worlds / "out", RECORD))
        assert {k: a[k] for k in ("bach", "effective_rank", "mean_cosine")} == pytest.approx(
            {k: b[k] for k in ("bach", "effective_rank", "mean_cosine")}, rel=1e-2)
