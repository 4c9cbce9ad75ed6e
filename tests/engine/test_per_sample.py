"""The losses of samples against the model's own loss of each sample alone, family by family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_ssam.engine.per_sample import per_sample_losses
from tests.support.cases import bert, gpt2, image_data, lm_data, resnet, text_data

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def stacked(rows: list[dict]) -> dict:
    return {n: torch.stack([r[n] for r in rows]) for n in rows[0]}


def t5() -> nn.Module:
    sizes = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def llama() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def regression_bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))


def tags_bert() -> nn.Module:
    config = BertConfig(**SMALL, num_labels=4, problem_type="multi_label_classification")
    return BertForSequenceClassification(config)


def with_labels(rows: list[dict], label) -> list[dict]:
    return [{**r, "labels": label(i, r)} for i, r in enumerate(rows)]


FAMILIES = {
    "sequence classification": (lambda: bert(0.0), text_data(6)),
    "image classification": (resnet, image_data(6)),
    "regression": (regression_bert, with_labels(text_data(6), lambda i, r: torch.tensor(0.3 * i))),
    "several labels": (
        tags_bert,
        with_labels(text_data(6), lambda i, r: torch.tensor([i % 2, 1, 0, i % 3 == 0]).float()),
    ),
    "token classification": (
        lambda: BertForTokenClassification(BertConfig(**SMALL, num_labels=3)),
        with_labels(lm_data(6), lambda i, r: (r["labels"] % 3).where(r["labels"] >= 0, -100)),
    ),
    "masked language model": (lambda: BertForMaskedLM(BertConfig(**SMALL)), lm_data(6)),
    "causal language model": (lambda: gpt2(0.0), lm_data(6)),
    "causal language model, Llama": (llama, lm_data(6)),
    "sequence to sequence": (t5, lm_data(6)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_is_that_of_the_sample_alone(family):
    set_seed(0)
    build, rows = FAMILIES[family]
    model = build().eval()
    batch = stacked(rows)
    with torch.no_grad():
        losses = per_sample_losses(model, batch, model(**batch))
        alone = torch.stack([model(**stacked([row])).loss for row in rows])
    assert losses.shape == (6,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, alone.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ({}, {"logits": torch.zeros(2, 3)}, "it gives no `logits`, or its batch has no `labels`"),
        ({"labels": torch.zeros(2)}, {}, "it gives no `logits`"),
        ({"labels": torch.zeros(2).long()}, {"logits": torch.zeros(2, 3, 4)}, "do not tell"),
        ({"labels": torch.zeros(2, 3)}, {"logits": torch.zeros(2, 4)}, "do not match"),
    ],
)
def test_what_does_not_tell_is_refused(inputs, outputs, why):
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=False)
    with pytest.raises(
        ValueError, match=f"per_sample_loss: the loss of each sample of Linear is not known, since .*{why}"
    ):
        per_sample_losses(model, inputs, outputs)


@pytest.mark.parametrize("build", [lambda: gpt2(0.0), lambda: BertForMaskedLM(BertConfig(**SMALL))])
def test_a_sample_without_a_counted_label_has_a_loss_of_zero(build):
    """Not 0/0: such a sample is compared with others, and NaN would be picked first."""
    batch = stacked(lm_data(3))
    batch["labels"][1] = -100
    model = build().eval()
    with torch.no_grad():
        losses = per_sample_losses(model, batch, model(**batch))
    assert losses[1] == 0 and losses[[0, 2]].min() > 0
