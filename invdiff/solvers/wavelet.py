"""Sparse wavelet coefficients, by ADMM with cycle spinning."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.data_step import data_step, point_spectrum
from invdiff.errors import UsageError
from invdiff.solvers.base import Solver, State
from invdiff.solvers.pnp import warm_start
from invdiff.solvers.residual import checked_weight, inner, weights

# Of `weight` to the root of the operator's strength. Chosen on training subjects as that of TV: 0.13 dB below the best
# weight of each on average, at most 0.5 dB (blur).
WEIGHT = 2.5
LEVELS = 4
SHIFTS = 2**LEVELS  # per axis: shifts by more are the same to the transform, but for the coarsest coefficients


def daubechies(moments: int = 4) -> list[float]:
    """Scaling filter of the orthonormal wavelet with so many vanishing moments, least phase (Daubechies 1988, 4.1).

    From the roots inside the unit circle of ``P(y) = sum_k C(N - 1 + k, k) y^k``, ``y = (2 - z - 1 / z) / 4``.
    """
    import numpy as np

    polynomial = [math.comb(moments - 1 + k, k) for k in range(moments)][::-1]
    h = np.ones(1, complex)
    for y in np.roots(polynomial):
        pair = np.roots([1, 4 * y - 2, 1])
        h = np.convolve(h, [1, -pair[np.abs(pair).argmin()]])
    for _ in range(moments):
        h = np.convolve(h, [1, 1])
    return (h.real * math.sqrt(2) / h.real.sum()).tolist()


_LOW = daubechies()
_HIGH = [(-1) ** k * c for k, c in enumerate(_LOW[::-1])]


def split(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Low and high half of an even axis, periodic: ``low[k] = sum_j h[j] x[2 k + j]``; orthonormal together."""
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis)
    low, high = torch.zeros_like(even), torch.zeros_like(even)
    for j, (h, g) in enumerate(zip(_LOW, _HIGH, strict=True)):
        shifted = (odd if j % 2 else even).roll(-(j // 2), axis)
        low.add_(shifted, alpha=h)
        high.add_(shifted, alpha=g)
    return low, high


def join(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`split`, which is its transpose."""
    even, odd = torch.zeros_like(low), torch.zeros_like(low)
    for j, (h, g) in enumerate(zip(_LOW, _HIGH, strict=True)):
        (odd if j % 2 else even).add_((h * low).add_(high, alpha=g).roll(j // 2, axis))
    return torch.stack([even, odd], axis).flatten(axis - 1, axis)


def transform(x: Tensor, levels: int = LEVELS) -> list[Tensor]:
    """Orthonormal periodic wavelet transform of sides that are multiples of 2^levels: details, fine to coarse, then the
    coarsest mean. A level gives one tensor ``(3, ..., H / 2, W / 2)``."""
    out = []
    for _ in range(levels):
        (a, b), (c, d) = (split(half, -2) for half in split(x, -1))
        out.append(torch.stack([b, c, d]))
        x = a
    return [*out, x]


def inverse(coefficients: list[Tensor]) -> Tensor:
    """The inverse and transpose of :func:`transform`."""
    *details, x = coefficients
    for b, c, d in reversed(details):
        x = join(join(x, b, -2), join(c, d, -2), -1)
    return x


def shrink(x: Tensor, threshold: float, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """argmin_u 1/2 |u - x|^2 + threshold sum |details of u shifted|, magnitudes joint over channels (axis -3)."""
    *details, coarse = transform(x.roll(shift, (-2, -1)))
    kept = []
    for d in details:
        length = d.square().sum(-3, keepdim=True).sqrt()
        kept.append(d * (1 - threshold / length.clamp_min(torch.finfo(d.dtype).tiny)).clamp_min(0))
    return inverse([*kept, coarse]).roll((-shift[0], -shift[1]), (-2, -1))


@dataclass(frozen=True)
class Wavelet(Solver):
    """min_u 1/2 |A u - y|^2 + weight sum |W u|_1, W orthonormal Daubechies wavelets of 4 vanishing moments, 4 levels.

    ADMM (Boyd et al. 2011, section 6.4) with the data step of the other solvers, whose preconditioner FISTA cannot
    have: on a CT of 60 views that was not done after a thousand iterations::

        u = argmin 1/2 |A u - y|^2 + penalty/2 |u - (z - d)|^2,  z = shrink(u + d; weight / penalty),  d <- d + u - z

    Magnitudes are joint over channels, so that a complex image (real, imaginary) may have any phase; the coarsest mean
    costs nothing. Sides that are no multiple of 16 go on beyond the edge, where nothing is measured. With ``spin`` the
    shrinkage shifts the image to another of 16 places of the grid every time (cycle spinning: Coifman & Donoho 1995;
    Kamilov et al. 2014), and x0 is the mean of z over these 16, free of the blocks of the grid.

    One step of the solver is 16 iterations. A slice stops when a step changes it by less than ``change``, relative to
    its distance from its mean, and stays as it is from then on. State.x is z, on the padded grid.

    Volumes held: 15, and 5 of 32 slices: z, d, u, x0 of two steps, half a one of spectrum, the transform; the CG.

    Args:
        weight: per unit of u, against whitened data; "auto": ``WEIGHT`` times the root of the strength of the whitened
            operator (:func:`invdiff.solvers.residual.strength`), slice by slice.
        spin: cycle spinning; without it the transform, hence the minimiser, is that of one grid.
        change: relative change of a step at which a slice stops.
        penalty: of the splitting, times ``weight``; its inverse is the threshold of one shrinkage, in units of u. It
            changes the way, not the minimiser.
        cg_iterations, cg_reduction: most iterations of the data step, and the fall of its residual that is enough.
    """

    weight: float | str = "auto"
    spin: bool = True
    change: float = 1e-3
    penalty: float = 50.0
    cg_iterations: int = 20
    cg_reduction: float = 0.1

    needs_prior = False
    stops_itself = True
    default_steps = 40
    typical_steps = 4

    def __post_init__(self):
        object.__setattr__(self, "weight", checked_weight("wavelet", self.weight))
        if not (self.change > 0 and self.penalty > 0 and self.cg_iterations >= 1):
            raise UsageError("solver wavelet needs change > 0, penalty > 0 and cg_iterations >= 1")

    def init(self, problem, prior, sigmas, rng):
        spectrum = point_spectrum(problem)
        start = warm_start(problem, spectrum)
        weight = weights(self.weight, WEIGHT, problem, not problem.operator.slicewise)
        z = pad(start)
        memory = {"u": start, "d": torch.zeros_like(z), "spectrum": spectrum, "weight": weight}
        return State(z, start, 0, memory | {"done": torch.zeros_like(weight, dtype=torch.bool)})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m, dot, (height, width) = state.memory, inner(problem), state.x0.shape[-2:]
        penalty = self.penalty * m["weight"]
        u, z, d, total = m["u"], state.x, m["d"], torch.zeros_like(state.x0)
        for k in range(SHIFTS):
            ahead = z - d
            u, _ = data_step(
                problem,
                ahead[..., :height, :width].contiguous(),
                penalty,
                u,
                iterations=self.cg_iterations,
                reduction=self.cg_reduction,
                spectrum=m["spectrum"],
            )
            ahead[..., :height, :width] = u
            z = shrink(ahead + d, 1 / self.penalty, (5 * k % SHIFTS, 7 * k % SHIFTS) if self.spin else (0, 0))
            d, total = d + ahead - z, total + z[..., :height, :width]
        x0 = total / SHIFTS if self.spin else z[..., :height, :width]
        moved, own = x0 - state.x0, x0 - x0.mean((-2, -1), keepdim=True)
        still = dot(moved, moved)[0] <= self.change**2 * dot(own, own)[0]
        keep = lambda old, new: torch.where(m["done"], old, new)  # noqa: E731
        memory = {"u": keep(m["u"], u), "d": keep(m["d"], d), "done": m["done"] | still}
        return State(keep(state.x, z), keep(state.x0, x0), state.step + 1, {**m, **memory})

    def finished(self, state):
        return bool(state.memory["done"].all())


def pad(x: Tensor) -> Tensor:
    """``x`` continued to multiples of 16 below and to the right, by its last row and column."""
    rows, columns = (-n % SHIFTS for n in x.shape[-2:])
    flat = x.reshape(-1, *x.shape[-3:])
    padded = torch.nn.functional.pad(flat, (0, columns, 0, rows), mode="replicate")
    return padded.reshape(*x.shape[:-2], *padded.shape[-2:])
