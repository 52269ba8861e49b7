import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import eval_bach
import model

ROOT = Path(__file__).parent.parent
MEAN, STD = model.NORMS["imagenet"]
SPLIT = eval_bach.LABELS, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX
PHOTOS = "ICIAR2018_BACH_Challenge/Photos"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# images and split


@pytest.fixture(scope="module")
def bach_template(tmp_path_factory):
    """A BACH-shaped folder of 64x48 images whose colour tells the class, with clutter that must be ignored."""
    root, rng = tmp_path_factory.mktemp("bach"), np.random.default_rng(0)
    for label, (name, prefix) in enumerate(eval_bach.CLASSES.items()):
        folder = root / PHOTOS / name
        folder.mkdir(parents=True)
        for i in range(1, 101):
            pixels = rng.integers(0, 100, (48, 64, 3)) + np.array([90, 30, 30]) * (np.arange(3)[None] == label - 1)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{prefix}{i:03d}.tif")
        (folder / "Thumbs.db").write_bytes(b"x")
    return root


@pytest.fixture
def bach(bach_template, tmp_path):
    """A copy that a test may damage (hard links: nothing is written into the files themselves)."""
    for source in bach_template.rglob("*.*"):
        target = tmp_path / "bach" / source.relative_to(bach_template)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    return tmp_path / "bach"


def test_split():
    train, val = eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX
    assert (len(train), len(val)) == (268, 132) and sorted(train + val) == list(range(400))
    assert eval_bach.LABELS[train].bincount().tolist() == [52, 70, 69, 77]
    assert eval_bach.LABELS[val].bincount().tolist() == [48, 30, 31, 23]
    names = [f"{p}{i:03d}" for p in eval_bach.CLASSES.values() for i in range(1, 101)]
    first = {names[v] for p, v in zip([-1] + val, val) if v != p + 1}  # first image of each validation stretch
    assert first == {"b042", "b061", "is040", "iv041", "iv061", "n046"}


def test_files_in_order_from_any_level(bach):
    files = eval_bach.bach_files(bach)
    assert len(files) == 400 and [Path(f).name for f in files[99:101]] == ["b100.tif", "is001.tif"]
    assert [Path(files[i]).parent.name for i in (0, 100, 200, 300)] == list(eval_bach.CLASSES)
    for sub in ("ICIAR2018_BACH_Challenge", PHOTOS):
        assert [Path(f) for f in eval_bach.bach_files(bach / sub)] == [Path(f) for f in files]


def remove_class(photos):
    (photos / "InSitu").rename(photos / "In Situ")


def remove_image(photos):
    (photos / "Normal" / "n017.tif").unlink()


def rename_image(photos):
    (photos / "Benign" / "b007.tif").rename(photos / "Benign" / "b7.tif")


def add_macos_file(photos):
    (photos / "Benign" / "._b001.tif").write_bytes(b"x")


def remove_photos(photos):
    photos.rename(photos.parent / "WSI")


@pytest.mark.parametrize("damage, message", [
    (remove_photos, "no folder Photos/ .* zenodo"),
    (remove_class, "InSitu: class folder is missing; .* zenodo"),
    (remove_image, "Normal: 99 of 100 images, n017.tif missing"),
    (rename_image, "Benign: unexpected b7.tif .*rename"),
    (add_macos_file, r"Benign: unexpected \._b001.tif .*delete"),
])
def test_bad_folder(bach, damage, message):
    damage(bach / PHOTOS)
    with pytest.raises(ValueError, match=message) as e:
        eval_bach.load_pixels(bach)
    assert "\n" not in str(e.value)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no folder Photos/"):
        eval_bach.bach_files(tmp_path / "nowhere")


def test_odd_size_and_damaged_file(bach):
    path = bach / PHOTOS / "Invasive" / "iv033.tif"
    good = path.read_bytes()
    path.unlink()
    Image.new("RGB", (64, 50)).save(path)
    with pytest.raises(ValueError, match="iv033.tif: 64x50 px, but b001.tif has 64x48 px"):
        eval_bach.load_pixels(bach)
    for damaged in (good[: len(good) // 2], b"not an image", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="iv033.tif: not a readable TIFF") as e:
            eval_bach.load_pixels(bach)
        assert "\n" not in str(e.value)


def test_pixels_equal_torchvision_to_the_last_bit(tmp_path):
    golden = np.load(ROOT / "tests/golden/bach_pixels.npz")
    image = np.random.default_rng(7).integers(0, 256, (1536, 2048, 3), dtype=np.uint8)
    pages = [Image.fromarray(image), Image.fromarray(image[::2, ::2])]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])  # only the first page counts
    pixels, size = eval_bach.read_image(tmp_path / "x.tif")
    assert size == "2048x1536 px" and pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), golden["resized_cropped_uint8"])
    seen = []
    eval_bach.embed(Spy(seen), pixels[None], MEAN, STD, "cpu")
    assert np.array_equal(seen[0][0, :, :16, :16].numpy(), golden["normalized_corner"])


def test_load_pixels(bach_template):
    pixels = eval_bach.load_pixels(bach_template, threads=3)
    assert pixels.shape == (400, 3, 224, 224) and pixels.dtype == torch.uint8
    assert torch.equal(pixels[399], eval_bach.read_image(bach_template / PHOTOS / "Normal" / "n100.tif")[0])


# features


class Spy(nn.Module):
    """Keeps its inputs."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return {"cls": x.mean((2, 3)).double()}


class Tiny(nn.Module):
    """A stand-in for the ViT, with dropout to show the mode, that counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 64, 16, generator=torch.Generator().manual_seed(0)))
        self.dropout, self.frozen, self.calls = nn.Dropout(0.5), nn.BatchNorm1d(16).eval(), []

    def forward(self, x):
        self.calls.append(len(x))
        return {"cls": self.frozen(self.dropout(x.flatten(1) @ self.weight))}


def some_pixels(n):
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_embed_sets_eval_mode_and_puts_it_back():
    tiny, pixels = Tiny(), some_pixels(11)
    tiny.frozen.eval()
    state = torch.get_rng_state()
    features = eval_bach.embed(tiny, pixels, MEAN, STD, "cpu", batch_size=4)
    assert features.shape == (11, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert tiny.calls == [4, 4, 3] and torch.equal(state, torch.get_rng_state())
    assert tiny.training and tiny.dropout.training and not tiny.frozen.training
    assert torch.equal(features, eval_bach.embed(tiny, pixels, MEAN, STD, "cpu", batch_size=4))  # no dropout
    tiny.eval()
    eval_bach.embed(tiny, pixels, MEAN, STD, "cpu")
    assert not tiny.training


def embed_on_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    tiny = Tiny()
    features = {n: eval_bach.embed(tiny, some_pixels(n), MEAN, STD, "cpu", batch_size=2) for n in (1, 7, 8)}
    row = eval_bach.evaluate(tiny, some_pixels(400), MEAN, STD, "cpu") if rank else None
    if not rank:
        eval_bach.embed(tiny, some_pixels(400), MEAN, STD, "cpu")  # rank 0's half of evaluate without its probe
    torch.save({"features": features, "calls": tiny.calls, "row": row}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_embed_on_two_ranks_equals_one(tmp_path):
    torch.multiprocessing.spawn(embed_on_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert ranks[0]["calls"] == ranks[1]["calls"] and ranks[0]["calls"][:5] == [1, 2, 2, 2, 2]
    assert ranks[1]["row"] is None
    for n in (1, 7, 8):
        assert torch.equal(ranks[0]["features"][n], ranks[1]["features"][n])
        one = eval_bach.embed(Tiny(), some_pixels(n), MEAN, STD, "cpu")
        torch.testing.assert_close(ranks[0]["features"][n], one, rtol=1e-5, atol=1e-5)


def test_spread():
    g = torch.Generator().manual_seed(0)
    isotropic = torch.randn(400, 16, generator=g)
    r = eval_bach.spread(isotropic)
    assert 15.5 < r["effective_rank"] <= 16 and abs(r["mean_cosine"]) < 0.02
    shifted = eval_bach.spread(isotropic + 100)  # a common direction: all dimensions still in use
    assert shifted["effective_rank"] == pytest.approx(r["effective_rank"], rel=1e-5) and shifted["mean_cosine"] > 0.99
    line = eval_bach.spread(torch.randn(400, 1, generator=g) * torch.randn(1, 16, generator=g))
    assert line["effective_rank"] == pytest.approx(1, abs=1e-3) and abs(line["mean_cosine"]) < 0.1
    point = torch.randn(1, 16, generator=g) * (1 + 1e-7 * torch.randn(400, 16, generator=g))
    for collapsed in (point, torch.ones(400, 16)):
        assert eval_bach.spread(collapsed) == {"effective_rank": 1.0, "mean_cosine": pytest.approx(1)}
    small = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])  # cosines 0, -1, 0
    assert eval_bach.spread(small)["mean_cosine"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad):
    features = torch.randn(10, 4)
    features[[2, 5]] = bad
    with pytest.raises(ValueError, match="features of 2 of 10 images are not finite") as e:
        eval_bach.spread(features)
    assert "\n" not in str(e.value)


# the probe


def blobs(dim, distance, dtype=torch.float32):
    """400 features in four clouds; `distance` 1 is a hard problem, 20 a separable one."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(4, dim, generator=g, dtype=dtype)
    return torch.randn(400, dim, generator=g, dtype=dtype) + distance * F.normalize(centres, dim=1)[eval_bach.LABELS]


def fit(features, max_steps, runs=3, seed=42):
    return eval_bach.fit_heads(features, *SPLIT, runs=runs, seed=seed, max_steps=max_steps)


def straight_loop(features, seed, epochs, warm_epochs=5, weight_decay=0.01):
    """One run of the protocol as one would write it down: nn.Linear, AdamW, cross entropy; balanced accuracies."""
    labels, train, val = SPLIT
    x, y, x_val, y_val = features[train], labels[train], features[val], labels[val]
    g, dim = torch.Generator().manual_seed(seed), features.shape[1]
    init = torch.empty(4, dim + 1, dtype=x.dtype).uniform_(-(dim**-0.5), dim**-0.5, generator=g)
    head = nn.Linear(dim, 4, dtype=x.dtype)
    head.weight.data, head.bias.data = init[:, :dim].clone(), init[:, dim].clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=weight_decay)
    balanced = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-4 if epoch < warm_epochs else 3e-4
        order = torch.randperm(268, generator=g)
        for batch in (order[:256], order[256:]):
            optimizer.zero_grad()
            F.cross_entropy(head(x[batch]), y[batch]).backward()
            optimizer.step()
        predicted = head(x_val).argmax(1)
        balanced.append(sum((predicted[y_val == c] == c).double().mean().item() for c in range(4)) / 4)
    return torch.tensor(balanced, dtype=torch.float64)


@pytest.mark.parametrize("dtype, dim, epochs", [(torch.float64, 24, 250), (torch.float32, 192, 60)])
def test_heads_equal_a_straight_loop(dtype, dim, epochs):
    features = blobs(dim, 4, dtype)
    balanced, _, best = fit(features, 2 * epochs)
    assert balanced.shape == (epochs, 3)
    for r in range(3):
        expected = straight_loop(features, 42 + r, epochs)
        torch.testing.assert_close(balanced[:, r].double(), expected, rtol=0, atol=1e-6)
        assert best[r] == int(balanced[:, r].argmax())  # argmax: the first of equal maxima


def test_the_comparison_sees_the_schedule():
    features = blobs(24, 4, torch.float64)
    balanced = fit(features, 500, runs=1)[0][:, 0]
    for other in ({"warm_epochs": 0}, {"warm_epochs": 4}, {"weight_decay": 0.5}):
        assert (balanced - straight_loop(features, 42, 250, **other)).abs().max() > 1e-3, other


def test_gradient_equals_autograd():
    g = torch.Generator().manual_seed(0)
    x, heads = torch.randn(20, 7, generator=g), torch.randn(4 * 3, 7, generator=g, requires_grad=True)
    labels = torch.randint(0, 4, (20,), generator=g)
    batches = [torch.randperm(20, generator=g)[:6] for _ in range(3)]
    logits = (heads @ x.T).view(4, 3, 20)
    sum(F.cross_entropy(logits[:, r, b].T, labels[b]) for r, b in enumerate(batches)).backward()
    weight = torch.zeros(3, 20).scatter_(1, torch.stack(batches), 1 / 6)
    ours = eval_bach.cross_entropy_grad(heads.detach(), x, F.one_hot(labels).T[:, None].float(), weight)
    torch.testing.assert_close(ours, heads.grad, rtol=1e-5, atol=1e-6)


def test_learning_rate_is_a_third_for_five_epochs(monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    fit(blobs(8, 4), 2 * 8)
    assert rates == pytest.approx([1e-4] * 10 + [3e-4] * 6)


def test_early_stopping_counts_from_the_best_epoch(monkeypatch):
    """Scripted scores: run 0 peaks at 2; run 1 at 5, and its increase after the stop must not count; run 2 at the last
    epoch at which it can, which restarts its patience."""
    scores = torch.full((40, 3), 0.5, dtype=torch.float64)
    for epoch, run, score in ((2, 0, 0.7), (5, 1, 0.7), (16, 1, 0.9), (4, 2, 0.6), (14, 2, 0.8)):
        scores[epoch, run] = score
    script = iter(scores.tolist())
    monkeypatch.setattr(eval_bach, "PATIENCE", 10)
    monkeypatch.setattr(eval_bach, "accuracies", lambda *_: (torch.tensor(next(script)), torch.zeros(3)))
    result = eval_bach.probe(blobs(4, 4), *SPLIT, runs=3, max_steps=80)
    assert result["seeds"] == pytest.approx([0.7, 0.7, 0.8]) and result["epochs"] == [13, 16, 25]
    assert len(list(script)) == 40 - 25  # training ended with the last run


def test_probe_on_separable_features():
    features = blobs(16, 20)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    result = eval_bach.probe(features, *SPLIT)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert result["bach"] == 1 and result["std"] == 0 and result["seeds"] == [1] * 5 and result["accuracy"] == 1
    assert result["plateau"] == 1 and all(1251 <= n < 6250 for n in result["epochs"])


def test_probe_summary_and_protocol():
    features = blobs(16, 2)
    result = eval_bach.probe(features, *SPLIT, max_steps=200)
    balanced, plain, best = fit(features, 200, runs=5)
    assert result["seeds"] == pytest.approx(balanced.max(0).values.tolist()) and result["epochs"] == [100] * 5
    assert result["bach"] == pytest.approx(np.mean(result["seeds"]))
    assert result["std"] == pytest.approx(np.std(result["seeds"], ddof=1)) and result["std"] > 0
    assert result["accuracy"] == pytest.approx(plain[best, range(5)].mean().item())
    assert result["plateau"] == pytest.approx(balanced[80:].mean().item())
    assert result == eval_bach.probe(features, *SPLIT, max_steps=200)  # repeatable
    alone = eval_bach.probe(features, *SPLIT, runs=2, max_steps=200)
    assert alone["seeds"] == pytest.approx(result["seeds"][:2])  # heads do not meet
    assert len({result["protocol"], alone["protocol"], eval_bach.probe(features, *SPLIT, 5, 43, 200)["protocol"]}) == 3


@pytest.mark.parametrize("name, value", [("LR", 1e-3), ("WEIGHT_DECAY", 0.0), ("WARM_EPOCHS", 0), ("WARM_FACTOR", 0.5),
                                         ("BATCH", 64), ("PATIENCE", 10), ("SIZE", 448)])
def test_every_constant_shows_in_the_protocol(monkeypatch, name, value):
    def run():
        return eval_bach.probe(blobs(4, 4), *SPLIT, max_steps=10)
    before = run()["protocol"]
    monkeypatch.setattr(eval_bach, name, value)
    assert run()["protocol"] != before


# curves and the command line


ROWS = [{"step": step, "bach": bach, "std": 0.01, "seeds": [bach], "plateau": 0.69, "effective_rank": 99.5,
         "mean_cosine": 0.25} for step, bach in ((0, 0.7), (500, 0.75), (1000, 0.8))]


def run_folder(path, rows, end="\n"):
    path.mkdir(parents=True)
    (path / "bach.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]) + json.dumps(rows[-1]) + end)


def command(*flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "eval_bach.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True)


def test_curve_table():
    lines = eval_bach.curve_table(ROWS + [{"step": 1500, "bach": 0.8}]).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["500", "0.7500", "+-", "0.0100", "0.6900", "99.5", "0.2500"]
    assert lines[4].split()[:2] == ["1500", "0.8000"] and len({len(line) for line in lines}) == 1


def test_rows_of_a_resumed_and_running_run(tmp_path):
    run_folder(tmp_path / "a", ROWS + [ROWS[1] | {"bach": 0.9}, ROWS[2]], end="")
    rows = eval_bach.read_rows(tmp_path / "a" / "bach.jsonl")
    assert [r["step"] for r in rows] == [0, 500, 1000] and [r["bach"] for r in rows] == [0.7, 0.9, 0.8]
    for bad in ("{\n", "[1]\n", '{"bach": 1}\n'):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match="bad.jsonl: each line must be a JSON object with a step"):
            eval_bach.read_rows(tmp_path / "bad.jsonl")


def test_runs_command(tmp_path):
    pytest.importorskip("matplotlib")
    run_folder(tmp_path / "first", ROWS)
    run_folder(tmp_path / "second", ROWS[:1])
    (tmp_path / "unrelated").mkdir()
    done = command(f"--runs={tmp_path}/*")
    assert done.returncode == 0, done.stderr
    assert "0.7500 +- 0.0100" in done.stdout and done.stdout.splitlines()[-1] == str(tmp_path / "second" / "bach.png")
    assert Image.open(tmp_path / "first" / "bach.png").size == (960, 600)


def test_runs_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_folder(tmp_path / "a", ROWS)
    eval_bach.show_runs(str(tmp_path / "a"))
    assert capsys.readouterr().out.splitlines()[-1].endswith("bach.png not written: pip install matplotlib")


def test_weights_command(bach_template, tmp_path):
    torch.manual_seed(0)
    vit = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))  # at the usual 1e-5 the image hardly reaches the CLS
    config = {"norm": ([0.5] * 3, [0.4] * 3)}
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 7, "config": config}, tmp_path / "7.pth")
    done = command(f"--weights={tmp_path}/7.pth", f"--bach_dir={bach_template}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < row["bach"] <= 1 and len(row["seeds"]) == 5 and row["protocol"].startswith("eva-bach: ")
    assert {"std", "accuracy", "plateau", "effective_rank", "mean_cosine"} <= row.keys()
    assert (row["arch"], row["step"], row["norm"]) == ("toy", 7, [[0.5] * 3, [0.4] * 3])


@pytest.mark.parametrize("config, stated, want", [
    ({"norm": "half"}, None, (0.5, 0.5)), ({"norm": None}, None, (MEAN, STD)), ({}, None, (MEAN, STD)),
    ({"norm": [[0.6] * 3, [0.2] * 3]}, None, (0.6, 0.2)), ({"norm": "half"}, "imagenet", (MEAN, STD)),
    ({"norm": "half"}, ((0.3,) * 3, (0.1,) * 3), (0.3, 0.1)),
    ({"norm_mean": (0.7,) * 3, "norm_std": [0.4] * 3}, None, (0.7, 0.4))])  # what older teachers store
def test_images_are_normalised_as_the_teacher_was_trained(config, stated, want, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(eval_bach, "load_pixels", lambda folder: [])
    monkeypatch.setattr(eval_bach, "evaluate", lambda vit, pixels, mean, std, dev: seen.extend((mean, std)) or {
        "bach": 0, "std": 0, "seeds": [], "plateau": 0, "effective_rank": 0, "mean_cosine": 0})
    vit = model.ViT(model.ARCHS["toy"])
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 7, "config": config}, tmp_path / "7.pth")
    eval_bach.score_weights(str(tmp_path / "7.pth"), "bach", "", "cpu", stated)
    for got, value in zip(seen, want):
        np.testing.assert_allclose(got, np.broadcast_to(value, 3))


@pytest.mark.parametrize("flags, message", [
    ([], "give --weights=FILE and --bach_dir=DIR"),
    (["--weights=nowhere.pth", "--bach_dir=nowhere"], "nowhere.pth: no such"),
    (["--runs=nowhere/*"], "runs=nowhere/*: no folder with a bach.jsonl"),
    (["--LR=1"], "unknown key 'LR'"),  # the protocol cannot be set from outside
])
def test_wrong_command(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["eval_bach.py", *flags])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "eval_bach.py"), run_name="__main__")
    assert message in e.value.code and "\n" not in e.value.code


def test_import_does_not_read_the_command_line():
    code = "import sys; sys.argv += ['--nonsense=1']; import eval_bach"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
