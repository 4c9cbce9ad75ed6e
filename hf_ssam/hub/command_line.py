"""The command that repeats a run, fit to be published: no secrets, no paths of the machine it ran on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from .redaction import cleaned, without


def repeat_command(processes: int = 1, secrets: Sequence[str] = ()) -> str | None:
    """The running program's command line, cleaned; None in a notebook, in `python -c` or at a prompt.

    How `accelerate launch` was configured is not known to the processes that it starts, only how many there are.

    Args:
        processes: Number of processes that train together.
        secrets: Values that must not appear; argparse takes abbreviated flags, whose names tell nothing.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = sys.argv[0]
    if spec is None and (not os.path.isfile(script) or "ipykernel" in script):
        return None
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [script]
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    words = [without(word, secrets) for word in (*program, *afresh(sys.argv[1:]))]
    return wrapped([*launcher, *cleaned(words)])


def afresh(words: Sequence[str]) -> list[str]:
    """`words` without `--resume_from_checkpoint`: where a run is repeated there is no checkpoint to go on from."""
    kept: list[str] = []
    skips = False
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--resume_from_checkpoint", "--resume-from-checkpoint"):
            skips = not value
        elif skips and not word.startswith("--"):
            skips = False
        else:
            kept.append(word)
            skips = False
    return kept


def wrapped(words: Sequence[str], width: int = 100) -> str:
    """`words` quoted for a shell, with a line for each flag where one line would be longer than `width`."""
    line = shlex.join(words)
    if len(line) <= width:
        return line
    starts = [i for i, word in enumerate(words) if i and word.startswith("--")]
    pieces = [words[a:b] for a, b in zip([0, *starts], [*starts, len(words)], strict=True)]
    return " \\\n    ".join(shlex.join(piece) for piece in pieces if piece)
