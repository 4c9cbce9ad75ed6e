"""The model that a run starts from: its flags, and how it is loaded; what cannot work is a `UsageError`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .cli import UsageError


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


def pretrained(loader: Any, path: str, **options: Any) -> Any:
    """``loader.from_pretrained(path, **options)``.

    Raises:
        UsageError: `path` is neither a local folder with such a thing in it nor a name on the Hub.
    """
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is neither a local folder nor to be had from the Hub ({reason})") from error


def labelled(names: list[str]) -> dict[str, dict]:
    """What the configuration of a classifier says of the classes `names`."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def with_new_head(loader: Any, path: str, config: PreTrainedConfig, model: PlainModelArguments) -> PreTrainedModel:
    """The model of `path`, shaped by `config`: a head that is saved in another shape is left out for a new one.

    Raises:
        UsageError: see `pretrained`.
    """
    return pretrained(loader, path, config=config, dtype=model.dtype, ignore_mismatched_sizes=True, **model.hub)


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
