"""The first script that a user copies: it trains with SSAM, evaluates, saves, and pushes only where it is asked to."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import quickstart
from hf_ssam.run_folder import read_run
from support import offline
from tests.examples.scripts import ROOT


@pytest.fixture
def given(tmp_path):
    """Flags: a tiny model and a folder with the splits of a data set."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**size)).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(tmp_path / "tiny")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good", "so-so"])})
    rows = Dataset.from_dict({"text": ["good film", "bad film", "film"] * 8, "label": [1, 0, 2] * 8}, features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    flags = {"--model": tmp_path / "tiny", "--dataset": tmp_path / "data", "--output_dir": tmp_path / "out"}
    return [str(word) for pair in flags.items() for word in pair] + ["--max_steps", "2"]


def test_quickstart_trains_evaluates_and_leaves_a_model_that_knows_its_labels(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart.SSAMTrainer, "push_to_hub", lambda trainer: pytest.fail("nobody asked to push"))
    seen = []
    save = quickstart.SSAMTrainer.save_model
    monkeypatch.setattr(quickstart.SSAMTrainer, "save_model", lambda t, *a, **k: (seen.append(t), save(t, *a, **k)))
    quickstart.main(given)
    assert "'eval_accuracy': " in capsys.readouterr().out
    assert seen[-1].state.log_history[-2]["ssam/total_passes"] == 4
    assert "eval_accuracy" in read_run(tmp_path / "out").log[-1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").num_labels == 3


def test_quickstart_pushes_where_a_repository_is_named(given, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        quickstart.SSAMTrainer, "push_to_hub", lambda trainer: pushed.append(trainer.args.hub_model_id)
    )
    quickstart.main([*given, "--push_to", "me/my-model"])
    assert pushed == ["me/my-model"]


def test_quickstart_is_forty_lines():
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 40
