"""Text classification data from anywhere, checked before a model is loaded.

`load` reads a GLUE task, a data set by name or folder, local CSV/TSV/JSON files, or one of the offline sets;
`text_columns`, `trained_names` and `number_labels` find out what is in it. Whatever cannot work is a `UsageError`
that names the file and the column.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_ssam.saved.labels import class_names, is_score, numbers, shown

from . import offline
from .cli import UsageError
from .sources import FileArguments, hub_data, load_files, read_named

GLUE = "nyu-mll/glue"
GLUE_COLUMNS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
OFFLINE: dict[str, Callable[[], DatasetDict]] = {
    "trec": offline.trec,
    "trec_fine": lambda: offline.trec(fine=True),
    "movie_reviews": offline.movie_reviews,
}
USUAL_COLUMNS = (["sentence1", "sentence2"], ["text"], ["sentence"])


@dataclass
class TextArguments(FileArguments):
    """What to train and to test on. With no task, data set or file, an offline set is used."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(GLUE_COLUMNS)}."})
    test_file: str | None = field(default=None, metadata={"help": "What to predict; labels are optional."})
    offline_dataset: Literal["trec", "trec_fine", "movie_reviews"] = field(
        default="trec", metadata={"help": "The set to use when none of the above is given; needs no hub."}
    )
    text_column_names: list[str] | None = field(
        default=None, metadata={"help": "The column with the text, or two of them for pairs; guessed if not given."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The column with the label."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every text to that length, for compilers."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many examples."})
    metric_name: str | None = field(
        default=None,
        metadata={"help": "A metric on the Hub, or a path, in place of those in support/metrics."},
    )

    def __post_init__(self) -> None:
        sources = [self.task_name, self.dataset_name, next(filter(None, self.files.values()), None)]
        if sum(source is not None for source in sources) > 1:
            raise ValueError("give only one of --task_name, --dataset_name and files (--train_file and its like)")
        if self.task_name is not None and self.task_name not in GLUE_COLUMNS:
            raise ValueError(f"--task_name {self.task_name} is not a GLUE task: choose from {', '.join(GLUE_COLUMNS)}")
        if self.text_column_names is not None and len(self.text_column_names) not in (1, 2):
            raise ValueError(f"--text_column_names takes one or two columns, not {len(self.text_column_names)}")

    @property
    def files(self) -> dict[str, str | None]:
        """The file of each split."""
        return {**super().files, "test": self.test_file}

    @property
    def origin(self) -> dict[str, str | None]:
        """What the training data are; nothing for an offline set."""
        return {"dataset_name": GLUE, "dataset_config_name": self.task_name} if self.task_name else super().origin

    @property
    def limits(self) -> dict[str, int | None]:
        """The most examples that each use may have."""
        return {**super().limits, "predict": self.max_predict_samples}

    @property
    def card(self) -> dict[str, str]:
        """What the model card says of the data."""
        return hub_data(GLUE) if self.task_name else super().card

    def serving(self, raw: DatasetDict) -> dict[str, str]:
        """Which split serves each use: one evaluates on a test split only if it has labels."""
        is_labelled = "test" in raw and not is_unlabelled(raw["test"], self.label_column_name)
        return {**super().serving(raw), **({} if is_labelled else {"eval": "validation"}), "predict": "test"}


def load(data: TextArguments) -> DatasetDict:
    """The splits ``train``, ``validation`` and ``test``, as far as there are any, none of them empty.

    Raises:
        UsageError: a file or data set is missing, unreadable or empty.
    """
    raw = _splits(data)
    for split, rows in raw.items():
        if not rows.num_rows:
            raise UsageError(f"{source_of(data, split)} is empty: it has no examples")
    if data.task_name == "mnli":
        raw = {name.removesuffix("_matched"): rows for name, rows in raw.items() if "mismatched" not in name}
    return DatasetDict(raw)


def source_of(data: TextArguments, split: str) -> str:
    """How to name `split` in a message: its file, or the split and its data set."""
    data_set = data.task_name or data.dataset_name or data.offline_dataset
    return data.files.get(split) or f"the {split} split of {data_set}"


def text_columns(raw: DatasetDict, data: TextArguments) -> list[str]:
    """The one or two columns that hold text: those asked for, a usual name, or the only candidate.

    Raises:
        UsageError: a split has no such column, or it holds something else or nothing, or there are several candidates.
    """
    reference = next(iter(raw))
    columns = data.text_column_names or GLUE_COLUMNS.get(data.task_name) or _guess(raw[reference], data)
    if columns is None:
        names = ", ".join(_strings(raw[reference]))
        found = f"has several text columns ({names})" if names else "has no text column"
        raise UsageError(f"{source_of(data, reference)} {found}: name the one or two to use with --text_column_names")
    for split, rows in raw.items():
        for column in columns:
            if column not in _strings(rows):
                raise UsageError(f"{source_of(data, split)} has no text column {column!r}: it has {_described(rows)}")
            _refuse_empty(rows, column, source_of(data, split))
    return columns


def is_unlabelled(rows: Dataset, column: str) -> bool:
    """Whether the labels are missing or withheld: no column, or one of empty cells, or of classes that are all -1."""
    if column not in rows.column_names:
        return True
    empty = {None, -1} if isinstance(rows.features[column], ClassLabel) else {None, ""}
    return set(rows.unique(column)) <= empty


def trained_names(raw: DatasetDict, data: TextArguments) -> tuple[list[str] | None, str]:
    """The classes of the training split in order, or None for a regression (labels that are real numbers).

    Returns:
        And the end of a sentence about a label that is none of them.

    Raises:
        UsageError: the split lacks the label column, or has an empty label.
    """
    column, source = data.label_column_name, source_of(data, "train")
    _require_labels(raw["train"], column, source)
    if is_score(raw["train"], column):
        return None, f"is no number, as in {source}"
    names = class_names(column, raw["train"])
    return names, f"{source} never has (it has {shown(names)}): drop those rows, or train on some"


def number_labels(
    rows: dict[str, Dataset], raw: DatasetDict, data: TextArguments, names: list[str] | None, unknown: str
) -> dict[str, Dataset]:
    """Make the label column ``label``, a class number (or the score itself, for a regression), for each use.

    What is to be predicted may lack it; one without labels has no such column.

    Args:
        rows: the examples of each use.
        raw: the splits that they are from.
        data: the flags.
        names: the classes by number, or None for a regression.
        unknown: see `labels.numbers`.

    Raises:
        UsageError: the labels are missing where they are needed, or one is none of `names`.
    """
    served, numbered = data.serving(raw), {}
    for use, some in rows.items():
        column, source = data.label_column_name, source_of(data, served[use])
        others = some.remove_columns({column, "label"} & set(some.column_names))
        if use == "predict" and is_unlabelled(some, column):
            numbered[use] = others
            continue
        _require_labels(some, column, source)
        values = numbers(some[column][:], some.features[column], names, source, unknown)
        numbered[use] = others.add_column("label", values)
    return numbered


def _require_labels(rows: Dataset, column: str, source: str) -> None:
    if column not in rows.column_names:
        described = f"{source} has no label column {column!r}: it has {_described(rows)}"
        raise UsageError(f"{described}; name the label with --label_column_name")
    _refuse_empty(rows, column, source)


def _splits(data: TextArguments) -> DatasetDict:
    return read_named(GLUE, data.task_name) if data.task_name else load_files(data, OFFLINE[data.offline_dataset])


def _strings(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if _kind(feature) == "text"]


def _guess(rows: Dataset, data: TextArguments) -> list[str] | None:
    strings = _strings(rows)
    for columns in USUAL_COLUMNS:
        if set(columns) <= set(strings):
            return columns
    candidates = [name for name in strings if name != data.label_column_name]
    return candidates if len(candidates) == 1 else None


def _refuse_empty(rows: Dataset, column: str, source: str) -> None:
    for number, value in enumerate(rows[column][:]):
        if value is None or value == "":
            raise UsageError(
                f"{source} has nothing in column {column!r} of example {number + 1}: fill it or drop the row"
            )


def _described(rows: Dataset) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in rows.features.items())


def _kind(feature: object) -> str:
    """What a column holds, in a word."""
    if isinstance(feature, ClassLabel):
        return "classes"
    if not isinstance(feature, Value):
        return "nested"
    return "text" if feature.dtype in ("string", "large_string") else feature.dtype
