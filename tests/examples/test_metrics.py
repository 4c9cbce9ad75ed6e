"""The offline metrics against scikit-learn and scipy."""

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from support.metrics import METRICS


@pytest.fixture(scope="module", params=[0, 1, 2])
def rng(request):
    return np.random.default_rng(request.param)


@pytest.mark.parametrize("classes", [2, 6])
def test_classification_equals_scikit_learn(rng, classes):
    truth, guess = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
    guess[:80] = truth[:80]
    found = evaluate.load(str(METRICS / "classification.py")).compute(predictions=guess, references=truth)
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(truth, guess),
            "f1": f1_score(truth, guess, average="binary" if classes == 2 else "macro"),
            "matthews_correlation": matthews_corrcoef(truth, guess),
        },
        rel=1e-12,
    )


def test_a_class_that_nobody_predicts_counts_and_one_that_does_not_occur_does_not():
    truth, guess = [0, 0, 2, 4], [0, 0, 0, 4]
    found = evaluate.load(str(METRICS / "classification.py")).compute(predictions=guess, references=truth)
    assert found["f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))


def test_constant_predictions_have_no_correlation():
    found = evaluate.load(str(METRICS / "classification.py")).compute(predictions=[1, 1, 1], references=[0, 1, 0])
    assert found["matthews_correlation"] == 0
    found = evaluate.load(str(METRICS / "regression.py")).compute(predictions=[1.0, 1.0], references=[0.5, 2.0])
    assert (found["pearson"], found["spearman"]) == (0, 0)


def test_regression_equals_scipy(rng):
    truth = rng.integers(0, 10, 100) / 2
    guess = truth + rng.normal(size=100)
    guess[:10] = guess[0]
    found = evaluate.load(str(METRICS / "regression.py")).compute(predictions=guess, references=truth)
    assert found["mse"] == pytest.approx(np.mean((truth - guess) ** 2))
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)
