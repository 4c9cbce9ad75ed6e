"""The Trainer: micro-batches in, `super().training_step` for every pass, the engine's state in the checkpoint.

Whatever the parent does in a step (autocast, loss scaling, label smoothing, context parallelism, backward) is done by
the parent, once a pass. What is ours is when a window begins and ends, what the passes must not count twice, and what
a checkpoint and a log entry hold in addition.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import has_length

from ..engine.parameters import trainable
from ..engine.per_sample import per_sample_losses
from ..engine.two_pass import TwoPass
from ..hub.model_card import ModelCardMixin
from ..methods.method import checked_rho
from . import checks as refusals
from .ascent_rise import AscentRise
from .base_optimizer import BaseOptimizerMixin
from .checkpoints import Settings
from .console import ConsoleMixin, opening, show_less
from .deferred_step import DeferredStep, deferred_step
from .hook_guard import HookGuardMixin
from .loss_counts import LossCountMixin
from .micro_batches import HostMixin, MicroBatch
from .resuming import ResumeMixin
from .sample_ids import SampleIdMixin, ids_of, without_ids
from .schedules import first_ascent, is_ascent_step, rho_factor
from .step_log import PREFIX, StepLog
from .suggested_rho import starting_rho
from .training_args import SSAMArgumentsMixin


class SSAMTrainerMixin(
    BaseOptimizerMixin,
    HostMixin,
    SampleIdMixin,
    LossCountMixin,
    ResumeMixin,
    HookGuardMixin,
    ConsoleMixin,
    ModelCardMixin,
):
    """Sharpness-aware training for any Trainer: `class MyTrainer(SSAMTrainerMixin, SFTTrainer): ...`.

    The constructor is the parent's. With `optim` a name in `hf_ssam.METHODS` every optimizer step uses the gradient
    that method computes; with a stock name the parent trains as it always did.

    Raises:
        ValueError: for arguments of another class, an empty training set, a model without trainable parameters, or a
            sharpness-aware wrapper as `optimizers=`.
        NotImplementedError: for a parent or a kind of distribution that two passes do not work with.
    """

    _deferred_step: DeferredStep | None = None
    _window_flos = 0.0
    _resumed_at = 0

    def __init__(self, *args: Any, **kwargs: Any):
        refusals.refuse_host(type(self))
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SSAMArgumentsMixin):
            raise ValueError(
                f"args: {type(self.args).__name__} has no `rho`; pass SSAMTrainingArguments, or a class made with "
                "SSAMArgumentsMixin."
            )
        self._step_log, self._ascent_rise = StepLog(), AscentRise()
        show_less(self.callback_handler.callbacks)
        if self.args.is_sharpness_aware:
            self._refuse_what_cannot_work()
        if self.args.sharpness_steps is not None:
            from .sharpness_callback import SharpnessCallback  # scipy is an extra

            self.add_callback(SharpnessCallback(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; after the last of a window `.grad` is the descent gradient, the weights untouched."""
        engine = self.two_pass
        if engine is None:
            self.check_prepared()
            return super().training_step(model, inputs, num_items_in_batch)
        last = self.accelerator.sync_gradients
        ids, inputs = ids_of(inputs), without_ids(inputs)
        whole = MicroBatch(self, super().training_step, model, inputs, num_items_in_batch, last)
        self._window_flos += whole.flos
        if not engine.is_open:
            self._begin_step(engine)
        losses = []
        for run in whole.split(self.args.num_micro_batches):
            own = ids if ids is None or run.rows is None else ids[run.rows]
            share = self._share(run, num_items_in_batch)
            losses.append(engine.first_pass(run, share, own, run.inputs.get("labels")))
        if last:
            self._finish_step(engine)
        return sum(losses[1:], losses[0])

    def per_sample_loss(self, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss of each sample, shape (B,), for methods that select samples; override it for a loss of your own.

        Args:
            inputs: what the model was called with, by name, and the batch's `labels`.
            outputs: what it returned.

        Raises:
            ValueError: if it is not known: a `compute_loss_func`, or outputs that do not tell.
        """
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func: optim={self.args.optim} needs the loss of each sample, which it does not give; "
                "override `per_sample_loss` of the Trainer, or choose a method that selects no samples."
            )
        return per_sample_losses(self.accelerator.unwrap_model(self.model), inputs, outputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's; an entry that carries the training loss carries the step reports since the last one too."""
        if self.two_pass is not None and "loss" in logs:
            logs.update(self._step_log.drain(self.mean_over_ranks))
            self._warn_of_the_rise()
        if self.two_pass is not None and "train_runtime" in logs:
            logs[PREFIX + "total_passes"] = self._step_log.total_passes
        if self._resumed_at and "train_runtime" in logs:
            logs["train_resumed_at"] = self._resumed_at
        super().log(logs, start_time)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """The average of a tensor over the ranks, which all call this in step."""
        return self.accelerator.reduce(values, reduction="mean")

    def _warn_of_the_rise(self) -> None:
        said = self._ascent_rise.judge(self.mean_over_ranks, self._settings.rho)
        if said is not None and self.is_world_process_zero():
            warnings.warn(said, UserWarning, stacklevel=4)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.two_pass, self._deferred_step, self._resumed_at = None, None, self.state.global_step
        if self.args.is_sharpness_aware:
            self._build_engine(prepared[0], max_steps, resume_from_checkpoint)
        return prepared

    def _build_engine(self, model: nn.Module, max_steps: int, resume_from_checkpoint: str | None) -> None:
        """The engine for this run. Fields are read now: a search or a smaller batch may have changed them."""
        args = self.args
        args.check_ssam()
        self._refuse_what_cannot_work()
        self._window_flos = 0.0
        self._ascent_start = first_ascent(args.ascent_start, max_steps)
        self._rho_factor = rho_factor(args.rho_scheduler_type, max_steps, args.get_warmup_steps(max_steps))
        method = args.method()
        self._deferred_step = deferred_step(self)
        varies = args.ascent_interval > 1 or args.ascent_start > 0 or args.ascent_scope != "global"
        rules = method.build()
        refusals.refuse_static_graph(model, varies or rules.second_pass.varies or rules.takes_indices)
        refusals.refuse_static_shapes(self, rules.takes_indices)
        refusals.refuse_shared_samples(self, rules.takes_indices)
        engine = {
            "scope": args.ascent_scope,
            "perturb": args.perturb,
            "parameters": refusals.same_parameters(model, self.optimizer),
            "replay_rng": args.replay_rng,
            "offload_snapshot": args.offload_snapshot,
            "free_snapshot": args.free_snapshot,
            "per_sample_loss": self.per_sample_loss,
            "dataset_size": len(self.train_dataset) if has_length(self.train_dataset) else None,
            "total_steps": max_steps,
        }
        if args.suggest_rho:
            args.rho = starting_rho(self, model, resume_from_checkpoint, **engine)
        self.two_pass = TwoPass(model, method, args.rho, **engine)
        values = {**method.values, **({"rho_unit": args.rho_unit} if args.rho_unit != "weight" else {})}
        self._settings = Settings(method.name, values, checked_rho(args.rho, method), args.ascent_scope)
        self._step_log = StepLog()
        if resume_from_checkpoint is not None:
            self._load_engine(self.two_pass, resume_from_checkpoint)
        same_samples = rules.selection is None or rules.selection.between is None
        self._ascent_rise = AscentRise(self.two_pass.clock.steps, same_samples)
        self.say(opening(args, rules, self.two_pass.rho, max_steps, self._resumed_at))

    def _refuse_what_cannot_work(self) -> None:
        refusals.refuse_launch(self)
        refusals.refuse_optimizer(self.optimizer)
        refusals.refuse_steps_in_backward(self.model)
        refusals.refuse_empty(self.train_dataset)
        trainable(self.model)
        if self.args.num_micro_batches > 1 and self.compute_loss_func is not None:
            raise ValueError(
                f"num_micro_batches: {self.args.num_micro_batches} cannot be used with compute_loss_func, whose "
                "loss may not be a share of the batch; use gradient_accumulation_steps with ascent_scope=micro_batch."
            )
        if self.args.fp16 and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            warnings.warn(
                "fp16=True has no effect on this device: no gradient scaler is made and the run is in float32; "
                "train on a GPU, or drop fp16.",
                UserWarning,
                stacklevel=3,
            )

    def rho_at(self, step: int) -> float:
        """Radius ρ of optimizer step `step`, from 0; the engine and the curvature callback ask it, a subclass may
        override it."""
        if not is_ascent_step(step, self._ascent_start, self.args.ascent_interval):
            return 0.0
        group = self.optimizer.param_groups[0]
        lr_share = group["lr"] / (group.get("initial_lr", self.args.learning_rate) or 1.0)
        return self._settings.rho * self._rho_factor(step, lr_share)

    def _begin_step(self, engine: TwoPass) -> None:
        self.optimizer.train()  # here, since the parent's call in the first pass may swap weights (schedule-free)
        step = self.state.global_step
        engine.rho = self.rho_at(step)
        engine.clock.elapsed, engine.clock.lr = step, self.optimizer.param_groups[0]["lr"]
        engine.begin(self._loss_scale())

    def _loss_scale(self) -> Tensor | float | None:
        """What losses are multiplied by; a GradScaler's is left on its device, for which `get_scale` would wait."""
        if self._deferred_step is not None:
            return self._deferred_step.loss_scale
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def _finish_step(self, engine: TwoPass) -> None:
        """Close the window; a step that is not finite must not be applied, nor move the scheduler."""
        report = engine.finish()
        self._step_log.add(report, engine.rho)
        self._ascent_rise.add(report)
        # A backward pass costs two forwards, as `floating_point_ops` has it.
        self.current_flos += self._window_flos * (report.forwards - report.passes) / 3
        self._window_flos = 0.0
        if self._deferred_step is not None:
            self._deferred_step.take(report.skipped, engine.space)
        elif self.accelerator.scaler is None:
            skipped = bool(report.skipped)
            if skipped:
                engine.space.clear_grads()
            # Accelerate sets this flag where a GradScaler skips; the Trainer reads it to hold the scheduler back.
            self.optimizer._is_overflow = skipped


class SSAMTrainer(SSAMTrainerMixin, Trainer):
    """`transformers.Trainer` with sharpness-aware training; see `SSAMTrainerMixin`."""


class SSAMSeq2SeqTrainer(SSAMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with sharpness-aware training; see `SSAMTrainerMixin`."""
