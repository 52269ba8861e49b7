"""
Places of tiles: the grid over the tissue in TRIDENT's files; tiles.py and features.py read these, and CLAM's.

    python prepare/coords.py --slides='slides/*.svs' --out=data/coords      # A_patches.h5, as TRIDENT's
    python prepare/tiles.py ... --coords=data/coords                        # tiles at these places
"""
import functools
import io
import os
import sys
from contextlib import closing
from pathlib import Path

import numpy as np

try:
    import h5py
except ImportError:
    h5py = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.slides import open_slide, run, walk

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpp = 0.5           # um/px of the tiles
tile_px = 256

ATTRS = {"patch_size": (), "patch_size_level0": (), "level0_width": (), "level0_height": (),  # TRIDENT's, and shapes
         "patch_level": (), "level_dim": (2,)}                                                # CLAM's


def grid(slide, config, mpp):
    """(xy, tissue share) of the tiles in the slide's grid; SlideError if there are none."""
    xy, tissue = slide.grid(config["tile_px"], mpp, config["min_tissue"], config["overlap"])
    if not len(xy):
        least = f"{config['min_tissue']:.0%} of tissue"
        raise wsi.SlideError(f"no tile of {config['tile_px']} px at {mpp:g} um/px has {least}")
    return xy, tissue


FEW = 4  # tiles of a slide: with fewer there is hardly a neighbourhood


@functools.cache  # once in a run, or thousands of slides would say it
def say_few():
    print(f"a slide has fewer than {FEW} tiles: if it is not that small, mend mpp, tile_px or min_tissue of "
          "prepare/features.py (said once; each slide's line has its number)", flush=True)


def need_h5py():
    if h5py is None:
        raise ValueError("TRIDENT's and CLAM's files need h5py: pip install h5py")


def find_coords(slide, name, config):
    """read_coords of the slide's file in the folder `coords`, each place once. SlideError if it has none."""
    stem = Path(slide.path).stem
    wanted = [f"{stem}_patches.h5", f"{stem}.h5", f"{name}_patches.h5", f"{name}.h5"]
    files = [os.path.join(config["coords"], file) for file in wanted]
    file = next(filter(os.path.exists, files), None)
    if file is None:
        raise wsi.SlideError(f"no {' or '.join(dict.fromkeys(wanted))} in coords={config['coords']}")
    xy, size, mpp = read_coords(file, slide)
    first = np.unique(xy, axis=0, return_index=True)[1]  # CLAM repeats places
    return xy[np.sort(first)], size, mpp


def whole(name, value):
    """Whole numbers of any type as Python's. Raises ValueError for 512.5, for text, and for another shape."""
    numbers = np.squeeze(value)
    if numbers.shape != ATTRS[name] or numbers.dtype.kind not in "iuf" or (numbers % 1 != 0).any():
        raise ValueError(f"{name} is {value!r}, not {np.prod(ATTRS[name], dtype=int)} whole numbers")
    return numbers.astype(int).tolist()


def read_coords(file, slide):
    """(xy int32 (N, 2) in level-0 px, size, mpp) from TRIDENT's or CLAM's .h5, for slide.read(x, y, size, mpp).

    The scale is computed from the slide's own um/px, because the magnification in such files is a rounded label.
    Raises SlideError if the file is damaged, of another slide, or of another tool.
    """
    try:
        with h5py.File(file) as h5:
            xy, stored = h5["coords"][:], h5["coords"].attrs
            attrs = {name: whole(name, stored[name]) for name in ATTRS if name in stored}
        size, level0_size = attrs.get("patch_size", 1), attrs.get("patch_size_level0", 1)
        if xy.shape[1:] != (2,) or not len(xy) or min(size, level0_size) <= 0:
            raise ValueError(f"coords of shape {xy.shape} and patch_size {size}, not (N, 2), N > 0")
        if xy.dtype.kind not in "iuf" or (xy % 1 > 0).any():
            raise ValueError(f"coords are {xy.dtype} and no whole px, such as {xy[0].tolist()}")
    except Exception as e:  # h5py raises errors of any kind where something else is stored
        raise wsi.SlideError(f"{file}: neither TRIDENT's nor CLAM's: {' '.join(str(e).split())}") from None
    (width, height), level = slide.dimensions, attrs.get("patch_level")
    same = (attrs.get("level0_width", width), attrs.get("level0_height", height)) == slide.dimensions
    if {"patch_size", "patch_size_level0"} <= attrs.keys():
        mpp = level0_size / size * slide.mpp
    elif "patch_size" in attrs and level in range(len(slide.level_mpp)):
        mpp = slide.level_mpp[level]
        same = tuple(attrs.get("level_dim", slide.level_dimensions[level])) == slide.level_dimensions[level]
    else:
        raise wsi.SlideError(f"{file}: coords lack patch_size_level0 (TRIDENT) or a patch_level of this slide (CLAM), "
                             "or patch_size")
    if not same:
        raise wsi.SlideError(f"{file}: places of another slide; this one has {slide.dimensions} px")
    rows = np.flatnonzero(slide.outside(xy, slide.extent(size, mpp)))
    if len(rows):
        raise wsi.SlideError(f"{file}: places of another slide: {len(rows)} of {len(xy)} lie outside its "
                             f"{slide.dimensions} px, such as row {rows[0]}, {xy[rows[0]].tolist()}")
    return xy.astype(np.int32), size, mpp


def trident_attrs(slide, config, name, size, mpp):
    width, height = slide.dimensions
    return {"patch_size": size, "patch_size_level0": round(sum(slide.extent(size, mpp)) / 2),
            "level0_magnification": round(10 / slide.mpp), "target_magnification": round(10 / mpp),
            "overlap": config["overlap"], "name": name, "savetodir": os.path.abspath(config["out"]),
            "level0_width": width, "level0_height": height}


def write_h5(file, arrays, attrs):
    """Write arrays, and the attributes that some have, both by name."""
    buffer = io.BytesIO()  # in memory first: HDF5 reports a full disk as it likes
    with h5py.File(buffer, "w") as h5:
        for name, array in arrays.items():
            h5.create_dataset(name, data=array).attrs.update(attrs.get(name, {}))
    Path(file).write_bytes(buffer.getvalue())


def write_arrays(file, part, arrays, attrs):
    """Write `part` and rename it to `file`, an .h5, or an .npz where the attributes of all arrays are beside them."""
    if file.endswith(".h5"):
        write_h5(part, arrays, attrs)
    else:
        beside = {key: value for own in attrs.values() for key, value in own.items()}
        with open(part, "wb") as f:
            np.savez(f, **arrays, **beside)
    os.replace(part, file)


def write_coords(path, name, file, part, config):
    with closing(open_slide(path, config)) as slide:
        slide.check_levels()
        xy, _ = grid(slide, config, config["mpp"])
        attrs = trident_attrs(slide, config, name, config["tile_px"], config["mpp"])
    write_arrays(file, part, {"coords": xy.astype(np.int64)}, {"coords": attrs})


def main(config):
    need_h5py()
    walk("coords", config, write_coords, "_patches.h5", config["workers"])


if __name__ == "__main__":
    run("coords", main, globals())
