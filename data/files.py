"""Files and folders from which a run can be resumed after a kill, a full disk or a power cut."""
import contextlib
import json
import os
import shutil
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from config import Refused, first_line

CHECKSUMS = "checksums.json"


# ---- one owner ---------------------------------------------------------------------------------------------

def own(folder):
    """Take a folder for this process until it ends, however it ends; refuse it while another process has it.

    Return the open file that holds the lock, which the caller keeps.
    """
    import fcntl                # here, since not every system has it
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise Refused(f"{folder} belongs to process {file.read().strip()}, which is still running; wait for "
                      "it, or choose another --out") from None
    except OSError:             # a file system without locks
        return file
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


# ---- write -------------------------------------------------------------------------------------------------

def write_file(path, text):
    """Replace a file in one rename: a kill leaves the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path, with_checksums=False):
    """Context manager: write a folder beside `path`, then put it in its place.

    A kill leaves the old folder or the new one whole. Between the two renames the old one is called
    `path`.old, and `recover` renames it back. Whatever a library says when a disk is full is refused in one
    line, and the old folder stays.
    """
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        if with_checksums:
            write_file(new / CHECKSUMS, json.dumps(checksums(new), indent=1))
        for file in [*new.rglob("*"), new]:
            sync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    except Exception as error:          # safetensors, torch and zip files each have errors of their own
        recover(path)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, (Refused, torch.OutOfMemoryError)):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise Refused(f"cannot write {path}: {type(error).__name__}: {first_line(error)} ({free:,.0f} MiB "
                      "are free there)") from error
    shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- read --------------------------------------------------------------------------------------------------

def recover(path, look_only=False):
    """Undo atomic_folder's first rename if a kill prevented the second; return whether there is a folder.

    Where both were done, remove the old folder. look_only: return the same, but change nothing.
    """
    old = path.with_name(path.name + ".old")
    if old.exists() and not look_only:
        shutil.rmtree(old) if path.exists() else old.rename(path)
    return path.exists() or old.exists()


def checksums(folder):
    """Return {file's path in the folder: CRC-32 of its bytes}, which one flipped bit changes."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS):
        crc = 0
        with open(path, "rb") as file:
            while block := file.read(2**22):
                crc = zlib.crc32(block, crc)
        out[path.relative_to(folder).as_posix()] = crc
    return out


def check_whole(folder):
    """Refuse a folder that was written with checksums and of which a file has changed or is missing."""
    try:
        written = check_record(json.loads((folder / CHECKSUMS).read_text()))
    except (OSError, ValueError):
        raise Refused(f"{folder} has no {CHECKSUMS} that can be read: it is damaged, or another version of "
                      "opd wrote it; begin anew with another --out") from None
    found = checksums(folder)
    for name in written.keys() | found.keys():
        if written.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not as it was written"
            raise Refused(f"{folder / name} {what}, so this checkpoint cannot be continued; begin anew with "
                          "another --out, or put the file back")


def read_lines(path, number=None):
    """Return the objects of a JSON-lines file that a run appends to, without lines that cannot be read.

    number: a field that is a whole number in every one. A kill cuts the last one, which is nothing special; a
    note says how many others there are.
    """
    if not Path(path).exists():
        return []
    lines, out, broken = Path(path).read_bytes().split(b"\n"), [], []
    for place, line in enumerate(lines, 1):
        try:
            if line:
                out.append(check_record(json.loads(line), number))
        except ValueError:                                      # not UTF-8, not JSON, or no record
            broken.append(place)
    if broken and broken != [len(lines)]:
        tqdm.write(f"note: {path}: {len(broken)} lines cannot be read and are left out, first line "
                   f"{broken[0]}")
    return out


def check_record(value, number=None):
    """Return an object, whose field `number` is a whole number; refuse another value."""
    if not isinstance(value, dict) or number and not isinstance(value.get(number), int):
        raise ValueError("no record")
    return value
