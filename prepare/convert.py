"""
Hugging Face's layouts of DINOv2 and DINOv3 -> tensors under Meta's names, which are this project's.

    hf download kaiko-ai/midnight --local-dir=midnight             # pip install huggingface_hub
    python eval_bach.py --weights=midnight --bach_dir=data/bach    # reads the folder; so does train.py --weights=
    python prepare/convert.py --weights=midnight --out=midnight.pth

It reads model.safetensors or its shards, of transformers' Dinov2Model (Midnight is one), Dinov2WithRegistersModel and
DINOv3ViTModel; config.json for what shapes do not tell; preprocessor_config.json for the normalisation. For the 7B on 8
ranks, write the .pth once: their files have queries, keys and values apart, and every rank that reads the folder joins
them in memory of its own, 8 GB each. A .pth is mapped, so all ranks of a node share it.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure

weights = ""  # folder or .safetensors file
out = ""      # .pth to write; any script takes it as its weights
arch = ""     # a name in model.ARCHS; needed for DINOv3 without a config.json
norm = None   # as train.py's; None = as preprocessor_config.json states

DINOV2 = {  # their part of a name: ours; replaced in this order
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "", "encoder.layer.": "blocks.", "layernorm.": "norm.", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma", "attention.attention.query": "attn.q", "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v", "attention.output.dense": "attn.proj", "weights_in": "w12",
    "weights_out": "w3"}
DINOV3 = {
    "embeddings.patch_embeddings": "patch_embed.proj", "embeddings.register_tokens": "storage_tokens",
    "embeddings.": "", "layer.": "blocks.", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj"}
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}


def read(path, arch=None):
    """
    What the .pth would hold: {"teacher": {Meta's name: tensor}, "arch": {field of ViTConfig that shapes do not tell:
    value}}. `arch` is the ViTConfig that was asked for, or None. Raises ValueError naming the file.
    """
    tensors = read_tensors(path)
    rope = not any("encoder.layer." in key for key in tensors)
    state = meta_names(path, tensors, rope)
    join_attention(state, rope)
    # transformers resamples positions to the size itself, with antialias only in models with registers
    told = {} if rope else {"pos_antialias": "register_tokens" in state, "pos_offset": 0.0}
    config = read_json(path, "config.json")
    width = state["cls_token"].shape[-1]
    needed = {"hidden_size": width, "hidden_act": "silu" if "blocks.0.mlp.w1.weight" in state else "gelu"}
    for key, value in needed.items():
        ignored = key == "hidden_act" and config.get("use_swiglu_ffn")  # DINOv2's SwiGLU is silu in any case
        if config.get(key, value) != value and not ignored:
            raise ValueError(f"{path}: config.json states {key} = {config[key]}, but these weights need {value}")
    fields = {"num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps", "rope_theta": "rope_base"}
    told |= {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}
    if rope:
        if arch is None and "num_heads" not in told:
            raise ValueError(f"{path}: no config.json beside it, which tells the heads; put it there or state arch=...")
        like = model.replace(arch or model.ViTConfig(), embed_dim=width, **told)
        state["rope_embed.periods"] = model.rope_periods(like)  # in no file; Meta's are rounded to bf16
    if arch is not None and arch.local_cls_norm:  # for training only, and in no file; it starts as the final norm
        state |= {f"local_cls_{name}": state[name].clone() for name in ("norm.weight", "norm.bias")}
    return {"teacher": state, "arch": told}


def read_tensors(path):
    """All tensors of a .safetensors file, or of model*.safetensors in a folder."""
    files = sorted(Path(path).glob("model*.safetensors")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].exists():
        raise ValueError(f"{path}: no such weight file, or a folder without model.safetensors")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    tensors = {}
    try:
        for file in files:
            tensors |= load_file(file)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a whole .safetensors file, fetch it again ({str(e)[:120]})") from None
    return tensors


def read_json(path, name):
    """The JSON object in the file of that name beside the weights, {} if there is none."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / name
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read as a JSON object, fetch it again ({e})") from None


def meta_names(path, tensors, rope):
    """The tensors under Meta's names, except attention's. A prefix such as "dinov2." and a classifier are dropped."""
    root = [key.removesuffix("embeddings.cls_token") for key in tensors if key.endswith("embeddings.cls_token")]
    if len(root) != 1:
        raise ValueError(f"{path}: not a DINOv2 or DINOv3 of transformers: {len(root)} tensors are its class token")
    mlp = GATED if any("gate_proj." in key for key in tensors) else PLAIN
    table, state = DINOV3 | mlp if rope else DINOV2, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(root[0])
        for theirs, ours in table.items():
            name = name.replace(theirs, ours)
        if name in state:
            raise ValueError(f"{path}: holds {name} twice, under two layouts' names")
        if tensor.numel() and not name.startswith("classifier."):  # without registers, theirs are an empty tensor
            state[name] = tensor
    state.setdefault("mask_token", torch.zeros_like(state["cls_token"]))  # a model may be saved without one
    state["mask_token"] = state["mask_token"].flatten(0, -2)
    return state


def join_attention(state, rope):
    """
    Join queries, keys and values to qkv in every block that has all three, in place. DINOv3 gets zeros for the key's
    bias, and its mask, which is off for a bias that is all zero, as in Meta's files: so such a bias does not train.
    """
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        attn = name.removesuffix("q.weight")
        biases = [f"{attn}{part}.bias" for part in "qkv"]
        if rope and any(bias in state for bias in biases):
            zeros = state[name].new_zeros(len(state[name]))
            given = [state.setdefault(bias, zeros) for bias in biases]
            state[f"{attn}qkv.bias_mask"] = torch.cat([torch.full_like(t, float(t.any())) for t in given])
        for parts in ([f"{attn}{part}.weight" for part in "qkv"], biases):
            if all(part in state for part in parts):
                state[parts[0].replace(".q.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])


def stored_norm(path):
    """(mean, std) in preprocessor_config.json. ValueError without it: its pixels may be Meta's or Midnight's."""
    config = read_json(path, "preprocessor_config.json")
    if not config.get("do_normalize", True) or not {"image_mean", "image_std"} <= config.keys():
        raise ValueError(f"{path}: no preprocessor_config.json with image_mean and image_std, so its pixels' range "
                         "is unknown; pass --norm=half (Midnight, Kaiko) or --norm=imagenet (Meta)")
    return config["image_mean"], config["image_std"]


if __name__ == "__main__":
    configure(globals())
    try:
        stored = read(weights, model.ARCHS.get(arch))
        stated = model.stored_norm(weights) if norm is None else model.norm_values(norm)
        torch.save({**stored, "config": {"norm": stated}}, out)
        print(f"{out}: {model.load_backbone(out).arch}")
    except (ValueError, OSError, RuntimeError) as e:
        raise SystemExit(f"prepare/convert.py: {e}") from None
