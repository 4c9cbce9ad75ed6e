"""Fine-tune a model on text classification, pairs of texts or a score, with a sharpness-aware method.

    python examples/run_text_classification.py configs/tasks/trec.yaml
    python examples/run_text_classification.py --model_name_or_path bert-base-uncased --task_name mrpc --rho 0.05
    python examples/run_text_classification.py --train_file train.csv --validation_file test.csv --optim adamw_torch

Without a model it takes MiniLM-L6, and without data TREC questions; neither needs a model hub. `--optim` takes a
method (`ssam`, `sam` ...) or a stock optimizer, which is the baseline. Every field of `TrainingArguments` is a flag.
With none of `--do_train`, `--do_eval` and `--do_predict` it trains and evaluates.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import offline
from cli import ExampleParser, UsageError, run
from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from text_data import DataArguments, load, number_labels, text_columns

METRICS = Path(__file__).parent / "metrics"


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model on the Hub, or a local folder; MiniLM-L6 if not given."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Where its tokenizer is, if elsewhere."})
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the weights."})


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train, evaluate and predict as the command line `argv` says.

    Returns:
        All metrics, under the names they have in ``all_results.json``, and the ``output_dir``.
    """
    parser = ExampleParser((ModelArguments, DataArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data"):
        raw = load(data_args)
        columns = text_columns(raw, data_args)
        raw, names = number_labels(raw, data_args)
    splits = _choose_splits(raw, args)
    checkpoint = _checkpoint(args)
    model, tokenizer = _load_model(model_args, names)
    with args.main_process_first(desc="tokenizing"):
        prepared = {use: _prepare(raw[split], use, columns, tokenizer, data_args) for use, split in splits.items()}

    trainer = SSAMTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=_metrics(names, data_args),
    )
    results = {}
    if args.do_train:
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        results |= trainer.evaluate()
    if args.do_predict:
        results |= _predict(trainer, prepared["predict"], names)
    if trainer.is_world_process_zero():
        _report(results, trainer)
    if args.do_train:
        _share(trainer, model_args, data_args)
    return {**results, "output_dir": args.output_dir}


def _choose_splits(raw: DatasetDict, args: SSAMTrainingArguments) -> dict[str, str]:
    """Which split of the data serves each use: ``train``, ``eval`` (validation, or else test) and ``predict``.

    Where nothing was asked for, the run trains, and evaluates if there is something to evaluate on; a `do_eval` that
    only follows from `eval_strategy` asks for nothing.
    """
    labelled_test = "test" in raw and "label" in raw["test"].column_names
    held_out = "validation" if "validation" in raw or not labelled_test else "test"
    if not (args.do_train or args.do_predict or (args.do_eval and args.eval_strategy == "no")):
        args.do_train, args.do_eval = True, args.do_eval or held_out in raw
    evaluates = args.do_eval or args.eval_strategy != "no" or args.eval_on_start
    splits = {"train": "train"} if args.do_train else {}
    splits |= {"eval": held_out} if evaluates else {}
    splits |= {"predict": "test"} if args.do_predict else {}
    for use, split in splits.items():
        if split not in raw:
            flag = {"train": "--train_file", "eval": "--validation_file", "predict": "--test_file"}[use]
            raise UsageError(f"there is nothing to {use} on: the data has only {', '.join(raw)}; give {flag}")
    return splits


def _load_model(source: ModelArguments, names: list[str] | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a fresh head for these classes (one output where `names` is None), and its tokenizer."""
    path = source.model_name_or_path or str(offline.minilm())
    hub = {"revision": source.model_revision, "trust_remote_code": source.trust_remote_code}
    if names is None:
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_name or path, **hub)
        config = AutoConfig.from_pretrained(path, **head, **hub)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, ignore_mismatched_sizes=True, **hub
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the model {path} is neither a local folder nor to be had from the Hub ({reason})"
        ) from error
    return model, tokenizer


def _prepare(
    rows: Dataset, use: str, columns: list[str], tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> Dataset:
    """The first examples of `rows`, as many as `use` may have, as token ids and ``label``."""
    limits = {"train": data.max_train_samples, "eval": data.max_eval_samples, "predict": data.max_predict_samples}
    rows = rows.select(range(min(limits[use] or len(rows), len(rows))))
    length = min(data.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data.pad_to_max_length else False

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch[column] for column in columns)
        return tokenizer(*texts, truncation=True, max_length=length, padding=padding)

    drop = [name for name in rows.column_names if name != "label"]
    return rows.map(encode, batched=True, remove_columns=drop, desc=f"tokenizing to {use}")


def _metrics(names: list[str] | None, data: DataArguments) -> Callable[[EvalPrediction], dict[str, float]]:
    module = data.metric_name or str(METRICS / ("regression.py" if names is None else "classification.py"))
    metric = evaluate.load(module, keep_in_memory=True)
    return lambda pair: metric.compute(predictions=_decide(pair.predictions, names), references=pair.label_ids)


def _decide(predictions: np.ndarray | tuple, names: list[str] | None) -> np.ndarray:
    """Model output, logits of shape (n, classes) or scores of shape (n, 1), as classes or scores of shape (n,)."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.squeeze(-1) if names is None else logits.argmax(-1)


def _checkpoint(args: SSAMTrainingArguments) -> str | None:
    """The checkpoint to go on from: ``true`` means the last one in the output folder."""
    if args.resume_from_checkpoint is None or str(args.resume_from_checkpoint).lower() == "false":
        return None
    asked = str(args.resume_from_checkpoint)
    where = args.output_dir if asked.lower() == "true" else asked
    folder = where
    if where == args.output_dir:
        folder = get_last_checkpoint(where) if Path(where).is_dir() else None
    if folder is None or not Path(folder).is_dir():
        raise UsageError(f"--resume_from_checkpoint {asked}: there is no checkpoint in {where}")
    return folder


def _predict(trainer: SSAMTrainer, rows: Dataset, names: list[str] | None) -> dict[str, float]:
    """Write a prediction for each example to ``predictions.csv`` in the output folder."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    decided = _decide(output.predictions, names)
    lines = [str(value) if names is None else names[value] for value in decided]
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"index": range(len(lines)), "prediction": lines}).to_csv(path, index=False)
    return output.metrics


def _report(results: dict[str, float], trainer: SSAMTrainer) -> None:
    """Write ``all_results.json``, and print the results line."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    scores = [f"{name} {value:.4f}" for name, value in results.items() if _is_score(name)]
    print(f"results after {trainer.state.global_step} steps: {', '.join(scores)}; in {folder}", flush=True)


def _is_score(name: str) -> bool:
    is_cost = name.endswith(("_time", "_runtime", "_per_second"))
    return name.startswith(("eval_", "predict_")) and not is_cost


def _share(trainer: SSAMTrainer, model: ModelArguments, data: DataArguments) -> None:
    """Write the model card, and push it with the model where ``--push_to_hub`` asks for it."""
    facts = {"finetuned_from": model.model_name_or_path, "tasks": "text-classification"}
    if data.dataset_name or data.task_name:
        facts["dataset"] = facts["dataset_tags"] = data.dataset_name or "nyu-mll/glue"
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)


if __name__ == "__main__":
    run(main)
