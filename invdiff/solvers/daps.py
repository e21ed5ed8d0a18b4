"""DAPS: decoupled annealing, an ODE to the clean image, Langevin steps on it, and noise again."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebpts1, chebvander
from torch import Tensor

from invdiff.coupling import Coupling, coupled
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.problem import Problem
from invdiff.schedule import karras
from invdiff.solvers.base import State
from invdiff.solvers.chain import Chain
from invdiff.solvers.common import of, squared_norms

MARGIN = 1.02  # of the interval of Chebyshev's series over the largest eigenvalue, which is found from below
PRECISION = 0.1  # of that series, in roots of the machine's epsilon


@dataclass(frozen=True)
class DAPS(Chain):
    """DAPS (Zhang et al. 2024, algorithm 1), in the convention x = x0 + sigma n.

    1. z from x by Euler steps of the flow dx/dsigma = (x - D(x; sigma)) / sigma down to ``ode_min``, where z = D;
    2. Langevin steps from z on the clean image: u <- u - h (b A^T (A u - y) + (u - z) / sigma^2) + sqrt(2 h) n;
    3. x <- u + sigma' n.

    The published step h is a number that diverges unless |A| is about 1; here h = ``rate`` / (b |A|^2 + 1 / sigma^2),
    stable below 2, and falls linearly to 1 % over the run, as published. In these units the published one starts at 2,
    the border. y is whitened, so that data_weight b = 1 is Bayes' rule and the paper's; the published code has
    b = 2 (sigma_y / tau)^2 = 50, which takes the data for 7 times more exact than they are. The flow is that of the
    code: it ends at ``ode_min``, without a last denoising.

    Step 2 is linear in u, so that u after all Langevin steps is Gaussian with a mean and a covariance that are
    functions of A^T A. Without a coupling it is drawn from that law at once (:func:`law`): a hundred steps take 6 to
    53 products with A^T A in single precision, the fewer the smaller h. Where the data are exact its error is a tenth
    of the root of the machine's epsilon.

    On a Gaussian prior the Langevin steps take (1 / sigma^2 + A^T A)^-1 for the covariance of x0 given x and y: right
    while sigma is small beside the prior's spread, too wide above, where z, the end of a flow, is no mean either. Later
    levels correct earlier ones as far as they are still noisy. A finite h adds h k / 2, relative, to the variance of a
    direction of curvature k, and a hundred steps do not reach directions of 1 % of the largest curvature.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean is off by 16 % of its norm where half of the
    pixels are missing, with 2.3 times the variance of the posterior; by 1.7 % for averages of 2 x 2, with 2.2.

    Volumes held: 4, and 6 of 32 slices; 2 more with a coupling: x and u of two steps, z, the gradient, noise, and
    three of the recurrence.

    Args:
        langevin: steps on the clean image at a level; published 100.
        ode_steps: network calls at a level; published 5.
        rate: step of the Langevin iteration in units of its curvature, in (0, 2).
        rate_end: what it has fallen to at the end, relative; published 0.01.
        data_weight: b.
        ode_min: last sigma of the flow; published 0.01.
        coupling: slice regulariser, or None: its gradient at 1 / sigma^2 joins that of the Langevin steps, its
            curvature that of h.
        sigma_max, sigma_min, schedule: of :class:`Chain`; published Karras', 100 to 0.1 in 200 levels.

    Raises:
        UsageError: no step, a rate outside (0, 2), ode_min not positive.
    """

    langevin: int = 100
    ode_steps: int = 5
    rate: float = 1.0
    rate_end: float = 0.01
    data_weight: float = 1.0
    ode_min: float = 0.01
    coupling: Coupling | None = None
    sigma_max: float = 100.0
    sigma_min: float = 0.1
    schedule: str = "karras"

    stochastic = True
    default_steps = 50

    def __post_init__(self):
        super().__post_init__()
        if not (self.langevin >= 1 and self.ode_steps >= 1 and 0 < self.rate < 2 and self.ode_min > 0):
            raise UsageError(
                "solver daps needs langevin >= 1, ode_steps >= 1, rate in (0, 2) and ode_min > 0, "
                f"got {self.langevin}, {self.ode_steps}, {self.rate} and {self.ode_min}"
            )

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Per step."""
        return self.ode_steps

    def init(self, problem, prior, sigmas, rng):
        zero = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        levels = torch.tensor(float(len(sigmas) - 1))
        memory = {"norm2": squared_norms(problem), "levels": levels}
        return State(sigmas[0] * rng.normal(0, zero), zero, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        z = self._flow(prior, state.x, sigma)
        first = state.step * (self.langevin + 1) + 1  # draws of this level
        done = state.step / max(1.0, float(state.memory["levels"]) - 1)
        rate = self.rate * (1 + (self.rate_end - 1) * done)
        series = law(self.langevin, reach(rate), PRECISION * torch.finfo(z.dtype).eps ** 0.5)
        u = torch.empty_like(z)
        for b in [slice(None)] if coupled(self.coupling, problem) else problem.blocks():
            steps = Steps(rate, of(state.memory["norm2"], b), rng.restrict(b), first, series)
            u[:, b] = self._langevin(problem.restrict(b), z[:, b], sigma, steps)
        x = u + sigma_next * rng.normal(first + self.langevin, u) if sigma_next > 0 else u
        return State(x, u, state.step + 1, state.memory)

    def _flow(self, prior, x: Tensor, sigma: float) -> Tensor:
        levels = karras(self.ode_steps + 1, max(sigma, self.ode_min), self.ode_min)[:-1]
        for now, after in pairwise(levels):
            x = x + (after - now) / now * (x - prior.denoise(x, now))
        return x

    def _langevin(self, part: Problem, z: Tensor, sigma: float, steps: "Steps") -> Tensor:
        coupling = self.coupling if coupled(self.coupling, part) else None
        if coupling is None and len(steps.law) < self.langevin:
            return self._at_once(part, z, sigma, steps)
        extra = coupling.curvature(part, 1 / sigma**2) if coupling is not None else 0.0
        h = steps.rate / (self.data_weight * steps.norm2 + 1 / sigma**2 + extra)
        known, u = part.operator.adjoint(part.y), z
        for k in range(self.langevin):
            grad = self.data_weight * (part.operator.normal(u) - known) + (u - z) / sigma**2
            if coupling is not None:
                grad = grad + coupling.gradient(part, u, 1 / sigma**2)
            u = u - h * grad + (2 * h).sqrt() * steps.rng.normal(steps.first + k, u)
        return u

    def _at_once(self, part: Problem, z: Tensor, sigma: float, steps: "Steps") -> Tensor:
        """z + h p(h H) g + (h c(h H))^1/2 n, with g = b A^T (y - A z), H = b A^T A + 1 / sigma^2 and white n, by
        Clenshaw's recurrence: a product with H for each term of the :func:`law`."""
        h = steps.rate / (self.data_weight * steps.norm2 + 1 / sigma**2)
        g = self.data_weight * h * part.operator.adjoint(part.y - part.operator(z))
        noise = h.sqrt() * steps.rng.normal(steps.first, z)
        *others, (a, b) = steps.law
        scale, one, two = 2 * h / reach(steps.rate), a * g + b * noise, torch.zeros_like(z)
        for k, (a, b) in reversed(list(enumerate(others))):
            twice = 2 if k else 1
            two.neg_().add_(g, alpha=a).add_(noise, alpha=b)  # the new one: a g + b n + 2 (s H - 1) one - two
            two.addcmul_(one, twice * (scale / sigma**2 - 1))
            two.addcmul_(part.operator.normal(one), twice * self.data_weight * scale)
            one, two = two, one
        return one.add_(z)


class Steps(NamedTuple):
    """The Langevin steps of a level: their rate, |A|^2 of the slices, draws and number of the first, and their law."""

    rate: float
    norm2: Tensor
    rng: Draws
    first: int
    law: list[tuple[float, float]]


def reach(rate: float) -> float:
    """The largest t for which the law holds; below 2, where the iteration would grow."""
    return min(2.0, MARGIN * rate)


def law(steps: int, rate: float, tolerance: float) -> list[tuple[float, float]]:
    """What ``steps`` Langevin steps do in a direction of curvature t / h, as Chebyshev series on 0 <= t <= ``rate``.

    They add h p(t) g, p(t) = sum_j (1 - t)^j, g minus the gradient at the start, and noise of variance h c(t), c(t) =
    2 sum_j (1 - t)^2j, j < ``steps``.

    Returns:
        Coefficients of p and of the root of c, as many as keep both within ``tolerance``; where the data are exact p is
        about 1 / t and c at least 2, while both are largest, ``steps`` and twice as many, where nothing is measured.
    """

    nodes = chebpts1(16 + min(steps, math.ceil(12 * steps**0.5)))
    basis = 2 / len(nodes) * chebvander(nodes, len(nodes) - 1)
    basis[:, 0] /= 2
    powers = (1 - rate * (nodes[:, None] + 1) / 2) ** np.arange(steps)
    mean, noise = powers.sum(1) @ basis, np.sqrt(2 * (powers**2).sum(1)) @ basis
    rest = [np.abs(c)[::-1].cumsum()[::-1] for c in (mean, noise)]
    needed = int(np.sum(np.maximum(*rest) > tolerance))
    return list(zip(mean[:needed].tolist(), noise[:needed].tolist(), strict=True))
