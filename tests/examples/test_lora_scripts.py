"""The language-model scripts with the methods on LoRA: tiny models from a config, and the offline preferences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import run_clm
import run_dpo
import run_sft
from support import offline_tasks
from support.cli import UsageError
from tests.examples.hub_push import SMALL, rows, saved
from tests.examples.scripts import TASKS, run_script

LORA_METHODS = ("nbar", "obar", "flat_lora", "bi_lora")
SCRIPTS = {
    "clm": (run_clm, {"text": ["who is bach a person", "where is peru a place"]}, ["--block_size", "4"]),
    "sft": (run_sft, {"prompt": ["who is bach", "where is peru"], "completion": [" a person", " a place"]}, []),
    "dpo": (
        run_dpo,
        {"prompt": ["who is bach", "where is peru"], "chosen": [" person", " place"], "rejected": [" place", " bach"]},
        [],
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=16, max_position_embeddings=32, eos_token_id=2, **SMALL)
    return saved(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))


def flags(name: str, llama: Path, tmp_path: Path, *more: object) -> list[str]:
    """A command line of two steps."""
    _, columns, own = SCRIPTS[name]
    data = rows(tmp_path / f"{name}.json", **columns)
    given = ["--model_name_or_path", llama, "--train_file", data, *own, "--max_steps", 2, "--logging_steps", 1]
    given += ["--per_device_train_batch_size", 2, "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true"]
    given += ["--disable_tqdm", "true", "--output_dir", tmp_path / "out", *more]
    return [*map(str, given)] + ([] if name == "clm" else ["--max_length", "16", "--gradient_checkpointing", "false"])


@pytest.mark.slow
@pytest.mark.parametrize("method", LORA_METHODS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_an_adapter_that_stock_peft_opens(name: str, method: str, llama: Path, tmp_path: Path):
    script = SCRIPTS[name][0]
    script.main(flags(name, llama, tmp_path, "--optim", method, "--lora_r", 2))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [e["ssam/passes"] for e in log if "ssam/passes" in e] == [1.0, 1.0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out")
    assert list(model.peft_config) == ["default"]
    assert method in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_adapters_says_how_to_add_one(name: str, llama: Path, tmp_path: Path):
    with pytest.raises((UsageError, ValueError), match="has no LoRA layer, which method `bi_lora` works on; add one"):
        SCRIPTS[name][0].main(flags(name, llama, tmp_path, "--optim", "bi_lora"))


def test_dpo_refuses_data_that_are_no_preferences(llama: Path, tmp_path: Path):
    data = rows(tmp_path / "other.json", prompt=["who"], chosen=["bach"])
    given = [*flags("dpo", llama, tmp_path), "--train_file", str(data)]
    with pytest.raises(UsageError, match="the train data has prompt, chosen: it needs prompt, chosen and rejected"):
        run_dpo.main(given)


@pytest.mark.slow
def test_offline_preferences_hold_the_right_class_and_another():
    asked, preferred = offline_tasks.classified_questions(), offline_tasks.preferred_answers()
    for split, pairs in preferred.items():
        assert pairs["prompt"] == asked[split]["prompt"] and pairs["chosen"] == asked[split]["completion"]
        assert all(chosen != rejected for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True))
        assert set(pairs["rejected"]) == set(pairs["chosen"]), "every class is a wrong answer somewhere"


@pytest.mark.slow
def test_preference_optimisation_of_smollm2(tmp_path: Path):
    short = ["--max_steps", 1, "--max_train_samples", 4, "--max_eval_samples", 2, "--per_device_train_batch_size", 2]
    short += ["--save_strategy", "no", "--logging_steps", 1, "--output_dir", tmp_path]
    out = run_script("run_dpo.py", TASKS / "questions_dpo.yaml", *short)
    assert "results after 1 steps: eval_loss" in out and "eval_rewards" in out
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20e6
