"""The prediction of time: which steps are timed, what stands in for the network, and what a sampler adds."""

from types import SimpleNamespace

import pytest
import torch

from invdiff import plan
from invdiff.operators import build
from invdiff.priors.base import Prior, PriorInfo
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import Solver, State, iterate


class Counting(Prior):
    """A network that counts its calls and gradients, in slices."""

    info, chunk, gradients = PriorInfo("counting", sigma_min=0.01, sigma_max=20.0), 2, 0

    def denoise(self, x, sigma, context=None):
        self.calls += x[..., 0, 0, 0].numel()
        out = x.tanh()
        if out.requires_grad:
            out.register_hook(lambda grad: setattr(self, "gradients", self.gradients + grad[..., 0, 0, 0].numel()))
        return out


def small_problem(slices=2):
    operator = build("denoise", (16, 16), (1.0, 1.0))
    return whiten(torch.zeros(slices, 1, 16, 16), operator, 1.0)


@pytest.mark.parametrize(
    ("name", "sampler", "passes"),
    [("dps", "own", (3, 3)), ("dps", "heun", (5, 3)), ("dps", "ddim", (3, 3)), ("pigdm", "heun", (5, 5))],
)
def test_gradients_of_three_steps_moved_by_a_sampler(name, sampler, passes):
    solver, problem, prior = make_solver(name, sampler=sampler), small_problem(), Counting()
    assert solver.network_passes(problem, prior.chunk, 3) == passes
    for _ in iterate(solver, problem, prior, solver.sigmas(3, problem, prior)):
        pass
    assert (prior.calls, prior.gradients) == tuple(2 * n for n in passes)  # of two slices


def test_the_stand_in_is_the_mean_of_a_gaussian_field():
    x = torch.randn(1, 1, 1, 24, 20, dtype=torch.float64)
    field = plan._Field(Counting())
    rows, columns = torch.fft.fftfreq(24)[:, None], torch.fft.fftfreq(20)
    spectrum = 1 / (1 + 240 * (rows**2 + columns**2).double())  # 24 * 20 / 2
    spectrum = spectrum * 0.25 / spectrum[:, :11].mean()
    for sigma in (0.02, 0.5, 20.0):
        expected = torch.fft.ifft2(spectrum / (spectrum + sigma**2) * torch.fft.fft2(x)).real
        torch.testing.assert_close(field.denoise(x, sigma), expected, rtol=0, atol=1e-6)


class Timed(Solver):
    """Takes 100 s to start, and as many seconds for a step as its noise level says."""

    stochastic, default_steps = False, 30

    def __init__(self, clock, needs_prior):
        self.clock, self.needs_prior = clock, needs_prior

    def sigmas(self, steps, problem, prior):
        return [float(2**k) for k in range(steps, 0, -1)] + [0.0]

    def init(self, problem, prior, sigmas, rng):
        self.clock.now += 100.0
        return State(problem.y[None], problem.y[None])

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        self.clock.now += sigma
        return State(state.x, state.x0, state.step + 1)


class Done(Timed):
    """Has finished after its first step, and cannot take another."""

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        assert state.step == 0
        return super().step(problem, prior, state, sigma, sigma_next, rng)

    def finished(self, state):
        return state.step == 1


def test_steps_are_timed_along_the_whole_schedule(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(plan, "_network_times", lambda prior, x, differentiates: (2.0, 200.0))  # of one chunk
    problem = small_problem(4)
    first, step, _ = plan._seconds(problem, Counting(), Timed(clock, True), 30)
    assert (first, step) == (100.0, (16 + 8 + 4 + 2) / 4 + 2 * 2.0)  # two chunks, no gradient
    first, step, _ = plan._seconds(problem, None, Timed(clock, False), 30)
    assert (first, step) == (100.0, 2**29)  # the second of its steps
    assert plan._seconds(problem, None, Done(clock, False), 30) == (100.0, 2**30, 1)  # which was not needed


def test_one_block_stands_for_all(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    problem = small_problem(64)
    assert plan._seconds(problem, None, Timed(clock, False), 30)[0] == 200.0  # two blocks of 32
