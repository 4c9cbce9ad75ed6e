"""Curvature of any Transformers model: what sharpness-aware training is for, measured.

    top_eigenvalues      the k largest eigenvalues of the Hessian, and their vectors
    trace                their sum, with its standard error
    spectrum             their density
    ascent_sharpness     rise of the loss in a ball of radius ρ: what SAM lowers
    suggest_rho          ρ at which a method's ascent raises the loss by a tenth
    edge_of_stability    where the largest is predicted to stop growing, given the learning rate and ρ
    loss_line, loss_plane   the loss round the weights

All are matrix-free, take the dictionaries that a collator makes, and leave the model as it was, to the bit.
"""

try:
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError("hf_ssam.sharpness needs scipy: pip install scipy") from error

from .ascent_gap import AscentSharpness, ascent_sharpness
from .edges import Edges, edge_of_stability
from .eigenvalues import Eigenvalues, top_eigenvalues
from .landscape import Line, Plane, loss_line, loss_plane, random_direction
from .objective import Objective
from .radius import RhoSuggestion, suggest_rho
from .stochastic import Spectrum, Trace, spectrum, trace

__all__ = [
    "AscentSharpness",
    "Edges",
    "Eigenvalues",
    "Line",
    "Objective",
    "Plane",
    "RhoSuggestion",
    "Spectrum",
    "Trace",
    "ascent_sharpness",
    "edge_of_stability",
    "loss_line",
    "loss_plane",
    "random_direction",
    "spectrum",
    "suggest_rho",
    "top_eigenvalues",
    "trace",
]
