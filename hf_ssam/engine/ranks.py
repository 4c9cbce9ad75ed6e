"""Whose gradient the ascent follows when a step is spread over micro-batches and ranks (laws 4 and 5).

    global       the gradient of the whole batch: summed over micro-batches, averaged over ranks (textbook SAM)
    rank         each rank's own batch (m-sharpness, Foret et al. 2021, section 4.1; what most DDP code does unawares)
    micro_batch  each micro-batch of each rank (mSAM, Behdin et al. 2023, arXiv 2302.09693)

Under the last two a gradient of the first pass must never meet another rank's, and every factor belongs to the batch
whose ratio it is. So both passes stay unsynchronised and the finished `d` is averaged once: what ranks apply is the
same tensor, and they cannot drift.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..rules.space import ParameterSpace
from .parameters import deepspeed_engine

SCOPES = ("global", "rank", "micro_batch")
BUCKET_BYTES = 25 * 2**20


class Ranks:
    """How the passes of a model are synchronised.

    Args:
        model: the model as it is called: in DistributedDataParallel, sharded by FSDP2, DeepSpeed's engine, or none of
            them.
        scope: one of `SCOPES`.
        space: its trainable parameters.

    Raises:
        ValueError: if the scope is unknown, or it is not `global` and no rank has a whole gradient of its own.

    Attributes:
        in_deepspeed: whether DeepSpeed's engine averages gradients, in each backward.
    """

    def __init__(self, model: nn.Module, scope: str, space: ParameterSpace):
        if scope not in SCOPES:
            raise ValueError(f"ascent_scope: `{scope}` does not exist; choose one of {', '.join(SCOPES)}.")
        self._ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self._fsdp = tuple(_sharded_roots(model))
        self.in_deepspeed = deepspeed_engine(model) is not None
        sharded = space.is_sharded or bool(self._fsdp)
        if scope != "global" and (sharded or self.in_deepspeed):
            raise ValueError(
                f"ascent_scope: `{scope}` needs each rank's own whole gradient, which FSDP2 and DeepSpeed never hold; "
                "choose ascent_scope=global, or train with DDP."
            )
        self.scope = scope
        self._left_over = False
        self.space = space
        self._hosts: dist.ProcessGroup | None = None
        replicas = dist.group.WORLD if self.in_deepspeed else None if self._ddp is None else self._ddp.process_group
        self._group = dist.group.WORLD if sharded else replicas
        # Ranks that split layers between them (tensor parallelism) share their samples.
        self._data_group = dist.group.WORLD if self._fsdp else replicas

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.space.device

    @property
    def world_size(self) -> int:
        """Number of ranks that hold a replica."""
        return 1 if self._ddp is None else dist.get_world_size(self._ddp.process_group)

    @property
    def overwrites_gradients(self) -> bool:
        """Whether a second pass writes its gradients over the first's: DDP's buckets, where `.grad` views them."""
        return self._ddp is not None and self._ddp.gradient_as_bucket_view

    @property
    def buffers_due(self) -> bool:
        """Whether the next forward first takes rank 0's buffers, as DDP has it after a synchronised pass."""
        return self._ddp is not None and self._ddp.require_forward_param_sync

    @buffers_due.setter
    def buffers_due(self, due: bool) -> None:
        if self._ddp is not None:
            self._ddp.require_forward_param_sync = due

    def context(self) -> contextlib.AbstractContextManager:
        """What a pass runs in: under `rank` and `micro_batch` no gradient leaves the rank, forward included."""
        return contextlib.nullcontext() if self.scope == "global" else self.deferred()

    def deferred(self) -> contextlib.AbstractContextManager:
        """What all but the last pass over a batch run in: gradients add up locally."""
        if self._ddp is not None:
            return self._ddp.no_sync()
        return _unsynchronized(self._fsdp)

    def unsynchronized(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`run`, its gradients kept local until a later pass synchronises them."""

        def deferred_run(*args):
            with self.deferred():
                return run(*args)

        return deferred_run

    def average(self) -> None:
        """Average `.grad` over the ranks where the passes did not; a gradient that a rank lacks counts as zero."""
        if self.scope == "global" or self._ddp is None or self.world_size == 1:
            return
        self.buffers_due = True
        params = self._present(self._ddp)
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        _average([p.grad for p in params if p.grad is not None], self._ddp.process_group)

    def average_over_data(self, tensors: list[Tensor]) -> None:
        """Average in place, over the ranks whose batches differ, gradients that no host reduces."""
        if self._data_group is not None:
            _average(tensors, self._data_group)

    def abandon(self) -> None:
        """Put FSDP2's shards back in place of what a pass that died had gathered: no collective, so no rank waits."""
        self._left_over = bool(self._fsdp)
        for root in self._fsdp:
            # What never ran has no state to reset, and torch 2.13 fails on it; older versions have no such method.
            with contextlib.suppress(AttributeError):
                root.reset_iter_state()

    def begin(self) -> None:
        """Drop the whole gradients that a dead pass had added up, unsent; FSDP2 keeps them on the gathered weights.

        Raises:
            ValueError: under DistributedDataParallel's `join`, whose shadow passes know of one pass a step.
        """
        if self._ddp is not None and self._ddp._join_config.enable:
            raise ValueError(
                "model: DistributedDataParallel.join (join_uneven_inputs) lets a rank without batches shadow one pass "
                "a step, and a step here has two and its own collectives; give every rank as many batches "
                "(even_batches=True, or drop_last=True) and leave join out."
            )
        if self._left_over:
            self._left_over = False
            for module in (m for root in self._fsdp for m in cast(nn.Module, root).modules()):
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.zero_grad(set_to_none=True)
                    module.reshard()

    def place(self, position: int) -> int:
        """The number of this rank's micro-batch `position` among those of all ranks: no other of the step has it."""
        if self._data_group is None:
            return position
        return position * dist.get_world_size(self._data_group) + dist.get_rank(self._data_group)

    def summed(self, values: Tensor) -> Tensor:
        """`values` added up over the ranks, whose batches differ; as it is in one process."""
        if self._data_group is not None:
            dist.all_reduce(values, group=self._data_group)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """`values`, shape (K,), of all ranks one after the other, K a rank's own; as it is in one process.

        How many each rank has is told from host to host, so that no device is waited for.
        """
        if self._data_group is None:
            return values
        sizes = torch.zeros(dist.get_world_size(self._data_group), dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(values)]), group=self._host_group(self._data_group))
        padded = values.new_zeros(int(sizes.max()))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._data_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])

    def _host_group(self, group: dist.ProcessGroup) -> dist.ProcessGroup:
        """The ranks of `group`, talking over gloo."""
        if self._hosts is None:
            self._hosts = _over_gloo(group)
        return self._hosts

    def agreed(self, finite: Tensor) -> Tensor:
        """Whether `finite` (bool, shape ()) holds on every rank; a loss is local, and one rank must not step alone."""
        if self._group is None:
            return finite
        votes = finite.to(self.space.device, torch.float32)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self._group)
        return votes.bool()

    def _present(self, ddp: DistributedDataParallel) -> list[nn.Parameter]:
        """Parameters that some rank has a gradient for.

        Where DDP does not look for unused parameters, every one must have a gradient and none is asked. Where it
        does, it reads a map of the used ones back to the host each step, and so do we: a parameter that no rank
        used keeps `grad = None`, since AdamW would decay it by a zero gradient.
        """
        params = list(self.space.params.values())
        if not ddp.find_unused_parameters:
            return params
        used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        dist.all_reduce(used, group=ddp.process_group)
        return [p for p, u in zip(params, used.tolist(), strict=True) if u > 0]


def _over_gloo(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group` itself where it moves host memory over gloo, otherwise another one of its ranks that does."""
    if "cpu:gloo" in dist.get_backend_config(group):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Make `tensors` their mean over `group`, in place."""
    for bucket in _buckets(tensors):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype and device, of about `BUCKET_BYTES` each: one collective a run."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (size + t.nbytes > BUCKET_BYTES or t.dtype != bucket[0].dtype or t.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.nbytes
    if bucket:
        yield bucket


def _sharded_roots(model: nn.Module) -> Iterator[FSDPModule]:
    """The outermost modules that FSDP2 shards: the model, or some of its layers."""
    if isinstance(model, FSDPModule):
        yield model
        return
    for child in model.children():
        yield from _sharded_roots(child)


@contextlib.contextmanager
def _unsynchronized(roots: tuple[FSDPModule, ...]) -> Iterator[None]:
    for root in roots:
        root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for root in roots:
            root.set_requires_gradient_sync(True)
