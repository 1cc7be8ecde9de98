"""Diagnosis: what the gradients of single rollouts say about a training of several branches.

CaMOPD (2605.27115) names two failures of mixing branches: counteraction, branches whose gradients have a
negative dot product, and flattening, rollouts with a small gap that dilute the batch. Whether they are there
is measured at one point of the training, on new rollouts of every branch's next prompts. The gradients
g_1 .. g_n of a branch are those of the method's objective, each rollout alone with weight 1; selected are
those that hold the branch's `mass` of the gap (0.8 where the method keeps all):

    kept, norm    how many rollouts are selected; |mean of the gradients|
    coherence     Coh(A) = |sum_A g_i| / sum_A |g_i|                                            (sec. 4.4)
    gcg           (Coh(selected) - Coh(all)) / Coh(all), the coherence gain of the selected     (sec. 4.4)
    gcg_random    the same of as many rollouts taken at random, mean of DRAWS. Ours: of n gradients of one
                  length that have nothing in common Coh is 1 / sqrt(n), so fewer are more coherent anyway
    alignment     mean g_i . g_j over pairs of different rollouts / mean |g_i|^2: a coherence that does not
                  depend on how many there are. Ours
    signal        |expectation of the gradient|^2, without the part that the noise of n rollouts adds
    noise_scale   trace of the gradients' covariance / signal: the batch in which noise and signal are equal,
                  in rollouts (McCandlish et al., 1812.06162). None: no signal is seen
    dot           product of two branches' mean gradients; dot_error is its standard error over rollouts
    cosine        of the same; noise draws it to 0, and cosine_signal = dot / sqrt(signal signal) does not
    step          |change of the parameters| if this branch alone made the optimizer's next step, with the
                  method's weights: selected, scaled, clipped, at the peak learning rate, without momentum.
                  "a+b" is the plain mixture of a and b by --mixture. Of half of the rollouts
    change        that step times the mean gradient of a branch on the other half: by how much its loss would
                  change, in nats to first order; a branch that suffers from another's step has a positive one

Gradients that take more than LARGEST bytes together are compared in some of their entries, always the same
ones drawn at random: coherence, signal and errors are estimates then. With --diagnose_layers only the last
layers count, and steps are left out, since clipping needs the norm of the whole gradient.
"""
import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass, replace

import torch

from config import Refused
from methods import by_branch
from methods.camopd import demand, top_gap_mass

LARGEST = 2**30                     # bytes of the gradients of all rollouts
SILENT = 1e-5                       # a branch whose gradients are that much smaller than another's has only
#                                     rounding, which in bfloat16 may be more
DRAWS = 200
EDGES = (-8, -4, -2, -1, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1, 2, 4, 8)     # of gaps on tokens, nats


def diagnose(run, gradients):
    """Return what the branches' gradients are like at the student's present parameters.

    New rollouts of every branch are sampled, scored and weighted as the method does it, and not learned from.
    gradients(job, parameters, weights): the gradient of a Job for some parameters, with the method's own
    weights where none are given.
    """
    cfg, student, parameters = run.cfg, run.student, watched(run.student, run.cfg.diagnose_layers)
    count = cfg.diagnose_rollouts or max(2, min(cfg.batch, 64))
    with run.without_side_effects("diagnose"), only(student, parameters):
        prompts = [prompt for branch in run.branches for prompt in run.draw(branch, count=count)]
        rollouts = run.sample(student, prompts, n=1)
        measured = {branch: measure(run, group, parameters, len(rollouts), gradients)
                    for branch, group in by_branch(rollouts).items()}
        shares = {branch: n / sum(run.shares.values()) for branch, n in run.shares.items()}
        return numbers(student, parameters, measured, shares, cfg)


def measure(run, rollouts, parameters, total, gradients):
    """Return the gradients of one branch: of each rollout alone; of both halves, plain and the method's."""
    [job] = run.route(rollouts)
    run.score([job])
    branch, mass = job.branch, getattr(run.cfg, "mass", {}).get(job.branch, 1)
    demand_N = torch.stack([demand(run, branch, gap_T) for gap_T in job.gaps])
    mass = mass if mass < 1 else 0.8                                # where all are kept: what 0.8 would keep
    halves = [half(job, i) for i in (0, 1)]
    means, rows = [[torch.zeros_like(p) for p in parameters] for _ in halves], []
    for i, r in enumerate(rollouts):
        alone = [torch.full_like(gap_T, float(other is r) / len(r.ids_T))
                 for other, gap_T in zip(rollouts, job.gaps)]
        gradient = gradients(job, parameters, alone)
        for sum_of_half, g in zip(means[i % 2], gradient):
            sum_of_half += g / len(halves[i % 2].rollouts)
        rows.append(entries(gradient, total))
    if run.method.select:
        own = {name: getattr(run.cfg, name) for name in run.method.own}
        for job_of_half in halves:
            run.method.select(run, [job_of_half], **own)
    steps = [gradients(job_of_half, parameters) for job_of_half in halves]
    return Measured(torch.stack(rows), means, steps, mass, top_gap_mass(demand_N, mass), demand_N, job.gaps)


def half(job, first):
    """Return a Job on every second rollout of a scored one."""
    every_second = {name: getattr(job, name)[first::2] for name in ("rollouts", "lp", "lq", "hidden_t")}
    return replace(job, **every_second)


def watched(student, layers):
    """The parameters that learn, in the last `layers` of the network's layers; 0: in the whole network."""
    if not layers:
        return [p for p in student.net.parameters() if p.requires_grad]
    count = student.config.num_hidden_layers
    stacks = [m for m in student.net.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    found = next((list(stack) for stack in stacks if len(stack) == count), None)
    if found is None or layers > count:
        raise Refused(f"--diagnose_layers {layers}: the student, a {type(student.net).__name__}, has "
                      + ("no list of its layers" if found is None else f"{count} layers"))
    return [p for layer in found[-layers:] for p in layer.parameters() if p.requires_grad]


@contextlib.contextmanager
def only(student, parameters):
    """The time in which only some parameters have gradients: backward passes stop where these begin."""
    wanted = set(parameters)
    rest = [p for p in student.net.parameters() if p.requires_grad and p not in wanted]
    try:
        for p in rest:
            p.requires_grad_(False)
        yield
    finally:
        for p in rest:
            p.requires_grad_(True)


def entries(gradient, rollouts):
    """A gradient as one vector [D], or a sample of it if `rollouts` of them do not fit in LARGEST bytes.

    The sample is always of the same entries, and scaled so that expected dot products stay.
    """
    total, most = sum(g.numel() for g in gradient), max(LARGEST // (4 * rollouts), 1)
    if total <= most:
        return torch.cat([g.flatten() for g in gradient]).float()
    where = torch.randint(total, (most,), generator=torch.Generator().manual_seed(0)).sort().values
    parts, start = [], 0
    for g in gradient:
        inside = where[(where >= start) & (where < start + g.numel())] - start
        parts.append(g.flatten()[inside.to(g.device)].float())
        start += g.numel()
    return math.sqrt(total / most) * torch.cat(parts)


@dataclass
class Measured:
    """One branch: N rollouts, gradients with weight 1 each."""
    gradients_ND: torch.Tensor
    means: list                         # of the gradients of both halves, each a tensor per parameter
    steps: list                         # the gradients of the method's own weights on both halves, likewise
    mass: float                         # of the gap that is selected
    kept_N: torch.Tensor                # which rollouts hold it
    demand_N: torch.Tensor              # by which score
    gaps: list                          # log q(y) - log p(y), [T] each


def numbers(student, parameters, measured, shares, cfg):
    """What metrics.jsonl keeps. measured: {branch: Measured}; shares: {branch: share of a mixed step}."""
    norms = {branch: m.gradients_ND.norm(dim=1).max().item() for branch, m in measured.items()}
    for branch, m in measured.items():                  # what equal models differ by is rounding, no gradient
        if norms[branch] < SILENT * max(norms.values()):
            m.gradients_ND = torch.zeros_like(m.gradients_ND)
            m.means, m.steps = ([[0 * g for g in half] for half in halves] for halves in (m.means, m.steps))
    first = {branch: (len(m.gradients_ND) + 1) // 2 / len(m.gradients_ND) for branch, m in measured.items()}
    middle = {branch: [first[branch] * a + (1 - first[branch]) * b for a, b in zip(*m.means)]
              for branch, m in measured.items()}
    branches = {branch: {"mass": m.mass, "norm": math.sqrt(dot(middle[branch], middle[branch]))}
                | branch_numbers(m.gradients_ND @ m.gradients_ND.T, m.kept_N, cfg.seed)
                | gap_numbers(m.gaps, m.demand_N) for branch, m in measured.items()}
    pairs = {f"{a}, {b}": pair_numbers(dot(middle[a], middle[b]), branches[a], branches[b],
                                       measured[a].gradients_ND @ measured[b].gradients_ND.T)
             for a, b in itertools.combinations(measured, 2)}
    found = {"branches": branches, "pairs": pairs}
    if not cfg.diagnose_layers:
        found["steps"] = both_halves([trial_steps(
            student, parameters, directions(measured, shares, half),
            {branch: m.means[1 - half] for branch, m in measured.items()}, cfg.lr, cfg.grad_clip)
            for half in (0, 1)])
    return found


def dot(a, b):
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b))


def directions(measured, shares, half):
    """{branch: the method's gradient on one half of the rollouts}; beside several branches their mixture."""
    out = {branch: m.steps[half] for branch, m in measured.items()}
    if len(measured) > 1:
        out["+".join(measured)] = [sum(shares[branch] * g for branch, g in zip(measured, some))
                                   for some in zip(*(m.means[half] for m in measured.values()))]
    return out


def both_halves(steps):
    """The means of two results of trial_steps."""
    return {name: {"step": (one["step"] + other["step"]) / 2,
                   "change": {b: (x + other["change"][b]) / 2 for b, x in one["change"].items()}}
            for (name, one), other in zip(steps[0].items(), steps[1].values())}


def coherence(gram_NN):
    """Coh of all rollouts of a matrix of dot products. CaMOPD sec. 4.4. No gradient at all: 0."""
    lengths = gram_NN.diagonal().clamp(min=0).sqrt().sum().item()
    return math.sqrt(max(gram_NN.sum().item(), 0)) / lengths if lengths else 0.0


def alignment(gram_NN):
    """Mean product of two different gradients over the mean square of one; None: fewer than two, or none."""
    n, own = len(gram_NN), gram_NN.trace().item()
    return (gram_NN.sum().item() - own) / ((n - 1) * own) if n > 1 and own else None


def branch_numbers(gram_NN, kept_N, seed):
    """Coherence, GCG and noise of one branch from its gradients' dot products and which are selected."""
    n, kept = len(gram_NN), kept_N.nonzero().flatten()
    among = lambda some: gram_NN[some][:, some]
    whole, chosen = coherence(gram_NN), coherence(among(kept))
    generator = torch.Generator().manual_seed(seed)
    random = statistics.mean(
        coherence(among(torch.randperm(n, generator=generator)[:len(kept)].to(kept.device)))
        for _ in range(DRAWS))
    total, own = gram_NN.sum().item(), gram_NN.trace().item()
    signal = (total - own) / (n * (n - 1)) if n > 1 else None
    spread = (own - total / n) / (n - 1) if n > 1 else None
    return {"rollouts": n, "kept": len(kept), "signal": signal,
            "noise_scale": spread / signal if n > 1 and signal > 0 else None,
            "coherence": whole, "coherence_kept": chosen,
            "alignment": alignment(gram_NN), "alignment_kept": alignment(among(kept)),
            "gcg": chosen / whole - 1 if whole else None, "gcg_random": random / whole - 1 if whole else None}


def pair_numbers(product, a, b, gram_NM):
    """Of two branches: their mean gradients' product and its error, from the products of single ones.

    The noise of single products is in the variance of both rows' and columns' means: it is subtracted once.
    """
    n, m = gram_NM.shape
    rows, columns = gram_NM.mean(1), gram_NM.mean(0)
    left = gram_NM - rows[:, None] - columns + gram_NM.mean()
    variance = (rows.var() / n + columns.var() / m - left.square().sum() / ((n - 1) * (m - 1) * n * m)).item()
    signal = a["signal"] * b["signal"] if min(a["signal"], b["signal"]) > 0 else None
    return {"dot": product, "dot_error": math.sqrt(max(variance, 0)),
            "cosine": product / (a["norm"] * b["norm"]) if a["norm"] and b["norm"] else None,
            "cosine_signal": product / math.sqrt(signal) if signal else None}


def gap_numbers(gaps, demand_N):
    """How a branch's gap is spread: over tokens (histogram) and over rollouts (shares of the summed score).

    gaps: log q(y) - log p(y) of every rollout, [T]. demand_N: the score that selection sorts by.
    histogram: tokens below EDGES[0], between the edges, above the last. deciles: the share of the tenth of
    the rollouts with the largest score, the next tenth, ..; None where there is no gap.
    """
    edges = torch.tensor(EDGES, dtype=torch.float32)
    bins = torch.bucketize(torch.cat(gaps).cpu().float(), edges)
    held = demand_N.cpu().double().sort(descending=True).values.cumsum(0)
    ends = torch.linspace(0, len(held), 11, dtype=torch.float64)
    before = torch.cat([torch.zeros(1, dtype=torch.float64), held])
    low = ends.floor().long().clamp(max=len(held) - 1)
    at = before[low] + (ends - low) * (before[low + 1] - before[low])       # linear between whole rollouts
    return {"histogram": bins.bincount(minlength=len(EDGES) + 1).tolist(),
            "deciles": ((at[1:] - at[:-1]) / held[-1]).tolist() if held[-1] else None}


@torch.no_grad()
def trial_steps(student, parameters, directions, gradients, lr, clip):
    """{name: {"step", "change": {branch: x}}}: the optimizers' next step if its gradient were that alone.

    directions: {name: a gradient per parameter}; gradients: {branch: likewise}, of the losses whose change is
    asked for. Momentum and weight decay are left out: what counts is what this gradient adds now and later,
    not what earlier ones left. Nothing of student or optimizers changes.
    """
    where = {p: (o, group) for o in student.optimizers for group in o.param_groups for p in group["params"]}
    size = dict.fromkeys(directions, 0.0)
    change = {name: dict.fromkeys(gradients, 0.0) for name in directions}
    for name, direction in directions.items():
        norm = math.sqrt(sum(g.double().square().sum().item() for g in direction))
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for i, p in enumerate(parameters):
            delta = trial_step(*where[p], p, factor * direction[i], lr)
            size[name] += delta.double().square().sum().item()
            for branch, gradient in gradients.items():
                change[name][branch] += (delta * gradient[i]).sum().item()
    return {name: {"step": math.sqrt(size[name]), "change": change[name]} for name in directions}


def trial_step(optimizer, group, parameter, gradient, lr):
    """The change of one parameter in a step of its optimizer's twin, which has no momentum and no decay."""
    twin = parameter.detach().clone()
    twin.grad = gradient.to(twin.dtype)
    options = {key: value for key, value in group.items() if key != "params"} | {"weight_decay": 0.0}
    options |= {"betas": (0.0, group["betas"][1])} if "betas" in group else {"momentum": 0.0}
    other = type(optimizer)([{**options, "params": [twin], "lr": lr}], lr=lr)
    other.state[twin] = {key: value.clone() if torch.is_tensor(value) else value
                         for key, value in optimizer.state.get(parameter, {}).items()}
    other.step()
    return twin - parameter
