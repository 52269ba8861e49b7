"""The toy world: slides as OpenSlide sees them, equal pixels from equal seeds, and colour that tells nothing."""
import numpy as np
import openslide
import pytest
from PIL import Image

import eval_bach
import sources
import wsi
from prepare import toy
from prepare.stats import train_config

SLIDES = [  # format, um/px, level factors, mm
    ("svs", 0.5, (1, 4), 0.9, 0.7),
    ("tif", 0.25, (1, 2, 4), 0.6, 0.5),
    ("svs", 0.364, (1, 2.97, 7.9), 0.8, 0.9)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    assert toy.build(out, seed=5, workers=2, slides=SLIDES, size=(80, 60))
    return out


def pixels(slide):
    return [np.asarray(slide.read_region((0, 0), k, size)) for k, size in enumerate(slide.level_dimensions)]


def test_openslide_sees_mpp_levels_and_colour(world):
    for i, (suffix, mpp, factors, width, height) in enumerate(SLIDES):
        path = world / f"slides/toy{i:02d}.{suffix}"
        with openslide.OpenSlide(path) as slide:
            assert openslide.OpenSlide.detect_format(path) == {"svs": "aperio", "tif": "generic-tiff"}[suffix]
            assert slide.dimensions == (round(1000 * width / mpp), round(1000 * height / mpp))
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-5)
            assert slide.properties.get("openslide.objective-power") == ("20" if suffix == "svs" else None)
            assert slide.level_downsamples == pytest.approx(factors, rel=0.01)
            levels = pixels(slide)
            edges = np.concatenate([levels[0][:9], levels[0][-9:]])
            glass = np.median(edges[:, (0, -1), :3], (0, 1))  # bright and nearly grey; the pen may lie on one corner
            assert glass.min() > 210 and np.ptp(glass) < 25
            means = np.array([level[..., :3].mean((0, 1)) for level in levels])
            assert np.abs(means - means[0]).max() < 3  # the levels show one picture
            red, green, blue = np.asarray(slide.get_thumbnail((100, 100))).transpose(2, 0, 1).astype(int)
            assert ((red > green + 15) & (blue > green + 15)).mean() > 0.3  # tissue is pink


def test_jpeg_tiles_keep_their_colours(tmp_path):
    colours = [(200, 40, 60), (40, 160, 90), (50, 60, 180), (240, 240, 240)]
    image = Image.fromarray(np.uint8(colours).reshape(2, 2, 3)).resize((300, 280), Image.NEAREST)
    for name in ("a.svs", "a.tif"):
        toy.write_tiff(tmp_path / name, image, 0.5)
        with openslide.OpenSlide(tmp_path / name) as slide:
            read = np.asarray(slide.read_region((0, 0), 0, (300, 280)))[..., :3]
        for got in (read, np.asarray(Image.open(tmp_path / name))):
            seen = got[70::140, 75::150].reshape(4, 3)
            assert np.abs(np.subtract(seen, colours)).max() <= 3


def test_same_seed_same_pixels(world, tmp_path):
    toy.build(tmp_path, seed=5, workers=1, slides=SLIDES, images=range(0, 400, 57), size=(80, 60))
    for path in sorted((tmp_path / "slides").iterdir()):
        with openslide.OpenSlide(path) as a, openslide.OpenSlide(world / "slides" / path.name) as b:
            assert all(np.array_equal(x, y) for x, y in zip(pixels(a), pixels(b)))
    images = sorted((tmp_path / "bach").rglob("*.tif"))
    assert len(images) == 8
    for path in images:
        assert np.array_equal(Image.open(path), Image.open(world / path.relative_to(tmp_path)))
    a, b = (toy.tissue(np.random.default_rng(s), "Normal", (90, 120), 2.0) for s in (0, 1))
    assert not np.allclose(a, b)


def test_complete_output_stays_partial_output_is_rebuilt_other_files_are_safe(tmp_path):
    def make(seed, out):
        return toy.build(out, seed=seed, workers=1, slides=[], images=[0, 399], size=(40, 30))

    first = tmp_path / "a/bach/ICIAR2018_BACH_Challenge/Photos/Benign/b001.tif"
    assert make(0, tmp_path / "a") and not make(0, tmp_path / "a")
    before = first.read_bytes()
    (tmp_path / "a/toy.json").write_text("unfinished")
    first.write_bytes(b"")
    assert make(0, tmp_path / "a") and first.read_bytes() == before
    assert make(1, tmp_path / "a") and first.read_bytes() != before
    with pytest.raises(ValueError, match="--out="):
        make(0, tmp_path)
    assert first.exists()


def test_bach_folder_is_eva_s(world):
    paths = eval_bach.bach_files(world / "bach")
    assert len(paths) == 400 and Image.open(paths[0]).size == (80, 60)
    assert [i for a, b in toy.VAL for i in range(a, b)] == eval_bach.VAL_INDEX
    assert list(toy.KINDS) == list(eval_bach.CLASSES)


def test_colour_does_not_tell_the_kinds(world):
    images = [np.asarray(Image.open(p)) for p in eval_bach.bach_files(world / "bach")]
    x = np.array([[*i.mean((0, 1)), *i.std((0, 1))] for i in images])
    labels, train, val = np.arange(400) // 100, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX
    x = (x - x[train].mean(0)) / x[train].std(0)
    centres = np.stack([x[train][labels[train] == c].mean(0) for c in range(4)])
    guess = ((x[val][:, None] - centres) ** 2).sum(-1).argmin(1)
    assert np.mean([(guess[labels[val] == c] == c).mean() for c in range(4)]) < 0.4  # chance is 0.25


def test_loads_do_not_depend_on_the_kind():
    for kind in toy.KINDS:
        maps = [toy.tissue(np.random.default_rng([1, i]), kind, (288, 384), 2.0) for i in range(6)]
        assert np.mean(maps, (0, 2, 3)) == pytest.approx(1, abs=0.05), kind  # clipping at 0 adds a little
        assert np.std(maps, (2, 3)).mean(0) == pytest.approx([1.65, 0.425], rel=0.15), kind


def test_a_list_by_levels_has_each_level_of_each_slide_and_trains(script, world, tmp_path):
    """OpenMidnight's sampling: an equal share for every level, tissue by its rule, corners anywhere in the slide."""
    def make(out, *flags):
        command = ["prepare/levels.py", f"--slides={world}/slides/*", f"--out={tmp_path / out}", "--tile_px=64"]
        script(*command, "--passes=5", *flags)
        return (tmp_path / out).read_text()

    a, b, c = make("a"), make("b"), make("c", "--seed=1")
    assert a == b != c, "a function of the seed"
    rows = [line.rsplit(" ", 3) for line in a.splitlines()]
    for path in sorted((world / "slides").iterdir()):
        slide = wsi.Slide(str(path))
        mine = [tuple(map(int, row[1:])) for row in rows if row[0] == str(path)]
        counts = [sum(level == k for _, _, level in mine) for k in range(len(slide.level_mpp))]
        assert counts[:2] == [5, 5] and all(n <= 5 for n in counts)
        for x, y, level in mine:
            assert 0 <= x <= slide.dimensions[0] - 64 and 0 <= y <= slide.dimensions[1] - 64
            assert wsi.tissue_share(slide.read_level(x, y, 64, level)) > 0.6
    source = sources.open_source(train_config([f"--sample_list={tmp_path}/a", "--tile_px=64"]))
    assert source.read(3)[0].shape == (64, 64, 3)
    with pytest.raises(SystemExit, match="^levels: give --slides="):
        make("a")
    assert (tmp_path / "a").read_text() == a
    with pytest.raises(SystemExit, match="^levels: no tile with tissue in 3 slides"):
        make("d", "--tissue_share=1.0", "--draws=3")
    assert sorted(path.name for path in tmp_path.glob("[a-z]*")) == ["a", "b", "c"]  # nothing unfinished
