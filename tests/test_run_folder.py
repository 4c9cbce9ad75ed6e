"""What a run left behind is found where it is, and a damaged file is named."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import hf_ssam
from hf_ssam.hub.card_facts import plain_run
from hf_ssam.plots import history
from hf_ssam.run_folder import RunFolder, is_whole, read_run, sorted_checkpoints
from tests.hub.test_model_card import arguments
from tests.support.hub_run import trainer

PACKAGE = Path(hf_ssam.__file__).parent


def write_state(folder: Path, step: int, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(
        json.dumps({"log_history": [{"step": step}], "global_step": step, "best_global_step": None, **more})
    )
    return path


def test_folder_of_a_real_run(tmp_path):
    run = trainer(arguments(tmp_path / "run", max_steps=2, save_steps=1, logging_steps=1))
    run.train()
    found = read_run(tmp_path / "run")
    assert (found.log, found.steps) == (read_run(tmp_path / "run" / "checkpoint-2").log, 2)
    run.save_state()
    run.save_metrics("eval", {"eval_loss": 0.5})
    found = read_run(tmp_path / "run")
    assert (list(found.log), found.steps, found.best_step) == (run.state.log_history, 2, run.state.best_global_step)
    assert found.results == {"eval_loss": 0.5}


def test_own_state_comes_before_that_of_a_checkpoint(tmp_path):
    for step in (9, 10):
        write_state(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert [path.name for path in sorted_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert read_run(tmp_path).steps == 10
    own = write_state(tmp_path, 5, best_global_step=4)
    assert read_run(tmp_path) == read_run(own) == RunFolder(tmp_path, [{"step": 5}], 5, 4, {})


@pytest.mark.parametrize(
    "content", ["", '{"log_history": [', "[]", '{"global_step": 3}', '{"log_history": 3}', "\x00"]
)
def test_a_damaged_state_is_named_and_a_half_written_checkpoint_is_passed_over(tmp_path, content):
    write_state(tmp_path / "checkpoint-9", 9)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(content)
    assert read_run(tmp_path).steps == 9
    assert [is_whole(path) for path in sorted_checkpoints(tmp_path)] == [True, False]
    (tmp_path / "trainer_state.json").write_text(content)
    for asked in (tmp_path, tmp_path / "trainer_state.json"):
        with pytest.raises(ValueError, match=r"trainer_state\.json: the file is damaged \(.*\); .* checkpoint"):
            read_run(asked)
    with pytest.raises(ValueError, match=r"^card_baseline: .*trainer_state\.json"):
        plain_run(tmp_path)


def test_damaged_results_are_named(tmp_path):
    write_state(tmp_path, 1)
    (tmp_path / "all_results.json").write_text("{")
    with pytest.raises(ValueError, match=r"all_results\.json"):
        read_run(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    for read, folder in ((read_run, tmp_path), (history, tmp_path), (read_run, tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json .* call trainer\.save_state\(\)"):
            read(folder)
    with pytest.raises(ValueError, match=r"card_baseline: .*no trainer_state\.json .* call trainer\.save_state\(\)"):
        plain_run(tmp_path)


def test_reading_a_run_needs_neither_torch_nor_the_trainer():
    names = {
        node.module
        for node in ast.walk(ast.parse((PACKAGE / "run_folder.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not {name for name in names if name.split(".")[0] in ("torch", "transformers", "hf_ssam")}


@pytest.mark.parametrize("room", ["hub", "plots", "sharpness"])
def test_rooms_beside_the_trainer_do_not_import_it(room):
    for path in (PACKAGE / room).glob("*.py"):
        modules = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in modules if name.split(".")[0] == "trainer" or "hf_ssam.trainer" in name], path


def test_no_pickle_of_a_run_is_read():
    """Whoever is given a run's folder, or pulls one from the Hub, may draw and compare it without running its code."""
    for path in [PACKAGE / "run_folder.py", *(PACKAGE / "plots").glob("*.py"), *(PACKAGE / "hub").glob("*.py")]:
        assert not {"torch.load", "pickle.load", "pickle.loads"} & set(_calls(path)), path


def _calls(path: Path) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
