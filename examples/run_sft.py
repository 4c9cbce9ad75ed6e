"""Supervised fine-tuning with TRL's `SFTTrainer`, made sharpness-aware by two mixins.

    python examples/run_sft.py configs/tasks/questions_sft.yaml
    python examples/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name trl-lib/Capybara

Every field of `SFTConfig` is a flag. Data are in any form that `SFTTrainer` takes: ``messages``, ``prompt`` and
``completion``, or ``text``. Without a model it takes SmolLM2-135M-Instruct, and without data the offline questions,
each to be answered with its class (`offline_tasks.classified_questions`); neither needs a model hub.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin
from support import offline_models, offline_tasks
from support.base_models import PlainModelArguments, check_length, pretrained, tokenizer_for
from support.cli import ExampleParser, UsageError, run
from support.lora import LoraArguments, adapter
from support.plan import prepare
from support.run_data import run_data
from support.runs import train_and_report
from support.sources import FileArguments, load_files, uses

FORMS = (["messages"], ["prompt", "completion"], ["text"])


@dataclass
class Arguments(SSAMArgumentsMixin, SFTConfig):
    """TRL's arguments and ours."""

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL turns it on where nothing is said, and then refuses to run on a CPU
        super().__post_init__()


class Trainer(SSAMTrainerMixin, SFTTrainer):
    """TRL's trainer, with two passes in a step."""


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Train and evaluate as the command line `argv` says; see `train_and_report` for what it returns."""
    types = (PlainModelArguments, FileArguments, LoraArguments, Arguments)
    model_args, data_args, lora_args, args = ExampleParser(types, description=__doc__).parse(argv)
    plan = prepare(args)
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data"):
        raw = load_files(data_args, offline_tasks.classified_questions)
        forms = {split: form_of(rows, split) for split, rows in raw.items()}
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
    data = run_data(data_args, "classified_questions", columns=forms.get("train", []), seed=args.seed)
    card = {"model_name": name, "dataset_name": data_args.card.get("dataset")}
    return train_and_report(trainer, plan.checkpoint, data, **card)


def form_of(rows: Dataset, split: str) -> list[str]:
    """The columns of `FORMS` that `rows` have.

    Raises:
        UsageError: they have none, and `SFTTrainer` knows no other form.
    """
    for form in FORMS:
        if set(form) <= set(rows.column_names):
            return form
    found = ", ".join(rows.column_names)
    raise UsageError(f"the {split} data has {found}: it needs messages, or prompt and completion, or text")


if __name__ == "__main__":
    run(main)
