"""The methods on LoRA, and noise, in two processes: the same bits on both, and those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.adapters_worker import LORA_CASES, NOISE, lora, model_of
from tests.distributed.launching import Runs
from tests.distributed.scenarios import ran
from tests.support.cases import Case, assert_close, assert_identical, bert, lm_data, text_data
from tests.trainer.test_resume import assert_same, flat

pytestmark = pytest.mark.distributed
each = pytest.mark.parametrize("case", (*LORA_CASES, NOISE), ids=lambda c: c.method)
each_lora = pytest.mark.parametrize("case", LORA_CASES, ids=lambda c: c.method)


@pytest.mark.quick("bi_lora", "flat_lora")
@each
def test_ranks_hold_the_same_bits_and_those_of_one_process_to_rounding(adapters: Runs, case: Case):
    """Laws 4 and 5: noise, choice and second adapter come from the step and from reduced gradients."""
    given = {"per_device_train_batch_size": 12, "max_steps": 6, "base_optim": "adamw_torch"}
    alone = ran(case, model_of(case), lm_data(60), **given)
    first, second = adapters[f"averaged/{case.method}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], alone["weights"], 1e-7)
    plain = ran(Case(case.method, case.options, 0.0), model_of(case), lm_data(60), **given)
    gap = max((plain["weights"][n] - t).abs().max() for n, t in alone["weights"].items())
    assert gap > 1e-5, "the method must matter"


@pytest.mark.quick("bi_lora")
@each
def test_resume_is_bit_for_bit(adapters: Runs, case: Case):
    for rank in adapters[f"resume/{case.method}"]:
        whole, halves = rank["whole"], rank["halves"]
        assert_identical(whole["weights"], halves["weights"])
        assert_same(flat(whole["optimizer"], "optimizer"), flat(halves["optimizer"], "optimizer"))
        assert torch.equal(whole["rng"], halves["rng"])


@pytest.mark.quick("bi_lora", "flat_lora")
@each_lora
def test_adapters_on_a_sharded_base_equal_one_process(adapters: Runs, case: Case):
    if case.method == "flat_lora":
        for said in adapters["sharded/flat_lora"]:
            assert "is sharded or offloaded and method `flat_lora` needs its whole weight on each rank" in said
        return
    expected = ran(case, lora(bert(0.0)), text_data(), per_device_train_batch_size=16, max_steps=6)
    first, second = adapters[f"sharded/{case.method}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"])
