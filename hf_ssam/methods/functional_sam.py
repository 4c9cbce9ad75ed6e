"""Functional SAM (Singh, Mobahi, Agarwala, Dauphin, ICML 2025).

    e = ρ g/‖g‖        d = J(w + e)ᵀ G,  J = ∂logits/∂w,  G = ∂L/∂logits at w

SAM's second gradient changes along two paths: the network's Jacobian moves, and so does the loss's derivative at the
logits. On language models the second one prevails, and it is minimised by the logits' scale alone. This method keeps G
of the first pass and moves the Jacobian only. What a loss has beside the logits (a router's auxiliary loss) is
differentiated at `w + e` as SAM does.
"""

from __future__ import annotations

from ..rules.ascent import normalize
from .method import Method, Paper, Rules

PAPER = Paper(
    "Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM",
    "Singh, Sidak Pal and Mobahi, Hossein and Agarwala, Atish and Dauphin, Yann",
    "International Conference on Machine Learning",
    2025,
    "2502.02407",
    "singh2025avoiding",
)


def functional_sam() -> Rules:
    """`e = ρ g/‖g‖`, and the second pass back-propagates the first one's gradient at the logits."""
    return Rules(ascent=normalize, keeps_logit_gradient=True)


METHOD = Method(
    "functional_sam",
    "Functional SAM: d = J(w + ρ g/‖g‖)ᵀ G, the Jacobian of the logits at w + e and the loss's derivative at w.",
    functional_sam,
    rho=0.05,
    paper=PAPER,
    when="Language models trained in full, where SAM lowers the logits instead of the sharpness.",
)
