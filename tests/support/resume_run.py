"""A run in a process of its own, which kills itself: `python resume_run.py OUTPUT_DIR MOMENT`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import TrainingArguments  # noqa: E402

from hf_ssam import SSAMTrainer  # noqa: E402
from tests.support.cases import Case, bert, case_arguments, text_data  # noqa: E402


def run_arguments(output_dir: str) -> TrainingArguments:
    """Six steps, saved at the second and the fourth."""
    return case_arguments(
        Case("ssam"), output_dir=output_dir, max_steps=6, save_strategy="steps", save_steps=2, base_optim="adamw_torch"
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(SSAMTrainer):
    moment: str
    forwards = 0

    def compute_loss(self, *args, **kwargs):
        """The tenth forward is the second pass of the fifth step: the weights are at w + e."""
        loss = super().compute_loss(*args, **kwargs)
        self.forwards += 1
        if self.moment == "second_pass" and self.forwards == 10:
            die()
        return loss

    def _save_rng_state(self, output_dir: str) -> None:
        """Between the optimizer's file and the last one."""
        if self.moment == "save" and self.state.global_step == 4:
            die()
        super()._save_rng_state(output_dir)


if __name__ == "__main__":
    Dying.moment = sys.argv[2]
    Dying(model=bert(), args=run_arguments(sys.argv[1]), train_dataset=text_data()).train()
