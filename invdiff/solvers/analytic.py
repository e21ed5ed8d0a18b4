"""Pseudo-inverses and SIRT: classical reconstructions without a prior, behind the solver interface."""

from dataclasses import dataclass

import torch

from invdiff.errors import UsageError
from invdiff.linalg import slice_dot, total_dot
from invdiff.solvers.base import Solver, State
from invdiff.solvers.pnp import pseudo_inverse


@dataclass(frozen=True)
class FBP(Solver):
    """Filtered backprojection of the measured data.

    Volumes held: 3, and 2 of 32 slices: x; the projector's own.

    Args:
        window: "ramp" or "hann".

    Raises:
        UsageError: the operator has no filtered backprojection.
    """

    window: str = "hann"

    needs_prior = False

    def require(self, problem):
        if not hasattr(problem.base, "fbp"):
            raise UsageError(f"solver 'fbp' needs a CT operator, got {type(problem.base).__name__}; try 'tv'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        x = torch.zeros(1, *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        return State(x, x)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x = torch.empty_like(state.x)
        for b in problem.blocks():
            image = problem.base.restrict(b).fbp(problem.measured[b], self.window)
            x[:, b] = (image - problem.shift) / problem.scale
        return State(x, x, state.step + 1)


@dataclass(frozen=True)
class PseudoInverse(Solver):
    """The operator's own pseudo-inverse of the measured data, in one step; subclasses say of which kind.

    Raises:
        UsageError: the operator has none, or one of another kind.
    """

    kind = ""
    needs_prior = False

    def require(self, problem):
        if problem.base.pinv_kind != self.kind:
            other = problem.base.pinv_kind or "tv"
            raise UsageError(f"solver '{self.kind}' does not invert {type(problem.base).__name__}; try '{other}'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        x = torch.zeros(1, *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        return State(x, x)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x = pseudo_inverse(problem)
        return State(x, x, state.step + 1)


@dataclass(frozen=True)
class Wiener(PseudoInverse):
    """Regularised inverse filter of a blur (Wiener 1949).

    Volumes held: 2, and 7 of 32 slices: x; the filter and its transforms.
    """

    kind = "wiener"


@dataclass(frozen=True)
class Bicubic(PseudoInverse):
    """Interpolation between the coarse pixels of a super-resolution problem (Keys 1981).

    Volumes held: 2, and 2 of 32 slices.
    """

    kind = "bicubic"


@dataclass(frozen=True)
class Fill(PseudoInverse):
    """Smooth filling of missing pixels from their neighbours.

    Volumes held: 2, and 6 of 32 slices: x; sums and weights of the neighbours.
    """

    kind = "fill"


@dataclass(frozen=True)
class ZeroFilled(PseudoInverse):
    """Inverse transform of k-space with zeros where nothing was measured, combined by coil sensitivity; gridding of
    non-Cartesian samples.

    Volumes held: 2, and 2 of 32 slices.
    """

    kind = "zero-filled"


@dataclass(frozen=True)
class Measured(PseudoInverse):
    """The measured image itself.

    Volumes held: 2, and 2 of 32 slices.
    """

    kind = "measured"


@dataclass(frozen=True)
class SIRT(Solver):
    """x <- x + C A^T R (y - A x), R and C the inverse row and column sums (Gregor & Benson 2008).

    Every slice stops by the discrepancy principle: when its mean squared whitened residual falls below ``discrepancy``.
    Slices that the operator couples stop together.

    Volumes held: 3, and 2 of 32 slices: x of two steps, column sums; the projector's own.

    Args:
        discrepancy: target of chi-squared per datum.
        relaxation: in (0, 2).
        check: steps between evaluations of the residual.
    """

    discrepancy: float = 1.0
    relaxation: float = 1.9
    check: int = 5

    needs_prior = False
    stops_itself = True
    default_steps = 300
    typical_steps = 60

    def require(self, problem):
        if not hasattr(problem.base, "sensitivities"):
            raise UsageError(f"solver 'sirt' needs a CT operator, got {type(problem.base).__name__}; try 'tv'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        rows, columns = problem.base.sensitivities(problem.y.dtype)
        tiny = 1e-6
        root = problem.operator.root_weights
        x = torch.full((1, *problem.image_shape), -problem.shift / problem.scale, dtype=problem.y.dtype)
        counted = root > tiny * root.amax((-3, -2, -1), keepdim=True)  # data of no weight are no data
        memory = {"rows": counted / rows.clamp_min(tiny * rows.max())}
        stops = len(problem.y) if problem.operator.slicewise else 1
        memory |= {"done": torch.zeros(stops, 1, 1, 1, dtype=torch.bool)}
        memory |= {"columns": 1 / columns.clamp_min(tiny * columns.max())}
        memory |= {"chi2": torch.full((stops, 1, 1, 1), torch.inf, dtype=problem.y.dtype)}
        memory = {k: v.to(problem.y.device) for k, v in memory.items()}
        x = x.to(problem.y.device)
        return State(x, x, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m, x, chi2 = state.memory, state.x.clone(), state.memory["chi2"].clone()
        done = (m["chi2"] <= self.discrepancy) & (state.step % self.check == 0)
        done = done | m["done"]
        for b in problem.blocks():
            part = problem.base.restrict(b)
            residual = problem.measured[b] - part(problem.scale * state.x[:, b] + problem.shift)
            white = problem.operator.restrict(b).root_weights * residual
            dot = slice_dot if problem.operator.slicewise else total_dot
            chi2[b] = dot(white, white)[0] / (white.numel() // chi2[b].numel())
            update = m["columns"] * part.adjoint(m["rows"][b] * residual)
            x[:, b] += torch.where(done[b], 0.0, self.relaxation / problem.scale) * update
        return State(x, x, state.step + 1, {**m, "chi2": chi2, "done": done})

    def finished(self, state):
        return state.step % self.check == 0 and bool((state.memory["chi2"] <= self.discrepancy).all())
