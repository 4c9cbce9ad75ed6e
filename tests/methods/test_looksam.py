"""LookSAM between its second passes, and copies of engines and methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass


class Optional(nn.Module):
    """A layer that every batch uses and one that only the first does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.once = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.always(x) + (self.once(x) if both else 0.0)


@pytest.mark.parametrize("method", ["looksam", "look_layersam"])
def test_looksam_leaves_a_parameter_alone_that_the_batch_does_not_use(method):
    """Its share of g_v would move it, and AdamW would decay it; norms then run over what has a gradient."""
    model, engine, x = Optional(), None, torch.randn(5, 3).double()
    engine = TwoPass(model, method, 0.3, k=3, alpha=0.5)
    for step, both in enumerate((True, False, True)):
        model.zero_grad()

        def run(both: bool = both) -> Tensor:
            loss = torch.tanh(model(x, both)).square().mean()
            loss.backward()
            return loss

        g = torch.autograd.grad(
            torch.tanh(model(x, both)).square().mean(), list(model.parameters()), allow_unused=True
        )
        engine.step(run)
        assert all((p.grad is None) == (not both and p is not model.always.weight and p is not model.always.bias)
                   for p in model.parameters())  # fmt: skip
        if step > 0:
            d = torch.cat(
                [(p.grad - t).flatten() for p, t in zip(model.parameters(), g, strict=True) if t is not None]
            )
            length = torch.cat([t.flatten() for t in g if t is not None]).norm()
            torch.testing.assert_close(d.norm(), 0.5 * length, rtol=1e-9, atol=0)
