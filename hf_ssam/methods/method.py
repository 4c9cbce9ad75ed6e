"""What a method is: a composition of rules, with its defaults, its cost and its citation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, cast

import torch

from ..rules.adapters import AdapterRule
from ..rules.budget import RHO_UNITS, predicted_rise
from ..rules.context import ALWAYS, Rule, SecondPass, chain
from ..rules.descent import renormalize
from ..rules.selection import Selection
from ..rules.space import ParameterSpace
from .options import Option, Value, read_options

Check = Callable[[ParameterSpace, tuple[str, ...]], None]


@dataclass(frozen=True)
class Paper:
    """A citation.

    Attributes:
        title: as printed.
        authors: `Last, First and Last, First`, as BibTeX wants them.
        venue: where it appeared, in words; BibTeX's `journal` or `booktitle`.
        year: of that appearance.
        arxiv: arXiv identifier, empty where there is none.
        key: BibTeX key.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    key: str

    @property
    def url(self) -> str:
        """The paper's arXiv page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def short(self) -> str:
        """First author and year, such as `Foret et al. 2021`."""
        names = [name.split(",")[0] for name in self.authors.split(" and ")]
        return f"{names[0]} et al. {self.year}" if len(names) > 2 else f"{' and '.join(names)} {self.year}"

    @property
    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {
            "title": self.title,
            "author": self.authors,
            "journal": self.venue,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@article{{{self.key},\n{body}\n}}"


@dataclass(frozen=True)
class Rules:
    """What the engine runs.

    Attributes:
        ascent: `g -> u`, so that the second pass is taken at `w + ρ u`.
        descent: `ĝ -> d`.
        keeps_gradient: whether `descent` reads `context.g`; otherwise `g` is freed before the second pass.
        second_pass: at which steps it is taken: `ALWAYS`, `NEVER` or `every(k)`.
        reuse: `g -> d` at the other steps.
        first_offset: `{} -> u`, from state alone, so that the first pass is taken at `w + ρ u`; None: at `w`.
        selection: which samples the passes run on; None: all.
        per_example: whether a rule asks for the gradient of single samples.
        checks: `(space, perturbed names)`, raising where the model does not fit the method.
        keeps_logit_gradient: whether the second pass back-propagates the first one's gradient at the logits.
        adapter: makes the rule on LoRA layers that a run is trained with; None: there is none.
        needs_loss: whether a rule reads `context.loss`.
        stateful: whether a rule keeps something of the gradients, which must then be the same on every rank.
    """

    ascent: Rule = chain()
    descent: Rule = chain()
    keeps_gradient: bool = False
    second_pass: SecondPass = ALWAYS
    reuse: Rule = chain()
    first_offset: Rule | None = None
    selection: Selection | None = None
    per_example: bool = False
    checks: tuple[Check, ...] = ()
    keeps_logit_gradient: bool = False
    adapter: Callable[[], AdapterRule] | None = None
    needs_loss: bool = False
    stateful: bool = False

    @property
    def takes_indices(self) -> bool:
        """Whether passes are run on some of a batch's samples."""
        return self.per_example or self.selection is not None

    @property
    def needs_ids(self) -> bool:
        """Whether the method must know which sample of the data set is which."""
        return self.selection is not None and self.selection.learn is not None


RENORMALIZE = {
    "renormalize": Option(False, "hand on γ·d with γ = ‖g‖/‖d‖, SSAM's descent rule, after the method's own"),
    "max_scale": Option(
        math.inf,
        "largest γ; 1 is the truncated form of the official SSAM code",
        0.0,
        above=True,
        only_if=("renormalize", (True,)),
    ),
}
"""Options that every method has whose `d` can be renormalised."""


RHO_MAX = 0.3
"""The longest perturbation where ρ is a rise of the loss: LE-SAM's ρ_max (official code, arXiv 2605.10183)."""

RISES = {"loss": 0.35, "relative_loss": 0.05}
"""The default ρ in units of the loss: LE-SAM's σ (the same code), and a twentieth of the loss (our choice)."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what `--optim` takes.
        summary: one sentence, with the formula.
        rules: options -> rules, a pure function.
        rho: default radius ρ, in the units of the method's ascent.
        paper: where it comes from.
        options: what `optim_args` takes; `renormalize` and `max_scale` are added to it.
        when: one sentence on when to choose it.
        passes: cost of one perturbed step, in forward-backward passes over the batch, as text.
        optimizer: the base optimizer that belongs to the method; None: whichever the user chooses.
        renormalizes: whether SSAM's descent rule may follow the method's own.
        experimental: why the method may not be what its paper has; empty where its equations were read there.
        values: the options' values that were chosen; the defaults where none was.
        rho_unit: what ρ is measured in, one of `rules.budget.RHO_UNITS`.
        rho_max: the longest perturbation where that is not `weight`.
    """

    name: str
    summary: str
    rules: Callable[..., Rules]
    rho: float
    paper: Paper
    options: Mapping[str, Option] = field(default_factory=dict)
    when: str = ""
    passes: str = "2"
    optimizer: type[torch.optim.Optimizer] | None = None
    renormalizes: bool = True
    experimental: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)
    rho_unit: str = "weight"
    rho_max: float = RHO_MAX

    def __post_init__(self) -> None:
        shared = {n: o for n, o in RENORMALIZE.items() if self.renormalizes and n not in self.options}
        object.__setattr__(self, "options", {**self.options, **shared})

    @property
    def own_options(self) -> dict[str, Option]:
        """Its options without the ones that every method has as they are."""
        return {n: o for n, o in self.options.items() if o is not RENORMALIZE.get(n)}

    def with_options(self, **options: Any) -> Method:
        """This method with options chosen, as values or as the strings of a command line.

        Raises:
            ValueError: if an option does not exist, or a value is out of range.
        """
        values = read_options(self.name, self.options, options)
        rho = next((o.rho for n, o in self.options.items() if o.rho is not None and values[n]), self.rho)
        chosen = replace(self, values=values, rho=rho)
        chosen.build()
        return chosen

    def measured_in(self, rho_unit: str, rho_max: float = RHO_MAX) -> Method:
        """This method with ρ as a length (`weight`), a rise of the loss (`loss`) or a share of it (`relative_loss`).

        Raises:
            ValueError: if there is no such unit, the method has no ascent that it could bound, or `rho_max` is not a
                positive number.
        """
        if rho_unit not in RHO_UNITS:
            raise ValueError(f"rho_unit: `{rho_unit}` does not exist; choose one of {', '.join(RHO_UNITS)}.")
        if rho_unit == "weight":
            return self
        if self.build().second_pass.interval is None:
            raise ValueError(
                f"rho_unit: `{rho_unit}` bounds an ascent along the gradient, which method `{self.name}` does not "
                "take; leave it at weight, or choose a method that ascends, such as ssam."
            )
        if isinstance(rho_max, bool) or not isinstance(rho_max, Real) or not 0 < rho_max < math.inf:
            raise ValueError(f"rho_max: {rho_max} is not allowed; choose a number above 0, such as {RHO_MAX:g}.")
        return replace(self, rho_unit=rho_unit, rho_max=float(rho_max), rho=RISES[rho_unit])

    def build(self) -> Rules:
        """The composition: the method's rules, the unit of ρ, and SSAM's descent rule where `renormalize` is set."""
        rules = self._rules()
        if self.rho_unit == "weight":
            return rules
        relative = self.rho_unit == "relative_loss"
        return replace(rules, ascent=chain(rules.ascent, predicted_rise(relative, self.rho_max)), needs_loss=relative)

    def _rules(self) -> Rules:
        values = {n: o.default for n, o in self.options.items()} | dict(self.values)
        shared = {n: values.pop(n) for n in RENORMALIZE if n in values}
        rules = self.rules(**values)
        if not shared.get("renormalize"):
            return rules
        last = renormalize(cast(float, shared["max_scale"]))
        return replace(rules, descent=chain(rules.descent, last), reuse=chain(rules.reuse, last))


def checked_rho(rho: float | None, method: Method) -> float:
    """`rho`, or the method's default where it is None.

    Raises:
        ValueError: if it is negative, or more than float32 holds.
    """
    if rho is None:
        return method.rho
    if isinstance(rho, bool) or not isinstance(rho, Real) or not 0 <= rho <= torch.finfo(torch.float32).max:
        raise ValueError(f"rho: {rho} is not allowed; choose a finite number from 0, such as {method.rho:g}.")
    return float(rho)
