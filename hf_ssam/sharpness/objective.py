"""The loss as a function of a flat vector of weights: its value, gradient and Hessian-vector product, matrix-free.

    L(w) = Σ_b n_b L_b(w) / Σ_b n_b                     over the probe batches, `probe.count_items` giving n_b
    H v  = ∇ ⟨∇L(w), v⟩                                  reverse over reverse (Pearlmutter 1994, computed exactly)

The model is never written to. `torch.func.functional_call` runs it on detached views of its weights (or on copies in
the precision asked for), so `.grad`, `requires_grad` and the weights themselves stay out of it; training flags,
buffers and generators are put back after every pass. Generators are replaying before every pass, so that dropout is
one fixed mask a batch and a shuffling DataLoader one fixed order: a Hessian belongs to a function, and these make it
one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ..engine.replay import Replay
from ..rules.tensors import Vector
from .arithmetic import finite
from .double_backward import ExactWeightNorm, refuse_once_differentiable
from .measured import LossFunction, LossModule, model_loss, selected, without_autocast
from .probe import Batch, Batches, as_batches, count_items, moved
from .streamed import add_gradient, add_product
from .symmetry import refuse_asymmetry


class Objective:
    """A loss over probe batches, as a function of the weights of `model`.

    Args:
        model: any model, also wrapped by DDP, `torch.compile` or an Accelerator's mixed precision; the wrapped model
            is what is differentiated, without autocast.
        batches: one dictionary as a collator returns it, or something that yields such dictionaries each time it is
            iterated over. Small batches cost less memory and give the same numbers (unless BatchNorm is in train
            mode).
        parameters: which weights the curvature is taken in: None for those with `requires_grad`, otherwise a regular
            expression searched for in the name of every floating weight, frozen or not (`"lora"`, `r"layer\\.3\\."`).
            The row that an embedding's `padding_idx` keeps from its gradient counts as frozen: its curvature is 0.
        train_mode: differentiate the model as it trains (dropout, batch statistics) instead of as it evaluates.
        loss: `(model, batch) -> scalar`, a mean over the batch's items; default `model(**batch).loss`. A trainer's
            `compute_loss` is one. It may change the dictionary that it gets, not the tensors.
        items: `(model, batch) -> int`, what the loss is a mean over; default `probe.count_items`.
        dtype: precision of weights, activations and vectors; default that of the weights, but at least float32:
            half-precision weights are copied to float32.
        distributed: add up over the process group, every rank having its own batches and calling in step; default
            where a process group of several is up. False measures this rank's batches alone.
        progress: show a bar that counts Hessian-vector products.

    Attributes:
        size: number of weights n.
        precision: dtype of the arithmetic, and of the weights where theirs differs.
        total: number of items, over all ranks.
        losses, gradients, products: how many passes of each kind have run over all batches so far.

    Raises:
        ValueError: if no weight is left, a weight is sharded, or there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        parameters: str | None = None,
        train_mode: bool = False,
        loss: LossFunction = model_loss,
        items: Callable[[nn.Module, Batch], int] = count_items,
        dtype: torch.dtype | None = None,
        distributed: bool | None = None,
        progress: bool = False,
    ):
        self.model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.params = selected(self.model, parameters)
        self.train_mode = train_mode
        self.dtype = dtype or functools.reduce(
            torch.promote_types, {p.dtype for p in self.params.values()}, torch.float32
        )
        self.device = next(iter(self.params.values())).device
        self.distributed = _several() if distributed is None else distributed and _several()
        self.size = sum(p.numel() for p in self.params.values())
        self.losses = self.gradients = self.products = 0
        self._is_symmetric = False
        self._function, self._items, self._batches = LossModule(self.model, loss), items, as_batches(batches)
        self._replay = Replay(self.model)
        self._buffers, self._draws = self._replay.snapshot_buffers(), self._replay.snapshot_rng()
        self.total = self._count()
        self._bar = tqdm(desc="Hessian-vector products", unit="product", disable=not progress)

    @property
    def precision(self) -> str:
        """Such as `float32`, or `float32 (weights are bfloat16)`."""
        held = {p.dtype for p in self.params.values()} - {self.dtype}
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in held))
        return str(self.dtype).removeprefix("torch.") + (f" (weights are {names})" if held else "")

    def value(self, offset: Tensor | None = None) -> float:
        """`L(w + offset)`; `offset` has shape (n,), as everywhere below."""
        self.losses += 1
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self._sweep(lambda loss, leaves, share: total.add_(loss.detach().double(), alpha=share), offset, grad=False)
        return finite(self._reduced(total), "the loss").item()

    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """`∇L(w + offset)`, shape (n,)."""
        self.gradients += 1
        out = self.zeros()
        parts = self.split(out)

        def visit(loss: Tensor, leaves: list[Tensor], share: float) -> None:
            add_gradient(loss, leaves, parts, share)

        self._sweep(visit, offset)
        return finite(self._reduced(out), "the gradient")

    def product(self, vector: Tensor) -> Tensor:
        """`H v` at the weights as they are, shape (n,)."""
        return self.add_product(vector, self.zeros())

    def add_product(self, vector: Tensor, out: Tensor) -> Tensor:
        """`out ← out + H v`, in place, so that a Lanczos recurrence needs two vectors.

        The first product is checked: it costs two more over the first batch (and no vector of memory).

        Raises:
            NotImplementedError: if an operation of the model has no double backward, which is named, or a wrong one.
        """
        self.products += 1
        if self.distributed and dist.get_rank() > 0:
            out.zero_()
        directions, parts = self.split(vector), self.split(out)

        def visit(loss: Tensor, leaves: list[Tensor], share: float) -> None:
            if self.products == 1:
                refuse_once_differentiable(loss)
            if not self._is_symmetric:
                refuse_asymmetry(loss, leaves)
                self._is_symmetric = True
            add_product(loss, leaves, directions, parts, share)

        with ExactWeightNorm():
            self._sweep(visit)
        self._bar.update()
        return finite(self._reduced(out), "a Hessian-vector product")

    def zeros(self) -> Tensor:
        """A zero vector, shape (n,)."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector, one in the shape of each weight."""
        pieces = vector.split([p.numel() for p in self.params.values()])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params.values(), strict=True)]

    def named(self, vector: Tensor) -> Vector:
        """A flat vector as views by parameter name."""
        return dict(zip(self.params, self.split(vector), strict=True))

    def flat(self, v: Vector) -> Tensor:
        """The flat vector of `v`; a missing name counts as zero."""
        out = self.zeros()
        for name, part in self.named(out).items():
            if name in v:
                part.copy_(v[name])
        return out

    def weights(self) -> Vector:
        """The weights, detached, in the precision of the arithmetic."""
        return {n: p.detach().to(self.dtype) for n, p in self.params.items()}

    def random(self, generator: torch.Generator) -> Tensor:
        """A standard normal vector, the same on every device and rank."""
        return torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device)

    def batches(self) -> Iterator[Batch]:
        """The probe batches, as they were given."""
        return iter(self._batches)

    def over(self, batch: Batch) -> Objective:
        """The same function over one batch alone, sharing nothing that counts."""
        other = copy.copy(self)
        other._batches, other.total = [batch], self._items(self.model, batch)
        return other

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _count(self) -> int:
        with self._same_function():
            counts = [self._items(self.model, batch) for batch in self._batches]
        total = self._reduced(torch.tensor([sum(counts), len(counts)], device=self.device))
        if total[0] == 0:
            raise ValueError(f"batches: {int(total[1])} batches hold no item that the loss counts; pass at least one.")
        return int(total[0])

    def _sweep(self, visit: Callable[[Tensor, list[Tensor], float], object], offset=None, grad: bool = True) -> None:
        """Call `visit(loss, leaves, n_b / Σ n_b)` for every batch, and leave no trace."""
        with self._same_function(), sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad):
            for batch in self._batches:
                items = self._items(self.model, batch)
                if items == 0:
                    continue
                leaves = self._leaves(offset)
                inputs = (moved(batch, self.device, self.dtype),)
                with torch.autocast(self.device.type, enabled=False):
                    loss = torch.func.functional_call(self._function, self._state(leaves), inputs)
                visit(loss, leaves, items / self.total)

    def _leaves(self, offset: Tensor | None) -> list[Tensor]:
        values = [p.detach().to(self.dtype) for p in self.params.values()]
        if offset is not None:
            values = [w + e.to(w.device) for w, e in zip(values, self.split(offset), strict=True)]
        return [value.requires_grad_() for value in values]

    def _state(self, leaves: list[Tensor]) -> dict[str, Tensor]:
        """Every weight as a leaf or a constant, and the buffers that have to change precision."""
        constant = {n: p.detach() for n, p in self.model.named_parameters() if n not in self.params}
        recast = {n: b for n, b in self.model.named_buffers() if b.is_floating_point() and b.dtype != self.dtype}
        cast = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in (constant | recast).items()}
        state = cast | dict(zip(self.params, leaves, strict=True))
        return {f"model.{name}": tensor for name, tensor in state.items()}

    @contextlib.contextmanager
    def _same_function(self) -> Iterator[None]:
        """The same buffers, draws and mode for every pass; afterwards those that were there."""
        modes = [(m, m.training) for m in self.model.modules()]
        with self._replay.replaying(self._buffers), without_autocast(self.model):
            if self._draws is not None:
                self._draws.restore()
            try:
                self.model.train(self.train_mode)
                yield
            finally:
                for module, mode in modes:
                    module.training = mode

    def _reduced(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
