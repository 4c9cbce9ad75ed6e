"""Fixtures that every test module may use, and which tests `make test` leaves to `make test-all`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tests.support.cases import CASES, MAIN_CASES, Case

FEW = ("ssam", "friendly_sam", "looksam")
"""A method without a state, one with a state, and one with a period."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `few_methods` leaves out; give the tests that ask two processes to one worker.

    Otherwise each worker of pytest-xdist would start two processes of its own.
    """
    for item in items:
        few = item.get_closest_marker("few_methods")
        if few is not None and not is_main(item.callspec.params["case"], (*FEW, *few.args)):
            item.add_marker(pytest.mark.slow)
        if "two_processes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("two_processes"))


def is_main(case: Case, methods: tuple[str, ...]) -> bool:
    """Whether `case` is the first one of any of `methods`."""
    return case.method in methods and case in MAIN_CASES


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    """Each row of the case table in turn."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs write where pytest cleans up, and so do the processes that a test starts."""
    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("temporary"))
    patch.setenv("TMPDIR", folder)
    patch.setattr(tempfile, "tempdir", folder)
    yield
    patch.undo()
