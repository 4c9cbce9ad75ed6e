"""A user's own method in a user's own file: its equation, and the ordinary script that runs it by name."""

from __future__ import annotations

import importlib
import json
import sys

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_ssam import TwoPass
from hf_ssam.methods import table
from support import offline
from tests.examples.scripts import run_script


@pytest.fixture
def registered():
    """The method in the live table for one test, by importing the script as its user runs it."""
    script = importlib.import_module("custom_method")
    yield script
    del table._TABLE["sign_sam"]
    del sys.modules["custom_method"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_custom_method_takes_the_gradient_at_its_equation(registered, power):
    torch.manual_seed(0)
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    w = layer.weight.detach().clone()

    def gradient(at):
        return 2 / 5 * (at @ a.T - b) @ a

    def forward_backward():
        loss = (layer(a)[:, 0] - b).square().mean()
        loss.backward()
        return loss

    TwoPass(layer, "sign_sam", rho=0.3, power=power).step(forward_backward)
    g = gradient(w)
    s = g.sign() * g.abs() ** power
    torch.testing.assert_close(layer.weight.grad, gradient(w + 0.3 * s / s.norm()), rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.weight, w)


@pytest.mark.slow
def test_custom_method_trains_by_its_name_and_is_on_the_card(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**size)).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(tmp_path / "tiny")
    pd.DataFrame({"text": ["good film", "bad film"] * 4, "label": ["p", "n"] * 4}).to_csv(tmp_path / "train.csv")
    given = {
        "--optim": "sign_sam", "--rho": 0.25, "--optim_args": "power=0.5", "--train_file": tmp_path / "train.csv",
        "--model_name_or_path": tmp_path / "tiny", "--output_dir": tmp_path / "out", "--max_steps": 2,
        "--logging_steps": 1, "--save_strategy": "no", "--report_to": "none", "--use_cpu": "true",
        "--text_column_names": "text",
    }  # fmt: skip
    out = run_script("custom_method.py", *(word for pair in given.items() for word in pair))
    assert "results after 2 steps" in out
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    moved = [entry["ssam/perturbation_norm"] for entry in log if "ssam/perturbation_norm" in entry]
    assert moved == pytest.approx([0.25, 0.25], rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sign_sam" in card and "power" in card
