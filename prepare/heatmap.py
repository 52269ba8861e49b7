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
from configurator import configure, run
from places import open_features
from prepare.report import scale_bar

slide = ""         # the slide's file
features = ""      # its file in a folder of prepare/features.py
context = ""       # its file in a folder of context.py --task=embed; "" = raw features alone
x = 0              # centre of the chosen place in level-0 px, as in the places.csv of eval_slides.py; the nearest
y = 0              # place counts, and one more than a tile away is refused
scores = ""        # csv of slide, x, y (as above) and a column of scores from 0 to 1, drawn instead of similarity
column = ""        # name of that column
out = "heatmap.png"

PICTURE_PX = 1000  # about the longer side of the thumbnail


def similarity(features, chosen):
    """Cosine of each row of (N, C) with row `chosen`, after the mean of all rows is subtracted: (N,)."""
    z = np.asarray(features, np.float32)
    z = z - z.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True) + 1e-6
    return z @ z[chosen]


def read_scores(path, name, column):
    """(places (n, 2) in level-0 px, scores (n,)) of the slide `name` in a csv. Raises ValueError if there are none."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        rows = [row for row in csv.DictReader(f) if row.get("slide") == name]
    if not rows:
        raise ValueError(f"{path}: no place of slide {name} in it")
    if column not in rows[0]:
        raise ValueError(f"{path}: no column {column} among {', '.join(rows[0])}; --column=NAME")
    try:
        table = np.array([[row["x"], row["y"], row[column]] for row in rows], float)
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: {name}: x, y and {column} must be there and numbers ({e})") from None
    places, values = table[:, :2], table[:, 2]
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{path}: {name}: {column} must lie between 0 and 1")
    return places, values


def nearest_place(centres, x, y, pitch, um):
    """Index of the tile of centres (N, 2), in um, that is nearest to x, y in level-0 px. ValueError if a tile away."""
    distance = np.hypot(*(centres - np.array([x, y]) * um).T)
    index = int(distance.argmin())
    if not distance[index] <= pitch:  # also where x is nan
        near = np.rint(centres[index] / um)
        raise ValueError(f"no place at x={x:g}, y={y:g}: the nearest has its centre at x={near[0]:.0f}, y={near[1]:.0f}"
                         f" (level-0 px), {distance[index] / pitch:.1f} tiles away")
    return index


def panels_of(config, centres, um):
    """({title: (places (n, 2) in um, values (n,))}, the chosen place in um or None, label of the values)."""
    raw, _, about = open_features(config["features"])
    if config["scores"]:
        where, values = read_scores(config["scores"], Path(config["features"]).stem, config["column"])
        for x, y in where:
            nearest_place(centres, x, y, about["pitch"], um)
        return {config["column"]: (where * um, values)}, None, "score"
    chosen = nearest_place(centres, config["x"], config["y"], about["pitch"], um)
    panels = {"raw features": (centres, similarity(raw, chosen))}
    if config["context"]:
        own, _, _ = open_features(config["context"], "context")
        read, where, _ = open_features(config["context"])
        if not (np.array_equal(read, raw) and np.array_equal(where, centres)):
            raise ValueError(f"{config['context']}: context of another slide or other features than "
                             f"{config['features']}; give the file that context.py --task=embed made of that one")
        panels["features in context"] = (centres, similarity(own, chosen))
    return panels, centres[chosen], "similarity to the black square"


def draw(thumbnail, extent, panels, chosen, label, side, out, title):
    """Write the picture: the thumbnail (h, w, 3) of extent (w, h) um, then each panel over it, and a scale bar."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    width, height = extent
    count = len(panels) + 1
    figure, axes = plt.subplots(1, count, figsize=(4.5 * count, 4.5 * height / width + 0.9), layout="constrained")
    low, high = (0, 1) if label == "score" else (-1, 1)
    for axis, name in zip(axes, ("slide", *panels)):
        grey = name in panels  # the stain's colours would mix with the map's
        axis.imshow(thumbnail.mean(2) if grey else thumbnail, "gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        if name in panels:
            places, values = panels[name]
            squares = [Rectangle(place - side / 2, side, side) for place in places]
            drawn = PatchCollection(squares, cmap="viridis" if low == 0 else "coolwarm", alpha=0.6, linewidth=0)
            drawn.set_array(values)
            drawn.set_clim(low, high)
            axis.add_collection(drawn)
        if chosen is not None:
            corner = chosen - side / 2
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=2))
        um, text = scale_bar(width / 4)
        axis.plot([0, um], [1.03 * height] * 2, color="black", linewidth=3, clip_on=False)  # below the slide
        axis.text(um * 1.1, 1.03 * height, text, va="center")
        axis.set_title(name)
        axis.set_axis_off()
    figure.suptitle(title)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    plt.close(figure)




def main(config):
    if not config["slide"] or not config["features"]:
        raise ValueError("give --slide=FILE and --features=FILE")
    _, centres, about = open_features(config["features"])
    with closing(wsi.Slide(config["slide"], about.get("level0_mpp"))) as opened:
        um, size = opened.mpp, opened.dimensions
        stated = about.get("level0_width", size[0]), about.get("level0_height", size[1])
        if stated != size or Path(config["slide"]).stem != Path(config["features"]).stem:
            raise ValueError(f"{config['features']}: features of another slide than {config['slide']}")
        thumbnail, _, cell = opened.thumbnail(um * max(max(size) / PICTURE_PX, 1))
    panels, chosen, label = panels_of(config, centres, um)
    extent = np.multiply(thumbnail.shape[1::-1], cell) * um  # of what was read; levels may end before the slide does
    name, text = Path(config["slide"]).name, f"{len(centres)} places"
    if chosen is not None:
        x, y = np.rint(chosen / um)
        text += f"; the black square has its centre at x={x:.0f}, y={y:.0f}"
    draw(thumbnail, extent, panels, chosen, label, about["side"], config["out"], f"{name}: {text}")
    print(f"{config['out']}: {', '.join(panels)} of {text}")


if __name__ == "__main__":
    run("heatmap", main, configure(globals()))
