"""What `TwoPass` refuses in one sentence: passes that are none, gradients left behind, parameters that are others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass


def run_of(model: nn.Module, backward: bool = True, returned=lambda loss: loss):
    x = torch.ones(2, 4)

    def run():
        loss = model(x).square().mean()
        if backward:
            loss.backward()
        return returned(loss)

    return run


@pytest.mark.parametrize("method", ["ssam", "momentum_sam"])
def test_a_gradient_left_from_before_is_refused(method):
    model = nn.Linear(4, 2)
    engine = TwoPass(model, method, 0.1)
    engine.step(run_of(model))
    with pytest.raises(ValueError, match="run_pass: a gradient is left from before.*accelerator.accumulate"):
        engine.step(run_of(model))


def test_gradients_of_zero_are_no_gradients():
    model = nn.Linear(4, 2)
    engine = TwoPass(model, "sam", 0.1)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        engine.step(run_of(model))


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_pass_without_backward_is_refused(rho):
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="run_pass: no parameter has a gradient after it; let it call"):
        TwoPass(model, "sam", rho).step(run_of(model, backward=False))


@pytest.mark.parametrize("returned", [lambda loss: None, lambda loss: loss.item(), lambda loss: torch.ones(3)])
def test_a_pass_that_returns_no_loss_is_refused(returned):
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="run_pass: it returned .*; return the loss, a tensor of one number"):
        TwoPass(model, "sam", 0.1).step(run_of(model, returned=returned))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def resized(model: nn.Sequential) -> None:
    model[1] = nn.Linear(8, 5)


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [resized, assigned])
def test_a_parameter_that_was_replaced_is_refused(replace):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    engine = TwoPass(model, "sam", 0.1)
    replace(model)
    with pytest.raises(ValueError, match="model: `.*weight` is another parameter than when the engine was built"):
        engine.step(run_of(model))


def test_complex_parameters_are_refused():
    model = nn.ParameterDict({"phase": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match="model: `phase` is complex"):
        TwoPass(model, "sam")


class Lookup(nn.Module):
    """An embedding by the functional form, whose gradient is sparse."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x.long()[:, 0], self.table, sparse=True)


def test_sparse_gradients_of_a_functional_embedding_are_refused():
    model = Lookup()
    with pytest.raises(ValueError, match="model: the gradient of `table` is sparse"):
        TwoPass(model, "sam").step(run_of(model))


@pytest.mark.parametrize("at", ["snapshot", "restore"])
def test_an_interrupt_inside_the_restore_leaves_the_weights(at, monkeypatch):
    """The copy is idempotent, so it is made once more whatever broke it off."""
    from hf_ssam.rules.tensors import Snapshot

    model, tries = nn.Linear(4, 2), []
    before = copy.deepcopy(model.state_dict())
    copy_back = Snapshot._copy_back

    def interrupted(self):
        tries.append(1)
        if len(tries) == 1 and at == "restore":
            raise KeyboardInterrupt
        copy_back(self)

    monkeypatch.setattr(Snapshot, "_copy_back", interrupted)
    engine = TwoPass(model, "sam", 0.1)
    if at == "restore":
        with pytest.raises(KeyboardInterrupt):
            engine.step(run_of(model))
    else:
        engine.step(run_of(model))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_descent_that_edits_in_place_is_not_lost_under_a_loss_scale():
    """A rule may edit its vector and return it: the contract, with a unit and without."""
    from hf_ssam import METHODS
    from hf_ssam.methods import Method, Rules, normalize

    def halved(v, context):
        for t in v.values():
            t.mul_(0.5)
        return v

    method = Method("halved", "a half of SAM's", lambda: Rules(normalize, halved), 0.1, METHODS["sam"].paper)
    for scale in (None, 8.0, torch.tensor(3.0)):
        found = []
        for which in ("sam", method):
            torch.manual_seed(0)
            model = nn.Linear(4, 2)

            def run(m=model, s=scale) -> Tensor:
                loss = m(torch.ones(2, 4)).square().mean() * (1.0 if s is None else s)
                loss.backward()
                return loss

            TwoPass(model, which, 0.1).step(run, loss_scale=scale)
            found.append([p.grad.clone() for p in model.parameters()])
        for whole, half in zip(*found, strict=True):
            torch.testing.assert_close(half, whole / 2, rtol=1e-6, atol=0)
