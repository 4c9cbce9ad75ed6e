"""The base model that a pushed adapter names.

PEFT writes the name that the base model was loaded by. Where that is a folder, nobody else can open the adapter, and
the folder tells about the machine. The file is rewritten when it is there: PEFT itself reads the base model again
while it saves, to see whether the vocabulary has grown, and has to find it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .card_facts import public_base_model

logger = logging.get_logger(__name__)

CONFIG = "adapter_config.json"


def name_base(folder: str | Path, model: Any, name: str | None) -> None:
    """Write the base model's name on the Hub into the adapters saved in `folder`; warn where there is none.

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
    for path in (p for p in (Path(folder, CONFIG), *Path(folder).glob(f"*/{CONFIG}")) if p.is_file()):
        config = {**json.loads(path.read_text("utf-8")), "base_model_name_or_path": base["id"]}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
