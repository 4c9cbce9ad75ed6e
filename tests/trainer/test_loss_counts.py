"""Losses that take `num_items_in_batch`: which are mended, and which are left as the stock Trainer has them."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC, set_seed

from hf_ssam import SSAMTrainer
from tests.support.cases import (
    MendedTrainer,
    arguments,
    assert_close,
    assert_identical,
    bert,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)

WHOLE = {"per_device_train_batch_size": 8}
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
MENDED = "its loss ignores it"


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_left_alone(model, data, stock: type[Trainer] = Trainer, ours: type[Trainer] = SSAMTrainer, **given) -> None:
    """Under a stock optimizer's name the run is the stock Trainer's, to the bit, and nothing is said."""
    options = {"optim": "sgd", "max_steps": 4, **SPLIT}
    theirs = trained(model(), arguments(TrainingArguments, **options), data(), cls=stock)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MENDED}")
        mine = trained(model(), arguments(**options, **given), data(), cls=ours)
    assert losses(mine) == losses(theirs)
    assert_identical(weights(mine.model), weights(theirs.model))


@pytest.mark.parametrize("optim", ["ssam", "sgd"])
def test_loss_that_ignores_the_count_is_mended_and_warned_of_once(optim: str):
    """The stock name is mended as well: the baseline must see the same loss."""

    def logged(split: dict) -> tuple[list[float], dict[str, Tensor]]:
        trainer = trained(
            bert(dropout=0.0), arguments(optim=optim, base_optim="sgd", max_steps=6, **split), text_data()
        )
        return losses(trainer), weights(trainer.model)

    with pytest.warns(UserWarning, match=MENDED) as caught:
        split_losses, split_weights = logged(SPLIT)
    assert sum(MENDED in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MENDED}")
        whole_losses, whole_weights = logged(WHOLE)
    assert split_losses == pytest.approx(whole_losses, abs=1e-6)
    assert_close(split_weights, whole_weights)


def test_mend_is_the_stock_trainer_told_the_truth():
    """With `optim=sgd` the mended run is the stock Trainer with `model_accepts_loss_kwargs = False`, to the bit."""
    args = arguments(optim="sgd", max_steps=6, **SPLIT)
    with pytest.warns(UserWarning, match=MENDED):
        ours = trained(bert(), args, text_data())
    stock = trained(bert(), args, text_data(), cls=MendedTrainer)
    assert_identical(weights(ours.model), weights(stock.model))


def test_loss_that_heeds_the_count_is_left_alone():
    assert_left_alone(gpt2, lm_data)


def test_mend_can_be_turned_off():
    assert_left_alone(lambda: bert(), text_data, mend_loss_count=False)


def test_look_at_the_loss_draws_no_random_number():
    """Forwards that nobody sees: a run whose first batch is looked at equals one that was told beforehand."""
    args = arguments(max_steps=3, base_optim="sgd", **SPLIT)
    with pytest.warns(UserWarning, match=MENDED):
        looked = trained(bert(), args, text_data())

    class Told(SSAMTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    assert_identical(weights(looked.model), weights(trained(bert(), args, text_data(), cls=Told).model))


class OwnLoss:
    """Logs, and computes a mean of its own, as the Trainer's documentation shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        if model.training:
            self.log({"own/loss": float(loss.detach())})
        return (loss, outputs) if return_outputs else loss


class StockOwnLoss(OwnLoss, Trainer):
    pass


class SSAMOwnLoss(OwnLoss, SSAMTrainer):
    pass


def test_own_compute_loss_is_left_as_the_stock_trainer_has_it():
    assert_left_alone(bert, text_data, StockOwnLoss, SSAMOwnLoss)


def test_own_compute_loss_is_not_called_by_the_look():
    given = {"max_steps": 2, **SPLIT}
    stock = trained(bert(), arguments(TrainingArguments, optim="sgd", **given), text_data(), cls=StockOwnLoss)
    ours = trained(bert(), arguments(optim="sgd", **given), text_data(), cls=SSAMOwnLoss)
    assert [e.get("own/loss") for e in ours.state.log_history] == [e.get("own/loss") for e in stock.state.log_history]


def wav2vec2(reduction: str) -> Wav2Vec2ForCTC:
    set_seed(1)
    config = Wav2Vec2Config(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        ctc_loss_reduction=reduction,
        pad_token_id=0,
    )
    return Wav2Vec2ForCTC(config)


def speech(n: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_values": torch.randn(400, generator=generator),
            "labels": torch.randint(1, 8, (4,), generator=generator),
        }
        for _ in range(n)
    ]


def test_sum_over_the_batch_is_left_alone():
    """Wav2Vec2ForCTC's default: a sum is right under accumulation as it is, whether it heeds the count or not."""
    assert_left_alone(lambda: wav2vec2("sum"), speech)


def test_mean_of_the_same_model_is_mended():
    options = {"optim": "sgd", "max_steps": 2}
    with pytest.warns(UserWarning, match=MENDED):
        split = trained(wav2vec2("mean"), arguments(**options, **SPLIT), speech())
    whole = trained(wav2vec2("mean"), arguments(**options, **WHOLE), speech())
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)


class Masked(nn.Module):
    """Token classification whose loss ignores the count; `accepts_loss_kwargs` as a stock model's `**kwargs`."""

    accepts_loss_kwargs = True

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, input_ids, labels, **kwargs):
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def masked() -> Masked:
    torch.manual_seed(1)
    return Masked()


def labelled(first: int, value: int, n: int = 32) -> list[dict[str, Tensor]]:
    """Rows of tokens with labels; those of the first `first` samples are all `value`."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 40, (6,), generator=generator) for _ in range(n)]
    return [{"input_ids": r, "labels": torch.full_like(r, value) if i < first else r % 3} for i, r in enumerate(rows)]


@pytest.mark.parametrize("unlabelled", [4, 8, 12])
def test_look_goes_on_until_a_loss_tells(unlabelled: int):
    """No label in the first micro-batches: their loss is not finite, and says nothing about the count."""
    options = {"optim": "sgd", "max_steps": 3, "train_sampling_strategy": "sequential", **SPLIT}
    with pytest.warns(UserWarning, match=MENDED) as caught:
        ours = trained(masked(), arguments(**options), labelled(unlabelled, -100))
    assert sum(MENDED in str(w.message) for w in caught) == 1
    assert not ours.model_accepts_loss_kwargs


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    set_seed(1)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("optim", ["sgd", "sam"])
def test_sft_of_a_mixture_of_experts_accumulates(optim: str):
    """Its `compute_loss` reads what only a running step has; at a radius of nothing it is the stock trainer's run."""
    from trl import SFTConfig, SFTTrainer

    from tests.trainer.test_hosts import SSAMSFTConfig, SSAMSFTTrainer, tokenizer

    rows = Dataset.from_list([{n: r[n].tolist() for n in ("input_ids", "labels")} for r in lm_data(32)])

    def run(trainer_class: type, config_class: type, **given):
        args = arguments(config_class, bf16=False, max_length=12, max_steps=2, **SPLIT, **given)
        trainer = trainer_class(model=mixture(), args=args, train_dataset=rows, processing_class=tokenizer())
        trainer.train()
        return trainer

    stock = run(SFTTrainer, SFTConfig, optim="sgd")
    own = {"optim": optim} if optim == "sgd" else {"optim": optim, "rho": 1e-30, "base_optim": "sgd"}
    ours = run(SSAMSFTTrainer, SSAMSFTConfig, **own)
    assert losses(ours) == losses(stock)
    assert_identical(weights(ours.model), weights(stock.model))


class Mean(SSAMTrainer):
    """A mean over the micro-batch's own tokens, and says so."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class MeanUncounted(Mean):
    loss_is_scaled_for_ga = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def test_share_of_a_mean_is_that_of_its_micro_batch():
    """Unequal tokens: an unnormalised ascent that takes the mean for a share by tokens goes too far, or not enough."""
    args = arguments(optim="usam", base_optim="sgd", rho=0.5, ascent_scope="micro_batch", max_steps=3, **SPLIT)
    said, uncounted = (trained(gpt2(), args, lm_data(), cls=cls) for cls in (Mean, MeanUncounted))
    assert_identical(weights(said.model), weights(uncounted.model))
