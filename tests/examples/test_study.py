"""The runner of the studies: what it runs in which order, what it does not run again, and what it tunes on."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType

import pandas as pd
import pytest
import yaml

import run_study
from support import results_page
from support.cli import UsageError
from support.study import RowFile, read_plan, run_all
from support.study_tables import Column, compared, with_interval

PLAN = {
    "title": "A test",
    "study": "a_fake_study",
    "baseline": "plain",
    "settings": {"lr": 0.1, "part": "report"},
    "arms": {"plain": {}, "sam": {"optim": "sam"}, "late": {"optim": "sam", "start": 0.8, "tuned_as": "sam"}},
    "tuning": {
        "settings": {"part": "tuning", "seed": 100},
        "score": "held_out",
        "grids": {"plain": {"lr": [0.1, 0.2]}, "sam": {"rho": [0.1, 0.5, 1.0]}},
    },
    "blocks": [
        {"noise": [0.4], "seeds": [1, 2], "arms": ["plain", "sam"]},
        {"noise": [0.0, 0.2], "seeds": [1], "arms": ["late"]},
    ],
    "fast": {"settings": {"lr": 0.3}, "blocks": [{"noise": [0.4], "seeds": [1]}]},
}


@pytest.fixture
def study(tmp_path):
    """The plan, its rows and a measure that trains nothing: the best of a grid is lr 0.2, and rho 0.5."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    seen = []

    def measure(settings):
        seen.append(settings)
        return {"held_out": settings["lr"] - abs(settings.get("rho", 0) - 0.5), "score": settings["seed"] / 10}

    return read_plan(path), RowFile(tmp_path / "rows.csv"), measure, seen


def test_runs_come_in_the_order_of_the_blocks_with_their_tuning_before_them(study):
    plan, rows, measure, seen = study
    run_all(plan, rows, measure)
    first, second = seen[:5], seen[5:9]
    assert [(s["part"], s["seed"], s["lr"], s.get("rho")) for s in first] == [
        ("tuning", 100, 0.1, None), ("tuning", 100, 0.2, None),
        ("tuning", 100, 0.1, 0.1), ("tuning", 100, 0.1, 0.5), ("tuning", 100, 0.1, 1.0),
    ]  # fmt: skip
    assert [(s["arm"], s["seed"], s["lr"], s.get("rho")) for s in second] == [
        ("plain", 1, 0.2, None), ("sam", 1, 0.1, 0.5), ("plain", 2, 0.2, None), ("sam", 2, 0.1, 0.5),
    ]  # fmt: skip
    assert [(s["arm"], s["noise"], s["rho"], s["start"]) for s in seen[9:]] == [
        ("late", 0.0, 0.5, 0.8),
        ("late", 0.2, 0.5, 0.8),
    ]


def test_a_study_that_was_killed_goes_on_and_repeats_nothing(study):
    plan, rows, measure, seen = study

    def dies(settings):
        if len(seen) == 7:
            raise KeyboardInterrupt
        return measure(settings)

    with pytest.raises(KeyboardInterrupt):
        run_all(plan, rows, dies)
    assert len(rows.read()) == 7
    run_all(plan, rows, measure, max_runs=1)
    assert len(rows.read()) == 8
    run_all(plan, rows, measure)
    assert len(seen) == len(rows.read()) == len({json.dumps(s, sort_keys=True) for s in seen}) == 11
    run_all(plan, rows, measure)
    assert len(seen) == 11


def test_a_run_that_fails_is_said_and_the_others_go_on(study, capsys):
    plan, rows, measure, seen = study

    def fails_at_sam(settings):
        if settings["arm"] == "sam" and settings["part"] == "report":
            raise ValueError("no such method")
        return measure(settings)

    run_all(plan, rows, fails_at_sam)
    assert [row.arm for row in rows.read().itertuples() if row.phase == "report"] == ["plain", "plain", "late", "late"]
    assert "report sam, seed 1 failed and is left out: ValueError: no such method" in capsys.readouterr().out
    run_all(plan, rows, measure)
    assert len(seen) == len(rows.read()) == 11


def test_a_report_has_the_plans_runs_alone_with_their_settings_as_columns(study):
    plan, rows, measure, _ = study
    run_all(plan, rows, measure)
    reported = plan.reported(rows.read())
    assert list(reported["arm"]) == ["plain", "sam", "plain", "sam", "late", "late"]
    assert list(reported["noise"]) == [0.4] * 4 + [0.0, 0.2]
    assert set(reported["part"]) == {"report"} and "-dirty" not in plan.title
    assert reported["machine"].notna().all() and reported["commit"].notna().all()


def test_the_short_form_changes_settings_and_blocks(study):
    plan = study[0].shortened()
    assert plan.settings["lr"] == 0.3
    assert [c.arm for c in plan.report_cells(plan.blocks[0], lambda arm: {})] == ["plain", "sam", "late"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"baseline": "none"}, "names the arm 'none', which is none of plain, sam, late"),
        ({"blocks": [{"seeds": [1], "arms": ["x"]}]}, "names the arm 'x'"),
        ({"seed": 1}, "may set .* and nothing else"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path, changed, says):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changed}, sort_keys=False))
    with pytest.raises(UsageError, match=says):
        read_plan(path)


def test_the_command_runs_and_shows(tmp_path, monkeypatch, capsys):
    module = ModuleType("studies.a_fake_study")
    module.measure = lambda settings: {"held_out": 0.0, "score": 0.5}
    module.tables = lambda rows, plan: f"{len(rows)} rows, rates {sorted(set(rows['lr']))}"
    module.figures = lambda rows, plan, folder: (folder / "drawn.png").touch()
    monkeypatch.setitem(sys.modules, "studies.a_fake_study", module)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    with pytest.raises(UsageError, match="has no runs of .*: run it first"):
        run_study.main(["show", str(path), "--output_dir", str(tmp_path / "out")])
    text = run_study.main(["run", str(path), "--fast", "--output_dir", str(tmp_path / "out")])
    assert text == "3 rows, rates [0.1, 0.3]" and "A test" in capsys.readouterr().out
    assert (tmp_path / "out" / "drawn.png").is_file() and (tmp_path / "out" / "tables.md").read_text() == text
    assert run_study.main(["show", str(path), "--fast", "--output_dir", str(tmp_path / "out")]) == text


def test_the_table_has_means_intervals_and_paired_tests():
    scores = {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.7, 0.9]}
    rows = pd.DataFrame([{"arm": a, "seed": i, "s": x, "c": 1.0} for a in scores for i, x in enumerate(scores[a])])
    rows.loc[rows["arm"] == "b", "c"] = math.nan
    lines = compared(rows, "a", "s", (Column("cost", "c", ".1f"),)).splitlines()
    assert lines[0] == "|  | n | s ± 95 % | minus a | p | cost |"
    assert lines[2] == "| a | 3 | 0.600 ± 0.248 |  |  | 1.0 |"  # t(0.975; 2) = 4.3027, over √3, × 0.1
    assert lines[3] == "| b | 3 | 0.733 ± 0.379 | +0.133 | 0.057 | – |"  # t = 4: p = 0.0572
    assert len({line.count("|") for line in lines}) == 1
    assert with_interval(math.nan, math.nan, ".3f") == "not finite: diverged"
    assert with_interval(0.5, math.inf, ".3f") == "0.500"


def test_a_page_takes_the_tables_between_its_marks():
    page = "a\n<!-- rows of x -->\nold\n<!-- end -->\nb\n<!-- rows of y -->\nstays\n<!-- end -->\n"
    said = results_page.filled(page, {"x": "new"})
    assert said == "a\n<!-- rows of x -->\n\nnew\n\n<!-- end -->\nb\n<!-- rows of y -->\nstays\n<!-- end -->\n"
    assert results_page.filled(said, {"x": "new"}) == said


@pytest.mark.parametrize("name", results_page.committed())
def test_the_guide_shows_what_the_rows_beside_it_say(name):
    page = results_page.PAGE.read_text()
    assert f"<!-- rows of {name} -->" in page
    assert results_page.filled(page, {name: results_page.table(name)}) == page
