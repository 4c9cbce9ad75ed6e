"""ρ as a rise of the loss: exact on a linear loss, with every ascent, under every scope."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import SSAMTrainingArguments, TwoPass, get_method
from tests.engine.test_two_pass import backward_of, loss_of, regression
from tests.support.cases import CASES, ONE_PASS_CASES, Case, arguments, bert, case_arguments, text_data, trained
from tests.support.reference import flat, gradient_of


class Linear(nn.Module):
    """A loss that is linear in the weights: ⟨c, w⟩ + 3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(4, 3).double()), nn.Parameter(torch.randn(5).double())
        self.c, self.d = torch.randn(4, 3).double(), torch.randn(5).double()

    def forward(self) -> Tensor:
        return (self.w * self.c).sum() + (self.v * self.d).sum() + 3.0


def stepped(model: nn.Module, engine: TwoPass):
    def run() -> Tensor:
        loss = model()
        loss.backward()
        return loss

    return engine.step(run)


ASCENTS = [("sam", {}), ("usam", {}), ("asam", {}), ("ssam", {"renormalize": True}), ("vasso", {}), ("gsam", {})]


@pytest.mark.parametrize(("method", "options"), ASCENTS, ids=[m for m, _ in ASCENTS])
def test_a_linear_loss_rises_by_rho_exactly(method: str, options: dict):
    for unit, rise in (("loss", 0.2), ("relative_loss", 0.2 * abs(Linear()().item()))):
        model = Linear()
        report = stepped(model, TwoPass(model, method, 0.2, rho_unit=unit, rho_max=100.0, **options))
        torch.testing.assert_close((report.ascent_loss - report.loss).item(), rise, rtol=1e-9, atol=1e-12)


def test_sams_radius_is_sigma_over_the_norm_of_the_gradient():
    """LE-SAM: ρ_t = min(σ/‖g‖, ρ_max), and d is the gradient there."""
    model, batches = regression()
    for sigma, longest in ((0.1, 0.3), (50.0, 0.3)):
        engine = TwoPass(model, "sam", sigma, rho_unit="loss", rho_max=longest)
        report = engine.step(backward_of(model, batches[0]))
        found = flat(p.grad for p in model.parameters())
        model.zero_grad()
        other, _ = regression()
        gradient = gradient_of(other, lambda other=other: loss_of(other, batches[0]))
        w = flat(model.parameters())
        g = gradient(w)
        radius = min(sigma / g.norm().item(), longest)
        assert report.perturbation_norm.item() == pytest.approx(radius, rel=1e-9)
        torch.testing.assert_close(found, gradient(w + radius * g / g.norm()), rtol=1e-9, atol=1e-12)


def test_a_vanishing_gradient_moves_nothing_beyond_rho_max():
    model = Linear()
    model.c, model.d = model.c * 1e-20, model.d * 1e-20
    report = stepped(model, TwoPass(model, "sam", 0.2, rho_unit="loss", rho_max=0.3))
    assert report.perturbation_norm <= 0.3 * (1 + 1e-9)
    model.zero_grad()
    model.c, model.d = model.c * 0, model.d * 0
    report = stepped(model, TwoPass(model, "sam", 0.2, rho_unit="loss"))
    assert report.perturbation_norm == 0 and not report.skipped


def test_a_micro_batch_takes_the_share_of_its_own_loss():
    """Under `micro_batch` each ascends as if it were alone: the same rise as with its mean loss."""
    model, batches = regression()
    alone = TwoPass(model, "sam", 0.1, rho_unit="relative_loss", rho_max=9.0).step(backward_of(model, batches[0]))
    model.zero_grad()

    def halved() -> Tensor:
        loss = loss_of(model, batches[0]) / 2
        loss.backward()
        return loss

    engine = TwoPass(model, "sam", 0.1, scope="micro_batch", rho_unit="relative_loss", rho_max=9.0)
    together = engine.step([halved, halved])
    torch.testing.assert_close(together.perturbation_norm, alone.perturbation_norm, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if not c.options], ids=lambda c: c.id)
def test_every_ascending_method_takes_the_unit(case: Case):
    model, batches = regression()
    report = TwoPass(model, case.method, 0.05, rho_unit="relative_loss").step(backward_of(model, batches[0]))
    assert 0 < report.perturbation_norm <= 0.3 * (1 + 1e-9)


@pytest.mark.parametrize("unit", ["loss", "relative_loss"])
def test_the_trainer_takes_the_unit_with_a_schedule(unit: str):
    given = {"max_steps": 3, "rho_unit": unit, "rho_max": 5.0, "rho_scheduler_type": "linear", "learning_rate": 0.0}
    trainer = trained(bert(0.0), case_arguments(Case("sam", rho=0.01), **given), text_data())
    entries = [e for e in trainer.state.log_history if "ssam/loss" in e]
    for step, entry in enumerate(entries):
        rise = 0.01 * (1 - step / 3) * (entry["ssam/loss"] if unit == "relative_loss" else 1.0)
        assert entry["ssam/perturbation_norm"] * entry["ssam/grad_norm"] == pytest.approx(rise, rel=1e-4)


@pytest.mark.parametrize("case", [c for c in ONE_PASS_CASES if not c.options], ids=lambda c: c.id)
def test_a_method_that_takes_no_ascent_gradient_refuses_it(case: Case):
    said = f"rho_unit: `loss` bounds an ascent along the gradient, which method `{case.method}` does not take; leave"
    with pytest.raises(ValueError, match=said):
        get_method(case.method, rho_unit="loss")
    with pytest.raises(ValueError, match=said):
        arguments(optim=case.method, rho_unit="loss")


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="rho_unit: `nats` does not exist; choose one of weight, loss, relative_loss"):
        get_method("sam", rho_unit="nats")
    with pytest.raises(ValueError, match="rho_max: -1 is not allowed; choose a number above 0, such as 0.3"):
        get_method("sam", rho_unit="loss", rho_max=-1)
    with pytest.raises(ValueError, match="rho_max: inf is not allowed"):
        SSAMTrainingArguments(output_dir="x", use_cpu=True, rho_unit="loss", rho_max=float("inf"))


def test_the_default_radius_is_the_units():
    assert (get_method("sam").rho, get_method("sam", rho_unit="loss").rho) == (0.05, 0.35)
