"""context.py and places.py: geometry, windows, masks, exact runs, embedding, and input that is not as it should be."""
import functools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import context
import model
import places
import sharding
from configurator import configure
from prepare import coords

TINY = dict(window=36, mask_block=(4, 9), width=32, depth=2, heads=2, registers=2, periods=(4.0, 32.0), batch_size=8,
            base_lr=1e-1, warmup_steps=10, max_steps=6, log_interval=1, workers=0, device="cpu")
ABOUT = dict(weights_sha256="a" * 64, norm=((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), tile_px=224, level0_mpp=0.5)


def write(path, features, cells, mpp=1.0, **about):
    """A file as prepare/features.py writes it; cells (N, 2) are columns and rows of a grid."""
    extent = round(224 * mpp / 0.5)
    about = {**ABOUT, "mpp": mpp, "patch_size_level0": extent, "overlap": 0} | about
    np.savez(path, features=features, coords=np.int64(cells * extent), **about)


def grid(rows, columns):
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)


def waves(seed, cells, channels=16):
    """Features with structure: smooth fields and noise, fp16 (N, channels); `cells` in units of a tile."""
    rng = np.random.default_rng((1, seed))
    mix = np.random.default_rng(0).normal(size=(4, channels))
    angle, phase, length = rng.uniform(0, 6.3, 4), rng.uniform(0, 6.3, 4), rng.uniform(5, 12, 4)
    along = cells @ np.stack([np.cos(angle), np.sin(angle)])
    fields = np.tanh(2 * np.sin(2 * np.pi * along / length + phase))
    return (fields @ mix + 0.4 * rng.normal(size=(len(cells), channels))).astype(np.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six slides at 1 um/px; where its name is FOLDER, FOLDER2 has them at 2 um/px."""
    path = tmp_path_factory.mktemp("features") / "slides"
    for folder, cells, mpp in ((path, grid(16, 16), 1), (f"{path}2", grid(8, 8), 2)):
        os.makedirs(folder)
        for i in range(6):
            write(f"{folder}/S{i}.npz", waves(i, cells * mpp + mpp / 2), cells, mpp=float(mpp))
    return str(path)


def flags(**keys):
    return [f"--{key}={value}" for key, value in {**TINY, **keys}.items()]


def run(monkeypatch, **keys):
    """context.py in this process; returns its variables."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["context.py", *flags(**keys)])
    try:
        return runpy.run_path("context.py", run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rows(folder):
    lines = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    return [{k: v for k, v in line.items() if k != "windows_per_s"} for line in lines]


def change_batches(patch, change):
    """Call change(step, batch) before each step."""
    original = places.Windows.__getitem__

    def changed(self, step):
        batch = original(self, step)
        change(step, batch)
        return batch
    patch.setattr(places.Windows, "__getitem__", changed)


def bit_equal(a, b):
    a, b = (torch.load(path, weights_only=True)["teacher"] for path in (a, b))
    assert not [key for key in a if not torch.equal(a[key], b[key])]


close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
# what an export of training says
HEADER = dict(config={**TINY, "scale_embedding": True, "centre": False},
              about=[dict(mpp=1.0, pitch=224.0, side=224.0, width=16, count=36)],
              mean=torch.full((1, 16), 0.3), std=torch.full((1, 16), 0.5))


def test_only_the_distances_of_places_matter_and_they_do():
    net, rng = context.random_encoder(HEADER, 0), np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2, 36, 16))).float()
    nm = places.to_nm(np.stack([grid(6, 6)] * 2) * 224.0)
    hidden = torch.zeros(2, 36, dtype=torch.bool)
    hidden[:, :9] = True
    order = torch.from_numpy(rng.permutation(36))
    assert all((t == 1).all() for name, t in net.named_parameters() if "norm.w" in name or name.endswith("gamma"))
    assert not torch.equal(net.output.weight, context.random_encoder(HEADER, 1).output.weight)
    with torch.no_grad():
        out, predicted = net([x], nm, hidden)
        close(net([x], nm + 5_000_000, hidden)[0], out)
        close(net([x[:, order]], nm[:, order], hidden[:, order])[0], out[:, order])
        for other in (nm[:, order], 2 * nm):
            assert (net([x], other, hidden)[0] - out).abs().max() > 0.05
        close(net([x[1:]], nm[1:], hidden[1:])[0], out[1:])  # angles are each window's own
        other = torch.where(hidden[..., None], 0.5, x)  # hidden features are not seen
        assert predicted.shape == (72, 16) and torch.equal(net([other], nm, hidden)[0], out)


def test_the_cost_of_a_window_is_what_its_products_take():
    """Counted by torch in a forward, which is a third of a training step."""
    net, n = context.random_encoder(HEADER, 0), 50
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net([torch.randn(1, n, 16)], torch.zeros(1, n, 2, dtype=torch.int32), torch.zeros(1, n, dtype=torch.bool))
    assert context.tflop_of_a_window(net, n) * 1e12 == pytest.approx(3 * counter.get_total_flops())


def test_waves_are_as_long_as_the_key_says():
    config, about = HEADER["config"] | {"periods": (4.0, 108.0)}, [HEADER["about"][0] | {"pitch": 100.0}]
    net = context.random_encoder({"config": config, "about": about}, 0)
    for band, pitches in enumerate((4, 12, 36, 108)):
        sin, _ = net.rope(places.to_nm(np.array([[0, 0], [100.0 * pitches / 2, 0]]))[None])
        close(sin[0, 0, :, band], torch.tensor([-1.0, 1.0]))  # half a wave apart, around the middle


def test_places_of_two_scales_differ_by_the_embedding_alone():
    about = [{**HEADER["about"][0], "mpp": mpp} for mpp in (1.0, 2.0)]
    x, nm, hidden = torch.randn(1, 4, 16), places.to_nm(grid(2, 2) * 224.0)[None], torch.tensor([[True, False] * 4])
    for embedding in (False, True):
        net = context.random_encoder({"config": HEADER["config"] | {"scale_embedding": embedding}, "about": about}, 0)
        fine, coarse = net([x, x], nm.tile(2, 1), hidden)[0].split(4, 1)
        assert torch.isclose(fine, coarse, atol=1e-4).all() == (not embedding)


def test_losses_of_guesses():
    """By hand, of four places in a row, 100 um apart, whose second is hidden."""
    target = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [4.0, 4.0]]])
    nm = places.to_nm(grid(1, 4) * 100.0)[None]
    hidden = torch.tensor([[False, True, False, False]])
    losses = places.window_losses(target, target.clone(), nm, hidden, hidden)
    guesses = torch.tensor([[3.0, 4.0], [0, 0], [5 / 3, 2], [(1 + 4 / 4) / 2.25, (2 + 4 / 4) / 2.25]])
    expected = places.feature_loss(guesses, target[0, 1].expand(4, 2))
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3)
    assert losses[1].item() == pytest.approx((2.5 + 3.5) / 2 + 0.5)


def test_rare_places_weigh_more():
    target = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, 0.0]]])  # away from their mean: 1, 1, 1 and 3
    nm, hidden = torch.zeros(1, 4, 2, dtype=torch.int32), torch.tensor([[False, True, True, True]])
    guess = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    each = places.feature_loss(guess, target)[0]
    equal, rare = (places.window_losses(target, guess, nm, hidden, hidden, rare)[0] for rare in (0.0, 1.0))
    assert equal == pytest.approx(each[1:].mean().item())
    assert rare == pytest.approx(((each[1] + each[2] + 9 * each[3]) / 11).item())


def test_losses_are_finite_where_nothing_is_seen_or_all_places_are_alike():
    nm, hidden = places.to_nm(grid(2, 2) * 100.0)[None], torch.ones(1, 4, dtype=torch.bool)
    for wanted in (hidden, ~hidden):
        assert places.window_losses(torch.ones(1, 4, 2), torch.zeros(1, 4, 2), nm, hidden, wanted, 1.0).isfinite().all()


# ---- windows --------------------------------------------------------------------------------------------------------


def test_a_window_hides_exactly_its_share_in_blocks():
    cells = grid(16, 16) * 224.0
    times = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        hidden, wanted = places.hide(rng, [cells], [300.0], 0.3, (4, 25))  # tiles that overlap are no other scale
        assert hidden.sum() == round(0.3 * 256) and np.array_equal(hidden, wanted)
        beside = np.abs(cells[hidden][:, None] - cells[hidden]).sum(2) == 224
        assert beside.sum() / hidden.sum() > 2  # of 4 neighbours; 1.2 where places are hidden one by one
        times = times + hidden
    assert times.min() > 0, "anywhere"
    block = cells[places.draw_blocks(np.random.default_rng(0), cells, 9, (9, 9))]
    assert np.ptp(block, 0).max() <= 4 * 224 and len(block) == 9


def test_no_scale_shows_what_another_hides():
    fine, wide = (grid(16, 16) + 0.5) * 224.0, (grid(8, 8) + 0.5) * 448.0
    for shift in (0, 100):  # of one grid to the other
        hidden, wanted = places.hide(np.random.default_rng(1), [fine, wide + shift], [224.0, 448.0], 0.5, (2, 6))
        assert wanted[256:].sum() == 32 and (hidden | ~wanted).all() and not hidden.all()
        apart = np.abs(fine[:, None] - wide - shift).max(2) < 0.9 * (224 + 448) / 2 - 25
        assert not (apart & wanted[:256, None] & ~hidden[256:]).any()
        assert not (apart & ~hidden[:256, None] & wanted[256:]).any()
        assert shift or wanted.sum() == hidden.sum() == 32 + 4 * 32
        swapped, _ = places.hide(np.random.default_rng(1), [wide + shift, fine], [448.0, 224.0], 0.5, (2, 6))
        assert np.array_equal(swapped, np.roll(hidden, 64)), "the order of scales does not matter"


def test_tiles_overlap_by_a_tenth_of_the_smaller_or_more():
    at, reach = np.array([[1000.0, 500.0]]), (200 + 400) / 2 - 0.1 * 200
    for x, y, overlap in ((reach - 1, 0, True), (0, 1 - reach, True), (reach + 1, 0, False), (0, -reach - 1, False)):
        assert places.touches(at + [x, y], 200.0, at, 400.0) == places.touches(at, 400.0, at + [x, y], 200.0) == overlap


def test_windows_are_turned_freely_and_half_are_flipped():
    rng = np.random.default_rng(0)
    turns = np.stack([places.turn(rng, np.eye(2)) for _ in range(400)])
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(2))
    assert abs(np.linalg.det(turns).mean()) < 0.15 and np.abs(turns.mean(0)).max() < 0.15
    assert len(np.unique(turns.round(6), axis=0)) == 400


def test_windows_are_the_nearest_places_the_same_for_any_ranks(folder):
    files = places.files_of(folder)
    for window, counts in ((36, [36, 9]), (4, [4, 4])):  # places of the same area, and some to hide and to see
        about = places.open_slides([files, places.files_of(folder + "2")], sorted(files), window, print)[1]
        assert [scale["count"] for scale in about] == counts
    slides, about = places.open_slides([files], sorted(files), 36, print)
    config = {**TINY, "seed": 3, "mask_share": 0.5, "turns": True}
    whole = places.Windows(slides, about, config)[1]
    halves = [places.Windows(slides, about, config | {"batch_size": 4}, rank, 2)[1] for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([half[key] for half in halves])), key
    assert whole["features"].shape == (8, 36, 16) and (whole["hidden"].sum(1) == 18).all()
    assert not torch.equal(whole["features"], places.Windows(slides, about, config | {"seed": 4})[1]["features"])
    for turns in (True, False):
        windows = places.Windows(slides, about, config | {"turns": turns})[1]["places"]
        assert (windows % 224_000 == 0).all() != turns
    chosen = set()
    for x, nm, number in zip(whole["features"], whole["places"], whole["slide"]):
        stored, centres, _ = places.open_features(files[f"S{number}"])
        at = np.flatnonzero((stored == x[0].numpy()).all(1))[0]  # the first is the one that the window is around
        distance = np.sort(np.hypot(*(centres - centres[at]).T))
        assert np.allclose(distance[:36], np.hypot(*nm.numpy().T / 1000), atol=0.01)
        chosen.add(at)
    assert len(chosen) > 4


def test_features_are_mapped_and_the_same_from_both_kinds_of_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    cells, values = grid(3, 5), waves(0, grid(3, 5))
    write(tmp_path / "a.npz", values, cells)
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["features"], h5["coords"] = values, cells * 448
        h5["features"].attrs.update({**ABOUT, "mpp": 1.0, "patch_size_level0": 448})
    for ending in ("npz", "h5"):
        features, centres, about = places.open_features(f"{tmp_path}/a.{ending}")
        assert isinstance(features, np.memmap) and np.array_equal(features, values) and features.dtype == np.float16
        assert centres.dtype == np.float32 and np.array_equal(centres, (cells + 0.5) * 224)
        assert about["pitch"] == about["side"] == 224 and np.allclose(about["norm"], ABOUT["norm"])
    write(tmp_path / "b.npz", values, cells, overlap=56)
    assert places.open_features(f"{tmp_path}/b.npz")[2]["pitch"] == 168
    files = [{"b": str(tmp_path / "b.npz")}]
    assert [len(places.agreeing(files, ["b"], print, apart)[0]) for apart in (True, False)] == [0, 1]


def test_it_learns_what_neighbours_do_not_tell(folder, tmp_path, monkeypatch):
    run(monkeypatch, features=folder, out_dir=tmp_path / "a", max_steps=80, log_interval=80)
    assert rows(tmp_path / "a")[-1]["loss/neighbours"] < 0.95


@pytest.mark.parametrize("scale, said", [([5, 6, 6, 6], 0), ([5, 4, 6, 6], 1), ([5, 6, 4, 6], 1), ([5, 6, 6, 4], 1)])
def test_a_run_ends_by_saying_that_a_guess_without_a_network_is_as_good(scale, said, folder, tmp_path, monkeypatch,
                                                                        capsys):
    losses = iter([[5.0, 6.0, 6.0, 6.0], scale] * 2)  # of two scales in two steps
    original = places.window_losses
    monkeypatch.setattr(places, "window_losses", lambda *args: original(*args) * 0 + torch.tensor(next(losses)))
    run(monkeypatch, features=f"{folder},{folder}2", out_dir=tmp_path, max_steps=2)
    assert capsys.readouterr().out.count("nothing was learnt") == said


@pytest.mark.parametrize("keys", [{}, {"centre": True}, {"subtract_mean": True}, {"shuffle": True}], ids=str)
def test_a_row_says_what_the_exported_network_makes_of_the_batch(keys, tmp_path, monkeypatch):
    """By hand. At a learning rate of 0 the export is the network of the step."""
    stored, centres = [], []
    for i, size in enumerate((8, 16)):  # slides of other sizes and means count the same
        cells = [grid(size // mpp, 12 // mpp) for mpp in (1, 2)]
        stored.append([waves(i, own) + np.float16(2 * i) for own in cells])
        for x, own, mpp in zip(stored[i], cells, (1.0, 2.0)):
            x[3], x[:, 5] = 9 * x[3], 1  # far out, and dead
            (tmp_path / f"{mpp:g}").mkdir(exist_ok=True)
            write(tmp_path / f"{mpp:g}/S{i}.npz", x, own, mpp=mpp)
        centres.append([np.float32((own + 0.5) * 224 * mpp) for own, mpp in zip(cells, (1, 2))])
    keys = keys | dict(features=f"{tmp_path}/1,{tmp_path}/2", base_lr=0.0, clip_grad=0.05, max_steps=1)
    found = run(monkeypatch, **keys, out_dir=tmp_path / "run")
    shuffled = [places.shuffled(*slide) for slide in zip(centres, stored)]
    for slide, own in zip(found["slides"], shuffled if "shuffle" in keys else centres, strict=True):
        assert all(map(np.array_equal, slide.centres, own))
    batch, parts, targets = found["batch"], [], []
    for scale, x in enumerate(batch["features"].split([36, 9], 1)):
        of_slides = [slide[scale].astype(np.float64) for slide in stored]
        mean = np.mean([x.mean(0) for x in of_slides], 0)
        std = np.sqrt(np.maximum(np.mean([(x**2).mean(0) for x in of_slides], 0) - mean**2, 1e-8))
        of_slides = np.stack([((x.mean(0) - mean) / std).clip(-5, 5) for x in of_slides])
        z = ((x.numpy() - mean) / std).clip(-5, 5)
        centred = z - of_slides[batch["slide"]][:, None]
        parts.append(torch.from_numpy(centred if "centre" in keys else z).float())
        targets.append(torch.from_numpy(centred if "subtract_mean" in keys else z).float())
    net, _ = context.load_encoder(str(tmp_path / "run/1.pth"))
    predicted = net(parts, batch["places"], batch["hidden"])[1].view(batch["features"].shape)
    pieces = [x.split([36, 9], 1) for x in (predicted, batch["places"], batch["hidden"], batch["wanted"])]
    losses = torch.stack([places.window_losses(*scale) for scale in zip(targets, *pieces)])
    (row,) = rows(tmp_path / "run")
    for scale, values in zip("12", losses.tolist()):
        assert values == pytest.approx([row[f"{guess}_{scale}"] for guess in ("loss", "zero", "mean", "neighbours")])
    assert found["loss"].item() == pytest.approx((losses[:, 0] / losses[:, 3]).mean().item())
    assert row["loss/neighbours"] == pytest.approx(found["loss"].item()) and row["grad_norm"] > 0.05
    moments = found["optimizer"].state.values()  # by betas, of the clipped gradient
    first = sum(sharding.local(own["exp_avg"]).square().sum().item() for own in moments)
    second = sum(sharding.local(own["exp_avg_sq"]).sum().item() for own in moments)
    assert all(own["exp_avg"].any() for own in moments), "something is not trained"
    assert [first, second] == pytest.approx([(0.1 * 0.05) ** 2, 0.05 * 0.05**2], rel=1e-3)


@pytest.mark.parametrize("scales", [1, 2])
def test_six_steps_equal_three_resume_three_bit_for_bit(scales, folder, tmp_path, monkeypatch):
    keys = dict(features=[folder, f"{folder},{folder}2"][scales - 1], subtract_mean=scales == 2)
    run(monkeypatch, **keys, out_dir=tmp_path / "a")
    with monkeypatch.context() as patch:
        change_batches(patch, lambda step, batch: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
        assert run(monkeypatch, **keys, out_dir=tmp_path / "b")["progress"]["step"] == 3  # done and saved
    with pytest.raises(SystemExit, match="is not empty"):  # known before features are read
        run(monkeypatch, **keys | {"features": "none"}, out_dir=tmp_path / "b")
    with pytest.raises(SystemExit, match="this run needs none; go back to its keys"):
        run(monkeypatch, **keys, out_dir=tmp_path / "b", resume=True, depth=1)
    resumed = run(monkeypatch, **keys, out_dir=tmp_path / "b", resume=True)
    groups = resumed["optimizer"].param_groups
    assert groups[0]["betas"] == (0.9, 0.95) and {group["weight_decay"] for group in groups} == {0, 0.05}
    rates = [model.cosine_schedule(step, 0.1 * (8 / 1024) ** 0.5, 0.0, 6, 10) for step in range(6)]
    assert [row["lr"] for row in rows(tmp_path / "b")] == pytest.approx(rates) and groups[0]["lr"] == rates[-1]
    bit_equal(tmp_path / "a/6.pth", tmp_path / "b/6.pth")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_two_ranks_equal_one(folder, tmp_path, monkeypatch):
    """Clip is low, so that it acts on every step."""
    keys = dict(features=f"{folder},{folder}2", clip_grad=0.05, warmup_steps=1, max_steps=4)
    argv = [sys.executable, "context.py", *flags(**keys, batch_size=4, out_dir=tmp_path / "two")]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        launch = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]), OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **launch, "RANK": rank}) for rank in "01"]
    run(monkeypatch, **keys, out_dir=tmp_path / "one")
    assert [rank.wait() for rank in ranks] == [0, 0]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one == {key: pytest.approx(value, rel=1e-4, abs=1e-7) for key, value in two.items()}
    one, two = (torch.load(tmp_path / f"{name}/4.pth", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(one["teacher"], two["teacher"], atol=1e-4, rtol=1e-3)


def test_ranks_that_see_different_slides_are_refused(folder, tmp_path, monkeypatch):
    """Each would train by its own listing: sums over ranks would mix slides."""
    agree = places.rundir.agree
    monkeypatch.setattr(places.rundir, "agree", lambda what, work: agree(what, work) + [(["S0"], [])] * (what != ""))
    monkeypatch.setattr(places.rundir, "on_rank_0", lambda what, work: work())
    monkeypatch.setattr(places.rundir, "claim", lambda *a: None)
    with pytest.raises(SystemExit, match="^context.py: features: the ranks see different slides"):
        run(monkeypatch, features=folder, out_dir=tmp_path, max_steps=1)


def test_a_run_does_not_resume_as_another_network(folder, tmp_path, monkeypatch):
    keys = dict(features=folder, out_dir=tmp_path / "run")
    run(monkeypatch, **keys, max_steps=1)
    (tmp_path / "other").mkdir()  # the same slides by another tile encoder
    for i in range(6):
        write(tmp_path / f"other/S{i}.npz", waves(i, grid(16, 16)), grid(16, 16), weights_sha256="b" * 64)
    for key, value in dict(heads=4, periods=(2.0, 32.0), scale_embedding=False, centre=True, subtract_mean=True,
                           shuffle=True, features=tmp_path / "other").items():
        with pytest.raises(SystemExit, match=f"resume: the run was trained on other {key} than now"):
            run(monkeypatch, **keys | {key: value}, max_steps=2, resume=True)


def test_files_of_h5py_say_that_it_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "a.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match="a.h5: to read .h5 files: pip install h5py$"):
        places.agreeing([places.files_of(str(tmp_path))], ["a"], print)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(folder, tmp_path, monkeypatch):
    change_batches(monkeypatch, lambda step, batch: step < 2 or batch["features"].fill_(np.nan))
    run(monkeypatch, features=folder, out_dir=tmp_path, max_steps=4, save_interval=2)
    bit_equal(tmp_path / "2.pth", tmp_path / "4.pth")
    assert [row["bad_steps"] for row in rows(tmp_path)] == [0, 0, 1, 2]
    with pytest.raises(SystemExit, match="3 steps were not finite"):
        run(monkeypatch, features=folder, out_dir=tmp_path, resume=True, max_bad_steps=2, max_steps=5)


@pytest.mark.parametrize("count, centre", [(1, True), (5, False), (36, True), (500, True), (500, False)])
def test_context_of_slides_of_any_size(count, centre):
    """It is the mean over windows, which see what training does."""
    net, cells = context.random_encoder(HEADER, 0), grid(25, 20)[:count]
    x, centres = 2 * waves(0, cells), (cells * 224.0).astype(np.float32)
    header = HEADER | {"config": {**HEADER["config"], "centre": centre}}
    out = places.embed_slide(net, header, x, centres)
    assert out.shape == (count, 32) and out.dtype == np.float32 and np.isfinite(out).all()
    assert np.allclose(places.embed_slide(net, header, x, centres + np.float32(2240)), out, atol=1e-3)
    seen, mean = (((own.astype(np.float32) - 0.3) / 0.5).clip(-5, 5) for own in (x, x.mean(0, np.float32)))
    seen = torch.from_numpy(seen - mean if centre else seen)
    total, visits = torch.zeros(count, 32), torch.zeros(count, 1)
    for _, (window,) in places.cover([centres], [36]):
        nm = places.to_nm(centres[window])[None]
        total[window] += net([seen[window][None]], nm, torch.zeros(1, len(window)) > 0)[0][0].detach()
        visits[window] += 1
    assert np.allclose(total / visits, out, atol=1e-3) and (count < 100 or visits.max() > 2)


def test_a_shuffled_encoder_sees_no_arrangement():
    net, cells = context.random_encoder(HEADER, 0), grid(6, 6)
    x, centres = waves(0, cells), (cells * 224.0).astype(np.float32)
    control = {**HEADER, "config": {**HEADER["config"], "shuffle": True}}
    (order,) = places.shuffled([np.arange(36)], [x])
    (other,) = places.shuffled([np.arange(36)], [waves(1, cells)])
    assert (order != other).any(), "a permutation for each slide"
    assert sorted(order) == list(range(36)) and (order != np.arange(36)).any()
    out = places.embed_slide(net, control, x, centres)
    assert np.array_equal(out, places.embed_slide(net, HEADER, x, centres[order]))
    assert not np.allclose(out, places.embed_slide(net, HEADER, x, centres))


def test_a_place_read_while_hidden_is_not_told_by_its_own_feature():
    net, cells = context.random_encoder(HEADER, 0), grid(6, 6)
    x, centres = waves(0, cells), (cells * 224.0).astype(np.float32)
    changed = x.copy()
    changed[7] += 1
    out, other = (places.embed_slide(net, HEADER, features, centres, hide=3) for features in (x, changed))
    same = (out == other).all(1)
    assert same[7] and 8 < same.sum() < 18  # those that are hidden together, a third


def test_tiles_of_other_scales_are_hidden_with_a_place():
    fine, wide = grid(8, 8) * 224.0, grid(4, 4) * 448.0 + [100, 192]
    times = np.zeros(64, int)
    for read, hidden in places.in_turn([fine, wide], [224.0, 448.0], 9):
        times += read
        assert np.array_equal(hidden[:64], read)
        apart = np.abs(fine[read][:, None] - wide).max(2)
        assert np.array_equal(hidden[64:], (apart < 300).any(0))
        assert np.ptp(np.diff(np.flatnonzero(read))), "no raster"
    assert (times == 1).all()
    (read, hidden), = places.in_turn([fine, wide], [224.0, 448.0], 0)
    assert read.all() and not hidden.any()


def test_windows_cover_a_large_slide():
    centres = (grid(100, 200) * 224.0).astype(np.float32)
    visits, inner = np.zeros(20_000), set()
    for windows, (_, found) in enumerate(places.cover([centres, centres[::4]], [256, 64]), 1):
        assert len(found[0]) == 256 and len(found[1]) == 64
        visits[found[0]] += 1
        inner |= set(found[0][:128])
    assert len(inner) == 20_000 and windows < 500 and 4 < visits.mean() < 6


def test_embed_writes_each_slide_once_as_embed_slide_has_it(folder, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        run(monkeypatch, features=f"{folder},{folder}2", out_dir=tmp_path / f"run{seed}", max_steps=1, seed=seed)
    monkeypatch.setattr("prepare.coords.h5py", None)
    keys = dict(task="embed", features=f"{folder},{folder}2", weights=tmp_path / "run0/1.pth", out=tmp_path / "out")
    for part in ("1/2", "2/2", ""):
        with pytest.raises(SystemExit):
            run(monkeypatch, **keys, part=part)
    assert "0 slides done, 6 were done before" in capsys.readouterr().out
    net, header = context.load_encoder(str(tmp_path / "run0/1.pth"))
    assert header["slides"] == [f"S{i}" for i in range(6)]
    features, centres, _ = zip(*(places.open_features(f"{path}/S3.npz") for path in (folder, folder + "2")))
    expected = places.embed_slide(net, header, features, centres)
    with np.load(tmp_path / "out/S3.npz") as found:
        assert np.abs(found["context"] - expected).max() < 2e-3 and np.array_equal(found["features"], features[0])
        assert np.allclose(found["mean_raw"], features[0].astype(np.float32).mean(0), atol=1e-3)
        assert np.allclose(found["mean_context"], expected.mean(0), atol=1e-5) and found["hide"] == 0
    made = json.loads((tmp_path / "out/keys.json").read_text())
    assert made["trained_on"] == header["slides"] and made["encoder"] == model.sha256_of(keys["weights"])
    assert np.array_equal(places.open_features(str(tmp_path / "out/S3.npz"))[1], centres[0])
    with pytest.raises(SystemExit, match="features of 1 scales, and the encoder reads 2"):
        run(monkeypatch, **keys | {"features": folder, "out": tmp_path / "one"})
    (tmp_path / "few").mkdir()
    (tmp_path / "few/S3.npz").symlink_to(folder + "2/S3.npz")
    with pytest.raises(SystemExit, match="not in every folder of features: .*/few has none; its failed.csv may say"):
        run(monkeypatch, **keys | {"features": f"{folder},{tmp_path}/few", "out": tmp_path / "few_out"})
    with pytest.raises(SystemExit, match="encoder was"):
        run(monkeypatch, **keys | {"weights": tmp_path / "run1/1.pth"})


CELLS = grid(10, 10)
BAD = {"none": (CELLS[:0], {}, "no place in it"),
       "one": (CELLS[:1], {}, "1 places, and a window has 36"),
       "nan": (CELLS, {"poison": True}, "features that are not finite"),
       "encoder": (CELLS, {"weights_sha256": "b" * 64}, "weights_sha256 is bbbb"),
       "width": (CELLS, {"channels": 8}, "8 wide, not 16"),
       "scale": (CELLS, {"mpp": 1.05}, "mpp is 1.05, not 1.0"),
       "norm": (CELLS, {"norm": ((0, 0, 0), (1, 1, 1))}, "norm is"),
       "overlap": (CELLS, {"overlap": 112}, "its tiles overlap"),
       "level": (CELLS, {"level0_mpp": 1.0}, "another unit than level-0 px? Neighbours are 2 tiles apart"),
       "half": (CELLS, {"level0_mpp": 0.25}, "Neighbours are 0.5 tiles apart"),
       "columns": (CELLS / 448, {}, "another unit"),
       "unknown": (CELLS, {"tile_px": "?"}, "not features as prepare/features.py writes them")}


def test_bad_slides_are_left_out_one_line_each(tmp_path, monkeypatch, capsys):
    write(tmp_path / "S0.npz", waves(0, CELLS), CELLS)
    scattered = np.where(CELLS[:, :1] < 4, 3 * CELLS - 100, CELLS)
    write(tmp_path / "S1.npz", waves(1, scattered), scattered, mpp=1.01)  # as slides are: this one is no bad one
    for name, (cells, about, _) in BAD.items():
        about = dict(about)
        x = waves(7, cells, about.pop("channels", 16))
        x[50:51] = np.nan if about.pop("poison", False) else 1
        write(tmp_path / f"T_{name}.npz", x, cells, **about)
    (tmp_path / "T_cut.npz").write_bytes((tmp_path / "S0.npz").read_bytes()[:500])
    np.savez_compressed(tmp_path / "T_packed.npz", **np.load(tmp_path / "S0.npz"))
    write(tmp_path / "T_columns_first.npz", np.asfortranarray(waves(9, CELLS)), CELLS)
    (tmp_path / "T_empty.npz").touch()
    write(tmp_path / "T_short.npz", waves(9, CELLS), CELLS[:99])
    write(tmp_path / "T_words.npz", waves(9, CELLS), CELLS, norm="imagenet")
    write(tmp_path / "A_odd.npz", waves(8, CELLS), CELLS, mpp=2.0)  # the first slide is not what the others must be
    large = grid(250, 400)
    write(tmp_path / "U_large.npz", waves(0, large, 16), large)
    found = run(monkeypatch, features=tmp_path, out_dir=tmp_path / "run", max_steps=1)
    assert [slide.name for slide in found["slides"]] == ["S0", "S1", "U_large"]
    expected = {name: text for name, (_, _, text) in BAD.items()}
    expected |= {"columns_first": "by column", "empty": "not features as prepare", "words": "norm is imagenet"}
    expected["short"] = "not (N, C) and (N, 2)"
    expected |= {"cut": "not features as prepare", "packed": "chunked, compressed or by column"}
    expected["A_odd"] = "mpp is 2.0, not 1.0"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == len(expected) == 19
    for line in lines:
        assert expected[line.split(":")[1].strip().removeprefix("T_")] in line
    (tmp_path / "U_large.npz").unlink()
    coords.say_few.cache_clear()
    with pytest.raises(SystemExit, match="18 of 21 slides failed"):
        run(monkeypatch, task="embed", features=tmp_path, weights=tmp_path / "run/1.pth", out=tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").glob("[ST]*")) == ["S0", "S1", "T_one"]
    assert capsys.readouterr().out.count("a slide has fewer than 4 tiles") == 1


def test_a_resumed_run_keeps_its_slides(folder, tmp_path, monkeypatch):
    """Otherwise the file would not list all that it was trained on, and eval_slides.py would test on them."""
    names = tmp_path / "names.txt"
    keys = dict(features=folder, out_dir=tmp_path / "run", train_slides=names)
    names.write_text("S0\nS1\n")
    run(monkeypatch, **keys, max_steps=1)
    names.write_text("S1\nS2\n")
    with pytest.raises(SystemExit, match="trained on other slides"):
        run(monkeypatch, **keys, max_steps=2, resume="true")
    names.write_text("S0\nS1\n")
    found = run(monkeypatch, **keys | {"batch_size": 4}, max_steps=2, resume="true")
    assert found["dataset"].offset == 8 - 4, "windows go on after those that were drawn"


@pytest.mark.parametrize("text, expected, said", [
    ("S1.svs\n/data/x/S0.ndpi\n\n S2 \r\n", ["S1", "S0", "S2"], ""),
    ("\ufeffT.A1\nT.B2.svs\n", ["T.A1", "T.B2"], ""),  # a name may have dots
    ("nobody\nS1\nS7.svs\n", ["S1"], "left out: 2 names in .* that no features have, such as nobody, S7.svs$"),
    ("\n".join("abcdefg") + "\nS2", ["S2"], "left out: 7 names .* such as a, b, c, d, e$"),
    ("", None, "train_slides=.*names.txt: no slide that has features is listed in it"),
    ("S9\n", None, "no slide that has features"),
    ("S1\nS2\nS1.svs\n", ["S1", "S2"], ""),  # or S1 would be drawn twice as often
])
def test_training_slides_are_named_by_name_file_or_path(tmp_path, text, expected, said):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    known, lines = dict.fromkeys(["S0", "S1", "S2", "T.A1", "T.B2"]), []
    if expected is None:
        with pytest.raises(ValueError, match=said):
            places.read_names(tmp_path / "names.txt", known, lines.append)
    else:
        assert places.read_names(tmp_path / "names.txt", known, lines.append) == expected
        assert re.search(said, "".join(lines)) and len(lines) == bool(said)


def test_what_users_state_wrongly_ends_in_one_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "names.txt").write_text("S1.svs\nnobody\n")
    good = dict(features=folder, out_dir=tmp_path / "run", max_steps=1)
    found = run(monkeypatch, **good, train_slides=tmp_path / "names.txt")
    assert [slide.name for slide in found["slides"]] == ["S1"]
    said = capsys.readouterr().out.splitlines()
    assert "training on 1 of 6 slides, 256 places" in said
    assert [line for line in said if "M parameters; 8 windows x 1 ranks of 36 places are " in line], said
    torch.save({"teacher": {}}, tmp_path / "tile.pth")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.npz").symlink_to("nowhere")
    for text, keys in {"no .h5 or .npz in ''": dict(features=""), "task is": dict(task="test"),
                       "no slide encoder": dict(task="embed", weights=tmp_path / "tile.pth", out="x"),
                       "a.npz: ": dict(features=tmp_path / "links"),
                       "embed needs --weights": dict(task="embed"), "multiple of 4 x heads": dict(width=36),
                       "mask_share": dict(mask_share=1.0), "no slide is left": dict(window=300),
                       "No such file": dict(train_slides="x.txt"), "hide = -2": dict(hide=-2), "hide = 1": dict(hide=1),
                       "heads = 0": dict(heads=0), "width = 0": dict(width=0), "periods = ": dict(periods=(0, 4)),
                       "registers = -1": dict(registers=-1), "batch_size = 0": dict(batch_size=0),
                       "hide = -1": dict(hide=-1), "blocks are .fewest, most.": dict(mask_block="(5,4)")}.items():
        with pytest.raises(SystemExit, match=f"^context.py: .*{text}"):
            run(monkeypatch, **good | {"out_dir": tmp_path / "new"} | keys)


@pytest.mark.parametrize("name", ["context", "context_toy"])
def test_a_config_changes_what_its_body_says(name):
    before = configure(dict(vars(context)), [])
    after = configure(dict(vars(context)), [str(ROOT / f"config/{name}.py")])
    text = (ROOT / f"config/{name}.py").read_text()
    assert [line.split(":")[0] for line in text.splitlines()[:4]] == ["# question", "# parent", "# run", "# result"]
    for key, value in runpy.run_path(ROOT / f"config/{name}.py").items():
        assert key[:1] == "_" or (key in before and before[key] != value == after[key]), key
