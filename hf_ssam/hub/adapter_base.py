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

from transformers.utils import logging

from .card_facts import public_base_model

logger = logging.get_logger(__name__)

CONFIG = "adapter_config.json"


def name_base(folder: str | Path, model: Any, name: str | None) -> None:
    """Write the base model's name on the Hub into the adapters that `model` has saved in `folder`.

    Without such a name the file stays as it is, and a warning says so.

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
    if base["id"] is None:
        return
    for adapter in model.peft_config:
        place = Path(folder) if adapter == "default" else Path(folder, adapter)
        if (place / CONFIG).is_file():
            _rename(place, base["id"])


def _rename(place: Path, base: str) -> None:
    """In the adapter's file, and in the card that PEFT leaves beside it."""
    config = json.loads((place / CONFIG).read_text("utf-8"))
    before = config["base_model_name_or_path"]
    _write(place / CONFIG, json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True))
    card = place / "README.md"
    if before and card.is_file():
        _write(card, card.read_text("utf-8").replace(before, base))


def _write(path: Path, text: str) -> None:
    """At once: an upload in the background may be reading."""
    new = path.with_name(f".{path.name}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
