"""Noise row by row: its size in closed form, the draws that the step alone determines, and the model left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ssam import TwoPass
from hf_ssam.engine.parameters import trainable, transposed_names
from hf_ssam.rules import tensors
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.noise import LEVELS, POINTS, filterwise, normal, normal_, thinned
from hf_ssam.rules.rows import row_length, row_norms
from hf_ssam.rules.space import CHUNK, ParameterSpace
from tests.engine.test_two_pass import backward_of, loss_of, regression
from tests.support.cases import assert_identical, weights

SIGMA = 0.3


def space_of(model: nn.Module) -> ParameterSpace:
    return ParameterSpace(trainable(model), transposed_names(model))


def at_step(space: ParameterSpace, step: int) -> StepContext:
    return StepContext(space, space.weights(), {}, torch.zeros(()), SIGMA, step)


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    kinds = {
        "linear": lambda: nn.Linear(40, 6, bias=False),
        "Conv1D": lambda: Conv1D(6, 40),
        "convolution": lambda: nn.Conv1d(40, 6, 1, bias=False),
        "transposed convolution": lambda: nn.ConvTranspose1d(40, 6, 1, bias=False),
    }
    return kinds[kind]().double()


def matrix(model: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight = model.weight.detach().squeeze(-1)
    return weight.T if weight.shape == (40, 6) else weight


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "convolution", "transposed convolution"])
def test_noise_raises_the_variance_of_an_output_by_the_closed_form(kind: str):
    """E (Σ_j E_ij x_j)² = σ² ‖w_i‖² ‖x‖²/n for each output i, over 4,000 draws, to five standard errors."""
    model = layer(kind)
    space, x, draws = space_of(model), torch.randn(40).double(), 4000
    rule, w = filterwise(seed=1), matrix(model)
    moved = torch.zeros(draws, 6).double()
    for step in range(draws):
        e = rule({}, at_step(space, step))["weight"].squeeze(-1)
        moved[step] = SIGMA * ((e.T if e.shape == (40, 6) else e) @ x)
    expected = SIGMA**2 * w.square().sum(1) * x.square().sum() / 40
    assert (moved.square().mean(0) / expected - 1).abs().max() < 5 * math.sqrt(2 / draws)
    assert (moved.mean(0).abs() / (expected / draws).sqrt()).max() < 5


def test_rows_are_filters_and_a_vector_is_one_row():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 2), "gpt": Conv1D(4, 7), "norm": nn.LayerNorm(6)})
    space = space_of(model)
    norms = row_norms(space, space.weights())
    assert {n: (tuple(t.shape), row_length(space, n)) for n, t in norms.items()} == {
        "conv.weight": ((5, 1, 1, 1), 12),
        "conv.bias": ((1,), 5),
        "gpt.weight": ((1, 4), 7),
        "gpt.bias": ((1,), 4),
        "norm.weight": ((1,), 6),
        "norm.bias": ((1,), 6),
    }
    for row, norm in zip(model["conv"].weight, norms["conv.weight"].flatten(), strict=True):
        torch.testing.assert_close(row.norm(), norm)
    for column, norm in zip(model["gpt"].weight.T, norms["gpt.weight"].flatten(), strict=True):
        torch.testing.assert_close(column.norm(), norm)


def test_a_number_and_an_empty_tensor_have_rows():
    space = ParameterSpace({"number": nn.Parameter(torch.tensor(-3.0)), "empty": nn.Parameter(torch.zeros(0, 4))})
    e = filterwise(seed=0)({}, at_step(space, 0))
    assert e["number"].shape == () and e["number"].abs() > 0 and e["empty"].shape == (0, 4)


def test_what_is_zero_stays_zero():
    """LoRA's B as it begins: a relative perturbation has no length there."""
    space = ParameterSpace({"lora_B": nn.Parameter(torch.zeros(5, 2)), "lora_A": nn.Parameter(torch.ones(2, 5))})
    e = filterwise(seed=0)({}, at_step(space, 0))
    assert e["lora_B"].count_nonzero() == 0 and e["lora_A"].count_nonzero() == 10


def test_draws_follow_seed_and_step_and_leave_the_processes_generator_alone():
    space = space_of(regression()[0])
    w, state = space.weights(), torch.get_rng_state()
    assert_identical(normal(w, at_step(space, 5), 1), normal(w, at_step(space, 5), 1))
    for other in (normal(w, at_step(space, 6), 1), normal(w, at_step(space, 5), 2)):
        assert not torch.equal(other["0.weight"], normal(w, at_step(space, 5), 1)["0.weight"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_numbers_have_the_standard_normal_distribution(dtype: torch.dtype):
    t = torch.empty(3 * CHUNK // 64 + 1, 65, dtype=dtype).T  # more than one piece, not contiguous
    drawn = normal_(t, torch.Generator().manual_seed(7)).double().flatten()
    n, values = len(drawn), drawn.sort().values
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    # Kolmogorov and Smirnov: over 2.2 / √n once in 10⁴; bf16's spacing adds half a step of its own
    assert (torch.special.ndtr(values) - steps).abs().max() < 2.2 / math.sqrt(n) + (dtype == torch.bfloat16) * 2e-3
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), 1):
        spread = math.sqrt(math.prod(range(2 * power - 1, 0, -2)) - moment**2)
        assert abs((drawn**power).mean() - moment) < 5 * spread / math.sqrt(n), power


def test_points_lie_as_a_normal_distribution_of_the_plane_does():
    points = POINTS[torch.float64]
    x, y = points.real, points.imag
    middle = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    assert (torch.special.ndtr(x) - middle).abs().max() < 2**-17
    assert (torch.special.ndtr(y.sort().values) - middle).abs().max() < 6e-5
    for angle in torch.linspace(0, math.pi, 100, dtype=torch.float64):
        along = (x * angle.cos() + y * angle.sin()).sort().values
        assert (torch.special.ndtr(along) - middle).abs().max() < 7.5e-4
    assert ((1 - (-(x**2 + y**2) / 2).exp()).sort().values - middle).abs().max() < 7.5e-4, "the radius"
    second = torch.stack([x, y]) @ torch.stack([x, y]).T / LEVELS
    assert max(abs(x.mean()), abs(y.mean())) < 1e-12
    torch.testing.assert_close(second, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_tensor_follows_its_generator_alone(transposed: bool):
    def drawn(seed: int, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        t = torch.empty(2 * CHUNK // 64 + 1, 65)
        return normal_(t.T if transposed else t, torch.Generator().manual_seed(seed))

    before, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        one, again, other = drawn(7, 1), drawn(7, 2), drawn(8, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, again) and (one == other).double().mean() < 1e-3
    assert torch.equal(torch.get_rng_state(), state)


def test_pieces_of_a_large_tensor_and_neighbours_in_it_are_drawn_apart():
    drawn = normal_(torch.empty(3 * CHUNK + 5), torch.Generator().manual_seed(7))
    n, pieces = CHUNK, drawn[: 3 * CHUNK].view(3, CHUNK)
    for lag in (1, 2, 3, 4, 8):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 5 / math.sqrt(3 * n)
    assert all(abs((pieces[i] * pieces[j]).mean()) < 5 / math.sqrt(n) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("left_over", [0, 1, 6])
def test_a_mask_that_is_drawn_in_pieces_is_the_one_that_is_drawn_at_once(left_over: int, monkeypatch):
    ones = {"w": torch.ones(3 * CHUNK + left_over)}
    context = at_step(ParameterSpace({"w": nn.Parameter(ones["w"])}), 2)
    drawn = thinned(ones, context, 0.25, seed=7)["w"]
    pieces = (drawn[: 3 * CHUNK].view(3, CHUNK) > 0).double()
    spread = math.sqrt(3 / CHUNK)  # of the share of a piece that is kept, in units of the share
    assert (pieces.mean(1) / 0.25 - 1).abs().max() < 5 * spread and set(drawn.unique().tolist()) == {0.0, 4.0}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((pieces[i] * pieces[j]).mean() - 0.25**2) < 5 * 0.25 / math.sqrt(CHUNK), "drawn apart"
    monkeypatch.setattr(tensors, "HOST", frozenset())  # an accelerator draws all of a tensor at once
    assert torch.equal(drawn, thinned(ones, context, 0.25, seed=7)["w"])


def test_random_perturbation_shows_every_micro_batch_of_a_step_the_same_noise():
    model, batches = regression()
    before, seen = weights(model), []

    def run(batch):
        def forward_backward() -> Tensor:
            seen.append(weights(model))
            loss = loss_of(model, batch) / 2
            loss.backward()
            return loss

        return forward_backward

    engine = TwoPass(model, "random_perturbation", 0.3)
    for first in (0, 2):
        report = engine.step([run(batches[first]), run(batches[first + 1])])
        model.zero_grad()
        assert_identical(weights(model), before)
        assert_identical(seen[-2], seen[-1])
        moved = torch.cat([(seen[-1][n] - before[n]).flatten() for n in before])
        torch.testing.assert_close(moved.norm(), report.perturbation_norm.double(), rtol=1e-9, atol=0)
    assert all(not torch.equal(seen[0][n], seen[2][n]) for n in before)
    assert not torch.equal(seen[0]["0.bias"], before["0.bias"]), "a bias is a row"


def test_random_perturbation_leaves_alone_what_perturb_does_not_name():
    model, batches = regression()
    engine = TwoPass(model, "random_perturbation", 0.3, perturb="weight")
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(weights(m)))
    engine.step(backward_of(model, batches[0]))
    assert {n for n in seen[0] if not torch.equal(seen[0][n], weights(model)[n])} == {"0.weight", "2.weight"}
