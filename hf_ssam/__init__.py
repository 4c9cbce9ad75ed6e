"""Sharpness-aware minimisation, and above all Stable SAM (SSAM), for the Hugging Face Trainer."""

from .methods import METHODS, Method, get_method
from .report import StepReport
from .trainer import SSAMSeq2SeqTrainer, SSAMTrainer, SSAMTrainerMixin
from .training_args import SSAMArgumentsMixin, SSAMSeq2SeqTrainingArguments, SSAMTrainingArguments
from .two_pass import TwoPass

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
