"""ESAM, AUSAM and Sparse SAM the slow way: float64, one flat vector, straight from their equations.

They need more than a gradient: the losses and gradients of single samples, which a `Problem` gives. Nothing of hf_ssam
is used here; what is drawn at random is drawn from the stream that the documentation of `rules.noise` and
`selection.by_rise` promises: torch's generator, seeded by the method's seed and the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support.reference import flat, load


@dataclass
class Problem:
    """A batch as a function of the weights.

    Attributes:
        model: what the weights are loaded into.
        losses_of: `() -> losses`, shape (B,), at the weights as they are.
        ids: dataset indices of the samples, shape (B,).
        progress: share of the run that is over.
    """

    model: nn.Module
    losses_of: Callable[[], Tensor]
    ids: Tensor
    progress: float = 0.0

    @property
    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.model.parameters()]

    def losses(self, w: Tensor) -> Tensor:
        load(self.model, w)
        return self.losses_of()

    def gradient(self, w: Tensor, index: Tensor | None = None) -> Tensor:
        losses = self.losses(w)
        loss = losses.mean() if index is None else losses[index].mean()
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))


Step = Callable[..., Tensor]


def _unit(v: Tensor) -> Tensor:
    return v / (v.norm() + 1e-12)


def _stream(seed: int, step: int, number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_003 + number)


def _uniform(problem: Problem, seed: int, step: int) -> Tensor:
    stream = _stream(seed, step)
    return flat(torch.rand(shape, generator=stream) for shape in problem.shapes)


def _sixteen_bits(problem: Problem, seed: int, step: int) -> Tensor:
    """A number from 0 to 65535 for each coordinate: four of them are one random 64-bit integer, the low end first."""
    stream, found = _stream(seed, step), []
    for shape in problem.shapes:
        words = torch.empty(math.ceil(shape.numel() / 4), dtype=torch.int64).random_(-(2**63), None, generator=stream)
        quarters = [[(int(word) >> shift & 0xFFFF) ^ 0x8000 for shift in (0, 16, 32, 48)] for word in words]
        found.append(torch.tensor(sum(quarters, []))[: shape.numel()])
    return torch.cat(found)


def esam(problem: Problem, w: Tensor, state: dict, rho: float, *, beta: float, gamma: float, seed: int = 0) -> Tensor:
    """ESAM (arXiv 2110.03141): e = ρ M ⊙ g/(β‖g‖), then the γB samples whose loss rose most."""
    step = state["t"] = state.get("t", -1) + 1
    e = rho * _unit(problem.gradient(w))
    if beta < 1:
        limit = round(beta * 2**16)
        e = e * (_sixteen_bits(problem, seed, step) < limit) * 2**16 / limit
    if gamma == 1:
        return problem.gradient(w + e)
    rises = (problem.losses(w + e) - problem.losses(w)).tolist()
    keep = max(1, math.ceil(gamma * len(rises)))
    most = sorted(range(len(rises)), key=lambda i: -rises[i])[:keep]
    return problem.gradient(w + e, torch.tensor(most))


def ausam(
    problem: Problem,
    w: Tensor,
    state: dict,
    rho: float,
    *,
    alpha: float,
    s_min: float = 0.5,
    s_max: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """AUSAM (arXiv 2406.08001), in the form that `selection.by_rise` states; every visit's rise is kept in a list."""
    step = state["t"] = state.get("t", -1) + 1
    visits = state.setdefault("visits", {})
    means = [sum(visits[i]) / len(visits[i]) if i in visits else None for i in problem.ids.tolist()]
    known = [m for m in means if m is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    place = [1.0 if m is None or high == low else (m - low) / (high - low) for m in means]
    weights = s_min + (s_max - s_min) * torch.tensor(place)
    waits = torch.empty(len(means)).exponential_(generator=_stream(seed, step))
    keep = max(1, math.ceil(alpha * len(means)))
    index = torch.tensor(sorted(range(len(means)), key=lambda i: -(weights[i] / waits[i]).item())[:keep])
    e = rho * _unit(problem.gradient(w, index))
    rises = (problem.losses(w + e) - problem.losses(w))[index].tolist()
    for i, rise in zip(problem.ids[index].tolist(), rises, strict=True):
        visits.setdefault(i, []).append(rise)
    return problem.gradient(w + e, index)


def sparse_sam(
    problem: Problem,
    w: Tensor,
    state: dict,
    rho: float,
    *,
    mask: str = "fisher",
    sparsity: float = 0.5,
    structure: str = "element",
    update_freq: int = 100,
    num_samples: int = 16,
    drop_rate: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Sparse SAM (arXiv 2210.05177, 2306.17504): e = ρ M ⊙ g/‖g‖ with the norm of all of g."""
    step = state["t"] = state.get("t", -1) + 1
    g = problem.gradient(w)
    if step % update_freq == 0:
        if mask == "dynamic":
            state["mask"] = _dynamic(problem, g, state.get("mask"), sparsity, drop_rate, seed, step)
        else:
            fisher = sum(
                problem.gradient(w, torch.tensor([i])) ** 2 for i in range(min(num_samples, len(problem.ids)))
            )
            state["mask"] = _structured(problem, fisher, sparsity, structure)
    return problem.gradient(w + rho * _unit(g) * state["mask"])


def _best(scores: Tensor, keep: int) -> Tensor:
    mask = torch.zeros(len(scores))
    mask[scores.argsort(descending=True)[:keep]] = 1
    return mask.double()


def _structured(problem: Problem, fisher: Tensor, sparsity: float, structure: str) -> Tensor:
    keep = int(len(fisher) * (1 - sparsity))
    if structure == "element":
        return _best(fisher, keep)
    parts = list(zip(fisher.split([s.numel() for s in problem.shapes]), problem.shapes, strict=True))
    if structure == "tensor":
        masks, count = [torch.zeros(len(f)) for f, _ in parts], 0
        for i in sorted(range(len(parts)), key=lambda i: -parts[i][0].mean().item()):
            if count >= keep:
                break
            masks[i] += 1
            count += len(masks[i])
        return torch.cat(masks).double()
    n, m = (int(x) for x in structure.split(":"))
    return torch.cat([_groups(f, n, m) if len(shape) > 1 else torch.ones(len(f)).double() for f, shape in parts])


def _groups(fisher: Tensor, n: int, m: int) -> Tensor:
    return torch.cat([_best(group, n) for group in fisher.split(m)])


def _dynamic(problem: Problem, g: Tensor, mask: Tensor | None, sparsity: float, drop: float, seed: int, step: int):
    noise = _uniform(problem, seed, step)
    live = int(len(g) * (1 - sparsity))
    if mask is None:
        return _best(noise, live)
    rate = 0.5 * drop * (1 + math.cos(math.pi * problem.progress))
    stay = max(int(live * (1 - rate)), 2 * live - len(g))
    stays = _best(g.abs().masked_fill(mask == 0, -1.0), stay)
    return stays + _best(noise.masked_fill(mask == 1, -1.0), live - stay)


REFERENCES: dict[str, Step] = {"esam": esam, "ausam": ausam, "sparse_sam": sparse_sam}
