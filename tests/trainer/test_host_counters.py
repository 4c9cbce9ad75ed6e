"""Every trainer of TRL and Sentence Transformers: refused, or its log is the stock one's (law 6).

At a radius too small to change any weight the second pass sees what the first saw: a counter that counts both shows in
the log, and so does one that the second pass reads.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sentence_transformers
import torch
import trl
import trl.experimental
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from torch import nn
from transformers import GPT2ForSequenceClassification, Trainer, set_seed
from transformers.utils import logging as transformers_logging

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin
from hf_ssam.trainer.checks import refuse_host
from tests.support.cases import arguments, assert_identical, gpt2, lm_data, weights
from tests.trainer.test_hosts import encoder_folder, entries, pairs, tokenizer  # noqa: F401

TINY = 1e-30


def sentence(start: int, n: int) -> str:
    return " ".join(f"w{5 + (start + i) % 30}" for i in range(n))


def preferences(n: int = 16, **more: Callable[[int], Any]) -> Dataset:
    columns = {
        "prompt": [sentence(i, 3) for i in range(n)],
        "chosen": [" " + sentence(2 * i, 2 + i % 3) for i in range(n)],
        "rejected": [" " + sentence(7 * i, 3) for i in range(n)],
    }
    return Dataset.from_dict({**columns, **{name: [column(i) for i in range(n)] for name, column in more.items()}})


def unpaired(n: int = 16) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [sentence(i, 3) for i in range(n)],
            "completion": [" " + sentence(2 * i, 2 + i % 3) for i in range(n)],
            "label": [i % 3 > 0 for i in range(n)],
        }
    )


def texts(n: int = 16) -> Dataset:
    return Dataset.from_list([{k: row[k].tolist() for k in ("input_ids", "labels")} for row in lm_data(n)])


def scorer() -> GPT2ForSequenceClassification:
    set_seed(1)
    config = gpt2(dropout=0.1).config
    config.num_labels, config.pad_token_id = 1, 0
    return GPT2ForSequenceClassification(config)


def experimental(name: str) -> Any:
    return importlib.import_module(f"trl.experimental.{name}")


# By the trainer's name: its module, its arguments' name, the model, the data.
TRL = {
    "SFTTrainer": (trl, "SFTConfig", lambda: gpt2(dropout=0.1), texts),
    "DPOTrainer": (trl, "DPOConfig", lambda: gpt2(dropout=0.1), preferences),
    "KTOTrainer": (trl, "KTOConfig", lambda: gpt2(dropout=0.1), unpaired),
    "RewardTrainer": (trl, "RewardConfig", scorer, preferences),
    "CPOTrainer": (experimental("cpo"), "CPOConfig", lambda: gpt2(dropout=0.1), preferences),
    "ORPOTrainer": (experimental("orpo"), "ORPOConfig", lambda: gpt2(dropout=0.1), preferences),
    "TPOTrainer": (
        experimental("tpo"),
        "TPOConfig",
        lambda: gpt2(dropout=0.1),
        lambda: preferences(reference=lambda i: " " + sentence(3 * i, 3)),
    ),
}


def with_ssam(trainer: type, config: type) -> tuple[type, type]:
    return (
        type(f"SSAM{trainer.__name__}", (SSAMTrainerMixin, trainer), {}),
        type(f"SSAM{config.__name__}", (SSAMArgumentsMixin, config), {}),
    )


def logged(trainer: Trainer, *left_out: str) -> list[dict[str, Any]]:
    """The log without the clock and our own entries, and without operations, which are counted twice on purpose."""
    return [{k: v for k, v in e.items() if k not in ("total_flos", *left_out)} for e in entries(trainer)]


def assert_logs_of_the_stock_trainer(run: Callable[..., Trainer], trainer: type, config: type) -> None:
    """Four steps at a radius of nothing: each entry, each weight. One step far away: what the first pass counted."""
    mine = with_ssam(trainer, config)
    stock = run(trainer, config, optim="sgd", max_steps=4)
    ours = run(*mine, optim="sam", rho=TINY, base_optim="sgd", max_steps=4)
    assert logged(ours) == logged(stock)
    assert_identical(weights(ours.model), weights(stock.model))
    stock = run(trainer, config, optim="sgd", max_steps=1, logging_steps=1)
    far = run(*mine, optim="sam", rho=2.0, base_optim="sgd", max_steps=1, logging_steps=1)
    assert far.state.log_history[0]["ssam/ascent_loss"] != far.state.log_history[0]["ssam/loss"]
    assert logged(far, "grad_norm")[0] == logged(stock, "grad_norm")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL)
def test_trl_logs_are_those_of_the_stock_trainer(name: str):
    module, config, model, data = TRL[name]
    reference = {"ref_model": gpt2()} if name in ("DPOTrainer", "KTOTrainer") else {}

    def run(trainer: type, config: type, **given: Any) -> Trainer:
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
        args = arguments(
            config, **{"bf16": False, "max_length": 12, "logging_steps": 2, **split, **evaluated, **given}
        )
        rows = {"train_dataset": data(), "eval_dataset": data()}
        host = trainer(model=model(), args=args, processing_class=tokenizer(), **rows, **reference)
        host.train()
        return host

    assert_logs_of_the_stock_trainer(run, getattr(module, name), getattr(module, config))


class NamedParts(nn.Module):
    """Any loss, its value under two names."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        value = self.loss(*args, **kwargs)
        return {"first": 0.25 * value, "second": 0.75 * value}


def test_multi_vector_encoder_logs_are_those_of_the_stock_trainer(encoder_folder: str):  # noqa: F811
    def run(trainer: type, config: type, **given: Any) -> Trainer:
        set_seed(1)
        model = MultiVectorEncoder(encoder_folder, device="cpu")
        host = trainer(
            model=model,
            args=arguments(config, **{"logging_steps": 2, **given}),
            train_dataset=pairs().remove_columns("label"),
            loss=NamedParts(MultiVectorMultipleNegativesRankingLoss(model)),
        )
        host.train()
        assert "first" in host.state.log_history[0]
        return host

    assert_logs_of_the_stock_trainer(
        run,
        sentence_transformers.MultiVectorEncoderTrainer,
        sentence_transformers.MultiVectorEncoderTrainingArguments,
    )


def trainers_of(package: Any) -> Iterator[type[Trainer]]:
    """Every trainer that the modules of `package` define."""
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if info.name.rpartition(".")[2].endswith("trainer"):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, Trainer) and value.__module__ == info.name:
                    yield value


def is_refused(trainer: type) -> bool:
    try:
        refuse_host(trainer)
    except NotImplementedError:
        return True
    return False


SENTENCES = (
    "SentenceTransformerTrainer",
    "CrossEncoderTrainer",
    "SparseEncoderTrainer",
    "MultiVectorEncoderTrainer",
)


@pytest.mark.parametrize("package, trained", [(trl, tuple(TRL)), (sentence_transformers, SENTENCES)])
def test_every_trainer_of_a_library_is_trained_here_or_refused(package: Any, trained: tuple[str, ...]):
    transformers_logging.set_verbosity_error()
    found = {t.__name__: t for t in trainers_of(package) if t.__name__ not in ("_BaseTrainer", "BaseTrainer")}
    assert set(trained) <= found.keys()
    assert {name for name, t in found.items() if not is_refused(t)} == set(trained)
