"""A study: arms that train under the same settings, over seeds and conditions; each finished run is a row of a CSV.

The plan is a YAML file. `blocks` say which arms run at which seeds and conditions (lists of values of a setting), in
order; what an arm is to be tuned over is tried, before the first block that needs it, at a seed and on data that no
block uses, and the value with the best score is taken. A row holds all settings of its run, and a run is done where
there is a row with its settings: a study may be killed at any time, and a setting that changes makes a new run.
"""

import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from tqdm.auto import tqdm

from .cli import UsageError
from .sweep import sweep

Settings = dict[str, Any]
Row = dict[str, Any]
TUNING, REPORT = "tuning", "report"
TUNED_AS = "tuned_as"


@dataclass(frozen=True)
class Cell:
    """One run: its arm, whether it is reported or only tunes, and all that it is given, its seed among it."""

    arm: str
    phase: str
    settings: Settings

    @property
    def key(self) -> str:
        """What tells it from every other run."""
        return json.dumps({"arm": self.arm, "phase": self.phase, **self.settings}, sort_keys=True)

    def name(self) -> str:
        """How the progress bar calls it."""
        return f"{self.phase} {self.arm}, seed {self.settings.get('seed')}"


@dataclass(frozen=True)
class Tuning:
    """What is tried before the report: `grids` has, by arm, values of its settings; the best `score` is taken."""

    settings: Settings
    score: str
    grids: dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class StudyPlan:
    """The keys of a study's configuration file.

    Attributes:
        title: of tables and figures.
        study: the module in `examples/studies` that measures and draws.
        settings: what every run is given.
        arms: what an arm is given over that, by the name that figures use; `tuned_as` takes another arm's values.
        baseline: the arm that the others are tested against.
        blocks: `arms`, `seeds`, and any setting with its list of values; in this order.
        tuning: see `Tuning`.
        fast: `settings` and `blocks` of the short form, which only shows that the study runs.
    """

    title: str
    study: str
    settings: Settings
    arms: dict[str, Settings]
    baseline: str
    blocks: list[dict[str, Any]]
    tuning: dict[str, Any] = field(default_factory=lambda: {"settings": {}, "score": "", "grids": {}})
    fast: dict[str, Any] = field(default_factory=dict)

    def shortened(self) -> "StudyPlan":
        """The short form."""
        settings = {**self.settings, **self.fast.get("settings", {})}
        return replace(self, settings=settings, blocks=self.fast.get("blocks", self.blocks))

    def tuning_cells(self, arms: Sequence[str]) -> list[Cell]:
        """What must have run before the values of `arms` are known."""
        tuning = Tuning(**self.tuning)
        cells = []
        for arm in dict.fromkeys(self.arms[name].get(TUNED_AS, name) for name in arms):
            for values in product(tuning.grids.get(arm, {})) if arm in tuning.grids else ():
                own = {**self.settings, **tuning.settings, **self.of(arm), **values}
                cells.append(Cell(arm, TUNING, own))
        return cells

    def report_cells(self, block: dict[str, Any], chosen: Callable[[str], Settings]) -> list[Cell]:
        """The runs of a block: all arms of a seed and condition, then the next ones."""
        conditions = {key: values for key, values in block.items() if key not in ("arms", "seeds")}
        arms, seeds = block.get("arms", list(self.arms)), block["seeds"]
        return [
            Cell(arm, REPORT, {**self.settings, **self.of(arm), **chosen(arm), **condition, "seed": seed})
            for seed in seeds
            for condition in product(conditions)
            for arm in arms
        ]

    def of(self, arm: str) -> Settings:
        """The arm's own settings."""
        return {key: value for key, value in self.arms[arm].items() if key != TUNED_AS}

    def chosen(self, rows: pd.DataFrame) -> Callable[[str], Settings]:
        """Arm -> the values that scored best in `rows`; nothing where it is not tuned, or not yet."""
        tuning = Tuning(**self.tuning)

        def best(arm: str) -> Settings:
            tuned = self.arms[arm].get(TUNED_AS, arm)
            scored = self.rows_of(rows, self.tuning_cells([tuned]))
            if scored.empty:
                return {}
            settings = json.loads(scored.loc[scored[tuning.score].idxmax(), "settings"])
            return {key: settings[key] for key in tuning.grids[tuned]}

        return best

    def rows_of(self, rows: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
        """The rows of these cells, in their order."""
        if rows.empty:
            return rows
        order = {cell.key: i for i, cell in enumerate(cells)}
        mine = rows[rows["settings"].isin(order)]
        return mine.iloc[mine["settings"].map(order).argsort(kind="stable").to_numpy()]

    def reported(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of the report that the plan asks for, with each run's settings as columns beside its figures."""
        cells = [c for block in self.blocks for c in self.report_cells(block, self.chosen(rows))]
        mine = self.rows_of(rows, cells)
        given = pd.DataFrame([json.loads(text) for text in mine.get("settings", [])], index=mine.index)
        return mine.join(given[[name for name in given if name not in mine]])


def product(values: dict[str, list[Any]]) -> Iterator[Settings]:
    """Every choice of one value for each key; one empty choice where there is no key."""
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def read_plan(path: Path) -> StudyPlan:
    """The plan in a YAML file.

    Raises:
        UsageError: there is no such file, a key is missing or unknown, or a block names an arm that there is not.
    """
    if not path.is_file():
        raise UsageError(f"there is no study {path}: give one of configs/studies")
    values = yaml.safe_load(path.read_text())
    try:
        plan = StudyPlan(**values)
    except TypeError as error:
        known = ", ".join(one.name for one in fields(StudyPlan))
        raise UsageError(f"{path} may set {known}, and nothing else ({error})") from error
    named = [arm for block in (*plan.blocks, *plan.fast.get("blocks", [])) for arm in block.get("arms", [])]
    named += [plan.baseline, *plan.tuning["grids"], *(own[TUNED_AS] for own in plan.arms.values() if TUNED_AS in own)]
    for arm in named:
        if arm not in plan.arms:
            raise UsageError(f"{path} names the arm {arm!r}, which is none of {', '.join(plan.arms)}")
    return plan


class RowFile:
    """The CSV file that a study fills; each run appends its row as it ends."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> pd.DataFrame:
        """All rows; an empty table where there are none."""
        return pd.read_csv(self.path) if self.path.is_file() else pd.DataFrame()

    def holds(self, cell: Cell) -> bool:
        """Whether `cell` has run."""
        rows = self.read()
        return not rows.empty and cell.key in set(rows["settings"])

    def append(self, cell: Cell, measured: Row) -> None:
        """Add a row; the file is replaced by one rename, so that it is always whole."""
        known = {"phase": cell.phase, "arm": cell.arm, "seed": cell.settings.get("seed"), "settings": cell.key}
        row = pd.DataFrame([{**known, **measured, **circumstances()}])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".writing")
        pd.concat([self.read(), row], ignore_index=True).to_csv(fresh, index=False)
        fresh.replace(self.path)


def run_all(plan: StudyPlan, rows: RowFile, measure: Callable[[Settings], Row], max_runs: int | None = None) -> None:
    """Run what is missing, block by block; the arms of a block are tuned before it.

    A run that fails is said and left out, and the next one begins: the others are worth having without it.
    """

    def run(cell: Cell) -> None:
        begun = time.process_time()
        try:
            measured = measure({**cell.settings, "arm": cell.arm})
        except Exception as error:
            tqdm.write(f"{cell.name()} failed and is left out: {type(error).__name__}: {error}")
            return
        rows.append(cell, {**measured, "cpu_seconds": round(time.process_time() - begun, 2)})

    left = max_runs
    for block in plan.blocks:
        left = sweep(plan.tuning_cells(block.get("arms", list(plan.arms))), rows.holds, run, left, Cell.name)
        left = sweep(plan.report_cells(block, plan.chosen(rows.read())), rows.holds, run, left, Cell.name)


def circumstances() -> Row:
    """Where and with what code a run was made."""
    threads = torch.get_num_threads()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}",
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit that the code is at, with `-dirty` where files differ from it; `unknown` outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
