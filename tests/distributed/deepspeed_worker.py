"""Scenarios under DeepSpeed on the CPU; two ranks of their own run them, since it marks the process that it is in."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_ssam import SSAMTrainer
from tests.distributed.fsdp2_worker import lora
from tests.distributed.launching import Scenario, main
from tests.distributed.scenarios import SpoiledSecondPass, SpoiledTrainer, whole
from tests.support.cases import (
    MAIN_CASES,
    Case,
    MendedTrainer,
    arguments,
    bert,
    case_arguments,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)

SSAM, SAM = Case("ssam"), Case("sam")
STAGES = (0, 1, 2)
WHOLE_BATCHES = (*MAIN_CASES, Case("momentum_sam"), Case("stale_sam"))
SELECTING = (Case("esam"), Case("ausam"))
ADAMW = {"base_optim": "adamw_torch", "weight_decay": 0.1}
SAME = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Arguments of a run under DeepSpeed; small buckets, so that a backward fills several."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 600}, **dict.fromkeys(names, "auto"), **more}
    return {"deepspeed": config, "use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def masters(trainer: Trainer) -> list[Tensor]:
    """This rank's partitions of the float32 weights; without ZeRO there are none."""
    engine = trainer.model_wrapped
    kept = engine.optimizer.single_partition_of_fp32_groups if engine.zero_optimization_stage() else []
    return [t.detach().clone() for t in kept]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a run left: weights, this rank's part of the optimizer's state, generator, log, scheduler."""
    return {
        "weights": weights(trainer.model),
        "masters": masters(trainer),
        "optimizer": whole(trainer.model_wrapped.basic_optimizer.state_dict()["state"]),
        "rng": torch.get_rng_state(),
        "log": [
            {k: v for k, v in entry.items() if "_runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
        ],
        "scheduled": trainer.lr_scheduler.last_epoch,
    }


def ran(stage: int, case: Case, model: nn.Module, data: list, cls: type = SSAMTrainer, **given: Any) -> dict[str, Any]:
    return outcome(trained(model, case_arguments(case, **zero(stage), **given), data, cls))


def stock(stage: int, model: nn.Module, data: list, cls: type, **given: Any) -> dict[str, Any]:
    return outcome(trained(model, arguments(TrainingArguments, **zero(stage), **given), data, cls))


MODELS = {"bert": (bert, text_data, MendedTrainer), "gpt2": (partial(gpt2, 0.1), lm_data, Trainer)}
"""A model, its data, and the stock Trainer to compare with."""


def law1(stage: int, model: str, folder: Path) -> dict[str, Any]:
    """The stock Trainer, rho 0 in one pass, and rho 1e-30 in two, with dropout on."""
    build, data, cls = MODELS[model]
    return {
        "stock": stock(stage, build(), data(), cls, optim="adamw_torch", **SAME),
        "ssam": ran(stage, Case("ssam", rho=0.0), build(), data(), base_optim="adamw_torch", **SAME),
        "sam": ran(stage, Case("sam", rho=1e-30), build(), data(), base_optim="adamw_torch", **SAME),
    }


class Stumbling(SSAMTrainer):
    """Breaks off the second pass of its second step, looks at what that left, and takes the step once more.

    Attributes:
        stumbles: the step, from 0.
        found, left: weights and master weights before that step and after it broke.
    """

    stumbles = 1
    found: tuple[dict[str, Tensor], list[Tensor]]
    left: tuple[dict[str, Tensor], list[Tensor]]
    _passes = 0
    _breaks = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == self.stumbles:
            self._passes, self._breaks = 0, True
            self.found = weights(self.model), masters(self)
            with pytest.raises(KeyError, match="second pass"):
                super().training_step(model, {**inputs}, num_items_in_batch)
            self.left = weights(self.model), masters(self)
            self._breaks = False
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._passes += 1
        if self._breaks and self._passes == 2:
            raise KeyError("second pass")
        return super().compute_loss(model, inputs, *args, **kwargs)


class Sure(Stumbling):
    """Never does."""

    stumbles = -1


def broken(stage: int, folder: Path) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 4, "max_steps": 3, **ADAMW}
    args = case_arguments(SSAM, **zero(stage), **given)
    stumbled = trained(bert(0.0), args, text_data(), Stumbling)
    smooth = ran(stage, SSAM, bert(0.0), text_data(), Sure, **given)
    return {"found": stumbled.found, "left": stumbled.left, "stumbled": outcome(stumbled), "smooth": smooth}


def resumed(stage: int, case: Case, folder: Path) -> dict[str, Any]:
    """The outcome of 4 steps, as `whole`, and of 2 and a resumption for 2 more, as `halves`."""
    given = {**ADAMW, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rho_scheduler_type": "linear"}
    given |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    straight = outcome(
        trained(bert(), case_arguments(case, output_dir=str(folder / "whole"), **zero(stage), **given), text_data())
    )
    args = case_arguments(case, output_dir=str(folder / "again"), **zero(stage), **given)
    again = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return {"whole": straight, "halves": outcome(again)}


def state(stage: int, folder: Path) -> dict[str, Any]:
    """What a method keeps, as a checkpoint has it."""
    args = case_arguments(Case("friendly_sam"), **zero(stage), per_device_train_batch_size=4, max_steps=4)
    return trained(bert(0.0), args, text_data()).two_pass.state_dict()["memory"]


def refusal(make: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        make()
    return str(error.value)


def refused(folder: Path) -> dict[str, str]:
    """What is said of each thing that does not work."""

    def run(stage: int, case: Case = SSAM, config: dict[str, Any] | None = None, **given: Any) -> Any:
        return lambda: trained(bert(), case_arguments(case, **zero(stage, **(config or {})), **given), text_data())

    offload = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    return {
        "stage": refusal(run(3), NotImplementedError),
        "offload": refusal(run(2, config=offload), NotImplementedError),
        "suggest_rho": refusal(run(2, suggest_rho=True), NotImplementedError),
        "scope/0": refusal(run(0, ascent_scope="rank"), ValueError),
        "scope/2": refusal(run(2, ascent_scope="micro_batch"), ValueError),
        "rows": refusal(run(1, Case("random_perturbation")), ValueError),
        "samples": refusal(run(0, Case("sparse_sam", {"mask": "fisher"})), ValueError),
    }


SCENARIOS: dict[str, Scenario] = {
    **{f"law1/{stage}/{model}": partial(law1, stage, model) for stage in STAGES for model in MODELS},
    **{
        f"mean/{stage}/{case.id}": lambda folder, s=stage, c=case: ran(
            s, c, bert(0.0), text_data(), per_device_train_batch_size=4, max_steps=8
        )
        for stage in STAGES
        for case in WHOLE_BATCHES
    },
    **{
        f"selecting/{stage}/{case.id}": lambda folder, s=stage, c=case: ran(
            s, c, bert(0.0), text_data(), per_device_train_batch_size=4, max_steps=8
        )
        for stage in STAGES
        for case in SELECTING
    },
    **{
        f"items/{stage}/{case.id}": lambda folder, s=stage, c=case: ran(
            s, c, gpt2(), lm_data(60), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=8
        )
        for stage in STAGES
        for case in MAIN_CASES
    },
    **{
        f"norm/{stage}": lambda folder, s=stage: ran(
            s, SSAM, bert(0.0), text_data(), perturb="norm", per_device_train_batch_size=4, max_steps=8
        )
        for stage in STAGES
    },
    **{
        f"lora/{stage}": lambda folder, s=stage: ran(
            s, SSAM, lora(bert(0.0)), text_data(), per_device_train_batch_size=4, max_steps=8
        )
        for stage in STAGES
    },
    **{
        f"spoiled/{stage}/{cls.__name__}": lambda folder, s=stage, k=cls: ran(
            s, SSAM, bert(), text_data(), k, per_device_train_batch_size=4, max_steps=5, **ADAMW
        )
        for stage in STAGES
        for cls in (SpoiledTrainer, SpoiledSecondPass)
    },
    **{f"broken/{stage}": partial(broken, stage) for stage in STAGES},
    **{
        f"resume/{stage}/{case.id}": partial(resumed, stage, case)
        for stage in STAGES
        for case in (SSAM, Case("friendly_sam"), Case("looksam", {"k": 2}))
    },
    **{f"state/{stage}": partial(state, stage) for stage in STAGES},
    "refused": refused,
}

if __name__ == "__main__":
    # Its collectives in shared memory would be compiled here, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    main(SCENARIOS)
