"""The arguments: `TrainingArguments`, or any other arguments class, plus what sharpness-aware training needs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..engine.ranks import SCOPES
from ..hub.redaction import masked
from ..methods import METHODS, Method, get_method
from ..methods.method import RHO_MAX, checked_rho
from ..methods.options import parse_optim_args
from ..rules.budget import RHO_UNITS
from .console import SHOWN
from .host import ParentArguments
from .optimizer_names import OPTIONS_HELP, checked_base, checked_optim, optim_help, plain
from .schedules import RHO_SCHEDULES, check_schedule

_STEPS_IN_BACKWARD = ("lomo", "adalomo")
_OF_EVERY_RUN = ("optim", "optim_args", "mend_loss_count", "sharpness_steps", "log_ssam")


@dataclass(repr=False)
class SSAMArgumentsMixin(ParentArguments):
    """
    Adds sharpness-aware training to an arguments class: `class MyConfig(SSAMArgumentsMixin, SFTConfig): ...`.

    > Parameters that control the method

    Args:
        optim (`str`, defaults to `"ssam"`): a name in `hf_ssam.METHODS`, or any stock optimizer name, which trains as
            the parent would.
        optim_args (`str`, *optional*): the method's own options (`"k=5,alpha=0.1"`); with a stock name, the stock
            field.
        base_optim (`str`): the stock optimizer that uses the gradient; the parent's default `optim`.
        base_optim_args (`str`, *optional*): what the stock `optim_args` is to the base optimizer.
        rho (`float`, *optional*): radius ρ ≥ 0 of the perturbation, in the units of the method's ascent; `None` is the
            method's default. The defaults are the papers', most of them of networks trained from scratch; encoders of
            BERT's size that are fine-tuned took 1e-4 to 1e-2.
        rho_unit (`str`, defaults to `"weight"`): what ρ is: the length of the perturbation (`weight`), the rise of the
            loss that it is predicted to cause (`loss`), or that rise as a share of the loss (`relative_loss`).
        rho_max (`float`, defaults to 0.3): the longest perturbation where `rho_unit` is not `weight`.
        suggest_rho (`bool`, defaults to `False`): before the first step, measure on the batches of four steps the ρ at
            which the ascent raises the loss by a tenth, once the base optimizer has trained on them for at most 48
            steps (which are undone), and train with it; `rho` is where the search begins. A resumed run keeps the ρ
            that its checkpoint has.
        perturb (`str`, defaults to `"all"`): which parameters: `all`, `norm`, or a regular expression on their names.

    > Parameters that control when and over what

    Args:
        rho_scheduler_type (`str`, defaults to `"constant"`): how ρ changes over the run: `constant`, `linear`,
            `cosine`, `polynomial`; `lr` (in step with the learning rate); `warmup` (grows over `warmup_steps`) or
            `cosine_up` (grows over the run); in Python also a function `(step, steps of the run) -> factor`.
        ascent_scope (`str`, defaults to `"global"`): whose gradient the perturbation follows: that of the whole batch,
            of the `rank`, or of the `micro_batch` (mSAM).
        num_micro_batches (`int`, defaults to 1): split each batch into that many parts which ascend by themselves;
            with `ascent_scope="micro_batch"`, where there is no accumulation (mSAM's m).
        ascent_start (`float`, defaults to 0): first perturbed step; below 1 a ratio of the run.
        ascent_interval (`int`, defaults to 1): perturb every n-th step.

    > Parameters that control the second pass

    Args:
        replay_rng (`bool`, defaults to `True`): give the second pass the random numbers of the first. Without it the
            two losses differ by their dropout masks as well as by the perturbation.
        mend_loss_count (`bool`, defaults to `True`): divide a model's loss by the number of micro-batches where the
            model takes `num_items_in_batch` and ignores it, with a stock `optim` too; a stock Trainer takes such a
            loss for a share of the batch, and its gradient is `accumulation × processes` times too large.
        offload_snapshot (`bool`, defaults to `False`): keep the copy of the weights in host memory.
        free_snapshot (`bool`, defaults to `False`): give the memory of that copy back after each step. On the CPU it
            is kept otherwise, since fresh memory costs more than ten copies.
        sharpness_steps (`int`, *optional*): measure the curvature every n steps.
        log_ssam (`str`, defaults to `"main"`): which `ssam/…` values of a log entry the console shows: `all`, the
            `main` ones, or `none`, which silences the line before training too. The state and every `report_to` have
            all of them.
    """

    # `OptimizerNames | str` would be narrowed to the enum by HfArgumentParser, and `ssam` refused.
    optim: str = field(default="ssam", metadata={"help": optim_help(METHODS)})
    optim_args: str | None = field(default=None, metadata={"help": OPTIONS_HELP})
    base_optim: str = field(
        default=TrainingArguments.default_optim, metadata={"help": "The stock optimizer that uses the gradient."}
    )
    base_optim_args: str | None = field(default=None, metadata={"help": "`optim_args` of the base optimizer."})
    rho: float | None = field(
        default=None,
        metadata={
            "help": "Radius of the perturbation; None: the method's. Fine-tuned encoders of BERT's size took 1e-4 to "
            "1e-2, networks trained from scratch 0.05 to 0.5."
        },
    )
    rho_unit: Literal[RHO_UNITS] = field(  # type: ignore[valid-type]
        default="weight", metadata={"help": "What rho is: a length, a rise of the loss, or that as a share of it."}
    )
    rho_max: float = field(
        default=RHO_MAX, metadata={"help": "The longest perturbation where rho_unit is not `weight`."}
    )
    suggest_rho: bool = field(
        default=False,
        metadata={"help": "Experimental: measure the rho that raises the loss by a tenth; too large on a new head."},
    )
    rho_scheduler_type: Literal[RHO_SCHEDULES] = field(  # type: ignore[valid-type]
        default="constant", metadata={"help": "How rho changes over the run; `lr` follows the learning rate."}
    )
    ascent_scope: Literal[SCOPES] = field(  # type: ignore[valid-type]
        default="global", metadata={"help": "Whose gradient the perturbation follows; `micro_batch` is mSAM."}
    )
    num_micro_batches: int = field(
        default=1, metadata={"help": "Split each batch into that many parts; with ascent_scope=micro_batch (mSAM)."}
    )
    ascent_start: float = field(
        default=0.0, metadata={"help": "First perturbed step; below 1 a ratio of the run, otherwise a step."}
    )
    ascent_interval: int = field(default=1, metadata={"help": "Perturb every n-th step."})
    perturb: str = field(
        default="all", metadata={"help": "Which parameters: `all`, `norm`, or a regular expression on their names."}
    )
    replay_rng: bool = field(
        default=True, metadata={"help": "Give the second pass the random numbers of the first (same dropout)."}
    )
    mend_loss_count: bool = field(
        default=True,
        metadata={
            "help": "Divide a mean loss that ignores num_items_in_batch by the number of micro-batches, with a stock "
            "optim too; a stock Trainer takes it for a share of the batch: accumulation × processes times too large."
        },
    )
    offload_snapshot: bool = field(default=False, metadata={"help": "Keep the copy of the weights in host memory."})
    free_snapshot: bool = field(
        default=False, metadata={"help": "Give the memory of that copy back after each step (CPU)."}
    )
    sharpness_steps: int | None = field(
        default=None, metadata={"help": "Measure and log the curvature every n steps; None: never."}
    )
    log_ssam: Literal[SHOWN] = field(  # type: ignore[valid-type]
        default="main",
        metadata={"help": "Which ssam/… values the console shows; trainer_state.json and report_to have all of them."},
    )

    def __init_subclass__(cls, **kwargs: Any):
        """Make a subclass a dataclass: `class MyConfig(SSAMArgumentsMixin, SFTConfig): ...` is then enough."""
        super().__init_subclass__(**kwargs)
        dataclass(repr=False)(cls)

    def __post_init__(self) -> None:
        self.optim, self.base_optim = checked_optim(self.optim), checked_base(self.base_optim)
        with self.base_optimizer_named():
            super().__post_init__()
        self.check_ssam()

    def set_optimizer(self, name: str = "ssam", *args: Any, **kwargs: Any) -> SSAMArgumentsMixin:
        """As the parent's; a method's name is taken too, the other arguments then describe its base optimizer."""
        asked = checked_optim(name)
        super().set_optimizer(self.base_optim if asked in METHODS else asked, *args, **kwargs)
        if asked in METHODS:
            self.base_optim_args, self.optim_args, self.optim = self.optim_args, None, asked
        return self

    @property
    def is_sharpness_aware(self) -> bool:
        """Whether `optim` names a method of ours."""
        return self.optim in METHODS

    def method(self) -> Method:
        """The method with its options.

        Raises:
            ValueError: if `optim` is a stock name, or an option does not exist or is out of range.
        """
        options = parse_optim_args(self.optim_args)
        known = METHODS[self.optim].options if self.is_sharpness_aware else options
        for name in options:
            if name not in known:
                home = _home_of(self, name, options[name])
                raise ValueError(
                    f"optim_args: method `{self.optim}` has no option `{name}`; {home}its options are "
                    f"{', '.join(sorted(known))}, and those of the base optimizer go into base_optim_args."
                )
        return get_method(self.optim, self.rho_unit, self.rho_max, **options)

    def base_arguments(self) -> SSAMArgumentsMixin:
        """These arguments as a stock Trainer would be given them: `optim` is the base optimizer."""
        if not self.is_sharpness_aware:
            return self
        stock = copy.copy(self)
        stock.optim, stock.optim_args = self.base_optim, self.base_optim_args
        return stock

    @contextlib.contextmanager
    def base_optimizer_named(self) -> Iterator[None]:
        """`optim` and `optim_args` are those of the base optimizer inside, for code that knows stock names only.

        In place, since such code may hold these arguments by another name than the Trainer's.
        """
        if not self.is_sharpness_aware:
            yield
            return
        asked = self.optim, self.optim_args
        self.optim, self.optim_args = self.base_optim, self.base_optim_args
        try:
            yield
        finally:
            self.optim, self.optim_args = asked

    def _warn_of_idle_fields(self) -> None:
        """Say which of our fields were given beside a stock optimizer, where they do nothing."""
        ours = {f.name for f in fields(SSAMArgumentsMixin)} - {*_OF_EVERY_RUN}
        idle = [f.name for f in fields(self) if f.name in ours and getattr(self, f.name) != f.default]
        if idle:
            given = ", ".join(f"{name}={plain(getattr(self, name))}" for name in idle)
            warnings.warn(
                f"{given}: no effect with the stock optimizer optim={plain(self.optim)}; choose a method such as "
                "optim=ssam, or leave them out.",
                UserWarning,
                stacklevel=5,
            )

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, which trackers log and callbacks write; it hides tokens, this hides every secret field."""
        values = masked(super().to_dict(), lambda name: f"<{name.upper()}>")
        if callable(schedule := self.rho_scheduler_type):
            values["rho_scheduler_type"] = f"{schedule.__module__}.{schedule.__qualname__}"
        return values

    def check_ssam(self) -> None:
        """Refuse what cannot work, naming the argument and the way out.

        Called at construction and again when training starts: a hyper-parameter search sets fields in between.

        Raises:
            ValueError: for a value out of range, an unknown option, or a base optimizer that steps inside backward.
        """
        if self.sharpness_steps is not None and self.sharpness_steps < 1:
            raise ValueError(f"sharpness_steps: {self.sharpness_steps} is not allowed; choose an integer from 1.")
        if not self.is_sharpness_aware:
            self._warn_of_idle_fields()
            return
        checked_rho(self.rho, self.method())
        base = plain(self.base_optim)
        if base in _STEPS_IN_BACKWARD or base.endswith("_layerwise"):
            raise ValueError(
                f"base_optim: `{base}` steps inside backward, before the second pass exists; choose another, such as "
                "adamw_torch or sgd."
            )
        if self.method().optimizer and (self.base_optim != type(self).base_optim or self.base_optim_args):
            raise ValueError(
                f"base_optim: `{base}` cannot be chosen, since {self.optim} brings an optimizer of its own, with "
                "adam_beta1, adam_beta2 and adam_epsilon; drop base_optim and its args, or use optim=sam with them."
            )
        check_schedule(self.rho_scheduler_type)
        for name, choices in (("ascent_scope", SCOPES), ("log_ssam", SHOWN)):
            if getattr(self, name) not in choices:
                listed = ", ".join(choices)
                raise ValueError(f"{name}: `{getattr(self, name)}` does not exist; choose one of {listed}.")
        if self.suggest_rho and self.rho_unit != "weight":
            raise ValueError(
                f"suggest_rho: with rho_unit={self.rho_unit} rho is a rise of the loss already; drop one of the two."
            )
        if not 0 <= self.ascent_start < float("inf"):
            raise ValueError(f"ascent_start: {self.ascent_start} is not allowed; choose a ratio below 1, or a step.")
        if self.num_micro_batches > 1 and self.ascent_scope != "micro_batch":
            raise ValueError(
                f"num_micro_batches: {self.num_micro_batches} has no effect under ascent_scope={self.ascent_scope}; "
                "set ascent_scope=micro_batch, or leave it at 1."
            )
        for name in ("ascent_interval", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; choose an integer from 1.")


def _home_of(args: SSAMArgumentsMixin, option: str, value: Any) -> str:
    """Where an option of the base optimizer belongs, where it has one of that name."""
    from transformers import Trainer  # slow to import, and only needed here

    try:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(args.base_arguments())
    except (ImportError, ValueError):  # its package is missing, or its own options are wrong
        return ""
    found = option in inspect.signature(kind).parameters
    return f"{plain(args.base_optim)} has one: base_optim_args={option}={value}; " if found else ""


@dataclass(repr=False)
class SSAMTrainingArguments(SSAMArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with sharpness-aware training; see `SSAMArgumentsMixin`."""


@dataclass(repr=False)
class SSAMSeq2SeqTrainingArguments(SSAMArgumentsMixin, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with sharpness-aware training; see `SSAMArgumentsMixin`."""
