"""`--push_to_hub` of the Trainer scripts, through the real client to a stand-in for the Hub."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from tests.examples.hub_push import ON_ADAPTERS
from tests.examples.scripts import ROOT
from tests.support.hub_server import HubStandIn

WHOLE = {"config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PUSHED = {
    "run_image_classification": WHOLE | {"preprocessor_config.json"},
    "run_token_classification": WHOLE | {"tokenizer.json"},
    "run_summarization": WHOLE | {"tokenizer.json", "generation_config.json"},
    "run_clm": ADAPTER | {"tokenizer.json"},
    "run_sft": WHOLE | {"tokenizer.json"},
}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The folder that the scripts ran in, and the repositories that the Hub has afterwards."""
    folder = tmp_path_factory.mktemp("pushed")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    with HubStandIn() as hub:
        variables = {**outside, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **hub.client_env(str(folder / "cache"))}
        command = [sys.executable, str(ROOT / "tests" / "examples" / "hub_push.py")]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return folder, hub.repos


@pytest.mark.slow
@pytest.mark.parametrize("script", PUSHED)
def test_the_model_and_its_card_arrive(pushed, script):
    folder, repos = pushed
    repo = repos[f"tester/{script}"]
    assert repo.summaries[-1] == "End of training"
    assert PUSHED[script] | {"README.md"} <= set(repo.files)
    for path, content in repo.files.items():
        if path != ".gitattributes":
            assert content == (folder / script / path).read_bytes(), path
    assert (folder / script / "_data.json").is_file() and "_data.json" not in repo.files
    card = ModelCard(repo.files["README.md"].decode())
    assert {"ssam", "sharpness-aware-minimization"} <= set(card.data.tags)
    assert f"{script}.py" in card.text and "--push_to_hub" in card.text
    assert str(folder) not in card.content


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_ADAPTERS)
def test_an_adapter_arrives_alone_whatever_helped_to_train_it(pushed, method):
    """No second adapter, no noise, no state of the method: what plain LoRA would have pushed."""
    folder, repos = pushed
    plain, own = repos["tester/run_clm"], repos[f"tester/run_clm-{method}"]
    assert set(own.files) == set(plain.files)
    weights, expected = (load(repo.files["adapter_model.safetensors"]) for repo in (own, plain))
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in expected.items()}
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    opened = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder / f"run_clm-{method}"))
    assert set(opened) == set(weights) and all(torch.equal(opened[name], t) for name, t in weights.items())
    assert method in ModelCard(own.files["README.md"].decode()).data.tags
