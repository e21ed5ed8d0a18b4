"""Converged total variation by a preconditioned primal-dual method that stops on the duality gap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import difference, difference_adjoint
from invdiff.linalg import largest_eigenvalue, slice_dot, total_dot
from invdiff.solvers.base import Solver, State
from invdiff.solvers.pnp import warm_start


def gradient(u: Tensor, z_factor: float) -> Tensor:
    """Forward differences ``(components, ..., C, H, W)`` with Neumann ends: rows, columns and, if coupled, slices."""
    rows, columns = torch.zeros_like(u), torch.zeros_like(u)
    rows[..., :-1, :] = u.diff(dim=-2)
    columns[..., :-1] = u.diff(dim=-1)
    if z_factor == 0:
        return torch.stack([rows, columns])
    return torch.stack([rows, columns, z_factor * difference(u)])


def gradient_adjoint(p: Tensor, z_factor: float) -> Tensor:
    """Exact adjoint of :func:`gradient`."""
    out = torch.zeros_like(p[0])
    out[..., :-1, :] -= p[0][..., :-1, :]
    out[..., 1:, :] += p[0][..., :-1, :]
    out[..., :-1] -= p[1][..., :-1]
    out[..., 1:] += p[1][..., :-1]
    return out if z_factor == 0 else out + z_factor * difference_adjoint(p[2])


@dataclass(frozen=True)
class TV(Solver):
    """min_u 1/2 |A u - y|^2 + weight sum |grad u|_2 (isotropic), to a relative duality gap.

    Primal-dual hybrid gradient (Chambolle & Pock 2011, algorithm 1), preconditioned (Pock & Chambolle 2011) by a
    circulant primal step, the inverse of the operator's own point response, which for CT removes the conditioning of
    1 / |frequency|, and a dual step that evens out the noise weights. The gap is taken over images within ``radius``
    of the iterate, the restricted gap of Chambolle & Pock 2011, equation 15: zero only at the minimiser.
    Slices are independent (2D TV) unless ``volumetric``.

    Volumes held: x, its extrapolation, the dual field (two, three if volumetric) and as many temporary ones.

    Args:
        weight: per unit of u and pixel, against whitened data.
        volumetric: 3D TV, differences along z scaled by pixel size / slice spacing.
        gap: relative duality gap at which it stops.
        radius: of the ball (per pixel, units of u) of the restricted gap.
        data_step, gradient_step: steps of the two duals; the primal step follows from them.
        evenness: exponent by which the dual step evens out the weights of the data, in [0, 1].
        relaxation: over-relaxation in (0, 2) (Condat 2013).
        check: steps between evaluations of the gap.
    """

    weight: float = 20.0
    volumetric: bool = False
    gap: float = 1e-4
    radius: float = 0.25
    data_step: float = 0.3
    gradient_step: float = 30.0
    evenness: float = 0.85
    relaxation: float = 1.8
    check: int = 20

    needs_prior = False
    default_steps = 4000

    def init(self, problem, prior, sigmas, rng):
        x = warm_start(problem)
        factor = self._z_factor(problem)
        memory = {"q": torch.zeros_like(problem.y)[None], "p": torch.zeros_like(gradient(x, factor))}
        memory["dual_step"] = self._dual_step(problem)
        memory["filter"] = self._primal_filter(problem, memory["dual_step"], factor)
        memory["gap"] = torch.full((), torch.inf)
        return State(x, x, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m, factor, x = state.memory, self._z_factor(problem), state.x
        v = self._adjoint(problem, m["q"]) + gradient_adjoint(m["p"], factor)
        x_new = x - torch.fft.irfft2(m["filter"] * torch.fft.rfft2(v), s=v.shape[-2:])
        bar = 2 * x_new - x
        s = m["dual_step"]
        q_new = (m["q"] + s * (self._forward(problem, bar) - problem.y)) / (1 + s)
        p_new = m["p"] + self.gradient_step * gradient(bar, factor)
        p_new = p_new / (p_new.square().sum(0, keepdim=True).sqrt() / self.weight).clamp_min(1)
        gap = m["gap"]
        if (state.step + 1) % self.check == 0:
            gap = self._relative_gap(problem, x_new, q_new, p_new, factor)
        memory = {**m, "q": torch.lerp(m["q"], q_new, self.relaxation), "gap": gap}
        memory["p"] = torch.lerp(m["p"], p_new, self.relaxation)
        return State(torch.lerp(x, x_new, self.relaxation), x_new, state.step + 1, memory)

    def finished(self, state):
        return state.step % self.check == 0 and float(state.memory["gap"]) <= self.gap

    def _relative_gap(self, problem, x, q, p, factor) -> Tensor:
        """(primal - restricted dual) / primal, the worst over slices (over the stack if volumetric)."""
        dot = total_dot if factor else slice_dot
        sums = lambda t: dot(t, torch.ones_like(t)).flatten()  # noqa: E731
        r = self._forward(problem, x) - problem.y
        v = self._adjoint(problem, q) + gradient_adjoint(p, factor)
        primal = sums(r.square()) / 2 + self.weight * sums(gradient(x, factor).square().sum(0).sqrt())
        dual = -sums(q.square() / 2 + q * problem.y) + sums(v * x - self.radius * v.abs())
        return ((primal - dual) / primal).max()

    def _z_factor(self, problem) -> float:
        z, row, column = problem.spacing
        return min(1.0, (row * column) ** 0.5 / z) if self.volumetric and len(problem.y) > 1 else 0.0

    def _dual_step(self, problem) -> Tensor:
        """Steps of the data duals, mean ``data_step``, shaped like y: w^-evenness for noise weights w = 1 / variance."""
        root = getattr(problem.operator, "root_weights", torch.ones_like(problem.y))
        even = (root**2) ** -self.evenness
        return self.data_step * even / even.mean()

    def _primal_filter(self, problem, dual_step, factor) -> Tensor:
        """Circulant primal step on the half spectrum, scaled so that |Sigma^1/2 K T^1/2| < 1 (power iteration)."""
        shape = problem.image_shape
        point = torch.zeros(shape, dtype=problem.y.dtype, device=problem.y.device)
        point[..., shape[-2] // 2, shape[-1] // 2] = 1
        normal = lambda u: self._adjoint(problem, dual_step * self._forward(problem, u)) + self.gradient_step * gradient_adjoint(  # noqa: E731
            gradient(u, factor), factor
        )
        spectrum = torch.fft.rfft2(normal(point)).abs().mean(0, keepdim=True)
        spectrum = spectrum.clamp_min(1e-3 * float(spectrum.max()))
        root = spectrum.rsqrt()
        smooth = lambda u: torch.fft.irfft2(root * torch.fft.rfft2(u), s=shape[-2:])  # noqa: E731
        g = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=g, dtype=problem.y.dtype).to(problem.y.device)
        return 1 / (spectrum * 1.02 * largest_eigenvalue(lambda u: smooth(normal(smooth(u))), start, 60, 1e-3))

    @staticmethod
    def _forward(problem, u: Tensor) -> Tensor:
        return torch.cat([problem.operator.restrict(b)(u[..., b, :, :, :]) for b in problem.blocks()], -4)

    @staticmethod
    def _adjoint(problem, q: Tensor) -> Tensor:
        return torch.cat([problem.operator.restrict(b).adjoint(q[..., b, :, :, :]) for b in problem.blocks()], -4)
