"""Where tiles come from: order, slides, lists, folders, shards, parquet, mixes; what is refused, what is left out."""
import collections
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import one_line
from PIL import Image
from test_wsi import texture, write_slide

import data
import sources
import wsi
from prepare.stats import train_keys

GOLDEN = Path(__file__).parent / "golden"
CONFIG = train_keys() | dict(mpps=(0.5, 1.0), tile_px=64, tiles_per_visit=2, open_slides=3)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def tables(tmp_path_factory, monkeypatch):
    """The folder of the tables that a test makes."""
    folder = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"nanopfm-{os.getuid()}"


def open_source(**keys):
    return sources.open_source({**CONFIG, **keys})


def wheres(source, numbers):
    """What the samples are: tuples (slide, x, y, mpp), nan as None."""
    found = [source.read(n)[1] for n in numbers]
    return [(w["slide"], w["x"], w["y"], None if math.isnan(w["mpp"]) else w["mpp"]) for w in found]


def errors_of(source, numbers):
    """The messages of the samples that cannot be read."""
    errors = []
    for n in numbers:
        try:
            source.read(n)
        except sources.READ_ERRORS as e:
            errors.append(str(e))
    return errors


def patients(share=0.5):
    """(patients that are trained on, patients that are held out)"""
    names = [f"TCGA-AA-{i:04d}" for i in range(12)]
    held = [p for p in names if wsi.held_out(p, share)]
    assert 0 < len(held) < 12
    return [p for p in names if p not in held], held


def noise(i, side=24):
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encode(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **({"quality": 95} if form == "JPEG" else {}))
    return file.getvalue()


def write_folder(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(i)))
    return str(folder)


def write_shard(folder, name, count, slide=None):
    """A finished shard as prepare/tiles.py writes it: the tar, then its sidecar."""
    folder.mkdir(exist_ok=True)
    side = {"slide": slide or f"/slides/{name}.svs", "patient": name, "offset": [], "size": [],
            "x": [24 * i for i in range(count)], "y": [7] * count, "mpp": [0.5] * count}
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for i in range(count):
            jpg, member = encode(noise(i), "JPEG"), tarfile.TarInfo(f"{name}_500nm_{24 * i}_7.jpg")
            side["offset"].append(tar.offset + 512)
            side["size"].append(len(jpg))
            member.size = len(jpg)
            tar.addfile(member, io.BytesIO(jpg))
    side["bytes"] = os.path.getsize(folder / f"{name}.tar")
    (folder / f"{name}.json").write_text(json.dumps(side))
    return str(folder)


def write_parquet(folder, groups, form="PNG", slides=("a.svs",)):
    """A file for each list of row group sizes; x counts the rows of all."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    schema = pa.schema([("slide_path", pa.string()), ("x", pa.int64()), ("y", pa.int64()), ("level", pa.int64()),
                        ("image_bytes", pa.binary())])
    x = 0
    for f, sizes in enumerate(groups):
        with pq.ParquetWriter(folder / f"{f}.parquet", schema) as file:
            for rows in sizes:
                numbers = range(x, x := x + rows)
                names, blobs = [slides[i % len(slides)] for i in numbers], [encode(noise(i), form) for i in numbers]
                columns = {"slide_path": names, "x": list(numbers), "y": [7] * rows, "level": [1] * rows,
                           "image_bytes": blobs}
                file.write_table(pa.table(columns, schema))
    return str(folder)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_the_shuffle_is_a_new_permutation_each_pass(size):
    passes = [[sources.shuffled(n, size, 5) for n in range(p * size, (p + 1) * size)] for p in range(3)]
    assert all(sorted(p) == list(range(size)) for p in passes)
    if size > 50:
        assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
        assert [sources.shuffled(n, size, 6) for n in range(size)] != passes[0]
        assert abs(np.corrcoef(passes[0], range(size))[0, 1]) < 0.3
    big = {sources.shuffled(n, 29_000_000, 0) for n in range(2000)}
    assert len(big) == 2000 and max(big) < 29_000_000 and max(big) > 28_000_000


def test_a_replacement_is_drawn_from_sample_attempt_and_seed():
    """The bug: a second replacement that is the first one again, which could not be read either."""
    places = ([(5, attempt, 0) for attempt in range(8)], [(n, 1, 0) for n in range(8)], [(5, 1, s) for s in range(8)])
    for eight in places:
        drawn = [sources.pick(n, attempt, 10**6, seed) for n, attempt, seed in eight]
        assert len(set(drawn)) == 8 and max(drawn) < 10**6


def write_world(kind, folder, monkeypatch):
    """30 tiles as a source of that kind."""
    if kind == "tiles":
        return write_folder(folder / "tiles", [f"{i}.png" for i in range(30)])
    if kind == "shards":
        write_shard(folder / "shards", "a", 17)
        return write_shard(folder / "shards", "b", 13)
    if kind == "parquet":
        monkeypatch.setattr(sources, "WINDOW", 2)
        return write_parquet(folder / "parquet", ((4, 5, 6), (8, 7)))
    monkeypatch.setattr(wsi, "Slide", FakeSlide)
    (folder / "list.txt").write_text("".join(f"{folder}/{i % 3}.svs {i} 7 0\n" for i in range(30)))
    return f"{folder}/list.txt"


@pytest.mark.parametrize("world, workers", [(1, 2), (3, 0)])
@pytest.mark.parametrize("kind", ["tiles", "shards", "parquet", "sample_list"])
def test_every_tile_comes_exactly_once_a_pass_over_ranks_and_workers(kind, world, workers, tmp_path, monkeypatch):
    """The bug: each rank or worker read only a fraction of its rows."""
    keys, seen = {kind: write_world(kind, tmp_path, monkeypatch)}, []
    source = open_source(**keys)
    for rank in range(world):
        class Where(torch.utils.data.Dataset):
            def __getitem__(self, step, rank=rank):
                return wheres(source, data.sample_numbers(step, rank, world, 2))
        loader = torch.utils.data.DataLoader(Where(), batch_size=None, sampler=range(30 // world), num_workers=workers,
                                             multiprocessing_context="fork" if workers else None)
        seen += [(step, rank, i, tuple(where)) for step, batch in enumerate(loader) for i, where in enumerate(batch)]
    order = [where for *_, where in sorted(seen, key=lambda s: s[:3])]
    assert len(set(order[:30])) == len(set(order[30:])) == 30 == len(order) / 2
    assert order[:30] != order[30:] and order == wheres(open_source(**keys), range(60)) != sorted(order)
    assert order[:30] != wheres(open_source(**keys, seed=1), range(30))


class FakeSlide:
    """Records what is asked of it; a name with "bad" does not open, one with "glass" has no tissue."""
    opened, tried, keys = [], [], {}
    mpp = 0.5
    mpp_xy = (0.5, 0.5)
    level_mpp = [0.5, 2.0]
    level_scale = np.array([(1, 1), (4, 4)])
    dimensions = (1000, 1000)
    outside = wsi.Slide.outside

    def __init__(self, path, mpp=None, exact_reads=True, mpp_from_objective=False, rule=None, mask_dir="",
                 trust_mpp=False):
        self.rule = rule
        FakeSlide.tried.append(path)
        if "bad" in path or ("unknown" in path and mpp is None):
            raise wsi.SlideError(f"{path}: cut short")
        self.path, self.asked, self.placed = path, [], []
        FakeSlide.keys[path] = mpp, exact_reads, mpp_from_objective, mask_dir
        FakeSlide.opened.append(path)

    def close(self):
        FakeSlide.opened.remove(self.path)

    def random_point(self, rng):
        if "glass" in self.path:
            raise wsi.SlideError(f"{self.path}: no tissue")

    def random_tissue(self, rng, size, mpp):
        self.placed.append((size, mpp))
        return tuple(rng.integers(1000, size=2).tolist())

    def read(self, x, y, size, mpp):
        self.asked.append((x, y, size, mpp))
        if "damaged" in self.path and x % 2:
            raise wsi.SlideError(f"{self.path}: cannot read x={x}")
        return np.full((size, size, 3), (200, 90, 160), np.uint8)

    def read_level(self, x, y, size, level):
        return np.full((size, size, 3), (x % 256, y % 256, level), np.uint8)


@pytest.fixture
def slides(tmp_path, monkeypatch):
    FakeSlide.opened, FakeSlide.tried, FakeSlide.keys = [], [], {}
    monkeypatch.setattr(wsi, "Slide", FakeSlide)
    for name in "abc":
        (tmp_path / f"{name}.svs").touch()
    return tmp_path


def test_slides_stay_open_in_an_lru(slides):
    """The bug: the slide reopened for every tile."""
    source = open_source(slides=f"{slides}/*.svs")
    for n in range(40):
        tile, where = source.read(n)
        assert tile.shape == (64, 64, 3) and where["slide"] in source.paths and where["mpp"] in (0.5, 1.0)
    assert sorted(FakeSlide.opened) == source.paths
    x, y, _, mpp = source.visit(where["slide"]).asked[-1]
    assert (where["x"], where["y"], where["mpp"]) == (x, y, mpp)
    assert source.visit(where["slide"]).placed[-1] == (64, mpp), "its tissue is looked for in a tile of that size"


def test_what_is_drawn_from_slides_depends_on_seed_and_attempt(slides):
    source = open_source(slides=f"{slides}/*.svs")
    first, other = wheres(source, range(20)), wheres(open_source(slides=f"{slides}/*.svs", seed=1), range(20))
    assert not set(first) & set(other) and first == wheres(open_source(slides=f"{slides}/*.svs"), range(20))
    again = [source.read(0, attempt)[1] for attempt in range(20)]
    assert {w["slide"] for w in again} == set(source.paths) and len({(w["x"], w["y"]) for w in again}) == 20
    assert again[7] == open_source(slides=f"{slides}/*.svs").read(0, 7)[1]


def test_a_visit_takes_several_tiles_from_one_slide(slides):
    for name in range(40):
        (slides / f"{name}.svs").touch()
    for visit in (1, 8):
        source = open_source(slides=f"{slides}/*.svs", mpps=(0.5,), tiles_per_visit=visit, open_slides=1)
        FakeSlide.opened = []
        for n in range(80):
            source.read(n)
        assert len(FakeSlide.opened) == pytest.approx(80 / visit, abs=6 / visit + 0.5)
    assert len(set(source.visit(FakeSlide.opened[-1]).asked)) == 8, "eight different places"


def test_the_keys_reach_the_slide(slides):
    keys = dict(slide_mpp=0.3, exact_reads=False, mpp_from_objective=True, mask_dir="masks")
    open_source(slides=f"{slides}/a.svs", **keys).read(0)
    assert FakeSlide.keys == {f"{slides}/a.svs": (0.3, False, True, "masks")}
    open_source(slides=f"{slides}/a.svs").read(0)
    assert FakeSlide.keys == {f"{slides}/a.svs": (None, True, False, "")}


def test_mpp_is_drawn_among_those_that_the_slide_is_fine_enough_for(slides):
    source = open_source(slides=f"{slides}/a.svs", mpps=(0.25, 0.5, 1.0, 2.0))
    assert {mpp for *_, mpp in wheres(source, range(60))} == {0.5, 1.0, 2.0}
    for keys in (dict(mpps=(0.25,)), dict(mpp_range=(0.2, 0.4), eval_mpp=0.25)):
        with pytest.raises(ValueError, match="none of 1 can be .*a.svs: 0.500 um/px is too coarse for every target"):
            open_source(slides=f"{slides}/a.svs", **keys)


def test_a_wide_field_is_read_around_the_same_centre(tmp_path, monkeypatch):
    """On a slide whose colours are its coordinates: the mean is that of the tile, the deviation four times as large."""
    from prepare.toy import write_tiff
    y, x = np.mgrid[:1024, :1024] / 4
    image = np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8)
    write_tiff(tmp_path / "a.svs", Image.fromarray(image), 0.5, (1, 4))
    monkeypatch.setattr(wsi, "is_tissue", lambda tile, share, rule: True)
    monkeypatch.setattr(wsi.Slide, "random_point", lambda self, rng: rng.integers(400, 600, 2))
    keys = dict(slides=str(tmp_path / "a.svs"), mpps=(0.5,))
    wide, same, off = (open_source(**keys, wide_field=field) for field in ((4.0, 4.0), (1.0, 1.0), ()))
    for n in range(8):
        tile, where = wide.read(n)
        assert np.array_equal(tile, off.read(n)[0]), "the tile itself is as without"
        assert where["wide"].shape == tile.shape == (64, 64, 3)
        assert np.abs(where["wide"][..., :2].mean((0, 1)) - tile[..., :2].mean((0, 1))).max() < 1
        assert where["wide"][..., 0].std() == pytest.approx(4 * tile[..., 0].std(), rel=0.2)
        assert np.array_equal(same.read(n)[1]["wide"], tile)
    with pytest.raises(ValueError, match="^sample_list: wide_field reads around a tile, which only slides can"):
        (tmp_path / "list.txt").write_text(f"{tmp_path}/a.svs 0 0 0\n")
        open_source(sample_list=str(tmp_path / "list.txt"), wide_field=(1.0, 4.0))


@pytest.mark.parametrize("keys, share, low", [
    (dict(mpp_range=(0.25, 2.0)), 0.5, 0.5 / 1.1),          # cut at what the slide has
    (dict(mpp_range=(0.25, 2.0), eval_share=0.2), 0.2, 0.5 / 1.1),
    (dict(mpp_range=(0.8, 2.0), eval_mpp=0.25), 0, 0.8),    # too coarse for the evaluation's
    (dict(mpp_range=(0.8, 2.0), eval_share=0.0), 0, 0.8),
    (dict(mpp_range=(0.25, 0.4), eval_share=0.2), 1, 0.5)])  # nothing but the evaluation's is left
def test_a_range_of_mpp_is_log_uniform_with_a_share_at_the_evaluation_mpp(keys, share, low):
    config, rng = {**CONFIG, **keys}, np.random.default_rng(0)
    drawn = np.array([sources.draw_mpp(rng, 0.5, config) for _ in range(2000)])
    assert (drawn == config["eval_mpp"]).mean() == pytest.approx(share, abs=0.04)
    rest = drawn[drawn != config["eval_mpp"]]
    if len(rest):
        assert low <= rest.min() < 1.03 * low and 1.95 < rest.max() <= 2.0
        assert np.log(rest).mean() == pytest.approx(np.log(low * 2) / 2, abs=0.05)


def test_tiles_without_tissue_are_drawn_again_and_then_named(slides, monkeypatch):
    monkeypatch.setattr(FakeSlide, "read", lambda self, x, y, size, mpp: np.full((size, size, 3), 245, np.uint8))
    with pytest.raises(wsi.SlideError, match="a.svs: no tile of 60% tissue at 0.5"):
        open_source(slides=f"{slides}/a.svs", mpps=(0.5,)).read(0)
    half = np.full((64, 64, 3), (200, 90, 160), np.uint8)
    half[:32] = 245
    monkeypatch.setattr(FakeSlide, "read", lambda self, x, y, size, mpp: half)
    assert open_source(slides=f"{slides}/a.svs", tissue_share=0.4).read(0)[0] is half
    with pytest.raises(wsi.SlideError, match="no tile of 55% tissue"):
        open_source(slides=f"{slides}/a.svs", tissue_share=0.55).read(0)


def test_a_slide_that_failed_is_not_opened_again_but_one_with_a_damaged_tile_is(slides):
    for name in ("bad", "glass", "damaged"):
        (slides / f"{name}.svs").touch()
    source = open_source(slides=f"{slides}/*.svs")
    FakeSlide.tried = []
    errors = collections.Counter(Path(e.split(":")[0]).stem for e in errors_of(source, range(200)))
    tried = collections.Counter(Path(p).stem for p in FakeSlide.tried)
    assert tried["glass"] == 1 and errors["glass"] > 10
    assert 5 < errors["damaged"] < errors["glass"], "its other tiles are used"
    assert not tried["bad"] and not errors["bad"], "known from the start"
    assert source.left_out == {f"{slides}/bad.svs": f"{slides}/bad.svs: cut short"}
    assert source.about.startswith("5 of 6 slides")


def test_a_slide_that_is_away_at_the_start_or_later_is_tried_again(slides, monkeypatch):
    """The bug: a file server that was away for a moment cost its slides for the rest of the run."""
    away = [f"{slides}/a.svs"]

    def opened(slide, path, *keys):
        if path in away:
            raise wsi.Unreachable(f"{path}: Stale file handle")
        make(slide, path, *keys)
    make = FakeSlide.__init__
    monkeypatch.setattr(FakeSlide, "__init__", opened)
    source = open_source(slides=f"{slides}/*.svs")
    assert len(source.paths) == 3 and not source.left_out
    assert errors_of(source, range(40))[0] == f"{slides}/a.svs: Stale file handle"
    away.clear()
    assert not errors_of(source, range(40))


def test_unusable_slides_before_the_first_sound_one_are_passed_over(slides):
    """The bug: the first 20 did not open, so the run did not start."""
    for name in range(25):
        (slides / f"a_bad_{name}.svs").touch()
    source = open_source(slides=f"{slides}/*.svs")
    assert len(source.paths) == 3 and len(source.left_out) == 25 and not errors_of(source, range(40))


def test_the_scale_of_a_slide_may_be_stated_in_a_table_or_trusted(slides, tmp_path):
    (table := tmp_path / "mpp.csv").write_text(f"Slide, MPP\na,0.25\nb.svs,0.3\n{slides}/c.svs,0.4\nother,1\n")
    (slides / "d.svs").touch()
    open_source(slides=f"{slides}/*.svs", mpp_table=str(table), slide_mpp=0.5)
    assert [FakeSlide.keys[f"{slides}/{name}.svs"][0] for name in "abcd"] == [0.25, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("content, message", [
    ("", "no row: give columns slide,mpp"), ("slide,mpp\n", "no row: give columns"),
    ("slide,mpp\na,1,25\n", "'mpp': '1', None: .'25'.*: give columns"), ("wsi,mpp\na,0.25\n", "give columns slide,mpp"),
    ("slide,mpp\na,\n", "give columns slide,mpp"), ("slide;mpp\na;1\n", "give columns slide,mpp"),
    ("slide,mpp\na,0.2\na,0.3\n", "give columns slide,mpp"), ("slide,mpp\na,40\n", "give columns slide,mpp"),
    ("slide,mpp\n\xe9,0.5\n".encode("latin-1"), "can't decode byte 0xe9 .*; save it as CSV in UTF-8"),
    ("slide,mpp\na,0.5\n".encode("utf-16"), "can't decode byte 0xff .*; save it as CSV in UTF-8")])
def test_a_table_of_another_kind_is_refused_by_its_name(content, message, slides):
    """The bugs: a decimal comma gave 1 um/px instead of 1.25; an empty table was none."""
    (slides / "mpp.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line(f"mpp_table={slides}/mpp.csv: .*{message}"):
        open_source(slides=f"{slides}/*.svs", mpp_table=f"{slides}/mpp.csv")


def test_rows_of_a_table_that_match_no_slide_or_disagree_are_said(slides):
    table = f"{slides}/mpp.csv"
    os.link(slides / "a.svs", slides / "d.svs")  # whose row says nothing of a
    Path(table).write_text('slide,mpp\na,0.25\na.svs,"0,25"\nb,0.5\nb.svs,0.25\nC,1\nd,1\n')
    source = open_source(slides=f"{slides}/*.svs", mpp_table=table)
    assert source.paths == [f"{slides}/a.svs", f"{slides}/c.svs"] and FakeSlide.keys[source.paths[0]][0] == 0.25
    assert source.left_out == {table: "2 of 6 rows match no slide, such as 'C'", f"{slides}/b.svs":
        f"{slides}/b.svs: mpp_table={table} has rows that disagree: [0.25, 0.5] um/px",
        f"{slides}/d.svs": f"the same file as {slides}/a.svs"}


def test_a_refused_slide_is_opened_again_at_each_start(slides, monkeypatch):
    """The bug: its remedy was a file beside it, so the table of verdicts stayed."""
    opened, whole = [], wsi.open_slide

    def open_slide(path, config):
        opened.append(path)
        if path.endswith("b.svs") and len(opened) <= 4:
            raise wsi.SlideError("without its folder")
        return whole(path, config)

    monkeypatch.setattr(wsi, "open_slide", open_slide)
    assert [len(open_source(slides=f"{slides}/*.svs").paths) for _ in range(4)] == [2, 2, 3, 3]
    assert len(opened) == 3 + 1 + (1 + 3), "of a table whose verdicts hold, only the refused"


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("kind", ["tiles", "slides"])
def test_a_file_counts_once_and_is_held_out_by_any_of_its_names(kind, link, slides, tmp_path):
    (train, *_), (held, *_) = patients()
    folder, end = tmp_path / "f", "svs" if kind == "slides" else "png"
    write_folder(folder, [f"{train}_1.{end}", f"{train}_3.{end}"])
    link(folder / f"{train}_1.{end}", folder / f"{train}_2.{end}")
    named = str(folder) if kind == "tiles" else f"{folder}/*.svs"
    source = open_source(**{kind: named}, holdout=0.5)
    assert len(source.paths) == 2 and "same" in source.left_out[f"{folder}/{train}_2.{end}"]
    link(folder / f"{train}_1.{end}", folder / f"Z_{held}.{end}")
    assert open_source(**{kind: named}, holdout=0.5).paths == [f"{folder}/{train}_3.{end}"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_slide_of_a_list_counts_once_and_is_held_out_by_any_of_its_names(link, slides):
    """The bug: the text of a line decided, so a held-out slide was read by the name of a link to it."""
    (train, other, *_), (held, *_) = patients()
    for name in (train, other, held):
        (slides / f"{name}_1.svs").touch()
    link(slides / f"{train}_1.svs", slides / f"{train}_2.svs")
    link(slides / f"{held}_1.svs", slides / f"{other}_2.svs")
    names = [f"{train}_1", f"{train}_2", f"../{slides.name}/{train}_1", f"{other}_1", f"{other}_2", f"{held}_1"]
    file = write_list(slides, [f"{slides}/{name}.svs {i} 0 0" for i, name in enumerate(names)])
    source = open_source(sample_list=file, holdout=0.5)
    assert "4 tiles of a sample list of 2 slides" in source.about and not source.left_out
    where = [(f"{slides}/{train}_1.svs", x, 0) for x in (0, 1, 2)] + [(f"{slides}/{other}_1.svs", 3, 0)]
    assert sorted(w[:3] for w in wheres(source, range(4))) == sorted(where)
    assert "6 tiles of a sample list of 3 slides" in open_source(sample_list=file).about


@pytest.mark.parametrize("kind", ["slides", "sample_list"])
def test_a_link_to_a_held_out_slide_is_held_out_where_only_the_link_is_found(kind, slides, tmp_path):
    (train, *_), (held, *_) = patients()
    store = tmp_path / "store"
    write_folder(store, [f"{held}.svs", "0.svs", "1.svs"])
    (slides / f"{train}_held.svs").symlink_to(store / f"{held}.svs")
    for i in range(2):  # names without a patient, as of stores by content, tell nothing
        (slides / f"{train}_{i}.svs").symlink_to(store / f"{i}.svs")
    lines = [f"{slides}/{train}_{name}.svs 0 0 0" for name in (0, 1, "held")]
    world = {"slides": f"{slides}/{train}*.svs", "sample_list": write_list(slides, lines)}
    source = open_source(**{kind: world[kind]}, holdout=0.5)
    seen = {where[0] for where in wheres(source, range(40))}
    assert seen == {f"{slides}/{train}_{i}.svs" for i in range(2)}


def test_a_table_that_matches_no_slide_is_said_where_no_slide_has_a_scale(slides, monkeypatch):
    """The bug: the remedy was the table that was given."""
    (slides / "mpp.csv").write_text("slide,mpp\nx,0.5\ny,0.5\n")
    def refuse(slide, path, *keys):
        raise wsi.SlideError("no usable mpp")
    monkeypatch.setattr(FakeSlide, "__init__", refuse)
    with one_line("slides: none of 3 can be used .*no usable mpp; .*mpp.csv: 2 of 2 rows match no slide, such as 'x'"):
        open_source(slides=f"{slides}/*.svs", mpp_table=f"{slides}/mpp.csv")


def test_slides_of_no_use_are_left_out_of_a_list_at_the_start(slides, tmp_path, monkeypatch):
    """The bug: each was a bad tile once it was drawn, so a list with 100 of them stopped the run."""
    bad = [f"{slides}/bad.svs", f"{slides}/caf\udce9.svs"]
    file, paths = tmp_path / "list.txt", [f"{slides}/a.svs", *bad, f"{slides}/b.svs"]
    file.write_bytes(b"".join(os.fsencode(f"{path} {i} 0 0\n") for i in range(5) for path in paths))
    source = open_source(sample_list=str(file))
    assert source.left_out == {bad[0]: f"{bad[0]}: cut short",
                               f"{slides}/caf\\udce9.svs": "its name is not UTF-8; rename it"}
    assert len(set(wheres(source, range(10)))) == 10 and "10 tiles of a sample list of 2 slides" in source.about
    assert isinstance(source.table, np.memmap)

    def refuse(slide, path, *keys):
        raise wsi.SlideError("cut short")
    monkeypatch.setattr(FakeSlide, "__init__", refuse)
    with one_line("sample_list: none of 1 can be used .*: cut short"):
        open_source(sample_list=write_list(tmp_path, [f"{slides}/a.svs 0 0 0"], "other.txt"))


def test_a_list_may_come_from_another_system(slides, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(slides))
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeff~/a.svs\t1 2\t0\r\n\r\n~/my slides/b 2.svs -3 4 1\r\n \t \r\n".encode())
    source = open_source(sample_list=str(file))
    assert source.found == [f"{slides}/a.svs", f"{slides}/my slides/b 2.svs"] and not source.left_out
    assert source.table.tolist() == [(0, 1, 2, 0), (1, -3, 4, 1)]


def test_a_file_that_is_not_there_is_known_at_the_start_of_a_list(tmp_path):
    from prepare.toy import write_tiff
    write_tiff(tmp_path / "a.svs", Image.new("RGB", (256, 256)), 0.5)
    source = open_source(sample_list=write_list(tmp_path, [f"{tmp_path}/{name}.svs 0 0 0" for name in "ab"]))
    assert source.left_out == {f"{tmp_path}/b.svs": f"{tmp_path}/b.svs: No such file or directory"}
    assert source.read(0)[1]["slide"] == source.read(1)[1]["slide"] == f"{tmp_path}/a.svs"


def test_a_level_that_lies_costs_a_list_its_rows_and_counts_as_no_damage(tmp_path):
    image = texture(1600, 1400)
    squeezed = np.asarray(Image.fromarray(image).resize((800, 350)))
    path = write_slide(tmp_path / "squeezed.tif", [image, squeezed], (0.5, 0.5))
    with pytest.warns(match="level 1 has another aspect"):
        source = open_source(sample_list=write_list(tmp_path, [f"{path} {i} 0 {i % 2}" for i in range(10)]))
        batch = data.Batches(source, BATCH, 4)[0]
    assert not batch["bad"] and all(message.startswith(f"{path}: level 1") for message in batch["left_out"])
    assert len(batch["global_crops"]) == 16 and batch["left_out"]


def link_world(kind, folder, monkeypatch):
    """A source of that kind below a folder `store`, and the ending of its files."""
    if kind == "slides":
        monkeypatch.setattr(wsi, "Slide", FakeSlide)
        write_folder(folder / "store", ["x/1.svs", "x/2.svs", "3.svs"])
    else:
        write_world(kind, folder, monkeypatch)
        os.rename(folder / kind, folder / "store")
    return {"slides": ".svs", "tiles": ".png", "shards": ".tar", "parquet": ".parquet"}[kind]


@pytest.mark.parametrize("kind", ["slides", "tiles", "shards", "parquet"])
def test_links_are_followed_hidden_names_are_not_and_what_is_broken_is_named(kind, tmp_path, monkeypatch):
    """The bug: `site -> /store` lost its files, as did links that lead nowhere, and ._a.svs was a slide."""
    ending, store, site = link_world(kind, tmp_path, monkeypatch), tmp_path / "store", tmp_path / "cohort/b/site"
    first = next(path for path in sorted(store.rglob(f"*{ending}")))
    for hidden in (".snapshot", ".ipynb_checkpoints"):
        (store / hidden).mkdir()
        (store / hidden / first.name).write_bytes(first.read_bytes())
    (store / f"._{first.name}").write_bytes(b"resource fork")
    site.parent.mkdir(parents=True)
    site.symlink_to(store)
    (tmp_path / "cohort/again").symlink_to(store)
    (store / "circle").symlink_to(tmp_path / "cohort")
    (store / f"gone{ending}").symlink_to("/nowhere")
    (tmp_path / "cohort/unmounted").symlink_to("/nowhere/else")
    (tmp_path / "cohort" / f"twice{ending}").symlink_to(first)
    pattern = f"{tmp_path}/cohort" + "/**/*.svs" * (kind == "slides")
    source = open_source(**{kind: pattern})
    plain = open_source(**{kind: f"{store}/**/*.svs" if kind == "slides" else str(store)})
    size = {"slides": lambda s: len(s.paths), "tiles": lambda s: len(s.paths), "shards": lambda s: len(s.tars),
            "parquet": lambda s: len(s.files)}[kind]
    assert size(source) == size(plain) == {"slides": 3, "tiles": 30, "shards": 2, "parquet": 2}[kind]
    reasons = {os.path.basename(path): reason for path, reason in source.left_out.items()}
    assert reasons[f"gone{ending}"] == "a link to /nowhere: No such file or directory"
    assert reasons["unmounted"] == "a link to /nowhere/else: No such file or directory"
    assert any(reason.startswith("the same file as ") for reason in reasons.values())


@pytest.mark.parametrize("kind", ["slides", "sample_list", "tiles", "shards", "parquet"])
def test_nothing_of_a_held_out_patient_is_read(kind, slides, tmp_path):
    used, held = patients()
    files = [f"{slides}/{p}-01Z.svs" for p in used + held]
    for patient, file in zip(used + held, files):
        Path(file).touch()
        write_shard(tmp_path / "s", patient, 3, file)
    world = {"slides": lambda: f"{slides}/TCGA*.svs", "shards": lambda: f"{tmp_path}/s",
             "sample_list": lambda: write_list(slides, [f"{file} {i} 0 0" for file in files for i in range(3)]),
             "tiles": lambda: write_folder(tmp_path / "t", [f"{p}_{i}.png" for p in used + held for i in range(3)]),
             "parquet": lambda: write_parquet(tmp_path / "p", ((20, 4), (12,)), slides=files)}
    source = open_source(**{kind: world[kind]()}, holdout=0.5)
    seen = {Path(where[0]).name[:12] for where in wheres(source, range(100 if kind == "slides" else 3 * len(used)))}
    assert seen == set(used)


def test_a_holdout_that_leaves_nothing_or_lacks_patients_is_refused(slides):
    held = patients()[1][0]
    (slides / f"{held}.svs").touch()
    of_held, none = write_list(slides, [f"{held}.svs 0 0 0"]), write_list(slides, [], "none.txt")
    nobody = write_folder(slides, ["nobody.png"])  # each tile would be a patient
    for keys, message in ((dict(slides=f"{slides}/{held}*"), "slides: holdout = 0.5 leaves none of 1 files"),
                          (dict(sample_list=of_held), "sample_list: no tile to train on"),
                          (dict(sample_list=none, holdout=0.0), "sample_list: no tile to train on"),
                          (dict(tiles=nobody), "holdout needs patients, but the name of .*nobody.png has none: rename"),
                          (dict(slides=f"{slides}/a.svs", patient="("), "patient = '.*' is no regular expression")):
        with pytest.raises(ValueError, match=message):
            open_source(**{"holdout": 0.5, **keys})


def write_list(folder, lines, name="list.txt"):
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return f"{folder}/{name}"


@pytest.mark.parametrize("mpp, exact", [(0.0, True), (0.3, False)])
def test_openmidnight_sample_lists(mpp, exact, slides):
    known, unknown = f"{slides}/a.svs", f"{slides}/unknown.svs"
    lines = [f"{known} 10 20 0", f"{slides}/with space.svs 30 -40 1", f"{unknown} 5 6 1",
             f"{slides}/six 6 fields.svs 7 8 1 2.0001 1.9998"]
    source = open_source(sample_list=write_list(slides, lines), slide_mpp=mpp, exact_reads=exact)
    assert set(wheres(source, range(4))) == {
        (known, 10, 20, 0.5), (f"{slides}/with space.svs", 30, -40, 2.0), (f"{slides}/six 6 fields.svs", 7, 8, 2.0),
        (unknown, 5, 6, 2.0 if mpp else None)}, "a stated mpp is a known one"
    assert FakeSlide.keys[known][:2] == (mpp or None, exact) and FakeSlide.keys[unknown][:2] == (mpp or 1.0, exact)
    pixels = {tuple(source.read(n)[0][0, 0].tolist()) for n in range(4)}
    assert pixels == {(10, 20, 0), (30, 216, 1), (5, 6, 1), (7, 8, 1)}


def test_a_list_of_places_off_the_slide_is_bad_and_whole_um_are_no_path(slides):
    """The bug: white tiles, of which nobody heard."""
    places = [(-63, 0, 0), (999, 999, 0), (-250, 0, 1), (-64, 0, 0), (0, 1000, 0), (-256, 0, 1), (5000, 5000, 1)]
    file = write_list(slides, [f"{slides}/a.svs {x} {y} {level} 1 1" for x, y, level in places])
    source = open_source(sample_list=file)
    assert source.found == [f"{slides}/a.svs"]
    errors = errors_of(source, range(7))
    assert len(errors) == 4 and all(error.startswith(f"{slides}/a.svs: the line '... ") for error in errors)
    assert any(f"'... 5000 5000 1' of {file} lies outside the slide of (1000, 1000) px" in error for error in errors)


@pytest.mark.parametrize("line", ["a.svs 10 20", "a.svs 10 20 x", "a.svs 1.5 20 0", "a.svs 1 2 256", "a.svs 1 2 -1",
                                  f"a.svs {2**31} 2 0", "a.svs 1 2 0.25 0.25"])
def test_a_bad_line_is_named_with_its_number(line, slides, tables):
    file = write_list(slides, ["a.svs 1 2 0", line])
    with one_line("list.txt, line 2: not 'path x y level'"):
        open_source(sample_list=file)
    assert not tables.exists()


def test_a_list_is_a_memory_map_of_13_bytes_per_line_that_is_parsed_again_only_if_file_or_holdout_change(
        slides, monkeypatch):
    """The bug: the list's strings in every rank, 42 GB per node."""
    file = write_list(slides, [f"{slides}/{i % 3}.svs {i} 0 0" for i in range(100)])
    source = open_source(sample_list=file)
    assert isinstance(source.table, np.memmap) and source.table.mode == "r" and source.table.nbytes == 1300
    parse, parsed = sources.SampleList.parse, []
    monkeypatch.setattr(sources.SampleList, "parse", lambda self: parsed.append(0) or parse(self))
    again = open_source(sample_list=file)
    assert not parsed and wheres(again, range(100)) == wheres(source, range(100))
    stat = os.stat(file)
    write_list(slides, [f"{slides}/{i % 3}.svs {99 - i} 0 0" for i in range(100)])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = open_source(sample_list=file)
    assert len(parsed) == 1 and changed.table["x"].tolist() == source.table["x"][::-1].tolist()
    for holdout, patient, times in ((0.5, r"\d", 2), (0.5, r"\d\.s", 3), (0.3, r"\d", 4), (0.5, r"\d", 4)):
        open_source(sample_list=file, holdout=holdout, patient=patient)
        assert len(parsed) == times, "a table for each share and pattern of patients, and kept"


def table_of(file, build):
    rows, names = sources.shared_table("test", [file], CONFIG, np.int64, build)
    return rows.tolist(), names


def one_rank(folder):
    def build():
        assert dist.get_rank() == 0
        return np.arange(5), ["a"]
    tempfile.tempdir = str(folder)
    dist.init_process_group("gloo")
    return table_of(folder / "input", build)


def test_the_first_rank_of_a_node_builds_the_table_and_the_others_wait(on_ranks, tmp_path):
    (tmp_path / "input").touch()
    assert on_ranks(3, one_rank, tmp_path) == [([0, 1, 2, 3, 4], ["a"])] * 3


def test_a_killed_or_failed_builder_leaves_no_table_that_is_used(tmp_path, tables, monkeypatch):
    (tmp_path / "input").touch()
    file, save = tmp_path / "input", np.save

    def killed(path, rows):
        save(path, rows)
        os.kill(os.getpid(), signal.SIGKILL)

    def full_disk(path, rows):
        save(path, rows[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", killed)
    process = FORK.Process(target=table_of, args=(file, lambda: (np.arange(5), [])))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        table_of(file, lambda: (np.arange(5), []))
    assert not [p for p in tables.iterdir() if p.is_file()]
    monkeypatch.setattr(np, "save", save)
    assert table_of(file, lambda: (np.arange(6), [])) == ([0, 1, 2, 3, 4, 5], [])
    os.remove(next(tables.glob("*.npy")))  # as a cleaner of temporary folders does
    assert table_of(file, lambda: (np.arange(7), []))[0] == list(range(7))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_tile_of_a_folder_becomes_rgb(mode, tmp_path):
    folder = write_folder(tmp_path, [f"case{i % 2}/{i}.png" for i in range(6)])
    want = [Image.fromarray(noise(i)).convert(mode) for i in range(6)]
    for i, image in enumerate(want):
        image.save(tmp_path / f"case{i % 2}/{i}.png")
    tiles = [open_source(tiles=folder).read(n) for n in range(6)]
    assert len({where["slide"] for _, where in tiles}) == 6
    for pixels, where in tiles:
        assert np.array_equal(pixels, np.array(want[int(Path(where["slide"]).stem)].convert("RGB")))


def test_transparent_pixels_of_a_tile_are_white_and_other_depths_are_refused(tmp_path):
    """The bug: a tile over the slide's edge, saved as read_region gives it, was black there."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (200, 90, 160, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba).convert("RGB").save(tmp_path / "b.png", transparency=(0, 0, 0))  # a colour for transparent
    for name in ("a.png", "b.png"):
        tile = sources.decode(str(tmp_path / name), "a")
        assert (tile[:, :4] == 255).all() and (tile[:, 4:] == (200, 90, 160)).all()
    for dtype, mode in ((np.float32, "F"), (np.uint16, "I;16")):
        Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "b.tif")
        with pytest.raises(OSError, match=f"b: ValueError: {mode} pixels"):
            sources.decode(str(tmp_path / "b.tif"), "b")


@pytest.mark.parametrize("form, frames, sound", [
    ("PPM", 1, False), ("JPEG2000", 1, False), ("GIF", 1, False), ("GIF", 2, False), ("WEBP", 2, False),
    ("PNG", 2, False), ("TIFF", 2, False), ("WEBP", 1, True), ("PNG", 1, True), ("TIFF", 1, True), ("BMP", 1, True)])
def test_an_image_of_another_format_or_of_several_pictures_is_refused_by_any_name(form, frames, sound, tmp_path):
    """The bugs: 12 bits in a PPM of 16 were nearly black; the first picture of a stack stood for all."""
    images = [Image.fromarray(noise(i)) for i in range(frames)]
    keys = {"append_images": images[1:], "save_all": True} if frames > 1 else {}
    lossless = {"lossless": True} if form == "WEBP" else {}
    images[0].save(tmp_path / "a.png", form, **keys, **lossless)
    if sound:
        assert np.array_equal(sources.decode(tmp_path / "a.png", "a"), noise(0))
    else:
        with pytest.raises(OSError, match="^a: (UnidentifiedImageError: not a JPEG, PNG|ValueError: 2 images of one)"):
            sources.decode(tmp_path / "a.png", "a")


@pytest.mark.parametrize("sides", [(12, 24), (24, 12, 24), (24, 12, 6)])
def test_a_tiff_whose_first_page_is_not_the_largest_is_refused(sides, tmp_path):
    """The bug: a thumbnail before the picture stood for it."""
    first, *others = [Image.fromarray(noise(i, side)) for i, side in enumerate(sides)]
    first.save(tmp_path / "a.tif", append_images=others, save_all=True)
    if sides == (24, 12, 6):
        assert np.array_equal(sources.decode(tmp_path / "a.tif", "a"), noise(0))
    else:
        with pytest.raises(OSError, match="a: ValueError: . images of one size, or the first is not the largest"):
            sources.decode(tmp_path / "a.tif", "a")


@pytest.mark.parametrize("shape, keys", [((8, 8, 5), {"extrasamples": (0, 0)}), ((8, 8), {})])
def test_a_tiff_of_signed_numbers_or_more_channels_is_refused(shape, keys, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    kind, form = (np.uint8, "rgb") if keys else (np.int8, "minisblack")
    plan = "contig" if keys else None
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, kind), photometric=form, planarconfig=plan, **keys)
    with pytest.raises(OSError, match="a: ValueError: . channels of SampleFormat"):
        sources.decode(tmp_path / "a.tif", "a")


def png_of_16_bits(colours, channels):
    """Bytes of an 8 x 8 PNG of 16 bits, all 5."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colours, 0, 0, 0)),
             (b"IDAT", zlib.compress((b"\0" + 8 * channels * b"\0\5") * 8)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data +
                                            struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)


def test_no_image_of_16_bits_is_read_by_its_upper_8(tmp_path):
    """The bug: 12 bits of a camera became a nearly black tile; bands in planes of their own became noise."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    for i, (array, keys) in enumerate([(pixels, {}), (pixels, dict(byteorder=">")),
                                       (pixels.transpose(2, 0, 1), dict(planarconfig="separate")),
                                       (np.dstack([pixels, pixels[..., 0]]), dict(extrasamples=["unassalpha"]))]):
        tifffile.imwrite(tmp_path / f"{i}.tif", array, photometric="rgb", **keys)
        with pytest.raises(OSError, match="a: ValueError: RGBA? pixels of more than 8 bits per channel"):
            sources.decode(tmp_path / f"{i}.tif", "a")
    for colours, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        with pytest.raises(OSError, match="a: ValueError: .* pixels of more than 8 bits per channel"):
            sources.decode(png_of_16_bits(colours, channels), "a")
    tifffile.imwrite(tmp_path / "8.tif", np.uint8(pixels >> 4).transpose(2, 0, 1), photometric="rgb",
                     planarconfig="separate")
    assert np.array_equal(sources.decode(tmp_path / "8.tif", "a"), pixels >> 4)


def test_a_damaged_tile_is_named_in_one_line(tmp_path):
    source = open_source(tiles=write_folder(tmp_path, ["0.png", "1.png", "2.png", "3.png"]))
    good = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(good[:200])
    (tmp_path / "1.png").write_bytes(b"not an image")
    (tmp_path / "2.png").write_bytes(good[:60] + b"\0" * 60 + good[120:])
    errors = errors_of(source, range(4))
    assert len(errors) == 3 and not any("\n" in e for e in errors)
    assert {e.split(": ")[0] for e in errors} == {f"{tmp_path}/{i}.png" for i in range(3)}


def test_shards_are_read_in_place(tmp_path):
    write_shard(tmp_path / "s", "b", 3, "/slides/some b.svs")
    source = open_source(shards=write_shard(tmp_path / "s", "a.1", 4))
    assert isinstance(source.table, np.memmap) and source.table.dtype.itemsize == 28
    seen = set()
    for n in range(7):
        pixels, where = source.read(n)
        stored = Image.open(io.BytesIO(encode(noise(where["x"] // 24), "JPEG")))
        assert np.array_equal(pixels, np.array(stored)) and (where["y"], where["mpp"]) == (7, 0.5)
        seen.add((where["slide"], where["x"]))
    assert seen == {("/slides/some b.svs", 24 * i) for i in range(3)} | {("/slides/a.1.svs", 24 * i) for i in range(4)}
    assert wheres(open_source(shards=f"{tmp_path}/s/b*"), range(3))[0][0] == "/slides/some b.svs"


def test_unfinished_shards_are_left_out_and_shards_cut_short_are_refused(tmp_path):
    shards = write_shard(tmp_path / "s", "a", 3)
    (tmp_path / "s/b.tar").write_bytes(b"half a tar")
    (tmp_path / "s/.c.tar").write_bytes(b"being written")
    (tmp_path / "s/tiles.json").write_text("{}")
    source = open_source(shards=shards)
    assert len(source.table) == 3 and "3 tiles of 1 finished of 2 shards" in source.about
    assert source.left_out == {f"{shards}/b.tar": f"no {shards}/b.json: unfinished, or copied without it"}
    with pytest.raises(ValueError, match="shards: no tile to train on: nothing is there or finished"):
        open_source(shards=f"{shards}/b.tar")
    tar = tmp_path / "s/a.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(ValueError, match="a.tar has 9,216 bytes, its .json says 10,240: copy it again, or"):
        open_source(shards=shards)
    side = json.loads((tmp_path / "s/a.json").read_text()) | {"bytes": os.path.getsize(tar)}
    for other in ({"key": 1}, side | {"slide": None}, {key: side[key] for key in side if key != "patient"}):
        (tmp_path / "s/a.json").write_text(json.dumps(other))  # somebody else's
        with pytest.raises(ValueError, match="a.json: prepare/tiles.py did not write this"):
            open_source(shards=shards)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_of_a_shards_names_the_one_with_its_json_counts(link, tmp_path):
    """The bug: the first name won, whose .json was not there, and the shard was called unfinished."""
    write_shard(tmp_path / "b", "x", 3)
    (tmp_path / "a").mkdir()
    link(tmp_path / "b/x.tar", tmp_path / "a/x.tar")
    source = open_source(shards=str(tmp_path))
    assert source.tars == [f"{tmp_path}/b/x.tar"] and source.size == 3
    assert source.left_out == {f"{tmp_path}/a/x.tar": f"the same file as {tmp_path}/b/x.tar"}


def test_a_linked_shard_has_its_json_beside_the_file_itself(tmp_path):
    """The bug: it was called unfinished, and not by its name."""
    write_shard(tmp_path / "store", "x", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/z.tar").symlink_to(tmp_path / "store/x.tar")
    source = open_source(shards=f"{tmp_path}/mine")
    assert source.size == 3 and not source.left_out and wheres(source, [0])[0][0] == "/slides/x.svs"


@pytest.mark.parametrize("allowed, size", [(60, 30), (1024, 256), (resource.RLIM_INFINITY, 256)])
def test_no_more_shards_are_open_than_half_of_what_the_system_allows(allowed, size, tmp_path, monkeypatch):
    """The bug: with more shards than files allowed, their tiles were unreadable."""
    monkeypatch.setattr(resource, "getrlimit", lambda what: (allowed, allowed))
    assert open_source(shards=write_shard(tmp_path, "a", 1)).open.cache_info().maxsize == size


def test_a_damaged_or_short_member_is_named_with_its_tar_and_place(tmp_path):
    source, lost = open_source(shards=write_shard(tmp_path, "a", 3)), open_source(shards=str(tmp_path))
    tar, offset = tmp_path / "a.tar", json.loads((tmp_path / "a.json").read_text())["offset"]
    blob = bytearray(tar.read_bytes())
    blob[offset[1]: offset[1] + 40] = bytes(40)
    tar.write_bytes(blob[: offset[2] + 9])
    errors = errors_of(source, range(3))
    assert len(errors) == 2 and all(e.startswith(f"{tar}: tile x=") for e in errors)
    assert any(f"x=24 y=7 at byte {offset[1]}: UnidentifiedImageError" in e for e in errors)
    assert any(f"x=48 y=7 at byte {offset[2]}: " in e for e in errors)
    os.remove(tar)
    with pytest.raises(OSError, match=r"a.tar: tile x=\d+ y=\d+ at byte \d+: No such file"):
        lost.read(0)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_parquet_rows_hold_png_or_jpeg(form, tmp_path):
    source = open_source(parquet=write_parquet(tmp_path / "p", ((3, 2), (2,)), form, ("a.svs", "b.svs")))
    seen = set()
    for n in range(7):
        pixels, where = source.read(n)
        want = noise(where["x"])
        assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(encode(want, form)))) if form == "JPEG" else want)
        assert where["slide"] == ("a.svs", "b.svs")[where["x"] % 2] and math.isnan(where["mpp"])
        seen.add(where["x"])
    assert seen == set(range(7))


@pytest.mark.parametrize("column, values, message", [
    ("image_bytes", [None], "image_bytes of row 0 is of type NoneType"), ("slide_path", [None], "slide_path is no"),
    ("image_bytes", ["a.png"], "image_bytes of row 0 is of type str"),
    ("image_bytes", [{"bytes": b"x", "path": "y"}], "image_bytes of row 0 is of type dict")])
def test_a_parquet_without_bytes_or_a_slide_is_named(column, values, message, tmp_path):
    """The bugs: text was opened as a path; without a slide nothing was said, or 'NoneType' without a row."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"slide_path": ["a"], "x": [0], "y": [0], "image_bytes": [encode(noise(0))]} | {column: values}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(OSError, match=f"0.parquet: .*{message}"):
        open_source(parquet=str(tmp_path)).read(0)


def test_parquet_reads_a_row_group_once_per_pass_in_a_new_order_and_mixes_the_rows_of_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 4)
    folder, read = write_parquet(tmp_path / "p", ((5,) * 6, (5,) * 6)), []
    load = sources.Parquet.load
    monkeypatch.setattr(sources.Parquet, "load", lambda self, *group: read.append(group) or load(self, *group))
    source = open_source(parquet=folder)
    passes = [[x // 5 for _, x, *_ in wheres(source, range(p * 60, p * 60 + 60))] for p in range(2)]
    assert len(set(read[:12])) == 12 and 16 <= (total := len(read)) <= 24
    assert passes[0] != passes[1], "a group of a pass's end may still be there at the start of the next"
    for p in passes:
        for window in range(3):
            groups = p[20 * window: 20 * window + 20]
            assert len(set(groups)) == 4 and groups != sorted(groups, key=groups.index), "rows of four groups, mixed"
    for attempt in range(1, 20):  # replacements do not throw a group out
        source.read(119, attempt)
    assert len(read) == total


def test_parquets_order_of_groups_and_rows_is_new_in_each_pass_and_with_each_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 1)
    folder, groups, rows = write_parquet(tmp_path / "p", ((10,) * 6, (10,) * 6)), set(), set()
    for seed in range(2):
        xs = np.array([x for _, x, *_ in wheres(open_source(parquet=folder, seed=seed), range(240))]).reshape(2, 12, 10)
        groups |= {tuple(p[:, 0] // 10) for p in xs}
        rows |= {tuple(window % 10) for window in xs.reshape(24, 10)}
    assert len(groups) == 4 and len(rows) == 48


def test_what_parquet_lacks_is_named(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": [1], "image": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(OSError, match="a.parquet: no column image_bytes, slide_path, y"):
        open_source(parquet=str(tmp_path))
    folder = write_parquet(tmp_path / "p", ((2,),))
    source = open_source(parquet=folder)
    whole = (tmp_path / "p/0.parquet").read_bytes()
    (tmp_path / "p/0.parquet").write_bytes(whole[:4] + bytes(400) + whole[404:])
    with pytest.raises(OSError, match="0.parquet: row"):
        source.read(0)
    (tmp_path / "p/0.parquet").write_bytes(whole[:900])
    with pytest.raises(OSError, match="0.parquet: .*[Pp]arquet"):
        open_source(parquet=folder)
    monkeypatch.setattr(sources, "GROUP_BYTES", 100)
    with pytest.raises(OSError, match="0.parquet: row group 0 has 0 MB, .*: write it again with a row_group_size"):
        open_source(parquet=write_parquet(tmp_path / "large", ((2,),)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="parquet: needs pyarrow: pip install pyarrow"):
        open_source(parquet="anything")


class Numbered:
    """A source that remembers what it is asked for."""

    def __init__(self, name, config):
        self.name, self.about, self.seed, self.asked = name, name, config["seed"], []

    def read(self, n, attempt=0):
        self.asked.append((n, attempt))
        return None, {"slide": self.name, "x": n, "y": 0, "mpp": math.nan}


def open_mix(weights, monkeypatch, seed=0):
    monkeypatch.setitem(sources.SOURCES, "tiles", Numbered)
    return open_source(mix=tuple(("tiles", name, w) for name, w in weights.items()), tiles_per_visit=4, seed=seed)


def test_a_mix_draws_a_source_per_visit_by_weight_seed_and_sample_number(monkeypatch):
    weights = {"a": 7, "b": 2, "c": 1}
    source, again, other = (open_mix(weights, monkeypatch, seed) for seed in (0, 0, 1))
    names = [source.read(n)[1]["slide"] for n in range(8000)]
    share = collections.Counter(names)
    assert share["b"] / 8000 == pytest.approx(0.2, abs=0.03) and share["c"] / 8000 == pytest.approx(0.1, abs=0.03)
    assert all(len(set(names[i: i + 4])) == 1 for i in range(0, 8000, 4)), "a visit is to one source"
    assert sorted(n for s in source.sources for n, _ in s.asked) == list(range(8000)), "asked for the sample itself"
    assert [again.read(n)[1]["slide"] for n in range(7999, 7000, -1)] == names[:7000:-1]
    assert [other.read(n)[1]["slide"] for n in range(800)] != names[:800]
    assert {source.read(n, attempt=3)[1]["slide"] == names[n] for n in range(100)} == {True}, "replaced from the same"
    assert [s.seed for s in source.sources] == [0, 1000, 2000], "or two sources of slides would draw alike"
    assert source.about == "70.0% a; 20.0% b; 10.0% c"


def test_the_choice_of_a_source_does_not_choose_its_slides_or_their_mpp(slides):
    """The bug: one random stream for both, so that a source of weight 0.3 was read at the first mpp alone."""
    for i in range(30):
        (slides / f"x{i}.svs").touch()
    mix = (("slides", f"{slides}/x*", 3), ("slides", f"{slides}/a*", 7))
    seen = wheres(open_source(mix=mix, tiles_per_visit=1, mpps=(0.5, 1.0)), range(600))
    count = collections.Counter((Path(path).stem[0], mpp) for path, *_, mpp in seen)
    assert min(count["x", 0.5], count["x", 1.0]) > 60 and min(count["a", 0.5], count["a", 1.0]) > 160
    assert len({path for path, *_ in seen}) == 31


@pytest.mark.parametrize("mix", [("tiles", "a", 1.0), (("tiles", "a"),), (("photos", "a", 1),), (("tiles", "a", 0),),
                                 (("tiles", "a", "b"),), (("tiles", "a", math.nan),)])
def test_a_mix_that_is_none_is_named(mix):
    with pytest.raises(ValueError, match="mix: .* is not .one of slides, .*; its path; a weight"):
        open_source(mix=mix)


@pytest.mark.parametrize("keys, message", [
    ({}, "exactly one of slides, .*, mix .now: none"),
    ({"slides": "a", "tiles": "b"}, "now: slides, tiles.*--slides= --tiles=DIR"),
    ({"slides": f"{GOLDEN}/*.npz"}, "none of .* can be used .*npz"),
    ({"slides": str(GOLDEN)}, "it is a folder: try"), ({"slides": "/nowhere/*.svs"}, "no file matches /nowhere"),
    ({"sample_list": "nowhere.txt"}, "sample_list=nowhere.txt: no such file"),
    ({"tiles": "nowhere"}, "no folder nowhere"), ({"shards": str(GOLDEN)}, "shards: no file matches .*golden"),
    ({"shards": "nowhere"}, "shards: no file matches nowhere"),
    ({"mix": (("tiles", "nowhere", 1),)}, "^mix: tiles: no folder nowhere")])
def test_missing_data_is_named(keys, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_source(**keys)


BATCH = CONFIG | {"batch_size": 8, "local_crops": 2, "global_px": 56, "local_px": 28}


def test_a_slide_without_tissue_is_named_at_its_first_visit_and_counts_as_no_damage(slides):
    """The bug: each such slide was a bad tile, and 100 of them stopped the run."""
    for name in ("glass1", "glass2", "damaged"):
        (slides / f"{name}.svs").touch()
    batches = data.Batches(open_source(slides=f"{slides}/*.svs"), BATCH, 4)
    found = [batches[step] for step in range(8)]
    left_out, bad = (sum((batch[key] for batch in found), []) for key in ("left_out", "bad"))
    assert sorted(left_out) == [f"{slides}/glass{i}.svs: no tissue" for i in (1, 2)], "each once"
    assert bad and all("damaged.svs: cannot read" in message for message in bad)
    glass = data.Batches(open_source(slides=f"{slides}/glass*.svs"), BATCH, 4)[0]
    assert set(glass["bad"]) <= {f"{slides}/glass{i}.svs: no tissue" for i in (1, 2)} != set(), "why the run stops"


class Thin:
    """A source whose first draws have too little tissue."""

    def __init__(self, draws):
        self.draws = draws

    def read(self, n, attempt=0):
        if attempt < self.draws:
            raise sources.Unsuitable("thin.svs: no tile of 60% tissue")
        return np.full((64, 64, 3), 200, np.uint8), {}


def test_a_slide_without_a_fitting_tile_is_unsuitable_not_unreadable():
    batch = data.Batches(Thin(3), BATCH, 4)[0]
    assert batch["bad"] == [] and len(batch["global_crops"]) == 16
    batch = data.Batches(Thin(1000), BATCH, 4)[0]
    assert batch["bad"] == ["thin.svs: no tile of 60% tissue"] * 8 and "global_crops" not in batch


def test_lists_that_differ_have_different_names(tmp_path):
    a = open_source(tiles=write_folder(tmp_path / "a", ["0.png", "1.png"]))
    b = open_source(tiles=write_folder(tmp_path / "b", ["0.png", "2.png"]))
    c = open_source(tiles=write_folder(tmp_path / "c", ["0.png", "1.png"]))
    assert a.about == c.about != b.about, "by names, not by folders: nodes may mount them elsewhere"
