"""Curvature against the full Hessian in float64, against curvlinops, and against closed forms."""

from __future__ import annotations

import copy
import random
import re
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from curvlinops import HessianLinearOperator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, set_seed

from hf_ssam import TwoPass
from hf_ssam.engine.replay import RandomState
from hf_ssam.sharpness import (
    Objective,
    ascent_sharpness,
    edge_of_stability,
    loss_line,
    loss_plane,
    random_direction,
    spectrum,
    top_eigenvalues,
    trace,
)
from tests.support.cases import assert_identical, bert, gpt2, image_data, lm_data, resnet, text_data, weights

F64 = {"dtype": torch.float64}


def stacked(data: list[dict]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([row[k] for row in data]) for k in data[0]}


def small_bert() -> BertForSequenceClassification:
    """3,019 parameters, at weights where the curvature is not that of an initialisation."""
    set_seed(3)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def bert_batch(rows: int = 6) -> dict[str, torch.Tensor]:
    batch = stacked(text_data(rows, length=7))
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, 4:] = 0
    return {**batch, "input_ids": (batch["input_ids"] % 29 + 1) * batch["attention_mask"]}


def full_hessian(model: nn.Module, batch: dict, pattern: str = "") -> torch.Tensor:
    """Brute force: every row of the Hessian by one more backward pass, in float64, with ordinary attention."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    model.eval()
    params = [p.requires_grad_() for n, p in model.named_parameters() if pattern in n]
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    grads = torch.autograd.grad(model(**batch).loss, params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = []
    for chunk in torch.eye(len(flat), dtype=torch.float64).split(256):
        parts = torch.autograd.grad(
            flat, params, chunk, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([p.flatten(1) for p in parts], dim=1))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def bert_case() -> SimpleNamespace:
    model, batch = small_bert(), bert_batch()
    hessian = full_hessian(model, batch)
    return SimpleNamespace(model=model, batch=batch, hessian=hessian, eigenvalues=torch.linalg.eigvalsh(hessian))


@pytest.fixture(scope="module")
def cnn_case() -> SimpleNamespace:
    model, batch = resnet(), stacked(image_data(6))
    hessian = full_hessian(model, batch)
    return SimpleNamespace(model=model, batch=batch, hessian=hessian, eigenvalues=torch.linalg.eigvalsh(hessian))


@pytest.fixture(scope="module", params=["bert", "cnn"])
def any_case(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.getfixturevalue(f"{request.param}_case")


class Quadratic(nn.Module):
    """½ Σ h w², averaged over the rows of `h`."""

    def __init__(self, w: list[float]):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, h: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=0.5 * (h * self.w**2).sum(1).mean())


def rows_of(*curvatures: list[float]) -> dict[str, torch.Tensor]:
    return {"h": torch.tensor(curvatures, dtype=torch.float64)}


class TestEigenvalues:
    @pytest.mark.parametrize("k", [1, 4])
    def test_equal_the_full_hessians(self, any_case, k):
        found = top_eigenvalues(any_case.model, any_case.batch, k=k, tol=1e-9, **F64)
        expected = any_case.eigenvalues.flip(0)[:k].tolist()
        assert found.values == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert found.converged
        assert found.solver == "scipy"

    def test_of_the_lean_recurrence(self, any_case):
        found = top_eigenvalues(any_case.model, any_case.batch, tol=1e-8, solver="lean", vectors=True, **F64)
        assert found.values[0] == pytest.approx(any_case.eigenvalues[-1].item(), rel=1e-6)
        vector = torch.cat([t.flatten() for t in found.vectors[0].values()])
        assert vector.norm().item() == pytest.approx(1.0)
        residual = any_case.hessian @ vector - found.values[0] * vector
        assert residual.norm() < 1e-6 * found.values[0]

    def test_vectors_of_arpack(self, any_case):
        found = top_eigenvalues(any_case.model, any_case.batch, k=2, tol=1e-9, vectors=True, **F64)
        for value, named in zip(found.values, found.vectors, strict=True):
            vector = torch.cat([t.flatten() for t in named.values()])
            assert (any_case.hessian @ vector - value * vector).norm() < 1e-6 * value

    def test_in_single_precision(self, any_case):
        found = top_eigenvalues(any_case.model, any_case.batch)
        assert found.values[0] == pytest.approx(any_case.eigenvalues[-1].item(), rel=2e-3)
        assert found.precision == "float32"

    def test_of_a_handful_of_weights(self):
        found = top_eigenvalues(Quadratic([1.0, 2.0, 3.0]), rows_of([4.0, -1.0, 2.0]), k=3, vectors=True)
        assert found.values == pytest.approx((4.0, 2.0, -1.0))
        assert found.vectors[0]["w"].abs().tolist() == pytest.approx([1.0, 0.0, 0.0])
        assert found.solver == "dense"

    def test_of_a_flat_loss(self):
        assert top_eigenvalues(Quadratic([1.0] * 40), rows_of([0.0] * 40), solver="lean").values == (0.0,)

    @pytest.mark.parametrize("solver", ["scipy", "lean"])
    def test_exact_on_a_diagonal_quadratic(self, solver):
        curvature = torch.linspace(-3, 5, 60, dtype=torch.float64).tolist()
        found = top_eigenvalues(Quadratic([0.3] * 60), rows_of(curvature), tol=1e-9, solver=solver)
        assert found.values[0] == pytest.approx(5.0, rel=1e-8)

    def test_products_are_counted_and_bounded(self, bert_case):
        few = top_eigenvalues(bert_case.model, bert_case.batch, tol=1e-12, solver="lean", max_products=4, vectors=True)
        assert few.products <= 4
        assert not few.converged
        assert few.values[0] <= bert_case.eigenvalues[-1].item() * (1 + 1e-5)

    def test_arpack_says_what_it_could_not_find(self):
        curvature = torch.linspace(1, 1.001, 500, dtype=torch.float64).tolist()
        with pytest.raises(RuntimeError, match="max_products: .* allow more"):
            top_eigenvalues(
                Quadratic([1.0] * 500), rows_of(curvature), k=5, tol=1e-14, max_products=20, solver="scipy"
            )

    def test_equal_curvlinops(self, any_case):
        """Without LayerNorm's weights, which `TestLayerNorm` holds against other oracles.

        curvlinops 3.0.1 differentiates `torch.func.jacrev`, whose batched backward of `layer_norm` loses (torch 2.13)
        that the gradient of the scale depends on the inputs; `torch.func.grad` keeps it, and agrees with us.
        """
        pattern = r"^(?!.*LayerNorm\.weight)"
        model = copy.deepcopy(any_case.model).double().eval()
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        inputs = {k: v for k, v in any_case.batch.items() if k != "labels"}
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

        class Logits(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(**x).logits

        labels = any_case.batch["labels"]
        oracle = HessianLinearOperator(
            Logits(),
            nn.CrossEntropyLoss(),
            [p for n, p in model.named_parameters() if re.search(pattern, n)],
            [(UserDict(inputs), labels)],
            batch_size_fn=lambda x: len(labels),
            check_deterministic=False,
        )
        objective = Objective(any_case.model, any_case.batch, parameters=pattern, **F64)
        v = objective.random(torch.Generator().manual_seed(0))
        torch.testing.assert_close(objective.product(v), oracle @ v, rtol=1e-9, atol=1e-9)


class TestLayerNorm:
    """The product over all weights, read at the scales of the LayerNorms, where curvlinops is no oracle."""

    def test_equals_the_full_hessian(self, bert_case):
        objective = Objective(bert_case.model, bert_case.batch, **F64)
        v = objective.random(torch.Generator().manual_seed(0))
        torch.testing.assert_close(objective.product(v), bert_case.hessian @ v, rtol=1e-9, atol=1e-9)

    def test_equals_finite_differences(self, bert_case):
        """Of gradients that plain autograd takes of the model itself, moved and moved back."""
        objective = Objective(bert_case.model, bert_case.batch, **F64)
        v = objective.random(torch.Generator().manual_seed(0))
        found, direction = (objective.named(t) for t in (objective.product(v), v))
        plus, minus = (_moved_gradient(bert_case.model, bert_case.batch, direction, t) for t in (1e-5, -1e-5))
        scales = [n for n in plus if n.endswith("LayerNorm.weight")]
        assert len(scales) == 3
        for name in scales:
            torch.testing.assert_close(found[name], (plus[name] - minus[name]) / 2e-5, rtol=1e-5, atol=1e-6)

    def test_equals_forward_over_reverse(self, bert_case):
        model = copy.deepcopy(bert_case.model).double().eval()
        model.set_attn_implementation("eager")
        w = {n: p.detach() for n, p in model.named_parameters()}
        gradient = torch.func.grad(lambda w: torch.func.functional_call(model, w, kwargs=bert_case.batch).loss)
        objective = Objective(bert_case.model, bert_case.batch, **F64)
        v = objective.random(torch.Generator().manual_seed(0))
        expected = torch.func.jvp(gradient, (w,), (objective.named(v),))[1]
        torch.testing.assert_close(objective.named(objective.product(v)), expected, rtol=1e-9, atol=1e-9)


def _moved_gradient(model: nn.Module, batch: dict, direction: dict[str, torch.Tensor], t: float) -> dict:
    """The gradient of a float64 copy at `w + t · direction`."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(direction[name], alpha=t)
    model(**batch).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


class TestTraceAndSpectrum:
    @pytest.mark.slow
    def test_trace_is_exact_with_as_many_samples_as_weights(self, bert_case):
        pattern = "attention.self.query"
        exact = full_hessian(bert_case.model, bert_case.batch, pattern).trace().item()
        found = trace(bert_case.model, bert_case.batch, samples=272, parameters=pattern, **F64)
        assert found.parameters == 272
        assert found.value == pytest.approx(exact, rel=1e-6, abs=1e-9)
        assert found.standard_error == 0.0

    def test_trace_is_hutchinsons_mean_and_error(self, any_case):
        found = trace(any_case.model, any_case.batch, samples=8, seed=5, **F64)
        generator, n = torch.Generator().manual_seed(5), len(any_case.hessian)
        signs = [(2 * torch.randint(2, (n,), generator=generator) - 1).double() for _ in range(8)]
        forms = np.array([(z @ any_case.hessian @ z).item() for z in signs])
        assert found.value == pytest.approx(forms.mean(), rel=1e-6)
        assert found.standard_error == pytest.approx(forms.std(ddof=1) / 8**0.5, rel=1e-6)
        assert abs(found.value - any_case.hessian.trace().item()) < 5 * found.standard_error

    @pytest.mark.slow
    def test_spectrum_is_exact_with_as_many_probes_as_weights(self, bert_case):
        pattern = "classifier"
        eigenvalues = torch.linalg.eigvalsh(full_hessian(bert_case.model, bert_case.batch, pattern)).numpy()
        found = spectrum(bert_case.model, bert_case.batch, steps=51, probes=51, parameters=pattern, **F64)
        assert found.weights.sum() == pytest.approx(1.0)
        for power in range(1, 6):
            assert found.moment(power) == pytest.approx(np.mean(eigenvalues**power), rel=1e-6, abs=1e-9)
        grid = np.linspace(eigenvalues[0], eigenvalues[-1], 50)
        bells = np.exp(-0.5 * ((grid[:, None] - eigenvalues) / 0.05) ** 2) / (0.05 * (2 * np.pi) ** 0.5)
        np.testing.assert_allclose(found.density(grid, 0.05), bells.mean(1), atol=1e-6)

    @pytest.mark.quick("cnn")
    def test_moments_of_a_spectrum_are_those_of_its_probes(self, any_case):
        found = spectrum(any_case.model, any_case.batch, steps=30, probes=3, seed=2, **F64)
        generator, n = torch.Generator().manual_seed(2), len(any_case.hessian)
        signs = [(2 * torch.randint(2, (n,), generator=generator) - 1).double() for _ in range(3)]
        for power in range(1, 6):
            raised = torch.linalg.matrix_power(any_case.hessian, power) if power < 3 else None
            forms = [_form(any_case.hessian, z, power) if raised is None else (z @ raised @ z).item() for z in signs]
            assert found.moment(power) == pytest.approx(np.mean(forms) / n, rel=1e-6)

    def test_spectrum_ends_at_the_extreme_eigenvalues(self, any_case):
        found = spectrum(any_case.model, any_case.batch, steps=60, probes=1, **F64)
        assert found.nodes[-1] == pytest.approx(any_case.eigenvalues[-1].item(), rel=1e-6)
        assert found.nodes[0] == pytest.approx(any_case.eigenvalues[0].item(), rel=1e-6)

    def test_one_sample_has_no_error(self):
        with pytest.raises(ValueError, match="samples: 1 .* at least 2"):
            trace(Quadratic([1.0] * 3), rows_of([1.0] * 3), samples=1)


def _form(hessian: torch.Tensor, z: torch.Tensor, power: int) -> float:
    v = z
    for _ in range(power):
        v = hessian @ v
    return (z @ v).item()


class TestObjective:
    def test_batches_of_unequal_size_are_one_mean(self, bert_case):
        parts = [{k: v[s] for k, v in bert_case.batch.items()} for s in (slice(0, 1), slice(1, 6))]
        whole, split = (Objective(bert_case.model, b, **F64) for b in (bert_case.batch, parts))
        v = whole.random(torch.Generator().manual_seed(0))
        assert split.value() == pytest.approx(whole.value(), rel=1e-12)
        torch.testing.assert_close(split.gradient(), whole.gradient(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(split.product(v), whole.product(v), rtol=1e-9, atol=1e-12)

    def test_is_the_derivative_of_the_gradient(self, any_case):
        objective = Objective(any_case.model, any_case.batch, **F64)
        v = objective.random(torch.Generator().manual_seed(0))
        difference = (objective.gradient(1e-5 * v) - objective.gradient(-1e-5 * v)) / 2e-5
        torch.testing.assert_close(objective.product(v), difference, rtol=1e-5, atol=1e-5)

    def test_the_padding_row_of_an_embedding_is_frozen(self):
        """Autograd never gives it a gradient, even where its token is not masked."""
        model, batch = small_bert(), bert_batch()
        batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
        objective = Objective(model, batch, parameters="word_embeddings", **F64)
        first = objective.zeros()
        first[:16] = 1
        assert (batch["input_ids"] == 0).any()
        assert not objective.product(first).any()

    def test_causal_losses_are_weighted_by_the_labels_they_shift_to(self):
        model, data = gpt2(), stacked(lm_data(6))
        parts = [{k: v[s] for k, v in data.items()} for s in (slice(0, 2), slice(2, 6))]
        # The model computes its loss in float32 whatever its weights are.
        assert Objective(model, parts).value() == pytest.approx(Objective(model, data).value(), rel=1e-6)

    def test_rows_that_count_for_nothing_are_left_out(self):
        model, data = gpt2(), stacked(lm_data(4))
        empty = {**data, "labels": torch.full_like(data["labels"], -100)}
        assert Objective(model, [data, empty]).value() == pytest.approx(Objective(model, data).value())
        with pytest.raises(ValueError, match="no item that the loss counts"):
            Objective(model, [empty])

    def test_train_mode_is_one_function_with_dropout_and_batch_statistics(self):
        for model, batch in ((bert(dropout=0.5), stacked(text_data(4))), (resnet(), stacked(image_data(4)))):
            objective = Objective(model, batch, train_mode=True, **F64)
            u, v = (objective.random(torch.Generator().manual_seed(s)) for s in (0, 1))
            forward, backward = torch.dot(u, objective.product(v)), torch.dot(v, objective.product(u))
            torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)
            assert objective.value() != pytest.approx(Objective(model, batch, **F64).value(), rel=1e-6)

    def test_nothing_is_left_behind(self):
        for model, batch in ((bert(dropout=0.3), stacked(text_data(4))), (resnet(), stacked(image_data(4)))):
            model.train()
            frozen = next(iter(model.parameters())).requires_grad_(False)
            child = next(m for m in model.modules() if not list(m.children())).eval()
            model(**batch).loss.backward()
            random.seed(1), np.random.seed(1), torch.manual_seed(1)
            before, grads, draws = weights(model), _grads(model), RandomState()
            for train_mode in (False, True):
                how = {"train_mode": train_mode}
                top_eigenvalues(model, batch, solver="lean", vectors=True, tol=0.1, **how)
                top_eigenvalues(model, batch, k=2, tol=0.1, **how)
                trace(model, batch, 2, **how)
                spectrum(model, batch, 3, 1, **how)
                ascent_sharpness(model, batch, 0.1, adaptive=True, steps=2, m=2, **how)
                loss_line(model, batch, random_direction(model), [0.5], **how)
            assert_identical(weights(model), before)
            assert_identical(_grads(model), grads)
            assert not frozen.requires_grad
            assert model.training
            assert not child.training
            assert _draw() == (draws.restore(), _draw())[1]

    def test_an_error_leaves_nothing_behind(self):
        model, batch = resnet().train(), stacked(image_data(4))
        before = weights(model)

        def loss(model, batch):
            model(**batch)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trace(model, batch, train_mode=True, loss=loss)
        assert_identical(weights(model), before)
        assert all(m.training for m in model.modules())

    def test_sdpa_is_what_eager_is(self):
        batch = bert_batch()
        sdpa, eager = small_bert(), small_bert()
        sdpa.set_attn_implementation("sdpa")
        eager.set_attn_implementation("eager")
        assert top_eigenvalues(sdpa, batch, **F64).values == pytest.approx(top_eigenvalues(eager, batch, **F64).values)
        assert sdpa.config._attn_implementation == "sdpa"

    def test_half_precision_weights_are_measured_in_single(self):
        half = small_bert().bfloat16()
        single = copy.deepcopy(half).float()
        found, expected = (top_eigenvalues(m, bert_batch()) for m in (half, single))
        assert found.values == expected.values
        assert found.precision == "float32 (weights are bfloat16)"
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    def test_lora_alone(self):
        model = get_peft_model(small_bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
        batch = bert_batch()
        hessian = full_hessian(model, batch, "lora_")
        found = top_eigenvalues(model, batch, parameters="lora_", tol=1e-9, **F64)
        assert found.parameters == len(hessian) == 2 * 2 * 16
        assert found.values[0] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-6)

    def test_frozen_weights_are_left_out_unless_named(self):
        model = small_bert()
        for name, p in model.named_parameters():
            p.requires_grad_("classifier" in name)
        assert Objective(model, bert_batch()).size == 51
        assert Objective(model, bert_batch(), parameters="word_embeddings").size == 30 * 16

    def test_a_loss_of_ones_own_may_pop(self):
        def smoothed(model, batch):
            labels = batch.pop("labels")
            return nn.functional.cross_entropy(model(**batch).logits, labels, label_smoothing=0.2)

        batch = bert_batch()
        found = top_eigenvalues(small_bert(), batch, loss=smoothed)
        assert found.values != pytest.approx(top_eigenvalues(small_bert(), batch).values, rel=1e-3)
        assert "labels" in batch

    @pytest.mark.parametrize(
        "measure, vectors",
        [
            (lambda *on: Objective(*on).gradient(), 1),
            (lambda *on: top_eigenvalues(*on, solver="lean", max_products=3, tol=1e-9), 2),
            (lambda *on: top_eigenvalues(*on, solver="lean", max_products=6, tol=1e-9, vectors=True), 3),
            (lambda *on: trace(*on, 2), 2),
            (lambda *on: ascent_sharpness(*on), 2),
            (lambda *on: ascent_sharpness(*on, adaptive=True), 2),
        ],
        ids=["gradient", "eigenvalue", "eigenvector", "trace", "ascent", "adaptive ascent"],
    )
    def test_memory_is_that_of_a_few_vectors(self, measure, vectors):
        """Allocated at once: whole vectors, the largest weight's gradient (here 47 % of all) and the activations."""
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
        model = BertForSequenceClassification(BertConfig(vocab_size=4000, num_labels=3, **sizes))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            measure(model, bert_batch(4))
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        weights = [p.numel() * p.element_size() for p in model.parameters()]
        activations = 0.65 * sum(weights)
        assert peak < vectors * sum(weights) + max(weights) + activations


def _grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class TestRefusals:
    def test_a_model_without_a_loss(self):
        batch = {k: v for k, v in bert_batch().items() if k != "labels"}
        with pytest.raises(ValueError, match="BertForSequenceClassification returns no loss .*add `labels`"):
            top_eigenvalues(small_bert(), batch)

    def test_nan(self):
        model = small_bert()
        model.classifier.weight.data[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite; look for NaN"):
            top_eigenvalues(model, bert_batch())
        with pytest.raises(FloatingPointError, match="the loss is not finite"):
            ascent_sharpness(model, bert_batch())

    def test_no_weight_left(self):
        with pytest.raises(ValueError, match="parameters: 'lora_' leaves none of the .* floating weights"):
            trace(small_bert(), bert_batch(), parameters="lora_")
        with pytest.raises(ValueError, match="unfreeze a weight"):
            trace(small_bert().requires_grad_(False), bert_batch())

    @pytest.mark.parametrize("k", [0, 3012])
    def test_a_k_out_of_range(self, k):
        size = sum(p.numel() for p in small_bert().parameters())
        with pytest.raises(ValueError, match=rf"k: {k if k == 0 else size + 1} .*choose k from 1 to {size}"):
            top_eigenvalues(small_bert(), bert_batch(), k=k if k == 0 else size + 1)

    def test_a_solver_that_does_not_exist_or_cannot(self):
        with pytest.raises(ValueError, match="solver: there is no 'qr'"):
            top_eigenvalues(small_bert(), bert_batch(), solver="qr")
        with pytest.raises(ValueError, match="solver: 'lean' finds the largest"):
            top_eigenvalues(small_bert(), bert_batch(), k=2, solver="lean")

    def test_batches_that_can_be_read_once(self):
        with pytest.raises(ValueError, match="batches: a generator can be read only once"):
            trace(small_bert(), (b for b in [bert_batch()]))

    def test_no_batches(self):
        with pytest.raises(ValueError, match="batches: 0 batches"):
            trace(small_bert(), [])

    def test_an_operation_without_double_backward_is_named(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(3))

            def forward(self, x):
                return SimpleNamespace(loss=OnlyOnce.apply(self.w * x).mean())

        with pytest.raises(NotImplementedError, match="model: `OnlyOnce` has no double backward"):
            top_eigenvalues(Model(), {"x": torch.ones(2, 3)})

    def test_a_kernel_without_double_backward_is_named(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(1, 1, 4, 8))

            def forward(self, x):
                q = self.w * x
                kernel = torch.nn.attention.SDPBackend.FLASH_ATTENTION
                with torch.nn.attention.sdpa_kernel(kernel):
                    return SimpleNamespace(loss=nn.functional.scaled_dot_product_attention(q, q, q).square().mean())

        with pytest.raises(NotImplementedError, match="scaled_dot_product.*` has no double backward"):
            top_eigenvalues(Model(), {"x": torch.ones(1, 1, 4, 8)})


class TestAscentSharpness:
    H, W = [4.0, 1.0, 0.5], [0.3, -1.0, 2.0]

    def test_closed_form_of_one_step(self):
        h, w, rho = np.array(self.H), np.array(self.W), 0.2
        g = h * w
        e = rho * g / np.linalg.norm(g)
        found = ascent_sharpness(Quadratic(self.W), rows_of(self.H), rho)
        assert found.value == pytest.approx(e @ g + 0.5 * e @ (h * e))
        assert found.loss == pytest.approx(0.5 * w @ (h * w))

    def test_closed_form_of_the_adaptive_step(self):
        h, w, rho = np.array(self.H), np.array(self.W), 0.2
        g, t = h * w, np.abs(w) + 0.01
        e = rho * t**2 * g / np.linalg.norm(t * g)
        found = ascent_sharpness(Quadratic(self.W), rows_of(self.H), rho, adaptive=True)
        assert found.value == pytest.approx(e @ g + 0.5 * e @ (h * e))

    def test_is_the_rise_of_the_loss_that_sam_reports(self):
        model = Quadratic(self.W)
        report = TwoPass(model, "sam", rho=0.2).step(lambda: _backward(model, rows_of(self.H)))
        found = ascent_sharpness(Quadratic(self.W), rows_of(self.H), 0.2)
        assert found.value == pytest.approx((report.ascent_loss - report.loss).item())

    def test_many_steps_reach_the_maximum_over_the_ball(self):
        h, w, rho = np.array(self.H), np.array(self.W), 0.5
        # The maximum of ½eᵀHe + gᵀe on ‖e‖ = ρ has (μ − H) e = g with the μ above λ₁ that gives this length.
        low, high = h.max() + 1e-9, 1e3
        for _ in range(200):
            mu = (low + high) / 2
            low, high = (mu, high) if np.linalg.norm(h * w / (mu - h)) > rho else (low, mu)
        e = h * w / (mu - h)
        found = ascent_sharpness(Quadratic(self.W), rows_of(self.H), rho, steps=200)
        assert found.value == pytest.approx(e @ (h * w) + 0.5 * e @ (h * e), rel=1e-6)

    def test_m_sharpness_is_the_mean_over_shards(self):
        rows = [[4.0, 1.0, 0.5], [1.0, 3.0, 0.1], [0.2, 0.2, 2.0]]
        found = ascent_sharpness(Quadratic(self.W), rows_of(*rows), 0.2, m=1).value
        alone = [ascent_sharpness(Quadratic(self.W), rows_of(r), 0.2).value for r in rows]
        assert found == pytest.approx(np.mean(alone))
        assert found > ascent_sharpness(Quadratic(self.W), rows_of(*rows), 0.2).value

    def test_out_of_range(self):
        with pytest.raises(ValueError, match="choose rho > 0"):
            ascent_sharpness(Quadratic(self.W), rows_of(self.H), 0.0)


def _backward(model: nn.Module, batch: dict) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss


def _descended(
    method: str, lr: float, rho: float, curvature: list[float], steps: int = 400, **options
) -> torch.Tensor:
    """Distance from the minimum after `steps` of full-batch descent from 0.1 in every direction."""
    model = Quadratic([0.1] * len(curvature))
    two_pass = TwoPass(model, method, rho=rho, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        two_pass.step(lambda: _backward(model, rows_of(curvature)))
        optimizer.step()
    return model.w.detach().norm()


class TestEdges:
    @pytest.mark.parametrize("method", ["sgd", "usam", "sam", "ssam"])
    def test_without_a_radius_all_are_two_over_the_learning_rate(self, method):
        found = edge_of_stability(0.1, 0.0, 1.0, method, scale=1.0)
        assert (found.gd, found.usam, found.sam, found.ssam, found.edge) == pytest.approx((20.0,) * 5)
        assert edge_of_stability(0.1, 1e-12, 1.0, method, scale=1.0).edge == pytest.approx(20.0)

    def test_closed_forms(self):
        lr, rho, norm = 0.2, 0.05, 0.3
        found = edge_of_stability(lr, rho, norm, "sam")
        assert found.usam == pytest.approx((np.sqrt(1 + 8 * rho / lr) - 1) / (2 * rho))
        assert found.sam == pytest.approx(norm / (2 * rho) * (np.sqrt(1 + 8 * rho / (lr * norm)) - 1))
        assert found.stability(found.edge) == pytest.approx(2.0)
        assert found.max_lr(found.edge) == pytest.approx(lr)
        assert edge_of_stability(lr, rho, norm, "ssam", scale=0.5).edge == pytest.approx(
            edge_of_stability(lr / 2, rho, norm, "sam").edge
        )

    def test_the_learning_rate_of_the_toy_quadratic(self):
        """λ = 4 and ρ = 0.3 give η* = 0.22727 for USAM, and 2/λ = 0.5 for SSAM."""
        assert edge_of_stability(0.1, 0.3, method="usam").max_lr(4.0) == pytest.approx(0.22727, rel=1e-4)
        assert edge_of_stability(0.1, 0.3, method="ssam").max_lr(4.0) == pytest.approx(0.5)
        assert edge_of_stability(0.1, 0.3, method="ssam").max_lr(-1.0) == np.inf

    @pytest.mark.quick("ssam-*")
    @pytest.mark.parametrize("method, options", [("usam", {}), ("ssam", {"normalize": False})])
    def test_one_percent_below_converges_and_above_diverges(self, method, options):
        curvature, rho = [4.0, 1.0], 0.3
        measured = top_eigenvalues(Quadratic([1.0, 1.0]), rows_of(curvature)).values[0]
        limit = edge_of_stability(0.1, rho, method=method).max_lr(measured)
        assert _descended(method, 0.99 * limit, rho, curvature, **options) < 0.1
        assert _descended(method, 1.01 * limit, rho, curvature, **options) > 1.0

    def test_normalised_sam_cycles_on_its_edge(self):
        """On ½λw² it ends in a cycle of amplitude ηλρ/(2 − ηλ), at whose ‖g‖ the predicted edge is λ itself."""
        lr, lam, rho = 0.2, 3.0, 0.1
        amplitude = _descended("sam", lr, rho, [lam]).item()
        assert amplitude == pytest.approx(lr * lam * rho / (2 - lr * lam))
        assert edge_of_stability(lr, rho, lam * amplitude, "sam").edge == pytest.approx(lam)

    def test_ssam_is_gradient_descent_along_the_eigenvector(self):
        lr, lam, rho = 0.2, 3.0, 0.1
        measured = 1 / (1 + rho * lam)
        edge = edge_of_stability(lr, rho, method="ssam", scale=measured, normalize=False)
        assert edge.stability(lam) == pytest.approx(lr * lam)

    def test_a_vanishing_gradient_leaves_no_room(self):
        assert edge_of_stability(0.1, 0.05, 0.0, "sam").edge == 0.0

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"lr": 0.0}, "lr: 0.0"),
            ({"rho": -1.0}, "rho: -1.0"),
            ({"method": "asam"}, "no edge is known for 'asam'; choose one of sgd, usam, sam, ssam"),
            ({"method": "sam"}, "grad_norm: the edge of 'sam' depends on"),
            ({"method": "ssam", "scale": 0.9}, "grad_norm: the edge of 'ssam'"),
        ],
    )
    def test_out_of_range(self, given, message):
        with pytest.raises(ValueError, match=message):
            edge_of_stability(**{"lr": 0.1, "rho": 0.05, **given})


class TestLandscape:
    def test_a_line_and_a_plane_are_losses_at_moved_weights(self):
        h, w = np.array([4.0, 1.0]), np.array([0.3, -1.0])
        a, b = ({"w": torch.tensor(d, dtype=torch.float64)} for d in ([1.0, 0.0], [0.5, 2.0]))
        ts = [-1.0, 0.0, 2.0]
        model, batch = Quadratic(w.tolist()), rows_of(h.tolist())
        line, plane = loss_line(model, batch, b, ts), loss_plane(model, batch, a, b, ts)
        loss = lambda s, t: 0.5 * (h * (w + s * a["w"].numpy() + t * b["w"].numpy()) ** 2).sum()  # noqa: E731
        np.testing.assert_allclose(line.losses, [loss(0, t) for t in ts])
        np.testing.assert_allclose(plane.losses, [[loss(s, t) for s in ts] for t in ts])

    def test_random_directions_have_the_length_of_each_filter(self):
        model = resnet()
        direction = random_direction(model, seed=1)
        for name, p in model.named_parameters():
            if p.ndim < 2:
                assert not direction[name].any()
            else:
                torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))


def _measure_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, batch = small_bert(), bert_batch()
    mine = {k: v[:2] if rank == 0 else v[2:] for k, v in batch.items()}
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = {
        "lean": top_eigenvalues(wrapped, mine, tol=1e-8, solver="lean", **F64).values[0],
        "scipy": top_eigenvalues(wrapped, mine, tol=1e-8, solver="scipy", **F64).values[0],
        "trace": trace(wrapped, mine, 4, **F64).value,
        "ascent": ascent_sharpness(wrapped, mine, 0.1, **F64).value,
        "alone": Objective(wrapped, mine, distributed=False, **F64).value(),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_with_different_batches_measure_the_whole(tmp_path):
    torch.multiprocessing.spawn(_measure_on_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model, batch = small_bert(), bert_batch()
    expected = {
        "lean": top_eigenvalues(model, batch, tol=1e-8, **F64).values[0],
        "trace": trace(model, batch, 4, **F64).value,
        "ascent": ascent_sharpness(model, batch, 0.1, **F64).value,
    }
    expected["scipy"] = expected["lean"]
    assert {n: first[n] for n in expected} == pytest.approx(expected, rel=1e-6)
    assert {n: second[n] for n in expected} == {n: first[n] for n in expected}
    assert first["alone"] != second["alone"]
