"""
TCGA slides from the Genomic Data Commons: list them in a manifest, and check a folder against it.

    python prepare/tcga.py --project=TCGA-BRCA           # lists the project's diagnostic slides, says what is missing
    python prepare/tcga.py --manifest=gdc_manifest.txt   # the same for a manifest from portal.gdc.cancer.gov

gdc-client (gdc.cancer.gov/access-data/gdc-data-transfer-tool) fetches the slides and checks their md5; this script
prints the command. Its exit status is 0 once the folder is complete. Slides are at data/TCGA/<id>/<filename>, for
slides="data/TCGA/**/*.svs". Plan for 1 GB per slide: the 12,000 of TCGA-12K are 12 TB.
"""
import csv
import json
import os
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure
from prepare.slides import write_csv

manifest = ""      # GDC manifest: tab-separated id, filename, md5, size; "" = out/gdc_manifest.<project>.txt
project = ""       # that file is written if it is not there: TCGA-BRCA, or several: TCGA-LUAD,TCGA-LUSC
out = "data/TCGA"  # folder of the slides
server = "https://api.gdc.cancer.gov"

FIELDS = {"file_id": "id", "file_name": "filename", "md5sum": "md5", "file_size": "size"}  # the API's: a manifest's
MANUAL = """
Or by hand: choose your projects' files at portal.gdc.cancer.gov with data type "Slide Image", experimental strategy
"Diagnostic Slide" and access "open"; download their manifest and give it as --manifest=FILE."""


def list_project():
    """The open diagnostic slides of a project as the GDC lists them today: a manifest's rows."""
    wanted = {"cases.project.project_id": project.split(","), "access": ["open"], "data_type": ["Slide Image"],
              "experimental_strategy": ["Diagnostic Slide"]}
    filters = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    query = {"filters": json.dumps({"op": "and", "content": filters}), "fields": ",".join(FIELDS), "size": 100_000}
    request = Request(f"{server}/files?{urlencode(query)}", headers={"User-Agent": "nanopfm"})
    with urlopen(request, timeout=60) as response:
        data = json.load(response)["data"]
    hits, total = data["hits"], data["pagination"]["total"]
    if not hits or len(hits) < total:
        raise ValueError(f"{project}: the GDC sent {len(hits)} of {total} slides; are the projects spelt as TCGA-BRCA?")
    return [{column: hit[field] for field, column in FIELDS.items()} for hit in hits]




def complete(row):
    """Whether `out` holds a manifest's file in its full size."""
    path = Path(out, row["id"], row["filename"])
    return path.is_file() and path.stat().st_size == int(row["size"])


if __name__ == "__main__":
    configure(globals())
    listed = Path(manifest or f"{out}/gdc_manifest.{project}.txt")
    try:
        os.makedirs(out, exist_ok=True)
        if project and not listed.exists():
            write_csv(listed, list_project(), "\t")
        with open(listed, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if not rows:
            raise ValueError("no rows")
        missing = [row for row in rows if not complete(row)]
    except (OSError, HTTPException, KeyError, ValueError, TypeError) as e:
        raise SystemExit(f"tcga: {listed}: no usable manifest ({type(e).__name__}: {e}){MANUAL}")
    if missing:
        rest, size = f"{out}/gdc_manifest.missing.txt", sum(int(row["size"]) for row in missing) / 1e9
        write_csv(rest, missing, "\t")
        raise SystemExit(f"tcga: {len(missing)} of {len(rows)} files are missing or cut short ({size:.2f} GB); run\n"
                         f"    gdc-client download -m {rest} -d {out}")
    print(f"{out}: all {len(rows)} files are there; next: python prepare/report.py --slides='{out}/**/*.svs'")
