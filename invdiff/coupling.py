"""The 3D augmentation: a regulariser across neighbouring slices that any solver with a data step can take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from invdiff.problem import Problem

Weight = float | Tensor
Memory = dict[str, Tensor]
Solution = tuple[Tensor, Memory]  # an image and the new memory
SPREAD = 0.5  # of images in the prior's range, standard deviation
KNEE = 0.1  # differences below, in units of s, are where a gradient takes TV for a parabola
ROUNDS = 10  # of ADMM in a step that applies no operator


def difference(x: Tensor) -> Tensor:
    """Forward difference along the slice axis (-4), Neumann end: the last one is 0."""
    return torch.cat([x.diff(dim=-4), torch.zeros_like(x[..., -1:, :, :, :])], -4)


def difference_adjoint(v: Tensor) -> Tensor:
    """Exact adjoint of :func:`difference`."""
    inner = v[..., :-1, :, :, :]
    zero = torch.zeros_like(v[..., :1, :, :, :])
    return torch.cat([zero, inner], -4) - torch.cat([inner, zero], -4)


def plus_difference_normal(image: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``image + weight D^T D x`` of :func:`difference` D, one weight for all slices, in few passes."""
    jumps = weight * x.diff(dim=-4)
    out = image.clone()
    out[..., 1:, :, :, :] += jumps
    out[..., :-1, :, :, :] -= jumps
    return out


@dataclass(frozen=True)
class TVz:
    """``(weight / s) sum |u(z + 1) - u(z)|``, by one ADMM iteration per solver step with persistent duals.

    The variable splitting of DiffusionMBIR (Chung et al. 2023, section 3.3) with Neumann instead of circular ends. s is
    the standard deviation that the data step gives to its centre, so that ``weight`` is a threshold in units of s and
    anneals with it: a constant weight smooths hundreds of HU away in the first steps.

    Args:
        weight: dimensionless; scaled by pixel size / slice spacing.
        rho: ADMM penalty relative to 1 / s^2. At 1 the split variable, which is that of the step before, holds the
            differences back by up to 80 % and costs more than the coupling gains.
    """

    weight: float = 0.1
    rho: float = 0.1

    def start(self, x: Tensor, memory: Memory) -> Memory:
        """The memory with, where it lacks them, the split variable, the differences of ``x`` ``(samples, slices, C, H,
        W)``, and the dual, zero and not scaled by the penalty, which changes."""
        if "tvz_split" in memory:
            return memory
        return {**memory, "tvz_split": difference(x), "tvz_dual": torch.zeros_like(x)}

    def penalty(self, problem: Problem, weight: Weight) -> Weight:
        """Factor of half the squared differences in a data step of ``weight`` = 1 / s^2."""
        return self.rho * weight

    def force(self, memory: Memory, penalty: Weight) -> Tensor:
        """What the split variable and the dual add to the right-hand side of the data step, before D^T."""
        return penalty * memory["tvz_split"] - memory["tvz_dual"]

    def pull(self, memory: Memory, penalty: Weight) -> Weight:
        """What they add to it."""
        return difference_adjoint(self.force(memory, penalty))

    def update(self, problem: Problem, x: Tensor, weight: Weight, memory: Memory) -> Memory:
        """Split variable and dual after a data step that ended in ``x``."""
        penalty = self.penalty(problem, weight)
        d = difference(x) + memory["tvz_dual"] / penalty
        threshold = self.weight * weight**0.5 * nearness(problem) / penalty
        split = d.sign() * (d.abs() - threshold).clamp_min(0)
        return {"tvz_split": split, "tvz_dual": penalty * (d - split)}

    def smooth(self, problem: Problem, x: Tensor, weight: float, memory: Memory) -> Solution:
        """argmin_u weight / 2 |u - x|^2 + this, by ADMM of penalty ``weight`` from the dual of the step before.

        Returns:
            u, and the dual in units of 1 / s, which anneals with it.
        """
        threshold = self.weight * weight**-0.5 * nearness(problem)
        dual = memory["tvz_force"] * weight**-0.5 if "tvz_force" in memory else torch.zeros_like(x)
        system, u = smoother(x, 1.0), x - difference_adjoint(dual)
        for _ in range(ROUNDS):
            d = difference(u) + dual
            split = d.sign() * (d.abs() - threshold).clamp_min(0)
            dual = d - split
            u = system(x + difference_adjoint(split - dual))
        return u, {"tvz_force": dual * weight**0.5}

    def gradient(self, problem: Problem, x: Tensor, weight: Weight) -> Tensor:
        """D^T of the sign of the differences, of Huber's function with its knee at ``KNEE`` s."""
        d, knee = difference(x), KNEE * weight**-0.5
        return self.weight * weight**0.5 * nearness(problem) * difference_adjoint(d / d.abs().clamp_min(knee))

    def curvature(self, problem: Problem, weight: Weight) -> Weight:
        """The largest of what :meth:`gradient` is the gradient of; |D|^2 < 4."""
        return 4 * self.weight * nearness(problem) * weight / KNEE


@dataclass(frozen=True)
class QuadraticZ:
    """``weight / (2 s^2) sum (u(z + 1) - u(z))^2``, part of the data step itself; blurs edges across slices.

    Args:
        weight: dimensionless; scaled by the square of pixel size / slice spacing.
    """

    weight: float = 0.05

    def start(self, x: Tensor, memory: Memory) -> Memory:
        """The memory as it is: nothing persists."""
        return memory

    def penalty(self, problem: Problem, weight: Weight) -> Weight:
        """As that of :class:`TVz`."""
        return self.weight * weight * nearness(problem) ** 2

    def force(self, memory: Memory, penalty: Weight) -> Weight:
        """Nothing."""
        return 0.0

    def pull(self, memory: Memory, penalty: Weight) -> Weight:
        """Nothing."""
        return 0.0

    def update(self, problem: Problem, x: Tensor, weight: Weight, memory: Memory) -> Memory:
        """Nothing persists."""
        return {}

    def smooth(self, problem: Problem, x: Tensor, weight: float, memory: Memory) -> Solution:
        """argmin_u weight / 2 |u - x|^2 + this, exactly."""
        return smoother(x, self.weight * nearness(problem) ** 2)(x), {}

    def gradient(self, problem: Problem, x: Tensor, weight: Weight) -> Tensor:
        """Of this, at ``x``."""
        return plus_difference_normal(torch.zeros_like(x), x, self.penalty(problem, weight))

    def curvature(self, problem: Problem, weight: Weight) -> Weight:
        """As that of :class:`TVz`."""
        return 4 * self.penalty(problem, weight)


Coupling = TVz | QuadraticZ
COUPLINGS: dict[str, type[Coupling]] = {"tv-z": TVz, "quadratic-z": QuadraticZ}


def nearness(problem: Problem) -> float:
    """Pixel size / slice spacing, at most 1: how much alike neighbouring slices are, beside neighbouring pixels."""
    z, row, column = problem.spacing
    return min(1.0, (row * column) ** 0.5 / z)


def precision(sigma: float) -> float:
    """1 / s^2 = 1 / sigma^2 + 1 / SPREAD^2, the inverse variance of a pixel of x0 given x0 + sigma n."""
    return 1 / sigma**2 + 1 / SPREAD**2


def smoother(like: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """(I + penalty D^T D)^-1 on images ``(samples, slices, C, H, W)``: one small matrix for every pixel."""
    n = like.shape[1]
    eye = torch.eye(n, dtype=torch.float64).reshape(n, n, 1, 1, 1)
    inverse = torch.linalg.inv(plus_difference_normal(eye, eye, penalty).reshape(n, n)).to(like)
    return lambda v: torch.einsum("ij,njchw->nichw", inverse, v)


def coupled(coupling: Coupling | None, problem: Problem) -> TypeGuard[Coupling]:
    """Whether there is a coupling, and more than one slice for it."""
    return coupling is not None and problem.image_shape[0] > 1


def smooth(problem: Problem, x: Tensor, sigma: float, coupling: Coupling | None, memory: Memory) -> Solution:
    """argmin_u |u - x|^2 / (2 s^2) + the coupling, s from :func:`precision`: a data step without data.

    Args:
        problem: for slices and their spacing.
        x: an estimate of x0, ``(samples, slices, C, H, W)``.
        sigma: noise level.
        coupling: slice regulariser, or None, which leaves ``x`` as it is.
        memory: of the solver.

    Returns:
        u and the new memory.
    """
    if not coupled(coupling, problem):
        return x, memory
    u, own = coupling.smooth(problem, x, precision(sigma), memory)
    return u, {**memory, **own}
