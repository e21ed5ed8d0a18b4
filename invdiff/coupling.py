"""The 3D augmentation: a regulariser across neighbouring slices that any solver with a data step can take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.linalg import cg, slice_dot, total_dot
from invdiff.problem import Problem


def difference(x: Tensor) -> Tensor:
    """Forward difference along the slice axis (-4), Neumann end: the last one is 0."""
    return torch.cat([x.diff(dim=-4), torch.zeros_like(x[..., -1:, :, :, :])], -4)


def difference_adjoint(v: Tensor) -> Tensor:
    """Exact adjoint of :func:`difference`."""
    inner = v[..., :-1, :, :, :]
    zero = torch.zeros_like(v[..., :1, :, :, :])
    return torch.cat([zero, inner], -4) - torch.cat([inner, zero], -4)


@dataclass(frozen=True)
class TVz:
    """``weight * sum |u(z + 1) - u(z)|``, by one ADMM iteration per solver step with persistent duals.

    The variable splitting of DiffusionMBIR (Chung et al. 2023, section 3.3) with Neumann instead of circular ends.

    Args:
        weight: per unit of u and pixel of the whitened problem; scaled by pixel size / slice spacing.
        rho: ADMM penalty relative to the weight of the quadratic data step.
    """

    weight: float = 10.0
    rho: float = 1.0

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Split variable and scaled dual, both zero."""
        return {"tvz_split": difference(x), "tvz_dual": torch.zeros_like(x)}

    def scaled_weight(self, problem: Problem) -> float:
        """The weight for this spacing."""
        z, row, column = problem.spacing
        return self.weight * min(1.0, (row * column) ** 0.5 / z)


def data_step(
    problem: Problem,
    z: Tensor,
    weight: float,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    coupling: TVz | None = None,
    memory: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2 (+ the coupling), by CG from ``start``.

    Without coupling every slice has its own CG and slices are handled in blocks, so that work memory does not grow
    with their number; with coupling the inner products run over the whole stack.

    Args:
        problem: whitened problem.
        z: proximal centre ``(samples, slices, C, H, W)``.
        weight: 1 / variance around z.
        start: first iterate.
        iterations, tolerance: bounds of CG.
        coupling: slice regulariser with its ``memory``.

    Returns:
        The minimiser (one ADMM iteration of it with a coupling) and the new memory.
    """
    if coupling is None or problem.image_shape[0] == 1:
        out = torch.empty_like(z)
        for b in problem.blocks():
            part, zb = problem.restrict(b), z[..., b, :, :, :]
            out[..., b, :, :, :] = cg(
                lambda v, p=part: p.operator.normal(v) + weight * v,
                part.operator.adjoint(part.y) + weight * zb,
                start[..., b, :, :, :],
                iterations=iterations,
                tolerance=tolerance,
                dot=slice_dot if problem.operator.slicewise else total_dot,
            )
        return out, memory or {}
    memory = memory or coupling.start(start)
    split, dual = memory["tvz_split"], memory["tvz_dual"]
    penalty = coupling.rho * weight
    x = cg(
        lambda v: problem.operator.normal(v) + weight * v + penalty * difference_adjoint(difference(v)),
        problem.operator.adjoint(problem.y) + weight * z + penalty * difference_adjoint(split - dual),
        start,
        iterations=iterations,
        tolerance=tolerance,
        dot=total_dot,
    )
    d = difference(x) + dual
    split = d.sign() * (d.abs() - coupling.scaled_weight(problem) / penalty).clamp_min(0)
    return x, {"tvz_split": split, "tvz_dual": d - split}
