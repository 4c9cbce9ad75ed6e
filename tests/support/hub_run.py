"""One process of the Hub tests: `HF_ENDPOINT` is read at import, so whoever talks to the stand-in starts here.

python hub_run.py train MODE --output_dir out …     train a tiny model; MODE says what comes after
python hub_run.py load REPO                         print what from_pretrained made of REPO
python hub_run.py build '[{"hub_model_id": …}, …]'  build a Trainer with each, print the error or the repository
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.hub.push import HubError

TEXTS = ["good film", "bad film", "good plot", "bad plot"] * 2


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "plot"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def trainer(args: SSAMTrainingArguments) -> SSAMTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes))
    words = tokenizer()
    data = Dataset.from_dict({"input_ids": words(TEXTS)["input_ids"], "labels": [1, 0, 1, 0] * 2})
    return SSAMTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=words)


def logits(model: torch.nn.Module, words: PreTrainedTokenizerFast) -> list[list[float]]:
    with torch.no_grad():
        return model.eval()(words(TEXTS, return_tensors="pt")["input_ids"]).logits.tolist()


def train(mode: str, argv: list[str]) -> None:
    args = HfArgumentParser(SSAMTrainingArguments).parse_args_into_dataclasses(argv)[0]
    run = trainer(args)
    run.train()
    print("TRAINED", run.state.global_step)
    print("LOGITS", json.dumps(logits(run.model, run.processing_class)))
    if mode == "push":
        Path(args.output_dir, "figures").mkdir(exist_ok=True)
        Path(args.output_dir, "figures", "loss_curve.png").write_bytes(b"\x89PNG picture")
        run.push_to_hub()
        print("PUSHED", run.hub_model_id)


def load(repo: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(repo)
    print("LOGITS", json.dumps(logits(model, AutoTokenizer.from_pretrained(repo))))


def build(output_dir: str, cases: str) -> None:
    for case in json.loads(cases):
        args = SSAMTrainingArguments(output_dir=output_dir, push_to_hub=True, use_cpu=True, report_to="none", **case)
        try:
            print("BUILT", trainer(args).hub_model_id)
        except HubError as error:
            print("REFUSED", error)


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    {"train": lambda mode, *argv: train(mode, list(argv)), "load": load, "build": build}[action](*rest)
