"""
What a tile costs a core: our worker and device side against the same recipe in PIL, and what a step waits for.

    python prepare/toy.py && python bench/data.py                      # half a minute on one core
    python bench/data.py --images='/data/tiles/*.jpg' --slides='/data/TCGA/*.svs'

Every row but the last ones starts from the same JPEGs in memory and makes two global and eight local crops of each, by
train.py's keys: the same areas, probabilities and strengths everywhere, the same draws in every round.

    decode            the JPEG alone
    worker            what a data worker does, data.Batches[step]: decode, uint8 crops, colour parameters, masks
    everything        worker, then data.augment on the same core, in batches of `batch`, up to normalised float32
    ... clipped HED   the same with hed = "openmidnight", whose stains are clipped as in the next row
    PIL               OpenMidnight's chain, written out below: per crop bicubic resize, flip, HED as scikit-image does
                      it in float64, jitter, gray, blur, normalised float32. no masks, no batch
    worker, slides    worker on tiles read on the fly; each visit opens its slide and has its mask from mask_dir

A figure is the least process time of `repeats` rounds in which all rows take turns: trust the ratios.
"""
import ast
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openslide
import PIL
import torch
from PIL import Image, ImageEnhance, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import sources
import wsi
from configurator import configure

images = "data/toy/bach/ICIAR2018_BACH_Challenge/Photos/*/*.tif"  # glob; JPEGs are made of their middle
slides = "data/toy/slides/*"  # glob; "" = no reading on the fly
slide_mpp = 0.0       # um/px of every slide; 0 = as the files say
tile_px = 256
jpeg_quality = 90
tiles = 48            # a round, a multiple of batch
batch = 8             # images a batch; what augment does to so many stays in a CPU's cache
repeats = 5
step_s = 0.45         # s of a training step, which the workers should be ahead of
cores = 16            # that work on data

ROOT = Path(__file__).resolve().parent.parent
MIX = data.RGB_FROM_HED.double().numpy()
UNMIX = np.linalg.inv(MIX)


def machine():
    """One line: what the figures were measured on."""
    cpu = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (f"one core of {cpu}; torch {torch.__version__}, Pillow {PIL.__version__}, "
            f"OpenSlide {openslide.__library_version__}; commit {git.stdout.strip() or 'unknown'}")


def fastest(repeats, count, sides):
    """{name: ms of process time a tile}: the best of `repeats` rounds, in each of which every side runs once."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], (time.process_time() - start) / count * 1000)
    return best


def train_keys():
    """The keys of train.py with their defaults; it is a script and cannot be imported."""
    keys = {}
    for node in ast.parse((ROOT / "train.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):  # config = configure(globals())
            return keys
        if isinstance(node, ast.Assign):
            keys.update({target.id: ast.literal_eval(node.value) for target in node.targets})


class Memory:
    """A source of JPEGs that lie in memory."""

    def __init__(self, paths, px, count, quality):
        self.jpegs = []
        for path in (paths[i * len(paths) // count] for i in range(count)):
            with Image.open(path) as image:
                left, top = (image.width - px) // 2, (image.height - px) // 2
                tile = image.convert("RGB").crop((left, top, left + px, top + px))
            tile.save(file := io.BytesIO(), "JPEG", quality=quality)
            self.jpegs.append(file.getvalue())

    def read(self, n, attempt=0):
        return sources.decode(self.jpegs[n], f"tile {n}"), {"slide": "", "x": 0, "y": 0, "mpp": float("nan")}


# ---- the recipe in PIL and numpy ------------------------------------------------------------------------------------


def pil_views(jpeg, rng, keys):
    """The float32 (3, px, px) views of a tile, one after the other."""
    tile, norm = Image.open(io.BytesIO(jpeg)).convert("RGB"), torch.tensor(model.norm_values(keys["norm"]))
    views = [(keys["global_scale"], keys["global_px"], blur) for blur in keys["blur_prob"][:2]]
    views += [(keys["local_scale"], keys["local_px"], keys["blur_prob"][2])] * keys["local_crops"]
    return [normalise(pil_colour(pil_crop(tile, rng, scale, px), data.colour_parameters(rng, keys, blur)), norm)
            for scale, px, blur in views]


def pil_crop(tile, rng, scale, px):
    (W, H), w, h = tile.size, 0, 0
    while not (0 < w <= W and 0 < h <= H):
        area, ratio = W * H * rng.uniform(*scale), (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    left, top = rng.integers(W - w + 1), rng.integers(H - h + 1)
    crop = tile.crop((left, top, left + w, top + h)).resize((px, px), Image.BICUBIC)
    return crop.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def pil_colour(image, row):
    """HED, jitter, gray and blur by a row of data.colour_parameters, rounded to uint8 after each."""
    hed, *nats, order, b, c, s, h, gray, sigma = row.tolist()
    if hed:
        shifted = float64_hed(np.asarray(image), np.array(nats) / data.UNIT)
        image = Image.fromarray((shifted * 255).astype(np.uint8))
    jitter = (lambda x: ImageEnhance.Brightness(x).enhance(b), lambda x: ImageEnhance.Contrast(x).enhance(c),
              lambda x: ImageEnhance.Color(x).enhance(s), lambda x: turn_hue(x, h))
    for k in data.ORDERS[int(order)] if order >= 0 else ():
        image = jitter[k](image)
    image = image.convert("L").convert("RGB") if gray else image
    return image.filter(ImageFilter.GaussianBlur(sigma)) if sigma else image


def float64_hed(rgb, shift):
    """uint8 (H, W, 3) -> [0, 1] by a shift (3) in scikit-image's units: its rgb2hed, a clip, its hed2rgb."""
    stains = np.maximum((np.log(np.maximum(rgb / 255, 1e-6)) / np.log(1e-6)) @ UNMIX, 0)
    stains = np.clip(stains + shift, 0, 1)
    return np.clip(np.exp((stains * np.log(1e-6)) @ MIX), 0, 1)


def turn_hue(image, turn):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(turn * 255) % 256))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def normalise(image, norm):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return x.sub_(norm[0, :, None, None]).div_(norm[1, :, None, None])


# ---- tables ---------------------------------------------------------------------------------------------------------


def worker(source, c, keys):
    """The batches of a round, by a data worker that has just started. SlideError if it cannot read a tile."""
    dataset = data.Batches(source, keys, keys["global_px"] // 14)
    batches = [dataset[step] for step in range(c["tiles"] // c["batch"])]
    if any("global_crops" not in batch for batch in batches):
        raise wsi.SlideError(batches[0]["bad"][0])
    return batches


def everything(memory, c, keys):
    for batch in worker(memory, c, keys):
        for kind in ("global", "local"):
            data.augment(batch[f"{kind}_crops"], batch[f"{kind}_colour"], keys, "cpu")


def rows(memory, c, keys, mask_dir):
    """{name: what to time}"""
    sides = {
        "decode": lambda: [memory.read(n) for n in range(c["tiles"])],
        "worker": lambda: worker(memory, c, keys),
        "everything": lambda: everything(memory, c, keys),
        "everything, clipped HED": lambda: everything(memory, c, {**keys, "hed": "openmidnight"}),
        "PIL": lambda: [pil_views(jpeg, np.random.default_rng(n), keys) for n, jpeg in enumerate(memory.jpegs)],
    }
    for mpp in keys["mpps"] if c["slides"] else ():
        fly = {**keys, "mpps": (mpp,), "mask_dir": mask_dir, "slide_mpp": c["slide_mpp"], "open_slides": 1}
        try:
            worker(sources.Slides(c["slides"], fly), c, fly)  # the masks are made here
        except wsi.SlideError as e:
            print(f"slides at {mpp} um/px are left out: {e}")
            continue
        sides[f"worker, slides at {mpp} um/px"] = lambda f=fly: worker(sources.Slides(c["slides"], f), c, f)
    return sides


def data_wait(c, costs):
    """
    Workers run ahead of the step, so it waits only for what they do not finish while it runs: with n images of t ms on
    k cores, busy = n t / k and wait = max(0, busy - step) / max(busy, step). Not in it: the main process takes over a
    batch of 48, which costs it about 6 ms of CPU, hidden only where the device is still at work on the step before.
    """
    step, k = 1000 * c["step_s"], c["cores"]
    print(f"\na step of {step:.0f} ms, {k} cores          images x ms/tile / cores = busy ms  of a step   wait")
    for name, t in costs.items():
        for n in (48, 384):  # a GPU, a node of 8
            busy = n * t / k
            wait = max(0, busy - step) / max(busy, step)
            print(f"{name:30} {n:10} x {t:7.2f} / {k:5} = {busy:7.1f} {busy / step:10.1%} {wait:6.1%}")


if __name__ == "__main__":
    c = configure(globals())
    torch.set_num_threads(1)
    keys = {**train_keys(), "batch_size": c["batch"], "max_steps": c["tiles"] // c["batch"]}
    memory = Memory(wsi.expand(c["images"], "images"), c["tile_px"], c["tiles"], c["jpeg_quality"])
    with tempfile.TemporaryDirectory() as mask_dir:
        ms = fastest(c["repeats"], c["tiles"], rows(memory, c, keys, mask_dir))
    print(f"{machine()}; JPEGs of {c['tile_px']} px, {np.mean([len(j) for j in memory.jpegs]) / 1024:.0f} KiB\n")
    print(f"{'':30}    ms/tile  tiles/s/core  of PIL's tiles/s")
    for name, t in ms.items():
        print(f"{name:30} {t:10.2f} {1000 / t:13.0f} {ms['PIL'] / t:16.1f}x")
    data_wait(c, {name: t for name, t in ms.items() if name.startswith("worker")})
