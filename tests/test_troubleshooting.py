"""Every message that the troubleshooting guide lists is one that a user gets: each is provoked, and compared."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from torch import nn

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.hub import push
from hf_ssam.hub.card_file import rewrite_card
from hf_ssam.run_folder import read_run
from hf_ssam.saved.files import read_file, read_folder
from hf_ssam.saved.models import named_data, pretrained
from hf_ssam.trainer import checks
from hf_ssam.trainer.ascent_rise import too_far
from hf_ssam.trainer.checkpoints import STATE_FILE, Settings, load_state, save_state
from support import fetching, plan, sources, text_data
from support.lora import LoraArguments, adapter
from tests.support.cases import arguments, bert, trained
from tests.support.cases import text_data as rows

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "examples" / "guides" / "troubleshooting.md"
SPAN = r"(?:``(.+?)``|`([^`]+)`)"


def listed() -> list[str]:
    """The messages of the guide: the first cells that are code and nothing else."""
    cells = [line[2:].split(" | ")[0] for line in GUIDE.read_text().splitlines() if line.startswith("| ")]
    whole = [cell for cell in cells if re.fullmatch(rf"{SPAN}(, {SPAN})*", cell)]
    return ["".join(found) for cell in whole for found in re.findall(SPAN, cell)]


def pattern(message: str) -> str:
    return ".+?".join(map(re.escape, message.split("…")))


PROVOKED: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {}


def by(*messages: str) -> Callable:
    """The function below provokes each of these messages of the guide."""

    def enter(function: Callable) -> Callable:
        PROVOKED.update(dict.fromkeys(messages, function))
        return function

    return enter


def said(provoke: Callable, place: Path, patch: pytest.MonkeyPatch) -> str:
    """What it raises, warns of, or returns in words."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            words = str(provoke(place, patch))
        except Exception as error:
            words = str(error)
    return " ".join([words, *(str(warning.message) for warning in seen)])


def test_guide_lists_what_is_provoked_here_and_nothing_else():
    assert sorted(listed()) == sorted(PROVOKED)


def ended(*command: object, **given: object) -> str:
    """What a command that fails says on standard error."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **given)
    assert done.returncode
    return done.stderr


# Installing


@by("Could not find a version that satisfies the requirement hf-ssam")
def no_index(place, patch):
    command = (sys.executable, "-m", "pip", "download", "--no-index", "--no-deps", "hf-ssam")
    return ended(*command, cwd=place)


@by("hf_ssam.sharpness needs scipy")
def no_scipy(place, patch):
    code = "import sys; sys.modules['scipy'] = None; import hf_ssam.sharpness"
    return ended(sys.executable, "-c", code, cwd=ROOT)


@by("figures need matplotlib")
def no_matplotlib(place, patch):
    code = "import sys; sys.modules['matplotlib'] = None; from hf_ssam.cli import main; sys.exit(main(['plot', 'x']))"
    return ended(sys.executable, "-c", code, cwd=ROOT)


@by("--lora_r needs peft")
def no_peft(place, patch):
    patch.setitem(sys.modules, "peft", None)
    adapter(LoraArguments(lora_r=8))


@by("No module named 'support'")
def script_alone(place, patch):
    patch.delenv("PYTHONPATH", raising=False)
    copied = shutil.copy(ROOT / "examples" / "suggest_rho.py", place)
    return ended(sys.executable, "-P", copied, cwd=place)


@by("could not be fetched: check that pip reaches a package index")
def nothing_fetched(place, patch):
    patch.setenv("HF_SSAM_CACHE", str(place))
    patch.setenv("PIP_NO_INDEX", "1")
    fetching.fetch(fetching.Package("no-such-package", "1.0", "0" * 64, "x"))


@by("Failed to load CPU gemm_4bit_forward from kernels-community")
def slow_4_bit_layers(place, patch):
    """Another package's, on CPUs of one kind: its text is looked up where it is written."""
    package = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    return (package / "backends" / "cpu" / "ops.py").read_text()


# Data


def text_of(**columns: list) -> DatasetDict:
    return DatasetDict(train=Dataset.from_dict(columns))


@by("there is no file …")
def no_file(place, patch):
    read_file(place / "train.csv")


@by("is of no known kind: give a file that ends in .csv")
def spreadsheet(place, patch):
    (place / "train.xlsx").write_bytes(b"x")
    read_file(place / "train.xlsx")


@by("could not be read as csv ('utf-8' codec …): save it as UTF-8")
def latin_1(place, patch):
    (place / "train.csv").write_bytes("text,label\nélan,a\n".encode("latin-1"))
    read_file(place / "train.csv")


@by("has several text columns …: name the one or two to use with --text_column_names")
def several_columns(place, patch):
    text_data.text_columns(text_of(title=["a"], body=["b"], label=[0]), text_data.TextArguments())


@by("has no label column 'label'")
def no_labels(place, patch):
    text_data.trained_names(text_of(text=["a"], topic=["b"]), text_data.TextArguments())


@by("has the label 'c', which … never has")
def unknown_label(place, patch):
    data, args = text_of(text=["x", "y"], label=["a", "b"]), text_data.TextArguments()
    data["validation"] = Dataset.from_dict({"text": ["z"], "label": ["c"]})
    names, unknown = text_data.trained_names(data, args)
    text_data.number_labels({"eval": data["validation"]}, data, args, names, unknown)


@by("has nothing in column …")
def empty_cell(place, patch):
    text_data.text_columns(text_of(text=["a", ""], label=[0, 1]), text_data.TextArguments())


@by("holds no images")
def no_images(place, patch):
    (place / "cat").mkdir()
    read_folder(place, least=2)


@by("there is nothing to eval on")
def nothing_to_evaluate_on(place, patch):
    asked = plan.Plan(needs=frozenset({"train", "eval"}), takes=frozenset(), checkpoint=None)
    sources.uses(text_of(text=["a"], label=[0]), sources.FileArguments(), asked)


@by("is neither a local folder nor to be had from the Hub")
def misspelt_model(place, patch):
    from transformers import AutoConfig

    pretrained(AutoConfig, str(place / "brt-base"))


# Starting and resuming


@by("--output_dir … holds another run")
def same_folder(place, patch):
    (place / "trainer_state.json").write_text("{}")
    plan.prepare(arguments(output_dir=str(place)))


@by("--resume_from_checkpoint true: there is no checkpoint")
def nothing_to_resume(place, patch):
    plan.prepare(arguments(output_dir=str(place), resume_from_checkpoint="true"))


@by("resume_from_checkpoint: … is half-written")
def half_a_checkpoint(place, patch):
    (place / "checkpoint-2").mkdir()
    trainer = SSAMTrainer(bert(), arguments(output_dir=str(place)), train_dataset=rows(8))
    trainer.train(resume_from_checkpoint=str(place / "checkpoint-2"))


@by("has format 1, written by an earlier version of hf_ssam")
def old_checkpoint(place, patch):
    (place / STATE_FILE).write_text(json.dumps({"method": "ssam"}))
    load_state(place, {})


@by("holds vectors of shape … which this model does not train")
def checkpoint_of_another_model(place, patch):
    state = {"memory": {"ema": {"weight": torch.ones(2)}}, "steps": 1, "elapsed": 1}
    save_state(place, Settings("vasso", {}, 0.1, "global"), state, True, 2.0)
    load_state(place, {})


@by("there is no `ssma`; did you mean `ssam`?")
def misspelt_method(place, patch):
    arguments(optim="ssma")


@by("method `sam` has no option `k`; its options are")
def foreign_option(place, patch):
    arguments(optim="sam", optim_args="k=5")


@by("rho=0.1: no effect with the stock optimizer")
def idle_flag(place, patch):
    arguments(optim="adamw_torch", rho=0.1)


@by("wraps an optimizer to take two steps of its own")
def wrapped_optimizer(place, patch):
    class SAM(torch.optim.SGD):
        pass

    checks.refuse_optimizer(SAM(bert().parameters(), lr=0.1))


@by("has a hook that runs after each backward")
def step_in_backward(place, patch):
    model = bert()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    SSAMTrainer(model, arguments(), train_dataset=rows(8))


# While it trains


@by("rho=… may be too large: over the first 20 perturbed steps")
def too_large(place, patch):
    return too_far(0.9, 20, 0.05)


@by("rho=… is below what bfloat16 weights resolve")
def coarse_weights(place, patch):
    model = nn.Linear(8, 8).bfloat16()
    TwoPass(model, method="sam", rho=1e-4).step(backward_of(model))


@by("takes num_items_in_batch but its loss ignores it")
def mean_loss(place, patch):
    trained(bert(), arguments(max_steps=1, gradient_accumulation_steps=2), rows(16))


@by("fp16=True has no effect on this device")
def fp16_without_a_gpu(place, patch):
    SSAMTrainer(bert(), arguments(fp16=True), train_dataset=rows(8))


@by("GRPOTrainer cannot train with two passes")
def generates(place, patch):
    checks.refuse_host(type("GRPOTrainer", (), {}))


def launched(**given: object) -> SimpleNamespace:
    """As much of a Trainer as its launch is judged by."""
    plugin = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, state=plugin)
    args = SimpleNamespace(optim="ssam", n_gpu=given.pop("n_gpu", 1))
    defaults = {"is_model_parallel": False, "is_fsdp_enabled": False}
    return SimpleNamespace(args=args, accelerator=accelerator, **{**defaults, **given})


@by("does not support nn.DataParallel")
def several_gpus_in_a_process(place, patch):
    checks.refuse_launch(launched(n_gpu=2))


@by("does not support FSDP version 1")
def flat_parameters(place, patch):
    checks.refuse_launch(launched(is_fsdp_enabled=True))


def backward_of(model: nn.Linear) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        loss = model(torch.ones(2, 8, dtype=model.weight.dtype)).square().mean()
        loss.backward()
        return loss.detach()

    return run


@by("a gradient is left from before")
def gradient_left(place, patch):
    model = nn.Linear(8, 8)
    backward_of(model)()
    TwoPass(model, method="sam").step(backward_of(model))


@by("requires a gradient and did not when the engine was built")
def unfrozen(place, patch):
    model = nn.Linear(8, 8)
    model.bias.requires_grad_(False)
    two_pass = TwoPass(model, method="sam")
    model.bias.requires_grad_(True)
    two_pass.step(backward_of(model))


@by("needs the loss of each sample")
def loss_of_the_batch_alone(place, patch):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].square().mean()

    trained(bert(), arguments(optim="esam"), rows(8), compute_loss_func=loss)


# Looking at a run


@by("there is no trainer_state.json in it")
def no_run(place, patch):
    read_run(place)


@by("there is no _card.json in it")
def no_card(place, patch):
    rewrite_card(place)


@by("nothing says what … was trained on")
def no_data(place, patch):
    named_data("my-model", None, argparse.Namespace(data=None, dataset_name=None, split=None))


# Pushing


@by("the Hub wants a token and there is none")
def no_token(place, patch):
    patch.setattr(push, "get_token", lambda: None)
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return push.explain(HfHubHTTPError("", response=httpx.Response(401, request=request)), "me/model")


@by("is not a name that the Hub allows")
def bad_name(place, patch):
    return push.explain(HFValidationError(), "me/my model")


@by("the Hub is switched off by HF_HUB_OFFLINE", "Nothing is lost: the model is in …; push it later with: hf upload")
def offline(place, patch):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = arguments(output_dir=str(place), hub_model_id="me/model", hub_token="hf_x")
    SSAMTrainer(bert(), args, train_dataset=rows(8)).push_to_hub()


# What is asked of all of them, once they are entered


@pytest.mark.parametrize("message", sorted(PROVOKED))
def test_message_of_the_guide_is_what_a_user_gets(message, tmp_path, monkeypatch):
    assert re.search(pattern(message), said(PROVOKED[message], tmp_path, monkeypatch))
