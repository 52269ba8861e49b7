"""
Weight files in the layouts that they come in -> tensors under the names of Meta's files, which are this project's.

    .pth                      Meta's DINOv2 and DINOv3, this project's teachers, OpenMidnight's
    .safetensors or a folder  transformers' Dinov2Model (kaiko-ai/midnight is one), Dinov2WithRegistersModel and
                              DINOv3ViTModel: model.safetensors, or model.safetensors.index.json and its shards;
                              config.json for what shapes do not tell; preprocessor_config.json for the normalisation

    hf download facebook/dinov2-with-registers-giant --local-dir=data/weights/giant    # pip install huggingface_hub
    python eval_bach.py --weights=data/weights/giant --bach_dir=data/bach              # likewise train.py --weights=

Nothing here knows model.py: load_backbone there builds the network and says which keys do not fit.
"""
import json
import os
import pickle
import re
import zipfile

import torch

MODELS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
OFFSET = {"pos_antialias": False, "pos_offset": 0.1}  # how DINOv2 without registers and OpenMidnight's release resample
HEAD = re.compile(r"classifier\.(weight|bias)")  # of transformers' ForImageClassification: no part of the backbone
NAMES = [  # applied in this order; of two alternatives the first is what the hub's files hold, as written before 5.x
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}


def is_hugging_face(path):
    return os.path.isdir(path) or str(path).endswith(".safetensors")


def read(path):
    """
    (state dict under released names, arch stored in the file or None, {ViTConfig field: value} that a Hugging Face
    model, or a teacher trained with pos_interp, states besides its shapes, or None). ValueError naming the file.
    """
    if is_hugging_face(path):
        state, told = read_transformers(path)
        return state, None, told
    data = read_pth(path)
    state, arch = unwrap(path, data)
    offset = "pos_embed" in state and stored_config(data).get("pos_interp") == "offset"
    return state, arch, OFFSET if offset else None


def norm(path):
    """
    What a weight file states of its pixels: (mean, std), a name or None. ValueError where Hugging Face's has no
    preprocessor_config.json beside it: its pixels may be Meta's or Midnight's.
    """
    if not is_hugging_face(path):
        c = stored_config(read_pth(path)) if os.path.isfile(path) else {}
        return (c["norm_mean"], c["norm_std"]) if {"norm_mean", "norm_std"} <= c.keys() else c.get("norm")
    file, config = beside(path, "preprocessor_config.json")
    if config is None or not config.get("do_normalize", True) or not {"image_mean", "image_std"} <= config.keys():
        raise ValueError(f"{path}: no image_mean and image_std in {file}, so what its pixels should be is unknown; "
                         "pass --norm=half (Midnight, Kaiko) or --norm=imagenet (Meta)")
    return config["image_mean"], config["image_std"]


# ---- .pth -----------------------------------------------------------------------------------------------------------


def read_pth(path):
    """What torch.save wrote, if a dictionary, else {}. ValueError unless a file of plain tensors, numbers and text."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such weight file") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, OSError) as e:
        calls = re.search(r"GLOBAL (\S+)", str(e))  # what an untrusted pickle would run
        reason = f"it calls {calls[1]}" if calls else " ".join(str(e).split())[:120]
        if os.path.isfile(path) and not zipfile.is_zipfile(path):
            with open(path, "rb") as f:
                reason = f"it begins with {f.read(20)}"
        raise ValueError(f"{path}: not a file of plain tensors, and weights_only=True refuses any other ({reason}); "
                         "fetch it again, or save its state dict alone") from None
    return data if isinstance(data, dict) else {}


def stored_config(data):
    """train.py's keys in what read_pth gave, {} where there are none."""
    return c if isinstance(c := data.get("config"), dict) else {}


def unwrap(path, data):
    """(state dict, arch stored in the file or None) of a released file, this project's teacher or OpenMidnight's."""
    state = data.get("teacher", data)
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        state = {}
    if any(k.startswith("backbone.") for k in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    for k in [k for k in state if "teacher" not in data and k.endswith("qkv.bias")]:
        mask = state.get(f"{k}_mask")
        if mask is not None and mask.shape == state[k].shape and (mask * state[k]).any():
            raise ValueError(f"{path}: {k}_mask lets a bias through that is zero in every released DINOv3 file")
    return state, data.get("arch") if "teacher" in data else None


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def read_transformers(path):
    """
    A folder or a .safetensors file -> (state dict under released names, {ViTConfig field: value} that is known besides
    the shapes). Without a config.json beside the weights the latter lacks the heads. Raises ValueError.

    Positions are resampled as transformers does: to the size itself, with antialias only where there are registers.
    Rotary periods are in no file; model.Rope rounds them to bf16 as Meta's do, which transformers leaves out.
    """
    tensors = read_tensors(path)
    try:
        state = convert(tensors)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    told = dict(pos="learned", pos_antialias="register_tokens" in state, pos_offset=0.0)
    if is_rope(tensors):
        told = dict(pos="rope")
    file, config = beside(path, "config.json")
    if config is None:
        return state, told
    if (kind := config.get("model_type")) not in MODELS:
        raise ValueError(f"{file}: describes a {kind}; only {', '.join(MODELS)} can be read")
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    found = dict(hidden_size=state["cls_token"].shape[-1], num_hidden_layers=depth)
    if not config.get("use_swiglu_ffn"):  # DINOv2's SwiGLU is silu whatever hidden_act says
        found["hidden_act"] = "silu" if any(".mlp.w1." in k for k in state) else "gelu"
    for key, value in found.items():
        if config.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {config[key]}, but these weights need {value}: of another model?")
    fields = {"num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps", "rope_theta": "rope_base"}
    return state, told | {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}


def read_tensors(path):
    """All tensors of a .safetensors file, or of the file or the shards in a folder. Raises ValueError."""
    files, folder = [path], os.path.isdir(path)
    if folder and os.path.isfile(os.path.join(path, "model.safetensors")):
        files = [os.path.join(path, "model.safetensors")]
    elif folder:
        file, index = beside(path, "model.safetensors.index.json")
        if index is None:
            raise ValueError(f"{path}: a folder without model.safetensors or model.safetensors.index.json; give a "
                             "Hugging Face model's, or a .pth file")
        if not isinstance(shards := index.get("weight_map"), dict) or not shards:
            raise ValueError(f"{file}: lists no shards under weight_map; fetch it again")
        files = [os.path.join(path, name) for name in sorted(set(map(str, shards.values())))]
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError:
            listed = "; the index lists it: fetch it" if folder else ""
            raise ValueError(f"{file}: no such weight file{listed}") from None
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file}: not a whole .safetensors file, fetch it again ({str(e)[:120]})") from None
    return tensors


def beside(path, name):
    """(path of the JSON file `name` in the folder of the weights, its object or None where there is no such file)."""
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), name)
    try:
        with open(file) as f:
            data = json.load(f)
    except FileNotFoundError:
        return file, None
    except (OSError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read, fetch it again ({e})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: not a JSON object; fetch it again")
    return file, data


def convert(tensors):
    """
    A state dict of transformers, in its layout of before or since 5.x -> the same under released names.

    A prefix such as "dinov2." goes, and so does a classifier. Keys that belong nowhere come back. Raises ValueError
    where two keys mean one tensor, or where there is not one embeddings.cls_token.
    """
    root = [k.removesuffix("embeddings.cls_token") for k in tensors if k.endswith("embeddings.cls_token")]
    if len(root) != 1:
        raise ValueError(f"{len(root)} of its {len(tensors)} keys ({', '.join(sorted(tensors)[:3])}) end in "
                         f"embeddings.cls_token, where one should: not transformers' {' or '.join(MODELS)}")
    root, keys = root[0], [k for k in tensors if not HEAD.fullmatch(k)]
    names = {rename(k.removeprefix(root)) if k.startswith(root) else k: k for k in keys}
    if twice := sorted(set(keys) - set(names.values())):
        raise ValueError(f"two layouts in one file: {', '.join(twice[:4])} under another name too")
    state = {name: tensors[k] for name, k in names.items() if tensors[k].numel()}  # no registers: an empty tensor
    rope = is_rope(keys)
    if rope and "register_tokens" in state:
        state["storage_tokens"] = state.pop("register_tokens")
    state["mask_token"] = state.get("mask_token", torch.zeros_like(state["cls_token"])).flatten(0, -2)  # may be absent
    mlp = GATED if any(".mlp.gate_proj." in k for k in state) else PLAIN
    state = {re.sub(r"(?<=\.mlp\.)\w+_proj", lambda m: mlp.get(m[0], m[0]), k): v for k, v in state.items()}
    if rope:
        complete_biases(state)
    else:
        join(state, ("mlp.w1", "mlp.w2"), "mlp.w12")
    return join(state, ("attn.q", "attn.k", "attn.v"), "attn.qkv")


def is_rope(keys):
    """Whether these are DINOv3's keys: DINOv2's blocks are in encoder.layer, its own in layer or model.layer."""
    return not any("encoder.layer." in k for k in keys)


def rename(key):
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return key


def join(state, parts, whole):
    """
    Put the rows of `parts` one after another, weights and biases, in every block that has all of them; in place. As a
    tuple, see rows: concatenated, every rank of a node would hold a quarter of the network in memory of its own.
    """
    for first in [k for k in state if f".{parts[0]}." in k]:
        keys = [first.replace(parts[0], part) for part in parts]
        if all(k in state for k in keys):
            state[first.replace(parts[0], whole)] = tuple(state.pop(k) for k in keys)
    return state


def shape(value):
    """Of a tensor, or of a tuple of tensors whose rows follow each other."""
    return torch.Size((sum(map(len, value)), *value[0].shape[1:])) if isinstance(value, tuple) else value.shape


def rows(value, start=0, stop=None):
    """Rows [start, stop) of either; only they are read from a mapped file."""
    if not isinstance(value, tuple):
        return value[start:stop] if value.dim() else value
    stop, parts = shape(value)[0] if stop is None else stop, []
    for part in value:
        parts.append(part[max(start, 0) : max(stop, 0)])
        start, stop = start - len(part), stop - len(part)
    return torch.cat(parts)


def complete_biases(state):
    """
    DINOv3's qkv.bias_mask, and zeros for a bias that a block lacks (the key's); in place. The mask is off where all is
    zero, as in Meta's files: such a bias does not start to train because of the format it came in.
    """
    for weight in [k for k in state if k.endswith(".attn.q.weight")]:
        attn = weight.removesuffix("q.weight")
        keys = [f"{attn}{part}.bias" for part in "qkv"]
        if any(k in state for k in keys):
            biases = [state.setdefault(k, state[weight].new_zeros(len(state[weight]))) for k in keys]
            state[f"{attn}qkv.bias_mask"] = torch.cat([torch.full_like(b, float(b.any())) for b in biases])
