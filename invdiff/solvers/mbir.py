"""DiffusionMBIR: predictor and corrector of a diffusion chain, then one iteration of ADMM-TV across slices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import difference, difference_adjoint
from invdiff.errors import UsageError
from invdiff.linalg import cg, slice_dot, total_dot
from invdiff.problem import Problem
from invdiff.schedule import log_snr
from invdiff.solvers.base import Solver, State
from invdiff.solvers.common import squared_norms


@dataclass(frozen=True)
class MBIR(Solver):
    """DiffusionMBIR (Chung et al. 2023, algorithm 1), in the convention x = x0 + sigma n, s(x) = (D(x; sigma) - x) /
    sigma^2.

    predictor  x <- x + (sigma^2 - sigma'^2) s(x) + sqrt(sigma^2 - sigma'^2) z;
    corrector  x <- x + d s(x) + sqrt(2 d) z, d = 2 (snr |z| / |s|)^2, s at the same sigma;
    ADMM       x <- one CG iteration of (A^T A + rho D^T D) x = A^T y + rho D^T (d - u), from x;
               d <- soft(D x + u, lam / rho);  u <- u + D x - d,  D the difference between slices.

    d and u persist over all levels. The data step is that of the noisy x and knows no noise of the data, as published:
    with noisy data it fits the noise. Norms of the corrector are those of each slice (published: means over the batch),
    D has Neumann ends (published: circular), and the last step is noise-free, without corrector (published: noise of
    sigma_min stays; one Kaczmarz correction may follow). One slice, or rho = 0, leaves one CG iteration on A^T A.

    On a Gaussian prior the mean is not that of the posterior: how much the data weigh is set by the number of CG
    iterations, not by their noise, and null-space components alone follow the prior's chain.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options, no coupling) the mean is off by 13 % of its norm where
    half of the pixels are missing, with 1.5 times the variance of the posterior; by 8 % for averages of 2 x 2, with
    1.1. On CT few levels are not enough: 14 dB with 20, 17 with 60 on a validation slice, FBP having 27.

    Volumes held: 16: x, d and u of two steps, A^T y, right-hand side, difference of slices, the CG and temporaries.

    Args:
        rho, lam: ADMM penalty and weight of TV, relative to |A|^2, lam in units of the prior's range; published 10 and
            0.04 for 8 views of 256 x 256 and images in [0, 1], where |A|^2 is 389: 0.026 and, in [-1, 1], 2e-4.
        snr: r of the corrector; published 0.16; 0 leaves it out.
        cg_iterations: published 1.
        sigma_max, sigma_min: schedule, geometric; published 378 to 0.01 in 2000 levels, two network calls each.

    Raises:
        UsageError: no CG iteration.
    """

    rho: float = 0.026
    lam: float = 2e-4
    snr: float = 0.16
    cg_iterations: int = 1
    sigma_max: float = 378.0
    sigma_min: float = 0.01

    stochastic = True
    default_steps = 200
    network_calls = 2

    def __post_init__(self):
        if self.cg_iterations < 1:
            raise UsageError(f"solver mbir needs cg_iterations >= 1, got {self.cg_iterations}")

    def sigmas(self, steps, problem, prior):
        return log_snr(steps, min(self.sigma_max, prior.info.sigma_max), max(self.sigma_min, prior.info.sigma_min))

    def init(self, problem, prior, sigmas, rng):
        zero = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        known = torch.empty_like(zero[:1])
        for b in problem.blocks():
            known[:, b] = problem.operator.restrict(b).adjoint(problem.y[b])
        norm2 = squared_norms(problem).amax()  # one for the stack, which the differences couple
        memory = {"known": known, "norm2": norm2, "split": zero, "dual": zero}
        return State(sigmas[0] * rng.normal(0, zero), zero, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        gap = sigma**2 - sigma_next**2
        x = state.x + (gap / sigma**2) * (prior.denoise(state.x, sigma) - state.x)
        if sigma_next > 0:
            x = x + math.sqrt(gap) * rng.normal(2 * state.step + 1, x)
            x = self._correct(x, prior, sigma, rng.normal(2 * state.step + 2, x)) if self.snr else x
        x, memory = self._admm(problem, x, state.memory)
        return State(x, x, state.step + 1, memory)

    def _correct(self, x: Tensor, prior, sigma: float, z: Tensor) -> Tensor:
        score = (prior.denoise(x, sigma) - x) / sigma**2
        size = 2 * self.snr**2 * slice_dot(z, z) / slice_dot(score, score).clamp_min(torch.finfo(x.dtype).tiny)
        return x + size * score + (2 * size).sqrt() * z

    def _admm(self, problem: Problem, x: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rho, lam = self.rho * memory["norm2"], self.lam * memory["norm2"]
        if x.shape[1] == 1 or self.rho == 0:  # nothing to couple
            return self._solve(problem, memory["known"], x, 0.0), memory
        rhs = memory["known"] + rho * difference_adjoint(memory["split"] - memory["dual"])
        x = self._solve(problem, rhs, x, rho)
        d = difference(x) + memory["dual"]
        split = d.sign() * (d.abs() - lam / rho).clamp_min(0)
        return x, {**memory, "split": split, "dual": d - split}

    def _solve(self, problem: Problem, rhs: Tensor, x: Tensor, rho: float | Tensor) -> Tensor:
        coupled = isinstance(rho, Tensor)

        def normal(v: Tensor, part: Problem) -> Tensor:
            image = part.operator.normal(v)
            return image + rho * difference_adjoint(difference(v)) if coupled else image

        dot = slice_dot if problem.operator.slicewise and not coupled else total_dot
        out = torch.empty_like(x)
        for b in [slice(None)] if coupled else problem.blocks():
            part = problem if coupled else problem.restrict(b)
            run = lambda v, part=part: normal(v, part)  # noqa: E731
            out[:, b] = cg(run, rhs[:, b].expand_as(x[:, b]), x[:, b], iterations=self.cg_iterations, dot=dot)
        return out
