"""The short examples over other libraries: each takes the step of `TwoPass` in a loop written out here, or logs it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BertModel

from hf_ssam import TwoPass
from integrations import accelerate_loop, optuna_search, sentence_embeddings, trackers, trl_trainers
from tests.examples.scripts import ROOT
from tests.support.cases import assert_close, bert, gpt2, text_data, weights
from tests.trainer.test_hosts import encoder, tokenizer

RUN = {"max_steps": 3, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def by_hand(model, batches, lr, accumulate=1, clip=None):
    """The weights after an SGD step of SSAM for each window, with the engine alone."""
    two_pass, optimizer = TwoPass(model.train(), rho=0.05), torch.optim.SGD(model.parameters(), lr=lr)

    def run(batch):
        loss = model(**batch).loss / accumulate
        loss.backward()
        return loss

    batches = iter(batches)
    while window := list(islice(batches, accumulate)):
        two_pass.step([lambda batch=batch: run(batch) for batch in window])
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_accelerate_loop_steps_once_a_window() -> None:
    batches, model = DataLoader(text_data(24), 4), bert(dropout=0.0)
    reports = accelerate_loop.train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, steps=3, accumulate=2)
    assert [report.passes for report in reports] == [2, 2, 2]
    assert_close(weights(model), by_hand(bert(dropout=0.0), batches, 0.1, accumulate=2, clip=1.0))


def test_lightning_module_takes_the_step_of_the_engine(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pip install pytorch-lightning")
    from integrations.lightning_module import SharpnessAware

    batches = DataLoader(text_data(24), 8)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = SharpnessAware(bert(dropout=0.0), lr=0.1)
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, batches)
    assert_close(weights(module.model), by_hand(bert(dropout=0.0), batches, 0.1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = SharpnessAware(bert(dropout=0.0), lr=0.1)
    lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **options).fit(
        again, batches, ckpt_path=tmp_path / "end.ckpt", weights_only=False
    )
    assert_close(weights(again.model), by_hand(bert(dropout=0.0), [*batches, *batches], 0.1))


def test_trl_sft_and_dpo_take_two_passes(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": [f"w{i} w5 w6 w7" for i in range(8, 16)]})
    sft = trl_trainers.fine_tune(gpt2(), tokenizer(), rows, str(tmp_path), **RUN, report_to="none", bf16=False)
    pairs = {"prompt": ["w5 w6"] * 8, "chosen": ["w7 w8"] * 8, "rejected": ["w9"] * 8}
    gpt2().save_pretrained(tmp_path / "tiny")  # the reference model is loaded from where the model came from
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    dpo = trl_trainers.prefer(
        model, tokenizer(), Dataset.from_dict(pairs), str(tmp_path), **RUN, report_to="none", bf16=False
    )
    for trainer in (sft, dpo):
        assert [e["ssam/total_passes"] for e in trainer.state.log_history if "loss" in e] == [2, 4, 6]


def test_sentence_embeddings_take_two_passes(tmp_path: Path) -> None:
    BertModel(bert().config).save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    pairs = Dataset.from_dict({"anchor": ["w5 w6", "w7 w8"] * 8, "positive": ["w6 w5", "w8"] * 8})
    trainer = sentence_embeddings.train(encoder(str(tmp_path / "tiny")), pairs, str(tmp_path), **RUN, report_to="none")
    assert [e["ssam/total_passes"] for e in trainer.state.log_history if "loss" in e] == [2, 4, 6]


def test_optuna_searches_rho_and_the_learning_rate(tmp_path: Path) -> None:
    best = optuna_search.search(
        lambda trial: bert(), text_data(16), text_data(8), None, str(tmp_path), trials=2, **RUN, report_to="none"
    )
    assert best.hyperparameters.keys() == {"rho", "learning_rate"} and 0.01 <= best.hyperparameters["rho"] <= 0.2
    assert best.objective > 0


def test_trackers_tensorboard_gets_our_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = trackers.train(
        bert(), text_data(24), str(tmp_path / "out"), "tensorboard", **{**RUN, "logging_steps": 1}
    )
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    said = [event.value for event in events.Scalars("train/ssam/ascent_loss")]
    logged = [e["ssam/ascent_loss"] for e in trainer.state.log_history if "ssam/ascent_loss" in e]
    assert len(said) == 3 and said == pytest.approx(logged[:3])


def test_integrations_are_at_most_sixty_lines() -> None:
    files = list((ROOT / "examples" / "integrations").glob("*.py"))
    assert len(files) == 6
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)
