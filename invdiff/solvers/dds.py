"""Decomposed diffusion sampling: DDIM with a conjugate-gradient data step on the denoised estimate."""

import math
from dataclasses import dataclass

import torch

from invdiff.coupling import Coupling
from invdiff.data_step import data_step, point_spectrum
from invdiff.errors import UsageError
from invdiff.solvers.base import State
from invdiff.solvers.chain import Guided
from invdiff.solvers.common import SINGULAR
from invdiff.solvers.pnp import EXPLAINED, warm_start


@dataclass(frozen=True)
class DDS(Guided):
    """DDS (Chung et al. 2024, algorithm 1 and its noisy form), in the convention x = x0 + sigma n.

    x0 = D(x; sigma);  x0' = CG from x0 for (A^T A + w) u = A^T y + w x0, with
    w = gamma (sigma^2 + s_d^2) / (sigma s_d)^2, the inverse variance of x0 given x for data of spread s_d;
    x <- x0' + sigma' (sqrt(1 - eta^2) eps + eta z), eps = (x - x0) / sigma.

    The published noisy form has a constant weight that ignores the measurement noise, and 5 iterations of plain CG
    whatever they leave; here y is whitened, so the weight is that of the noise, and CG is preconditioned and ends at an
    error of x0' (from fewer data than pixels: :mod:`invdiff.data_space`). eta is the parameter of DDS (Kawar form), not
    DDIM's. gamma = 0 is the published noiseless form: plain CG of A^T A u = A^T y from x0, which takes the data for
    exact and keeps near x0 by ending early. ADMM-TV across slices as in the published 3D form is in solver ``mbir``
    with ``on`` "denoised", with noise split as in DDIM(eta), not as here. Published: 50 levels, even in time, from
    noise alone; here even in log-SNR.

    On a Gaussian prior the mean is not that of the posterior: w stands for the inverse covariance of x0 given x, which
    differs between directions, and gamma below 1 makes the covariance larger. Samples spread too little: x0' is a mean,
    fresh noise of sigma' is put on it, and what x0 given x and y spreads around that mean is lost at every step.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean is off by 8 % of its norm where half of the
    pixels are missing, with 0.6 times the variance of the posterior; by 0.6 % for averages of 2 x 2, with 0.4.

    Volumes held: 6, and 8 of 32 slices; 4 more with a coupling: x and x0 of two steps, half a one of spectrum, the CG
    (and twice the data, where these are fewer than the pixels).

    Args:
        eta: share of fresh noise, in [0, 1]; published 0.15 to 0.85, 1 was better with the embedded prior (validation).
        gamma: factor of the weight of x0; 1 is Bayes' rule, 0 takes the data for exact. Chosen with the embedded prior
            (validation, 128 x 128, 20 steps, 0.3, 0.6 and 1: CT of 30 views 33.7, 33.4, 33.1 dB, of 60 views 35.1,
            35.8, 35.2, low dose 33.2 at 0.5, 34.9 at 0.7; in 50 steps 35.3 at 0.6, 35.0 at 1).
        cg_iterations: most Krylov steps, published 5, which gamma = 0 needs, as nothing else keeps it off the noise.
            With a weight CG to its end is better than ten iterations (same slice: 30 views 31.9 dB, 60 views 33.0, low
            dose 31.8, 90 degrees 21.3 and 29.8, blur 27.5 and 30.8).
        cg_error: RMS error of x0' at which a slice stops, in units of 1 / sqrt(w), an estimate. 0, or fewer than ten
            iterations: all of them, on images, as published, which for precise CT data are too few (20 views of 64^2,
            1e7 photons: 24.5 dB, and 30.2 with 0.1; gamma = 0 knows no other way). With fewer data than pixels the last
            step goes on until it has explained the data too, as in :class:`PnP`.
        sigma_data: spread s_d of the images in the prior's range.
        warm: start from the warm start plus noise of sigma_max, instead of noise alone.
        coupling: slice regulariser, or None.
        sigma_max, sigma_min, schedule, sampler: of :class:`Chain` and :class:`Guided`; a sampler takes x0' for D.

    Raises:
        UsageError: eta outside [0, 1], gamma or cg_error negative, gamma 0 with a coupling, sigma_data not positive, no
            CG iteration.
    """

    eta: float = 1.0
    gamma: float = 0.6
    cg_iterations: int = 50
    cg_error: float = 0.1
    sigma_max: float = 2.0
    sigma_min: float = 0.01
    sigma_data: float = 0.5
    warm: bool = True
    coupling: Coupling | None = None

    stochastic = True
    default_steps = 50

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.eta <= 1 and min(self.gamma, self.cg_error) >= 0 and self.sigma_data > 0):
            raise UsageError("solver dds needs eta in [0, 1], gamma >= 0, cg_error >= 0 and sigma_data > 0")
        if self.cg_iterations < 1:
            raise UsageError(f"solver dds needs cg_iterations >= 1, got {self.cg_iterations}")
        if self.gamma == 0 and self.coupling is not None:
            raise UsageError(
                "solver dds: gamma = 0 leaves a coupling nothing to weigh against; use solver mbir with on=denoised"
            )

    def init(self, problem, prior, sigmas, rng):
        spectrum = point_spectrum(problem)
        start = warm_start(problem, spectrum).expand(len(rng.samples), *problem.image_shape).clone()
        x = (start if self.warm else 0.0) + sigmas[0] * rng.normal(0, start)
        return State(x, start, 0, {"spectrum": spectrum})

    def estimate(self, problem, prior, x, sigma, memory):
        return self._corrected(problem, prior.denoise(x, sigma), sigma, memory)

    def _corrected(self, problem, x0, sigma, memory, residual=0.0):
        weight = self.gamma * (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        exact = self.gamma == 0
        return data_step(
            problem,
            x0,
            weight,
            x0,
            iterations=self.cg_iterations,
            tolerance=SINGULAR * torch.finfo(x0.dtype).eps if exact else 0.0,
            error=0.0 if exact else self.cg_error / math.sqrt(weight),
            residual=residual,
            spectrum=None if exact else memory["spectrum"],
            coupling=self.coupling,
            memory=memory,
        )

    def published(self, problem, prior, state, sigma, sigma_next, rng):
        x0 = prior.denoise(state.x, sigma)
        corrected, memory = self._corrected(problem, x0, sigma, state.memory, 0.0 if sigma_next else EXPLAINED)
        if sigma_next == 0:
            return State(corrected, corrected, state.step + 1, memory)
        eps = (state.x - x0) / sigma
        noise = math.sqrt(1 - self.eta**2) * eps + self.eta * rng.normal(state.step + 1, x0)
        return State(corrected + sigma_next * noise, corrected, state.step + 1, memory)
