"""The notebook runs from top to bottom, its cells one after the other in one namespace."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.examples.scripts import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
SOURCES = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EXAMPLES", "64")
    monkeypatch.setattr(sys, "path", [*sys.path])
    space: dict = {}
    for source in SOURCES:
        exec(compile(source, "quickstart.ipynb", "exec"), space)
    assert "accuracy 0." in capsys.readouterr().out
    assert space["trainer"].state.log_history[-2]["ssam/total_passes"] == 4  # two steps
    assert {"ssam/scale", "ssam/ascent_loss"} <= set(space["steps"].columns)
    assert {"model.safetensors", "README.md"} <= {path.name for path in Path(space["args"].output_dir).iterdir()}


def test_notebook_is_stored_without_outputs() -> None:
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
