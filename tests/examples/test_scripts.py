"""Every example with its shipped configuration, cut short by flags only, and what it saves opened as a user would."""

from __future__ import annotations

import json

import PIL.Image
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import pipeline as make_pipeline

from support import offline
from tests.examples.scripts import ROOT, TASKS, run_script

SHORT = ["--max_steps", 2, "--max_train_samples", 24, "--max_eval_samples", 8, "--logging_steps", 1]
SHORT += ["--per_device_train_batch_size", 4, "--save_strategy", "no", "--disable_tqdm", "true"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("run_*.py")), ids=lambda path: path.stem)
def test_script_is_read_on_one_or_two_screens(path):
    assert len(path.read_text().splitlines()) <= 117


def perturbed(folder):
    """The perturbation's length at each logged step."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["ssam/perturbation_norm"] for entry in log if "ssam/perturbation_norm" in entry]


@pytest.mark.slow
def test_image_classification(tmp_path):
    out = run_script("run_image_classification.py", TASKS / "mnist.yaml", *SHORT, "--output_dir", tmp_path)
    assert "results after 2 steps: eval_loss" in out and "eval_accuracy" in out
    assert perturbed(tmp_path) == pytest.approx([0.05, 0.05], rel=1e-3)
    found = make_pipeline("image-classification", str(tmp_path))(PIL.Image.new("L", (28, 28)), top_k=10)
    assert {row["label"] for row in found} == set("0123456789")
    model = make_pipeline("image-classification", str(tmp_path)).model
    assert model.efficientnet.embeddings.batchnorm.num_batches_tracked == batches_seen_before() + 2


def batches_seen_before() -> int:
    original = torch.load(offline.efficientnet_lite0(), weights_only=True)
    return int(original["_bn0.num_batches_tracked"])


@pytest.mark.slow
def test_token_classification(tmp_path):
    out = run_script("run_token_classification.py", TASKS / "names.yaml", *SHORT, "--output_dir", tmp_path)
    assert "results after 2 steps: eval_loss" in out and "eval_f1" in out
    assert len(perturbed(tmp_path)) == 2
    tagger = make_pipeline("token-classification", str(tmp_path))
    assert set(tagger.model.config.id2label.values()) == {"O", "B-NAME", "I-NAME"}
    assert isinstance(tagger("who wrote hamlet ?"), list)


@pytest.mark.slow
def test_summarization(tmp_path):
    out = run_script("run_summarization.py", TASKS / "answer_types.yaml", *SHORT, "--output_dir", tmp_path)
    assert "results after 2 steps: eval_loss" in out and "eval_rougeL" in out
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    made = model.generate(**tokenizer("What is the capital of Peru ?", return_tensors="pt"), max_new_tokens=5)
    assert made[0, 0] == tokenizer.cls_token_id and 1 < made.shape[1] <= 6


@pytest.mark.slow
def test_causal_language_model_with_adapters(tmp_path):
    short = ["--max_steps", 1, "--max_train_samples", 40, "--max_train_blocks", 2, "--max_eval_blocks", 1]
    short += ["--block_size", 16, "--per_device_train_batch_size", 2, "--save_strategy", "no", "--logging_steps", 1]
    out = run_script("run_clm.py", TASKS / "questions_clm.yaml", *short, "--output_dir", tmp_path)
    assert "results after 1 steps: eval_loss" in out and "eval_perplexity" in out
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20e6
    write = make_pipeline("text-generation", str(tmp_path))
    assert write("What is", max_new_tokens=3)[0]["generated_text"].startswith("What is")


@pytest.mark.slow
def test_supervised_fine_tuning(tmp_path):
    short = ["--max_steps", 1, "--max_train_samples", 4, "--max_eval_samples", 2, "--per_device_train_batch_size", 2]
    short += ["--save_strategy", "no", "--logging_steps", 1, "--output_dir", tmp_path]
    out = run_script("run_sft.py", TASKS / "questions_sft.yaml", *short)
    assert "results after 1 steps: eval_loss" in out and "eval_mean_token_accuracy" in out
    assert f"# Model Card for {tmp_path.name}" in (tmp_path / "README.md").read_text()
    assert perturbed(tmp_path) == pytest.approx([0.05], rel=1e-3)
    answer = make_pipeline("text-generation", str(tmp_path))("Who wrote Hamlet ?\nKind:", max_new_tokens=2)
    assert answer[0]["generated_text"].startswith("Who wrote Hamlet ?")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bare_loop_counts_each_batch_once(accumulate):
    out = run_script("train_loop_torch.py", "--steps", 3, "--accumulate", accumulate)
    counted = f"batches that BatchNorm counted: {3 * accumulate}"
    assert "results after 3 steps: accuracy" in out and counted in out
    assert "passes 2" in out


@pytest.mark.slow
@pytest.mark.distributed
def test_the_accelerate_loop_in_two_processes(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--config_file")
    launcher += (str(ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml"), "--main_process_port", "0")
    short = ["--steps", 2, "--examples", 32, "--batch", 4, "--accumulate", 2, "--output_dir", tmp_path]
    out = run_script("train_loop.py", *short, launcher=launcher)
    assert out.count("results after 2 steps") == 1 and "2 processes" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 6


@pytest.mark.slow
def test_bad_input_is_one_sentence_on_standard_error(tmp_path):
    with pytest.raises(AssertionError, match="error: there is no folder") as failed:
        run_script("run_image_classification.py", "--train_dir", tmp_path / "no", "--output_dir", tmp_path / "out")
    assert "Traceback" not in str(failed.value)
