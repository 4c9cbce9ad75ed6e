"""A micro-batch as the parent Trainer runs it, made to run again without being counted again.

What surrounds a pass belongs to the Trainer that hosts it: whether gradients are synchronised after it, and what it
counts in. Both are put in the state that the first pass had.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers.distributed.fsdp import is_fsdp_managed_module

from ..engine.batches import batch_size, part_of
from ..engine.two_pass import TwoPass
from .checks import refuse_other_samples
from .host import Host

if TYPE_CHECKING:
    from .mixin import SSAMTrainerMixin


@dataclass
class MicroBatch:
    """One micro-batch, to be run once a pass. Called again, it is counted as computation and as nothing else.

    Attributes:
        trainer: the host.
        step: the parent's bound `training_step`.
        model: the model as the Trainer calls it.
        inputs: what the collator gave; each pass gets its own shallow copy, since `compute_loss` may pop from it.
        unwritten: a copy from before the first pass, where that wrote into the tensors (masking in place).
        num_items: `num_items_in_batch` of the whole window.
        last: whether gradients are synchronised after it.
        weight: its share of the batch that the parent was given, where that was split.
        rows: which samples of that batch these are; None for all.
        passes: how often it has run.
        calls: what the first pass called the model with, in a run's first perturbed step.
    """

    trainer: SSAMTrainerMixin
    step: Callable[..., Tensor]
    model: nn.Module
    inputs: dict[str, Any]
    num_items: Tensor | int | None
    last: bool
    weight: float = 1.0
    rows: Tensor | None = None
    passes: int = 0
    unwritten: dict[str, Any] | None = None
    calls: list[Any] | None = None

    @cached_property
    def flos(self) -> float:
        """Floating point operations of a pass over all of its samples; each count walks over every module."""
        return float(self.trainer.floating_point_ops(self.inputs))

    def __call__(self, indices: Tensor | None = None) -> Tensor:
        """Forward and backward, as the parent does them; returns the loss it reports.

        Args:
            indices: which samples to run on, shape (K,); None: all. Their loss stands for that of the whole
                micro-batch.
        """
        self.passes += 1
        inputs = self.inputs if self.unwritten is None else _cloned(self.unwritten)
        num_items, part = self.num_items, None
        if indices is not None:
            inputs = part = part_of(inputs, indices)
            num_items = self.trainer.recounted(num_items, self.inputs, part)
        with self.trainer.synchronized(self.model, self.last), self._uncounted(part), self._weighted():
            if indices is not None:
                return self.step(self.model, {**inputs}, num_items)
            with self._unwritten_kept(), self._compared():
                return self.step(self.model, {**inputs}, num_items)

    @contextlib.contextmanager
    def _unwritten_kept(self) -> Iterator[None]:
        """Keep a copy of the inputs from before the first pass, if that writes into them."""
        if self.passes > 1:
            yield
            return
        before, versions = _cloned(self.inputs), _versions(self.inputs)
        yield
        if _versions(self.inputs) != versions:
            self.unwritten = before

    @contextlib.contextmanager
    def _compared(self) -> Iterator[None]:
        """In a run's first perturbed step, refuse a host that calls the model on other samples in the second pass."""
        if not self.trainer.compares_inputs():
            yield
            return
        with recorded_calls(self.model) as calls:
            yield
        if self.calls is None:
            self.calls = calls
        elif self.calls != calls:
            refuse_other_samples(type(self.trainer))

    @contextlib.contextmanager
    def _uncounted(self, part: dict[str, Any] | None) -> Iterator[None]:
        """The parent counts the floating point operations of one pass over all of its inputs; we count the rest.

        Args:
            part: the inputs that the pass runs on, where these are not all of its own.
        """
        is_first = self.passes == 1
        with contextlib.nullcontext() if is_first else self.trainer.host_counters_kept():
            yield
        if part is not None or not is_first:
            flos = self.flos if part is None else float(self.trainer.floating_point_ops(part))
            self.trainer.current_flos += flos - (self.flos if is_first else 0.0)

    @contextlib.contextmanager
    def _weighted(self) -> Iterator[None]:
        """The parent divides a mean loss by the number of micro-batches; a part of one counts by its size."""
        whole = self.trainer.current_gradient_accumulation_steps
        self.trainer.current_gradient_accumulation_steps = whole / self.weight if self.weight != 1 else whole
        try:
            yield
        finally:
            self.trainer.current_gradient_accumulation_steps = whole

    def split(self, parts: int) -> list[MicroBatch]:
        """This micro-batch in `parts` of nearly equal size; fewer where it has fewer samples."""
        if parts == 1:
            return [self]
        size = batch_size(self.inputs)
        pieces = [piece for piece in torch.arange(size).tensor_split(parts) if len(piece)]
        return [
            dataclasses.replace(self, inputs=part_of(self.inputs, rows), weight=len(rows) / size, rows=rows)
            for rows in pieces
        ]


@contextlib.contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Any]]:
    """What `model` is called with while gradients are recorded: each tensor's shape, and its values if integers.

    Floating-point values are left out, since they may depend on the weights (adversarial examples). Reading the others
    waits for the device.
    """
    calls: list[Any] = []

    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append([_fingerprint(t) for t in _tensors((args, kwargs))])

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_floating_point() or tensor.is_complex():
        return tuple(tensor.shape), None
    return tuple(tensor.shape), hash(tensor.detach().cpu().contiguous().numpy().tobytes())


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    recursively_apply(found.append, values)
    return found


def _cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    return recursively_apply(torch.clone, inputs)


def _versions(inputs: dict[str, Any]) -> list[int]:
    """How often each tensor has been written to; inference tensors, which nothing can write to, have no such count."""
    return [t._version for t in _tensors(inputs) if not t.is_inference()]


class HostMixin(Host):
    """What a replayed micro-batch needs of the Trainer that hosts it.

    Attributes:
        host_counters: by class name, the attributes that a parent trainer's own steps count in; a second pass must
            leave them as it found them. A subclass that counts in attributes of its own adds them:
            `host_counters = {**SSAMTrainerMixin.host_counters, "MyTrainer": ("my_counter",)}`.
    """

    host_counters: dict[str, tuple[str, ...]] = {
        "SFTTrainer": ("_metrics", "_total_train_tokens"),
        "DPOTrainer": ("_metrics", "_total_train_tokens"),
        "KTOTrainer": ("_metrics", "_total_train_tokens"),
        "RewardTrainer": ("_metrics", "_total_train_tokens"),
        "TPOTrainer": ("_metrics", "_total_train_tokens"),
        "CPOTrainer": ("_stored_metrics",),
        "ORPOTrainer": ("_stored_metrics",),
        "SentenceTransformerTrainer": ("accum_loss_components",),
        "CrossEncoderTrainer": ("accum_loss_components",),
        "SparseEncoderTrainer": ("accum_loss_components",),
        "MultiVectorEncoderTrainer": ("accum_loss_components",),
    }
    _first_ascent: tuple[TwoPass, int] | None = None

    @contextlib.contextmanager
    def synchronized(self, model: nn.Module, last: bool) -> Iterator[None]:
        """The state of synchronisation in which the parent runs a micro-batch, also when it is replayed."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(last)
        try:
            with self._sync_context(model, last):
                yield
        finally:
            state._set_sync_gradients(before)

    @contextlib.contextmanager
    def host_counters_kept(self) -> Iterator[None]:
        """What second passes run in: the parent's counters stay as they are, and nothing is logged.

        Override it for state of a Trainer's own that a pass moves and that is no counter.
        """
        names = {n for base in type(self).__mro__ for n in self.host_counters.get(base.__name__, ())}
        kept = {n: copy.deepcopy(getattr(self, n)) for n in names}
        with _muted(self):
            try:
                yield
            finally:
                for name, value in kept.items():
                    setattr(self, name, value)

    def compares_inputs(self) -> bool:
        """Whether this is the first perturbed step of a run, whose passes should see the same samples."""
        engine = self.two_pass
        if engine is None or engine.rho == 0 or not self.args.replay_rng:
            return False
        first = self._first_ascent
        if first is None or first[0] is not engine:
            first = self._first_ascent = engine, engine.clock.elapsed
        return first[1] == engine.clock.elapsed

    def _sync_context(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        if last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        if self.is_deepspeed_enabled:  # its engine is told in `backward`
            return contextlib.nullcontext()
        if self.is_distributed_loading_by_transformers and is_fsdp_managed_module(self.model):
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)


@contextlib.contextmanager
def _muted(trainer: HostMixin) -> Iterator[None]:
    """Let `trainer.log` do nothing, whichever class or callback of the host calls it."""
    attributes = vars(trainer)
    own = {"log": attributes["log"]} if "log" in attributes else {}
    attributes["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del attributes["log"]
        attributes.update(own)
