"""The estimate of memory against what a CPU's allocator hands out in real steps of train.py."""
import re

import pytest
import torch
from test_train import ROOT, TINY, flags, train
from torch.profiler import ProfilerActivity, profile

import model
import sharding
from bench import budget, configs, step
from prepare.stats import train_config, train_keys

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
    return held.max().item()


def predicted(**keys):
    config = train_keys() | TINY | dict(arch="small") | keys
    with torch.device("meta"):
        net = model.build(config)
    moments = budget.memory(config, net, 1, config["activation_checkpointing"], 4)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return sum(moments[moment].values()), moment


def compare(name, tiles, tmp_path, monkeypatch, **keys):
    c = FAMILIES[name]
    keys = dict(global_px=8 * c.patch_size, local_px=4 * c.patch_size, batch_size=12) | keys
    monkeypatch.setitem(model.ARCHS, "small", c)
    got = measured(monkeypatch, tmp_path, arch="small", tiles=tiles, **keys)
    want, moment = predicted(**keys)
    print(f"{name} {keys}: measured {got / 1e6:.1f} MB, predicted {want / 1e6:.1f} ({moment}), ratio {got / want:.3f}")
    assert got == pytest.approx(want, rel=0.1)
    return moment


@pytest.mark.parametrize("mode", budget.MODES)
@pytest.mark.parametrize("name, drop", [("v2", 0.0), ("v3", 0.4)] + [
    pytest.param(n, d, marks=pytest.mark.slow) for n, d in (
    ("v2", 0.4), ("v3", 0.0), ("v2_swiglu", 0.0), ("v2_swiglu", 0.4), ("v3_mlp", 0.0), ("v3_mlp", 0.4))])
def test_predictions_are_within_a_tenth_of_what_is_allocated(name, drop, mode, tiles, tmp_path, monkeypatch):
    compare(name, tiles, tmp_path, monkeypatch, drop_path=drop, activation_checkpointing=mode)


@pytest.mark.parametrize("normed", [True, False])
def test_and_where_logits_dominate(normed, tiles, tmp_path, monkeypatch):
    keys = dict(dino_prototypes=30_000, ibot_prototypes=20_000, head_weight_norm=normed)
    assert compare("v2", tiles, tmp_path, monkeypatch, activation_checkpointing="full", **keys) == "losses"


@pytest.mark.parametrize("c", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_block_keeps_what_the_formula_says_to_the_byte(c, drop):
    B, sizes = 10, {}
    config = dict(batch_size=B, global_px=4 * c.patch_size, local_px=2 * c.patch_size, local_crops=2, drop_path=drop)
    vit = model.ViT(model.replace(c, drop_path=drop, pos_grid=4)).train()
    shapes = [(n, N) for n, N, _ in budget.crops(config, c)]
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
    assert sum(n for n, _ in sizes.values()) == budget.block_bytes(config, c, "none", 4)[0]


def planned(*argv, world=8):
    return budget.estimate(train_config([str(ROOT / "config" / argv[0]), *argv[1:]]), world)


def test_the_7b_fits_eight_gpus_of_80_gb_and_what_does_not_fit_is_said():
    config = train_config([str(ROOT / "config/vit7b.py"), "--step_seconds=1"])
    text, warning = budget.report(config, 8, 80.0)
    assert "dinov3_vit7b16: 6,716.0 M parameters" in text and not warning, text
    assert "x 8 ranks = 128" in text and "MFU 41.4%" in text and "fits: about" in text, text
    text, warning = budget.report(config, 1, 80.0)
    assert warning.startswith("does not fit: about ") and text.endswith(warning)
    modes = planned("vitg.py")["by_mode"]
    assert modes["full"] < modes["selective"] < 80 < modes["none"]


def test_more_ranks_hold_less_each_and_a_checkpoint_is_as_large():
    one, eight = (planned("vitg.py", world=n) for n in (1, 8))
    for part, size in (("parameters", 4), ("optimizer", 8), ("teacher", 4)):
        assert one["memory_parts"][part] == pytest.approx(size * 1.2349, rel=1e-3)
        assert eight["memory_parts"][part] == pytest.approx(size * 1.2349 / 8, rel=1e-3)
    assert one["checkpoint_gb"] == eight["checkpoint_gb"] == pytest.approx(16 * 1.2349, rel=1e-3)


def test_a_hybrid_mesh_holds_on_two_nodes_what_one_node_holds(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    flat, hybrid = planned("vit7b.py", world=16), planned("vit7b.py", "--hybrid=True", world=16)
    assert hybrid["by_mode"] == planned("vit7b.py", world=8)["by_mode"] and hybrid["images"] == flat["images"] == 256
    assert hybrid["memory_parts"]["parameters"] == 2 * flat["memory_parts"]["parameters"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert planned("vit7b.py", "--hybrid=True", world=16)["by_mode"] == planned("vit7b.py", world=4)["by_mode"]


def test_a_dry_run_states_the_disk_that_checkpoints_and_exports_take():
    """ViT-g's 55 teachers are 250 GB, and keep_teachers bounds them; the 7B saves every 5,000 of 50,000 steps."""
    found = planned("vitg.py")
    assert (found["checkpoints"], found["teachers"]) == (2, 55)
    assert 55 * found["teacher_gb"] == pytest.approx(250, abs=1)
    assert found["disk_gb"] == pytest.approx(55 * found["teacher_gb"] + 3 * found["checkpoint_gb"])
    text, _ = budget.report(train_config([str(ROOT / "config/vitg.py")]), 8, 80.0)
    assert "disk: 2 checkpoints of 19.8 GB and 55 teachers of 4.54 GB stay; at most 309 GB" in text, text
    found = planned("vitg.py", "--keep_teachers=3", "--keep_every=25_000")
    assert (found["checkpoints"], found["teachers"]) == (2 + 5, 3 + 5), "of 137,500 steps five are multiples"
    assert found["disk_gb"] == pytest.approx(9 * found["teacher_gb"] + 8 * found["checkpoint_gb"])
    kept = planned("vitg.py", "--keep_checkpoints=1")
    assert kept["disk_gb"] == pytest.approx(55 * kept["teacher_gb"] + 2 * kept["checkpoint_gb"])
    assert planned("vit7b.py")["teachers"] == 10 and planned("vit7b.py", "--save_interval=0")["teachers"] == 1


def test_the_table_of_modes_is_what_the_estimate_says():
    row = r"^\| (\w+\.py), (\d+) images.* \| ([\d.]+), (\d+) more if full" + 3 * r" \| ([^|]*)" + r" \| ([\d.]+) GB"
    table = re.findall(row, (ROOT / "docs/memory.md").read_text(), re.M)
    assert len(table) == 3
    for name, images, tflop, more, *modes, saved in table:
        found = planned(name)
        assert found["images"] == 8 * int(images) and f"{found['checkpoint_gb']:.3g}" == saved
        assert f"{found['tflop']:.4g}" == tflop and f"{found['cost']['student'] / 3:.0f}" == more
        assert [f"{found['by_mode'][m]:.3g}" for m in budget.MODES] == [m.strip(" *") for m in modes], found["by_mode"]
        assert f"**{found['memory_gb']:.3g}**" in modes


def test_every_measurement_is_in_the_file_at_once_and_the_table_is_made_of_it(tmp_path, monkeypatch, capsys):
    """What fails is a row with its reason. Runs of train.py write no weights."""
    def augment(*args):
        raise RuntimeError("CUDA out of memory.\nMore lines.")
    case = "vitg bf16, eager"
    path = tmp_path / "new" / "step.jsonl"
    for name, value in dict(device="cpu", steps=2, out=str(path), TRAIN={case: step.TRAIN[case]}).items():
        monkeypatch.setattr(step, name, value)
    monkeypatch.setattr(step, "SCRIPT", step.SCRIPT + "raise OSError('no space left')")  # after its last row
    monkeypatch.setattr(step.data, "augment", augment)
    step.main(tmp_path)
    found = step.read(path)
    assert list(found) == ["machine", *step.UNITS, case] and capsys.readouterr().out.endswith(step.table(found) + "\n")
    assert found.pop("augment") == {"row": "augment", "why": "RuntimeError: CUDA out of memory."}
    assert all(row["value"] > 0 for name, row in found.items() if name != "machine")
    assert not list((tmp_path / "run").rglob("ckpt/*/*")) and not (tmp_path / "run/teacher").exists()
    for script, left, why in (("raise OSError('no space left')", 60, "OSError: no space left"),
                              ("import time; print('begun', flush=True); time.sleep(60)", 0, "no time left, 0 s were"),
                              ("raise MemoryError('torch.OutOfMemoryError: CUDA')", 60, "out of memory")):
        monkeypatch.setattr(step, "SCRIPT", script)
        assert step.train(case, tmp_path, left)["why"] == why


def test_the_table_of_steps_has_goals_beside_figures_and_documents_what_was_measured():
    rows = {name: {"value": 2.0} for name in step.UNITS} | {"machine": dict(gpu="H0", torch="2.11", commit="abc")}
    rows |= {"vitg bf16": {"value": 400.0, "tflop": 0.4, "peak_gb": 70.04}, "vitg fp8": {"why": "out of memory"}}
    lines = step.table(rows).splitlines()
    assert lines[0] == "H0, torch 2.11, commit abc:"
    assert "| augment | 2 ms | <= 5 ms |  |  |  |" in lines and "| vitg fp8 | out of memory |  |  |  |  |" in lines
    assert "| vitg bf16 | 400 ms | <= 450 ms | 50 % | 70.0 |  |" in lines
    assert "| plain losses over losses | 1.00 x | >= 2.50 x | | | |" in lines
    text = (ROOT / "docs/memory.md").read_text()
    assert configs.fill(text, "docs") == text, "run python bench/configs.py"


def test_the_cases_are_command_lines_that_train_py_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in step.TRAIN:
        config = train_config(step.command_line(step.TRAIN[name], "folder"))
        assert (config["fp8"] == "on") == ("fp8" in name) and config["compile"] == ("eager" not in name)
        assert config["batch_size"] == dict(vitg=48, vithplus=56, vit7b=16)[name.split()[0]]
        assert not config["weights"] and config["tiles"] == "folder/tiles"
