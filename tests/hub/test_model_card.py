"""The card says what the run was; nothing here talks to a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest
import trl
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_ssam import METHODS, SSAMArgumentsMixin, SSAMTrainerMixin, SSAMTrainingArguments, get_method
from hf_ssam.hub.card_facts import PlainRun, compute_cost, evaluations, plain_run, public_base_model, sharpness_rows
from hf_ssam.hub.command_line import repeat_command, wrapped
from hf_ssam.hub.markdown import cell, text
from hf_ssam.hub.push import HubError, explain, later_command, other_content
from hf_ssam.hub.redaction import cleaned
from hf_ssam.methods import Method, Paper, register_method
from hf_ssam.methods.table import _TABLE
from tests.support.hub_run import tokenizer, trainer

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(folder, **fields):
    return SSAMTrainingArguments(output_dir=str(folder), **QUIET, **fields)


def card_of(run, **asked) -> ModelCard:
    run.create_model_card(**asked)
    return ModelCard.load(Path(run.args.output_dir, "README.md"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps, evaluated before, during and after, with curvature in the log and a figure in the folder."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    fields = {"rho": 0.07, "optim_args": "normalize=false", "ascent_interval": 2, "base_optim": "sgd"}
    run = trainer(arguments(folder, max_steps=4, logging_steps=1, learning_rate=0.5, eval_strategy="epoch", **fields))
    run.compute_metrics = accuracy
    before = run.evaluate()
    run.train()
    run.log({"sharpness/top_eigenvalue": 2.5})
    run.log({"sharpness/trace": 30.0})
    run.state.log_history[0]["sharpness/trace"] = 90.0
    after = run.evaluate()
    (folder / "figures").mkdir()
    (folder / "figures" / "loss_curve.png").write_bytes(b"\x89PNG")
    return run, before, after


def test_front_matter_holds_and_comes_back(trained):
    run, _, after = trained
    card = card_of(run, license="mit", language="en", tags="mine", dataset="Toy films", dataset_tags="me/toy-films")
    data = card.data
    assert data.library_name == "transformers" and data.license == "mit" and data.language == ["en"]
    assert data.tags == ["mine", "generated_from_trainer", "ssam", "sharpness-aware-minimization"]
    assert data.datasets == ["me/toy-films"] and data.base_model is None
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": after["eval_loss"],
        "accuracy": after["eval_accuracy"],
    }
    assert {r.dataset_type for r in results.values()} == {"me/toy-films"}
    assert {r.task_type for r in results.values()} == {"text-classification"}
    assert ModelCardData(**data.to_dict()).to_yaml() == data.to_yaml()
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_the_text_tells_method_cost_and_results(trained):
    run, before, after = trained
    text = card_of(run).text
    assert METHODS["ssam"].summary in text
    assert "| Method | `ssam` |" in text and "| Radius ρ | 0.07, schedule `constant` |" in text
    assert "`normalize=false`" in text and "| Perturbed steps | every 2 steps |" in text
    assert "| Base optimizer | `sgd` |" in text and "| Ascent scope | `global` |" in text
    assert "| Gradient computations over a batch | 6 |" in text and "| Optimizer steps | 4 |" in text
    assert f"| loss | {before['eval_loss']:.4g} | {after['eval_loss']:.4g} |" in text
    assert "| top eigenvalue | 2.5 (step 4) | 2.5 (step 4) |" in text
    assert "| trace | 90 (step 1) | 30 (step 4) |" in text
    assert "![loss curve](figures/loss_curve.png)" in text
    assert "model = BertForSequenceClassification.from_pretrained(name)" in text
    assert "from transformers import AutoTokenizer, BertForSequenceClassification" in text
    assert "Preparation Time" not in text and "Use ssam" not in text and "None" not in text


def test_the_stock_optimizer_gets_the_stock_card(tmp_path):
    ours = trainer(arguments(tmp_path / "a" / "run", optim="adamw_torch"))
    stock_args = TrainingArguments(output_dir=str(tmp_path / "b" / "run"), optim="adamw_torch", **QUIET)
    stock = Trainer(ours.model, stock_args, train_dataset=ours.train_dataset, eval_dataset=ours.eval_dataset)
    cards = []
    for run in (ours, stock):
        Path(run.args.output_dir).mkdir(parents=True, exist_ok=True)
        run.create_model_card(tags="mine")
        cards.append(Path(run.args.output_dir, "README.md").read_bytes())
    assert cards[0] == cards[1]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_card_before_it_has_a_log(tmp_path, name):
    run = trainer(arguments(tmp_path / "run", optim=name))
    card = card_of(run)
    assert text(METHODS[name].summary) in card.text and name in card.data.tags
    assert ("**Experimental:**" in card.text) is bool(METHODS[name].experimental)
    for paper in (METHODS["ssam"].paper, METHODS[name].paper):
        assert card.text.count(paper.bibtex) == 1


def test_a_registered_method_is_on_the_card_with_its_own_citation(tmp_path):
    paper = Paper("A title", "Last, First", "Journal", 2026, "2601.00001", METHODS["ssam"].paper.key)
    rules = METHODS["sam"].rules
    register_method(Method("of_my_own", "SAM again.", rules, 0.05, paper, experimental="read | in a talk only"))
    run = trainer(arguments(tmp_path / "run", optim="sam"))
    run.args.optim = "of_my_own"
    try:
        card = card_of(run)
    finally:
        del _TABLE["of_my_own"]
    assert "of_my_own" in card.data.tags and "SAM again." in card.text
    assert "**Experimental:** read \\| in a talk only." in card.text
    assert paper.bibtex in card.text and METHODS["ssam"].paper.bibtex in card.text
    assert "[A title](https://arxiv.org/abs/2601.00001)" in card.text


@pytest.mark.slow
def test_a_second_card_says_the_same(trained):
    run, _, _ = trained
    assert str(card_of(run)) == str(card_of(run))


def test_a_local_base_model_leaves_no_path(tmp_path, trained):
    run, _, _ = trained
    (base := tmp_path / "secret" / "bert-tiny").mkdir(parents=True)
    run.model.config._name_or_path = str(base)
    try:
        card = card_of(run)
    finally:
        run.model.config._name_or_path = ""
    assert card.data.base_model is None
    assert "A model from the local folder `bert-tiny`, fine-tuned" in card.text and "secret" not in str(card)
    named = card_of(run, finetuned_from="me/bert-tiny", license="mit")
    assert named.data.base_model == "me/bert-tiny"
    assert "[me/bert-tiny](https://huggingface.co/me/bert-tiny) fine-tuned" in named.text


def test_an_adapter_keeps_its_tags_and_loses_the_path(tmp_path):
    run = trainer(arguments(tmp_path / "run"))
    run.model.config._name_or_path = str(tmp_path)
    run.model = peft.get_peft_model(run.model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    run.save_model()
    card = card_of(run)
    assert card.data.library_name == "peft" and {"ssam", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None and str(tmp_path) not in str(card)
    run.card_base_model = "me/bert-tiny"
    assert card_of(run).data.base_model == "me/bert-tiny"
    assert "from peft import AutoPeftModelForSequenceClassification" in card.text


def base_in(folder) -> str:
    return peft.PeftConfig.from_pretrained(folder).base_model_name_or_path


def over_a_folder(run, folder) -> None:
    """An adapter on a base that was loaded from `folder`."""
    run.model.save_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder)
    run.model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))


@pytest.fixture
def push(monkeypatch):
    """Pushes while the Hub cannot be reached: what is left is to be uploaded by hand."""

    def unreachable(*args, **kwargs):
        raise OfflineModeIsEnabled

    def in_vain(run) -> None:
        monkeypatch.setattr(Trainer, "init_hf_repo", unreachable)
        with pytest.raises(HubError, match="push it later"):
            run.push_to_hub()

    return in_vain


def test_a_pushed_adapter_names_its_base_as_the_hub_knows_it(tmp_path, push):
    """Only what goes to the Hub is renamed: elsewhere the folder is what opens the adapter again."""
    run = trainer(arguments(tmp_path / "run"))
    over_a_folder(run, tmp_path)
    run.model.add_adapter("second", run.model.peft_config["default"])
    run.card_base_model = "me/bert-tiny"
    folders = [tmp_path / "run", tmp_path / "run" / "second"]
    run.save_model()
    assert [base_in(folder) for folder in folders] == [str(tmp_path)] * 2
    foreign = tmp_path / "run" / "other" / "adapter_config.json"
    foreign.parent.mkdir()
    foreign.write_text("{")
    push(run)
    assert [base_in(folder) for folder in folders] == ["me/bert-tiny"] * 2 and foreign.read_text() == "{"
    assert run.model.peft_config["default"].base_model_name_or_path == str(tmp_path)
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    assert not list((tmp_path / "run").glob(".adapter*"))


@pytest.mark.parametrize("name", ["me/bert-tiny", None])
def test_the_card_that_peft_leaves_in_a_checkpoint_names_no_folder(tmp_path, push, name):
    """A push of a checkpoint takes its folder whole."""
    run = trainer(arguments(tmp_path / "run"))
    over_a_folder(run, tmp_path)
    run.card_base_model = name
    push(run)
    run.save_model(str(tmp_path / "checkpoint-7"), _internal_call=True)
    card = ModelCard.load(tmp_path / "checkpoint-7" / "README.md")
    assert card.data.base_model == name and "lora" in card.data.tags
    assert ("base_model:adapter:me/bert-tiny" in card.data.tags) == (name is not None)
    assert str(tmp_path) not in card.content


def test_an_adapter_over_a_folder_is_pushed_with_a_warning(tmp_path, caplog, push):
    run = trainer(arguments(tmp_path / "run"))
    over_a_folder(run, tmp_path)
    with caplog.at_level("WARNING"):
        push(run)
    assert f"the local folder '{tmp_path.name}'" in caplog.text and "trainer.card_base_model" in caplog.text
    assert base_in(tmp_path / "run") == str(tmp_path)


def test_a_trainer_with_its_own_card_keeps_it(tmp_path):
    class Config(SSAMArgumentsMixin, trl.SFTConfig):
        pass

    class Run(SSAMTrainerMixin, trl.SFTTrainer):
        pass

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    args = Config(output_dir=str(tmp_path / "run"), bf16=False, **QUIET)
    words = tokenizer()
    words.eos_token = "[UNK]"
    run = Run(model, args, train_dataset=Dataset.from_dict({"input_ids": [[2, 4, 5]] * 4}), processing_class=words)
    card = card_of(run, model_name="mine")
    assert {"trl", "sft", "ssam"} <= set(card.data.tags)
    assert "# Model Card for mine" in card.text and "## Trained with sharpness-aware minimisation" in card.text
    assert card.text.count("## Trained with") == 1 and METHODS["ssam"].paper.bibtex in card.text


def test_the_plain_run_is_compared_with(tmp_path, trained):
    run, _, after = trained
    log = [
        {"eval_loss": 0.25, "step": 4},
        {"train_runtime": run.state.log_history[-1].get("train_runtime", 2.0), "step": 4},
    ]
    (plain := tmp_path / "adamw").mkdir()
    (plain / "trainer_state.json").write_text(json.dumps({"log_history": log, "best_global_step": None}))
    run.card_baseline = plain
    try:
        text = card_of(run).text
    finally:
        run.card_baseline = None
    assert "after, with the plain optimizer |" in text and f"{after['eval_loss']:.4g} | 0.25 |" in text
    assert "| Training time of the plain optimizer (run `adamw`) | 2 s; this run took" in text
    with pytest.raises(ValueError, match=r"card_baseline: .*no trainer_state.json .*; call trainer.save_state"):
        plain_run(tmp_path / "nowhere")


def test_evaluations_are_of_the_model_that_is_shared():
    log = [
        {"eval_loss": 3.0, "eval_runtime": 1.0, "step": 0},
        {"eval_loss": 2.0, "eval_runtime": 1.0, "step": 2},
        {"eval_b_loss": 2.5, "step": 2},
        {"eval_loss": 2.2, "step": 4},
        {"train_runtime": 9.0, "train_loss": 1.0, "step": 4},
    ]
    assert evaluations(log, {}, None) == ({"loss": 3.0}, {"loss": 2.2})
    assert evaluations(log, {}, 2) == ({"loss": 3.0}, {"loss": 2.0, "b_loss": 2.5})
    again = [*log, {"eval_loss": 1.9, "step": 4}]
    assert evaluations(again, {"eval_loss": 3.1}, 2) == ({"loss": 3.1}, {"loss": 1.9})
    assert evaluations([], {}, None) == ({}, {})


def test_cost_is_counted_from_the_log():
    log = [
        {"loss": 1.0, "ssam/total_passes": 8.0, "ssam/scale": 0.9, "ssam/skipped_steps": 1, "step": 4},
        {"loss": 1.0, "ssam/total_passes": 16.0, "ssam/scale": 1.1, "ssam/skipped_steps": 2, "step": 8},
        {"train_runtime": 30.0, "ssam/total_passes": 18.0, "step": 9},
    ]
    cost = compute_cost(log, get_method("ssam"), 9, PlainRun({}, 12.0, "plain"))
    assert (cost["gradients"], cost["gradients_step"], cost["skipped"]) == (18.0, 9, 3)
    assert (cost["scale"], cost["seconds"], cost["ratio"]) == ((0.9, 1.1), 30.0, 2.5)
    assert compute_cost([], get_method("ssam"), 0, None)["gradients"] is None
    log[-1]["train_resumed_at"] = 8
    resumed = compute_cost(log, get_method("ssam"), 9, PlainRun({}, 12.0, "plain"))
    assert (resumed["resumed_at"], resumed["ratio"], cost["resumed_at"]) == (8, None, None)


def test_sharpness_is_first_and_last():
    log = [{"sharpness/trace": 9.0, "step": 1}, {"loss": 1.0, "step": 2}, {"sharpness/trace": 4.0, "step": 3}]
    row = {"name": "trace", "first": 9.0, "first_step": 1, "last": 4.0, "last_step": 3}
    assert sharpness_rows(log) == [row]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hub_token", "hf_x", "--rho", "0.1"], ["--rho", "0.1"]),
        (["--hub_token=hf_x", "--rho=0.1"], ["--rho=0.1"]),
        (["--hub-token", "hf_x", "--push_to_hub"], ["--push_to_hub"]),
        (["--wandb_api_key", "k", "--token", "t"], []),
        (["--pad_token", "<pad>", "--eos_token=</s>"], ["--pad_token", "<pad>", "--eos_token=</s>"]),
        (["note", "hf_" + "a" * 34], ["note", "HIDDEN"]),
        (["{cwd}/runs/a", "--data={cwd}/b.csv", "/opt/models/bert/"], ["runs/a", "--data=b.csv", "PATH_TO/bert"]),
    ],
)
def test_the_command_has_no_secrets_and_no_paths(given, kept):
    assert cleaned(word.replace("{cwd}", str(Path.cwd())) for word in given) == kept


def test_the_command_is_the_one_that_ran(monkeypatch, tmp_path):
    script = tmp_path / "run.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [str(script), "--rho", "0.1", "--name", "two words"])
    assert repeat_command() == "python run.py --rho 0.1 --name 'two words'"
    assert repeat_command(4) == "accelerate launch --num_processes 4 run.py --rho 0.1 --name 'two words'"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert repeat_command() is None


def test_a_run_without_a_command_shows_its_arguments(monkeypatch, trained):
    run, _, _ = trained
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setattr(run.args, "hub_token", "hf_" + "s" * 34)
    text = card_of(run).text
    assert (
        "optim='ssam'," in text
        and "rho=0.07," in text
        and "optim_args='normalize=false'," in text
        and "base_optim='sgd'," in text
    )
    assert "hub_token" not in text and "ssss" not in text
    code = text.split("```python\n")[-1].split("```")[0]
    compile(code, "card", "exec")


def test_long_commands_have_a_line_for_each_flag():
    words = ["python", "run.py", "--a", "x" * 60, "--b", "y z" * 20]
    assert wrapped(words) == f"python run.py \\\n    --a {'x' * 60} \\\n    --b '{'y z' * 20}'"
    assert wrapped(words[:3]) == "python run.py --a"


def test_cells_cannot_break_a_table():
    assert [cell(v) for v in (None, 0.123456, 6.0, "a|b\nc", 12)] == ["", "0.1235", "6", "a\\|b c", "12"]


def test_arguments_are_the_parents(trained):
    run, _, _ = trained
    run.create_model_card("de", "mit")
    data = ModelCard.load(Path(run.args.output_dir, "README.md")).data
    assert (data.language, data.license) == (["de"], "mit")
    with pytest.raises(TypeError, match="no_such_thing"):
        run.create_model_card(no_such_thing=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, (None, None)),
        ("", (None, None)),
        ("me/base", ("me/base", None)),
        (["me/a", "me/b"], ("me/a", None)),
        ("/data/models/base", (None, "base")),
        ("/home/me/.cache/huggingface/hub/models--me--base/snapshots/0a1b", ("me/base", None)),
        ("/cache/models--bert-base-uncased/snapshots/0a1b", ("bert-base-uncased", None)),
    ],
)
def test_base_model_is_a_name_that_the_hub_takes(name, expected):
    class Model:
        class config:
            _name_or_path = ""

    base = public_base_model(name, Model)
    assert (base["id"], base["folder"]) == expected


def test_other_content_is_told_from_an_earlier_version(trained):
    model = trained[0].model
    bert = {"architectures": ["BertForSequenceClassification"]}
    assert isinstance(model, BertForSequenceClassification)
    assert other_content([".gitattributes", "README.md"], {}, model) is None
    assert other_content(["config.json", "model.safetensors"], bert, model) is None
    assert other_content(["config.json"], {"architectures": ["GPT2Model"]}, model).startswith("GPT2Model, not Bert")
    assert other_content(["adapter_config.json"], {}, model) == "an adapter, not a whole model"
    assert other_content(["training_args.bin", "pytorch_model.bin"], {}, model) is None
    assert "such as a.txt" in other_content(["b.txt", "a.txt"], {}, model)


def test_the_later_command_can_be_typed():
    command = later_command("me/toy", "my run", revision="v1", private=True)
    assert command == "hf upload me/toy 'my run' . --exclude 'checkpoint-*' --exclude '_*' --revision v1 --private"


def test_a_refused_card_is_not_called_a_lost_network():
    assert explain(ValueError("Invalid metadata\nin README.md."), "me/toy") == (
        "The push to me/toy failed (Invalid metadata in README.md.)"
    )
    assert "cannot be reached or broke off (ConnectionResetError); check the network" in explain(
        ConnectionResetError(), "me/toy"
    )


def test_repeat_command_begins_afresh(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    for words in (
        ["--resume_from_checkpoint", "true", "--rho", "0.1"],
        ["--rho", "0.1", "--resume_from_checkpoint=out/checkpoint-2"],
        ["--rho", "0.1", "--resume_from_checkpoint", "true"],
        ["--resume_from_checkpoint", "--rho", "0.1"],
    ):
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        assert repeat_command().endswith("train.py --rho 0.1")


def test_card_has_data_labels_and_a_pipeline(tmp_path):
    run = trainer(arguments(tmp_path / "run"))
    run.model.config.id2label = {0: "good", 1: "b|ad"}
    card = card_of(run)
    assert card.data.pipeline_tag == "text-classification"
    assert f"- {len(run.train_dataset)} examples to train on, {len(run.eval_dataset)} to evaluate on" in card.text
    assert "- 2 classes: `good`, <code>b\\|ad</code>" in card.text
    assert "\n```\n\nOr in one call:\n\n```python\n" in card.text
    assert "print(pipeline('text-classification', model='run')(\"A sentence to classify.\"))" in card.text


def test_card_of_an_adapter_names_no_folder_as_its_base(tmp_path, trained):
    run, _, _ = trained
    (base := tmp_path / "secret" / "tiny").mkdir(parents=True)
    run.model.save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    adapted = trainer(arguments(tmp_path / "adapted"))
    adapted.model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    (tmp_path / "adapted").mkdir(exist_ok=True)
    adapted.model.save_pretrained(tmp_path / "adapted")  # writes a card with the tag `base_model:adapter:PATH`
    card = card_of(adapted)
    assert "secret" not in card.content and "base_model" not in card.content
    adapted.card_base_model = "me/bert-tiny"
    adapted.model.save_pretrained(tmp_path / "adapted")
    named = card_of(adapted)
    assert "secret" not in named.content and named.data.base_model == "me/bert-tiny"
    assert "base_model:adapter:me/bert-tiny" in named.data.tags
