"""The Trainer: micro-batches in, `super().training_step` for every pass, the engine's state in the checkpoint.

Whatever the parent does in a step (autocast, loss scaling, label smoothing, context parallelism, backward) is done by the
parent, once a pass. What is ours is when a window begins and ends, what the passes must not count twice, and what a
checkpoint and a log entry hold in addition.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from . import refusals
from .callbacks import PREFIX, StepLog
from .checkpoints import Settings, last_whole_checkpoint, is_whole, load_state, save_state
from .methods import checked_rho
from .parameters import trainable
from .replay import unchanged
from .schedules import first_ascent, is_ascent_step, rho_factor
from .training_args import SSAMArgumentsMixin
from .two_pass import TwoPass

logger = logging.get_logger(__name__)


@dataclass
class MicroBatch:
    """One micro-batch, to be run once a pass. Called again, it is counted as computation and as nothing else.

    Attributes:
        trainer: the host.
        step: the parent's bound `training_step`.
        model: the model as the Trainer calls it.
        inputs: what the collator gave; each pass gets its own shallow copy, since `compute_loss` may pop from it.
        num_items: `num_items_in_batch` of the whole window.
        last: whether gradients are synchronised after it.
        passes: how often it has run.
    """

    trainer: SSAMTrainerMixin
    step: Callable[..., Tensor]
    model: nn.Module
    inputs: dict[str, Any]
    num_items: Tensor | int | None
    last: bool
    passes: int = 0

    def __call__(self) -> Tensor:
        """Forward and backward, as the parent does them; returns the loss it reports."""
        self.passes += 1
        with self.trainer.synchronized(self.model, self.last), self._uncounted():
            return self.step(self.model, {**self.inputs}, self.num_items)

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        if self.passes == 1:
            yield
            return
        with self.trainer.host_counters_kept():
            yield
        self.trainer.current_flos += float(self.trainer.floating_point_ops(self.inputs))


class SSAMTrainerMixin:
    """Sharpness-aware training for any Trainer: `class MyTrainer(SSAMTrainerMixin, SFTTrainer): ...`.

    The constructor is the parent's. With `optim` a name in `hf_ssam.METHODS` every optimizer step uses the gradient that
    method computes; with a stock name the parent trains as it always did.

    Attributes:
        host_counters: by class name, the attributes that a parent trainer's own steps count in; a second pass must
            leave them as it found them.
        two_pass: the engine, built anew whenever training starts; None with a stock optimizer.

    Raises:
        ValueError: for arguments of another class, an empty training set, a model without trainable parameters, or a
            sharpness-aware wrapper as `optimizers=`.
        NotImplementedError: for a parent or a kind of distribution that two passes do not work with.
    """

    host_counters: dict[str, tuple[str, ...]] = {
        "SFTTrainer": ("_metrics", "_total_train_tokens"),
        "DPOTrainer": ("_metrics", "_total_train_tokens"),
        "KTOTrainer": ("_metrics", "_total_train_tokens"),
        "RewardTrainer": ("_metrics", "_total_train_tokens"),
        "SentenceTransformerTrainer": ("accum_loss_components",),
        "CrossEncoderTrainer": ("accum_loss_components",),
        "SparseEncoderTrainer": ("accum_loss_components",),
    }

    two_pass: TwoPass | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        refusals.refuse_host(type(self))
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SSAMArgumentsMixin):
            raise ValueError(
                f"args: {type(self.args).__name__} has no `rho`; pass SSAMTrainingArguments, or a class made with "
                "SSAMArgumentsMixin."
            )
        self._step_log = StepLog()
        self._loss_count_known = False
        if self.args.is_sharpness_aware:
            self._refuse_what_cannot_work()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; a half-written checkpoint is recognised, named, and passed over where `True` was given.

        Raises:
            ValueError: if the named checkpoint was not finished, or none in the output folder was.
        """
        return super().train(self._whole_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """The base optimizer's class and arguments."""
        return super().get_optimizer_cls_and_kwargs(args.base_arguments(), model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the parent's; at the first batch, find out whether the loss does what `num_items_in_batch` asks of it."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._loss_count_known:
            self._loss_count_known = True
            if num_items is not None and self._loss_ignores_count(batches[0]):
                self.model_accepts_loss_kwargs = False
                num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; after the last of a window `.grad` is the descent gradient and the weights are untouched."""
        if self.two_pass is None:
            return super().training_step(model, inputs, num_items_in_batch)
        last = self.accelerator.sync_gradients
        run = MicroBatch(self, super().training_step, model, inputs, num_items_in_batch, last)
        if not self.two_pass.is_open:
            self.two_pass.rho = self._rho_now()
            self.two_pass.begin(self._loss_scale())
        loss = self.two_pass.first_pass(run, self._share(inputs, num_items_in_batch))
        if last:
            self._finish_step()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's; an entry that carries the training loss carries the step reports since the last one too."""
        if self.two_pass is not None and "loss" in logs:
            logs.update(self._step_log.drain(lambda t: self.accelerator.reduce(t, reduction="mean")))
        if self.two_pass is not None and "train_runtime" in logs:
            logs[PREFIX + "total_passes"] = self._step_log.total_passes
        super().log(logs, start_time)

    @contextlib.contextmanager
    def synchronized(self, model: nn.Module, last: bool) -> Iterator[None]:
        """The state of synchronisation in which the parent runs a micro-batch of a window, also when it is replayed."""
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
        """Leave what the parent's steps count in as it was."""
        names = {n for base in type(self).__mro__ for n in self.host_counters.get(base.__name__, ())}
        kept = {n: copy.deepcopy(getattr(self, n)) for n in names}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _sync_context(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        if last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        if self.is_distributed_loading_by_transformers and isinstance(self.model, FSDPModule):
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.two_pass = None
        if self.args.is_sharpness_aware:
            self._build_engine(prepared[0], max_steps, resume_from_checkpoint)
        return prepared

    def _build_engine(self, model: nn.Module, max_steps: int, resume_from_checkpoint: str | None) -> None:
        """The engine for this run. Fields are read now: a search or a smaller batch may have changed them."""
        args = self.args
        args.check_ssam()
        self._refuse_what_cannot_work()
        varies = args.ascent_interval > 1 or args.ascent_start > 0 or args.ascent_scope != "global"
        refusals.refuse_static_graph(model, varies)
        self._ascent_start = first_ascent(args.ascent_start, max_steps)
        self._rho_factor = rho_factor(args.rho_scheduler_type, max_steps)
        method = args.method()
        self.two_pass = TwoPass(
            model,
            method,
            args.rho,
            scope=args.ascent_scope,
            perturb=args.perturb,
            parameters=refusals.same_parameters(trainable(model), self.optimizer),
            replay_rng=args.replay_rng,
            offload_snapshot=args.offload_snapshot,
        )
        self._settings = Settings(method.name, method.values, checked_rho(args.rho, method), args.ascent_scope)
        self._step_log = StepLog()
        if resume_from_checkpoint is not None:
            self._load_engine(resume_from_checkpoint)

    def _refuse_what_cannot_work(self) -> None:
        refusals.refuse_launch(self)
        refusals.refuse_optimizer(self.optimizer)
        refusals.refuse_empty(self.train_dataset)
        trainable(self.model)
        if self.args.fp16 and self.accelerator.scaler is None:
            warnings.warn(
                "fp16=True has no effect on this device: Accelerate makes no gradient scaler, and the run is in float32; "
                "train on a GPU, or drop fp16.",
                UserWarning,
                stacklevel=3,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.two_pass is not None:
            state = self.two_pass.state_dict()
            save_state(output_dir, self._settings, state, self.args.should_save, self._step_log.total_passes)

    def _load_engine(self, checkpoint: str) -> None:
        state = load_state(checkpoint, self.two_pass.space.params)
        if state is None:
            logger.warning(f"{checkpoint} was saved without a sharpness-aware method; {self.args.optim} starts afresh.")
            return
        changed = self._settings.differences(state)
        if changed:
            logger.warning(f"Resuming {checkpoint} with other settings: {'; '.join(changed)}.")
        self._step_log = StepLog(state["total_passes"])
        if state["method"] == self._settings.method:
            self.two_pass.load_state_dict(state)

    def _whole_checkpoint(self, asked: str | bool | None) -> str | bool | None:
        if isinstance(asked, str | Path):
            if Path(asked).is_dir() and not is_whole(asked):
                whole, _ = last_whole_checkpoint(Path(asked).parent)
                raise ValueError(f"resume_from_checkpoint: {asked} is half-written; {_way_out(whole)}.")
            return str(asked)
        if not asked:
            return asked
        whole, broken = last_whole_checkpoint(self.args.output_dir)
        if broken and whole is None:
            raise ValueError(f"resume_from_checkpoint: {broken[0]} is half-written; {_way_out(whole)}.")
        for checkpoint in broken:
            logger.warning(f"{checkpoint} is half-written and passed over; resuming from {whole}.")
        return asked if whole is None else str(whole)

    def _rho_now(self) -> float:
        step = self.state.global_step
        if not is_ascent_step(step, self._ascent_start, self.args.ascent_interval):
            return 0.0
        lr_share = self.lr_scheduler.get_last_lr()[0] / (self.lr_scheduler.base_lrs[0] or 1.0)
        return self._settings.rho * self._rho_factor(step, lr_share)

    def _loss_scale(self) -> Tensor | None:
        """The GradScaler's scale, on its device: `get_scale` would wait for it."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def _share(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> float | Tensor:
        """The weight of this micro-batch's mean loss in the loss that the parent hands to backward."""
        if num_items is None or self.args.ascent_scope == "global":
            return 1 / self.current_gradient_accumulation_steps
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        else:
            labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() * ranks / num_items

    def _finish_step(self) -> None:
        """Close the window; a step that is not finite must not be applied, nor move the scheduler."""
        report = self.two_pass.finish()
        self._step_log.add(report)
        if self.accelerator.scaler is None:
            skipped = bool(report.skipped)
            if skipped:
                self.two_pass.space.clear_grads()
            # Accelerate sets this flag where a GradScaler skips; the Trainer reads it to hold the scheduler back.
            self.optimizer._is_overflow = skipped

    def _loss_ignores_count(self, inputs: dict[str, Any]) -> bool:
        """Whether the model takes `num_items_in_batch` and does nothing with it.

        Its loss is then a mean that the parent believes to be a share, and gradient and log are `accumulation × processes`
        times too large. Two forwards that nobody sees tell: a loss that heeds the count halves when it doubles.
        """
        alone = self.args.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
        if alone or not self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return False
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        one, two = (self._unseen_loss(model, inputs, count) for count in (1, 2))
        if not (torch.equal(one, two) and one != 0):
            return False
        warnings.warn(
            f"{type(model).__name__} takes num_items_in_batch but its loss ignores it, so a stock Trainer would make the "
            "gradient accumulation × processes times too large; model_accepts_loss_kwargs is set to False, which mends it.",
            UserWarning,
            stacklevel=2,
        )
        return True

    def _unseen_loss(self, model: nn.Module, inputs: dict[str, Any], count: int) -> Tensor:
        with torch.no_grad(), unchanged(model), self.host_counters_kept(), self.compute_loss_context_manager():
            prepared = self._prepare_inputs({**inputs})
            return self.compute_loss(model, prepared, num_items_in_batch=torch.tensor(count, device=self.args.device))


def _way_out(whole: Path | None) -> str:
    return "start a new run" if whole is None else f"the last whole checkpoint is {whole}"


class SSAMTrainer(SSAMTrainerMixin, Trainer):
    """`transformers.Trainer` with sharpness-aware training; see `SSAMTrainerMixin`."""


class SSAMSeq2SeqTrainer(SSAMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with sharpness-aware training; see `SSAMTrainerMixin`."""
