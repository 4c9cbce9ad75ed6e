"""One method: its equation, options with their defaults, cost, paper, and when to choose it.

hf-ssam method ssam
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..saved.errors import UsageError
from .flags import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page."""
    parser = Parser("method", __doc__)
    parser.add_argument("name", metavar="NAME")
    name = parser.parse_args(argv).name
    from ..methods import METHODS
    from . import pages

    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        way = f"did you mean {near[0]}?" if near else "`hf-ssam methods` lists them"
        raise UsageError(f"there is no method {name}: {way}")
    print(pages.page(METHODS[name]))
