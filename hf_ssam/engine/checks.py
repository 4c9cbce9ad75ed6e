"""What a method needs of the engine's other arguments, said in one sentence before the first pass (law 9)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..methods.method import Method, Rules
from ..rules.space import ParameterSpace, local
from .parameters import stable_name
from .ranks import Ranks
from .window import RunPass


def check_engine(rules: Rules, method: str, ranks: Ranks, replay_rng: bool, dataset_size: int | None) -> None:
    """Refuse what does not go together with method `method`.

    Raises:
        ValueError: for state that ranks would keep apart, a vector handed on from step to step under a scope that has
            none, losses compared under different dropout, scores of samples whose number is not known, or what
            DeepSpeed does not hand out.
    """
    scope = ranks.scope
    if ranks.in_deepspeed and (rules.per_example or rules.adapter is not None):
        raise ValueError(
            f"deepspeed: method `{method}` needs the gradients of single samples or the weights of LoRA layers, which "
            "DeepSpeed's engine does not hand out; train with DDP, or choose a method such as ssam."
        )
    if rules.stateful and scope != "global" and ranks.world_size > 1:
        raise ValueError(
            f"ascent_scope: under `{scope}` every rank would keep its own state of method `{method}`, and they would "
            "drift apart; choose ascent_scope=global, or a method without state such as ssam."
        )
    if rules.second_pass.varies and scope == "micro_batch":
        raise ValueError(
            f"ascent_scope: method `{method}` hands on one vector from step to step, which is not a micro-batch's "
            "own; choose ascent_scope=global, or a method that takes both passes at each step."
        )
    if rules.selection is not None and not replay_rng:
        raise ValueError(
            f"replay_rng: method `{method}` compares losses of two passes, which mean nothing under different "
            "dropout masks; leave replay_rng on."
        )
    if rules.needs_ids and dataset_size is None:
        raise ValueError(
            f"dataset_size: method `{method}` keeps a score of each sample and needs their number; pass "
            "dataset_size=len(dataset)."
        )


def check_sizes(**sizes: int | None) -> None:
    """Refuse a number that cannot be one of samples or steps; None: not known.

    Raises:
        ValueError: if one is not an integer from 1.
    """
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{name}: {size} is not allowed; choose an integer from 1, or leave it out.")


class StepChecks:
    """What must still hold when a step begins, since the engine was built.

    Args:
        model: the model as it is called.
        space: its trainable parameters.
    """

    LOOKS = 2
    """How often gradients that are there on entry are looked at: a loop that leaves them does so at every step."""

    def __init__(self, model: nn.Module, space: ParameterSpace):
        self._model, self._space = model, space
        self._sharded = any(isinstance(m, FSDPModule) for m in model.modules())
        self._known = self._trainable()
        self._looks = self.LOOKS
        self._displaced = False

    def before_step(self) -> None:
        """Refuse parameters that are not the engine's, and gradients that the step would add to.

        Raises:
            ValueError: naming them.
        """
        self._check_parameters()
        self._check_gradients()
        self._displaced = False
        for other in _BEGUN:
            if other is not self and other._shares_parameters(self._space):
                other._displaced = True
        _BEGUN.add(self)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A part of a step, before and in which no other engine has begun one on the same weights.

        Raises:
            RuntimeError: if one has. An engine that nobody goes on with is in no one's way.
        """
        self._check_undisturbed()
        yield
        self._check_undisturbed()

    def _check_undisturbed(self) -> None:
        if self._displaced:
            raise RuntimeError(
                "model: another TwoPass began a step on these parameters before this step was finished, and both "
                "would leave their gradient in the same `.grad`; finish one engine's step before the other's begins."
            )

    def _shares_parameters(self, space: ParameterSpace) -> bool:
        theirs = {id(p) for p in space.params.values()}
        return any(id(p) in theirs for p in self._space.params.values())

    def _check_gradients(self) -> None:
        left = [local(p.grad) for p in self._space.params.values() if p.grad is not None]
        if left and self._looks:
            self._looks -= 1
            if any(bool(t.count_nonzero()) for t in left):
                raise ValueError(
                    "run_pass: a gradient is left from before, and the step would add to it; call "
                    "`optimizer.zero_grad()` after each `optimizer.step()`, and give the micro-batches of one step as "
                    "a list (`two_pass.step([run, run])`), not one by one under `accelerator.accumulate`."
                )

    def _trainable(self) -> dict[str, nn.Parameter | None]:
        """Each parameter with `requires_grad`, tied ones under every name; FSDP2 swaps the objects that it shards."""
        named = self._model.named_parameters(remove_duplicate=False)
        return {name: None if self._sharded else p for name, p in named if p.requires_grad}

    def _check_parameters(self) -> None:
        now = self._trainable()
        for name in sorted(now.keys() - self._known.keys()):
            raise ValueError(
                f"model: `{stable_name(name)}` requires a gradient and did not when the engine was built; build a new "
                "TwoPass after unfreezing (a Trainer does whenever training starts)."
            )
        for name, p in now.items():
            if p is not self._known[name]:
                raise ValueError(
                    f"model: `{stable_name(name)}` is another parameter than when the engine was built; build a new "
                    "TwoPass after a layer is replaced, embeddings are resized or weights are assigned."
                )


_BEGUN: WeakSet[StepChecks] = WeakSet()
"""Of every engine that has begun a step."""


def check_takes_indices(run: RunPass, method: str) -> None:
    """Refuse a pass that cannot run on some of its samples, where the method asks for that.

    Raises:
        ValueError: if `run` takes no argument.
    """
    try:
        inspect.signature(run).bind(None)
    except TypeError:
        raise ValueError(
            f"run_pass: method `{method}` runs a batch on some of its samples; let run_pass take their indices, such "
            "as `def run_pass(indices=slice(None))`."
        ) from None


def matched(
    run_pass: RunPass | Sequence[RunPass],
    samples: Tensor | Sequence[Tensor] | None,
    method: str,
    takes_indices: bool,
) -> tuple[list[RunPass], list[Tensor | None]]:
    """The passes of a step, and the dataset indices of each one's samples.

    Raises:
        ValueError: if there is none, they do not match, or a pass cannot run on some of its samples.
    """
    runs = [run_pass] if callable(run_pass) else list(run_pass)
    if not runs:
        raise ValueError("run_pass: got an empty list; pass a callable, or one callable for each micro-batch.")
    if takes_indices:
        for run in runs:
            check_takes_indices(run, method)
    given = [samples] if isinstance(samples, Tensor) else samples
    ids: list[Tensor | None] = [None] * len(runs) if given is None else list(given)
    if len(ids) != len(runs):
        raise ValueError(f"samples: got {len(ids)} tensors of indices for {len(runs)} passes; give one for each.")
    return runs, ids


def check_options_free(method: str | Method, options: Mapping[str, Any]) -> None:
    """Refuse options beside a `Method`, which has them.

    Raises:
        ValueError: naming one.
    """
    if isinstance(method, Method) and options:
        raise ValueError(
            f"{next(iter(options))}: a Method has its options chosen; pass them to get_method, or pass its name."
        )


def check_state(state: Mapping[str, Any], method: str) -> None:
    """Refuse a state of another method.

    Raises:
        ValueError: naming it.
    """
    if state["method"] != method:
        raise ValueError(
            f"state: it is of method `{state['method']}` and this engine runs `{method}`; build the engine with that "
            "method, or start afresh."
        )
