"""Tables and curves over the rows of a study: means over seeds, 95 % intervals, and tests that are paired by seed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .comparison import against, interval
from .comparison_plots import look


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, which figure of a run it is the mean of, and how that is written."""

    heading: str
    name: str
    form: str

    def of(self, rows: pd.DataFrame) -> str:
        """The cell of these runs; a dash where they have no such figure."""
        values = rows[self.name].dropna() if self.name in rows else []
        return format(float(np.mean(values)), self.form) if len(values) else "–"


def compared(rows: pd.DataFrame, baseline: str, tested: str, columns: Sequence[Column], form: str = ".3f") -> str:
    """A row for each arm: n, the mean of `tested` and its interval, the difference to the baseline and its p value."""
    heads = ["", "n", f"{tested.replace('_', ' ')} ± 95 %", f"minus {baseline}", "p", *(c.heading for c in columns)]
    lines = [heads, ["---"] * len(heads)]
    plain = by_seed(rows[rows["arm"] == baseline], tested)
    for arm, own in rows.groupby("arm", sort=False):
        mean, half = interval(own[tested])
        difference, p = against(by_seed(own, tested), plain)
        is_compared = arm != baseline and not math.isnan(difference)
        cells = [str(arm), str(len(own)), with_interval(mean, half, form)]
        cells += [f"{difference:+{form}}" if is_compared else "", probability(p) if is_compared else ""]
        lines.append(cells + [column.of(own) for column in columns])
    return markdown(lines)


def with_interval(mean: float, half: float, form: str) -> str:
    """A mean and half of its interval, which one run does not have; in words where a run's figure is not finite."""
    if math.isnan(mean):
        return "not finite: diverged"
    return format(mean, form) + ("" if math.isinf(half) else f" ± {half:{form}}")


def dots(ax: Axes, rows: pd.DataFrame, arms: Sequence[str], number: int = 0, name: str | None = None) -> None:
    """Test accuracy of each arm in %: a dot with its 95 % interval, which one run does not have.

    Args:
        ax: what to draw on.
        rows: the runs.
        arms: from left to right.
        number: of this group of runs, where several stand beside each other.
        name: of the group in the legend.
    """
    color = look(number)["color"]
    for place, arm in enumerate(arms):
        own = rows.loc[rows["arm"] == arm, "test_accuracy"] * 100
        mean, half = interval(own)
        bar, label = half if len(own) > 1 else 0, name if place == 0 else None
        ax.errorbar(place + 0.15 * number, mean, bar, fmt="o", color=color, capsize=3, label=label)
    ax.set_xticks(range(len(arms)), arms, rotation=25, ha="right", fontsize="small")


def by_seed(rows: pd.DataFrame, name: str) -> dict[int, float]:
    """A figure of each run, by its seed."""
    return dict(zip(rows["seed"], rows[name], strict=True))


def probability(p: float) -> str:
    """A p value in print; a dash where there is none."""
    if math.isnan(p):
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}"


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A table of cells; the first line is its head, the second the rule below it."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def by_condition(rows: pd.DataFrame, name: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of each value of a setting, in ascending order."""
    yield from rows.groupby(name, sort=True)


@dataclass(frozen=True)
class Drawn:
    """How the runs of an arm are drawn: the mean over seeds as a line, and the range over seeds as a band."""

    label: str
    number: int

    def over(self, ax: Axes, x: pd.Series, y: pd.Series) -> None:
        """`y` against `x`, one number a run."""
        groups = pd.DataFrame({"x": x.to_numpy(), "y": y.to_numpy()}).groupby("x")["y"]
        self._draw(ax, groups.mean().index, groups.mean(), groups.min(), groups.max())

    def curves(self, ax: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """One curve a run, all at the same x."""
        values = np.array([y for _, y in curves])
        self._draw(ax, curves[0][0], values.mean(0), values.min(0), values.max(0))

    def _draw(self, ax: Axes, x: Any, mean: Any, low: Any, high: Any) -> None:
        style = look(self.number)
        ax.plot(x, mean, label=self.label, marker="o", markersize=4, **style)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
