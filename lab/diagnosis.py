"""Diagnosis: what the gradients of single rollouts say about a training of several branches.

CaMOPD (2605.27115) names two failures of mixing branches: counteraction, branches whose gradients have a
negative dot product, and flattening, rollouts with a small gap that dilute the batch. Whether they are there
is measured at one point of the training, on new rollouts of every branch's next prompts. The gradients
g_1 .. g_n of a branch are those of the method's objective, each rollout alone with weight 1. The selected
rollouts are those that hold the branch's `mass` of the gap (0.8 where the method keeps all):

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

What stands beside the teachers' objective is left out: --token_weight, --kl_weight, and --reward_weight,
since a rollout alone has none to be compared with.
"""
import contextlib
import copy
import itertools
import math
import statistics
from dataclasses import dataclass, replace

import torch

from config import Refused
from methods import by_branch
from methods.camopd import demand, top_gap_mass

LARGEST = 2**30                     # the most bytes that the gradients of all rollouts may take
# Where two equal models are compared, what remains of a gradient is rounding. A branch whose largest gradient
# is below this share of another branch's counts as without any. In bfloat16 the rounding may be larger.
SILENT = 1e-5
DRAWS = 200                         # random choices of rollouts, whose mean is gcg_random
EDGES = (-8, -4, -2, -1, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1, 2, 4, 8)     # of gaps on tokens, nats


def diagnose(run, gradients):
    """Return what the branches' gradients are like at the student's present parameters.

    New rollouts of every branch are sampled, scored and weighted as the method does it. Nothing is learned
    from them. gradients(job, parameters, weights): the gradient of a Job for some parameters, with the
    method's own weights where none are given.
    """
    cfg, student, count = run.cfg, run.student, rollouts_per_branch(run.cfg)
    parameters = watched(student, cfg.diagnose_layers)
    shares = {branch: prompts / sum(run.shares.values()) for branch, prompts in run.shares.items()}
    with run.without_side_effects("diagnose"), only(student, parameters):
        prompts = []
        for branch in run.branches:
            prompts += run.draw(branch, count=count)
        rollouts = run.sample(student, prompts, n=1)
        measured = {branch: measure(run, group, parameters, len(rollouts), gradients)
                    for branch, group in by_branch(rollouts).items()}
        return numbers(student, parameters, measured, shares, cfg)


def rollouts_per_branch(cfg):
    """Return how many rollouts of every branch a diagnosis looks at."""
    return cfg.diagnose_rollouts or max(2, min(cfg.batch, 64))


def measure(run, rollouts, parameters, total, gradients):
    """Return the Measured of one branch. total: the number of rollouts of all branches together."""
    [job] = run.route(rollouts)
    job.objective = replace(job.objective, reward=0.0)
    run.score([job])
    halves = [half(job, 0), half(job, 1)]

    # The gradient of each rollout alone, and the mean of those of each half.
    means = [[torch.zeros_like(p) for p in parameters] for _ in halves]
    rows = []
    for i in range(len(rollouts)):
        gradient = gradients(job, parameters, weigh_one(job, i))
        for sum_of_half, g in zip(means[i % 2], gradient):
            sum_of_half += g / len(halves[i % 2].rollouts)
        rows.append(entries(gradient, total))

    # The gradient of each half with the weights that the method gives its rollouts.
    if run.method.select:
        own = {name: getattr(run.cfg, name) for name in run.method.own}
        for job_of_half in halves:
            run.method.select(run, [job_of_half], **own)
    if run.cfg.drop_cut:
        for job_of_half in halves:
            job_of_half.leave_out_cut()
    steps = [gradients(job_of_half, parameters) for job_of_half in halves]

    demand_N = torch.stack([demand(run, job.branch, gap_T) for gap_T in job.gaps])
    mass = getattr(run.cfg, "mass", {}).get(job.branch, 1)
    mass = mass if mass < 1 else 0.8            # where the method keeps all: what the paper's mass would keep
    return Measured(torch.stack(rows), means, steps, mass, top_gap_mass(demand_N, mass), demand_N, job.gaps)


def weigh_one(job, chosen):
    """Return weights per token with which a Job's loss is the mean over the tokens of one rollout alone."""
    weights = [torch.zeros_like(gap_T) for gap_T in job.gaps]
    weights[chosen] += 1 / len(weights[chosen])
    return weights


def half(job, first):
    """Return a Job with every second rollout of a scored Job. first: 0 or 1, the rollout to begin with."""
    states = job.hidden_t and job.hidden_t[first::2]            # None where the loss needs no states
    return replace(job, rollouts=job.rollouts[first::2], lp=job.lp[first::2], lq=job.lq[first::2],
                   hidden_t=states)


def watched(student, layers):
    """Return the learning parameters of the last `layers` layers; 0 means those of the whole network."""
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
    """Context manager: only some parameters have gradients, and backward passes stop where these begin."""
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
    """Return a gradient as one vector [D], or some entries if `rollouts` of them do not fit in LARGEST bytes.

    They are always the same entries, drawn at random, and scaled so that the expected dot products stay.
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
    """What is measured of one branch with N rollouts. In gradients_ND and means each rollout has weight 1."""
    gradients_ND: torch.Tensor          # the gradient of every rollout alone
    means: list                         # of the gradients in each half of the rollouts: one per parameter
    steps: list                         # the gradients of both halves with the method's own weights, likewise
    mass: float                         # the share of the gap that the selected rollouts hold
    kept_N: torch.Tensor                # whether a rollout is selected
    demand_N: torch.Tensor              # the score that selection sorts by
    gaps: list                          # log q(y) - log p(y), [T] each


def numbers(student, parameters, measured, shares, cfg):
    """Return what metrics.jsonl keeps.

    measured: {branch: Measured}. shares: {branch: its share of a step that mixes all branches}.
    """
    silence(measured)
    middle = {branch: mean_gradient(m) for branch, m in measured.items()}
    branches = {}
    for branch, m in measured.items():
        branches[branch] = {"mass": m.mass, "norm": math.sqrt(dot(middle[branch], middle[branch])),
                            **branch_numbers(m.gradients_ND @ m.gradients_ND.T, m.kept_N, cfg.seed),
                            **gap_numbers(m.gaps, m.demand_N)}
    pairs = {}
    for a, b in itertools.combinations(measured, 2):
        gram_NM = measured[a].gradients_ND @ measured[b].gradients_ND.T
        pairs[f"{a}, {b}"] = pair_numbers(dot(middle[a], middle[b]), branches[a], branches[b], gram_NM)
    found = {"branches": branches, "pairs": pairs}
    if not cfg.diagnose_layers:
        steps = []
        for i in (0, 1):                                # a step from one half is judged on the other half
            others = {branch: m.means[1 - i] for branch, m in measured.items()}
            steps.append(trial_steps(student, parameters, directions(measured, shares, i), others, cfg.lr,
                                     cfg.grad_clip))
        found["steps"] = mean_steps(*steps)
    return found


def silence(measured):
    """Set the gradients of a branch that has nothing but rounding to 0 (see SILENT)."""
    norms = {branch: m.gradients_ND.norm(dim=1).max().item() for branch, m in measured.items()}
    for branch, m in measured.items():
        if norms[branch] < SILENT * max(norms.values()):
            m.gradients_ND = torch.zeros_like(m.gradients_ND)
            for gradient in (*m.means, *m.steps):
                gradient[:] = [torch.zeros_like(g) for g in gradient]


def mean_gradient(m):
    """Return the mean gradient of all rollouts of a branch, a tensor per parameter."""
    count = len(m.gradients_ND)
    share = (count + 1) // 2 / count                    # of the first half, which may have one rollout more
    return [share * a + (1 - share) * b for a, b in zip(*m.means)]


def dot(a, b):
    """Return the dot product of two gradients, each a tensor per parameter."""
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b))


def directions(measured, shares, i):
    """Return {branch: the method's gradient on half i of the rollouts}, and of several also their mixture."""
    out = {branch: m.steps[i] for branch, m in measured.items()}
    if len(measured) > 1:
        mixed = [0] * len(next(iter(out.values())))
        for branch, m in measured.items():
            mixed = [total + shares[branch] * g for total, g in zip(mixed, m.means[i])]
        out["+".join(measured)] = mixed
    return out


def mean_steps(first, second):
    """Return the means of two results of trial_steps."""
    out = {}
    for name, one in first.items():
        other = second[name]
        change = {branch: (x + other["change"][branch]) / 2 for branch, x in one["change"].items()}
        out[name] = {"step": (one["step"] + other["step"]) / 2, "change": change}
    return out


def coherence(gram_NN):
    """Return Coh of some rollouts from their gradients' dot products; 0: there is no gradient. Sec. 4.4."""
    lengths = gram_NN.diagonal().clamp(min=0).sqrt().sum().item()
    return math.sqrt(max(gram_NN.sum().item(), 0)) / lengths if lengths else 0.0


def alignment(gram_NN):
    """Return the mean product of two different gradients over the mean square of one.

    None: there are fewer than two rollouts, or no gradient.
    """
    n, own = len(gram_NN), gram_NN.trace().item()
    return (gram_NN.sum().item() - own) / ((n - 1) * own) if n > 1 and own else None


def branch_numbers(gram_NN, kept_N, seed):
    """Return coherence, GCG and noise of one branch from its gradients' dot products.

    kept_N: whether a rollout is selected.
    """
    n, kept = len(gram_NN), kept_N.nonzero().flatten()
    among = lambda some: gram_NN[some][:, some]
    whole, chosen = coherence(gram_NN), coherence(among(kept))
    generator, at_random = torch.Generator().manual_seed(seed), []
    for _ in range(DRAWS):
        some = torch.randperm(n, generator=generator)[:len(kept)]
        at_random.append(coherence(among(some.to(kept.device))))
    gain = lambda coherent: coherent / whole - 1 if whole else None

    # |sum of the gradients|^2 holds n squares with their noise, and n (n - 1) products of two, without bias.
    total, squares = gram_NN.sum().item(), gram_NN.trace().item()
    signal = (total - squares) / (n * (n - 1)) if n > 1 else None
    noise = (squares - total / n) / (n - 1) if n > 1 else None          # the trace of the covariance
    return {"rollouts": n, "kept": len(kept), "signal": signal,
            "noise_scale": noise / signal if n > 1 and signal > 0 else None,
            "coherence": whole, "coherence_kept": chosen,
            "alignment": alignment(gram_NN), "alignment_kept": alignment(among(kept)),
            "gcg": gain(chosen), "gcg_random": gain(statistics.mean(at_random))}


def pair_numbers(product, a, b, gram_NM):
    """Return the dot product of two branches' mean gradients with its error, and the cosine.

    product: of the means. a, b: the branch_numbers of both, with their norm. gram_NM: the products of single
    gradients, from which the error comes. Their noise is in the variance of the rows' means and again in that
    of the columns' means, so it is subtracted once.
    """
    n, m = gram_NM.shape
    rows, columns = gram_NM.mean(1), gram_NM.mean(0)
    left_NM = gram_NM - rows[:, None] - columns + gram_NM.mean()
    noise = left_NM.square().sum() / ((n - 1) * (m - 1) * n * m)
    variance = (rows.var() / n + columns.var() / m - noise).item()
    signal = a["signal"] * b["signal"] if min(a["signal"], b["signal"]) > 0 else None
    return {"dot": product, "dot_error": math.sqrt(max(variance, 0)),
            "cosine": product / (a["norm"] * b["norm"]) if a["norm"] and b["norm"] else None,
            "cosine_signal": product / math.sqrt(signal) if signal else None}


def gap_numbers(gaps, demand_N):
    """Return how a branch's gap is spread over tokens (histogram) and over rollouts (deciles).

    gaps: log q(y) - log p(y) of every rollout, [T]. demand_N: the score that selection sorts by.
    histogram: how many tokens are below EDGES[0], between two edges, and above the last one. deciles: which
    share of the summed score the tenth of the rollouts with the largest score holds, the next tenth, and so
    on; None where there is no gap.
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
    """Return {name: {"step", "change": {branch: x}}}: the optimizers' next step from each direction alone.

    directions: {name: a gradient per parameter}. gradients: {branch: likewise}, of the losses whose change is
    asked for. Momentum and weight decay are left out: what counts is what this gradient adds now and later,
    not what earlier ones left. Nothing of the student or of its optimizers changes.
    """
    where = {}                                          # parameter -> its optimizer and parameter group
    for optimizer in student.optimizers:
        for group in optimizer.param_groups:
            where |= dict.fromkeys(group["params"], (optimizer, group))
    size = dict.fromkeys(directions, 0.0)
    change = {name: dict.fromkeys(gradients, 0.0) for name in directions}
    for name, direction in directions.items():
        factor = min(1.0, clip / (math.sqrt(dot(direction, direction)) + 1e-6)) if clip else 1.0
        for i, p in enumerate(parameters):
            delta = trial_step(*where[p], p, factor * direction[i], lr)
            size[name] += delta.double().square().sum().item()
            for branch, gradient in gradients.items():
                change[name][branch] += (delta * gradient[i]).sum().item()
    return {name: {"step": math.sqrt(size[name]), "change": change[name]} for name in directions}


def trial_step(optimizer, group, parameter, gradient, lr):
    """Return a parameter's change in a step of a copy of its optimizer, without momentum and weight decay."""
    twin = parameter.detach().clone()
    twin.grad = gradient.to(twin.dtype)
    options = group | {"params": [twin], "lr": lr, "weight_decay": 0.0}
    options |= {"betas": (0.0, group["betas"][1])} if "betas" in group else {"momentum": 0.0}
    other = type(optimizer)([options], lr=lr)
    other.state[twin] = copy.deepcopy(optimizer.state.get(parameter, {}))
    other.step()
    return twin - parameter
