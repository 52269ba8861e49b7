"""
What to know of slides before using them: their scale, tissue and scan defects, and how many tiles they would give.

    python prepare/report.py --slides='data/TCGA/**/*.svs' --out=out/report    # report.csv, a row per slide; a summary

A slide that cannot be read, or whose process dies, has a row as well, with the reason and whatever could be learnt.
"""
import math
import sys
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from configurator import configure
from prepare.slides import each, one_line, open_slide, part_file, run, slides_of, write_csv

slides = ""         # glob of whole-slide images
out = ""            # folder to write
mpps = (0.5,)       # um/px of the tiles to count, one or several
tile_px = 256
overlap = 0         # px of a tile that its neighbour repeats
min_tissue = 0.25   # share of a tile's area in the tissue mask
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient
slide_mpp = 0.0     # um/px of level 0 of every slide, overriding what the files say; 0 = believe the files
mpp_from_objective = False  # where nothing better is stated, take 10 / objective power: a guess, off by up to 50 %
exact_reads = True  # undo OpenSlide's interpolation
mask_dir = ""       # folder that keeps tissue masks for the other scripts and for training; "" = none
names = "stem"      # of slides: the file name, or "path": with its folders, where file names repeat
part = ""           # "3/16": every 16th slide, from the third on, into report.3of16.csv
workers = 2         # slides at a time, each in a process of its own

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
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float((around - 4 * gray[1:-1, 1:-1]).var())


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
    row["vendor"], (row["width"], row["height"]) = slide.vendor, slide.dimensions
    row["scanner"] = next((properties[key] for key in SCANNER_KEYS if properties.get(key)), "")
    factors = [np.divide(slide.dimensions, size).mean() for size in slide.level_dimensions]
    row["level_factors"] = " ".join(f"{factor:.4g}" for factor in factors)
    row["objective_power"], row["agree"] = f"{power:g}" if power > 0 else "", "unknown"
    (mpp_x, mpp_y), source = slide.mpp_xy, slide.mpp_source
    if row["error"]:
        no_power = {key: properties[key] for key in properties if key not in wsi.POWER_KEYS}
        try:
            mpp_x, mpp_y, source = wsi.find_mpp(no_power)
        except wsi.SlideError:
            return
    row["mpp_x"], row["mpp_y"], row["mpp_source"] = round(mpp_x, 5), round(mpp_y, 5), source
    if power > 0 and not source.startswith("10 /"):  # that one is of the power itself
        row["agree"] = "yes" if abs((mpp_x + mpp_y) / 2 * power / 10 - 1) <= 0.3 else "no"


def measure(row, slide, config):
    """Defects, tissue, tiles, sharpness. What forbids the use of a slide, such as a level that lies, is an error."""
    picture, damaged = survey(slide)
    defects = [f"damaged (blocks of 1024 px) {100 * damaged:.1f} %"] if damaged else []
    defects += scan_defects(picture)
    row["defects"] = "; ".join(defects)
    mask, _ = slide.tissue_mask()
    row["tissue_share"], row["tissue_mm2"] = round(float(mask.mean()), 4), round(tissue_mm2(slide), 3)
    finest = max(slide.mpp_xy) / wsi.MAX_ENLARGE
    for mpp in config["mpps"]:
        if finest <= mpp:
            xy, _ = slide.grid(config["tile_px"], mpp, config["min_tissue"], config["overlap"])
            row[f"tiles_{mpp:g}"] = len(xy)
    if not mask.any():
        defects.append("no tissue")
    elif finest <= BLUR_UM:
        row["sharpness"] = median_sharpness(slide, defects)
    row["defects"] = "; ".join(defects)
    if mask.any():
        slide.check_levels()  # a mask from mask_dir came without this check


def median_sharpness(slide, defects):
    """Sharpness of eight tiles of 0.5 mm with tissue, at the same places in every report."""
    rng = np.random.default_rng(0)
    xy = [slide.random_tissue(rng, 256, BLUR_UM) for _ in range(8)]
    tiles, errors = slide.read_tiles(xy, 256, BLUR_UM)
    values = [sharpness(tile) for i, tile in enumerate(tiles) if i not in errors]
    median = round(float(np.median(values)), 1)
    if errors:
        defects.append(f"{len(errors)} of 8 tiles damaged")
    if median < BLURRED:
        defects.append("blurred")
    return median


def survey(slide):
    """(uint8 RGBA (h, w, 4), share in damaged blocks): means over cells of SURVEY_UM, alpha 0 where not scanned."""
    level = max((i for i, mpp in enumerate(slide.level_mpp) if mpp <= SURVEY_UM), default=0)
    (sx, sy), (w, h) = slide.level_scale[level], slide.level_dimensions[level]
    k = max(1, round(SURVEY_UM / slide.level_mpp[level]))
    picture = Image.new("RGBA", (math.ceil(w / k), math.ceil(h / k)))
    step, damaged, handle = max(1, 1024 // k) * k, 0, openslide.OpenSlide(slide.path)
    for y in range(0, h, step):  # in blocks, because the only level may have 10^10 pixels
        for x in range(0, w, step):
            size = min(step, w - x), min(step, h - y)
            try:
                block = handle.read_region((round(x * sx), round(y * sy)), level, size)
                picture.paste(block.reduce(k), (x // k, y // k))
            except openslide.OpenSlideError:
                damaged += size[0] * size[1] / (w * h)
                handle = openslide.OpenSlide(slide.path)  # after an error the old one fails everywhere
    return np.asarray(picture), damaged


def scan_defects(rgba):
    """Texts on pen, black border and unscanned area, each with its share of the slide, where that is 0.1 % or more."""
    picture, scanned = Image.fromarray(rgba[..., :3]), rgba[..., 3] > 127
    hue, saturation, value = (np.asarray(band) for band in picture.convert("HSV").split())
    dark = scanned & (value < 50)
    rows, columns = np.flatnonzero(dark.mean(1) < 0.5), np.flatnonzero(dark.mean(0) < 0.5)
    inside = np.zeros_like(dark)
    if len(rows) and len(columns):  # a border is lines from the edge inwards of which more than half is black
        inside[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = True
    green, blue = (hue >= 50) & (hue <= 135), (hue > 135) & (hue <= 177)
    ink = (green & (saturation > 40)) | (blue & (saturation > 100))
    shares = {"pen": (ink & (value >= 50) & scanned) | (dark & inside), "black border": dark & ~inside,
              "unscanned": ~scanned}
    if dark.mean() > 0.5:
        shares = {"dark (fluorescence?)": dark}
    return [f"{name} {100 * where.mean():.1f} %" for name, where in shares.items() if where.mean() >= 0.001]


def summary(rows, config):
    """Print slides, errors, tissue and tiles by scanner (or vendor), um/px and objective power."""
    tiles, groups = [f"tiles_{mpp:g}" for mpp in config["mpps"]], {}
    for row in rows:
        mpp = f"{(row['mpp_x'] + row['mpp_y']) / 2:.3f}" if row["mpp_x"] else "?"
        key = row["scanner"] or row["vendor"] or "?", mpp, row["objective_power"] or "?"
        groups.setdefault(key, []).append(row)
    heads = "".join(f"{key:>12}" for key in tiles)
    print(f"{'scanner':24}{'um/px':>7}{'power':>7}{'slides':>8}{'errors':>8}{'tissue mm2':>12}{heads}")
    for (scanner, mpp, power), group in sorted(groups.items()):
        errors = sum(row["error"] != "" for row in group)
        area, *counts = [sum(row[key] or 0 for row in group) for key in ("tissue_mm2", *tiles)]
        columns = "".join(f"{count:12d}" for count in counts)
        print(f"{scanner[:24]:24}{mpp:>7}{power:>7}{len(group):8d}{errors:8d}{area:12.1f}{columns}")
    usable = [row for row in rows if not row["error"] and any(row[key] for key in tiles)]
    print(f"{len(usable)} of {len(rows)} slides usable")


def main(config):
    """Write report.csv, in the order of the paths, and print a summary. Returns the rows."""
    paths, rows, file = slides_of(config), {}, part_file(config, "report.csv")
    jobs = [(path, name, config) for path, name in paths.items()]
    for (path, name, _), row, death in each(slide_row, jobs, config["workers"]):
        rows[path] = row or new_row(path, name, config) | {"error": death}
        print(f"{len(rows)} of {len(paths)}: {name}: {rows[path]['error'] or rows[path]['defects'] or 'sound'}")
        if len(rows) % 100 == 0 or len(rows) == len(paths):
            write_csv(file, [rows[path] for path in paths if path in rows])
    rows = [rows[path] for path in paths]
    summary(rows, config)
    print(file)
    return rows


if __name__ == "__main__":
    run("report", main, configure(globals()))
