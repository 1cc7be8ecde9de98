"""Diagnosis: what the gradients of single rollouts say about a training of several branches.

CaMOPD (2605.27115) names two failures of mixing branches: counteraction, branches whose gradients have a
negative dot product, and flattening, rollouts with a small gap that dilute the batch. Whether they are there
is measured at one point of the training from one gradient per rollout. A branch's gradients g_1 .. g_n come
from the method's own objective, each rollout alone with weight 1; everything but the steps is read from the
matrix of their dot products, which is exact as long as they fit in LARGEST bytes and otherwise taken from
every s-th entry of each parameter.

    coherence     Coh(A) = |sum_A g_i| / sum_A |g_i|                                            (sec. 4.4)
    gcg           (Coh(selected) - Coh(all)) / Coh(all), the coherence gain of the selected     (sec. 4.4)
    gcg_random    the same of as many rollouts taken at random, mean of DRAWS. Ours: of n gradients that have
                  nothing in common Coh is 1 / sqrt(n), so fewer are more coherent whichever they are
    alignment     mean g_i . g_j over pairs of different rollouts / mean |g_i|^2: a coherence that does not
                  depend on how many there are. Ours
    noise_scale   trace of the gradients' covariance / |their expectation|^2: the batch in which noise and
                  signal are equal, in rollouts (McCandlish et al., 1812.06162). None: no signal is seen
    signal        |expectation of the gradient|^2, without the part that the noise of n rollouts adds
    dot, cosine   of two branches' mean gradients; dot_error is its standard error over rollouts
    step          |change of the parameters| if this branch alone made the optimizer's next step, with the
                  method's weights: selected, scaled, clipped, at the peak learning rate
    change        that step times the mean gradient of a branch: by how much its loss would change, in nats
                  per token to first order; a branch that suffers from another's step has a positive one
"""
import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass

import torch

LARGEST = 2**30                     # bytes of the gradients that are kept
DRAWS = 200
EDGES = (-8, -4, -2, -1, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1, 2, 4, 8)     # of gaps on tokens, nats


def watched(student, layers):
    """The parameters that learn, in the last `layers` of the network's layers; 0: in the whole network."""
    where = student.net
    if layers:
        stacks = [m for m in student.net.modules() if isinstance(m, torch.nn.ModuleList)]
        where = torch.nn.ModuleList(list(stacks[0])[-layers:])              # the outermost comes first
    return [p for p in where.parameters() if p.requires_grad]


@contextlib.contextmanager
def only(student, parameters):
    """The time in which only some parameters have gradients: backward passes end at the first of them."""
    wanted = set(parameters)
    rest = [p for p in student.net.parameters() if p.requires_grad and p not in wanted]
    for p in rest:
        p.requires_grad_(False)
    yield
    for p in rest:
        p.requires_grad_(True)


def sparse(gradient, rollouts):
    """A gradient as one vector [D], or every s-th entry of it, that `rollouts` of them fit in LARGEST bytes.

    Scaled so that expected dot products stay. s is odd, which widths are not: it does not keep to columns.
    """
    s = -(-4 * sum(g.numel() for g in gradient) * rollouts // LARGEST) | 1
    return math.sqrt(s) * torch.cat([g.flatten()[::s] for g in gradient]).float()


@dataclass
class Measured:
    """One branch: N rollouts, gradients with weight 1 each."""
    gradients_ND: torch.Tensor
    mean: list                          # of the gradients, a tensor per parameter
    step: list                          # the gradient of the method's own weights, likewise
    kept_N: torch.Tensor                # which rollouts are selected
    demand_N: torch.Tensor              # the score by which
    gaps: list                          # log q(y) - log p(y), [T] each


def numbers(student, parameters, measured, shares, cfg):
    """What metrics.jsonl keeps. measured: {branch: Measured}; shares: {branch: share of a mixed step}."""
    branches = {branch: branch_numbers(m.gradients_ND @ m.gradients_ND.T, m.kept_N, cfg.seed)
                | gap_numbers(m.gaps, m.demand_N) for branch, m in measured.items()}
    pairs = {f"{a}, {b}": pair_numbers(measured[a].gradients_ND @ measured[b].gradients_ND.T,
                                       [branches[branch]["norm"] for branch in (a, b)])
             for a, b in itertools.combinations(measured, 2)}
    directions = {branch: m.step for branch, m in measured.items()}
    if len(measured) > 1:
        directions["+".join(measured)] = [sum(shares[b] * g for b, g in zip(measured, gs))
                                          for gs in zip(*(m.mean for m in measured.values()))]
    return {"branches": branches, "pairs": pairs, "steps": trial_steps(
        student, parameters, directions, {b: m.mean for b, m in measured.items()}, cfg.lr, cfg.grad_clip)}


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
    return {"rollouts": n, "kept": len(kept), "norm": math.sqrt(max(total, 0)) / n, "signal": signal,
            "noise_scale": spread / signal if n > 1 and signal > 0 else None,
            "coherence": whole, "coherence_kept": chosen,
            "alignment": alignment(gram_NN), "alignment_kept": alignment(among(kept)),
            "gcg": chosen / whole - 1 if whole else None, "gcg_random": random / whole - 1 if whole else None}


def pair_numbers(gram_NM, norms):
    """Dot product and cosine of two branches' mean gradients, from the products of theirs with each other."""
    dot = gram_NM.mean().item()
    error = sum(gram_NM.mean(1 - side).var().item() / gram_NM.shape[side] for side in (0, 1)
                if gram_NM.shape[side] > 1)
    return {"dot": dot, "dot_error": math.sqrt(error),
            "cosine": dot / (norms[0] * norms[1]) if all(norms) else None}


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
    """{name: {"step", "change": {branch: x}}}: what the optimizers' next step would be, were it that alone.

    directions: {name: a gradient per parameter}; gradients: {branch: likewise}, of the losses whose change is
    asked for. Momentum and weight decay are left out: a gradient's share in this and all later steps counts,
    and no share of the past. Nothing of student or optimizers changes.
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
