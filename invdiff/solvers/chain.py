"""Solvers that walk down noise levels, and those of them whose move may be any sampler's."""

import abc
from dataclasses import dataclass

from torch import Tensor

from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.samplers import parse_sampler
from invdiff.samplers.base import Denoiser
from invdiff.schedule import SCHEDULES, make_schedule
from invdiff.solvers.base import Solver, State

OWN = "own"
MARK = "sampler."  # of a sampler's entries among those of the solver


@dataclass(frozen=True)
class Chain(Solver):
    """A solver on falling noise levels.

    Args:
        sigma_max, sigma_min: first and last level, kept inside the range of the prior.
        schedule: spacing of the levels, a name of :data:`invdiff.schedule.SCHEDULES`.

    Raises:
        UsageError: an unknown schedule, or sigma_min above sigma_max.
    """

    sigma_max: float = 20.0
    sigma_min: float = 0.01
    schedule: str = "log-snr"

    def __post_init__(self):
        if self.schedule not in SCHEDULES or not 0 < self.sigma_min <= self.sigma_max:
            make_schedule(self.schedule, 1, self.sigma_max, self.sigma_min)  # says what is wrong

    def sigmas(self, steps, problem, prior):
        info = prior.info
        high, low = min(self.sigma_max, info.sigma_max), max(self.sigma_min, info.sigma_min)
        if low > high:
            raise UsageError(
                f"the prior {info.name} has noise levels from {info.sigma_min:.3g} to {info.sigma_max:.3g}, a solver "
                f"asks for {self.sigma_min:.3g} to {self.sigma_max:.3g}: choose sigma_min and sigma_max among them, or "
                "check --range and --prior-range of the import"
            )
        return make_schedule(self.schedule, steps, high, low)


@dataclass(frozen=True)
class Guided(Chain):
    """A chain that estimates x0 from x and the data and then moves x, by a rule of its own or by any sampler's.

    A sampler takes the estimate for that of a denoiser which knows the data. Where that is E[x0 | x, y] exactly, the
    chain ends in samples of the posterior as its steps grow.

    Args:
        sampler: "own" for the published move, or a name of :data:`invdiff.samplers.SAMPLERS`, with options after a
            colon: "heun", "ddim:eta=0.5", "euler:churn=0.2,churn_noise=1.003".

    Raises:
        UsageError: an unknown sampler or option of it, or "own" where the solver has no move of its own.
    """

    sampler: str = OWN

    def __post_init__(self):
        super().__post_init__()
        if self.sampler != OWN:
            parse_sampler(self.sampler)
        elif type(self).step is Guided.step and type(self).published is Guided.published:
            raise UsageError(
                f"solver {type(self).__name__} has no move of its own: name a sampler, e.g. ddim or dpmpp-2m"
            )

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Per step."""
        return 1 if self.sampler == OWN else parse_sampler(self.sampler).evaluations

    def calls(self, steps):
        return steps if self.sampler == OWN else parse_sampler(self.sampler).calls(steps)

    @abc.abstractmethod
    def estimate(
        self, problem: Problem, prior: Prior, x: Tensor, sigma: float, memory: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The solver's E[x0 | x, y] at noise level ``sigma``, shaped like ``x``, and the new memory."""

    def published(
        self, problem: Problem, prior: Prior, state: State, sigma: float, sigma_next: float, rng: Draws
    ) -> State:
        """The step as published; where there is none, ``sampler`` must name one."""
        raise NotImplementedError

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        if self.sampler == OWN:
            return self.published(problem, prior, state, sigma, sigma_next, rng)
        own = {k: v for k, v in state.memory.items() if not k.startswith(MARK)}

        def denoise(x: Tensor, level: float) -> Tensor:
            nonlocal own
            x0, own = self.estimate(problem, prior, x, level, own)
            return x0

        x, memory = self.moved(denoise, state, sigma, sigma_next, rng)
        x0 = memory[MARK + "x0"] if sigma_next > 0 else x
        return State(x, x0, state.step + 1, memory | own)

    def moved(self, denoise: Denoiser, state: State, sigma: float, sigma_next: float, rng: Draws):
        """x after a step of the sampler with ``denoise``, and the whole memory with the sampler's part of it new."""
        kept = {k.removeprefix(MARK): v for k, v in state.memory.items() if k.startswith(MARK)}
        x, kept = parse_sampler(self.sampler).step(state.x, denoise, sigma, sigma_next, kept, rng)
        return x, state.memory | {MARK + k: v for k, v in kept.items()}
