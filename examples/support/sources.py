"""Data from anywhere: the Hub, a local folder, local files, or the offline set of the example.

Whatever cannot work is a `UsageError` that names the file and the column, before a model is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .cli import UsageError
from .plan import Plan

READERS = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


@dataclass
class DataArguments:
    """What to train and to test on. With none of these an offline set is used."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of --dataset_name."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples."})

    @property
    def limits(self) -> dict[str, int | None]:
        """The most examples that each use may have."""
        return {"train": self.max_train_samples, "eval": self.max_eval_samples}

    @property
    def card(self) -> dict[str, str]:
        """What the model card says of the data; a local folder is no link."""
        if self.dataset_name is None:
            return {}
        is_local = Path(self.dataset_name).exists()
        return {"dataset": Path(self.dataset_name).name} if is_local else hub_data(self.dataset_name)

    @property
    def origin(self) -> dict[str, str | None]:
        """What the training data are, as `run_data.RunData` names them; nothing for an offline set."""
        if self.dataset_name is None:
            return {}
        name = absolute(self.dataset_name) if Path(self.dataset_name).exists() else self.dataset_name
        return {"dataset_name": name, "dataset_config_name": self.dataset_config_name}

    def serving(self, raw: DatasetDict) -> dict[str, str]:
        """Which split serves each use: evaluation takes the validation split, or else the test one."""
        only_test = "test" in raw and "validation" not in raw
        return {"train": "train", "eval": "test" if only_test else "validation"}

    def flag(self, split: str) -> str:
        """The flag that brings `split` from local files."""
        return f"--{split}_file"


@dataclass
class FileArguments(DataArguments):
    """Data that may also be in local files."""

    train_file: str | None = field(default=None, metadata={"help": f"A file that ends in {', '.join(READERS)}."})
    validation_file: str | None = field(default=None, metadata={"help": "What to evaluate on, in the same columns."})

    def __post_init__(self) -> None:
        if self.dataset_name and (self.train_file or self.validation_file):
            raise ValueError("give only one of --dataset_name and files (--train_file, --validation_file)")

    @property
    def files(self) -> dict[str, str | None]:
        """The file of each split."""
        return {"train": self.train_file, "validation": self.validation_file}

    @property
    def origin(self) -> dict[str, str | None]:
        """What the training data are; nothing for an offline set."""
        return {"file": absolute(self.train_file)} if self.train_file else super().origin


def absolute(path: str) -> str:
    """`path` as it is found from anywhere."""
    return str(Path(path).absolute())


def hub_data(name: str) -> dict[str, str]:
    """What a model card says of a data set on the Hub: its name, and a link to it."""
    return {"dataset": name, "dataset_tags": name}


def load_files(data: FileArguments, offline: Callable[[], DatasetDict]) -> DatasetDict:
    """The splits of the files, of the named data set, or of `offline`."""
    if any(data.files.values()):
        return DatasetDict({split: read_file(Path(file)) for split, file in data.files.items() if file})
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
        way = ": save it as UTF-8" if "'utf-8' codec" in reason else ""
        raise UsageError(f"{path} could not be read as {reader} ({reason}){way}") from error


def uses(raw: DatasetDict, data: DataArguments, plan: Plan) -> dict[str, Dataset]:
    """What this run needs of `raw`, by use (``train``, ``eval`` ...), cut to size.

    Raises:
        UsageError: the split is missing or empty where the run cannot do without it.
    """
    chosen = {}
    for use, split in data.serving(raw).items():
        rows = raw.get(split)
        if use in plan.needs and not rows:
            way = f"give {data.flag(split)}, or a data set with {split} examples"
            raise UsageError(f"there is nothing to {use} on: the data has {described(raw)}; {way}")
        if rows and use in plan.needs | plan.takes:
            chosen[use] = rows.select(range(min(data.limits[use] or len(rows), len(rows))))
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


def _first_empty(values: list[str | None]) -> int | None:
    return next((number for number, value in enumerate(values, start=1) if not value), None)
