"""Sparse SAM (Mi et al., NeurIPS 2022, arXiv 2210.05177; and its systematic investigation, 2023, arXiv 2306.17504).

e = ρ M ⊙ g/‖g‖        d = ∇L(w + e)

fisher     M = the coordinates with the largest F_j = Σ_i (∂ℓ_i/∂w_j)²
dynamic    M drops its smallest |g| and grows at random, as in sparse training
tensor     whole tensors, by their mean F                                           (the second paper)
N:M        of every M coordinates that meet in a product, the N with the largest F  (the second paper)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ..rules.ascent import normalize
from ..rules.context import StepContext, chain
from ..rules.masks import Refresh, kept_count, largest, masked, n_of_m
from ..rules.noise import uniform
from ..rules.rows import whole_rows
from ..rules.space import ParameterSpace
from ..rules.tensors import Vector
from .esam import SEED
from .method import Check, Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach",
    "Mi, Peng and Shen, Li and Ren, Tianhe and Zhou, Yiyi and Sun, Xiaoshuai and Ji, Rongrong and Tao, Dacheng",
    "Advances in Neural Information Processing Systems, 35",
    2022,
    "2210.05177",
    "mi2022make",
)


def fisher(sparsity: float, samples: int) -> Refresh:
    """The `int(N (1 − s))` coordinates with the largest empirical Fisher information, over all tensors."""

    def refresh(v: Vector, mask: Vector, context: StepContext) -> Vector:
        return largest(context.space, context.fisher(v, samples), kept_count(context.space, v, sparsity))

    return refresh


def fisher_tensors(sparsity: float, samples: int) -> Refresh:
    """Whole tensors in the order of their mean Fisher information, until `int(N (1 − s))` coordinates are reached."""

    def refresh(v: Vector, mask: Vector, context: StepContext) -> Vector:
        information = context.fisher(v, samples)
        sizes = torch.tensor([float(context.space.numel([n])) for n in v], dtype=torch.float64)
        mean = context.space.norms({n: t.sqrt() for n, t in information.items()}).double().square()
        mean = mean / sizes.to(mean.device)
        order = mean.argsort(descending=True, stable=True)
        before = sizes.to(mean.device)[order].cumsum(0) - sizes.to(mean.device)[order]
        kept = torch.zeros_like(mean, dtype=torch.bool)
        kept[order] = before < kept_count(context.space, v, sparsity)
        return {n: k.to(t.device).expand_as(t).clone() for (n, t), k in zip(v.items(), kept, strict=True)}

    return refresh


def fisher_n_of_m(n: int, m: int, samples: int) -> Refresh:
    """In each group of `m` inputs of a weight the `n` with the largest Fisher information; vectors are whole."""

    def refresh(v: Vector, mask: Vector, context: StepContext) -> Vector:
        information = context.fisher(v, samples)
        return {k: n_of_m(t, n, m, k in context.space.transposed) for k, t in information.items()}

    return refresh


def dynamic(sparsity: float, drop_rate: float, seed: int) -> Refresh:
    """A random mask that then loses its smallest |v| and grows as many others at random.

    The share that is exchanged falls as `½ drop_rate (1 + cos π t)`, where t is how far the run is; a host that does
    not say how long the run is keeps it at `drop_rate`.
    """

    def refresh(v: Vector, mask: Vector, context: StepContext) -> Vector:
        noise = uniform(v, context, seed)
        live = kept_count(context.space, v, sparsity)
        if mask.keys() != v.keys():
            return largest(context.space, noise, live)
        rate = 0.5 * drop_rate * (1 + math.cos(math.pi * context.progress))
        stay = max(int(live * (1 - rate)), 2 * live - context.space.numel(v))
        stays = largest(context.space, {n: t.abs() for n, t in v.items()}, stay, among=mask)
        grown = largest(context.space, noise, live - stay, among={n: ~t for n, t in mask.items()})
        exchanged = {n: stays[n] | grown[n] for n in v}
        known = context.state.plain("mask.filled")  # false while every step so far overflowed: the mask there is zeros
        if known is None:
            return exchanged
        fresh = largest(context.space, noise, live)
        return {n: torch.where(known.to(t.device), t, fresh[n]) for n, t in exchanged.items()}

    return refresh


def read_n_of_m(structure: str) -> tuple[int, int]:
    """`"2:4"` as (2, 4).

    Raises:
        ValueError: if it is not of that form, or N is not from 1 to below M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", structure)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        raise ValueError(
            f"optim_args: structure={structure} is not allowed for method `sparse_sam`; choose element, tensor, "
            "or N:M with 1 <= N < M, such as structure=2:4."
        )
    return int(found[1]), int(found[2])


def divides(m: int) -> Callable[[ParameterSpace, tuple[str, ...]], None]:
    """A check that groups of `m` fit every weight that is perturbed, on every shard."""

    def check(space: ParameterSpace, names: tuple[str, ...]) -> None:
        whole_rows(space, names)
        for name, w in space.weights(names).items():
            inputs = w.shape[0] if name in space.transposed else w[0].numel() if w.dim() > 1 and len(w) else m
            if w.dim() > 1 and inputs % m:
                raise ValueError(
                    f"optim_args: groups of {m} do not divide the {inputs} inputs of `{name}`; choose an M that does, "
                    "structure=element, or leave the parameter out with `perturb`."
                )

    return check


def whole_gradients(space: ParameterSpace, names: tuple[str, ...]) -> None:
    """Refuse sharded parameters: their gradients are averaged over ranks before anyone sees one sample's."""
    if space.is_sharded:
        raise ValueError(
            "optim_args: mask=fisher needs the gradient of each sample, which a sharded model averages over ranks; "
            "choose mask=dynamic, or train with DDP."
        )


def sparse_sam(
    mask: str, sparsity: float, structure: str, update_freq: int, num_samples: int, drop_rate: float, seed: int
) -> Rules:
    """`e = ρ M ⊙ g/‖g‖`; a mask that leaves nothing out is SAM.

    Raises:
        ValueError: if a dynamic mask is asked to have a structure, or the structure cannot be read.
    """
    if sparsity == 0 and structure == "element":
        return Rules(normalize)
    if mask == "dynamic" and structure != "element":
        raise ValueError(
            f"optim_args: structure={structure} is not allowed with mask=dynamic; choose mask=fisher, or "
            "structure=element."
        )
    checks: tuple[Check, ...] = ()
    if mask == "dynamic":
        refresh = dynamic(sparsity, drop_rate, seed)
    else:
        refresh, checks = _fisher(structure, sparsity, num_samples)
    rule = chain(normalize, masked(refresh, update_freq))
    return Rules(rule, per_example=mask == "fisher", checks=checks, stateful=True)


def _fisher(structure: str, sparsity: float, samples: int) -> tuple[Refresh, tuple[Check, ...]]:
    if structure == "element":
        return fisher(sparsity, samples), (whole_gradients,)
    if structure == "tensor":
        return fisher_tensors(sparsity, samples), (whole_gradients,)
    n, m = read_n_of_m(structure)
    return fisher_n_of_m(n, m, samples), (whole_gradients, divides(m))


METHOD = Method(
    "sparse_sam",
    "Sparse SAM: the gradient at w + ρ M ⊙ g/‖g‖ with a mask M of the coordinates that matter.",
    sparse_sam,
    rho=0.05,
    paper=PAPER,
    when="To study which weights need the perturbation. A mask saves no time here.",
    options={
        "mask": Option("fisher", "by Fisher information, or `dynamic`: drop and grow", choices=("fisher", "dynamic")),
        "sparsity": Option(
            0.5,
            "s: share that is not perturbed (README recipes; class default 0.2)",
            0.0,
            1.0,
            only_if=("structure", ("element", "tensor")),
        ),
        "structure": Option("element", "`element`, `tensor`, or N:M such as 2:4, which sets the sparsity itself"),
        "update_freq": Option(100, "optimizer steps between refreshes of M; the paper counts epochs", 1),
        "num_samples": Option(
            16,
            "samples of the step's batch that F is summed over (README recipe)",
            1,
            only_if=("mask", ("fisher",)),
        ),
        "drop_rate": Option(
            0.5, "share that a dynamic mask first exchanges (official code)", 0.0, 1.0, only_if=("mask", ("dynamic",))
        ),
        "seed": replace(SEED, only_if=("mask", ("dynamic",))),
    },
    passes="2, and num_samples/batch at each refresh",
)
