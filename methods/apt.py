"""APT-style: weakness cases and iterative preference training (after Rao et al., arXiv 2506.03483).

The paper's code is not public, and we did not have its full text: what is not marked [paper] is ours.

    for round in 1 .. R:                                        the reference is the student as it is now
      a        ~ p(. | x) for every training prompt                                                   [paper]
      weak     = the prompts whose answer the grader fails         [paper: that a judge scores below 4 of 5]
      similar  = the k nearest of the other prompts for every weak one, by the cosine of the student's mean
                 hidden states, answered anew                [paper: "a small, similar set" that is retrieved]
      pairs    = the solution is preferred over the own answer: for weak prompts [paper], and for similar ones
      updates by DPO on the pairs                         [paper: preference training; its loss is not known]

The paper's claim is that general ability does not fall, since nothing else is trained on. So every round is
evaluated (--eval_every is steps / rounds), and --eval_prompts should hold general prompts, too. A judge, as
the paper has one, is a grader of one's own.
"""
from config import AMOUNT, COUNT, POSITIVE

from . import embed, items_of_step, method, prompt_key, prompts_by_key
from .dpo import check_rounds_and_reference, preference_job


@method(losses=("nll",), teachers="none", needs=("solution", "answer"), check=check_rounds_and_reference,
        defaults=dict(self_teacher="snapshot"))
def apt(run, *, rounds: COUNT = 4, similar: AMOUNT = 1, dpo_beta: POSITIVE = 0.1):
    """Prefer solutions over the student's own answers, where it errs and near there.

    rounds          rounds R; each has --steps / R updates of each student
    similar         similar cases k that are retrieved for every weakness case
    dpo_beta        as in dpo
    """
    reference, length = run.self_teacher(run.student), run.cfg.steps // rounds
    prompts = prompts_by_key(run)
    for step in run.steps():
        number, step_of_round = divmod(step, length)
        if step_of_round == 0:
            run.refresh(reference)
        cases = run.once("cases", lambda: find_cases(run, list(prompts.values()), similar), of=number)
        chosen, rejected = [], []
        for key, ids, text in items_of_step(cases, run.cfg.batch, step_of_round, f"{run.cfg.seed} {number}"):
            chosen += run.references([prompts[key]])
            rejected.append(run.fixed(prompts[key], ids, text))
        # A round in which nothing is wrong has a step that changes nothing.
        rollouts = chosen + rejected or run.references(run.draw())
        yield [preference_job(run, reference, rollouts, list(zip(chosen, rejected)), dpo_beta)]


def find_cases(run, prompts, similar):
    """Return [(prompt's key, the student's answer as token ids, as text)] of weakness and similar cases."""
    answers = run.sample(run.student, prompts, n=1)
    weak = [r for r in answers if r.reward < 1]
    others = [r.prompt for r in answers if r.reward >= 1]
    near = run.sample(run.student, nearest(run, [r.prompt for r in weak], others, similar), n=1)
    cases = [r for r in weak + near if r.text != r.prompt["solution"]]      # nothing is preferred over itself
    run.notes["round"] = {"answered": len(answers), "weakness cases": len(weak), "similar cases": len(near),
                          "of these wrong": sum(r.reward < 1 for r in near), "pairs": len(cases)}
    return [(prompt_key(r.prompt), r.ids_T.tolist(), r.text) for r in cases]


def nearest(run, prompts, others, count):
    """Return the `count` of the other prompts that are nearest to each prompt, each once."""
    if not (prompts and others and count):
        return []
    near_PK = (embed(run, prompts) @ embed(run, others).T).topk(min(count, len(others)), dim=1).indices
    return [others[i] for i in dict.fromkeys(near_PK.flatten().tolist())]
