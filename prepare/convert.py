"""
Hugging Face's and timm's layouts of DINOv2 and DINOv3 -> tensors under Meta's names, which are this project's.

    hf download kaiko-ai/midnight --local-dir=midnight             # pip install huggingface_hub
    python eval_bach.py --weights=midnight --bach_dir=data/bach    # reads the folder; so does train.py --weights=
    python prepare/convert.py --weights=midnight --out=midnight.pth

It reads a .bin, .pth, .ckpt or .safetensors file, or a folder with model.safetensors, pytorch_model.bin or shards; of
transformers' Dinov2Model (Midnight is one), Dinov2WithRegistersModel and DINOv3ViTModel, and of timm's vision
transformers. config.json tells what shapes do not, preprocessor_config.json or config.json the normalisation.
docs/weights.md lists the models. For the 7B on 8 ranks, write the .pth once: Hugging Face's files have queries, keys
and values apart, and every rank that reads the folder joins them in memory of its own, 8 GB each. A .pth is mapped, so
all ranks of a node share it.
"""
import argparse
import json
import math
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure, run

weights = ""  # folder or file
out = ""      # .pth to write; any script takes it as its weights
arch = ""     # a name in model.ARCHS; needed without a config.json where sizes do not tell the model
norm = None   # as train.py's; None = as preprocessor_config.json or config.json states

UNTOLD = ("num_heads", "norm_eps", "rope_base", "pos_antialias", "pos_offset")  # fields that shapes do not tell

# what stands in front of a backbone's names, as words between dots and underscores
AVERAGED = {"teacher", "ema", "target", "momentum", "averaged", "swa"}
ADDED = AVERAGED | {"", *("state dict model module backbone encoder net network ssl params pretrained checkpoint orig "
                          "mod forward fsdp wrapped vit dinov2 dinov3 with registers").split()}
WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
UNUSED = re.compile(r"(\w*head\w*|classifier)\.|n_averaged$|.*/")  # names that stand beside a backbone's
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
IN_FOLDER = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")

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


def read_stored(path):
    """The dictionary in a weight file, in that of a folder, or in all shards. ValueError names the file."""
    return {name: t for file in weight_files(Path(path)) for name, t in read_file(file).items()}


def weight_files(path):
    """The files of a model, from its folder, its only file, or any of its shards."""
    folder, name = path.parent, path.name
    if path.is_dir():
        held = sorted(file.name for file in path.iterdir())
        models = [name for name in held if IN_FOLDER.fullmatch(name)]
        if not models:
            raise ValueError(f"{path}: a folder without model.safetensors and pytorch_model.bin; it holds "
                             f"{', '.join(held[:4]) or 'nothing'}; give the weight file itself")
        folder, name = path, min(models, key=lambda name: (name.startswith("pytorch"), "-of-" in name))
    if not (shard := SHARD.fullmatch(name)):
        return [folder / name]
    start, count, end = shard.groups()
    shards = [folder / f"{start}-{i:05}-of-{count}{end}" for i in range(1, int(count) + 1)]
    if missing := [file.name for file in shards if not file.exists()]:
        raise ValueError(f"{path}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; "
                         "fetch them into the same folder")
    return shards


def read_file(path):
    """The dictionary in a .pth, .bin, .ckpt or .safetensors file; its first bytes tell which it is, not its name."""
    try:
        with open(path, "rb") as f:
            head = f.read(64)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such weight file; none is fetched here, docs/weights.md says how") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:
        return read_safetensors(path)
    zipped = zipfile.is_zipfile(path)
    if zipped or head.startswith(b"\x80"):  # a pickle's first byte
        return read_pickle(path, zipped)
    fault = f"begins with {head[:16]!r}"
    if not head or head.startswith(b"PK"):
        fault = "is cut short" if head else "is empty"
    elif head.startswith(b"version https://git-lfs"):
        fault = "is git LFS's pointer to it: run git lfs pull in its folder"
    elif head.lstrip().startswith(b"<"):
        fault = "is a web page: the site may ask for a login, or for its terms to be accepted"
    raise ValueError(f"{path}: not a whole weight file, as it {fault}; fetch it again, or give the weights' own "
                     "file or folder")


def read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a whole .safetensors file, fetch it again ({str(e)[:120]})") from None


def read_pickle(path, zipped):
    mapped = zipped and path.suffix != ".safetensors"  # torch believes that name
    try:
        # DINO, iBOT and MAE keep their flags in a Namespace
        with open(path, "rb") as f, torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # a damaged pickle raises anything
        refused = re.search(r"GLOBAL (\S+)", str(e))
        why = f"fetch it again ({str(e).partition(chr(10))[0][:120]})"
        if refused:
            why = (f"it holds {refused[1]}; if you trust it, read it with weights_only=False where that code is "
                   "installed, and save the state_dict() alone, gathered if the model is sharded")
        raise ValueError(f"{path}: not a whole file of plain tensors: {why}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: holds a {type(stored).__name__} and no dictionary of tensors; save the state dict "
                         "alone")
    return stored


def header_of(stored):
    """{"arch", "step", "config"} of this project's teacher file, {} for others, whose arch and config are their own."""
    arch, config = stored.get("arch") or "", stored.get("config", {})
    fields = model.ViTConfig.__dataclass_fields__.keys()
    known = isinstance(config, dict) and (isinstance(arch, str) or isinstance(arch, dict) and arch.keys() <= fields)
    return {k: stored[k] for k in ("arch", "step", "config") if known and "teacher" in stored and k in stored}


def all_tensors(stored, at=""):
    """{keys, with / between, and name: tensor} of all tensors in a file, however deep its dictionaries and lists."""
    tensors = {}
    for key, value in stored.items():
        inner = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(inner, dict):
            tensors |= all_tensors(inner, f"{at}{key}/")
        elif torch.is_tensor(value):
            tensors[f"{at}{key}"] = value
    return tensors


def backbone_tensors(path, stored):
    """
    {name: tensor} of the backbone in a weight file's dictionary, without the keys and prefixes that training adds, and
    without heads. Beside a student or raw weights, a teacher or an average is taken. A warning says what is not.
    """
    tensors = all_tensors(stored)
    tokens = [name for name in tensors if re.search(r"(^|[./])cls_token$", name)]
    names = {name.removesuffix("cls_token").removesuffix("embeddings."): name for name in tokens}
    words = {root: set(re.split("[./_]", root)) for root in names}
    known = [root for root in words if words[root] <= ADDED]
    # mmengine swaps its two: the average is under state_dict, and ema_state_dict holds what is trained
    averaged = [root for root in known if words[root] & AVERAGED and "message_hub" not in stored]
    states = {root: below(path, tensors, root) for root in averaged or words}
    if not states:
        held = ", ".join(list(tensors)[:3]) or f"no tensors, but {', '.join(map(str, list(stored)[:5])) or 'nothing'}"
        raise ValueError(f"{path}: there is no DINOv2 or DINOv3 backbone in this file, as no tensor is called "
                         f"cls_token; it holds {held}")
    (root, state), *others = states.items()
    if unlike := [names[other] for other, its in others if not equal(its, state)]:
        raise ValueError(f"{path}: holds several backbones, and no name tells which is the teacher or the average: "
                         f"those of {names[root]}, {', '.join(unlike)}; save one alone, as {{'teacher': its tensors}}")
    if root not in known:
        raise ValueError(f"{path}: its class token is called {names[root]}, so it is a part of some other model, or a "
                         "student alone; save the tensors of its vision transformer alone, without that prefix")
    left = [names[other] for other in words if other not in states]
    if not averaged:  # averages without a backbone's names, as those in lists
        left += [name for name, t in tensors.items() if t.dim() > 1 and re.search(r"(^|[./_])(ema|teacher)[./_]", name)]
    if left and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"{path}: the backbone of {names[root]} is taken, and not that of {', '.join(left[:3])}")
    return state


def below(path, tensors, root):
    """The tensors whose names start with `root`, under the names that a backbone gives them, without heads."""
    state = {}
    for name in [name for name in tensors if name.startswith(root)]:
        ours = WRAPPER.sub("", name.removeprefix(root))
        ours = re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", ours)  # blocks in chunks: blocks.CHUNK.BLOCK
        if ours in state:
            raise ValueError(f"{path}: holds {root}{ours} twice, under two spellings")
        if not UNUSED.match(ours):
            state[ours] = tensors[name]
    return state


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_values(path, state):
    """ValueError unless all tensors are whole and hold finite floating-point numbers."""
    for name, t in state.items():
        flat = t.dim() < 2 and "patch_embed" in name and name.endswith("weight")
        if flat or t.is_meta or type(t) not in (torch.Tensor, torch.nn.Parameter):  # FSDP's DTensors, or flat rows
            raise ValueError(f"{path}: {name} is no whole tensor but {type(t).__name__} {tuple(t.shape)}, as one rank "
                             "of several saves it; gather the model first (get_model_state_dict, full_state_dict=True) "
                             "or take the teacher that its trainer exports")
        if t.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{path}: {name} is {t.dtype}, which needs a scale; quantised weights do not load: take "
                             "the model in fp32, bf16 or fp16")
    # aminmax reads 3 GB a second on one core; isfinite is ten times as slow
    bad = [name for name, t in state.items() if t.numel() and not all(end.isfinite() for end in t.aminmax())]
    if bad:
        raise ValueError(f"{path}: {len(bad)} of {len(state)} tensors hold NaN or inf, the first is {bad[0]}; the file "
                         "is damaged or its run had diverged, take an earlier one")


def released_names(state):
    """Whether names are Meta's. timm's are alike, but it has no mask token."""
    return "mask_token" in state and "reg_token" not in state


def released(path, state, arch):
    """
    Tensors as Meta, Hugging Face or timm name them -> ({Meta's name: tensor}, {field of ViTConfig that shapes do not
    tell: value}). `arch` is the ViTConfig that was asked for, or None. Raises ValueError naming the file.
    """
    if released_names(state):
        return state, {}
    if "embeddings.cls_token" in state:
        state, told, rope = from_hugging_face(path, state)
    else:
        state, told, rope = from_timm(path, state)
    told["num_heads"] = told.get("num_heads") or arch and arch.num_heads
    if not told["num_heads"]:
        beside = "a config.json without heads" if read_json(path, "config.json") else "no config.json"
        raise ValueError(f"{path}: {beside} beside it, which tells the heads; put it there or state arch=...")
    width = state["cls_token"].shape[-1]
    if width % told["num_heads"]:
        raise ValueError(f"{path}: {told['num_heads']} heads do not divide the width of {width}; is its config.json "
                         "another model's?")
    if rope and "rope_embed.periods" not in state:
        like = model.replace(arch or model.ViTConfig(), embed_dim=width, **told)
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
    stated = read_json(path, "config.json").get("model_args") or {}
    heads = stated.get("num_heads") or like.num_heads
    if stated.get("embed_dim", D) != D or D % (heads or 1):
        raise ValueError(f"{path}: the config.json beside it is another model's, as these weights are {D} wide")
    told = {ours: value for ours, value in (("num_heads", heads), ("norm_eps", stated.get("norm_eps"))) if value}
    needed = "silu" if like.ffn == "swiglu" else "gelu"
    act_layer = (stated.get("act_layer") or needed).lower().removeprefix("torch.nn.")
    if act_layer != needed and (act_layer, needed) != ("swish", "silu"):
        raise ValueError(f"{path}: config.json states act_layer = {stated['act_layer']}, but these weights need "
                         f"{needed}")
    if "pos_embed" in state:
        join_positions(path, state)
        told |= {"pos_antialias": True, "pos_offset": 0.0}
    return state, told, rope


def timm_names(tensors, rope):
    """The tensors under Meta's names."""
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    packed = None not in (up, down) and len(up) == 2 * down.shape[1]  # SwiGLUPacked: gate and value in one matrix
    table = {"reg_token": "storage_tokens" if rope else "register_tokens",
             "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "fc1_g.": "w1.", "fc1_x.": "w2."}
    if packed:
        table |= {"mlp.fc1.": "mlp.w12."}
    if packed or "blocks.0.mlp.fc1_g.weight" in tensors:
        table |= {"mlp.fc2.": "mlp.w3."}
    return {renamed(key, table): t for key, t in tensors.items()}


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
    """The tensors under Meta's names, except attention's."""
    mlp = GATED if any("gate_proj." in key for key in tensors) else PLAIN
    table, state = DINOV3 | mlp if rope else DINOV2, {}
    for key, tensor in tensors.items():
        name = renamed(key, table)
        if name in state:
            raise ValueError(f"{path}: holds {name} twice, under two layouts' names")
        if tensor.numel():  # without registers, theirs are an empty tensor
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


def main():
    state, fitting = model.open_weights(weights, arch or None)
    stated = model.stored_norm(weights) if norm is None else model.norm_values(norm)
    told = {field: getattr(fitting, field) for field in UNTOLD}
    torch.save({"teacher": state, "arch": told, "config": {"norm": stated}}, out)
    print(f"{out}: {model.load_backbone(out).arch}")


if __name__ == "__main__":
    configure(globals())
    run("prepare/convert.py", main)
