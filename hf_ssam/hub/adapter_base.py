"""The base model that a pushed adapter names.

PEFT writes the name that the base model was loaded by. Where that is a folder, nobody else can open the adapter, and
the folder tells about the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers.utils import logging

from .card_facts import public_base_model

logger = logging.get_logger(__name__)


@contextmanager
def public_base(model: Any, name: str | None) -> Iterator[None]:
    """While it lasts, an adapter is saved with its base model's name on the Hub; `model` itself keeps the name it has.

    Args:
        model: of any kind; only a PEFT model has a base.
        name: of the base on the Hub; None to read it from the Hub client's cache, if the base was loaded from there.
    """
    base = public_base_model(name, model.get_base_model()) if is_peft_model(model) else {"id": None, "folder": None}
    if base["folder"]:
        logger.warning_once(
            f"adapter_config.json names the local folder '{base['folder']}' as the base model, which only this "
            "machine has; set trainer.card_base_model to the base model's name on the Hub before you push."
        )
    configs = list(model.peft_config.values()) if base["id"] else []
    before = [config.base_model_name_or_path for config in configs]
    try:
        for config in configs:
            config.base_model_name_or_path = base["id"]
        yield
    finally:
        for config, path in zip(configs, before, strict=True):
            config.base_model_name_or_path = path
