"""`python -m hf_ssam` prints the README's table of methods; with words it is the command `hf-ssam`."""

from __future__ import annotations

import sys

from .cli import main
from .cli.pages import table as table

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["methods", "--markdown"]))
