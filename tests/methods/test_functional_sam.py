"""Functional SAM: the first pass's gradient at the logits, through the Jacobian at w + e."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import SSAMTrainer, TwoPass
from tests.engine.test_two_pass import backward_of, regression
from tests.support.cases import Case, arguments, bert, case_arguments, gpt2, lm_data, text_data, trained, weights
from tests.support.reference import flat, load


def gradient(model: nn.Module) -> Tensor:
    return flat(p.grad for p in model.parameters())


def test_a_jacobian_that_is_constant_gives_back_the_plain_gradient():
    """A linear model with a squared loss: SAM's second gradient differs from g, functional SAM's does not."""
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2).double(), regression()[1][0]
    found = {}
    for method, rho in (("sam", 0.0), ("sam", 0.5), ("functional_sam", 0.5)):
        TwoPass(model, method, rho).step(backward_of(model, batch))
        found[method, rho] = gradient(model)
        model.zero_grad()
    torch.testing.assert_close(found["functional_sam", 0.5], found["sam", 0.0], rtol=1e-13, atol=1e-15)
    assert (found["sam", 0.5] - found["sam", 0.0]).norm() > 0.1


class WithAuxiliary(nn.Module):
    """Logits, and a loss that does not go through them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).tanh()
        return {"logits": self.head(hidden), "auxiliary": hidden.square().mean()}


def test_a_loss_beside_the_logits_is_differentiated_where_sam_does():
    model, (x, y) = WithAuxiliary(), regression()[1][0]

    def loss() -> Tensor:
        out = model(x)
        return nn.functional.mse_loss(out["logits"], y) + out["auxiliary"]

    def run() -> Tensor:
        value = loss()
        value.backward()
        return value

    w = flat(model.parameters())
    TwoPass(model, "functional_sam", 0.3).step(run)
    found, params = gradient(model), list(model.parameters())
    g = flat(torch.autograd.grad(loss(), params))
    derivative = 2 * (model(x)["logits"] - y).detach() / y.numel()
    load(model, w + 0.3 * g / g.norm())
    out = model(x)
    expected = flat(torch.autograd.grad((out["logits"] * derivative).sum() + out["auxiliary"], params))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_micro_batches_keep_their_own():
    """Two halves as micro-batches of one step are the whole batch (law 4)."""
    model, (x, y) = regression()[0], regression()[1][0]
    engine = TwoPass(model, "functional_sam", 0.3)
    engine.step(backward_of(model, (x, y)))
    whole = gradient(model)
    model.zero_grad()

    def half(rows: slice):
        def run() -> Tensor:
            loss = nn.functional.mse_loss(model(x[rows]), y[rows]) / 2
            loss.backward()
            return loss

        return run

    engine.step([half(slice(0, 3)), half(slice(3, 6))])
    torch.testing.assert_close(gradient(model), whole, rtol=1e-11, atol=1e-14)


@pytest.mark.quick("gpt2")
@pytest.mark.parametrize("model, data", [(bert, text_data), (gpt2, lm_data)], ids=["bert", "gpt2"])
def test_autocast_exchanges_the_gradient_that_the_loss_has_used(model, data):
    """Accelerate hands on a float32 copy of the logits; the run is near the float32 one, which is not SAM's."""

    def run(method: str, bf16: bool) -> Tensor:
        args = case_arguments(Case(method, rho=0.5), max_steps=3, bf16=bf16)
        return flat(trained(model(0.0), args, data()).model.parameters())

    exact = run("functional_sam", False)
    assert (run("functional_sam", True) - exact).norm() < 0.3 * (run("sam", False) - exact).norm()


def test_a_perturbation_too_small_to_matter_is_the_plain_gradient_bit_for_bit():
    ends = [
        weights(trained(bert(), arguments(optim=method, rho=rho, base_optim="sgd"), text_data()).model)
        for method, rho in (("functional_sam", 1e-30), ("sam", 0.0))
    ]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


class Nameless(nn.Module):
    """Returns no logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(scores=self.layer(x))


def test_an_output_without_logits_is_refused_before_a_weight_is_moved():
    model, (x, y) = Nameless(), regression()[1][0]

    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(x).scores, y)
        loss.backward()
        return loss

    said = "the output of Nameless has no `logits`, whose gradient functional_sam keeps; let its forward return them"
    with pytest.raises(ValueError, match=said):
        TwoPass(model, "functional_sam", 0.1).step(run)


def test_logits_that_the_loss_does_not_use_are_refused():
    model, (x, _) = WithAuxiliary(), regression()[1][0]

    def run() -> Tensor:
        loss = model(x)["auxiliary"]
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="no gradient came to the `logits` of WithAuxiliary"):
        TwoPass(model, "functional_sam", 0.1).step(run)


def test_without_a_radius_no_logits_are_asked_for():
    model = Nameless()
    x, y = regression()[1][0]

    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(x).scores, y)
        loss.backward()
        return loss

    assert TwoPass(model, "functional_sam", 0.0).step(run).passes == 1


def test_the_trainer_runs_it_over_a_causal_model():
    trainer = trained(gpt2(), case_arguments(Case("functional_sam"), max_steps=2), lm_data(), cls=SSAMTrainer)
    assert trainer.state.log_history[-1]["ssam/total_passes"] == 4
