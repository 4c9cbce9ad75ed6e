"""Which samples the passes run on, what that costs, and where the losses of samples come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.rules import Memory
from hf_ssam.selection import Draw, average_rise, by_rise, sharpest
from tests.cases import assert_identical, weights


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


@pytest.mark.parametrize(
    ("method", "options"), [("esam", {"beta": 1.0, "gamma": 1.0}), ("ausam", {"alpha": 1.0})]
)
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


@pytest.mark.parametrize(("gamma", "size"), [(0.5, 2), (0.01, 8), (0.5, 7), (0.99, 8)])
def test_exactly_as_many_are_kept_also_on_ties(gamma, size):
    at_w = torch.zeros(size)
    assert len(sharpest(gamma)(at_w, at_w)) == max(1, math.ceil(gamma * size))
    rises = torch.arange(size).float()
    assert sharpest(gamma)(at_w, rises).tolist() == list(range(size))[-max(1, math.ceil(gamma * size)) :]


def test_losses_are_compared_under_the_same_dropout():
    """With a radius too small to move a weight no loss rises, dropout or not."""
    model = Classifier(dropout=0.5)
    engine, risen = TwoPass(model, "esam", 1e-30, beta=1.0), []
    engine._selection = type(engine._selection)(between=lambda a, b: (risen.append(b - a), torch.arange(4))[1])
    for batch in data():
        engine.step(backward_of(model, batch))
    assert all(r.abs().max() == 0 for r in risen)
    with pytest.raises(ValueError, match="replay_rng: method `esam` compares losses of two passes"):
        TwoPass(model, "esam", replay_rng=False)


def drawn(mean: Tensor, count: Tensor, step: int, alpha: float = 0.5) -> Tensor:
    memory = Memory()
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
    memory, rises = Memory(), {0: [], 3: [], 4: []}
    for step in range(5):
        ids = torch.tensor([0, 3]) if step % 2 else torch.tensor([4, 3])
        new = torch.randn(2)
        for i, r in zip(ids.tolist(), new.tolist(), strict=True):
            rises[i].append(r)
        average_rise(ids, new, lambda t: t, memory, 5)
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
