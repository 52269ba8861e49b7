"""
Whole-slide images: open one, learn its scale, find its tissue, read tiles from it.

    slide = Slide("a.svs")                             # or Slide("a.svs", mpp=0.25) where the file does not say
    x, y = slide.random_tissue(rng, size=224, mpp=0.5)
    tile = slide.read(x, y, size=224, mpp=0.5)         # uint8 (224, 224, 3)
    xy, share = slide.grid(size=224, mpp=0.5)          # places of all tiles with tissue
    rows = slide.order(xy, 224, 0.5)                   # so that neighbours are read one after the other
    tiles, errors = slide.read_tiles(xy[rows], 224, 0.5)

Scale. A tile has size x size pixels of mpp micrometres; (x, y) is its top-left in level-0 pixels. We do not say "20x",
which is anything from 0.44 to 0.55 um/px. A slide without a believable mpp is refused: a guess would mix scales.

Levels. We read the coarsest level that is at most 3 % coarser than the target. An axis within 3 % is used as stored,
because resampling 0.499 to 0.5 um/px would only blur it. Otherwise the exact larger region is read and shrunk with
PIL's antialiased BILINEAR, in training and inference alike. Only a level 0 that is too coarse is enlarged, by at most
10 %. Levels of 4.002x are 4x with the last pixels cut off, and levels of 3.906x may be 4x padded to whole tiles. A
level that does not show what level 0 shows is left out, with a warning.

Exact reads. OpenSlide reads a level > 0 at location / downsample, which is fractional, and interpolates between the
stored pixels. This blurs each place by another amount: a difference between random and grid reads, and a periodic
shortcut for context models. We start reads as close to a whole level pixel as level-0 pixels allow. The fraction e that
remains is known, and _sharpen inverts its kernel [1 - e, e]; tests/test_wsi.py fails with an OpenSlide that does not
interpolate. exact_reads=False leaves OpenSlide's own result; docs/data.md has both measured. What was not scanned, or
lies outside, is white; OpenSlide leaves it black.
"""
import csv
import functools
import hashlib
import json
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

TOLERANCE = 0.03         # a level this close to the target is used as stored: 0.2425-0.2575 um/px serve 0.25
MAX_ENLARGE = 1.10       # level-0 mpp / target mpp; above this the slide does not have the detail
MIN_MPP, MAX_MPP = 0.05, 20.0  # um/px; other values are not believable: 72 dpi would be 353
MASK_VERSION = 3         # of the code that makes masks: raise it whenever that makes another, so that none is kept
MAX_MASK_CELLS = 1e8     # a 25 x 75 mm slide has 3e7 cells of 8 um, so more means a wrong mpp
MARGIN = 6               # px read around a region to invert the interpolation: at 2x e <= 1/4, and (1/3)^7 is nothing
BLOCK = 1200             # px of a level: the side of a block of tiles that are read one after the other
CACHE = 32 << 20         # bytes of decoded tiles per process; a tile needs 2 MB
DAMAGED = -2             # in place of a correlation
STRIP = 32               # rows sharpened at a time, so that their float copies stay in the cache

TISSUE = {               # how the tissue mask is made; edit it here
    "mpp": 8.0,          # um/px of the thumbnail; a cell is about the size of a nucleus
    "otsu": (8, 40),     # range to which Otsu's threshold on the saturation (0-255) is clamped
    "alike": 12,         # levels of saturation that tinted glass spans at most; glass and tissue are further apart
    "value": 50,         # darker pixels are not tissue: black borders, black ink, fluorescence
    "hue": True,         # keep only H&E's hues, as is_tissue does; set False for IHC, because it drops brown
    "ink": True,         # leave out green and blue pen
    "vote_um": 40.0,     # each cell takes the majority of a square with this side
    "speck_mm2": 0.02,   # smaller parts are dust and are dropped; 0 = keep
    "hole_mm2": 0.02,    # smaller holes are lumen or fat and count as tissue; larger holes stay
}
MPP_KEYS = (             # (x, y), in order of preference; OpenSlide fills the first from each vendor's own key
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("tiff.XResolution", "tiff.YResolution"),  # pixels per unit
)
TIFF_UNIT = {"inch": 25400.0, "centimeter": 10000.0}  # um; "none" and "unknown" give no scale
POWER_KEYS = ("openslide.objective-power", "aperio.AppMag")
SCALE_KEYS = {*sum(MPP_KEYS, POWER_KEYS), "tiff.ResolutionUnit"}
REMEDY = "state it with mpp=... in Slide(), or for a run with --mpp_table=FILE or, for all slides, --slide_mpp=..."
OPENERS = 16             # slides opened at a time when many are looked at: most of the time is the disk's


class SlideError(ValueError):
    """A slide that cannot be used as asked; the message names the file, the reason and the remedy."""


class Unusable(SlideError):
    """A slide or level that serves nobody, although it is intact: training leaves it out and counts no damage."""


class Unreachable(SlideError):
    """The system cannot open the file: its disk may be away for a moment, so it is worth another try."""


def find_mpp(properties, override=None, from_objective=False, trust=False):
    """(mpp_x, mpp_y, source) in um/px: the user's override, else of the first of MPP_KEYS that is believable, else 10 /
    objective power, if from_objective allows it. Raises SlideError if there is none, or if it contradicts the objective
    power by more than 30 % (20x is about 0.5), unless we are to trust it."""
    if override is not None:
        if not MIN_MPP <= override <= MAX_MPP:
            raise SlideError(f"the stated mpp={override} is not within {MIN_MPP}-{MAX_MPP} um/px; {REMEDY}")
        return float(override), float(override), "stated"
    power = find_power(properties)
    seen = ", ".join(f"{key}={value}" for key, value in properties.items() if key in SCALE_KEYS) or "none"
    for key_x, key_y in MPP_KEYS:
        mpp_x, mpp_y = _key_mpp(properties, key_x), _key_mpp(properties, key_y)
        if mpp_x and mpp_y:
            mpp = (mpp_x + mpp_y) / 2
            if not trust and power > 0 and abs(mpp * power / 10 - 1) > 0.3:
                raise SlideError(f"{key_x} gives {mpp:.4g} um/px, but an objective of {power:g}x is about "
                                 f"{10 / power:.4g} (properties seen: {seen}); find out which is right and {REMEDY}, "
                                 "or believe the um/px of all slides with --trust_mpp=true")
            return mpp_x, mpp_y, key_x
    if from_objective and 1 <= power <= 100:
        return 10 / power, 10 / power, "10 / objective power"
    raise SlideError(f"no usable mpp (properties seen: {seen}); {REMEDY}, or guess it from the objective power with "
                     "mpp_from_objective=true")


def level_scale(dimensions, size, tile):
    """(level-0 px per px of a level along x and y, whether the dimensions tell it). All three are (w, h) in px.
    Dimensions hide the scale in two ways. The last pixels may be cut off: then 4.002 is 4. Or the level is padded to
    whole tiles: then 3.906 is 4, and 15 may be 16. If several whole numbers explain that, it is the power of two."""
    factor = np.divide(dimensions, size)
    whole = np.rint(factor)
    cut_off = abs(dimensions / whole - size) < 1
    scale = np.where(cut_off, whole, factor)
    difference = abs(scale[0] / scale[1] - 1)  # a level that is squeezed along one axis shows something else
    rounding = 2 / min(size)
    most = int(factor.max())
    numbers = np.arange(most, 4 * most + 5)[:, None]
    filled = np.ceil(dimensions / numbers / tile) * tile
    exact = abs(dimensions / numbers - size) < 1
    padded = ((filled == size) | exact).all(1)
    numbers = numbers[padded]
    full = (np.mod(size, tile) == 0) & (tile > 1)
    power_of_two = whole[0] == whole[1] and np.log2(whole[0]) % 1 == 0
    clear = cut_off.all() and (power_of_two or exact[padded].all())
    if clear or not (len(numbers) or full.any()):
        return scale, difference <= TOLERANCE + rounding
    if not len(numbers):  # a factor such as 1.5: nothing tells how much of the last tiles is padding
        return scale, difference <= rounding and not full.all()
    if len(numbers) > 1:
        numbers = numbers[np.log2(numbers) % 1 == 0]
    # where both axes have the same factor, the level may as well have been shrunk to whole tiles
    if len(numbers) != 1 or difference <= rounding and not cut_off.all():
        return scale, False
    return np.repeat(numbers.ravel(), 2), True


def find_power(properties):
    """Objective power, nan if the properties hold none."""
    return _number(next((properties[key] for key in POWER_KEYS if key in properties), ""))


def _number(text):
    """A float from a property such as "0,25" or "40.000000", nan if it is not a number."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan


def _key_mpp(properties, key):
    """um/px according to a key, None if it is absent or its value is not believable."""
    number = _number(properties.get(key, ""))
    if key.startswith("tiff.") and number:
        unit = properties.get("tiff.ResolutionUnit", "").lower()
        number = TIFF_UNIT.get(unit, math.nan) / number
    return number if MIN_MPP <= number <= MAX_MPP else None


def _openslide(path):
    """OpenSlide's module, imported here, because training on tiles needs none. Raises SlideError if it is missing."""
    try:
        import openslide
    except ImportError:
        raise SlideError(f"{path}: slides need OpenSlide; pip install openslide-python openslide-bin") from None
    return openslide


@functools.cache
def _tile_cache(pid):
    """What all slides of a process share; OpenSlide's own would hold 32 MiB for each. A fork makes its own."""
    import openslide
    return openslide.OpenSlideCache(CACHE)


class Slide:
    """One open slide. Raises SlideError if the file is missing, is not a slide, is damaged, or has no mpp.
    mpp: um/px of level 0, as stated by the user; None = what the file says. mask_dir: folder that keeps tissue masks.
    rule: how the tissue mask is made, like TISSUE. None = take what mask_dir holds, whatever its rule, else TISSUE."""

    def __init__(self, path, mpp=None, exact_reads=True, mpp_from_objective=False, rule=None, mask_dir="",
                 trust_mpp=False):
        self.path, self.exact_reads, self.rule, self.mask_dir = os.fspath(path), exact_reads, rule, mask_dir
        self._slide = self._pid = self._mask = None
        handle = self._handle()
        self.properties = dict(handle.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.power = find_power(self.properties)  # of the objective, nan if not stated
        self.dimensions = handle.dimensions              # (W, H) at level 0
        self.level_dimensions = handle.level_dimensions  # the same for each level
        try:
            mpp_x, mpp_y, self.mpp_source = find_mpp(self.properties, mpp, mpp_from_objective, trust_mpp)
        except SlideError as error:
            raise SlideError(f"{self.path}: {error}") from None
        self.mpp_xy = mpp_x, mpp_y
        self.mpp = (mpp_x + mpp_y) / 2
        self.left_out, scales = {}, []  # {level: why it is not read}
        for level, size in enumerate(self.level_dimensions):
            keys = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
            tile = np.array([int(self.properties.get(key, 1)) for key in keys])
            scale, told = level_scale(self.dimensions, size, tile)
            scales.append(scale)
            if not told:
                self._leave_out(level, "has another aspect than level 0, so it shows another picture or is padded")
        self.level_scale = np.array(scales, float)  # (levels, 2): level-0 px per px, x and y
        self.level_mpp = (self.level_scale * self.mpp_xy).mean(1).tolist()
        inside = np.ceil(self.dimensions / self.level_scale).astype(int)
        self._inside = np.minimum(inside, self.level_dimensions)  # (levels, 2): px of a level that are no padding

    def _leave_out(self, level, reason):
        self.left_out[level] = reason
        warnings.warn(f"{self.path}: level {level} {reason}; it is left out, and finer levels serve instead",
                      stacklevel=2)

    def close(self):
        """Free OpenSlide's handle; a later read opens a new one."""
        if self._pid == os.getpid():
            self._slide.close()
        self._pid = None

    def _handle(self):
        """This process's handle. After a fork we open a new one, because the old one shares file offsets with it."""
        if self._pid == os.getpid():
            return self._slide
        openslide = _openslide(self.path)
        try:
            open(self.path, "rb").close()  # the system says why it cannot be opened, OpenSlide does not
            path = self.path
            if os.path.islink(path) and not openslide.OpenSlide.detect_format(path):
                path = os.path.realpath(path)  # a .mrxs has its folder beside the file itself
            self._slide = openslide.OpenSlide(path)
            self._slide.set_cache(_tile_cache(os.getpid()))
        except OSError as error:
            raise Unreachable(f"{self.path}: {error.strerror}") from error
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideError(f"{self.path}: not a slide that OpenSlide reads: cut short, striped (convert: vips "
                             "tiffsave --tile --pyramid), or a .mrxs without its folder") from None
        except openslide.OpenSlideError as error:
            raise SlideError(f"{self.path}: OpenSlide cannot open it: {error} (a download cut short?)") from error
        self._pid = os.getpid()
        return self._slide

    def read(self, x, y, size, mpp):
        """The tile of size px at mpp um/px with its top-left at (x, y) in level-0 px: uint8 (size, size, 3).
        Raises SlideError if level 0 is more than 10 % coarser than mpp, or if the slide is damaged there."""
        level, extent = self._plan(size, mpp)
        return _shrink(self._region((x, y), extent, level), size, extent)

    def outside(self, xy, extent):
        """bool (N,): which tiles of (w, h) level-0 px at xy (N, 2) do not touch the slide. NaN is outside."""
        return ~((np.add(xy, extent) > 0) & (np.asarray(xy) < self.dimensions)).all(1)

    def read_level(self, x, y, size, level):
        """The tile of size px as stored at a pyramid level, (x, y) still in level-0 px: uint8 (size, size, 3).
        OpenMidnight's sample lists name tiles this way. Their um/px is whatever the scanner's pyramid has."""
        levels = len(self.level_dimensions)
        if level not in range(levels):
            raise SlideError(f"{self.path}: no level {level}, it has {levels} levels, from 0 on")
        if level in self.left_out:
            raise Unusable(f"{self.path}: level {level} {self.left_out[level]}")
        return self._region((x, y), (size, size), level)

    def extent(self, size, mpp):
        """(w, h): width and height in level-0 px, floats, of the tile that read(x, y, size, mpp) returns."""
        level, extent = self._plan(size, mpp)
        return tuple((extent * self.level_scale[level]).tolist())

    def grid(self, size, mpp, min_tissue=0.25, overlap=0):
        """Tiles side by side, row by row: (xy int32 (N, 2) in level-0 px, tissue float32 (N,), share of the tile).
        overlap: px of a tile that its neighbour repeats. Tiles with less than min_tissue are left out, and those by
        more than half outside the slide, or outside the scanned bounds that some vendors state."""
        mask, cell = self.tissue_mask()
        extent = self.extent(size, mpp)
        starts, sums = [], mask
        for axis, (corner, side) in enumerate((("x", "width"), ("y", "height"))):
            first = int(self.properties.get(f"openslide.bounds-{corner}", 0))
            length = int(self.properties.get(f"openslide.bounds-{side}", self.dimensions[axis]))
            pitch = extent[axis] * (1 - overlap / size)
            stop = max(1, length - extent[axis] + pitch / 2)
            start = np.rint(first + np.arange(0, stop, pitch)).astype(np.int32)
            starts.append(start)
            sums = _sums(sums.T, start / cell[axis], extent[axis] / cell[axis])
        share = sums / (extent[0] / cell[0] * extent[1] / cell[1])  # (rows, columns)
        row, column = np.nonzero(share >= max(min_tissue, 1e-6))
        xy = np.stack([starts[0][column], starts[1][row]], 1)
        return xy, share[row, column].astype(np.float32)

    def order(self, xy, size, mpp):
        """Indices (N,) of xy (N, 2), block by block: what OpenSlide decodes for an unaligned tile belongs half to its
        neighbours, and is still in the cache when a block is read, unlike after a wide slide's row."""
        level, _ = self._plan(size, mpp)
        column, row = np.transpose(xy // (BLOCK * self.level_scale[level]))
        return np.lexsort([column, row])

    def read_tiles(self, xy, size, mpp):
        """(tiles, errors) at xy (N, 2): uint8 (N, size, size, 3), and {index: message} of tiles that are damaged."""
        self._plan(size, mpp)  # raises SlideError for all
        tiles, errors = np.empty((len(xy), size, size, 3), np.uint8), {}
        for i, (x, y) in enumerate(xy):
            try:
                tiles[i] = self.read(x, y, size, mpp)
            except SlideError as error:
                errors[i] = str(error)
        return tiles, errors

    def _plan(self, size, mpp):
        """(level, extent): the level that serves mpp, and the tile's (w, h) in that level's pixels, floats."""
        ratios = self.level_scale * self.mpp_xy / mpp  # (levels, 2): um/px of the level over um/px of the tile
        level = self._coarsest(ratios.max(1) <= 1 + TOLERANCE)
        ratio = ratios[level]
        if ratio.max() > MAX_ENLARGE:
            raise SlideError(f"{self.path}: asked for {mpp:.4g} um/px, but the slide has {self.mpp:.4g} "
                             f"({self.mpp_source}); ask for {max(self.mpp_xy) / MAX_ENLARGE:.4g} or coarser")
        return level, np.where(abs(ratio - 1) <= TOLERANCE, size, size / ratio)

    def _coarsest(self, fine):
        """The coarsest level among those that are fine enough, bool (levels,), and show the same as level 0."""
        return max((level for level in np.flatnonzero(fine).tolist() if level not in self.left_out), default=0)

    # -- pixels: at and size are arrays (x, y) and (w, h) -------------------------------------------------------------

    def _region(self, at, extent, level):
        """Pixels of a level from `at` in level-0 px: uint8 (h, w, 3), white outside the slide."""
        at, size = np.array(at), np.ceil(extent).astype(int)
        scale = self.level_scale[level]
        padded = (self._inside[level] < self.level_dimensions[level]).any()  # where OpenSlide's places are wrong
        if self.exact_reads or level == 0 or padded:
            return self._stored(np.rint(at / scale).astype(int), size, level)
        # OpenSlide truncates negative places to whole pixels, so we do not ask for what is left of or above the slide
        left, top = skip = np.maximum(np.ceil(-at / scale), 0).astype(int)
        region = _white(size)
        if (skip < size).all():
            region[top:, left:] = self._read_rgb(at + skip * scale, size - skip, level)
        return region

    def _stored(self, at, size, level):
        """Pixels as stored at a level, from `at` in that level's pixels: uint8 (h, w, 3), white outside the slide."""
        low = np.maximum(at, 0)
        high = np.minimum(at + size, self._inside[level])
        region = _white(size)
        if (low < high).all():
            (left, top), (right, bottom) = low - at, high - at
            region[top:bottom, left:right] = self._exact(low, high - low, level)
        return region

    def _exact(self, at, size, level):
        """The same inside the level: one read with a margin, sharpened in strips of rows."""
        downsample = self._handle().level_downsamples[level]  # OpenSlide uses one factor for both axes
        before = np.minimum(at, MARGIN)
        start = at - before
        start0 = np.rint(start * downsample)        # the nearest place in level-0 px
        shift = start0 / downsample - start         # and by how much it misses, in the level's px
        if level == 0 or abs(shift).max() < 0.002:
            return self._read_rgb(at * downsample, size, level)
        blurred = self._read_rgb(start0, before + size + MARGIN, level)
        (w, h), (left, top), (shift_x, shift_y) = size, before, shift.tolist()
        pixels = np.empty((h, w, 3), np.uint8)
        for y in range(0, h, STRIP):
            rows = min(STRIP, h - y)
            strip = blurred[y:y + top + rows + MARGIN].astype(np.float32)
            strip = _sharpen(strip, shift_y, top, rows)
            strip = _sharpen(strip.swapaxes(0, 1), shift_x, left, w).swapaxes(0, 1)
            pixels[y:y + rows] = strip.clip(0, 255) + 0.5
        return pixels

    def _read_rgb(self, at, size, level, retry=True):
        """One OpenSlide read at the whole level-0 place nearest to `at`: uint8 (h, w, 3), white where transparent."""
        import openslide
        x, y = np.rint(at).astype(int).tolist()
        try:
            rgba = self._handle().read_region((x, y), level, size.tolist())
        except openslide.OpenSlideError as error:
            self.close()  # after an error every call on the same handle fails
            if retry:
                return self._read_rgb(at, size, level, retry=False)
            raise SlideError(f"{self.path}: cannot read x={x} y={y} level={level}: {error} (damaged, or a download cut "
                             "short? compare its size or checksum with the source)") from error
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return np.array(white)

    def check_levels(self, places=5):
        """Compare each level with the next finer one, in about 10 ms, and leave out those that differ at half of the
        places: they show another picture, or are not as coarse as their dimensions say. Returns whether any was."""
        rng, tissue = np.random.default_rng(0), self._tissue()[0].any()
        finer, known = 0, len(self.left_out)
        for level in range(1, len(self.level_scale)):
            if level in self.left_out:
                continue
            points = [self.random_point(rng) if tissue else rng.random(2) * self.dimensions for _ in range(places)]
            likeness = [self._likeness(point, level, finer) for point in points]
            median = np.median([value for value in likeness if value not in (None, DAMAGED)] or [1])
            if set(likeness) == {DAMAGED}:
                self._leave_out(level, f"cannot be read at any of {places} places")
            elif median < 0.5:
                self._leave_out(level, f"does not show what level {finer} shows (median correlation {median:.2f})")
            else:
                finer = level
        return len(self.left_out) > known

    def _likeness(self, point, level, finer):
        """Correlation of a level's gray, around a level-0 point, with a finer level; DAMAGED where the level cannot be
        read, None where it is flat or the finer one cannot be read."""
        scale, dimensions = self.level_scale[level], self._inside[level]
        side = min(96, *dimensions)
        corner = np.rint(point / scale - side / 2)
        corner = np.clip(corner, 0, np.subtract(dimensions, side)).astype(int)  # inside, because all edges look alike
        extent = side * scale / self.level_scale[finer]
        coarse = None
        try:
            coarse = self._stored(corner, np.array((side, side)), level)
            fine = self._region(corner * scale, extent, finer)
        except Unreachable:
            raise  # nothing of it is damaged
        except SlideError:
            return DAMAGED if coarse is None else None
        images = [Image.fromarray(pixels).convert("L") for pixels in (coarse, _shrink(fine, side, extent))]
        blur = ImageFilter.BoxBlur(2)  # because some pyramids are shifted by a pixel
        a, b = (np.asarray(image.filter(blur), float) for image in images)
        if max(a.std(), b.std()) < 4:
            return None
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt((a * a).sum() * (b * b).sum())
        return (a * b).sum() / max(norm, 1e-9)

    def tissue_mask(self):
        """(mask, cell): bool (h, w), and the (x, y) size of its cells in level-0 px, floats; about 8 um, see TISSUE.
        Making it takes 1 s for a large slide with low levels, 35 s for 10^9 px without; reading it, 3 ms."""
        bits, (h, w), cell = self._tissue()
        return np.unpackbits(bits, count=h * w).reshape(h, w).astype(bool), cell

    def random_point(self, rng):
        """A random point of the tissue, (x, y) floats in level-0 px. Raises SlideError if there is no tissue."""
        bits, (h, w), cell = self._tissue()
        if not bits.any():
            raise SlideError(f"{self.path}: no tissue found in an H&E mask; leave the slide out (another stain? set "
                             'TISSUE["hue"] = False in wsi.py)')
        while True:  # draw cells until one has tissue, which needs no list of them
            cells = rng.integers(h * w, size=64)
            bit = bits[cells >> 3] >> (7 - (cells & 7)) & 1
            hits = cells[bit == 1]
            if len(hits):
                row, column = divmod(int(hits[0]), w)
                return (column + rng.random()) * cell[0], (row + rng.random()) * cell[1]

    def random_tissue(self, rng, size, mpp):
        """(x, y), ints: top-left of a tile for read(x, y, size, mpp) whose centre is a random point of the tissue."""
        x, y = self.random_point(rng)
        w, h = self.extent(size, mpp)
        return round(x - w / 2), round(y - h / 2)

    def _tissue(self):
        """(packed bits, (h, w), cell): the mask, kept in memory and in mask_dir."""
        if self._mask is not None:
            return self._mask
        file = self._mask_file() if self.mask_dir else ""
        self._mask, self.rule, left_out = _load_mask(file, self.rule)
        for level in left_out.keys() - self.left_out.keys():
            self._leave_out(level, left_out[level])
        if self._mask is None:
            rule = self.rule or TISSUE
            self._make_mask(rule)
            while self.check_levels():
                self._make_mask(rule)  # it may have been made from the level that is left out now
            if file:
                _save_mask(file, self._mask, rule, self.left_out)
        return self._mask

    def _make_mask(self, rule):
        self._mask = None  # if this fails, the next call shall fail as well
        thumbnail, damaged, cell = self.thumbnail(rule["mpp"])
        mask = _mask_of(thumbnail, np.multiply(self.mpp_xy, cell), rule)
        mask |= damaged  # so that these tiles are tried and counted
        self._mask = np.packbits(mask), mask.shape, cell

    def _mask_file(self):
        """It is named by the slide's size, 8 places in its file and its scale, so that a moved slide keeps its mask."""
        size = os.path.getsize(self.path)
        digest = hashlib.blake2b(repr((MASK_VERSION, size, self.mpp_xy)).encode(), digest_size=8)
        with open(self.path, "rb") as f:
            for k in range(8):
                f.seek(k * max(size - 4096, 0) // 7)
                digest.update(f.read(4096))
        return os.path.join(self.mask_dir, f"{Path(self.path).stem}-{digest.hexdigest()}.npz")

    def thumbnail(self, mpp):
        """(uint8 (h, w, 3), damaged bool (h, w), cell): means of k x k pixels that are about mpp; cell in level-0 px.
        It is read in blocks of 4 million pixels, because a slide's only level may have 10^10."""
        limit = mpp * (1 + TOLERANCE)
        level = self._coarsest(np.array(self.level_mpp) <= limit)
        k = max(1, round(mpp / self.level_mpp[level]))
        w, h = (math.ceil(side / k) for side in self._inside[level].tolist())
        if w * h > MAX_MASK_CELLS:
            raise SlideError(f"{self.path}: a mask of {w} x {h} cells is too large; if {self.mpp:.4g} um/px "
                             f"({self.mpp_source}) is wrong, {REMEDY}")
        thumbnail, damaged = _white((w, h)), np.zeros((h, w), bool)
        self._fill(thumbnail, damaged, np.array((0, 0)), max(1, 2048 // k), k, level)
        return thumbnail, damaged, tuple((k * self.level_scale[level]).tolist())

    def _fill(self, cells, damaged, at, step, k, level):
        """Fill cells with means of k x k pixels from `at` in a level's px, by blocks of step x step cells.
        A block that cannot be read is read again in smaller blocks. Below 256 px it is damaged, and left white."""
        for y in range(0, len(cells), step):
            for x in range(0, cells.shape[1], step):
                block, lost = cells[y:y + step, x:x + step], damaged[y:y + step, x:x + step]
                corner = at + (x * k, y * k)
                try:
                    pixels = self._stored(corner, k * np.array(lost.shape[::-1]), level)
                    block[:] = Image.fromarray(pixels).reduce(k)
                except Unreachable:
                    raise  # nothing of it is damaged
                except SlideError:
                    if step * k > 256:
                        self._fill(block, lost, corner, step // 2, k, level)
                    else:
                        lost[:] = True


def _white(size):
    return np.full((size[1], size[0], 3), 255, np.uint8)


def _shrink(pixels, size, extent):
    """The top-left `extent` (w, h), floats, of pixels uint8 (H, W, 3), resized to (size, size, 3)."""
    if (extent == size).all():
        return pixels
    box = 0, 0, *extent
    return np.array(Image.fromarray(pixels).resize((size, size), Image.BILINEAR, box, reducing_gap=2.0))


def _sharpen(pixels, e, before, count):
    """Invert OpenSlide's bilinear shift by e px along axis 0 of floats (n, ...): `count` pixels from `before` on.
    A read at fraction e > 0 gives r[i] = (1 - e) p[i] + e p[i + 1]. Hence p[i] = sum over k >= 0 of
    (-e / (1 - e))^k r[i + k] / (1 - e), mirrored for e < 0. Terms below 1/1000 are left out. Error: 0.3 grey levels."""
    sign, terms = (1, MARGIN) if e >= 0 else (-1, before)
    e = abs(e)
    weight = 1 / (1 - e)
    total = weight * pixels[before:before + count]
    for k in range(1, terms + 1):
        weight *= -e / (1 - e)
        if abs(weight) < 1e-3:
            break
        start = before + sign * k
        total += weight * pixels[start:start + count]
    return total


def _sums(mask, start, length):
    """Sums along the columns of mask (n, m) from start (k,) to start + length, in rows, fractions included: (k, m)."""
    total = np.cumsum(np.pad(mask, ((1, 0), (0, 0))), axis=0, dtype=float)
    at = np.clip([start, start + length], 0, len(mask))
    low = np.minimum(at.astype(int), len(mask) - 1)
    fraction = (at - low)[..., None]
    first, last = total[low] + fraction * (total[low + 1] - total[low])
    return last - first


def is_tissue(tile, share=0.6, rule=None):
    """Whether more than `share` of the pixels of a tile, uint8 (H, W, 3), have a colour of H&E: Midnight's rule. It
    drops glass, green ink, dark pixels and brown (DAB, melanin), and keeps blue ink. A share of 0 is no test.
    rule: that of the slide's mask, None = TISSUE; where its "hue" is False, all hues count."""
    return not share or bool(tissue_share(tile, rule) > share)


def tissue_share(tile, rule=None):
    """Share of such pixels. In OpenCV's units, where hue ends at 180, they have H >= 90, S >= 8, V >= 103."""
    channels = Image.fromarray(tile).convert("HSV").split()
    hue, saturation, value = map(np.asarray, channels)
    least = 127 if (rule or TISSUE)["hue"] else 0
    return ((hue >= least) & (saturation >= 8) & (value >= 103)).mean()


def _mask_of(thumbnail, um, rule):
    """bool (h, w) of a thumbnail uint8 (h, w, 3) whose cells are um = (x, y) micrometres large."""
    votes = Image.fromarray(np.uint8(255) * _is_tissue_colour(thumbnail, rule))
    radius = [max(0, (rule["vote_um"] / side - 1) / 2) for side in um]
    mask = np.asarray(votes.filter(ImageFilter.BoxBlur(radius))) > 127
    cell_mm2 = um[0] * um[1] / 1e6
    mask = _drop_small(mask, rule["speck_mm2"] / cell_mm2)
    if not mask.any():
        return mask  # the glass of a small slide is not a hole
    return ~_drop_small(~mask, rule["hole_mm2"] / cell_mm2)


def _is_tissue_colour(thumbnail, rule):
    """bool (h, w): more saturated than glass, and neither ink nor dark (fluorescence, black ink, the slide's edge)."""
    blurred = Image.fromarray(thumbnail).filter(ImageFilter.BoxBlur(1))
    hue, saturation, value = map(np.asarray, blurred.convert("HSV").split())
    scanned = np.asarray(blurred).min(2) < 255  # what was not is white in all channels
    tissue = (saturation > _threshold(saturation[scanned], rule)) & (value > rule["value"])
    if rule["hue"]:
        tissue &= hue >= 127
    if rule["ink"]:
        green = (hue >= 50) & (hue <= 135)
        blue = (hue > 135) & (hue <= 177) & (saturation > 100)
        tissue &= ~(green | blue)
    return tissue


def _threshold(saturation, rule):
    """The saturation above which there is tissue. Otsu's threshold is clamped, because on a slide that is all tissue or
    all glass it would cut through it. Tinted glass can still be above it: half of its noise, or all of it beside areas
    that were not scanned. It differs from tissue, however pale: nearly all is alike, no other glass lies far below."""
    count = np.bincount(saturation.ravel(), minlength=256).astype(float)
    low, high = rule["otsu"]
    threshold = int(np.clip(_otsu(count), low, high))
    above = count[threshold + 1:].cumsum()
    tenth, nine_tenths = threshold + 1 + np.searchsorted(above, above[-1] * np.array((0.1, 0.9)))
    below = count[:threshold + 1]
    glass = below @ np.arange(threshold + 1) / max(below.sum(), 1)
    apart = below.sum() > above[-1] / 10 and tenth - glass >= rule["alike"]
    alike = nine_tenths - tenth < rule["alike"]
    return high if alike and not apart else threshold


def _otsu(count):
    """The threshold of a histogram (256,) that maximises the variance between the values up to it and those above."""
    total, below = count.sum(), count.cumsum()
    moment = (count * np.arange(256)).cumsum()
    difference = moment[-1] * below - moment * total
    between = difference ** 2 / np.maximum(below * (total - below), 1)
    return int(between.argmax())


def _drop_small(mask, least):
    """mask, bool (h, w), without its connected parts (by edges) of fewer than `least` cells. Runs of cells that touch
    across rows are joined (union-find), until all runs of a part have the number of its first run."""
    starts = mask & np.diff(mask, prepend=False)
    run = np.cumsum(starts, dtype=np.int32).reshape(mask.shape)  # number of the cell's run, from 1 on
    touch = mask[1:] & mask[:-1]
    touch &= np.diff(touch, prepend=False)  # one cell for each two runs
    above, below = run[:-1][touch], run[1:][touch]
    part = np.arange(run.max(initial=0) + 1)
    while (part[above] != part[below]).any():
        np.minimum.at(part, part[above], part[below])
        np.minimum.at(part, part[below], part[above])
        while (part != part[part]).any():
            part = part[part]
    cells = np.bincount(part[run[mask]], minlength=len(part))
    return mask & (cells[part] >= least)[run]


def _save_mask(file, mask, rule, left_out):
    """Write a mask to its file. If that fails, the mask has to be made again next time, which is only a warning."""
    unfinished = f"{file}.{os.urandom(4).hex()}.unfinished"
    bits, shape, cell = mask
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(unfinished, "wb") as f:
            np.savez_compressed(f, bits=bits, shape=shape, cell=cell, rule=json.dumps(rule),
                                left_out=json.dumps(list(left_out.items())))
        os.replace(unfinished, file)
    except OSError as error:
        warnings.warn(f"{file}: this tissue mask was not kept: {error}", stacklevel=2)


def _load_mask(file, rule):
    """((packed bits, (h, w), cell), its rule, the slide's levels that are left out). The mask is None if there is none,
    it is damaged, or it was made by another rule than the one given; None takes any."""
    try:
        with np.load(file) as saved:
            if rule is None or json.dumps(rule) == str(saved["rule"]):
                mask = saved["bits"], tuple(saved["shape"].tolist()), tuple(saved["cell"].tolist())
                return mask, json.loads(str(saved["rule"])), dict(json.loads(str(saved["left_out"])))
    except Exception:  # no file, or what zipfile, zlib and numpy raise at a damaged one: the mask is made again
        pass
    return None, rule, {}


def open_slide(path, config, rule=None):
    """The Slide as the keys of a run say, which are the same in training and in prepare/slides.py."""
    table = mpp_table(config["mpp_table"])
    stated = {table[name] for name in names_of(path) if name in table} or {config["slide_mpp"] or None}
    if len(stated) > 1:
        raise SlideError(f"{path}: mpp_table={config['mpp_table']} has rows that disagree: {sorted(stated)} um/px")
    return Slide(path, *stated, config["exact_reads"], config["mpp_from_objective"], rule, config["mask_dir"],
                 config["trust_mpp"])


def names_of(path):
    return path, os.path.basename(path), Path(path).stem


@functools.cache
def mpp_table(file):
    """{one of names_of a slide: um/px} of a csv with columns slide,mpp; {} for "". ValueError for another kind."""
    if not file:
        return {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            rows, table = csv.DictReader(f, skipinitialspace=True), {}
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
            rows = list(rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"mpp_table={file}: {error}; save it as CSV in UTF-8") from None
    for row in rows or [{}]:
        slide, mpp = (row.get("slide") or "").strip(), _number(row.get("mpp") or "")
        sound = slide and MIN_MPP <= mpp <= MAX_MPP and None not in row  # a decimal comma makes a column more
        if not sound or table.setdefault(slide, mpp) != mpp:
            raise ValueError(f"mpp_table={file}: {row or 'no row'}: give columns slide,mpp, each slide once, and "
                             f"{MIN_MPP}-{MAX_MPP} um/px")
    return table


def rows_without_slide(file, paths):
    """{the mpp_table: how many of its rows match none of the slides}, or {} if all do."""
    table, known = mpp_table(file), {name for path in paths for name in names_of(path)}
    lost = [name for name in table if name not in known]
    return {file: f"{len(lost)} of {len(table)} rows match no slide, such as {lost[0]!r}"} if lost else {}


def one_each(paths, left_out):
    """The paths that listing.find gave, one for each slide: that with the finest level. left_out[path] says so of the
    others."""
    with ThreadPoolExecutor(OPENERS) as pool:
        files = list(zip(paths, pool.map(specimen, paths)))
    first = {}
    for path, (name, levels) in sorted(files, key=lambda file: file[1][1][:1], reverse=True):  # the finest level first
        best, known = first.setdefault(name, (path, levels))
        if not set(levels) <= set(known):
            left_out[path] = f"levels of {best} in another folder; OpenSlide finds them if all files are in one"
        elif path != best:
            left_out[path] = f"the same slide as {best}"
    return [path for path in paths if path not in left_out]


def specimen(path):
    """(what two files of one slide share, else the path; for DICOM the levels' dimensions). A DICOM series has a file
    for each level, label and overview, any of which opens all in its folder, and OpenSlide's hash is the series'."""
    try:
        with open(path, "rb") as f:
            head = f.read(132)
        if head[128:] == b"DICM":
            with _openslide(path).OpenSlide(path) as slide:
                return slide.properties.get("openslide.quickhash-1", path), slide.level_dimensions
    except Exception:  # of any kind: the slide will be named when it is opened
        pass
    return path, ()


def check_pattern(patient):
    try:
        re.compile(patient)
    except re.error as e:
        raise ValueError(f"patient = {patient!r} is no regular expression: {e}") from None


def patient_of(path, pattern=r"TCGA-\w\w-\w{4}"):
    """The patient that a slide belongs to: what the regular expression finds in the file's name, else its stem."""
    found = re.search(pattern, os.path.basename(path))
    return found.group() if found else Path(path).stem


@functools.cache
def held_out(patient, share):
    """Whether a patient is among the `share` that is never trained on. It depends on the name alone."""
    digest = hashlib.blake2b(patient.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2 ** 64
