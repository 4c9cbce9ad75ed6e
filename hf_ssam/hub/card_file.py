"""The card as a file, and what it was made of beside it, so that it can be drawn anew when the run has ended.

`_card.json` holds the facts; what begins with an underscore is never pushed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError

from ..methods import METHODS, Paper, get_method
from ..plots import plot_run, series
from ..run_folder import CURVES, read_run
from .card_facts import compute_cost, plain_run, result_rows
from .card_text import front_matter, render

FACTS = "_card.json"
CARD = "README.md"

WHOLE, SECTION = "model_card.md", "model_card_section.md"


def write_card(folder: Path, data: ModelCardData, facts: Mapping[str, Any], above: str | None) -> None:
    """Write the card, and its facts beside it.

    Args:
        folder: of the run.
        data: the front matter that the parent made.
        facts: see `ModelCardMixin._card_facts`.
        above: the parent's own text, under which ours is one section; None for a whole card of ours.
    """
    body = render(WHOLE, facts) if above is None else above.rstrip() + "\n\n" + render(SECTION, facts)
    front = front_matter(data, facts).to_yaml()
    (folder / CARD).write_text(f"---\n{front}\n---\n\n{body}", encoding="utf-8")
    method = facts["method"]
    kept = {**facts, "method": [method.name, method.values], "papers": [asdict(paper) for paper in facts["papers"]]}
    content = json.dumps({"above": above, "facts": kept}, indent=1, default=str)
    (folder / FACTS).write_text(content + "\n", encoding="utf-8")


def rewrite_card(folder: str | Path, baseline: str | Path | None = None) -> Path:
    """The card of a run that has ended, with its figures, and beside a run with the plain optimizer.

    Raises:
        FileNotFoundError: if there are no facts of a card in `folder`.
        ValueError: if they are damaged, of another version or of a method that is not registered, or `baseline` is no
            run.
    """
    folder = Path(folder)
    above, facts = _read(folder / FACTS)
    log = read_run(folder).log
    draw(log, folder)
    facts["figures"] = figures(folder)
    plain = None if baseline is None else plain_run(baseline)
    data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    try:
        if plain is not None:
            facts["results"] = result_rows(facts["before"], facts["after"], plain.metrics)
            facts["cost"] = compute_cost(log, facts["method"], facts["cost"]["steps"], plain)
        write_card(folder, data, facts, above)
    except (KeyError, UndefinedError) as error:
        raise ValueError(
            f"{folder / FACTS}: another version of hf_ssam left it ({error}); write the card anew from the Trainer."
        ) from error
    return folder / CARD


def draw(log: Any, folder: Path) -> None:
    """The curves of the run, where there are some and matplotlib is installed."""
    if find_spec("matplotlib") is not None and len(series(log, "loss")[0]) > 1:
        plot_run(log, folder / CURVES)


def figures(folder: str | Path) -> list[str]:
    """The pictures that a card shows."""
    return sorted(path.name for path in Path(folder, "figures").glob("*.png"))


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent}: there is no {FACTS} in it, which trainer.create_model_card() leaves beside the card of a "
            "run with a sharpness-aware method."
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        facts, above = content["facts"], content["above"]
        name, values = facts["method"]
        facts["papers"] = [Paper(**paper) for paper in facts["papers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the file is damaged ({error}); write the card anew from the Trainer.") from error
    if name not in METHODS:
        raise ValueError(f"{path}: it is of the method `{name}`, which is not registered here.")
    facts["method"] = get_method(name, **values)
    return above, facts
