"""DeepSpeed under the Trainer: its step waits for the second pass, and what of it cannot work is refused.

Accelerate's `backward` ends in the engine's `step`, once the last micro-batch of a window has come. Here it leaves the
reduced gradient where the step reads it, two passes later the descent gradient stands there, and then the step runs:
clipping, overflow under fp16, ZeRO's gathering of the weights and the learning rate are the engine's as ever.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from accelerate.utils import DistributedType, compare_versions
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor

from ..rules.space import ParameterSpace
from .host import READ_IN


class DeferredStep(DeepSpeedEngineWrapper):
    """Accelerate's handle on the engine, whose `backward` takes no step.

    Args:
        engine: DeepSpeed's.
        optimizer: what the Trainer calls its optimizer, which tells it of steps that were skipped.
    """

    def __init__(self, engine: Any, optimizer: Any):
        super().__init__(engine)
        # Without ZeRO the optimizer is torch's, whose skipped steps Accelerate does not look for.
        optimizer.__has_overflow__ = True
        engine.optimizer.overflow = False

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """As Accelerate's, without the step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    @property
    def loss_scale(self) -> float | None:
        """What the engine multiplies losses by before their backward; None where it does not."""
        return self.engine.optimizer.loss_scale if self.engine.fp16_enabled() else None

    def take(self, skipped: Tensor, space: ParameterSpace) -> None:
        """Step along the gradient that stands there; where a step is `skipped`, weights and learning rate stay.

        Under fp16 the engine finds by itself that the gradient is not finite, and lowers its loss scale.
        """
        if self.engine.fp16_enabled():
            self.engine.step()
            return
        self.engine.optimizer.overflow = bool(skipped)
        if self.engine.optimizer.overflow:
            space.clear_grads()
        else:
            self.engine.step()


def deferred_step(trainer: Any) -> DeferredStep | None:
    """Let the step of the Trainer's engine wait; None where there is no DeepSpeed."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    accelerator.deepspeed_engine_wrapped = DeferredStep(accelerator.deepspeed_engine_wrapped.engine, trainer.optimizer)
    return accelerator.deepspeed_engine_wrapped


def refuse_deepspeed(trainer: Any) -> None:
    """Refuse what two passes do not work with, as far as it is known before the engine is made.

    Raises:
        NotImplementedError: for an older DeepSpeed, ZeRO 3, sequence parallelism, and `suggest_rho`.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        for said in _refusals(trainer.args, trainer.accelerator):
            raise NotImplementedError(said)


def _refusals(args: Any, accelerator: Any) -> Iterator[str]:
    oldest, instead = READ_IN["deepspeed"], "use FSDP2: configs/accelerate/fsdp2.yaml."
    stage, parallelism = accelerator.deepspeed_plugin.zero_stage, accelerator.parallelism_config
    if compare_versions("deepspeed", "<", oldest):
        found = importlib.metadata.version("deepspeed")
        yield (
            f"optim={args.optim} reads gradients of DeepSpeed {oldest}, and this is {found}; "
            f"`pip install 'deepspeed>={oldest}'`, or {instead}"
        )
    if stage > 2:
        yield (
            f"optim={args.optim} does not support ZeRO stage {stage}, whose weights are gathered layer by layer; set "
            f"stage 2, as configs/accelerate/deepspeed_zero2.yaml does, or {instead}"
        )
    if parallelism is not None and parallelism.sp_enabled:
        yield (
            f"optim={args.optim} does not support DeepSpeed's sequence parallelism (sp_size={parallelism.sp_size}); "
            "leave it out, and use gradient_checkpointing for long sequences."
        )
    if args.suggest_rho:
        yield (
            "suggest_rho: it takes plain steps that it undoes, which DeepSpeed's engine does not; measure rho in one "
            "process (`hf-ssam rho`, or a short run without DeepSpeed), and pass rho=…."
        )
