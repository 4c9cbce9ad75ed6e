"""Accuracy, F1 and Matthews correlation from one confusion matrix, as an `evaluate` metric that needs no network."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Of a classifier's predictions: `accuracy`; `f1`, which is the F1 of class 1 where there are two classes (`num_classes`,
or as many as occur if not given) and the unweighted mean over the classes that occur otherwise; and
`matthews_correlation`, for any number of classes (Gorodkin 2004; the formula is from memory). A score whose
denominator is 0 is 0.
"""


class Classification(evaluate.Metric):
    """Accuracy, F1 and Matthews correlation of integer class predictions, shape (n,)."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", features=features)

    def _compute(
        self, predictions: list[int], references: list[int], num_classes: int | None = None
    ) -> dict[str, float]:
        counts = _confusion(np.asarray(predictions), np.asarray(references), num_classes or 2)
        hits, predicted, actual = counts.diagonal(), counts.sum(0), counts.sum(1)
        f1 = _ratio(2 * hits, predicted + actual)
        seen = predicted + actual > 0
        return {
            "accuracy": float(hits.sum() / counts.sum()),
            "f1": float(f1[1] if len(counts) == 2 else f1[seen].mean()),
            "matthews_correlation": float(_matthews(counts.sum(), hits.sum(), predicted, actual)),
        }


def _confusion(predictions: np.ndarray, references: np.ndarray, least: int) -> np.ndarray:
    """Counts, float64 of shape (classes, classes): a row for each true class, a column for each predicted one."""
    size = max(least, 1 + int(max(predictions.max(), references.max())))
    return np.bincount(references * size + predictions, minlength=size * size).reshape(size, size).astype(float)


def _matthews(total: float, right: float, predicted: np.ndarray, actual: np.ndarray) -> float:
    spread = (total**2 - predicted @ predicted) * (total**2 - actual @ actual)
    return _ratio(right * total - predicted @ actual, np.sqrt(spread))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)
