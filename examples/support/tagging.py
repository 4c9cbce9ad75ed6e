"""Words with a tag each: which columns they are in, whose tags count, and what a tagger reads and is scored by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import evaluate
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase

from hf_ssam.saved.labels import class_names, finished_names, numbers, ordered_as

from .cli import UsageError
from .metrics import METRICS
from .plan import Plan
from .sources import FileArguments, require_columns

IGNORED = -100


@dataclass
class TokenArguments(FileArguments):
    """Which words, and which tags."""

    text_column_name: str = field(default="tokens", metadata={"help": "The column with the words of each example."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "The column with their tags."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer sentences are cut to so many tokens."})


def require_tags(raw: DatasetDict, data: TokenArguments) -> None:
    """Refuse data without a tag for each word.

    Raises:
        UsageError: a column is missing or holds no lists, or an example has more words than tags, or fewer.
    """
    words, labels = data.text_column_name, data.label_column_name
    require_columns(raw, {"text_column_name": words, "label_column_name": labels})
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
    metric = evaluate.load(str(METRICS / "spans.py"), keep_in_memory=True)

    def score(pair: EvalPrediction) -> dict[str, float]:
        said, true = pair.predictions.argmax(-1), pair.label_ids
        kept = true != IGNORED
        return metric.compute(
            predictions=[[tags[i] for i in row[keep]] for row, keep in zip(said, kept, strict=True)],
            references=[[tags[i] for i in row[keep]] for row, keep in zip(true, kept, strict=True)],
        )

    return score
