"""The settings of a run: every flag once, with its unit, default, source, range, and when it has an effect.

    FLAGS             the general flags. One that is marked `of_methods` exists for the methods that name it
    METHODS           (methods/) a method's own flags are the keyword arguments of its generator: the default
                      and the type come from the signature, the help from its docstring
    parse             turn the command line into complete and checked settings, or refuse it in one line
    check_resume      refuse an --out that is neither free nor holds a run that --resume may continue

Two rules follow from the tables and are written nowhere else. A flag is refused where its condition `only`
does not hold, since it would have no effect. And --resume may change only what is marked `resume`.
"""
import argparse
import difflib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from losses import DIVERGENCES, LOSSES, SUPPORTS, check_support, lookup


class Refused(ValueError):
    """An error in what the user gave. Its message is one line: what is wrong, and what would be right."""


def first_line(error):
    """Return the first line of an exception's message, with what follows a colon, or the exception's name."""
    first, *more = (str(error).strip() or repr(error)).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def one_line(message):
    """Return a message as it can be shown: control characters in words, and of a very long one both ends."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return shown if len(shown) <= 1000 else f"{shown[:500]} .. {shown[-480:]}"


def nearest(name, names):
    """Return a hint for a message: the name that is closest to an unknown one, and all names."""
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}there are: {', '.join(names) or 'none'}"


# ---- types: what the words of a flag may be ----------------------------------------------------------------

def number(kind, least=None, above=None, most=math.inf):
    """Return a type for a flag: an int or a finite float within bounds."""
    def parse(text):
        value = kind(text)
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        enough = value >= least if above is None else value > above
        if not (enough and value <= most):
            low = f"at least {least}" if above is None else f"above {above}"
            high = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {low}{high}")
        if kind is float and value and not 1e-12 <= abs(value) <= 1e12:
            raise argparse.ArgumentTypeError(f"{text} is not between 1e-12 and 1e12, where float32 computes "
                                             "well")
        return value
    parse.__name__ = kind.__name__
    return parse


LARGE = 2**20           # more of anything that memory holds at once could only be a slip of the hand
COUNT, AMOUNT = number(int, least=1, most=LARGE), number(int, least=0, most=2**40)
FINITE = number(float, above=-math.inf)
SEVERAL, RANK = number(int, least=2, most=LARGE), number(int, least=0, most=2**14)
TEMPERATURE = number(float, least=0.01, most=100)
POSITIVE, NOT_NEGATIVE, SHARE = number(float, above=0), number(float, least=0), number(float, least=0, most=1)
PROBABILITY = number(float, above=0, most=1)


def or_zero(kind):
    """Return a type that also takes 0."""
    def parse(text):
        return 0.0 if float(text) == 0 else kind(text)
    parse.__name__ = kind.__name__
    return parse


class OneOf:
    """A type for a flag: one of the given names."""

    def __init__(self, *names):
        self.names = names

    def __call__(self, text):
        if text not in self.names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; {nearest(text, self.names)}")
        return text


class PerBranch:
    """A type for a flag: one number for all branches ("0.8"), or a number by name ("general=2 domain=1").

    The default is a number, or a pair: the first branch's number and the others'.
    """

    shown = "[BRANCH=]X"

    def __init__(self, most=math.inf):
        self.number = number(float, least=0, most=most)

    def complete(self, given, default, branches, flag):
        """Return {branch: number} for every branch. given: the words after the flag, or None."""
        first, others = default if isinstance(default, tuple) else (default, default)
        numbers = dict.fromkeys(branches, others) | {branches[0]: first}
        for name, text in pairs(given or [], flag, "").items():
            if name and name not in branches:
                raise Refused(f"{flag} names {name}, but the branches are: {', '.join(branches)}")
            try:
                found = self.number(text)
            except ValueError:
                raise Refused(f"{flag} {text} is not a number") from None
            except argparse.ArgumentTypeError as error:
                raise Refused(f"{flag} {error}") from None
            numbers |= {name: found} if name else dict.fromkeys(branches, found)
        return numbers


class Ratio:
    """A type for a flag: a whole number per branch, as in "3:1", or one of the given words.

    The default is given for two branches; further ones get 1 each.
    """

    shown = "N:M"

    def __init__(self, *words):
        self.words = words

    def complete(self, given, default, branches, flag):
        """Return the text with one number for each branch, or the word. given: the text, or None."""
        if given is None:
            return default if default in (None, *self.words) else self.padded(default, branches)
        counts = given.split(":")
        fits = len(counts) == len(branches) and all(n.isdecimal() and len(n) < 7 and int(n) for n in counts)
        if not fits and given not in self.words:
            raise Refused(f"{flag} {given} is not a positive whole number for each of the {len(branches)} "
                          f"branches ({', '.join(branches)}), as in {self.padded('3', branches)}")
        return given

    def padded(self, text, branches):
        """Return a ratio for fewer or more branches than it has numbers."""
        return ":".join([*text.split(":"), *["1"] * len(branches)][:len(branches)])


def pairs(values, flag, default):
    """Return {"general": "a", "domain": "b"} for ["general=a", "domain=b"]; {default: a} for a bare ["a"]."""
    out = {}
    for value in values:
        name, found = re.fullmatch(r"(?:([^\W\d][\w-]*)=)?(.*)", value, re.S).groups()
        if name and Path(value).exists():                   # a path that has = in it
            name, found = None, value
        elif not name and "=" in value and not Path(value).exists():
            raise Refused(f"{flag} {value}: a name begins with a letter, and has letters, digits, _ and - "
                          "only")
        if not found:
            raise Refused(f"{flag} {value!r} names nothing")
        if name is None and len(values) > 1:
            raise Refused(f"several {flag} need names: NAME={value}")
        name = name or default
        if name in out:
            raise Refused(f"two {flag} are called {name}")
        out[name] = home(found)
    return out


def home(path):
    """Return the path without a last slash and with ~ expanded, which no shell does in BRANCH=~/x."""
    if not path:
        raise Refused("'' names no file and no folder")
    try:
        path = str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise Refused(f"{path}: there is no such user's home") from None
    return path.rstrip("/") or path


def parse_json(text):
    """Return what a JSON text says. A ValueError says why it is none: NaN, a key that stands twice, .."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice in {list(dict(pairs))}")
        return dict(pairs)

    def constant(name):
        raise ValueError(f"{name} is no number of JSON")
    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(text):
    """Return a flag's JSON object, with options of the chat template, as a dict."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON ({error})") from None
    if not isinstance(value, dict) or {"tokenize", "add_generation_prompt", "messages"} & value.keys():
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object with options of the chat template")
    return value


# ---- the general flags -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Flag:
    """One setting of the program."""
    default: object
    about: str                      # unit, meaning and source
    type: Callable = str            # bool: a switch without a value
    words: str | int | None = None  # "+": one or several words; a number: exactly so many
    shown: str | tuple | None = None  # the placeholder in --help; a tuple has one for each word
    only: tuple | None = None       # (settings -> whether the flag has an effect, the condition in words)
    resume: bool | Callable = False  # whether --resume may change it: always, or (settings -> bool)
    of_methods: bool = False        # exists only for methods that have a default for it
    basic: bool = False             # shown by --help; --help all shows every flag


def knob_flags():
    """Return a flag for every knob of a divergence, under the knob's own name."""
    flags = {}
    for knob in dict.fromkeys(d.knob for d in DIVERGENCES.values() if d.knob):
        names = [name for name, d in DIVERGENCES.items() if d.knob == knob]
        first, pair = DIVERGENCES[names[0]], isinstance(DIVERGENCES[names[0]].default, tuple)
        flags[knob] = Flag(list(first.default) if pair else first.default,
                           f"{' and '.join(names)}: {first.about}", FINITE, words=2 if pair else None,
                           shown=("A", "B") if pair else None,
                           only=(lambda c, names=names: c.loss in names, f"--loss {' or '.join(names)}"))
    return flags


def samples(c):
    """Return whether anything is sampled: rollouts, or answers to evaluation prompts."""
    return c.samples or c.eval_prompts


def has_divergence(c):
    """Return whether the loss is a divergence over the vocabulary, not a loss of the sampled token only."""
    return c.loss in DIVERGENCES


SAMPLED = (lambda c: c.samples, "a --method that samples from the prompts")
EVALUATED = (lambda c: c.eval_prompts or getattr(c, "val_prompts", None), "--eval_prompts")
SAMPLED_EVALUATION = (lambda c: EVALUATED[0](c) and c.eval_temperature > 0, "evaluation prompts and an "
                      "--eval_temperature above 0: greedy completions are all the same")
DIAGNOSED = (lambda c: c.diagnose_every, "--diagnose_every")

FLAGS = {
    "what": {
        "student": Flag([], "the model that learns: a folder or hub id, as from_pretrained takes it; opcod "
                        "has two, the first stronger in the first branch of prompts, the second in the "
                        "second",
                        words="+", shown="PATH", basic=True, resume=True),     # by content: models_sha256
        "teachers": Flag([], "models with the student's tokenizer; one for all prompts, or one per branch; "
                         "in compact any, each under a name", words="+", shown="[BRANCH=]PATH", basic=True,
                         resume=True),
        "prompts": Flag([], "JSON lines with prompt, optional answer, grader, solution (data/prompts.py), or "
                        "a public set as openai/gsm8k (data/convert.py); one per branch. For camopd the "
                        "first is the branch to recover, the others are preserved", words="+",
                        shown="[BRANCH=]FILE", basic=True, resume=True),       # by content: prompts_sha256
        "teacher_system": Flag(None, "a text that teachers see before every prompt, in a chat as system "
                               "message, and from which the student learns to do without it; OPCD, "
                               "2602.12275. For one prompt it is the row's teacher_prompt", shown="FILE",
                               of_methods=True, resume=True),           # by content: prompts_sha256
        "val_prompts": Flag([], "prompts with answers for the gate, one file per branch, neither trained nor "
                            "evaluated on", words="+", shown="BRANCH=FILE", of_methods=True, resume=True),
        "eval_prompts": Flag([], "prompts with answers, never trained on; a public set may name a split, as "
                             "'openai/gsm8k:test[:200]'", words="+", shown="[NAME=]FILE", resume=True,
                             basic=True),
        "grader": Flag(None, "of the rows that have an answer and name none: one of data/graders.py, or your "
                       "own function as FILE.py:NAME, which turns a completion and its row into a number in "
                       "[0, 1]; default: exact"),
        "method": Flag(None, "one of methods/; default: opd with one teacher, mopd with several, sft with "
                       "none", basic=True),
        "out": Flag(None, "the run's folder; default: runs/METHOD-LOSS-seedN", shown="DIR", resume=True,
                    basic=True),
        "eval_only": Flag(False, "evaluate --student on --eval_prompts, and train nothing", bool),
        "resume": Flag(False, "continue the run in --out from its last checkpoint", bool, resume=True,
                       basic=True),
        "dry_run": Flag(False, "read configs, tokenizers and prompts only, say what the run would do and "
                        "need, write nothing; with --device cuda for a GPU that is not here", bool,
                        resume=True, basic=True)},
    "objective (losses.py)": {
        "loss": Flag(None, "a divergence, pg (sampled-token policy gradient) or nll; default: the method's",
                     OneOf(*LOSSES), basic=True),
        **knob_flags(),
        "target": Flag("teacher", "what the divergence compares with: the teacher; veto, q p^beta "
                       "renormalised, with beta falling to 0 (2601.07155); taid, a mixture of both models' "
                       "logits (2501.16937)", OneOf("teacher", "veto", "taid"),
                       only=(has_divergence, "a divergence as --loss")),
        "veto_beta": Flag(0.8, "veto: beta at the first step, 0 at the last", NOT_NEGATIVE,
                          only=(lambda c: c.target == "veto", "--target veto")),
        "taid_start": Flag(0.4, "taid: the teacher's share at the first step, 1 at the last", SHARE,
                           only=(lambda c: c.target == "taid", "--target taid")),
        "support": Flag("full", "which entries count: all, or the --top_k largest of student, teacher, both "
                        "(intersection) or either (union); what becomes of the others: raw and sg nothing "
                        "(sg without the gradient of the kept mass), renorm they have no probability, tail "
                        "they are one more entry; 2605.11182",
                        OneOf(*SUPPORTS), only=(has_divergence, "a divergence as --loss")),
        "top_k": Flag(None, "entries of a --support", COUNT,
                      only=(lambda c: c.support != "full", "a --support other than full")),
        "entry_clip": Flag(0.0, "the most that a vocabulary's entry adds to the divergence, in nats; 0 = no "
                           "limit; OPSD 2601.18734", NOT_NEGATIVE, shown="C",
                           only=(lambda c: has_divergence(c) and DIVERGENCES[c.loss].elementwise,
                                 "a divergence other than akl as --loss")),
        "ce_weight": Flag(0.0, "weight of -log p(y) of the fixed texts beside the divergence, also at "
                          "--loss_temperature; Hinton et al., 1503.02531", NOT_NEGATIVE, of_methods=True),
        "kl_weight": Flag(0.0, "weight of KL(p || the student as it started) beside the loss, at every "
                          "token, also at --loss_temperature; 0.04 in GRPO, 2402.03300", NOT_NEGATIVE,
                          of_methods=True),
        "token_weight": Flag(None, "which tokens count, by what both models think there: see "
                             "methods/token_weights.py",
                             OneOf("entropy", "tip", "selectkd", "prefix", "eopd"), of_methods=True),
        "token_knob": Flag(None, "its share, rank, length or entropy; default: as in the table there",
                           POSITIVE, of_methods=True, only=(lambda c: c.token_weight, "--token_weight")),
        "loss_temperature": Flag(1.0, "divides both models' logits in the loss", TEMPERATURE),
        "importance_cap": Flag(None, "every token's weight is multiplied by min(p_train / p_sampler, C); "
                               "0 = it is not; OPCoD 2606.14368, table 4", NOT_NEGATIVE, shown="C",
                               of_methods=True),
        "importance": Flag([0.5, 2.0], "pg: tokens whose p_train / p_sampler is outside have weight 0; "
                           "Nemotron-Cascade 2, 2603.19220", NOT_NEGATIVE, words=2, shown=("LOW", "HIGH"),
                           only=(lambda c: c.loss == "pg", "--loss pg")),
        "advantage_clip": Flag(None, "pg: the gap counts as at most C nats, either way; Lightning OPD, "
                               "2604.13010, takes 10", POSITIVE, shown="C",
                               only=(lambda c: c.loss == "pg", "--loss pg")),
        "reward_weight": Flag(0.0, "pg: the advantage is the gap + ALPHA (r - the mean reward r of the "
                              "prompt's rollouts), the teacher's and grpo's together, as in KDRL, "
                              "2506.02208, whose weight is on the gap", NOT_NEGATIVE, shown="ALPHA",
                              of_methods=True, only=(lambda c: c.loss == "pg", "--loss pg"))},
    "several branches, self-teachers": {
        "mixture": Flag(None, "shares of the branches in a mixed batch; default: equal", Ratio(),
                        only=(lambda c: (getattr(c, "schedule", "mixed") == "mixed"
                                         or getattr(c, "diagnose_every", 0)), "--schedule mixed")),
        "teacher_rank": Flag(8, "LoRA rank of the teachers that learn, whose own weights are frozen; needs "
                             "peft; 0 = all their weights learn", RANK, of_methods=True),
        "self_teacher": Flag(None, "the student as its own teacher: its moving average (ema), as it started "
                             "(frozen), as it is (live), or a copy that the method renews (snapshot)",
                             OneOf("ema", "frozen", "live", "snapshot"), of_methods=True),
        "ema_rate": Flag(0.05, "share of the student that its average takes up per update; SDPO 2601.20802",
                         SHARE, of_methods=True, only=(lambda c: c.self_teacher == "ema",
                                                       "--self_teacher ema")),
        "templates": Flag(None, "JSON with the texts that self-teachers and tutors read; default: those of "
                          "methods/feedback.py", shown="FILE", of_methods=True, resume=True)},
    "optimisation": {
        "steps": Flag(100, "optimizer steps of each student", number(int, least=1, most=2**40), basic=True,
                      # with these settings no step depends on where the training ends
                      resume=lambda c: (c.lr_schedule == "constant" and c.target == "teacher"
                                        and not hasattr(c, "rounds"))),
        "batch": Flag(32, "prompts per step", COUNT, basic=True),
        "rollouts": Flag(1, "completions per prompt that the student samples", COUNT, of_methods=True),
        "lr": Flag(None, "peak learning rate; default: 1e-5, with --lora_rank 1e-4",
                   number(float, above=0, most=1000), basic=True),
        "lr_schedule": Flag("constant", "after the warm-up: constant, linear, cosine",
                            OneOf("constant", "linear", "cosine")),
        "warmup": Flag(0, "steps of linear warm-up", AMOUNT),
        "optimizer": Flag("adamw", "adamw, sgd, or muon: hidden matrices by Muon, scaled to AdamW's step "
                          "size, the rest by AdamW", OneOf("adamw", "muon", "sgd")),
        "adam_beta2": Flag(0.95, "AdamW's second beta (the first is 0.9)", number(float, 0, most=0.999999),
                           only=(lambda c: c.optimizer != "sgd", "an --optimizer other than sgd")),
        "weight_decay": Flag(0.01, "on matrices; norms and biases do not decay", NOT_NEGATIVE),
        "grad_clip": Flag(1.0, "largest gradient norm; 0 = no clipping", NOT_NEGATIVE),
        "micro_tokens": Flag(4096, "tokens per forward pass with padding: memory, not results", COUNT,
                             resume=True),
        "gradient_checkpointing": Flag(False, "compute every layer again in the backward pass: less memory "
                                       "for one more forward pass", bool, resume=True),
        "lora_rank": Flag(0, "train a LoRA adapter of this rank on all linear layers (not on experts that "
                          "are one tensor) instead of the weights, which then are kept in --dtype; needs "
                          "peft; 0 = no adapter", RANK, basic=True),
        "lora_alpha": Flag(32.0, "LoRA: the adapter's product is scaled by alpha / rank; 32 is that of 'LoRA "
                           "Without Regret'", POSITIVE,
                           only=(lambda c: c.lora_rank or getattr(c, "teacher_rank", 0), "--lora_rank"))},
    "sampling and evaluation": {
        "temperature": Flag(1.0, "of the rollouts; anything but 1 is off-policy, and said so", TEMPERATURE,
                            only=SAMPLED),
        "top_p": Flag(1.0, "of the rollouts; likewise", PROBABILITY, only=SAMPLED),
        "max_new_tokens": Flag(None, "longest completion, in tokens; default: 512, or 2048 where the chat "
                               "template lets the student think", COUNT, basic=True,
                               only=(samples, "a --method that samples, or --eval_prompts")),
        "drop_cut": Flag(False, "completions that reach --max_new_tokens without an end are not learned "
                         "from; in camopd they are not selected, in preferences their pair is left out, in "
                         "grpo and with --reward_weight their rewards still count in the mean", bool,
                         only=SAMPLED),
        "drop_long": Flag(False, "leave out prompts that have no room for a completion, and say how many, "
                          "instead of refusing their file", bool),
        "sample_batch": Flag(None, "completions sampled at a time; default: what a quarter of the GPU's "
                             "memory holds, or a GiB on a CPU, at most 512; 64 with transformers' generate",
                             COUNT, resume=True),
        "chat_template_kwargs": Flag({}, "passed to the chat template, e.g. '{\"enable_thinking\": false}'",
                                     json_object, shown="JSON"),
        "teacher_chat_template_kwargs": Flag(None, "likewise, to that of teachers and self-teachers; "
                                             "default: what the students get", json_object, shown="JSON",
                                             only=(lambda c: c.teachers or (
                                                 hasattr(c, "templates") or hasattr(c, "teacher_system"))
                                                 and c.self_teacher != "live",
                                                   "a teacher that reads prompts of its own")),
        "eval_every": Flag(None, "steps, of both students together, between evaluations; 0 = before and "
                           "after training only; default: 0, or a round of methods that have rounds", AMOUNT,
                           resume=True, only=(lambda c: c.eval_prompts, "--eval_prompts")),
        "eval_rollouts": Flag(1, "completions per evaluation prompt; the score is their mean", COUNT,
                              only=SAMPLED_EVALUATION),
        "gate_rollouts": Flag(16, "completions per validation prompt of the gate, as in evaluation", COUNT,
                              of_methods=True, only=SAMPLED_EVALUATION),
        "eval_temperature": Flag(0.0, "of evaluation; 0 = greedy", or_zero(TEMPERATURE), only=EVALUATED),
        "eval_top_p": Flag(None, "of sampled evaluation; default: --top_p", PROBABILITY,
                           only=SAMPLED_EVALUATION)},
    "diagnosis: what the gradients are like (lab/diagnosis.py)": {
        "diagnose_every": Flag(0, "before the first step, after every K and the last, measure cosine, "
                               "coherence and noise of the gradients, the gap's spread, and the size of each "
                               "branch's step; 0 = never; CaMOPD sec. 4.4", AMOUNT, shown="K", resume=True,
                               of_methods=True),
        "diagnose_rollouts": Flag(None, "rollouts per branch for it, of different prompts as far as there "
                                  "are, one backward pass each; default: --batch, at most 64", SEVERAL,
                                  shown="N", resume=True, of_methods=True, only=DIAGNOSED),
        "diagnose_layers": Flag(0, "gradients of the last N layers only, without the steps: an estimate that "
                                "costs less for large models; 0 = all parameters, with memory for four more "
                                "gradients per branch", AMOUNT, shown="N", resume=True, of_methods=True,
                                only=DIAGNOSED)},
    "the machine": {
        "device": Flag(None, "cuda or cpu; default: cuda where there is one", resume=True, basic=True),
        "teacher_device": Flag(None, "cpu: teachers compute there, slowly; swap: they wait in main memory "
                               "and are on the GPU only while they score or write; default: as --device",
                               OneOf("cuda", "cpu", "swap"), resume=True),
        "dtype": Flag(None, "of the computation; what learns is kept in float32; default: bfloat16 on cuda, "
                      "float32 on cpu", OneOf("float32", "bfloat16")),
        "seed": Flag(0, "of prompts' order and sampling", number(int, least=0, most=2**40)),
        "skip_bad_steps": Flag(0, "a step whose loss or gradient is not a number is dropped and counted, "
                               "and the Nth of them in a row stops the run; 0 = the first does", AMOUNT,
                               shown="N", resume=True),
        "save_every": Flag(100, "steps between checkpoints; 0 = at the end only", AMOUNT, resume=True),
        "log_samples": Flag(2, "rollouts per step and Job that samples.jsonl keeps", AMOUNT, resume=True)}}

GENERAL = {name: flag for group in FLAGS.values() for name, flag in group.items()}
# What has an effect with --eval_only.
EVALUATION = {"student", "eval_prompts", "grader", "eval_only", "out", "resume", "dry_run", "max_new_tokens",
              "drop_long", "micro_tokens", "sample_batch", "chat_template_kwargs", "eval_rollouts",
              "eval_temperature", "eval_top_p", "device", "dtype", "seed"}


# ---- the parser --------------------------------------------------------------------------------------------

class Once(argparse.Action):
    """Keep a flag's value, and refuse a second one, by which the first would be lost without a word."""

    def __call__(self, parser, namespace, values, option=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option} is given twice; several values stand behind one {option}")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser that raises Refused where argparse would print its usage and exit."""

    def error(self, message):
        raise Refused(message)


def own_flags(methods):
    """Return {name: Flag} of the methods' keyword arguments that are not general flags."""
    out = {}
    for method in methods.values():
        for name, own in method.own.items():
            if name not in GENERAL and name not in out:
                users = ", ".join(n for n, other in methods.items() if name in other.own)
                words = "+" if isinstance(own.type, PerBranch) else None
                out[name] = Flag(own.default, f"{users}: {own.about}", own.type, words)
    return out


def build_parser(about, methods, everything):
    """Return the argparse parser. `everything`: its help shows all flags, not only the basic ones."""
    # Flags that are not given are absent from the result (SUPPRESS), so that `parse` knows what was given.
    parser = Parser(prog="opd.py", description=about, usage="python opd.py --student PATH [flags]",
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, width=110, max_help_position=30),
                    allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS,
                    epilog=None if everything else "--help all explains every flag.")
    parser._negative_number_matcher = re.compile(r"-\.?\d")         # argparse takes -1e-3 for a flag
    groups = FLAGS if everything else {"the flags that people start with": GENERAL}
    for title, flags in {**groups, "of single methods (methods/)": own_flags(methods)}.items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            options = dict(help=help_text(name, flag, methods) if everything or flag.basic
                           else argparse.SUPPRESS)
            if flag.type is bool:
                options |= dict(action="store_true")
            else:
                kind = str if isinstance(flag.type, (PerBranch, Ratio)) else flag.type
                options |= dict(action=Once, type=kind, nargs=flag.words,
                                metavar=flag.shown or placeholder(flag))
            group.add_argument(f"--{name}", **options)
    return parser


def placeholder(flag):
    """Return what --help shows in place of a flag's value."""
    if isinstance(flag.type, (PerBranch, Ratio)):
        return flag.type.shown
    name = {"int": "N", "float": "X"}.get(getattr(flag.type, "__name__", ""), "NAME")
    return (name,) * flag.words if isinstance(flag.words, int) else name


def help_text(name, flag, methods):
    """Return a flag's explanation, with the names that it takes and its default."""
    text, names = flag.about, getattr(flag.type, "names", methods if name == "method" else ())
    if not all(name in text for name in names):
        text += f" ({', '.join(names)})"
    return (text + default_text(name, flag, methods)).replace("%", "%%")


def default_text(name, flag, methods):
    """Return " (default: full; student_tail for sdpo, opcod)", or for a flag without one " (for opcod)"."""
    users = {}                                              # a default in words -> the methods that have it
    for method, other in methods.items():
        if name in other.defaults:
            users.setdefault(in_words(other.defaults[name]), []).append(method)
    own, differ = name not in GENERAL, len(users) > 1
    if own and not differ:                                  # the help names the methods already
        users = {}
    hidden = flag.of_methods or "default:" in flag.about or own and differ
    general = "" if hidden else in_words(flag.default)
    parts = [general] if general else []
    parts += [f"{value} for {', '.join(some)}".strip() for value, some in users.items()]
    if not parts:
        return ""
    return f" (default: {'; '.join(parts)})" if general or any(users) else f" ({'; '.join(parts)})"


def in_words(value):
    """Return a default as a user would type it; "" where there is none."""
    if value is None or value is False or value in ([], {}):
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(in_words(x) for x in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parse_words(argv, about, methods):
    """Return {flag: value} of the flags that are given, or print the help and exit."""
    if {"--help", "--help=all", "-h"} & set(argv):
        everything = "all" in argv or "--help=all" in argv
        print(build_parser(about, methods, everything).format_help())
        raise SystemExit(0)
    given, unknown = build_parser(about, methods, True).parse_known_args(argv)
    if unknown:
        known = [f"--{name}" for name in GENERAL | own_flags(methods)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help all lists every flag"
        raise Refused(f"unknown {'flag' if unknown[0][0] == '-' else 'word'} {unknown[0]}; {hint}")
    return vars(given)


# ---- from words to settings --------------------------------------------------------------------------------

def parse(argv, about, methods):
    """Return the settings of a run, parsed, completed and checked; refuse in one line what cannot work.

    The settings are a flat namespace of every general flag and the method's own flags. argv: the words of the
    command line; None: those that the program was started with.
    """
    given = parse_words(sys.argv[1:] if argv is None else list(argv), about, methods)
    for flag in ("student", "eval_prompts" if "eval_only" in given else "prompts"):
        if not given.get(flag):
            raise Refused(f"--{flag} is missing; python opd.py --help explains the flags")
    if "eval_only" in given and (without := [name for name in given if name not in EVALUATION]):
        raise Refused(f"--{without[0]} has no effect with --eval_only")
    cfg = SimpleNamespace(**{name: given.get(name, flag.default) for name, flag in GENERAL.items()
                             if not flag.of_methods})
    if "" in cfg.student:
        raise Refused("--student '' names nothing")
    cfg.student = [home(path) for path in cfg.student]
    cfg.steps = 0 if cfg.eval_only else cfg.steps
    cfg.prompts = pairs(cfg.prompts, "--prompts", "main")
    cfg.eval_prompts = pairs(cfg.eval_prompts, "--eval_prompts", "eval")
    cfg.teachers = pairs(cfg.teachers, "--teachers", "")
    if cfg.method is None:
        cfg.method = "sft" if not cfg.teachers else "opd" if len(cfg.teachers) == 1 else "mopd"
    if cfg.method not in methods:
        raise Refused(f"--method {cfg.method!r} is unknown; {nearest(cfg.method, methods)}")
    method, branches = methods[cfg.method], list(cfg.prompts)
    take_method_flags(cfg, given, method, methods)
    complete_objective(cfg, given, method)
    match_teachers(cfg, method, branches)
    complete_branches(cfg, given, method, branches)
    check_students(cfg, method)
    check_effects(cfg, given, method, own_flags(methods))
    complete_machine(cfg, method)
    if method.check:
        method.check(cfg)
    return cfg


def take_method_flags(cfg, given, method, methods):
    """Add the method's flags to the settings; refuse those that only other methods have."""
    for flag in sorted(given.keys() - method.defaults.keys()):
        if flag not in GENERAL or GENERAL[flag].of_methods:
            users = [name for name, other in methods.items() if flag in other.defaults]
            raise Refused(f"--{flag} has no effect on --method {cfg.method}; it is for: {', '.join(users)}")
    for flag, default in method.defaults.items():
        setattr(cfg, flag, given.get(flag, default))
    # A chained comparison: it is "snapshot", and that is not the method's default.
    if getattr(cfg, "self_teacher", None) == "snapshot" != method.defaults["self_teacher"]:
        users = [name for name, other in methods.items() if other.defaults.get("self_teacher") == "snapshot"]
        raise Refused(f"--self_teacher snapshot is for methods that renew it: {', '.join(users)}")


def complete_objective(cfg, given, method):
    """Choose the loss and its support, and check that they fit each other."""
    cfg.loss = cfg.loss or method.losses[0]
    if cfg.loss not in method.losses:
        raise Refused(f"--method {cfg.method} cannot use --loss {cfg.loss}; "
                      f"it can use: {', '.join(method.losses)}")
    if not cfg.importance[0] < cfg.importance[1] or not cfg.importance[0] <= 1 <= cfg.importance[1]:
        raise Refused(f"--importance {cfg.importance[0]} {cfg.importance[1]}: LOW must be below HIGH, and 1, "
                      "the ratio of a sampler that is the student, between them")
    for flag in ("support", "top_k", "entry_clip"):         # the method's own defaults are for its own loss
        if flag not in given and not GENERAL[flag].only[0](cfg):
            setattr(cfg, flag, GENERAL[flag].default)
    if not has_divergence(cfg):
        return
    try:
        lookup(cfg.loss, knob(cfg))
        if "top_k" not in given or cfg.support != "full":   # otherwise check_effects has the better message
            check_support(cfg.loss, cfg.support, cfg.top_k)
    except ValueError as error:
        raise Refused(str(error)) from None


def knob(cfg):
    """Return the value of the knob of --loss; None where the loss has no knob."""
    name = DIVERGENCES[cfg.loss].knob if has_divergence(cfg) else None
    return getattr(cfg, name) if name else None


def match_teachers(cfg, method, branches):
    """Give every branch of prompts its teacher; refuse missing, superfluous and unknown ones."""
    if "" in cfg.teachers:
        names = ["teacher"] if method.teachers == "any" else branches
        cfg.teachers = dict.fromkeys(names, cfg.teachers[""])
    if method.teachers == "none" and cfg.teachers:
        raise Refused(f"--teachers has no effect on --method {cfg.method}")
    if method.teachers in ("each", "one") and cfg.teachers.keys() != cfg.prompts.keys():
        raise Refused(f"--method {cfg.method} needs a teacher for every branch of prompts "
                      f"({', '.join(branches)}), but --teachers has: {', '.join(cfg.teachers) or 'none'}")
    if method.teachers == "one" and len(set(cfg.teachers.values())) > 1:
        raise Refused(f"--method {cfg.method} has one teacher; with several use --method mopd or camopd")


def complete_branches(cfg, given, method, branches):
    """Complete the settings that have a value for every branch."""
    if hasattr(cfg, "val_prompts"):
        cfg.val_prompts = pairs(cfg.val_prompts, "--val_prompts", "main")
    cfg.mixture = Ratio().complete(given.get("mixture"), None, branches, "--mixture")
    for name, own in method.own.items():
        if isinstance(own.type, (PerBranch, Ratio)):
            setattr(cfg, name, own.type.complete(given.get(name), own.default, branches, f"--{name}"))
    if (many := cfg.batch * getattr(cfg, "rollouts", 1)) > LARGE:
        raise Refused(f"--batch {cfg.batch} with its --rollouts is {many:,} completions per step; at most "
                      f"{LARGE:,}")
    mixed = getattr(cfg, "schedule", "mixed") == "mixed"    # otherwise a step has one branch
    if mixed and not all(split(cfg.batch, cfg.mixture, branches).values()):
        raise Refused(f"--batch {cfg.batch} leaves a branch without prompts in the mixture "
                      f"{cfg.mixture or 'of all'}")


def split(batch, mixture, branches):
    """Return {branch: prompts of the batch} in the shares of the mixture "3:1"; None means equal shares."""
    shares = [int(n) for n in mixture.split(":")] if mixture else [1] * len(branches)
    counts, start = {}, 0
    for i, branch in enumerate(branches, 1):
        end = round(batch * sum(shares[:i]) / sum(shares))      # so that the counts add up to the batch
        counts[branch], start = end - start, end
    return counts


def check_students(cfg, method):
    """Refuse more or fewer students than the method has."""
    if len(cfg.student) == method.students:
        return
    if cfg.eval_only:
        raise Refused("--eval_only has one --student; evaluate each in a folder of its own")
    if method.students == 1:
        raise Refused(f"--method {cfg.method} has one student; two tutor each other with --method opcod")
    raise Refused(f"--method {cfg.method} needs two students, --student A B, but got {len(cfg.student)}")


def check_effects(cfg, given, method, own):
    """Refuse a flag that was set and has no effect under the other settings."""
    settings = SimpleNamespace(**vars(cfg), samples=method.samples)
    for name, flag in (GENERAL | own).items():
        if name in given and flag.only and getattr(cfg, name) != flag.default and not flag.only[0](settings):
            raise Refused(f"--{name} has no effect without {flag.only[1]}")


def complete_machine(cfg, method):
    """Choose the device, the dtype, and the settings that are left."""
    if cfg.device is None:
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", cfg.device):
        raise Refused(f"--device {cfg.device}: choose cpu, cuda or cuda:N")
    if not cfg.dry_run and cfg.device != "cpu" and int(cfg.device[5:] or 0) >= torch.cuda.device_count():
        raise Refused(f"--device {cfg.device}: torch sees {torch.cuda.device_count()} CUDA devices")
    if cfg.device == "cpu" and cfg.teacher_device not in (None, "cpu"):
        raise Refused(f"--teacher_device {cfg.teacher_device} needs a --device cuda")
    cfg.teacher_device = cfg.teacher_device or cfg.device.split(":")[0]
    if method.teacher_learns and cfg.teacher_device != cfg.device.split(":")[0]:
        raise Refused(f"--teacher_device {cfg.teacher_device}: a teacher that learns computes where the "
                      "student does")
    shared = getattr(cfg, "self_teacher", None) in ("ema", "live", "snapshot")
    # A chained comparison: the teacher computes on the CPU, and the student does not.
    if cfg.teacher_device == "cpu" != cfg.device and shared:
        raise Refused("--teacher_device cpu: a self-teacher shares the student's network; choose cuda or "
                      "swap, or --self_teacher frozen")
    own = method.defaults.get("teacher_chat_template_kwargs")
    if cfg.teacher_chat_template_kwargs is own:             # not given
        cfg.teacher_chat_template_kwargs = cfg.chat_template_kwargs | (own or {})
    if (cfg.lora_rank or getattr(cfg, "teacher_rank", 0)) and not find_spec("peft"):
        raise Refused(f"--{'lora' if cfg.lora_rank else 'teacher'}_rank needs peft: pip install peft")
    cfg.lr = cfg.lr or (1e-4 if cfg.lora_rank else 1e-5)
    if cfg.lr * cfg.weight_decay >= 1:
        raise Refused(f"--weight_decay {cfg.weight_decay}: times --lr it must be below 1, or every step "
                      "would turn the weights around")
    cfg.eval_top_p = cfg.eval_top_p or cfg.top_p
    if cfg.eval_every is None:
        rounds = getattr(cfg, "rounds", 0)
        cfg.eval_every = cfg.steps * len(cfg.student) // rounds if rounds else 0
    if cfg.out == "":
        raise Refused("--out '' names no folder")
    name = f"{cfg.method}-{cfg.loss}"
    if cfg.eval_only:
        name = "-".join(["eval", *Path(cfg.student[0]).parts[-2:]])
    cfg.out = home(cfg.out or f"runs/{name}-seed{cfg.seed}")
    cfg.today = ""                                          # the date on which the run began
    cfg.dtype = cfg.dtype or ("bfloat16" if cfg.device.startswith("cuda") else "float32")


# ---- config.json -------------------------------------------------------------------------------------------

def read_config(out):
    """Return the settings of the run in a folder, or None. A model's folder has another config.json."""
    try:
        config = json.loads((Path(out) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and {"method", "versions"} <= config.keys() else None


def record(cfg):
    """Return what config.json keeps: every setting, the versions, the code's commit, the device, the date."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:                                         # no git on this machine
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": version("transformers"), "opd": commit or "unknown"}
    if cfg.device == "cpu":                                 # its instruction set decides how sums are rounded
        device = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    else:
        device = torch.cuda.get_device_name(cfg.device)
    return {**vars(cfg), "versions": versions, "device_name": device,
            "started": time.strftime("%Y-%m-%d %H:%M:%S")}


def check_out(out):
    """Refuse an --out that cannot be written, before anything is."""
    try:
        out.encode()                                            # config.json is UTF-8
        if "\0" in out:                                         # of which Path.exists only says no
            raise ValueError("embedded null byte")
        way = [Path(out).absolute(), *Path(out).absolute().parents]
        there = next(path for path in way if path.exists())
        link = next((path for path in way if path.is_symlink() and not path.exists()), None)
    except (OSError, ValueError) as error:                      # a name that is too long, say, or with a NUL
        raise Refused(f"--out {out!r} can be no folder: {first_line(error)}") from None
    if link:
        raise Refused(f"--out {out}: {link} is a link to what is not there")
    if not there.is_dir():
        raise Refused(f"--out {out}: {there} is a file; it must be a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--out {out}: {there} cannot be written")


def check_resume(cfg):
    """Refuse an --out that holds something else than a run, or a run without --resume.

    Return the settings that the run was started with, or None if there is none to continue.
    """
    check_out(cfg.out)
    out, before = Path(cfg.out), read_config(cfg.out)
    if before is None:
        if out.exists() and {path.name for path in out.iterdir()} - {"config.json.new", ".lock"}:
            raise Refused(f"--out {out} holds other files and no run; choose another --out")
        return None
    if not cfg.resume:
        raise Refused(f"{out} holds a run already: add --resume to continue it, or choose another --out")
    return before


def identity(cfg):
    """Return what a checkpoint says of the run that it is of."""
    return {"method": cfg.method, "optimizer": cfg.optimizer, "lora_rank": cfg.lora_rank,
            "prompts": cfg.prompts_sha256, "models": cfg.models_sha256}


def check_same_experiment(cfg, before):
    """Refuse to continue a run under settings that would make it another experiment."""
    now = json.loads(json.dumps(vars(cfg)))                 # as they are in config.json: tuples become lists
    for name in sorted(now, key=lambda name: (name != "method", name)):
        may_change = name in GENERAL and GENERAL[name].resume
        if callable(may_change):
            may_change = may_change(cfg)
        if name not in before and before.get("method") == cfg.method:
            raise Refused(f"{cfg.out} was begun by another version of opd, without {name}; continue it with "
                          "that one, or choose another --out")
        if now[name] != before.get(name) and not may_change:
            if name.endswith("_sha256"):
                then = before.get(name) if isinstance(before.get(name), dict) else {}
                others = [key for key in {**then, **now[name]} if now[name].get(key) != then.get(key)]
                raise Refused(f"--resume with another content of {', '.join(others)} would be another "
                              "experiment; choose another --out")
            raise Refused(f"--resume with another {name} ({now[name]}, was {before.get(name)}) would be "
                          "another experiment; choose another --out")
