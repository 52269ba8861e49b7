"""
One output folder, many slides, many processes: the walk that the tasks tiles, coords and features of wsi.py share.

Start it as often as you like, on as many nodes as share the folder, and again after whatever stopped it: a slide whose
file exists is done. A slide in progress has a file .A.HOST.PID.part, which is the claim on it: others leave the slide
for later while that file is written to. There is no lock to go stale: a claim whose process is dead, or that was not
touched for a quarter of an hour, is removed; and two processes that both did a slide have written the same.

    keys.tiles.json (coords, features)        the keys of the run: a rerun with others is refused
    failed.csv                                slides that could not be used, and why
"""
import csv
import errno
import io
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

import wsi

STALE = 900         # s; the longest silence is the mask of 10^10 px without low levels, 6 minutes
HOST = socket.gethostname()
KILLED = "its process was killed (out of memory? lower --workers or --region_mb)"
FREE = ("task slides out mask_dir region_mb workers batch_size device weights norm slide_mpp "
        "mpp_from_objective").split()  # keys a rerun may change: the outputs say what they were, slide by slide


def settle(task, c, more):
    """Check the keys, also against those that the folder was begun with; note them in a new folder."""
    if not 0 <= c["overlap"] < c["tile_px"]:
        raise ValueError(f"overlap={c['overlap']}: give 0 to {c['tile_px'] - 1} px, less than tile_px")
    if not c["mpps"] or min(c["mpps"]) <= 0 or len({round(1000 * mpp) for mpp in c["mpps"]}) < len(c["mpps"]):
        raise ValueError(f"mpps={c['mpps']}: give um/px above 0, such as 0.5,1.0, that differ by more than 0.001")
    if task != "tiles" and len(c["mpps"]) > 1:
        raise ValueError(f"mpps={c['mpps']}: --task={task} takes one a folder, such as --mpps=0.5,")
    os.makedirs(c["out"], exist_ok=True)
    for other in {"tiles", "coords", "features"} - {task}:
        if os.path.exists(os.path.join(c["out"], f"keys.{other}.json")):
            raise ValueError(f"{c['out']}: holds the output of --task={other}; use another --out")
    new = json.loads(json.dumps({"version": 1} | {k: v for k, v in c.items() if k not in FREE} | more))
    file = os.path.join(c["out"], f"keys.{task}.json")  # no slide's: their names have no dots
    if not os.path.exists(file):
        replace(file, json.dumps(new, indent=1).encode())
    old = json.loads(Path(file).read_text())
    if changed := [f"{k} was {old[k]!r} and is {new[k]!r} now" for k in new if k in old and old[k] != new[k]]:
        raise ValueError(f"{file}: {', '.join(changed)}; use another --out")


def unfinished_name(file, name, suffix):
    return os.path.join(os.path.dirname(file), f".{name}.{HOST}.{os.getpid()}{suffix}")


def replace(file, data):
    """Write a file in one step: nobody sees half of it, and a full disk shows before the old one is gone."""
    part = unfinished_name(file, *os.path.splitext(os.path.basename(file)))
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)


def unfinished(folder, prefix="."):
    """Unfinished files that somebody still writes; those whose writer is gone are removed."""
    found = []
    for f in os.listdir(folder):
        parts = re.fullmatch(r"\..+\.(\d+)\.(?:part|json|csv|h5|npz)", f)
        if f.startswith(prefix) and parts:
            path = os.path.join(folder, f)
            with suppress(FileNotFoundError):  # finished by now
                old = time.time() - os.path.getmtime(path) > STALE  # all that is known of other nodes'
                if old or (f".{HOST}." in f and not alive(int(parts[1]))):
                    os.unlink(path)
                else:
                    found.append(path)
    return found


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError as e:
        return e.errno == errno.EPERM  # somebody else's
    return True


def attempt(job, path, name, file, c):
    """One slide: (state, reason, tiles, damaged); state is "done", "before" (by somebody else), "busy" or "failed".

    First claim, then look for others: of two that come at once at least one sees the other, and leaves it for later.
    """
    claim = unfinished_name(file, name, ".part")
    try:
        open(claim, "wb").close()
        if set(unfinished(c["out"], f".{name}.")) - {claim}:
            return "busy", "", 0, 0
        if os.path.exists(file):
            return "before", "", 0, 0
        tiles, damaged, *note = job(path, name, file, c, claim)
        return "done", "".join(note), tiles, damaged
    except (OSError, BrokenProcessPool) as e:  # the disk, the workers: the next slide would fare no better
        if isinstance(e, FileNotFoundError) and os.path.exists(c["out"]) and not os.path.exists(claim):
            return "busy", "", 0, 0  # this process hung for long, and its claim was taken for abandoned
        raise
    except Exception as e:  # whatever one slide of 10^4 brings, the others get done
        reason = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        return "failed", " ".join(reason.removeprefix(f"{path}: ").split()), 0, 0
    finally:
        Path(claim).unlink(missing_ok=True)


def start_worker(parent):
    """Ctrl-C and the death of the parent, kill -9 included, end a worker at once."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()


def outcomes(pool, jobs):
    """(path, what attempt returned) of each slide, as they end."""
    if pool is None:
        yield from ((job[1], attempt(*job)) for job in jobs)
    futures = {pool.submit(attempt, *job): job[1] for job in jobs} if pool else {}
    yield from ((futures[future], future.result()) for future in as_completed(futures))


def progress(task, total, before):
    """A bar in a terminal, else a line a minute."""
    tqdm.monitor_interval = 0  # no thread, since workers are forked
    if sys.stderr.isatty():
        return tqdm(total=total, initial=before, desc=task, unit="slide", dynamic_ncols=True, miniters=1)
    return tqdm(total=total, initial=before, desc=task, miniters=1, mininterval=60,
                bar_format="{desc}: {n_fmt} of {total_fmt} slides{postfix}, {remaining} left\n")


def alone(job, *arguments):
    """attempt(...) in a process of its own: what kills that is the slide."""
    with ProcessPoolExecutor(1, get_context("fork"), start_worker, (os.getpid(),)) as pool:
        try:
            return pool.submit(attempt, job, *arguments).result()
        except BrokenProcessPool:
            return "failed", KILLED, 0, 0


def refuse_others(files):
    """ValueError if a slide's sidecar is of another file: both would count as done. A slide may have moved."""
    for path, file in files.items():
        if file.endswith(".json") and os.path.exists(file):
            with open(file) as f:
                found = re.search(r'"slide": ("(?:[^"\\]|\\.)*")', f.read(8192))
            other = json.loads(found[1]) if found else path
            if os.path.exists(other) and not os.path.samefile(other, path):
                raise ValueError(f"{file} is of {other}, not of {path}: use another --out for these slides")


def in_progress(folder, names):
    """The slides, of names {path: name}, on which a process of this host died."""
    claims = [re.fullmatch(r"\.(.+)\." + re.escape(HOST) + r"\.(\d+)\.part", f) for f in os.listdir(folder)]
    dead = {m[1] for m in claims if m and not alive(int(m[2]))}
    return {path for path, name in names.items() if name in dead}


def killed(pool, c, names):
    """List the slides that dead processes were at as failed, and say so."""
    if pool:
        pool.shutdown()
    slides = in_progress(c["out"], names)
    list_failed(c["out"], dict.fromkeys(slides, KILLED), slides)
    return ("a worker process was killed (out of memory? lower --workers or --region_mb) while these were read: "
            f"{', '.join(sorted(slides)) or 'unknown'}")


def walk(task, c, job, ending, workers, more=()):
    """Do every slide whose file, its name + ending, is missing; SystemExit with the reasons if any fails."""
    paths = wsi.expand(c["slides"], "slides")
    if c["coords"] and not os.path.isdir(c["coords"]):
        raise ValueError(f"coords={c['coords']}: no such folder")
    names = wsi.slide_names(paths, c["names"])
    settle(task, c, dict(more))
    files = {path: os.path.join(c["out"], label(path, names[path], c, task) + ending) for path in paths}
    refuse_others(files)
    todo = [path for path in paths if not os.path.exists(files[path])]
    random.shuffle(todo)  # processes that share a folder seldom meet
    suspects = {path for path, reason in read_failed(c["out"]).items() if reason == KILLED and path in set(todo)}
    suspects = suspects if workers else set()
    todo = [path for path in todo if path not in suspects]  # those come last, so that none keeps others from being done
    count, failed, tiles, damaged = {"before": len(paths) - len(todo), "done": 0}, {}, 0, 0
    wait, partial, start, bar = 0.25, 0, time.time(), progress(task, len(paths), count["before"])
    parallel = get_context("fork"), start_worker, (os.getpid(),)
    pool = ProcessPoolExecutor(min(workers, len(todo)), *parallel) if workers and todo else None
    try:
        while todo:
            jobs, todo = [(job, path, names[path], files[path], c) for path in todo], []
            for path, (state, reason, n, bad) in outcomes(pool, jobs):
                tiles, damaged, count[state] = tiles + n, damaged + bad, count.get(state, 0) + 1
                failed |= {path: reason} if state == "failed" else {}
                partial += state == "done" and bool(reason)
                todo += [path] if state == "busy" else []
                bar.set_postfix_str(f"{tiles / (time.time() - start):.0f} tiles/s", refresh=False)
                bar.update(state != "busy")
            wait = min(2 * wait, 10)
            time.sleep(random.uniform(0.5, 1) * wait if todo else 0)  # others are busy with these
        for path in suspects:
            state, reason, n, bad = alone(job, path, names[path], files[path], c)
            tiles, damaged, count[state] = tiles + n, damaged + bad, count.get(state, 0) + 1
            failed |= {path: reason or "another process was at it"} if state in ("failed", "busy") else {}
            bar.update()
    except (BrokenProcessPool, OSError, KeyboardInterrupt) as e:
        why = f"{e.strerror or e} ({e.filename or c['out']})" if isinstance(e, OSError) else "interrupted"
        if isinstance(e, BrokenProcessPool):
            why = killed(pool, c, names)
        raise SystemExit(f"{task}: {why}; the slides that are done are kept and a rerun goes on") from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
        unfinished(c["out"])
    failed = {path: reason for path, reason in failed.items() if not os.path.exists(files[path])}
    conclude(task, c, f"{count['done']} slides done, {count['before']} before, {len(failed)} failed; {tiles} tiles in "
             f"{c['out']}, {damaged} damaged ones left out, {tiles / (time.time() - start):.0f} tiles/s"
             + (f"; {partial} slides lack some of mpps, see skipped in their .json" if partial else ""), failed, paths)


def conclude(task, c, summary, failed, paths):
    """Write failed.csv and print the summary; SystemExit with the first reasons if any slide failed."""
    file = list_failed(c["out"], failed, paths)
    print(f"{task}: {summary}")
    if failed:
        lines = [f"  {path}: {reason}" for path, reason in sorted(failed.items())[:5]]
        raise SystemExit("\n".join([*lines, f"{task}: {len(failed)} of {len(paths)} slides failed, see {file}"]))


def list_failed(folder, failed, paths):
    """Write failed.csv: this run's failures, and those of slides that were not among its own."""
    own, file = set(paths), os.path.join(folder, "failed.csv")
    rows = {path: reason for path, reason in read_failed(folder).items() if path not in own} | failed
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("slide", "reason"), *sorted(rows.items())])
    replace(file, text.getvalue().encode())
    return file


def read_failed(folder):
    """{slide: reason} of failed.csv."""
    with suppress(FileNotFoundError), open(os.path.join(folder, "failed.csv"), newline="") as f:
        return {row["slide"]: row["reason"] for row in csv.DictReader(f)}
    return {}


def label(path, name, c, task):
    """Name of a slide's file: TRIDENT and CLAM keep the dots of a file name, which a WebDataset key cannot have."""
    return name if task == "tiles" or c["names"] != "stem" else Path(path).stem
