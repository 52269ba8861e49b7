"""
The tile encoder over whole slides, one file of embeddings each. The task features of wsi.py.

    python wsi.py --task=features --slides='slides/*.svs' --out=data/features --weights=teacher.pth --tile_px=224

    data/features/A.h5         TRIDENT's layout: features (N, D) fp16, coords (N, 2) level-0 px, row by row of the grid;
                               A.npz with the same names where h5py is missing

A rerun goes on: prepare/slides.py. Two processes on one GPU keep it busy between slides.
"""
import functools
import hashlib
import itertools
import os
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import numpy as np

import wsi
from prepare import slides, tiles


def read_region(slide, xy, size, mpp, rows):
    """(rows, tiles) of those that are not damaged, and {row: message} of the others; in a worker, which opens its own
    handle."""
    import torch

    tiles, errors = slide.read_tiles(xy[rows], size, mpp)
    good = [i for i in range(len(rows)) if i not in errors]
    return rows[good].tolist(), torch.from_numpy(tiles[good]), {int(rows[i]): errors[i] for i in errors}


def encode(slide, xy, size, mpp, c, encoder, claim):
    """(class tokens fp16 (N, D), {damaged row: message}); workers read ahead, and a batch spans regions."""
    import torch

    (vit, mean, std, device), rows, tiles, bad, n = encoder, [], [], {}, c["batch_size"]
    loader = torch.utils.data.DataLoader(slide.regions(xy, size, mpp, c["region_mb"]), batch_size=None,
                                         num_workers=c["workers"],
                                         collate_fn=functools.partial(read_region, slide, xy, size, mpp))
    features = torch.zeros(len(xy), vit.arch.embed_dim, dtype=torch.float16, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        for more_rows, more_tiles, errors in itertools.chain(loader, [(None, None, {})]):
            os.utime(claim)
            bad.update(errors)
            rows, tiles = (rows, tiles) if more_rows is None else (rows + more_rows, [*tiles, *more_tiles])
            while len(rows) >= n or (rows and more_rows is None):
                x = torch.stack(tiles[:n]).to(device).permute(0, 3, 1, 2).float() / 255
                features[rows[:n]] = vit((x - mean) / std)["cls"].half()
                rows, tiles = rows[n:], tiles[n:]
    return features.cpu().numpy(), bad


def write_features(path, name, file, c, claim, encoder, about):
    """The class tokens of one slide's tiles, row by row. Returns (tiles, damaged)."""
    with closing(wsi.open_slide(path, c)) as slide:
        slide.check_levels()
        xy, size, mpp = tiles.places_from_file(slide, path, name, c) if c["coords"] else (
            tiles.grid(slide, c, c["mpps"][0])[0], c["tile_px"], c["mpps"][0])
        if size % about["patch_size"]:
            raise wsi.SlideError(f"tiles of {size} px do not divide into patches of {about['patch_size']} px")
        try:
            features, bad = encode(slide, xy, size, mpp, c, encoder, claim)
        except RuntimeError as e:
            if "DataLoader worker" in str(e):
                raise BrokenProcessPool from e
            raise SystemExit(f"features: {path}: {' '.join(str(e).split())[:300]}") from e  # the GPU's memory, say
        attrs = tiles.trident_attrs(slide, c, slides.label(path, name, c, "features"), size, mpp)
    tiles.check_damage(bad, len(xy))
    if not np.isfinite(features).all():
        raise wsi.SlideError("features that are not finite in fp16; are the weights sound?")
    good = np.setdiff1d(np.arange(len(xy)), list(bad))
    arrays = {"features": features[good], "coords": xy[good].astype(np.int64)}
    about = about | {"mpp": mpp, "tile_px": size, "damaged": len(bad), "name": attrs["name"]}
    slides.replace(file, tiles.pack(arrays, {"features": about, "coords": attrs}, os.path.splitext(file)[1]))
    return len(good), len(bad)


def features(c):
    """--task=features: the class token of every tile of the grid, or of places from files; one file a slide."""
    import torch

    import model

    if not c["weights"]:
        raise ValueError("weights: --task=features needs the tile encoder's file, --weights=FILE")
    vit = model.load_backbone(c["weights"], c["arch"] or None).eval()
    if c["device"] not in ("", "cpu", "cuda") or (c["device"] == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={c['device']}: cuda or cpu; cuda needs a GPU that torch sees")
    if c["batch_size"] < 1:
        raise ValueError(f"batch_size={c['batch_size']}: at least 1")
    if c["tile_px"] % vit.arch.patch_size:
        raise ValueError(f"tile_px={c['tile_px']}: not a multiple of the patch of {vit.arch.patch_size} px")
    with open(c["weights"], "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    mean, std = model.stored_norm(c["weights"]) if c["norm"] is None else model.norm_values(c["norm"])
    more = {"weights_sha256": sha256, "norm": [mean, std]}
    about = {"encoder": c["arch"] or Path(c["weights"]).stem, "patch_size": vit.arch.patch_size,
             "weights": os.path.basename(c["weights"]), "weights_sha256": sha256}
    device = torch.device(c["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    try:
        ending = tiles.import_h5py() and ".h5"
    except ValueError:
        ending = ".npz"
    job = functools.partial(write_features, encoder=(vit.to(device), mean, std, device), about=about)
    slides.walk("features", c, job, ending, 0, more)
