"""QLoRA: a 4-bit base on the CPU backend of bitsandbytes under an adapter in float32."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_ssam.engine.replay import Buffers
from tests.support.cases import (
    MAIN_CASES,
    Case,
    arguments,
    assert_identical,
    case_arguments,
    lm_data,
    trained,
    weights,
)

TINY = 1e-30


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = str(tmp_path_factory.mktemp("base"))
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


def qlora(base: str) -> nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    set_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.mark.few_methods
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_the_packed_base_stays_as_it_is(base: str, case: Case):
    before = weights(qlora(base))
    packed = [n for n, t in before.items() if t.dtype == torch.uint8]
    assert packed
    trainer = trained(qlora(base), case_arguments(case), lm_data())
    after = weights(trainer.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("lora_" in n for n in moved)
    assert all("lora_" in n for n in trainer.two_pass.perturbed)
    assert "ssam/ascent_loss" in trainer.state.log_history[0]


def test_without_a_perturbation_it_is_the_stock_trainer(base: str):
    stock = trained(qlora(base), arguments(TrainingArguments, optim="sgd"), lm_data(), cls=Trainer)
    ours = trained(qlora(base), case_arguments(Case("sam", rho=TINY)), lm_data())
    assert_identical(weights(ours.model), weights(stock.model))


def test_packed_weights_are_not_copied_as_buffers(base: str):
    held, _ = Buffers(qlora(base)).save()
    assert all(t.is_floating_point() or t.numel() == 1 for t in held)
