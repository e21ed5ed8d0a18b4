"""Pieces that several solvers share: DDIM's split of the noise, norms of the operator, groups of slices, starts."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invdiff.data_step import point_spectrum
from invdiff.draws import Draws
from invdiff.linalg import largest_eigenvalue, slice_dot
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.pnp import warm_start

SINGULAR = 30  # times the machine's epsilon: where CG on A^T A alone ends, before it follows rounding in the null space


def ddim(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Factors (c2, c1) of old and fresh noise in x' = x0 + c2 eps + c1 z, with c1^2 + c2^2 = sigma'^2.

    c1 = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma (Song et al. 2021, DDIM, equation 16, in x = x0 + sigma n).
    """
    fresh = eta * sigma_next * math.sqrt(max(0.0, sigma**2 - sigma_next**2)) / sigma
    return math.sqrt(max(0.0, sigma_next**2 - fresh**2)), fresh


def squared_norms(problem: Problem) -> Tensor:
    """|A|^2 of each slice ``(slices, 1, 1, 1)``; of the stack, ``(1, 1, 1, 1)``, where the operator couples slices."""
    g = torch.Generator().manual_seed(0)
    start = torch.rand(problem.operator.in_shape, generator=g, dtype=problem.y.dtype).to(problem.y.device)
    if not problem.operator.slicewise:
        return largest_eigenvalue(problem.operator.normal, start, 30).reshape(1, 1, 1, 1)
    parts = []
    for b in problem.blocks():
        part = problem.restrict(b)
        normal = part.operator.normal
        parts.append(largest_eigenvalue(normal, start.expand(part.image_shape), 30, dot=slice_dot))
    return torch.cat(parts)


def mean_squares(problem: Problem) -> Tensor:
    """trace(A^T A) / n of each slice, ``(slices, 1, 1, 1)``, or of the stack: from unit vectors where n is small, else
    by Hutchinson's estimator with at least 8 images of +-1, the same ones for every slice (relative error 1 % or less).
    """
    shape = problem.operator.in_shape
    n, kind = math.prod(shape), problem.y.dtype
    g = torch.Generator().manual_seed(1)
    count = n if n <= 64 else max(8, 2**17 // n)
    probes = torch.eye(n, dtype=kind) * n**0.5 if n <= 64 else torch.randn((count, n), generator=g, dtype=kind).sign()
    total = torch.zeros((), dtype=kind, device=problem.y.device)
    for probe in probes.to(problem.y.device):
        x = probe.reshape(shape).expand(problem.image_shape)
        if not problem.operator.slicewise:
            total = total + (x * problem.operator.normal(x)).sum().reshape(1, 1, 1, 1)
            continue
        normal = [problem.operator.restrict(b).normal(x[b]) for b in problem.blocks()]
        total = total + slice_dot(x, torch.cat(normal))
    return total / (count * n)


def of(values: Tensor, block: slice) -> Tensor:
    """Values of the slices of a block, or the one value of a stack that the operator couples."""
    return values[block] if len(values) > 1 else values


def at_once(problem: Problem, prior: Prior) -> int:
    """Slices whose activations are held at once where the network is differentiated: those of a network call, or of
    several, ``prior.together``, since CT projects four slices in about the time of one."""
    return max(prior.chunk, min(prior.together, problem.block))


def chunks(problem: Problem, prior: Prior) -> list[slice]:
    """Groups of :func:`at_once`; all slices where the prior sees more than one at a time."""
    n, size = problem.image_shape[0], at_once(problem, prior)
    if not prior.slicewise:
        return [slice(None)]
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def denoise_in_groups(prior: Prior, x: Tensor, sigma: float, groups: list[slice]) -> Tensor:
    """D(x; sigma) with a graph; of several groups of slices each makes its activations again for the gradient."""
    if len(groups) == 1:
        return prior.denoise(x, sigma)
    run = lambda b: checkpoint(prior.restrict(b).denoise, x[:, b], sigma, use_reentrant=False)  # noqa: E731
    return torch.cat([run(b) for b in groups], 1)


def start_image(problem: Problem, rng: Draws, warm: bool, spectrum: Tensor | None = None) -> Tensor:
    """The warm start, or zeros, once per sample: ``(samples, slices, C, H, W)``."""
    shape = (len(rng.samples), *problem.image_shape)
    if not warm:
        return torch.zeros(shape, dtype=problem.y.dtype, device=problem.y.device)
    origin = problem.operator.origin
    return (warm_start(problem, spectrum) if origin is None else origin).expand(shape).clone()


def noisy_start(problem: Problem, rng: Draws, warm: bool, sigma: float) -> State:
    """:func:`start_image` plus noise of ``sigma`` (draw 0); the state keeps the "spectrum" for data steps."""
    spectrum = point_spectrum(problem)
    start = start_image(problem, rng, warm, spectrum)
    return State(start + sigma * rng.normal(0, start), start, 0, {"spectrum": spectrum})
