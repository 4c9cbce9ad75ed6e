"""`python -m hf_ssam` prints the method table as Markdown, the one that the README shows; with words it is `hf-ssam`."""

from __future__ import annotations

import sys

from .cli import main
from .cli.pages import table as table

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["methods", "--markdown"]))
