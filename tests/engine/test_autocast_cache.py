"""Casts of perturbed weights do not outlive the perturbation, in an autocast context that outlives the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from tests.engine.test_precision import batches, loss_of, network


def under_autocast(model: nn.Module, batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, batch)


@pytest.mark.parametrize("method", ["sam", "ssam", "momentum_sam"])
def test_a_forward_after_the_step_casts_the_weights_that_came_back(method):
    """One context around the step and what follows it, as a validation after each step has it."""
    model, batch = network(), batches()[0]
    engine = TwoPass(model, method, 0.5)

    def run() -> Tensor:
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    expected = under_autocast(network(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):  # Momentum-SAM perturbs from its second step on
            report = engine.step(run)
            after = loss_of(model, batch)
            model.zero_grad()
    assert report.perturbation_norm > 0.4
    assert after == expected
