"""Files and folders that a kill at any moment leaves in a state from which a run can be resumed."""
import contextlib
import json
import shutil
from pathlib import Path

from config import Refused


def read_lines(path):
    """Return the objects of a JSON-lines file that a run appends to, without a last line that a kill cut."""
    lines, out = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line], []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise Refused(f"{path}: line {number} is not JSON, and no run has written it") from None
    return out


def write_file(path, text):
    """Replace a file in one rename: a kill leaves the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextlib.contextmanager
def atomic_folder(path):
    """Context manager: write a folder beside `path`, then put it in its place.

    A kill leaves the old folder or the new one whole. Between the two renames the old one is called
    `path`.old, and `recover` renames it back.
    """
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path, look_only=False):
    """Undo atomic_folder's first rename if a kill prevented the second; return whether there is a folder.

    look_only: return the same, but rename nothing.
    """
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists() and not look_only:
        old.rename(path)
    return path.exists() or old.exists()
