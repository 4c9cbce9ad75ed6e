"""From seconds to a table, a CSV file and a figure: ratios of one round are ratios of the same moment."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import quantile_test

from hf_ssam.plots.canvas import COLORS, canvas, dress, save
from support.step_loops import LIMIT, OURS, PLAIN, TRAINER, Loop
from support.step_meters import Traced
from support.step_models import Setting

NOT_TRACED = Traced(0, 0, 0)

SSAM_BYTES = 28
"""What an SSAM step must move for a float32 parameter beyond its passes: read g and ĝ for their norms (8); read w and
g, write w + e elsewhere (12); read and write ĝ to scale it (8). Where w is written in place a copy is written besides
(4), which is read to write w again (8)."""


@dataclass(frozen=True)
class Measured:
    """All rounds of one loop: what `Taken` has, of a step, shape (rounds,) each; and one traced period."""

    loop: Loop
    seconds: np.ndarray
    passes: np.ndarray
    beside: np.ndarray
    traced: Traced = NOT_TRACED


@dataclass(frozen=True)
class Row:
    """A step's cost on one model and batch.

    `plain` and `limit` are quartiles of the ratios to a plain step and to its passes alone; `limit_from` to `limit_to`
    is the 95 % interval of `limit` as if rounds were independent, NaN for too few of them; `beyond_ms`, `operations`
    and `reads` are what it takes beyond its passes. A watch inside the step leaves out passes, looks and optimizer,
    whose times vary most: `beside_ms` is what it finds, and `watched`, with its interval, is `limit` as it would be if
    passes and optimizer had taken as long in both; what a method makes its passes cost is in `limit` alone. They are
    NaN on a GPU, and `watched` where the loop that it is compared with takes other passes. `kept_bytes` is what it
    adds to a checkpoint.
    """

    model: str
    parameters: int
    trained: int
    batch: int
    length: int
    device: str
    threads: int
    precision: str
    copy_gb_per_second: float
    loop: str
    rounds: int
    passes: float
    milliseconds: float
    plain_low: float
    plain: float
    plain_high: float
    limit_low: float
    limit: float
    limit_high: float
    limit_from: float
    limit_to: float
    beyond_ms: float
    beside_ms: float
    watched: float
    watched_from: float
    watched_to: float
    bytes_per_parameter: float
    peak_bytes: int
    kept_bytes: int
    operations: float
    reads: float


def least(
    found: Mapping[str, Measured], of: Measured, cost: Callable[[Measured], Any] = lambda one: one.seconds
) -> Any:
    """The least that a step of `of` can cost, round by round: that of its baseline, or of as many bare passes."""
    if of.loop.baseline is not None:
        return cost(found[of.loop.baseline])
    plain, two = cost(found[PLAIN]), cost(found[LIMIT])
    return plain + (of.passes - 1) * (two - plain)


def watched_ratios(found: Mapping[str, Measured], own: Measured) -> np.ndarray:
    """Round by round, what the time of a step is of its least one, if both have passes and optimizer of the latter."""
    base = found.get(own.loop.baseline, own)
    same = 1.0 if np.allclose(base.passes, own.passes) else np.nan
    return same + (own.beside - least(found, own, beside)) / least(found, own)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of their median; NaN where that is."""
    if np.isnan(ratios).any():
        return np.nan, np.nan
    known = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return float(known.low), float(known.high)


def beside(one: Measured) -> np.ndarray:
    return one.beside


def operations(one: Measured) -> int:
    return one.traced.operations


def reads(one: Measured) -> int:
    return one.traced.reads


def beyond_its_passes(found: Mapping[str, Measured], own: Measured, count: Callable[[Measured], int]) -> float:
    """How much more of something countable than in its passes alone."""
    return float(np.mean(count(own) - least(found, own, count)))


def row(found: Mapping[str, Measured], name: str, about: Mapping[str, object], period: int) -> Row:
    """What the rounds of a loop come to.

    Args:
        found: all loops by name.
        name: the loop.
        about: the fields of `Row` that say what was measured, and where.
        period: steps in the traced period.
    """
    own = found[name]
    bound = least(found, own)
    plain = np.percentile(own.seconds / found[PLAIN].seconds, [25, 50, 75])
    limit = np.percentile(own.seconds / bound, [25, 50, 75])
    watched = watched_ratios(found, own)
    beyond = float(np.median(own.seconds - bound))
    return Row(
        **about,
        loop=name,
        rounds=len(own.seconds),
        passes=float(np.mean(own.passes)),
        milliseconds=1e3 * float(np.median(own.seconds)),
        **dict(zip(("plain_low", "plain", "plain_high"), map(float, plain), strict=True)),
        **dict(zip(("limit_low", "limit", "limit_high"), map(float, limit), strict=True)),
        **dict(zip(("limit_from", "limit_to"), interval(own.seconds / bound), strict=True)),
        beyond_ms=1e3 * beyond,
        beside_ms=1e3 * float(np.median(own.beside)),
        watched=float(np.median(watched)),
        **dict(zip(("watched_from", "watched_to"), interval(watched), strict=True)),
        bytes_per_parameter=beyond * about["copy_gb_per_second"] * 1e9 / about["trained"],
        peak_bytes=own.traced.peak,
        kept_bytes=own.loop.kept(),
        operations=beyond_its_passes(found, own, operations) / period,
        reads=beyond_its_passes(found, own, reads) / period,
    )


def description(name: str, at: Setting, device: str, precision: str, bandwidth: float) -> dict[str, object]:
    """The fields of a `Row` that say what was measured, and where; `bandwidth` is a copy's, in bytes a second."""
    batch, length = at.batch["input_ids"].shape
    return {
        "model": name,
        "parameters": sum(p.numel() for p in at.model.parameters()),
        "trained": sum(p.numel() for p in at.trained),
        "batch": batch,
        "length": length,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "copy_gb_per_second": bandwidth / 1e9,
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each loop; peak memory and what a checkpoint holds in units of the weights that train."""
    lines = [
        "| loop | passes | of a plain step (quartiles) | of its passes alone (quartiles) "
        "| 95 % interval of that median | the same by a watch inside (95 % interval) | ms beyond its passes "
        "| bytes a parameter | peak memory | in a checkpoint | operations beyond | host reads beyond |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        weights = 4 * r.trained
        traced = f"{r.peak_bytes / weights:.1f} | {r.kept_bytes / weights:.1f} | {r.operations:.0f} | {r.reads:.1f}"
        if not r.peak_bytes:
            traced = f"– | {r.kept_bytes / weights:.1f} | – | –"
        watched = "–" if np.isnan(r.watched) else f"{r.watched:.3f} ({span(r.watched_from, r.watched_to)})"
        lines.append(
            f"| {r.loop} | {r.passes:.2f} | {r.plain:.2f} ({r.plain_low:.2f}-{r.plain_high:.2f}) "
            f"| {r.limit:.3f} ({r.limit_low:.3f}-{r.limit_high:.3f}) | {span(r.limit_from, r.limit_to)} "
            f"| {watched} | {r.beyond_ms:.1f} | {r.bytes_per_parameter:.0f} | {traced} |"
        )
    return "\n".join(lines)


def span(low: float, high: float) -> str:
    """An interval; a dash where too few rounds tell of none."""
    return "–" if np.isnan([low, high]).any() else f"{low:.3f}-{high:.3f}"


def report(rows: list[Row], period: int) -> str:
    """A title, the table, what an SSAM step's limit is, and what our Trainer adds."""
    r = rows[0]
    where = r.device if r.device != "cpu" else f"cpu, {r.threads} thread(s)"
    title = (
        f"\n{r.model}: {r.parameters:,} parameters, of which {r.trained:,} train; batch {r.batch} × {r.length}, "
        f"{r.precision}, {r.rounds} rounds of {period} steps, {where}; a copy moves {r.copy_gb_per_second:.1f} GB/s"
    )
    return "\n".join([title, table(rows), *_limit(rows), *_trainers(rows)])


def _limit(rows: Sequence[Row]) -> Iterator[str]:
    """What an SSAM step takes beyond its passes, by the watch where it tells, and what memory alone costs of it."""
    by_name = {r.loop: r for r in rows}
    for own in (r for r in rows if r.loop == "ssam"):
        watched = own.beside_ms - by_name[LIMIT].beside_ms
        beyond = own.beyond_ms if np.isnan(watched) else watched
        floor = 1e3 * SSAM_BYTES * own.trained / (own.copy_gb_per_second * 1e9)
        yield (
            f"ssam: {beyond:.1f} ms beyond its passes, of which the limit is {floor:.1f} ms "
            f"({SSAM_BYTES} bytes a parameter)"
        )


def _trainers(rows: Sequence[Row]) -> Iterator[str]:
    """What our Trainer adds to what the method adds by itself; on a GPU the watch tells nothing."""
    by_name = {r.loop: r for r in rows if not np.isnan(r.beside_ms)}
    for own in by_name.values():
        method = own.loop.removeprefix(OURS)
        if own.loop == method or method not in by_name:
            continue
        stock, of_method = by_name[TRAINER], by_name[method].beside_ms - by_name[LIMIT].beside_ms
        adds = own.beside_ms - stock.beside_ms - of_method
        yield (
            f"{own.loop}: beside passes and optimizer {own.beside_ms - stock.beside_ms:.1f} ms more than the stock "
            f"Trainer, of which {of_method:.1f} are the method's: {adds:.1f} ms, "
            f"{100 * adds / stock.milliseconds:.1f} % of the stock Trainer's step, are our Trainer's"
        )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each loop's median over its passes alone, with quartiles: a panel for each model and batch."""
    panels: dict[tuple, list[Row]] = {}
    for r in rows:
        panels.setdefault((r.model, r.parameters, r.batch, r.length), []).append(r)
    axes = canvas(len(panels), 1, (7.0, 0.9 + 0.28 * max(map(len, panels.values()))))
    for ax, ((model, parameters, batch, length), here) in zip(axes, panels.items(), strict=True):
        middle = np.array([r.limit for r in here])
        reach = np.abs(np.array([[r.limit_low, r.limit_high] for r in here]).T - middle)
        ax.errorbar(middle, range(len(here)), xerr=reach, fmt="o", markersize=4, color=COLORS[0], capsize=2)
        ax.axvline(1.0, color="0.6", linewidth=0.8)
        ax.set_yticks(range(len(here)), [r.loop for r in here])
        ax.invert_yaxis()
        title = f"{model}, {parameters / 1e6:.1f}M parameters, batch {batch} × {length}"
        dress(
            ax, f"{title}\nmedian and quartiles over {here[0].rounds} rounds", "time over that of its passes alone", ""
        )
    save(axes[0], path)
