"""Engines and methods can be copied and pickled, and go on as they would have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf_ssam import METHODS, TwoPass
from tests.engine.test_two_pass import regression, sgd_with_engine
from tests.support.cases import ONE_PASS_CASES, Case, assert_identical, each_case, weights

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@each_case
@pytest.mark.parametrize("how", COPIES)
def test_a_copied_engine_goes_on_bit_for_bit(case: Case, how):
    goes_on(case, how)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", ONE_PASS_CASES, ids=lambda c: c.id)
def test_a_copied_engine_of_a_one_pass_method_goes_on_bit_for_bit(case: Case, how):
    goes_on(case, how)


def goes_on(case: Case, how: str) -> None:
    model, batches = regression()
    engine = TwoPass(model, case.method, case.rho, **case.options)
    sgd_with_engine(model, engine, batches[:3], lr=0.1)
    other, copied = COPIES[how]((model, engine))
    sgd_with_engine(model, engine, batches[3:6], lr=0.1)
    untouched = weights(other)
    assert not torch.equal(untouched["0.weight"], model[0].weight)
    sgd_with_engine(other, copied, batches[3:6], lr=0.1)
    assert_identical(weights(model), weights(other))
    for slot, v in engine.state_dict()["memory"].items():
        assert_identical(v, copied.state_dict()["memory"][slot])


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_copied_method_is_the_method(name, how):
    method = METHODS[name]
    copied = COPIES[how](method)
    assert (copied.name, copied.options, copied.rho, copied.paper) == (
        method.name, method.options, method.rho, method.paper
    )  # fmt: skip
    assert type(copied.build()) is type(method.build())
