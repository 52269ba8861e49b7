"""Tiny weight files in every layout that load_backbone reads. For Hugging Face's, transformers is the reference."""
import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from test_train import bit_equal

import model
from model import ARCHS, ViT, ViTConfig

V2 = ViTConfig(14, 128, 2, 2, "mlp", 192, pos_grid=4, pos_antialias=False, pos_offset=0.1)  # heads of 64, as in Meta's
V3 = ViTConfig(16, 128, 2, 2, "mlp", 192, 4, "rope", mask_k_bias=True, norm_eps=1e-5)
RELEASED = {
    "dinov2_s": V2, "dinov2_g": replace(V2, ffn="swiglu"),
    "dinov2_s_reg": replace(V2, registers=4, pos_antialias=True, pos_offset=0.0),
    "dinov2_g_reg": replace(V2, ffn="swiglu", registers=4, pos_antialias=True, pos_offset=0.0),
    "dinov3_s": V3, "dinov3_hplus": replace(V3, ffn="swiglu"),
    "dinov3_7b": replace(V3, ffn="swiglu", num_heads=1, qkv_bias=False, local_cls_norm=True)}
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=56, patch_size=14)
SMALL3 = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, image_size=64,
              num_register_tokens=4)
GATED = dict(use_gated_mlp=True, hidden_act="silu")
HUGGING_FACE = {
    "dinov2": ("Dinov2", SMALL), "midnight": ("Dinov2", {**SMALL, "use_swiglu_ffn": True, "image_size": 224}),
    "dinov2_reg": ("Dinov2WithRegisters", {**SMALL, "layer_norm_eps": 1e-2}),  # far from the default, so that it shows
    "dinov2_reg_0": ("Dinov2WithRegisters", {**SMALL, "num_register_tokens": 0}),  # another antialias than Dinov2's
    "dinov2_reg_g": ("Dinov2WithRegisters", {**SMALL, "use_swiglu_ffn": True}), "dinov3_s": ("DINOv3ViT", SMALL3),
    "dinov3_hplus": ("DINOv3ViT", {**SMALL3, **GATED, "rope_theta": 50.0, "layer_norm_eps": 1e-2}),
    "dinov3_7b": ("DINOv3ViT", {**SMALL3, **GATED, "num_attention_heads": 1, "query_bias": False, "value_bias": False})}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Meta's files tell no heads, so the tiny ones need a model of their width and MLP in ARCHS, as real ones have."""
    for ffn in ("mlp", "swiglu"):
        monkeypatch.setitem(ARCHS, f"small_{ffn}", replace(V2, ffn=ffn, depth=99))


@torch.no_grad()
def fill(net, seed=0):
    """Random weights with which every tensor shows in the outputs: no zeros, layer-scale and norms around 1."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        around = 1.0 if re.search(r"norm\w*\.weight|gamma|lambda1", name) else 0.0
        p.normal_(around, 0.2 if around or p.dim() < 2 or "embed" in name or "token" in name else 0.1)
    return net.eval()


def released(config):
    vit = fill(ViT(config))
    for k, v in vit.state_dict().items():
        if config.pos == "rope" and k.endswith(("qkv.bias", "bias_mask")):
            v.zero_()  # as in every file of Meta's below 7B
    return vit


def save(path, data):
    torch.save(data, path)
    return str(path)


def same(a, b, px=(70, 56), atol=1e-6):
    x = torch.randn(2, 3, *(px if a.arch.patch_size == 14 else (80, 64)))
    with torch.no_grad():
        for k, v in b(x).items():
            torch.testing.assert_close(a.eval()(x)[k], v, atol=atol, rtol=1e-5)


# ---- .pth -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, without", [*((name, "") for name in RELEASED), *(
    (name, "mask_token") for name in ("dinov2_g", "dinov2_s_reg", "dinov3_s"))])  # which only training needs
def test_metas_files_load_without_being_told_the_architecture(name, without, tmp_path):
    vit = released(RELEASED[name])
    path = save(tmp_path / "w.pth", {k: v for k, v in vit.state_dict().items() if k != without})
    loaded = model.load_backbone(path)
    assert replace(loaded.arch, pos_grid=0) == replace(vit.arch, pos_grid=0)
    same(loaded, vit)
    assert loaded.mask_token.any() == (not without)
    assert without or model.stored_norm(path) == model.NORMS["imagenet"]


@pytest.mark.parametrize("without", [(), ("mask_token",)])  # then its names may be timm's as well
def test_heads_that_nothing_tells_are_asked_for_and_not_guessed(without, tmp_path):
    vit = released(replace(V2, embed_dim=320, num_heads=4, registers=4))
    path = save(tmp_path / "w.pth", {k: v for k, v in vit.state_dict().items() if k not in without})
    with one_line(r"w\.pth: .* heads.* state arch="):
        model.load_backbone(path)
    assert model.load_backbone(path, vit.arch).arch.num_heads == 4


@pytest.mark.parametrize("key", ["pos_embed", "norm.bias", "blocks.1.ls2.gamma", "rope_embed.periods",
                                 "local_cls_norm.bias", "blocks.1.mlp.w12.bias", "blocks.0.attn.qkv.bias"])
def test_a_released_file_that_lacks_a_tensor_is_refused_by_its_name(key, tmp_path):
    for config in RELEASED.values():
        state = released(config).state_dict()
        if key in state:
            path = save(tmp_path / "w.pth", {k: v for k, v in state.items() if k != key})
            with one_line(rf"w\.pth: .*{re.escape(key)}"):
                model.load_backbone(path)


def test_a_teacher_of_this_project_brings_its_architecture_and_normalisation(tmp_path):
    vit = fill(ViT(ARCHS["toy"]))
    deeper = save(tmp_path / "4.pth", {"teacher": vit.state_dict(), "arch": None, "config": {"norm": "half"}})
    assert model.stored_norm(deeper) == model.NORMS["half"] and model.read_header(deeper)["arch"] is None
    for config, norm in (({"norm": "half"}, model.NORMS["half"]), ({}, model.NORMS["imagenet"]),
                         ({"norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6]},
                          ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))):
        path = save(tmp_path / "5.pth", {"teacher": vit.state_dict(), "arch": "toy", "step": 5, "config": config})
        assert model.stored_norm(path) == norm
    loaded = model.load_backbone(path)
    assert loaded.arch == vit.arch
    same(loaded, vit)
    offset = save(tmp_path / "6.pth", {"teacher": vit.state_dict(), "arch": "toy", "config": {"pos_interp": "offset"}})
    assert model.load_backbone(offset).arch == replace(vit.arch, **model.POS_INTERP["offset"])
    with pytest.raises(ValueError, match="5.pth.*of pixels from 0 to 1"):
        model.stored_norm(save(tmp_path / "5.pth", {"teacher": {}, "config": {"norm": "imagnet"}}))


def test_openmidnights_teacher_loads_with_chunked_blocks_and_16x16_positions(tmp_path):
    """The bug: blocks of other chunks are missed, or the released table is taken for one of 518 px."""
    vit = fill(ViT(replace(RELEASED["dinov2_g_reg"], depth=4, pos_grid=16)))
    state = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v
             for k, v in vit.state_dict().items()}
    assert "blocks.1.3.mlp.w12.weight" in state
    heads = {f"{h}_head.last_layer.weight_v": torch.zeros(2, 2) for h in ("dino", "ibot")}
    path = save(tmp_path / "w.pth", {"teacher": {f"backbone.{k}": v for k, v in state.items()} | heads})
    loaded = model.load_backbone(path)
    assert loaded.arch == vit.arch and loaded.pos_embed.shape == (1, 257, 128)
    same(loaded, vit, (224, 224))
    assert model.stored_norm(path) == model.NORMS["imagenet"]


WRAPPED = {  # what training leaves around a backbone: where it is, what stands before its names, what is beside it
    "state_dict": ("state_dict", "module."), "compiled": ("model", "_orig_mod."), "lightning": ("state_dict", "model."),
    "dinov3": ("", "model.teacher.backbone."), "ddp": ("teacher", "module.backbone._orig_mod.")}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_training_wraps_a_backbone_in_is_taken_off_by_name(name, tmp_path):
    (key, prefix), vit = WRAPPED[name], released(RELEASED["dinov2_g_reg"])
    data = {f"{prefix}{re.sub('^blocks.1', 'blocks.1._orig_mod', k)}": v for k, v in vit.state_dict().items()}
    if "backbone" in prefix:
        data[f"{prefix.replace('backbone', 'dino_head')}last_layer.weight"] = torch.ones(2)
    if "teacher" in prefix:
        data |= {k.replace("teacher", "student"): v * 2 for k, v in data.items()}
    about = {"arch": "vit_giant", "epoch": 3} if key in ("state_dict", "model") else {}  # not one of our names
    same(model.load_backbone(save(tmp_path / "w.bin", {key: data} | about if key else data)), vit)


def test_a_bare_dinov3_file_with_a_live_bias_loads_as_its_wrapped_form_does(tmp_path):
    vit = fill(ViT(V3))
    assert vit.blocks[0].attn.qkv.bias_mask.any()
    for data in (vit.state_dict(), {"teacher": vit.state_dict()}):
        same(model.load_backbone(save(tmp_path / "w.pth", data)), vit)


def test_what_does_not_fit_says_what_it_looks_like(tmp_path):
    state = fill(ViT(ARCHS["toy"])).state_dict()
    with one_line(r"norm\.bias is missing, not \(128,\); it looks like toy; state another"):
        model.load_backbone(save(tmp_path / "w.pth", {k: v for k, v in state.items() if k != "norm.bias"}))
    with one_line(r"another architecture: .* is \(128,\), not \(1536,\)"):
        model.load_backbone(save(tmp_path / "w.pth", state), "dinov2_vitg14_reg")
    state = released(V2).state_dict() | {"norm_pre.weight": torch.ones(128)}
    with one_line(r"norm_pre.weight is .* no model in model.ARCHS \(embed_dim 128, ffn mlp, ffn_hidden 192, depth 2"):
        model.load_backbone(save(tmp_path / "w.pth", state))


# ---- files as people have them --------------------------------------------------------------------------------------

RAW_AND_AVERAGED = {  # where the raw weights are, and where those that the file calls a teacher or an average
    "keys": ("model/", "model_ema/"), "prefixes": ("model.", "ema."), "bare": ("", "teacher."),
    "dino": ("student/backbone.", "teacher/backbone."), "ddp": ("student/module.backbone.", "teacher/backbone."),
    "ema_encoder": ("encoder.", "ema_encoder."), "i_jepa": ("encoder/module.", "target_encoder/module."),
    "moco": ("base_encoder.", "momentum_encoder."), "timm": ("state_dict/", "state_dict_ema/"),
    "basicsr": ("params/", "params_ema/"), "lightning": ("state_dict/student.", "state_dict/teacher."),
    "dinov3": ("ssl_model.student.backbone.", "ssl_model.teacher.backbone."),
    "gram": ("model.gram_teacher.", "model.teacher."),
    "mmengine": ("ema_state_dict/module.backbone.", "state_dict/backbone.")}  # it swaps the two when it saves


def nested(tensors):
    """A file's dictionary from names in which / separates its keys."""
    data = {}
    for name, t in tensors.items():
        *keys, last = name.split("/")
        inner = data
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = t
    return data


@pytest.mark.parametrize("name", RAW_AND_AVERAGED)
def test_of_raw_and_averaged_weights_the_averaged_are_taken_and_named_or_both_are_refused(name, tmp_path):
    (raw, averaged), vit = RAW_AND_AVERAGED[name], released(V2)
    state = vit.state_dict()
    data = nested({f"{averaged}{k}": t for k, t in state.items()} | {f"{raw}{k}": t * 2 for k, t in state.items()})
    if name == "mmengine":
        with one_line("several backbones, and no name tells .*: those of .*cls_token, .*cls_token; save one"):
            model.load_backbone(save(tmp_path / "w.pth", data | {"message_hub": {}}))
        return
    with pytest.warns(UserWarning, match=rf"of {averaged}cls_token is taken, and not that of {raw}cls_token$"):
        same(model.load_backbone(save(tmp_path / "w.pth", data)), vit)


@pytest.mark.parametrize("beside", [{"ema": {"shadow": [torch.ones(2, 2)]}}, {"ema_cls_token": torch.ones(1, 1, 2)}])
def test_averages_that_have_no_names_of_a_backbone_are_said_to_be_left(beside, tmp_path):
    vit = released(V2)
    with pytest.warns(UserWarning, match="of model/cls_token is taken, and not that of (ema/shadow/0|ema_cls_token)"):
        same(model.load_backbone(save(tmp_path / "w.pth", {"model": vit.state_dict(), **beside})), vit)


@pytest.mark.parametrize("roots", [("backbone.", "encoder."), ("model/", "net/"), ("teacher.", "model_ema."),
                                   ("student.", "gram_teacher.")])
def test_several_backbones_are_refused_unless_they_are_one(roots, tmp_path):
    """DINOv3 saves its teacher twice. Beside a distilled model's average, the teacher is another network."""
    vit = released(V2)
    data = {f"{root}{k}": t for k, t in vit.state_dict().items() for root in roots}
    path = save(tmp_path / "w.pth", nested(data))
    if "student." in roots:
        with one_line("its class token is called student.cls_token, so it is a part of some other model"):
            model.load_backbone(path)
    else:
        same(model.load_backbone(path), vit)
    save(path, nested(data | {f"{roots[1]}norm.bias": torch.ones(128)}))
    with one_line(f"several backbones.* those of {roots[0]}cls_token, {roots[1]}cls_token; save one alone"):
        model.load_backbone(path)


def test_one_tensor_under_two_spellings_is_refused(tmp_path):
    state = released(V2).state_dict()
    for twice in ("module.norm.bias", "blocks.0.0.norm1.bias"):
        with one_line("w.pth: holds (norm|blocks.0.norm1).bias twice"):
            model.load_backbone(save(tmp_path / "w.pth", state | {twice: torch.ones(128)}))


@pytest.mark.parametrize("prefix", ["_fsdp_wrapped_module.", "teacher._fsdp_wrapped_module.backbone.", "net.", ""])
def test_heads_counters_and_wrappers_of_blocks_are_left_out(prefix, tmp_path):
    vit = released(RELEASED["dinov2_g_reg"])
    state = {re.sub(r"^blocks\.1", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module", k): v
             for k, v in vit.state_dict().items()}
    state |= {f"{head}.weight": torch.ones(2) for head in ("head", "dino_head.mlp.0", "ibot_head", "linear_head")}
    data = {f"{prefix}{k}": v for k, v in state.items()} | {"n_averaged": torch.tensor(3)}
    same(model.load_backbone(save(tmp_path / "w.pth", {**data, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
                                                       "config": "lr: 1", "args": argparse.Namespace(lr=1)})), vit)


@pytest.mark.parametrize("header", [{"arch": {"name": "vit_l"}}, {"arch": ["vit"]}, {"config": "lr: 1"}, {"config": 3}])
def test_what_others_call_arch_and_config_is_not_our_header(header, tmp_path):
    vit = released(V2)
    path = save(tmp_path / "w.pth", {"teacher": vit.state_dict(), **header})
    same(model.load_backbone(path), vit)
    assert model.stored_norm(path) == model.NORMS["imagenet"] and not model.read_header(path)


def test_a_students_file_and_one_without_a_backbone_say_what_they_hold(tmp_path):
    state = released(V2).state_dict()
    parts = {prefix: {f"{prefix}{k}": v for k, v in state.items()} for prefix in ("visual.trunk.", "student.backbone.")}
    of_blocks = {part: {k: v for k, v in state.items() if part not in k} for part in ("blocks", ".mlp.")}
    for data, text in (({"student": state}, r"class token is called student/cls_token, .* or a student alone; save"),
                       *((part, f"its class token is called {prefix}cls_token") for prefix, part in parts.items()),
                       *((left, "no DINOv2") for left in of_blocks.values()),
                       ({1: state["norm.bias"]}, "no DINOv2"), ({"teacher": 3}, "no DINOv2"),
                       ({"teacher": state, "arch": "nonsense"}, "nonsense"),
                       ({"linear.weight": state["norm.bias"]}, "no DINOv2 .* it holds linear.weight"),
                       ({"epoch": 3, "args": {}}, "it holds no tensors, but epoch, args"),
                       ((state, 3), "holds a tuple and no dictionary of tensors; save the state dict alone"),
                       (state["norm.bias"], "holds a Tensor and no dictionary")):
        with one_line(rf"w\.pth: .*{text}"):
            model.load_backbone(save(tmp_path / "w.pth", data))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_points_load_as_fp32_and_quantised_weights_are_refused(dtype, tmp_path):
    vit = released(V2)
    state = {k: v.to(dtype) for k, v in vit.state_dict().items()}
    loaded = model.load_backbone(save(tmp_path / "w.pth", state)).state_dict()
    bit_equal(loaded, {k: v.float() for k, v in state.items()})
    name, t = "blocks.0.mlp.fc1.weight", vit.blocks[0].mlp.fc1.weight.detach()
    for other in (torch.int8, torch.float8_e4m3fn):
        with one_line(f"w.pth: {name} is {other}, .*quantised"):
            model.load_backbone(save(tmp_path / "w.pth", state | {name: t.to(other)}))


def test_numbers_that_are_not_finite_are_counted_and_the_first_is_named(tmp_path):
    state = released(V2).state_dict()
    for key, value in (("blocks.1.norm1.bias", float("nan")), ("norm.weight", -float("inf"))):
        state[key][5] = value
    for data in (state, {k: v.half() for k, v in state.items()}):
        with one_line("w.pth: 2 of [0-9]+ tensors hold NaN or inf, the first is blocks.1.norm1.bias; .* earlier"):
            model.first_weights(save(tmp_path / "w.pth", {"model": data}), V2)


def test_what_one_rank_of_several_saves_is_refused(tmp_path, monkeypatch):
    tensor = pytest.importorskip("torch.distributed.tensor")
    for key, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(key, value)
    state = released(V2).state_dict()
    name = "patch_embed.proj.weight"
    parts = {name: state[name].flatten()[:5], "norm.bias": state["norm.bias"].to("meta")}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = tensor.distribute_tensor(state["norm.weight"], mesh, [tensor.Shard(0)])
        path = save(tmp_path / "dtensor.pth", state | {"norm.weight": sharded})
    finally:
        torch.distributed.destroy_process_group()
    with one_line(r"dtensor.pth: norm.weight is no whole tensor but DTensor \(128,\), .* gather the model first"):
        model.load_backbone(path)
    for name, part in parts.items():
        with one_line(f"w.pth: {name} is no whole tensor .* gather the model first"):
            model.load_backbone(save(tmp_path / "w.pth", state | {name: part}))


def legacy(path, data):
    torch.save(data, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_the_first_bytes_tell_what_a_file_is_and_not_its_name(tmp_path, monkeypatch):
    st = pytest.importorskip("safetensors.torch")
    vit = released(V2)
    state = {k: v.detach() for k, v in vit.state_dict().items()}
    st.save_file(state, tmp_path / "a.pth")
    save(tmp_path / "b.safetensors", {"state_dict": {f"teacher.{k}": v for k, v in state.items()}})
    legacy(tmp_path / "c.ckpt", state)
    with monkeypatch.context() as patch:  # tensors that a GPU saved
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        save(tmp_path / "d.pt", state)
    for name in ("a.pth", "b.safetensors", "c.ckpt", "d.pt"):
        same(model.load_backbone(tmp_path / name), vit)


def unlike_weights(folder):
    """{name: (bytes, what is said of them)}"""
    state = {"norm.bias": torch.ones(2000)}
    whole = Path(save(folder / "whole", state)).read_bytes()
    old = legacy(folder / "old", state)
    module = Path(save(folder / "module", torch.nn.Linear(2, 2))).read_bytes()
    scalar = Path(save(folder / "scalar", {"model": state, "best": np.float64(3)})).read_bytes()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), folder / "script")
    return {"empty.pth": (b"", "as it is empty; fetch it again"),
            "lfs.bin": (b"version https://git-lfs.github.com/spec/v1\n", "as it is git LFS's pointer to it: run git"),
            "page.pth": (b"\n<!DOCTYPE html><html>", "as it is a web page: the site may ask for a login"),
            "cut.pth": (whole[:-60], "as it is cut short; fetch it again"),
            "cut_old.pth": (old[:-60], "not a whole file of plain tensors: fetch it again"),
            "model.safetensors.index.json": (b'{"metadata": {"total_size": 1}}', "own file or folder"),
            "w.pth.gz": (b"\x1f\x8b\x08\x00junk", r"as it begins with b'\\x1f\\x8b"),
            "module.pth": (module, "it holds torch.nn.modules.linear.Linear; .*weights_only=False.* state_dict"),
            "scalar.ckpt": (scalar, "it holds numpy.*scalar; .*weights_only=False"),
            "script.pt": ((folder / "script").read_bytes(), "not a whole file of plain tensors: .*TorchScript")}


@pytest.mark.filterwarnings("ignore")  # torch's, of the archive that holds a script
def test_files_that_are_no_weights_say_what_they_are_and_the_remedy(tmp_path):
    for name, (data, text) in unlike_weights(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        for read in (model.load_backbone, model.read_header):
            with one_line(rf"{name}: .*{text}"):
                read(tmp_path / name)


def test_of_a_folder_the_models_own_files_are_read(tmp_path):
    vit = released(V2)
    state, folder = vit.state_dict(), tmp_path / "folder"
    for name in ("model_ema.bin", "pytorch_model.fp16.bin", "optimizer.bin"):
        folder.mkdir(exist_ok=True)
        save(folder / name, {k: v * 2 for k, v in state.items()})
    with one_line("a folder without model.safetensors and pytorch_model.bin; it holds model_ema.bin, .*give the"):
        model.load_backbone(folder)
    for i in (1, 2):
        save(folder / f"pytorch_model-0000{i}-of-00002.bin", dict(list(state.items())[i - 1 :: 2]))
    for path in (folder, folder / "pytorch_model-00001-of-00002.bin"):
        same(model.load_backbone(path), vit)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with one_line("00001-of-00002.bin: 1 of 2 shards are missing, the first is pytorch_model-00002-of-00002.bin; f"):
        model.load_backbone(folder / "pytorch_model-00001-of-00002.bin")


def test_the_position_table_tells_the_image_size(tmp_path):
    vit = released(replace(V2, patch_size=16, pos_grid=14))
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_args": {"img_size": 518}}))
    loaded = model.load_backbone(save(folder / "w.pth", vit.state_dict()))
    assert loaded.arch.pos_grid == 14
    same(loaded, vit)


# ---- Hugging Face, with transformers --------------------------------------------------------------------------------

def theirs(name, folder, shard="50GB"):
    """A random model of transformers, saved in `folder`, under the names that the hub's files have."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    transformers.logging.set_verbosity_error()
    family, settings = HUGGING_FACE[name]
    net = fill(getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings)))
    net.save_pretrained(folder, max_shard_size=shard)
    return net


def equal_to(net, vit, px, rounded=True):
    """Largest difference to transformers' class token and patches, whose periods are rounded as in Meta's files."""
    rope = getattr(net, "rope_embeddings", None)
    if rope is not None and rounded:
        rope.inv_freq = 1 / (1 / rope.inv_freq).bfloat16().float()
    x, out = torch.randn(2, 3, *px), None
    with torch.no_grad():
        hidden, out = net(x).last_hidden_state, vit.eval()(x)
    skip = 1 + vit.arch.registers
    assert hidden.shape[1] == skip + out["patches"].shape[1] and out["patches"].std() > 0.3
    return max((out["cls"] - hidden[:, 0]).abs().max(), (out["patches"] - hidden[:, skip:]).abs().max()).item()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_features_equal_those_of_transformers_at_the_native_grid_and_others(name, tmp_path):
    net = theirs(name, tmp_path)
    vit = model.load_backbone(tmp_path)
    p, native = vit.arch.patch_size, net.config.image_size
    assert vit.arch.num_heads == net.config.num_attention_heads
    for px in ((native, native), (6 * p, 6 * p), (3 * p, 5 * p)):
        assert equal_to(net, vit, px) < 1e-5, px


def test_the_rounding_of_the_periods_moves_features_less_than_bf16_does(tmp_path):
    net = theirs("dinov3_s", tmp_path)
    vit = model.load_backbone(tmp_path)
    assert 1e-5 < equal_to(net, vit, (64, 64), rounded=False) < 0.02


def test_shards_load_and_a_missing_one_shows(tmp_path):
    net = theirs("dinov3_7b", tmp_path, shard="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert equal_to(net, model.load_backbone(tmp_path), (64, 64)) < 1e-5
    assert equal_to(net, model.load_backbone(shards[-1]), (64, 64)) < 1e-5
    shards[1].unlink()
    for path in (tmp_path, shards[0]):
        with one_line(rf"1 of {len(shards)} shards are missing, the first is {shards[1].name}; fetch"):
            model.load_backbone(path)


def test_a_classifier_is_left_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    st = pytest.importorskip("safetensors.torch")
    net = fill(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)))
    net.save_pretrained(tmp_path)
    assert equal_to(net.dinov2, model.load_backbone(tmp_path / "model.safetensors"), (56, 56)) < 1e-5
    assert "classifier.weight" in st.load_file(tmp_path / "model.safetensors")


# ---- Hugging Face, without it ---------------------------------------------------------------------------------------

OLD = [(r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
       (r"^pos_embed", "embeddings.position_embeddings"),
       (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"), (r"^norm\.", "layernorm."),
       (r"^blocks\.", "encoder.layer."), (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
       (r"attn\.proj", "attention.output.dense"), ("w12", "weights_in"), ("w3", "weights_out")]
V3_KEYS = [(r"^patch_embed\.proj", "embeddings.patch_embeddings"), (r"^storage_tokens", "embeddings.register_tokens"),
           (r"^(cls_token|mask_token)", r"embeddings.\1"), (r"^blocks\.", "layer."),
           (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"), (r"attn\.proj", "attention.o_proj"),
           (r"mlp\.w1\.", "mlp.gate_proj."), (r"mlp\.w2\.", "mlp.up_proj."), (r"mlp\.w3\.", "mlp.down_proj."),
           (r"mlp\.fc1\.", "mlp.up_proj."), (r"mlp\.fc2\.", "mlp.down_proj.")]


def in_their_names(vit):
    """The tensors of a ViT under the names that files on the hub have."""
    rope, out = vit.arch.pos == "rope", {}
    names = ("q_proj", "k_proj", "v_proj") if rope else ("attention.query", "attention.key", "attention.value")
    for key, v in vit.state_dict().items():
        if key.endswith("bias_mask") or key.startswith(("rope_embed", "local_cls_norm")):
            continue
        for pattern, name in V3_KEYS if rope else OLD:
            key = re.sub(pattern, name, key)
        parts = zip(names, v.chunk(3)) if "attn.qkv" in key else [(None, v)]
        for name, part in parts:
            if not (rope and name == "k_proj" and key.endswith("bias")):
                out[key if name is None else key.replace("attn.qkv", f"attention.{name}")] = part.clone()
    if rope:
        out["embeddings.mask_token"] = out["embeddings.mask_token"][None]
    return out


def write(folder, vit, **files):
    """A folder as from the hub: model.safetensors, config.json and other JSON files that are given."""
    st = pytest.importorskip("safetensors.torch")
    st.save_file(in_their_names(vit), folder / "model.safetensors")
    arch, swiglu = vit.arch, vit.arch.ffn == "swiglu"
    gated = swiglu and arch.pos == "rope"
    config = dict(num_attention_heads=arch.num_heads, layer_norm_eps=arch.norm_eps, hidden_size=arch.embed_dim,
                  hidden_act="silu" if gated else "gelu", use_swiglu_ffn=swiglu and not gated)
    for name, data in ({"config": config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def test_biases_that_are_there_count_and_zero_ones_stay_switched_off(tmp_path):
    vit = fill(ViT(V3))
    state, _ = model.open_weights(write(tmp_path, vit))
    mask, D = state["blocks.0.attn.qkv.bias_mask"], V3.embed_dim
    assert mask.view(3, D).sum(1).tolist() == [D, 0, D] and torch.equal(mask, vit.blocks[0].attn.qkv.bias_mask)
    assert state["blocks.0.attn.qkv.bias"].view(3, D).ne(0).any(1).tolist() == [True, False, True]


def test_a_model_without_mask_token_or_registers_loads(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    tensors = in_their_names(released(V3))
    del tensors["embeddings.mask_token"]  # use_mask_token=False
    tensors["embeddings.register_tokens"] = torch.zeros(1, 0, V3.embed_dim)
    st.save_file(tensors, tmp_path / "a.safetensors")
    loaded = model.load_backbone(tmp_path / "a.safetensors", replace(V3, registers=0))
    assert loaded.mask_token.shape == (1, V3.embed_dim) and not loaded.mask_token.any()


@pytest.mark.parametrize("name", ["dinov2_g", "dinov3_7b"])
def test_a_converted_file_is_the_folder(name, tmp_path, script):
    stated = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    folder, out = write(tmp_path, released(RELEASED[name]), preprocessor_config=stated), tmp_path / "w.pth"
    script("prepare/convert.py", f"--weights={folder}", f"--out={out}")
    one, other = model.load_backbone(folder), model.load_backbone(out)
    assert one.arch == other.arch and model.stored_norm(out) == model.NORMS["half"]
    bit_equal(one.state_dict(), other.state_dict())
    assert model.first_weights(out, replace(one.arch, pos_grid=3)).keys() == one.state_dict().keys()


@pytest.mark.parametrize("name", ["dinov2_s", "dinov2_g_reg", "dinov3_hplus", "dinov3_7b"])
def test_training_starts_from_hugging_faces_files(name, tmp_path):
    vit = released(RELEASED[name])
    write(tmp_path, vit)
    student = ViT(replace(vit.arch, pos_grid=4, drop_path=0.1))
    given = model.first_weights(tmp_path, student.arch)
    student.load_state_dict(given)
    same(student, vit)
    if vit.arch.local_cls_norm:  # not in their files; it starts as a copy of the norm
        assert torch.equal(student.local_cls_norm.weight, vit.norm.weight)
        loaded = model.load_backbone(tmp_path, vit.arch)
        assert loaded.local_cls_norm.weight.data_ptr() != loaded.norm.weight.data_ptr()
    with pytest.raises(ValueError, match="weights of another architecture"):
        model.load_backbone(tmp_path, "dinov2_vits14")


def test_a_folder_without_a_config_asks_for_the_heads_which_no_shape_tells(tmp_path):
    for name in ("dinov2_s_reg", "dinov3_s"):
        write(tmp_path, vit := released(RELEASED[name]))
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="no config.json beside it, .* arch="):
            model.load_backbone(tmp_path)
        same(model.load_backbone(tmp_path / "model.safetensors", vit.arch), vit)
    with pytest.raises(ValueError, match="weights of another architecture"):
        model.load_backbone(tmp_path, V2)


def test_normalisation_is_the_models_own_or_is_asked_for(tmp_path):
    stated = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    write(tmp_path, released(V2), preprocessor_config=stated)
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert model.stored_norm(path) == model.NORMS["half"]
    for text, part in ((None, "--norm=half .* or --norm=imagenet"), ("{}", "--norm="), ("[1]", "JSON object"),
                       (json.dumps({**stated, "do_normalize": False}), "--norm="), ("{", "cannot be read"),
                       (json.dumps({**stated, "image_mean": [123.7, 116.3, 103.5]}), "pixels from 0 to 1")):
        file = tmp_path / "preprocessor_config.json"
        file.write_text(text) if text else file.unlink()
        with one_line(f"{tmp_path}.*{part}"):
            model.stored_norm(tmp_path)


def test_hugging_face_files_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    st = pytest.importorskip("safetensors.torch")
    good, file = in_their_names(vit := released(RELEASED["dinov2_s_reg"])), tmp_path / "model.safetensors"
    less = {k: v for k, v in good.items() if k != "embeddings.position_embeddings"}
    lost = {k: v for k, v in good.items() if k != "encoder.layer.1.attention.attention.key.weight"}
    cases = [(less, r"1 tensors do not fit: pos_embed is missing"), (lost, "blocks.1.attn.qkv.weight is missing"),
             ({**good, "encoder.pooler.bias": torch.ones(2)}, "encoder.pooler.bias is .*, not known"),
             ({**good, "layernorm.bias": torch.ones(3)}, r"norm.bias is \(3,\), not \(128,\)"),
             ({**good, "norm.bias": torch.ones(128)}, "holds norm.bias twice"),
             ({"vision.layers.0.weight": torch.ones(2)}, "no DINOv2 or DINOv3 .* it holds vision.layers.0.weight"),
             ({**good, **{f"b.{k}": v.clone() for k, v in good.items()}}, "several backbones.* b.embeddings.cls_token"),
             ({k: v for k, v in good.items() if "encoder" not in k}, "no DINOv2 or DINOv3 backbone")]
    for tensors, part in cases:
        write(tmp_path, vit)
        st.save_file(tensors, file)
        with one_line(f"{tmp_path}.*{part}"):
            model.load_backbone(tmp_path)
    config = json.loads((write(tmp_path, vit) / "config.json").read_text())
    for key, value, part in (("num_attention_heads", 5, "5 heads do not divide the width of 128"),
                             ("num_attention_heads", 0, "a config.json without heads beside it")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with one_line(f"{tmp_path}.*{part}"):
            model.load_backbone(tmp_path)
    for key, value in (("hidden_size", 96), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"config\.json states {key} = {value}"):
            model.load_backbone(tmp_path)
    whole = (write(tmp_path, vit) / "model.safetensors").read_bytes()
    for data in (whole[:-100], whole[:20], b"", b"not weights"):
        file.write_bytes(data)
        with one_line(r"model\.safetensors: not a whole"):
            model.load_backbone(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "empty").mkdir()
    for name, part in (("empty", "a folder without"), ("facebook/dinov2", "no such"), ("w.safetensors", "no such")):
        with pytest.raises(ValueError, match=part):
            model.load_backbone(tmp_path / name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        model.load_backbone(tmp_path)
