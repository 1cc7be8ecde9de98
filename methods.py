"""The methods: who learns, from whom, on what, with which weights. One paper, one short generator.

A method is a generator over training steps. It yields a list of Jobs; the loop (opd.py) scores their
rollouts, asks for their weights, takes one optimizer step on all of them together, and sends the statistics
of that step back:

    def opd(run):
        for step in run.steps():
            rollouts = run.sample(run.student, run.draw())
            yield [Job(run.student, run.teacher, rollouts, run.objective)]

What a method may use: run.student, run.teacher (the only one) or run.teachers[branch], run.objective,
run.branches, run.cfg, run.state (JSON, survives a restart), run.steps, run.draw, run.sample, run.references.

Letters as in the papers: p the student, q the teacher, y the sampled token; gap = log q(y) - log p(y).
"""
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from losses import DIVERGENCES, Objective


@dataclass
class Rollout:
    """One completion with its prompt. T tokens, the closing EOS included when there is one."""
    prompt: dict                            # a row of the prompt file: prompt, branch, answer, solution, ..
    ids_T: torch.Tensor                     # completion token ids
    logp_T: torch.Tensor | None = None      # log-probabilities as sampled; None = fixed data, off-policy
    teacher_prompt: list | None = None      # what the teacher sees instead; None = the student's prompt
    reward: float | None = None             # the grader's verdict, where the prompt has an answer
    lp_T: torch.Tensor | None = None        # log p(y) under the training forward, filled when the loop scores
    gap_T: torch.Tensor | None = None       # log q(y) - log p(y), likewise


@dataclass
class Job:
    """One student, one teacher, some rollouts, an objective. Jobs that are yielded together share a step."""
    student: Any
    teacher: Any                            # None when the objective needs no teacher
    rollouts: list
    objective: Objective
    weights: Callable | None = None         # the scored Job -> a tensor per rollout, [T] or []; None = ones
    hidden_t: list | None = None            # the teacher's states of each rollout, [T, H], from scoring


def by_branch(rollouts):
    """{branch: its rollouts}, in the order of first appearance."""
    groups = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt["branch"], []).append(rollout)
    return groups


def routed(run, rollouts):
    """One Job per branch, each with its branch's teacher."""
    return [Job(run.student, run.teachers[branch], group, run.objective)
            for branch, group in by_branch(rollouts).items()]


# ---- learning from fixed data ------------------------------------------------------------------------------

def sft(run):
    """Maximum likelihood on the prompt files' `solution`s."""
    for step in run.steps():
        yield [Job(run.student, None, run.references(run.draw()), run.objective)]


def seqkd(run):
    """Sequence-level distillation: maximum likelihood on the teachers' greedy completions.

    Kim & Rush, 1606.07947. Greedy decoding stands for the mode that the paper finds by beam search. Every
    prompt is decoded once per run.
    """
    written = {}                                                 # (branch, row) -> the teacher's completion
    for step in run.steps():
        prompts = run.draw()
        new = {(prompt["branch"], prompt["row"]): prompt for prompt in prompts}
        for branch in run.branches:
            todo = [prompt for key, prompt in new.items() if key[0] == branch and key not in written]
            for rollout in run.sample(run.teachers[branch], todo, n=1, temperature=0):
                written[branch, rollout.prompt["row"]] = rollout
        yield [Job(run.student, None, [written[p["branch"], p["row"]] for p in prompts], run.objective)]


def kd(run):
    """Word-level KD: the teachers' distributions on the files' `solution`s. Hinton et al., 1503.02531."""
    for step in run.steps():
        yield routed(run, run.references(run.draw()))


def gkd(run):
    """Generalised KD: a step is on-policy with probability lambda, else on fixed data. 2306.13649, alg. 1."""
    for step in run.steps():
        on_policy = random.Random(f"gkd {run.cfg.seed} {step}").random() < run.cfg.gkd_lambda
        prompts = run.draw()
        yield routed(run, run.sample(run.student, prompts) if on_policy else run.references(prompts))


# ---- learning from the student's own rollouts --------------------------------------------------------------

def opd(run):
    """On-policy distillation: the student writes, the teacher's distribution corrects each token it wrote."""
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield [Job(run.student, run.teacher, rollouts, run.objective)]


def mopd(run):
    """Multi-teacher OPD: a step mixes all branches, each routed to its teacher. CaMOPD 2605.27115, eq. 1-3.

    The branches' shares of the batch are --mixture. Every rollout of the batch weighs the same, so with equal
    shares the gradient is that of eq. 3 divided by the number of branches.
    """
    for step in run.steps():
        yield routed(run, run.sample(run.student, run.draw()))


def camopd(run):
    """Counteraction-aware MOPD: alternate the branches, keep the largest gaps. CaMOPD 2605.27115, alg. 1.

        b   = S(t)                               S = G..G D: n_g general steps, then one domain step   (eq. 5)
        D_t = log q_b(y_t) - log p(y_t)          the gap on sampled tokens, at rollout time
        s_i = mean_t |D_t| if general else mean_t [D_t]+                                            (eq. 6, 7)
        S_b = the shortest prefix by descending s that holds rho_b of the sum of s                     (eq. 8)
        L_b = -1/|S_b| sum_{i in S_b} 1/T_i sum_t w_t (r_b A_t) log p(y_t)                             (eq. 9)

    The first branch is the one to recover (general), the others are preserved (domain). Each part has its
    switch: --schedule mixed takes all branches in every step as mopd does (S is then pooled: every kept
    rollout of either branch weighs the same; the paper does not define this case), --mass 1 keeps every
    rollout, --scale 1 scales none.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw(scheduled(run.cfg.schedule, run.branches, step)))
        jobs = routed(run, rollouts)
        for job in jobs:
            branch = job.rollouts[0].prompt["branch"]
            score = absolute_gap if branch == run.branches[0] else positive_gap
            job.weights = gap_mass(score, run.cfg.mass[branch], run.cfg.scale[branch])
        yield jobs


def scheduled(schedule, branches, step):
    """Active branch: "3:1" is 3 steps of the first, 1 of the second; "mixed" is None, all. CaMOPD eq. 5."""
    if schedule == "mixed":
        return None
    counts = [int(n) for n in schedule.split(":")]
    period = [branch for branch, n in zip(branches, counts) for _ in range(n)]
    return period[step % len(period)]


def absolute_gap(gap_T):
    """s_g: any deviation from the general teacher is a recovery signal. CaMOPD eq. 6."""
    return gap_T.abs().mean()


def positive_gap(gap_T):
    """s_d: only tokens that the domain teacher likes better than the student does. CaMOPD eq. 7."""
    return gap_T.clamp(min=0).mean()


def gap_mass(score, mass, scale):
    """Weights of a Job: `scale` on rollouts that hold `mass` of the total score, else 0. CaMOPD eq. 8-9."""
    def weights(job):
        score_B = torch.stack([score(rollout.gap_T) for rollout in job.rollouts])
        return list(scale * top_gap_mass(score_B, mass).to(score_B.dtype))
    return weights


def top_gap_mass(score_B, mass):
    """Boolean [B]: the shortest prefix by descending score that holds `mass` of the total. CaMOPD eq. 8.

    score_B: non-negative, one per rollout. mass >= 1 and an all-zero score keep everything.
    """
    assert torch.isfinite(score_B).all() and (score_B >= 0).all(), score_B
    total = score_B.double().sum()
    if mass >= 1 or total == 0:
        return torch.ones_like(score_B, dtype=torch.bool)
    order_B = score_B.argsort(descending=True, stable=True)
    held_B = score_B[order_B].double().cumsum(0) / total         # float32 would reach the total too early
    keep_B = torch.zeros_like(score_B, dtype=torch.bool)
    keep_B[order_B[: int((held_B < mass - 1e-9).sum()) + 1]] = True
    return keep_B


@dataclass(frozen=True)
class Method:
    steps: Callable                         # the generator
    losses: tuple                           # names in losses.LOSSES that make sense with it, its own first
    solutions: bool = False                 # learns from the prompt files' `solution`s
    samples: bool = True                    # generates completions of the training prompts


def any_divergence(first, *others):
    """Names of all divergences, the method's own one first."""
    return tuple(dict.fromkeys([first, *DIVERGENCES, *others]))


METHODS = {
    "sft": Method(sft, ("nll",), solutions=True, samples=False),
    "seqkd": Method(seqkd, ("nll",)),
    "kd": Method(kd, any_divergence("fkl"), solutions=True, samples=False),
    "gkd": Method(gkd, any_divergence("jsd"), solutions=True),
    "opd": Method(opd, any_divergence("rkl", "pg")),
    "mopd": Method(mopd, any_divergence("pg")),
    "camopd": Method(camopd, any_divergence("pg")),
}
