"""What goes wrong without an error, watched in every run: a loss that cannot pull, rollouts that collapse.

Where the student is certain, what weighs by p has no gradient, however wrong the student is (saturation;
`python -m lab.pitfalls` shows it). Rollouts collapse that repeat themselves, never end or leave the teacher.
"""
import functools

import torch
from tqdm import tqdm

from losses import DIVERGENCES, Objective, divergence

CERTAIN = 0.01      # nats of entropy: then the other tokens share less than 0.2% of the probability
LITTLE = 0.1        # nats per token: where the divergence is less, a single token may hold most of it
WINDOW = 12         # steps of a mean: schedules of 1:1, 2:1, 3:1 and 5:1 fill it evenly


def bands(now, first, best):
    """Return {statistic: (whether its mean has left its band, what to say then)}.

    Measured: in the small world's healthy runs saturated is at most 0.13, repeated first + 0.03, length 1.5
    times first, cut 0.15, entropy_s first / 8, top1_agree best - 0.04. A specialised chat model begins with
    saturated 0.39 (mopd, rkl), and raw top-3 falls to top1_agree best - 0.3.
    """
    return {
        "saturated": (now > 0.25, f"{now:.0%} of the divergence lies where the student is certain, and this "
                                  f"loss has no gradient there; {pulling()} pull there"),
        "repeated": (now > first + 0.2, f"{now:.0%} of 3-grams repeat earlier ones ({first:.0%} at first)"),
        "length": (not first / 4 <= now <= first * 4, f"{now:.0f} tokens a text ({first:.0f} at first)"),
        "cut": (now > 0.9 and first < 0.5, f"{now:.0%} of the rollouts do not end ({first:.0%} at first)"),
        "entropy_s": (now < first / 20, f"the student's entropy is {now:.2g} nats ({first:.2g} at first)"),
        "top1_agree": (now < best - 0.15, f"{now:.0%} of the likeliest tokens agree (were {best:.0%})"),
        "solved": (now < best - 0.25, f"{now:.0%} of prompts have a correct rollout (were {best:.0%})")}


@functools.cache
def pulling():
    """Return the names of the losses that pull as the likelihood does where a student is certain."""
    return ", ".join(loss for loss in DIVERGENCES if 0.9 < pull(Objective(divergence=loss)) < 1.1)


def pull(objective):
    """Return the gradient in the logit of a token with p = 0.9999 and q = 0.01, of two tokens.

    0.99 is that of the other token's likelihood. For pg it is p (1 - p) times the advantage, so nothing.
    """
    lp, lq = (torch.tensor([[x, 1 - x]], dtype=torch.float64).log() for x in (0.9999, 0.01))
    if objective.divergence:
        divergence(lp.requires_grad_(), lq, objective.divergence, knob=objective.knob,
                   target=objective.target, entry_clip=objective.entry_clip).backward()
    return lp.grad[0, 0].item() if objective.divergence else 0.0


def saturated(jobs, stats):
    """Return the share of the divergence (pg: of the gaps' size) that is where the loss cannot pull.

    None where there is no divergence, or LITTLE.
    """
    parts = [(of_job.get("value", of_job.get("gap")), of_job["entropy_s"] < CERTAIN, pull(job.objective))
             for job, of_job in zip(jobs, stats) if {"value", "gap"} & of_job.keys()]
    total = sum(size_N.abs().sum().item() for size_N, _, _ in parts)
    lost = sum(size_N[certain_N].abs().sum().item() for size_N, certain_N, x in parts if x < 0.1)
    return lost / total if total > LITTLE * sum(len(size_N) for size_N, _, _ in parts) else None


def repeated(completions):
    """Return the share of 3-grams that stood before in the same completion [T], a mean over completions."""
    grams = [list(zip(ids, ids[1:], ids[2:])) for ids in (ids_T.tolist() for ids_T in completions)]
    return sum(1 - len(set(g)) / len(g) for g in grams if g) / len(grams) if grams else None


def watch(memory, stats):
    """Return the warnings that a step gives cause for, each kind once in a run, and write them on the screen.

    memory: the run's, kept by its checkpoint. Fixed data has no `repeated`, and cannot collapse.
    """
    seen = memory.setdefault(f"monitor {stats.get('tutee', 1)}", {})                    # of each student
    warnings = []
    for name in bands(0, 0, 0) if "repeated" in stats else ["saturated"]:
        if name not in stats:
            continue
        known = seen.setdefault(name, {"recent": [], "warned": False})
        recent = known["recent"] = [*known["recent"], stats[name]][-WINDOW:]
        if len(recent) == WINDOW or name == "saturated":                # that shows in the first step
            now = sum(recent) / len(recent)
            known["first"], known["best"] = known.get("first", now), max(known.get("best", now), now)
            left, words = bands(now, known["first"], known["best"])[name]
            if left and not known["warned"]:
                known["warned"] = True
                warnings.append(words)
                tqdm.write(f"note: {words}")
    return warnings
