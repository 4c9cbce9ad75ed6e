"""The console command `hf-ssam`: one file a command, imported when it is asked for.

hf-ssam methods [--like sam]        hf-ssam plot RUN ...
hf-ssam method ssam                 hf-ssam sharpness MODEL ...
hf-ssam card RUN                    hf-ssam rho MODEL ...
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from ..saved.errors import UsageError

COMMANDS = {
    "methods": "every method in one table",
    "method": "one method: equation, options, cost, paper, when",
    "rho": "which rho to train with, measured on a few batches of a saved model",
    "plot": "the figures of a run, or several runs over each other",
    "card": "the model card of a run, drawn anew with its figures",
    "sharpness": "curvature of saved models, side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is one sentence on standard error and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = words
    try:
        _command(name)(rest)
    except (UsageError, FileNotFoundError, ValueError, NotImplementedError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `hf-ssam methods | head`
        sys.stdout = open(os.devnull, "w")
    return 0


def usage() -> str:
    """What `hf-ssam` says without a command."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return f"usage: hf-ssam COMMAND ...\n\n{lines}\n\nhf-ssam COMMAND --help lists the flags of a command."


def _command(name: str):  # type: ignore[no-untyped-def]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"there is no command {name}: {f'did you mean {near[0]}?' if near else ', '.join(COMMANDS)}")
    with warnings.catch_warnings():  # of packages that others import
        warnings.simplefilter("ignore")
        return importlib.import_module(f".{name}", __name__).main
