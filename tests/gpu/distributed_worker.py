"""Scenarios for GPUs: `accelerate launch … distributed_worker.py FOLDER NAME`; every rank leaves NAME.rankR.pt."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from hf_ssam import SSAMTrainer
from tests.distributed.scenarios import outcome, ran, ran_stock, whole
from tests.support.cases import Case, MendedTrainer, case_arguments, gpt2, image_data, lm_data, resnet, trained

SSAM = Case("ssam")
CARD = {"use_cpu": not torch.cuda.is_available(), "max_steps": 5, "bf16": False}


def llama() -> LlamaForCausalLM:
    """A Llama of two layers; its class says which layers FSDP2 wraps."""
    set_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, num_key_value_heads=2, **sizes))


def on_host(value: Any) -> Any:
    """`value` whole and on the CPU."""
    if isinstance(value, torch.Tensor):
        return whole(value).cpu()
    if isinstance(value, dict):
        return {k: on_host(v) for k, v in value.items()}
    return value


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and buffers of the model that trained, without the wrapper's prefix."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return on_host(model.state_dict())


def sharded(case: Case, size: int, **given: Any) -> dict[str, Any]:
    """A run of `llama` with `size` rows a process."""
    args = case_arguments(case, **{**CARD, "per_device_train_batch_size": size, **given})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trained(llama(), args, lm_data())
    lost = [str(w.message) for w in caught if "is below what" in str(w.message)]
    return {"weights": weights_of(trainer), "log": trainer.state.log_history, "lost": lost}


def context(case: Case) -> dict[str, Any]:
    """A run of `llama` on rows of one length without a mask, as context parallelism asks for."""
    full = [{name: row["input_ids"].clamp(min=1) for name in ("input_ids", "labels")} for row in lm_data()]
    args = case_arguments(case, **{**CARD, "per_device_train_batch_size": 4})
    return {"weights": weights_of(trained(llama(), args, full))}


def shared(folder: Path) -> dict[str, Any]:
    """Four steps, and two and a resumption for two more, with a method that has a state."""
    given = {**CARD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    case = Case("friendly_sam")
    straight = trained(llama(), case_arguments(case, output_dir=str(folder / "whole"), **given), lm_data())
    args = case_arguments(case, output_dir=str(folder / "again"), **given)
    again = SSAMTrainer(model=llama(), args=args, train_dataset=lm_data())
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return {"whole": {"weights": weights_of(straight)}, "halves": {"weights": weights_of(again)}}


def half() -> dict[str, Any]:
    """Twenty steps in fp16; a loss scale that the first gradients do not fit in is halved until they do."""
    args = case_arguments(SSAM, **{**CARD, "max_steps": 20, "per_device_train_batch_size": 4})
    trainer = trained(llama(), args, lm_data())
    counts = {"steps": trainer.state.global_step, "scheduled": trainer.lr_scheduler.last_epoch}
    return {"weights": weights_of(trainer), "log": trainer.state.log_history, **counts}


def narrow() -> dict[str, str]:
    args = case_arguments(SSAM, ascent_scope="rank", **CARD)
    trainer = SSAMTrainer(model=llama(), args=args, train_dataset=lm_data())
    with pytest.raises(ValueError) as error:
        trainer.train()
    return {"said": str(error.value)}


def sync_resnet() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(resnet())


def sync_batch_norm() -> dict[str, Any]:
    given = {**CARD, "max_steps": 3, "per_device_train_batch_size": 4}
    model = sync_resnet()
    real = outcome(trained(model, case_arguments(SSAM, **given), image_data()))
    stock = ran_stock(sync_resnet(), image_data(), MendedTrainer, optim="sgd", **given)
    tiny = ran(Case("sam", rho=1e-30), sync_resnet(), image_data(), **given)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {**real, "kinds": kinds, "stock": stock["weights"], "tiny": tiny["weights"]}


def scenario(name: str, folder: Path) -> Callable[[], dict[str, Any]]:
    """The scenario called `name`; what follows a dash is its scope, method or number of ranks."""
    kind, *rest = name.split("-")
    return {
        "ddp": lambda: ran(SSAM, gpt2(0.1), lm_data(), ascent_scope=rest[0], **CARD),
        "whole": lambda: ran(SSAM, gpt2(), lm_data(), per_device_train_batch_size=8, **CARD),
        "halves": lambda: ran(SSAM, gpt2(), lm_data(), per_device_train_batch_size=4, **CARD),
        "plain": lambda: sharded(Case(rest[0]), 4 * int(rest[1])),
        "shards": lambda: sharded(Case(rest[0]), 4),
        "context": lambda: context(Case("ssam", rho=float(rest[0]))),
        "resumed": lambda: shared(folder),
        "half": half,
        "narrow": narrow,
        "sync_batch_norm": sync_batch_norm,
    }[kind]


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    result = on_host(scenario(name, folder)())
    torch.save(result, folder / f"{name}.rank{PartialState().process_index}.pt")
