"""Sharpness-aware minimisation, and above all Stable SAM (SSAM), for the Hugging Face Trainer."""

from .engine.report import StepReport
from .engine.two_pass import TwoPass
from .methods.table import METHODS, Method, get_method
from .trainer.mixin import SSAMSeq2SeqTrainer, SSAMTrainer, SSAMTrainerMixin
from .trainer.training_args import SSAMArgumentsMixin, SSAMSeq2SeqTrainingArguments, SSAMTrainingArguments

__version__ = "0.1.0"

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
]
