"""The README walked: from a folder of slides to a run, on the toy's and real ones; and its four kinds of changes."""
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train import TINY, bit_equal, timeless

SLIDES = ROOT.parent / "shared/data/slides"


# ---- from a folder of slides to a run -------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_on_the_toy_slides(tmp_path):
    subprocess.run([sys.executable, ROOT / "prepare/toy.py"], cwd=tmp_path, check=True)
    assert walk(tmp_path, "data/toy/slides/*") == [0] * 4
    assert len(list((tmp_path / "out/report").glob("*.png"))) == 10
    assert len(list((tmp_path / "data/tiles").glob("*.tar"))) == 10 == len(list((tmp_path / "data/masks").iterdir()))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/tiles/metrics.jsonl").open()]
    assert losses[-1] > 0


@pytest.mark.slow
@pytest.mark.skipif(not SLIDES.is_dir(), reason="the real slides are not in ../shared/data/slides")
def test_on_real_slides_of_which_some_cannot_be_used(tmp_path):
    assert walk(tmp_path, f"{SLIDES}/*") == [0, 1, 0, 0], "tiles says by its status that slides have failed"
    assert len((tmp_path / "data/tiles/failed.csv").read_text().splitlines()) == 3


# ---- change something -----------------------------------------------------------------------------------------------

CHANGES = {  # as the README words them: [(file, a place in it, the text that goes before it)], flags that switch it on
    "key": ([
        ("train.py", "seed = 0\n", "lr_factor = 1.0  # of the learning rate at every step\n"),
        ("model.py", '    return {"lr": lr,', '    lr *= config["lr_factor"]\n')], {"lr_factor": 2.0}),
    "augmentation": ([
        ("train.py", "seed = 0\n", "solarize_prob = 0.0  # share of crops whose light pixels are inverted\n"),
        ("data.py", '        "gray": ', '        "solarize": draw("solarize", 1)[:, 0] < config["solarize_prob"],\n'),
        ("data.py", '    change(x, colour["gray"]', '    change(x, colour["solarize"], solarize)\n'),
        ("data.py", "def gray(", '''def solarize(x):
    return torch.where(x < 0.5, x, 1 - x)


''')], {"solarize_prob": 0.5}),
    "source": ([
        ("train.py", "seed = 0\n", 'noise = ""  # tiles of random grey levels from 0 to this one, such as 255\n'),
        ("sources.py", '"slides": Slides', '"noise": Noise, '),
        ("sources.py", "SOURCES = {", '''class Noise:
    def __init__(self, value, config):
        self.most, self.about = int(value), f"noise from 0 to {value}"

    def read(self, n, attempt=0):
        if n == 1 and attempt == 0:
            raise OSError("noise: sample 1 is missing")
        tile = np.random.default_rng((n, attempt)).integers(0, self.most, (64, 64, 3), dtype=np.uint8)
        return tile, {"slide": "noise", "x": 0, "y": 0, "mpp": math.nan}


''')], {"noise": "255", "tiles": ""}),
    "loss": ([
        ("train.py", "seed = 0\n", "energy_weight = 0.0  # pulls class tokens towards 0\n"),
        ("train.py", '"dino": 1.0', '"energy": energy_weight, '),
        ("train.py", '        "dino": sum(', '        "energy": model.energy_loss(out[0]["cls"]),\n'),
        ("model.py", "def schedules(", '''def energy_loss(cls):
    return cls.float().square().mean()


''')], {"energy_weight": 1.0}),
}


def copied(folder, edits=()):
    """The code in a folder of its own, edited."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("prepare/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    for file, place, text in edits:
        code = (folder / file).read_text()
        assert code.count(place) == 1, (file, place)
        (folder / file).write_text(code.replace(place, text + place))
    return folder


def train_copy(folder, *runs):
    """Three steps of a folder's code for each {key: value}, in a process that had ROOT's. They write to 0/, 1/, ..."""
    own = {path.stem for path in folder.iterdir()}
    for name in list(sys.modules):
        if name.split(".")[0] in own:
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    for number, keys in enumerate(runs):
        keys = {**TINY, "arch": "toy", "depth": 1, "max_steps": 3, "out_dir": folder / str(number), **keys}
        sys.argv = ["train.py", *(f"--{key}={value}" for key, value in keys.items())]
        runpy.run_path(f"{folder}/train.py", run_name="__main__")
        if dist.is_initialized():
            dist.destroy_process_group()


def trained(out):
    """(rows without what is the machine's or new, weights)"""
    return timeless(out, "energy"), torch.load(out / "teacher/3.pth", weights_only=True)["teacher"]


@pytest.fixture(scope="module")
def unchanged(on_ranks, tiles, tmp_path_factory):
    folder = copied(tmp_path_factory.mktemp("unchanged"))
    on_ranks(1, train_copy, folder, {"tiles": tiles})
    return trained(folder / "0")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_off_moves_no_bit(change, unchanged, on_ranks, tiles, tmp_path):
    """The bug: an augmentation that was off changed every later crop's colours. Switched on, each change trains."""
    edits, on = CHANGES[change]
    on_ranks(1, train_copy, copied(tmp_path, edits), {"tiles": tiles}, {"tiles": tiles, **on})
    (rows, weights), (rows_on, weights_on) = trained(tmp_path / "0"), trained(tmp_path / "1")
    assert rows == unchanged[0] and all(row["loss"] > 0 for row in rows[1:])
    bit_equal(weights, unchanged[1])
    assert rows_on[-1]["bad_tiles"] == (change == "source") and rows_on[-1]["bad_steps"] == 0
    assert any(not torch.equal(weights_on[name], weights[name]) for name in weights)


@pytest.mark.parametrize("change, places", [
    ("key", 'train.py config["key"]'), ("augmentation", "data.py colour_parameters draw augment"),
    ("source", "sources.py about read OSError size left_out SOURCES train.py"),
    ("loss", "model.py train.py loss_weights losses")])
def test_the_readme_names_the_places_of_each_change(change, places):
    section = (ROOT / "README.md").read_text().split("## Change something\n")[1].split("\n## ")[0]
    item, = re.findall(rf"(?ms)^- an? {change}\b.*?(?=^- |^$)", section)
    assert [place for place in places.split() if place not in item] == []
