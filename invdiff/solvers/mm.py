"""Moment matching: guidance with the denoiser's own covariance of x0 given x."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff.coupling import Coupling, Memory, coupled, precision
from invdiff.data_step import circulant
from invdiff.errors import UsageError
from invdiff.linalg import cg, gcr, slice_dot, to_complex, total_dot
from invdiff.operator import LinearOperator
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.chain import Guided
from invdiff.solvers.common import chunks, denoise_in_groups, noisy_start
from invdiff.solvers.differences import with_differences


@dataclass(frozen=True)
class MM(Guided):
    """Moment matching posterior sampling (Rozet et al. 2024, section 4; Boys et al. 2023; Finzi et al. 2023).

    p(x0 | x) is taken for a Gaussian of mean D(x; sigma) and covariance C = sigma^2 dD/dx (Tweedie's second formula),
    y given x is then N(A D, A C A^T + I), and E[x0 | x, y] = D + C A^T v with (I + A C A^T) v = y - A D, which any
    sampler takes for the estimate of a denoiser.

    The system is solved in the space of the data by generalised conjugate residuals, since a trained network's Jacobian
    is neither quite symmetric nor positive (at sigma = 20 an error of 1 % in it is 16 times the variance of the
    images) and CG then diverged on CT. Every iteration costs one vector-Jacobian product. The preconditioner is the
    same system with the circulant covariance (1 / sigma^2 + 1 / S)^-1, S the smoothed power spectrum of D, solved by CG
    on images (Woodbury's formula) without the network.

    On a Gaussian prior E[x0 | x, y] is exact, and the chain ends in samples of the posterior as its steps grow (the
    only solver here that does, without knowing the prior's covariance). On others p(x0 | x) is no Gaussian at high
    noise: modes may be given the wrong weight.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean is off by 5 % of its norm where half of the
    pixels are missing, with 1.0 times the variance of the posterior; by 0.4 % for averages of 2 x 2, with 0.9. What is
    left is the outer iteration, which stops after 3 steps (with 6 it is 2 % and 0.2 %), the start at sigma = 2, and the
    finite steps.

    With quadratic-z the differences of slices are further data of the Gaussian system: E[x0 | x, y] stays exact on a
    Gaussian prior, and with a coupling of the same strength at every level the chain ends in samples of the posterior
    that has its precision added.

    A step evaluates the network once and its gradient ``iterations`` + 1 times. Where slices are coupled (by a coupling
    or by the operator) and do not fit into one network call, every gradient evaluates it once more: 5 evaluations a
    step with default options, 100 instead of 20 in 20 steps.

    Volumes held: 4, and 9 of 32 slices; 14 more with a coupling: x and x0 of two steps, what the sampler remembers; the
    data step of a chunk or of the start, and the activations of one network chunk.

    Args:
        iterations, tolerance: bounds of the outer iteration (paper: 1 to 5); the residual is relative.
        cg_iterations, cg_tolerance: bounds of the preconditioner's data step.
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
        operator = problem.operator
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise_in_groups(prior, x, sigma, chunks(problem, prior))
        mean = x0.detach()
        precision = 1 / sigma**2 + 1 / _power(mean, operator.complex_image)  # of C, by frequency

        def spread(v: Tensor) -> Tensor:  # C v
            return sigma**2 * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

        weigh = circulant(1 / precision, operator.complex_image)

        def shrunk(residual: Tensor) -> Tensor:  # (I + r^2 A A^T)^-1, by Woodbury's formula
            u = cg(
                lambda u: operator.normal(u) + weigh(u),
                operator.adjoint(residual),
                torch.zeros_like(mean),
                iterations=self.cg_iterations,
                tolerance=self.cg_tolerance,
                precondition=circulant(spectrum + precision, operator.complex_image),
                dot=slice_dot if operator.slicewise else total_dot,
            )
            return residual - operator(u)

        residual = problem.y - operator(mean)
        v = gcr(
            lambda v: v + operator(spread(operator.adjoint(v))),
            residual,
            iterations=self.iterations,
            tolerance=self.tolerance,
            precondition=shrunk,
            dot=_data_dot(operator),
        )
        return mean + spread(operator.adjoint(v))


def _power(x: Tensor, whole: bool, width: float = 8.0) -> Tensor:
    """Smooth power spectrum of each image less its mean, shaped like :func:`invdiff.data_step.point_spectrum`."""
    x = to_complex(x) if whole else x
    x = x - x.mean((-2, -1), keepdim=True)
    height, size = x.shape[-2:]
    power = torch.fft.fft2(x).abs().square() / (height * size)
    lag = torch.fft.ifft2(power).real
    i, j = (n * torch.fft.fftfreq(n, dtype=lag.dtype, device=lag.device) for n in (height, size))
    lag = lag * torch.exp(-0.5 * (i[:, None] ** 2 + j**2) / width**2)
    power = torch.fft.fft2(lag).real if whole else torch.fft.rfft2(lag).real
    return power.clamp_min(1e-6)


def _data_dot(operator: LinearOperator):
    """Inner product of data, per sample and slice, or per sample where the operator couples slices."""
    axes = range(-1, -len(operator.out_shape) - 1, -1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        out = a * b
        for axis in axes:
            out = out.sum(axis, keepdim=True)
        return out

    return dot
