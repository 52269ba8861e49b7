"""
The tile encoder over a folder of tiles: one file of their embeddings, with their names.

    python prepare/embed.py --image_dir=data/crc --weights=out/x/teacher/5000.pth --out=crc.npz
    python prepare/embed.py --image_dir=data/crc --weights=midnight/ --feature=both --out=crc.parquet

    crc.npz        features (n, D) fp32; files (n,), each the path below image_dir; weights, norm, input_px, feature
    crc.parquet    columns file and feature, the rest in the schema's metadata; needs pyarrow

Images lie in image_dir or in any folders below it, such as one per class. They are resized and cropped as
eval_slides.py --image_dir does, and take their pixels' normalisation from the weights. A file that cannot be read is
named, and listed in OUT.left_out.csv; the others get done, and the exit status is 1.
"""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_bach
import eval_slides
import listing
import model
from configurator import configure, run

image_dir = ""    # folder of tiles
weights = ""      # file or folder, any that docs/weights.md lists
out = ""          # .npz or .parquet to write
feature = "cls"   # "cls", "patches" (their mean) or "both"
input_px = eval_bach.SIZE  # side of the network's input
arch = ""         # name in model.ARCHS; "" = as the file tells
norm = None       # "imagenet", "half" (Midnight, Kaiko), (mean, std); None = the model's own
batch_size = 64   # tiles per forward pass
device = "cuda" if torch.cuda.is_available() else "cpu"

CHUNK = 1024      # tiles in memory at a time, 150 KB each at 224 px


def read_some(paths, view, left_out):
    """{path: pixels} of those that can be read; the reasons of the others go into left_out."""
    def read(path):
        try:
            return eval_bach.read_image(path, view)[0]
        except ValueError as e:
            left_out[path] = str(e)
    with ThreadPoolExecutor(8) as pool:
        images = dict(zip(paths, pool.map(read, paths)))
    return {path: image for path, image in images.items() if path not in left_out}


def embed_files(paths, backbone, mean_std, config, left_out):
    """([path], features fp32 (n, D)) of the files that can be read."""
    view = eval_bach.View(config["input_px"], concat=config["feature"] != "cls")
    done, features = [], []
    bar = listing.bar(paths, "embed", unit="tile")
    for at in range(0, len(paths), CHUNK):
        some = paths[at : at + CHUNK]
        if pixels := read_some(some, view, left_out):
            done += list(pixels)
            features.append(eval_bach.embed(backbone, list(pixels.values()), *mean_std, config["device"], view,
                                            batch_size=config["batch_size"]))
        bar.update(len(some))
    bar.close()
    if not done:
        raise ValueError(f"image_dir={config['image_dir']}: none of {len(paths)} images can be read, such as "
                         f"{next(iter(left_out.values()))}")
    features = torch.cat(features)
    return done, features[:, backbone.arch.embed_dim :] if config["feature"] == "patches" else features


def write(out, files, features, about):
    """The .npz or .parquet, in one step."""
    with open(f"{out}.part", "wb") as f:
        if out.endswith(".npz"):
            np.savez(f, features=features, files=np.array(files), **about)
        else:
            import pyarrow as pa
            import pyarrow.parquet
            column = pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
            table = pa.table({"file": files, "feature": column}, metadata={k: json.dumps(v) for k, v in about.items()})
            pyarrow.parquet.write_table(table, f)
    os.replace(f"{out}.part", out)


def main(config):
    image_dir, weights, out, norm = (config[key] for key in ("image_dir", "weights", "out", "norm"))
    if not os.path.isdir(image_dir) or not weights or not out.endswith((".npz", ".parquet")):
        raise ValueError("give --image_dir=FOLDER, --weights=FILE and --out=FILE.npz or FILE.parquet")
    if config["feature"] not in ("cls", "patches", "both"):
        raise ValueError(f"feature={config['feature']}: give cls, patches (their mean) or both")
    if out.endswith(".parquet"):
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(f"out={out}: pip install pyarrow, or give a .npz") from None
    paths, left_out = listing.find(image_dir, "image_dir", eval_slides.TYPES)
    backbone = model.load_backbone(weights, config["arch"] or None).to(config["device"])
    if config["input_px"] < 1 or config["input_px"] % backbone.arch.patch_size:
        raise ValueError(f"input_px={config['input_px']}: no multiple of the patch, {backbone.arch.patch_size} px")
    mean_std = model.stored_norm(weights) if norm is None else model.norm_values(norm)
    about = {"weights": weights, "norm": mean_std, "input_px": config["input_px"], "feature": config["feature"]}
    about["weights_sha256"] = model.sha256_of(weights)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    done, features = embed_files(paths, backbone, mean_std, config, left_out)
    write(out, [os.path.relpath(path, image_dir) for path in done], features.numpy(), about)
    listing.say_left_out(left_out, print, f"{out}.left_out.csv")
    print(f"{out}: {len(done)} images, {features.shape[1]} numbers each, {len(left_out)} left out")
    if len(done) < len(paths):
        raise SystemExit(1)


if __name__ == "__main__":
    run("prepare/embed.py", main, configure(globals()))
