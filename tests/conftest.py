"""Fixtures that every test module may use."""

from __future__ import annotations

import pytest

from tests.support.cases import CASES, Case


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    """Each row of the case table in turn."""
    return request.param
