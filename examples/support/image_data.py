"""Images and their classes from anywhere, checked before a model is loaded.

`load` reads image folders, a data set by name or folder, or an offline one; `undecoded`, `trained_names` and
`number_labels` find out what is in it, and `pixels` makes a model's input of it on the fly. Whatever cannot work is a
`UsageError` that names the file and the column.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, Image
from transformers import BaseImageProcessor

from hf_ssam.saved.files import read_folder, read_named
from hf_ssam.saved.labels import class_names, numbers, shown

from . import offline
from .cli import UsageError
from .sources import DataArguments, absolute


@dataclass
class ImageArguments(DataArguments):
    """Which images, and how large."""

    train_dir: str | None = field(default=None, metadata={"help": "A folder with a folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "What to evaluate on, in the same classes."})
    offline_dataset: Literal["mnist_5k", "fashion_mnist"] = field(
        default="mnist_5k", metadata={"help": "What to use when none of the above is given; fashion_mnist needs apt."}
    )
    image_column_name: str = field(default="image", metadata={"help": "The column with the image."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the class."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize to so many pixels a side; the image processor's own size if not given."},
    )

    def __post_init__(self) -> None:
        if self.dataset_name and (self.train_dir or self.validation_dir):
            raise ValueError("give only one of --dataset_name and folders (--train_dir, --validation_dir)")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size {self.image_size} is not a number of pixels: give one from 1")

    @property
    def origin(self) -> dict[str, str]:
        """What the training data are; nothing for an offline set."""
        return {"file": absolute(self.train_dir)} if self.train_dir else super().origin

    def flag(self, split: str) -> str:
        """The flag that brings `split` from local files."""
        return f"--{split}_dir"


def load(data: ImageArguments) -> DatasetDict:
    """The splits of the folders, of the named data set, or of the offline one.

    Raises:
        UsageError: a folder is missing, or holds no images.
    """
    folders = {"train": data.train_dir, "validation": data.validation_dir}
    if any(folders.values()):
        given = {split: Path(place) for split, place in folders.items() if place}
        least = {"train": 2, "validation": 1}
        return DatasetDict({split: read_folder(place, least[split]) for split, place in given.items()})
    if data.dataset_name:
        return read_named(data.dataset_name, data.dataset_config_name)
    return offline.mnist_5k() if data.offline_dataset == "mnist_5k" else offline.fashion_mnist()


def undecoded(rows: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """`rows` with each image as its file's path or bytes, after a look at the header of each, which is quick.

    Raises:
        UsageError: there is no such column, or something in it is no image.
    """
    files = {}
    for use, split in rows.items():
        if not isinstance(split.features.get(column), Image):
            kinds = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in split.features.items())
            raise UsageError(
                f"the {use} data has no images in column {column!r}, it has {kinds}: set --image_column_name"
            )
        files[use] = split.cast_column(column, Image(decode=False))
        for image in files[use][column]:
            with opened(image):
                pass
    return files


@contextlib.contextmanager
def opened(image: dict[str, Any]) -> Iterator[PIL.Image.Image]:
    """The image of a file, or of its bytes.

    Raises:
        UsageError: it cannot be read.
    """
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    try:
        with PIL.Image.open(source) as found:
            yield found
    except OSError as error:
        name = image["path"] or "in the data set"
        raise UsageError(f"the image {name} cannot be read ({error}): replace it or remove it") from error


def trained_names(raw: DatasetDict, column: str) -> tuple[list[str], str]:
    """The classes of the training data, by number, and the end of a sentence about a label that is none of them.

    Raises:
        UsageError: there is no such column.
    """
    _require_labels(raw["train"], "train", column)
    names = class_names(column, raw["train"])
    return names, f"the train data does not have (it has {shown(names)}): drop those images, or train on some"


def number_labels(rows: dict[str, Dataset], column: str, names: list[str], unknown: str) -> dict[str, Dataset]:
    """Make `column` the column ``labels``, a class number, for each use.

    Args:
        rows: the examples of each use.
        column: the labels.
        names: the classes by number.
        unknown: see `labels.numbers`.

    Raises:
        UsageError: there is no such column, or a label is none of `names`.
    """
    numbered = {}
    for use, split in rows.items():
        _require_labels(split, use, column)
        values = numbers(split[column][:], split.features[column], names, f"the {use} data", unknown)
        others = split.remove_columns({column, "labels"} & set(split.column_names))
        numbered[use] = others.add_column("labels", values)
    return numbered


def _require_labels(rows: Dataset, use: str, column: str) -> None:
    if column not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise UsageError(f"the {use} data has no labels in column {column!r}, it has {found}: set --label_column_name")


def pixels(processor: BaseImageProcessor, column: str) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Examples -> pixel values, of shape (n, 3, height, width), and ``labels``."""

    def rgb(image: dict[str, Any]) -> np.ndarray:
        with opened(image) as found:
            return np.asarray(found.convert("RGB"))

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [rgb(image) for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return transform
