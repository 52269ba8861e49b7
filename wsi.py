"""
Whole-slide images: open one, learn its scale, find its tissue, read tiles from it.

    slide = Slide("a.svs")                             # or Slide("a.svs", mpp=0.25) where the file does not say
    x, y = slide.random_tissue(rng, size=224, mpp=0.5)
    tile = slide.read(x, y, size=224, mpp=0.5)         # uint8 (224, 224, 3)

Scale. A tile is size pixels of mpp micrometres; (x, y) is its top-left in level-0 pixels. "20x" is no unit here:
scanners differ from 0.44 to 0.55 um/px. The mpp comes from, in this order: the user; openslide.mpp-x/-y; a vendor's
own key; the TIFF resolution if it has a unit. A value outside 0.05-20 um/px is junk (72 dpi is 353) and does not count.
The objective power only cross-checks it. Without an mpp a slide is refused: a guess would mix scales in silence.

Levels. A level's scale is W0 / Wl and H0 / Hl, as floats, per axis: pyramids of 2.0005x or 4.0015x are ordinary. The
coarsest level at most 3 % above the target serves it. An axis within 3 % is taken as stored, since resampling 0.499 to
0.5 only blurs; otherwise the exact larger region is read and shrunk, always with PIL's antialiased BILINEAR, for
training and inference alike. Only where level 0 itself is too coarse is a tile enlarged, by at most 10 %.

White is all that lies outside the slide and every transparent pixel (areas not scanned); OpenSlide leaves them black.

Not handled: at level > 0 OpenSlide interpolates between stored pixels, a slight blur that differs from place to place.

Cost in ms of a 224 px tile at a random place, one EPYC core, OpenSlide 4.0.1, as stored / shrunk 2x / shrunk 4x:
JPEG 1-2 / 5-6 / 18, JPEG 2000 9 / 21 / 66. The tissue mask of a slide without low levels: about 35 s for 10^9 pixels.
"""
import math
import os

import numpy as np
import openslide
from PIL import Image, ImageFilter

TOLERANCE = 0.03         # a level this close to the target is read as stored: 0.2425-0.2577 serve 0.25 um/px, and so on
MAX_ENLARGE = 1.10       # level-0 mpp / target beyond which there is no such detail in the slide
MPP_RANGE = (0.05, 20.0) # um/px; no scanner is finer, no slide scan coarser
MASK_MPP = 8.0           # um/px of the tissue mask: a cell is about the size of a nucleus
MAX_MASK_CELLS = 10 ** 8 # a 25 x 75 mm glass has 3e7 cells of 8 um; more means a wrong mpp

MPP_KEYS = (             # x and y, in order of preference
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y"),
    ("ventana.ScanRes", "ventana.ScanRes"),
    ("tiff.XResolution", "tiff.YResolution"),  # pixels per unit, unlike the others
)
TIFF_UNIT = {"inch": 25400.0, "centimeter": 10000.0}  # um; "none" and "unknown" say nothing
POWER_KEYS = ("openslide.objective-power", "aperio.AppMag")
REMEDY = "state it with mpp=... in Slide(), --slide_mpp=... in train.py"


class SlideError(ValueError):
    """A slide that cannot be used as asked; the message names the file, the reason and the remedy."""


def find_mpp(properties, override=None):
    """(mpp_x, mpp_y, source) in um/px from OpenSlide's properties, or from the user's override, which always wins.

    source is "stated" or the key that was used. Raises SlideError if no key holds a believable value, or if the value
    contradicts the objective power by more than 30 % (20x is about 0.5, 40x about 0.25).
    """
    if override is not None:
        if not MPP_RANGE[0] <= _number(override) <= MPP_RANGE[1]:
            raise SlideError(f"the stated mpp={override} is not within {MPP_RANGE[0]}-{MPP_RANGE[1]} um/px; {REMEDY}")
        return _number(override), _number(override), "stated"
    keys = dict.fromkeys([key for pair in MPP_KEYS for key in pair] + ["tiff.ResolutionUnit", *POWER_KEYS])
    seen = ", ".join(f"{key}={properties[key]}" for key in keys if key in properties) or "none"
    for source, key_y in MPP_KEYS:
        mpp_x, mpp_y = _key_mpp(properties, source), _key_mpp(properties, key_y if key_y in properties else source)
        if mpp_x and mpp_y:
            break
    else:
        raise SlideError(f"no usable mpp (properties seen: {seen}); {REMEDY}")
    power = next((_number(properties[key]) for key in POWER_KEYS if key in properties), math.nan)
    mpp = (mpp_x + mpp_y) / 2
    if power > 0 and abs(mpp * power / 10 - 1) > 0.3:
        raise SlideError(f"{source} gives {mpp:.4g} um/px, but an objective of {power:g}x is about {10 / power:.4g} "
                         f"(properties seen: {seen}); find out which is right and {REMEDY}")
    return mpp_x, mpp_y, source


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
    """

    def __init__(self, path, mpp=None):
        self.path = os.fspath(path)
        self._stated_mpp = mpp
        self._pid = None
        self._tissue = None
        handle = self._handle()
        self.properties = dict(handle.properties)
        self.dimensions = handle.dimensions  # (W, H) at level 0
        self.level_dimensions = handle.level_dimensions
        self.level_scale = [(self.dimensions[0] / w, self.dimensions[1] / h) for w, h in self.level_dimensions]
        try:
            *mpp_xy, self.mpp_source = find_mpp(self.properties, mpp)
        except SlideError as error:
            raise SlideError(f"{self.path}: {error}") from None
        self.mpp_xy, self.mpp = tuple(mpp_xy), sum(mpp_xy) / 2
        self.level_mpp = [(mpp_xy[0] * sx + mpp_xy[1] * sy) / 2 for sx, sy in self.level_scale]

    def __reduce__(self):
        return Slide, (self.path, self._stated_mpp)  # an unpickled slide opens its own handle

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

    def read(self, x, y, size, mpp):
        """The tile of size px at mpp um/px with its top-left at (x, y) in level-0 px: uint8 (size, size, 3).

        Raises SlideError if the slide has no such detail (level 0 more than 10 % coarser than mpp) or is damaged there.
        """
        level, w, h = self._plan(size, mpp)
        image = self._region(x, y, math.ceil(w), math.ceil(h), level)
        if (w, h) != (size, size):
            image = image.resize((size, size), Image.BILINEAR, box=(0, 0, w, h))
        return np.array(image)

    def read_level(self, x, y, size, level):
        """The tile of size px as stored at a pyramid level, (x, y) still in level-0 px: uint8 (size, size, 3).

        OpenMidnight's sample lists name tiles this way; their um/px is whatever the scanner's pyramid has.
        """
        if not 0 <= level < len(self.level_scale):
            raise SlideError(f"{self.path}: no level {level}, it has levels 0-{len(self.level_scale) - 1}")
        return np.array(self._region(x, y, size, size, level))

    def _plan(self, size, mpp):
        """(level, w, h): the level that serves mpp, and the tile's extent in its pixels (floats, or size as stored)."""
        coarser = [(self.mpp_xy[0] * sx / mpp, self.mpp_xy[1] * sy / mpp) for sx, sy in self.level_scale]
        level = max((i for i, ratio in enumerate(coarser) if max(ratio) <= 1 + TOLERANCE), default=0)
        if max(coarser[level]) > MAX_ENLARGE:
            raise SlideError(f"{self.path}: asked for {mpp:.4g} um/px, but the slide has {self.mpp:.4g} "
                             f"({self.mpp_source}); ask for {max(self.mpp_xy) / MAX_ENLARGE:.4g} or coarser")
        return level, *(size if abs(ratio - 1) <= TOLERANCE else size / ratio for ratio in coarser[level])

    def _region(self, x, y, w, h, level):
        """w x h pixels of a level as an RGB image on white.

        What lies left of or above the slide is not asked for: at level > 0 OpenSlide truncates -x / downsample to a
        whole number, which shifts such a tile by up to a pixel.
        """
        image = Image.new("RGB", (w, h), "white")
        sx, sy = self.level_scale[level]
        left, top = max(0, math.ceil(-x / sx)), max(0, math.ceil(-y / sy))
        if left < w and top < h:
            part = self._read_rgba(round(x + left * sx), round(y + top * sy), w - left, h - top, level)
            image.paste(part, (left, top), part)
        return image

    def _read_rgba(self, x, y, w, h, level):
        """One OpenSlide read. After an error every call on that handle fails, so one retry on a new handle."""
        for last_try in (False, True):
            try:
                return self._handle().read_region((x, y), level, (w, h))
            except openslide.OpenSlideError as error:
                self.close()
                if last_try:
                    raise SlideError(f"{self.path}: cannot read x={x} y={y} level={level}: {error} (damaged, or a "
                                     "download cut short? compare its size or checksum with the source)") from error

    def tissue_mask(self, mpp=MASK_MPP):
        """(mask, cell): bool (h, w), and the (x, y) size of its cells in level-0 px (floats), about mpp um.

        mask[j, i] covers level-0 x from i * cell[0] and y from j * cell[1]. For H&E on glass; see _is_tissue_colour.
        """
        thumbnail, cell = self._thumbnail(mpp)
        votes = Image.fromarray(np.uint8(255) * _is_tissue_colour(thumbnail)).filter(ImageFilter.BoxBlur(2))
        return np.asarray(votes) > 127, cell  # the majority of 5 x 5 cells: no specks, no small holes

    def _thumbnail(self, mpp):
        """(uint8 (h, w, 3), cell): k x k means of the coarsest level up to mpp; cell = their size in level-0 px.

        In blocks of 16 million pixels, since the only level may have 10^10.
        """
        level = max((i for i, level_mpp in enumerate(self.level_mpp) if level_mpp <= mpp * (1 + TOLERANCE)), default=0)
        k = max(1, round(mpp / self.level_mpp[level]))
        (sx, sy), (level_w, level_h) = self.level_scale[level], self.level_dimensions[level]
        w, h = math.ceil(level_w / k), math.ceil(level_h / k)
        if w * h > MAX_MASK_CELLS:
            raise SlideError(f"{self.path}: a mask of {w} x {h} cells at {mpp:.4g} um/px is too large; if the slide's "
                             f"{self.mpp:.4g} um/px ({self.mpp_source}) is wrong, {REMEDY}")
        thumbnail = np.empty((h, w, 3), np.uint8)
        step = max(1, 4096 // k)
        for j in range(0, h, step):
            for i in range(0, w, step):
                rows, cols = min(step, h - j), min(step, w - i)
                block = self._region(i * k * sx, j * k * sy, cols * k, rows * k, level).reduce(k)
                thumbnail[j:j + rows, i:i + cols] = np.asarray(block)
        return thumbnail, (k * sx, k * sy)

    def random_tissue(self, rng, size, mpp):
        """(x, y), ints: top-left of a tile for read(x, y, size, mpp) whose centre is a random point of the tissue.

        rng: numpy Generator. The mask is made at the first call and kept. Raises SlideError if there is no tissue.
        """
        if self._tissue is None:
            mask, cell = self.tissue_mask()
            self._tissue = np.flatnonzero(mask).astype(np.int32), mask.shape[1], cell
        cells, mask_w, cell = self._tissue
        if len(cells) == 0:
            raise SlideError(f"{self.path}: no tissue found in an H&E mask at {MASK_MPP:g} um/px; leave the slide out")
        row, col = divmod(int(cells[rng.integers(len(cells))]), mask_w)
        level, w, h = self._plan(size, mpp)
        x = (col + rng.random()) * cell[0] - w * self.level_scale[level][0] / 2
        y = (row + rng.random()) * cell[1] - h * self.level_scale[level][1] / 2
        return round(x), round(y)


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


def is_tissue(tile, share=0.6):
    """Whether more than share of the pixels of a tile, uint8 (H, W, 3), has a colour of H&E: Midnight's rule.

    In OpenCV's units H in [90, 180], S in [8, 255], V in [103, 255]; PIL's hue runs to 255, hence 127, and decides the
    same. It drops glass, green ink and very dark pixels, but also brown (DAB, melanin), and it keeps blue ink.
    """
    hue, saturation, value = _hsv(Image.fromarray(tile))
    return bool(((hue >= 127) & (saturation >= 8) & (value >= 103)).mean() > share)


def _hsv(image):
    return (np.asarray(channel) for channel in image.convert("HSV").split())


def _is_tissue_colour(thumbnail):
    """bool (h, w): more saturated than glass, and neither ink nor dark (fluorescence, black ink, the slide's edge).

    Otsu's threshold is clamped: on a slide that is all tissue, or all glass, it would cut through tissue, or noise.
    """
    hue, saturation, value = _hsv(Image.fromarray(thumbnail).filter(ImageFilter.BoxBlur(1)))
    green_ink = (hue >= 50) & (hue <= 135)
    blue_ink = (hue > 135) & (hue <= 177) & (saturation > 100)
    return (saturation > np.clip(_otsu(saturation), 8, 40)) & (value > 50) & ~green_ink & ~blue_ink


def _otsu(channel):
    """The threshold of a uint8 array that maximises the variance between the values up to it and those above."""
    count = np.bincount(channel.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), count.sum()
    moment = (count * np.arange(256)).cumsum()
    between = (moment[-1] * below - moment * total) ** 2 / np.maximum(below * (total - below), 1)
    return int(between.argmax())
