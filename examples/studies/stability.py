"""How far apart do twins drift whose training sets differ in one example? The stability that the SSAM paper is about.

    python examples/run_study.py run configs/studies/stability.yaml          # five minutes on one core

Two copies of a tanh network start at the same weights and see the same mini-batches, but for one of the digits, which
is another one for the second twin. Measured is ‖w − w'‖/‖w₀‖ while they train without momentum. A small distance means
that no single example matters much, which bounds the gap between training and test loss (Bousquet and Elisseeff 2002;
Hardt et al. 2016). It must be read beside the training loss: twins that do not learn do not drift either.
"""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from hf_ssam.plots.canvas import canvas, dress, save
from support.descent import descent
from support.edge_runs import Network, digits
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, Drawn, by_condition, compared

LOOKS, SPARE = 20, 5


def measure(settings: Settings) -> Row:
    """The relative distance of the twins over the steps, and their last training loss."""
    batch, seed = digits(settings["digits"] + SPARE), settings["seed"]
    torch.manual_seed(seed)
    model = Network(batch["pixels"].shape[1])
    twin = Network(batch["pixels"].shape[1])
    twin.load_state_dict(model.state_dict())
    order = batches(settings["digits"], settings["batch"], settings["steps"], seed)
    changed, start = spare(settings["digits"], seed), flat(model)
    runs = [
        descent(one, losses(one, batch, order, stands_for), settings, settings["learning_rate"])
        for one, stands_for in ((model, 0), (twin, changed))
    ]
    curve, seen = [], []
    for step, pair in enumerate(islice(zip(*runs, strict=True), settings["steps"]), start=1):
        seen.append(pair[0])
        if step % max(1, settings["steps"] // LOOKS) == 0:
            curve.append(float((flat(model) - flat(twin)).norm() / start.norm()))
    epoch = max(1, settings["digits"] // settings["batch"])
    return {"distance": curve[-1], "loss": float(np.mean(seen[-epoch:])), "curve": json.dumps(curve)}


def spare(rows: int, seed: int) -> int:
    """The row that stands for row 0 in the second twin: one of those behind the training set."""
    return rows + seed % SPARE


def batches(rows: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """The rows of each step: whole epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = [
        part for _ in range(steps * size // rows + 1) for part in torch.randperm(rows, generator=generator).split(size)
    ]
    return order[:steps]


def losses(
    model: nn.Module, batch: dict[str, Tensor], order: list[Tensor], stands_for: int
) -> Callable[[int], Tensor]:
    """The loss of a step; wherever row 0 is drawn the row `stands_for` is taken."""

    def loss(step: int) -> Tensor:
        rows = torch.where(order[step] == 0, stands_for, order[step])
        return model(**{name: values[rows] for name, values in batch.items()}).loss

    return loss


def flat(model: nn.Module) -> Tensor:
    """All weights as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """The distance at the end, at each learning rate."""
    parts = []
    for rate, here in by_condition(rows, "learning_rate"):
        columns = (Column("training loss", "loss", ".4f"),)
        parts += [f"**Learning rate {rate:g}**\n", compared(here, plan.baseline, "distance", columns, ".4f")]
    return "\n".join(parts)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`stability.png`: the distance over the steps, a panel a learning rate."""
    groups = list(by_condition(rows, "learning_rate"))
    axes = canvas(1, len(groups), (4.4, 3.6))
    for ax, (rate, here) in zip(axes, groups, strict=True):
        for number, arm in enumerate(plan.arms):
            curves = [json.loads(curve) for curve in here.loc[here["arm"] == arm, "curve"]]
            if curves:
                steps = np.linspace(0, plan.settings["steps"], len(curves[0]) + 1)[1:]
                Drawn(arm, number).curves(ax, [(steps, np.array(curve)) for curve in curves])
        dress(ax, f"learning rate {rate:g}", "step", "distance of the twins, ‖w − w'‖/‖w₀‖", legend=ax is axes[0])
    axes[0].figure.suptitle("Two trainings that differ in one example")
    save(axes[0], folder / "stability.png")
