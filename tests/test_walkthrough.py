"""The README's four commands from a folder of slides to a run, word for word: on the toy slides and on real ones."""
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

SLIDES = ROOT.parent / "shared/data/slides"
pytestmark = pytest.mark.slow  # make test-slow


def commands():
    """The lines of the first block of the data section, as lists of arguments."""
    section = (ROOT / "README.md").read_text().split("## Data\n")[1]
    lines = re.findall(r"^    python (.*)$", section.split("\n## ")[0], re.M)
    assert len(lines) == 4, lines
    return [shlex.split(line) for line in lines]


def walk(folder, slides):
    """Run the commands in a folder, on other slides; their exit statuses."""
    statuses = []
    for script, *flags in commands():
        flags = [f"--slides={slides}" if flag.startswith("--slides=d") else flag for flag in flags]
        flags = [str(ROOT / flag) if flag.endswith(".py") else flag for flag in flags]
        if script == "train.py":
            flags += ["--max_steps=3", "--bach_dir=", "--save_interval=0", "--batch_size=8", "--workers=0"]
        done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, capture_output=True, text=True)
        print(script, flags, done.stdout[-2000:], done.stderr[-2000:])
        assert "Traceback" not in done.stderr
        statuses.append(done.returncode)
    return statuses


def test_on_the_toy_slides(tmp_path):
    subprocess.run([sys.executable, ROOT / "prepare/toy.py"], cwd=tmp_path, check=True)
    assert walk(tmp_path, "data/toy/slides/*") == [0] * 4
    assert len(list((tmp_path / "out/report").glob("*.png"))) == 10
    assert len(list((tmp_path / "data/tiles").glob("*.tar"))) == 10 == len(list((tmp_path / "data/masks").iterdir()))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/tiles/metrics.jsonl").open()]
    assert losses[-1] > 0


@pytest.mark.skipif(not SLIDES.is_dir(), reason="the real slides are not in ../shared/data/slides")
def test_on_real_slides_of_which_some_cannot_be_used(tmp_path):
    assert walk(tmp_path, f"{SLIDES}/*") == [0, 1, 0, 0], "tiles says by its status that slides have failed"
    assert len((tmp_path / "data/tiles/failed.csv").read_text().splitlines()) == 3
