"""What a Trainer can be asked for, with two passes: each feature leaves the step right."""

from __future__ import annotations

import collections

import pytest
import torch
import torch._dynamo
from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_ssam import SSAMTrainer
from tests.support.cases import (
    MAIN_CASES,
    Case,
    MendedTrainer,
    arguments,
    assert_close,
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
TINY = 1e-30
"""A radius too small to change any weight: the run is then the stock one, to the bit (law 1)."""

main_case = pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)


def stock_and_ours(model, data, cls=Trainer, **given) -> tuple[Trainer, SSAMTrainer]:
    """A stock run, and ours at a radius that changes nothing."""
    stock = trained(model(), arguments(TrainingArguments, optim="sgd", **given), data(), cls=cls)
    return stock, trained(model(), case_arguments(Case("sam", rho=TINY), **given), data())


def assert_stock(model, data, cls=Trainer, **given) -> None:
    stock, ours = stock_and_ours(model, data, cls, **given)
    assert_identical(weights(ours.model), weights(stock.model))
    assert all("ssam/ascent_loss" in e for e in ours.state.log_history if "loss" in e), "every step took two passes"


def losses(trainer, name: str = "loss") -> list[float]:
    return [e[name] for e in trainer.state.log_history if name in e]


# ---------------------------------------------------------------------------------------- checkpointing and compile


@pytest.mark.quick("bert-True", "gpt2-False")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "model, data", [(bert, text_data), (lambda: gpt2(dropout=0.1), lm_data)], ids=["bert", "gpt2"]
)
def test_gradient_checkpointing(model, data, reentrant: bool):
    """Recomputation draws dropout again from a kept state; the second pass must not disturb that, nor be disturbed."""
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_stock(model, data, **recomputed)
    given = {"case": Case("ssam"), "max_steps": 4}
    plain = trained(model(), case_arguments(**given), data())
    assert_close(weights(trained(model(), case_arguments(**given, **recomputed), data()).model), weights(plain.model))


class Classifier(nn.Module):
    """Dropout, and no more to compile than needed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(40, 8), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, input_ids, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(input_ids).mean(1), labels)}


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return Classifier()


@pytest.mark.slow
@pytest.mark.parametrize("model, data", [(classifier, text_data), (resnet, image_data)], ids=["dropout", "resnet"])
def test_compile_takes_at_most_one_more_graph_a_graph(model, data):
    def run(**given) -> tuple[int, nn.Module]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        args = arguments(torch_compile=True, torch_compile_backend="aot_eager", max_steps=4, **given)
        compiled = trained(model(), args, data()).model
        return torch._dynamo.utils.counters["stats"]["unique_graphs"], compiled

    stock, _ = run(optim="sgd")
    ours, compiled = run(optim="ssam", rho=0.1, base_optim="sgd")
    assert 0 < stock <= ours <= 2 * stock
    eager = trained(model(), arguments(optim="ssam", rho=0.1, base_optim="sgd", max_steps=4), data()).model
    assert_close(weights(compiled), weights(eager), atol=1e-5)


# ----------------------------------------------------------------------------------------------- batches and data


class OutOfMemory(SSAMTrainer):
    """Runs out of memory in the second pass of its third step at batch 8; `seen` is what came after."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forwards = 0
        self.sizes: list[int] = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.forwards += 1
        self.sizes.append(len(inputs["labels"]))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.forwards == 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("ssam"), Case("friendly_sam")], ids=lambda c: c.id)
def test_auto_find_batch_size_begins_anew_with_fewer_samples(case: Case):
    """The engine is built anew, at whole weights: what dies in the second pass at batch 8 goes on with fewer."""
    trainer = OutOfMemory(
        model=bert(), args=case_arguments(case, auto_find_batch_size=True), train_dataset=text_data()
    )
    first = weights(trainer.model)
    trainer.train()
    assert trainer.sizes[:6] == [8] * 6
    assert trainer.state.global_step == 4 and max(trainer.sizes[6:]) < 8
    assert not trainer.two_pass.is_open and trainer.two_pass.clock.steps <= 4
    assert all(t.isfinite().all() for t in weights(trainer.model).values())
    assert any(not torch.equal(first[n], t) for n, t in weights(trainer.model).items())


def test_group_by_length():
    """Batches of like length, in the order of the stock Trainer; another order than without."""
    rows = [
        {n: t.tolist() for n, t in row.items()} | {"length": int(row["attention_mask"].sum())} for row in lm_data()
    ]
    data = Dataset.from_list(rows).with_format("torch")
    grouped = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    stock, ours = stock_and_ours(gpt2, lambda: data, **grouped)
    assert_identical(weights(ours.model), weights(stock.model))
    assert losses(ours) != losses(stock_and_ours(gpt2, lambda: data)[1])


class Stream(IterableDataset):
    """Of a length that nobody knows."""

    def __init__(self, rows: list):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("ssam"), Case("usam"), Case("friendly_sam")], ids=lambda c: c.id)
def test_iterable_datasets_are_the_same_batches(case: Case):
    """64 samples in order, streamed or not; 4 × 2 is 8 here too."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = trained(gpt2(), case_arguments(case, max_steps=10), Stream(lm_data()))
    halves = trained(gpt2(), case_arguments(case, max_steps=10, **split), Stream(lm_data()))
    assert_close(weights(halves.model), weights(whole.model))
    listed = trained(gpt2(), case_arguments(case, max_steps=10, train_sampling_strategy="sequential"), lm_data())
    assert_identical(weights(whole.model), weights(listed.model))


def test_a_stream_that_ends_inside_a_window_carries_it_on():
    """20 samples, batch 4 × 2, nobody knows the end: the stock Trainer carries the odd micro-batch over; so do we."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
    assert_stock(gpt2, lambda: Stream(lm_data(20)), **split)


# ------------------------------------------------------------------------------------------------------- the step


@pytest.mark.quick("ssam-*", "friendly_sam-0.05", "looksam-k=2-0.05")
@pytest.mark.parametrize("norm", [0.0, 0.05, 1.0])
@main_case
def test_only_the_descent_gradient_is_clipped(case: Case, norm: float):
    """Clipping shortens d to `max_grad_norm` and leaves its direction; 0 is off. Never g: methods read its length."""
    constant = {"max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "base_optim": "sgd"}
    model = gpt2()
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    trainer = trained(model, case_arguments(case, max_grad_norm=norm, **constant), lm_data())
    free = trained(gpt2(), case_arguments(case, max_grad_norm=0.0, **constant), lm_data())

    def step(model: nn.Module) -> torch.Tensor:
        return torch.cat([(before[n] - p.detach()).reshape(-1) / 1e-2 for n, p in model.named_parameters()])

    d, clipped = step(free.model), step(trainer.model)
    expected = d if norm == 0.0 else d * min(1.0, norm / float(d.norm()))
    torch.testing.assert_close(clipped, expected, atol=2e-4 * float(expected.norm()), rtol=0)
    ours = [e for e in trainer.state.log_history if "ssam/grad_norm" in e][0]
    theirs = [e for e in free.state.log_history if "ssam/grad_norm" in e][0]
    assert ours["ssam/grad_norm"] == theirs["ssam/grad_norm"]


def test_emptying_the_cache_every_step():
    assert_stock(bert, text_data, torch_empty_cache_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.1}], ids=str)
def test_noise_and_smoothing_are_those_of_the_first_pass(given: dict):
    stock, ours = stock_and_ours(lambda: gpt2(dropout=0.1), lm_data, **given)
    assert_identical(weights(ours.model), weights(stock.model))
    assert losses(ours, "ssam/loss") == losses(ours, "ssam/ascent_loss")
    plain, _ = stock_and_ours(lambda: gpt2(dropout=0.1), lm_data)
    assert losses(stock) != losses(plain), "the feature must be on"


@pytest.mark.few_methods
@main_case
def test_total_flos_count_every_pass(case: Case):
    given = {"gradient_accumulation_steps": 2, "max_steps": 4}
    stock = trained(bert(), arguments(TrainingArguments, optim="sgd", **given), text_data(), cls=MendedTrainer)
    ours = trained(bert(), case_arguments(case, **given), text_data())
    passes = losses(ours, "ssam/total_passes")[-1]
    assert ours.state.total_flos == pytest.approx(stock.state.total_flos * passes / 4)
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen


@pytest.mark.parametrize(("rho", "parts", "calls"), [(0.05, 1, 2), (0.05, 2, 4), (0.0, 4, 2)])
def test_operations_of_a_micro_batch_are_counted_once_for_all_of_its_passes(rho: float, parts: int, calls: int):
    """Each count walks over every module. The parent counts once, we once, and once a part that has a second pass."""
    counted = []

    class Counting(SSAMTrainer):
        def floating_point_ops(self, inputs):
            counted.append(inputs)
            return super().floating_point_ops(inputs)

    args = arguments(optim="ssam", rho=rho, max_steps=3, ascent_scope="micro_batch", num_micro_batches=parts)
    trained(bert(), args, text_data(), cls=Counting)
    assert len(counted) == 3 * calls


def test_input_tokens_are_counted_once():
    stock, ours = stock_and_ours(gpt2, lm_data, include_num_input_tokens_seen="all")
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen > 0


# -------------------------------------------------------------------------------------------- evaluation and search


def evaluated(case: Case, data, **given) -> SSAMTrainer:
    args = case_arguments(
        case,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **given,
    )
    trainer = SSAMTrainer(model=gpt2(), args=args, train_dataset=data, eval_dataset=lm_data(16, seed=3))
    if "max_steps" in given and given["max_steps"] > 8:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", [Case("ssam"), Case("friendly_sam")], ids=lambda c: c.id)
def test_the_best_model_is_loaded_at_the_end(case: Case):
    """At a learning rate that climbs, the best model is an early one; what is loaded scores what the log says."""
    trainer = evaluated(case, lm_data(), max_steps=4, learning_rate=3.0, lr_scheduler_type="constant", max_grad_norm=0)
    best = min(losses(trainer, "eval_loss"))
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_early_stopping_stops():
    trainer = evaluated(
        Case("ssam"), lm_data(), max_steps=20, learning_rate=3.0, lr_scheduler_type="constant", max_grad_norm=0
    )
    assert trainer.state.global_step < 20


def search(space, n_trials: int, method: str = "ssam") -> tuple[SSAMTrainer, object]:
    args = case_arguments(Case(method), eval_strategy="steps", eval_steps=4)
    trainer = SSAMTrainer(
        model_init=lambda trial: gpt2(), args=args, train_dataset=lm_data(), eval_dataset=lm_data(16, seed=3)
    )
    return trainer, lambda: trainer.hyperparameter_search(
        space, n_trials=n_trials, backend="optuna", direction="minimize"
    )


@pytest.mark.slow
def test_a_search_over_rho_trains_each_trial_with_its_own():
    import optuna

    seen = collections.defaultdict(list)

    def space(trial: optuna.Trial) -> dict:
        return {"rho": trial.suggest_categorical("rho", [0.01, 0.5])}

    trainer, run = search(space, 4)
    log = trainer.log

    def recording(logs, *args, **kwargs):
        log(logs, *args, **kwargs)
        if "ssam/perturbation_norm" in logs:
            seen[trainer.args.rho].append(logs["ssam/perturbation_norm"])

    trainer.log = recording
    best = run()
    assert best.hyperparameters["rho"] in seen
    for rho, norms in seen.items():
        assert norms == pytest.approx([rho] * len(norms), rel=1e-4)


def test_a_trial_with_a_bad_rho_is_refused():
    trainer, run = search(lambda trial: {"rho": trial.suggest_float("rho", -2.0, -1.0)}, 1)
    with pytest.raises(ValueError, match="rho: -.* is not allowed; choose a finite number from 0"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize("order", [("ssam", "sgd", "usam"), ("sgd", "ssam", "sgd")], ids="-".join)
def test_a_search_over_methods_and_stock_names_in_any_order(order):
    """The arguments change within the search's call of `train`: each trial is watched as its own `optim` asks."""
    trainer, run = search(lambda trial: {"optim": order[trial.number]}, len(order))
    passes = []
    log = trainer.log

    def recording(logs, *args, **kwargs):
        log(logs, *args, **kwargs)
        if "train_runtime" in logs:
            passes.append((trainer.args.optim, trainer.two_pass is not None))

    trainer.log = recording
    run()
    assert passes == [(optim, optim != "sgd") for optim in order]
