"""Every method in one table: default ρ, passes a step, and when to choose it.

hf-ssam methods
hf-ssam methods --like sam          # names, summaries and papers that hold the word
hf-ssam methods --markdown          # the table of the README
hf-ssam methods --pages             # the page of each
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..saved.errors import UsageError
from .flags import Parser

if TYPE_CHECKING:
    from ..methods import Method


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = flags().parse_args(argv)
    from ..methods import METHODS
    from . import pages

    found = [m for m in METHODS.values() if args.like.lower() in searched(m)]
    if not found:
        raise UsageError(
            f"--like {args.like}: no method has it in its name, summary or paper; leave it out to see all"
        )
    if args.pages:
        print("\n\n".join(map(pages.page, found)))
    elif args.markdown:
        print(pages.table(found))
    else:
        print(f"{pages.lines(found)}\n\nhf-ssam method NAME shows one of them.")


def searched(method: Method) -> str:
    """Where --like looks."""
    return f"{method.name} {method.summary} {method.when} {method.paper.title} {method.paper.authors}".lower()


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser("methods", __doc__)
    parser.add_argument("--like", default="", metavar="WORD")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as the table of the README")
    form.add_argument("--pages", action="store_true", help="the page of each")
    return parser
