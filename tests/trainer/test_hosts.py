"""The mixin over other libraries' trainers: their step twice a batch, their own counters once (law 6)."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss, SoftmaxLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_ssam import (
    SSAMArgumentsMixin,
    SSAMSeq2SeqTrainer,
    SSAMSeq2SeqTrainingArguments,
    SSAMTrainer,
    SSAMTrainerMixin,
    SSAMTrainingArguments,
)
from tests.support.cases import MAIN_CASES, Case, arguments, assert_identical, bert, gpt2, lm_data, weights

TINY = 1e-30
"""A radius too small to change any weight: the run is then the stock one, to the bit."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w1", cls_token="w3", sep_token="w4"
    )


def given(case: Case, **more) -> dict:
    return {"optim": case.method, "optim_args": case.optim_args, "rho": case.rho, "base_optim": "sgd", **more}


def entries(trainer) -> list[dict]:
    """The training log without the clock and without our own entries."""
    return [
        {k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k and not k.startswith("ssam/")}
        for e in trainer.state.log_history
    ]


# ------------------------------------------------------------------------------------------------------ SFTTrainer


class SSAMSFTConfig(SSAMArgumentsMixin, SFTConfig):
    pass


class SSAMSFTTrainer(SSAMTrainerMixin, SFTTrainer):
    pass


def sft(trainer_class: type, config_class: type, **options):
    rows = [{n: row[n].tolist() for n in ("input_ids", "labels")} for row in lm_data(32)]
    args = arguments(config_class, bf16=False, max_length=12, **options)
    trainer = trainer_class(
        model=gpt2(dropout=0.1), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_counts_its_tokens_once(accumulation: int):
    split = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    stock = sft(SFTTrainer, SFTConfig, optim="sgd", **split)
    ours = sft(SSAMSFTTrainer, SSAMSFTConfig, **given(Case("sam", rho=TINY)), **split)
    assert ours._total_train_tokens == stock._total_train_tokens > 0
    assert_identical(weights(ours.model), weights(stock.model))
    counted = [{k: e.get(k) for k in ("num_tokens", "entropy", "mean_token_accuracy", "loss")} for e in entries(ours)]
    assert counted == [{k: e.get(k) for k in counted[0]} for e in entries(stock)]


@pytest.mark.few_methods
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_sft_trains_with_every_method(case: Case):
    """A method's own base optimizer aside, the same tokens are counted and the weights go elsewhere."""
    if case.method == "functional_sam":  # TRL's loss never makes them
        with pytest.raises(ValueError, match="the output of GPT2LMHeadModel has no `logits`, whose gradient"):
            sft(SSAMSFTTrainer, SSAMSFTConfig, **given(case))
        return
    stock, ours = sft(SFTTrainer, SFTConfig, optim="sgd"), sft(SSAMSFTTrainer, SSAMSFTConfig, **given(case))
    assert ours._total_train_tokens == stock._total_train_tokens
    assert any(not torch.equal(a, b) for a, b in zip(ours.model.parameters(), stock.model.parameters(), strict=True))
    assert "num_tokens" in ours.state.log_history[0] and "ssam/loss" in ours.state.log_history[0]


# -------------------------------------------------------------------------------------------------- Seq2SeqTrainer


def t5(dropout: float = 0.1) -> T5ForConditionalGeneration:
    set_seed(1)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=40, dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


def seq2seq(trainer_class: type, config_class: type, **options):
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in lm_data(32)]
    args = arguments(config_class, predict_with_generate=True, generation_max_length=4, **options)
    trainer = trainer_class(
        model=t5(), args=args, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer()
    )
    trainer.train()
    return trainer


def test_seq2seq_without_a_perturbation_is_the_stock_one():
    stock = seq2seq(Seq2SeqTrainer, Seq2SeqTrainingArguments, optim="sgd")
    ours = seq2seq(SSAMSeq2SeqTrainer, SSAMSeq2SeqTrainingArguments, **given(Case("sam", rho=TINY)))
    assert_identical(weights(ours.model), weights(stock.model))


@pytest.mark.few_methods
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_seq2seq_trains_and_generates_with_every_method(case: Case):
    trainer = seq2seq(SSAMSeq2SeqTrainer, SSAMSeq2SeqTrainingArguments, **given(case))
    assert "ssam/loss" in trainer.state.log_history[0]
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 4


# ----------------------------------------------------------------------------------------- SentenceTransformerTrainer


class SSAMSentenceArguments(SSAMArgumentsMixin, SentenceTransformerTrainingArguments):
    pass


class SSAMSentenceTrainer(SSAMTrainerMixin, SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("encoder"))
    BertModel(bert().config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def encoder(folder: str) -> SentenceTransformer:
    set_seed(1)
    body = Transformer(folder)
    return SentenceTransformer(modules=[body, Pooling(16)], device="cpu")


def pairs(n: int = 32) -> Dataset:
    rows = [" ".join(f"w{i}" for i in row["input_ids"].tolist()) for row in lm_data(n)]
    return Dataset.from_dict({"anchor": rows, "positive": rows[::-1], "label": [i % 2 for i in range(n)]})


class Parts(nn.Module):
    """A loss with named parts, which the trainer adds up between log entries."""

    def __init__(self, model):
        super().__init__()
        self.ranking, self.cosine = MultipleNegativesRankingLoss(model), CoSENTLoss(model)

    def forward(self, features, labels):
        return {"ranking": self.ranking(features, labels), "cosine": self.cosine(features, labels.float())}


def sentences(folder: str, trainer_class: type, args_class: type, loss, **options):
    model = encoder(folder)
    args = arguments(args_class, **{"logging_steps": 2, **options})
    trainer = trainer_class(model=model, args=args, train_dataset=pairs(), loss=loss(model))
    trainer.train()
    return trainer


def test_sentence_transformers_count_the_parts_of_a_loss_once(encoder_folder: str):
    stock = sentences(
        encoder_folder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, Parts, optim="sgd"
    )
    ours = sentences(encoder_folder, SSAMSentenceTrainer, SSAMSentenceArguments, Parts, **given(Case("sam", rho=TINY)))
    assert_identical(weights(ours.model), weights(stock.model))
    assert all("ranking" in e and "cosine" in e for e in entries(ours) if "loss" in e)
    assert [{k: v for k, v in e.items() if k != "total_flos"} for e in entries(ours)] == [
        {k: v for k, v in e.items() if k != "total_flos"} for e in entries(stock)
    ]


def test_the_parts_of_a_loss_are_those_of_the_first_pass(encoder_folder: str):
    """Far away the second pass has other parts: an average over both would show in the first entry."""
    each = {"logging_steps": 1, "max_steps": 1}
    stock = sentences(
        encoder_folder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, Parts, optim="sgd", **each
    )
    far = given(Case("sam", rho=2.0), **each)
    ours = sentences(encoder_folder, SSAMSentenceTrainer, SSAMSentenceArguments, Parts, **far)
    assert ours.state.log_history[0]["ssam/ascent_loss"] != ours.state.log_history[0]["ssam/loss"]
    for part in ("ranking", "cosine"):
        assert ours.state.log_history[0][part] == stock.state.log_history[0][part]


def test_the_weights_of_a_loss_are_trained_and_perturbed(encoder_folder: str):
    """A loss may have weights of its own; they are in the optimizer, so they are in the perturbation."""

    def softmax(model):
        set_seed(2)
        return SoftmaxLoss(model, 16, num_labels=2)

    before = weights(softmax(encoder(encoder_folder)).classifier)
    for case in MAIN_CASES[:2]:
        trainer = sentences(encoder_folder, SSAMSentenceTrainer, SSAMSentenceArguments, softmax, **given(case))
        outside = [n for n in trainer.two_pass.perturbed if n.startswith("outside_model.")]
        assert len(outside) == len(before)
        loss = trainer.loss
        assert all(not torch.equal(t, before[n]) for n, t in weights(loss.classifier).items())


# ----------------------------------------------------------------------------------------------------- refused ones


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_trainers_that_draw_their_own_batches_are_refused(name: str):
    """The real classes: the refusal comes before their constructor, and names the reason and the way out."""
    import trl

    host = type(f"SSAM{name}", (SSAMTrainerMixin, getattr(trl, name)), {})
    with pytest.raises(
        NotImplementedError, match=f"{name} cannot train with two passes.*other samples; use SFTTrainer"
    ):
        host(model=None)


def test_arguments_without_the_mixin_are_refused():
    with pytest.raises(ValueError, match="SFTConfig has no `rho`.*SSAMArgumentsMixin"):
        SSAMSFTTrainer(
            model=gpt2(),
            args=arguments(SFTConfig, bf16=False, max_length=12),
            train_dataset=Dataset.from_list([{"input_ids": [1, 2, 3]}]),
            processing_class=tokenizer(),
        )


def test_a_trainer_without_counters_has_none_kept():
    trainer = SSAMTrainer(model=gpt2(), args=arguments(SSAMTrainingArguments), train_dataset=lm_data())
    with trainer.host_counters_kept():
        trainer.note = "kept"
    assert trainer.note == "kept"
