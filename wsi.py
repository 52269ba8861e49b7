"""
Whole-slide images: open one, learn its scale, find its tissue, read tiles from it.

    slide = Slide("a.svs")                             # or Slide("a.svs", mpp=0.25) where the file does not say
    x, y = slide.random_tissue(rng, size=224, mpp=0.5)
    tile = slide.read(x, y, size=224, mpp=0.5)         # uint8 (224, 224, 3)
    xy, share = slide.grid(size=224, mpp=0.5)          # places of all tiles with tissue
    for rows in slide.regions(xy, 224, 0.5):           # neighbours, which one read covers
        tiles, errors = slide.read_tiles(xy[rows], 224, 0.5)

    python wsi.py --task=report --slides='data/TCGA/**/*.svs' --out=out/report    # a table of what the slides are
    python wsi.py --task=overlay --slides='data/TCGA/**/*.svs' --out=out/overlay  # a picture each: mask, grid, scale
    python wsi.py --task=tiles --slides='data/TCGA/**/*.svs' --out=data/tiles     # tar shards that train.py reads
    python wsi.py --task=coords ...                                               # TRIDENT's or CLAM's .h5 of places
    python wsi.py --task=features --weights=teacher.pth --tile_px=224 ...         # one file of embeddings a slide

Scale. A tile is size pixels of mpp micrometres; (x, y) is its top-left in level-0 pixels. "20x" is no unit here:
scanners differ from 0.44 to 0.55 um/px. The mpp comes from, in this order: the user; openslide.mpp-x/-y; a vendor's
own key; the TIFF resolution if it has a unit; the objective power, only if mpp_from_objective asks for that. A value
outside 0.05-20 um/px is junk (72 dpi is 353) and does not count. Otherwise the power only cross-checks. Without an mpp
a slide is refused: a guess would mix scales in silence.

Levels. A level's factor is read from its dimensions, per axis: the whole number where W0 / factor is within a pixel of
the level's width (pyramids of 4.002x are 4x with the last pixels cut), else W0 / Wl. The coarsest level at most 3 %
above the target serves it. An axis within 3 % is taken as stored, since resampling 0.499 to 0.5 only blurs; otherwise
the exact larger region is read and shrunk, always with PIL's antialiased BILINEAR, for training and inference alike.
Only where level 0 itself is too coarse is a tile enlarged, by at most 10 %.

Exact reads. OpenSlide places a read at location / downsample, its own mean and fractional one, and interpolates
bilinearly between stored pixels: a blur that differs from place to place and so a nuisance, a mismatch between random
and grid reads, and a periodic shortcut for context models. Reads start on a whole level pixel instead, where the
fraction e that is left is known and at most half a level-0 pixel, and undo the kernel [1 - e, e] by its inverse, a
geometric series: see _sharpen. A self-test leaves it out if OpenSlide stops interpolating. exact_reads=False is the
old way; bench/reads.py measures what it costs and what it changes.

White is all that lies outside the slide and every transparent pixel (areas not scanned); OpenSlide leaves them black.
"""
import functools
import hashlib
import importlib
import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, ImageFilter

TOLERANCE = 0.03         # a level this close to the target is read as stored: 0.2425-0.2577 serve 0.25 um/px, and so on
MAX_ENLARGE = 1.10       # level-0 mpp / target beyond which there is no such detail in the slide
MPP_RANGE = (0.05, 20.0) # um/px; no scanner is finer, no slide scan coarser
MAX_MASK_CELLS = 10 ** 8 # a 25 x 75 mm glass has 3e7 cells of 8 um; more means a wrong mpp
MARGIN = 6               # px read around a region to undo the interpolation: e <= 1/4 at 2x, and (1/3)^7 is nothing
REGION_BYTES = 12        # a pixel of a region costs at most: RGBA, RGB, the sharpened copy
STRIP = 32               # rows that are sharpened at a time: their float copies stay in the cache

TISSUE = {               # how the tissue mask is made; keys mask_... of the command line
    "mpp": 8.0,          # um/px of the thumbnail; a cell is about the size of a nucleus
    "otsu": (8, 40),     # range of Otsu's threshold on the saturation, 0-255
    "value": 50,         # darker is no tissue: black borders, black ink, fluorescence
    "hue": True,         # only H&E's hues, as in is_tissue; False for IHC, whose brown it would drop
    "ink": True,         # leave out green and blue pen
    "vote_um": 40.0,     # each cell takes the majority of a square of this side
    "speck_mm2": 0.02,   # smaller parts are dust; 0 = keep
    "hole_mm2": 0.02,    # smaller holes are lumen or fat and count as tissue; larger ones stay holes
}
MPP_KEYS = (             # x and y, in order of preference
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y"),
    ("ventana.ScanRes", "ventana.ScanRes"),
    ("tiff.XResolution", "tiff.YResolution"),  # pixels per unit, unlike the others
)
TIFF_UNIT = {"inch": 25400.0, "centimeter": 10000.0}  # um; "none" and "unknown" say nothing
POWER_KEYS = ("openslide.objective-power", "aperio.AppMag")
REMEDY = "state it with mpp=... in Slide(), or --slide_mpp=... for all slides of a run"


class SlideError(ValueError):
    """A slide that cannot be used as asked; the message names the file, the reason and the remedy."""


def find_mpp(properties, override=None, from_objective=False):
    """(mpp_x, mpp_y, source) in um/px from OpenSlide's properties, or from the user's override, which always wins.

    source is "stated", the key that was used, or "10 / objective power" if from_objective allows that and nothing
    better is there. Raises SlideError if no key holds a believable value, or if the value contradicts the objective
    power by more than 30 % (20x is about 0.5, 40x about 0.25).
    """
    if override is not None:
        if not MPP_RANGE[0] <= _number(override) <= MPP_RANGE[1]:
            raise SlideError(f"the stated mpp={override} is not within {MPP_RANGE[0]}-{MPP_RANGE[1]} um/px; {REMEDY}")
        return _number(override), _number(override), "stated"
    keys = dict.fromkeys([key for pair in MPP_KEYS for key in pair] + ["tiff.ResolutionUnit", *POWER_KEYS])
    seen = ", ".join(f"{key}={properties[key]}" for key in keys if key in properties) or "none"
    power = find_power(properties)
    for source, key_y in MPP_KEYS:
        mpp_x, mpp_y = _key_mpp(properties, source), _key_mpp(properties, key_y if key_y in properties else source)
        if mpp_x and mpp_y:
            break
    else:
        if from_objective and 1 <= power <= 100:
            return 10 / power, 10 / power, "10 / objective power"
        hint = f", or guess 10 / {power:g} with mpp_from_objective=true" if 1 <= power <= 100 else ""
        raise SlideError(f"no usable mpp (properties seen: {seen}); {REMEDY}{hint}")
    mpp = (mpp_x + mpp_y) / 2
    if power > 0 and abs(mpp * power / 10 - 1) > 0.3:
        raise SlideError(f"{source} gives {mpp:.4g} um/px, but an objective of {power:g}x is about {10 / power:.4g} "
                         f"(properties seen: {seen}); find out which is right and {REMEDY}")
    return mpp_x, mpp_y, source


def find_power(properties):
    """Objective power, nan if the properties hold none."""
    return next((_number(properties[key]) for key in POWER_KEYS if key in properties), math.nan)


def _number(value):
    """A float from a property such as "0,25" or "40.000000"; nan if it is no number."""
    try:
        return float(str(value).replace(",", "."))
    except ValueError:
        return math.nan


def _key_mpp(properties, key):
    """um/px that one key gives, or None if it is absent or not believable."""
    number = _number(properties.get(key))
    if key.startswith("tiff."):
        number = TIFF_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower(), math.nan) / (number or math.nan)
    return number if MPP_RANGE[0] <= number <= MPP_RANGE[1] else None


class Slide:
    """One open slide. Raises SlideError if the file is missing, is no slide, is damaged, or has no mpp.

    mpp: um/px of level 0 as the user states it, for both axes; None = what the file says.
    tissue: parameters of the mask, TISSUE by default. mask_dir: folder in which the mask is kept, as one small file a
    slide; a mask found there is used unless `tissue` is given and differs from what it was made with.
    """

    def __init__(self, path, mpp=None, exact_reads=True, mpp_from_objective=False, tissue=None, mask_dir=""):
        self.path, self.exact_reads, self.mask_dir = os.fspath(path), exact_reads, mask_dir
        self._arguments = self.path, mpp, exact_reads, mpp_from_objective, tissue, mask_dir
        self._rule, self._pid, self._mask = tissue, None, None
        handle = self._handle()
        self.properties = dict(handle.properties)
        self.vendor, self.power = self.properties.get("openslide.vendor", "unknown"), find_power(self.properties)
        self.dimensions = handle.dimensions  # (W, H) at level 0
        self.level_dimensions = handle.level_dimensions
        self.level_scale = [tuple(map(_factor, self.dimensions, size)) for size in self.level_dimensions]
        try:
            *mpp_xy, self.mpp_source = find_mpp(self.properties, mpp, mpp_from_objective)
        except SlideError as error:
            raise SlideError(f"{self.path}: {error}") from None
        self.mpp_xy, self.mpp = tuple(mpp_xy), sum(mpp_xy) / 2
        self.level_mpp = [(mpp_xy[0] * sx + mpp_xy[1] * sy) / 2 for sx, sy in self.level_scale]

    def __reduce__(self):
        return Slide, self._arguments  # an unpickled slide opens its own handle

    def close(self):
        """Frees OpenSlide's handle and its tile cache (32 MiB); a later read opens a new one."""
        if self._pid == os.getpid():
            self._slide.close()
        self._pid = None

    def _handle(self):
        """This process's handle: a new one after a fork, since an inherited one shares file offsets with the parent."""
        if self._pid != os.getpid():
            self._slide, self._pid = _open(self.path), os.getpid()
        return self._slide

    # -- tiles --------------------------------------------------------------------------------------------------------

    def read(self, x, y, size, mpp):
        """The tile of size px at mpp um/px with its top-left at (x, y) in level-0 px: uint8 (size, size, 3).

        Raises SlideError if the slide has no such detail (level 0 more than 10 % coarser than mpp) or is damaged there.
        """
        level, w, h = self._plan(size, mpp)
        return _shrink(self._region(x, y, math.ceil(w), math.ceil(h), level), size, w, h)

    def read_level(self, x, y, size, level):
        """The tile of size px as stored at a pyramid level, (x, y) still in level-0 px: uint8 (size, size, 3).

        OpenMidnight's sample lists name tiles this way; their um/px is whatever the scanner's pyramid has.
        """
        if not 0 <= level < len(self.level_scale):
            raise SlideError(f"{self.path}: no level {level}, it has levels 0-{len(self.level_scale) - 1}")
        return self._region(x, y, size, size, level)

    def extent(self, size, mpp):
        """(w, h): the side of read(x, y, size, mpp)'s tile in level-0 px, floats."""
        level, w, h = self._plan(size, mpp)
        return w * self.level_scale[level][0], h * self.level_scale[level][1]

    def grid(self, size, mpp, min_tissue=0.25, overlap=0):
        """Tiles side by side, row by row: (xy int32 (N, 2) in level-0 px, tissue float32 (N,), share of the tile).

        overlap: px of a tile that its neighbour repeats. Tiles with less than min_tissue are left out, and those of
        which more than half lies outside the slide, or outside the scanned bounds that some vendors state.
        """
        mask, cell = self.tissue_mask()
        starts = []
        for axis, (name, extent) in enumerate(zip(("x", "y"), self.extent(size, mpp))):
            first = int(self.properties.get(f"openslide.bounds-{name}", 0))
            length = int(self.properties.get(f"openslide.bounds-{('width', 'height')[axis]}", self.dimensions[axis]))
            pitch = extent * (1 - overlap / size)
            count = max(1, math.ceil((length - extent + pitch) / pitch - 0.5))
            starts.append(np.rint(first + np.arange(count) * pitch).astype(np.int32))
        w, h = self.extent(size, mpp)
        covered = _sums(_sums(mask.T, starts[0] / cell[0], w / cell[0]).T, starts[1] / cell[1], h / cell[1])
        share = covered / (w / cell[0] * h / cell[1])  # (rows, columns)
        row, column = np.nonzero(share >= max(min_tissue, 1e-6))
        return np.stack([starts[0][column], starts[1][row]], 1), share[row, column].astype(np.float32)

    def regions(self, xy, size, mpp, region_mb=16):
        """Indices into xy (N, 2), grouped into neighbours that one read of up to region_mb megabytes covers."""
        level, w, h = self._plan(size, mpp)
        side = max(math.sqrt(region_mb * 1e6 / REGION_BYTES) - max(w, h), 1) * np.array(self.level_scale[level])
        block = np.asarray(xy).reshape(-1, 2) // side
        order = np.lexsort((block[:, 0], block[:, 1]))
        return np.split(order, np.flatnonzero(np.any(np.diff(block[order], axis=0), axis=1)) + 1) if len(order) else []

    def read_tiles(self, xy, size, mpp):
        """Tiles at xy (N, 2): (uint8 (N, size, size, 3), {index: message}); the named ones are damaged, not to be used.

        Tiles that lie close together are read at once: what an unaligned tile has to decode belongs half to its
        neighbours. Memory grows with the area; `regions` bounds it.
        """
        xy, tiles, errors = np.asarray(xy).reshape(-1, 2), np.empty((len(xy), size, size, 3), np.uint8), {}
        self._read_into(tiles, errors, np.arange(len(xy)), xy, size, mpp)
        return tiles, errors

    def _read_into(self, tiles, errors, rows, xy, size, mpp):
        level, w, h = self._plan(size, mpp)
        at = np.rint(xy[rows] / self.level_scale[level]).astype(int)
        extent = math.ceil(w), math.ceil(h)
        low, high = at.min(0), at.max(0) + extent
        dense = np.prod(high - low) <= 1.2 * len(rows) * np.prod(extent) and (self.exact_reads or level == 0)
        try:
            if len(rows) == 1:
                tiles[rows[0]] = self.read(*xy[rows[0]], size, mpp)
            elif dense:
                region = self._stored(*low, *(high - low), level)
                for row, (x, y) in zip(rows, at - low):
                    tiles[row] = _shrink(region[y:y + extent[1], x:x + extent[0]], size, w, h)
        except SlideError as error:
            dense = False  # one damaged place must not cost its neighbours
            if len(rows) == 1:
                errors[int(rows[0])] = str(error)
        if len(rows) > 1 and not dense:
            axis = int(np.argmax(high - low))
            order = rows[np.argsort(at[:, axis], kind="stable")]
            for half in np.array_split(order, 2):
                self._read_into(tiles, errors, half, xy, size, mpp)

    def _plan(self, size, mpp):
        """(level, w, h): the level that serves mpp, and the tile's extent in its pixels (floats, or size as stored)."""
        coarser = [(self.mpp_xy[0] * sx / mpp, self.mpp_xy[1] * sy / mpp) for sx, sy in self.level_scale]
        level = max((i for i, r in enumerate(coarser) if max(r) <= 1 + TOLERANCE and self._even(i)), default=0)
        if max(coarser[level]) > MAX_ENLARGE:
            raise SlideError(f"{self.path}: asked for {mpp:.4g} um/px, but the slide has {self.mpp:.4g} "
                             f"({self.mpp_source}); ask for {max(self.mpp_xy) / MAX_ENLARGE:.4g} or coarser")
        return level, *(size if abs(ratio - 1) <= TOLERANCE else size / ratio for ratio in coarser[level])

    def _even(self, level):
        """Whether a level is as much smaller across as down; one that is not shows something else."""
        sx, sy = self.level_scale[level]
        return abs(sx / sy - 1) <= TOLERANCE + 2 / min(self.level_dimensions[level])

    # -- pixels -------------------------------------------------------------------------------------------------------

    def _region(self, x, y, w, h, level):
        """w x h pixels of a level from (x, y) in level-0 px: uint8 (h, w, 3), on white."""
        sx, sy = self.level_scale[level]
        if self.exact_reads or level == 0:
            return self._stored(round(x / sx), round(y / sy), w, h, level)
        # OpenSlide truncates -x / downsample to a whole number, so what lies left or above is not asked for
        left, top = max(0, math.ceil(-x / sx)), max(0, math.ceil(-y / sy))
        region = np.full((h, w, 3), 255, np.uint8)
        if left < w and top < h:
            region[top:, left:] = self._read_rgb(round(x + left * sx), round(y + top * sy), w - left, h - top, level)
        return region

    def _stored(self, x, y, w, h, level):
        """w x h pixels as stored at a level, from (x, y) in that level's pixels: uint8 (h, w, 3), on white."""
        left, top = max(x, 0), max(y, 0)
        right, bottom = (min(a, b) for a, b in zip((x + w, y + h), self.level_dimensions[level]))
        if (left, top, right, bottom) == (x, y, x + w, y + h):
            return self._exact(x, y, w, h, level)
        region = np.full((h, w, 3), 255, np.uint8)
        if left < right and top < bottom:
            region[top - y:bottom - y, left - x:right - x] = self._exact(left, top, right - left, bottom - top, level)
        return region

    def _exact(self, x, y, w, h, level):
        downsample = self._handle().level_downsamples[level]  # OpenSlide's own, one for both axes
        before = [min(MARGIN, x), min(MARGIN, y)]
        at = [round((x - before[0]) * downsample), round((y - before[1]) * downsample)]
        e = [at[0] / downsample - (x - before[0]), at[1] / downsample - (y - before[1])]
        if level == 0 or max(map(abs, e)) < 0.002 or not self._interpolates(x, y, w, h, level):
            return self._read_rgb(round(x * downsample), round(y * downsample), w, h, level)
        blurred = self._read_rgb(*at, before[0] + w + MARGIN, before[1] + h + MARGIN, level)
        pixels = np.empty((h, w, 3), np.uint8)
        for top in range(0, h, STRIP):
            rows = min(STRIP, h - top)
            strip = blurred[top:top + before[1] + rows + MARGIN].reshape(-1, blurred.shape[1] * 3).astype(np.float32)
            strip = _sharpen(strip, e[1], 1, before[1], rows)
            strip = _sharpen(strip.T, e[0], 3, before[0], w).T
            np.clip(strip, 0, 255, out=strip)
            pixels[top:top + rows] = (strip + 0.5).reshape(rows, w, 3)
        return pixels

    def _interpolates(self, x, y, w, h, level):
        """Whether this OpenSlide blends pixels at fractional positions, from two reads a level-0 pixel apart."""
        if OPENSLIDE["interpolates"] is None:
            downsample = self._handle().level_downsamples[level]
            at = round(x * downsample), round(y * downsample)
            a, b = (self._read_rgb(at[0] + d, at[1] + d, w, h, level) for d in (0, 1))
            if (a[:, 1:] != a[:, :-1]).mean() < 0.1 or (a[1:] != a[:-1]).mean() < 0.1:
                return True  # too flat to tell: glass may look like its own shifted copy
            whole = [np.array_equal(b[:h - j, :w - i], a[j:, i:]) for i in (0, 1) for j in (0, 1)]
            OPENSLIDE["interpolates"] = not any(whole)
        return OPENSLIDE["interpolates"]

    def _read_rgb(self, x, y, w, h, level):
        """One OpenSlide read on white, uint8 (h, w, 3), location in level-0 px.

        After an error every call on that handle fails, so one retry on a new handle.
        """
        for last_try in (False, True):
            try:
                rgba = self._handle().read_region((x, y), level, (w, h))
                break
            except openslide.OpenSlideError as error:
                self.close()
                if last_try:
                    raise SlideError(f"{self.path}: cannot read x={x} y={y} level={level}: {error} (damaged, or a "
                                     "download cut short? compare its size or checksum with the source)") from error
        if rgba.getchannel("A").getextrema()[0] == 255:
            return np.array(rgba.convert("RGB"))
        image = Image.new("RGB", (w, h), "white")
        image.paste(rgba, (0, 0), rgba)
        return np.array(image)

    def check_levels(self, places=5):
        """Compare each level with the one below it at a few places with tissue.

        Raises SlideError if they differ at half of them: a level that shows another picture, or is not as coarse as
        its dimensions say. Costs about 10 ms a level.
        """
        rng, tissue = np.random.default_rng(0), self._tissue()[0].any()
        for level in range(1, len(self.level_scale)):
            if not self._even(level):
                raise SlideError(f"{self.path}: level {level} is {self.level_dimensions[level]} px of {self.dimensions}"
                                 ": another aspect, so another picture; convert the slide, or leave it out")
            points = [self.random_point(rng) if tissue else rng.random(2) * self.dimensions for _ in range(places)]
            likeness = [self._likeness(*point, level) for point in points]
            likeness = np.median([value for value in likeness if value is not None] or [1])
            if likeness < 0.5:
                raise SlideError(f"{self.path}: level {level} does not show what level {level - 1} shows (median "
                                 f"correlation {likeness:.2f}); convert the slide, or leave it out")

    def _likeness(self, x, y, level, size=96):
        """Correlation of a level's gray, near a level-0 point, with the level below; None where flat or damaged."""
        size = min(size, *self.level_dimensions[level])
        (sx, sy), (fx, fy) = self.level_scale[level], self.level_scale[level - 1]
        x, y = (min(max(round(at / s - size / 2), 0), whole - size)  # inside: the slide's edge looks alike anywhere
                for at, s, whole in zip((x, y), (sx, sy), self.level_dimensions[level]))
        w, h = size * sx / fx, size * sy / fy
        try:
            fine = self._region(x * sx, y * sy, math.ceil(w), math.ceil(h), level - 1)
            pair = self._stored(x, y, size, size, level), _shrink(fine, size, w, h)
        except SlideError:
            return None
        a, b = (np.asarray(Image.fromarray(p).convert("L").filter(ImageFilter.BoxBlur(2)), float) for p in pair)
        if max(a.std(), b.std()) < 4:  # blurred, since some pyramids are a pixel off
            return None
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / max(math.sqrt((a * a).sum() * (b * b).sum()), 1e-9)

    # -- tissue -------------------------------------------------------------------------------------------------------

    def tissue_mask(self):
        """(mask, cell): bool (h, w), and the (x, y) size of its cells in level-0 px (floats), about 8 um (TISSUE).

        mask[j, i] covers level-0 x from i * cell[0] and y from j * cell[1]. For H&E on glass; see _is_tissue_colour.
        Made once: 1 s for a large slide with low levels, 35 s for 10^9 pixels without; read from mask_dir, 3 ms.
        """
        bits, (h, w), cell = self._tissue()
        return np.unpackbits(bits, count=h * w).reshape(h, w).astype(bool), cell

    def random_point(self, rng):
        """A random point of the tissue, (x, y) floats in level-0 px. Raises SlideError if there is no tissue."""
        bits, (h, w), cell = self._tissue()
        if not bits.any():
            raise SlideError(f"{self.path}: no tissue found in an H&E mask; leave the slide out (or --mask_hue=false "
                             "for another stain, see TISSUE in wsi.py)")
        while True:  # of cells drawn at random, the first with tissue: needs no list of them
            cells = rng.integers(h * w, size=64)
            hits = cells[bits[cells >> 3] >> (7 - (cells & 7)) & 1 == 1]
            if len(hits):
                row, column = divmod(int(hits[0]), w)
                return (column + rng.random()) * cell[0], (row + rng.random()) * cell[1]

    def random_tissue(self, rng, size, mpp):
        """(x, y), ints: top-left of a tile for read(x, y, size, mpp) whose centre is a random point of the tissue."""
        (x, y), (w, h) = self.random_point(rng), self.extent(size, mpp)
        return round(x - w / 2), round(y - h / 2)

    def _tissue(self):
        """(packed bits, (h, w), cell): kept in memory, and in mask_dir."""
        if self._mask is None:
            name = f"{Path(self.path).stem}-{_fingerprint(self.path, self.mpp_xy)}.npz"
            self._mask = _load_mask(os.path.join(self.mask_dir, name), self._rule) if self.mask_dir else None
        if self._mask is None:
            rule = self._rule or TISSUE
            thumbnail, damaged, cell = self._thumbnail(rule["mpp"])
            um = self.mpp_xy[0] * cell[0], self.mpp_xy[1] * cell[1]
            mask = _mask_of(thumbnail, um, rule) | damaged  # so that their tiles are tried, and counted
            self._mask = np.packbits(mask), mask.shape, cell
            try:
                self.check_levels()
            except SlideError:
                self._mask = None  # asked again, it says so again
                raise
            if self.mask_dir:
                error = _save_mask(os.path.join(self.mask_dir, name), self._mask, rule)
                if error:
                    warnings.warn(f"{self.path}: its mask is not kept: {error}", stacklevel=2)
        return self._mask

    def _thumbnail(self, mpp):
        """(uint8 (h, w, 3), damaged bool (h, w), cell): k x k means of the coarsest one up to mpp; cell in level-0 px.

        In blocks of 4 million pixels, since the only level may have 10^10. Cells that cannot be read are white here and
        tissue in the mask: their tiles are tried, found damaged, and counted.
        """
        fine = (i for i, m in enumerate(self.level_mpp) if m <= mpp * (1 + TOLERANCE) and self._even(i))
        level = max(fine, default=0)
        k = max(1, round(mpp / self.level_mpp[level]))
        (sx, sy), (level_w, level_h) = self.level_scale[level], self.level_dimensions[level]
        w, h = math.ceil(level_w / k), math.ceil(level_h / k)
        if w * h > MAX_MASK_CELLS:
            raise SlideError(f"{self.path}: a mask of {w} x {h} cells at {mpp:.4g} um/px is too large; if the slide's "
                             f"{self.mpp:.4g} um/px ({self.mpp_source}) is wrong, {REMEDY}")
        thumbnail, damaged = np.full((h, w, 3), 255, np.uint8), np.zeros((h, w), bool)
        self._fill(thumbnail, damaged, 0, 0, max(1, 2048 // k), k, level)
        return thumbnail, damaged, (k * sx, k * sy)

    def _fill(self, part, damaged, left, top, step, k, level):
        """Fill part of the thumbnail, from cell (left, top) on, in blocks of step cells; smaller ones around damage."""
        for j in range(0, part.shape[0], step):
            for i in range(0, part.shape[1], step):
                block, lost = part[j:j + step, i:i + step], damaged[j:j + step, i:i + step]
                x, y, h, w = (left + i) * k, (top + j) * k, block.shape[0] * k, block.shape[1] * k
                try:
                    block[:] = np.asarray(Image.fromarray(self._stored(x, y, w, h, level)).reduce(k))
                except SlideError:
                    if step * k > 256:
                        self._fill(block, lost, left + i, top + j, step // 2, k, level)
                    else:
                        lost[:] = True


OPENSLIDE = {"interpolates": None}  # of the library, not of a slide: found out once a process


def _open(path):
    if not os.path.isfile(path):
        raise SlideError(f"{path}: no such file")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(f"{path}: not a slide that OpenSlide reads: cut short, striped (convert: vips tiffsave --tile "
                         "--pyramid), or a .mrxs without its folder") from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: OpenSlide cannot open it: {error} (a download cut short?)") from error


def _factor(whole, level):
    """How much smaller a level is along an axis: a whole number if the level has that size but for cut-off pixels."""
    k = round(whole / level)
    return float(k) if abs(whole / k - level) < 1 else whole / level


def _shrink(pixels, size, w, h):
    """The top-left w x h px (floats) of uint8 (H, W, 3), resized to (size, size, 3)."""
    if (w, h) == (size, size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.BILINEAR, (0, 0, w, h), reducing_gap=2.0))


def _sharpen(pixels, e, step, before, count):
    """Undo a bilinear shift by e px along axis 0 of float32 (n * step, m), where a pixel has `step` rows (channels).

    It replaces nothing else than OpenSlide's own blur: a read at fraction e > 0 gives r[i] = (1 - e) p[i] + e p[i + 1],
    and so p[i] = sum over k >= 0 of (-e / (1 - e))^k r[i + k] / (1 - e); mirrored for e < 0. Terms below 1/1000 are
    left out. It is as exact as r's rounding to whole grey levels: measured error 0.3 levels on average. Returns
    `count` pixels from pixel `before` on.
    """
    sign, e = (1, e) if e >= 0 else (-1, -e)
    weight = 1 / (1 - e)
    total = weight * pixels[before * step:(before + count) * step]
    term = np.empty_like(total)
    for k in range(1, (MARGIN if sign > 0 else before) + 1):
        weight *= -e / (1 - e)
        if abs(weight) < 1e-3:
            break
        start = (before + sign * k) * step
        total += np.multiply(pixels[start:start + count * step], weight, out=term)
    return total


def _sums(mask, start, length):
    """Sums of mask (n, m) along its rows from start (k) to start + length, both in rows, fractions included: (k, m)."""
    total = np.concatenate([np.zeros((1, mask.shape[1])), np.cumsum(mask, axis=0, dtype=float)])

    def up_to(at):
        at = np.clip(at, 0, len(mask))
        low = np.minimum(at.astype(int), len(mask) - 1)
        return total[low] + (at - low)[:, None] * (total[low + 1] - total[low])
    return up_to(start + length) - up_to(start)


# ---- tissue ---------------------------------------------------------------------------------------------------------


def is_tissue(tile, share=0.6):
    """Whether more than share of the pixels of a tile, uint8 (H, W, 3), has a colour of H&E: Midnight's rule.

    In OpenCV's units H in [90, 180], S in [8, 255], V in [103, 255]; PIL's hue runs to 255, hence 127, and decides the
    same. It drops glass, green ink and very dark pixels, but also brown (DAB, melanin), and it keeps blue ink.
    """
    return bool(tissue_share(tile) > share)


def tissue_share(tile):
    """Share of the pixels of uint8 (H, W, 3) that pass Midnight's rule, see is_tissue."""
    hue, saturation, value = _hsv(Image.fromarray(tile))
    return ((hue >= 127) & (saturation >= 8) & (value >= 103)).mean()


def _hsv(image):
    return (np.asarray(channel) for channel in image.convert("HSV").split())


def _mask_of(thumbnail, um, rule):
    """bool (h, w) of a thumbnail uint8 (h, w, 3) whose cells are um = (x, y) micrometres large."""
    colour = Image.fromarray(np.uint8(255) * _is_tissue_colour(thumbnail, rule))
    radius = [max(0, (rule["vote_um"] / side - 1) / 2) for side in um]
    mask = np.asarray(colour.filter(ImageFilter.BoxBlur(radius))) > 127
    cell = um[0] * um[1] / 1e6  # mm2
    mask = _drop_small(mask, rule["speck_mm2"] / cell)
    return ~_drop_small(~mask, rule["hole_mm2"] / cell) if mask.any() else mask  # a small slide of glass is no hole


def _is_tissue_colour(thumbnail, rule):
    """bool (h, w): more saturated than glass, and neither ink nor dark (fluorescence, black ink, the slide's edge).

    Otsu's threshold is clamped: on a slide that is all tissue, or all glass, it would cut through tissue, or noise.
    """
    hue, saturation, value = _hsv(Image.fromarray(thumbnail).filter(ImageFilter.BoxBlur(1)))
    tissue = (saturation > np.clip(_otsu(saturation), *rule["otsu"])) & (value > rule["value"])
    if rule["hue"]:
        tissue &= hue >= 127
    if rule["ink"]:
        tissue &= ~((hue >= 50) & (hue <= 135)) & ~((hue > 135) & (hue <= 177) & (saturation > 100))
    return tissue


def _otsu(channel):
    """The threshold of a uint8 array that maximises the variance between the values up to it and those above."""
    count = np.bincount(channel.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), count.sum()
    moment = (count * np.arange(256)).cumsum()
    between = (moment[-1] * below - moment * total) ** 2 / np.maximum(below * (total - below), 1)
    return int(between.argmax())


def _drop_small(mask, least):
    """mask, bool (h, w), without its connected parts (by edges) of fewer than `least` cells.

    Parts are found among the runs of each row: a run joins those that it touches in the next row (union-find).
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row, start), end = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    width = edges.shape[1]
    first = np.searchsorted(row * width + end, (row + 1) * width + start, "right")
    touching = np.maximum(np.searchsorted(row * width + start, (row + 1) * width + end, "left") - first, 0)
    a = np.repeat(np.arange(len(row)), touching)
    b = np.repeat(first - np.cumsum(touching) + touching, touching) + np.arange(len(a))
    part = np.arange(len(row))
    while (part[a] != part[b]).any():
        np.minimum.at(part, np.maximum(part[a], part[b]), np.minimum(part[a], part[b]))
        while (part != part[part]).any():
            part = part[part]
    kept = np.bincount(part, end - start, len(row))[part] >= least
    change = np.zeros(edges.shape, np.int8)
    change[row[kept], start[kept]] = 1
    change[row[kept], end[kept]] = -1  # runs of a row never touch, so nothing is overwritten
    return np.cumsum(change, axis=1, dtype=np.int8)[:, :-1].astype(bool)


def _save_mask(file, mask, rule):
    """Keep a mask. What went wrong, if the folder is full or not writable: that costs time later, and no tile now."""
    unfinished = f"{file}.{os.urandom(4).hex()}.unfinished"
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(unfinished, "wb") as f:
            np.savez_compressed(f, bits=mask[0], shape=mask[1], cell=mask[2], rule=json.dumps(rule))
        os.replace(unfinished, file)
    except OSError as error:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        return str(error)


def _fingerprint(path, mpp_xy):
    """Of a slide's size, of 8 places in its file and of its scale: still right where the file has moved."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(repr((size, mpp_xy)).encode(), digest_size=8)
    with open(path, "rb") as f:
        for k in range(8):
            f.seek(k * max(size - 4096, 0) // 7)
            digest.update(f.read(4096))
    return digest.hexdigest()


def _load_mask(file, rule):
    """(packed bits, (h, w), cell), or None if there is none, it is damaged, or it was made by another rule."""
    try:
        with np.load(file) as saved:
            if rule is None or json.loads(json.dumps(rule)) == json.loads(str(saved["rule"])):
                return saved["bits"], tuple(saved["shape"].tolist()), tuple(saved["cell"].tolist())
    except Exception:  # a damaged file raises whatever zipfile, zlib and numpy come across; it is made again
        pass
    return None


# ---- many slides ----------------------------------------------------------------------------------------------------


def expand(pattern, key):
    """Sorted files that match a glob; ValueError naming the key if there are none."""
    path = Path(pattern)
    paths = sorted(str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
    if not paths:
        hint = f"; it is a folder: try '{pattern}/*.svs'" if path.is_dir() else ""
        raise ValueError(f"{key}: no file matches {pattern}{hint}")
    return paths


def slide_names(paths, by="stem"):
    """{path: name}, names without dots that serve as file names; by "stem", or by "path" from the common folder on.

    Raises ValueError if two slides would share a name, and so overwrite each other.
    """
    if by not in ("stem", "path"):
        raise ValueError(f"names={by}: stem or path")
    common = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
    names, seen = {}, {}
    for path in paths:
        parts = [Path(path).stem] if by == "stem" else Path(os.path.relpath(os.path.abspath(path), common)).parts
        names[path] = "__".join(parts).replace(".", "_")
        other = seen.setdefault(names[path], path)
        if other != path:
            raise ValueError(f"{other} and {path} would share the name {names[path]}; use --names=path")
    return names


def patient_of(path, pattern=r"TCGA-\w\w-\w{4}"):
    """The patient that a slide belongs to: what the regular expression finds in the file's name, else its stem."""
    found = re.search(pattern, os.path.basename(path))
    return found.group() if found else Path(path).stem


@functools.cache
def held_out(patient, share):
    """Whether a patient is among the `share` that is never trained on; a function of the name alone."""
    digest = hashlib.blake2b(patient.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2 ** 64


def tissue_rule(c):
    """TISSUE as the keys mask_... say."""
    return {key: c[f"mask_{key}"] for key in TISSUE}


def open_slide(path, c):
    """A Slide as the keys of the command line say."""
    return Slide(path, c["slide_mpp"] or None, c["exact_reads"], c["mpp_from_objective"], tissue_rule(c), c["mask_dir"])


if __name__ == "__main__":
    from configurator import configure

    task = ""               # report, overlay, tiles, coords or features
    slides = ""             # glob of whole-slide images
    out = ""                # folder to write; a rerun of tiles, coords and features goes on
    slide_mpp = 0.0         # um/px of level 0 of every slide, overriding what the files say; 0 = believe the files
    mpp_from_objective = False  # where nothing better is stated, take 10 / objective power: a guess, off by up to 50 %
    exact_reads = True      # undo OpenSlide's interpolation; False is the old way
    names = "stem"          # of outputs: the slide's file name, or "path": with its folders, where file names repeat
    patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; elsewhere a slide is its own patient
    mask_dir = ""           # folder that keeps tissue masks, for this and other tasks and for training; "" = none
    mask_mpp, mask_otsu, mask_value, mask_hue, mask_ink, mask_vote_um, mask_speck_mm2, mask_hole_mm2 = TISSUE.values()
    mpps = (0.5,)           # um/px of the tiles, one or several
    tile_px = 256
    overlap = 0             # px of a tile that its neighbour repeats
    min_tissue = 0.25       # share of a tile's area in the mask
    tissue_share = 0.0      # share of a tile's pixels in Midnight's range of HSV, for tiles; 0 = do not test
    tiles_per_slide = 0     # random places a slide and mpp instead of the grid; 0 = the grid
    coords = ""             # folder of TRIDENT's or CLAM's .h5 to take the places from; "" = grid or random
    coords_format = "trident"  # or "clam": what --task=coords writes
    jpeg_quality = 90
    weights = ""            # of features: the tile encoder's file
    arch = ""               # of weights that do not say; "" = found out
    batch_size = 64         # tiles a forward
    device = ""             # "cuda" or "cpu"; "" = cuda if there is one
    norm = None             # "imagenet", "half", (mean, std); None = the weights' own, else imagenet
    region_mb = 16          # memory of one read, a worker; larger ones leave the cache and are slower
    workers = 2             # processes
    seed = 0                # of random places

    config = configure(globals())
    homes = {"report": "report", "overlay": "report", "tiles": "tiles", "coords": "tiles", "features": "features"}
    try:  # they import this file as wsi: of SlideError, a ValueError, there are two
        if task not in homes:
            raise ValueError(f"--task={task or '...'}: one of {', '.join(homes)}")
        for key in [key for key in ("slides", "out") if not config[key]]:
            raise ValueError(f"--{key}=... is missing")
        getattr(importlib.import_module(f"prepare.{homes[task]}"), task)(config)
    except (ValueError, OSError) as e:
        raise SystemExit(f"wsi.py: {e}") from None
    except KeyboardInterrupt:
        raise SystemExit("wsi.py: interrupted") from None
