"""RED-diff: a variational fit by Adam, regularised by the denoiser at falling noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from invdiff.errors import UsageError, choose
from invdiff.schedule import log_snr
from invdiff.solvers.base import Solver, State
from invdiff.solvers.common import mean_squares, of, squared_norms, start_image

WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda sigma: sigma,
    "sqrt": math.sqrt,
    "square": lambda sigma: sigma**2,
    "log": math.log1p,
    "clip": lambda sigma: min(sigma, 1.0),
    "power": lambda sigma: sigma ** (2 / 3),
    "const": lambda sigma: 1.0,
}  # w as a function of sigma = 1 / sqrt(SNR)


@dataclass(frozen=True)
class REDDiff(Solver):
    """RED-diff (Mardani et al. 2024, algorithm 1), in the convention x = x0 + sigma n.

    Minimises over mu   1/(2 m) |A mu - y|^2 / a + (lam / n) E_sigma w(sigma) <sg(eps' - eps), mu>   by Adam, one
    noise level and one draw eps a step: x = mu + sigma eps, eps' = (x - D(x; sigma)) / sigma, so that
    grad = A^T (A mu - y) / (m a) + lam w(sigma) (mu - D(x; sigma)) / (n sigma).

    m counts the data and n the pixels of a slice (of the stack, where the operator couples slices): both terms are
    means in the published code, and sums in the paper. y is whitened, and a makes the data term that of the published
    operators, whatever units and noise: the mean square of the rows of A, which is 1 for missing pixels, or with
    ``scaling`` "norm" |A|^2, which is 1 for blur too. For CT |A|^2 is 440 times the mean square of the columns, and the
    prior would outweigh the data (23.2 instead of 28.7 dB on a validation slice).
    The published code returns mu before its last step; here the step is taken. Published: 100 to 1000 noise levels,
    even in time; here even in log-SNR.

    mu is no posterior sample but seeks a mode, and the spread of several runs is that of the draws alone. On a
    Gaussian prior D(mu + sigma eps) pulls towards the prior's mean with a weight that does not know the noise of the
    data, and Adam, which forgets, ends within about one lr of where the last levels lead, so that no posterior mean is
    reached unless lam happens to fit the noise.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean of runs is off by 6 % of its norm where half of
    the pixels are missing, with 0.5 times the variance of the posterior; by 5 % for averages of 2 x 2, with 0.2.

    Volumes held: 13: mu and two moments of two steps, D, the gradient, draws, temporaries; or the warm start.

    Args:
        lam: weight of the prior; published 0.25.
        lr: Adam's step, in the prior's range; published 0.1 (0.5 with 100 steps).
        weighting: w(sigma): "linear" (sigma, published), "sqrt", "square", "log" (ln(1 + sigma)), "clip"
            (min(sigma, 1)), "power" (sigma^(2/3)) or "const" (1).
        scaling: "rows" or "norm", see above.
        beta1, beta2: Adam's; published 0.9 and 0.99.
        sigma_max, sigma_min: schedule.
        warm: start from the warm start (published: from the pseudo-inverse), instead of zeros.

    Raises:
        UsageError: lr not positive, betas outside [0, 1), an unknown weighting.
    """

    lam: float = 0.25
    lr: float = 0.1
    weighting: str = "linear"
    scaling: str = "rows"
    beta1: float = 0.9
    beta2: float = 0.99
    sigma_max: float = 20.0
    sigma_min: float = 0.01
    warm: bool = True

    stochastic = True
    default_steps = 200

    def __post_init__(self):
        choose(self.weighting, WEIGHTINGS, "weighting of reddiff")
        choose(self.scaling, {"rows": 0, "norm": 0}, "scaling of reddiff")
        if not (self.lr > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError(
                f"solver reddiff needs lr > 0, beta1 and beta2 in [0, 1), got {self.lr}, {self.beta1} and {self.beta2}"
            )

    def sigmas(self, steps, problem, prior):
        return log_snr(steps, min(self.sigma_max, prior.info.sigma_max), max(self.sigma_min, prior.info.sigma_min))

    def init(self, problem, prior, sigmas, rng):
        mu = start_image(problem, rng, self.warm)
        zero = torch.zeros_like(mu)
        n = math.prod(problem.operator.in_shape)
        m = math.prod(problem.operator.out_shape) * problem.base.measured_fraction
        scale = n * mean_squares(problem) if self.scaling == "rows" else m * squared_norms(problem)  # m a
        slices = 1 if problem.operator.slicewise else len(mu[0])  # gradients of the mean over one slice
        return State(mu, mu, 0, {"first": zero, "second": zero, "scale": scale / slices})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        mu, memory, k = state.x, state.memory, state.step + 1
        noisy = mu + sigma * rng.normal(k, mu)
        pull = (mu - prior.denoise(noisy, sigma)) / sigma
        grad = (self.lam * WEIGHTINGS[self.weighting](sigma) / mu[0, 0].numel()) * pull
        for b in problem.blocks():
            operator = problem.operator.restrict(b)
            grad[:, b] += operator.adjoint(operator(mu[:, b]) - problem.y[b]) / of(memory["scale"], b)
        first = self.beta1 * memory["first"] + (1 - self.beta1) * grad
        second = self.beta2 * memory["second"] + (1 - self.beta2) * grad**2
        mean, scale = first / (1 - self.beta1**k), (second / (1 - self.beta2**k)).sqrt()
        mu = mu - self.lr * mean / (scale + 1e-8)
        return State(mu, mu, k, {**memory, "first": first, "second": second})
