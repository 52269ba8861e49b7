"""Reports: rows that survive bad slides, defects; pictures: lines in the right place."""
import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_wsi import GLASS, PINK, SLIDES, mottled, pyramid, real_slides, texture, toy_slide, write_slide

import wsi
from configurator import configure
from prepare import report, slides

APERIO = "Aperio Image Library v12|AppMag = {}|MPP = {}|ScanScope ID = SS1234"
GROUND = 2 * report.LINE  # px of a picture above its first panel: headline, title


def keys(pattern, out, **changes):
    """The report's keys with their defaults, except for the scales."""
    config = configure({**vars(slides), **vars(report)}, [])
    return config | {"slides": str(pattern), "out": str(out), "mpps": (0.25, 0.5, 1.0)} | changes


def row_of(path, **changes):
    return report.slide_row(str(path), Path(path).stem, keys(path, "", **changes))


def rows_in(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def test_the_report_has_a_row_per_slide_in_order_with_the_slides_own_numbers(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    image = mottled(1024, 900)
    for name, power in (("TCGA-AB-1234-01Z.svs", 20), ("b.svs", 40)):
        write_slide(tmp_path / "in" / name, pyramid(image, 3.3), description=APERIO.format(power, 0.5))
    (tmp_path / "in" / "a.svs").write_bytes(b"no slide")
    write_slide(tmp_path / "in" / "c.tif", [image])
    (tmp_path / "in/gone.tif").symlink_to("nowhere.tif")
    report.main(keys(tmp_path / "in/*", tmp_path / "out"))
    good, junk, contradiction, bare, gone = rows_in(tmp_path / "out/report.csv")
    expected = dict(
        name="TCGA-AB-1234-01Z", patient="TCGA-AB-1234", vendor="aperio", scanner="SS1234", width="1024", height="900",
        mpp_x="0.5", mpp_y="0.5", mpp_source="openslide.mpp-x", objective_power="20",
        level_factors="1 3.306", tissue_share="1.0", tissue_mm2="0.233", tiles_1="4", error="", defects="")
    expected |= {"tiles_0.25": "", "tiles_0.5": "16"}
    assert {key: good[key] for key in expected} == expected
    assert "not a slide" in junk["error"] and (junk["width"], junk["name"], junk["patient"]) == ("", "a", "a")
    assert (contradiction["mpp_x"], contradiction["objective_power"]) == ("", "40")
    assert "gives 0.5 um/px, but an objective of 40x" in contradiction["error"]
    assert contradiction["level_factors"] == "1 3.306"
    assert (bare["vendor"], bare["width"], bare["mpp_x"]) == ("generic-tiff", "1024", "")
    assert (gone["slide"], gone["name"]) == (f"{tmp_path}/in/gone.tif", "gone")
    assert gone["error"] == "a link to nowhere.tif: No such file or directory"
    assert "no usable mpp" in bare["error"] and "\n" not in bare["error"] + contradiction["error"] + junk["error"]
    printed = capsys.readouterr().out
    assert "1 of 5 slides usable" in printed and ": a: not a slide" in printed
    assert any(line.split() == "SS1234 0.500 20 1 0 0.233 0 16 4".split() for line in printed.splitlines())
    assert os.listdir(tmp_path / "out") == ["report.csv"]  # no unfinished file is left
    with pytest.raises(ValueError, match="slides: no file matches .*none"):
        report.main(keys(tmp_path / "none*.svs", tmp_path))
    report.main(keys(tmp_path / "in/*", tmp_path / "out", part="2/2"))
    assert [row["name"] for row in rows_in(tmp_path / "out/report.2of2.csv")] == ["a", "c"]


def kill_itself_on_b(path, name, config):
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return report.new_row(path, name, config) | {"vendor": "read"}


def test_a_killed_worker_costs_its_own_slide_and_no_other(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.svs").write_bytes(b"")
    monkeypatch.setattr(report, "slide_row", kill_itself_on_b)
    report.main(keys(tmp_path / "*.svs", tmp_path / "out"))
    rows = rows_in(tmp_path / "out/report.csv")
    assert [(row["name"], row["vendor"]) for row in rows] == [("a", "read"), ("b", ""), ("c", "read"), ("d", "read")]
    assert "its process died: Killed" in rows[1]["error"] and rows[1]["slide"] == str(tmp_path / "b.svs")


def test_what_goes_wrong_is_an_error_with_the_rest_of_the_row(tmp_path, monkeypatch):
    whole = write_slide(tmp_path / "cut.tif", [texture(1500, 1500)], (0.5, 0.5))
    os.truncate(whole, os.path.getsize(whole) // 2)
    row = row_of(whole)
    assert "damaged" in row["defects"] and row["width"] == 1500 and row["mpp_x"] == 0.5
    image = mottled(2048, 2048)
    lie = write_slide(tmp_path / "lie.tif", [image, np.ascontiguousarray(image[:512, :512][::-1])], (0.5, 0.5))
    row = row_of(lie)
    assert "level 1 does not show" in row["defects"] and row["level_factors"] == "1 4" and row["error"] == ""
    monkeypatch.setattr(report, "scan_defects", lambda rgb: 1 / 0)  # what nobody has foreseen
    row = row_of(lie)
    assert row["error"] == "ZeroDivisionError: division by zero" and row["width"] == 2048 and row["mpp_x"] == 0.5


def test_pen_is_found_with_its_share_and_a_clean_slide_has_no_defects(tmp_path):
    toy_slide(tmp_path / "pen.tif", factors=(4,))
    row = row_of(tmp_path / "pen.tif")
    assert row["defects"].startswith("pen ") and float(row["defects"].split()[1]) == pytest.approx(13.1, abs=1)
    toy_slide(tmp_path / "glass.tif", tissue=False)
    row = row_of(tmp_path / "glass.tif")
    assert row["defects"].endswith("; no tissue") and (row["tissue_share"], row["tiles_0.5"]) == (0, 0)
    assert row["error"] == "" and row["sharpness"] == ""


def test_black_is_told_from_pen(tmp_path):
    image = np.full((1024, 2048, 3), GLASS, np.uint8)
    image[300:700, 600:1600] = mottled(1000, 400)
    image[:, :256] = 5
    row = row_of(write_slide(tmp_path / "border.tif", [image], (0.5, 0.5)))
    assert row["defects"].startswith("black 12.5 %") and "pen" not in row["defects"]
    row = row_of(write_slide(tmp_path / "dark.tif", [np.zeros((640, 640, 3), np.uint8)], (0.5, 0.5)))
    assert row["defects"] == "black 100.0 %; no tissue"
    fluorescent = np.zeros((10, 10, 3), np.uint8)
    fluorescent[:4] = 0, 0, 200
    found = report.scan_defects(fluorescent)
    assert found["black"].mean() == 0.6 and not found["pen"].any()


def test_a_slide_out_of_focus_is_called_blurred(tmp_path):
    sharp = np.repeat(mottled(256, 256), 8, 0).repeat(8, 1)
    soft = np.full((2048, 2048, 3), PINK, np.uint8)
    rows = [row_of(write_slide(tmp_path / f"{i}.tif", [image], (0.5, 0.5))) for i, image in enumerate((sharp, soft))]
    assert "blurred" not in rows[0]["defects"] and rows[1]["defects"] == "blurred"
    assert rows[0]["sharpness"] > 50 > rows[1]["sharpness"]


# pictures

def picture_of(tmp_path, image, mpp, **changes):
    path = write_slide(tmp_path / "slide.tif", pyramid(image, 4), mpp)
    row, = report.main(keys(path, tmp_path / "out", pictures=True, workers=0, **changes))
    assert not row["error"]
    return wsi.Slide(path), np.asarray(Image.open(tmp_path / "out/slide.png"))


def near(picture, colour, reach=3):
    return np.abs(picture.astype(int) - colour).sum(-1) < reach


def box_of(marked):
    """(left, right, top, bottom) of what is true."""
    rows, columns = np.nonzero(marked)
    return np.array([columns.min(), columns.max() + 1, rows.min(), rows.max() + 1])


@pytest.mark.parametrize("mpp", [(0.5, 0.5), (0.5, 0.25)])
def test_a_picture_shows_tiles_tissue_and_a_scale_bar_where_they_are(tmp_path, mpp):
    image = np.full((1200, 1600, 3), 255, np.uint8)
    image[320:832, 512:1024] = mottled(512, 512)
    slide, picture = picture_of(tmp_path, image, mpp, mpps=(1.0,), tile_px=64)
    um = 0.5  # per px of the picture, both ways
    height = round(1200 * mpp[1] / um)
    panel = picture[GROUND:GROUND + height, :1600]
    xy, _ = slide.grid(64, 1.0)
    shaded = np.zeros(panel.shape[:2], bool)
    for left, top in np.rint(xy * mpp / um).astype(int):
        shaded[top:top + 129, left:left + 129] = True
        for line in (panel[top:top + 128, left], panel[top, left:left + 128], panel[top:top + 128, left + 128]):
            assert (near(line, report.LINES) | near(line, (0, 0, 0))).mean() > 0.95
    white = near(panel, (255, 255, 255))
    assert len(xy) > 9 and not white[shaded].any() and not near(panel[~shaded], report.LINES).any()
    truth = np.array([512, 1024, 320, 832]) * np.repeat(mpp, 2)
    assert np.abs(box_of(near(panel, (0, 0, 0))) * um - truth).max() < 20, "the outline is not where the tissue is"
    legend = picture[GROUND + height:]
    left, right, top, bottom = box_of(near(legend[:report.LINE, :410], (0, 0, 0)))
    assert (right - left, bottom - top) == (200 / um, 8)  # the slide is 800 um wide: 200 are at most a third of it


def test_a_picture_shows_every_scale_asked_for_and_says_which_the_slide_has_not(tmp_path, monkeypatch):
    panels = {}
    arranged = report.arranged
    monkeypatch.setattr(report, "arranged", lambda *parts: panels.update(parts[1]) or arranged(*parts))
    _, picture = picture_of(tmp_path, mottled(800, 800), (0.5, 0.5), mpps=(0.25, 0.5, 1.0, 2.0), tile_px=100)
    titles = ["0.25 um/px: none, level 0 is coarser", "0.5 um/px: 64 tiles of 100 px, 50 um wide",
              "1 um/px: 16 tiles of 100 px, 100 um wide", "2 um/px: 4 tiles of 100 px, 200 um wide"]
    assert list(panels) == titles
    shaded = [near(np.asarray(panel), report.LINES).any() for panel in panels.values()]
    assert shaded == [False, True, True, True]
    assert min(picture.shape[:2]) > 2 * 800  # two rows of two


def test_pen_is_hatched_and_no_pen_has_the_colours_of_the_drawing(tmp_path):
    colours = {"green": (35, 140, 80), "blue": (30, 60, 200)}
    image = np.full((600, 1200, 3), GLASS, np.uint8)
    image[100:500, 100:500] = mottled(400, 400)
    for i, colour in enumerate(colours.values()):
        image[64:512, 640 + 256 * i:768 + 256 * i] = colour
    _, picture = picture_of(tmp_path, image, (0.5, 0.5), mpps=(0.5,))
    panel = picture[GROUND:GROUND + 600, :1200]
    for i in range(2):
        stroke = panel[80:500, 670 + 256 * i:740 + 256 * i]
        for colour in ((0, 0, 0), (255, 255, 255)):
            assert near(stroke, colour).mean() == pytest.approx(1 / 6, abs=0.02), "two of 12 px"
    found = report.scan_defects(np.array([[report.LINES, report.SHADE[:3]]], np.uint8))
    assert not found["pen"].any() and not found["black"].any()


@pytest.mark.parametrize("limit, bar", [(1700, (1000, "1 mm")), (999, (500, "500 um")), (50, (50, "50 um"))])
def test_a_scale_bar_has_the_longest_round_length(limit, bar):
    assert report.scale_bar(limit) == bar


def test_a_small_slide_is_not_enlarged_and_no_text_is_cut(tmp_path):
    _, picture = picture_of(tmp_path, mottled(200, 300), (0.5, 0.5), mpps=(0.5,))
    assert picture.shape[1] > 300 and near(picture[GROUND:GROUND + 300, 200:], (255, 255, 255), 1).all()
    assert near(picture[:, -4:], (255, 255, 255), 1).all()


def test_patients_are_counted_by_the_pattern_and_slides_without_one_are_said(capsys):
    rows = [report.new_row(f"in/{name}.svs", name, keys("", "")) for name in ("TCGA-AB-1234-a", "TCGA-AB-1234-b", "c")]
    report.summary(rows, keys("", ""))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("{4}: 1; slides that tell none: 1, each counts as one")


@real_slides
def test_the_real_slides_are_told_apart(tmp_path):
    rows = {row["name"]: row for row in report.main(keys(SLIDES / "*", tmp_path))}
    assert rows["cmu1-4x-pyramid"]["level_factors"] == "1 4.002 16.06"
    assert rows["CMU-1-Small-Region"]["tiles_0.25"] == "" and rows["CMU-1-Small-Region"]["tiles_0.5"] > 20
    assert "no tissue" in rows["hamamatsu-fluorescence"]["defects"] and rows["hamamatsu-fluorescence"]["error"] == ""
    assert "no usable mpp" in rows["tcga-cr-7395-01a-01-ts1"]["error"]
    assert rows["tcga-cr-7395-01a-01-ts1"]["vendor"] == "aperio"
