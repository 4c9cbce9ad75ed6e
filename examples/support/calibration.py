"""How well stated probabilities fit what happens, before and after temperature scaling."""

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

BINS = 15


def calibration(logits: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """ECE, NLL and Brier score of `logits` (n, classes), and the same after scaling; `held_out` chooses T."""
    scale = temperature(*held_out)
    plain, scaled = _scores(logits, labels), _scores(logits / scale, labels)
    return {**plain, **{f"{name}_scaled": value for name, value in scaled.items()}, "temperature": scale}


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the NLL of `logits / T` (Guo et al. 2017), within 0.05 … 20."""

    def nll(log_t: float) -> float:
        return cross_entropy(logits / torch.tensor(log_t).exp(), labels).item()

    return float(torch.tensor(minimize_scalar(nll, bounds=(-3.0, 3.0), method="bounded").x).exp())


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Σ over `bins` equal intervals of the highest probability: share of rows × |accuracy − mean probability|."""
    confidence, said = probabilities.max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (said == labels).double() - confidence.double()
    return float(torch.zeros(bins, dtype=torch.double).index_add_(0, place, gap).abs().sum() / len(labels))


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = logits.softmax(1)
    brier = (probabilities - one_hot(labels, logits.shape[1])).square().sum(1).mean()
    ece = expected_calibration_error(probabilities, labels)
    return {"ece": ece, "nll": cross_entropy(logits, labels).item(), "brier": brier.item()}
