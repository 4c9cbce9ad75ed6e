"""The methods on LoRA against float64 loops on whole matrices, and what they must leave as it was."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.methods import flat_lora as flat_lora_module
from hf_ssam.methods.bi_lora import product_square
from hf_ssam.methods.flat_lora import merged_row_norms, noisy
from hf_ssam.rules.tensors import Workspace
from tests.support.cases import ADAPTER_CASES, Case, assert_identical, weights
from tests.support.reference_adapters import Factors, balanced, bi_lora, flat_lora

LR, STEPS, SCALE = 0.05, 10, 1.5
each_case = pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda c: c.id)


def network(**config) -> nn.Module:
    """A float64 network of two linear layers with LoRA of rank 2, whose B is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], **config))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 6).double(), torch.randn(8, 3).double()) for _ in range(steps)]


def engine_for(model: nn.Module, case: Case, rho: float | None = None, steps: int | None = STEPS) -> TwoPass:
    engine = TwoPass(model, case.method, case.rho if rho is None else rho, total_steps=steps, **case.options)
    engine.clock.lr = LR
    return engine


def backward_of(model: nn.Module, batch: tuple[Tensor, Tensor], share: float = 1.0):
    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1]) * share
        loss.backward()
        return loss

    return run


def trained(model: nn.Module, engine: TwoPass, given: list) -> list:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    reports = []
    for batch in given:
        reports.append(engine.step(backward_of(model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return reports


def factors_of(model: nn.Module) -> Factors:
    named = {n: p.detach().clone() for n, p in model.named_parameters()}

    def those(part: str) -> list[Tensor]:
        return [t for n, t in named.items() if part in n and n.endswith("weight")]

    return Factors(those("base_layer"), those("lora_A"), those("lora_B"), SCALE)


def losses_of(model: nn.Module, given: list) -> list:
    biases = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.bias")]

    def loss(x: Tensor, y: Tensor, w: list[Tensor]) -> Tensor:
        hidden = torch.tanh(x @ w[0].T + biases[0])
        return nn.functional.mse_loss(hidden @ w[1].T + biases[1], y)

    return [lambda w, x=x, y=y: loss(x, y, w) for x, y in given]


def expected(case: Case) -> Factors:
    model = network()
    start, losses = factors_of(model), losses_of(model, batches())
    if case.method == "flat_lora":
        return flat_lora(start, losses, case.rho, LR, **case.options)
    if case.method == "bi_lora":
        return bi_lora(start, losses, case.rho, LR, **case.options)[0]
    return balanced(start, losses, case.rho, LR, by_gradient=case.method == "nbar")


@each_case
def test_a_trajectory_is_its_slow_references(case: Case):
    model, plain = network(), network()
    reports = trained(model, engine_for(model, case), batches())
    found, reference = factors_of(model), expected(case)
    for ours, theirs in zip((*found.a, *found.b), (*reference.a, *reference.b), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    trained(plain, engine_for(plain, case, 0.0), batches())
    gap = max((x - y).abs().max() for x, y in zip(found.b, factors_of(plain).b, strict=True))
    assert gap > 1e-4, "the method must matter, or this test could not tell it from plain LoRA"
    assert {r.passes for r in reports} == {1.0} and not any(r.skipped for r in reports)


@each_case
def test_base_weights_keep_their_bits_and_without_a_radius_it_is_plain_lora(case: Case):
    model, plain = network(), network()
    before = {n: t for n, t in weights(model).items() if "base_layer" in n}
    trained(model, engine_for(model, case), batches())
    assert_identical(before, {n: t for n, t in weights(model).items() if "base_layer" in n})
    model = network()
    engine = engine_for(model, case, 0.0)
    trained(model, engine, batches())
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=LR)
    for batch in batches():
        backward_of(plain, batch)()
        optimizer.step()
        optimizer.zero_grad()
    assert_identical(weights(model), weights(plain))
    assert engine.clock.steps == 0 and engine.state_dict()["memory"] == {}


@each_case
def test_a_restored_state_goes_on_bit_for_bit(case: Case):
    model, again = network(), network()
    engine = engine_for(model, case)
    trained(model, engine, batches()[:5])
    again.load_state_dict(model.state_dict())
    resumed = engine_for(again, case)
    resumed.load_state_dict(engine.state_dict())
    trained(model, engine, batches()[5:])
    trained(again, resumed, batches()[5:])
    assert_identical(weights(model), weights(again))


@each_case
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_step_that_is_skipped_leaves_weights_and_state_as_they_were(case: Case, at: int):
    def after(overflow: bool) -> tuple[dict, dict]:
        model = network()
        engine = engine_for(model, case, steps=None if case.method != "flat_lora" else STEPS)
        for step, batch in enumerate(batches()[:5]):
            if overflow and step == at:
                before, clock = weights(model), (engine.clock.steps, engine.clock.elapsed)
                assert engine.step(backward_of(model, (batch[0] * torch.inf, batch[1]))).skipped
                assert_identical(weights(model), before)
                model.zero_grad()
                engine.clock.steps, engine.clock.elapsed = clock
            trained(model, engine, [batch])
        return weights(model), engine.state_dict()["memory"]

    (clean, kept), (survived, kept_after) = after(False), after(True)
    assert_identical(clean, survived)
    assert kept.keys() == kept_after.keys()
    for slot in kept:
        assert_identical(kept[slot], kept_after[slot])


@each_case
def test_micro_batches_of_a_step_are_one_batch(case: Case):
    whole, halves = network(), network()
    trained(whole, engine_for(whole, case), batches())
    engine = engine_for(halves, case)
    optimizer = torch.optim.SGD([p for p in halves.parameters() if p.requires_grad], lr=LR)
    for x, y in batches():
        engine.step([backward_of(halves, (x[i : i + 4], y[i : i + 4]), 0.5) for i in (0, 4)])
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_case
def test_a_loss_scale_changes_nothing(case: Case):
    plain, scaled = network(), network()
    trained(plain, engine_for(plain, case), batches()[:4])
    engine = engine_for(scaled, case)
    for batch in batches()[:4]:
        engine.step(backward_of(scaled, batch, 1024.0), loss_scale=1024.0)
        with torch.no_grad():
            for p in (p for p in scaled.parameters() if p.requires_grad):
                p -= LR * p.grad / 1024.0
                p.grad = None
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_case
def test_a_pass_that_dies_leaves_the_model_and_the_frozen_layers_as_they_were(case: Case):
    model = network()
    engine = engine_for(model, case)
    trained(model, engine, batches()[:3])
    before = weights(model)

    def dies() -> Tensor:
        backward_of(model, batches()[3])()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.step(dies)
    assert_identical(weights(model), before)
    assert not any("forward" in vars(m) for m in model.modules()), "the frozen layers answer for themselves"
    state = torch.get_rng_state()
    trained(model, engine, batches()[3:])
    assert torch.equal(torch.get_rng_state(), state), "the process's generator is not used"
    whole = network()
    trained(whole, engine_for(whole, case), batches())
    assert_identical(weights(model), weights(whole))


# --------------------------------------------------------------------------------------------------------- flat_lora


@pytest.mark.slow
def test_flat_lora_raises_the_variance_of_an_output_by_the_closed_form():
    """E (E x)_i² = σ² ‖W'_i‖² ‖x‖²/n for the merged row, over 2,000 steps, to five standard errors."""
    model, x, steps, sigma = network(), torch.randn(6).double(), 2000, 0.4
    layer = model.base_model.model[0]
    engine = engine_for(model, Case("flat_lora", {"growing": False}), sigma)
    seen = []
    hook = layer.register_forward_hook(lambda m, args, out: seen.append(out.detach()[0]))
    for _ in range(steps):
        engine.step(backward_of(model, (x[None], torch.zeros(1, 3).double())))
        model.zero_grad()
    hook.remove()
    with torch.no_grad():
        clean = layer(x[None])[0]
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
    variance = torch.stack([s - clean for s in seen]).square().mean(0)
    assert (variance / (sigma**2 * merged.square().sum(1) * x.square().sum() / 6) - 1).abs().max() < 5 * math.sqrt(
        2 / steps
    )


def test_flat_lora_grows_its_noise_by_half_a_cosine_from_nothing():
    model = network()
    reports = trained(model, engine_for(model, Case("flat_lora"), 0.2), batches())
    norm = math.sqrt(sum(m.square().sum() for m in factors_of(network()).merged()))
    assert reports[0].perturbation_norm == 0
    growth = [r.perturbation_norm.item() / (0.2 * norm) for r in reports]
    assert growth == pytest.approx([(1 - math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)], rel=0.1)


def test_flat_lora_makes_each_noisy_matrix_twice_with_the_same_bits_in_memory_that_is_kept_once(monkeypatch):
    model, made = network(), []

    def recorded(*given) -> Tensor:
        result = noisy(*given)
        made.append((result.data_ptr(), result.clone()))
        return result

    monkeypatch.setattr(flat_lora_module, "noisy", recorded)
    x, y = batches()[0]
    x.requires_grad_()
    engine = engine_for(model, Case("flat_lora", {"growing": False}), 0.1)

    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    engine.step(run)
    (_, first), (_, second), (_, second_again), (_, first_again) = made
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    places = {place for place, _ in made}
    model.zero_grad()
    engine.step(run)
    assert {place for place, _ in made} == places, "a step finds the memory of the step before"
    shapes = {t.shape: t.nbytes for _, t in made}
    assert len(places) == len(shapes) and engine._passes.adapters._rule._workspace.kept == sum(shapes.values())


def test_flat_lora_adds_to_bf16_weights_in_float32():
    generator = torch.Generator().manual_seed(3)
    weight, scales = torch.ones(4, 8, dtype=torch.bfloat16), torch.full((4,), 0.1)
    found = noisy(weight, scales, 3, Workspace())
    torch.testing.assert_close(found, 1 + 0.1 * torch.empty(4, 8).normal_(generator=generator))


def test_row_norms_are_those_of_the_merged_weight():
    model = network()
    engine = engine_for(model, Case("flat_lora"))
    for layer, merged in zip(engine._passes.adapters._layers, factors_of(model).merged(), strict=True):
        torch.testing.assert_close(merged_row_norms(layer, Workspace()), merged.norm(dim=1), rtol=1e-12, atol=0)


def test_row_norms_keep_their_digits_under_autocast():
    model = network()
    engine = engine_for(model, Case("flat_lora"))
    exact = [merged.norm(dim=1) for merged in factors_of(model).merged()]
    model.float()
    for layer, norms in zip(engine._passes.adapters._layers, exact, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            found = merged_row_norms(layer, Workspace())
        torch.testing.assert_close(found, norms.float(), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------- bi_lora


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 3, "ascent_optim": "sgd", "lr_ratio": 40.0}], ids=str)
def test_bi_lora_stays_within_its_bound(options: dict):
    model = network()
    engine = engine_for(model, Case("bi_lora", options), 0.05)
    norms = []
    for batch in batches():
        trained(model, engine, [batch])
        kept = engine.state_dict()["memory"]["plain"]
        pairs = [(kept[n], kept[n.removesuffix("A") + "B"]) for n in kept if n.endswith(".A")]
        explicit = math.sqrt(sum((b @ a).square().sum() for a, b in pairs))
        assert math.sqrt(sum(product_square(a, b) for a, b in pairs)) == pytest.approx(explicit, rel=1e-9)
        norms.append(explicit)
    assert max(norms) <= 0.05 * (1 + 1e-9) and max(norms) > 0.049, "the bound is reached"
    _, expected_norms = bi_lora(factors_of(network()), losses_of(network(), batches()), 0.05, LR, **options)
    assert norms == pytest.approx(expected_norms, rel=1e-7)


def test_bi_lora_is_no_part_of_the_model():
    model = network()
    engine = engine_for(model, Case("bi_lora"))
    names = [n for n, _ in model.named_parameters()]
    trained(model, engine, batches())
    assert [n for n, _ in model.named_parameters()] == names
    x = batches()[0][0]
    factors = factors_of(model)
    biases = [p for n, p in model.named_parameters() if n.endswith("base_layer.bias")]
    w = factors.merged()
    expected_logits = torch.tanh(x @ w[0].T + biases[0]) @ w[1].T + biases[1]
    torch.testing.assert_close(model(x), expected_logits, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- nbar, obar


@pytest.mark.parametrize("method", ["nbar", "obar"])
def test_balancing_changes_the_product_by_one_minus_a_squared(method: str):
    model = network()
    engine = engine_for(model, Case(method), 2.0)
    before, a = factors_of(model), 2.0 * LR
    engine.step(backward_of(model, batches()[0]))
    after = factors_of(model)
    for layer in range(2):
        torch.testing.assert_close(
            after.b[layer] @ after.a[layer], (1 - a**2) * before.b[layer] @ before.a[layer], rtol=1e-13, atol=0
        )
        assert not torch.equal(after.b[layer], before.b[layer])


def test_obar_brings_the_norms_of_the_factors_together():
    model = network()
    engine = engine_for(model, Case("obar"), 2.0)
    for batch in batches():
        engine.step(backward_of(model, batch))
        model.zero_grad()
    start, end = factors_of(network()), factors_of(model)
    for layer in range(2):
        gaps = [abs(f.b[layer].norm() - f.a[layer].norm()) for f in (start, end)]
        assert gaps[1] < gaps[0]


# ---------------------------------------------------------------------------------------------------- what is refused


@each_case
def test_a_model_without_adapters_is_refused_with_the_way_to_add_one(case: Case):
    with pytest.raises(ValueError, match=f"has no LoRA layer, which method `{case.method}` works on; add one with"):
        engine_for(nn.Linear(3, 2), case)


@each_case
def test_several_active_adapters_are_refused(case: Case):
    model = network()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="`.*model.0` has 2 active adapters and method .* works on one"):
        engine_for(model, case)


@each_case
def test_a_factor_that_does_not_train_is_refused(case: Case):
    model = network()
    model.base_model.model[0].lora_A.default.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="works on both factors of LoRA and one of `.*model.0` does not train"):
        engine_for(model, case)


@each_case
def test_a_pattern_that_names_no_adapter_is_refused(case: Case):
    model = network()
    with pytest.raises(ValueError, match="perturb: it names A and B of no LoRA layer"):
        TwoPass(model, case.method, case.rho, total_steps=2, perturb="lora_A", **case.options)


@each_case
def test_other_kinds_of_adapters_are_refused_where_they_cannot_be_mirrored(case: Case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    dora = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    embedded = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    if case.method in ("nbar", "obar"):
        assert engine_for(dora, case) and engine_for(embedded, case)
        return
    with pytest.raises(ValueError, match="is LoRA of the kind DoraLinearVariant and method .* knows plain LoRA"):
        engine_for(dora, case)
    with pytest.raises(ValueError, match="is LoRA on a Embedding and method .* works on linear layers"):
        engine_for(embedded, case)


@pytest.mark.parametrize("method", ["nbar", "obar", "bi_lora"])
def test_a_learning_rate_that_was_not_said_is_refused(method: str):
    model = network()
    with pytest.raises(ValueError, match=f"clock.lr: method `{method}` scales by the learning rate; set"):
        TwoPass(model, method, 0.1).step(backward_of(model, batches()[0]))


def test_flat_lora_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="total_steps: method `flat_lora` changes over the run"):
        TwoPass(network(), "flat_lora", 0.1)


def test_balancing_by_more_than_the_whole_is_refused():
    model = network()
    engine = engine_for(model, Case("nbar"), 1 / LR)
    with pytest.raises(ValueError, match="rho: 20 times the learning rate 0.05 is the share"):
        engine.step(backward_of(model, batches()[0]))


@each_case
def test_a_reference_without_the_adapter_is_not_perturbed(case: Case):
    """As DPO computes one, inside the same step: with the adapter turned off."""
    model = network()
    engine = engine_for(model, case)
    trained(model, engine, batches()[:3])
    x, y = batches()[3]
    with model.disable_adapter():
        expected_reference = model(x)
    seen = []

    def run() -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            seen.append(model(x))
        return backward_of(model, (x, y))()

    engine.step(run)
    assert torch.equal(seen[0], expected_reference)
