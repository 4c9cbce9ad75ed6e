"""Models and data from anywhere: the Hub, a local folder, local files, or the offline set of the example.

Whatever cannot work is a `UsageError` that names the file and the column, before a model is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from cli import UsageError

READERS = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


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


@dataclass
class DataArguments:
    """What to train and to test on. With none of these an offline set is used."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of --dataset_name."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples."})


@dataclass
class FileArguments(DataArguments):
    """Data that may also be in local files."""

    train_file: str | None = field(default=None, metadata={"help": f"A file that ends in {', '.join(READERS)}."})
    validation_file: str | None = field(default=None, metadata={"help": "What to evaluate on, in the same columns."})

    def __post_init__(self) -> None:
        if self.dataset_name and (self.train_file or self.validation_file):
            raise ValueError("give only one of --dataset_name and files (--train_file, --validation_file)")


def load_files(data: FileArguments, offline: Callable[[], DatasetDict]) -> DatasetDict:
    """The splits of the files, of the named data set, or of `offline`."""
    files = {"train": data.train_file, "validation": data.validation_file}
    if any(files.values()):
        return DatasetDict({split: read_file(Path(file)) for split, file in files.items() if file})
    return read_named(data.dataset_name, data.dataset_config_name) if data.dataset_name else offline()


def read_named(name: str, config: str | None = None, **options: Any) -> DatasetDict:
    """The data set that is on the Hub, or in a local folder.

    Raises:
        UsageError: it is neither.
    """
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, config, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the data set {name} is neither a local folder nor to be had from the Hub ({reason})"
        ) from error


def read_file(path: Path) -> Dataset:
    """The rows of a local file.

    Raises:
        UsageError: it is missing, empty, unreadable, or of no known kind.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix not in READERS:
        raise UsageError(f"{path} is of no known kind: give a file that ends in {', '.join(READERS)}")
    empty = UsageError(f"{path} is empty: it has no examples")
    if not path.stat().st_size:
        raise empty
    reader, options = READERS[path.suffix]
    try:
        return load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:  # each reader has exceptions of its own, and all mean the same
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:  # a table with a head and no rows
            raise empty from error
        raise UsageError(f"{path} could not be read as {reader} ({reason})") from error


def uses(raw: DatasetDict, data: DataArguments, args: TrainingArguments) -> dict[str, Dataset]:
    """What this run needs of `raw`, cut to size: ``train``, and ``eval`` (the validation split, or else the test one).

    Raises:
        UsageError: the split is missing where it is asked for, or is empty.
    """
    held_out = "validation" if "validation" in raw else "test"
    insists = args.eval_strategy != "no" or args.eval_on_start or not args.do_train
    wanted = {"train": ("train", args.do_train), "eval": (held_out, insists or (args.do_eval and held_out in raw))}
    limits = {"train": data.max_train_samples, "eval": data.max_eval_samples}
    chosen = {}
    for use, (split, is_wanted) in wanted.items():
        if is_wanted and not raw.get(split):
            raise UsageError(
                f"there is nothing to {use} on: the data has {described(raw)}, and needs {split} examples"
            )
        if is_wanted:
            chosen[use] = raw[split].select(range(min(limits[use] or len(raw[split]), len(raw[split]))))
    return chosen


def described(raw: DatasetDict) -> str:
    """The splits of `raw` and their sizes."""
    return ", ".join(f"{len(rows)} {split} examples" for split, rows in raw.items()) or "no splits"


def require_columns(raw: DatasetDict, flags: dict[str, str]) -> None:
    """Refuse data without a column that the example reads.

    Args:
        raw: the splits.
        flags: the flag that names a column, and the column.

    Raises:
        UsageError: a split has no such column, or an empty cell in it.
    """
    for split, rows in raw.items():
        for flag, column in flags.items():
            if column not in rows.column_names:
                found = ", ".join(rows.column_names)
                raise UsageError(f"the {split} data has no column {column!r}, it has {found}: name it with --{flag}")
            kind = getattr(rows.features[column], "dtype", "")
            if kind in ("string", "large_string") and (empty := _first_empty(rows[column][:])):
                raise UsageError(f"the {split} data has nothing in column {column!r} of example {empty}")


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
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    if not 0 < length <= longest:
        raise UsageError(f"--{flag} {length} is out of range: {config.model_type} reads 1 to {longest} tokens")


def _first_empty(values: list[str | None]) -> int | None:
    return next((number for number, value in enumerate(values, start=1) if not value), None)
