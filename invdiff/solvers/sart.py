"""Ordered subsets of views: OS-SART for CT."""

import math
from dataclasses import dataclass

import torch

from invdiff.errors import UsageError
from invdiff.solvers.base import Solver, State
from invdiff.solvers.residual import data_count, inner, physical_zero


def interleaved(count: int) -> list[int]:
    """0 .. count - 1, each far from those before it: steps of the golden section (Köhler 2004)."""
    step = next(k for k in range(max(1, round(0.618 * count)), 2 * count + 1) if math.gcd(k, count) == 1)
    return [i * step % count for i in range(count)]


@dataclass(frozen=True)
class OSSART(Solver):
    """Ordered-subset SART (Andersen & Kak 1984; Wang & Jiang 2004): for each subset t of the views in turn

    x <- x + lambda C_t A_t^T R_t (y_t - A_t x), R_t and C_t the inverse row and column sums of A_t.

    Subset t holds the views t, t + T, t + 2 T, ... One step is a pass over all subsets. Every slice stops by the
    discrepancy principle, with the residuals met on the way through the pass, or when a pass lowers their chi-squared
    by less than the share ``stall``: subsets that contradict each other end in a cycle.

    Volumes held: 2, and 5 of 32 slices: x of two steps, an image of column sums per subset; the projector's own.

    Args:
        subsets: T, at most one per view.
        relaxation: lambda, in (0, 2).
        discrepancy: target of chi-squared per datum.
        stall: relative fall of chi-squared per pass below which a slice stops.
    """

    subsets: int = 10
    relaxation: float = 1.0
    discrepancy: float = 1.0
    stall: float = 0.01

    needs_prior = False
    stops_itself = True
    default_steps = 100
    typical_steps = 12

    def __post_init__(self):
        if not (0 < self.relaxation < 2 and self.subsets >= 1):
            raise UsageError("solver os-sart needs a relaxation in (0, 2) and at least one subset")

    def require(self, problem):
        if not hasattr(problem.base, "subset"):
            name = type(problem.base).__name__
            raise UsageError(f"solver 'os-sart' needs an operator with views, got {name}; try 'cgls' or 'tv'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        x, count = physical_zero(problem), data_count(problem)
        columns = [inverse(part.sensitivities(x.dtype)[1]) for _, part in self._subsets(problem)]
        memory = {"rows": inverse(problem.base.sensitivities(x.dtype)[0]), "columns": torch.stack(columns)}
        memory |= {"count": count, "chi2": torch.full_like(count, torch.inf)}
        return State(x, x, 0, memory | {"done": torch.zeros_like(count, dtype=torch.bool)})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m, dot, x, chi2 = state.memory, inner(problem), state.x.clone(), torch.zeros_like(state.memory["chi2"])
        rate = torch.where(m["done"], 0.0, self.relaxation / problem.scale)
        for (views, part), columns in zip(self._subsets(problem), m["columns"], strict=True):
            for b in problem.blocks():
                root = problem.operator.root_weights[b]
                counted = (root > 1e-6 * root.amax((-3, -2, -1), keepdim=True))[..., views, :]  # no weight, no data
                residual = problem.measured[b][..., views, :] - part(problem.scale * x[:, b] + problem.shift)
                white = root[..., views, :] * residual
                chi2[b] += dot(white, white)[0] / m["count"][b]
                x[:, b] += rate[b] * columns * part.adjoint(counted * m["rows"][..., views, :] * residual)
        chi2 = torch.where(m["done"], m["chi2"], chi2)
        done = m["done"] | (chi2 <= self.discrepancy) | (chi2 > (1 - self.stall) * m["chi2"])
        return State(x, x, state.step + 1, {**m, "chi2": chi2, "done": done})

    def _subsets(self, problem) -> list:
        """Views of each subset, as a slice, and their operator; in an order in which neighbours lie far apart."""
        count = min(self.subsets, problem.base.out_shape[-2])
        views = [slice(t, None, count) for t in interleaved(count)]
        return [(v, problem.base.subset(v)) for v in views]

    def finished(self, state):
        return bool(state.memory["done"].all())


def inverse(sums):
    """1 / sums, 0 where a ray or pixel meets next to nothing."""
    tiny = 1e-6 * sums.max()
    return torch.where(sums > tiny, 1 / sums.clamp_min(tiny), 0.0)
