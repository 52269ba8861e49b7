"""
Many slides, one output folder: what report.py, tiles.py, coords.py and features.py have in common.

Each slide has a process of its own, except in features.py. If a slide kills it (out of memory, a fault in a codec),
that slide is named and the others get done. A result is written under another name and renamed, and a rerun skips what
is there. Several nodes or GPUs share a folder by parts: --part=3/16 takes every 16th slide of the sorted list, from the
third on. Start each part once.

    keys.json     the keys that the folder was begun with: a rerun with others is refused
    failed.csv    the slides that failed or could not be found, and why; failed.3of16.csv for a part
"""
import csv
import json
import os
import shutil
import signal
import sys
import time
from multiprocessing import connection, get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configurator
import listing
import wsi

# keys of these four scripts, beside their own
slides = ""         # glob of whole-slide images
out = ""            # folder to write
part = ""           # "3/16": every 16th slide, from the third on
workers = 2         # slides at a time, each in a process of its own
slide_mpp = 0.0     # um/px of level 0 of every slide, overriding what the files say; 0 = believe the files
mpp_table = ""      # csv with columns slide,mpp that states um/px of single slides, before slide_mpp; "" = none
trust_mpp = False   # believe the um/px of the files also where they contradict the objective power by more than 30 %
mpp_from_objective = False  # where nothing better is stated, take 10 / objective power: a guess, off by up to 50 %
exact_reads = True  # undo OpenSlide's interpolation (wsi.py)
mask_dir = ""       # folder that keeps tissue masks for these scripts and for training; "" = none
overlap = 0         # px of a tile that its neighbour repeats
min_tissue = 0.25   # share of a tile's area in the tissue mask

FREE = """slides out part workers mask_dir batch_size device weights norm slide_mpp
mpp_table trust_mpp mpp_from_objective""".split()  # that a rerun may change: each result says what it was made with
SECONDS = 10        # between lines of progress


def run(script, function, namespace):
    """A script: set its keys and those of this file, and call function(config)."""
    config = configurator.configure({**globals(), **namespace}, shared=__file__)

    def checked():
        if config["workers"] < 0:
            raise ValueError(f"workers={config['workers']}: give 0 or more")
        wsi.check_pattern(config.get("patient", ""))
        function(config)

    configurator.run(script, checked)


def open_slide(path, config):
    """The Slide as the keys say. A mask in mask_dir that was made by another TISSUE is made again."""
    return wsi.open_slide(path, config, wsi.TISSUE)


def slides_of(config, lost, dots=False):
    """
    {path: name} of the slides of this part. A name is the file's without its ending; dots become _ unless `dots`.
    What is left out is said. The first part gets {path: reason} of it in `lost`, except for a slide's further names.

    Raises ValueError if two slides of any part would share a name, because one would overwrite the other.
    """
    if not config["slides"] or not config["out"]:
        raise ValueError("give --slides='FOLDER/*.svs' and --out=FOLDER")
    found, left_out = listing.find(config["slides"], "slides")
    paths, owners = wsi.one_each(found, left_out), {}
    listing.say_left_out(left_out | wsi.rows_without_slide(config["mpp_table"], found), print)
    for path in paths:
        name = Path(path).stem if dots else Path(path).stem.replace(".", "_")
        if name in owners:
            first, folder = owners[name], os.path.dirname(path)
            remedy = "give each folder its own --out"
            if os.path.dirname(first) == folder:
                remedy = f"narrow the pattern, such as '{os.path.join(folder, '*.svs')}', or rename one"
            raise ValueError(f"{first} and {path} would share the name {name}: {remedy}")
        owners[name] = path
    number, _, count = (config["part"] or "1/1").partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part={config['part']}: of 16 parts the first is 1/16, the last 16/16")
    os.makedirs(config["out"], exist_ok=True)
    if number == "1":
        lost.update((path, reason) for path, reason in left_out.items() if not reason.startswith("the same "))
    names = list(owners)[int(number) - 1::int(count)]
    return {owners[name]: name for name in names}


def part_file(config, name):
    """The path of a file of this part: out/failed.csv is out/failed.3of16.csv in part 3/16."""
    stem, ending = os.path.splitext(name)
    part = config["part"] and "." + config["part"].replace("/", "of")
    return os.path.join(config["out"], stem + part + ending)


def each(function, jobs, workers):
    """Yields (job, function(*job), "") as they end, each in its own process; without workers all are in this one.

    Yields (job, None, reason) for a job that failed or whose process died. The reason is an OSError for a full disk.
    """
    if not workers:
        yield from ((job, *call(function, job)) for job in jobs)
        return
    todo, running, context = list(reversed(jobs)), {}, get_context("fork")
    while todo or running:
        while todo and len(running) < workers:
            job = todo.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(sender, function, job), daemon=True)  # it ends with this one
            process.start()
            sender.close()  # the process holds the only other copy, so the pipe closes when it dies
            running[receiver] = process, job
        for receiver in connection.wait(running):
            process, job = running.pop(receiver)
            try:
                result, error = receiver.recv()
            except EOFError:
                process.join()
                code = process.exitcode
                how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
                result, error = None, f"its process died: {how} (out of memory? try fewer workers)"
            yield job, result, error


def send(sender, function, job):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sender.send(call(function, job))


def call(function, job):
    """(function(*job), ""), or (None, why it failed)."""
    try:
        return function(*job), ""
    except OSError as error:
        return None, error
    except Exception as error:  # whatever one slide of 10,000 brings, the others get done
        return None, one_line(error, job[0])


def one_line(error, path):
    """The message of a slide's error without line breaks and without the slide's path."""
    text = " ".join(str(error).split()).removeprefix(f"{path}: ")
    return text if isinstance(error, wsi.SlideError) else f"{type(error).__name__}: {text}"


def write_csv(file, rows, delimiter=","):
    """Write dicts that have the same keys, in one step."""
    with open(f"{file}.part", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{file}.part", file)


def settle(script, config, more):
    """Refuse keys that differ from those that the folder was begun with."""
    if not 0 <= config["overlap"] < config["tile_px"]:
        raise ValueError(f"overlap={config['overlap']}: give 0 to {config['tile_px'] - 1} px, less than tile_px")
    keys = {key: value for key, value in config.items() if key not in FREE}
    keys = json.loads(json.dumps({"script": script, **keys, **more, "TISSUE": wsi.TISSUE}))  # tuples become lists
    file = Path(config["out"], "keys.json")
    if not file.exists():
        part = Path(f"{file}.{os.getpid()}.part")
        part.write_text(json.dumps(keys, indent=1))
        part.replace(file)
    begun = json.loads(file.read_text())
    for key, value in keys.items():
        if begun.get(key, value) != value:
            raise ValueError(f"{file}: {key} was {begun[key]!r} and is {value!r} now; use another --out")


def walk(script, config, job, ending, workers, more=()):
    """
    Call job(path, name, file, part, config) for each slide whose file, its name + ending, is missing.

    A job writes `part`, renames it to `file`, and returns what to say of the slide, if anything. `more` are keys of
    keys.json. Raises SystemExit with the first reasons if any slide failed.
    """
    folder, jobs, failed, lost = part_file(config, ".unfinished"), [], [], {}
    names = slides_of(config, lost, dots=ending != ".json")  # a key in a WebDataset's tar has no dots
    settle(script, config, dict(more))
    for path, name in names.items():
        file = os.path.join(config["out"], name + ending)
        if not os.path.exists(file):
            jobs.append((path, name, file, os.path.join(folder, name), config))
    shutil.rmtree(folder, ignore_errors=True)  # a run that was killed left it
    os.mkdir(folder)
    began = shown = time.monotonic()
    try:
        for number, ((path, _, _, part, _), text, error) in enumerate(each(job, jobs, workers), 1):
            if isinstance(error, OSError):  # the next slide would fare no better
                raise OSError(f"{config['out']}: {error}; what is done is kept, and a rerun does the rest")
            if error:
                failed.append({"slide": path, "reason": error})
                Path(part).unlink(missing_ok=True)
            if error or text:
                print(f"{script}: {path}: {error or text}", flush=True)
            if time.monotonic() - shown > SECONDS:
                shown = time.monotonic()
                left = round((shown - began) / number * (len(jobs) - number) / 60)
                print(f"{script}: {number} of {len(jobs)} slides, {len(failed)} failed, {left} min left", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    before, file = len(names) - len(jobs), part_file(config, "failed.csv")
    print(f"{script}: {len(jobs) - len(failed)} slides done, {before} were done before, {len(failed)} failed")
    Path(file).unlink(missing_ok=True)
    if failed or lost:
        write_csv(file, failed + [{"slide": path, "reason": reason} for path, reason in lost.items()])
    if failed:
        reasons = "\n".join(f"  {row['slide']}: {row['reason']}" for row in failed[:5])
        raise SystemExit(f"{reasons}\n{script}: {len(failed)} of {len(names)} slides failed, see {file}")
