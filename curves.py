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
import zlib
from typing import NamedTuple

import numpy as np

from configurator import configure, train_keys

# repeats may differ in these keys of config.json: where files go, how fast they are read, when a run gives up. Folders
# of data are not among them, nor are max_steps and eval_interval (the best of more points is higher)
REPEAT = """seed out_dir resume dry_run device workers open_slides mask_dir log_interval save_interval keep_checkpoints
    keep_every max_bad_steps max_bad_tiles wandb_project""".split()
FLOOR = 0.02  # all seeds meet the same 132 images, so a smaller difference is no evidence, whatever the seeds say
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST handbook 1.3.6.7.2). Two groups of three seeds
# have 4: a factor of 2 in place of t would find a difference between 12 % of equal pairs
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
    folder: str
    rows: dict     # {step: row of bach.jsonl}, at least one
    config: dict   # {} = there is no config.json
    setting: dict  # what repeats share: config without REPEAT, the code and the protocol


class Group(NamedTuple):
    name: str
    runs: list
    used: list        # those in the mean
    x: list           # the steps that all of these have
    bach: np.ndarray  # (used, steps)
    protocol: str


def read_rows(path):
    """{step: row} of a bach.jsonl. A resumed run repeats steps: the later row counts. An unfinished line does not."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
        points = {int(row["step"]): row for row in rows if float(row["bach"]) >= 0}
        return dict(sorted(points.items()))
    except (ValueError, KeyError, TypeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{path}: each line must be a JSON object with a step and a bach ({reason})") from e


def read_code(path):
    """The commit in a source.diff, with a checksum of edits that were not committed; "unknown" without the file."""
    if not os.path.isfile(path):
        return "unknown"
    with open(path, errors="replace") as f:
        head, _, edits = f.read().partition("\ndiff --git ")
    commit = head.partition("\n")[2][:7] or "unknown"  # the command stands in the first line
    return commit + (f"+{zlib.crc32(edits.encode()):08x}" if edits else "")


def load_run(folder):
    """A Run, or None while bach.jsonl has no point. ValueError if it is damaged, except at its end."""
    path, config = f"{folder}/config.json", {}
    rows = read_rows(f"{folder}/bach.jsonl")
    if not rows:
        return None
    if os.path.isfile(path):
        with open(path) as f:
            try:
                config = dict(json.load(f))
            except (ValueError, TypeError) as e:
                raise ValueError(f"{path}: not the JSON object that a run writes ({e})") from e
    if config:  # keys that are younger than the run have their defaults
        config = {**config, **{k: v for k, v in json.loads(json.dumps(train_keys())).items() if k not in config}}
    setting = {k: v for k, v in config.items() if k not in REPEAT}
    setting["code"] = read_code(f"{folder}/source.diff")
    setting["protocol"] = " / ".join(sorted({str(row.get("protocol")) for row in rows.values()}))
    return Run(folder, rows, config, setting)


def group_runs(runs):
    """
    Groups of repeats, in the order of their first runs. A run without config.json is no repeat.

    A group's name is its first folder's without _0, -s1 or _seed2 at the end, or the whole path if that is not unique.
    """
    together = []
    for run in runs:
        for repeats in together:
            if run.config and run.setting == repeats[0].setting:
                repeats.append(run)
                break
        else:
            together.append([run])
    folders = [os.path.basename(os.path.abspath(repeats[0].folder)) for repeats in together]
    names = [re.sub(r"[-_](s|seed)?\d+$", "", folder) for folder in folders]
    groups = []
    for name, repeats in zip(names, together):
        first = repeats[0]
        used, x = mean_of(repeats)
        name = name if names.count(name) == 1 else first.folder
        groups.append(Group(name, repeats, used, x, values(used, x, "bach"), first.setting["protocol"]))
    return groups


def mean_of(runs):
    """The runs whose mean is shown, and the steps that all of these have."""
    ends = [max(run.rows) for run in runs]
    used = [run for run in runs if max(run.rows) >= statistics.median_high(ends)]
    x = sorted(set.intersection(*(set(run.rows) for run in used)))
    return (used, x) if x else mean_of(used[:1])


def values(runs, x, key):
    """What the runs' rows at steps x hold under key, (runs, steps); nan where a row has nothing."""
    found = np.full((len(runs), len(x)), math.nan)
    for i, run in enumerate(runs):
        found[i] = [run.rows[step].get(key, math.nan) for step in x]
    return found


def dip(x, curve):
    """
    Depth and length of a curve's first fall below its value at step 0: (0, 0) without one, (nan, nan) without step 0.

    The depth is from the value at step 0 to the lowest point before the recovery. The length, in steps, is from the
    last point before the fall to the recovery, inf if there is none. Falls within the noise count too.
    """
    if x[0] != 0:
        return math.nan, math.nan
    below = [value < curve[0] for value in curve]
    if True not in below:
        return 0.0, 0
    first = below.index(True)
    if False not in below[first:]:
        return curve[0] - min(curve), math.inf
    end = below.index(False, first)
    return curve[0] - min(curve[first:end]), x[end] - x[first - 1]


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
    at = max((step for step in group.x if step in parent.x), default=None)
    if at is None:
        return "no common step"
    difference = group.bach[:, group.x.index(at)].mean() - parent.bach[:, parent.x.index(at)].mean()
    limit, _, _ = noise(groups, group, parent, at)
    verdict = "within" if abs(difference) < limit else "beyond"
    return f"{difference:+.3f} {verdict} {limit:.3f}"


def remarks(group, parent):
    """What the group changed against its parent, and which of its runs have not ended."""
    run, other = group.runs[0], parent.runs[0]
    mine, theirs = run.setting, other.setting
    changed = [f"{k}={mine.get(k)!r}" for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
    if not (run.config and other.config):
        changed = ["unknown, no config.json"]
    lines = [f"changed: {', '.join(changed)}"] if group is not parent else []
    if len({run.config.get("seed") for run in group.runs}) < len(group.runs):
        lines.append("one seed occurs twice: these are no independent repeats, so the noise is underestimated")
    for run in group.runs:
        last, end = max(run.rows), run.config.get("max_steps")
        if last != end:
            lines.append(f"{run.folder} at step {last} of {end}" + ", not in the mean" * (run not in group.used))
    return [f"    {line}" for line in lines]


def plus_minus(numbers, digits=3):
    """Mean and, for several seeds, their sample deviation."""
    deviation = f" +- {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else " " * (digits + 6)
    return f"{np.mean(numbers):.{digits}f}{deviation}"


def columns(rows):
    """Lines of a table of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return lines


def compare_table(groups, parent):
    """
    A line per group with its remarks, and the noise rule. best: mean of the runs' maxima; at: the median of their
    steps; final: the last point +- deviation over seeds; dip, length: of the mean curve (inf: not recovered yet).
    """
    rows = [["run", "seeds", "best", "at", "final         ", "against parent", "dip", "length"]]
    for group in groups:
        best = group.bach.max(1).mean()
        at = statistics.median_low(group.x[i] for i in group.bach.argmax(1))
        depth, length = dip(group.x, group.bach.mean(0))
        rows.append([group.name, str(len(group.used)), f"{best:.3f}", str(at), plus_minus(group.bach[:, -1]),
                     against(group, parent, groups), f"{depth:.3f}", str(length)])
    head, *found = columns(rows)
    lines = [head]
    for line, group in zip(found, groups):
        lines += [line, *remarks(group, parent)]
    _, s, free = noise(groups, parent, parent, parent.x[-1])
    lines.append(f"within, beyond: {FLOOR} (132 images), or t s sqrt(1/n + 1/n) at 95 % if larger; sd of seeds s = "
                 f"{s:.3f}, {free} degrees of freedom")
    return "\n".join(lines)


def collapse_table(groups):
    """
    A line per group, means over its runs +- deviation: BACH at first, the depth of each run's own dip, BACH at the end;
    then effective rank and mean cosine of BACH's images in the teacher, at first, at the worst point and at the end.
    """
    rows = [["run", "start         ", "own dip       ", "end           ", "rank 0", "least", "end         ", "cosine 0",
             "most", "end           "]]
    for group in groups:
        rank, cosine = (values(group.used, group.x, key) for key in ("effective_rank", "mean_cosine"))
        depths = [dip(group.x, curve)[0] for curve in group.bach]
        bach = [plus_minus(group.bach[:, 0]), plus_minus(depths), plus_minus(group.bach[:, -1])]
        ranks = [f"{rank[:, 0].mean():.1f}", f"{rank.min(1).mean():.1f}", plus_minus(rank[:, -1], 1)]
        cosines = [f"{cosine[:, 0].mean():.3f}", f"{cosine.max(1).mean():.3f}", plus_minus(cosine[:, -1])]
        rows.append([group.name, *bach, *ranks, *cosines])
    return "\n".join([*columns(rows), "rank, cosine: effective rank and mean cosine of BACH's images in the teacher"])


def curve_table(run):
    """A line per row of bach.jsonl."""
    keys = ("bach", "std", "plateau", "effective_rank", "mean_cosine", "clean", "clean_std", "knn")
    rows = [["step", *keys]]
    for step, row in run.rows.items():
        rows.append([str(step)] + [f"{row.get(key, math.nan):.4f}" for key in keys])
    return "\n".join(columns(rows))


def plot(groups, path):
    """Curves as a PNG: BACH with a band of +- std over seeds, and collapse metrics. The parent is black."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained")
    panels = figure.subplot_mosaic([["bach", "bach", "effective_rank"], ["bach", "bach", "mean_cosine"]])
    for i, group in enumerate(groups):
        color = f"C{(i - 1) % 10}" if i else "black"
        line = ("-", "--", ":")[i // 11 % 3]
        for key, panel in panels.items():
            found = values(group.used, group.x, key)
            mean = found.mean(0)
            panel.plot(group.x, mean, line, color=color, label=f"{group.name} (n = {len(found)})")
            if key == "bach" and len(found) > 1:
                std = found.std(0, ddof=1)
                panel.fill_between(group.x, mean - std, mean + std, color=color, alpha=0.15, lw=0)
    for key, panel in panels.items():
        panel.set_title(key.replace("_", " "), fontsize=9)
        panel.grid(alpha=0.25)
    panels["bach"].set(title="", xlabel="step", ylabel="BACH balanced accuracy, 132 images")
    figure.legend(*panels["bach"].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
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
    parent = named[0] if named else groups[0]
    groups.sort(key=lambda group: group is not parent)
    if len(found) > 1:
        print(compare_table(groups, parent), collapse_table(groups), sep="\n\n")
    else:
        print(curve_table(found[0]))
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
