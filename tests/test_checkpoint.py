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
import rundir


def exported(folder, step):
    return torch.load(f"{folder}/teacher/{step}.pth", weights_only=True)["teacher"]


LOG = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # a line is in a log as soon as it is said


def launch(*argv, ranks=1, **kwargs):
    many = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *many, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env={**os.environ, **LOG}, **kwargs)


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
def test_of_checkpoints_and_exports_the_newest_and_every_nth_are_kept(keep, keep_every, left, tmp_path, group):
    """And what is no export of a step stays."""
    ckpt, exports = tmp_path / "ckpt", tmp_path / "teacher"
    exports.mkdir()
    foreign = {"best.pth", "007.pth", "9.txt"}
    for name in foreign:
        (exports / name).touch()
    saver = checkpoint.Saver(str(ckpt), keep, keep_every)
    for step in range(1, 7):
        saver.save(step, {"w": torch.zeros(3)})
        checkpoint.export(str(exports), [("w", torch.zeros(3))], {"step": step}, keep, keep_every)
    saver.finish()
    assert rundir.complete(ckpt) == left
    assert {path.name for path in exports.iterdir()} == {f"{step}.pth" for step in left} | foreign


def test_an_export_that_cannot_be_deleted_is_said_and_the_one_just_written_never_goes(tmp_path, group, monkeypatch):
    """A resumed run goes back: exports of later steps are there, and are newer than the one that it writes."""
    said, delete = [], os.remove

    def refuse(path):
        if str(path).endswith("/1.pth"):
            raise PermissionError(1, "Operation not permitted")
        delete(path)

    monkeypatch.setattr(os, "remove", refuse)
    for step in (1, 2, 5, 3, 4):
        checkpoint.export(str(tmp_path), [("w", torch.zeros(3))], {"step": step}, 1, 0, said.append)
    assert sorted(os.listdir(tmp_path)) == ["1.pth", "4.pth", "5.pth"]
    assert said[0].startswith(f"{tmp_path}/1.pth is not needed any more and cannot be deleted: PermissionError")


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
    assert rundir.complete(tmp_path / "a/ckpt") == [1, 2, 3]  # 3 was written again
    assert (tmp_path / "a/ckpt/3.damaged").exists() == (damage != "no_metadata")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("key", ["dino_prototypes=32", "depth=1", "depth=3", "global_px=28",
                                 "head_weight_norm=false"])
def test_checkpoints_of_another_architecture_are_named_and_left_alone(key, finished, monkeypatch):
    """The bug: a smaller network took what it had a place for, and its saves replaced the checkpoints."""
    argv, folder, _ = finished
    before = contents(folder)
    message = refused(monkeypatch, [*argv, f"--out_dir={folder}", "--resume=true", f"--{key}"])
    assert "ckpt/3 does not load: " in message and "go back to its keys of the network (config" in message, message
    assert "\n" not in message
    assert contents(folder) == before


def test_a_resumed_run_follows_its_own_keys(finished, tmp_path, monkeypatch):
    """The bug: parameter groups of the checkpoint, while the changed keys were announced; or a KeyError."""
    argv, folder, _ = finished
    shutil.copytree(folder, tmp_path / "a")
    keys = ["--betas=(0.5,0.75)", "--layer_decay=0.5", "--patch_embed_lr=0.1", "--max_steps=4"]
    resumed = train(monkeypatch, [*argv, f"--out_dir={tmp_path}/a", "--resume=true", *keys])
    fresh = train(monkeypatch, [*argv, f"--out_dir={tmp_path}/b", *keys, "--max_steps=0"])
    groups, wanted = (run["optimizer"].param_groups for run in (resumed, fresh))
    assert len(groups) == len(wanted) and all(group["betas"] == (0.5, 0.75) for group in groups)
    assert [(g["lr_scale"], len(g["params"])) for g in groups] == [(g["lr_scale"], len(g["params"])) for g in wanted]
    assert all(moments["step"] == 4 for moments in resumed["optimizer"].state.values()), "moments come from the file"


def self_link(path):
    """A link to itself stands for what may not be read: permissions do not hold back root, who may run the tests."""
    os.rename(path, f"{path}.away")
    os.symlink(path, path)


def become(kind):
    def change(path):
        os.rename(path, f"{path}.away")
        path.mkdir() if kind == "folder" else path.write_text("x")
    return change


@pytest.mark.parametrize("path, change, word", [
    ("ckpt", become("file"), "Not a directory"), ("ckpt", self_link, "symbolic links"),
    ("ckpt/3", self_link, "symbolic links"), ("ckpt/3/.metadata", self_link, "symbolic links"),
    ("ckpt/3/.metadata", become("folder"), "Is a directory"), ("ckpt/3/__0_0.distcp", self_link, "symbolic links"),
    ("config.json", become("folder"), "Is a directory"), ("metrics.jsonl", self_link, "symbolic links"),
    ("lock", become("folder"), "Is a directory")])
def test_what_cannot_be_read_is_named_and_not_damaged(path, change, word, finished, tmp_path, monkeypatch):
    """The bug: a sound checkpoint that is renamed, an older one that is resumed in silence, or a traceback."""
    argv, folder, _ = finished
    shutil.copytree(folder, tmp_path / "a")
    change(tmp_path / "a" / path)
    before = contents(tmp_path / "a/ckpt")
    message = refused(monkeypatch, [*argv, f"--out_dir={tmp_path}/a", "--resume=true"])
    assert word in message and f"{tmp_path}/a/{path}" in message and "\n" not in message, message
    assert contents(tmp_path / "a/ckpt") == before and not list(tmp_path.rglob("*.damaged"))


def make(path, kind):
    if kind in ("link", "loop"):
        path.symlink_to("/nowhere/at/all" if kind == "link" else path)
    elif kind != "missing":
        (path.parent if kind == "file" else path / "ckpt/unfinished").mkdir(parents=True, exist_ok=True)
        (path if kind == "file" else path / "ckpt/unfinished/__0_0.distcp").write_text("x")


@pytest.mark.parametrize("kind, resume, word", [
    ("file", False, "Not a directory"), ("link", False, "No such file"), ("missing", True, "nothing to resume"),
    ("file", True, "Not a directory"), ("loop", True, "symbolic links"), ("loop", False, "symbolic links"),
    ("begun", True, "nothing to resume"), ("begun", False, "is not empty")])
def test_a_folder_that_a_run_cannot_have_is_named_and_left_as_it_is(kind, resume, word, finished, tmp_path,
                                                                     monkeypatch):
    """The bug: a traceback, or a folder that is made where somebody mistyped its name."""
    make(tmp_path / "a", kind)
    before = sorted(tmp_path.rglob("*"))
    message = refused(monkeypatch, [*finished[0], f"--out_dir={tmp_path}/a", f"--resume={resume}"])
    assert word in message and f"{tmp_path}/a" in message and "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
    assert "out_dir = ''" in refused(monkeypatch, [*finished[0], "--out_dir="])


def test_a_finished_run_says_that_nothing_is_left_to_do(finished, tmp_path, monkeypatch, capsys):
    argv, folder, straight = finished
    shutil.copytree(folder, tmp_path / "a")
    resumed = train(monkeypatch, [*argv, f"--out_dir={tmp_path}/a", "--resume=true", "--max_steps=1"])
    said = capsys.readouterr().out
    assert "resume: step 3" in said and "nothing is left to do, max_steps is 1" in said and "done: 3 steps" in said
    bit_equal(straight, weights(resumed))
    for file in ("config.json", "source.diff"):
        assert (tmp_path / "a" / file).read_bytes() == (folder / file).read_bytes(), "they are the run's that came here"


def test_the_keys_of_the_steps_that_are_left_outlast_a_second_resume(tmp_path):
    """The bug: a resume that dies early, and a second one that notes its keys as those of all steps before."""
    for step, lr in ((None, 1), (5, 2), (5, 3)):
        rundir.begin_folder(str(tmp_path), {"max_steps": 9, "lr": lr}, step, print)
    assert json.load(open(tmp_path / "config.before-5.json"))["lr"] == 1
    assert json.load(open(tmp_path / "config.json"))["lr"] == 3


@pytest.mark.parametrize("lost", ["config.json", "nonsense", "rows", ".metadata"])
def test_a_damaged_file_beside_the_checkpoints_is_named(lost, finished, tmp_path, monkeypatch, capsys):
    """The bug: a blank line ends every resume with a traceback, or the advice is to delete what is left."""
    argv, folder, straight = finished
    shutil.copytree(folder, tmp_path / "a")
    argv = [*argv, f"--out_dir={tmp_path}/a", "--resume=true"]
    rows, row = tmp_path / "a/metrics.jsonl", '{"step": 2, "loss": 1.0}'
    if lost == "config.json":
        (tmp_path / "a/config.json").unlink()
    if lost == "nonsense":
        (tmp_path / "a/config.json").write_text('[["seed", "x"], ["base_lr", null], ["gone", {}]]')
    if lost == "rows":
        rows.write_text(f'\n{{"loss": 1}}\n[]\n{row}\n\0\0\n{{"step": 9}}\n{{"st')
        (tmp_path / "a/bach.jsonl").write_bytes(b"\n\xff\n")
    if lost == ".metadata":
        for step in "123":
            (tmp_path / "a/ckpt" / step / ".metadata").unlink()
        message = refused(monkeypatch, argv)
        assert "nothing to resume" in message and "another --out_dir" in message and "delete" not in message
        assert f"{tmp_path}/a/ckpt/3 is no checkpoint: it has no .metadata, a hidden file" in message
        return
    bit_equal(straight, weights(train(monkeypatch, argv)))
    said = capsys.readouterr().out
    assert lost != "config.json" or "config.json is damaged or missing" in said
    assert lost != "nonsense" or "resume: seed was 'x', is now 0" in said
    if lost == "rows":
        assert rows.read_text() == row + "\n" and "metrics.jsonl, line 1 is no row and is dropped" in said
        assert "metrics.jsonl, line 7" in said and "bach.jsonl, line 2" in said and "line 6" not in said


def load_with_a_stale_listing(folder):
    dist.init_process_group("gloo")
    listed = os.listdir
    if dist.get_rank() == 1:
        os.listdir = lambda folder: [name for name in listed(folder) if name != "2"]
    state = {"w": torch.zeros(3)}
    return checkpoint.load(folder, state, print), state["w"][0].item()


def test_rank_0_says_which_checkpoint_all_ranks_load(on_ranks, tmp_path, group):
    """The bug: an older listing on another node, and a network of two steps."""
    saver = checkpoint.Saver(str(tmp_path), keep=0, keep_every=0)
    for step in (1, 2):
        saver.save(step, {"w": torch.full((3,), float(step))})
    saver.finish()
    assert on_ranks(2, load_with_a_stale_listing, str(tmp_path)) == [(2, 2.0)] * 2


def test_a_checkpoint_that_lacks_a_ranks_file_gets_no_number(tmp_path, group, monkeypatch):
    begin = checkpoint.dcp.async_save

    def lose(*args, **kwargs):
        future = begin(*args, **kwargs)
        future.result()
        next((tmp_path / "unfinished").glob("*.distcp")).unlink()
        return future
    monkeypatch.setattr(checkpoint.dcp, "async_save", lose)
    saver = checkpoint.Saver(str(tmp_path), keep=0, keep_every=0)
    saver.save(1, {"w": torch.zeros(3)})
    with pytest.raises(SystemExit, match="__0_0.distcp of another rank is not there"):
        saver.finish()
    assert rundir.complete(tmp_path) == []


def test_saved_is_said_when_it_is_true_and_an_old_checkpoint_may_stay(tmp_path, group, monkeypatch):
    """The bug: a folder that cannot be deleted stops the run."""
    said, delete = [], shutil.rmtree

    def refuse(path, ignore_errors=False):
        if str(path).endswith("/1") and not ignore_errors:
            raise OSError("[Errno 39] Directory not empty")
        delete(path, ignore_errors)

    def say(message):
        said.append(message)
        assert not message.startswith("saved: ") or os.path.exists(message.removeprefix("saved: ") + "/.metadata")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver = checkpoint.Saver(str(tmp_path), 1, 0, say)
    for step in (1, 2, 3):
        saver.save(step, {"w": torch.zeros(3)})
    saver.finish()
    assert rundir.complete(tmp_path) == [1, 3]
    assert [m for m in said if m.startswith("saved")] == [f"saved: {tmp_path}/{step}" for step in (1, 2, 3)]
    assert [m for m in said if "cannot be deleted: OSError: [Errno 39]" in m]


HOLD = """
import sys, rundir
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rundir.claim(sys.argv[1], True, print)
print(flush=True)
input()
"""


def test_a_second_run_in_a_folder_is_refused(finished, tmp_path, monkeypatch):
    """The bug: rows of two runs mixed, until one dies at a save."""
    argv, original, _ = finished  # which this process has locked itself, if no other test has read the file since
    folder = tmp_path / "a"
    shutil.copytree(original, folder)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    before = contents(folder)
    message = refused(monkeypatch, [*argv, f"--out_dir={folder}", "--resume=true"])
    holder.communicate("\n")
    assert f"another run is writing there ({os.uname().nodename}, process {holder.pid}, since " in message
    assert contents(folder) == before and "\n" not in message
    train(monkeypatch, [*argv, f"--out_dir={folder}", "--resume=true"])  # a process that ends leaves no lock
    assert not (folder / "lock").stat().st_mode & 0o111, "it is no program"


def claim_own(folder):
    """Each rank with a folder of its own, as on two nodes without a common disk."""
    dist.init_process_group("gloo")
    with pytest.raises(SystemExit, match="not the same folder on all nodes"):
        rundir.claim(f"{folder}/{dist.get_rank()}", False, print)


def test_a_teacher_folder_that_cannot_be_written_is_known_before_a_file_changes(tmp_path):
    """The bug: it was found at the first export, after hours."""
    (tmp_path / "teacher").touch()
    with pytest.raises(NotADirectoryError, match="teacher"):
        rundir.begin_folder(str(tmp_path), {"max_steps": 9}, 1, print)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_file_name_that_is_not_utf_8_can_be_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "\udcff.py"])
    rundir.begin_folder(str(tmp_path), {"max_steps": 9}, None, print)
    assert (tmp_path / "source.diff").read_text().startswith("train.py \\udcff.py\n")


def test_nodes_without_a_common_folder_are_refused(on_ranks, tmp_path):
    on_ranks(2, claim_own, str(tmp_path))


def test_source_diff_says_why_it_has_no_commit(tmp_path, monkeypatch):
    said = []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git: not found" in rundir.git_state(said.append)
    (tmp_path / "git").write_text("#!/bin/sh\necho 'fatal: detected dubious ownership' >&2; exit 128\n")
    (tmp_path / "git").chmod(0o755)
    assert rundir.git_state(said.append) == "no commit and no changes: fatal: detected dubious ownership\n"
    assert said[1] == "source.diff has no commit and no changes: fatal: detected dubious ownership"


def test_the_last_line_of_a_run_that_stops_is_its_reason(tiles, tmp_path):
    """The bug: workers that are ended by the run are called killed."""
    (tmp_path / "tiles").mkdir()
    for i in range(3):
        shutil.copy(f"{tiles}/0{i}.png", tmp_path / "tiles")
    (tmp_path / "tiles/bad.png").write_bytes(b"junk")
    run = launch(*flags(tiles=tmp_path / "tiles", arch="toy", workers=4, max_bad_tiles=0, max_steps=20,
                        out_dir=tmp_path / "a"))
    said = run.communicate(timeout=120)[0].splitlines()
    assert run.returncode == 1 and "1 unreadable files" in said[-2] and "bad.png" in said[-1], said[-5:]


def fill_the_disk(folder):
    """The messages of a second save and of an export, during which no file may grow beyond 200 kB."""
    dist.init_process_group("gloo")
    saver = checkpoint.Saver(f"{folder}/ckpt", 1, 0)
    saver.save(1, {"w": torch.zeros(1000)})
    saver.finish()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    saver.save(2, {"w": torch.zeros(1_000_000)})
    with pytest.raises(SystemExit) as e:
        saver.finish()
    with pytest.raises(SystemExit) as of_export:
        checkpoint.export(f"{folder}/teacher", {"w": torch.zeros(1_000_000)}.items(), {"step": 1})
    return str(e.value), str(of_export.value)


def test_a_full_disk_keeps_the_last_checkpoint_and_names_the_path(on_ranks, tmp_path):
    (said, of_export), = on_ranks(1, fill_the_disk, str(tmp_path))
    assert f"{tmp_path}/teacher/unfinished could not be written" in of_export and "\n" not in of_export, of_export
    assert f"{tmp_path}/ckpt/unfinished could not be written (" in said and "the disk or a quota is full" in said
    assert f"{tmp_path}/ckpt/1 is whole" in said and rundir.complete(tmp_path / "ckpt") == [1]


def save_once(folder):
    saver = checkpoint.Saver(f"{folder}/ckpt", 1, 0)
    saver.save(1, {"w": torch.zeros(3)})
    saver.finish()


REFUSED = {  # to rank 0 alone
    "row": lambda folder: rundir.append_row(f"{folder}/a.jsonl", {"step": 1}), "name": save_once,
    "start": lambda folder: rundir.on_rank_0(folder, lambda: rundir.begin_folder(folder, {}, None, print)),
    "export": lambda folder: checkpoint.export(f"{folder}/teacher", [("w", torch.zeros(3))], {"step": 1})}


def fail(what, folder):
    """The message of one of two ranks."""
    dist.init_process_group("gloo")
    os.makedirs(folder, exist_ok=True)

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")
    if dist.get_rank() == 0:
        os.replace = rundir.json.dumps = refuse
    with pytest.raises(SystemExit) as e:
        REFUSED[what](folder)
    return str(e.value)


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_disk_refuses_to_rank_0_ends_all_ranks_with_the_same_line(what, on_ranks, tmp_path):
    """The bug: a traceback of rank 0, and others that wait in a collective until the launcher kills them."""
    first, second = on_ranks(2, fail, what, f"{tmp_path}/{what}")
    assert first == second and "No space left on device" in first and str(tmp_path) in first and "\n" not in first
    assert not rundir.complete(f"{tmp_path}/{what}/ckpt")


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("folders, resume", [("", "false"), ("unfinished 5.damaged notes", "false"), ("5", "true"),
                                             ("unfinished 2500", "true")])
def test_a_slurm_job_resumes_only_from_a_complete_checkpoint(folders, resume, tmp_path):
    """The bug: what a stop or a damage left counts, and the job that is queued again has nothing to resume."""
    for name in folders.split():
        (tmp_path / "a/ckpt" / name).mkdir(parents=True)
        (tmp_path / "a/ckpt" / name / ".metadata").touch()
    for name in ("srun", "scontrol", "python"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "${0##*/}" != srun ] || echo "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["bash", ROOT / "docs/slurm.sh", f"--out_dir={tmp_path}/a"], env=path, capture_output=True)
    assert f"--resume={resume} " in said.stdout.decode() and not said.stderr, said


@pytest.mark.slow
@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGUSR1, 2)])
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
        os.killpg(run.pid, number)  # to the data workers too, as scancel and a terminal do
    said = run.communicate(timeout=120)[0]
    assert run.returncode == (-number if number == signal.SIGINT else 0), said
    assert "stopped by a signal after step" in said and "--resume=true" in said, said
    assert rundir.complete(tmp_path / "b/ckpt")[-1] < 40
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
    while not rundir.complete(tmp_path / "b/ckpt") or rundir.complete(tmp_path / "b/ckpt")[-1] < 120:
        before = rundir.complete(tmp_path / "b/ckpt")
        if not before and (tmp_path / "b").exists():
            shutil.rmtree(tmp_path / "b")
        run = launch(*flags(**keys, out_dir=tmp_path / "b", resume=str(bool(before)).lower()), ranks=2)
        said = ""
        if kills < 20:
            said = wait_for(run, "/120: " if kills % 3 else "exported: ")  # the save is about to begin then
            time.sleep(draw.random() * 1.5 if kills % 3 else draw.random() * 0.05)
            inside += (tmp_path / "b/ckpt/unfinished").exists()
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
            for pid in ranks if kills % 2 else ranks[:1]:
                subprocess.run(["kill", "-9", pid])
            kills += 1
        started = time.time()
        said += run.communicate()[0]
        assert time.time() - started < 60 or not run.returncode, said  # the other rank does not wait forever
        after = rundir.complete(tmp_path / "b/ckpt")
        assert after[-1:] >= before[-1:], (before, after)
        if before:
            assert f"\nresume: step {before[-1]} of " in said, said
    assert kills == 20
    print(f"{inside} of {kills} kills inside a save")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    bit_equal(exported(tmp_path / "a", 120), exported(tmp_path / "b", 120))
    assert json.load(open(tmp_path / "b/config.json"))["max_steps"] == 120
