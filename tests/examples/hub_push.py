"""Runs the Trainer scripts with `--push_to_hub` on tiny models, in one process whose Hub is the stand-in.

python hub_push.py     models and data go to the working folder, and what a script leaves to a folder of its name
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from support import efficientnet_lite0

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["[PAD]", "[UNK]", "[END]", "who", "where", "is", "bach", "peru", "a", "person", "place"]
COMMON = {
    "--push_to_hub": "true", "--hub_strategy": "end", "--max_steps": 2, "--per_device_train_batch_size": 2,
    "--logging_steps": 1, "--save_strategy": "no", "--report_to": "none", "--use_cpu": "true",
    "--disable_tqdm": "true",
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def rows(path: Path, **columns: list) -> Path:
    """A file of examples, eight of them."""
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines * 4))
    return path


def saved(folder: Path, model: torch.nn.Module) -> Path:
    """A folder with `model` and a tokenizer of a few words."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def image() -> dict:
    for name in ("cat/1.png", "dog/2.png"):
        Path("pets", name).parent.mkdir(parents=True)
        PIL.Image.fromarray(np.full((32, 32, 3), len(name), dtype=np.uint8)).save(Path("pets", name))
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **SMALL))
    model.save_pretrained("vit")
    efficientnet_lite0.processor(32).save_pretrained("vit")
    return {"--model_name_or_path": "vit", "--train_dir": "pets", "--validation_dir": "pets"}


def token() -> dict:
    model = BertForTokenClassification(BertConfig(vocab_size=16, max_position_embeddings=16, **SMALL))
    words = [["who", "is", "bach"], ["where", "is", "peru"]]
    data = rows(Path("tags.json"), tokens=words, ner_tags=[["O", "O", "B"]] * 2)
    return {"--model_name_or_path": saved(Path("bert"), model), "--train_file": data, "--max_seq_length": 8}


def summarization() -> dict:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, decoder_start_token_id=0, eos_token_id=2, **size))
    data = rows(Path("pairs.json"), document=["who is bach", "where is peru"], summary=["a person", "a place"])
    lengths = {"--max_source_length": 8, "--max_target_length": 4, "--validation_file": data}
    return {"--model_name_or_path": saved(Path("t5"), model), "--train_file": data, **lengths}


def clm() -> dict:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=32, eos_token_id=2, **SMALL))
    data = rows(Path("text.json"), text=["who is bach a person", "where is peru a place"])
    folder = saved(Path("llama"), model)
    return {"--model_name_or_path": folder, "--train_file": data, "--block_size": 4, "--lora_r": 2}


def sft() -> dict:
    data = rows(Path("asked.json"), prompt=["who is bach", "where is peru"], completion=[" a person", " a place"])
    return {"--model_name_or_path": "llama", "--train_file": data, "--max_length": 16}


def clm_by(method: str) -> dict:
    data = {"--model_name_or_path": "llama", "--train_file": "text.json", "--block_size": 4}
    return {**data, "--lora_r": 2, "--optim": method}


ON_ADAPTERS = ("random_perturbation", "flat_lora", "bi_lora", "nbar", "obar", "functional_sam", "stale_sam")
RUNS: dict[str, Callable[[], dict]] = {
    "run_image_classification": image,
    "run_token_classification": token,
    "run_summarization": summarization,
    "run_clm": clm,
    "run_sft": sft,
    **{f"run_clm-{method}": partial(clm_by, method) for method in ON_ADAPTERS},
}
"""What is pushed, by its repository's name: the script, and the method where it is not ssam."""


if __name__ == "__main__":
    for name, flags in RUNS.items():
        torch.manual_seed(0)
        script = name.split("-")[0]
        given = {**COMMON, **flags(), "--output_dir": name}
        sys.argv = [str(EXAMPLES / f"{script}.py"), *(str(word) for pair in given.items() for word in pair)]
        importlib.import_module(script).main()
