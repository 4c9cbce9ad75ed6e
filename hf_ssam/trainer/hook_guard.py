"""A run that its host no longer leads through our hooks must end, not go on without a second pass.

A release of transformers, or a parent that writes its own loop, may stop calling a private method that we override;
nothing else would fail.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .host import READ_IN, Host


class HookGuard(TrainerCallback):
    """Looks after each step and each save whether the engine had its part in it, where the arguments name a method.

    They are asked at each step: a search over methods changes them within one call of `train`.

    Args:
        trainer: the Trainer whose hooks are watched.
    """

    def __init__(self, trainer: HookGuardMixin):
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step that just ended went through the engine.

        Raises:
            RuntimeError: if it did not.
        """
        if not self._trainer.args.is_sharpness_aware:
            return
        self._trainer.check_prepared()
        engine = self._trainer.two_pass
        if engine is not None and engine.clock.elapsed != state.global_step:
            raise RuntimeError(
                _sentence(self._trainer, "training_step", f"step {state.global_step} had no second pass")
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The engine had its part in the checkpoint that was just written.

        Raises:
            RuntimeError: if it does not.
        """
        if not self._trainer.args.is_sharpness_aware or args.save_only_model:
            return
        if self._trainer.engine_saved_at != state.global_step:
            raise RuntimeError(
                _sentence(
                    self._trainer,
                    "_save_optimizer_and_scheduler",
                    f"checkpoint-{state.global_step} cannot be resumed from; set save_only_model=True to save weights "
                    "alone",
                )
            )


class HookGuardMixin(Host):
    """Watches the hooks of a sharpness-aware run; a stock run is left alone.

    Attributes:
        engine_saved_at: the step of the last checkpoint that the engine had its part in.
    """

    engine_saved_at: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; a step or a save of a method that the engine had no part in raises."""
        guard = HookGuard(self)
        self.add_callback(guard)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.pop_callback(guard)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.engine_saved_at = self.state.global_step

    def check_prepared(self) -> None:
        """Refuse to train with a method and no engine.

        Raises:
            RuntimeError: if the arguments name a method and the engine was not built.
        """
        if self.two_pass is None and self.args.is_sharpness_aware:
            raise RuntimeError(_sentence(self, "_prepare_for_training", f"{self.args.optim} would train as its base"))


def _sentence(trainer: Any, hook: str, consequence: str) -> str:
    return (
        f"{hook}: {type(trainer).__name__} does not call it (transformers {READ_IN['transformers']} does), so "
        f"{consequence}; use a parent Trainer and a version of transformers that call it, or a stock optim."
    )
