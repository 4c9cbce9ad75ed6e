"""The figure at the top of the README: a training with wrong labels, and what SSAM changes in all that is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from hf_ssam.plots.canvas import COLORS, canvas, dress, save
from studies.label_noise import curve, with_stopped_early

from .comparison import interval
from .study_tables import Drawn, by_seed

Rows = Callable[[str], pd.DataFrame]
"""The name of a study -> its runs; an empty table where there are none."""


@dataclass(frozen=True)
class Contrast:
    """SSAM against another arm: in which study, under which conditions, and in which figure of a run."""

    label: str
    study: str
    arm: str
    against: str
    column: str
    where: tuple[tuple[str, float], ...] = ()

    def differences(self, rows: pd.DataFrame) -> np.ndarray:
        """Points of accuracy won, seed by seed; seeds that only one of the two has are left out."""
        for name, value in self.where:
            rows = rows[rows[name] == value] if len(rows) else rows
        if rows.empty:
            return np.array([])
        ours, theirs = (by_seed(rows[rows["arm"] == arm], self.column) for arm in (self.arm, self.against))
        return np.array([100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs])


WRONG = (("noise", 0.4),)
CONTRASTS = (
    Contrast("wrong labels, same epochs", "label_noise", "SSAM", "SGD", "test_accuracy", WRONG),
    Contrast("wrong labels, same cost", "label_noise", "SSAM", "SGD, twice the epochs", "test_accuracy", WRONG),
    Contrast("wrong labels, SGD stopped early", "label_noise", "SSAM", "SGD, stopped early", "test_accuracy", WRONG),
    Contrast("wrong labels, tuned weight decay", "label_noise", "SSAM", "SGD, tuned weight decay", "test_accuracy",
             WRONG),
    Contrast("wrong labels, SGD with random noise", "label_noise", "SSAM", "random perturbation", "test_accuracy",
             WRONG),
    Contrast("wrong labels, weights in 3 bits", "robustness", "SSAM", "SGD", "bits_3", WRONG),
    Contrast("clean labels, same epochs", "label_noise", "SSAM", "SGD", "test_accuracy", (("noise", 0.0),)),
    Contrast("five tasks in sequence, same epochs", "tasks", "SSAM, ρ 0.2", "SGD", "accuracy"),
    Contrast("five tasks in sequence, same cost", "tasks", "SSAM, ρ 0.2", "SGD, twice the epochs", "accuracy"),
    Contrast("BatchNorm, no momentum, rate 0.1", "batch_norm", "SSAM", "SGD", "test_accuracy",
             (("learning_rate", 0.1),)),
    Contrast("TREC, MiniLM, AdamW, ρ 0.01", "text", "SSAM, ρ 0.01", "AdamW", "test_accuracy"),
    Contrast("TREC, MiniLM, AdamW, ρ 0.05", "text", "SSAM, ρ 0.05", "AdamW", "test_accuracy"),
)  # fmt: skip


def write_summary(rows: Rows, path: Path) -> None:
    """Draw both panels; nothing where the study of wrong labels has not run."""
    runs = rows("label_noise")
    if runs.empty:
        return
    found = {name: rows(name) for name in {one.study for one in CONTRASTS}}
    found["label_noise"] = with_stopped_early(runs, "SGD")
    axes = canvas(1, 2, (6.0, 4.2))
    draw_training(axes[0], runs[runs["noise"] == 0.4])
    draw_contrasts(axes[1], [(one.label, one.differences(found[one.study])) for one in CONTRASTS])
    save(axes[0], path)


def draw_training(ax: Axes, runs: pd.DataFrame) -> None:
    """Accuracy over the cost, for the arms that answer whether it pays."""
    names = {"SGD": "SGD", "SGD, twice the epochs": "SGD for twice the epochs", "SAM": "SAM", "SSAM": "SSAM"}
    names |= {"random perturbation": "SGD with random noise"}
    for number, (arm, label) in enumerate(names.items()):
        curves = [curve(run) for _, run in runs[runs["arm"] == arm].iterrows()]
        if curves:
            Drawn(label, number).curves(ax, curves)
    said = "correct on clean test images, %"
    dress(ax, "40 % of the training labels are random", "cost: passes over the training set", said)


def draw_contrasts(ax: Axes, found: Sequence[tuple[str, np.ndarray]]) -> None:
    """A dot and a 95 % interval for each contrast that has runs, the first at the top."""
    found = [(f"{label} (n = {len(values)})", values) for label, values in found if len(values)]
    for place, (_, values) in enumerate(reversed(found)):
        mean, half = interval(values)
        color = COLORS[2] if mean > 0 else COLORS[1]
        ax.errorbar(mean, place, xerr=half if len(values) > 2 else 0, fmt="o", color=color, capsize=3)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(found)), [label for label, _ in reversed(found)])
    ax.set_ylim(-0.6, len(found) - 0.4)
    dress(ax, "What SSAM changes", "points of test accuracy over the baseline\n(bar: 95 % interval over seeds)", "")
