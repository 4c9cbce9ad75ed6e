"""The engine: pass, perturb, pass, restore, combine.

    g = ∇L(w)            first pass, over every micro-batch of the step
    u = ascent(g)        w ← w + ρ u
    ĝ = ∇L(w + ρ u)      second pass, over the same micro-batches, the same random numbers, the same buffers
                         w ← as it was before, bit for bit, in `finally`
    d = descent(ĝ)       left in `.grad`; the optimizer does the rest and never knows

It knows torch and nothing of the Trainer. `TwoPass.step` is the whole of it for a loop that holds all micro-batches at
once; a host that hands them over one at a time calls the phases `begin`, `first_pass` (each) and `finish`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..methods.method import Method, checked_rho
from ..methods.table import get_method
from ..rules.context import Clock
from ..rules.state import MethodState
from ..rules.tensors import Workspace
from . import checks
from .adapters import adapters_of
from .forward_recorder import PerSampleLoss
from .gradients import Gradients
from .parameters import perturbed_names, trainable, unwrapped
from .passes import Displacement, Passes
from .ranks import Ranks
from .replay import Replay
from .report import StepReport, merged
from .sample_selection import observers_of
from .window import AccumulationWindow, MicroBatchRecord, RunPass
from .zero import space_of


class TwoPass:
    """Computes a sharpness-aware gradient in any torch loop.

    Example:
        >>> two_pass = TwoPass(model, method="ssam", rho=0.05)
        >>> report = two_pass.step(forward_backward)  # () -> loss
        >>> optimizer.step(); optimizer.zero_grad()

    Args:
        model: as it is called: plain, compiled, in DistributedDataParallel, sharded by FSDP2, or DeepSpeed's engine.
        method: a name in `METHODS`, or a `Method` from `get_method`.
        rho: radius ρ ≥ 0, in the units of the method's ascent (`METHODS[name].rho` where None); 0 is one plain pass.
            May be set between steps.
        scope: whose gradient the ascent follows (`hf_ssam.engine.ranks`): `global`, `rank` or `micro_batch`.
        perturb: which parameters: `all`, `norm`, or a regular expression on their names.
        parameters: what trains, by name, where that is more than the model's own parameters (a loss with weights).
        replay_rng: whether the second pass draws the same random numbers as the first.
        offload_snapshot: keep the copy of the weights in host memory.
        free_snapshot: give the memory of that copy, or of `w + ρ u`, and of a method's copies back after each step. On
            the CPU it is kept otherwise: fresh memory costs more than ten copies. A GPU's allocator keeps it anyway.
        per_sample_loss: `(the model's inputs by name, its outputs) -> losses`, shape (B,), for methods that select
            samples; None: worked out from logits and labels (`hf_ssam.engine.per_sample`).
        dataset_size: number of samples in the data set, for methods that keep a score of each.
        total_steps: length of the run, for methods that change over it.
        **options: the method's own options.

    Attributes:
        clock: where the run is; a host may set `elapsed` and `lr` before a step.

    Raises:
        ValueError: for an argument that cannot work, or a model without trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method = "ssam",
        rho: float | None = None,
        *,
        scope: str = "global",
        perturb: str = "all",
        parameters: Mapping[str, nn.Parameter] | None = None,
        replay_rng: bool = True,
        offload_snapshot: bool = False,
        free_snapshot: bool = False,
        per_sample_loss: PerSampleLoss | None = None,
        dataset_size: int | None = None,
        total_steps: int | None = None,
        **options: Any,
    ):
        checks.check_options_free(method, options)
        checks.check_sizes(dataset_size=dataset_size, total_steps=total_steps)
        self.method = method if isinstance(method, Method) else get_method(method, **options)
        self.rho = rho
        self.space = space_of(model, trainable(model) if parameters is None else parameters)
        self.perturbed = perturbed_names(model, perturb, self.space.params)
        self.clock = Clock(total=total_steps)
        self._checks = checks.StepChecks(model, self.space)
        self._workspace = Workspace(keeps=not free_snapshot)
        self._state = MethodState()
        self._window: AccumulationWindow | None = None
        self._reports: list[StepReport] = []
        self._built_with = (model, scope, replay_rng, offload_snapshot, per_sample_loss, dataset_size)
        self._build(*self._built_with)

    def _build(
        self,
        model: nn.Module,
        scope: str,
        replay_rng: bool,
        offload_snapshot: bool,
        per_sample_loss: PerSampleLoss | None,
        dataset_size: int | None,
    ) -> None:
        """What runs the method's rules."""
        rules, plain = self.method.build(), unwrapped(model)
        # a method without a second pass ascends along no gradient, so all scopes are one
        self.ranks = Ranks(model, scope if rules.second_pass.interval else "global", self.space)
        checks.check_engine(rules, self.method.name, self.ranks, replay_rng, dataset_size)
        for check in rules.checks:
            check(self.space, self.perturbed)
        replay = Replay(plain, replay_rng)
        observers = observers_of(rules, self.method.name, plain, replay, per_sample_loss, dataset_size)
        self._displacement = Displacement(self.space, offload_snapshot)
        adapters = adapters_of(rules, plain, self.ranks, self.perturbed, self.method.name, self.clock.total)
        self._passes = Passes(self.ranks, replay, self._displacement, *observers, adapters)
        self._gradients = Gradients(rules, self.space, self.perturbed, self._passes)

    @property
    def rho(self) -> float:
        """Radius ρ of the next step."""
        return self._rho

    @rho.setter
    def rho(self, value: float | None) -> None:
        self._rho = checked_rho(value, self.method)

    def step(
        self,
        run_pass: RunPass | Sequence[RunPass],
        loss_scale: float | Tensor | None = None,
        samples: Tensor | Sequence[Tensor] | None = None,
    ) -> StepReport:
        """Leave the descent gradient in `.grad`, and the weights as they were.

        Args:
            run_pass: `() -> loss`, running forward and backward once; or one such callable for each micro-batch, their
                losses already weighted by their share of the batch (`loss / n`). Each is called once a pass.
            loss_scale: what the losses were multiplied by before backward, such as `scaler.get_scale()`; the gradient
                left behind carries it too.
            samples: dataset indices of the batch's samples, shape (B,), or one such tensor for each micro-batch; for
                methods that keep a score of each sample.

        Returns:
            What the step did. Where `skipped` is true the gradient is not finite: a GradScaler skips it by itself,
            a loop without one must set the gradients to None.

        Raises:
            ValueError: for gradients left from before, passes without a backward, or samples that do not match.
            TypeError: for a pass that does not return its loss.
        """
        runs, ids = checks.matched(run_pass, samples, self.method.name, self._passes.take_indices)
        self.begin(loss_scale)
        for run, these in zip(runs[:-1], ids[:-1], strict=True):
            self.first_pass(self.ranks.unsynchronized(run), 1 / len(runs), these)
        self.first_pass(runs[-1], 1 / len(runs), ids[-1])
        return self.finish()

    @property
    def is_open(self) -> bool:
        """Whether a step has begun and not finished."""
        return self._window is not None

    def begin(self, loss_scale: float | Tensor | None = None) -> None:
        """Open a step. `.grad` is None, or zero, on entry.

        A step that was begun before and never finished is forgotten.

        Raises:
            ValueError: if a gradient is left from before, or the parameters are not those that the engine knows.
        """
        if self.is_open:
            self._abandon()
        self._checks.before_step()
        self._reports, self._at_work = [], False
        self._state.begin()
        self.ranks.begin()
        self._window = self._new_window(loss_scale)

    def first_pass(
        self, run: RunPass, share: float | Tensor = 1.0, samples: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        """Run one micro-batch at `w`, and under `micro_batch` its second pass as well; returns its loss, detached.

        Args:
            run: `() -> loss`.
            share: the weight its mean loss has in the batch loss; under `rank` and `micro_batch` it is undone before
                the ascent, so that `e = ρ g` has the length it would have alone.
            samples: dataset indices of its samples, shape (B,), for methods that keep a score of each.
            labels: its labels, where the host takes them out before the model sees them.
        """
        if (window := self._window) is None:
            raise RuntimeError("first_pass: no step has begun; call begin first, or step, which does it all.")
        record = MicroBatchRecord(run, share, samples, labels)
        with self._abandoned_on_error():
            if self.ranks.scope != "micro_batch":
                return self._passes.first(window, record, self._state, self.clock.steps)
            earlier = self.space.take_grads()
            window = self._new_window(window.loss_scale)
            loss = self._passes.first(window, record, self._state, self.clock.steps)
            self._reports.append(self._close(window))
            self.space.add_grads_to(earlier)
            return loss

    def finish(self) -> StepReport:
        """Run what is left of the step and leave `d` in `.grad`, the same on every rank.

        Raises:
            RuntimeError: if no step has begun, or none of its first passes has run.
        """
        if (window := self._window) is None or not (self._reports or window.records):
            raise RuntimeError("finish: no step has begun; call begin first, then first_pass for each micro-batch.")
        with self._abandoned_on_error():
            reports = self._reports or [self._close(window)]
            self.ranks.average()
            report = self._gradients.settled(reports[0] if len(reports) == 1 else merged(reports))
        self._window = None
        self.clock.tick(self._at_work)
        self._state.end(~report.skipped, len(reports))
        self._workspace.reclaim(but=self._state.tensors())
        return report

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: counters, and tensors by slot and parameter name, sharded as parameters are."""
        return {
            "method": self.method.name,
            "steps": self.clock.steps,
            "elapsed": self.clock.elapsed,
            "memory": self._state.to_state(self.space),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave.

        Raises:
            ValueError: if it is another method's, another model's, or scores the samples of another data set.
        """
        checks.check_state(state, self.method.name)
        taken_up = MethodState()
        taken_up.take_up(state["memory"], self.space)
        self._passes.check_scores(taken_up)
        self._state = taken_up
        self.clock.steps, self.clock.elapsed = state["steps"], state["elapsed"]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is built from the method's rules, which are functions made from its options."""
        built = {"ranks", "_displacement", "_passes", "_gradients"}
        return {n: v for n, v in self.__dict__.items() if n not in built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build(*self._built_with)

    def _new_window(self, loss_scale: float | Tensor | None) -> AccumulationWindow:
        with self._workspace.in_use():
            offset = self._gradients.begin(self.rho, self.clock, self._state)
        return self._passes.window(self.rho, loss_scale, offset, len(self._reports))

    def _close(self, window: AccumulationWindow) -> StepReport:
        report = self._gradients.close(window, self.clock, self._state)
        self._at_work |= window.at_work
        return report

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """A step that dies leaves no half-made gradient and no half-made state: the next one starts afresh."""
        try:
            with self._workspace.in_use(), self._checks.undisturbed():
                yield
        except BaseException:
            self._abandon()
            self.ranks.abandon()
            self.space.clear_grads()
            raise

    def _abandon(self) -> None:
        self._displacement.restore()
        self._window, self._reports = None, []
        self._state.drop()
        self._workspace.reclaim(but=self._state.tensors())
