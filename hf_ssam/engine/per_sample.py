"""The loss of each sample, from the outputs of a forward that runs anyway.

A language model's is the mean over the sample's own tokens. What the model's own loss adds on top (label smoothing, an
auxiliary term) is not in it: samples are compared by it, nothing is trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .labels import IGNORED, shifts_labels


def per_sample_losses(model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
    """One loss a sample, shape (B,), float32, without gradient.

    Knows sequence and image classification (one label or several), regression, token classification, masked, causal
    and sequence-to-sequence language models.

    Args:
        model: the model, unwrapped.
        inputs: what it was called with, by name, and the batch's `labels`.
        outputs: what it returned.

    Raises:
        ValueError: if there are no logits or no labels, or their shapes do not tell what the loss is.
    """
    logits, labels = _part(outputs, "logits"), inputs.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(_refusal(model, "it gives no `logits`, or its batch has no `labels`"))
    logits, labels = logits.detach().float(), labels.to(logits.device)
    if labels.is_floating_point() or (labels.dim() == 1 and logits.shape[1:] == (1,)):
        return _of_floats(model, logits, labels)
    if labels.dim() == 1 and logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    if labels.dim() == 2 and logits.dim() == 3 and labels.shape == logits.shape[:2]:
        return _of_tokens(logits, labels, shifted=shifts_labels(model))
    raise ValueError(_refusal(model, f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not tell"))


def _of_floats(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    if several and logits.shape == labels.shape:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").flatten(1).mean(1)
    if logits.numel() != labels.numel():
        raise ValueError(
            _refusal(model, f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not match")
        )
    return (logits.reshape(len(labels), -1) - labels.float().reshape(len(labels), -1)).square().mean(1)


def _of_tokens(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / labels.ne(IGNORED).sum(1).clamp(min=1)


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else None


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"per_sample_loss: the loss of each sample of {type(model).__name__} is not known, since {why}; give "
        "`per_sample_loss=` (to TwoPass, or as a method of the Trainer), or choose a method that selects no samples."
    )
