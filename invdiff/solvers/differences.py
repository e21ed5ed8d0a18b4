"""A slice coupling as further data of a linear operator, for solvers that work in the space of the data."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from invdiff.coupling import Coupling, Memory, difference, difference_adjoint, plus_difference_normal
from invdiff.operator import LinearOperator
from invdiff.problem import Problem


class WithDifferences(LinearOperator):
    """A and, as further data, ``root`` times the differences between slices: ``(slices, C, H, W) -> (m,)``."""

    slicewise = False

    def __init__(self, operator: LinearOperator, shape: tuple[int, ...], root: float):
        self.operator, self.in_shape, self.root = operator, shape, root
        self.data = (shape[0], *operator.out_shape) if operator.slicewise else operator.out_shape
        self.jumps, self.complex_image = math.prod(shape), operator.complex_image
        self.out_shape = (math.prod(self.data) + self.jumps,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.operator(x).flatten(-len(self.data)), self.root * difference(x).flatten(-4)], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        data, jumps = y.split([self.out_shape[0] - self.jumps, self.jumps], -1)
        own = self.operator.adjoint(data.unflatten(-1, self.data))
        return own + self.root * difference_adjoint(jumps.unflatten(-1, self.in_shape))

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is not None:
            return super().normal(x, weights)
        return plus_difference_normal(self.operator.normal(x), x, self.root**2)


def with_differences(problem: Problem, coupling: Coupling, weight: float, memory: Memory) -> Problem:
    """The problem with the coupling of ``weight`` = 1 / s^2 as further data of unit noise, ``(samples, m)``.

    1/2 |A u - y|^2 + penalty / 2 |D u - t|^2, t the split variable less the dual over the penalty, or 0.
    """
    penalty = float(coupling.penalty(problem, weight))
    operator, root = WithDifferences(problem.operator, problem.image_shape, penalty**0.5), penalty**0.5
    target = coupling.force(memory, penalty)
    jumps = target.flatten(1) / root if isinstance(target, Tensor) else problem.y.new_zeros(1, operator.jumps)
    y = torch.cat([problem.y.flatten()[None].expand(len(jumps), -1), jumps], -1)
    return replace(problem, y=y, operator=operator)
