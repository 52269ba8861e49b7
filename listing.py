"""
Which files a key names: a folder, whose whole tree is meant, or a pattern. And the bar that shows how many are done.

    slides/*.svs          * ? and [abc] stand for a part of a name
    slides/**/*.svs       ** stands for any folders, also none

Links are followed, also in a circle. A file that several names lead to counts once, hard links too. Hidden files and
folders, such as ._a.svs or .snapshot, count only where the pattern names the dot. So do folders of a system's own, such
as @eaDir, where it names them. What should have been there and cannot be used is named with a reason: links that lead
nowhere, folders that may not be read, names that are not UTF-8.
"""
import collections
import csv
import fnmatch
import glob
import os
import shutil
import stat
import sys

from tqdm import tqdm

SHOWN = 20  # of what is left out, in the log
OF_SYSTEMS = {"@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX"}  # as good as hidden


def bar(*args, **keys):
    """tqdm's bar for a terminal, of 80 columns where that does not tell its size; in a log, a line per minute."""
    if sys.stderr.isatty():
        size = shutil.get_terminal_size()
        return tqdm(*args, ncols=size.columns, nrows=size.lines, **keys)
    form = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"
    return tqdm(*args, mininterval=60, bar_format=form, **keys)


def find(pattern, key, endings=("",), complete=lambda path: True):
    """(sorted paths of files, {path: why it is left out}). Raises ValueError naming the key if there is no file.
    A folder needs `endings`, of whatever case; a pattern may do without. Of a file's names, one counts that is
    complete(name), where there is one."""
    left_out, is_folder = {}, os.path.isdir(pattern)
    parts = pattern.split("/")
    if is_folder and any(endings):
        parts += ["**", "*"]
    found = walk(parts, left_out) if parts[-1] else []
    paths = once([file for file in found if file[0].lower().endswith(tuple(endings))], left_out, complete)
    if paths:
        return paths, left_out
    hint = "".join(f"; left out: {path}: {reason}" for path, reason in list(left_out.items())[:1])
    if is_folder and not any(endings):
        kinds = {os.path.splitext(path)[1] for path, below, *_ in scan(pattern, {}) if not below}
        hint = "; it is a folder: try " + " or ".join(f"'{pattern}/*{kind}'" for kind in sorted(kinds) or ["*/*.svs"])
    if "[" in pattern:
        hint += "; [ begins a set of characters there: write [[] where a name has a bracket"
    if "{" in pattern:
        hint += "; {a,b} is the shell's alone: give one pattern for all, or train.py several in mix"
    ending = f" with {' '.join(endings)}" if any(endings) else ""
    raise ValueError(f"{key}: no file matches {pattern}{ending}{hint}")


def walk(parts, left_out):
    """Yields (path, its real path, inode) of the files that a pattern names, given as its parts between slashes."""
    folders = [""]
    if not parts[0]:  # an absolute path
        folders, parts = ["/"], parts[1:]
    if parts[-1] == "**":
        parts = [*parts, "*"]
    for part in parts[:-1]:
        folders = [below for folder in folders for below in step(folder, part, left_out)]
    for folder in folders:
        real = os.path.realpath(folder)
        for path, is_folder, is_link, inode in matches(folder, parts[-1], left_out):
            if not is_folder:
                name = os.path.basename(path)
                yield path, os.path.realpath(path) if is_link else os.path.join(real, name), inode


def step(folder, part, left_out):
    """The folders that one part of a pattern leads to."""
    if part == "**":
        return tree(folder, left_out)
    return [path for path, is_folder, *_ in matches(folder, part, left_out) if is_folder]


def tree(folder, left_out):
    """The folder and all below it, each real one once, so that links in a circle end."""
    seen, todo, found = set(), [folder], []
    for path in todo:  # it grows on the way
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            found.append(path)
            todo += step(path, "*", left_out)
    return found


def matches(folder, part, left_out):
    """[(path, whether it is a folder, whether it is a link, inode)] of what a part other than ** names in a folder."""
    path = os.path.join(folder, part)
    there = os.path.lexists(path)
    if there and "[" in part or not glob.has_magic(part):  # a folder may really be called batch[1]
        kind = there and kind_of(path, left_out)
        return [(path, kind == stat.S_IFDIR, os.path.islink(path), os.stat(path).st_ino)] if kind else []
    items = scan(folder, left_out, part[0] == ".")
    return [item for item in items if fnmatch.fnmatchcase(os.path.basename(item[0]), part)]


def scan(folder, left_out, hidden=False):
    """[(path, whether it is a folder, whether it is a link, inode)] of what is in a folder, links followed."""
    found = []
    try:
        with os.scandir(folder or ".") as entries:
            entries = [entry for entry in entries if hidden == (entry.name[0] == "." or entry.name in OF_SYSTEMS)]
    except OSError as e:
        left_out[folder] = f"cannot be listed: {e.strerror}"
        entries = []
    for entry in entries:
        path = os.path.join(folder, entry.name)
        plain = entry.is_file(follow_symlinks=False)  # known without asking the file system again
        kind = stat.S_IFREG if plain else kind_of(path, left_out)
        if printable(path) != path:
            left_out[printable(path)] = "its name is not UTF-8; rename it"
        elif kind:
            inode = entry.inode() if plain else entry.stat().st_ino
            found.append((path, kind == stat.S_IFDIR, entry.is_symlink(), inode))
    return found




def kind_of(path, left_out):
    """stat.S_IFDIR, stat.S_IFREG, or None for what is neither or cannot be reached."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except OSError as e:
        to = f"a link to {os.readlink(path)}: " if os.path.islink(path) else ""
        left_out[printable(path)] = printable(to) + e.strerror
        return None
    return kind if kind in (stat.S_IFDIR, stat.S_IFREG) else None


def once(found, left_out, complete):
    """Sorted paths of (path, real path, inode), each file once; the others are left out. Hard links have real paths of
    their own; only where an inode comes twice is the file system asked."""
    first, count = {}, collections.Counter(inode for *_, inode in found)
    for path, real, inode in sorted(found, key=lambda file: (not complete(file[0]), file)):
        state = os.stat(real) if count[inode] > 1 else None
        if state and state.st_nlink > 1:
            real = state.st_dev, state.st_ino
        if first.setdefault(real, path) != path:
            left_out[path] = f"the same file as {first[real]}"
    return sorted(first.values())


def state_of(path):
    """What changes when a file does: its size, when it was written, and when its permissions or links were changed."""
    try:
        state = os.stat(path)
    except OSError as e:
        return path, e.errno
    return path, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def printable(path):
    return path.encode(errors="backslashreplace").decode()


def say_left_out(left_out, say, file="", mode="w"):
    """Say what is left out and why. The whole list goes into a csv, where one is given; mode "a" adds to it."""
    rows = [(path, reason.removeprefix(f"{path}: ")) for path, reason in left_out.items()]
    for path, reason in rows[:SHOWN]:
        say(f"left out: {path}: {reason}")
    if len(rows) > SHOWN:
        where = f", see {file}" if file else ""
        say(f"left out: {len(rows) - SHOWN} more{where}")
    if file and (rows or os.path.exists(file)):
        with open(file, mode, newline="", encoding="utf-8") as f:
            header = [] if f.tell() else [("path", "reason")]
            csv.writer(f, lineterminator="\n").writerows(header + rows)
