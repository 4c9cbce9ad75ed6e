"""Saved models, each with the rows that it is measured on: those of its own training, or of other data that are named.

Text classifiers, causal language models and image classifiers are told apart by their configuration, or by their
adapter's. The rows are the first ones of the data, shuffled with seed 0, so that models of the same data see the same.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    set_seed,
)
from transformers.utils.peft_utils import find_adapter_config_file

from . import rows as inputs
from .data import RunData, beside
from .errors import UsageError
from .labels import class_names, finished_names, not_known
from .names import short_names
from .rows import Batch, labels_of, require_columns

LOADERS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
}
HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
PEFT_TASKS = {"SEQ_CLS": "ForSequenceClassification", "CAUSAL_LM": "ForCausalLM"}
TEXT, IMAGE, LABEL = "text", "image", "label"


@dataclass
class Subject:
    """A model with the rows it is measured on, what these are, and whether its head knows nothing yet."""

    name: str
    model: torch.nn.Module
    batches: list[Batch]
    data: str
    is_new: bool = False

    @property
    def weight_mib(self) -> float:
        """What the weights take, MiB."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**20

    @property
    def rows(self) -> int:
        """How many rows it is measured on."""
        return sum(len(batch["labels"]) for batch in self.batches)

    @property
    def has_classes(self) -> bool:
        """Whether each row has one label, and that a class."""
        label = self.batches[0]["labels"]
        return label.dim() == 1 and not label.is_floating_point()


@dataclass
class Opened:
    """A model's kind, a key of `LOADERS`, its weights' place, and the adapter's on them, if it is one."""

    kind: str
    config: PreTrainedConfig
    base: str
    adapter: str | None
    has_head: bool

    def load(self, names: list[str] | None) -> torch.nn.Module:
        """The model, with a head for `names` where it has none of its own."""
        config = self.config
        if names is not None and (self.adapter or not self.has_head):
            config = pretrained(AutoConfig, self.base, **labelled(names))
        fits_later = {"ignore_mismatched_sizes": self.adapter is not None}  # an adapter brings a head of its own
        model = LOADERS[self.kind].from_pretrained(self.base, config=config, **fits_later)
        if self.adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, self.adapter, is_trainable=True).eval()


def load_all(folders: list[str], args: argparse.Namespace) -> list[Subject]:
    """The models, each by the shortest end of its path that no other has."""
    return [load(folder, name, args) for folder, name in zip(folders, short_names(folders), strict=True)]


def load(folder: str, name: str, args: argparse.Namespace) -> Subject:
    """The model in `folder` (or of that name on the Hub) with `args.rows` rows in its own tokens or pixels.

    Raises:
        UsageError: there is no such model, nothing says what to measure it on, or the rows are not for it.
    """
    run = beside(folder)
    opened = open_model(folder)
    data = named_data(folder, run, args)
    rows = data.read()
    rows = rows.shuffle(seed=0).select(range(min(args.rows, len(rows))))
    set_seed(0)
    if opened.kind in ("ForCausalLM", "LMHeadModel"):
        columns = data.columns or [TEXT]
        require_columns(rows, data.name, columns)
        tokenizer = pretrained(AutoTokenizer, folder)
        batches = inputs.running(rows, columns, tokenizer, args.batch_size, args.max_length)
        return Subject(name, opened.load(None), batches, data.name)
    names, batches = judged(folder, opened, run, data, rows, args)
    if not opened.has_head:
        print(f"{name} has no classification head: measured with a fresh one.")
    return Subject(name, opened.load(names), batches, data.name, not opened.has_head and opened.adapter is None)


def named_data(folder: str, run: RunData | None, args: argparse.Namespace) -> RunData:
    """What to measure on: the data of the command line, or else of the run; the columns likewise.

    Raises:
        UsageError: neither says.
    """
    data = run or RunData()
    if args.data or args.dataset_name:
        other = {"file": args.data, "dataset_name": args.dataset_name, "split": args.split or "train"}
        data = RunData(**other, columns=data.columns, label_column=data.label_column)
    elif args.split:
        data = replace(data, split=args.split)
    if not data.name:
        raise UsageError(
            f"nothing says what {folder} was trained on: name what to measure it on with --data FILE or --dataset_name"
        )
    columns = args.text_column or (args.image_column and [args.image_column]) or data.columns
    return replace(data, columns=columns, label_column=args.label_column or data.label_column)


def judged(
    folder: str, opened: Opened, run: RunData | None, data: RunData, rows: Dataset, args: argparse.Namespace
) -> tuple[list[str] | None, list[Batch]]:
    """The classes of a classifier, None where it predicts a score; and the rows with their labels in its numbers.

    Raises:
        UsageError: the rows lack a column, or have a label that the model does not know.
    """
    is_image = opened.kind == "ForImageClassification"
    columns, label = data.columns or [IMAGE if is_image else TEXT], data.label_column or LABEL
    require_columns(rows, data.name, [*columns, label])
    names, unknown = classes(folder, opened, run, rows, label)
    labels = labels_of(rows, label, names, data.name, unknown)
    if is_image:
        return names, inputs.pictured(
            rows, columns[0], pretrained(AutoImageProcessor, folder), labels, args.batch_size
        )
    tokenizer = pretrained(AutoTokenizer, folder)
    return names, inputs.classified(rows, columns, tokenizer, labels, args.batch_size, args.max_length)


def classes(
    folder: str, opened: Opened, run: RunData | None, rows: Dataset, column: str
) -> tuple[list[str] | None, str]:
    """The model's classes by number, or None for a score, and the end of a sentence about a label that is none."""
    if opened.adapter:
        if run is None or not run.labels:
            raise UsageError(
                f"nothing says which classes {folder} was trained for: measure the folder that its run left"
            )
        return run.labels, not_known(folder, run.labels)
    if not opened.has_head:
        return class_names(column, rows), ""
    if opened.config.num_labels == 1:
        return None, f"is no number: {folder} predicts a score"
    names = finished_names(opened.config, opened.kind, folder)
    return names, not_known(folder, names)


def open_model(folder: str) -> Opened:
    """What is in `folder`; no weights are read yet.

    Raises:
        UsageError: there is no model, one of a kind that is not measured here, or an adapter without peft or its base.
    """
    settings = adapter_settings(folder)
    base = settings.base_model_name_or_path if settings else folder
    config = pretrained(AutoConfig, base)
    architecture = next(iter(config.architectures or []), "")
    own = next((kind for kind in LOADERS if architecture.endswith(kind)), None)
    kind = own if settings is None else PEFT_TASKS.get(settings.task_type, own)
    if kind is None and (config.is_encoder_decoder or not architecture.endswith(HEADLESS)):
        raise UsageError(
            f"{folder} is a {architecture}: measured here are classifiers of texts and images and causal language "
            "models; hf_ssam.sharpness measures any model"
        )
    has_head = own is not None and own == kind
    return Opened(kind or "ForSequenceClassification", config, base, folder if settings else None, has_head)


def adapter_settings(folder: str) -> Any | None:
    """The configuration of an adapter; None where `folder` is a whole model, or nothing.

    Raises:
        UsageError: peft is not installed.
    """
    try:
        found = find_adapter_config_file(folder)
    except OSError:  # no name that the Hub could know
        return None
    if found is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UsageError(f"{folder} is an adapter: pip install -c constraints.txt peft, to open it") from error
    return PeftConfig.from_pretrained(folder)


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


def labelled(names: list[str]) -> dict[str, Any]:
    """What the configuration of a classifier says of the classes `names`."""
    number = {name: i for i, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": number, "problem_type": None}
