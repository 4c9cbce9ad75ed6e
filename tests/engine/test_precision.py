"""Mixed precision: bf16 autocast, a real GradScaler, weights too coarse to move, steps that must not be applied."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_ssam import METHODS, Method, SSAMTrainer, TwoPass
from hf_ssam.engine.precision import survival
from hf_ssam.methods import Rules, added, scaled
from hf_ssam.rules import tensors
from tests.support.cases import (
    CASES,
    MAIN_CASES,
    ONE_PASS_CASES,
    Case,
    arguments,
    assert_close,
    assert_identical,
    case_arguments,
    each_case,
    gpt2,
    lm_data,
    trained,
    weights,
)

IN_SCOPE = [
    pytest.param(case, scope, id=f"{case.id}-{scope}")
    for scope in ("global", "micro_batch")
    for case in CASES
    if scope == "global" or case.ascends_alone
]
SCALE = 2.0**10  # a power of two: multiplying by it rounds nothing


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(n)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


# ----------------------------------------------------------------------------------------------------- bf16 autocast


@each_case
@pytest.mark.parametrize("around", ["pass", "both"])
def test_the_second_pass_casts_the_perturbed_weights(case: Case, around: str):
    """bf16 autocast keeps its casts of the weights while its context lasts; ours must not survive the perturbation."""
    model, batch, seen = network(), batches()[0], []
    inner, outer = (
        torch.autocast("cpu", torch.bfloat16) if around == place else contextlib.nullcontext()
        for place in ("pass", "both")
    )

    def run() -> Tensor:
        seen.append(copy.deepcopy(model.state_dict()))
        with inner:
            loss = loss_of(model, batch)
        loss.backward()
        return loss

    def alone(state: dict) -> Tensor:
        fresh = network()
        fresh.load_state_dict(state)
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(fresh, batch).detach()

    engine = TwoPass(model, case.method, 0.5, **case.options)
    with outer:
        report = engine.step(run)
    losses = [alone(state) for state in seen]
    assert losses[0] != losses[1]
    assert [report.loss, report.ascent_loss] == losses


@pytest.mark.few_methods
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_bf16_through_the_trainer_climbs(case: Case):
    trainer = trained(gpt2(), case_arguments(case, bf16=True, max_steps=3), lm_data())
    entries = [e for e in trainer.state.log_history if "ssam/loss" in e]
    assert len(entries) == 3
    assert "ssam/ascent_loss" in entries[0]
    assert all(e.get("ssam/ascent_loss", torch.inf) > e["ssam/loss"] + 1e-3 for e in entries)
    exact = trained(gpt2(), case_arguments(case, max_steps=3), lm_data())
    assert_close(weights(trainer.model), weights(exact.model), atol=5e-3)


# ------------------------------------------------------------------------------------------------------- GradScaler


def ema_method(adopt=None) -> Method:
    """A toy that keeps a vector: u is the normalised average of the gradients so far."""

    def ascent(v, at):
        m = added(scaled(v, 0.5), scaled(at.state.read("m"), 0.5))
        at.state.stage("m", m)
        return scaled(m, 1.0 / (at.space.norm(m) + 1e-12))

    values = {"renormalize": False, "max_scale": math.inf}
    return Method("toy", "a toy", lambda: Rules(ascent=ascent), 0.1, METHODS["sam"].paper, values=values)


class Run:
    """A loop with a real GradScaler, whose passes can be made to overflow: `(step, micro-batch, pass)` from 0."""

    def __init__(self, method, rho: float, scaled: bool, poisoned: tuple = (), micro_batches: int = 1, **options):
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6, enabled=scaled)
        self.engine = TwoPass(self.model, method, rho, **options)
        self.poisoned, self.micro_batches = poisoned, micro_batches
        self.scales: list[list[float]] = []

    def step(self, number: int, batch: tuple[Tensor, Tensor]):
        self.scales.append([])
        parts = list(zip(*(t.chunk(self.micro_batches) for t in batch), strict=True))
        runs = [self._pass(number, i, part) for i, part in enumerate(parts)]
        loss_scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        report = self.engine.step(runs, loss_scale=loss_scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return report

    def _pass(self, number: int, micro_batch: int, part):
        calls = iter(range(2))

        def run() -> Tensor:
            self.scales[-1].append(self.scaler.get_scale())
            loss = loss_of(self.model, part) / self.micro_batches
            if (number, micro_batch, next(calls)) == self.poisoned:
                loss = loss * torch.inf
            self.scaler.scale(loss).backward()
            return loss

        return run

    def vectors(self) -> dict[str, Tensor]:
        memory = self.engine.state_dict()["memory"]
        return {f"{s}/{n}": t.clone() for s, v in memory.items() for n, t in v.items()}

    def state(self) -> dict:
        return {"weights": weights(self.model), "optimizer": copy.deepcopy(self.optimizer.state_dict())}


@pytest.mark.parametrize(("case", "scope"), IN_SCOPE)
def test_a_loss_scale_changes_nothing(case: Case, scope: str):
    """Unnormalised methods would climb 1024 times too far on gradients still scaled; no method may notice."""
    scaled_run, plain = (
        Run(case.method, case.rho, enabled, micro_batches=2, scope=scope, **case.options) for enabled in (True, False)
    )
    for i, batch in enumerate(batches()):
        reports = scaled_run.step(i, batch), plain.step(i, batch)
        taken = () if reports[0].passes == 1 else ("ascent_loss", "ascent_grad_norm", "perturbation_norm")
        for name in ("loss", "grad_norm", *taken):
            torch.testing.assert_close(getattr(reports[0], name), getattr(reports[1], name), rtol=1e-6, atol=0)
        assert reports[0].passes == reports[1].passes
    assert_close(weights(scaled_run.model), weights(plain.model), atol=1e-7)
    assert all(set(scales) == {SCALE} for scales in scaled_run.scales)
    assert len(scaled_run.scales[0]) == 4


@pytest.mark.quick("*-1-1", "ssam-*", "friendly_sam-*")
@pytest.mark.parametrize("which_pass", [0, 1])
@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize(("case", "scope"), IN_SCOPE)
def test_an_overflow_leaves_everything_untouched(case: Case, which_pass: int, scope: str, micro_batch: int):
    """At the seventh step, which methods that perturb every second or third step perturb too."""
    run = Run(case.method, case.rho, True, (6, micro_batch, which_pass), micro_batches=2, scope=scope, **case.options)
    data = batches(8)
    for i in range(6):
        assert not run.step(i, data[i]).skipped
    before, vectors = run.state(), run.vectors()
    report = run.step(6, data[6])
    assert report.skipped
    assert_identical(weights(run.model), before["weights"])
    assert_identical(run.vectors(), vectors)
    for index, state in run.optimizer.state_dict()["state"].items():
        assert_identical(state, before["optimizer"]["state"][index])
    assert run.scaler.get_scale() == SCALE / 2
    assert set(run.scales[6]) == {SCALE}, "the scale must not change between the passes"
    assert not run.step(7, data[7]).skipped


@pytest.mark.parametrize("which_pass", [0, 1])
@pytest.mark.parametrize("overflow_at", [0, 2])
@pytest.mark.parametrize("scope, micro_batch", [("global", 0), ("global", 1), ("micro_batch", 0), ("micro_batch", 1)])
def test_an_overflow_leaves_the_methods_state_untouched(overflow_at, which_pass, scope, micro_batch):
    """A run that overflows once ends where the run without that batch ends: the state went on from where it was."""
    data = batches()
    spoiled = Run(ema_method(), 0.1, True, (overflow_at, micro_batch, which_pass), micro_batches=2, scope=scope)
    clean = Run(ema_method(), 0.1, True, micro_batches=2, scope=scope)
    for i, batch in enumerate(data):
        before = spoiled.vectors()
        report = spoiled.step(i, batch)
        assert report.skipped == (i == overflow_at)
        if report.skipped and before:
            assert_identical(spoiled.vectors(), before)
        if i != overflow_at:
            clean.step(i, batch)
    assert_close(spoiled.vectors(), clean.vectors(), atol=1e-7)
    assert_close(weights(spoiled.model), weights(clean.model), atol=1e-6)


def test_an_exception_takes_back_what_earlier_micro_batches_left():
    run, data = Run(ema_method(), 0.1, False, micro_batches=2, scope="micro_batch"), batches()
    run.step(0, data[0])
    before = run.vectors()

    def dies() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run.engine.step([run._pass(1, 0, data[1]), dies])
    assert_identical(run.vectors(), before)


# ------------------------------------------------------------------------------------- losses that are not finite


class Poisoned(SSAMTrainer):
    """One of its passes returns an infinite loss; counted over the whole run, from 0."""

    poisoned_pass: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes_run = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.passes_run += 1
        return loss * torch.inf if self.passes_run - 1 == self.poisoned_pass else loss


class ForwardRecorder(TrainerCallback):
    """What there is after each step."""

    def __init__(self):
        self.after: list[tuple] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        optimizer_state = copy.deepcopy(optimizer.state_dict()["state"])
        self.after.append((weights(model), optimizer_state, lr_scheduler.last_epoch))


@pytest.mark.quick("0-rank", "1-micro_batch", "2-micro_batch", "3-global")
@pytest.mark.parametrize("scope", ["global", "rank", "micro_batch"])
@pytest.mark.parametrize("which_pass", [0, 1, 2, 3])
def test_a_step_with_a_loss_that_is_not_finite_is_not_applied(scope: str, which_pass: int):
    """Two micro-batches, two passes: whichever of the third step's four is infinite, that step does not happen."""
    watch = ForwardRecorder()
    args = case_arguments(
        Case("ssam"),
        ascent_scope=scope,
        base_optim="adamw_torch",
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer = type("At", (Poisoned,), {"poisoned_pass": 8 + which_pass})(
        model=gpt2(), args=args, train_dataset=lm_data(), callbacks=[watch]
    )
    trainer._loss_count_known = True  # so that the first forwards counted here are those of the first step
    trainer.train()
    before, skipped, after = watch.after[1:4]
    assert_identical(before[0], skipped[0])
    for index, state in before[1].items():
        assert_identical(state, skipped[1][index])
    assert [last for *_, last in watch.after] == [1, 2, 2, 3, 4]
    assert not all(torch.equal(a, b) for a, b in zip(skipped[0].values(), after[0].values(), strict=True))
    entries = [e for e in trainer.state.log_history if "ssam/skipped_steps" in e]
    assert [e["ssam/skipped_steps"] for e in entries] == [0, 0, 1, 0, 0]
    assert "ssam/ascent_loss" not in entries[2], "of a step that was skipped there is nothing to average"
    assert all(math.isfinite(v) for e in entries for v in e.values())
    assert trainer.state.global_step == 5


def test_skipped_steps_stay_out_of_the_averages():
    args = case_arguments(Case("ssam"), max_steps=4, logging_steps=4)
    trainer = type("At", (Poisoned,), {"poisoned_pass": 5})(model=gpt2(), args=args, train_dataset=lm_data())
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "ssam/skipped_steps" in e)
    assert (entry["ssam/skipped_steps"], entry["ssam/perturbed_steps"]) == (1, 4)
    assert entry["ssam/passes"] == 2.0
    assert all(math.isfinite(v) for v in entry.values())


# -------------------------------------------------------------------------------------------- low-precision weights


def test_survival_counts_what_rounding_left():
    """bfloat16 has a spacing of 2⁻⁷ at 1: steps of 2⁻⁷ land, steps of 2⁻¹⁰ vanish, a step of 0 was not asked for."""
    before = torch.ones(4, dtype=torch.bfloat16)
    u = torch.tensor([2.0**-6, 2.0**-9, 0.0, 2.0**-6], dtype=torch.bfloat16)
    w = {"w": before.clone()}
    w["w"].add_(u, alpha=0.5)
    found = survival(w, [before], {"w": u}, 0.5)
    asked = 0.5 * u.double()
    landed = torch.tensor([2.0**-7, 0.0, 0.0, 2.0**-7]).double()
    assert found.moved == pytest.approx(2 / 3)
    assert found.cosine == pytest.approx(float(asked @ landed / (asked.norm() * landed.norm())), rel=1e-12)


def test_survival_of_nothing():
    before = torch.ones(2, dtype=torch.bfloat16)
    found = survival({"w": before.clone()}, [before], {"w": torch.zeros(2, dtype=torch.bfloat16)}, 0.5)
    assert (found.moved, found.cosine) == (0.0, 0.0)


@pytest.mark.parametrize("dtype, rho", [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_weights_too_coarse_to_move_are_warned_of_once_with_numbers(dtype: torch.dtype, rho: float):
    args = case_arguments(Case("ssam", rho=rho), max_steps=3)
    with pytest.warns(UserWarning, match="below what") as caught:
        trained(gpt2().to(dtype), args, lm_data())
    messages = [str(w.message) for w in caught if "below what" in str(w.message)]
    assert len(messages) == 1
    for part in (
        f"rho={rho:g}",
        str(dtype).removeprefix("torch."),
        "% of the",
        "cosine",
        "float32",
        "LoRA",
        "larger rho",
    ):
        assert part in messages[0]


@pytest.mark.parametrize("dtype, rho", [(torch.float32, 1e-3), (torch.bfloat16, 2.0)])
def test_weights_that_can_move_are_not_warned_of(dtype: torch.dtype, rho: float):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*below what")
        trained(gpt2().to(dtype), case_arguments(Case("ssam", rho=rho), max_steps=1), lm_data())


def test_autocast_over_float32_weights_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*below what")
        trained(gpt2(), case_arguments(Case("ssam", rho=1e-3), bf16=True, max_steps=1), lm_data())


# ------------------------------------------------------------------------------- law 7: nothing waits for the device


class ReadsBack(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: each would wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("case", "scope"), [*IN_SCOPE, *(pytest.param(case, "global", id=case.id) for case in ONE_PASS_CASES)]
)
@pytest.mark.parametrize("loss_scale", [None, 2.0, torch.tensor(2.0)])
def test_the_engine_reads_no_value_back(case: Case, scope: str, loss_scale, monkeypatch):
    """On an accelerator's path; on the host itself a value is read freely."""
    monkeypatch.setattr(tensors, "HOST", frozenset())
    model, data = network(), batches()
    engine = TwoPass(model, case.method, case.rho, scope=scope, **case.options)

    def run() -> Tensor:
        loss = loss_of(model, data[0])
        loss.backward()
        return loss.detach()

    with ReadsBack() as counter:
        for _ in range(2):  # the second one finds what the first one kept
            engine.step([run, run], loss_scale=loss_scale)
            model.zero_grad()
    assert counter.reads == 0
    with counter:
        model[0].weight.sum().item()
    assert counter.reads == 1, "the counter must be able to count"


class Classifier(nn.Module):
    """A model whose own forward reads nothing back."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


@pytest.mark.few_methods
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_the_trainer_reads_one_flag_a_step(case: Case, monkeypatch):
    monkeypatch.setattr(tensors, "HOST", frozenset())
    data = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]

    def reads(**given) -> int:
        with ReadsBack() as counter:
            trained(Classifier(), arguments(max_steps=6, logging_strategy="no", **given), data)
        return counter.reads

    ours = reads(optim=case.method, optim_args=case.optim_args, rho=case.rho, base_optim="sgd")
    assert ours - reads(optim="sgd") == 6
