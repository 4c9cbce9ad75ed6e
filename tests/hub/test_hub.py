"""Pushing, with the real client against a stand-in on a loopback port; every client runs in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.hub_client import Client
from tests.support.hub_server import HubStandIn, Repository

STATE = {"ssam_state.json"}
STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
RUN = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "tensorboard", *STEPS]
PUSH = ["--push_to_hub", "--hub_always_push", *RUN]


def said(done: subprocess.CompletedProcess[str], word: str) -> list[str]:
    """What the program printed after `word`, line by line."""
    return [line.removeprefix(word + " ") for line in done.stdout.splitlines() if line.startswith(word + " ")]


@pytest.mark.slow
def test_push_and_load_in_a_fresh_process(tmp_path):
    with HubStandIn() as hub:
        first = Client(hub, tmp_path)
        trained = first.script("train", "push", "--output_dir", "toy", "--hub_private_repo", "True", *PUSH)
        assert trained.returncode == 0, trained.stderr[-2000:]
        repo = hub.repos["tester/toy"]
        assert repo.private
        assert repo.summaries[-1] == "End of training"
        assert {"README.md", "model.safetensors", "tokenizer.json", "figures/loss_curve.png"} <= set(repo.files)
        assert any(path.startswith("runs/") and ".tfevents." in path for path in repo.files)
        assert not [path for path in repo.files if path.startswith("checkpoint-")]
        (fresh := tmp_path / "fresh").mkdir()
        loaded = Client(hub, fresh).script("load", "tester/toy")
        assert loaded.returncode == 0, loaded.stderr[-2000:]
        assert said(loaded, "LOGITS") == said(trained, "LOGITS")
        (stranger := tmp_path / "stranger").mkdir()
        assert Client(hub, stranger, token=None).script("load", "tester/toy").returncode != 0
    card = ModelCard(repo.files["README.md"].decode())
    assert {"ssam", "sharpness-aware-minimization"} <= set(card.data.tags)
    assert "figures/loss_curve.png" in card.text
    assert "train push --output_dir toy" in card.text.replace(" \\\n    ", " ")
    assert str(tmp_path) not in card.content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_what_each_strategy_pushes(tmp_path, strategy, folders):
    with HubStandIn() as hub:
        argv = ["--output_dir", "toy", "--hub_model_id", "named", "--hub_strategy", strategy, *PUSH]
        done = Client(hub, tmp_path).script("train", "stop", *argv)
        assert done.returncode == 0, done.stderr[-2000:]
        repo = hub.repos["tester/named"]
    if strategy == "end":
        assert repo.summaries == ["initial commit"]
        return
    assert {"README.md", "model.safetensors", "config.json"} <= set(repo.files)
    assert repo.files["model.safetensors"] == (tmp_path / "toy" / "model.safetensors").read_bytes()
    assert b"sharpness-aware-minimization" in repo.files["README.md"]
    assert {path.split("/")[0] for path in repo.files if "checkpoint" in path} == folders
    for folder in folders:
        local = tmp_path / "toy" / folder.replace("last-checkpoint", "checkpoint-4")
        here = {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()}
        assert STATE <= set(here)
        assert {p.removeprefix(folder + "/"): d for p, d in repo.files.items() if p.startswith(folder + "/")} == here


@pytest.mark.slow
def test_refusals_are_one_sentence_before_the_first_step(tmp_path):
    with HubStandIn() as hub:
        mine, other = (
            b'{"architectures": ["%s"]}' % name for name in (b"BertForSequenceClassification", b"GPT2Model")
        )
        found = {"taken": ("weights.npz", b"0"), "other-class": ("config.json", other), "mine": ("config.json", mine)}
        for name, (path, data) in found.items():
            hub.repos[f"tester/{name}"] = Repository(False)
            hub.repos[f"tester/{name}"].files[path] = data
        names = ["a b", "someone/else", "taken", "other-class", "mine"]
        cases = [{"hub_model_id": name} for name in names] + [{"hub_model_id": "mine", "hub_revision": "v9"}]
        done = Client(hub, tmp_path).script("build", "toy", json.dumps(cases))
        assert done.returncode == 0, done.stderr[-2000:]
        nobody = Client(hub, tmp_path, token=None).script("build", "toy", json.dumps([{"hub_model_id": "new"}]))
        stranger = Client(hub, tmp_path, token="hf_" + "b" * 34).script("build", "toy", json.dumps([{}]))
    gone = Client(hub, tmp_path).script("build", "toy", json.dumps([{}]))
    assert said(done, "BUILT") == ["tester/mine"]
    name, namespace, taken, other, revision = said(done, "REFUSED")
    assert name.startswith("hub_model_id: 'a b'") and "my-name/my-model" in name
    assert namespace.startswith("hub_model_id: this token may not write to someone/else; choose")
    assert "tester/taken" in taken and "1 files that no Trainer wrote, such as weights.npz" in taken
    assert "GPT2Model, not BertForSequenceClassification" in other and "choose another --hub_model_id" in other
    assert revision.startswith("hub_revision: the repository tester/mine has no branch 'v9'; create it with")
    assert said(nobody, "REFUSED") == [
        "hub_token: the Hub wants a token and there is none; run `hf auth login`, or set HF_TOKEN."
    ]
    assert f"The push to toy failed, {hub.endpoint} cannot be reached" in said(gone, "REFUSED")[0]
    assert said(stranger, "REFUSED")[0].startswith("hub_token: the Hub does not accept this token for toy; make one")


@pytest.mark.slow
def test_a_push_without_the_argument_saves_the_model_before_it_asks_for_a_token(tmp_path):
    with HubStandIn() as hub:
        done = Client(hub, tmp_path, token=None).script("train", "push", "--output_dir", "toy", *RUN)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "hub_token: the Hub wants a token and there is none" in last
    assert "push it later with: hf upload toy toy ." in last
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(os.listdir(tmp_path / "toy"))


@pytest.mark.slow
def test_a_hub_that_dies_in_mid_push_costs_nothing(tmp_path):
    """The first upload of weights is cut: training goes on, the last push fails, the printed command does it later."""
    with HubStandIn(dies_at=lambda method, path: method == "PUT") as hub:
        done = Client(hub, tmp_path).script("train", "push", "--output_dir", "toy", *PUSH)
        assert ("PUT" in {method for method, _ in hub.requests}) and hub.repos["tester/toy"].files == {}
    assert said(done, "TRAINED") == ["4"]
    assert done.returncode == 1 and not said(done, "PUSHED")
    assert done.stderr.count("Nothing is lost: the model is in toy; push it later with:") >= 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"The push to tester/toy failed, {hub.endpoint} cannot be reached or broke off" in last
    command = last.split("push it later with: ")[1]
    assert command == "hf upload tester/toy toy . --exclude 'checkpoint-*' --exclude '_*'"
    with HubStandIn() as hub:
        client = Client(hub, tmp_path)
        hf = Path(sys.executable).with_name("hf")
        pushed = client.run(str(hf), *shlex.split(command)[1:])
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        loaded = client.script("load", "tester/toy")
        assert said(loaded, "LOGITS") == said(done, "LOGITS")
        assert not [path for path in hub.repos["tester/toy"].files if path.startswith("checkpoint-")]
