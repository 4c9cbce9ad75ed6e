"""Examples as a model reads them, in batches: texts or pairs with their classes, running text, images."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .errors import UsageError
from .labels import numbers

Batch = dict[str, torch.Tensor]
Rows = dict[str, list]


def batched(data: Dataset, size: int) -> Iterator[Rows]:
    """The rows in order, `size` at a time."""
    return (data[i : i + size] for i in range(0, len(data), size))


def by_length(data: Dataset, columns: list[str]) -> Dataset:
    """The rows from the shortest text to the longest: it spares padding, and changes no number."""
    lengths = [sum(len(row[name]) for name in columns) for row in data]
    return data.select(sorted(range(len(data)), key=lengths.__getitem__))


def require_columns(data: Dataset, name: str, columns: list[str]) -> None:
    """Refuse data without one of `columns`.

    Raises:
        UsageError: it has none of that name.
    """
    for column in columns:
        if column not in data.column_names:
            found = ", ".join(data.column_names)
            raise UsageError(
                f"{name} has no column {column!r}, it has {found}: set --text_column, --image_column or --label_column"
            )


def labels_of(
    data: Dataset, column: str, names: list[str] | None, name: str, unknown: str
) -> Callable[[Rows], torch.Tensor]:
    """Rows -> the model's number of each label, matched by name; a score is its own, where `names` is None.

    Raises:
        UsageError: a label of the data is not the model's.
    """
    feature = data.features[column]
    numbers(data[column][:], feature, names, name, unknown)
    return lambda rows: torch.tensor(numbers(rows[column], feature, names, name, unknown))


def classified(
    data: Dataset, columns: list[str], tokenizer: PreTrainedTokenizerBase, labels: Callable, size: int, length: int
) -> list[Batch]:
    """Tokenised texts, or pairs of texts, with their labels."""
    return [
        {**tokenized(tokenizer, [rows[name] for name in columns], length), "labels": labels(rows)}
        for rows in batched(by_length(data, columns), size)
    ]


def running(
    data: Dataset, columns: list[str], tokenizer: PreTrainedTokenizerBase, size: int, length: int
) -> list[Batch]:
    """Tokenised texts that are their own labels; padding, and the prompt before a completion, are left out."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    batches = []
    for rows in batched(by_length(data, columns), size):
        batch = tokenized(tokenizer, [written(rows, columns, tokenizer)], length)
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        if len(columns) == 2:
            for label, prompt in zip(labels, tokenizer(rows[columns[0]])["input_ids"], strict=True):
                label[: common_start(label.tolist(), prompt)] = -100
        batches.append({**batch, "labels": labels})
    return batches


def common_start(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def written(rows: Rows, columns: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each row: of a column, a prompt and its completion, or messages in the tokenizer's template."""
    texts = [rows[name] for name in columns]
    if columns == ["messages"]:
        return [str(tokenizer.apply_chat_template(messages, tokenize=False)) for messages in texts[0]]
    return ["".join(parts) for parts in zip(*texts, strict=True)]


def pictured(data: Dataset, column: str, processor: BaseImageProcessor, labels: Callable, size: int) -> list[Batch]:
    """Pixels with their labels."""

    def pixels(images: list) -> torch.Tensor:
        return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    return [{"pixel_values": pixels(rows[column]), "labels": labels(rows)} for rows in batched(data, size)]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], length: int) -> dict[str, Any]:
    """A padded batch."""
    return dict(tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))
