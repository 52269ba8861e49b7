"""
What a tile costs one core: our worker and device side against the same recipe in PIL.

    python prepare/toy.py && python bench/data.py                      # half a minute
    python bench/data.py --images='/data/tiles/*.jpg' --slides='/data/TCGA/*.svs'

All rows except the last start from the same JPEGs in memory and make the crops that train.py's keys ask for.

    decode            the JPEG alone
    worker            what a data worker does, data.Batches[step]: decode, uint8 crops, colour parameters, masks
    everything        worker, then data.augment on the same core, to normalised float32
    ... clipped HED   the same with hed = "openmidnight", whose stains are clipped as in the next row
    PIL               OpenMidnight's chain, written out below, per crop: bicubic resize, flip, HED as scikit-image does
                      it in float64, jitter, gray, blur, normalised float32; no masks, no batch
    worker, slides    worker on tiles read from slides; each visit opens its slide and finds its mask in mask_dir

A figure is the smallest process time over `repeats` rounds in which all rows take turns: trust the ratios.
"""
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import model
import sources
import wsi
from configurator import configure
from prepare.stats import train_keys

images = "data/toy/bach/ICIAR2018_BACH_Challenge/Photos/*/*.tif"  # glob; JPEGs are made of their top-left corners
slides = "data/toy/slides/*"  # glob; "" = none
tile_px = 256
tiles = 48            # per round, a multiple of batch
batch = 8             # images per batch; augment of so many stays in a CPU's cache
repeats = 5

MIX = data.RGB_FROM_HED.double().numpy()


class Memory:
    """A source of JPEGs in memory."""

    def __init__(self, paths, px, count):
        self.jpegs = []
        for i in range(count):
            file = io.BytesIO()
            tile = Image.open(paths[i * len(paths) // count]).convert("RGB").crop((0, 0, px, px))
            tile.save(file, "JPEG", quality=90)
            self.jpegs.append(file.getvalue())

    def read(self, n, attempt=0):
        return sources.decode(self.jpegs[n], f"tile {n}"), {}


# ---- the recipe in PIL and numpy ------------------------------------------------------------------------------------


def pil_views(jpeg, rng, keys):
    """The float32 (3, px, px) views of a tile, one after the other."""
    tile, norm = Image.open(io.BytesIO(jpeg)).convert("RGB"), torch.tensor(model.norm_values(keys["norm"]))
    first, second, local = keys["blur_prob"]
    for kind, blur in [("global", first), ("global", second)] + [("local", local)] * keys["local_crops"]:
        crop = pil_crop(tile, rng, keys[f"{kind}_scale"], keys[f"{kind}_px"])
        yield normalise(pil_colour(crop, data.colour_parameters(rng, keys, blur)), norm)


def pil_crop(tile, rng, scale, px):
    (W, H), w, h = tile.size, 0, 0
    while not (0 < w <= W and 0 < h <= H):
        area, ratio = W * H * rng.uniform(*scale), (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    left, top = rng.integers(W - w + 1), rng.integers(H - h + 1)
    crop = tile.crop((left, top, left + w, top + h)).resize((px, px), Image.BICUBIC)
    return crop.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def pil_colour(image, draw):
    """HED, jitter, gray and blur by a draw of data.colour_parameters, rounded to uint8 after each."""
    if draw["hed"]:
        shifted = float64_hed(np.asarray(image), draw["hed_shift"].numpy() / data.UNIT)
        image = Image.fromarray((shifted * 255).astype(np.uint8))
    for k in draw["order"].tolist():
        factor = draw["jitter"][k].item()
        if k == 3:
            image = turn_hue(image, factor)
        elif k >= 0:
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k](image).enhance(factor)
    image = image.convert("L").convert("RGB") if draw["gray"] else image
    return image.filter(ImageFilter.GaussianBlur(draw["blur"].item())) if draw["blur"] else image


def float64_hed(rgb, shift):
    """uint8 (H, W, 3) -> [0, 1] by a shift (3) in scikit-image's units: its rgb2hed, a clip, its hed2rgb."""
    stains = np.maximum((np.log(np.maximum(rgb / 255, 1e-6)) / np.log(1e-6)) @ np.linalg.inv(MIX), 0)
    stains = np.clip(stains + shift, 0, 1)
    return np.clip(np.exp((stains * np.log(1e-6)) @ MIX), 0, 1)


def turn_hue(image, turn):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(turn * 255) % 256))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def normalise(image, norm):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return x.sub_(norm[0, :, None, None]).div_(norm[1, :, None, None])


# ---- the table ------------------------------------------------------------------------------------------------------


def worker(source, keys):
    """The batches of a round, made by a data worker that has just started."""
    dataset = data.Batches(source, keys, keys["global_px"] // 14)
    batches = [dataset[step] for step in range(tiles // batch)]
    if "masks" not in batches[0]:
        raise wsi.SlideError(batches[0]["bad"][0])
    return batches


def everything(source, keys):
    for made in worker(source, keys):
        for kind in ("global", "local"):
            data.augment(made[f"{kind}_crops"], made[f"{kind}_colour"], keys, "cpu")


def from_slides(keys):
    worker(sources.Slides(slides, keys), keys)


if __name__ == "__main__":
    configure(globals())
    torch.set_num_threads(1)
    keys = train_keys() | {"batch_size": batch}
    memory = Memory(wsi.expand(images, "images"), tile_px, tiles)
    rows = {
        "decode": lambda: [memory.read(n) for n in range(tiles)],
        "worker": lambda: worker(memory, keys),
        "everything": lambda: everything(memory, keys),
        "everything, clipped HED": lambda: everything(memory, keys | {"hed": "openmidnight"}),
        "PIL": lambda: [list(pil_views(jpeg, np.random.default_rng(0), keys)) for jpeg in memory.jpegs]}
    with tempfile.TemporaryDirectory() as mask_dir:
        for mpp in keys["mpps"] if slides else ():
            fly = keys | {"mpps": (mpp,), "mask_dir": mask_dir, "open_slides": 1}
            try:
                from_slides(fly)  # the masks are made here
            except wsi.SlideError as e:
                print(f"slides at {mpp} um/px are left out: {e}")
                continue
            rows[f"worker, slides at {mpp} um/px"] = lambda keys=fly: from_slides(keys)
        best = dict.fromkeys(rows, float("inf"))
        for _ in range(repeats):
            for name, run in rows.items():
                start = time.process_time()
                run()
                best[name] = min(best[name], (time.process_time() - start) / tiles * 1000)
    print(f"one core; torch {torch.__version__}\n\n{'':30}    ms/tile  tiles/s/core  of PIL's tiles/s")
    for name, ms in best.items():
        print(f"{name:30} {ms:10.2f} {1000 / ms:13.0f} {best['PIL'] / ms:16.1f}x")
