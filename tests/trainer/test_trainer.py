"""The whole Trainer: it is the stock one where nothing is perturbed, and the method's own loop where something is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_ssam import SSAMTrainer, SSAMTrainerMixin, SSAMTrainingArguments, TwoPass
from tests.support.cases import (
    MAIN_CASES,
    Case,
    MendedTrainer,
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

MODELS = {
    "bert with dropout": (bert, text_data, MendedTrainer),
    "gpt2 with dropout": (lambda: gpt2(dropout=0.1), lm_data, Trainer),
    "resnet with BatchNorm": (resnet, image_data, Trainer),
}
"""A model, its data, and the stock Trainer to compare with."""
SGD_MOMENTUM = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
BASES = {"adamw": {"optim": "adamw_torch_fused"}, "sgd momentum": {"optim": "sgd"}}


class RandomStates(TrainerCallback):
    """Keeps the state of the generators at the end of the last step: evaluation and saving draw after it."""

    def on_step_end(self, args, state, control, **kwargs):
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()


def run(cls: type, args: TrainingArguments, model: str, momentum: bool) -> tuple[Trainer, RandomStates]:
    build, data, _ = MODELS[model]
    states = RandomStates()
    extra = {"optimizer_cls_and_kwargs": SGD_MOMENTUM} if momentum else {}
    return trained(build(), args, data(), cls, callbacks=[states], **extra), states


def optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{i}.{n}": torch.as_tensor(v) for i, s in state.items() for n, v in s.items() if v is not None}


@pytest.mark.quick("*-adamw", "two passes-resnet with BatchNorm-sgd momentum")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "ours", [{"optim": "ssam", "rho": 0.0}, {"optim": "sam", "rho": 1e-30}], ids=["one pass", "two passes"]
)
def test_without_a_perturbation_it_is_the_stock_trainer_bit_for_bit(base, model, ours):
    """Law 1, both halves: after 20 steps weights, buffers, optimizer, generators and logs are the same bits."""
    momentum = base == "sgd momentum"
    stock, stock_rng = run(
        MODELS[model][2], arguments(TrainingArguments, max_steps=20, **BASES[base]), model, momentum
    )
    ours_args = arguments(SSAMTrainingArguments, max_steps=20, base_optim=BASES[base]["optim"], **ours)
    trainer, rng = run(SSAMTrainer, ours_args, model, momentum)
    assert_identical(weights(stock.model), weights(trainer.model))
    assert_identical(optimizer_tensors(stock), optimizer_tensors(trainer))
    assert torch.equal(stock_rng.torch, rng.torch) and stock_rng.python == rng.python
    assert all(np.array_equal(a, b) for a, b in zip(stock_rng.numpy, rng.numpy, strict=True))
    for theirs, entry in zip(stock.state.log_history, trainer.state.log_history, strict=True):
        for key in theirs.keys() & {"loss", "grad_norm", "learning_rate", "epoch"}:
            assert theirs[key] == entry[key]
    passes = [e["ssam/passes"] for e in trainer.state.log_history if "ssam/passes" in e]
    assert passes == [1.0 if ours["rho"] == 0 else 2.0] * 20


def by_hand(case: Case, model: nn.Module, batches: list[dict], lr: float) -> None:
    """The method's own loop, on the engine that `test_two_pass` holds to the float64 references."""
    engine = TwoPass(model, case.method, case.rho, **case.options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:

        def forward_backward(inputs=batch) -> Tensor:
            loss = model(**inputs).loss
            loss.backward()
            return loss

        engine.step(forward_backward)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@each_case
@pytest.mark.few_methods
def test_the_trainer_takes_the_trajectory_of_a_hand_written_loop(case: Case):
    batches = []

    def collate(rows):
        batches.append(default_data_collator(rows))
        return batches[-1]

    args = case_arguments(case, max_steps=10, learning_rate=0.5, lr_scheduler_type="constant")
    ours = trained(bert(0.0), args, text_data(80), data_collator=collate).model
    expected, plain = bert(0.0).train(), bert(0.0).train()
    by_hand(case, expected, batches[:10], lr=0.5)
    assert_close(weights(expected), weights(ours), atol=1e-6)
    by_hand(Case(case.method, case.options, rho=0.0), plain, batches[:10], lr=0.5)
    gap = max((a - b).abs().max() for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert gap > 1e-4, "the perturbation must matter, or this test could not tell a Trainer that forgets it"


@pytest.mark.slow
def test_methods_take_different_trajectories():
    """A Trainer that always ran one method would pass no more than one of these."""
    ends = [
        weights(trained(bert(0.0), case_arguments(c, max_steps=4, learning_rate=0.5), text_data()).model)
        for c in MAIN_CASES
    ]
    names = [c.method for c in MAIN_CASES]
    for i, a in enumerate(ends):
        for j in range(i):
            gap = max((a[n] - ends[j][n]).abs().max() for n in a if a[n].is_floating_point())
            assert gap > 1e-7, f"{names[i]} and {names[j]} end at the same weights"


def test_the_log_entry_carries_the_step_report(tmp_path):
    args = arguments(output_dir=str(tmp_path), optim="ssam", rho=0.05, max_steps=6, logging_steps=3, ascent_interval=2)
    trainer = trained(bert(), args, text_data())
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 2
    for entry in entries:
        assert entry["ssam/perturbation_norm"] == pytest.approx(0.05, rel=1e-5)
        assert entry["ssam/loss"] == pytest.approx(entry["loss"], rel=1e-6)
        assert entry["ssam/ascent_loss"] != entry["ssam/loss"]
        assert entry["ssam/skipped_steps"] == 0
    assert [e["ssam/perturbed_steps"] for e in entries] == [2, 1]
    assert [e["ssam/passes"] for e in entries] == [pytest.approx(5 / 3), pytest.approx(4 / 3)]
    assert trainer.state.log_history[-1]["ssam/total_passes"] == 9


def test_tensorboard_gets_the_step_report(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(output_dir=str(tmp_path), report_to="tensorboard")
    trained(bert(), args, text_data())
    events = next(p.parent for p in tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/ssam/loss", "train/ssam/scale"} <= set(accumulator.Tags()["scalars"])


def test_a_stock_name_is_the_stock_trainer():
    stock = trained(bert(), arguments(TrainingArguments, optim="adamw_torch"), text_data(), MendedTrainer)
    ours = trained(bert(), arguments(optim="adamw_torch"), text_data())
    assert ours.two_pass is None
    assert_identical(weights(stock.model), weights(ours.model))
    assert not any(k.startswith("ssam/") for entry in ours.state.log_history for k in entry)


def test_a_stock_trainer_given_our_arguments_fails_loudly():
    with pytest.raises(ValueError, match="unsupported optimizer: ssam"):
        Trainer(model=bert(), args=arguments(optim="ssam"), train_dataset=text_data()).train()


def test_arguments_of_another_class_are_refused():
    with pytest.raises(ValueError, match="args: TrainingArguments has no `rho`; pass SSAMTrainingArguments"):
        SSAMTrainer(model=bert(), args=arguments(TrainingArguments), train_dataset=text_data())


def test_label_smoothing_is_applied_in_both_passes():
    args = arguments(optim="sam", rho=1e-30, label_smoothing_factor=0.1, base_optim="sgd", learning_rate=0.5)
    ours = trained(bert(), args, text_data())
    stock = trained(
        bert(),
        arguments(TrainingArguments, optim="sgd", label_smoothing_factor=0.1, learning_rate=0.5),
        text_data(),
        MendedTrainer,
    )
    assert_identical(weights(stock.model), weights(ours.model))
    entry = ours.state.log_history[0]
    assert entry["ssam/ascent_loss"] == entry["ssam/loss"]


def test_a_custom_loss_function_is_used_in_both_passes():
    calls = []

    def doubled(outputs, labels, num_items_in_batch=None):
        calls.append(num_items_in_batch)
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = trained(bert(0.0), arguments(optim="ssam", max_steps=3), text_data(), compute_loss_func=doubled)
    assert len(calls) == 6
    plain = trained(bert(0.0), arguments(optim="ssam", max_steps=1), text_data())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * plain.state.log_history[0]["loss"], rel=1e-5)


def test_extra_keys_of_a_collator_reach_compute_loss_in_both_passes():
    seen = []

    class Popping(SSAMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs.pop("source"))
            return super().compute_loss(model, inputs, **kwargs)

    def collate(rows):
        return {**default_data_collator(rows), "source": "questions"}

    args = arguments(optim="ssam", max_steps=2, remove_unused_columns=False)
    trained(bert(), args, text_data(), Popping, data_collator=collate)
    assert seen == ["questions"] * 4


def test_the_parents_bookkeeping_counts_once():
    counts = {"include_num_input_tokens_seen": "all", "max_steps": 4}
    ours = trained(bert(), arguments(optim="sam", rho=1e-30, **counts), text_data())
    stock = trained(
        bert(), arguments(TrainingArguments, optim="adamw_torch_fused", **counts), text_data(), MendedTrainer
    )
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen == 4 * 8 * 10
    assert ours.state.log_history[-1]["train_loss"] == stock.state.log_history[-1]["train_loss"]
    assert ours.state.total_flos == 2 * stock.state.total_flos


@each_case
@pytest.mark.few_methods
def test_the_trainer_goes_on_after_an_exception_in_the_second_pass(case: Case):
    model = bert(0.0)
    trainer = SSAMTrainer(model=model, args=case_arguments(case, max_steps=3), train_dataset=text_data())
    before, calls = weights(model), []

    def fail_on_the_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail_on_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_identical(before, weights(model))
    hook.remove()
    trainer.train()
    assert_identical(weights(trained(bert(0.0), case_arguments(case, max_steps=3), text_data()).model), weights(model))


class SAM(torch.optim.Optimizer):
    """What users bring from elsewhere."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def first_step(self):
        """Perturb."""


def test_a_wrapper_passed_as_optimizers_is_refused():
    model = bert()
    with pytest.raises(ValueError, match="optimizers: SAM wraps an optimizer .* pass the plain optimizer"):
        SSAMTrainer(
            model=model, args=arguments(), train_dataset=text_data(), optimizers=(SAM(model.parameters()), None)
        )


def test_a_plain_optimizer_of_the_users_own_is_used():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trained(model, arguments(optim="ssam"), text_data(), optimizers=(optimizer, None))
    assert trainer.optimizer.optimizer is optimizer
    assert type(optimizer) is torch.optim.SGD


def test_the_optimizer_holds_nothing_of_ours():
    """Law 2: AdamW's state has AdamW's keys and no more, and is a plain torch optimizer."""
    trainer = trained(bert(), arguments(optim="ssam", base_optim="adamw_torch"), text_data())
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert {k for s in trainer.optimizer.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq"}


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="train_dataset: it is empty"):
        SSAMTrainer(model=bert(), args=arguments(), train_dataset=[])


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="requires a gradient, so there is nothing to train"):
        SSAMTrainer(model=bert().requires_grad_(False), args=arguments(), train_dataset=text_data())


def test_several_gpus_in_one_process_are_refused(monkeypatch):
    args = arguments()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="accelerate launch --multi_gpu --num_processes 2"):
        SSAMTrainer(model=bert(), args=args, train_dataset=text_data())


def test_a_trainer_that_draws_its_own_batches_is_refused():
    class GRPOTrainer(Trainer):
        pass

    class Mine(SSAMTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(NotImplementedError, match="GRPOTrainer cannot train with two passes"):
        Mine(model=bert(), args=arguments(), train_dataset=text_data())


def test_fp16_without_a_scaler_is_said():
    args = arguments()
    args.fp16 = True
    with pytest.warns(UserWarning, match="fp16=True has no effect on this device"):
        SSAMTrainer(model=bert(), args=args, train_dataset=text_data())


@pytest.mark.slow
def test_sharpness_steps_watch_the_curvature_and_change_nothing():
    watched = trained(bert(), arguments(optim="ssam", sharpness_steps=2), text_data(16))
    plain = trained(bert(), arguments(optim="ssam"), text_data(16))
    assert_identical(weights(plain.model), weights(watched.model))
    measured = [e["step"] for e in watched.state.log_history if "sharpness/top_eigenvalue" in e]
    assert measured == [0, 2, 4]


def test_the_adaptive_geometry_has_a_radius_of_its_own():
    trainer = trained(bert(), arguments(optim="ssam", optim_args="adaptive=true", max_steps=1), text_data())
    assert trainer.two_pass.rho == 0.5
