"""
What to know of slides before using them: their scale, tissue and scan defects, and how many tiles they would give.

    python prepare/report.py --slides='data/TCGA/**/*.svs' --out=out/report    # report.csv, a row per slide; a summary
    python prepare/report.py ... --pictures=true                               # and NAME.png of what would be cut

A picture has the tissue's outline in green, the tiles in blue, what is damaged in orange, and a scale bar. A slide that
cannot be read, or whose process dies, has a row as well, with the reason and whatever could be learnt.
"""
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.slides import each, one_line, open_slide, part_file, run, slides_of, write_csv

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpps = (0.5,)       # um/px of the tiles to count, one or several; a picture shows the first that the slide can give
tile_px = 256
pictures = False    # also draw each slide; a picture is 1 to 3 MB large
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient

SURVEY_UM = 32.0    # um per cell of the thumbnail in which scan defects are sought; a pen's line is 100 um or more
BLUR_UM = 2.0       # um/px at which a slide's sharpness is measured
BLURRED = 50        # sharpness below which it is called blurred, as in hs2p. of three real slides, at 1100 to 5800, a
                    # Gaussian of sigma 2 um leaves 50 to 160, one of 5 um 4 to 8
PICTURE_PX = 1600   # about the longer side of a picture
BLUE, GREEN, ORANGE = (20, 60, 220, 130), (0, 140, 50), (255, 200, 0)  # a picture's tiles (translucent), tissue, damage
BARS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)  # lengths in mm of a scale bar; a third of the width at most
SCANNER_KEYS = ("aperio.ScanScope ID", "hamamatsu.Product", "leica.device-model", "tiff.Model")
COLUMNS = """slide name patient vendor scanner width height mpp_x mpp_y mpp_source objective_power level_factors
tissue_share tissue_mm2""".split()  # then tiles_0.5 and so on, sharpness, defects, error


def sharpness(tile):
    """Variance of a 3 x 3 Laplacian in grey levels; it depends on um/px and on the tissue: compare like with like."""
    gray = np.asarray(Image.fromarray(tile).convert("L"), np.float32)
    middle_rows, middle_columns = gray[1:-1], gray[:, 1:-1]
    beside = middle_rows[:, :-2] + middle_rows[:, 2:]
    above_below = middle_columns[:-2] + middle_columns[2:]
    laplacian = beside + above_below - 4 * middle_rows[:, 1:-1]
    return float(laplacian.var())


# ---- a slide's row --------------------------------------------------------------------------------------------------


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
            describe(row, wsi.Slide(path, mpp=1.0))  # opens if only the scale is in doubt
            return row
        describe(row, slide)
        row["mpp_x"], row["mpp_y"] = (round(mpp, 5) for mpp in slide.mpp_xy)
        row["mpp_source"] = slide.mpp_source
        measure(row, slide, config)
    except Exception as e:  # of any kind: a report that stops at slide 9,000 of 12,000 is worse than an odd row
        row["error"] = row["error"] or one_line(e, path)
    return row


def describe(row, slide):
    """What the file says of itself, except for its scale."""
    row["vendor"] = slide.vendor
    row["width"], row["height"] = slide.dimensions
    named = [slide.properties[key] for key in SCANNER_KEYS if slide.properties.get(key)]
    row["scanner"] = named[0] if named else ""
    factors = [np.divide(slide.dimensions, size).mean() for size in slide.level_dimensions]
    row["level_factors"] = " ".join(f"{factor:.4g}" for factor in factors)
    if slide.power > 0:
        row["objective_power"] = f"{slide.power:g}"


def measure(row, slide, config):
    """Defects, such as a level that is left out, tissue, tiles, sharpness."""
    defects = survey(slide)
    row["defects"] = "; ".join(defects)
    mask, cell = slide.tissue_mask()
    slide.check_levels()  # a mask from mask_dir comes without this check
    defects += [f"level {level} {reason}" for level, reason in slide.left_out.items()]
    area = mask.sum() * np.prod(cell) * np.prod(slide.mpp_xy)  # um2
    row["tissue_share"] = round(float(mask.mean()), 4)
    row["tissue_mm2"] = round(float(area) / 1e6, 3)
    finest = max(slide.mpp_xy) / wsi.MAX_ENLARGE
    grids = {}
    for mpp in config["mpps"]:
        if finest <= mpp:
            grids[mpp], _ = slide.grid(config["tile_px"], mpp, config["min_tissue"], config["overlap"])
            row[f"tiles_{mpp:g}"] = len(grids[mpp])
    if not mask.any():
        defects.append("no tissue")
    elif finest <= BLUR_UM:
        row["sharpness"] = focus(slide, defects)
    row["defects"] = "; ".join(defects)
    if config["pictures"]:
        text = f"{row['name']}, tissue {row['tissue_mm2']} mm2"
        draw(slide, grids, config["tile_px"], text).save(Path(config["out"], f"{row['name']}.png"))


def focus(slide, defects):
    """Median sharpness of eight tiles of 0.5 mm with tissue, at the same places in every report."""
    rng = np.random.default_rng(0)
    places = [slide.random_tissue(rng, 256, BLUR_UM) for _ in range(8)]
    tiles, errors = slide.read_tiles(places, 256, BLUR_UM)
    values = [sharpness(tile) for i, tile in enumerate(tiles) if i not in errors]
    if errors:
        defects.append(f"{len(errors)} of 8 tiles damaged")
    if not values:
        return ""
    median = round(float(np.median(values)), 1)
    if median < BLURRED:
        defects.append("blurred")
    return median


def survey(slide):
    """Texts on damage and scan defects."""
    thumbnail, damaged, _ = slide.thumbnail(SURVEY_UM)
    shares = {"damaged": damaged.mean(), **scan_defects(thumbnail)}
    return [f"{name} {100 * share:.1f} %" for name, share in shares.items() if share >= 0.001]


def scan_defects(rgb):
    """{defect: share of the slide} in a thumbnail. Black is ink or a border, or fluorescence if it is most of it."""
    channels = Image.fromarray(rgb).convert("HSV").split()
    hue, saturation, value = map(np.asarray, channels)
    black = value < 50
    green = (hue >= 50) & (hue <= 135) & (saturation > 40)
    blue = (hue > 135) & (hue <= 177) & (saturation > 100)
    pen = (green | blue) & ~black
    return {"pen": pen.mean(), "black": black.mean()}


# ---- a slide's picture ----------------------------------------------------------------------------------------------


def draw(slide, grids, size, text):
    """The slide with its tissue, the tiles of the first of `grids` {mpp: places} and a line of text: an image."""
    longer = max(np.multiply(slide.dimensions, slide.mpp_xy))  # um
    pixels, damaged, cell = slide.thumbnail(max(longer / PICTURE_PX, slide.mpp))
    pixels[damaged] = ORANGE
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image, "RGBA")
    for mpp, xy in list(grids.items())[:1]:
        text += f": {len(xy)} tiles of {size} px at {mpp:g} um/px"
        side = np.divide(slide.extent(size, mpp), cell)
        for corner in xy / cell:
            left, top = corner.round()
            right, bottom = (corner + side).round()
            pen.rectangle((left, top, right, bottom), outline=BLUE)
    image.paste(GREEN, mask=outline(slide, image.size, cell))
    return caption(image, cell[0] * slide.mpp_xy[0], text)


def outline(slide, size, cell):
    """The edge of the tissue mask, white on black, in a picture of a size whose pixels are `cell` level-0 px."""
    mask, mask_cell = slide.tissue_mask()
    extent = np.multiply(mask.shape[::-1], mask_cell) / cell
    width, height = extent.round().astype(int).tolist()
    tissue = Image.new("L", size)
    tissue.paste(Image.fromarray(mask).convert("L").resize((width, height), Image.NEAREST))
    edge = tissue.filter(ImageFilter.FIND_EDGES)
    return edge.filter(ImageFilter.MaxFilter(3))


def caption(image, um, text):
    """The image above a white strip with a scale bar and a line of text; wider where the text needs it."""
    third = image.width * um / 3000
    mm = max([length for length in BARS if length <= third], default=BARS[0])
    bar = round(mm * 1000 / um)  # px
    y = image.height + 22
    font = ImageFont.load_default(22)
    text = f"{mm:g} mm   {text}"
    needed = bar + font.getlength(text) + 36
    canvas = Image.new("RGB", (max(image.width, math.ceil(needed)), image.height + 44), "white")
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((12, y - 4, 12 + bar - 1, y + 3), fill="black")
    pen.text((12 + bar + 10, y), text, "black", font, "lm")
    return canvas


# ---- the report -----------------------------------------------------------------------------------------------------


def summary(rows, config):
    """Print slides, errors, tissue and tiles by scanner (or vendor), um/px and objective power."""
    tiles = [f"tiles_{mpp:g}" for mpp in config["mpps"]]
    totals, usable = {}, 0
    for row in rows:
        mpp = "?"
        if row["mpp_x"]:
            mpp = f"{(row['mpp_x'] + row['mpp_y']) / 2:.3f}"
        scanner = row["scanner"] or row["vendor"] or "?"
        power = row["objective_power"] or "?"
        counts = [row[column] or 0 for column in ("tissue_mm2", *tiles)]
        error = bool(row["error"])
        usable += not error and any(counts[1:])
        totals[scanner, mpp, power] = np.add(totals.get((scanner, mpp, power), 0), [1, error, *counts])
    heads = "um/px", "power", "slides", "errors", "tissue_mm2", *tiles
    print("scanner".ljust(24), *(f"{head:>10}" for head in heads))
    for (scanner, mpp, power), total in sorted(totals.items()):
        values = [f"{value:10.7g}" for value in total]
        print(f"{scanner[:24]:24} {mpp:>10} {power:>10}", *values)
    print(f"{usable} of {len(rows)} slides usable")


def main(config):
    """Write report.csv, in the order of the paths, and print a summary. Returns the rows."""
    lost, found = {}, {}
    paths = slides_of(config, lost)
    jobs = [(path, name, config) for path, name in paths.items()]
    for job, row, error in each(slide_row, jobs, config["workers"]):
        row = row or new_row(*job) | {"error": error}
        found[row["slide"]] = row
        finding = row["error"] or row["defects"] or "no defects"
        print(f"{len(found)} of {len(jobs)}: {row['name']}: {finding}", flush=True)
        if len(found) % 100 == 0:
            write_csv(part_file(config, "report.csv"), [found[path] for path in paths if path in found])
    rows = [found[path] for path in paths]
    rows += [new_row(path, Path(path).stem, config) | {"error": reason} for path, reason in lost.items()]
    write_csv(part_file(config, "report.csv"), rows)
    summary(rows, config)
    return rows


if __name__ == "__main__":
    run("report", main, globals())
