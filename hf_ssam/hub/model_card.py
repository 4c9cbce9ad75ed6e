"""The model card: what was trained, with which method, at what cost, and how to repeat it.

The stock card would print "Use ssam and the args are ..." and lose ρ, the method and what it cost. `ModelCardMixin`
goes before any Trainer. The parent writes its own card first, with its own keyword arguments, and this module
rewrites the file: after the stock Trainer with a whole card (`_card_template`), after a Trainer that has a card of
its own (TRL, Sentence Transformers) with one section at the end of the parent's text (`_card_section`). Under a
stock optimizer the parent's card stays as it is.

What the card says is read from the arguments, from `state.log_history`, from the method table and from the output
folder; nothing is measured here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import (
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.modelcard import TASK_MAPPING, extract_hyperparameters_from_trainer

from ..methods import METHODS, Paper
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
from .command_line import repeat_command
from .markdown import cell, code, fenced, text
from .push import HubMixin
from .redaction import public, secret_values

TEMPLATES = Path(__file__).parent / "templates"
PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
}
PACKAGES = ("hf-ssam", "transformers", "torch", "accelerate", "datasets", "tokenizers")


class ModelCardMixin(HubMixin):
    """Goes before any Trainer; its identity is in class attributes, none of which TRL's trainers have."""

    _card_tags: tuple[str, ...] = ("ssam", "sharpness-aware-minimization")
    _card_name: str = "hf_ssam"
    _card_papers: tuple[Paper, ...] = (METHODS["ssam"].paper,)
    _card_template: str = "model_card.md"
    _card_section: str = "model_card_section.md"

    card_baseline: str | Path | None = None
    """Folder of the same run with the plain optimizer; where set, the card compares wall time and results with it."""

    _metrics_before: Mapping[str, float] = {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's; what it finds before the first step is kept for the card."""
        metrics = super().evaluate(*args, **kwargs)
        if self.state.global_step == 0:
            self._metrics_before = {**self._metrics_before, **metrics}
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` to the output folder; the parent's arguments, unchanged.

        See `transformers.Trainer.create_model_card`: language, license, tags, model_name, finetuned_from, tasks,
        dataset_tags, dataset, dataset_args. TRL's and Sentence Transformers' trainers take their own.
        """
        parent = super().create_model_card
        parent(*args, **kwargs)
        if not self.is_world_process_zero() or not self.args.is_sharpness_aware:
            return
        asked = inspect.signature(parent).bind(*args, **kwargs).arguments
        path = Path(self.args.output_dir, "README.md")
        card = ModelCard.load(path, ignore_metadata_errors=True)
        facts = self._card_facts(card.data, asked)
        if parent.__func__ is Trainer.create_model_card:
            body = render(self._card_template, facts)
        else:
            body = card.text.rstrip() + "\n\n" + render(self._card_section, facts)
        path.write_text(f"---\n{front_matter(card.data, facts).to_yaml()}\n---\n\n{body}", encoding="utf-8")

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
            "base": public_base_model(data.base_model, inner),
            "datasets": listed(asked.get("dataset") or asked.get("dataset_name") or data.datasets),
            "dataset_tags": listed(asked.get("dataset_tags") or data.datasets),
            "task": asked.get("tasks") or task_of(inner),
            "results": result_rows(before, after, plain.metrics if plain else {}),
            "after": after,
            "sharpness": sharpness_rows(log),
            "history": history_rows(log),
            "figures": sorted(p.name for p in Path(args.output_dir, "figures").glob("*.png")),
            "repository": self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name,
            "revision": args.hub_revision,
            "loader": loader(model, self.processing_class),
            "command": repeat_command(args.world_size, secret_values(args)),
            "arguments": changed_arguments(args),
            "hyperparameters": hyperparameters,
            "versions": versions(),
            "papers": list(cited),
        }


def render(template: str, facts: Mapping[str, Any]) -> str:
    """The template of that name, filled; an unknown name in it is an error rather than a hole in the card."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=cell, code=code, fenced=fenced, literal=repr, text=text, listed=listed)
    environment.filters["figure_name"] = lambda name: Path(name).stem.replace("_", " ")
    return environment.get_template(template).render(facts)


def listed(value: str | Sequence[str] | None) -> list[str]:
    """One name or several, fit to be published, without gaps: a dataset without a name arrives as None."""
    names = [value] if isinstance(value, str) else value or []
    return [public(name) for name in names if name]


def front_matter(data: ModelCardData, facts: Mapping[str, Any]) -> ModelCardData:
    """The parent's metadata with the tags, a base model that the Hub accepts, and the results as `model-index`."""
    data.tags = list(dict.fromkeys([*listed(data.tags), *facts["tags"]]))
    data.base_model = facts["base"]["id"]
    data.datasets = listed(data.datasets) or None
    results = eval_results(facts)
    data.model_name, data.eval_results = (facts["name"], results) if results else (None, None)
    return data


def eval_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics after training as the Hub's `model-index` wants them: each with a task and a dataset."""
    if facts["task"] is None:
        return []
    tags, names = facts["dataset_tags"], facts["datasets"]
    task = listed(facts["task"])[0]
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=tags[0] if tags else "unknown",
            dataset_name=names[0] if names else "Unknown",
            metric_type=name,
            metric_name=name.replace("_", " ").capitalize(),
            metric_value=value,
        )
        for name, value in facts["after"].items()
    ]


def task_of(model: Any) -> str | None:
    """The Hub's name of the task that a transformers class is for."""
    name = type(model).__name__
    return next((task for task, mapping in TASK_MAPPING.items() if name in mapping.values()), None)


def loader(model: Any, processing_class: Any) -> dict[str, Any] | None:
    """Names of the class that loads the weights and of the processor's; None for a model class of the user's own."""
    kinds = [auto for kind, auto in PROCESSORS.items() if isinstance(processing_class, kind)]
    processor = None if processing_class is None else [*kinds, "AutoProcessor"][0]
    if is_peft_model(model):
        return {"package": "peft", "model": f"Auto{type(model).__name__}", "processor": processor}
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return None
    return {"package": "transformers", "model": type(model).__name__, "processor": processor}


def versions() -> dict[str, str]:
    """Versions of what the run was made with, as far as they are installed as packages."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
