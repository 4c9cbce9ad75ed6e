"""One warning where the first ascents raise the loss by more than half of itself, read when the Trainer logs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ssam import SSAMTrainer
from hf_ssam.engine.report import StepReport
from hf_ssam.trainer.ascent_rise import STEPS, AscentRise
from tests.support.cases import arguments, trained


def report(loss: float, ascent_loss: float | None) -> StepReport:
    there = None if ascent_loss is None else torch.tensor(ascent_loss)
    return StepReport(torch.tensor(loss), torch.tensor(1.0), torch.tensor(False), there)


def judged(watch: AscentRise, reports: list[StepReport], rho: float = 0.2) -> str | None:
    for each in reports:
        watch.add(each)
    return watch.judge(lambda t: t, rho)


class Linear(nn.Module):
    """L(w) = 1 + ⟨g, w⟩ with ‖g‖ = 3: an ascent of length ρ raises it by 3ρ."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x, labels=None):
        return {"loss": 1.0 + x.mean(0) @ self.w}


ROWS = [{"x": torch.tensor([3.0, 0.0])} for _ in range(64)]


def run(steps: int = 24, **given):
    args = arguments(base_optim="sgd", learning_rate=1e-12, per_device_train_batch_size=2, max_steps=steps, **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trained(Linear(), args, ROWS, callbacks=given.get("callbacks"))
    return trainer, [str(w.message) for w in caught if "ascent raises" in str(w.message)]


def test_rise_of_a_linear_loss_is_rho_times_the_norm_of_its_gradient():
    _, said = run(rho=0.3, logging_steps=7)
    assert len(said) == 1
    assert "rho=0.3" in said[0] and "first 20 perturbed steps" in said[0] and "by 90%" in said[0]
    assert float(re.search(r"so rho=(\S+) would", said[0])[1]) == pytest.approx(0.1 / 3, rel=0.1)


@pytest.mark.parametrize(
    "given", [{"rho": 0.15}, {"rho": 0.3, "steps": STEPS - 1}, {"rho": 3.0, "optim": "momentum_sam"}]
)
def test_rise_is_no_matter_below_a_half_in_a_short_run_and_without_a_second_pass(given):
    assert run(**given)[1] == []


def test_rise_is_judged_once_a_run_and_again_in_the_next():
    trainer, said = run(rho=0.3, logging_steps=1)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="ascent raises the loss"):
        trainer.train()


def test_rise_in_a_resumed_run_is_that_of_its_first_steps_alone(tmp_path):
    kept = {"rho": 0.3, "save_strategy": "steps", "save_steps": 6, "output_dir": str(tmp_path)}
    run(steps=30, **kept)
    said = {}
    for step in (12, 24):
        args = arguments(base_optim="sgd", learning_rate=1e-12, per_device_train_batch_size=2, max_steps=60, **kept)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            SSAMTrainer(Linear(), args, train_dataset=ROWS).train(str(tmp_path / f"checkpoint-{step}"))
        said[step] = [str(w.message) for w in caught if "ascent raises" in str(w.message)]
    assert len(said[12]) == 1 and "first 8 perturbed steps" not in said[24] and said[24] == []


def test_rise_is_the_median_of_the_steps_that_can_be_compared():
    rises = [report(2.0, 2.0 + 2 * r) for r in (0.9, 0.6, 0.7, 0.01, 0.02, *[0.8] * 12)]
    odd = [report(1.0, None), report(-1.0, 5.0), report(1.0, float("nan")), report(1.0, float("inf"))]
    said = judged(AscentRise(), odd + rises)
    assert "by 80%" in said and f"first {len(rises)} " in said and "rho=0.025 " in said


def test_rise_waits_for_the_last_of_the_steps():
    watch = AscentRise()
    assert judged(watch, [report(1.0, 3.0)] * (STEPS - 1)) is None
    assert judged(watch, [report(1.0, 3.0)]) is not None
    assert judged(watch, [report(1.0, 3.0)] * STEPS) is None


def test_rise_is_not_told_by_passes_on_different_samples():
    assert judged(AscentRise(comparable=False), [report(1.0, 3.0)] * STEPS) is None


def test_rise_is_read_at_log_entries_alone(monkeypatch):
    """Law 7: between two entries nothing of it leaves the device."""
    reads = []
    judge = AscentRise.judge
    monkeypatch.setattr(AscentRise, "judge", lambda self, *a: reads.append(len(self._losses)) or judge(self, *a))

    class Entries(TrainerCallback):
        seen = 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            Entries.seen += "loss" in logs

    args = arguments(base_optim="sgd", rho=0.3, max_steps=25, logging_steps=5, learning_rate=1e-12)
    with pytest.warns(UserWarning, match="ascent raises"):
        trained(Linear(), args, ROWS, callbacks=[Entries()])
    assert reads == [5, 10, 15, 20, 0] and Entries.seen == 5
