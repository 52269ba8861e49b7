"""Slides: the mpp, the level that serves it, pixels, edges, tissue; on TIFFs written here and on real slides."""
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

import wsi
from wsi import Slide, SlideError, find_mpp, is_tissue

SLIDES = Path(__file__).parents[1] / "../shared/data/slides"
real_slides = pytest.mark.skipif(not SLIDES.is_dir(), reason="the real slides are not in ../shared/data/slides")


def write_slide(path, levels, mpp=None, description=None):
    """A tiled, uncompressed TIFF of uint8 (h, w, 3) levels; an Aperio slide if the description says so."""
    tifffile = pytest.importorskip("tifffile")
    resolution = {} if mpp is None else dict(resolution=[1e4 / m for m in mpp], resolutionunit="CENTIMETER")
    with tifffile.TiffWriter(path) as tif:
        for i, level in enumerate(levels):
            tif.write(level, tile=(256, 256), photometric="rgb", subfiletype=int(i > 0), metadata=None, software=False,
                      description=description, **resolution)
    return str(path)


def pyramid(image, *factors):
    """The image and shrunk copies, sizes floored as scanners do, so that W0 / Wl is a little above the factor."""
    h, w = image.shape[:2]
    sizes = [(int(w / f), int(h / f)) for f in factors]
    return [image] + [np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR)) for size in sizes]


def texture(w, h):
    """Smooth colour noise, never white."""
    noise = np.random.default_rng(0).integers(0, 200, (h // 8 + 1, w // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((w, h), Image.BICUBIC).point(lambda v: min(v, 220)))


def open_texture(tmp_path, *factors, mpp=(0.25, 0.25), size=(1024, 900), stated=None):
    levels = pyramid(texture(*size), *factors)
    return Slide(write_slide(tmp_path / "texture.tif", levels, mpp), stated), levels


def refused(path, **arguments):
    """The one line that refuses a slide; it names the file."""
    with pytest.raises(SlideError) as error:
        Slide(path, **arguments)
    message = str(error.value)
    assert str(path) in message and "\n" not in message, message
    return message


# mpp

OPENSLIDE = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
TIFF = {"tiff.XResolution": "20000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
JUNK = {"tiff.XResolution": "72", "tiff.YResolution": "72", "tiff.ResolutionUnit": "inch"}
MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"


@pytest.mark.parametrize("properties, override, expected", [
    (OPENSLIDE | TIFF, 0.4, (0.4, 0.4, "stated")),
    (OPENSLIDE | TIFF | {"aperio.MPP": "0.5"}, None, (0.25, 0.26, "openslide.mpp-x")),
    ({"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,26"}, None, (0.25, 0.26, "openslide.mpp-x")),
    ({"openslide.mpp-x": "0.25"}, None, (0.25, 0.25, "openslide.mpp-x")),
    ({"openslide.mpp-x": "353", "openslide.mpp-y": "353", "aperio.MPP": "0,5010"}, None, (0.501, 0.501, "aperio.MPP")),
    ({"openslide.mpp-x": "unknown"} | TIFF, None, (0.5, 0.25, "tiff.XResolution")),
    ({MIRAX + "X": "0.23", MIRAX + "Y": "0.24"} | TIFF, None, (0.23, 0.24, MIRAX + "X")),
    ({"ventana.ScanRes": "0.465"}, None, (0.465, 0.465, "ventana.ScanRes")),
    ({"tiff.XResolution": "50800,0", "tiff.ResolutionUnit": "Inch"}, None, (0.5, 0.5, "tiff.XResolution")),
    (JUNK, "0,5", (0.5, 0.5, "stated")),
    (OPENSLIDE | {"openslide.objective-power": "40.000000"}, None, (0.25, 0.26, "openslide.mpp-x")),
    (OPENSLIDE | {"openslide.objective-power": "0"}, None, (0.25, 0.26, "openslide.mpp-x")),
    (OPENSLIDE | {"openslide.objective-power": "20"}, 0.25, (0.25, 0.25, "stated")),
])
def test_mpp_comes_from_the_first_source_that_is_believable(properties, override, expected):
    *mpp, source = find_mpp(properties, override)
    assert source == expected[2] and mpp == pytest.approx(expected[:2])


@pytest.mark.parametrize("properties", [
    {},
    JUNK,                                                             # 72 dpi, what image editors write
    TIFF | {"tiff.ResolutionUnit": "none"},
    {"tiff.XResolution": "20000"},                                    # no unit at all
    {"tiff.XResolution": "0.5", "tiff.ResolutionUnit": "inch"},       # trestle keeps the mpp itself in this tag
    {"tiff.XResolution": "0", "tiff.ResolutionUnit": "centimeter"},
    {"openslide.mpp-x": "nan"}, {"openslide.mpp-x": "0"}, {"openslide.mpp-x": "-0.25"}, {"openslide.mpp-x": ""},
    {"openslide.mpp-x": "0.25", "openslide.mpp-y": "250"},            # half a pair of junk is junk
    {"openslide.objective-power": "40"},                              # never a source: 40x is 0.22 to 0.28
])
def test_without_a_believable_mpp_the_error_lists_what_was_seen_and_the_remedy(properties):
    with pytest.raises(SlideError) as error:
        find_mpp(properties)
    for key, value in properties.items():
        assert f"{key}={value}" in str(error.value)
    assert properties or "properties seen: none" in str(error.value)
    assert "mpp=..." in str(error.value) and "--slide_mpp=..." in str(error.value)


@pytest.mark.parametrize("power, ok", [("20", False), ("30", True), ("40", True), ("50", True), ("60", False)])
def test_an_objective_power_that_contradicts_the_mpp_is_an_error(power, ok):
    properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "openslide.objective-power": power}
    if ok:
        assert find_mpp(properties)[0] == 0.25
    else:
        with pytest.raises(SlideError, match=f"objective of {float(power):g}x.*objective-power={power}.*mpp=..."):
            find_mpp(properties)


@pytest.mark.parametrize("stated", [0, 0.01, 40, -0.5, float("nan"), "fine"])
def test_a_stated_mpp_out_of_range_is_an_error(stated):
    with pytest.raises(SlideError, match="stated mpp="):
        find_mpp(OPENSLIDE, stated)


def test_a_slide_without_mpp_is_refused_and_opens_when_the_mpp_is_stated(tmp_path):
    path = write_slide(tmp_path / "bare.tif", [texture(600, 500)])
    assert "no usable mpp" in refused(path)
    slide = Slide(path, mpp=0.5)
    assert (slide.mpp, slide.mpp_xy, slide.mpp_source) == (0.5, (0.5, 0.5), "stated")
    assert slide.dimensions == (600, 500) and slide.level_mpp == [0.5] and slide.path == path


def test_an_aperio_slide_opens_with_its_mpp_and_is_refused_if_its_objective_contradicts_it(tmp_path):
    aperio = "Aperio Image Library v12|AppMag = {}|MPP = {}"
    levels = pyramid(texture(1024, 900), 2)
    slide = Slide(write_slide(tmp_path / "a.svs", levels, description=aperio.format(40, 0.25)))
    assert slide.properties["openslide.vendor"] == "aperio" and slide.mpp == 0.25 and slide.level_mpp == [0.25, 0.5]
    path = write_slide(tmp_path / "b.svs", levels, description=aperio.format(40, 0.5))
    assert "objective of 40x is about 0.25" in refused(path)
    assert Slide(path, mpp=0.5).mpp == 0.5
    assert Slide(write_slide(tmp_path / "c.svs", levels, description=aperio.format("20.000000", "0,5"))).mpp == 0.5


# levels

@pytest.mark.parametrize("factors, mpp, target, level, extent", [
    ((2, 4, 8), (0.25, 0.25), 0.5, 1, (100, 100)),        # as stored
    ((2, 4, 8), (0.25, 0.25), 0.25, 0, (100, 100)),
    ((2, 4, 8), (0.25, 0.25), 0.4, 0, (160, 160)),        # read 1.6 times the pixels and shrink
    ((2, 4, 8), (0.25, 0.25), 100, 3, (5000, 5000)),
    ((4,), (0.25, 0.25), 0.5, 0, (200, 200)),             # the usual 40x Aperio pyramid has no 20x level
    ((4,), (0.25, 0.25), 1.5, 1, (150, 150)),
    ((4, 8, 32), (0.25, 0.25), 4.0, 2, (200, 200)),       # mixed steps
    ((), (0.25, 0.25), 2.0, 0, (800, 800)),               # one level
    ((2.0005,), (0.25, 0.25), 0.5, 1, (100, 100)),        # a tolerance, or four times the pixels
    ((2,), (0.2528, 0.2528), 0.5, 1, (100, 100)),         # 1.1 % off
    ((2,), (0.26, 0.26), 0.5, 0, (100 / 0.52, 100 / 0.52)),  # 4 % off: the finer level, shrunk
    ((2,), (0.25, 0.28), 0.5, 0, (200, 100 / 0.56)),      # the level must be fine enough on both axes
    ((2,), (0.5, 0.4), 1.0, 1, (100, 125)),
    ((), (0.54, 0.54), 0.5, 0, (100 / 1.08, 100 / 1.08)), # enlarged, by less than 10 %
])
def test_the_coarsest_level_that_is_fine_enough_serves_a_target(tmp_path, factors, mpp, target, level, extent):
    slide, _ = open_texture(tmp_path, *factors, mpp=mpp, size=(8000, 64))
    slide.level_scale = [(sx, sx) for sx, _ in slide.level_scale]  # the height is too small for exact factors
    plan_level, *plan_extent = slide._plan(100, target)
    assert plan_level == level and plan_extent == pytest.approx(extent, rel=2e-4)


def test_a_target_finer_than_the_slide_is_an_error_that_names_both(tmp_path):
    slide, _ = open_texture(tmp_path, 2, mpp=(0.5, 0.5))
    assert slide.read(0, 0, 64, 0.46).shape == (64, 64, 3)
    with pytest.raises(SlideError, match=r"texture.tif: asked for 0.25 um/px, but the slide has 0.5 .*0.4545"):
        slide.read(0, 0, 64, 0.25)


@pytest.mark.parametrize("mpp, factors", [
    ((0.25, 0.25), (2, 4, 8)), ((0.25, 0.25), (4,)), ((0.25, 0.25), ()), ((0.31, 0.31), (2.9, 6.1)),
    ((0.25, 0.25), (2.001, 4.006)), ((0.25, 0.28), (2, 4)), ((0.35, 0.29), (3.3,))])
def test_a_pattern_of_known_micrometres_has_its_size_at_every_mpp(tmp_path, mpp, factors):
    period = 24.0  # um
    x_um, y_um = np.arange(1536) * mpp[0], np.arange(1536) * mpp[1]
    wave = 128 + 50 * np.sin(2 * np.pi * x_um / period)[None] + 50 * np.sin(2 * np.pi * y_um / period)[:, None]
    levels = pyramid(np.repeat(wave.astype(np.uint8)[..., None], 3, axis=2), *factors)
    slide = Slide(write_slide(tmp_path / "wave.tif", levels, mpp))
    for target in (0.37, 0.5, 1.0, 2.0):
        tile = slide.read(8, 8, int(1500 * min(mpp) / target), target)[..., 1].astype(float)
        for axis in (0, 1):
            profile = tile.mean(axis) - tile.mean()
            spectrum = np.abs(np.fft.rfft(profile * np.hanning(len(profile)), 1 << 16))
            measured = (1 << 16) / spectrum.argmax() * target
            assert measured == pytest.approx(period, rel=0.01), (target, "xy"[axis])


def test_tiles_are_the_stored_pixels_and_can_be_written_to(tmp_path):
    slide, levels = open_texture(tmp_path, 2, 4)
    tile = slide.read(100, 60, 128, 0.25)
    assert tile.dtype == np.uint8 and tile.shape == (128, 128, 3) and tile.flags.writeable
    assert np.array_equal(tile, levels[0][60:188, 100:228])
    assert np.array_equal(slide.read(np.int64(100), np.int64(60), 128, 0.5), levels[1][30:158, 50:178])
    assert np.array_equal(slide.read_level(100, 60, 128, 2), levels[2][15:143, 25:153])
    shrunk = np.asarray(Image.fromarray(levels[0][60:316, 100:356]).resize((160, 160), Image.BILINEAR))
    assert np.array_equal(slide.read(100, 60, 160, 0.4), shrunk)
    exact = Image.fromarray(levels[0][60:74, 100:114]).resize((10, 10), Image.BILINEAR, box=(0, 0, 13.2, 13.2))
    assert np.array_equal(slide.read(100, 60, 10, 0.33), exact)  # not 14 pixels squeezed into 10


def test_a_sample_list_with_a_level_that_the_slide_lacks_is_an_error(tmp_path):
    slide, _ = open_texture(tmp_path, 2)
    for level in (2, -1):
        with pytest.raises(SlideError, match=f"texture.tif: no level {level}, it has levels 0-1"):
            slide.read_level(0, 0, 64, level)


# white

@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dx, dy", [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (1, -1)])
def test_a_tile_over_the_edge_is_white_outside_and_unchanged_inside(tmp_path, level, dx, dy):
    slide, levels = open_texture(tmp_path, 2, 4, size=(1024, 896))
    stored, size, out = levels[level], 64, 24
    h, w = stored.shape[:2]
    left = {-1: -out, 0: 40, 1: w - size + out}[dx]  # of the tile, in level pixels
    top = {-1: -out, 0: 40, 1: h - size + out}[dy]
    padded = np.pad(stored, ((size, size), (size, size), (0, 0)), constant_values=255)
    expected = padded[top + size:top + 2 * size, left + size:left + 2 * size]
    scale = 2 ** level
    assert np.array_equal(slide.read_level(left * scale, top * scale, size, level), expected)
    assert np.array_equal(slide.read(left * scale, top * scale, size, 0.25 * scale), expected)


def test_an_odd_negative_start_at_a_low_level_agrees_with_an_ordinary_read(tmp_path):
    slide, _ = open_texture(tmp_path, 4)
    for x in (-37, -38, -39, -41):
        outside = -(x // 4)
        tile, inside = slide.read(x, 20, 64, 1.0), slide.read(x + 4 * outside, 20, 64 - outside, 1.0)
        assert (tile[:, :outside] == 255).all()
        assert np.array_equal(tile[:64 - outside, outside:], inside)


def test_shrunk_tiles_are_white_outside_too_and_a_tile_off_the_slide_is_all_white(tmp_path):
    slide, _ = open_texture(tmp_path, 4, size=(1024, 1024))
    tile = slide.read(-256, -256, 256, 0.5)  # half of it lies left of the slide
    assert (tile[:, :126] == 255).all() and (tile[:126] == 255).all() and tile[130:, 130:].max() < 255
    for x, y in ((-5000, 0), (0, 5000), (10 ** 6, -10 ** 6)):
        for mpp in (0.25, 0.5, 1.0, 1.3):
            assert (slide.read(x, y, 64, mpp) == 255).all()


def test_transparent_pixels_become_white_and_half_transparent_ones_lighter(tmp_path, monkeypatch):
    slide, levels = open_texture(tmp_path)
    read = openslide.OpenSlide.read_region

    def sparse(self, location, level, size):
        rgba = np.array(read(self, location, level, size))
        rgba[:, :32] = 0                        # never scanned, as in MRXS
        rgba[:, 32:40] = (100, 0, 200, 128)
        return Image.fromarray(rgba)
    monkeypatch.setattr(openslide.OpenSlide, "read_region", sparse)
    tile = slide.read(0, 0, 64, 0.25)
    assert (tile[:, :32] == 255).all() and np.array_equal(tile[:, 40:], levels[0][:64, 40:64])
    assert np.abs(tile[:, 32:40].astype(int) - (177, 127, 227)).max() <= 1


# damage, processes

def test_missing_junk_and_truncated_files_are_refused_by_name(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.svs")
    (tmp_path / "junk.svs").write_bytes(np.random.default_rng(0).bytes(10000))
    assert "not a slide that OpenSlide reads" in refused(tmp_path / "junk.svs")
    (tmp_path / "empty.svs").write_bytes(b"")
    assert "not a slide that OpenSlide reads" in refused(tmp_path / "empty.svs")
    whole = Path(write_slide(tmp_path / "whole.tif", [texture(1024, 900)], (0.25, 0.25))).read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[:100])
    refused(tmp_path / "cut.tif", mpp=0.25)


def test_a_truncated_slide_that_opens_fails_where_it_is_cut_and_reads_elsewhere(tmp_path):
    slide, levels = open_texture(tmp_path, size=(1500, 1500))  # OpenSlide reads all of a level up to 5 MB to open it
    data = Path(slide.path).read_bytes()
    Path(slide.path).write_bytes(data[:len(data) // 2])
    slide = Slide(slide.path)
    with pytest.raises(SlideError, match=r"texture.tif: cannot read x=10 y=1400 level=0: .*cut short"):
        slide.read(10, 1400, 64, 0.25)
    assert np.array_equal(slide.read(0, 0, 64, 0.25), levels[0][:64, :64])  # the failed handle was replaced


def test_a_read_that_fails_once_is_retried_on_a_new_handle(tmp_path, monkeypatch):
    slide, levels = open_texture(tmp_path)
    read, failed, opened, opener = openslide.OpenSlide.read_region, [], [], wsi._open

    def flaky(self, *arguments):
        failed.append(self)
        if self is failed[0]:
            raise openslide.OpenSlideError("latched")
        return read(self, *arguments)
    monkeypatch.setattr(openslide.OpenSlide, "read_region", flaky)
    monkeypatch.setattr(wsi, "_open", lambda path: opened.append(path) or opener(path))
    assert np.array_equal(slide.read(0, 0, 64, 0.25), levels[0][:64, :64])
    assert opened == [slide.path] and len(failed) == 2


def test_a_read_that_fails_twice_stops_with_file_place_and_level(tmp_path, monkeypatch):
    slide, _ = open_texture(tmp_path, 2)

    def broken(self, *arguments):
        raise openslide.OpenSlideError("bad tile")
    monkeypatch.setattr(openslide.OpenSlide, "read_region", broken)
    with pytest.raises(SlideError, match="texture.tif: cannot read x=6 y=8 level=1: bad tile"):
        slide.read(6, 8, 64, 0.5)


def test_a_closed_slide_opens_again_when_it_is_read(tmp_path):
    slide, levels = open_texture(tmp_path)
    slide.close()
    slide.close()
    assert np.array_equal(slide.read(0, 0, 64, 0.25), levels[0][:64, :64])


def _child(slide, queue):
    queue.put((slide._pid, slide.read(0, 0, 64, 0.5), slide._pid == os.getpid(), slide.mpp_source))


@pytest.mark.parametrize("method", ["fork", "pickle"])
def test_another_process_reads_with_a_handle_of_its_own(tmp_path, method):
    slide, _ = open_texture(tmp_path, 2, stated=0.25)
    if method == "pickle":
        copy = pickle.loads(pickle.dumps(slide))
        assert copy._slide is not slide._slide and copy.mpp_source == "stated"
        assert np.array_equal(copy.read(0, 0, 64, 0.5), slide.read(0, 0, 64, 0.5))
        return
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(slide, queue))
    child.start()
    inherited_pid, tile, own, source = queue.get(timeout=60)
    child.join()
    assert inherited_pid == os.getpid() and own and source == "stated"
    assert np.array_equal(tile, slide.read(0, 0, 64, 0.5))


# tissue

PINK, PURPLE, WHITE, GLASS = (230, 150, 190), (130, 80, 160), (255, 255, 255), (243, 241, 244)


def flat(colour, size=64):
    return np.full((size, size, 3), colour, np.uint8)


@pytest.mark.parametrize("colour, tissue", [
    (PINK, True), (PURPLE, True), (WHITE, False), (GLASS, False), ((0, 0, 0), False), ((60, 140, 60), False),
    ((160, 100, 50), False),   # DAB
    ((50, 30, 80), False),     # too dark
    ((154, 220, 209), False), ((154, 209, 220), True),  # either side of cyan, 180 degrees
    ((225, 228, 240), True)])  # bluish glass passes: Midnight's rule as it is
def test_a_tile_is_tissue_by_midnights_colours(colour, tissue):
    assert is_tissue(flat(colour)) is tissue


def test_a_tile_is_tissue_if_more_than_the_share_is():
    tile = flat(WHITE, 100)
    tile[:60] = PINK
    assert not is_tissue(tile) and is_tissue(tile, share=0.59)
    tile[60, 0] = PINK
    assert is_tissue(tile)


def toy_slide(path, tissue=True, factors=(4,)):
    """1024 um square of glass at 0.5 um/px: a disc of tissue, pen in three inks, a hair; returns (slide, disc)."""
    rng = np.random.default_rng(0)
    image = np.broadcast_to(np.array(GLASS, np.int16), (2048, 2048, 3)).copy()
    y, x = np.mgrid[:2048, :2048]
    disc = (x - 1300) ** 2 + (y - 1200) ** 2 < 500 ** 2
    if tissue:
        image[disc] = np.where(rng.random((disc.sum(), 1)) < 0.2, PURPLE, PINK)
    image[100:300, 100:1500] = (20, 120, 60)
    image[400:600, 100:900] = (30, 60, 190)
    image[1700:1900, 50:600] = (15, 15, 20)
    image[:, 1998:2002] = (150, 90, 90)
    image = np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
    return Slide(write_slide(path, pyramid(image, *factors), (0.5, 0.5))), disc


@pytest.mark.parametrize("factors", [(), (4, 16)])
def test_the_mask_covers_tissue_and_neither_glass_nor_ink_nor_a_hair(tmp_path, factors):
    slide, disc = toy_slide(tmp_path / "toy.tif", factors=factors)
    mask, (cell_w, cell_h) = slide.tissue_mask()
    assert mask.dtype == bool and mask.shape == (128, 128) and (cell_w, cell_h) == (16, 16)
    truth = disc.reshape(128, 16, 128, 16).mean((1, 3))
    assert mask[truth == 1].mean() > 0.99, "tissue is missed"
    near = np.asarray(Image.fromarray(np.uint8(255) * disc).resize((128, 128)).filter(wsi.ImageFilter.MaxFilter(5))) > 0
    assert not mask[~near].any(), "something else is taken for tissue"


def test_a_slide_of_glass_or_in_the_dark_opens_and_has_no_tissue(tmp_path):
    slide, _ = toy_slide(tmp_path / "glass.tif", tissue=False)
    assert not slide.tissue_mask()[0].any()
    for _ in range(2):
        with pytest.raises(SlideError, match="glass.tif: no tissue found"):
            slide.random_tissue(np.random.default_rng(0), 224, 0.5)
    tinted = flat((243, 243, 243), 512)
    tinted[:256] = (243, 238, 243)  # Otsu's threshold alone would call this half tissue
    assert not Slide(write_slide(tmp_path / "tinted.tif", [tinted], (0.5, 0.5))).tissue_mask()[0].any()
    night = Slide(write_slide(tmp_path / "night.tif", [flat((0, 0, 6), 512)], (0.5, 0.5)))
    assert not night.tissue_mask()[0].any()


def test_a_slide_that_is_all_tissue_is_all_tissue(tmp_path):
    tissue = np.where(np.random.default_rng(0).random((1024, 1024, 1)) < 0.3, PURPLE, PINK).astype(np.uint8)
    assert Slide(write_slide(tmp_path / "full.tif", [tissue], (0.5, 0.5))).tissue_mask()[0].all()


def test_a_large_single_level_is_read_in_blocks(tmp_path, monkeypatch):
    image = texture(9000, 400)
    slide = Slide(write_slide(tmp_path / "wide.tif", [image], (0.5, 0.5)))
    read, sizes = openslide.OpenSlide.read_region, []
    monkeypatch.setattr(openslide.OpenSlide, "read_region",
                        lambda self, at, level, size: sizes.append(size) or read(self, at, level, size))
    thumbnail, cell = slide._thumbnail(8.0)
    assert len(sizes) == 3 and max(w for w, _ in sizes) <= 4096 and cell == (16, 16)
    assert np.array_equal(thumbnail[:, :562], np.asarray(Image.fromarray(image[:, :8992]).reduce(16)))
    monkeypatch.setattr(wsi, "MAX_MASK_CELLS", 1000)
    with pytest.raises(SlideError, match="wide.tif: a mask of 563 x 25 cells"):
        slide.tissue_mask()


@pytest.mark.parametrize("mpp", [0.5, 0.8, 2.0])
def test_random_tiles_are_centred_on_tissue_everywhere_and_between_cells(tmp_path, mpp):
    slide, disc = toy_slide(tmp_path / "toy.tif")
    rng, size = np.random.default_rng(0), 64
    places = [slide.random_tissue(rng, size, mpp) for _ in range(400)]
    assert all(type(v) is int for place in places for v in place)
    centres = np.array(places) + size * mpp / 0.5 / 2
    inside = disc[centres[:, 1].astype(int), centres[:, 0].astype(int)]
    assert inside.mean() > 0.97                                       # the mask's rim is two cells soft
    assert np.abs(centres.mean(0) - (1300, 1200)).max() < 50          # uniform: 4 standard errors
    assert len(np.unique(centres[:, 0] % 16)) > 12                    # the jitter fills a cell of 16 px
    repeat = np.random.default_rng(0)
    assert places == [slide.random_tissue(repeat, size, mpp) for _ in range(400)]
    assert np.mean([is_tissue(slide.read(x, y, size, mpp)) for x, y in places[:50]]) > 0.7


# real slides

@real_slides
@pytest.mark.parametrize("mpp", [0.5, 1.0, 4.0])  # the pyramid serves 4.0 from its 4.002x level
def test_the_same_tissue_looks_the_same_from_one_level_and_from_a_pyramid(mpp):
    single, levels = Slide(SLIDES / "CMU-1-Small-Region.svs"), Slide(SLIDES / "cmu1-4x-pyramid.tiff")
    assert single.mpp == pytest.approx(0.499) and levels.mpp == pytest.approx(0.499) and len(levels.level_mpp) == 3
    rng = np.random.default_rng(0)
    for _ in range(6):
        x, y = single.random_tissue(rng, 224, mpp)
        a, b = single.read(x, y, 224, mpp).astype(int), levels.read(x, y, 224, mpp).astype(int)
        assert np.abs(a - b).mean() < 6, (x, y)


@real_slides
@pytest.mark.parametrize("name, mpp", [("CMU-1-Small-Region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 0.5)])
def test_random_tiles_of_real_slides_are_mostly_tissue(name, mpp):
    slide, rng = Slide(SLIDES / name, mpp), np.random.default_rng(0)
    mask = slide.tissue_mask()[0]
    assert 0.25 < mask.mean() < 0.75
    tiles = [slide.read(*slide.random_tissue(rng, 128, 0.5), 128, 0.5) for _ in range(20)]
    assert np.mean([is_tissue(tile) for tile in tiles]) > 0.5


@real_slides
def test_a_tcga_slide_without_mpp_is_refused_and_opens_with_a_stated_one():
    path = SLIDES / "tcga-cr-7395-01a-01-ts1.svs"
    assert "properties seen: tiff.ResolutionUnit=inch" in refused(path)
    slide = Slide(path, mpp=0.5)
    assert slide.level_mpp == pytest.approx([0.5, 1.0], rel=1e-3)
    assert slide._plan(224, 1.0) == (1, 224, 224)  # 2.0005x
    assert slide.read(2000, 1500, 224, 1.0).shape == (224, 224, 3)


@real_slides
def test_a_fluorescence_slide_opens_but_has_no_tissue():
    slide = Slide(SLIDES / "hamamatsu-fluorescence.ndpi")
    assert slide.mpp == pytest.approx(0.2282, abs=1e-4) and len(slide.level_mpp) == 7
    with pytest.raises(SlideError, match="no tissue found"):
        slide.random_tissue(np.random.default_rng(0), 224, 0.5)
