"""The models that `label_noise` left, for the studies that look at finished ones."""

from pathlib import Path

from transformers import ResNetForImageClassification

from support.cli import UsageError
from support.study import Settings


def model_of(settings: Settings) -> ResNetForImageClassification:
    """The model of an arm, a share of wrong labels and a seed.

    Raises:
        UsageError: that run is missing.
    """
    folder = Path(settings["models"]) / model_name(settings)
    if not folder.is_dir():
        raise UsageError(f"there is no model {folder}: run configs/studies/label_noise.yaml first, which leaves it")
    return ResNetForImageClassification.from_pretrained(folder).eval()


def model_name(settings: Settings) -> str:
    """The folder of a run's model."""
    return f"{settings['arm']}, noise {settings['noise']:g}, seed {settings['seed']}"
