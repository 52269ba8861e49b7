"""What the tests of several files share."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the networks of the tests are too small to gain from more, and CI machines are shared


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    """A folder of 24 smooth images."""
    folder, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for i in range(24):
        image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((72, 72), Image.BICUBIC)
        image.save(folder / f"{i:02d}.png")
    return str(folder)


@pytest.fixture
def script(monkeypatch, capsys):
    """script(file, *flags) runs a script in this process and returns what it prints. A launch would import torch."""
    def run(file, *flags):
        monkeypatch.setattr(sys, "argv", [file, *map(str, flags)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / file), run_name="__main__")
        return capsys.readouterr().out
    return run
