"""The torch backend: a chunk of tokens at a time, the student's logits turned into their gradient in place.

Per chunk of C tokens: two matrix products into two preallocated [C, V] buffers, the row formula on a few rows
at a time (so that they stay in the cache), then dX = dZ @ W and dW += dZ.T @ X. Work is done in float32
(float64 for float64 input).
"""
from dataclasses import dataclass

import torch

from losses import FLOOR, lookup, mix

CHUNK_BYTES = 256 << 20     # both logit buffers; on CUDA a chunk's temporaries of the same shape come on top
BLOCK = 400_000             # logits per block of rows on a CPU: with their temporaries they stay in the cache


@dataclass(frozen=True)
class Spec:
    """The scalar arguments of the fused loss, as documented in kernels.linear_divergence."""
    divergence: str | None
    knob: float | None
    temperature: float
    target: tuple
    vocab: int
    softcap_s: float | None
    softcap_t: float | None
    chunk_bytes: int | None

    def stats(self, labels):
        names = ["entropy_s"]
        if self.divergence:
            names += ["value", "entropy_t", "top1_agree"]
        if labels is not None:
            names += ["logprob_s"] + ["logprob_t"] * bool(self.divergence)
        return names


def used_rows(weight, label_weight):
    """Indices of tokens that any weight keeps. Others get no work, exact zero gradients and statistics."""
    kept = [w != 0 for w in (weight, label_weight) if w is not None]
    return torch.stack(kept).any(0).nonzero()[:, 0]


def run(hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, spec, need_dX, need_dW):
    """(loss, stats, dX or None, dW or None). The gradients are for upstream gradient 1, in input dtype."""
    work = torch.float64 if hidden_s.dtype == torch.float64 else torch.float32
    V, N, device, grad_dtype = spec.vocab, len(hidden_s), hidden_s.device, head_s.dtype
    hidden_s, head_s = hidden_s.detach(), head_s.detach().to(hidden_s.dtype)
    teacher = None if head_t is None else (hidden_t.detach(), head_t.detach().to(hidden_t.dtype))
    used = used_rows(weight, label_weight)
    if len(used) < N:
        hidden_s, weight, labels, label_weight = (
            x if x is None else x[used] for x in (hidden_s, weight, labels, label_weight))
        teacher = teacher and (teacher[0][used], teacher[1])

    buffers = 1 if teacher is None else 2
    chunk = (spec.chunk_bytes or CHUNK_BYTES) // (buffers * V * work.itemsize)
    chunk = max(1, min(chunk, len(used)))
    z_CV = torch.empty(chunk, V, dtype=work, device=device)
    w_CV = None if teacher is None else torch.empty_like(z_CV)
    loss = torch.zeros((), dtype=work, device=device)
    stats = {name: torch.zeros(len(used), dtype=work, device=device) for name in spec.stats(labels)}
    dX = torch.zeros_like(hidden_s) if need_dX else None
    dW = torch.zeros(head_s.shape, dtype=work, device=device) if need_dW else None
    block = max(1, BLOCK // V) if device.type == "cpu" else chunk

    for start in range(0, len(used), chunk):
        at = slice(start, min(start + chunk, len(used)))
        n = at.stop - at.start
        z, w = z_CV[:n], None
        product(hidden_s[at], head_s[:V], out=z)
        if teacher is not None:
            w = w_CV[:n]
            product(teacher[0][at], teacher[1][:V], out=w)
        for first in range(0, n, block):
            rows = slice(first, min(first + block, n))
            here = slice(start + rows.start, start + rows.stop)
            loss += row_block(
                z[rows], None if w is None else w[rows],
                *(x if x is None else x[here] for x in (weight, labels, label_weight)),
                {name: x[here] for name, x in stats.items()}, spec, need_dX or need_dW)
        if need_dX or need_dW:
            dz = z.to(hidden_s.dtype)                           # z holds dZ by now
        if need_dX:
            dX[at] = dz @ head_s[:V]
        if need_dW:
            accumulate(dW[:V], dz, hidden_s[at])
    if len(used) < N:
        scatter = lambda x: x.new_zeros(N, *x.shape[1:]).index_copy_(0, used, x)
        stats = {name: scatter(x) for name, x in stats.items()}
        dX = scatter(dX) if need_dX else None
    dW = dW.to(grad_dtype) if need_dW else None
    return loss, {name: x.float() for name, x in stats.items()}, dX, dW


def product(hidden, head, out):
    """logits = hidden @ head.T in out's dtype: bf16 logits cost 6-19% of the gradient near convergence."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), head.T.to(out.dtype), out=out)


def accumulate(dW, dz, hidden):
    """dW += dz.T @ hidden in dW's dtype."""
    if dz.dtype == dW.dtype:
        dW.addmm_(dz.T, hidden)
    elif dz.is_cuda:
        dW += torch.mm(dz.T, hidden, out_dtype=dW.dtype)
    else:
        dW.addmm_(dz.T.to(dW.dtype), hidden.to(dW.dtype))


def row_block(z, w, weight, labels, label_weight, stats, spec, grad):
    """Fill `stats`; when `grad`, overwrite the student's logits z with dLoss/dz. Returns the block's loss."""
    if spec.softcap_s:
        cap = z.div_(spec.softcap_s).tanh_().clone()        # tanh(z / c), also the derivative's ingredient
        z.mul_(spec.softcap_s)
    lp = torch.log_softmax(z / spec.temperature, -1).clamp_(min=FLOOR)
    p = lp.exp()
    stats["entropy_s"].copy_(-(p * lp).sum(-1))
    if w is not None:
        if spec.softcap_t:
            w.div_(spec.softcap_t).tanh_().mul_(spec.softcap_t)
        lq = torch.log_softmax(mix(z, w, spec.target) / spec.temperature, -1).clamp_(min=FLOOR)
        q = lq.exp()
        formula, knob = lookup(spec.divergence, spec.knob)
        value, slope = formula(lp, lq, p, q, knob)
        value = value.sum(-1)
        stats["value"].copy_(value)
        stats["entropy_t"].copy_(-(q * lq).sum(-1))
        stats["top1_agree"].copy_(lp.argmax(-1) == lq.argmax(-1))
        loss = (weight * value).sum()
        if grad:
            dz = torch.addcmul(slope, p, slope.sum(-1, keepdim=True), value=-1).mul_(weight[:, None])
    else:
        loss, dz = 0.0, torch.zeros_like(z) if grad else None
    if labels is not None:
        y = labels[:, None]
        stats["logprob_s"].copy_(lp.gather(1, y)[:, 0])
        if w is not None:
            stats["logprob_t"].copy_(lq.gather(1, y)[:, 0])
        if label_weight is not None:
            loss = loss - (label_weight * stats["logprob_s"]).sum()
            if grad:
                dz.addcmul_(p, label_weight[:, None]).scatter_add_(1, y, -label_weight[:, None])
    if grad:
        dz.div_(spec.temperature)
        if spec.softcap_s:
            dz.mul_(1 - cap * cap)
        z.copy_(dz)
    return loss
