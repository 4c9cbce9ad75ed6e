"""Stable SAM (Tan, Zhang, Liu, Wang, Hao, JMLR 26, 24-0065, 2025).

    e = ρ g/‖g‖        ĝ = ∇L(w + e)        d = γ ĝ,  γ = ‖g‖/‖ĝ‖

The gradient at `w + e` keeps the direction it found and takes back the length of the gradient at `w`. Plain SAM
shrinks or blows up the step as it looks further away; SSAM keeps it, and with it the range of learning rates in which
training is stable. The rule is `rules.descent.renormalize`, which `renormalize=true` adds to any other method.
"""

from __future__ import annotations

from dataclasses import replace

from ..rules import ascent
from .asam import ETA
from .method import RENORMALIZE, Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy",
    "Tan, Chengli and Zhang, Jiangshe and Liu, Junmin and Wang, Yicheng and Hao, Yunda",
    "Journal of Machine Learning Research, 26",
    2025,
    "2401.07250",
    "tan2025stable",
)


def ssam(normalize: bool, adaptive: bool, eta: float) -> Rules:
    """SAM's ascent, or USAM's; the descent rule is the one that every method has under `renormalize`."""
    return Rules(ascent=ascent.direction(normalize, ascent.adaptive(eta) if adaptive else None))


METHOD = Method(
    "ssam",
    "Stable SAM: the gradient at w + e, rescaled to the length of the gradient at w: d = (‖g‖/‖ĝ‖) ĝ.",
    ssam,
    rho=0.05,
    paper=PAPER,
    when="Start here: SAM with the base optimizer's step length. Over AdamW it stays close to `sam`.",
    options={
        "normalize": Option(True, "e = ρ g/‖g‖; false gives e = ρ g, the form of the SSAM paper"),
        "adaptive": Option(
            False,
            "the geometry of ASAM: T = |w| + η; ρ is then 0.5 unless you say otherwise; γ stays the ratio of the "
            "plain norms, where the official code weights them by |w|",
            rho=0.5,
        ),
        "eta": replace(ETA, only_if=("adaptive", (True,))),
        "renormalize": replace(RENORMALIZE["renormalize"], default=True),
        "max_scale": RENORMALIZE["max_scale"],
    },
)
