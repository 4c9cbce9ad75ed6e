"""AdaSAM (Sun et al., Neural Networks 169, 2024): SAM's gradient in an optimizer of its own.

AMSGrad without bias correction and without an additive epsilon:

    m ← β1 m + (1 − β1) d          v ← β2 v + (1 − β2) d²
    v̂ ← max(v̂, v)                  w ← w − η m / √v̂

with m = v = 0 and v̂ = ε² before the first step: AdaSAM (Sun et al. 2024, arXiv 2303.00565, algorithm 1, as
third parties restate it; the initial m and v are from memory, and the paper's weight decay could not be
established, so it is decoupled and 0 by default). The first step is `η (1 − β1)/√(1 − β2)` a coordinate, 3.16 η
for the usual β, where torch's AMSGrad makes η: learning rates do not carry over from `sam` with
`base_optim=adamw_torch`, which is what most people mean by AdaSAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .method import Method, Paper
from .sam import sam

PAPER = Paper(
    "AdaSAM: Boosting Sharpness-Aware Minimization with Adaptive Learning Rate and Momentum for Training Deep "
    "Neural Networks",
    "Sun, Hao and Shen, Li and Zhong, Qihuang and Ding, Liang and Chen, Shixiang and Sun, Jingwei and Li, "
    "Jing and Sun, Guangzhong and Tao, Dacheng",
    "Neural Networks, 169",
    2024,
    "2303.00565",
    "sun2024adasam",
)


class AdaSAM(torch.optim.Optimizer):
    """AdaSAM's second half; its first, SAM's gradient, is found in `.grad`.

    Args:
        params: parameters or groups of them.
        lr: η > 0.
        betas: β1 and β2, each in [0, 1).
        eps: ε above 1.1e-19, so that float32 holds ε²: no coordinate is divided by less.
        weight_decay: decoupled, `w ← (1 − η · weight_decay) w`.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        holds = eps > 0 and eps * eps >= torch.finfo(torch.float32).tiny
        if not (lr >= 0 and holds and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                f"AdaSAM: lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay} are not allowed together; "
                "choose lr and weight_decay from 0, eps from 1.1e-19, betas from 0 to below 1, such as the defaults."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch declares two overloads
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """One update from `.grad`; moments are kept in float32 or wider, whatever the parameters are in."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, [self._moments(p, group["eps"]) for p in params], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent's, which would round the moments to the parameters' precision."""
        super().load_state_dict(state_dict)
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            if index in state_dict["state"]:
                self.state[p] = {n: t.to(p.device, copy=True) for n, t in state_dict["state"][index].items()}

    def _moments(self, p: Tensor, eps: float) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["m"], state["v"] = torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)
            state["v_max"] = torch.full_like(p, eps * eps, dtype=dtype)
        return state

    def _update(self, params: list[Tensor], moments: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
        m, v, v_max = ([s[name] for s in moments] for name in ("m", "v", "v_max"))
        d = [p.grad.to(s.dtype) for p, s in zip(params, m, strict=True)]  # type: ignore[union-attr]  # all have one
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, d, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, d, d, value=1 - beta2)
        torch._foreach_maximum_(v_max, v)
        steps = torch._foreach_div(m, torch._foreach_sqrt(v_max))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, [s.to(p.dtype) for s, p in zip(steps, params, strict=True)], alpha=-group["lr"])


METHOD = Method(
    "adasam",
    "AdaSAM: SAM's gradient in an AMSGrad of its own, without bias correction.",
    sam,
    rho=0.05,
    paper=PAPER,
    when="To repeat the AdaSAM paper, which brings an optimizer of its own.",
    optimizer=AdaSAM,
    renormalizes=False,
    experimental="the paper's initial moments and weight decay could not be read at their source",
)
