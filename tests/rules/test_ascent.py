"""Closed forms of where the ascent rules look."""

from __future__ import annotations

import pytest
import torch

from hf_ssam import TwoPass
from tests.engine.test_two_pass import backward_of, regression, sgd_with_engine


def frozen_steps(method: str, rho: float, steps: int, **options) -> list:
    """Reports of steps that repeat one batch and never move the weights."""
    model, batches = regression()
    engine = TwoPass(model, method, rho, **options)
    reports = []
    for _ in range(steps):
        reports.append(engine.step(backward_of(model, batches[0])))
        model.zero_grad()
    return reports


@pytest.mark.parametrize("order", ["code", "paper"])
def test_friendly_sam_finds_no_noise_in_a_whole_batch(order):
    """σ = 1, the same gradient each step: q = 0 to the bit, so the step is the base optimizer's, and no NaN."""
    first, *later = frozen_steps("friendly_sam", 0.1, 6, ema_order=order)
    torch.testing.assert_close(first.perturbation_norm, torch.tensor(0.1).double())
    for report in later:
        assert report.perturbation_norm == 0
        assert report.ascent_loss == report.loss and not report.skipped


def test_friendly_sam_moves_by_the_radius():
    model, batches = regression()
    reports = sgd_with_engine(model, TwoPass(model, "friendly_sam", 0.1), batches, lr=0.1)
    for report in reports:
        torch.testing.assert_close(report.perturbation_norm, torch.tensor(0.1).double())


def test_both_orders_of_friendly_sam_agree_at_full_strength():
    def final(order: str) -> torch.Tensor:
        model, batches = regression()
        sgd_with_engine(model, TwoPass(model, "friendly_sam", 0.1, ema_order=order, lam=0.6), batches, lr=0.1)
        return model[0].weight.detach()

    torch.testing.assert_close(final("code"), final("paper"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", ["weight", "unit"])
def test_layers_are_perturbed_by_their_own_length(scale):
    model, batches = regression()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = {}
    calls = []

    def look(*_):
        calls.append(1)
        if len(calls) == 2:
            moved.update({n: (p.detach() - before[n]).norm() for n, p in model.named_parameters()})

    model[0].register_forward_hook(look)
    TwoPass(model, "look_layersam", 0.1, layer_scale=scale).step(backward_of(model, batches[0]))
    for name, w in before.items():
        expected = 0.1 * (w.norm() if scale == "weight" else torch.ones((), dtype=w.dtype))
        torch.testing.assert_close(moved[name], expected, rtol=1e-10, atol=0)
