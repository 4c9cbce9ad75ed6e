"""Adapters, frozen backbones and quantised bases: only what trains is perturbed, measured and remembered."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ssam import TwoPass
from hf_ssam.engine.passes import Displacement
from tests.support.cases import (
    MAIN_CASES,
    Case,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    each_case,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*its loss ignores it")
TINY = 1e-30


def adapted(dora: bool = False, dropout: float = 0.0) -> nn.Module:
    """A LoRA or DoRA adapter over the GPT-2, B zero as it begins."""
    model = gpt2()
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["c_attn"], use_dora=dora, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def frozen() -> nn.Module:
    """A backbone that does not train under a head that does."""
    model = bert()
    model.bert.requires_grad_(False)
    return model


KINDS = {
    "lora": (adapted, lm_data, lambda n: "lora_" in n),
    "dora": (lambda: adapted(dora=True), lm_data, lambda n: "lora_" in n),
    "frozen": (frozen, text_data, lambda n: n.startswith("classifier")),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def perturbed(model: nn.Module, data: list, case: Case, **more) -> tuple[dict[str, torch.Tensor], object]:
    """w + e − w as the second pass finds it, by name, and the report."""
    inputs = {k: torch.stack([row[k] for row in data[:8]]) for k in data[0]}
    found = []

    def run():
        found.append(weights(model))
        loss = model(**inputs).loss
        loss.backward()
        return loss

    report = TwoPass(model, case.method, case.rho, **case.options, **more).step(run)
    return {n: found[1][n] - found[0][n] for n, _ in model.named_parameters()}, report


@each_case
@pytest.mark.few_methods
@each_kind
def test_only_what_trains_is_perturbed(case: Case, kind: str):
    build, data, trains = KINDS[kind]
    model = build()
    e, report = perturbed(model, data(), case)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in e if trains(n)}
    assert {n for n, t in e.items() if t.abs().sum() > 0} <= {n for n in e if trains(n)}
    total = torch.cat([t.reshape(-1) for t in e.values()]).double().norm()
    # Look-LayerSAM's radius in a layer is the length of its weights: LoRA's B, zero at first, stays for one step.
    assert total > 0 or (case.method, kind) == ("look_layersam", "lora")
    torch.testing.assert_close(total, report.perturbation_norm.double(), rtol=1e-4, atol=0)


@each_kind
def test_only_what_trains_is_remembered(kind: str, monkeypatch):
    """The second pass costs another memory for the adapter, not for the model."""
    build, data, trains = KINDS[kind]
    model, sizes = build(), []

    choose = Displacement._way

    def counted(self, *given):
        way = choose(self, *given)
        sizes.append(sum(t.numel() for t in way.before))
        return way

    monkeypatch.setattr(Displacement, "_way", counted)
    perturbed(model, data(), Case("sam"))
    assert sizes == [sum(p.numel() for n, p in model.named_parameters() if trains(n))]
    assert sizes[0] < 0.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.few_methods
@each_kind
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_the_trainer_leaves_the_base_alone(case: Case, kind: str):
    build, data, trains = KINDS[kind]
    before = weights(build())
    after = weights(trained(build(), case_arguments(case), data()).model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(trains(n) for n in moved)


@each_kind
def test_without_a_perturbation_it_is_the_stock_trainer(kind: str):
    build, data, _ = KINDS[kind]
    stock = trained(build(), arguments(TrainingArguments, optim="sgd"), data(), cls=Trainer)
    ours = trained(build(), case_arguments(Case("sam", rho=TINY)), data())
    assert_identical(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize("eta, moves", [(0.01, True), (0.0, False)])
def test_eta_lets_asam_move_the_zero_matrix_of_lora(eta: float, moves: bool):
    """B begins at 0 and A has no gradient while it is: with T = |w| alone nothing could move at all."""
    e, report = perturbed(adapted(), lm_data(), Case("asam", {"eta": eta}, rho=0.5))
    b = torch.cat([t.reshape(-1) for n, t in e.items() if "lora_B" in n])
    assert bool(b.abs().sum() > 0) == moves
    if moves:  # every entry of T is η there, so u = η g / ‖g‖ and ‖e‖ = ρ η
        assert float(b.norm()) == pytest.approx(0.5 * eta, rel=1e-4)


def test_lora_dropout_is_that_of_the_first_pass():
    trainer = trained(adapted(dropout=0.3), case_arguments(Case("sam", rho=TINY)), lm_data())
    entries = [e for e in trainer.state.log_history if "ssam/loss" in e]
    assert entries and all(e["ssam/loss"] == e["ssam/ascent_loss"] for e in entries)


def test_a_pattern_chooses_among_the_adapters_parts():
    e, report = perturbed(adapted(), lm_data(), Case("sam", rho=0.3), perturb="lora_B")
    assert {n for n, t in e.items() if t.abs().sum() > 0} == {n for n in e if "lora_B" in n}
    assert float(report.perturbation_norm) == pytest.approx(0.3, rel=1e-5)


def test_an_adapter_in_float32_over_a_bf16_base_is_not_warned_of(recwarn):
    model = adapted()
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(torch.bfloat16)
    trained(model, case_arguments(Case("ssam", rho=1e-3), bf16=True, max_steps=1), lm_data())
    assert not [w for w in recwarn if "below what" in str(w.message)]
