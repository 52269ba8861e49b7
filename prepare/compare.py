"""
What two preprocessings make of the same slides, side by side: a and b are two command lines of train.py.

    python prepare/compare.py --a='config/toy.py' --b='config/toy.py --exact_reads=false' --out=out/compare

Prints a table and writes compare.csv (a row per tile) and compare.png: um/px, width of the tile, shares of tissue,
black and white pixels, sharpness, near-duplicates, and tiles that share more than half their area with another one.
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
from prepare import report
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
    sides, columns = {}, {}
    for side, config in configs.items():
        source = sources.open_source(config)
        print(f"{side}: {source.about}")
        rows = sides[side] = tile_rows(source, side, samples)
        if not rows:
            raise ValueError(f"none of {samples} tiles of side {side} could be read")
        mark_near_duplicates(rows)
        mark_overlaps(rows, config)
        columns[side] = column(rows) | {"unreadable": str(samples - len(rows))}
    report.write_csv(os.path.join(out, "compare.csv"), sides["a"] + sides["b"])
    print(f"{'':14} | {'a':^40} | {'b':^40}")
    for label, text in columns["a"].items():
        print(f"{label:14} | {text:>40} | {columns['b'][label]:>40}")
    plot(sides, os.path.join(out, "compare.png"))
    return sides


def tile_rows(source, side, samples):
    """A row per readable tile among samples 0, 1, ... of a source. Prints the most frequent reasons for the others."""
    rows, reasons = [], {}
    for n in tqdm(range(samples), f"side {side}", unit="tile"):
        try:
            tile, where = source.read(n)
        except sources.READ_ERRORS as e:
            reasons[str(e)] = reasons.get(str(e), 0) + 1
            continue
        rows.append({
            "side": side, **where, "field_um": len(tile) * where["mpp"], "tissue": wsi.tissue_share(tile),
            "black": (tile.max(2) < 25).mean(), "white": (tile.min(2) > 220).mean(),
            "sharpness": report.sharpness(tile), "dhash": difference_hash(tile).tobytes().hex()})
    for reason in sorted(reasons, key=reasons.get, reverse=True)[:5]:
        print(f"side {side}: {reasons[reason]} x unreadable: {reason}")
    return rows


def difference_hash(tile):
    """64 bits in 8 bytes: where a thumbnail gets lighter to the right."""
    small = np.asarray(Image.fromarray(tile).convert("L").resize((9, 8), Image.BILINEAR))
    return np.packbits(small[:, 1:] > small[:, :-1])


def mark_near_duplicates(rows):
    hashes = np.array([list(bytes.fromhex(row["dhash"])) for row in rows], np.uint8)
    bits = np.unpackbits(hashes, axis=1) * np.float32(2) - 1  # 1 and -1: a product counts bits that agree
    for row, own in zip(rows, bits):
        row["near_duplicate"] = int((bits @ own >= 64 - 2 * NEAR).sum() > 1)


def mark_overlaps(rows, config):
    """Sets overlapped to 1 if another tile covers more than half of the tile, to "" if the slide does not say."""
    by_slide = {}
    for row in rows:
        by_slide.setdefault(row["slide"], []).append(row)
    for path, group in by_slide.items():
        try:  # only the slide can turn x and y, in level-0 px, into um
            mpp_xy = sources.open_slide(path, config).mpp_xy
        except wsi.SlideError:
            mpp_xy = (math.nan, math.nan)
        low = np.array([(row["x"], row["y"]) for row in group]) * mpp_xy  # (n, 2), um
        side = np.array([row["field_um"] for row in group])[:, None]
        for i, row in enumerate(group):
            shared = np.minimum(low + side, low[i] + side[i]) - np.maximum(low, low[i])
            area = shared.clip(0).prod(1) / side[i] ** 2
            row["overlapped"] = "" if np.isnan(area[i]) else int((area > 0.5).sum() > 1)


def column(rows):
    """{label: text} of one side of the table."""
    texts = {"": "".join(f"{head:>10}" for head in ("5 %", "median", "95 %", "mean"))}
    for key in MEASURES:
        values = [row[key] for row in rows if row[key] == row[key]] or [math.nan]
        texts[key] = "".join(f"{v:10.4g}" for v in (*np.percentile(values, (5, 50, 95)), np.mean(values)))
    for key in ("near_duplicate", "overlapped"):
        values = [row[key] for row in rows if row[key] != ""]
        texts[key] = f"{np.mean(values):.1%}" if values else "unknown"
    return texts | {"tiles": str(len(rows))}


def plot(sides, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no compare.png: it needs matplotlib")
    figure = Figure((12, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 3).flat, MEASURES.items()):
        values = [[row[key] for row in rows if row[key] == row[key]] for rows in sides.values()]
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
