"""train.py as a program: what it computes, what it refuses, and what survives a stop."""
import copy
import importlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import curves
import data
import eval_bach
import eval_slides
import model
import rundir
import sharding
import sources

SHARED = ROOT.parent / "shared" / "data"
model.ARCHS["tiny"] = model.replace(model.ARCHS["toy"], embed_dim=32, depth=2, num_heads=1, ffn_hidden=128)
TINY = dict(arch="tiny", batch_size=4, global_px=56, local_px=28, local_crops=2, dino_hidden=32, ibot_hidden=32,
            dino_prototypes=64, ibot_prototypes=64, dino_bottleneck=16, ibot_bottleneck=16, workers=0, warmup_steps=2,
            freeze_last_layer=1, teacher_temp_warmup=4, log_interval=1, save_interval=1000, base_lr=1e-2,
            drop_path=0.25, device="cpu", max_steps=4)


def flags(**keys):
    return [f"--{k}={v}" for k, v in {**TINY, **keys}.items()]


def train(monkeypatch, argv):
    """Run train.py in this process; returns its variables. Several runs must not leave a process group behind."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    try:
        return runpy.run_path("train.py", run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def refused(monkeypatch, argv):
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, argv)
    return str(e.value)


def rows(folder, file="metrics.jsonl"):
    return [json.loads(line) for line in open(f"{folder}/{file}")]


MEASURED = ("images_per_s", "data_wait", "host_gb")  # of the machine, not of the training


def timeless(folder, *more):
    """The rows of metrics.jsonl without what is measured of the machine, and without other keys that are named."""
    return [{k: v for k, v in row.items() if k not in (*MEASURED, *more)} for row in rows(folder)]


def weights(run):
    """Every number that the next step depends on: student, teacher, moments."""
    tensors = {f"{net}.{k}": v for net in ("student", "teacher") for k, v in run[net].state_dict().items()}
    for i, p in enumerate(run["optimizer"].state.values()):
        tensors |= {f"optimizer.{i}.{k}": v for k, v in p.items()}
    tensors |= {f"center.{k}": v for k, v in run["centers"].items()}
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}


def bit_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[:3]}"


def train_rank(argv):
    """The seed of the last step's drop path on this rank."""
    sys.argv = ["train.py", *argv]
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    runpy.run_path("train.py", run_name="__main__")
    return torch.initial_seed()


JOINT = dict(drop_path=0.0, clip_grad=0.05, freeze_last_layer=0, warmup_steps=0, max_steps=5)
ON_TWO_RANKS = {"sinkhorn": JOINT, "softmax": JOINT | dict(centering="softmax"),
                "hybrid": JOINT | dict(hybrid=True, batch_size=2),  # four ranks: two nodes of two
                "stopped": dict(local_crops=0, schedule_steps=9, max_steps=2)}


@pytest.fixture(scope="module")
def two_ranks(on_ranks, tiles, tmp_path_factory):
    """A folder with the runs of ON_TWO_RANKS."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for name, keys in ON_TWO_RANKS.items():
        ranks = 4 if name == "hybrid" else 2
        seeds = on_ranks(ranks, train_rank, flags(tiles=tiles, out_dir=folder / name, **keys))
        assert len(set(seeds)) == ranks, "each rank drops other images"
    return folder


def test_tiles_need_no_openslide_and_slides_ask_for_it(tiles, tmp_path, monkeypatch):
    for name in ("wsi", "sources", "data"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openslide", None)  # importing it fails
    assert rows(train(monkeypatch, flags(tiles=tiles, max_steps=1, out_dir=tmp_path / "a"))["out_dir"])[1]["loss"] > 0
    with pytest.raises(ValueError, match=r"a\.svs: slides need OpenSlide; pip install openslide-python"):
        (tmp_path / "a.svs").touch()
        importlib.import_module("wsi").Slide(tmp_path / "a.svs")


def test_twenty_steps_equal_ten_resume_ten_bit_for_bit(tiles, tmp_path, monkeypatch):
    keys = dict(tiles=tiles, schedule_steps=20, centering="softmax", kde="koleo")
    straight = train(monkeypatch, flags(**keys, max_steps=20, out_dir=tmp_path / "a"))
    train(monkeypatch, flags(**keys, max_steps=12, save_interval=10, out_dir=tmp_path / "b"))
    # a stop during the save at step 12: only its unfinished folder is there, and rows beyond step 10
    os.rename(tmp_path / "b/ckpt/12", tmp_path / "b/ckpt/unfinished")
    resumed = train(monkeypatch, flags(**keys, max_steps=20, out_dir=tmp_path / "b", resume="true"))
    bit_equal(weights(straight), weights(resumed))
    a, b = (timeless(tmp_path / x) for x in "ab")
    assert a == b and [r["step"] for r in a] == list(range(21))
    assert all(c.abs().max() > 0 for c in straight["centers"].values())
    assert straight["progress"]["step"] == 20 and sorted(os.listdir(tmp_path / "b/ckpt")) == ["10", "20"]


def test_a_resume_on_other_ranks_or_with_another_batch_takes_the_samples_that_come_next(tiles, two_ranks, monkeypatch,
                                                                                       capsys):
    """The bug: a resume that replayed the data, or left some out."""
    keys = dict(tiles=tiles, local_crops=0, out_dir=two_ranks / "stopped", schedule_steps=9)
    seen, image = [], data.Batches.image
    monkeypatch.setattr(data.Batches, "image", lambda self, n, bad: seen.append(n) or image(self, n, bad))
    train(monkeypatch, flags(**keys, max_steps=4, resume="true"))  # 2 x 4 images before, 1 x 4 now
    assert "resume: 4 images per step instead of 8: the learning rate's peak is 0.000625 instead of 0.0008839" in (
        capsys.readouterr().out)
    run = train(monkeypatch, flags(**keys, max_steps=6, batch_size=5, resume="true"))
    assert seen == list(range(16, 16 + 2 * 4 + 2 * 5)) and run["progress"]["samples"] == 34
    seen.clear()
    train(monkeypatch, flags(**keys, max_steps=7, batch_size=5, resume="true"))
    assert seen == list(range(34, 39)) and "images per step" not in capsys.readouterr().out.split("resume: step 6")[1]


@pytest.mark.parametrize("name, ranks", [("sinkhorn", 2), ("softmax", 2), ("hybrid", 4)])
def test_ranks_equal_one_process_on_the_same_global_batch(name, ranks, tiles, two_ranks, tmp_path, monkeypatch):
    """
    The bugs: clipping local gradients before the sync, or by a norm that counts each node's copy. Clip is low, so that
    it acts on every step.
    """
    one_rank = data.Batches.__getitem__

    def join(parts, views):  # crop-major
        if isinstance(parts[0], dict):
            return {k: join([part[k] for part in parts], views) for k in parts[0]}
        return torch.cat([x.unflatten(0, (views, -1)) for x in parts], 1).flatten(0, 1)

    def all_ranks(self, step):
        share = {**self.config, "batch_size": self.config["batch_size"] // ranks}
        parts = [one_rank(data.Batches(self.source, share, self.grid, r, ranks), step) for r in range(ranks)]
        L = self.config["local_crops"]
        views = {"global_crops": 2, "global_colour": 2, "local_crops": L, "local_colour": L, "masks": 2}  # crop-major
        merged = {k: join([part[k] for part in parts], v) for k, v in views.items()}
        masks = merged["masks"]
        per_crop = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        merged |= {"bad": [], "left_out": []}
        return {**merged, "masked": masks.flatten().nonzero()[:, 0], "mask_weights": per_crop}

    monkeypatch.setattr(data.Batches, "__getitem__", all_ranks)
    folders = tmp_path / "one", two_ranks / name
    train(monkeypatch, flags(tiles=tiles, out_dir=folders[0], **ON_TWO_RANKS[name] | dict(batch_size=8)))
    one, several = map(rows, folders)
    assert len(one) == len(several) == 6
    for a, b in zip(one[1:], several[1:]):
        for k in ("loss", "dino", "ibot", "kde", "grad_norm", "grad_norm_backbone", "grad_norm_dino_head",
                  "grad_norm_ibot_head", "lr"):
            assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-7), (a["step"], k)
        assert a["grad_norm_backbone"] > 0.05
    saved = [torch.load(folder / "teacher/5.pth", weights_only=True)["teacher"] for folder in folders]
    for k in saved[0]:
        torch.testing.assert_close(saved[0][k], saved[1][k], atol=1e-4, rtol=1e-3)


def poison_steps(monkeypatch, wanted):
    """NaN in the steps whose number is `wanted`. Returns the calls, two per step; to be cleared before a new run."""
    augment, calls = data.augment, []

    def poisoned(crops, *rest):
        calls.append(0)
        return augment(crops, *rest) * (math.nan if wanted((len(calls) - 1) // 2) else 1)

    monkeypatch.setattr(data, "augment", poisoned)
    return calls


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_a_poisoned_batch_leaves_the_weights_bit_equal_and_is_counted(centering, tiles, tmp_path, monkeypatch):
    """The bug: a NaN loss that still steps the optimizer."""
    keys = dict(tiles=tiles, schedule_steps=5, centering=centering)
    clean = train(monkeypatch, flags(**keys, max_steps=3, out_dir=tmp_path / "clean"))
    calls = poison_steps(monkeypatch, lambda step: step >= 3)
    poisoned = train(monkeypatch, flags(**keys, max_steps=5, out_dir=tmp_path / "poisoned"))
    bit_equal(weights(clean), weights(poisoned))
    assert poisoned["progress"] == {"step": 5, "bad_steps": 2, "samples": 20, "images": 4}
    assert [r["bad_steps"] for r in rows(tmp_path / "poisoned")[1:]] == [0, 0, 0, 1, 2]
    bad = rows(tmp_path / "poisoned")[-1]
    assert bad["loss"] is bad["cls_rank"] is bad["cls_cosine"] is None, "NaN is not JSON"
    calls.clear()
    message = refused(monkeypatch, flags(**keys, max_steps=5, max_bad_steps=1, out_dir=tmp_path / "stopped"))
    assert "2 steps were not finite (max_bad_steps = 1)" in message


def test_saving_before_the_first_good_step_changes_nothing(tiles, tmp_path, monkeypatch):
    """The bug: asking for the optimizer's state makes it take an empty step when it has none."""
    calls, runs = poison_steps(monkeypatch, lambda step: step == 0), []
    for save in (1, 100):
        keys = dict(tiles=tiles, max_steps=3, save_interval=save)
        runs.append(train(monkeypatch, flags(**keys, out_dir=tmp_path / str(save))))
        calls.clear()
    bit_equal(*map(weights, runs))


def test_parameters_without_a_gradient_are_in_the_checkpoint(tiles, tmp_path, monkeypatch):
    monkeypatch.setitem(model.ARCHS, "tiny", model.replace(model.ARCHS["tiny"], local_cls_norm=True))
    keys = dict(tiles=tiles, local_crops=0, out_dir=tmp_path / "a")
    train(monkeypatch, flags(**keys, max_steps=1))
    assert train(monkeypatch, flags(**keys, max_steps=2, resume="true"))["progress"]["step"] == 2


def test_a_step_follows_the_recipe(tiles, tmp_path, monkeypatch):
    """What a wrong constant in the loop would change, recorded at the functions that the loop calls."""
    seen = {k: [] for k in ("groups", "norms", "momentum", "temp", "dino", "ibot", "kde", "forward", "seeds", "heads")}

    def spy(owner, name, key, take):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen[key].append(take(*args, **kwargs))
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, wrapped)

    spy(torch.optim.AdamW, "zero_grad", "norms", lambda self: sum(
        sharding.local(p.grad).square().sum() for g in self.param_groups for p in g["params"] if p.grad is not None))
    spy(torch.optim.AdamW, "step", "groups", lambda self: [
        (g["lr"], g["weight_decay"], g["lr_scale"], g["wd_scale"], g["last_layer"]) for g in self.param_groups])
    spy(sharding, "update_ema", "momentum", lambda teacher, student, m, wanted: m)
    spy(model, "sinkhorn", "temp", lambda logits, temp: (temp, len(logits)))
    spy(model, "dino_loss", "dino", lambda g, local, targets, temp: (len(g), len(local), temp))
    spy(model, "ibot_loss", "ibot", lambda logits, targets, w, crops, temp: (crops, temp, round(w.sum().item(), 4)))
    spy(model, "kde_loss", "kde", lambda x, kappa: (len(x), kappa))
    spy(model.ViT, "embed", "forward", lambda self, images, mask, grid: (self.training, mask is not None))
    spy(torch, "manual_seed", "seeds", lambda s: s)
    spy(model.DINOHead, "forward", "heads", lambda self, x: len(x))
    keys = dict(max_steps=6, schedule_steps=10, warmup_steps=3, freeze_last_layer=2, weight_decay=0.1,
                weight_decay_end=0.3, momentum=0.9, student_temp=0.2, teacher_temp_warmup=4, kde_kappa=4.0,
                base_lr=0.02, layer_decay=0.5, clip_grad=0.05)
    train(monkeypatch, flags(tiles=tiles, **keys, out_dir=tmp_path / "a"))
    cosine = lambda a, b, i, n: b + (a - b) * (1 + np.cos(np.pi * i / n)) / 2  # noqa: E731
    peak = 0.02 * (4 / 1024) ** 0.5
    for step in range(6):
        lr = peak * step / 2 if step < 3 else cosine(peak, 1e-6, step - 3, 7)
        for got, wd, lr_scale, wd_scale, last in seen["groups"][step]:
            assert got == pytest.approx(0 if last and step < 2 else lr * lr_scale, rel=1e-9)
            assert wd == pytest.approx(cosine(0.1, 0.3, step, 10) * wd_scale, rel=1e-9)
        assert seen["norms"][step].sqrt() == pytest.approx(0.05 * 3**0.5, rel=1e-3), "each of three parts is clipped"
        assert seen["momentum"][step] == pytest.approx(cosine(0.9, 1.0, step, 10))
        assert seen["temp"][2 * step][0] == pytest.approx(0.04 + 0.03 * min(step, 3) / 3)
    assert len({g[2] for g in seen["groups"][0]}) > 4 and {g[3] for g in seen["groups"][0]} == {0, 1}
    masked = sum(data.mask_counts(8, 4, 0.5, (0.1, 0.45)))
    assert [n for _, n in seen["temp"]] == [8, masked] * 6
    assert seen["heads"] == [8, masked, 16, masked] * 6, "only masked patches reach the iBOT heads"
    assert set(seen["dino"]) == {(8, 8, 0.2)} and set(seen["ibot"]) == {(8, 0.2, 4.0)}
    assert seen["kde"] == [(4, 4.0)] * 12, "each global crop on its own"
    assert seen["forward"] == [(False, False), (True, True), (True, False)] * 6, "masks are for the student's globals"
    assert len(set(seen["seeds"][-6:])) == 6, "drop path and positions are drawn anew each step"


def test_the_rows_of_a_run(tiles, tmp_path, monkeypatch, capsys):
    keys = dict(max_steps=5, log_interval=2, save_interval=2, keep_checkpoints=1, keep_teachers=1, keep_every=4)
    run = train(monkeypatch, flags(tiles=tiles, **keys, out_dir=tmp_path / "a"))
    r = rows(tmp_path / "a")
    assert [x["step"] for x in r] == [0, 2, 4, 5]
    wanted = {"step", "loss", "dino", "ibot", "kde", "grad_norm", "lr", "images_per_s"}
    assert all(wanted <= set(x) for x in r)
    for x in r[1:]:
        assert x["loss"] == pytest.approx(x["dino"] + x["ibot"] + 0.05 * x["kde"], rel=1e-5)
        parts = [x[f"grad_norm_{k}"] for k in ("backbone", "dino_head", "ibot_head")]
        assert x["grad_norm"] == pytest.approx(np.linalg.norm(parts), rel=1e-5)
        assert 1 <= x["cls_rank"] <= 2 * 4 - 1 and -1 / 7 <= x["cls_cosine"] <= 1
    assert r[-1]["kde"] == pytest.approx(sum(model.kde_loss(x).item() for x in run["out"][0]["cls"].chunk(2)))
    last = eval_bach.collapse_metrics(run["out"][0]["cls"].detach())
    assert {k: r[-1][k] for k in ("cls_rank", "cls_cosine")} == pytest.approx(
        {"cls_rank": last["effective_rank"], "cls_cosine": last["mean_cosine"]}, rel=1e-5)
    assert sorted(os.listdir(tmp_path / "a/ckpt")) == ["4", "5"]
    assert sorted(os.listdir(tmp_path / "a/teacher")) == ["4.pth", "5.pth"]
    assert "step 2/5: loss" in capsys.readouterr().out, "plain lines where there is no terminal"
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["batch_size"] == 4 and config["mpps"] == [0.25, 0.5, 1.0, 2.0]
    assert (tmp_path / "a/source.diff").exists()
    exported = model.load_backbone(tmp_path / "a/teacher/5.pth")
    for k, v in exported.state_dict().items():
        mine = run["teacher"]["backbone"].state_dict()[k]
        assert torch.equal(v, mine.full_tensor() if hasattr(mine, "full_tensor") else mine), k
    assert not torch.equal(exported.cls_token, run["student"]["backbone"].cls_token.full_tensor())


def test_a_start_is_one_screen_and_losses_stay_above_a_terminals_bar(tiles, tmp_path, monkeypatch, capsys):
    keys = dict(bach_dir="", slides="", tiles=tiles, max_steps=4, device="cpu", batch_size=2, log_interval=2, workers=0)
    argv = [f"--{k}={v}" for k, v in keys.items()]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(monkeypatch, ["config/toy.py", "config/ablate/koleo.py", *argv, f"--out_dir={tmp_path / 'a'}"])
    said, bars = capsys.readouterr()
    start, first, rest = said.partition("step 2/4: loss ")
    assert first and "step 4/4: loss " in rest and " 4/4 [" in bars and max(map(len, re.split("[\r\n]", bars))) <= 80
    assert sum(math.ceil(len(line) / 80) for line in start.splitlines()) <= 15, "rows of a terminal"
    for part in ("config: config/toy.py: out_dir = 'out/toy', ", "koleo.py: out_dir = 'out/toy_koleo', kde = 'koleo', ",
                 "data: 24 of 24 tiles", "toy: 0.9 M parameters", "4 steps are 8 images", "\nmemory: about 0.0",
                 f"\nwrites to {tmp_path / 'a'}, "):
        assert part in start, start


def test_ctrl_c_saves_and_prints_the_line_that_resumes(tiles, tmp_path, monkeypatch, capfd):
    keys = dict(tiles=tiles, max_steps=6)
    straight = train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    batch, ended = data.Batches.__getitem__, []
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "__getitem__", lambda self, step: (
            signal.raise_signal(signal.SIGINT) if step == 2 else None, batch(self, step))[1])
        patch.setattr(os, "kill", lambda process, number: ended.append(number))  # what a shell sees
        train(patch, flags(**keys, out_dir=tmp_path / "b c", resume="false"))
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second one ends it"
        signal.signal(signal.SIGINT, signal.default_int_handler)
    said, errors = capfd.readouterr()
    assert "Ctrl-C: the run saves at its next row" in errors and "stopped by a signal after step 3; resume by:" in said
    launcher, *argv = shlex.split(said.splitlines()[-1])
    assert launcher == "python" and argv[-1] == "--resume=true" and "--resume=false" not in argv
    resumed = train(monkeypatch, argv[1:])
    bit_equal(weights(straight), weights(resumed))
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b c")


def test_a_run_starts_from_the_weights_that_it_is_given(tiles, tmp_path, monkeypatch):
    vit = model.ViT(model.ARCHS["tiny"])  # a table for 224 px, resampled to the crops' 4 x 4
    torch.save({"teacher": vit.state_dict(), "arch": "tiny", "step": 1, "config": {}}, tmp_path / "w.pth")
    keys = dict(tiles=tiles, max_steps=0, weights=tmp_path / "w.pth")
    for init in ("resample", "random"):
        run = train(monkeypatch, flags(**keys, pos_embed_init=init, out_dir=tmp_path / init))
        for net in (run["student"], run["teacher"]):
            state = {k: v.full_tensor() for k, v in net["backbone"].state_dict().items()}
            table = model.resample_pos_embed(vit.pos_embed.detach(), 4)
            assert torch.equal(state["blocks.1.attn.qkv.weight"], vit.blocks[1].attn.qkv.weight)
            assert torch.equal(state["pos_embed"], table) == (init == "resample")
    assert "another architecture" in refused(monkeypatch, flags(**keys, arch="dinov2_vits14", out_dir=tmp_path / "c"))
    assert "changes nothing" in refused(monkeypatch, flags(**{**keys, "weights": ""}, pos_embed_init="random"))
    rope = dict(arch="dinov3_vits16", global_px=64, local_px=32, pos_interp="offset")
    assert "rotary" in refused(monkeypatch, flags(**{**keys, **rope}))
    run = train(monkeypatch, flags(**keys, pos_interp="offset", out_dir=tmp_path / "e"))
    loaded = run["student"]["backbone"].pos_embed.full_tensor()
    assert torch.equal(loaded, table), "a file's table meets the grid as Meta's model does"
    c = run["teacher"]["backbone"].arch  # only maps of local crops are of the other kind
    assert (c.pos_antialias, c.pos_offset) == (False, 0.1) == (run["student"]["backbone"].arch.pos_antialias, 0.1)


def test_the_teacher_is_the_average_of_the_student(tiles, tmp_path, monkeypatch):
    """The bug: an average written to a gathered copy of the teacher, and lost."""
    vit = model.ViT(model.replace(model.ARCHS["tiny"], pos_grid=4))
    torch.save({"teacher": vit.state_dict(), "arch": "tiny", "step": 1, "config": {}}, tmp_path / "w.pth")
    keys = dict(tiles=tiles, weights=tmp_path / "w.pth", momentum=0.75, momentum_end=0.75, warmup_steps=0,
                save_interval=1, schedule_steps=10, max_steps=3, out_dir=tmp_path / "a")
    want, students, average = dict(vit.state_dict()), [], sharding.update_ema

    def after_a_step(teacher, student, *rest):
        students.append({k: v.full_tensor().clone() for k, v in student["backbone"].state_dict().items()})
        average(teacher, student, *rest)
    monkeypatch.setattr(sharding, "update_ema", after_a_step)
    train(monkeypatch, flags(**keys))
    for step, student in enumerate(students, 1):
        saved = torch.load(tmp_path / f"a/teacher/{step}.pth", weights_only=True)["teacher"]
        for k, v in student.items():
            want[k] = 0.75 * want[k] + 0.25 * v
            torch.testing.assert_close(saved[k], want[k], atol=1e-6, rtol=1e-5)
            assert not torch.equal(saved[k], vit.state_dict()[k]) or k == "mask_token", k


def test_bad_input_is_named_before_anything_is_built(tiles, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    monkeypatch.setattr(model, "ViT", None)  # building would fail loudly
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    out = tmp_path / "new"
    for keys, part in [(dict(out_dir=tmp_path / "full"), "is not empty: continue with --resume=true"),
                       (dict(tiles=tmp_path / "none"), "no folder"),
                       (dict(weights="none.pth"), "no file or folder none.pth"), (dict(bach_dir=tmp_path), "Photos"),
                       (dict(arch="vit"), "unknown arch 'vit'; known: 'dinov2_vits14'"),
                       (dict(kde="on"), "unknown kde 'on'; known"),
                       (dict(global_px=60), "multiple of tiny's patch of 14"), (dict(centering="x"), "sinkhorn"),
                       (dict(batch_size=1), "at least 2"), (dict(world_size=8), "world_size is for a dry run"),
                       (dict(blur_prob="(0.1,0.5)"), "blur_prob = (0.1, 0.5): give 3"),
                       (dict(device="cuda"), "no GPU"),
                       (dict(out_dir=tmp_path / "full/file"), "Not a directory"),
                       (dict(global_scale="(0.5,0.1)"), "smaller"), (dict(mask_prob=0.05), "masks none"),
                       (dict(local_px=5), "nearest: 14"),
                       (dict(norm="tcga"), "norm = 'tcga': give 'imagenet', 'half', 'h_optimus', 'hibou', or (mean,"),
                       (dict(mpp_range="(1,0.5)"), "smaller one first"), (dict(mpp_range="(1,)"), "give two numbers"),
                       (dict(mpps="()"), "mpps = (): give um/px"), (dict(mpps="(0,)"), "mpps = (0.0,): give numbers"),
                       (dict(wide_field="('a','b')"), "numbers above 0"), (dict(mpp_range="(None,1)"), "above 0"),
                       (dict(clip_grad=-1), "clip_grad = -1.0: give 0 or more"), (dict(log_interval=0), "1 or more"),
                       (dict(teacher_temp=0), "teacher_temp = 0.0: give a number above 0"),
                       (dict(momentum=1.5), "from 0 to 1"), (dict(holdout=1.5), "from 0 to 1"),
                       (dict(blur_prob="(0,90,50)"), "from 0 to 1"),
                       (dict(shards="x"), "exactly one of"),
                       (dict(wandb_project="x"), "pip install wandb"),
                       (dict(patient="["), "no regular expression"), (dict(holdout=0.5), "holdout needs patients")]:
        message = refused(monkeypatch, flags(**{"tiles": tiles, "out_dir": out, **keys}))
        assert part in message and "\n" not in message, message
    assert not out.exists()
    monkeypatch.undo()
    assert "nothing to resume" in refused(monkeypatch, flags(tiles=tiles, out_dir=out, resume="true"))


def test_all_that_is_missing_is_named_at_once_with_the_command_that_gets_it(tmp_path, monkeypatch):
    """The bug: one thing per attempt. What is there but wrong has no such command."""
    (tmp_path / "empty").mkdir()
    keys = dict(slides="data/TCGA_/*.svs", bach_dir=f"{tmp_path}/BACH", out_dir=tmp_path / "a",
                weights="data/weights/dinov2_vits14_pretrain.pth")
    slides, bach, vits = refused(monkeypatch, flags(**keys)).splitlines()
    assert slides == ("train.py: slides: no file matches data/TCGA_/*.svs; python prepare/tcga.py --project=TCGA-BRCA "
                      "lists slides, says how to fetch them")
    assert f"{tmp_path}/BACH/ICIAR2018" in bach and f"mkdir -p {tmp_path}/BACH && wget -c -O bach.zip https://" in bach
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    assert vits == f"weights: no file or folder {keys['weights']}; wget -P data/weights {url}"
    toy = refused(monkeypatch, flags(slides="data/toy/none/*", out_dir=tmp_path / "a", norm="x")).splitlines()
    assert toy[0].endswith("data/toy/none/*; python prepare/toy.py") and toy[1].startswith("norm = 'x'")
    message = refused(monkeypatch, flags(slides=f"{tmp_path}/empty/*.svs", out_dir=tmp_path / "a"))
    assert message == f"train.py: slides: no file matches {tmp_path}/empty/*.svs"
    assert not (tmp_path / "a").exists()


def test_a_spreading_term_within_a_rank_needs_two_images_per_rank(monkeypatch):
    """The bug: images counted over all ranks, and a constant without a gradient."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for kde in ("koleo", "openmidnight"):
        message = refused(monkeypatch, flags(kde=kde, batch_size=1, dry_run="true"))
        assert f"kde = '{kde}' compares images of one rank: batch_size must be at least 2" in message
    assert "at least" not in refused(monkeypatch, flags(batch_size=1, dry_run="true"))


def read_by_rank_0_alone(argv):
    """The message of this rank."""
    if os.environ["RANK"] == "1":
        sources.open_source = lambda config: open("/nowhere/at/all")
    with pytest.raises(SystemExit) as e:
        train_rank(argv)
    return str(e.value)


def test_data_that_one_rank_cannot_read_are_named_by_all(on_ranks, tiles, tmp_path):
    """The bug: the others wait for it, or end with a message of the network."""
    first, second = on_ranks(2, read_by_rank_0_alone, flags(tiles=tiles, out_dir=tmp_path / "a"))
    assert first == second == "train.py: [Errno 2] No such file or directory: '/nowhere/at/all'"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("launch, part", [
    (dict(WORLD_SIZE="2"), "not set: RANK, MASTER_ADDR, MASTER_PORT; launch with torchrun --nproc_per_node"),
    (dict(RANK="0"), "not set: WORLD_SIZE, MASTER_ADDR"), (dict(RANK="x", WORLD_SIZE="2"), "must be numbers"),
    (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "rank 2 of 2 ranks"),
    (dict(SLURM_NTASKS="2"), "SLURM_NTASKS = 2 without RANK: each task would be a run of its own"),
    (dict(SLURM_PROCID="1", MASTER_ADDR="n", MASTER_PORT="29500"), "srun --kill-on-bad-exit=1 bash -c "
     "'MASTER_ADDR=HOST MASTER_PORT=29500 RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"),
    (dict(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2"), "mpirun bash -c 'MASTER_ADDR=HOST"),
    (dict(PMI_RANK="1", PMI_SIZE="2"), "RANK=$PMI_RANK LOCAL_RANK=$MPI_LOCALRANKID WORLD_SIZE=$PMI_SIZE"),
    (dict(WORLD_SIZE="0"), "1 or more"), (dict(RANK="-1", WORLD_SIZE="2"), "must be numbers"),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="abc"), "MASTER_PORT = abc"),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="70000"), "MASTER_PORT = 70000")])
def test_a_launch_that_is_incomplete_is_named_in_one_line(launch, part, tiles, tmp_path, monkeypatch):
    """The bug: ranks that wait for each other in silence, or a traceback."""
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    message = refused(monkeypatch, flags(tiles=tiles, out_dir=tmp_path / "a"))
    assert part in message and "\n" not in message and not (tmp_path / "a").exists()


def test_an_empty_rank_is_no_rank(tiles, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "")
    assert train(monkeypatch, flags(tiles=tiles, max_steps=0, out_dir=tmp_path / "a"))["world"] == 1


def test_too_many_unreadable_tiles_stop_the_run_with_their_list(tiles, tmp_path, monkeypatch):
    for i in range(8):
        image = tmp_path / "tiles" / f"{i}.png"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(b"junk" if i < 3 else open(f"{tiles}/0{i}.png", "rb").read())
    (tmp_path / "tiles/gone.png").symlink_to("/nowhere.png")
    keys = dict(tiles=tmp_path / "tiles", max_steps=6)
    train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    assert rows(tmp_path / "a")[-1]["bad_tiles"] == 3
    assert f"{tmp_path}/tiles/gone.png,a link to /nowhere.png: " in (tmp_path / "a/left_out.csv").read_text()
    message = refused(monkeypatch, flags(**keys, out_dir=tmp_path / "b", max_bad_tiles=2))
    assert "3 unreadable" in message and all(f"{i}.png" in message for i in range(3))


def test_when_every_draw_fails_each_file_is_named_once(tiles, tmp_path, monkeypatch):
    def read(self, n, attempt=0):
        raise OSError(f"a.tar: tile x={n} y={attempt}: damaged")
    monkeypatch.setattr(sources.Tiles, "read", read)
    message = refused(monkeypatch, flags(tiles=tiles, workers=0, out_dir=tmp_path / "a"))
    assert "every draw failed:\na.tar: " in message and message.count("damaged") == 1


def test_the_bach_curve_starts_at_step_0_and_is_what_the_teachers_export_scores(tiles, bach_template, tmp_path,
                                                                               monkeypatch):
    quick_bach(monkeypatch.setattr, gray=False)
    keys = dict(tiles=tiles, max_steps=3, eval_interval=2, bach_dir=bach_template, norm="half")
    train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    curve, metrics = rows(tmp_path / "a", "bach.jsonl"), rows(tmp_path / "a")
    assert [r["step"] for r in curve] == [0, 2, 3] and [r["step"] for r in metrics] == [0, 1, 2, 3]
    assert [r["images"] for r in curve] == [0, 8, 12]
    for r in curve:
        assert {"accuracy", "recall", "confusion", "epochs", "seconds"} <= set(r) and len(r["seeds"]) == 5
    for i, r in zip((0, 2, 3), curve):
        assert -1 <= r["mean_cosine"] <= 1 and 1 <= r["effective_rank"] <= 128
        for k in ("bach", "plateau", "clean", "knn", "mean_cosine", "effective_rank"):
            assert metrics[i][k] == r[k]
        for k in ("std", "seeds", "protocol", "embed_seconds", "seconds"):
            assert metrics[i][f"bach_{k}"] == r[k]
    assert not any("bach" in k for k in metrics[1])
    keys = dict(arch="", device="cpu", image_dir="", views="resize", input_px=56, mpp=0.5, concat=False)
    row = eval_bach.score_file(f"{tmp_path}/a/teacher/3.pth", None, keys, eval_bach.load_pixels(bach_template))
    assert {k: row[k] for k in ("seeds", "mean_cosine")} == {k: curve[-1][k] for k in ("seeds", "mean_cosine")}


def test_labelled_tiles_may_be_the_probe_instead_of_bach(tiles, tmp_path, monkeypatch):
    """The row is eval_slides.py's of the export; its protocol and its name, balanced, say that it is not BACH."""
    folder, lines = tmp_path / "labelled", ["file,patient,fold"]
    for i, file in enumerate(sorted(os.listdir(tiles))):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{tiles}/{file}", folder / "ab"[i % 2])
        lines.append(f"{file},P{i // 4},{i // 4 % 3}")
    (folder / "groups.csv").write_text("\n".join(lines))
    quick_bach(monkeypatch.setattr, gray=False)
    keys = dict(tiles=tiles, max_steps=2, eval_interval=1)
    without = train(monkeypatch, flags(**keys, out_dir=tmp_path / "without"))
    bit_equal(weights(without), weights(train(monkeypatch, flags(**keys, image_dir=folder, out_dir=tmp_path / "a"))))
    curve, metrics = rows(tmp_path / "a", "bach.jsonl"), rows(tmp_path / "a")
    assert [row["step"] for row in curve] == [row["step"] for row in metrics] == [0, 1, 2]
    config = {**eval_slides.AS_IN_TRAINING, "image_dir": str(folder), "arch": "tiny", "device": "cpu"}
    images, score = eval_slides.load(config)
    mine = eval_bach.score_file(f"{tmp_path}/a/teacher/2.pth", None, config, torch.stack(images), score)
    for key in ("balanced", "knn", "se_groups", "mean_cosine", "effective_rank"):
        assert metrics[2][key] == curve[2][key] == pytest.approx(mine[key], abs=1e-4), key
    assert metrics[2]["balanced_protocol"] == curve[2]["protocol"] == mine["protocol"]
    assert mine["protocol"].startswith("folder: cls 224 px, 24 images of 6 groups in 3 folds")
    assert "bach" not in curve[2] and "bach" not in metrics[2]
    assert curves.logged([curves.load_run(str(tmp_path / "a"))])[0] == "balanced"
    message = refused(monkeypatch, flags(**keys, image_dir=tmp_path / "none", out_dir=tmp_path / "b"))
    assert message == f"train.py: image_dir={tmp_path}/none: no such folder"
    message = refused(monkeypatch, flags(**keys, image_dir=folder, bach_dir="x", out_dir=tmp_path / "b"))
    assert "a run has one curve" in message


def quick_bach(patch, gray=True):
    """Evaluations with few epochs and, unless told not to, of eight gray images that need no folder."""
    fit, embed = eval_bach.fit_heads, eval_bach.embed
    patch(eval_bach, "fit_heads", lambda *a: fit(*a[:-1], 20))
    patch(eval_bach, "embed", lambda net, pixels, *a: embed(net, pixels[:, :, :56, :56], *a))
    if gray:
        eight = torch.arange(0, 200, 25, dtype=torch.uint8)[:, None, None, None]
        patch(eval_bach, "load_pixels", lambda folder: eight.repeat(50, 3, 224, 224))
        patch(eval_bach, "embed", lambda net, pixels, *a: embed(net, pixels[:8, :, :56, :56], *a).repeat(50, 1))


def poison(patch):
    """The first evaluation meets NaN, the second raises on rank 0 alone, the third has a row that cannot be written."""
    embed, probe, calls = eval_bach.embed, eval_bach.probe, []

    def bad_probe(*a, view):
        if len(calls) == 2:
            raise RuntimeError("no\nmemory")
        return {**probe(*a, view=view), "plateau": np.float32(0)}

    patch(eval_bach, "embed", lambda *a: embed(*a) * (calls.append(0) or (float("nan") if len(calls) == 1 else 1)))
    patch(eval_bach, "probe", bad_probe)


def same_but_for_bach(good, bad):
    """Rows of metrics.jsonl of an evaluated and of a poisoned run: the second has errors where the first has points."""
    untimed = (*MEASURED, "mean_cosine", "effective_rank", "plateau", "clean", "knn")
    a, b = ([{k: v for k, v in r.items() if k not in untimed and "bach" not in k} for r in x] for x in (good, bad))
    assert a == b and len(good) == 4
    for i, error in ((0, "ValueError: features of 400 of 400"), (2, "RuntimeError: no memory"), (3, "TypeError: ")):
        assert good[i]["bach"] > 0 and "bach_error" not in good[i]
        assert bad[i]["bach"] is None and bad[i]["bach_error"].startswith(error)


def test_an_evaluation_that_fails_costs_its_point_and_nothing_else(tiles, tmp_path, monkeypatch, capsys):
    """Nor does one that succeeds change a bit of the training."""
    keys = dict(tiles=tiles, max_steps=3, eval_interval=2)
    without = train(monkeypatch, flags(**keys, out_dir=tmp_path / "without"))
    quick_bach(monkeypatch.setattr)
    good = train(monkeypatch, flags(**keys, bach_dir="x", out_dir=tmp_path / "good"))
    poison(monkeypatch.setattr)
    bad = train(monkeypatch, flags(**keys, bach_dir="x", out_dir=tmp_path / "bad"))
    bit_equal(weights(without), weights(good))
    bit_equal(weights(without), weights(bad))
    same_but_for_bach(rows(tmp_path / "good"), rows(tmp_path / "bad"))
    assert not (tmp_path / "bad/bach.jsonl").exists()
    assert "step 2: no BACH, training continues: RuntimeError: no memory\n" in capsys.readouterr().out
    monkeypatch.setattr(model.ViT, "forward", lambda *a: 1 / 0)  # other ranks would be left in a collective
    with pytest.raises(ZeroDivisionError):
        train(monkeypatch, flags(**keys, bach_dir="x", out_dir=tmp_path / "ended"))
    assert not (tmp_path / "ended/metrics.jsonl").exists()


def test_a_point_whose_forward_ended_the_run_is_passed_over_by_the_resumed_one(tiles, tmp_path, monkeypatch):
    """The bug: an evaluation that fails before the save, at the same step of every resume."""
    keys = dict(tiles=tiles, max_steps=3, eval_interval=2, save_interval=1, bach_dir="x")
    quick_bach(monkeypatch.setattr)
    good = train(monkeypatch, flags(**keys, out_dir=tmp_path / "good"))
    with monkeypatch.context() as patch:
        embed, calls = eval_bach.embed, []
        patch.setattr(eval_bach, "embed", lambda *a: calls.append(1) or (embed(*a) if len(calls) < 2 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    assert [r["step"] for r in rows(tmp_path / "a")] == [0, 1]
    resumed = train(monkeypatch, flags(**keys, out_dir=tmp_path / "a", resume="true"))
    bit_equal(weights(good), weights(resumed))
    assert [(r["step"], r.get("bach_error")) for r in rows(tmp_path / "a")] == [
        (0, None), (1, None), (2, "ZeroDivisionError: division by zero"), (3, None)]
    assert [r["step"] for r in rows(tmp_path / "a", "bach.jsonl")] == [0, 3]


@pytest.mark.parametrize("stated, want", [("half", [[0.5] * 3] * 2), (None, None), ("imagenet", None)])
def test_pixels_are_normalised_as_the_weights_state(stated, want, tiles, tmp_path, monkeypatch):
    """The bug: weights trained at 0.5 that go on at ImageNet's, in silence."""
    vit = model.ViT(model.ARCHS["tiny"])
    torch.save({"teacher": vit.state_dict(), "arch": "tiny", "config": {"norm": stated}}, tmp_path / "w.pth")
    seen, augment = [], data.augment
    monkeypatch.setattr(data, "augment", lambda x, rows, c, *a: seen.append(c["norm"]) or augment(x, rows, c, *a))
    keys = dict(tiles=tiles, max_steps=1, weights=tmp_path / "w.pth")
    train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    assert json.loads(json.dumps(seen[0])) == json.load(open(tmp_path / "a/config.json"))["norm"] == want
    assert model.stored_norm(tmp_path / "a/teacher/1.pth") == model.stored_norm(tmp_path / "w.pth")
    run = train(monkeypatch, flags(**keys | {"max_steps": 0}, norm="imagenet", out_dir=tmp_path / "b"))
    assert run["config"]["norm"] == "imagenet"


def evaluating_rank(argv, poisoned):
    """wandb is there on rank 0 only."""
    run = SimpleNamespace(init=lambda **k: SimpleNamespace(id="1"), define_metric=lambda *a, **k: 0, log=lambda row: 0)
    sys.modules["wandb"] = run if os.environ["RANK"] == "0" else None
    quick_bach(setattr)
    if poisoned:
        poison(setattr)
    train_rank(argv)


def point_with_a_stale_listing(note):
    """curve_point where rank 0 alone sees the note of a forward that failed."""
    dist.init_process_group("gloo")
    return eval_bach.curve_point(None, None, ((), ()), "cpu", note if dist.get_rank() == 0 else f"{note}x", None)


def test_rank_0_says_which_point_is_passed_over(on_ranks, tmp_path):
    """The bug: an older listing on another node, which begins to embed alone."""
    (tmp_path / "note").write_text("OSError: x")
    assert on_ranks(2, point_with_a_stale_listing, str(tmp_path / "note")) == [
        {"bach": None, "bach_error": "OSError: x"}] * 2


@pytest.mark.slow
def test_two_ranks_stay_in_step_when_an_evaluation_fails_on_one(on_ranks, tiles, tmp_path):
    keys = dict(tiles=tiles, max_steps=3, eval_interval=2, bach_dir="x", wandb_project="x")
    for name in ("good", "bad"):
        on_ranks(2, evaluating_rank, flags(**keys, out_dir=tmp_path / name), name == "bad")
    same_but_for_bach(rows(tmp_path / "good"), rows(tmp_path / "bad"))
    bit_equal(*(torch.load(tmp_path / x / "teacher/3.pth", weights_only=True)["teacher"] for x in ("good", "bad")))


def test_the_stall_of_an_evaluation_is_logged_and_speed_leaves_it_out(tiles, tmp_path, monkeypatch):
    """As it leaves out saving. A thousand seconds pass at each of embed, probe and save, by a clock that is set."""
    quick_bach(monkeypatch.setattr)
    late, now = [0], time.time
    monkeypatch.setattr(time, "time", lambda: now() + late[0])
    for owner, name in ((eval_bach, "embed"), (eval_bach, "probe"), (torch.distributed.checkpoint, "async_save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, **k: late.append(late.pop() + 1000) or real(*a, **k))
    keys = dict(tiles=tiles, max_steps=4, eval_interval=2, save_interval=1, log_interval=2, bach_dir="x")
    train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    assert late[0] == 1000 * (3 + 3 + 4)
    assert all(r["images_per_s"] > 0.02 and r["data_wait"] <= 1 for r in rows(tmp_path / "a")[1:]), "4 images, 1000 s"
    for r in rows(tmp_path / "a", "bach.jsonl"):
        assert 1000 <= r["embed_seconds"] < 2000 <= r["seconds"] < 3000


def test_wandb_gets_the_rows_of_metrics_and_a_resumed_run_goes_on_in_its_own(tiles, tmp_path, monkeypatch):
    inits, defined, logged = [], [], []

    def init(**keys):
        inits.append(keys)
        if len(inits) % 2:
            raise RuntimeError("no login")
        return SimpleNamespace(id=keys["id"] or "a1b2")

    fake = SimpleNamespace(init=init, log=logged.append, define_metric=lambda *a, **k: defined.append((a, k)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    quick_bach(monkeypatch.setattr)
    out = tmp_path / "a"
    for keys in (dict(max_steps=3, save_interval=2), dict(max_steps=4, resume="true")):
        argv = flags(tiles=tiles, schedule_steps=4, out_dir=out, bach_dir="x", wandb_project="p", **keys)
        assert "RuntimeError: no login" in refused(monkeypatch, argv)
        train(monkeypatch, argv)  # what wandb refused can be tried again
        if len(inits) == 2:
            assert logged == rows(out) and [r["step"] for r in logged] == [0, 1, 2, 3]
            os.rename(out / "ckpt/3", out / "ckpt/unfinished")
    assert [(k["project"], k["dir"], k["resume"], k["id"]) for k in inits[1::2]] == [
        ("p", str(out), "allow", None), ("p", str(out), "allow", "a1b2")]
    assert inits[1]["config"]["batch_size"] == 4 and defined == [(("*",), {"step_metric": "step"})] * 2
    assert [r["step"] for r in logged[4:]] == [3, 4] and rows(out) == logged[:3] + logged[4:]


class Foreign(Exception):
    """As wandb's own errors, neither an OSError nor a RuntimeError."""


def test_a_row_that_wandb_refuses_ends_all_ranks(tiles, tmp_path, monkeypatch):
    """The bug: rank 0 failed alone, and the others waited for it. What agree raises, it raises on each rank."""
    def refuse(row):
        raise Foreign("no network")

    fake = SimpleNamespace(init=lambda **k: SimpleNamespace(id="1"), log=refuse, define_metric=lambda *a, **k: 0)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = flags(tiles=tiles, max_steps=0, out_dir=tmp_path / "a", wandb_project="p")
    assert refused(monkeypatch, argv).startswith("wandb took no row (Foreign: no network): mend that")


def test_a_run_resumes_without_the_file_that_it_began_from(tiles, tmp_path, monkeypatch):
    """The bug: resuming demanded the weights, of which it needs nothing but their norm."""
    vit = model.ViT(model.ARCHS["tiny"])
    torch.save({"teacher": vit.state_dict(), "arch": "tiny", "config": {"norm": "half"}}, tmp_path / "w.pth")
    argv = flags(tiles=tiles, schedule_steps=4, save_interval=1, max_steps=2, weights=tmp_path / "w.pth")
    straight = train(monkeypatch, [*argv, "--max_steps=3", f"--out_dir={tmp_path}/a"])
    for start in "bc":
        train(monkeypatch, [*argv, f"--out_dir={tmp_path}/{start}"])
    (tmp_path / "w.pth").unlink()
    resume = ["--max_steps=3", "--resume=true"]
    resumed = train(monkeypatch, [*argv, *resume, f"--out_dir={tmp_path}/b"])
    unnamed = train(monkeypatch, [*argv, *resume, f"--out_dir={tmp_path}/c", "--weights="])
    bit_equal(weights(straight), weights(resumed))
    bit_equal(weights(straight), weights(unnamed))
    assert [run["mean"] for run in (straight, resumed, unnamed)] == [(0.5,) * 3] * 3


def test_dry_run_prints_the_cost_of_vit_g_without_data_or_gpu(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    refused(monkeypatch, ["config/vitg_clip3.py", "--dry_run=true"])
    said = capsys.readouterr().out
    for part in ("dinov2_vitg14_reg: 1,134.8 M", "45,792 per rank, 27,297", "248.8 TFLOP", "48 images x 8 ranks",
                 "parameters 0.617, optimizer 1.23, teacher 0.617"):
        assert part in said, said


@pytest.mark.skipif(not SHARED.is_dir(), reason="real slides are not part of the project")
def test_twenty_steps_on_real_slides(tmp_path, monkeypatch):
    """Two slides train; one without an mpp is left out at the start, one without H&E tissue at its first visit."""
    keys = dict(slides=f"{SHARED}/slides/*", mpps="(0.5,1.0)", tile_px=96, max_steps=20, workers=1, log_interval=10)
    run = train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    assert rows(tmp_path / "a")[-1]["step"] == 20 and run["progress"]["bad_steps"] == 0
    left_out = (tmp_path / "a/left_out.csv").read_text().splitlines()
    assert len(left_out) == 3 and "tcga-cr" in left_out[1] and "no usable mpp" in left_out[1]
    assert 'fluorescence.ndpi,"no tissue found' in left_out[2] and not run["bad_tiles"]


def test_what_one_rank_tells_the_others_is_known_to_all_and_told_once(tiles, tmp_path, monkeypatch, capsys):
    run = train(monkeypatch, flags(tiles=tiles, max_steps=0, out_dir=tmp_path / "a"))
    monkeypatch.setattr(rundir, "on_rank_0", lambda what, work: work())

    def gather(everyone, mine):
        other = ["x.png: no image"], ["y.svs: no tissue"], number_of_signals
        everyone[:] = copy.deepcopy(mine), other
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for number_of_signals in (0, 1):
        run["bad_messages"].append("z.png: no image")
        run["useless"].append("y.svs: no tissue")
        assert run["exchange"]() is bool(number_of_signals), "a signal to any rank stops all"
        assert run["bad_messages"] == run["useless"] == []
    assert (tmp_path / "a/left_out.csv").read_text() == "path,reason\ny.svs,no tissue\n"
    said = capsys.readouterr().out
    assert said.count("x.png") == said.count("z.png") == said.count("y.svs") == 1 and len(run["bad_tiles"]) == 2


def test_what_went_wrong_between_two_rows_is_in_the_checkpoint(tiles, tmp_path, monkeypatch):
    """The bug: skipped steps and unreadable tiles that are only counted at log points, lost by a resume."""
    wrong = {"bad": ["x.png: no image"], "left_out": ["y.svs: no tissue"] * 2}
    batch = data.Batches.__getitem__

    def spoilt(self, step):
        out = batch(self, step)
        return out | wrong | dict(mask_weights=out["mask_weights"] * math.nan) if step == 1 else out
    monkeypatch.setattr(data.Batches, "__getitem__", spoilt)
    keys = dict(tiles=tiles, log_interval=100, save_interval=3, max_steps=6)
    straight = train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/ckpt/6")
    resumed = train(monkeypatch, flags(**keys, out_dir=tmp_path / "b", resume="true"))
    for run in (straight, resumed):
        assert run["progress"]["bad_steps"] == run["bad_steps"].item() == 1 and list(run["bad_tiles"]) == ["x.png"]
    bit_equal(weights(straight), weights(resumed))
    assert rows(tmp_path / "b")[-1]["bad_steps"] == rows(tmp_path / "b")[-1]["bad_tiles"] == 1
    assert (tmp_path / "a/left_out.csv").read_text() == "path,reason\ny.svs,no tissue\n", "once, and no bad tile"
