"""A method of your own, in a file of your own: once registered, every argument, checkpoint and card knows its name.

    python examples/custom_method.py configs/tasks/trec.yaml --optim sign_sam
    python examples/custom_method.py configs/tasks/trec.yaml --optim sign_sam --rho 0.1 --optim_args power=0.5

The method perturbs along `s = sign(g) |g|^power`, which is the direction of SAM's perturbation in a ball of another
norm (Foret et al. 2021, eq. 2, with power = 1/(p − 1)): with power 0 all weights move by the same amount (p = ∞), with
power 1 it is SAM. Its length is ρ in the Euclidean norm.

What comes after the registration is the ordinary script; `SSAMTrainingArguments(optim="sign_sam")`
and `TwoPass(model, "sign_sam")` work as well. With several processes each of them runs this file, and so registers it.
"""

import run_text_classification
from hf_ssam.methods import Method, Option, Paper, Rules, StepContext, chain, normalize, register_method
from support.cli import run


def sign_ascent(power: float):
    """A rule, `g -> sign(g) |g|^power`: a pure function of vectors, which are tensors by parameter name."""

    def rule(v, context: StepContext):
        return {name: tensor.sign() * tensor.abs() ** power for name, tensor in v.items()}

    return rule


def sign_sam(power: float) -> Rules:
    """The composition: the ascent above, brought to length 1; the descent is ĝ as it is."""
    return Rules(ascent=chain(sign_ascent(power), normalize))


PAPER = Paper(
    title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
    authors="Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam",
    venue="International Conference on Learning Representations",
    year=2021,
    arxiv="2010.01412",
    key="foret2021sam",
)
SIGN_SAM = Method(
    "sign_sam",
    "SAM along the sign of the gradient: the gradient at w + ρ s/‖s‖ with s = sign(g) |g|^power.",
    sign_sam,
    rho=0.05,
    paper=PAPER,
    options={"power": Option(0.0, "exponent on |g|: 0 is the sign alone, 1 is SAM", 0.0, 1.0)},
)
register_method(SIGN_SAM)


if __name__ == "__main__":
    run(run_text_classification.main)
