"""What is measured is one function: whatever is drawn meanwhile, however its batches are cut, however flat it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ssam.sharpness import Objective, ascent_sharpness
from tests.sharpness.test_sharpness import Quadratic, rows_of, stacked
from tests.support.cases import bert, gpt2, lm_data, text_data


def test_draws_between_two_measurements_change_neither():
    """Dropout is one fixed mask a batch, also where the caller draws from the same generators in between."""
    objective = Objective(bert(0.3), stacked(text_data(4)), train_mode=True)
    v = objective.zeros() + 1
    first = objective.value(), objective.gradient(), objective.product(v)
    torch.rand(7), np.random.rand(7)
    second = objective.value(), objective.gradient(), objective.product(v)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    torch.manual_seed(99)
    assert Objective(objective.model, stacked(text_data(4)), train_mode=True).value() != first[0]


def test_batches_weigh_by_the_labels_that_their_loss_counts():
    rows = lm_data(5)
    model = gpt2().double()
    parts = Objective(model, [stacked(rows[:1]), stacked(rows[1:])])
    whole = Objective(model, stacked(rows))
    assert parts.value() == pytest.approx(whole.value(), rel=1e-6)
    torch.testing.assert_close(parts.gradient(), whole.gradient(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("height", [1e-6, 1e-2, 1.0, 100.0])
def test_the_ball_has_the_same_radius_however_flat_the_loss_is(height):
    """½ h w² in closed form, with gradients from 1e-6 to 100 long."""
    h, w, rho = height * np.array([4.0, 1.0, 0.5]), np.array([0.3, -1.0, 2.0]), 0.2
    g = h * w
    e = rho * g / np.linalg.norm(g)
    found = ascent_sharpness(Quadratic(w.tolist()), rows_of(h.tolist()), rho)
    assert found.value == pytest.approx(e @ g + 0.5 * e @ (h * e), rel=1e-9)
