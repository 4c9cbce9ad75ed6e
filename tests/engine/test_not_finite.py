"""A step counts as not finite when any one of its four numbers is: each is spoiled by itself, the others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from tests.engine.test_two_pass import loss_of, regression

SPOILED = {
    "the loss": ("loss", 0),
    "the gradient": ("gradient", 0),
    "the ascent loss": ("loss", 1),
    "the ascent gradient": ("gradient", 1),
}
METHODS = {"sam": 0.1, "ssam": 0.1, "looksam": 0.1, "momentum_sam": 0.1, "ssam at rho=0": 0.0}
ONE_PASS = ("momentum_sam", "ssam at rho=0")


def spoiling(
    model: nn.Module, batch, what: str, which_pass: int, by: float, scale: float = 1.0
) -> Callable[[], Tensor]:
    """A pass whose loss or gradient, and nothing else, becomes `by` at its call number `which_pass`."""
    calls = iter(range(2))

    def run() -> Tensor:
        loss = loss_of(model, batch)
        (loss * scale).backward()
        if next(calls) != which_pass:
            return loss.detach()
        if what == "gradient":
            model[0].weight.grad[0, 0] = by
            return loss.detach()
        return loss.detach() * 0 + by

    return run


@pytest.mark.parametrize("by", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_step_is_skipped_where_one_number_alone_is_not_finite(spoiled, name, by):
    what, which_pass = SPOILED[spoiled]
    if name in ONE_PASS and which_pass == 1:
        which_pass = 0  # there is no other
    model, batches = regression()
    engine = TwoPass(model, name.split()[0], METHODS[name])
    report = engine.step(spoiling(model, batches[0], what, which_pass, by))
    assert report.skipped
    model.zero_grad()
    assert not engine.step(spoiling(model, batches[1], what, 2, by)).skipped


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n] > 0])
@pytest.mark.parametrize("spoiled", [s for s, (what, _) in SPOILED.items() if what == "loss"])
def test_a_skipped_step_spoils_its_gradient_under_a_loss_scale(spoiled, name):
    """A GradScaler looks at gradients alone: these are finite, so the engine has to say it there."""
    which_pass = 0 if name in ONE_PASS else SPOILED[spoiled][1]
    model, batches = regression()
    engine = TwoPass(model, name.split()[0], METHODS[name])
    engine.step(spoiling(model, batches[0], "loss", which_pass, torch.inf, scale=4.0), loss_scale=4.0)
    assert all(p.grad.isnan().all() for p in model.parameters())
    model.zero_grad()
    engine.step(spoiling(model, batches[1], "loss", 2, torch.inf, scale=4.0), loss_scale=4.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
