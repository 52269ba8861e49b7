"""
A picture per slide of what would be cut: the tissue's outline in green, the tiles in blue, a scale bar.

    python prepare/overlay.py --slides='data/TCGA/**/*.svs' --out=out/overlay      # out/overlay/NAME.png
"""
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.report import tissue_mm2
from prepare.slides import each, open_slide, run, slides_of

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpps = (0.5,)       # um/px of the tiles; the first that the slide is fine enough for is drawn
tile_px = 256

LONGER_SIDE = 1600  # px of a picture
BLOCK = 128         # px of the picture that are read at a time, because the only level may have 10^10 pixels


def draw_slide(path, name, config):
    """Save one overlay."""
    out = config["out"]
    part = f"{out}/.{name}.{os.getpid()}.png"
    draw(open_slide(path, config), name, config).save(part)
    os.replace(part, f"{out}/{name}.png")


def draw(slide, name, config):
    """The slide with the outline of its tissue and the tiles of its grid, above a caption."""
    mpp_xy, size = np.array(slide.mpp_xy), config["tile_px"]
    fine = [mpp for mpp in config["mpps"] if max(mpp_xy) <= mpp * wsi.MAX_ENLARGE]
    mpp = fine[0] if fine else config["mpps"][0]
    longer = max(mpp_xy * slide.dimensions)  # um
    um = max(longer / LONGER_SIDE, *mpp_xy)  # per pixel of the picture
    image = thumbnail(slide, um)
    xy, _ = slide.grid(size, mpp, config["min_tissue"], config["overlap"])
    side = slide.extent(size, mpp) * mpp_xy / um
    strength = 200 if max(side) > 30 else 110  # fainter where tiles are small: a line must not hide what it surrounds
    lines = Image.new("L", image.size)
    pen = ImageDraw.Draw(lines)
    for corner in xy * mpp_xy / um:
        (left, top), (right, bottom) = corner.round(), (corner + side).round()
        pen.rectangle((left, top, right, bottom), outline=strength)
    image.paste((20, 60, 220), mask=lines)
    image.paste((0, 140, 50), mask=outline(slide, um, image.size))
    w, h = slide.dimensions
    power = f", objective {slide.power:g}x" if slide.power > 0 else ""
    scale = f"{w} x {h} px of {slide.mpp:.4g} um ({slide.mpp_source}){power}"
    tissue = f"tissue {tissue_mm2(slide):.3g} mm2: {len(xy)} tiles of {size} px at {mpp:g} um/px"
    return caption(image, um, [name, scale, tissue])


def outline(slide, um, size):
    """The edge of the tissue mask, white on black."""
    mask, cell = slide.tissue_mask()
    cells = mask.shape[::-1]
    extent = cells * np.array(cell) * slide.mpp_xy / um
    width, height = extent.round().astype(int).tolist()
    tissue = Image.new("L", size)
    tissue.paste(Image.fromarray(mask).resize((width, height)).convert("L"))
    wider = tissue.filter(ImageFilter.MaxFilter(3))
    narrower = tissue.filter(ImageFilter.MinFilter(3))
    return ImageChops.subtract(wider, narrower)


def thumbnail(slide, um):
    """The whole slide at um/px as an image; what is damaged is orange."""
    size = np.array(slide.dimensions) * slide.mpp_xy / um
    width, height = size.round().clip(1).astype(int).tolist()
    image = Image.new("RGB", (width, height), (255, 200, 0))
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            place = np.array([x, y]) * um / slide.mpp_xy
            tiles, errors = slide.read_tiles([place.round().astype(int)], BLOCK, um)
            if not errors:
                image.paste(Image.fromarray(tiles[0]), (x, y))
    return image


def caption(image, um, texts):
    """The image above a white strip with a scale bar and lines of text; wider where the text needs it."""
    mm = scale_bar(image.width * um / 1000)
    bar = round(mm * 1000 / um)  # px
    y = image.height + 22
    font = ImageFont.load_default(22)
    longest = max(font.getlength(text) for text in texts)
    width = max(image.width, math.ceil(longest) + 24)
    height = y + 20 + 30 * len(texts)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((12, y - 4, 12 + bar - 1, y + 3), fill="black")
    pen.text((12 + bar + 10, y), f"{mm:g} mm", "black", font, "lm")
    for i, text in enumerate(texts):
        pen.text((12, y + 14 + 30 * i), text, "black", font)
    return canvas


def scale_bar(width):
    """A length in mm for a picture of that width: 1 if that is a third to a fortieth of it, else a round third."""
    if 3 <= width <= 40:
        return 1.0
    lengths = [digit * 10.0 ** power for power in range(-3, 3) for digit in (1, 2, 5)]
    fitting = [mm for mm in lengths if mm <= width / 3]
    return max(fitting, default=0.001)


def main(config):
    jobs = [(path, name, config) for path, name in slides_of(config).items()]
    drawn = []
    for (path, *_), _, error in each(draw_slide, jobs, config["workers"]):
        print(f"{path}: {error or 'drawn'}", flush=True)
        if not error:
            drawn.append(path)
    print(f"{len(drawn)} of {len(jobs)} slides drawn in {config['out']}")


if __name__ == "__main__":
    run("overlay", main, globals())
