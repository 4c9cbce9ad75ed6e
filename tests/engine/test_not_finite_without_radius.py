"""At ρ = 0 a step that is skipped says so to a GradScaler as well."""

from __future__ import annotations

import pytest
import torch

from hf_ssam import TwoPass
from tests.engine.test_not_finite import spoiling
from tests.engine.test_two_pass import regression


@pytest.mark.parametrize("by", [torch.inf, torch.nan])
def test_a_skipped_step_without_a_radius_spoils_its_gradient_too(by):
    """`skipped` promises a gradient that is not finite, at ρ = 0 as elsewhere."""
    model, batches = regression()
    engine = TwoPass(model, "ssam", 0.0)
    assert engine.step(spoiling(model, batches[0], "loss", 0, by, scale=4.0), loss_scale=4.0).skipped
    assert all(p.grad.isnan().all() for p in model.parameters())
    model.zero_grad()
    engine.step(spoiling(model, batches[1], "loss", 2, by, scale=4.0), loss_scale=4.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
