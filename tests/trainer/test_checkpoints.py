"""Checkpoints under attack: nothing in them runs code, damage is named, half of one never passes for whole."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ssam import SSAMTrainer
from hf_ssam.trainer.checkpoints import (
    STATE_FILE,
    STATE_FOLDER,
    Settings,
    flattened,
    last_whole_checkpoint,
    load_state,
    save_state,
    sorted_checkpoints,
)
from tests.support.cases import (
    Case,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    text_data,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*its loss ignores it")
STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
FRIENDLY = Case("friendly_sam")
SETTINGS = Settings("friendly_sam", {}, 0.1, "global")
WAY_OUT = "restore it, resume from another checkpoint, or start a new run"


def ended(args, checkpoint: Path | None = None, cls: type = SSAMTrainer):
    trainer = cls(model=bert(), args=args, train_dataset=text_data())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def resumed(checkpoint: Path, case: Case = FRIENDLY):
    """A run that goes on from `checkpoint` and saves nothing."""
    return ended(case_arguments(case, max_steps=4), checkpoint)


@pytest.fixture(scope="module")
def whole_run() -> SSAMTrainer:
    """A run of a method that keeps vectors, saved in the middle."""
    return ended(case_arguments(FRIENDLY, **STEPS))


@pytest.fixture
def checkpoint(whole_run, tmp_path: Path) -> Path:
    """A copy of its checkpoint, to be spoiled."""
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(Path(whole_run.args.output_dir, "checkpoint-2"), copy)
    return copy


def vectors_file(checkpoint: Path) -> Path:
    (file,) = Path(checkpoint, STATE_FOLDER).iterdir()
    return file


def files_of_ours(checkpoint: Path) -> list[Path]:
    files = [p for p in checkpoint.rglob("*") if p.is_file()]
    return sorted(p for p in files if str(p.relative_to(checkpoint)).startswith(STATE_FOLDER))


def edit(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the content of the state file."""
    content = json.loads((checkpoint / STATE_FILE).read_text())
    change(content)
    (checkpoint / STATE_FILE).write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------------------- payloads


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.fixture
def payload(tmp_path: Path) -> bytes:
    """A pickle that leaves the folder `executed`; shown to work, and the folder taken away."""
    found = pickle.dumps(Payload(tmp_path / "executed"))
    pickle.loads(found)
    (tmp_path / "executed").rmdir()
    return found


@pytest.mark.parametrize("file", range(3))
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, payload: bytes, file):
    """Every file that we write or read ourselves."""
    ours = [checkpoint / "trainer_state.json", *files_of_ours(checkpoint)]
    assert len(ours) == 3
    ours[file].write_bytes(payload)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*({ours[file].name}|is half-written)"):
        resumed(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_pickles_beside_the_files_are_not_read(checkpoint: Path, tmp_path: Path, payload: bytes, whole_run):
    for name in (".metadata", "__0_0.distcp", "__0.metadata"):
        (checkpoint / STATE_FOLDER / name).write_bytes(payload)
    assert_identical(weights(resumed(checkpoint).model), weights(whole_run.model))
    assert not (tmp_path / "executed").exists()


def test_no_file_of_ours_is_a_pickle(checkpoint: Path):
    assert {p.suffix for p in files_of_ours(checkpoint)} == {".json", ".safetensors"}


# ------------------------------------------------------------------------------------------------------------ formats


def test_the_format_of_earlier_versions_is_refused(checkpoint: Path, tmp_path: Path, payload: bytes):
    """As they wrote it: an index that is a pickle, and a JSON file that names no format."""
    model = bert()
    state = load_state(checkpoint, dict(model.named_parameters()))
    shutil.rmtree(checkpoint / STATE_FOLDER)
    dcp.save(flattened(state["memory"]), checkpoint_id=checkpoint / STATE_FOLDER, no_dist=True)
    (checkpoint / STATE_FOLDER / ".metadata").write_bytes(payload)
    edit(checkpoint, lambda content: [content.pop(name) for name in ("format", "save_id", "files")])
    said = "ssam_state.json has format 1, written by an earlier version .* resume with that version, or start a new"
    with pytest.raises(ValueError, match=said):
        resumed(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_a_later_format_is_refused(checkpoint: Path):
    edit(checkpoint, lambda content: content.update(format=3))
    with pytest.raises(ValueError, match="has format 3, written by a later version .* reads format 2; resume with"):
        resumed(checkpoint)


# ------------------------------------------------------------------------------------------------------------- damage

KEYS = (
    "method",
    "options",
    "rho",
    "ascent_scope",
    "steps",
    "elapsed",
    "total_passes",
    "save_id",
    "files",
    "vectors",
)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "\x00", "{" * 100_000, "[" * 100_000])
def test_a_damaged_state_file_is_named(checkpoint: Path, text: str):
    (checkpoint / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"checkpoint-2/ssam_state.json is damaged .*; {WAY_OUT}"):
        load_state(checkpoint, {})


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_entry_of_the_state_file_is_named(checkpoint: Path, key: str):
    edit(checkpoint, lambda content: content.pop(key))
    with pytest.raises(ValueError, match=rf"ssam_state.json is damaged \(`{key}` is missing\); {WAY_OUT}"):
        load_state(checkpoint, {})


@pytest.mark.parametrize("key", ["format", *KEYS])
def test_an_entry_of_another_kind_is_named(checkpoint: Path, key: str):
    edit(checkpoint, lambda content: content.update({key: None}))
    with pytest.raises(ValueError, match=rf"ssam_state.json is damaged \(`{key}` is None\); {WAY_OUT}"):
        load_state(checkpoint, {})


def test_the_keys_of_the_state_file_are_those_that_are_checked(checkpoint: Path):
    assert set(json.loads((checkpoint / STATE_FILE).read_text())) == {"format", *KEYS}


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda file: cut(file, 0), "is damaged"),
        (lambda file: cut(file, 0.01), "is damaged"),
        (lambda file: cut(file, 0.9), "is damaged"),
        (lambda file: file.write_bytes(b"\xff" * 1000), "is damaged"),
        (lambda file: shutil.copy(file.parents[1] / "model.safetensors", file), "is damaged"),
        (lambda file: shutil.rmtree(file.parent), "is missing"),
    ],
    ids=["missing", "empty", "header cut", "data cut", "noise", "weights", "folder missing"],
)
def test_a_damaged_vectors_file_is_named(checkpoint: Path, damage: Callable[[Path], object], said: str):
    damage(vectors_file(checkpoint))
    with pytest.raises(ValueError, match=f"ssam_state/vectors-00001-of-00001.safetensors {said}.*; {WAY_OUT}"):
        resumed(checkpoint)


def test_vectors_of_another_save_are_named(checkpoint: Path, whole_run):
    """The same run, two steps later."""
    other = Path(whole_run.args.output_dir, "checkpoint-4")
    shutil.copy(vectors_file(other), vectors_file(checkpoint))
    with pytest.raises(ValueError, match=f"00001-of-00001.safetensors belongs to another save .*; {WAY_OUT}"):
        resumed(checkpoint)


@pytest.mark.parametrize("change", [{"files": 0}, {"files": -1}, {"vectors": []}], ids=str)
def test_vectors_that_are_not_those_listed_are_named(checkpoint: Path, change: dict):
    edit(checkpoint, lambda content: content.update(change))
    with pytest.raises(ValueError, match=f"ssam_state.json names .* holds other ones; {WAY_OUT}"):
        resumed(checkpoint)


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_missing_state_file_is_no_fresh_start(checkpoint: Path, folder_too: bool):
    """With nothing of ours left, the log of the run tells."""
    (checkpoint / STATE_FILE).unlink()
    if folder_too:
        shutil.rmtree(checkpoint / STATE_FOLDER)
    with pytest.raises(ValueError, match=f"ssam_state.json is missing, though .* sharpness-aware run; {WAY_OUT}"):
        resumed(checkpoint)


def test_a_missing_state_file_of_a_method_without_vectors_is_no_fresh_start():
    run = ended(case_arguments(Case("ssam"), **STEPS))
    checkpoint = Path(run.args.output_dir, "checkpoint-2")
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"ssam_state.json is missing, though .* sharpness-aware run; {WAY_OUT}"):
        resumed(checkpoint, Case("ssam"))


AFRESH = "was saved without a sharpness-aware method; friendly_sam starts afresh"


def test_a_stock_run_that_had_been_ours_starts_afresh(checkpoint: Path, caplog):
    """Its checkpoints hold nothing of ours, though the older entries of its log are."""
    stock = ended(arguments(TrainingArguments, optim="sgd", **STEPS), checkpoint, Trainer)
    later = Path(stock.args.output_dir, "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        ended(case_arguments(FRIENDLY, max_steps=6), later)
    assert AFRESH in caplog.text


def test_a_checkpoint_of_the_model_alone_starts_afresh(caplog):
    """As the stock Trainer's optimizer does."""
    run = ended(case_arguments(FRIENDLY, save_only_model=True, **STEPS))
    with caplog.at_level(logging.WARNING):
        resumed(Path(run.args.output_dir, "checkpoint-2"))
    assert AFRESH in caplog.text


# -------------------------------------------------------------------------------------------------------- second saves


class Died(Exception):
    """Raised in the middle of a save."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("optim", ["friendly_sam", "sgd"])
def test_a_second_save_that_dies_leaves_half_a_checkpoint(moment: str, optim: str):
    """Each moment is before the first file, or between two, of a checkpoint that is there from an earlier run."""
    chosen = {"base_optim": "sgd"} if optim == "friendly_sam" else {}
    run = ended(arguments(optim=optim, **chosen, **STEPS))
    folder = Path(run.args.output_dir)
    assert last_whole_checkpoint(folder) == (folder / "checkpoint-4", [])

    def dies(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Died
        return getattr(SSAMTrainer, moment)(self, *args, **kwargs)

    dying = type("Dying", (SSAMTrainer,), {moment: dies})
    with pytest.raises(Died):
        ended(arguments(optim=optim, output_dir=str(folder), **chosen, **STEPS), cls=dying)
    assert last_whole_checkpoint(folder) == (folder / "checkpoint-2", [folder / "checkpoint-4"])


def test_a_second_save_leaves_nothing_of_the_first(whole_run, tmp_path: Path):
    """A run with a stock optimizer over the folder of an earlier one, which kept vectors."""
    shutil.copytree(whole_run.args.output_dir, tmp_path / "run")
    ended(arguments(optim="sgd", output_dir=str(tmp_path / "run"), **STEPS))
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(STATE_FOLDER)]


def test_a_state_saved_over_one_with_vectors_is_read_alone(tmp_path: Path):
    params = dict(bert().named_parameters())
    kept = {"memory": {"m": {n: torch.randn_like(p) for n, p in params.items()}}, "steps": 1, "elapsed": 1}
    save_state(tmp_path, SETTINGS, kept, True, 2.0)
    save_state(tmp_path, SETTINGS, {"memory": {}, "steps": 2, "elapsed": 2}, True, 4.0)
    assert load_state(tmp_path, params)["memory"] == {}


# --------------------------------------------------------------------------------------------------- which is the last


def half_or_whole(folder: Path, whole: bool) -> Path:
    folder.mkdir()
    if whole:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def test_checkpoints_are_sorted_by_step(tmp_path: Path):
    """9 comes before 10, whatever the order of the names, of the writing or of the clock."""
    made = {n: half_or_whole(tmp_path / f"checkpoint-{n}", n != 100) for n in (10, 9, 100, 1, 20)}
    half_or_whole(tmp_path / "checkpoint-best", True)
    (tmp_path / "checkpoint-7").write_text("a file")
    for age, n in enumerate((100, 1, 20, 9, 10)):
        os.utime(made[n], (age, age))
    assert sorted_checkpoints(tmp_path) == [made[n] for n in (1, 9, 10, 20, 100)]
    assert last_whole_checkpoint(tmp_path) == (made[20], [made[100]])
    shutil.rmtree(made[20])
    assert last_whole_checkpoint(tmp_path) == (made[10], [made[100]])


class Begin(TrainerCallback):
    """Remembers the step at which training began."""

    step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def test_a_run_resumes_from_the_tenth_step_not_the_ninth():
    run = ended(case_arguments(FRIENDLY, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=10))
    folder = Path(run.args.output_dir)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
    args, begin = case_arguments(FRIENDLY, output_dir=str(folder), max_steps=11), Begin()
    SSAMTrainer(model=bert(), args=args, train_dataset=text_data(), callbacks=[begin]).train(
        resume_from_checkpoint=True
    )
    assert begin.step == 10
