"""One paper, one file; one table of all of them; and what a method of your own is made of."""

from ..rules.ascent import adaptive, normalize
from ..rules.context import ALWAYS, NEVER, Rule, StepContext, chain, ema, every
from ..rules.descent import orthogonal, renormalize
from ..rules.selection import Selection
from ..rules.tensors import Vector, added, copied, multiplied, scaled
from .method import Method, Paper, Rules
from .options import Option
from .table import METHODS, get_method, register_method

__all__ = [
    "ALWAYS",
    "METHODS",
    "NEVER",
    "Method",
    "Option",
    "Paper",
    "Rule",
    "Rules",
    "Selection",
    "StepContext",
    "Vector",
    "adaptive",
    "added",
    "chain",
    "copied",
    "ema",
    "every",
    "get_method",
    "multiplied",
    "normalize",
    "orthogonal",
    "register_method",
    "renormalize",
    "scaled",
]
