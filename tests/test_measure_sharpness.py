"""The script that measures saved models: the numbers of the library, side by side, in a table and figures."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertTokenizerFast

import measure_sharpness
from cli import UsageError
from hf_ssam.sharpness import top_eigenvalues
from tests.cases import bert, gpt2

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(root / "vocab.txt"))
    for name, model in (("first", bert(seed=1)), ("second", bert(seed=2)), ("causal", gpt2())):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    rows = {"text": ["a b c", "d e", "f g h i", "j", "k l m", "n o"], "label": [0, 1, 2, 0, 1, 2]}
    Dataset.from_dict(rows, features=features).save_to_disk(root / "data")
    return root


def measured(folder, *flags: str, models=("first",)) -> list[dict]:
    common = ["--dataset_name", str(folder / "data"), "--output_dir", str(folder / "out"), "--batch_size", "4"]
    return measure_sharpness.main([*(str(folder / m) for m in models), *common, "--trace_samples", "3", *flags])


def test_the_table_holds_the_librarys_numbers(folder, capsys):
    rows = measured(folder, "--no_figures", "--k", "2", models=("first", "second"))
    assert [r["model"].rsplit("/", 1)[1] for r in rows] == ["first", "second"]
    data = Dataset.load_from_disk(folder / "data").shuffle(seed=0)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "first")
    batch = {**tokenizer(data["text"][:], padding=True, return_tensors="pt"), "labels": torch.tensor(data["label"][:])}
    expected = top_eigenvalues(bert(seed=1), dict(batch), k=2).values
    assert rows[0]["eigenvalues"] == pytest.approx(expected, rel=1e-2)
    printed = capsys.readouterr().out
    assert f"| first | all trainable | {rows[0]['n']:,} |" in printed
    assert json.loads((folder / "out" / "sharpness.json").read_text())[1]["loss"] == rows[1]["loss"]


def test_one_row_a_pattern(folder):
    rows = measured(folder, "--no_figures", "--parameters", "layer.0", "classifier")
    assert [r["weights"] for r in rows] == ["layer.0", "classifier"]
    assert rows[1]["n"] == 16 * 3 + 3


def test_figures_and_causal_models(folder):
    measured(folder, "--spectrum_steps", "4", "--plane", models=("first", "causal"))
    drawn = {p.name for p in (folder / "out").glob("*.png")}
    assert drawn == {"spectrum.png", "loss_line.png", "plane_0_first.png", "plane_1_causal.png"}


def test_what_cannot_be_measured(folder, tmp_path):
    with pytest.raises(UsageError, match="neither a model folder nor a name on the Hub"):
        measured(folder, models=("nothing",))
    with pytest.raises(UsageError, match="no column 'words'"):
        measured(folder, "--text_column", "words")
    bert(labels=2).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder / "first").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="label 2 of the data is none of the model's 2 labels"):
        measured(folder, models=(tmp_path,))
