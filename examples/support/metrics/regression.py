"""Mean squared error, Pearson and Spearman correlation, as an `evaluate` metric that needs no network."""

import datasets
import evaluate
import numpy as np
import pandas as pd

_DESCRIPTION = """
Of a regression's predictions: `mse`, the mean squared error in the label's unit squared; `pearson` and `spearman`, the
linear and the rank correlation (ties share their mean rank), which are 0 where one side is constant.
"""


class Regression(evaluate.Metric):
    """Mean squared error, Pearson and Spearman correlation of real predictions, shape (n,)."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", features=features)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        x, y = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
        ranks = (pd.Series(values).rank().to_numpy() for values in (x, y))
        return {"mse": float(np.mean((x - y) ** 2)), "pearson": _correlation(x, y), "spearman": _correlation(*ranks)}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0
