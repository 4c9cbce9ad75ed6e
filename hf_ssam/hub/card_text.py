"""The card's text and front matter, from its facts: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from .markdown import cell, code, fenced, text
from .redaction import public

TEMPLATES = Path(__file__).parent / "templates"


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
    set_base_model(data, facts["base"]["id"])
    data.tags = list(dict.fromkeys([*listed(data.tags), *facts["tags"]]))
    data.pipeline_tag = data.pipeline_tag or (listed(facts["task"])[0] if facts["task"] else None)
    data.datasets = listed(data.datasets) or None
    results = eval_results(facts)
    data.model_name, data.eval_results = (facts["name"], results) if results else (None, None)
    return data


def set_base_model(data: ModelCardData, base: str | None) -> None:
    """Make `base` the base model of `data`, and of the tags that PEFT wrote; None: there is none to name."""
    data.tags = [named for tag in data.tags or [] if (named := _of_base(tag, base))]
    data.base_model = base


def _of_base(tag: str, base: str | None) -> str | None:
    """A tag of PEFT's, `base_model:adapter:PATH`, with the base model's Hub name; none where there is no name."""
    if not tag.startswith("base_model:"):
        return tag
    return base and ":".join([*tag.split(":")[:-1][:2], base])


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
