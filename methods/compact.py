"""COMPACT-style: rationales of several teachers, each as far as it suits the student (after 2601.13992).

The paper's code is not public, and we did not have its equations: what is not marked [paper] is ours.

    for every prompt x with its answer y, and teachers k = 1 .. K, each with a rationale r_k:
      c_k = mean cosine of r_k and the other rationales in the student's space    [paper: consensus, a graph]
      m_k = log p(y | x, r_k) - log p(y | x)       [paper: adaptability, mutual information, "epiphanies"]
      d_k = log p(r_k | x) per token                                         [paper: difficulty, by the loss]
      w   = softmax over k of (z(c) + z(m) + z(d)) / tau, without gradient  [paper: weights of the gradients]
    L = mean over prompts of sum_k w_k NLL(r_k, y | x)                             NLL: mean over the tokens

z() is the distance from the mean over k in standard deviations, 0 where all are alike; so of two teachers it
is 1 and -1, whatever the distance, and their consensus says nothing. A teacher is a model of --teachers,
which writes once, greedily, or a name in a prompt row's "rationales". What it says before its answer is its
rationale; y is the right answer, whatever the teacher said, in the form in which the teacher gave its own.
"""
from collections import Counter

import torch

from config import POSITIVE, Refused
from data.check import check_completion
from data.graders import split_at_answer

from . import Job, grouped, method, prompt_key, written_once


def reads(run, model, row):
    """Refuse a row whose rationales are not texts, or that has fewer than two teachers."""
    texts = row.get("rationales", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise Refused('"rationales" is an object that has a text for each teacher\'s name')
    for name, text in texts.items():
        if text.strip():                                    # a blank one is left out and counted
            check_completion(run.student, row["prompt"], f"rationale of {name}", text)
    if len(texts.keys() | run.teachers.keys()) < len(texts) + len(run.teachers):
        raise Refused(f"a teacher has the name of one of --teachers ({', '.join(run.teachers)})")
    if len(texts) + len(run.teachers) < 2:
        raise Refused("compact weighs the rationales of at least two teachers: name several --teachers, or "
                      'have more "rationales" in the row')
    return model.encode(row["prompt"])


@method(losses=("nll",), teachers="any", needs=("answer",), reads=reads)
def compact(run, *, weight_temperature: POSITIVE = 1.0):
    """Learn the teachers' rationales, those more that others confirm, that help, and that are not too hard.

    weight_temperature  the temperature tau of the weights; the larger it is, the more alike they are
    """
    for step in run.steps():
        prompts = list({prompt_key(prompt): prompt for prompt in run.draw()}.values())      # each once
        rationales = [(name, prompt, text) for prompt in prompts
                      for name, text in prompt.get("rationales", {}).items()]
        for name, teacher in run.teachers.items():
            def write(prompts):
                return run.sample(teacher, prompts, n=1, temperature=0)
            for r in written_once(run, prompts, write, f"by {name}"):
                ended = r.ids_T[-1].item() in teacher.stops
                rationales.append((name, r.prompt, r.text if ended else None))
        yield [weighted(run, rationales, weight_temperature)]


def weighted(run, rationales, temperature):
    """Return the Job that learns weighted rationales [(teacher's name, prompt, text)] with right answers.

    Texts that do not end (None), that have no answer, or no room, are left out and counted.
    """
    encode, rollouts, answers, skipped = run.student.encode_completion, [], [], Counter()
    for name, prompt, text in rationales:
        parts = None if text is None else split_at_answer(prompt["grader"], text, prompt["answer"])
        if parts:
            rationale, answer = parts
            ids = encode(rationale)[:-1] if rationale else []   # without its EOS
            r = run.fixed(prompt, ids + encode(answer), rationale + answer)
            r.notes["teacher"] = name
        problem = ("does not end" if text is None else "gives no answer" if not parts else
                   "is too long" if not run.fits(r.prompt_ids, len(r.ids_T)) else None)
        if problem:
            skipped[f"{name} {problem}"] += 1
        else:
            rollouts.append(r)
            answers.append(len(encode(answer)))
    if skipped:
        run.notes["skipped"] = skipped
    if not rollouts:                                            # a step that changes nothing
        rows = {prompt_key(prompt): prompt for _, prompt, _ in rationales}
        rollouts = [run.fixed(prompt, encode(str(prompt["answer"])), "") for prompt in rows.values()]
        return Job(run.student, None, rollouts, run.objective, [0.0] * len(rollouts))

    with run.timed("score"):
        where, jump, ease = suitability(run, rollouts, answers)
    weights = [0.0] * len(rollouts)
    groups = grouped(range(len(rollouts)), lambda i: prompt_key(rollouts[i].prompt))
    for places in groups.values():
        cosines_KK = where[places] @ where[places].T
        consensus = (cosines_KK.sum(1) - cosines_KK.diagonal()) / max(len(places) - 1, 1)
        z_K3 = standardised(torch.stack([consensus, jump[places], ease[places]], 1).double())
        for i, w, scores in zip(places, torch.softmax(z_K3.sum(1) / temperature, 0), z_K3):
            weights[i] = w.item()
            rollouts[i].notes |= {"weight": weights[i], "scores": [round(z, 2) for z in scores.tolist()]}
    reasoned = [i for i, r in enumerate(rollouts) if len(r.ids_T) > answers[i]]
    note_weights(run, [rollouts[i] for i in reasoned], [weights[i] for i in reasoned])
    return Job(run.student, None, rollouts, run.objective, weights, count=len(groups))


def suitability(run, rollouts, answers):
    """Return where the rationales are in the student's space [R, H], and their m and d [R].

    answers: how many of a rollout's last tokens are its answer.
    """
    student, micro_tokens = run.student, run.cfg.micro_tokens
    prompts, texts = [r.prompt_ids for r in rollouts], [r.ids_T for r in rollouts]
    lengths = [len(ids_T) - n for ids_T, n in zip(texts, answers)]          # of the rationales
    whole = student.log_probs(prompts, texts, micro_tokens)
    alone = student.log_probs(prompts, [ids_T[n:] for ids_T, n in zip(texts, lengths)], micro_tokens)
    # Of a text without a rationale the answer stands for it.
    where = student.mean_hidden(prompts, [ids_T[:n or None] for ids_T, n in zip(texts, lengths)],
                                micro_tokens)
    jump = [lp_T[n:].sum() - answer_T.sum() for lp_T, answer_T, n in zip(whole, alone, lengths)]
    ease = [lp_T[:n or None].mean() for lp_T, n in zip(whole, lengths)]
    return where, torch.stack(jump), torch.stack(ease)


def standardised(x_K3):
    """Return z(): every column less its mean, in standard deviations; 0 if all are alike but for rounding."""
    away_K3, spread_3 = x_K3 - x_K3.mean(0), x_K3.std(0, correction=0)
    alike_3 = spread_3 <= 1e-4 * (1 + x_K3.abs().amax(0))
    return torch.where(alike_3, 0.0, away_K3 / spread_3)


def note_weights(run, rollouts, weights):
    """Note the mean weight of every teacher's rationales, in every branch if there are several."""
    several = len(run.branches) > 1
    name = lambda r: r.notes["teacher"] + (f" on {r.prompt['branch']}" if several else "")
    found = grouped(range(len(rollouts)), lambda i: name(rollouts[i]))
    run.notes["teacher_weight"] = {key: sum(weights[i] for i in some) / len(some)
                                   for key, some in sorted(found.items())}
