"""The wheel works alone: it is built, installed where the repository is not to be seen, and trains ten steps there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STRANGER = """
import json, sys
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification
import hf_ssam
from hf_ssam import SSAMTrainer, SSAMTrainingArguments

torch.manual_seed(0)
size = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": torch.tensor([i % 16, 1, 2]), "labels": i % 2} for i in range(20)]
args = SSAMTrainingArguments("out", optim="ssam", max_steps=10, per_device_train_batch_size=2, report_to="none",
                             use_cpu=True, save_strategy="no", disable_tqdm=True)
trainer = SSAMTrainer(BertForSequenceClassification(BertConfig(**size)), args, train_dataset=rows)
trainer.train()
trainer.save_model()
trainer.create_model_card()
passes = trainer.state.log_history[-1]["ssam/total_passes"]
Path("said.json").write_text(json.dumps({"file": hf_ssam.__file__, "version": hf_ssam.__version__, "path": sys.path,
                                         "steps": trainer.state.global_step, "passes": passes}))
"""


def done(*command: object, cwd: Path) -> None:
    """Run `command` where nothing points to the repository."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(cwd)}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the back end that `python -m build` calls."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_its_templates_types_and_licence_and_nothing_else(wheel: Path) -> None:
    names = {name.split("/", 1)[1] if ".dist-info/" in name else name for name in zipfile.ZipFile(wheel).namelist()}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_ssam").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"hf_ssam/py.typed", "hf_ssam/hub/templates/model_card.md"} <= tracked
    assert names - tracked - {"entry_points.txt"} == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert tracked <= names


@pytest.mark.slow
def test_wheel_trains_ten_steps_and_writes_a_card_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    done(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    done(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but the .pth files in it are not read: no editable install.
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    work = tmp_path / "work"
    work.mkdir()
    (work / "stranger.py").write_text(STRANGER)
    done(python, "stranger.py", cwd=work)
    said = json.loads((work / "said.json").read_text())
    assert said["version"] == PROJECT["version"]
    assert Path(said["file"]).is_relative_to(site) and str(ROOT) not in said["path"]
    assert (said["steps"], said["passes"]) == (10, 20)
    assert "tan2025stable" in (work / "out" / "README.md").read_text()


def test_version_is_the_same_in_the_changelog_and_the_citation() -> None:
    newest = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == PROJECT["version"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2])
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text() + "\n"


def test_messages_name_no_package_that_an_index_does_not_have() -> None:
    kinds = ("hf_ssam/**/*.py", "hf_ssam/**/*.md", "examples/**/*.py", "examples/**/*.md")
    for path in (path for kind in kinds for path in ROOT.glob(kind)):
        assert not re.search(r"pip install[^\n]*[ '\"]hf-ssam", path.read_text()), path
