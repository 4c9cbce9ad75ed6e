"""Running the micro-batches of a window at `w` and at `w + e`: the same function twice, and `w` comes back.

Where the model alone holds its weights, on the CPU, they change places: `w + e` is computed into other memory, which
is the parameters' until the weights come back, and `w` is not written to at all. That moves 12 bytes a float32 number.
Writing in place beside a copy moves 28, and is the way wherever an address must stay or, as far as torch knows,
somebody else looks at the memory: on a GPU, for shards, for weights that are views of a larger tensor, have a view or
are shared with other processes. What torch does not know of, such as a NumPy array below a weight, shows `w` then.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..rules.snapshot import Snapshot
from ..rules.space import ParameterSpace
from ..rules.state import MethodState
from ..rules.tensors import ALIGNMENT, Vector, add_into, current, holders, move, parts, read
from .adapters import Adapters
from .forward_recorder import ForwardRecorder, RecordedForward
from .logit_gradients import LogitGradients
from .precision import is_low_precision, survival, warn_if_lost
from .ranks import Ranks
from .replay import Replay
from .sample_selection import SampleSelection
from .squared_gradients import squared_gradients
from .window import AccumulationWindow, MicroBatchRecord, Offset


class InPlace:
    """Weights that are written to, beside a copy of them.

    Args:
        space: the parameters.
        names: which of them move.
        offload: keep the copy in host memory.

    Attributes:
        before: what was written to, as it was.
    """

    def __init__(self, space: ParameterSpace, names: Sequence[str], offload: bool):
        self._space, self._w = space, space.weights(names)
        self._snapshot = Snapshot(space.stored(names), offload)
        self.before = self._snapshot.copies

    def move(self, u: Vector, rho: float, spent: bool) -> None:
        """`w ← w + ρ u`; a `spent` direction may be overwritten."""
        move(self._w, u, rho, spent)

    def restore(self) -> None:
        """Write the copy back, and let its memory be lent again."""
        self._snapshot.restore()
        self._space.rebind(self._w)
        self._snapshot.release()


class Exchange:
    """Parameters that are in other memory meanwhile.

    Args:
        params: those that move; nobody else looks at their memory.

    Attributes:
        before: the weights as they are, in their own memory.
    """

    def __init__(self, params: Sequence[nn.Parameter]):
        self._params, self._workspace = params, current()
        self.before = [p.detach() for p in params]
        # files leave weights at any address, and a product may round otherwise at another one modulo ALIGNMENT
        self._elsewhere = [self._workspace.borrow(t, offset=t.data_ptr() % ALIGNMENT) for t in self.before]

    def move(self, u: Vector, rho: float, spent: bool) -> None:
        """Let the parameters be `w + ρ u`, the bits that `InPlace` leaves; no direction is overwritten."""
        others, factor = parts(u)
        add_into(self._elsewhere, self.before, others.values(), float(factor * rho))
        self._place(self._elsewhere)

    def restore(self) -> None:
        """Put the weights back; interrupted, it may be called again.

        What looks at the other memory, a view that the second pass left, keeps looking at the parameter's, which is
        there from then on.
        """
        home = list(self.before)
        for i, (p, elsewhere) in enumerate(zip(self._params, self._elsewhere, strict=True)):
            if holders(elsewhere) > 1 + (p.data_ptr() == elsewhere.data_ptr()):
                home[i] = elsewhere.copy_(self.before[i])
                self._workspace.give_away(elsewhere)
        self._place(home)
        self._workspace.take_back(self._elsewhere)

    def _place(self, memory: list[Tensor]) -> None:
        for p, tensor in zip(self._params, memory, strict=True):
            p.data = tensor
        # autograd must refuse to go back through what was computed with the other weights
        torch.autograd.graph.increment_version(self._params)


class Displacement:
    """`w ← w + ρ u` until the block ends: `with displacement.by(u, rho): …`.

    One object for the whole of a training run: it measures once what rounding leaves of a step, where a perturbed
    weight is in low precision.

    Args:
        space: the parameters.
        offload: keep the copy of the weights in host memory.
    """

    def __init__(self, space: ParameterSpace, offload: bool):
        self._space, self.offload = space, offload
        self._moved: InPlace | Exchange | None = None
        self._survival_known = False

    def by(self, u: Vector, rho: float, spent: bool = False, known: Container[str] = ()) -> Displacement:
        """Move by `ρ u`. Only inside `with` is it undone.

        Args:
            u: the direction.
            rho: how far.
            spent: whether the tensors of `u` may be overwritten.
            known: names of weights that the step itself looks at once, and not before they are back.
        """
        names = list(parts(u)[0])
        self._moved = self._way(names, u, known)
        try:
            self._moved.move(u, rho, spent and self._survival_known)
            self._space.refresh_model()
            torch.clear_autocast_cache()  # one autocast context around both passes would show the second stale casts
            self._check_survival(names, u, rho, self._moved.before)
        except BaseException:
            self.restore()
            raise
        return self

    def __enter__(self) -> Displacement:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the weights back, if they are not."""
        if self._moved is not None:
            self._moved.restore()
            self._moved = None
            torch.clear_autocast_cache()

    def _way(self, names: list[str], u: Vector, known: Container[str]) -> InPlace | Exchange:
        waits = isinstance(read(parts(u)[1]), Tensor)  # the length of u is on a device, whose host must not wait
        if not waits and self._space.alone(names, known):
            return Exchange([self._space.params[n] for n in names])
        return InPlace(self._space, names, self.offload)

    def _check_survival(self, names: list[str], u: Vector, rho: float, before: list[Tensor]) -> None:
        """Once, and only where a perturbed weight is in low precision: measure what rounding left of the step."""
        if self._survival_known or not names:
            return
        self._survival_known = True
        w = self._space.weights(names)
        if is_low_precision(list(w.values())):
            lowest = max((t.dtype for t in w.values()), key=lambda dtype: torch.finfo(dtype).eps)
            warn_if_lost(survival(w, before, u, rho), lowest, rho)


class Passes:
    """Runs passes, and nothing else: it knows no method and computes no gradient.

    Args:
        ranks: how gradients are synchronised.
        replay: what makes the second pass the same function as the first.
        displacement: what moves the weights.
        recorder: what sees the model being called, for methods that run on some of the samples; None: nothing does.
        selection: which samples; None: all.
        logits: what gives the second pass the first one's gradient at the logits; None: nothing does.
        adapters: what has its part in LoRA layers; None: nothing has.
    """

    def __init__(
        self,
        ranks: Ranks,
        replay: Replay,
        displacement: Displacement,
        recorder: ForwardRecorder | None,
        selection: SampleSelection | None,
        logits: LogitGradients | None,
        adapters: Adapters | None,
    ):
        self.ranks, self.displacement, self._replay, self.adapters = ranks, displacement, replay, adapters
        self._recorder, self._selection, self._logits = recorder, selection, logits

    def window(
        self, rho: float, loss_scale: float | Tensor | None, first_offset: Offset, position: int
    ) -> AccumulationWindow:
        """An empty window, with the buffers as they are."""
        buffers = self._replay.snapshot_buffers()
        return AccumulationWindow(rho, loss_scale, buffers, self.ranks.buffers_due, first_offset, position)

    def squared_gradients(self, window: AccumulationWindow, space: ParameterSpace) -> Callable[[Vector, int], Vector]:
        """See `engine.squared_gradients`."""
        return squared_gradients(window, space, self.ranks, self._replay)

    @property
    def take_indices(self) -> bool:
        """Whether passes are run on some of a batch's samples."""
        return self._recorder is not None

    def check_scores(self, state: MethodState) -> None:
        """See `SampleSelection.check`."""
        if self._selection is not None:
            self._selection.check(state)

    def learn(self, window: AccumulationWindow, state: MethodState) -> None:
        """See `SampleSelection.learn`."""
        if self._selection is not None:
            self._selection.learn(window, state, self.ranks)

    def first(self, window: AccumulationWindow, record: MicroBatchRecord, state: MethodState, step: int) -> Tensor:
        """Run a micro-batch at `w`, or at the window's first offset, on the samples that the method picks.

        Returns:
            Its loss.
        """
        record.rng = self._replay.snapshot_rng()
        if self._selection is not None and window.rho > 0:
            self._selection.pick(record, state, step, self.ranks, window.position + len(window.records))
        window.records.append(record)
        window.share = window.share + record.share
        offset = window.first_offset.u
        with self.displacement.by(offset, window.rho) if offset else nullcontext(), self._watched(window, record):
            loss, record.forward = self._run(window, record, record.index)
        window.loss = loss if len(window.records) == 1 else window.loss + loss
        return loss

    def second(self, window: AccumulationWindow) -> Tensor:
        """Run the window once more, where the weights are now; returns the sum of its losses."""
        self.ranks.buffers_due = window.buffers_due
        with self._replay.replaying(window.buffers_seen):
            losses = [self._again(window, record) for record in window.records]
        return sum(losses[1:], losses[0])

    def _again(self, window: AccumulationWindow, record: MicroBatchRecord) -> Tensor:
        index = record.index if self._selection is None else self._selection.narrow(record)
        if record.rng is not None:
            record.rng.restore()
        with nullcontext() if self._logits is None else self._logits.given(record.logit_gradients):
            loss, forward = self._run(window, record, index)
        record.second = record.first
        if self._selection is not None:
            self._selection.note(record, index, forward)
        return loss

    @contextmanager
    def _watched(self, window: AccumulationWindow, record: MicroBatchRecord) -> Iterator[None]:
        """What a first pass runs in, where the method asks for more than its gradient."""
        with ExitStack() as stack:
            if self.adapters is not None and window.rho > 0:
                stack.enter_context(self.adapters.shown())
            if self._logits is not None and window.rho > 0:
                record.logit_gradients = stack.enter_context(self._logits.kept())
            yield

    def _run(
        self, window: AccumulationWindow, record: MicroBatchRecord, index: Tensor | None
    ) -> tuple[Tensor, RecordedForward]:
        recording: AbstractContextManager[RecordedForward] = nullcontext(RecordedForward())
        if self._recorder is not None and window.rho > 0:
            recording = self._recorder.recording(record.labels_of(index))
        with self.ranks.context(), recording as forward:
            loss = record.run() if index is None else record.run(index)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"run_pass: it returned {_described(loss)}; return the loss, a tensor of one number, after its "
                "backward."
            )
        return loss.detach().reshape(()), forward


def _described(loss: Any) -> str:
    return f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__} {loss!r}"
