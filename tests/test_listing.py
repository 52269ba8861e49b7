"""Which files a key names, and which of them are one slide; the bar of those that are done."""
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line
from test_report import keys, rows_in
from test_tiles import write

import eval_slides
import listing
import wsi
from prepare import report, slides


def element(group, number, vr, value):
    """A DICOM data element, explicit and little endian; a list of elements is a sequence with an item for each."""
    if vr == "SQ":
        value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in value)
    elif vr in ("US", "UL"):
        value = struct.pack("<H" if vr == "US" else "<I", value)
    elif vr != "OB":
        value = value.encode() + (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    long = vr in ("OB", "SQ")
    length = struct.pack("<xxI" if long else "<H", len(value))
    return struct.pack("<HH2s", group, number, vr.encode()) + length + value


def write_dicom(path, side, series, number, kind="ORIGINAL\\PRIMARY\\VOLUME\\NONE"):
    """A file of a series: random pixels in tiles of 256, a slide of 256 um."""
    sop, uid, mm = "1.2.840.10008.5.1.4.1.1.77.1.6", f"{series}.{number}", f"{0.256 / side:.6f}"
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8).tobytes()
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", sop) + element(2, 3, "UI", uid)
    meta += element(2, 0x10, "UI", "1.2.840.10008.1.2.1") + element(2, 0x12, "UI", "1.2.3")
    measures = element(0x28, 0x9110, "SQ", [element(0x28, 0x30, "DS", f"{mm}\\{mm}")])
    body = [element(8, 8, "CS", kind), element(8, 0x16, "UI", sop), element(8, 0x18, "UI", uid),
            element(8, 0x60, "CS", "SM"), element(0x20, 0xD, "UI", "1.2.9"), element(0x20, 0xE, "UI", series),
            element(0x20, 0x9311, "CS", "TILED_FULL"), element(0x28, 2, "US", 3), element(0x28, 4, "CS", "RGB"),
            element(0x28, 6, "US", 0), element(0x28, 8, "IS", str(side ** 2 // 256 ** 2)),
            *(element(0x28, n, "US", 256) for n in (0x10, 0x11)),
            *(element(0x28, n, "US", value) for n, value in ((0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0))),
            *(element(0x48, n, "UL", side) for n in (6, 7)), element(0x5200, 0x9229, "SQ", [measures]),
            element(0x7FE0, 0x10, "OB", pixels)]
    Path(path).write_bytes(bytes(128) + b"DICM" + element(2, 0, "UL", len(meta)) + meta + b"".join(body))


def test_a_dicom_series_is_one_slide_and_so_is_one_of_two_names(tmp_path):
    """The bug: each level and the label drawn as a slide of its own, on both sides of holdout."""
    for series in (1, 2):
        write_dicom(tmp_path / f"{series}_b.dcm", 512, f"1.2.{series}", 0)
        write_dicom(tmp_path / f"{series}_a.dcm", 256, f"1.2.{series}", 1, "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED")
        write_dicom(tmp_path / f"{series}_c.dcm", 256, f"1.2.{series}", 2, "ORIGINAL\\PRIMARY\\LABEL\\NONE")
    (tmp_path / "x.svs").touch()
    os.link(tmp_path / "x.svs", tmp_path / "y.svs")
    (tmp_path / "z.svs").symlink_to("x.svs")
    found = slides.slides_of(keys(f"{tmp_path}/*.*", tmp_path / "out"), {})
    assert list(found.values()) == ["1_a", "2_a", "x"]
    assert wsi.Slide(f"{tmp_path}/1_a.dcm").level_mpp == [0.5, 1.0], "any of its files opens all"


def test_levels_of_a_series_in_two_folders_are_named_and_the_finest_one_serves(tmp_path):
    """The bug: the first folder by name won, and the other's levels were called the same slide."""
    for folder, side, number in (("b", 1024, 0), ("a", 512, 1), ("a", 256, 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if folder == "b" else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
        write_dicom(tmp_path / folder / f"{number}.dcm", side, "1.2.1", number, kind)
    left_out, finest = {}, f"{tmp_path}/b/0.dcm"
    assert wsi.one_each(sorted(map(str, tmp_path.rglob("*.dcm"))), left_out) == [finest]
    assert left_out.keys() == {f"{tmp_path}/a/1.dcm", f"{tmp_path}/a/2.dcm"}
    assert all(reason.startswith(f"levels of {finest} in another folder; ") for reason in left_out.values())


@pytest.mark.parametrize("pattern, names", [
    (".cache/*.svs", [".cache/a"]), (".ca*/*", [".cache/a"]), (".*/**/*.svs", [".cache/a", ".cache/x/c"]),
    ("**/*.svs", ["d/*", "d/a?", "d/ab"]), ("d/a?.svs", ["d/a?", "d/ab"]), ("d/.*", ["d/.h"])])
def test_what_a_pattern_names_counts_be_it_hidden_or_of_odd_letters(pattern, names, tmp_path, monkeypatch):
    """The bugs: a file called *.svs, which `touch *.svs` makes, was the only one; hidden folders never matched."""
    monkeypatch.chdir(tmp_path)
    for name in (".cache/a", ".cache/.b", ".cache/x/c", "d/*", "d/ab", "d/a?", "d/.h"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{name}.svs").touch()
    assert listing.find(pattern, "slides") == ([f"{name}.svs" for name in names], {})
    with one_line(r"no file matches \{d,e\}/\*.svs; \{a,b\} is the shell's alone"):
        listing.find("{d,e}/*.svs", "slides")


def test_folders_of_a_systems_own_count_only_where_they_are_named(tmp_path):
    """The bug: of a NAS, the previews in @eaDir were tiles, and what had been deleted was too."""
    for folder in ("@eaDir/b.png", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX", "a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").touch()
    assert listing.find(str(tmp_path), "tiles", (".png",)) == ([f"{tmp_path}/a/x.png"], {})
    assert listing.find(f"{tmp_path}/*/*.png", "slides")[0] == [f"{tmp_path}/a/x.png"]
    assert listing.find(f"{tmp_path}/lost+found/*.png", "slides")[0] == [f"{tmp_path}/lost+found/x.png"]


def test_brackets_are_of_a_name_where_there_is_such_a_name(tmp_path):
    for name in ("batch[1]", "batch2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.svs").touch()
    assert listing.find(f"{tmp_path}/batch[1]/*.svs", "slides") == ([f"{tmp_path}/batch[1]/a.svs"], {})
    assert listing.find(f"{tmp_path}/batch[1]", "tiles", (".svs",))[0] == [f"{tmp_path}/batch[1]/a.svs"]
    assert listing.find(f"{tmp_path}/batch[2]/*", "slides")[0] == [f"{tmp_path}/batch2/a.svs"]
    with one_line(r"slides: no file matches .*batch\[3\]/\*; \[ begins a set of characters there: write \[\[\]"):
        listing.find(f"{tmp_path}/batch[3]/*", "slides")


def test_of_a_folder_the_pattern_for_its_files_is_told(tmp_path):
    """The bug: '*.svs', whatever was in it."""
    with one_line(f"slides: no file matches .*; it is a folder: try '{tmp_path}/\\*\\*/\\*.svs'$"):
        listing.find(str(tmp_path), "slides")
    for name in ("a.tif", "b.tif", "c.ndpi"):
        (tmp_path / name).touch()
    with one_line(f"it is a folder: try '{tmp_path}/\\*.ndpi' or '{tmp_path}/\\*.tif'$"):
        listing.find(str(tmp_path), "slides")


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.svs").touch()
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    found, left_out = listing.find(f"{tmp_path}/**/*.svs", "slides")
    assert found == [f"{tmp_path}/a.svs"] and left_out == {f"{tmp_path}/closed": "cannot be listed: Permission denied"}
    with one_line("no file matches .*closed/.*; left out: .*closed: cannot be listed: Permission denied"):
        listing.find(f"{tmp_path}/closed/*.svs", "slides")
    with one_line("closed: cannot be listed: Permission denied"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b/a.png").touch()
        eval_slides.find_images(str(tmp_path))


def test_a_name_that_is_not_utf8_costs_its_own_slide_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.rename(write("b.tif"), b"in/\xe9.tif")
    write("a.tif")
    report.main(keys("in/*", tmp_path / "out", workers=0))
    rows = {row["name"]: row["error"] for row in rows_in(tmp_path / "out/report.csv")}
    assert rows == {"a": "", r"\udce9": "its name is not UTF-8; rename it"}
    assert r"left out: in/\udce9.tif: its name is not UTF-8; rename it" in capsys.readouterr().out


def test_what_is_left_out_is_said_in_part_and_listed_in_whole(tmp_path):
    said, file = [], tmp_path / "left_out.csv"
    listing.say_left_out({}, said.append, file)
    assert not said and not file.exists()
    listing.say_left_out({f"{i}.svs": f"{i}.svs: cut, short" for i in range(30)}, said.append, file)
    assert said[0] == "left out: 0.svs: cut, short" and said[20:] == [f"left out: 10 more, see {file}"]
    assert file.read_text().splitlines()[:2] == ["path,reason", '0.svs,"cut, short"'] and len(said) == 21
    listing.say_left_out({}, said.append, file)
    assert file.read_text() == "path,reason\n", "a resumed run can use them all"


@pytest.mark.parametrize("columns, width", [(80, 80), (50, 50), (0, 80)])
def test_a_bar_is_as_wide_as_its_terminal(columns, width):
    """The bug: of a terminal that does not tell its size, as in a container, the bar was not seen at all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", columns and 24, columns, 0, 0))
    code = "import listing, time\nfor _ in listing.bar(range(3), 'slides'): time.sleep(0.11)"
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    bars = re.split("[\r\n]+", os.read(ours, 10_000).decode())
    os.close(ours)
    assert any(" 3/3 [" in bar for bar in bars) and set(map(len, bars)) - {0} == {width}, bars


def test_a_bar_in_a_log_is_a_line_per_minute(capsys):
    for _ in listing.bar(range(4), "slides"):
        time.sleep(0.11)
    said = capsys.readouterr().err
    assert re.findall(r"\rslides: +(\d+)%\| (\d)/4 \[.*\]\n", said) == [("0", "0"), ("100", "4")], said
    assert said.count("%") == 2
