"""Vectors over named parameters: arithmetic, norms that neither overflow nor lose digits, copies that are exact."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from hf_ssam.rules.snapshot import Snapshot
from hf_ssam.rules.space import ParameterSpace
from hf_ssam.rules.tensors import Workspace, added, move, multiplied, scaled


def vector(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(n, generator=generator).to(dtype) for i, n in enumerate(sizes)}


def space_of(v: dict[str, torch.Tensor]) -> ParameterSpace:
    return ParameterSpace({n: nn.Parameter(t.clone()) for n, t in v.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_and_products_equal_those_of_float64(dtype):
    u, v = vector(5, 70, 1, dtype=dtype), vector(5, 70, 1, seed=1, dtype=dtype)
    space = space_of(u)
    a, b = (torch.cat([t.double() for t in x.values()]) for x in (u, v))
    tolerance = 1e-6 if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(space.norm(u).double(), a.norm(), rtol=tolerance, atol=0)
    torch.testing.assert_close(space.dot(u, v).double(), a @ b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        space.norms(u).double(), torch.stack([t.double().norm() for t in u.values()]), rtol=tolerance, atol=0
    )


def test_half_precision_norms_do_not_overflow():
    v = {"a": torch.full((100_000,), 300.0, dtype=torch.float16)}
    assert space_of(v).norm(v).item() == pytest.approx(300 * 100_000**0.5, rel=1e-6)


def test_the_norm_of_nothing_is_zero():
    assert space_of({}).norm({}) == 0 and space_of({}).dot({}, {}) == 0


def test_arithmetic():
    u, v = vector(3, 2), vector(3, 2, seed=1)
    for got, expected in (
        (scaled(u, 2.5), {n: 2.5 * u[n] for n in u}),
        (scaled(u, torch.tensor(2.5)), {n: 2.5 * u[n] for n in u}),
        (multiplied(u, v), {n: u[n] * v[n] for n in u}),
        (added(u, v), {n: u[n] + v[n] for n in u}),
        (added(u, v, -0.5), {n: u[n] - 0.5 * v[n] for n in u}),
        (added(u, v, torch.tensor(-0.5)), {n: u[n] - 0.5 * v[n] for n in u}),
    ):
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])


def test_a_missing_tensor_counts_as_zero_in_a_sum():
    a, b = torch.ones(2), torch.ones(3)
    total = added({"a": a}, {"b": b}, 2.0)
    assert torch.equal(total["a"], a) and torch.equal(total["b"], 2 * b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [1.0, -0.7, torch.tensor(1.0), torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("factor", [-1.3, torch.tensor(0.9)], ids=str)
def test_a_sum_in_lent_memory_has_the_bits_of_a_copy_that_is_added_to(own, factor, dtype):
    u, v = vector(40, 7, dtype=dtype), vector(40, 7, 3, seed=2, dtype=dtype)
    before = {n: t.clone() for n, t in u.items()}, {n: t.clone() for n, t in v.items()}
    expected = dict(added(scaled(u, own), v, factor))
    for name, t in expected.items():
        exact = v[name].double() * float(factor) + (u[name].double() * float(own) if name in u else 0)
        torch.testing.assert_close(t.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
    workspace = Workspace()
    with workspace.in_use():
        total = added(scaled(u, own), v, factor)
        for name, t in expected.items():
            assert torch.equal(total[name], t), name
    for vectors, were in zip((u, v), before, strict=True):
        assert all(torch.equal(vectors[n], t) for n, t in were.items()), "a rule is a pure function"
    workspace.reclaim()
    assert workspace.kept == sum(t.nbytes for t in total.values()), "the sum, and no copy besides, is in lent memory"


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("size", [3, 1])
def test_tensors_are_added_by_their_names(lent, size):
    u = {"a": torch.full((3,), 1.0), "b": torch.full((size,), 10.0)}
    v = {"b": torch.full((size,), 200.0), "a": torch.full((3,), 2.0)}
    with Workspace().in_use() if lent else contextlib.nullcontext():
        for total in (added(u, v), added(v, u)):
            assert torch.equal(total["a"], torch.full((3,), 3.0))
            assert torch.equal(total["b"], torch.full((size,), 210.0))


LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda t: t[:1].expand(6, -1),
    "number": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["dense", "same"])
def test_a_sum_has_the_same_bits_however_its_vectors_lie(layout, other, dtype):
    there = LAYOUTS[layout]
    u = {"p": there(torch.randn(6, 37, generator=torch.Generator().manual_seed(0)).to(dtype))}
    v = torch.randn(6, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    v = {"p": there(v) if other == "same" else there(v).clone(memory_format=torch.contiguous_format)}
    expected = u["p"].clone().add_(v["p"], alpha=-1.3)
    with Workspace().in_use():
        assert torch.equal(added(u, v, -1.3)["p"], expected)


def test_moving_there_and_restoring_is_exact():
    w = vector(40, 7, dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in w.items()}
    for offload in (False, True):
        snapshot = Snapshot(w.values(), offload)
        move(w, vector(40, 7, seed=2, dtype=torch.bfloat16), 0.3)
        assert not torch.equal(w["p0"], before["p0"])
        snapshot.restore()
        assert all(torch.equal(w[n], before[n]) for n in w)


def test_gradients_are_written_in_place_where_there_are_some():
    space = space_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    bucket = torch.zeros(2)
    space.params["a"].grad = bucket
    space.write_grads({"a": torch.ones(2), "b": torch.ones(2)})
    assert space.params["a"].grad is bucket and torch.equal(bucket, torch.ones(2))
    assert torch.equal(space.params["b"].grad, torch.ones(2))
