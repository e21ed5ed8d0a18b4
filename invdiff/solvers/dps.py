"""Diffusion posterior sampling."""

import math
from dataclasses import dataclass

import torch

from invdiff.linalg import largest_eigenvalue, slice_dot
from invdiff.schedule import log_snr
from invdiff.solvers.base import Solver, State


@dataclass(frozen=True)
class DPS(Solver):
    """DPS (Chung et al. 2023, algorithm 1), ancestral chain, in the convention x = x0 + sigma n.

    x' = x0 + (d / sigma) (x - x0) + u z  with  u^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, d^2 = sigma'^2 - u^2;
    x <- x' - zeta sqrt((1 + sigma^2)(1 + sigma'^2)) grad_x |y - A D(x; sigma)| / |A|.

    The published step acts on x_VP = x / sqrt(1 + sigma^2); the square root carries it over. The norm is not squared
    (as in the published code) and is taken per slice, so that zeta is dimensionless: |A| is the largest singular
    value, the published operators have |A| = 1. No clipping: CT and MR images have no fixed range.

    Volumes held: 8: x and x0 of two steps, the gradient, draws; and the activations of one network chunk.

    Args:
        zeta: step size; published 0.3 (blur, super-resolution) to 1 (phase retrieval).
        sigma_max, sigma_min: schedule.
        warm: start from the warm start plus noise of sigma_max, instead of noise alone.
    """

    zeta: float = 1.0
    sigma_max: float = 20.0
    sigma_min: float = 0.01
    warm: bool = False

    stochastic = True
    differentiates = True
    default_steps = 100

    def sigmas(self, steps, problem, prior):
        return log_snr(steps, min(self.sigma_max, prior.info.sigma_max), max(self.sigma_min, prior.info.sigma_min))

    def init(self, problem, prior, sigmas, rng):
        start = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        if self.warm:
            from invdiff.solvers.pnp import warm_start

            start = start + warm_start(problem)
        return State(start + sigmas[0] * rng.normal(0, start), start, 0, {"norm": self._norms(problem)})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x0, grad = torch.empty_like(state.x), torch.empty_like(state.x)
        for b in self._chunks(problem, prior):
            part, own = problem.restrict(b), prior.restrict(b)
            with torch.enable_grad():
                x = state.x[:, b].detach().requires_grad_()
                estimate = own.denoise(x, sigma)
                residual = part.operator(estimate) - part.y
                first = 2 if problem.operator.slicewise else 1  # one norm per slice, or per sample
                (grad[:, b],) = torch.autograd.grad(residual.flatten(first).norm(dim=-1).sum(), x)
            x0[:, b] = estimate.detach()
        up = math.sqrt(max(0.0, sigma_next**2 * (sigma**2 - sigma_next**2))) / sigma
        down = math.sqrt(max(0.0, sigma_next**2 - up**2))
        x = x0 + (down / sigma) * (state.x - x0)
        if up > 0:
            x = x + up * rng.normal(state.step + 1, x0)
        scale = self.zeta * math.sqrt((1 + sigma**2) * (1 + sigma_next**2)) / state.memory["norm"]
        x = x - scale * grad
        return State(x, x if sigma_next == 0 else x0, state.step + 1, state.memory)

    @staticmethod
    def _norms(problem):
        """|A| of each slice ``(slices, 1, 1, 1)``, or of the stack where the operator couples slices."""
        g = torch.Generator().manual_seed(0)
        start = torch.rand(problem.operator.in_shape, generator=g, dtype=problem.y.dtype).to(problem.y.device)
        start = start.expand(problem.image_shape)
        dot = slice_dot if problem.operator.slicewise else None
        return largest_eigenvalue(problem.operator.normal, start, 30, dot=dot).sqrt()

    @staticmethod
    def _chunks(problem, prior) -> list[slice]:
        """Slices whose activations are held at once: the prior's chunk where slices are independent."""
        if not problem.operator.slicewise:
            return [slice(None)]
        n = len(problem.y)
        size = getattr(prior, "chunk", n)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]
