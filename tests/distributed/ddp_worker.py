"""Scenarios under DistributedDataParallel; run by `worker.py`, or alone under `accelerate launch`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from hf_ssam import SSAMTrainer, TwoPass, get_method
from hf_ssam.methods import Method, Rules
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.tensors import Vector
from tests.distributed.launching import Scenario, main
from tests.distributed.loops import narrow, own_batches, squared
from tests.distributed.scenarios import (
    SCOPES,
    RecordingTrainer,
    SpoiledSecondPass,
    SpoiledTrainer,
    base_optimizers,
    outcome,
    over,
    ran,
    ran_stock,
    resumed,
    works,
)
from tests.support.cases import (
    CASES,
    MAIN_CASES,
    Case,
    MendedTrainer,
    bert,
    case_arguments,
    gpt2,
    image_data,
    lm_data,
    resnet,
    text_data,
    trained,
    weights,
)
from tests.support.sample_ids import LOADERS, ausam

SSAM, SAM = Case("ssam"), Case("sam")
ADAMW = {"base_optim": "adamw_torch", "weight_decay": 0.1}
SAME = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1}


def shards(case: Case, scope: str) -> dict[str, Any]:
    """Float64, and the micro-batches that this rank saw."""
    args = case_arguments(
        case,
        ascent_scope=scope,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=3,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer = trained(gpt2().double(), args, lm_data(), RecordingTrainer)
    return {**outcome(trainer), "windows": trainer.windows}


def traffic(scope: str, folder: Path) -> dict[str, Any]:
    """Bytes that the all-reduces of a step carry."""
    model = bert(dropout=0.0)
    args = case_arguments(SSAM, ascent_scope=scope, per_device_train_batch_size=4, max_steps=1, logging_strategy="no")
    trainer = SSAMTrainer(model=model, args=args, train_dataset=text_data())
    trainer.train()  # DDP broadcasts weights and rebuilds its buckets in the first steps of its life
    step, sizes = trainer.training_step, []

    def profiled(*given: Any) -> Any:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            loss = step(*given)
        events = [e for e in trace.events() if e.name == "gloo:all_reduce"]
        sizes.append([sum(torch.Size(s).numel() * 4 for s in e.input_shapes) for e in events])
        return loss

    trainer.training_step = profiled
    trainer.args.max_steps = 3
    trainer.train()
    return {"steps": sizes, "gradient": sum(p.numel() * 4 for p in model.parameters())}


class Forked(nn.Module):
    """A parameter that all ranks use, one that only rank 0 uses, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.first, self.none = (nn.Parameter(torch.randn(5)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.all
        return (y * self.first if dist.get_rank() == 0 else y).square().mean()


def loop(
    model: nn.Module,
    scope: str,
    wrap: dict[str, Any],
    method: str | Method = "ssam",
    micro: int = 2,
    steps: int = 6,
    rho: float = 0.1,
) -> dict[str, Any]:
    """A plain loop: AdamW, `micro` micro-batches a step, other data on each rank."""
    ddp = DistributedDataParallel(model, **wrap)
    two_pass = TwoPass(ddp, method, rho, scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    generator = torch.Generator().manual_seed(dist.get_rank())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(steps):
        batches = [torch.randn(3, 5, generator=generator) for _ in range(micro)]

        def forward_backward(x: torch.Tensor) -> torch.Tensor:
            loss = ddp(x).square().mean() / micro
            loss.backward()
            return loss

        two_pass.step([partial(forward_backward, x) for x in batches])
        optimizer.step()
        optimizer.zero_grad()
    return {
        "before": before,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "states": {n: p in optimizer.state for n, p in model.named_parameters()},
    }


def forked(scope: str, folder: Path) -> dict[str, Any]:
    return loop(Forked(), scope, {"find_unused_parameters": True})


def uneven(folder: Path) -> dict[str, Any]:
    """Steps of one micro-batch on rank 0 and of two on rank 1; in the second step one of rank 1's is not finite."""
    model = narrow()
    called, skipped, weights = DistributedDataParallel(model), [], []
    two_pass = TwoPass(called, "ssam", 0.1, scope="micro_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        xs = own_batches(step, dist.get_rank())
        report = two_pass.step([partial(squared, called, x, len(xs)) for x in xs])
        skipped.append(bool(report.skipped))
        if not report.skipped:
            optimizer.step()
        optimizer.zero_grad()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return {"skipped": skipped, "weights": weights}


def joined(folder: Path) -> str:
    """What is said under `join`, where a rank that has no batch left shadows the passes of the others."""
    model = DistributedDataParallel(narrow())
    two_pass = TwoPass(model, "ssam", 0.1)
    with model.join(), pytest.raises(ValueError) as error:
        two_pass.step(partial(squared, model, own_batches(0, 0)[0], 1))
    return str(error.value)


def keeping(v: Vector, at: StepContext) -> Vector:
    """A descent that reads the first gradient: the mean of both."""
    return {n: (t + at.g[n]) / 2 for n, t in v.items()}


def keeper() -> Method:
    """A method whose descent reads the first gradient."""
    method = get_method("sam")
    return replace(method, rules=lambda **_: Rules(method.build().ascent, keeping, keeps_gradient=True))


def views(scope: str, folder: Path) -> dict[str, Any]:
    """Gradients as views of DDP's buckets, and as tensors of their own; with unused parameters looked for, and not."""
    return {
        (name, view, unused): loop(
            narrow(), scope, {"gradient_as_bucket_view": view, "find_unused_parameters": unused}, method()
        )
        for name, method in (("usam", lambda: "usam"), ("ssam", lambda: "ssam"), ("keeper", keeper))
        for view in (False, True)
        for unused in (False, True)
    }


def static_graph(folder: Path) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 4, "max_steps": 4, "ddp_find_unused_parameters": False}
    return {s: ran(SSAM, bert(), text_data(), ddp_static_graph=s, **given) for s in (False, True)}


def evaluated(folder: Path) -> dict[str, Any]:
    args = case_arguments(
        SSAM, per_device_train_batch_size=4, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer = SSAMTrainer(model=bert(0.0), args=args, train_dataset=text_data(), eval_dataset=text_data(10, seed=3))
    trainer.train()
    return outcome(trainer)


def batch_norm(scope: str, folder: Path) -> dict[str, Any]:
    """ResNet: the stock Trainer, a radius too small to move a weight, and a real one, evaluating in between."""
    given = {"per_device_train_batch_size": 4, "max_steps": 3, "gradient_accumulation_steps": 2}
    stock = {"optim": "sgd", **given}
    return {
        "stock": ran_stock(resnet(), image_data(), MendedTrainer, **stock),
        "tiny": ran(Case("sam", rho=1e-30), resnet(), image_data(), ascent_scope=scope, **given),
        "real": ran(SSAM, resnet(), image_data(), ascent_scope=scope, **given),
    }


def told_of_samples(loader: dict[str, bool], folder: Path) -> dict[str, Any]:
    """Which samples each micro-batch was told that it holds, and what it holds."""
    groups = len(dist.distributed_c10d._world.pg_map)
    trainer = ausam(accelerator_config=loader, per_device_train_batch_size=4)
    seen = {"ids": trainer.ids, "rows": trainer.rows, "weights": weights(trainer.model)}
    return {**seen, "new_groups": len(dist.distributed_c10d._world.pg_map) - groups}


def told_beside_nccl(folder: Path) -> dict[str, Any]:
    """The same where the ranks' group is said to move no host memory, as NCCL's: the hosts get one of their own."""
    with patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        return told_of_samples({}, folder)


SCENARIOS: dict[str, Scenario] = {
    **{
        f"equal/{scope}/{case.id}/{optim}": lambda folder, s=scope, c=case, o=optim: ran(
            c,
            bert(),
            text_data(),
            ascent_scope=s,
            **over(o),
            max_steps=20,
            per_device_train_batch_size=4,
            logging_steps=10,
        )
        for scope in SCOPES
        for case in MAIN_CASES
        for optim in base_optimizers(case)
        if works(case, scope)
    },
    **{
        f"mean/{case.id}": lambda folder, c=case: ran(
            c, bert(0.0), text_data(), per_device_train_batch_size=4, max_steps=10
        )
        for case in MAIN_CASES
    },
    **{
        f"items/{case.id}": lambda folder, c=case: ran(
            c, gpt2(), lm_data(60), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=10
        )
        for case in MAIN_CASES
    },
    "stock/bert": lambda folder: ran_stock(bert(), text_data(), MendedTrainer, optim="adamw_torch", **SAME),
    "stock/gpt2": lambda folder: ran_stock(gpt2(0.1), lm_data(), optim="adamw_torch", **SAME),
    **{
        f"law1/{model}/{case.method}/{scope}": lambda folder, m=model, c=case, s=scope: ran(
            c,
            *((bert(), text_data()) if m == "bert" else (gpt2(0.1), lm_data())),
            ascent_scope=s,
            **{**SAME, "base_optim": "adamw_torch"},
        )
        for model in ("bert", "gpt2")
        for case in (Case("ssam", rho=0.0), Case("sam", rho=1e-30))
        for scope in SCOPES
    },
    **{
        f"shards/{scope}/{case.id}": lambda folder, c=case, s=scope: shards(c, s)
        for scope in SCOPES
        for case in CASES
        if works(case, scope)
    },
    **{f"traffic/{scope}": partial(traffic, scope) for scope in SCOPES},
    **{f"forked/{scope}": partial(forked, scope) for scope in SCOPES},
    **{f"views/{scope}": partial(views, scope) for scope in SCOPES},
    **{
        f"spoiled/{scope}/{cls.__name__}": lambda folder, s=scope, k=cls: ran(
            SSAM, bert(), text_data(), k, ascent_scope=s, per_device_train_batch_size=4, max_steps=5, **ADAMW
        )
        for scope in SCOPES
        for cls in (SpoiledTrainer, SpoiledSecondPass)
    },
    "uneven": uneven,
    "joined": joined,
    "static_graph": static_graph,
    "evaluated": evaluated,
    **{f"sample_ids/{name}": partial(told_of_samples, loader) for name, loader in LOADERS.items()},
    "sample_ids/beside nccl": told_beside_nccl,
    **{f"batch_norm/{scope}": partial(batch_norm, scope) for scope in SCOPES},
    **{
        f"resume/{scope}": lambda folder, s=scope: resumed(
            SSAM,
            bert,
            text_data(),
            folder,
            ascent_scope=s,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **ADAMW,
        )
        for scope in SCOPES
    },
    "resume/vectors": lambda folder: resumed(
        Case("friendly_sam"), bert, text_data(), folder, per_device_train_batch_size=4, **ADAMW
    ),
}

if __name__ == "__main__":
    main(SCENARIOS)
