"""No data at all: samples of the prior, by any sampler."""

from dataclasses import dataclass, field

import torch

from invdiff.operator import LinearOperator
from invdiff.problem import Problem
from invdiff.samplers.base import Sampler
from invdiff.samplers.dpm_solver import DPMSolverPP
from invdiff.schedule import make_schedule
from invdiff.solvers.base import Solver, State


class Nothing(LinearOperator):
    """The operator that measures no number of an image ``(C, H, W)``."""

    def __init__(self, shape: tuple[int, int, int]):
        self.in_shape, self.out_shape = shape, (0,)

    def forward(self, x):
        return x.flatten(-3)[..., :0]


def no_data(shape: tuple[int, int, int], slices: int = 1, dtype=torch.float32, device="cpu") -> Problem:
    """The problem whose posterior is the prior, for ``slices`` images ``(C, H, W)`` in the prior's range."""
    y = torch.zeros(slices, 0, dtype=dtype, device=device)
    return Problem(y, Nothing(shape), y)


@dataclass(frozen=True)
class Unconditional(Solver):
    """A sampler on the bare prior, from noise of the first sigma down to 0; the data of the problem are not read.

    Volumes held: those of the sampler.

    Args:
        sampler: which steps.
        schedule: name in the table of schedules, between the noise levels of the prior.
    """

    sampler: Sampler = field(default_factory=DPMSolverPP)
    schedule: str = "log-snr"

    default_steps = 50

    def sigmas(self, steps, problem, prior):
        return make_schedule(self.schedule, steps, prior.info.sigma_max, prior.info.sigma_min)

    def init(self, problem, prior, sigmas, rng):
        start = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        x, memory = self.sampler.init(start, sigmas[0], rng)
        return State(x, start, 0, memory)

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x, memory = self.sampler.step(state.x, prior.denoise, sigma, sigma_next, state.memory, rng)
        return State(x, x if sigma_next == 0 else memory["x0"], state.step + 1, memory)
