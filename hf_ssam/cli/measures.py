"""The measures of `hf-ssam sharpness`, each a row's part of the table; apart from its flags, which need no torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..saved import resident
from ..saved.models import Subject
from ..sharpness import Objective, ascent_sharpness, top_eigenvalues, trace

Row = dict[str, Any]


def eigenvalues(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The k largest eigenvalues."""
    top = top_eigenvalues(subject.model, subject.batches, k=args.k, tol=args.tol, **how)
    found = {"eigenvalues": top.values, "solver": top.solver, "converged": top.converged}
    return found | {"work": f"{top.products} products ({top.solver})"}


def traced(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The trace and its standard error."""
    total = trace(subject.model, subject.batches, args.trace_samples, **how)
    found = {"trace": total.value, "trace_error": total.standard_error}
    return found | {"work": f"{total.products} products"}


def ascended(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The rise of the loss in the plain ball and in the adaptive one."""
    plain = ascent_sharpness(subject.model, subject.batches, args.rho, **how)
    adaptive = ascent_sharpness(subject.model, subject.batches, args.adaptive_rho, adaptive=True, **how)
    found = {"rise": plain.value, "adaptive_rise": adaptive.value}
    return found | {"work": f"{plain.passes + adaptive.passes} gradients and losses"}


MEASURES: dict[str, Callable[[Subject, argparse.Namespace, Row], Row]] = {
    "eigenvalues": eigenvalues,
    "trace": traced,
    "ascent": ascended,
}


def measured(subjects: list[Subject], args: argparse.Namespace) -> list[Row]:
    """The rows of the table; every model has evaluated its loss once before memory is counted."""
    for subject in subjects:
        Objective(subject.model, subject.batches).value()
    base = resident.now()
    return [measure(s, pattern, args, base) for s in subjects for pattern in args.parameters]


def measure(subject: Subject, pattern: str | None, args: argparse.Namespace, base: float | None) -> Row:
    """One row of the table; memory is counted from `base`."""
    objective = Objective(subject.model, subject.batches, parameters=pattern)
    row: Row = {"model": subject.name, "data": subject.data, "weights": pattern or "all trainable"}
    row |= {"n": objective.size, "loss": objective.value(), "precision": objective.precision, "cost": {}}
    how = {"parameters": pattern, "progress": args.progress}
    for name in args.measures:
        begun = time.perf_counter()
        found, peak = resident.peak_of(partial(MEASURES[name], subject, args, how))
        cost = {"work": found.pop("work"), "seconds": time.perf_counter() - begun}
        mib = None if peak is None or base is None else peak - base
        row["cost"][name] = cost | {"mib": mib, "weight_mib": subject.weight_mib}
        row |= found
    return row
