"""Train a causal language model on running text, all of it or low-rank adapters, with a sharpness-aware method.

    python examples/run_clm.py configs/tasks/questions_clm.yaml
    python examples/run_clm.py --model_name_or_path gpt2 --dataset_name my/texts --block_size 512 --rho 0.05
    python examples/run_clm.py --train_file book.txt --validation_file other.txt --lora_r 8 --optim adamw_torch

Texts are put one after the other, an end token between them, and cut into blocks of equal length, so no batch is
padded. Without a model it takes SmolLM2-135M, and without data the offline questions; neither needs a model hub. The
results line has the perplexity, which is exp of the loss on the evaluation blocks.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, default_data_collator, set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from support import offline_models, offline_tasks
from support.base_models import ModelArguments, check_length, pretrained, tokenizer_for
from support.cli import ExampleParser, run
from support.lora import LoraArguments, adapter
from support.packing import RunningTextArguments, blocks
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import load_files, require_columns, uses


class LanguageModelTrainer(SSAMTrainer):
    """Adds the perplexity to what an evaluation finds, and logs."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's, with ``eval_perplexity`` beside ``eval_loss``."""
        output = super().evaluation_loop(*args, **kwargs)
        losses = {name: value for name, value in output.metrics.items() if name.endswith("_loss")}
        for name, loss in losses.items():
            output.metrics[name.replace("_loss", "_perplexity")] = math.exp(min(loss, 700.0))
        return output


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    types = (ModelArguments, RunningTextArguments, LoraArguments, SSAMTrainingArguments)
    model_args, data_args, lora_args, args = ExampleParser(types, description=__doc__).parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.questions)
        require_columns(raw, {"text_column_name": data_args.text_column_name})
        rows = uses(raw, data_args, plan)
    path = model_args.model_name_or_path or str(offline_models.smollm2())
    tokenizer = tokenizer_for(model_args, path)
    model = pretrained(AutoModelForCausalLM, path, dtype=model_args.dtype, **model_args.hub)
    check_length("block_size", data_args.block_size, model.config)
    if config := adapter(lora_args):
        from peft import get_peft_model

        model = get_peft_model(model, config)
        model.enable_input_require_grads()  # gradient checkpointing needs it where the embedding is frozen

    with args.main_process_first(desc="packing"):
        limits = {"train": data_args.max_train_blocks, "eval": data_args.max_eval_blocks}
        prepared = {use: blocks(r, tokenizer, data_args, limits[use]) for use, r in rows.items()}

    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    facts = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation", **data_args.card}
    data = run_data(data_args, "questions", columns=[data_args.text_column_name], seed=args.seed)
    return train_and_report(trainer, plan.checkpoint, data, **facts)


if __name__ == "__main__":
    run(main)
