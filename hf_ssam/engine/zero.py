"""DeepSpeed's ZeRO: its flat partitions of weights and gradients, shown to rules as vectors by parameter name.

ZeRO 1 and 2 lay the weights of a parameter group end to end and give each rank a partition of them: the float32 master
weights, the reduced gradient and the optimizer's state. A rank's part of a parameter is what of it lies in that
partition: a vector, perhaps an empty one. Every rank also holds all weights in the precision that the model computes
in, and these follow the master weights.

    perturb    master weights ← master weights + ρ u, which are then rounded and gathered, as after an optimizer's step
    restore    both by copy and without a collective: a rank that fails waits for none

Adding in float32 keeps a perturbation below the spacing of bfloat16: a master weight lies anywhere between two
neighbours, so what rounding takes from one weight it gives to another.

ZeRO 0 keeps whole gradients in `.grad` and needs none of this.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules.space import ParameterSpace
from ..rules.tensors import Vector, copied
from .parameters import deepspeed_engine, transposed_names


@dataclass(frozen=True)
class Fragment:
    """Where this rank's part of a parameter lies.

    Attributes:
        group: index of the parameter group.
        start: its first number in the partition.
        offset: its first number in the parameter.
        size: how many numbers it has.
    """

    group: int
    start: int
    offset: int
    size: int


class ZeroSpace(ParameterSpace):
    """The parameters that a ZeRO optimizer of stage 1 or 2 trains.

    Args:
        named: parameters by name.
        transposed: as in `ParameterSpace`.
        optimizer: DeepSpeed's.
    """

    is_flat = True

    def __init__(self, named: Mapping[str, nn.Parameter], transposed: Iterable[str], optimizer: Any):
        super().__init__(named, transposed)
        names = {id(p): n for n, p in named.items()}
        self._optimizer = optimizer
        self._fragments = {names[id(p)]: fragment for p, fragment in _fragments(optimizer)}
        self._groups = {name: (optimizer.dp_process_group,) for name in self.params}

    def weights(self, names: Iterable[str] | None = None) -> Vector:
        """This rank's part of the master weights, sharing their storage."""
        masters = [t.detach() for t in self._optimizer.single_partition_of_fp32_groups]
        return {n: self._part(n, masters) for n in (self.params if names is None else names)}

    def stored(self, names: Iterable[str]) -> list[Tensor]:
        """The master weights and the weights that the model computes with."""
        masters = [t.detach() for t in self._optimizer.single_partition_of_fp32_groups]
        return [*masters, *self._optimizer.bit16_groups_flat]

    def alone(self, names: Iterable[str], known: Container[str]) -> bool:
        """Never: partitions are views of the groups' flat tensors."""
        return False

    def rebind(self, w: Vector) -> None:
        """Nothing: the model's weights are not the master weights."""

    def refresh_model(self) -> None:
        """Round the master weights and gather them; every rank calls this."""
        self._optimizer.update_lp_params()

    def grads(self) -> Vector:
        """This rank's part of the reduced gradients, in float32; in their own storage where they are."""
        return {n: t.to(torch.float32) for n, t in self._reduced().items()}

    def write_grads(self, d: Vector) -> None:
        """Make `d` what the engine's step reads; multiplied in float32, before it is rounded."""
        reduced = self._reduced()
        if all(t.dtype == torch.float32 for t in reduced.values()):
            super().write_grads(d)
            return
        whole = copied(d)
        torch._foreach_copy_([reduced[n] for n in whole], list(whole.values()))

    def clear_grads(self) -> None:
        """Drop what passes have left, reduced or not yet."""
        self._optimizer.zero_grad(set_to_none=True)
        for kept in (self._optimizer.averaged_gradients, self._optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    def globalized(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor of which every rank gives its part; every rank calls this."""
        p, fragment = self.params[name], self._fragments.get(name)
        whole = tensor.new_zeros(p.numel())
        if fragment is not None:
            whole[fragment.offset : fragment.offset + fragment.size] = tensor
        # As bytes: a sum of numbers would lose the sign of a zero.
        dist.all_reduce(whole.view(torch.uint8), group=self._optimizer.dp_process_group)
        return whole.view(p.shape)

    def localized(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor: the inverse of `globalized`."""
        fragment = self._fragments.get(name)
        first, size = (0, 0) if fragment is None else (fragment.offset, fragment.size)
        return tensor.reshape(-1)[first : first + size].to(self.device, copy=True)

    def _reduced(self) -> dict[str, Tensor]:
        """This rank's part of each gradient as the step reads it; empty before the last pass of a window."""
        groups = self._optimizer.averaged_gradients
        if any(groups.get(i) is None for i in range(len(self._optimizer.bit16_groups))):
            return {}
        placed = {i: _placed(tensors) for i, tensors in groups.items()}
        empty = groups[0][0].new_empty(0)
        parts = self._fragments
        return {n: placed[parts[n].group][parts[n].start] if n in parts else empty for n in self.params}

    def _part(self, name: str, flat: list[Tensor]) -> Tensor:
        fragment = self._fragments.get(name)
        if fragment is None:
            return flat[0].new_empty(0)
        return flat[fragment.group].narrow(0, fragment.start, fragment.size)


def _fragments(optimizer: Any) -> Iterator[tuple[nn.Parameter, Fragment]]:
    """What this rank's partitions hold of which parameter."""
    rank = dist.get_rank(optimizer.dp_process_group)
    for group, params in enumerate(optimizer.params_in_partition):
        starts = optimizer.grad_partition_insertion_offset[group][rank]
        offsets = optimizer.grad_start_offset[group][rank]
        for p in params:
            number = optimizer.get_param_id(p)
            start, offset = int(starts[number]), int(offsets[number])
            size = min(p.numel() - offset, int(optimizer.partition_size[group]) - start)
            if size > 0:
                yield p, Fragment(group, start, offset, size)


def _placed(tensors: list[Tensor]) -> dict[int, Tensor]:
    """The tensors that a partition's gradient is made of, as vectors by where they begin in it.

    One with gaps is put in order, in the list too, which the step would do.
    """
    found, start = {}, 0
    for i, t in enumerate(tensors):
        if not t.is_contiguous():
            tensors[i] = t = t.contiguous()
        if t.numel():
            found[start] = t.view(-1)
        start += t.numel()
    return found


def space_of(model: nn.Module, named: Mapping[str, nn.Parameter]) -> ParameterSpace:
    """The parameters `named` as `model` keeps them.

    Raises:
        NotImplementedError: for a feature of DeepSpeed that two passes are not known to work with.
        ValueError: if DeepSpeed's optimizer steps parameters that are not in `named`.
    """
    engine = deepspeed_engine(model)
    if engine is None:
        return ParameterSpace(named, transposed_names(model))
    _refuse_features(engine)
    stage = engine.zero_optimization_stage()
    groups = engine.optimizer.bit16_groups if stage else [g["params"] for g in engine.optimizer.param_groups]
    stepped = {id(p) for group in groups for p in group}
    if stepped - {id(p) for p in named.values()}:
        raise ValueError(
            "optimizers: under DeepSpeed the optimizer steps parameters that are not the model's, as a loss with "
            "weights of its own has; make them a part of the model, or train with DDP or FSDP2."
        )
    trained = {n: p for n, p in named.items() if id(p) in stepped}
    transposed = transposed_names(model)
    return ZeroSpace(trained, transposed, engine.optimizer) if stage else ParameterSpace(trained, transposed)


def _refuse_features(engine: Any) -> None:
    """Refuse what two passes have not been seen to work with."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    is_zero = type(optimizer) is DeepSpeedZeroOptimizer
    features = {
        f"stage {stage} with {type(optimizer).__name__}": not is_zero and optimizer is not engine.basic_optimizer,
        "an offloaded optimizer": is_zero and optimizer.cpu_offload,
        "master weights in half precision": is_zero and optimizer.low_precision_master_weights_and_grads,
        "mixture-of-experts layers": engine.has_moe_layers,
        "tensor parallelism of its own": engine.autotp_size() > 1,
        "torch_autocast": engine.torch_autocast_enabled(),
        "an optimizer that averages by itself": not engine.enable_backward_allreduce,
        "managed_gradient_accumulation off": not engine.managed_gradient_accumulation(),
    }
    for feature in (name for name, is_used in features.items() if is_used):
        raise NotImplementedError(
            f"deepspeed: two passes do not work with {feature}; use ZeRO stage 1 or 2 without it, as "
            "configs/accelerate/deepspeed_zero2.yaml does, stage 0 in float32, or FSDP2."
        )
