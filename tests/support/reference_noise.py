"""Normal noise the slow way, a number at a time, by the distribution of Python's own library."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist, fmean

import torch


@cache
def quantile(k: int) -> float:
    return NormalDist().inv_cdf((k + 0.5) / 2**16)


@cache
def spread() -> float:
    return math.sqrt(fmean(quantile(k) ** 2 for k in range(2**16)))


def standard_normal(n: int, stream: torch.Generator) -> list[float]:
    """Each sixteen bits of the stream choose one of 2¹⁶ equally likely quantiles, which are scaled to variance 1."""
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None, generator=stream).tolist()
    bits = [(word >> 16 * i) & 0xFFFF for word in words for i in range(4)]
    return [quantile(k) / spread() for k in bits[:n]]
