"""
What context adds on the toy slides: readouts of raw features, of a slide encoder, and controls, by patient.

    python prepare/toy_slides.py                      # and prepare/features.py, see there
    python bench/toy_context.py                       # a quarter of an hour on two cores; the last lines are the table

Patients are in 5 folds. Seed s trains an encoder on the slides outside fold s, without labels, and tests on fold s, so
that each patient is tested once. Balanced accuracy, mean and deviation over the seeds. `hidden` is the context of each
place while the place itself is hidden, which is where an encoder is trained; `visible` is what --task=embed writes.
"""
import csv
import json
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import context
import model
import places
from configurator import configure

slides = "data/toy_slides"           # labels.csv, features/
out = "out/toy_context"
recipe = "config/context_slides.py"  # of context.py
seeds = 5
jobs = 2                             # seeds at a time
hide = 3                             # each place is hidden once, a third of them at a time
supervised = "distance"              # tasks with a transformer trained on the labels: 40 s each
supervised_steps = 120


# ---- features of slides ----------------------------------------------------------------------------------------------


def load(folder):
    """Features (S, N, C), centres (N, 2) in um, labels {task: (S,)}, patients (S,), names."""
    with open(f"{folder}/labels.csv") as file:
        rows = list(csv.DictReader(file))
    files = places.files_of(f"{folder}/features")
    opened = [places.open_features(files[row["slide"]]) for row in rows]
    x = np.stack([features for features, _, _ in opened])
    labels = {task: np.array([int(row[task]) for row in rows]) for task in list(rows[0])[2:]}
    patients = np.array([row["patient"] for row in rows])
    return x, opened[0][1], labels, patients, [row["slide"] for row in rows]


@torch.inference_mode()
def read(net, header, x, centres, passes):
    """Context (S, N, D) of slides that are windows; in several passes, each place while it is hidden."""
    nm = places.to_nm(centres - centres.mean(0))[None]
    turn = torch.randperm(len(centres), generator=torch.Generator().manual_seed(0)) % max(passes, 1)
    found = []
    for features in torch.from_numpy(x).split(8):
        part = places.standardise(features, header["mean"], header["std"])
        if header["config"]["centre"]:
            part = part - part.mean(1, keepdim=True)
        out = torch.zeros(*part.shape[:2], header["config"]["width"])
        for k in range(max(passes, 1)):
            rows = turn == k
            hidden = (rows & (passes > 0)).expand(len(part), -1)
            out[:, rows] = net([part], nm.expand(len(part), -1, -1), hidden)[0][:, rows]
        found.append(out)
    return torch.cat(found).numpy()


def moments(x):
    """[raw, 3x3 mean, 3x3 mean squared] of (S, N, C) on a square grid, row by row -> (S, 3 C)."""
    side = round(x.shape[1] ** 0.5)
    grid = torch.from_numpy(x).float().view(len(x), side, side, -1).permute(0, 3, 1, 2)
    near = F.avg_pool2d(grid, 3, 1, 1, count_include_pad=False)
    return torch.cat([grid, near, near.square()], 1).mean((2, 3)).numpy()


def spread(x):
    return np.concatenate([x.mean(1), x.std(1)], 1)


# ---- readers: predictions (test,) ------------------------------------------------------------------------------------


def probe(x, y, train, test):
    """Logistic regression on vectors (S, F), standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    head = LogisticRegression(C=0.5, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), head).fit(x[train], y[train]).predict(x[test])


def attention_mil(keys, values, y, train, test, seed, epochs=20):
    """Attention MIL (Ilse et al. 2018): attention is computed on keys (S, N, K) and applied to values (S, N, C)."""
    torch.manual_seed(seed)
    keys, values = ((x - x[train].mean((0, 1))) / x[train].std((0, 1)) for x in (keys, values))
    keys, values, y = (torch.from_numpy(x).float() for x in (keys, values, y))
    score = nn.Sequential(nn.Linear(keys.shape[2], 64), nn.Tanh(), nn.Linear(64, 1))
    head = nn.Linear(values.shape[2], 1)

    def logits(rows):
        weights = score(keys[rows]).softmax(1)
        return head((weights * values[rows]).sum(1))[:, 0]

    optimizer = torch.optim.AdamW([*score.parameters(), *head.parameters()], 1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.from_numpy(np.random.permutation(train)).split(8):
            F.binary_cross_entropy_with_logits(logits(rows), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return (logits(test) > 0).numpy().astype(int)


def transformer(x, nm, y, train, test, header, seed):
    """An encoder like context.py's with a linear head on the mean of its places, trained on labels y (S,)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = context.random_encoder(header, seed).train()
    head = nn.Linear(header["config"]["width"], 1)
    x = places.standardise(torch.from_numpy(x), header["mean"], header["std"])
    x, y = x - x.mean(1, keepdim=True), torch.from_numpy(y).float()  # the slide's stain, which labels do not depend on

    def logits(rows, side=1):
        flipped = (nm * torch.tensor([side, 1])).int().expand(len(rows), -1, -1)
        hidden = torch.zeros(flipped.shape[:2], dtype=torch.bool)
        return head(net([x[rows]], flipped, hidden)[0].mean(1))[:, 0]

    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(supervised_steps):
        for group in optimizer.param_groups:
            group["lr"] = model.cosine_schedule(step, 2e-3, 0.0, supervised_steps, 12)
        rows = torch.from_numpy(rng.choice(train, 16, replace=False))
        F.binary_cross_entropy_with_logits(logits(rows, rng.choice([-1, 1])), y[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return (torch.cat([logits(rows) for rows in torch.from_numpy(test).split(16)]) > 0).numpy().astype(int)


# ---- a seed, and the table -------------------------------------------------------------------------------------------


def encoder(seed, names, recipe):
    """(net, header) of context.py, trained on the slides called `names`."""
    folder = Path(out, f"{Path(recipe).stem}_{seed}")
    if not list(folder.glob("*.pth")):
        folder.mkdir(parents=True, exist_ok=True)
        Path(f"{folder}.txt").write_text("\n".join(names))
        keys = {"features": f"{slides}/features", "train_slides": f"{folder}.txt", "out_dir": folder, "seed": seed}
        flags = [f"--{key}={value}" for key, value in keys.items()]
        subprocess.run([sys.executable, "context.py", recipe, *flags], check=True, stdout=subprocess.DEVNULL)
    return context.load_encoder(str(max(folder.glob("*.pth"))))


def score(seed, config):
    """{row: {task: balanced accuracy}} of a seed."""
    globals().update(config)
    torch.set_num_threads(1)
    x, centres, labels, patients, names = load(slides)
    fold = np.random.default_rng(0).permutation(len(set(patients))) % 5
    tested = np.isin(patients, np.unique(patients)[fold == seed % 5])
    train, test = np.flatnonzero(~tested), np.flatnonzero(tested)
    net, header = encoder(seed, [names[i] for i in train], recipe)
    fresh = context.random_encoder(header, seed)
    places_shuffled = np.random.default_rng(seed).permutation(centres)
    raw, visible = x.astype(np.float32), read(net, header, x, centres, 0)
    hidden, random = (read(one, header, x, centres, hide) for one in (net, fresh))
    shuffled = read(net, header, x, places_shuffled, hide)
    vectors = {
        "mean": raw.mean(1), "max": raw.max(1), "moments": moments(x),
        "mean of [raw, visible]": np.concatenate([raw.mean(1), visible.mean(1)], 1),
        "mean of [raw, hidden]": np.concatenate([raw.mean(1), hidden.mean(1)], 1),
        "mean + std of visible": spread(visible), "mean + std of hidden": spread(hidden),
        "raw + mean + std of hidden": np.concatenate([raw.mean(1), spread(hidden)], 1),
        "random init, mean + std of hidden": spread(random), "shuffled, mean + std of hidden": spread(shuffled)}
    found = {}
    for task, y in labels.items():
        guesses = {name: probe(vector, y, train, test) for name, vector in vectors.items()}
        guesses["attention MIL"] = attention_mil(raw, raw, y, train, test, seed)
        guesses["attention of hidden on raw"] = attention_mil(hidden, raw, y, train, test, seed)
        if task in supervised.split(","):
            guesses["supervised"] = transformer(x, places.to_nm(centres)[None], y, train, test, header, seed)
        for name, guess in guesses.items():
            recalls = [(guess[y[test] == c] == c).mean() for c in (0, 1)]
            found.setdefault(name, {})[task] = float(np.mean(recalls))
    Path(out, f"{Path(recipe).stem}_{seed}.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    config = configure(globals())
    with get_context("spawn").Pool(jobs) as pool:
        found = pool.starmap(score, [(seed, config) for seed in range(seeds)], chunksize=1)
    tasks = list(found[0]["mean"])
    print("| readout |", " | ".join(tasks), "|")
    print("|---|" + "---|" * len(tasks))
    for name in found[0]:
        values = {task: [row[name].get(task, np.nan) for row in found] for task in tasks}
        print(f"| {name} |", " | ".join(f"{np.mean(v):.3f} +- {np.std(v, ddof=1):.3f}" for v in values.values()), "|")
