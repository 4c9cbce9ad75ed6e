"""The model that a run starts from: its flags, and how it is loaded; what cannot work is a `UsageError`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ssam.saved.models import labelled, pretrained

from .cli import UsageError
from .plan import Plan


@dataclass
class PlainModelArguments:
    """Which model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model on the Hub, or a local folder; an offline one if not given."}
    )
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights. bfloat16 weights swallow the perturbation: use --bf16 to compute in it."},
    )

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"--dtype {self.dtype} does not exist: use float32, bfloat16 or float16")

    @property
    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` call takes."""
        return {"revision": self.model_revision}


@dataclass
class ModelArguments(PlainModelArguments):
    """The same, for scripts whose training arguments have no `trust_remote_code` of their own."""

    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the weights."})

    @property
    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` call takes."""
        return {**super().hub, "trust_remote_code": self.trust_remote_code}


def path_of(model: PlainModelArguments, plan: Plan, offline: Callable[[], Path]) -> str:
    """Where the model of a classification run is; a run that does not train needs one that was trained before.

    Raises:
        UsageError: it does not train, and no model is named.
    """
    if model.model_name_or_path is None and not plan.trains:
        asked = min(plan.needs)
        raise UsageError(f"--do_{asked} without --do_train needs --model_name_or_path: the folder of a trained model")
    return model.model_name_or_path or str(offline())


def classifier(
    loader: Any, path: str, model: ModelArguments, names: list[str] | None, plan: Plan, **settings: Any
) -> PreTrainedModel:
    """The model of `path`, with a head for the classes `names` (one output where None).

    Training takes the head that is saved there if it has the right shape, and a new one otherwise. A run that does not
    train never gets a new one.

    Args:
        loader: an auto class.
        path: the model's folder or name.
        model: the flags.
        names: the classes by number; those of the model itself, where the run does not train.
        plan: what the run is to do.
        **settings: what to set in its configuration.

    Raises:
        UsageError: see `pretrained`.
    """
    head = (labelled(names) if names is not None else REGRESSION) if plan.trains else {}
    config = pretrained(AutoConfig, path, **head, **settings, **model.hub)
    return pretrained(loader, path, config=config, dtype=model.dtype, ignore_mismatched_sizes=plan.trains, **model.hub)


REGRESSION = {"num_labels": 1, "problem_type": "regression"}


def tokenizer_for(model: PlainModelArguments, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `path`; one without a pad token pads with its end token.

    Raises:
        UsageError: it has neither.
    """
    tokenizer = pretrained(AutoTokenizer, path, **model.hub)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UsageError(f"the tokenizer of {path} has neither a pad nor an end token: set `pad_token` in its folder")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(flag: str, length: int, config: PreTrainedConfig) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        UsageError: `length` is out of range.
    """
    longest = positions(config) or length
    if not 0 < length <= longest:
        raise UsageError(f"--{flag} {length} is out of range: {config.model_type} reads 1 to {longest} tokens")


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens the model has positions for; None where they are not counted."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
