"""Scenarios on models sharded by FSDP2; run by `worker.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.trainer.checkpoints import STATE_FOLDER, load_state, save_state
from hf_ssam.trainer.vector_files import file_name
from tests.distributed.launching import WORLD, Scenario
from tests.distributed.loops import SETTINGS, batches, loop, narrow
from tests.distributed.scenarios import (
    SpoiledSecondPass,
    SpoiledTrainer,
    ran,
    ran_stock,
    whole,
)
from tests.support.cases import MAIN_CASES, Case, MendedTrainer, bert, case_arguments, gpt2, lm_data, text_data

SSAM = Case("ssam")
SAME = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
LORA = {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.0}


def sharded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model`, saved and loaded again in shards."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "model")
    dist.barrier()
    loaded = type(model).from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=WORLD))
    torch.manual_seed(dist.get_rank())
    return loaded


def lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Adapters of a known beginning, B included, on a frozen base."""
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(**LORA, **options))
    generator = torch.Generator().manual_seed(5)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    return adapted


def refused(build: Callable[[], Any]) -> str:
    """What is said when `build` is refused."""
    with pytest.raises(ValueError) as error:
        build()
    return str(error.value)


def narrow_scopes(folder: Path) -> dict[str, str]:
    """What the Trainer says of the scopes that shards cannot do, with and without adapters."""
    said = {}
    for adapters in (False, True):
        for scope in ("rank", "micro_batch"):
            model = sharded(bert(), folder)
            model = lora(model) if adapters else model
            trainer = SSAMTrainer(
                model=model, args=case_arguments(SSAM, ascent_scope=scope), train_dataset=text_data()
            )
            said[f"{scope}/{adapters}"] = refused(trainer.train)
    return said


def saving(folder: Path) -> str:
    """What the stock Trainer says of checkpoints to resume from."""
    args = case_arguments(SSAM, save_strategy="steps", save_steps=1)
    return refused(lambda: SSAMTrainer(model=sharded(bert(), folder), args=args, train_dataset=text_data()))


class Broken(Exception):
    """Raised by a second pass."""


class BrokenTrainer(SSAMTrainer):
    """Raises in the second pass of the second step, after its forward."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 8:
                raise Broken
        return loss


def broken(folder: Path) -> dict[str, Any]:
    """The weights as the second step found them, and as an exception in its last pass left them."""
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = ran(SSAM, sharded(bert(), folder), text_data(), max_steps=2, lr_scheduler_type="constant", **given)
    stopped = ran(SSAM, sharded(bert(), folder), text_data(), max_steps=1, lr_scheduler_type="constant", **given)
    model = sharded(bert(), folder)
    args = case_arguments(SSAM, max_steps=2, lr_scheduler_type="constant", **given)
    trainer = BrokenTrainer(model=model, args=args, train_dataset=text_data())
    trainer.model_accepts_loss_kwargs = False  # as the others are mended; a `compute_loss` of one's own is left alone
    with pytest.raises(Broken):
        trainer.train()
    left = whole({n: p.detach() for n, p in model.named_parameters()})
    return {"found": stopped["weights"], "left": left, "later": one["weights"]}


def shard_loop(wrapped: bool, folder: Path, **given: Any) -> dict[str, Any]:
    """A plain loop over a model with layers of odd sizes, sharded layer by layer, or replicated by DDP."""
    model = narrow()
    if wrapped:
        called: nn.Module = DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        called = fully_shard(model)
    two_pass = loop(called, model, batches(dist.get_rank(), 5, 2), **given)
    return {
        "weights": whole({n: p.detach() for n, p in model.named_parameters()}),
        "state": whole(two_pass.state_dict()),
        "two_pass": two_pass,
    }


def plain(folder: Path) -> dict[str, Any]:
    """Loops under FSDP2 and DDP, and loops under FSDP2 in which a pass is broken off and the step begun again."""
    found = {}
    for method in ("ssam", "usam", "asam", "friendly_sam"):
        for wrapped in (False, True):
            result = shard_loop(wrapped, folder, method=method)
            found[method, wrapped] = {k: result[k] for k in ("weights", "state")}
    for call in (5, 6, 7):
        result = shard_loop(False, folder, break_at=lambda calls, c=call: calls == c)
        found["broken", call] = result["weights"]
    return found


def states(folder: Path) -> dict[str, Any]:
    """A method's state: saved by two ranks to `two` and `again`; and `alone`, which one process saved, read by two."""
    mine = shard_loop(False, folder, method="friendly_sam")
    for name in ("two", "again", "spoiled"):
        save_state(folder / name, SETTINGS, mine["two_pass"].state_dict(), dist.get_rank() == 0, 10.0)
    space = mine["two_pass"].space
    if dist.get_rank() == 0:
        (folder / "spoiled" / STATE_FOLDER / file_name(1, WORLD)).unlink()
    dist.barrier()
    read = load_state(folder.parent / "alone", space.params)
    fresh = TwoPass(fully_shard(narrow()), "friendly_sam", 0.1)
    fresh.load_state_dict(load_state(folder.parent / "alone", fresh.space.params))
    return {
        "saved": mine["state"],
        "read": whole(read["memory"]),
        "taken": whole(fresh.state_dict()),
        "refused": refused(lambda: load_state(folder / "spoiled", space.params)),
        "layout": {n: str(t.placements) for n, t in read["memory"]["average"].items()},
    }


SCENARIOS: dict[str, Scenario] = {
    **{
        f"mean/{case.id}": lambda folder, c=case: ran(
            c, sharded(bert(0.0), folder), text_data(), per_device_train_batch_size=4, max_steps=10
        )
        for case in MAIN_CASES
    },
    **{
        f"items/{case.id}": lambda folder, c=case: ran(
            c,
            sharded(gpt2(), folder),
            lm_data(60),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=10,
        )
        for case in MAIN_CASES
    },
    "adamw": lambda folder: ran(
        SSAM,
        sharded(gpt2(), folder),
        lm_data(60),
        per_device_train_batch_size=6,
        max_steps=10,
        base_optim="adamw_torch",
    ),
    "stock/bert": lambda folder: ran_stock(
        sharded(bert(), folder), text_data(), MendedTrainer, optim="adamw_torch", **SAME
    ),
    "stock/gpt2": lambda folder: ran_stock(sharded(gpt2(0.1), folder), lm_data(), optim="adamw_torch", **SAME),
    "stock/lora": lambda folder: ran_stock(
        lora(sharded(bert(), folder), bias="lora_only"), text_data(), MendedTrainer, optim="adamw_torch", **SAME
    ),
    **{
        f"law1/{model}/{case.method}": lambda folder, m=model, c=case: ran(
            c,
            sharded(gpt2(0.1), folder)
            if m == "gpt2"
            else (lora(sharded(bert(), folder), bias="lora_only") if m == "lora" else sharded(bert(), folder)),
            lm_data() if m == "gpt2" else text_data(),
            **{**SAME, "base_optim": "adamw_torch"},
        )
        for model in ("bert", "gpt2", "lora")
        for case in (Case("ssam", rho=0.0), Case("sam", rho=1e-30))
    },
    **{
        f"lora/{bias}/{case.id}": lambda folder, c=case, b=bias: ran(
            c,
            lora(sharded(bert(0.0), folder), bias=b),
            text_data(),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=10,
        )
        for bias in ("none", "lora_only")
        for case in MAIN_CASES[:4]
    },
    **{
        f"spoiled/{kind}/{cls.__name__}": lambda folder, kind=kind, k=cls: ran(
            SSAM,
            lora(sharded(bert(), folder)) if kind == "lora" else sharded(bert(), folder),
            text_data(),
            k,
            per_device_train_batch_size=4,
            max_steps=5,
            base_optim="adamw_torch",
        )
        for kind in ("full", "lora")
        for cls in (SpoiledTrainer, SpoiledSecondPass)
    },
    "narrow_scopes": narrow_scopes,
    "saving": saving,
    "broken": broken,
    "plain": plain,
    "states": states,
}
