"""DiffusionMBIR: predictor and corrector of a diffusion chain, then one iteration of ADMM-TV across slices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import Coupling, Memory, Solution, difference, difference_adjoint, plus_difference_normal, smooth
from invdiff.errors import UsageError, choose
from invdiff.linalg import cg, slice_dot, total_dot
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.chain import Chain
from invdiff.solvers.common import SINGULAR, ddim, squared_norms

ON = {"noisy": "x, after predictor and corrector", "denoised": "D(x; sigma)"}


@dataclass(frozen=True)
class MBIR(Chain):
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

    With ``on`` "denoised" the same ADMM acts on the estimate x0 = D(x; sigma), and noise follows: x <- x0' + c2 eps +
    c1 z, eps = (x - x0) / sigma, split as in DDIM(eta); no corrector, one network call a level. That is the ADMM-TV
    form of decomposed diffusion sampling (DDS: Chung, Lee and Ye 2024, 3D reconstruction; published with 5 CG
    iterations and the split of noise that solver ``dds`` has), in which CG from x0 moves within the tangent space of
    clean images, where the noisy x has to be drawn to the data against its own noise. It differs from solver ``dds``,
    whose data step keeps near x0 by the weight that the noise of the data calls for: here only few CG iterations do,
    and with many the result fits the noise.

    On a Gaussian prior the mean is not that of the posterior: how much the data weigh is set by the number of CG
    iterations, not by their noise, and null-space components alone follow the prior's chain; without CG's early end
    "denoised" is the projection of DDNM.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options, no coupling) the mean is off by 14 % of its norm where
    half of the pixels are missing, with 1.6 times the variance of the posterior; by 2.9 % for averages of 2 x 2, with
    1.0. On the same data "denoised" is off by 5 % and 3 %, with 0.8 and 0.8 times the variance.

    On CT it takes about as many CG iterations in all as the paper has levels. On a validation slice (128 x 128, 60
    views, FBP 29.0 dB) 50 levels give 16.6 dB with one iteration each, 21.9 with 5 and 34.1 with 20; "denoised" 22.5,
    28.1 and 33.8, or 33.8 with 100 levels of 10; ``dds`` has 35.8 with 20 and ``pnp`` 36.3. With more of them
    "denoised" fits the noise: 32.6 dB with 100 levels of 20, 30.9 with 50 of 40.

    Volumes held: 15: x, d and u of two steps, A^T y, right-hand side, difference of slices, the CG and temporaries.

    Args:
        rho, lam: ADMM penalty and weight of TV, relative to |A|^2, lam in units of the prior's range; published 10 and
            0.04 for 8 views of 256 x 256 and images in [0, 1], where |A|^2 is 389: 0.026 and, in [-1, 1], 2e-4.
        snr: r of the corrector; published 0.16; 0 leaves it out.
        cg_iterations: published 1, and 5 for "denoised"; with few levels 10 to 20, except where A^T A has few
            different eigenvalues (missing pixels, MRI of one coil): CG then ends by itself.
        on: "noisy" (published) or "denoised", see above.
        eta: of "denoised"; 1 is ancestral, 0 draws no noise but the start.
        coupling: slice regulariser P in the place of TV with rho and lam: D is P(D) before anything else, and CG has
            A^T A alone. Inside the CG a quadratic one would be the only term where nothing is measured, whatever its
            weight. None for the published one.
        sigma_max, sigma_min, schedule: of :class:`Chain`, geometric; published 378 to 0.01 in 2000 levels, two network
            calls each.

    Raises:
        UsageError: no CG iteration, eta outside [0, 1], an unknown choice of ``on``.
    """

    rho: float = 0.026
    lam: float = 2e-4
    snr: float = 0.16
    cg_iterations: int = 1
    on: str = "noisy"
    eta: float = 1.0
    coupling: Coupling | None = None
    sigma_max: float = 378.0

    stochastic = True
    default_steps = 200

    def __post_init__(self):
        super().__post_init__()
        choose(self.on, ON, "choice of what mbir's ADMM acts on")
        if not (self.cg_iterations >= 1 and 0 <= self.eta <= 1):
            raise UsageError(
                f"solver mbir needs cg_iterations >= 1 and eta in [0, 1], got {self.cg_iterations} and {self.eta}"
            )

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Per step."""
        return 2 if self.on == "noisy" and self.snr > 0 else 1

    def calls(self, steps):
        return steps * self.network_calls - (self.network_calls > 1)  # the last step has no corrector

    def init(self, problem, prior, sigmas, rng):
        zero = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        known = torch.empty_like(zero[:1])
        for b in problem.blocks():
            known[:, b] = problem.operator.restrict(b).adjoint(problem.y[b])
        norm2 = squared_norms(problem).amax()  # one for the stack, which the differences couple
        memory = {"known": known, "norm2": norm2}
        if self.coupling is None:
            memory |= {"split": zero, "dual": zero}
        return State(sigmas[0] * rng.normal(0, zero), zero, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x0 = prior.denoise(state.x, sigma)
        smoothed, memory = smooth(problem, x0, sigma, self.coupling, state.memory)
        if self.on == "denoised":
            better, memory = self._admm(problem, smoothed, memory)
            old, fresh = ddim(sigma, sigma_next, self.eta)
            x = better + (old / sigma) * (state.x - x0)
            x = x + fresh * rng.normal(state.step + 1, x) if fresh > 0 else x
            return State(x, better, state.step + 1, memory)
        gap = sigma**2 - sigma_next**2
        x = state.x + (gap / sigma**2) * (smoothed - state.x)
        if sigma_next > 0:
            x = x + math.sqrt(gap) * rng.normal(2 * state.step + 1, x)
            x = self._correct(x, prior, sigma, rng.normal(2 * state.step + 2, x)) if self.snr else x
        x, memory = self._admm(problem, x, memory)
        return State(x, x, state.step + 1, memory)

    def _correct(self, x: Tensor, prior, sigma: float, z: Tensor) -> Tensor:
        score = (prior.denoise(x, sigma) - x) / sigma**2
        size = 2 * self.snr**2 * slice_dot(z, z) / slice_dot(score, score).clamp_min(torch.finfo(x.dtype).tiny)
        return x + size * score + (2 * size).sqrt() * z

    def _admm(self, problem: Problem, x: Tensor, memory: Memory) -> Solution:
        rho, lam = self.rho * memory["norm2"], self.lam * memory["norm2"]
        if x.shape[1] == 1 or self.rho == 0 or self.coupling is not None:  # nothing to couple, or done
            return self._solve(problem, memory["known"], x, 0.0), memory
        rhs = memory["known"] + rho * difference_adjoint(memory["split"] - memory["dual"])
        x = self._solve(problem, rhs, x, rho)
        d = difference(x) + memory["dual"]
        split = d.sign() * (d.abs() - lam / rho).clamp_min(0)
        return x, {**memory, "split": split, "dual": d - split}

    def _solve(self, problem: Problem, rhs: Tensor, x: Tensor, rho: float | Tensor) -> Tensor:
        stacked = isinstance(rho, Tensor)

        def normal(v: Tensor, part: Problem) -> Tensor:
            image = part.operator.normal(v)
            return plus_difference_normal(image, v, rho) if stacked else image

        tolerance = SINGULAR * torch.finfo(x.dtype).eps
        dot = slice_dot if problem.operator.slicewise and not stacked else total_dot
        out = torch.empty_like(x)
        for b in [slice(None)] if stacked else problem.blocks():
            part = problem if stacked else problem.restrict(b)
            run = lambda v, part=part: normal(v, part)  # noqa: E731
            start, known = x[:, b], rhs[:, b].expand_as(x[:, b])
            out[:, b] = cg(
                run,
                known,
                start,
                iterations=self.cg_iterations,
                tolerance=tolerance,
                reduction=tolerance,  # where the start is all noise, the right-hand side says nothing of rounding
                dot=dot,
            )
        return out
