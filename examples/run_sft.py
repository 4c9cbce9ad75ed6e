"""Supervised fine-tuning with TRL's `SFTTrainer`, made sharpness-aware by two mixins.

    python examples/run_sft.py configs/tasks/questions_sft.yaml
    python examples/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name trl-lib/Capybara

Every field of `SFTConfig` is a flag. Data are in any form that `SFTTrainer` takes: ``messages``, ``prompt`` and
``completion``, or ``text``. Without a model it takes SmolLM2-135M-Instruct, and without data the offline questions,
each to be answered with its class (`offline_tasks.classified_questions`); neither needs a model hub.
"""

from collections.abc import Sequence

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_ssam import SSAMTrainerMixin
from support import offline_tasks
from support.base_models import PlainModelArguments
from support.cli import ExampleParser, UsageError, run
from support.lora import LoraArguments, adapter
from support.plan import prepare
from support.sources import FileArguments, load_files, uses
from support.trl_runs import TrlArgumentsMixin, language_model, report

FORMS = (["messages"], ["prompt", "completion"], ["text"])


class Arguments(TrlArgumentsMixin, SFTConfig):
    """TRL's arguments and ours."""


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
    trainer = Trainer(
        **language_model(model_args, args),
        args=args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        peft_config=adapter(lora_args),
    )
    return report(trainer, plan, data_args, "classified_questions", forms.get("train", []))


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
