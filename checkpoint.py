"""
Checkpoints: sharded, and written while training continues. A folder is complete once it is named after its step.

    out_dir/ckpt/2500/         one file per rank and .metadata (torch.distributed.checkpoint); loads on any rank count
    out_dir/ckpt/unfinished/   being written, or left by a stop; the next save deletes it

A save waits only while each rank copies its own shards to host memory. Then a thread writes them. It has a gloo group
of its own, because collectives of two threads must not meet in training's group. No tensor is gathered anywhere: 16
bytes per parameter over all ranks (student, teacher, two moments), as many in host memory, none on the device. Rank 0
renames the folder when every rank has written and synced its file, and deletes older ones only then. So whenever a run
is killed, the newest complete checkpoint is whole.
"""
import fcntl
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def numbered(folder):
    """The steps after which folders in `folder` are named, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def complete(folder):
    """The steps in `folder` whose checkpoint is complete: .metadata is written last. Files may still be damaged."""
    return [step for step in numbered(folder) if os.path.isfile(f"{folder}/{step}/.metadata")]


def one_line(error):
    text = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    if "unexpected pos" in text:
        text = "the disk or a quota is full, make room"  # torch's words for a write that was cut short
    return f"{type(error).__name__}: {text}"


def tensors(nets, optimizer):
    """
    Weights and moments to save, or to load into: they are the run's own, not copies. The optimizer's parameter groups
    are not saved, because a resumed run follows its own keys (betas, layer_decay).
    """
    trained = {name: p for name, p in nets.named_parameters() if p.requires_grad}
    assert len(trained) == len(optimizer.state), (len(trained), len(optimizer.state))
    moments = {name: optimizer.state[p] for name, p in trained.items()}
    return {"model": nets.state_dict(), "optimizer": {"state": moments}}


class Saver:
    """Saves to a folder, one at a time. Keeps the newest `keep` (0 = all) and multiples of `keep_every` (0 = none)."""

    def __init__(self, folder, keep, keep_every, say=print):
        self.folder, self.keep, self.keep_every, self.say = folder, keep, keep_every, say
        self.group, self.writer, self.error = dist.new_group(backend="gloo"), None, None

    def save(self, step, state):
        """
        Begin to save `state`, which may change as soon as this returns. A collective: every rank calls it at the same
        step. Waits for the previous save, and raises what `finish` raises for it.
        """
        self.finish()
        unfinished = f"{self.folder}/unfinished"
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished, exist_ok=True)
        dist.barrier(self.group)
        future = dcp.async_save(state, checkpoint_id=unfinished, process_group=self.group)
        self.writer = threading.Thread(target=self.complete, args=(step, future))
        self.writer.start()

    def complete(self, step, future):
        """Runs in the thread: rename when all is written, then delete what is not to be kept."""
        try:
            future.result()
            if dist.get_rank() == 0:
                self.rename(step)
        except BaseException as e:  # CheckpointException is not an Exception
            self.error = e

    def rename(self, step):
        unfinished, final = f"{self.folder}/unfinished", f"{self.folder}/{step}"
        for place in dcp.FileSystemReader(unfinished).read_metadata().storage_data.values():
            if not os.path.exists(f"{unfinished}/{place.relative_path}"):
                raise OSError(f"{place.relative_path} of another rank is not there")
        shutil.rmtree(final, ignore_errors=True)  # of a run that was here before
        os.replace(unfinished, final)
        self.say(f"saved: {final}")
        for old in complete(self.folder)[: -self.keep]:  # an empty list for keep = 0
            if not self.keep_every or old % self.keep_every:
                try:
                    shutil.rmtree(f"{self.folder}/{old}")
                except OSError as e:
                    self.say(f"{self.folder}/{old} is not needed any more and cannot be deleted: {one_line(e)}")

    def finish(self):
        """Wait for the running save. If it failed, every rank raises ValueError, which names the checkpoint before."""
        if self.writer:
            self.writer.join()
            self.writer = None
        if self.error:
            done = complete(self.folder)
            last = f"{self.folder}/{done[-1]} is whole" if done else "there is no earlier checkpoint"
            raise ValueError(f"{self.folder}/unfinished could not be written ({one_line(self.error)}); {last}: mend "
                             "that, then resume with --resume=true")


class Exactly(dcp.DefaultLoadPlanner):
    """Loads if file and run have the same names and shapes, before anything is read; otherwise `misfit` says why."""
    misfit = ""

    def create_local_plan(self):
        saved = {name: tuple(getattr(m, "size", ())) for name, m in self.metadata.state_dict_metadata.items()}
        mine = {name: tuple(getattr(t, "shape", ())) for name, t in self.state_dict.items()}
        for name in sorted(saved | mine):
            former = name.startswith("optimizer.param_groups.")  # earlier commits saved them
            if saved.get(name) != mine.get(name) and not former:
                self.misfit = f"{name} is {saved.get(name, 'missing')}, this run needs {mine.get(name, 'none')}"
                raise ValueError(self.misfit)
        return super().create_local_plan()


def load(folder, state, say):
    """
    Fill `state` in place from the newest checkpoint that loads, on any number of ranks, and return its step. Newer ones
    that are damaged are named through `say` and renamed <step>.damaged, so that they do not count as kept. A
    collective. Raises ValueError if none loads, or if the newest that can be read is of another network.
    """
    listing = [numbered(folder), complete(folder)]
    dist.broadcast_object_list(listing)  # rank 0 decides: what other nodes list may be older
    every, steps = listing
    wrong = []
    for step in every:
        if step not in steps:
            say(f"{folder}/{step} is no checkpoint: it has no .metadata")
    for step in reversed(steps):
        planner = Exactly()
        try:
            dcp.load(state, checkpoint_id=f"{folder}/{step}", planner=planner)
        except (Exception, dcp.api.CheckpointException) as e:  # the latter is not an Exception
            if planner.misfit:
                raise ValueError(f"{folder}/{step} does not load: {planner.misfit}; go back to its arch, depth and "
                                 "heads (config.json), or start anew in another --out_dir") from None
            wrong.append(f"{folder}/{step} does not load: {one_line(e)}")
            continue
        for message, newer in zip(wrong, reversed(steps)):
            say(f"{message}; it is now called {newer}.damaged")
            if dist.get_rank() == 0:
                shutil.rmtree(f"{folder}/{newer}.damaged", ignore_errors=True)
                os.replace(f"{folder}/{newer}", f"{folder}/{newer}.damaged")
        return step
    if wrong:
        raise ValueError(f"{wrong[0]}; no earlier one loads either: start anew in another --out_dir")
    raise ValueError(f"nothing to resume: no complete checkpoint in {folder}; start anew in another --out_dir")


# ---- a run's folder and its other files -----------------------------------------------------------------------------


def check_empty(out_dir):
    """ValueError if a new run would write among the files of another."""
    if os.path.isdir(out_dir) and set(os.listdir(out_dir)) - {"lock"}:
        raise ValueError(f"{out_dir} is not empty: continue with --resume=true, delete it, or choose another --out_dir")


def claim(out_dir, resume, say):
    """
    Make the run's folder and lock it on rank 0, so that no other run writes there. A collective. Returns the lock,
    which holds while it is kept and the process lives. ValueError if another run has it, if a new run would not have
    the folder for itself, or if ranks see different folders under that name.
    """
    lock, told = None, [None, None]  # what the lock's file says, or why there is none
    if dist.get_rank() == 0:
        try:
            os.makedirs(out_dir, exist_ok=True)
            lock = open(f"{out_dir}/lock", "a+")
            told[0] = take(lock, out_dir, say)
            if not resume:
                check_empty(out_dir)
        except (ValueError, OSError) as e:
            told[1] = str(e)
    dist.broadcast_object_list(told)
    if told[1]:
        raise ValueError(told[1])
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, told[0] if lock else read_text(f"{out_dir}/lock"))  # to close it would end the lock
    if set(seen) != {told[0]}:
        raise ValueError(f"{out_dir} is not the same folder on all nodes: choose an --out_dir that they share")
    return lock


def take(lock, out_dir, say):
    """Lock an open file and write in it whose it is; returns that. lockf, because forked workers inherit a flock."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise ValueError(f"{out_dir}: another run is writing there ({lock.read().strip()}); wait for its end, or "
                         "choose another --out_dir") from None
    except OSError as e:
        say(f"{out_dir} cannot be locked here ({e.strerror}): start no second run in it")
    text = f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}, {os.urandom(4).hex()}\n"
    lock.truncate(0)
    lock.write(text)
    lock.flush()
    os.fsync(lock.fileno())
    return text


def read_text(path):
    return open(path, errors="replace").read() if os.path.isfile(path) else None


def write_text(path, text):
    """Write a file in one step, so that a stop leaves the old one whole."""
    with open(f"{path}.new", "w") as f:
        f.write(text)
    os.replace(f"{path}.new", path)


def parse(text):
    """The JSON object in a text; {} if it is damaged or missing."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def append_row(path, row):
    """Append a line to a .jsonl; returns the row as written: a number that is not finite is null there."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
    return row


def begin_wandb(wandb, project, out_dir, config):
    """Begin a run of Weights & Biases, or resume the one in out_dir/wandb.id; WANDB_NAME names it."""
    name = os.environ.get("WANDB_NAME", os.path.basename(out_dir))
    run = wandb.init(project=project, name=name, dir=out_dir, config=config, resume="allow",
                     id=read_text(f"{out_dir}/wandb.id"))
    write_text(f"{out_dir}/wandb.id", run.id)
    wandb.define_metric("*", step_metric="step")  # wandb's own count continues where a resumed run repeats steps


def begin_folder(out_dir, config, step, say):
    """
    Note config.json and source.diff (command, commit, uncommitted changes). A run that resumes at `step`, which is None
    for a new one, writes later steps again: their rows are dropped, and what has changed in config.json is said.
    """
    if step is not None:
        for file in ("metrics.jsonl", "bach.jsonl"):
            drop_rows(f"{out_dir}/{file}", step, say)
        text = read_text(f"{out_dir}/config.json") or ""
        before, now = parse(text), json.loads(json.dumps(config))
        if not before:
            say(f"resume: {out_dir}/config.json is damaged or missing: nobody can say which keys have changed")
        for key in (k for k in now if before and k != "resume" and before.get(k) != now[k]):
            say(f"resume: {key} was {before.get(key)!r}, is now {now[key]!r}")
        write_text(f"{out_dir}/config.before-{step}.json", text)
        say(f"resume: step {step} of {out_dir}")
    write_text(f"{out_dir}/config.json", json.dumps(config, indent=1))
    write_text(f"{out_dir}/source.diff", " ".join(sys.argv) + "\n" + git_state(say))


def drop_rows(path, step, say):
    """Leave out of a .jsonl rows of later steps, and lines that are no rows, which a crash or a full disk leave."""
    lines, kept = (read_text(path) or "").splitlines(), []
    for number, line in enumerate(lines, 1):
        at = parse(line).get("step")
        if not isinstance(at, int):
            say(f"resume: {path}, line {number} is no row and is dropped: {line[:40]!r}")
        elif at <= step:
            kept.append(line + "\n")
    if lines:
        write_text(path, "".join(kept))


def git_state(say):
    """Commit and uncommitted changes of these scripts, or why git does not tell them."""
    found, git = "", ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]):
            done = subprocess.run(git + command, capture_output=True, check=True)
            found += done.stdout.decode(errors="replace")
    except (OSError, subprocess.CalledProcessError) as e:
        refusal = getattr(e, "stderr", b"").decode(errors="replace").strip() or str(e)
        found += f"no commit and no changes: {refusal}\n"
        say(f"source.diff has no commit and no changes: {refusal.splitlines()[0]}")
    return found


def export(folder, tensors, header):
    """
    folder/<step>.pth for load_backbone, from pairs (name, tensor) that are whole on rank 0: {"teacher": ..., **header}.
    A collective, as `tensors` is. ValueError if it cannot be written.
    """
    whole, unfinished = dict(tensors), f"{folder}/unfinished"
    if dist.get_rank() != 0:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        torch.save({"teacher": whole, **header}, unfinished)
        os.replace(unfinished, f"{folder}/{header['step']}.pth")
    except (OSError, RuntimeError) as e:  # torch's own writer raises the latter where the disk is full
        raise ValueError(f"{unfinished} could not be written ({one_line(e)}); earlier checkpoints are whole: mend "
                         "that, then resume with --resume=true") from None
