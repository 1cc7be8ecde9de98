"""On-policy distillation with one teacher, or with several that each have a branch of prompts."""
from config import Refused

from . import DIAGNOSED, TOKENS, Job, any_divergence, method
from .token_weights import check_tokens


def check(cfg):
    """Refuse a reward that nothing is compared with, and a knob that cannot be."""
    check_tokens(cfg)
    if cfg.reward_weight and cfg.rollouts == 1:
        raise Refused("--reward_weight compares the rollouts of a prompt: --rollouts must be at least 2")


TERMS = TOKENS | dict(reward_weight=0.0, kl_weight=0.0)


@method(losses=any_divergence("rkl", "pg"), teachers="one", check=check,
        defaults=DIAGNOSED | TERMS | dict(rollouts=1))
def opd(run):
    """On-policy distillation: the student writes, the teacher's distribution corrects each token it wrote.

    GKD, 2306.13649, with lambda 1; the reverse KL is MiniLLM's, 2306.08543.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield [Job(run.student, run.teacher, rollouts, run.objective)]


@method(losses=any_divergence("pg"), check=check,
        defaults=DIAGNOSED | TERMS | dict(rollouts=1))
def mopd(run):
    """Multi-teacher OPD: a step mixes all branches, each routed to its teacher. CaMOPD 2605.27115, eq. 1-3.

    The branches' shares of the batch are --mixture. Every rollout of the batch weighs the same, so with equal
    shares the gradient is that of eq. 3 divided by the number of branches.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield run.route(rollouts)                               # one Job per branch, each with its teacher
