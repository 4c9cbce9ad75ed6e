"""What do finished models lose to rounded weights, and to noise in them? Those of `label_noise`.

    python examples/run_study.py run configs/studies/label_noise.yaml         # first: it leaves the models
    python examples/run_study.py run configs/studies/robustness.yaml          # five minutes on one core

Every matrix is rounded to 8, 4 and 3 bits with one scale for each output channel, and Gaussian noise of a share of
its root mean square is added to it, five draws. Reported is the accuracy lost, since the arms differ in accuracy;
where they differ much the losses are not to be compared, which the clean accuracy beside them shows.
`measure_robustness.py` does this with any saved model.
"""

from functools import lru_cache
from pathlib import Path

import pandas as pd

from hf_ssam.plots.canvas import canvas, dress, save
from support.comparison_plots import look
from support.pictures import Pictures, accuracy, fashion
from support.robustness import damaged
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, by_condition, compared

from .finished import model_of


def measure(settings: Settings) -> Row:
    """Accuracy on test images as the model is, and under each change."""
    model, test = model_of(settings), tests(settings["test"])
    return damaged(model, lambda: accuracy(model, test), settings["bits"], settings["shares"], settings["draws"])


@lru_cache
def tests(count: int) -> Pictures:
    """The first test images."""
    return fashion("test", 0, count)


def changes(plan: StudyPlan) -> dict[str, str]:
    """The changes by the names of their columns."""
    bits = {f"bits_{n}": f"{n} bits" for n in plan.settings["bits"]}
    return bits | {f"noise_{share:g}": f"noise {share:g}" for share in plan.settings["shares"]}


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Accuracy lost to each change; the hardest rounding is the one that is tested."""
    names = changes(plan)
    lost = rows.assign(**{f"lost to {label}": rows["clean"] - rows[name] for name, label in names.items()})
    tested = f"lost to {min(plan.settings['bits'])} bits"
    others = [Column(label, f"lost to {label}", "+.3f") for label in names.values() if f"lost to {label}" != tested]
    parts = ["Accuracy lost (clean accuracy minus accuracy after the change)\n"]
    for noise, here in by_condition(lost, "noise"):
        columns = (Column("clean accuracy", "clean", ".3f"), *others)
        parts += [f"**Trained with {noise:.0%} random labels**\n", compared(here, plan.baseline, tested, columns)]
    return "\n".join(parts)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`robustness.png`: the accuracy under each change, a panel a share of wrong labels."""
    names, groups = {"clean": "as it is", **changes(plan)}, list(by_condition(rows, "noise"))
    axes = canvas(1, len(groups), (5.4, 3.8))
    fullest = max(range(len(groups)), key=lambda i: groups[i][1]["arm"].nunique())
    for ax, (noise, here) in zip(axes, groups, strict=True):
        for number, arm in enumerate(plan.arms):
            own = here[here["arm"] == arm]
            if len(own):
                style = look(number)
                ax.plot(list(names.values()), own[list(names)].mean() * 100, marker="o", label=arm, **style)
        ax.tick_params(axis="x", rotation=45)
        title = f"trained with {noise:.0%} random labels"
        dress(ax, title, "", "correct on test images, %", legend=ax is axes[fullest])
    axes[0].figure.suptitle("Finished models with rounded weights, and with noise in them")
    save(axes[0], folder / "robustness.png")
