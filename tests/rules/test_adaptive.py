"""ASAM's operator T = |w| + η, and the parameters that it stands on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_ssam import TwoPass
from hf_ssam.rules.ascent import adaptive
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.space import ParameterSpace
from tests.support import reference

WEIGHTS = {"lstm": 2, "attention": 2, "layer": 1, "norm": 1}
"""Of each module's parameters, how many have `weight` in their name."""


def network() -> nn.Module:
    torch.manual_seed(0)
    modules = {"lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2), "layer": nn.Linear(4, 2)}
    return nn.ModuleDict({**modules, "norm": nn.LayerNorm(2)}).double()


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_operator_stands_on_every_parameter_with_weight_in_its_name(weights_only):
    """As `"weight" in name` of the official code: `lstm.weight_ih_l0` and `attention.in_proj_weight` too."""
    model = network()
    params = dict(model.named_parameters())
    v = {n: torch.randn_like(p) for n, p in params.items()}
    context = StepContext(ParameterSpace(params), {n: p.detach() for n, p in params.items()}, {}, torch.zeros(()), 0.1)
    found = adaptive(0.05, weights_only)(v, context)
    chosen = [n for n in params if not weights_only or "weight" in n]
    if weights_only:
        assert {m: sum(n.startswith(m) for n in chosen) for m in WEIGHTS} == WEIGHTS
    for name, p in params.items():
        expected = v[name] * (p.detach().abs() + 0.05) if name in chosen else v[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("weights_only", [False, True])
def test_asam_follows_its_reference_on_names_that_do_not_end_in_weight(weights_only):
    model, x = network(), torch.randn(5, 2, 3).double()

    def loss() -> torch.Tensor:
        hidden, _ = model["lstm"](x)
        hidden, _ = model["attention"](hidden, hidden, hidden)
        return model["norm"](model["layer"](hidden)).pow(3).mean()

    def run() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    w = reference.flat(model.parameters())
    is_weight = reference.flat(torch.full_like(p, float("weight" in n)) for n, p in model.named_parameters()).bool()
    options = {"adaptive": True, "eta": 0.05, "weights_only": weights_only}
    expected = reference.ssam(reference.gradient_of(model, loss), w, {}, 0.3, is_weight=is_weight, **options)
    reference.load(model, w)
    TwoPass(model, "asam", 0.3, eta=0.05, weights_only=weights_only).step(run)
    d = reference.flat(p.grad for p in model.parameters())
    torch.testing.assert_close(d, expected, rtol=1e-10, atol=1e-13)
