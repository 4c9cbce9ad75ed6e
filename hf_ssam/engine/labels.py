"""Which labels a model's own loss compares: asked here alone, for what counts them and what takes losses apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import unwrap_peft_model

IGNORED = -100
"""The label that no loss of Transformers counts."""


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position t of the logits with label t + 1.

    The causal loss of Transformers is also that of a model whose class name tells of none, such as `GPT2LMHeadModel`,
    where its forward calls `loss_function`; `XLNetLMHeadModel` has a loss of its own, which shifts nothing.

    Args:
        model: the model, unwrapped, or with an adapter.
    """
    model = unwrap_peft_model(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", "none of transformers")
    if loss_type is None:
        return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


def compared_labels(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The labels of `batch` that the loss compares with something, ignored ones included."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    return batch["labels"][..., 1:] if shifts_labels(model) else batch["labels"]


def count_labels(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """How many labels of `batch` the loss is a mean over, shape ()."""
    return compared_labels(model, batch).ne(IGNORED).sum()
