"""On a GPU: the GradScaler through the whole Trainer, bf16, compile, device generators, and no wait in the engine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.engine.replay import RandomState
from tests.support.cases import (
    MAIN_CASES,
    Case,
    arguments,
    assert_close,
    assert_identical,
    bert,
    case_arguments,
    each_case,
    gpt2,
    image_data,
    lm_data,
    resnet,
    text_data,
    trained,
    weights,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*its loss ignores it")]
TINY = 1e-30
ON_GPU = {"use_cpu": False}

main_case = pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)


@pytest.fixture(autouse=True)
def exact():
    """One algorithm for each kernel, so that bits can be compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(False)


def entries(trainer) -> list[dict]:
    return [e for e in trainer.state.log_history if "ssam/loss" in e]


# ------------------------------------------------------------------------------------------------ fp16 and bf16


@main_case
def test_fp16_through_the_trainer(case: Case):
    """A real GradScaler around both passes: the run is that of float32, to half precision."""
    trainer = trained(gpt2(), case_arguments(case, fp16=True, max_steps=6, **ON_GPU), lm_data())
    assert trainer.accelerator.scaler is not None
    taken = [e for e in trainer.state.log_history if e.get("ssam/skipped_steps") == 0]
    assert taken and "ssam/ascent_loss" in taken[0]
    exact = trained(gpt2(), case_arguments(case, max_steps=6, **ON_GPU), lm_data())
    assert_close(weights(trainer.model), weights(exact.model), atol=2e-2)


class Overflowing(SSAMTrainer):
    """One of its forwards, counted from 0, returns an infinite loss."""

    poisoned: int
    forwards = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.forwards += 1
        return loss * torch.inf if self.forwards - 1 == self.poisoned else loss


@pytest.mark.parametrize("poisoned", [4, 5])
def test_an_overflow_under_fp16_is_skipped_and_counted(poisoned: int):
    """The third step's first or second pass: the scaler skips it, halves its scale, and the scheduler waits."""
    args = case_arguments(Case("usam"), fp16=True, max_steps=5, **ON_GPU)
    trainer = type("At", (Overflowing,), {"poisoned": poisoned})(model=gpt2(), args=args, train_dataset=lm_data())
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=10**6)
    trainer.train()
    counts = [e["ssam/skipped_steps"] for e in trainer.state.log_history if "ssam/skipped_steps" in e]
    assert counts == [0, 0, 1, 0, 0]
    assert trainer.accelerator.scaler.get_scale() == 2.0**7
    assert trainer.lr_scheduler.last_epoch == 4
    assert all(t.isfinite().all() for t in weights(trainer.model).values())


@main_case
def test_bf16_autocast_sees_the_perturbed_weights(case: Case):
    trainer = trained(gpt2(), case_arguments(case, bf16=True, max_steps=3, **ON_GPU), lm_data())
    found = [e for e in entries(trainer) if "ssam/ascent_loss" in e]
    assert found and all(e["ssam/ascent_loss"] > e["ssam/loss"] for e in found)


def test_pure_bf16_weights_are_warned_of():
    with pytest.warns(UserWarning, match="below what bfloat16 weights resolve"):
        trained(gpt2().to(torch.bfloat16), case_arguments(Case("ssam", rho=1e-3), **ON_GPU), lm_data())


# -------------------------------------------------------------------------------------- randomness and statistics


def test_device_generators_are_put_back():
    device = torch.device("cuda", torch.cuda.current_device())
    state = RandomState((device,))
    first = torch.rand(4, device=device)
    state.restore()
    assert torch.equal(torch.rand(4, device=device), first)


@pytest.mark.parametrize("replay_rng", [True, False])
def test_dropout_on_the_device_is_replayed(replay_rng: bool):
    args = case_arguments(Case("ssam", rho=TINY), replay_rng=replay_rng, max_steps=3, **ON_GPU)
    found = entries(trained(bert(dropout=0.2), args, text_data()))
    assert found and all((e["ssam/loss"] == e["ssam/ascent_loss"]) == replay_rng for e in found)


@pytest.mark.parametrize("model, data", [(bert, text_data), (resnet, image_data)], ids=["bert", "resnet"])
def test_without_a_perturbation_it_is_the_stock_trainer(model, data):
    stock = trained(model(), arguments(TrainingArguments, optim="sgd", **ON_GPU), data(), cls=Trainer)
    ours = trained(model(), case_arguments(Case("sam", rho=TINY), **ON_GPU), data())
    assert_identical(weights(ours.model), weights(stock.model))


@main_case
def test_a_snapshot_in_host_memory_changes_no_bit(case: Case):
    one, two = (
        trained(gpt2(), case_arguments(case, offload_snapshot=offload, **ON_GPU), lm_data())
        for offload in (True, False)
    )
    assert_identical(weights(one.model), weights(two.model))


# ------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("model, data", [(bert, text_data), (resnet, image_data)], ids=["bert", "resnet"])
def test_compile_takes_at_most_one_more_graph_a_graph(model, data):
    def run(**given) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trained(model(), arguments(torch_compile=True, **given, **ON_GPU), data())
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    stock = run(optim="sgd")
    assert 0 < stock <= run(optim="ssam", rho=0.1, base_optim="sgd") <= 2 * stock


# ----------------------------------------------------------------------------------- law 7: no wait for the device


@each_case
@pytest.mark.parametrize("loss_scale", [False, True])
@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_the_engine_does_not_wait_for_the_device(case: Case, scope: str, loss_scale: bool):
    """CUDA raises at the first synchronising call between here and there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3)).cuda()
    x, y = torch.randn(16, 6).cuda(), torch.randn(16, 3).cuda()
    scale = torch.tensor(2.0, device="cuda") if loss_scale else None
    engine = TwoPass(model, case.method, case.rho, scope=scope, **case.options)

    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        (loss if scale is None else loss * scale).backward()
        return loss

    engine.step([run, run], loss_scale=scale)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            report = engine.step([run, run], loss_scale=scale)
            model.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(report.loss.item())
