"""The cost of a step: the table has a row for each method, and counts passes as their formulas say."""

from __future__ import annotations

import pytest

import benchmark_step
from tests.support.cases import bert


def test_the_table_counts_passes_and_compares_with_the_plain_step(tmp_path, capsys):
    bert(labels=6).save_pretrained(tmp_path)
    flags = ["--rounds", "2", "--batch_size", "8", "--length", "12", "--device", "cpu", "--model", str(tmp_path)]
    costs = benchmark_step.main([*flags, "--methods", "ssam", "looksam", "momentum_sam", "esam", "ausam"])
    expected = {"plain": 1.0, "ssam": 2.0, "looksam": 1.2, "momentum_sam": 1.0, "esam": 1.5, "ausam": 1.0}
    assert {m: sum(c.passes) / len(c.passes) for m, c in costs.items()} == pytest.approx(expected)
    assert all(len(c.seconds) == 2 and min(c.seconds) > 0 for c in costs.values())
    printed = capsys.readouterr().out
    assert "| plain | 1.00 | 1.00 (1.00-1.00) | – |" in printed and "| ssam | 2.00 |" in printed
