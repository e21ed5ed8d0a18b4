"""Pseudo-inverse guidance of a diffusion chain."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import Coupling
from invdiff.data_space import FIT
from invdiff.data_step import data_step
from invdiff.errors import UsageError
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.chain import Guided
from invdiff.solvers.common import chunks, ddim, denoise_in_groups, noisy_start


@dataclass(frozen=True)
class PiGDM(Guided):
    """Pi-GDM (Song et al. 2023, algorithm 1, noisy form), in the convention x = x0 + sigma n.

    x0 = D(x; sigma);  g = r^2 J^T A^T (r^2 A A^T + I)^-1 (y - A x0), J = dx0/dx, r^2 = (sigma s)^2 / (sigma^2 + s^2);
    x <- x0 + c2 eps + c1 z + w g, the noise split as in DDIM(eta), eps = (x - x0) / sigma.

    r^2 A^T (r^2 A A^T + I)^-1 (y - A x0) = u - x0 with u = argmin 1/2 |A u - y|^2 + 1/(2 r^2) |u - x0|^2, so that one
    data step by CG replaces the pseudo-inverse. The paper's box has sqrt(alpha_t) g, the authors' code sqrt(alpha_s
    alpha_t) g; the latter, the same at the last step, is the g above and is followed. Where pixels are missing that
    code also puts the measured ones into x0, which is not followed. s = 1 is the paper's. With
    ``adaptive`` False g is weighted by (1 - c2 / sigma) sigma^2 / r^2, which makes the chain that of the conditional
    score by Tweedie's formula, and is unstable where r^2 I is a bad model of the covariance.

    On a Gaussian prior r^2 I stands for the covariance of x0 given x; where the prior is white of spread s that is
    exact, and without ``adaptive`` many steps reach the posterior. Elsewhere the mean is off by the difference, and
    ``adaptive``, which applies the whole g at every step, however small, makes samples spread too little.

    On 4 x 4 pixels (spread 0.4, noise 0.05, 100 steps, default options) the mean is off by 5.2 % of its norm where half
    of the pixels are missing, with 0.7 times the variance of the posterior; by 3.4 % for averages of 2 x 2, with 0.8.

    Volumes held: 7, and 5 of 32 slices; 6 more with a coupling: x and x0 of two steps, g, draws, the CG; and the
    activations of one network chunk (of four slices with a small network): where slices are coupled the network is
    evaluated again for its gradient.

    Args:
        eta: DDIM's; published 1.
        guidance: weight w; published 1.
        sigma_data: spread s of the images in the prior's range; published 1.
        adaptive: the published weight of g instead of that of Tweedie's formula.
        cg_iterations, cg_tolerance, cg_error: bounds of the data step; the last one an RMS error in units of r, 0 for
            none.
        warm: start from the warm start plus noise of sigma_max (published: from the pseudo-inverse), or noise alone.
        coupling: slice regulariser of u, or None.
        sigma_max, sigma_min, schedule, sampler: of :class:`Chain` and :class:`Guided`; published 100 steps, even in
            time. A sampler takes x0 + w (sigma / r)^2 g for D, Tweedie's formula for p(x | y), as without ``adaptive``.

    Raises:
        UsageError: eta outside [0, 1], sigma_data not positive, no CG iteration.
    """

    eta: float = 1.0
    guidance: float = 1.0
    sigma_data: float = 1.0
    adaptive: bool = True
    cg_iterations: int = 50
    cg_tolerance: float = 1e-5
    cg_error: float = 0.0
    warm: bool = True
    coupling: Coupling | None = None

    stochastic = True
    differentiates = True
    default_steps = 100

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.eta <= 1 and self.sigma_data > 0 and self.cg_iterations >= 1):
            raise UsageError(
                "solver pigdm needs eta in [0, 1], sigma_data > 0 and cg_iterations >= 1, "
                f"got {self.eta}, {self.sigma_data} and {self.cg_iterations}"
            )

    def across(self, problem):
        return self.coupling is not None or super().across(problem)

    def init(self, problem, prior, sigmas, rng):
        return noisy_start(problem, rng, self.warm, sigmas[0])

    def estimate(self, problem, prior, x, sigma, memory):
        x0, pull, memory = self._pulled(problem, prior, x, sigma, memory)
        return x0 + self.guidance * (1 + (sigma / self.sigma_data) ** 2) * pull, memory

    def _pulled(self, problem: Problem, prior: Prior, x: Tensor, sigma: float, memory: dict[str, Tensor]):
        """x0, g and the new memory, block by block."""
        if self.across(problem):
            return self._guidance(problem, prior, x, sigma, memory)
        x0, pull, fits = torch.empty_like(x), torch.empty_like(x), []
        for b in chunks(problem, prior):
            own = {key: memory[key][:, b] for key in ("spectrum", FIT) if key in memory}
            x0[:, b], pull[:, b], own = self._guidance(problem.restrict(b), prior.restrict(b), x[:, b], sigma, own)
            fits += [own[FIT]] if FIT in own else []
        return x0, pull, memory | ({FIT: torch.cat(fits, 1)} if fits else {})

    def published(self, problem, prior, state, sigma, sigma_next, rng):
        x0, pull, memory = self._pulled(problem, prior, state.x, sigma, state.memory)
        old, fresh = ddim(sigma, sigma_next, self.eta)
        tweedie = (1 - old / sigma) * (1 + (sigma / self.sigma_data) ** 2)
        weight = self.guidance * (1.0 if self.adaptive else tweedie)
        mean = x0 + weight * pull
        if sigma_next == 0:
            return State(mean, mean, state.step + 1, memory)
        noise = (old / sigma) * (state.x - x0) + fresh * rng.normal(state.step + 1, x0)
        return State(mean + noise, x0, state.step + 1, memory)

    def _guidance(self, problem: Problem, prior: Prior, x: Tensor, sigma: float, memory: dict[str, Tensor]):
        """x0, g and the new memory."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise_in_groups(prior, x, sigma, chunks(problem, prior))
        weight = 1 / sigma**2 + 1 / self.sigma_data**2
        u, memory = data_step(
            problem,
            x0.detach(),
            weight,
            x0.detach(),
            iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
            error=self.cg_error / weight**0.5,
            spectrum=memory["spectrum"],
            coupling=self.coupling,
            memory=memory,
        )
        (pull,) = torch.autograd.grad(x0, x, u - x0.detach())
        return x0.detach(), pull, memory
