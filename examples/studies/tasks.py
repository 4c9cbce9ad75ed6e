"""Does a flatter solution forget less? Five tasks of two classes, learnt one after the other.

    python examples/run_study.py run configs/studies/tasks.yaml          # ten minutes on one core

The small ResNet of `label_noise` learns Fashion-MNIST two classes at a time, without seeing the earlier ones again.
Which task a test image belongs to is told: only the two outputs of its task are compared. Forgetting is the accuracy
on a task right after it was learnt less that at the end, averaged over all tasks but the last (Chaudhry et al. 2018;
Mehta et al. 2023 found less of it with SAM).
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hf_ssam.plots.canvas import canvas, dress, save
from support.comparison_plots import look
from support.pictures import CLASSES, Pictures, fashion, fit, logits_of, sample, small_resnet
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, compared

PAIRS = [(first, first + 1) for first in range(0, CLASSES, 2)]


def measure(settings: Settings) -> Row:
    """Accuracy at the end and right after each task, and what was forgotten."""
    seed = settings["seed"]
    tasks, tests = split(settings["pool"], "train"), split(settings["test"], "test")
    model, table, passes = small_resnet(seed), [], 0.0
    for number, task in enumerate(tasks):
        images, own = sample(task, settings["images"], seed), {**settings, "seed": seed + 100 * number}
        passes += fit(model, images, own)["passes"]
        table.append([right(model, *pair) for pair in zip(tests, PAIRS, strict=True)])
    return {**summary(np.array(table)), "passes": passes}


def summary(table: np.ndarray) -> Row:
    """From accuracies (after task i, on task j): the means at the end and when fresh, and what was forgotten."""
    fresh, end = table.diagonal(), table[-1]
    forgotten = (fresh - end)[:-1].mean()
    return {"accuracy": end.mean(), "fresh_accuracy": fresh.mean(), "forgetting": forgotten}


@lru_cache
def split(count: int, part: str) -> list[Pictures]:
    """The first `count` images of a part, by task."""
    every = fashion(part, 0, count)
    return [every.rows(torch.isin(every.labels, torch.tensor(pair))) for pair in PAIRS]


def right(model: torch.nn.Module, test: Pictures, pair: tuple[int, int]) -> float:
    """The share of a task's images whose label wins among the task's own two."""
    said = logits_of(model, test.pixels)[:, list(pair)].argmax(1) + pair[0]
    return (said == test.labels).double().mean().item()


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Forgetting first, since it is what is claimed; then accuracy."""
    columns = (
        Column("accuracy at the end", "accuracy", ".3f"),
        Column("accuracy when fresh", "fresh_accuracy", ".3f"),
        Column("passes", "passes", ".0f"),
    )
    return compared(rows, plan.baseline, "forgetting", columns)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`tasks.png`: the accuracy when fresh and at the end, for each arm and seed."""
    ax = canvas()[0]
    arms = [arm for arm in plan.arms if (rows["arm"] == arm).any()]
    for place, arm in enumerate(arms):
        own = rows[rows["arm"] == arm]
        for name, shift, marker in (("fresh_accuracy", -0.12, "o"), ("accuracy", 0.12, "s")):
            label = {"o": "right after the task", "s": "after the last task"}[marker] if place == 0 else None
            color = look(0 if marker == "o" else 1)["color"]
            ax.plot(place + shift, own[name].mean() * 100, marker, color=color, label=label)
            ax.plot([place + shift] * len(own), own[name] * 100, ".", color=color, alpha=0.5)
    ax.set_xticks(range(len(arms)), arms, fontsize="small")
    dress(ax, "Five tasks, one after the other (small dots: seeds)", "", "correct on test images, %, mean over tasks")
    save(ax, folder / "tasks.png")
