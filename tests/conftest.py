"""What the tests of several files share."""
import os
import runpy
import socket
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context
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


def as_rank(port, rank, world, function, arguments):
    """Call a function as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(world)}
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
