"""`--optim ssam` by every route a user has, and every bad value refused with its name and the way out."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ssam import METHODS, SSAMArgumentsMixin, SSAMSeq2SeqTrainingArguments, SSAMTrainer, SSAMTrainingArguments
from hf_ssam.methods.options import parse_optim_args
from hf_ssam.trainer.optimizer_names import optim_help
from tests.support.cases import arguments, bert, text_data

GIVEN = {"output_dir": "out", "optim": "sam", "rho": 0.1, "optim_args": "renormalize=true", "use_cpu": True}


def command_line() -> SSAMTrainingArguments:
    flags = [f for k, v in GIVEN.items() for f in (f"--{k}", str(v))]
    return HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(flags)[0]


def from_yaml(tmp_path) -> SSAMTrainingArguments:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(GIVEN))
    return HfArgumentParser(SSAMTrainingArguments).parse_yaml_file(str(tmp_path / "run.yaml"))[0]


def from_json(tmp_path) -> SSAMTrainingArguments:
    (tmp_path / "run.json").write_text(json.dumps(GIVEN))
    return HfArgumentParser(SSAMTrainingArguments).parse_json_file(str(tmp_path / "run.json"))[0]


ROUTES = {
    "command line": lambda tmp_path: command_line(),
    "yaml": from_yaml,
    "json": from_json,
    "python": lambda tmp_path: SSAMTrainingArguments(**GIVEN),
    "replace": lambda tmp_path: dataclasses.replace(SSAMTrainingArguments(**{**GIVEN, "rho": 0.2}), rho=0.1),
    "its own json": lambda tmp_path: HfArgumentParser(SSAMTrainingArguments).parse_dict(
        json.loads(SSAMTrainingArguments(**GIVEN).to_json_string())
    )[0],
    "set_optimizer": lambda tmp_path: dataclasses.replace(
        SSAMTrainingArguments("out", use_cpu=True).set_optimizer("sam"), rho=0.1, optim_args="renormalize=true"
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_keeps_the_method_and_its_base(route, tmp_path):
    args = ROUTES[route](tmp_path)
    assert args.optim == "sam" and args.rho == 0.1
    assert args.base_optim == TrainingArguments.default_optim
    assert args.method().values["renormalize"] is True
    assert args.base_arguments().optim == args.base_optim and args.base_arguments().optim_args is None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_choice_of_the_command_line(name):
    args = HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(["--optim", name, "--use_cpu"])[0]
    assert args.is_sharpness_aware and args.method().name == name


@pytest.mark.parametrize("name", ["sgd", "adamw_torch", "adafactor"])
def test_stock_names_stay_stock(name):
    args = HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(
        ["--optim", name, "--optim_args", "a=1", "--use_cpu"]
    )[0]
    assert not args.is_sharpness_aware
    assert args.optim == OptimizerNames(name) and args.optim_args == "a=1"


MISTYPED = r"optim: there is no `ssma`; did you mean `ssam`[^.]*\?$"


@pytest.mark.parametrize(
    "route",
    [
        lambda: SSAMTrainingArguments("out", optim="ssma"),
        lambda: HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(["--optim", "ssma"]),
        lambda: HfArgumentParser(SSAMTrainingArguments).parse_dict({"optim": "ssma"}),
        lambda: dataclasses.replace(SSAMTrainingArguments("out", use_cpu=True), optim="ssma"),
        lambda: SSAMTrainingArguments("out", use_cpu=True).set_optimizer("ssma"),
    ],
    ids=["python", "command line", "dictionary", "replace", "set_optimizer"],
)
def test_optim_mistyped_names_the_nearest_alone(route):
    with pytest.raises(ValueError, match=MISTYPED) as error:
        route()
    assert "galore" not in str(error.value) and "Methods:" not in str(error.value), "a sentence, not sixty names"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "quite_another"}, r"optim: there is no `quite_another`\. Methods: ssam"),
        ({"optim": "SSAM"}, r"optim: there is no `SSAM`; did you mean `ssam`"),
        ({"optim": "adamw_toch"}, r"there is no `adamw_toch`; did you mean `adamw_torch`"),
        ({"base_optim": "sdg"}, r"base_optim: there is no `sdg`; did you mean `sgd`\? Choose a stock optimizer name"),
        (
            {"base_optim": "sam"},
            "base_optim: `sam` is a method; write optim=sam, with a stock optimizer as base_optim",
        ),
    ],
)
def test_optim_and_base_optim_that_do_not_exist_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SSAMTrainingArguments("out", use_cpu=True, **given)


def test_optim_args_of_the_base_are_shown_their_place():
    with pytest.raises(
        ValueError, match="method `sam` has no option `momentum`; .*of the base optimizer go into base_optim_args"
    ):
        SSAMTrainingArguments("out", optim="sam", optim_args="momentum=0.9", use_cpu=True)


def test_our_fields_beside_a_stock_optimizer_are_said_to_do_nothing():
    with pytest.warns(UserWarning, match="base_optim=sgd, rho=0.1: no effect") as said:
        args = SSAMTrainingArguments("out", optim="adamw_torch", rho=0.1, base_optim="sgd", use_cpu=True)
    assert "no effect with the stock optimizer optim=adamw_torch" in str(said[0].message)
    assert args.optim == OptimizerNames.ADAMW_TORCH


def test_a_stock_optimizer_alone_and_a_method_say_nothing(recwarn):
    SSAMTrainingArguments("out", optim="adamw_torch", optim_args="a=1", sharpness_steps=5, use_cpu=True)
    SSAMTrainingArguments("out", optim="ssam", rho=0.1, base_optim="sgd", use_cpu=True)
    assert not [w for w in recwarn if "no effect" in str(w.message)]


def test_help_survives_a_percent_sign(capsys):
    """argparse formats it, so one `%` in a method's name would end every `--help` in a traceback."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--optim", help=optim_help({"50%s": dataclasses.replace(METHODS["sam"], name="50%s")}))
    parser.print_help()
    assert "`50%s`" in capsys.readouterr().out


def test_the_help_shows_every_method_and_where_its_options_are(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"`{method.name}` (rho {method.rho:g}" in text for method in METHODS.values())
    assert "`hf-ssam method NAME` lists them" in text


def test_the_mixin_makes_a_subclass_a_dataclass_by_itself():
    class Mine(SSAMArgumentsMixin, TrainingArguments):
        temperature: float = 2.0

    args = Mine(output_dir="out", optim="asam", use_cpu=True)
    assert (args.optim, args.temperature) == ("asam", 2.0)
    assert HfArgumentParser(Mine).parse_args_into_dataclasses(["--temperature", "3", "--use_cpu"])[0].temperature == 3


def test_the_seq2seq_arguments_keep_their_own_fields():
    args = SSAMSeq2SeqTrainingArguments("out", predict_with_generate=True, use_cpu=True)
    assert args.optim == "ssam" and args.predict_with_generate


def test_the_base_optimizer_gets_its_own_arguments():
    args = arguments(
        optim="ssam", optim_args="max_scale=2", base_optim="adamw_torch", adam_beta1=0.8, learning_rate=0.3
    )
    trainer = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    group = trainer.create_optimizer().param_groups[0]
    assert group["betas"][0] == 0.8 and group["lr"] == 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rho": -1.0}, "rho: -1.0 is not allowed; choose a finite number from 0"),
        ({"rho": float("nan")}, "rho: nan is not allowed"),
        ({"optim_args": "k=5"}, "method `ssam` has no option `k`; its options are"),
        ({"optim": "looksam", "optim_args": "k=5, k=3"}, "optim_args: `k` is given twice, as 5 and as 3; keep one"),
        ({"optim_args": "max_scale"}, "`max_scale` is not of the form name=value"),
        ({"optim_args": "max_scale=-1"}, "max_scale=-1 is not allowed for method `ssam`; choose a number above 0"),
        ({"optim_args": "normalize=maybe"}, "normalize=maybe is not allowed for method `ssam`; choose true or false"),
        ({"base_optim": "lomo"}, "base_optim: `lomo` steps inside backward"),
        ({"base_optim": "adalomo"}, "base_optim: `adalomo` steps inside backward"),
        ({"base_optim": "galore_adamw_layerwise"}, "steps inside backward"),
        ({"ascent_interval": 0}, "ascent_interval: 0 is not allowed; choose an integer from 1"),
        ({"ascent_start": -1.0}, "ascent_start: -1.0 is not allowed"),
        ({"ascent_start": float("nan")}, "ascent_start: nan is not allowed"),
        ({"sharpness_steps": 0}, "sharpness_steps: 0 is not allowed"),
        ({"rho_scheduler_type": "steps"}, "rho_scheduler_type: `steps` does not exist; choose one of constant"),
        ({"ascent_scope": "local"}, "ascent_scope: `local` does not exist; choose one of global"),
    ],
)
def test_bad_values_are_refused_when_the_arguments_are_made(given, message):
    with pytest.raises(ValueError, match=message):
        SSAMTrainingArguments("out", use_cpu=True, **given)


def test_values_set_later_are_refused_when_training_starts():
    args = arguments(optim="ssam")
    trainer = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    args.rho = -1.0
    with pytest.raises(ValueError, match="rho: -1.0 is not allowed"):
        trainer.train()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, {}), ("", {}), ("k=5,alpha=0.1", {"k": "5", "alpha": "0.1"}), (" a = b ,", {"a": "b"})],
)
def test_options_are_read_as_the_stock_field_writes_them(text, expected):
    assert parse_optim_args(text) == expected
