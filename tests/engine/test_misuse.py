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
    from hf_ssam.rules.snapshot import Snapshot
    from hf_ssam.rules.space import ParameterSpace

    model, tries = nn.Linear(4, 2), []
    before = copy.deepcopy(model.state_dict())
    copy_back = Snapshot._copy_back

    def interrupted(self):
        tries.append(1)
        if len(tries) == 1 and at == "restore":
            raise KeyboardInterrupt
        copy_back(self)

    monkeypatch.setattr(Snapshot, "_copy_back", interrupted)
    monkeypatch.setattr(ParameterSpace, "alone", lambda self, names, known: False)
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


def engines_of(methods: tuple[str, ...]) -> tuple[nn.Module, list[TwoPass]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, [TwoPass(model, method, 0.1) for method in methods]


def steps_of(model: nn.Module, engine: TwoPass, other: TwoPass | None = None) -> list[Tensor]:
    """The gradients that `engine` leaves, each as one vector; `other` takes a step of no effect after each."""
    found = []
    for _ in range(4):
        engine.step(run_of(model))
        grads = [p.grad.clone() for p in model.parameters()]
        if other is not None:
            kept = copy.deepcopy(model.state_dict()), torch.get_rng_state()
            model.zero_grad()
            other.step(run_of(model))
            model.load_state_dict(kept[0])
            torch.set_rng_state(kept[1])
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        torch.optim.SGD(model.parameters(), 0.1).step()
        model.zero_grad()
        found.append(torch.cat([g.flatten() for g in grads]))
    return found


@pytest.mark.parametrize("method", ["ssam", "vasso", "looksam"])
def test_steps_of_another_engine_leave_an_engine_as_it_would_be_alone(method):
    """Whole steps in turn: each engine keeps a state of its own, bit for bit."""
    model, (engine,) = engines_of((method,))
    alone = steps_of(model, engine)
    model, (engine, other) = engines_of((method, "vasso"))
    beside = steps_of(model, engine, other)
    assert len({float(d.norm()) for d in alone}) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def micro_batch_first(engine: TwoPass, other: TwoPass, run) -> None:
    engine.begin()
    engine.first_pass(run)
    engine.space.clear_grads()
    other.step(run)
    engine.finish()


def both_begun(engine: TwoPass, other: TwoPass, run) -> None:
    engine.begin()
    other.begin()
    engine.first_pass(run)


def inside_a_pass(engine: TwoPass, other: TwoPass, run) -> None:
    def nested():
        other.step(run)
        return run()

    engine.step(nested)


@pytest.mark.parametrize("interleave", [micro_batch_first, both_begun, inside_a_pass])
def test_steps_of_two_engines_that_overlap_are_refused(interleave):
    model, (engine, other) = engines_of(("sam", "ssam"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="model: another TwoPass began a step on these parameters.*finish one"):
        interleave(engine, other, run_of(model))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    engine.step(run_of(model))


def test_steps_of_two_engines_that_share_no_parameter_may_overlap():
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
    engine, other = (TwoPass(part, "sam", 0.1) for part in model)
    engine.begin()
    engine.first_pass(run_of(model[0]))
    other.step(run_of(model[1]))
    engine.finish()
    assert all(p.grad is not None for p in model.parameters())


def test_an_engine_that_was_given_up_in_a_step_is_in_no_ones_way():
    model, (engine, other) = engines_of(("sam", "ssam"))
    engine.begin()
    for _ in range(3):
        other.step(run_of(model))
        model.zero_grad()
