"""Gives the second pass the first one's gradient at the logits, for any `run_pass` and any loss.

The gradient at the logits is seen, and in the second pass replaced, where it enters the node of the autograd graph
that made them. So the host computes its loss as it always does, and what reaches the parameters is `J(w + e)ᵀ G`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Exchange = Callable[[Tensor], Tensor | None]
"""`gradient at the logits -> the one to go on with`, or None to leave it."""


class LogitGradients:
    """Looks on while passes run; of each call of the model that records gradients it keeps one tensor of logits' size.

    Args:
        model: the model, unwrapped.
        method: its name, for what is refused.
    """

    def __init__(self, model: nn.Module, method: str):
        self._model, self._method = model, method

    @contextlib.contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """A first pass; the list holds the gradients at the logits, one a call, once it is over.

        Raises:
            ValueError: if the model's output has no logits, or no gradient came to them.
        """
        found: list[Tensor | None] = []

        def keep(call: int) -> Exchange:
            found.append(None)

            def exchange(gradient: Tensor) -> None:
                found[call] = gradient.detach().clone()

            return exchange

        with self._exchanging(keep):
            yield found
        if not found or any(g is None for g in found):
            raise ValueError(
                f"model: no gradient came to the `logits` of {type(self._model).__name__}, whose loss is computed "
                "from something else (a fused kernel, a compiled graph); turn that off, or choose a method other than "
                f"{self._method}, such as ssam."
            )

    @contextlib.contextmanager
    def given(self, gradients: list[Tensor]) -> Iterator[None]:
        """A second pass, which goes on with `gradients` in place of its own."""
        with self._exchanging(lambda call: lambda gradient: gradients[call].to(gradient.dtype)):
            yield

    @contextlib.contextmanager
    def _exchanging(self, exchange_of: Callable[[int], Exchange]) -> Iterator[None]:
        calls = 0

        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            nonlocal calls
            logits = self._logits(outputs)
            if logits.requires_grad:
                _exchange(logits, exchange_of(calls))
                calls += 1

        handle = self._model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _logits(self, outputs: Any) -> Tensor:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"model: the output of {type(self._model).__name__} has no `logits`, whose gradient {self._method} "
                "keeps; let its forward return them, or choose another method, such as ssam."
            )
        return logits


def _exchange(logits: Tensor, exchange: Exchange) -> None:
    """Let `exchange` see the gradient that comes to `logits`, before any conversion of what the loss has used.

    Accelerate hands on a float32 copy of what an autocast forward returns; the loss was computed from the original.
    """
    node, output = logits.grad_fn, logits.output_nr
    while node is not None and node.name().startswith("ToCopyBackward"):
        node, output = node.next_functions[0]
    if node is None:
        logits.register_hook(exchange)
        return

    def before(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        if gradients[output] is None:
            return None
        new = exchange(gradients[output])
        return None if new is None else (*gradients[:output], new, *gradients[output + 1 :])

    node.register_prehook(before)
