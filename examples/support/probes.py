"""Saved models, each with the rows that it is measured on.

Text classifiers, causal language models and image classifiers are told apart by their configuration. The rows are
the first ones of the split, shuffled with seed 0, so that every model sees the same; they are sorted by length before
they are cut into batches, which spares padding and changes no number.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

from . import offline
from .base_models import pretrained
from .cli import UsageError
from .sources import described, read_named

Batches = list[dict[str, torch.Tensor]]


@dataclass
class Subject:
    """A model with the rows it is measured on."""

    name: str
    model: PreTrainedModel
    batches: Batches

    @property
    def weight_mib(self) -> float:
        """What the weights take, MiB."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**20


def load_all(folders: list[str], args: argparse.Namespace) -> list[Subject]:
    """The models, each by the shortest end of its path that no other has."""
    return [load(folder, name, args) for folder, name in zip(folders, short_names(folders), strict=True)]


def short_names(folders: list[str]) -> list[str]:
    """`a/run` and `b/run` stay apart; names on the Hub stay whole, and a model given twice is the same model."""
    paths = {f: Path(f).absolute().parts if Path(f).is_dir() else (f,) for f in folders}
    for depth in range(1, max(map(len, paths.values())) + 1):
        short = {f: "/".join(parts[-depth:]) for f, parts in paths.items()}
        if len(set(short.values())) == len(short):
            break
    return [short[f] for f in folders]


def load(folder: str, name: str, args: argparse.Namespace) -> Subject:
    """The model in `folder` (or of that name on the Hub) with `args.rows` rows in its own tokens or pixels.

    Raises:
        UsageError: there is no such model, or the rows are not for it.
    """
    head = (pretrained(AutoConfig, folder).architectures or [""])[0]
    set_seed(0)
    if "ForCausalLM" in head or "LMHeadModel" in head:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return Subject(name, model, texts(folder, rows(args, offline.trec), args))
    if "ForImageClassification" in head:
        model = AutoModelForImageClassification.from_pretrained(folder)
        return Subject(name, model, images(folder, model, rows(args, offline.mnist_5k), args))
    data = rows(args, offline.trec)
    if "ForSequenceClassification" in head:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        print(f"{name} has no classification head: measured with a fresh one.")
        labels = len(set(data[column(data, args.label_column)]))
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    return Subject(name, model, classified(folder, model, data, args))


def rows(args: argparse.Namespace, default: Callable[[], DatasetDict]) -> Dataset:
    """The rows to measure on."""
    if args.dataset_name is None:
        data = default()
    elif (Path(args.dataset_name) / "dataset_info.json").is_file():
        data = load_from_disk(args.dataset_name)
    else:
        data = read_named(args.dataset_name)
    if isinstance(data, DatasetDict):
        if args.split not in data:
            raise UsageError(f"--split {args.split}: the data has {described(data)}")
        data = data[args.split]
    return data.shuffle(seed=0).select(range(min(args.rows, len(data))))


def batched(data: Dataset, size: int) -> list[dict[str, list]]:
    """The rows in order, `size` at a time."""
    return [data[i : i + size] for i in range(0, len(data), size)]


def by_length(data: Dataset, text: str) -> Dataset:
    """The rows from the shortest text to the longest."""
    lengths = [len(t) for t in data[text][:]]
    return data.select(sorted(range(len(data)), key=lengths.__getitem__))


def classified(folder: str, model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Batches:
    """Tokenised texts with their labels."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, text = label_ids(model, data, args), column(data, args.text_column)
    return [
        {**tokenized(tokenizer, part[text], args), "labels": ids(part[args.label_column])}
        for part in batched(by_length(data, text), args.batch_size)
    ]


def texts(folder: str, data: Dataset, args: argparse.Namespace) -> Batches:
    """Tokenised texts that are their own labels, padding left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = column(data, args.text_column)
    parts = [tokenized(tokenizer, part[text], args) for part in batched(by_length(data, text), args.batch_size)]
    return [{**p, "labels": p["input_ids"].where(p["attention_mask"].bool(), -100)} for p in parts]


def images(folder: str, model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Batches:
    """Pixels with their labels."""
    processor = pretrained(AutoImageProcessor, folder)
    ids, image = label_ids(model, data, args), column(data, args.image_column)

    def pixels(part: list) -> torch.Tensor:
        return processor([i.convert("RGB") for i in part], return_tensors="pt")["pixel_values"]

    return [
        {"pixel_values": pixels(part[image]), "labels": ids(part[args.label_column])}
        for part in batched(data, args.batch_size)
    ]


def tokenized(tokenizer: Any, part: list[str], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A padded batch."""
    return dict(tokenizer(part, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"))


def column(data: Dataset, name: str) -> str:
    """`name`, if there is such a column."""
    if name not in data.column_names:
        raise UsageError(
            f"the data set has no column {name!r}; --text_column, --image_column and --label_column take "
            f"{data.column_names}"
        )
    return name


def label_ids(model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Callable[[list], torch.Tensor]:
    """What turns labels into the model's: by name where the model knows the names, as numbers otherwise."""
    feature = data.features[column(data, args.label_column)]
    known = model.config.label2id or {}
    if isinstance(feature, ClassLabel) and set(feature.names) <= set(known):
        return lambda labels: torch.tensor([known[feature.int2str(label)] for label in labels])
    largest = max(data[args.label_column])
    if not isinstance(largest, int) or largest >= model.config.num_labels:
        raise UsageError(f"label {largest!r} of the data is none of the model's {model.config.num_labels} labels")
    return torch.tensor
