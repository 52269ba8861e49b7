"""
Where tiles come from. Exactly one source a run, by a key of train.py:

    slides = "data/TCGA/**/*.svs"   whole slides: tiles at a target mpp from random places with tissue, read on the fly
    sample_list = "list.txt"        lines `path x y level`: x y in level-0 pixels, tile_px pixels at that pyramid level
                                    (OpenMidnight's; two more fields, the level's mpp, are allowed and ignored)
    shards = "data/shards"          folder or glob of the .tar + .json that wsi.py --task=tiles writes, read in place
    parquet = "data/parquet"        folder or glob of .parquet with medarc/TCGA-12K-parquet's columns; needs pyarrow
    tiles = "data/tiles"            folder tree of .jpg .png .tif tiles, each used whole
    mix = (("slides", "data/TCGA/**/*.svs", 0.8), ("shards", "data/cptac", 0.2))    several, by weight

source.read(n, attempt) -> (uint8 (H, W, 3), {"slide", "x", "y" in level-0 px, "mpp" or nan}), or one of READ_ERRORS.
n counts the run's samples without end, and what n is depends on nothing but n and the seed; attempt > 0 is a
replacement for one that could not be read. But for slides, which are drawn, every index comes exactly once a pass.

Patients. With holdout = 0.1 a tenth of the patients is never trained on, by a hash of the patient's name, so the same
ones in every source, on every node and with every seed. A patient is what the regular expression `patient` finds in
the file's name, else the slide.

Memory. Lists, shards and parquet are tables of 13, 28 and 8 bytes a tile, parsed once a node into a file that all
ranks and workers map: 29 million lines are 377 MB of page cache, not of each process. Of slides open_slides stay open
in a worker, of row groups WINDOW: parquet wants shuffled rows and row groups of 10 MB, or a worker holds gigabytes and
batches see WINDOW slides at a time. The memory is printed at the start.
"""
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import wsi

READ_ERRORS = (wsi.SlideError, OSError)  # a bad tile or slide: another is drawn
TISSUE_DRAWS = 20  # places in a slide for one tile; of masked ones 9 in 10 pass at 0.5 um/px, fewer at 2 in thin ones
OPEN_SHARDS = 256  # files a process; the usual limit is 1024
WINDOW = 16        # parquet row groups that a process holds and among whose rows the order is random
PERIOD = 1000      # blocks in which the weights of a mix are kept exactly
COLUMNS = ("slide_path", "x", "y", "tile_size", "image_dtype", "image_bytes")  # those used of parquet files

# ---- order ----------------------------------------------------------------------------------------------------------


def pick(n, attempt, size, seed):
    """Index of sample n in a list of `size`: the walk's at the first attempt, a random one for a replacement."""
    return shuffled(n, size, seed) if attempt == 0 else int(np.random.default_rng((seed, n, attempt)).integers(size))


def shuffled(n, size, seed):
    """
    Element n of an endless walk over range(size) that visits each index once a pass, in a new random order each pass.

    A keyed permutation by a 4-round Feistel network (Luby and Rackoff 1988) walked until it lands in range: no memory
    and no start-up for 29 million tiles, where a shuffled index costs 116 MB a worker and a second a pass.
    """
    epoch, i = divmod(n, size)
    half = max((size - 1).bit_length() + 1, 2) // 2
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for r in range(4):
            digest = hashlib.blake2b(f"{seed},{epoch},{r},{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & ((1 << half) - 1))
        i = left << half | right
        if i < size:
            return i


class Unsuitable(wsi.SlideError):
    """A sound slide in which no place drawn had enough tissue: another is drawn, and nothing is wrong."""


# ---- files ----------------------------------------------------------------------------------------------------------


def held_out(path, c):
    return c["holdout"] > 0 and wsi.held_out(wsi.patient_of(path, c["patient"]), c["holdout"])


def listed(paths):
    """A name for a list of files, for ranks and resumed runs to tell whether they have found the same."""
    names = "\n".join(map(os.path.basename, paths)).encode(errors="replace")
    return f"list {hashlib.blake2b(names, digest_size=4).hexdigest()}"


def files_of(pattern, ending, key):
    """Sorted absolute paths of the files with that ending in a folder tree or a glob; a leading . means unfinished."""
    found = map(str, Path(pattern).rglob("*")) if os.path.isdir(pattern) else wsi.expand(pattern, key)
    paths = [os.path.abspath(p) for p in found if p.endswith(ending) and not os.path.basename(p).startswith(".")]
    if not paths:
        raise ValueError(f"{key}: no {ending} file in {pattern}")
    return sorted(paths)


def decode(file, name):
    """The RGB pixels of an image file, or of its bytes; OSError with `name` for a damaged one."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode == "RGB":
                return np.array(image)
            if image.has_transparency_data:  # as read_region saves it: outside the slide is white, not black
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            elif image.mode not in ("L", "P", "CMYK", "YCbCr", "1"):
                raise ValueError(f"{image.mode} pixels; save it with 8 bits a channel")
            return np.array(image.convert("RGB"))
    except Exception as e:  # pillow raises OSError, SyntaxError, KeyError, struct.error, ... on a damaged file
        text = re.sub(r" <_io.BytesIO.*?>", "", " ".join(str(e).split()))
        raise OSError(f"{name}: {type(e).__name__}: {text}") from None


def keep_open(open_one, size):
    """open_one(path) through an LRU; a path that failed is not tried again in this process, but fails as it did."""
    failed, cached = {}, functools.lru_cache(size)(open_one)

    def opened(path):
        if path in failed:
            raise wsi.SlideError(failed[path])
        try:
            return cached(path)
        except wsi.SlideError as e:
            failed[path] = str(e)
            raise

    return opened


def shared_table(kind, inputs, c, dtype, build):
    """
    (rows, names): a read-only memory map of rows of `dtype`, and a JSON value. build(write) -> names makes them.

    Once a node: the first process builds it under a lock, which the system drops with the process, the others wait; the
    page cache holds one copy for all. The file lies beside inputs[0], or in the temporary folder where that is not
    writable. A digest of the path, size and mtime of all inputs and of the held-out patients is in its name: a stale
    one is never used, and any, with its empty .lock, may be deleted. Layout: rows, names, length of names in 8 bytes.
    """
    stats = [(os.path.abspath(path), (s := os.stat(path)).st_size, s.st_mtime_ns) for path in inputs]
    patients = c["holdout"] and (c["holdout"], c["patient"])
    digest = hashlib.blake2b(repr((kind, patients, dtype, stats)).encode(), digest_size=12).hexdigest()
    places = [os.path.join(os.path.dirname(stats[0][0]), f".{kind}-{digest}.table"),
              os.path.join(tempfile.gettempdir(), f".{kind}-{digest}-{os.getuid()}.table")]
    path = next((p for p in places if os.access(p, os.R_OK)), None) or build_table(kind, places, build)
    try:
        with open(path, "rb") as f:
            end = f.seek(-8, os.SEEK_END)
            start = end - struct.unpack("<Q", f.read())[0]
            f.seek(start)
            names = json.loads(f.read(end - start))
        return np.memmap(path, dtype, "r", shape=(start // np.dtype(dtype).itemsize,)), names
    except (OSError, ValueError, struct.error):
        raise ValueError(f"{path}: this table is damaged; delete it, it will be built again") from None


def build_table(kind, places, build):
    """The path of the finished table, in the first of `places` that takes a lock; written whole or not at all."""
    path, lock = lock_first(places)
    unfinished = f"{path}.{platform.node()}"
    with lock:
        if os.path.isfile(path):  # another process built it while this one waited
            return path
        try:
            with open(unfinished, "wb") as f:
                names = json.dumps(build(f.write)).encode()
                if not f.tell():
                    raise ValueError(f"{kind}: no tile to train on: empty, or every patient is held out")
                f.write(names + struct.pack("<Q", len(names)))
                f.flush()
                os.fsync(f.fileno())
            os.replace(unfinished, path)
        except OSError as e:  # a full disk, an input that cannot be read
            raise OSError(f"{path} was not built: {e}") from e
        finally:
            if os.path.isfile(unfinished):
                os.remove(unfinished)
    return path


def lock_first(places):
    """(place, locked file) for the first that is writable, on a file system with locks."""
    for path in places:
        try:
            lock = open(f"{path}.lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            return path, lock
        except OSError as e:
            reason = e
    raise OSError(f"no table can be written to {' or '.join(places)}: {reason}")


# ---- sources --------------------------------------------------------------------------------------------------------


class Slides:
    """
    Random tissue tiles of tile_px pixels at one of several mpp, or at any in a range; every slide is as likely.

    tiles_per_visit consecutive samples come from one slide: opening it and masking its tissue costs up to a second.
    """

    def __init__(self, pattern, c):
        paths = wsi.expand(pattern, "slides")
        self.c, self.paths = c, [p for p in paths if not held_out(p, c)]
        self.about = f"{len(self.paths):,} of {len(paths):,} slides ({listed(self.paths)})"
        self.open = keep_open(self.enter, c["open_slides"])
        if not self.paths:
            raise ValueError(f"slides: holdout = {c['holdout']} leaves none of the {len(paths)} in {pattern}")
        self.refuse_if_none_opens(self.paths[:20])

    def slide(self, path):
        c = self.c
        return wsi.Slide(path, c["slide_mpp"] or None, c["exact_reads"], c["mpp_from_objective"],
                         mask_dir=c["mask_dir"])

    def refuse_if_none_opens(self, paths):
        """A pattern that matches the wrong files should not cost a start; single bad slides are replaced later."""
        errors = []
        for path in paths:
            try:
                return self.slide(path).close()
            except wsi.SlideError as e:
                errors.append(e)
        tiles = paths[0].lower().endswith((".jpg", ".jpeg", ".png"))
        hint = "; are these tiles? then --slides= --tiles=FOLDER" if tiles else ""
        raise ValueError(f"slides: none of the first {len(paths)} opens{hint}: {errors[0]}")

    def enter(self, path):
        """The slide, once it has a mask with tissue and a target mpp that it is fine enough for."""
        slide = self.slide(path)
        if draw_mpp(np.random.default_rng(0), max(slide.mpp_xy), self.c) is None:
            targets = f"mpp_range={self.c['mpp_range']}" if self.c["mpp_range"] else f"mpps={self.c['mpps']}"
            raise wsi.SlideError(f"{path}: {slide.mpp:.3f} um/px is too coarse for every target in {targets}")
        slide.random_point(np.random.default_rng(0))  # makes the mask; SlideError if there is no tissue
        return slide

    def read(self, n, attempt=0):
        c, nth = self.c, n % self.c["tiles_per_visit"]
        rng = np.random.default_rng((c["seed"], n - nth, attempt))
        path = self.paths[rng.integers(len(self.paths))]
        if nth:  # each tile of a visit has its own stretch of the stream
            rng.bit_generator.advance(nth << 40)
        slide = self.open(path)
        mpp = draw_mpp(rng, max(slide.mpp_xy), c)
        for _ in range(TISSUE_DRAWS):
            x, y = slide.random_tissue(rng, c["tile_px"], mpp)
            tile = slide.read(x, y, c["tile_px"], mpp)
            if wsi.is_tissue(tile, c["tissue_share"]):
                return tile, {"slide": path, "x": x, "y": y, "mpp": mpp}
        share = f"{c['tissue_share']:.0%} tissue at {mpp:.4g} um/px"
        raise Unsuitable(f"{path}: no tile of {share} in {TISSUE_DRAWS} draws")


def draw_mpp(rng, finest, c):
    """A target in um/px for a slide of `finest` um/px, or None if it is too coarse for all of them."""
    if not c["mpp_range"]:
        fine = [m for m in c["mpps"] if m * wsi.MAX_ENLARGE >= finest]
        return float(rng.choice(fine)) if fine else None
    low, high = max(c["mpp_range"][0], finest / wsi.MAX_ENLARGE), c["mpp_range"][1]
    share = c["eval_share"] if c["eval_mpp"] * wsi.MAX_ENLARGE >= finest else 0
    if share and (low > high or rng.random() < share):
        return c["eval_mpp"]
    return math.exp(rng.uniform(math.log(low), math.log(high))) if low <= high else None


class SampleList:
    """OpenMidnight's lists. A slide that does not know its mpp may be listed: levels set the scale here."""

    ROW = np.dtype([("slide", "<u4"), ("x", "<i4"), ("y", "<i4"), ("level", "u1")])

    def __init__(self, file, c):
        self.file, self.c = file, c
        if not os.path.isfile(file):
            raise ValueError(f"sample_list: no file {file}")
        self.table, self.paths = shared_table("sample_list", [file], c, self.ROW, self.parse)
        self.about = f"{len(self.table):,} tiles of a sample list of {len(self.paths):,} slides"
        self.open = keep_open(self.enter, c["open_slides"])

    def parse(self, write):
        """1.2 M lines a second and core: 24 s for 29 million."""
        ids, kept, pack = {}, [], struct.Struct("<IiiB").pack
        with open(self.file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                try:
                    path, x, y, level = line.rsplit(None, 3)  # a path may hold spaces
                    if not level.isdigit():
                        path, x, y, level, _, _ = line.rsplit(None, 5)
                    slide = ids.setdefault(path, len(ids))
                    row = pack(slide, int(x), int(y), int(level))
                except (ValueError, struct.error):
                    text = line.decode(errors="replace").strip()
                    raise ValueError(f"{self.file}, line {number}: not 'path x y level': {text!r}") from None
                if slide == len(kept):
                    kept.append(not held_out(os.fsdecode(path), self.c))
                if kept[slide]:
                    write(row)
        return [os.fsdecode(path) for path in ids]

    def enter(self, path):
        """(slide, whether its mpp is known)."""
        c = self.c
        try:
            return wsi.Slide(path, c["slide_mpp"] or None, c["exact_reads"], c["mpp_from_objective"]), True
        except wsi.SlideError:
            return wsi.Slide(path, 1.0, self.c["exact_reads"]), False

    def read(self, n, attempt=0):
        i, x, y, level = self.table[pick(n, attempt, len(self.table), self.c["seed"])].item()
        slide, known = self.open(self.paths[i])
        tile = slide.read_level(x, y, self.c["tile_px"], level)
        return tile, {"slide": slide.path, "x": x, "y": y, "mpp": slide.level_mpp[level] if known else math.nan}


class Tiles:
    """A folder tree of images, each a tile of its own size. Its place is unknown, its name is its slide's."""

    def __init__(self, folder, c):
        if not os.path.isdir(folder):
            raise ValueError(f"tiles: no folder {folder}")
        endings = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
        found = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in endings)
        if not found:
            raise ValueError(f"tiles: no {' '.join(endings)} files under {folder}")
        for path in found if c["holdout"] else ():
            if not re.search(c["patient"], os.path.basename(path)):  # each tile would be its own patient
                raise ValueError(f"tiles: holdout needs patients, but the file name of {path} has none: give the tiles "
                                 "names with the patient in, and --patient=REGEX to find it")
        self.c, self.paths = c, [p for p in found if not held_out(p, c)]
        if not self.paths:
            raise ValueError(f"tiles: holdout = {c['holdout']} leaves none of {len(found)} in {folder}")
        self.about = f"{len(self.paths):,} of {len(found):,} tiles in a folder ({listed(self.paths)})"

    def read(self, n, attempt=0):
        path = self.paths[pick(n, attempt, len(self.paths), self.c["seed"])]
        return decode(path, path), {"slide": path, "x": 0, "y": 0, "mpp": math.nan}


class Shards:
    """Tiles inside tar files, at the places that each tar's sidecar .json lists; a tar without one is not finished."""

    ROW = np.dtype([("shard", "<u4"), ("offset", "<i8"), ("size", "<i4"), ("x", "<i4"), ("y", "<i4"), ("mpp", "<f4")])

    def __init__(self, pattern, c):
        tars = files_of(pattern, ".tar", "shards")
        self.c, self.tars = c, [t for t in tars if os.path.isfile(sidecar(t))]
        if not self.tars:
            raise ValueError(f"shards: none of the {len(tars)} .tar in {pattern} has its .json: not finished?")
        inputs = [file for tar in self.tars for file in (sidecar(tar), tar)]
        self.table, self.slides = shared_table("shards", inputs, c, self.ROW, self.index)
        unfinished = len(tars) - len(self.tars)
        self.about = f"{len(self.table):,} tiles of {len(self.tars):,} shards ({listed(self.tars)})"
        self.about += f", {unfinished} not finished" if unfinished else ""
        self.open = functools.lru_cache(OPEN_SHARDS)(lambda tar: open(tar, "rb", buffering=0))

    def index(self, write):
        slides = []
        for i, tar in enumerate(self.tars):
            rows, side = read_sidecar(tar, self.ROW)
            rows["shard"] = i
            slides.append(side["slide"])
            if self.c["holdout"] and side["patient"] != wsi.patient_of(side["slide"], self.c["patient"]):
                raise ValueError(f"{sidecar(tar)}: patient {side['patient']}, but --patient={self.c['patient']} finds "
                                 f"{wsi.patient_of(side['slide'], self.c['patient'])}: hold out by the same pattern")
            if not held_out(side["slide"], self.c):
                write(rows.tobytes())
        return slides

    def read(self, n, attempt=0):
        i, offset, size, x, y, mpp = self.table[pick(n, attempt, len(self.table), self.c["seed"])].item()
        place = f"{self.tars[i]}: tile x={x} y={y} at byte {offset}"
        try:
            blob = os.pread(self.open(self.tars[i]).fileno(), size, offset)  # has no position that a fork would share
        except OSError as e:
            raise OSError(f"{place}: {e.strerror}") from None
        if len(blob) != size:
            raise OSError(f"{place}: {len(blob)} of {size} bytes")
        return decode(blob, place), {"slide": self.slides[i], "x": x, "y": y, "mpp": mpp}


def sidecar(tar):
    return tar[: -len(".tar")] + ".json"


def read_sidecar(tar, dtype):
    """(rows, sidecar) of a finished tar: the columns that `dtype` names, but for the first."""
    try:
        with open(sidecar(tar)) as f:
            side = json.load(f)
        rows = np.zeros(len(side["offset"]), dtype)
        for column in dtype.names[1:]:
            if len(side[column]) != len(rows):
                raise ValueError(f"{column} has {len(side[column])} rows of {len(rows)}")
            rows[column] = side[column]
        told, size = side["bytes"], os.path.getsize(tar)
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise ValueError(f"{sidecar(tar)}: not what --task=tiles writes ({type(e).__name__}: {e})") from None
    if size != told:
        raise ValueError(f"{tar} has {size:,} bytes, its .json says {told:,}: copy it again, or delete both and rerun "
                         "--task=tiles")
    return rows, side


class Parquet:
    """
    Rows of parquet files. Row groups come in a new random order each pass, rows in a random order among the WINDOW
    groups at a time, since a row cannot be had without its group; each worker reads every group.
    """

    ROW = np.dtype([("row", "<u4"), ("slide", "<u4")])

    def __init__(self, pattern, c):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("parquet: needs pyarrow: pip install pyarrow") from None
        self.pq, self.c, self.files = pyarrow.parquet, c, files_of(pattern, ".parquet", "parquet")
        self.table, names = shared_table("parquet", self.files, c, self.ROW, self.index)
        self.slides, self.groups = names["slides"], names["groups"]  # of groups: file, number, rows to train on, bytes
        self.rows = np.array([rows for _, _, rows, _ in self.groups])
        self.first = np.cumsum(self.rows) - self.rows
        held = sum(sorted(size for *_, size in self.groups)[-WINDOW:]) / 1e9
        self.about = (f"{len(self.table):,} rows in {len(self.groups):,} row groups of {len(self.files):,} parquet "
                      f"files ({listed(self.files)}), up to {held:.2g} GB in each worker for {WINDOW} groups at a time")
        self.walk, self.group = functools.lru_cache(2)(self.walk), functools.lru_cache(WINDOW)(self.group)

    def open(self, file):
        try:
            return self.pq.ParquetFile(file)
        except Exception as e:  # pyarrow's own errors are ValueErrors and others, and do not name the file
            raise OSError(f"{file}: no whole parquet file: {' '.join(str(e).split())}") from None

    def index(self, write):
        ids, kept, groups = {}, [], []
        for i, file in enumerate(self.files):
            with self.open(file) as f:
                if missing := set(COLUMNS) - set(f.schema_arrow.names):
                    raise ValueError(f"{file}: no column {', '.join(sorted(missing))}")
                for g in range(f.num_row_groups):
                    column = f.read_row_group(g, ["slide_path"], use_threads=False)["slide_path"].to_pylist()
                    for slide in dict.fromkeys(column):
                        if not isinstance(slide, str):
                            raise ValueError(f"{file}: row group {g}: slide_path holds {slide!r}, which is no path")
                        if ids.setdefault(slide, len(ids)) == len(kept):
                            kept.append(not held_out(slide, self.c))
                    rows = [(row, ids[slide]) for row, slide in enumerate(column) if kept[ids[slide]]]
                    write(np.array(rows, self.ROW).tobytes())
                    groups += [(i, g, len(rows), f.metadata.row_group(g).total_byte_size)] if rows else []
        return {"slides": list(ids), "groups": groups}

    def walk(self, turn):
        """(groups in the order of this pass, the rows of the pass before each of them)."""
        order = np.random.default_rng((self.c["seed"], turn)).permutation(len(self.groups))
        return order, np.cumsum(self.rows[order]) - self.rows[order]

    def place(self, n, attempt):
        """Group and row of the table. A replacement comes from the same window, whose groups are at hand."""
        turn, i = divmod(n, len(self.table))
        order, before = self.walk(turn)
        w = (np.searchsorted(before, i, "right") - 1) // WINDOW * WINDOW
        start, stop = int(before[w]), int(before[w + WINDOW]) if w + WINDOW < len(before) else len(self.table)
        if attempt == 0:
            i = start + shuffled(i - start, stop - start, f"{self.c['seed']},{turn},{w}")
        else:
            i = int(np.random.default_rng((self.c["seed"], n, attempt)).integers(start, stop))
        k = np.searchsorted(before, i, "right") - 1
        return int(order[k]), int(self.first[order[k]] + i - before[k])

    def group(self, k):
        """The columns of a row group; not in several threads, which would not survive a fork."""
        file, g, *_ = self.groups[k]
        try:
            with self.open(self.files[file]) as f:
                return f.read_row_group(g, list(COLUMNS[1:]), use_threads=False)
        except Exception as e:  # likewise
            raise OSError(f"{self.files[file]}: row group {g}: {' '.join(str(e).split())}") from None

    def read(self, n, attempt=0):
        k, i = self.place(n, attempt)
        (row, slide), (file, g, *_) = self.table[i].item(), self.groups[k]
        place = f"{self.files[file]}: row {row} of row group {g}"
        try:
            x, y, side, form, blob = (self.group(k)[column][row].as_py() for column in COLUMNS[1:])
            raw = len(blob) == 3 * side**2 and form.lower() not in ("png", "jpeg", "jpg")
        except (IndexError, TypeError, AttributeError) as e:  # a file that has changed since, or a null
            raise OSError(f"{place}: {e}") from None
        tile = np.frombuffer(blob, np.uint8).reshape(side, side, 3).copy() if raw else decode(blob, place)
        return tile, {"slide": self.slides[slide], "x": x, "y": y, "mpp": math.nan}


class Mix:
    """
    Several sources by weight. Of each PERIOD blocks of tiles_per_visit samples every source has its exact share, in a
    new random order each period, and each walks through its own samples in their order, so exactly once a pass.
    """

    def __init__(self, entries, c):
        self.c, self.entries, self.sources = c, entries, []
        for entry in entries:
            fits = isinstance(entry, (tuple, list)) and len(entry) == 3 and all(isinstance(e, str) for e in entry[:2])
            fits = fits and entry[0] in SOURCES and entry[1] and isinstance(entry[2], (int, float))
            if not fits or not 0 < entry[2] < math.inf:
                raise ValueError(f"mix: {entry!r} is not (one of {', '.join(SOURCES)}; its path; a weight above 0)")
        for i, (kind, path, _) in enumerate(entries):  # seeds differ, or sources of one kind would draw in step
            self.sources.append(SOURCES[kind](path, {**c, "seed": c["seed"] + 1000 * i}))
        self.counts = slots([weight for *_, weight in entries])
        self.about = "; ".join(f"{n / PERIOD:.1%} {s.about}" for n, s in zip(self.counts, self.sources))
        self.order = functools.lru_cache(2)(self.order)

    def order(self, period):
        """Of each block of a period: its source, and which of that source's blocks in the period it is."""
        owner, nth = np.repeat(range(len(self.counts)), self.counts), np.zeros(PERIOD, int)
        np.random.default_rng((self.c["seed"], period)).shuffle(owner)
        for s, count in enumerate(self.counts):
            nth[owner == s] = range(count)
        return owner, nth

    def place(self, n):
        """(source, its own sample number)."""
        block, i = divmod(n, self.c["tiles_per_visit"])
        period, slot = divmod(block, PERIOD)
        owner, nth = self.order(period)
        s = int(owner[slot])
        return s, (period * self.counts[s] + int(nth[slot])) * self.c["tiles_per_visit"] + i

    def read(self, n, attempt=0):
        s, n = self.place(n)
        try:
            return self.sources[s].read(n, attempt)
        except READ_ERRORS as e:
            raise OSError(f"{e} (mix: {self.entries[s][0]} {self.entries[s][1]})") from None


def slots(weights):
    """Whole numbers of sum PERIOD in proportion to the weights, none of them 0; the largest remainders round up."""
    share = np.array(weights) / sum(weights) * PERIOD
    counts = np.maximum(share.astype(int), 1)
    while counts.sum() < PERIOD:
        counts[np.argmax(share - counts)] += 1
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - share, -1))] -= 1
    return counts.tolist()


SOURCES = {"slides": Slides, "sample_list": SampleList, "tiles": Tiles, "shards": Shards, "parquet": Parquet}


def open_source(c):
    """The one source that the keys name. Raises ValueError naming what is missing, before anything is built."""
    named = [k for k in (*SOURCES, "mix") if c[k]]
    if len(named) != 1:
        remedy = "unset the others, as in --slides= --tiles=DIR" if named else "prepare/toy.py makes a world to try"
        keys = ", ".join((*SOURCES, "mix"))
        raise ValueError(f"set exactly one of {keys} (now: {', '.join(named) or 'none'}); {remedy}")
    try:
        re.compile(c["patient"])
    except re.error as e:
        raise ValueError(f"patient = {c['patient']!r} is no regular expression: {e}") from None
    return Mix(c["mix"], c) if named == ["mix"] else SOURCES[named[0]](c[named[0]], c)
