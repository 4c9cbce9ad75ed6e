"""The methods on LoRA over TRL's trainers: one pass a step, a reference that is left alone, and plain adapters."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin
from tests.support.cases import MAIN_ADAPTER_CASES, Case, arguments, assert_identical, gpt2, lm_data, weights
from tests.trainer.test_hosts import entries, tokenizer

each_method = pytest.mark.parametrize("case", MAIN_ADAPTER_CASES, ids=lambda c: c.id)


class SFTArguments(SSAMArgumentsMixin, SFTConfig):
    pass


class SharpSFT(SSAMTrainerMixin, SFTTrainer):
    pass


class DPOArguments(SSAMArgumentsMixin, DPOConfig):
    pass


class SharpDPO(SSAMTrainerMixin, DPOTrainer):
    pass


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", lora_dropout=0.0)


def rows(kind: str) -> Dataset:
    if kind == "sft":
        return Dataset.from_list([{n: row[n].tolist() for n in ("input_ids", "labels")} for row in lm_data(32)])
    words = [" ".join(f"w{3 + (i * k) % 36}" for k in range(1, 5)) for i in range(1, 33)]
    return Dataset.from_list([
        {"prompt": text, "chosen": f" w{5 + i % 30}", "rejected": f" w{4 + i % 30}"} for i, text in enumerate(words)
    ])  # fmt: skip


def trained(kind: str, case: Case | None):
    """A run of four steps over one of TRL's trainers; without a case, the stock one."""
    ours = {"sft": (SharpSFT, SFTArguments), "dpo": (SharpDPO, DPOArguments)}
    stock = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
    trainer_class, config_class = (stock if case is None else ours)[kind]
    given = {"optim": "sgd"} if case is None else {
        "optim": case.method, "optim_args": case.optim_args, "rho": case.rho, "base_optim": "sgd"
    }  # fmt: skip
    args = arguments(config_class, bf16=False, max_length=12, learning_rate=0.5, **given)
    torch.manual_seed(0)
    trainer = trainer_class(
        model=gpt2(), args=args, train_dataset=rows(kind), processing_class=tokenizer(), peft_config=lora()
    )
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    trainer.references = []

    def see(module: nn.Module, args: tuple, out: dict) -> None:
        if not torch.is_grad_enabled():
            trainer.references.append(out["log_probs"].clone())

    hook = trainer.model.register_forward_hook(see)
    trainer.train()
    hook.remove()
    return trainer


@functools.cache
def stock_run(kind: str):
    """The stock run, for all methods."""
    return trained(kind, None)


@pytest.mark.quick("nbar-sft", "bi_lora-r=2-*")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@each_method
def test_a_step_is_one_pass_that_the_host_counts_once(case: Case, kind: str, tmp_path: Path):
    trainer, stock = trained(kind, case), stock_run(kind)
    assert isinstance(trainer.model, PeftModel) and list(trainer.model.peft_config) == ["default"]
    assert [e["ssam/passes"] for e in trainer.state.log_history if "ssam/passes" in e] == [1.0] * 4
    counted = [e for e in entries(trainer) if "loss" in e], [e for e in entries(stock) if "loss" in e]
    tokens = [[e.get("num_tokens") for e in run] for run in counted]
    assert tokens[0] == tokens[1] and tokens[0][0] is not None
    gap = max((a - b).abs().max() for a, b in zip(trainer.model.parameters(), stock.model.parameters(), strict=True))
    assert gap > 1e-6, "the method must matter"
    trainer.save_model(str(tmp_path))
    saved = PeftModel.from_pretrained(gpt2(), tmp_path)
    ids = lm_data(1)[0]["input_ids"][None]
    torch.testing.assert_close(saved.eval()(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=0)


@pytest.mark.quick("flat_lora-growing=False-sft", "bi_lora-r=2-dpo")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@each_method
def test_without_a_radius_it_is_the_stock_run_bit_for_bit(case: Case, kind: str):
    ours, stock = trained(kind, Case(case.method, case.options, 0.0)), stock_run(kind)
    assert_identical(weights(ours.model), weights(stock.model))
    assert entries(ours)[:-1] == entries(stock)[:-1]


@pytest.mark.quick("flat_lora-growing=False", "bi_lora-r=2")
@each_method
def test_dpos_reference_is_not_perturbed(case: Case):
    """It is the same model with the adapter off, called within the same step: the same bits as in a stock run."""
    ours, stock = trained("dpo", case), stock_run("dpo")
    assert len(ours.references) == len(stock.references) == 4
    for found, expected in zip(ours.references, stock.references, strict=True):
        assert torch.equal(found, expected)
