"""Fine-tune a model that turns one text into another (a summary, a translation) with a sharpness-aware method.

    python examples/run_summarization.py configs/tasks/answer_types.yaml
    python examples/run_summarization.py --model_name_or_path t5-small --dataset_name my/news --rho 0.05
    python examples/run_summarization.py --train_file train.csv --validation_file test.csv --optim adamw_torch

Without a model it takes MiniLM-L6 twice, as encoder and as decoder (with new cross-attention: Rothe et al. 2020, arXiv
1907.12461), and without data the offline questions, each with what it asks for in words
(`offline_tasks.answer_types`); neither needs a model hub. Evaluation generates texts and compares them
(`--predict_with_generate`, on here by default).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import evaluate
import numpy as np
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_ssam import SSAMSeq2SeqTrainer, SSAMSeq2SeqTrainingArguments
from support import offline, offline_tasks
from support.base_models import ModelArguments, check_length, pretrained, tokenizer_for
from support.cli import ExampleParser, run
from support.metrics import METRICS
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import FileArguments, load_files, require_columns, uses

METRIC = METRICS / "rouge.py"


@dataclass
class TextPairArguments(FileArguments):
    """Which texts, and how much of them."""

    text_column_name: str = field(default="document", metadata={"help": "The column with the text to read."})
    summary_column_name: str = field(default="summary", metadata={"help": "The column with the text to write."})
    source_prefix: str = field(default="", metadata={"help": "What to put before each text, as T5 needs it."})
    max_source_length: int = field(default=512, metadata={"help": "Longer texts are cut to so many tokens."})
    max_target_length: int = field(default=64, metadata={"help": "The same, for the text to write."})


@dataclass
class Arguments(SSAMSeq2SeqTrainingArguments):
    """The training arguments, with evaluation by generated text."""

    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate on generated texts."})


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, TextPairArguments, Arguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.answer_types)
        columns = {
            "text_column_name": data_args.text_column_name,
            "summary_column_name": data_args.summary_column_name,
        }
        require_columns(raw, columns)
        rows = uses(raw, data_args, plan)

    tokenizer = tokenizer_for(model_args, model_args.model_name_or_path or str(offline.minilm()))
    model = load_model(model_args, tokenizer)
    check_length("max_source_length", data_args.max_source_length, model.config)
    check_length("max_target_length", data_args.max_target_length, model.config)
    model.generation_config.max_length = None  # a length of the model's own would fight with this one
    model.generation_config.max_new_tokens = data_args.max_target_length
    with args.main_process_first(desc="tokenizing"):
        encode = encoder(tokenizer, data_args)
        prepared = {use: r.map(encode, batched=True, remove_columns=r.column_names) for use, r in rows.items()}

    trainer = SSAMSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=scorer(tokenizer) if args.predict_with_generate else None,
    )
    facts = {"finetuned_from": model_args.model_name_or_path, **data_args.card}
    columns = {"columns": [data_args.text_column_name], "label_column": data_args.summary_column_name}
    data = run_data(data_args, "answer_types", **columns, seed=args.seed)
    return train_and_report(trainer, plan.checkpoint, data, **facts)


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
    metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def texts(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    return lambda pair: metric.compute(predictions=texts(pair.predictions), references=texts(pair.label_ids))


if __name__ == "__main__":
    run(main)
