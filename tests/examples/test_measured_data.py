"""What a saved model is measured on: what its run was trained on, or data that are named, and never others."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import measure_sharpness
import run_clm
import run_image_classification
import run_text_classification
from hf_ssam.saved.data import FILE, RunData
from hf_ssam.saved.rows import running
from hf_ssam.sharpness import Objective
from support import offline
from support.cli import UsageError
from support.efficientnet_lite0 import processor

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a sweet apple", "warm bread", "old cheese", "fresh dill"]
NAMES = ["fruit", "loaf", "milk", "herb"]
FIXED = ["--report_to", "none", "--disable_tqdm", "true", "--max_steps", "2", "--use_cpu", "true"]


def called(main, *argv):
    return main([str(word) for word in argv])


def measured(out, *argv):
    cheap = ["--measures", "ascent", "--no_figures", "--output_dir", out]
    return called(measure_sharpness.main, *argv, *cheap)


def with_vocabulary(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE, initializer_range=0.5))
    return with_vocabulary(tmp_path_factory.mktemp("tiny"), model)


@pytest.fixture(scope="module")
def text_run(tiny, tmp_path_factory):
    """A run on a file whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("texts")
    pd.DataFrame({"review": TEXTS, "verdict": NAMES}).to_csv(folder / "train.csv", index=False)
    given = ["--train_file", folder / "train.csv", "--label_column_name", "verdict", "--model_name_or_path", tiny]
    saves = ["--save_strategy", "steps", "--save_steps", 1, "--output_dir", folder / "out"]
    called(run_text_classification.main, *given, *FIXED, *saves)
    return folder


def text_loss(folder, texts, names):
    """The model's loss, without the script."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = torch.tensor([model.config.label2id[name] for name in names])
    return Objective(model, {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": labels}).value()


def test_a_text_run_is_measured_on_its_own_data_which_are_named(text_run, tmp_path, capsys):
    expected = text_loss(text_run / "out", TEXTS, NAMES)
    row = measured(tmp_path, text_run / "out")[0]
    name = f"{text_run.name}/train.csv"
    assert row["loss"] == pytest.approx(expected, rel=1e-5) and row["data"] == name
    printed = capsys.readouterr().out
    assert f"measured on up to 32 rows of {name}" in printed and f"| out | {name} |" in printed
    assert f"| out | {name} |" in (tmp_path / "sharpness.md").read_text()
    assert json.loads((tmp_path / "sharpness.json").read_text())[0]["data"] == name


def test_a_checkpoint_is_measured_on_its_runs_data(text_run, tmp_path):
    checkpoint = text_run / "out" / "checkpoint-1"
    row = measured(tmp_path, checkpoint)[0]
    assert row["loss"] == pytest.approx(text_loss(checkpoint, TEXTS, NAMES), rel=1e-5)


def test_a_file_that_is_named_is_matched_by_name_in_the_runs_columns(text_run, tmp_path):
    pd.DataFrame({"verdict": ["milk", "fruit"], "review": TEXTS[2::-2]}).to_csv(tmp_path / "test.csv", index=False)
    row = measured(tmp_path / "m", text_run / "out", "--data", tmp_path / "test.csv")[0]
    assert row["loss"] == pytest.approx(text_loss(text_run / "out", TEXTS[2::-2], ["milk", "fruit"]), rel=1e-5)
    assert row["data"].endswith("test.csv")
    pd.DataFrame({"review": TEXTS[:1], "verdict": ["eel"]}).to_json(
        tmp_path / "odd.json", orient="records", lines=True
    )
    with pytest.raises(UsageError, match="odd.json has the label 'eel', which .*out does not know"):
        measured(tmp_path / "m", text_run / "out", "--data", tmp_path / "odd.json")


def test_nothing_is_measured_on_data_that_nobody_named(tiny, text_run, tmp_path):
    with pytest.raises(UsageError, match="nothing says what .* was trained on: name .* with --data FILE"):
        measured(tmp_path, tiny)
    lost = shutil.copytree(text_run / "out", tmp_path / "lost")
    record = json.loads((lost / FILE).read_text())
    (lost / FILE).write_text(json.dumps({**record, "file": str(tmp_path / "gone.csv")}))
    with pytest.raises(UsageError, match="there is no file .*gone.csv"):
        measured(tmp_path, lost)
    (lost / FILE).write_text("{")
    with pytest.raises(UsageError, match="_data.json is damaged .*: name the data with --data"):
        measured(tmp_path, lost)


def test_a_run_on_some_rows_is_measured_on_these(tiny, tmp_path):
    pd.DataFrame({"text": [*TEXTS, "x"], "label": [*NAMES, "herb"]}).to_csv(tmp_path / "train.csv", index=False)
    given = ["--train_file", tmp_path / "train.csv", "--max_train_samples", 2, "--model_name_or_path", tiny, *FIXED]
    called(run_text_classification.main, *given, "--save_strategy", "no", "--output_dir", tmp_path / "out")
    row = measured(tmp_path / "m", tmp_path / "out")[0]
    assert row["loss"] == pytest.approx(text_loss(tmp_path / "out", TEXTS[:2], NAMES[:2]), rel=1e-5)


def test_an_image_run_is_measured_on_its_own_folder_and_on_another(tmp_path):
    torch.manual_seed(0)
    noise = np.random.default_rng(0)
    for name in ("train/eel/1.png", "train/cat/2.png", "test/cat/3.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        PIL.Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **SIZE)).save_pretrained(tmp_path / "vit")
    processor(32).save_pretrained(tmp_path / "vit")
    given = ["--train_dir", tmp_path / "train", "--model_name_or_path", tmp_path / "vit", *FIXED]
    called(run_image_classification.main, *given, "--save_strategy", "no", "--output_dir", tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")

    def loss(*names):
        labels = torch.tensor([model.config.label2id[name.split("/")[1]] for name in names])
        images = [PIL.Image.open(tmp_path / name) for name in names]
        return Objective(model, {**processor(32)(images, return_tensors="pt"), "labels": labels}).value()

    row = measured(tmp_path / "m", tmp_path / "out")[0]
    assert row["loss"] == pytest.approx(loss("train/eel/1.png", "train/cat/2.png"), rel=1e-5)
    row = measured(tmp_path / "m", tmp_path / "out", "--data", tmp_path / "test")[0]
    assert row["loss"] == pytest.approx(loss("test/cat/3.png"), rel=1e-5)


@pytest.mark.slow
def test_figures_name_the_data(text_run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("hf_ssam.cli.landscapes.save", lambda ax, path: drawn.update({path.name: ax}))
    flags = ["--measures", "ascent", "--spectrum_steps", 3, "--plane", "--output_dir", tmp_path]
    called(measure_sharpness.main, text_run / "out", *flags)
    assert set(drawn) == {"spectrum.png", "loss_line.png", "plane.png"}
    for ax in drawn.values():
        assert f"{text_run.name}/train.csv" in ax.figure.get_supxlabel()


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=30522, max_position_embeddings=64, initializer_range=0.2, eos_token_id=102, **SIZE)
    folder = with_vocabulary(tmp_path / "llama", LlamaForCausalLM(config))
    AutoTokenizer.from_pretrained(folder, eos_token="[SEP]").save_pretrained(folder)
    return folder


def test_an_adapter_of_a_language_model_is_opened_and_measured_on_its_runs_texts(llama, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = ["--train_file", tmp_path / "texts.txt", "--block_size", 4, "--lora_r", 2, "--model_name_or_path", llama]
    given += ["--learning_rate", 0.1, "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    called(run_clm.main, *given, *FIXED)
    row = measured(tmp_path / "m", tmp_path / "out")[0]
    base = LlamaForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    objective = Objective(model, dict(batch))
    assert row["loss"] == pytest.approx(objective.value(), rel=1e-5) and row["n"] == objective.size
    assert objective.size == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    bare = Objective(LlamaForCausalLM.from_pretrained(llama), dict(batch)).value()
    assert row["loss"] != pytest.approx(bare, rel=1e-3)


def test_an_adapter_of_a_classifier_has_the_labels_of_its_run(tiny, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny, num_labels=4, ignore_mismatched_sizes=True)
    config = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False, target_modules=["query", "value"])
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "adapter")
    pd.DataFrame({"text": TEXTS, "label": NAMES}).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(UsageError, match="nothing says which classes .*adapter was trained for"):
        measured(tmp_path / "m", tmp_path / "adapter", "--data", tmp_path / "train.csv")
    labels = ["milk", "herb", "fruit", "loaf"]
    RunData(file=str(tmp_path / "train.csv"), labels=labels).write(tmp_path / "adapter")
    row = measured(tmp_path / "m", tmp_path / "adapter")[0]
    batch = AutoTokenizer.from_pretrained(tiny)(TEXTS, padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([labels.index(name) for name in NAMES])
    assert row["loss"] == pytest.approx(Objective(model.eval(), dict(batch)).value(), rel=1e-5)


def test_a_pair_is_read_as_a_pair_and_a_run_says_what_it_was_given(tiny, text_run, tmp_path):
    record = RunData(**json.loads((text_run / "out" / FILE).read_text()))
    assert record.columns == ["review"] and record.label_column == "verdict" and record.seed == 42
    folder = shutil.copytree(text_run / "out", tmp_path / "pairs")
    pd.DataFrame({"a": TEXTS, "b": TEXTS[::-1], "label": NAMES}).to_csv(tmp_path / "p.csv", index=False)
    RunData(file=str(tmp_path / "p.csv"), columns=["a", "b"], label_column="label").write(folder)
    row = measured(tmp_path / "m", folder)[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[name] for name in NAMES])
    assert row["loss"] == pytest.approx(Objective(model, {**batch, "labels": labels}).value(), rel=1e-5)


def test_a_completion_is_measured_without_its_prompt(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = Dataset.from_dict({"prompt": TEXTS[:2], "completion": [" warm bread today", " it is"]})
    batch = running(rows, ["prompt", "completion"], tokenizer, size=2, length=16)[0]
    kept = [row[row != -100].tolist() for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in kept] == [
        "it is [SEP]",
        "warm bread today [SEP]",
    ]
    assert tokenizer.decode(batch["input_ids"][1]) == "[CLS] a sweet apple warm bread today [SEP]"


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = with_vocabulary(tmp_path / "tags", BertForTokenClassification(BertConfig(**SIZE)))
    RunData(offline="names").write(folder)
    with pytest.raises(UsageError, match="tags is a BertForTokenClassification: measured here are"):
        measured(tmp_path / "m", folder)
