"""
Meta's tile encoders, to start from: fetched, and shown to be whole and to open.

    python prepare/weights.py --name=dinov2_vitg14_reg     # vits14, vitb14, vitl14, vitg14, each with _reg or without
    python prepare/weights.py --url='https://.../dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth?...'    # mind the quotes

Writes data/weights/<released name>.pth; the same command checks a file that was brought there by hand. DINOv2's weights
are Apache 2.0. DINOv3's are under the DINOv3 licence: once you accept it at
ai.meta.com/resources/models-and-libraries/dinov3-downloads, an e-mail brings the links. The 8 digits at the end of such
a name begin the file's sha256; a file without them is known by its length and by the CRCs in it.
"""
import re
import sys
import zipfile
import zlib
from pathlib import Path

from download import download, public

name = ""             # a DINOv2 encoder, as in model.ARCHS
url = ""              # instead: the address of a .pth file
out = "data/weights"  # folder to write
check = True          # open it as train.py would; False for a file that is no backbone, such as a head
server = "https://dl.fbaipublicfiles.com"

MANUAL = """
by hand, from a machine that reaches it:
  1. download {url} (DINOv3: the whole link from the e-mail)
  2. copy it here as {path}; then the same command checks it"""


def address(name, url, server):
    if url and not re.fullmatch(r"https?://.+/[\w.-]+\.pth", public(url)):
        raise ValueError(f"url={url}: give the address of a .pth file, in quotes since it may hold & signs")
    match = re.fullmatch(r"(dinov2_vit[sblg]14)(_reg)?", name)
    if not url and not match:
        raise ValueError(f"name={name}: give dinov2_vits14, _vitb14, _vitl14 or _vitg14, with or without _reg. For "
                         "DINOv3 accept its licence (see this script's header), and give --url='LINK'")
    return url or f"{server}/dinov2/{match[1]}/{match[1]}{'_reg4' if match[2] else ''}_pretrain.pth"


def parameters(path):
    import model

    try:
        return f"{sum(p.numel() for p in model.load_backbone(path).parameters()) / 1e6:,.1f} M parameters"
    except ValueError as e:
        raise ValueError(f"{e}; --check=false if it is meant to be no backbone, else delete it and run this again")


def main(url, path):
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    checksum = f"sha256:{digits[1]}" if digits else ""
    download(url, path, checksum)
    try:
        bad = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # torch.save writes zip files
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        bad = e
    if bad:
        raise ValueError(f"{path}: damaged ({bad}); delete it and run this again")
    print(f"{path}: {path.stat().st_size:,} bytes, {checksum or 'no sha256 known'}, "
          f"{parameters(path) if check else 'not opened'}; next: --weights={path} for train.py or eval_bach.py")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from configurator import configure

    configure(globals())
    try:
        url = address(name, url, server)
        path = Path(out, public(url).rpartition("/")[2])
        main(url, path)
    except ConnectionError as e:
        by_hand = MANUAL.format(url=public(url), path=path)
        raise SystemExit(f"weights: {e}; later, the same command goes on, or{by_hand}")
    except (ValueError, OSError) as e:
        raise SystemExit(f"weights: {e}")
