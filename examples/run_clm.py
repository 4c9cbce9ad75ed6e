"""Train a causal language model on running text, all of it or low-rank adapters, with a sharpness-aware method.

    python examples/run_clm.py configs/tasks/questions_clm.yaml
    python examples/run_clm.py --model_name_or_path gpt2 --dataset_name my/texts --block_size 512 --rho 0.05
    python examples/run_clm.py --train_file book.txt --validation_file other.txt --lora_r 8 --optim adamw_torch

Texts are put one after the other, an end token between them, and cut into blocks of equal length, so no batch is
padded. Without a model it takes SmolLM2-135M, and without data the offline questions; neither needs a model hub. The
results line has the perplexity, which is exp of the loss on the evaluation blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator, set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from support import offline_models, offline_tasks
from support.base_models import ModelArguments, check_length, pretrained, tokenizer_for
from support.cli import ExampleParser, UsageError, run
from support.lora import LoraArguments, adapter
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import FileArguments, load_files, require_columns, uses


@dataclass
class RunningTextArguments(FileArguments):
    """Which texts, and how long a block of them is."""

    text_column_name: str = field(default="text", metadata={"help": "The column with the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    max_train_blocks: int | None = field(default=None, metadata={"help": "Train on so many blocks."})
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on so many blocks."})


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


def blocks(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: RunningTextArguments, limit: int | None
) -> Dataset:
    """`rows` as blocks of ``input_ids``, at most `limit` of them; what is left of a thousand texts at the end is
    dropped.

    Raises:
        UsageError: there is less text than one block.
    """
    packed = rows.map(packer(tokenizer, data), batched=True, remove_columns=rows.column_names, desc="packing")
    if not len(packed):
        raise UsageError(f"{len(rows)} texts are less than one block: give a --block_size below {data.block_size}")
    return packed.select(range(min(limit or len(packed), len(packed))))


def packer(tokenizer: PreTrainedTokenizerBase, data: RunningTextArguments) -> Callable[[dict], dict]:
    """Texts -> blocks of `block_size` tokens, and the same as ``labels``: the model shifts them itself.

    Raises:
        UsageError: there is no end token to put between texts.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path
        raise UsageError(
            f"the tokenizer of {name} has no end token to put between texts: set `eos_token` in its folder"
        )

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = tokenizer(batch[data.text_column_name], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in texts))
        starts = range(0, len(tokens) - data.block_size + 1, data.block_size)
        cut = [tokens[start : start + data.block_size] for start in starts]
        return {"input_ids": cut, "labels": cut}

    return pack


if __name__ == "__main__":
    run(main)
