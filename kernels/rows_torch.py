"""The row step of the torch backend: rows of logits become their statistics and their gradient, in place.

It takes a few rows at a time, so that a block and its temporaries stay in a CPU's cache.
"""
import torch

from losses import FLOOR, mix, restrict, support_entries, total

BLOCK = {"cpu": 200_000, "gpu": 1 << 24}        # logits per block of rows


def fill(z_CV, w_CV, weight, labels, label_weight, stats, spec, grad, dtype):
    """Fill `stats` (name -> [C]) from logits z and w (None: no teacher), and overwrite both.

    With `grad`, return dLoss/dz_CV in `dtype`, and None otherwise. Columns behind spec.vocab are no logits:
    their gradient is 0.
    """
    C, V = len(z_CV), spec.vocab
    step = max(1, BLOCK["cpu" if z_CV.device.type == "cpu" else "gpu"] // V)
    for first in range(0, C, step):
        rows = slice(first, first + step)
        z, w = (x if x is None else x[rows, :V] for x in (z_CV, w_CV))
        block(z, w, *(x if x is None else x[rows] for x in (weight, labels, label_weight)),
              {name: x[rows] for name, x in stats.items()}, spec, grad)
    if not grad:
        return None
    z_CV[:, V:] = 0
    return z_CV.to(dtype)


def scale(gradient, factor):
    """Multiply a gradient in place by `factor`, a tensor of one number."""
    gradient.mul_(factor)


def block(z, w, weight, labels, label_weight, stats, spec, grad):
    """Do the row step on a few rows: fill `stats`, and turn z into its gradient if `grad`."""
    whose, _, form = spec.support.partition("_")        # "student_tail" -> student, tail; "full" has no form
    y, dz, keep = None if labels is None else labels[:, None], None, None
    bend = capped(z, spec.softcap_s, spec.temperature)
    if w is not None:
        capped(w, spec.softcap_t, spec.temperature)
    if form:
        keep = support_entries(whose, spec.top_k, z, w)
    lp = torch.log_softmax(z, -1, out=z)
    p = lp.exp()
    stats["entropy_s"].copy_(torch.linalg.vecdot(p, lp)).neg_()
    if labels is not None:
        stats["logprob_s"].copy_(lp.gather(1, y)[:, 0])
    if w is not None:
        w = mix(lp, w, spec.target)         # lp for z: a constant per row, which the softmax removes
        lq = torch.log_softmax(w, -1, out=w)
        q = lq.exp()
        stats["entropy_t"].copy_(torch.linalg.vecdot(q, lq)).neg_()
        stats["top1_agree"].copy_(lp.gather(1, lq.argmax(-1, keepdim=True))[:, 0] == lp.amax(-1))
        if labels is not None:
            stats["logprob_t"].copy_(lq.gather(1, y)[:, 0])
        among = p                                               # the student's, over the entries that count
        if form == "renorm":
            lp, lq = (torch.log_softmax(restrict(x, keep), -1) for x in (lp, lq))
            among, q, keep = lp.exp(), lq.exp(), None
        value, slope = total(spec.divergence, spec.knob, lp, lq, among, q, keep, form, spec.entry_clip)
        stats["value"].copy_(value)
        if grad:
            dz = torch.addcmul(slope, among, slope.sum(-1, keepdim=True), value=-1, out=z)
            dz.mul_(weight[:, None])
    if grad:
        dz = z.zero_() if dz is None else dz
        if label_weight is not None:
            dz.addcmul_(p, label_weight[:, None]).scatter_add_(1, y, -label_weight[:, None])
        if spec.temperature != 1:
            dz.div_(spec.temperature)
        if bend is not None:
            dz.mul_(bend)


def capped(logits, softcap, temperature):
    """Make logits what the loss sees, in place. Return the softcap's derivative, None if there is none."""
    bend = None
    if softcap:
        logits.div_(softcap).tanh_()
        bend = 1 - logits * logits
        logits.mul_(softcap)
    logits.clamp_(min=FLOOR)
    if temperature != 1:
        logits.div_(temperature)
    return bend
