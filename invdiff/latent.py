"""Problems of images as problems of latents, so that solvers run in the space of a latent prior."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from invdiff.operator import Forward, LinearOperator
from invdiff.priors.base import Prior
from invdiff.priors.latent import LatentPrior
from invdiff.problem import Problem
from invdiff.solvers.base import Solver
from invdiff.solvers.pnp import warm_start


class Decoded(Forward):
    """z -> A decode(z), with its gradient through the decoder.

    Args:
        operator: A, on images.
        prior: whose ``decode`` is meant.
        origin: latents ``(slices, c, h, w)`` to start from, around which ``normal`` is linearised.
    """

    origin: Tensor

    def __init__(self, operator: LinearOperator, prior: LatentPrior, origin: Tensor):
        self.operator, self.prior, self.origin = operator, prior, origin
        self.in_shape, self.out_shape = prior.latent_shape(operator.in_shape), operator.out_shape
        self.slicewise, self.measured_fraction = operator.slicewise, operator.measured_fraction

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.prior.decode(x))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """J' A' v, J the Jacobian of the decoder at the latents ``x``."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.prior.decode(x), x, self.operator.adjoint(v))
        return g

    def normal(self, x: Tensor) -> Tensor:
        """J' A' A J x with J at ``origin``, J x by central differences; solvers take norms from it, nothing else."""
        origin = self.origin.expand_as(x)
        size = float(x.square().mean().sqrt())
        step = 1e-2 * max(1.0, float(origin.square().mean().sqrt())) / size if size > 0 else 1.0
        with torch.no_grad():
            ahead, behind = (self.prior.decode(origin + way * step * x) for way in (1, -1))
            v = self.operator((ahead - behind) / (2 * step))
        return self.vjp(origin, v)

    def restrict(self, slices: slice) -> "Decoded":
        """The map of those slices."""
        if not self.slicewise:
            return self
        part = copy.copy(self)
        part.operator, part.prior = self.operator.restrict(slices), self.prior.restrict(slices)
        part.origin = self.origin[slices]
        return part


def latent_problem(problem: Problem, prior: LatentPrior) -> Problem:
    """The problem of finding latents z with y = A decode(z) + n, for solvers that take non-linear maps (DPS, RED-diff).

    They start, where they start warm, from the latents of the warm start of the images. ``prior.decode`` makes images
    of what they find:

        inner = latent_problem(problem, prior)
        image = prior.decode(solve(make_solver("reddiff"), inner, prior))

    Raises:
        ShapeError: images of other channels or sides than the autoencoder takes.
    """
    prior.latent_shape(problem.image_shape)
    with torch.no_grad():
        origin = prior.encode(warm_start(problem)[0])
    return replace(problem, operator=Decoded(problem.operator, prior, origin))  # type: ignore[arg-type]


def problem_for(solver: Solver, problem: Problem, prior: Prior | None) -> Problem:
    """What ``solver`` sees of a problem of images: :func:`latent_problem` where it needs a prior and that is one of
    latents."""
    return latent_problem(problem, prior) if isinstance(prior, LatentPrior) and solver.needs_prior else problem
