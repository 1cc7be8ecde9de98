"""On-policy context distillation: learning to do without a text what one does with it."""
from data.check import check_messages

from . import START, any_divergence, jobs_by_branch, method


def reads(run, model, row):
    """Return what the self-teacher reads, of which every word must be in its chat template."""
    check_messages(row["teacher_prompt"], model)
    return model.encode(row["teacher_prompt"])


@method(losses=any_divergence("rkl", "pg"), teachers="none", needs=("teacher_prompt",), reads=reads,
        defaults=START | dict(teacher_system=None, rollouts=1))
def context(run):
    """On-policy context distillation: the self-teacher sees a context c and the prompt x, the student x.

    L = 1/T sum_t KL(p(. | x, y_<t) || q(. | c, x, y_<t)) with y ~ p(. | x): OPCD, 2602.12275, eq. 1, with the
    student as it started for q (their default; on the student's top k, where ours is the full vocabulary).
    c and x together are the row's teacher_prompt, or x with the text of --teacher_system. A demonstration as
    c and --self_teacher ema is SDFT, 2601.19897; "be concise" or rules of safety are system messages. With a
    larger model for q it is --method opd, which shows its teacher the same.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield jobs_by_branch(run, run.student, run.self_teacher(run.student), rollouts, [1.0] * len(rollouts))
