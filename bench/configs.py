"""
Fill the tables in README.md and docs/: what runs cost, what the recorded toy runs found, what bench/step.py measured.

    python bench/configs.py      # rewrites what stands between <!-- table: NAME --> and <!-- end -->

Memory and TFLOP are bench/budget.py's estimates for the ranks of a config's launch line. Hours follow from two times
per step of ViT-g on eight H100s: 0.72 s, reported for OpenMidnight (35 % MFU), and 0.45 s, which good code should reach
(56 %). Other configs get the same MFU of their gpu_tflops, so their time is proportional to their TFLOP. None of these
is measured. An ablation's cost is that of config/vitg.py with it. Results are those of docs/toy_runs, which
bench/toy_ablations.py recorded.
"""
import contextlib
import functools
import io
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
from bench import budget, step
from prepare.stats import train_config

ROOT = Path(__file__).resolve().parent.parent
STEP_SECONDS = 0.72, 0.45            # per step of config/vitg.py
FOLDERS = {  # of docs/toy_runs, each with a parent called recipe, and the columns of README's table
    "scratch": "toy, from scratch", "continued": "toy, continued", "tiles": "real tiles, from scratch"}
PAGES = ("README.md", "docs/toy.md", "docs/memory.md")
TABLE = r"(?s)<!-- table: (\w+) -->\n.*?<!-- end -->"


@functools.cache
def estimate(*files):
    """train.py's keys after these config files and budget.estimate's figures, on the ranks of the last launch line."""
    ranks = re.findall(r"nproc_per_node=(\d+)", "".join((ROOT / file).read_text() for file in files))
    world = int(ranks[-1]) if ranks else 1
    config = train_config([*(str(ROOT / file) for file in files), f"--world_size={world}"])
    return config, budget.estimate(config, world)


def hours(config, found):
    """Hours of a run at each of STEP_SECONDS."""
    vitg, of_vitg = estimate("config/vitg.py")
    slower = (found["tflop"] + found["recomputed_tflop"]) / of_vitg["tflop"] * vitg["gpu_tflops"] / config["gpu_tflops"]
    return [config["max_steps"] * seconds * slower / 3600 for seconds in STEP_SECONDS]


@functools.cache
def groups(folder):
    """{name: curves.Group} of a folder of docs/toy_runs."""
    runs = [curves.load_run(str(path)) for path in sorted((ROOT / "docs/toy_runs" / folder).glob("*_*[0-9]"))]
    return {group.name: group for group in curves.group_runs(runs)}


def against(folder, name):
    """How an ablation's last point differs from its parent's, as text; "-" if it was not run there."""
    found = groups(folder)
    return curves.against(found[name], found["recipe"], list(found.values())) if name in found else "-"


def run_table():
    """A row for each config except the toy's: question, memory, hours, and what the toy's runs say of an ablation."""
    lines = [f"| config | question | GB per GPU | hours | {' | '.join(FOLDERS.values())} |", "|---" * 7 + "|"]
    files = [path for path in (ROOT / "config").rglob("*.py") if not path.stem.startswith(("toy", "context"))]
    for path in sorted(files, key=lambda path: (path.parent, path.stem)):
        name, ablation = str(path.relative_to(ROOT / "config")), path.parent.name == "ablate"
        cost = "- | -"
        if path.stem != "baselines":
            config, found = estimate(*["config/vitg.py"] * ablation, f"config/{name}")
            slow, fast = hours(config, found)
            cost = f"{found['memory_gb']:.3g} | {slow:.1f} / {fast:.1f}"
        question = path.read_text().partition("\n")[0].removeprefix("# question: ")
        results = " | ".join(against(folder, path.stem) if ablation else "-" for folder in FOLDERS)
        lines.append(f"| {name} | {question} | {cost} | {results} |")
    return "\n".join(lines)


@functools.cache
def comparison(folder, picture):
    """What curves.py prints for a folder of docs/toy_runs, without the figure's path; the figure goes to `picture`."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        curves.show(f"docs/toy_runs/{folder}/*", "recipe", picture)
    return text.getvalue().rpartition(picture)[0].strip()


def fill(text, pictures):
    """A page's text with its tables anew: "runs", "step", or a folder of docs/toy_runs."""
    def table(match):
        if match[1] == "runs":
            lines = run_table()
        elif match[1] == "step":
            lines = step.table(step.read(ROOT / "docs/step.jsonl"))
        else:
            printed = comparison(match[1], f"{pictures}/toy_{match[1]}.png")
            lines = "\n".join(f"    {line}".rstrip() for line in printed.splitlines())
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(TABLE, table, text)


if __name__ == "__main__":
    os.chdir(ROOT)
    for page in map(Path, PAGES):
        text = page.read_text()
        filled = fill(text, "docs")
        page.write_text(filled)
        print(f"{page}: {'up to date' if filled == text else 'rewritten'}")
