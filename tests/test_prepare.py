"""Downloads from a local server that drops connections, lies and serves wrong bytes. Nothing leaves the loopback."""
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "prepare"))
import download as d  # noqa: E402

import eval_bach  # noqa: E402
import model  # noqa: E402

DATA, OTHER = np.random.default_rng(0).bytes(300_000), np.random.default_rng(1).bytes(300_000)
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """server.files[path] = how to answer; its "plan" overrides that for the first requests, one entry each."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.log.append((path, self.headers["Range"]))
        self.server.queries.append(self.path)
        f = self.server.files.get(path, {"status": 404})
        f = {"data": b"", "etag": '"1"', "status": 200, **f, **(f["plan"].pop(0) if f.get("plan") else {})}
        if f["status"] != 200:
            return self.send_error(f["status"])
        data, start = f["data"], 0
        if self.headers["Range"] and not f.get("no_range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) + f.get("shift", 0)
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if f.get("length", 1):
            self.send_header("Content-Length", f.get("length", len(data)) - start)
        if f["etag"]:
            self.send_header("ETag", f["etag"])
        self.end_headers()
        self.wfile.write(data[start:][:f.get("drop")])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.log, server.queries = {}, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """No waits, no proxy, and no name server: names of other machines are unknown."""
    def getaddrinfo(host, *args, original=socket.getaddrinfo, **kwargs):
        if host != "127.0.0.1":
            raise socket.gaierror(-2, "Name or service not known")
        return original(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(d, "WAIT", 0.0)
    monkeypatch.setattr(urllib.request, "_opener", None)  # or the proxies of the first urlopen would last
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ranges(server):
    return [int(r[6:-1]) if r else 0 for _, r in server.log]


def failure(kind, *args, **kwargs):
    with pytest.raises(kind) as e:
        d.download(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


# download

def test_a_dropped_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.files["/a"] = {"data": DATA, "plan": [{"drop": 100_000}, {"drop": 50_000}, {"status": 503}, {"drop": 0}]}
    d.download(f"{server.url}/a", tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a").read_bytes() == DATA
    assert ranges(server) == [0, 100_000, 150_000, 150_000, 150_000]
    assert os.listdir(tmp_path / "new") == ["a"], "no .part and no .tag is left"


def test_more_drops_than_tries_are_survived_as_long_as_bytes_come(server, tmp_path):
    server.files["/a"] = {"data": DATA, "drop": 20_000}
    d.download(f"{server.url}/a", tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == DATA and len(server.log) == 15 > d.TRIES


@pytest.mark.parametrize("checksum", ["", MD5])
def test_a_later_run_goes_on_and_an_earlier_one_gave_up_after_a_bounded_number_of_tries(server, tmp_path, checksum):
    server.files["/a"] = {"data": DATA, "drop": 0, "plan": [{"drop": 100_000}]}
    message = failure(ValueError, f"{server.url}/a?Signature=secret", tmp_path / "a", checksum)
    assert f"{server.url}/a: the connection ended after 100000 of 300000 bytes" in message and "secret" not in message
    assert len(server.log) == d.TRIES and (tmp_path / "a.part").read_bytes() == DATA[:100_000]
    server.files["/a"] = {"data": DATA}
    d.download(f"{server.url}/a", tmp_path / "a", checksum)
    assert (tmp_path / "a").read_bytes() == DATA and ranges(server)[-1] == 100_000


def test_a_server_without_ranges_starts_over_and_is_not_asked_for_ever(server, tmp_path):
    server.files["/a"] = {"data": DATA, "no_range": True, "plan": [{"drop": 100_000}]}
    d.download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA and len(server.log) == 2
    server.files["/b"] = {"data": DATA, "no_range": True, "drop": 100_000}
    failure(ValueError, f"{server.url}/b", tmp_path / "b", MD5)
    assert len(server.log) == 2 + d.TRIES and not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", [
    {"etag": '"2"'},                          # the new ETag tells
    {"etag": '"2"', "no_range": True},
    {"etag": ""},                             # nothing tells
    {"etag": 'W/"1"'},                        # as good as nothing
    {"etag": '"1"', "data": OTHER + b"more"}, # the length tells
])
@pytest.mark.parametrize("checksum", ["", "md5:" + hashlib.md5(OTHER).hexdigest()])
def test_a_file_that_changes_on_the_server_is_never_mixed(server, tmp_path, how, checksum):
    new = {"data": OTHER} | how
    checksum = checksum and "md5:" + hashlib.md5(new["data"]).hexdigest()
    old_etag = '"1"' if how["etag"].startswith('"') else how["etag"]
    server.files["/a"] = new | {"plan": [{"data": DATA, "etag": old_etag, "drop": 100_000}]}
    d.download(f"{server.url}/a", tmp_path / "a", checksum)
    assert (tmp_path / "a").read_bytes() == new["data"]


def test_a_range_that_was_not_asked_for_is_not_appended(server, tmp_path):
    server.files["/a"] = {"data": DATA, "plan": [{"drop": 100_000}, {"shift": 10}, {"drop": 1000}]}
    d.download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA and ranges(server) == [0, 100_000, 0, 1000]


def test_wrong_bytes_once_are_fetched_again_and_wrong_bytes_twice_are_an_error(server, tmp_path):
    server.files["/a"] = {"data": DATA, "plan": [{"data": OTHER}]}
    d.download(f"{server.url}/a", tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == DATA and ranges(server) == [0, 0]
    server.files["/b"] = {"data": OTHER}
    message = failure(ValueError, f"{server.url}/b", tmp_path / "b", MD5)
    assert f"{server.url}/b: expected {MD5}, got md5:{hashlib.md5(OTHER).hexdigest()}" in message
    assert len(server.log) == 4 and os.listdir(tmp_path) == ["a"]


def test_the_first_digits_of_a_sha256_are_enough_of_a_checksum(server, tmp_path):
    digits = hashlib.sha256(DATA).hexdigest()[:8]
    server.files["/a"] = {"data": DATA}
    d.download(f"{server.url}/a", tmp_path / "a", f"sha256:{digits.upper()}")
    assert "got sha256:" + digits in failure(ValueError, f"{server.url}/a", tmp_path / "b", "sha256:00000000")


@pytest.mark.parametrize("part, asked", [
    (DATA, []),                  # killed between the last byte and the renaming
    (DATA + b"more", [0]),
    (OTHER, [0]),
    (DATA[:10], [10]),
])
def test_what_an_earlier_run_left_is_used_if_it_fits(server, tmp_path, part, asked):
    server.files["/a"] = {"data": DATA}
    (tmp_path / "a.part").write_bytes(part)
    d.download(f"{server.url}/a", tmp_path / "a", MD5, len(DATA))
    assert (tmp_path / "a").read_bytes() == DATA and ranges(server) == asked
    (tmp_path / "b.part").write_bytes(part)  # no size is known: the server answers 416 where nothing is left
    d.download(f"{server.url}/a", tmp_path / "b", MD5)
    assert (tmp_path / "b").read_bytes() == DATA
    (tmp_path / "c.part").write_bytes(part)  # nor a checksum: nothing vouches for the part
    d.download(f"{server.url}/a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == DATA


def test_a_file_that_was_whole_when_its_run_was_killed_is_not_fetched_again(server, tmp_path, monkeypatch):
    server.files["/a"] = {"data": DATA}
    for path, checksum in ((tmp_path / "a", MD5), (tmp_path / "b", "")):
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(d, "digest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            d.download(f"{server.url}/a", path, checksum)
        d.download(f"{server.url}/a", path, checksum)
        assert path.read_bytes() == DATA
    assert ranges(server) == [0, 0] and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_length_that_is_a_lie_or_missing_ends_in_an_error_and_no_file(server, tmp_path):
    server.files["/long"] = {"data": DATA, "length": 400_000}
    server.files["/silent"] = {"data": DATA, "length": 0}
    server.files["/short"] = {"data": DATA, "length": 200_000}
    assert f"{server.url}/long: " in failure(ValueError, f"{server.url}/long", tmp_path / "a")
    assert "states no length" in failure(ValueError, f"{server.url}/silent", tmp_path / "a")
    assert "expected md5:" in failure(ValueError, f"{server.url}/short", tmp_path / "b", MD5)
    assert "200000 bytes on the server, 300000 expected" in failure(
        ValueError, f"{server.url}/short", tmp_path / "b", MD5, len(DATA))
    assert len(server.log) <= 4 * d.TRIES and not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    d.download(f"{server.url}/silent", tmp_path / "c", MD5)
    assert (tmp_path / "c").read_bytes() == DATA


def test_a_login_page_does_not_cost_the_bytes_that_are_there(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA[:200_000])
    server.files["/a"] = {"data": b"<html>", "no_range": True}
    failure(ValueError, f"{server.url}/a", tmp_path / "a", MD5, len(DATA))
    assert (tmp_path / "a.part").read_bytes() == DATA[:200_000]


@pytest.mark.parametrize("status, kind, requests", [(404, ValueError, 1), (403, ValueError, 1), (500, ValueError, 6),
                                                    (429, ConnectionError, 6), (503, ConnectionError, 6)])
def test_a_refusal_is_final_and_a_busy_server_is_asked_again(server, tmp_path, status, kind, requests):
    server.files["/a"] = {"status": status}
    assert f"{server.url}/a: HTTP Error {status}" in failure(kind, f"{server.url}/a", tmp_path / "a")
    assert len(server.log) == requests and not os.listdir(tmp_path)


def test_what_is_there_and_right_is_not_asked_for(server, tmp_path):
    server.files["/a"] = {"data": DATA}
    path = tmp_path / "a"
    path.write_bytes(DATA)
    d.download(f"{server.url}/a", path, MD5, len(DATA))
    d.download(f"{server.url}/a", path)
    path.write_bytes(OTHER)
    d.download(f"{server.url}/a", path, MD5, len(DATA), check=False)  # the size is trusted
    assert not server.log
    d.download(f"{server.url}/a", path, MD5, len(DATA))
    assert path.read_bytes() == DATA
    path.write_bytes(DATA[:10])
    d.download(f"{server.url}/a", path, MD5, len(DATA), check=False)
    assert path.read_bytes() == DATA and len(server.log) == 2


def test_a_full_disk_keeps_the_bytes_and_says_so(server, tmp_path):
    server.files["/a"] = {"data": DATA}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))  # a write beyond fails, as on a full disk
        with pytest.raises(OSError, match="make room; the same command.*a.part") as e:
            d.download(f"{server.url}/a", tmp_path / "a", MD5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.errno == errno.EFBIG and not isinstance(e.value, ConnectionError) and len(server.log) == 1
    assert (tmp_path / "a.part").read_bytes() == DATA[:123_456]
    d.download(f"{server.url}/a", tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == DATA and ranges(server)[-1] == 123_456


def test_two_processes_do_not_write_one_file(server, tmp_path):
    server.files["/a"] = {"data": DATA}
    with open(tmp_path / "a.part", "wb") as other:
        other.write(DATA[:1000])
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in failure(ValueError, f"{server.url}/a", tmp_path / "a", MD5)
    assert not server.log and (tmp_path / "a.part").read_bytes() == DATA[:1000]


def test_a_file_that_another_process_finished_just_before_the_lock_stays(server, tmp_path, monkeypatch):
    def lock(file):
        Path(file.name).write_bytes(DATA)
        os.replace(file.name, tmp_path / "a")  # what this process has open is now the finished file

    monkeypatch.setattr(d, "lock", lock)
    d.download(f"{server.url}/a", tmp_path / "a", MD5, len(DATA))
    assert (tmp_path / "a").read_bytes() == DATA and not server.log


def test_a_host_that_is_not_there_is_the_networks_trouble(server, tmp_path):
    server.shutdown()
    server.server_close()
    for url in (server.url, "http://nowhere.invalid"):
        assert f"{url}/a: " in failure(ConnectionError, f"{url}/a", tmp_path / "a")
    assert not os.listdir(tmp_path)


# the scripts

def run(monkeypatch, capsys, script, *flags):
    """(exit code, output) of a script, in this process: without waits and with the loopback alone."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(ROOT / "prepare" / script), run_name="__main__")
        code, message = 0, ""
    except SystemExit as e:
        code, message = 1, e.code
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return code, capsys.readouterr().out + message


@pytest.mark.parametrize("script, flags, says", [
    ("tcga.py", [], "give --manifest=FILE or --project=TCGA-BRCA"),
    ("weights.py", ["--name=dinov2_vitx14"], "give dinov2_vits14"),
    ("bach.py", ["--server=http://127.0.0.1:9"], "zenodo.org/records/3632035: download ICIAR2018_BACH_Challenge.zip"),
])
def test_a_script_starts_from_any_folder_and_ends_with_a_plain_message(tmp_path, script, flags, says):
    done = subprocess.run([sys.executable, ROOT / "prepare" / script, *flags], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"no_proxy": "*"})
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["no name server", "proxy"])
@pytest.mark.parametrize("script, flags, steps", [
    ("tcga.py", ["--project=TCGA-BRCA"], "gdc-client download -m"),
    ("bach.py", [], "python prepare/bach.py --zip=ICIAR2018_BACH_Challenge.zip"),
    ("weights.py", ["--name=dinov2_vitg14_reg"], "/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
    ("weights.py", ["--url=https://nowhere.invalid/x-00000000.pth?Signature=secret"], "/x-00000000.pth"),
])
def test_without_a_network_the_manual_steps_are_shown(server, tmp_path, monkeypatch, capsys, script, flags, steps, way):
    if way == "proxy":
        monkeypatch.setenv("https_proxy", server.url)  # which knows no CONNECT
    flags = ["--server=https://nowhere.invalid", f"--out={tmp_path}/out", *flags]
    code, text = run(monkeypatch, capsys, script, *flags)
    message = text[text.index(f"{script[:-3]}: "):]
    assert code == 1 and "nowhere.invalid" in message and "by hand" in message and steps in message
    assert "\n  1. " in message and f"{tmp_path}/out" in message and "secret" not in message
    assert "Tunnel" in message if way == "proxy" else "Name or service not known" in message


# TCGA

NAMES = {f"id{i}": f"TCGA-AA-{1000 + i}-01Z-00-DX1.svs" for i in range(5)}


def write_manifest(path, rows):
    lines = ["id\tfilename\tmd5\tsize\tstate", *("\t".join(map(str, [*row, "released"])) for row in rows)]
    path.write_text("\r\n".join(lines) + "\r\n")
    return f"--manifest={path}"


def slides(server, tmp_path):
    rows = [(i, name, MD5[4:], len(DATA)) for i, name in NAMES.items()]
    server.files |= {f"/data/{i}": {"data": DATA} for i in NAMES}
    return write_manifest(tmp_path / "gdc_manifest.txt", rows + rows[:1])


def test_tcga_fetches_what_it_can_lists_the_rest_and_a_rerun_finishes(server, tmp_path, monkeypatch, capsys):
    flags = [slides(server, tmp_path), f"--out={tmp_path}/out", f"--server={server.url}", "--workers=3"]
    server.files["/data/id1"] |= {"plan": [{"drop": 100_000}]}
    server.files["/data/id2"] = {"data": OTHER}
    server.files["/data/id3"] = {"status": 404}
    code, text = run(monkeypatch, capsys, "tcga.py", *flags)
    assert code == 1 and "5 files in the manifest, 0 are there" in text and "2 of 5 files failed" in text
    failed = (tmp_path / "out" / "failed.csv").read_text().splitlines()
    assert failed[0] == "id,filename,reason" and len(failed) == 3
    assert failed[1].startswith(f"id2,{NAMES['id2']},") and "expected md5:" in failed[1]
    assert failed[2].startswith(f"id3,{NAMES['id3']},") and "404" in failed[2]

    server.log.clear()
    server.files |= {f"/data/id{i}": {"data": DATA} for i in (2, 3)}
    code, text = run(monkeypatch, capsys, "tcga.py", *flags)
    assert code == 0 and "all 5 files are there" in text and len(server.log) == 2
    assert all((tmp_path / "out" / i / name).read_bytes() == DATA for i, name in NAMES.items())
    assert len((tmp_path / "out" / "failed.csv").read_text().splitlines()) == 1

    damaged = tmp_path / "out" / "id4" / NAMES["id4"]
    damaged.write_bytes(OTHER)  # of the same size
    assert run(monkeypatch, capsys, "tcga.py", *flags)[0] == 0 and damaged.read_bytes() == OTHER
    assert run(monkeypatch, capsys, "tcga.py", *flags, "--check=true")[0] == 0 and damaged.read_bytes() == DATA


@pytest.mark.parametrize("row", [("id", "../../evil.svs"), ("..", "evil.svs"), ("id", "/tmp/evil.svs"),
                                 ("a/b", "x.svs"), ("id", ".."), ("id", ""), ("id", "a\\b.svs")])
def test_a_manifest_cannot_write_elsewhere(server, tmp_path, monkeypatch, capsys, row):
    manifest = write_manifest(tmp_path / "m.txt", [(*row, MD5[4:], len(DATA))])
    code, text = run(monkeypatch, capsys, "tcga.py", manifest, f"--out={tmp_path}/a/out", f"--server={server.url}")
    assert code == 1 and "m.txt: row" in text and not server.log and os.listdir(tmp_path) == ["m.txt"]


@pytest.mark.parametrize("text, says", [("id\tfilename\nx\ty\n", "no column md5, size"), ("<html>", "no column id"),
                                        ("id\tfilename\tmd5\tsize\nx\ty\tz\t1\n", "md5 and size")])
def test_what_is_no_manifest_is_refused(tmp_path, monkeypatch, capsys, text, says):
    (tmp_path / "m.txt").write_text(text)
    code, said = run(monkeypatch, capsys, "tcga.py", f"--manifest={tmp_path}/m.txt", f"--out={tmp_path}/out")
    assert code == 1 and says in said


def test_tcga_makes_the_manifest_of_a_project_and_refuses_a_list_cut_short(server, tmp_path, monkeypatch, capsys):
    hits = [{"file_id": i, "file_name": NAMES[i], "md5sum": MD5[4:], "file_size": len(DATA)} for i in ("id0", "id1")]
    slides(server, tmp_path)
    flags = ["--project=TCGA-AA", f"--out={tmp_path}/out", f"--server={server.url}"]
    for total, expected in ((3, 1), (2, 0)):
        server.files["/files"] = {"data": json.dumps({"data": {"hits": hits, "pagination": {"total": total}}}).encode()}
        code, text = run(monkeypatch, capsys, "tcga.py", *flags)
        assert code == expected, text
        assert (tmp_path / "out" / "gdc_manifest.TCGA-AA.txt").exists() == (not expected)
    assert "Diagnostic+Slide" in server.queries[0] and "TCGA-AA" in server.queries[0]
    assert (tmp_path / "out" / "id1" / NAMES["id1"]).read_bytes() == DATA


def test_tcga_stops_before_the_start_if_the_disk_is_too_small(server, tmp_path, monkeypatch, capsys):
    flags = [slides(server, tmp_path), f"--out={tmp_path}/out", f"--server={server.url}"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1_000_000))
    code, text = run(monkeypatch, capsys, "tcga.py", *flags)
    assert code == 1 and "0.0 GB are needed" in text and not server.log
    (tmp_path / "out" / "id0").mkdir()
    (tmp_path / "out" / "id0" / NAMES["id0"]).write_bytes(DATA)
    (tmp_path / "out" / "id1").mkdir()
    (tmp_path / "out" / "id1" / f"{NAMES['id1']}.part").write_bytes(DATA[:299_000])
    assert run(monkeypatch, capsys, "tcga.py", *flags)[0] == 0, "what is there needs no more room"


def test_tcga_stops_at_once_when_the_server_goes_away(server, tmp_path, monkeypatch, capsys):
    flags = [slides(server, tmp_path), f"--out={tmp_path}/out", f"--server={server.url}", "--workers=1"]
    server.files["/data/id1"] = {"status": 503}
    code, text = run(monkeypatch, capsys, "tcga.py", *flags)
    assert code == 1 and "503" in text and "by hand" in text
    assert (tmp_path / "out" / "id0" / NAMES["id0"]).exists() and len({path for path, _ in server.log}) <= 3


# BACH

def bach_zip(path, leave_out=(), extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for folder, prefix in eval_bach.CLASSES.items():
            for i in range(1, 101):
                name = f"{folder}/{prefix}{i:03d}.tif"
                if name not in leave_out:
                    archive.writestr(f"ICIAR2018_BACH_Challenge/Photos/{name}", f"{name} is not a picture")
        for name in ("ICIAR2018_BACH_Challenge/WSI/A01.svs", "__MACOSX/x", *extra,
                     "ICIAR2018_BACH_Challenge/Photos/Benign/._b001.tif"):
            archive.writestr(name, "not wanted")
    return path


def zenodo(server, data, checksum=None):
    files = [{"key": "other.zip", "size": 1, "checksum": "md5:0"},
             {"key": "ICIAR2018_BACH_Challenge.zip", "size": len(data),
              "checksum": checksum or "md5:" + hashlib.md5(data).hexdigest()}]
    server.files["/api/records/3632035"] = {"data": json.dumps({"files": files}).encode()}
    server.files["/api/records/3632035/files/ICIAR2018_BACH_Challenge.zip/content"] = {
        "data": data, "plan": [{"drop": 10_000}]}


def test_bach_is_fetched_unzipped_and_what_eval_bach_expects(server, tmp_path, monkeypatch, capsys):
    out, up = tmp_path / "out", "ICIAR2018_BACH_Challenge/Photos/../../../../evil.txt"
    zenodo(server, bach_zip(tmp_path / "a.zip", extra=["../evil.txt", "/evil.txt", up]).read_bytes())
    flags = [f"--out={out}", f"--server={server.url}"]
    code, text = run(monkeypatch, capsys, "bach.py", *flags)
    assert code == 0 and "CC BY-NC-ND" in text, text
    paths = eval_bach.bach_files(out)
    assert len(paths) == 400 and Path(paths[0]).read_text() == "Benign/b001.tif is not a picture"
    assert sorted(os.listdir(out)) == ["ICIAR2018_BACH_Challenge", "ICIAR2018_BACH_Challenge.zip"]
    assert os.listdir(out / "ICIAR2018_BACH_Challenge") == ["Photos"]
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out"] and not Path("/evil.txt").exists()
    server.log.clear()
    (out / "ICIAR2018_BACH_Challenge.zip").unlink()
    assert run(monkeypatch, capsys, "bach.py", *flags)[0] == 0 and not server.log


def test_bach_from_a_zip_that_you_have_asks_nobody(server, tmp_path, monkeypatch, capsys):
    path = bach_zip(tmp_path / "mine.zip")
    flags = [f"--zip={path}", f"--out={tmp_path}/out", f"--server={server.url}"]
    assert run(monkeypatch, capsys, "bach.py", *flags)[0] == 0
    assert len(eval_bach.bach_files(tmp_path / "out")) == 400 and not server.log and path.exists()


def damage(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("trouble, says", [
    ("flipped bit", "damaged (Bad CRC-32"),
    ("cut short", "damaged (File is not"),
    ("missing", "Invasive: 99 of 100 images, iv007.tif missing"),
    ("absent", "No such file"),
])
def test_a_bad_archive_leaves_nothing_behind(tmp_path, monkeypatch, capsys, trouble, says):
    path = bach_zip(tmp_path / "a.zip", leave_out=["Invasive/iv007.tif"] if trouble == "missing" else [])
    if trouble == "flipped bit":
        damage(path, path.read_bytes().index(b"Benign/b002.tif is"))
    elif trouble == "cut short":
        path.write_bytes(path.read_bytes()[:20_000])
    elif trouble == "absent":
        path.unlink()
    code, text = run(monkeypatch, capsys, "bach.py", f"--zip={path}", f"--out={tmp_path}/out")
    assert code == 1 and says in text and "\n" not in text.strip()[text.index("bach: "):], text
    assert os.listdir(tmp_path / "out") == []


def test_an_incomplete_bach_folder_is_named_and_left_alone(server, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "ICIAR2018_BACH_Challenge" / "Photos" / "Benign"
    photos.mkdir(parents=True)
    code, text = run(monkeypatch, capsys, "bach.py", f"--out={tmp_path}", f"--server={server.url}")
    assert code == 1 and "Benign: 0 of 100 images" in text and photos.exists() and not server.log


def test_a_wrong_bach_archive_is_not_unzipped(server, tmp_path, monkeypatch, capsys):
    zenodo(server, bach_zip(tmp_path / "a.zip").read_bytes(), checksum=MD5)
    code, text = run(monkeypatch, capsys, "bach.py", f"--out={tmp_path}/out", f"--server={server.url}")
    assert code == 1 and f"expected {MD5}" in text and os.listdir(tmp_path / "out") == []


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
def test_weights_by_name_come_from_metas_address_and_open(server, tmp_path, monkeypatch, capsys, weights, name, url):
    server.files[url] = {"data": weights, "plan": [{"drop": 1_000_000}]}
    flags = [f"--name={name}", f"--out={tmp_path}", f"--server={server.url}"]
    for requests in (2, 2):  # the second time, what is there is checked
        code, text = run(monkeypatch, capsys, "weights.py", *flags)
        assert code == 0 and "M parameters" in text and len(server.log) == requests
    path = tmp_path / url.rpartition("/")[2]
    assert path.read_bytes() == weights
    damage(path, len(weights) // 2)
    code, text = run(monkeypatch, capsys, "weights.py", *flags)
    assert code == 1 and f"{path}: damaged" in text and "delete it" in text


def test_weights_by_url_are_held_to_the_hash_in_their_name(server, tmp_path, monkeypatch, capsys, weights):
    digits = hashlib.sha256(weights).hexdigest()[:8]
    name = f"dinov3_vitx16_pretrain-{digits}.pth"
    server.files[f"/{name}"] = {"data": weights, "plan": [{"data": weights[:-1] + b"x"}]}
    url = f"--url={server.url}/{name}?Policy=a&Signature=b.pth"
    code, text = run(monkeypatch, capsys, "weights.py", url, f"--out={tmp_path}")
    assert code == 0 and f"sha256:{digits}" in text and (tmp_path / name).read_bytes() == weights
    assert server.queries == [f"/{name}?Policy=a&Signature=b.pth"] * 2
    server.files["/x-00000000.pth"] = {"data": weights}
    code, text = run(monkeypatch, capsys, "weights.py", f"--url={server.url}/x-00000000.pth", f"--out={tmp_path}")
    assert code == 1 and f"expected sha256:00000000, got sha256:{digits}" in text and os.listdir(tmp_path) == [name]


def test_a_page_instead_of_weights_is_refused(server, tmp_path, monkeypatch, capsys):
    server.files["/x.pth"] = {"data": b"<html>log in</html>"}
    flags = [f"--url={server.url}/x.pth", f"--out={tmp_path}"]
    code, text = run(monkeypatch, capsys, "weights.py", *flags)
    assert code == 1 and "x.pth: not a file of plain tensors" in text and "delete it" in text
    assert run(monkeypatch, capsys, "weights.py", *flags, "--check=false")[0] == 0
    code, text = run(monkeypatch, capsys, "weights.py", "--url=dinov3.pth", f"--out={tmp_path}")
    assert code == 1 and "give the address of a .pth file" in text
