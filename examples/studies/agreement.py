"""How far apart are the gradients at w and at w + ρ g/‖g‖, along a plain run, and how far as the optimizer sees them?

    python examples/run_study.py run configs/studies/agreement.yaml          # ten minutes on one core

A plain run of MiniLM on TREC with AdamW (as `configs/tasks/trec.yaml` has it, 38 steps), and one of a small ResNet on
wrong labels with SGD (as `configs/studies/label_noise.yaml`). At some steps the gradient ĝ is taken at w + ρ g/‖g‖ for
several ρ, on the batch of the step and with its dropout, and three numbers are kept: by which share the loss is higher
there, the cosine of g and ĝ, and the cosine of D⁻¹g and D⁻¹ĝ, where D is what the optimizer divides a gradient by:
√v of AdamW's second moments, and 1 for SGD. AdamW blows up coordinates with small gradients, and these change first.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler, set_seed

from hf_ssam.plots.canvas import canvas, dress, save
from support import offline
from support.comparison_plots import look
from support.pictures import fashion, relabelled, sample, small_resnet
from support.study import Row, Settings, StudyPlan
from support.study_tables import markdown

Batch = dict[str, Tensor]
NOISE = 0.4
MEASURES = {"rise": "rise of the loss", "cosine": "cosine", "seen": "cosine as the optimizer sees them"}


@dataclass
class Task:
    """What is trained, on which columns of examples, and how."""

    model: nn.Module
    columns: Batch
    optimizer: torch.optim.Optimizer
    schedule: str
    clip: float


def questions(settings: Settings) -> Task:
    """MiniLM with a new head on TREC."""
    set_seed(settings["seed"])
    data = offline.trec()["train"].shuffle(seed=settings["seed"]).select(range(settings["examples"]))
    folder, classes = offline.minilm(), data.features["label"].num_classes
    columns = dict(AutoTokenizer.from_pretrained(folder)(list(data["text"]), padding=True, return_tensors="pt"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"], weight_decay=0.01)
    return Task(model, columns | {"labels": torch.tensor(data["label"])}, optimizer, "linear", 1.0)


def pictures(settings: Settings) -> Task:
    """A small ResNet on Fashion-MNIST with wrong labels."""
    model = small_resnet(settings["seed"])
    data = relabelled(
        sample(fashion("train", 0, 40_000), settings["examples"], settings["seed"]), NOISE, settings["seed"]
    )
    optimizer = torch.optim.SGD(model.parameters(), settings["learning_rate"], momentum=0.9, weight_decay=5e-4)
    return Task(model, {"pixel_values": data.pixels, "labels": data.labels}, optimizer, "cosine", float("inf"))


TASKS: dict[str, Callable[[Settings], Task]] = {"questions": questions, "pictures": pictures}


def measure(settings: Settings) -> Row:
    """The three numbers of each radius, one for each look."""
    task = TASKS[settings["task"]](settings)
    task.model.train()
    weights, steps = [*task.model.parameters()], settings["steps"]
    schedule = get_scheduler(
        task.schedule, task.optimizer, round(0.1 * steps) if task.schedule == "linear" else 0, steps
    )
    found: dict[str, list[dict[str, float]]] = {f"{rho:g}": [] for rho in settings["radii"]}
    for step, rows in enumerate(islice(order(settings), steps)):
        batch = {name: column[rows] for name, column in task.columns.items()}
        here = gradient(task.model, batch, step)
        if step in settings["looks"]:
            for rho, seen in found.items():
                seen.append(compared(task, batch, step, here, float(rho)))
        for weight, g in zip(weights, here[1], strict=True):
            weight.grad = g
        nn.utils.clip_grad_norm_(weights, task.clip)
        task.optimizer.step()
        schedule.step()
    return {name: json.dumps({rho: [one[name] for one in seen] for rho, seen in found.items()}) for name in MEASURES}


def order(settings: Settings) -> Iterator[Tensor]:
    """The rows of each batch, epoch after epoch."""
    generator = torch.Generator().manual_seed(settings["seed"])
    while True:
        yield from torch.randperm(settings["examples"], generator=generator).split(settings["batch"])


def gradient(model: nn.Module, batch: Batch, seed: int) -> tuple[float, list[Tensor]]:
    """Loss and gradient with the dropout of `seed`; what normalisation layers count stays as it was."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    torch.manual_seed(seed)
    loss = model(**batch).loss
    found = torch.autograd.grad(loss, [*model.parameters()])
    for buffer, value in kept:
        buffer.copy_(value)
    return loss.item(), list(found)


def compared(task: Task, batch: Batch, seed: int, here: tuple[float, list[Tensor]], rho: float) -> dict[str, float]:
    """The gradient at w + ρ g/‖g‖ beside the one at w; the weights come back by copy."""
    loss, g = here
    weights = [*task.model.parameters()]
    kept, length = [w.detach().clone() for w in weights], dot(g, g) ** 0.5
    with torch.no_grad():
        torch._foreach_add_(weights, g, alpha=rho / length)
    loss_there, there = gradient(task.model, batch, seed)
    with torch.no_grad():
        torch._foreach_copy_(weights, kept)
    scales = [divisor(task.optimizer, w) for w in weights]
    own, other = ([t / s for t, s in zip(ts, scales, strict=True)] for ts in (g, there))
    return {"rise": loss_there / loss - 1, "cosine": cosine(g, there), "seen": cosine(own, other)}


def divisor(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    """What the optimizer divides the gradient of `weight` by, up to a factor that all coordinates share."""
    moments = optimizer.state[weight].get("exp_avg_sq")
    return torch.ones(()) if moments is None else moments.sqrt() + 1e-8


def dot(u: list[Tensor], v: list[Tensor]) -> float:
    """⟨u, v⟩."""
    return sum(float(a.flatten() @ b.flatten()) for a, b in zip(u, v, strict=True))


def cosine(u: list[Tensor], v: list[Tensor]) -> float:
    """Of the angle between u and v."""
    return dot(u, v) / (dot(u, u) * dot(v, v)) ** 0.5


def curves(rows: pd.DataFrame, name: str) -> dict[float, np.ndarray]:
    """Radius -> one number for each look of each run."""
    runs = [json.loads(text) for text in rows[name]]
    return {float(rho): np.concatenate([run[rho] for run in runs]) for rho in runs[0]}


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Median over looks and runs of each measure, with its worst tenth beside it."""
    parts = []
    for arm, own in rows.groupby("arm", sort=False):
        found = {name: curves(own, name) for name in MEASURES}
        head = ["ρ", *(f"{title}: median, worst tenth" for title in MEASURES.values())]
        lines = [head, ["---"] * len(head)]
        lines += [[f"{rho:g}", *(written(name, found[name][rho]) for name in MEASURES)] for rho in found["rise"]]
        parts.append(f"**{arm}** ({len(own)} runs)\n\n{markdown(lines)}")
    return "\n".join(parts)


def written(name: str, values: np.ndarray) -> str:
    """A cell."""
    middle, worst = np.median(values), np.quantile(values, 0.9 if name == "rise" else 0.1)
    return f"{middle:+.1%}, {worst:+.1%}" if name == "rise" else f"{middle:.3f}, {worst:.3f}"


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`agreement.png`: both cosines against ρ, a panel a task."""
    arms = [*rows.groupby("arm", sort=False)]
    axes = canvas(1, len(arms), (5.2, 3.6))
    for ax, (arm, own) in zip(axes, arms, strict=True):
        for number, name in enumerate(("cosine", "seen")):
            found = curves(own, name)
            middle = [np.median(values) for values in found.values()]
            worst = [np.quantile(values, 0.1) for values in found.values()]
            ax.plot([*found], middle, label=MEASURES[name], **look(number))
            ax.fill_between([*found], worst, middle, alpha=0.15, color=look(number)["color"], linewidth=0)
        ax.set_xscale("log")
        ax.set_ylim(-0.05, 1.05)
        dress(ax, str(arm), "radius ρ", "g against ĝ: median, down to the worst tenth")
    save(axes[0], folder / "agreement.png")
