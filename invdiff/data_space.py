"""The data step in the space of the data, where these are fewer than the pixels, as in CT from few views."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.coupling import Memory, Solution, Weight
from invdiff.linalg import cg, slice_dot, total_dot
from invdiff.problem import Problem

FIT = "fit"  # of the memory: q of the last step, (samples, slices, *out_shape), or (samples, *out_shape)


class Bounds(NamedTuple):
    """Where CG ends, as :func:`invdiff.data_step.data_step` has them, and ``residual``: RMS of the whitened residual of
    q, in units of the noise of a datum, down to which CG goes on whatever ``error`` allows; 0 for any."""

    iterations: int
    tolerance: float
    reduction: float
    error: float
    residual: float = 0.0


def few_data(problem: Problem) -> bool:
    """Whether :func:`through_data` serves: fewer data than pixels, and a known diagonal of A A^T."""
    operator = problem.operator
    return math.prod(operator.out_shape) < math.prod(operator.in_shape) and problem.base.row_squares is not None


def through_data(problem: Problem, z: Tensor, weight: Weight, memory: Memory, bounds: Bounds) -> Solution:
    """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2 = z + A^T q,  (A A^T + weight) q = y - A z,  q by CG.

    Vectors are as small as the data, and the diagonal of A A^T, by which CG is preconditioned, takes in at once how
    unequal the weights of the data are, which a circulant of images cannot. With e the error of u and r the residual of
    q, |e|^2 is at most <r, (A A^T + weight)^-1 r>; CG ends where the diagonal estimates that as ``error``^2 per pixel.
    Where views lie closely together their rays are all but the same, and the diagonal says little.

    Args:
        problem: whitened problem with :func:`few_data`.
        z: proximal centre ``(samples, slices, C, H, W)``.
        weight: 1 / variance around z; a number, or one per slice, ``(slices, 1, 1, 1)``.
        memory: its :data:`FIT`, the q of the step before, is the start, 0 where there is none.
        bounds: of CG, its residual measured by the diagonal.

    Returns:
        The minimiser, and the memory with its q.

    Source: the identity (A^T A + w)^-1 A^T = A^T (A A^T + w)^-1.
    """
    joint = not problem.operator.slicewise
    lead = z.shape[:1] if joint else z.shape[:2]
    fit = memory.get(FIT)
    fit = z.new_zeros(*lead, *problem.operator.out_shape) if fit is None else fit
    out, fitted = torch.empty_like(z), torch.empty_like(fit)
    for b in problem.blocks():
        part, own = problem.restrict(b), weight[b] if isinstance(weight, Tensor) and len(weight) > 1 else weight
        fitted[:, b] = solve_gram(part, part.y - part.operator(z[:, b]), own, fit[:, b], bounds)
        out[:, b] = z[:, b] + part.operator.adjoint(fitted[:, b])
    return out, {**memory, FIT: fitted}


def solve_gram(problem: Problem, rhs: Tensor, weight: Weight, start: Tensor, bounds: Bounds) -> Tensor:
    """q with (A A^T + weight) q = ``rhs``, of the slices of a problem with :func:`few_data`, from ``start``.

    Args:
        problem, weight, bounds: as in :func:`through_data`; ``error`` is that of A^T q.
        rhs: whitened data, ``(samples, slices, *out_shape)``, or ``(samples, *out_shape)``.
        start: shaped like ``rhs``.
    """
    operator, joint = problem.operator, not problem.operator.slicewise
    rows = operator.row_squares
    diagonal = weight * torch.ones_like(start) if rows is None else rows + weight
    dot = total_dot if joint else slice_dot
    pixels, data = math.prod(operator.in_shape), math.prod(operator.out_shape)

    def solved(start: Tensor, **bound) -> Tensor:
        return cg(
            lambda q: operator.gram(q) + weight * q,
            rhs,
            start,
            iterations=bounds.iterations,
            precondition=lambda r: r / diagonal,
            dot=dot,
            **bound,
        )

    enough = bounds.error**2 * pixels
    q = solved(start, tolerance=bounds.tolerance, reduction=bounds.reduction, enough=enough)
    if not bounds.residual:
        return q
    size = dot(rhs, rhs).clamp_min(torch.finfo(rhs.dtype).tiny)
    return solved(q, tolerance=bounds.residual * (data / size).sqrt())
