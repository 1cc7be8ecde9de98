"""Objectives against their definitions: values, gradients, limits, and what the estimators estimate."""
import pytest
import torch

from losses import (DIVERGENCES, SUPPORTS, check_support, clipped, divergence, importance_weight, lookup,
                    mass_slope, policy_gradient_weight, target_at)

NAMES = list(DIVERGENCES)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


def test_values_are_the_papers_definitions():
    z, w = logits(5, 11), logits(5, 11, seed=1)
    p, q, b = z.softmax(-1), w.softmax(-1), 0.3
    m = b * q + (1 - b) * p
    torch.testing.assert_close(divergence(z, w, "fkl"), kl(q, p))
    torch.testing.assert_close(divergence(z, w, "rkl"), kl(p, q))
    torch.testing.assert_close(divergence(z, w, "jsd", knob=b), b * kl(q, m) + (1 - b) * kl(p, m))
    torch.testing.assert_close(divergence(z, w, "jeffreys"), kl(q, p) + kl(p, q))
    torch.testing.assert_close(divergence(z, w, "skew_fkl", knob=b), kl(q, b * q + (1 - b) * p))
    torch.testing.assert_close(divergence(z, w, "skew_rkl", knob=b), kl(p, (1 - b) * q + b * p))
    torch.testing.assert_close(divergence(z, w, "todi"), kl(q, p) + kl(p, q))       # at sharpness 1, exactly
    a = torch.sigmoid(3 * (q / p).log())
    torch.testing.assert_close(divergence(z, w, "todi", knob=3.0),
                               (a * q * (q / p).log() + (1 - a) * p * (p / q).log()).sum(-1))
    torch.testing.assert_close(divergence(z, w, "power", knob=2.0), (q * ((q / p) ** 2 - 1)).sum(-1) / 6)
    torch.testing.assert_close(divergence(z, w, "power", knob=-3.0), divergence(w, z, "power", knob=2.0))
    torch.testing.assert_close(
        divergence(z, w, "alpha_beta", knob=(0.2, 0.7)),
        -(q**0.2 * p**0.7 - 0.2 / 0.9 * q**0.9 - 0.7 / 0.9 * p**0.9).sum(-1) / (0.2 * 0.7))
    torch.testing.assert_close(divergence(z, w, "tvd"), 0.5 * (p - q).abs().sum(-1))
    torch.testing.assert_close(divergence(z, w, "rkl", temperature=2.0),
                               kl((z / 2).softmax(-1), (w / 2).softmax(-1)))
    torch.testing.assert_close(divergence(z, w, "fkl", target=(0.6, 0.4)),
                               kl((0.6 * w + 0.4 * z).softmax(-1), p))


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative_of_the_value(name):
    found, knob = lookup(name)
    lp = torch.log_softmax(logits(7), -1).requires_grad_()
    lq = torch.log_softmax(logits(7, seed=1), -1)
    value, slope = found.formula(lp, lq, lp.exp(), lq.exp(), knob)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), lp)[0], slope)


def test_the_slopes_with_a_stopped_gradient():
    """todi and akl hold their weights fixed: finite differences of the value would not find their slope."""
    z, w = logits(3, 6).requires_grad_(), logits(3, 6, seed=1)
    p, q = z.softmax(-1), w.softmax(-1)
    a = (q / (p + q)).detach()
    fixed = (a * q * (q / p).log() + (1 - a) * p * (p / q).log()).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0]
                                 for x in (divergence(z, w, "todi").sum(), fixed)))
    both = [torch.autograd.grad(divergence(z, w, name).sum(), z)[0] for name in ("akl", "fkl", "rkl")]
    share = ((both[0] - both[2]) / (both[1] - both[2]))
    torch.testing.assert_close(share, share[:, :1].expand_as(share))         # one weight for the whole row
    assert ((share > 0) & (share < 1)).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("todi", "akl")])
@pytest.mark.parametrize("support", ["full", "union_raw", "intersection_renorm", "student_tail"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_dense_reference_passes_gradcheck(name, support, clip):
    w = logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda z: divergence(z, w, name, temperature=1.3, support=support, entry_clip=clip,
                             top_k=None if support == "full" else 3), logits(3, 6).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_loss_and_no_gradient(name):
    z = logits(4, 9).requires_grad_()
    constant = 0.0 if name == "tvd" else 3.0                     # logits are defined up to a constant, but
    value = divergence(z, z.detach() + constant, name)           # tvd has a kink where rounding would sit
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name):
    z, w = logits(4, 9, scale=1e4, dtype=torch.float32), logits(4, 9, seed=1, scale=1e4, dtype=torch.float32)
    z[0, 2], w[0, 2], w[1, 3], z[2, 4] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    z[3, 1:], w[3, :-1] = -torch.inf, -torch.inf                 # two points that do not meet
    z.requires_grad_()
    value = divergence(z, w, name)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), z)[0].isfinite().all()


def test_akl_weighs_forward_by_the_gap_in_the_head_and_reverse_by_that_in_the_tail():
    """The head within half of q's mass is {.4}: .4 + .3 is more. A dominant entry is always head."""
    for q, head in ((torch.tensor([0.3, 0.4, 0.1, 0.2]), 1), (torch.tensor([0.1, 0.1, 0.7, 0.1]), 2)):
        q, p = q.double(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double()
        gap = (p - q).abs()
        forward = gap[head] / gap.sum()
        torch.testing.assert_close(divergence(p.log()[None], q.log()[None], "akl")[0],
                                   forward * kl(q, p) + (1 - forward) * kl(p, q))


@pytest.mark.parametrize("name, knob, limit", [
    ("skew_fkl", 1e-5, "fkl"), ("skew_rkl", 1e-5, "rkl"), ("power", 1.1e-3, "fkl"), ("power", -0.9989, "rkl"),
    ("alpha_beta", (1.0, 1e-3), "fkl"), ("alpha_beta", (1e-3, 1.0), "rkl")])
def test_limits_are_the_kl_divergences(name, knob, limit):
    z, w = logits(5, 11), logits(5, 11, seed=1)
    torch.testing.assert_close(divergence(z, w, name, knob=knob), divergence(z, w, limit), rtol=0.02, atol=0)


def test_jsd_tends_to_the_kl_divergences_and_refuses_the_ends():
    z, w = logits(5, 11), logits(5, 11, seed=1)
    torch.testing.assert_close(divergence(z, w, "jsd", knob=1e-6) / 1e-6, divergence(z, w, "fkl"),
                               rtol=1e-3, atol=0)
    torch.testing.assert_close(divergence(z, w, "jsd", knob=1 - 1e-6) / 1e-6, divergence(z, w, "rkl"),
                               rtol=1e-3, atol=0)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            divergence(z, w, "jsd", knob=end)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="fkl, rkl, jsd"):
        lookup("kld")
    with pytest.raises(ValueError, match="no knob"):
        lookup("rkl", 0.5)


def test_policy_gradient_is_the_reverse_kl_gradient_in_expectation():
    """Enumerating y: sum_y p(y) grad(-w A log p(y)) = grad KL(p || q), A = log q(y) - log p(y), w = 1."""
    z, w = logits(8).requires_grad_(), logits(8, seed=1)
    lp, lq = torch.log_softmax(z, -1), torch.log_softmax(w, -1)
    factor = policy_gradient_weight((lq - lp).detach(), lp.detach(), lp.detach(), (0.5, 2.0))
    expected_loss = (lp.exp().detach() * factor * -lp).sum()
    pg, = torch.autograd.grad(expected_loss, z)
    rkl, = torch.autograd.grad(divergence(z[None], w[None], "rkl").sum(), z)
    torch.testing.assert_close(pg, rkl)


def test_importance_weight_corrects_another_sampler_and_drops_outliers():
    lp, sampler = torch.tensor([0.5, 0.1, 0.4]).log(), torch.tensor([0.4, 0.5, 0.1]).log()
    torch.testing.assert_close(importance_weight(lp, sampler, 0.5, 2.0), torch.tensor([1.25, 0.0, 0.0]))


# ---- supports ----------------------------------------------------------------------------------------------

ENTRYWISE = [name for name in NAMES if DIVERGENCES[name].elementwise]


def support_gradient(z, w, name, support, k=4):
    z = z.clone().requires_grad_()
    value = divergence(z, w, name, support=support, top_k=k)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("support", SUPPORTS[1:])
def test_a_support_of_everything_is_the_full_one(name, support):
    z, w = logits(5, 11), logits(5, 11, seed=1)
    for ours, full in zip(support_gradient(z, w, name, support, 11),
                          support_gradient(z, w, name, "full", None)):
        torch.testing.assert_close(ours, full)


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("whose", ["student", "teacher", "intersection", "union"])
def test_supports_are_what_they_say(name, whose):
    """Against other code: gathered columns, merged tails, and the gradient of the kept mass."""
    sizes = set()
    for z, w in zip(logits(6, 11).split(1), logits(6, 11, seed=1).split(1)):
        student, teacher = (set(x[0].argsort(descending=True)[:4].tolist()) for x in (z, w))
        kept = {"student": student, "teacher": teacher, "intersection": student & teacher,
                "union": student | teacher}[whose]
        sizes.add(len(kept))
        ids = torch.tensor([sorted(kept)], dtype=torch.long)
        for clip in (None, 0.02):               # the clip comes after the support
            gathered = divergence(z.gather(1, ids), w.gather(1, ids), name, entry_clip=clip)
            torch.testing.assert_close(
                divergence(z, w, name, support=f"{whose}_renorm", top_k=4, entry_clip=clip), gathered)
            merged = [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], 1).log()
                      for x in (z.softmax(-1), w.softmax(-1))]
            torch.testing.assert_close(
                divergence(z, w, name, support=f"{whose}_tail", top_k=4, entry_clip=clip),
                divergence(*merged, name, entry_clip=clip))
        (raw_value, raw), (sg_value, sg) = (support_gradient(z, w, name, f"{whose}_{form}")
                                            for form in ("raw", "sg"))
        torch.testing.assert_close(raw_value, sg_value)
        x = z.clone().requires_grad_()
        mass = torch.autograd.grad(x.softmax(-1).gather(1, ids).sum(), x)[0]
        torch.testing.assert_close(raw - sg, mass_slope(name, lookup(name)[1]) * mass)
    assert sizes == {4} if whose in ("student", "teacher") else len(sizes) > 1      # the rows differ


@pytest.mark.parametrize("name", ENTRYWISE)
def test_only_the_raw_truncation_moves_at_p_equal_q(name):
    """ "The Many Faces of OPD", 2605.11182: truncated, sum p grad log p does not vanish."""
    z = logits(5, 11)
    for form in ("sg", "renorm", "tail"):
        assert support_gradient(z, z, name, f"student_{form}")[1].abs().max() < 1e-12, form
    moves = support_gradient(z, z, name, "student_raw")[1].abs().max() > 1e-3
    assert moves == (name in ("fkl", "rkl", "skew_fkl", "skew_rkl", "power"))


def test_topk_sg_of_the_reverse_kl_is_the_papers():
    """sum over K of p (sg[log p] - log q), 2605.11182."""
    z, w = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    lp, lq = torch.log_softmax(z, -1), torch.log_softmax(w, -1)
    ids = z.topk(4, -1).indices
    paper = (lp.exp() * (lp.detach() - lq)).gather(1, ids).sum()
    torch.testing.assert_close(support_gradient(z.detach(), w, "rkl", "student_sg")[1],
                               torch.autograd.grad(paper, z)[0])


@pytest.mark.parametrize("whose", ["student", "intersection"])
def test_renormalised_reverse_kl_has_the_gradient_of_the_papers_stopped_one(whose):
    """2605.11182's default: sum over K of p (sg[log p] - log q), both renormalised, where sum grad p = 0."""
    z, w = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    keep = z >= z.topk(6).values[:, -1:]
    if whose == "intersection":
        keep = keep & (w >= w.topk(6).values[:, -1:])
    p, q = (x.softmax(-1) * keep / (x.softmax(-1) * keep).sum(-1, keepdim=True) for x in (z, w))
    paper = (p[keep] * (p.detach()[keep] / q[keep]).log()).sum()
    torch.testing.assert_close(support_gradient(z.detach(), w, "rkl", f"{whose}_renorm", 6)[1],
                               torch.autograd.grad(paper, z)[0])


def test_clipped_forward_kl_is_opsds():
    """2601.18734: sum over v of min(q (log q - log p), tau)."""
    z, w = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    p, q, tau = z.softmax(-1), w.softmax(-1), 0.05
    entries = q * (q / p).log()
    assert 5 < (entries > tau).sum() < 50
    paper = torch.where(entries > tau, torch.tensor(tau).double(), entries).sum(-1)
    ours = divergence(z, w, "fkl", entry_clip=tau)
    torch.testing.assert_close(ours, paper)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), z)[0] for x in (ours, paper)))


@pytest.mark.parametrize("name", ENTRYWISE)
def test_only_entries_below_the_clip_have_a_slope(name):
    found, knob = lookup(name)
    lp, lq = (torch.log_softmax(logits(40, seed=seed), -1) for seed in (0, 1))
    value, slope = found.formula(lp, lq, lp.exp(), lq.exp(), knob)
    clip = value.quantile(0.8).item()
    cut_value, cut_slope = clipped(value, slope, clip)
    assert cut_value.max() == clip and (cut_slope[value > clip] == 0).all() and (value > clip).sum() == 8
    assert torch.equal(cut_slope[value <= clip], slope[value <= clip])
    assert all(map(torch.equal, clipped(value, slope, value.max().item()), (value, slope)))


def test_entries_that_tie_with_the_last_of_the_top_k_count_too():
    z, w = torch.tensor([[3.0, 1.0, 1.0, 0.0]]), torch.zeros(1, 4)
    two, three = (divergence(z, w, "rkl", support="student_raw", top_k=k) for k in (2, 3))
    assert two == three != divergence(z, w, "rkl", support="student_raw", top_k=1)


def test_supports_that_cannot_be_are_refused():
    for name, support, k, message in (("rkl", "top-k", 5, "student_raw"), ("rkl", "full", 5, "top_k"),
                                      ("rkl", "student_sg", None, "top_k"),
                                      ("akl", "student_sg", 5, "akl needs")):
        with pytest.raises(ValueError, match=message):
            check_support(name, support, top_k=k)


# ---- targets and estimators --------------------------------------------------------------------------------

def test_targets_end_at_the_teacher():
    assert target_at("teacher", 0.8, 0.3) == (1.0, 0.0)
    assert [target_at("veto", 0.8, done) for done in (0, 0.5, 1)] == [(1.0, 0.8), (1.0, 0.4), (1.0, 0.0)]
    assert target_at("taid", 0.4, 0) == (0.4, 0.6) and target_at("taid", 0.4, 1) == (1.0, 0.0)


def test_veto_is_the_teacher_times_a_power_of_the_student():
    z, w = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    p, q, beta = z.softmax(-1), w.softmax(-1), 0.8
    target = q * p.detach() ** beta
    target = target / target.sum(-1, keepdim=True)
    forward = divergence(z, w, "fkl", target=target_at("veto", beta, 0))
    torch.testing.assert_close(forward, kl(target, p))
    torch.testing.assert_close(torch.autograd.grad(forward.sum(), z)[0], (p - target).detach())
    p, lq = z.softmax(-1), w.log_softmax(-1)                     # the reverse: CE(p, q) - (1 - beta) H(p)
    theirs = -(p * lq).sum() + (1 - beta) * (p * p.log()).sum()
    torch.testing.assert_close(
        *(torch.autograd.grad(x, z)[0]
          for x in (divergence(z, w, "rkl", target=target_at("veto", beta, 0)).sum(), theirs)))


def test_what_the_sampled_estimators_estimate():
    """Enumerating y ~ p: the expected gradient of each estimator as a loss, and as an advantage A log p(y).

    k1 has none, k2 that of the reverse KL, k3 that of the forward KL. -k1(y) as an advantage has that of the
    reverse KL again; a KL over the top k, which does not know y, has none, however it is truncated.
    """
    z, w = logits(8).requires_grad_(), logits(8, seed=1)
    lp, lq = torch.log_softmax(z, -1), torch.log_softmax(w, -1)
    r, weight = lp - lq, lp.exp().detach()
    gradient = lambda loss: torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
    exact = {name: gradient(divergence(z[None], w[None], name)) for name in ("fkl", "rkl")}
    assert gradient(weight * r).abs().max() < 1e-12
    torch.testing.assert_close(gradient(weight * r**2 / 2), exact["rkl"])
    torch.testing.assert_close(gradient(weight * ((-r).exp() - 1 + r)), exact["fkl"])
    torch.testing.assert_close(gradient(weight * r.detach() * lp), exact["rkl"])
    for k1_or_k3 in (r, (-r).exp() - 1 + r):                     # as values both are right; k2 is not
        torch.testing.assert_close((weight * k1_or_k3).sum(), divergence(z[None], w[None], "rkl")[0])
    assert abs((weight * r**2 / 2).sum() - (weight * r).sum()) > 0.01
    for support in SUPPORTS[1:]:
        advantage = divergence(z[None], w[None], "rkl", support=support, top_k=3).detach()
        assert gradient(weight * advantage * lp).abs().max() < 1e-12, support
