"""Learning from oneself: the teacher is the student itself, shown something that helps beside the prompt."""
from data.graders import complaint
from data.prompts import prompt_text

from . import EMA, FROZEN, any_divergence, by_prompt, jobs_by_branch, method, prompt_key, written_once
from .feedback import reprompt, with_answer


def reads_answer(run, model, row):
    """Return what a self-teacher reads that is told the answer."""
    return model.encode(with_answer(row["prompt"], run.templates, row["answer"]))


@method(losses=("nll",), teachers="none", needs=("answer",), defaults=FROZEN, reads=reads_answer)
def star(run):
    """Maximum likelihood on the student's own rationales: it is told the answer and writes how to get there.

    After STaR's rationalisation, 2203.14465: the self-teacher, here the student as it started, writes once
    per prompt. What does not end in the answer it was told is left out, and the student is not told.
    """
    def write(prompts):
        hinted = [p | {"prompt": with_answer(p["prompt"], run.templates, p["answer"])} for p in prompts]
        return run.sample(run.self_teacher(run.student), hinted, n=1)

    for step in run.steps():
        rollouts = written_once(run, run.draw(), write)
        correct = [float(r.reward == 1) for r in rollouts]
        yield jobs_by_branch(run, run.student, None, rollouts, correct)


def reads_solution(run, model, row):
    """Return the longest prompt of a self-teacher that reads the reference solution."""
    if not (seen := reprompt(row["prompt"], run.templates, row["solution"])):
        raise ValueError('"solution" is blank, so its self-teacher would see nothing')
    return model.encode(seen)


@method(losses=any_divergence("fkl"), teachers="none", needs=("solution",), reads=reads_solution,
        defaults=FROZEN | dict(rollouts=1, entry_clip=0.05, temperature=1.1, max_new_tokens=1024,
                               teacher_chat_template_kwargs={"enable_thinking": True}))
def opsd(run):
    """On-policy self-distillation: the self-teacher, the student as it started, sees the reference solution.

    Zhao et al., 2601.18734v3: forward KL over the full vocabulary, each entry clipped before the sum. The
    clip is their code's default; its scripts have others, down to 1e-7. The defaults are the paper's, but
    for its sampling from the top 20 and .95, and its student that does not think: for that switch off its
    thinking by --chat_template_kwargs. The teacher thinks where its template has Qwen3's switch. Another
    --loss has the same clip and temperature, unless they are given, too.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield self_taught(run, run.student, rollouts, [r.prompt["solution"] for r in rollouts])


def reads_rollout(run, model, row):
    """Return the longest prompt of a self-teacher that reads another rollout and the environment's word.

    The rollout is not known yet: it is some token, as often as the rollout may be long.
    """
    seen = reprompt(row["prompt"], run.templates, "x", complaint(row["grader"], ""))
    ids = model.encode(seen)
    return ids + ids[-1:] * run.cfg.max_new_tokens


@method(losses=any_divergence("jsd"), teachers="none", needs=("answer",), reads=reads_rollout,
        defaults=EMA | dict(rollouts=8, importance_cap=2.0, support="student_tail", top_k=100))
def sdpo(run, *, no_environment: bool = False):
    """Self-distillation policy optimisation: the teacher is the student that sees how it can be done.

    Hübotter et al., 2601.20802. It sees another rollout of the student's own that is correct, or else what
    the environment had to say, here that an answer cannot be graded. Rollouts with neither have no loss.

    no_environment  say nothing about answers that cannot be graded; OPCoD's baseline
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        solutions = demonstrations(rollouts)
        environment = [None if solution or no_environment else complaint(r.prompt["grader"], r.text)
                       for r, solution in zip(rollouts, solutions)]
        yield self_taught(run, run.student, rollouts, solutions, environment)


def self_taught(run, student, rollouts, solutions, environment=None, peer=None):
    """Return Jobs with the student's self-teacher, which reads what is given beside each rollout's prompt.

    A rollout has no weight if nothing is given, or if the text leaves no room for the rollout (what was
    decoded may have more tokens when it is read).
    """
    teacher, nothing = run.self_teacher(student), [None] * len(rollouts)
    weights = []
    for r, *given in zip(rollouts, solutions, environment or nothing, peer or nothing, strict=True):
        seen = reprompt(r.prompt["prompt"], run.templates, *given)
        ids = teacher.encode(seen) if seen else None
        informed = bool(ids) and run.fits(ids, len(r.ids_T))
        if informed:
            r.teacher_ids = ids
            r.notes["teacher_sees"] = prompt_text(seen)
        weights.append(float(informed))
    return jobs_by_branch(run, student, teacher, rollouts, weights)


def demonstrations(rollouts):
    """Return for every rollout the earliest correct one of its prompt but itself; None: there is none."""
    groups, out = by_prompt(rollouts), []
    for r in rollouts:
        others = [other for other in groups[prompt_key(r.prompt)] if other is not r and other.reward == 1]
        out.append(others[0].text if others else None)
    return out
