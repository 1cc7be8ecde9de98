"""A second term beside a method's own: a penalty on how far the student is from where it started."""
from dataclasses import replace

from losses import LOSSES

from . import Job, as_the_student_sees


def anchors(run, jobs):
    """Return a Job for each of some Jobs: beta KL(p || r) on the same rollouts, r the student as it started.

    beta is --kl_weight. It is the last term of GRPO's objective, 2402.03300, eq. 3, which estimates the KL
    from the sampled tokens (eq. 4); this one is over the whole vocabulary. r sees what the student sees.
    """
    beta, out = run.cfg.kl_weight, []
    kl = replace(LOSSES["rkl"], temperature=run.cfg.loss_temperature)
    for job in jobs:
        rollouts = as_the_student_sees(job.rollouts)
        out.append(Job(job.learner, run.self_teacher(job.learner), rollouts, kl, [beta] * len(rollouts),
                       beside="anchor"))
    return out
