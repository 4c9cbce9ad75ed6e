"""What several shards should do to the weights, in float64 and from the equations of `tests/support/reference.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.support.cases import Case
from tests.support.reference import REFERENCES, flat, gradient_of, load, weight_mask

Batch = Mapping[str, Tensor]
Windows = list[list[list[Batch]]]
"""By optimizer step, by rank, by micro-batch."""


def labelled(batches: list[Batch]) -> Tensor:
    """How many labels there are, as the Trainer counts them for GPT-2: with the first of each row, never predicted."""
    return sum(b["labels"].ne(-100).sum() for b in batches)


def token_loss(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Sum of the cross-entropies of all `batches` over the count of their labels."""
    total = torch.zeros((), dtype=torch.float64)
    for b in batches:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1]
        total = total + nn.functional.cross_entropy(
            logits.flatten(0, 1), b["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
    return total / labelled(batches)


def parts_of(scope: str, step: list[list[Batch]]) -> list[tuple[int, list[Batch]]]:
    """What ascends by itself under `scope`, each with the rank whose state it uses."""
    if scope == "global":
        return [(0, [b for rank in step for b in rank])]
    if scope == "rank":
        return list(enumerate(step))
    return [(r, [b]) for r, rank in enumerate(step) for b in rank]


def trained(model: nn.Module, case: Case, windows: Windows, scope: str, lr: float) -> Tensor:
    """Flat weights after plain SGD along `Σ (n_part / N) d_part`: the mean over all labels of the parts' descents."""
    w, states = flat(model.parameters()), [{} for _ in windows[0]]
    layout = {"is_weight": weight_mask(model), "sizes": [p.numel() for p in model.parameters()]}
    for step in windows:
        total = labelled([b for rank in step for b in rank])
        d = torch.zeros_like(w)
        for rank, batches in parts_of(scope, step):
            gradient = gradient_of(model, lambda b=batches: token_loss(model, b))
            own = REFERENCES[case.method](gradient, w, states[rank], case.rho, **layout, **case.options)
            d += labelled(batches) / total * own
        w = w - lr * d
    load(model, w)
    return w
