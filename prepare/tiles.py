"""
JPEG tiles of slides for training, one tar per slide, which train.py reads as --shards=data/tiles.

    python prepare/tiles.py --slides='slides/*.svs' --out=data/tiles --mpps=0.5,1.0 --workers=16   # all tissue
    python prepare/tiles.py ... --tiles_per_slide=500 --tissue_share=0.6                           # a random sample
    python prepare/tiles.py ... --coords=data/coords            # the places in TRIDENT's or CLAM's files

    data/tiles/A.tar     A_500nm_10240_8192.jpg, A_500nm_10240_8192.json, ...: WebDataset's convention
    data/tiles/A.json    where each tile lies in A.tar and what was left out; written last, so A.tar is complete

A rerun skips the slides whose .json is there. Several nodes take parts of the list: --part=3/16 (prepare/slides.py).
"""
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.coords import find_coords, grid, need_h5py
from prepare.slides import open_slide, run, walk

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpps = (0.5,)       # um/px of the tiles, one or several
tile_px = 256
tissue_share = 0.0  # share of a tile's pixels in Midnight's range of HSV; 0 = no test
tiles_per_slide = 0 # random places per slide and mpp instead of the grid; 0 = the grid
coords = ""         # folder of TRIDENT's or CLAM's .h5 to take the places from; "" = grid or random
jpeg_quality = 90
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient
region_mb = 16      # memory of one read per worker; larger reads leave the cache and are slower
seed = 0            # of random places

MAX_DAMAGED = 0.05  # share of damaged tiles above which a slide fails
ROUNDS = 20         # of random draws, until tiles_per_slide tiles have passed min_tissue and tissue_share


def mask_share(slide, xy, size, mpp):
    """Share of tissue in tiles at any places (N, 2), to whole cells of the mask: (N,)."""
    mask, cell = slide.tissue_mask()
    first = np.maximum(np.rint(xy / np.array(cell)), 0).astype(int)
    last = np.maximum(np.rint((xy + np.array(slide.extent(size, mpp))) / np.array(cell)), 0).astype(int)
    inside = [mask[top:bottom, left:right].sum() for (left, top), (right, bottom) in zip(first, last)]
    return np.array(inside).reshape(-1) / np.maximum(last - first, 1).prod(1)


def random_places(slide, name, config, mpp, kept):
    """Batches (xy, tissue share) of distinct random places, until kept[mpp] tiles have come of them.

    The places are a function of the seed, the slide's name and the mpp.
    """
    digest = hashlib.blake2b(f"{config['seed']} {name} {mpp:g}".encode(), digest_size=8).digest()
    rng, seen = np.random.default_rng(int.from_bytes(digest, "big")), set()
    for _ in range(ROUNDS):
        missing = config["tiles_per_slide"] - kept[mpp]
        if not missing:
            return
        drawn = dict.fromkeys(slide.random_tissue(rng, config["tile_px"], mpp) for _ in range(missing))
        xy = np.array([place for place in drawn if place not in seen], np.int32).reshape(-1, 2)
        seen.update(drawn)
        tissue = mask_share(slide, xy, config["tile_px"], mpp)
        enough = tissue >= config["min_tissue"]
        yield xy[enough], tissue[enough]


def places(slide, name, config, kept, skipped):
    """Yields (size, mpp, xy, tissue share) in batches; skipped[mpp] says why a scale has none, or too few."""
    if config["coords"]:
        xy, size, mpp = find_coords(slide, name, config)
        yield size, mpp, xy, mask_share(slide, xy, size, mpp)
        return
    size, wanted = config["tile_px"], config["tiles_per_slide"]
    for mpp in config["mpps"]:
        try:
            slide.extent(size, mpp)  # is the slide fine enough?
            batches = random_places(slide, name, config, mpp, kept) if wanted else [grid(slide, config, mpp)]
        except wsi.SlideError as e:
            skipped[f"{mpp:g}"] = str(e).removeprefix(f"{slide.path}: ")
            continue
        for xy, tissue in batches:
            yield size, mpp, xy, tissue
        if kept[mpp] < wanted:
            skipped[f"{mpp:g}"] = f"{kept[mpp]} of {wanted} tiles, after {ROUNDS} draws"


def read(slide, batches, config):
    """Yields (mpp, x, y, tissue share, tile, error), region by region; only a damaged tile has an error."""
    for size, mpp, xy, tissue in batches:
        for rows in slide.regions(xy, size, mpp, config["region_mb"]):
            tiles, errors = slide.read_tiles(xy[rows], size, mpp)
            for i, row in enumerate(rows):
                yield mpp, *xy[row].tolist(), round(float(tissue[row]), 4), tiles[i], errors.get(i)


def check_damage(bad, count):
    if len(bad) > MAX_DAMAGED * count:
        raise wsi.SlideError(f"{len(bad)} of {count} tiles are damaged, such as {next(iter(bad.values()))}")


def jpeg(tile, quality):
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling=0)  # full chroma: stain is colour
    return buffer.getvalue()


def add(tar, name, data):
    """Append a file and return where its data begins. It has no time and no owner: equal tiles give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return tar.fileobj.tell() - blocks * tarfile.BLOCKSIZE


def write_tiles(path, name, file, part, config):
    """Write one slide's tar and then its sidecar, see the header."""
    table = {column: [] for column in ("offset", "size", "x", "y", "mpp", "tissue")}
    kept, skipped, bad, seen = Counter(), {}, {}, 0
    about = {"slide": os.path.basename(path), "patient": wsi.patient_of(path, config["patient"])}
    with closing(open_slide(path, config)) as slide, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        slide.check_levels()
        batches = places(slide, name, config, kept, skipped)
        for mpp, x, y, tissue, tile, error in read(slide, batches, config):
            seen += 1
            if error:
                bad[f"{x},{y},{mpp:g}"] = error.removeprefix(f"{path}: ")
            elif not config["tissue_share"] or wsi.is_tissue(tile, config["tissue_share"]):
                kept[mpp] += 1
                key, place = f"{name}_{round(1000 * mpp)}nm_{x}_{y}", {"x": x, "y": y, "mpp": mpp, "tissue": tissue}
                data = jpeg(tile, config["jpeg_quality"])
                row = {"offset": add(tar, f"{key}.jpg", data), "size": len(data), **place}
                add(tar, f"{key}.json", json.dumps(about | place).encode())
                for column, value in row.items():
                    table[column].append(value)
    check_damage(bad, seen)
    if not kept:
        raise wsi.SlideError("; ".join(skipped.values()) or f"none of {seen} tiles passed min_tissue and tissue_share")
    shard = file.removesuffix(".json") + ".tar"
    side = {"version": 1, "tar": os.path.basename(shard), "bytes": os.path.getsize(part), "slide": path, "name": name,
            "patient": about["patient"], "slide_mpp": slide.mpp_xy, "mpp_source": slide.mpp_source,
            "tile_px": len(tile), "bad": bad, "skipped": skipped, **table}
    os.replace(part, shard)
    Path(part).write_text(json.dumps(side))
    os.replace(part, file)
    lacking = "".join(f"; at {mpp} um/px: {reason}" for mpp, reason in skipped.items())
    damaged = f", {len(bad)} damaged ones left out" if bad else ""
    return f"{len(table['x'])} tiles{damaged}{lacking}"


def main(config):
    mpps = config["mpps"]
    if not mpps or min(mpps) <= 0 or len({round(1000 * mpp) for mpp in mpps}) < len(mpps):
        raise ValueError(f"mpps={mpps}: give um/px above 0, such as 0.5,1.0, that differ by at least 0.001")
    if config["coords"] and config["tiles_per_slide"]:
        raise ValueError("coords, tiles_per_slide: places from files or random ones, not both")
    if config["coords"]:
        need_h5py()
    walk("tiles", config, write_tiles, ".json", config["workers"])


if __name__ == "__main__":
    run("tiles", main, globals())
