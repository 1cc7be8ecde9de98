"""DPO: direct preference optimisation (Rafailov et al., arXiv 2305.18290), on fixed pairs or on own rollouts.

    r(y) = log p(y | x) - log p_ref(y | x)                          summed over the completion's tokens
    L    = - mean over pairs of log sigmoid(beta (r(chosen) - r(rejected)))                            (eq. 7)

Its gradient is that of -log p(chosen) + log p(rejected), each pair weighted with
beta sigmoid(-beta (r(chosen) - r(rejected))): a policy gradient, which the fused loss computes.
"""
import torch

from config import AMOUNT, POSITIVE, Refused

from . import Job, by_prompt, method


def check(cfg):
    """Refuse references that are not fixed, and a renewal of one that cannot be renewed."""
    if cfg.self_teacher not in ("snapshot", "frozen"):
        raise Refused("--method dpo: its reference must not move with the student; choose --self_teacher "
                      "snapshot or frozen")
    if cfg.renew_every and cfg.self_teacher == "frozen":
        raise Refused("--renew_every needs --self_teacher snapshot")


def reads(run, model, row):
    """Refuse a prompt that can never make a pair. Nobody reads more than the prompt."""
    if run.cfg.rollouts == 1 and not has_pair(row):
        raise Refused("a prompt without chosen and rejected texts needs --rollouts of at least 2")
    return model.encode(row["prompt"])


@method(losses=("nll",), teachers="none", needs=("chosen|answer", "rejected|answer"), check=check,
        reads=reads, defaults=dict(rollouts=8, self_teacher="snapshot"))
def dpo(run, *, dpo_beta: POSITIVE = 0.1, renew_every: AMOUNT = 0):
    """Prefer the chosen completion of a prompt over the rejected one, relative to a reference model.

    The reference is the self-teacher: the student as it started, or as it was when last renewed.

    dpo_beta        how sharply preferences count against staying close to the reference; DPO eq. 7
    renew_every     steps after which the reference becomes the student as it is; 0 = never
    """
    reference = run.self_teacher(run.student)
    for step in run.steps():
        if renew_every and step % renew_every == 0:
            run.refresh(reference)
        rollouts, pairs = preferences(run, run.draw())
        job = Job(run.student, reference, rollouts, run.objective, tokens="sum", count=len(pairs))
        paired = {i for pair in pairs for i in pair}
        job.weights = [float(i in paired) for i in range(len(rollouts))]        # the others are not read
        run.score([job])
        reward = {i: -dpo_beta * job.gaps[i].double().sum() for i in paired}    # beta r(y): the gap is -r
        margins = torch.stack([reward[i] - reward[j] for i, j in pairs]) if pairs else torch.zeros(0)
        job.weights = [0.0] * len(rollouts)                 # then the gradient of -log sigmoid, see above
        for (i, j), weight in zip(pairs, dpo_beta * torch.sigmoid(-margins)):
            job.weights[i] += weight
            job.weights[j] -= weight
        run.notes |= pair_stats(rollouts, pairs, margins)
        yield [job]


def has_pair(prompt):
    """Whether a prompt comes with its pair."""
    return "chosen" in prompt and "rejected" in prompt


def preferences(run, prompts):
    """Return (rollouts, [(index of the chosen, index of the rejected)]).

    A prompt with `chosen` and `rejected` texts has that pair. For another one the student's first correct
    and first wrong rollout make a pair; where all are correct or all are wrong there is none.
    """
    fixed = [prompt for prompt in prompts if has_pair(prompt)]
    rollouts = run.references(fixed, "chosen") + run.references(fixed, "rejected")
    pairs = [(i, len(fixed) + i) for i in range(len(fixed))]
    rollouts += run.sample(run.student, [prompt for prompt in prompts if not has_pair(prompt)])
    place = {id(r): i for i, r in enumerate(rollouts)}
    for group in by_prompt(rollouts[2 * len(fixed):]).values():
        best, worst = max(group, key=lambda r: r.reward), min(group, key=lambda r: r.reward)
        if best.reward > worst.reward:
            pairs.append((place[id(best)], place[id(worst)]))
    return rollouts, pairs


def pair_stats(rollouts, pairs, margins):
    """Return what metrics.jsonl shows of a step's pairs: the loss, and means over pairs."""
    mean = lambda numbers: sum(numbers) / max(len(numbers), 1)
    return {"pairs": len(pairs), "dpo_loss": mean((-torch.nn.functional.logsigmoid(margins)).tolist()),
            "margin": mean(margins.tolist()), "preferred": mean((margins > 0).double().tolist()),
            "length_chosen": mean([len(rollouts[i].ids_T) for i, _ in pairs]),
            "length_rejected": mean([len(rollouts[j].ids_T) for _, j in pairs])}
