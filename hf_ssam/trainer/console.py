"""What a person sees of a run: one line before it, and of each log entry the numbers that tell how it goes.

All of an entry is in `trainer_state.json` and goes to every `report_to`; what is chosen here is what the progress bar,
the plain printer and the table of a notebook show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..methods.method import Rules
from .host import Host
from .schedules import first_ascent, is_ascent_step
from .step_log import PREFIX

SHOWN = ("all", "main", "none")

MAIN = ("ascent_loss", "grad_norm", "scale")
COLUMNS = {"ascent_loss": "Ascent Loss", "grad_norm": "‖g‖", "scale": "γ"}
"""How the table of a notebook calls them."""


def shown(entry: Mapping[str, Any], which: str) -> dict[str, Any]:
    """What of a log entry is shown.

    Args:
        entry: with its `ssam/…` values.
        which: of them: `all` but a loss that stands there already, the `main` ones, or `none`.
    """
    ours = {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
    kept = {"all": set(ours) - _repeated(entry, ours), "main": _main(ours), "none": set[str]()}[which]
    return {n: v for n, v in entry.items() if not n.startswith(PREFIX) or n.removeprefix(PREFIX) in kept}


def _repeated(entry: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """The loss, where the Trainer's own is the same number."""
    stock, own = entry.get("loss"), ours.get("loss")
    if stock is None or own is None:
        return set()
    return {"loss"} if math.isclose(stock, own, rel_tol=1e-3) else set()


def _main(ours: Mapping[str, Any]) -> set[str]:
    """Ascent loss, ‖g‖ and, where it does something, γ; skipped steps where there are any."""
    names = {name for name in MAIN if name in ours}
    return (names - ({"scale"} if ours.get("scale") == 1 else set())) | (
        {"skipped_steps"} if ours.get("skipped_steps") else set()
    )


class Console(ProgressCallback):
    """The progress bar, with what `log_ssam` shows of an entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """As the parent's, of fewer numbers."""
        super().on_log(args, state, control, logs=shown(logs, args.log_ssam), **kwargs)


class Printer(PrinterCallback):
    """The plain printer, with what `log_ssam` shows of an entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """As the parent's, of fewer numbers."""
        super().on_log(args, state, control, logs=shown(logs, args.log_ssam), **kwargs)


def notebook_table() -> type[TrainerCallback]:
    """The notebook's progress table, with a column for each number that `log_ssam` shows."""
    from transformers.utils.notebook import NotebookProgressCallback  # needs IPython

    class Table(NotebookProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            super().on_log(args, state, control, logs=logs, **kwargs)
            values = {COLUMNS.get(n, n): logs[PREFIX + n] for n in _columns(logs, args.log_ssam)}
            tracker = self.training_tracker
            if values and tracker and args.eval_strategy == "no":  # a table of evaluations has rows for these alone
                tracker.write_line({"Step": state.global_step, **values})

    return Table


def _columns(logs: Mapping[str, Any], which: str) -> list[str]:
    return [n.removeprefix(PREFIX) for n in shown(logs, which) if n.startswith(PREFIX)] if "loss" in logs else []


def show_less(callbacks: list[TrainerCallback]) -> None:
    """Put ours in the place of the stock callbacks that print log entries; others, and subclasses, stay."""
    ours: dict[type, Any] = {ProgressCallback: Console, PrinterCallback: Printer}
    if is_in_notebook():
        table = notebook_table()
        ours[table.__mro__[1]] = table
    for index, callback in enumerate(callbacks):
        if type(callback) in ours:
            callbacks[index] = ours[type(callback)]()
            vars(callbacks[index]).update(vars(callback))


def opening(args: Any, rules: Rules, rho: float, max_steps: int, resumed_at: int = 0) -> str:
    """What a run is about to do: method, base optimizer, ρ, steps and passes; and the step that it goes on from."""
    method = args.method()
    base = "its own optimizer" if method.optimizer else args.base_optim.value
    schedule = "" if args.rho_scheduler_type == "constant" else f" ({args.rho_scheduler_type})"
    passes = max_steps + (second_passes(args, rules, max_steps) if rho > 0 else 0)
    most = "at most " if rules.takes_indices else ""
    start = f"; resumed at step {resumed_at}" if resumed_at else ""
    return (
        f"{method.name} over {base}, rho {rho:g}{schedule}: {max_steps} steps = {most}{passes} passes over a batch, "
        f"{passes / max_steps:.3g} times the plain optimizer's{start}"
    )


def second_passes(args: Any, rules: Rules, max_steps: int) -> int:
    """How many of a run's steps take a second pass."""
    if rules.second_pass.interval is None:
        return 0
    start = first_ascent(args.ascent_start, max_steps)
    perturbed = sum(is_ascent_step(step, start, args.ascent_interval) for step in range(max_steps))
    return -(-perturbed // rules.second_pass.interval)


class ConsoleMixin(Host):
    """What a Trainer says on the console, beside its log entries."""

    def say(self, text: str) -> None:
        """Print `text`, once over all processes; nothing under `log_ssam=none`."""
        if self.is_world_process_zero() and self.args.log_ssam != "none":
            print(text, flush=True)
