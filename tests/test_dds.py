"""DDS, with and without a weight, against its formulas in numpy with dense matrices."""

import math

import numpy as np
import pytest
import torch
from solver_cases import PUBLISHED, SIDE, SLICES, Case, Dense, Local, law, law_of

from invdiff.coupling import TVz
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import State
from invdiff.solvers.pnp import EXPLAINED

RNG = Draws(3, tuple(range(SLICES)))


def krylov(a, y, x, iterations):
    """The published CG on A^T A x = A^T y from ``x``: the best fit within so many Krylov vectors of its gradient."""
    gradient = a.T @ (y - a @ x)
    basis = np.zeros((len(x), 0))
    for _ in range(iterations):
        basis, _ = np.linalg.qr(np.column_stack([basis, gradient]))
        gradient = a.T @ (a @ basis[:, -1])
    return x + basis @ np.linalg.lstsq(a @ basis, y - a @ x, rcond=None)[0]


@pytest.mark.parametrize("after", [0.6, 0.0])
@pytest.mark.parametrize("name, iterations", [("blur", 3), ("ct", 5), ("average", 1), ("mask", 1)])
def test_dds_without_a_weight_is_the_published_noiseless_step(name, iterations, after):
    """Plain CG from D(x; sigma), for which the level of the noise does not matter, and noise split in Kawar's form."""
    case, sigma, eta = Case(name, 0.1), 1.1, 0.4
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (1, SLICES, 1, SIDE, SIDE)))
    solver = make_solver("dds", gamma=0.0, eta=eta, cg_iterations=iterations)
    start = State(x, x, 0, solver.init(case.problem, case.prior, [sigma, 0.0], RNG).memory)
    got = solver.step(case.problem, case.prior, start, sigma, after, RNG)
    x0 = case.prior.denoise(x, sigma)
    better = np.stack([krylov(case.a, case.y[s], x0[0, s].flatten().numpy(), iterations) for s in range(SLICES)])
    noise = eta * RNG.normal(1, x) + math.sqrt(1 - eta**2) * (x - x0) / sigma
    want = torch.from_numpy(better).reshape(x.shape) + after * noise
    assert (got.x - want).abs().max() < 1e-9


def weighted(case, y, s, sigma, after, k, *, eta, gamma, sigma_data):
    """The data step with the weight of the error of D, in closed form, and noise split in Kawar's form."""
    x0 = case.denoise(s.x, sigma, s.one)
    w = gamma * (1 / sigma**2 + 1 / sigma_data**2) * case.noise**2
    system = case.a.T @ case.a + w * np.eye(case.n)
    better = np.linalg.solve(system, np.outer(case.a.T @ y, s.one) + w * x0)
    return better + after * (eta * s.z[0] + math.sqrt(1 - eta**2) * (s.x - x0) / sigma)


@pytest.mark.parametrize("noise", [0.03, 0.3])
@pytest.mark.parametrize("operator", ["mask", "blur", "average", "ct", "fft"])
def test_dds_has_the_mean_and_covariance_of_its_chain(operator, noise):
    case, options = Case(operator, noise), {"eta": 0.85, "gamma": 0.6, "sigma_data": 0.5}
    solver = make_solver("dds", cg_iterations=200, cg_error=0.0, warm=False, **options)
    mean, covariance = law_of(solver, case, PUBLISHED, len(PUBLISHED))
    for s in range(SLICES):
        want, spread = law(case, case.y[s], weighted, PUBLISHED, 1, **options)
        assert np.abs(mean[s] - want).max() < 1e-6 * np.abs(want).max()
        assert np.abs(covariance[s] - spread).max() < 1e-6 * max(np.abs(spread).max(), 1e-6)


def test_dds_without_a_weight_takes_no_coupling():
    with pytest.raises(UsageError, match="mbir with on=denoised"):
        make_solver("dds", gamma=0.0, coupling=TVz())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dds_without_a_weight_leaves_what_is_not_measured_to_the_prior(kind):
    """CG ends by itself, before it follows rounding in the null space."""
    rng = np.random.default_rng(2)
    a, y = rng.normal(0, 1, (7, SIDE**2)), rng.normal(0, 1, (SLICES, 7))
    problem = whiten(torch.from_numpy(y).to(kind), Dense(torch.from_numpy(a).to(kind)), 0.01)
    x = torch.from_numpy(rng.normal(0, 1, (1, SLICES, 1, SIDE, SIDE))).to(kind)
    start = State(x, x, 0, {"spectrum": torch.ones(())})
    got = make_solver("dds", gamma=0.0, cg_iterations=500).step(problem, Local(), start, 0.5, 0.0, RNG).x0
    x0 = Local().denoise(x, 0.5).reshape(SLICES, -1).double().numpy()
    want = x0 + (y - x0 @ a.T) @ np.linalg.pinv(a).T
    close = 1e-4 if kind is torch.float32 else 1e-10
    assert np.abs(got.reshape(SLICES, -1).double().numpy() - want).max() < close


@pytest.mark.parametrize("after, residual", [(0.6, 0.0), (0.0, EXPLAINED)])
def test_dds_stops_at_an_error_in_units_of_the_spread_around_x0(monkeypatch, after, residual):
    """0.1 / sqrt(w), and in the last step what the data leave unexplained too."""
    case, sigma, seen = Case("ct", 0.1), 1.1, {}
    monkeypatch.setattr("invdiff.solvers.dds.data_step", lambda problem, x0, w, start, **k: (x0, seen.update(k, w=w)))
    start = State(torch.zeros(1, SLICES, 1, SIDE, SIDE, dtype=torch.float64), None, 0, {"spectrum": None})
    make_solver("dds", gamma=0.6).step(case.problem, case.prior, start, sigma, after, RNG)
    assert seen["w"] == pytest.approx(0.6 * (1 / sigma**2 + 1 / 0.5**2))
    assert seen["error"] == pytest.approx(0.1 * seen["w"] ** -0.5) and seen["residual"] == residual
