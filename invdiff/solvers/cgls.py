"""Conjugate gradients on the weighted least-squares problem, stopped early: CGLS, and SENSE-CG for MRI."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from invdiff.errors import UsageError
from invdiff.solvers.base import Solver, State
from invdiff.solvers.residual import adjoint, data_count, forward, inner, physical_zero


@dataclass(frozen=True)
class CGLS(Solver):
    """min_u |A u - y|^2 over Krylov spaces, from the image that is 0 (Hestenes & Stiefel 1952; Björck 1996, 7.4.1).

    With s = A^T r, p = s, and at each step::

        q = A p,  alpha = |s|^2 / |q|^2,  x <- x + alpha p,  r <- r - alpha q,
        s' = A^T r,  beta = |s'|^2 / |s|^2,  p <- s' + beta p

    The early iterate is the regularisation: every slice stops by the discrepancy principle (Morozov 1966), when its
    chi-squared per datum falls to ``discrepancy``, or when that has fallen by less than the share ``stall`` within
    ``check`` steps, as it does above the noise level where the data contradict each other.

    Volumes held: 6: x, s, p of two steps; of the data r and q.

    Args:
        discrepancy: target of chi-squared per datum.
        stall: relative fall of chi-squared within ``check`` steps below which a slice stops.
        check: steps between these comparisons.
    """

    discrepancy: float = 1.0
    stall: float = 0.005
    check: int = 5

    kind: ClassVar[str] = ""  # of pseudo-inverse that the operator must have; empty for any operator
    needs_prior = False
    stops_itself = True
    default_steps = 300
    typical_steps = 30

    def __post_init__(self):
        if not self.check >= 1:
            raise UsageError(f"solver option check must be at least 1, got {self.check}")

    def require(self, problem):
        if self.kind and problem.base.pinv_kind != self.kind:
            raise UsageError(f"solver 'sense-cg' needs an MRI operator, got {type(problem.base).__name__}; try 'cgls'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        dot, x = inner(problem), physical_zero(problem)
        r = problem.y - forward(problem, x)
        s = adjoint(problem, r)
        chi2 = dot(r, r)[0] / data_count(problem)
        memory = {"r": r, "p": s, "square": dot(s, s), "count": data_count(problem), "chi2": chi2}
        return State(x, x, 0, memory | {"before": chi2, "done": chi2 <= self.discrepancy})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m, dot = state.memory, inner(problem)
        tiny = torch.finfo(state.x.dtype).tiny
        q = forward(problem, m["p"])
        alpha = torch.where(m["done"], 0.0, m["square"] / dot(q, q).clamp_min(tiny))
        x, r = state.x + alpha * m["p"], m["r"] - alpha * q
        s = adjoint(problem, r)
        square = dot(s, s)
        p = s + square / m["square"].clamp_min(tiny) * m["p"]
        chi2, before = dot(r, r)[0] / m["count"], m["before"]
        done = m["done"] | (chi2 <= self.discrepancy)
        if (state.step + 1) % self.check == 0:
            done, before = done | (chi2 > (1 - self.stall) * before), chi2
        memory = {"r": r, "p": p, "square": square, "chi2": chi2, "before": before, "done": done}
        return State(x, x, state.step + 1, {**m, **memory})

    def finished(self, state):
        return bool(state.memory["done"].all())


@dataclass(frozen=True)
class SenseCG(CGLS):
    """SENSE by conjugate gradients (Pruessmann et al. 2001): :class:`CGLS` for complex images and coil maps.

    Volumes held: 9: those of CGLS, data as large as images.
    """

    kind = "zero-filled"
