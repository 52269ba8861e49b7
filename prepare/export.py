"""
A teacher for other people's code: a folder that Hugging Face's transformers or timm loads.

    python prepare/export.py --weights=out/x/teacher/5000.pth --out=x_5000           # pip install safetensors
    python prepare/export.py --weights=out/x/teacher/5000.pth --out=x_timm --to=timm

    model.safetensors          the backbone, in fp32, under their names
    config.json                sizes; of timm the model's name, its arguments and the normalisation
    preprocessor_config.json   transformers' normalisation and input size
    README.md                  a model card: how to load it, where it differs, the run's BACH rows and config

AutoModel.from_pretrained makes a Dinov2Model, a Dinov2WithRegistersModel or a DINOv3ViTModel of the first; the card has
the lines that load the second. load_backbone reads both. Any file that it reads can be exported.
"""
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
import model
from configurator import configure, run
from prepare import convert

weights = ""  # file or folder
out = ""      # folder to write; must be empty or not there
to = "hf"     # "hf" (transformers) or "timm"
arch = ""     # of weights that do not say it; "" = found out
norm = None   # "imagenet", "half", (mean, std); None = the weights' own

SIZE = 224  # px, of encoders that do not state what they were trained at
DINOV2, DINOV3, PLAIN, GATED = ({ours: theirs for theirs, ours in table.items() if ours}
                                for table in (convert.DINOV2, convert.DINOV3, convert.PLAIN, convert.GATED))
DINOV2 |= {name: f"embeddings.{name}" for name in ("cls_token", "mask_token", "register_tokens")}
DINOV3 |= {name: f"embeddings.{name}" for name in ("cls_token", "mask_token")}
TIMM = {"storage_tokens": "reg_token", "register_tokens": "reg_token",
        "mlp.w12.": "mlp.fc1.", "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}

LOAD = {"hf": """from transformers import AutoModel

net = AutoModel.from_pretrained("FOLDER").eval()
tokens = net(x).last_hidden_state  # x (B, 3, H, W), normalised""",
        "timm": """import json, timm
from safetensors.torch import load_file

about = json.load(open("FOLDER/config.json"))
net = timm.create_model(about["architecture"], num_classes=0, **about["model_args"]).eval()
net.load_state_dict(load_file("FOLDER/model.safetensors"))
tokens = net.forward_features(x)  # x (B, 3, H, W), normalised"""}


def inference_tensors(vit):
    """{Meta's name: tensor} that evaluation reads. The bias of DINOv3's attention has its mask applied."""
    state = {name: t for name, t in vit.state_dict().items() if not name.startswith("local_cls_norm.")}
    for name in [name for name in state if name.endswith("bias_mask")]:
        bias = name.removesuffix("_mask")
        state[bias] = state[bias] * state.pop(name)
    if vit.arch.pos == "rope":
        expected = model.rope_periods(vit.arch)
        if not torch.allclose(state.pop("rope_embed.periods"), expected, rtol=0.01):
            raise ValueError(f"its rotary periods are not those of rope_base {vit.arch.rope_base:g}, which is all that "
                             "other code can be told")
    return state


def qkv_parts(state):
    """The tensors with queries, keys and values apart, as copies, because one file must not hold a tensor twice."""
    parts = {}
    for name, t in state.items():
        if ".attn.qkv." in name:
            for part, own in zip("qkv", t.chunk(3)):
                parts[name.replace("attn.qkv", f"attn.{part}")] = own.clone()
        else:
            parts[name] = t
    return parts


def mlp_ratio(arch):
    """The whole number from which transformers' DINOv2 computes the MLP's hidden width; its config takes no other."""
    for ratio in range(1, 17):
        hidden = arch.embed_dim * ratio
        if arch.ffn == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == arch.ffn_hidden:
            return ratio
    raise ValueError(f"transformers' DINOv2 has no MLP of {arch.ffn_hidden} hidden units at a width of "
                     f"{arch.embed_dim}; export it with --to=timm")


def for_hugging_face(arch, state, px):
    """({their name: tensor}, config.json) of transformers."""
    state, swiglu = qkv_parts(state), arch.ffn == "swiglu"
    config = {"hidden_size": arch.embed_dim, "num_hidden_layers": arch.depth, "num_attention_heads": arch.num_heads,
              "patch_size": arch.patch_size, "num_channels": arch.in_channels, "layer_norm_eps": arch.norm_eps}
    if arch.pos == "rope":
        family, model_type, table = "DINOv3ViT", "dinov3_vit", DINOV3 | (GATED if swiglu else PLAIN)
        if not any(t.any() for name, t in state.items() if name.endswith("attn.k.bias")):  # as in every file of Meta's
            state = {name: t for name, t in state.items() if not name.endswith("attn.k.bias")}
        for part, key in zip("qkv", ("query_bias", "key_bias", "value_bias")):
            config[key] = f"blocks.0.attn.{part}.bias" in state
        config |= {"image_size": px, "intermediate_size": arch.ffn_hidden, "use_gated_mlp": swiglu,
                   "hidden_act": "silu" if swiglu else "gelu", "rope_theta": arch.rope_base,
                   "pos_embed_rescale": arch.rope_rescale or None}
        state["mask_token"] = state["mask_token"][None]
    else:
        family, model_type, table = "Dinov2", "dinov2", DINOV2
        if arch.registers or arch.pos_antialias:  # only this class resamples positions with antialias
            family, model_type = "Dinov2WithRegisters", "dinov2_with_registers"
        config |= {"image_size": arch.pos_grid * arch.patch_size, "mlp_ratio": mlp_ratio(arch), "hidden_act": "gelu",
                   "use_swiglu_ffn": swiglu, "qkv_bias": arch.qkv_bias}
    if family != "Dinov2":
        config["num_register_tokens"] = arch.registers
        tokens = "storage_tokens" if arch.pos == "rope" else "register_tokens"
        state.setdefault(tokens, torch.zeros(1, 0, arch.embed_dim))  # theirs is there, and empty
    tensors = {convert.renamed(name, table): t for name, t in state.items()}
    return tensors, {"architectures": [f"{family}Model"], "model_type": model_type, **config}


def preprocessor(norm, px):
    """preprocessor_config.json. BitImageProcessor is what transformers' DINOv2 has, and it needs no torchvision."""
    return {"image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": px}, "resample": 2, "do_center_crop": True,  # 2: bilinear, as eval_bach.py
            "crop_size": {"height": px, "width": px}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": norm[0], "image_std": norm[1]}


def for_timm(arch, state, norm, px):
    """({timm's name: tensor}, config.json). The model's name says its kind, the arguments all sizes."""
    rope, swiglu, D = arch.pos == "rope", arch.ffn == "swiglu", arch.embed_dim
    if arch.norm_eps != (1e-5 if rope else 1e-6) or rope and arch.rope_base != 100:
        raise ValueError(f"timm's models have another norm_eps than {arch.norm_eps:g}, or another rope_base than "
                         f"{arch.rope_base:g}; export it with --to=hf")
    width = arch.ffn_hidden * (2 if swiglu and not rope else 1)  # DINOv2's SwiGLU is one matrix there too
    ratio = width / D if int(D * (width / D)) == width else (width + 0.5) / D  # timm rounds down
    args = {"patch_size": arch.patch_size, "in_chans": arch.in_channels, "embed_dim": D, "depth": arch.depth,
            "num_heads": arch.num_heads, "mlp_ratio": ratio, "dynamic_img_size": True}
    state = {name: t for name, t in state.items() if name != "mask_token"}  # only training needs it
    if rope:
        biased = split_biases(state)
        name = f"vit_{'huge_plus' if swiglu else 'small'}_patch16_dinov3{'_qkvb' if biased else ''}"
        args |= {"qkv_bias": biased, "num_reg_tokens": arch.registers}
        table = TIMM | {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    else:
        name = f"vit_{'giant' if swiglu else 'small'}_patch14_{'reg4_' if arch.registers else ''}dinov2"
        args |= {"qkv_bias": arch.qkv_bias, "img_size": arch.pos_grid * arch.patch_size, "reg_tokens": arch.registers}
        table = TIMM
        if arch.registers:  # timm's have positions of patches alone
            cls, patches = state["pos_embed"].split([1, arch.pos_grid**2], dim=1)
            state |= {"cls_token": state["cls_token"] + cls, "pos_embed": patches.clone()}
    tensors = {convert.renamed(name, table): t for name, t in state.items()}
    about = {"mean": norm[0], "std": norm[1], "input_size": [3, px, px], "interpolation": "bilinear", "crop_pct": 1.0,
             "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    return tensors, {"architecture": name, "num_classes": 0, "num_features": D, "model_args": args,
                     "pretrained_cfg": about}


def split_biases(state):
    """Put timm's q_bias and v_bias in place of qkv.bias, or nothing where all are zero. Returns whether any is not."""
    biases = {name: state.pop(name) for name in list(state) if name.endswith("attn.qkv.bias")}
    biased = any(t.any() for t in biases.values())
    for name, t in biases.items() if biased else ():
        parts = t.chunk(3)
        if parts[1].any():
            raise ValueError("timm's DINOv3 has no bias of keys, and these weights have one; export it with --to=hf")
        state |= {name.replace("qkv.bias", f"{part}_bias"): own.clone() for part, own in zip("qv", parts[::2])}
    return biased


def differences(arch, to):
    """Where features are not this project's, as a sentence of the card; "" if nowhere."""
    if arch.pos == "rope":
        return ("Rotary periods are rounded to bf16 in Meta's files and in training, and are not in this library. That "
                "moves features by less than computing in bf16 does.")
    antialias = to == "timm" or bool(arch.registers) or arch.pos_antialias  # in that library
    if arch.pos_offset or arch.pos_antialias != antialias:
        side = arch.pos_grid * arch.patch_size
        return (f"At {side} x {side} px features equal those of training. At other sizes this library resamples the "
                "positions by another rule.")
    return ""


def bach_text(weights, step):
    """The part of the card with the BACH rows of the run up to `step`; "" if no bach.jsonl lies with the weights."""
    rows = curves.read_rows(weights.parent / "bach.jsonl") or curves.read_rows(weights.parent.parent / "bach.jsonl")
    rows = {at: row for at, row in rows.items() if at <= step}
    if not rows:
        return ""
    return f"""
## BACH in training

The images that select also score, so the number is optimistic, and a difference below 0.02 is no evidence. \
Protocol: {rows[max(rows)].get("protocol")}.

```
{curves.curve_table(curves.Run("", rows, {}, {}))}
```
"""


def model_card(config, arch, norm, px, header):
    """README.md of the export."""
    to, weights, trained = config["to"], Path(config["weights"]).resolve(), header.get("config", {})
    name = os.path.basename(os.path.normpath(trained.get("out_dir") or weights.stem))
    step = f", step {header['step']}" if "step" in header else ""
    scale = f" at {', '.join(map(str, trained['mpps']))} um/px" if trained.get("mpps") else ""
    folder = os.path.basename(os.path.normpath(config["out"]))
    text = f"""---
library_name: {"timm" if to == "timm" else "transformers"}
pipeline_tag: image-feature-extraction
tags: [pathology]
---

# {name}{step}

A vision transformer for tiles of H&E slides, exported by nanoPFM. Width {arch.embed_dim}, depth {arch.depth}, \
{arch.num_heads} heads, patches of {arch.patch_size} px, {arch.registers} registers. The first token is the class \
token; the registers follow, then the patches, row by row.

Input: {px} x {px} px{scale}, RGB from 0 to 1, mean {list(norm[0])}, std {list(norm[1])}. {differences(arch, to)}

```python
{LOAD[to].replace("FOLDER", folder)}
```
"""
    text += bach_text(weights, header.get("step", -1))
    if trained:
        text += f"\n## Config of the run\n\n```json\n{json.dumps(trained, indent=1)}\n```\n"
    return text


def main(config):
    weights, out, to, norm = (config[key] for key in ("weights", "out", "to", "norm"))
    if to not in LOAD:
        raise ValueError(f"to={to}: give hf (transformers) or timm")
    if not weights or not out:
        raise ValueError("give --weights=FILE and --out=FOLDER")
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"out={out}: not an empty folder; delete it, or choose another --out")
    from safetensors.torch import save_file
    vit, header = model.load_backbone(weights, config["arch"] or None), model.read_header(weights)
    norm, arch = model.stored_norm(weights) if norm is None else model.norm_values(norm), vit.arch
    px = header.get("config", {}).get("global_px") or arch.patch_size * round(SIZE / arch.patch_size)
    state, files = inference_tensors(vit), {}
    if to == "timm":
        tensors, about = for_timm(arch, state, norm, px)
    else:
        tensors, about = for_hugging_face(arch, state, px)
        files["preprocessor_config.json"] = json.dumps(preprocessor(norm, px), indent=1)
    files |= {"config.json": json.dumps(about, indent=1), "README.md": model_card(config, arch, norm, px, header)}
    part = Path(f"{os.path.normpath(out)}.part")
    part.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, part / "model.safetensors", {"format": "pt"})
    for name, text in files.items():
        (part / name).write_text(text)
    os.replace(part, out)
    kind = about.get("architecture") or about["architectures"][0]
    print(f"{out}: {kind}, input {px} px, norm {norm}. {differences(arch, to)}".strip())
    if header.get("config"):
        print(f"{out}/README.md states the run's config, with its paths: read it before you publish")


if __name__ == "__main__":
    run("prepare/export.py", main, configure(globals()))
