"""SSAM's factor γ = min(max_scale, ‖g‖/‖v‖), on either side of its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_ssam.rules.context import StepContext
from hf_ssam.rules.descent import renormalize
from hf_ssam.rules.space import ParameterSpace


@pytest.mark.parametrize("limit", [math.inf, 1.0, 0.8, 3.0])
@pytest.mark.parametrize("length", [0.25, 1.0, 4.0])
def test_the_length_is_taken_back_up_to_the_limit(length, limit):
    """‖g‖ = 1: shorter vectors are lengthened and longer ones shortened, by no more than `limit`."""
    v = {"a": torch.tensor([0.6, 0.0], dtype=torch.float64) * length, "b": torch.full((1,), 0.8).double() * length}
    space = ParameterSpace({n: nn.Parameter(torch.zeros_like(t)) for n, t in v.items()})
    g = {"a": torch.tensor([0.0, 1.0]).double()}
    context = StepContext(space, {}, g, torch.ones((), dtype=torch.float64), 0.1)
    d = renormalize(limit)(v, context)
    expected = min(limit, 1 / length)
    assert float(context.scale) == pytest.approx(expected, rel=1e-7)
    for name, t in v.items():
        torch.testing.assert_close(d[name], expected * t, rtol=1e-7, atol=0)


def test_a_zero_stays_a_zero():
    v = {"a": torch.zeros(3).double()}
    space = ParameterSpace({"a": nn.Parameter(torch.zeros(3).double())})
    d = renormalize()(v, StepContext(space, {}, {}, torch.ones(()).double(), 0.1))
    assert d["a"].tolist() == [0.0, 0.0, 0.0]
