"""
Curves and comparisons of training runs, from the files in their folders: no GPU, no torch, also while they train.

    python curves.py --runs=out/toy                  # one run: its curve as a table, and out/toy/bach.png
    python curves.py --runs='out/*'                  # several: a table against the first, all curves in out/bach.png
    python curves.py --runs='out/clip3*,out/clip30*' --parent=out/clip30_0 --out=clip.png

Runs of the same code and the same config.json but for the seed (and REPEAT) are repeats of one experiment: a group. Its
curve is the mean of the repeats that have got as far as half of them have, so that one that crashed early or has just
begun takes nothing from the others; the table names those left out.
"""
import glob
import json
import math
import operator
import os
import re
import statistics
import textwrap
import time
import zlib
from typing import NamedTuple

import numpy as np

# keys of config.json in which repeats may differ, like wandb_*: where things go, how fast they are read, when a run
# gives up. Not these: folders of data (other data?), eval_interval (the best of more points is higher), max_steps
REPEAT = """seed out_dir resume dry_run device workers open_slides mask_dir log_interval save_interval keep_checkpoints
    keep_every max_bad_steps max_bad_tiles""".split()
FLOOR = 0.02  # all seeds meet the same 132 images: a smaller difference is no evidence, however many the repeats
# 97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom (NIST handbook 1.3.6.7.2). Two groups of three seeds
# have 4, where a factor of 2 would call 12 % of the pairs different that are not; one group of three has 2, and 18 %
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LINES = ("-", "--", ":")
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()  # Okabe and Ito 2008, without yellow


class Run(NamedTuple):
    folder: str
    rows: list       # of bach.jsonl, at least one
    config: dict     # {} = not there or not readable
    setting: dict    # what repeats share: config without REPEAT, code, protocol
    size: float      # images in a step, of all ranks; None = only step 0 yet, or not stated
    speed: float     # images/s; nan = not stated
    step: int        # the last that was logged
    age: float       # seconds since the last row was written
    crowding: dict   # {step: (cls_rank, cls_cosine)} of metrics.jsonl: the student's class tokens in a batch


class Group(NamedTuple):
    name: str
    runs: list
    used: list        # those in the mean
    x: list           # the points that all of these have: steps, or images seen
    bach: np.ndarray  # (runs used, points)
    protocol: list    # of its rows; more than one if eval_bach.py changed on the way


def read_rows(path):
    """Rows of a .jsonl by step. A resumed run repeats steps: the later row counts; an unfinished line does not."""
    try:
        with open(path) as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
        return [row for _, row in sorted({operator.index(row["step"]): row for row in rows}.items())]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: each line must be a JSON object with a step ({type(e).__name__}: {e})") from e


def read_config(folder):
    try:
        with open(f"{folder}/config.json") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):  # not there, half-written, not an object
        return {}


def read_code(folder):
    """Commit, and a checksum of uncommitted changes to .py files but for configs and tests; "unknown" without."""
    if not os.path.isfile(f"{folder}/source.diff"):
        return "unknown"
    with open(f"{folder}/source.diff", errors="replace") as f:
        head, *files = re.split(r"(?m)^diff --git ", f.read())
    edits = "".join(text for text in files if re.match(r"a/(?!config/|tests/)\S+\.py ", text))
    commit = re.search(r"(?m)^[0-9a-f]{40}$", head)
    return (commit[0][:7] if commit else "unknown") + (f"+{zlib.crc32(edits.encode()):08x}" if edits else "")


def load_run(folder):
    """A Run, or None while bach.jsonl has no point. ValueError if it or metrics.jsonl is damaged but for its end."""
    paths = [f"{folder}/bach.jsonl", f"{folder}/metrics.jsonl"]
    rows, metrics = (read_rows(path) if os.path.isfile(path) else [] for path in paths)
    rows = [row for row in rows if isinstance(row.get("bach"), (int, float)) and math.isfinite(row["bach"])]
    if not rows:
        return None
    config, last = read_config(folder), rows[-1]
    setting = {k: v for k, v in config.items() if k not in REPEAT and not k.startswith("wandb_")}
    setting |= {"code": read_code(folder), "protocol": sorted({str(row.get("protocol")) for row in rows})}
    # without the first, which waits for the data; later starts are too few to move a median
    speeds = [row["images_per_s"] for row in metrics if row.get("images_per_s")][1:]
    size = round(last["images"] / last["step"], 3) if last["step"] and last.get("images") else None
    age = time.time() - max(os.path.getmtime(path) for path in paths if os.path.isfile(path))
    signs = {row["step"]: (row.get("cls_rank"), row.get("cls_cosine")) for row in metrics}
    crowding = {step: both for step, both in signs.items() if all(isinstance(x, (int, float)) for x in both)}
    return Run(folder, rows, config, setting, size, statistics.median(speeds or [math.nan]),
               max(row["step"] for row in [last, *metrics[-1:]]), max(age, 0), crowding)


def same_size(a, b):
    return a.size == b.size or None in (a.size, b.size)


def group_runs(runs, axis="step"):
    """
    Groups in the order of their first runs, named by their folders' common name before _0, -s1, _seed2.

    A run whose config.json lacks a key is no repeat: older code need not have done what the key's default says.
    """
    together = []
    for run in runs:
        fits = (g for g in together if run.config and all(run.setting == r.setting and same_size(run, r) for r in g))
        if home := next(fits, None):
            home.append(run)
        else:
            together.append([run])
    base = os.path.commonpath([os.path.dirname(os.path.abspath(run.folder)) for run in runs])
    names = [[os.path.relpath(os.path.abspath(run.folder), base) for run in group] for group in together]
    stems = [{re.sub(r"[\W_]+(seed|s)?[\W_]*\d+$", "", name) for name in n} for n in names]
    plain = [n[0] if len(n) == 1 else min(stem) if len(stem) == 1 else "" for n, stem in zip(names, stems)]
    many = [n[0] if len(n) == 1 else f"{n[0]}..{n[-1]}" for n in names]
    clear = [p if p and plain.count(p) == 1 else whole for p, whole in zip(plain, many)]
    return [Group(name, g, *mean_of(g, axis), g[0].setting["protocol"]) for name, g in zip(clear, together)]


def mean_of(runs, axis):
    """What a group's mean is made of: the runs, the points that all of them have, BACH there (runs, points)."""
    ends = sorted((run.rows[-1][axis] for run in runs), reverse=True)
    used = [run for run in runs if run.rows[-1][axis] >= ends[(len(runs) - 1) // 2]]
    bach = [{row[axis]: row["bach"] for row in run.rows} for run in used]
    x = sorted(set.intersection(*map(set, bach)))
    return (used, x, np.array([[b[at] for at in x] for b in bach])) if x else mean_of(used[:1], axis)


def dip(x, mean):
    """
    Depth and length of a curve's first fall below its value at step 0; None without one, length None until regained.

    depth: from the value at step 0 to the lowest point before the curve is at or above it again; length: from the last
    point before the fall to that one, in the axis's unit. Falls within the noise count too: the depth tells.
    """
    below = [value < mean[0] for value in mean]
    if x[0] != 0 or not any(below):
        return None
    first = below.index(True)
    end = below.index(False, first) if False in below[first:] else None
    return mean[0] - min(mean[first:end]), None if end is None else x[end] - x[first - 1]


def noise(groups, a, b, at):
    """
    Limit below which two groups do not differ at a point; the sd of seeds there; its degrees of freedom.

    max(0.02, t s sqrt(1 / n_a + 1 / n_b)): Student's test of two means at 95 %, with s pooled over all groups that have
    repeats, taken to spread alike. Without repeats s is unknown (nan, 0) and 0.02 is all there is.
    """
    seeds = [g.bach[:, g.x.index(at)] for g in groups if at in g.x and g.protocol == b.protocol]
    free = sum(len(values) - 1 for values in seeds)
    if not free:
        return FLOOR, math.nan, 0
    s = math.sqrt(sum(len(values) * values.var() for values in seeds) / free)
    t = T[free - 1] if free <= len(T) else 1.96 + 2.37 / free + 2.82 / free**2  # Abramowitz and Stegun 26.7.5
    return max(FLOOR, t * s * math.sqrt(1 / len(a.used) + 1 / len(b.used))), s, free


def last_common(group, parent):
    return max((at for at in group.x if at in parent.x), default=None)


def against(group, parent, groups):
    """The difference of two groups' means at the last point that both have, and whether noise explains it."""
    at = last_common(group, parent)
    if group is parent or at is None or group.protocol != parent.protocol:
        return "parent" if group is parent else "no common point" if at is None else "other protocol"
    a, b = (g.bach[:, g.x.index(at)].mean() for g in (group, parent))
    limit = noise(groups, group, parent, at)[0]
    return f"{a - b:+.3f} {'within' if abs(a - b) < limit else 'beyond'} {limit:.3f}"


def count(n):
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,.0f}"


def plus_minus(values, digits=3):
    """Mean and, of several seeds, their sample deviation."""
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else " " * (digits + 6)
    return f"{np.mean(values):.{digits}f}{spread}"


def cells(group, parent, groups):
    """A row of the table."""
    best, last, fall = group.bach.max(1), group.bach[:, -1], dip(group.x, group.bach.mean(0))
    at = statistics.median_low(group.x[i] for i in group.bach.argmax(1))
    depth, length = (f"{fall[0]:.3f}", count(fall[1]) if fall[1] else "never") if fall else ("-", "-")
    speeds = [run.speed for run in group.used if run.speed > 0] or [math.nan]
    return [group.name, str(len(last)), f"{best.mean():.3f}", count(at), plus_minus(last),
            against(group, parent, groups), depth, length, f"{statistics.median(speeds):.1f}",
            count(group.used[0].rows[-1].get("images", math.nan))]


def states(group):
    """How far runs are that are not done. Files do not tell whether one still trains or stopped: see its last row."""
    done = [run for run in group.runs if run.step >= run.config.get("max_steps", math.inf)]
    texts = [f"{len(done)} of {len(group.runs)} done"] if len(done) < len(group.runs) else []
    for run in (run for run in group.runs if run not in done or run not in group.used):
        age = f"{run.age / 60:.0f} min" if run.age < 7200 else f"{run.age / 3600:.0f} h"
        texts.append(f"{os.path.basename(run.folder)} at step {run.step} of {run.config.get('max_steps', '?')}, "
                     f"last row {age} ago{'' if run in group.used else ', not in the mean'}")
    if len({run.config.get("seed") for run in group.runs}) < len(group.runs):
        texts.append("a seed more than once: no independent repeats, the spread is too small")
    return texts


def changes(group, parent, axis):
    """Where a group was compared with the parent, if not at the end, and what its runs have other than the parent's."""
    run, other = group.runs[0], parent.runs[0]
    mine, theirs = run.setting, other.setting
    early = (at := last_common(group, parent)) is not None and at < max(group.x[-1], parent.x[-1])
    texts = [f"compared after {count(at)} {axis.rstrip('s')}s"] if early else []
    if not (run.config and other.config):
        return texts + ["changed: unknown, no config.json"]
    changed = [f"{k}={v!r}" for k, v in mine.items() if k != "protocol" and k in theirs and v != theirs[k]]
    changed += [] if same_size(run, other) else [f"{run.size:g} images a step"]
    texts.append("changed: " + (", ".join(changed) or "nothing"))
    for whose, a, b in (("the parent's", mine, theirs), ("its own", theirs, mine)):  # of older code, or newer
        if lacking := [f"{k}={v!r}" for k, v in a.items() if k not in b]:
            texts.append(f"not in {whose} config.json: {', '.join(lacking)}")
    return texts


def compare_table(groups, parent, axis):
    """
    A row a group; under it how far its runs are and what they change against the parent; a line on the noise.

    best: mean of the runs' maxima; at: the median of their places; final: the mean's last point +- sample deviation
    over seeds; images: seen at the end.
    """
    heads = ["run", "seeds", "best", "at", "final         ", "against parent", "dip", "length", "images/s", "images"]
    lines = columns([heads] + [cells(group, parent, groups) for group in groups])
    for i, group in enumerate(groups, 1):
        text = "; ".join(states(group) + (changes(group, parent, axis) if group is not parent else []))
        lines[i] += "\n" * bool(text) + textwrap.fill(text, 120, initial_indent="    ", subsequent_indent="    ")
    _, s, free = noise(groups, parent, parent, parent.x[-1])
    text = (f"or t s sqrt(1/n + 1/n) at 95 % if larger; sd of seeds s = {s:.3f}, {free} degrees of freedom" if free else
            "as there are no repeats and the spread of seeds is unknown: train more seeds")
    return "\n".join(lines + [textwrap.fill(f"within, beyond: {FLOOR} (132 images), {text}", 120)] * (len(groups) > 1))


def columns(rows):
    """Lines of a table: rows of texts, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in rows]


def crowding_table(groups, axis):
    """
    Where curves begin and end, and how crowded class tokens are: a row a group, means over its runs +- deviation, at
    the points of its curve. BACH at step 0, the depth of each run's own dip, BACH at the end; then of BACH's images in
    the teacher effective rank and mean cosine: at the first point, least (most), at the end. "" if no row has these.
    """
    lines = [["run", "start         ", "own dip       ", "end           ", "rank 0", "least", "end         ",
              "cosine 0", "most", "end           "]]
    for group in groups:
        rows = [{row[axis]: row for row in run.rows} for run in group.used]
        rank, cosine = (np.array([[of_run[at].get(key) or math.nan for at in group.x] for of_run in rows], float)
                        for key in ("effective_rank", "mean_cosine"))
        falls = [(dip(group.x, values) or (0,))[0] for values in group.bach] if group.x[0] == 0 else [math.nan]
        texts = [plus_minus(group.bach[:, 0] if group.x[0] == 0 else falls), plus_minus(falls),
                 plus_minus(group.bach[:, -1]), f"{rank[:, 0].mean():.1f}", f"{rank.min(1).mean():.1f}",
                 plus_minus(rank[:, -1], 1), f"{cosine[:, 0].mean():.3f}", f"{cosine.max(1).mean():.3f}",
                 plus_minus(cosine[:, -1])]
        lines.append([group.name, *("-" if "nan" in text else text for text in texts)])
    if all(line[4] == "-" for line in lines[1:]):
        return ""
    return "\n".join([*columns(lines), "rank, cosine: the teacher's, of BACH's images; the figure has the student's, "
                      "of training batches"])


def curve_table(rows):
    """Plain-text table of bach.jsonl rows, one line a row; nan for what a row lacks, no kNN or split if all lack it."""
    keys = ("std", "plateau", "effective_rank", "mean_cosine", "clean", "clean_std", "knn")
    clean, knn = (any(row.get(k) is not None for row in rows) for k in ("clean", "knn"))
    lines = [f"{'step':>8}  {'BACH +- std':>16}  {'plateau':>7}  {'eff. rank':>9}  {'mean cosine':>11}"
             + f"  {'clean +- std':>16}" * clean + f"  {'kNN':>6}" * knn]
    for row in rows:
        std, plateau, rank, cos, *more = (math.nan if row.get(k) is None else row[k] for k in keys)
        lines.append(f"{row['step']:>8}  {row['bach']:.4f} +- {std:6.4f}  {plateau:7.4f}  {rank:9.1f}  {cos:11.4f}"
                     + f"  {more[0]:6.4f} +- {more[1]:6.4f}" * clean + f"  {more[2]:6.4f}" * knn)
    return "\n".join(lines)


def draw(axes, group, axis, color, style, each):
    """A group's mean with a band, +- std over seeds, and each run if asked; a run alone with bars, std over heads."""
    mean, n, some = group.bach.mean(0), len(group.used), max(len(group.x) // 12, 1)
    label = f"{group.name}, {n} seeds" if n > 1 else group.name
    axes.plot(group.x, mean, color=color, markersize=4, markevery=some, label=label,
              marker="os^"[style], linestyle=LINES[style])
    for run in group.runs if each and len(group.runs) > 1 else ():
        axes.plot([row[axis] for row in run.rows], [row["bach"] for row in run.rows], color=color, lw=0.6, alpha=0.4)
    if n > 1:
        std = group.bach.std(0, ddof=1)
        axes.fill_between(group.x, mean - std, mean + std, color=color, alpha=0.15, lw=0)
    else:
        std = {row[axis]: row.get("std") or 0 for row in group.used[0].rows}
        bars = [std[x] for x in group.x]
        axes.errorbar(group.x, mean, bars, errorevery=some, ecolor=color, fmt="none", elinewidth=0.8)


def crowding(group, axis):
    """[(x, mean effective rank), (x, mean cosine)] of a group's runs at the rows that all have; [] if none is."""
    steps = sorted(set.intersection(*(set(run.crowding) for run in group.used)))
    if not steps:
        return []
    x = [step * (group.used[0].size or 1) if axis == "images" else step for step in steps]
    return [(x, [statistics.mean(run.crowding[step][i] for run in group.used) for step in steps]) for i in (0, 1)]


def plot(groups, axis, title, path):
    """
    All curves as a PNG, the first in black, the legend from the highest end to the lowest; of several groups beside it
    how crowded the student's class tokens are in training batches, where metrics.jsonl says so. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    several, crowded = len(groups) > 1, len(groups) > 1 and any(crowding(group, axis) for group in groups)
    figure = Figure(figsize=(9.6, 5.4) if several else (6.4, 4), dpi=150, layout="constrained")
    places = figure.subplot_mosaic("AAB;AAC" if crowded else "A")
    axes, side = places.pop("A"), list(places.values())
    axes.set(xlabel={"step": "step", "images": "images seen"}[axis], title=title,
             ylabel="balanced accuracy, 132 images")
    for i, group in sorted(enumerate(groups), key=lambda numbered: -numbered[1].bach[:, -1].mean()):
        color, style = COLOURS[(i - 1) % len(COLOURS)] if i else "black", max(i - 1, 0) // len(COLOURS) % 3
        draw(axes, group, axis, color, style, each=len(groups) <= 4)
        for panel, values in zip(side, crowding(group, axis)):
            panel.plot(*values, color=color, lw=1, linestyle=LINES[style])
    for panel, text in zip(side, ("effective rank in a batch", "mean cosine in a batch")):
        panel.set_title(text, fontsize=9)
        panel.grid(alpha=0.25)
        panel.xaxis.set_major_formatter("{x:,.0f}")
    if side:
        side[-1].set_xlabel(axes.get_xlabel())
    if any(len(group.used) > 1 for group in groups):
        axes.fill_between([], [], color="gray", alpha=0.3, lw=0, label="band: +- std over seeds")
    if any(len(group.used) == 1 for group in groups):
        axes.errorbar([], [], [], ecolor="gray", fmt="none", elinewidth=0.8, label="bars: +- std over heads")
    if min(group.bach.min() for group in groups) < 0.5:  # otherwise it would flatten the curves
        axes.axhline(0.25, color="gray", lw=0.8, linestyle="-.", label="chance")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "outside right upper"} if several and not crowded else {"loc": "outside lower center", "ncols": 4}
    figure.legend(frameon=False, **place)
    figure.savefig(path)


def report(runs, parent, out):
    sizes, counted = {run.size for run in runs if run.size}, all("images" in row for run in runs for row in run.rows)
    axis = "images" if len(sizes) > 1 and counted else "step"
    groups, place = group_runs(runs, axis), os.path.abspath(parent)
    named = [g for g in groups if parent == g.name or place in [os.path.abspath(run.folder) for run in g.runs]]
    if parent and not named:
        raise ValueError(f"parent={parent}: no such run with a curve; there are {', '.join(g.name for g in groups)}")
    parent = (named or groups)[0]
    groups.sort(key=lambda group: group is not parent)
    if len(groups) > 1:
        print(f"parent: {parent.name} ({', '.join(run.folder for run in parent.runs)})")
    if axis == "images":
        print("the runs differ in images a step: places and lengths are in images seen, not steps")
    print(compare_table(groups, parent, axis))
    if len(runs) > 1 and (table := crowding_table(groups, axis)):
        print(f"\n{table}")
    if len(runs) == 1:
        print(f"{runs[0].folder}\n{curve_table(runs[0].rows)}")
    path = out or os.path.join(os.path.commonpath([run.folder for run in runs]), "bach.png")
    try:
        plot(groups, axis, groups[0].name if len(groups) == 1 else "", path)
        print(path)
    except ImportError:
        print(f"{path} not written: pip install matplotlib")


def show(runs, parent="", out=""):
    """
    Print the table of the runs in the folders that match `runs`, globs separated by commas, and draw their curves.

    parent: a run's folder or a group's name; "" = the first. out: the PNG; "" = bach.png in the runs' common folder.
    ValueError, one line, if no folder matches or there is no such parent, and after all is shown if files are damaged.
    """
    found, files = [f for p in runs.split(",") for f in sorted(glob.glob(p.strip()))], ("bach.jsonl", "config.json")
    clean = os.path.abspath if any(map(os.path.isabs, found)) else os.path.normpath  # either all absolute or none
    folders = [f for f in dict.fromkeys(map(clean, found)) if any(os.path.isfile(f"{f}/{name}") for name in files)]
    if not folders:
        raise ValueError(f"runs={runs}: no folder with a bach.jsonl; train with bach_dir set to get one")
    loaded, wrong = [], []
    for folder in folders:
        try:
            run = load_run(folder)
            loaded += [run] if run else []
            if not run:
                print(f"{folder}: no point of the curve yet: just started, or trained without bach_dir")
        except (ValueError, OSError) as e:
            wrong.append(str(e))
    try:
        if loaded:
            report(loaded, parent, out)
    except ValueError as e:  # the parent: perhaps one of the damaged
        wrong.append(str(e))
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    from configurator import configure

    runs = ""    # folders of runs: globs, in quotes, separated by commas
    parent = ""  # a run's folder or a group's name that the others are compared with; "" = the first
    out = ""     # file of the figure; "" = bach.png in the folder that the runs share
    configure(globals())
    try:
        show(runs, parent, out)
    except (ValueError, OSError) as e:
        raise SystemExit(f"curves: {e}")
