"""Operations that torch cannot differentiate twice: done otherwise, or named in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_WAY_OUT = "load the model with attn_implementation='eager' or 'sdpa', or replace the layer that calls it"

_NAMED = (
    r"derivative for '?([\w:]+)'? is not implemented",
    r"[Dd]ouble backwards? is not supported for ([\w ]+?)(?: due| when|\.|,|$)",
    r"([\w.]+) (?:with aot_autograd )?does not (?:currently )?support double backward",
)


class ExactWeightNorm(TorchFunctionMode):
    """Compute `g v / ‖v‖` by plain operations: the double backward of torch's fused one is wrong on the CPU (2.13).

    Under `torch.nn.utils.parametrizations.weight_norm` and the older hook of that name, as in Wav2Vec2 and HuBERT.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_weight_norm if function is torch._weight_norm else function)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def refuse_once_differentiable(loss: Tensor) -> None:
    """Refuse Python autograd functions whose backward is marked `once_differentiable`.

    Autograd itself refuses them only where the incoming gradient depends on the weights; elsewhere, such as right
    under a mean, it takes their derivative for constant and the Hessian would silently be wrong.

    Raises:
        NotImplementedError: if the graph of `loss` holds one; it is named.
    """
    names = {f.__name__ for f in _functions(loss) if _is_once_differentiable(f.backward)}
    if names:
        raise _sentence(", ".join(sorted(names)))


def unsupported(error: RuntimeError) -> NotImplementedError | None:
    """The error to raise instead of `error`, what autograd said; None where it is about something else."""
    for pattern in _NAMED:
        found = re.search(pattern, str(error))
        if found:
            return _sentence(found.group(1))
    return None


def _sentence(name: str) -> NotImplementedError:
    return NotImplementedError(f"model: `{name}` has no double backward, so the Hessian cannot be taken; {_WAY_OUT}.")


def _functions(loss: Tensor) -> set[Any]:
    """The Python autograd functions in the graph of `loss`."""
    seen, functions = set[Any](), set[Any]()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            functions.add(node._forward_cls)
    return functions


def _is_once_differentiable(backward: Callable) -> bool:
    while hasattr(backward, "__wrapped__"):
        if backward.__globals__["__name__"] == once_differentiable.__module__:
            return True
        backward = backward.__wrapped__
    return False
