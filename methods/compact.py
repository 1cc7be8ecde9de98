"""COMPACT-style: rationales of several teachers, each as far as it suits the student (after 2601.13992).

Cui et al.'s code is not public and its equations were not to be had: what is not marked [paper] is ours.

    for every prompt x with its answer y, and teachers k = 1 .. K, each with a rationale r_k:
      c_k = mean cosine of r_k and the other rationales in the student's space    [paper: consensus, a graph]
      m_k = log p(y | x, r_k) - log p(y | x)       [paper: adaptability, mutual information, "epiphanies"]
      d_k = log p(r_k | x) per token                                         [paper: difficulty, by the loss]
      w   = softmax over k of (z(c) + z(m) + z(d)) / tau, without gradient  [paper: weights of the gradients]
    L = mean over prompts of sum_k w_k NLL(r_k, y | x)                             NLL: mean over the tokens

z() is the distance from the mean over k in standard deviations, 0 where all are alike. A teacher is a model
of --teachers, which writes once, greedily, or a name in a prompt row's "rationales". What it says before the
answer is its rationale; the answer that the student learns is the right one, whatever the teacher said.
"""
import torch

from config import POSITIVE, Refused
from data.graders import split_at_answer

from . import Job, grouped, method, prompt_key, written_once


def reads(run, model, row):
    """Refuse a row whose rationales are not texts, or that has fewer than two teachers."""
    texts = row.get("rationales", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise Refused('"rationales" is an object that has a text for each teacher\'s name')
    if len(texts.keys() | run.teachers.keys()) < len(texts) + len(run.teachers):
        raise Refused(f"a teacher has the name of one of --teachers ({', '.join(run.teachers)})")
    if len(texts) + len(run.teachers) < 2:
        raise Refused("compact weighs the rationales of at least two teachers: name several --teachers, or "
                      'have more "rationales" in the row')
    ids, most = model.encode(row["prompt"]), run.cfg.max_new_tokens
    longest = max((len(run.student.encode_completion(text)) for text in texts.values()), default=0)
    return ids + ids[-1:] * max(longest - most, 0)              # room for a text beyond max_new_tokens


@method(losses=("nll",), teachers="any", needs=("answer",), reads=reads)
def compact(run, *, sharpness: POSITIVE = 1.0):
    """Learn the teachers' rationales, those more that others confirm, that help, and that are not too hard.

    sharpness       the temperature tau of the weights: large, and all teachers count the same
    """
    for step in run.steps():
        prompts = run.draw()
        rationales = [(name, prompt, text) for prompt in prompts
                      for name, text in prompt.get("rationales", {}).items()]
        for name, teacher in run.teachers.items():
            def write(prompts):
                return run.sample(teacher, prompts, n=1, temperature=0)
            rationales += [(name, r.prompt, r.text) for r in written_once(run, prompts, write, f"by {name}")]
        yield [weighted(run, rationales, sharpness)]


def weighted(run, rationales, sharpness):
    """Return the Job that learns weighted rationales [(teacher's name, prompt, text)] with right answers.

    A text without an answer is left out, and counted.
    """
    encode, rollouts, answers, skipped = run.student.encode_completion, [], [], {}
    for name, prompt, text in rationales:
        parts = split_at_answer(prompt["grader"], text, prompt["answer"])
        if parts is None:
            skipped[f"{name} gives no answer"] = skipped.get(f"{name} gives no answer", 0) + 1
            continue
        rationale, answer = parts
        ids = encode(rationale)[:-1] if rationale else []       # without its EOS
        rollouts.append(run.fixed(prompt, ids + encode(answer), rationale + answer))
        rollouts[-1].notes["teacher"] = name
        answers.append(len(encode(answer)))
    run.notes["skipped"] = skipped
    if not rollouts:                                            # a step that changes nothing
        rows = {prompt_key(prompt): prompt for _, prompt, _ in rationales}
        rollouts = [run.fixed(prompt, encode(str(prompt["answer"])), "") for prompt in rows.values()]
        return Job(run.student, None, rollouts, run.objective, [0.0] * len(rollouts))

    where, jump, ease = suitability(run, rollouts, answers)
    weights = [0.0] * len(rollouts)
    groups = grouped(range(len(rollouts)), lambda i: prompt_key(rollouts[i].prompt))
    for places in groups.values():
        cosines_KK = where[places] @ where[places].T
        consensus = (cosines_KK.sum(1) - cosines_KK.diagonal()) / max(len(places) - 1, 1)
        z_K3 = standardised(torch.stack([consensus, jump[places], ease[places]], 1).double())
        for i, w, scores in zip(places, torch.softmax(z_K3.sum(1) / sharpness, 0), z_K3):
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
    told = student.log_probs(prompts, texts, micro_tokens)
    untold = student.log_probs(prompts, [ids_T[n:] for ids_T, n in zip(texts, lengths)], micro_tokens)
    # Of a text without a rationale the answer stands for it.
    where = student.mean_hidden(prompts, [ids_T[:n or None] for ids_T, n in zip(texts, lengths)],
                                micro_tokens)
    jump = [lp_T[n:].sum() - answer_T.sum() for lp_T, answer_T, n in zip(told, untold, lengths)]
    ease = [lp_T[:n or None].mean() for lp_T, n in zip(told, lengths)]
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
