"""The README must not rot: its map, its commands and its size."""
import re

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_map_names_every_file_with_about_its_line_count():
    counts = {file: int(n) for file, n in re.findall(r"^\| (\S+\.py) \| (\d+) \|", TEXT, re.M)}
    assert {path.name for path in ROOT.glob("*.py")} <= set(counts)
    found = {file: len((ROOT / file).read_text().splitlines()) for file in counts}
    stale = {file: (found[file], n) for file, n in counts.items() if abs(found[file] - n) > 0.05 * n}
    assert not stale, "(lines, as the README states)"


def test_files_and_keys_that_the_readme_names_exist():
    for path in re.findall(r"(?:config|prepare|bench|docs|tests)/[\w/]+\.(?:py|png)", TEXT):
        assert (ROOT / path).exists(), path
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("bench/*.py")]
    code = "".join(path.read_text() for path in scripts)
    for key in set(re.findall(r"--(\w+)=", TEXT)) - {"nproc_per_node"}:
        assert re.search(rf"^ *(\w+ = )*{key} = ", code, re.M), key
    assert len(TEXT.splitlines()) <= 220 and TEXT.isascii()
