"""Methods that look at single samples, ten steps long, against their slow float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_ssam import TwoPass
from tests.engine.test_selection import Classifier, backward_of
from tests.support.reference import flat
from tests.support.reference_samples import REFERENCES, Problem

STEPS, BATCH, SAMPLES, RHO, LR = 10, 8, 20, 0.1, 0.3


def visits() -> list[tuple[torch.Tensor, tuple]]:
    """Ten batches of eight out of twenty samples, each sample seen several times."""
    torch.manual_seed(1)
    x, y = torch.randn(SAMPLES, 4).double(), torch.randint(0, 3, (SAMPLES,))
    chosen = [torch.randperm(SAMPLES)[:BATCH] for _ in range(STEPS)]
    return [(ids, (x[ids], y[ids])) for ids in chosen]


def by_engine(method: str, every: int, options: dict, restarts: bool = False) -> tuple[torch.Tensor, list]:
    model, reports, given = Classifier(), [], {"dataset_size": SAMPLES, "total_steps": STEPS, **options}
    engine = TwoPass(model, method, RHO, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step, (ids, batch) in enumerate(visits()):
        if restarts and step == STEPS // 2:
            state, engine = engine.state_dict(), TwoPass(model, method, RHO, **given)
            engine.load_state_dict(state)
        engine.rho = RHO if step % every == 0 else 0.0
        reports.append(engine.step(backward_of(model, batch), samples=ids))
        optimizer.step()
        optimizer.zero_grad()
    return flat(model.parameters()), reports


def by_reference(method: str, every: int, options: dict) -> torch.Tensor:
    model, state = Classifier(), {}
    w = flat(model.parameters())
    for step, (ids, (x, y)) in enumerate(visits()):

        def losses_of(x=x, y=y):
            return nn.functional.cross_entropy(model(x, y)["logits"], y, reduction="none")

        problem = Problem(model, losses_of, ids, progress=step / STEPS)
        d = REFERENCES[method](problem, w, state, RHO, **options) if step % every == 0 else problem.gradient(w)
        w = w - LR * d
    return w


CELLS = [
    ("esam", {"beta": 0.6, "gamma": 0.5}),
    ("esam", {"beta": 1.0, "gamma": 0.3}),
    ("esam", {"beta": 0.4, "gamma": 1.0, "seed": 3}),
    ("ausam", {"alpha": 0.5}),
    ("ausam", {"alpha": 0.3, "s_min": 0.05, "s_max": 0.8, "seed": 2}),
    ("sparse_sam", {"num_samples": 5, "update_freq": 3}),
    ("sparse_sam", {"sparsity": 0.8, "update_freq": 1}),
    ("sparse_sam", {"structure": "tensor", "sparsity": 0.6, "update_freq": 4}),
    ("sparse_sam", {"structure": "2:4", "update_freq": 2}),
    ("sparse_sam", {"structure": "1:4", "num_samples": 3}),
    ("sparse_sam", {"mask": "dynamic", "update_freq": 2}),
    ("sparse_sam", {"mask": "dynamic", "update_freq": 1, "sparsity": 0.3, "drop_rate": 0.9, "seed": 5}),
]


@pytest.mark.parametrize("every", [1, 2], ids=["each", "every-second"])
@pytest.mark.parametrize(("method", "options"), CELLS, ids=lambda v: str(v).replace(" ", ""))
def test_a_trajectory_is_its_slow_references(method, options, every):
    found, reports = by_engine(method, every, options)
    torch.testing.assert_close(found, by_reference(method, every, options), rtol=1e-10, atol=1e-12)
    assert not any(r.skipped for r in reports)


@pytest.mark.parametrize(("method", "options"), CELLS, ids=lambda v: str(v).replace(" ", ""))
def test_the_references_differ_from_sam(method, options):
    """Otherwise the test above could not fail for what is particular to the method."""
    sam = by_engine("sam", 1, {})[0]
    assert (by_reference(method, 1, options) - sam).abs().max() > 1e-3


@pytest.mark.parametrize("every", [1, 2], ids=["each", "every-second"])
@pytest.mark.parametrize(("method", "options"), CELLS, ids=lambda v: str(v).replace(" ", ""))
def test_a_restart_in_the_middle_changes_no_bit(method, options, every):
    """Law 8: scores, masks and both counters, with masks refreshed after the restart."""
    assert torch.equal(by_engine(method, every, options, restarts=True)[0], by_engine(method, every, options)[0])
