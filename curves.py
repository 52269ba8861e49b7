"""
Compare training runs: tables and a figure, from the files in their folders, also while they train.

    python curves.py --runs=out/toy                     # one run: its curve as a table, and out/toy/curves.png
    python curves.py --runs='out/*'                     # several, against the first of them; all in out/curves.png
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
    keep_teachers keep_every max_bad_steps max_bad_tiles wandb_project""".split()
SCORES = "bach", "balanced"  # of a run's probe: BACH, or the labelled images of image_dir; a run has one of them
FLOOR = 0.02  # all seeds meet the same images, BACH's 132, so a smaller difference is no evidence, whatever seeds say
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST handbook 1.3.6.7.2). Two groups of three seeds
# have 4: a factor of 2 in place of t would find a difference between 12 % of equal pairs
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
PANELS = {  # keys of bach.jsonl and metrics.jsonl that are drawn, with their axes; the first that there is, is large
    "bach": "BACH balanced accuracy, 132 images", "balanced": "balanced accuracy, image_dir",
    "effective_rank": "effective rank, probe's images", "mean_cosine": "mean cosine, probe's images",
    "loss/neighbours": "loss / loss of neighbours' mean",
    "loss": "training loss (train.py: nats)", "grad_norm": "gradient norm before clipping", "lr": "learning rate",
    "cls_rank": "effective rank, training crops", "cls_cosine": "mean cosine, training crops",
    "images_per_s": "images / s", "windows_per_s": "windows / s"}
MAX_BANDS = 6     # of mean +- deviation; more of them hide each other, then each repeat is a thin line
MAX_POINTS = 200  # per line; of longer runs we draw means over equal stretches, because batches differ
SALT = "690"      # gives "recipe" and the names in config/ablate different colours


class Run(NamedTuple):
    folder: str
    rows: dict     # {step: what metrics.jsonl and bach.jsonl say}, at least one
    config: dict   # {} = there is no config.json
    setting: dict  # what repeats share: config without REPEAT, the code and the protocol


class Group(NamedTuple):
    name: str
    runs: list
    used: list        # those in the mean
    x: list           # the steps at which all of these have a score
    scores: np.ndarray  # (used, steps)
    protocol: str


def read(path):
    """A file's text, "" without the file."""
    if not os.path.isfile(path):
        return ""
    with open(path, errors="replace") as f:
        return f.read()


def read_rows(path):
    """
    {step: row} of a .jsonl, without nulls; `score` is what stands under one of SCORES. Of a step that is there twice
    the later row counts, as after a resume.
    """
    points = {}
    try:
        for line in read(path).split("\n")[:-1]:  # what follows the last line's end is unfinished
            row = json.loads(line)
            step = int(row["step"])
            points[step] = row = {k: v for k, v in row.items() if v is not None}
            row |= {"score": row[key] for key in SCORES if key in row}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: each line must be a JSON object with a step ({e!r})") from e
    return points


def load_run(folder):
    """A Run, or None while it has nothing of PANELS. ValueError if a file is damaged, except at its end."""
    bach, rows = read_rows(f"{folder}/bach.jsonl"), read_rows(f"{folder}/metrics.jsonl")
    for step, row in bach.items():
        rows[step] = rows.get(step, {}) | row
    rows = {step: row for step, row in sorted(rows.items()) if PANELS.keys() & row.keys()}
    if not rows:
        return None
    try:
        config = dict(json.loads(read(f"{folder}/config.json") or "{}"))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{folder}/config.json: not the JSON object that a run writes ({e})") from e
    if config and "task" not in config:  # train.py's: keys that are younger than the run have their defaults
        config = config | json.loads(json.dumps(train_keys())) | config
    setting = {k: v for k, v in config.items() if k not in REPEAT}
    head, _, edits = read(f"{folder}/source.diff").partition("\ndiff --git ")
    commit = head.partition("\n")[2][:7] or "unknown"  # the command stands in the first line
    setting["code"] = commit + (f"+{zlib.crc32(edits.encode()):08x}" if edits else "")
    setting["protocol"] = " / ".join(sorted({str(row.get("protocol")) for row in bach.values()}))
    return Run(folder, rows, config, setting)


def group_runs(runs):
    """
    Groups of repeats, in the order of their first runs. A run without config.json is no repeat. A group's name is its
    first folder's without _0, -s1 or _seed2 at the end, or the whole path if that is not unique.
    """
    together, groups = {}, []
    for run in runs:
        setting = json.dumps(run.setting, sort_keys=True) if run.config else run.folder
        together.setdefault(setting, []).append(run)
    folders = [os.path.basename(os.path.abspath(repeats[0].folder)) for repeats in together.values()]
    names = [re.sub(r"[-_](s|seed)?\d+$", "", folder) for folder in folders]
    for name, repeats in zip(names, together.values()):
        first, used = repeats[0], mean_of(repeats)
        x = common(used, "score")
        name = name if names.count(name) == 1 else first.folder
        groups.append(Group(name, repeats, used, x, values(used, x, "score"), first.setting["protocol"]))
    return groups


def common(runs, key):
    """The steps at which all runs have the key."""
    return [step for step in runs[0].rows if all(key in run.rows.get(step, ()) for run in runs)]


def logged(runs):
    """The keys of PANELS that any of the runs has."""
    return [key for key in PANELS if any(common([run], key) for run in runs)]


def mean_of(runs):
    """The repeats whose mean is shown. Without scores they may lag a tenth behind the median, as rows are frequent."""
    ends = [(common([run], "score") or list(run.rows))[-1] for run in runs]
    scored = common(runs[:1], "score")
    least = statistics.median_high(ends) * (1 if scored else 0.9)
    used = [run for run, end in zip(runs, ends) if end >= least]
    if scored and not common(used, "score"):
        return used[:1]
    return used


def values(runs, x, key):
    """What the runs' rows at steps x hold under key, (runs, steps); nan where a row has nothing."""
    found = np.full((len(runs), len(x)), math.nan)
    for i, run in enumerate(runs):
        found[i] = [run.rows[step].get(key, math.nan) for step in x]
    return found


def dip(x, curve):
    """
    A curve's first fall below its value at step 0: its depth to the lowest point before the recovery, and its length
    in steps from the last point before it to the recovery, inf if there is none. (0, 0) without a fall, (nan, nan)
    without step 0. Falls within the noise count too.
    """
    below = np.append(curve < curve[0], False)  # as if it recovered after the last point
    if x[0] != 0:
        return math.nan, math.nan
    if not below.any():
        return 0.0, 0
    first = below.argmax()
    end = first + below[first:].argmin()
    length = x[end] - x[first - 1] if end < len(x) else math.inf
    return curve[0] - curve[first:end].min(), length


def scores(group, step):
    """The scores of the group's runs at a step."""
    return group.scores[:, group.x.index(step)]


def noise(groups, a, b, at):
    """
    The limit below which two groups do not differ at a step; the sd of seeds there; its degrees of freedom.

    max(0.02, t s sqrt(1 / n_a + 1 / n_b)) is Student's test of two means at 95 %. s is pooled over all groups that have
    repeats, which assumes that all vary alike. Without repeats s is unknown (nan, 0) and only 0.02 is left.
    """
    seeds = [scores(g, at) for g in groups if at in g.x and g.protocol == b.protocol]
    free = sum(len(ends) - 1 for ends in seeds)
    if not free:
        return FLOOR, math.nan, 0
    s = math.sqrt(sum(len(ends) * ends.var() for ends in seeds) / free)
    t = 1.96 + 2.37 / free + 2.82 / free**2  # Abramowitz and Stegun 26.7.5
    if free <= len(T):
        t = T[free - 1]
    limit = t * s * math.sqrt(1 / len(a.used) + 1 / len(b.used))
    return max(FLOOR, limit), s, free


def against(group, parent, groups):
    """The difference of two groups' means at the last step that both have, and whether noise explains it."""
    if group is parent:
        return "parent"
    if group.protocol != parent.protocol:
        return "other protocol"
    at = max({*group.x} & {*parent.x}, default=None)
    if at is None:
        return "no common step"
    difference = scores(group, at).mean() - scores(parent, at).mean()
    limit, _, _ = noise(groups, group, parent, at)
    verdict = "within" if abs(difference) < limit else "beyond"
    return f"{difference:+.3f} {verdict} {limit:.3f}"


def remarks(group, parent):
    """What the group changed against its parent, and which of its runs have not ended."""
    mine, theirs, lines = group.runs[0].setting, parent.runs[0].setting, []
    if group is not parent:
        changed = [f"{k}={mine.get(k)!r}" for k in mine | theirs if mine.get(k) != theirs.get(k)]
        known = group.runs[0].config and parent.runs[0].config
        lines.append("changed: " + (", ".join(changed) if known else "unknown, no config.json"))
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
    for first, *others in rows:
        cells = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def compare_table(groups, parent):
    """
    A line per group with its remarks, and the noise rule. best: mean of the runs' maxima; at: the median of their
    steps; final: the last point +- deviation over seeds; dip, length: of the mean curve (inf: not recovered yet).
    """
    rows = [["run", "seeds", "best", "at", "final         ", "against parent", "dip", "length"]]
    for group in groups:
        best = group.scores.max(1).mean()
        at = group.x[statistics.median_low(group.scores.argmax(1))]
        depth, length = dip(group.x, group.scores.mean(0))
        final, verdict = plus_minus(group.scores[:, -1]), against(group, parent, groups)
        numbers = [f"{best:.3f}", str(at), final, verdict, f"{depth:.3f}", str(length)]
        rows.append([group.name, str(len(group.used)), *numbers])
    head, *found = columns(rows)
    lines = [head]
    for line, group in zip(found, groups):
        lines += [line, *remarks(group, parent)]
    _, s, free = noise(groups, parent, parent, parent.x[-1])
    rule = f"within, beyond: {FLOOR} (the same images for all), or t s sqrt(1/n + 1/n) at 95 % if larger"
    return "\n".join([*lines, f"{rule}; sd of seeds s = {s:.3f}, {free} degrees of freedom"])


def collapse_table(groups):
    """
    A line per group, means over its runs +- deviation: the score at first, the depth of each run's own dip, the score
    at the end; then effective rank and mean cosine of the probe's images in the teacher, at first, at the worst point
    and at the end.
    """
    rows = [["run", "start         ", "own dip       ", "end           ", "rank 0", "least", "end         ", "cosine 0",
             "most", "end           "]]
    for group in groups:
        depths = [dip(group.x, curve)[0] for curve in group.scores]
        row = [group.name, plus_minus(group.scores[:, 0]), plus_minus(depths), plus_minus(group.scores[:, -1])]
        for key, worst, digits in (("effective_rank", np.min, 1), ("mean_cosine", np.max, 3)):
            found = values(group.used, group.x, key)
            start, least = found[:, 0].mean(), worst(found, 1).mean()
            row += [f"{start:.{digits}f}", f"{least:.{digits}f}", plus_minus(found[:, -1], digits)]
        rows.append(row)
    legend = "rank, cosine: effective rank and mean cosine of the probe's images in the teacher"
    return "\n".join([*columns(rows), legend])


def rows_table(name, rows, keys, form):
    """A line per row of {row's name: {key: number}}."""
    lines = [[name, *keys]]
    for label, row in rows.items():
        numbers = [row.get(key, math.nan) for key in keys]
        lines.append([str(label), *(f"{number:{form}}" for number in numbers)])
    return "\n".join(columns(lines))


def curve_table(run):
    """A line per point of the curve of scores; without one, about twenty rows of metrics.jsonl."""
    points = {step: run.rows[step] for step in common([run], "score")}
    if points:
        score = next(key for key in SCORES if common([run], key))
        keys = (score, "std", "plateau", "effective_rank", "mean_cosine", "clean", "clean_std", "knn")
        return rows_table("step", points, keys, ".4f")
    at = np.linspace(0, len(run.rows) - 1, min(len(run.rows), 20)).astype(int)
    steps = np.array(list(run.rows))[at]
    return rows_table("step", {step: run.rows[step] for step in steps}, logged([run]), ".4g")


def plot(groups, path):
    """A PNG of means over repeats. A name has one colour in every figure; of two that share it, one is dashed."""
    from matplotlib.figure import Figure

    keys = logged([run for group in groups for run in group.used])
    first, second, third, *others = keys + ["."] * (-len(keys) % 3)  # "." stays empty
    mosaic = [[first, first, second], [first, first, third]]
    mosaic += np.reshape(others, (-1, 3)).tolist()
    figure = Figure(figsize=(12, 2.8 * len(mosaic) + 0.6), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic(mosaic)
    colors = [f"C{zlib.crc32((SALT + group.name).encode()) % 10}" for group in groups]
    bands = sum(len(group.used) > 1 for group in groups)
    for i, group in enumerate(groups):
        earlier = colors[:i].count(colors[i])  # groups of this colour
        line = {"color": colors[i], "ls": ("-", "--", ":", "-.")[earlier % 4]}
        panels[first].plot([], [], **line, label=f"{group.name} (n = {len(group.used)})")
        for key in logged(group.used):
            x = common(group.used, key)
            rows = np.vstack([x, values(group.used, x, key)])
            parts = np.array_split(rows, min(len(x), MAX_POINTS), axis=1)
            x, *found = np.stack([part.mean(1) for part in parts], 1)
            mean = np.mean(found, 0)
            panels[key].plot(x, mean, **line, marker="" if len(x) > 1 else "o")  # a line through one point is empty
            if bands > MAX_BANDS:
                panels[key].plot(x, np.transpose(found), **line, lw=0.5, alpha=0.4)
            elif len(found) > 1:
                std = np.std(found, 0, ddof=1)
                panels[key].fill_between(x, mean - std, mean + std, color=colors[i], alpha=0.15, lw=0)
    for key in keys:
        panels[key].set(xlabel="step", ylabel=PANELS[key])
        panels[key].locator_params(axis="x", nbins=5)
        panels[key].grid(alpha=0.25)
    figure.legend(*panels[first].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def write_events(runs, top, folder):
    """TensorBoard's event files of runs, in the folders that these have below `top`. What was there before is void."""
    from torch.utils.tensorboard import SummaryWriter

    for run in runs:
        with SummaryWriter(os.path.join(folder, os.path.relpath(run.folder, top)), purge_step=0) as events:
            for step, row in run.rows.items():
                for key, value in row.items():
                    if isinstance(value, int | float) and key != "score":  # it stands under its own name too
                        events.add_scalar(key, value, step)


def show(runs, parent="", out="", tensorboard=""):
    """Tables and figure of the runs; the arguments are the keys below. ValueError, in one line, for what is wrong."""
    folders = []
    for pattern in runs.split(","):
        folders += [os.path.normpath(folder) for folder in sorted(glob.glob(pattern.strip()))]
    found = [run for run in map(load_run, dict.fromkeys(folders)) if run]
    if not found:
        raise ValueError(f"runs={runs}: no folder with a row in metrics.jsonl or bach.jsonl; runs write them")
    groups = group_runs(found)
    scored = [group for group in groups if group.x]
    named = [g for g in scored if os.path.normpath(parent) in [g.name, *(run.folder for run in g.runs)]]
    if parent and not named:
        names = ", ".join(group.name for group in scored)
        there = f"there are {names}" if names else "no run here has bach_dir's or image_dir's; leave parent out"
        raise ValueError(f"parent={parent}: no such run with a curve; {there}")
    scored.sort(key=lambda group: group not in named)
    others = [run for run in found if not common([run], "score")]
    if len(found) == 1:
        print(curve_table(found[0]))
    else:
        if scored:
            print(compare_table(scored, scored[0]), collapse_table(scored), sep="\n\n")
        if others:
            rows = {run.folder: run.rows[max(run.rows)] for run in others}
            print(rows_table("no score, last row", rows, ["step", *logged(others)], ".4g"))
    top = os.path.commonpath([run.folder for run in found])
    path = out or os.path.join(top, "curves.png")
    try:
        plot(groups, path)
        print(path)
    except ImportError:
        print(f"{path} not written: pip install matplotlib")
    if tensorboard:
        write_events(found, top, tensorboard)


if __name__ == "__main__":
    runs = ""         # folders of runs: a glob in quotes, or several with commas between
    parent = ""       # a run's folder or a group's name that the others are compared with; "" = the first
    out = ""          # file of the figure; "" = curves.png in the folder that the runs share
    tensorboard = ""  # folder for TensorBoard's event files of the runs; "" = none
    configure(globals())
    try:
        show(runs, parent, out, tensorboard)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"curves: {e}") from e
