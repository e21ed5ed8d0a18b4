"""``--dry-run``: check everything, then predict memory from array sizes and time from a step on some slices."""

import json
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from invdiff.configure import steps_of
from invdiff.draws import Draws
from invdiff.latent import problem_for
from invdiff.priors.base import Prior
from invdiff.problem import Problem
from invdiff.provenance import peak_memory_mb
from invdiff.runner import Request, prepare
from invdiff.solvers.base import Solver
from invdiff.solvers.common import at_once


class Held(NamedTuple):
    """Float32 stacks that a solver holds at its peak, start, draws, old and new state included, beside the problem.

    Attributes:
        stacks: of all slices.
        blocks: of one block of slices where slices are independent, else of all.
        coupled: more of all slices with a coupling, or with differences between slices.
    """

    stacks: int
    blocks: int = 0
    coupled: int = 0


# Measured by tests/test_solver_cost.py; the docstrings of the solvers say the same.
HELD = {
    "pnp": Held(7, 8, 5),
    "dds": Held(6, 8, 4),
    "dps": Held(7, 0, 9),
    "diffpir": Held(5, 9, 4),
    "pigdm": Held(7, 5, 6),
    "mm": Held(4, 8, 14),
    "reddiff": Held(12),
    "ddnm": Held(12, 0, 4),
    "ddrm": Held(12, 0, 4),
    "mbir": Held(15),
    "daps": Held(4, 6, 2),
    "tv": Held(12, 12, 2),
    "wavelet": Held(15, 5),
    "cgls": Held(6),
    "sense-cg": Held(9),
    "sirt": Held(3, 2),
    "os-sart": Held(2, 5),
    "fbp": Held(3, 2),
    "wiener": Held(2, 7),
    "bicubic": Held(2, 2),
    "fill": Held(2, 6),
    "biharmonic": Held(8),
    "zero-filled": Held(2, 2),
    "measured": Held(2, 2),
}
SCORING = 12  # float32 stacks while figures are computed, in double precision
PICTURE_MB, PICTURE_S = 90, 3  # matplotlib and a picture of usual size
_PROBES, _SPREAD = 4, 0.5  # steps that are timed; standard deviation of an image in the prior's range
_THICK = 16  # slices of the stack on which a prior of several planes is timed


@dataclass(frozen=True)
class Plan:
    """Prediction of one run: shapes, seconds and megabytes."""

    case: str
    slices: tuple[int, int, int]
    data: tuple[int, ...]
    steps: int
    seconds: float
    memory_mb: float
    device: str

    def text(self, as_json: bool) -> str:
        if as_json:
            return json.dumps(vars(self), indent=2)
        s, h, w = self.slices
        return (
            f"{self.case}\n{s} slices of {h} x {w}, data {' x '.join(map(str, self.data))}, {self.steps} steps on "
            f"{self.device}\nabout {self.seconds:.0f} s and {self.memory_mb:.0f} MB; nothing was run or written"
        )


def predict(request: Request) -> Plan:
    """Set the run up, time network and data steps on some slices, and extrapolate.

    Solvers that stop by themselves (TV, SIRT) count with the steps they typically take.

    Raises:
        InvdiffError: whatever the run itself would raise before its first step.
    """
    start = time.perf_counter()
    device, solvers, prior, case, problem = prepare(request)
    seconds = time.perf_counter() - start + PICTURE_S
    for name, solver in solvers.items():
        count = request.samples if solver.stochastic else 1
        steps = solver.typical_steps or steps_of(request, name, solver, case)
        first, step, enough = _seconds(problem_for(solver, problem, prior), prior, solver, steps)
        seconds += count * (first + (enough or steps) * step)
    stack = 4 * torch.Size(problem.image_shape).numel() / 1e6
    held = max(SCORING if case.truth is not None else 0, *(stacks_held(n, s, problem) for n, s in solvers.items()))
    memory = peak_memory_mb() + PICTURE_MB + (held + len(solvers)) * stack
    slices, _, rows, columns = problem.image_shape
    shape = (slices, rows, columns)
    return Plan(case.description, shape, tuple(problem.y.shape), steps, seconds, memory, str(device))


def stacks_held(name: str, solver: Solver, problem: Problem) -> float:
    """Stacks that the solver holds at its peak, see :class:`Held`; blocks count by their share of the slices."""
    held = HELD[name]
    coupled = getattr(solver, "coupling", None) is not None or getattr(solver, "volumetric", False)
    first = problem.blocks()[0]
    share = 1.0 if coupled or first.stop is None else first.stop / problem.image_shape[0]
    return held.stacks + share * held.blocks + (held.coupled if coupled else 0)


class _Field(Prior):
    """Stands in for the network where only the rest of a step is timed: E[x0 | x] of a Gaussian field.

    The spectrum of the field falls as 1 / frequency^2 from about a cycle per image on, as that of images does: data
    steps that stop by themselves then take about as many iterations as with the network.
    """

    def __init__(self, prior: Prior):
        self.info, self.chunk = prior.info, getattr(prior, "chunk", 1)

    def denoise(self, x, sigma, context=None):
        height, width = x.shape[-2:]
        rows, columns = torch.fft.fftfreq(height, device=x.device), torch.fft.rfftfreq(width, device=x.device)
        spectrum = 1 / (1 + height * width / 2 * (rows[:, None] ** 2 + columns**2)).to(x.dtype)
        spectrum = _SPREAD**2 * spectrum / spectrum.mean()
        return torch.fft.irfft2(spectrum / (spectrum + sigma**2) * torch.fft.rfft2(x), s=(height, width))


def _seconds(problem: Problem, prior: Prior | None, solver: Solver, steps: int) -> tuple[float, float, int | None]:
    """Seconds of the start and of one of ``steps`` steps of ``solver``, from one block of slices and one call of the
    network; and how many steps were enough, if it stopped by itself meanwhile.

    With a prior, the step is the mean of a whole run in ``_PROBES`` steps: what iterates until it is good enough takes
    other times at high noise than at low. Others are timed at their second step; the first allocates.
    """
    block = problem.blocks()[0]
    part = problem.restrict(block)
    share = problem.image_shape[0] / part.image_shape[0]
    rng = Draws(0, tuple(range(part.image_shape[0])))
    stand_in = _Field(prior) if prior is not None and solver.needs_prior else None
    sigmas = solver.sigmas(_PROBES if stand_in else max(3, solver.default_steps), part, prior)
    spent, state = [], None
    enough: int | None = None
    for k in range(-1, _PROBES if stand_in else 2):
        now = time.perf_counter()
        if state is None:
            state = solver.init(part, stand_in, sigmas, rng)
        else:
            state = solver.step(part, stand_in, state, sigmas[k], sigmas[k + 1], rng)
        _wait()
        spent.append((time.perf_counter() - now) * share)
        if k >= 0 and solver.finished(state):
            enough = state.step
            break
    timed = spent[1:] if stand_in else spent[-1:]
    network = _network_seconds(problem, prior, solver, steps) / steps if stand_in else 0.0
    return spent[0], sum(timed) / len(timed) + network, enough


def _network_seconds(problem: Problem, prior, solver: Solver, steps: int) -> float:
    """Seconds of the solver's network calls on all slices in ``steps`` steps, with the gradients it takes of them."""
    count = min(prior.chunk if prior.slicewise else _THICK, problem.image_shape[0])
    x = torch.zeros(1, count, *problem.image_shape[1:], device=problem.y.device)
    forward, backward = _network_times(prior.restrict(slice(0, x.shape[1])), x, solver.differentiates)
    calls, gradients = solver.network_passes(problem, at_once(problem, prior), steps)
    passes = prior.passes if solver.turning else 1
    return (calls * forward / passes + gradients * backward) * problem.image_shape[0] / count


def _network_times(prior, x: torch.Tensor, differentiates: bool) -> tuple[float, float]:
    """Seconds of the network on ``x`` and of its gradient (0 where not needed), each the faster of two."""
    spent = []
    for _ in range(2):
        now = time.perf_counter()
        with torch.set_grad_enabled(differentiates):
            out = prior.denoise(x.requires_grad_(torch.is_grad_enabled()), 0.1)
            _wait()
            called = time.perf_counter()
            if out.requires_grad:
                torch.autograd.grad(out.sum(), x)
                _wait()
        spent.append((called - now, time.perf_counter() - called if differentiates else 0.0))
    forward, backward = zip(*spent, strict=True)
    return min(forward), min(backward)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
