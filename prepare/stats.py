"""
A source's tiles in numbers: mean and std of their colours, to paste as `norm`, and what else a preprocessing changes.

    python prepare/stats.py config/vitg.py --shards=data/tiles --samples=2000
    python prepare/stats.py config/toy.py --against='--shards=data/tiles' --picture=compare.png   # two, side by side

It takes the keys and config files of train.py. Each tile of a source is read at most once, also if `samples` is more.
Tiles of one patient are alike, so the 95 % intervals of the colours come from a bootstrap over patients; with fewer
than about 20 patients they are too narrow. A patient is what groups.csv (file,patient) in the folder of `tiles` says,
else what `patient` finds in the name. The last line is the result as JSON.
"""
import contextlib
import io
import json
import math
import os
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import listing
import sources
import wsi
from configurator import configure, run, train_keys
from prepare.report import patient_told, patients_text, scale_bar, sharpness

# keys beside train.py's
samples = 2000  # tiles to read
against = ""    # another command line of train.py's keys, to compare with
picture = ""    # a .png to write: histograms, and six tiles of each side at one scale

RESAMPLES = 1000  # bootstrap samples of the patients
NEAR = 4          # two tiles are near-duplicates if at most this many bits of their 64-bit difference hashes differ
MEASURES = {"mpp": "um/px", "width_um": "width of a tile (um)", "tissue": "tissue (share of pixels)",
            "black": "black (share of pixels)", "white": "white (share of pixels)",
            "sharpness": "sharpness (grey levels squared)"}
SHOWN = 6         # tiles of a side in a picture
STYLES = (("#0072B2", "-"), ("#D55E00", "--"))  # of the two sides; colours that colour-blind readers tell apart


def train_config(argv):
    """The keys of train.py as the command line `argv` sets them, without printing what differs from the defaults."""
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(train_keys(), argv)


def measures(tile, mpp):
    """MEASURES of a tile: um/px, width in um, shares of tissue, black and white, sharpness."""
    black = (tile.max(2) < 25).mean()
    white = (tile.min(2) > 220).mean()
    return mpp, tile.shape[1] * mpp, wsi.tissue_share(tile), black, white, sharpness(tile)


def difference_hash(tile):
    """64 bits (64,): where a thumbnail gets lighter to the right."""
    small = np.asarray(Image.fromarray(tile).convert("L").resize((9, 8), Image.BILINEAR))
    return (small[:, 1:] > small[:, :-1]).ravel()


def tiles_of(source, samples):
    """Yields (tile, where) of samples 0, 1, ... that can be read, and names the others."""
    count, reason = 0, ""
    for n in listing.bar(range(samples), "stats", unit="tile"):
        try:
            yield source.read(n)
            count += 1
        except sources.READ_ERRORS as e:
            reason = e
            if not isinstance(e, sources.Unsuitable):
                tqdm.write(f"unreadable: {e}")
    if not count:
        raise ValueError(f"none of {samples} tiles could be read: {reason}")


def tile_stats(source, config):
    """(what `show` prints, as a dict; MEASURES (n, 6); SHOWN of the tiles with their um/px) of config["samples"] tiles,
    or of all if the source has fewer. Colours are 0 to 1, over all pixels."""
    by, groups = listed_patients(config["tiles"], config["patient"])
    patients, told, rows, hashes, shown = {}, {}, [], [], []  # patients: name -> (3 sums, 3 channels)
    size = getattr(source, "size", math.inf)  # slides and mixes are drawn at random
    samples, files = min(config["samples"], size), []
    for tile, where in tiles_of(source, samples):
        if len(rows) * SHOWN >= len(shown) * samples:  # spread over all, since a visit's tiles are of one slide
            shown.append((tile, where["mpp"]))
        x, file = tile.reshape(-1, 3) / 255, where["slide"]
        sums = np.stack([np.full(3, len(x)), x.sum(0), (x * x).sum(0)])
        told[file] = patient_told(file, config["patient"], groups)
        name = told[file] or file
        patients[name] = patients.get(name, 0) + sums
        rows.append(measures(tile, where["mpp"]))
        hashes.append(difference_hash(tile))
        files.append(file)
    result = colours(np.stack(list(patients.values())), np.random.default_rng(config["seed"]))
    rows = np.array(rows)
    for key, values in zip(MEASURES, rows.T):
        values = values[~np.isnan(values)]
        if len(values):
            result[key] = [*np.percentile(values, (5, 50, 95)).tolist(), float(values.mean())]
    known = [patient for patient in told.values() if patient]
    return result | {
        "near_duplicates": near_duplicates(hashes, files if size == math.inf else range(len(rows))),
        "tiles": len(rows), "unreadable": samples - len(rows), "unknown_mpp": int(np.isnan(rows[:, 0]).sum()),
        "patients": len(set(known)), "patients_by": by, "files_without_patient": len(told) - len(known)}, rows, shown


def near_duplicates(hashes, owners):
    """Share of tiles that look like one of another owner: of any other tile, or of another file where places are drawn
    at random. Two draws of one slide may show the same place, which says nothing of the data."""
    bits = np.array(hashes) * np.float32(2) - 1  # 1 and -1: a product counts bits that agree
    owners = np.unique(owners, return_inverse=True)[1]
    repeated = [((bits @ own >= 64 - 2 * NEAR) & (owners != owner)).any() for own, owner in zip(bits, owners)]
    return float(np.mean(repeated))


def listed_patients(folder, pattern):
    """(what tells patients, {file or class/file: patient}) of the groups.csv in a folder of tiles, if there is one."""
    table = os.path.join(folder, "groups.csv")
    if not folder or not os.path.exists(table):
        return f"--patient={pattern}", {}
    from eval_slides import read_csv  # this imports torch
    _, lines = read_csv(table, ("file", "patient"))
    return f"{table}, else --patient={pattern}", {row["file"]: row["patient"] for _, row in lines}


def colours(sums, rng):
    """Mean and std per channel with intervals, from the patients' sums (patients, 3 sums, 3 channels)."""
    drawn = [moments(sums[rng.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)]
    ci95 = np.percentile(drawn, (2.5, 97.5), axis=0)  # (low and high, mean and std, channels)
    mean, std = moments(sums).tolist()
    return {"mean": mean, "std": std, "mean_ci95": ci95[:, 0].tolist(), "std_ci95": ci95[:, 1].tolist()}


def moments(sums):
    """(patients, 3 sums, 3 channels) -> mean and std (2, 3)."""
    count, total, squares = sums.sum(0)
    variance = squares / count - (total / count) ** 2
    return np.stack([total / count, np.sqrt(np.maximum(variance, 0))])


def show(result):
    few = result["patients"] + result["files_without_patient"] < 20
    for key in ("mean", "std"):
        print(f"{key}, red, green, blue, with 95 % intervals" + ", too narrow for so few patients" * few)
        for value, low, high in zip(result[key], *result[f"{key}_ci95"]):
            print(f"    {value:.4f} ({low:.4f} to {high:.4f})")
    print("               5 %    median      95 %      mean")
    for key in MEASURES:
        texts = [f"{value:10.4g}" for value in result.get(key, ())]
        print(f"{key:9}" + ("".join(texts) or "   unknown"))
    print(f"{result['tiles']} tiles, {result['unreadable']} unreadable, {result['unknown_mpp']} of unknown um/px, "
          f"{result['near_duplicates']:.1%} near-duplicates")
    print(patients_text(result["patients"], result["patients_by"], result["files_without_patient"], "files"))
    print("norm =", np.round([result["mean"], result["std"]], 4).tolist())
    print(json.dumps(result))


# ---- the picture: sides are {name: what tile_stats returns} ----------------------------------------------------------


def draw(sides, file):
    """Write the figure: a histogram per measure, and a row of tiles per side."""
    from matplotlib.figure import Figure
    heights = [6.5] + [2.8] * len(sides)
    figure = Figure((13, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), height_ratios=heights)
    for i, axes in enumerate(upper.subplots(2, 3).flat):
        histogram(axes, list(MEASURES.values())[i], {name: rows[:, i] for name, (_, rows, _) in sides.items()})
    upper.legend(*axes.get_legend_handles_labels(), loc="outside upper left")
    sizes = [max(tile.shape) * mpp for _, _, shown in sides.values() for tile, mpp in shown]
    widest = max([size for size in sizes if size > 0], default=1.0)  # um; NaN is unknown
    for part, (name, (result, _, shown)) in zip(lower, sides.items()):
        title = f"{name}: {len(shown)} of {result['tiles']} tiles, all at one scale except where um/px are unknown"
        part.suptitle(textwrap.fill(title, 130), fontsize="medium", x=0.01, ha="left")
        contact_sheet(part.subplots(1, SHOWN), shown, widest)
    figure.savefig(file, dpi=150)


def histogram(axes, label, sides):
    """One measure of each side's tiles, {name: values}; NaN is unknown."""
    known = [values[~np.isnan(values)] for values in sides.values()]
    bins = np.histogram_bin_edges(np.concatenate(known), 30, (0, 1) if "share" in label else None)
    for k, (name, values) in enumerate(sides.items()):
        colour, line = STYLES[k]
        weights = np.full(len(known[k]), 100 / len(values))
        axes.hist(known[k], bins, weights=weights, histtype="step", color=colour, linestyle=line, linewidth=2,
                  label=textwrap.fill(f"{name}: {len(values)} tiles", 130))
        if len(known[k]) < len(values):
            text = f"unknown for {len(values) - len(known[k])} of {len(values)} tiles"
            axes.text(0.5, 0.9 - 0.1 * k, text, color=colour, ha="center", transform=axes.transAxes)
    axes.set(xlabel=label, ylabel="tiles (%)", ylim=(0, None if any(map(len, known)) else 1))


def contact_sheet(row, shown, widest):
    """Tiles with their um/px in a row of axes that are `widest` um wide, and a scale bar if one is to scale."""
    for axes, (tile, mpp) in zip(row, shown):
        known = mpp > 0  # NaN is not
        height, width = np.multiply(tile.shape[:2], mpp if known else widest / max(tile.shape))
        left, top = (widest - width) / 2, (widest - height) / 2
        axes.imshow(tile, extent=(left, left + width, top + height, top))
        scale = f"{mpp:.4g} um/px" if known else "um/px unknown"
        axes.set_title(f"{tile.shape[1]} px, {scale}", fontsize="small")
    for axes in row:
        axes.set(xlim=(0, widest), ylim=(1.2 * widest, 0), aspect="equal")
        axes.set_axis_off()
    if any(mpp > 0 for _, mpp in shown):
        (um, text), y = scale_bar(widest / 2), 1.1 * widest
        row[0].plot([0, um], [y, y], color="black", linewidth=3, solid_capstyle="butt")
        row[0].text(1.1 * um, y, text, va="center")


def main(argv):
    config = configure({**train_keys(), **globals()}, argv, "train.py")
    own = ("--samples", "--against", "--picture")
    configs, commands = [config], [" ".join(flag for flag in argv if flag.split("=")[0] not in own)]
    if config["against"]:
        commands.append(config["against"])
        configs.append(train_config(shlex.split(config["against"])) | {"samples": config["samples"]})
    opened = [sources.open_source(config) for config in configs]
    names = [str(next(config[kind] for kind in sources.SOURCES if config[kind])) for config in configs]
    if len(set(names)) < len(names):
        names = [f"{name} by {command}" for name, command in zip(names, commands)]
    sides = {}
    for name, source, config in zip(names, opened, configs):
        print(f"{name}: {source.about}")
        listing.say_left_out(source.left_out, tqdm.write)
        sides[name] = tile_stats(source, config)
        show(sides[name][0])
    if configs[0]["picture"]:
        draw(sides, configs[0]["picture"])


if __name__ == "__main__":
    run("stats", main, sys.argv[1:])
