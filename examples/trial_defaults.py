"""The small trial behind the defaults that no paper gives: accuracy of each method over values of its options.

    python examples/trial_defaults.py                              # configs/trials/defaults.yaml, minutes on one core
    python examples/trial_defaults.py my_trial.yaml --seeds 3

A network of two convolutions learns 600 handwritten digits of 8 × 8 pixels, a fifth of whose labels are drawn anew, by
SGD with momentum, and is tested on 1,000. A line for each cell of the file: mean and 95 % interval over the seeds. It
chooses between values; it says nothing about how good a method is elsewhere.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_ssam import TwoPass, get_method
from support.comparison import interval
from train_loop_torch import digits

CELLS = Path(__file__).parents[1] / "configs" / "trials" / "defaults.yaml"
SAMPLES, BATCH, EPOCHS, LR, NOISE = 600, 32, 15, 0.1, 0.2


class Network(nn.Module):
    """Takes its labels and returns its loss, so that methods that pick samples can see theirs."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`pixels` (n, 1, 8, 8) and classes (n,) in; mean loss () and logits (n, 10) out."""
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="?", default=CELLS, help="YAML: a list of method, rho and options")
    parser.add_argument("--seeds", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    (images, labels), (test_images, test_labels) = (digits(split) for split in ("train", "test"))
    train, test = (small(images), labels), (small(test_images), test_labels)
    print("| method | rho | options | accuracy % |\n|---|---|---|---|")
    for cell in yaml.safe_load(flags.cells.read_text()):
        name, rho, options = cell["method"], cell["rho"], cell.get("options", {})
        seeds = tqdm(range(flags.seeds), desc=name, leave=False)
        mean, half = interval(100 * accuracy(name, rho, options, seed, train, test) for seed in seeds)
        print(f"| {name} | {rho:g} | {options or ''} | {mean:.1f} ± {half:.1f} |", flush=True)


def small(images: Tensor) -> Tensor:
    """Images (n, 1, 28, 28) as (n, 1, 8, 8)."""
    return nn.functional.adaptive_avg_pool2d(images, 8)


def batches(generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each batch of the run, shape (BATCH,)."""
    for _ in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=generator)
        yield from order[: SAMPLES // BATCH * BATCH].split(BATCH)


def accuracy(
    method: str, rho: float, options: dict, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Train once, and return the share of test digits that are recognised."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train[0]), generator=generator)[:SAMPLES]
    pixels, labels = train[0][chosen], train[1][chosen]
    drawn = torch.randint(0, 10, labels.shape, generator=generator)
    labels = torch.where(torch.rand(SAMPLES, generator=generator) < NOISE, drawn, labels)
    model, steps = Network(), SAMPLES // BATCH * EPOCHS
    engine = TwoPass(model, get_method(method, **options), rho, dataset_size=SAMPLES, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for ids in batches(generator):

        def forward_backward(indices: Tensor | slice = slice(None), ids: Tensor = ids) -> Tensor:
            loss = model(pixels[ids][indices], labels[ids][indices])["loss"]
            loss.backward()
            return loss

        engine.step(forward_backward, samples=ids)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return (model.net(test[0]).argmax(1) == test[1]).float().mean().item()


if __name__ == "__main__":
    main()
