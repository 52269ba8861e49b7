"""The dry run's memory against what a CPU's allocator hands out in real steps of train.py, and what it refuses."""
import contextlib
import io
import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from test_train import ROOT, TINY, flags, tiles, train  # noqa: F401 (tiles is a fixture)
from torch.profiler import ProfilerActivity, profile

import data
import model
import sharding
from bench import budget

V2 = model.ViTConfig(14, 96, 6, 3, "mlp", 384, 4, layerscale=1.0)
V3 = model.ViTConfig(16, 96, 6, 3, "swiglu", 256, 4, "rope", qkv_bias=False, local_cls_norm=True, layerscale=1.0)
FAMILIES = {"v2": V2, "v2_swiglu": model.replace(V2, ffn="swiglu", ffn_hidden=256), "v3": V3,
            "v3_mlp": model.replace(V3, ffn="mlp", qkv_bias=True, mask_k_bias=True)}


class Enough(Exception):
    pass


def measured(monkeypatch, tmp_path, **keys):
    """Peak bytes of the second step, by the events of PyTorch's allocator."""
    steps, average = [], sharding.update_ema

    def after_a_step(*args):
        average(*args)
        steps.append(0)
        if len(steps) == 2:
            raise Enough
    monkeypatch.setattr(sharding, "update_ema", after_a_step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, pytest.raises(Enough):
        train(monkeypatch, flags(**keys, out_dir=tmp_path / "run", max_steps=10))
    monkeypatch.setattr(sharding, "update_ema", average)
    events = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    held = torch.tensor([size for _, size in events]).cumsum(0)
    bach = 400 * 3 * 224 * 224  # the probe's pixels, which lie on the host
    return held.max().item() - bach


def predicted(c, **keys):
    k = data.train_keys() | {k: v for k, v in TINY.items() if k != "arch"} | keys
    c = model.replace(c, pos_grid=k["global_px"] // c.patch_size, drop_path=k["drop_path"])
    with torch.device("meta"):
        heads = {f"{h}_head": model.DINOHead(c.embed_dim, k[f"{h}_prototypes"], k[f"{h}_hidden"], k[f"{h}_bottleneck"],
                                             weight_norm=k["head_weight_norm"]) for h in ("dino", "ibot")}
        net = torch.nn.ModuleDict({"backbone": model.ViT(c), **heads})
    name, parts = budget.fullest(k, c, net, 1, 4)
    return sum(parts.values()), name


def compare(name, tiles, tmp_path, monkeypatch, **keys):  # noqa: F811
    c = FAMILIES[name]
    keys = dict(global_px=8 * c.patch_size, local_px=4 * c.patch_size, batch_size=12) | keys
    monkeypatch.setitem(model.ARCHS, "small", c)
    got = measured(monkeypatch, tmp_path, arch="small", tiles=tiles, **keys)
    want, moment = predicted(c, **keys)
    print(f"{name} {keys}: measured {got / 1e6:.1f} MB, predicted {want / 1e6:.1f} ({moment}), ratio {got / want:.3f}")
    assert got == pytest.approx(want, rel=0.1)
    return moment


@pytest.mark.parametrize("mode", budget.MODES)
@pytest.mark.parametrize("name, drop", [("v2", 0.0), ("v3", 0.4)] + [
    pytest.param(n, d, marks=pytest.mark.slow) for n, d in (
    ("v2", 0.4), ("v3", 0.0), ("v2_swiglu", 0.0), ("v2_swiglu", 0.4), ("v3_mlp", 0.0), ("v3_mlp", 0.4))])
def test_predictions_are_within_a_tenth_of_what_is_allocated(name, drop, mode, tiles, tmp_path, monkeypatch):  # noqa: F811
    compare(name, tiles, tmp_path, monkeypatch, drop_path=drop, activation_checkpointing=mode)


@pytest.mark.parametrize("normed", [True, False])
def test_and_where_logits_dominate(normed, tiles, tmp_path, monkeypatch):  # noqa: F811
    keys = dict(dino_prototypes=30_000, ibot_prototypes=20_000, head_weight_norm=normed)
    moment = compare("v2", tiles, tmp_path, monkeypatch, activation_checkpointing="full", **keys)
    assert moment.endswith(("loss", "head"))


@pytest.mark.parametrize("c", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_block_keeps_what_the_formula_says_to_the_byte(c, drop):
    B, sizes = 10, {}
    k = dict(batch_size=B, global_px=4 * c.patch_size, local_px=2 * c.patch_size, local_crops=2, drop_path=drop)
    k["fp8"] = "off"
    vit = model.ViT(model.replace(c, drop_path=drop, pos_grid=4)).train()
    shapes = [(n, N) for n, N, _ in budget.crops(k, c)]
    x = torch.randn(sum(n * N for n, N in shapes), c.embed_dim, requires_grad=True)
    ropes = [vit.rope_embed(g, g) for g in (4, 2)] if c.pos == "rope" else [None] * 2
    kept = [model.draw_kept(shapes, drop, "cpu") if drop else None for _ in range(2)]
    given = {t.untyped_storage()._cdata for t in [*(t for _, t in model.named_tensors(vit)),
                                                  *(t for r in ropes if r for t in r)]}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in given:
            sizes[storage._cdata] = storage.nbytes(), t  # alive: another storage must not come by the same key
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        vit.blocks[0](x, shapes, ropes, kept)
    assert sum(n for n, _ in sizes.values()) == budget.block(k, c, 4, "none")[0]


def dry_run(*argv):
    """train.py's, in this process: a new one spends its seconds on importing torch. As subprocess.run returns."""
    out, before, code = io.StringIO(), sys.argv, None
    sys.argv = ["train.py", *(str(ROOT / a) if a.endswith(".py") else a for a in argv), "--dry_run=true"]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=int(code is not None), stdout=out.getvalue(), stderr=f"{code}\n" if code else "")


def test_the_7b_fits_eight_gpus_of_80_gb_and_vit_g_is_told_how():
    done = dry_run("config/vit7b.py", "--world_size=8", "--gpu_memory_gb=80", "--step_seconds=1")
    assert done.returncode == 0 and "dinov3_vit7b16: 6,716.0 M parameters" in done.stdout, done.stdout + done.stderr
    assert "left for fragments" in done.stdout and "x 8 ranks = 128" in done.stdout and "MFU 41.4%" in done.stdout
    for argv, hint in (
            (["--activation_checkpointing=none"], "--activation_checkpointing=selective needs"),
            (["--gpu_memory_gb=40"], "--activation_checkpointing=full needs"),
            (["--gpu_memory_gb=12"], "--activation_checkpointing=full --batch_size=")):
        done = dry_run("config/vitg.py", "--world_size=8", "--gpu_memory_gb=80", *argv)
        assert done.returncode == 1 and done.stderr.startswith("train.py: does not fit: ") and hint in done.stderr, hint
        assert done.stderr.count("\n") == 1 and "total " in done.stdout
    done = dry_run("config/vit7b.py", "--world_size=1", "--gpu_memory_gb=80")
    assert done.returncode == 1 and "ranks with --activation_checkpointing=full do" in done.stderr, done.stderr


def test_a_dry_run_of_ranks_that_are_not_there_shards_over_them():
    one, eight = (dry_run("config/vitg.py", f"--world_size={n}", "--gpu_memory_gb=200").stdout for n in (1, 8))
    assert "parameters 4.94, optimizer 9.88, teacher 4.94" in one and "parameters 0.619, optimizer 1.24" in eight
    assert json.loads(eight.split("checkpoint: ")[1].split(" GB")[0]) == pytest.approx(16 * 1.2349, rel=0.01)


@pytest.mark.slow
def test_the_table_of_modes_is_what_the_dry_run_says():
    row = r"^\| (\w+\.py), (\d+) images.* \| ([\d.]+), (\d+) more if full" + 3 * r" \| ([^|]*)" + r" \| ([\d.]+) GB"
    table = re.findall(row, (ROOT / "docs/memory.md").read_text(), re.M)
    assert len(table) == 3
    for config, images, tflop, more, *modes, saved in table:
        said = dry_run(f"config/{config}", "--world_size=8", "--activation_checkpointing=full").stdout
        for part in (f"batch: {images} images x 8", f"compute: {tflop} TFLOP", f"checkpoint: {saved} GB"):
            assert part in said, (part, said)
        assert f"{float(more):.0f}" == f"{float(re.search(r'; ([0-9.]+) more', said)[1]):.0f}"
        none, selective, full = (m.strip(" *") for m in modes)
        assert f"none {none}   selective {selective}   full {full}" in said, said
        chosen = re.search(r"^total ([\d.]+)", dry_run(f"config/{config}", "--world_size=8").stdout, re.M)[1]
        assert f"**{chosen}**" in modes, (chosen, modes)
