"""Are the solutions flatter, and does it go with accuracy? Curvature of the models of `label_noise`.

    python examples/run_study.py run configs/studies/label_noise.yaml         # first: it leaves the models
    python examples/run_study.py run configs/studies/curvature.yaml          # ten minutes on one core

On images of the run's own training set, with the labels that it was given: the top Hessian eigenvalue λ₁, the trace,
and by how much the loss rises along the ascent (`hf_ssam.sharpness`). Batch normalisation is in evaluation mode.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from hf_ssam.plots.canvas import canvas, dress, save
from hf_ssam.sharpness import ascent_sharpness, top_eigenvalues, trace
from support.comparison_plots import look
from support.pictures import accuracy, relabelled, sample
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, by_condition, compared

from .finished import model_of
from .label_noise import data


def measure(settings: Settings) -> Row:
    """The three measures, and accuracy on test images."""
    model, seed = model_of(settings), settings["seed"]
    pool, _, test = data("report", settings["held_out"], settings["test"])
    train = relabelled(sample(pool, settings["images"], seed), settings["noise"], seed).rows(slice(settings["rows"]))
    batch = {"pixel_values": train.pixels, "labels": train.labels}
    total = trace(model, batch, settings["trace_samples"])
    return {
        "eigenvalue": top_eigenvalues(model, batch, tol=1e-2).values[0],
        "trace": total.value,
        "trace_error": total.standard_error,
        "rise": ascent_sharpness(model, batch, settings["rho"]).value,
        "test_accuracy": accuracy(model, test),
    }


COLUMNS = (
    Column("trace", "trace", ".0f"),
    Column("rise of the loss", "rise", ".2f"),
    Column("test accuracy", "test_accuracy", ".3f"),
)


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """λ₁, trace and rise beside the accuracy."""
    named = rows.rename(columns={"eigenvalue": "λ₁"})
    parts = []
    for noise, here in by_condition(named, "noise"):
        parts += [f"**Trained with {noise:.0%} random labels**\n", compared(here, plan.baseline, "λ₁", COLUMNS, ".1f")]
    return "\n".join(parts)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`curvature.png`: accuracy against λ₁ and against the rise, a dot a model."""
    axes = canvas(1, 2, (5.0, 3.8))
    names = {"eigenvalue": "top Hessian eigenvalue λ₁", "rise": f"rise of the loss at ρ = {plan.settings['rho']:g}"}
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        for number, arm in enumerate(plan.arms):
            own = rows[rows["arm"] == arm]
            for noise, marker in zip(sorted(rows["noise"].unique()), "osv^", strict=False):
                here = own[own["noise"] == noise]
                color = look(number)["color"]
                said = f"{arm}, {noise:.0%} random labels" if len(here) else None
                ax.scatter(here[name], here["test_accuracy"] * 100, color=color, marker=marker, label=said, s=28)
        if np.all(rows[name] > 0):
            ax.set_xscale("log")
        dress(ax, "", label, "correct on clean test images, %", legend=ax is axes[0])
    axes[0].figure.suptitle("Sharpness of finished models and their accuracy")
    save(axes[0], folder / "curvature.png")
