"""Fine-tune an image classifier with a sharpness-aware method.

    python examples/run_image_classification.py configs/tasks/mnist.yaml
    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224 --dataset_name beans
    python examples/run_image_classification.py --train_dir pets/train --validation_dir pets/test --optim adamw_torch

An image folder holds one folder of images for each class. Without a model it takes EfficientNet-Lite0 with its
ImageNet weights, and without data 5,000 handwritten digits; neither needs a model hub. `--optim` takes a method
(`ssam`, `sam` ...) or a stock optimizer, which is the baseline. Every field of `TrainingArguments` is a flag.

Batch normalisation is safe: the second pass of a method leaves the running statistics as the first one did.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

import offline
import offline_models
from cli import ExampleParser, UsageError, run
from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from runs import prepare, train_and_report
from sources import DataArguments, ModelArguments, pretrained, read_named, uses

METRIC = Path(__file__).parent / "metrics" / "classification.py"


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


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, ImageArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    checkpoint = prepare(args)
    set_seed(args.seed)
    args.remove_unused_columns = False  # images are read on the fly, from columns that no model knows

    with args.main_process_first(desc="reading the data"):
        rows = uses(load(data_args), data_args, args)
    rows = undecoded(rows, data_args.image_column_name)
    rows, names = number_labels(rows, data_args.label_column_name)
    model, processor = load_model(model_args, names, data_args.image_size)
    transform = pixels(processor, data_args.image_column_name)
    metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def score(pair: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=pair.predictions.argmax(-1), references=pair.label_ids)

    trainer = SSAMTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"].with_transform(transform) if "train" in rows else None,
        eval_dataset=rows["eval"].with_transform(transform) if "eval" in rows else None,
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=score,
    )
    card = {"dataset": data_args.dataset_name} if data_args.dataset_name else {}
    origin = model_args.model_name_or_path
    return train_and_report(trainer, checkpoint, finetuned_from=origin, tasks="image-classification", **card)


def load(data: ImageArguments) -> DatasetDict:
    """The splits of the folders, of the named data set, or of the offline one.

    Raises:
        UsageError: a folder is missing, or holds no images.
    """
    folders = {"train": data.train_dir, "validation": data.validation_dir}
    if any(folders.values()):
        return DatasetDict({split: _folder(Path(place)) for split, place in folders.items() if place})
    if data.dataset_name:
        return read_named(data.dataset_name, data.dataset_config_name)
    return offline.mnist_5k() if data.offline_dataset == "mnist_5k" else offline.fashion_mnist()


def _folder(place: Path) -> Dataset:
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}")
    classes = sorted(folder.name for folder in place.iterdir() if folder.is_dir())
    endings = PIL.Image.registered_extensions()
    for name in classes or [""]:
        if not any(path.suffix.lower() in endings for path in (place / name).iterdir()):
            raise UsageError(f"{place / name} holds no images: it needs some, as JPEG or PNG files")
    if len(classes) < 2:
        raise UsageError(f"{place} needs a folder of images for each class, and at least two: it has {len(classes)}")
    return read_named("imagefolder", data_dir=str(place), drop_labels=False)["train"]


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


def number_labels(rows: dict[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """Make `column` the column ``labels``, a class number, in each split.

    Returns:
        The splits, and the names of the classes of the first one, by number.

    Raises:
        UsageError: there is no such column, or a split has a class that the first one does not have.
    """
    first = next(iter(rows))
    for use, split in rows.items():
        if column not in split.column_names:
            found = ", ".join(split.column_names)
            raise UsageError(
                f"the {use} data has no labels in column {column!r}, it has {found}: set --label_column_name"
            )
    feature = rows[first].features[column]
    names = feature.names if isinstance(feature, ClassLabel) else sorted(map(str, rows[first].unique(column)))
    numbered = {}
    for use, split in rows.items():
        own = split.features[column]
        said = [own.int2str(v) if isinstance(own, ClassLabel) else str(v) for v in split[column]]
        if strange := sorted(set(said) - set(names)):
            raise UsageError(f"the {use} data has the class {strange[0]!r}, which the {first} data does not have")
        others = split.remove_columns({column, "labels"} & set(split.column_names))
        numbered[use] = others.add_column("labels", [names.index(name) for name in said])
    return numbered, names


def load_model(
    source: ModelArguments, names: list[str], size: int | None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model with a fresh head for these classes, and its image processor."""
    path = source.model_name_or_path or str(offline_models.lite0())
    head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    processor = pretrained(AutoImageProcessor, path, **source.hub)
    if size is not None:
        processor.size = {"height": size, "width": size}
    config = pretrained(AutoConfig, path, **head, **source.hub)
    options = {"config": config, "dtype": source.dtype, "ignore_mismatched_sizes": True}
    return pretrained(AutoModelForImageClassification, path, **options, **source.hub), processor


def pixels(processor: BaseImageProcessor, column: str) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Examples -> pixel values, of shape (n, 3, height, width), and ``labels``."""

    def rgb(image: dict[str, Any]) -> np.ndarray:
        with opened(image) as found:
            return np.asarray(found.convert("RGB"))

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [rgb(image) for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return transform


if __name__ == "__main__":
    run(main)
