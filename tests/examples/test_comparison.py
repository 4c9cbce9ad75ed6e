"""The comparison of methods: its statistics against closed forms, and a sweep that is killed and goes on."""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import evaluate
import pytest
import yaml
from scipy import stats

import compare_methods
from support import comparison, comparison_plan, comparison_plots, comparison_runs
from support.cli import UsageError
from support.comparison import Outcome, Run, against, interval, outcome
from support.metrics import METRICS

PLAN = {
    "title": "A test",
    "script": "a_fake_script",
    "config": "task.yaml",
    "flags": {"num_train_epochs": 2},
    "baseline": "plain",
    "methods": {"plain": {"optim": "sgd"}, "ssam": {"optim": "ssam"}, "look": {"optim": "looksam"}},
    "seeds": [1, 2],
    "learning_rates": [0.1, 0.2],
}
PASSES = {"sgd": 1.0, "ssam": 2.0, "looksam": 1.2}


@pytest.fixture
def fake_script(monkeypatch):
    """A script that trains nothing: 12 steps, or as many as it is given, with a score that follows from its flags."""
    script = ModuleType("a_fake_script")
    script.calls = []

    def main(argv):
        flags = dict(zip(argv[1::2], argv[2::2], strict=True))
        script.calls.append((flags, argv[0]))
        if len(script.calls) == script.dies_at:
            raise KeyboardInterrupt
        steps, seed = int(flags.get("--max_steps", 12)), int(flags["--seed"])
        write(Path(flags["--output_dir"]), steps, PASSES[flags["--optim"]], 0.5 + 0.01 * seed)

    script.main, script.dies_at = main, None
    monkeypatch.setitem(sys.modules, "a_fake_script", script)
    return script


def write(folder, steps, price, score):
    folder.mkdir(parents=True)
    counted = {} if price == 1 else {"ssam/total_passes": steps * price}
    log = [
        {"step": steps // 2, "loss": 1.0, **({} if price == 1 else {"ssam/total_passes": steps // 2 * price})},
        {"step": steps // 2, "eval_accuracy": score / 2, "eval_runtime": 3.0},
        {"step": steps, "train_runtime": 23.0, **counted},
        {"step": steps, "eval_accuracy": score, "eval_runtime": 3.0},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": steps}))
    (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": score}))
    (folder / "model.safetensors").touch()


@pytest.fixture
def sweep(tmp_path):
    def run(**changed):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "output_dir": str(tmp_path / "out"), **changed}))
        compare_methods.main(["run", str(tmp_path / "plan.yaml")])
        return tmp_path / "out"

    return run


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_finished_runs_are_not_repeated(sweep, fake_script):
    fake_script.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        sweep()
    fake_script.dies_at = None
    folder = sweep()
    asked = [flags["--output_dir"] for flags, _ in fake_script.calls]
    assert len(asked) - 1 == len(set(asked)) == 6 + 4 + 6  # epochs; gradients but for the plain one; the other rate
    sweep()
    assert len(fake_script.calls) == len(asked)
    assert not list(folder.rglob("*.safetensors"))
    assert {"results.md", "results.csv", "cost.png", "learning_rate.png"} <= {path.name for path in folder.iterdir()}


def test_equal_gradients_are_equal(sweep, fake_script):
    folder = sweep()
    steps = {flags["--output_dir"]: flags.get("--max_steps") for flags, _ in fake_script.calls}
    assert steps[str(folder / "gradients/ssam-lr0.1-seed1")] == "6"
    assert steps[str(folder / "gradients/look-lr0.1-seed1")] == "10"
    assert steps[str(folder / "epochs/ssam-lr0.1-seed1")] is None
    plan = comparison_plan.read_plan(folder / "plan.yaml")
    passes = [o.passes for o in comparison_runs.finished(plan, folder) if o.run.budget == "gradients"]
    assert passes == [12.0] * 6


@pytest.mark.slow
def test_a_comparison_is_not_mixed_with_another(sweep, fake_script):
    sweep()
    with pytest.raises(UsageError, match=r"holds another comparison \(flags, ssam differ\)"):
        sweep(flags={"num_train_epochs": 3}, methods={**PLAN["methods"], "ssam": {"optim": "ssam", "rho": 0.1}})
    sweep(seeds=[1, 2, 3])
    assert {flags["--seed"] for flags, _ in fake_script.calls} == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"baseline": "none"}, "the baseline 'none' is none of the methods"),
        ({"budgets": ["gradients"]}, "budgets are"),
        ({"seed": 1}, "sets 'seed', which is no key of a comparison: did you mean seeds"),
        ({"seeds": 3}, r"seeds is 3, which is no list: write seeds: \["),
        ({"methods": {"plain": "sgd"}}, "methods must hold lines such as `sam:"),
        ({"script": "no_such_script"}, "there is no examples/no_such_script.py"),
    ],
)
def test_a_plan_that_cannot_work(sweep, changed, says):
    with pytest.raises(UsageError, match=says):
        sweep(**changed)


def test_comparison_names_the_keys_that_its_file_lacks(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("script: run_text_classification\nconfig: x.yaml\nbaseline: a\nmethods: {}\nseeds: [1]\n")
    with pytest.raises(UsageError, match="lacks output_dir, learning_rates: examples/README.md"):
        comparison_plan.read_plan(path)


def test_comparison_reads_no_as_a_word_and_hands_lists_on(sweep, fake_script, tmp_path):
    text = yaml.safe_dump({**PLAN, "output_dir": str(tmp_path / "out")})
    text = text.replace("num_train_epochs: 2", "{eval_strategy: no, text_column_names: [a, b]}".strip("{}"), 1)
    (tmp_path / "plan.yaml").write_text(text.replace("eval_strategy: no, text", "eval_strategy: no\n  text"))
    plan = comparison_plan.read_plan(tmp_path / "plan.yaml")
    assert plan.flags == {"eval_strategy": "no", "text_column_names": ["a", "b"]}
    words = comparison_runs._command(next(plan.runs()), plan, tmp_path / "none", None)
    assert words[1:6] == ["--eval_strategy", "no", "--text_column_names", "a", "b"]


def test_comparison_may_change_as_long_as_no_run_is_there(sweep, fake_script):
    fake_script.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        sweep()
    fake_script.dies_at = None
    folder = sweep(flags={"num_train_epochs": 3})
    assert yaml.safe_load((folder / "plan.yaml").read_text())["flags"] == {"num_train_epochs": 3}


@pytest.mark.slow
def test_comparison_says_what_it_compares(sweep, fake_script):
    assert "Compared is `eval_accuracy`" in (sweep() / "results.md").read_text()
    with pytest.raises(UsageError, match="metric: eval_f1 was not measured in .*, which has eval_accuracy: set"):
        outcome(sweep() / "epochs/plain-lr0.1-seed1", Run("plain", 0.1, 1, "epochs"), "eval_f1")


def test_an_outcome_is_read_from_the_run(tmp_path):
    write(tmp_path / "run", steps=10, price=2.0, score=0.8)
    run = Run("ssam", 0.1, 1, "epochs")
    found = outcome(tmp_path / "run", run, "eval_accuracy")
    assert found == Outcome(run, 0.8, 10, 20.0, 20.0, ((10.0, 0.4), (20.0, 0.8)))
    (tmp_path / "run" / "all_results.json").unlink()
    assert outcome(tmp_path / "run", run, "eval_accuracy") is None


def test_intervals_and_paired_differences():
    mean, half = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.302652729911275 * math.sqrt(0.07) / math.sqrt(3))  # t(0.975; 2), variance 0.07
    assert interval([0.5]) == (0.5, math.inf)
    ours, plain = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.1}, {3: 0.55, 2: 0.6, 1: 0.48}
    difference, p = against(ours, plain)
    assert difference == pytest.approx((0.02 + 0.1 + 0.05) / 3)
    assert p == pytest.approx(stats.ttest_rel([0.5, 0.7, 0.6], [0.48, 0.6, 0.55]).pvalue)
    assert math.isnan(against({1: 0.5}, {1: 0.4})[1])


def test_the_table_has_as_many_cells_in_each_row(tmp_path):
    made = [Outcome(Run(m, 0.1, s, "epochs"), 0.5 + 0.1 * s, 4, 4.0, 1.0, ((4.0, 0.5),)) for m in "ab" for s in (1, 2)]
    lines = comparison.write_tables(made, tmp_path, "a", "T", "eval_accuracy").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and {row.count("|") for row in rows} == {9}


def test_the_figure_shows_means_over_seeds_at_their_cost():
    curves = [((10.0, 0.2), (20.0, 0.6)), ((10.0, 0.4), (20.0, 0.8))]
    made = [Outcome(Run("ssam", 0.1, i, "epochs"), c[-1][1], 10, 20.0, 40.0, c) for i, c in enumerate(curves)]
    by_passes, by_time = comparison_plots.plot_cost(made, "T")
    assert by_passes.lines[0].get_xydata().tolist() == [[10.0, pytest.approx(0.3)], [20.0, pytest.approx(0.7)]]
    assert by_time.lines[0].get_xdata().tolist() == [20.0, 40.0]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", {(1, 3, "X")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("I-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("O O", set()),
        ("B-X I-Y I-Y O I-X", {(0, 1, "X"), (1, 3, "Y"), (4, 5, "X")}),
    ],
)
def test_spans(tags, found):
    metric = evaluate.load(str(METRICS / "spans.py"))
    scores = metric.compute(predictions=[tags.split()], references=[tags.split()])
    assert scores["f1"] == (1.0 if found else 0.0) and scores["accuracy"] == 1.0
    assert sys.modules[type(metric).__module__].spans(tags.split()) == found


def test_span_scores_count_whole_spans():
    said, true = [["B-X", "I-X", "O", "B-Y"]], [["B-X", "O", "O", "B-Y"]]
    scores = evaluate.load(str(METRICS / "spans.py")).compute(predictions=said, references=true)
    assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.75}


def test_rouge_on_the_papers_example_and_by_brute_force():
    """Lin 2004, section 3.1: `police killed the gunman` against two sentences with the same words in common."""
    metric = evaluate.load(str(METRICS / "rouge.py"))
    scores = metric.compute(predictions=["police kill the gunman"], references=["police killed the gunman"])
    assert scores == {"rouge1": 0.75, "rougeL": 0.75, "exact": 0.0}
    scores = metric.compute(predictions=["the gunman kill police"], references=["police killed the gunman"])
    assert scores == {"rouge1": 0.75, "rougeL": 0.5, "exact": 0.0}
    longest_common = sys.modules[type(metric).__module__].longest_common
    for a, b in [("abcab", "bacb"), ("aab", "baa"), ("abc", ""), ("cabd", "abdc")]:
        common = [len(x) for n in range(len(a) + 1) for x in combinations(a, n) if x in set(combinations(b, n))]
        assert longest_common(list(a), list(b)) == max(common)
