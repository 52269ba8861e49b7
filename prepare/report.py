"""
What to know of slides before using them: their scale, tissue and scan defects, and how many tiles they would give.

    python prepare/report.py --slides='data/TCGA/**/*.svs' --out=out/report    # report.csv, a row per slide; a summary

A slide that cannot be read, or whose process dies, has a row as well, with the reason and whatever could be learnt.
"""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.slides import each, one_line, open_slide, part_file, run, slides_of, write_csv

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpps = (0.5,)       # um/px of the tiles to count, one or several
tile_px = 256
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient

SURVEY_UM = 32.0    # um per cell of the picture in which scan defects are sought; a pen's line is 100 um or more
BLUR_UM = 2.0       # um/px at which a slide's sharpness is measured
BLURRED = 50        # sharpness below which it is called blurred, as in hs2p. of three real slides, at 1100 to 5800, a
                    # Gaussian of sigma 2 um leaves 50 to 160, one of 5 um 4 to 8
SCANNER_KEYS = ("aperio.ScanScope ID", "hamamatsu.Product", "leica.device-model", "tiff.Model")
COLUMNS = """slide name patient vendor scanner width height mpp_x mpp_y mpp_source objective_power agree level_factors
tissue_share tissue_mm2""".split()  # then tiles_0.5 and so on, sharpness, defects, error


def sharpness(tile):
    """Variance of a 3 x 3 Laplacian in grey levels; it depends on um/px and on the tissue: compare like with like."""
    gray = np.asarray(Image.fromarray(tile).convert("L"), np.float32)
    middle_rows, middle_columns = gray[1:-1], gray[:, 1:-1]
    beside = middle_rows[:, :-2] + middle_rows[:, 2:]
    above_below = middle_columns[:-2] + middle_columns[2:]
    laplacian = beside + above_below - 4 * middle_rows[:, 1:-1]
    return float(laplacian.var())


def tissue_mm2(slide):
    mask, cell = slide.tissue_mask()
    return float(mask.sum() * np.prod(cell) * np.prod(slide.mpp_xy) / 1e6)


def new_row(path, name, config):
    tiles = [f"tiles_{mpp:g}" for mpp in config["mpps"]]
    row = dict.fromkeys([*COLUMNS, *tiles, "sharpness", "defects", "error"], "")
    return row | {"slide": path, "name": name, "patient": wsi.patient_of(path, config["patient"])}


def slide_row(path, name, config):
    """A slide's row. Whatever goes wrong ends up in "error", and what was learnt until then stays."""
    row = new_row(path, name, config)
    try:
        try:
            slide = open_slide(path, config)
        except wsi.SlideError as e:
            row["error"] = one_line(e, path)
            slide = wsi.Slide(path, mpp=1.0)  # opens if only the scale is in doubt; then 1.0 means nothing
        describe(row, slide)
        if not row["error"]:
            measure(row, slide, config)
    except Exception as e:  # of any kind: a report that stops at slide 9,000 of 12,000 is worse than an odd row
        row["error"] = row["error"] or one_line(e, path)
    return row


def describe(row, slide):
    """What the file says of itself. An mpp that was refused is shown if only the objective power contradicts it."""
    properties, power = slide.properties, slide.power
    row["vendor"] = slide.vendor
    row["width"], row["height"] = slide.dimensions
    row["scanner"] = next((properties[key] for key in SCANNER_KEYS if properties.get(key)), "")
    factors = [np.divide(slide.dimensions, size).mean() for size in slide.level_dimensions]
    row["level_factors"] = " ".join(f"{factor:.4g}" for factor in factors)
    row["agree"] = "unknown"
    if power > 0:
        row["objective_power"] = f"{power:g}"
    (mpp_x, mpp_y), source = slide.mpp_xy, slide.mpp_source
    if row["error"]:
        others = {key: properties[key] for key in properties if key not in wsi.POWER_KEYS}
        try:
            mpp_x, mpp_y, source = wsi.find_mpp(others)
        except wsi.SlideError:
            return
    row["mpp_x"] = round(mpp_x, 5)
    row["mpp_y"] = round(mpp_y, 5)
    row["mpp_source"] = source
    if power > 0 and not source.startswith("10 /"):  # that one comes from the power itself
        ratio = (mpp_x + mpp_y) / 2 * power / 10
        row["agree"] = "yes" if abs(ratio - 1) <= 0.3 else "no"


def measure(row, slide, config):
    """Defects, tissue, tiles, sharpness. What forbids the use of a slide, such as a level that lies, is an error."""
    defects = survey(slide)
    row["defects"] = "; ".join(defects)
    mask, _ = slide.tissue_mask()
    row["tissue_share"] = round(float(mask.mean()), 4)
    row["tissue_mm2"] = round(tissue_mm2(slide), 3)
    finest = max(slide.mpp_xy) / wsi.MAX_ENLARGE
    for mpp in config["mpps"]:
        if finest <= mpp:
            xy, _ = slide.grid(config["tile_px"], mpp, config["min_tissue"], config["overlap"])
            row[f"tiles_{mpp:g}"] = len(xy)
    if not mask.any():
        defects.append("no tissue")
    elif finest <= BLUR_UM:
        row["sharpness"] = focus(slide, defects)
    row["defects"] = "; ".join(defects)
    if mask.any():
        slide.check_levels()  # a mask from mask_dir comes without this check


def focus(slide, defects):
    """Median sharpness of eight tiles of 0.5 mm with tissue, at the same places in every report."""
    rng = np.random.default_rng(0)
    places = [slide.random_tissue(rng, 256, BLUR_UM) for _ in range(8)]
    tiles, errors = slide.read_tiles(places, 256, BLUR_UM)
    values = [sharpness(tile) for i, tile in enumerate(tiles) if i not in errors]
    median = round(float(np.median(values)), 1)
    if errors:
        defects.append(f"{len(errors)} of 8 tiles damaged")
    if median < BLURRED:
        defects.append("blurred")
    return median


def survey(slide):
    """Texts on damage and scan defects, from a picture with cells of SURVEY_UM whose alpha is 0 where not scanned."""
    fine = [level for level, mpp in enumerate(slide.level_mpp) if mpp <= SURVEY_UM]
    level = max(fine, default=0)
    scale, (w, h) = slide.level_scale[level], slide.level_dimensions[level]
    k = max(1, round(SURVEY_UM / slide.level_mpp[level]))
    step = max(1, 1024 // k) * k
    cells = math.ceil(w / k), math.ceil(h / k)
    picture = Image.new("RGBA", cells)
    damaged, handle = 0, openslide.OpenSlide(slide.path)
    for y, x in itertools.product(range(0, h, step), range(0, w, step)):  # the only level may have 10^10 pixels
        place = round(x * scale[0]), round(y * scale[1])
        size = min(step, w - x), min(step, h - y)
        try:
            block = handle.read_region(place, level, size)
            picture.paste(block.reduce(k), (x // k, y // k))
        except openslide.OpenSlideError:
            damaged += size[0] * size[1]
            handle = openslide.OpenSlide(slide.path)  # after an error the old one fails everywhere
    shares = scan_defects(np.asarray(picture))
    found = {name: share for name, share in shares.items() if share >= 0.001}
    texts = [f"{name} {100 * share:.1f} %" for name, share in found.items()]
    if damaged:
        texts.insert(0, f"damaged (blocks of 1024 px) {100 * damaged / (w * h):.1f} %")
    return texts


def scan_defects(rgba):
    """{defect: share of the slide} of pen, black border and unscanned area."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV"))
    hue, saturation, value = np.moveaxis(hsv, 2, 0)
    scanned = rgba[..., 3] > 127
    dark = scanned & (value < 50)
    if dark.mean() >= 0.5:
        return {"dark (fluorescence?)": dark.mean()}
    rows = np.flatnonzero(dark.mean(1) < 0.5)
    columns = np.flatnonzero(dark.mean(0) < 0.5)
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    border = dark.copy()  # lines from the edge inwards of which more than half is black
    border[inside] = False
    green = (hue >= 50) & (hue <= 135) & (saturation > 40)
    blue = (hue > 135) & (hue <= 177) & (saturation > 100)
    ink = scanned & (green | blue) & (value >= 50)
    pen = ink | (dark & ~border)
    return {"pen": pen.mean(), "black border": border.mean(), "unscanned": 1 - scanned.mean()}


def summary(rows, config):
    """Print slides, errors, tissue and tiles by scanner (or vendor), um/px and objective power."""
    tiles = [f"tiles_{mpp:g}" for mpp in config["mpps"]]
    totals = {}
    for row in rows:
        mpp = f"{(row['mpp_x'] + row['mpp_y']) / 2:.3f}" if row["mpp_x"] else "?"
        key = row["scanner"] or row["vendor"] or "?", mpp, row["objective_power"] or "?"
        counts = [row[column] or 0 for column in ("tissue_mm2", *tiles)]
        errors = 1 if row["error"] else 0
        totals[key] = np.add(totals.get(key, 0), [1, errors, *counts])
    heads = "um/px", "power", "slides", "errors", "tissue_mm2", *tiles
    print("scanner".ljust(24), *(f"{head:>10}" for head in heads))
    for (scanner, mpp, power), total in sorted(totals.items()):
        values = [f"{value:10.7g}" for value in total]
        print(f"{scanner[:24]:24} {mpp:>10} {power:>10}", *values)
    sound = [row for row in rows if not row["error"]]
    usable = [row for row in sound if any(row[column] for column in tiles)]
    print(f"{len(usable)} of {len(rows)} slides usable")


def main(config):
    """Write report.csv, in the order of the paths, and print a summary. Returns the rows."""
    paths, found, rows = slides_of(config), {}, []
    jobs = [(path, name, config) for path, name in paths.items()]
    for job, row, error in each(slide_row, jobs, config["workers"]):
        row = row or new_row(*job) | {"error": error}
        found[row["slide"]] = row
        finding = row["error"] or row["defects"] or "no defects"
        print(f"{len(found)} of {len(jobs)}: {row['name']}: {finding}", flush=True)
        if len(found) % 100 == 0 or len(found) == len(jobs):
            rows = [found[path] for path in paths if path in found]
            write_csv(part_file(config, "report.csv"), rows)
    summary(rows, config)
    return rows


if __name__ == "__main__":
    run("report", main, globals())
