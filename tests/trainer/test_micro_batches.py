"""A micro-batch runs again as it ran before: on the inputs that the first pass was given, heard and counted once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ssam import SSAMTrainer
from hf_ssam.trainer.micro_batches import MicroBatch, recorded_calls
from tests.support.cases import (
    Case,
    arguments,
    assert_identical,
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

pytestmark = pytest.mark.filterwarnings("ignore:.*its loss ignores it")
TINY = Case("sam", rho=1e-30)
"""A radius too small to change any weight: the run is then the stock one, to the bit (law 1)."""
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def log(trainer: Trainer) -> list[dict[str, Any]]:
    left_out = ("total_flos", "train_runtime")
    return [
        {k: v for k, v in e.items() if k not in left_out and "per_second" not in k and not k.startswith("ssam/")}
        for e in trainer.state.log_history
    ]


def assert_stock(host: type, model, data, **given: Any) -> Trainer:
    """`host`, mixed into a Trainer, trains at a radius of nothing as it does with a stock optimizer."""
    stock = type("Stock", (host, Trainer), {})
    ours = type("Ours", (host, SSAMTrainer), {})
    expected = trained(model(), arguments(TrainingArguments, optim="sgd", **given), data(), cls=stock)
    got = trained(model(), case_arguments(TINY, **given), data(), cls=ours)
    assert_identical(weights(got.model), weights(expected.model))
    assert log(got) == log(expected)
    return got


# ------------------------------------------------------------------------------------------ inputs that are written to


class Plain:
    """Changes nothing."""


class MasksInPlace:
    """Masks a fifth of the tokens in the batch itself, as some training scripts do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        masked = torch.rand(inputs["input_ids"].shape) < 0.2
        inputs["input_ids"][masked] = (inputs["input_ids"][masked] + 7) % 40
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class ShiftsNested:
    """Writes into a tensor two levels down."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        nested = inputs.pop("more")["ids"][0]
        nested.add_(1)
        return super().compute_loss(model, {**inputs, "input_ids": nested % 40}, return_outputs, num_items_in_batch)


def nested(rows: list[dict]) -> dict[str, Any]:
    batch = {k: torch.stack([r[k] for r in rows]) for k in ("attention_mask", "labels")}
    return {**batch, "more": {"ids": [torch.stack([r["input_ids"] for r in rows])]}}


class Noisy(nn.Module):
    """Adds noise to its input in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1), nn.Linear(5, 3))

    def forward(self, x, labels):
        if self.training:
            x += 0.3 * torch.randn_like(x)
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def vectors(n: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(n)]


@pytest.mark.parametrize("split", [{}, SPLIT], ids=["whole", "split"])
def test_inputs_masked_in_place_are_masked_once(split: dict):
    trainer = assert_stock(MasksInPlace, lambda: gpt2(0.1), lm_data, **split)
    assert all(e["ssam/loss"] == e["ssam/ascent_loss"] for e in trainer.state.log_history if "ssam/loss" in e)


def test_inputs_that_a_forward_adds_noise_to_get_it_once():
    assert_stock(Plain, Noisy, vectors, **SPLIT)


def test_nested_inputs_are_written_to_once():
    def run(cls: type, args: TrainingArguments) -> Trainer:
        args.remove_unused_columns = False
        return trained(gpt2(0.1), args, lm_data(), cls=cls, data_collator=nested)

    stock = run(type("Stock", (ShiftsNested, Trainer), {}), arguments(TrainingArguments, optim="sgd"))
    ours = run(type("Ours", (ShiftsNested, SSAMTrainer), {}), case_arguments(TINY))
    assert_identical(weights(ours.model), weights(stock.model))


def test_inputs_that_nobody_writes_to_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch):
    runs, call = [], MicroBatch.__call__
    monkeypatch.setattr(MicroBatch, "__call__", lambda run, *args: (runs.append(run), call(run, *args))[1])
    trained(gpt2(), case_arguments(TINY, max_steps=2, **SPLIT), lm_data())
    assert [run.unwritten for run in runs] == [None] * 8


# --------------------------------------------------------------------------------------------------- heard and counted


class Talks:
    """Logs inside the loss, and counts in an attribute that is declared a counter."""

    heard = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.heard += 1
            self.log({"own/loss": float(loss.detach()), "own/heard": self.heard})
        return loss


def test_log_inside_the_loss_is_heard_once():
    class Counts(Talks):
        host_counters = {**SSAMTrainer.host_counters, "Counts": ("heard",)}

    trainer = assert_stock(Counts, lambda: gpt2(0.1), lm_data, **SPLIT)
    assert trainer.heard == 8 and "log" not in vars(trainer)


def test_log_that_was_replaced_on_the_instance_stays_so():
    trainer = SSAMTrainer(model=gpt2(), args=case_arguments(TINY, max_steps=2), train_dataset=lm_data())
    entries, log = [], trainer.log
    trainer.log = lambda logs, *rest: (entries.append(copy.copy(logs)), log(logs, *rest))
    trainer.train()
    assert [("loss" in e) for e in entries] == [True, True, False]


# ---------------------------------------------------------------------------------------------------- the same samples


class DrawsFromABuffer:
    """Trains on the next of its own batches at each call."""

    position = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.position += 1
        inputs["input_ids"] = (inputs["input_ids"] + self.position) % 40
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Generates:
    """Trains on what the model generates: at `w + e` it writes something else."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            ids = model.generate(inputs["input_ids"][:, :3], max_new_tokens=6, do_sample=True, pad_token_id=0)
        return super().compute_loss(model, {"input_ids": ids, "labels": ids.clone()}, return_outputs)


@pytest.mark.parametrize("host", [DrawsFromABuffer, Generates])
@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_trainer_that_draws_other_samples_is_refused_in_the_first_perturbed_step(host: type, scope: str):
    cls = type("Drawing", (host, SSAMTrainer), {})
    args = case_arguments(Case("sam", rho=2.0), ascent_scope=scope, ascent_start=2, max_steps=4, **SPLIT)
    trainer = cls(model=gpt2(), args=args, train_dataset=lm_data())
    with pytest.raises(NotImplementedError, match="Drawing cannot train with two passes: .* other samples .*`optim`"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.model._forward_pre_hooks


class Augments:
    """Draws random samples and adversarial noise anew at each call: the one replayed, the other a function of `w`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["pixel_values"] = inputs["pixel_values"].flip(-1) if torch.rand(()) < 0.5 else inputs["pixel_values"]
        pixels = inputs["pixel_values"].clone().requires_grad_()
        loss = super().compute_loss(model, {**inputs, "pixel_values": pixels})
        inputs["pixel_values"] = pixels.detach() + 0.1 * torch.autograd.grad(loss, pixels)[0].sign()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_augmented_and_adversarial_inputs_are_the_same_samples():
    cls = type("Augmenting", (Augments, SSAMTrainer), {})
    trainer = trained(resnet(), case_arguments(Case("sam", rho=1.0)), image_data(), cls=cls)
    assert trainer.state.global_step == 4


def test_samples_drawn_anew_by_request_are_not_compared():
    """`replay_rng=False` asks for other random draws in the second pass."""

    class Random:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["input_ids"] = inputs["input_ids"][torch.randperm(len(inputs["input_ids"]))]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    cls = type("Shuffling", (Random, SSAMTrainer), {})
    assert trained(bert(), case_arguments(TINY, replay_rng=False), text_data(), cls=cls).state.global_step == 4


def test_inputs_are_compared_in_the_first_perturbed_step_of_each_run_only():
    compared = []

    class Looking(SSAMTrainer):
        def compares_inputs(self):
            compared.append((self.state.global_step, super().compares_inputs()))
            return compared[-1][1]

    args = case_arguments(TINY, ascent_start=1, max_steps=3)
    trainer = Looking(model=gpt2(), args=args, train_dataset=lm_data())
    for _ in range(2):
        compared.clear()
        trainer.train()
        assert compared == [(0, False), (1, True), (1, True), (2, False), (2, False)]


def test_recorded_calls_tell_samples_and_not_noise():
    def calls(*args: torch.Tensor) -> list[Any]:
        with recorded_calls(model) as found:
            model(*args)
        return found

    model = nn.Identity()
    ids = torch.arange(6).reshape(2, 3)
    assert calls(ids) == calls(ids.clone()) != calls(ids.flip(0))
    assert calls(torch.ones(2, 3)) == calls(torch.zeros(2, 3)) != calls(torch.zeros(3, 2))
    with torch.no_grad():
        assert calls(ids) == []
