"""Every task's configuration is flags of its script, and the recipes say what they are."""

from __future__ import annotations

import importlib
import re

import pytest
import yaml

from hf_ssam import METHODS
from hf_ssam.trainer.schedules import first_ascent
from support.cli import ExampleParser
from tests.examples.scripts import ROOT, TASKS, run_script

RECIPES = {
    "noisy_labels": "run_text_classification",
    "late_phase": "run_text_classification",
    "vision_few_images": "run_image_classification",
    "robust_4bit": "run_text_classification",
}
SHORT = ["--max_steps", 2, "--max_train_samples", 24, "--max_eval_samples", 8, "--logging_steps", 1]
SHORT += ["--per_device_train_batch_size", 4, "--save_strategy", "no", "--disable_tqdm", "true"]


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_is_a_method_with_a_radius(path):
    flags = yaml.safe_load(path.read_text())
    assert flags["optim"] in METHODS and 0 < flags["rho"] <= 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_flags_of_its_script_and_names_its_own_command(name, monkeypatch):
    parsed = []
    script = importlib.import_module(RECIPES[name])

    class Parser(ExampleParser):
        def parse(self, argv=None):
            parsed.append(super().parse(argv))
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "ExampleParser", Parser)
    with pytest.raises(KeyboardInterrupt):
        script.main([str(TASKS / f"{name}.yaml")])
    text = (TASKS / f"{name}.yaml").read_text()
    assert f"python examples/{RECIPES[name]}.py configs/tasks/{name}.yaml" in text
    assert parsed[0][2].output_dir == f"out/{name}"
    assert all((ROOT / path).exists() for path in re.findall(r"(?:examples|configs)/[\w/]+\.\w+", text))


def test_recipe_of_the_late_phase_perturbs_the_last_tenth():
    flags = yaml.safe_load((TASKS / "late_phase.yaml").read_text())
    assert first_ascent(flags["ascent_start"], 150) == 135


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_offline(name, tmp_path):
    out = run_script(f"{RECIPES[name]}.py", TASKS / f"{name}.yaml", *SHORT, "--output_dir", tmp_path)
    assert "results after 2 steps: eval_loss" in out
    assert f"next: hf-ssam plot {tmp_path}" in out and "passes over a batch, " in out
