"""What a person sees of a run, and that all of it is kept."""

from __future__ import annotations

import ast
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_ssam import SSAMTrainer
from hf_ssam.trainer import console
from hf_ssam.trainer.console import Console, Printer, show_less, shown
from tests.support.cases import Case, arguments, bert, case_arguments, text_data, trained

ENTRY = {
    "loss": 0.5,
    "grad_norm": 1.0,
    "epoch": 1.0,
    "ssam/loss": 0.50001,
    "ssam/ascent_loss": 0.6,
    "ssam/grad_norm": 2.0,
    "ssam/scale": 0.9,
    "ssam/passes": 2.0,
    "ssam/skipped_steps": 0,
}


def ours(entry):
    return {name.removeprefix("ssam/") for name in entry if name.startswith("ssam/")}


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", {"ascent_loss", "grad_norm", "scale", "passes", "skipped_steps"}),
        ("main", {"ascent_loss", "grad_norm", "scale"}),
        ("none", set()),
    ],
)
def test_entry_is_shown_as_asked_and_the_trainers_own_numbers_always(which, expected):
    assert ours(shown(ENTRY, which)) == expected
    assert {"loss", "grad_norm", "epoch"} <= shown(ENTRY, which).keys()


def test_entry_shows_what_happened_and_no_factor_of_one():
    assert ours(shown({**ENTRY, "ssam/scale": 1.0, "ssam/skipped_steps": 2}, "main")) == {
        "ascent_loss",
        "grad_norm",
        "skipped_steps",
    }
    assert "ssam/loss" in shown({**ENTRY, "ssam/loss": 0.7}, "all")


@pytest.mark.parametrize(("which", "seen"), [("main", 3), ("none", 0), ("all", 10)])
def test_console_shows_less_than_the_state_keeps(capsys, which, seen):
    trainer = trained(bert(), arguments(base_optim="sgd", log_ssam=which), text_data())
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert len(printed) == 4 and all(abs(len(ours(entry)) - seen) <= 1 for entry in printed)
    assert all(len(ours(entry)) == 12 for entry in trainer.state.log_history if "loss" in entry)


def test_bar_shows_less_too(capsys):
    trained(bert(), arguments(base_optim="sgd", disable_tqdm=False), text_data())
    lines = [line for line in capsys.readouterr().out.splitlines() if "ssam/ascent_loss" in line]
    assert len(lines) == 4 and not any("perturbation_norm" in line for line in lines)


def test_callbacks_of_others_stay():
    class Mine(PrinterCallback):
        pass

    callbacks: list[TrainerCallback] = [Mine(), ProgressCallback(), PrinterCallback(), TrainerCallback()]
    kept = list(callbacks)
    show_less(callbacks)
    assert [type(c) for c in callbacks] == [Mine, Console, Printer, TrainerCallback]
    assert callbacks[0] is kept[0] and callbacks[3] is kept[3]
    trainer = SSAMTrainer(bert(), arguments(), train_dataset=text_data())
    trainer.remove_callback(PrinterCallback)
    assert not any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)


def test_notebook_has_a_column_for_each_main_number(monkeypatch):
    display = ModuleType("IPython.display")
    display.HTML, display.display = str, lambda *a, **k: SimpleNamespace(update=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    monkeypatch.setattr(console, "is_in_notebook", lambda: True)
    from transformers.utils.notebook import NotebookProgressCallback

    callbacks = [NotebookProgressCallback()]
    show_less(callbacks)
    args = SimpleNamespace(eval_strategy="no", log_ssam="main")
    callbacks[0].on_train_begin(args, SimpleNamespace(max_steps=2), None)
    for step in (1, 2):
        callbacks[0].on_log(args, SimpleNamespace(global_step=step), None, logs={**ENTRY, "loss": step / 2})
    head, *rows = callbacks[0].training_tracker.inner_table
    assert head == ["Step", "Training Loss", "Ascent Loss", "‖g‖", "γ"]
    assert rows == [[1, 0.5, 0.6, 2.0, 0.9], [2, 1.0, 0.6, 2.0, 0.9]]
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")


OPENINGS = [
    (Case("ssam"), {}, "ssam over sgd, rho 0.1: 10 steps = 20 passes over a batch, 2 times the plain optimizer's"),
    (Case("looksam", {"k": 4}), {}, "10 steps = 13 passes"),
    (Case("sam"), {"ascent_start": 0.8}, "10 steps = 12 passes over a batch, 1.2 times"),
    (Case("sam"), {"ascent_interval": 3, "rho_scheduler_type": "linear"}, "rho 0.1 (linear): 10 steps = 14 passes"),
    (Case("sam", rho=0.0), {}, "rho 0: 10 steps = 10 passes over a batch, 1 times"),
    (Case("momentum_sam"), {}, "10 steps = 10 passes"),
    (Case("esam"), {}, "10 steps = at most 20 passes"),
    (Case("adasam"), {}, "adasam over its own optimizer, rho 0.1: 10 steps = 20 passes"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "given", "expected"), OPENINGS)
def test_opening_says_method_base_rho_steps_and_the_passes_that_the_run_then_takes(capsys, case, given, expected):
    trainer = trained(bert(), case_arguments(case, max_steps=10, **given), text_data())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{case.method} over "))
    assert expected in line
    if "at most" not in line:
        assert trainer.state.log_history[-1]["ssam/total_passes"] == int(line.split(" steps = ")[1].split()[0])


def test_opening_is_not_said_by_a_stock_optimizer_nor_under_none(capsys):
    trained(bert(), arguments(optim="sgd"), text_data())
    trained(bert(), arguments(log_ssam="none"), text_data())
    assert " over " not in capsys.readouterr().out
