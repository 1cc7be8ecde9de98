import os

os.environ["HF_HUB_OFFLINE"] = "1"          # a name that is no folder fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")   # tiny models gain nothing from more, and a busy machine waits

import json
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # read when the kernels are imported

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:       # as a shell does for a command in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import opd
from data import small_world
from data.files import read_lines
from methods import METHODS

TEMPLATES = {                                                    # as short as the prompts
    "reprompt": "{solution}{feedback}{prompt}", "solution": "{solution}=", "environment": "{feedback}=",
    "peer": "{feedback}+", "told": "{answer}={prompt}",
    "anchored": "{question}{response}>{tutor_domain} to {tutee_domain}",
    "unanchored": "{question}{response}="}
WORD_ROWS = [{"prompt": p, "answer": a, "solution": a, "chosen": a, "rejected": p[:-1]} for p, a in (
    ("rev abc>", "cba"), ("copy hello>", "hello"), ("add 07 26>", "33"), ("last q>", "q"),
    ("sort zyx>", "xyz"))]


def tiny(folder, net, tok, scale=6):
    """Write an untrained model, its matrices scaled so that losses and gaps are large, with its tokenizer."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale if parameter.ndim == 2 else 1)
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny untrained models with one tokenizer: a, b (same size), wide (another hidden size)."""
    root, tok = tmp_path_factory.mktemp("models"), small_world.tokenizer()
    for name, seed, hidden in (("a", 0, 32), ("b", 1, 32), ("wide", 2, 48)):
        tiny(root / name, small_world.model(len(tok), seed, hidden=hidden, layers=2), tok)
    return root


@pytest.fixture
def prompts(tmp_path):
    """Writes prompt files: prompts("name", rows) -> path."""
    def write(name="words", rows=WORD_ROWS):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


@pytest.fixture
def argv(tmp_path, models, prompts):
    """argv(flag=value, ..) -> a command line with defaults for a tiny model; every call has its own --out."""
    def build(**flags):
        build.calls += 1
        method = METHODS.get(flags.get("method"), METHODS["opd"])
        ours = dict(student=models / "a", prompts=[prompts()], steps=2, batch=4, device="cpu",
                    out=tmp_path / f"out{build.calls}",
                    teachers=[] if method.teachers == "none" else [models / "wide"])
        if method.samples or "eval_prompts" in flags:
            ours["max_new_tokens"] = 6
        if method.teachers == "any":
            ours["teachers"] = [f"{name}={models / name}" for name in ("b", "wide")]
        if "templates" in method.defaults:
            ours["templates"] = tmp_path / "templates.json"
            ours["templates"].write_text(json.dumps(TEMPLATES))
        if method.teachers == "none" and "teacher_system" in method.defaults:
            ours["teacher_system"] = tmp_path / "system.txt"
            ours["teacher_system"].write_text("last copy\n")
        if method.students == 2:
            pair = lambda name: [f"{branch}={prompts(name + branch)}" for branch in ("words", "more")]
            ours |= dict(student=[models / "a", models / "b"], prompts=pair(""), val_prompts=pair("val"),
                         break_prompts=2, feedback_tokens=6)
        if "rounds" in method.own:
            ours["rounds"] = 2
        flags = ours | flags
        words = []
        for flag, value in flags.items():
            if value != []:
                words += [f"--{flag}", *([] if value is True
                                         else map(str, value if isinstance(value, list) else [value]))]
        return words
    build.calls = 0
    return build


@pytest.fixture
def start(argv):
    """start(flag=value, ..) -> a Run."""
    return lambda **flags: opd.Run(opd.configure(argv(**flags)))


def parameters(model):
    return torch.cat([p.detach().flatten().double() for p in model.net.parameters()])


def gradients(model):
    return torch.cat([p.grad.detach().flatten().double() for p in model.net.parameters()])


def metrics(run):
    """The lines of metrics.jsonl that are of a step."""
    return [line for line in read_lines(run.out / "metrics.jsonl") if "loss" in line]


def die_at(update, step):
    """opd.update, which is interrupted in a step."""
    def dying(run, *args):
        if run.state["step"] == step:
            raise KeyboardInterrupt
        return update(run, *args)
    return dying
