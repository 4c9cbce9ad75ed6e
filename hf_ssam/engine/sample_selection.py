"""Which samples the passes of a step run on: what a method's selection sees, picks and learns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..methods.method import Rules
from ..rules.selection import Draw, Selection
from ..rules.state import MethodState
from .forward_recorder import ForwardRecorder, PerSampleLoss, RecordedForward
from .logit_gradients import LogitGradients
from .per_sample import per_sample_losses
from .ranks import Ranks
from .replay import Replay
from .window import AccumulationWindow, MicroBatchRecord


def observers_of(
    rules: Rules,
    method: str,
    model: nn.Module,
    replay: Replay,
    per_sample_loss: PerSampleLoss | None,
    dataset_size: int | None,
) -> tuple[ForwardRecorder | None, SampleSelection | None, LogitGradients | None]:
    """What looks at the passes of a method: nothing, unless it runs some on a part of the batch, or keeps logits'
    gradients."""
    logits = LogitGradients(model, method) if rules.keeps_logit_gradient else None
    if rules.selection is None:
        return (ForwardRecorder(model, None, replay) if rules.per_example else None), None, logits
    recorder = ForwardRecorder(model, per_sample_loss or partial(per_sample_losses, model), replay)
    return recorder, SampleSelection(rules.selection, method, recorder, dataset_size), logits


class SampleSelection:
    """Carries out a method's selection; built only for a method that selects.

    Args:
        selection: the method's.
        method: its name, for messages.
        recorder: what sees the losses of samples.
        dataset_size: number of samples in the data set, for methods that keep a score of each.
    """

    def __init__(self, selection: Selection, method: str, recorder: ForwardRecorder, dataset_size: int | None):
        self._selection, self._method, self._recorder = selection, method, recorder
        self._learns, self._size = selection.learn is not None, dataset_size or 0

    def pick(self, record: MicroBatchRecord, state: MethodState, step: int, ranks: Ranks, position: int) -> None:
        """Choose the samples that both passes of a micro-batch run on.

        Raises:
            ValueError: if the method must know which samples they are, and was not told, or not right.
        """
        before = self._selection.before
        if before is None and not self._learns:
            return
        if record.ids is None:
            raise ValueError(
                f"samples: method `{self._method}` needs the dataset index of each sample; pass samples=indices, "
                "shape (B,), with each batch."
            )
        self._check_ids(record.ids)
        record.ids = record.ids.to(ranks.device)
        if before is None:
            return
        record.index = before(Draw(record.ids, state, step, ranks.place(position)))
        record.first = len(record.index) / len(record.ids)

    def narrow(self, record: MicroBatchRecord) -> Tensor | None:
        """The samples of the second pass, which may take a look at the losses where the weights are now."""
        if self._selection.between is None:
            return record.index
        record.looks = 1.0
        return self._selection.between(record.forward.losses, self._recorder.again(record.forward))

    def note(self, record: MicroBatchRecord, index: Tensor | None, forward: RecordedForward) -> None:
        """Write down what the second pass of a micro-batch cost, and by how much its losses rose."""
        if index is None or index is record.index:
            record.second = record.first
        else:
            record.second = len(index) / record.forward.size
        if self._learns:
            record.rises = forward.losses - record.forward.losses

    def learn(self, window: AccumulationWindow, state: MethodState, ranks: Ranks) -> None:
        """Take what the losses of a window tell into the scores, from all ranks."""
        if self._selection.learn is not None:
            known = [r.ids if r.index is None else r.ids[r.index] for r in window.records if r.ids is not None]
            ids = ranks.gathered(torch.cat(known))
            rises = ranks.gathered(torch.cat([r.rises.float() for r in window.records]))
            self._selection.learn(ids, rises, state, self._size)

    def check(self, state: MethodState) -> None:
        """Refuse scores of another data set.

        Raises:
            ValueError: if their number is not the data set's.
        """
        for name in self._selection.scores:
            scores = state.plain(name)
            if scores is not None and len(scores) != self._size:
                raise ValueError(
                    f"dataset_size: the state holds scores of {len(scores)} samples and the data set has "
                    f"{self._size}; resume with the data set that the state was saved with, or start a new run."
                )

    def _check_ids(self, ids: Tensor) -> None:
        """Indices on the host are checked; those on a device are not, which would wait for it (law 7)."""
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._size:
            raise ValueError(
                f"samples: indices from {int(ids.min())} to {int(ids.max())} are not all of a data set of "
                f"{self._size}; pass each sample's index in the data set, and its size as dataset_size."
            )
