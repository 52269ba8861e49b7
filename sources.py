"""
Where tiles come from. A run has exactly one source, named by a key of train.py:

    slides = "data/TCGA/**/*.svs"   whole slides: tiles at a target mpp from random places with tissue, read on the fly
    sample_list = "list.txt"        lines `path x y level`: x y in level-0 pixels, tile_px pixels at that pyramid level
                                    (OpenMidnight's; two more fields, the level's mpp, are ignored)
    tiles = "data/tiles"            folder tree of .jpg .png .tif tiles, each used whole
    shards = "data/shards"          folder or glob of the .tar + .json that prepare/tiles.py writes, read in place
    parquet = "data/parquet"        folder or glob of .parquet with medarc/TCGA-12K-parquet's columns; needs pyarrow
    mix = (("slides", "data/TCGA/**/*.svs", 0.8), ("shards", "data/cptac", 0.2))    several, by weight

Your own source: README, "Change something". Its read(n, attempt) returns (uint8 (H, W, 3), {"slide", "x", "y" in
level-0 px, "mpp" or nan}) or raises OSError or wsi.SlideError. With wide_field, slides also give "wide", a tile as
large in px around the same centre.

n counts the samples of the run without end, and sample n depends only on n and the seed; attempt counts its
replacements. Every index appears exactly once per pass, except for slides and mixes, which are sampled at random.

Patients. holdout = 0.1 excludes a tenth of the patients from training. A hash of the patient's name decides, so every
source, node and seed excludes the same ones. The patient is what the regular expression `patient` finds in the file's
name, else the slide itself.

Memory. Lists and shards are tables of 13 and 28 bytes per tile, which all ranks and workers of a node map: 29 million
lines take 377 MB once. A worker keeps open_slides slides open, or 2 * WINDOW row groups of parquet files in memory.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import resource
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

import listing
import wsi

READ_ERRORS = (wsi.SlideError, OSError)  # an unreadable tile or slide: another one is drawn
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # others may pass
TISSUE_DRAWS = 20   # places tried in a slide for one tile; inside the mask 9 in 10 pass at 0.5 um/px, fewer at 2
OPEN_SHARDS = 256   # files per process at most, and half of what the system allows, which is usually 1024
WINDOW = 16         # parquet row groups among which the order of rows is random; a worker holds twice as many
GROUP_BYTES = 100e6 # of a row group, uncompressed, beyond which a parquet file is refused
SCALE_KEYS = "mpp_table slide_mpp mpp_from_objective trust_mpp mpps mpp_range eval_mpp eval_share".split()
COLUMNS = ("slide_path", "x", "y", "image_bytes")  # of parquet files
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # pillow tells their depth; in JPEG 2000 and PPM 16 bits pass for 8


class Unsuitable(wsi.SlideError):
    """An intact slide where no drawn place had enough tissue. Another one is drawn, and nothing is reported."""


# ---- order ----------------------------------------------------------------------------------------------------------


def pick(n, attempt, size, seed):
    """Index of sample n in a list of `size`: the shuffled order at the first attempt, random for a replacement."""
    if attempt == 0:
        return shuffled(n, size, seed)
    return int(np.random.default_rng((seed, n, attempt)).integers(size))


def shuffled(n, size, seed):
    """
    Element n of an endless walk over range(size) that visits each index once per pass, in a new random order each pass.

    It replaces a shuffled index, which costs 116 MB per worker and a second per pass for 29 million tiles. A 4-round
    Feistel network (Luby and Rackoff 1988) permutes a power of four; we apply it until it lands in the range.
    """
    epoch, i = divmod(n, size)
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            digest = hashlib.blake2b(f"{seed},{epoch},{r},{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        i = left << half | right
        if i < size:
            return i


# ---- files ----------------------------------------------------------------------------------------------------------


def held_out(path, config):
    """Whether the patient of a file is excluded from training."""
    return config["holdout"] > 0 and wsi.held_out(wsi.patient_of(path, config["patient"]), config["holdout"])


def held_file(path, config):
    """The same by its name or, where the path is a link, by a patient that the pattern finds in the file's own name."""
    if held_out(path, config):
        return True
    if not (config["holdout"] and os.path.islink(path)):
        return False
    real = os.path.realpath(path)
    return bool(re.search(config["patient"], os.path.basename(real))) and held_out(real, config)


def training_files(paths, config, kind, left_out):
    """The paths of which no name is held out; further names of theirs are in left_out. ValueError if there are none."""
    held = {place_of(path) for path in left_out if held_file(path, config)}
    kept = [path for path in paths if not held_file(path, config)]
    if held:
        kept = [path for path in kept if place_of(path) not in held]
    if not kept:
        raise ValueError(f"{kind}: holdout = {config['holdout']} leaves none of {len(paths)} files")
    return kept


def place_of(path):
    """What all names of a file share; a name that leads nowhere has none."""
    if not os.path.exists(path):
        return path
    state = os.stat(path)
    return state.st_dev, state.st_ino


def one_name_each(paths, doubles):
    """The first path of each file, in a list's order; doubles[path] is that of the others."""
    first = {}
    for path in paths:
        known = first.setdefault(place_of(path), path)
        if known != path:
            doubles[path] = known
    return list(first.values())


def listed(paths):
    """A digest of file names, by which ranks and resumed runs notice that they have found different files."""
    names = "\n".join(map(os.path.basename, paths)).encode(errors="replace")
    return f"list {hashlib.blake2b(names, digest_size=4).hexdigest()}"


def decode(file, name):
    """
    The RGB pixels of an image file, or of its bytes. Every image of training, evaluation and preparation enters here,
    so that equal files are equal pixels. Raises OSError with `name` if it is damaged, or if it would be misread.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            tags = image.tag_v2 if image.format == "TIFF" else {}
            bits, samples, kinds = tags.get(258, 1), tags.get(277, 1), tags.get(339, 1)  # 1: unsigned
            if image.mode[0] in "IF" or np.max(bits) > 8 or ";16" in str(image.tile):  # pillow keeps the upper 8 of 16
                raise ValueError(f"{image.mode} pixels of more than 8 bits per channel; save it with 8")
            if samples > 4 or np.any(np.not_equal(kinds, 1)):
                raise ValueError(f"{samples} channels of SampleFormat {kinds}; save 3 of unsigned numbers")
            size, frames = image.size, getattr(image, "n_frames", 1)
            for page in range(1, frames):  # smaller ones are a pyramid's
                image.seek(page)
                if math.prod(image.size) >= math.prod(size):
                    raise ValueError(f"{frames} images of one size, or the first is not the largest; save each alone")
            image.seek(0)
            if image.has_transparency_data:  # saved from read_region: outside the slide is white, not black
                white = Image.new("RGBA", size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except Exception as e:  # pillow raises OSError, SyntaxError, KeyError, struct.error, ... on a damaged file
        unknown = isinstance(e, UnidentifiedImageError)
        reason = f"not a {', '.join(FORMATS)} of 8 bits per channel" if unknown else " ".join(str(e).split())
        raise OSError(f"{name}: {type(e).__name__}: {reason}") from None


@contextlib.contextmanager
def named(place):
    """Errors of any kind, as pyarrow's, become OSErrors that name the place."""
    try:
        yield
    except Exception as e:
        text = getattr(e, "strerror", None) or str(e)
        raise OSError(f"{place}: {' '.join(text.split())}") from None


def keep_open(open_one, size):
    """open_one(path) with an LRU cache. A slide that fails is of no use: wsi.Unusable names it, once. If its file could
    not be reached, it is tried again."""
    cached, failed = functools.lru_cache(size)(open_one), {}

    def opened(path):
        if path in failed:
            raise Unsuitable(failed[path])
        try:
            return cached(path)
        except wsi.Unreachable:
            raise
        except wsi.SlideError as e:
            failed[path] = str(e)
            raise wsi.Unusable(failed[path]) from None

    return opened


def usable_slides(key, found, config, open_one, also=()):
    """
    (numbers of the files that are slides to train on, {path: the one whose slide it is}, {path: why it is refused}).
    `also` holds further names of these files.

    All are opened, so that a run knows what it can use. One whose disk is away for a moment is tried again when it is
    drawn. Refused ones are opened at each start: their remedy may be a file beside them that the table does not know.
    """
    def reason(path):
        if listing.printable(path) != path:
            return "its name is not UTF-8; rename it"
        try:
            open_one(path).close()
        except wsi.SlideError as e:
            if not isinstance(e, wsi.Unreachable) or isinstance(e.__cause__, LASTING):
                return str(e)
        return ""

    def reasons_of(paths):
        with ThreadPoolExecutor(wsi.OPENERS) as pool:
            return list(pool.map(reason, paths))

    def build():
        doubles = {}
        each = wsi.one_each(found, doubles) if key == "slides" else one_name_each(found, doubles)
        slides = training_files(each, config, key, [*also, *doubles])
        reasons = dict(zip(slides, reasons_of(slides)))
        refused = {listing.printable(path): text for path, text in reasons.items() if text}
        rows = [i for i, path in enumerate(found) if reasons.get(path) == ""]
        if not rows:
            unmatched = wsi.rows_without_slide(config["mpp_table"], found)
            lost = "".join(f"; {file}: {text}" for file, text in unmatched.items())
            stated = f"{key}: none of {len(slides)} can be used (give --tiles=FOLDER for tiles)"
            raise ValueError(f"{stated}: {reasons[slides[0]]}{lost}")
        return np.array(rows, np.uint32), (doubles, refused)

    inputs = [wsi.__file__, *filter(None, [config["mpp_table"]]), *found, *also]
    rows, (doubles, refused) = shared_table(key, inputs, config, np.uint32, build, ("holdout", "patient", *SCALE_KEYS),
                                            lambda names: "" in reasons_of(names[1]))
    return rows, doubles, refused


def shared_table(kind, inputs, config, dtype, build, keys=("holdout", "patient"), outdated=lambda names: False):
    """
    What build() returns: (rows, names), an array of `dtype` that is mapped from a file, and a JSON value.

    The first rank of each node builds the table while the others wait; the page cache then holds one copy for all. The
    file lies in the temporary folder (TMPDIR) and may be deleted between runs. A digest of what it was made from, files
    and keys, is in its name, so that an outdated one is never used; outdated(names) tells what these do not. Raises
    ValueError if it is empty.
    """
    import torch.distributed as dist
    about = repr((dtype, [config[key] for key in keys], [listing.state_of(path) for path in inputs]))
    digest = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
    folder = Path(tempfile.gettempdir(), f"nanopfm-{os.getuid()}")
    rows_file = folder / f"{kind}-{digest}.npy"
    names_file = rows_file.with_suffix(".json")
    builder = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
    there = rows_file.is_file() and names_file.is_file()
    if builder and (not there or outdated(json.loads(names_file.read_text()))):
        rows, names = build()
        if not len(rows):
            raise ValueError(f"{kind}: no tile to train on: nothing is there or finished, or every patient is held out")
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # files are renamed once they are whole
            np.save(f"{unfinished}/rows.npy", rows)
            Path(unfinished, "names.json").write_text(json.dumps(names))
            os.replace(f"{unfinished}/rows.npy", rows_file)
            os.replace(f"{unfinished}/names.json", names_file)
    if dist.is_initialized():
        dist.barrier()
    if not rows_file.is_file():
        raise ValueError(f"{kind}: ranks of a node have found different files; is something still being written there?")
    return np.load(rows_file, mmap_mode="r"), json.loads(names_file.read_text())


# ---- sources --------------------------------------------------------------------------------------------------------


class Slides:
    """Random tissue tiles of tile_px pixels, at one of several mpp or any mpp of a range. Slides are equally likely.
    tiles_per_visit consecutive samples come from one slide, because opening and masking it takes a second."""

    def __init__(self, pattern, config):
        self.config = config
        self.found, self.left_out = listing.find(pattern, "slides")
        rows, doubles, refused = usable_slides("slides", self.found, config, self.open, list(self.left_out))
        self.paths = [self.found[i] for i in rows]
        self.left_out |= doubles | refused
        self.about = f"{len(self.paths):,} of {len(self.found):,} slides ({listed(self.paths)})"
        self.found = [path for path in self.found if path not in doubles]
        self.visit = keep_open(self.open_with_tissue, config["open_slides"])

    def open(self, path):
        slide = wsi.open_slide(path, self.config)
        if draw_mpp(np.random.default_rng(0), max(slide.mpp_xy), self.config) is None:
            slide.close()
            raise wsi.SlideError(f"{path}: {slide.mpp:.3f} um/px is too coarse for every target in mpps or mpp_range")
        return slide

    def open_with_tissue(self, path):
        slide = self.open(path)
        slide.random_point(np.random.default_rng(0))  # makes the mask; SlideError if it has no tissue
        return slide

    def read(self, n, attempt=0):
        config, nth = self.config, n % self.config["tiles_per_visit"]
        rng = np.random.default_rng((config["seed"], n - nth, attempt))
        path = self.paths[rng.integers(len(self.paths))]
        if nth:  # each tile of a visit has its own stretch of the stream
            rng.bit_generator.advance(nth << 40)
        slide = self.visit(path)
        mpp = draw_mpp(rng, max(slide.mpp_xy), config)
        for _ in range(TISSUE_DRAWS):
            x, y = slide.random_tissue(rng, config["tile_px"], mpp)
            tile = slide.read(x, y, config["tile_px"], mpp)
            if wsi.is_tissue(tile, config["tissue_share"], slide.rule):
                about = {"slide": path, "x": x, "y": y, "mpp": mpp}
                return tile, about | self.wide(rng, slide, x, y, mpp)
        raise Unsuitable(f"{path}: no tile of {config['tissue_share']:.0%} tissue at {mpp:.4g} um/px in {TISSUE_DRAWS} "
                         "draws")

    def wide(self, rng, slide, x, y, mpp):
        """{"wide": a tile around the same centre, of a larger field and as many px}, read with true optics."""
        if not self.config["wide_field"]:
            return {}
        px = self.config["tile_px"]
        low, high = self.config["wide_field"]
        wide_mpp = mpp * math.exp(rng.uniform(math.log(low), math.log(high)))
        more = np.subtract(slide.extent(px, wide_mpp), slide.extent(px, mpp)) / 2
        corner = np.rint((x, y) - more).astype(int).tolist()
        return {"wide": slide.read(*corner, px, wide_mpp)}


def draw_mpp(rng, finest, config):
    """A target in um/px for a slide of `finest` um/px, or None if the slide is too coarse for all targets."""
    if not config["mpp_range"]:
        fine = [mpp for mpp in config["mpps"] if mpp * wsi.MAX_ENLARGE >= finest]
        return float(rng.choice(fine)) if fine else None
    low, high = config["mpp_range"]
    low = max(low, finest / wsi.MAX_ENLARGE)
    share = config["eval_share"] if config["eval_mpp"] * wsi.MAX_ENLARGE >= finest else 0
    if share and (low > high or rng.random() < share):
        return config["eval_mpp"]
    return math.exp(rng.uniform(math.log(low), math.log(high))) if low <= high else None


class SampleList:
    """OpenMidnight's lists. A slide without an mpp may be listed, because the levels set the scale here."""

    ROW = np.dtype([("slide", "<u4"), ("x", "<i4"), ("y", "<i4"), ("level", "u1")])

    def __init__(self, file, config):
        self.file, self.config = file, config
        if not os.path.isfile(file):
            raise ValueError(f"sample_list={file}: no such file; a list has lines of path x y level")
        self.table, self.found = shared_table("sample_list", [file], config, self.ROW, self.parse)
        used, doubles, self.left_out = usable_slides("sample_list", self.found, config, self.open)
        numbers = {path: i for i, path in enumerate(self.found)}
        slide = np.array([numbers[doubles.get(path, path)] for path in self.found], np.uint32)  # of each name
        of_used = np.isin(slide, used)[self.table["slide"]]

        def usable_rows():
            rows = self.table[of_used]
            rows["slide"] = slide[rows["slide"]]
            return rows, None

        if doubles or not of_used.all():
            inputs = [self.table.filename, used.filename]
            self.table, _ = shared_table("sample_list", inputs, config, self.ROW, usable_rows)
        self.size = len(self.table)
        self.about = f"{self.size:,} tiles of a sample list of {len(used):,} slides"
        self.visit = keep_open(self.open, config["open_slides"])

    def parse(self):
        """Takes about 24 s for 29 million lines."""
        rows, slides, pack = bytearray(), {}, struct.Struct("<IiiB").pack
        with open(self.file, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                # a path may hold spaces, so the two more fields are there if what would be x y is
                fields = line.rsplit(None, 5)
                if len(fields) < 6 or not all(text.lstrip("-").isdigit() for text in fields[1:4]):
                    fields = line.rsplit(None, 3)
                try:
                    path, x, y, level = fields[:4]
                    slide = slides.setdefault(path, len(slides))
                    rows += pack(slide, int(x), int(y), int(level))
                except (ValueError, struct.error):
                    raise ValueError(f"{self.file}, line {number}: not 'path x y level': {line.strip()!r}") from None
        rows = np.frombuffer(rows, self.ROW)
        kept = np.array([not held_out(path, self.config) for path in slides], bool)
        return rows[kept[rows["slide"]]], list(map(os.path.expanduser, slides))

    def open(self, path):
        try:
            return wsi.open_slide(path, self.config)
        except wsi.SlideError:
            slide = wsi.Slide(path, 1.0, self.config["exact_reads"])
            slide.level_mpp = [math.nan] * len(slide.level_mpp)  # no mpp is known
            return slide

    def read(self, n, attempt=0):
        i, x, y, level = self.table[pick(n, attempt, len(self.table), self.config["seed"])].item()
        slide, px = self.visit(self.found[i]), self.config["tile_px"]
        if level < len(slide.level_mpp) and slide.outside([(x, y)], px * slide.level_scale[level])[0]:
            raise wsi.SlideError(f"{slide.path}: the line '... {x} {y} {level}' of {self.file} lies outside the slide "
                                 f"of {slide.dimensions} px; was the list made of another scan?")
        tile = slide.read_level(x, y, px, level)
        return tile, {"slide": slide.path, "x": x, "y": y, "mpp": slide.level_mpp[level]}


class Tiles:
    """A folder tree of images, each a tile of its own size. Its name serves as its slide's; its place is unknown."""

    ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")

    def __init__(self, folder, config):
        if not os.path.isdir(folder):
            raise ValueError(f"tiles: no folder {folder}")
        found, self.left_out = listing.find(folder, "tiles", self.ENDINGS)
        for path in found if config["holdout"] else ():
            if not re.search(config["patient"], os.path.basename(path)):  # each tile would be its own patient
                raise ValueError(f"tiles: holdout needs patients, but the name of {path} has none: rename the tiles, "
                                 "or find the patient with --patient=REGEX")
        self.config, self.paths = config, training_files(found, config, "tiles", self.left_out)
        self.size = len(self.paths)
        self.about = f"{self.size:,} of {len(found):,} tiles in a folder ({listed(self.paths)})"

    def read(self, n, attempt=0):
        path = self.paths[pick(n, attempt, len(self.paths), self.config["seed"])]
        return decode(path, path), {"slide": path, "x": 0, "y": 0, "mpp": math.nan}


class Shards:
    """Tiles inside tar files, at the places that the .json beside each tar lists. A tar without one is unfinished."""

    ROW = np.dtype([("shard", "<u4"), ("offset", "<i8"), ("size", "<i4"), ("x", "<i4"), ("y", "<i4"), ("mpp", "<f4")])

    def __init__(self, pattern, config):
        tars, self.left_out = listing.find(pattern, "shards", (".tar",), lambda tar: os.path.isfile(beside(tar)))
        finished = [tar for tar in tars if os.path.isfile(sidecar(tar))]
        for tar in sorted(set(tars).difference(finished)):
            self.left_out[tar] = f"no {beside(tar)}: unfinished, or copied without it"
        self.config, self.tars = config, list(map(os.path.abspath, finished))
        inputs = [*self.tars, *map(sidecar, self.tars)]
        self.table, self.slides = shared_table("shards", inputs, config, self.ROW, self.index)
        self.size = len(self.table)
        self.about = (f"{self.size:,} tiles of {len(self.tars):,} finished of {len(tars):,} shards "
                      f"({listed(self.tars)})")
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        size = OPEN_SHARDS if allowed == resource.RLIM_INFINITY else min(OPEN_SHARDS, allowed // 2)
        self.open = functools.lru_cache(size)(functools.partial(open, mode="rb", buffering=0))

    def index(self):
        rows, slides = [np.zeros(0, self.ROW)], []
        for i, tar in enumerate(self.tars):
            slide, stated, of_tar = read_sidecar(tar, self.ROW)
            of_tar["shard"] = i
            slides.append(slide)
            pattern = self.config["patient"]
            if self.config["holdout"] and stated != wsi.patient_of(slide, pattern):
                raise ValueError(f"{sidecar(tar)}: patient {stated}, but --patient={pattern} finds another in {slide}: "
                                 "hold out with the pattern that the shards were made with")
            if not held_out(slide, self.config):
                rows.append(of_tar)
        return np.concatenate(rows), slides

    def read(self, n, attempt=0):
        i, offset, size, x, y, mpp = self.table[pick(n, attempt, len(self.table), self.config["seed"])].item()
        place = f"{self.tars[i]}: tile x={x} y={y} at byte {offset}"
        with named(place):
            blob = os.pread(self.open(self.tars[i]).fileno(), size, offset)  # no file position that forks would share
        return decode(blob, place), {"slide": self.slides[i], "x": x, "y": y, "mpp": mpp}


def beside(tar):
    return tar.removesuffix(".tar") + ".json"


def sidecar(tar):
    """The file that lists the tiles of a tar: beside it, or beside the file that a link leads to."""
    linked = os.path.islink(tar) and not os.path.isfile(beside(tar))
    return beside(os.path.realpath(tar) if linked else tar)


def read_sidecar(tar, dtype):
    """(slide and patient of a finished tar by its .json, its rows of `dtype` with the first column empty)."""
    try:
        side = json.loads(Path(sidecar(tar)).read_text())
        slide, patient, stated = os.fspath(side["slide"]), side["patient"], side["bytes"]
        rows = np.zeros(len(side["offset"]), dtype)
        for name in dtype.names[1:]:
            rows[name] = side[name]
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise ValueError(f"{sidecar(tar)}: prepare/tiles.py did not write this ({type(e).__name__}: {e})") from None
    size = os.path.getsize(tar)
    if size != stated:
        raise ValueError(f"{tar} has {size:,} bytes, its .json says {stated:,}: copy it again, or delete both and "
                         "run prepare/tiles.py again")
    return slide, patient, rows


class Parquet:
    """Rows of parquet files. A row cannot be read without its row group, so a pass takes the groups in a random order
    and shuffles the rows of about WINDOW groups at a time. Each worker reads every group."""

    ROW = np.dtype([("file", "<u4"), ("group", "<u4"), ("rows", "<i8")])

    def __init__(self, pattern, config):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("parquet: needs pyarrow: pip install pyarrow") from None
        self.pq, self.config = pyarrow.parquet, config
        found, self.left_out = listing.find(pattern, "parquet", (".parquet",))
        self.files = list(map(os.path.abspath, found))
        self.groups, _ = shared_table("parquet", self.files, config, self.ROW, self.index)
        self.size = int(self.groups["rows"].sum())
        self.window = max(WINDOW * self.size // len(self.groups), 1)
        self.about = f"{self.size:,} rows of {len(self.files):,} parquet files ({listed(self.files)})"
        self.walk, self.load = functools.lru_cache(2)(self.walk), functools.lru_cache(2 * WINDOW)(self.load)

    def index(self):
        """A row per row group that holds patients to train on."""
        groups = []
        for i, file in enumerate(self.files):
            with named(file):
                groups += self.groups_of(i, file)
        return np.array(groups, self.ROW), None

    def groups_of(self, i, file):
        f, groups = self.pq.ParquetFile(file), []
        missing = sorted(set(COLUMNS) - set(f.schema_arrow.names))
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        for g in range(f.num_row_groups):
            size = f.metadata.row_group(g).total_byte_size
            if size > GROUP_BYTES:
                raise ValueError(f"row group {g} has {size / 1e6:.0f} MB, and a worker holds many: write it again "
                                 "with a row_group_size that makes about 10 MB")
            rows = len(self.kept(f.read_row_group(g, ["slide_path"], use_threads=False)))
            if rows:
                groups.append((i, g, rows))
        return groups

    def kept(self, columns):
        """The rows to train on."""
        slides = columns["slide_path"].to_pylist()
        if not all(isinstance(slide, str) for slide in slides):
            raise ValueError("slide_path is not text in every row")
        return [row for row, slide in enumerate(slides) if not held_out(slide, self.config)]

    def walk(self, turn):
        """(groups in the order of this pass, rows of the pass before each of them)."""
        order = np.random.default_rng((self.config["seed"], turn)).permutation(len(self.groups))
        rows = self.groups["rows"][order]
        return order, np.cumsum(rows) - rows

    def place(self, n, attempt):
        """(group, which of its rows). A replacement comes from the same window, whose groups are in memory."""
        turn, i = divmod(n, self.size)
        start = i // self.window * self.window
        size = min(self.window, self.size - start)
        i = start + pick(i - start, attempt, size, (self.config["seed"], turn, start))
        order, before = self.walk(turn)
        nth = np.searchsorted(before, i, "right") - 1
        return int(order[nth]), int(i - before[nth])

    def load(self, file, g):
        """(columns of a row group, its rows to train on). pyarrow's threads would not survive a fork: none are used."""
        columns = self.pq.ParquetFile(file).read_row_group(g, list(COLUMNS), use_threads=False)
        return columns, self.kept(columns)

    def read(self, n, attempt=0):
        k, nth = self.place(n, attempt)
        i, g, _ = self.groups[k].item()
        place = f"{self.files[i]}: row group {g}"
        with named(place):
            columns, kept = self.load(self.files[i], g)
            slide, x, y, blob = (columns[name][kept[nth]].as_py() for name in COLUMNS)
            if not isinstance(blob, bytes):
                raise TypeError(f"image_bytes of row {kept[nth]} is of type {type(blob).__name__}")
        return decode(blob, f"{place}, row {kept[nth]}"), {"slide": slide, "x": x, "y": y, "mpp": math.nan}


class Mix:
    """Several sources by weight: one is drawn for each tiles_per_visit consecutive samples, and is asked for sample n.
    One of weight 0.2 is asked for a random fifth of the samples, so its indices do not appear once per pass."""

    def __init__(self, entries, config):
        self.config, self.sources, weights = config, [], []
        for i, entry in enumerate(entries):
            try:
                kind, path, weight = entry
                fits = kind in SOURCES and weight > 0
            except (TypeError, ValueError):
                fits = False
            if not fits:
                raise ValueError(f"mix: {entry!r} is not (one of {', '.join(SOURCES)}; its path; a weight above 0)")
            own = {**config, "seed": config["seed"] + 1000 * i}  # two sources of slides would draw alike
            try:
                self.sources.append(SOURCES[kind](path, own))
            except ValueError as e:
                raise ValueError(f"mix: {e}") from None
            weights.append(weight)
        self.shares = np.array(weights) / sum(weights)
        self.about = "; ".join(f"{share:.1%} {s.about}" for share, s in zip(self.shares, self.sources))

    def read(self, n, attempt=0):
        visit = n // self.config["tiles_per_visit"]
        rng = np.random.default_rng((self.config["seed"], visit, 0, 2))  # no other stream ends in 2
        return self.sources[rng.choice(len(self.sources), p=self.shares)].read(n, attempt)


SOURCES = {"slides": Slides, "sample_list": SampleList, "tiles": Tiles, "shards": Shards, "parquet": Parquet,
           "mix": Mix}


def open_source(config):
    """The one source that the keys name. Raises ValueError if its data are missing or do not fit."""
    named = [key for key in SOURCES if config.get(key)]
    if len(named) != 1:
        given = ", ".join(named) or "none"
        raise ValueError(f"set exactly one of {', '.join(SOURCES)} (now: {given}); unset the others as in --slides= "
                         "--tiles=DIR; prepare/toy.py makes slides to try")
    wsi.check_pattern(config["patient"])
    source = SOURCES[named[0]](config[named[0]], config)
    left_out, found = {}, []
    for part in getattr(source, "sources", [source]):
        left_out |= getattr(part, "left_out", {})
        found += getattr(part, "found", [])
    source.left_out = left_out | wsi.rows_without_slide(config["mpp_table"], found)
    if config["wide_field"] and not isinstance(source, Slides):
        raise ValueError(f"{named[0]}: wide_field reads around a tile, which only slides can; give --slides")
    return source
