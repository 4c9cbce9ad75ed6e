"""The table of mutations keeps up with the code: every text stands where it says, and so does every test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]


def names_in(file: Path) -> set[str]:
    """`test_…`, `Test…` and `Test…::test_…` of a test file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}::{inner.name}" for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.why}")
def test_an_entry_names_one_place_and_tests_that_exist(mutation: Mutation):
    source = (ROOT / "hf_ssam" / mutation.file).read_text()
    assert source.count(mutation.old) == 1, "change the entry with the code"
    ast.parse(source.replace(mutation.old, mutation.new))
    assert mutation.equivalent or mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("[")[0].partition("::")
        assert not name or name in names_in(ROOT / file)
        assert (ROOT / file).is_file()


def test_entries_differ():
    changes = [(m.file, m.old, m.new) for m in MUTATIONS]
    assert len(set(changes)) == len(changes) and all(old != new for _, old, new in changes)
