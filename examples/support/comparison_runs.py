"""The runs of a comparison: the script and the flags of each, how long it trains, and what has been measured."""

import importlib
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from support.cli import UsageError
from support.comparison import Outcome, Run, outcome
from support.comparison_plan import Plan, keep_plan
from support.sweep import sweep

PLAN = "plan.yaml"
"""The plan, as the folder of a comparison keeps it."""


def train_all(plan: Plan, folder: Path, max_runs: int | None) -> None:
    """Train every run of `plan` whose results are not in `folder` yet."""
    script = _script(plan.script)
    folder.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, folder / PLAN)

    def is_done(one: Run) -> bool:
        return outcome(folder / one.folder, one, plan.metric) is not None

    def train(one: Run) -> None:
        steps = _steps(one, plan, folder)
        if steps == 0:
            return
        script.main(_command(one, plan, folder / one.folder, steps))
        for weights in (folder / one.folder).glob("*.safetensors"):
            weights.unlink()

    sweep(list(plan.runs()), is_done, train, max_runs, label=lambda one: one.folder)


def finished(plan: Plan, folder: Path) -> list[Outcome]:
    """What has been measured. A method that takes one pass a step has the same outcome at both budgets."""
    found = []
    for one in plan.runs():
        measured = outcome(folder / one.folder, one, plan.metric)
        at_epochs = outcome(folder / one.at_epochs.folder, one, plan.metric)
        if measured is None and at_epochs is not None and at_epochs.passes == at_epochs.steps:
            measured = at_epochs
        if measured is not None:
            found.append(measured)
    return found


def _script(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(
            f"script: there is no examples/{name}.py: give a name such as run_text_classification"
        ) from error


def _steps(one: Run, plan: Plan, folder: Path) -> int | None:
    """The number of steps of `one`: None for the whole number of epochs, 0 where the run at equal epochs serves."""
    if one.budget == "epochs":
        return None
    own = outcome(folder / one.at_epochs.folder, one, plan.metric)
    plain = outcome(folder / one.of(plan.baseline).at_epochs.folder, one, plan.metric)
    return 0 if own.passes == own.steps else max(1, round(plain.passes * own.steps / own.passes))


def _command(one: Run, plan: Plan, place: Path, steps: int | None) -> list[str]:
    """The flags of one run; what a run that was cut off has left is taken up, or cleared away."""
    chosen = {**plan.flags, **plan.methods[one.method], "learning_rate": one.learning_rate, "seed": one.seed}
    chosen |= {"output_dir": place} | ({} if steps is None else {"max_steps": steps})
    if place.is_dir() and get_last_checkpoint(place):
        chosen["resume_from_checkpoint"] = "true"
    else:
        shutil.rmtree(place, ignore_errors=True)
    return [plan.config, *(word for name, value in chosen.items() for word in (f"--{name}", *_words(value)))]


def _words(value: Any) -> list[str]:
    """A flag's value as a command line has it."""
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]
