"""What a run says about itself: pure functions from arguments, logs and folders to the rows of a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..methods.method import Method, checked_rho
from ..run_folder import read_run
from .markdown import code
from .redaction import is_secret, public

Log = Sequence[Mapping[str, Any]]

TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
TIMING_COLUMNS = tuple(name.replace("_", " ").title() for name in TIMING)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = re.compile(r"[/\\]models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class PlainRun:
    """The same run with the plain optimizer.

    Attributes:
        metrics: what it evaluated to in the end.
        seconds: training time in seconds; None where the folder does not tell.
        name: the folder's name; which optimizer it was, the log does not tell.
    """

    metrics: Mapping[str, float]
    seconds: float | None
    name: str


def metrics_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The `eval_` numbers of some log entries, later ones over earlier ones, without timings."""
    found: dict[str, float] = {}
    for entry in entries:
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if name != key and not name.endswith(TIMING) and isinstance(value, int | float):
                found[name] = value
    return found


def evaluations(log: Log, before: Mapping[str, float], best_step: int | None) -> tuple[dict, dict]:
    """Metrics of the model before training and of the model that is shared.

    The shared model is the one evaluated after training has ended; without such an evaluation the best one, where
    the Trainer went back to it (`load_best_model_at_end`), and otherwise the last one.

    Args:
        log: `state.log_history`.
        before: Metrics of an evaluation before the first step; `eval_on_start` leaves one in the log as well.
        best_step: `state.best_global_step`.
    """
    at_start = metrics_of(entry for entry in log if entry.get("step") == 0)
    evaluated = [entry for entry in log if metrics_of([entry]) and entry.get("step") != 0]
    ends = [i for i, entry in enumerate(log) if "train_runtime" in entry]
    final = [entry for entry in log[ends[-1] :] if entry in evaluated] if ends else []
    if not final and evaluated:
        steps = [entry.get("step") for entry in evaluated]
        wanted = best_step if best_step in steps else steps[-1]
        final = [entry for entry in evaluated if entry.get("step") == wanted]
    return {**at_start, **metrics_of([before])}, metrics_of(final)


def result_rows(before: Mapping, after: Mapping, plain: Mapping) -> list[dict[str, Any]]:
    """One row for each metric of `after`, or of `before` where nothing was evaluated since."""
    names = after or before
    return [{"metric": n, "before": before.get(n), "after": after.get(n), "plain": plain.get(n)} for n in names]


def history_rows(log: Log) -> list[dict[str, Any]]:
    """The evaluations during training, as the stock card shows them but without timings; none before training ends."""
    from transformers.modelcard import parse_log_history  # loads Transformers, which `hf-ssam card` does without

    lines = parse_log_history(log)[1] or []
    return [{name: value for name, value in line.items() if not name.endswith(TIMING_COLUMNS)} for line in lines]


def sharpness_rows(log: Log) -> list[dict[str, Any]]:
    """First and last value of each `sharpness/` quantity, with the steps they were measured at."""
    rows = []
    for key in sorted({key for entry in log for key in entry if key.startswith("sharpness/")}):
        seen = [(entry.get("step"), entry[key]) for entry in log if key in entry]
        (first_step, first), (last_step, last) = seen[0], seen[-1]
        name = key.removeprefix("sharpness/").replace("_", " ")
        rows.append({"name": name, "first": first, "first_step": first_step, "last": last, "last_step": last_step})
    return rows


def compute_cost(log: Log, method: Method, steps: int, plain: PlainRun | None) -> dict[str, Any]:
    """What the run cost: passes a step, gradients of the whole batch, seconds, and the plain optimizer's seconds.

    The gradients are `ssam/total_passes`, which counts from the first step on and over restarts; the last entry that
    has it may lie before the last step, and its step is given beside it. The seconds are those since the last restart,
    so a resumed run is not compared with the plain optimizer's.
    """
    counted = [entry for entry in log if "ssam/total_passes" in entry]
    scales = [entry["ssam/scale"] for entry in counted if "ssam/scale" in entry]
    end = next((entry for entry in reversed(log) if "train_runtime" in entry), {})
    seconds, resumed_at = end.get("train_runtime"), end.get("train_resumed_at")
    plain_seconds = plain.seconds if plain else None
    return {
        "passes": method.passes,
        "steps": steps,
        "gradients": counted[-1]["ssam/total_passes"] if counted else None,
        "gradients_step": counted[-1].get("step") if counted else None,
        "skipped": sum(entry.get("ssam/skipped_steps", 0) for entry in log),
        "scale": (min(scales), max(scales)) if scales else None,
        "seconds": seconds,
        "resumed_at": resumed_at,
        "plain": plain.name if plain else None,
        "plain_seconds": plain_seconds,
        "ratio": seconds / plain_seconds if seconds and plain_seconds and not resumed_at else None,
    }


def method_settings(args: Any, method: Method) -> dict[str, str]:
    """Method, radius, options, scope and base optimizer, as the card's table shows them: Markdown."""
    betas = f" (betas {args.adam_beta1:g}, {args.adam_beta2:g}; epsilon {args.adam_epsilon:g})"
    optimizer = args.base_optim.value
    rows = {
        "Method": code(method.name),
        "Radius ρ": f"{checked_rho(args.rho, method):g}, schedule {code(args.rho_scheduler_type)}",
        "Options": ", ".join(code(f"{name}={_literal(value)}") for name, value in method.values.items()),
        "Perturbed parameters": code(public(args.perturb)),
        "Perturbed steps": _perturbed_steps(args.ascent_start, args.ascent_interval),
        "Ascent scope": code(args.ascent_scope),
        "Same random numbers in both passes": "yes" if args.replay_rng else "no",
        "Base optimizer": f"{code(optimizer)}{betas if 'adam' in optimizer else ''}",
    }
    base_args = {"Base optimizer arguments": code(public(args.base_optim_args))} if args.base_optim_args else {}
    return rows | base_args


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _perturbed_steps(start: float, interval: int) -> str:
    every = "every step" if interval == 1 else f"every {interval} steps"
    if not start:
        return every
    return f"{every}, from {f'{start:.0%} of the run' if start < 1 else f'step {start:g}'} on"


def changed_arguments(args: Any) -> dict[str, str]:
    """The arguments that differ from their defaults, as Python literals: no tokens, no paths of the machine."""
    changed = {"optim": repr(args.optim)}
    for field in fields(args):
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        is_default = value == field.default or not (value or field.default)
        if isinstance(value, str | int | float) and not is_default and not is_secret(field.name):
            changed[field.name] = repr(public(value) if isinstance(value, str) else value)
    return changed


def public_base_model(name: Any, model: Any) -> dict[str, str | None]:
    """The base model's Hub name, or the last part of a local folder's name; neither for a model made from a config.

    The Hub refuses a card whose `base_model` is a path, and a path tells about the machine it is on. The client's own
    cache has the Hub name in the path.
    """
    known = name[0] if isinstance(name, list) and name else name
    path = known or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return {"id": None, "folder": None}
    if cached := CACHED.search(str(path)):
        return {"id": "/".join(filter(None, cached.groups())), "folder": None}
    if os.path.isdir(path) or not REPO_ID.fullmatch(path):
        return {"id": None, "folder": Path(public(path)).name}
    return {"id": path, "folder": None}


def plain_run(folder: str | Path) -> PlainRun:
    """What the folder of a run with the plain optimizer tells.

    Raises:
        ValueError: where the folder holds no state of a run, or a damaged one.
    """
    try:
        run = read_run(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"card_baseline: {error}") from error
    seconds = [entry["train_runtime"] for entry in run.log if "train_runtime" in entry]
    return PlainRun(evaluations(run.log, {}, run.best_step)[1], seconds[-1] if seconds else None, Path(folder).name)
