"""Small image classifiers on Fashion-MNIST in memory, trained by `SSAMTrainer`: what the vision studies share."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.trainer.training_args import SSAMArgumentsMixin

from . import offline
from .runs import passes

MEAN, DEVIATION, CLASSES = 0.2860, 0.3530, 10
OURS = {one.name for one in fields(SSAMArgumentsMixin)} - {"optim", "optim_args"}
KNOWN = {one.name for one in fields(SSAMTrainingArguments)}


@dataclass
class Pictures(Dataset):
    """Pixels (n, 1, 28, 28), standardised, and class numbers (n,); a batch is taken out in one go."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[rows], "labels": self.labels[rows]}

    def rows(self, rows: Any) -> "Pictures":
        """Some of them."""
        return Pictures(self.pixels[rows], self.labels[rows])


def fashion(split: str, start: int = 0, stop: int | None = None) -> Pictures:
    """The rows `start` to `stop` of a split of Fashion-MNIST."""
    images, labels = offline.fashion_mnist_pixels(split)
    pixels = torch.tensor(images[start:stop], dtype=torch.float32)[:, None] / 255
    return Pictures((pixels - MEAN) / DEVIATION, torch.tensor(labels[start:stop], dtype=torch.long))


def sample(pool: Pictures, count: int, seed: int) -> Pictures:
    """`count` of the pool's rows, drawn by `seed`."""
    return pool.rows(torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count])


def relabelled(pictures: Pictures, share: float, seed: int) -> Pictures:
    """Each label is replaced with probability `share` by one drawn from all classes, the true one among them."""
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(pictures), generator=generator) < share
    drawn = torch.randint(CLASSES, (len(pictures),), generator=generator)
    return Pictures(pictures.pixels, torch.where(hit, drawn, pictures.labels))


def small_resnet(seed: int, width: int = 16) -> ResNetForImageClassification:
    """A ResNet of three basic blocks with batch normalisation (78,000 parameters at width 16).

    Channels come last in memory, which takes a third off the time of a pass on the CPU.
    """
    set_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def training_arguments(settings: dict[str, Any], output_dir: str) -> SSAMTrainingArguments:
    """The training arguments among `settings`; without `optim` the base optimizer trains as a stock Trainer's.

    Gradients are not clipped unless `max_grad_norm` says so (the Trainer's own default is 1): clipping hides what
    tells one method's step from another's.
    """
    given = {key: value for key, value in settings.items() if key in KNOWN}
    if "optim" not in given:
        base = {"optim": given["base_optim"], "optim_args": given.get("base_optim_args")}
        given = {key: value for key, value in given.items() if key not in OURS} | base
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    own = {
        "max_grad_norm": 0.0,
        "logging_strategy": "epoch",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return SSAMTrainingArguments(output_dir=output_dir, **{**quiet, **own, **given})


def fit(
    model: nn.Module, train: Dataset, settings: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, float]:
    """Train `model` as `settings` say.

    Returns:
        `steps`, `passes` and `rho_used`; and for a method with two losses `rise`: by how much the ascent raises the
        loss, as a share of it, on average over the first epoch.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = SSAMTrainer(
            model=model,
            args=training_arguments(settings, folder),
            train_dataset=train,
            data_collator=_as_it_is,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = trainer.state.log_history
    found = {"steps": trainer.state.global_step, "passes": round(passes(trainer), 1), "rho_used": trainer.args.rho}
    risen = [e["ssam/ascent_loss"] / e["ssam/loss"] - 1 for e in log if "ssam/ascent_loss" in e]
    return found | ({"rise": risen[0]} if risen else {})


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Tensor, batch: int = 500) -> Tensor:
    """What the model says in evaluation mode, shape (n, classes); it is left in the mode it was in."""
    was_training = model.training
    model.eval()
    said = torch.cat([model(pixel_values=some).logits for some in pixels.split(batch)])
    model.train(was_training)
    return said


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Share of the pictures whose label the model says."""
    return (logits_of(model, pictures.pixels).argmax(1) == pictures.labels).double().mean().item()


class Looks(TrainerCallback):
    """Takes a score every so many epochs: `curves` has a list for each name."""

    def __init__(self, scores: dict[str, Callable[[nn.Module], float]], every: int = 1):
        self.scores, self.every = scores, every
        self.curves: dict[str, list[float]] = {name: [] for name in scores}

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if round(state.epoch) % self.every == 0:
            for name, score in self.scores.items():
                self.curves[name].append(round(score(model), 5))


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
