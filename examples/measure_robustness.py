"""How much do saved models lose when their weights are rounded, or noise is added to them?

    python examples/measure_robustness.py runs/ssam runs/adamw --split test        # folders that the examples left
    python examples/measure_robustness.py runs/ssam --data test.csv --bits 8 4 --noise 0.1 --draws 20

Prints the loss of each model, and its accuracy where it is a classifier, as it is and after

- rounding every matrix to so many bits, symmetrically, with one scale for each output channel;
- Gaussian noise of a share of each matrix' root mean square, on average over draws that are the same for all models.

The data is found, and given, as `measure_sharpness.py` does. The models must have the same accuracy to begin with for
the comparison to mean much. Vectors (biases, norms) stay as they are, and the folders are not written to.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import support.run_data  # noqa: F401, enters the offline sets
from hf_ssam.cli.flags import add_data_flags, markdown
from hf_ssam.saved.models import Subject, load_all
from support.cli import run
from support.robustness import damaged

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for; returns a row for each model and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the Hub")
    add_data_flags(parser)
    parser.add_argument("--rows", type=int, default=256, help="rows that it is measured on")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3], help="of the roundings, from 2")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.01, 0.1, 0.3, 1.0], help="shares of the rms")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path("robustness"))
    args = parser.parse_args(argv)
    if min(args.bits, default=2) < 2 or args.draws < 1:
        parser.error(f"--bits {min(args.bits)} and --draws {args.draws}: give bits from 2 and draws from 1")
    measured = [row for subject in load_all(args.models, args) for row in measure(subject, args)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "robustness.json").write_text(json.dumps(measured, indent=1))
    shown = markdown([{name: cell(value) for name, value in row.items()} for row in measured])
    (args.output_dir / "robustness.md").write_text(shown + "\n")
    print(f"{shown}\nwritten to {args.output_dir}")
    return measured


def measure(subject: Subject, args: argparse.Namespace) -> list[Row]:
    """The loss of a model under each change, and its accuracy where the labels are classes."""
    scores = {"loss": mean_loss, **({"accuracy": accuracy} if subject.has_classes else {})}
    rows = []
    for name, score in scores.items():
        found = damaged(subject.model, lambda score=score: score(subject), args.bits, args.noise, args.draws)
        rows.append({"model": subject.name, "data": subject.data, "score": name, **found})
    return rows


@torch.no_grad()
def mean_loss(subject: Subject) -> float:
    """The model's own loss, averaged over the rows."""
    return sum(loss * rows for loss, _, rows in said(subject.model, subject)) / subject.rows


def accuracy(subject: Subject) -> float:
    """The share of the rows whose class the model says."""
    return sum(right for _, right, _ in said(subject.model, subject)) / subject.rows


@torch.no_grad()
def said(model: nn.Module, subject: Subject) -> list[tuple[float, int, int]]:
    """The loss, the number of right answers and the number of rows of each batch."""
    found = []
    for batch in subject.batches:
        out = model(**batch)
        right = int((out.logits.argmax(-1) == batch["labels"]).sum()) if subject.has_classes else 0
        found.append((out.loss.item(), right, len(batch["labels"])))
    return found


def cell(value: Any) -> str:
    """A number in print."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
