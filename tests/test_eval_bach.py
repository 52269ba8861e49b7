import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import PHOTOS, ROOT, one_line
from PIL import Image

import eval_bach
import model
import sources

MEAN, STD = model.NORMS["imagenet"]
SPLIT = eval_bach.LABELS, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX


# images and split

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


def test_pixels_are_those_of_the_files_in_order(bach_template):
    files = eval_bach.bach_files(bach_template)
    assert len(files) == 400 and [Path(f).name for f in files[99:101]] == ["b100.tif", "is001.tif"]
    assert [Path(files[i]).parent.name for i in (0, 100, 200, 300)] == list(eval_bach.CLASSES)
    pixels = eval_bach.load_pixels(bach_template)
    assert pixels.shape == (400, 3, 224, 224) and pixels.dtype == torch.uint8
    assert torch.equal(pixels[399], eval_bach.read_image(bach_template / PHOTOS / "Normal" / "n100.tif")[0])


@pytest.mark.parametrize("damage, message", [
    (lambda photos: photos.rename(photos.parent / "WSI"), "Photos/Benign: 0 of 100 images, .* zenodo"),
    (lambda photos: (photos / "InSitu").rename(photos / "In Situ"), "InSitu: 0 of 100 images, is001.tif is missing"),
    (lambda photos: (photos / "Normal/n017.tif").unlink(), "Normal: 99 of 100 images, n017.tif is missing"),
    (lambda photos: (photos / "Benign/b007.tif").rename(photos / "Benign/b7.tif"), "Benign: unexpected b7.tif")])
def test_bad_folder(bach, damage, message):
    damage(bach / PHOTOS)
    with one_line(message):
        eval_bach.load_pixels(bach)


def test_odd_size_and_damaged_file(bach):
    path = bach / PHOTOS / "Invasive" / "iv033.tif"
    good = path.read_bytes()
    path.unlink()
    Image.new("RGB", (64, 50)).save(path)
    with pytest.raises(ValueError, match="iv033.tif: 64x50 px, unlike the first image's 64x48 px"):
        eval_bach.load_pixels(bach)
    for damaged in (good[: len(good) // 2], b"not an image", b""):
        path.write_bytes(damaged)
        with one_line("iv033.tif: not a readable image: .*again"):
            eval_bach.load_pixels(bach)


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


def test_embed_sets_eval_mode_and_puts_it_back_after_a_failure_too():
    tiny, pixels = Tiny(), some_pixels(11)
    tiny.frozen.eval()
    state = torch.get_rng_state()
    features = eval_bach.embed(tiny, pixels, MEAN, STD, "cpu", batch_size=4)
    assert features.shape == (11, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert tiny.calls == [4, 4, 3] and torch.equal(state, torch.get_rng_state())
    assert tiny.training and tiny.dropout.training and not tiny.frozen.training
    assert torch.equal(features, eval_bach.embed(tiny, pixels, MEAN, STD, "cpu", batch_size=4))  # no dropout
    tiny.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        eval_bach.embed(tiny, pixels, MEAN, STD, "cpu")
    assert tiny.training and tiny.dropout.training and not tiny.frozen.training
    del tiny.forward
    eval_bach.embed(tiny.eval(), pixels, MEAN, STD, "cpu")
    assert not tiny.training


def embed_on_rank():
    """(features of 1, 7 and 8 images, batches)."""
    dist.init_process_group("gloo")
    tiny = Tiny()
    features = [eval_bach.embed(tiny, some_pixels(n), MEAN, STD, "cpu", batch_size=2).numpy() for n in (1, 7, 8)]
    dist.destroy_process_group()
    return features, tiny.calls


def test_embed_on_two_ranks_equals_one(on_ranks):
    (features, calls), (others, other_calls) = on_ranks(2, embed_on_rank)
    assert calls == other_calls and calls[:5] == [1, 2, 2, 2, 2]
    for n, got, other in zip((1, 7, 8), features, others):
        assert np.array_equal(got, other)
        one = eval_bach.embed(Tiny(), some_pixels(n), MEAN, STD, "cpu").numpy()
        np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5)


def test_collapse_metrics():
    g = torch.Generator().manual_seed(0)
    isotropic = torch.randn(400, 16, generator=g)
    r = eval_bach.collapse_metrics(isotropic)
    assert 15.5 < r["effective_rank"] <= 16 and abs(r["mean_cosine"]) < 0.02
    shifted = eval_bach.collapse_metrics(isotropic + 100)  # a common direction: all dimensions still in use
    assert shifted["effective_rank"] == pytest.approx(r["effective_rank"], rel=1e-5) and shifted["mean_cosine"] > 0.99
    line = eval_bach.collapse_metrics(torch.randn(400, 1, generator=g) * torch.randn(1, 16, generator=g))
    assert line["effective_rank"] == pytest.approx(1, abs=1e-3) and abs(line["mean_cosine"]) < 0.1
    point = torch.randn(1, 16, generator=g) * (1 + 1e-7 * torch.randn(400, 16, generator=g))
    for collapsed in (point, torch.ones(400, 16)):
        assert eval_bach.collapse_metrics(collapsed) == {"effective_rank": 1.0, "mean_cosine": pytest.approx(1)}
    small = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])  # cosines 0, -1, 0
    assert eval_bach.collapse_metrics(small)["mean_cosine"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad):
    features = torch.randn(10, 4)
    features[[2, 5]] = bad
    with one_line("features of 2 of 10 images are not finite"):
        eval_bach.collapse_metrics(features)


# the probe

def blobs(dim, distance, dtype=torch.float32):
    """400 features in four clouds; `distance` 1 is a hard problem, 20 a separable one."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(4, dim, generator=g, dtype=dtype)
    return torch.randn(400, dim, generator=g, dtype=dtype) + distance * F.normalize(centres, dim=1)[eval_bach.LABELS]


def fit(features, max_steps, runs=3, seed=42):
    return eval_bach.fit_heads(features, *SPLIT, runs=runs, seed=seed, max_steps=max_steps)


def straight_loop(features, seed, epochs, warm_epochs=5, weight_decay=0.01, train=SPLIT[1], scored=SPLIT[2:]):
    """
    One run of the protocol as one would write it down: nn.Linear, AdamW, cross entropy.

    Returns the balanced accuracy on each index list in `scored` after each epoch, (epochs, len(scored)).
    """
    x, y = features[train], eval_bach.LABELS[train]
    g, dim = torch.Generator().manual_seed(seed), features.shape[1]
    init = torch.empty(4, dim + 1, dtype=x.dtype).uniform_(-(dim**-0.5), dim**-0.5, generator=g)
    head = nn.Linear(dim, 4, dtype=x.dtype)
    head.weight.data, head.bias.data = init[:, :dim].clone(), init[:, dim].clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=weight_decay)
    balanced = torch.zeros(epochs, len(scored), dtype=torch.float64)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-4 if epoch < warm_epochs else 3e-4
        for batch in torch.randperm(len(train), generator=g).split(256):
            optimizer.zero_grad()
            F.cross_entropy(head(x[batch]), y[batch]).backward()
            optimizer.step()
        for i, index in enumerate(scored):
            balanced[epoch, i] = class_mean(head(features[index]).argmax(1), eval_bach.LABELS[index])
    return balanced


def class_mean(predicted, labels):
    """Balanced accuracy over the four classes, written as a loop."""
    return np.mean([(predicted[labels == c] == c).double().mean().item() for c in range(4)])


@pytest.mark.parametrize("dtype, dim, epochs", [(torch.float64, 24, 250), (torch.float32, 192, 60)])
def test_heads_equal_a_straight_loop(dtype, dim, epochs):
    features = blobs(dim, 4, dtype)
    balanced, best, _ = fit(features, 2 * epochs)
    assert balanced.shape == (epochs, 3)
    for r in range(3):
        expected = straight_loop(features, 42 + r, epochs)[:, 0]
        torch.testing.assert_close(balanced[:, r].double(), expected, rtol=0, atol=1e-6)
        assert best[r] == int(balanced[:, r].argmax())  # argmax: the first of equal maxima


@pytest.mark.parametrize("batch_size", [256, 6])  # all images of a small set are scored, a large set is gathered
def test_the_heads_gradient_is_that_of_each_on_its_own_batch(monkeypatch, batch_size):
    monkeypatch.setattr(eval_bach, "BATCH", batch_size)
    g = torch.Generator().manual_seed(0)
    x, heads = torch.randn(40, 7, generator=g), torch.randn(3, 4, 7, generator=g, requires_grad=True)
    labels = torch.randint(0, 4, (40,), generator=g)
    batch = torch.stack([torch.randperm(40, generator=g)[:6] for _ in range(3)])
    eval_bach.heads_loss(heads, x, labels, batch).backward()
    for head, grad, b in zip(heads, heads.grad, batch):
        probs = (x[b] @ head.detach().T).softmax(1)
        torch.testing.assert_close(grad, (probs - F.one_hot(labels[b], 4)).T @ x[b] / 6, rtol=1e-5, atol=1e-6)


def test_early_stopping_counts_from_the_best_epoch(monkeypatch):
    """Scripted scores: run 0 peaks at 2; run 1 at 5, and its increase after the stop must not count; run 2 at the last
    epoch at which it can, which restarts its patience."""
    scores = torch.full((40, 3), 0.5, dtype=torch.float64)
    for epoch, run, score in ((2, 0, 0.7), (5, 1, 0.7), (16, 1, 0.9), (4, 2, 0.6), (14, 2, 0.8)):
        scores[epoch, run] = score
    script = iter(scores.tolist())
    monkeypatch.setattr(eval_bach, "PATIENCE", 10)
    monkeypatch.setattr(eval_bach, "balanced_accuracy", lambda *_: torch.tensor(next(script)))
    result = eval_bach.probe(blobs(4, 4), runs=3, max_steps=80)
    assert result["seeds"] == pytest.approx([0.7, 0.7, 0.8]) and result["epochs"] == [13, 16, 25]
    assert len(list(script)) == 40 - 25  # training ended with the last run


def test_probe_on_separable_features(monkeypatch):
    monkeypatch.setattr(eval_bach, "PATIENCE", 400)
    features = blobs(16, 20)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    result = eval_bach.probe(features)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert result["bach"] == 1 and result["std"] == 0 and result["seeds"] == [1] * 5 and result["accuracy"] == 1
    assert result["plateau"] == 1 and all(401 <= n < 6250 for n in result["epochs"])


@pytest.mark.slow
def test_scores_over_seeds_are_distributed_as_those_of_a_straight_loop():
    """The loop draws its weights and batches from torch's own generators, as eva does: only distributions can agree."""
    features, runs = blobs(32, 5), 24
    torch.manual_seed(7)
    loop = torch.tensor([eva_run(features, 700) for _ in range(runs)])
    ours = torch.tensor(eval_bach.probe(features, runs=runs, max_steps=1400)["seeds"])
    standard_error = ((ours.var() + loop.var()) / runs).sqrt()
    assert standard_error < 0.005 and (ours.mean() - loop.mean()).abs() < 3 * standard_error
    assert 1 / 3 < ours.var() / loop.var() < 3  # the 0.5 % and 99.5 % points of F(23, 23)


def eva_run(features, epochs):
    """nn.Linear's own init, a DataLoader that shuffles, the maximum over epochs."""
    labels, train, val = SPLIT
    pairs = torch.utils.data.TensorDataset(features[train], labels[train])
    head, best = nn.Linear(features.shape[1], 4), 0.0
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # eva names none and so gets this one
    for _ in range(epochs):
        for x, y in torch.utils.data.DataLoader(pairs, batch_size=256, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
        schedule.step()
        predicted = head(features[val]).argmax(1)
        best = max(best, class_mean(predicted, labels[val]))
    return best


def test_probe_summary_and_protocol():
    features = blobs(16, 2)
    result = eval_bach.probe(features, max_steps=200)
    balanced, best, predicted = fit(features, 200, runs=5)
    labels, _, val = SPLIT
    assert result["seeds"] == pytest.approx(balanced.max(0).values.tolist()) and result["epochs"] == [100] * 5
    assert result["bach"] == pytest.approx(np.mean(result["seeds"]))
    assert result["std"] == pytest.approx(np.std(result["seeds"], ddof=1)) and result["std"] > 0
    assert result["accuracy"] == pytest.approx(np.mean([(predicted[r, val] == labels[val]).float() for r in range(5)]))
    assert balanced[best, range(5)].tolist() == pytest.approx(
        [class_mean(predicted[r, val], labels[val]) for r in range(5)])
    assert np.mean(result["recall"]) == pytest.approx(result["bach"])
    table = np.array(result["confusion"])
    assert table.sum(1).tolist() == [5 * n for n in (48, 30, 31, 23)]  # rows are the true classes, of five heads
    assert (table.diagonal() / table.sum(1)).tolist() == pytest.approx(result["recall"])
    assert table[0, 1] == sum(int((predicted[r, val][labels[val] == 0] == 1).sum()) for r in range(5))
    assert result["plateau"] == pytest.approx(balanced[80:].mean().item())
    assert result == eval_bach.probe(features, max_steps=200)  # repeatable
    alone = eval_bach.probe(features, runs=2, max_steps=200)
    assert alone["seeds"] == pytest.approx(result["seeds"][:2])  # heads do not meet
    assert len({result["protocol"], alone["protocol"], eval_bach.probe(features, 5, 43, 200)["protocol"]}) == 3


def test_every_constant_and_the_view_show_in_the_protocol(monkeypatch):
    def protocol(view=eval_bach.View()):
        return eval_bach.probe(blobs(4, 4), max_steps=10, view=view)["protocol"]
    seen = [protocol(view) for view in (eval_bach.View(), eval_bach.View(392), eval_bach.View(concat=True))]
    seen.append(protocol(eval_bach.View(mpp=0.5)))
    assert seen[0].startswith("eva-bach: cls 224 px, 268/132, 5 heads")
    assert "cls of tiles 224 px at 0.5 um/px" in seen[3]
    for name, value in (("LR", 1e-3), ("WEIGHT_DECAY", 0.0), ("WARM_EPOCHS", 0), ("WARM_FACTOR", 0.5), ("BATCH", 64),
                        ("PATIENCE", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(eval_bach, name, value)
            seen.append(protocol())
    assert len(set(seen)) == 4 + 6


def test_an_image_of_another_mode_is_read_as_rgb_and_one_of_16_bits_refused(tmp_path):
    for mode in ("L", "RGBA"):
        Image.new("RGB", (64, 48), (90, 90, 90)).convert(mode).save(tmp_path / "x.tif")
        assert (eval_bach.read_image(tmp_path / "x.tif")[0] == 90).all()
    rgba = Image.new("RGBA", (64, 48), (90, 90, 90, 0))
    rgba.paste((90, 20, 160, 255), (0, 0, 64, 24))
    for ending in ("png", "tif"):  # the bug: black here, white in training
        rgba.save(tmp_path / f"x.{ending}")
        pixels = eval_bach.read_image(tmp_path / f"x.{ending}")[0]
        want = eval_bach.shrink(torch.from_numpy(sources.decode(tmp_path / f"x.{ending}", "")).permute(2, 0, 1))
        assert (pixels[:, 130:] == 255).all() and torch.equal(pixels, want)
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(tmp_path / "x.tif")  # would saturate to white
    with pytest.raises(ValueError, match="x.tif: .*more than 8 bits per channel"):
        eval_bach.read_image(tmp_path / "x.tif")


def test_the_clean_split_selects_nothing_on_the_132_images():
    fit, select = eval_bach.FIT_INDEX, eval_bach.SELECT_INDEX
    assert (len(fit), len(select)) == (218, 50) and sorted(fit + select) == eval_bach.TRAIN_INDEX
    assert eval_bach.LABELS[select].bincount().tolist() == [10, 10, 10, 20]
    ranges = ((0, 15), (25, 41), (59, 60), (90, 110), (120, 139), (169, 200), (210, 240), (258, 260), (273, 305),
              (315, 345), (368, 380), (390, 400))  # Thunder's
    assert fit == [i for first, end in ranges for i in range(first, end)]


def test_second_opinions(monkeypatch):
    monkeypatch.setattr(eval_bach, "MAX_STEPS", 1000)
    features = blobs(16, 20)
    row = eval_bach.second_opinions(features)
    assert row["clean"] > 0.95 and row["knn"] == 1 and 0 <= row["clean_std"] < 0.05
    broken = features.clone()  # what the 132 images hold must not reach the choice of the epoch
    broken[eval_bach.VAL_INDEX] = blobs(16, 0)[eval_bach.VAL_INDEX]
    row = eval_bach.second_opinions(broken)
    assert row["clean"] < 0.5 and row["knn"] < 0.5
    hard = blobs(24, 3)  # where 50 training images more make a difference
    train, val = SPLIT[1:]
    votes = {len(known): eval_bach.balanced_accuracy(eval_bach.knn(hard, SPLIT[0], known, val)[None], SPLIT[0][val])
             for known in (train, eval_bach.FIT_INDEX)}
    assert eval_bach.second_opinions(hard)["knn"] == votes[268].item() != votes[218].item()


def test_clean_scores_the_epoch_that_the_50_images_chose(monkeypatch):
    monkeypatch.setattr(eval_bach, "RUNS", 2)
    monkeypatch.setattr(eval_bach, "MAX_STEPS", 600)  # 300 epochs, because the 218 images are one batch
    features, scored = blobs(24, 4), (eval_bach.SELECT_INDEX, eval_bach.VAL_INDEX)
    chosen, highest = [], []
    for seed in (42, 43):
        on_select, on_val = straight_loop(features, seed, 300, train=eval_bach.FIT_INDEX, scored=scored).T
        chosen.append(on_val[on_select.argmax()].item())
        highest.append(on_val.max().item())
    row = eval_bach.second_opinions(features)
    assert row["clean"] == pytest.approx(np.mean(chosen), abs=1e-6) != pytest.approx(np.mean(highest), abs=1e-3)
    assert row["clean_std"] == pytest.approx(np.std(chosen, ddof=1), abs=1e-6)


def test_balanced_accuracy_is_over_the_classes_that_occur():
    labels = torch.tensor([0, 0, 0, 2])
    predicted = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 2]])
    assert eval_bach.balanced_accuracy(predicted, labels).tolist() == pytest.approx([(2 / 3 + 1) / 2, 0.5])
    assert eval_bach.confusion(predicted, labels) == [[2, 1, 3], [0, 0, 0], [0, 0, 2]]


def test_knn_is_a_weighted_vote_of_the_nearest_in_cosine():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(90, 6, generator=g) * torch.rand(90, 1, generator=g) * 9, torch.arange(90) % 3
    train, test = list(range(60)), list(range(60, 90))
    for i, got in zip(test, eval_bach.knn(x, labels, train, test).tolist()):
        cosine = F.cosine_similarity(x[i], x[train])
        votes = [0.0] * 3
        for j in cosine.argsort(descending=True)[:20].tolist():
            votes[labels[j]] += np.exp(cosine[j].item() / 0.07)
        assert got == int(np.argmax(votes))
    assert eval_bach.knn(x, labels, [0, 1, 2], test).shape == (30,)  # fewer than 20


# views

def test_tiles_cover_the_image_and_every_pixel_of_a_square_once():
    image = torch.arange(3 * 50 * 70).view(3, 50, 70)
    cut = eval_bach.tiles(image, 20)
    assert cut.shape == (3 * 4, 3, 20, 20) and set(cut.unique().tolist()) == set(range(image.numel()))
    assert torch.equal(cut[0], image[:, :20, :20]) and torch.equal(cut[-1], image[:, 30:, 50:])
    assert torch.equal(eval_bach.tiles(image[:, :20, :20], 20), image[None, :, :20, :20])


def test_views_of_tiles_are_cut_at_their_mpp_and_averaged(bach_template):
    view = eval_bach.View(px=14, mpp=0.84, concat=True)  # 64x48 px at 0.42 are 32x24 at 0.84: 3 x 2 tiles
    with pytest.raises(ValueError, match="b001.tif: 64x48 px, not BACH's 2048x1536 px: .*give --image_mpp"):
        eval_bach.load_pixels(bach_template, view)
    pixels = eval_bach.load_pixels(bach_template, view, 0.42)
    assert len(pixels) == 400 and {tuple(image.shape) for image in pixels} == {(3, 24, 32)}
    tiny = Both()
    features = eval_bach.embed(tiny, pixels[:5], MEAN, STD, "cpu", view, batch_size=12)
    assert tiny.calls == [12, 12, 6]
    tiles = [pixels[1][:, y : y + 14, x : x + 14] for y in (0, 10) for x in (0, 9, 18)]
    one_by_one = torch.cat([eval_bach.embed(tiny, t[None], MEAN, STD, "cpu", view) for t in tiles])
    torch.testing.assert_close(features[1], one_by_one.mean(0))
    odd = [pixels[0], pixels[1][:, :14, :14], pixels[1]]  # images of several sizes, as in a folder
    torch.testing.assert_close(eval_bach.embed(tiny, odd, MEAN, STD, "cpu", view)[[0, 2]], features[:2])
    tiny.calls = []
    eval_bach.embed(tiny, odd[1:] + odd, MEAN, STD, "cpu", view, batch_size=5)  # a small image first, and 6 > 5 tiles
    assert max(tiny.calls) <= 5
    alone = eval_bach.embed(tiny, pixels[:5], MEAN, STD, "cpu", view._replace(concat=False))
    torch.testing.assert_close(alone, features[:, :3])


class Both(nn.Module):
    """Class token and patches that tell which is which."""

    calls = ()

    def forward(self, x):
        self.calls = [*self.calls, len(x)]
        patches = x.flatten(2).transpose(1, 2)
        return {"cls": x.amax((2, 3)), "patches": torch.cat([patches, -patches.square()], 1)}


@pytest.mark.parametrize("view, message", [
    (eval_bach.View(14, 0.3), "--mpp=0.3 is finer than the image's 0.42 um/px"),
    (eval_bach.View(224, 0.5), "b001.tif: 54x40 px at --mpp=0.5, smaller than a tile of --input_px=224")])
def test_tiles_that_the_images_do_not_hold(bach_template, view, message):
    with pytest.raises(ValueError, match=message):
        eval_bach.load_pixels(bach_template, view, 0.42)


# the command line

KEYS = {"weights": "", "norm": None, "views": "resize", "mpp": 0.5, "input_px": 224, "concat": False, "arch": "",
        "device": "cpu", "dry_run": False}


def save_teacher(path, config, seed=0):
    torch.manual_seed(seed)
    vit = model.ViT(replace(model.ARCHS["toy"], layerscale=1.0))  # at the usual 1e-5 the image hardly reaches the CLS
    torch.save({"teacher": vit.state_dict(), "arch": "toy", "step": 7, "config": config}, path)
    return str(path)


def test_weights_command(bach_template, tmp_path, script):
    save_teacher(tmp_path / "7.pth", {"norm": ([0.5] * 3, [0.4] * 3)})
    flags = [f"--weights={tmp_path}/7.pth", f"--bach_dir={bach_template}", "--device=cpu", "--input_px=56"]
    row = json.loads(script("eval_bach.py", *flags).splitlines()[-1])
    assert 0.5 < row["bach"] <= 1 and len(row["seeds"]) == 5 and row["protocol"].startswith("eva-bach: ")
    assert {"std", "accuracy", "plateau", "effective_rank", "mean_cosine", "recall", "confusion"} <= row.keys()
    assert all(0.3 < row[key] <= 1 for key in ("clean", "knn", "plateau"))
    assert (row["arch"], row["step"], row["norm"]) == ("toy", 7, [[0.5] * 3, [0.4] * 3])


@pytest.mark.parametrize("config, stated, want", [
    ({"norm": "half"}, None, (0.5, 0.5)), ({"norm": None}, None, (MEAN, STD)), ({}, None, (MEAN, STD)),
    ({"norm": [[0.6] * 3, [0.2] * 3]}, None, (0.6, 0.2)), ({"norm": "half"}, "imagenet", (MEAN, STD)),
    ({"norm": "half"}, ((0.3,) * 3, (0.1,) * 3), (0.3, 0.1))])
def test_images_are_normalised_as_the_teacher_was_trained(config, stated, want, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(eval_bach, "embed", lambda vit, pixels, mean, std, *_: seen.extend((mean, std)))
    save_teacher(tmp_path / "7.pth", config)
    row = eval_bach.score_file(str(tmp_path / "7.pth"), stated, KEYS, [], lambda *_: {})
    for got, stored, value in zip(seen, row["norm"], want):
        np.testing.assert_allclose(got, np.broadcast_to(value, 3))
        assert stored == got


@pytest.mark.parametrize("norm, reached", [("half", [0.5, 0.5]), ("half,imagenet,half", [0.485, 0.5])])
def test_norms_and_the_view_reach_all_files_and_one_that_fails_is_named(norm, reached, tmp_path, capsys):
    files = [save_teacher(tmp_path / f"{step}.pth", {}, seed=step) for step in (1, 2, 3)]
    config = {**KEYS, "weights": f" {','.join(files)},", "input_px": 42, "concat": True, "norm": norm}
    columns, seen = ["bach", "std", "plateau", "clean", "accuracy", "knn"], []

    def score(features, view):
        seen.append((features.shape, str(view)))
        found = dict.fromkeys(columns, 0.5)
        return found if len(seen) > 1 else torch.zeros(1) @ torch.zeros(2)  # a RuntimeError, as out of memory is
    with pytest.raises(SystemExit) as e:
        eval_bach.score_files("eval_bach", config, lambda: (torch.zeros(2, 3, 42, 42, dtype=torch.uint8), score))
    out, err = capsys.readouterr()
    assert e.value.code == 1 and err.startswith(f"eval_bach: {files[0]}: ") and err.count("\n") == 1
    *_, header, first, second, last = out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["weights"] for row in rows] == files[1:] == [first.split()[0], second.split()[0]]
    assert header.split() == ["weights", *columns] and [row["norm"][0][0] for row in rows] == reached
    assert all(out.splitlines().count(json.dumps(row)) == 1 for row in rows), "each as soon as it is there"
    assert seen == [((2, 256), "cls+patches 42 px")] * 3


def test_what_is_there_is_scored_and_what_is_not_is_named_with_its_remedy(tmp_path, capsys):
    """The bug: one missing file of config/baselines.py, and none of the others was scored."""
    there, gone = save_teacher(tmp_path / "1.pth", {}), f"{tmp_path}/dinov2_vits14_reg4_pretrain.pth"
    config = {**KEYS, "weights": f"{gone},{there}", "input_px": 42}
    images = torch.zeros(2, 3, 42, 42, dtype=torch.uint8), lambda features, view: {"bach": 0.5}
    with pytest.raises(SystemExit) as e:
        eval_bach.score_files("eval_bach", config, lambda: images)
    out, err = capsys.readouterr()
    assert e.value.code == 1 and json.loads(out.splitlines()[-1])["weights"] == there
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    assert err == f"eval_bach: {gone}: no such weight file; wget -P {tmp_path} {url}\n"


def test_all_that_is_missing_is_named_at_once(script):
    """The bug: first the weights, then, when they are there, the images."""
    with pytest.raises(SystemExit) as e:
        script("eval_bach.py", "--weights=midnight/,nowhere.pth", "--bach_dir=nowhere")
    midnight, nowhere, images = str(e.value).splitlines()
    assert midnight == "eval_bach: midnight/: no such weight file; hf download kaiko-ai/midnight --local-dir midnight/"
    assert nowhere.startswith("eval_bach: nowhere.pth: no such weight file; docs/data.md")
    assert images.startswith("eval_bach: nowhere/ICIAR2018_BACH_Challenge/Photos/Benign: 0 of 100 images")


@pytest.mark.parametrize("flags, message", [
    ([], "0 files, 1 norms; give --weights=FILE"),
    (["--weights=README.md", "--bach_dir=nowhere"], "nowhere/ICIAR2018_BACH_Challenge/Photos/Benign: 0 of 100 images"),
    (["--weights=README.md", "--bach_dir=nowhere", "--norm=foo"], "norm = 'foo'"),
    (["--weights=README.md,Makefile", "--bach_dir=a", "--norm=half,half,half"], "2 files, 3 norms"),
    (["--weights=README.md", "--bach_dir=a", "--views=grid"], "views = 'grid'; known: 'resize'"),
    (["--weights=README.md", "--bach_dir=a", "--views=tiles", "--mpp=0"], "mpp = 0.0: both must be more than 0"),
    (["--LR=1"], "unknown key 'LR'"),  # the protocol cannot be set from outside
])
def test_wrong_command(script, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with one_line(re.escape(message)):
        script("eval_bach.py", *flags)
