"""ρ at which a method's ascent raises the loss by a tenth: closed forms, and a model that is left as it was."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from hf_ssam import METHODS, TwoPass
from hf_ssam.engine.radius import crossing
from hf_ssam.sharpness import suggest_rho
from tests.support.cases import CASES, Case, assert_identical, bert, image_data, resnet, text_data, weights


class Function(nn.Module):
    """A loss of one weight vector, by name; the batch only says which."""

    def __init__(self, loss, size: int = 4, at: float = 0.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), at, dtype=torch.float64))
        self.loss = loss

    def forward(self, x):
        return {"loss": self.loss(self.w, x)}


def of(model, batch):
    return model(**batch)["loss"]


def linear(w, x):
    """`L = 2 + ⟨x, w⟩`: an ascent of length ρ raises it by `ρ ‖x‖`."""
    return 2 + x.mean(0).double() @ w


BATCHES = [{"x": torch.tensor([[3.0, 4.0, 0.0, 0.0]]) * k} for k in (1, 2, 4)]


def test_suggestion_for_a_linear_loss_is_the_target_over_the_norm_of_its_gradient():
    found = suggest_rho(Function(linear), BATCHES, "sam", loss=of)
    each = [0.1 * 2 / (5 * k) for k in (1, 2, 4)]
    assert (found.low, found.high) == pytest.approx((each[2], each[0]), rel=1e-5)
    assert found.rho == float(f"{each[1]:.2g}") and found.method == "sam" and found.losses == pytest.approx([2.0] * 3)
    for rho, rises in found.rises.items():
        assert rises == pytest.approx([rho * 5 * k / 2 for k in (1, 2, 4)], rel=1e-5)


def test_suggestion_for_an_unnormalised_ascent_is_in_its_own_units():
    """`e = ρ g` raises a linear loss by `ρ ‖g‖²`."""
    found = suggest_rho(Function(linear), BATCHES[:1], "usam", loss=of)
    assert found.rho == pytest.approx(0.1 * 2 / 25, rel=1e-2)
    with_option = suggest_rho(Function(linear), BATCHES[:1], "ssam", loss=of, normalize=False)
    assert with_option.rises == found.rises


def test_suggestion_for_a_quadratic_loss_solves_its_equation():
    """`L = ½ Σ λ w²` at w = 1 rises by `ρ ‖g‖ + ½ ρ² gᵀHg/‖g‖²` = t L."""
    values = torch.tensor([9.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    model = Function(lambda w, x: 0.5 * (values * w**2).sum(), at=1.0)
    norm, bend = values.norm().item(), ((values**3).sum() / (values**2).sum()).item()
    loss = 0.5 * values.sum().item()
    for target in (0.05, 0.1, 0.2, 1.0):
        exact = (-norm + math.sqrt(norm**2 + 2 * bend * target * loss)) / bend
        found = suggest_rho(model, {"x": torch.zeros(1, 4)}, "sam", loss=of, target=target)
        assert found.low == pytest.approx(exact, rel=0.01) and found.rho == float(f"{found.low:.2g}")


def test_suggestion_begins_anywhere():
    model = Function(linear)
    found = {start: suggest_rho(model, BATCHES, "sam", loss=of, start=start).rho for start in (None, 1e-6, 0.02, 1e4)}
    assert len(set(found.values())) == 1


def test_suggestion_after_plain_training_is_that_of_the_trained_model():
    """`L = ½ w²` under SGD with η = 1/2: w halves in a step, L falls to a quarter, and r = ρ/(w/2) to first order."""

    def loss(model, batch):
        return 0.5 * (model.w**2).sum()

    model, half = Function(None, size=1, at=1.0), partial(torch.optim.SGD, lr=0.5)
    fresh = suggest_rho(model, BATCHES[:1], "sam", loss=loss)
    trained = suggest_rho(model, BATCHES[:1], "sam", loss=loss, optimizer=half)
    assert model.w.item() == 1.0 and model.w.grad is None
    assert trained.plain_steps == 3 and trained.losses[0] == pytest.approx(fresh.losses[0] / 64)
    assert trained.low == pytest.approx(fresh.low / 8, rel=1e-3)
    assert fresh.low == pytest.approx(math.sqrt(1.1) - 1, rel=0.01)
    slow = suggest_rho(model, BATCHES, "sam", loss=loss, optimizer=partial(torch.optim.SGD, lr=1e-6))
    assert slow.plain_steps == 12 * 3 and slow.low == pytest.approx(fresh.low, rel=1e-3)


def collated(rows, size=8):
    return [default_data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, Case("esam"), Case("ausam"), Case("sparse_sam"), Case("adasam")], ids=str)
def test_suggestion_measures_the_ascent_of_every_method(case):
    """The rise at a ρ of the grid is that of a step of the engine, and at the ρ suggested it is about the target."""
    model, batches = bert(0.0), collated(text_data(24))
    found = suggest_rho(model, batches, case.method, **case.options)
    assert all(len(rises) == 3 for rises in found.rises.values())
    rises = [rise for row in found.rises.values() for rise in row]
    assert min(rises) < 0.1 < max(rises)
    if METHODS[case.method].passes == "2":
        engine = TwoPass(model.train(), case.method, found.rho, **case.options)
        steps = []
        for batch in batches:

            def run(batch=batch):
                loss = model(**batch).loss
                loss.backward()
                return loss

            steps.append(engine.step(run))
            model.zero_grad()
        risen = [((s.ascent_loss - s.loss) / s.loss).item() for s in steps]
        assert min(risen) < 0.13 and max(risen) > 0.08


@pytest.mark.parametrize(("build", "data"), [(bert, text_data), (resnet, image_data)], ids=["dropout", "BatchNorm"])
def test_suggestion_leaves_the_model_as_it_was_to_the_bit(build, data):
    model = build()
    model.train()
    model(**default_data_collator(data(4))).loss.backward()
    next(iter(model.children())).eval()
    before, grads = weights(model), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    suggest_rho(model, collated(data(16)))
    assert_identical(before, weights(model))
    assert_identical(grads, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())


def test_suggestion_leaves_the_model_as_it_was_when_it_fails():
    model = bert().eval()
    before = weights(model)

    def fails(model, batch):
        if (model.classifier.weight != before["classifier.weight"]).any():
            raise KeyboardInterrupt
        return model(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        suggest_rho(model, collated(text_data(8)), loss=fails)
    assert_identical(before, weights(model))
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"method": "momentum_sam"}, "method: `momentum_sam` takes no second pass"),
        ({"target": 0.0}, "target: 0.0 is not allowed"),
        ({"batches": []}, "batches: there is none"),
        ({"loss": lambda m, b: of(m, b) - 3}, "their loss is -1"),
        ({"loss": lambda m, b: 2 + 0 * of(m, b)}, "no radius raises the loss by 10%"),
    ],
)
def test_suggestion_that_cannot_be_made_is_refused_in_one_sentence(call, sentence):
    given = {"batches": BATCHES, "method": "sam", "loss": of, **call}
    with pytest.raises(ValueError) as error:
        suggest_rho(Function(linear), **given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ([0.05, 0.1, 0.2], 2.0),
        ([0.2, 0.4, 0.8], 0.5),
        ([0.01, 0.02, 0.04], 10.0),
        ([0.05, 0.2, 0.8], math.sqrt(2)),
        ([-0.1, 0.2, math.inf], 1.0),
        ([0.05, math.inf, math.inf], 1.0),
        ([-0.1, -0.2, -0.3], math.inf),
    ],
)
def test_crossing_is_between_the_radii_by_powers_and_outside_in_proportion(rises, expected):
    assert crossing([1.0, 2.0, 4.0], rises, 0.1) == pytest.approx(expected)
