"""prepare/tcga.py against a local server. Nothing leaves the loopback."""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

DATA = b"a slide" * 1000
MD5 = hashlib.md5(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with server.files[path], else 404."""

    def do_GET(self):
        self.server.log.append(self.path)
        data = self.server.files.get(self.path.split("?")[0])
        if data is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.log = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(script, capsys, tmp_path):
    def run(*flags):
        """(exit code, output) of the script with --out=tmp_path/out."""
        try:
            return 0, script("prepare/tcga.py", f"--out={tmp_path}/out", *flags)
        except SystemExit as e:
            return 1, capsys.readouterr().out + e.code
    return run


def test_without_a_network_the_manual_steps_are_shown(monkeypatch, tmp_path, run):
    monkeypatch.setenv("no_proxy", "*")
    code, text = run("--server=http://127.0.0.1:9", "--project=TCGA-BRCA")  # nobody listens there
    assert code == 1 and "Connection refused" in text and "Or by hand: " in text and "portal.gdc.cancer.gov" in text
    assert not list((tmp_path / "out").iterdir())


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


def test_tcga_says_what_is_missing_or_cut_short(tmp_path, run, manifest):
    out = tmp_path / "out"
    place(out, "id0")
    place(out, "id1", DATA[:-1])
    place(out, "id2")
    code, text = run(f"--manifest={manifest}")
    rest = out / "gdc_manifest.missing.txt"
    assert code == 1 and "2 of 4 files" in text and f"gdc-client download -m {rest} -d {out}" in text
    rows = manifest.read_text().splitlines()
    assert rest.read_text().splitlines() == [rows[0], rows[2], rows[4]], "its own columns, which gdc-client reads"
    (out / "id1" / NAMES["id1"]).write_bytes(DATA)
    place(out, "id3")
    code, text = run(f"--manifest={manifest}")
    assert code == 0 and "all 4 files are there" in text


@pytest.mark.parametrize("text", ["id\tfilename\nx\ty\n", "<html>", "id\tfilename\tmd5\tsize\nx\ty\tz\tlarge\n"])
def test_what_is_no_manifest_is_refused(tmp_path, run, text):
    (tmp_path / "m.txt").write_text(text)
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/y").touch()
    code, said = run(f"--manifest={tmp_path}/m.txt")
    assert code == 1 and "m.txt: no usable manifest" in said and "--manifest=FILE" in said


def test_tcga_makes_the_manifest_of_a_project_and_refuses_a_list_cut_short(server, tmp_path, run):
    hits = [{"file_id": i, "file_name": NAMES[i], "md5sum": MD5, "file_size": len(DATA)} for i in ("id0", "id1")]
    place(tmp_path / "out", "id0")
    flags = ["--project=TCGA-AA", f"--server={server.url}"]
    for total, says in ((3, "the GDC sent 2 of 3 slides"), (2, "1 of 2 files are missing")):
        server.files["/files"] = json.dumps({"data": {"hits": hits, "pagination": {"total": total}}}).encode()
        code, text = run(*flags)
        assert code == 1 and says in text
        assert (tmp_path / "out/gdc_manifest.TCGA-AA.txt").exists() == (total == 2)
    assert "Diagnostic+Slide" in server.log[0] and "TCGA-AA" in server.log[0]
    place(tmp_path / "out", "id1")
    assert run(*flags)[0] == 0 and len(server.log) == 2, "a manifest that is there stays"
