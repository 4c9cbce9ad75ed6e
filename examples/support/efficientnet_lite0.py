"""EfficientNet-Lite0's published weights as a native `EfficientNetForImageClassification`.

Lite0 is EfficientNet-B0 without squeeze-and-excitation and with relu6 for swish. Transformers always builds the
squeeze-excite layers, so here they are made to multiply by one: an expanding weight of 0 and a bias of 20 give a gate
of sigmoid(20), which is 1 in float32, whatever the rest of the layer holds; and the gradient through that gate is
about 2e-9, so it stays there.
"""

import re

import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessorPil

GATE_BIAS = 20.0
MEAN, STD = 127 / 255, 128 / 255
"""Of pixels in 0 to 1: the network was trained on ``(x - 127) / 128`` of pixels in 0 to 255."""

BLOCK_PARTS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
OTHER_PARTS = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}


def config() -> EfficientNetConfig:
    """Lite0's configuration.

    ``batch_norm_momentum`` is PyTorch's, the share of the new batch; the default of Transformers, 0.99, is Keras' (the
    share of the past) and would forget all but the last batch. Transformers drops single numbers where EfficientNet
    drops whole samples of a block, so that rate is 0. Image sizes are multiples of 32: the padding is TensorFlow's for
    even sizes.
    """
    return EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.1,
        drop_connect_rate=0.0,
        dropout_rate=0.2,
        num_labels=1000,
    )


def processor(size: int = 224) -> EfficientNetImageProcessorPil:
    """Resizes to `size` × `size` pixels and normalises as Lite0 expects."""
    return EfficientNetImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        rescale_offset=False,
        include_top=False,
    )


def convert(original: dict[str, Tensor]) -> EfficientNetForImageClassification:
    """The model with the weights of `original`, the state dict that the package holds.

    Raises:
        RuntimeError: a weight is missing, left over, or of another shape.
    """
    model = EfficientNetForImageClassification(config())
    state = {name: value for name, value in model.state_dict().items() if ".squeeze_excite." in name}
    for name in (name for name in state if ".squeeze_excite.expand." in name):
        state[name] = torch.full_like(state[name], GATE_BIAS if name.endswith("bias") else 0.0)
    state |= {_renamed(name): value for name, value in original.items()}
    model.load_state_dict(state)
    return model.eval()


def _renamed(name: str) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if inside:
        return f"efficientnet.encoder.blocks.{inside[1]}.{BLOCK_PARTS[inside[2]]}.{inside[3]}"
    part, kind = name.split(".")
    return f"{OTHER_PARTS[part]}.{kind}"
