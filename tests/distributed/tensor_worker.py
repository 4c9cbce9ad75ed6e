"""Scenarios on a model whose layers two ranks split between them (tensor parallelism), under the Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, set_seed
from transformers.distributed import DistributedConfig

from tests.distributed.launching import WORLD, Scenario
from tests.distributed.scenarios import ran, ran_stock
from tests.support.cases import Case, lm_data

SAME = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def llama() -> LlamaForCausalLM:
    """A Llama of two layers; its class says how its layers are split."""
    set_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, num_key_value_heads=2, **sizes))


def split(folder: Path) -> PreTrainedModel:
    """The same, saved and loaded in halves."""
    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "model")
    dist.barrier()
    config = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=config)
    assert any(isinstance(p, DTensor) and p.to_local().shape != p.shape for p in model.parameters())
    return model


def on_devices() -> dict[str, Any]:
    """Arguments under which Accelerate takes the ranks for devices: for those alone it allows tensor parallelism."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}


def equal(case: Case, optim: str, folder: Path) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 8, "base_optim": optim}
    return ran(case, split(folder), lm_data(60), **given, **on_devices())


def law1(folder: Path) -> dict[str, Any]:
    """The stock Trainer, rho 0 in one pass, and rho 1e-30 in two."""
    found = {
        "stock": ran_stock(split(folder / "stock"), lm_data(), Trainer, optim="adamw_torch", **SAME, **on_devices())
    }
    for case in (Case("ssam", rho=0.0), Case("sam", rho=1e-30)):
        given = {**SAME, "base_optim": "adamw_torch", **on_devices()}
        found[case.method] = ran(case, split(folder / case.method), lm_data(), **given)
    return found


CASES = (Case("ssam"), Case("sam"), Case("asam", rho=0.5), Case("friendly_sam"))
SCENARIOS: dict[str, Scenario] = {
    **{f"equal/{c.id}/{optim}": partial(equal, c, optim) for c in CASES for optim in ("sgd", "adamw_torch")},
    "law1": law1,
}
