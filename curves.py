"""
Compare training runs by their BACH curves: tables and a figure, from the files in their folders, also while they train.

    python curves.py --runs=out/toy                     # one run: its curve as a table, and out/toy/bach.png
    python curves.py --runs='out/*'                     # several, against the first of them; curves in out/bach.png
    python curves.py --runs='out/clip3*,out/clip30*' --parent=out/clip30_0 --out=clip.png

Runs of the same commit whose config.json differs only in the seed and the other REPEAT keys are repeats of one
experiment: a group. We average only repeats that have reached the median last step, so that a run which crashed early
or has just begun takes no points from the others. The table names those that are left out.
"""
import glob
import json
import math
import os
import re
import statistics
import textwrap
import zlib
from typing import NamedTuple

import numpy as np

from configurator import configure

# keys of config.json that may differ between repeats, as may wandb_*: where files go, how fast they are read, when a run
# gives up. Folders of data are not among them, nor are max_steps and eval_interval (the best of more points is higher)
REPEAT = """seed out_dir resume dry_run device workers open_slides mask_dir log_interval save_interval keep_checkpoints
    keep_every max_bad_steps max_bad_tiles""".split()
FLOOR = 0.02  # all seeds meet the same 132 images, so a smaller difference is no evidence, whatever the seeds say
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST handbook 1.3.6.7.2). Two groups of three seeds
# have 4: a factor of 2 in place of t would find a difference between 12 % of equal pairs
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
    folder: str
    rows: dict     # {step: row of bach.jsonl}, at least one
    config: dict   # {} = config.json is missing or damaged
    setting: dict  # what repeats share: config without REPEAT, code, protocol


class Group(NamedTuple):
    name: str
    runs: list
    used: list         # those in the mean
    x: list            # the steps that all of these have
    bach: np.ndarray   # (used, steps)
    protocol: str      # of its rows


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_rows(path):
    """{step: row} of a .jsonl. A resumed run repeats steps, and the later row counts; an unfinished line does not."""
    rows = {}
    try:
        with open(path) as f:
            for line in f:
                if line.endswith("\n"):
                    row = json.loads(line)
                    rows[int(row["step"])] = row
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: each line must be a JSON object with a step ({type(e).__name__}: {e})") from e
    return dict(sorted(rows.items()))


def read_config(folder):
    try:
        with open(f"{folder}/config.json") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def read_code(folder):
    """The commit in source.diff, and a checksum of the edits that were not committed; "unknown" without."""
    if not os.path.isfile(f"{folder}/source.diff"):
        return "unknown"
    with open(f"{folder}/source.diff", errors="replace") as f:
        head, _, edits = f.read().partition("\ndiff --git ")
    _, commit, *_ = [*head.splitlines(), "unknown", ""]  # the first line is the command
    return commit[:7] + (f"+{zlib.crc32(edits.encode()):08x}" if edits else "")


def load_run(folder):
    """A Run, or None while bach.jsonl has no point. ValueError if it is damaged, except at its end."""
    path = f"{folder}/bach.jsonl"
    rows = read_rows(path) if os.path.isfile(path) else {}
    rows = {step: row for step, row in rows.items() if math.isfinite(row.get("bach") or math.nan)}
    if not rows:
        return None
    config = read_config(folder)
    setting = {k: v for k, v in config.items() if k not in REPEAT and not k.startswith("wandb_")}
    setting["code"] = read_code(folder)
    setting["protocol"] = " / ".join(sorted({str(row.get("protocol")) for row in rows.values()}))
    return Run(folder, rows, config, setting)


def group_runs(runs):
    """
    Groups of repeats, in the order of their first runs. Each is named by a folder's name without _0, -s1 or _seed2 at
    its end, or by the whole path where another group has that name. A run without config.json is no repeat.
    """
    together = []
    for run in runs:
        for group in together:
            if run.config and run.setting == group[0].setting:
                group.append(run)
                break
        else:
            together.append([run])
    names = [re.sub(r"[-_](s|seed)?\d+$", "", os.path.basename(os.path.abspath(group[0].folder))) for group in together]
    groups = []
    for name, group in zip(names, together):
        name = name if names.count(name) == 1 else group[0].folder
        used, x = mean_of(group)
        groups.append(Group(name, group, used, x, values(used, x, "bach"), group[0].setting["protocol"]))
    return groups


def mean_of(runs):
    """The runs that a group's mean is made of, and the steps that all of these have."""
    ends = sorted((max(run.rows) for run in runs), reverse=True)
    used = [run for run in runs if max(run.rows) >= ends[(len(runs) - 1) // 2]]
    x = sorted(set.intersection(*(set(run.rows) for run in used)))
    return (used, x) if x else mean_of(used[:1])


def values(runs, x, key):
    """What the runs' rows have under key, as (runs, steps); nan where a row has nothing."""
    return np.array([[run.rows[step].get(key) for step in x] for run in runs], float)


# ---- comparing -------------------------------------------------------------------------------------------------------


def dip(x, curve):
    """
    Depth and length of a curve's first fall below its value at step 0: None if it has none, length None if it does not
    recover. The depth is from the value at step 0 to the lowest point before the recovery. The length is in steps, from
    the last point before the fall to the recovery. Falls within the noise count too: the depth tells.
    """
    below = [value < curve[0] for value in curve]
    if x[0] != 0 or not any(below):
        return None
    first = below.index(True)
    end = below.index(False, first) if False in below[first:] else None
    return curve[0] - min(curve[first:end]), None if end is None else x[end] - x[first - 1]


def noise(groups, a, b, at):
    """
    The limit below which two groups do not differ at a step; the sd of seeds there; its degrees of freedom.

    max(0.02, t s sqrt(1 / n_a + 1 / n_b)) is Student's test of two means at 95 %. s is pooled over all groups that have
    repeats, which assumes that all vary alike. Without repeats s is unknown (nan, 0) and only 0.02 is left.
    """
    seeds = [g.bach[:, g.x.index(at)] for g in groups if at in g.x and g.protocol == b.protocol]
    free = sum(len(ends) - 1 for ends in seeds)
    if not free:
        return FLOOR, math.nan, 0
    s = math.sqrt(sum(len(ends) * ends.var() for ends in seeds) / free)
    t = T[free - 1] if free <= len(T) else 1.96 + 2.37 / free + 2.82 / free**2  # Abramowitz and Stegun 26.7.5
    return max(FLOOR, t * s * math.sqrt(1 / len(a.used) + 1 / len(b.used))), s, free


def against(group, parent, groups):
    """The difference of two groups' means at the last step that both have, and whether noise explains it."""
    if group is parent:
        return "parent"
    if group.protocol != parent.protocol:
        return "other protocol"
    common = set(group.x) & set(parent.x)
    if not common:
        return "no common point"
    at = max(common)
    difference = group.bach[:, group.x.index(at)].mean() - parent.bach[:, parent.x.index(at)].mean()
    limit, _, _ = noise(groups, group, parent, at)
    where = "" if at == max(*group.x, *parent.x) else f" at {at}"
    return f"{difference:+.3f} {'within' if abs(difference) < limit else 'beyond'} {limit:.3f}{where}"


def remarks(group, parent):
    """What the group's runs changed against the parent's, and which runs have not ended."""
    texts = []
    for run in group.runs:
        last, end = max(run.rows), run.config.get("max_steps", math.inf)
        if last < end:
            left_out = "" if run in group.used else ", not in the mean"
            texts.append(f"{os.path.basename(run.folder)} at step {last} of {end}{left_out}")
    if len({run.config.get("seed") for run in group.runs}) < len(group.runs):
        texts.append("one seed twice: these are no independent repeats, so the noise is underestimated")
    mine, theirs = group.runs[0].setting, parent.runs[0].setting
    changed = [f"{k}={mine.get(k)!r}" for k in {**mine, **theirs} if k != "protocol" and mine.get(k) != theirs.get(k)]
    if not group.runs[0].config:
        texts.append("changed: unknown, no config.json")
    elif group is not parent:
        texts.append(f"changed: {', '.join(changed) or 'nothing'}")
    return "; ".join(texts)


# ---- tables ----------------------------------------------------------------------------------------------------------


def plus_minus(numbers, digits=3):
    """Mean and, for several seeds, their sample deviation."""
    deviation = f" +- {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else " " * (digits + 6)
    return f"{np.mean(numbers):.{digits}f}{deviation}"


def columns(rows):
    """Lines of a table of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        right = [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return lines


def compare_table(groups, parent):
    """
    A line per group, under it its remarks, and at the end the noise rule. best: mean of the runs' maxima; at: the
    median of their steps; final: the last point +- deviation over seeds; dip, length: of the mean curve.
    """
    rows = [["run", "seeds", "best", "at", "final         ", "against parent", "dip", "length"]]
    for group in groups:
        best_at = statistics.median_low(group.x[i] for i in group.bach.argmax(1))
        fall = dip(group.x, group.bach.mean(0))
        depth, length = (f"{fall[0]:.3f}", str(fall[1] or "never")) if fall else ("-", "-")
        rows.append([group.name, str(len(group.used)), f"{group.bach.max(1).mean():.3f}", str(best_at),
                     plus_minus(group.bach[:, -1]), against(group, parent, groups), depth, length])
    lines = columns(rows)
    for i, group in enumerate(groups, 1):
        if text := remarks(group, parent):
            lines[i] += "\n" + textwrap.fill(text, 120, initial_indent="    ", subsequent_indent="    ")
    _, s, free = noise(groups, parent, parent, parent.x[-1])
    rule = f"within, beyond: {FLOOR} (132 images), "
    if free:
        rule += f"or t s sqrt(1/n + 1/n) at 95 % if larger; sd of seeds s = {s:.3f}, {free} degrees of freedom"
    else:
        rule += "as there are no repeats and the deviation of seeds is unknown: train more seeds"
    return "\n".join([*lines, textwrap.fill(rule, 120)])


def collapse_table(groups):
    """
    A line per group with means over its runs +- deviation: BACH at step 0, the depth of each run's own dip, BACH at the
    end; then effective rank and mean cosine of BACH's images in the teacher, at first, at the worst point, at the end.
    """
    rows = [["run", "start         ", "own dip       ", "end           ", "rank 0", "least", "end         ", "cosine 0",
             "most", "end           "]]
    for group in groups:
        rank, cosine = (values(group.used, group.x, key) for key in ("effective_rank", "mean_cosine"))
        falls = [dip(group.x, curve) or (0,) for curve in group.bach]
        texts = [plus_minus(group.bach[:, 0]), plus_minus([fall[0] for fall in falls]), plus_minus(group.bach[:, -1]),
                 f"{rank[:, 0].mean():.1f}", f"{rank.min(1).mean():.1f}", plus_minus(rank[:, -1], 1),
                 f"{cosine[:, 0].mean():.3f}", f"{cosine.max(1).mean():.3f}", plus_minus(cosine[:, -1])]
        rows.append([group.name, *("-" if "nan" in text else text for text in texts)])
    return "\n".join([*columns(rows), "rank, cosine: effective rank and mean cosine of BACH's images in the teacher"])


def curve_table(rows):
    """A line per row of bach.jsonl."""
    lines = [["    step", "BACH +- std", "plateau", "eff. rank", "mean cosine", "clean +- std", "kNN"]]
    for row in rows:
        row = dict.fromkeys(("std", "plateau", "effective_rank", "mean_cosine", "clean", "clean_std", "knn"), math.nan) | row
        lines.append([f"{row['step']:8}", f"{row['bach']:.4f} +- {row['std']:.4f}", f"{row['plateau']:.4f}",
                      f"{row['effective_rank']:.1f}", f"{row['mean_cosine']:.4f}",
                      f"{row['clean']:.4f} +- {row['clean_std']:.4f}", f"{row['knn']:.4f}"])
    return "\n".join(columns(lines))


# ---- the figure ------------------------------------------------------------------------------------------------------


def plot(groups, path):
    """
    Curves as a PNG: BACH with a band of +- std over seeds, or bars over heads for a single run; beside it, for several
    groups, what collapse_table has. The first group is black. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    several = len(groups) > 1
    figure = Figure(figsize=(9.6, 5.4) if several else (6.4, 4), dpi=150, layout="constrained")
    panels = figure.subplot_mosaic("AAB;AAC" if several else "A")
    panels["A"].set(ylabel="balanced accuracy, 132 images")
    for i, group in enumerate(groups):
        style = {"color": f"C{(i - 1) % 10}" if i else "black", "linestyle": ("-", "--", ":")[max(i - 1, 0) // 10 % 3]}
        mean, seeds = group.bach.mean(0), len(group.used)
        label = f"{group.name}, {seeds} seeds" if seeds > 1 else group.name
        panels["A"].plot(group.x, mean, label=label, **style)
        if seeds > 1:
            std = group.bach.std(0, ddof=1)
            panels["A"].fill_between(group.x, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
        else:
            heads = values(group.used, group.x, "std")[0]
            panels["A"].errorbar(group.x, mean, heads, color=style["color"], fmt="none", elinewidth=0.8)
        if several:
            panels["B"].plot(group.x, values(group.used, group.x, "effective_rank").mean(0), lw=1, **style)
            panels["C"].plot(group.x, values(group.used, group.x, "mean_cosine").mean(0), lw=1, **style)
    if several:
        panels["B"].set_title("effective rank", fontsize=9)
        panels["C"].set_title("mean cosine", fontsize=9)
    for panel in panels.values():
        panel.grid(alpha=0.25)
    panels["C" if several else "A"].set_xlabel("step")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path)


def show(runs, parent="", out=""):
    """
    Print the tables of the runs in the folders that match `runs`, globs with commas between, and draw their curves.

    parent: a run's folder or a group's name; "" = the first. out: the PNG; "" = bach.png in the runs' common folder.
    ValueError, in one line, if no folder matches, a file is damaged or there is no such parent.
    """
    folders = []
    for pattern in runs.split(","):
        folders += [os.path.normpath(folder) for folder in sorted(glob.glob(pattern.strip()))]
    found = [load_run(folder) for folder in dict.fromkeys(folders)]
    found = [run for run in found if run]
    if not found:
        raise ValueError(f"runs={runs}: no folder with a point in bach.jsonl; train with bach_dir set to get one")
    groups = group_runs(found)
    named = [g for g in groups if parent == g.name or os.path.normpath(parent) in [run.folder for run in g.runs]]
    if parent and not named:
        raise ValueError(f"parent={parent}: no such run with a curve; there are {', '.join(g.name for g in groups)}")
    parent = named[0] if parent else groups[0]
    groups.sort(key=lambda group: group is not parent)
    if len(found) > 1:
        print(compare_table(groups, parent), collapse_table(groups), sep="\n\n")
    else:
        print(curve_table(found[0].rows.values()))
    path = out or os.path.join(os.path.commonpath([run.folder for run in found]), "bach.png")
    try:
        plot(groups, path)
        print(path)
    except ImportError:
        print(f"{path} not written: pip install matplotlib")


if __name__ == "__main__":
    runs = ""    # folders of runs: a glob in quotes, or several with commas between
    parent = ""  # the run or group that the others are compared with; "" = the first
    out = ""     # file of the figure; "" = bach.png in the folder that the runs share
    configure(globals())
    try:
        show(runs, parent, out)
    except (ValueError, OSError) as e:
        raise SystemExit(f"curves: {e}") from e
