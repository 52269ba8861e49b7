"""
Batches: crops, masks and colour, and the order in which samples come. Where tiles come from: sources.py.

Order. With a global batch of B, sample n of a run is image n % B of step n // B, on whatever rank that falls; what it
is depends only on (seed, n). So a batch is a pure function of (seed, step, rank, world), the position of a run is one
number, the samples taken so far, and a resume with other ranks or another batch goes on behind it: every index of a
list or folder comes exactly once a pass, over all ranks and workers.

Before training, with train.py's keys and config files (prepare/compare.py):

    python data.py --task=stats config/vitg.py --samples=10000                      # mean and std, to paste as `norm`
    python data.py --task=compare --a=config/vitg.py --b='config/vitg.py --exact_reads=false' --out=out/compare

Work is split so that few cores feed a GPU: a worker decodes a tile and cuts its crops as uint8; colour, blur and
normalisation run as batched tensor operations on the training device (`augment`), with parameters drawn by the
worker: 2 ms a tile in all (bench/data.py). Reading from slides costs 1-18 ms more and, where the slide is not open
already, its tissue mask: about 1 s for a large slide, shared by the `tiles_per_visit` samples drawn from it, or 2 ms
from `mask_dir`.
"""
import ast
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model
import sources
from sources import READ_ERRORS

ATTEMPTS = 100  # draws for one sample before its source is given up

# ---- crops and masks, in the worker ---------------------------------------------------------------------------------


def sample_numbers(step, rank, world, batch, offset=0):
    """The numbers of the `batch` samples of this rank at this step, `offset` further on than from the start."""
    first = offset + (step * world + rank) * batch
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
    not be replaced. `c` holds train.py's keys, `grid` the patches along a global crop's side, `offset` the samples
    taken so far less what as many steps would take now: 0 unless a resume has changed the ranks or the batch.
    """

    def __init__(self, source, c, grid, rank=0, world=1, offset=0):
        self.source, self.c, self.grid, self.rank, self.world, self.offset = source, c, grid, rank, world, offset

    def __getitem__(self, step):
        if torch.utils.data.get_worker_info():
            torch.set_num_threads(1)
        c, bad = self.c, []
        numbers = sample_numbers(step, self.rank, self.world, c["batch_size"], self.offset)
        images = [self.image(n, bad) for n in numbers]
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
                tile, _ = self.source.read(n, attempt)
                break
            except sources.Unsuitable as e:
                reason = str(e)
            except READ_ERRORS as e:
                reason = " ".join(str(e).split())
                bad.append(reason)
        if tile is None:
            bad.append(reason)
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
        area = H * W * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = (4 / 3) ** (2 * rng.random() - 1)  # log-uniform from 3/4 to 4/3
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
    hed, jitter, gray, blur, *j = rng.random(8).tolist()  # one call: ten rows a tile are a tenth of the worker's time
    order = rng.integers(len(ORDERS)) if jitter < c["jitter_prob"] else -1
    sigma, *shift = rng.random(4).tolist()
    row = [hed < c["hed_prob"], *((2 * u - 1) * c["hed_nats"] for u in shift), order]
    row += [centre + (2 * u - 1) * width for centre, u, width in zip((1, 1, 1, 0), j, c["jitter"])]
    row += [gray < c["gray_prob"], 0.1 + 1.9 * sigma if blur < blur_prob else 0]
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
    x = crops.to(device, non_blocking=True).float().div_(255)
    p, on = colour.to(device, non_blocking=True), {}
    for name, column in (("hed", 0), ("gray", 9), ("blur", 10)):  # indices are found on the CPU: no device sync
        on[name] = colour[:, column].nonzero()[:, 0].to(device, non_blocking=True)
    change(x, on["hed"], hed_shift, p[on["hed"], 1:4], c["hed"])
    for turn in range(4):
        operation = torch.where(colour[:, 4] >= 0, ORDERS[colour[:, 4].long(), turn], -1)
        for k, jitter in enumerate((brightness, contrast, saturation, hue)):
            i = (operation == k).nonzero()[:, 0].to(device, non_blocking=True)
            change(x, i, jitter, p[i, 5 + k, None, None, None])
    change(x, on["gray"], gray)
    change(x, on["blur"], gaussian_blur, p[on["blur"], 10])
    mean, std = (torch.tensor(v).to(device, non_blocking=True)[:, None, None] for v in model.norm_values(c["norm"]))
    return x.sub_(mean).div_(std)


def change(x, i, operation, *parameters):
    """x[i] = operation(x[i], ...), in place. index_select copies whole images; x[i] is 6 x slower on a CPU."""
    x[i] = operation(x.index_select(0, i), *parameters)


def hed_shift(x, shift, form="od"):
    """
    Shift haematoxylin, eosin and DAB of rgb (n, 3, H, W) in [0, 1] by shift (n, 3) nats of optical density.

    "od": unmix, add, mix is one gain per channel, exp(-shift @ RGB_FROM_HED), since nothing is clipped in between.
    "openmidnight": stains below zero are cut before the shift and after it, as scikit-image's rgb2hed and their code
    do, so that downward shifts mostly vanish and the jitter darkens.
    """
    mix = RGB_FROM_HED.to(x, non_blocking=True)
    if form == "od":
        return (x * torch.exp(-shift @ mix)[:, :, None, None]).clamp_(0, 1)
    assert form == "openmidnight", f"hed = {form!r}: known forms are 'od' and 'openmidnight'"
    unmix = torch.linalg.inv(RGB_FROM_HED).to(x, non_blocking=True)  # inverted here: a GPU would wait for its verdict
    stains = unmix.T @ x.flatten(2).clamp(min=1e-6).log_().neg_()  # (n, 3, H*W); einsum is 3 x slower
    stains.relu_().add_(shift[:, :, None]).clamp_(0, UNIT)
    return (-mix.T @ stains).exp_().clamp_(0, 1).view_as(x)


# elementwise work on a CPU is bound by memory: in-place operations on tensors made here, and few of them


def gray(x):
    r, g, b = GRAY.tolist()
    return (x[:, :1] * r).add_(x[:, 1:2], alpha=g).add_(x[:, 2:], alpha=b)


def brightness(x, f):
    return (x * f).clamp_(0, 1)


def contrast(x, f):
    mean = (x.mean((2, 3)) * GRAY.to(x, non_blocking=True)).sum(1)[:, None, None, None]  # of the gray image
    return (x * f).add_(mean * (1 - f)).clamp_(0, 1)


def saturation(x, f):
    return torch.lerp(gray(x), x, f).clamp_(0, 1)


def hue(x, f):
    """Turn the hue by f of a full circle, through HSV (Smith 1978); value and saturation stay."""
    r, g, b = x.split(1, 1)
    value = x.amax(1, True)
    chroma = value - x.amin(1, True)
    h = torch.where(value == r, g - b,
                    torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4)))
    h = h.div_(chroma.clamp(min=1e-12)).add_(6 * f)  # in sixths of the circle: red 0, green 2, blue 4
    h.sub_((h / 6).floor_(), alpha=6)
    shares = (h - 3).abs_().mul_(-1).add_(2), (h - 2).abs_().sub_(1), (h - 4).abs_().sub_(1)  # below value, of chroma
    return torch.cat([torch.addcmul(value, share.clamp_(0, 1), chroma, value=-1) for share in shares], 1)


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


# ---- python data.py --task=... --------------------------------------------------------------------------------------


def train_keys():
    """train.py's keys and their defaults, read from its source: importing it would train."""
    text = Path(__file__).with_name("train.py").read_text().partition("\nconfig = configure(")[0]
    pairs = [(a.targets[0].id, a.value) for a in ast.parse(text).body if isinstance(a, ast.Assign)]
    return {name: ast.literal_eval(value) for name, value in pairs}


if __name__ == "__main__":
    from configurator import configure
    from prepare import compare

    task = ""       # "stats" of one source, or "compare" of two; both take train.py's keys and config files
    samples = 2000  # tiles, of each
    out = ""        # folder for compare's table and picture
    a = b = ""      # of compare: two command lines of train.py, such as --a="config/toy.py --exact_reads=false"
    own = {"task": task, "samples": samples, "out": out, "a": a, "b": b}
    config = configure(train_keys() | own)
    try:
        if config["task"] == "stats":
            compare.stats(config)
        elif config["task"] == "compare" and config["a"] and config["b"] and config["out"]:
            for side in "ab":
                print(f"--{side}={config[side]}")
                common = {key: config[key] for key in train_keys()}
                config[side] = configure(common, shlex.split(config[side]))
            compare.compare(config)
        else:
            raise ValueError("--task=stats --slides=... (or another source), or --task=compare --a= --b= --out=")
    except (ValueError, OSError) as e:
        raise SystemExit(f"data.py: {e}") from None
