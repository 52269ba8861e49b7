"""
A run's folder, and how all ranks end by a signal or where its disk refuses something.

    lock, config.json, source.diff         whose it is, its keys, its command, commit and uncommitted changes
    metrics.jsonl, bach.jsonl, wandb.id    rows; those of steps that a resumed run repeats are dropped
    ckpt/, teacher/                        checkpoint.py

Rank 0 alone writes these. What it is refused ends all ranks with the same line (`agree`); else they would wait for it.
"""
import contextlib
import fcntl
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # which is not an Exception


def one_line(error):
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))  # of one rank
    text = str(error).strip().partition("\n")[0]
    if "unexpected pos" in text:
        text = "the disk or a quota is full, make room"  # torch's words for a write that was cut short
    return f"{type(error).__name__}: {text}"


def agree(what, work):
    """
    [what work() returns on each rank]. If it fails on one, all ranks end with one line: `what`, the reason and the
    remedy. A SystemExit of work ends all, too. A collective.
    """
    try:
        mine = work(), None
    except SystemExit as e:
        mine = None, str(e)
    except (Exception, CheckpointException) as e:  # of any kind, as the others would wait: wandb has its own
        mine = None, f"{what} ({one_line(e)}): mend that, then start again, with --resume=true if a checkpoint is there"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for _, refusal in everyone:
        if refusal:
            raise SystemExit(refusal)
    return [value for value, _ in everyone]


def on_rank_0(what, work):
    """What work() returns on rank 0, which does it alone. A collective, as agree is."""
    return agree(what, lambda: work() if dist.get_rank() == 0 else None)[0]


def catch_signals():
    """
    A list that gets SIGTERM, SIGUSR1 (some time before it: sbatch --signal=USR1@300) and SIGINT, which is Ctrl-C, for
    the run to save and end at its next row. A second Ctrl-C ends it at once.
    """
    caught, rank = [], dist.get_rank()
    more = "Ctrl-C again ends it at once" if dist.get_world_size() == 1 else "torchrun gives it 30 s"

    def note(number, frame):
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if rank == 0:  # not by print, which may be at work just now
                os.write(2, f"\nCtrl-C: the run saves at its next row, then ends; {more}\n".encode())

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)
    return caught


def resume_command():
    """The line that resumes this run."""
    ranks, here = (os.environ.get(name) or "1" for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    launcher = f"torchrun --nproc_per_node={here}" if ranks == here else "(launched as before)"
    if ranks == "1":
        launcher = "python"
    given = [arg for arg in sys.argv if not arg.startswith("--resume=")]
    return f"{launcher} {shlex.join(given)} --resume=true"


def complete(folder, say=lambda message: None):
    """
    The steps in `folder` whose checkpoint is complete: .metadata is written last. Files may still be damaged. One that
    cannot be looked into counts, because it may be whole.
    """
    names, found = [], []
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder)
    for step in sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name):
        path = f"{folder}/{step}"
        if os.path.lexists(f"{path}/.metadata") or not os.access(path, os.R_OK | os.X_OK):
            found.append(step)
        else:
            say(f"{path} is no checkpoint: it has no .metadata, a hidden file that a copy of {path}/* leaves out")
    return found


def check_folder(out_dir, resume):
    """SystemExit if a new run would write among the files of another, or if one that resumes has no checkpoint."""
    lacking = []
    if resume and not complete(f"{out_dir}/ckpt", lacking.append):
        found = "".join(f"; {reason}" for reason in lacking[-1:])
        raise SystemExit(f"nothing to resume: no complete checkpoint in {out_dir}/ckpt{found}; start anew with "
                         "--resume=false in another --out_dir")
    if not resume and (os.path.lexists(out_dir) or not out_dir) and set(os.listdir(out_dir)) - {"lock"}:
        raise SystemExit(f"{out_dir} is not empty: continue with --resume=true, delete it, or choose another --out_dir")


def claim(out_dir, resume, say):
    """
    Make the run's folder and lock it on rank 0 as long as the process lives, so that no other run writes there. All
    ranks end if check_folder refuses it, if another run has it, or if they see different folders under that name. A
    collective.
    """
    def take():
        check_folder(out_dir, resume)
        os.makedirs(out_dir, exist_ok=True)
        lock = os.open(f"{out_dir}/lock", os.O_RDWR | os.O_CREAT, 0o644)
        # it stays open, and rank 0 must not open the file again: a lock ends when any descriptor of its file is closed
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers would inherit a flock
        except (BlockingIOError, PermissionError):
            raise SystemExit(f"{out_dir}: another run is writing there ({os.read(lock, 999).decode().strip()}); wait "
                             "for its end, or choose another --out_dir") from None
        except OSError as e:
            say(f"{out_dir} cannot be locked here ({e.strerror}): start no second run in it")
        text = f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}, {os.urandom(4).hex()}\n"
        os.ftruncate(lock, 0)
        os.write(lock, text.encode())
        os.fsync(lock)
        return text

    what = f"out_dir = {out_dir!r} must be a folder that this run can write"
    text = on_rank_0(what, take)
    seen = agree(what, lambda: text if dist.get_rank() == 0 else read_text(f"{out_dir}/lock"))
    if set(seen) != {text}:
        raise SystemExit(f"{out_dir} is not the same folder on all nodes: choose an --out_dir that they share")


def read_text(path):
    """The text of a file; None if there is none."""
    return open(path, errors="replace").read() if os.path.lexists(path) else None


def write_text(path, text):
    """Write a file in one step, so that a stop leaves the old one whole. A file name in it may not be UTF-8."""
    with open(f"{path}.new", "w", errors="backslashreplace") as f:
        f.write(text)
    os.replace(f"{path}.new", path)


def parse(text):
    """The JSON object in a text; {} if it is damaged or missing."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def append_row(path, row):
    """
    Append a line to a .jsonl on rank 0, none for {}. A number that is not finite is null there. Returns the row as
    written. A collective.
    """
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    def append():
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")

    on_rank_0(f"{path} cannot be written", lambda: row and append())
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
    for a new one, writes later steps again: their rows are dropped, and what has changed in config.json is said. On
    rank 0 alone.
    """
    if os.path.lexists(f"{out_dir}/teacher"):  # one that cannot be written is named now, not at the first export
        tempfile.TemporaryFile(dir=f"{out_dir}/teacher").close()
    if step is not None:
        for file in ("metrics.jsonl", "bach.jsonl"):
            drop_rows(f"{out_dir}/{file}", step, say)
        text = read_text(f"{out_dir}/config.json") or ""
        before, now = parse(text), json.loads(json.dumps(config))
        if not before:
            say(f"resume: {out_dir}/config.json is damaged or missing: nobody can say which keys have changed")
        for key in (k for k in now if before and k != "resume" and before.get(k) != now[k]):
            say(f"resume: {key} was {before.get(key)!r}, is now {now[key]!r}")
        if step >= config["max_steps"]:  # so the files below stay those of the run
            say(f"resume: step {step} of {out_dir}: nothing is left to do, max_steps is {config['max_steps']}")
            return
        say(f"resume: step {step} of {out_dir}")
        former = f"{out_dir}/config.before-{step}.json"
        if not os.path.lexists(former):  # a resume that came no further has trained nothing that is left
            write_text(former, text)
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
    command = "git rev-parse HEAD && git status --short && git diff HEAD"
    done = subprocess.run(command, shell=True, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True)
    if done.returncode == 0:
        return done.stdout.decode(errors="replace")
    refusal = done.stderr.decode(errors="replace").strip() or f"git ended with {done.returncode}"
    say(f"source.diff has no commit and no changes: {refusal.splitlines()[0]}")
    return f"no commit and no changes: {refusal}\n"
