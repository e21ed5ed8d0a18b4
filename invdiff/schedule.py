"""Noise schedules: a decreasing list of sigmas, ``steps + 1`` long, last 0 (convention ``x = x0 + sigma n``).

Variance-preserving schedules are written in time t and carried over by sigma^2 = (1 - a) / a, a the product of
1 - beta. Continuous linear betas: ln a = -(b1 - b0) t^2 / 2 - b0 t, t in (0, 1] (Song et al. 2021, equation 33).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from invdiff.errors import UsageError, choose

BETA_MIN, BETA_MAX = 0.1, 20.0  # b0 and b1 of the continuous schedule, per unit of time
COSINE_OFFSET = 0.008


def _check(steps: int, sigma_max: float, sigma_min: float) -> None:
    if int(steps) != steps or steps < 1:
        raise UsageError(f"steps must be a whole number of at least 1, got {steps}")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise UsageError(f"a schedule needs 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")


def check_sigmas(sigmas: Sequence[float]) -> list[float]:
    """The schedule as a list of floats.

    Raises:
        UsageError: fewer than two values, one that is not finite, not decreasing, or the last one is not 0.
    """
    out = [float(s) for s in sigmas]
    if len(out) < 2 or out[-1] != 0 or not all(a > b for a, b in pairwise(out)) or not out[0] < math.inf:
        raise UsageError(f"a schedule is a decreasing list of finite sigmas that ends in 0, got {out[:8]}")
    return out


def vp_time(sigma: float, first: float = BETA_MIN, last: float = BETA_MAX) -> float:
    """Time t of ``sigma`` under continuous linear betas; 0 at 0, 1 at about 152."""
    twice = 2 * math.log1p(sigma**2)  # -2 ln a
    return twice / (math.sqrt(first**2 + (last - first) * twice) + first)


def vp_sigma(time: float, first: float = BETA_MIN, last: float = BETA_MAX) -> float:
    """Sigma at time t under continuous linear betas; the inverse of :func:`vp_time`."""
    return math.sqrt(math.expm1(0.5 * (last - first) * time**2 + first * time))


def cosine_time(sigma: float) -> float:
    """Time t of ``sigma`` where a(t) = f(t) / f(0), f(t) = cos^2(pi/2 (t + s) / (1 + s))."""
    start = math.cos(0.5 * math.pi * COSINE_OFFSET / (1 + COSINE_OFFSET))
    angle = math.acos(start / math.hypot(1, sigma))
    return angle * (1 + COSINE_OFFSET) / (0.5 * math.pi) - COSINE_OFFSET


def cosine_sigma(time: float) -> float:
    """Sigma at time t in [0, 1); the inverse of :func:`cosine_time`."""
    half = 0.5 * math.pi / (1 + COSINE_OFFSET)
    ratio = math.cos(half * COSINE_OFFSET) / math.cos(half * (time + COSINE_OFFSET))
    return math.sqrt(max(0.0, ratio**2 - 1))


def table_sigmas(betas: Sequence[float]) -> list[float]:
    """Increasing sigmas of a table of betas: sigma_i^2 = (1 - a_i) / a_i, a_i = (1 - beta_0) ... (1 - beta_i).

    Raises:
        UsageError: a beta outside (0, 1).
    """
    if not betas or not all(0 < beta < 1 for beta in betas):
        raise UsageError("betas must lie between 0 and 1; give those of the checkpoint's training")
    total, out = 0.0, []
    for beta in betas:
        total -= math.log1p(-beta)
        out.append(math.sqrt(math.expm1(total)))
    return out


def linear_betas(count: int = 1000, first: float = 1e-4, last: float = 0.02) -> list[float]:
    """The betas of DDPM (Ho et al. 2020, section 4)."""
    return [first + (last - first) * k / max(count - 1, 1) for k in range(count)]


def _spaced(steps: int, sigma_max: float, sigma_min: float, there: Callable, back: Callable) -> list[float]:
    """Evenly spaced in ``there(sigma)``; the ends are exact."""
    _check(steps, sigma_max, sigma_min)
    a, b = there(sigma_max), there(sigma_min)
    inner = [back(a + k / (steps - 1) * (b - a)) for k in range(1, steps - 1)]
    return [sigma_max, *inner, *([sigma_min] if steps > 1 else []), 0.0]


def log_snr(steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """Evenly spaced in ln sigma, that is in log signal-to-noise ratio."""
    _check(steps, sigma_max, sigma_min)
    ratio = math.log(sigma_min / sigma_max) / max(steps - 1, 1)
    return [sigma_max * math.exp(k * ratio) for k in range(steps)] + [0.0]


def karras(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """Polynomial of degree ``rho`` in the step (Karras et al. 2022, equation 5)."""
    _check(steps, sigma_max, sigma_min)
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(a + k / max(steps - 1, 1) * (b - a)) ** rho for k in range(steps)] + [0.0]


def uniform_time(steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """Evenly spaced in the time of continuous linear betas; wastes steps at high noise."""
    return _spaced(steps, sigma_max, sigma_min, vp_time, vp_sigma)


def quadratic(steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """Evenly spaced in the root of that time (Song et al. 2021, DDIM, appendix D.2; DEIS, section 4)."""
    return _spaced(steps, sigma_max, sigma_min, lambda s: math.sqrt(vp_time(s)), lambda u: vp_sigma(u * u))


def cosine(steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """Evenly spaced in the time of cosine noise (Nichol and Dhariwal 2021, equation 17)."""
    return _spaced(steps, sigma_max, sigma_min, cosine_time, cosine_sigma)


def discrete(steps: int, sigma_max: float, sigma_min: float, betas: Sequence[float] | None = None) -> list[float]:
    """Entries of a table of betas, evenly spaced by index between ``sigma_max`` and ``sigma_min``.

    Args:
        steps: at most the number of entries in that range.
        sigma_max, sigma_min: range; the ends are the outermost entries inside it.
        betas: the table; default that of DDPM, 1000 linear betas (sigma 0.01 to 157).

    Raises:
        UsageError: more steps than entries.
    """
    _check(steps, sigma_max, sigma_min)
    slack = 1 + 1e-9
    table = table_sigmas(linear_betas() if betas is None else betas)
    inside = [s for s in reversed(table) if sigma_min / slack <= s <= sigma_max * slack]
    if steps > len(inside):
        raise UsageError(
            f"{steps} steps, but the table of betas has {len(inside)} entries between sigma {sigma_min} and "
            f"{sigma_max}: take fewer steps or another schedule"
        )
    return [inside[(2 * k * (len(inside) - 1) + steps - 1) // max(2 * (steps - 1), 1)] for k in range(steps)] + [0.0]


SCHEDULES: dict[str, Callable[[int, float, float], list[float]]] = {
    "log-snr": log_snr,
    "karras": karras,
    "quadratic": quadratic,
    "uniform-time": uniform_time,
    "cosine": cosine,
    "ddpm": discrete,
}


def make_schedule(name: str, steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """The schedule ``name`` of the table: ``steps + 1`` values, the last 0.

    Raises:
        UsageError: an unknown name (lists the choices), or numbers that make no schedule.
    """
    return choose(name, SCHEDULES, "schedule")(steps, sigma_max, sigma_min)
