"""Fine-tune a tagger of words (names, parts of speech) with a sharpness-aware method.

    python examples/run_token_classification.py configs/tasks/names.yaml
    python examples/run_token_classification.py --model_name_or_path bert-base-cased --dataset_name my/ner --rho 0.05
    python examples/run_token_classification.py --train_file train.json --validation_file test.json --optim adamw_torch

An example is a list of words and a list of tags. Without a model it takes MiniLM-L6, and without data the offline
questions in lower case, in which it finds the names (`offline_tasks.names`); neither needs a model hub.
"""

from collections.abc import Sequence

from transformers import AutoConfig, AutoModelForTokenClassification, DataCollatorForTokenClassification, set_seed

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.saved.labels import not_known
from support import offline, offline_tasks
from support.base_models import ModelArguments, check_length, classifier, path_of, pretrained, tokenizer_for
from support.cli import ExampleParser, run
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import load_files, uses
from support.tagging import TokenArguments, encoder, number_tags, require_tags, scorer, settled_tags


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    parser = ExampleParser((ModelArguments, TokenArguments, SSAMTrainingArguments), description=__doc__)
    model_args, data_args, args = parser.parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    path = path_of(model_args, plan, offline.minilm)
    config = pretrained(AutoConfig, path, **model_args.hub)
    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.names)
        require_tags(raw, data_args)
        rows = uses(raw, data_args, plan)
        tags = settled_tags(raw, data_args, config, path, plan)
        rows = number_tags(rows, data_args, tags, not_known(path, tags))

    check_length("max_seq_length", data_args.max_seq_length, config)
    tokenizer = tokenizer_for(model_args, path)
    model = classifier(AutoModelForTokenClassification, path, model_args, tags, plan)
    with args.main_process_first(desc="tokenizing"):
        encode = encoder(tokenizer, data_args)
        prepared = {use: r.map(encode, batched=True, remove_columns=r.column_names) for use, r in rows.items()}

    trainer = SSAMTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=scorer(tags),
    )
    facts = {"finetuned_from": model_args.model_name_or_path, "tasks": "token-classification", **data_args.card}
    columns = {"columns": [data_args.text_column_name], "label_column": data_args.label_column_name}
    data = run_data(data_args, "names", **columns, labels=tags, seed=args.seed)
    return train_and_report(trainer, plan.checkpoint, data, **facts)


if __name__ == "__main__":
    run(main)
