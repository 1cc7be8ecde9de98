"""The objectives: what the student's distribution p is asked to do about the teacher's distribution q.

An objective is four independent choices, and the fused operation in kernels/ takes each of them separately:

    divergence   a formula per vocabulary entry                                DIVERGENCES
    target       what the student is compared with, the teacher or a mixture   mix, target_at
    support      which vocabulary entries count                                SUPPORTS, total
    weight       one number per token: padding, selection, scale, advantage    methods/ and the loop (opd.py)

**The divergence.** A formula is `(lp, lq, p, q, knob) -> (value, slope)` with lp = log p(v), lq = log q(v),
for one vocabulary entry v or for a tensor of them. The divergence of a token is the sum of `value` over the
vocabulary; `slope` is d value / d lp with the teacher fixed. One gradient with respect to the student's
logits z then serves them all (w are the teacher's logits; sg[x] is x without gradient):

    dz = weight * (slope - p * sum(slope)) / temperature

    --loss       per token                                                    knob               source
    fkl          KL(q || p): p covers everything q does                                          Hinton 2015
    rkl          KL(p || q): p keeps to what q approves of                                       MiniLLM
    jeffreys     KL(q || p) + KL(p || q)
    jsd          b KL(q || m) + (1-b) KL(p || m), m = b q + (1-b) p           --jsd_beta         GKD
    skew_fkl     KL(q || a q + (1-a) p)                                       --skew_alpha       DistiLLM
    skew_rkl     KL(p || a p + (1-a) q)                                       --skew_alpha       DistiLLM
    todi         a q log(q/p) + (1-a) p log(p/q), a = sigmoid(b log(q/p))     --todi_beta        ToDi
    power        1/(l(l+1)) q [(q/p)^l - 1]                                   --power_lambda     REDistill
    alpha_beta   -1/(ab) [q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b)]        --alpha_beta A B   ABKD
    akl          fkl and rkl, weighted by the gaps in q's head and tail       --akl_mu           AKL
    tvd          1/2 |p - q|
    pg           -c A log p(y), A = log q(y) - log p(y), importance weight c  --importance       CaMOPD
    nll          -log p(y)

The last two look at the sampled token only. They fit, too: -log p(y) has slope -1 at v = y and 0 elsewhere.
With weight 1 on reference tokens it is maximum likelihood; with an advantage as weight on the student's own
tokens it is a policy gradient. (Of REDistill, a paper on image classification, the order of p and q is ours.)

**The target**, `--target`: the `teacher`; `veto`, q p^beta renormalised, with beta falling to 0 (2601.07155);
`taid`, a mixture of both models' logits that ends at the teacher (2501.16937, without its adaptive pace).

**The support**, `--support`: `full`, or the `--top_k` largest entries of `student_*`, of `teacher_*`, of both
at once (`intersection_*`), or of either (`union_*`). The others count for nothing (`*_raw`), for nothing and
without the gradient of the kept mass (`*_sg`), have no probability (`*_renorm`), or are one more entry
(`*_tail`). This follows "The Many Faces of OPD", 2605.11182; `*_sg` is that paper's for `rkl`, for other
divergences our generalisation. Its default, the student's top 20 with both sides renormalised and log p
without gradient, is `--loss rkl --support student_renorm --top_k 20`: after renormalising, the gradient that
it stops is 0. It fixes the entries at the rollout, we choose them at the update; in a loop that makes one
update of every batch both are the same student (a test holds the entries to that).

**The clip**, `--entry_clip C`: every entry that counts adds at most C to the value, min(value, C), and one
that is cut off has no slope. OPSD, 2601.18734, for `fkl`; an option of every divergence but `akl`. It comes
after the support: renormalised entries and the tail, one entry, are clipped as they are.

To add a divergence: one function here with the name of its knob, and the same lines in
kernels/rows_triton.py. The command line, the other backends and the parametrised tests pick it up. This file
needs nothing but torch.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOOR = -1e5        # logits are floored here, so that -inf stays finite: its probability is exactly 0
MASKED = -1e30      # logit of an entry that is left out; finite, since -inf minus -inf is not a number
CLAMP = 70.0        # largest exponent of power and alpha_beta: a sum of e^70 over a vocabulary is finite


# ---- divergences -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Divergence:
    """A formula with its knob."""
    formula: Callable
    knob: str | None                    # the name of its parameter and its flag; None: it has none
    default: float | tuple | None       # the paper's value of the knob
    about: str                          # what the knob does
    usable: Callable                    # knob -> whether it makes sense
    elementwise: bool                   # False: the formula needs all logits of a token, in order


DIVERGENCES = {}    # name -> Divergence


def formula(knob=None, default=None, about="", usable=lambda knob: True, elementwise=True):
    """Register a function as a divergence under its own name."""
    def register(function):
        DIVERGENCES[function.__name__] = Divergence(function, knob, default, about, usable, elementwise)
        return function
    return register


@formula()
def fkl(lp, lq, p, q, knob):
    """Forward KL(q || p) = sum q (lq - lp): p covers everything q does. Hinton et al., 1503.02531."""
    return q * (lq - lp), -q


@formula()
def rkl(lp, lq, p, q, knob):
    """Reverse KL(p || q) = sum p (lp - lq): p keeps to what q approves of. MiniLLM, 2306.08543, eq. 1."""
    value = p * (lp - lq)
    return value, value + p


@formula("jsd_beta", 0.5, "weight of the teacher in the mixture, between 0 and 1 (at the ends use fkl or "
         "rkl); GKD 2306.13649", lambda b: 0 < b < 1)
def jsd(lp, lq, p, q, b):
    """Generalised Jensen-Shannon: b KL(q || m) + (1 - b) KL(p || m) with m = b q + (1 - b) p.

    GKD, 2306.13649, eq. 1; in code, b is TRL's beta, SDPO's alpha and 1 minus DistiLLM's lam.
    The scale vanishes at both ends: jsd / b -> fkl as b -> 0 and jsd / (1 - b) -> rkl as b -> 1. Use fkl and
    rkl there; b = 0 or 1 is refused rather than silently rescaled.
    """
    lm = log_mixture(b, q, p)
    pull = (1 - b) * p * (lp - lm)                                # the terms through m cancel in the slope
    return b * q * (lq - lm) + pull, pull


@formula()
def jeffreys(lp, lq, p, q, knob):
    """KL(q || p) + KL(p || q)."""
    ratio = lp - lq
    return (p - q) * ratio, p * ratio + (p - q)


SKEW = ("skew_alpha", 0.1, "weight of the expectation's own distribution in the mixture, between 0 and 1; "
        "DistiLLM 2402.03898", lambda a: 0 < a < 1)


@formula(*SKEW)
def skew_fkl(lp, lq, p, q, a):
    """KL(q || a q + (1 - a) p). DistiLLM, 2402.03898."""
    lm = log_mixture(a, q, p)
    return q * (lq - lm), (a - 1) * p * torch.exp(lq - lm)


@formula(*SKEW)
def skew_rkl(lp, lq, p, q, a):
    """KL(p || (1 - a) q + a p). DistiLLM, 2402.03898; in DistiLLM-2's code a p has no gradient."""
    lm = log_mixture(a, p, q)
    value = p * (lp - lm)
    return value, value + p - a * p * torch.exp(lp - lm)


@formula("todi_beta", 1.0, "how sharply log q/p decides between forward and reverse, above 0; ToDi "
         "2505.16297", lambda b: 0 < b <= 1e4)
def todi(lp, lq, p, q, b):
    """Token-wise: sum a q (lq - lp) + (1 - a) p (lp - lq) with a = sg sigmoid(b (lq - lp)). 2505.16297."""
    ratio = lp - lq
    a = torch.sigmoid(-b * ratio).detach()
    return ((1 - a) * p - a * q) * ratio, (1 - a) * p * (ratio + 1) - a * q


@formula("power_lambda", 2 / 3, "order of D_lambda(q || p), not 0 (fkl) or -1 (rkl); -1 - lambda swaps q and "
         "p; REDistill 2602.04677", lambda lam: min(abs(lam), abs(lam + 1)) >= 1e-3 and abs(lam) <= 100)
def power(lp, lq, p, q, lam):
    """Cressie-Read: 1 / (lam (lam + 1)) sum q [(q / p)^lam - 1]. REDistill, 2602.04677, takes lam = 2/3."""
    r = clamped_exp(lq + lam * (lq - lp))
    return (r - q) / (lam * (lam + 1)), -r / (lam + 1)


@formula("akl_mu", 0.5, "teacher's probability that counts as the head, between 0 and 1; 2404.02657",
         lambda mu: 0 < mu < 1, elementwise=False)
def akl(lp, lq, p, q, mu):
    """Adaptive KL: forward and reverse KL weighted by the gaps |p - q| in q's head and tail. 2404.02657.

    Head: the teacher's largest entries that hold up to mu of its mass, the largest one always; in ToDi's code
    also the entry that crosses mu. It sorts the vocabulary of every token, so there is no Triton version, and
    only the full support.
    """
    order = q.argsort(dim=-1, descending=True, stable=True)
    in_order = q.gather(-1, order).cumsum(-1) <= mu
    in_order[..., 0] = True
    head = torch.zeros_like(in_order).scatter(-1, order, in_order)
    gap = (p - q).abs().detach()
    head_gap = (gap * head).sum(-1, keepdim=True)
    share = head_gap / gap.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    ratio = lp - lq
    return ((1 - share) * p - share * q) * ratio, (1 - share) * p * (ratio + 1) - share * q


@formula("alpha_beta", (0.2, 0.7), "exponents A of q and B of p, neither 0 (1 0 is fkl, 0 1 is rkl), A + B "
         "above 0; ABKD 2505.04560",
         lambda ab: min(abs(ab[0]), abs(ab[1]), sum(ab)) >= 1e-3 and max(ab) <= 100)
def alpha_beta(lp, lq, p, q, knob):
    """-1/(ab) sum q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b). ABKD, 2505.04560."""
    a, b = knob
    r, q_ab, p_ab = clamped_exp(a * lq + b * lp), torch.exp((a + b) * lq), torch.exp((a + b) * lp)
    return (a * q_ab + b * p_ab - (a + b) * r) / (a * b * (a + b)), (p_ab - r) / a


@formula()
def tvd(lp, lq, p, q, knob):
    """Total variation: 1/2 sum |p - q|."""
    return 0.5 * (p - q).abs(), 0.5 * p * torch.sign(p - q)


def log_mixture(a, p, q):
    """Return log(a p + (1 - a) q), a sum in which nothing cancels; where both are 0, of the least float."""
    return torch.log((a * p).add_(q, alpha=1 - a).clamp_(min=torch.finfo(p.dtype).tiny))


def clamped_exp(x):
    """Return e^x with x at most CLAMP. The slope does not vanish there: a student far off is still pulled."""
    return torch.exp(x - (x - CLAMP).clamp(min=0).detach())


def lookup(name, knob=None):
    """Return (Divergence, knob); knob None: the paper's. Refuses unknown names and unusable knobs."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; there are: {', '.join(DIVERGENCES)}")
    found = DIVERGENCES[name]
    if knob is not None and found.knob is None:
        raise ValueError(f"divergence {name!r} has no knob, but was given {knob}")
    knob = found.default if knob is None else tuple(knob) if isinstance(knob, list) else knob
    count = lambda x: len(x) if isinstance(x, tuple) else 1
    if found.knob and (count(knob) != count(found.default) or not found.usable(knob)):
        raise ValueError(f"{name} cannot use {found.knob} {knob}. {found.knob}: {found.about}")
    return found, knob


# ---- targets and supports ----------------------------------------------------------------------------------

def mix(z, w, target):
    """Return the logits of the target, a * w + b * z. A zero factor drops its term."""
    a, b = target
    if b == 0:
        return w if a == 1 else a * w
    return b * z if a == 0 else a * w + b * z


def target_at(name, start, done):
    """Return the (a, b) of `mix` when the fraction `done` (0 to 1) of the training is over.

    teacher   (1, 0) throughout
    veto      (1, beta): q p^beta, renormalised. beta falls linearly from `start` to 0. Veto, 2601.07155
    taid      (t, 1 - t): t rises linearly from `start` to 1. TAID, 2501.16937, without its adaptive pace

    `done` reaches 1 at the last step. Veto's code has step / steps, TAID's (step - 1) / steps (at first 0).
    """
    return {"teacher": (1.0, 0.0), "veto": (1.0, start * (1 - done)),
            "taid": (start + (1 - start) * done, (1 - start) * (1 - done))}[name]


SUPPORTS = ("full", *(f"{whose}_{form}" for whose in ("student", "teacher", "intersection", "union")
                      for form in ("raw", "sg", "renorm", "tail")))


def top_entries(logits_NV, k):
    """Return a boolean [N, V]: the k largest logits of every token, and all that tie with the last one."""
    return logits_NV >= logits_NV.topk(min(k, logits_NV.shape[-1]), -1).values[..., -1:]


def support_entries(whose, k, z_NV, w_NV):
    """Return a boolean [N, V]: the entries that count, of student, teacher, their intersection or union."""
    if whose in ("student", "teacher"):
        return top_entries(z_NV if whose == "student" else w_NV, k)
    both = top_entries(z_NV, k), top_entries(w_NV, k)
    return both[0] & both[1] if whose == "intersection" else both[0] | both[1]


def restrict(logits_NV, keep_NV):
    """Return logits with no probability outside `keep_NV`."""
    return logits_NV.masked_fill(~keep_NV, MASKED)


def clipped(value, slope, clip):
    """Return min(value, clip) of every entry, and its slope, 0 where that is cut off. OPSD, 2601.18734."""
    if clip is None:
        return value, slope
    return value.clamp(max=clip), slope.masked_fill(value > clip, 0.0)


def total(name, knob, lp, lq, p, q, keep=None, form=None, clip=None):
    """Return (value_N, slope_NV) of a divergence from the log-probabilities of a support's entries.

    keep None: the full vocabulary, or renormalised logits. Otherwise the top-k entries count, and `form` says
    what becomes of the others ("The Many Faces of OPD", 2605.11182):

    raw    nothing. At p = q the gradient is not 0 but c times that of the kept mass, c as in `mass_slope`
    sg     nothing, and the slope loses that c p: for rkl, sum p (sg[lp] - lq)
    tail   they are one more entry, with the sum of their probabilities

    clip: the most that an entry adds to the value, after all this; None: as much as it has.
    """
    divergence_of = DIVERGENCES[name].formula
    value, slope = divergence_of(lp, lq, p, q, knob)
    if form == "sg":
        c = mass_slope(name, knob)
        value, slope = value - c * (p - p.detach()), slope - c * p
    value, slope = clipped(value, slope, clip)
    if keep is None:
        return value.sum(-1), slope
    value, slope = (value * keep).sum(-1), slope * keep
    if form == "tail":
        lp_tail, lq_tail = (torch.logsumexp(x.masked_fill(keep, MASKED), -1, keepdim=True) for x in (lp, lq))
        value_tail, slope_tail = clipped(
            *divergence_of(lp_tail, lq_tail, lp_tail.exp(), lq_tail.exp(), knob), clip)
        value = value + value_tail[..., 0]
        slope = torch.where(keep, slope, slope_tail * (lp - lp_tail).exp())
    return value, slope


def mass_slope(name, knob):
    """Return c with slope = c p wherever p = q: without effect on the full vocabulary, but not on a part."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return DIVERGENCES[name].formula(zero, zero, one, one, knob)[1].item()


def check_support(name, support, top_k, entry_clip=None):
    """Refuse a support or a clip that does not exist, lacks its top_k, or that the divergence cannot use."""
    if support not in SUPPORTS:
        raise ValueError(f"unknown support {support!r}; there are: {', '.join(SUPPORTS)}")
    fits = top_k is None if support == "full" else isinstance(top_k, int) and top_k >= 1
    if not fits:
        raise ValueError(f"support {support!r} with top_k {top_k}: every support but 'full' needs a top_k, a "
                         "whole number of at least 1, and 'full' has none")
    if support != "full" and not DIVERGENCES[name].elementwise:
        raise ValueError(f"{name} needs the full vocabulary, not support {support!r}")
    if entry_clip is not None and not 0 < entry_clip < float("inf"):
        raise ValueError(f"entry_clip {entry_clip} is not a finite number above 0; None is no clip")
    if entry_clip is not None and not DIVERGENCES[name].elementwise:
        raise ValueError(f"{name} weighs the entries of a token together, and cannot clip single ones")


def divergence(z_NV, w_NV, name, *, knob=None, temperature=1.0, target=(1.0, 0.0), support="full",
               top_k=None, entry_clip=None):
    """Return the divergence of softmax(z / temperature) from the target, per token: the dense reference.

    z_NV: the student's logits, any float dtype (float64 stays float64); differentiable in z only.
    w_NV: the teacher's logits. target (a, b): they become a * w + b * sg(z) first. Both are floored at FLOOR;
    a student's logit below it has no gradient.
    support, top_k: which entries count; the top k are of the logits z or w, or of each.
    entry_clip: the most that one of them adds, in nats; None: no limit.
    Returns value_N in nats. Materialises several [N, V] tensors: use kernels.linear_divergence to train.
    """
    _, knob = lookup(name, knob)
    check_support(name, support, top_k, entry_clip)
    whose, _, form = support.partition("_")
    z_NV, w_NV = z_NV.clamp(min=FLOOR), w_NV.detach().clamp(min=FLOOR)
    keep = None if support == "full" else support_entries(whose, top_k, z_NV.detach(), w_NV)
    z, w = z_NV / temperature, mix(z_NV.detach(), w_NV, target) / temperature
    if form == "renorm":
        z, w, keep = restrict(z, keep), restrict(w, keep), None
    lp, lq = torch.log_softmax(z, -1), torch.log_softmax(w, -1)
    return total(name, knob, lp, lq, lp.exp(), lq.exp(), keep, form, entry_clip)[0]


@dataclass(frozen=True)
class Objective:
    """What a Job minimises, token by token. Exactly one of `divergence` and `label` is set.

    divergence   a name in DIVERGENCES, with its knob, target, support, top_k and entry_clip
    label        "nll": -log p(y), maximum likelihood on the tokens as they are
                 "pg":  -w A log p(y) with A = sg[lq(y) - lp(y)] and the weight w of `importance_weight`: the
                 sampled-token reverse KL as a policy gradient. CaMOPD, 2605.27115, eq. 1-2.
    temperature  divides both models' logits in the loss (nothing to do with the sampling temperature)
    importance   (low, high) bounds of the importance weight of "pg"
    advantage_clip  the gap counts in the advantage of "pg" as at most so much, either way; None: as it is
    reward       weight alpha of the reward in it: A = gap + alpha (r - the mean r of the prompt's rollouts)
    cap          of `truncated_importance`, by which weights are multiplied for every loss but pg; None: they
                 are not
    ce           weight of -log p(y) beside the divergence, as in Hinton et al., 1503.02531
    """
    divergence: str | None = None
    label: str | None = None
    knob: float | tuple | None = None
    temperature: float = 1.0
    target: tuple = (1.0, 0.0)
    support: str = "full"
    top_k: int | None = None
    entry_clip: float | None = None
    importance: tuple = (0.5, 2.0)
    advantage_clip: float | None = None
    reward: float = 0.0
    cap: float | None = None
    ce: float = 0.0

    def __post_init__(self):
        assert (self.divergence is None) != (self.label is None), (self.divergence, self.label)
        assert self.label in (None, "nll", "pg"), self.label


def importance_weight(lp_T, sampler_lp_T, low, high):
    """Return w = sg[p_train / p_sampler] inside [low, high], else 0. MiMo-V2-Flash, 2601.02780.

    lp_T, sampler_lp_T: log-probabilities of the sampled tokens under the training forward and as they were
    sampled. The bounds are Nemotron-Cascade 2's.
    """
    w_T = (lp_T - sampler_lp_T).exp()
    return torch.where((w_T >= low) & (w_T <= high), w_T, 0.0)


def truncated_importance(lp_T, sampler_lp_T, cap):
    """Return sg[min(p_train / p_sampler, cap)], 1 where the sampler is what is trained. SDPO's code."""
    return (lp_T - sampler_lp_T).exp().clamp(max=cap)


def policy_gradient_weight(gap_T, lp_T, sampler_lp_T, importance, clip=None, reward=0.0):
    """Return w A, the factor of -log p(y) in CaMOPD eq. 2, with the advantage A = the gap lq(y) - lp(y).

    For y ~ p the expected gradient is that of the per-token reverse KL. clip: the gap counts as at most so
    much, either way. reward: what is added to it, one number for the rollout.
    """
    advantage_T = gap_T if clip is None else gap_T.clamp(-clip, clip)
    return importance_weight(lp_T, sampler_lp_T, *importance) * (advantage_T + reward)


LOSSES = {"nll": Objective(label="nll"), "pg": Objective(label="pg"),
          **{name: Objective(divergence=name) for name in DIVERGENCES}}
