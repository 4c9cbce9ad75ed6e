"""LoRA layers as rules see them: a space that is wider than what trains.

    W' = W + s B A        W frozen and perhaps quantised, A (r, in) and B (out, r) trained

A rule on adapters may show the passes of a step another `W'` than the model's, without writing to `W`: it is asked for
the output of the frozen layer. And it may look at the finished gradient of A and B before the optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .context import StepContext
from .tensors import Vector

Base = Callable[[Tensor], Tensor]
"""The frozen layer: `x -> W x + b`."""


class AdapterLayer(Protocol):
    """One LoRA layer.

    Attributes:
        name: the layer's, in the model.
        A: name of A among the trained parameters.
        B: name of B.
        scaling: s.
        in_features: number of columns of W.
        out_features: number of rows of W.
    """

    name: str
    A: str
    B: str
    scaling: float
    in_features: int
    out_features: int

    def weight(self) -> Tensor:
        """W, shape (out, in), in floating point, sharing memory with the model where it is not quantised."""

    def bias(self) -> Tensor | None:
        """b, shape (out,)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are."""


Average = Callable[[list[Tensor]], None]
"""Averages gradients that no host reduces over the ranks, in place, and brings them to units of the loss."""


class AdapterRule:
    """What a method does with LoRA layers in one step. One object serves a run and keeps nothing but caches.

    Attributes:
        layers: the model's, once the engine has found them.
        replaces_output: whether `output` is asked; otherwise any kind of LoRA layer will do.
        reads_weight: whether W itself is read, so that each rank must hold all of it.
        needs_lr: whether the step's learning rate is asked for.
        needs_length: whether the length of the run is asked for.
    """

    replaces_output = False
    reads_weight = False
    needs_lr = False
    needs_length = False

    def __init__(self) -> None:
        self.layers: Sequence[AdapterLayer] = ()

    def begin(self, context: StepContext) -> None:
        """A step begins; `context` has no gradient yet."""

    def output(self, index: int, x: Tensor, base: Base) -> Tensor:
        """What the frozen layer `index` gives for `x`, in a pass of this step."""
        return base(x)

    def finish(self, g: Vector, context: StepContext, finite: Tensor, average: Average) -> Tensor:
        """The gradient `g` is final, before the optimizer's step.

        Args:
            g: over the trained parameters, in units of the loss.
            context: of the step; what must survive it goes through `context.state`.
            finite: whether the step will be applied, bool, shape (); it stays on its device.
            average: for gradients that no host reduces.

        Returns:
            The length of the perturbation, shape ().
        """
        return torch.zeros((), device=finite.device)
