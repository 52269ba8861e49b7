"""
What two preprocessings make of the same slides, side by side: a and b are two command lines of train.py.

    python prepare/compare.py --a='config/toy.py' --b='config/toy.py --exact_reads=false' --out=out/compare

Prints a table and writes compare.csv (a row per tile) and compare.png: um/px, width of the tile, shares of tissue,
black and white pixels, sharpness and near-duplicates.
"""
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sources
import wsi
from configurator import configure
from prepare import slides
from prepare.report import sharpness
from prepare.stats import train_keys

a = ""          # a command line of train.py
b = ""          # another
out = ""        # folder to write
samples = 2000  # tiles of each

NEAR = 4        # two tiles are near-duplicates if at most this many bits of their 64-bit difference hashes differ
MEASURES = {"mpp": "um/px", "field_um": "width of the tile, um", "tissue": "share of tissue", "black": "share of black",
            "white": "share of white", "sharpness": "sharpness"}


def compare(configs, samples, out):
    """configs: {"a", "b"} -> train.py's keys. Prints the table, writes compare.csv and .png, returns {side: rows}."""
    os.makedirs(out, exist_ok=True)
    sides = {}
    for side, config in configs.items():
        source = sources.open_source(config)
        print(f"{side}: {source.about}")
        sides[side] = tile_rows(source, side, samples)
    slides.write_csv(os.path.join(out, "compare.csv"), sides["a"] + sides["b"])
    print_table(sides, samples)
    plot(sides, os.path.join(out, "compare.png"))
    return sides


def tile_rows(source, side, samples):
    """A row per readable tile among samples 0, 1, ... of a source. Prints the most frequent reasons for the others."""
    rows, hashes, reasons = [], [], {}
    for n in tqdm(range(samples), f"side {side}", unit="tile"):
        try:
            tile, where = source.read(n)
        except sources.READ_ERRORS as e:
            reasons[str(e)] = reasons.get(str(e), 0) + 1
            continue
        rows.append({
            "side": side, **where, "field_um": len(tile) * where["mpp"], "tissue": wsi.tissue_share(tile),
            "black": (tile.max(2) < 25).mean(), "white": (tile.min(2) > 220).mean(), "sharpness": sharpness(tile)})
        hashes.append(difference_hash(tile))
    for reason in sorted(reasons, key=reasons.get, reverse=True)[:5]:
        print(f"side {side}: {reasons[reason]} x unreadable: {reason}")
    if not rows:
        raise ValueError(f"none of {samples} tiles of side {side} could be read")
    bits = np.array(hashes) * np.float32(2) - 1  # 1 and -1: a product counts bits that agree
    for row, own in zip(rows, bits):
        row["near_duplicate"] = int((bits @ own >= 64 - 2 * NEAR).sum() > 1)
    return rows


def difference_hash(tile):
    """64 bits (64,): where a thumbnail gets lighter to the right."""
    small = np.asarray(Image.fromarray(tile).convert("L").resize((9, 8), Image.BILINEAR))
    return (small[:, 1:] > small[:, :-1]).ravel()


def known(rows, key):
    return [row[key] for row in rows if not math.isnan(row[key])]


def print_table(sides, samples):
    print(f"{'':14} side" + "".join(f"{head:>10}" for head in ("5 %", "median", "95 %", "mean")))
    for key in MEASURES:
        for side, rows in sides.items():
            values = known(rows, key) or [math.nan]
            shown = *np.percentile(values, (5, 50, 95)), np.mean(values)
            print(f"{key:14} {side:4}" + "".join(f"{value:10.4g}" for value in shown))
    for side, rows in sides.items():
        repeated = np.mean([row["near_duplicate"] for row in rows])
        print(f"{side}: {len(rows)} tiles, {samples - len(rows)} unreadable, {repeated:.1%} near-duplicates")


def plot(sides, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no compare.png: it needs matplotlib")
    figure = Figure((12, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 3).flat, MEASURES.items()):
        values = [known(rows, key) for rows in sides.values()]
        axes.hist(values, 30, range=(0, 1) if label.startswith("share") else None, label=list(sides))
        axes.set(xlabel=label, ylabel="tiles")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    configure(globals())
    try:
        if not (a and b and out):
            raise ValueError("state --a='config/x.py --key=value' --b='...' --out=FOLDER")
        compare({side: configure(train_keys(), shlex.split(line)) for side, line in (("a", a), ("b", b))}, samples, out)
    except (ValueError, OSError) as e:
        raise SystemExit(f"compare: {e}") from None
