"""The engine against slow references and closed forms, and what it must leave behind when something goes wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.rules.context import StepContext, chain
from hf_ssam.rules.space import ParameterSpace
from tests.support import reference
from tests.support.cases import Case, assert_identical, each_case, weights


def regression(seed: int = 0) -> tuple[nn.Module, list]:
    """A float64 network and ten batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, [(torch.randn(6, 3).double(), torch.randn(6, 2).double()) for _ in range(10)]


def loss_of(model: nn.Module, batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def backward_of(model: nn.Module, batch):
    def run() -> Tensor:
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return run


def sgd_with_engine(model: nn.Module, engine: TwoPass, batches: list, lr: float) -> list:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    reports = []
    for batch in batches:
        reports.append(engine.step(backward_of(model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return reports


@each_case
def test_every_method_follows_its_float64_reference(case: Case):
    model, batches = regression()
    expected_model, _ = regression()
    losses = [lambda b=batch: loss_of(expected_model, b) for batch in batches]
    expected = reference.sgd(case.method, expected_model, losses, case.rho, lr=0.1, **case.options)
    sgd_with_engine(model, TwoPass(model, case.method, case.rho, **case.options), batches, lr=0.1)
    torch.testing.assert_close(reference.flat(model.parameters()), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"adaptive": True}])
def test_ssam_hands_on_a_gradient_as_long_as_the_first(options):
    model, batches = regression()
    engine = TwoPass(model, "ssam", 0.3, **options)
    report = engine.step(backward_of(model, batches[0]))
    d = reference.flat(p.grad for p in model.parameters())
    torch.testing.assert_close(d.norm(), report.grad_norm.double(), rtol=1e-11, atol=0)
    torch.testing.assert_close(report.scale.double(), report.grad_norm / report.ascent_grad_norm, rtol=1e-11, atol=0)


def test_truncated_ssam_never_lengthens_the_gradient():
    model, batches = regression()
    engine = TwoPass(model, "ssam", 0.3, max_scale=1.0)
    for batch in batches:
        report = engine.step(backward_of(model, batch))
        d = reference.flat(p.grad for p in model.parameters())
        torch.testing.assert_close(
            d.norm(), torch.minimum(report.grad_norm, report.ascent_grad_norm), rtol=1e-11, atol=0
        )
        model.zero_grad()


def test_the_report_says_what_happened():
    model, batches = regression()
    run = backward_of(model, batches[0])
    before = reference.flat(model.parameters())
    gradient = reference.gradient_of(model, lambda: loss_of(model, batches[0]))
    g = gradient(before)
    moved = before + 0.2 * g / g.norm()
    ascent_gradient = gradient(moved)
    reference.load(model, moved)
    ascent_loss = loss_of(model, batches[0])
    reference.load(model, before)
    report = TwoPass(model, "sam", 0.2).step(run)
    torch.testing.assert_close(report.loss, loss_of(model, batches[0]).detach())
    torch.testing.assert_close(report.ascent_loss, ascent_loss.detach())
    torch.testing.assert_close(report.grad_norm, g.norm())
    torch.testing.assert_close(report.ascent_grad_norm, ascent_gradient.norm())
    torch.testing.assert_close(report.perturbation_norm.double(), torch.tensor(0.2).double())
    assert (report.scale, report.passes, report.skipped.item()) == (1.0, 2.0, False)


def test_a_step_that_does_not_perturb_reports_one_pass():
    model, batches = regression()
    report = TwoPass(model, "ssam", 0.0).step(backward_of(model, batches[0]))
    assert report.passes == 1
    assert report.ascent_loss is report.ascent_grad_norm is report.perturbation_norm is None


def diagonal_quadratic(values: list[float], start: float):
    """½ wᵀHw with H diagonal."""
    w = nn.Parameter(torch.full((len(values),), start).double())
    model = nn.ParameterList([w])
    h = torch.tensor(values).double()

    def run() -> Tensor:
        loss = 0.5 * (h * w * w).sum()
        loss.backward()
        return loss

    return model, run


def distance_after(method: str, lr: float, steps: int, rho: float, **options) -> float:
    model, run = diagonal_quadratic([4.0, 1.0], 0.01)
    engine, optimizer = TwoPass(model, method, rho, **options), torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        engine.step(run)
        optimizer.step()
        optimizer.zero_grad()
    return model[0].norm().item()


@pytest.mark.slow
def test_usam_diverges_where_its_edge_says():
    """ηλ(1 + ρλ) = 2 with λ = 4, ρ = 0.3: η* = 0.22727."""
    edge = 2 / (4 * (1 + 0.3 * 4))
    assert distance_after("usam", 0.99 * edge, 800, 0.3) < 1e-4
    assert distance_after("usam", 1.01 * edge, 800, 0.3) > 1.0


def test_unnormalised_ssam_keeps_the_edge_of_gradient_descent():
    edge = 2 / 4
    assert distance_after("ssam", 0.99 * edge, 800, 0.3, normalize=False) < 1e-2
    assert distance_after("ssam", 1.01 * edge, 800, 0.3, normalize=False) > 1.0
    assert distance_after("usam", 0.99 * edge, 100, 0.3) > 1.0


def test_normalised_sam_ends_in_the_cycle_of_its_closed_form():
    """1-d quadratic: amplitude ηλρ/(2 − ηλ): 0.042857 for η = 0.2, λ = 3, ρ = 0.1."""
    model, run = diagonal_quadratic([3.0], 0.5)
    engine, optimizer = TwoPass(model, "sam", 0.1), torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(400):
        engine.step(run)
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].abs().item() == pytest.approx(0.2 * 3 * 0.1 / (2 - 0.2 * 3), rel=1e-9)


def test_ssam_is_gradient_descent_on_a_one_dimensional_quadratic():
    model, run = diagonal_quadratic([3.0], 0.5)
    engine, optimizer = TwoPass(model, "ssam", 0.1), torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(20):
        engine.step(run)
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].item() == pytest.approx(0.5 * (1 - 0.2 * 3) ** 20, rel=1e-10)


@pytest.mark.parametrize(("rho", "steps"), [(0.05, (54, 53)), (0.2, (80, 65)), (0.4, (233, 83)), (0.45, (463, 88))])
def test_ssam_leaves_a_saddle_sooner_than_usam(rho, steps):
    """x² − y² from (0.5, 0.01), η = 0.05, steps to |y| > 1, counted by hand in float64."""

    def steps_to_leave(method: str, **options) -> int:
        w = nn.Parameter(torch.tensor([0.5, 0.01]).double())
        model = nn.ParameterList([w])

        def run() -> Tensor:
            loss = w[0] ** 2 - w[1] ** 2
            loss.backward()
            return loss

        engine, optimizer = TwoPass(model, method, rho, **options), torch.optim.SGD([w], lr=0.05)
        for step in range(1, 1000):
            engine.step(run)
            optimizer.step()
            optimizer.zero_grad()
            if w[1].abs() > 1:
                return step
        return -1

    assert (steps_to_leave("usam"), steps_to_leave("ssam", normalize=False)) == steps


class Faulty(nn.Module):
    """A network with dropout and BatchNorm whose forward raises when told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.calls, self.fails_at, self.error = 0, -1, RuntimeError("out of memory")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        return self.net(x)


def faulty_run(model: Faulty, x: Tensor):
    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return run


@pytest.fixture(params=["elsewhere", "in place"])
def each_way(request, monkeypatch):
    """Weights move in the way of the CPU, and in that of a GPU."""
    if request.param == "in place":
        monkeypatch.setattr(ParameterSpace, "alone", lambda self, names, known: False)


@each_case
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize(("scope", "fails_at"), [("global", 3), ("global", 4), ("micro_batch", 2), ("micro_batch", 4)])
def test_an_exception_in_the_second_pass_leaves_every_weight(case: Case, scope, fails_at, error, each_way):
    model, x = Faulty(), torch.randn(6, 3)
    if scope == "micro_batch" and not case.ascends_alone:
        with pytest.raises(ValueError, match="ascent_scope: method `.*` hands on one vector from step to step"):
            TwoPass(model, case.method, scope=scope, **case.options)
        return
    engine = TwoPass(model, case.method, case.rho, scope=scope, **case.options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.fails_at, model.error = fails_at, error
    with pytest.raises(type(error)):
        engine.step([faulty_run(model, x[:3]), faulty_run(model, x[3:])])
    assert_identical(before, {n: p.detach() for n, p in model.named_parameters()})
    assert all(p.grad is None for p in model.parameters())
    assert not engine.is_open
    report = engine.step([faulty_run(model, x[:3]), faulty_run(model, x[3:])])
    assert report.perturbation_norm > 0


@each_case
@pytest.mark.parametrize("offload", [False, True])
def test_weights_come_back_bit_for_bit_in_every_precision(case: Case, offload, each_way):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)).to(dtype)
        x = torch.randn(4, 3, dtype=dtype)
        before = weights(model)
        engine = TwoPass(model, case.method, 3.0, offload_snapshot=offload, **case.options)
        engine.step(lambda m=model, i=x: backward(m(i).float().square().mean()))
        assert_identical(before, weights(model))


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


@each_case
def test_a_zero_gradient_stays_zero(case: Case):
    model = nn.Linear(3, 2)
    report = TwoPass(model, case.method, case.rho, **case.options).step(
        lambda: backward(0.0 * model(torch.ones(1, 3)).sum())
    )
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    assert not report.skipped


def test_frozen_parameters_do_not_enter_the_norm_nor_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    engine = TwoPass(model, "sam", 0.1)
    seen = []
    model[0].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    report = engine.step(lambda: backward(model(torch.randn(2, 3)).square().mean()))
    assert list(engine.perturbed) == ["1.weight", "1.bias"]
    assert torch.equal(seen[0], seen[1])
    assert report.perturbation_norm.item() == pytest.approx(0.1)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter of Linear requires a gradient"):
        TwoPass(nn.Linear(2, 2).requires_grad_(False))


def test_tied_weights_are_perturbed_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    before, seen = model[0].weight.detach().clone(), []
    model[2].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    TwoPass(model, "sam", 0.5).step(lambda: backward(model(torch.randn(4, 3)).square().mean()))
    assert (seen[1] - before).norm().item() == pytest.approx(0.5, rel=1e-5)


class Branches(nn.Module):
    """Uses one of its two branches in turn, like a mixture of experts whose router changed its mind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.common, self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.first if self.calls % 2 else self.second)(torch.tanh(self.common(x)))


@each_case
def test_a_parameter_used_in_one_pass_only_is_restored_and_not_stepped_on(case: Case):
    model, x = Branches(), torch.randn(4, 2)
    before = weights(model)
    TwoPass(model, case.method, case.rho, **case.options).step(lambda: backward(model(x).square().mean()))
    assert_identical(before, weights(model))
    assert model.common.weight.grad is not None and model.second.weight.grad is not None
    assert torch.isfinite(model.second.weight.grad).all()


@each_case
def test_the_second_pass_is_at_the_perturbed_weights(case: Case):
    model, batches = regression()
    seen = []
    model[0].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    TwoPass(model, case.method, case.rho, **case.options).step(backward_of(model, batches[0]))
    assert len(seen) >= 1 and not torch.equal(seen[-1], model[0].weight)


def test_dropout_and_batch_statistics_are_replayed():
    model, x = Faulty(), torch.randn(6, 3)
    report = TwoPass(model, "sam", 1e-30).step(faulty_run(model, x))
    assert report.loss == report.ascent_loss
    assert model.net[1].num_batches_tracked == 1


def test_without_replay_the_second_pass_draws_its_own_dropout():
    model, x = Faulty(), torch.randn(64, 3)
    assert (r := TwoPass(model, "sam", 1e-30, replay_rng=False).step(faulty_run(model, x))).loss != r.ascent_loss


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, 3.5e38, "0.1", True])
def test_a_bad_radius_is_refused(rho):
    with pytest.raises(ValueError, match=r"rho: .* choose a finite number from 0"):
        TwoPass(nn.Linear(2, 2), "ssam", rho)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "ssma"}, "there is no method `ssma`; choose one of ssam, "),
        ({"alpha": 1}, "method `ssam` has no option `alpha`; its options are"),
        ({"max_scale": 0}, "max_scale=0 is not allowed for method `ssam`; choose a number above 0"),
        ({"scope": "local"}, "ascent_scope: `local` does not exist; choose one of global, rank, micro_batch"),
        ({"perturb": "head"}, "perturb: `head` selects no trainable parameter"),
        ({"perturb": "("}, r"perturb: `\(` is not a regular expression"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TwoPass(nn.Linear(2, 2), **kwargs)


def test_an_empty_list_of_passes_is_refused():
    with pytest.raises(ValueError, match="run_pass: got an empty list"):
        TwoPass(nn.Linear(2, 2)).step([])


def test_state_of_other_parameters_is_refused():
    engine = TwoPass(nn.Linear(2, 2))
    state = {**engine.state_dict(), "memory": {"m": {"head.weight": torch.zeros(2)}}}
    with pytest.raises(ValueError, match="vectors for `head.weight`"):
        engine.load_state_dict(state)


def test_a_chain_of_no_rules_hands_on_the_same_object():
    at = StepContext(None, {}, {}, torch.zeros(()), 0.1)
    v = {"a": torch.ones(1)}
    assert chain()(v, at) is v


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="`0` has sparse gradients.* sparse=False"):
        TwoPass(nn.Sequential(nn.Embedding(4, 2, sparse=True)))


def test_what_was_unfrozen_after_the_engine_was_built_is_refused():
    model, batches = regression()
    model[0].requires_grad_(False)
    engine = TwoPass(model, "sam", 0.1)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="model: `0.bias` requires a gradient and did not when"):
        engine.step(backward_of(model, batches[0]))
    TwoPass(model, "sam", 0.1).step(backward_of(model, batches[0]))


@pytest.mark.parametrize("name", ["dataset_size", "total_steps"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_a_size_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: {value} is not allowed; choose an integer from 1"):
        TwoPass(regression()[0], **{name: value})


def test_phases_out_of_order_say_so():
    model, batches = regression()
    engine = TwoPass(model, "sam", 0.1)
    for phase in (engine.finish, lambda: engine.first_pass(backward_of(model, batches[0]))):
        with pytest.raises(RuntimeError, match="no step has begun; call begin first"):
            phase()
    engine.begin()
    with pytest.raises(RuntimeError, match="finish: no step has begun; .* first_pass for each micro-batch"):
        engine.finish()


def test_a_step_that_was_given_up_is_forgotten():
    model, batches = regression()
    engine = TwoPass(model, "friendly_sam", 0.1, scope="micro_batch")
    engine.begin()
    engine.first_pass(backward_of(model, batches[0]))
    assert engine.state_dict()["memory"]
    model.zero_grad()
    engine.begin()
    assert engine.state_dict()["memory"] == {}


def test_a_radius_may_be_any_real_number():
    assert TwoPass(regression()[0], rho=np.float32(0.5)).rho == 0.5


def test_a_vector_of_another_shape_is_refused():
    model, batches = regression()
    engine = TwoPass(model, "friendly_sam", 0.1)
    engine.step(backward_of(model, batches[0]))
    state = engine.state_dict()
    state["memory"]["average"] = {n: t.flatten()[:1] for n, t in state["memory"]["average"].items()}
    with pytest.raises(ValueError, match="state: its vector for `0.weight` has shape .1,. and the parameter"):
        TwoPass(regression()[0], "friendly_sam", 0.1).load_state_dict(state)
