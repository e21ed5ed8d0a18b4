"""Guided solvers whose move is a sampler's, and moment matching, against exact posteriors of Gaussian priors."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from solver_cases import EXACT, SLICES, Case, Stacked, law_of

from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.linalg import gcr, slice_dot
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.samplers import SAMPLERS, make_sampler, parse_sampler
from invdiff.schedule import SCHEDULES, log_snr, make_schedule
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.base import iterate, solve
from invdiff.solvers.chain import Chain, Guided

TIGHT = {"iterations": 20, "tolerance": 1e-13, "cg_iterations": 60, "cg_tolerance": 1e-16}
GOOD = {"iterations": 10, "tolerance": 1e-6, "cg_iterations": 20, "cg_tolerance": 1e-7}
GUIDED = [n for n in SOLVERS if issubclass(solver_class(n), Guided) and n != "dps"]  # dps below
CHAINS = [n for n in SOLVERS if issubclass(solver_class(n), Chain)]


def conditional(case, x, sigma, s):
    """E[x0 | x, y] of slice ``s`` by dense matrices: the posterior for data (y, x) with noise (noise, sigma)."""
    both = np.concatenate([case.a, np.eye(case.n)])
    noise = np.diag([case.noise**2] * len(case.a) + [sigma**2] * case.n)
    gain = case.c @ both.T @ np.linalg.inv(both @ case.c @ both.T + noise)
    return case.mean + gain @ (np.concatenate([case.y[s], x]) - both @ case.mean)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("operator", ["mask", "blur", "average", "ct", "fft"])
def test_moment_matching_estimates_the_exact_conditional_mean(operator, sigma):
    case, solver = Case(operator, 0.05), make_solver("mm", **TIGHT)
    x = torch.from_numpy(np.random.default_rng(0).normal(0, sigma, (2, SLICES, case.n)))
    state = solver.init(case.problem, case.prior, [sigma, 0.0], Draws(0, (0, 1)))
    image = x.reshape(2, SLICES, *case.prior.mean.shape)
    got = solver.estimate(case.problem, case.prior, image, sigma, state.memory)[0].reshape(2, SLICES, case.n).numpy()
    want = [[conditional(case, x[k, s].numpy(), sigma, s) for s in range(SLICES)] for k in range(2)]
    assert np.abs(got - want).max() < 1e-7 * np.abs(want).max()


@pytest.mark.parametrize(
    "operator, noise", [("mask", 0.3), ("blur", 0.3), ("mask", 0.05), ("average", 0.05), ("ct", 0.05), ("fft", 0.05)]
)
def test_moment_matching_reaches_the_posterior(operator, noise):
    """Mean and covariance of the running code, exactly: affine in draws. Deterministic moves of second order."""
    case, sigmas = Case(operator, noise), log_snr(40, 50.0, 0.005)
    mean, covariance = law_of(make_solver("mm", warm=False, sampler="dpmpp-2m", **GOOD), case, sigmas, 1)
    for s in range(SLICES):
        truth, spread = case.posterior(s)
        assert np.linalg.norm(mean[s] - truth) < 0.03 * np.linalg.norm(truth)
        assert 0.95 < np.trace(covariance[s]) / np.trace(spread) < 1.05
        assert np.linalg.norm(covariance[s] - spread) < 0.05 * np.linalg.norm(spread)


def test_moment_matching_by_noisy_moves_comes_nearer_with_more_steps():
    """Ancestral moves are of first order: the error of mean and variance falls like 1 / steps."""
    case, errors = Case("average", 0.2), []
    truth, spread = case.posterior(0)
    for steps in (20, 60):
        solver = make_solver("mm", warm=False, sampler="ddim:eta=1", **GOOD)
        mean, covariance = law_of(solver, case, log_snr(steps, 20.0, 0.005), steps)
        errors.append(abs(np.trace(covariance[0]) / np.trace(spread) - 1))
        assert np.linalg.norm(mean[0] - truth) < 0.03 * np.linalg.norm(truth)
    assert errors[1] < 0.4 * errors[0] and errors[1] < 0.15


def test_a_jacobian_that_is_not_positive_harms_neither_the_slice_nor_its_neighbour():
    class Odd(GaussianPrior):
        def denoise(self, x, sigma, context=None):
            out = super().denoise(x, sigma)
            return torch.cat([out[:, :-1], -40 * out[:, -1:]], 1)

    case = Case("mask", 0.05)
    odd = Odd(case.prior.mean, case.prior.covariance)
    odd.chunk = 2
    solver, rng = make_solver("mm"), Draws(0, (0, 1))
    sigmas = [1.0, 0.5]
    start = solver.init(case.problem, case.prior, sigmas, rng)
    mixed = solver.estimate(case.problem, odd, start.x, 1.0, start.memory)[0]
    whole = solver.estimate(case.problem, case.prior, start.x, 1.0, start.memory)[0]
    assert mixed.isfinite().all() and (mixed - whole)[:, 0].abs().max() < 1e-9
    data = lambda u: (case.problem.operator(u)[0, 1] - case.problem.y[1]).norm()  # noqa: E731
    assert data(mixed) < data(odd.denoise(start.x, 1.0))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_pigdm_without_adaptive_weights_is_ddim_on_its_estimate(eta):
    case, sigmas, rng = Case("ct", 0.1), log_snr(6, 5.0, 0.05), Draws(3, (0, 1))
    own = make_solver("pigdm", adaptive=False, eta=eta, **EXACT)
    moved = make_solver("pigdm", sampler=f"ddim:eta={eta}", **EXACT)
    want = solve(own, case.problem, case.prior, sigmas=sigmas, rng=rng)
    got = solve(moved, case.problem, case.prior, sigmas=sigmas, rng=rng)
    assert (got - want).abs().max() < 1e-9


def test_diffpir_without_fresh_noise_moves_like_ddim():
    case, sigmas, rng = Case("blur", 0.1), log_snr(6, 5.0, 0.05), Draws(3, (0, 1))
    own = solve(make_solver("diffpir", zeta=0.0, **EXACT), case.problem, case.prior, sigmas=sigmas, rng=rng)
    moved = solve(make_solver("diffpir", sampler="ddim", **EXACT), case.problem, case.prior, sigmas=sigmas, rng=rng)
    assert (own - moved).abs().max() < 1e-9


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", GUIDED)
def test_every_sampler_moves_every_guided_solver(name, sampler):
    """The same as the sampler by itself on the solver's estimate, and resumed from any state the same bits."""
    case, sigmas, rng = Case("mask", 0.1), log_snr(7, 2.0, 0.1), Draws(1, (0, 1))
    solver = make_solver(name, sampler=sampler)
    states = list(iterate(solver, case.problem, case.prior, sigmas, rng))
    start = solver.init(case.problem, case.prior, sigmas, rng)
    stepper, x, memory = make_sampler(sampler), start.x, {}
    denoise = lambda x, sigma: solver.estimate(case.problem, case.prior, x, sigma, start.memory)[0]  # noqa: E731
    for sigma, after in pairwise(sigmas):
        x, memory = stepper.step(x, denoise, sigma, after, memory, rng)
    assert torch.equal(states[-1].x, x) and torch.equal(states[-1].x0, x)
    resumed = list(iterate(solver, case.problem, case.prior, sigmas, rng, states[3]))
    assert torch.equal(resumed[-1].x0, states[-1].x0) and len(resumed) == 3
    assert solver.network_calls == stepper.evaluations


@pytest.mark.parametrize("name", GUIDED)
def test_a_slice_alone_gives_what_it_gives_in_the_stack(name):
    case, sigmas = Case("ct", 0.1), log_snr(5, 1.0, 0.1)
    options = TIGHT if name == "mm" else EXACT
    solver, rng = make_solver(name, sampler="dpmpp-3m", **({} if name == "dds" else options)), Draws(0, (4, 7), (0, 1))
    together = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=rng)
    alone = solve(solver, case.problem.restrict(slice(1, 2)), case.prior, sigmas=sigmas, rng=rng.restrict(slice(1, 2)))
    assert torch.allclose(together[:, 1:], alone, atol=1e-9) and (together[0] - together[1]).abs().max() > 1e-4


def test_moment_matching_on_an_operator_of_the_whole_stack():
    case, sigmas = Case("mask", 0.1), log_snr(5, 1.0, 0.1)
    stacked = whiten(torch.from_numpy(case.y.ravel()), Stacked(torch.from_numpy(np.kron(np.eye(2), case.a))), 0.1**2)
    solver = make_solver("mm", warm=False, **TIGHT)
    slicewise = solve(solver, case.problem, case.prior, sigmas=sigmas)
    assert torch.allclose(solve(solver, stacked, case.prior, sigmas=sigmas), slicewise, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_takes_every_schedule_inside_the_range_of_the_prior(name, schedule):
    case = Case("mask", 0.1)
    low, high = case.prior.info.sigma_min, case.prior.info.sigma_max
    solver = make_solver(name, schedule=schedule)
    want = make_schedule(schedule, 5, min(solver.sigma_max, high), max(solver.sigma_min, low))
    assert solver.sigmas(5, case.problem, case.prior) == want


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("dds", {"sampler": "magic"}, "unknown sampler 'magic'"),
        ("dds", {"sampler": "ddim:eta"}, "option=value"),
        ("pigdm", {"sampler": "ddim:zeta=1"}, "no option 'zeta'"),
        ("diffpir", {"sampler": "ddim:eta=2"}, "eta must lie in"),
        ("mm", {"sampler": "own"}, "name a sampler"),
        ("mm", {"iterations": 0}, "iterations >= 1"),
        ("pnp", {"schedule": "magic"}, "unknown schedule 'magic'"),
        ("ddnm", {"sigma_min": 30.0}, "sigma_min <= sigma_max"),
    ],
)
def test_options_that_make_no_chain_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        make_solver(name, **options)


def test_a_sampler_is_read_with_its_options():
    assert parse_sampler("euler:churn=0.2,churn_noise=1.003") == make_sampler("euler", churn=0.2, churn_noise=1.003)


@pytest.mark.parametrize("sampler", ["ddim:eta=0.4", "dpmpp-2m", "heun"])
def test_dps_with_a_sampler_is_its_step_less_the_gradient(sampler):
    case, sigmas, rng = Case("average", 0.1), log_snr(5, 2.0, 0.1), Draws(2, (0, 1))
    solver, stepper = make_solver("dps", sampler=sampler), parse_sampler(sampler)
    states = [solver.init(case.problem, case.prior, sigmas, rng)]
    states += list(iterate(solver, case.problem, case.prior, sigmas, rng))
    memory = {}
    for state, after, (sigma, then) in zip(states[:-1], states[1:], pairwise(sigmas), strict=True):
        x = state.x.clone().requires_grad_()
        residual = case.problem.operator(case.prior.denoise(x, sigma)) - case.problem.y
        (grad,) = torch.autograd.grad(residual.flatten(2).norm(dim=-1).sum(), x)
        moved, memory = stepper.step(state.x, case.prior.denoise, sigma, then, memory, rng)
        step = ((1 + sigma**2) * (1 + then**2)) ** 0.5 / np.linalg.norm(case.a / case.noise, 2)
        assert (after.x - (moved - step * grad)).abs().max() < 1e-6


def test_generalised_conjugate_residuals_solve_what_is_not_symmetric():
    """Against a dense solution per slice; the residual of few iterations is the least, and never grows."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)  # not positive either
    rhs = torch.randn(2, 1, 1, 6, generator=g, dtype=torch.float64)
    apply = lambda v: (a @ v.reshape(2, 6, 1)).reshape(v.shape)  # noqa: E731
    rough = lambda v: 0.5 * v.flip(-1)  # noqa: E731
    norms = []
    for k in range(7):
        x = gcr(apply, rhs, iterations=k, precondition=rough, dot=slice_dot)
        norms.append((apply(x) - rhs).flatten(1).norm(dim=1))
        assert all((b <= a + 1e-12).all() for a, b in pairwise(norms))
    assert torch.allclose(x.reshape(2, 6, 1), torch.linalg.solve(a, rhs.reshape(2, 6, 1)), atol=1e-8)
    inverse = lambda v: torch.linalg.solve(a, v.reshape(2, 6, 1)).reshape(v.shape)  # noqa: E731
    assert torch.allclose(gcr(apply, rhs, iterations=1, precondition=inverse, dot=slice_dot), inverse(rhs), atol=1e-10)


def test_the_solver_of_the_contributing_page_runs_with_its_own_move_and_others():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "class Smallest" in block)
    assert len(code.splitlines()) < 60
    names = {"__name__": "smallest"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    case = Case("mask", 0.1)
    for solver in (names["Smallest"](), names["Smallest"](sampler="heun", schedule="karras")):
        sigmas = solver.sigmas(30, case.problem, case.prior)
        result = solve(solver, case.problem, case.prior, sigmas=sigmas)
        assert result.isfinite().all() and case.problem.chi_squared(result) < 2
