"""A small network trained on its whole batch, and what is measured beside its predicted edge while it trains."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from hf_ssam import TwoPass
from hf_ssam.sharpness import edge_of_stability, top_eigenvalues

from .offline import mnist_5k


class Network(nn.Module):
    """A tanh network with the squared loss on one-hot labels."""

    def __init__(self, inputs: int, width: int = 48, depth: int = 3, classes: int = 10):
        super().__init__()
        sizes = [inputs] + [width] * depth
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, classes))
        self.classes = classes

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Half the squared distance to the one-hot label, averaged over the rows."""
        target = nn.functional.one_hot(labels, self.classes).to(pixels.dtype)
        return SimpleNamespace(loss=0.5 * (self.layers(pixels) - target).square().sum(1).mean())


@dataclass
class Run:
    """What was measured: one number a measurement in every list."""

    method: str
    eta: float
    rho: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eigenvalues: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    stabilities: list[float] = field(default_factory=list)

    def tail(self, values: list[float]) -> np.ndarray:
        """The last 40 % of `values`."""
        return np.array(values[int(0.6 * len(values)) :])

    @property
    def reached(self) -> bool:
        """Whether λ₁ has come within 5 % of its edge, or above."""
        return bool(max(np.array(self.eigenvalues) / np.array(self.edges)) > 0.95)

    @property
    def deviation(self) -> float:
        """Median of λ₁ / edge − 1 over the plateau."""
        return float(np.median(self.tail(self.eigenvalues) / self.tail(self.edges)) - 1)


def digits(count: int) -> dict[str, torch.Tensor]:
    """The whole batch: `count` digits of 14 × 14 pixels, centred."""
    data = mnist_5k()["train"].shuffle(seed=0).select(range(count))
    pixels = torch.tensor(np.stack([np.asarray(image) for image in data["image"]])).float() / 255
    pixels = nn.functional.avg_pool2d(pixels[:, None], 2).flatten(1)
    return {"pixels": pixels - pixels.mean(0), "labels": torch.tensor(data["label"])}


def train(method: str, eta: float, rho: float, batch: dict[str, torch.Tensor], time: float, checks: int) -> Run:
    """Train for `time / eta` steps and measure `checks` times, at w before the step."""
    torch.manual_seed(0)
    model, run = Network(batch["pixels"].shape[1]), Run(method, eta, rho)
    two_pass = TwoPass(model, "sam" if method == "gd" else method, rho=rho)
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    steps = round(time / eta)

    def forward_backward() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    for step in range(steps + 1):
        optimizer.zero_grad()
        report = two_pass.step(forward_backward)
        if step % max(1, steps // checks) == 0:
            measure(run, step, report, top_eigenvalues(model, batch, tol=1e-3).values[0])
        optimizer.step()
    return run


def measure(run: Run, step: int, report, eigenvalue: float) -> None:
    """Note the eigenvalue, and the edge of the method at this ‖g‖ and γ."""
    name = "sgd" if run.method == "gd" else run.method
    norm, scale = report.grad_norm.item(), float(report.scale)
    run.steps.append(step)
    run.losses.append(report.loss.item())
    run.eigenvalues.append(eigenvalue)
    run.scales.append(scale)
    edges = edge_of_stability(run.eta, run.rho, norm, name, scale=scale)
    run.edges.append(edges.edge)
    run.stabilities.append(edges.stability(eigenvalue))
