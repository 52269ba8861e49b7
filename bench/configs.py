"""
What config/ and the README claim of runs, computed: costs by train.py's dry run, results from the recorded toy runs.

    python bench/configs.py                  # rewrites "# cost:", "# result:" lines, tables in README.md, docs/toy.md
    python bench/configs.py --check=true     # names the files that no longer say what the code computes, as tests do

Costs are those of a step's TFLOP and memory on the ranks of the header's launch line. Hours follow from two step times
of ViT-g on eight H100s, 0.72 s (reported for OpenMidnight: 35 % MFU) and 0.45 s (what good code should reach: 56 %);
other configs are given the same MFU of their gpu_tflops, so a step's time is proportional to its TFLOP. Nothing here is
a measurement. Results are those of docs/toy_runs, which bench/toy_ablations.py wrote.
"""
import contextlib
import functools
import io
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
from configurator import configure

ROOT = Path(__file__).resolve().parent.parent

check = False

STEP_SECONDS = 0.72, 0.45            # of config/vitg.py
FOLDERS = ("scratch", "continued")   # of docs/toy_runs, each with a parent called recipe
PAGES = ("README.md", "docs/toy.md")
TABLE = r"(?m)^\| config \| question \|(.*\n)+?(?=\n)"
COMMAND = r"(?m)^    python eval_bach.py --runs='docs/toy_runs/(\w+)/\*' --parent=recipe.*\n\n"


# ---- costs ----------------------------------------------------------------------------------------------------------


def dry_run(file, *flags):
    """What `python train.py FILE --dry_run=true FLAGS` prints, in this process. SystemExit if it is refused."""
    text, argv = io.StringIO(), sys.argv
    sys.argv = ["train.py", str(ROOT / file), "--dry_run=true", *flags]
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise SystemExit(f"{file}: {e.code}") from None
    finally:
        sys.argv = argv
    return text.getvalue()


def number(pattern, text):
    return float(re.search(pattern, text, re.M)[1].replace(",", ""))


def cost(file, text):
    """What the cost lines of a config with this text should say."""
    ranks = re.search(r"nproc_per_node=(\d+)", text)
    flags = [f"--world_size={ranks[1] if ranks else 1}"]
    flags += [] if re.search(r"(?m)^gpu_memory_gb\b", text) else ["--gpu_memory_gb=80"]
    said = dry_run(file, *flags, "--step_seconds=1")
    tflop, steps, peak, lr, tiles, saved = (number(pattern, said) for pattern in (
        r"^compute: ([\d.]+)", r"; ([\d,]+) steps", r"([\d.]+) TFLOP/s", r"^learning rate: (\S+)",
        r"steps are ([\d,.]+) M", r"^checkpoint: (\S+)"))
    total, limit = re.search(r"^total ([\d.]+) of ([\d.]+) GB", said, re.M).groups()
    more, hours = re.search(r"; ([\d.]+) more to compute", said), []
    for seconds in STEP_SECONDS:
        seconds *= (tflop + float(more[1] if more else 0)) / vitg_tflop() * 989 / peak
        again = dry_run(file, *flags, f"--step_seconds={seconds}")
        hours.append(f"{number(r'images/s, ([0-9.]+) hours', again):.3g} h at {seconds:.2g} s")
    return (f"{tflop:.4g} TFLOP a step{f' and {more[1]} again' if more else ''}, {total} of {limit} GB a GPU; "
            f"{steps:,.0f} steps: {', '.join(hours)}\n"
            f"#           {tiles:.3g} M tiles, lr {lr:.4g} at its peak, a checkpoint of {saved:g} GB")


@functools.cache
def vitg_tflop():
    return number(r"^compute: ([\d.]+)", dry_run("config/vitg.py", "--world_size=8", "--gpu_memory_gb=80"))


# ---- results --------------------------------------------------------------------------------------------------------


@functools.cache
def groups(folder):
    """{name: curves.Group} of a folder of docs/toy_runs."""
    runs = [curves.load_run(str(path)) for path in sorted((ROOT / "docs/toy_runs" / folder).glob("*_*[0-9]"))]
    return {group.name: group for group in curves.group_runs(runs, "step")} if runs else {}


def against(folder, name):
    """An ablation's last point against its parent's, as text; "" if it was not run there."""
    found = groups(folder)
    return curves.against(found[name], found["recipe"], list(found.values())) if name in found else ""


def result(name):
    """What an ablation's result line should say."""
    found = [(folder, groups(folder)[name]) for folder in FOLDERS if name in groups(folder)]
    texts = [f"{folder}: {curves.plus_minus(group.bach[:, -1])}, {against(folder, name)}, {len(group.used)} seeds, "
             f"commit {group.runs[0].setting['code']}" for folder, group in found]
    return "\n#           ".join(texts) or "not run"


def header(path):
    """The text of a config with its computed lines as they should be."""
    text, file = path.read_text(), str(path.relative_to(ROOT))
    if "\n# cost:" in text:
        text = re.sub(r"(?m)^# cost: .*\n(#           .*\n)*", lambda _: f"# cost:     {cost(file, text)}\n", text)
    if path.parent.name == "ablate":
        text = re.sub(r"(?m)^# result: .*\n(#           .*\n)*", lambda _: f"# result:   {result(path.stem)}\n", text)
    return text


# ---- pages ----------------------------------------------------------------------------------------------------------


def runs_table():
    """A row for each config but the toy's: question, memory and hours of its header, the toy twins' results."""
    rows = ["| config | question | GB a GPU | hours | toy, from scratch | toy, continued |", "|---" * 6 + "|"]
    for path in (p for p in sorted((ROOT / "config").glob("*.py")) if not p.stem.startswith("toy")):
        text = path.read_text()
        lines = re.split(r"\n# run:", text)[0].removeprefix("# question:").replace("\n#", " ")
        question = " ".join(lines.partition("   parent:")[0].split())
        memory, hours = re.search(r", ([\d.]+) of \d+ GB", text), re.findall(r"([\d.]+) h at", text)
        twins = [against(folder, path.stem.removeprefix("vitg_")) or "-" for folder in FOLDERS]
        rows.append(f"| {path.name} | {question} | {memory[1] if memory else '-'} | {' / '.join(hours) or '-'} | "
                    f"{' | '.join(twins)} |")
    return "\n".join(rows) + "\n"


@functools.cache
def comparison(folder, picture):
    """What eval_bach.py --runs prints of a folder, without the figure's path; the figure goes to `picture`."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        curves.show(f"docs/toy_runs/{folder}/*", "recipe", picture)
    return text.getvalue().rpartition(f"{picture}")[0].rstrip()


def page(text, pictures, brief):
    """The text of README.md (brief: a comparison's second table) or docs/toy.md with its tables as they should be."""
    def fill(match):
        printed = comparison(match[1], f"{pictures}/toy_{match[1]}.png")
        lines = (printed.split("\n\n")[1] if brief else printed).splitlines()
        return match[0].partition("\n\n")[0] + "\n\n" + "".join(f"    {line}".rstrip() + "\n" for line in lines)
    text = re.sub(TABLE, lambda _: runs_table(), text)
    return re.sub(COMMAND + r"(?:(?:    .*)?\n)+?(?=\n*(?:\S|    python )|\Z)", fill, text)


def main():
    os.chdir(ROOT)
    stale = []
    with tempfile.TemporaryDirectory() as pictures:
        for path in [*sorted((ROOT / "config").rglob("*.py")), *(ROOT / name for name in PAGES)]:
            before = path.read_text()
            after = header(path) if path.suffix == ".py" else page(
                before, pictures if check else "docs", path.name == "README.md")
            if after != before:
                stale.append(str(path.relative_to(ROOT)))
                if not check:
                    path.write_text(after)
    if stale and check:
        raise SystemExit(f"configs: out of date, run python bench/configs.py: {', '.join(stale)}")
    print("\n".join([*stale, f"{len(stale)} files rewritten"]))


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except ValueError as e:
        raise SystemExit(f"configs: {e}")
