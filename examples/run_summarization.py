"""Fine-tune a model that turns one text into another (a summary, a translation) with a sharpness-aware method.

    python examples/run_summarization.py configs/tasks/answer_types.yaml
    python examples/run_summarization.py --model_name_or_path t5-small --dataset_name my/news --rho 0.05
    python examples/run_summarization.py --train_file train.csv --validation_file test.csv --optim adamw_torch

Without a model it takes MiniLM-L6 twice, as encoder and as decoder (with new cross-attention: Rothe et al. 2020, arXiv
1907.12461), and without data the offline questions, each with what it asks for in words
(`offline_tasks.answer_types`); neither needs a model hub. Evaluation generates texts and compares them
(`--predict_with_generate`, on here by default).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import DataCollatorForSeq2Seq, set_seed

from hf_ssam import SSAMSeq2SeqTrainer, SSAMSeq2SeqTrainingArguments
from support import offline, offline_tasks
from support.base_models import ModelArguments, tokenizer_for
from support.cli import ExampleParser, run
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import load_files, require_columns, uses
from support.text_pairs import TextPairArguments, encoder, scorer, writer


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
    model = writer(model_args, data_args, tokenizer)
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


if __name__ == "__main__":
    run(main)
