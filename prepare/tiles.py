"""
JPEG tiles of slides for training, one tar per slide, which train.py reads as --shards=data/tiles.

    python prepare/tiles.py --slides='slides/*.svs' --out=data/tiles --mpps=0.5,1.0 --workers=16   # all tissue
    python prepare/tiles.py ... --tiles_per_slide=500 --tissue_share=0.6                           # a sample of it
    python prepare/tiles.py ... --coords=data/coords            # the places in TRIDENT's or CLAM's files

    data/tiles/A.tar     A_500nm_10240_8192.jpg, A_500nm_10240_8192.json, ...: WebDataset's convention
    data/tiles/A.json    where each tile lies in A.tar and what was left out; written last, so A.tar is complete
"""
import io
import json
import os
import sys
import tarfile
import zlib
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
tiles_per_slide = 0 # so many of the places per slide and mpp, at random; 0 = all
coords = ""         # folder of TRIDENT's or CLAM's .h5 to take the places from; "" = the grid over the tissue
jpeg_quality = 90
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient
seed = 0            # of the random choice

MAX_DAMAGED = 0.05  # share of damaged tiles above which a slide fails


def places(slide, name, config, skipped):
    """[(size, mpp, xy, shares of tissue)]; skipped[mpp] says why a scale has none."""
    if config["coords"]:
        xy, size, mpp = find_coords(slide, name, config)
        return [(size, mpp, xy, [None] * len(xy))]  # such files do not say the share
    found = []
    for mpp in config["mpps"]:
        try:
            xy, tissue = grid(slide, config, mpp)
            found.append((config["tile_px"], mpp, xy, tissue.astype(float).round(4).tolist()))
        except wsi.SlideError as e:
            skipped[f"{mpp:g}"] = str(e).removeprefix(f"{slide.path}: ")
    return found


def order(slide, name, size, mpp, xy, kept, config):
    """
    Yields rows of xy, neighbours one after the other: of all places, or of random ones until kept[mpp] is
    tiles_per_slide. Which ones is a function of the seed, the slide's name and the mpp.
    """
    wanted, rest = config["tiles_per_slide"], np.arange(len(xy))
    if wanted:
        np.random.default_rng([config["seed"], zlib.crc32(name.encode()), round(1000 * mpp)]).shuffle(rest)
    while len(rest) and (not wanted or kept[mpp] < wanted):
        some, rest = np.split(rest, [wanted - kept[mpp] if wanted else len(rest)])
        yield from some[slide.order(xy[some], size, mpp)]


def read(slide, name, config, kept, skipped):
    """Yields (mpp, x, y, tissue share, tile, error); only a damaged tile has an error."""
    for size, mpp, xy, tissue in places(slide, name, config, skipped):
        for row in order(slide, name, size, mpp, xy, kept, config):
            (tile,), errors = slide.read_tiles(xy[[row]], size, mpp)
            yield mpp, *xy[row].tolist(), tissue[row], tile, errors.get(0)


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
        for mpp, x, y, tissue, tile, error in read(slide, name, config, kept, skipped):
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
    lacking = [f"nothing at {mpp} um/px: {reason}" for mpp, reason in skipped.items()]
    damaged = [f"{len(bad)} damaged ones left out of {seen} tiles"] if bad else []
    return "; ".join(damaged + lacking)


def main(config):
    mpps = config["mpps"]
    if not mpps or min(mpps) <= 0 or len({round(1000 * mpp) for mpp in mpps}) < len(mpps):
        raise ValueError(f"mpps={mpps}: give um/px above 0, such as 0.5,1.0, that differ by at least 0.001")
    if config["coords"]:
        need_h5py()
    walk("tiles", config, write_tiles, ".json", config["workers"])


if __name__ == "__main__":
    run("tiles", main, globals())
