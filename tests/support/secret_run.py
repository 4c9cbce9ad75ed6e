"""A training script that takes every kind of secret; what it pushes is searched by tests/hub/test_redaction.py."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import HfArgumentParser, TrainingArguments

from hf_ssam import SSAMArgumentsMixin
from tests.support.hub_run import trainer


class Arguments(SSAMArgumentsMixin, TrainingArguments):
    wandb_api_key: str | None = None
    password: str | None = None


@dataclass
class ScriptArguments:
    HF_TOKEN: str | None = None
    WANDB_API_KEY: str | None = None
    api_token: str | None = None
    neptune_api_token: str | None = None
    github_token: str | None = None
    secret_key: str | None = None
    aws_secret_access_key: str | None = None
    passwd: str | None = None
    credentials: str | None = None
    auth: str | None = None
    tracking_uri: str | None = None
    tracker_kwargs: str | None = None
    data_files: str | None = None
    pad_token: str | None = None
    max_new_tokens: int | None = None


if __name__ == "__main__":
    parser = HfArgumentParser((Arguments, ScriptArguments))
    args, *_ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    run = trainer(args)
    run.train()
    run.push_to_hub()
