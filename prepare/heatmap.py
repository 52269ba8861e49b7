"""
A slide as its features see it: how similar is every place to a chosen one, or what does a probe say of each place?

    python prepare/heatmap.py --slide=A.svs --features=data/features_1.0/A.h5 --context=data/context/A.h5 \\
        --x=10240 --y=8192 --out=A.png                     # raw and contextual features side by side
    python prepare/heatmap.py --slide=A.svs --features=data/features_1.0/A.h5 --scores=scores.csv --column=tumor \\
        --out=A.png                                        # eval_slides.py --places=... --write=scores.csv

Similarity is the cosine of features from which the slide's mean is subtracted: what all places share hides the rest.
"""
import csv
import sys
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsi
from configurator import configure
from places import open_features

slide = ""         # the slide's file
features = ""      # its file in a folder of prepare/features.py
context = ""       # its file in a folder of context.py --task=embed; "" = raw features alone
x = 0              # level-0 px of the chosen place
y = 0
scores = ""        # csv of slide, x, y and a column of scores from 0 to 1, drawn instead of similarity
column = ""        # name of that column
out = "heatmap.png"
slide_mpp = 0.0    # um/px of level 0, overriding what the file says; 0 = believe the file

PICTURE_PX = 1000  # about the longer side of the thumbnail


def similarity(features, chosen):
    """Cosine of each row of (N, C) with row `chosen`, after the mean of all rows is subtracted: (N,)."""
    z = np.asarray(features, np.float32)
    z = z - z.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True) + 1e-6
    return z @ z[chosen]


def read_scores(path, name, column):
    """(places (n, 2) in level-0 px, scores (n,)) of the slide `name` in a csv. Raises ValueError if there are none."""
    with open(path, newline="") as f:
        rows = [row for row in csv.DictReader(f) if row.get("slide") == name]
    if not rows or column not in rows[0]:
        raise ValueError(f"{path}: {len(rows)} places of {name}, and no column {column} or none of them; --column=?")
    places = np.array([[row["x"], row["y"]] for row in rows], float)
    return places, np.array([row[column] for row in rows], float)


def panels_of(config, centres, um):
    """({title: (places (n, 2) in um, values (n,))}, the chosen place in um or None, label of the values)."""
    raw, _, _ = open_features(config["features"])
    if config["scores"]:
        where, values = read_scores(config["scores"], Path(config["features"]).stem, config["column"])
        return {config["column"]: (where * um, values)}, None, "score"
    place = np.array([config["x"], config["y"]]) * um
    distance = np.linalg.norm(centres - place, axis=1)
    chosen = int(distance.argmin())
    panels = {"raw features": (centres, similarity(raw, chosen))}
    if config["context"]:
        own, _, _ = open_features(config["context"], "context")
        if len(own) != len(raw):
            raise ValueError(f"{config['context']}: {len(own)} places, not the {len(raw)} of the features")
        panels["features in context"] = (centres, similarity(own, chosen))
    return panels, centres[chosen], "similarity"


def draw(thumbnail, extent, panels, chosen, label, side, out):
    """Write the picture: the thumbnail (h, w, 3) of extent (w, h) um, then each panel over it, and a scale bar."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    width, height = extent
    count = len(panels) + 1
    figure, axes = plt.subplots(1, count, figsize=(4.5 * count, 4.5 * height / width + 0.5), layout="constrained")
    low, high = (0, 1) if label == "score" else (-1, 1)
    for axis, title in zip(axes, ("slide", *panels)):
        axis.imshow(thumbnail, extent=(0, width, height, 0), alpha=1.0 if title == "slide" else 0.5)
        if title in panels:
            places, values = panels[title]
            squares = [Rectangle(place - side / 2, side, side) for place in places]
            drawn = PatchCollection(squares, cmap="viridis" if low == 0 else "coolwarm", alpha=0.75)
            drawn.set_array(values)
            drawn.set_clim(low, high)
            axis.add_collection(drawn)
        if chosen is not None:
            corner = chosen - side / 2
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=2))
        scale_bar(axis, width, height)
        axis.set_title(title)
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def scale_bar(axis, width, height):
    """A bar of a round length, at most a quarter of the width, below the slide."""
    power = 10 ** np.floor(np.log10(width / 4))
    um = max(step * power for step in (1, 2, 5) if step * power <= width / 4)
    axis.plot([0, um], [1.03 * height] * 2, color="black", linewidth=3, clip_on=False)
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"
    axis.text(um * 1.1, 1.03 * height, text, va="center")


def main(config):
    if not config["slide"] or not config["features"]:
        raise ValueError("give --slide=FILE and --features=FILE")
    _, centres, about = open_features(config["features"])
    with closing(wsi.Slide(config["slide"], config["slide_mpp"] or None)) as opened:
        um = about.get("level0_mpp", opened.mpp)
        extent = np.multiply(opened.dimensions, um)
        thumbnail, _, _ = opened.thumbnail(max(extent.max() / PICTURE_PX, opened.mpp))
    panels, chosen, label = panels_of(config, centres, um)
    draw(thumbnail, extent, panels, chosen, label, about["side"], config["out"])
    print(f"{config['out']}: {', '.join(panels)} of {len(centres)} places")


if __name__ == "__main__":
    try:
        main(configure(globals()))
    except ImportError:
        raise SystemExit("heatmap: pip install matplotlib") from None
    except (ValueError, OSError, wsi.SlideError) as e:
        raise SystemExit(f"heatmap: {e}") from None
