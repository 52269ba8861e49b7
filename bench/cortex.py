"""
Does context help on real tissue? Layers of human cortex (LieberInstitute/HumanPilot), another donor left out.

    python bench/cortex.py --data=data/dlpfc      # donor{1,2}_*.png and .csv (x_px, y_px, layer); minutes on one core

A layer is a matter of position in the tissue; the classes are the layers that every donor has. A place's feature is
made by hand from its 8 x 8 px at 12.7 um/px, and standardised by its section. For each donor, a slide encoder is
trained on the others' sections without labels, then a logistic regression on the others' places, and this donor's are
tested: balanced accuracy. `context` is context.py's, of a place while it is hidden; `untrained` is the same network
before training; `shuffled` has places permuted before windows are made.
"""
import csv
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import context
import places
import sources
from configurator import configure
from eval_slides import neighbours

data = "data/dlpfc"                 # folder of the sections
out = "out/cortex"                  # folder to write
recipe = "config/context_cortex.py" # of context.py
seeds = 3

UM = 12.68           # um/px, except for two sections
SECTIONS_UM = {"donor1_151509": 12.567, "donor1_151510": 12.613}
PX = 8               # side of a place: 100 um, the distance to its neighbours


def describe(patch):
    """28 numbers of uint8 (8, 8, 3): colours, their spread, gradients, and the optical density of 4 x 4 quarters."""
    density = -np.log((patch.astype(np.float32) + 1) / 256)
    rows, columns = np.diff(density, axis=0), np.diff(density, axis=1)
    quarters = density.reshape(2, 4, 2, 4, 3).mean((1, 3))
    low, high = np.quantile(density.mean(2), (0.1, 0.9))
    parts = [density.mean((0, 1)), density.std((0, 1)), np.abs(rows).mean((0, 1)), np.abs(columns).mean((0, 1)),
             [low, high], quarters.ravel()]
    return np.concatenate([np.ravel(part) for part in parts])


def make_features(image_file):
    """A section's file of features, and its layers (N,)."""
    name = image_file.stem
    pixels = sources.decode(image_file, image_file)
    padded = np.pad(pixels, ((PX, PX), (PX, PX), (0, 0)), mode="edge")
    with open(image_file.with_suffix(".csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    centres = np.array([[row["x_px"], row["y_px"]] for row in rows], float)
    corners = np.rint(centres - PX / 2).astype(int)
    features = np.array([describe(padded[y + PX : y + 2 * PX, x + PX : x + 2 * PX]) for x, y in corners])
    features = (features - features.mean(0)) / features.std(0)  # donors are stained differently
    um = SECTIONS_UM.get(name, UM)
    about = {"mpp": UM, "tile_px": PX, "patch_size_level0": PX, "level0_mpp": um, "overlap": 0, "norm": "by hand"}
    np.savez(f"{out}/features/{name}.npz", features=np.float16(features), coords=corners, **about)
    return np.array([row["layer"] for row in rows])


def contexts(sections, weights, seed):
    """{row: [context (N, D) of each section]} of a trained encoder and its controls."""
    net, header = context.load_encoder(weights)
    untrained = context.random_encoder(header, seed)
    hide = 3
    found = {"context": [], "untrained": [], "shuffled": []}
    rng = np.random.default_rng(seed)
    for features, centres in sections:
        found["context"].append(places.embed_slide(net, header, features, centres, hide=hide))
        found["untrained"].append(places.embed_slide(untrained, header, features, centres, hide=hide))
        order = rng.permutation(len(centres))
        found["shuffled"].append(places.embed_slide(net, header, features, centres[order], hide=hide))
    return found


def wide_mean(features, centres, count):
    """The mean of the `count` places nearest to each, (N, C): what attention that has learnt nothing may come to."""
    return np.stack([features[places.nearest(centres, at, count)].mean(0) for at in centres])


def score(x, layers, donors, tested):
    """Balanced accuracy on the places of donor `tested` of a regression on the others'; lists per section."""
    of_donor = {donor: set() for donor in donors}
    for donor, own in zip(donors, layers):
        of_donor[donor] |= set(own)
    common = sorted(set.intersection(*of_donor.values()))
    kept = [np.isin(own, common) for own in layers]
    x, y, donor = (np.concatenate([own[k] for own, k in zip(parts, kept)]) for parts in (
        x, layers, [np.full(len(own), donor) for donor, own in zip(donors, layers)]))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, class_weight="balanced", max_iter=1000))
    probe.fit(x[donor != tested], y[donor != tested])
    return balanced_accuracy_score(y[donor == tested], probe.predict(x[donor == tested]))


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    Path(out, "features").mkdir(parents=True, exist_ok=True)
    images = sorted(Path(data).glob("donor*_*.png"))
    if not images:
        raise SystemExit(f"cortex: no donor*_*.png in --data={data}")
    layers = [make_features(image) for image in images]
    names, donors = [image.stem for image in images], [image.stem.split("_")[0] for image in images]
    files = places.files_of(f"{out}/features")
    sections = [places.open_features(files[name])[:2] for name in names]
    raw = [np.asarray(features, np.float32) for features, _ in sections]
    means = {"3x3 mean": [neighbours(own, centres) for own, (_, centres) in zip(raw, sections)]}
    for count in (128, 256):
        means[f"mean of {count}"] = [wide_mean(own, centres, count) for own, (_, centres) in zip(raw, sections)]
    table = {}
    for tested in sorted(set(donors)):
        table.setdefault("raw", {})[tested] = [score(raw, layers, donors, tested)]
        for row, near in means.items():
            both = [np.concatenate(pair, 1) for pair in zip(raw, near)]
            table.setdefault(f"raw, {row}", {})[tested] = [score(both, layers, donors, tested)]
        listed = Path(out, f"without_{tested}.txt")
        listed.write_text("\n".join(name for name, donor in zip(names, donors) if donor != tested))
        for seed in range(seeds):
            run = Path(out, f"{tested}_{seed}")
            if not list(run.glob("*.pth")):
                command = [sys.executable, "context.py", recipe, f"--features={out}/features", f"--out_dir={run}",
                           f"--train_slides={listed}", f"--seed={seed}"]
                subprocess.run(command, check=True)
            weights = max(run.glob("*.pth"), key=lambda path: int(path.stem))
            for row, own in contexts(sections, weights, seed).items():
                both = [np.concatenate(pair, 1) for pair in zip(raw, own)]
                scores = table.setdefault(f"raw, {row}", {}).setdefault(tested, [])
                scores.append(score(both, layers, donors, tested))
    for row, by_donor in table.items():
        texts = []
        for tested, scores in by_donor.items():
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            texts.append(f"{tested} {statistics.mean(scores):.3f} +- {spread:.3f}")
        print(f"{row:20}" + "   ".join(texts), flush=True)
