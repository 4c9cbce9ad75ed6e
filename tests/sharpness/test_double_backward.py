"""Products through operations whose double backward torch has wrong, or that have no Hessian at all."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, set_seed

from hf_ssam.sharpness import Objective, ascent_sharpness, top_eigenvalues, trace
from hf_ssam.sharpness.symmetry import asymmetry, tolerance
from tests.support.cases import bert, gpt2, image_data, lm_data, resnet, text_data

F64 = {"dtype": torch.float64}


def old_weight_norm(layer: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def new_weight_norm(layer: nn.Module, dim: int | None) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer, dim=dim)


KINDS = {"parametrization": new_weight_norm, "hook": old_weight_norm}


class Normed(nn.Module):
    """A layer under weight normalisation and a plain one, with the loss of a small regression."""

    def __init__(self, normed: nn.Module):
        super().__init__()
        self.first, self.last = normed, nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.last(torch.tanh(self.first(x))) - y).square().mean())


def normed(kind: str, dim: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Normed(KINDS[kind](nn.Linear(4, 5), dim)).double()
    return model, {"x": torch.randn(7, 4).double(), "y": torch.randn(7, 2).double()}


def written_out(flat: Tensor, shapes: list[torch.Size], batch: dict[str, Tensor], dim: int | None) -> Tensor:
    """The loss of `Normed` with `w = g v / ‖v‖` as its equation has it; the weights in the model's own order."""
    parts = flat.split([shape.numel() for shape in shapes])
    bias, g, v, *last = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    axes = [a for a in range(v.dim()) if dim is None or a != dim % v.dim()]
    w = g * v / v.square().sum(axes, keepdim=dim is not None).sqrt()
    return (torch.tanh(batch["x"] @ w.T + bias) @ last[0].T + last[1] - batch["y"]).square().mean()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_norm_products_are_those_of_the_dense_hessian(kind, dim):
    model, batch = normed(kind, dim)
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.autograd.functional.hessian(lambda w: written_out(w, shapes, batch, dim), flat)
    objective = Objective(model, batch, **F64)
    products = torch.stack([objective.product(e) for e in torch.eye(len(flat)).double()])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=1e-10)


def test_weight_norm_eigenvalues_are_those_of_the_dense_hessian():
    model, batch = normed("parametrization", 0)
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    dense = torch.autograd.functional.hessian(lambda w: written_out(w, shapes, batch, 0), flat)
    found = top_eigenvalues(model, batch, k=2, tol=1e-9, **F64)
    assert found.values == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:2].tolist(), rel=1e-7)
    assert trace(model, batch, samples=len(flat), **F64).value == pytest.approx(dense.trace().item(), rel=1e-9)


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    set_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    convolutions = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(
        vocab_size=8, num_conv_pos_embedding_groups=2, classifier_proj_size=8, initializer_range=0.3,
        apply_spec_augment=False, **sizes, **convolutions,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config), {
        "input_values": torch.randn(2, 40),
        "labels": torch.tensor([0, 1]),
    }


def test_wav2vec2_products_equal_differences_of_gradients():
    model, batch = wav2vec2()
    objective = Objective(model, batch, **F64)
    assert any("parametrizations" in name for name in objective.params)
    v = objective.random(torch.Generator().manual_seed(0))
    differences = (objective.gradient(1e-6 * v) - objective.gradient(-1e-6 * v)) / 2e-6
    torch.testing.assert_close(objective.product(v), differences, rtol=1e-5, atol=1e-5 * differences.abs().max())


class Surrogate(torch.autograd.Function):
    """Forward x³, backward that of another function in part: a gradient that belongs to no function."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.roll(1) ** 2


class Surrogated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.last(Surrogate.apply(self.layer(x))).square().mean())


MEASURES = {
    "eigenvalues": lambda *on, **how: top_eigenvalues(*on, **how),
    "lean": lambda *on, **how: top_eigenvalues(*on, solver="lean", **how),
    "trace": lambda *on, **how: trace(*on, 2, **how),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", MEASURES)
def test_products_without_symmetry_are_refused(measure, dtype):
    batch = [{"x": torch.randn(3, 4)}, {"x": torch.randn(2, 4)}]
    with pytest.raises(NotImplementedError, match=r"model: its Hessian is not symmetric \(.*\), so .*; replace"):
        MEASURES[measure](Surrogated(), batch, dtype=dtype)
    assert ascent_sharpness(Surrogated(), batch, dtype=dtype).loss > 0, (
        "what needs no product is measured all the same"
    )


def test_products_of_torchs_own_weight_norm_would_be_refused(monkeypatch):
    """The second guard by itself: without the first, the wrong double backward is noticed."""
    monkeypatch.setattr("hf_ssam.sharpness.objective.ExactWeightNorm", torch.enable_grad)
    model, batch = normed("parametrization", 0)
    with pytest.raises(NotImplementedError, match="its Hessian is not symmetric"):
        Objective(model, batch, **F64).product(torch.ones(sum(p.numel() for p in model.parameters())).double())


def stacked(rows: list[dict]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(("build", "rows"), [(bert, text_data(6)), (gpt2, lm_data(6)), (resnet, image_data(6))])
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rounding_is_far_below_what_is_refused(build, rows, train_mode, factor, monkeypatch):
    """In either precision, at the weights of a start and at large ones."""
    seen = []
    monkeypatch.setattr("hf_ssam.sharpness.objective.refuse_asymmetry", lambda *on: seen.append(asymmetry(*on)))
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    for dtype in (torch.float32, torch.float64):
        objective = Objective(model, stacked(rows), train_mode=train_mode, dtype=dtype)
        objective.product(objective.zeros() + 1)
        assert seen[-1] < tolerance(dtype) / 100


def test_symmetry_is_looked_at_once_and_on_one_batch(monkeypatch):
    model, batch = normed("parametrization", 0)
    seen = []
    monkeypatch.setattr("hf_ssam.sharpness.objective.refuse_asymmetry", lambda *on: seen.append(asymmetry(*on)))
    objective = Objective(model, [copy.copy(batch)] * 3, **F64)
    for _ in range(2):
        objective.product(objective.zeros() + 1)
    assert len(seen) == 1 and objective.products == 2
