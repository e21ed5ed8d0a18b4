"""Projection, backprojection and both in one as functions that torch can differentiate any number of times."""

import torch
from torch import Tensor

from invdiff.operators.projector import Projector


class _Project(torch.autograd.Function):
    """A or A^T; the derivative of each is the other."""

    @staticmethod
    def forward(ctx, x, projector, adjoint):
        ctx.projector, ctx.adjoint = projector, adjoint
        return projector.apply(x, adjoint)

    @staticmethod
    def backward(ctx, g):
        return _Project.apply(g, ctx.projector, not ctx.adjoint), None, None


class _Normal(torch.autograd.Function):
    """A^T W A, symmetric: its derivative is itself. W is a constant."""

    @staticmethod
    def forward(ctx, x, projector, weights):
        ctx.projector, ctx.weights = projector, weights
        return projector.normal(x, weights)

    @staticmethod
    def backward(ctx, g):
        return _Normal.apply(g, ctx.projector, ctx.weights), None, None


class _Gram(torch.autograd.Function):
    """A A^T, symmetric: its derivative is itself."""

    @staticmethod
    def forward(ctx, y, projector):
        ctx.projector = projector
        return projector.gram(y)

    @staticmethod
    def backward(ctx, g):
        return _Gram.apply(g, ctx.projector), None


def project(x: Tensor, projector: Projector, adjoint: bool = False) -> Tensor:
    """``A x``, ``(slices, pixels) -> (slices, rays)``; with ``adjoint`` ``A^T x``, the other way."""
    return _Project.apply(x, projector, adjoint)


def normal(x: Tensor, projector: Projector, weights: Tensor | None) -> Tensor:
    """``A^T (w * A x)``, ``(slices, pixels)``; ``weights`` ``(1 or slices, rays)`` or None, not differentiated."""
    return _Normal.apply(x, projector, weights)


def gram(y: Tensor, projector: Projector) -> Tensor:
    """``A A^T y``, ``(slices, rays)``."""
    return _Gram.apply(y, projector)
