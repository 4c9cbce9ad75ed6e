"""Masks against brute force, and the laws of the perturbations they leave."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ssam import TwoPass, get_method
from hf_ssam.engine.parameters import transposed_names
from hf_ssam.methods.esam import random_subset
from hf_ssam.methods.sparse_sam import divides, dynamic
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.masks import largest, n_of_m
from hf_ssam.rules.space import ParameterSpace
from tests.engine.test_two_pass import loss_of, regression, sgd_with_engine
from tests.support.cases import assert_identical, weights


def space_of(**shapes) -> ParameterSpace:
    return ParameterSpace({n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()})


def at_step(space: ParameterSpace, step: int = 0, progress: float = 0.0) -> StepContext:
    return StepContext(space, {}, {}, torch.zeros(()), 0.1, step, progress=progress)


def indexed_backward(model: nn.Module, batch, calls: list | None = None):
    """A pass that can run on some of its samples; `calls` collects how many each ran on."""

    def run(indices=slice(None)):
        x, y = batch[0][indices], batch[1][indices]
        if calls is not None:
            calls.append(len(x))
        loss = loss_of(model, (x, y))
        loss.backward()
        return loss

    return run


@pytest.mark.parametrize("keep", [0, 1, 17, 40, 119, 120])
def test_the_largest_are_found_by_counting(keep):
    torch.manual_seed(0)
    scores = {"a": torch.rand(7, 10) * 1e-20, "b": torch.rand(50) * 1e3}
    mask = largest(space_of(a=(7, 10), b=(50,)), scores, keep)
    chosen = torch.cat([scores[n][mask[n]] for n in scores]).sort().values
    every = torch.cat([t.flatten() for t in scores.values()]).sort().values
    assert torch.equal(chosen, every[len(every) - keep :])


def test_ties_go_to_the_first_and_the_count_is_exact():
    scores = {"a": torch.tensor([0.0, 2.0, 1.0, 1.0]), "b": torch.tensor([1.0, 3.0, 1.0, float("inf")])}
    mask = largest(space_of(a=(4,), b=(4,)), scores, 5)
    assert mask["a"].tolist() == [False, True, True, True] and mask["b"].tolist() == [False, True, False, True]
    zeros = {"a": torch.zeros(4), "b": torch.zeros(4)}
    mask = largest(space_of(a=(4,), b=(4,)), zeros, 5)
    assert mask["a"].tolist() == [True] * 4 and mask["b"].tolist() == [True, False, False, False]


def test_only_those_among_are_chosen():
    among = {"a": torch.tensor([True, False, False, True])}
    mask = largest(space_of(a=(4,)), {"a": torch.tensor([0.0, 9.0, 9.0, 0.0])}, 2, among)
    assert mask["a"].tolist() == [True, False, False, True]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4)])
@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 1, 2), (2, 2, 2, 2)])
def test_n_of_m_keeps_the_most_of_each_group(n, m, shape):
    """Brute force over all ways to keep n of m; a convolution's groups lie within one output's inputs."""
    torch.manual_seed(0)
    score = torch.rand(shape)
    mask = n_of_m(score, n, m)
    for row, kept in zip(score.reshape(shape[0], -1), mask.reshape(shape[0], -1), strict=True):
        for group, chosen in zip(row.split(m), kept.split(m), strict=True):
            best = max(sum(group[i] for i in ways) for ways in itertools.combinations(range(m), n))
            assert chosen.sum() == n
            torch.testing.assert_close(group[chosen].sum(), best)


def test_transposed_weights_are_grouped_along_their_inputs():
    torch.manual_seed(0)
    model = nn.ModuleDict({"c": Conv1D(6, 4), "l": nn.Linear(4, 6)})
    assert transposed_names(model) == {"c.weight"}
    score = torch.rand(4, 6)
    assert torch.equal(n_of_m(score, 2, 4, transposed=True), n_of_m(score.T, 2, 4).T)
    assert n_of_m(torch.rand(5), 2, 4).all()


def test_a_dynamic_mask_keeps_its_size_and_exchanges_a_falling_share():
    torch.manual_seed(0)
    space, v = space_of(a=(20, 10), b=(100,)), {"a": torch.randn(20, 10), "b": torch.randn(100)}
    refresh = dynamic(0.6, 0.5, seed=0)
    mask = refresh(v, {}, at_step(space))
    for step, progress in ((1, 0.0), (2, 0.5), (3, 1.0)):
        new = refresh(v, mask, at_step(space, step, progress))
        live = sum(int(m.sum()) for m in new.values())
        gone = sum(int((mask[n] & ~new[n]).sum()) for n in mask)
        assert live == 120
        assert gone == 120 - int(120 * (1 - 0.25 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())))
        dropped = torch.cat([v[n][mask[n] & ~new[n]].abs() for n in v])
        stayed = torch.cat([v[n][mask[n] & new[n]].abs() for n in v])
        assert not len(dropped) or dropped.max() <= stayed.min()
        mask = new


def test_a_random_subset_is_unbiased():
    """Monte Carlo: E[u] = v, since the norm is taken over all of v before."""
    space, v = space_of(a=(6,)), {"a": torch.randn(6)}
    rule = random_subset(0.5, seed=0)
    mean = sum(rule(v, at_step(space, step))["a"] for step in range(4000)) / 4000
    torch.testing.assert_close(mean, v["a"], rtol=0, atol=0.1)


@pytest.mark.parametrize("beta", [2.0**-16, 0.3, 0.6, 1 - 2.0**-16])
def test_a_random_subset_has_its_share(beta):
    """Of a million coordinates, over pieces and a rest, as many live as chance has it, each divided by its chance."""
    size = 4 * 2**18 + 3
    u = random_subset(beta, seed=1)({"a": torch.ones(size)}, at_step(space_of(a=(size,)), 7))["a"]
    live = u != 0
    p = round(beta * 2**16) / 2**16
    assert abs(int(live.sum()) - p * size) < 6 * math.sqrt(size * p * (1 - p)) + 1
    torch.testing.assert_close(u[live], torch.full_like(u[live], 1 / p))


def test_a_random_subset_is_that_of_its_step_and_seed():
    space, v = space_of(a=(50,)), {"a": torch.ones(50)}
    at = [random_subset(0.5, seed)(v, at_step(space, step))["a"] for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5))]
    assert torch.equal(at[0], at[1])
    assert not torch.equal(at[0], at[2]) and not torch.equal(at[0], at[3])
    assert torch.equal(v["a"], torch.ones(50))


def test_a_random_subset_of_a_transposed_weight_leaves_the_weight():
    space, t = space_of(a=(30, 20)), torch.randn(20, 30).T
    u = random_subset(0.5, seed=0)({"a": t}, at_step(space, 0))["a"]
    assert set((u / t).unique().tolist()) <= {0.0, 2.0}


def trajectory(method: str, rho: float = 0.1, steps: int = 10, **options) -> tuple[nn.Module, TwoPass, list]:
    model, batches = regression()
    engine, reports = TwoPass(model, method, rho, **options), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches[:steps]:
        reports.append(engine.step(indexed_backward(model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return model, engine, reports


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": "dynamic"},
        {"structure": "tensor"},
        {"structure": "1:3", "perturb": "0.weight"},
        {"sparsity": 0.2, "update_freq": 3},
        {"mask": "dynamic", "update_freq": 2},
    ],
)
def test_the_perturbation_is_never_longer_than_the_radius(options):
    _, engine, reports = trajectory("sparse_sam", **options)
    mask = engine.state_dict()["memory"]["mask"]
    assert all(m.dtype == torch.bool for m in mask.values())
    assert all(0 < r.perturbation_norm < 0.1 for r in reports)
    if options.get("structure") is None:
        assert sum(int(m.sum()) for m in mask.values()) == int(32 * (1 - options.get("sparsity", 0.5)))


def test_without_sparsity_it_is_sam_and_with_all_of_it_the_base_optimizer():
    for options in ({}, {"mask": "dynamic"}):
        assert_identical(weights(trajectory("sparse_sam", sparsity=0.0, **options)[0]), weights(trajectory("sam")[0]))
        assert_identical(
            weights(trajectory("sparse_sam", sparsity=1.0, **options)[0]), weights(trajectory("sam", 0.0)[0])
        )


def test_the_fisher_mask_is_that_of_the_single_gradients():
    model, batches = regression()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(4):
        loss_of(model, (batches[0][0][i : i + 1], batches[0][1][i : i + 1])).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad**2
        model.zero_grad()
    every = torch.cat([t.flatten() for t in total.values()])
    threshold = every.sort(descending=True).values[int(32 * 0.7) - 1]
    engine = TwoPass(model, "sparse_sam", 0.1, sparsity=0.3, num_samples=4)
    calls: list[int] = []
    report = engine.step(indexed_backward(model, batches[0], calls))
    mask = engine.state_dict()["memory"]["mask"]
    assert all(torch.equal(mask[n], total[n] >= threshold) for n in total)
    assert calls == [6, 1, 1, 1, 1, 6]
    assert report.passes == pytest.approx(2 + 4 / 6)


def test_structured_masks_take_whole_tensors_by_their_mean_until_the_count_is_passed():
    model, batches = regression()
    engine = TwoPass(model, "sparse_sam", 0.1, structure="tensor", sparsity=0.7, num_samples=6)
    engine.step(indexed_backward(model, batches[0]))
    mask = engine.state_dict()["memory"]["mask"]
    whole = {n: bool(m.all()) for n, m in mask.items()}
    assert all(m.all() or not m.any() for m in mask.values())
    kept = [n for n, w in whole.items() if w]
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in kept) >= int(32 * 0.3) > sum(sizes[n] for n in kept) - max(sizes[n] for n in kept)


def test_an_overflow_at_the_first_refresh_does_not_turn_sam_off():
    model, batches = regression()
    engine = TwoPass(model, "sparse_sam", 0.1, mask="dynamic")
    bad = (batches[0][0] * float("inf"), batches[0][1])
    assert engine.step(indexed_backward(model, bad)).skipped
    model.zero_grad()
    report = engine.step(indexed_backward(model, batches[0]))
    torch.testing.assert_close(report.perturbation_norm, torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity=1.5 is not allowed for method `sparse_sam`; choose a number from 0 up to 1"),
        ({"structure": "4:2"}, "structure=4:2 is not allowed"),
        ({"structure": "2:4x"}, "choose element, tensor, or N:M"),
        ({"structure": "2:4", "mask": "dynamic"}, "structure=2:4 is not allowed with mask=dynamic"),
        ({"update_freq": 0}, "update_freq=0 is not allowed"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_method("sparse_sam", **options)


def test_groups_that_do_not_divide_are_refused_before_any_pass():
    model, _ = regression()
    with pytest.raises(
        ValueError, match="groups of 4 do not divide the 3 inputs of `0.weight`; choose an M that does"
    ):
        TwoPass(model, "sparse_sam", structure="2:4")


def with_batch_norm(**given) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **given), nn.Linear(4, 1)).double()
    return model, (torch.randn(6, 3).double(), torch.randn(6, 1).double())


def test_single_samples_are_normalised_by_the_running_statistics_and_move_none():
    model, batch = with_batch_norm()
    model[1].running_mean.normal_()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.eval()
    for i in range(6):
        loss_of(model, (batch[0][i : i + 1], batch[1][i : i + 1])).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad**2
        model.zero_grad()
    model.train()
    engine = TwoPass(model, "sparse_sam", 0.1, num_samples=6)
    engine.step(indexed_backward(model, batch))
    mask = engine.state_dict()["memory"]["mask"]
    kept = torch.cat([t.flatten() for t in total.values()]).sort(descending=True).values[int(29 * 0.5) - 1]
    assert all(torch.equal(mask[n], total[n] >= kept) for n in total)
    assert model[1].training and model[1].num_batches_tracked == 1


def test_a_model_that_cannot_run_on_one_sample_is_refused_with_the_way_out():
    model, batch = with_batch_norm(track_running_stats=False)
    before = weights(model)
    with pytest.raises(ValueError, match="mask=fisher runs the model on one sample at a time.*choose mask=dynamic"):
        TwoPass(model, "sparse_sam").step(indexed_backward(model, batch))
    assert all(p.grad is None for p in model.parameters()) and model[1].training
    assert_identical(before, weights(model))
    TwoPass(model, "sparse_sam", mask="dynamic").step(indexed_backward(model, batch))


@pytest.mark.parametrize(("size", "sparsity", "live"), [(10, 0.9, 1), (5, 0.8, 1), (1000, 0.9, 100), (32, 0.5, 16)])
def test_the_share_that_stays_is_not_rounded_away(size, sparsity, live):
    space, v = space_of(a=(size,)), {"a": torch.rand(size)}
    assert dynamic(sparsity, 0.5, seed=0)(v, {}, at_step(space))["a"].sum() == live


def test_fisher_passes_see_the_dropout_of_the_first_pass_and_forgive_what_is_not_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batch = (torch.randn(4, 3).double(), torch.randn(4, 1).double())
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(4):
        torch.manual_seed(7)
        indexed_backward(model, batch)(torch.tensor([i]))
        for n, p in model.named_parameters():
            total[n] += p.grad**2
        model.zero_grad()
    engine = TwoPass(model, "sparse_sam", 0.1, sparsity=0.7, num_samples=4)
    torch.manual_seed(7)
    engine.step(indexed_backward(model, batch))
    mask = engine.state_dict()["memory"]["mask"]
    kept = torch.cat([t.flatten() for t in total.values()]).sort(descending=True).values[int(41 * 0.3) - 1]
    assert all(torch.equal(mask[n], total[n] >= kept) for n in total)


def test_a_pass_that_takes_no_indices_is_refused():
    model, batches = regression()
    with pytest.raises(ValueError, match="run_pass: method `sparse_sam` runs a batch on some of its samples"):
        TwoPass(model, "sparse_sam").step(lambda: loss_of(model, batches[0]))
    sgd_with_engine(model, TwoPass(model, "sparse_sam", mask="dynamic"), batches, lr=0.1)


def test_groups_of_neighbours_are_refused_where_tensors_are_flat_pieces():
    """ZeRO 1 and 2: a vector would be kept whole, and the mask be dense in silence."""
    space = ParameterSpace({"w": nn.Parameter(torch.ones(4, 4))})
    space.is_flat = True
    with pytest.raises(ValueError, match="rows of weights, which the partitions of ZeRO"):
        divides(4)(space, ("w",))
