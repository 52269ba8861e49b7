"""
TCGA slides from the Genomic Data Commons: whatever a manifest names, resumed and checked, over several connections.

    python prepare/tcga.py --project=TCGA-BRCA           # lists its diagnostic slides in a manifest, and fetches them
    python prepare/tcga.py --manifest=gdc_manifest.txt   # one from portal.gdc.cancer.gov; after a stop, it goes on
    python prepare/tcga.py --manifest=gdc_manifest.txt --check=true   # also hash what is there, such as copied slides

Writes data/TCGA/<id>/<filename>, as gdc-client does, for slides="data/TCGA/**/*.svs", and data/TCGA/failed.csv with
what could not be had, and why. Only open access. Plan for 1 GB a slide: the 12,000 of TCGA-12K are 12 TB.
"""
import csv
import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlencode

from download import check_space, download, is_complete, progress, read_json
from tqdm import tqdm

manifest = ""      # GDC manifest: tab-separated id, filename, md5, size; "" = out/gdc_manifest.<project>.txt
project = ""       # writes that file if it is not there: TCGA-BRCA, or several: TCGA-LUAD,TCGA-LUSC
out = "data/TCGA"  # folder to write
workers = 4        # downloads at a time
check = False      # hash the files that are there already, at some 0.5 GB/s; otherwise their size is trusted
server = "https://api.gdc.cancer.gov"

COLUMNS = ("id", "filename", "md5", "size")
MANUAL = """
by hand, from a machine that reaches the GDC:
  1. portal.gdc.cancer.gov: choose the files of your TCGA projects with data type "Slide Image", experimental strategy
     "Diagnostic Slide" and access "open", and download their manifest
  2. gdc-client download -m gdc_manifest.txt -d FOLDER
  3. copy the content of FOLDER to {out} here, and see whether all is there and right:
     python prepare/tcga.py --manifest=gdc_manifest.txt --out={out} --check=true"""


def write_manifest(server, project, path):
    """The open diagnostic slides of a project, as the GDC lists them today."""
    wanted = {"cases.project.project_id": project.split(","), "access": ["open"], "data_type": ["Slide Image"],
              "experimental_strategy": ["Diagnostic Slide"]}
    filters = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    fields = ("file_id", "file_name", "md5sum", "file_size")
    query = {"filters": json.dumps({"op": "and", "content": filters}), "fields": ",".join(fields), "size": 100000}
    data = read_json(f"{server}/files?{urlencode(query)}")["data"]
    hits, total = data["hits"], data["pagination"]["total"]
    if not hits or len(hits) != total:
        raise ValueError(f"project={project}: the GDC lists {len(hits)} of {total} slides; write it like TCGA-BRCA")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([COLUMNS, *([hit[k] for k in fields] for hit in hits)])


def read_manifest(path):
    """[(id, filename, md5, size)] without repeats. ValueError for what is no manifest, or would write elsewhere."""
    with open(path, newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        if missing := [k for k in COLUMNS if k not in (table.fieldnames or [])]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; give a manifest of the GDC (tab-separated)")
        rows = list(dict.fromkeys(tuple(row[k] or "" for k in COLUMNS) for row in table))
    for row in rows:
        safe = all(re.fullmatch(r"[^/\\\0]+", name) and name not in (".", "..") for name in row[:2])
        if not safe or not re.fullmatch(r"[0-9a-fA-F]{32} \d+", " ".join(row[2:])):
            raise ValueError(f"{path}: row {row} is not a plain id, file name, md5 and size; correct it")
    return [(*row[:3], int(row[3])) for row in rows]


def fetch_all(rows, out, server, workers, check):
    """Download the rows that are not there; returns [(id, filename, reason)] of those that failed."""
    paths = {row: Path(out, row[0], row[1]) for row in rows}
    with ThreadPoolExecutor(workers) as pool:
        there = pool.map(lambda row: is_complete(paths[row], f"md5:{row[2]}", row[3], check), rows)
        there = list(tqdm(there, "checking", len(rows), disable=None if check else True))
    todo = [row for row, complete in zip(rows, there) if not complete]
    parts = [Path(f"{paths[row]}.part") for row in todo]
    needed = sum(row[3] for row in todo) - sum(part.stat().st_size for part in parts if part.exists())
    print(f"{len(rows)} files in the manifest, {len(rows) - len(todo)} are there, {needed / 1e9:.2f} GB to come")
    check_space(out, needed)
    failed = []
    with ThreadPoolExecutor(workers) as pool, progress(needed, "TCGA") as bar:
        jobs = {pool.submit(download, f"{server}/data/{row[0]}", paths[row], f"md5:{row[2]}", row[3], check, bar): row
                for row in todo}
        for job in as_completed(jobs):
            try:
                job.result()
            except ValueError as e:
                failed.append((*jobs[job][:2], str(e)))
            except OSError:  # the network or the disk: the others would fare no better
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def main():
    if not manifest and not project:
        raise ValueError("give --manifest=FILE or --project=TCGA-BRCA")
    listed = Path(manifest or Path(out, f"gdc_manifest.{project}.txt"))
    if project and not listed.exists():
        write_manifest(server, project, listed)
    rows = read_manifest(listed)
    Path(out).mkdir(parents=True, exist_ok=True)
    failed = fetch_all(rows, out, server, workers, check)
    with open(Path(out, "failed.csv"), "w", newline="") as file:
        csv.writer(file).writerows([("id", "filename", "reason"), *sorted(failed)])
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} files failed, such as {' '.join(failed[0][1:])}; all are in "
                         f"{out}/failed.csv; the same command tries them again")
    print(f"all {len(rows)} files are there; next: python wsi.py --task=report --slides='{out}/**/*.svs'")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from configurator import configure

    configure(globals())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops all threads at once; what they have stays good
    try:
        main()
    except ConnectionError as e:
        raise SystemExit(f"tcga: {e}; later, the same command goes on, or{MANUAL.format(out=out)}")
    except (ValueError, OSError) as e:
        raise SystemExit(f"tcga: {e}")
