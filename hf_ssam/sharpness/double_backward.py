"""Which operation cannot be differentiated twice, said in one sentence instead of an autograd trace."""

from __future__ import annotations

import re

from torch import Tensor

_WAY_OUT = "load the model with attn_implementation='eager' or 'sdpa', or replace the layer that calls it"

_NAMED = (
    r"derivative for '?([\w:]+)'? is not implemented",
    r"[Dd]ouble backwards? is not supported for ([\w ]+?)(?: due| when|\.|,|$)",
    r"([\w.]+) (?:with aot_autograd )?does not (?:currently )?support double backward",
)
_ONCE = "once_differentiable"


def unsupported(error: RuntimeError, loss: Tensor) -> NotImplementedError | None:
    """The error to raise instead of `error`, or None where `error` is about something else.

    Args:
        error: what autograd raised while the gradient of `loss` was differentiated.
        loss: the scalar whose graph is searched for functions marked `once_differentiable`, which autograd's own
            message does not name.
    """
    message = str(error)
    for pattern in _NAMED:
        found = re.search(pattern, message)
        if found:
            return _sentence(found.group(1))
    if _ONCE in message:
        return _sentence(", ".join(sorted(_once_differentiable(loss))) or "a custom autograd function")
    return None


def _sentence(name: str) -> NotImplementedError:
    return NotImplementedError(f"model: `{name}` has no double backward, so the Hessian cannot be taken; {_WAY_OUT}.")


def _once_differentiable(loss: Tensor) -> set[str]:
    """Names of the Python autograd functions under `loss` whose backward `once_differentiable` has wrapped."""
    seen, names, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is not None and hasattr(function.backward, "__wrapped__"):
            names.add(function.__name__)
    return names
