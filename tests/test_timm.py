"""
timm's tile encoders, as tiny files: tests/golden/timm.npz holds what timm computed from them.

    PYTHONPATH=. python tests/test_timm.py     # writes that file anew; needs timm, which the tests do not
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from test_train import bit_equal

import model

GOLDEN = Path(__file__).parent / "golden/timm.npz"
PX = (56, 84)  # the position tables' own size, and another
SMALL = dict(embed_dim=48, depth=2, num_heads=3, num_classes=0, img_size=56, dynamic_img_size=True, init_values=1e-5)
PACKED = SMALL | dict(mlp_layer="SwiGLUPacked", act_layer="SiLU", mlp_ratio=16 / 3)
DINOV3 = {k: v for k, v in SMALL.items() if k != "img_size"} | dict(patch_size=14, qkv_bias=False)
MODELS = {  # name of timm's model, arguments; patches are smaller than the models' own where 56 px do not divide
    "uni": ("vit_large_patch16_224", SMALL | dict(patch_size=14)),
    "uni2_h": ("vit_giant_patch14_224", PACKED | dict(reg_tokens=8, no_embed_class=True)),
    "virchow": ("vit_huge_patch14_224", PACKED), "virchow2": ("vit_huge_patch14_224", PACKED | dict(reg_tokens=4)),
    "gigapath": ("vit_giant_patch14_dinov2", PACKED | dict(patch_size=28)),
    "h_optimus": ("vit_giant_patch14_reg4_dinov2", PACKED), "dinov2_reg": ("vit_small_patch14_reg4_dinov2", SMALL),
    "kaiko": ("vit_small_patch8_224", {k: v for k, v in SMALL.items() if k != "init_values"} | dict(patch_size=14)),
    "dinov3": ("vit_small_patch16_dinov3", DINOV3), "dinov3_plus": ("vit_huge_plus_patch16_dinov3", DINOV3),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", DINOV3 | dict(qkv_bias=True))}


def values(shapes, seed):
    """{name: tensor} with which every tensor shows in the outputs: no zeros, layer-scale and norms around 1."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        scale = "gamma" in name or ("norm" in name and name.endswith("weight"))
        t = rng.normal(1.0 if scale else 0.0, 0.2 if scale or len(shape) != 2 else 0.1, shape)
        tensors[name] = torch.from_numpy(t).float()
    return tensors


def image(px):
    return values({"x": (1, 3, px, px + 28)}, px)["x"] * 5


@pytest.fixture(params=MODELS)
def recorded(request):
    """(name, tensors, timm's config.json, {px: tokens that timm computed})"""
    name, golden = request.param, np.load(GOLDEN)
    tensors = values(json.loads(str(golden[f"{name}.shapes"])), seed=0)
    config = {"architecture": MODELS[name][0], "model_args": MODELS[name][1],
              "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    return name, tensors, config, {px: torch.from_numpy(golden[f"{name}.{px}"]) for px in PX}


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def differs(vit, px, tokens):
    """Largest difference to timm's class token, registers and patches."""
    with torch.no_grad():
        out = vit.eval()(image(px))
    ours = torch.cat([out["cls"][:, None], out["registers"], out["patches"]], 1)
    assert ours.shape == tokens.shape and tokens.std() > 0.3
    return (ours - tokens).abs().max().item()


def test_features_equal_those_of_timm(recorded, tmp_path):
    name, tensors, config, outputs = recorded
    folder = write(tmp_path / name, tensors, config)
    for path in (folder, folder / "pytorch_model.bin"):
        vit = model.load_backbone(path)
        assert vit.arch.num_heads == 3 and not vit.mask_token.any()
        for px, tokens in outputs.items():
            assert differs(vit, px, tokens) < 2e-5, px
        assert model.stored_norm(path) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_file_without_its_config_asks_for_heads_and_norm_unless_sizes_tell_the_heads(recorded, tmp_path, monkeypatch):
    name, tensors, config, outputs = recorded
    vit = model.load_backbone(write(tmp_path, tensors, config))
    (tmp_path / "config.json").unlink()
    path = tmp_path / "pytorch_model.bin"
    with one_line("pytorch_model.bin: no config.json beside it, .* arch="):
        model.load_backbone(path)
    with one_line("pytorch_model.bin: no .*config.json.* --norm=h_optimus"):
        model.stored_norm(path)
    assert differs(model.load_backbone(path, vit.arch), 56, outputs[56]) < 2e-5
    monkeypatch.setitem(model.ARCHS, "small", vit.arch)
    assert differs(model.load_backbone(path), 56, outputs[56]) < 2e-5


def test_a_config_of_another_model_and_damaged_tensors_are_named(recorded, tmp_path):
    name, tensors, config, _ = recorded
    for stated in (dict(embed_dim=1536, num_heads=24), dict(num_heads=7)):
        with one_line("config.json beside it is another model's, as these weights are 48 wide"):
            model.load_backbone(write(tmp_path, tensors, config | {"model_args": stated}))
    lost = "blocks.1.norm2.weight" if name == "kaiko" else [key for key in tensors if "gamma" in key][-1]
    with one_line(r"weights of another architecture: 1 tensors do not fit: blocks.1.\w+.\w+ is missing"):
        model.load_backbone(write(tmp_path, {k: v for k, v in tensors.items() if k != lost}, config))
    if "pos_embed" in tensors:
        table = {"pos_embed": tensors["pos_embed"][:, :1].repeat(1, 12, 1)}
        with one_line("position table of 12 entries is not square"):
            model.load_backbone(write(tmp_path, tensors | table, config))


def test_what_a_config_states_of_activation_and_norm_counts(recorded, tmp_path):
    name, tensors, config, _ = recorded
    args = config["model_args"]
    vit = model.load_backbone(write(tmp_path, tensors, config | {"model_args": args | {"norm_eps": 1e-3}}))
    assert vit.arch.norm_eps == 1e-3
    with one_line("config.json states act_layer = relu, but these weights need (gelu|silu)"):
        model.load_backbone(write(tmp_path, tensors, config | {"model_args": args | {"act_layer": "relu"}}))
    for same in ("torch.nn.SiLU", "swish") if vit.arch.ffn == "swiglu" else ("torch.nn.GELU",):
        model.load_backbone(write(tmp_path, tensors, config | {"model_args": args | {"act_layer": same}}))
    with one_line("a config.json without heads beside it"):  # the bug: an AttributeError
        model.load_backbone(write(tmp_path, tensors, config | {"model_args": None}))


def test_a_converted_file_and_the_start_of_training_are_timms(recorded, tmp_path, script):
    name, tensors, config, outputs = recorded
    folder, out = write(tmp_path / name, tensors, config), tmp_path / "w.pth"
    script("prepare/convert.py", f"--weights={folder}", f"--out={out}")
    vit = model.load_backbone(out)
    assert vit.arch == model.load_backbone(folder).arch and model.stored_norm(out)[0] == (0.1, 0.2, 0.3)
    rope = vit.arch.pos == "rope"
    student = model.ViT(model.replace(vit.arch, drop_path=0.1, qkv_bias=True, mask_k_bias=rope))  # as in ARCHS
    student.load_state_dict(model.first_weights(folder, student.arch))
    assert differs(student, 56, outputs[56]) < 2e-5
    bit_equal(vit.state_dict(), model.load_backbone(folder).state_dict())


def main():
    import timm
    arrays = {}
    for name, (architecture, arguments) in MODELS.items():
        arguments = dict(arguments)
        if "mlp_layer" in arguments:
            arguments |= dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
        net = timm.create_model(architecture, **arguments).eval()
        shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
        net.load_state_dict(values(shapes, seed=0))
        if hasattr(net, "rope") and net.rope is not None:
            net.rope.periods.copy_(net.rope.periods.bfloat16())  # as in Meta's files; timm leaves them in fp32
        arrays[f"{name}.shapes"] = json.dumps(shapes)
        for px in PX:
            with torch.no_grad():
                arrays[f"{name}.{px}"] = net.forward_features(image(px)).numpy()
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
