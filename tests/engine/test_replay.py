"""The second pass sees the first one's random numbers and buffers, and leaves no trace of its own (law 6)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import Trainer, TrainingArguments

from hf_ssam import TwoPass
from hf_ssam.engine.replay import Buffers, RandomState, unchanged
from tests.support.cases import (
    MAIN_CASES,
    Case,
    MendedTrainer,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    image_data,
    resnet,
    text_data,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*its loss ignores it")

SCOPES = ("global", "rank", "micro_batch")
TINY = 1e-30
"""A radius too small to change any weight: both passes are then at the same point."""


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


def generators() -> tuple:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


def test_every_generator_is_put_back():
    state = RandomState()
    first = draws()
    assert draws() != first
    state.restore()
    assert draws() == first


def test_a_look_that_must_not_be_seen():
    model = resnet()
    before, state = buffers(model), RandomState()
    expected = draws()
    state.restore()
    with unchanged(model):
        model.train()(pixel_values=torch.randn(4, 1, 8, 8))
        draws()
    assert_identical(buffers(model), before)
    assert draws() == expected


class Random(nn.Module):
    """Draws from every generator in its forward, and remembers what it drew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.drawn: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(draws())
        return self.layer(x * self.drawn[-1][1]).square().mean()


def run_of(model: Random, x: Tensor):
    def run() -> Tensor:
        loss = model(x)
        loss.backward()
        return loss

    return run


@pytest.mark.parametrize("scope", SCOPES)
def test_each_micro_batch_draws_again_what_it_drew(scope: str):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model, x = Random(), torch.randn(3, 4)
    start = RandomState()
    TwoPass(model, "sam", 0.1, scope=scope).step([run_of(model, x)] * 3)
    drawn, left = model.drawn, generators()
    passes = [drawn[:3], drawn[3:]] if scope != "micro_batch" else [drawn[0::2], drawn[1::2]]
    assert passes[0] == passes[1]
    assert len({tuple(d) for d in passes[0]}) == 3
    start.restore()
    for _ in range(3):
        draws()
    assert generators() == left, "in the end every generator has moved once a micro-batch"


def test_without_replay_every_pass_draws_anew():
    torch.manual_seed(0)
    model = Random()
    TwoPass(model, "sam", 0.1, replay_rng=False).step(run_of(model, torch.randn(3, 4)))
    assert model.drawn[0] != model.drawn[1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("replay_rng", [True, False])
def test_replay_rng_through_the_trainer(replay_rng: bool, scope: str):
    """At the same point the two losses of a dropout model are equal if, and only if, the masks are."""
    args = case_arguments(
        Case("ssam", rho=TINY),
        replay_rng=replay_rng,
        ascent_scope=scope,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer = trained(bert(dropout=0.2), args, text_data())
    entries = [e for e in trainer.state.log_history if "ssam/loss" in e]
    assert len(entries) == 3
    assert all((e["ssam/loss"] == e["ssam/ascent_loss"]) == replay_rng for e in entries)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_batch_norm_moves_once_a_micro_batch(scope: str, accumulation: int):
    given = {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    stock = trained(resnet(), arguments(TrainingArguments, optim="sgd", **given), image_data(), cls=MendedTrainer)
    ours = trained(resnet(), case_arguments(Case("sam", rho=TINY), ascent_scope=scope, **given), image_data())
    assert_identical(buffers(ours.model), buffers(stock.model))
    counters = [int(b) for n, b in ours.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counters and set(counters) == {5 * accumulation}


@pytest.mark.slow
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_batch_norm_of_every_method_after_one_step_is_the_stock_one(case: Case):
    """At a radius that moves everything: statistics are those of the pass at w, never of the one at w + e."""
    stock = trained(resnet(), arguments(TrainingArguments, optim="sgd", max_steps=1), image_data(), cls=Trainer)
    ours = trained(resnet(), case_arguments(case, rho=1.0, max_steps=1), image_data())
    assert_identical(buffers(ours.model), buffers(stock.model))


def test_the_second_pass_sees_the_buffers_of_the_first():
    """Spectral norm computes with its buffers in the forward: equal losses at one point need equal buffers."""
    torch.manual_seed(0)
    model = spectral_norm(nn.Linear(4, 4))
    x = torch.randn(8, 4)
    once = buffers(model)

    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    report = TwoPass(model, "sam", TINY).step(run)
    assert report.loss == report.ascent_loss
    after = buffers(model)
    model.zero_grad()
    model.load_state_dict({**model.state_dict(), **once})
    run()
    assert_identical(after, buffers(model))


class Replacing(nn.Module):
    """Puts a new tensor in its buffer's place, as some attention caches do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self) -> Tensor:
        self.seen = self.seen + 1
        return (self.w * self.seen).square().sum()


def test_a_buffer_that_is_replaced_is_put_back_too():
    model = Replacing()

    def run() -> Tensor:
        loss = model()
        loss.backward()
        return loss

    report = TwoPass(model, "sam", TINY).step(run)
    assert report.loss == report.ascent_loss == 2
    assert model.seen == 1


def test_packed_quantised_weights_are_not_copied():
    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.zeros(2**16 + 1, dtype=torch.uint8))
    model.register_buffer("counter", torch.zeros((), dtype=torch.long))
    held, snapshot = Buffers(model).save()
    assert [t.numel() for t in held] == [1]
    assert [c.numel() for c in snapshot.copies] == [1]


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_an_exception_in_the_second_pass_leaves_buffers_and_generators(scope: str):
    """What the first pass left is there, the weights are there, and nothing of the second pass is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, calls = torch.randn(8, 4), []

    def run() -> Tensor:
        calls.append(None)
        loss = model(x).square().mean()
        loss.backward()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    start, weights = RandomState(), {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        TwoPass(model, "sam", 0.5, scope=scope).step(run)
    left = generators()
    assert_identical({n: p.detach() for n, p in model.named_parameters()}, weights)
    assert int(model[1].num_batches_tracked) == 1
    start.restore()
    model(x)
    assert generators() == left


class Counting(torch.nn.Module):
    """Counts what went to each of three experts, in an integer buffer, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))

    def forward(self, x):
        out = self.layer(x)
        self.counts += torch.bincount(out.argmax(1), minlength=3)
        return out


def test_integer_counters_of_several_entries_count_once():
    model, x = Counting(), torch.randn(5, 3)

    def run():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    TwoPass(model, "sam", 0.1).step(run)
    assert model.counts.sum() == 5
