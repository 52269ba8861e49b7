"""
The colours of a source: mean and std of its tiles, to paste as `norm`, with 95 % intervals.

    python prepare/stats.py config/vitg.py --shards=data/tiles --samples=2000

It takes the keys and config files of train.py. Tiles of one patient are alike, so the intervals come from a bootstrap
over patients; with fewer than about 20 patients they are too narrow. The last line is the result as JSON.
"""
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sources
import wsi
from configurator import configure

RESAMPLES = 1000  # bootstrap samples of the patients


def train_keys():
    """The keys of train.py with their defaults. Importing train.py would start a run; this executes its key block."""
    text, keys = Path(__file__).resolve().parents[1].joinpath("train.py").read_text(), {}
    exec(text[text.index("# ---- run ") : text.index("\nconfig = configure(globals())")], keys)
    del keys["__builtins__"]
    return keys


def train_config(argv):
    """The keys of train.py as the command line `argv` sets them, without printing what differs from the defaults."""
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(train_keys(), argv)


def colour_stats(source, config):
    """Mean and std per channel, 0 to 1, over all pixels of config["samples"] tiles, with intervals, as a dict."""
    patients, tiles = {}, 0  # patients: name -> (3 sums, 3 channels)
    for n in tqdm(range(config["samples"]), "stats", unit="tile"):
        try:
            tile, where = source.read(n)
        except sources.READ_ERRORS:
            continue
        x = tile.reshape(-1, 3) / 255
        sums = np.stack([np.full(3, len(x)), x.sum(0), (x * x).sum(0)])
        name = wsi.patient_of(where["slide"], config["patient"])
        patients[name] = patients.get(name, 0) + sums
        tiles += 1
    if not tiles:
        raise ValueError(f"none of {config['samples']} tiles could be read")
    sums = np.stack(list(patients.values()))
    rng = np.random.default_rng(config["seed"])
    drawn = [moments(sums[rng.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)]
    ci95 = np.percentile(drawn, (2.5, 97.5), axis=0)  # (low and high, mean and std, channels)
    mean, std = moments(sums).tolist()
    return {"mean": mean, "std": std, "mean_ci95": ci95[:, 0].tolist(), "std_ci95": ci95[:, 1].tolist(),
            "tiles": tiles, "patients": len(patients), "unreadable": config["samples"] - tiles}


def moments(sums):
    """(patients, 3 sums, 3 channels) -> mean and std (2, 3)."""
    count, total, squares = sums.sum(0)
    variance = squares / count - (total / count) ** 2
    return np.stack([total / count, np.sqrt(np.maximum(variance, 0))])


def show(result):
    for key in ("mean", "std"):
        low, high = result[f"{key}_ci95"]
        for channel, name in enumerate(("red", "green", "blue")):
            print(f"{key:5}{name:6}{result[key][channel]:.4f} ({low[channel]:.4f} to {high[channel]:.4f})")
    print(f"{result['tiles']} tiles of {result['patients']} patients, {result['unreadable']} unreadable")
    print("norm =", np.round([result["mean"], result["std"]], 4).tolist())
    print(json.dumps(result))


if __name__ == "__main__":
    config = configure(train_keys() | {"samples": 2000})
    try:
        show(colour_stats(sources.open_source(config), config))
    except (ValueError, OSError) as e:
        raise SystemExit(f"stats: {e}") from None
