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

from datasets import DatasetDict
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from hf_ssam import SSAMTrainerMixin
from support import offline_tasks
from support.base_models import PlainModelArguments
from support.cli import ExampleParser, UsageError, run
from support.lora import LoraArguments, adapter
from support.plan import prepare
from support.sources import FileArguments, load_files, uses
from support.trl_runs import TrlArgumentsMixin, language_model, report

COLUMNS = ("prompt", "chosen", "rejected")


class Arguments(TrlArgumentsMixin, DPOConfig):
    """TRL's arguments and ours."""


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
    trainer = Trainer(
        **language_model(model_args, args),
        args=args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        peft_config=adapter(lora_args),
    )
    return report(trainer, plan, data_args, "preferred_answers", [*COLUMNS])


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
