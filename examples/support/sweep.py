"""Runs what has not run yet, one after the other: comparisons and studies both go through here."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

One = TypeVar("One")


def sweep(
    cells: Sequence[One],
    is_done: Callable[[One], bool],
    run: Callable[[One], None],
    limit: int | None = None,
    label: Callable[[One], str] = str,
) -> int | None:
    """Run each of `cells` that is not done, behind a progress bar.

    Args:
        cells: in the order in which they run.
        is_done: asked of all before the first one runs.
        run: leaves what makes `is_done` true.
        limit: the most to run; None is all.
        label: how the bar calls a cell.

    Returns:
        What is left of `limit`.
    """
    missing = [cell for cell in cells if not is_done(cell)][:limit]
    bar = tqdm(missing, disable=not missing)
    for cell in bar:
        bar.set_description(label(cell))
        run(cell)
    return None if limit is None else limit - len(missing)
