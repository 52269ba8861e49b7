"""What the tests of several files share."""
import os
import runpy
import socket
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_bach

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


PHOTOS = "ICIAR2018_BACH_Challenge/Photos"


@pytest.fixture(scope="session")
def bach_template(tmp_path_factory):
    """A BACH-shaped folder of 64x48 images whose colour tells the class, with clutter that must be ignored."""
    root, rng = tmp_path_factory.mktemp("bach"), np.random.default_rng(0)
    for label, (name, prefix) in enumerate(eval_bach.CLASSES.items()):
        folder = root / PHOTOS / name
        folder.mkdir(parents=True)
        for i in range(1, 101):
            pixels = rng.integers(0, 100, (48, 64, 3)) + np.array([90, 30, 30]) * (np.arange(3)[None] == label - 1)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{prefix}{i:03d}.tif")
        for clutter in ("Thumbs.db", f"._{prefix}001.tif"):
            (folder / clutter).write_bytes(b"x")
    return root


@contextmanager
def one_line(pattern):
    """The block refuses what a user wants, in one line that holds the pattern."""
    with pytest.raises((ValueError, SystemExit), match=pattern) as e:
        yield
    assert "\n" not in str(e.value)


@pytest.fixture
def script(monkeypatch, capsys):
    """script(file, *flags) runs a script in this process and returns what it prints. A launch would import torch."""
    def run(file, *flags):
        monkeypatch.setattr(sys, "argv", [file, *map(str, flags)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / file), run_name="__main__")
        return capsys.readouterr().out
    return run


def as_rank(port, rank, world, function, arguments):
    """Call a function as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(ROOT)
    try:
        return function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # it breaks the pool, which ends the ranks that wait for this one


@pytest.fixture(scope="session")
def on_ranks():
    """
    on_ranks(world, function, *arguments): what a function returns on each rank, in processes of their own.

    They are forked from one process that has imported torch, which takes seconds, and computed nothing.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["conftest", "test_train", "checkpoint", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def run(world, function, *arguments):
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        with ProcessPoolExecutor(world, context) as pool:
            ranks = [pool.submit(as_rank, port, rank, world, function, arguments) for rank in range(world)]
            return [rank.result() for rank in ranks]
    return run
