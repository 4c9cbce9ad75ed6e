"""The model card: what was trained, with which method, at what cost, and how to repeat it.

The stock card would print "Use ssam and the args are ..." and lose ρ, the method and what it cost. `ModelCardMixin`
goes before any Trainer. The parent writes its own card first, with its own keyword arguments, and this module
rewrites the file: after the stock Trainer with a whole card, after a Trainer that has a card of its own (TRL, Sentence
Transformers) with one section at the end of the parent's text. Under a stock optimizer the parent's card stays as it
is.

What the card says is read from the arguments, from `state.log_history`, from the method table and from the output
folder; nothing is measured here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any, cast

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.modelcard import TASK_MAPPING, extract_hyperparameters_from_trainer
from transformers.trainer_utils import has_length

from ..methods import METHODS, Paper
from .adapter_base import name_base
from .card_facts import (
    changed_arguments,
    compute_cost,
    evaluations,
    history_rows,
    method_settings,
    plain_run,
    public_base_model,
    result_rows,
    sharpness_rows,
)
from .card_file import draw, figures, write_card
from .card_text import listed
from .command_line import repeat_command
from .push import HubMixin
from .redaction import public, secret_values

PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
}
CLASSIFIES = ("text-classification", "token-classification", "image-classification", "audio-classification")
EXAMPLES = {
    "text-classification": '"A sentence to classify."',
    "token-classification": '"A sentence with names in it."',
    "image-classification": '"picture.jpg"',
    "text-generation": '"How a text begins"',
    "fill-mask": '"A word is <mask>."',
}
PACKAGES = ("hf-ssam", "transformers", "torch", "accelerate", "datasets", "tokenizers")


class ModelCardMixin(HubMixin):
    """Goes before any Trainer; its identity is in class attributes, none of which TRL's trainers have."""

    _card_tags: tuple[str, ...] = ("ssam", "sharpness-aware-minimization")
    _card_name: str = "hf_ssam"
    _card_papers: tuple[Paper, ...] = (METHODS["ssam"].paper,)

    card_baseline: str | Path | None = None
    """Folder of the same run with the plain optimizer; where set, the card compares wall time and results with it."""

    card_base_model: str | None = None
    """Hub name of the base model, where it was loaded from a local folder; for the card and for a pushed adapter."""

    _metrics_before: Mapping[str, float] = {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's; what it finds before the first step is kept for the card."""
        metrics = super().evaluate(*args, **kwargs)
        if self.state.global_step == 0:
            self._metrics_before = {**self._metrics_before, **metrics}
        return metrics

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if self.is_to_be_pushed and is_peft_model(model):
            name_base(output_dir or self.args.output_dir, model, self.card_base_model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` to the output folder; the parent's arguments, unchanged.

        See `transformers.Trainer.create_model_card`: language, license, tags, model_name, finetuned_from, tasks,
        dataset_tags, dataset, dataset_args. TRL's and Sentence Transformers' trainers take their own.
        """
        parent: Any = super().create_model_card
        parent(*args, **kwargs)
        if not self.is_world_process_zero() or not self.args.is_sharpness_aware:
            return
        asked = inspect.signature(parent).bind(*args, **kwargs).arguments
        path = Path(self.args.output_dir, "README.md")
        card = ModelCard.load(path, ignore_metadata_errors=True)
        draw(self.state.log_history, path.parent)
        facts = self._card_facts(card.data, asked)
        is_ours = parent.__func__ is Trainer.create_model_card
        write_card(path.parent, card.data, facts, None if is_ours else honest(card.text, facts["base"]))

    def _card_facts(self, data: ModelCardData, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the templates and the front matter speak of."""
        args, log = self.args, self.state.log_history
        method = args.method()
        model = self.accelerator.unwrap_model(self.model)
        inner = model.get_base_model() if is_peft_model(model) else model
        plain = plain_run(self.card_baseline) if self.card_baseline else None
        before, after = evaluations(log, self._metrics_before, self.state.best_global_step)
        cited = dict.fromkeys((*self._card_papers, method.paper))
        hyperparameters = extract_hyperparameters_from_trainer(self)
        hyperparameters.pop("optimizer", None)
        return {
            "name": public(asked.get("model_name") or Path(args.output_dir).absolute().name),
            "trained_with": self._card_name,
            "tags": [*self._card_tags, method.name],
            "method": method,
            "settings": method_settings(args, method),
            "cost": compute_cost(log, method, self.state.global_step, plain),
            "base": public_base_model(self.card_base_model or data.base_model, inner),
            "datasets": listed(asked.get("dataset") or asked.get("dataset_name") or data.datasets),
            "dataset_tags": listed(asked.get("dataset_tags") or data.datasets),
            "task": (task := asked.get("tasks") or task_of(inner)),
            "example": example_of(task),
            "results": result_rows(before, after, plain.metrics if plain else {}),
            "before": before,
            "after": after,
            "data": data_facts(self.train_dataset, self.eval_dataset, inner),
            "link": library_link(),
            "sharpness": sharpness_rows(log),
            "history": history_rows(log),
            "figures": figures(args.output_dir),
            "repository": self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name,
            "revision": args.hub_revision,
            "loader": loader(model, self.processing_class),
            "command": repeat_command(args.world_size, secret_values(args)),
            "arguments": changed_arguments(args),
            "hyperparameters": hyperparameters,
            "versions": versions(),
            "papers": list(cited),
        }


def task_of(model: Any) -> str | None:
    """The Hub's name of the task that a transformers class is for."""
    name, tasks = type(model).__name__, cast(dict[str, Mapping[str, str]], TASK_MAPPING)
    return next((task for task, mapping in tasks.items() if name in mapping.values()), None)


def loader(model: Any, processing_class: Any) -> dict[str, Any] | None:
    """Names of the class that loads the weights and of the processor's; None for a model class of the user's own."""
    kinds = [auto for kind, auto in PROCESSORS.items() if isinstance(processing_class, kind)]
    processor = None if processing_class is None else [*kinds, "AutoProcessor"][0]
    if is_peft_model(model):
        return {"package": "peft", "model": f"Auto{type(model).__name__}", "processor": processor}
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return None
    return {"package": "transformers", "model": type(model).__name__, "processor": processor}


def data_facts(train: Any, held_out: Any, model: Any) -> dict[str, Any]:
    """How many examples there were, and the names of the classes, where they are more than numbers."""
    names = list((getattr(getattr(model, "config", None), "id2label", None) or {}).values())
    numbered = names == [f"LABEL_{number}" for number in range(len(names))]
    return {
        "train": len(train) if has_length(train) else None,
        "eval": len(held_out) if has_length(held_out) else None,
        "labels": [] if numbered or task_of(model) not in CLASSIFIES else [public(str(name)) for name in names],
    }


def example_of(task: Any) -> str | None:
    """The argument of a pipeline of that task, as Python has it."""
    return EXAMPLES.get(listed(task)[0]) if task else None


def honest(text: str, base: Mapping[str, str | None]) -> str:
    """A parent's text, without a link to a base model that is not on the Hub: TRL writes `[None](…/None)`."""
    words = "a model trained from scratch"
    if base["id"]:
        words = f"a fine-tuned version of [{base['id']}](https://huggingface.co/{base['id']})"
    elif base["folder"]:
        words = f"a model from the local folder `{base['folder']}`"
    return re.sub(r"a fine-tuned version of \[([^\]]*)\]\(https://huggingface\.co/(None|/[^)]*)\)", words, text)


def library_link() -> str | None:
    """Where this library is at home, as its package says."""
    urls = dict(url.split(", ", 1) for url in metadata("hf-ssam").get_all("Project-URL") or [])
    return urls.get("Homepage") or urls.get("Repository") or urls.get("Source")


def versions() -> dict[str, str]:
    """Versions of what the run was made with, as far as they are installed as packages."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
