"""
Tiles, crops and masks, and the order in which they come.

Sources, one a run (keys of train.py):
    slides = "/data/TCGA/*.svs"     tiles read on the fly, at a target mpp, from random places with tissue
    sample_list = "list.txt"        lines `path x y level`: x y in level-0 pixels, tile_px pixels at that pyramid level
    tiles = "/data/tiles"           a folder tree of .jpg .png .tif tiles, each used whole

Order. With a global batch of B, sample n of a run is image n % B of step n // B, on whatever rank that falls; what it
is depends only on (seed, n). So a batch is a pure function of (seed, step, rank, world), a resume needs no state, and
lists and folders are walked so that every index comes exactly once a pass, over all ranks and workers.

Work is split so that few cores feed a GPU: a worker decodes a tile and cuts its crops as uint8; colour, blur and
normalisation run as batched tensor operations on the training device (`augment`), with parameters drawn by the
worker. Reading from slides costs more: 1-18 ms a tile (wsi.py) and, where the slide is not open already, its tissue
mask: about 1 s for a large slide, shared by the `tiles_per_visit` samples drawn from it.

There is no split here yet: every slide that the keys name is trained on, so keep evaluation patients out of the glob.
"""
import functools
import hashlib
import os
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import wsi

ATTEMPTS = 100  # draws for one sample before its source is given up
TISSUE_DRAWS = 20  # places in a slide before it counts as one without enough tissue; of masked ones, 9 in 10 pass
READ_ERRORS = (wsi.SlideError, OSError, SyntaxError, Image.DecompressionBombError)  # PIL reports damage in several ways

# ---- sources: read(n, attempt) -> uint8 (H, W, 3), or one of READ_ERRORS; attempt > 0 is a replacement ---------------


class Slides:
    """
    Random tissue tiles of tile_px pixels at one of several mpp, from slides kept open in a per-process LRU.

    `visit` consecutive samples come from one slide: opening it and masking its tissue costs up to a second.
    """

    def __init__(self, pattern, mpps, tile_px, seed=0, visit=1, slide_mpp=0.0, tissue_share=0.6, open_slides=16):
        self.paths, self.mpps, self.tile_px, self.tissue_share = expand(pattern, "slides"), mpps, tile_px, tissue_share
        self.seed, self.visit = seed, visit
        self.open = functools.lru_cache(open_slides)(lambda path: wsi.Slide(path, slide_mpp or None))

    def read(self, n, attempt=0):
        rng = np.random.default_rng((self.seed, n - n % self.visit, attempt))
        path = self.paths[rng.integers(len(self.paths))]
        if n % self.visit:  # each tile of a visit has its own stretch of the stream
            rng.bit_generator.advance((n % self.visit) << 40)
        slide = self.open(path)
        mpps = [m for m in self.mpps if m * wsi.MAX_ENLARGE >= max(slide.mpp_xy)]
        if not mpps:
            raise wsi.SlideError(f"{path}: {slide.mpp:.3f} um/px is too coarse for every target in mpps={self.mpps}")
        mpp = float(rng.choice(mpps))
        for _ in range(TISSUE_DRAWS):
            tile = slide.read(*slide.random_tissue(rng, self.tile_px, mpp), self.tile_px, mpp)
            if wsi.is_tissue(tile, self.tissue_share):
                return tile
        share = f"{self.tissue_share:.0%} tissue at {mpp} um/px"
        raise wsi.SlideError(f"{path}: no tile of {share} in {TISSUE_DRAWS} draws")


class SampleList:
    """OpenMidnight's lists, held as arrays: 13 bytes a line and one string a slide."""

    def __init__(self, file, tile_px, seed, open_slides=16):
        ids, self.tile_px, self.seed = {}, tile_px, seed
        self.slide, self.x, self.y, self.level = array("I"), array("i"), array("i"), array("B")
        if not os.path.isfile(file):
            raise ValueError(f"sample_list: no file {file}")
        with open(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    path, x, y, level = line.rsplit(maxsplit=3)  # a path may hold spaces
                    row = int(x), int(y), int(level)
                    for column, value in zip((self.x, self.y, self.level), row):
                        column.append(value)
                except (ValueError, OverflowError):
                    raise ValueError(f"{file}, line {number}: not 'path x y level': {line.strip()!r}") from None
                self.slide.append(ids.setdefault(path, len(ids)))
        self.paths = list(ids)
        if not self.paths:
            raise ValueError(f"{file}: the sample list is empty")
        # mpp 1 is stated because levels, not mpp, set the scale here: a slide that does not know its mpp may be listed
        self.open = functools.lru_cache(open_slides)(lambda path: wsi.Slide(path, 1.0))

    def __len__(self):
        return len(self.slide)

    def read(self, n, attempt=0):
        i = pick(n, attempt, len(self), self.seed)
        slide = self.open(self.paths[self.slide[i]])
        return slide.read_level(self.x[i], self.y[i], self.tile_px, self.level[i])


class Tiles:
    """A folder tree of images, each a tile of its own size."""

    def __init__(self, folder, seed):
        if not os.path.isdir(folder):
            raise ValueError(f"tiles: no folder {folder}")
        endings = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
        self.paths = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in endings)
        self.seed = seed
        if not self.paths:
            raise ValueError(f"tiles: no {' '.join(endings)} files under {folder}")

    def __len__(self):
        return len(self.paths)

    def read(self, n, attempt=0):
        path = self.paths[pick(n, attempt, len(self), self.seed)]
        try:
            with Image.open(path) as image:
                return np.array(image.convert("RGB"))
        except READ_ERRORS as e:
            raise OSError(f"{path}: {' '.join(str(e).split())}") from None


def open_source(c):
    """The one source that the keys name. Raises ValueError naming what is missing, before anything is built."""
    named = [k for k in ("slides", "sample_list", "tiles") if c[k]]
    if len(named) != 1:
        remedy = "unset the others, as in --slides= --tiles=DIR" if named else "prepare/toy.py makes a world to try"
        raise ValueError(f"set exactly one of slides, sample_list, tiles (now: {', '.join(named) or 'none'}); {remedy}")
    if named == ["slides"]:
        source = Slides(c["slides"], c["mpps"], c["tile_px"], c["seed"], c["tiles_per_visit"], c["slide_mpp"],
                        c["tissue_share"], c["open_slides"])
        refuse_if_none_opens(source.paths[:20], c["slide_mpp"] or None)
        return source
    if named == ["sample_list"]:
        return SampleList(c["sample_list"], c["tile_px"], c["seed"], c["open_slides"])
    return Tiles(c["tiles"], c["seed"])


def refuse_if_none_opens(paths, mpp):
    """A pattern that matches the wrong files should not cost a start; single bad slides are replaced while training."""
    errors = []
    for path in paths:
        try:
            return wsi.Slide(path, mpp).close()
        except wsi.SlideError as e:
            errors.append(e)
    hint = "; are these tiles? then --slides= --tiles=FOLDER" if paths[0].endswith((".jpg", ".jpeg", ".png")) else ""
    raise ValueError(f"slides: none of the first {len(paths)} opens{hint}: {errors[0]}")


def expand(pattern, key):
    path = Path(pattern)
    paths = sorted(str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
    if not paths:
        hint = f"; it is a folder: try '{pattern}/*.svs'" if path.is_dir() else ""
        raise ValueError(f"{key}: no file matches {pattern}{hint}")
    return paths


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


# ---- crops and masks, in the worker ---------------------------------------------------------------------------------


def sample_numbers(step, rank, world, batch):
    """The numbers of the `batch` samples of this rank at this step."""
    first = (step * world + rank) * batch
    return range(first, first + batch)


def stack(views):
    """Crop-major: views[view][image] -> one tensor, all images of the first view first."""
    return torch.stack([image for view in views for image in view]) if views else torch.empty(0)


class Batches(torch.utils.data.Dataset):
    """
    dataset[step] is the whole batch of this rank (B images, L local crops, M masked patches), crop-major:

    global_crops uint8 (2B, 3, S, S), local_crops uint8 (L*B, 3, s, s), global_colour and local_colour (their parameters
    for `augment`), masks bool (2B, N), masked int64 (M) indices into the 2B*N patches, mask_weights (M) one over the
    masked patches of that crop, bad (messages of unreadable tiles that were replaced). Without crops if a tile could
    not be replaced. `c` holds train.py's keys, `grid` the patches along a global crop's side.
    """

    def __init__(self, source, c, grid, rank=0, world=1):
        self.source, self.c, self.grid, self.rank, self.world = source, c, grid, rank, world

    def __len__(self):
        return self.c["max_steps"]

    def __getitem__(self, step):
        if torch.utils.data.get_worker_info():
            torch.set_num_threads(1)
        c, bad = self.c, []
        images = [self.image(n, bad) for n in sample_numbers(step, self.rank, self.world, c["batch_size"])]
        if None in images:
            return {"bad": bad}
        batch = {"bad": bad}
        for what, of_images in zip(("crops", "colour"), zip(*images)):  # of_images[image][view]
            views = list(zip(*of_images))
            batch[f"global_{what}"] = stack(views[:2])
            batch[f"local_{what}"] = stack(views[2:])
        rng = np.random.default_rng((c["seed"], step, self.rank, 1))
        masks = torch.from_numpy(block_masks(rng, 2 * len(images), self.grid, c["mask_prob"], c["mask_ratio"]))
        masked = masks.flatten().nonzero()[:, 0]
        weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        return {**batch, "masks": masks, "masked": masked, "mask_weights": weights}

    def image(self, n, bad):
        """Crops and colour parameters of sample n: two lists over views. Messages of unreadable draws go to `bad`."""
        c, tile = self.c, None
        for attempt in range(ATTEMPTS):
            try:
                tile = self.source.read(n, attempt)
                break
            except READ_ERRORS as e:
                bad.append(" ".join(str(e).split()))
        if tile is None:
            return None
        rng = np.random.default_rng((c["seed"], n, ATTEMPTS))
        pixels = torch.from_numpy(np.ascontiguousarray(tile)).permute(2, 0, 1)[None]  # channels-last: the fast resize
        views = [(c["global_scale"], c["global_px"], p) for p in c["blur_prob"][:2]]
        views += [(c["local_scale"], c["local_px"], c["blur_prob"][2])] * c["local_crops"]
        crops = [crop_and_flip(pixels, rng, scale, px) for scale, px, _ in views]
        return crops, [colour_parameters(rng, c, blur) for _, _, blur in views]


def crop_and_flip(pixels, rng, scale, px):
    """uint8 (1, 3, H, W) -> (3, px, px): random area and aspect ratio, antialiased bicubic, flip with p = 0.5."""
    H, W = pixels.shape[2:]
    for _ in range(10):
        area, ratio = H * W * rng.uniform(*scale), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < h <= H and 0 < w <= W:
            break
    else:  # a very long tile: the largest crop of a legal aspect
        h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
    top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
    crop = F.interpolate(pixels[:, :, top : top + h, left : left + w], (px, px), mode="bicubic", antialias=True)[0]
    return (crop.flip(-1) if rng.random() < 0.5 else crop).contiguous()


def colour_parameters(rng, c, blur_prob):
    """
    One crop's draw as a row of 11 floats: [hed on, H, E, D, jitter order or -1, brightness, contrast, saturation, hue,
    gray on, blur sigma or 0]. Probabilities are effective ones: blur_prob is the share of blurred crops.
    """
    on = rng.random(4) < (c["hed_prob"], c["jitter_prob"], c["gray_prob"], blur_prob)
    b, ct, s, h = c["jitter"]
    jitter = [rng.uniform(1 - b, 1 + b), rng.uniform(1 - ct, 1 + ct), rng.uniform(1 - s, 1 + s), rng.uniform(-h, h)]
    order = rng.integers(len(ORDERS)) if on[1] else -1
    sigma = rng.uniform(0.1, 2.0)
    row = [on[0], *rng.uniform(-c["hed_nats"], c["hed_nats"], 3), order, *jitter, on[2], sigma if on[3] else 0]
    return torch.tensor(row, dtype=torch.float32)


def block_masks(rng, crops, grid, prob, ratio):
    """
    bool (crops, grid*grid). Which crop gets which of `mask_counts` is shuffled; a mask is made of BEiT's blocks, i.e.
    rectangles of 4 patches or more and aspect 0.3 to 3.3, and topped up at random to its exact count.
    """
    masks, counts = np.zeros((crops, grid, grid), bool), mask_counts(crops, grid, prob, ratio)
    for crop, count in zip(rng.permutation(crops), counts):
        add_blocks(rng, masks[crop], count)
    return masks.reshape(crops, -1)


def mask_counts(crops, grid, prob, ratio):
    """
    Masked patches of each masked crop: int(crops * prob) crops, in n even steps of the patches from ratio[0] (excluded)
    to ratio[1]. The sum is a constant of the batch, so shapes are static on every rank (DINOv3).
    """
    return [max(int(grid * grid * share), 1) for share in np.linspace(*ratio, int(crops * prob) + 1)[1:]]


def add_blocks(rng, mask, count):
    """Set exactly `count` cells of mask (g, g), in place."""
    grid, left = len(mask), count
    while left > 0 and (block := draw_block(rng, mask, min(left, mask.size // 2))):
        top, start, h, w = block
        mask[top : top + h, start : start + w] = True
        left = count - mask.sum()
    mask.reshape(-1)[rng.permutation(np.flatnonzero(~mask))[:left]] = True
    assert mask.sum() == count and mask.shape == (grid, grid), (mask.sum(), count)


def draw_block(rng, mask, most):
    """A rectangle (top, left, h, w) that adds 1 to `most` cells, or None after ten tries."""
    for _ in range(10):
        area, aspect = rng.uniform(min(4, most), most), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < h < len(mask) and 0 < w < len(mask):
            top, left = rng.integers(len(mask) - h + 1), rng.integers(len(mask) - w + 1)
            if 0 < h * w - mask[top : top + h, left : left + w].sum() <= most:
                return top, left, h, w
    return None


# ---------------------------------------------------------------------------------------------------------------------
# colour, blur and normalisation, on the device. order: HED, jitter, gray, blur, normalise, as in OpenMidnight.

RGB_FROM_HED = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # Ruifrok 2001, OD per stain
GRAY = torch.tensor([0.2989, 0.587, 0.114])
UNIT = 13.815510557964274  # -log(1e-6): nats of optical density in one stain unit of scikit-image
ORDERS = torch.tensor([[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4)
                       if len({a, b, c, d}) == 4])  # of the four jitter operations


def augment(crops, colour, c, device):
    """uint8 (n, 3, S, S) and parameters (n, 11) -> normalised float32 (n, 3, S, S) on `device`, per-crop parameters."""
    x = crops.to(device, non_blocking=True).float() / 255
    p, on = colour.to(device, non_blocking=True)[:, :, None, None, None], {}
    for name, column in (("hed", 0), ("gray", 9), ("blur", 10)):  # indices are found on the CPU: no device sync
        on[name] = colour[:, column].nonzero()[:, 0].to(device, non_blocking=True)
    i = on["hed"]
    x[i] = hed_shift(x[i], p[i, 1:4, 0, 0, 0], c["hed"])
    for turn in range(4):
        operation = torch.where(colour[:, 4] >= 0, ORDERS[colour[:, 4].long(), turn], -1)
        for k, jitter in enumerate((brightness, contrast, saturation, hue)):
            i = (operation == k).nonzero()[:, 0].to(device, non_blocking=True)
            x[i] = jitter(x[i], p[i, 5 + k])
    x[on["gray"]] = gray(x[on["gray"]]).expand(-1, 3, -1, -1)
    x[on["blur"]] = gaussian_blur(x[on["blur"]], p[on["blur"], 10, 0, 0, 0])
    mean, std = (torch.tensor(c[k], device=device)[:, None, None] for k in ("norm_mean", "norm_std"))
    return (x - mean) / std


def hed_shift(x, shift, form="od"):
    """
    Shift haematoxylin, eosin and DAB of rgb (n, 3, H, W) in [0, 1] by shift (n, 3) nats of optical density.

    "od": unmix, add, mix is one gain per channel, exp(-shift @ RGB_FROM_HED), since nothing is clipped in between.
    "openmidnight": stains below zero are cut before the shift and after it, as scikit-image's rgb2hed and their code
    do, so that downward shifts mostly vanish and the jitter darkens.
    """
    mix = RGB_FROM_HED.to(x)
    if form == "od":
        return (x * torch.exp(-shift @ mix)[:, :, None, None]).clamp(0, 1)
    assert form == "openmidnight", f"hed = {form!r}: known forms are 'od' and 'openmidnight'"
    stains = torch.einsum("nchw,cs->nshw", -x.clamp(min=1e-6).log(), torch.linalg.inv(mix)).relu()
    stains = (stains + shift[:, :, None, None]).clamp(0, UNIT)
    return torch.einsum("nshw,sc->nchw", stains, mix).neg().exp().clamp(0, 1)


def gray(x):
    return torch.einsum("nchw,c->nhw", x, GRAY.to(x))[:, None]


def brightness(x, f):
    return (x * f).clamp(0, 1)


def contrast(x, f):
    return (x * f + gray(x).mean((1, 2, 3), keepdim=True) * (1 - f)).clamp(0, 1)


def saturation(x, f):
    return (x * f + gray(x) * (1 - f)).clamp(0, 1)


def hue(x, f):
    """Turn the hue by f of a full circle, through HSV (Smith 1978); value and saturation stay."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    r, g, b = x.unbind(1)
    safe = chroma.clamp(min=1e-12)
    h = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None] + 6 * (h[:, None] + f)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, size=9):
    """Separable Gaussian of `size` taps and per-image sigma (n) in pixels, edges reflected (DINOv2's kernel size)."""
    n, C, H, W = x.shape
    if n == 0:
        return x
    t = torch.arange(size, device=x.device) - size // 2
    k = torch.softmax(-0.5 * (t / sigma[:, None]) ** 2, dim=1).repeat_interleave(C, 0)  # (n * C, size)
    x = F.pad(x.reshape(1, n * C, H, W), [size // 2] * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, k[:, None, :, None], groups=n * C), k[:, None, None, :], groups=n * C)
    return x.reshape(n, C, H, W)
