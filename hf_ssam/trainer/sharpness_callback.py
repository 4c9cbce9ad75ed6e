"""The curvature along a run, in its own log: what the perturbation does, and whether the learning rate is safe.

Every `sharpness_steps`, and once before the first step, the top eigenvalue λ₁ of the Hessian is measured on the same
few training rows, with the edges of stability that learning rate and ρ predict for it. No weight is moved for it: ĝ is
taken at `w + e` in tensors of its own, so there is nothing to restore.

The edges are those of gradient descent without momentum. With Adam as the base optimizer λ₁, the trace and the
alignments mean what they always do; the edges do not bind, and a warning says so once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from ..engine.batches import Batch, batch_size, split
from ..engine.parameters import stable_name
from ..engine.replay import unchanged
from ..methods.method import Method
from ..rules.context import StepContext
from ..sharpness import Edges, Objective, edge_of_stability
from ..sharpness.arithmetic import length
from ..sharpness.eigenvalues import solve
from ..sharpness.measured import selected
from ..sharpness.stochastic import estimate_trace

logger = logging.get_logger(__name__)

PREFIX = "sharpness/"


class SharpnessCallback(TrainerCallback):
    """Measures and logs the curvature every `args.sharpness_steps` optimizer steps, through `Trainer.log`.

    Log keys, all under `sharpness/`: `top_eigenvalue` (λ₁), `converged`, `trace`, `trace_error` (standard error),
    `grad_norm` (‖g‖ on the probe), `grad_alignment` and, where the perturbation is a function of the gradient,
    `ascent_grad_alignment` (|cos| of g and ĝ with the top eigenvector), `edge_gd` (2/η), `edge_usam`, `edge_sam`,
    `edge` (of the method itself, where one is known), `stability` (2 is the method's edge), `stability_usam`
    (`ηλ₁(1 + ρλ₁)`), and the cost: `products`, `gradients`, `seconds`.

    Args:
        trainer: the host, an `SSAMTrainerMixin`.
        probe_rows: training rows to measure on, a rank; at least one batch's first rows.
        max_products: bound on Hessian-vector products a measurement, each about three passes over the probe.
        trace_samples: how many of them go to the trace.

    Raises:
        NotImplementedError: if the weights will be sharded, where no rank has the whole model.
    """

    def __init__(self, trainer: Any, probe_rows: int = 32, max_products: int = 60, trace_samples: int = 8):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise NotImplementedError(
                "sharpness_steps: curvature cannot be measured on sharded weights; leave it out, save the model and "
                "measure it with hf_ssam.sharpness in one process."
            )
        selected(trainer.model, None)
        self.trainer, self.probe_rows = trainer, probe_rows
        self.max_products, self.trace_samples = max_products, trace_samples
        self._probe: list[Batch] | None = None
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the probe of an earlier run: batch size and collator may have changed."""
        self._probe = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model that training starts from."""
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `sharpness_steps`."""
        if state.global_step % args.sharpness_steps == 0:
            self.measure()

    def measure(self) -> None:
        """Measure now and log; every rank has to come here."""
        with self._unseen():
            if self._probe is None:
                self._probe = self._draw()
            begun = time.perf_counter()
            objective = Objective(self.trainer.model, self._probe, loss=self._loss)
            values = self._values(objective)
        cost = {"products": objective.products, "gradients": objective.gradients}
        values |= cost | {"seconds": time.perf_counter() - begun}
        self.trainer.log({PREFIX + name: value for name, value in values.items()})

    def _values(self, objective: Objective) -> dict[str, float]:
        g = objective.gradient()
        steps = self.max_products - self.trace_samples
        top = solve(objective, max_products=steps, vectors=True, solver="lean")
        direction = objective.flat(top.vectors[0])
        total = estimate_trace(objective, self.trace_samples)
        values = {
            "top_eigenvalue": top.values[0],
            "converged": float(top.converged),
            "trace": total.value,
            "trace_error": total.standard_error,
            "grad_norm": length(g).item(),
            "grad_alignment": _alignment(g, direction),
        }
        rho = self._rho()
        ascended = self._ascent_gradient(objective, g, rho) if rho > 0 else None
        if ascended is not None:
            values["ascent_grad_alignment"] = _alignment(ascended, direction)
        return values | self._edges(top.values[0], rho, g, ascended)

    def _edges(self, eigenvalue: float, rho: float, g: Tensor, ascended: Tensor | None) -> dict[str, float]:
        lr = self.trainer.lr_scheduler.get_last_lr()[0]
        if lr <= 0 or self.trainer.args.rho_unit != "weight":  # the edges are of a radius that is a length
            return {}
        self._warn_about_base()
        norm = length(g).item()
        method, normalize = _edge_name(self.trainer.args.method()) if rho > 0 else ("sgd", True)
        scale = norm / length(ascended).item() if method == "ssam" and ascended is not None else None
        general = edge_of_stability(lr, rho, norm, "sam")
        values = {"edge_gd": general.gd, "edge_usam": general.usam, "edge_sam": general.edge}
        if method is not None:
            own: Edges = edge_of_stability(lr, rho, norm, method, scale=scale, normalize=normalize)
            values |= {"edge": own.edge, "stability": own.stability(eigenvalue)}
        return values | {"stability_usam": lr * eigenvalue * (1 + rho * eigenvalue)}

    def _ascent_gradient(self, objective: Objective, g: Tensor, rho: float) -> Tensor | None:
        """ĝ at the method's own perturbation of the probe; averages that a method keeps start afresh here.

        None where that perturbation is no function of the gradient alone: Momentum-SAM, masks by Fisher information,
        a radius in shares of the loss.
        """
        engine = self.trainer.two_pass
        rules = engine.method.build()
        if rules.second_pass.interval is None or rules.per_example or rules.needs_loss:
            return None
        named = {stable_name(n): t for n, t in objective.named(g).items()}
        targets = {n: t for n, t in named.items() if n in engine.perturbed}
        w = {stable_name(n): t for n, t in objective.weights().items() if stable_name(n) in targets}
        u = rules.ascent(targets, StepContext(engine.space, w, named, length(g), rho))
        return objective.gradient(
            objective.flat({n: u[stable_name(n)] for n in objective.params if stable_name(n) in u}) * rho
        )

    def _rho(self) -> float:
        """ρ of the next perturbed step, or of the last where none is left; 0 with a stock optimizer."""
        if self.trainer.two_pass is None:
            return 0.0
        step, end = self.trainer.state.global_step, self.trainer.state.max_steps
        radii = map(self.trainer.rho_at, chain(range(step, end), reversed(range(step))))
        return next(filter(None, radii), 0.0)

    def _loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        return self.trainer.compute_loss(model, batch)

    def _draw(self) -> list[Batch]:
        """The first batches of the training set as the run's seed orders it, the same after a resume."""
        set_seed(self.trainer.args.seed)
        probe, found = [], 0
        for batch in self.trainer.get_train_dataloader():
            probe.append(split(batch, self.probe_rows - found)[0])
            found += batch_size(probe[-1])
            if found >= self.probe_rows:
                break
        return probe

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Generators, buffers and the host's counters stay as they were."""
        with unchanged(self.trainer.model), self.trainer.host_counters_kept():
            yield

    def _warn_about_base(self) -> None:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        plain = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if not (plain or self._warned):
            self._warned = True
            logger.warning(
                f"sharpness/edge… hold for SGD without momentum, not for {type(optimizer).__name__}; λ₁ and the other "
                "values are right all the same."
            )


def _alignment(a: Tensor, b: Tensor) -> float:
    """|cos| of the angle between two vectors; 0 where one of them is 0."""
    lengths = length(a).item() * length(b).item()
    return abs(torch.dot(a, b).item()) / lengths if lengths else 0.0


def _edge_name(method: Method) -> tuple[str | None, bool]:
    """The name by which `edge_of_stability` knows `method` (or None), and whether its ascent is normalised."""
    normalize = method.name != "usam" and bool(method.values.get("normalize", True))
    if method.name not in ("ssam", "sam", "usam") or method.values.get("adaptive") or method.rho_unit != "weight":
        return None, normalize
    if method.values["renormalize"]:
        return "ssam", normalize
    return ("sam" if normalize else "usam"), normalize
