"""Every task's configuration is flags of its script, and so is every command that a page or a configuration names."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
import yaml

from hf_ssam import METHODS
from hf_ssam.trainer.schedules import first_ascent
from support.cli import ExampleParser
from tests.examples.scripts import ROOT, TASKS, run_script

RECIPES = ("noisy_labels", "late_phase", "vision_few_images", "robust_4bit", "movie_reviews", "trec_fine")
"""Tasks that no other test runs."""

CONFIGURATIONS = sorted(TASKS.glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md")), *CONFIGURATIONS]
SHORT = ["--max_steps", 2, "--max_train_samples", 24, "--max_eval_samples", 8, "--logging_steps", 1]
SHORT += ["--per_device_train_batch_size", 4, "--save_strategy", "no", "--disable_tqdm", "true"]


def commands(text: str) -> list[tuple[str, ...]]:
    """The training scripts that `text` calls, each with its flags; a gap in them is left to the reader."""
    lines = re.sub(r"\\\n#?\s*", "", text)
    found = re.findall(r"python examples/(run_\w+)\.py((?: +[^\s#`(|]+| +\"[^\"]*\")*)", lines)
    called = [(script, *shlex.split(words)) for script, words in found]
    return [words for words in called if words[0] != "run_study" and "…" not in "".join(words)]


COMMANDS = sorted({words for page in PAGES for words in commands(page.read_text())})


class Parsed(Exception):
    """In place of the run."""


def parsed(script: str, words: list[str], patch: pytest.MonkeyPatch) -> tuple:
    """The arguments that the script makes of its flags."""

    class Parser(ExampleParser):
        def parse(self, argv=None):
            raise Parsed(super().parse(argv))

    module = importlib.import_module(script)
    patch.setattr(module, "ExampleParser", Parser)
    patch.chdir(ROOT)
    with pytest.raises(Parsed) as stopped:
        module.main(words)
    return stopped.value.args[0]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configuration_is_a_method_with_a_radius(path):
    flags = yaml.safe_load(path.read_text())
    assert flags["optim"] in METHODS and 0 < flags["rho"] <= 0.5


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configuration_names_its_own_command_first_and_a_folder_of_its_own(path, monkeypatch):
    text = path.read_text()
    script, *words = commands(text)[0]
    assert words == [f"configs/tasks/{path.name}"]
    assert parsed(script, words, monkeypatch)[-1].output_dir == f"out/{path.stem}"
    assert all((ROOT / place).exists() for place in re.findall(r"(?:examples|configs)/[\w/]+\.\w+", text))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_of_a_page_is_flags_of_its_script(words, monkeypatch):
    parsed(words[0], list(words[1:]), monkeypatch)


def test_recipe_of_the_late_phase_perturbs_the_last_tenth():
    flags = yaml.safe_load((TASKS / "late_phase.yaml").read_text())
    assert first_ascent(flags["ascent_start"], 150) == 135


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_offline(name, tmp_path):
    script = commands((TASKS / f"{name}.yaml").read_text())[0][0]
    out = run_script(f"{script}.py", TASKS / f"{name}.yaml", *SHORT, "--output_dir", tmp_path)
    assert "results after 2 steps: eval_loss" in out
    assert f"next: hf-ssam plot {tmp_path}" in out and "passes over a batch, " in out
