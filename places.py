"""
Tile features of slides on disk, and windows of them: the places nearest to a random one, with blocks of them hidden.

    data/features_1.0/A.h5    features (N, C), coords (N, 2) and attributes, by prepare/features.py; or A.npz
    data/context/A.h5         the same, and context (N, D), mean_raw (C), mean_context (D), by context.py --task=embed

Features are mapped, not copied: with 1,024 windows per step a run reads 0.8 GB out of TCGA's 74. Window n of a run is a
pure function of (seed, n), so a run resumes exactly, and with data.sample_numbers any ranks share a batch.
"""
import os
import struct
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import data
import listing
import model
import rundir

STATED = "weights_sha256", "norm", "mpp", "tile_px"  # what all features of a run must agree on, where they state it
ARRAYS = "features", "coords", "context", "mean_raw", "mean_context"  # the rest of an .npz are attributes
CLIP = 5.0  # standard deviations

# ---- features on disk -----------------------------------------------------------------------------------------------


def files_of(folder):
    """{slide: path} of the features in a folder. Raises ValueError if there are none."""
    left_out = {}
    paths = [path for path, is_folder, *_ in listing.scan(folder, left_out) if path.endswith((".h5", ".npz"))]
    for path, reason in left_out.items():  # a slide less would be another set
        raise ValueError(f"features: {path}: {reason}")
    if not paths:
        raise ValueError(f"features: no .h5 or .npz in '{folder}'; prepare/features.py writes them")
    paths.sort()
    return {Path(path).stem: path for path in paths}


def need_all(name, files):
    """ValueError if one of several folders, as files_of gives them, lacks a slide."""
    for paths in files:
        if name not in paths:
            folder = os.path.dirname(next(iter(paths.values())))
            raise ValueError(f"not in every folder of features: {folder} has none; its failed.csv may say why")


def open_features(path, name="features"):
    """
    A file of prepare/features.py: (features, or another array by name, a memory map (N, C); centres of the tiles,
    float32 (N, 2) in um; what the file states, and width C, side and pitch of tiles in um). Raises ValueError.
    """
    try:
        (shape, dtype, offset), coords, stated = stored(path, name)
        about = {key: np.asarray(value).tolist() for key, value in stated.items()}
        extent = about["patch_size_level0"]
        side = about["mpp"] * about["tile_px"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: not features as prepare/features.py writes them ({e})") from None
    if len(shape) != 2 or coords.shape != (shape[0], 2):
        raise ValueError(f"{path}: features {shape} and coords {coords.shape}: not (N, C) and (N, 2)")
    if not shape[0]:
        raise ValueError(f"{path}: no place in it")
    if offset is None:
        raise ValueError(f"{path}: features are chunked, compressed or by column; write them again to be mapped")
    about["width"], about["side"] = shape[1], side
    about["pitch"] = side * (1 - about.get("overlap", 0) / about["tile_px"])
    um = about.get("level0_mpp", side / extent)  # the latter is off by the rounding of the extent
    centres = (coords + extent / 2) * um
    return np.memmap(path, dtype, "r", offset, shape), centres.astype(np.float32), about


def stored(path, name):
    """((shape, dtype, offset in the file) of the array `name`, coords, attributes)."""
    if path.endswith(".h5"):
        try:
            import h5py
        except ImportError:
            raise SystemExit(f"{path}: to read .h5 files: pip install h5py") from None
        with h5py.File(path) as h5:
            array, coords = h5[name], h5["coords"]
            where = array.shape, array.dtype, array.id.get_offset()  # None where it is chunked
            return where, coords[:], {**h5["features"].attrs, **coords.attrs}
    with np.load(path) as arrays:
        attributes = {key: arrays[key] for key in arrays if key not in ARRAYS}
        return stored_npy(path, f"{name}.npy"), arrays["coords"], attributes


def stored_npy(path, name):
    """(shape, dtype, offset) of an array in an .npz, which is a zip; np.savez does not compress it."""
    with zipfile.ZipFile(path) as archive, archive.open(name) as array, open(path, "rb") as f:
        np.lib.format.read_magic(array)
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(array)
        entry = archive.getinfo(name)
        f.seek(entry.header_offset + 26)
        before = 30 + sum(struct.unpack("<HH", f.read(4)))  # the zip's header ends with two texts of these lengths
        offset = entry.header_offset + before + array.tell()
        return shape, dtype, None if entry.compress_type or by_column else offset


def check(centres, about, trained, apart=True):
    """
    ValueError where features are of another kind than those that were trained on (`trained` is `about` of those), or
    coordinates in another unit: a place's nearest neighbour lies about a pitch away. `apart`: tiles may not overlap.
    """
    if about["width"] != trained["width"]:
        raise ValueError(f"features of another encoder: {about['width']} wide, not {trained['width']}")
    if apart and about.get("overlap"):
        raise ValueError("its tiles overlap, so one shows what another hides: write features with --overlap=0")
    for key in STATED:
        value, expected = about.get(key), trained.get(key)
        if None in (value, expected) or value == expected:
            continue
        text = isinstance(value, str) or np.shape(value) != np.shape(expected)
        if text or not np.allclose(value, expected, rtol=0.02):  # um/px of slides differ a little
            raise ValueError(f"features of another encoder, norm or scale: {key} is {value}, not {expected}")
    if len(centres) == 1:
        return
    some = centres[:: len(centres) // 16 + 1]
    steps = []  # um between some places and their nearest neighbours
    for place in some:
        _, other = nearest(centres, place, 2)
        steps.append(centres[other] - place)
    pitches = np.quantile(np.hypot(*np.transpose(steps)), 0.1) / trained["pitch"]
    if not 0.7 < pitches < 1.5:
        raise ValueError(f"coordinates in another unit than level-0 px? Neighbours are {pitches:.3g} tiles apart")


def embed_files(config, net, header, dev):
    """
    context.py --task=embed: a file for each slide of the first folder. Slides that are done are skipped, and a folder
    that another encoder began is refused. Raises ValueError, and SystemExit naming the slides that failed.
    """
    from prepare import coords, slides
    first, *others = config["features"].split(",")
    others = [files_of(folder) for folder in others]

    def job(path, name, file, part, _):
        need_all(name, others)
        paths = [path, *(files[name] for files in others)]
        features, centres, about = zip(*map(open_features, paths))
        for scale in zip(centres, about, header["about"]):
            check(*scale)
        context = embed_slide(net, header, features, centres, dev, config["hide"])
        means = [own.mean(0, np.float32) for own in features]
        if not (np.isfinite(context).all() and np.isfinite(means).all()):
            raise ValueError("features that are not finite")
        arrays = {"features": features[0], "mean_raw": means[0], "coords": stored(path, "features")[1],
                  "context": context.astype(np.float16), "mean_context": context.mean(0)}
        if len(context) < coords.FEW:
            coords.say_few()
        coords.write_arrays(file, part, arrays, {"features": about[0] | {"hide": config["hide"]}})

    keys = {key: config[key] for key in ("features", "weights", "out", "part", "hide")}
    keys |= {"slides": first + "/*.[hn][5p]*", "overlap": 0, "tile_px": 1, "mpp_table": ""}
    made_by = {"encoder": model.sha256_of(config["weights"]), "trained_on": header["slides"]}
    slides.walk("context", keys, job, ".h5" if coords.h5py else ".npz", 0, made_by)


@torch.inference_mode()
def embed_slide(net, header, features, centres_um, device="cpu", hide=0):
    """
    Context of a slide's places, float32 (N, D), from features (N, C) and centres (N, 2); or from lists of them, one per
    scale, and it is that of the first. What a place gets in the windows of `cover` is averaged. With `hide`, it is
    what the rest of the window says of a place.
    """
    if isinstance(centres_um, np.ndarray):
        features, centres_um = [features], [centres_um]
    if len(features) != len(header["about"]):
        raise ValueError(f"features of {len(features)} scales, and the encoder reads {len(header['about'])}")
    if header["config"].get("shuffle"):
        centres_um = shuffled(centres_um, features)

    def standard(arrays):
        scales = zip(map(torch.from_numpy, arrays), header["mean"], header["std"])
        return [standardise(*scale).to(device) for scale in scales]

    net = net.to(device)
    slide_means = standard([own.mean(0, np.float32) for own in features])
    sides = [scale["side"] for scale in header["about"]]
    counts = [scale["count"] for scale in header["about"]]
    total = np.zeros((len(centres_um[0]), header["config"]["width"]), np.float32)
    visits = np.zeros((len(total), 1), np.float32)
    for at, rows in cover(centres_um, counts):
        parts = standard([own[r][None] for own, r in zip(features, rows)])
        if header["config"]["centre"]:
            parts = [part - own for part, own in zip(parts, slide_means)]
        points = [own[r] - at for own, r in zip(centres_um, rows)]
        nm = to_nm(np.concatenate(points))[None].to(device)
        for read, hidden in in_turn(points, sides, hide):
            x, _ = net(parts, nm, torch.from_numpy(hidden)[None].to(device))
            own = x[0, : len(read)].float().cpu().numpy()
            total[rows[0][read]] += own[read]
        visits[rows[0]] += 1
    return total / visits


# ---- slides to train on ---------------------------------------------------------------------------------------------

Slide = namedtuple("Slide", "name maps centres")  # per scale: arguments of np.memmap, and float32 (N, 2) in um


def training_set(folders, names_file, window, dev, say):
    """
    ([Slide], [about per scale], float32 (slides, 2, scales, C) on `dev`: their mean features and mean squares) of the
    slides that a file names, or of all if it is "". The others are said. Every rank reads its share. A collective.
    """
    files = [files_of(folder) for folder in folders]
    names = read_names(names_file, files[0], say) if names_file else sorted(files[0])
    slides, about = open_slides(files, names, window, say)
    seen = rundir.agree("features", lambda: ([slide.name for slide in slides], about))
    if any(other != seen[0] for other in seen):
        raise ValueError("features: the ranks see different slides, or different features of them: give all nodes the "
                         "same folders and train_slides")
    if not slides:
        raise ValueError("features: no slide is left to train on")
    found = torch.zeros(len(slides), 2, len(folders), about[0]["width"])
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for i in range(rank, len(slides), world):
        for scale, where in enumerate(slides[i].maps):
            x = torch.from_numpy(np.memmap(*where).astype(np.float32))
            found[i, 0, scale] = x.mean(0)
            found[i, 1, scale] = x.square().mean(0)
    found = model.all_reduce(found.to(dev))
    sound = found.isfinite().flatten(1).all(1).tolist()
    for slide, good in zip(slides, sound):
        if not good:
            say(f"left out: {slide.name}: features that are not finite")
    slides = [slide for slide, good in zip(slides, sound) if good]
    if not slides:
        raise ValueError("features: no slide is left to train on")
    count = sum(len(slide.centres[0]) for slide in slides)
    say(f"training on {len(slides)} of {len(files[0])} slides, {count} places")
    return slides, about, found[sound]


def read_names(path, known, say):
    """
    The `known` slides that a file lists, one per line: a name, or a path or file's name, which counts by its stem.
    Other lines are said. Raises ValueError if no line is left.
    """
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names, unknown = [], []
    for line in map(str.strip, lines):
        name = line if line in known else Path(line).stem  # a name may have dots
        if name in known:
            names.append(name)
        elif line:
            unknown.append(line)
    if unknown:
        some = ", ".join(unknown[:5])
        say(f"left out: {len(unknown)} names in {path} that no features have, such as {some}")
    if not names:
        raise ValueError(f"train_slides={path}: no slide that has features is listed in it")
    return list(dict.fromkeys(names))  # one that is listed twice would be drawn twice as often


def open_slides(files, names, window, say):
    """
    ([Slide], [about per scale]), of the named slides that can be trained on. A scale's `about` gets `count`, its places
    per window: as many as cover the area of the first scale's `window`.
    """
    slides, trained = agreeing(files, names, say)
    for scale in trained:
        ratio = trained[0]["side"] / scale["side"]
        scale["count"] = max(round(window * ratio**2), 4)
    enough = []
    for slide in slides:
        for centres, scale in zip(slide.centres, trained):
            if len(centres) < scale["count"]:
                say(f"left out: {slide.name}: {len(centres)} places, and a window has {scale['count']}")
                break
        else:
            enough.append(slide)
    return enough, trained


def map_of(x):
    """Arguments of np.memmap that open x again: 11,000 files do not stay open."""
    return x.filename, x.dtype, "r", x.offset, x.shape


def agreeing(files, names, say, apart=True):
    """([Slide], [about per scale]) of the named slides that state what most of them state; the others are said."""
    opened, kinds, slides = [], {}, []
    for name in names:
        try:
            need_all(name, files)
            features, centres, about = zip(*(open_features(paths[name]) for paths in files))
        except ValueError as e:
            say(f"left out: {name}: {e}")
        else:
            opened.append((Slide(name, list(map(map_of, features)), centres), about))
            stated = [[scale.get(key) for key in ("width", *STATED)] for scale in about]
            kinds.setdefault(str(stated), []).append(about)
    most = max(kinds.values(), key=len, default=[()])
    trained = list(most[0])
    for slide, about in opened:
        try:
            for scale in zip(slide.centres, about, trained):
                check(*scale, apart)
        except ValueError as e:
            say(f"left out: {slide.name}: {e}")
        else:
            slides.append(slide)
    return slides, trained


# ---- windows --------------------------------------------------------------------------------------------------------


def nearest(centres, at, count):
    """Indices of the `count` places that are nearest to a point, nearest first; of all if there are fewer."""
    x, y = (centres - at).T
    distance = x * x + y * y
    some = np.arange(len(distance))
    if count < len(distance):
        some = np.argpartition(distance, count - 1)[:count]
    return some[np.argsort(distance[some], kind="stable")]


def cover(centres, counts):
    """
    Yield (point, indices per scale) of windows that cover a slide. Each is around the first place that was not among
    the nearest half of any before. A smaller slide is one window.
    """
    done = np.zeros(len(centres[0]), bool)
    while not done.all():
        at = centres[0][done.argmin()]
        rows = [nearest(own, at, count) for own, count in zip(centres, counts)]
        yield at, rows
        core = counts[0] // 2 if counts[0] < len(done) else len(done)
        done[rows[0][:core]] = True


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
    apart = np.abs(points.T[:, :, None] - others.T[:, None])  # (2, N, M)
    x, y = apart < reach
    return (x & y).any(1)


def hide(rng, points, sides, share, block):
    """
    (hidden, wanted), bool per place of a window: what is hidden, and what of it is to be predicted. points and sides
    are per scale: float (N, 2) and the side of a tile, in um. Blocks of the coarsest scale are drawn, exactly `share`
    of its places. They are wanted, and all tiles whose centres they cover. A tile that overlaps a wanted one of another
    scale is hidden too, because it shows the same pixels.
    """
    coarse = int(np.argmax(sides))
    chosen = draw_blocks(rng, points[coarse], round(share * len(points[coarse])), block)
    region = points[coarse][chosen]
    wanted = [touches(own, 0.0, region, sides[coarse]) for own in points]
    wanted[coarse] = chosen
    hidden = [own.copy() for own in wanted]
    for i, own in enumerate(points):
        for j, other in enumerate(points):
            if j != i:
                hidden[i] |= touches(own, sides[i], other[wanted[j]], sides[j])
    return np.concatenate(hidden), np.concatenate(wanted)


def in_turn(points, sides, passes):
    """
    Yield (read, hidden) until each place of the first scale was read once, while it was hidden, bool (n,) and (N,).
    passes = 0: all at once, nothing is hidden. Tiles of other scales are hidden where they show the same pixels.
    """
    turns = max(passes, 1)
    numbers = np.random.default_rng(0).permutation(len(points[0])) % turns
    for number in range(turns):
        read = numbers == number
        hidden = read if passes else np.zeros_like(read)
        region = points[0][hidden]
        others = zip(points[1:], sides[1:])
        rest = [touches(own, side, region, sides[0]) for own, side in others]
        yield read, np.concatenate([hidden, *rest])


def shuffled(centres, features):
    """
    The centres of each scale, permuted: a slide without its arrangement. The order is a function of its first feature;
    a common permutation would be an arrangement, too.
    """
    seed = zlib.crc32(np.ascontiguousarray(features[0][0]).tobytes())
    return [np.random.default_rng(seed).permutation(own) for own in centres]


def shuffle_slide(slide):
    """A Slide without its arrangement. Its features do not stay open."""
    return slide._replace(centres=shuffled(slide.centres, [np.memmap(*slide.maps[0])]))


def turn(rng, points):
    """points (N, 2) turned by any angle, and flipped in half of the cases."""
    angle = 2 * np.pi * rng.random()
    c, s = np.cos(angle), np.sin(angle)
    turned = points @ np.array([[c, s], [-s, c]])
    return turned * [rng.choice([-1, 1]), 1]


def to_nm(points):
    """um -> an int32 tensor in nm: FSDP2 casts what floats a network is given to bf16, which has 8 bits."""
    return torch.from_numpy(np.rint(points * 1000).astype(np.int32))


def standardise(x, mean, std):
    return ((x.float() - mean) / std).clamp(-CLIP, CLIP)


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
        config = self.config
        rng = np.random.default_rng((config["seed"], n))
        number = rng.integers(len(self.slides))
        slide = self.slides[number]
        at = rng.choice(slide.centres[0])
        features, points = [], []
        for where, centres, scale in zip(slide.maps, slide.centres, self.about):
            rows = nearest(centres, at, scale["count"])
            features.append(np.memmap(*where)[rows])
            points.append(centres[rows] - at)
        sides = [scale["side"] for scale in self.about]
        hidden, wanted = hide(rng, points, sides, config["mask_share"], config["mask_block"])
        points = np.concatenate(points)
        if config["turns"]:
            points = turn(rng, points)
        features = torch.from_numpy(np.concatenate(features))
        return {"features": features, "places": to_nm(points), "hidden": hidden, "wanted": wanted, "slide": number}


# ---- objective ------------------------------------------------------------------------------------------------------


def feature_loss(predicted, target):
    """Of features (..., C): smooth-L1 + 0.5 (1 - cosine), (...)."""
    smooth = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    return smooth + 0.5 * (1 - F.cosine_similarity(predicted, target, dim=-1))


def window_losses(target, predicted, nm, hidden, wanted, rare=0.0):
    """
    The objective (4,): feature_loss of predicted (B, N, C), and of three guesses that need no network: zero, the mean
    of the window's visible places, their mean weighted by 1 / distance^2. nm (B, N, 2) are positions; hidden and wanted
    (B, N) are bool. Means over a window's wanted places, then over windows. A place weighs (squared distance of its
    target to the mean of the window's targets)^rare.
    """
    seen = (~hidden[:, None]).float()  # (B, 1, N)
    mean = seen @ target / seen.sum(2, keepdim=True).clamp(min=1)
    um = nm.float() / 1000
    squared = torch.cdist(um, um).square()
    near = seen / (squared + 1)
    neighbours = near @ target / near.sum(2, keepdim=True).clamp(min=1e-20)
    guesses = predicted.float(), torch.zeros_like(target), mean.expand_as(target), neighbours
    each = torch.stack([feature_loss(guess, target) for guess in guesses])  # (4, B, N)
    centre = target.mean(1, keepdim=True)
    away = (target - centre).square().mean(-1)
    weights = wanted * away**rare
    total = weights.sum(1).clamp(min=1e-20)
    return ((each * weights).sum(2) / total).mean(1)
