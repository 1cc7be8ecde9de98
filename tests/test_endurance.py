"""Endurance: kills, full disks, flipped bits, numbers that explode, short memory and other folders.

Where a property needs a process of its own, it is forked from one that has imported the program, which takes
seconds. chaos.py kills and resumes such processes at random, for as long as one likes.
"""
import contextlib
import dataclasses
import errno
import importlib
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import safetensors
import torch
from conftest import TEMPLATES, WORD_ROWS, gradients, metrics, parameters
from data.files import CHECKSUMS, atomic_folder, check_whole, own, read_lines, recover
from data.folder import Folder
from test_loop import rollouts
from tqdm import tqdm

import models as loading
import opd
from config import Refused
from lab import recipes, report
from losses import Objective
from methods import Job

ROOT = Path(__file__).resolve().parent.parent
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["test_endurance", "matplotlib.pyplot", "transformers.generation.utils",
                               "transformers.models.qwen3.modeling_qwen3"])
# The functions before whose lines a run can be killed: all that write, rename or take a folder.
WRITERS = """own write_file atomic_folder sync recover take write_config log open_checkpoint put_logs_aside save
             restore finish save_model save_learners save_adapters save_final""".split()
DIFFER = ("seconds", "memory_gib", "memory_gib_by_part")        # between two runs of the same command
LEFT = {"config.json", "metrics.jsonl", "samples.jsonl", "report.md", "curves.png", "checkpoint", "final",
        "adapter", ".lock", "metrics.jsonl.old", "samples.jsonl.old", "eval.jsonl", "eval.jsonl.old"}       # what a finished run may leave


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    """Drawing the report of a run takes longer than the run."""
    lab = opd.lab
    monkeypatch.setattr(opd, "lab", lambda name, *flag: None if name == "report" else lab(name, *flag))


def said(words, main=opd.main, name="opd.py"):
    """What the program says before it stops: one line."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    message = str(stop.value)
    assert message.startswith(f"{name}: ") and "\n" not in message
    return message


def tree(folder):
    """Every file of a folder, with its content and the time of its last change."""
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def steps(out):
    """The steps of metrics.jsonl; -1 is the start."""
    return [line["step"] for line in read_lines(out / "metrics.jsonl")]


# ---- processes ---------------------------------------------------------------------------------------------

class Fork:
    """A process that runs function(*args), and says to a file what it says. It ends with its context."""

    def __init__(self, log, function, *args, **more):
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):              # no GPU survives a fork
            multiprocessing.forkserver.ensure_running()
        self.log = Path(log)
        self.log.write_text("")
        self.process = FORKED.Process(target=in_fork, args=(str(log), function, args, more))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()

    def send(self, number):
        """Send it a signal."""
        os.kill(self.pid, number)

    def until(self, condition, seconds=60):
        """Wait until something is so; fail if the process ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, self.said
            time.sleep(0.005)
        return self

    def end(self, seconds=120):
        """Wait for its end and return its exit status: -9 after SIGKILL, None if it is not over by then."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def said(self):
        """Its lines without progress bars."""
        lines = [line.rsplit("\r", 1)[-1].strip() for line in self.log.read_text().splitlines()]
        return "\n".join(line for line in lines if line)


def in_fork(log, function, args, more):
    """Run a function with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)                 # in the order in which it is said
    os.chdir(ROOT)
    tqdm.set_lock(threading.RLock())                            # its own one would outlive a kill
    function(*args, **more)


def program(words, report=False, kill_at=None, lines=None):
    """Run opd.py as its command line does; without a report it takes half the time.

    kill_at: the number of the line that writes before which it dies. lines: a file for the names of all such.
    """
    sys.argv, passed = ["opd.py", *words], []
    sys.modules |= {} if report else {"lab.report": None}

    def at_line(frame, event, _):
        if event == "line":
            if len(passed) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            passed.append(f"{frame.f_code.co_name} {frame.f_lineno} of {frame.f_back.f_code.co_name}")
        return at_line

    def at_call(frame, *_):
        code = frame.f_code
        ours = code.co_name in WRITERS and Path(code.co_filename).parent in (ROOT, ROOT / "data")
        return at_line if ours else None

    if kill_at is not None or lines:
        sys.settrace(at_call)
    runpy.run_path(str(ROOT / "opd.py"), run_name="__main__")
    if lines:
        Path(lines).write_text(json.dumps(passed))


def left_by(out):
    """Return what a finished run has left and no kill may change: {name: bytes, records or names}."""
    left = {str(path.relative_to(out)): path.read_bytes()
            for folder in ("final", "adapter") for path in (out / folder).rglob("*") if path.is_file()}
    for name in ("metrics.jsonl", "samples.jsonl"):
        left[name] = [{key: line[key] for key in line if key not in DIFFER} for line in read_lines(out / name)]
    return left | {"other files": {path.name for path in out.iterdir()} - LEFT}


# ---- one owner ---------------------------------------------------------------------------------------------

def hold(folder):
    """Have a folder until the end of the process."""
    lock = own(folder)
    time.sleep(600)
    lock.close()


@pytest.fixture
def held(tmp_path):
    """held(folder) -> the process that has the folder from now on."""
    forks = []

    def hold_folder(folder):
        folder.mkdir()
        forks.append(Fork(tmp_path / "held.log", hold, folder))
        return forks[-1].until(lambda: (folder / ".lock").exists() and (folder / ".lock").read_text())
    yield hold_folder
    for fork in forks:
        fork.__exit__()


def test_a_folder_has_one_owner_who_loses_it_with_his_life(argv, tmp_path):
    """Whoever else starts there is refused with the owner's number and writes nothing; a dry run may look."""
    out, flags = tmp_path / "out", dict(out=tmp_path / "out", save_every=1)
    with Fork(tmp_path / "log", program, argv(**flags, steps=10**6)) as first:
        first.until(lambda: (out / "checkpoint").exists()).send(signal.SIGSTOP)
        before, words = tree(out), argv(**flags, steps=steps(out)[-1] + 3)
        assert f"{out} belongs to process {first.pid}, which is still running" in said([*words, "--resume"])
        assert "holds a run already" in said(words)
        opd.main([*words, "--resume", "--dry_run"])
        assert tree(out) == before
    opd.main([*words, "--resume"])
    assert steps(out) == [-1, *range(len(steps(out)) - 1)] and (out / "final").exists()


def test_a_folder_that_another_process_has_just_taken_is_refused(argv, held, tmp_path):
    """It is free when the settings are checked, and no longer when the models are loaded."""
    owner = held(tmp_path / "out")
    before = tree(tmp_path / "out")
    message = said(argv(out=tmp_path / "out"))
    assert f"belongs to process {owner.pid}, which" in message and tree(tmp_path / "out") == before


@pytest.mark.parametrize("resume", [[], True], ids=["start", "resume"])
def test_of_two_processes_that_start_together_exactly_one_runs(argv, tmp_path, resume):
    words = argv(out=tmp_path / "out", resume=resume, steps=20)
    with Fork(tmp_path / "1", program, words) as one, Fork(tmp_path / "2", program, words) as other:
        assert sorted([one.end(), other.end()]) == [0, 1]
    refused = [fork.said.splitlines()[-1] for fork in (one, other) if fork.end()]
    assert refused[0].startswith("opd.py: ") and str(tmp_path / "out") in refused[0]
    assert steps(tmp_path / "out") == [-1, *range(20)]


def test_a_recipes_folder_has_one_owner(held, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "run_child", lambda *args: pytest.fail("a row runs"))
    owner = held(tmp_path / "small")
    before = tree(tmp_path / "small")
    words = ["small", "--quick", "--out", str(tmp_path / "small")]
    assert f"belongs to process {owner.pid}, which" in said(words, recipes.main, "lab.recipes")
    assert tree(tmp_path / "small") == before


# ---- a full disk -------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
CALLS = [                       # what is called while a folder is written, and what it says when the disk is full
    (Path, "mkdir", FULL), (Path, "write_text", FULL), (Path, "write_bytes", FULL), (os, "fsync", FULL),
    (Path, "rename", FULL), (Path, "replace", FULL),
    (loading, "save_model", safetensors.SafetensorError("I/O error: No space left on device (os error 28)")),
    (torch, "save", RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 704 vs 598"))]


class Disk:
    """Counts the calls that write while checkpoint/ or final/ are written, and lets one of them fail."""

    def __init__(self, monkeypatch, full_at=None):
        self.calls, self.full_at, self.folder = [], full_at, None
        for where, name, error in CALLS:
            monkeypatch.setattr(where, name, self.counted(getattr(where, name), name, error))
        for name in ("save", "finish"):
            monkeypatch.setattr(Folder, name, self.watched(getattr(Folder, name), name))

    def watched(self, function, name):
        def call(*args):
            self.folder = name
            function(*args)
            self.folder = None
        return call

    def counted(self, function, name, error):
        def call(*args, **kwargs):
            if self.folder:
                self.calls.append((self.folder, name))
                if len(self.calls) - 1 == self.full_at:
                    self.folder = None
                    raise type(error)(*error.args, *args[:1]) if name in ("mkdir", "rename", "replace") else error
            return function(*args, **kwargs)
        return call


def stopped_at(step, update=opd.update):
    """opd.update, during which Ctrl-C arrives in that step."""
    def stopping(run, *args):
        run.stopping = run.state["step"] == step
        return update(run, *args)
    return stopping


@pytest.fixture
def halfway(argv, tmp_path, monkeypatch):
    """halfway(flag=value, ..) -> (a command without --out that resumes, a run that it left after one step)."""
    def run_half(**flags):
        words = argv(**dict(lr=1e-3, save_every=1, out=tmp_path / "half") | flags)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(opd, "update", stopped_at(0))
            opd.train(opd.Run(opd.configure(words)))
        at = words.index("--out")
        return [*words[:at], *words[at + 2:], "--resume", "--out"], Path(words[at + 1])
    return run_half


@pytest.mark.parametrize("part", ["written", pytest.param("put in its place")])
def test_a_full_disk_is_a_line_and_costs_nothing_but_time(halfway, tmp_path, monkeypatch, part):
    """Whatever fails first: the old checkpoint stays whole, and with room again the run ends as it would."""
    words, half = halfway()
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        opd.main([*words, str(shutil.copytree(half, tmp_path / "undisturbed"))])
    places, renamed = {}, set()
    for number, (folder, name) in enumerate(disk.calls):        # the first and the last of each kind
        renamed |= {folder} if name == "rename" else set()
        if (folder in renamed) == (part != "written"):
            places.setdefault((folder, name), [number, number])[1] = number
    assert len(places) == (10 if part == "written" else 4)
    for number in sorted(set(sum(places.values(), []))):
        out = shutil.copytree(half, tmp_path / f"full at {number}")
        with monkeypatch.context() as patch:
            Disk(patch, number)
            message = said([*words, str(out)])
        folder = out / ("checkpoint" if disk.calls[number][0] == "save" else "final")
        assert "with --resume the same command continues at" in message
        recover(out / "checkpoint")
        check_whole(out / "checkpoint")
        opd.main([*words, str(out)])
        assert left_by(out) == left_by(tmp_path / "undisturbed"), disk.calls[number]
        assert message.startswith(f"opd.py: cannot write {folder}: ") if part == "written" else (
            str(folder) in message.partition("; with --resume")[0]), disk.calls[number]


def run_limited(size, words):
    """Run opd.py where no file can have more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    program(words)


def test_files_that_cannot_grow_are_refused_and_then_resumed(halfway, tmp_path):
    """The system's own limit, within the weights and within the optimizer's state."""
    words, half = halfway()
    sizes = [(half / "checkpoint" / name).stat().st_size for name in ("model.safetensors", "trainer.pt")]
    opd.main([*words, str(shutil.copytree(half, tmp_path / "undisturbed"))])
    for size in (sizes[0] - 100, sizes[1] - 100):
        out = shutil.copytree(half, tmp_path / f"limit {size}")
        with Fork(tmp_path / "log", run_limited, size, [*words, str(out)]) as run:
            assert run.end() == 1 and "Traceback" not in run.said
        assert run.said.splitlines()[-1].startswith(f"opd.py: cannot write {out / 'checkpoint'}: ")
        check_whole(out / "checkpoint")
        opd.main([*words, str(out)])
        assert left_by(out) == left_by(tmp_path / "undisturbed")


# ---- damage ------------------------------------------------------------------------------------------------

def test_a_flipped_bit_or_a_missing_file_is_noticed_before_weights_are_read(halfway, monkeypatch):
    words, half = halfway()
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("weights are read"))
    names = {path.name for path in (half / "checkpoint").iterdir()}
    assert {"model.safetensors", "trainer.pt", "config.json", CHECKSUMS} <= names
    for name in names:
        path = half / "checkpoint" / name
        whole = path.read_bytes()
        flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:]
                   for at in (0, len(whole) // 3, len(whole) - 1)]
        for content in (*flipped, whole[:-1], b"", None):
            path.unlink() if content is None else path.write_bytes(content)
            message = said([*words, str(half)])
            assert str(half / "checkpoint") in message and (name in message or name == CHECKSUMS)
        path.write_bytes(whole)


def test_every_flipped_bit_of_the_checksums_is_noticed(tmp_path):
    with atomic_folder(tmp_path / "folder", with_checksums=True) as folder:
        (folder / "trainer.pt").write_text("state")
    path = tmp_path / "folder" / CHECKSUMS
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        if flipped.split() != whole.split():                    # white space is no part of what it says
            with pytest.raises(Refused):
                check_whole(tmp_path / "folder")


# ---- sound -------------------------------------------------------------------------------------------------

def spoil(monkeypatch, at, value, kind=torch.optim.AdamW):
    """Put a value into a matrix of the student in that optimizer step, the first being 1."""
    step, done = kind.step, []

    def spoiling(optimizer, *args):
        step(optimizer, *args)
        done.append(1)
        if len(done) == at:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][1].view(-1)[7] = value
    monkeypatch.setattr(kind, "step", spoiling)


@pytest.mark.parametrize("flags", [
    dict(optimizer="sgd", grad_clip=0), dict(optimizer="muon"), dict(loss="pg"), dict(dtype="bfloat16"),
    dict(method="sft")], ids=str)
def test_whatever_the_learning_rate_a_checkpoint_can_be_resumed(argv, tmp_path, flags):
    """Either the run ends in a line and its last checkpoint goes on, or it ends well and so does one step more."""
    words = dict(lr=1000, weight_decay=0, save_every=1, out=tmp_path / "out") | flags
    with contextlib.suppress(SystemExit):
        opd.main(argv(**words, steps=3))
    if (tmp_path / "out" / "checkpoint").exists():
        opd.main(argv(**words, steps=steps(tmp_path / "out")[-1] + 2, resume=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38], ids=str)
def test_weights_from_which_no_step_goes_on_are_not_saved(argv, tmp_path, monkeypatch, value):
    words = dict(lr=1e-3, save_every=1, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        spoil(patch, 1, value)
        assert "after step 1" in (message := said(argv(**words, steps=1)))
    assert "no checkpoint yet" in message and not {"final", "checkpoint"} & set(os.listdir(tmp_path / "out"))
    with monkeypatch.context() as patch:
        spoil(patch, 2, value)
        message = said(argv(**words, resume=True))
    assert f"{tmp_path / 'out'}, step 1" in message and not (tmp_path / "out" / "final").exists()
    opd.main(argv(**words, resume=True))
    undisturbed = argv(**words | dict(out=tmp_path / "other"))
    opd.main(undisturbed)
    assert left_by(tmp_path / "out") == left_by(tmp_path / "other")


BROKEN = {
    "teacher": "wide computes what is not a number for one of the prompts of main",
    "weights": "the weights of .*a are no numbers any more; lower --lr or --weight_decay",
    "loss": "loss or gradient are not a number, though all weights are; lower --lr, or look at the data"}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_a_number_is_told_apart(start, monkeypatch, what):
    run = start(lr=1e-3, method="kd" if what == "weights" else "opd")       # kd does not sample
    if what == "teacher":
        with torch.no_grad():
            run.teacher.head_VH[5] = math.nan
    elif what == "weights":
        spoil(monkeypatch, 1, math.nan)
    else:
        divergence = opd.linear_divergence
        monkeypatch.setattr(opd, "linear_divergence", lambda *args, **how: (
            lambda loss, stats: (loss * math.nan, stats))(*divergence(*args, **how)))
    with pytest.raises(Refused, match=BROKEN[what]):
        opd.train(run)


@pytest.mark.parametrize("flags", [dict(), dict(temperature=0.5, top_p=0.9), dict(eval_every=1)], ids=str)
def test_what_is_not_a_number_while_sampling_is_a_line(argv, prompts, monkeypatch, flags):
    flags = flags | (dict(eval_prompts=[f"e={prompts('e')}"]) if "eval_every" in flags else {})
    spoil(monkeypatch, 1, math.nan)
    assert "a computes what is not a number while it samples" in said(argv(lr=1e-3, **flags))


def bad_in(steps, update=opd.update):
    """opd.update, in which the gradient of these steps is not a number."""
    def poisoned(run, jobs, weights):
        if run.state["step"] in steps:
            weights = [[w_T * math.nan for w_T in job_weights] for job_weights in weights]
        return update(run, jobs, weights)
    return poisoned


def test_bad_steps_in_a_row_are_dropped_up_to_the_last_that_may_be(start, argv, monkeypatch):
    """Two of three change nothing and are logged without a loss; good ones between them begin a new row."""
    flags = dict(lr=1e-3, save_every=1, steps=7, skip_bad_steps=3)
    run, ends = start(**flags), []
    step = opd.record
    monkeypatch.setattr(opd, "update", bad_in((1, 2, 4, 5)))
    monkeypatch.setattr(opd, "record", lambda run, *rest: (step(run, *rest), ends.append(parameters(run.student))))
    opd.train(run)
    assert [line["loss"] is None for line in metrics(run)] == [step in (1, 2, 4, 5) for step in range(7)]
    assert [torch.equal(*pair) for pair in zip(ends, ends[1:])] == [step in (1, 2, 4, 5) for step in range(1, 7)]
    monkeypatch.setattr(opd, "update", bad_in((1, 2, 3)))
    assert "step 4: loss or gradient" in said(argv(**flags))


def test_a_resumed_run_counts_bad_steps_on(argv, tmp_path, monkeypatch):
    words = dict(lr=1e-3, save_every=1, steps=6, skip_bad_steps=3, out=tmp_path / "out")
    monkeypatch.setattr(opd, "update", bad_in((1, 2, 3), stopped_at(2)))
    assert "interrupted after step 3" in said(argv(**words))
    assert "step 4: loss or gradient" in said(argv(**words, resume=True))


@pytest.mark.parametrize("value", [math.nan, 1e38], ids=str)
@pytest.mark.parametrize("flags", [dict(steps=4, save_every=2), dict(steps=2, save_every=0)], ids=str)
def test_a_dropped_step_does_not_save_what_the_step_before_has_broken(argv, tmp_path, monkeypatch, flags, value):
    """That step was none after which is saved."""
    spoil(monkeypatch, 1, value)
    said(argv(lr=1e-3, method="kd", skip_bad_steps=3, out=tmp_path / "out", **flags))
    assert not {"final", "checkpoint"} & set(os.listdir(tmp_path / "out"))


def test_the_report_counts_dropped_steps(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "update", bad_in((1, 3)))
    opd.main(argv(skip_bad_steps=3, steps=5, out=tmp_path / "out"))
    report.write_run(tmp_path / "out")
    assert "2 x a step with a loss or gradient that is not a number" in (tmp_path / "out/report.md").read_text()


# ---- memory ------------------------------------------------------------------------------------------------

def narrow(monkeypatch, tokens):
    """Let forward passes of more tokens, with padding, not fit. Return the list of those that did."""
    fitted, hidden_states = [], loading.Model.hidden_states

    def limited(model, prompts, completions):
        size = len(prompts) * max(len(p) + len(ids_T) for p, ids_T in zip(prompts, completions))
        if size > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fitted.append(size)
        return hidden_states(model, prompts, completions)
    monkeypatch.setattr(loading.Model, "hidden_states", limited)
    return fitted


@pytest.mark.parametrize("method", ["opd", "camopd", "opsd"])
def test_where_memory_is_short_smaller_micro_batches_give_the_same(start, monkeypatch, capsys, method):
    """Checkpoints too: the run with less memory ends with the weights of the other one, but for rounding."""
    flags = dict(method=method, batch=8, lr=1e-3, steps=2, micro_tokens=400, optimizer="sgd")
    wide, short = start(**flags), start(**flags)
    opd.train(wide)
    opd.begin(short)
    with monkeypatch.context() as patch:
        patch.setattr(opd, "begin", lambda run: None)           # whose batches are small anyway
        fitted = narrow(patch, 60)
        opd.train(short)
    assert short.cfg.micro_tokens == 50 and max(fitted) <= 60
    assert "goes on with --micro_tokens 50" in capsys.readouterr().out
    torch.testing.assert_close(parameters(wide.student), parameters(short.student), rtol=1e-5, atol=1e-7)


def test_half_a_step_that_did_not_fit_leaves_no_gradient(start, monkeypatch):
    """The first micro-batches of a Job have their gradients when the next one does not fit."""
    run = start(batch=8)
    job = Job(run.student, run.teacher, rollouts(run), Objective(divergence="rkl"))
    run.score([job])
    weights = opd.weigh([job])[0]
    opd.backward(run, job, weights)
    expected, calls = gradients(run.student), []
    run.student.net.zero_grad()
    divergence = opd.linear_divergence

    def fails_once(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return divergence(*args, **how)
    monkeypatch.setattr(opd, "linear_divergence", fails_once)
    run.cfg.micro_tokens = 60
    opd.halving(run, [job], lambda: opd.backward(run, job, weights))
    assert len(calls) > 3
    torch.testing.assert_close(gradients(run.student), expected, rtol=1e-4, atol=1e-6)


def test_what_can_never_fit_is_a_line(argv, monkeypatch):
    monkeypatch.setattr(opd, "begin", lambda run: (run.folder.take(), narrow(monkeypatch, 5)))
    assert "step 1 does not fit on cpu. What takes less memory: " in said(argv())


# ---- resume ------------------------------------------------------------------------------------------------

def test_a_run_goes_on_in_a_moved_world_and_with_other_memory_settings(
        argv, models, prompts, tmp_path, monkeypatch):
    """Models, prompts and templates are known by their content, however their paths are spelled."""
    world = shutil.copytree(models, tmp_path / "world")
    prompts("p").rename(world / "p.jsonl")
    (world / "t.json").write_text(json.dumps(TEMPLATES))

    def words(root, **flags):
        return argv(method="opsd", out=tmp_path / "out", student=f"{root}/a", lr=1e-3, save_every=1,
                    prompts=[f"{root}/p.jsonl"], templates=f"{root}/t.json", teachers=[], **flags)
    opd.main(words(world, steps=1))
    spelled = [f"{world}/", f"{tmp_path}/x/../world", "world", "./world//", f"{world}"]
    (tmp_path / "x").mkdir()
    for number, root in enumerate(spelled, 2):
        monkeypatch.chdir(tmp_path)
        if number == len(spelled) + 1:
            root = shutil.move(world, tmp_path / "elsewhere")
        more = dict(sample_batch=number, micro_tokens=9 * number, **({"gradient_checkpointing": True} if number % 2 else {}))
        opd.main(words(root, steps=number, resume=True, **more))
    assert steps(tmp_path / "out") == [-1, *range(len(spelled) + 1)]


def test_a_checkpoint_that_its_owner_has_saved_meanwhile_is_continued(argv, tmp_path):
    """As after Ctrl-C and at once the same command: the first one saves while the second one reads."""
    out, saved, marker = tmp_path / "out", tmp_path / "saved", tmp_path / "marker"
    words = argv(out=out, save_every=1, lr=1e-3)
    opd.main(words)
    (out / "checkpoint").rename(saved)
    shutil.rmtree(out / "final")
    with Fork(tmp_path / "log", asleep, [*words, "--resume"], marker, "data.folder", "own", 0) as second:
        second.until(marker.exists)
        saved.rename(out / "checkpoint")
        marker.unlink()
        assert second.end() == 0
    assert "has done its 2 steps" in second.said and not (out / "metrics.jsonl.old").exists()


@pytest.mark.parametrize("what", ["student", "teacher of main", "main", "templates"])
def test_other_content_under_the_same_path_is_refused_by_name(argv, models, prompts, tmp_path, what):
    world = shutil.copytree(models, tmp_path / "world")
    template = tmp_path / "t.json"
    template.write_text(json.dumps(TEMPLATES))
    of = dict(method="opsd", templates=template, teachers=[]) if what == "templates" else dict(
        teachers=[world / "wide"])
    words = dict(student=world / "a", prompts=[prompts("p")], out=tmp_path / "out", save_every=1, **of)
    opd.main(argv(**words, steps=1))
    if what == "main":
        prompts("p", WORD_ROWS[:-1])
    elif what == "templates":
        template.write_text(json.dumps(TEMPLATES | {"solution": "{solution}+"}))
    else:
        with open(world / ("a" if what == "student" else "wide") / "model.safetensors", "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"?")
    before = tree(tmp_path / "out")
    assert f"another content of {what} would be another experiment" in said(argv(**words, resume=True))
    assert {path for path in tree(tmp_path / "out")} == before.keys()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("damage, lost, note", [
    (lambda lines: [*lines, b'{"step": 9, "text": "caf\xc3'], [], ""),
    (lambda lines: [lines[0], lines[1][:9] + b"\xff", *lines[2:]], [1], "1 lines cannot be read and are left out, "
                                                                      "first line 2"),
    (lambda lines: [b"", b"[1]", *lines], [], "first line 2"), (lambda lines: [], [0, 1, 2], ""),
    (None, [0, 1, 2], ""),
    pytest.param(lambda lines: [b"{}", *lines], [], "first line 1"),
    pytest.param(lambda lines: [b'{"step": null}', *lines], [], "first line 1")],
    ids=["cut character", "broken middle", "no object", "empty", "missing", "no step", "null step"])
def test_damaged_logs_are_mended(halfway, capsys, name, damage, lost, note):
    words, half = halfway()
    log = half / name
    lines = log.read_bytes().split(b"\n")
    log.unlink() if damage is None else log.write_bytes(b"\n".join(damage(lines)))
    capsys.readouterr()
    opd.main([*words, str(half)])
    whole = [line for line in log.read_bytes().split(b"\n")[:-1]]
    kept = [line for number, line in enumerate(lines[:-1]) if number not in lost]
    assert whole[:len(kept)] == kept and json.loads(whole[-1])["step"] == 1
    assert len(whole) == len(kept) + (1 if name == "metrics.jsonl" else 2)
    told = capsys.readouterr().out.splitlines()
    notes = [line for line in told if "cannot be read" in line]
    assert bool(notes) == bool(note) and all(f"note: {log}: " in line and note in line for line in notes)
    missing = len({0, 1} & set(lost)) * (name == "metrics.jsonl")       # before the first step, and its own
    assert [line for line in told if "has lost" in line] == [
        f"note: {log} has lost {missing} lines of 2; the report goes without"] * bool(missing)


FOREIGN = {"architecture": dict(student="wide"), "method": dict(method="opsd"),
           "branches": dict(prompts="g"), "optimizer": dict(optimizer="sgd"), "student": dict(student="b")}



@pytest.mark.parametrize("what", FOREIGN)
def test_the_checkpoint_of_another_run_is_refused_in_words(halfway, models, prompts, tmp_path, what):
    words, half = halfway()
    flags = dict(FOREIGN[what])
    if "student" in flags:
        flags["student"] = models / flags["student"]
    if "prompts" in flags:
        flags |= dict(prompts=[f"g={prompts('g')}"], teachers=[f"g={models / 'wide'}"])
    _, other = halfway(**flags, out=tmp_path / "other")
    shutil.rmtree(half / "checkpoint")
    shutil.copytree(other / "checkpoint", half / "checkpoint")
    message = said([*words, str(half)])
    assert str(half / "checkpoint") in message and "another" in message


# ---- signals -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_the_step_with_a_checkpoint_from_which_the_run_ends_as_it_would(argv, tmp_path, number):
    words = argv(out=tmp_path / "out", lr=1e-3, steps=40, save_every=0)
    with Fork(tmp_path / "log", program, words) as run:
        run.until(lambda: (tmp_path / "out" / "samples.jsonl").exists()).send(number)
        assert run.end() == 1 and "Traceback" not in run.said
    done = steps(tmp_path / "out")[-1] + 1
    assert done < 40 and run.said.splitlines()[-1] == (
        f"opd.py: interrupted after step {done}; with --resume the same command continues at the checkpoint in "
        f"{tmp_path / 'out'}, step {done}")
    opd.main([*words, "--resume"])
    opd.main(argv(out=tmp_path / "undisturbed", lr=1e-3, steps=40, save_every=0))
    assert left_by(tmp_path / "out") == left_by(tmp_path / "undisturbed")


def asleep(words, marker, module, name, calls):
    """Run opd.py with a function that, after so many calls, makes the marker and waits until it is gone."""
    module = importlib.import_module(module)
    function, seen = getattr(module, name), []

    def sleeping(*args, **how):
        seen.append(1)
        if len(seen) > calls:
            Path(marker).touch()
            while Path(marker).exists():
                time.sleep(0.01)
        return function(*args, **how)
    setattr(module, name, sleeping)
    program(words)


def test_a_second_signal_stops_at_once(argv, tmp_path):
    words, marker = argv(out=tmp_path / "out", steps=9, save_every=1), tmp_path / "marker"
    with Fork(tmp_path / "log", asleep, words, marker, "sampler", "sample", 3) as run:
        run.until(marker.exists).send(signal.SIGTERM)
        run.until(lambda: "stopping after this step, with a checkpoint; once more stops at once" in run.said)
        assert run.end(0.5) is None
        run.send(signal.SIGINT)
        assert run.end(10) == 1 and "Traceback" not in run.said
    assert "opd.py: interrupted after step 2; with --resume" in run.said.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("module, name", [("data.prompts", "load_prompts"), ("models", "check_sampler")])
def test_a_signal_before_the_first_step_is_a_line(argv, tmp_path, number, module, name):
    words, marker = argv(out=tmp_path / "out"), tmp_path / "marker"
    with Fork(tmp_path / "log", asleep, words, marker, module, name, 0) as run:
        run.until(marker.exists).send(number)
        assert run.end(10) == 1
    lines = [line for line in run.said.splitlines() if not line.startswith(("check, ", "note: "))]
    assert len(lines) == 1 and lines[0].startswith("opd.py: interrupted ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_libraries_are_imported_is_a_line(tmp_path, number):
    (tmp_path / "torch.py").write_text("import pathlib, time; pathlib.Path(__file__ + '.read').touch(); time.sleep(60)")
    run = subprocess.Popen([sys.executable, "opd.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})
    while not (tmp_path / "torch.py.read").exists():
        time.sleep(0.01)
    run.send_signal(number)
    assert run.communicate(timeout=10)[1] == "opd.py: interrupted before the first step\n" and run.returncode == 1


# ---- recipes -----------------------------------------------------------------------------------------------

def run_recipe(out, student, prompts):
    """Run a recipe of one row."""
    flags = dict(student=str(student), method="sft", prompts=[str(prompts)], steps=60, batch=4, device="cpu",
                 lr=1e-3, max_new_tokens=4, eval_prompts=[f"e={prompts}"])
    recipes.RECIPES["small"] = dataclasses.replace(
        recipes.RECIPES["small"], prepare=["this"], common={}, rows={"sft": flags}, columns={"e": "e"},
        axes={"e": ("e",), "same": ("e",)}, references=(), expected={}, quick={"": {}}, quick_prepare=[])
    recipes.main(["small", "--quick", "--out", str(out)])


def test_a_recipe_and_its_row_stop_at_a_signal_and_the_same_command_ends_both(models, prompts, tmp_path):
    row, command = tmp_path / "r" / "seed0" / "sft", (run_recipe, tmp_path / "r", models / "a", prompts())
    with Fork(tmp_path / "log", *command) as first:
        first.until(lambda: (row / "samples.jsonl").exists()).send(signal.SIGTERM)
        assert first.end(20) == 1
    assert "lab.recipes: interrupted; the same command again continues where it was" in first.said
    own(row).close()                                    # nobody has it any more
    assert "interrupted after step" in first.said and (row / "checkpoint").exists() and len(steps(row)) < 60
    with Fork(tmp_path / "log", *command) as again:
        assert again.end() == 0, again.said
    assert steps(row) == [-1, *range(60)] and (row / "report.md").exists()


def test_a_row_that_has_everything_but_its_report_is_run_again(tmp_path, monkeypatch):
    recipe, rows = recipes.RECIPES["small"], []
    monkeypatch.setattr(recipes, "run_child", lambda command, row, *rest: rows.append(row))
    monkeypatch.setattr(recipes.tables, "read_finished", lambda folder: None)
    (tmp_path / "prepared").write_text("quick")
    for row in recipe.rows:
        (tmp_path / row / "final").mkdir(parents=True)
        if row not in ("sft", "mopd"):
            (tmp_path / row / "report.md").touch()
    recipes.run_seed(recipe, tmp_path, 0, "quick", 1, threading.Event())
    assert rows == ["sft", "mopd"]


def test_a_run_that_has_everything_but_its_report_writes_it(argv, tmp_path, monkeypatch):
    words = argv(out=tmp_path / "out", resume=True)
    opd.main(words)
    before = left_by(tmp_path / "out")
    assert not (tmp_path / "out" / "report.md").exists()
    monkeypatch.undo()                                  # which gives opd its reports back
    opd.main(words)
    assert (tmp_path / "out" / "report.md").exists()
    assert {name: left_by(tmp_path / "out")[name] for name in before if name != "other files"} == {
        name: before[name] for name in before if name != "other files"}


# ---- what must not depend on the day or on the process -----------------------------------------------------


def test_a_template_that_reads_the_clock_sees_the_day_on_which_the_run_began(start, models, tmp_path, monkeypatch):
    folder = shutil.copytree(models / "a", tmp_path / "a")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %B') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    clock = time.strftime
    seen = []
    for day, flags in (("2026-02-03", {}), ("2027-11-12", dict(resume=True, steps=3)), ("2027-11-12", dict(out="new"))):
        monkeypatch.setattr(time, "strftime", lambda form, *at: day if form == "%Y-%m-%d" else clock(form, *at))
        run = start(**dict(student=folder, teachers=[folder], out=tmp_path / "out", save_every=1) | flags)
        seen.append(run.student.decode(torch.tensor(run.student.encode("rev abc>"))))
        assert run.teacher.encode("a") == run.student.encode("a")
        opd.train(run) if "out" not in flags else None
    assert seen == ["03 Februaryrev abc>"] * 2 + ["12 Novemberrev abc>"]


def test_an_adapter_is_the_same_in_every_process_and_finds_its_model_from_everywhere(argv, models, monkeypatch):
    pytest.importorskip("peft", reason="optional: pip install peft")
    monkeypatch.chdir(models)
    run = opd.Run(opd.configure(argv(student="a", lora_rank=2, steps=1)))
    opd.train(run)
    for folder in ("checkpoint", "adapter"):
        saved = json.loads((run.out / folder / "adapter_config.json").read_text())
        assert saved["target_modules"] == sorted(saved["target_modules"]) and len(saved["target_modules"]) > 3
        assert saved["base_model_name_or_path"] == str(models / "a")
