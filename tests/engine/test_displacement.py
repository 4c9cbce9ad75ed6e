"""Weights that move to `w + ρ u` and back: in place, or into other memory where nobody can tell the difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.engine.passes import Displacement, Exchange, InPlace
from hf_ssam.rules.snapshot import Snapshot
from hf_ssam.rules.space import ParameterSpace
from hf_ssam.rules.tensors import Workspace, scaled

METHODS = ("ssam", "sam", "usam", "asam", "wsam", "momentum_sam", "random_perturbation", "looksam")
WAYS = [Exchange, InPlace]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 2)
    ).to(memory_format=torch.channels_last)


def run_of(model: nn.Module, seed: int = 1):
    first = next(model.parameters())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(first.dtype)

    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return run


def addresses(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


def space_of(model: nn.Module) -> ParameterSpace:
    return ParameterSpace(dict(model.named_parameters()))


@pytest.fixture
def going(monkeypatch):
    """Makes weights move in the one way or the other."""

    def go(way: type) -> None:
        if way is InPlace:
            monkeypatch.setattr(ParameterSpace, "alone", lambda self, names, known: False)

    return go


def trained(model: nn.Module, method: str, scope: str = "global", micro_batches: int = 1) -> list[Tensor]:
    """Every weight that a pass saw in four steps, and the last ones."""
    torch.manual_seed(5)
    seen: list[Tensor] = []
    engine = TwoPass(model, method, 0.5, scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.register_forward_pre_hook(lambda m, _: seen.extend(p.detach().clone() for p in m.parameters()))
    for _ in range(4):
        model.before = next(model.parameters()).detach().clone()
        engine.step([run_of(model, i) for i in range(micro_batches)])
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(p.detach() for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_both_ways_take_the_same_steps_bit_for_bit(method: str, dtype: torch.dtype, going):
    found = []
    for way in WAYS:
        going(way)
        found.append(trained(network().to(dtype), method))
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "method, scope",
    [("ssam", "global"), ("ssam", "micro_batch"), ("momentum_sam", "global"), ("looksam", "global")],
)
@pytest.mark.parametrize("build", [network, images])
def test_both_ways_accumulate_the_same_steps_bit_for_bit(build, method: str, scope: str, going):
    found = []
    for way in WAYS:
        going(way)
        found.append(trained(build(), method, scope, micro_batches=3))
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def passes_of(model: nn.Module, method: str = "ssam", steps: int = 1) -> list[list[int]]:
    """Where the weights were in each pass of the last step."""
    engine, at = TwoPass(model, method, 0.1), []
    model.register_forward_pre_hook(lambda m, _: at.append(addresses(m)))
    for _ in range(steps):
        at.clear()
        engine.step(run_of(model))
        model.zero_grad()
    return at


@pytest.mark.parametrize("build", [network, images])
@pytest.mark.parametrize("method", ["ssam", "sam", "asam", "looksam", "wsam"])
def test_weights_that_the_model_alone_holds_are_in_other_memory_for_the_second_pass(build, method: str):
    model = build()
    home = addresses(model)
    first, second = passes_of(model, method)
    assert first == home == addresses(model) and not set(second) & set(home)


@pytest.mark.parametrize("method", ["momentum_sam", "random_perturbation"])
def test_weights_are_in_other_memory_for_a_displaced_first_pass(method: str):
    model = network()
    home = addresses(model)
    (only,) = passes_of(model, method, steps=2)
    assert home == addresses(model) and not set(only) & set(home)


def test_weights_that_are_read_from_a_file_are_in_other_memory_too(tmp_path):
    from tests.support.cases import bert

    bert().save_pretrained(tmp_path)
    model = type(bert()).from_pretrained(tmp_path)
    assert space_of(model).alone(dict(model.named_parameters()), ())


def at(tensor: Tensor, offset: int) -> Tensor:
    """The same numbers, `offset` bytes past a multiple of 64, in memory of their own."""
    moved = torch.empty(0, dtype=tensor.dtype).set_(
        torch.UntypedStorage(tensor.nbytes + offset), offset // tensor.itemsize, tensor.shape, tensor.stride()
    )
    return moved.copy_(tensor)


def as_read_from_a_file(model: nn.Module, offset: int, monkeypatch) -> nn.Module:
    """Its weights are where a file that is mapped may leave them: not at a multiple of 64."""
    for p in model.parameters():
        p.data = at(p.data, offset)
    monkeypatch.setattr(ParameterSpace, "alone", lambda self, names, known: True)  # their memory is larger than they
    return model


@pytest.mark.parametrize("offset", [0, 4, 8, 20, 36, 60])
@pytest.mark.parametrize("method", ["ssam", "momentum_sam"])
def test_the_other_memory_is_aligned_as_the_weights_are(method: str, offset: int, monkeypatch):
    model = as_read_from_a_file(network(), offset, monkeypatch)
    *_, last = passes_of(model, method, steps=2)
    assert {address % 64 for address in last} == {offset} and not set(last) & set(addresses(model))


@pytest.mark.parametrize("offset", [4, 8, 20, 36])
def test_a_perturbation_of_nothing_changes_no_bit_of_weights_at_any_address(offset: int, monkeypatch):
    """Law 1: products of a matrix and one vector round otherwise at another address."""
    torch.manual_seed(0)
    model = as_read_from_a_file(nn.Linear(256, 256), offset, monkeypatch)
    x, gradients = torch.randn(1, 256, requires_grad=True), []

    def run() -> Tensor:
        loss = model(x).sin().sum()
        loss.backward()
        gradients.append((model.weight.grad.clone(), x.grad.clone(), loss.detach()))
        x.grad = None
        return loss

    TwoPass(model, "sam", 1e-30).step(run)
    assert len(gradients) == 2 and all(map(torch.equal, *gradients))


def test_memory_is_lent_at_the_alignment_that_is_asked_for():
    workspace, like = Workspace(), torch.empty(5, 3).t()
    for _ in range(2):
        with workspace.in_use():
            lent = [workspace.borrow(like, offset=offset) for offset in (0, 4, 8, 4)]
            assert [t.data_ptr() % 64 for t in lent] == [0, 4, 8, 4]
            assert all((t.shape, t.stride()) == (like.shape, like.stride()) for t in lent)
            assert len({t.data_ptr() for t in lent}) == 4
            workspace.reclaim()
    assert workspace.kept == 4 * like.nbytes


def test_weights_that_other_processes_map_stay_where_they_are():
    model = network().share_memory()
    home = addresses(model)
    assert passes_of(model) == [home, home] and all(p.is_shared() for p in model.parameters())


def test_weights_whose_perturbation_is_measured_on_a_device_stay_where_they_are():
    """Its length is not read on the host, which would wait."""
    ones = {n: torch.ones_like(p) for n, p in network().named_parameters()}
    displacement = Displacement(space_of(network()), offload=False)
    there, here = scaled(ones, torch.ones((), device="meta")), scaled(ones, torch.ones(()))
    assert isinstance(displacement._way(list(ones), there, ()), InPlace)
    assert isinstance(displacement._way(list(ones), here, ()), Exchange)


def _view(model: nn.Module) -> object:
    return model[0].weight.t()


def _state(model: nn.Module) -> object:
    return model.state_dict()


def _numpy(model: nn.Module) -> object:
    return model[0].weight.detach().numpy()


def _graph(model: nn.Module) -> object:
    return model(torch.randn(2, 8))


@pytest.mark.parametrize("look", [_view, _state, _numpy, _graph])
def test_weights_that_somebody_looks_at_stay_where_they_are(look):
    """Who looks at the memory sees the perturbed weights."""
    model = network()
    home, held = addresses(model), look(model)
    assert passes_of(model) == [home, home] and held is not None


def test_what_a_first_pass_looks_at_keeps_its_weights_where_they_are():
    """A module that computes with a view of the first pass computes with the perturbed weights in the second."""
    model, views, found = nn.Linear(8, 2), [], []

    def forward(x: Tensor) -> Tensor:
        views.append(model.weight.detach()) if not views else None
        found.append(torch.equal(views[0], model.weight))
        return nn.functional.linear(x, model.weight)

    model.forward = forward
    TwoPass(model, "ssam", 0.5).step(run_of(model))
    assert found == [True, True]


def test_parts_of_a_larger_tensor_stay_where_they_are():
    flat = torch.randn(20)
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(flat[:16].view(4, 4))
    assert not space_of(model).alone(["weight"], ())
    del flat
    assert not space_of(model).alone(["weight"], ())


def test_weights_of_a_kind_of_their_own_stay_where_they_are():
    class Odd(nn.Parameter):
        pass

    model = nn.Linear(4, 4, bias=False)
    assert space_of(model).alone(["weight"], ())
    model.weight = Odd(torch.randn(4, 4))
    assert not space_of(model).alone(["weight"], ())


def test_only_one_look_of_the_step_itself_is_overlooked():
    model = nn.Linear(4, 4, bias=False)
    space = space_of(model)
    w = space.weights()
    assert space.alone(["weight"], w) and not space.alone(["weight"], ())
    other = model.weight.t()
    assert not space.alone(["weight"], w) and other is not None


class Remembers(nn.Module):
    """Keeps a view of its weight from a pass at other weights than `before`, as a module with a cache may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.views = nn.Linear(8, 2), []
        self.before = self.inner.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        self.views = [] if torch.equal(self.inner.weight, self.before) else [self.inner.weight.detach()]
        return self.inner(x)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("method", ["ssam", "momentum_sam"])
@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_a_view_that_a_pass_leaves_behind_shows_the_weights_ever_after(scope: str, method: str, micro_batches: int):
    """Not the memory that they were in for the pass, and not what the next step writes there."""
    model = Remembers()
    engine, optimizer = TwoPass(model, method, 0.5, scope=scope), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.before = model.inner.weight.detach().clone()
        engine.step([run_of(model, i) for i in range(micro_batches)])
        assert torch.equal(model.inner.weight, model.before)
        assert all(torch.equal(view, model.before) for view in model.views)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(view, model.inner.weight) for view in model.views)
    assert model.views


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("method", ["ssam", "momentum_sam"])
def test_views_that_are_left_behind_change_no_step(method: str, micro_batches: int, going):
    found = []
    for way in WAYS:
        going(way)
        found.append(trained(Remembers(), method, micro_batches=micro_batches))
    assert all(map(torch.equal, *found))


def test_memory_that_became_a_weights_is_not_lent_again():
    """It stays the weight's, however many steps follow, and nothing else is written there."""
    model = Remembers()
    engine, home = TwoPass(model, "ssam", 0.5), addresses(model)
    for _ in range(4):
        engine.step(run_of(model))
        model.zero_grad()
        assert model.inner.weight.data_ptr() != home[0]
        held = {t.data_ptr() for tensors in engine._workspace._free.values() for t in tensors}
        assert not held & set(addresses(model))


class Scales(nn.Module):
    """A graph of it keeps the parameter itself, not a view."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_of_the_first_pass_is_refused_in_the_second(way: type, going):
    """It was computed with other weights than those that a backward through it would read."""
    going(way)
    model, kept = Scales(), []
    x = torch.randn(4, 8, requires_grad=True)

    def run() -> Tensor:
        if kept:
            kept[0].backward()
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        kept.append(loss)
        return loss

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        TwoPass(model, "ssam", 0.1).step(run)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("placed", [0, 2, 4])
@pytest.mark.parametrize("call", [0, 1])
def test_an_interrupt_while_weights_change_places_leaves_them_at_home(call: int, placed: int, monkeypatch):
    """In the way there (call 0) or in the way back (1), with some of them in place."""
    model, calls, place = network(), [], Exchange._place

    def interrupted(self, memory):
        calls.append(1)
        if len(calls) == call + 1:
            for p, tensor in list(zip(self._params, memory, strict=True))[:placed]:
                p.data = tensor
            raise KeyboardInterrupt
        place(self, memory)

    monkeypatch.setattr(Exchange, "_place", interrupted)
    check_an_interrupted_step(model)


@pytest.mark.parametrize("build", [network, Remembers])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_while_holders_are_counted_leaves_the_weights(build, call: int, monkeypatch):
    from hf_ssam.engine import passes

    model, calls, real = build(), [], passes.holders

    def interrupted(tensor):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(tensor)

    monkeypatch.setattr(passes, "holders", interrupted)
    check_an_interrupted_step(model, stays=build is network)


def check_an_interrupted_step(model: nn.Module, stays: bool = True) -> None:
    """The weights are at home, as they were, and the next step works."""
    home, before = addresses(model), copy.deepcopy(model.state_dict())
    engine = TwoPass(model, "sam", 0.1)
    with pytest.raises(KeyboardInterrupt):
        engine.step(run_of(model))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert addresses(model) == home or not stays
    model.zero_grad()
    engine.step(run_of(model))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "scope, method",
    [("global", "ssam"), ("micro_batch", "ssam"), ("global", "momentum_sam"), ("global", "random_perturbation")],
)
def test_memory_of_a_step_does_not_grow_with_its_micro_batches(scope: str, method: str, way: type, going):
    """Law 3: there is one copy, of what is perturbed, however often the weights move in a step."""
    going(way)
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


@pytest.mark.parametrize("way", WAYS)
def test_a_displacement_outside_a_step_is_undone_too(way: type, going):
    going(way)
    model = network()
    home, before = addresses(model), copy.deepcopy(model.state_dict())
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    displacement = Displacement(space_of(model), offload=False)
    with pytest.raises(KeyboardInterrupt), displacement.by(ones, 0.5):
        assert all(torch.equal(p, before[n] + 0.5) for n, p in model.named_parameters())
        raise KeyboardInterrupt
    assert addresses(model) == home and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class MaxNorm(nn.Module):
    """Puts another tensor in `p.data` at each forward, as networks with a limit on the norm of their rows do."""

    def __init__(self, limit: float):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.limit = nn.Linear(8, 2), limit

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data = torch.renorm(self.inner.weight.data, 2, 0, self.limit)
        return self.inner(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["ssam", "sam", "momentum_sam"])
@pytest.mark.parametrize("limit", [100.0, 0.5])
def test_weights_come_back_where_a_forward_replaces_them(method: str, limit: float, way: type, going):
    """They are those that the first pass left, within the limit or cut down to it, not those of the second."""
    going(way)
    model = MaxNorm(limit)
    engine, steps = TwoPass(model, method, 0.5), 2  # momentum_sam's first step has no momentum to move by
    for _ in range(steps):
        expected = copy.deepcopy(model)
        if method != "momentum_sam":  # whose only pass is displaced: what that forward does is undone
            expected(torch.zeros(1, 8))
        engine.step(run_of(model))
        model.zero_grad()
    assert torch.equal(model.inner.weight, expected.inner.weight)


class TransposesOnce(nn.Module):
    """Lays its weight out otherwise in the second pass, at the same address."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.passes = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 2:
            self.inner.weight.data = self.inner.weight.data.t()
        return self.inner(x)


@pytest.mark.parametrize("way", WAYS)
def test_weights_come_back_where_a_forward_lays_them_out_otherwise(way: type, going):
    going(way)
    model = TransposesOnce()
    before = copy.deepcopy(model.inner.weight)
    TwoPass(model, "ssam", 0.5).step(run_of(model))
    assert torch.equal(model.inner.weight, before) and model.inner.weight.stride() == before.stride()


class MaxNormThatRemembers(MaxNorm):
    """Keeps what it computed with and what it was before."""

    def __init__(self):
        super().__init__(100.0)
        self.views: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.views = [self.inner.weight.detach()]
        return super().forward(x)


def test_a_view_of_memory_that_a_forward_left_is_not_written_to_by_later_steps():
    model = MaxNormThatRemembers()
    engine = TwoPass(model, "ssam", 0.5)
    engine.step(run_of(model))
    view, before = model.views[0], model.views[0].clone()
    for _ in range(2):
        model.zero_grad()
        engine.step(run_of(model))
    assert torch.equal(view, before)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_a_forward_replaced_come_back_after_an_interrupt(way: type, going):
    going(way)
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
