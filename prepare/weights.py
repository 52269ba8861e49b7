"""
Fetch Meta's weights to start from, and show that they open.

    python prepare/weights.py --name=dinov2_vitg14_reg     # vits14, vitb14, vitl14, vitg14, each with _reg or without
    python prepare/weights.py --url='https://.../dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth?...'    # mind the quotes

It writes data/weights/<released name>.pth. A file that is there already, such as one copied by hand, is only checked:
by the start of its sha256, if the name ends with that as DINOv3's do, and by the CRCs that it holds. DINOv2's weights
are Apache 2.0. DINOv3's need their licence accepted at ai.meta.com/resources/models-and-libraries/dinov3-downloads; the
links then come by e-mail.
"""
import hashlib
import os
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

from torch.hub import HASH_REGEX, download_url_to_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from configurator import configure

name = ""             # a DINOv2 encoder's name in model.ARCHS
url = ""              # or the address of a .pth file
out = "data/weights"  # folder to write
server = "https://dl.fbaipublicfiles.com"


def check(path):
    """The file's number of parameters. Raises ValueError if it is damaged, has another sha256, or is no encoder."""
    hashed = HASH_REGEX.search(path.name)
    if hashed:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(hashed[1]):
            raise ValueError(f"its sha256 starts with {found[:8]} instead of {hashed[1]}")
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.save writes zip files
        raise ValueError("its bytes do not match its own checksums")
    return sum(p.numel() for p in model.load_backbone(path).parameters())


if __name__ == "__main__":
    configure(globals())
    if not url and not (name.startswith("dinov2") and name in model.ARCHS):
        raise SystemExit("weights: give --name=dinov2_vits14, _vitb14, _vitl14 or _vitg14, with or without _reg; for "
                         "DINOv3 accept its licence (see the top of this script) and give --url='LINK'")
    url = url or f"{server}/dinov2/{name.removesuffix('_reg')}/{name.replace('_reg', '_reg4')}_pretrain.pth"
    public = url.partition("?")[0]  # what follows may be a personal signature
    path = Path(out, public.rpartition("/")[2])
    try:
        os.makedirs(out, exist_ok=True)
        if not path.exists():
            download_url_to_file(url, path)
        print(f"{path}: {check(path) / 1e6:,.1f} M parameters; next: --weights={path} for train.py")
    except (OSError, HTTPException, ValueError, RuntimeError, zipfile.BadZipFile) as e:
        raise SystemExit(f"weights: {public}: {e}\nIf {path} is there, delete it and run this again, or download it "
                         "elsewhere (DINOv3: the whole link from the e-mail), copy it there, and run this again.")
