"""
What context adds on the toy slides: readouts of raw features, of a slide encoder, and controls, by patient.

    python prepare/toy_slides.py      # and prepare/features.py, see there; once more --mpp=1.0 --out=.../features_2
    python bench/toy_context.py                       # an hour on two cores; the last lines are the table

Patients are in 5 folds. Seed s trains encoders on the slides outside fold s, without labels, and tests on fold s, so
that each patient is tested once. Balanced accuracy, mean and deviation over the seeds. After a stop, the same command
resumes. A slide's vector is the mean and the deviation of its places' contexts, for raw features also their maximum.
The contexts:

    hidden      of each place while it is hidden (--hide of context.py), which is where an encoder is trained
    visible     the same encoder, while each place is seen
    untrained   the same encoder before training
    shuffled    the same encoder, but the places of each slide are permuted
    retrained   an encoder that was trained on permuted places, too (--shuffle of context.py)
    two scales  an encoder that sees tiles of twice the size as well
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
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import context
import model
import places
from configurator import configure
from eval_slides import stats
from prepare.toy_slides import TASKS

slides = "data/toy_slides"           # labels.csv, features/
out = "out/toy_context"
recipe = "config/context_slides.py"  # of context.py
seeds = 5
jobs = 2                             # seeds at a time
hide = 3                             # each place is hidden once, a third of them at a time
supervised = "arrangement,distance"  # tasks with a transformer trained on the labels
supervised_steps = 600
ENCODERS = {"hidden": [], "retrained": ["--shuffle=true"], "two scales": ["--features={0}/features,{0}/features_2"]}
DIFFERENCES = [("raw and hidden", "raw"), ("raw and hidden", "attention MIL"), ("raw and hidden", "raw and untrained"),
               ("hidden", "untrained"), ("hidden", "shuffled"), ("hidden", "retrained")]


# ---- features of slides ----------------------------------------------------------------------------------------------


def load_labels(folder):
    """Labels {task: (S,)}, patients (S,), names (S,)."""
    with open(f"{folder}/labels.csv") as file:
        _, *rows = csv.reader(file)
    names, patients, *columns = np.transpose(rows)
    return dict(zip(TASKS, np.array(columns, int))), patients, names


def load(folder, names):
    """Features (S, N, C), centres (N, 2) in um: the same of all slides."""
    files = places.files_of(folder)
    x = []
    for name in names:
        features, centres, _ = places.open_features(files[name])
        x.append(features)
    return np.stack(x), centres


def read(net, header, slides, centres, hide=0):
    """Context (S, N, D) of slides, a list with the features (N, C) of each scale for each; centres per scale."""
    return np.stack([places.embed_slide(net, header, list(scales), centres, hide=hide) for scales in slides])


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
    head = LogisticRegression(C=0.5, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), head).fit(x[train], y[train]).predict(x[test])


def scaled(x, train):
    seen = x[train]
    return torch.from_numpy((x - seen.mean((0, 1))) / seen.std((0, 1)))


def attention_mil(keys, values, y, who, train, test, seed):
    """
    Attention MIL (Ilse et al. 2018): attention is computed on keys (S, N, K) and applied to values (S, N, C). The
    learning rate is chosen on a fifth of the patients who (S,) of the training slides.
    """
    keys, values, y = scaled(keys, train), scaled(values, train), torch.from_numpy(y).float()
    held = who[train] % 5 == 0
    scores = {}
    for lr in (3e-4, 1e-3, 3e-3):
        logits = train_mil(keys, values, y, train[~held], seed, lr)
        guess = logits(train[held]) > 0
        scores[lr] = balanced_accuracy_score(y[train[held]], guess)
    logits = train_mil(keys, values, y, train, seed, max(scores, key=scores.get))
    return (logits(test) > 0).numpy()


def train_mil(keys, values, y, train, seed, lr, epochs=60):
    """A function of rows that gives their logits."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    score = nn.Sequential(nn.Linear(keys.shape[2], 64), nn.Tanh(), nn.Linear(64, 1))
    head = nn.Linear(values.shape[2], 1)

    def logits(rows):
        weights = score(keys[rows]).softmax(1)
        return head((weights * values[rows]).sum(1))[:, 0]

    optimizer = torch.optim.AdamW([*score.parameters(), *head.parameters()], lr, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.from_numpy(rng.permutation(train)).split(8):
            F.binary_cross_entropy_with_logits(logits(rows), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.no_grad()(logits)


def transformer(x, nm, y, train, test, header, seed):
    """An encoder like context.py's with a linear head on the mean of its places, trained on labels y (S,)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = context.random_encoder(header, seed).train()
    head = nn.Linear(header["config"]["width"], 1)
    x, y = places.standardise(torch.from_numpy(x), header["mean"], header["std"]), torch.from_numpy(y).float()
    x = x - x.mean(1, keepdim=True)  # on stain the network learns nothing in hundreds of steps

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
        return np.array([logits(row[None]).item() > 0 for row in torch.from_numpy(test)])


# ---- a seed, and the table -------------------------------------------------------------------------------------------


def encoder(name, seed, slide_names):
    """(net, header) of context.py, trained on these slides; `name` is in ENCODERS."""
    folder = Path(out, f"{name.replace(' ', '_')}_{seed}")
    if not list(folder.glob("*.pth")):
        folder.mkdir(parents=True, exist_ok=True)
        listed = folder.with_suffix(".txt")
        listed.write_text("\n".join(slide_names))
        flags = [f"--features={slides}/features", f"--train_slides={listed}", f"--out_dir={folder}", f"--seed={seed}"]
        flags += [flag.format(slides) for flag in ENCODERS[name]]
        subprocess.run([sys.executable, "context.py", recipe, *flags], check=True, stdout=subprocess.DEVNULL)
    return context.load_encoder(str(next(folder.glob("*.pth"))))


def contexts(seed, x, coarse, centres, slide_names):
    """({name: context (S, N, D)}, header) of slides x (S, N, C) from encoders trained on the slides of these names."""
    one_scale = [[own] for own in x], [centres]
    two_scales = list(zip(x, coarse[0])), [centres, coarse[1]]
    net, header = encoder("hidden", seed, slide_names)
    shuffling = {**header, "config": {**header["config"], "shuffle": True}}
    untrained = context.random_encoder(header, seed)
    found = {"hidden": read(net, header, *one_scale, hide), "visible": read(net, header, *one_scale)}
    found["untrained"] = read(untrained, header, *one_scale, hide)
    found["shuffled"] = read(net, shuffling, *one_scale, hide)
    found["retrained"] = read(*encoder("retrained", seed, slide_names), *one_scale, hide)
    found["two scales"] = read(*encoder("two scales", seed, slide_names), *two_scales, hide)
    return found, header


def score(seed, config):
    """{row: {task: balanced accuracy}} of a seed; from its file, if that is there."""
    globals().update(config)
    file = Path(out, f"seed_{seed}.json")
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    labels, patients, names = load_labels(slides)
    (x, centres), coarse = (load(f"{slides}/{folder}", names) for folder in ("features", "features_2"))
    people, who = np.unique(patients, return_inverse=True)
    folds = np.random.default_rng(0).permutation(len(people)) % 5
    tested = folds[who] == seed % 5
    train, test = np.flatnonzero(~tested), np.flatnonzero(tested)
    found, header = contexts(seed, x, coarse, centres, names[train])
    raw = x.astype(np.float32)
    vectors = {"mean": raw.mean(1), "max": raw.max(1), "moments": moments(x), "raw": stats(raw)}
    for name, own in found.items():
        vectors[name] = spread(own)
    for name in ("hidden", "untrained"):
        vectors[f"raw and {name}"] = stats(np.concatenate([raw, found[name]], 2))
    rows = {}
    for task, y in labels.items():
        guesses = {name: probe(vector, y, train, test) for name, vector in vectors.items()}
        guesses["attention MIL"] = attention_mil(raw, raw, y, who, train, test, seed)
        guesses["attention of hidden on raw"] = attention_mil(found["hidden"], raw, y, who, train, test, seed)
        if task in supervised.split(","):
            guesses["supervised"] = transformer(x, places.to_nm(centres), y, train, test, header, seed)
        for name, guess in guesses.items():
            rows.setdefault(name, {})[task] = balanced_accuracy_score(y[test], guess)
    file.write_text(json.dumps(rows))
    return rows


def table(found):
    """Markdown lines: mean and deviation over seeds, then 95 % intervals of differences (Student's t, paired)."""
    tasks = list(found[0]["mean"])
    yield f"| readout | {' | '.join(tasks)} |"
    yield "|---" * (len(tasks) + 1) + "|"
    values = {name: np.array([[row[name].get(task, np.nan) for task in tasks] for row in found]) for name in found[0]}
    for name, value in values.items():
        yield line(name, value.mean(0), value.std(0, ddof=1))
    for more, less in DIFFERENCES:
        gain = values[more] - values[less]
        half = t.ppf(0.975, len(found) - 1) * gain.std(0, ddof=1) / len(found) ** 0.5
        yield line(f"{more}, less {less}", gain.mean(0), half)


def line(name, middles, spreads):
    cells = ["-" if np.isnan(middle) else f"{middle:.3f} +- {spread:.3f}" for middle, spread in zip(middles, spreads)]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    config = configure(globals())
    with get_context("spawn").Pool(jobs) as pool:
        found = pool.starmap(score, [(seed, config) for seed in range(seeds)], chunksize=1)
    print(*table(found), sep="\n")
