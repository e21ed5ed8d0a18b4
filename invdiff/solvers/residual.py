"""What solvers without a prior share: both maps block by block, residuals per slice, the strength of the operator."""

import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.linalg import slice_dot, total_dot
from invdiff.problem import Problem


def forward(problem: Problem, u: Tensor) -> Tensor:
    """``A u`` of the whitened operator, ``(samples, slices, C, H, W)`` to ``(samples, *y.shape)``, in blocks."""
    blocks = problem.blocks()
    if len(blocks) == 1:
        return problem.operator(u)
    return torch.cat([problem.operator.restrict(b)(u[..., b, :, :, :]) for b in blocks], -4)


def adjoint(problem: Problem, q: Tensor) -> Tensor:
    """``A^T q``, the adjoint of :func:`forward`."""
    blocks = problem.blocks()
    if len(blocks) == 1:
        return problem.operator.adjoint(q)
    return torch.cat([problem.operator.restrict(b).adjoint(q[..., b, :, :, :]) for b in blocks], -4)


def inner(problem: Problem):
    """The inner product that couples what the operator couples: of a slice, or of the whole stack."""
    return slice_dot if problem.operator.slicewise else total_dot


def data_count(problem: Problem) -> Tensor:
    """Data of each slice (of the stack, where the operator acts on it), shaped to divide :func:`inner` of residuals."""
    if not problem.operator.slicewise:
        return torch.full((1, 1, 1, 1), problem.y.numel() * problem.base.measured_fraction).to(problem.y)
    base, per = problem.base, problem.y[0].numel()
    alike = base.restrict(slice(0, 1)) is base
    parts = [base] if alike else [base.restrict(slice(i, i + 1)) for i in range(len(problem.y))]
    counts = torch.tensor([per * p.measured_fraction for p in parts]).to(problem.y)
    return counts.expand(len(problem.y)).reshape(-1, 1, 1, 1).clamp_min(1)


def physical_zero(problem: Problem) -> Tensor:
    """The image that is 0 in physical units, ``(1, slices, C, H, W)``: a start that does not depend on any prior."""
    value = -problem.shift / problem.scale
    return torch.full((1, *problem.image_shape), value, dtype=problem.y.dtype, device=problem.y.device)


def strength(problem: Problem, coupled: bool, probes: int = 16) -> Tensor:
    """Root mean square ``sqrt(trace(A^T A) / n)`` of the columns of the whitened operator, ``(slices, 1, 1, 1)``.

    The signal-to-noise ratio with which a unit step of one pixel is measured by all data together. Hutchinson's
    estimate from random signs, the same in every slice; one value for the stack where it is ``coupled``.
    """
    g = torch.Generator().manual_seed(1)
    shape = problem.image_shape if coupled else problem.image_shape[1:]
    total: Tensor | float = 0.0
    for _ in range(probes):
        z = torch.randn(shape, generator=g).sign().to(problem.y).expand(1, *problem.image_shape)
        y = forward(problem, z)
        total = total + (total_dot if coupled else slice_dot)(y, y)[0]
    pixels = z.numel() if coupled else z[0, 0].numel()
    return (total / (probes * pixels)).sqrt()  # type: ignore[union-attr]


def weights(weight: float | str, share: float, problem: Problem, coupled: bool) -> Tensor:
    """Regularisation weight of each slice, ``(slices, 1, 1, 1)``, or of the stack: the number given, or for "auto"
    ``share`` times the root of the :func:`strength`."""
    if weight == "auto":
        return share * strength(problem, coupled).sqrt()
    count = 1 if coupled else len(problem.y)
    return torch.full((count, 1, 1, 1), float(weight), dtype=problem.y.dtype, device=problem.y.device)


def checked_weight(name: str, weight: float | str) -> float | str:
    """``"auto"``, or a positive number, also where it came as text.

    Raises:
        UsageError: anything else.
    """
    if weight == "auto":
        return weight
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"solver '{name}': weight must be auto or a positive number, got {str(weight)[:40]}")
    return value
