"""
The BACH images, 400 of breast tissue in four classes, for eval_bach.py: fetched from Zenodo, checked, unzipped.

    python prepare/bach.py                                             # 10.4 GB to fetch, 7.4 GB unzipped; goes on
    python prepare/bach.py --zip=~/ICIAR2018_BACH_Challenge.zip        # you have the archive already
    python eval_bach.py --weights=FILE --bach_dir=data/BACH            # then

Writes data/BACH/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif and leaves out the archive's
whole slides. The data is CC BY-NC-ND 4.0: not for commercial use, and changed copies must not be passed on.
"""
import os
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from download import check_space, download, read_json

out = "data/BACH"  # folder to write: eval_bach's and train.py's bach_dir
zip = ""           # the archive, if you have it; "" = fetch it into out
server = "https://zenodo.org"

RECORD, NAME = "3632035", "ICIAR2018_BACH_Challenge"
MANUAL = f"""
by hand, from a machine that reaches Zenodo:
  1. https://zenodo.org/records/{RECORD}: download {NAME}.zip (10.4 GB)
  2. copy it here, then check and unzip it: python prepare/bach.py --zip={NAME}.zip --out={{out}}"""


def fetch(server, out):
    """The archive's path, once it has the size and md5 that Zenodo states."""
    files = read_json(f"{server}/api/records/{RECORD}").get("files", [])
    stated = next((file for file in files if file.get("key") == f"{NAME}.zip"), None)
    if stated is None:
        raise ConnectionError(f"{server}/api/records/{RECORD}: it lists no {NAME}.zip")
    path = Path(out, f"{NAME}.zip")
    have = next((p.stat().st_size for p in (path, Path(f"{path}.part")) if p.exists()), 0)
    check_space(out, stated["size"] - have)
    download(f"{server}/api/records/{RECORD}/files/{path.name}/content", path, stated["checksum"], stated["size"])
    return path


def unzip(path, out):
    """The photos of the archive at path into out: all 400 of them or nothing. Reading them checks their CRCs."""
    from eval_bach import bach_files

    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=out, prefix=".unzip") as temporary:
        photos = [m for m in archive.infolist() if m.filename.startswith(f"{NAME}/Photos/") and "/._" not in m.filename]
        check_space(out, sum(m.file_size for m in photos))
        archive.extractall(temporary, photos)  # zipfile keeps to the folder: it drops .. and a leading /
        bach_files(temporary)
        os.rename(Path(temporary, NAME), Path(out, NAME))


def main():
    from eval_bach import bach_files

    if Path(out, NAME).exists():
        bach_files(out)
        print(f"{out}: all 400 images are there")
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    path = Path(zip).expanduser() if zip else fetch(server, out)
    try:
        unzip(path, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
        raise ValueError(f"{path}: damaged ({e}); delete it and fetch it again")
    print(f"{out}: 400 images, CC BY-NC-ND 4.0; {path} is no longer needed; next: --bach_dir={out}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from configurator import configure

    configure(globals())
    try:
        main()
    except ConnectionError as e:
        raise SystemExit(f"bach: {e}; later, the same command goes on, or{MANUAL.format(out=out)}")
    except (ValueError, OSError) as e:
        raise SystemExit(f"bach: {e}")
