"""The model card of a run that has ended, drawn anew: with its figures, and beside the plain optimizer's run.

    hf-ssam card out/trec
    hf-ssam card out/trec --baseline out/trec-adamw

The run is the output folder of a Trainer with a sharpness-aware method whose card has been written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .flags import Parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the card, and say where it is."""
    parser = Parser("card", __doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--baseline", metavar="RUN", help="the same run with the plain optimizer, to compare with")
    args = parser.parse_args(argv)
    from ..hub.card_file import rewrite_card

    path = rewrite_card(args.run, args.baseline)
    print(f"written: {path}")
    return path
