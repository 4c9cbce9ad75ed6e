"""Weights that are rounded, or have noise added: what a finished model can take."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Symmetric rounding to 2^bits − 1 levels, one scale for each output channel; vectors stay as they are."""
    if weight.dim() < 2:
        return weight
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) / levels
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def noised(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of `share` times the root mean square of the tensor; vectors stay as they are."""
    if weight.dim() < 2:
        return weight
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + share * weight.square().mean().sqrt() * noise


@contextlib.contextmanager
def changed(model: nn.Module, change: Change) -> Iterator[None]:
    """The model with `change` applied to every trainable tensor; afterwards it is as it was, to the bit."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        with torch.no_grad():
            for parameter, weight in kept:
                parameter.copy_(change(weight))
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in kept:
                parameter.copy_(weight)


def damaged(
    model: nn.Module, score: Callable[[], float], bits: list[int], shares: list[float], draws: int = 10
) -> dict[str, float]:
    """The score under each rounding, and its mean over `draws` draws of each noise.

    Args:
        model: what is changed, and put back.
        score: of the model as it is now.
        bits: of the roundings.
        shares: of the noises; draw i of a share is the same for every model of these shapes.
        draws: how many.

    Returns:
        `clean`, `bits_…` and `noise_…`.
    """
    found = {"clean": score()}
    for width in bits:
        with changed(model, lambda weight, width=width: rounded(weight, width)):
            found[f"bits_{width}"] = score()
    for share in shares:
        found[f"noise_{share:g}"] = sum(_noised_score(model, score, share, seed) for seed in range(draws)) / draws
    return found


def _noised_score(model: nn.Module, score: Callable[[], float], share: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    with changed(model, lambda weight: noised(weight, share, generator)):
        return score()
