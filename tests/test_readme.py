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
    for path in re.findall(r"(?:config|prepare|docs|tests)/[\w/]+\.(?:py|png)", TEXT):
        assert (ROOT / path).exists(), path
    train = "".join((ROOT / f).read_text() for f in ("train.py", "eval_bach.py", "prepare/toy.py"))
    for key in set(re.findall(r"--(\w+)=", TEXT)) - {"nproc_per_node", "name"}:
        assert re.search(rf"^ *{key} = ", train, re.M), key
    assert len(TEXT.splitlines()) <= 250 and TEXT.isascii()
