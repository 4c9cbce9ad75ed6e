"""Sharpness-aware minimisation, and above all Stable SAM (SSAM), for the Hugging Face Trainer."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.report import StepReport
    from .engine.two_pass import TwoPass
    from .methods import METHODS, Method, get_method, register_method
    from .trainer.mixin import SSAMSeq2SeqTrainer, SSAMTrainer, SSAMTrainerMixin
    from .trainer.training_args import SSAMArgumentsMixin, SSAMSeq2SeqTrainingArguments, SSAMTrainingArguments

__version__ = version("hf-ssam")

_HOMES = {
    "METHODS": "methods",
    "Method": "methods",
    "SSAMArgumentsMixin": "trainer.training_args",
    "SSAMSeq2SeqTrainer": "trainer.mixin",
    "SSAMSeq2SeqTrainingArguments": "trainer.training_args",
    "SSAMTrainer": "trainer.mixin",
    "SSAMTrainerMixin": "trainer.mixin",
    "SSAMTrainingArguments": "trainer.training_args",
    "StepReport": "engine.report",
    "TwoPass": "engine.two_pass",
    "get_method": "methods",
    "register_method": "methods",
}
"""Where each public name is defined."""

__all__ = [
    "METHODS",
    "Method",
    "SSAMArgumentsMixin",
    "SSAMSeq2SeqTrainer",
    "SSAMSeq2SeqTrainingArguments",
    "SSAMTrainer",
    "SSAMTrainerMixin",
    "SSAMTrainingArguments",
    "StepReport",
    "TwoPass",
    "get_method",
    "register_method",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a loop of one's own does not wait for the Trainer, nor a console command for torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`.")
