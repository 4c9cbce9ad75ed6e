"""Does sharpness-aware training help where labels are wrong? At equal epochs, at equal cost, and late in the run only.

    python examples/run_study.py run configs/studies/label_noise.yaml          # an hour and more on one core
    python examples/run_study.py run configs/studies/label_noise.yaml --fast

A small ResNet learns 4,000 Fashion-MNIST images of which a share has its label replaced by a random one. Reported are
the accuracy on clean test images after the last epoch, how many of the wrong labels were learnt by heart, and the
calibration. Stopping early is judged on held-out images with labels as wrong as the training's, as a user would have
them; the temperature of the calibration is chosen on held-out images with clean labels.

Tuning draws its images and its held-out ones from parts of the data that the report does not use, and never looks at
the test images.
"""

import json
import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hf_ssam.plots.canvas import canvas, dress, save
from support.calibration import calibration
from support.pictures import Looks, Pictures, accuracy, fashion, fit, logits_of, relabelled, sample, small_resnet
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, Drawn, by_condition, compared

from .finished import model_name

PARTS = {"report": ((0, 40_000), (40_000, 45_000)), "tuning": ((50_000, 60_000), (45_000, 50_000))}
"""Rows of Fashion-MNIST's training images to train on, and to hold out."""


def measure(settings: Settings) -> Row:
    """Train once; see the module."""
    clean, held_out, test = data(settings["part"], settings["held_out"], settings["test"])
    seed, noise = settings["seed"], settings["noise"]
    clean = sample(clean, settings["images"], seed)
    train, wrong = relabelled(clean, noise, seed), relabelled(held_out, noise, seed + 1000)
    model = small_resnet(seed)
    watched = {"held_out_curve": partial(accuracy, pictures=wrong)}
    if test is not None:
        watched["test_curve"] = partial(accuracy, pictures=test)
    looks = Looks(watched, settings["look_every"])
    row = fit(model, train, settings, [looks])
    row |= {"held_out_accuracy": accuracy(model, wrong)}
    if test is not None:
        row |= scores(model, test, held_out) | learnt_by_heart(model, train, clean.labels)
    if settings.get("models"):
        model.save_pretrained(Path(settings["models"]) / model_name(settings))
    return row | {name: json.dumps(curve) for name, curve in looks.curves.items()}


@lru_cache(maxsize=2)
def data(part: str, held_out: int, test: int) -> tuple[Pictures, Pictures, Pictures | None]:
    """Images to draw the training set from, held-out ones, and test images, which tuning does not see."""
    (start, stop), (first, last) = PARTS[part]
    pool = fashion("train", start, stop)
    return pool, fashion("train", first, min(last, first + held_out)), fashion("test", 0, test) if test else None


def scores(model: torch.nn.Module, test: Pictures, held_out: Pictures) -> Row:
    """Accuracy and calibration on the test images."""
    said, chooses = logits_of(model, test.pixels), logits_of(model, held_out.pixels)
    right = (said.argmax(1) == test.labels).double().mean().item()
    return {"test_accuracy": right, **calibration(said, test.labels, (chooses, held_out.labels))}


def learnt_by_heart(model: torch.nn.Module, train: Pictures, clean: torch.Tensor) -> Row:
    """The share of the wrong training labels, and of the right ones, that the model says."""
    hit = logits_of(model, train.pixels).argmax(1) == train.labels
    wrong = train.labels != clean
    shares = {"learnt_wrong": hit[wrong], "learnt_right": hit[~wrong]}
    return {name: float(some.double().mean()) for name, some in shares.items() if len(some)}


MAIN = ("SGD", "SGD, twice the epochs", "SAM", "SSAM", "random perturbation")
ACCURACY = (
    Column("best look", "best_look", ".3f"),
    Column("wrong labels learnt", "learnt_wrong", ".0%"),
    Column("rise of the loss", "rise", ".0%"),
    Column("passes", "passes", ".0f"),
)
CALIBRATION = tuple(
    Column(f"{heading}{after}", f"{column}{scaled}", ".3f")
    for after, scaled in (("", ""), (", scaled", "_scaled"))
    for column, heading in (("ece", "ECE"), ("nll", "NLL"), ("brier", "Brier"))
)


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Accuracy at every share of wrong labels, then calibration."""
    rows = with_stopped_early(rows, plan.baseline)
    parts = []
    for noise, here in by_condition(rows, "noise"):
        parts += [
            f"**{noise:.0%} of the labels are random**\n",
            compared(here, plan.baseline, "test_accuracy", ACCURACY),
        ]
    parts.append("**Calibration** of the same runs; scaled: after temperature scaling\n")
    for noise, here in by_condition(rows.dropna(subset="ece"), "noise"):
        parts += [f"{noise:.0%} random labels\n", compared(here, plan.baseline, "ece", CALIBRATION[1:])]
    return "\n".join(parts)


def with_stopped_early(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """`rows` with the best look at the test images, and with the baseline where held-out accuracy was highest."""
    rows = rows.assign(best_look=[max(json.loads(curve)) for curve in rows["test_curve"]])
    kept = ["arm", "seed", "noise", "passes", "best_look", "cpu_seconds"]
    early = rows.loc[rows["arm"] == baseline, kept].assign(arm=f"{baseline}, stopped early")
    ran = rows.loc[early.index]
    early["test_accuracy"] = [
        stopped(*curves) for curves in zip(ran["held_out_curve"], ran["test_curve"], strict=True)
    ]
    return pd.concat([rows, early], ignore_index=True)


def stopped(held_out_curve: str, test_curve: str) -> float:
    """The test accuracy at the first look with the highest held-out accuracy."""
    held_out, test = json.loads(held_out_curve), json.loads(test_curve)
    return test[held_out.index(max(held_out))]


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`label_noise.png`: accuracy against the share of wrong labels, and over the epochs at the first share run."""
    share, shares = rows["noise"].iloc[0], sorted(rows["noise"].unique())
    axes = canvas(1, 1 + (len(shares) > 1), (6.4, 4.2))
    for number, arm in enumerate(MAIN):
        own = rows[rows["arm"] == arm]
        curves = [curve(run) for _, run in own[own["noise"] == share].iterrows()]
        if curves:
            Drawn(arm, number).curves(axes[0], curves)
        if len(axes) > 1 and len(own):
            Drawn(arm, number).over(axes[1], own["noise"] * 100, own["test_accuracy"] * 100)
    said = "correct on clean test images, %"
    dress(axes[0], f"While training, {share:.0%} of the labels random", "cost: passes over the training set", said)
    if len(axes) > 1:
        dress(axes[1], "After the last epoch", "training labels that are random, %", said, legend=False)
        axes[1].set_xticks([100 * one for one in shares])
    axes[0].figure.suptitle("Wrong labels: SGD learns them by heart, SAM and SSAM learn far fewer")
    save(axes[0], folder / "label_noise.png")


def curve(run: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy in % at each look, against the forward-backward passes over the training set before it."""
    scores = np.array(json.loads(run["test_curve"]))
    epochs = run["passes"] / math.ceil(run["images"] / run["per_device_train_batch_size"])
    return np.linspace(0, epochs, len(scores) + 1)[1:], 100 * scores
