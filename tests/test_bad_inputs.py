"""Bad input, in one table: whatever a user gets wrong ends in one line, soon, and leaves the disk as it was.

A row is an input, and words of the sentence that answers it. An input is a command line, flags that differ
from those of a run that works, or a function that makes files and returns either.
"""
import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from test_config import EVERY_FLAG, another, users, words
from transformers import (BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel, GPT2Config,
                          GPT2LMHeadModel,
                          T5Config, T5ForConditionalGeneration)

import models as loading
import opd
from config import OneOf, PerBranch, Ratio, json_object
from data import convert, small_world
from data.files import checksums
from data.scratch import CHATML
from lab import compare, recipes

SECONDS = 20                            # more would be a hang
LONGEST = 1000                          # characters of a line that anybody reads
ME = {"role": "user", "content": "rev abc>"}
GOOD = {"prompt": "rev abc>", "answer": "cba", "solution": "cba"}
NAN, INF = float("nan"), float("inf")


class Began(BaseException):
    """The weights would be read now, or a recipe's first row would run."""


class TooLong(BaseException):
    """A row has taken SECONDS."""


class Asked(BaseException):
    """The program asks a question on the terminal."""


# ---- where a row's files are made --------------------------------------------------------------------------

@dataclass
class World:
    """A folder for a row's files, and the models from which it makes worse ones."""
    root: Path
    models: Path
    argv: object
    finished: object                                            # () -> the folder of a finished run
    others: list = field(default_factory=list)                  # processes that end with the row

    def file(self, name, content=""):
        """Write a file: text, bytes, or rows as JSON lines."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (list, dict)):
            rows = content if isinstance(content, list) else [content]
            content = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def folder(self, name, *files):
        """Make a folder with empty files in it."""
        (self.root / name).mkdir()
        for file in files:
            (self.root / name / file).touch()
        return self.root / name

    def link(self, name, target):
        """Make a symbolic link."""
        (self.root / name).symlink_to(target)
        return self.root / name

    def model(self, edit=None, template=None, **config):
        """A copy of a tiny model: edit(folder) changes its files, `config` its config.json."""
        folder = self.root / f"model{len(list(self.root.iterdir()))}"
        shutil.copytree(self.models / "a", folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        change(folder / "config.json", config)
        if edit:
            edit(folder)
        return folder

    def weights(self, edit, base="a"):
        """A copy of a tiny model whose weights edit({name: tensor}) has changed."""
        folder = self.root / f"model{len(list(self.root.iterdir()))}"
        shutil.copytree(self.models / base, folder)
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def run(self, edit=None, **flags):
        """Flags that continue a copy of a finished run, which edit(folder) has changed."""
        folder = self.root / "out"
        shutil.copytree(self.finished(), folder)
        if edit:
            edit(folder)
        return dict(out=folder, resume=True) | flags


def change(path, values):
    """Change values of a JSON file; None takes one out."""
    found = json.loads(path.read_text()) | values
    out = {name: value for name, value in found.items() if name not in values or value is not None}
    path.write_text(json.dumps(out))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, models):
    """() -> the folder of a run of two steps, which is made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("finished"), []

    def make():
        if not made:
            rows = root / "words.jsonl"
            rows.write_text(json.dumps(GOOD) + "\n")
            line = dict(student=models / "a", teachers=models / "wide", prompts=rows, steps=2, batch=1,
                        device="cpu", max_new_tokens=2, out=root / "out")
            opd.main([word for flag, value in line.items() for word in (f"--{flag}", str(value))])
            made.append(root / "out")
        return made[0]
    return make


@pytest.fixture
def world(tmp_path, models, argv, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)                                 # where runs/ would be
    made = World(tmp_path, models, argv, finished)
    yield made
    for process in made.others:
        process.communicate()                                   # it ends when its stdin does


# ---- what a row does ---------------------------------------------------------------------------------------

@dataclass
class Row:
    """An input, and what is expected of the program."""
    make: object
    words: tuple
    reads: bool = False                 # the weights, without which nobody could know
    dry: bool = True                    # --dry_run sees it, too, if it takes no weights
    writes: bool = False                # the run has begun, so it may write in its own --out
    main: object = opd.main
    program: str = "opd.py"
    status: int = 1


def snapshot(root, without=None):
    """Names, sizes and times of all files in a folder but locks and caches, and the names of its folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        beside = without and (path == without or without in path.parents)
        if path.name == ".lock" or "__pycache__" in path.parts or beside:
            continue
        stat = path.lstat()
        found[path] = None if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


@dataclass
class Outcome:
    """What came of a row."""
    message: str = ""
    status: object = None
    seconds: float = 0.0
    error: object = None                # what was raised instead of SystemExit
    changed: list = field(default_factory=list)


def command(row, world):
    """Make a row's files, and return its command line."""
    made = row.make(world) if callable(row.make) else row.make
    return [os.fspath(word) for word in (made if isinstance(made, list) else world.argv(**made))]


def outcome(row, line, world, monkeypatch, capsys):
    """Run a row's command line, and return its Outcome."""
    def began(*args, **kwargs):
        raise Began

    def late(number, frame):
        raise TooLong

    def asked(*args, **kwargs):
        raise Asked
    if not row.reads:
        for name in ("read_net", "fake_net"):
            monkeypatch.setattr(loading, name, began)
    monkeypatch.setattr(recipes, "run_seed", began)
    monkeypatch.setattr(builtins, "input", asked)
    out = Path(line[line.index("--out") + 1]) if row.writes else None
    before, found, started = snapshot(world.root, out), Outcome(), time.monotonic()
    capsys.readouterr()
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        row.main(line)
    except SystemExit as stop:
        found.message, found.status = (stop.code, 1) if isinstance(stop.code, str) else ("", stop.code)
    except BaseException as error:
        found.error = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    found.seconds = time.monotonic() - started
    printed = capsys.readouterr()
    if found.status and not found.message:                      # argparse prints it
        found.message = printed.err.rstrip("\n")
    after = snapshot(world.root, out)
    found.changed = [path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path,
    0)]
    return found


def row(name, make, *words, **more):
    """A row of the table, under its name."""
    marks = more.pop("marks", ())
    return pytest.param(Row(make, words, **more), id=name, marks=marks)


# ---- flags -------------------------------------------------------------------------------------------------

def only(world, *words):
    """A command line that only evaluates a tiny model."""
    line = ["--student", world.models / "a", "--device", "cpu", "--max_new_tokens", "2", "--eval_only",
            *words]
    return list(map(str, line))


def one_flag_rows():
    """Rows of every flag: a value of a wrong type, one that is out of range, none at all, and two."""
    for name, flag in EVERY_FLAG.items():
        if flag.type is bool:
            yield row(f"--{name}=yes", [*words(users(name)[0]), f"--{name}=yes"], f"--{name}", "'yes'")
            continue
        kind, two = flag.type, flag.words == 2

        def line(value, name=name, two=two):
            return words(users(name)[0], **{name: [value, value] if two else value})
        if isinstance(kind, (OneOf, PerBranch, Ratio)) or kind is json_object or kind.__name__ in ("int",
        "float"):
            bad = "{" if kind is json_object else "x"
            yield row(f"--{name} {bad}", line(bad), f"--{name}", bad)
        if getattr(kind, "__name__", "") in ("int", "float"):
            for value in ("-1", "1e400", "nan", "1e9"):
                try:
                    kind(value)
                except ArgumentTypeError:
                    yield row(f"--{name} {value}", line(value), f"--{name}", value)
                except ValueError:
                    continue
        # argparse counts the words before it asks for their type
        yield row(f"--{name} without a value", [*words(users(name)[0]), f"--{name}"], f"--{name}", "expected")
        values = another(flag) or "1"
        again = [f"--{name}", *(values if two else [values])]
        given = f"--{name}" in words(users(name)[0])
        yield row(f"--{name} twice", [*words(users(name)[0]), *again, *([] if given else again)],
                  f"--{name} is given twice")


ONLY = ["--student", "a", "--device", "cpu", "--eval_only"]
SAMPLES = "has no effect without a --method that samples"
LINES = [                                                       # no file of these has to exist
    row("nothing", [], "--student is missing", "--help"),
    row("no prompts", ["--student", "a"], "--prompts is missing"),
    row("an evaluation without prompts", ONLY, "--eval_prompts is missing"),
    row("an evaluation with training prompts", [*ONLY, "--eval_prompts", "e", "--prompts", "p"],
        "--prompts has no effect with --eval_only"),
    row("an evaluation with a teacher", [*ONLY, "--eval_prompts", "e", "--teachers", "t"],
        "--teachers has no effect with --eval_only"),
    row("an evaluation with steps", [*ONLY, "--eval_prompts", "e", "--steps", "5"],
        "--steps has no effect with --eval_only"),
    row("an evaluation of two students", [*ONLY, "--eval_prompts", "e", "--student", "a", "b"],
        "--student is given twice"),
    row("an evaluation of prompts that are not there", [*ONLY, "--eval_prompts", "e"], "no prompt file e"),
    row("an evaluation of a set that cannot be reached", [*ONLY, "--eval_prompts", "google/IFEval"],
        "cannot load google/IFEval"),
    row("an evaluation of a set with a slip", [*ONLY, "--eval_prompts", "google/IFevall"],
        "no prompt file google/IFevall", "google/IFEval"),
    row("an evaluation without answers", lambda w: only(w, "--eval_prompts", w.file("e.jsonl", {
        "prompt": "a"})), 'e.jsonl:1: no "answer", so it cannot be evaluated'),
    row("an evaluation of no instructions", lambda w: only(w, "--eval_prompts", w.file("e.jsonl", dict(
        GOOD, grader="ifeval"))), "e.jsonl:1: grader 'ifeval' needs "),
    row("an evaluation in a training's folder", lambda w: only(w, "--eval_prompts", w.file("e.jsonl", GOOD),
        "--resume", "--out", w.run()["out"]), "--resume with another", "would be another experiment"),
    row("no value", ["--student", "--prompts", "p"], "--student: expected at least one argument"),
    row("two students", words(student=["a", "b"]), "--method opd has one student", "opcod"),
    row("opcod with one student", words("opcod", student="a"), "needs two students", "got 1"),
    row("opcod with three students", words("opcod", student=["a", "b", "c"]), "needs two students", "got 3"),
    row("opcod with one branch", words("opcod", prompts="p", val_prompts="p"),
        "needs two branches of prompts"),
    row("opcod validates another branch", words("opcod", val_prompts=["physics=v", "lew=v"]),
        "needs validation prompts for every branch", "has: physics, lew"),
    row("a flag that is not there", [*words(), "--bacth", "4"],
        "unknown flag --bacth; did you mean --batch?"),
    row("an abbreviation", [*words(), "--max_new_token", "4"], "unknown flag --max_new_token; did you mean"),
    row("another abbreviation", [*words(), "--temp=1"], "unknown flag --temp=1"),
    row("hyphens for underscores", [*words(), "--max-new-tokens", "4"], "did you mean --max_new_tokens?"),
    row("one hyphen", [*words(), "-batch", "4"], "unknown flag -batch; did you mean --batch?"),
    row("capitals", [*words(), "--Batch", "4"], "did you mean --batch?"),
    row("a dash of typography", ["--student", "a", "--prompts", "p", "--seed", "4", "\u2014lr", "1"],
        "unknown word \u2014lr"),
    row("a word too much", ["--steps", "4", "5"], "unknown word 5"),
    row("--help=x", [*words(), "--help=x"], "unknown flag --help=x"),
    row("a key=value line", ["student=a", "prompts=p"], "unknown word student=a"),
    row("a control character", [*words(), "--ba\x1b[2Jtch"], "unknown flag"),
    row("--method unknown", ["--student", "a", "--prompts", "p", "--method", "campod"],
        "'campod' is unknown; did you mean camopd? there are: sft, "),
    row("--method empty", ["--student", "a", "--prompts", "p", "--method", ""],
        "--method '' is unknown; there are:"),
    row("--loss unknown", words(loss="jds"), "did you mean jsd? there are: nll, pg, "),
    row("--loss of another method", words("sft", loss="rkl"),
        "--method sft cannot use --loss rkl; it can use: nll"),
    row("--support unknown", words(support="student_tial"), "did you mean student_tail? there are: full, "),
    row("--support without top_k", words(loss="rkl", support="student_sg"), "needs a top_k"),
    row("--support of akl", words(loss="akl", support="student_sg", top_k=5),
        "akl needs the full vocabulary"),
    row("--entry_clip of akl", words(loss="akl", entry_clip=0.1), "--entry_clip has no effect without"),
    row("--entry_clip of pg", words("mopd", loss="pg", entry_clip=0.1),
        "no effect without a divergence other"),
    row("--entry_clip below 0", words(loss="fkl", entry_clip=-1), "--entry_clip", "-1", "at least 0"),
    row("--top_k alone", words(top_k=5), "--top_k has no effect without a --support"),
    row("--target with pg", words("mopd", loss="pg", target="veto"),
        "--target has no effect without a divergence"),
    row("--veto_beta alone", words(veto_beta=0.3), "no effect without --target veto"),
    row("--taid_start above 1", words(target="taid", taid_start=1.5), "1.5 is not at least 0 and at most 1"),
    row("--jsd_beta 1", words(loss="jsd", jsd_beta=1), "jsd cannot use jsd_beta 1.0", "use fkl or rkl"),
    row("--skew_alpha 0", words(loss="skew_fkl", skew_alpha=0), "skew_fkl cannot use skew_alpha 0.0"),
    row("--todi_beta 1e5", words(loss="todi", todi_beta=1e5), "todi cannot use todi_beta"),
    row("--akl_mu -1", words(loss="akl", akl_mu=-1), "akl cannot use akl_mu -1.0"),
    row("--power_lambda -1", words(loss="power", power_lambda=-1), "power cannot use power_lambda -1.0"),
    row("--alpha_beta 1 -1", words(loss="alpha_beta", alpha_beta=[1, -1]), "A + B above 0"),
    row("--alpha_beta with one number", words(loss="alpha_beta", alpha_beta=[1]),
        "--alpha_beta: expected 2 arguments"),
    row("--importance outside 1", words(loss="pg", importance=[2, 3]), "LOW must be below HIGH, and 1, "),
    row("--importance without pg", words(importance=[0.25, 4]),
        "--importance has no effect without --loss pg"),
    row("--batch 10**9", words(batch=10**9), "--batch: 1000000000 is not at least 1 and at most 1048576"),
    row("--batch 10**30", words(batch=10**30), "is not at least 1 and at most 1048576"),
    row("--rollouts 10**9", words(rollouts=10**9), "--rollouts: 1000000000 is not at least 1 and at most"),
    row("batch times rollouts", words(batch=2000, rollouts=1000),
        "is 2,000,000 completions per step; at most"),
    row("--lora_rank 10**7", words(lora_rank=10**7), "--lora_rank: 10000000 is not at least 0 and at most"),
    row("--teacher_rank 10**7", words("okd", teacher_rank=10**7),
        "--teacher_rank: 10000000 is not at least 0 and at"),
    row("--steps 10**30", words(steps=10**30), f"--steps: {10**30} is not at least 1 and at"),
    row("--diagnose_rollouts 10**9", words(diagnose_every=1, diagnose_rollouts=10**9), "--diagnose_rollouts:",
        "at most"),
    row("--eval_rollouts 10**9", words(eval_prompts="e", eval_temperature=1, eval_rollouts=10**9),
        "--eval_rollouts:"),
    row("a number of 400 digits", words(batch="9" * 400), "--batch"),
    row("a number of 5000 digits", words(batch="9" * 5000), "--batch"),
    row("--lr of 5000 digits", words(lr="9" * 5000), "--lr", "is not"),
    row("--batch 1e3", words(batch="1e3"), "--batch: invalid int value: '1e3'"),
    row("--lr 1e30", words(lr="1e30"), "--lr: 1e30 is not above 0 and at most 1000"),
    row("--lr 0", words(lr=0), "--lr: 0 is not above 0"),
    row("--lr 1e-400", words(lr="1e-400"), "--lr: 1e-400 is not above 0"),
    row("--lr -1e-3", words(lr="-1e-3"), "--lr: -1e-3 is not above 0"),
    row("--lr 1,5", words(lr="1,5"), "--lr: invalid float value: '1,5'"),
    row("--temperature 1e-45", words(temperature="1e-45"), "--temperature: 1e-45 is not at least 0.01"),
    row("--temperature 0", words(temperature=0), "--temperature: 0 is not at least 0.01"),
    row("--loss_temperature 1e-300", words(loss_temperature="1e-300"),
        "--loss_temperature: 1e-300 is not at least"),
    row("--eval_temperature 1e-45", words(eval_prompts="e", eval_temperature="1e-45"),
        "--eval_temperature: 1e-45 is"),
    row("--weight_decay 1e30", words(weight_decay="1e30"),
        "--weight_decay: 1e30 is not between"),
    row("--adam_beta2 1", words(adam_beta2=1), "--adam_beta2: 1 is not at least 0 and at most 0.999999"),
    row("--adam_beta2 with sgd", words(optimizer="sgd", adam_beta2=0.9),
        "--adam_beta2 has no effect without"),
    row("--lora_alpha alone", words(lora_alpha=8), "--lora_alpha has no effect without --lora_rank"),
    row("--top_p 0", words(top_p=0), "--top_p: 0 is not above 0 and at most 1"),
    row("--top_p 1.01", words(top_p=1.01), "--top_p: 1.01 is not above 0 and at most 1"),
    row("--temperature with sft", words("sft", temperature=0.5), f"--temperature {SAMPLES}"),
    row("--max_new_tokens with sft", words("sft", max_new_tokens=5), "--max_new_tokens has no effect"),
    row("--drop_cut with kd", words("kd", drop_cut=True), f"--drop_cut {SAMPLES}"),
    row("--eval_every alone", words(eval_every=5), "--eval_every has no effect without --eval_prompts"),
    row("--rollouts with sft", words("sft", rollouts=2),
        "--rollouts has no effect on --method sft; it is for: gkd"),
    row("--mixture with camopd", words("camopd", prompts=["a=p", "b=p"], mixture="2:1"),
        "--mixture has no effect"),
    row("--mixture with a zero", words(prompts=["a=p", "b=p"], mixture="1:0"),
        "not a positive whole number for each"),
    row("--mixture for three", words(prompts=["a=p", "b=p"], mixture="1:1:1"),
        "for each of the 2 branches (a, b)"),
    row("--mixture without a prompt", words("mopd", prompts=["a=p", "b=p"], mixture="999:1"),
        "leaves a branch without"),
    row("--schedule 10**9:1", words("camopd", prompts=["a=p", "b=p"], schedule="1000000000:1"),
        "--schedule 1000000000"),
    row("--schedule of signs", words("camopd", prompts=["a=p", "b=p"], schedule="+3:1"),
        "--schedule +3:1 is not a"),
    row("--mass of no branch", words("camopd", mass="foo=1"), "--mass names foo, but the branches are: main"),
    row("--mass above 1", words("camopd", mass="1.5"), "--mass 1.5 is not at least 0 and at most 1"),
    row("--scale 0", words("camopd", scale="0"), "--scale 0 for every branch trains nothing"),
    row("--mass with a NUL", words("camopd", mass="x\0"), "--mass", "is not a number"),
    row("--rounds that do not divide", words("opcod", rounds=3),
        "--steps 100 is not a multiple of --rounds 3"),
    row("--ema_rate of a frozen one", words("opsd", ema_rate=0.1),
        "--ema_rate has no effect without --self_teacher"),
    row("--self_teacher ema of dpo", words("dpo", self_teacher="ema"), "its reference must not move"),
    row("--self_teacher snapshot of sdpo", words("sdpo", self_teacher="snapshot"),
        "for methods that renew it: dpo"),
    row("--ipo and --dpo_smoothing", words("dpo", ipo=True, dpo_smoothing=0.1), "no effect with --ipo"),
    row("--dpo_smoothing 0.6", words("dpo", dpo_smoothing=0.6), "0.6 is not at least 0 and at most 0.5"),
    *[row(f"--{name} {value}", words(method, **flags, **{name: value}), f"--{name}", value, "is not")
      for method, flags, name, value in (
        ("dpo", dict(ipo=True), "dpo_beta", "1e-300"), ("dpo", {}, "dpo_beta", "1e300"),
        ("kd", {}, "ce_weight", "1e300"), ("opd", dict(target="veto"), "veto_beta", "1e300"),
        ("okd", {}, "teacher_pull", "1e300"), ("okd", {}, "teacher_lr_factor", "1e300"),
        ("camopd", {}, "scale", "1e300"), ("opd", dict(lora_rank=2), "lora_alpha", "1e300"),
        ("compact", {}, "weight_temperature", "1e-310"), ("opd", {}, "grad_clip", "1e-300"))],
    row("--clusters and a field", words("sai_dpo", cluster_field="t", clusters=3),
        "no effect with --cluster_field"),
    row("--reward_weight with one rollout", words("mopd", reward_weight=0.5),
        "--reward_weight compares the rollouts of a prompt: --rollouts must be at least 2"),
    row("--reward_weight of a divergence", words(loss="rkl", rollouts=2, reward_weight=0.5),
        "--reward_weight has no effect without --loss pg"),
    row("--token_knob alone", words(token_knob=0.5), "--token_knob has no effect without --token_weight"),
    row("--token_knob above 1", words("camopd", token_weight="tip", token_knob=2),
        "--token_knob 2.0: with --token_weight tip it is a share, at most 1"),
    row("--token_weight of kd", words("kd", token_weight="tip"), "no effect on --method kd; it is for: opd,"),
    row("--kl_weight of focus", words("focus", kl_weight=0.1), "it is for: opd, mopd, grpo"),
    row("--advantage_clip 0", words(loss="pg", advantage_clip=0), "--advantage_clip: 0 is not above 0"),
    row("grpo with one rollout", words("grpo", rollouts=1), "--rollouts must be at least 2"),
    row("okd without a teacher to teach", words("okd", teacher_pull=0, ce_weight=0),
        "teach the teacher nothing"),
    # teachers and branches
    row("a teacher for sft", words("sft", teachers="t"), "--teachers has no effect on --method sft"),
    row("no teacher for opd", words("opd", teachers=[]), "needs a teacher for every branch", "has: none"),
    row("a teacher for another branch", words(teachers="x=t"), "(main), but --teachers has: x"),
    row("teachers for one of two branches", words("mopd", prompts=["a=p", "b=p"], teachers=["a=t"]),
        "needs a teacher for every branch of prompts (a, b), but --teachers has: a"),
    row("two teachers for opd", words("opd", prompts=["a=p", "b=p"], teachers=["a=t", "b=u"]),
        "--method opd has one teacher; with several use --method mopd or camopd"),
    row("two teachers without names", words("mopd", prompts=["a=p", "b=p"], teachers=["t", "u"]),
        "several --teachers need names: NAME=t"),
    row("two teachers of a name", words("mopd", teachers=["a=t", "a=u"]), "two --teachers are called a"),
    row("a teacher without a path", words(teachers="main="), "--teachers 'main=' names nothing"),
    row("an empty teacher", words(teachers=""), "--teachers '' names nothing"),
    row("two branches of a name", words(prompts=["a=p", "a=q"]), "two --prompts are called a"),
    row("two files without names", words(prompts=["p", "q"]), "several --prompts need names: NAME=p"),
    row("a branch without a file", words(prompts="a="), "--prompts 'a=' names nothing"),
    row("prompts without a name", words(prompts=""), "--prompts '' names nothing"),
    row("an empty student", words(student=""), "--student '' names nothing"),
    row("a home of nobody", words(student="~nobody-here/x"), "there is no such user's home"),
    # the machine
    row("--device tpu", words(device="tpu"), "--device tpu: choose cpu, cuda or cuda:N"),
    row("--device empty", words(device=""), "--device : choose cpu, cuda or cuda:N"),
    row("--device mps", words(device="mps"), "choose cpu, cuda or cuda:N"),
    row("--device cpu:0", words(device="cpu:0"), "choose cpu, cuda or cuda:N"),
    row("--device cuda:-1", words(device="cuda:-1"), "choose cpu, cuda or cuda:N"),
    row("--device cuda:99", words(device="cuda:99"), "--device cuda:99: torch sees", dry=False),
    row("--device cuda:10**30", words(device=f"cuda:{10**30}"), "torch sees", dry=False),
    row("--teacher_device swap on a CPU", words(teacher_device="swap"),
        "--teacher_device swap needs a --device cuda"),
    row("--dtype float16", words(dtype="float16"), "'float16' is unknown; did you mean bfloat16?"),
    row("--seed 2**41", words(seed=2**41), "--seed: 2199023255552 is not at least 0 and at most"),
    # options of chat templates
    row("kwargs that are no JSON", words(chat_template_kwargs="{enable_thinking: false}"),
        "--chat_template_kwargs",
        "JSON"),
    row("kwargs that are a list", words(chat_template_kwargs="[]"), "is not a JSON object with options"),
    row("kwargs that are null", words(chat_template_kwargs="null"), "is not a JSON object with options"),
    row("kwargs of our own", words(chat_template_kwargs='{"add_generation_prompt": false}'),
        "is not a JSON object"),
    row("kwargs of deep JSON", words(chat_template_kwargs='{"x": ' * 100_000), "--chat_template_kwargs"),
    row("kwargs that are long", words(chat_template_kwargs="x" * 10_000), "--chat_template_kwargs"),
    row("kwargs with a key twice", words(chat_template_kwargs='{"x": 1, "x": 2}'), "--chat_template_kwargs",
        "twice"),
    row("kwargs with NaN", words(chat_template_kwargs='{"x": NaN}'), "--chat_template_kwargs", "NaN"),
    row("teacher's kwargs without one", words("sft", teacher_chat_template_kwargs='{"x": 1}'),
        "no effect without a"),
]


# ---- paths -------------------------------------------------------------------------------------------------

NOT_UTF8 = os.fsdecode(b"caf\xe9")


def taken(world, folder):
    """A folder that another process owns until the row ends."""
    folder.mkdir(exist_ok=True)
    code = ("import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print(os.getpid(), file=file, flush=True); print(flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    world.others.append(process)
    process.stdout.readline()
    return folder


def locked(world):
    """A folder that cannot be written."""
    (world.root / "locked").mkdir(mode=0o555)
    if os.access(world.root / "locked", os.W_OK):
        pytest.skip("this user can write everywhere")
    return world.root / "locked"


def fifo(world, name):
    os.mkfifo(world.root / name)
    return world.root / name


OUT = [
    row("--out a file", lambda w: dict(out=w.file("f")), "--out", "is a file; it must be a folder"),
    row("--out in a file", lambda w: dict(out=w.file("f") / "x" / "y"), "--out",
        "f is a file; it must be a folder"),
    row("--out with other files", lambda w: dict(out=w.folder("mine", "thesis.tex")),
        "holds other files and no run"),
    row("--out a model", lambda w: dict(out=w.model()), "holds other files and no run; choose another --out"),
    row("--out the current folder", lambda w: dict(out="."), "--out . holds other files and no run"),
    row("--out empty", dict(out=""), "--out '' names no folder"),
    row("--out a dangling link", lambda w: dict(out=w.link("link", "nowhere")),
        "is a link to what is not there"),
    row("--out a link to itself", lambda w: dict(out=w.link("loop", "loop")), "--out", "loop"),
    row("--out through a dangling link", lambda w: dict(out=w.link("link", "nowhere") / "x"), "--out",
        "link is a link to what is not there"),
    row("--out with a NUL", dict(out="x\0y"), "--out 'x\\x00y' can be no folder"),
    row("--out of 300 letters", dict(out="x" * 300), "--out 'xxx", "can be no folder: ",
        "File name too long"),
    row("--out of 5000 letters", dict(out="x/" * 2500), "--out 'x/x"),
    row("--out not UTF-8", dict(out=NOT_UTF8), "--out", "can be no folder: 'utf-8'"),
    row("--out that cannot be written", lambda w: dict(out=locked(w)), "locked cannot be written"),
    row("--out in what cannot be written", lambda w: dict(out=locked(w) / "x" / "y"),
        "locked cannot be written"),
    row("--out of nobody", dict(out="~nobody-here/x"), "there is no such user's home"),
]

STUDENT = [
    row("a student that is not there", dict(student="./a/b"),
        "cannot load ./a/b: no such folder, and not a hub id"),
    row("a student with a slip", lambda w: dict(student=w.folder("model", "x").parent / "modle"),
        "did you mean",
        "model?"),
    row("a name of neither", dict(student="nowhere"),
        "cannot load nowhere: no folder of that name, and as a hub id"),
    row("a name with a blank", dict(student="my model"), "cannot load my model", "no folder of that name"),
    row("a URL", dict(student="https://huggingface.co/Qwen/Qwen3-0.6B"),
        "https://huggingface.co/Qwen/Qwen3-0.6B",
        "not a hub id"),
    row("a student that is a file", lambda w: dict(student=w.file("m.safetensors")),
        "m.safetensors is a file; a model"),
    row("a GGUF", lambda w: dict(student=w.file("m.gguf", "GGUF")), "m.gguf is a file; a model is given as"),
    row("a teacher that is a GGUF", lambda w: dict(teachers=w.file("m.gguf", "GGUF")), "m.gguf is a file"),
    row("an empty folder", lambda w: dict(student=w.folder("empty")), "no tokenizer in this folder"),
    row("a run's folder", lambda w: dict(student=w.run()["out"]), "did you mean its final/?"),
    row("a dangling student", lambda w: dict(student=w.link("link", "nowhere")), "cannot load", "link"),
    row("a student with a NUL", dict(student="x\0y"), "x\\x00y"),
    row("a teacher with a NUL", dict(teachers="x\0y"), "x\\x00y"),
    row("a student of 300 letters", dict(student="x" * 300), "cannot load xxx"),
    row("a student not UTF-8", lambda w: dict(student=w.model().rename(w.root / NOT_UTF8)), "cannot load"),
    row("an adapter", lambda w: dict(student=w.folder("adapter", "adapter_config.json")),
        "is an adapter; give a merged"),
    row("an adapter as teacher", lambda w: dict(teachers=w.folder("adapter", "adapter_config.json")),
        "is an adapter"),
    row("no config", lambda w: dict(student=w.model(lambda m: (m / "config.json").unlink())), "cannot load",
        "config.json"),
    row("no tokenizer", lambda w: dict(student=w.model(lambda m: [p.unlink() for p in m.glob("*token*")])),
        "no tokenizer in this folder"),
]


def parquet(world, *rows):
    pyarrow = pytest.importorskip("pyarrow", reason="optional: pip install pyarrow")
    from pyarrow import parquet as files
    files.write_table(pyarrow.Table.from_pylist(list(rows)), world.root / "rows.parquet")
    return world.root / "rows.parquet"


def prompts(name, content, *words, file="rows.jsonl", **more):
    """A row whose prompt file has this content. flags: what else differs."""
    flags = more.pop("flags", {})
    return row(name, lambda w: dict(prompts=[w.file(file, content)]) | flags, file, *words, **more)


SFT, DPO, COMPACT = dict(method="sft"), dict(method="dpo"), dict(method="compact")
ROW = '{"prompt": "rev abc>", %s}'
PAIR = dict(prompt="rev abc>", chosen="cba", rejected="abc")
FILES = [
    row("prompts that are not there", dict(prompts="none.jsonl"), "no prompt file none.jsonl: it is no file"),
    row("prompts that are a folder", lambda w: dict(prompts=w.folder("rows")), "it is a folder, not a file"),
    row("prompts that are a dangling link", lambda w: dict(prompts=w.link("rows", "nowhere")),
        "no prompt file"),
    row("prompts that are a pipe", lambda w: dict(prompts=fifo(w, "pipe")), "no prompt file"),
    row("prompts that are /dev/zero", dict(prompts="/dev/zero"), "no prompt file /dev/zero: it is no file"),
    row("prompts with a NUL", dict(prompts="x\0y"), "no prompt file", "x\\x00y"),
    row("prompts of 300 letters", dict(prompts="x" * 300), "no prompt file xxx"),
    row("a branch with a dot", lambda w: dict(prompts=f"v1.5={w.file('p', GOOD)}"),
        "a name begins with a letter, and has letters"),
    row("a public set with a slip", dict(prompts="openai/gsmk8"), "no prompt file openai/gsmk8",
        "openai/gsm8k"),
    row("no split of that name", dict(prompts="openai/gsm8k:nowhere"), "cannot load openai/gsm8k"),
    row("validation prompts that are not there", dict(method="opcod", val_prompts=["words=x", "more=x"]),
        "no prompt file x"),
    row("evaluation prompts that are not there", dict(eval_prompts="x"), "no prompt file x"),
    prompts("an empty file", "", "has no prompts"),
    prompts("blank lines", "\n \n\t\n", "has no prompts"),
    prompts("an empty list", "[]", "has no prompts", file="rows.json"),
    prompts("only a header", "prompt,answer\n", "has no prompts", file="rows.csv"),
    prompts("gzip", b"\x1f\x8b\x08\x00\x00", "is not UTF-8 text", file="rows.jsonl.gz"),
    prompts("zip", b"PK\x03\x04\xff\xfe", "is not UTF-8 text", file="rows.zip"),
    prompts("UTF-16", json.dumps(GOOD).encode("utf-16"), "is not UTF-8 text"),
    prompts("Latin-1", '{"prompt": "caf\xe9"}'.encode("latin-1"), "is not UTF-8 text"),
    prompts("a broken parquet", b"PAR1", "cannot read ", file="rows.parquet"),
    *[row(f"a parquet with {name}", lambda w, x=x: dict(prompts=parquet(w, dict(GOOD, x=x))), "rows.parquet")
      for name, x in (("a time", datetime(2020, 1, 1)), ("a date", date(2020, 1, 1)), ("bytes", b"a"),
                      ("a decimal", Decimal("1.5")))],
    *[row(f"a parquet with {name}", lambda w, x=x: dict(prompts=parquet(w, dict(GOOD, x=x))),
          "rows.parquet:1: x")
      for name, x in (("an image", {"bytes": b"a", "path": "a.png"}), ("times", [datetime(2020, 1, 1)]))],
    row("a parquet whose answer is a date",
        lambda w: dict(prompts=parquet(w, dict(GOOD, answer=date(2020, 1, 1)))),
        "rows.parquet:1: answer: Object of type date is not"),
    row("a parquet whose answer is NaN", lambda w: dict(prompts=parquet(w, dict(GOOD, answer=NAN))),
        'rows.parquet:1: "answer" is text or a number, not nan'),
    row("a parquet whose prompt is bytes", lambda w: dict(prompts=parquet(w, dict(GOOD, prompt=b"rev abc>"))),
        "rows.parquet:1: prompt: Object of type bytes is not"),
    prompts("an empty parquet", b"", "cannot read ", file="rows.parquet"),
    prompts("a CSV without a name", ",answer\na,b\n", ":1: a row is an object", file="rows.csv"),
    row("evaluation prompts with a blank in their name",
        lambda w: dict(eval_prompts=f"my eval={w.file('p', GOOD)}"),
        "--eval_prompts my eval=", "a name begins with a letter, and has letters"),
    row("two evaluations of a name", dict(eval_prompts=["a=p", "a=p"]), "two --eval_prompts are called a"),
    prompts("more cells than names", "prompt,answer\na,1,2\n", ":1: more cells than the first",
        file="rows.csv"),
    prompts("semicolons", "prompt;answer\na;1\n", ":1: a row is an object", "prompt;answer", file="rows.csv"),
    prompts("a name twice", "prompt,answer,answer\na,1,2\n", "two columns have the same name",
        file="rows.csv"),
    prompts("a quote that never closes", 'prompt,answer\n"rev abc>,1\nrev b>,2\n', "rows.csv: line ",
        "unexpected end of data", file="rows.csv"),
    prompts("a cell of 200,000 letters", f'prompt,answer\n"{"a" * 200_000}",1\n', "positions",
        file="rows.csv"),
    prompts("a CSV that is called .jsonl", "prompt,answer\na,1\n", ":1: not JSON"),
    prompts("an object over several lines", '{\n "prompt": "a"\n}\n', ":1: not JSON"),
    prompts("an object with the rows", '{"data": [{"prompt": "a"}]}', ":1: a row is an object", "data"),
    prompts("two rows on a line", '{"prompt": "a"} {"prompt": "b"}', ":1: not JSON (Extra data"),
    prompts("a comma too much", '{"prompt": "a",}', ":1: not JSON"),
    prompts("single quotes", "{'prompt': 'a'}", ":1: not JSON"),
    prompts("a list that is cut", '[{"prompt": "a"},\n{"prompt": "b"', "not JSON", file="rows.json"),
    prompts("a list of texts", '["a", "b"]', ":1: a row is an object", file="rows.json"),
    prompts("a raw tab", '{"prompt": "a\tb"}', ":1: not JSON (Invalid control character"),
    prompts("deep lists", "[" * 100_000, "not JSON"),
    prompts("deep objects", '{"prompt": ' * 100_000, ":1: not JSON"),
    prompts("deep and closed", ROW % f'"x": {"[" * 3000}{"]" * 3000}', ":1: "),
    prompts("a key twice", ROW % '"answer": "a", "answer": "b"', ":1: not JSON (a key stands twice"),
    prompts("a number of 5000 digits", ROW % f'"answer": {"1" * 5000}', ":1: not JSON"),
    prompts("a row of another branch", dict(GOOD, branch="domain"), ":1: this row is of branch 'domain'"),
    prompts("a branch that is a number", dict(GOOD, branch=5), ":1: this row is of branch 5"),
]
USER = "the last message is of role"
ROWS = [
    prompts("no prompt", {"text": "a"}, ":1: a row is an object with a non-empty", "text"),
    prompts("nothing at all", {}, ":1: a row is an object"),
    prompts("null", "null", ":1: a row is an object", "None"),
    prompts("a number", "5", ":1: a row is an object", "5"),
    *[prompts(f"prompt {value!r}", {"prompt": value}, ":1: a row is an object with a non-empty")
      for value in ("", None, [], {}, 0, False)],
    *[prompts(f"prompt {value!r}", {"prompt": value}, ':1: "prompt" is text or a list of')
      for value in (5, True, 1.5, ["a"], [["a"]], {"role": "user", "content": "a"}, [{"role": "user"}],
                    [{"role": 5, "content": "a"}], [{"role": "user", "content": None}], [None],
                    [{"role": "user", "content": [{"type": "text", "text": "a"}]}])],
    prompts("a blank prompt", {"prompt": " \n\t"}, ":1: the user says nothing"),
    prompts("a prompt of blanks of Unicode", {"prompt": "\u3000\u00a0"}, ":1: the user says nothing"),
    prompts("the last line is bad", [GOOD, GOOD, {"prompt": ""}], ":3: a row is an object"),
    prompts("messages without a template", {"prompt": [ME]}, ":1: ",
        "has no chat template, but the prompt is a list"),
    prompts("messages that are text", {"messages": "a"}, ":1: a row is an object with a non-empty"),
    prompts("messages that are texts", {"messages": ["a"]}, ":1: a row is an object with a non-empty"),
    prompts("messages without the user", {"messages": [{"role": "assistant", "content": "b"}]},
        ":1: a row is an object"),
    prompts("conversations from a list", {"conversations": [{"from": ["human"], "value": "a"}]}, ":1: "),
    prompts("conversations without a value", {"conversations": [{"from": "human"}]},
        ':1: "prompt" is text or a list'),
    prompts("an instruction that is a list", {"instruction": ["rev", "abc>"]}, ':1: "prompt" is text'),
    prompts("an instruction that is a number", {"instruction": 5}, ':1: "prompt" is text'),
    prompts("an input that is an object", {"instruction": "rev", "input": {"a": 1}}, ":1: ", "input"),
    prompts("a question that is a number", {"question": 5}, ':1: "prompt" is text or a list'),
    *[prompts(f"answer {value!r}", dict(GOOD, answer=value), ':1: "answer" is text or a number')
      for value in (None, True, ["b"], {"a": 1})],
    *[prompts(f"answer {text}", ROW % f'"answer": {text}', ":1: ", said) for text, said in (
        ("NaN", "NaN is no number of JSON"), ("-Infinity", "-Infinity is no number of JSON"),
        ("1e999", '"answer" is text or a number, not inf'))],
    *[prompts(f"half a surrogate pair in {field}", f'{{"prompt": "rev abc>", "{field}": "a\\ud83d"}}',
              ":1: it has half of a surrogate pair") for field in ("answer", "solution", "x", "grader")],
    prompts("half a surrogate pair in the prompt", r'{"prompt": "rev \ud83d"}',
        ":1: it has half of a surrogate pair"),
    prompts("half a surrogate pair in a key", r'{"prompt": "rev", "a\ud83d": 1}',
        ":1: it has half of a surrogate pair"),
    *[prompts(f"{slip} for {right}", dict(GOOD, **{slip: "x"}),
        f'the field "{slip}" is unknown; did you mean "{right}"')
      for slip, right in (("branhc", "branch"), ("gradre", "grader"), ("choosen", "chosen"))],
    prompts("anwser", {"prompt": "a", "anwser": "b"},
        'the field "anwser" is unknown; did you mean "answer"?'),
    prompts("Solution", {"prompt": "a", "Solution": "b"},
        'the field "Solution" is unknown; did you mean "solution"?'),
    prompts("sft without a solution", {"prompt": "a"}, ':1: no "solution", which --method sft learns from',
        flags=SFT),
    *[prompts(f"solution {value!r}", dict(GOOD, solution=value),
        ':1: "solution", which --method sft learns from, is text',
              flags=SFT) for value in (5, None, ["a"], {"a": 1}, True)],
    prompts("an empty solution", dict(GOOD, solution=""), ':1: "solution" is blank', flags=SFT),
    prompts("grpo without an answer", {"prompt": "a"},
        ':1: no "answer", which --method grpo needs for its rewards',
            flags=dict(method="grpo")),
    prompts("chosen that is a number", dict(PAIR, chosen=5),
        ':1: "chosen", which --method dpo learns from, is text',
            flags=DPO),
    prompts("chosen without rejected", dict(prompt="a", chosen="b"), ':1: no "rejected" or "answer"',
        flags=DPO),
    prompts("chosen that is rejected", dict(PAIR, chosen="abc"),
        ":1: its chosen and rejected texts are the same",
            flags=DPO),
    prompts("no pair and one rollout", GOOD,
        ":1: a prompt without chosen and rejected texts needs --rollouts",
            flags=DPO | dict(rollouts=1)),
    prompts("a blank solution of opsd", dict(GOOD, solution=" "), ':1: "solution" is blank',
            flags=dict(method="opsd")),
    prompts("rationales that are a list", dict(GOOD, rationales=["a"]), ':1: "rationales" is an object',
        flags=COMPACT),
    prompts("rationales that are numbers", dict(GOOD, rationales={"x": 5}), ':1: "rationales" is an object',
            flags=COMPACT),
    prompts("a rationale of a teacher", dict(GOOD, rationales={"b": "x"}),
        ":1: a teacher has the name of one of",
            flags=COMPACT),
    prompts("one teacher for compact", GOOD, ":1: compact weighs the rationales of at least two teachers",
            flags=COMPACT | dict(teachers=[])),
    prompts("no cluster", GOOD, ':1: no "topic", which --cluster_field topic names',
            flags=dict(method="sai_dpo", cluster_field="topic")),
    prompts("a letter that is none", dict(GOOD, grader="final_letter", answer="AB"),
        ":1: grader 'final_letter' needs an"),
    prompts("a number that is none", dict(GOOD, grader="number", answer="none"),
        ":1: grader 'number' needs an answer"),
    prompts("an answer of 4000 digits", ROW % f'"grader": "number", "answer": {"7" * 4000}',
        ":1: grader 'number'"),
    prompts("an answer that is thought", dict(GOOD, answer="<think>5"),
        ":1: the grader exact calls no completion"),
    prompts("no room", {"prompt": "a" * 130}, ":1: prompt and completion can have", "128 positions"),
    prompts("no room for the solution", dict(GOOD, solution="a" * 130), "128 positions", flags=SFT),
    prompts("a prompt of 100,000 letters", {"prompt": "a" * 100_000}, "128 positions"),
    prompts("no row is left", [{"prompt": "a" * 130}] * 3, "--drop_long leaves no row of it",
        flags=dict(drop_long=True)),
    prompts("letters that nobody knows", {"prompt": "\u65e5\u672c"}, ":1: ", "is unknown to the tokenizer"),
    row("an evaluation row without an answer", lambda w: dict(eval_prompts=w.file("e.jsonl",
        {"prompt": "a"})),
        'e.jsonl:1: no "answer", so it cannot be evaluated'),
    row("a validation row without an answer", lambda w: dict(
        method="opcod", val_prompts=[f"{b}={w.file('v.jsonl', {'prompt': 'a'})}" for b in ("words", "more")]),
        'v.jsonl:1: no "answer"'),
]


# ---- graders -----------------------------------------------------------------------------------------------

def grader(name, code, *words, function="grade", **more):
    """A row whose grader is a function in a file of this code."""
    return row(name, lambda w: dict(grader=f"{w.file('mine.py', code)}:{function}"), "mine.py", *words,
    **more)


GRADERS = [
    row("--grader unknown", dict(grader="exat"),
        "--grader: unknown grader 'exat'; did you mean exact? there are:"),
    row("--grader empty", dict(grader=""), "--grader: unknown grader ''; there are: exact"),
    row("--grader a file", lambda w: dict(grader=w.file("mine.py")), "--grader: unknown grader",
        "FILE.py:NAME"),
    row("--grader in no file", dict(grader="none.py:grade"),
        "grader none.py:grade: there is no file none.py"),
    row("--grader in a folder", lambda w: dict(grader=f"{w.folder('x.py')}:grade"), "there is no file"),
    row("--grader with a NUL", dict(grader="x\0.py:grade"), "x\\x00.py:grade"),
    row("a row's grader unknown", lambda w: dict(prompts=w.file("p", dict(GOOD, grader="exat"))),
        "p:1: unknown grader"),
    *[row(f"a row's grader {x!r}", lambda w, x=x: dict(prompts=w.file("p", dict(GOOD, grader=x))),
          "p:1: unknown grader", "there are:") for x in (["exact"], None, 5, {"a": 1}, "", True)],
    row("a row's grader in no file", lambda w: dict(prompts=w.file("p", dict(GOOD, grader="none.py:f"))),
        "grader none.py:f: there is no file none.py"),
    row("--grader that no row uses", lambda w: dict(grader="number", prompts=w.file("p", {"prompt": "a"})),
        "--grader number has no effect"),
    grader("a grader that is not there", "def other(): pass", "has no function 'grade'"),
    grader("a grader that is a number", "grade = 5", "has no function 'grade'"),
    grader("a grader without a name", "", "has no function ''", function=""),
    grader("a grader that is no Python", "def grade(:", "does not run: SyntaxError"),
    grader("a grader that is not UTF-8", b"x = 'caf\xe9'\ndef grade(c, r): return 1",
        "does not run: SyntaxError"),
    grader("a grader that needs a package", "import no_such_package", "does not run: ModuleNotFoundError"),
    grader("a grader that fails at once", "1 / 0", "does not run: ZeroDivisionError"),
    grader("a grader whose file ends the program", "import sys\nsys.exit(0)", "does not run: SystemExit"),
    grader("a grader whose file is a program", "import argparse\nargparse.ArgumentParser().parse_args(['x'])",
           "does not run: SystemExit"),
    grader("a grader that ends the program", "def grade(c, row): raise SystemExit", "fails on the completion",
           "SystemExit"),
    grader("a grader that fails", "def grade(c, row): return row['x']",
        "fails on the completion 'cba': KeyError('x')"),
    grader("a grader that fails in two lines", "def grade(c, row): raise ValueError('a\\nb')",
        "fails on the completion"),
    grader("a grader of one argument", "def grade(c): return 1", "fails on the completion 'cba': TypeError"),
    *[grader(f"a grader that returns {x}", f"nan = float('nan')\ndef grade(c, row): return {x}",
             f"returns {x}, which is no number in [0, 1]") for x in ("None", "'1'", "2", "-0.5", "nan", "[1]",
             "1j")],
    grader("a grader that is asynchronous", "async def grade(c, row): return 1", "which is no number in",
        dry=False),                                             # the line has its address
    grader("a grader that returns much", "def grade(c, row): return 'x' * 10**6",
        "which is no number in [0, 1]"),
]


# ---- --templates -------------------------------------------------------------------------------------------

def texts(name, content, *words, **more):
    """A row of a method whose --templates file has this content."""
    return row(name, lambda w: dict(method="opsd", templates=w.file("t.json", content)), "t.json", *words,
    **more)


TOLD = '{"solution": "%s"}'
TEMPLATES = [
    row("--templates that are not there", dict(method="opsd", templates="none.json"),
        "cannot read --templates none.json"),
    row("--templates that are a folder", lambda w: dict(method="opsd", templates=w.folder("t")),
        "cannot read --templates"),
    row("--templates with a NUL", dict(method="opsd", templates="x\0y"), "x\\x00y"),
    row("--templates that are a pipe", lambda w: dict(method="opsd", templates=fifo(w, "pipe")), "pipe"),
    row("--templates of opd", dict(templates="x"),
        "--templates has no effect on --method opd; it is for: star, opsd"),
    texts("--templates that are empty", "", "not JSON"),
    texts("--templates that are cut", '{"solution": "', "not JSON"),
    texts("--templates that are not UTF-8", b'{"solution": "\xe9"}', "is not UTF-8 text"),
    texts("--templates of deep JSON", '{"x": ' * 100_000, "not JSON"),
    texts("--templates that are a list", "[]", "templates are one JSON object, not '[]'"),
    texts("a template that is unknown", '{"sollution": "{solution}"}',
        "unknown template 'sollution'; did you mean solution?"),
    texts("a template that is a number", '{"solution": 5}', "template 'solution' is text, not '5'"),
    texts("a template without its place", TOLD % "x", "template 'solution' lacks {solution}"),
    texts("a template with another place", TOLD % "{solution} {x}", "template 'solution' has unknown {x}"),
    texts("a template with a format", TOLD % "{solution:>9}", "has unknown {solution:>9}"),
    texts("a template with a conversion", TOLD % "{solution!r}", "has unknown {solution!r}"),
    texts("a template with an attribute", TOLD % "{solution.__class__}", "has unknown {solution.__class__}"),
    texts("a template with a brace", TOLD % "{solution} {", "a literal brace is {{ or }}"),
    texts("a template twice", '{"solution": "{solution}", "solution": "{solution}"}', "twice"),
    texts("a template with half a surrogate pair", TOLD % r"{solution}\ud83d", "surrogate"),
]


# ---- --teacher_system --------------------------------------------------------------------------------------

def system(name, content, *words, **flags):
    """A row of a run whose --teacher_system file has this content."""
    return row(name, lambda w: dict(teacher_system=w.file("s.txt", content)) | flags, "--teacher_system",
               "s.txt", *words)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SYSTEM = [
    row("--teacher_system that is not there", dict(teacher_system="none.txt"),
        "cannot read --teacher_system none.txt: No such file"),
    row("--teacher_system that is a folder", lambda w: dict(teacher_system=w.folder("t")),
        "cannot read --teacher_system", "it is no file"),
    row("--teacher_system that is empty", dict(teacher_system=""), "--teacher_system"),
    row("--teacher_system with a NUL", dict(teacher_system="x\0y"), "x\\x00y"),
    row("--teacher_system that is a pipe", lambda w: dict(teacher_system=fifo(w, "pipe")), "pipe"),
    row("--teacher_system of sft", dict(method="sft", teacher_system="x"),
        "--teacher_system has no effect on --method sft; it is for: "),
    system("--teacher_system that is blank", " \n", "is blank, so a teacher would see nothing more"),
    system("--teacher_system that is not UTF-8", b"caf\xe9", "is not UTF-8 text"),
    row("--teacher_system without a system role", lambda w: dict(
        teacher_system=w.file("s.txt", "Be kind."), teachers=w.model(template=NO_SYSTEM)),
        "--teacher_system", "s.txt: no system role"),
    row("--teacher_system that a template leaves out", lambda w: dict(
        teacher_system=w.file("s.txt", "Be kind."), teachers=w.model(template=CHATML.replace(
            "in messages", "in messages if m.role == 'user'"))), "s.txt: the chat template of",
        "leaves out the text of a message of role 'system'"),
    row("--teacher_system that is in the template", lambda w: dict(
        teacher_system=w.file("s.txt", "<|im_start|>user Hi"), teachers=w.model(template=CHATML)),
        "s.txt: the text has '<|im_start|>user'"),
    row("--teacher_system and a teacher_prompt", lambda w: dict(
        teacher_system=w.file("s.txt", "copy q>"), prompts=w.file("rows.jsonl", [GOOD, GOOD | {
            "teacher_prompt": "rev"}])), 'rows.jsonl:2: it has a "teacher_prompt"', "give one of both"),
    prompts("a reward without an answer", {"prompt": "rev abc>"}, ':1: no "answer", which --method opd needs',
            flags=dict(loss="pg", rollouts=2, reward_weight=0.5)),
    prompts("context without a teacher_prompt", GOOD, ':1: no "teacher_prompt", which --method context shows',
            "or give --teacher_system", flags=dict(method="context", teacher_system=[])),
    prompts("a teacher_prompt that is a number", GOOD | {"teacher_prompt": 5}, '"teacher_prompt" is text or'),
    prompts("a teacher_prompt that is null", GOOD | {"teacher_prompt": None}, '"teacher_prompt" is text or'),
    prompts("a teacher_prompt of no messages", GOOD | {"teacher_prompt": []}, '"teacher_prompt" is text or'),
    prompts("a teacher_prompt that is empty", GOOD | {"teacher_prompt": ""}, "the user says nothing"),
    prompts("a teacher_prompt of grpo", GOOD | {"teacher_prompt": "rev"}, "--method grpo has no teacher that",
            flags=dict(method="grpo")),
    prompts("a teacher_prompt that is misspelt", GOOD | {"teacher_promt": "rev"},
            'did you mean "teacher_prompt"?'),
]


# ---- chat templates ----------------------------------------------------------------------------------------

def chat(name, template, *words, prompt=None, **more):
    """A row whose student has this chat template."""
    flags = more.pop("flags", {})

    def make(w):
        folder = w.model(template=template)
        return dict(student=folder, teachers=[folder], prompts=w.file("p",
        {"prompt": prompt or [ME]})) | flags
    return row(name, make, *words, **more)


LEAVES = "leaves out the text of a message of role 'user'"
CHAT = [
    chat("a template with a syntax error", "{% for m in messages %}", "p:1: "),
    chat("a template with an unknown filter", "{{ messages[0].content | shout }}", "p:1: ", "shout"),
    chat("a template with an unknown function", "{{ shout(messages) }}", "p:1: ", "shout"),
    chat("a template that divides by 0", "{{ 1 / 0 }}", "p:1: ", "division by zero"),
    chat("a template that raises", "{{ raise_exception('no\nway') }}", "p:1: no"),
    chat("a template that raises nothing", "{{ raise_exception('') }}", "p:1: ", "TemplateError"),
    chat("a template that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "p:1: "),
    chat("a template that opens a file", "{{ ''.__class__.__mro__ }}", "p:1: "),
    chat("a template that says nothing", "", "p:1: ", "has no chat template, but the prompt is a list"),
    chat("a template of blanks", " \n", "p:1: ", LEAVES),
    chat("a template that ignores what is said", "You are kind.", "p:1: ", LEAVES),
    chat("a template that ignores the system", CHATML.replace("in messages",
        "in messages if m.role == 'user'"),
         "leaves out the text of a message of role 'system'", prompt=[{"role": "system",
         "content": "Be kind."}, ME]),
    chat("the assistant speaks last", CHATML, f"p:1: {USER} 'assistant', not of the user",
         prompt=[ME, {"role": "assistant", "content": "cba"}]),
    chat("only the system speaks", CHATML, f"p:1: {USER} 'system', not of the user",
         prompt=[{"role": "system", "content": "Be kind."}]),
    chat("a role that nobody knows", CHATML, f"p:1: {USER} 'bot'", prompt=[ME, {"role": "bot",
        "content": "a"}]),
    chat("a user who says nothing", CHATML, "p:1: the user says nothing", prompt=[{"role": "user",
        "content": " "}]),
    chat("kwargs that no template reads", CHATML, "no chat template of", "did you mean enable_thinking?",
         flags=dict(chat_template_kwargs='{"enable_thinkin": false}')),
    chat("kwargs that are a word of the template", CHATML, "--chat_template_kwargs", "'role'",
         flags=dict(chat_template_kwargs='{"role": "user"}')),
    chat("kwargs without a template", "", "--chat_template_kwargs",
        flags=dict(chat_template_kwargs='{"x": 1}'), prompt="rev abc>"),
    chat("the teacher's kwargs that no template reads", CHATML,
        "--teacher_chat_template_kwargs: no chat template of",
         flags=dict(teacher_chat_template_kwargs='{"enable_thinkin": false}')),
    chat("a template in the text", CHATML, "p:1: the text has", "is in the chat template",
         prompt="<|im_start|>user\nrev abc><|im_end|>"),
    row("a teacher's template that ignores what is said", lambda w: dict(
        student=w.model(template=CHATML), teachers=w.model(template="x")), ":1: ", LEAVES),
    row("a template that is a number", lambda w: dict(student=w.model(
        lambda m: change(m / "tokenizer_config.json", {"chat_template": 5}))), "chat template"),
    row("templates without a default", lambda w: dict(student=w.model(lambda m: change(
        m / "tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": CHATML}]}))),
        "default"),
    row("a template that is not UTF-8", lambda w: dict(student=w.model(
        lambda m: (m / "chat_template.jinja").write_bytes(b"\xe9"))), "cannot load"),
]


# ---- checkpoints: what is seen without their weights -------------------------------------------------------

def both(name, make, *words, **more):
    """Two rows of a bad model, as the student and as the teacher."""
    yield row(f"{name}, student", lambda w: dict(student=make(w), **more.get("flags", {})), *words,
              **{k: v for k, v in more.items() if k != "flags"})
    yield row(f"{name}, teacher", lambda w: dict(teachers=make(w), **more.get("flags", {})), *words,
              **{k: v for k, v in more.items() if k != "flags"})


def writing(file, content):
    """An edit of a model's folder: this file is this."""
    return lambda folder: (folder / file).write_bytes(content if isinstance(content,
    bytes) else content.encode())


def foreign(kind, config, folder):
    """A model of another kind with the tiny models' tokenizer."""
    torch.manual_seed(0)
    return tiny(folder, kind(config), small_world.tokenizer())


def bert(w):
    return foreign(BertForMaskedLM, BertConfig(vocab_size=81, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2,
                                               intermediate_size=16), w.root / "bert")


def t5(w):
    return foreign(T5ForConditionalGeneration, T5Config(vocab_size=81, d_model=16, d_kv=8, d_ff=16,
    num_layers=1,
                                                        num_heads=2), w.root / "t5")


def vision(w):
    return foreign(CLIPVisionModel, CLIPVisionConfig(hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2,
                                                     intermediate_size=16, image_size=32, patch_size=16),
                                                     w.root / "clip")


def gpt(positions):
    return lambda w: foreign(GPT2LMHeadModel, GPT2Config(
        vocab_size=81, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=1),
        w.root / "gpt")


def other_tokenizer(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    vocab = found["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(found))


def no_eos(folder):
    change(folder / "tokenizer_config.json", {"eos_token": None})
    for file in ("special_tokens_map.json",):
        (folder / file).unlink(missing_ok=True)


def eos_elsewhere(folder):
    change(folder / "tokenizer_config.json", {"eos_token": "<end>"})
    change(folder / "generation_config.json", {"eos_token_id": 81})


CODE = "open({marker!r}, 'w')\nclass C:\n    pass\n"
CONFIGS = [
    *both("a config that is no JSON", lambda w: w.model(writing("config.json", "{")), "cannot load"),
    *both("a config that is empty", lambda w: w.model(writing("config.json", "")), "cannot load"),
    *both("a config that is a list", lambda w: w.model(writing("config.json", "[]")), "cannot load"),
    *both("a config that is not UTF-8", lambda w: w.model(writing("config.json", b"\xff\xfe{}")),
        "cannot load"),
    *both("a tokenizer that is no JSON", lambda w: w.model(writing("tokenizer.json", "{")), "cannot load"),
    *both("a tokenizer that is a pointer of Git LFS", lambda w: w.model(writing(
        "tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")), "Git LFS"),
    *both("a field of another type in the config", lambda w: w.model(rms_norm_eps="x"),
          "rms_norm_eps", "'x'"),
    *both("a tokenizer that is empty", lambda w: w.model(writing("tokenizer.json", "")), "cannot load"),
    row("a tokenizer's config that is no JSON",
        lambda w: dict(student=w.model(writing("tokenizer_config.json", "{"))),
        "cannot load"),
    row("generation defaults that are no JSON",
        lambda w: dict(student=w.model(writing("generation_config.json", "{"))),
        "cannot load"),
    row("generation defaults that are a list",
        lambda w: dict(student=w.model(writing("generation_config.json", "[]"))),
        "cannot load"),
    *both("no kind of model", lambda w: w.model(model_type=None), "cannot load", "model_type"),
    *both("a kind that is not known", lambda w: w.model(model_type="qwen99"), "cannot load", "qwen99"),
    *both("0 heads", lambda w: w.model(num_attention_heads=0), "num_attention_heads"),
    *both("0 layers", lambda w: w.model(num_hidden_layers=0), "num_hidden_layers"),
    *both("0 wide", lambda w: w.model(hidden_size=0), "hidden_size"),
    *both("wide as a text", lambda w: w.model(hidden_size="32"), "cannot load", "hidden_size"),
    *both("a vocabulary of 0", lambda w: w.model(vocab_size=0), "has no row in the model"),
    *both("a vocabulary below the tokenizer's", lambda w: w.model(vocab_size=40), "has no row in"),
    *both("no positions", lambda w: w.model(max_position_embeddings=0), "max_position_embeddings 0"),
    *both("positions below 0", lambda w: w.model(max_position_embeddings=-5), "max_position_embeddings -5"),
    *both("8 positions", lambda w: w.model(max_position_embeddings=8), "8 positions; lower --max_new_tokens"),
    *both("8 positions of GPT-2", gpt(8), "8 positions; lower --max_new_tokens"),
    *both("a dtype that is none", lambda w: w.model(dtype="float99"), "cannot load", "float99"),
    *both("an encoder", bert, "in BertLMHeadModel a token sees the ones after it", reads=True),
    *both("an encoder and decoder", t5, "is a t5, not a decoder-only language model"),
    *both("a model of pictures", vision, "not a decoder-only language model"),
    *both("code of its own", lambda w: w.model(
        writing("code.py", CODE.format(marker=str(w.root / "ran"))), model_type="strange",
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}), "cannot load", "code"),
    *both("another tokenizer", lambda w: w.model(other_tokenizer), "have different tokenizers",
        "tokens differ"),
    *both("no EOS", lambda w: w.model(no_eos),
        "the tokenizer has no EOS token, so a completion could never end"),
    row("an EOS without a row", lambda w: dict(method="sft", student=w.model(eos_elsewhere, eos_token_id=81)),
        "its EOS token has no row in the model"),
    row("a quantised student", lambda w: dict(student=w.model(quantization_config={
        "quant_method": "gptq", "bits": 4})),
        "is quantised and cannot learn; give the unquantised --student"),
    row("weights of a kind that is not known", lambda w: dict(student=w.model(quantization_config="x")),
        "cannot load"),
]


# ---- checkpoints: what only their weights show -------------------------------------------------------------

HEAD = "model.embed_tokens.weight"                              # which is the head, too


def setting(name, value, row=3):
    """An edit of weights: a row of one of them has this value."""
    def edit(weights):
        weights[name][row] = value
    return edit


def without(name):
    return lambda weights: weights.pop(name)


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(w):
    """A checkpoint whose .bin runs code when it is unpickled."""
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(w.root / "ran"), "w")

    def edit(folder):
        no_weights(folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({HEAD: Evil()}))
    return w.model(edit)


def sharded(folder):
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": 1}, "weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))


UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = [
    *both("a weight is missing", lambda w: w.weights(without(UP)), f"1 weights are missing, {UP}",
        reads=True),
    *both("a weight too much", lambda w: w.weights(lambda x: x.update(extra=torch.zeros(3))),
          "1 weights are not in its config's model, extra", reads=True),
    *both("1 layer in the config, 2 in the weights", lambda w: w.model(num_hidden_layers=1, layer_types=None),
          "weights are not in its config's model, model.layers.1", reads=True),
    *both("3 layers in the config, 2 in the weights", lambda w: w.model(num_hidden_layers=3,
        layer_types=None),
          "weights are missing, model.layers.2", reads=True),
    *both("another width in the config", lambda w: w.model(hidden_size=64), "cannot load",
          "of another shape than its config says", reads=True),
    *both("another shape in the weights", lambda w: w.weights(lambda x: x.update({UP: torch.zeros(5, 32)})),
          "cannot load", UP, reads=True),
    *both("NaN in a row of the head", lambda w: w.weights(setting(HEAD, NAN)),
          f"its {HEAD} has values that are not numbers", reads=True),
    *both("inf in a row of the head", lambda w: w.weights(setting(HEAD, INF)),
          f"its {HEAD} has values that are not numbers", reads=True),
    *both("NaN in a norm", lambda w: w.weights(setting("model.norm.weight", NAN)),
        "its model.norm.weight has values",
          reads=True),
    row("1e38 in a row of the head", lambda w: dict(student=w.weights(setting(HEAD, 1e38)),
        teachers=w.models / "wide"),
        "is not a number", "its weights", reads=True),
    *both("truncated weights", lambda w: w.model(truncated), "cannot load", "Error while deserializing",
        reads=True),
    *both("empty weights", lambda w: w.model(writing("model.safetensors", "")), "cannot load",
        "header too small", reads=True),
    row("a page instead of weights", lambda w: dict(student=w.model(writing("model.safetensors",
        "<html>" * 9))),
        "cannot load", "header too large", reads=True),
    row("a pointer of Git LFS", lambda w: dict(student=w.model(writing(
        "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"))),
        "Git LFS"),
    *both("no weights", lambda w: w.model(no_weights), "cannot load", "model.safetensors", reads=True),
    row("shards that are not there", lambda w: dict(student=w.model(sharded)),
        "model-00001-of-00002.safetensors",
        reads=True),
    *both("a .bin with code", pickled, "cannot load", "safetensors", reads=True),
    row("a quantised teacher without its package", lambda w: dict(teachers=w.model(quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True})), "cannot load", "bitsandbytes", reads=True),
    row("an activation that is none", lambda w: dict(student=w.model(hidden_act="gelux")), "gelux",
        reads=True),
    row("key heads that do not divide", lambda w: dict(student=w.model(num_key_value_heads=3)), "cannot load",
        "k_proj",
        reads=True),
    row("a RoPE that is none", lambda w: dict(student=w.model(rope_parameters={"rope_type": "spiral"})),
        "spiral",
        reads=True),
    row("--diagnose_layers 99", dict(diagnose_every=1, diagnose_layers=99),
        "--diagnose_layers 99: the student", "2 layers", reads=True, writes=True),
    row("a RoPE of base 0", lambda w: dict(student=w.model(rope_parameters={"rope_type": "default",
        "rope_theta": 0})),
        "is not a number", reads=True),
    row("--lr 1000 with the default --weight_decay", dict(lr=1000),
        "--weight_decay 0.01: times --lr it must be below 1"),
    row("--power_lambda 100", dict(loss="power", power_lambda=100), "step 1: loss or gradient are not a",
        reads=True, writes=True),
    row("1e38 in the head of the teacher", lambda w: dict(teachers=w.weights(setting(HEAD, 1e38))),
        "step 1: ", "computes what is not a number for one of the prompts of main", reads=True, writes=True),
]


# ---- a run that is to be continued -------------------------------------------------------------------------

def damaged(name, change):
    """An edit of a run's folder: the bytes of a file are changed."""
    def edit(folder):
        path = folder / "checkpoint" / name
        path.write_bytes(change(path.read_bytes()))
    return edit


def swapped(folder):
    """Put another model's weights into a checkpoint."""
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    save_file({name: x[:1].clone() for name, x in weights.items()},
        folder / "checkpoint" / "model.safetensors",
              metadata={"format": "pt"})
    sealed(folder)


def foreign_state(folder):
    """Put another program's state into a checkpoint."""
    torch.save([1], folder / "checkpoint" / "trainer.pt")
    sealed(folder)


def sealed(folder):
    """Give a checkpoint the checksums of what is in it."""
    (folder / "checkpoint" / "checksums.json").write_text(json.dumps(checksums(folder / "checkpoint")))


FLIP = lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]
RESUMED = dict(steps=3, batch=1, max_new_tokens=2)


def resumed(name, edit, *words, **more):
    """A row that continues a run of two steps."""
    flags = more.pop("flags", {})

    def make(w):
        rows = w.file("mine.jsonl", GOOD)
        return RESUMED | dict(prompts=[rows]) | w.run(edit, **flags)
    return row(name, make, *words, **more)


RESUME = [
    resumed("without --resume", None, "holds a run already: add --resume", flags=dict(resume=[])),
    resumed("another --lr", None, "--resume with another lr (0.5, was 1e-05) would be another",
        flags=dict(lr=0.5)),
    resumed("another --method", None, "another method", flags=dict(method="mopd")),
    resumed("another --seed", None, "another seed", flags=dict(seed=1)),
    resumed("another --loss", None, "another loss", flags=dict(loss="fkl")),
    row("another student", lambda w: RESUMED | dict(prompts=[w.file("mine.jsonl", GOOD)]) | w.run(
        student=w.models / "b"), "--resume with another content of student would be another experiment"),
    row("another teacher", lambda w: RESUMED | dict(prompts=[w.file("mine.jsonl", GOOD)]) | w.run(
        teachers=[w.models / "b"]), "--resume with another content of teacher of main would be"),
    row("other prompts", lambda w: RESUMED | dict(prompts=[w.file("p", {"prompt": "rev b>"})]) | w.run(),
        "--resume with another content of main would be another experiment"),
    row("other branches", lambda w: RESUMED | dict(prompts=[f"x={w.file('p', GOOD)}"]) | w.run(),
        "--resume with another"),
    resumed("a checkpoint with a flipped bit", damaged("trainer.pt", FLIP),
        "trainer.pt is not as it was written", dry=False),
    resumed("weights with a flipped bit", damaged("model.safetensors", FLIP),
        "model.safetensors is not as it was written", dry=False),
    resumed("a checkpoint that is cut", damaged("trainer.pt", lambda x: x[:9]),
        "trainer.pt is not as it was written", dry=False),
    resumed("a checkpoint without a file", lambda f: (f / "checkpoint" / "trainer.pt").unlink(),
        "trainer.pt is missing", dry=False),
    resumed("a checkpoint with another file", lambda f: (f / "checkpoint" / "x").touch(),
        "x is not as it was written", dry=False),
    resumed("no checksums", lambda f: (f / "checkpoint" / "checksums.json").unlink(), "has no checksums.json",
        dry=False),
    resumed("checksums that are no JSON", damaged("checksums.json", lambda x: b"{"),
        "has no checksums.json that can be", dry=False),
    resumed("checksums that are a list", damaged("checksums.json", lambda x: b"[]"),
        "has no checksums.json that can be", dry=False),
    resumed("a finished run without its checkpoint", lambda f: shutil.rmtree(f / "checkpoint"),
        "is finished (final/)"),
    resumed("a config that is cut", lambda f: (f / "config.json").write_text('{"method"'),
        "holds other files and no run"),
    resumed("no config", lambda f: (f / "config.json").unlink(), "holds other files and no run"),
    resumed("a checkpoint of another model", swapped, "checkpoint", "embed_tokens", reads=True),
    resumed("a checkpoint of another program", foreign_state, "checkpoint", "choose another --out",
        reads=True),
    resumed("a log that is a folder",
        lambda f: [(f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()], "Is a directory",
        "metrics.jsonl", reads=True),
    resumed("a config with a number for the models", lambda f: change(f / "config.json",
        {"models_sha256": 5}),
            "--resume with another content of"),
    resumed("a config of another version",
        lambda f: (f / "config.json").write_text('{"method": "opd", "versions": {}}'),
            "out was begun by another version of opd, without adam_beta2; continue it with that one"),
    row("a run that goes on", lambda w: dict(out=taken(w, w.root / "out")), "out belongs to process",
        "choose another --out",
        reads=True),
    row("a run that goes on, with --resume", lambda w: RESUMED | dict(prompts=[w.file("mine.jsonl",
        GOOD)]) | w.run(
        lambda folder: taken(w, folder)), "out belongs to process", "choose another --out", dry=False),
]


# ---- the other programs ------------------------------------------------------------------------------------

def recipe(name, line, *words, **more):
    return row(name, line, *words, main=recipes.main, program="lab.recipes", **more)


def compared(name, content_of_b, *words, **more):
    """A row of lab.compare: what the second run's eval.jsonl holds; the first one's is ANSWER."""
    def line(w):
        for folder, content in (("a", ANSWER), ("b", content_of_b)):
            w.file(f"{folder}/eval.jsonl", content)
        return [w.root / "a", w.root / "b", "--out", w.root / "c.png"]
    return row(name, line, *words, main=compare.main, program="lab.compare", status=2, **more)


ANSWER = {"step": -1, "set": "e", "row": 1, "question": "q", "rewards": [1.0], "lengths": [1], "cut": [False],
          "unread": [False]}
COMPARE = [
    row("nothing to compare", [], "RUN", main=compare.main, program="lab.compare", status=2),
    row("one run to compare", ["a"], "RUN", main=compare.main, program="lab.compare", status=2),
    row("a run that is not there", ["a", "b"], "a has no evaluation in an eval.jsonl", main=compare.main,
        program="lab.compare", status=2),
    compared("no evaluation", "", "b has no evaluation in an eval.jsonl"),
    compared("an evaluation of another question", ANSWER | {"question": "r"}, "asked different questions"),
    compared("an evaluation of one question more", [ANSWER, ANSWER | {"row": 2}],
        "asked different questions, first in row 2, 1 and 2 in all"),
    compared("an evaluation of another set", ANSWER | {"set": "f"}, "no set is in both"),
    compared("a line that is no record", {"step": 1}, "has a line that is no record of a question"),
    row("a step that is no number", ["a", "b", "--step", "x"], "--step", "'x'", main=compare.main,
        program="lab.compare", status=2),
]

RECIPES = [
    recipe("a recipe that is unknown", ["smal-opcd"], "unknown recipe smal-opcd; did you mean small-opcod?"),
    recipe("an empty recipe", [""], "unknown recipe ; there are: small"),
    recipe("two recipes", ["small", "small-all"], "small-all"),
    recipe("0 seeds", ["small", "--seeds", "0"], "--seeds: 0 is not at least 1"),
    recipe("half a seed", ["small", "--seeds", "1.5"], "--seeds: invalid int value: '1.5'"),
    recipe("a billion seeds", ["small", "--seeds", "1000000000"], "--seeds", "at most"),
    recipe("0 jobs", ["small", "--jobs", "0"], "--jobs: 0 is not at least 1"),
    recipe("a flag of opd.py", ["small", "--lr", "3"], "--lr"),
    recipe("an abbreviation of --seeds", ["small", "--seed", "3"], "--seed"),
    recipe("--quick=yes", ["small", "--quick=yes"], "--quick"),
    recipe("flags without a recipe", ["--quick"], "need a recipe's name; there are: small, "),
    recipe("a recipe's --out that is empty", ["small", "--out", ""], "--out '' names no folder"),
    recipe("a recipe's --out that is a file", lambda w: ["small", "--out", w.file("f")], "--out",
        "cannot be made a folder"),
    recipe("a recipe's --out in a file", lambda w: ["small", "--out", w.file("f") / "x"], "--out",
        "cannot be made a"),
    recipe("a recipe's --out with a NUL", ["small", "--out", "x\0y"], "--out"),
    recipe("a recipe's --out of 300 letters", ["small", "--out", "x" * 300], "--out",
        "cannot be made a folder"),
    recipe("a recipe's --out that goes on", lambda w: ["small", "--out", taken(w, w.root / "out")],
        "belongs to process"),
]


def converted(name, line, *words, **more):
    return row(name, line, *words, main=convert.main, program="data.convert", status=2, **more)


def gsm8k(name, content, *words, **more):
    """A row of data.convert with a file in the format of GSM8K."""
    return converted(name, lambda w: ["openai/gsm8k", "--file", w.file("g.jsonl", content)], "g.jsonl",
    *words, **more)


CONVERT = [
    converted("no set", [], "NAME"),
    converted("a set that is unknown", ["openai/gsmk8"],
        "unknown set 'openai/gsmk8'; did you mean openai/gsm8k?"),
    converted("a set that cannot be reached", ["openai/gsm8k"], "cannot load openai/gsm8k"),
    converted("a flag that convert does not have", ["openai/gsm8k", "--split", "test"], "--split"),
    converted("a file that is not there", ["openai/gsm8k", "--file", "none.jsonl"], "none.jsonl"),
    converted("a file that is a folder", lambda w: ["openai/gsm8k", "--file", w.folder("rows")], "rows"),
    converted("a file with a NUL", ["openai/gsm8k", "--file", "x\0y"], "x\\x00y"),
    converted("a file of no set", lambda w: ["openai/gsm8k", "--file", f"physics={w.file('g')}"], "physics",
        "gsm8k"),
    converted("a file of several sets", lambda w: ["openai/gsm8k", "math-ai/aime24", "--file", w.file("g")],
              "of several sets, say which: gsm8k, aime24"),
    converted("parts of a set without", lambda w: ["openai/gsm8k", "--out", w.root / "d"],
        "openai/gsm8k has no parts"),
    converted("three files of SciKnowEval", lambda w: ["hicai-zju/SciKnowEval/physics", "--file", *[
        w.file(x) for x in "abc"]], "not 3 files"),
    converted("no part of that name", lambda w: ["hicai-zju/SciKnowEval/physics:dev", "--file", w.file("g",
        "[]")], "g"),
    converted("convert's --out that is a file", lambda w: ["hicai-zju/SciKnowEval/physics", "--out",
        w.file("f")],
              "--out", "f"),
    converted("a split of a file", lambda w: ["openai/gsm8k:test", "--file", w.file("g", {
        "question": "a", "answer": "b #### 1"})], "test"),
    gsm8k("a file that is empty", "", "has no rows of openai/gsm8k"),
    gsm8k("a file that is no JSON", "{", ":1: not JSON"),
    gsm8k("a file whose second line is no JSON", '{"question": "a", "answer": "b #### 1"}\n{',
        ":2: not JSON"),
    gsm8k("a file of deep JSON", "[" * 100_000, "not JSON"),
    gsm8k("a file that is not UTF-8", b"\xff\xfe", "is not UTF-8"),
    gsm8k("a file of another set", {"problem": "a", "answer": "b"}, ":1: not a row of openai/gsm8k"),
    gsm8k("a file of texts", '["a"]', ":1: not a row of openai/gsm8k"),
    gsm8k("an answer without ####", {"question": "a", "answer": "b"}, ":1: not a row of openai/gsm8k"),
    converted("IFEval in another format", lambda w: ["google/IFEval", "--file", w.file("g", {"prompt": "a"})],
        "g:1: not a row of google/IFEval: KeyError('kwargs')"),
    converted("IFEval without an instruction's arguments", lambda w: ["google/IFEval", "--file", w.file("g", {
        "prompt": "a", "instruction_id_list": ["b", "c"], "kwargs": [{}]})],
        "g:1: not a row of google/IFEval",
        "argument 2 is shorter"),
    converted("IFEval with texts for arguments", lambda w: ["google/IFEval", "--file", w.file("g", {
        "prompt": "a", "instruction_id_list": ["b"], "kwargs": ["c"]})], "g:1: not a row of google/IFEval"),
    converted("MedQA in another format", lambda w: ["GBaker/MedQA-USMLE-4-options", "--file", w.file("g", {
        "question": "a", "answer": "b"})], "g:1: not a row of GBaker/MedQA-USMLE-4-options"),
    *[converted(f"MedQA with the answer {x!r}", lambda w, x=x: ["GBaker/MedQA-USMLE-4-options", "--file",
        w.file("g", {"question": "a", "options": {"A": "b", "B": "c"}, "answer": "b", "answer_idx": x})],
        "g:1: not a row of GBaker/MedQA-USMLE-4-options", f"the answer {x!r} is no choice's letter")
      for x in ("E", "", None)],
    gsm8k("an answer that is a number", {"question": "a", "answer": 5}, ":1: not a row of openai/gsm8k"),
]

TABLE = [*LINES, *one_flag_rows(), *OUT, *STUDENT, *FILES, *ROWS, *GRADERS, *TEMPLATES, *SYSTEM,
         *CHAT, *CONFIGS,
*WEIGHTS,
         *RESUME, *RECIPES, *COMPARE, *CONVERT]


@pytest.mark.filterwarnings("ignore:coroutine", "ignore:Detected pickle")       # of what they are about
@pytest.mark.parametrize("row", TABLE)
def test_bad_input_ends_in_one_line(row, world, monkeypatch, capsys):
    """And so it does with --dry_run, which is there to find it."""
    line = command(row, world)
    found = outcome(row, line, world, monkeypatch, capsys)
    assert found.error is None, repr(found.error)
    assert found.message.startswith(f"{row.program}: ") and "\n" not in found.message, found.message
    assert found.message.isprintable() and len(found.message) < LONGEST
    assert not found.message.endswith(":")                      # what was to come is on the next line
    assert found.status == row.status
    for expected in row.words:
        assert expected in found.message
    assert not found.changed
    assert not (world.root / "ran").exists()                    # code that came with a file
    if row.main is opd.main and row.dry and not row.reads:
        dry = outcome(row, [*line, "--dry_run"], world, monkeypatch, capsys)
        assert (dry.message, dry.status, dry.changed) == (found.message, found.status, []), repr(dry.error)


def test_the_inputs_that_the_rows_are_made_of_pass(world, monkeypatch, capsys):
    """Otherwise a row could be refused for what it has in common with all others."""
    for line in (world.argv(), world.argv(method="opsd"),
                 only(world, "--eval_prompts", world.file("e", GOOD)),
                 world.argv(prompts=world.file("rows.jsonl", GOOD)),
                 world.argv(student=world.model(template=CHATML), teachers=world.model(template=CHATML),
                            prompts=world.file("p", {"prompt": [ME]})),
                 world.argv(student=world.model(), teachers=world.weights(lambda weights: None)),
                 world.argv(**RESUMED | dict(prompts=[world.file("mine.jsonl", GOOD)]) | world.run())):
        assert isinstance(outcome(Row(None, ()), line, world, monkeypatch, capsys).error, Began)
    found = outcome(Row(None, (), main=convert.main), ["openai/gsm8k", "--file", str(world.file("g", {
        "question": "a", "answer": "b #### 1"}))], world, monkeypatch, capsys)
    assert found == Outcome(seconds=found.seconds)
    line = ["small", "--out", str(world.root / "small")]
    assert isinstance(outcome(Row(None, (), main=recipes.main), line, world, monkeypatch, capsys).error,
    Began)
