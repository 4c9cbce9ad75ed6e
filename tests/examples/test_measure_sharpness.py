"""The script that measures saved models: the numbers of the library, side by side, in a table and figures."""

from __future__ import annotations

import json
import mmap

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers import BertTokenizerFast, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import measure_sharpness
from hf_ssam.saved import models as probes
from hf_ssam.saved import resident
from hf_ssam.sharpness import Objective, top_eigenvalues
from support.cli import UsageError
from tests.support.cases import bert, gpt2

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
    assert [r["model"] for r in rows] == ["first", "second"]
    data = Dataset.load_from_disk(folder / "data").shuffle(seed=0)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "first")
    batch = {**tokenizer(data["text"][:], padding=True, return_tensors="pt"), "labels": torch.tensor(data["label"][:])}
    expected = top_eigenvalues(bert(seed=1), dict(batch), k=2).values
    assert rows[0]["eigenvalues"] == pytest.approx(expected, rel=1e-2)
    printed = capsys.readouterr().out
    data = f"{folder.name}/data, train"
    assert f"| first | {data} | all trainable | {rows[0]['n']:,} |" in printed
    assert f"measured on up to 32 rows of {data}" in printed
    assert json.loads((folder / "out" / "sharpness.json").read_text())[1]["loss"] == rows[1]["loss"]


@pytest.mark.slow
def test_one_row_a_pattern(folder):
    rows = measured(folder, "--no_figures", "--parameters", "layer.0", "classifier")
    assert [r["weights"] for r in rows] == ["layer.0", "classifier"]
    assert rows[1]["n"] == 16 * 3 + 3


def test_what_is_asked_for_and_no_more(folder, capsys):
    rows = measured(folder, "--no_figures", "--measures", "trace", "eigenvalues")
    assert list(rows[0]["cost"]) == ["trace", "eigenvalues"]
    assert "rise" not in rows[0]
    assert rows[0]["loss"] > 0
    assert "rise" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_batches(folder):
    small, large = (measured(folder, "--no_figures", "--batch_size", size)[0] for size in "16")
    for name in ("loss", "trace", "rise"):
        assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-5)
    assert small["eigenvalues"] == pytest.approx(large["eigenvalues"], rel=1e-2)


def touched(mebibytes: int) -> None:
    """Hold that much memory for a moment, from the system and not from what the allocator has kept."""
    with mmap.mmap(-1, mebibytes * 2**20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def test_memory_is_that_of_the_call_alone():
    touched(256)
    base = resident.now()
    _, peak = resident.peak_of(lambda: touched(64))
    assert 60 < peak - base < 130


@pytest.mark.slow
def test_images(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8)
    classes = ClassLabel(names=["x", "y", "z"])
    features = Features({"scan": Image(), "label": classes})
    data = Dataset.from_dict(
        {"scan": [PIL.Image.fromarray(p) for p in pixels], "label": [0, 1, 2, 0, 1, 2]}, features=features
    )
    DatasetDict(test=data).save_to_disk(folder / "scans")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        label2id={"z": 0, "y": 1, "x": 2},
        id2label={0: "z", 1: "y", 2: "x"},
    )
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder / "images")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder / "images")
    flags = ("--dataset_name", str(folder / "scans"), "--image_column", "scan", "--spectrum_steps", "4")
    row = measured(folder, *flags, "--split", "test", "--measures", "eigenvalues", models=("images",))[0]
    inputs = processor([PIL.Image.fromarray(p).convert("RGB") for p in pixels], return_tensors="pt")
    batch = {**inputs, "labels": torch.tensor([2, 1, 0, 2, 1, 0])}
    assert row["loss"] == pytest.approx(Objective(model, batch).value(), rel=1e-5)
    assert row["eigenvalues"] == pytest.approx(top_eigenvalues(model, batch).values, rel=1e-2)
    with pytest.raises(UsageError, match="--split train: the data has 6 test examples"):
        measured(folder, *flags, models=("images",))


def test_models_of_the_same_folder_name_stay_apart(tmp_path):
    for place in ("ssam/run", "adamw/run", "adamw/other"):
        (tmp_path / place).mkdir(parents=True)
    places = [str(tmp_path / place) for place in ("ssam/run", "adamw/run")]
    assert probes.short_names(places) == ["ssam/run", "adamw/run"]
    assert probes.short_names([places[0], str(tmp_path / "adamw/other"), "org/name"]) == ["run", "other", "org/name"]


@pytest.mark.slow
def test_figures_and_causal_models(folder):
    measured(folder, "--spectrum_steps", "4", "--plane", models=("first", "causal"))
    drawn = {p.name for p in (folder / "out").glob("*.png")}
    assert drawn == {"spectrum.png", "loss_line.png", "plane.png"}


def test_what_cannot_be_measured(folder, tmp_path):
    with pytest.raises(UsageError, match="neither a local folder nor to be had from the Hub"):
        measured(folder, models=("nothing",))
    with pytest.raises(UsageError, match="no column 'words'"):
        measured(folder, "--text_column", "words")
    bert(labels=2).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder / "first").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has the label 'z', which .* does not know"):
        measured(folder, models=(tmp_path,))
