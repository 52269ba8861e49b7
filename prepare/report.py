"""
What a person wants to know of slides before using them: their scale and defects, and what would be cut from them.

    python wsi.py --task=report --slides='data/TCGA/**/*.svs' --out=out/report    report.csv, one row a slide; a summary
    python wsi.py --task=overlay --slides='data/TCGA/**/*.svs' --out=out/overlay  <name>.png: tissue, tiles, scale bar

A slide that cannot be read, or that takes its process down with it, has its row in the report all the same, with as
much as could be learnt and the reason.
"""
import csv
import math
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import openslide
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

import wsi

SURVEY_UM = 32.0   # um a cell of the thumbnail in which scan defects are looked for; a pen's line is 100 um or more
BLUR_UM = 2.0      # um/px at which a slide's sharpness is measured
BLURRED = 50       # sharpness below which it is called blurred, as in hs2p. of three real slides, at 1100 to 5800, a
                   # Gaussian of sigma 2 um leaves 50 to 160, one of 5 um 4 to 8
OVERLAY_PX = 1600  # longer side of an overlay's picture
SCANNER_KEYS = ("aperio.ScanScope ID", "hamamatsu.Product", "leica.device-model", "tiff.Model")
DIED = "the process that read it died (out of memory?); try this slide alone"


def each_slide(function, c):
    """Yields (function(job), job) for the jobs (path, name, c) of the slides that c names, in their order.

    The result is None where the process died. Each thread drives a pool of one process, since a pool that loses a
    process loses all that it holds: a crash costs one slide.
    """
    paths, own = wsi.expand(c["slides"], "slides"), threading.local()
    names = wsi.slide_names(paths, c["names"])
    jobs = [(path, names[path], c) for path in paths]
    os.makedirs(c["out"], exist_ok=True)

    def run(job):
        if not hasattr(own, "pool"):
            own.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            return own.pool.submit(function, job).result()
        except BrokenProcessPool:
            del own.pool

    with ThreadPoolExecutor(max(c["workers"], 1)) as threads:
        results = tqdm(threads.map(run, jobs), c["task"], len(jobs), unit="slide")
        yield from zip(results, jobs)


def one_line(error, path):
    text = " ".join(str(error).split()).removeprefix(f"{path}: ")
    return text if isinstance(error, wsi.SlideError) else f"{type(error).__name__}: {text}"


def sharpness(tile):
    """Variance of a 3 x 3 Laplacian in grey levels; it depends on um/px and on the tissue: compare like with like."""
    gray = np.asarray(Image.fromarray(tile).convert("L"), np.float32)
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float((around - 4 * gray[1:-1, 1:-1]).var())


def tissue_mm2(slide):
    mask, cell = slide.tissue_mask()
    return float(mask.sum() * np.prod(cell) * np.prod(slide.mpp_xy) / 1e6)


# ---- report: one row a slide ----------------------------------------------------------------------------------------


def report(c):
    """Writes report.csv into c["out"], rows in the order of the paths, and prints a summary. Returns the rows."""
    rows, file = [], os.path.join(c["out"], "report.csv")
    try:
        for row, job in each_slide(slide_row, c):
            rows.append(row or new_row(job) | {"error": DIED})
            if len(rows) % 100 == 0:
                write_csv(file, rows)
    finally:
        write_csv(file, rows)
    print_summary(rows, [f"tiles_{mpp:g}" for mpp in c["mpps"]])
    print(file)
    return rows


def write_csv(file, rows):
    if rows:
        part = os.path.join(os.path.dirname(file), f".{os.path.basename(file)}.{os.getpid()}")
        with open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, file)


def new_row(job):
    path, name, c = job
    columns = ("vendor scanner width height mpp_x mpp_y mpp_source objective_power agree level_factors tissue_share "
               "tissue_mm2").split() + [f"tiles_{mpp:g}" for mpp in c["mpps"]] + ["sharpness", "defects", "error"]
    return {"slide": path, "name": name, "patient": wsi.patient_of(path, c["patient"])} | dict.fromkeys(columns, "")


def slide_row(job):
    """A slide's row. Whatever goes wrong ends up in its "error", and what was learnt until then stays."""
    row, (path, _, c) = new_row(job), job
    try:
        try:
            slide = wsi.open_slide(path, c)
        except wsi.SlideError as e:
            row["error"] = one_line(e, path)
            slide = wsi.Slide(path, mpp=1.0)  # if only the scale is in doubt, this opens, and 1.0 means nothing
        describe(row, slide)
        if not row["error"]:
            measure(row, slide, c)
    except Exception as e:  # of any kind: a report that stops at slide 9,000 of 12,000 is worse than an odd row
        row["error"] = row["error"] or one_line(e, path)
    return row


def describe(row, slide):
    """What the file says of itself. An mpp that was refused is shown if all that speaks against it is the power."""
    row["vendor"], (row["width"], row["height"]) = slide.vendor, slide.dimensions
    row["scanner"] = next((slide.properties[key] for key in SCANNER_KEYS if slide.properties.get(key)), "")
    factors = [np.divide(slide.dimensions, size).mean() for size in slide.level_dimensions]
    row["level_factors"] = " ".join(f"{factor:.4g}" for factor in factors)
    row["agree"], row["objective_power"] = "unknown", f"{slide.power:g}" if slide.power > 0 else ""
    mpp_x, mpp_y, source = *slide.mpp_xy, slide.mpp_source
    if row["error"]:
        try:
            mpp_x, mpp_y, source = wsi.find_mpp({k: v for k, v in slide.properties.items() if k not in wsi.POWER_KEYS})
        except wsi.SlideError:
            return
    row["mpp_x"], row["mpp_y"], row["mpp_source"] = round(mpp_x, 5), round(mpp_y, 5), source
    if slide.power > 0:
        row["agree"] = "yes" if abs((mpp_x + mpp_y) / 2 * slide.power / 10 - 1) <= 0.3 else "no"
    if source.startswith("10 /"):  # of the power itself
        row["agree"] = "unknown"


def measure(row, slide, c):
    """Defects, tissue, tiles, sharpness. What stops a slide from being used, as a level that lies, is an error."""
    picture, damaged = survey(slide)
    texts = [f"damaged (blocks of 1024 px) {100 * damaged:.1f} %" if damaged else "", scan_defects(picture)]
    row["defects"] = "; ".join(filter(None, texts))
    mask, _ = slide.tissue_mask()
    row["tissue_share"], row["tissue_mm2"] = round(float(mask.mean()), 4), round(tissue_mm2(slide), 3)
    if not mask.any():
        row["defects"] = "; ".join(filter(None, (row["defects"], "no tissue")))
    for mpp in c["mpps"]:
        if max(slide.mpp_xy) <= mpp * wsi.MAX_ENLARGE:
            row[f"tiles_{mpp:g}"] = len(slide.grid(c["tile_px"], mpp, c["min_tissue"], c["overlap"])[0])
    if mask.any() and max(slide.mpp_xy) <= BLUR_UM * wsi.MAX_ENLARGE:
        rng = np.random.default_rng(0)  # eight tiles of 0.5 mm: the same places in every report
        places = [slide.random_tissue(rng, 256, BLUR_UM) for _ in range(8)]
        tiles, errors = slide.read_tiles(places, 256, BLUR_UM)
        tiles = [tile for i, tile in enumerate(tiles) if i not in errors]
        if errors:
            row["defects"] = "; ".join(filter(None, (row["defects"], f"{len(errors)} of 8 tiles damaged")))
        row["sharpness"] = round(float(np.median([sharpness(tile) for tile in tiles])), 1)
        if row["sharpness"] < BLURRED:
            row["defects"] = "; ".join(filter(None, (row["defects"], "blurred")))
    if mask.any():
        slide.check_levels()  # a mask that lay in mask_dir came without


def survey(slide):
    """(uint8 RGBA (h, w, 4), share in damaged blocks): means over cells of SURVEY_UM, alpha 0 where not scanned."""
    level = max((i for i, mpp in enumerate(slide.level_mpp) if mpp <= SURVEY_UM), default=0)
    (sx, sy), (w, h) = slide.level_scale[level], slide.level_dimensions[level]
    k = max(1, round(SURVEY_UM / slide.level_mpp[level]))
    step, picture = max(1, 1024 // k) * k, Image.new("RGBA", (math.ceil(w / k), math.ceil(h / k)))
    handle, damaged = openslide.OpenSlide(slide.path), 0
    for y in range(0, h, step):  # in blocks: the only level may have 10^10 pixels
        for x in range(0, w, step):
            at, size = (round(x * sx), round(y * sy)), (min(step, w - x), min(step, h - y))
            try:
                picture.paste(handle.read_region(at, level, size).reduce(k), (x // k, y // k))
            except openslide.OpenSlideError:
                damaged += size[0] * size[1] / (w * h)
                handle = openslide.OpenSlide(slide.path)  # the old one fails from now on
    return np.asarray(picture), damaged


def scan_defects(rgba):
    """Pen, black border and unscanned area as text, each with its share of the slide where that is 0.1 % or more."""
    scanned, dark = rgba[..., 3] > 127, (rgba[..., 3] > 127) & (rgba[..., :3].max(2) < 50)
    hue, saturation, value = (np.asarray(band) for band in Image.fromarray(rgba[..., :3]).convert("HSV").split())
    rows, cols = np.flatnonzero(dark.mean(1) < 0.5), np.flatnonzero(dark.mean(0) < 0.5)
    inside = np.zeros_like(dark)
    if len(rows) and len(cols):  # a border: lines from the edge inwards of which more than half is black
        inside[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1] = True
    ink = ((hue >= 50) & (hue <= 135) & (saturation > 40)) | ((hue > 135) & (hue <= 177) & (saturation > 100))
    shares = {"pen": ((ink & (value >= 50) & scanned) | (dark & inside)).mean(),
              "black border": (dark & ~inside).mean(), "unscanned": (~scanned).mean()}
    if dark.mean() > 0.5:
        shares = {"dark (fluorescence?)": dark.mean()}
    return "; ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share >= 0.001)


def print_summary(rows, tiles):
    """Defects and errors, and by scanner (or vendor) and um/px: slides, errors, tissue, tiles (the named columns)."""
    groups = {}
    for row in rows:
        for kind in ("defects", "error"):
            if row[kind]:
                print(f"{kind}: {row['name']}: {row[kind]}")
        mpp = f"{(row['mpp_x'] + row['mpp_y']) / 2:.3f}" if row["mpp_x"] else "?"
        groups.setdefault((row["scanner"] or row["vendor"] or "?", mpp, row["objective_power"] or "?"), []).append(row)
    heads = "".join(f"{key:>12}" for key in tiles)
    print(f"{'scanner':24}{'um/px':>7}{'power':>7}{'slides':>8}{'errors':>8}{'tissue mm2':>12}{heads}")
    for (scanner, mpp, power), group in sorted(groups.items()):
        errors, mm2 = sum(bool(row["error"]) for row in group), sum(row["tissue_mm2"] or 0 for row in group)
        counts = "".join(f"{sum(row[key] or 0 for row in group):12d}" for key in tiles)
        print(f"{scanner[:24]:24}{mpp:>7}{power:>7}{len(group):8d}{errors:8d}{mm2:12.1f}{counts}")
    usable = sum(not row["error"] and any(row[key] for key in tiles) for row in rows)
    print(f"{usable} of {len(rows)} slides usable")


# ---- overlay: a picture a slide -------------------------------------------------------------------------------------


def overlay(c):
    """Writes <name>.png into c["out"] for each slide, and prints why some could not be drawn."""
    errors = [(job[1], DIED if error is None else error) for error, job in each_slide(draw_slide, c)]
    for name, error in errors:
        if error:
            print(f"error: {name}: {error}")
    print(f"{sum(not error for _, error in errors)} of {len(errors)} slides drawn in {c['out']}")


def draw_slide(job):
    """Saves one overlay; returns "" or the reason why not."""
    path, name, c = job
    file, part = (os.path.join(c["out"], f"{mark}{name}.png") for mark in ("", f".{os.getpid()}."))
    try:
        draw_overlay(wsi.open_slide(path, c), name, c).save(part)
        os.replace(part, file)
    except Exception as e:  # as in slide_row
        return one_line(e, path)
    return ""


def draw_overlay(slide, name, c):
    """The slide with the tissue's outline in green and the tiles of the grid in blue, above a caption."""
    (W, H), mpp_xy, size = slide.dimensions, np.array(slide.mpp_xy), c["tile_px"]
    mpp = next((mpp for mpp in c["mpps"] if max(slide.mpp_xy) <= mpp * wsi.MAX_ENLARGE), c["mpps"][0])
    um = max(*(mpp_xy * (W, H) / OVERLAY_PX), *mpp_xy)  # a pixel of the picture
    image = thumbnail(slide, um)
    mask, cell = slide.tissue_mask()
    tissue = Image.new("L", image.size)
    corner = [round(n) for n in mask.shape[::-1] * np.array(cell) * mpp_xy / um]
    tissue.paste(Image.fromarray(np.uint8(255) * mask).resize(corner, Image.NEAREST))
    edge = np.asarray(tissue.filter(ImageFilter.MaxFilter(3))) > np.asarray(tissue.filter(ImageFilter.MinFilter(3)))
    xy, _ = slide.grid(size, mpp, c["min_tissue"], c["overlap"])
    lines, side = Image.new("L", image.size), slide.extent(size, mpp) * mpp_xy / um
    for low in xy * mpp_xy / um:  # fainter where tiles are small: a line must not hide what it surrounds
        ImageDraw.Draw(lines).rectangle((*low.round(), *(low + side).round()), outline=200 if max(side) > 30 else 110)
    image.paste((20, 60, 220), mask=lines)
    image.paste((0, 140, 50), mask=Image.fromarray(np.uint8(255) * edge))
    power = f", objective {slide.power:g}x" if slide.power > 0 else ""
    return caption(image, um, [
        name, f"{W} x {H} px of {slide.mpp:.4g} um ({slide.mpp_source}){power}",
        f"tissue {tissue_mm2(slide):.3g} mm2: {len(xy)} tiles of {size} px at {mpp:g} um/px"])


def thumbnail(slide, um, block=128):
    """The whole slide at um/px as an image, read in blocks since its only level may have 10^10 pixels."""
    w, h = (max(1, round(n * mpp / um)) for n, mpp in zip(slide.dimensions, slide.mpp_xy))
    image = Image.new("RGB", (w, h))
    for y in range(0, h, block):
        for x in range(0, w, block):
            place = round(x * um / slide.mpp_xy[0]), round(y * um / slide.mpp_xy[1])
            tiles, errors = slide.read_tiles([place], block, um)
            image.paste(Image.fromarray(tiles[0]) if not errors else (255, 200, 0), (x, y, x + block, y + block))
    return image


def caption(image, um, texts):
    """The image above a white strip with a scale bar and lines of text; wider where the text asks for it."""
    mm = scale_bar(image.width * um / 1000)
    font, bar, y = ImageFont.load_default(22), round(mm * 1000 / um), image.height + 22
    width = max(image.width, 24 + math.ceil(max(font.getlength(text) for text in texts)))
    canvas = Image.new("RGB", (width, y + 20 + 30 * len(texts)), "white")
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((12, y - 4, 12 + bar - 1, y + 3), fill="black")
    draw.text((12 + bar + 10, y), f"{mm:g} mm", "black", font, "lm")
    for i, text in enumerate(texts):
        draw.text((12, y + 14 + 30 * i), text, "black", font)
    return canvas


def scale_bar(width_mm):
    """A length for the scale bar: 1 mm where that is a third to a fortieth of the width, else a round one."""
    rounds = [digit * 10.0 ** power for power in range(-3, 3) for digit in (1, 2, 5)]
    return 1.0 if 3 <= width_mm <= 40 else max((mm for mm in rounds if mm <= width_mm / 3), default=rounds[0])
