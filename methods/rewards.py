"""Learning from rewards: group-relative policy optimisation."""
from config import Refused

from . import by_prompt, jobs_by_branch, method, prompt_key


def check(cfg):
    """Refuse a single rollout per prompt, which has nothing to be compared with."""
    if cfg.rollouts == 1:
        raise Refused("--method grpo compares the rollouts of a prompt: --rollouts must be at least 2")


@method(losses=("nll",), teachers="none", needs=("answer",), check=check,
        defaults=dict(rollouts=8, importance_cap=2.0, kl_weight=0.0))
def grpo(run):
    """Group-relative policy optimisation, one update per batch: -(1/n) sum_i A_i 1/T_i sum_t w_t log p(y_t).

    A_i = r_i - the mean reward of the rollouts of its prompt. DeepSeekMath, 2402.03300, as the baseline of
    OPCoD (2606.14368, app. D.3): no division by the standard deviation, w_t = min(p / p_sampler, 2), and no
    KL without --kl_weight.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        jobs = jobs_by_branch(run, run.student, None, rollouts, advantages(rollouts))
        for job in jobs:
            job.count = len(job.rollouts)               # n counts all rollouts, also those with no advantage
        yield jobs


def advantages(rollouts):
    """Return A_i of every rollout: its reward less the mean reward of its prompt's rollouts."""
    mean = {key: sum(r.reward for r in group) / len(group) for key, group in by_prompt(rollouts).items()}
    return [r.reward - mean[prompt_key(r.prompt)] for r in rollouts]
