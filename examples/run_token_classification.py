"""Fine-tune a tagger of words (names, parts of speech) with a sharpness-aware method.

    python examples/run_token_classification.py configs/tasks/names.yaml
    python examples/run_token_classification.py --model_name_or_path bert-base-cased --dataset_name my/ner --rho 0.05
    python examples/run_token_classification.py --train_file train.json --validation_file test.json --optim adamw_torch

An example is a list of words and a list of tags. Without a model it takes MiniLM-L6, and without data the offline
questions in lower case, in which it finds the names (`offline_tasks.names`); neither needs a model hub.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import evaluate
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.saved.labels import class_names, finished_names, not_known, numbers, ordered_as
from support import offline, offline_tasks
from support.base_models import ModelArguments, check_length, classifier, path_of, pretrained, tokenizer_for
from support.cli import ExampleParser, UsageError, run
from support.metrics import METRICS
from support.plan import Plan, prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import FileArguments, load_files, require_columns, uses

METRIC = METRICS / "spans.py"
IGNORED = -100


@dataclass
class TokenArguments(FileArguments):
    """Which words, and which tags."""

    text_column_name: str = field(default="tokens", metadata={"help": "The column with the words of each example."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "The column with their tags."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer sentences are cut to so many tokens."})


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, TokenArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    path = path_of(model_args, plan, offline.minilm)
    config = pretrained(AutoConfig, path, **model_args.hub)
    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.names)
        columns = {"text_column_name": data_args.text_column_name, "label_column_name": data_args.label_column_name}
        require_columns(raw, columns)
        require_tags(raw, data_args)
        rows = uses(raw, data_args, plan)
        tags = settled_tags(raw, data_args, config, path, plan)
        rows = number_tags(rows, data_args, tags, not_known(path, tags))

    check_length("max_seq_length", data_args.max_seq_length, config)
    tokenizer = tokenizer_for(model_args, path)
    model = classifier(AutoModelForTokenClassification, path, model_args, tags, plan)
    with args.main_process_first(desc="tokenizing"):
        encode = encoder(tokenizer, data_args)
        prepared = {use: r.map(encode, batched=True, remove_columns=r.column_names) for use, r in rows.items()}

    trainer = SSAMTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=scorer(tags),
    )
    facts = {"finetuned_from": model_args.model_name_or_path, "tasks": "token-classification", **data_args.card}
    columns = {"columns": [data_args.text_column_name], "label_column": data_args.label_column_name}
    data = run_data(data_args, "names", **columns, labels=tags, seed=args.seed)
    return train_and_report(trainer, plan.checkpoint, data, **facts)


def require_tags(raw: DatasetDict, data: TokenArguments) -> None:
    """Refuse data without a tag for each word.

    Raises:
        UsageError: the columns hold no lists, or an example has more words than tags, or fewer.
    """
    words, labels = data.text_column_name, data.label_column_name
    for split, rows in raw.items():
        for number, (some, others) in enumerate(zip(rows[words], rows[labels], strict=True), start=1):
            if not isinstance(some, list) or not isinstance(others, list):
                raise UsageError(f"the {split} data needs lists of words and of tags in {words!r} and {labels!r}")
            if len(some) != len(others):
                raise UsageError(f"example {number} of the {split} data has {len(some)} words and {len(others)} tags")


def settled_tags(raw: DatasetDict, data: TokenArguments, config: PreTrainedConfig, path: str, plan: Plan) -> list[str]:
    """The tags' names by number: of a run that trains, those that the data declares, or what occurs in any split."""
    if plan.trains:
        return ordered_as(config, class_names(data.label_column_name, *raw.values()))
    return finished_names(config, "ForTokenClassification", path)


def number_tags(rows: dict[str, Dataset], data: TokenArguments, tags: list[str], unknown: str) -> dict[str, Dataset]:
    """Make the tags of each use numbers.

    Raises:
        UsageError: a tag is none of `tags`.
    """
    column, numbered = data.label_column_name, {}
    for use, some in rows.items():
        values = numbers(some[column][:], some.features[column], tags, f"the {use} data", unknown)
        numbered[use] = some.remove_columns(column).add_column(column, values)
    return numbered


def encoder(tokenizer: PreTrainedTokenizerBase, data: TokenArguments) -> Callable[[dict], dict]:
    """Examples -> token ids and ``labels``: a word's first token has its tag, and what else there is has none."""

    def label(ids: list[int | None], tags: list[int]) -> list[int]:
        first = [id is not None and id != before for before, id in zip([None, *ids], ids, strict=False)]
        return [tags[id] if is_first else IGNORED for id, is_first in zip(ids, first, strict=True)]

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer(
            batch[data.text_column_name], is_split_into_words=True, truncation=True, max_length=data.max_seq_length
        )
        rows = enumerate(batch[data.label_column_name])
        encoded["labels"] = [label(encoded.word_ids(i), tags) for i, tags in rows]
        return encoded

    return encode


def scorer(tags: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Logits of shape (n, tokens, tags) and labels of shape (n, tokens) -> scores."""
    metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def score(pair: EvalPrediction) -> dict[str, float]:
        said, true = pair.predictions.argmax(-1), pair.label_ids
        kept = true != IGNORED
        return metric.compute(
            predictions=[[tags[i] for i in row[keep]] for row, keep in zip(said, kept, strict=True)],
            references=[[tags[i] for i in row[keep]] for row, keep in zip(true, kept, strict=True)],
        )

    return score


if __name__ == "__main__":
    run(main)
