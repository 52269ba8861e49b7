"""
A source's tiles in numbers: mean and std of their colours, to paste as `norm`, and what else a preprocessing changes.

    python prepare/stats.py config/vitg.py --shards=data/tiles --samples=2000
    python prepare/stats.py config/vitg.py --sample_list=list.txt      # another preprocessing: compare the tables

It takes the keys and config files of train.py. Tiles of one patient are alike, so the 95 % intervals of the colours
come from a bootstrap over patients; with fewer than about 20 patients they are too narrow. The last line is the result
as JSON.
"""
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import listing
import sources
import wsi
from configurator import configure, train_keys
from prepare.report import sharpness

RESAMPLES = 1000  # bootstrap samples of the patients
MEASURES = ("mpp", "width_um", "tissue", "black", "white", "sharpness")
NEAR = 4          # two tiles are near-duplicates if at most this many bits of their 64-bit difference hashes differ


def train_config(argv):
    """The keys of train.py as the command line `argv` sets them, without printing what differs from the defaults."""
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(train_keys(), argv)


def measures(tile, mpp):
    """MEASURES of a tile: um/px, width in um, shares of tissue, black and white, sharpness."""
    black = (tile.max(2) < 25).mean()
    white = (tile.min(2) > 220).mean()
    return mpp, len(tile) * mpp, wsi.tissue_share(tile), black, white, sharpness(tile)


def difference_hash(tile):
    """64 bits (64,): where a thumbnail gets lighter to the right."""
    small = np.asarray(Image.fromarray(tile).convert("L").resize((9, 8), Image.BILINEAR))
    return (small[:, 1:] > small[:, :-1]).ravel()


def tile_stats(source, config):
    """What `show` prints, of config["samples"] tiles, as a dict; colours are 0 to 1, over all pixels."""
    patients, rows, hashes = {}, [], []  # patients: name -> (3 sums, 3 channels)
    for n in tqdm(range(config["samples"]), "stats", unit="tile"):
        try:
            tile, where = source.read(n)
        except sources.READ_ERRORS as e:
            reason = e
            if not isinstance(e, sources.Unsuitable):
                tqdm.write(f"unreadable: {e}")
            continue
        x = tile.reshape(-1, 3) / 255
        sums = np.stack([np.full(3, len(x)), x.sum(0), (x * x).sum(0)])
        name = wsi.patient_of(where["slide"], config["patient"])
        patients[name] = patients.get(name, 0) + sums
        rows.append(measures(tile, where["mpp"]))
        hashes.append(difference_hash(tile))
    if not rows:
        raise ValueError(f"none of {config['samples']} tiles could be read: {reason}")
    result = colours(np.stack(list(patients.values())), np.random.default_rng(config["seed"]))
    for key, values in zip(MEASURES, np.transpose(rows)):
        values = values[~np.isnan(values)]
        if len(values):  # a folder of tiles has no mpp
            result[key] = [*np.percentile(values, (5, 50, 95)).tolist(), float(values.mean())]
    bits = np.array(hashes) * np.float32(2) - 1  # 1 and -1: a product counts bits that agree
    repeated = [(bits @ own >= 64 - 2 * NEAR).sum() > 1 for own in bits]
    return result | {"near_duplicates": float(np.mean(repeated)), "tiles": len(rows), "patients": len(patients),
                     "unreadable": config["samples"] - len(rows)}


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
    for key in ("mean", "std"):
        print(f"{key}, red, green, blue, with 95 % intervals")
        for value, low, high in zip(result[key], *result[f"{key}_ci95"]):
            print(f"    {value:.4f} ({low:.4f} to {high:.4f})")
    print("               5 %    median      95 %      mean")
    for key in MEASURES:
        texts = [f"{value:10.4g}" for value in result.get(key, ())]
        print(f"{key:9}" + "".join(texts))
    print(f"{result['tiles']} tiles of {result['patients']} patients, {result['unreadable']} unreadable, "
          f"{result['near_duplicates']:.1%} near-duplicates")
    print("norm =", np.round([result["mean"], result["std"]], 4).tolist())
    print(json.dumps(result))


if __name__ == "__main__":
    config = configure(train_keys() | {"samples": 2000})
    try:
        source = sources.open_source(config)
        listing.say_left_out(source.left_out, tqdm.write)
        show(tile_stats(source, config))
    except (ValueError, OSError) as e:
        raise SystemExit(f"stats: {e}") from None
