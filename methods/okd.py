"""OKD-style: the teacher learns, too, in small modules beside its frozen weights (after arXiv 2409.12512).

The paper's code is not public, and we did not have its equations: what is not marked [paper] is ours.

    the teacher is frozen but for online modules, here a LoRA adapter  [paper: small modules in the teacher]
    on fixed data, without sampling from the student                                                  [paper]
    in every step both learn [paper], from the models as they are before it; sg[] is not learned from:
      L_student = D(sg[q] || p) + c CE(p)                       CE: -log of the solution's tokens
      L_teacher = mu D(q || sg[p]) + c CE(q)
    D is KL(q || p) in both; other divergences of --loss and supports are mirrored for the teacher likewise,
    whose target is always the student as it is (--target is the student's)
"""
from dataclasses import replace

from config import NOT_NEGATIVE, POSITIVE, Refused
from losses import LOSSES

from . import Job, method

MIRRORED = {"fkl": "rkl", "rkl": "fkl", "jsd": "jsd", "jeffreys": "jeffreys", "tvd": "tvd"}


def check(cfg):
    """Refuse a teacher that nothing teaches."""
    if not (cfg.teacher_pull or cfg.ce_weight):
        raise Refused("--teacher_pull 0 and --ce_weight 0 teach the teacher nothing; that is --method kd")


@method(losses=tuple(MIRRORED), needs=("solution",), samples=False, teacher_learns=True, check=check,
        defaults=dict(ce_weight=1.0, teacher_rank=8))
def okd(run, *, teacher_pull: NOT_NEGATIVE = 1.0, teacher_lr_factor: POSITIVE = None):
    """Student and teacher learn from the solutions and come towards each other.

    teacher_pull    weight mu of the teacher's divergence from the student; 0 = it learns the solutions only
    teacher_lr_factor   the teachers' learning rate as a multiple of --lr; default: 10 where only the teachers
                    have adapters, which need about ten times as much, and else 1
    """
    only_they = run.cfg.teacher_rank and not run.cfg.lora_rank
    for teacher in run.teachers.values():
        teacher.lr_factor = teacher_lr_factor or (10.0 if only_they else 1.0)
    for step in run.steps():
        jobs = run.route(run.references(run.draw()))
        yield jobs + [teachers_job(run, job, teacher_pull) for job in jobs]


def teachers_job(run, job, pull):
    """Return the Job with which the teacher of another Job learns from its student, on the same rollouts."""
    rollouts = [replace(r, prompt_ids=r.teacher_ids, teacher_ids=r.prompt_ids) for r in job.rollouts]
    own, ce = job.objective, run.cfg.ce_weight                  # D(p, q) becomes D(q, p)
    if not pull:
        nll = replace(LOSSES["nll"], temperature=own.temperature)
        return Job(job.teacher, None, rollouts, nll, [ce] * len(rollouts))
    knob = 1 - own.knob if own.divergence == "jsd" else own.knob
    whose, _, form = own.support.partition("_")                 # the same model's largest entries
    support = {"student": f"teacher_{form}", "teacher": f"student_{form}"}.get(whose, own.support)
    mirrored = replace(own, divergence=MIRRORED[own.divergence], knob=knob, support=support,
                       target=(1.0, 0.0), ce=ce / pull)
    return Job(job.teacher, job.learner, rollouts, mirrored, [pull] * len(rollouts))
