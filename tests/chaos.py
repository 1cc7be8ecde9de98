"""Chaos: what is killed anywhere and resumed must end as if nothing had happened (bash tests/run.sh --long).

    kills    SIGKILL before lines that write, or at any time, then --resume, until the run is done; final/,
             adapter/, metrics.jsonl and samples.jsonl must be those of a run that nobody disturbed
    fuzz     two steps with random settings end with finite numbers, or are refused in one line
    long     of a few hundred steps none takes more time or memory than the first ones

    python tests/chaos.py [--minutes 2] [--seed 0]

Every run is a process of its own. It is forked from one that has imported the program, which takes seconds.
The exit status is 1 if anything differed.
"""
import argparse
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["opd", "lab.recipes", "matplotlib.pyplot", "transformers.generation.utils",
                               "transformers.models.qwen3.modeling_qwen3"])
# The functions before whose lines a run is killed: all that write, rename or take a folder.
WRITE = """own write_file atomic_folder sync recover take write_config log open_checkpoint put_logs_aside save
           restore finish save_model save_learners save_adapters save_final""".split()
DIFFER = ("seconds", "memory_gib", "memory_gib_by_part")        # between two runs of the same command
LEFT = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final", "adapter", ".lock",
        "metrics.jsonl.old", "samples.jsonl.old"}               # all that a finished run may leave


# ---- processes ---------------------------------------------------------------------------------------------

class Fork:
    """A process that runs function(*args); what it says goes to the file `log`. It ends with its context."""

    def __init__(self, log, function, *args):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # of the process that forks: no GPU survives that
        multiprocessing.forkserver.ensure_running()
        os.environ.pop("CUDA_VISIBLE_DEVICES") if hidden is None else os.environ.update(CUDA_VISIBLE_DEVICES=hidden)
        self.log = Path(log)
        self.log.write_text("")
        self.process = FORKED.Process(target=in_fork, args=(str(log), function, args))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.is_alive():
            self.send(signal.SIGKILL)
            self.end()

    def send(self, *signals):
        """Send it signals."""
        for number in signals:
            os.kill(self.pid, number)

    def until(self, condition, seconds=60):
        """Wait until something is so while it runs; fail if it ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, self.said
            time.sleep(0.005)
        return self

    def end(self, seconds=120):
        """Wait for its end and return its exit status: -9 after SIGKILL, None if it takes longer."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def said(self):
        """What it said, without progress bars."""
        return "\n".join(line.rsplit("\r", 1)[-1] for line in self.log.read_text().splitlines() if line.strip())


def in_fork(log, function, args):
    """Run a function with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    function(*args)


def opd(words, report=False, kill_at=None, lines=None):
    """Run opd.py as its command line would. kill_at: the number of the writing line before which it dies.

    lines: a file that gets the name of every writing line. Without a report it takes half the time.
    """
    sys.argv = ["opd.py", *words]
    if not report:
        sys.modules["lab.report"] = None
    seen = []

    def at_line(frame, event, _):
        if event == "line":
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{frame.f_code.co_name} {frame.f_lineno}")
        return at_line

    def at_call(frame, *_):
        code = frame.f_code
        ours = code.co_name in WRITE and Path(code.co_filename).parent in (ROOT, ROOT / "data")
        return at_line if ours else None

    if kill_at is not None or lines:
        sys.settrace(at_call)
    runpy.run_path(str(ROOT / "opd.py"), run_name="__main__")
    if lines:
        Path(lines).write_text(json.dumps(seen))


# ---- runs --------------------------------------------------------------------------------------------------

GRADER = """import zlib
def chance(completion, row):
    return zlib.crc32(completion.encode()) % 2
"""


def make_world(folder):
    """Write three tiny models, prompts, templates and a grader that calls half of all completions correct."""
    from conftest import TEMPLATES, WORD_ROWS, small_world, tiny
    tok = small_world.tokenizer()
    for seed, (name, hidden) in enumerate({"a": 32, "b": 32, "wide": 48}.items()):
        tiny(folder / name, small_world.model(len(tok), seed, hidden=hidden, layers=1), tok)
    for name in ("words", "more", "val_words", "val_more"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WORD_ROWS))
    (folder / "templates.json").write_text(json.dumps(TEMPLATES))
    (folder / "grader.py").write_text(GRADER)
    return folder


def flags_of(world, name):
    """Return the flags of a method on that world."""
    from methods import METHODS
    method = METHODS[name]
    branches = ["words", "more"] if method.teachers == "each" or method.students == 2 else ["words"]
    models = {"words": "wide", "more": "b"}
    flags = dict(method=name, student=[world / "a"], prompts=[f"{b}={world / b}.jsonl" for b in branches],
                 steps=4, save_every=1, batch=4, device="cpu", lr=1e-3, grader=f"{world / 'grader.py'}:chance")
    if method.teachers != "none":
        names = ["words", "more"] if method.teachers == "any" else branches
        flags["teachers"] = [f"{b}={world / models[b]}" for b in names]
    if method.samples:
        flags |= dict(max_new_tokens=6, eval_prompts=[f"e={world / 'words.jsonl'}"], eval_every=2)
    if "templates" in method.defaults:
        flags["templates"] = world / "templates.json"
    if method.students == 2:
        flags |= dict(student=[world / "a", world / "b"], feedback_tokens=6, break_prompts=2, gate_rollouts=2,
                      eval_temperature=1, val_prompts=[f"{b}={world / f'val_{b}'}.jsonl" for b in branches])
    if "rounds" in method.own:
        flags["rounds"] = 2
    return flags


def command(out, flags):
    """Return the words of a command line."""
    words = ["--out", str(out), "--resume"]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{flag}", *(str(x) for x in values if x is not True)]
    return words


def left_by(out):
    """Return what a finished run has left and no kill may change: {name: bytes or records}."""
    from data.files import read_lines
    left = {str(path.relative_to(out)): path.read_bytes()
            for folder in ("final", "adapter") for path in sorted((out / folder).rglob("*")) if path.is_file()}
    for name in ("metrics.jsonl", "samples.jsonl"):
        left[name] = [{key: line[key] for key in line if key not in DIFFER} for line in read_lines(out / name)]
    return left | {"other files": {path.name for path in out.iterdir()} - LEFT}


def differences(out, reference):
    """Return the names of what differs between a finished run and the reference."""
    ours = left_by(out)
    return [name for name in ours.keys() | reference.keys() if ours.get(name) != reference.get(name)]


# ---- the three parts ---------------------------------------------------------------------------------------

class Chaos:
    def __init__(self, world, seed):
        self.world, self.rng = world, random.Random(seed)
        self.figures, self.wrong = Counter(), []

    def run(self, out, flags, **how):
        """Run a command to its end and return it."""
        with Fork(self.world / "log", opd, command(out, flags)) as run:
            run.end()
        return run

    def note(self, what, command_words, said):
        """Keep what went wrong, and show it."""
        self.wrong.append(what)
        tqdm.write(f"\nWRONG: {what}\n  python opd.py {' '.join(command_words)}\n  {said[-1500:]}\n")

