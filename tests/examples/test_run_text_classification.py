"""The text classification example, as a user runs it: shipped configuration, files, pairs, scores, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers import pipeline as make_pipeline

import run_text_classification
from hf_ssam.saved import files
from support import offline
from support.cli import UsageError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "run_text_classification.py"
WORDS = ["a good film", "a bad film", "a fine film", "a dull film"]


def run_script(*argv, **env):
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A two-layer BERT of 16 dimensions in a folder, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(folder)
    return folder


@pytest.fixture
def main(tiny, tmp_path):
    """The script's `main` on the tiny model, for two short steps."""

    def call(*argv, steps=2, out="out"):
        fixed = {
            "--model_name_or_path": tiny, "--output_dir": tmp_path / out, "--max_steps": steps, "--logging_steps": 1,
            "--per_device_train_batch_size": 4, "--report_to": "none", "--disable_tqdm": "true",
            "--learning_rate": 0.01, "--save_strategy": "no",
        }  # fmt: skip
        given = [str(word) for word in argv]
        missing = [str(word) for flag, value in fixed.items() if flag not in given for word in (flag, value)]
        return run_text_classification.main([*given, *missing])

    return call


@pytest.fixture
def csv(tmp_path):
    def write(name, **columns):
        path = tmp_path / name
        pd.DataFrame(columns).to_csv(path, index=False)
        return path

    return write


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_the_shipped_configuration_cut_short_trains_ssam_and_the_model_opens_in_a_pipeline(tmp_path):
    short = ["--max_steps", 3, "--max_train_samples", 48, "--max_eval_samples", 32, "--logging_steps", 1]
    done = run_script(ROOT / "configs/tasks/trec.yaml", *short, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "results after 3 steps: eval_loss" in done.stdout and "eval_accuracy" in done.stdout
    entries = history(tmp_path / "out")
    assert entries[0]["step"] == 0 and "eval_accuracy" in entries[0]
    steps = [entry for entry in entries if "ssam/perturbation_norm" in entry]
    assert len(steps) == 3
    assert all(entry["ssam/perturbation_norm"] == pytest.approx(0.01, rel=1e-3) for entry in steps)
    answer = make_pipeline("text-classification", str(tmp_path / "out"))("Who wrote the first symphony ?")
    assert answer[0]["label"] in {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_numbers_and_a_stock_name_is_the_baseline(main, tmp_path, csv):
    data = ["--train_file", csv("train.csv", text=WORDS * 4, label=["p", "n"] * 8)]
    main(*data, out="one")
    main(*data, out="two")
    main(*data, "--optim", "adamw_torch", out="baseline")
    one, two, baseline = (history(tmp_path / out) for out in ("one", "two", "baseline"))
    assert [entry.get("loss") for entry in one] == [entry.get("loss") for entry in two]
    assert any("ssam/ascent_loss" in entry for entry in one)
    assert not any("ssam/ascent_loss" in entry for entry in baseline)
    one, baseline = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / out).classifier.weight
        for out in ("one", "baseline")
    )
    assert not torch.equal(one, baseline)


def test_files_with_names_for_labels_are_learnt_and_predicted(main, tmp_path, csv):
    train = csv("train.csv", review=WORDS * 8, verdict=["yes", "no", "yes", "no"] * 8)
    valid = csv("valid.csv", review=WORDS, verdict=["yes", "no", "yes", "no"])
    test = csv("test.csv", review=WORDS)
    results = main(
        "--train_file", train, "--validation_file", valid, "--test_file", test, "--label_column_name", "verdict",
        "--do_train", "--do_eval", "--do_predict", steps=60,
    )  # fmt: skip
    assert results["eval_accuracy"] == 1.0
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(predictions["prediction"]) == ["yes", "no", "yes", "no"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}


def test_words_that_pandas_takes_for_missing_are_text_and_labels(main, tmp_path, csv):
    train = csv("train.csv", text=["null", "NA", "none of it", "nan"] * 2, label=["NA", "null"] * 4)
    main("--train_file", train, steps=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["label2id"]) == ["NA", "null"]


def test_labels_that_are_real_numbers_make_a_regression(main, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(
        "\n".join(
            json.dumps({"text": word, "label": score}) for word, score in zip(WORDS, [0.5, 1, 2.5, 0], strict=True)
        )
    )
    results = main("--train_file", train, "--validation_file", train)
    assert {"eval_mse", "eval_pearson", "eval_spearman"} <= set(results)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1


def test_a_glue_task_feeds_both_sentences_and_leaves_withheld_labels_out(main, tmp_path, monkeypatch):
    features = Features(
        {
            "sentence1": Value("string"), "sentence2": Value("string"), "idx": Value("int32"),
            "label": ClassLabel(names=["not_equivalent", "equivalent"]),
        }
    )  # fmt: skip
    columns = {"sentence1": WORDS, "sentence2": WORDS[::-1], "idx": range(4)}
    labelled = Dataset.from_dict({**columns, "label": [0, 1, 0, 1]}, features=features)
    withheld = Dataset.from_dict({**columns, "label": [-1] * 4}, features=features)
    asked = []

    def glue(name, config):
        asked.append((name, config))
        return DatasetDict(train=labelled, validation=labelled, test=withheld)

    monkeypatch.setattr(files, "load_dataset", glue)
    seen = []
    monkeypatch.setattr(
        run_text_classification,
        "encoded",
        lambda *args, encoded=run_text_classification.encoded: seen.append(encoded(*args)) or seen[-1],
    )
    results = main("--task_name", "mrpc", "--do_train", "--do_eval", "--do_predict")
    assert asked == [("nyu-mll/glue", "mrpc")]
    assert {"eval_accuracy", "eval_f1"} <= set(results)
    train, _, test = seen
    assert "label" not in test.column_names
    pair = AutoTokenizer.from_pretrained(offline.minilm())(WORDS[0], WORDS[3])
    assert train[0]["input_ids"] == pair["input_ids"]
    assert set(pd.read_csv(tmp_path / "out" / "predictions.csv")["prediction"]) <= {"equivalent", "not_equivalent"}


@pytest.mark.parametrize(
    "save", [DatasetDict.save_to_disk, lambda data, path: data["train"].to_parquet(path / "a.parquet")]
)
def test_a_local_folder_serves_as_a_data_set(main, tmp_path, save):
    folder = tmp_path / "data"
    folder.mkdir()
    save(DatasetDict(train=Dataset.from_dict({"text": WORDS, "label": [1, 0, 1, 0]})), folder)
    assert main("--dataset_name", folder)["train_loss"] > 0


def test_a_run_goes_on_from_its_last_checkpoint(main, tmp_path, csv):
    data = ["--train_file", csv("train.csv", text=WORDS * 4, label=[1, 0] * 8), "--save_strategy", "steps"]
    main(*data, "--save_steps", 2, steps=2)
    main(*data, "--save_steps", 4, "--resume_from_checkpoint", "true", steps=4)
    assert [entry["step"] for entry in history(tmp_path / "out") if "loss" in entry] == [1, 2, 3, 4]


def test_a_new_run_does_not_write_over_another_and_one_that_only_evaluates_keeps_what_it_wrote(main, tmp_path, csv):
    data = ["--train_file", csv("train.csv", text=WORDS, label=["p", "n", "p", "n"])]
    trained = main(*data)
    with pytest.raises(UsageError, match="out holds another run: give another folder, or remove this one"):
        main(*data)
    test = csv("test.csv", text=WORDS, label=["p", "n"] * 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "eval_loss" not in trained and "ssam/total_passes" in trained
    judged = main("--model_name_or_path", tmp_path / "out", "--test_file", test, "--do_eval")
    assert "eval_accuracy" in judged and "ssam/total_passes" not in judged
    kept = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert kept == {key: value for key, value in {**trained, **judged}.items() if key != "output_dir"}
    assert (tmp_path / "out" / "README.md").read_text() == card


GOOD = {"text": WORDS, "label": ["p", "n", "p", "n"]}


@pytest.mark.parametrize(
    ("train", "test", "argv", "sentence"),
    [
        ({"text": [], "label": []}, None, [], "train.csv is empty: it has no examples"),
        (
            {"text": WORDS},
            None,
            [],
            "train.csv has no label column 'label': it has text (text); name the label with",
        ),
        ({**GOOD, "label": ["p", "", "p", "n"]}, None, [], "nothing in column 'label' of example 2: fill it or drop"),
        ({**GOOD, "text": ["a", "b", "", "d"]}, None, [], "nothing in column 'text' of example 3: fill it or drop"),
        (GOOD, {**GOOD, "label": ["p", "n", "odd", "n"]}, [], "test.csv has the label 'odd', which"),
        (
            GOOD,
            GOOD,
            ["--text_column_names", "body"],
            "has no text column 'body': it has text (text), label (text)",
        ),
        (
            {"a": WORDS, "b": WORDS, "label": [0, 1, 0, 1]},
            None,
            [],
            "has several text columns (a, b): name the one or",
        ),
        ({"n": [1, 2], "label": [0, 1]}, None, [], "has no text column: name the one or two to use with"),
        (
            GOOD,
            None,
            ["--do_eval"],
            "nothing to eval on: the data has 4 train examples; give --validation_file",
        ),
        (GOOD, None, ["--do_train", "--do_eval"], "there is nothing to eval on"),
        (GOOD, None, ["--eval_strategy", "epoch"], "there is nothing to eval on"),
        (
            GOOD,
            GOOD,
            ["--do_predict", "--push_to_hub"],
            "a run that does not train has nothing to push",
        ),
        (
            GOOD,
            None,
            ["--do_predict"],
            "nothing to predict on: the data has 4 train examples; give --test_file",
        ),
        (GOOD, None, ["--resume_from_checkpoint", "true"], "there is no checkpoint in"),
        (GOOD, None, ["--resume_from_checkpoint", "gone"], "there is no checkpoint in gone"),
        (GOOD, None, ["--model_name_or_path", "./gone"], "./gone is neither a local folder nor to be had"),
        (GOOD, None, ["--task_name", "sst2"], "give only one of --task_name, --dataset_name and files"),
        (GOOD, None, ["--text_column_names", "a", "b", "c"], "--text_column_names takes one or two columns, not 3"),
    ],
)
def test_data_that_cannot_work_is_one_sentence(main, csv, train, test, argv, sentence):
    files = ["--train_file", csv("train.csv", **train)]
    files += ["--test_file", csv("test.csv", **test)] if test else []
    with pytest.raises(UsageError) as error:
        main(*files, *argv)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.csv", "", "train.csv is empty: it has no examples"),
        ("train.doc", "text", "train.doc is of no known kind: give a file that ends in .csv, .tsv, .json, .jsonl"),
        ("train.json", "{not json", "train.json could not be read as json"),
        ("train.csv", 'text,label\na,b,c\n"', "train.csv could not be read as csv"),
        ("train.csv", "text,label\ncaf\xe9,a\n".encode("latin-1"), ": save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(main, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        main("--train_file", tmp_path / name)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_task_and_an_unknown_data_set_are_one_sentence(main, monkeypatch):
    with pytest.raises(UsageError, match="--task_name sst3 is not a GLUE task: choose from cola, mnli"):
        main("--task_name", "sst3")
    with pytest.raises(UsageError, match="the data set ./gone is neither a local folder nor to be had from the Hub"):
        main("--dataset_name", "./gone")


@pytest.mark.slow
def test_a_missing_file_exits_with_status_2_and_no_traceback(tmp_path):
    done = run_script("--train_file", tmp_path / "gone.csv", "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert f"error: there is no file {tmp_path / 'gone.csv'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
