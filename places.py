"""
Tile features of slides as they lie on disk, and windows of them: the places nearest to a random one, with blocks hidden.

    data/features_1.0/A.h5    features (N, C), coords (N, 2) and attributes, by prepare/features.py; or A.npz

Features are mapped, not copied: with 1,024 windows per step a run reads 0.8 GB out of TCGA's 74. Window n of a run is a
pure function of (seed, n), so a run resumes exactly, and with data.sample_numbers any ranks share a batch.
"""
import glob
import os
import struct
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

import data
import model

STATED = "weights_sha256", "norm", "mpp", "tile_px"  # what all features of a run must agree on, where they state it

# ---- files ----------------------------------------------------------------------------------------------------------


def files_of(folder):
    """{slide: path} of the features in a folder. Raises ValueError if there are none."""
    paths = sorted(glob.glob(f"{folder}/*.h5") + glob.glob(f"{folder}/*.npz"))
    if not paths:
        raise ValueError(f"no .h5 or .npz in features = {folder}; prepare/features.py writes them")
    return {Path(path).stem: path for path in paths}


def open_features(path):
    """
    A file of prepare/features.py: (features, a memory map (N, C); centres of the tiles, float32 (N, 2) in um; what the
    file states, a dict, and width C, side and pitch of tiles in um). Raises ValueError if it is another kind of file,
    compressed, or without a place.
    """
    try:
        (shape, dtype, offset), coords, stated = stored(path)
        about = {key: np.asarray(value).tolist() for key, value in stated.items()}
        extent, side = about["patch_size_level0"], about["mpp"] * about["tile_px"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: not features as prepare/features.py writes them ({e})") from None
    if len(shape) != 2 or coords.shape != (shape[0], 2):
        raise ValueError(f"{path}: features {shape} and coords {coords.shape}: not (N, C) and (N, 2)")
    if not shape[0]:
        raise ValueError(f"{path}: no place in it")
    if offset is None:
        raise ValueError(f"{path}: features are chunked or compressed and cannot be mapped; write them again")
    pitch = side * (1 - about.get("overlap", 0) / about["tile_px"])
    um = about.get("level0_mpp", side / extent)  # the latter is off by the rounding of the extent
    centres = (coords + extent / 2) * um
    about |= {"width": shape[1], "side": side, "pitch": pitch}
    return np.memmap(path, dtype, "r", offset, shape), centres.astype(np.float32), about


def stored(path):
    """((shape, dtype, offset in the file) of the features, coords, attributes)."""
    if path.endswith(".h5"):
        import h5py
        with h5py.File(path) as h5:
            found, coords = h5["features"], h5["coords"]
            where = found.shape, found.dtype, found.id.get_offset()  # None where it is chunked
            return where, coords[:], {**found.attrs, **coords.attrs}
    with np.load(path) as arrays:
        attributes = {key: arrays[key] for key in arrays if key not in ("features", "coords")}
        return stored_npy(path, "features.npy"), arrays["coords"], attributes


def stored_npy(path, name):
    """(shape, dtype, offset) of an array in an .npz, which is a zip; np.savez does not compress it."""
    with zipfile.ZipFile(path) as archive, archive.open(name) as array, open(path, "rb") as f:
        np.lib.format.read_magic(array)
        shape, _, dtype = np.lib.format.read_array_header_1_0(array)
        entry = archive.getinfo(name)
        f.seek(entry.header_offset + 26)
        before = 30 + sum(struct.unpack("<HH", f.read(4)))  # the zip's own header ends with two texts of these lengths
        offset = entry.header_offset + before + array.tell()
        return shape, dtype, None if entry.compress_type else offset


def write(file, part, arrays, about):
    """Write arrays, the first with attributes, as a file of prepare/features.py; complete once it has its name."""
    if file.endswith(".h5"):
        from prepare.coords import write_h5
        write_h5(part, arrays, dict.fromkeys(arrays, {}) | {"features": about})
    else:
        with open(part, "wb") as f:
            np.savez(f, **arrays, **about)
    os.replace(part, file)


def check(centres, about, trained):
    """
    ValueError, for a user, where features are of another kind than those that were trained on (`trained` is `about` of
    those), or coordinates in another unit: a place's nearest neighbour lies about a pitch away.
    """
    if about["width"] != trained["width"]:
        raise ValueError(f"features of another encoder: {about['width']} wide, not {trained['width']}")
    for key in STATED:
        a, b = about.get(key), trained.get(key)
        if None in (a, b):
            continue
        if a != b if isinstance(a, str) else not np.allclose(a, b, rtol=0.02):  # um/px of slides differ a little
            raise ValueError(f"features of another encoder, norm or scale: {key} is {a}, not {b}")
    apart = spacing(centres) / trained["pitch"] if len(centres) > 1 else 1.0
    if not 0.7 < apart < 1.5:
        raise ValueError(f"coordinates in another unit than level-0 px? Neighbours are {apart:.3g} tiles apart, not 1")


def spacing(centres):
    """um between a place and its nearest neighbour, the lowest tenth of a few places."""
    some = centres[:: len(centres) // 16 + 1]
    apart = [np.partition(np.hypot(*(centres - place).T), 1)[1] for place in some]
    return np.quantile(apart, 0.1)


# ---- slides to train on ---------------------------------------------------------------------------------------------

Slide = namedtuple("Slide", "name maps centres")  # per scale: arguments of np.memmap, and float32 (N, 2) in um


def open_slides(folders, names, window, say):
    """
    ([Slide], [about per scale]) of the named slides. Slides that cannot be trained on are named through `say` and left
    out. A scale's `about` also has `count`, its places per window: as many as cover the area of the first scale's.
    Files are not kept open, because there are 11,000.
    """
    slides, trained = [], None
    for name in names:
        try:
            opened = [open_features(files[name]) for files in folders]
            trained = trained or [about for _, _, about in opened]
            for (_, centres, about), scale in zip(opened, trained):
                scale["count"] = max(round(window * (trained[0]["side"] / scale["side"]) ** 2), 4)
                if len(centres) < scale["count"]:
                    raise ValueError(f"{len(centres)} places, and a window has {scale['count']}")
                check(centres, about, scale)
        except KeyError:
            say(f"left out: {name}: not in every folder of features")
        except ValueError as e:
            say(f"left out: {name}: {e}")
        else:
            maps = [(f.filename, f.dtype, "r", f.offset, f.shape) for f, _, _ in opened]
            slides.append(Slide(name, maps, [centres for _, centres, _ in opened]))
    return slides, trained


def training_set(folders, names, window, dev, say):
    """
    ([Slide], [about], float32 (slides, 2, scales, C) on `dev`: their mean features and mean squares) of the named
    slides, or of all if that is None. Every rank reads its share. A collective.
    """
    files = [files_of(folder) for folder in folders]
    slides, about = open_slides(files, names or sorted(files[0]), window, say)
    found = moments(slides, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    found = model.all_reduce(found.to(dev))
    sound = found.isfinite().flatten(1).all(1)
    for i in torch.nonzero(~sound).flatten().tolist():
        say(f"left out: {slides[i].name}: features that are not finite")
    slides = [slides[i] for i in torch.nonzero(sound).flatten().tolist()]
    if not slides:
        raise ValueError(f"features = {','.join(folders)}: no slide is left to train on")
    return slides, about, found[sound]


def moments(slides, rank, world):
    """(slides, 2, scales, C): a slide's mean feature and mean square; zero for the slides that other ranks read."""
    shape = slides[0].maps[0][-1] if slides else (0, 0)
    scales = len(slides[0].maps) if slides else 0
    found = torch.zeros(len(slides), 2, scales, shape[1])
    for i in range(rank, len(slides), world):
        for scale, where in enumerate(slides[i].maps):
            x = torch.from_numpy(np.memmap(*where).astype(np.float32))
            found[i, :, scale] = torch.stack([x.mean(0), x.square().mean(0)])
    return found


# ---- windows --------------------------------------------------------------------------------------------------------


def nearest(centres, at, count):
    """Indices of the `count` places that are nearest to a point, nearest first; of all if there are fewer."""
    distance = np.square(centres - at).sum(1)
    some = np.arange(len(distance))
    if count < len(distance):
        some = np.argpartition(distance, count - 1)[:count]
    return some[np.argsort(distance[some], kind="stable")]


def cover(centres, counts):
    """
    Yield (place, indices per scale) of windows that cover a slide. Each is around the first place that was not among
    the nearest quarter of any before. A smaller slide is one window.
    """
    done = np.zeros(len(centres[0]), bool)
    while not done.all():
        at = centres[0][done.argmin()]
        rows = [nearest(own, at, count) for own, count in zip(centres, counts)]
        yield at, rows
        done[rows[0][: -(-counts[0] // 4)]] = True


def draw_blocks(rng, points, count, block):
    """bool (N,): exactly `count` of points (N, 2), in blocks: a visible place and those nearest to it."""
    hidden = np.zeros(len(points), bool)
    left = count
    while left:
        visible = np.flatnonzero(~hidden)
        size = min(rng.integers(block[0], block[1] + 1), left)
        centre = points[rng.choice(visible)]
        hidden[visible[nearest(points[visible], centre, size)]] = True
        left -= size
    return hidden


def touches(points, side, others, other_side):
    """bool (N,): which tiles around points (N, 2) overlap one around `others` by a tenth of a side or more."""
    reach = (side + other_side) / 2 - 0.1 * min(side, other_side)
    return (np.abs(points[:, None] - others).max(2) < reach).any(1)


def hide(rng, points, sides, share, block):
    """
    (hidden, wanted), bool per place of a window: what is hidden, and what of it is to be predicted. points and sides
    are lists, per scale: float (N, 2) and the side of a tile, in um. Blocks of the coarsest scale are drawn, exactly
    `share` of its places. They are wanted, and all tiles whose centres they cover. Then a tile that overlaps a wanted
    one of another scale is hidden too, because it shows the same pixels. With one scale both are the same.
    """
    coarse = int(np.argmax(sides))
    chosen = draw_blocks(rng, points[coarse], round(share * len(points[coarse])), block)
    region = points[coarse][chosen], sides[coarse]
    wanted = [touches(own, 0.0, *region) for own in points]
    wanted[coarse] = chosen
    hidden = [own.copy() for own in wanted]
    for i, j in np.argwhere(~np.eye(len(sides), dtype=bool)):
        hidden[i] |= touches(points[i], sides[i], points[j][wanted[j]], sides[j])
    return np.concatenate(hidden), np.concatenate(wanted)


def turn(rng, points, free):
    """points (N, 2) turned by any angle, or by quarters, and flipped in half of the cases."""
    quarters = rng.random() * 4
    angle = np.pi / 2 * (quarters if free else int(quarters))
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) * [rng.choice([-1, 1]), 1]


def to_nm(points):
    """um -> an int32 tensor in nm: FSDP2 casts what floats a network is given to bf16, which has 8 bits."""
    return torch.from_numpy(np.rint(points * 1000).astype(np.int32))


class Windows(torch.utils.data.Dataset):
    """
    windows[step] are the windows of one rank, N places each, scale by scale:

        features   (B, N, C) as stored
        places     int32 (B, N, 2), nm from the place that the window is around, turned and flipped
        hidden     bool (B, N), what the network does not see
        wanted     bool (B, N), those of them that it is to predict
        slide      int64 (B), the number of the slide; each is drawn equally often, and in it each place
    """

    def __init__(self, slides, about, config, rank=0, world=1, offset=0):
        self.slides, self.about, self.config = slides, about, config
        self.rank, self.world, self.offset = rank, world, offset

    def __getitem__(self, step):
        numbers = data.sample_numbers(step, self.rank, self.world, self.config["batch_size"], self.offset)
        return default_collate([self.window(n) for n in numbers])

    def window(self, n):
        config, rng = self.config, np.random.default_rng((self.config["seed"], n))
        number = rng.integers(len(self.slides))
        _, maps, centres = self.slides[number]
        at = rng.choice(centres[0])
        rows = [nearest(own, at, scale["count"]) for own, scale in zip(centres, self.about)]
        points = [own[r] - at for own, r in zip(centres, rows)]
        sides = [scale["side"] for scale in self.about]
        hidden, wanted = hide(rng, points, sides, config["mask_share"], config["mask_block"])
        places = turn(rng, np.concatenate(points), config["free_rotation"])
        features = np.concatenate([np.memmap(*where)[r] for where, r in zip(maps, rows)])
        tensors = {"features": features, "hidden": hidden, "wanted": wanted}
        return {k: torch.from_numpy(v) for k, v in tensors.items()} | {"places": to_nm(places), "slide": number}
