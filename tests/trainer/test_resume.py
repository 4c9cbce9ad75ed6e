"""A run that stops and goes on is the run that never stopped (law 8); checkpoints hold what they must and no more."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_ssam import SSAMTrainer
from hf_ssam.trainer.checkpoints import (
    STATE_FILE,
    STATE_FOLDER,
    Settings,
    is_whole,
    last_whole_checkpoint,
    load_state,
    save_state,
)
from tests.support import resume_run
from tests.support.cases import (
    MAIN_ONE_PASS_CASES,
    Case,
    MendedTrainer,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    each_case,
    text_data,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*its loss ignores it")
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "base_optim": "adamw_torch"}


def ended(args, checkpoint: Path | str | bool | None = None, cls: type = SSAMTrainer):
    """A trainer of the dropout model, trained to the end."""
    trainer = cls(model=bert(), args=args, train_dataset=text_data())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else checkpoint)
    return trainer


def flat(state, prefix: str = "") -> dict[str, object]:
    """A nested state with one key a leaf."""
    if isinstance(state, dict):
        return {k: v for n, s in state.items() for k, v in flat(s, f"{prefix}/{n}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state}


def everything(trainer, engine: bool = True) -> dict[str, object]:
    """Weights, optimizer, scheduler, the method's vectors (where `engine`), the generators."""
    found = {f"weights/{n}": t for n, t in weights(trainer.model).items()}
    found |= flat(trainer.optimizer.state_dict(), "optimizer") | flat(trainer.lr_scheduler.state_dict(), "scheduler")
    if engine and trainer.two_pass is not None:
        found |= flat(trainer.two_pass.state_dict(), "engine")
    found |= {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": np.random.get_state()[1].tolist(),
        "rng/python": random.getstate(),
    }
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name]
        assert same, f"{name} differs"


def logged(trainer) -> list[dict]:
    """The log entries of the training loss, without the clock."""
    return [{k: v for k, v in e.items() if "runtime" not in k} for e in trainer.state.log_history if "loss" in e]


def assert_resumes(**given) -> None:
    whole = ended(case_arguments(**given, **SAVED))
    expected, entries = everything(whole), logged(whole)
    resumed = ended(case_arguments(**given, **SAVED), Path(whole.args.output_dir, "checkpoint-2"))
    assert_same(everything(resumed), expected)
    assert logged(resumed) == entries


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@each_case
@pytest.mark.few_methods
def test_every_method_resumes_bit_for_bit(case: Case):
    given = SAVED if case.method != "adasam" else {k: v for k, v in SAVED.items() if k != "base_optim"}
    whole = ended(case_arguments(case, **given, **ACCUMULATED))
    expected, entries = everything(whole), logged(whole)
    resumed = ended(case_arguments(case, **given, **ACCUMULATED), Path(whole.args.output_dir, "checkpoint-2"))
    assert_same(everything(resumed), expected)
    assert logged(resumed) == entries


@pytest.mark.parametrize("case", MAIN_ONE_PASS_CASES, ids=lambda c: c.id)
def test_every_one_pass_method_resumes_bit_for_bit(case: Case):
    assert_resumes(case=case, **ACCUMULATED)


@pytest.mark.parametrize("case", MAIN_ONE_PASS_CASES, ids=lambda c: c.id)
def test_every_one_pass_method_is_the_stock_trainer_without_a_radius(case: Case):
    """Law 1, with dropout: weights, optimizer, generators."""
    stock = {k: v for k, v in SAVED.items() if k != "base_optim"}
    theirs = ended(arguments(TrainingArguments, optim="adamw_torch", **stock), cls=MendedTrainer)
    theirs.two_pass = None
    expected = everything(theirs)
    assert_same(everything(ended(case_arguments(Case(case.method, rho=0.0), **SAVED)), engine=False), expected)


@pytest.mark.quick("linear", "lr")
@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "lr", "cosine_up"])
def test_every_schedule_resumes_bit_for_bit(schedule: str):
    assert_resumes(case=Case("ssam", {"normalize": False}), rho_scheduler_type=schedule)


@pytest.mark.parametrize("scope", ["rank", "micro_batch"])
def test_every_scope_resumes_bit_for_bit(scope: str):
    assert_resumes(case=Case("ssam", {"normalize": False}), ascent_scope=scope, **ACCUMULATED)


@pytest.mark.quick("*ascent_interval*", "*perturb*", "*rho_unit*")
@pytest.mark.parametrize(
    "given",
    [
        {"ascent_interval": 3},
        {"ascent_start": 3},
        {"replay_rng": False},
        {"perturb": "norm"},
        {"rho_unit": "relative_loss"},
    ],
    ids=str,
)
def test_every_other_setting_resumes_bit_for_bit(given: dict):
    assert_resumes(case=Case("ssam"), **given)


def test_resume_is_said_before_training_and_in_the_log(capsys):
    whole = ended(arguments(**SAVED))
    assert not any("train_resumed_at" in entry for entry in whole.state.log_history)
    assert "resumed" not in capsys.readouterr().out
    resumed = ended(arguments(**SAVED), Path(whole.args.output_dir, "checkpoint-2"))
    assert resumed.state.log_history[-1]["train_resumed_at"] == 2
    assert "times the plain optimizer's; resumed at step 2\n" in capsys.readouterr().out


def test_a_stock_run_goes_on_with_ssam(caplog):
    """As if its first two steps had been ssam's before `ascent_start`: the same run, to the bit."""
    expected = everything(ended(case_arguments(Case("ssam"), ascent_start=2, **SAVED)))
    stock = {k: v for k, v in SAVED.items() if k != "base_optim"}
    begun = ended(arguments(TrainingArguments, optim="adamw_torch", **stock), cls=Trainer)
    with caplog.at_level(logging.WARNING):
        ours = ended(case_arguments(Case("ssam"), **SAVED), Path(begun.args.output_dir, "checkpoint-2"))
    assert_same(everything(ours), expected)
    assert "was saved without a sharpness-aware method; ssam starts afresh" in caplog.text


def test_a_method_that_changes_over_the_run_counts_the_steps_of_a_stock_optimizer():
    """Else a dynamic mask would decay from the start again: at its first step, half of the run is over."""
    stock = {k: v for k, v in SAVED.items() if k != "base_optim"}
    begun = ended(arguments(TrainingArguments, optim="adamw_torch", **stock), cls=Trainer)
    case = Case("sparse_sam", {"mask": "dynamic"})
    resumed = ended(case_arguments(case, **SAVED), f"{begun.args.output_dir}/checkpoint-2")
    assert (resumed.two_pass.clock.steps, resumed.two_pass.clock.elapsed) == (2, 4)


def test_an_ssam_run_goes_on_with_a_stock_optimizer():
    """Our Trainer with a stock name and the stock Trainer itself go on from our checkpoint as ssam at rho = 0 does."""
    checkpoint = Path(ended(case_arguments(Case("ssam"), **SAVED)).args.output_dir, "checkpoint-2")
    stock = {"optim": "adamw_torch", **{k: v for k, v in SAVED.items() if k != "base_optim"}}
    expected = everything(ended(case_arguments(Case("ssam", rho=0.0), **SAVED), checkpoint), engine=False)
    ours = ended(arguments(**stock), checkpoint)
    assert ours.two_pass is None
    assert_same(everything(ours), expected)
    theirs = MendedTrainer(model=bert(), args=arguments(TrainingArguments, **stock), train_dataset=text_data())
    theirs.train(resume_from_checkpoint=str(checkpoint))
    theirs.two_pass = None
    assert_same(everything(theirs), expected)


def test_other_settings_are_said(caplog):
    begun = ended(case_arguments(Case("ssam"), **SAVED))
    checkpoint = Path(begun.args.output_dir, "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        ended(case_arguments(Case("sam", rho=0.2), ascent_scope="rank", **SAVED), checkpoint)
    for phrase in ("method was ssam, now sam", "rho was 0.1, now 0.2", "ascent_scope was global, now rank"):
        assert phrase in caplog.text


def test_the_same_settings_are_not_said(caplog):
    begun = ended(case_arguments(Case("ssam", {"normalize": False}), **SAVED))
    with caplog.at_level(logging.WARNING):
        ended(case_arguments(Case("ssam", {"normalize": False}), **SAVED), Path(begun.args.output_dir, "checkpoint-2"))
    assert "other settings" not in caplog.text


# ----------------------------------------------------------------------------------------------- what is on the disk


def files(checkpoint: Path) -> dict[str, int]:
    return {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}


def test_a_stateless_method_adds_no_tensor_file_and_leaves_the_others_their_size():
    stock = {k: v for k, v in SAVED.items() if k != "base_optim"}
    plain = ended(arguments(TrainingArguments, optim="adamw_torch", **stock), cls=Trainer)
    ours = ended(case_arguments(Case("ssam"), **SAVED))
    theirs, found = (files(Path(t.args.output_dir, "checkpoint-4")) for t in (plain, ours))
    assert found.keys() - theirs.keys() == {STATE_FILE}
    assert theirs.keys() - found.keys() == set()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert found[name] == theirs[name], name


SETTINGS = Settings("ssam", {"max_scale": float("inf")}, 0.1, "global")


def test_vectors_round_trip(tmp_path: Path):
    model = bert()
    params = dict(model.named_parameters())
    memory = {
        "m": {n: torch.randn_like(p) for n, p in params.items()},
        "v": {"classifier.bias": torch.randn(3).double()},
    }
    save_state(tmp_path, SETTINGS, {"memory": memory, "steps": 7, "elapsed": 9}, True, 11.5)
    state = load_state(tmp_path, params)
    assert (state["steps"], state["elapsed"], state["total_passes"]) == (7, 9, 11.5)
    assert SETTINGS.differences(state) == []
    for slot, vector in memory.items():
        assert_identical(state["memory"][slot], vector)


def test_vectors_of_other_parameters_are_refused(tmp_path: Path):
    model = bert()
    params = dict(model.named_parameters())
    save_state(tmp_path, SETTINGS, {"memory": {"m": dict(params)}, "steps": 1, "elapsed": 1}, True, 2.0)
    del params["classifier.bias"]
    with pytest.raises(ValueError, match="`classifier.bias`, which this model does not train; resume with the model"):
        load_state(tmp_path, params)


def test_vectors_of_another_shape_are_refused(tmp_path: Path):
    params = dict(bert(labels=3).named_parameters())
    save_state(tmp_path, SETTINGS, {"memory": {"m": dict(params)}, "steps": 1, "elapsed": 1}, True, 2.0)
    said = r"of shape \(3,\) for `classifier.bias`, which this model has with shape \(4,\); resume with the model"
    with pytest.raises(ValueError, match=said):
        load_state(tmp_path, {**params, **dict(bert(labels=4).named_parameters())})


# --------------------------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Tensor]:
    return everything(ended(resume_run.run_arguments(str(tmp_path_factory.mktemp("whole")))))


def killed(output_dir: Path, moment: str) -> None:
    process = subprocess.run([sys.executable, resume_run.__file__, output_dir, moment], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.slow
def test_a_process_killed_in_the_second_pass_goes_on(tmp_path: Path, uninterrupted):
    killed(tmp_path, "second_pass")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert_same(everything(ended(resume_run.run_arguments(str(tmp_path)), True)), uninterrupted)


@pytest.mark.slow
def test_a_process_killed_while_saving_goes_on_from_the_last_whole_checkpoint(tmp_path: Path, uninterrupted, caplog):
    killed(tmp_path, "save")
    half = tmp_path / "checkpoint-4"
    assert (half / "optimizer.pt").is_file() and not is_whole(half)
    with pytest.raises(ValueError, match="checkpoint-4 is half-written; the last whole checkpoint is .*checkpoint-2"):
        ended(resume_run.run_arguments(str(tmp_path)), half)
    with caplog.at_level(logging.WARNING):
        resumed = ended(resume_run.run_arguments(str(tmp_path)), True)
    assert f"{half} is half-written and passed over; resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert_same(everything(resumed), uninterrupted)
    assert is_whole(half), "the run wrote it anew"


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "nested"])
def test_half_a_checkpoint_is_told_from_a_whole_one(tmp_path: Path, damage: str):
    whole = Path(ended(case_arguments(Case("ssam"), **SAVED)).args.output_dir)
    state = whole / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    spoiled = {"cut short": text[: len(text) // 2], "empty": "", "nested": "[" * 100_000}
    state.unlink() if damage == "missing" else state.write_text(spoiled[damage])
    assert last_whole_checkpoint(whole) == (whole / "checkpoint-2", [whole / "checkpoint-4"])
    shutil.rmtree(whole / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4 is half-written; start a new run"):
        ended(case_arguments(Case("ssam"), **{**SAVED, "output_dir": str(whole)}), True)


def test_the_state_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    save_state(tmp_path, SETTINGS, {"memory": {}, "steps": 1, "elapsed": 1}, True, 2.0)

    def dies(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, SETTINGS, {"memory": {}, "steps": 2, "elapsed": 2}, True, 4.0)
    assert json.loads((tmp_path / STATE_FILE).read_text())["steps"] == 1
    assert not (tmp_path / STATE_FOLDER).exists()
