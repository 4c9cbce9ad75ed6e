"""Which parameters train, which of them are perturbed, and the one name each goes by."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def deepspeed_engine(model: nn.Module) -> Any:
    """`model` where it is DeepSpeed's engine, else None; who does not use DeepSpeed does not wait for its import."""
    if sys.modules.get("deepspeed") is None:
        return None
    from deepspeed import DeepSpeedEngine

    return model if isinstance(model, DeepSpeedEngine) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, compiled or not, or DeepSpeed's engine; else the model itself."""
    engine = deepspeed_engine(model)
    if engine is not None:
        return engine.module
    return next((m.module for m in model.modules() if isinstance(m, DistributedDataParallel)), model)


def stable_name(name: str) -> str:
    """`name` without what `torch.compile` and checkpoint wrappers insert, so that state moves between runs."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad`, by stable name; tied weights appear once.

    Raises:
        ValueError: if there is none, or one is complex or gets sparse gradients.
    """
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"model: `{name}` has sparse gradients, which have no norm to perturb by; build it with sparse=False."
            )
    named = {stable_name(n): p for n, p in unwrapped(model).named_parameters() if p.requires_grad}
    for name, p in named.items():
        if p.is_complex():
            raise ValueError(
                f"model: `{name}` is complex, and a perturbation has the length of real numbers; keep its real and "
                "imaginary parts as two parameters (`torch.view_as_real`), or freeze it."
            )
    if not named:
        raise ValueError(
            f"model: no parameter of {type(unwrapped(model)).__name__} requires a gradient, so there is nothing to "
            "train; unfreeze some with `parameter.requires_grad_(True)` or add an adapter."
        )
    return named


def transposed_names(model: nn.Module) -> set[str]:
    """Weights whose first dimension is the layer's inputs: GPT-2's `Conv1D` and transposed convolutions."""
    layers = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, Conv1D)
    modules = unwrapped(model).named_modules(remove_duplicate=False)
    return {stable_name(f"{prefix}.weight".lstrip(".")) for prefix, m in modules if isinstance(m, layers)}


def perturbed_names(model: nn.Module, perturb: str, names: Collection[str]) -> tuple[str, ...]:
    """Those of `names` that `perturb` selects.

    Args:
        model: the model, wrapped or not.
        perturb: `all`; `norm`, the parameters of normalisation layers only (SAM-ON, Müller et al. 2023, arXiv
            2306.04226); or a regular expression searched for in the parameter names.
        names: the trainable parameters' names.

    Raises:
        ValueError: if nothing is selected, or the pattern is not a regular expression.
    """
    if perturb == "all":
        return tuple(names)
    chosen = _norm_names(model) if perturb == "norm" else _matching(names, perturb)
    selected = tuple(n for n in names if n in chosen)
    if not selected:
        raise ValueError(
            f"perturb: `{perturb}` selects no trainable parameter; choose `all`, `norm` or a pattern that matches a "
            f"name such as `{next(iter(names))}`."
        )
    return selected


def _norm_names(model: nn.Module) -> set[str]:
    modules = unwrapped(model).named_modules(remove_duplicate=False)
    layers = ((prefix, m) for prefix, m in modules if "norm" in type(m).__name__.lower())
    names = (f"{prefix}.{n}".lstrip(".") for prefix, m in layers for n, _ in m.named_parameters(recurse=False))
    return {stable_name(name) for name in names}


def _matching(names: Collection[str], pattern: str) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"perturb: `{pattern}` is not a regular expression ({error}); choose `all`, `norm` or a valid pattern."
        ) from error
    return {n for n in names if compiled.search(n)}
