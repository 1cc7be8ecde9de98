"""ExOPD: on-policy distillation beyond the teacher, away from where the student started (arXiv 2602.12125).

    A_t = lambda log q(y_t)/r(y_t) - log p(y_t)/r(y_t)              r the reference: the student as it started

is the gap to an extrapolated teacher q', log q'(y) = lambda log q(y) + (1 - lambda) log r(y), which is not
normalised: a constant in A has no expected gradient. lambda 1 is OPD; the optimum is p proportional to q'.
"""
from config import POSITIVE, Refused

from . import START, Job, as_the_student_sees, method


def check(cfg):
    """Refuse a reference that moves with the student."""
    if cfg.self_teacher != "frozen":
        raise Refused(f"--self_teacher {cfg.self_teacher}: the reference of --method exopd is the student as "
                      "it started, frozen")


@method(losses=("pg",), check=check, defaults=dict(rollouts=1) | START)
def exopd(run, *, exopd_lambda: POSITIVE = 1.25):
    """On-policy distillation from an extrapolated teacher: what it does more than the reference, enlarged.

    exopd_lambda    how far beyond the reference; 1 = to the teacher, 1.25 the paper's, at 1.5 it was unstable
    """
    reference = run.self_teacher(run.student)
    for step in run.steps():
        jobs = run.route(run.sample(run.student, run.draw()))           # one Job per branch, with its teacher
        run.score(jobs)                                                 # fills log p(y), log q(y)
        for job in jobs:
            known = Job(run.student, reference, as_the_student_sees(job.rollouts), job.objective, lp=job.lp)
            run.score([known])                                          # fills log r(y)
            job.lq = [exopd_lambda * lq_T + (1 - exopd_lambda) * lr_T
                      for lq_T, lr_T in zip(job.lq, known.lq)]
        yield jobs
