"""Norms and inner products against float64, in every layout and precision."""

from __future__ import annotations

import pytest
import torch

from hf_ssam.rules.space import PIECE, dots_of, norms_of

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T,
    "channels_last": lambda t: t.view(20, 30, 100, 100).to(memory_format=torch.channels_last),
    "strided": lambda t: t[::2, ::3],
    "expanded": lambda t: t[:, :1].expand(-1, 7),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "float64": lambda t: t.double(),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0, 0],
}


def numbers() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6000, 1000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_that_of_float64(layout):
    t = LAYOUTS[layout](numbers())
    torch.testing.assert_close(norms_of([t])[0], t.double().norm(), rtol=1e-7, atol=0)


def test_norms_of_many_tensors_are_each_ones_own():
    """Short and long ones, of every precision and layout, in an order that mixes them."""
    n, few = numbers(), numbers()[:20, :15]
    layouts = [change(n) for change in LAYOUTS.values()]
    layouts += [few.bfloat16(), few.half(), few.double(), few[::2, ::3], few.T, few * 1e30, few * 1e-30]
    sizes = [n.flatten()[:size] * 10.0**place for place, size in enumerate((1, PIECE, 511, 513, 0, 2 * PIECE - 1))]
    tensors = [t for pair in zip(layouts, 3 * sizes, strict=False) for t in pair]
    found = norms_of(tensors)
    assert torch.equal(found, torch.stack([norms_of([t])[0] for t in tensors]))
    torch.testing.assert_close(found, torch.stack([t.double().norm() for t in tensors]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dot_is_that_of_float64(layout):
    t, u = LAYOUTS[layout](numbers()), LAYOUTS[layout](numbers().flip(0))
    expected, scale = (t.double() * u.double()).sum(), t.double().norm() * u.double().norm()
    assert (dots_of([t], [u])[0] - expected).abs() <= 1e-7 * scale


def test_dot_of_tensors_laid_out_unlike():
    t = numbers()
    u = torch.randn(1000, 6000).T
    expected = (t.double() * u.double()).sum()
    assert (dots_of([t], [u])[0] - expected).abs() <= 1e-7 * t.double().norm() * u.double().norm()


@pytest.mark.slow
def test_norm_of_1e8_numbers_keeps_its_digits():
    """One after the other in float32 they would lose 4e-4 already at 1e7."""
    torch.manual_seed(0)
    t = torch.rand(100_000_000).add_(0.5)
    exact = torch.stack([part.double().square().sum() for part in t.split(2**20)]).sum().sqrt()
    torch.testing.assert_close(norms_of([t])[0], exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-18, 1e18, 1e22, 1e30])
def test_norm_neither_underflows_nor_overflows(size):
    t = numbers()[:100] * size
    torch.testing.assert_close(norms_of([t])[0], t.double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_norm_of_what_is_not_finite_is_not_finite(bad):
    t = numbers()
    t[17, 3] = bad
    assert not torch.isfinite(norms_of([t])[0])
