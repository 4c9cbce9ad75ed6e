"""Low-rank adapters by flags, through peft."""

from dataclasses import dataclass, field
from typing import Any

from .cli import UsageError


@dataclass
class LoraArguments:
    """Train low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in place of all weights."""

    lora_r: int = field(default=0, metadata={"help": "Rank of the adapters; 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get one; every linear layer but the head if not given."},
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise ValueError(f"--lora_r {self.lora_r} is not a rank: give 0 to train all weights, or one from 1")


def adapter(lora: LoraArguments) -> Any | None:
    """What peft calls a `LoraConfig` for a causal language model, or None where all weights train.

    Raises:
        UsageError: peft is not installed.
    """
    if not lora.lora_r:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError("--lora_r needs peft: pip install -c constraints.txt peft, or give --lora_r 0") from error
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
