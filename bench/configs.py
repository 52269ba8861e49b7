"""
What the headers of config/ claim, computed: cost by train.py's dry run, results by the recorded toy runs.

    python bench/configs.py                  # rewrites the lines "# cost:" and, in config/ablate, "# result:"
    python bench/configs.py --check=true     # names the headers that no longer say what the code computes; tests do

Costs are those of a step's TFLOP and memory on the ranks of the header's launch line. Hours follow from two step times
of ViT-g on eight H100s, 0.72 s (reported for OpenMidnight: 35 % MFU) and 0.45 s (what good code should reach: 56 %);
other configs are given the same MFU of their gpu_tflops, so a step's time is proportional to its TFLOP. Nothing here is
a measurement.
"""
import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import curves
from configurator import configure

check = False
record = "docs/toy_runs"

STEP_SECONDS = 0.72, 0.45     # of config/vitg.py
FOLDERS = {"toy": "scratch", "toy_continue": "continued"}  # parent's config -> its folder of `record`


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


def cost(file, header):
    """The text of a header's cost line."""
    ranks = re.search(r"nproc_per_node=(\d+)", header)
    flags = [f"--world_size={ranks[1] if ranks else 1}"]
    flags += [] if re.search(r"(?m)^gpu_memory_gb\b", header) else ["--gpu_memory_gb=80"]
    said = dry_run(file, *flags)
    tflop, steps = number(r"^compute: ([\d.]+)", said), number(r"; ([\d,]+) steps", said)
    total, limit = re.search(r"^total ([\d.]+) of ([\d.]+) GB", said, re.M).groups()
    more = re.search(r"; ([\d.]+) more to compute", said)
    vitg = number(r"^compute: ([\d.]+)", dry_run("config/vitg.py", "--world_size=8"))
    peak = dry_run(file, *flags, "--step_seconds=1")
    hours = []
    for seconds in STEP_SECONDS:
        seconds *= tflop / vitg * 989 / number(r" of ([\d.]+) TFLOP/s", peak)
        text = dry_run(file, *flags, f"--step_seconds={seconds}")
        hours.append(f"{number(r'images/s, ([0-9.]+) hours', text):.3g} h at {seconds:.2g} s")
    return (f"{tflop:.4g} TFLOP a step{f' and {more[1]} again' if more else ''}, {total} of {limit} GB a GPU; "
            f"{steps:,.0f} steps: {', '.join(hours)}")


def toy_result(name):
    """The text of an ablation's result line: its last point against its parent's, of the recorded runs."""
    found = []
    for folder in FOLDERS.values():
        runs = [curves.load_run(str(path)) for path in sorted((ROOT / record / folder).glob("*_[0-9]"))]
        groups = {g.name: g for g in curves.group_runs(runs, "step")} if runs else {}
        if name in groups and "recipe" in groups:
            group, parent = groups[name], groups["recipe"]
            found.append(f"{folder}: {curves.plus_minus(group.bach[:, -1])}, "
                         f"{curves.against(group, parent, list(groups.values()))} of {len(group.used)} seeds")
    return "; ".join(found) or "not run"


def header(path):
    """The file's text with its computed lines as they should be."""
    text, file = path.read_text(), str(path.relative_to(ROOT))
    if "\n# cost:" in text:
        text = re.sub(r"(?m)^# cost: .*$", f"# cost:     {cost(file, text)}", text)
    if path.parent.name == "ablate":
        text = re.sub(r"(?m)^# result: .*$", f"# result:   {toy_result(path.stem)}", text)
    return text


def main():
    stale = []
    for path in sorted((ROOT / "config").rglob("*.py")):
        if (text := header(path)) != path.read_text():
            stale.append(path.name)
            if not check:
                path.write_text(text)
                print(f"{path.relative_to(ROOT)}: " + "; ".join(re.findall(r"(?m)^# (?:cost|result): *(.*)$", text)))
    if stale and check:
        raise SystemExit(f"configs: {', '.join(stale)}: out of date; run python bench/configs.py")
    print(f"{len(stale)} headers {'out of date' if check else 'rewritten'}")


if __name__ == "__main__":
    configure(globals())
    main()
