"""The converted EfficientNet-Lite0 against the network written out in plain PyTorch, and on a photograph."""

from __future__ import annotations

import matplotlib.cbook
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

from support import efficientnet_lite0, offline, offline_models

STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))
"""Blocks, kernel size and stride of each stage: EfficientNet-B0's (Tan and Le 2019, arXiv 1905.11946, Table 1)."""

MILITARY_UNIFORM = 652


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return torch.load(offline.efficientnet_lite0(), weights_only=True)


def convolved(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A convolution padded as TensorFlow's SAME: what is odd goes right and below."""
    lacking = [
        max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)
    ]
    top, left = lacking[0] // 2, lacking[1] // 2
    x = F.pad(x, (left, lacking[1] - left, top, lacking[0] - top))
    return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])


def plain_lite0(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of EfficientNet-Lite0 for normalised images `x`: relu6, no squeeze-and-excitation."""

    def normed(x: Tensor, name: str) -> Tensor:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{kind}"] for kind in kinds), eps=1e-3)

    x = F.relu6(normed(convolved(x, w["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for count, kernel, stride in STAGES:
        for repeat in range(count):
            block, before = f"_blocks.{number}", x
            if f"{block}._expand_conv.weight" in w:
                x = F.relu6(normed(convolved(x, w[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            assert w[f"{block}._depthwise_conv.weight"].shape[-1] == kernel
            x = convolved(x, w[f"{block}._depthwise_conv.weight"], 1 if repeat else stride)
            x = F.relu6(normed(x, f"{block}._bn1"))
            x = normed(convolved(x, w[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + before if repeat else x
            number += 1
    x = F.relu6(normed(convolved(x, w["_conv_head.weight"]), "_bn1"))
    return F.linear(x.mean((2, 3)), w["_fc.weight"], w["_fc.bias"])


@pytest.mark.parametrize("size", [64, 96])
def test_the_conversion_computes_the_same_function(original, size):
    model = efficientnet_lite0.convert(original).double()
    doubles = {name: value.double() for name, value in original.items()}
    x = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = plain_lite0(doubles, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1  # the images make a difference


def test_the_gate_is_one_in_float32_and_hardly_trains(original):
    model = efficientnet_lite0.convert(original).train()
    model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
    gates = {n: p for n, p in model.named_parameters() if ".squeeze_excite." in n}
    assert gates and max(p.grad.abs().max() for p in gates.values()) < 1e-6
    assert torch.sigmoid(torch.tensor(efficientnet_lite0.GATE_BIAS)) == 1.0


def test_a_missing_weight_is_an_error(original):
    with pytest.raises(RuntimeError, match="_fc|classifier"):
        efficientnet_lite0.convert({n: v for n, v in original.items() if n != "_fc.bias"})


def test_the_converted_folder_recognises_a_photograph():
    """matplotlib's picture of Grace Hopper, which shows a naval officer in uniform."""
    folder = offline_models.lite0()
    model = AutoModelForImageClassification.from_pretrained(folder)
    image = PIL.Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)[0]
    assert scores.argmax() == MILITARY_UNIFORM
