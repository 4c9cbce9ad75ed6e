"""The methods on LoRA through the whole Trainer: what they must not change, resumption, precision, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_ssam import SSAMTrainer
from tests.support.cases import (
    ADAPTER_CASES,
    MAIN_ADAPTER_CASES,
    Case,
    arguments,
    assert_close,
    assert_identical,
    case_arguments,
    gpt2,
    lm_data,
    trained,
    weights,
)
from tests.trainer.test_resume import assert_same, everything, logged
from tests.trainer.test_trainer import RandomStates, optimizer_tensors

each_method = pytest.mark.parametrize("case", MAIN_ADAPTER_CASES, ids=lambda c: c.id)


def adapted(dropout: float = 0.1, base: nn.Module | None = None) -> PeftModel:
    """LoRA over the GPT-2, whose layers store their weights transposed; B is not zero."""
    base = gpt2(dropout=0.1) if base is None else base
    set_seed(2)
    model = get_peft_model(base, LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"
    ))  # fmt: skip
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def given(case: Case, **more):
    return case_arguments(case, **{"base_optim": "adamw_torch", "max_steps": 4, **more})


def states(cls: type, args: TrainingArguments) -> tuple[Trainer, RandomStates]:
    seen = RandomStates()
    return trained(adapted(), args, lm_data(), cls, callbacks=[seen]), seen


@pytest.mark.quick("flat_lora-growing=False", "bi_lora-r=2")
@each_method
def test_without_a_radius_it_is_the_stock_trainer_bit_for_bit(case: Case):
    """Law 1, with dropout: weights, optimizer, generators and losses."""
    stock, theirs = states(Trainer, arguments(TrainingArguments, optim="adamw_torch"))
    ours, mine = states(SSAMTrainer, given(Case(case.method, case.options, rho=0.0)))
    assert_identical(weights(stock.model), weights(ours.model))
    assert_identical(optimizer_tensors(stock), optimizer_tensors(ours))
    assert torch.equal(theirs.torch, mine.torch) and theirs.python == mine.python
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (stock, ours)]
    assert losses[0] == losses[1]


@pytest.mark.quick("nbar", "flat_lora-growing=False", "bi_lora-r=2")
@each_method
def test_every_step_is_one_pass_and_the_process_draws_what_the_stock_trainer_draws(case: Case):
    stock, theirs = states(Trainer, arguments(TrainingArguments, optim="adamw_torch"))
    ours, mine = states(SSAMTrainer, given(case))
    assert torch.equal(theirs.torch, mine.torch), "noise comes from generators of its own"
    entries = [e for e in ours.state.log_history if "ssam/passes" in e]
    assert [e["ssam/passes"] for e in entries] == [1.0] * 4
    assert all("ssam/perturbation_norm" in e for e in entries)
    assert ours.state.total_flos == stock.state.total_flos
    gap = max((a - b).abs().max() for a, b in zip(ours.model.parameters(), stock.model.parameters(), strict=True))
    assert gap > 1e-5, "the method must matter"


@pytest.mark.quick("bi_lora-r=2")
@each_method
def test_base_weights_keep_the_bits_they_were_loaded_with(case: Case):
    before = {n: t for n, t in weights(adapted()).items() if "lora_" not in n}
    after = {n: t for n, t in weights(trained(adapted(), given(case), lm_data()).model).items() if "lora_" not in n}
    assert_identical(before, after)


@pytest.mark.quick("nbar", "flat_lora", "bi_lora-r=2")
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda c: c.id)
def test_resume_is_bit_for_bit(case: Case):
    saved = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    saved |= {"per_device_train_batch_size": 4}
    whole = trained(adapted(), given(case, **saved), lm_data())
    expected, entries = everything(whole), logged(whole)
    resumed = SSAMTrainer(model=adapted(), args=given(case, **saved), train_dataset=lm_data())
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-2")))
    assert_same(everything(resumed), expected)
    assert logged(resumed) == entries


@pytest.mark.quick("flat_lora-growing=False", "bi_lora-r=2")
@each_method
def test_accumulated_micro_batches_are_one_batch(case: Case):
    ends = []
    for parts in (1, 2):
        batch = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 8 // parts}
        model = adapted(dropout=0.0, base=gpt2(dropout=0.0)).double()
        ends.append(trained(model, given(case, base_optim="sgd", learning_rate=0.1, **batch), lm_data()).model)
    assert_close(weights(ends[0]), weights(ends[1]), atol=1e-8)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(case: Case, reentrant: bool):
    """What a layer computes again in the backward pass is what it computed, noise included."""
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    models = [adapted(), adapted()]
    for model in models:
        model.enable_input_require_grads()
    plain = trained(models[0], given(case), lm_data()).model
    assert_identical(weights(plain), weights(trained(models[1], given(case, **recomputed), lm_data()).model))


@pytest.mark.slow
@each_method
def test_bf16_autocast_is_near_float32(case: Case):
    """And nearer to it than plain LoRA is."""

    def run(rho: float, bf16: bool) -> Tensor:
        model = adapted(dropout=0.0, base=gpt2(dropout=0.0))
        args = given(Case(case.method, case.options, rho), base_optim="sgd", learning_rate=0.5, bf16=bf16, max_steps=3)
        return torch.cat([p.detach().flatten() for p in trained(model, args, lm_data()).model.parameters()])

    rho = case.rho if case.method in ("nbar", "obar") else 4 * case.rho
    exact, near = run(rho, False), run(rho, True)
    assert (near - exact).norm() < 0.6 * (run(0.0, True) - exact).norm()


@pytest.mark.quick("bi_lora-r=2")
@each_method
def test_clipping_sees_the_adapters_that_train_alone(case: Case):
    """The norm that the Trainer logs and clips is that of A and B, which the step report has too."""
    trainer = trained(adapted(), given(case, max_grad_norm=1e-3), lm_data())
    for entry in (e for e in trainer.state.log_history if "grad_norm" in e):
        assert entry["grad_norm"] == pytest.approx(entry["ssam/grad_norm"], rel=1e-4)


@pytest.mark.quick("bi_lora-r=2")
@each_method
def test_a_saved_adapter_opens_with_stock_peft_and_gives_the_logits_in_memory(case: Case, tmp_path: Path):
    base = tmp_path / "base"
    gpt2().save_pretrained(base)
    model = adapted(base=GPT2LMHeadModel.from_pretrained(base))
    run = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trained(model, given(case, **run, **best), lm_data(), eval_dataset=lm_data(8, seed=5))
    trainer.save_model(str(tmp_path / "final"))
    ids = lm_data(2)[0]["input_ids"][None]
    trainer.model.eval()
    expected = trainer.model(ids).logits
    for folder in (tmp_path / "final", Path(trainer.state.best_model_checkpoint)):
        assert [p.name for p in folder.iterdir() if p.is_dir() and p.name != "ssam_state"] == []
        reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        assert list(reloaded.peft_config) == ["default"]
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=0)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    torch.testing.assert_close(auto(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.quick("flat_lora-growing=False", "bi_lora-r=2")
@each_method
def test_evaluation_is_of_the_model_that_is_saved(case: Case):
    """The loss that the Trainer finds is the stock Trainer's of the same weights: no noise, no second adapter."""
    args = given(case, eval_strategy="steps", eval_steps=4)
    trainer = trained(adapted(), args, lm_data(), eval_dataset=lm_data(8, seed=5))
    found = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    again = adapted()
    again.load_state_dict(trainer.model.state_dict())
    stock = Trainer(model=again, args=arguments(TrainingArguments), eval_dataset=lm_data(8, seed=5))
    assert found == stock.evaluate()["eval_loss"]


@pytest.mark.quick("bi_lora-r=2")
@each_method
def test_a_4_bit_base_stays_packed_as_it_was(case: Case, tmp_path: Path):
    from tests.trainer.test_quantized import qlora

    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    before = weights(qlora(str(tmp_path)))
    packed = [n for n, t in before.items() if t.dtype == torch.uint8]
    ends = [
        weights(trained(qlora(str(tmp_path)), given(Case(case.method, case.options, rho)), lm_data()).model)
        for rho in (0.0, case.rho)
    ]
    assert packed
    for end in ends:
        assert_identical({n: before[n] for n in packed}, {n: end[n] for n in packed})
    gap = max((ends[0][n] - ends[1][n]).abs().max() for n in before if "lora_" in n)
    assert gap > 1e-6, "the method reaches through the packed base"


@pytest.mark.slow
@each_method
def test_a_compiled_model_takes_the_same_steps(case: Case):
    plain = trained(adapted(dropout=0.0, base=gpt2()), given(case), lm_data()).model
    model = adapted(dropout=0.0, base=gpt2())
    compiled = trained(model, given(case, torch_compile=True, torch_compile_backend="aot_eager"), lm_data()).model
    assert_close(weights(plain), weights(compiled), atol=1e-5)
