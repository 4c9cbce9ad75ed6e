"""What scripts over TRL share: arguments that run on a CPU, the language model, and how a run is reported."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from hf_ssam import SSAMArgumentsMixin

from . import offline_models
from .base_models import PlainModelArguments, check_length, pretrained, tokenizer_for
from .plan import Plan
from .run_data import run_data
from .runs import train_and_report
from .sources import FileArguments


class TrlArgumentsMixin(SSAMArgumentsMixin):
    """Ours, over a config of TRL, which turns bf16 on where nothing is said, and then refuses to run on a CPU."""

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()


def language_model(model: PlainModelArguments, args: Any) -> dict[str, Any]:
    """The model (SmolLM2-135M-Instruct where none is named) and its tokenizer, as a trainer of TRL takes them.

    Raises:
        UsageError: there is no such model, or it reads fewer tokens than `args.max_length`.
    """
    hub = {**model.hub, "trust_remote_code": args.trust_remote_code}
    path = model.model_name_or_path or str(offline_models.smollm2())
    if args.max_length is not None:
        check_length("max_length", args.max_length, pretrained(AutoConfig, path, **hub))
    loaded = pretrained(AutoModelForCausalLM, path, dtype=model.dtype, **hub)
    return {"model": loaded, "processing_class": tokenizer_for(model, path)}


def report(
    trainer: Trainer, plan: Plan, data: FileArguments, offline: str, columns: list[str]
) -> dict[str, float | str]:
    """`train_and_report`, with the facts that the card of a trainer of TRL takes.

    Args:
        trainer: with everything set up.
        plan: what the run is to do.
        data: the flags of the data.
        offline: the set that is used where they name none.
        columns: of it that are read.
    """
    args = trainer.args
    used = run_data(data, offline, columns=columns, seed=args.seed)
    card = {"model_name": Path(args.hub_model_id or args.output_dir).name, "dataset_name": data.card.get("dataset")}
    return train_and_report(trainer, plan.checkpoint, used, **card)
