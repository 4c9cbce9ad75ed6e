"""The command that repeats a run, fit to be published: no secrets, no paths of the machine it ran on."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence

SECRET_FLAG = re.compile(r"--?((\w+_)?(hub|hf|auth|access|bearer)_token|token|\w*(api_?key|password|secret))")
"""Flags whose value is a secret; `--pad_token` and its like are not among them."""

SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")


def repeat_command(processes: int = 1) -> str | None:
    """The running program's command line, cleaned; None in a notebook, in `python -c` or at a prompt.

    How `accelerate launch` was configured is not known to the processes that it starts, only how many there are.

    Args:
        processes: Number of processes that train together.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = sys.argv[0]
    if spec is None and (not os.path.isfile(script) or "ipykernel" in script):
        return None
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [script]
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return wrapped([*launcher, *cleaned([*program, *sys.argv[1:]])])


def cleaned(words: Iterable[str]) -> list[str]:
    """`words` without secret flags and their values, with every word made `public`."""
    kept: list[str] = []
    drop_value = False
    for word in words:
        if drop_value and not word.startswith("-"):
            drop_value = False
            continue
        flag, equals, value = word.partition("=")
        secret = SECRET_FLAG.fullmatch(flag.replace("-", "_").replace("__", "--", 1)) is not None
        drop_value = secret and not equals
        if not secret:
            kept.append(flag + equals + public(value) if flag.startswith("-") else public(word))
    return kept


def public(text: str) -> str:
    """`text` with what looks like a token hidden, and absolute paths relative to the working folder or cut short."""
    text = SECRET_VALUE.sub("HIDDEN", text).replace(os.getcwd().rstrip("/") + "/", "")
    if os.path.isabs(text):
        return os.path.join("PATH_TO", os.path.basename(text.rstrip("/")))
    return text.replace(os.path.expanduser("~").rstrip("/") + "/", "~/")


def wrapped(words: Sequence[str], width: int = 100) -> str:
    """`words` quoted for a shell, with a line for each flag where one line would be longer than `width`."""
    line = shlex.join(words)
    if len(line) <= width:
        return line
    starts = [i for i, word in enumerate(words) if i and word.startswith("--")]
    pieces = [words[a:b] for a, b in zip([0, *starts], [*starts, len(words)], strict=True)]
    return " \\\n    ".join(shlex.join(piece) for piece in pieces if piece)
