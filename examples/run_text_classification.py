"""Fine-tune a model on text classification, pairs of texts or a score, with a sharpness-aware method.

    python examples/run_text_classification.py configs/tasks/trec.yaml
    python examples/run_text_classification.py --model_name_or_path bert-base-uncased --task_name mrpc --rho 0.05
    python examples/run_text_classification.py --train_file train.csv --validation_file test.csv --optim adamw_torch

Without a model it takes MiniLM-L6, and without data TREC questions; neither needs a model hub. `--optim` takes a
method (`ssam`, `sam` ...) or a stock optimizer, which is the baseline. Every field of `TrainingArguments` is a flag.
With none of `--do_train`, `--do_eval` and `--do_predict` it trains and evaluates; without `--do_train` the labels are
those of the model, matched by name:

    python examples/run_text_classification.py --model_name_or_path out/trec --test_file new.csv --do_predict
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    default_data_collator,
    set_seed,
)

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.saved.labels import finished_names, not_known, ordered_as
from support import offline
from support.base_models import ModelArguments, classifier, path_of, positions, pretrained, tokenizer_for
from support.cli import ExampleParser, run
from support.plan import Plan, prepare
from support.run_data import run_data
from support.runs import conclude, train_and_evaluate
from support.sources import uses
from support.text_data import TextArguments, load, number_labels, text_columns, trained_names
from support.text_inputs import encoded, encoder, predict, scorer


@dataclass
class ClassifierArguments(ModelArguments):
    """Which model to start from; MiniLM-L6 if not given."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "Where its tokenizer is, if elsewhere."})


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train, evaluate and predict as the command line `argv` says; see `conclude` for what it returns."""
    parser = ExampleParser((ClassifierArguments, TextArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args, offers=("train", "eval", "predict"))
    set_seed(args.seed)

    path = path_of(model_args, plan, offline.minilm)
    config = pretrained(AutoConfig, path, **model_args.hub)
    with args.main_process_first(desc="reading the data"):
        raw = load(data_args)
        columns = text_columns(raw, data_args)
        rows = uses(raw, data_args, plan)
        names, unknown = settled_names(raw, data_args, config, path, plan)
        rows = number_labels(rows, raw, data_args, names, unknown)
    tokenizer = tokenizer_for(model_args, model_args.tokenizer_name or path)
    padding = {"pad_token_id": tokenizer.pad_token_id}
    model = classifier(AutoModelForSequenceClassification, path, model_args, names, plan, **padding)
    with args.main_process_first(desc="tokenizing"):
        encode = encoder(tokenizer, columns, data_args, positions(model.config))
        prepared = {use: encoded(some, encode, f"tokenizing to {use}") for use, some in rows.items()}

    trainer = SSAMTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=scorer(names, data_args),
    )
    known = {"columns": columns, "label_column": data_args.label_column_name, "labels": names, "seed": args.seed}
    data = run_data(data_args, data_args.offline_dataset, **known)
    results = train_and_evaluate(trainer, plan.checkpoint, data)
    if args.do_predict:
        results |= predict(trainer, prepared["predict"], names)
    facts = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification", **data_args.card}
    return conclude(trainer, results, **facts)


def settled_names(
    raw: DatasetDict, data: TextArguments, config: PreTrainedConfig, path: str, plan: Plan
) -> tuple[list[str] | None, str]:
    """The classes by number, or None for a regression; and the end of a sentence about a label that is no class."""
    if plan.trains:
        names, unknown = trained_names(raw, data)
        return names and ordered_as(config, names), unknown
    names = finished_names(config, "ForSequenceClassification", path)
    if config.problem_type == "regression" or config.num_labels == 1:
        return None, f"is no number: {path} predicts a score"
    return names, not_known(path, names)


if __name__ == "__main__":
    run(main)
