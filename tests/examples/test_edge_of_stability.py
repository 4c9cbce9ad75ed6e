"""The script that holds the top eigenvalue against its predicted edge, cut short."""

from __future__ import annotations

import pytest

import edge_of_stability
from support.cli import UsageError


@pytest.mark.slow
def test_a_short_run_and_its_table_again(tmp_path, capsys):
    flags = ["--etas", "0.4", "--rhos", "0.05", "--time", "4", "--checks", "5", "--digits", "20"]
    runs = edge_of_stability.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert [(r.method, r.rho) for r in runs] == [("gd", 0.0), ("usam", 0.2), ("sam", 0.05), ("ssam", 0.05)]
    assert all(r.steps == [0, 2, 4, 6, 8, 10] for r in runs)
    gd, usam, sam, ssam = runs
    assert len({r.eigenvalues[0] for r in runs}) == 1
    assert gd.edges == pytest.approx([2 / 0.4] * 6)
    assert all(e < 2 / 0.4 for r in (usam, sam, ssam) for e in r.edges)
    for r in runs:
        assert r.losses[-1] < r.losses[0]
    capsys.readouterr()
    again = ["--drawn_from", str(tmp_path / "run" / "runs.json"), "--output_dir", str(tmp_path / "again")]
    assert edge_of_stability.main(again) == runs
    assert capsys.readouterr().out == (tmp_path / "run" / "table.md").read_text()
    assert (tmp_path / "again" / "edge_of_stability.png").stat().st_size > 10_000


def test_the_plateau_is_the_median_of_the_last_measurements():
    run = edge_of_stability.Run("gd", 0.4, 0.0, eigenvalues=[1, 2, 3, 4, 5, 6, 5.5, 4.5, 5.2, 5.4], edges=[5.0] * 10)
    assert run.reached
    assert run.deviation == pytest.approx(5.3 / 5 - 1)
    assert not edge_of_stability.Run("gd", 0.4, 0.0, eigenvalues=[4.7], edges=[5.0]).reached


@pytest.mark.parametrize("flags", [["--rhos", "-1"], ["--etas", "0"]])
def test_what_no_run_can_be_made_with(flags, tmp_path):
    with pytest.raises(UsageError, match="cannot be run: (rho|lr): "):
        edge_of_stability.main([*flags, "--output_dir", str(tmp_path)])
