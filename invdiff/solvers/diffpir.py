"""DiffPIR: half-quadratic splitting inside a diffusion chain."""

import math
from dataclasses import dataclass

from invdiff.coupling import Coupling
from invdiff.data_step import data_step
from invdiff.errors import UsageError
from invdiff.solvers.base import State
from invdiff.solvers.chain import Guided
from invdiff.solvers.common import noisy_start


@dataclass(frozen=True)
class DiffPIR(Guided):
    """DiffPIR (Zhu et al. 2023, algorithm 1), in the convention x = x0 + sigma n.

    x0 = D(x; sigma);  x0' = argmin 1/2 |A u - y|^2 + lam / (2 sigma^2) |u - x0|^2  (equation 12, rho = lam sigma_n^2 /
    sigma^2, y whitened);  eps = (x - x0') / sigma;  x <- x0' + sigma' (sqrt(1 - zeta) eps + sqrt(zeta) z).

    The last step ends with the data step, the box at alpha = 1; the published code leaves that step out and returns the
    x before it, noise of its last sigma included. That code takes images in [0, 1] and the sigma of images in [-1, 1]:
    its lam is 4 times that of the equation, which is followed here. Published are 100 steps, quadratic in time, from a
    noised y; here they are even in log-SNR, from the warm start plus noise.

    On a Gaussian prior the mean is not that of the posterior: D has already shrunk x by the prior, and the data step
    takes sigma^2 / lam for the variance of its error, where Bayes' rule has sigma^2 s^2 / (sigma^2 + s^2) for data of
    spread s. With lam = 1 the data weigh too much while sigma > s, and the shrinkage adds up while sigma < s.

    On 4 x 4 pixels (spread 0.4, noise 0.05, 100 steps, default options) the mean is off by 7 % of its norm where half
    of the pixels are missing, with 0.6 times the variance of the posterior; by 2 % for averages of 2 x 2, with 0.5. All
    fresh noise on a mean loses what spreads around it. With zeta = 0.3 it is off by 15 % and 2.8 %, with 1.4 and 0.96.

    Volumes held: 5, and 9 of 32 slices; 4 more with a coupling: x, x0, x0', half a one of spectrum, the CG.

    Args:
        lam: weight of the denoised image; published 7 (blur) and 1 (missing pixels), divided by 4 as said above.
        zeta: share of fresh noise, in [0, 1]; published 0.3 (blur), 0.25 (super-resolution), 1 (missing pixels). 1 was
            better everywhere with the embedded prior (validation: missing pixels 31.5 and 35.0 dB in 20 steps, blur
            29.1 and 30.6, MRI 22.6 and 26.2, CT 31.1 and 32.5).
        cg_iterations, cg_tolerance, cg_error: bounds of the data step, which the paper has in closed form; the last one
            an RMS error in units of sigma, 0 for none.
        warm: start from the warm start plus noise of sigma_max, instead of noise alone.
        coupling: slice regulariser, or None.
        sigma_max, sigma_min, schedule, sampler: of :class:`Chain` and :class:`Guided`; published sigma_max 157,
            2 was better from a warm start (validation, as above); a sampler takes x0' for D.

    Raises:
        UsageError: lam not positive, zeta outside [0, 1], no CG iteration.
    """

    lam: float = 1.75
    zeta: float = 1.0
    sigma_max: float = 2.0
    cg_iterations: int = 50
    cg_tolerance: float = 1e-5
    cg_error: float = 0.0
    warm: bool = True
    coupling: Coupling | None = None

    stochastic = True
    default_steps = 100

    def __post_init__(self):
        super().__post_init__()
        if not (self.lam > 0 and 0 <= self.zeta <= 1 and self.cg_iterations >= 1):
            raise UsageError(
                "solver diffpir needs lam > 0, zeta in [0, 1] and cg_iterations >= 1, "
                f"got {self.lam}, {self.zeta} and {self.cg_iterations}"
            )

    def init(self, problem, prior, sigmas, rng):
        return noisy_start(problem, rng, self.warm, sigmas[0])

    def estimate(self, problem, prior, x, sigma, memory):
        x0 = prior.denoise(x, sigma)
        return data_step(
            problem,
            x0,
            self.lam / sigma**2,
            x0,
            iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
            error=self.cg_error * sigma,
            spectrum=memory["spectrum"],
            coupling=self.coupling,
            memory=memory,
        )

    def published(self, problem, prior, state, sigma, sigma_next, rng):
        x0, memory = self.estimate(problem, prior, state.x, sigma, state.memory)
        if sigma_next == 0:
            return State(x0, x0, state.step + 1, memory)
        eps = (state.x - x0) / sigma
        noise = math.sqrt(1 - self.zeta) * eps + math.sqrt(self.zeta) * rng.normal(state.step + 1, x0)
        return State(x0 + sigma_next * noise, x0, state.step + 1, memory)
