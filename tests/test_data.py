"""Crops, masks, colour and the order of samples. Several tests are bugs that such codebases really had."""
import colorsys
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import default_collate

import data
import model
from prepare.stats import train_keys

GOLDEN = Path(__file__).parent / "golden"
CONFIG = train_keys() | dict(batch_size=4, global_px=56, local_px=28, local_crops=3, hed_nats=0.3, norm="half",
                             mask_ratio=(0.1, 0.5))


class Noise:
    """A source without files: sample n is an image that knows its number."""

    def __init__(self, fails=()):
        self.fails, self.seen = set(fails), []

    def read(self, n, attempt=0):
        self.seen.append(n)
        if n in self.fails and attempt == 0:
            raise OSError(f"tile {n} is damaged")
        pixels = np.random.default_rng((n, attempt)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return pixels, {"slide": "noise", "x": n, "y": 0, "mpp": math.nan}


def batches(source=None, rank=0, world=1, offset=0, **changes):
    return data.Batches(source or Noise(), {**CONFIG, **changes}, 4, rank, world, offset)


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        if isinstance(a[k], dict):
            equal(a[k], b[k])
        else:
            assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


def drawn(rng, config, blur, count):
    """The colour parameters of several crops."""
    def draw(name, numbers):
        return torch.from_numpy(rng.random((count, numbers), np.float32))
    return data.colour_parameters(draw, config, blur)


# ---- order ----------------------------------------------------------------------------------------------------------

def test_a_batch_is_a_pure_function_of_seed_step_rank_and_world():
    a = batches()
    first = [a[s] for s in (0, 1, 5)]
    b = batches()  # another process that starts at step 5
    equal(b[5], first[2])
    equal(b[0], first[0])
    assert not torch.equal(first[0]["global_crops"], first[1]["global_crops"])
    assert not torch.equal(batches(seed=1)[0]["global_crops"], first[0]["global_crops"])
    others = [first[1]["masks"], batches(rank=1, world=2)[0]["masks"], batches(seed=1)[0]["masks"]]
    assert not any(torch.equal(m, first[0]["masks"]) for m in others), "masks are drawn anew by step, rank and seed"


def test_workers_do_not_change_a_batch():
    dataset = batches()
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(3, 7), num_workers=2)
    for step, batch in zip(range(3, 7), loader):
        equal(batch, dataset[step])


def test_an_image_does_not_depend_on_how_many_ranks_share_the_batch():
    whole = batches(batch_size=4)[3]
    halves = [batches(rank=r, world=2, batch_size=2)[3] for r in range(2)]
    for kind in ("global", "local"):
        for key in (f"{kind}_crops", *whole[f"{kind}_colour"]):
            of_halves = [{**h, **h[f"{kind}_colour"]}[key].unflatten(0, (-1, 2)) for h in halves]  # crop-major
            joined = torch.cat(of_halves, 1).flatten(0, 1)
            assert torch.equal(joined, {**whole, **whole[f"{kind}_colour"]}[key]), key


def test_after_a_resume_with_another_batch_the_samples_go_on_where_they_stopped():
    """The bug: a resume with other ranks that replayed samples and left others out."""
    samples = [n for step in range(5) for rank in range(2) for n in data.sample_numbers(step, rank, 2, 4)]
    taken, step = len(samples), 5
    for world, batch, steps in ((1, 4, 3), (3, 5, 2), (2, 4, 2)):  # three resumes
        offset = taken - step * world * batch
        for step in range(step, step + steps):
            samples += [n for r in range(world) for n in data.sample_numbers(step, r, world, batch, offset)]
        taken, step = taken + steps * world * batch, step + 1
    assert samples == list(range(taken)), "each once, in their order"
    source = Noise()
    batches(source, offset=3)[2]
    assert source.seen == [11, 12, 13, 14]


def test_unreadable_tiles_are_replaced_counted_and_named():
    a, b = batches(Noise(fails=[1]))[0], batches(Noise(fails=[1]))[0]
    equal(a, b)  # the replacement is drawn from the seed too
    assert a["bad"] == ["tile 1 is damaged"] and a["global_crops"].shape[0] == 8
    clean = batches(Noise())[0]
    assert torch.equal(a["global_crops"][0], clean["global_crops"][0])  # the others stay
    assert not torch.equal(a["global_crops"][1], clean["global_crops"][1])


def entries(**changes):
    """The crops, colours and masks of a batch, by name."""
    batch = batches(**changes)[0]
    colours = {f"{kind}_{name}": x for kind in ("global", "local") for name, x in batch[f"{kind}_colour"].items()}
    return colours | {key: batch[key] for key in ("global_crops", "local_crops", "masks")}


@pytest.mark.parametrize("changes, moved", [
    (dict(global_scale=(0.9, 1.0)), "global_crops"), (dict(hed_prob=1.0), "_hed"), (dict(jitter_prob=0.0), "_order"),
    (dict(blur_prob=(1.0, 1.0, 1.0)), "_blur")])
def test_what_one_operation_draws_moves_no_other(changes, moved):
    """The bug: one stream for all, where a draw more or less changed every later crop's colours."""
    plain, changed = entries(), entries(**changes)
    different = [key for key in plain if not torch.equal(plain[key], changed[key])]
    assert different == [key for key in plain if key.endswith(moved)]


def test_crops_that_are_added_move_no_others():
    plain, more = entries(local_crops=3), entries(local_crops=5)
    assert all(torch.equal(plain[key], more[key][: len(plain[key])]) for key in plain)


def test_numbers_drawn_are_uniform_and_independent():
    crops = [(n, view) for n in range(100) for view in range(5)]
    draws = [batches(seed=seed).draw(crops, name, 4).numpy() for seed in (0, 1) for name in ("hed", "blur")]
    for own in draws:
        assert 0 <= own.min() < 0.01 and 0.99 < own.max() < 1 and abs(own.mean() - 0.5) < 0.03
        assert len({*own.flat}) > 1990
    between = np.corrcoef(np.concatenate(draws, 1).T) - np.eye(16)
    assert abs(between).max() < 0.2, "neither columns, names nor seeds resemble each other"
    assert abs(np.corrcoef(draws[0][1:].ravel(), draws[0][:-1].ravel())[0, 1]) < 0.1, "nor do neighbouring crops"


# ---- crops and masks ------------------------------------------------------------------------------------------------

def test_crops_cover_the_stated_area_and_aspect():
    rng, marks = np.random.default_rng(0), []
    ramp = torch.arange(224).repeat(224, 1)
    pixels = torch.stack([ramp, ramp.T, ramp]).to(torch.uint8)[None]  # x in red, y in green
    for _ in range(300):
        crop = data.crop_and_flip(pixels, iter(rng.random(data.CROP_DRAWS)), (0.32, 1.0), 56).float()
        w, h = (crop[i].max() - crop[i].min() + 2 for i in (0, 1))
        marks.append((w * h / 224**2, w / h, float(crop[0, 0, 0] > crop[0, 0, -1])))
    area, aspect, flipped = np.array(marks, float).T
    assert 0.28 < area.min() < 0.36 and 0.9 < area.max() < 1.05 and 0.7 < aspect.min() and aspect.max() < 1.42
    assert np.log(aspect).std() > 0.1 and np.log(aspect).min() < -0.2 and np.log(aspect).max() > 0.2
    assert abs(flipped.mean() - 0.5) < 0.1
    draws = iter(rng.random(data.CROP_DRAWS))
    assert data.crop_and_flip(pixels[:, :, :20], draws, (0.9, 1.0), 56).shape == (3, 56, 56)  # a very long tile


def test_crops_are_antialiased_like_pillow():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image = np.asarray(image.resize((160, 160), Image.BICUBIC))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    ours = torch.nn.functional.interpolate(pixels, (56, 56), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    pillow = np.asarray(Image.fromarray(image).resize((56, 56), Image.BICUBIC))
    assert np.abs(ours.numpy().astype(int) - pillow).mean() < 0.1
    checkers = torch.from_numpy(np.indices((224, 224)).sum(0) % 2 * 255).to(torch.uint8).expand(1, 3, -1, -1)
    crop = data.crop_and_flip(checkers, iter(rng.random(data.CROP_DRAWS)), (0.9, 1.0), 28).float()
    assert (crop - 127.5).abs().mean() < 10, "finer detail than a pixel averages out instead of aliasing"


def test_global_and_local_crops_have_their_own_scales():
    class Ramp(Noise):
        def read(self, n, attempt=0):
            return np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0), 3, 2), {}
    batch = batches(Ramp(), batch_size=32)[0]
    span = {k: batch[f"{k}_crops"].float().amax((1, 2, 3)) - batch[f"{k}_crops"].float().amin((1, 2, 3))
            for k in ("global", "local")}
    assert span["global"].min() > 28 and span["local"].max() < 43 and span["local"].min() < 20


def test_blur_width_and_jitter_order_are_drawn_over_their_whole_range():
    rng = np.random.default_rng(0)
    colour = drawn(rng, CONFIG, 1.0, 500)
    sigma = colour["blur"]
    assert 0.1 <= sigma.min() < 0.2 and 1.9 < sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.1
    orders = list(itertools.permutations(range(4)))
    assert {*map(tuple, colour["order"].tolist())} == {(-1, -1, -1, -1), *orders}


def test_which_crops_are_masked_is_random():
    masks = np.stack([data.block_masks(np.random.default_rng(i), 8, 4, 0.5, (0.1, 0.5)).any(1) for i in range(200)])
    assert (abs(masks.mean(0) - 0.5) < 0.15).all()


@pytest.mark.parametrize("images, grid, total", [(56, 14, 3310), (16, 16, 1274), (8, 14, 507)])
def test_masked_patches_are_a_constant_of_the_batch(images, grid, total):
    counts = data.mask_counts(2 * images, grid, 0.5, (0.1, 0.5))
    assert sum(counts) == total
    for seed in range(3):
        masks = data.block_masks(np.random.default_rng(seed), 2 * images, grid, 0.5, (0.1, 0.5))
        assert sorted(masks.sum(1)) == [0] * images + sorted(counts)  # exactly half of the crops


def test_masks_are_blocks_and_weights_count_each_masked_crop_once():
    masks = data.block_masks(np.random.default_rng(0), 64, 16, 0.5, (0.1, 0.45)).reshape(64, 16, 16)
    some = masks[masks.any((1, 2))]
    same = (some[:, :, 1:] & some[:, :, :-1]).sum() / some[:, :, :-1].sum()
    assert same > 0.7 > some.mean() + 0.3, "neighbours of masked patches are masked far more often than by chance"
    batch = batches(batch_size=8)[0]
    assert batch["masks"].shape == (16, 16) and len(batch["masked"]) == len(batch["mask_weights"])
    assert torch.equal(batch["masks"].flatten()[batch["masked"]], torch.ones(len(batch["masked"]), dtype=torch.bool))
    assert math.isclose(batch["mask_weights"].sum(), 8, rel_tol=1e-6)


# ---- colour ---------------------------------------------------------------------------------------------------------

def test_shares_of_blurred_gray_and_jittered_crops_equal_the_keys():
    """The bug: a blur probability applied as its complement."""
    rng = np.random.default_rng(0)
    for blur in (0.0, 0.9, 0.5):
        colour = drawn(rng, CONFIG, blur, 2000)
        share = [colour["hed"], colour["order"][:, 0] >= 0, colour["gray"], colour["blur"] > 0]
        for got, want in zip(share, (0.5, 0.8, 0.2, blur)):
            assert abs(got.float().mean() - want) < 0.04, (got.float().mean(), want)
    for first, second, local in ((False, True, False), (True, False, True)):
        batch = batches(blur_prob=(float(first), float(second), float(local)))[0]
        assert (batch["global_colour"]["blur"] > 0).tolist() == [first] * 4 + [second] * 4  # crop-major
        assert (batch["local_colour"]["blur"] > 0).tolist() == [local] * 12


def test_stain_shifts_and_jitter_reach_the_stated_widths_to_both_sides():
    rng, config = np.random.default_rng(0), {**CONFIG, "hed_nats": 0.5, "jitter": (0.4, 0.3, 0.2, 0.1)}
    colour = drawn(rng, config, 0.5, 1000)
    shift = colour["hed_shift"] / 0.5
    jitter = (colour["jitter"] - torch.tensor([1, 1, 1, 0])) / torch.tensor([0.4, 0.3, 0.2, 0.1])
    reached = torch.cat([shift, jitter], 1)
    assert 0.98 < reached.amax(0).min() and reached.amax() <= 1.00001
    assert -0.98 > reached.amin(0).max() and reached.amin() >= -1.00001


def off(n, **changes):
    """Colour parameters of n crops that change nothing, except for what is named."""
    row = dict(hed=False, hed_shift=(0.2, 0.2, 0.2), order=(-1, -1, -1, -1), jitter=(1.2, 0.8, 1.1, 0.05), gray=False,
               blur=0.0)
    return default_collate([{name: torch.tensor(value) for name, value in (row | changes).items()}] * n)


@pytest.mark.parametrize("norm, mean, std", [
    ("half", 0.5, 0.5), (None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ([[0.7, 0.5, 0.6], [0.2, 0.3, 0.2]], (0.7, 0.5, 0.6), (0.2, 0.3, 0.2))])
def test_augment_without_any_operation_is_normalisation(norm, mean, std):
    crops = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    out = data.augment(crops, off(3), {**CONFIG, "norm": norm}, "cpu")
    mean, std = (torch.tensor(v).expand(3)[:, None, None] for v in (mean, std))
    torch.testing.assert_close(out, (crops / 255 - mean) / std)


@pytest.mark.parametrize("norm", ["tcga", (0.5, 0.5, 0.5), ((0.5,) * 3, (0.5, 0.5, 0.0)), ((0.5,) * 3, (0.5,) * 2), 0.5,
                                  ((0.5,) * 3, "abc")])
def test_a_normalisation_that_is_none_is_named(norm):
    with pytest.raises(ValueError, match="norm = .*'imagenet', 'half', .*or .mean, std."):
        model.norm_values(norm)


def plain_stains(x, shift, form):
    """Unmix, shift and mix pixels (..., 3) as the two forms are defined."""
    mix = data.RGB_FROM_HED.double().numpy()
    floor, low, high = (1e-6, 0, data.UNIT) if form == "openmidnight" else (1e-12, -np.inf, np.inf)
    stains = np.maximum(-np.log(np.maximum(x, floor)) @ np.linalg.inv(mix), low) + shift
    return np.clip(np.exp(-np.clip(stains, low, high) @ mix), 0, 1)


def plain_jitter(x, k, f):
    """Operation k of pixels (S, S, 3): torchvision's blends, and the hue of the standard library."""
    if k == 3:
        hsv = [colorsys.rgb_to_hsv(*rgb) for rgb in x.reshape(-1, 3)]
        return np.reshape([colorsys.hsv_to_rgb((h + f) % 1, s, v) for h, s, v in hsv], x.shape)
    gray = x @ (0.2989, 0.587, 0.114)
    return np.clip(f * x + (1 - f) * (0, gray.mean(), gray[..., None])[k], 0, 1)


def plain_augment(crop, draw, form):
    """data.augment with norm = "half" of one uint8 (3, S, S), in float64 and without a batch."""
    x = crop.permute(1, 2, 0).double().numpy() / 255
    draw = {name: value.tolist() for name, value in draw.items()}
    x = plain_stains(x, draw["hed_shift"], form) if draw["hed"] else x
    for k in draw["order"]:
        x = plain_jitter(x, k, draw["jitter"][k]) if k >= 0 else x
    x = plain_jitter(x, 2, 0.0) if draw["gray"] else x
    if sigma := draw["blur"]:
        taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
        edged = np.pad(x, ((4, 4), (4, 4), (0, 0)), "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(edged, (9, 9), (0, 1))
        x = (windows * np.outer(taps, taps) / taps.sum() ** 2).sum((3, 4))
    return x.transpose(2, 0, 1) * 2 - 1


@pytest.mark.parametrize("form", ["od", "openmidnight"])
def test_augment_of_a_batch_equals_a_plain_float64_reference_of_each_crop(form):
    rng, config = np.random.default_rng(0), {**CONFIG, "hed": form, "hed_nats": 0.7, "jitter": (0.4, 0.4, 0.2, 0.1)}
    crops = torch.from_numpy(rng.integers(0, 256, (24, 3, 12, 12), dtype=np.uint8))
    crops[:, :, :2, :8] = torch.tensor(list(itertools.product((0, 255), repeat=3)), dtype=torch.uint8).T[:, None]
    crops[:, :, 2, :8] = torch.arange(0, 256, 32, dtype=torch.uint8)  # the cube's corners, and grays
    draws = drawn(rng, config, 0.5, len(crops))
    for i, (got, crop) in enumerate(zip(data.augment(crops, draws, config, "cpu"), crops)):
        draw = {name: values[i] for name, values in draws.items()}
        np.testing.assert_allclose(got, plain_augment(crop, draw, form), atol=2e-4, rtol=0, err_msg=f"{draw}")


def test_colour_jitter_equals_pillows_operations_and_hue_turns():
    image = Image.fromarray(np.random.default_rng(0).integers(40, 200, (16, 16, 3), dtype=np.uint8))
    x, f = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255, torch.tensor(1 / 3).view(1, 1, 1, 1)
    for ours, theirs in zip((data.brightness, data.contrast, data.saturation), ("Brightness", "Contrast", "Color")):
        want = np.asarray(getattr(ImageEnhance, theirs)(image).enhance(1.3)).astype(float)
        assert np.abs(ours(x, 1.3)[0].permute(1, 2, 0).numpy() * 255 - want).max() < 2
    torch.testing.assert_close(data.hue(x, 0 * f), x, atol=1e-5, rtol=0)
    red = torch.tensor([1.0, 0.2, 0.2])[None, :, None, None]
    torch.testing.assert_close(data.hue(red, f), red.roll(1, 1))
    torch.testing.assert_close(data.hue(red, -f), red.roll(2, 1))


def test_hed_shift_equals_scikit_image():
    z = np.load(GOLDEN / "hed.npz")
    rgb = torch.from_numpy(z["rgb"] / 255).permute(2, 0, 1)[None]
    for i in range(3):
        shift = torch.from_numpy(z[f"shift{i}"] * data.UNIT).double()[None]
        got = data.hed_shift(rgb, shift, "openmidnight")[0].permute(1, 2, 0)
        np.testing.assert_allclose(got, z[f"rgb{i}"], atol=1e-5)
