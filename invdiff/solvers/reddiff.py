"""RED-diff: a variational fit by a first-order optimizer, regularised by the denoiser at many noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff.coupling import Coupling, coupled
from invdiff.draws import Draws
from invdiff.errors import UsageError, choose
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.chain import Chain
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

TIMES = {"descending": "sigma of the step", "random": "drawn from the schedule"}
SCALINGS = {"rows": "mean square of the rows of A", "norm": "|A|^2"}
EPSILON = 1e-8  # beside root mean squares of the gradient
Moments = dict[str, Tensor]


def _adam(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    first, second = beta1 * m["first"] + (1 - beta1) * g, beta2 * m["second"] + (1 - beta2) * g**2
    mean, scale = first / (1 - beta1**k), (second / (1 - beta2**k)).sqrt()
    return mean / (scale + EPSILON), {"first": first, "second": second}


def _rmsprop(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    second = beta2 * m["second"] + (1 - beta2) * g**2
    return g / (second.sqrt() + EPSILON), {"second": second}


def _adagrad(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    second = m["second"] + g**2
    return g / (second.sqrt() + EPSILON), {"second": second}


def _sgd(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    return g, {}


def _momentum(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    first = beta1 * m["first"] + g
    return first, {"first": first}


def _nesterov(g: Tensor, m: Moments, k: int, beta1: float, beta2: float) -> tuple[Tensor, Moments]:
    first = beta1 * m["first"] + g
    return g + beta1 * first, {"first": first}


@dataclass(frozen=True)
class Optimizer:
    """A rule mu <- mu - lr d for a gradient g.

    Args:
        direction: d and the new moments, from g, the old moments, the number of the step (from 1), beta1 and beta2.
        moments: names of the moments, which start at 0.
        adaptive: d has no unit, so that lr is a length; else g is divided by the largest curvature of the data term.
    """

    direction: Callable[[Tensor, Moments, int, float, float], tuple[Tensor, Moments]]
    moments: tuple[str, ...]
    adaptive: bool


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(_adam, ("first", "second"), True),
    "rmsprop": Optimizer(_rmsprop, ("second",), True),
    "adagrad": Optimizer(_adagrad, ("second",), True),
    "sgd": Optimizer(_sgd, (), False),
    "momentum": Optimizer(_momentum, ("first",), False),
    "nesterov": Optimizer(_nesterov, ("first",), False),
}


@dataclass(frozen=True)
class REDDiff(Chain):
    """RED-diff (Mardani et al. 2024, algorithm 1), in the convention x = x0 + sigma n.

    Minimises over mu   1/(2 m) |A mu - y|^2 / a + (lam / n) E_sigma w(sigma) <sg(eps' - eps), mu>   by Adam, one
    noise level and one draw eps a step: x = mu + sigma eps, eps' = (x - D(x; sigma)) / sigma, so that
    grad = A^T (A mu - y) / (m a) + lam w(sigma) (mu - D(x; sigma)) / (n sigma).

    m counts the data and n the pixels of a slice (of the stack, where the operator couples slices): both terms are
    means in the published code, and sums in the paper. y is whitened, and a makes the data term that of the published
    operators, whatever units and noise: the mean square of the rows of A, which is 1 for missing pixels, or with
    ``scaling`` "norm" |A|^2, which is 1 for blur too. For CT |A|^2 is 440 times the mean square of the columns, and the
    prior would outweigh the data (23.2 instead of 28.7 dB on a validation slice).
    The published code returns mu before its last step; here the step is taken. It can put noise on mu before x is made,
    by default none and none here. Published: 100 to 1000 noise levels,
    even in time; here even in log-SNR.

    mu is no posterior sample but seeks a mode, and the spread of several runs is that of the draws alone. On a
    Gaussian prior D(mu + sigma eps) pulls towards the prior's mean with a weight that does not know the noise of the
    data, and Adam, which forgets, ends within about one lr of where the last levels lead, so that no posterior mean is
    reached unless lam happens to fit the noise.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the mean of runs is off by 4 % of its norm where half of
    the pixels are missing, with 0.5 times the variance of the posterior; by 3 % for averages of 2 x 2, with 0.2.

    Volumes held: 12: mu and two moments of two steps, D, the gradient, draws, temporaries; or the warm start.

    Args:
        lam: weight of the prior; published 0.25.
        lr: step. Of "adam", "rmsprop" and "adagrad" a length in the prior's range; published 0.1 (0.5 with 100 steps).
            Of "sgd", "momentum" and "nesterov" in units of 1 / (largest curvature of the data term): stable below about
            2 for "sgd" and 2 (1 + beta1) for "momentum", which gains a factor 1 / (1 - beta1) by itself.
        weighting: w(sigma): "linear" (sigma, published), "sqrt", "square", "log" (ln(1 + sigma)), "clip"
            (min(sigma, 1)), "power" (sigma^(2/3)) or "const" (1).
        scaling: "rows" or "norm", see above.
        optimizer: "adam" (Kingma and Ba 2015, algorithm 1; published), "rmsprop" (Adam without momentum and without its
            corrections of the first steps), "adagrad" (Duchi et al. 2011, the diagonal form), "sgd", "momentum" (Polyak
            1964: v <- beta1 v + g; tried in the published code), "nesterov" (g + beta1 v in the place of v); any other
            :class:`Optimizer` under the name that it is given in :data:`OPTIMIZERS`.
        times: noise level of a step: "descending" (its own, published) or "random" (any of the schedule but the 0, with
            equal chances, the same for every slice and sample: Mardani et al. compare the two).
        batch: noise levels and draws a step averages, one network call each (the published "parallel" variant).
            Descending ones divide the way to the next level geometrically, so that N steps see N batch levels; the
            last step has draws of its one level.
        beta1, beta2: of the moments; published 0.9 and 0.99.
        sigma_max, sigma_min, schedule: of :class:`Chain`.
        warm: start from the warm start (published: from the pseudo-inverse), instead of zeros.
        coupling: slice regulariser, or None: one more term of the loss, TV-z with rounded corners.

    Raises:
        UsageError: lr not positive, betas outside [0, 1), batch below 1, an unknown weighting, scaling, optimizer or
            choice of times.
    """

    lam: float = 0.25
    lr: float = 0.1
    weighting: str = "linear"
    scaling: str = "rows"
    optimizer: str = "adam"
    times: str = "descending"
    batch: int = 1
    beta1: float = 0.9
    beta2: float = 0.99
    warm: bool = True
    coupling: Coupling | None = None

    stochastic = True
    nonlinear = True
    default_steps = 200

    def __post_init__(self):
        super().__post_init__()
        choose(self.weighting, WEIGHTINGS, "weighting of reddiff")
        choose(self.scaling, SCALINGS, "scaling of reddiff")
        choose(self.optimizer, OPTIMIZERS, "optimizer of reddiff")
        choose(self.times, TIMES, "times of reddiff")
        if not (self.lr > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.batch >= 1):
            raise UsageError(
                "solver reddiff needs lr > 0, beta1 and beta2 in [0, 1) and batch >= 1, "
                f"got {self.lr}, {self.beta1}, {self.beta2} and {self.batch}"
            )

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Per step."""
        return self.batch

    def init(self, problem, prior, sigmas, rng):
        mu = start_image(problem, rng, self.warm)
        zero, rule = torch.zeros_like(mu), OPTIMIZERS[self.optimizer]
        n = math.prod(problem.operator.in_shape)
        m = math.prod(problem.operator.out_shape) * problem.base.measured_fraction
        plain = self.scaling == "norm" or not rule.adaptive
        norm2 = squared_norms(problem) if plain else torch.ones(())
        scale = n * mean_squares(problem) if self.scaling == "rows" else m * norm2  # m a
        scale = scale / (1 if problem.operator.slicewise else len(mu[0]))  # gradients of the mean over one slice
        scale = torch.where(scale > 0, scale, 1.0)  # A = 0 has gradient 0, whatever it is divided by
        memory = {name: zero for name in rule.moments} | {"scale": scale}
        if not rule.adaptive:
            memory["curvature"] = torch.where(norm2 > 0, norm2 / scale, 1.0)
        if self.times == "random":
            memory["levels"] = torch.tensor(sigmas[:-1], dtype=torch.float64)
        return State(mu, mu, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        mu, memory, k = state.x, state.memory, state.step + 1
        levels = self._levels(memory, sigma, sigma_next, rng, k)
        grad, curvature = self._pull(prior, mu, levels, rng, k), memory.get("curvature", 0.0)
        if coupled(self.coupling, problem):
            more, steeper = self._across(self.coupling, problem, mu, levels, memory)
            grad, curvature = grad + more, curvature + steeper
        for b in problem.blocks():
            operator = problem.operator.restrict(b)
            grad[:, b] += operator.pullback(mu[:, b], operator(mu[:, b]) - problem.y[b]) / of(memory["scale"], b)
        rule = OPTIMIZERS[self.optimizer]
        grad = grad if rule.adaptive else grad / curvature
        direction, moments = rule.direction(grad, memory, k, self.beta1, self.beta2)
        mu = mu - self.lr * direction
        return State(mu, mu, k, {**memory, **moments})

    def _levels(self, memory: Moments, sigma: float, sigma_next: float, rng: Draws, k: int) -> list[float]:
        """The noise levels of step k."""
        if self.times == "descending":
            ratio = (sigma_next / sigma) ** (1 / self.batch) if sigma_next > 0 else 1.0
            return [sigma * ratio**j for j in range(self.batch)]
        levels = memory["levels"].tolist()
        one = replace(rng, slices=(0,), samples=(0,))  # whatever slices and samples run together
        z = one.normal(-k, torch.zeros(1, 1, 1, 1, self.batch, dtype=torch.float64))
        uniform = torch.special.ndtr(z).flatten().tolist()
        return [levels[min(int(u * len(levels)), len(levels) - 1)] for u in uniform]

    def _across(self, coupling: Coupling, problem: Problem, mu: Tensor, levels: list[float], memory: Moments):
        """Gradient and curvature of the coupling at 1 / s^2 = lam w / (sigma n), the curvature of the prior's term.

        Both in the units of the loss, which is minus the log-likelihood over ``scale`` (the mean one of the slices).
        """
        scale, n = memory["scale"].mean(), mu[0, 0].numel()
        pull = sum(self.lam * WEIGHTINGS[self.weighting](sigma) / sigma for sigma in levels) / (n * len(levels))
        weight = scale * pull
        return coupling.gradient(problem, mu, weight) / scale, coupling.curvature(problem, weight) / scale

    def _pull(self, prior: Prior, mu: Tensor, levels: list[float], rng: Draws, k: int) -> Tensor:
        """Gradient of the prior's term, averaged over the levels of step k, a draw for each."""
        total = torch.zeros_like(mu)
        for j, sigma in enumerate(levels):
            noisy = mu + sigma * rng.normal((k - 1) * self.batch + j + 1, mu)
            pull = (mu - prior.denoise(noisy, sigma)) / sigma
            total += (self.lam * WEIGHTINGS[self.weighting](sigma) / (mu[0, 0].numel() * len(levels))) * pull
        return total
