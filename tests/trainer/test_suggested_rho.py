"""`suggest_rho` of the Trainer: measured before the first step, said in one line, kept by the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_ssam import SSAMTrainer
from tests.support.cases import arguments, assert_identical, bert, text_data, trained, weights


class Linear(nn.Module):
    """L(w) = 2 + ⟨mean x, w⟩: an ascent of length ρ raises it by ρ ‖mean x‖."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x, labels=None):
        return {"loss": 2.0 + x.mean(0) @ self.w}


ROWS = [{"x": torch.tensor([3.0, 4.0 if i % 2 else -4.0])} for i in range(64)]
"""Any one row has a gradient of length 5, all of them together one of length 3."""


def run(rows=ROWS, model=None, **given):
    settings = {"base_optim": "sgd", "learning_rate": 1e-9, "suggest_rho": True, "max_steps": 4, **given}
    return trained(model or Linear(), arguments(**settings), rows)


def test_rho_raises_a_linear_loss_by_a_tenth_and_is_trained_with(capsys):
    trainer = run([ROWS[1]] * 64)
    assert trainer.args.rho == trainer.two_pass.rho == 0.04  # 0.1 · 2 / 5
    entry = trainer.state.log_history[0]
    assert entry["ssam/perturbation_norm"] == pytest.approx(0.04, rel=1e-4) and entry["ssam/rho"] == 0.04
    assert entry["ssam/ascent_loss"] == pytest.approx(2.2, rel=1e-4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("suggest_rho: ")]
    assert said == [
        "suggest_rho: rho 0.04: the ascent of ssam raises the loss by 10% "
        "(0.04 to 0.04 over 4 batches of loss 2 after 48 plain steps, undone)"
    ]


def test_rho_is_measured_on_whole_steps():
    """Two micro-batches of one row each are a step of both, whose gradient is shorter than each one's."""
    pair = run(per_device_train_batch_size=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    assert pair.args.rho == pytest.approx(0.1 * 2 / 3, abs=0.001)
    alone = run(per_device_train_batch_size=1, train_sampling_strategy="sequential")
    assert alone.args.rho == pytest.approx(0.1 * 2 / 5, abs=0.001)


def test_rho_measured_leaves_the_run_as_it_is_with_that_rho():
    measured = run(text_data(), bert(), learning_rate=0.1, optim="friendly_sam")
    given = run(text_data(), bert(), learning_rate=0.1, optim="friendly_sam", suggest_rho=False, rho=measured.args.rho)
    assert_identical(weights(measured.model), weights(given.model))
    for a, b in zip(measured.state.log_history[:-1], given.state.log_history[:-1], strict=True):
        assert a == b


def test_rho_is_the_checkpoints_when_a_run_goes_on(tmp_path, capsys):
    kept = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole = run(text_data(), bert(), **kept)
    saved = json.loads(Path(tmp_path, "checkpoint-2", "ssam_state.json").read_text())["rho"]
    assert saved == whole.args.rho != 0.05
    capsys.readouterr()
    settings = {"base_optim": "sgd", "suggest_rho": True, "max_steps": 4, **kept}
    resumed = SSAMTrainer(bert(), arguments(**settings), train_dataset=text_data())
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert resumed.args.rho == saved
    assert f"suggest_rho: rho {saved:g}, as {tmp_path}/checkpoint-2 has it" in capsys.readouterr().out
    assert_identical(weights(whole.model), weights(resumed.model))


def test_rho_is_measured_anew_when_the_checkpoint_is_of_another_method(tmp_path):
    kept = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    run([ROWS[1]] * 64, **kept, optim="usam")
    settings = {"base_optim": "sgd", "suggest_rho": True, "max_steps": 4, "learning_rate": 1e-9, **kept}
    resumed = SSAMTrainer(Linear(), arguments(**settings), train_dataset=[ROWS[1]] * 64)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert resumed.args.rho == 0.04
