"""Finds a model's LoRA layers and lets a method's rule on them have its part in the passes of a step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..methods.method import Rules
from ..rules.adapters import AdapterRule
from ..rules.context import Clock, StepContext
from ..rules.space import ParameterSpace
from ..rules.tensors import Vector
from .parameters import stable_name
from .ranks import Ranks

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_QUANTIZED = ("Linear4bit", "Linear8bitLt")


class LoraLayer:
    """A layer of PEFT's LoRA with its one active adapter; see `rules.adapters.AdapterLayer`.

    Args:
        name: of the layer.
        module: PEFT's.
        adapter: name of the active adapter.
        names: of A and B among the trained parameters.
    """

    def __init__(self, name: str, module: Any, adapter: str, names: tuple[str, str]):
        self.name, self.module, self._adapter = name, module, adapter
        self.A, self.B = names
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def scaling(self) -> float:
        """s."""
        return self.module.scaling[self._adapter]

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.module.get_base_layer()

    @property
    def is_shown(self) -> bool:
        """Whether a call now is of the model that trains, not of a reference without, or with another, adapter."""
        module = self.module
        return not module.disable_adapters and not module.merged and module.active_adapters == [self._adapter]

    def weight(self) -> Tensor:
        """W, shape (out, in)."""
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(self.base).detach()
        return weight.T if isinstance(self.base, Conv1D) else weight

    def bias(self) -> Tensor | None:
        """b, shape (out,)."""
        return self.base.bias

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are."""
        a, b = self.module.lora_A[self._adapter].weight, self.module.lora_B[self._adapter].weight
        return a.detach(), b.detach()


class Adapters:
    """One method's rule on the LoRA layers of one model.

    Args:
        rule: the method's.
        layers: the model's.
        ranks: how gradients are averaged.
        method: its name, for what is refused.
    """

    def __init__(self, rule: AdapterRule, layers: list[LoraLayer], ranks: Ranks, method: str):
        self._rule, self._layers, self._ranks, self._method = rule, layers, ranks, method
        rule.layers = layers
        outputs = [functools.partial(rule.output, index) for index in range(len(layers))]
        pairs = zip(layers, outputs, strict=True) if rule.replaces_output else ()
        self._replacements = [_Replacement(layer, output) for layer, output in pairs]

    def begin(self, context: StepContext, clock: Clock) -> None:
        """A step begins.

        Raises:
            ValueError: if the rule needs the learning rate and the host has not said it.
        """
        if self._rule.needs_lr and clock.lr is None:
            raise ValueError(
                f"clock.lr: method `{self._method}` scales by the learning rate; set `two_pass.clock.lr = "
                "optimizer.param_groups[0]['lr']` before each step (a Trainer does)."
            )
        self._rule.begin(context)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """A pass of the step: the frozen layers' outputs are the rule's."""
        for replacement in self._replacements:
            replacement.install()
        try:
            yield
        finally:
            for replacement in self._replacements:
                replacement.remove()

    def finish(self, g: Vector, context: StepContext, finite: Tensor, inverse_unit: float | Tensor) -> Any:
        """The step's gradient is final; returns the length of the perturbation."""

        def average(tensors: list[Tensor]) -> None:
            self._ranks.average_over_data(tensors)
            for t in tensors:
                t.mul_(inverse_unit.to(t.device) if isinstance(inverse_unit, Tensor) else inverse_unit)

        return self._rule.finish(g, context, finite, average)


class _Replacement:
    """Lets `output` answer for a frozen layer, while the layer's own adapter is the active one.

    One function for the whole of a run: a compiler would take another one for another model.
    """

    def __init__(self, layer: LoraLayer, output: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]):
        self._attributes, plain = vars(layer.base), layer.base.forward
        self._own = {"forward": plain} if "forward" in self._attributes else {}

        @torch.compiler.disable
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not layer.is_shown or args or kwargs:
                return plain(x, *args, **kwargs)
            return output(x, plain)

        self._forward = forward

    def install(self) -> None:
        """From now on."""
        self._attributes["forward"] = self._forward

    def remove(self) -> None:
        """The frozen layer answers for itself again."""
        self._attributes.pop("forward", None)
        self._attributes.update(self._own)


def adapters_of(
    rules: Rules, model: nn.Module, ranks: Ranks, perturbed: Collection[str], method: str, total_steps: int | None
) -> Adapters | None:
    """What carries out the rule of a method on adapters; None for all other methods.

    Raises:
        ValueError: if the model's adapters are not what the rule works with, or the run's length is asked for and not
            known.
    """
    if rules.adapter is None:
        return None
    rule = rules.adapter()
    if rule.needs_length and total_steps is None:
        raise ValueError(
            f"total_steps: method `{method}` changes over the run and needs its length; pass total_steps=…."
        )
    layers = [layer for layer in lora_layers(model, ranks.space, method) if {layer.A, layer.B} <= {*perturbed}]
    if not layers:
        raise ValueError(
            f"perturb: it names A and B of no LoRA layer, which method `{method}` works on; choose `all`."
        )
    for layer in layers:
        if rule.replaces_output:
            _check_replaceable(layer, method)
        if rule.reads_weight:
            _check_whole(layer, method)
    return Adapters(rule, layers, ranks, method)


def lora_layers(model: nn.Module, space: ParameterSpace, method: str) -> list[LoraLayer]:
    """The model's LoRA layers.

    Raises:
        ValueError: if there are none, several adapters are active on one, or one does not train both of its factors.
    """
    names = {id(p): n for n, p in space.params.items()}
    found = []
    for name, module in _modules_with_lora(model):
        if len(module.active_adapters) != 1:
            raise ValueError(
                f"model: `{name}` has {len(module.active_adapters)} active adapters and method `{method}` works on "
                "one; activate one with `model.set_adapter(name)`."
            )
        adapter = module.active_adapters[0]
        factors = _factors(module, adapter)
        if factors is None:
            continue
        if any(id(p) not in names for p in factors):
            raise ValueError(
                f"model: method `{method}` works on both factors of LoRA and one of `{name}` does not train; let A "
                "and B require gradients, or choose another method, such as ssam."
            )
        found.append(LoraLayer(name, module, adapter, (names[id(factors[0])], names[id(factors[1])])))
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no LoRA layer, which method `{method}` works on; add one with "
            "`get_peft_model(model, LoraConfig(task_type=…))` or --lora_r 8, or choose another method, such as ssam."
        )
    return found


def _modules_with_lora(model: nn.Module) -> Iterator[tuple[str, Any]]:
    try:
        from peft.tuners.lora import LoraLayer as PeftLayer
    except ImportError:
        return
    yield from ((stable_name(n), m) for n, m in model.named_modules() if isinstance(m, PeftLayer))


def _factors(module: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """A and B of `adapter`, whichever kind of layer it is on."""
    for first, second in _FACTORS:
        a, b = getattr(module, first), getattr(module, second)
        if adapter in a:
            return tuple(t[adapter] if isinstance(t[adapter], nn.Parameter) else t[adapter].weight for t in (a, b))
    return None


def _check_replaceable(layer: LoraLayer, method: str) -> None:
    """Refuse a layer whose merged weight is not W + s B A with W frozen."""
    base, kind = layer.base, type(layer.base).__name__
    variant = layer.module.lora_variant.get(layer._adapter)
    if variant is not None:
        raise ValueError(
            f"model: `{layer.name}` is LoRA of the kind {type(variant).__name__} and method `{method}` knows plain "
            "LoRA; set use_dora=False (and no other variant) in the LoraConfig, or choose nbar or ssam."
        )
    if not isinstance(base, nn.Linear | Conv1D) and kind not in _QUANTIZED:
        raise ValueError(
            f"model: `{layer.name}` is LoRA on a {kind} and method `{method}` works on linear layers (plain, or of "
            "bitsandbytes); leave it out of target_modules, or choose nbar or ssam."
        )
    if base.weight.requires_grad:
        raise ValueError(
            f"model: the weight under the adapter `{layer.name}` trains and method `{method}` takes it as frozen; "
            "call `weight.requires_grad_(False)` on it."
        )


def _check_whole(layer: LoraLayer, method: str) -> None:
    """Refuse a frozen weight that no rank holds."""
    if isinstance(layer.base.weight, DTensor) or layer.base.weight.device.type == "meta":
        raise ValueError(
            f"model: `{layer.name}` is sharded or offloaded and method `{method}` needs its whole weight on each "
            "rank; train with DDP, or choose bi_lora, nbar or ssam."
        )
