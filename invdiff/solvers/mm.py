"""Moment matching: guidance with the denoiser's own covariance of x0 given x."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff.coupling import Coupling, Memory, coupled, precision
from invdiff.data_space import Bounds, few_data, solve_gram
from invdiff.data_step import FEWEST, preconditioner
from invdiff.errors import UsageError
from invdiff.linalg import cg, gcr, slice_dot, total_dot
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.chain import Guided
from invdiff.solvers.common import chunks, denoise_in_groups, noisy_start
from invdiff.solvers.differences import with_differences


@dataclass(frozen=True)
class MM(Guided):
    """Moment matching posterior sampling (Rozet et al. 2024, section 4; Boys et al. 2023; Finzi et al. 2023).

    p(x0 | x) is taken for a Gaussian of mean D(x; sigma) and covariance C = sigma^2 dD/dx (Tweedie's second formula),
    y given x is then N(A D, A C A^T + I), and E[x0 | x, y] = D + C A^T (I + A C A^T)^-1 (y - A D), which any sampler
    takes for the estimate of a denoiser. The paper solves for the vector of the data; here it is

    D + G z,  (I + B A^T A (G - I)) z = B A^T (y - A D),  G = C / r^2,  B = (A^T A + 1 / r^2)^-1,

    the same for every r; 1 / r^2 = 1 / sigma^2 + 1 / s^2, s = 0.5, is near C, so that G is near I. z = B A^T (y - A D)
    alone, what the data step with r^2 adds to D, would make it PiGDM's estimate. In the space of the data the system is
    as badly conditioned as A A^T, 10^6 and more for CT, and three iterations hardly changed D there (30.6 dB where this
    has 33.6).

    The system is solved by generalised conjugate residuals, since a trained network's Jacobian is neither quite
    symmetric (on CT by 13 to 60 % of its norm) nor positive, and CG, which the paper takes, then diverged. Every
    iteration costs one vector-Jacobian product and one B A^T by CG, without the network.

    On a Gaussian prior E[x0 | x, y] is exact, and the chain ends in samples of the posterior as its steps grow (the
    only solver here that does, without knowing the prior's covariance). On others p(x0 | x) is no Gaussian at high
    noise: modes may be given the wrong weight.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean is off by 3 % of its norm where half of the
    pixels are missing, with 1.0 times the variance of the posterior; by 0.3 % for averages of 2 x 2, with 0.9. What is
    left is the outer iteration, which stops after 3 steps (with 6 it is 1.2 % and 0.3 %), the start at sigma = 2, and
    the finite steps.

    With quadratic-z the differences of slices are further data of the Gaussian system: E[x0 | x, y] stays exact on a
    Gaussian prior, and with a coupling of the same strength at every level the chain ends in samples of the posterior
    that has its precision added.

    A step evaluates the network once and its gradient ``iterations`` + 1 times. Where slices are coupled (by a coupling
    or by the operator) and do not fit into one network call, every gradient evaluates it once more: 5 evaluations a
    step with default options, 100 instead of 20 in 20 steps.

    Volumes held: 4, and 8 of 32 slices; 14 more with a coupling: x and x0 of two steps, what the sampler remembers; the
    data step of a chunk or of the start, and the activations of one network chunk (of four slices with a small
    network).

    Args:
        iterations, tolerance: bounds of the outer iteration (paper: 1 to 5); the residual is relative.
        cg_iterations, cg_tolerance, cg_error: bounds of the CG for B A^T; the last one an RMS error in units of r, for
            data fewer than the pixels, 0 for none.
        warm: start from the warm start plus noise of sigma_max, instead of noise alone.
        coupling: slice regulariser, or None; its differences are further data of the system (quadratic-z exactly, TV-z
            by one ADMM iteration a level), which then couples the stack.
        sigma_max, sigma_min, schedule, sampler: of :class:`Chain` and :class:`Guided`.

    Raises:
        UsageError: no iteration, sampler "own" (it has none).
    """

    iterations: int = 3
    tolerance: float = 1e-3
    cg_iterations: int = 50
    cg_tolerance: float = 1e-5
    cg_error: float = 0.0
    warm: bool = True
    coupling: Coupling | None = None
    sigma_max: float = 2.0
    sampler: str = "ddim:eta=1"

    stochastic = True
    differentiates = True
    default_steps = 50

    def __post_init__(self):
        super().__post_init__()
        if not (self.iterations >= 1 and self.cg_iterations >= 1):
            got = f"got {self.iterations} and {self.cg_iterations}"
            raise UsageError(f"solver mm needs iterations >= 1 and cg_iterations >= 1, {got}")

    @property
    def gradients(self) -> int:
        """One for every outer iteration, and for the end."""
        return self.iterations + 1

    def across(self, problem):
        return coupled(self.coupling, problem) or super().across(problem)

    def init(self, problem, prior, sigmas, rng):
        state = noisy_start(problem, rng, self.warm, sigmas[0])
        if coupled(self.coupling, problem):
            return replace(state, memory=self.coupling.start(state.x0, state.memory))
        return state

    def estimate(self, problem, prior, x, sigma, memory):
        if coupled(self.coupling, problem):
            return self._across(self.coupling, problem, prior, x, sigma, memory)
        out = torch.empty_like(x)
        for b in chunks(problem, prior) if problem.operator.slicewise else [slice(None)]:
            part = problem.restrict(b)
            out[:, b] = self._conditional(part, prior.restrict(b), x[:, b], sigma, memory["spectrum"][:, b])
        return out, memory

    def _across(self, coupling: Coupling, problem: Problem, prior: Prior, x: Tensor, sigma: float, memory: Memory):
        """E[x0 | x, y] of the stack with the coupling as further data, and the new memory."""
        weight = precision(sigma)
        more = with_differences(problem, coupling, weight, memory)
        spectrum = memory["spectrum"] + 2 * coupling.penalty(problem, weight)
        out = self._conditional(more, prior, x, sigma, spectrum)
        return out, {**memory, **coupling.update(problem, out, weight, memory)}

    def _conditional(self, problem: Problem, prior: Prior, x: Tensor, sigma: float, spectrum: Tensor) -> Tensor:
        """E[x0 | x, y] of slices that fit into one network call, or of a stack that the operator couples."""
        operator, weight = problem.operator, precision(sigma)
        dot = slice_dot if operator.slicewise else total_dot
        through_data = self.cg_error > 0 and self.cg_iterations >= FEWEST and few_data(problem)
        precondition = None if through_data else preconditioner(problem, spectrum, weight)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise_in_groups(prior, x, sigma, chunks(problem, prior))
        mean = x0.detach()

        def spread(z: Tensor) -> Tensor:  # C z / r^2
            return sigma**2 * weight * torch.autograd.grad(x0, x, z, retain_graph=True)[0]

        def fitted(data: Tensor) -> Tensor:  # (A^T A + 1 / r^2)^-1 A^T
            if through_data:
                bounds = Bounds(self.cg_iterations, self.cg_tolerance, 0.0, self.cg_error / weight**0.5)
                return operator.adjoint(solve_gram(problem, data, weight, torch.zeros_like(data), bounds))
            return cg(
                lambda u: operator.normal(u) + weight * u,
                operator.adjoint(data),
                torch.zeros_like(mean),
                iterations=self.cg_iterations,
                tolerance=self.cg_tolerance,
                precondition=precondition,
                dot=dot,
            )

        z = gcr(
            lambda z: z + fitted(operator(spread(z) - z)),
            fitted(problem.y - operator(mean)),
            iterations=self.iterations,
            tolerance=self.tolerance,
            precondition=lambda residual: residual,
            dot=dot,
        )
        return mean + spread(z)
