"""DPM-Solver (single steps, on the noise) and DPM-Solver++ (multistep, on the denoised image)."""

import math
from dataclasses import dataclass

from invdiff.errors import UsageError
from invdiff.samplers.base import Sampler, history, levels, remember


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise UsageError(f"sampler option order must be 1, 2 or 3, got {order}")


@dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """DPM-Solver++ (Lu et al. 2022b), multistep: equation 9 for order 1, algorithm 2 for order 2, one call per step.

    With h = ln(sigma / sigma'), p1 = e^-h - 1, p2 = p1 / h + 1, p3 = p2 / h - 1/2, and D', D'' the derivatives in
    ln(1 / sigma), in units of h, of the polynomial through the last estimates:
    x' = (sigma' / sigma) x - p1 D + p2 D' - p3 D''.  Order 2 as published: p2 D' becomes -p1 D' / 2.

    Order 3 is not in the paper but in its code, which takes half of D'' and is thereby of second order; ``published``
    repeats that, else D'' is whole and the order is 3. A first step is of order 1, a second one of order 2 at most (so
    that a run from noise comes down to order 2 with very many steps), the step to 0 of order 1 (as in the code's option
    for few steps).

    Volumes held: x, as many estimates as the order, and two of work.

    Args:
        order: 1 (DDIM), 2 or 3.
        published: order 3 with the halved curvature of the published code.
    """

    order: int = 2
    published: bool = False

    def __post_init__(self):
        _check_order(self.order)

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        past, before = history(memory, "x0"), levels(memory)
        x0 = denoise(x, sigma)
        memory = remember(memory, sigma, max(1, self.order - 1), x0=x0)
        order = min(self.order, len(past) + 1)
        if sigma_next == 0 or order == 1:
            return x0 + sigma_next / sigma * (x - x0), memory
        h = math.log(sigma / sigma_next)
        p1 = math.expm1(-h)
        r0 = math.log(before[0] / sigma) / h
        slope0 = (x0 - past[0]) / r0
        out = sigma_next / sigma * x - p1 * x0
        if order == 2:
            return out - 0.5 * p1 * slope0, memory
        r1 = math.log(before[1] / before[0]) / h
        p2 = p1 / h + 1
        p3 = p2 / h - 0.5
        slope1 = (past[0] - past[1]) / r1
        change = (slope0 - slope1) / (r0 + r1)
        return out + p2 * (slope0 + r0 * change) - p3 * (1 if self.published else 2) * change, memory


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver (Lu et al. 2022a), single steps: equation 3.7; algorithm 1, r1 = 1/2; algorithm 2, r1 = 1/3, r2 = 2/3.

    With h = ln(sigma / sigma'), s_i = sigma e^(-r_i h) and eps the noise (x - D) / sigma at each stage:
    order 1: x' = x - (sigma - sigma') eps, DDIM's;
    order 2: u = x - (sigma - s_1) eps;  x' = x - (sigma - sigma') eps(u; s_1);
    order 3: u_1 = x - (sigma - s_1) eps;  d_1 = eps(u_1; s_1) - eps;
    u_2 = x - (sigma - s_2) eps - s_2 (r2 / r1) ((e^(r2 h) - 1) / (r2 h) - 1) d_1;  d_2 = eps(u_2; s_2) - eps;
    x' = x - (sigma - sigma') eps - (sigma' / r2) ((e^h - 1) / h - 1) d_2.  The step to 0 is of order 1.

    The paper's "fast" version mixes the orders to meet a number of calls; here every step has the one order.

    Args:
        order: 1, 2 or 3, which is also the number of calls per step.
    """

    order: int = 2

    def __post_init__(self):
        _check_order(self.order)

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return self.order

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x0 = denoise(x, sigma)
        memory = remember(memory, sigma, x0=x0)
        if sigma_next == 0 or self.order == 1:
            return x0 + sigma_next / sigma * (x - x0), memory
        eps = (x - x0) / sigma

        def change(u, level):
            return (u - denoise(u, level)) / level - eps

        h = math.log(sigma / sigma_next)
        out = x - (sigma - sigma_next) * eps
        if self.order == 2:
            s = math.sqrt(sigma * sigma_next)
            return out - (sigma - sigma_next) * change(x - (sigma - s) * eps, s), memory
        s1, s2 = sigma * math.exp(-h / 3), sigma * math.exp(-2 * h / 3)
        d1 = change(x - (sigma - s1) * eps, s1)
        u2 = x - (sigma - s2) * eps - 2 * s2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
        return out - 1.5 * sigma_next * (math.expm1(h) / h - 1) * change(u2, s2), memory
