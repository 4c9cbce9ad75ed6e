"""What every method is put through: small models from a config, data that needs no network, runs of a few steps.

A method is a row of `CASES`; a test that takes `case` runs for each. A new method adds its row here and is tested by
everything that is there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_ssam import METHODS, SSAMTrainer, SSAMTrainingArguments, get_method


@dataclass(frozen=True)
class Case:
    """A method with options, as a user would ask for it.

    Attributes:
        method: a name in METHODS.
        options: its options.
        rho: radius large enough to matter within a few steps of a tiny model.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rho: float = 0.1

    @property
    def id(self) -> str:
        return "-".join([self.method, *(f"{n}={v}" for n, v in self.options.items())])

    @property
    def ascends_alone(self) -> bool:
        """Whether each micro-batch can ascend by itself (mSAM); the engine refuses it where not."""
        return get_method(self.method, **self.options).build().second_pass.interval == 1

    @property
    def optim_args(self) -> str | None:
        return ",".join(f"{n}={v}" for n, v in self.options.items()) or None


CASES = (
    Case("ssam"),
    Case("ssam", {"normalize": False}),
    Case("ssam", {"adaptive": True}),
    Case("ssam", {"max_scale": 1.0}),
    Case("sam"),
    Case("sam", {"renormalize": True, "max_scale": 0.8}),
    Case("usam"),
    Case("asam", rho=0.5),
    Case("asam", {"weights_only": True, "eta": 0.05}, rho=0.5),
    Case("friendly_sam"),
    Case("friendly_sam", {"sigma": 0.6, "lam": 0.5, "ema_order": "paper"}),
    Case("friendly_sam", {"sigma": 0.6, "renormalize": True}),
    Case("looksam", {"k": 2}),
    Case("looksam", {"k": 3, "alpha": 0.5, "renormalize": True}),
    Case("look_layersam", {"k": 2}),
    Case("look_layersam", {"k": 2, "layer_scale": "unit"}),
    Case("gsam"),
    Case("wsam", {"gamma": 0.6}),
    Case("wsam", {"gamma": 0.7, "renormalize": True}),
    Case("vasso", {"theta": 0.4}),
    Case("functional_sam"),
    Case("functional_sam", {"renormalize": True}),
)

ONE_PASS_CASES = (
    Case("momentum_sam"),
    Case("momentum_sam", {"momentum": 0.5}),
    Case("random_perturbation"),
    Case("random_perturbation", {"seed": 3}),
    Case("stale_sam"),
)
"""Methods that never take a second pass, for the tests that do not ask for one."""

OWN_OPTIMIZER_CASES = (Case("adasam"),)
"""Methods that bring their base optimizer, for the tests that do not choose one."""

ADAPTER_CASES = (
    Case("nbar", rho=0.5),
    Case("obar", rho=0.5),
    Case("flat_lora", {"growing": False}),
    Case("flat_lora", rho=0.3),
    Case("bi_lora", {"r": 2}),
    Case("bi_lora", {"r": 3, "ascent_optim": "sgd", "lr_ratio": 5.0}),
)
"""Methods that work on the adapters of a model, for the tests whose model has some."""

MAIN_ADAPTER_CASES = tuple({c.method: c for c in reversed(ADAPTER_CASES)}.values())[::-1]
"""The first case of each of them."""

WHOLE_MODEL = tuple(n for n in METHODS if n not in {c.method for c in ADAPTER_CASES})
"""Names of the methods that work on any model."""

MAIN_CASES = tuple({c.method: c for c in reversed(CASES)}.values())[::-1]
"""The first case of each method, for what is too slow to run for all."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
"""Runs a test for each row of the case table."""


MAIN_ONE_PASS_CASES = tuple({c.method: c for c in reversed(ONE_PASS_CASES)}.values())[::-1]
"""The first case of each of them."""


def bert(dropout: float = 0.1, labels: int = 3, seed: int = 1) -> BertForSequenceClassification:
    """A BERT of about 5,000 parameters with dropout; its loss ignores `num_items_in_batch`."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def gpt2(dropout: float = 0.0, seed: int = 1) -> GPT2LMHeadModel:
    """A GPT-2 with tied embeddings, whose loss heeds `num_items_in_batch`."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def resnet(seed: int = 1) -> ResNetForImageClassification:
    """A ResNet with BatchNorm."""
    set_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def text_data(n: int = 64, labels: int = 3, length: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """`n` token sequences whose first token tells the label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (n, length), generator=generator)
    mask = torch.ones(length, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": mask, "labels": row[0] % labels} for row in ids]


def lm_data(n: int = 64, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """`n` token sequences with unequal padding: between 4 and `length` labelled tokens each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(1, 40, (length,), generator=generator)
        real = torch.arange(length) < torch.randint(4, length + 1, (1,), generator=generator)
        rows.append({"input_ids": ids * real, "attention_mask": real.long(), "labels": ids.where(real, -100)})
    return rows


def image_data(n: int = 64, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """`n` grey images whose mean tells the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randn(n, 1, size, size, generator=generator) + labels[:, None, None, None]
    return [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]


def arguments(cls: type = SSAMTrainingArguments, **given: Any) -> TrainingArguments:
    """Arguments of a short quiet run on the CPU, logging every step and saving nothing, unless `given` otherwise."""
    defaults = {
        "output_dir": tempfile.mkdtemp(prefix="hf_ssam_test_"),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**defaults, **given})


def case_arguments(case: Case, **given: Any) -> SSAMTrainingArguments:
    """`arguments` for a method's case, over plain SGD unless `given` otherwise."""
    base = {} if METHODS[case.method].optimizer else {"base_optim": "sgd"}
    return arguments(**{"optim": case.method, "optim_args": case.optim_args, "rho": case.rho, **base, **given})


def trained(model: nn.Module, args: TrainingArguments, data: list, cls: type = SSAMTrainer, **given: Any) -> Trainer:
    """Train and return the trainer."""
    trainer = cls(model=model, args=args, train_dataset=data, **given)
    trainer.train(resume_from_checkpoint=None)
    return trainer


class MendedTrainer(Trainer):
    """The stock Trainer, told what it cannot see: the loss of `bert` ignores `num_items_in_batch`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, by name."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    """Same names, values within `atol`."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
