"""The fused operation against the dense oracle in float64, and what the oracle cannot promise: memory, zeros.

Where there is a GPU, everything runs on it. Elsewhere the Triton kernels run in Triton's interpreter, on few
rows and small blocks, and are compiled ahead of time in a process of their own.
"""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import chunked, linear_divergence, linear_logprob, rows_torch
from losses import DIVERGENCES, FLOOR, SUPPORTS, divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from kernels import rows_triton
ENTRYWISE = [name for name in DIVERGENCES if DIVERGENCES[name].elementwise]
N, V, HS, HT = 9, 101, 16, 24
CLIP = 0.003            # nats, of a vocabulary's entry
with_triton = pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="no triton"))
on_both = pytest.mark.parametrize("backend", ["torch", with_triton])
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")    # of the interpreter's numpy
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row and per chunk, the last one ragged."""
    if TRITON:
        monkeypatch.setattr(rows_triton, "BLOCK", 32)
    monkeypatch.setattr(rows_torch, "BLOCK", {"cpu": 2 * V, "gpu": 2 * V})


def case(dtype=torch.float32, n=N, vocab=V, pad_s=0, pad_t=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g).to(DEVICE, dtype)
    weight, label_weight = randn(n), randn(n)
    weight[::2] = 0
    label_weight[::4] = 0                                        # tokens 0, 4, 8 weigh nothing at all
    return dict(hidden_s=randn(n, HS).requires_grad_(), head_s=randn(vocab + pad_s, HS).requires_grad_(),
                hidden_t=randn(n, HT), head_t=randn(vocab + pad_t, HT), weight=weight,
                labels=torch.randint(0, vocab, (n,), generator=g).to(DEVICE), label_weight=label_weight)


def in_float64(c):
    return {k: v.detach().double().requires_grad_(v.requires_grad)
            if v is not None and v.is_floating_point() else v for k, v in c.items()}


def run(c, upstream=1.0, **kwargs):
    """loss, dX, dW and stats of linear_divergence on a case."""
    loss, stats = linear_divergence(c["hidden_s"], c["head_s"], c["hidden_t"], c["head_t"], c["weight"],
                                    labels_N=c["labels"], label_weight_N=c["label_weight"], **kwargs)
    return loss, *torch.autograd.grad(upstream * loss, (c["hidden_s"], c["head_s"])), stats


def assert_close(ours, oracle, tolerance=2e-5):
    """Loss, dX, dW within the tolerance of the largest entry; statistics likewise."""
    assert ours[3].keys() == oracle[3].keys()
    pairs = dict(loss=(ours[0], oracle[0]), dX=(ours[1], oracle[1]), dW=(ours[2], oracle[2]),
                 **{name: (ours[3][name], oracle[3][name]) for name in oracle[3]})
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape and torch.isfinite(a).all(), name
        off = (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-3)
        assert off <= tolerance, f"{name} is off by {off:.1e} of its largest entry"


def check(c, backend, tolerance=2e-5, **kwargs):
    assert_close(run(c, backend=backend, **kwargs), run(in_float64(c), backend="dense", **kwargs), tolerance)


# ---- every divergence, target, support ---------------------------------------------------------------------

@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.7}, {"target": (0.7, 0.3)}, {"target": (1.0, 0.8), "temperature": 0.5},
    {"softcap_s": 3.0, "softcap_t": 5.0, "temperature": 1.3}], ids=str)
def test_every_divergence_and_target(backend, name, options):
    check(case(), backend, divergence=name, upstream=3.0, **options)


@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("support", SUPPORTS[1:])
def test_every_support(backend, name, support):
    check(case(), backend, divergence=name, support=support, top_k=7, target=(0.9, 0.2), temperature=1.2)


@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("options", [
    {}, {"target": (0.9, 0.2), "temperature": 1.2, "softcap_s": 3.0, "softcap_t": 5.0},
    *[{"support": support, "top_k": 7} for support in (
        "union_tail", "intersection_raw", "teacher_sg", "student_renorm")]], ids=str)
def test_every_divergence_clips_entries(backend, name, options):
    """At a clip that cuts some entries off, and leaves others."""
    c = in_float64(case())
    least, some, whole = (run(c, backend="dense", divergence=name, entry_clip=clip, **options)[3]["value"]
                          for clip in (1e-9, CLIP, None))
    assert least.sum() < some.sum() < whole.sum()
    check(case(), backend, divergence=name, entry_clip=CLIP, upstream=3.0, **options)


@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("form", ["raw", "sg", "renorm", "tail"])
def test_an_empty_intersection_has_no_loss_and_no_gradient(backend, name, form):
    """2605.11182; also renormalised over nothing, and where the tail is everything."""
    z = torch.arange(40.0).repeat(2, 1)
    value, _, dz = row_step(backend, z, -z, torch.ones(2), divergence=name, support=f"intersection_{form}",
                            knob=DIVERGENCES[name].default, top_k=3)
    assert value.abs().max() < 5e-6 and dz.abs().max() < 5e-6      # rounding over 8, of alpha_beta


@on_both
@pytest.mark.parametrize("k", [1, V, 10 * V])
@pytest.mark.parametrize("form", ["raw", "renorm", "tail"])
def test_smallest_and_largest_top_k(backend, k, form):
    check(case(), backend, divergence="jsd", support=f"teacher_{form}", top_k=k)


def test_akl_needs_a_sort_and_says_so():
    check(case(), None, divergence="akl", upstream=3.0, temperature=1.7)
    with pytest.raises(ValueError, match="akl.*does not sort"):
        run(case(), backend="triton", divergence="akl")


@on_both
@pytest.mark.parametrize("name, knob", [
    ("jsd", 0.1), ("skew_fkl", 0.7), ("skew_rkl", 0.7), ("todi", 4.0), ("power", -5 / 3),
    ("alpha_beta", (1.5, -0.5))])
def test_knobs_reach_the_formula(backend, name, knob):
    check(case(), backend, divergence=name, knob=knob)


@on_both
@pytest.mark.parametrize("name", ["rkl", "jsd"])
@pytest.mark.parametrize("n, vocab", [(1, 1), (1, 31), (2, 32), (3, 33), (5, 64), (4, 65), (6, 128)])
def test_ragged_sizes(backend, name, n, vocab):
    c = case(n=n, vocab=vocab)
    c["weight"] += 1                                             # no token is dropped
    check(c, backend, divergence=name)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_torch_backend_in_float64_with_any_chunk(name):
    c = case(torch.float64)
    for rows in (1, 2, 4, 1000):
        assert_close(run(c, backend="torch", divergence=name, chunk_bytes=rows * 2 * 128 * 8),
                     run(c, backend="dense", divergence=name), 1e-10)


@on_both
def test_any_chunk(backend):
    whole = run(case(), backend=backend, divergence="jsd")
    for rows in (1, 2, 4):
        some = run(case(), backend=backend, divergence="jsd", chunk_bytes=rows * 2 * 128 * 4)
        assert_close(some, whole, 5e-6)


# ---- precision and extremes --------------------------------------------------------------------------------

@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
def test_bfloat16_keeps_logits_in_float32(backend, name):
    """Near convergence bf16 logits cost 6-19% of the gradient; ours may lose what input and output round."""
    c = case(torch.bfloat16)
    c["hidden_t"] = c["hidden_s"].detach() + 0.02 * c["hidden_s"].detach().roll(1, 0)
    c["head_t"], c["label_weight"], c["weight"] = c["head_s"].detach(), None, c["weight"] + 1
    ours = run(c, backend=backend, divergence=name)
    oracle = run(in_float64(c), backend="dense", divergence=name)
    assert oracle[3]["value"].abs().max() < 0.05                 # they do nearly agree
    for a, b in zip(ours[1:3], oracle[1:3]):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() < 0.01 * b.norm()


def test_a_float32_head_with_bfloat16_states_gets_a_float32_gradient():
    c = case(torch.bfloat16)
    c["head_s"] = c["head_s"].detach().float().requires_grad_()
    _, dX, dW, _ = run(c)
    assert dW.dtype == torch.float32 and dX.dtype == torch.bfloat16
    assert (dW != dW.bfloat16().float()).any()


def row_step(backend, z_NV, w_NV, weight_N, label_weight_N=None, **scalars):
    """The row step alone, on given logits: (value, entropy_s, dz) in float64."""
    n, vocab = z_NV.shape
    stride = -(-vocab // chunked.ALIGN) * chunked.ALIGN
    pad = lambda x: torch.nn.functional.pad(x.to(DEVICE), (0, stride - vocab), value=torch.nan)[:, :vocab]
    spec = chunked.Spec(**dict(temperature=1.0, vocab=vocab, softcap_s=None, chunk_bytes=None) | scalars)
    labels = torch.zeros(n, dtype=torch.long, device=DEVICE)
    stats = {name: torch.zeros(n, device=DEVICE) for name in spec.stats(labels)}
    rows = rows_torch if backend == "torch" else rows_triton
    dz = rows.fill(pad(z_NV), pad(w_NV), weight_N.to(DEVICE), labels,
                   None if label_weight_N is None else label_weight_N.to(DEVICE), stats, spec, True,
                   torch.float32)
    return stats["value"].cpu().double(), stats["entropy_s"].cpu().double(), dz.cpu().double()


def extremes(vocab=70):
    g = torch.Generator().manual_seed(0)
    z, w = (1e4 * torch.randn(8, vocab, generator=g) for _ in range(2))
    z[0] = w[0] = torch.randn(vocab, generator=g)                # p = q
    z[1], w[1] = torch.randn(vocab, generator=g), torch.randn(vocab, generator=g)
    z[1, 3:30], w[1, 20:50] = -torch.inf, -torch.inf             # neither, one, the other, both
    z[2], w[2] = -torch.inf, -torch.inf
    z[2, 5] = w[2, 60] = 0.0                                     # two points that do not meet
    z[3], w[3] = -torch.inf, -torch.inf
    z[3, 5] = w[3, 5] = 7.0                                      # the same point
    z[4] = w[4] = 0.0                                            # uniform, all ties
    z[5] = -z[5].abs()
    return z, w                                                  # the rest: +-1e4


@on_both
@pytest.mark.parametrize("name", ["jsd", "skew_fkl", "skew_rkl"])
def test_mixtures_are_precise_where_both_models_nearly_agree(backend, name):
    """Where log p - log m is a small difference of large numbers; a GPU's own logarithm must do, too."""
    g = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(4, 500, generator=g)
    w = z + 0.01 * torch.randn(4, 500, generator=g)
    exact = z.double().requires_grad_()
    value = divergence(exact, w.double(), name, knob=DIVERGENCES[name].default)
    dz, = torch.autograd.grad(value.sum(), exact)
    ours = row_step(backend, z, w, torch.ones(4), divergence=name, knob=DIVERGENCES[name].default)
    assert (ours[0] - value).abs().max() < 1e-6
    assert (ours[2] - dz).norm() < 2e-4 * dz.norm()


@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("support", ["full", "student_sg", "teacher_renorm", "union_tail"])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_extreme_logits_are_finite_and_right(backend, name, support, clip):
    z, w = extremes()
    top_k = None if support == "full" else 9
    weight = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 1.0, -1.0, 1.0])
    knob = DIVERGENCES[name].default
    value, entropy, dz = row_step(backend, z, w, weight, divergence=name, knob=knob, support=support,
                                  top_k=top_k, entry_clip=clip)
    z = z.double().clamp(min=FLOOR).requires_grad_()
    oracle = divergence(z, w.double(), name, support=support, top_k=top_k, entry_clip=clip)
    exact, = torch.autograd.grad((weight * oracle).sum(), z)
    assert all(x.isfinite().all() for x in (value, entropy, dz))
    assert (dz[4] == 0).all()
    for n in range(len(z)):
        for ours, theirs in ((value[n], oracle[n].detach()), (dz[n], exact[n])):
            assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max().clamp(min=1.0), (n, ours, theirs)


@on_both
@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("support", ["full", "student_raw", "teacher_renorm", "union_tail"])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_broken_logit_is_not_hidden(backend, name, support, clip, whose):
    """Maxima, selects and a support would drop it, and the run would go on with a broken model."""
    z, w = torch.randn(3, 70), torch.randn(3, 70)
    (z if whose == "student" else w)[1, 40] = torch.nan
    value, _, _ = row_step(backend, z, w, torch.ones(3), divergence=name, support=support, entry_clip=clip,
                           knob=DIVERGENCES[name].default, top_k=None if support == "full" else 3)
    assert value.isnan().tolist() == [False, True, False]


# ---- the interface -----------------------------------------------------------------------------------------

def test_gradcheck_and_backward_twice():
    c = case(torch.float64, n=4, vocab=23)
    for support, k, clip in (("full", None, None), ("union_sg", 9, 0.02), ("student_tail", 9, None)):
        f = lambda x, w: linear_divergence(
            x, w, c["hidden_t"], c["head_t"], c["weight"], divergence="jsd", labels_N=c["labels"],
            support=support, top_k=k, entry_clip=clip, label_weight_N=c["label_weight"], chunk_bytes=3000)[0]
        assert torch.autograd.gradcheck(f, (c["hidden_s"], c["head_s"]))
    loss = f(c["hidden_s"], c["head_s"])
    first = torch.autograd.grad(loss, c["head_s"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, c["head_s"])[0])


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_with_other_gradients_from_above(backend, dtype):
    """The last backward scales in place what an earlier one had to leave as it is."""
    c = case(dtype)
    leaves = c["hidden_s"], c["head_s"]
    loss = linear_divergence(c["hidden_s"], c["head_s"], c["hidden_t"], c["head_t"], c["weight"],
                             backend=backend)[0]
    once = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    twice = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(3 * loss, leaves)
    for a, b, c in zip(once, twice, last):
        assert torch.equal(b, 2 * a)
        rounding = 0 if dtype == torch.float32 else 2**-7        # Triton's interpreter cuts to bfloat16
        torch.testing.assert_close(c.float(), 3 * a.float(), rtol=rounding, atol=0)


@on_both
def test_tokens_without_weight_get_exact_zeros(backend):
    _, dX, _, stats = run(case(), backend=backend)
    assert (dX[[0, 4, 8]] == 0).all() and (dX[1:4] != 0).any()
    assert all((x[[0, 4, 8]] == 0).all() for x in stats.values())


@on_both
def test_padded_vocabulary_has_no_probability_and_no_gradient(backend):
    plain, padded = case(), case()
    padded["head_s"] = torch.cat([plain["head_s"].detach(),
                                  torch.full((9, HS), 5.0, device=DEVICE)]).requires_grad_()
    padded["head_t"] = torch.cat([plain["head_t"], torch.full((4, HT), 5.0, device=DEVICE)])
    ours, without = run(padded, backend=backend, vocab=V), run(plain, backend=backend)
    torch.testing.assert_close(ours[0], without[0])
    torch.testing.assert_close(ours[2][:V], without[2])
    assert (ours[2][V:] == 0).all()


@on_both
@pytest.mark.parametrize("pad", [0, 9, 64])
@pytest.mark.parametrize("options", [
    {}, {"support": "student_tail", "top_k": 7}, {"target": (0.7, 0.3)}], ids=str)
def test_products_over_more_columns_than_the_vocabulary_change_nothing(monkeypatch, backend, pad, options):
    """As on a GPU, whose products want even sizes. Heads with fewer rows, with some more, with many."""
    c = case(pad_s=pad, pad_t=pad)
    c["head_s"], c["head_t"] = (c[name].detach() for name in ("head_s", "head_t"))
    c["head_s"][V:] = c["head_t"][V:] = 5.0                      # would be the largest logits
    c["head_s"].requires_grad_()
    results = []
    for columns in (1, 64):
        monkeypatch.setattr(chunked, "PRODUCTS", dict.fromkeys(("cpu", "gpu"), columns))
        results.append(run(c, upstream=3.0, backend=backend, divergence="jsd", vocab=V, **options))
        assert results[-1][2].shape == c["head_s"].shape and (results[-1][2][V:] == 0).all()
    assert_close(*results, 2e-6)


@on_both
def test_logprob_is_weighted_cross_entropy(backend):
    c, exact = case(), in_float64(case())
    loss, stats = linear_logprob(c["hidden_s"], c["head_s"], c["labels"], c["weight"], temperature=1.5,
                                 softcap=4.0, backend=backend)
    z = 4 * torch.tanh(exact["hidden_s"] @ exact["head_s"].T / 4) / 1.5
    reference = (exact["weight"] * torch.nn.functional.cross_entropy(z, c["labels"], reduction="none")).sum()
    assert abs(loss - reference) < 2e-5 * abs(reference)
    for a, b in zip(torch.autograd.grad(loss, (c["hidden_s"], c["head_s"])),
                    torch.autograd.grad(reference, (exact["hidden_s"], exact["head_s"]))):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()
    assert not any(x.requires_grad for x in stats.values())


@on_both
def test_nothing_kept_is_a_zero_loss(backend):
    c = case()
    for n in (N, 0):
        loss, _ = linear_divergence(c["hidden_s"][:n], c["head_s"], c["hidden_t"][:n], c["head_t"],
                                    torch.zeros(n, device=DEVICE), backend=backend)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (c["hidden_s"], c["head_s"])))


def test_a_tied_head_adds_up_and_a_bias_is_one_more_column():
    """The head is the embedding too: its gradient is the sum of both uses, as plain autograd finds it."""
    c = case(torch.float64)
    bias = torch.randn(V, dtype=torch.float64, device=DEVICE, requires_grad=True)
    losses = []
    for backend in ("torch", "dense"):
        hidden = torch.tanh(c["head_s"][c["labels"]] * 3)
        hidden = torch.cat([hidden, hidden.new_ones(N, 1)], 1)
        loss, _ = linear_divergence(hidden, torch.cat([c["head_s"], bias[:, None]], 1), c["hidden_t"],
                                    c["head_t"], backend=backend)
        losses.append(torch.autograd.grad(loss, (c["head_s"], bias)))
    for a, b in zip(*losses):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "dense", with_triton])
def test_autocast_and_gradient_checkpointing_change_nothing(backend):
    """Values and statistics too: some of torch's operations would run in bfloat16."""
    c = case()
    plain, leaves = run(c, backend=backend, divergence="jsd"), (c["hidden_s"], c["head_s"])
    f = lambda x, w: linear_divergence(
        x, w, c["hidden_t"], c["head_t"], c["weight"], divergence="jsd", labels_N=c["labels"],
        label_weight_N=c["label_weight"], backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, stats = f(*leaves)
    assert_close((loss, *torch.autograd.grad(loss, leaves), stats), plain, 0)
    from torch.utils.checkpoint import checkpoint
    loss = checkpoint(lambda *args: f(*args)[0], *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, leaves), plain[1:3]):
        assert torch.equal(a, b)


def test_four_products_per_chunk_and_no_more(monkeypatch):
    """Nothing is computed twice, and chunks are as large as their memory allows."""
    rows = {"product": [], "accumulate": []}
    for name, seen in rows.items():
        monkeypatch.setattr(chunked, name, lambda *args, f=getattr(chunked, name), seen=seen: (
            seen.append(len(args[0] if f.__name__ == "product" else args[1])), f(*args))[1])
    for budget, expected in ((None, [300]), (256 * 2 * 128 * 4, [256, 44]), (50 * 2 * 128 * 4, [50] * 6)):
        for seen in rows.values():
            seen.clear()
        c = case(n=300)
        c["label_weight"] += 1
        run(c, chunk_bytes=budget)
        assert rows == {"product": [n for n in expected for _ in "zw"], "accumulate": expected}


def test_chunks_are_whole_tiles_of_about_one_size():
    for rows in (1, 100, 128, 129, 300, 1000, 3072, 8191):
        for most in (1, 50, 127, 128, 200, 512, 1100):
            chunk = chunked.rows_per_chunk(rows, most)
            whole = most if most < chunked.TILE else most - most % chunked.TILE
            count, fewest = -(-rows // chunk), -(-rows // whole)
            assert 1 <= chunk <= most and (count == 1 or most < chunked.TILE or chunk % chunked.TILE == 0)
            assert count == 1 or count <= fewest                # not one more product than memory asks for
            assert chunk == min(rows, most) or chunk - rows / count < chunked.TILE


def test_labels_of_tokens_without_weight_may_be_anything():
    c = case()
    c["labels"][::4] = -100
    assert run(c)[0].isfinite()
    c["labels"][1] = V
    with pytest.raises(ValueError, match="vocabulary has 101"):
        run(c)


def test_frozen_head_and_no_grad_compute_less(monkeypatch):
    c, calls = case(), []
    monkeypatch.setattr(chunked, "accumulate", lambda *args: calls.append(args))
    loss, _ = linear_divergence(c["hidden_s"], c["head_s"].detach(), c["hidden_t"], c["head_t"])
    assert torch.autograd.grad(loss, c["hidden_s"])[0].abs().sum() > 0 and not calls
    with torch.no_grad():
        assert not linear_logprob(c["hidden_s"], c["head_s"], c["labels"])[0].requires_grad and not calls
    linear_logprob(c["hidden_s"], c["head_s"], c["labels"])
    assert calls


def test_two_losses_before_one_backward():
    """The logit buffers are reused from call to call; the gradients must not be."""
    a, b = case(), case(seed=1)
    alone = [run(x)[1] for x in (a, b)]
    loss = sum(linear_divergence(x["hidden_s"], x["head_s"], x["hidden_t"], x["head_t"], x["weight"],
                                 labels_N=x["labels"], label_weight_N=x["label_weight"])[0] for x in (a, b))
    for x, y in zip(torch.autograd.grad(loss, (a["hidden_s"], b["hidden_s"])), alone):
        torch.testing.assert_close(x, y)


# ---- memory ------------------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_tensor_of_the_size_of_the_logits(name):
    g = torch.Generator().manual_seed(0)
    n, v, rows = 256, 2048, 16
    tensors = [torch.randn(k, 8, generator=g).to(DEVICE) for k in (n, v, n, v)]
    x, w = (t.requires_grad_() for t in tensors[:2])
    for backend, holds in (("torch", False), ("dense", True)):  # the counter does see the dense path's logits
        chunked._held.__dict__.clear()
        with Largest() as largest:
            linear_divergence(*tensors, divergence=name, chunk_bytes=rows * 2 * v * 4,
                              backend=backend)[0].backward()
        assert (largest.elements >= n * v) == holds and (largest.elements <= rows * v) == (not holds)
    assert x.grad is not None and w.grad is not None


@on_gpu
@on_both
def test_gpu_memory_is_flat_in_the_number_of_tokens(backend):
    def peak(n, v=32768, h=64):
        x, w = (torch.randn(k, h, device="cuda", dtype=torch.bfloat16) for k in (n, v))
        x, w = x.requires_grad_(), w.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_divergence(x, w, x.detach(), w.detach(), chunk_bytes=64 << 20, backend=backend)[0].backward()
        return torch.cuda.max_memory_allocated() - before
    peak(256)
    assert peak(16384) - peak(2048) < 8 * (16384 - 2048) * 64 + (1 << 20)


# ---- Triton without a GPU ----------------------------------------------------------------------------------

def test_triton_knows_every_divergence_but_those_that_sort():
    pytest.importorskip("triton")
    assert list(rows_triton.FORMULAS) == ENTRYWISE


@pytest.mark.skipif(not TRITON, reason="no triton")
def test_kernels_compile_for_sm_80_and_sm_90_without_spills():
    """In a process of its own, since this one may interpret Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).parent / "ahead_of_time.py"], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert {(name, arch) for name, arch, *_ in compiled} == {
        (name, arch) for name in ENTRYWISE for arch in (80, 90)}
    for name, arch, form, registers, stack, wide, barrier in compiled:
        assert stack <= 16, (name, arch, form, registers, stack)
        assert 3 * registers * 32 * rows_triton.WARPS < 65536, (name, arch, form)   # 3 programs at once
        assert wide, f"{name} {form}: logits are not loaded 16 bytes at a time"
        assert barrier, f"{name} {form}: nothing separates the last loads from the gradient's stores"


# ---- the benchmark -----------------------------------------------------------------------------------------

def test_the_benchmark_compares_the_same_gradients_and_leaves_its_record(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "kernels.bench", "--quick", "--device", DEVICE,
                           "--repeat", "3", "--out", tmp_path], cwd=Path(kernels.__file__).parent.parent,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "bench.json").read_text())
    for loss in ("rkl", "jsd"):
        rows = {row["contestant"]: row for row in record["cases"] if row["loss"] == loss}
        assert rows["products"]["over_floor"] == 1 and rows["ours"]["over_floor"] > 1
        assert rows["naive torch"]["cosine"] > 0.99
        assert all("over_floor" in row or row["text"] for row in rows.values())
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.skipif(DEVICE == "cuda", reason="would run everything")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    done = subprocess.run(["bash", Path(__file__).parent / "gpu.sh", tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr == "torch sees no GPU\n"


# ---- wrong arguments ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    (dict(divergence="kld"), "unknown divergence"), (dict(support="top-k", top_k=5), "student_raw"),
    (dict(backend="cuda"), "unknown backend"), (dict(vocab=V + 1), "vocab 102 is not .* 1 and 101"),
    (dict(temperature=0), "temperature 0 is not"), (dict(target="veto"), "pair"),
    (dict(support="student_sg", top_k=2.5), "whole number"), (dict(entry_clip=0), "entry_clip 0 is not"),
    (dict(divergence="akl", entry_clip=0.1), "akl .*cannot clip"), (dict(entry_clip=torch.inf), "finite"),
    (dict(chunk_bytes=0), "chunk_bytes"), (dict(divergence="power", knob=1e-9), "not 0 .fkl."),
    (dict(divergence="power", knob=float("nan")), "power_lambda"),
    (dict(divergence="rkl", knob=0.5), "no knob"), (dict(divergence="jsd", knob=(0.2, 0.7)), "jsd_beta"),
    (dict(divergence="alpha_beta", knob=0.5), "exponents A of q"),
    (dict(divergence="alpha_beta", knob=(1, -1)), "above 0")])
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(case(), **wrong)


@pytest.mark.parametrize("name, change, message", [
    ("weight", lambda x: x[:, None], r"weight_N is \[9, 1\]"), ("weight", lambda x: 2.0, "must be a tensor"),
    ("weight", lambda x: x[:1], r"weight_N is \[1\].*N = 9"), ("labels", lambda x: x.float(), "integers"),
    ("hidden_s", lambda x: x[None], r"\[N Hs\]"), ("hidden_t", lambda x: x[:, 1:], "Ht = 23"),
    ("head_s", lambda x: x[:, 1:], "Hs = 16"), ("head_t", lambda x: None, "head_t_VH .*missing"),
    ("labels", lambda x: None, "labels_N .*missing"), ("hidden_t", lambda x: x.long(), "float32"),
    ("hidden_s", lambda x: x.detach().half(), "use bfloat16"), ("head_t", lambda x: x.to("meta"), "meta")])
def test_tensors_that_do_not_fit_are_named(name, change, message):
    """Most would broadcast, or fail deep inside, or read foreign memory."""
    c = case()
    c[name] = change(c[name])
    with pytest.raises(ValueError, match=message):
        run(c)


@on_both
def test_expanded_and_strided_arguments_are_read_right(backend):
    """The kernel reads memory, not strides."""
    c, strided = case(n=N), case(n=N)
    for name in ("weight", "labels", "label_weight"):
        strided[name] = torch.stack([c[name], c[name] + 1], 1)[:, 0]
    for x in (c, strided):
        x["weight"] += 3                                         # no token is dropped, which would copy
    strided["hidden_s"] = c["hidden_s"].detach().T.contiguous().T.requires_grad_()
    assert_close(run(strided, backend=backend), run(c, backend=backend), 5e-6)
    both = []
    for ones in (torch.full((1,), 2.0, device=DEVICE).expand(N), torch.full((N,), 2.0, device=DEVICE)):
        c["weight"] = c["label_weight"] = ones
        both.append(run(c, backend=backend))
    assert_close(*both, 0)


def test_a_second_derivative_is_refused():
    c = case()
    loss, _ = linear_divergence(c["hidden_s"], c["head_s"], c["hidden_t"], c["head_t"])
    dX, = torch.autograd.grad(loss**2, c["hidden_s"], create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used|once_differentiable"):   # not a wrong number
        torch.autograd.grad(dX.sum(), c["hidden_s"])


@on_both
def test_a_softcap_of_0_is_none(backend):
    assert_close(run(case(), backend=backend, softcap_s=0.0, softcap_t=0), run(case(), backend=backend), 0)
