"""focus: multi-teacher distillation that asks again where there was most to learn. Ours.

CaMOPD's selection (eq. 8) drops rollouts that teach little after the student has written them; this writes
fewer of them. A share of every branch's prompts in a batch are those that had the largest gap when they were
last asked; the others are the next ones, as in mopd.
"""
from config import SHARE

from . import DIAGNOSED, any_divergence, by_prompt, method
from .camopd import demand


@method(losses=any_divergence("pg"), defaults=DIAGNOSED | dict(rollouts=1))
def focus(run, *, focus: SHARE = 0.5):
    """Spend a share of every batch on the prompts that had the largest gap so far.

    focus       share of every branch's prompts that are asked again because their gap was the largest; ours
    """
    known = run.memory.setdefault("demand", {branch: {} for branch in run.branches})    # row -> its demand
    for step in run.steps():
        prompts = []
        for branch, count in run.shares.items():
            again = min(round(focus * count), count - 1)                # at least one prompt is a new one
            new = run.draw(branch, count=count - again)
            new += in_demand(run.prompts[branch], known[branch], again, new)
            prompts += new + run.draw(branch, count=count - len(new))   # as long as too few are known
        jobs = run.route(run.sample(run.student, prompts))
        run.score(jobs)
        for job in jobs:
            note_demand(run, job, known[job.branch])
        yield jobs


def note_demand(run, job, known):
    """Note the demand of a Job's prompts, the mean of their rollouts'."""
    gap = dict(zip(map(id, job.rollouts), job.gaps))
    for some in by_prompt(job.rollouts).values():
        scores = [demand(run, job.branch, gap[id(r)]).item() for r in some]
        known[some[0].prompt["row"]] = sum(scores) / len(scores)


def in_demand(prompts, known, count, without):
    """Return the `count` prompts with the largest known demand, or as many as are known, `without` some."""
    rows = {prompt["row"] for prompt in without}
    others = [p for p in prompts if p["row"] in known and p["row"] not in rows]
    return sorted(others, key=lambda p: -known[p["row"]])[:count]
