"""DPO: direct preference optimisation (Rafailov et al., arXiv 2305.18290), on fixed pairs or on own rollouts.

    h = log p(y+)/p_ref(y+) - log p(y-)/p_ref(y-)           y+ the chosen, y- the rejected, summed over tokens
    L = mean over pairs of -log sigmoid(beta h)                                                       (eq. 7)

With label smoothing e (cDPO, Mitchell 2023) it is -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), and
IPO (Azar et al., 2310.12036, eq. 17) is (h - 1 / (2 beta))^2, where h takes means over tokens: so say its
authors, according to TRL, which does the same.

The gradient of L with respect to log p(y+) is L'(h), and to log p(y-) it is -L'(h). So it is that of
-log p(y), weighted with -L'(h) and L'(h): a policy gradient, which the fused loss computes.
"""
from collections import Counter

import torch
from torch.nn.functional import logsigmoid

from config import AMOUNT, POSITIVE, Refused, number

from . import Job, by_prompt, check_rounds, method

HALF = number(float, 0, most=0.5)


def check(cfg):
    """Refuse references that are not fixed, and settings without an effect."""
    if cfg.self_teacher not in ("snapshot", "frozen"):
        raise Refused(f"--method {cfg.method}: its reference must not move with the student; choose "
                      "--self_teacher snapshot or frozen")
    if cfg.renew_every and cfg.self_teacher == "frozen":
        raise Refused("--renew_every needs --self_teacher snapshot")
    if cfg.ipo and cfg.dpo_smoothing:
        raise Refused("--dpo_smoothing has no effect with --ipo")


def check_rounds_and_reference(cfg):
    """Refuse rounds of different lengths, and a reference that no round renews. For apt and sai_dpo."""
    check_rounds(cfg)
    if cfg.self_teacher != "snapshot":
        raise Refused(f"--method {cfg.method}: its reference is the student at the start of the round, "
                      "--self_teacher snapshot")


def reads(run, model, row):
    """Refuse a prompt that can never make a pair. Nobody reads more than the prompt."""
    if has_pair(row) and row["chosen"] == row["rejected"]:
        raise Refused("its chosen and rejected texts are the same, so neither can be preferred")
    if run.cfg.rollouts == 1 and not has_pair(row):
        raise Refused("a prompt without chosen and rejected texts needs --rollouts of at least 2")
    return model.encode(row["prompt"])


@method(losses=("nll",), teachers="none", needs=("chosen|answer", "rejected|answer"), check=check,
        reads=reads, defaults=dict(rollouts=8, self_teacher="snapshot"))
def dpo(run, *, dpo_beta: POSITIVE = 0.1, dpo_smoothing: HALF = 0.0, ipo: bool = False,
        renew_every: AMOUNT = 0):
    """Prefer the chosen completion of a prompt over the rejected one, relative to a reference model.

    The reference is the self-teacher: the student as it started, or as it was when last renewed.

    dpo_beta        how sharply preferences count against staying close to the reference; DPO eq. 7
    dpo_smoothing   probability with which a preference is taken to be the wrong way round; cDPO
    ipo             the loss of IPO, which does not push a margin beyond 1 / (2 beta) nats per token
    renew_every     steps after which the reference becomes the student as it is; 0 = never
    """
    reference = run.self_teacher(run.student)
    for step in run.steps():
        if renew_every and step % renew_every == 0:
            run.refresh(reference)
        rollouts, pairs = preferences(run, run.draw())
        yield [preference_job(run, reference, rollouts, pairs, dpo_beta, dpo_smoothing, ipo)]


def has_pair(prompt):
    """Whether a prompt comes with its pair."""
    return "chosen" in prompt and "rejected" in prompt


def preferences(run, prompts):
    """Return (rollouts, pairs): of prompts' `chosen` and `rejected` texts, or of graded rollouts."""
    fixed = [prompt for prompt in prompts if has_pair(prompt)]
    chosen, rejected = run.references(fixed, "chosen"), run.references(fixed, "rejected")
    sampled = run.sample(run.student, [prompt for prompt in prompts if not has_pair(prompt)])
    return chosen + rejected + sampled, [*zip(chosen, rejected), *graded_pairs(run, sampled)]


def graded_pairs(run, rollouts):
    """Return [(first correct rollout, first wrong one)] of the prompts that have both; count the others.

    Of scores between 0 and 1 they are the best and the worst.
    """
    pairs, skipped = [], Counter()
    if run.cfg.drop_cut:
        rollouts = [r for r in rollouts if r.ids_T[-1].item() in run.student.stops]
    for group in by_prompt(rollouts).values():
        best, worst = max(group, key=lambda r: r.reward), min(group, key=lambda r: r.reward)
        if best.reward > worst.reward:
            pairs.append((best, worst))
        else:
            why = {1: "all correct", 0: "all wrong"}.get(best.reward, "all of the same score")
            skipped[why] += 1
    if skipped:
        run.notes["skipped"] = skipped
    return pairs


def preference_job(run, reference, rollouts, pairs, beta, smoothing=0.0, ipo=False):
    """Return the Job whose gradient is that of the preference loss; note what metrics.jsonl shows of it.

    pairs: (chosen, rejected) Rollouts, which are among the rollouts. The others are not read or learned.
    """
    job = Job(run.student, reference, rollouts, run.objective, weights=[0.0] * len(rollouts),
              tokens="mean" if ipo else "sum")
    if run.cfg.drop_cut:
        cut = {id(r) for r, cut in zip(rollouts, job.cut) if cut}
        pairs = [pair for pair in pairs if not cut & set(map(id, pair))]
    job.count = len(pairs)
    run.notes["pairs"] = len(pairs)
    if not pairs:
        return job
    place = {id(r): i for i, r in enumerate(rollouts)}
    chosen, rejected = ([place[id(r)] for r in side] for side in zip(*pairs))
    for i in chosen + rejected:
        job.weights[i] = 1.0                                # to be read
    run.score([job])

    def log_ratios(side):                                   # log p(y) - log p_ref(y): the gap is the opposite
        gaps = [job.gaps[i].double() for i in side]
        return -torch.stack([gap_T.mean() if ipo else gap_T.sum() for gap_T in gaps])
    chosen_P, rejected_P = log_ratios(chosen), log_ratios(rejected)
    h_P = (chosen_P - rejected_P).requires_grad_()
    loss_P = preference_loss(h_P, beta, smoothing, ipo)
    slope_P, = torch.autograd.grad(loss_P.sum(), h_P)       # L'(h)
    job.weights = [0.0] * len(rollouts)
    for i, j, slope in zip(chosen, rejected, slope_P):
        job.weights[i] -= slope
        job.weights[j] += slope

    means = dict(dpo_loss=loss_P, margin=beta * h_P, preferred=(h_P > 0).double(),
                 reward_chosen=beta * chosen_P, reward_rejected=beta * rejected_P)
    run.notes |= {name: x_P.mean().item() for name, x_P in means.items()}
    for name, side in (("length_chosen", chosen), ("length_rejected", rejected)):
        run.notes[name] = sum(len(rollouts[i].ids_T) for i in side) / len(pairs)
    return job


def preference_loss(h_P, beta, smoothing, ipo):
    """Return the loss of every pair from the difference of its log-ratios, in nats; see above."""
    if ipo:
        return (h_P - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * logsigmoid(beta * h_P) - smoothing * logsigmoid(-beta * h_P)
