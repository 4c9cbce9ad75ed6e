"""Fine-tune an image classifier with a sharpness-aware method.

    python examples/run_image_classification.py configs/tasks/mnist.yaml
    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224 --dataset_name beans
    python examples/run_image_classification.py --train_dir pets/train --validation_dir pets/test --optim adamw_torch

An image folder holds one folder of images for each class. Without a model it takes EfficientNet-Lite0 with its
ImageNet weights, and without data 5,000 handwritten digits; neither needs a model hub. `--optim` takes a method
(`ssam`, `sam` ...) or a stock optimizer, which is the baseline. Every field of `TrainingArguments` is a flag.

Without `--do_train` the labels are those of the model, matched by name:

    python examples/run_image_classification.py --model_name_or_path out/mnist --validation_dir pets/new --do_eval

Batch normalisation is safe: the second pass of a method leaves the running statistics as the first one did.
"""

from collections.abc import Sequence

import evaluate
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedConfig,
    default_data_collator,
    set_seed,
)

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.saved.labels import finished_names, not_known, ordered_as
from support import offline_models
from support.base_models import ModelArguments, classifier, path_of, pretrained
from support.cli import ExampleParser, run
from support.image_data import ImageArguments, load, number_labels, pixels, trained_names, undecoded
from support.metrics import METRICS
from support.plan import Plan, prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import uses

METRIC = METRICS / "classification.py"


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, ImageArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args)
    set_seed(args.seed)
    args.remove_unused_columns = False  # images are read on the fly, from columns that no model knows

    path = path_of(model_args, plan, offline_models.lite0)
    config = pretrained(AutoConfig, path, **model_args.hub)
    with args.main_process_first(desc="reading the data"):
        raw = load(data_args)
        rows = uses(raw, data_args, plan)
    rows = undecoded(rows, data_args.image_column_name)
    names, unknown = settled_names(raw, data_args, config, path, plan)
    rows = number_labels(rows, data_args.label_column_name, names, unknown)
    model = classifier(AutoModelForImageClassification, path, model_args, names, plan)
    processor = pretrained(AutoImageProcessor, path, **model_args.hub)
    if data_args.image_size is not None:
        processor.size = {"height": data_args.image_size, "width": data_args.image_size}
    transform = pixels(processor, data_args.image_column_name)
    metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def score(pair: EvalPrediction) -> dict[str, float]:
        said = pair.predictions.argmax(-1)
        return metric.compute(predictions=said, references=pair.label_ids, num_classes=len(names))

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
    columns = {"columns": [data_args.image_column_name], "label_column": data_args.label_column_name}
    data = run_data(data_args, data_args.offline_dataset, **columns, labels=names, seed=args.seed)
    return train_and_report(trainer, plan.checkpoint, data, **facts)


def settled_names(
    raw: DatasetDict, data: ImageArguments, config: PreTrainedConfig, path: str, plan: Plan
) -> tuple[list[str], str]:
    """The classes by number, and the end of a sentence about a label that is none of them."""
    if plan.trains:
        names, unknown = trained_names(raw, data.label_column_name)
        return ordered_as(config, names), unknown
    names = finished_names(config, "ForImageClassification", path)
    return names, not_known(path, names)


if __name__ == "__main__":
    run(main)
