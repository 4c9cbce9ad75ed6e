"""Fine-tune an image classifier with a sharpness-aware method.

    python examples/run_image_classification.py configs/tasks/mnist.yaml
    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224 --dataset_name beans
    python examples/run_image_classification.py --train_dir pets/train --validation_dir pets/test --optim adamw_torch

An image folder holds one folder of images for each class. Without a model it takes EfficientNet-Lite0 with its
ImageNet weights, and without data 5,000 handwritten digits; neither needs a model hub. `--optim` takes a method
(`ssam`, `sam` ...) or a stock optimizer, which is the baseline. Every field of `TrainingArguments` is a flag.

Batch normalisation is safe: the second pass of a method leaves the running statistics as the first one did.
"""

from collections.abc import Sequence

import evaluate
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

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from support import offline_models
from support.base_models import ModelArguments, labelled, pretrained, with_new_head
from support.cli import ExampleParser, run
from support.image_data import ImageArguments, load, number_labels, pixels, undecoded
from support.metrics import METRICS
from support.runs import prepare, train_and_report
from support.sources import uses

METRIC = METRICS / "classification.py"


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, ImageArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args)
    set_seed(args.seed)
    args.remove_unused_columns = False  # images are read on the fly, from columns that no model knows

    with args.main_process_first(desc="reading the data"):
        rows = uses(load(data_args), data_args, plan)
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
    facts = {"finetuned_from": model_args.model_name_or_path, "tasks": "image-classification", **data_args.card}
    return train_and_report(trainer, plan.checkpoint, **facts)


def load_model(
    source: ModelArguments, names: list[str], size: int | None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model with a fresh head for these classes, and its image processor."""
    path = source.model_name_or_path or str(offline_models.lite0())
    processor = pretrained(AutoImageProcessor, path, **source.hub)
    if size is not None:
        processor.size = {"height": size, "width": size}
    config = pretrained(AutoConfig, path, **labelled(names), **source.hub)
    return with_new_head(AutoModelForImageClassification, path, config, source), processor


if __name__ == "__main__":
    run(main)
