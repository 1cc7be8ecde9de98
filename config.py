"""The command line as a table: every flag with its unit, default and source, and what its text may be."""
import argparse
import json
import math
import re
from pathlib import Path

import torch


def fail(message):
    """End the program with one line that says what is wrong and what would be right."""
    raise SystemExit(f"opd.py: {message}")


def first_line(error):
    """What somebody else's exception says, short enough for `fail`."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def pairs(values, flag, default):
    """["general=a", "domain=b"] -> {"general": "a", "domain": "b"}; a single bare value: {default: value}."""
    out = {}
    for value in values:
        name, found = re.fullmatch(r"(?:([^\W\d][\w-]*)=)?(.*)", value, re.S).groups()
        if name and Path(value).exists():           # a path with = in it
            name, found = None, value
        if found.startswith("~"):                   # the shell leaves BRANCH=~/x alone
            found = str(Path(found).expanduser())
        if not found:
            fail(f"{flag} {value!r} names nothing")
        if name is None and len(values) > 1:
            fail(f"several {flag} need names: BRANCH={value}")
        if (name := name or default) in out:
            fail(f"two {flag} are called {name}")
        out[name] = found
    return out


def per_branch(values, branches, flag, default, most=math.inf):
    """["general=2"] or ["0.8"] -> {branch: float}; branches that are not named keep their default."""
    given = pairs(values, flag, "")
    for name, value in given.items():
        if name and name not in branches:
            fail(f"{flag} names {name}, but the branches are: {', '.join(branches)}")
        try:
            given[name] = number(float, least=0, most=most)(value)
        except ValueError:
            fail(f"{flag} {value} is not a number")
        except argparse.ArgumentTypeError as error:
            fail(f"{flag} {error}")
    return {branch: given.get(branch, given.get("", default(branch))) for branch in branches}


def shares(flag, text, branches):
    """Check "3:1": one positive whole number for each branch."""
    counts = text.split(":")
    if len(counts) != len(branches) or not all(n.isdecimal() and int(n) for n in counts):
        example = ":".join(["3", "1", "1", "1", "1"][:len(branches)])
        fail(f"{flag} {text} is not a positive whole number for each of the {len(branches)} branches "
             f"({', '.join(branches)}), as in {example}")


def number(kind, least=None, above=None, most=math.inf):
    """A type for argparse: an int or a finite float within bounds."""
    def parse(text):
        value = kind(text)
        enough = value >= least if above is None else value > above
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not (enough and value <= most):
            low = f"at least {least}" if above is None else f"above {above}"
            high = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {low}{high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def json_object(text):
    value = json.loads(text)
    if not isinstance(value, dict) or "tokenize" in value:
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object with options of the chat template")
    return value


COUNT, AMOUNT, FINITE = number(int, least=1), number(int, least=0), number(float, above=-math.inf)
POSITIVE, NOT_NEGATIVE, SHARE = number(float, above=0), number(float, least=0), number(float, least=0, most=1)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, [], {}) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def parser(about, methods, losses, divergences, supports, recipes):
    """The argparse parser of opd.py. methods, losses, .. recipes: the tables whose names are choices.

    Every knob in `divergences` becomes a flag of its own name.
    """
    p = Parser(prog="opd.py", description=about, usage="python opd.py --student PATH [flags]",
               formatter_class=lambda prog: Help(prog, width=110, max_help_position=30))
    p._negative_number_matcher = re.compile(r"-\.?\d")          # argparse takes -1e-3 for a flag
    add = p.add_argument_group("what").add_argument
    add("--student", nargs="+", default=[], metavar="PATH",
        help="the model that learns: a folder or hub id, as from_pretrained takes it; opcod has two, the "
             "first stronger in the first branch of prompts, the second in the second")
    add("--teachers", nargs="+", default=[], metavar="[BRANCH=]PATH",
        help="frozen models with the student's tokenizer; one for all prompts, or one per branch")
    add("--prompts", nargs="+", default=[], metavar="[BRANCH=]FILE",
        help="JSON lines with prompt, optional answer, grader, solution (data/prompts.py), or a public set as "
             "openai/gsm8k (data/convert.py); one per branch. For camopd the first is the branch to recover, "
             "the others are preserved")
    add("--val_prompts", nargs="+", metavar="BRANCH=FILE",
        help="opcod: prompts with answers for the gate, one file per branch, neither trained nor evaluated "
             "on")
    add("--eval_prompts", nargs="+", default=[], metavar="[NAME=]FILE",
        help="prompts with answers, never trained on; a public set may name a split, as "
             "'openai/gsm8k:test[:200]'")
    add("--method", choices=methods,
        help="methods.py; default: opd with one teacher, mopd with several, sft with none")
    add("--out", metavar="DIR",
        help="the run's folder; default: runs/METHOD-LOSS-seedN, for a recipe runs/RECIPE")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--dry_run", action="store_true",
        help="read configs, tokenizers and prompts only, say what the run would do and need, write nothing; "
             "with --device cuda for a GPU that is not here")

    add = p.add_argument_group("objective (losses.py)").add_argument
    add("--loss", choices=losses,
        help="a divergence, pg (sampled-token policy gradient) or nll; default: the method's")
    for knob in dict.fromkeys(row.knob for row in divergences.values() if row.knob):
        rows = {name: row for name, row in divergences.items() if row.knob == knob}
        default, about = (getattr(next(iter(rows.values())), field) for field in ("default", "about"))
        pair = isinstance(default, tuple)
        add(f"--{knob}", type=FINITE, default=list(default) if pair else default,
            help=f"{' and '.join(rows)}: {about}", **(dict(nargs=2, metavar=("A", "B")) if pair else {}))
    add("--target", choices=("teacher", "veto", "taid"), default="teacher",
        help="what the divergence compares with: the teacher; q p^beta, renormalised, with beta falling to 0 "
             "(Veto 2601.07155); a mixture of both models' logits (TAID 2501.16937)")
    add("--veto_beta", type=NOT_NEGATIVE, default=0.8, help="veto: beta at the first step, 0 at the last")
    add("--taid_start", type=SHARE, default=0.4,
        help="taid: the teacher's share at the first step, 1 at the last")
    add("--support", choices=supports,
        help="which entries count (default: full; sdpo, opcod: student_tail with top_k 100): all, or the "
             "--top_k largest of student or teacher; what becomes of the others: raw and sg nothing (sg "
             "without the gradient of the kept mass), renorm they have no probability, tail they are one "
             "more entry; 2605.11182")
    add("--top_k", type=COUNT, help="entries of a --support")
    add("--loss_temperature", type=POSITIVE, default=1.0, help="divides both models' logits in the loss")
    add("--importance_cap", type=NOT_NEGATIVE, metavar="C",
        help="grpo, sdpo, opcod: every token's weight is multiplied by min(p_train / p_sampler, C); 0 = it "
             "is not; default: 2; OPCoD 2606.14368, table 4")
    add("--importance", type=NOT_NEGATIVE, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"),
        help="pg: tokens whose p_train / p_sampler is outside have weight 0; Nemotron-Cascade 2, 2603.19220")

    add = p.add_argument_group("method (methods.py)").add_argument
    add("--mixture", metavar="N:M", help="shares of the branches in a mixed batch; default: equal")
    add("--gkd_lambda", type=SHARE,
        help="gkd: fraction of on-policy steps; default: 0.5; GKD 2306.13649, alg. 1")
    add("--schedule", metavar="N:M",
        help="camopd: N steps of the first branch, M of the second, ..; "
             "'mixed': all in every step; default: 3:1; CaMOPD eq. 5")
    add("--mass", nargs="+", metavar="[BRANCH=]RHO",
        help="camopd: share of the gap mass that the kept rollouts hold, 1 keeps all; default: 0.8; "
             "CaMOPD eq. 8")
    add("--scale", nargs="+", metavar="[BRANCH=]R",
        help="camopd: factor on the branch's loss; "
             "default: 2 for the first branch, 1 for the others; CaMOPD eq. 9")
    add("--focus", type=SHARE,
        help="focus: share of every branch's prompts that are asked again because their gap was the largest; "
             "ours; default: 0.5")
    add("--self_teacher", choices=("ema", "frozen", "live"),
        help="the student as its own teacher: its moving average, as it started, as it is; default: ema for "
             "sdpo and opcod, frozen for opsd and star")
    add("--ema_rate", type=SHARE,
        help="share of the student that its average takes up per update; default: 0.05; SDPO 2601.20802")
    add("--templates", metavar="FILE",
        help="JSON with the texts that self-teachers and tutors read; default: those of methods/feedback.py")
    add("--no_environment", action="store_true", default=None,
        help="sdpo: say nothing about answers that cannot be graded; OPCoD's baseline")
    add("--rounds", type=COUNT,
        help="opcod: rounds R; each has --steps / R updates of one student, then of the other; default: 2")
    add("--gate", choices=("cognizance", "always", "never", "selective"),
        help="opcod: when a tutor gives feedback: cognizance gap within --tau, always, never, or beyond "
             "--tau on prompts of the domain it is stronger in; default: cognizance; OPCoD fig. 7")
    add("--tau", type=NOT_NEGATIVE,
        help="opcod: largest cognizance gap of a tutor; default: 0.2; OPCoD eq. 2")
    add("--gate_rollouts", type=COUNT,
        help="opcod: completions per validation prompt, as in evaluation; default: 16")
    add("--break_prompts", type=AMOUNT,
        help="opcod: validation prompts per domain on which every round measures how many correct rollouts "
             "feedback breaks; 0 = none; default: 8; OPCoD app. E")
    add("--no_anchor", action="store_true", default=None,
        help="opcod: tutors need not name a concept of the question first; only answers are removed")
    add("--feedback_tokens", type=COUNT, help="opcod: longest feedback, in tokens; default: 1024")

    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=COUNT, default=100, help="optimizer steps of each student")
    add("--batch", type=COUNT, default=32, help="prompts per step")
    add("--rollouts", type=COUNT,
        help="completions per prompt that the student samples; default: 1, for grpo, sdpo, opcod 8")
    add("--lr", type=POSITIVE, help="peak learning rate; default: 1e-5, with --lora_rank 1e-4")
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default="constant",
        help="after the warm-up")
    add("--warmup", type=AMOUNT, default=0, help="steps of linear warm-up")
    add("--optimizer", choices=("adamw", "muon", "sgd"), default="adamw",
        help="muon: hidden matrices by Muon, scaled to AdamW's step size, the rest by AdamW")
    add("--adam_beta2", type=SHARE, default=0.95, help="AdamW's second beta (the first is 0.9)")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.01, help="on matrices; norms and biases do not decay")
    add("--grad_clip", type=NOT_NEGATIVE, default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--micro_tokens", type=COUNT, default=4096,
        help="tokens per forward pass with padding: memory, not results")
    add("--gradient_checkpointing", action="store_true",
        help="compute every layer again in the backward pass: less memory for one more forward pass")
    add("--lora_rank", type=AMOUNT, default=0,
        help="train a LoRA adapter of this rank on all linear layers (not on experts that are one tensor) "
             "instead of the weights, which then are kept in --dtype; needs peft; 0 = no adapter")
    add("--lora_alpha", type=POSITIVE, default=32.0,
        help="LoRA: the adapter's product is scaled by alpha / rank; 32 is that of 'LoRA Without Regret'")

    add = p.add_argument_group("sampling and evaluation").add_argument
    add("--temperature", type=POSITIVE, default=1.0,
        help="of the rollouts; anything but 1 is off-policy, and said so")
    add("--top_p", type=number(float, above=0, most=1), default=1.0,
        help="of rollouts; likewise")
    add("--max_new_tokens", type=COUNT,
        help="longest completion, in tokens; default: 512, or 2048 where the chat template lets the student "
             "think")
    add("--sample_batch", type=COUNT, default=64, help="completions generated at a time")
    add("--chat_template_kwargs", type=json_object, default={}, metavar="JSON",
        help="passed to the chat template, e.g. '{\"enable_thinking\": false}'")
    add("--eval_every", type=AMOUNT, default=0,
        help="steps, of both students together, between evaluations; 0 = before and after training only")
    add("--eval_rollouts", type=COUNT, default=1,
        help="completions per evaluation prompt; the score is their mean")
    add("--eval_temperature", type=NOT_NEGATIVE, default=0.0, help="0 = greedy")
    add("--eval_top_p", type=number(float, above=0, most=1), help="of sampled evaluation; default: --top_p")

    add = p.add_argument_group("diagnosis: what the gradients are like (lab/diagnosis.py)").add_argument
    add("--diagnose_every", type=AMOUNT, metavar="K",
        help="opd, mopd, camopd, focus: before the first step, after every K and the last, measure cosine, "
             "coherence and noise of the gradients, the gap's spread, and the size of each branch's step; "
             "default: 0, never; CaMOPD sec. 4.4")
    add("--diagnose_rollouts", type=number(int, least=2), metavar="N",
        help="rollouts per branch for it, of different prompts as far as there are, one backward pass each; "
             "default: --batch, at most 64")
    add("--diagnose_layers", type=AMOUNT, metavar="N",
        help="gradients of the last N layers only, without the steps: an estimate that costs less for large "
             "models; default: 0, all parameters, with memory for four more gradients per branch")

    add = p.add_argument_group("the machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--teacher_device", choices=("cuda", "cpu", "swap"),
        help="cpu: teachers compute there, slowly; swap: they wait in main memory and are on the GPU only "
             "while they score or write. Default: as --device")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the computation; what learns is kept in float32. Default: bfloat16 on cuda, float32 on cpu")
    add("--seed", type=number(int, least=0, most=2**40), default=0, help="of prompts' order and sampling")
    add("--save_every", type=AMOUNT, default=100, help="steps between checkpoints; 0 = at the end only")
    add("--log_samples", type=AMOUNT, default=2, help="rollouts per step and Job that samples.jsonl keeps")

    add = p.add_argument_group("recipes: a whole table in one command (lab/recipes.py)").add_argument
    add("--recipe", choices=recipes,
        help="run its rows, each a call of this program; run again, it continues")
    add("--seeds", type=COUNT, default=1,
        help="recipe: repetitions with seeds 0, 1, ..; the table shows mean and spread")
    add("--quick", action="store_true", help="recipe: a short form of every row")
    add("--jobs", type=COUNT, default=1, help="recipe: seeds that run at the same time")
    return p


def check_students(cfg, method, branches):
    """As many students as the method has; two of them have a domain, validation prompts and a turn each."""
    if len(cfg.student) != method.students:
        fail(f"--method {cfg.method} has one student; two tutor each other with --method opcod"
             if method.students == 1 else
             f"--method {cfg.method} needs two students, --student A B, but got {len(cfg.student)}")
    cfg.val_prompts = pairs(cfg.val_prompts or [], "--val_prompts", "main")
    if method.students == 1:
        return
    if len(branches) != 2:
        fail(f"--method {cfg.method} needs two branches of prompts, the first student's domain and the "
             "second's, as in --prompts physics=p.jsonl chemistry=c.jsonl, but --prompts has: "
             + ", ".join(branches))
    if cfg.val_prompts.keys() != cfg.prompts.keys():
        fail(f"--method {cfg.method} needs validation prompts for every branch ({', '.join(branches)}), but "
             f"--val_prompts has: {', '.join(cfg.val_prompts) or 'none'}")
    if cfg.steps % cfg.rounds:
        fail(f"--steps {cfg.steps} is not a multiple of --rounds {cfg.rounds}: every round has steps / "
             "rounds updates of each student")


def check_effects(cfg, changed):
    """None of `changed` (flags that are not default) is without effect, and no run can only learn nothing."""
    for flag in ("eval_rollouts", "gate_rollouts"):
        if flag in changed and getattr(cfg, flag) > 1 and not cfg.eval_temperature:
            fail(f"--{flag} {getattr(cfg, flag)} has no effect at --eval_temperature 0: greedy completions "
                 "are all the same")
    if "ema_rate" in changed and cfg.self_teacher != "ema":
        fail(f"--ema_rate has no effect on --self_teacher {cfg.self_teacher}")
    for flag in ("diagnose_rollouts", "diagnose_layers"):
        if flag in changed and not cfg.diagnose_every:
            fail(f"--{flag} has no effect without --diagnose_every")
    if cfg.method == "grpo" and cfg.rollouts == 1:
        fail("--method grpo compares the rollouts of a prompt: --rollouts must be at least 2")
