"""APT-style: weakness cases and iterative preference training (after Rao et al., arXiv 2506.03483).

The paper's code is not public and its details were not to be had: what is not marked [paper] is ours.

    for round in 1 .. R:                                        the reference is the student as it is now
      a        ~ p(. | x) for every training prompt                                                   [paper]
      weak     = the prompts whose answer the grader fails (the paper: a judge scores it below 4)     [paper]
      similar  = of the other prompts the k nearest to each weak one, answered anew: [paper: "a small, similar
                 set of samples retrieved"] by the cosine of the student's mean hidden states
      pairs    = the solution is preferred over the student's own answer, for weak and similar prompts [paper]
      K steps of DPO on the pairs [paper: preference training; its loss is not known here]

The paper's claim is that general ability does not fall, since nothing else is trained on. So every round is
evaluated (--eval_every is steps / rounds), and --eval_prompts should hold general prompts, too.
"""
import torch

from config import AMOUNT, COUNT, POSITIVE, Refused

from . import check_rounds, method, prompt_key, turn
from .dpo import preference_job


def check(cfg):
    """Refuse rounds of different lengths, and a reference that no round renews."""
    check_rounds(cfg)
    if cfg.self_teacher != "snapshot":
        raise Refused(f"--method {cfg.method}: its reference is the student at the start of the round, "
                      "--self_teacher snapshot")


@method(losses=("nll",), teachers="none", needs=("solution", "answer"), check=check,
        defaults=dict(self_teacher="snapshot"))
def apt(run, *, rounds: COUNT = 4, similar: AMOUNT = 1, dpo_beta: POSITIVE = 0.1):
    """Prefer solutions over the student's own answers, where it errs and near there.

    rounds          rounds R; each has --steps / R updates, of at most --batch pairs
    similar         similar cases k that are retrieved for every weakness case
    dpo_beta        as in dpo
    """
    reference, length = run.self_teacher(run.student), run.cfg.steps // rounds              # K
    prompts = {prompt_key(prompt): prompt for rows in run.prompts.values() for prompt in rows}
    for step in run.steps():
        number, step_of_round = divmod(step, length)
        if step_of_round == 0:
            run.refresh(reference)
        cases = run.once("cases", lambda: find_cases(run, list(prompts.values()), similar), of=number)
        chosen, rejected = [], []
        for key, ids, text in turn(cases, run.cfg.batch, step_of_round, f"{run.cfg.seed} {number}"):
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


def embed(run, prompts):
    """Return [P, H] of unit length: where prompts are in the student's space, the mean of all its states."""
    ids = [run.student.encode(prompt["prompt"]) for prompt in prompts]
    # All tokens but the first count as a completion, and one more, which is predicted and never read.
    return run.student.mean_hidden([i[:1] for i in ids], [torch.tensor(i[1:] + i[-1:]) for i in ids],
                                   run.cfg.micro_tokens)
