"""What a classifier of texts reads, what it is scored by, and what it predicts."""

from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer

from .metrics import METRICS
from .text_data import TextArguments


def encoder(
    tokenizer: PreTrainedTokenizerBase, columns: list[str], data: TextArguments, longest: int | None
) -> Callable[[dict], dict]:
    """Examples -> token ids of their text, or pair of texts, cut to what the tokenizer and the model can take."""
    length = min(data.max_seq_length, tokenizer.model_max_length, longest or data.max_seq_length)
    padding = "max_length" if data.pad_to_max_length else False

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch[column] for column in columns)
        return tokenizer(*texts, truncation=True, max_length=length, padding=padding)

    return encode


def encoded(rows: Dataset, encode: Callable[[dict], dict], desc: str) -> Dataset:
    """`rows` as token ids and ``label``, where they have one."""
    drop = [name for name in rows.column_names if name != "label"]
    return rows.map(encode, batched=True, remove_columns=drop, desc=desc)


def scorer(names: list[str] | None, data: TextArguments) -> Callable[[EvalPrediction], dict[str, float]]:
    """Model output and labels -> scores, for classes or (where `names` is None) a regression."""
    module = data.metric_name or str(METRICS / ("regression.py" if names is None else "classification.py"))
    metric = evaluate.load(module, keep_in_memory=True)
    ours = {"num_classes": len(names)} if names is not None and data.metric_name is None else {}
    return lambda pair: metric.compute(predictions=decide(pair.predictions, names), references=pair.label_ids, **ours)


def decide(predictions: np.ndarray | tuple, names: list[str] | None) -> np.ndarray:
    """Model output, logits of shape (n, classes) or scores of shape (n, 1), as classes or scores of shape (n,)."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.squeeze(-1) if names is None else logits.argmax(-1)


def predict(trainer: Trainer, rows: Dataset, names: list[str] | None) -> dict[str, float]:
    """Write a prediction for each example to ``predictions.csv`` in the output folder, and return the metrics."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    decided = decide(output.predictions, names)
    said = [str(value) if names is None else names[value] for value in decided]
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"index": range(len(said)), "prediction": said}).to_csv(path, index=False)
        print(f"{len(said)} predictions are in {path}", flush=True)
    return output.metrics
