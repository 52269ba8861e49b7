"""
Tiles of a source in numbers: two preprocessings of the same slides side by side, and the colours to normalise by.

    python data.py --task=compare --a='config/toy.py' --b='config/toy.py --exact_reads=false' --out=out/compare
    python data.py --task=stats config/vitg.py --samples=10000

compare writes compare.csv (a row a tile), compare.png and prints a table: um/px, tissue, black and white pixels,
sharpness, near-duplicates (of 64 bits of a difference hash at most NEAR differ) and tiles that overlap another by half.
"""
import json
import math
import os

import numpy as np
from PIL import Image
from tqdm import tqdm

import sources
import wsi
from prepare import report

NEAR = 4          # differing bits, of 64, up to which two tiles count as near-duplicates
RESAMPLES = 1000  # bootstrap samples of the patients
MEASURES = ("mpp", "field_um", "tissue", "black", "white", "sharpness")


def compare(c):
    """c["samples"] tiles each of c["a"] and c["b"], configs with train.py's keys: compare.csv, .png and a table."""
    os.makedirs(c["out"], exist_ok=True)
    sides, unreadable = {}, {}
    for side in "ab":
        source = sources.open_source(c[side])
        print(f"{side}: {source.about}")
        sides[side], unreadable[side] = tile_rows(source, side, c["samples"], sources.READ_ERRORS)
        if not sides[side]:
            raise ValueError(f"compare: none of {c['samples']} tiles of side {side} could be read")
        mark_repeats(sides[side], c[side])
    report.write_csv(os.path.join(c["out"], "compare.csv"), sides["a"] + sides["b"])
    bins = sorted({mpp_bin(row["mpp"]) for rows in sides.values() for row in rows})
    a, b = (column(rows, unreadable[side], bins) for side, rows in sides.items())
    print(f"{'':17} | {'a':^40} | {'b':^40}")
    for label in a:
        print(f"{label:17} | {a[label]:>40} | {b[label]:>40}")
    plot(sides, os.path.join(c["out"], "compare.png"))
    print(f"{c['out']}/compare.csv")
    return sides


def tile_rows(source, side, samples, read_errors):
    """([a row a tile], number of unreadable ones) of samples 0, 1, ... of a source."""
    rows, unreadable, reasons = [], 0, {}
    for n in tqdm(range(samples), f"side {side}", unit="tile"):
        try:
            tile, where = source.read(n)
        except read_errors as e:
            unreadable += 1
            reasons[str(e)] = reasons.get(str(e), 0) + 1
            continue
        small = np.asarray(Image.fromarray(tile).convert("L").resize((9, 8), Image.BILINEAR))
        dhash = np.packbits(small[:, 1:] > small[:, :-1])  # 64 bits: where it gets lighter to the right
        rows.append({
            "side": side, **{key: where[key] for key in ("slide", "x", "y", "mpp")},
            "field_um": len(tile) * where["mpp"], "tissue": wsi.tissue_share(tile),
            "black": (tile.max(2) < 25).mean(), "white": (tile.min(2) > 220).mean(),
            "sharpness": report.sharpness(tile), "dhash": dhash.tobytes().hex()})
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:5]:
        print(f"side {side}: {count} x unreadable: {reason}")
    return rows, unreadable


def mark_repeats(rows, c):
    """Sets near_duplicate, 1 if another dhash is NEAR, and overlapped, 1 if half the tile lies in another ("" = ?)."""
    hashes = np.array([list(bytes.fromhex(row["dhash"])) for row in rows], np.uint8)
    bits = np.unpackbits(hashes, axis=1) * np.float32(2) - 1  # 1 and -1: a product counts agreement
    groups = {}
    for row, own in zip(rows, bits):
        row["near_duplicate"] = int((bits @ own >= 64 - 2 * NEAR).sum() > 1)
        groups.setdefault(row["slide"], []).append(row)
    for path, group in groups.items():
        try:  # x and y are in level-0 px, which only the slide can turn into um
            mpp_xy = wsi.Slide(path, c["slide_mpp"] or None, mpp_from_objective=c["mpp_from_objective"]).mpp_xy
        except wsi.SlideError:
            mpp_xy = (math.nan, math.nan)
        low = np.array([(row["x"], row["y"]) for row in group]) * mpp_xy  # (n, 2), um
        side = np.array([row["field_um"] for row in group])[:, None]
        for i, row in enumerate(group):
            shared = np.minimum(low + side, low[i] + side[i]) - np.maximum(low, low[i])
            area = shared.clip(0).prod(1) / side[i] ** 2
            row["overlapped"] = "" if np.isnan(area[i]) else int((area > 0.5).sum() > 1)


def mpp_bin(mpp):
    """Bins of an eighth of an octave, 9 %: one scanner's 0.2498 and another's 0.2525 um/px are in the same."""
    return round(8 * math.log2(mpp)) / 8 if mpp > 0 else math.inf


def column(rows, unreadable, bins):
    """{label: text} of one side of the table."""
    texts = {"": "".join(f"{head:>10}" for head in ("5 %", "median", "95 %", "mean"))}
    for key in MEASURES:
        values = [row[key] for row in rows if row[key] == row[key]] or [math.nan]
        texts[key] = "".join(f"{v:10.4g}" for v in (*np.percentile(values, (5, 50, 95)), np.mean(values)))
    for key in ("near_duplicate", "overlapped"):
        values = [row[key] for row in rows if row[key] != ""]
        texts[key] = f"{np.mean(values):.1%}" if values else "unknown"
    for octave in bins:
        label = f"{2 ** (octave - 1 / 16):.2f} - {2 ** (octave + 1 / 16):.2f}" if octave < math.inf else "unknown"
        texts[f"um/px {label}"] = f"{np.mean([mpp_bin(row['mpp']) == octave for row in rows]):.1%}"
    return texts | {"tiles": str(len(rows)), "unreadable": str(unreadable)}


def plot(sides, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no compare.png: it needs matplotlib")
    figure = Figure((12, 6), layout="constrained")
    for axes, key in zip(figure.subplots(2, 3).flat, MEASURES):
        values = [[row[key] for row in rows if row[key] == row[key]] for rows in sides.values()]
        axes.hist(values, 30, range=(0, 1) if key in ("tissue", "black", "white") else None, label=list(sides))
        axes.set_title(key)
    axes.legend()
    figure.savefig(file)


# ---- stats: mean and std of a source --------------------------------------------------------------------------------


def stats(c):
    """Prints mean and std of c["samples"] tiles of the source that c names, to be pasted as `norm`; last, as JSON."""
    result = colour_stats(sources.open_source(c), c, sources.READ_ERRORS)
    for key in ("mean", "std"):
        spans = zip(result[key], *result[f"{key}_ci95"])
        print(f"{key:5}" + ", ".join(f"{v:.4f} ({low:.4f} to {high:.4f})" for v, low, high in spans))
    few = "; too narrow: there are few patients" if result["patients"] < 20 else ""
    print(f"{result['tiles']} draws of {result['places']} tiles of {result['patients']} patients, "
          f"{result['unreadable']} unreadable; in brackets 95 % intervals, by a bootstrap over patients, since "
          f"tiles of one are alike{few}")
    print("norm =", tuple(tuple(round(v, 4) for v in result[key]) for key in ("mean", "std")))
    print(json.dumps(result))


def colour_stats(source, c, read_errors=()):
    """Mean and std per channel, 0 to 1, over all pixels of all tiles, with intervals. Keeps sums, no tiles."""
    patients, tiles, places = {}, 0, set()
    for n in tqdm(range(c["samples"]), "stats", unit="tile"):
        try:
            tile, where = source.read(n)
        except read_errors:
            continue
        x, who, tiles = tile.reshape(-1, 3) / 255, wsi.patient_of(where["slide"], c["patient"]), tiles + 1
        places.add(tuple(where.values()))
        patients[who] = patients.get(who, 0) + np.stack([0 * x[0] + len(x), x.sum(0), (x * x).sum(0)])
    if not tiles:
        raise ValueError(f"stats: none of {c['samples']} tiles could be read")

    def moments(sums):  # (patients, 3 sums, 3 channels) -> mean and std (2, 3)
        count, total, squares = sums.sum(0)
        return np.stack([total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))])
    sums, rng = np.stack(list(patients.values())), np.random.default_rng(c["seed"])
    draws = [moments(sums[rng.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)]
    (mean, std), ci = moments(sums).tolist(), np.percentile(draws, (2.5, 97.5), axis=0)
    return {"mean": mean, "std": std, "mean_ci95": ci[:, 0].tolist(), "std_ci95": ci[:, 1].tolist(), "tiles": tiles,
            "places": len(places), "patients": len(patients), "unreadable": c["samples"] - tiles}
