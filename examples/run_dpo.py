"""Preference optimisation with TRL's `DPOTrainer`, made sharpness-aware by two mixins.

    python examples/run_dpo.py configs/tasks/questions_dpo.yaml
    python examples/run_dpo.py configs/tasks/questions_dpo.yaml --optim flat_lora --output_dir out/dpo-flat
    python examples/run_dpo.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name my/preferences

Every field of `DPOConfig` is a flag. Data have the columns ``prompt``, ``chosen`` and ``rejected``. Without a model it
takes SmolLM2-135M-Instruct, and without data the offline questions, each with its right class and a wrong one
(`offline_tasks.preferred_answers`); neither needs a model hub. With adapters (`--lora_r 8`) the reference is the same
model without them, so that no second one is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin
from support import offline_models, offline_tasks
from support.base_models import PlainModelArguments, check_length, pretrained, tokenizer_for
from support.cli import ExampleParser, UsageError, run
from support.lora import LoraArguments, adapter
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import FileArguments, load_files, uses

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class Arguments(SSAMArgumentsMixin, DPOConfig):
    """TRL's arguments and ours."""

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL turns it on where nothing is said, and then refuses to run on a CPU
        super().__post_init__()


class Trainer(SSAMTrainerMixin, DPOTrainer):
    """TRL's trainer, with a sharpness-aware gradient in a step."""


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    types = (PlainModelArguments, FileArguments, LoraArguments, Arguments)
    model_args, data_args, lora_args, args = ExampleParser(types, description=__doc__).parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.preferred_answers)
        check_columns(raw)
        rows = uses(raw, data_args, plan)
    hub = {**model_args.hub, "trust_remote_code": args.trust_remote_code}
    path = model_args.model_name_or_path or str(offline_models.smollm2())
    if args.max_length is not None:
        check_length("max_length", args.max_length, pretrained(AutoConfig, path, **hub))

    trainer = Trainer(
        model=pretrained(AutoModelForCausalLM, path, dtype=model_args.dtype, **hub),
        args=args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer_for(model_args, path),
        peft_config=adapter(lora_args),
    )
    name = Path(args.hub_model_id or args.output_dir).name
    data = run_data(data_args, "preferred_answers", columns=[*COLUMNS], seed=args.seed)
    card = {"model_name": name, "dataset_name": data_args.card.get("dataset")}
    return train_and_report(trainer, plan.checkpoint, data, **card)


def check_columns(raw: DatasetDict) -> None:
    """Refuse data that are not preferences.

    Raises:
        UsageError: a split lacks one of `COLUMNS`.
    """
    for split, rows in raw.items():
        if not set(COLUMNS) <= set(rows.column_names):
            found = ", ".join(rows.column_names)
            raise UsageError(f"the {split} data has {found}: it needs prompt, chosen and rejected")


if __name__ == "__main__":
    run(main)
