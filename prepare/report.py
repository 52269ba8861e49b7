"""
What to know of slides before using them: their scale, tissue and scan defects, and how many tiles they would give.

    python prepare/report.py --slides='data/TCGA/**/*.svs' --out=out/report    # report.csv, a row per slide; a summary
    python prepare/report.py ... --pictures=true                               # and NAME.png of what would be cut

A picture shows the slide once per um/px: tiles shaded in orange, tissue's edge in black, a legend, a scale bar. Pen,
black areas and damage are hatched, so that no colour of a pen can be taken for ours. A slide that cannot be read, or
whose process dies, has a row as well, with the reason and whatever could be learnt.
"""
import contextlib
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from prepare.slides import each, one_line, open_slide, part_file, run, slides_of, write_csv

# the keys of prepare/slides.py (slides, out, part, workers, ...) and these
mpps = (0.5,)       # um/px of the tiles to count, one or several
tile_px = 256
pictures = False    # also draw each slide; a picture is 1 to 3 MB large per um/px
patient = r"TCGA-\w\w-\w{4}"  # regular expression in the file name; without a match a slide is its own patient

SURVEY_UM = 32.0    # um per cell of the thumbnail in which scan defects are sought; a pen's line is 100 um or more
BLUR_UM = 2.0       # um/px at which a slide's sharpness is measured
BLURRED = 50        # sharpness below which it is called blurred, as in hs2p. of three real slides, at 1100 to 5800, a
                    # Gaussian of sigma 2 um leaves 50 to 160, one of 5 um 4 to 8
PICTURE_PX = 1600   # about the longer side of a slide in a picture
LINE = 44           # px of a line of text in a picture
LINES, SHADE = (190, 70, 0), (255, 150, 0, 35)  # a picture's tiles: edge, inside
HATCHES = {"pen": (1, 1), "black": (1, -1), "damaged": (0, 1)}  # x and y across the stripes, which are black and white
SCANNER_KEYS = ("aperio.ScanScope ID", "hamamatsu.Product", "leica.device-model", "tiff.Model")
COLUMNS = """slide name patient vendor scanner width height mpp_x mpp_y mpp_source objective_power level_factors
tissue_share tissue_mm2""".split()  # then tiles_0.5 and so on, sharpness, defects, error


def sharpness(tile):
    """Variance of a 3 x 3 Laplacian in grey levels; it depends on um/px and on the tissue: compare like with like."""
    gray = np.asarray(Image.fromarray(tile).convert("L"), np.float32)
    second_y, second_x = np.diff(gray, 2, axis=0), np.diff(gray, 2, axis=1)
    return float((second_y[:, 1:-1] + second_x[1:-1]).var())


# ---- a slide's row --------------------------------------------------------------------------------------------------


def new_row(path, name, config):
    tiles = [f"tiles_{mpp:g}" for mpp in config["mpps"]]
    row = dict.fromkeys([*COLUMNS, *tiles, "sharpness", "defects", "error"], "")
    return row | {"slide": path, "name": name, "patient": wsi.patient_of(path, config["patient"])}


def slide_row(path, name, config):
    """A slide's row. Whatever goes wrong ends up in "error", and what was learnt until then stays."""
    row = new_row(path, name, config)
    try:
        measure(row, open_slide(path, config), config)
    except Exception as e:  # of any kind: a report that stops at slide 9,000 of 12,000 is worse than an odd row
        row["error"] = one_line(e, path)
        with contextlib.suppress(Exception):
            describe(row, wsi.Slide(path, mpp=1.0))  # opens if only the scale is in doubt
    return row


def describe(row, slide):
    """What the file says of itself, except for its scale."""
    row["vendor"] = slide.vendor
    row["width"], row["height"] = slide.dimensions
    row["scanner"] = next(filter(None, map(slide.properties.get, SCANNER_KEYS)), "")
    factors = [np.divide(slide.dimensions, size).mean() for size in slide.level_dimensions]
    row["level_factors"] = " ".join(f"{factor:.4g}" for factor in factors)
    if slide.power > 0:
        row["objective_power"] = f"{slide.power:g}"


def measure(row, slide, config):
    """Scale, defects, such as a level that is left out, tissue, tiles, sharpness."""
    describe(row, slide)
    row["mpp_x"], row["mpp_y"] = (round(mpp, 5) for mpp in slide.mpp_xy)
    row["mpp_source"] = slide.mpp_source
    thumbnail, damaged, found_cell = slide.thumbnail(SURVEY_UM)
    found = {"damaged": damaged, **scan_defects(thumbnail)}
    defects = [f"{name} {100 * mask.mean():.1f} %" for name, mask in found.items() if mask.mean() >= 0.001]
    row["defects"] = "; ".join(defects)
    mask, cell = slide.tissue_mask()
    slide.check_levels()  # a mask from mask_dir comes without this check
    defects += [f"level {level} {reason}" for level, reason in slide.left_out.items()]
    area = mask.sum() * np.prod(cell) * np.prod(slide.mpp_xy)  # um2
    row["tissue_share"] = round(float(mask.mean()), 4)
    row["tissue_mm2"] = round(float(area) / 1e6, 3)
    finest = max(slide.mpp_xy) / wsi.MAX_ENLARGE
    grids = dict.fromkeys(config["mpps"])  # None where the slide does not have the detail
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
        text = f"{row['name']}: tissue {row['tissue_mm2']} mm2, level 0 has {slide.mpp:.4g} um/px"
        draw(slide, grids, found, found_cell, text, config).save(Path(config["out"], f"{row['name']}.png"))


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




def scan_defects(rgb):
    """{defect: bool (h, w)} in a thumbnail. Black is ink or a border; if it is most of it, the slide is fluorescent."""
    channels = Image.fromarray(rgb).convert("HSV").split()
    hue, saturation, value = map(np.asarray, channels)
    black = value < 50
    green = (hue >= 50) & (hue <= 135) & (saturation > 40)
    blue = (hue > 135) & (hue <= 177) & (saturation > 100)
    return {"pen": (green | blue) & ~black & (black.mean() < 0.5), "black": black}


# ---- a slide's picture ----------------------------------------------------------------------------------------------


def draw(slide, grids, found, found_cell, text, config):
    """An image: the slide with its tissue, what was `found` {defect: mask}, and the tiles of each of `grids`
    {mpp: places, or None}; then the legend. Its pixels are square in um, whatever the slide's are."""
    um_xy, size = np.array(slide.mpp_xy), config["tile_px"]
    longer = max(um_xy * slide.dimensions)  # um
    pixels, _, cell = slide.thumbnail(max(longer / PICTURE_PX, slide.mpp))
    um = cell[0] * um_xy[0]  # per px of the picture
    width, height = pixels.shape[1], round(len(pixels) * cell[1] * um_xy[1] / um)
    plain = Image.fromarray(pixels).resize((width, height), Image.BILINEAR)
    bar, bar_text = scale_bar(width * um / 3)
    swatch = Image.new("RGB", (56, 28), "white")
    legend = {bar_text: Image.new("RGB", (round(bar / um), 8)), "edge of the tissue mask": Image.new("RGB", (56, 4)),
              f"would be cut: {config['min_tissue']:.0%} or more is tissue, and half lies inside": swatch}
    for name, mask in found.items():
        hatch(plain, enlarged(mask, found_cell * um_xy / um, plain.size), *HATCHES[name])
        legend[f"{name}, {100 * mask.mean():.1f} % of the slide"] = hatched = swatch.copy()
        hatch(hatched, Image.new("L", swatch.size, 255), *HATCHES[name])
    shade(swatch, 0, 0, 55, 27)
    mask, mask_cell = slide.tissue_mask()
    edge = enlarged(mask, mask_cell * um_xy / um, plain.size).filter(ImageFilter.FIND_EDGES)
    panels = {}
    for mpp, xy in grids.items():
        panel, counted = plain.copy(), "none, level 0 is coarser"
        if xy is not None:
            counted = f"{len(xy)} tiles of {size} px, {size * mpp:g} um wide"
            side = slide.extent(size, mpp) * um_xy / um
            for corner in xy * um_xy / um:
                shade(panel, *corner.round(), *(corner + side).round())
        panel.paste("black", mask=edge.filter(ImageFilter.MaxFilter(3)))
        panels[f"{mpp:g} um/px: {counted}"] = panel
    return arranged(text, panels, legend)


def enlarged(mask, px, size):
    """A bool mask as an image of a size, white where it is true; each of its cells becomes px = (x, y) large."""
    width, height = np.rint(np.multiply(mask.shape[::-1], px)).astype(int).tolist()
    image = Image.new("L", size)
    image.paste(Image.fromarray(mask).convert("L").resize((width, height), Image.NEAREST))
    return image


def shade(image, *box):
    """Mark a tile: left, top, right, bottom."""
    ImageDraw.Draw(image, "RGBA").rectangle(box, SHADE, LINES, 2)


def hatch(image, where, across, down):
    """Stripes where an image is white: of 12 px two are black and two white, so they show on every colour."""
    y, x = np.indices(where.size[::-1], sparse=True)
    stripe = (across * x + down * y) % 12 // 2
    for number, colour in enumerate(("black", "white")):
        image.paste(colour, mask=Image.fromarray((stripe == number) & (np.asarray(where) > 0)))


def scale_bar(limit):
    """(um, text) of the longest bar of 1, 2, 5, 10, 20, ... um that is at most `limit` um."""
    power = 10.0 ** math.floor(math.log10(limit))
    um = max(step * power for step in (1, 2, 5) if step * power <= limit)
    return um, f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"


def arranged(text, panels, legend):
    """A headline, panels {title: image} in as many columns as make a square, and below them a legend {text: image}."""
    font, (width, height) = ImageFont.load_default(28), next(iter(panels.values())).size
    columns = min(len(panels), math.ceil(math.sqrt(len(panels) * height / width)))
    across, down = max(width, *map(font.getlength, panels)) + 24, height + LINE
    below = LINE + math.ceil(len(panels) / columns) * down
    right = max(columns * across, 8 + font.getlength(text),
                *(image.width + 24 + font.getlength(line) for line, image in legend.items()))
    canvas = Image.new("RGB", (math.ceil(right), below + LINE * len(legend) + 8), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((4, LINE // 2), text, "black", font, "lm")
    for i, (title, panel) in enumerate(panels.items()):
        left, top = math.ceil(i % columns * across), LINE + i // columns * down
        pen.text((left + 4, top + LINE // 2), title, "black", font, "lm")
        canvas.paste(panel, (left, top + LINE))
    for i, (line, image) in enumerate(legend.items()):
        middle = below + LINE * i + LINE // 2
        canvas.paste(image, (4, middle - image.height // 2))
        pen.text((image.width + 16, middle), line, "black", font, "lm")
    return canvas


# ---- the report -----------------------------------------------------------------------------------------------------


def summary(rows, config):
    """Print slides, errors, tissue and tiles by scanner (or vendor), um/px and objective power."""
    tiles = [f"tiles_{mpp:g}" for mpp in config["mpps"]]
    totals, usable = {}, 0
    for row in rows:
        mpp = f"{(row['mpp_x'] + row['mpp_y']) / 2:.3f}" if row["mpp_x"] else "?"
        group = row["scanner"] or row["vendor"] or "?", mpp, row["objective_power"] or "?"
        counts = [row[column] or 0 for column in ("tissue_mm2", *tiles)]
        error = bool(row["error"])
        usable += not error and any(counts[1:])
        totals[group] = np.add(totals.get(group, 0), [1, error, *counts])
    heads = "um/px", "power", "slides", "errors", "tissue_mm2", *tiles
    print("scanner".ljust(24), *(f"{head:>10}" for head in heads))
    for (scanner, mpp, power), total in sorted(totals.items()):
        values = [f"{value:10.7g}" for value in total]
        print(f"{scanner[:24]:24} {mpp:>10} {power:>10}", *values)
    told = [patient_told(row["slide"], config["patient"]) for row in rows]
    patients = patients_text(len({*told} - {""}), f"--patient={config['patient']}", told.count(""), "slides")
    print(f"{usable} of {len(rows)} slides usable; {patients}")


def patient_told(path, pattern, groups={}):
    """The patient of a file by {file or class/file: patient}, else by the pattern in its name, else ""."""
    folder, name = os.path.split(path)
    found = re.search(pattern, name)
    listed = groups.get(f"{os.path.basename(folder)}/{name}") or groups.get(name)
    return listed or (found.group() if found else "")


def patients_text(count, by, without, kind):
    text = f"patients by {by}: {count}"
    return f"{text}; {kind} that tell none: {without}, each counts as one" if without else text


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
