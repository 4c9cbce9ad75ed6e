"""The plan of a comparison: its YAML file, checked, and kept in the folder that it fills."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_ssam.run_folder import RESULTS

from .cli import UsageError, yaml_file
from .comparison import Run

EXAMPLE = "examples/README.md, Comparing methods, has a whole file"


@dataclass(frozen=True)
class Plan:
    """What is compared: the keys of the configuration file.

    Attributes:
        script: an example of this folder that trains, such as `run_text_classification`.
        config: the task's configuration file.
        output_dir: where the runs go.
        flags: what to set over the configuration, for all runs.
        baseline: the method that the others are tested against.
        methods: flags by the name that figures use.
        seeds: one run each.
        learning_rates: the first is the main one; all runs of it come first.
        budgets: `epochs`, `gradients` or both; the learning rates after the first are only run at the first budget.
        metric: what is compared.
        title: of the figures.
    """

    script: str
    config: str
    output_dir: str
    baseline: str
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    learning_rates: list[float]
    flags: dict[str, Any] = field(default_factory=dict)
    title: str = "Comparison"
    metric: str = "eval_accuracy"
    budgets: tuple[str, ...] = ("epochs", "gradients")

    def runs(self) -> Iterator[Run]:
        """All runs; those at equal epochs come first, since the steps at equal gradients follow from them."""
        for i, rate in enumerate(self.learning_rates):
            for budget in self.budgets if i == 0 else self.budgets[:1]:
                for seed in self.seeds:
                    for method in self.methods:
                        yield Run(method, float(rate), seed, budget)


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        UsageError: there is no such file, or a key is missing, unknown or does not fit the others.
    """
    if not path.is_file():
        raise UsageError(f"there is no comparison {path}: run one first, as configs/comparisons/trec.yaml does")
    values = yaml_file(path)
    _check_keys(path, values)
    plan = Plan(**values)
    if plan.baseline not in plan.methods:
        raise UsageError(f"{path}: the baseline {plan.baseline!r} is none of the methods {', '.join(plan.methods)}")
    if list(plan.budgets) not in (["epochs"], ["epochs", "gradients"]):
        raise UsageError(f"{path}: budgets are [epochs] or [epochs, gradients], not {list(plan.budgets)}")
    return plan


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    """Refuse a file that lacks a key, has one too many, or holds something else under one."""
    known = {key.name: key.default is MISSING and key.default_factory is MISSING for key in fields(Plan)}
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise UsageError(f"{path} sets {key!r}, which is no key of a comparison: {_meant(near, known)}")
    if lacking := [key for key, is_required in known.items() if is_required and key not in values]:
        raise UsageError(f"{path} lacks {', '.join(lacking)}: {EXAMPLE}")
    for key in ("seeds", "learning_rates"):
        if not isinstance(values[key], list) or not values[key]:
            raise UsageError(f"{path}: {key} is {values[key]!r}, which is no list: write {key}: [FIRST, SECOND]")
    methods = values["methods"]
    if not isinstance(methods, dict) or not all(isinstance(flags, dict) for flags in methods.values()):
        raise UsageError(f"{path}: methods must hold lines such as `sam: {{optim: sam, rho: 0.05}}`; {EXAMPLE}")


def _meant(near: list[str], known: Iterable[str]) -> str:
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"


def _has_runs(folder: Path) -> bool:
    """Whether a run finished in `folder`, or left a checkpoint that would be taken up."""
    return any(next(folder.glob(f"*/*/{name}"), None) for name in (RESULTS, "checkpoint-*"))


def keep_plan(plan: Plan, path: Path) -> None:
    """Write down what is compared, for `plot`; seeds, rates and methods may be added, but none may change."""
    new = {**asdict(plan), "budgets": list(plan.budgets)}
    if path.is_file() and _has_runs(path.parent):
        old = yaml.safe_load(path.read_text())
        changed = [key for key in ("script", "config", "flags", "metric") if old[key] != new[key]]
        changed += [name for name in old["methods"] if old["methods"][name] != new["methods"].get(name)]
        if changed:
            raise UsageError(
                f"{path.parent} holds another comparison ({', '.join(changed)} differ): give --output_dir"
            )
    path.write_text(yaml.safe_dump(new, sort_keys=False, allow_unicode=True))
