"""prepare/bach.py, tcga.py and weights.py against a local server. Nothing leaves the loopback."""
import hashlib
import json
import os
import runpy
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_bach
import model

ROOT = Path(__file__).resolve().parent.parent
DATA, OTHER = np.random.default_rng(0).bytes(30_000), np.random.default_rng(1).bytes(30_000)
MD5 = hashlib.md5(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with server.files[path], else 404; server.short = bytes after which an answer breaks off."""

    def do_GET(self):
        self.server.log.append(self.path)
        data = self.server.files.get(self.path.split("?")[0])
        if data is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data[: self.server.short])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.log, server.short = {}, [], None
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(script, *flags):
        """(exit code, output) of a script with --out=tmp_path/out, in this process."""
        monkeypatch.setattr(sys, "argv", [script, f"--out={tmp_path}/out", *flags])
        code, message = 0, ""
        try:
            runpy.run_path(str(ROOT / "prepare" / script), run_name="__main__")
        except SystemExit as e:
            code, message = 1, e.code
        return code, capsys.readouterr().out + message

    return run


@pytest.mark.parametrize("script, flags, manual", [
    ("tcga.py", ["--project=TCGA-BRCA"], "portal.gdc.cancer.gov"),
    ("bach.py", [], "python prepare/bach.py --zip=ICIAR2018_BACH_Challenge.zip"),
    ("weights.py", ["--name=dinov2_vitg14_reg"], "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
    ("weights.py", ["--url=http://127.0.0.1:9/x-00000000.pth?Signature=secret"], "/x-00000000.pth"),
])
def test_without_a_network_the_manual_steps_are_shown(monkeypatch, tmp_path, run, script, flags, manual):
    monkeypatch.setenv("no_proxy", "*")
    code, text = run(script, "--server=http://127.0.0.1:9", *flags)  # nobody listens there
    assert code == 1 and "Connection refused" in text and "Or by hand: " in text and manual in text
    assert "secret" not in text[text.index(f"{script[:-3]}: "):] and not list((tmp_path / "out").iterdir())


# TCGA

NAMES = {f"id{i}": f"TCGA-AA-{1000 + i}-01Z-00-DX1.svs" for i in range(4)}


@pytest.fixture
def manifest(tmp_path):
    """A manifest of four files, with Windows' line ends and a column more, as the portal writes them."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    lines += ["\t".join([i, name, MD5, str(len(DATA)), "released"]) for i, name in NAMES.items()]
    path = tmp_path / "gdc_manifest.txt"
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def place(out, i, data=DATA):
    (out / i).mkdir(parents=True)
    (out / i / NAMES[i]).write_bytes(data)


def test_tcga_says_what_is_missing_cut_short_or_damaged(tmp_path, run, manifest):
    out = tmp_path / "out"
    place(out, "id0")
    place(out, "id1", DATA[:-1])
    place(out, "id2", OTHER)
    code, text = run("tcga.py", f"--manifest={manifest}")
    rest = out / "gdc_manifest.missing.txt"
    assert code == 1 and "2 of 4 files" in text and f"gdc-client download -m {rest} -d {out}" in text
    rows = manifest.read_text().splitlines()
    assert rest.read_text().splitlines() == [rows[0], rows[2], rows[4]], "its own columns, which gdc-client reads"
    assert f"{out}/id1/{NAMES['id1']}: not the manifest's file" in text and NAMES["id2"] not in text

    code, text = run("tcga.py", f"--manifest={manifest}", "--check=true")
    assert code == 1 and "3 of 4 files" in text and f"{NAMES['id2']}: not the manifest's file" in text
    for i in ("id1", "id2"):
        (out / i / NAMES[i]).write_bytes(DATA)
    place(out, "id3")
    code, text = run("tcga.py", f"--manifest={manifest}", "--check=true")
    assert code == 0 and "all 4 files are there" in text


@pytest.mark.parametrize("text", ["id\tfilename\nx\ty\n", "<html>", "id\tfilename\tmd5\tsize\nx\ty\tz\tlarge\n"])
def test_what_is_no_manifest_is_refused(tmp_path, run, text):
    (tmp_path / "m.txt").write_text(text)
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/y").touch()
    code, said = run("tcga.py", f"--manifest={tmp_path}/m.txt")
    assert code == 1 and "m.txt: no usable manifest" in said and "--project=TCGA-BRCA" in said


def test_tcga_makes_the_manifest_of_a_project_and_refuses_a_list_cut_short(server, tmp_path, run):
    hits = [{"file_id": i, "file_name": NAMES[i], "md5sum": MD5, "file_size": len(DATA)} for i in ("id0", "id1")]
    place(tmp_path / "out", "id0")
    flags = ["--project=TCGA-AA", f"--server={server.url}"]
    for total, says in ((3, "the GDC sent 2 of 3 slides"), (2, "1 of 2 files are missing")):
        server.files["/files"] = json.dumps({"data": {"hits": hits, "pagination": {"total": total}}}).encode()
        code, text = run("tcga.py", *flags)
        assert code == 1 and says in text
        assert (tmp_path / "out/gdc_manifest.TCGA-AA.txt").exists() == (total == 2)
    assert "Diagnostic+Slide" in server.log[0] and "TCGA-AA" in server.log[0]
    place(tmp_path / "out", "id1")
    assert run("tcga.py", *flags)[0] == 0 and len(server.log) == 2, "a manifest that is there stays"


# BACH

def bach_zip(path, leave_out="", extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for folder, prefix in eval_bach.CLASSES.items():
            for name in (f"{folder}/{prefix}{i:03d}.tif" for i in range(1, 101)):
                if name != leave_out:
                    archive.writestr(f"ICIAR2018_BACH_Challenge/Photos/{name}", f"{name} is not a picture")
        for name in ("ICIAR2018_BACH_Challenge/WSI/A01.svs", "__MACOSX/x", *extra,
                     "ICIAR2018_BACH_Challenge/Photos/Benign/._b001.tif"):
            archive.writestr(name, "not wanted")
    return path


def zenodo(server, data, checksum):
    record, name = "/api/records/3632035", "ICIAR2018_BACH_Challenge.zip"
    files = [{"key": "other.zip", "checksum": "md5:0"}, {"key": name, "checksum": f"md5:{checksum}"}]
    server.files = {record: json.dumps({"files": files}).encode(), f"{record}/files/{name}/content": data}


def test_bach_is_fetched_unzipped_and_what_eval_bach_expects(server, tmp_path, run):
    out, up = tmp_path / "out", "ICIAR2018_BACH_Challenge/Photos/../../../../evil.txt"
    data = bach_zip(tmp_path / "a.zip", extra=["../evil.txt", "/evil.txt", up]).read_bytes()
    zenodo(server, data, hashlib.md5(data).hexdigest())
    code, text = run("bach.py", f"--server={server.url}")
    assert code == 0 and "CC BY-NC-ND" in text, text
    paths = eval_bach.bach_files(out)
    assert len(paths) == 400 and Path(paths[0]).read_text() == "Benign/b001.tif is not a picture"
    assert sorted(os.listdir(out)) == ["ICIAR2018_BACH_Challenge", "ICIAR2018_BACH_Challenge.zip"]
    assert os.listdir(out / "ICIAR2018_BACH_Challenge") == ["Photos"]
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out"] and not Path("/evil.txt").exists()
    server.files = {}
    assert run("bach.py", f"--server={server.url}")[0] == 0, "what is there is not fetched again"


def test_an_archive_with_another_md5_is_not_unzipped(server, tmp_path, run):
    zenodo(server, bach_zip(tmp_path / "a.zip").read_bytes(), MD5)
    code, text = run("bach.py", f"--server={server.url}")
    assert code == 1 and f"expected md5:{MD5}, got md5:" in text and "delete the file" in text
    assert os.listdir(tmp_path / "out") == ["ICIAR2018_BACH_Challenge.zip"]


@pytest.mark.parametrize("trouble, says", [
    ("", "all 400 images are there"),
    ("flipped bit", "damaged (Bad CRC-32"),
    ("cut short", "damaged (File is not"),
    ("missing", "Invasive: 99 of 100 images, iv007.tif is missing"),
    ("absent", "No such file"),
])
def test_an_archive_that_you_have_gives_all_images_or_none(tmp_path, run, trouble, says):
    path = bach_zip(tmp_path / "a.zip", leave_out="Invasive/iv007.tif" if trouble == "missing" else "")
    if trouble == "flipped bit":
        path.write_bytes(path.read_bytes().replace(b"Benign/b002.tif is", b"Benign/b002.tif iz"))
    elif trouble == "cut short":
        path.write_bytes(path.read_bytes()[:20_000])
    elif trouble == "absent":
        path.unlink()
    code, text = run("bach.py", f"--zip={path}", "--server=http://127.0.0.1:9")
    assert code == bool(trouble) and says in text
    assert os.listdir(tmp_path / "out") == ([] if trouble else ["ICIAR2018_BACH_Challenge"])


def test_an_incomplete_bach_folder_is_named_and_left_alone(tmp_path, run):
    photos = tmp_path / "out/ICIAR2018_BACH_Challenge/Photos/Benign"
    photos.mkdir(parents=True)
    code, text = run("bach.py", "--server=http://127.0.0.1:9")
    assert code == 1 and "Benign: 0 of 100 images" in text and photos.exists()


# weights

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.pth"
    torch.manual_seed(0)
    torch.save({"teacher": model.ViT(model.ARCHS["toy"]).state_dict(), "arch": "toy"}, path)
    return path.read_bytes()


@pytest.mark.parametrize("name, url", [
    ("dinov2_vits14", "/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    ("dinov2_vitg14_reg", "/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
])
def test_weights_by_name_come_from_metas_address_and_are_checked(server, tmp_path, run, weights, name, url):
    server.files[url], path = weights, tmp_path / "out" / url.rpartition("/")[2]
    flags = [f"--name={name}", f"--server={server.url}"]
    for _ in range(2):  # the second time, what is there is checked
        code, text = run("weights.py", *flags)
        assert code == 0 and "M parameters" in text and len(server.log) == 1
    assert path.read_bytes() == weights
    damaged = bytearray(weights)
    damaged[len(weights) // 2] ^= 1
    for bad in (damaged, weights[:-1000], b"<html>log in</html>"):
        path.write_bytes(bad)
        code, text = run("weights.py", *flags)
        assert code == 1 and f"{path} is no good: " in text and "delete it" in text


def test_a_download_that_breaks_off_is_noticed(server, run, weights):
    server.files["/x.pth"], server.short = weights, len(weights) // 2
    code, text = run("weights.py", f"--url={server.url}/x.pth")
    assert code == 1 and ("is no good: " in text or "Or by hand" in text), text


def test_weights_by_url_are_held_to_the_hash_in_their_name(server, tmp_path, run, weights):
    digits = hashlib.sha256(weights).hexdigest()[:8]
    name, query = f"dinov3_vitx16_pretrain-{digits}.pth", "?Policy=a&Signature=b.pth"
    server.files = {f"/{name}": weights, "/x-00000000.pth": weights}
    assert run("weights.py", f"--url={server.url}/{name}{query}")[0] == 0
    assert server.log == [f"/{name}{query}"] and (tmp_path / "out" / name).read_bytes() == weights
    code, text = run("weights.py", f"--url={server.url}/x-00000000.pth")
    assert code == 1 and f'expected "00000000", got "{hashlib.sha256(weights).hexdigest()}"' in text
    assert os.listdir(tmp_path / "out") == [name]
    (tmp_path / "out/x-00000000.pth").write_bytes(weights)  # copied by hand
    code, text = run("weights.py", f"--url={server.url}/x-00000000.pth")
    assert code == 1 and f"its sha256 starts with {digits} instead of 00000000" in text


def test_weights_without_an_address_are_asked_for(run):
    for flag in ("--name=dinov2_vitx14", "--name=dinov3_vitl16", "--url=dinov3.pth"):
        assert "give --name=dinov2_vits14" in run("weights.py", flag)[1]
