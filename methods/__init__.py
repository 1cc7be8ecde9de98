"""The methods: who learns, from whom, on what, with which weights. One paper, one short file.

A method is a generator over training steps. It samples, scores and selects in the order of its paper, and
yields a list of Jobs; the loop (opd.py) takes one optimizer step on all of them together:

    @method(losses=any_divergence("rkl", "pg"), teachers="one")
    def opd(run):
        for step in run.steps():
            rollouts = run.sample(run.student, run.draw())              # the student writes
            yield [Job(run.student, run.teacher, rollouts, run.objective)]      # the teacher corrects

Letters as in the papers: p the student, q the teacher, y the sampled token; the gap is log q(y) - log p(y).

What a method may use of the run:

    run.steps()                         the steps still to do
    run.student, run.students           who learns: Learners (models.py)
    run.teacher, run.teachers[branch]   from whom: the only teacher, or a branch's
    run.self_teacher(student)           a student as its own teacher; run.refresh(it) renews it
    run.branches, run.prompts, run.shares   names and rows of the prompts, and how many of each are in a batch
    run.draw(branch, ..)                the next prompts
    run.sample(model, prompts, n)       rollouts of a model, graded where the prompt has an answer; also with
                                        temperature= and top_p=
    run.references(prompts)             the `solution`s as Rollouts; needs=("solution",) in @method
    run.fixed(prompt, ids, text)        other fixed data as a Rollout
    run.complete(model, prompts)        what a model writes after lists of token ids, ungraded
    run.route(rollouts)                 one Job per branch, each with its teacher
    run.score(jobs)                     the teachers read: fills lp, lq, and so the gaps
    run.objective                       this step's objective
    run.memory, run.once(key, make, of) what survives a restart: computed once, or once `of` a round
    run.notes                           further values for this step's line of metrics.jsonl, numbers also for
                                        the line on the screen
    run.without_side_effects()          for measurements; run.mean_rewards(model, sets, n) is one
    run.train_only(student)             with two students: the other one may leave the GPU
    run.fits(ids, n), run.timed(part)   room in the models' positions; seconds of a part of the step
    run.templates, run.gate_prompts     of --templates and --val_prompts
    run.cfg, run.state["step"]          every setting; the number of the step

and of a model, to probe it (text.py, models.py): encode, decode, generate, hidden_states, mean_hidden, and
log_probs, as in

    completions = [r.ids_T for r in rollouts]
    run.student.log_probs([r.prompt_ids for r in rollouts], completions, run.cfg.micro_tokens)
    with teacher.on_device():
        teacher.log_probs([r.teacher_ids for r in rollouts], completions, run.cfg.micro_tokens)
"""
import functools
import importlib
import inspect
import pkgutil
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from config import GENERAL, Refused
from losses import DIVERGENCES, LOSSES, Objective


@dataclass(eq=False)
class Rollout:
    """One completion with its prompt. T tokens, the closing EOS included when there is one."""
    prompt: dict                            # a row of the prompt file: prompt, branch, answer, solution, ..
    ids_T: torch.Tensor                     # the completion's token ids
    prompt_ids: list                        # the prompt's token ids as the learner sees it
    teacher_ids: list                       # the prompt's token ids as its teacher sees it
    logp_T: torch.Tensor | None = None      # log-probabilities as sampled; None: fixed data, off-policy
    text: str = ""                          # the completion without its stop token
    reward: float | None = None             # the grader's verdict, where the prompt has an answer
    notes: dict = field(default_factory=dict)   # what else samples.jsonl shows of it


@dataclass(eq=False)
class Job:
    """A learner, a teacher, some rollouts, an objective. Jobs that are yielded together share a step."""
    learner: Any
    teacher: Any                            # None when the objective needs no teacher
    rollouts: list
    objective: Objective
    weights: list | None = None             # per rollout a number, or a tensor [T], one per token; None: ones
    tokens: str = "mean"                    # a rollout's loss: "mean" or "sum" over its tokens
    beside: str = ""                        # of a term beside the method's own its name; a step's statistics
    #                                         leave it out
    count: int | None = None                # what the loss is divided by; None: the rollouts of weight not 0
    lp: list | None = None                  # log p(y) of every rollout, [T], once scored; None: not read
    lq: list | None = None                  # log q(y), likewise
    hidden_t: list | None = None            # the teacher's hidden states of every rollout, [T, H], likewise

    @property
    def gaps(self):
        """log q(y) - log p(y) of every rollout, [T] each; None where it is not known."""
        if self.lp is None:
            return [None] * len(self.rollouts)
        return [None if lp_T is None else lq_T - lp_T for lp_T, lq_T in zip(self.lp, self.lq)]

    @property
    def branch(self):
        """The branch of its rollouts' prompts; of several the first one's."""
        return self.rollouts[0].prompt["branch"]

    @property
    def cut(self):
        """Whether each rollout was cut at the length limit."""
        return [r.ids_T[-1].item() not in self.learner.stops for r in self.rollouts]

    def leave_out_cut(self):
        """Give the rollouts that were cut the weight 0 (--drop_cut)."""
        given = [1.0] * len(self.rollouts) if self.weights is None else self.weights
        self.weights = [0.0 if cut else weight for cut, weight in zip(self.cut, given, strict=True)]


# ---- groups of rollouts ------------------------------------------------------------------------------------

def prompt_key(prompt):
    """Return a text that names a prompt among all prompts of a run."""
    return f"{prompt['branch']} {prompt['row']}"


def prompts_by_key(run):
    """Return {prompt_key: prompt} of all training prompts."""
    return {prompt_key(prompt): prompt for rows in run.prompts.values() for prompt in rows}


def by_branch(rollouts):
    """Return {branch: its rollouts}, in the order of first appearance."""
    return grouped(rollouts, lambda rollout: rollout.prompt["branch"])


def by_prompt(rollouts):
    """Return {prompt_key: its rollouts}, likewise."""
    return grouped(rollouts, lambda rollout: prompt_key(rollout.prompt))


def grouped(items, key):
    """Return {key(item): [item, ..]}."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def jobs_by_branch(run, learner, teacher, rollouts, weights):
    """Return one Job per branch. The gradient is that of a single Job; the statistics are kept apart."""
    weight = {id(rollout): w for rollout, w in zip(rollouts, weights, strict=True)}
    return [Job(learner, teacher, group, run.objective, [weight[id(r)] for r in group])
            for group in by_branch(rollouts).values()]


def as_the_student_sees(rollouts):
    """Return the same rollouts for a teacher that sees no more than the student."""
    return [replace(r, teacher_ids=r.prompt_ids) for r in rollouts]


def written_once(run, prompts, write, key="written"):
    """Return a rollout for each prompt as fixed data. write(prompts) makes it, once per run.

    What was written survives a restart: run.memory[key] holds ids, text and reward of every prompt so far.
    """
    known = run.memory.setdefault(key, {})
    new = {prompt_key(p): p for p in prompts if prompt_key(p) not in known}
    for r in write(list(new.values())):
        known[prompt_key(r.prompt)] = [r.ids_T.tolist(), r.text, r.reward]
    out = []
    for prompt in prompts:
        ids, text, reward = known[prompt_key(prompt)]
        out.append(run.fixed(prompt, ids, text, reward))
    return out


def embed(run, prompts):
    """Return [P, H] of unit length: where prompts are in the student's space, the mean of all its states."""
    ids = [run.student.encode(prompt["prompt"]) for prompt in prompts]
    # All tokens but the first count as a completion, and one more, which is predicted and never read.
    with run.timed("score"):
        return run.student.mean_hidden([i[:1] for i in ids], [torch.tensor(i[1:] + i[-1:]) for i in ids],
                                       run.cfg.micro_tokens)


# ---- methods with rounds -----------------------------------------------------------------------------------

def check_rounds(cfg):
    """Refuse rounds of different lengths."""
    if cfg.steps % cfg.rounds:
        raise Refused(f"--steps {cfg.steps} is not a multiple of --rounds {cfg.rounds}: every round has "
                      "steps / rounds updates of each student")


def items_of_step(items, count, step, seed):
    """Return the `count` items of a step, or fewer if there are fewer: the steps go through all items.

    In every epoch they are shuffled anew. A step in which one ends and another begins can have an item twice.
    """
    count, out = min(count, len(items)), []
    for position in range(step * count, (step + 1) * count):
        epoch, i = divmod(position, len(items))
        out.append(items[shuffled(len(items), f"{seed} {epoch}")[i]])
    return out


@functools.lru_cache(maxsize=8)
def shuffled(count, seed):
    """Return a permutation of range(count) that depends on the seed string alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# ---- the table of methods ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class OwnFlag:
    """A method's own flag: a keyword argument of its generator."""
    default: object
    type: Callable
    about: str


@dataclass(frozen=True)
class Method:
    generator: Callable                     # run, own flags -> lists of Jobs
    losses: tuple                           # names in losses.LOSSES that make sense with it, its own first
    own: dict                               # {flag: OwnFlag}
    defaults: dict                          # every flag that it has a default of its own for -> the default
    teachers: str = "each"                  # --teachers: "each" branch has one, "one" for all, "none", or
    #                                         "any" number of them under free names, all for all prompts
    students: int = 1
    needs: tuple = ()                       # what every training prompt has to have: "solution", "answer"
    samples: bool = True                    # whether it generates completions of the training prompts
    teacher_learns: bool = False            # whether the teachers are Learners, too
    select: Callable | None = None          # run, scored Jobs, own flags: sets their weights, also for
    #                                         lab/diagnosis.py
    check: Callable | None = None           # settings: refuses what cannot work together
    reads: Callable | None = None           # run, model, row -> the longest prompt that anyone reads; refuses
    #                                         rows that the method cannot use


METHODS = {}        # name -> Method


def method(losses, *, defaults=None, **facts):
    """Register a generator as a method under its own name.

    losses: names in losses.LOSSES, its own first. defaults: {general flag: this method's default}, which are
    also the flags that exist for such methods only. facts: fields of Method.
    """
    def register(generator):
        own = {name: OwnFlag(p.default, p.annotation, help_of(generator, name))
               for name, p in inspect.signature(generator, eval_str=True).parameters.items()
               if p.kind is inspect.Parameter.KEYWORD_ONLY}
        check_registration(generator, losses, own, defaults or {})
        every = {name: flag.default for name, flag in own.items()} | (defaults or {})
        if facts.get("teachers", "each") in ("each", "one"):
            every.setdefault("teacher_system", None)        # a branch's teacher may see more than the student
        METHODS[generator.__name__] = Method(generator, losses, own, every, **facts)
        return generator
    return register


def check_registration(generator, losses, own, defaults):
    """Refuse a method whose decorator or signature cannot mean what its author meant."""
    who = f"method {generator.__name__}"
    positional = [p for p in inspect.signature(generator).parameters.values()
                  if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(positional) == 1, f"{who}: its flags stand behind a *, as in (run, *, share: SHARE = 0.5)"
    assert isinstance(losses, tuple) and set(losses) <= LOSSES.keys(), f"{who}: losses are names in LOSSES"
    assert defaults.keys() <= GENERAL.keys(), f"{who}: defaults are of general flags (config.py)"
    for name, flag in own.items():
        assert name not in GENERAL, f"{who}: {name} is a general flag; its default goes into defaults"
        assert flag.type is not inspect.Parameter.empty, f"{who}: {name} has no type"
        for other, method in METHODS.items():
            same = name not in method.own or method.own[name].type is flag.type
            assert same or other == generator.__name__, f"{who}: {name} is a flag of {other}, of another type"


def help_of(generator, name):
    """Return what a docstring says of an argument: the lines that begin with its name, in columns."""
    found = re.search(rf"^ *{name}  +(.*(?:\n {{12,}}\S.*)*)", generator.__doc__ or "", re.M)
    assert found, f"{generator.__name__}'s docstring does not explain {name}"
    return " ".join(found[1].split())


def any_divergence(first, *others):
    """Return the names of all divergences, the method's own one first."""
    return tuple(dict.fromkeys([first, *DIVERGENCES, *others]))


# ---- defaults that several methods share; they also say which methods have these flags ---------------------

DIAGNOSED = dict(diagnose_every=0, diagnose_rollouts=None, diagnose_layers=0)
TOKENS = dict(token_weight=None, token_knob=None)
START = dict(self_teacher="frozen", ema_rate=0.05)
FROZEN = START | dict(templates=None)
EMA = FROZEN | dict(self_teacher="ema")

# Last, since these files import what stands above: every file of this folder may register methods.
for file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{file.name}")

# In the order of --help; methods that ORDER does not name come last.
ORDER = """sft seqkd kd gkd okd compact opd mopd camopd focus exopd grpo dpo apt sai_dpo star opsd context
    sdpo opcod""".split()
METHODS = {name: METHODS[name] for name in ORDER} | METHODS
