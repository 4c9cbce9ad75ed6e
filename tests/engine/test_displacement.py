"""Weights that move to `w + ρ u` and back, several times in a step, and whatever a forward does to them meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.rules.tensors import Snapshot, Workspace


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def run_of(model: nn.Module):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return run


@pytest.mark.parametrize(
    "scope, method",
    [("global", "ssam"), ("micro_batch", "ssam"), ("global", "momentum_sam"), ("global", "random_perturbation")],
)
def test_memory_of_a_step_does_not_grow_with_its_micro_batches(scope: str, method: str):
    """Law 3: there is one copy, of what is perturbed, however often the weights move in a step."""
    kept = []
    for micro_batches in (1, 4):
        model = network()
        engine = TwoPass(model, method, 0.1, scope=scope)
        for _ in range(3):
            engine.step([run_of(model)] * micro_batches)
            model.zero_grad()
        kept.append(engine._workspace.kept)
    assert kept[0] == kept[1] > 0


def test_only_the_copies_of_a_snapshot_are_lent_again():
    workspace, weight = Workspace(), torch.ones(3)
    with workspace.in_use():
        kept, snapshot = workspace.borrow(weight), Snapshot([weight])
        snapshot.release()
        again = [workspace.borrow(weight) for _ in range(2)]
    assert again[0] is snapshot.copies[0] and all(t is not kept for t in again)


class MaxNorm(nn.Module):
    """Puts another tensor in `p.data` at each forward, as networks with a limit on the norm of their rows do."""

    def __init__(self, limit: float):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.limit = nn.Linear(8, 2), limit

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data = torch.renorm(self.inner.weight.data, 2, 0, self.limit)
        return self.inner(x)


@pytest.mark.parametrize("method", ["ssam", "sam", "momentum_sam"])
@pytest.mark.parametrize("limit", [100.0, 0.5])
def test_weights_come_back_where_a_forward_replaces_them(method: str, limit: float):
    """They are those that the first pass left, within the limit or cut down to it, not those of the second."""
    model = MaxNorm(limit)
    engine, steps = TwoPass(model, method, 0.5), 2  # momentum_sam's first step has no momentum to move by
    for _ in range(steps):
        expected = copy.deepcopy(model)
        if method != "momentum_sam":  # whose only pass is displaced: what that forward does is undone
            expected(torch.zeros(1, 8))
        engine.step(run_of(model))
        model.zero_grad()
    assert torch.equal(model.inner.weight, expected.inner.weight)


def test_weights_that_a_forward_replaced_come_back_after_an_interrupt():
    model, calls = MaxNorm(100.0), []
    before = copy.deepcopy(model.state_dict())

    def run() -> Tensor:
        calls.append(1)
        loss = run_of(model)()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        TwoPass(model, "ssam", 0.5).step(run)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
