"""Samplers of the discrete chain: DDIM with its eta, DDPM."""

import math
from dataclasses import dataclass

from invdiff.errors import UsageError
from invdiff.samplers.base import Sampler, remember, steps_done


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (Song et al. 2021, equation 12), with eta of equation 16.

    x' = D + sqrt(sigma'^2 - u^2) eps + u z,  u = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma,  eps = (x - D) / sigma.

    eta 0 is deterministic and the first-order step of probability flow; 1 is DDPM with the posterior variance. This
    is not the eta of DDRM, DDNM and DDS, whose noise is sigma' (sqrt(1 - eta^2) eps + eta z).

    Args:
        eta: share of fresh noise, in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UsageError(f"sampler option eta must lie in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x0 = denoise(x, sigma)
        up = self.eta * sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        out = x0 + math.sqrt(sigma_next**2 - up**2) / sigma * (x - x0)
        if up > 0:
            out = out + up * rng.normal(steps_done(memory) + 1, x)
        return out, remember(memory, sigma, x0=x0)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2, equations 7 and 11), on any schedule.

    x' = D + (sigma' / sigma)^2 (x - D) + u z. The mean is that of q(x' | x, x0 = D); the variance is one of the two of
    section 3.2, which are optimal for a point and for white noise of variance 1:
    "small": u^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2 (beta tilde),
    "large": u^2 = (1 + sigma'^2) (sigma^2 - sigma'^2) / (1 + sigma^2) (beta). No noise in the step to 0.

    Args:
        variance: "small" or "large"; published results take "large", DPS between the two as the network says.
    """

    variance: str = "small"

    def __post_init__(self):
        if self.variance not in ("small", "large"):
            raise UsageError(f"sampler option variance must be small or large, got '{self.variance}'")

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x0 = denoise(x, sigma)
        out = x0 + (sigma_next / sigma) ** 2 * (x - x0)
        if sigma_next > 0:
            fresh = sigma**2 - sigma_next**2
            share = (sigma_next / sigma) ** 2 if self.variance == "small" else (1 + sigma_next**2) / (1 + sigma**2)
            out = out + math.sqrt(share * fresh) * rng.normal(steps_done(memory) + 1, x)
        return out, remember(memory, sigma, x0=x0)
