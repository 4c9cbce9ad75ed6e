"""Offline models as folders for ``from_pretrained`` and ``pipeline``, converted once, beside what was fetched."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import efficientnet_lite0, offline
from .cli import UsageError
from .fetching import once


def lite0() -> Path:
    """EfficientNet-Lite0 (4.7M parameters, ImageNet weights): a folder with the model and its image processor."""

    def build(folder: Path, _: Path) -> None:
        original = torch.load(offline.efficientnet_lite0(), weights_only=True)
        efficientnet_lite0.convert(original).save_pretrained(folder)
        efficientnet_lite0.processor().save_pretrained(folder)

    return once("efficientnet-lite0-converted", build)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32 (540 MB), from 4-bit GGUF weights: a folder with the model and its tokenizer.

    Raises:
        UsageError: the package `gguf` is not installed.
    """

    def build(folder: Path, _: Path) -> None:
        source = {"pretrained_model_name_or_path": offline.smollm2(), "gguf_file": offline.SMOLLM2_GGUF}
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        except ImportError as error:
            raise UsageError("the offline language model needs gguf: pip install -c constraints.txt gguf") from error
        # The weights are float32 by now, but a model that came from GGUF refuses to be saved.
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return once("smollm2-135m-converted", build)
