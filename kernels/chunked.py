"""The loop of the fused loss: a chunk of tokens at a time, the student's logits turned into their gradient.

For a chunk of C tokens two matrix products fill two preallocated [C, V] buffers, the row step works in place
(rows_torch.py, rows_triton.py), then come dX = dZ @ W and dW += dZ.T @ X. Nothing of size N x V ever exists
and nothing is recomputed: the products take 2 N V (3 Hs + Ht) flops. Logits, statistics and dW are float32
(float64 for float64 input).
"""
import math
import threading
from dataclasses import dataclass

import torch

CHUNK_BYTES = {"cpu": 104 << 20, "gpu": 1280 << 20}     # both logit buffers
ALIGN = 64                                              # columns: rows of the buffers start on 256 bytes
PRODUCTS = {"cpu": 1, "gpu": ALIGN}                     # columns of the products, which cuBLAS wants even
TILE = 128                                              # a chunk of whole tiles of the matrix products


@dataclass(frozen=True)
class Spec:
    """The scalar arguments of the fused loss, checked, as documented in kernels.linear_divergence."""
    temperature: float
    vocab: int
    softcap_s: float | None
    chunk_bytes: int | None
    divergence: str | None = None               # None: no teacher, only the label term
    knob: float | tuple | None = None
    target: tuple = (1.0, 0.0)
    support: str = "full"
    top_k: int | None = None
    entry_clip: float | None = None
    softcap_t: float | None = None

    def stats(self, labels):
        """Return the names of the statistics that there will be, in order."""
        names = ["entropy_s"]
        if self.divergence:
            names += ["value", "entropy_t", "top1_agree"]
        if labels is not None:
            names += ["logprob_s"] + ["logprob_t"] * bool(self.divergence)
        return names


def used_rows(weight, label_weight, labels, vocab):
    """Return the indices of tokens that any weight keeps, or None for all of them.

    The other tokens cost nothing; their gradients and statistics are exact zeros. A kept token with a label
    outside the vocabulary is refused. The host waits for the GPU here, once in a call.
    """
    kept, *more = [w != 0 for w in (weight, label_weight) if w is not None]
    kept = kept | more[0] if more else kept
    foreign = torch.zeros_like(kept) if labels is None else kept & ((labels < 0) | (labels >= vocab))
    kept_number, foreign_number = torch.stack([kept, foreign]).sum(1).tolist()
    if foreign_number:
        least, most = labels[kept].aminmax()
        raise ValueError(f"labels go from {least} to {most}, but the vocabulary has {vocab} ids")
    return None if kept_number == len(kept) else kept.nonzero()[:, 0]


def weighted(stats, weight, label_weight):
    """Return the loss: the weighted sum of the values and of the label terms of all tokens."""
    loss = 0.0
    if weight is not None:
        loss = loss + (weight * stats["value"]).sum()
    if label_weight is not None:
        loss = loss - (label_weight * stats["logprob_s"]).sum()
    return loss


def run(fill, hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, spec, need_dX, need_dW):
    """Return loss, stats, dX or None, dW or None. The gradients are for upstream gradient 1, in input dtype.

    `fill` is the row step, which returns dLoss/dz of a chunk (see rows_torch.fill).
    """
    work = torch.float64 if hidden_s.dtype == torch.float64 else torch.float32
    N, device, grad_dtype, (rows, Hs) = len(hidden_s), hidden_s.device, head_s.dtype, head_s.shape
    V, where = spec.vocab, "cpu" if device.type == "cpu" else "gpu"
    columns = -(-V // PRODUCTS[where]) * PRODUCTS[where]
    hidden_s, head_s = hidden_s.detach(), first_rows(head_s.detach(), columns, hidden_s.dtype)
    if head_t is not None:
        hidden_t, head_t = hidden_t.detach(), first_rows(head_t.detach(), columns, hidden_t.dtype)
    dW = torch.zeros(max(rows, columns), Hs, dtype=work, device=device) if need_dW else None
    used = used_rows(weight, label_weight, labels, V)           # the lines above keep a GPU busy meanwhile
    if used is not None:
        hidden_s, hidden_t, weight, labels, label_weight = (
            x if x is None else x[used] for x in (hidden_s, hidden_t, weight, labels, label_weight))

    grad, buffers, width = need_dX or need_dW, 1 if head_t is None else 2, -(-V // ALIGN) * ALIGN
    budget = spec.chunk_bytes or CHUNK_BYTES[where]
    count = len(hidden_s)
    chunk = rows_per_chunk(count, budget // (buffers * width * work.itemsize))
    z_buffer, *w_buffer = (workspace(i, (chunk, width), work, device) for i in range(buffers))
    names, room = spec.stats(labels), -(-count // ALIGN) * ALIGN        # else Triton compiles again
    stats = dict(zip(names, torch.zeros(len(names), room, dtype=work, device=device)[:, :count]))
    dX = torch.empty_like(hidden_s) if need_dX else None

    for start in range(0, count, chunk):
        at = slice(start, min(start + chunk, count))
        z = product(hidden_s[at], head_s, z_buffer)
        w = None if head_t is None else product(hidden_t[at], head_t, *w_buffer)
        dz = fill(z, w, *(x if x is None else x[at] for x in (weight, labels, label_weight)),
                  {name: x[at] for name, x in stats.items()}, spec, grad, hidden_s.dtype)
        if need_dX:
            torch.mm(dz, head_s, out=dX[at])
        if need_dW:
            accumulate(dW[:columns], dz, hidden_s[at])
    z = w = dz = z_buffer = w_buffer = None                     # freed before dW is copied
    loss = weighted(stats, weight, label_weight)
    if used is not None:
        scatter = lambda x: x.new_zeros(N, *x.shape[1:]).index_copy_(0, used, x)
        stats = {name: scatter(x) for name, x in stats.items()}
        dX = scatter(dX) if need_dX else None
    dW = dW[:rows].to(grad_dtype) if need_dW else None
    return loss, {name: x.float() for name, x in stats.items()}, dX, dW


def first_rows(head, rows, dtype):
    """Return the first `rows` rows of a head in `dtype`, with rows of zeros where it has fewer.

    Rows behind the vocabulary, if there are any, are multiplied by gradients of exactly 0, so they must be
    finite.
    """
    if len(head) >= rows:
        return head[:rows].to(dtype)
    out = head.new_zeros((rows, head.shape[1]), dtype=dtype)
    out[:len(head)] = head
    return out


def rows_per_chunk(rows, most):
    """Return the rows of a chunk, at most `most`: whole tiles if they fit, and no small last chunk."""
    if rows <= most or most < TILE:
        return max(1, min(rows, most))
    most -= most % TILE
    equal = -(-rows // -(-rows // most))
    return min(most, -(-equal // TILE) * TILE)


_held = threading.local()                               # (number, dtype) -> memory, of every thread its own


def workspace(number, shape, dtype, device):
    """Return uninitialised memory. A CPU keeps it from call to call: fresh pages cost time (lab/LOG.md)."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    elements, kept = math.prod(shape), _held.__dict__
    if (number, dtype) not in kept or len(kept[number, dtype]) < elements:
        kept[number, dtype] = torch.empty(elements, dtype=dtype)
    return kept[number, dtype][:elements].view(shape)


def product(hidden, head, buffer):
    """Return hidden @ head.T, written into the buffer and in its dtype.

    Logits rounded to bfloat16 would change the gradient near convergence by 6-19%.
    """
    out = buffer[:len(hidden), :len(head)]
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, head.T, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
    return torch.mm(hidden.to(out.dtype), head.T.to(out.dtype), out=out)


def accumulate(dW, dz, hidden):
    """Add dz.T @ hidden to dW, in dW's dtype."""
    if dz.dtype == dW.dtype:
        dW.addmm_(dz.T, hidden)
    elif dz.is_cuda:
        torch.addmm(dW, dz.T, hidden, out_dtype=dW.dtype, out=dW)
    else:
        dW.addmm_(dz.T.to(dW.dtype), hidden.to(dW.dtype))
