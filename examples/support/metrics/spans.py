"""Precision, recall and F1 of tagged spans, as an `evaluate` metric that needs no network."""

import datasets
import evaluate

_DESCRIPTION = """
Of tags in the B-/I-/O scheme, a list of them for each sentence: `precision`, `recall` and `f1` over spans, of which
first word, last word and kind must all be right; and `accuracy` over tags. An I- that continues nothing begins a span,
as in CoNLL's scoring (Tjong Kim Sang and De Meulder 2003; the rule is from memory). A score whose denominator is 0 is
0.
"""


class Spans(evaluate.Metric):
    """Span scores of tags in words, `predictions` and `references` being lists of lists of the same lengths."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", features=features)

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        found = sum(len(spans(said)) for said, _ in pairs)
        there = sum(len(spans(true)) for _, true in pairs)
        right = sum(len(spans(said) & spans(true)) for said, true in pairs)
        tags = [said == true for both in pairs for said, true in zip(*both, strict=True)]
        return {
            "precision": right / max(found, 1),
            "recall": right / max(there, 1),
            "f1": 2 * right / max(found + there, 1),
            "accuracy": sum(tags) / max(len(tags), 1),
        }


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """First word, the word after the last, and kind of each span."""
    found, start, kind = set(), 0, None
    for number, tag in enumerate([*tags, "O"]):
        here = tag[2:] or None
        if kind is not None and (tag.startswith("B-") or here != kind):
            found.add((start, number, kind))
        if tag.startswith("B-") or here != kind:
            start = number
        kind = here
    return found
