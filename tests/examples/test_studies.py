"""The studies: closed forms and brute force behind what they measure, and the short form of each."""

from __future__ import annotations

import json
import math
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import run_study
from studies import agreement, label_noise, learning_rates, saddles, stability, tasks
from support import calibration, robustness, summary_figure
from support.descent import Point, descent
from support.pictures import Pictures, relabelled, training_arguments
from support.results_page import CONFIGS
from support.study import read_plan

STUDIES = sorted(CONFIGS.glob("*.yaml"))
ON_MODELS = ("robustness", "curvature")
"""They look at the models that the study of wrong labels left."""


def the(name: str):
    return CONFIGS / f"{name}.yaml"


@pytest.mark.quick("0.05", "0.4")
@pytest.mark.parametrize("rho", [0.05, 0.2, 0.4, 0.45, 0.6])
def test_saddle_usam_takes_the_steps_of_the_closed_form(rho):
    settings = {"learning_rate": 0.05, "most_steps": 600}
    found = saddles.measure({**settings, "method": "usam", "rho": rho})["steps"]
    assert found == saddles.usam_steps(0.05, rho) == {0.05: 54, 0.2: 80, 0.4: 233, 0.45: 463, 0.6: math.inf}[rho]
    assert saddles.measure({**settings, "rho": 0.0})["steps"] == saddles.usam_steps(0.05, 0.0) == 49


@pytest.mark.parametrize("rho", [0.05, 0.4, 0.45])
def test_saddle_ssam_takes_the_steps_of_a_loop_over_two_numbers(rho):
    x, y, steps = 0.5, 0.01, 0
    while abs(y) <= 1:
        g = np.array([2 * x, -2 * y])
        up = np.array([2 * (x + rho * g[0]), -2 * (y + rho * g[1])])
        x, y = np.array([x, y]) - 0.05 * up * np.linalg.norm(g) / np.linalg.norm(up)
        steps += 1
    settings = {"learning_rate": 0.05, "most_steps": 600, "method": "ssam", "normalize": False, "rho": rho}
    assert saddles.measure(settings)["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "ssam"])
def test_saddle_holds_a_normalised_ascent(method):
    found = saddles.measure({"learning_rate": 0.05, "most_steps": 400, "method": method, "rho": 0.05})
    assert found["steps"] == math.inf and abs(found["y"]) < 0.05


@pytest.mark.quick("0.5")
@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5])
def test_learning_rate_limits_of_a_quadratic_are_the_closed_forms(rho):
    settings = {"problem": "quadratic", "last_rate": 1.0, "factor": 1.02, "steps": 150, "trained": 1e-2}
    for arm in ({}, {"method": "usam"}, {"method": "ssam", "normalize": False}):
        limit = learning_rates.closed_form(arm, rho, learning_rates.LAMBDA)
        found = learning_rates.measure({**settings, **arm, "rho": rho, "seed": 0, "first_rate": 0.93 * limit})
        assert found["largest_rate"] < limit < found["first_that_fails"] * 1.02
        assert found["first_that_fails"] == pytest.approx(limit, rel=0.04)


@pytest.mark.slow
def test_learning_rates_that_are_too_slow_are_passed_over():
    settings = {"problem": "quadratic", "last_rate": 1.0, "factor": 1.05, "steps": 20, "trained": 1e-2, "seed": 0}
    found = learning_rates.measure({**settings, "rho": 0.0, "first_rate": 0.005})
    assert found["largest_rate"] < 0.5 < found["first_that_fails"] * 1.05 and found["largest_rate"] > 0.4


def test_learning_rate_closed_forms():
    assert learning_rates.closed_form({"method": "usam"}, 0.3, 4.0) == pytest.approx(0.22727, abs=1e-5)
    assert learning_rates.closed_form({"method": "ssam", "normalize": False}, 0.3, 4.0) == 0.5
    assert math.isnan(learning_rates.closed_form({"method": "sam"}, 0.3, 4.0))


def test_twins_of_a_linear_model_drift_as_the_recursion_says():
    """w ← w − η Aᵀ(Aw − b)/n for both twins, in NumPy, against the distance that the study's own parts give."""
    rows, eta, steps = 6, 0.3, 25
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows + 1, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(rows + 1, generator=generator, dtype=torch.float64)
    order = [torch.arange(rows)] * steps
    ends = []
    for stands_for in (0, rows):
        point = Point([0.0, 0.0, 0.0], lambda at, a=a, b=b: at.sum())
        model = Linear(point, a, b)
        loss = stability.losses(model, {"rows": torch.arange(rows + 1)}, order, stands_for)
        list(islice(descent(model, loss, {}, eta), steps))
        chosen = np.array([stands_for, *range(1, rows)])
        x, y, w = a.numpy()[chosen], b.numpy()[chosen], np.zeros(3)
        for _ in range(steps):
            w = w - eta * x.T @ (x @ w - y) / rows
        assert stability.flat(model).numpy() == pytest.approx(w, rel=1e-12)
        ends.append(w)
    assert np.linalg.norm(ends[0] - ends[1]) > 0.01


class Linear(nn.Module):
    """½ mean (aᵢw − bᵢ)² over the rows asked for."""

    def __init__(self, point, a, b):
        super().__init__()
        self.point, self.a, self.b = point, a, b

    def forward(self, rows):
        residual = self.a[rows] @ self.point.at - self.b[rows]
        return type("Out", (), {"loss": 0.5 * residual.square().mean()})


def test_agreement_on_a_quadratic_is_that_of_two_matrix_products():
    """ĝ = g + ρ H g/‖g‖ where H = diag(h); AdamW's second moments are those of one step, v = 0.001 g₀²."""
    h, start, rho = np.array([1.0, 30.0]), np.array([2.0, 0.1]), 0.3
    point = Point(start.tolist(), lambda at: type("Out", (), {"loss": (at.square() @ torch.tensor(h)) / 2}))
    optimizer = torch.optim.AdamW(point.parameters(), lr=0.01, weight_decay=0.0)
    task = agreement.Task(point, {}, optimizer, "linear", 1.0)
    point.at.grad = agreement.gradient(point, {}, 0)[1][0]
    optimizer.step()
    w = point.at.detach().numpy().copy()
    found = agreement.compared(task, {}, 0, agreement.gradient(point, {}, 0), rho)
    g, divisor = h * w, np.sqrt(0.001) * np.abs(h * start) + 1e-8
    up = g + rho * h * g / np.linalg.norm(g)

    def cosine(u, v):
        return u @ v / np.linalg.norm(u) / np.linalg.norm(v)

    above = w + rho * g / np.linalg.norm(g)
    assert found["cosine"] == pytest.approx(cosine(g, up), rel=1e-9)
    assert found["seen"] == pytest.approx(cosine(g / divisor, up / divisor), rel=1e-9)
    assert found["rise"] == pytest.approx((h @ above**2) / (h @ w**2) - 1, rel=1e-9)
    assert found["cosine"] != pytest.approx(found["seen"], rel=1e-3)
    assert (point.at.detach().numpy() == w).all()


def test_twins_differ_whatever_the_seed():
    assert {stability.spare(200, seed) for seed in range(12)} == set(range(200, 200 + stability.SPARE))


def test_twins_see_whole_epochs():
    order = stability.batches(10, 4, 7, seed=0)
    assert [len(part) for part in order] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(order[:3]).tolist()) == list(range(10))


def test_labels_are_replaced_at_the_rate_asked_for():
    clean = Pictures(torch.zeros(20_000, 1), torch.arange(20_000) % 10)
    wrong = relabelled(clean, 0.4, seed=1).labels != clean.labels
    assert wrong.double().mean().item() == pytest.approx(0.36, abs=0.012)  # 3.5 standard deviations
    assert torch.equal(relabelled(clean, 0.0, seed=1).labels, clean.labels)
    assert torch.equal(relabelled(clean, 0.4, seed=1).labels, relabelled(clean, 0.4, seed=1).labels)


def test_an_arm_whose_method_there_is_not_is_refused_and_does_not_train_as_the_baseline():
    settings = {"base_optim": "sgd", "num_train_epochs": 1}
    assert training_arguments(settings, "out").optim == "sgd"
    assert training_arguments({**settings, "optim": "ssam", "rho": 0.3}, "out").rho == 0.3
    with pytest.raises(ValueError, match="no_such_sam"):
        training_arguments({**settings, "optim": "no_such_sam"}, "out")


def test_stopping_early_reads_the_test_score_where_the_held_out_one_peaked_first():
    assert label_noise.stopped("[0.5, 0.7, 0.7]", "[0.1, 0.2, 0.9]") == 0.2


def test_calibration_error_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.6, 0.4], [0.45, 0.55]], dtype=torch.double)
    labels = torch.tensor([0, 1, 0, 1])
    by_hand = (abs(1 - 0.95) + abs(0 - 0.92) + abs(1 - 0.6) + abs(1 - 0.55)) / 4  # 0.6 and 0.55 share a bin and a sign
    assert calibration.expected_calibration_error(probabilities, labels) == pytest.approx(by_hand)
    assert calibration.expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(
        abs(3 / 4 - 3.02 / 4)
    )


def test_temperature_undoes_a_scale_and_the_brier_score_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, 3, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    assert calibration.temperature(true * 4, labels) == pytest.approx(4.0, rel=0.05)
    found = calibration.calibration(true * 4, labels, (true * 4, labels))
    assert found["ece_scaled"] < 0.02 < found["ece"]
    p = (true * 4).softmax(1).numpy()
    brier = np.mean([np.sum((row - np.eye(3)[label]) ** 2) for row, label in zip(p, labels, strict=True)])
    assert found["brier"] == pytest.approx(brier, rel=1e-5)


def test_rounding_by_hand_and_by_its_bound():
    weight = torch.tensor([[7.0, -3.4, 0.6], [0.0, 0.0, 0.0], [0.07, 0.011, -0.07]])
    assert torch.allclose(robustness.rounded(weight, 4), torch.tensor([[7.0, -3, 1], [0, 0, 0], [0.07, 0.01, -0.07]]))
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4, 3):
        step = weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = robustness.rounded(weight, bits)
        assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
        assert max(len(channel.unique()) for channel in rounded) <= 2**bits - 1
    assert torch.equal(robustness.rounded(weight[0, 0, 0], 3), weight[0, 0, 0])


def test_noise_has_the_share_of_the_root_mean_square():
    weight = 3 * torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    noise = robustness.noised(weight, 0.1, torch.Generator().manual_seed(1)) - weight
    assert noise.square().mean().sqrt().item() == pytest.approx(0.1 * weight.square().mean().sqrt().item(), rel=0.02)


def test_damage_leaves_the_model_as_it_was_and_draws_alike_for_all(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def score():
        seen.append(model.weight.detach().clone())
        return float(model.weight.sum())

    found = robustness.damaged(model, score, bits=[4], shares=[0.5], draws=3)
    assert list(found) == ["clean", "bits_4", "noise_0.5"] and len(seen) == 5
    assert found["noise_0.5"] == pytest.approx(np.mean([float(w.sum()) for w in seen[2:]]), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first = [w.clone() for w in seen[2:]]
    seen.clear()
    robustness.damaged(model, score, bits=[4], shares=[0.5], draws=3)
    assert all(torch.equal(a, b) for a, b in zip(first, seen[2:], strict=True))
    with pytest.raises(RuntimeError), robustness.changed(model, torch.zeros_like):
        raise RuntimeError
    assert torch.equal(model.weight, before["weight"])


def test_summary_pairs_by_seed_and_skips_what_has_not_run():
    rows = pd.DataFrame(
        [("SSAM", 1, 0.4, 0.80), ("SSAM", 2, 0.4, 0.82), ("SSAM", 3, 0.4, 0.9), ("SGD", 1, 0.4, 0.6),
         ("SGD", 2, 0.4, 0.63), ("SGD", 1, 0.0, 0.9)],
        columns=["arm", "seed", "noise", "test_accuracy"],
    )  # fmt: skip
    one = summary_figure.Contrast("x", "label_noise", "SSAM", "SGD", "test_accuracy", (("noise", 0.4),))
    assert one.differences(rows) == pytest.approx([20, 19])
    assert len(one.differences(pd.DataFrame())) == 0


def test_forgetting_is_the_fall_since_a_task_was_fresh():
    table = np.array([[0.9, 0.5, 0.5], [0.8, 1.0, 0.5], [0.6, 0.7, 0.8]])
    found = tasks.summary(table)
    assert found["accuracy"] == pytest.approx(0.7) and found["fresh_accuracy"] == pytest.approx(0.9)
    assert found["forgetting"] == pytest.approx((0.3 + 0.3) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in STUDIES if p.stem not in ON_MODELS], ids=lambda p: p.stem)
def test_a_study_runs_in_its_short_form_and_draws(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run_study.main(["run", str(path), "--fast", "--output_dir", str(tmp_path / "out")])
    plan = read_plan(path).shortened()
    asked = [c for block in plan.blocks for c in plan.report_cells(block, lambda arm: {})]
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert (rows["phase"] == "report").sum() == len(asked)
    assert all(cell.arm in text for cell in asked)
    figures = list((tmp_path / "out").glob("*.png"))
    assert len(figures) == 1 and figures[0].stat().st_size > 10_000
    if path.stem == "label_noise":
        tuned_on_other_data(rows)
        for name in ON_MODELS:
            run_study.main(["run", str(the(name)), "--fast", "--output_dir", str(tmp_path / name)])
            assert len(pd.read_csv(tmp_path / name / "rows.csv")) == 6


def tuned_on_other_data(rows):
    parts = {phase: {json.loads(s)["part"] for s in own["settings"]} for phase, own in rows.groupby("phase")}
    assert parts == {"report": {"report"}, "tuning": {"tuning"}}
    assert rows.loc[rows["phase"] == "tuning", "test_accuracy"].isna().all()
    assert rows.loc[rows["phase"] == "report", "test_accuracy"].notna().all()
    ranges = [(start, stop) for part in label_noise.PARTS.values() for start, stop in part]
    assert all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(ranges) for b in ranges[i + 1 :])
