"""Which labels a loss compares, asked of the loss itself: one that shifts never looks at a row's first label."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_ssam.engine.labels import compared_labels, count_labels, shifts_labels
from hf_ssam.engine.per_sample import per_sample_losses
from hf_ssam.sharpness.probe import count_items
from tests.support.cases import gpt2, lm_data

BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
LLAMA = BERT | {"num_key_value_heads": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
XLM = {"vocab_size": 40, "emb_dim": 16, "n_layers": 1, "n_heads": 2}
XLNET = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 8}


def lora_gpt2() -> nn.Module:
    return get_peft_model(
        gpt2(), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )


MODELS = {
    "GPT-2, whose class tells of no loss": gpt2,
    "an adapter on GPT-2": lora_gpt2,
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "BERT as a decoder": lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
    "masked language model": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "token classification": lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=40)),
    "sequence to sequence": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "XLNet, whose loss is its own": lambda: XLNetLMHeadModel(XLNetConfig(**XLNET)),
    "XLM, whose loss is its own": lambda: XLMWithLMHeadModel(XLMConfig(**XLM)),
}


def batch(n: int = 3) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in lm_data(n)]) for name in lm_data(1)[0]}


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_shifted_where_the_loss_overlooks_a_rows_first_one(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]().eval(), batch()
    overlooked = {**inputs, "labels": inputs["labels"].clone()}
    overlooked["labels"][:, 0] = -100
    with torch.no_grad():
        losses = model(**inputs).loss, model(**overlooked).loss
    assert shifts_labels(model) == (losses[0] == losses[1]).item()


@pytest.mark.parametrize("name", [n for n in MODELS if "sequence to" not in n])
def test_labels_counted_are_what_the_loss_is_a_mean_over(name):
    """The mean over the batch is that of the samples' own means, each weighted by its own count."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]().eval(), batch(4)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(4)]
    counts = torch.stack([count_labels(model, row) for row in rows])
    assert len(set(counts.tolist())) > 1 and counts.sum() == count_labels(model, inputs) == count_items(model, inputs)
    with torch.no_grad():
        outputs = model(**inputs)
        alone = torch.stack([model(**row).loss for row in rows])
        each = per_sample_losses(model, inputs, outputs)
    torch.testing.assert_close((alone * counts).sum() / counts.sum(), outputs.loss)
    torch.testing.assert_close(each, alone)


def test_labels_shifted_beforehand_are_not_shifted_again():
    model, labels = gpt2(), torch.tensor([[5, 6, -100, -100]])
    assert count_labels(model, {"labels": labels, "shift_labels": labels}) == 2
    assert count_labels(model, {"labels": labels}) == 1
    assert compared_labels(model, {"labels": labels}).tolist() == [[6, -100, -100]]


def test_a_model_of_ones_own_shifts_nothing():
    assert not shifts_labels(nn.Linear(2, 2))
