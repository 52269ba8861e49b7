"""
The tile encoder over whole slides: one file of embeddings per slide, in TRIDENT's layout.

    python prepare/features.py --slides='slides/*.svs' --out=data/features --weights=teacher.pth

    data/features/A.h5    features (N, D) fp16, coords (N, 2) in level-0 px, row by row of the grid; where h5py is
                          missing A.npz with the same names

Places of --coords may have tiles that do not divide into the encoder's patches, such as TRIDENT's of 256 px for patches
of 14 px. Those are resized to the side of the encoder's own input, and the attribute input_px says so.
"""
import functools
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import wsi
from prepare import coords as places
from prepare.slides import open_slide, run, walk
from prepare.tiles import check_damage

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
weights = ""        # the tile encoder: a file or folder, of this project or any that docs/weights.md lists
arch = ""           # of weights that do not say it; "" = found out
norm = None         # "imagenet", "half", (mean, std); None = the weights' own, else imagenet
mpp = 0.5           # um/px of the tiles
tile_px = 0         # a multiple of the encoder's patch; 0 = what it was trained at, or 224 where it does not say
coords = ""         # folder of TRIDENT's or CLAM's .h5 to take the places from; "" = the grid
batch_size = 64     # tiles per forward pass
device = ""         # "cuda" or "cpu"; "" = cuda if there is one
workers = 2         # processes that read ahead of the GPU; slides come one after the other


def read_some(slide, xy, size, mpp, rows):
    """(rows, tiles) of the sound ones and {row: message} of the damaged ones; each worker has its own handle."""
    tiles, errors = slide.read_tiles(xy[rows], size, mpp)
    good = [i for i in range(len(rows)) if i not in errors]
    return rows[good].tolist(), torch.from_numpy(tiles[good]), {int(rows[i]): errors[i] for i in errors}


def encode(slide, xy, size, mpp, px, encoder, config):
    """
    (class tokens fp16 (N, D), {damaged row: message}) of tiles of `size`, which enter the encoder at px x px. Workers
    read ahead, a batch of neighbours each.
    """
    vit, mean, std, device = encoder
    features = torch.zeros(len(xy), vit.arch.embed_dim, dtype=torch.float16, device=device)
    order, n, bad = slide.order(xy, size, mpp), config["batch_size"], {}
    batches = [order[at : at + n] for at in range(0, len(order), n)]
    collate = functools.partial(read_some, slide, xy, size, mpp)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=config["workers"], collate_fn=collate)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        for rows, tiles, errors in loader:
            bad.update(errors)
            if not rows:
                continue
            x = tiles.to(device).permute(0, 3, 1, 2).float() / 255
            try:
                if px != size:
                    x = torch.nn.functional.interpolate(x, (px, px), mode="bilinear", antialias=True)
                features[rows] = vit((x - mean) / std)["cls"].half()
            except RuntimeError as error:  # such as a full GPU: the next slide would fare no better, so stop
                raise OSError(f"the encoder failed: {' '.join(str(error).split())[:300]}") from error
    return features.cpu().numpy(), bad


def write_features(path, name, file, part, config, encoder, about):
    """Write the class tokens of one slide's tiles, row by row."""
    with closing(open_slide(path, config)) as slide:
        slide.check_levels()
        if config["coords"]:
            xy, size, mpp = places.find_coords(slide, name, config)
        else:
            size, mpp = config["tile_px"], config["mpp"]
            xy, _ = places.grid(slide, config, mpp)
        px = about["input_px"] if size % about["patch_size"] else size
        features, bad = encode(slide, xy, size, mpp, px, encoder, config)
        attrs = places.trident_attrs(slide, config, name, size, mpp)
    check_damage(bad, len(xy))
    if not np.isfinite(features).all():
        raise wsi.SlideError("features that are not finite in fp16; are the weights sound?")
    good = np.setdiff1d(np.arange(len(xy)), list(bad))
    arrays = {"features": features[good], "coords": xy[good].astype(np.int64)}
    about = about | {"mpp": mpp, "tile_px": size, "input_px": px, "level0_mpp": slide.mpp}
    about |= {"damaged": len(bad), "name": name}
    places.write_arrays(file, part, arrays, {"features": about, "coords": attrs})
    if len(good) < places.FEW:
        places.say_few()
    return f"{len(bad)} damaged ones left out of {len(xy)} tiles" if bad else ""


def main(config):
    if not config["weights"]:
        raise ValueError("weights: give the tile encoder's file or folder, --weights=FILE")
    if config["coords"]:
        places.need_h5py()
    vit = model.load_backbone(config["weights"], config["arch"] or None).eval()
    patch, px = vit.arch.patch_size, model.read_header(config["weights"]).get("config", {}).get("global_px", 224)
    config["tile_px"] = config["tile_px"] or px
    if config["tile_px"] % patch:
        raise ValueError(f"tile_px={config['tile_px']}: not a multiple of the patch of {patch} px")
    sha256 = model.sha256_of(config["weights"])
    norm = config["norm"]
    mean, std = model.stored_norm(config["weights"]) if norm is None else model.norm_values(norm)
    about = {"encoder": config["arch"] or Path(config["weights"]).stem, "patch_size": patch, "input_px": px,
             "weights": Path(config["weights"]).name, "weights_sha256": sha256, "norm": (mean, std)}
    device = torch.device(config["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    columns = [torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std)]
    job = functools.partial(write_features, encoder=(vit.to(device), *columns, device), about=about)
    keys = {"weights_sha256": sha256, "norm": [mean, std]}
    walk("features", config, job, ".h5" if places.h5py else ".npz", 0, keys)


if __name__ == "__main__":
    run("features", main, globals())
