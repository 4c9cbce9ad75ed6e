"""Checkpoints of a Trainer that has an engine: our files written before the Trainer's last one, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..engine.two_pass import TwoPass
from .checkpoints import (
    discard_earlier_save,
    is_whole,
    last_whole_checkpoint,
    load_state,
    save_state,
)
from .host import Host
from .step_log import StepLog

logger = logging.get_logger(__name__)


class ResumeMixin(Host):
    """Saves and resumes the engine with the Trainer, and knows a half-written checkpoint when it sees one."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; a half-written checkpoint is recognised, named, and passed over where `True` was given.

        Raises:
            ValueError: if the named checkpoint was not finished, or none in the output folder was.
        """
        return super().train(self._whole_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            discard_earlier_save(Path(self._get_output_dir(trial=trial), folder))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.two_pass is not None:
            state = self.two_pass.state_dict()
            save_state(output_dir, self._settings, state, self.args.should_save, self._step_log.total_passes)

    def _load_engine(self, engine: TwoPass, checkpoint: str) -> None:
        state = load_state(checkpoint, engine.space.params)
        if state is None:
            logger.warning(
                f"{checkpoint} was saved without a sharpness-aware method; {self.args.optim} starts afresh."
            )
            return
        changed = self._settings.differences(state)
        if changed:
            logger.warning(f"Resuming {checkpoint} with other settings: {'; '.join(changed)}.")
        self._step_log = StepLog(state["total_passes"])
        if state["method"] == self._settings.method:
            engine.load_state_dict(state)

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


def _way_out(whole: Path | None) -> str:
    return "start a new run" if whole is None else f"the last whole checkpoint is {whole}"
