"""Scenarios of the methods on LoRA, and of noise, in two processes; run by `worker.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.distributed.fsdp2_worker import lora, refused, sharded
from tests.distributed.launching import Scenario
from tests.distributed.scenarios import ran, resumed
from tests.support.cases import MAIN_ADAPTER_CASES, Case, bert, gpt2, lm_data, text_data

LORA_CASES = MAIN_ADAPTER_CASES
NOISE = Case("random_perturbation")


def adapted(dropout: float = 0.0) -> nn.Module:
    """LoRA over a GPT-2, B not zero, in float64."""
    torch.manual_seed(3)
    model = get_peft_model(gpt2(dropout), LoraConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model.double()


def model_of(case: Case) -> nn.Module:
    return gpt2().double() if case is NOISE else adapted()


def averaged(case: Case, folder: Path) -> dict[str, Any]:
    """Three steps of two micro-batches on each rank."""
    given = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6}
    return ran(case, model_of(case), lm_data(60), base_optim="adamw_torch", **given)


def on_shards(case: Case, folder: Path) -> dict[str, Any] | str:
    """Replicated adapters beside a sharded base."""
    model = lora(sharded(bert(0.0), folder))
    if case.method == "flat_lora":
        return refused(lambda: ran(case, model, text_data(), max_steps=2))
    return ran(case, model, text_data(), per_device_train_batch_size=8, max_steps=6)


def halves(case: Case, folder: Path) -> dict[str, Any]:
    build = gpt2 if case is NOISE else partial(adapted, 0.1)
    return resumed(case, build, lm_data(60), folder, base_optim="adamw_torch", per_device_train_batch_size=4)


SCENARIOS: dict[str, Scenario] = {
    **{f"averaged/{c.method}": partial(averaged, c) for c in (*LORA_CASES, NOISE)},
    **{f"resume/{c.method}": partial(halves, c) for c in (*LORA_CASES, NOISE)},
    **{f"sharded/{c.method}": partial(on_shards, c) for c in LORA_CASES},
}
