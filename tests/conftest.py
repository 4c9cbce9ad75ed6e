"""Which tests `make test` leaves to `make test-all`, which worker runs what, and where runs write."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.garbage import pass_over_what_is_there, passing_over_imports

if TYPE_CHECKING:  # with `-n` this file is loaded before the workers start, which then load torch
    from tests.support.cases import Case

PAIRED = {
    "test_ddp.py",
    "test_fsdp2.py",
    "test_methods.py",
    "test_sharded_state.py",
    "test_lora.py",
    "test_tensor_parallel.py",
}
"""Files of `tests/distributed` whose scenarios are run by two processes that start once."""

FEW = ("ssam", "friendly_sam", "looksam")
"""A method without a state, one with a state, and one with a period."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what `few_methods` and `quick` leave out."""
    for item in items:
        few, quick = item.get_closest_marker("few_methods"), item.get_closest_marker("quick")
        left_out = few is not None and not is_main(item.callspec.params["case"], (*FEW, *few.args))
        if left_out or (quick is not None and not fits(item, quick.args)):
            item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        refuse_patterns_that_fit_nothing(items)


def fits(item: pytest.Item, patterns: tuple[str, ...]) -> bool:
    """Whether the id of the test's parameters, what stands in brackets, is one of `patterns`."""
    return any(fnmatchcase(item.callspec.id, pattern) for pattern in patterns)


def refuse_patterns_that_fit_nothing(items: list[pytest.Item]) -> None:
    """Raise where `quick` names what is not there (any more): `make test` would go without it and not say so."""
    named: dict[tuple[str, str], bool] = {}
    for item in items:
        for pattern in getattr(item.get_closest_marker("quick"), "args", ()):
            key = (item.nodeid.split("[")[0], pattern)
            named[key] = named.get(key, False) or fits(item, (pattern,))
    if unfit := [f"{test}: quick({pattern!r}) fits no id" for (test, pattern), fit in named.items() if not fit]:
        raise pytest.UsageError("\n".join(unfit))


def pytest_collection_finish() -> None:
    """Searches for garbage pass over what the imports made."""
    pass_over_what_is_there()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool, bool]:
    """Also over what a test imports."""
    with passing_over_imports():
        return (yield)


class FilesAndPairs(LoadFileScheduling):
    """A file is run by one worker of pytest-xdist, and so are all files that ask the same two processes.

    Otherwise each worker would start two processes of its own. (`--dist loadgroup`, which is meant for this, has no
    effect with pytest 9.2 and pytest-xdist 3.8.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        in_pairs = file.startswith("tests/distributed/") and Path(file).name in PAIRED
        return "two processes" if in_pairs else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """How tests are handed to the workers."""
    return FilesAndPairs(config, log)


def is_main(case: Case, methods: tuple[str, ...]) -> bool:
    """Whether `case` is the first one of any of `methods`."""
    from tests.support.cases import MAIN_CASES

    return case.method in methods and case in MAIN_CASES


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs write where pytest cleans up, and so do the processes that a test starts."""
    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("temporary"))
    patch.setenv("TMPDIR", folder)
    patch.setattr(tempfile, "tempdir", folder)
    yield
    patch.undo()
