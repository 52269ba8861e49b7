"""
Fetch and unzip the 400 BACH images that eval_bach.py scores: breast tissue in four classes.

    python prepare/bach.py                                            # fetches 10.4 GB, unzips 7.4 GB
    python prepare/bach.py --zip=~/ICIAR2018_BACH_Challenge.zip       # unzips an archive that you have

The images go to data/BACH/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif. The archive's whole
slides are left out. A download that breaks off starts over: on a poor connection fetch the archive with `wget -c`. The
data is CC BY-NC-ND 4.0: no commercial use, and you must not pass on changed copies.
"""
import os
import sys
import tempfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure
from eval_bach import bach_files

out = "data/BACH"  # folder to write; it is the bach_dir of eval_bach.py and train.py
zip = ""           # the archive, if you have it; "" = fetch it into out
server = "https://zenodo.org"

NAME = "ICIAR2018_BACH_Challenge"
MANUAL = """
Or by hand: download {name}.zip (10.4 GB) from https://zenodo.org/records/3632035 on another machine,
copy it here, and run: python prepare/bach.py --zip={name}.zip --out={out}"""


def unzip(path):
    """Put the archive's photos into `out`, all 400 or nothing. Reading them checks their CRCs."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=out, prefix=".unzip") as temporary:
        names = [name for name in archive.namelist() if name.startswith(f"{NAME}/Photos/") and "/._" not in name]
        archive.extractall(temporary, names)  # inside this folder: zipfile drops .. and a leading /
        bach_files(temporary)
        os.rename(Path(temporary, NAME), Path(out, NAME))


if __name__ == "__main__":
    configure(globals())
    archive = Path(zip).expanduser() if zip else Path(out, f"{NAME}.zip")
    try:
        os.makedirs(out, exist_ok=True)
        if not Path(out, NAME).exists():
            if not zip and not archive.exists():
                download_url_to_file(f"{server}/api/records/3632035/files/{NAME}.zip/content", archive)
            unzip(archive)
        bach_files(out)
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise SystemExit(f"bach: {archive} is damaged ({e}); delete it and fetch it again")
    except (OSError, HTTPException, ValueError) as e:
        raise SystemExit(f"bach: {e}{'' if zip else MANUAL.format(name=NAME, out=out)}")
    print(f"{out}: all 400 images are there (CC BY-NC-ND 4.0); next: --bach_dir={out}")
