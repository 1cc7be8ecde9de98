"""What a run keeps on disk, so that a kill at any moment leaves something that can be continued."""
import contextlib
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch
import transformers

from config import fail


def read_lines(path):
    """The objects of a JSON-lines file that a run appends to, less a last line that a kill cut short."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]


def write_file(path, text):
    """Replace a file in one rename: a kill leaves the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextlib.contextmanager
def atomic_folder(path):
    """Write a folder beside `path`, then put it in its place: a kill leaves the old one or the new one whole.

    Between its two renames the old one is `path`.old; `recover` puts it back.
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
    """Undo atomic_folder's first rename where a kill prevented the second. Returns whether there is a folder.

    look_only: say so, but rename nothing.
    """
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists() and not look_only:
        old.rename(path)
    return path.exists() or old.exists()


def find_checkpoint(cfg):
    """The folder to resume from, or None to start afresh. Whatever else --out holds is left alone."""
    out, checkpoint = Path(cfg.out), Path(cfg.out) / "checkpoint"
    if out.exists() and not out.is_dir():
        fail(f"--out {out} is a file; it must be a folder")
    before = read_config(out)
    if before is None:
        if out.exists() and any(path.name != "config.json.new" for path in out.iterdir()):
            fail(f"--out {out} holds other files and no run; choose another --out")
        return None
    if not cfg.resume:
        fail(f"{out} holds a run already: add --resume to continue it, or choose another --out")
    if not recover(checkpoint, cfg.dry_run):
        if (out / "final").exists():
            fail(f"{out} is finished (final/) and its checkpoint/ is gone; choose another --out")
        return None                                             # it died before its first checkpoint
    cfg.max_new_tokens = cfg.max_new_tokens or before.get("max_new_tokens")
    now = json.loads(json.dumps(vars(cfg)))
    free = {"resume", "out", "eval_every", "save_every", "log_samples", "micro_tokens", "device",
            "eval_prompts", "teacher_device", "gradient_checkpointing", "dry_run", "diagnose_every",
            "diagnose_rollouts", "diagnose_layers"}
    if cfg.lr_schedule == "constant" and cfg.target == "teacher" and len(cfg.student) == 1:
        free |= {"steps"}                       # nothing else depends on where the training ends
    for key in sorted(now.keys() - free):
        if now[key] != before.get(key):
            fail(f"--resume with another {key} ({now[key]}, was {before.get(key)}) would be another "
                 "experiment; choose another --out")
    return checkpoint


def read_config(out):
    """The settings of the run in a folder, or None: a model's folder has a config.json as well."""
    try:
        config = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and {"method", "versions"} <= config.keys() else None


def write_config(cfg):
    """OUT/config.json: every setting, with versions, commit, device and date."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:                             # no git on this machine
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "opd": commit or "unknown"}
    on_gpu, started = cfg.device.startswith("cuda"), time.strftime("%Y-%m-%d %H:%M:%S")
    device = (torch.cuda.get_device_name(cfg.device) if on_gpu else       # the instructions decide rounding
              f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    record = {**vars(cfg), "versions": versions, "device_name": device, "started": started}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_file(Path(cfg.out) / "config.json", json.dumps(record, indent=1))
