"""Values as Markdown shows them literally: no field of a card starts a link, a row, a tag or a block of its own."""

from __future__ import annotations

import re
from typing import Any

_ACTIVE = re.compile(r"[\\`*\[\]<>&|~#!$]|(?<![^\W_])_|_(?![^\W_])")
_STARTS_A_BLOCK = re.compile(r"^(\d*)([-+=.)])(?=[\s=+-]|$)")


def one_line(value: Any) -> str:
    """A value on one line: what cannot be printed (line ends, marks that turn the direction) becomes a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def text(value: Any) -> str:
    """A value as plain words of a paragraph, a heading or a table."""
    return _STARTS_A_BLOCK.sub(r"\1\\\2", _ACTIVE.sub(r"\\\g<0>", one_line(value)))


def code(value: Any) -> str:
    """A value as a code span, in a paragraph or in a table: there a bar ends the cell even within backticks."""
    line = one_line(value)
    if not line or "|" in line:
        return f"<code>{text(line)}</code>"
    fence = "`" * (_longest(line) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{gap}{line}{gap}{fence}"


def cell(value: Any) -> str:
    """A value as a table cell: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return text(value)


def fenced(content: str, language: str = "") -> str:
    """A code block that `content` cannot end."""
    fence = "`" * max(3, _longest(content) + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def _longest(content: str) -> int:
    """The longest run of backticks."""
    return max(map(len, re.findall("`+", content)), default=0)
