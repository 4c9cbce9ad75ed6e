"""Whose labels count, and which number each has: the training data's where a head is trained, else the model's own.

A label is matched by its name. What the model does not know is a `UsageError`: a head is never drawn anew, and no
number is ever taken for another, in a run that does not train.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedConfig

from .errors import UsageError

SHOWN = 12


def class_names(column: str, *splits: Dataset) -> list[str]:
    """The classes of `column` (labels, or lists of them), in order: those that it declares, or those that occur."""
    feature = _of_one(splits[0].features[column])
    if isinstance(feature, ClassLabel):
        return feature.names
    return [str(value) for value in sorted({value for rows in splits for value in _flat(rows[column])})]


def is_score(rows: Dataset, column: str) -> bool:
    """Whether the labels are real numbers, which makes the task a regression."""
    return getattr(rows.features[column], "dtype", "").startswith("float")


def finished_names(config: PreTrainedConfig, kind: str, owner: str) -> list[str]:
    """The classes of a model with a trained head, by number.

    Args:
        config: the model's.
        kind: how the class of a model with such a head is called, as `ForSequenceClassification`.
        owner: where the model is, for messages.

    Raises:
        UsageError: the model has no such head.
    """
    if not any(name.endswith(kind) for name in config.architectures or []):
        found = ", ".join(config.architectures or ["a model of no known class"])
        raise UsageError(f"{owner} has no head for this task (it is {found}): add --do_train, or give a trained model")
    names = _numbered(config)
    if len(names) > 1 and _has_numbers_only(names):
        print(f"{owner} only numbers its classes: labels that are numbers are taken for these")
    return names


def ordered_as(config: PreTrainedConfig, names: list[str]) -> list[str]:
    """`names` in the order of a model that has just these classes, so that training goes on with its head."""
    own = _numbered(config)
    return own if sorted(own) == sorted(names) else names


def numbers(values: Iterable[Any], feature: Any, names: list[str] | None, source: str, unknown: str) -> list[Any]:
    """The number of each label (or of each in a list of them); a score is its own.

    Args:
        values: labels as the data has them.
        feature: the column's, by which a class is named.
        names: the classes by number, or None for a regression.
        source: where the labels are, for the message.
        unknown: the rest of a sentence that begins `SOURCE has the label 'x', which`.

    Raises:
        UsageError: a label is none of `names`, or no number where a score is expected.
    """
    name, number = _namer(_of_one(feature), names or []), {name: i for i, name in enumerate(names or [])}

    def numbered(value: Any) -> Any:
        if isinstance(value, list):
            return [numbered(each) for each in value]
        found = _score(value) if names is None else number.get(name(value))
        if found is None:
            said = _namer(_of_one(feature), [])(value)
            raise UsageError(f"{source} has the label {said!r}, which {unknown}")
        return found

    return [numbered(value) for value in values]


def not_known(owner: str, names: list[str]) -> str:
    """The end of a sentence about a label that the model of `owner` does not have."""
    return f"{owner} does not know (it knows {shown(names)}): drop those rows, or train on some with --do_train"


def shown(names: list[str]) -> str:
    """`names`, the first dozen of them."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _numbered(config: PreTrainedConfig) -> list[str]:
    """The classes of a model by number."""
    return [name for _, name in sorted((int(number), name) for number, name in (config.id2label or {}).items())]


def _of_one(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List) else feature


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    return (each for value in values for each in (value if isinstance(value, list) else [value]))


def _has_numbers_only(names: list[str]) -> bool:
    return names == [f"LABEL_{number}" for number in range(len(names))]


def _namer(feature: Any, names: list[str]) -> Callable[[Any], str]:
    """Label -> what it is called; a number is a name where the model has only numbers."""
    if names and _has_numbers_only(names):
        return lambda value: f"LABEL_{value}" if isinstance(value, int) else str(value)
    if isinstance(feature, ClassLabel):
        return lambda value: dict(enumerate(feature.names)).get(value, str(value))
    return str


def _score(value: Any) -> float | None:
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None
