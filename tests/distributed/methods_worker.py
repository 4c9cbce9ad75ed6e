"""Every method in two processes: alone, under DDP and sharded by FSDP2, on the halves of the same batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_ssam import TwoPass
from hf_ssam.trainer.checkpoints import Settings, load_state, save_state
from tests.distributed.launching import Scenario
from tests.support.cases import CASES, ONE_PASS_CASES, Case

MASKS = (
    Case("sparse_sam", {"mask": "dynamic", "update_freq": 2}),
    Case("sparse_sam", {"num_samples": 16, "update_freq": 3}),
    Case("sparse_sam", {"num_samples": 16, "structure": "2:4"}),
    Case("sparse_sam", {"num_samples": 16, "structure": "tensor"}),
)
SELECTING = (Case("esam"), Case("esam", {"gamma": 1.0}), Case("ausam"))


class Classifier(nn.Module):
    """A float64 network that takes its labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp":
        fully_shard(model.net[0])
        return fully_shard(model)
    if kind == "tensor":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model, mesh, {"net.0": ColwiseParallel(), "net.2": RowwiseParallel()})
    if kind == "alone":
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=kind == "views")


def trained(case: Case, kind: str, scope: str = "global") -> tuple[nn.Module, TwoPass]:
    model = Classifier()
    call = wrapped(model, kind)
    engine = TwoPass(call, case.method, case.rho, scope=scope, dataset_size=128, **case.options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    for step in range(8):
        x, y = torch.randn(16, 4).double(), torch.randint(0, 3, (16,))
        mine = (
            torch.arange(16)
            if kind in ("alone", "tensor")
            else torch.arange(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
        )

        def run(indices=slice(None), x=x[mine], y=y[mine]):
            loss = call(x[indices], labels=y[indices])["loss"]
            loss.backward()
            return loss

        engine.step(run, samples=16 * step + mine)
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


def whole(tensors) -> Tensor:
    full = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().flatten().double() for t in full])


def same_on_both(v: Tensor) -> bool:
    both = [torch.empty_like(v) for _ in range(2)]
    dist.all_gather(both, v.contiguous())
    return torch.equal(*both)


def state_of(engine: TwoPass) -> Tensor:
    memory = engine.state_dict()["memory"]
    kept = [memory[slot][name] for slot in sorted(memory) for name in sorted(memory[slot])]
    return whole(kept or [torch.zeros(1)])


def measured(case: Case, kind: str, folder: Path) -> dict:
    alone, _ = trained(case, "alone")
    try:
        model, engine = trained(case, kind)
    except ValueError as error:
        return {"refused": str(error)}
    w = whole(model.parameters())
    gap = (w - whole(alone.parameters())).abs().max().item()
    return {"equal": same_on_both(w) and same_on_both(state_of(engine)), "gap": gap}


def reloaded(case: Case, folder: Path) -> dict:
    """State saved by two shards and read by two new ones; the masks hold exactly as many coordinates as asked for."""
    model, engine = trained(case, "fsdp")
    settings = Settings(case.method, case.options, case.rho, "global")
    save_state(folder, settings, engine.state_dict(), dist.get_rank() == 0, 0.0)
    dist.barrier()
    again = TwoPass(wrapped(Classifier(), "fsdp"), case.method, case.rho, dataset_size=128, **case.options)
    again.load_state_dict(load_state(folder, again.space.params))
    mask = engine.state_dict()["memory"].get("mask", {})
    return {
        "same": torch.equal(state_of(engine), state_of(again)),
        "live": whole(mask.values()).sum().item() if mask else 0,
    }


def refusal(case: Case, scope: str, folder: Path) -> str:
    try:
        trained(case, "ddp", scope)
    except ValueError as error:
        return str(error)
    return ""


EVERY = (*CASES, *ONE_PASS_CASES, *MASKS, *SELECTING)
KEPT = (Case("friendly_sam"), Case("looksam", {"k": 2}), MASKS[0], Case("ausam"))
SCENARIOS: dict[str, Scenario] = {
    **{f"{kind}/{c.id}": partial(measured, c, kind) for c in EVERY for kind in ("ddp", "views", "fsdp")},
    **{f"tensor/{c.id}": partial(measured, c, "tensor") for c in (CASES[0], *SELECTING)},
    **{f"reload/{c.id}": partial(reloaded, c) for c in KEPT},
    **{f"rank/{c.id}": partial(refusal, c, "rank") for c in (Case("friendly_sam"), Case("ausam"), Case("gsam"))},
}
