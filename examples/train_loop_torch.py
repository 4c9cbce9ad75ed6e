"""Stable SAM in a bare PyTorch loop, on a network with batch normalisation: no Trainer, no Accelerate, no model hub.

    python examples/train_loop_torch.py                     # a few seconds on one core
    python examples/train_loop_torch.py --accumulate 2      # a step of two micro-batches

A small convolutional network learns 2,000 handwritten digits. The engine needs the model and one function, or a list
of them, one for each micro-batch of the step: it calls each once a pass.
"""

import argparse
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssam import METHODS, TwoPass
from support import offline


def main(flags: argparse.Namespace) -> None:
    """Train, and print one results line."""
    torch.manual_seed(flags.seed)
    (images, labels), (test_images, test_labels) = (digits(split) for split in ("train", "test"))
    model = nn.Sequential(
        *layer(1, 16), *layer(16, 32), *layer(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=flags.lr, momentum=0.9)
    two_pass = TwoPass(model, method=flags.method, rho=flags.rho)

    def forward_backward(chosen: Tensor, share: float) -> Tensor:
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen]) * share
        loss.backward()
        return loss

    for step in range(flags.steps):
        parts = torch.randint(2000, (64,)).chunk(flags.accumulate)
        report = two_pass.step([partial(forward_backward, chosen, len(chosen) / 64) for chosen in parts])
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {report.loss:.4f}, passes {report.passes:g}, scale {float(report.scale):.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
    counted = int(model[1].num_batches_tracked)
    print(f"results after {flags.steps} steps: accuracy {accuracy:.4f}; batches that BatchNorm counted: {counted}")


def layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A convolution of half the resolution, normalised."""
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images of shape (n, 1, 28, 28), in -1 to 1, and their classes."""
    rows = offline.mnist_5k()[split]
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.tensor(pixels).float()[:, None] / 127.5 - 1, torch.tensor(rows["label"][:])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ssam", choices=list(METHODS), help="how the gradient is computed")
    parser.add_argument("--rho", type=float, help="radius; 0 is plain SGD, none the method's own")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step of 64 digits")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
