"""Which ρ to train with: the one at which a method's ascent raises the loss by a tenth, measured on a few batches.

    hf-ssam rho out/trec                                       # on the data that the run in the folder was trained on
    hf-ssam rho bert-base-uncased --data train.csv --method sam
    hf-ssam rho out/trec --method ssam --optim_args normalize=false --batch_size 64

Each batch counts as one optimizer step, so --batch_size should be that of training (times accumulation and
processes). A model that has trained for a while has a smaller loss, and its ρ is smaller, ten times and more where a
head was new. So a model with a new head is trained on the batches before; measure a checkpoint of a run, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..saved.errors import UsageError
from .flags import Parser, add_data_flags, markdown

if TYPE_CHECKING:
    from ..engine.radius import RhoSuggestion
    from ..methods import Method


def main(argv: Sequence[str] | None = None) -> list[RhoSuggestion]:
    """Measure what the command line asks for, and print it."""
    args = flags().parse_args(argv)
    if min(args.batches, args.batch_size) < 1:
        raise UsageError(f"--batches {args.batches} and --batch_size {args.batch_size} must be 1 or more")
    method = chosen(args)
    import torch

    from ..saved.models import load_all
    from ..sharpness import suggest_rho

    args.rows = args.batches * args.batch_size
    found = []
    for subject in load_all(args.models, args):
        begun = time.perf_counter()
        trains = subject.is_new if args.train is None else args.train
        how = {"target": args.target, "perturb": args.perturb}
        how["optimizer"] = partial(torch.optim.AdamW, lr=args.learning_rate) if trains else None
        found.append(suggest_rho(subject.model, subject.batches, method, **how))
        print(report(subject.name, subject.data, found[-1], time.perf_counter() - begun, args.batch_size))
    return found


def chosen(args: argparse.Namespace) -> Method:
    """The method with its options.

    Raises:
        UsageError: there is none of that name.
        ValueError: it has no such option.
    """
    from ..methods import METHODS, get_method
    from ..methods.options import parse_optim_args

    if args.method not in METHODS:
        raise UsageError(f"--method {args.method} does not exist: choose one of {', '.join(METHODS)}")
    return get_method(args.method, **parse_optim_args(args.optim_args))


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser("rho", __doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the Hub")
    parser.add_argument("--method", default="ssam", help="what --optim will be")
    parser.add_argument("--optim_args", help="its options, as name=value,name=value")
    parser.add_argument("--perturb", default="all", help="which parameters: all, norm, or a pattern of names")
    parser.add_argument("--target", type=float, default=0.1, help="rise of the loss, as a share of it")
    parser.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="train on the batches before, with AdamW, until the loss is a sixth; default: where the head is new",
    )
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of --train")
    parser.add_argument("--batches", type=int, default=4, help="how many; more show better how sure the answer is")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of an optimizer step")
    add_data_flags(parser)
    return parser


def report(name: str, data: str, found: RhoSuggestion, seconds: float, batch_size: int) -> str:
    """What was measured, as a table, and what follows from it."""
    lines = [
        {
            "rho": f"{rho:.2g}",
            "rise of the loss": f"{_mean(rises):.1%}",
            "smallest, largest batch": f"{min(rises):.1%}, {max(rises):.1%}",
        }
        for rho, rises in found.rises.items()
    ]
    n = len(found.losses)
    return (
        f"{name} on {n} batches of {batch_size} rows of {data}, mean loss {_mean(found.losses):.3g}, "
        f"{_trained(found)}{seconds:.0f} s:\n\n{markdown(lines)}\n\n{verdict(found)}"
    )


def verdict(found: RhoSuggestion) -> str:
    """The radius, how sure it is, and the flags that train with it."""
    factor = found.high / found.low
    sure = "the batches agree" if factor < 1.5 else f"the batches differ by a factor of {factor:.1f}"
    return (
        f"--optim {found.method} --rho {found.rho:g}: its ascent raises the loss by {found.target:.0%}; "
        f"{found.low:.2g} to {found.high:.2g} by batch, so {sure}."
    )


def _trained(found: RhoSuggestion) -> str:
    return f"after {found.plain_steps} steps of plain training on them, " if found.plain_steps else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
