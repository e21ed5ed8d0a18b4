"""Samplers of Karras et al. 2022: Euler and Heun steps of probability flow, with optional churn."""

import math
from dataclasses import dataclass

from invdiff.errors import UsageError
from invdiff.samplers.base import Sampler, remember, steps_done


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on probability flow (Karras et al. 2022, algorithm 2 without lines 7 and 8), first order.

    s = sigma (1 + gamma);  x^ = x + sqrt(s^2 - sigma^2) S_noise z;  x' = x^ + (sigma' - s) (x^ - D(x^; s)) / s.

    The paper's gamma is min(S_churn / N, sqrt(2) - 1) for N steps; ``churn`` is S_churn / N, so that a step needs not
    know N. Without churn this is DDIM with eta 0.

    Args:
        churn: noise added before a step, relative to sigma; 0 for none.
        churn_min, churn_max: noise levels between which it is added (S_tmin, S_tmax).
        churn_noise: its standard deviation, slightly above 1 against lost detail (S_noise).
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self):
        if not (self.churn >= 0 and self.churn_noise >= 0 and 0 <= self.churn_min <= self.churn_max):
            raise UsageError("sampler options need churn >= 0, churn_noise >= 0 and 0 <= churn_min <= churn_max")

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    @property
    def stirs(self) -> bool:
        return self.churn > 0

    def stirred(self, x, sigma, memory, rng):
        """x^ and its noise level s."""
        if not (self.churn > 0 and self.churn_min <= sigma <= self.churn_max):
            return x, sigma
        raised = sigma * (1 + min(self.churn, math.sqrt(2) - 1))
        added = self.churn_noise * math.sqrt(raised**2 - sigma**2)
        return x + added * rng.normal(steps_done(memory) + 1, x), raised

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x, raised = self.stirred(x, sigma, memory, rng)
        x0 = denoise(x, raised)
        return x0 + sigma_next / raised * (x - x0), remember(memory, sigma, x0=x0)


@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method on probability flow (Karras et al. 2022, algorithm 2), second order, two evaluations per step.

    d = (x^ - D(x^; s)) / s;  x1 = x^ + (sigma' - s) d;  d' = (x1 - D(x1; sigma')) / sigma';
    x' = x^ + (sigma' - s) (d + d') / 2; the step to 0 is Euler's. Published with the Karras schedule.
    """

    evaluations = 2

    def step(self, x, denoise, sigma, sigma_next, memory, rng):
        x, raised = self.stirred(x, sigma, memory, rng)
        x0 = denoise(x, raised)
        if sigma_next == 0:
            return x0, remember(memory, sigma, x0=x0)
        slope = (x - x0) / raised
        ahead = x + (sigma_next - raised) * slope
        slope = 0.5 * (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next)
        return x + (sigma_next - raised) * slope, remember(memory, sigma, x0=x0)
