"""Noise schedules: a decreasing list of sigmas, ``steps + 1`` long, last 0 (convention ``x = x0 + sigma n``)."""

import math

from invdiff.errors import UsageError


def _check(steps: int, sigma_max: float, sigma_min: float) -> None:
    if int(steps) != steps or steps < 1:
        raise UsageError(f"steps must be a whole number of at least 1, got {steps}")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise UsageError(f"a schedule needs 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")


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


SCHEDULES = {"log-snr": log_snr, "karras": karras}
