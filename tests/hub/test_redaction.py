"""No secret and no path of the machine is published: on the card, in the command, or in a file that is pushed."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import sentence_transformers
import torch
import trl
from huggingface_hub import ModelCard
from transformers import Seq2SeqTrainingArguments

from hf_ssam import SSAMArgumentsMixin, SSAMTrainingArguments
from hf_ssam.hub.card_facts import changed_arguments
from hf_ssam.hub.command_line import repeat_command
from hf_ssam.hub.redaction import HIDDEN, cleaned, is_secret, pickled_without_secrets, public
from tests.support.hub_client import Client
from tests.support.hub_run import trainer
from tests.support.hub_server import TOKEN, HubStandIn

SECRET_NAMES = (
    "HF_TOKEN WANDB_API_KEY api_token neptune_api_token github_token secret_key aws_secret_access_key passwd "
    "credentials auth hub_token wandb_api_key password token access-token apiKey hubToken OPENAI_API_KEY key "
    "AWS_ACCESS_KEY_ID trainer.hub_token authorization client_secret private_key db_pass bearer oauth2 hftoken "
    "auth_tokens HF_TOKEN_READ github_pat jwt cookie slack_webhook SMTP_PWD pad_token_secret"
).split()
HARMLESS_NAMES = (
    "tokenizer tokenizer_name use_fast_tokenizer max_new_tokens max_tokens average_tokens_across_devices pad_token "
    "eos_token pad_token_id include_num_input_tokens_seen decoder_start_token_id token_type_ids num_key_value_heads "
    "label_key text_key token_classification image_token_index tokens_per_second author two_pass passes key_column "
    "dataloader_pin_memory compass project session hub_model_id hub_private_repo monkey per_token_loss mask_token_prob"
).split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names_are_known_in_every_spelling(name):
    assert all(is_secret(spelled) for spelled in (name, name.upper(), name.lower(), f"--{name.replace('_', '-')}"))


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_harmless_names_stay(name):
    assert not is_secret(name) and not is_secret(name.upper())


def test_fields_of_real_arguments_hold_one_secret():
    """The configurations of the installed libraries, every field of them."""
    kinds = [
        Seq2SeqTrainingArguments,
        sentence_transformers.SentenceTransformerTrainingArguments,
        SSAMTrainingArguments,
    ]
    kinds += [trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig, trl.ModelConfig, trl.ScriptArguments]
    names = {field.name for kind in kinds for field in fields(kind)}
    assert len(names) > 200 and {"eos_token", "pad_token", "average_tokens_across_devices"} <= names
    assert {name for name in names if is_secret(name)} == {"hub_token"}


SECRET_WORDS = [
    "--{}\0tellnoone",
    "--{}=tellnoone",
    "--{}\0tellnoone\0tellnoone2",
    "--{}\0-tellnoone",
    "--{}\0two tellnoone words",
    "-{}\0tellnoone",
    "{}=tellnoone",
    "+run.{}=tellnoone",
    '--kwargs\0{{"{}": "tellnoone", "lr": 1}}',
    '--kwargs\0{{"a": [{{"{}": {{"x": "tellnoone"}}}}]}}',
    "--kwargs\0{{'{}': 'tellnoone'}}",
    "--kwargs\0{{{}: tellnoone, lr: 1}}",
    "--kwargs\0lr=1,{}=tellnoone",
    "--kwargs={}=tellnoone,lr=1",
    "--kwargs\0{}=x,tellnoone,lr=1",
    '--kwargs\0{}="x"tellnoone',
    "--kwargs\0lr=1;{}: tellnoone and more",
    "--launcher_args\0--{} tellnoone --lr 1",
    '--launcher_args\0["--{}", "tellnoone"]',
    'nested="{{\\"{}\\": \\"tellnoone\\"}}"',
    "--url\0https://host.org/x?a=1&{}=tellnoone&b=2",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_values_leave_the_command(name):
    for form in SECRET_WORDS:
        kept = cleaned(["run.py", *form.format(name).split("\0"), "--rho", "0.1"])
        assert "tellnoone" not in " ".join(kept), form
        assert kept[0] == "run.py" and kept[-2:] == ["--rho", "0.1"], form


@pytest.mark.parametrize(
    "word",
    [
        "hf_" + "a1" * 17,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "glpat-" + "a1" * 10,
        "sk-" + "a1" * 20,
        "sk-ant-api03-" + "a1" * 20,
        "AKIA" + "A1" * 8,
        "xoxb-1234567890-abcdefghij",
        "AIza" + "a1" * 18,
        "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\na1a1\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_tokens_are_known_by_their_form(word):
    assert public(word) == HIDDEN
    assert public(f"notes: {word}").endswith(HIDDEN)
    assert cleaned(["--note", f"x={word}"]) == ["--note", f"x={HIDDEN}"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://user:pass@host.org/x", "https://host.org/x"),
        ("https://user@host.org", "https://host.org"),
        ("https://user:pa@ss@host.org", "https://host.org"),
        ("https://user:pa/ss@host.org/x", "https://host.org/x"),
        ("--uri=postgresql://me:pass@db:5432/runs", "--uri=postgresql://db:5432/runs"),
        ("a=https://u:pass@h.org,b=https://v:pass@h.org", "a=https://h.org,b=https://h.org"),
        ("user:pass@proxy.org:3128", "proxy.org:3128"),
        ("git+https://github.com/me/code@v1.0", "git+https://github.com/me/code@v1.0"),
        ("http://localhost:8080/a@v1", "http://localhost:8080/a@v1"),
        ("me@host.org", "me@host.org"),
    ],
)
def test_urls_lose_their_userinfo(given, kept):
    assert cleaned([given]) == [kept]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/home/me/x.csv", "PATH_TO/x.csv"),
        ("/opt/models/bert/", "PATH_TO/bert"),
        ("/home/me/my data/x.csv", "PATH_TO/x.csv"),
        ("/home/me (old)/x.csv", "PATH_TO/x.csv"),
        ("data=/home/me/x.csv", "data=PATH_TO/x.csv"),
        ("--data=/home/me/x.csv", "--data=PATH_TO/x.csv"),
        ("/home/me/a.csv,/home/you/b.csv", "PATH_TO/a.csv,PATH_TO/b.csv"),
        ("/home/me/a.csv,rel/b.csv", "PATH_TO/a.csv,rel/b.csv"),
        ("train=/home/me/a b/c.csv,test=/srv/d.csv", "train=PATH_TO/c.csv,test=PATH_TO/d.csv"),
        ("/home/me/a:/home/me/b", "PATH_TO/a:PATH_TO/b"),
        ('{"train": "/home/me/x.csv"}', '{"train": "PATH_TO/x.csv"}'),
        ("[/home/me/x,/home/me/y]", "[PATH_TO/x,PATH_TO/y]"),
        ("file:///home/me/x.csv", "file://PATH_TO/x.csv"),
        ("sqlite:////home/me/x.db", "sqlite:///PATH_TO/x.db"),
        ("@/home/me/args.txt", "@PATH_TO/args.txt"),
        ("-I/home/me/lib", "-IPATH_TO/lib"),
        (r"C:\Users\me\x.csv", "PATH_TO/x.csv"),
        (r"data=C:\Users\me\x.csv", "data=PATH_TO/x.csv"),
        ("{cwd}", "."),
        ("{cwd}/runs/a", "runs/a"),
        ("data={cwd}/b.csv,{cwd}/c.csv", "data=b.csv,c.csv"),
        ("https://host.org/a/b/c", "https://host.org/a/b/c"),
        ("me/model", "me/model"),
        ("</s>", "</s>"),
        ("[/INST]", "[/INST]"),
        (".*/weight/.*", ".*/weight/.*"),
        ("../data/x.csv", "../data/x.csv"),
        ('{"lr":1}', '{"lr":1}'),
        ("k=5,alpha=0.1", "k=5,alpha=0.1"),
    ],
)
def test_paths_of_the_machine_are_cut_to_the_name(given, kept):
    assert cleaned([given.replace("{cwd}", str(Path.cwd()))]) == [kept]


def test_paths_in_the_root_folder_keep_their_slashes(monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/")
    assert cleaned(["a/b", "https://h.org/x", "/home/me/x.csv"]) == ["a/b", "https://h.org/x", "PATH_TO/x.csv"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            '{"api_key": "tellnoone", "ü": [1, {"u": "https://a:b@h.org"}]}',
            '{"api_key": "HIDDEN", "ü": [1, {"u": "https://h.org"}]}',
        ),
        ("{'/home/me/x': ('/home/me/y', 2), 'pad_token': 'p'}", "{'PATH_TO/x': ('PATH_TO/y', 2), 'pad_token': 'p'}"),
        ("k=5,api_key=tellnoone,alpha=0.1", "k=5,api_key=HIDDEN,alpha=0.1"),
        ('{"lr":1}', '{"lr":1}'),
        ('{"password": "tellnoone", "password": "HIDDEN"}', '{"password": HIDDEN, "password": HIDDEN}'),
        ("--data /home/me/x.csv --api_key tellnoone --lr 1", "--data PATH_TO/x.csv --api_key HIDDEN --lr 1"),
        ("--password tellnoone=1", "--password HIDDEN"),
    ],
)
def test_words_with_a_structure_keep_it(given, kept):
    assert public(given) == kept
    assert cleaned(["--kwargs", given]) == ["--kwargs", kept]


def test_harmless_words_are_left_as_they_are():
    words = ["--pad_token", "<pad>", "--max_new_tokens=5", "--label_key", "y", "--optim_args", "k=5,alpha=0.1"]
    words += ["--learning_rate", "-1e-3", "--note", "two words", "task-classification-of-questions-by-type"]
    assert cleaned(words) == words
    assert cleaned(["--hub_token=tellnoone", "config.yaml", "--password", "-p", "1"]) == ["config.yaml", "-p", "1"]


def test_abbreviated_flags_are_known_by_the_value(monkeypatch, tmp_path):
    """argparse takes `--wandb_api_k` for `--wandb_api_key`: no name tells that it is a secret."""
    (script := tmp_path / "run.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [str(script), "--wan", "tellnoone", "--note=x:tellnoone", "--rho", "0.1"])
    assert repeat_command(1, ["tellnoone"]) == f"python run.py --wan {HIDDEN} --note=x:{HIDDEN} --rho 0.1"


def test_arguments_of_a_subclass_keep_their_secrets(tmp_path):
    class Config(SSAMArgumentsMixin, trl.SFTConfig):
        wandb_api_key: str | None = None
        password: str | None = None

    secrets = {"wandb_api_key": "tellnoone", "password": "tellnoone", "hub_token": "tellnoone"}
    secrets["model_init_kwargs"] = {"token": "tellnoone", "dtype": "float32"}
    args = Config(output_dir=str(tmp_path / "run"), eos_token="<end>", use_cpu=True, bf16=False, **secrets)
    shown = changed_arguments(args)
    assert shown["eos_token"] == "'<end>'" and shown["output_dir"] == "'PATH_TO/run'"
    assert not secrets.keys() & shown.keys()
    assert "tellnoone" not in args.to_json_string() + str(args.to_sanitized_dict())
    assert args.to_dict()["model_init_kwargs"] == {"token": "<TOKEN>", "dtype": "float32"}


def test_fields_of_the_card_are_public(tmp_path, monkeypatch):
    """In a session without a command, the arguments themselves are shown."""
    monkeypatch.setattr("hf_ssam.hub.model_card.repeat_command", lambda *a: None)
    place, url = "/home/tellnoone/x", "https://me:tellnoone@host.org"
    free = {"base_optim_args": "api_key=tellnoone", "perturb": place, "run_name": f"at {place}", "project": url}
    run = trainer(SSAMTrainingArguments(str(tmp_path / "tellnoone" / "run"), use_cpu=True, report_to="none", **free))
    run.create_model_card(dataset=[url, place], dataset_tags=place, model_name=place, finetuned_from=url)
    card = Path(run.args.output_dir, "README.md").read_text()
    assert "tellnoone" not in card
    assert "# PATH_TO/x\n" in card
    assert "on https://host.org and PATH_TO/x with" in card
    assert f"base_optim_args='api_key={HIDDEN}'," in card and "project='https://host.org'," in card
    assert f"`api_key={HIDDEN}`" in card and "run_name='at PATH_TO/x'," in card
    assert ModelCard(card).data.datasets == ["PATH_TO/x"]


def test_pickled_arguments_keep_all_but_the_secrets(tmp_path):
    urls = {"vllm_server_base_url": "https://me:tellnoone@host.org"}
    args = trl.GRPOConfig(str(tmp_path), hub_token="tellnoone", use_cpu=True, bf16=False, **urls)
    args.model_init_kwargs = {"token": "tellnoone", "dtype": "float32"}
    with pickled_without_secrets(args), pickled_without_secrets(args):
        pass
    assert b"tellnoone" in pickle.dumps(args)
    with pickled_without_secrets(args):
        with pickled_without_secrets(args):
            pass
        torch.save(args, tmp_path / "args.bin")
    assert b"tellnoone" not in (tmp_path / "args.bin").read_bytes()
    found = torch.load(tmp_path / "args.bin", weights_only=False)
    assert type(found) is trl.GRPOConfig and found.hub_token is None
    changed = {name for name, value in vars(args).items() if getattr(found, name) != value}
    assert changed <= {"hub_token", "model_init_kwargs", "vllm_server_base_url", "distributed_state"}
    assert found.vllm_server_base_url == "https://host.org" and found.model_init_kwargs["dtype"] == "float32"
    assert copy.deepcopy(args).hub_token == args.hub_token == "tellnoone"


@pytest.mark.slow
def test_nothing_that_is_pushed_holds_a_secret(tmp_path):
    """A real script, every flag at once: the card, the event files, the pickled arguments, the checkpoints."""
    names = ["HF_TOKEN", "WANDB_API_KEY", "api_token", "neptune_api_token", "github_token", "secret_key", "auth"]
    names += ["aws_secret_access_key", "passwd", "credentials", "password"]
    flags = [word for name in names for word in (f"--{name}", f"tellnoone-{name}")]
    flags += ["--hub_token", TOKEN, "--wandb_api_k", "tellnoone-abbreviated", "hub_token=tellnoone", "x"]
    flags += ["HF_TOKEN=tellnoone", "--tracking_uri", "https://user:tellnoone@host.org/x"]
    flags += ["--tracker_kwargs", '{"api_key": "tellnoone", "group": "a"}']
    flags += ["--data_files", f"{tmp_path}/elsewhere/a.csv,{tmp_path}/elsewhere/b.csv"]
    flags += ["--pad_token", "<pad>", "--max_new_tokens", "5"]
    run = ["--output_dir", "toy", "--use_cpu", "--disable_tqdm", "True", "--report_to", "tensorboard"]
    run += ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--push_to_hub", "--hub_always_push"]
    run += ["--hub_strategy", "all_checkpoints"]
    (home := tmp_path / "home").mkdir()
    with HubStandIn() as hub:
        client = Client(hub, home, token=None)
        done = client.script(*run, *flags, program="secret_run.py")
        assert done.returncode == 0, done.stderr[-2000:]
        pushed = dict(hub.repos["tester/toy"].files)
    assert {"README.md", "training_args.bin", "checkpoint-1/training_args.bin"} <= set(pushed)
    assert any(".tfevents." in name for name in pushed)
    for secret in (b"tellnoone", TOKEN.encode(), b"elsewhere"):
        assert [name for name, data in pushed.items() if secret in data] == []
    text = ModelCard(pushed["README.md"].decode()).text.replace(" \\\n    ", " ")
    assert "--data_files PATH_TO/a.csv,PATH_TO/b.csv" in text and "--tracking_uri https://host.org/x" in text
    assert "--pad_token '<pad>' --max_new_tokens 5" in text and f"hub_token={HIDDEN} x HF_TOKEN={HIDDEN}" in text
