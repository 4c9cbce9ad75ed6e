"""What one name that we lean on is: `trainer/host.py` has the table of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hook:
    """A name that we lean on.

    Attributes:
        owner: the class or module that has it, by its import path.
        name: the name.
        use: `overrides`, `calls` or `reads` (an attribute, perhaps one that only instances have).
        parameters: an overridden method's, all of them; a called one's, as many as we give. Empty where a signature
            cannot be read or is not ours to know.
        why: what depends on it.
    """

    owner: str
    name: str
    use: Literal["overrides", "calls", "reads"]
    parameters: tuple[str, ...]
    why: str
