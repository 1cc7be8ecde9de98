"""Learning from fixed data: maximum likelihood, sequence-level and word-level distillation, and GKD."""
import random

from config import SHARE

from . import Job, any_divergence, method, written_once


@method(losses=("nll",), teachers="none", needs=("solution",), samples=False)
def sft(run):
    """Maximum likelihood on the prompt files' `solution`s."""
    for step in run.steps():
        rollouts = run.references(run.draw())
        yield [Job(run.student, None, rollouts, run.objective)]


@method(losses=("nll",))
def seqkd(run):
    """Sequence-level distillation: maximum likelihood on the teachers' greedy completions.

    Kim & Rush, 1606.07947. Greedy decoding stands for the mode that the paper finds by beam search.
    """
    def write(prompts):
        rollouts = []
        for branch in run.branches:
            some = [prompt for prompt in prompts if prompt["branch"] == branch]
            rollouts += run.sample(run.teachers[branch], some, n=1, temperature=0)
        return rollouts

    for step in run.steps():
        rollouts = written_once(run, run.draw(), write)
        yield [Job(run.student, None, rollouts, run.objective)]


@method(losses=any_divergence("fkl"), needs=("solution",), samples=False, defaults=dict(ce_weight=0.0))
def kd(run):
    """Word-level KD: the teachers' distributions on the files' `solution`s. Hinton et al., 1503.02531."""
    for step in run.steps():
        yield run.route(run.references(run.draw()))


@method(losses=any_divergence("jsd"), needs=("solution",), defaults=dict(rollouts=1))
def gkd(run, *, gkd_lambda: SHARE = 0.5):
    """Generalised KD: a step is on-policy with probability lambda, else on fixed data. 2306.13649, alg. 1.

    gkd_lambda  share of on-policy steps
    """
    for step in run.steps():
        coin = random.Random(f"gkd {run.cfg.seed} {step}").random()
        prompts = run.draw()
        rollouts = run.sample(run.student, prompts) if coin < gkd_lambda else run.references(prompts)
        yield run.route(rollouts)
