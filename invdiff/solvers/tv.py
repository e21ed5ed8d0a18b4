"""Converged total variation by a preconditioned primal-dual method that stops on the duality gap."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff.coupling import difference_adjoint
from invdiff.errors import UsageError
from invdiff.linalg import largest_eigenvalue, one_by_one, slice_dot, total_dot
from invdiff.problem import Problem
from invdiff.solvers.base import Solver, State
from invdiff.solvers.pnp import warm_start
from invdiff.solvers.residual import adjoint, checked_weight, forward, weights

# Of `weight` to the root of the operator's strength. Chosen on training subjects (two CT, three MR; noise of 1 and 5 %,
# two blurs, missing pixels, super-resolution, CT of 30 and 60 views): 0.1 dB below the best weight of each on average,
# at most 0.03 dB for CT. Weight 10 for all loses 0.25 dB, a weight proportional to the strength 0.14.
WEIGHT = 1.25


def add_gradient_(p: Tensor, u: Tensor, step: float, z_factor: float) -> Tensor:
    """``p += step * grad u`` in place, without a temporary field; components and ends as :func:`gradient`."""
    p[0][..., :-1, :].add_(u[..., 1:, :], alpha=step).sub_(u[..., :-1, :], alpha=step)
    p[1][..., :-1].add_(u[..., 1:], alpha=step).sub_(u[..., :-1], alpha=step)
    if z_factor:
        step = step * z_factor
        p[2][..., :-1, :, :, :].add_(u[..., 1:, :, :, :], alpha=step).sub_(u[..., :-1, :, :, :], alpha=step)
    return p


def gradient(u: Tensor, z_factor: float) -> Tensor:
    """Forward differences ``(components, ..., C, H, W)`` with Neumann ends: rows, columns and, if coupled, slices."""
    return add_gradient_(u.new_zeros(3 if z_factor else 2, *u.shape), u, 1.0, z_factor)


def gradient_adjoint(p: Tensor, z_factor: float) -> Tensor:
    """Exact adjoint of :func:`gradient`."""
    out = torch.zeros_like(p[0])
    out[..., :-1, :] -= p[0][..., :-1, :]
    out[..., 1:, :] += p[0][..., :-1, :]
    out[..., :-1] -= p[1][..., :-1]
    out[..., 1:] += p[1][..., :-1]
    return out.add_(difference_adjoint(p[2]), alpha=z_factor) if z_factor else out


def square_length(p: Tensor) -> Tensor:
    """Squared length of a field at each pixel, over components and channels together: ``(..., 1, H, W)``."""
    length = p[0].square()
    for component in p[1:]:
        length.addcmul_(component, component)
    return length if length.shape[-3] == 1 else length.sum(-3, keepdim=True)


def project_(p: Tensor, radius: Tensor) -> Tensor:
    """Pixelwise projection of a field onto vectors of length at most ``radius``, in place."""
    return p.div_(square_length(p).sqrt_().div_(radius).clamp_min_(1))


@dataclass(frozen=True)
class TV(Solver):
    """min_u 1/2 |A u - y|^2 + weight sum |grad u|_2, to a relative duality gap.

    Isotropic, and joint over channels (vectorial TV: Bresson & Chan 2008): the length at a pixel is over differences of
    all channels, so that a complex image (real, imaginary) may have any phase.

    Primal-dual hybrid gradient (Chambolle & Pock 2011, algorithm 1), over-relaxed and preconditioned (Pock &
    Chambolle 2011): a circulant primal step, which for CT removes the conditioning of 1 / |frequency|, and a dual step
    that evens out the noise weights. The gap is taken over images within ``radius`` of the iterate, the restricted gap
    of Chambolle & Pock 2011, equation 15: an upper bound of the excess over every image of that ball, zero only at
    the minimiser. Slices are independent (2D TV) unless ``volumetric``: each stops at its own gap and costs nothing
    from then on. Only the gap stops it; where ``default_steps`` end first, ``memory["gap"]`` is above ``gap``.

    The iterate is the deviation from the warm start, so that single precision is relative to what is still to be found:
    data of a thousand standard deviations would put a rounding error of 1e-4 into every residual.

    One step of the solver is ``check`` iterations of the slices that have not converged, 32 at a time, each of one A
    and one A^T; then their gaps, the only values read back from the device. State.x is the
    deviation. memory: "start" and its "residual" y - A start, "weight", "q" and "p" the duals of data and gradient,
    "dual_step" and "filter" the steps, "gaps" of the slices, "gap" the worst of them.

    Volumes held: 12, and 12 of 32 slices; 2 more with a coupling (``volumetric``): start, half a one for the filter,
    deviation, x0 and the dual field (two, three if volumetric) of two steps; iterates and relaxed iterates.

    Args:
        weight: per unit of u and pixel, against whitened data; "auto": ``WEIGHT`` times the root of the strength of the
            whitened operator (:func:`invdiff.solvers.residual.strength`), slice by slice.
        volumetric: 3D TV, differences along z scaled by pixel size / slice spacing.
        gap: relative duality gap at which a slice stops.
        radius: of the ball (largest change of a pixel, units of u) of the restricted gap.
        data_step: mean step of the duals of the data, > 0; the primal step follows from both dual steps.
        gradient_step: step of the duals of the gradient, > 0.
        evenness: exponent by which the data step evens out the weights of the data, in [0, 1].
        margin: factor of the data term in the circulant model, > 0. Above 1 the few low frequencies at which A^T A is
            far from circulant do not shorten the step of all others.
        relaxation: over-relaxation in (0, 2) (Condat 2013).
        check: iterations per step, between evaluations of the gap.
    """

    weight: float | str = "auto"
    volumetric: bool = False
    gap: float = 1e-4
    radius: float = 0.25
    data_step: float = 0.3
    gradient_step: float = 300.0
    evenness: float = 0.85
    margin: float = 2.0
    relaxation: float = 1.8
    check: int = 20

    needs_prior = False
    stops_itself = True
    default_steps = 400
    typical_steps = 30

    def __post_init__(self):
        object.__setattr__(self, "weight", checked_weight("tv", self.weight))
        positive = ("gap", "radius", "data_step", "gradient_step", "margin", "check")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UsageError(f"solver option {name} must be positive, got {getattr(self, name)}")
        if not (0 < self.relaxation < 2 and 0 <= self.evenness <= 1):
            raise UsageError(
                f"solver options relaxation in (0, 2) and evenness in [0, 1], got {self.relaxation} and {self.evenness}"
            )

    def init(self, problem, prior, sigmas, rng):
        start, z = warm_start(problem), self._z_factor(problem)
        memory = {"start": start, "residual": problem.y - forward(problem, start)[0]}
        memory |= {"q": torch.zeros_like(problem.y)[None], "p": start.new_zeros(3 if z else 2, *start.shape)}
        memory["dual_step"] = self._dual_step(problem)
        filters = [self._filter(problem.restrict(b), memory["dual_step"][b], z) for b in self._groups(problem)]
        memory["filter"] = torch.cat(filters)
        memory["weight"] = weights(self.weight, WEIGHT, problem, self._coupled(problem))
        memory["gaps"] = start.new_full((1 if self._coupled(problem) else len(problem.y),), torch.inf)
        memory["gap"] = memory["gaps"].max()
        return State(torch.zeros_like(start), start, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        old, z = state.memory, self._z_factor(problem)
        x, x0, q, p, gaps = (t.clone() for t in (state.x, state.x0, old["q"], old["p"], old["gaps"]))
        active = (~(gaps <= self.gap)).nonzero()[:, 0]
        for i in [slice(None)] if self._coupled(problem) else active.split(problem.block):
            part = replace(problem.restrict(i), y=old["residual"][i])
            slopes, steps, model = gradient(old["start"][:, i], z), old["dual_step"][i], old["filter"][i]
            weight = old["weight"] if self._coupled(problem) else old["weight"][i]
            x[:, i], q[:, i], p[:, :, i], end = self._iterate(
                part, slopes, x[:, i], q[:, i], p[:, :, i], weight, steps, model, z
            )
            x0[:, i] = old["start"][:, i] + end[0]
            gaps[i] = self._relative_gap(part, slopes, end, weight, z)
        return State(x, x0, state.step + 1, {**old, "q": q, "p": p, "gaps": gaps, "gap": gaps.max()})

    def finished(self, state):
        return float(state.memory["gap"]) <= self.gap

    def _iterate(self, problem, slopes, x, q, p, weight, steps, model, z):
        """``check`` iterations in place; the relaxed iterate and the feasible point before relaxation.

        ``problem.y`` and ``slopes`` are residual and gradient of the start, from which ``x`` is the deviation.
        """
        keep = 1 / (1 + steps)
        for _ in range(self.check):
            v = adjoint(problem, q) + gradient_adjoint(p, z)
            x_new = x - self._filtered(v, model, z)
            bar = torch.lerp(x, x_new, 2.0)  # 2 x_new - x
            q_new = torch.lerp(forward(problem, bar) - problem.y, q, keep)  # (q + s (A bar - y)) / (1 + s)
            ahead = torch.add(p, slopes, alpha=self.gradient_step)
            p_new = project_(add_gradient_(ahead, bar, self.gradient_step, z), weight)
            x.lerp_(x_new, self.relaxation)
            q.lerp_(q_new, self.relaxation)
            p.lerp_(p_new, self.relaxation)
        return x, q, p, (x_new, q_new, p_new)

    def _relative_gap(self, problem, slopes, point, weight, z) -> Tensor:
        """(primal - restricted dual) / primal of each slice, or of the stack where slices are coupled."""
        x, q, p = point
        dot = total_dot if self._coupled(problem) else slice_dot
        sums = lambda t: dot(t, torch.ones_like(t)).flatten()  # noqa: E731
        primal = sums((forward(problem, x) - problem.y).square()) / 2
        primal = primal + sums(weight * square_length(slopes + gradient(x, z)).sqrt())
        v = adjoint(problem, q) + gradient_adjoint(p, z)
        dual = sums(v * x - self.radius * v.abs() + (slopes * p).sum(0)) - sums(q.square() / 2 + q * problem.y)
        return (primal - dual) / primal.clamp_min(torch.finfo(primal.dtype).tiny)

    def _z_factor(self, problem: Problem) -> float:
        z, row, column = problem.spacing
        return min(1.0, (row * column) ** 0.5 / z) if self.volumetric and problem.image_shape[0] > 1 else 0.0

    def _coupled(self, problem: Problem) -> bool:
        return self.volumetric or not problem.operator.slicewise

    def _groups(self, problem: Problem) -> list[slice]:
        return [slice(None)] if self._coupled(problem) else problem.blocks()

    @staticmethod
    def _axes(z: float) -> tuple[int, ...]:
        return (-4, -2, -1) if z else (-2, -1)

    def _filtered(self, v: Tensor, spectrum: Tensor, z: float) -> Tensor:
        """``spectrum`` applied to the slices, or with z to the stack."""
        axes = self._axes(z)

        def apply(u: Tensor, own: Tensor) -> Tensor:
            return torch.fft.irfftn(torch.fft.rfftn(u, dim=axes).mul_(own), s=[u.shape[a] for a in axes], dim=axes)

        return apply(v, spectrum) if z else one_by_one(apply, 3, v, spectrum.expand(*v.shape[:-1], -1))

    def _dual_step(self, problem) -> Tensor:
        """Steps of the data duals, mean ``data_step`` per slice: w^-evenness for noise weights w = 1 / variance.

        Weights below a thousandth of the mean count as that: data that say nothing must not set the scale. Slice by
        slice, as the bits of a power depend on the place in memory.
        """
        root = getattr(problem.operator, "root_weights", torch.ones_like(problem.y))
        steps = []
        for w in root.square():
            even = w.clamp_min(1e-3 * w.mean()) ** -self.evenness
            steps.append(self.data_step * even / even.mean())
        return torch.stack(steps)

    def _filter(self, problem, steps, z) -> Tensor:
        """Circulant primal step T on the half spectrum, scaled so that |Sigma^1/2 K T^1/2| < 1 (Lanczos)."""
        axes, shape = self._axes(z), problem.image_shape
        data = lambda u: adjoint(problem, steps * forward(problem, u))  # noqa: E731
        model = self.margin * self._spectrum(data, problem, z) + self.gradient_step * _laplacian(shape, axes, z, steps)
        root = model.rsqrt()

        def preconditioned(u):
            u = self._filtered(u, root, z)
            return self._filtered(data(u) + self.gradient_step * gradient_adjoint(gradient(u, z), z), root, z)

        start, dot = _noise(problem, 0, self._coupled(problem)), total_dot if self._coupled(problem) else slice_dot
        # No early stop: a start that hardly holds the leading eigenvector stands still before it finds it.
        return 1 / (1.05 * model * largest_eigenvalue(preconditioned, start, 40, tolerance=0.0, dot=dot)[0])

    def _spectrum(self, data: Callable[[Tensor], Tensor], problem, z) -> Tensor:
        """Circulant model of the data term: its mean in rings of one frequency, from 8 probes of random signs."""
        height, width = problem.image_shape[-2:]
        cross = power = torch.zeros(())
        for k in range(8):
            u = _noise(problem, k + 1, self._coupled(problem)).sign()
            f, g = torch.fft.rfft2(u)[0], torch.fft.rfft2(data(u))[0]
            cross, power = cross + (f.conj() * g).real, power + f.abs().square()
        rows = torch.fft.fftfreq(height)[:, None] * max(height, width)
        ring = torch.hypot(rows, torch.fft.rfftfreq(width) * max(height, width)).round().long().flatten()
        rings, ring = int(ring.max()) + 1, ring.to(f.device)
        total = lambda t: t.new_zeros(*t.shape[:2], rings).index_add_(2, ring, t.flatten(2))  # noqa: E731
        mean = (total(cross) / total(power)).clamp_min(0)[..., ring].reshape(cross.shape)
        return mean.mean(0, keepdim=True) if self._coupled(problem) else mean


def _laplacian(shape, axes, z: float, like: Tensor) -> Tensor:
    """Symbol of grad^T grad with periodic ends on the half spectrum, plus 1e-6 to bound the step of the mean."""
    freq = [torch.fft.fftfreq, torch.fft.rfftfreq]
    symbol = lambda f, n: 2 - 2 * torch.cos(2 * torch.pi * f(n, dtype=like.dtype, device=like.device))  # noqa: E731
    plane = symbol(freq[0], shape[-2])[:, None] + symbol(freq[1], shape[-1])[None] + 1e-6
    return plane + z**2 * symbol(freq[0], shape[axes[0]])[:, None, None, None] if z else plane


def _noise(problem, seed: int, coupled: bool) -> Tensor:
    """Normal images; where slices are independent the same in all, as none may depend on its place in the stack."""
    g = torch.Generator().manual_seed(seed)
    shape = problem.image_shape[1:] if not coupled else problem.image_shape
    return torch.randn(shape, generator=g, dtype=problem.y.dtype).to(problem.y.device).expand(1, *problem.image_shape)
