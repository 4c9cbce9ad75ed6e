"""Texts, each with a text to write: their columns, the model that writes, what it reads and what it is scored by."""

from collections.abc import Callable
from dataclasses import dataclass, field

import evaluate
import numpy as np
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderModel,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import offline
from .base_models import ModelArguments, check_length, pretrained
from .metrics import METRICS
from .sources import FileArguments


@dataclass
class TextPairArguments(FileArguments):
    """Which texts, and how much of them."""

    text_column_name: str = field(default="document", metadata={"help": "The column with the text to read."})
    summary_column_name: str = field(default="summary", metadata={"help": "The column with the text to write."})
    source_prefix: str = field(default="", metadata={"help": "What to put before each text, as T5 needs it."})
    max_source_length: int = field(default=512, metadata={"help": "Longer texts are cut to so many tokens."})
    max_target_length: int = field(default=64, metadata={"help": "The same, for the text to write."})


def writer(source: ModelArguments, data: TextPairArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model, made to write texts of the length asked for.

    Raises:
        UsageError: it cannot read or write so many tokens.
    """
    model = load_model(source, tokenizer)
    check_length("max_source_length", data.max_source_length, model.config)
    check_length("max_target_length", data.max_target_length, model.config)
    model.generation_config.max_length = None  # a length of the model's own would fight with this one
    model.generation_config.max_new_tokens = data.max_target_length
    return model


def load_model(source: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model asked for, or MiniLM-L6 as encoder and decoder, which takes its special tokens from `tokenizer`."""
    if source.model_name_or_path:
        return pretrained(AutoModelForSeq2SeqLM, source.model_name_or_path, dtype=source.dtype, **source.hub)
    encoder = AutoModel.from_pretrained(offline.minilm())
    config = AutoConfig.from_pretrained(offline.minilm(), is_decoder=True, add_cross_attention=True)
    decoder = AutoModelForCausalLM.from_config(config)
    decoder.base_model.load_state_dict(encoder.state_dict(), strict=False)  # all but the cross-attention and the head
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    tokens = {
        "decoder_start_token_id": tokenizer.cls_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in tokens.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model


def encoder(tokenizer: PreTrainedTokenizerBase, data: TextPairArguments) -> Callable[[dict], dict]:
    """Examples -> token ids, and the ids of the text to write as ``labels``."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [data.source_prefix + text for text in batch[data.text_column_name]]
        encoded = tokenizer(texts, truncation=True, max_length=data.max_source_length)
        targets = batch[data.summary_column_name]
        labels = tokenizer(text_target=targets, truncation=True, max_length=data.max_target_length)
        return {**encoded, "labels": labels["input_ids"]}

    return encode


def scorer(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """Generated ids of shape (n, tokens), and labels of such a shape -> scores."""
    metric = evaluate.load(str(METRICS / "rouge.py"), keep_in_memory=True)

    def texts(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    return lambda pair: metric.compute(predictions=texts(pair.predictions), references=texts(pair.label_ids))
