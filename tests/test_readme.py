"""The README says what the code says: the table is the code's, and every test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import TrainingArguments

from hf_ssam import SSAMTrainingArguments
from hf_ssam.cli.pages import table
from hf_ssam.trainer.step_log import FIELDS, PREFIX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_method_table_is_the_codes():
    assert f"<!-- methods: begin -->\n{table()}\n<!-- methods: end -->" in README


def test_every_test_that_the_matrix_names_exists():
    names = set(re.findall(r"def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))
    named = re.findall(r"`(test_\w+)(…?)`", README)
    assert len(named) > 20
    for name, cut in named:
        assert name in names or (cut and any(n.startswith(name) for n in names)), name
    for path in re.findall(r"\btest_\w+\.py", README):
        assert list((ROOT / "tests").rglob(path)), path


def test_every_argument_of_ours_is_described():
    ours = SSAMTrainingArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    for name in ours:
        assert f"`{name}`" in README, name


def test_every_log_key_is_described():
    for name in FIELDS:
        assert f"`{PREFIX}{name}`" in README, name


def test_every_configuration_and_script_that_is_named_exists():
    for path in re.findall(r"\b(?:configs|examples)/[\w/]+\.(?:yaml|py|md|png)", README):
        assert (ROOT / path).is_file(), path
