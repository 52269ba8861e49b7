"""
Hugging Face's and timm's layouts of DINOv2 and DINOv3 -> tensors under Meta's names, which are this project's.

    hf download kaiko-ai/midnight --local-dir=midnight             # pip install huggingface_hub
    python eval_bach.py --weights=midnight --bach_dir=data/bach    # reads the folder; so does train.py --weights=
    python prepare/convert.py --weights=midnight --out=midnight.pth

It reads a .bin, .pth or .safetensors file, or a folder with model.safetensors, pytorch_model.bin or their shards; of
transformers' Dinov2Model (Midnight is one), Dinov2WithRegistersModel and DINOv3ViTModel, and of timm's vision
transformers. config.json tells what shapes do not, preprocessor_config.json or config.json the normalisation.
docs/weights.md lists the models. For the 7B on 8 ranks, write the .pth once: Hugging Face's files have queries, keys
and values apart, and every rank that reads the folder joins them in memory of its own, 8 GB each. A .pth is mapped, so
all ranks of a node share it.
"""
import json
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure

weights = ""  # folder or file
out = ""      # .pth to write; any script takes it as its weights
arch = ""     # a name in model.ARCHS; needed without a config.json where sizes do not tell the model
norm = None   # as train.py's; None = as preprocessor_config.json or config.json states

UNTOLD = ("num_heads", "norm_eps", "rope_base", "pos_antialias", "pos_offset")  # fields that shapes do not tell

WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict")  # keys under which files hold the tensors
PREFIXES = {"model", "teacher", "backbone", "encoder"}  # parts of names in front of a backbone's

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


def backbone_tensors(path, stored):
    """
    {name: tensor} of the backbone in a weight file's dictionary, without the prefixes that training adds; {} if there
    is none. Heads are left out, and so is a student beside its teacher.
    """
    tensors = stored
    while inner := [tensors[key] for key in WRAPPERS if isinstance(tensors.get(key), dict)]:
        tensors = inner[0]
    wrapped = re.compile(r"(?<![^.])(module|_orig_mod)\.")
    tensors = {wrapped.sub("", str(name)): t for name, t in tensors.items() if torch.is_tensor(t)}
    found = [name.removesuffix("cls_token") for name in tensors if name.endswith("cls_token")]
    roots = [root for root in found if PREFIXES.issuperset(root.split(".")[:-1])]
    root = max(roots, key=lambda root: "teacher" in root, default="")
    if found and not roots and not found[0].endswith("embeddings."):
        raise ValueError(f"{path}: its class token is called {found[0]}cls_token, so it is a part of some other model; "
                         "save the tensors of its vision transformer alone, without that prefix")
    tensors = {name.removeprefix(root): t for name, t in tensors.items() if name.startswith(root)}
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): t for name, t in tensors.items()}  # chunked names


def released_names(state):
    """Whether names are Meta's. timm's are alike, but it has no mask token."""
    return "mask_token" in state and "reg_token" not in state


def has_released_names(path, stored):
    return released_names(backbone_tensors(path, stored))


def released(path, state, arch):
    """
    Tensors as Meta, Hugging Face or timm name them -> ({Meta's name: tensor}, {field of ViTConfig that shapes do not
    tell: value}). `arch` is the ViTConfig that was asked for, or None. Raises ValueError naming the file.
    """
    if released_names(state):
        return state, {}
    if any(name.endswith("embeddings.cls_token") for name in state):
        state, told, rope = from_hugging_face(path, state)
    elif "cls_token" in state:
        state, told, rope = from_timm(path, state)
    else:
        return state, {}
    told |= {"num_heads": arch.num_heads} if arch and "num_heads" not in told else {}
    if "num_heads" not in told:
        raise ValueError(f"{path}: no config.json beside it, which tells the heads; put it there or state arch=...")
    if rope and "rope_embed.periods" not in state:
        like = model.replace(arch or model.ViTConfig(), embed_dim=state["cls_token"].shape[-1], **told)
        state["rope_embed.periods"] = model.rope_periods(like)  # in no file; Meta's are rounded to bf16
    if arch and arch.local_cls_norm:  # for training only, and in no file; it starts as the final norm
        state |= {f"local_cls_{name}": state[name].clone() for name in ("norm.weight", "norm.bias")}
    if arch and arch.qkv_bias and arch.mask_k_bias:  # timm leaves out biases that are zero in Meta's files
        for name in [name for name in state if name.endswith("attn.qkv.weight")]:
            for part in ("bias", "bias_mask"):
                state.setdefault(name.replace("weight", part), state[name].new_zeros(len(state[name])))
    return state, told


def from_hugging_face(path, tensors):
    rope = not any("encoder.layer." in key for key in tensors)
    # transformers resamples positions to the size itself, with antialias only in the class that may have registers
    antialias = any(key.endswith("register_tokens") for key in tensors)  # an empty tensor if it has none
    told = {} if rope else {"pos_antialias": antialias, "pos_offset": 0.0}
    state = meta_names(path, tensors, rope)
    join_attention(state, rope)
    config = read_json(path, "config.json")
    width = state["cls_token"].shape[-1]
    needed = {"hidden_size": width, "hidden_act": "silu" if "blocks.0.mlp.w1.weight" in state else "gelu"}
    for key, value in needed.items():
        ignored = key == "hidden_act" and config.get("use_swiglu_ffn")  # DINOv2's SwiGLU is silu in any case
        if config.get(key, value) != value and not ignored:
            raise ValueError(f"{path}: config.json states {key} = {config[key]}, but these weights need {value}")
    fields = {"num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps", "rope_theta": "rope_base"}
    return state, told | {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}, rope


def from_timm(path, tensors):
    """timm's VisionTransformer (DINOv2) and Eva (DINOv3). Also Meta's files that lack the mask token."""
    rope = any(key.endswith("gamma_1") for key in tensors)
    state = timm_names(tensors, rope)
    D = state["cls_token"].shape[-1]
    state.setdefault("mask_token", state["cls_token"].new_zeros(1, D))  # only training needs it
    without_scale = not any(name.endswith("gamma") for name in state)
    for name in [name for name in state if name.endswith("attn.qkv.weight")]:
        block = name.removesuffix("attn.qkv.weight")
        if f"{block}attn.q_bias" in state:
            q, v = (state.pop(f"{block}attn.{part}_bias") for part in "qv")
            set_masked_bias(state, f"{block}attn.", [q, torch.zeros_like(q), v])
        for scale in ("ls1", "ls2") if without_scale else ():
            state[f"{block}{scale}.gamma"] = state[name].new_ones(D)
    like = model.infer_arch(path, state)
    if {"register_tokens", "storage_tokens", "blocks.0.mlp.w12.weight"} & tensors.keys():  # Meta's
        return state, {"num_heads": like.num_heads}, False
    stated = read_json(path, "config.json").get("model_args", {})
    heads = stated.get("num_heads") or model.known_heads(like)
    if stated.get("embed_dim", D) != D or D % (heads or 1):
        raise ValueError(f"{path}: the config.json beside it is another model's, as these weights are {D} wide")
    told = {"num_heads": heads} if heads else {}
    if "pos_embed" in state:
        join_positions(path, state)
        told |= {"pos_antialias": True, "pos_offset": 0.0}
    return state, told, rope


def timm_names(tensors, rope):
    """The tensors under Meta's names, without a classifier."""
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    packed = None not in (up, down) and len(up) == 2 * down.shape[1]  # SwiGLUPacked: gate and value in one matrix
    table = {"reg_token": "storage_tokens" if rope else "register_tokens",
             "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "fc1_g.": "w1.", "fc1_x.": "w2."}
    if packed:
        table |= {"mlp.fc1.": "mlp.w12."}
    if packed or "blocks.0.mlp.fc1_g.weight" in tensors:
        table |= {"mlp.fc2.": "mlp.w3."}
    return {renamed(key, table): t for key, t in tensors.items() if not key.startswith("head.")}


def renamed(name, table):
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name


def join_positions(path, state):
    """
    A table with an entry for the class token and none for registers, in place. timm's may also have none at all
    (no_embed_class), or one for each of them: then a register and its position are one sum.
    """
    table, registers = state["pos_embed"], state.get("register_tokens")
    count, entries = 0 if registers is None else registers.shape[1], table.shape[1]
    for prefix in (1, 0, 1 + count):
        patches = max(entries - prefix, 2)
        if math.isqrt(patches) ** 2 == patches:
            break
    else:
        raise ValueError(f"{path}: a position table of {entries} entries is not square, with or without those of the "
                         f"class token and {count} registers")
    front, patches = table.split([prefix, entries - prefix], dim=1)
    if prefix > 1:
        state["register_tokens"] = registers.float() + front[:, 1:].float()
    cls = front[:, :1] if prefix else torch.zeros_like(table[:, :1])
    state["pos_embed"] = torch.cat([cls, patches], dim=1)


def tensor_files(path):
    """A weight file itself; of a folder its model*.safetensors, or else pytorch_model*.bin. ValueError without any."""
    if not Path(path).is_dir():
        files = [Path(path)]
    else:
        files = sorted(Path(path).glob("model*.safetensors")) or sorted(Path(path).glob("pytorch_model*.bin"))
    if not files or not files[0].exists():
        raise ValueError(f"{path}: no such weight file, or a folder without model.safetensors and pytorch_model.bin")
    return files


def read_tensors(path):
    """All tensors of a folder, or of a .safetensors file."""
    files = tensor_files(path)
    if files[0].suffix == ".bin":
        return {name: t for file in files for name, t in model.read_pth(file).items()}
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
        name = renamed(key.removeprefix(root[0]), table)
        if name in state:
            raise ValueError(f"{path}: holds {name} twice, under two layouts' names")
        if tensor.numel() and not name.startswith("classifier."):  # without registers, theirs are an empty tensor
            state[name] = tensor
    state.setdefault("mask_token", torch.zeros_like(state["cls_token"]))  # a model may be saved without one
    state["mask_token"] = state["mask_token"].flatten(0, -2)
    return state


def join_attention(state, rope):
    """Join queries, keys and values to qkv in every block that has all three, in place."""
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        attn = name.removesuffix("q.weight")
        biases = [f"{attn}{part}.bias" for part in "qkv"]
        if rope and any(bias in state for bias in biases):
            zeros = state[name].new_zeros(len(state[name]))
            set_masked_bias(state, attn, [state.pop(bias, zeros) for bias in biases])
        for parts in ([f"{attn}{part}.weight" for part in "qkv"], biases):
            if all(part in state for part in parts):
                state[parts[0].replace(".q.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])


def set_masked_bias(state, attn, biases):
    """
    DINOv3's bias, from those of queries, keys and values, and its mask. The mask is off for a bias that is all zero, as
    in Meta's files: so such a bias does not train.
    """
    state[f"{attn}qkv.bias"] = torch.cat(biases)
    state[f"{attn}qkv.bias_mask"] = torch.cat([torch.full_like(t, float(t.any())) for t in biases])


def stored_norm(path):
    """(mean, std) in preprocessor_config.json, or in timm's config.json. ValueError where neither states it."""
    config = read_json(path, "preprocessor_config.json")
    if config.get("do_normalize", True) and {"image_mean", "image_std"} <= config.keys():
        return config["image_mean"], config["image_std"]
    timm = read_json(path, "config.json")
    timm = timm.get("pretrained_cfg", timm)
    if not config and {"mean", "std"} <= timm.keys():
        return timm["mean"], timm["std"]
    raise ValueError(f"{path}: no preprocessor_config.json with image_mean and image_std, and no config.json of timm, "
                     "so its pixels' range is unknown; pass --norm=half (Midnight, Kaiko), --norm=h_optimus, "
                     "--norm=hibou or --norm=imagenet (Meta, UNI, Virchow, GigaPath, Phikon)")


if __name__ == "__main__":
    configure(globals())
    try:
        state, fitting = model.open_weights(weights, arch or None)
        stated = model.stored_norm(weights) if norm is None else model.norm_values(norm)
        told = {field: getattr(fitting, field) for field in UNTOLD}
        torch.save({"teacher": state, "arch": told, "config": {"norm": stated}}, out)
        print(f"{out}: {model.load_backbone(out).arch}")
    except (ValueError, OSError, RuntimeError) as e:
        raise SystemExit(f"prepare/convert.py: {e}") from None
