"""What an accuracy costs: read off curves whose costs are known, and from two runs of a real Trainer."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import yaml
from transformers import TrainingArguments

import time_to_accuracy
from hf_ssam import SSAMTrainer
from tests.support.cases import Case, MendedTrainer, arguments, bert, case_arguments, text_data
from time_to_accuracy import cost_of_reaching

CURVE = ((0.0, 0.1), (10.0, 0.5), (20.0, 0.4), (30.0, 0.8))


@pytest.mark.parametrize(
    ("target", "cost"), [(0.05, 0.0), (0.1, 0.0), (0.3, 5.0), (0.5, 10.0), (0.6, 25.0), (0.8, 30.0), (0.9, math.inf)]
)
def test_cost_of_an_accuracy_is_where_the_curve_first_has_it(target, cost):
    assert cost_of_reaching(CURVE, target) == pytest.approx(cost)


def accuracy(prediction) -> dict:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trains(argv) -> None:
    """What an example's `main` does, on a model of 5,000 parameters: 12 steps, evaluated before them and every 3."""
    flags = dict(zip(argv[1::2], argv[2::2], strict=True))
    given = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    given |= {"output_dir": flags["--output_dir"], "seed": int(flags["--seed"]), "learning_rate": 0.1}
    if flags["--optim"] == "sgd":
        args, cls = arguments(TrainingArguments, optim="sgd", **given), MendedTrainer
    else:
        args, cls = case_arguments(Case(flags["--optim"]), **given), SSAMTrainer
    data = {"train_dataset": text_data(), "eval_dataset": text_data(32, seed=3)}
    trainer = cls(model=bert(0.0), args=args, compute_metrics=accuracy, **data)
    trainer.train()
    trainer.save_metrics("all", trainer.evaluate())
    trainer.save_state()


@pytest.fixture
def plan(monkeypatch, tmp_path) -> Path:
    script = ModuleType("a_short_script")
    script.main = trains
    monkeypatch.setitem(sys.modules, "a_short_script", script)
    values = {
        "title": "A test", "script": "a_short_script", "config": "task.yaml", "flags": {}, "baseline": "base",
        "methods": {"base": {"optim": "sgd"}, "sam": {"optim": "sam"}, "looksam": {"optim": "looksam"}},
        "seeds": [1], "learning_rates": [0.1], "budgets": ["epochs"], "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "plan.yaml"


def test_time_to_accuracy_of_real_runs_counts_their_passes(plan, tmp_path, capsys):
    rows = time_to_accuracy.main([str(plan)])
    folder = tmp_path / "out"
    pd.testing.assert_frame_equal(pd.read_csv(folder / "time_to_accuracy.csv"), rows)
    assert (folder / "time_to_accuracy.png").stat().st_size > 5000
    assert "| looksam |" in capsys.readouterr().out
    for method, price in (("base", 1.0), ("sam", 2.0), ("looksam", 15 / 12)):
        own = rows[rows.method == method]
        log = json.loads((folder / f"epochs/{method}-lr0.1-seed1" / "trainer_state.json").read_text())["log_history"]
        scores = {e["step"]: e["eval_accuracy"] for e in log if "eval_accuracy" in e}
        best = max(scores.values())
        assert (np.isfinite(own.gradients) == (own.accuracy <= best)).all()
        # The last accuracy that it has is had by the evaluation that was the first to be as good.
        first = next(step for step, score in scores.items() if score == best)
        assert own.gradients[np.isfinite(own.gradients)].max() <= first * price * 1.2 + 1e-9
    assert set(rows.method) == {"base", "sam", "looksam"}
