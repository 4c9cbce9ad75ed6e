"""A method registered outside the package: known by its name wherever a built-in one is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig

from hf_ssam import METHODS, Method, SSAMArgumentsMixin, SSAMTrainer, SSAMTrainingArguments, TwoPass
from hf_ssam.methods import Rules, table
from hf_ssam.methods.options import Option
from hf_ssam.rules.ascent import normalize
from hf_ssam.rules.context import chain
from tests.support.cases import arguments, assert_close, assert_identical, bert, text_data, trained, weights

NAME = "sign_sam"
GIVEN = {"output_dir": "out", "optim": NAME, "optim_args": "power=0.5", "rho": 0.1, "use_cpu": True}


def sign_ascent(power: float):
    """A rule that no built-in method has."""
    return lambda v, context: {n: t.sign() * t.abs() ** power for n, t in v.items()}


def sign_sam() -> Method:
    return Method(
        NAME,
        "SAM along a power of each coordinate of the gradient.",
        lambda power: Rules(ascent=chain(sign_ascent(power), normalize), descent=chain()),
        rho=0.2,
        paper=dataclasses.replace(METHODS["sam"].paper, title="Signs, a paper of our own"),
        options={"power": Option(0.0, "of |g|", 0.0, 1.0)},
    )


@pytest.fixture(autouse=True)
def registered():
    """The method, in the live table for one test."""
    yield table.register_method(sign_sam())
    del table._TABLE[NAME]


@dataclasses.dataclass(repr=False)
class SSAMSFTConfig(SSAMArgumentsMixin, SFTConfig):
    """As a user combines them."""


def from_file(write, read):
    def route(tmp_path):
        path = tmp_path / "run"
        path.write_text(write(GIVEN))
        return read(HfArgumentParser(SSAMTrainingArguments), str(path))[0]

    return route


def command_line(cls: type) -> SSAMArgumentsMixin:
    flags = [word for k, v in GIVEN.items() for word in (f"--{k}", str(v))]
    return HfArgumentParser(cls).parse_args_into_dataclasses(flags)[0]


ROUTES = {
    "python": lambda _: SSAMTrainingArguments(**GIVEN),
    "command line": lambda _: command_line(SSAMTrainingArguments),
    "command line, SFTConfig": lambda _: command_line(SSAMSFTConfig),
    "yaml": from_file(yaml.safe_dump, HfArgumentParser.parse_yaml_file),
    "json": from_file(json.dumps, HfArgumentParser.parse_json_file),
    "replace": lambda _: dataclasses.replace(SSAMTrainingArguments("out", use_cpu=True), **GIVEN),
    "set_optimizer": lambda _: dataclasses.replace(
        SSAMTrainingArguments("out", use_cpu=True).set_optimizer(NAME), rho=0.1, optim_args="power=0.5"
    ),
    "its own json": lambda _: HfArgumentParser(SSAMTrainingArguments).parse_dict(
        json.loads(SSAMTrainingArguments(**GIVEN).to_json_string())
    )[0],
}


@pytest.mark.parametrize("route", ROUTES)
def test_registered_method_is_taken_by_every_route(route, tmp_path):
    args = ROUTES[route](tmp_path)
    assert args.optim == NAME and args.is_sharpness_aware and args.rho == 0.1
    assert args.method().values["power"] == 0.5
    assert args.base_optim == type(args).base_optim


def test_registered_method_is_named_where_a_name_is_wrong():
    with pytest.raises(ValueError, match=r"there is no `sign_sm`; did you mean `sign_sam`"):
        SSAMTrainingArguments("out", optim="sign_sm")


def test_registered_method_equals_its_rules_in_two_pass():
    """Four steps of the Trainer are four of TwoPass with plain SGD; those of another power are not."""
    batches = []

    def collate(rows):
        batches.append(default_data_collator(rows))
        return batches[-1]

    args = arguments(
        optim=NAME, optim_args="power=0.5", base_optim="sgd", rho=0.1, learning_rate=0.5, lr_scheduler_type="constant"
    )
    ours = weights(trained(bert(0.0), args, text_data(), data_collator=collate).model)
    assert_close(by_hand(batches[:4], power=0.5), ours, atol=1e-6)
    other = by_hand(batches[:4], power=0.0)
    assert max((other[n] - ours[n]).abs().max() for n in ours if ours[n].is_floating_point()) > 1e-4


def by_hand(batches: list[dict], power: float) -> dict[str, torch.Tensor]:
    model = bert(0.0).train()
    engine, optimizer = TwoPass(model, NAME, 0.1, power=power), torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches:

        def forward_backward(inputs=batch):
            loss = model(**inputs).loss
            loss.backward()
            return loss

        engine.step(forward_backward)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_registered_method_resumes_bit_for_bit(tmp_path):
    def run(folder, **given):
        return arguments(optim=NAME, output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=2, **given)

    whole = trained(bert(), run("whole"), text_data())
    again = SSAMTrainer(model=bert(), args=run("again"), train_dataset=text_data())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_identical(weights(whole.model), weights(again.model))


def test_registered_method_is_on_the_card(tmp_path):
    args = arguments(optim=NAME, output_dir=str(tmp_path), max_steps=1)
    trained(bert(), args, text_data()).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"`{NAME}`" in card and "Signs, a paper of our own" in card


def test_registered_method_is_refused_by_a_stock_trainer():
    with pytest.raises(ValueError, match=f"unsupported optimizer: {NAME}"):
        Trainer(model=bert(), args=arguments(optim=NAME), train_dataset=text_data()).train()


@pytest.mark.parametrize(("name", "kind"), [(NAME, "method"), ("sam", "method"), ("sgd", "stock optimizer")])
def test_registering_a_name_that_is_taken_is_refused(name, kind):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=f"name: `{name}` is a {kind} already; choose another name"):
        table.register_method(dataclasses.replace(sign_sam(), name=name))
    assert dict(METHODS) == before


def test_stock_arguments_never_know_it():
    with pytest.raises(ValueError, match=NAME):
        TrainingArguments("out", optim=NAME)
