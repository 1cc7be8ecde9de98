"""Objectives against their definitions: values, gradients, limits, and what the estimators estimate."""
import pytest
import torch

from losses import DIVERGENCES, divergence, importance_weight, lookup, policy_gradient_weight

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


@pytest.mark.parametrize("name", NAMES)
def test_dense_reference_passes_gradcheck(name):
    w = logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda z: divergence(z, w, name, temperature=1.3),
                                    logits(3, 6).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_loss_and_no_gradient(name):
    z = logits(4, 9).requires_grad_()
    value = divergence(z, z.detach() + 3.0, name)                # logits are defined up to a constant
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name):
    z, w = logits(4, 9, scale=1e4, dtype=torch.float32), logits(4, 9, seed=1, scale=1e4, dtype=torch.float32)
    z[0, 2], w[0, 2], w[1, 3], z[2, 4] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    z.requires_grad_()
    value = divergence(z, w, name)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), z)[0].isfinite().all()


def test_jsd_tends_to_the_kl_divergences_and_refuses_the_ends():
    z, w = logits(5, 11), logits(5, 11, seed=1)
    torch.testing.assert_close(divergence(z, w, "jsd", knob=1e-6) / 1e-6, divergence(z, w, "fkl"),
                               rtol=1e-3, atol=0)
    torch.testing.assert_close(divergence(z, w, "jsd", knob=1 - 1e-6) / 1e-6, divergence(z, w, "rkl"),
                               rtol=1e-3, atol=0)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < beta < 1"):
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
