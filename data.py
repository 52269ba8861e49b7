"""
Batches: the order of samples, crops, masks and colour. sources.py says where tiles come from.

Order. With a global batch of B, sample n of a run is image n % B of step n // B, on whichever rank holds that image.
Its tile, crops and colours depend on (seed, n) alone. A batch is therefore a pure function of (seed, step, rank,
world), and the position of a run is one number: the samples consumed so far. Each operation has random numbers of its
own, by its name, so a new augmentation that is off leaves every bit of a run as it was.

Cost. Few cores have to feed a GPU. A worker therefore only decodes tiles, cuts crops as uint8 and draws the parameters
of colour and blur; `augment` applies them to whole batches on the training device. Both together take about 2 ms per
tile on one core (bench/data.py). Reading from a slide takes 1-18 ms more, and the first tile of a slide needs its
tissue mask: about 1 s for a large slide, or 2 ms from `mask_dir`.
"""
import atexit
import functools
import hashlib
import multiprocessing
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate, get_worker_info

import model
import sources
import wsi

ATTEMPTS = 100  # tiles to draw for one sample before the run stops

# keys that are shares of 1, as all that end in _prob: a percentage would train something else in silence
SHARES = ("global_scale", "local_scale", "mask_ratio", "drop_path", "tissue_share", "eval_share", "holdout", "betas",
          "momentum", "momentum_end")
COUNTS = ("batch_size", "log_interval", "tile_px", "tiles_per_visit", "open_slides", "dino_hidden", "dino_bottleneck",
          "dino_prototypes", "ibot_hidden", "ibot_bottleneck", "ibot_prototypes")  # 1 or more


def check(config):
    """ValueError for keys of train.py that would fail late, or train something else in silence."""
    for key, count in dict(betas=2, jitter=4, blur_prob=3, global_scale=2, local_scale=2, mask_ratio=2).items():
        if len(config[key]) != count:
            raise ValueError(f"{key} = {config[key]}: give {count} numbers")
    for key in ("mpps", "mpp_range", "wide_field"):
        if not all(type(value) in (int, float) and value > 0 for value in config[key]):
            raise ValueError(f"{key} = {config[key]}: give numbers above 0")
    if not (config["mpps"] or config["mpp_range"]):
        raise ValueError("mpps = (): give um/px, such as (0.5, 1.0), or mpp_range")
    for key in ("global_scale", "local_scale", "mask_ratio", "mpp_range", "wide_field"):
        pair = config[key]
        if pair and (len(pair) != 2 or pair[0] > pair[1]):
            raise ValueError(f"{key} = {pair}: give two numbers, the smaller one first")
    for key, value in config.items():
        least = 1 if key in COUNTS else 0  # a negative clip_grad would climb the loss
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"{key} = {value}: give {least} or more")
    for key in ("student_temp", "teacher_temp", "teacher_temp_start", "layer_decay"):
        if not config[key] > 0:
            raise ValueError(f"{key} = {config[key]}: give a number above 0")
    for key in (*SHARES, *(key for key in config if key.endswith("_prob"))):
        values = config[key] if isinstance(config[key], tuple) else (config[key],)
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{key} = {config[key]}: give shares from 0 to 1")
    if config["wide_field"] and config["wide_field"][0] < 1:
        raise ValueError(f"wide_field = {config['wide_field']}: give factors of the field, 1 or more")
    crops = 2 * config["batch_size"]
    if int(crops * config["mask_prob"]) < 1:
        raise ValueError(f"mask_prob = {config['mask_prob']} of {crops} crops masks none, and iBOT needs some")


# ---- batches, in the worker -----------------------------------------------------------------------------------------


def sample_numbers(step, rank, world, batch, offset=0):
    """The numbers of the `batch` samples of one rank at one step."""
    first = offset + (step * world + rank) * batch
    return range(first, first + batch)


class Batches(torch.utils.data.Dataset):
    """
    dataset[step] is the batch of one rank: B images, L local crops per image, N patches per global crop. It is
    crop-major: the first view of every image, then the second view of every image, and so on.

        global_crops   uint8 (2B, 3, S, S)
        local_crops    uint8 (L*B, 3, s, s); absent if L is 0
        global_colour  {name: (2B, ...)}, the parameters of these crops for `augment`; local_colour likewise
        masks          bool (2B, N), the patches that iBOT hides from the student
        masked         int64 (M), the indices of the masked patches among all 2B * N
        mask_weights   float32 (M), one over the number of masked patches in the same crop
        bad            messages about unreadable tiles, which were replaced; nothing else if one could not be replaced
        left_out       messages about slides that turned out to be of no use when they were first drawn

    config: train.py's keys. grid: patches along the side of a global crop. offset: samples consumed minus step x
    current global batch; nonzero only after resuming with other ranks or another batch.
    """

    def __init__(self, source, config, grid, rank=0, world=1, offset=0):
        self.source = source
        self.config = config
        self.grid = grid
        self.rank = rank
        self.world = world
        self.offset = offset

    def __getitem__(self, step):
        if get_worker_info():
            torch.set_num_threads(1)
        config = self.config
        batch = {"bad": [], "left_out": []}
        numbers = sample_numbers(step, self.rank, self.world, config["batch_size"], self.offset)
        images = {n: self.image(n, batch) for n in numbers}
        if None in images.values():
            return batch
        for kind, views in ("global", range(2)), ("local", range(2, 2 + config["local_crops"])):
            rows = [(n, view) for view in views for n in numbers]  # crop-major
            if rows:
                draw = functools.partial(self.draw, rows)
                blur = torch.tensor([config["blur_prob"][min(view, 2)] for _, view in rows])
                batch[f"{kind}_crops"] = default_collate([images[n][view] for n, view in rows])
                batch[f"{kind}_colour"] = colour_parameters(draw, config, blur)
        rng = np.random.default_rng((config["seed"], step, self.rank, 1))
        masks = block_masks(rng, 2 * len(images), self.grid, config["mask_prob"], config["mask_ratio"])
        batch["masks"] = masks = torch.from_numpy(masks)
        batch["masked"] = masks.flatten().nonzero()[:, 0]
        counts = masks.sum(1)
        batch["mask_weights"] = (1 / counts).repeat_interleave(counts)
        return batch

    def image(self, n, batch):
        """The crops of sample n: the two global ones, then the local ones. None if no tile was found."""
        config = self.config
        tile, about = self.tile(n, batch)
        if tile is None:
            return None
        pixels = as_tensor(tile)
        tiles = [pixels] * (2 + config["local_crops"])  # that views are cut from
        if "wide" in about:  # wide_field: the second global crop is cut from more of the slide
            tiles[1] = as_tensor(about["wide"])
        crops = []
        draws = self.draw([(n, view) for view in range(len(tiles))], "crop", CROP_DRAWS)
        for view, own in enumerate(draws.tolist()):
            kind = "global" if view < 2 else "local"
            scale, px = config[f"{kind}_scale"], config[f"{kind}_px"]
            crops.append(crop_and_flip(tiles[view], iter(own), scale, px))
        return crops

    def draw(self, crops, name, count):
        """
        float32 (crops, count): the uniform numbers in [0, 1) of operation `name` for crops (sample, view). They are a
        hash of seed, crop and name, so no other crop or operation changes them. It takes 1 us per crop; making a numpy
        generator takes 9.
        """
        stream = b""
        for crop in crops:
            key = str((self.config["seed"], crop, name)).encode()
            stream += hashlib.shake_128(key).digest(4 * count)
        bits = np.frombuffer(stream, "<u4").reshape(-1, count) >> 8  # 24 are exact in float32, and never round to 1
        return torch.from_numpy(bits / 2**24).float()

    def tile(self, n, batch):
        """What the source reads for sample n; (None, {}) after ATTEMPTS draws. The batch holds why others failed."""
        for attempt in range(ATTEMPTS):
            try:
                return self.source.read(n, attempt)
            except sources.READ_ERRORS as e:
                reason = " ".join(str(e).split())
                if isinstance(e, wsi.Unusable):
                    batch["left_out"].append(reason)
                elif not isinstance(e, sources.Unsuitable):
                    batch["bad"].append(reason)
        batch["bad"].append(reason)
        return None, {}


def as_tensor(tile):
    """uint8 (H, W, 3) -> (1, 3, H, W) in channels-last memory, which is resized fastest."""
    return torch.from_numpy(np.ascontiguousarray(tile)).permute(2, 0, 1)[None]


def loader(dataset, steps, workers, dev):
    """A DataLoader of dataset[step] for each of `steps`, in order, read ahead by `workers` processes."""
    atexit.register(end_workers)
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=steps, num_workers=workers, pin_memory=dev == "cuda",
        multiprocessing_context="fork" if workers else None, worker_init_fn=ignore_signals)


def end_workers():
    """At the end of a run that stops: workers ignore Python's SIGTERM. A run's last line is its own reason."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that a worker was killed
    for process in multiprocessing.active_children():
        process.kill()


def ignore_signals(worker):
    """Signals to all processes of a job must not end the workers before the step and the save are done."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # a terminal sends Ctrl-C to workers, too
        signal.signal(number, signal.SIG_IGN)


# ---- crops, colours and masks, in the worker ------------------------------------------------------------------------


CROP_DRAWS = 2 * 10 + 3  # ten tries of area and aspect ratio, place, flip


def crop_and_flip(pixels, draws, scale, px):
    """
    uint8 (1, 3, H, W) -> (3, px, px): random area and aspect ratio, antialiased bicubic, flipped with p = 0.5.
    draws: an iterator of CROP_DRAWS uniform numbers.
    """
    H, W = pixels.shape[2:]
    low, high = scale
    for _ in range(10):
        area = H * W * (low + (high - low) * next(draws))
        ratio = (4 / 3) ** (2 * next(draws) - 1)  # log-uniform from 3/4 to 4/3
        h = round((area / ratio) ** 0.5)
        w = round((area * ratio) ** 0.5)
        if 0 < h <= H and 0 < w <= W:
            break
    else:  # a very long tile: the largest crop of an allowed aspect
        h = min(H, round(W * 4 / 3))
        w = min(W, round(H * 4 / 3))
    top = int(next(draws) * (H - h + 1))
    left = int(next(draws) * (W - w + 1))
    crop = pixels[:, :, top : top + h, left : left + w]
    crop = F.interpolate(crop, (px, px), mode="bicubic", antialias=True)[0]
    if next(draws) < 0.5:
        crop = crop.flip(-1)
    return crop.contiguous()


def colour_parameters(draw, config, blur_prob):
    """
    The random colours of crops, as tensors with a row per crop; `augment` takes them. draw(name, count) returns
    (crops, count) uniform numbers. Each operation draws once, by a name of its own.

    hed and gray say whether the crop gets them. hed_shift (3) is in nats of optical density. order (4) lists the
    jitters as they follow each other, or -1 for none: 0 brightness, 1 contrast, 2 saturation, 3 hue. jitter (4) holds
    three factors, and the hue as a share of the circle. blur is a sigma in pixels, or 0 for none: blur_prob is the
    share of crops that are blurred, of all or of each.
    """
    hed = draw("hed", 4)
    jitter = draw("jitter", 9)
    blur = draw("blur", 2)
    order = jitter[:, 5:].argsort(1)
    order[jitter[:, 0] >= config["jitter_prob"]] = -1
    factors = torch.tensor([1, 1, 1, 0]) + (2 * jitter[:, 1:5] - 1) * torch.tensor(config["jitter"])
    sigma = 0.1 + 1.9 * blur[:, 1]
    return {
        "hed": hed[:, 0] < config["hed_prob"],
        "hed_shift": (2 * hed[:, 1:] - 1) * config["hed_nats"],
        "order": order,
        "jitter": factors,
        "gray": draw("gray", 1)[:, 0] < config["gray_prob"],
        "blur": torch.where(blur[:, 0] < blur_prob, sigma, 0),
    }


def block_masks(rng, crops, grid, prob, ratio):
    """
    bool (crops, grid*grid): the masks of a batch. A random permutation decides which crop gets which of `mask_counts`.
    A mask consists of BEiT's blocks, which are rectangles of at least 4 patches with an aspect of 0.3 to 3.3. Single
    patches are added at random until the count is exact.
    """
    masks = np.zeros((crops, grid, grid), bool)
    for crop, count in zip(rng.permutation(crops), mask_counts(crops, grid, prob, ratio)):
        add_blocks(rng, masks[crop], count)
    return masks.reshape(crops, -1)


def mask_counts(crops, grid, prob, ratio):
    """
    The number of masked patches in each of the int(crops * prob) masked crops, as in DINOv3. Their shares of patches
    rise evenly from ratio[0], which is excluded, to ratio[1]. The sum is a constant of the batch, so shapes are static
    on every rank.
    """
    shares = np.linspace(*ratio, int(crops * prob) + 1)[1:]
    return [max(int(grid * grid * share), 1) for share in shares]


def add_blocks(rng, mask, count):
    """Set exactly `count` cells of mask (grid, grid), in place."""
    left = count
    while left > 0:
        block = draw_block(rng, mask, min(left, mask.size // 2))
        if block is None:
            break
        mask[block] = True
        left = count - mask.sum()
    free = np.flatnonzero(~mask)
    np.put(mask, rng.permutation(free)[:left], True)
    assert mask.sum() == count, (mask.sum(), count)


def draw_block(rng, mask, most):
    """The (rows, columns) of a rectangle that adds 1 to `most` cells to the mask, or None after ten tries."""
    grid = len(mask)
    for _ in range(10):
        area = rng.uniform(min(4, most), most)
        aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        h = round((area * aspect) ** 0.5)
        w = round((area / aspect) ** 0.5)
        if 0 < h < grid and 0 < w < grid:
            top = rng.integers(grid - h + 1)
            left = rng.integers(grid - w + 1)
            block = slice(top, top + h), slice(left, left + w)
            if 0 < h * w - mask[block].sum() <= most:
                return block
    return None


# ---- colour, blur and normalisation of a batch, on the device -------------------------------------------------------
# the order of operations is OpenMidnight's: HED, jitter, gray, blur, normalise. on a CPU they are bound by
# memory, so they work in place on tensors that they have made themselves.

RGB_FROM_HED = torch.tensor([  # Ruifrok 2001: optical density of red, green and blue per stain
    [0.65, 0.70, 0.29],
    [0.07, 0.99, 0.11],
    [0.27, 0.57, 0.78]])
GRAY = (0.2989, 0.587, 0.114)
UNIT = 13.815510557964274  # -log(1e-6): nats of optical density in one stain unit of scikit-image


def augment(crops, colour, config, device):
    """uint8 (n, 3, S, S) and their `colour_parameters`, both on the CPU -> normalised float32 on `device`."""
    x = crops.to(device, non_blocking=True).float().div_(255)
    stain = functools.partial(hed_shift, form=config["hed"])
    change(x, colour["hed"], stain, colour["hed_shift"])
    for turn in range(4):
        for k, jitter in enumerate((brightness, contrast, saturation, hue)):
            factor = colour["jitter"][:, k, None, None, None]
            change(x, colour["order"][:, turn] == k, jitter, factor)
    change(x, colour["gray"], gray)
    change(x, colour["blur"], gaussian_blur, colour["blur"])
    mean, std = torch.tensor(model.norm_values(config["norm"])).to(device, non_blocking=True)
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


def change(x, on, operation, *parameters):
    """
    Apply an operation to the images of x (n, 3, H, W) that are `on`, in place. Parameters have a row per image. They
    and `on` are on the CPU, where indices are found: on a GPU, nonzero would wait for the device.
    """
    i = on.nonzero()[:, 0]
    chosen = [values[i].to(x.device, non_blocking=True) for values in parameters]
    i = i.to(x.device, non_blocking=True)
    images = x.index_select(0, i)  # copies whole images; x[i] is 6 times slower on a CPU
    x[i] = operation(images, *chosen)


def hed_shift(x, shift, form="od"):
    """
    Shift haematoxylin, eosin and DAB of rgb (n, 3, H, W) in [0, 1] by shift (n, 3) nats of optical density.

    "od": unmix, add, mix. Nothing is clipped in between, so this is one gain per channel: exp(-shift @ RGB_FROM_HED).
    "openmidnight": stains below zero become zero before the shift and after it, as in scikit-image's rgb2hed. Most
    downward shifts then have no effect, and the operation mostly darkens.
    """
    mix = RGB_FROM_HED.to(x, non_blocking=True)
    if form == "od":
        gain = torch.exp(-shift @ mix)
        return (x * gain[:, :, None, None]).clamp_(0, 1)
    assert form == "openmidnight", form
    unmix = torch.linalg.inv(RGB_FROM_HED)  # on the CPU: on CUDA `inv` synchronises to check for singularity
    density = x.flatten(2).clamp(min=1e-6).log_().neg_()  # (n, 3, H*W)
    stains = unmix.to(x, non_blocking=True).T @ density  # einsum is 3 times slower
    stains.relu_().add_(shift[:, :, None]).clamp_(0, UNIT)
    return (-mix.T @ stains).exp_().clamp_(0, 1).view_as(x)


def gray(x):
    red, green, blue = x.split(1, 1)
    r, g, b = GRAY
    return (red * r).add_(green, alpha=g).add_(blue, alpha=b)


def brightness(x, f):
    return (x * f).clamp_(0, 1)


def contrast(x, f):
    weights = torch.tensor(GRAY).to(x, non_blocking=True)
    mean = (x.mean((2, 3)) * weights).sum(1)[:, None, None, None]  # of the gray image
    return (x * f).add_(mean * (1 - f)).clamp_(0, 1)


def saturation(x, f):
    return torch.lerp(gray(x), x, f).clamp_(0, 1)


def hue(x, f):
    """Turn the hue by f of a full circle, through HSV (Smith 1978); value and saturation stay the same."""
    r, g, b = x.split(1, 1)
    value = x.amax(1, True)
    chroma = value - x.amin(1, True)
    near_green = (b - r).add_(chroma, alpha=2)
    near_blue = (r - g).add_(chroma, alpha=4)
    h = torch.where(value == g, near_green, near_blue)
    h = torch.where(value == r, g - b, h)
    h = h.div_(chroma.clamp(min=1e-12)).add_(6 * f)  # in sixths of the circle: red 0, green 2, blue 4
    h.sub_((h / 6).floor_(), alpha=6)
    red = (h - 3).abs_().mul_(-1).add_(2)  # how far a channel lies below the value, as a share of the chroma
    green = (h - 2).abs_().sub_(1)
    blue = (h - 4).abs_().sub_(1)
    below = torch.cat([red, green, blue], 1).clamp_(0, 1)
    return torch.addcmul(value, below, chroma, value=-1)


def gaussian_blur(x, sigma, size=9):
    """Separable Gaussian with `size` taps, DINOv2's kernel size. sigma (n) is in pixels; edges are reflected."""
    n, C, H, W = x.shape
    if n == 0:
        return x
    t = torch.arange(size, device=x.device) - size // 2
    kernel = torch.softmax(-0.5 * (t / sigma[:, None]) ** 2, dim=1)
    kernel = kernel.repeat_interleave(C, 0)  # (n * C, size)
    x = x.reshape(1, n * C, H, W)
    x = F.pad(x, [size // 2] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * C)
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * C)
    return x.reshape(n, C, H, W)
