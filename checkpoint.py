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
import json
import math
import os
import shutil
import subprocess
import sys
import threading

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
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


class Saver:
    """Saves to a folder, one at a time. Keeps the newest `keep` (0 = all) and multiples of `keep_every` (0 = none)."""

    def __init__(self, folder, keep, keep_every):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
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
                shutil.rmtree(f"{self.folder}/{step}", ignore_errors=True)  # of a run that was here before
                os.replace(f"{self.folder}/unfinished", f"{self.folder}/{step}")
                for old in complete(self.folder)[: -self.keep]:  # an empty list for keep = 0
                    if not self.keep_every or old % self.keep_every:
                        shutil.rmtree(f"{self.folder}/{old}")
        except BaseException as e:  # CheckpointException is not an Exception
            self.error = e

    def finish(self):
        """Wait for the running save. If it failed, every rank raises ValueError, which names the checkpoint before."""
        if self.writer:
            self.writer.join()
            self.writer = None
        if self.error:
            done = complete(self.folder)
            last = f"{self.folder}/{done[-1]} is whole" if done else "there is no earlier checkpoint"
            raise ValueError(f"{self.folder}/unfinished could not be written ({one_line(self.error)}); {last}: make "
                             "room, then resume with --resume=true")


def load(folder, state, say):
    """
    Fill `state` in place from the newest checkpoint that loads, on any number of ranks, and return its step. Newer ones
    that do not load are named through `say` and renamed <step>.damaged, so that they do not count as kept. A
    collective. Raises ValueError if none loads.
    """
    steps, wrong = complete(folder), []
    for step in numbered(folder):
        if step not in steps:
            say(f"{folder}/{step} is no checkpoint: it has no .metadata")
    for step in reversed(steps):
        try:
            dcp.load(state, checkpoint_id=f"{folder}/{step}")
        except (Exception, dcp.api.CheckpointException) as e:  # the latter is not an Exception
            wrong.append(f"{folder}/{step} does not load: {one_line(e)}")
            continue
        for message, newer in zip(wrong, reversed(steps)):
            say(f"{message}; it is now called {newer}.damaged")
            if dist.get_rank() == 0:
                os.replace(f"{folder}/{newer}", f"{folder}/{newer}.damaged")
        return step
    if wrong:
        raise ValueError(f"{wrong[0]}; no earlier one loads either. If it is of another architecture, go back to its "
                         "arch and heads (config.json); otherwise start anew in another --out_dir")
    raise ValueError(f"nothing to resume: no complete checkpoint in {folder}; delete the run's folder and start anew")


# ---- the other files of a run's folder ------------------------------------------------------------------------------


def read_text(path):
    return open(path).read() if os.path.isfile(path) else None


def write_text(path, text):
    """Write a file in one step, so that a stop leaves the old one whole."""
    with open(f"{path}.new", "w") as f:
        f.write(text)
    os.replace(f"{path}.new", path)


def parse(path, text):
    """The JSON object in a text of the file `path`. ValueError, naming the file, if it is damaged."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged or missing, at {text[:40]!r}: mend it, or move the file away and put {{}} "
                         "in its place") from None


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
            lines = (read_text(f"{out_dir}/{file}") or "").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a crash may cut the last line short
            if lines:
                kept = [line for line in whole if parse(f"{out_dir}/{file}", line)["step"] <= step]
                write_text(f"{out_dir}/{file}", "".join(kept))
        text = read_text(f"{out_dir}/config.json") or ""
        before, now = parse(f"{out_dir}/config.json", text), json.loads(json.dumps(config))
        for key in (k for k in now if k != "resume" and before.get(k) != now[k]):
            say(f"resume: {key} was {before.get(key)!r}, is now {now[key]!r}")
        write_text(f"{out_dir}/config.before-{step}.json", text)
        say(f"resume: step {step} of {out_dir}")
    write_text(f"{out_dir}/config.json", json.dumps(config, indent=1))
    source = " ".join(sys.argv) + "\n"
    here = os.path.dirname(os.path.abspath(__file__))
    for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]) if shutil.which("git") else ():
        source += subprocess.run(["git", "-C", here, *command], capture_output=True, text=True).stdout
    write_text(f"{out_dir}/source.diff", source)


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
        raise ValueError(f"{unfinished} could not be written ({one_line(e)}); the last checkpoint is whole: make room, "
                         "then resume with --resume=true") from None
