"""
From slides to files: places and JPEG tiles for training. The tasks tiles and coords of wsi.py.

    python wsi.py --task=tiles --slides='slides/*.svs' --out=data/tiles --mpps=0.5,1.0 --workers=16  # all tissue
    python wsi.py --task=tiles ... --tiles_per_slide=500 --tissue_share=0.6                          # a random sample
    python wsi.py --task=coords --slides='slides/*.svs' --out=data/coords --coords_format=clam       # or trident
    python wsi.py --task=tiles ... --coords=data/coords                        # the places of TRIDENT's or CLAM's files

    data/tiles/A.tar           A_500nm_10240_8192.jpg, A_500nm_10240_8192.json, ...: WebDataset's convention
    data/tiles/A.json          written last, so the slide is complete; where each tile lies in A.tar, what was left out
    data/coords/A_patches.h5   TRIDENT's layout, or A.h5 in CLAM's

A rerun goes on, on several nodes at once if you like: prepare/slides.py.
"""
import functools
import hashlib
import io
import json
import os
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

import wsi
from prepare import slides

MAX_DAMAGED = 0.05  # share of damaged tiles above which a slide is of no use
ROUNDS = 20         # of random draws, until tiles_per_slide tiles have passed min_tissue and tissue_share

# ---- places ---------------------------------------------------------------------------------------------------------


def grid(slide, c, mpp):
    """(xy, tissue) of the slide's grid; SlideError if that is empty."""
    xy, tissue = slide.grid(c["tile_px"], mpp, c["min_tissue"], c["overlap"])
    if not len(xy):
        raise wsi.SlideError(f"no tile of {c['tile_px']} px at {mpp:g} um/px has {c['min_tissue']:.0%} of tissue")
    return xy, tissue


def mask_share(slide, xy, size, mpp):
    """Share of tissue in tiles at any places (N, 2), to whole cells of the mask: (N,)."""
    mask, cell = slide.tissue_mask()
    extent = np.array(slide.extent(size, mpp))
    first, last = (np.maximum(np.rint(at / np.array(cell)), 0).astype(int) for at in (xy, xy + extent))
    area = np.maximum(last - first, 1).prod(1)
    return np.array([mask[y:Y, x:X].sum() for (x, y), (X, Y) in zip(first, last)]).reshape(-1) / area


def random_places(slide, c, name, mpp, kept):
    """Batches (xy, tissue) of distinct random places, until kept(), the tiles that came of them, is tiles_per_slide.

    A function of the seed, the slide's name and the mpp.
    """
    digest = hashlib.blake2b(f"{c['seed']} {name} {mpp:g}".encode(), digest_size=8).digest()
    rng, seen = np.random.default_rng(int.from_bytes(digest, "big")), set()
    for _ in range(ROUNDS):
        missing = c["tiles_per_slide"] - kept()
        if not missing:
            return
        drawn = dict.fromkeys(slide.random_tissue(rng, c["tile_px"], mpp) for _ in range(missing))
        xy = np.array([place for place in drawn if place not in seen], np.int32).reshape(-1, 2)
        seen.update(drawn)
        tissue = mask_share(slide, xy, c["tile_px"], mpp)
        yield xy[tissue >= c["min_tissue"]], tissue[tissue >= c["min_tissue"]]


def import_h5py():
    try:
        import h5py
    except ImportError:
        raise ValueError("TRIDENT's and CLAM's files need h5py: pip install h5py") from None
    return h5py


def places_from_file(slide, path, name, c):
    """(xy, size, mpp) of the slide's file in the folder `coords`."""
    wanted = [stem + ending for stem in dict.fromkeys((Path(path).stem, name)) for ending in ("_patches.h5", ".h5")]
    found = [f for f in (os.path.join(c["coords"], w) for w in wanted) if os.path.exists(f)]
    if not found:
        raise wsi.SlideError(f"no {' or '.join(wanted)} in coords={c['coords']}")
    xy, size, mpp = read_coords(found[0], slide)
    return xy[np.sort(np.unique(xy, axis=0, return_index=True)[1])], size, mpp  # CLAM repeats places


def read_coords(file, slide):
    """(xy int32 (N, 2) in level-0 px, size, mpp) from TRIDENT's or CLAM's .h5, for slide.read(x, y, size, mpp).

    The scale is what was read, by the slide's own um/px: the magnification in such files is a rounded label.
    """
    try:
        with import_h5py().File(file) as h5:
            xy, a = h5["coords"][:], dict(h5["coords"].attrs)
    except (OSError, KeyError) as e:
        raise wsi.SlideError(f"{file}: neither TRIDENT's nor CLAM's: {e}") from None
    if xy.ndim != 2 or xy.shape[1] != 2 or a.get("patch_size", 1) <= 0:
        raise wsi.SlideError(f"{file}: coords of shape {xy.shape} and patch_size {a.get('patch_size')}, not (N, 2)")
    xy = xy.astype(np.int32)
    if not (xy < slide.dimensions).all():
        raise wsi.SlideError(f"{file}: places of another slide; this one has {slide.dimensions} px")
    if tuple(a.get(f"level0_{side}", n) for side, n in zip(("width", "height"), slide.dimensions)) != slide.dimensions:
        raise wsi.SlideError(f"{file}: places of another slide; this one has {slide.dimensions} px")
    if "patch_size_level0" in a:
        return xy, int(a["patch_size"]), float(a["patch_size_level0"] / a["patch_size"] * slide.mpp)
    if "patch_level" in a and a["patch_level"] < len(slide.level_mpp):
        return xy, int(a["patch_size"]), slide.level_mpp[int(a["patch_level"])]
    raise wsi.SlideError(f"{file}: coords lack patch_size_level0 (TRIDENT) or a patch_level of this slide (CLAM)")


def trident_attrs(slide, c, name, size, mpp):
    return {"patch_size": size, "patch_size_level0": round(sum(slide.extent(size, mpp)) / 2),
            "level0_magnification": round(10 / slide.mpp), "target_magnification": round(10 / mpp),
            "overlap": c["overlap"], "name": name, "savetodir": os.path.abspath(c["out"]),
            "level0_width": slide.dimensions[0], "level0_height": slide.dimensions[1]}


def clam_attrs(slide, c, name, size, mpp):
    level = max((i for i, m in enumerate(slide.level_mpp) if m <= mpp * (1 + wsi.TOLERANCE)), default=0)
    scale, level_dim = slide.level_scale[level], slide.level_dimensions[level]
    return {"patch_size": round(sum(e / s for e, s in zip(slide.extent(size, mpp), scale)) / 2), "patch_level": level,
            "downsample": scale, "downsampled_level_dim": level_dim, "level_dim": level_dim, "name": name,
            "save_path": os.path.abspath(c["out"])}


def pack(arrays, attrs, suffix):
    """The bytes of an .h5 of arrays and the attributes of each, or of an .npz with all of them side by side."""
    buffer = io.BytesIO()  # in memory first: HDF5 reports a full disk as it likes
    if suffix == ".npz":
        np.savez(buffer, **arrays, **{key: value for of in attrs.values() for key, value in of.items()})
        return buffer.getvalue()
    with import_h5py().File(buffer, "w") as h5:
        for name, array in arrays.items():
            h5.create_dataset(name, data=array).attrs.update(attrs[name])
    return buffer.getvalue()


def write_coords(path, name, file, c, claim):
    with closing(wsi.open_slide(path, c)) as slide:
        slide.check_levels()
        xy, _ = grid(slide, c, c["mpps"][0])
        attrs = trident_attrs if c["coords_format"] == "trident" else clam_attrs
        attrs = attrs(slide, c, slides.label(path, name, c, "coords"), c["tile_px"], c["mpps"][0])
    slides.replace(file, pack({"coords": xy.astype(np.int64)}, {"coords": attrs}, ".h5"))
    return len(xy), 0


def coords(c):
    """--task=coords: the places of each slide's grid, as TRIDENT's A_patches.h5 or CLAM's A.h5."""
    if c["coords_format"] not in ("trident", "clam"):
        raise ValueError(f"coords_format={c['coords_format']}: trident or clam")
    import_h5py()
    slides.walk("coords", c, write_coords, "_patches.h5" if c["coords_format"] == "trident" else ".h5", c["workers"])


# ---- tiles ----------------------------------------------------------------------------------------------------------


def plan(slide, path, name, c, mpps):
    """([(size, mpp, batches of (xy, tissue))], {mpp: why the slide has none}); mpps: those of the tiles so far."""
    if c["coords"]:
        xy, size, mpp = places_from_file(slide, path, name, c)
        return [(size, mpp, [(xy, mask_share(slide, xy, size, mpp))])], {}
    found, skipped = [], {}
    for mpp in c["mpps"]:
        try:
            slide.extent(c["tile_px"], mpp)  # is the slide fine enough?
            kept = functools.partial(mpps.count, mpp)
            batches = random_places(slide, c, name, mpp, kept) if c["tiles_per_slide"] else [grid(slide, c, mpp)]
            found.append((c["tile_px"], mpp, batches))
        except wsi.SlideError as e:
            skipped[f"{mpp:g}"] = str(e).removeprefix(f"{path}: ")
    return found, skipped


def read_all(slide, size, mpp, batches, c, bad, claim):
    """(x, y, tissue, tile) of all places, region by region; tile is None where the slide is damaged, see `bad`."""
    for xy, tissue in batches:
        for rows in slide.regions(xy, size, mpp, c["region_mb"]):
            os.utime(claim)
            tiles, errors = slide.read_tiles(xy[rows], size, mpp)
            for i, row in enumerate(rows):
                x, y = xy[row].tolist()
                if i in errors:
                    bad[f"{x},{y},{mpp:g}"] = errors[i].removeprefix(f"{slide.path}: ")
                yield x, y, round(float(tissue[row]), 4), None if i in errors else tiles[i]


def check_damage(bad, seen):
    if len(bad) > MAX_DAMAGED * seen:
        raise wsi.SlideError(f"{len(bad)} of {seen} tiles are damaged, such as {next(iter(bad.values()))}")


def jpeg(tile, quality):
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling=0)  # full chroma: stain is colour
    return buffer.getvalue()


def add(tar, name, data):
    """Append a file of which only name and data are told, so that equal tiles are equal bytes; where its data is."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.fileobj.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_tiles(path, name, file, c, claim):
    """One slide's shard and then its sidecar, see the header. Returns (tiles, damaged)."""
    table, bad, seen = {key: [] for key in ("offset", "size", "x", "y", "mpp", "tissue")}, {}, 0
    about = {"slide": os.path.basename(path), "patient": wsi.patient_of(path, c["patient"])}
    with closing(wsi.open_slide(path, c)) as slide, open(claim, "wb") as f:
        slide.check_levels()
        found, skipped = plan(slide, path, name, c, table["mpp"])
        with tarfile.open(fileobj=f, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for size, mpp, batches in found:
                for x, y, tissue, tile in read_all(slide, size, mpp, batches, c, bad, claim):
                    seen += 1
                    if tile is None or (c["tissue_share"] and not wsi.is_tissue(tile, c["tissue_share"])):
                        continue
                    row, key = {"x": x, "y": y, "mpp": mpp, "tissue": tissue}, f"{name}_{round(1000 * mpp)}nm_{x}_{y}"
                    data = jpeg(tile, c["jpeg_quality"])
                    where = {"offset": add(tar, f"{key}.jpg", data), "size": len(data)}
                    add(tar, f"{key}.json", json.dumps(about | row).encode())
                    for column, value in (row | where).items():
                        table[column].append(value)
        f.flush()
        os.fsync(f.fileno())
    check_damage(bad, seen)
    if not table["x"]:
        raise wsi.SlideError("; ".join(skipped.values()) or f"none of {seen} tiles passed min_tissue and tissue_share")
    shard = file.removesuffix(".json") + ".tar"
    short = {mpp: table["mpp"].count(mpp) for _, mpp, _ in found if table["mpp"].count(mpp) < c["tiles_per_slide"]}
    skipped |= {f"{mpp:g}": f"{n} of {c['tiles_per_slide']} tiles, after {ROUNDS} draws" for mpp, n in short.items()}
    side = {"version": 1, "tar": os.path.basename(shard), "bytes": os.path.getsize(claim), "slide": path, "name": name,
            "patient": about["patient"], "slide_mpp": slide.mpp_xy, "mpp_source": slide.mpp_source,
            "tile_px": found[0][0], "bad": bad, "skipped": skipped, **table}
    os.replace(claim, shard)
    slides.replace(file, json.dumps(side).encode())
    return len(table["x"]), len(bad), "; ".join(skipped.values())


def tiles(c):
    """--task=tiles: a shard of JPEGs a slide, of its grid, of random places, or of places from files."""
    if c["coords"]:
        import_h5py()
        if c["tiles_per_slide"]:
            raise ValueError("coords, tiles_per_slide: places from files or random ones, not both")
    slides.walk("tiles", c, write_tiles, ".json", c["workers"])
