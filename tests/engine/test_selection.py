"""Which samples the passes run on, what that costs, and where the losses of samples come from."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import dropwhile
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from torch import Tensor, nn

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.engine.per_sample import per_sample_losses
from hf_ssam.methods.ausam import average_rise, by_rise
from hf_ssam.methods.esam import largest_loss_increase
from hf_ssam.rules.selection import Draw, Selection
from hf_ssam.rules.state import MethodState
from hf_ssam.trainer import checks as refusals
from hf_ssam.trainer.checks import refuse_shared_samples
from tests.support.cases import (
    Case,
    assert_close,
    assert_identical,
    bert,
    case_arguments,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)


class Classifier(nn.Module):
    """A network with dropout that takes its labels and returns its loss, as those of transformers do."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()
        self.sizes: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.sizes.append((len(x), torch.is_grad_enabled()))
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(n: int = 8, steps: int = 10) -> list:
    torch.manual_seed(1)
    return [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for _ in range(steps)]


def backward_of(model: nn.Module, batch):
    def run(indices=slice(None)):
        loss = model(batch[0][indices], labels=batch[1][indices])["loss"]
        loss.backward()
        return loss

    return run


def trajectory(method: str, rho: float = 0.1, dropout: float = 0.0, **options) -> tuple[Classifier, TwoPass, list]:
    model, reports = Classifier(dropout), []
    engine = TwoPass(model, method, rho, dataset_size=80, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(2)
    for step, batch in enumerate(data()):
        ids = torch.arange(8 * step, 8 * step + 8)
        reports.append(engine.step(backward_of(model, batch), samples=ids))
        optimizer.step()
        optimizer.zero_grad()
    return model, engine, reports


@pytest.mark.parametrize(("method", "options"), [("esam", {"beta": 1.0, "gamma": 1.0}), ("ausam", {"alpha": 1.0})])
def test_with_all_samples_kept_it_is_sam_bit_for_bit(method, options):
    expected = weights(trajectory("sam", dropout=0.3)[0])
    assert_identical(weights(trajectory(method, dropout=0.3, **options)[0]), expected)


def test_esam_costs_what_its_formula_says():
    """(2 + γ) forwards and (1 + γ) backwards, at γ = ½ of eight samples."""
    model, _, reports = trajectory("esam", gamma=0.5)
    assert model.sizes == [(8, True), (8, False), (4, True)] * 10
    assert {(r.passes, r.forwards) for r in reports} == {(1.5, 2.5)}


def test_ausam_costs_its_share():
    model, _, reports = trajectory("ausam", alpha=0.5)
    assert model.sizes == [(4, True), (4, True)] * 10
    assert {(r.passes, r.forwards) for r in reports} == {(1.0, 1.0)}


def test_without_a_radius_nothing_is_selected():
    for method in ("esam", "ausam"):
        model, engine, _ = trajectory(method, rho=0.0)
        assert model.sizes == [(8, True)] * 10 and engine.state_dict()["memory"] == {}


def test_esam_descends_on_the_samples_whose_loss_rises_most():
    """By hand: g, e, the losses at w and w + e, and the mean gradient of the four that rose most."""
    (x, y), model = data()[0], Classifier()
    params = list(model.parameters())

    def losses() -> Tensor:
        return nn.functional.cross_entropy(model(x, y)["logits"], y, reduction="none")

    before = losses()
    g = torch.autograd.grad(before.mean(), params)
    norm = torch.stack([t.norm() for t in g]).norm()
    with torch.no_grad():
        for p, t in zip(params, g, strict=True):
            p += 0.1 * t / norm
    after = losses()
    chosen = (after - before).topk(4).indices
    expected = torch.autograd.grad(after[chosen].mean(), params)
    model = Classifier()
    TwoPass(model, "esam", 0.1, beta=1.0, gamma=0.5).step(backward_of(model, (x, y)))
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "size", "count"),
    [(0.5, 2, 1), (0.01, 8, 1), (0.5, 7, 4), (0.99, 8, 8), (0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7)],
)
def test_exactly_as_many_are_kept_also_on_ties(gamma, size, count):
    at_w = torch.zeros(size)
    assert len(largest_loss_increase(gamma)(at_w, at_w)) == count
    rises = torch.arange(size).float()
    assert largest_loss_increase(gamma)(at_w, rises).tolist() == list(range(size))[-count:]


def test_losses_are_compared_under_the_same_dropout():
    """With a radius too small to move a weight no loss rises, dropout or not."""
    model = Classifier(dropout=0.5)
    engine, risen = TwoPass(model, "esam", 1e-30, beta=1.0), []
    engine._passes._selection._selection = Selection(between=lambda a, b: (risen.append(b - a), torch.arange(4))[1])
    for batch in data():
        engine.step(backward_of(model, batch))
        model.zero_grad()
    assert all(r.abs().max() == 0 for r in risen)
    with pytest.raises(ValueError, match="replay_rng: method `esam` compares losses of two passes"):
        TwoPass(model, "esam", replay_rng=False)


@pytest.mark.parametrize("noise", ["model", "pass"])
def test_a_look_draws_what_the_call_drew_and_leaves_no_trace(noise):
    """Also where the pass draws before it calls the model, as mixup does; and buffers stay as the look found them."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 16)), Classifier(0.5))
    model[1].net[0] = nn.Linear(16, 16)
    model, (x, y), risen = _Labelled(model.double()), data()[0], []
    engine = TwoPass(model, "esam", 1e-30, beta=1.0)
    engine._passes._selection._selection = Selection(between=lambda a, b: (risen.append(b - a), torch.arange(4))[1])
    seen = []

    def run(indices=slice(None)):
        seen.append({n: b.clone() for n, b in model.named_buffers()})
        shifted = x + torch.randn_like(x) if noise == "pass" else x
        loss = model(shifted[indices], labels=y[indices])["loss"]
        loss.backward()
        return loss

    engine.step(run)
    assert risen[0].abs().max() == 0
    assert_identical(seen[0], seen[1])


class _Labelled(nn.Module):
    """A classifier behind another layer."""

    def __init__(self, net: nn.Sequential):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.net[1](self.net[0](x), labels)


def drawn(mean: Tensor, count: Tensor, step: int, alpha: float = 0.5) -> Tensor:
    memory = MethodState()
    memory.stage_plain({"samples.mean": mean, "samples.count": count})
    memory.commit(torch.tensor(True))
    return by_rise(alpha, 0.1, 1.0, seed=0)(Draw(torch.arange(len(mean)), memory, step, 0))


def test_equal_scores_are_sampled_uniformly():
    """Monte Carlo over 4,000 draws: each of six samples is in half of them, and the subset mean is unbiased."""
    values, total, picked = torch.arange(6.0), 0.0, torch.zeros(6)
    for step in range(4000):
        index = drawn(torch.zeros(6), torch.ones(6), step)
        assert len(index) == 3 and index.tolist() == sorted(set(index.tolist()))
        picked[index] += 1
        total += values[index].mean().item()
    torch.testing.assert_close(picked / 4000, torch.full((6,), 0.5), rtol=0, atol=0.04)
    assert total / 4000 == pytest.approx(values.mean().item(), abs=0.06)


def test_risen_and_unseen_samples_are_drawn_more_often():
    """Weights 0.1, 0.55, 1 for the seen, and 1 for the one never seen; one of four is drawn."""
    mean, count = torch.tensor([0.0, 1.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 1.0, 0.0])
    picked = torch.zeros(4)
    for step in range(4000):
        picked[drawn(mean, count, step, alpha=0.25)] += 1
    weights_ = torch.tensor([0.1, 0.55, 1.0, 1.0])
    torch.testing.assert_close(picked / 4000, weights_ / weights_.sum(), rtol=0, atol=0.03)


def test_scores_are_averages_over_the_visits():
    memory, rises = MethodState(), {0: [], 3: [], 4: []}
    for step in range(5):
        ids = torch.tensor([0, 3]) if step % 2 else torch.tensor([4, 3])
        new = torch.randn(2)
        for i, r in zip(ids.tolist(), new.tolist(), strict=True):
            rises[i].append(r)
        average_rise(ids, new, memory, 5)
        memory.commit(torch.tensor(True))
    for i, values in rises.items():
        assert memory.plain("samples.count")[i] == len(values)
        assert memory.plain("samples.mean")[i].item() == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert memory.plain("samples.count")[1] == 0


def test_scores_survive_a_restart_bit_for_bit():
    model, engine, _ = trajectory("ausam")
    again = Classifier()
    again.load_state_dict(model.state_dict())
    resumed = TwoPass(again, "ausam", 0.1, dataset_size=80)
    resumed.load_state_dict(engine.state_dict())
    ids = torch.arange(8)
    for m, e in ((model, engine), (again, resumed)):
        m.zero_grad()
        e.step(backward_of(m, data()[0]), samples=ids)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert engine.state_dict()["memory"]["plain"]["samples.count"].sum() == 44


def test_scores_of_another_data_set_are_refused():
    _, engine, _ = trajectory("ausam")
    other = TwoPass(Classifier(), "ausam", 0.1, dataset_size=79)
    with pytest.raises(ValueError, match="dataset_size: the state holds scores of 80 samples and the data set has 79"):
        other.load_state_dict(engine.state_dict())
    assert other.clock.steps == 0 and other.state_dict()["memory"] == {}


@pytest.mark.parametrize("ids", [torch.arange(8) + 1, torch.arange(8) - 1])
def test_indices_beyond_the_data_set_are_refused(ids):
    model = Classifier()
    with pytest.raises(ValueError, match="samples: indices from .* are not all of a data set of 8"):
        TwoPass(model, "ausam", dataset_size=8).step(backward_of(model, data()[0]), samples=ids)


def test_one_output_with_integer_labels_is_a_regression():
    model = nn.Module()
    losses = per_sample_losses(model, {"labels": torch.tensor([2, 0])}, {"logits": torch.tensor([[0.5], [1.0]])})
    torch.testing.assert_close(losses, torch.tensor([2.25, 1.0]))


def test_a_compiled_model_called_by_position_is_seen():
    model = torch.compile(Classifier(), backend="eager", dynamic=True)
    x, y = data()[0]

    def run(indices=slice(None)):
        loss = model(x[indices], y[indices])["loss"]
        loss.backward()
        return loss

    assert TwoPass(model, "esam", 0.1).step(run).passes == 1.5


def test_what_selection_needs_is_asked_for():
    with pytest.raises(ValueError, match="dataset_size: method `ausam` keeps a score of each sample"):
        TwoPass(Classifier(), "ausam")
    with pytest.raises(ValueError, match="samples: method `ausam` needs the dataset index of each sample"):
        model = Classifier()
        TwoPass(model, "ausam", dataset_size=8).step(backward_of(model, data()[0]))
    with pytest.raises(ValueError, match="s_min=0.5 is above s_max=0.2"):
        TwoPass(Classifier(), "ausam", dataset_size=8, s_min=0.5, s_max=0.2)


def test_a_model_without_labels_is_refused_and_a_loss_of_ones_own_helps():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(8, 4)

    def run(indices=slice(None)):
        loss = model(x[indices]).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="per_sample_loss: the loss of each sample of Linear is not known"):
        TwoPass(model, "esam", 0.1).step(run)
    model.zero_grad()
    engine = TwoPass(model, "esam", 0.1, per_sample_loss=lambda inputs, outputs: outputs.square().mean(1))
    assert engine.step(run).passes == 1.5


SELECTS = (Case("esam", {"gamma": 0.5}), Case("ausam", {"alpha": 0.5}))


def sizes_seen(trainer_cls: type = SSAMTrainer, case: Case = SELECTS[0], model=None, rows=None, **given) -> tuple:
    """A run, and the sizes of the batches that the model was called with, forwards without gradient negative.

    Those before the first step, which ask whether the loss heeds its count, are left out.
    """
    model, sizes = model or bert(0.0), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"]) * (1 if torch.is_grad_enabled() else -1)),
        with_kwargs=True,
    )
    trainer = trained(model, case_arguments(case, **given), rows or text_data(), cls=trainer_cls)
    return trainer, list(dropwhile(lambda n: n < 0, sizes))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_pays_and_logs_what_the_formula_says(accumulation):
    given = {"gradient_accumulation_steps": accumulation, "max_steps": 2, "model": gpt2(), "rows": lm_data()}
    esam, sizes = sizes_seen(case=SELECTS[0], **given)
    assert sizes == ([8] * accumulation + [-8, 4] * accumulation) * 2
    assert esam.state.log_history[-1]["ssam/total_passes"] == 3
    assert esam.state.log_history[0]["ssam/forwards"] == 2.5
    given["model"] = gpt2()
    ausam, sizes = sizes_seen(case=SELECTS[1], **given)
    assert sizes == [4] * 4 * accumulation
    plain = trained(
        gpt2(), case_arguments(Case("sam", rho=0.0), max_steps=2, gradient_accumulation_steps=accumulation), lm_data()
    )
    assert ausam.state.total_flos == pytest.approx(plain.state.total_flos)
    assert esam.state.total_flos == pytest.approx(plain.state.total_flos * (1.5 + 1 / 3))


@pytest.mark.parametrize(
    "case", (Case("esam", {"beta": 1.0, "gamma": 1.0}), Case("ausam", {"alpha": 1.0})), ids=lambda c: c.id
)
def test_with_all_samples_kept_the_trainer_runs_sam_bit_for_bit(case):
    runs = (
        trained(bert(), case_arguments(c, gradient_accumulation_steps=2), text_data()) for c in (case, Case("sam"))
    )
    assert_identical(*(weights(t.model) for t in runs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    (*SELECTS, Case("sparse_sam"), Case("sparse_sam", {"mask": "dynamic", "update_freq": 1})),
    ids=lambda c: c.id,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_bit_for_bit(case, workers, tmp_path):
    def arguments_for(folder: str, **given):
        return case_arguments(
            case, output_dir=str(tmp_path / folder), max_steps=4, save_strategy="steps", save_steps=2,
            dataloader_num_workers=workers, gradient_accumulation_steps=2, lr_scheduler_type="constant", **given,
        )  # fmt: skip

    whole = trained(bert(), arguments_for("whole"), text_data())
    again = SSAMTrainer(model=bert(seed=7), args=arguments_for("again"), train_dataset=text_data())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_identical(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("wrap", [list, Dataset.from_list], ids=["list", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
def test_scores_belong_to_the_samples_they_came_from(wrap, workers):
    """Every visit is counted under the index of the row whose tokens the model saw."""
    rows = text_data(32)
    model, visits = bert(0.0), torch.zeros(32)
    known = {tuple(r["input_ids"].tolist()): i for i, r in enumerate(rows)}

    def count(module, args, kwargs):
        for row in kwargs["input_ids"].tolist():
            visits[known[tuple(row)]] += 0.5 * torch.is_grad_enabled()

    model.register_forward_pre_hook(count, with_kwargs=True)
    args = case_arguments(SELECTS[1], max_steps=6, gradient_accumulation_steps=2, dataloader_num_workers=workers)
    data = wrap(rows) if wrap is list else wrap([{n: v.tolist() for n, v in r.items()} for r in rows])
    trainer = trained(model, args, data)
    counted = trainer.two_pass.state_dict()["memory"]["plain"]["samples.count"]
    assert torch.equal(counted, visits) and counted.sum() == 6 * 2 * 4


def test_label_smoothing_takes_the_labels_and_they_are_found():
    trainer, sizes = sizes_seen(label_smoothing_factor=0.1, max_steps=2, gradient_accumulation_steps=2)
    assert sizes == [8, 8, -8, 4, -8, 4] * 2


def test_a_trainer_may_bring_its_own_losses():
    class Own(SSAMTrainer):
        asked = 0

        def per_sample_loss(self, inputs, outputs):
            self.asked += 1
            return outputs.logits.detach()[:, 0]

    trainer, sizes = sizes_seen(Own, max_steps=1)
    assert trainer.asked == 3 and sizes == [8, -8, 4]


def test_a_loss_function_without_losses_of_samples_is_refused():
    args = case_arguments(SELECTS[0], max_steps=1)
    trainer = SSAMTrainer(
        model=bert(), args=args, train_dataset=text_data(), compute_loss_func=lambda out, labels, **_: out.logits.sum()
    )
    with pytest.raises(ValueError, match="compute_loss_func: optim=esam needs the loss of each sample"):
        trainer.train()


def test_an_iterable_dataset_is_refused_where_samples_are_scored():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(text_data())

    trainer = SSAMTrainer(model=bert(), args=case_arguments(SELECTS[1]), train_dataset=Stream())
    with pytest.raises(ValueError, match="optim: `ausam` keeps a score of each sample, and an iterable train_dataset"):
        trainer.train()
    trained(bert(), case_arguments(SELECTS[0], max_steps=1), Stream())


@pytest.mark.parametrize(("kind", "shared"), [("tp_size", True), ("cp_size", True), ("dp_shard_size", False)])
def test_ranks_that_share_samples_are_refused_where_samples_are_picked(kind, shared):
    accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(**{kind: 2}))
    trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(optim="esam"))
    refuse_shared_samples(trainer, cuts=False)
    with pytest.raises(NotImplementedError, match="optim=esam .* choose a method") if shared else nullcontext():
        refuse_shared_samples(trainer, cuts=True)


@pytest.mark.parametrize(("case", "cuts"), [(SELECTS[0], True), (Case("ssam"), False)])
def test_the_trainer_asks_before_the_first_batch(case, cuts, monkeypatch):
    asked = []
    monkeypatch.setattr(refusals, "refuse_shared_samples", lambda trainer, cuts: asked.append(cuts))
    trained(bert(), case_arguments(case, max_steps=1), text_data())
    assert asked == [cuts]


def test_a_compiler_with_static_shapes_is_refused():
    args = case_arguments(SELECTS[0], torch_compile=True, torch_compile_backend="eager")
    trainer = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    with pytest.raises(ValueError, match="torch_compile: it is set to static shapes, and optim=esam runs on parts"):
        trainer.train()


@pytest.mark.parametrize("task", ["bert", "gpt2"])
def test_a_split_batch_is_msam(task):
    """num_micro_batches=2 of a batch of 6 equals two micro-batches of 3, also where their token counts differ."""
    build, rows = {"bert": (lambda: bert(0.0), text_data()), "gpt2": (gpt2, lm_data())}[task]
    given = {"ascent_scope": "micro_batch", "max_steps": 5, "learning_rate": 0.1, "max_grad_norm": 0.0}
    split = trained(
        build(), case_arguments(Case("ssam"), per_device_train_batch_size=6, num_micro_batches=2, **given), rows
    )
    accumulated = trained(
        build(),
        case_arguments(Case("ssam"), per_device_train_batch_size=3, gradient_accumulation_steps=2, **given),
        rows,
    )
    assert_close(weights(split.model), weights(accumulated.model), atol=2e-6)
    assert split.state.total_flos == pytest.approx(accumulated.state.total_flos)


@pytest.mark.parametrize("case", SELECTS, ids=lambda case: case.id)
def test_operations_on_some_samples_of_a_split_batch_are_those_of_its_parts(case: Case):
    given = {"ascent_scope": "micro_batch", "max_steps": 3}
    parts = {"per_device_train_batch_size": 4, "num_micro_batches": 2}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    split, accumulated = (trained(bert(), case_arguments(case, **how, **given), text_data()) for how in (parts, steps))
    assert split.state.total_flos == pytest.approx(accumulated.state.total_flos)


def test_uneven_parts_weigh_by_their_samples():
    """Unnormalised ascent, a radius of zero: the gradient of 7 samples in 3 parts is that of the batch."""
    given = {"max_steps": 3, "learning_rate": 0.1, "per_device_train_batch_size": 7, "max_grad_norm": 0.0}
    whole = trained(bert(0.0), case_arguments(Case("sam", rho=0.0), **given), text_data())
    parts = trained(
        bert(0.0),
        case_arguments(Case("sam", rho=0.0), ascent_scope="micro_batch", num_micro_batches=3, **given),
        text_data(),
    )
    assert_close(weights(whole.model), weights(parts.model), atol=2e-6)
    assert parts.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-4)


def test_one_part_is_the_batch_bit_for_bit_and_parts_need_their_scope():
    runs = (
        trained(bert(), case_arguments(Case("ssam"), **given), text_data())
        for given in ({"ascent_scope": "micro_batch", "num_micro_batches": 1}, {})
    )
    assert_identical(*(weights(t.model) for t in runs))
    with pytest.raises(ValueError, match="num_micro_batches: 2 has no effect under ascent_scope=global"):
        case_arguments(Case("ssam"), num_micro_batches=2)
    with pytest.raises(ValueError, match="num_micro_batches: 0 is not allowed"):
        case_arguments(Case("ssam"), num_micro_batches=0)
