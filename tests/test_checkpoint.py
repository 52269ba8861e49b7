"""Checkpoints: what survives a stop at any moment, and what is refused. The test with many kills is slow."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from test_train import ROOT, bit_equal, flags, refused, timeless, train, weights

import checkpoint


def exported(folder, step):
    return torch.load(f"{folder}/teacher/{step}.pth", weights_only=True)["teacher"]


def launch(*argv, ranks=1, **kwargs):
    many = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *many, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_save_holds_what_was_there_when_it_began(tmp_path, group):
    """The bug: training continues while a thread writes, and the file has numbers of both steps."""
    state = {"w": torch.zeros(1000, 1000), "n": {"step": 0}}
    saver = checkpoint.Saver(str(tmp_path), keep=2, keep_every=0)
    for step in range(1, 6):
        state["w"].fill_(step)
        state["n"]["step"] = step
        saver.save(step, state)
        state["w"].fill_(-1)
        state["n"]["step"] = -1
    saver.finish()
    assert sorted(os.listdir(tmp_path)) == ["4", "5"]
    for step in (5, 4):
        loaded = {"w": torch.zeros(1000, 1000), "n": {"step": 0}}
        assert checkpoint.load(str(tmp_path), loaded, print) == step
        assert (loaded["w"] == step).all() and loaded["n"]["step"] == step
        shutil.rmtree(tmp_path / str(step))


@pytest.mark.parametrize("keep, keep_every, left", [(1, 0, [6]), (2, 3, [3, 5, 6]), (0, 0, [1, 2, 3, 4, 5, 6])])
def test_the_newest_and_every_nth_are_kept(keep, keep_every, left, tmp_path, group):
    saver = checkpoint.Saver(str(tmp_path), keep, keep_every)
    for step in range(1, 7):
        saver.save(step, {"w": torch.zeros(3)})
    saver.finish()
    assert checkpoint.complete(tmp_path) == left


DAMAGE = {"truncated": lambda folder: os.truncate(max(folder.glob("*.distcp"), key=os.path.getsize), 50_000),
          "no_metadata": lambda folder: (folder / ".metadata").unlink(),
          "bad_metadata": lambda folder: (folder / ".metadata").write_bytes(b"x" * 100),
          "no_shard": lambda folder: next(folder.glob("*.distcp")).unlink()}


@pytest.fixture(scope="module")
def finished(tiles, tmp_path_factory):
    """The flags of a run of three steps that keeps each, without its out_dir; that; its weights."""
    argv = flags(tiles=tiles, save_interval=1, keep_checkpoints=0, max_steps=3)
    folder = tmp_path_factory.mktemp("finished") / "a"
    with pytest.MonkeyPatch.context() as patch:
        return argv, folder, weights(train(patch, [*argv, f"--out_dir={folder}"]))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, finished, tmp_path, monkeypatch, capsys):
    argv, folder, straight = finished
    shutil.copytree(folder, tmp_path / "a")
    for foreign in ("notes", "7"):
        (tmp_path / "a/ckpt" / foreign).mkdir()
        (tmp_path / "a/ckpt" / foreign / "mine.txt").write_text("x")
    DAMAGE[damage](tmp_path / "a/ckpt/3")
    resumed = train(monkeypatch, [*argv, f"--out_dir={tmp_path}/a", "--resume=true"])
    said = capsys.readouterr().out
    bit_equal(straight, weights(resumed))
    assert "ckpt/7 is no checkpoint" in said and "resume: step 2" in said
    assert ("ckpt/3 is no checkpoint" if damage == "no_metadata" else "ckpt/3 does not load: ") in said
    assert (tmp_path / "a/ckpt/notes/mine.txt").exists() and (tmp_path / "a/ckpt/7/mine.txt").exists()
    assert checkpoint.complete(tmp_path / "a/ckpt") == [1, 2, 3]  # 3 was written again
    assert (tmp_path / "a/ckpt/3.damaged").exists() == (damage != "no_metadata")


def test_checkpoints_of_another_architecture_are_named_and_left_alone(finished, monkeypatch):
    argv, folder, _ = finished
    message = refused(monkeypatch, [*argv, f"--out_dir={folder}", "--resume=true", "--dino_prototypes=32"])
    assert "ckpt/3 does not load: " in message and "go back to its arch" in message and "\n" not in message
    assert sorted(os.listdir(folder / "ckpt")) == ["1", "2", "3"]


def fill_the_disk(folder):
    """The message of a second save, during which no file may grow beyond 200 kB."""
    dist.init_process_group("gloo")
    saver = checkpoint.Saver(folder, 1, 0)
    saver.save(1, {"w": torch.zeros(1000)})
    saver.finish()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    saver.save(2, {"w": torch.zeros(1_000_000)})
    with pytest.raises(ValueError) as e:
        saver.finish()
    return str(e.value)


def test_a_full_disk_keeps_the_last_checkpoint_and_names_the_path(on_ranks, tmp_path):
    said, = on_ranks(1, fill_the_disk, f"{tmp_path}/ckpt")
    assert f"{tmp_path}/ckpt/unfinished could not be written (" in said
    assert f"{tmp_path}/ckpt/1 is whole" in said and checkpoint.complete(tmp_path / "ckpt") == [1]


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_preempted_run_saves_and_resumes_as_if_uninterrupted(number, ranks, tiles, tmp_path):
    keys = dict(tiles=tiles, arch="toy", max_steps=40, schedule_steps=40, workers=1)
    straight = launch(*flags(**keys, out_dir=tmp_path / "a"), ranks=ranks)
    straight.communicate(timeout=300)
    run = launch(*flags(**keys, out_dir=tmp_path / "b"), ranks=ranks, start_new_session=True)
    wait_for(run, "step 5/")
    if ranks > 1:  # to one rank, as a node's agent may send it; the others are told
        number_of = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(number_of[-1]), number)
    else:
        os.killpg(run.pid, number)  # to the data workers too, as scancel does
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and "stopped by a signal after step" in said and "--resume=true" in said, said
    assert checkpoint.complete(tmp_path / "b/ckpt")[-1] < 40
    resumed = launch(*flags(**keys, out_dir=tmp_path / "b", resume="true"), ranks=ranks)
    assert resumed.wait() == 0
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    bit_equal(exported(tmp_path / "a", 40), exported(tmp_path / "b", 40))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tiles, tmp_path):
    """One rank of two is killed, or both, also inside a save. Each run resumes from the last complete checkpoint."""
    keys = dict(tiles=tiles, arch="toy", max_steps=120, schedule_steps=120, save_interval=4, keep_checkpoints=2)
    straight = launch(*flags(**keys, out_dir=tmp_path / "a"), ranks=2)
    assert straight.communicate()[0] and straight.returncode == 0
    draw, kills, inside = random.Random(0), 0, 0
    while not checkpoint.complete(tmp_path / "b/ckpt") or checkpoint.complete(tmp_path / "b/ckpt")[-1] < 120:
        before = checkpoint.complete(tmp_path / "b/ckpt")
        if not before and (tmp_path / "b").exists():
            shutil.rmtree(tmp_path / "b")
        run = launch(*flags(**keys, out_dir=tmp_path / "b", resume=str(bool(before)).lower()), ranks=2)
        said = ""
        if kills < 20:
            said = wait_for(run, "/120: " if kills % 3 else "saved: ")  # the thread is still writing then
            time.sleep(draw.random() * 1.5 if kills % 3 else draw.random() * 0.05)
            inside += (tmp_path / "b/ckpt/unfinished").exists()
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
            for pid in ranks if kills % 2 else ranks[:1]:
                subprocess.run(["kill", "-9", pid])
            kills += 1
        started = time.time()
        said += run.communicate()[0]
        assert time.time() - started < 60 or not run.returncode, said  # the other rank does not wait forever
        after = checkpoint.complete(tmp_path / "b/ckpt")
        assert after[-1:] >= before[-1:], (before, after)
        if before:
            assert f"\nresume: step {before[-1]} of " in said, said
    assert kills == 20
    print(f"{inside} of {kills} kills inside a save")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    bit_equal(exported(tmp_path / "a", 120), exported(tmp_path / "b", 120))
    assert json.load(open(tmp_path / "b/config.json"))["max_steps"] == 120
