"""Two ranks that split the layers of a model between them and hold one batch, under the Trainer."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launching import Runs
from tests.distributed.scenarios import ran, without
from tests.distributed.tensor_worker import CASES, llama
from tests.support.cases import assert_close, assert_identical, lm_data

pytestmark = pytest.mark.distributed


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_one_process(tensor: Runs, case, optim):
    """Laws 4 and 5, with unequal padding and accumulation; Adam magnifies the rounding of tiny gradients."""
    expected = ran(case, llama(), lm_data(60), per_device_train_batch_size=12, max_steps=8, base_optim=optim)
    first, second = tensor[f"equal/{case.id}/{optim}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], 1e-5 if optim == "sgd" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ssam", "sam"])
def test_a_radius_of_nothing_is_the_stock_trainer(tensor: Runs, method):
    """Law 1: rho 0 in one pass, and rho 1e-30 in two."""
    for rank in tensor["law1"]:
        ours, stock = rank[method], rank["stock"]
        assert_identical(ours["weights"], stock["weights"])
        assert torch.equal(ours["rng"], stock["rng"])
        assert [without(e, "total_flos") for e in ours["log"]] == [without(e, "total_flos") for e in stock["log"]]
