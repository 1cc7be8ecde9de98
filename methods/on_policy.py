"""On-policy distillation with one teacher, or with several that each have a branch of prompts."""
from . import DIAGNOSED, Job, any_divergence, method


@method(losses=any_divergence("rkl", "pg"), teachers="one", defaults=DIAGNOSED | dict(rollouts=1))
def opd(run):
    """On-policy distillation: the student writes, the teacher's distribution corrects each token it wrote.

    GKD, 2306.13649, with lambda 1; the reverse KL is MiniLLM's, 2306.08543.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield [Job(run.student, run.teacher, rollouts, run.objective)]


@method(losses=any_divergence("pg"), defaults=DIAGNOSED | dict(rollouts=1))
def mopd(run):
    """Multi-teacher OPD: a step mixes all branches, each routed to its teacher. CaMOPD 2605.27115, eq. 1-3.

    The branches' shares of the batch are --mixture. Every rollout of the batch weighs the same, so with equal
    shares the gradient is that of eq. 3 divided by the number of branches.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield run.route(rollouts)                               # one Job per branch, each with its teacher
