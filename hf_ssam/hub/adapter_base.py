"""The base model that a pushed adapter names.

PEFT writes the name that the base model was loaded by. Where that is a folder, nobody else can open the adapter, and
the folder tells about the machine. The file is rewritten when it is there: PEFT itself reads the base model again
while it saves, to see whether the vocabulary has grown, and has to find it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from .card_facts import public_base_model
from .card_text import set_base_model

logger = logging.get_logger(__name__)

CONFIG = "adapter_config.json"


def name_base(folder: str | Path, model: Any, name: str | None) -> None:
    """Write the base model's name on the Hub into the adapters that `model` saved in `folder`, and their cards.

    Without such a name the adapter's file stays as it is, and a warning says so; a card names none then.

    Args:
        folder: where `model` has been saved.
        model: a PEFT model.
        name: of its base on the Hub; None to read it from the Hub client's cache, if the base was loaded from there.
    """
    base = public_base_model(name, model.get_base_model())
    if base["folder"]:
        logger.warning_once(
            f"{CONFIG} names the local folder '{base['folder']}' as the base model, which only this machine has; set "
            "trainer.card_base_model to the base model's name on the Hub before you push."
        )
    for adapter in model.peft_config:
        _rename(Path(folder) if adapter == "default" else Path(folder, adapter), base["id"])


def _rename(place: Path, base: str | None) -> None:
    """In the card that PEFT leaves beside an adapter, and in the adapter's own file, which needs some name."""
    card, config = place / "README.md", place / CONFIG
    if card.is_file():
        content = ModelCard.load(card, ignore_metadata_errors=True)
        set_base_model(content.data, base)
        _write(card, str(content))
    if base and config.is_file():
        said = {**json.loads(config.read_text("utf-8")), "base_model_name_or_path": base}
        _write(config, json.dumps(said, indent=2, sort_keys=True))


def _write(path: Path, text: str) -> None:
    """At once: an upload in the background may be reading."""
    new = path.with_name(f".{path.name}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
