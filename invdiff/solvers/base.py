"""The solver interface and the one loop of the package."""

import abc
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.errors import NumericalError, PriorError, UsageError
from invdiff.operator import LinearOperator
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.schedule import check_sigmas

DIVERGED = 100.0  # times as large as the largest image and the noise of the level: no estimate
SLACK = 1e-6  # of the ends of a prior's range, relative


@dataclass(frozen=True)
class State:
    """What a solver carries from step to step; saving it is saving the run.

    Attributes:
        x: current iterate ``(samples, slices, C, H, W)``.
        x0: current estimate of the clean image, same shape.
        step: steps done.
        memory: further tensors by name (duals, moments).
    """

    x: Tensor
    x0: Tensor
    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)


class Solver(abc.ABC):
    """Frozen hyper-parameters and two methods, state in and state out. Subclasses are frozen dataclasses."""

    needs_prior = True
    stochastic = False
    default_steps = 1
    stops_itself = False  # by a rule of its own; ``default_steps`` is then a safety limit
    network_calls = 1  # per step; see also ``calls``
    turning = False  # takes ``denoise_turned`` of the prior, one plane at a time, in the place of ``denoise``
    differentiates = False  # needs the gradient of the network
    nonlinear = False  # takes maps that are not linear, since it needs their gradient only
    typical_steps: int | None = None  # where that rule usually ends it; for predictions

    def sigmas(self, steps: int, problem: Problem, prior: Prior | None) -> list[float]:
        """The schedule: ``steps + 1`` values, decreasing, last 0. Solvers without a prior count down to 0."""
        return [float(steps - k) for k in range(steps + 1)]

    def require(self, problem: Problem) -> None:
        """Raise :class:`UsageError` where the solver does not fit the operator; called before anything runs."""
        return None

    def calls(self, steps: int) -> int:
        """Of the network in a run of ``steps`` steps, the last of them to 0."""
        return steps * self.network_calls

    def differentiated(self, steps: int) -> int:
        """Those of :meth:`calls` that the solver takes ``gradients`` of."""
        return self.calls(steps)

    def network_passes(self, problem: Problem, chunk: int, steps: int) -> tuple[int, int]:
        """Evaluations of the network and of its gradient in a run of ``steps`` steps, each on all slices, of which
        ``chunk`` are held at once: a gradient across several groups of so many evaluates them once more."""
        again = self.across(problem) and problem.image_shape[0] > chunk
        gradients = self.gradients * self.differentiated(steps)
        return self.calls(steps) + gradients * again, gradients

    @property
    def gradients(self) -> int:
        """Of a network call."""
        return int(self.differentiates)

    def across(self, problem: Problem) -> bool:
        """Whether the network is differentiated on all slices at once."""
        return not problem.operator.slicewise

    @abc.abstractmethod
    def init(self, problem: Problem, prior: Prior | None, sigmas: list[float], rng: Draws) -> State:
        """Start of the run."""

    @abc.abstractmethod
    def step(
        self, problem: Problem, prior: Prior | None, state: State, sigma: float, sigma_next: float, rng: Draws
    ) -> State:
        """One step from noise level ``sigma`` to ``sigma_next``."""

    def finished(self, state: State) -> bool:
        """True where a stopping rule of the solver's own is met."""
        return False


def iterate(
    solver: Solver,
    problem: Problem,
    prior: Prior | None = None,
    sigmas: list[float] | None = None,
    rng: Draws | None = None,
    state: State | None = None,
    check: bool = False,
) -> Iterator[State]:
    """Run ``solver``, yielding the state after every step; give ``state`` to resume from it.

    Args:
        solver: what to run.
        problem: whitened problem of S slices.
        prior: needed unless ``solver.needs_prior`` is False.
        sigmas: schedule; default the solver's own with its default number of steps.
        rng: noise draws; default seed 0, slices 0 .. S - 1.
        state: state to go on from.
        check: stop at an estimate that no image can be; asks the device, and waits for it, at every step.

    Raises:
        PriorError: the prior's output is no posterior mean, which every solver takes it for, or one of latents.
        UsageError: the operator is not linear (latent priors), and the solver needs one that is; the solver needs a
            prior and there is none; ``sigmas`` do not fall to 0 or leave the prior's range.
        NumericalError: with ``check``, an estimate is not finite, or :data:`DIVERGED` times as large as images and
            noise are; names step and sigma and has the last good state as ``state``.
    """
    if not (solver.nonlinear or isinstance(problem.operator, LinearOperator)):
        raise UsageError(
            f"solver {type(solver).__name__} needs a linear operator, which the decoder of latents is not: use dps "
            "or reddiff"
        )
    if prior is not None:
        _check_kind(prior, isinstance(problem.operator, LinearOperator))
    if solver.needs_prior and prior is None:
        raise UsageError(
            f"solver {type(solver).__name__} needs a prior: give one, e.g. load_prior('embedded'), or use tv"
        )
    if sigmas is None:
        sigmas = solver.sigmas(solver.default_steps, problem, prior)
    elif solver.needs_prior and prior is not None:
        _check_levels(sigmas, prior)
    rng = rng or Draws(0, tuple(range(problem.image_shape[0])))
    state = state or solver.init(problem, prior, sigmas, rng)
    for k in range(state.step, len(sigmas) - 1):
        after = solver.step(problem, prior, state, sigmas[k], sigmas[k + 1], rng)
        if check:
            _check_estimate(solver, prior, after, sigmas[k], state if state.step else None)
        state = after
        del after  # the step before is held no longer
        yield state
        if solver.finished(state):
            return


def _check_levels(sigmas: Sequence[float], prior: Prior) -> None:
    """Refuse levels that do not fall to 0 (they may repeat), or that the prior does not know."""
    levels = check_sigmas([level for level, _ in groupby(sigmas)])[:-1]
    low, high = prior.info.sigma_min, prior.info.sigma_max
    if not low * (1 - SLACK) <= levels[-1] <= levels[0] <= high * (1 + SLACK):
        raise UsageError(
            f"sigmas from {levels[0]:g} to {levels[-1]:g} leave the range of the prior: stay within {high:g} to {low:g}"
        )


def _check_estimate(solver: Solver, prior: Prior | None, state: State, sigma: float, last: State | None) -> None:
    """Refuse an estimate that no image can be."""
    largest = math.inf
    if prior is not None and solver.needs_prior and prior.kind != "latents":
        largest = DIVERGED * (max(map(abs, prior.info.value_range)) + sigma)
    ends = torch.stack(torch.aminmax(state.x0.detach())).tolist() if state.x0.numel() else [0.0]  # NaN in both
    peak = max(map(abs, ends)) if all(map(math.isfinite, ends)) else math.nan
    if not math.isfinite(peak) or peak > largest:
        what = f"values up to {peak:.3g}" if math.isfinite(peak) else "values that are not finite"
        error = NumericalError(
            f"solver {type(solver).__name__} produced {what} at step {state.step} (sigma {sigma:.4g}): check the data "
            "and the solver's options, or take more steps"
        )
        error.state = last
        raise error


def _check_kind(prior: Prior, linear: bool) -> None:
    """Refuse what is no posterior mean, and one of latents where the problem is one of images."""
    if prior.kind == "latents" and linear:
        raise PriorError(
            f"prior {prior.info.name} is one of latents, the problem one of images: give the solver the problem that "
            "invdiff.latent.latent_problem makes of it"
        )
    if prior.kind not in ("mean", "latents"):
        raise PriorError(
            f"prior {prior.info.name} gives the end of a trajectory (consistency model), no posterior mean: use another"
        )


def solve(solver: Solver, problem: Problem, prior: Prior | None = None, **options) -> Tensor:
    """The estimate of the clean image after the last step, ``(samples, slices, C, H, W)``; options as ``iterate``,
    but with ``check``."""
    return deque(iterate(solver, problem, prior, **{"check": True} | options), maxlen=1).pop().x0
