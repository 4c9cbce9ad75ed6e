"""What methods keep from step to step, where a step was not finite, a parameter came later or a sample came twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass, get_method
from hf_ssam.methods.looksam import layerwise
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.space import ParameterSpace
from tests.engine.test_selection import Classifier, data
from tests.engine.test_selection import backward_of as selecting
from tests.engine.test_two_pass import backward_of, loss_of, regression
from tests.rules.test_masks import indexed_backward
from tests.support import reference
from tests.support.cases import CASES, ONE_PASS_CASES

KEEPING = [c for c in (*CASES, *ONE_PASS_CASES) if get_method(c.method, **c.options).build().stateful]


@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("order", ["code", "paper"])
def test_friendly_sam_takes_nothing_out_before_there_is_an_average(order, sigma):
    """The first step overflows, so at the second nothing is averaged yet: it perturbs along g, as SAM does."""
    model, batches = regression()
    engine = TwoPass(model, "friendly_sam", 0.2, ema_order=order, sigma=sigma)
    assert engine.step(backward_of(model, (batches[0][0] * torch.inf, batches[0][1]))).skipped
    model.zero_grad()
    report = engine.step(backward_of(model, batches[1]))
    model.zero_grad()
    expected = TwoPass(model, "sam", 0.2).step(backward_of(model, batches[1]))
    for name in ("perturbation_norm", "ascent_loss", "ascent_grad_norm"):
        torch.testing.assert_close(getattr(report, name), getattr(expected, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("perturb", ["all", r"^2\.", "bias"])
def test_momentum_sam_looks_ahead_in_the_perturbed_weights_alone(perturb):
    """Three steps by hand: w − ρ m/‖m‖ with m, and its norm, over the parameters that `perturb` names."""
    model, batches = regression()
    names = [n for n, _ in model.named_parameters()]
    moves = reference.flat(
        torch.full_like(p, float(perturb == "all" or perturb.strip("^\\.") in n)) for n, p in model.named_parameters()
    )
    w, m = reference.flat(model.parameters()), torch.zeros(int(moves.numel())).double()
    engine = TwoPass(model, "momentum_sam", 0.3, momentum=0.8, perturb=perturb)
    assert set(engine.perturbed) == {n for n in names if perturb == "all" or perturb.strip("^\\.") in n}
    for batch in batches[:3]:
        ahead = w - 0.3 * moves * m / ((moves * m).norm() + 1e-12)
        g = reference.gradient_of(model, lambda b=batch: loss_of(model, b))(ahead)
        m = 0.8 * m + g
        reference.load(model, w)
        model.zero_grad()
        engine.step(backward_of(model, batch))
        torch.testing.assert_close(reference.flat(p.grad for p in model.parameters()), g, rtol=1e-11, atol=1e-14)


def test_momentum_sam_starts_the_momentum_of_a_parameter_that_comes_later():
    """A head that the first batch did not use has no momentum at the second, and its own at the third."""
    torch.manual_seed(0)
    common, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    model, seen = nn.ModuleDict({"common": common, "head": head}), []
    x, y = regression()[1][0]

    def run(uses_head: bool):
        def forward_backward() -> Tensor:
            seen.append(head.weight.detach().clone())
            hidden = common(x)
            loss = (nn.functional.mse_loss(head(hidden), y) if uses_head else hidden.square().mean()) * 1.0
            loss.backward()
            return loss

        return forward_backward

    engine = TwoPass(model, "momentum_sam", 0.3)
    for uses_head in (False, True, True):
        model.zero_grad()
        engine.step(run(uses_head))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], head.weight)
    assert not torch.equal(seen[2], head.weight)


@pytest.mark.parametrize("case", KEEPING, ids=lambda case: case.id)
def test_what_is_kept_goes_by_name_where_the_first_parameter_comes_later(case):
    """Twice the same run, with the parameter that is used from the second step on named first, and named last."""

    def run(names: tuple[str, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        layers = {"early": nn.Linear(3, 3).double(), "late": nn.Linear(3, 3).double()}
        model = nn.ModuleDict({n: layers[n] for n in names})
        x, found = regression()[1][0][0], []

        def backward_through(used: tuple[str, ...]) -> Callable[..., Tensor]:
            def forward_backward(indices: Any = slice(None)) -> Tensor:
                loss = sum(len(n) * layers[n](x[indices]) for n in used).square().mean()  # unequal gradients
                loss.backward()
                return loss

            return forward_backward

        engine = TwoPass(model, case.method, 0.3, total_steps=9, **case.options)
        for used in (("early",), ("early", "late"), ("early", "late"), ("early", "late")):
            model.zero_grad()
            engine.step(backward_through(used))
            found += [p.grad.clone() for n in ("early", "late") for p in layers[n].parameters() if p.grad is not None]
        return found

    for one, other in zip(run(("early", "late")), run(("late", "early")), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["momentum_sam", "stale_sam"])
def test_what_is_kept_is_no_ones_gradient(method):
    """Zeroed or clipped in place after the step, as some loops do, the gradient that was kept stays what it was."""

    def run(in_place: bool) -> Tensor:
        model, batches = regression()
        engine = TwoPass(model, method, 0.3)
        for batch in batches[:3]:
            model.zero_grad(set_to_none=not in_place)
            engine.step(backward_of(model, batch))
            kept = reference.flat(p.grad for p in model.parameters())
            if in_place:
                for p in model.parameters():
                    p.grad.zero_()
        return kept

    assert torch.equal(run(True), run(False))


class Growing(nn.Module):
    """Uses its second layer from the second batch on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.batches = nn.Linear(3, 2), nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.second(x) if self.batches else 0.0)


def test_a_mask_is_made_anew_for_a_parameter_that_comes_later():
    model, batches = Growing().double(), regression()[1]
    seen: list[Tensor] = []
    model.second.register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    engine = TwoPass(model, "sparse_sam", 0.5, mask="dynamic", sparsity=0.5, update_freq=100)
    for batch in batches[:2]:
        engine.step(indexed_backward(model, batch))
        model.zero_grad()
        model.batches += 1
    mask = engine.state_dict()["memory"]["mask"]
    assert set(mask) == {n for n, _ in model.named_parameters()}
    assert sum(int(m.sum()) for m in mask.values()) == 8  # half of 16 coordinates
    torch.testing.assert_close(seen[1] != seen[0], mask["second.weight"])


def test_a_sample_drawn_twice_in_a_step_counts_twice():
    """The same draw of four, once under eight ids and once under one: its mean is that of the four rises."""

    def scores(ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        model = Classifier()
        engine = TwoPass(
            model, "ausam", 0.1, alpha=0.5, s_min=1.0, dataset_size=8
        )  # equal weights: ids change no draw
        for batch in data()[:steps]:
            engine.step(selecting(model, batch), samples=ids)
            model.zero_grad()
        kept = engine.state_dict()["memory"]["plain"]
        return kept["samples.mean"], kept["samples.count"]

    for steps in (1, 3):
        each, counts = scores(torch.arange(8), steps)
        together, count = scores(torch.full((8,), 5), steps)
        assert counts.sum() == count[5] == 4 * steps and count.sum() == count[5]
        torch.testing.assert_close(together[5], (each * counts).sum() / counts.sum())
        halves, by_half = scores(torch.arange(8) // 4, steps)
        torch.testing.assert_close((halves * by_half).sum(), (each * counts).sum())
        torch.testing.assert_close(by_half[:2], counts.view(2, 4).sum(1))


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-13, 1e-12, 1.0])
def test_a_layer_with_a_vanishing_gradient_is_perturbed_less(norm):
    """`‖v‖ / (‖v‖ + 1e-12)`, as everywhere: what is below rounding has no direction; a zero stays a zero."""
    v = {"a": norm * torch.tensor([0.6, 0.8], dtype=torch.float64), "b": torch.ones(3).double()}
    params = {n: nn.Parameter(torch.zeros_like(t)) for n, t in v.items()}
    context = StepContext(ParameterSpace(params), {}, {}, torch.zeros(()), 0.1)
    u = layerwise(by_weight=False)(v, context)
    assert u["a"].norm().item() == pytest.approx(norm / (norm + 1e-12), rel=1e-12)
    assert u["b"].norm().item() == pytest.approx(1.0)
