"""Moment matching: guidance with the denoiser's own covariance of x0 given x."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import circulant, point_spectrum
from invdiff.errors import UsageError
from invdiff.linalg import cg, slice_dot, total_dot
from invdiff.operator import LinearOperator
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.chain import OWN, Guided
from invdiff.solvers.common import chunks, denoise_in_groups, start_image


@dataclass(frozen=True)
class MM(Guided):
    """Moment matching posterior sampling (Rozet et al. 2024, section 4; Boys et al. 2023; Finzi et al. 2023).

    p(x0 | x) is taken for a Gaussian of mean D(x; sigma) and covariance C = sigma^2 dD/dx (Tweedie's second formula),
    y given x is then N(A D, A C A^T + I), and E[x0 | x, y] = D + C A^T v with (I + A C A^T) v = y - A D, which any
    sampler takes for the estimate of a denoiser.

    The system is solved in the space of the data by CG; every iteration costs one vector-Jacobian product of the
    network. It starts from, and is preconditioned by, the same system with C = r^2 I, r^2 = (sigma s)^2 / (sigma^2 +
    s^2), which is solved by CG on images (Woodbury's formula) and calls no network. A trained network's Jacobian is
    not quite symmetric nor positive: a slice whose curvature is not positive stops there.

    On a Gaussian prior E[x0 | x, y] is exact, and the chain ends in samples of the posterior as its steps grow (the
    only solver here that does, without knowing the prior's covariance). On others p(x0 | x) is no Gaussian at high
    noise: modes may be given the wrong weight.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean is off by 2 % of its norm where half of the
    pixels are missing, with 1.0 times the variance of the posterior; by 0.3 % for averages of 2 x 2, with 1.0. What is
    left is the start at a finite noise level, the outer CG that stops after 3 iterations, and the finite steps.

    Volumes held: 4, and 9 of 32 slices: x and x0 of two steps, what the sampler remembers; the data step of a chunk or
    of the start, and the activations of one network chunk; where slices are coupled the network is evaluated again for
    every product.

    Args:
        iterations, tolerance: bounds of the outer CG (paper: 1 to 5 iterations); the residual is relative.
        sigma_data: spread s of the images in the prior's range, for the preconditioner.
        cg_iterations, cg_tolerance: bounds of the preconditioner's data step.
        warm: start from the warm start plus noise of sigma_max, instead of noise alone.
        sigma_max, sigma_min, schedule, sampler: of :class:`Chain` and :class:`Guided`.

    Raises:
        UsageError: no iteration, sigma_data not positive, sampler "own".
    """

    iterations: int = 3
    tolerance: float = 1e-3
    sigma_data: float = 0.5
    cg_iterations: int = 50
    cg_tolerance: float = 1e-5
    warm: bool = True
    sampler: str = "dpmpp-2m"

    stochastic = True
    differentiates = True
    default_steps = 50

    def __post_init__(self):
        if self.sampler == OWN:
            raise UsageError("solver mm has no move of its own: name a sampler, e.g. ddim:eta=1 or dpmpp-2m")
        super().__post_init__()
        if not (self.iterations >= 1 and self.cg_iterations >= 1 and self.sigma_data > 0):
            raise UsageError(
                "solver mm needs iterations >= 1, cg_iterations >= 1 and sigma_data > 0, "
                f"got {self.iterations}, {self.cg_iterations} and {self.sigma_data}"
            )

    def init(self, problem, prior, sigmas, rng):
        spectrum = point_spectrum(problem)
        start = start_image(problem, rng, self.warm, spectrum)
        return State(start + sigmas[0] * rng.normal(0, start), start, 0, {"spectrum": spectrum})

    def estimate(self, problem, prior, x, sigma, memory):
        out = torch.empty_like(x)
        for b in chunks(problem, prior) if problem.operator.slicewise else [slice(None)]:
            part, own = problem.restrict(b) if problem.operator.slicewise else problem, prior.restrict(b)
            out[:, b] = self._conditional(part, own, x[:, b], sigma, memory["spectrum"][:, b])
        return out, memory

    def _conditional(self, problem: Problem, prior: Prior, x: Tensor, sigma: float, spectrum: Tensor) -> Tensor:
        """E[x0 | x, y] of slices that fit into one network call, or of a stack that the operator couples."""
        operator, weight = problem.operator, 1 / sigma**2 + 1 / self.sigma_data**2
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise_in_groups(prior, x, sigma, chunks(problem, prior))
        mean = x0.detach()

        def spread(v: Tensor) -> Tensor:  # C v
            return sigma**2 * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

        def shrunk(residual: Tensor) -> Tensor:  # (I + r^2 A A^T)^-1, by Woodbury's formula
            u = cg(
                lambda u: operator.normal(u) + weight * u,
                operator.adjoint(residual),
                torch.zeros_like(mean),
                iterations=self.cg_iterations,
                tolerance=self.cg_tolerance,
                precondition=circulant(spectrum + weight, operator.complex_image),
                dot=slice_dot if operator.slicewise else total_dot,
            )
            return residual - operator(u)

        residual = problem.y - operator(mean)
        v = cg(
            lambda v: v + operator(spread(operator.adjoint(v))),
            residual,
            shrunk(residual),
            iterations=self.iterations,
            tolerance=self.tolerance,
            precondition=shrunk,
            dot=_data_dot(operator),
        )
        return mean + spread(operator.adjoint(v))


def _data_dot(operator: LinearOperator):
    """Inner product of data, per sample and slice, or per sample where the operator couples slices."""
    axes = range(-1, -len(operator.out_shape) - 1, -1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        out = a * b
        for axis in axes:
            out = out.sum(axis, keepdim=True)
        return out

    return dot
