"""Steps of the solvers with a slice coupling, by hand, and the exact posterior that moment matching reaches."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from coupling_cases import RNG, potential
from solver_cases import SLICES, Case

from invdiff.coupling import KNEE, SPREAD, QuadraticZ, TVz, precision
from invdiff.draws import Draws
from invdiff.schedule import log_snr
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate, solve

TIGHT = {"iterations": 32, "tolerance": 1e-13, "cg_iterations": 40, "cg_tolerance": 1e-14}
GOOD = {"iterations": 8, "tolerance": 1e-6, "cg_iterations": 20, "cg_tolerance": 1e-7}
DIFFERENCE = np.array([[-1.0, 1.0], [0.0, 0.0]])  # of two slices
BOTH = DIFFERENCE.T @ DIFFERENCE


def joint(case, sigma, x, penalty):
    """Mean and precision of x0 given x, y and a Gaussian of ``penalty`` on the difference of two slices, as one vector
    ``(SLICES * n,)``: the precisions of prior, noise, data and coupling add up."""
    a = case.a / case.noise
    one = np.linalg.inv(case.c) + np.eye(case.n) / sigma**2 + a.T @ a
    whole = np.kron(np.eye(SLICES), one) + penalty * np.kron(BOTH, np.eye(case.n))
    known = np.concatenate([np.linalg.solve(case.c, case.mean) + a.T @ y / case.noise for y in case.y])
    return np.linalg.solve(whole, known + x / sigma**2), whole


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("operator", ["mask", "average", "fft"])
def test_moment_matching_estimates_the_exact_mean_with_the_extra_precision(operator, sigma):
    case = Case(operator, 0.1)
    near = replace(case.problem, spacing=(2.0, 1.0, 1.0))
    solver = make_solver("mm", **TIGHT, warm=False, coupling=QuadraticZ(0.8))
    x = np.random.default_rng(0).normal(0, sigma, SLICES * case.n)
    image = torch.from_numpy(x).reshape(1, SLICES, *case.prior.mean.shape)
    state = solver.init(near, case.prior, [sigma, 0.0], RNG)
    got = solver.estimate(near, case.prior, image, sigma, state.memory)[0].numpy().ravel()
    want, _ = joint(case, sigma, x, 0.8 * 0.25 * (1 / sigma**2 + 1 / SPREAD**2))
    assert np.abs(got - want).max() < 1e-7 * np.abs(want).max()


@dataclass(frozen=True)
class Fixed(QuadraticZ):
    """Of the same strength at every level: a Gaussian prior on differences."""

    def penalty(self, problem, weight):
        return self.weight


class OfTheStack(Draws):
    """As ``Units`` of the cases, for unit vectors of the whole stack."""

    def normal(self, step, like):
        out, n = torch.zeros_like(like), like[0].numel()
        assert step == 0 and len(like) == n + 1
        out[1:] = torch.eye(n, dtype=like.dtype).reshape(n, *like.shape[1:])
        return out


def test_moment_matching_reaches_the_posterior_with_the_extra_precision():
    """Mean and covariance of the running code, exactly, and the slices are correlated as the coupling says."""
    case, penalty = Case("average", 0.1), 30.0
    case.prior.chunk = SLICES  # one call of the denoiser for all products
    solver = make_solver("mm", **GOOD, warm=False, sampler="dpmpp-2m", coupling=Fixed(penalty))
    n = SLICES * case.n
    rng = OfTheStack(0, (0, 1), tuple(range(n + 1)))
    out = solve(solver, case.problem, case.prior, sigmas=log_snr(20, 50.0, 0.005), rng=rng).reshape(n + 1, n).numpy()
    mean, spread = out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])
    truth, whole = joint(case, 1e9, np.zeros(n), penalty)
    want = np.linalg.inv(whole)
    alone = np.linalg.inv(joint(case, 1e9, np.zeros(n), 0.0)[1])
    assert np.linalg.norm(mean - truth) < 0.03 * np.linalg.norm(truth)
    assert 0.95 < np.trace(spread) / np.trace(want) < 1.05
    assert np.linalg.norm(spread - want) < 0.05 * np.linalg.norm(want) < 0.05 * np.linalg.norm(want - alone) / 0.2


@pytest.mark.parametrize("operator", ["average", "fft"])
def test_tv_in_moment_matching_is_one_iteration_of_admm_in_the_exact_conditional(operator):
    """u of split variable and dual at hand, then both of u; half as strong where slices lie twice as far."""
    case, sigma, weight, rho = Case(operator, 0.1), 0.5, 0.6, 0.7
    near = replace(case.problem, spacing=(2.0, 1.0, 1.0))
    solver = make_solver("mm", **TIGHT, warm=False, coupling=TVz(weight, rho))
    rng = np.random.default_rng(0)
    x, split, dual = (rng.normal(0, 0.5, (SLICES, case.n)) for _ in range(3))
    split[1], dual[1] = 0, 0
    image = lambda v: torch.from_numpy(v).reshape(1, SLICES, *case.prior.mean.shape)  # noqa: E731
    memory = solver.init(near, case.prior, [sigma, 0.0], RNG).memory
    memory |= {"tvz_split": image(split), "tvz_dual": image(dual)}
    u, after = solver.estimate(near, case.prior, image(x), sigma, memory)
    w = 1 / sigma**2 + 1 / SPREAD**2
    penalty = rho * w
    alone, whole = joint(case, sigma, x.ravel(), 0.0)
    coupled = whole + penalty * np.kron(BOTH, np.eye(case.n))
    want = np.linalg.solve(coupled, whole @ alone + (DIFFERENCE.T @ (penalty * split - dual)).ravel())
    assert np.abs(u.numpy().ravel() - want).max() < 1e-7 * np.abs(want).max()
    d = DIFFERENCE @ want.reshape(SLICES, -1) + dual / penalty
    split = np.sign(d) * np.maximum(np.abs(d) - weight * 0.5 * w**0.5 / penalty, 0)
    assert torch.allclose(after["tvz_split"], image(split), atol=1e-7)
    assert torch.allclose(after["tvz_dual"], image(penalty * (d - split)), atol=1e-6)


def smoothed(v, coupling, sigma):
    """P(v) of two slices in closed form, ``(2, n)``."""
    if isinstance(coupling, QuadraticZ):
        return np.linalg.solve(np.eye(2) + coupling.weight * BOTH, v)
    by = np.clip((v[1] - v[0]) / 2, *(s * coupling.weight * precision(sigma) ** -0.5 for s in (-1, 1)))
    return np.stack([v[0] + by, v[1] - by])


def one_step(solver, case, sigma, after, x):
    """x and x0 of the running code after one step from ``x``, ``(SLICES, n)`` each, and the draws of that step."""
    image = torch.from_numpy(x).reshape(1, SLICES, *case.prior.mean.shape)
    state = solver.init(case.problem, case.prior, [sigma, after, 0.0], RNG)
    state = solver.step(case.problem, case.prior, replace(state, x=image), sigma, after, RNG)
    z = [RNG.normal(k, image).reshape(SLICES, case.n).numpy() for k in range(8)]
    return state.x.reshape(SLICES, case.n).numpy(), state.x0.reshape(SLICES, case.n).numpy(), z


def denoised(case, x, sigma):
    return np.stack([case.denoise(v[:, None], sigma, np.ones(1))[:, 0] for v in x])


@pytest.mark.parametrize("coupling", [QuadraticZ(0.7), TVz(0.4)])
@pytest.mark.parametrize("after", [0.6, 0.07, 0.0])
@pytest.mark.parametrize("operator", ["mask", "blur", "fft"])
@pytest.mark.parametrize("name, options", [("ddrm", {"eta_b": 0.7}), ("ddnm", {}), ("ddnm", {"noisy": False})])
def test_a_step_in_the_singular_basis_by_hand(monkeypatch, name, options, operator, after, coupling):
    """D moves by what the coupling changes in the estimate that the step would have led to the data."""
    monkeypatch.setattr("invdiff.coupling.ROUNDS", 80)
    case, sigma, eta = Case(operator, 0.1), 1.1, 0.85
    x = np.random.default_rng(1).normal(0, 1, (SLICES, case.n))
    got, _, draws = one_step(make_solver(name, **options, coupling=coupling), case, sigma, after, x)
    u, values, vt = np.linalg.svd(case.a)
    s = np.concatenate([values, np.zeros(case.n - len(values))])
    s = np.where(s > 1e-9, s / case.noise, 0)
    known = np.zeros((SLICES, case.n))
    known[:, : len(values)] = case.y @ u / np.where(values > 1e-9, values, np.inf)
    x0, kept = denoised(case, x, sigma), math.sqrt(1 - eta**2)
    h, e, z = x0 @ vt.T, (x - x0) / sigma @ vt.T, draws[1] @ vt.T
    full = options.get("eta_b", 1.0)
    share = np.where(after * s >= 1, full, kept * after * s) if options.get("noisy", True) else (s > 0).astype(float)
    v = (h - share * (h - known)) @ vt
    h = (x0 + smoothed(v, coupling, sigma) - v) @ vt.T
    mean = h - share * (h - known)
    noise = np.where(s > 0, eta * z, kept * e + eta * z) * after
    if options.get("noisy", True):
        fresh = np.sqrt(np.clip(after**2 - (full / np.where(s > 0, s, np.inf)) ** 2, 0, None)) * z
        noise = np.where(after * s >= 1, fresh, noise)
    else:
        noise = after * (kept * e + eta * z)
    assert np.abs(got - (mean + noise) @ vt).max() < 1e-8


@pytest.mark.parametrize("sampler", ["own", "ddim:eta=1"])
@pytest.mark.parametrize("after", [0.6, 0.0])
@pytest.mark.parametrize("coupling", [QuadraticZ(0.7), TVz(0.4)])
def test_a_step_of_dps_by_hand(monkeypatch, coupling, after, sampler):
    monkeypatch.setattr("invdiff.coupling.ROUNDS", 80)
    case, sigma, zeta = Case("average", 0.1), 1.1, 0.7
    x = np.random.default_rng(1).normal(0, 1, (SLICES, case.n))
    solver = make_solver("dps", zeta=zeta, coupling=coupling, sampler=sampler)
    got, _, draws = one_step(solver, case, sigma, after, x)
    x0, residual = denoised(case, x, sigma), denoised(case, x, sigma) @ case.a.T - case.y
    pull = residual @ case.a @ case.gain(sigma) / np.linalg.norm(residual, axis=1, keepdims=True)
    pull = zeta * math.sqrt((1 + sigma**2) * (1 + after**2)) * pull / np.linalg.norm(case.a, 2)
    v = x0 - pull
    fresh = after * math.sqrt(sigma**2 - after**2) / sigma
    noise = math.sqrt(after**2 - fresh**2) * (x - x0) / sigma + fresh * draws[1]
    assert np.abs(got - (smoothed(v, coupling, sigma) + noise)).max() < 1e-8


@pytest.mark.parametrize("coupling", [QuadraticZ(0.7), TVz(0.4)])
def test_a_step_of_daps_by_hand(coupling):
    case, sigma, after, b = Case("average", 0.1), 1.1, 0.6, 2.0
    x = np.random.default_rng(1).normal(0, 1, (SLICES, case.n))
    solver = make_solver("daps", langevin=3, ode_steps=1, ode_min=0.5, data_weight=b, coupling=coupling)
    got, _, draws = one_step(solver, case, sigma, after, x)
    z = x + (0.5 - sigma) * (x - denoised(case, x, sigma)) / sigma
    a = case.a / case.noise
    quadratic = isinstance(coupling, QuadraticZ)
    steep = 4 * coupling.weight / sigma**2 / (1 if quadratic else KNEE)
    h, u = 1 / (b * np.linalg.norm(a, 2) ** 2 + 1 / sigma**2 + steep), z
    for k in range(3):
        jump = u[1] - u[0]
        slope = (
            coupling.weight / sigma**2 * jump
            if quadratic
            else coupling.weight / sigma * np.clip(jump / (KNEE * sigma), -1, 1)
        )
        grad = b * (u @ a.T - case.y / case.noise) @ a + (u - z) / sigma**2 + np.stack([-slope, slope])
        u = u - h * grad + math.sqrt(2 * h) * draws[1 + k]
    assert np.abs(got - (u + after * draws[4])).max() < 1e-6  # the norm of A, by Lanczos


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("weighting", ["linear", "sqrt"])
@pytest.mark.parametrize("coupling", [QuadraticZ(0.7), TVz(0.4)])
def test_red_diff_is_the_optimizer_on_its_loss_with_the_coupling_in_it(coupling, weighting, optimizer):
    """The published loss is minus the log-likelihood over ``scale``, and so is the coupling's potential; its s is that
    of lam w / (2 sigma n) |mu - D|^2, whose gradient the prior's term has."""
    case, lam, lr, sigmas = Case("average", 0.1), 0.7, 0.1, [3.0, 1.0, 0.3, 0.0]
    solver = make_solver(
        "reddiff", lam=lam, lr=lr, weighting=weighting, optimizer=optimizer, warm=False, coupling=coupling
    )
    *_, final = iterate(solver, case.problem, case.prior, sigmas, RNG)
    start = torch.zeros(1, SLICES, *case.prior.mean.shape, dtype=torch.float64)
    mu, a, y = (
        start.clone().requires_grad_(),
        torch.from_numpy(case.a) / case.noise,
        torch.from_numpy(case.y) / case.noise,
    )
    scale = float(a.square().sum())  # n times the mean square of the columns
    adam = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))
    for k, sigma in enumerate(sigmas[:-1]):
        factor = lam * (sigma if weighting == "linear" else sigma**0.5) / sigma
        center = case.prior.denoise(mu + sigma * RNG.normal(k + 1, start), sigma).detach()
        weight = factor * scale / case.n
        across = potential(coupling, mu, weight, 1.0)
        loss = 0.5 * (mu.flatten(-3) @ a.T - y).square().sum() / scale + across / scale
        loss = loss + 0.5 * factor / case.n * (mu - center).square().sum()
        adam.zero_grad()
        loss.backward()
        if optimizer == "adam":
            adam.step()
            continue
        steep = 4 * coupling.weight * weight / (1 if isinstance(coupling, QuadraticZ) else KNEE)
        curvature = (float(torch.linalg.matrix_norm(a, 2)) ** 2 + steep) / scale
        mu = (mu - lr / curvature * mu.grad).detach().requires_grad_()
    assert (final.x0 - mu).abs().max() < 1e-6 and (final.x0 - start).abs().max() > 0.01


@pytest.mark.parametrize("after", [0.6, 0.0])
@pytest.mark.parametrize("coupling", [QuadraticZ(0.7), TVz(0.4)])
@pytest.mark.parametrize("on", ["noisy", "denoised"])
def test_a_step_of_mbir_with_a_coupling_in_the_place_of_its_own_by_hand(monkeypatch, on, coupling, after):
    """P(D) for D in the predictor or before DDIM's noise, and CG to the end: the nearest image that fits the data."""
    monkeypatch.setattr("invdiff.coupling.ROUNDS", 80)
    case, sigma = Case("average", 0.1), 1.1
    x = np.random.default_rng(1).normal(0, 1, (SLICES, case.n))
    solver = make_solver("mbir", on=on, snr=0.0, cg_iterations=60, coupling=coupling)
    got, _, draws = one_step(solver, case, sigma, after, x)
    fit = lambda v: v + (case.y - v @ case.a.T) @ np.linalg.pinv(case.a).T  # noqa: E731
    x0 = denoised(case, x, sigma)
    better, gap = smoothed(x0, coupling, sigma), sigma**2 - after**2
    fresh = after * math.sqrt(gap) / sigma
    noise = math.sqrt(after**2 - fresh**2) * (x - x0) / sigma + fresh * draws[1]
    z = draws[1] if after else 0.0
    want = fit(better) + noise if on == "denoised" else fit(x + gap / sigma**2 * (better - x) + math.sqrt(gap) * z)
    assert np.abs(got - want).max() < 1e-8
