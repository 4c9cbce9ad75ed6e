"""ROUGE-1 and ROUGE-L of generated texts, as an `evaluate` metric that needs no network."""

import re
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """
Of generated texts against one reference each, averaged over the texts: `rouge1`, the F1 of shared words; `rougeL`, the
F1 of the longest common subsequence of words (Lin 2004, sections 2 and 3); `exact`, the share of texts that are the
reference. Words are runs of letters and digits in lower case, without stemming, so scores are a little below those of
programs that stem.
"""


class Rouge(evaluate.Metric):
    """ROUGE F1 scores of texts."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [(_words(said), _words(true)) for said, true in zip(predictions, references, strict=True)]
        return {
            "rouge1": sum(_f1((Counter(s) & Counter(t)).total(), s, t) for s, t in pairs) / len(pairs),
            "rougeL": sum(_f1(longest_common(s, t), s, t) for s, t in pairs) / len(pairs),
            "exact": sum(s == t for s, t in pairs) / len(pairs),
        }


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest subsequence that `a` and `b` share."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
    return row[-1]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(shared: int, said: list[str], true: list[str]) -> float:
    return 2 * shared / max(len(said) + len(true), 1)
