"""Sharpness-aware minimisation, and above all Stable SAM (SSAM), for the Hugging Face Trainer."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .engine.report import StepReport
from .engine.two_pass import TwoPass
from .methods import METHODS, Method, get_method, register_method

if TYPE_CHECKING:
    from .trainer.mixin import SSAMSeq2SeqTrainer, SSAMTrainer, SSAMTrainerMixin
    from .trainer.training_args import SSAMArgumentsMixin, SSAMSeq2SeqTrainingArguments, SSAMTrainingArguments

__version__ = version("hf-ssam")

_OF_THE_TRAINER = {
    "SSAMArgumentsMixin": "training_args",
    "SSAMSeq2SeqTrainer": "mixin",
    "SSAMSeq2SeqTrainingArguments": "training_args",
    "SSAMTrainer": "mixin",
    "SSAMTrainerMixin": "mixin",
    "SSAMTrainingArguments": "training_args",
}

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
    """Import the Trainer when it is asked for: a loop of one's own does not wait for Transformers' to load."""
    if name in _OF_THE_TRAINER:
        return getattr(import_module(f".trainer.{_OF_THE_TRAINER[name]}", __name__), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`.")
