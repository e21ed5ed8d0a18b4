"""Annealed plug-and-play: half-quadratic splitting with the denoiser, no noise injected."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import TVz, data_step
from invdiff.problem import Problem
from invdiff.schedule import log_snr
from invdiff.solvers.base import Solver, State


def warm_start(problem: Problem, iterations: int = 10) -> Tensor:
    """A start without a prior, ``(1, slices, C, H, W)``: the operator's pseudo-inverse where it has one, else CG."""
    base = problem.base
    if hasattr(base, "pinv"):
        out = torch.empty(problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        for b in problem.blocks():
            out[b] = (base.restrict(b).pinv(problem.measured[b]) - problem.shift) / problem.scale
        return out[None]
    zero = torch.zeros(1, *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
    return data_step(problem, zero, 1e-3 * problem.operator.mean_square, zero, iterations=iterations, tolerance=1e-3)[0]


@dataclass(frozen=True)
class PnP(Solver):
    """Annealed half-quadratic splitting (Zhang et al. 2021, DPIR, equations 6 and 7), deterministic.

    x0_k = D(x_k; sigma_k);  x_{k+1} = argmin 1/2 |A u - y|^2 + lam / (2 sigma_k^2) |u - x0_k|^2.

    Volumes held: x, x0 and four of the CG (seven and two more with a coupling).

    Args:
        lam: weight of the denoised image against the whitened data; 1 is the Bayesian weight of an error of
            standard deviation sigma_k.
        sigma_max, sigma_min: noise levels of the denoiser, in the prior's range.
        cg_iterations, cg_tolerance: the data step stops at this relative residual.
        coupling: slice regulariser, or None.
    """

    lam: float = 1.0
    sigma_max: float = 0.3
    sigma_min: float = 0.01
    cg_iterations: int = 30
    cg_tolerance: float = 1e-3
    coupling: TVz | None = None

    default_steps = 20

    def sigmas(self, steps, problem, prior):
        return log_snr(steps, self.sigma_max, self.sigma_min)

    def init(self, problem, prior, sigmas, rng):
        x = warm_start(problem)
        return State(x, x)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x0 = prior.denoise(state.x, sigma)
        x, memory = data_step(
            problem,
            x0,
            self.lam / sigma**2,
            x0,
            iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
            coupling=self.coupling,
            memory=state.memory,
        )
        return State(x, x, state.step + 1, memory)
