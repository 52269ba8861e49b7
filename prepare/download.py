"""
Downloads that a bad connection cannot spoil: resumed, checked, and in place only once they are whole.

    from download import download
    download("https://...", "data/a.svs", checksum="md5:...", size=123456)

data/a.svs.part grows until it is whole, over as many runs as it takes; data/a.svs.part.tag holds its version (ETag or
Last-Modified) and length. A checksum finds out a file mixed from two versions; without one, what cannot be shown to be
of the same version starts over. ValueError is this file's own trouble, ConnectionError the network's or the server's,
another OSError this machine's (disk full): after these two, the next file would fare no better.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

TRIES = 6     # requests in a row that bring the file no further than it was
WAIT = 1.0    # s before the second of them, then doubled: 31 s in all
TIMEOUT = 60  # s without a byte
AGENT = {"User-Agent": "nanopfm"}
BUSY = (429, 502, 503, 504)  # HTTP codes that say nothing about the file


def download(url, path, checksum="", size=None, check=True, bar=None):
    """
    Bring url to path, unless it is there. checksum: "md5:..." or "sha256:..." with all or the first digits; "" = none.

    What is there counts if its size and checksum are right; check=False trusts the size. bar: a tqdm of the bytes to
    come, shared with other downloads.
    """
    part = Path(f"{path}.part")
    if is_complete(path, checksum, size, check):
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab", buffering=0) as file:
        lock(file)
        try:
            if not is_complete(path, checksum, size, check):  # another process may have had the lock until now
                with contextlib.nullcontext(bar) if bar is not None else progress(None, Path(path).name) as bar:
                    fetch_right(url, file, checksum, size, bar)
                os.fsync(file.fileno())
                os.replace(part, path)
        finally:
            if length(file) == 0:
                part.unlink(missing_ok=True)
            if not part.exists():
                tag_of(file).unlink(missing_ok=True)


def progress(total, name):
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None)  # None: silent in a log file


def is_complete(path, checksum, size, check=True):
    if not os.path.isfile(path) or size not in (None, os.path.getsize(path)):
        return False
    return not check or digest(path, checksum) == checksum.lower()


def digest(path, checksum):
    """What `checksum` would have to be for the file at path."""
    kind, _, digits = checksum.lower().partition(":")
    if not kind:
        return ""
    with open(path, "rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()[:len(digits)]}"


def lock(file):
    """Two processes that append to one file would mix it; the lock ends with the open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name}: another process is downloading it; wait for it or stop it") from None
    except OSError:
        pass  # a file system without locks, as Lustre may be


def fetch_right(url, file, checksum, size, bar):
    for _ in range(2):  # a wrong byte may have come on the way
        fetch(url, file, checksum, size, bar)
        got = digest(file.name, checksum)
        if got == checksum.lower():
            return
        start_over(file, bar)
    raise ValueError(f"{public(url)}: expected {checksum}, got {got}, twice; the server or a proxy changed the bytes: "
                     "try another network, or find out whether the checksum is outdated")


def fetch(url, file, checksum, size, bar):
    """Requests until the file is whole; raises the last trouble once TRIES of them in a row brought it no further."""
    tries, furthest = 0, length(file)
    while True:
        try:
            return request(url, file, checksum, size, bar)
        except (OSError, HTTPException, ValueError) as e:
            code = getattr(e, "code", 0)  # of HTTPError
            if code == 0 and (getattr(e, "filename", None) or getattr(e, "errno", None) == errno.ENOSPC):
                raise  # the disk's trouble, not the line's
            if code == 416:  # nothing lies behind our last byte
                start_over(file, bar)
            kind = ConnectionError if isinstance(e, URLError) and code in (0, *BUSY) else ValueError
            trouble = kind(f"{public(url)}: {getattr(e, 'reason', e) if code == 0 else e}")
        if length(file) > furthest:
            tries, furthest = 0, length(file)
        tries += 1
        if tries == TRIES or 400 <= code < 500 and code not in (408, 416, 429):
            raise trouble
        time.sleep(WAIT * 2 ** (tries - 1))


def request(url, file, checksum, size, bar):
    """One request for what is missing: appended if it goes on with the file, else written from the start."""
    known, _, whole = tag_of(file).read_text().partition("\n") if tag_of(file).exists() else ("", "", "")
    whole = size if size is not None else int(whole or -1)  # -1: not known
    if not (checksum or known) or 0 <= whole < length(file):
        start_over(file, bar)
    have = length(file)
    if have and have == whole:
        return
    resume = {"Range": f"bytes={have}-"} if have else {}  # no If-Range: the version in the answer tells as much
    with urlopen(Request(url, headers=AGENT | resume), timeout=TIMEOUT) as response:
        total, version = response.headers.get("Content-Length", "-1"), version_of(response)
        start = None
        if response.status == 206:
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            start, total = place.groups() if place else ("", "-1")
        if size is not None and total not in ("-1", str(size)):  # before our bytes are given up: it may be a login page
            raise ValueError(f"{total} bytes on the server, {size} expected; is the list outdated?")
        if total == "-1" and not checksum:
            raise ValueError("the server states no length, so a part would pass for all of it")
        if start != str(have) or known and (known, str(whole)) != (version, total):
            start_over(file, bar)
            if start is not None:
                raise ValueError("its parts do not fit together; did it change on the server?")
            if total != "-1":
                tag_of(file).write_text(f"{'' if checksum else version}\n{total}")
        receive(response, file, int(total), bar)


def receive(response, file, total, bar):
    if bar.total is None and total >= 0:
        bar.total = total - length(file)
    while chunk := response.read1(1 << 20):  # what has come: read() loses up to that much when the line breaks
        bar.update(len(chunk))
        try:
            while chunk:
                chunk = chunk[file.write(chunk):]  # less than asked for on a nearly full disk
        except OSError as e:
            raise OSError(e.errno, f"{e.strerror} (make room; the same command then goes on)", file.name) from None
    if total not in (-1, length(file)):
        raise ValueError(f"the connection ended after {length(file)} of {total} bytes; try again")


def version_of(response):
    """What names this version of a resource; "" if nothing does. A weak ETag (W/...) does not vouch for the bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def start_over(file, bar):
    if bar.total is not None:
        bar.total += length(file)
    file.truncate(0)
    tag_of(file).unlink(missing_ok=True)


def tag_of(file):
    return Path(f"{file.name}.tag")


def length(file):
    return os.fstat(file.fileno()).st_size


def public(url):
    return url.split("?")[0]  # what follows may be a personal signature


def read_json(url):
    try:
        with urlopen(Request(url, headers=AGENT), timeout=TIMEOUT) as response:
            return json.load(response)
    except (OSError, HTTPException, ValueError) as e:  # ValueError: a login page
        raise ConnectionError(f"{public(url)}: no usable answer ({getattr(e, 'reason', e)})") from None


def check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or name "
                      "another folder with --out=")
