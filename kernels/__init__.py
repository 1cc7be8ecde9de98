"""Fused vocabulary-level losses: hidden states in, loss and gradients out, never an [N, V] tensor.

    loss = sum_n weight_n * D(p_n, q_n)  +  sum_n label_weight_n * -log p_n(y_n)

with p = softmax(hidden_s @ head_s.T / temperature) and q the target made of the teacher's logits. Both
gradients (hidden states and head) are computed in the forward pass, chunk by chunk, while the logits exist,
and only scaled in backward.

All backends compute the same. "triton" (on GPUs) and "torch" (everywhere) are the loop of chunked.py with the
row step of rows_triton.py or rows_torch.py. "dense", the oracle, is plain autograd on whole logits: the tests
compare the others with it. README.md is the manual, with measurements.
"""
import importlib.util
import math
import os

import torch
from torch.autograd.function import once_differentiable

from losses import DIVERGENCES, FLOOR, check_support, divergence, lookup, mix

from . import chunked, rows_torch

BACKENDS = ("triton", "torch", "dense")


def linear_divergence(hidden_s_NH, head_s_VH, hidden_t_NH, head_t_VH, weight_N=None, *, divergence="rkl",
                      knob=None, temperature=1.0, target=(1.0, 0.0), support="full", top_k=None,
                      entry_clip=None, labels_N=None, label_weight_N=None, vocab=None, softcap_s=None,
                      softcap_t=None, chunk_bytes=None, backend=None):
    """Return the weighted sum of per-token divergences between two models' heads, and statistics.

    N is every position of the batch that counts, flattened; hidden state n is the one that predicts token n.

    hidden_s_NH [N, Hs], head_s_VH [V, Hs]   the student; the loss is differentiable with respect to these two
    hidden_t_NH [N, Ht], head_t_VH [V', Ht]  the teacher, constant; Hs != Ht and V != V' are normal. A head of
                                             another dtype is cast to its hidden states' (fp32 head, bf16 run)
    weight_N [N]                             weight of each token's divergence; None = ones; may be negative
    divergence, knob, target                 a name in losses.DIVERGENCES, its knob, the target (losses.py)
    temperature                              divides both models' logits
    support, top_k                           a name in losses.SUPPORTS: "full" (all shared vocabulary entries
                                             count), or the top_k largest logits of student_*, teacher_*, both
                                             (intersection_*) or either (union_*)
    entry_clip                               the most that an entry adds to the divergence; None = no limit
    labels_N [N] int64, label_weight_N [N]   adds sum_n label_weight_n * -log p(y_n); None = no such term
    vocab                                    number of shared ids; later columns are -inf and get no gradient
    softcap_s, softcap_t                     logits become c * tanh(logits / c) (Gemma 2)
    chunk_bytes                              memory of the two logit buffers; None = chunked.CHUNK_BYTES
    backend                                  "triton", "torch", "dense"; None = the fastest that can do it

    Returns (loss, stats): loss a float32 scalar (float64 for float64 input); stats a dict of detached [N]
    tensors of softmax(logits / temperature): value, entropy_s, entropy_t (nats), top1_agree, and with labels
    logprob_s, logprob_t; the _t entries describe the target. They are float32, so a value is off by about
    1e-6 nats, however small it is; ties of top1_agree may go either way. Tokens whose weights are both 0 are
    skipped, whatever their label, and read 0 in stats.
    """
    _, knob = lookup(divergence, knob)
    check_support(divergence, support, top_k, entry_clip)
    return _loss(hidden_s_NH, head_s_VH, hidden_t_NH, head_t_VH, weight_N, labels_N, label_weight_N, backend,
                 divergence=divergence, knob=knob, temperature=temperature, target=target, vocab=vocab,
                 support=support, top_k=top_k, entry_clip=entry_clip, softcap_s=softcap_s,
                 softcap_t=softcap_t, chunk_bytes=chunk_bytes)


def linear_logprob(hidden_NH, head_VH, labels_N, weight_N=None, *, temperature=1.0, vocab=None, softcap=None,
                   chunk_bytes=None, backend=None):
    """Return sum_n weight_n * -log p(y_n), for maximum likelihood, policy gradients, DPO.

    The arguments are those of linear_divergence. Returns (loss, stats); stats has logprob_s and entropy_s.
    Under torch.no_grad this is the cheap way to score tokens.
    """
    return _loss(hidden_NH, head_VH, None, None, None, labels_N, weight_N, backend, temperature=temperature,
                 vocab=vocab, softcap_s=softcap, chunk_bytes=chunk_bytes)


def _loss(hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, backend, *, divergence=None,
          vocab=None, softcap_s=None, softcap_t=None, **scalars):
    """Check the arguments, fill in their defaults, and compute (loss, stats) by the chosen backend."""
    sizes = _check_tensors(hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight,
                           teacher=divergence is not None)
    shared = min(sizes["V"], sizes.get("V'", sizes["V"]))
    vocab = shared if vocab is None else vocab
    _check_scalars(vocab=vocab, shared=shared, **scalars)
    work = torch.float64 if hidden_s.dtype == torch.float64 else torch.float32
    if weight is None and divergence:
        weight = hidden_s.new_ones(sizes["N"], dtype=work)
    if label_weight is None and not divergence:
        label_weight = hidden_s.new_ones(sizes["N"], dtype=work)
    weight, label_weight = (x if x is None else x.detach().to(work) for x in (weight, label_weight))
    labels = labels if labels is None else labels.long()
    spec = chunked.Spec(divergence=divergence, vocab=vocab, softcap_s=softcap_s or None,
                        softcap_t=softcap_t or None, **scalars)
    backend = _choose(backend, hidden_s, divergence)
    if backend == "triton":
        from . import rows_triton as rows       # where there is no GPU, there may be no triton
    else:
        rows = rows_torch
    per_token = (x if x is None else x.contiguous() for x in (weight, labels, label_weight))
    tensors = hidden_s, head_s, hidden_t, head_t, *per_token
    with torch.autocast(hidden_s.device.type, enabled=False):   # it would compute statistics in bf16
        if backend == "dense":
            return _dense(*tensors, spec, work)
        loss, *stats = _Fused.apply(*tensors, spec, rows, torch.is_grad_enabled())
    return loss, dict(zip(spec.stats(labels), stats))


def _check_tensors(hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, teacher):
    """Return the sizes N, V, .. of the arguments, and refuse by name whatever does not fit."""
    sizes = {}
    for name, x, letters, needed in (
            ("hidden_s_NH", hidden_s, "N Hs", True), ("head_s_VH", head_s, "V Hs", True),
            ("hidden_t_NH", hidden_t, "N Ht", teacher), ("head_t_VH", head_t, "V' Ht", teacher),
            ("weight_N", weight, "N", False), ("label_weight_N", label_weight, "N", False),
            ("labels_N", labels, "N", not teacher or label_weight is not None)):
        if x is None and not needed:
            continue
        if not isinstance(x, torch.Tensor):
            found = "missing" if x is None else f"a {type(x).__name__}"
            raise ValueError(f"{name} must be a tensor [{letters}]; it is {found}")
        wanted = tuple(sizes.setdefault(letter, n) for letter, n in zip(letters.split(), x.shape))
        if x.shape != wanted or x.dim() != len(letters.split()) or x.device != hidden_s.device:
            raise ValueError(f"{name} is {list(x.shape)} on {x.device}, not [{letters}] on {hidden_s.device} "
                             f"with {', '.join(f'{letter} = {n}' for letter, n in sizes.items())}")
        if name == "labels_N" and (x.is_floating_point() or x.dtype == torch.bool):
            raise ValueError(f"labels_N is {x.dtype}, but labels are integers")
        # Per-token weights are small, about 1 / N, and so are gradients: in float16 they would underflow.
        if "_s_" in name or "_t_" in name:
            if not x.is_floating_point() or x.dtype == torch.float16:
                raise ValueError(f"{name} is {x.dtype}; use bfloat16, float32 or float64")
    return sizes


def _check_scalars(*, vocab, shared, temperature, chunk_bytes, target=(1.0, 0.0), **others):
    """Refuse scalar arguments that are out of range."""
    for name, x, most in (("vocab", vocab, shared), ("chunk_bytes", chunk_bytes, math.inf)):
        if x is not None and not (isinstance(x, int) and 1 <= x <= most):
            raise ValueError(f"{name} {x} is not a whole number between 1 and {most}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not above 0")
    if not (isinstance(target, tuple) and len(target) == 2 and all(map(math.isfinite, target))):
        raise ValueError(f"target {target} is not a pair (a, b): the logits a * teacher + b * student")


def _choose(backend, hidden, name):
    """Return the backend that was asked for, if it can do this, or else the fastest that can."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    sorts = name is not None and not DIVERGENCES[name].elementwise
    can = not sorts and hidden.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    if backend is None:
        return "triton" if can and hidden.is_cuda else "torch"
    if backend == "triton" and not (can and (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(f"backend 'triton' cannot do {name or 'this'} on {hidden.device.type} in "
                         f"{hidden.dtype}: it needs Triton, a GPU, no float64, and a divergence that does "
                         "not sort; use 'torch'")
    return backend


class _Fused(torch.autograd.Function):
    """The fused loss for autograd: forward computes the gradients too, and backward only scales them."""

    @staticmethod
    def forward(ctx, hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, spec, rows, grad):
        dX, dW = (grad and need for need in ctx.needs_input_grad[:2])
        loss, stats, dX, dW = chunked.run(rows.fill, hidden_s, head_s, hidden_t, head_t, weight, labels,
                                          label_weight, spec, dX, dW)
        ctx.save_for_backward(dX, dW)
        ctx.scale = rows.scale
        stats = tuple(stats[name] for name in spec.stats(labels))
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        dX, dW = ctx.saved_tensors
        # The usual factor is 1, which saves a pass over the head's gradient. On a GPU only the kernel looks.
        if not (upstream.is_cpu and upstream == 1):
            if _again():
                dX, dW = (g if g is None else g.clone() for g in (dX, dW))
            for g in (dX, dW):
                if g is not None:
                    ctx.scale(g, upstream)
        return dX, dW, *[None] * 8


def _again():
    """Return whether a later backward pass may want the saved gradients as they are."""
    # torch knows it from retain_graph; a version that does not say may want them.
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or kept()


def _dense(hidden_s, head_s, hidden_t, head_t, weight, labels, label_weight, spec, work):
    """Compute the same numbers from whole [N, V] logits with autograd. This is the oracle of the tests."""
    def logits(hidden, head, softcap):
        z = hidden[used].to(work) @ head[:spec.vocab].to(work).T
        return (softcap * torch.tanh(z / softcap) if softcap else z).clamp(min=FLOOR)

    used = chunked.used_rows(weight, label_weight, labels, spec.vocab)
    used = torch.arange(len(hidden_s), device=hidden_s.device) if used is None else used
    some = {}
    z = logits(hidden_s, head_s, spec.softcap_s)
    lp = torch.log_softmax(z / spec.temperature, -1)
    some["entropy_s"] = torch.special.entr(lp.exp()).sum(-1)
    if head_t is not None:
        with torch.no_grad():
            w = logits(hidden_t, head_t, spec.softcap_t)
            target = mix(z, w, spec.target)
            lq = torch.log_softmax(target / spec.temperature, -1)
        some["value"] = divergence(z, w, spec.divergence, knob=spec.knob, temperature=spec.temperature,
                                   target=spec.target, support=spec.support, top_k=spec.top_k,
                                   entry_clip=spec.entry_clip)
        some["entropy_t"] = torch.special.entr(lq.exp()).sum(-1)
        some["top1_agree"] = (z.argmax(-1) == target.argmax(-1)).to(work)
    if labels is not None:
        some["logprob_s"] = lp.gather(1, labels[used, None])[:, 0]
        if head_t is not None:
            some["logprob_t"] = lq.gather(1, labels[used, None])[:, 0]
    loss = chunked.weighted(some, *(x if x is None else x[used] for x in (weight, label_weight)))
    stats = {name: x.new_zeros(len(hidden_s)).index_copy(0, used, x).detach() for name, x in some.items()}
    return loss, {name: x.float() for name, x in stats.items()}
