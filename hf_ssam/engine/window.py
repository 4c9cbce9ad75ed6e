"""What a step remembers between its passes: each micro-batch as its first pass saw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..rules.tensors import Vector
from .forward_recorder import NO_LOSSES, RecordedForward
from .replay import RandomState

RunPass = Callable[..., Tensor]
"""`() -> loss`, forward and backward; `(indices) -> loss` on some of its samples, for methods that select."""


@dataclass
class MicroBatchRecord:
    """One micro-batch, from the host's hands to the rules.

    Attributes:
        run: its pass.
        share: the weight its mean loss has in the batch loss.
        ids: dataset indices of its samples, shape (B,), where the method asks for them.
        labels: its labels, where the host takes them out before the model sees them.
        rng: the generators as its first pass found them; None where they are not replayed.
        index: which samples both passes run on; None: all.
        forward: the first pass's call of the model, where the method looks.
        logit_gradients: what its first pass left at the logits, by the number of the call, where the method keeps it.
        rises: what the second pass's losses were above the first's, one a sample of `index`.
        first, second, looks: cost of its passes and of forwards without gradient, as shares of its samples.
    """

    run: RunPass
    share: float | Tensor = 1.0
    ids: Tensor | None = None
    labels: Any = None
    rng: RandomState | None = None
    index: Tensor | None = None
    forward: RecordedForward = field(default_factory=RecordedForward)
    logit_gradients: dict[int, Tensor] = field(default_factory=dict)
    rises: Tensor = NO_LOSSES
    first: float = 1.0
    second: float = 0.0
    looks: float = 0.0

    def labels_of(self, index: Tensor | None) -> dict[str, Any]:
        """The labels of its samples `index`, as an input by name; empty where the host gave none."""
        if not isinstance(self.labels, Tensor):
            return {}
        return {"labels": self.labels if index is None else self.labels[index.to(self.labels.device)]}


@dataclass(frozen=True)
class Offset:
    """What first passes are displaced by.

    Attributes:
        u: in units of ρ; empty where they are taken at `w`.
        length: of `ρ u`, shape (); None where they are taken at `w`.
    """

    u: Vector = field(default_factory=dict)
    length: Tensor | None = None


@dataclass
class AccumulationWindow:
    """The passes that ascend together: all micro-batches of a step, or one of them under `micro_batch`.

    Attributes:
        rho: radius ρ.
        loss_scale: what the losses were multiplied by before backward.
        buffers_seen: the model's buffers as the first pass found them.
        buffers_due: whether DDP was about to broadcast buffers.
        first_offset: what the first passes are displaced by; nothing for most methods.
        position: how many micro-batches of the step came before the window.
        records: the micro-batches.
        loss: sum of what the first passes returned; not there before the first of them.
        share: sum of the micro-batches' shares.
        examples: passes over one sample that a rule asked for.
        at_work: whether the method had something to perturb.
    """

    rho: float
    loss_scale: float | Tensor | None
    buffers_seen: Any
    buffers_due: bool
    first_offset: Offset = field(default_factory=Offset)
    position: int = 0
    records: list[MicroBatchRecord] = field(default_factory=list)
    loss: Tensor = field(init=False)
    share: float | Tensor = 0.0
    examples: int = 0
    at_work: bool = False
