"""The engine: pass, perturb, pass, restore, combine.

    g = ∇L(w)            first pass, over every micro-batch of the step
    u = ascent(g)        w ← w + ρ u
    ĝ = ∇L(w + ρ u)      second pass, over the same micro-batches, the same random numbers, the same buffers
                         w ← the copy taken before, in `finally`
    d = descent(ĝ)       left in `.grad`; the optimizer does the rest and never knows

It knows torch and nothing of the Trainer. `TwoPass.step` is the whole of it for a loop that holds all micro-batches at
once; a host that hands them over one at a time calls the phases `begin`, `first_pass` (each) and `finish`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.recipes import Rules
from ..methods.table import Method, checked_rho, get_method
from ..rules.context import StepContext
from ..rules.state import MethodState
from ..rules.tensors import ParameterSpace, Snapshot, Vector, move, scaled
from .checks import check_engine, check_sizes, check_takes_indices, check_unfrozen
from .forward_recorder import PerSampleLoss, RecordedForward
from .parameters import names_that_train, perturbed_names, trainable, transposed_names, unwrapped
from .precision import is_low_precision, survival, warn_if_lost
from .ranks import Ranks
from .replay import Replay
from .report import StepReport, all_finite, merged
from .sample_selection import Samples
from .window import AccumulationWindow, MicroBatchRecord, RunPass, squared_gradients


class TwoPass:
    """Computes a sharpness-aware gradient in any torch loop.

    Example:
        two_pass = TwoPass(model, method="ssam", rho=0.05)
        report = two_pass.step(forward_backward)     # () -> loss
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: the model as it is called: plain, compiled, in DistributedDataParallel, or sharded by FSDP2.
        method: a name in `METHODS`, or a `Method` from `get_method`.
        rho: radius ρ ≥ 0, in the units of the method's ascent (`METHODS[name].rho` where None); 0 is one plain pass.
            May be set between steps.
        scope: whose gradient the ascent follows (`hf_ssam.ranks`): `global`, `rank` or `micro_batch`.
        perturb: which parameters: `all`, `norm`, or a regular expression on their names.
        parameters: what trains, by name, where that is more than the model's own parameters (a loss with weights).
        replay_rng: whether the second pass draws the same random numbers as the first.
        offload_snapshot: keep the copy of the weights in host memory.
        per_sample_loss: `(the model's inputs by name, its outputs) -> losses`, shape (B,), for methods that select
            samples; None: worked out from logits and labels (`hf_ssam.per_sample`).
        dataset_size: number of samples in the data set, for methods that keep a score of each.
        total_steps: length of the run, for methods that change over it.
        **options: the method's own options.

    Attributes:
        steps: how many steps the method has been at work in, ρ above 0.
        elapsed: how many steps there have been in all.
        batch: what the pass at hand was given, where a host takes the labels out before the model sees them.

    Raises:
        ValueError: for an unknown method, option, scope or pattern, a value out of range, or a model without trainable
            parameters.
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
        per_sample_loss: PerSampleLoss | None = None,
        dataset_size: int | None = None,
        total_steps: int | None = None,
        **options: Any,
    ):
        if isinstance(method, Method) and options:
            raise ValueError(
                f"{next(iter(options))}: a Method has its options chosen; pass them to get_method, or pass its name."
            )
        self.method = method if isinstance(method, Method) else get_method(method, **options)
        self.rho = rho
        self._model, self._trained = unwrapped(model), names_that_train(model)
        named = trainable(model) if parameters is None else parameters
        self.space = ParameterSpace(named, transposed_names(model))
        self.perturbed = perturbed_names(model, perturb, self.space.params)
        self.ranks = Ranks(model, scope, self.space)
        self._rules: Rules = self.method.rules()
        check_sizes(dataset_size=dataset_size, total_steps=total_steps)
        check_engine(self._rules, self.method.name, scope, self.ranks.world_size, replay_rng, dataset_size)
        for check in self._rules.checks:
            check(self.space, self.perturbed)
        self._replay = Replay(self._model, replay_rng)
        self._samples = Samples(
            self._rules, self.method.name, self._model, per_sample_loss, lambda: self.batch, dataset_size, self._replay
        )
        self.total_steps = total_steps
        self.offload_snapshot = offload_snapshot
        self.steps = self.elapsed = 0
        self.batch: Mapping[str, Any] = {}
        self._memory = MethodState()
        self._window: AccumulationWindow | None = None
        self._reports: list[StepReport] = []
        self._at_work = False
        self._survival_known = not is_low_precision([self.space.params[n] for n in self.perturbed])

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
        """
        runs = [run_pass] if callable(run_pass) else list(run_pass)
        if not runs:
            raise ValueError("run_pass: got an empty list; pass a callable, or one callable for each micro-batch.")
        if self._rules.takes_indices:
            for run in runs:
                check_takes_indices(run, self.method.name)
        ids = [samples] * len(runs) if samples is None else [samples] if isinstance(samples, Tensor) else list(samples)
        if len(ids) != len(runs):
            raise ValueError(f"samples: got {len(ids)} tensors of indices for {len(runs)} passes; give one for each.")
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
            ValueError: if a parameter has been unfrozen since the engine was built.
        """
        check_unfrozen(self._model, self._trained)
        if self.is_open:
            self._abandon()
        self._reports = []
        self._at_work = False
        self._memory.begin()
        self.ranks.begin()
        self._window = self._new_window(loss_scale)

    def first_pass(self, run: RunPass, share: float | Tensor = 1.0, samples: Tensor | None = None) -> Tensor:
        """Run one micro-batch at `w`, and under `micro_batch` its second pass as well.

        Args:
            run: `() -> loss`.
            share: the weight its mean loss has in the batch loss; under `rank` and `micro_batch` it is undone before
                the ascent, so that `e = ρ g` has the length it would have alone.
            samples: dataset indices of its samples, shape (B,), for methods that keep a score of each.

        Returns:
            The loss, detached.

        Raises:
            RuntimeError: if no step has begun.
        """
        self._check_open("first_pass")
        with self._abandoned_on_error():
            if self.ranks.scope != "micro_batch":
                return self._first(self._window, run, share, samples)
            earlier = self.space.take_grads()
            window = self._new_window(self._window.loss_scale)
            loss = self._first(window, run, share, samples)
            self._reports.append(self._close(window))
            self.space.add_grads_to(earlier)
            return loss

    def finish(self) -> StepReport:
        """Run what is left of the step and leave `d` in `.grad`, the same on every rank.

        Raises:
            RuntimeError: if no step has begun, or none of its first passes has run.
        """
        self._check_open("finish")
        if not self._reports and not self._window.passes:
            raise RuntimeError("finish: the step has no first pass yet; call first_pass for each micro-batch before.")
        with self._abandoned_on_error():
            reports = self._reports or [self._close(self._window)]
            self.ranks.average()
            report = self._settled(merged(reports))
        self._window = None
        self.steps += self._at_work
        self.elapsed += 1
        self._memory.end(~report.skipped, len(reports))
        return report

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: counters, and tensors by slot and parameter name, sharded as parameters are."""
        return {
            "method": self.method.name,
            "steps": self.steps,
            "elapsed": self.elapsed,
            "memory": self._memory.to_state(self.space),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave.

        Raises:
            ValueError: if it is another method's, names parameters that this model does not train, or scores the
                samples of another data set.
        """
        if state["method"] != self.method.name:
            raise ValueError(
                f"state: it is of method `{state['method']}` and this engine runs `{self.method.name}`; build the "
                "engine with that method, or start afresh."
            )
        memory = MethodState()
        memory.take_up(state["memory"], self.space)
        self._samples.check(memory)
        self._memory, self.steps, self.elapsed = memory, state["steps"], state.get("elapsed", state["steps"])

    def _new_window(self, loss_scale: float | Tensor | None) -> AccumulationWindow:
        return AccumulationWindow(
            self._replay.snapshot_buffers(), self.ranks.buffers_due, loss_scale, anticipated=self._anticipated()
        )

    def _anticipated(self) -> Vector:
        """Where the first pass is moved to, from memory alone; nothing for most methods."""
        if self._rules.anticipate is None or self.rho == 0:
            return {}
        w = self.space.weights(self.perturbed)
        at = StepContext(self.space, w, {}, torch.zeros(()), self.rho, self.steps, self._memory)
        return self._rules.anticipate({}, at)

    def _first(
        self, window: AccumulationWindow, run: RunPass, share: float | Tensor, samples: Tensor | None
    ) -> Tensor:
        seen = MicroBatchRecord(run, self._replay.snapshot_rng(), samples)
        if self.rho > 0:
            position = self.ranks.place(len(self._reports) + len(window.passes))
            self._samples.pick(seen, self._memory, self.steps, position, self.space.device)
        window.passes.append(seen)
        window.share = window.share + share
        with self._moved(window.anticipated):
            loss, seen.sight = self._run(run, seen.index)
        window.loss = window.loss + loss
        return loss

    def _run(self, run: RunPass, index: Tensor | None) -> tuple[Tensor, RecordedForward | None]:
        watching = self._samples.watching() if self.rho > 0 else nullcontext()
        with self.ranks.context(), watching as sight:
            loss = run() if index is None else run(index)
        return loss.detach(), sight

    def _close(self, window: AccumulationWindow) -> StepReport:
        """The second half of a window: from `g` in `.grad` to `d` in `.grad`."""
        unit = window.unit(self.ranks.scope)
        g = self._grads(unit)
        grad_norm = self.space.norm(g)
        targets = {n: g[n] for n in self.perturbed if n in g} if self.rho > 0 else {}
        if not targets:
            return StepReport(window.loss, grad_norm, ~self._agreed(all_finite(window.loss, grad_norm)))
        targets = g if len(targets) == len(g) else targets
        at = StepContext(self.space, self.space.weights(targets), g, grad_norm, self.rho, self.steps, self._memory)
        at.progress = min(1.0, self.elapsed / self.total_steps) if self.total_steps else 0.0
        at.fisher = squared_gradients(window, self.space, self.ranks, self._replay)
        self._at_work = True
        if not self._rules.ascends(self.steps):
            return self._close_with_one(window, g, at, unit)
        if self._rules.keeps_gradient and self.ranks.overwrites_gradients:
            at.g = {n: t.clone() for n, t in g.items()}
        u = self._rules.ascent(targets, at)
        at.release(keep_gradient=self._rules.keeps_gradient)
        del g, targets
        perturbation_norm = self.rho * self.space.norm(u)
        ascent_loss = self._second(window, u)
        ascent_grads = self._grads(unit)
        ascent_grad_norm = at.norm(ascent_grads)
        finite = self._agreed(all_finite(window.loss, ascent_loss, grad_norm, ascent_grad_norm))
        self._hand_on(ascent_grads, self._rules.descent(ascent_grads, at), unit, window, finite)
        self._samples.learn(window, self._memory, self.ranks.summed)
        self._memory.commit(finite)
        return StepReport(
            window.loss, grad_norm, ~finite, ascent_loss, ascent_grad_norm, perturbation_norm, at.scale, *window.cost()
        )

    def _second(self, window: AccumulationWindow, u: Vector) -> Tensor:
        """Run the window at `w + ρ u`."""
        with self._moved(u):
            u.clear()  # it has been added, and is a model's worth of memory
            self.space.clear_grads()
            self.ranks.buffers_due = window.buffers_due
            with self._replay.replaying(window.buffers_seen):
                return sum(self._replayed(seen) for seen in window.passes)

    def _close_with_one(
        self, window: AccumulationWindow, g: Vector, at: StepContext, unit: float | Tensor
    ) -> StepReport:
        """The second half of a window that takes no second pass."""
        finite = self._agreed(all_finite(window.loss, at.grad_norm))
        self._hand_on(g, self._rules.reuse(g, at), unit, window, finite)
        self._memory.commit(finite)
        moved = None if self._rules.anticipate is None else self.rho * self.space.norm(window.anticipated)
        return StepReport(window.loss, at.grad_norm, ~finite, perturbation_norm=moved, scale=at.scale)

    @contextlib.contextmanager
    def _moved(self, u: Vector) -> Iterator[None]:
        """The weights at `w + ρ u`; they come back by copy, whatever happens."""
        if not u:
            yield
            return
        w = self.space.weights(u)
        snapshot = Snapshot(w.values(), self.offload_snapshot)
        try:
            move(w, u, self.rho)
            torch.clear_autocast_cache()  # one autocast context around both passes would show the second stale casts
            self._check_survival(w, snapshot, u)
            yield
        finally:
            snapshot.restore()
            torch.clear_autocast_cache()

    def _replayed(self, seen: MicroBatchRecord) -> Tensor:
        """The second pass of a micro-batch, on the samples that the method selects."""
        index = self._samples.narrow(seen)
        seen.rewind()
        loss, sight = self._run(seen.run, index)
        self._samples.note(seen, index, sight)
        return loss

    def _agreed(self, finite: Tensor) -> Tensor:
        """Whether `finite` holds on every rank; under `micro_batch` on this one, and `_settled` asks once a step.

        Ranks may hold unequal numbers of micro-batches, so none waits for another's in between.
        """
        return finite if self.ranks.scope == "micro_batch" else self.ranks.agreed(finite)

    def _settled(self, report: StepReport) -> StepReport:
        if self.ranks.scope != "micro_batch":
            return report
        return replace(report, skipped=~self.ranks.agreed(~report.skipped))

    def _grads(self, unit: float | Tensor) -> Vector:
        raw = self.space.grads()
        return scaled(raw, 1 / unit) if isinstance(unit, Tensor) or unit != 1 else raw

    def _hand_on(
        self, second: Vector, d: Vector, unit: float | Tensor, window: AccumulationWindow, finite: Tensor
    ) -> None:
        """Write `d` to `.grad` in the loss's scale; under a loss scale a step to be skipped is made non-finite."""
        if window.loss_scale is not None:
            spoiled = torch.where(finite, 1.0, torch.nan)
            self.space.write_grads(scaled(self.space.grads() if d is second else scaled(d, unit), spoiled))
        elif d is not second:
            self.space.write_grads(scaled(d, unit) if isinstance(unit, Tensor) or unit != 1 else d)

    def _check_survival(self, w: Vector, snapshot: Snapshot, u: Vector) -> None:
        """Once, and only where a perturbed weight is in low precision: measure what rounding left of the step."""
        if not self._survival_known:
            self._survival_known = True
            lowest = max((t.dtype for t in w.values()), key=lambda dtype: torch.finfo(dtype).eps)
            warn_if_lost(survival(w, snapshot.copies, u, self.rho), lowest, self.rho)

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """A step that dies leaves no half-made gradient and no half-made state: the next one starts afresh."""
        try:
            yield
        except BaseException:
            self._abandon()
            self.ranks.abandon()
            self.space.clear_grads()
            raise

    def _abandon(self) -> None:
        self._window, self._reports = None, []
        self._memory.drop()

    def _check_open(self, phase: str) -> None:
        if self._window is None:
            raise RuntimeError(f"{phase}: no step has begun; call begin first, or step, which does it all.")
