"""Linear multistep samplers on the noise: DEIS (exact weights on any grid), PNDM and PLMS (Adams-Bashforth weights)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from invdiff.errors import UsageError
from invdiff.samplers.base import Sampler, history, levels, remember, steps_done
from invdiff.schedule import BETA_MAX, BETA_MIN, vp_sigma, vp_time

_NODES = 64
_ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@lru_cache(1024)
def tab_weights(sigma: float, sigma_next: float, before: tuple[float, ...]) -> tuple[float, ...]:
    """C_j = integral of l_j(t(s)) ds from ``sigma`` to ``sigma_next``, l_j the Lagrange polynomials in time.

    By Gauss-Legendre quadrature in the root w of t, in which s(w) is smooth down to 0:
    ds/dw = (1 + s^2) (b0 w + (b1 - b0) w^3) / s.

    Args:
        sigma, sigma_next: limits, ``sigma_next`` > 0.
        before: earlier noise levels, newest first; with ``sigma`` the nodes of the polynomials.
    """
    nodes = [vp_time(s) for s in (sigma, *before)]
    a, b = math.sqrt(nodes[0]), math.sqrt(vp_time(sigma_next))
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    w = a + (b - a) * (points + 1) / 2
    s = np.sqrt(np.expm1(0.5 * (BETA_MAX - BETA_MIN) * w**4 + BETA_MIN * w**2))
    measure = 0.5 * (b - a) * weights * (1 + s**2) * (BETA_MIN * w + (BETA_MAX - BETA_MIN) * w**3) / s
    out = []
    for j, own in enumerate(nodes):
        others = [t for k, t in enumerate(nodes) if k != j]
        polynomial = np.prod([(w**2 - t) / (own - t) for t in others], axis=0)
        out.append(float(np.sum(polynomial * measure)))
    return tuple(out)


@dataclass(frozen=True)
class DEIS(Sampler):
    """tAB-DEIS (Zhang and Chen 2023, equations 14 and 15): noise extrapolated by a polynomial in time.

    x' = x + sum_j C_j eps_j, C_j the integral of the Lagrange polynomial l_j(t) over sigma, t the time of continuous
    linear betas whatever the schedule. Degree r is of order r + 1 (from a history that is exact: a run from noise,
    whose first steps are of lower order, comes down to 2 with very many steps); the first steps have the degree that
    the history allows. The paper stops at a time above 0; here the step to 0 gives D.

    Volumes held: x, D and ``degree`` noises, and one of work.

    Args:
        degree: r of the paper's tABr, 0 (DDIM) to 3.
    """

    degree: int = 3

    def __post_init__(self):
        if self.degree not in (0, 1, 2, 3):
            raise UsageError(f"sampler option degree must be 0, 1, 2 or 3, got {self.degree}")

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x0 = denoise(x, sigma)
        before = tuple(levels(memory))
        noises = [(x - x0) / sigma, *history(memory, "eps")]
        memory = {**remember(memory, sigma, self.degree, eps=noises[0]), "x0": x0}
        if sigma_next == 0:
            return x0, memory
        for c, eps in zip(tab_weights(sigma, sigma_next, before), noises, strict=False):
            x = x + c * eps
        return x, memory


def _adams(noises: list, order: int):
    """The Adams-Bashforth mean of the last noises, newest first."""
    weights = _ADAMS[min(order, len(noises))]
    return sum(w * eps for w, eps in zip(weights, noises, strict=False))


@dataclass(frozen=True)
class PLMS(Sampler):
    """Pseudo linear multistep (Liu et al. 2022, equation 12): Adams-Bashforth weights in DDIM's transfer.

    x' = x + (sigma' - sigma) e, e = (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24. The first step takes the mean of
    eps and of the noise after a trial step (pseudo improved Euler), the second and third the weights of order 2 and 3,
    as in the code of latent diffusion; ``order`` 2 is the paper's S-PNDM (equation 13).

    The weights belong to even steps, and the transfer averages over sigma, not over the step: second order, as the
    paper proves, also for ``order`` 4. Volumes held: x, D and ``order`` - 1 noises, and two
    of work.

    Args:
        order: weights used, 2 to 4.
    """

    order: int = 4

    def __post_init__(self):
        if self.order not in (2, 3, 4):
            raise UsageError(f"sampler option order must be 2, 3 or 4, got {self.order}")

    def calls(self, steps: int) -> int:
        return steps + (steps > 1)

    def started(self, x, denoise, sigma, sigma_next, eps, done: int):
        """The noise of a first step, or None where the weights take over."""
        if done > 0:
            return None
        trial = x + (sigma_next - sigma) * eps
        return 0.5 * (eps + (trial - denoise(trial, sigma_next)) / sigma_next)

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x0 = denoise(x, sigma)
        noises = [(x - x0) / sigma, *history(memory, "eps")]
        eps = self.started(x, denoise, sigma, sigma_next, noises[0], steps_done(memory)) if sigma_next else None
        memory = {**remember(memory, sigma, self.order - 1, eps=noises[0]), "x0": x0}
        return x + (sigma_next - sigma) * (_adams(noises, self.order) if eps is None else eps), memory


@dataclass(frozen=True)
class PNDM(PLMS):
    """F-PNDM (Liu et al. 2022, algorithm 2): :class:`PLMS` after three pseudo Runge-Kutta steps of four calls.

    e1 = eps(x; sigma), e2 = eps(x + (m - sigma) e1; m), e3 = eps(x + (m - sigma) e2; m),
    e4 = eps(x + (sigma' - sigma) e3; sigma'), e = (e1 + 2 e2 + 2 e3 + e4) / 6 (equation 11); m lies in the middle in
    the time of continuous linear betas.
    """

    def calls(self, steps: int) -> int:
        return steps + 3 * min(3, steps - 1)

    def started(self, x, denoise, sigma, sigma_next, eps, done: int):
        if done >= 3:
            return None
        middle = vp_sigma(0.5 * (vp_time(sigma) + vp_time(sigma_next)))

        def noise(slope, level):
            u = x + (level - sigma) * slope
            return (u - denoise(u, level)) / level

        e2 = noise(eps, middle)
        e3 = noise(e2, middle)
        return (eps + 2 * e2 + 2 * e3 + noise(e3, sigma_next)) / 6
