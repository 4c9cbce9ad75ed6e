"""Law 1 for weights that a file left at any address: products of a matrix and one vector round otherwise there."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_ssam import SSAMTrainer
from hf_ssam.engine.passes import Exchange
from tests.support.cases import arguments, assert_identical, weights


def test_a_perturbation_of_nothing_changes_no_bit_of_a_model_read_from_a_folder(tmp_path: Path, monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 129}
    config = BertConfig(vocab_size=101, max_position_embeddings=16, num_labels=3, **sizes)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    draws = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 101, (5,), generator=draws), "labels": i % 3} for i in range(6)]
    moved, move = [], Exchange.move
    monkeypatch.setattr(Exchange, "move", lambda self, *given: (moved.append(1), move(self, *given))[1])

    def ended(rho: float):
        model = BertForSequenceClassification.from_pretrained(tmp_path)
        assert any(p.data_ptr() % 64 for p in model.parameters())
        args = arguments(optim="sam", rho=rho, per_device_train_batch_size=1, max_steps=4)
        trainer = SSAMTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
        return weights(trainer.model)

    assert_identical(ended(1e-30), ended(0.0))
    assert len(moved) == 4
