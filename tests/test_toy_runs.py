"""The recorded toy runs: the pages show what they say, and the code still computes what they recorded."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import configs  # noqa: E402
import toy_ablations  # noqa: E402

import curves  # noqa: E402

RECORD = ROOT / "docs/toy_runs"
RUNS = toy_ablations.commands() | {toy_ablations.PRETRAIN: ["config/toy_pretrain.py"]}
STEPS = 10  # until the first row of metrics.jsonl
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # as recorded


def rows(folder, file="metrics.jsonl"):
    return {row["step"]: row for row in map(json.loads, (folder / file).open())}


def test_every_ablation_is_recorded_to_its_end_with_three_seeds_by_one_commit():
    codes = set()
    for folder in RUNS:
        config = json.loads((RECORD / folder / "config.json").read_text())
        assert max(rows(RECORD / folder, "bach.jsonl")) == config["max_steps"] == max(rows(RECORD / folder)), folder
        codes.add(curves.read_code(str(RECORD / folder)))
    assert {str(p.parent.relative_to(RECORD)) for p in RECORD.rglob("config.json")} == set(RUNS)
    assert len(codes) == 1 and "+" not in codes.pop(), "runs of one commit, without changes"
    for folder in configs.FOLDERS:
        assert all(len(group.used) == 3 for group in configs.groups(folder).values())
        assert all(run.crowding for group in configs.groups(folder).values() for run in group.used)


def test_a_recorded_run_s_config_is_its_launch_line_s():
    """A default or a config that has changed since leaves its runs behind."""
    from test_configs import resolve

    for folder, (*files, seed) in ((f, a) for f, a in RUNS.items() if f != toy_ablations.PRETRAIN):
        now = resolve(*(ROOT / file for file in files)) | {"seed": int(seed.split("=")[1])}
        then, now = json.loads((RECORD / folder / "config.json").read_text()), json.loads(json.dumps(now))
        assert not (k := [k for k in now if k not in curves.REPEAT and then.get(k, "?") != now[k]]), (folder, k)
        assert then["seed"] == now["seed"]


@pytest.mark.parametrize("name", configs.PAGES)
def test_pages_show_what_the_code_computes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert configs.page(name, str(tmp_path)) == (ROOT / name).read_text(), "run python bench/configs.py"


def test_a_changed_row_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in configs.PAGES:
        text = (ROOT / name).read_text()
        for line in [line for line in text.splitlines() if line.startswith(("    recipe ", "| vitg_koleo.py"))]:
            wrong = text.replace(line, line.replace("0.", "0.9", 1))
            monkeypatch.setattr(Path, "read_text", lambda self, wrong=wrong: wrong)
            assert configs.page(name, str(tmp_path)) == text, line
            monkeypatch.undo()
            monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for flags in ([], ["--seed=1", "--out=data/toy_other"]):
        subprocess.run([sys.executable, ROOT / "prepare/toy.py", *flags], cwd=folder, check=True, env=ENV)
    levels = ["--slides=data/toy/slides/*", "--out=data/toy/levels.txt", "--tile_px=128", "--passes=350"]
    subprocess.run([sys.executable, ROOT / "prepare/levels.py", *levels], cwd=folder, check=True, env=ENV)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("folder", [f for f in RUNS if f.endswith("_0") and not f.startswith("continued")])
def test_the_code_still_computes_what_was_recorded(folder, worlds):
    """
    The first steps of a run anew, from slides to losses; BACH at step 0 for the recipe. Continued runs need weights
    that take a quarter of an hour: of these it is the pretraining that is begun again.
    """
    bach = [] if "recipe" in folder else ["--bach_dir="]
    schedule = json.loads((RECORD / folder / "config.json").read_text())["max_steps"]
    files = [f"{ROOT}/{a}" if a.endswith(".py") else a for a in RUNS[folder]]
    flags = [f"--max_steps={STEPS}", "--save_interval=0", f"--schedule_steps={schedule}", f"--out_dir=out/{folder}"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *files, *flags, *bach], cwd=worlds, capture_output=True,
                          text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    now, then = (rows(place / folder) for place in (worlds / "out", RECORD))
    tight, loose = ("loss", "dino", "ibot", "lr", "wd", "teacher_temp"), ("kde", "grad_norm", "cls_rank", "cls_cosine")
    for keys, limits in ((tight, dict(rel=1e-3)), (loose, dict(rel=0.05, abs=0.01))):  # for another processor's rounding
        a, b = ({k: of[STEPS][k] for k in keys} for of in (now, then))
        assert a == pytest.approx(b, **limits)
    if not bach:
        a, b = (rows(place / folder, "bach.jsonl")[0] for place in (worlds / "out", RECORD))
        assert {k: a[k] for k in ("bach", "effective_rank", "mean_cosine")} == pytest.approx(
            {k: b[k] for k in ("bach", "effective_rank", "mean_cosine")}, rel=1e-2)
