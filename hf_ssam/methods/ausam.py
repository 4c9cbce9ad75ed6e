"""AUSAM (Deng, Pang, Zhang, Guo, AAAI 2025).

    both passes on α|B| samples, drawn by how much each one's loss has risen under perturbation so far

The paper's formula could not be read: its abstract says that samples are drawn by an average difference of losses, and
the form below is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..rules.ascent import normalize
from ..rules.selection import Draw, Selection, kept
from ..rules.state import MethodState
from .esam import SEED
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Asymptotic Unbiased Sample Sampling to Speed Up Sharpness-Aware Minimization",
    "Deng, Jiaxin and Pang, Junbiao and Zhang, Baochang and Guo, Guodong",
    "AAAI Conference on Artificial Intelligence",
    2025,
    "2406.08001",
    "deng2025asymptotic",
)

MEAN, COUNT = "samples.mean", "samples.count"


def by_rise(alpha: float, s_min: float, s_max: float, seed: int) -> Callable[[Draw], Tensor]:
    """`⌈α B⌉` samples without replacement, with weights from `s_min` to `s_max` by their average rise so far.

    `p_i = s_min + (s_max − s_min)(a_i − min a)/(max a − min a)`, all `s_max` where the a are equal; a sample never
    seen counts as the batch's largest. The mean over the drawn samples is taken unweighted: an importance weight
    (Horvitz-Thompson) would have to enter the loss, which belongs to the model. Drawn as the largest p_i / E_i with
    E_i exponential, which is drawing one after the other without replacement, and asks nothing of the host.
    """

    def before(draw: Draw) -> Tensor:
        mean, count = (scores(draw.state, name, draw.ids) for name in (MEAN, COUNT))
        seen = count > 0
        low = mean.masked_fill(~seen, math.inf).min()
        high = mean.masked_fill(~seen, -math.inf).max()
        span = high - low
        place = torch.where(seen & (span > 0), (mean - low) / span, 1.0)
        generator = torch.Generator(draw.ids.device)
        generator.manual_seed((seed * 1_000_003 + draw.step) * 1_000_003 + draw.position)
        waits = torch.empty_like(mean).exponential_(generator=generator)
        weights = s_min + (s_max - s_min) * place
        return (weights / waits).topk(kept(alpha, len(mean))).indices.sort().values

    return before


def scores(state: MethodState, name: str, ids: Tensor) -> Tensor:
    """The scores of samples `ids`, zero before the first step."""
    table = state.plain(name)
    return torch.zeros(len(ids), device=ids.device) if table is None else table[ids]


def average_rise(ids: Tensor, rises: Tensor, state: MethodState, size: int) -> None:
    """Keep, for each sample of the step, the average of its rises and how many there were.

    A sample that was drawn twice in the step counts twice. Costs what the step's samples cost, not the data set.

    Args:
        ids: dataset indices of all ranks, shape (K,).
        rises: `ℓ_i(w + e) − ℓ_i(w)`, shape (K,).
        state: takes the scores, two tensors of shape (size,).
        size: number of samples in the data set.
    """
    if state.plain(MEAN) is None:
        state.stage_plain({name: torch.zeros(size, device=ids.device) for name in (MEAN, COUNT)})
    same = (ids[:, None] == ids[None, :]).float()
    times, total = same.sum(1), same @ rises.float()
    mean, count = (scores(state, name, ids) for name in (MEAN, COUNT))
    state.stage_rows(MEAN, ids, mean + (total - times * mean) / (count + times))
    state.stage_rows(COUNT, ids, count + times)


def ausam(alpha: float, s_min: float, s_max: float, seed: int) -> Rules:
    """SAM on a drawn share of the samples; with all of them kept it is SAM.

    Raises:
        ValueError: if the least weight is above the largest.
    """
    if s_min > s_max:
        raise ValueError(
            f"optim_args: s_min={s_min} is above s_max={s_max} for method `ausam`; choose s_min <= s_max."
        )
    if alpha == 1:
        return Rules(normalize)
    picks = Selection(before=by_rise(alpha, s_min, s_max, seed), learn=average_rise, scores=(MEAN, COUNT))
    return Rules(normalize, selection=picks, stateful=True)


METHOD = Method(
    "ausam",
    "AUSAM: SAM on α|B| samples, drawn by how much each one's loss has risen under perturbation so far.",
    ausam,
    rho=0.05,
    paper=PAPER,
    when="When a step may cost no more than without SAM, over many epochs of one data set.",
    options={
        "alpha": Option(0.5, "α: share of the samples in both passes; 0.5 costs as much as no SAM", 0.0, 1.0, True),
        "s_min": Option(0.5, "weight of the least risen (our choice, by a small trial)", 0.0, 1.0, True),
        "s_max": Option(1.0, "weight of the most risen (our choice)", 0.0, 1.0, True),
        "seed": SEED,
    },
    passes="2α",
    experimental="the paper's formula for drawing samples could not be read; this form is ours",
)
