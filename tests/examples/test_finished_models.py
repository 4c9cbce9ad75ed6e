"""A finished model that is evaluated, or predicts: its own labels count, and its head stays the one it learnt."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    EvalPrediction,
    ViTConfig,
    ViTForImageClassification,
)

import run_image_classification
import run_text_classification
import run_token_classification
from support import offline, text_inputs
from support.cli import UsageError
from support.efficientnet_lite0 import processor
from support.text_data import TextArguments

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = ["apple", "bread", "cheese", "dill"]
TEXTS = ["a sweet apple", "warm bread", "old cheese", "fresh dill"]
FIXED = ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture
def csv(tmp_path):
    def write(name, **columns):
        pd.DataFrame(columns).to_csv(tmp_path / name, index=False)
        return tmp_path / name

    return write


@pytest.fixture
def judge(tmp_path):
    """Runs a script's main without training, and returns its results."""

    def call(main, model, *argv):
        given = [*argv, "--model_name_or_path", model, "--output_dir", tmp_path / "judged", *FIXED]
        return main([str(word) for word in given])

    return call


def with_vocabulary(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(folder)
    return folder


def own_labels(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@pytest.fixture
def text_model(tmp_path):
    """A classifier of four classes, in an order that no file has."""
    torch.manual_seed(0)
    config = BertConfig(**SIZE, initializer_range=0.5, **own_labels(["cheese", "apple", "dill", "bread"]))
    return with_vocabulary(tmp_path / "text", BertForSequenceClassification(config))


def text_logits(folder, texts):
    """The model's own, without the script."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        return model(**batch).logits, model.config.label2id


def judged(folder, texts, names):
    """Loss and accuracy of the model on `texts`, whose true classes are `names`."""
    logits, number = text_logits(folder, texts)
    true = torch.tensor([number[name] for name in names])
    loss = torch.nn.functional.cross_entropy(logits, true).item()
    return {"eval_loss": loss, "eval_accuracy": (logits.argmax(-1) == true).float().mean().item()}


def matches(found, expected):
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kept", [NAMES, NAMES[::-1], ["bread", "dill"], ["cheese"]])
def test_text_evaluation_matches_labels_by_name_whatever_the_file_has_of_them(text_model, csv, judge, kept):
    texts = [text for text in TEXTS if text.split()[-1] in kept] * 2
    labels = [text.split()[-1] for text in texts]
    data = csv("valid.csv", text=texts, label=labels)
    results = judge(run_text_classification.main, text_model, "--validation_file", data, "--do_eval")
    matches(results, judged(text_model, texts, labels))


def test_text_evaluation_by_class_labels_of_another_order(text_model, tmp_path, judge):
    rows = Dataset.from_dict({"text": TEXTS, "label": NAMES}).class_encode_column("label")
    rows.to_parquet(tmp_path / "valid.parquet")
    assert rows.features["label"].names == NAMES
    data = ("--validation_file", tmp_path / "valid.parquet", "--do_eval")
    matches(judge(run_text_classification.main, text_model, *data), judged(text_model, TEXTS, NAMES))


def test_text_label_that_the_model_does_not_know_is_named(text_model, csv, judge):
    data = csv("valid.csv", text=TEXTS, label=[*NAMES[:3], "eel"])
    with pytest.raises(UsageError, match=r"valid.csv has the label 'eel', which .*text does not know \(it knows chee"):
        judge(run_text_classification.main, text_model, "--validation_file", data, "--do_eval")


def test_text_prediction_needs_no_training_file_and_no_labels(text_model, csv, judge, tmp_path, capsys):
    logits, number = text_logits(text_model, TEXTS)
    names = {i: name for name, i in number.items()}
    for extra in ({}, {"label": [""] * 4}):
        data = csv("test.csv", text=TEXTS, **extra)
        results = judge(run_text_classification.main, text_model, "--test_file", data, "--do_predict")
        assert "predict_loss" not in results
        assert f"4 predictions are in {tmp_path / 'judged' / 'predictions.csv'}" in capsys.readouterr().out
        said = pd.read_csv(tmp_path / "judged" / "predictions.csv")["prediction"]
        assert list(said) == [names[int(i)] for i in logits.argmax(-1)]


def test_text_f1_averages_over_the_models_classes():
    """Two classes in the file do not make the task binary, whose F1 would be 0 here: it is that of class 1."""
    score = text_inputs.scorer(["a", "b", "c"], TextArguments())
    right = EvalPrediction(predictions=np.eye(3)[[0, 0]], label_ids=np.array([0, 0]))
    assert score(right)["f1"] == 1.0
    assert text_inputs.scorer(["a", "b"], TextArguments())(right)["f1"] == 0.0


def test_text_regression_is_the_models_to_say(tmp_path, csv, judge, text_model):
    torch.manual_seed(0)
    config = BertConfig(**SIZE, num_labels=1, problem_type="regression", initializer_range=0.5)
    scores = with_vocabulary(tmp_path / "scores", BertForSequenceClassification(config))
    data = csv("valid.csv", text=TEXTS, label=[1, 2, 3, 4])
    results = judge(run_text_classification.main, scores, "--validation_file", data, "--do_eval")
    logits, _ = text_logits(scores, TEXTS)
    assert results["eval_mse"] == pytest.approx(((logits[:, 0] - torch.arange(1.0, 5)) ** 2).mean().item(), rel=1e-4)
    words = csv("words.csv", text=TEXTS, label=NAMES)
    with pytest.raises(UsageError, match="words.csv has the label 'apple', which is no number: .*scores pred"):
        judge(run_text_classification.main, scores, "--validation_file", words, "--do_eval")


def test_text_numbers_match_a_model_whose_classes_have_no_names(tmp_path, csv, judge, capsys):
    torch.manual_seed(0)
    plain = with_vocabulary(tmp_path / "plain", BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)))
    data = csv("valid.csv", text=TEXTS, label=[2, 0, 2, 2])
    results = judge(run_text_classification.main, plain, "--validation_file", data, "--do_eval")
    matches(results, judged(plain, TEXTS, ["LABEL_2", "LABEL_0", "LABEL_2", "LABEL_2"]))
    assert "only numbers its classes" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has the label '3', which"):
        judge(
            run_text_classification.main, plain, "--validation_file", csv("v.csv", text=["a"], label=[3]), "--do_eval"
        )


def test_text_model_without_a_head_is_not_judged(tmp_path, csv, judge):
    encoder = with_vocabulary(tmp_path / "encoder", BertModel(BertConfig(**SIZE)))
    data = csv("valid.csv", text=TEXTS, label=NAMES)
    with pytest.raises(UsageError, match="encoder has no head for this task .*: add --do_train"):
        judge(run_text_classification.main, encoder, "--validation_file", data, "--do_eval")
    with pytest.raises(UsageError, match="--do_eval without --do_train needs --model_name_or_path"):
        run_text_classification.main(["--validation_file", str(data), "--do_eval", "--output_dir", str(tmp_path)])


def test_text_training_goes_on_in_the_models_own_order_and_draws_a_new_head_for_other_classes(
    text_model, csv, judge, tmp_path
):
    rate = ("--learning_rate", "0", "--max_steps", "1", "--do_train")
    same = csv("same.csv", text=TEXTS, label=NAMES)
    judge(run_text_classification.main, text_model, "--train_file", same, *rate)
    assert saved(tmp_path)["id2label"] == {"0": "cheese", "1": "apple", "2": "dill", "3": "bread"}
    head = "classifier.weight"
    before, after = (load_file(f / "model.safetensors")[head] for f in (text_model, tmp_path / "judged"))
    assert torch.equal(before, after)
    other = csv("other.csv", text=TEXTS, label=["x", "y", "z", "x"])
    with pytest.raises(UsageError, match="holds another run"):
        judge(run_text_classification.main, text_model, "--train_file", other, *rate)
    main = run_text_classification.main
    given = ["--model_name_or_path", text_model, "--train_file", other, *rate, *FIXED, "--output_dir", tmp_path / "b"]
    main([str(word) for word in given])
    assert json.loads((tmp_path / "b" / "config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}


def saved(tmp_path):
    return json.loads((tmp_path / "judged" / "config.json").read_text())


@pytest.fixture
def image_model(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=16, initializer_range=0.5, **SIZE, **own_labels(["eel", "cat", "dog"])
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "image")
    processor(32).save_pretrained(tmp_path / "image")
    return tmp_path / "image"


def pictures(folder, *names):
    noise = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize("names", [["cat/1.png", "dog/2.png", "eel/3.png"], ["cat/1.png", "dog/2.png"], ["dog/1.png"]])
def test_image_evaluation_matches_labels_by_name(image_model, tmp_path, judge, names):
    folder = pictures(tmp_path / "pets", *names)
    results = judge(run_image_classification.main, image_model, "--validation_dir", folder, "--do_eval")
    model = AutoModelForImageClassification.from_pretrained(image_model).eval()
    images = [PIL.Image.open(folder / name) for name in names]
    true = torch.tensor([model.config.label2id[name.split("/")[0]] for name in names])
    with torch.no_grad():
        logits = model(**processor(32)(images, return_tensors="pt")).logits
    expected = torch.nn.functional.cross_entropy(logits, true).item()
    matches(results, {"eval_loss": expected, "eval_accuracy": (logits.argmax(-1) == true).float().mean().item()})


def test_image_label_that_the_model_does_not_know_is_named(image_model, tmp_path, judge):
    folder = pictures(tmp_path / "pets", "cat/1.png", "yak/2.png")
    with pytest.raises(UsageError, match=r"has the label 'yak', which .*image does not know \(it knows eel, cat, dog"):
        judge(run_image_classification.main, image_model, "--validation_dir", folder, "--do_eval")


@pytest.fixture
def tagger(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**SIZE, initializer_range=0.5, **own_labels(["I-NAME", "O", "B-NAME"]))
    return with_vocabulary(tmp_path / "tagger", BertForTokenClassification(config))


def tagged(tmp_path, tags):
    words = [["who", "is", "bach"], ["where", "is", "peru"]]
    rows = (json.dumps({"tokens": some, "ner_tags": tags}) for some in words)
    (tmp_path / "tags.json").write_text("\n".join(rows))
    return words, tmp_path / "tags.json"


@pytest.mark.parametrize("tags", [["O", "B-NAME", "I-NAME"], ["O", "O", "B-NAME"], ["O", "O", "O"]])
def test_tagger_evaluation_matches_tags_by_name(tagger, tmp_path, judge, tags):
    words, data = tagged(tmp_path, tags)
    results = judge(run_token_classification.main, tagger, "--validation_file", data, "--do_eval")
    model = AutoModelForTokenClassification.from_pretrained(tagger).eval()
    tokenizer = AutoTokenizer.from_pretrained(tagger)
    batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 5)  # a token a word, between two special ones
    with torch.no_grad():
        logits = model(**batch).logits[:, 1:-1]
    true = torch.tensor([model.config.label2id[tag] for tag in tags]).expand(2, 3)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), true.flatten()).item()
    matches(results, {"eval_loss": loss, "eval_accuracy": (logits.argmax(-1) == true).float().mean().item()})


def test_tagger_tag_that_the_model_does_not_know_is_named(tagger, tmp_path, judge):
    _, data = tagged(tmp_path, ["O", "O", "B-RIVER"])
    with pytest.raises(UsageError, match="has the label 'B-RIVER', which .*tagger does not know"):
        judge(run_token_classification.main, tagger, "--validation_file", data, "--do_eval")
