"""Closed forms of what the descent rules hand on."""

from __future__ import annotations

import pytest
import torch

from hf_ssam import TwoPass
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.descent import orthogonal
from hf_ssam.rules.space import ParameterSpace
from tests.engine.test_two_pass import backward_of, loss_of, regression
from tests.support import reference


def gradients(rho: float = 0.3) -> tuple:
    """Model, batches, and by hand: g and ĝ of the first batch for SAM's perturbation."""
    model, batches = regression()
    gradient = reference.gradient_of(model, lambda: loss_of(model, batches[0]))
    w = reference.flat(model.parameters())
    g = gradient(w)
    second = gradient(w + rho * g / g.norm())
    reference.load(model, w)
    return model, batches, g, second


def handed_on(model, batch, method: str, rho: float = 0.3, **options) -> torch.Tensor:
    engine = TwoPass(model, method, rho, **options)
    engine.step(backward_of(model, batch))
    return reference.flat(p.grad for p in model.parameters())


def test_gsam_takes_out_what_is_orthogonal_to_the_second_gradient():
    model, batches, g, second = gradients()
    d = handed_on(model, batches[0], "gsam", alpha=0.4)
    taken = (second - d) / 0.4
    torch.testing.assert_close(taken @ second / (taken.norm() * second.norm()), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(d @ second, second @ second, rtol=1e-10, atol=0)
    torch.testing.assert_close(taken + (g @ second) / (second @ second) * second, g, rtol=1e-10, atol=1e-12)


def test_wsam_is_the_combination_of_the_two_gradients():
    model, batches, g, second = gradients()
    torch.testing.assert_close(
        handed_on(model, batches[0], "wsam", gamma=0.9), -8 * g + 9 * second, rtol=1e-10, atol=1e-13
    )


def test_looksam_keeps_what_is_orthogonal_and_adds_a_fixed_share_of_it():
    model, batches, g, _ = gradients()
    engine = TwoPass(model, "looksam", 0.3, k=5, alpha=0.4)
    engine.step(backward_of(model, batches[0]))
    kept = reference.flat(engine.state_dict()["memory"]["orthogonal"].values())
    assert abs((kept @ g) / (kept.norm() * g.norm())) < 1e-12
    for batch in batches[1:5]:
        first = reference.gradient_of(model, lambda b=batch: loss_of(model, b))(reference.flat(model.parameters()))
        model.zero_grad()
        report = engine.step(backward_of(model, batch))
        d = reference.flat(p.grad for p in model.parameters())
        torch.testing.assert_close((d - first).norm(), 0.4 * first.norm(), rtol=1e-10, atol=0)
        assert report.ascent_loss is report.ascent_grad_norm is report.perturbation_norm is None


def test_looksam_without_a_share_is_the_plain_gradient_between():
    model, batches, *_ = gradients()
    engine = TwoPass(model, "looksam", 0.3, k=2, alpha=0.0)
    engine.step(backward_of(model, batches[0]))
    model.zero_grad()
    first = reference.gradient_of(model, lambda: loss_of(model, batches[1]))(reference.flat(model.parameters()))
    engine.step(backward_of(model, batches[1]))
    assert torch.equal(reference.flat(p.grad for p in model.parameters()), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_leaves_of_a_parallel_vector_is_not_amplified(dtype):
    torch.manual_seed(0)
    params = {"a": torch.nn.Parameter(torch.zeros(1000, dtype=dtype))}
    at = StepContext(ParameterSpace(params), {}, {}, torch.zeros(()), 0.1)
    to = {"a": torch.randn(1000, dtype=dtype)}
    assert orthogonal({"a": 1.0001 * to["a"]}, to, at)["a"].abs().max() == 0
    assert orthogonal({"a": torch.randn(1000, dtype=dtype)}, to, at)["a"].abs().max() > 0
    assert torch.equal(orthogonal(to, {"a": torch.zeros(1000, dtype=dtype)}, at)["a"], to["a"])


@pytest.mark.parametrize("method", ["gsam", "wsam", "looksam", "friendly_sam", "vasso", "look_layersam"])
def test_renormalised_every_method_hands_on_the_length_of_the_first_gradient(method):
    model, batches, *_ = gradients()
    engine = TwoPass(model, method, 0.3, renormalize=True)
    for batch in batches[:3]:
        report = engine.step(backward_of(model, batch))
        d = reference.flat(p.grad for p in model.parameters())
        torch.testing.assert_close(d.norm(), report.grad_norm, rtol=1e-11, atol=0)
        model.zero_grad()
