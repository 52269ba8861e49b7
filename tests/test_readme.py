"""The README must not rot: its map, its commands and its size."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_map_names_every_file_with_about_its_line_count():
    counts = {file: int(n) for file, n in re.findall(r"^\| (\S+\.py) \| (\d+) \|", TEXT, re.M)}
    assert {p.name for p in ROOT.glob("*.py")} <= set(counts)
    for file, stated in counts.items():
        assert abs(len((ROOT / file).read_text().splitlines()) - stated) <= 0.05 * stated, file


def test_files_and_keys_that_the_readme_names_exist():
    for path in re.findall(r"(?:config|prepare|bench|docs|tests)/[\w/]+\.(?:py|png)", TEXT):
        assert (ROOT / path).exists(), path
    scripts = ("train.py", "eval_bach.py", "data.py", "wsi.py", "prepare/toy.py", "prepare/tcga.py",
               "prepare/weights.py", "bench/toy_baselines.py", "eval_folder.py", "curves.py")
    train = "".join((ROOT / f).read_text() for f in scripts)
    for key in set(re.findall(r"--(\w+)=", TEXT)) - {"nproc_per_node"}:
        assert re.search(rf"^ *(\w+ = )*{key} = ", train, re.M), key
    assert len(TEXT.splitlines()) <= 250 and TEXT.isascii() and not re.search(r"@\w", TEXT)


def test_each_config_differs_from_its_parent_by_what_its_body_says():
    bodies = {p.name: p.read_text() for p in (ROOT / "config").glob("*.py")}
    for name, text in bodies.items():
        header = [line for line in text.splitlines() if line.startswith("#")]
        assert any("question:" in h for h in header) and any("run:" in h for h in header), name
    values = {n: dict(re.findall(r"^(\w+) = (.+)$", t, re.M)) for n, t in bodies.items()}
    assert values["vitg_clip30.py"].keys() == values["vitg_clip3.py"].keys() == {"out_dir", "clip_grad"}
    assert values["vitg_clip30.py"]["clip_grad"] == "30.0" and values["vitg_clip3.py"]["clip_grad"] == "3.0"
