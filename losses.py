"""The objectives: what the student's distribution p is asked to do about the teacher's distribution q.

An objective is four orthogonal choices, and the fused operation in kernels/ takes each of them separately:

    row      one divergence, as a formula per vocabulary entry            DIVERGENCES, this file
    target   the teacher's logits become a * w + b * sg(z)                (1, 0) is the teacher itself
    support  which vocabulary entries count                               full
    weight   one number per token: padding, selection, scale, advantage   methods.py and the loop

A row is `(lp, lq, p, q, knob) -> (value, slope)` with lp = log p(v), lq = log q(v), for one vocabulary
entry v or for a tensor of them. The divergence of a token is the sum of `value` over the vocabulary; `slope`
is d value / d lp with the teacher fixed. One gradient with respect to the student's logits z then serves
them all:

    dz = weight * (slope - p * sum(slope)) / temperature

The sampled-token losses fit too: -log p(y) has slope -1 at v = y and 0 elsewhere. With weight 1 on the
reference tokens it is maximum likelihood; with the advantage as weight on the student's own tokens it is a
policy gradient.

To add a divergence: one function here, decorated with its default knob. The command line, the backends in
kernels/ and the parametrised tests pick it up.
"""
from dataclasses import dataclass

import torch

FLOOR = -1e5        # log-probabilities are floored here, so -inf logits stay finite: exp(FLOOR) is exactly 0
DIVERGENCES = {}    # name -> (row, default knob)


def row(knob=None):
    def register(formula):
        DIVERGENCES[formula.__name__] = formula, knob
        return formula
    return register


@row()
def fkl(lp, lq, p, q, knob):
    """Forward KL(q || p) = sum q (lq - lp): p covers everything q does. Hinton et al., 1503.02531."""
    return q * (lq - lp), -q


@row()
def rkl(lp, lq, p, q, knob):
    """Reverse KL(p || q) = sum p (lp - lq): p keeps to what q approves of. MiniLLM, 2306.08543, eq. 1."""
    return p * (lp - lq), p * (lp - lq + 1)


@row(knob=0.5)
def jsd(lp, lq, p, q, knob):
    """Generalised Jensen-Shannon: b KL(q || m) + (1 - b) KL(p || m) with m = b q + (1 - b) p.

    GKD, 2306.13649, eq. 1, where 0 < b < 1 is the weight of the teacher in the mixture. The scale vanishes at
    both ends: jsd / b -> fkl as b -> 0 and jsd / (1 - b) -> rkl as b -> 1. Use fkl and rkl there; b = 0 or 1
    is refused rather than silently rescaled.
    """
    b = torch.as_tensor(knob, dtype=lp.dtype, device=lp.device)
    lm = torch.logaddexp(lq + b.log(), lp + (-b).log1p())         # the mixture never leaves log space
    pull = (1 - b) * p * (lp - lm)                                # the terms through m cancel in the slope
    return b * q * (lq - lm) + pull, pull


def lookup(name, knob=None):
    """(row, knob) of a divergence; knob None: the paper's default. Refuses unknown names, unusable knobs."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; there are: {', '.join(DIVERGENCES)}")
    formula, default = DIVERGENCES[name]
    if knob is not None and default is None:
        raise ValueError(f"divergence {name!r} has no knob, but was given {knob}")
    knob = default if knob is None else knob
    if name == "jsd" and not 0 < knob < 1:
        raise ValueError(f"jsd needs 0 < beta < 1, not {knob}: its scale vanishes at the ends; "
                         "use fkl or rkl there")
    return formula, knob


def floored_log_softmax(logits_NV):
    return torch.log_softmax(logits_NV, -1).clamp(min=FLOOR)


def divergence(z_NV, w_NV, name, *, knob=None, temperature=1.0, target=(1.0, 0.0)):
    """The dense reference: divergence of softmax(z / temperature) from the target, per token.

    z_NV: the student's logits, any float dtype (float64 stays float64); differentiable in z only.
    w_NV: the teacher's logits. target (a, b): they become a * w + b * sg(z) first.
    Returns value_N in nats. Materialises several [N, V] tensors: use kernels.linear_divergence to train.
    """
    formula, knob = lookup(name, knob)
    lp = floored_log_softmax(z_NV / temperature)
    with torch.no_grad():
        lq = floored_log_softmax(mix(z_NV, w_NV, target) / temperature)
    return formula(lp, lq, lp.exp(), lq.exp(), knob)[0].sum(-1)


def mix(z, w, target):
    """The logits of the target: a * w + b * z. A zero factor drops its term, so 0 * -inf cannot arise."""
    a, b = target
    if b == 0:
        return w if a == 1 else a * w
    return b * z if a == 0 else a * w + b * z


@dataclass(frozen=True)
class Objective:
    """What a Job minimises, token by token. Exactly one of `divergence` and `label` is set.

    divergence   a name in DIVERGENCES, with its knob
    label        "nll": -log p(y), maximum likelihood on the tokens as they are
                 "pg":  -w A log p(y) with A = sg[lq(y) - lp(y)] and the weight w of `importance_weight`: the
                 sampled-token reverse KL as a policy gradient. CaMOPD, 2605.27115, eq. 1-2.
    temperature  divides both models' logits in the loss (nothing to do with the sampling temperature)
    importance   (low, high) bounds of the importance weight of "pg"
    """
    divergence: str | None = None
    label: str | None = None
    knob: float | None = None
    temperature: float = 1.0
    target: tuple = (1.0, 0.0)
    importance: tuple = (0.5, 2.0)

    def __post_init__(self):
        assert (self.divergence is None) != (self.label is None), (self.divergence, self.label)
        assert self.label in (None, "nll", "pg"), self.label


def importance_weight(lp_T, sampler_lp_T, low, high):
    """w = sg[p_train / p_sampler] inside [low, high], else 0. MiMo-V2-Flash, 2601.02780.

    lp_T, sampler_lp_T: log-probabilities of the sampled tokens under the training forward and as they were
    sampled. The bounds are Nemotron-Cascade 2's.
    """
    w_T = (lp_T - sampler_lp_T).exp()
    return torch.where((w_T >= low) & (w_T <= high), w_T, 0.0)


def policy_gradient_weight(gap_T, lp_T, sampler_lp_T, importance):
    """w A, the factor of -log p(y) in CaMOPD eq. 2, with the advantage A = the gap lq(y) - lp(y).

    For y ~ p the expected gradient is that of the per-token reverse KL.
    """
    return importance_weight(lp_T, sampler_lp_T, *importance) * gap_T


LOSSES = {"nll": Objective(label="nll"), "pg": Objective(label="pg"),
          **{name: Objective(divergence=name) for name in DIVERGENCES}}
