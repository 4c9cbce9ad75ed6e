"""README and the page of arguments say what the code says: methods, arguments, log keys, files."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import TrainingArguments

from hf_ssam import SSAMTrainingArguments
from hf_ssam.cli.pages import table
from hf_ssam.trainer.step_log import FIELDS, PREFIX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARGUMENTS = (ROOT / "examples" / "guides" / "arguments.md").read_text()


def test_the_method_table_is_the_codes():
    assert f"<!-- methods: begin -->\n{table()}\n<!-- methods: end -->" in README


def test_every_argument_of_ours_is_described():
    ours = SSAMTrainingArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    for name in ours:
        assert f"`{name}`" in ARGUMENTS, name


def test_every_log_key_is_described():
    for name in FIELDS:
        assert f"`{PREFIX}{name}`" in ARGUMENTS, name


def test_every_configuration_and_script_that_is_named_exists():
    for path in re.findall(r"\b(?:configs|examples)/[\w/]+\.(?:yaml|py|md|png)", README):
        assert (ROOT / path).is_file(), path
