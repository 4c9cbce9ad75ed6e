"""Plain SGD on a network with batch normalisation, clean labels, no augmentation: over which learning rates, how well?

    python examples/run_study.py run configs/studies/batch_norm.yaml          # ten minutes on one core

The small ResNet of `label_noise` on real images without momentum. Batch normalisation makes most weights scale-free,
so that no learning rate diverges for good: what differs is the test accuracy.
"""

from pathlib import Path

import pandas as pd

from hf_ssam.plots.canvas import canvas, dress, save
from support.study import StudyPlan
from support.study_tables import Column, Drawn, by_condition, compared

from .label_noise import measure

__all__ = ["figures", "measure", "tables"]


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Test accuracy at each learning rate."""
    columns = (
        Column("NLL", "nll", ".3f"),
        Column("rise of the loss", "rise", ".0%"),
        Column("passes", "passes", ".0f"),
    )
    parts = []
    for rate, here in by_condition(rows, "learning_rate"):
        parts += [f"**Learning rate {rate:g}**\n", compared(here, plan.baseline, "test_accuracy", columns)]
    return "\n".join(parts)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`batch_norm.png`: test accuracy against the learning rate."""
    ax = canvas()[0]
    for number, arm in enumerate(plan.arms):
        own = rows[rows["arm"] == arm]
        if len(own):
            Drawn(arm, number).over(ax, own["learning_rate"], own["test_accuracy"] * 100)
    rates = sorted(rows["learning_rate"].unique())
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    dress(ax, "SGD without momentum, batch normalisation, clean labels", "learning rate", "correct on test images, %")
    save(ax, folder / "batch_norm.png")
