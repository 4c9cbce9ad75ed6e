"""The outcomes of a comparison, read from the folders of its runs, and their tables."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hf_ssam.run_folder import RESULTS, TRAINER_STATE, read_run

from .cli import UsageError

BUDGETS = {"epochs": "equal epochs", "gradients": "equal numbers of gradients"}


@dataclass(frozen=True)
class Run:
    """One cell of a comparison."""

    method: str
    learning_rate: float
    seed: int
    budget: str

    @property
    def folder(self) -> str:
        """Where it is, below the comparison's folder."""
        return f"{self.budget}/{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def at_epochs(self) -> "Run":
        """The same at equal epochs."""
        return replace(self, budget="epochs")

    def of(self, method: str) -> "Run":
        """The same of another method."""
        return replace(self, method=method)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        run: which one.
        score: the metric at the end.
        steps: optimizer steps.
        passes: forward-backward passes over a batch.
        seconds: wall-clock time of training, evaluations left out.
        curve: the metric at each evaluation, by the passes before it.
    """

    run: Run
    score: float
    steps: int
    passes: float
    seconds: float
    curve: tuple[tuple[float, float], ...]


def outcome(folder: Path, run: Run, metric: str) -> Outcome | None:
    """The outcome in `folder`, or None where the run did not finish; it writes its results last.

    Raises:
        UsageError: it finished without `metric`.
    """
    if not (folder / RESULTS).is_file() or not (folder / TRAINER_STATE).is_file():
        return None
    found = read_run(folder)
    results, log, steps = found.results, found.log, found.steps
    if metric not in results:
        found = ", ".join(name for name in results if name.startswith("eval_"))
        raise UsageError(f"metric: {metric} was not measured in {folder}, which has {found}: set one of these")
    counted = [(0, 0.0), *((e["step"], e["ssam/total_passes"]) for e in log if "ssam/total_passes" in e)]
    if len(counted) == 1:
        counted.append((steps, float(steps)))  # a stock optimizer takes one pass a step
    end = next(i for i, entry in enumerate(log) if "train_runtime" in entry)
    seconds = log[end]["train_runtime"] - sum(entry.get("eval_runtime", 0.0) for entry in log[:end])
    scores = {entry["step"]: entry[metric] for entry in log if metric in entry} | {steps: results[metric]}
    curve = tuple((float(np.interp(step, *zip(*counted, strict=True))), score) for step, score in scores.items())
    return Outcome(run, results[metric], steps, counted[-1][1], seconds, curve)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t; infinite for one value."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def against(scores: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """The mean difference to the baseline over the seeds of both, and its p value by a paired t test.

    The p value is NaN where the test has nothing to go by: fewer than two seeds, or differences that are all equal.
    """
    seeds = sorted(scores.keys() & baseline.keys())
    differences = np.array([scores[seed] - baseline[seed] for seed in seeds])
    if not len(differences):
        return math.nan, math.nan
    if len(differences) < 2 or np.ptp(differences) == 0:
        return float(differences.mean()), math.nan
    return float(differences.mean()), float(stats.ttest_1samp(differences, 0.0).pvalue)


def write_tables(outcomes: list[Outcome], folder: Path, baseline: str, title: str, metric: str) -> str:
    """Write ``results.csv``, a row for each run, and ``results.md``, whose text is returned."""
    rows = [
        {**vars(o.run), "score": o.score, "steps": o.steps, "passes": o.passes, "seconds": o.seconds} for o in outcomes
    ]
    columns = [*Run.__dataclass_fields__, "score", "steps", "passes", "seconds"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "results.csv", index=False)
    cells = sorted({(o.run.budget, o.run.learning_rate) for o in outcomes}, key=lambda cell: cell)
    parts = [_table([o for o in outcomes if (o.run.budget, o.run.learning_rate) == cell], baseline) for cell in cells]
    text = f"# {title}\n\nCompared is `{metric}` at the end of each run.\n\n" + "\n".join(parts)
    (folder / "results.md").write_text(text)
    return text


def _table(outcomes: list[Outcome], baseline: str) -> str:
    """The methods at one budget and learning rate."""
    first = outcomes[0].run
    lines = [
        f"At {BUDGETS[first.budget]}, learning rate {first.learning_rate:g}:",
        "",
        f"| method | seeds | mean ± 95 % interval | minus {baseline} | p (paired) | steps | passes | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_method = {o.run.method: [p for p in outcomes if p.run.method == o.run.method] for o in outcomes}
    plain = {o.run.seed: o.score for o in by_method.get(baseline, [])}
    for method, own in by_method.items():
        mean, half = interval(o.score for o in own)
        difference, p = against({o.run.seed: o.score for o in own}, plain)
        tested = "–" if math.isnan(p) else f"{p:.2f}"
        compared = "| | |" if method == baseline or math.isnan(difference) else f"| {difference:+.4f} | {tested} |"
        costs = " | ".join(
            f"{np.mean([getattr(o, cost) for o in own]):.0f}" for cost in ("steps", "passes", "seconds")
        )
        spread = "" if math.isinf(half) else f" ± {half:.4f}"
        lines.append(f"| {method} | {len(own)} | {mean:.4f}{spread} {compared} {costs} |")
    return "\n".join(lines) + "\n"
