"""DiffPIR, Pi-GDM, RED-diff, DiffusionMBIR and DAPS against the published formulas, in numpy with dense matrices."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from solver_cases import (
    EXACT,
    PUBLISHED,
    SIDE,
    SLICES,
    Case,
    Dense,
    Stacked,
    Symbols,
    daps,
    ddnm,
    ddrm,
    diffpir,
    law,
    law_of,
    pigdm,
    vp,
)

from invdiff.coupling import TVz, difference
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.operators.blur import Blur
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.schedule import log_snr
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate, solve
from invdiff.solvers.reddiff import WEIGHTINGS
from invdiff.solvers.spectral import spectral

ALL = ("diffpir", "pigdm", "reddiff", "mbir", "daps", "ddnm", "ddrm")
AFFINE = {
    "diffpir": (diffpir, 1, {"warm": False, **EXACT, "lam": 1.75, "zeta": 0.3}, {"lam": 1.75, "zeta": 0.3}),
    "pigdm": (pigdm, 1, {"warm": False, **EXACT, "eta": 1.0}, {"eta": 1.0}),
    "pigdm eta": (
        pigdm,
        1,
        {"warm": False, **EXACT, "eta": 0.2, "adaptive": False, "sigma_data": 0.5},
        {"eta": 0.2, "adaptive": False, "sigma_data": 0.5},
    ),
    "ddnm": (ddrm, 1, {"eta": 0.85}, {"eta": 0.85, "eta_b": 1.0}),
    "ddnm exact": (ddnm, 1, {"eta": 0.85, "noisy": False}, {"eta": 0.85}),
    "daps": (
        daps,
        4,
        {"langevin": 3, "ode_steps": 2, "rate": 1.5, "data_weight": 2.0},
        {"steps": 6, "langevin": 3, "ode_steps": 2, "rate": 1.5, "weight": 2.0},
    ),
    "daps at once": (
        daps,
        101,
        {"langevin": 100, "ode_steps": 2, "rate": 1.9, "data_weight": 2.0},
        {"steps": 6, "langevin": 100, "ode_steps": 2, "rate": 1.9, "weight": 2.0},
    ),
}


DIAGONAL = ("mask", "blur", "fft")  # in pixels or frequencies
PAIRS = [
    (name, operator)
    for name in AFFINE
    for operator in ("mask", "blur", "average", "ct", "fft")
    if operator in DIAGONAL or not name.startswith("ddnm")
]


@pytest.mark.parametrize("noise", [0.03, 0.3])
@pytest.mark.parametrize("name, operator", PAIRS)
def test_mean_and_covariance_are_those_of_the_published_algorithm(name, operator, noise):
    step, draws, options, by_hand = AFFINE[name]
    case, sigmas = Case(operator, noise), PUBLISHED
    solver = make_solver(name.split()[0], **options)
    mean, covariance = law_of(solver, case, sigmas, 1 + draws * (len(sigmas) - 1))
    for s in range(SLICES):
        want, spread = law(case, case.y[s], step, sigmas, draws, **by_hand)
        assert np.abs(mean[s] - want).max() < 1e-6 * np.abs(want).max()
        assert np.abs(covariance[s] - spread).max() < 1e-6 * max(np.abs(spread).max(), 1e-6)


@pytest.mark.parametrize("eta_b", [1.0, 0.6])
@pytest.mark.parametrize("operator", ["mask", "blur", "fft"])
def test_ddrm_is_the_published_chain_from_its_start(operator, eta_b):
    """Path by path: the start depends on the data, and singular values lie on both sides of every noise level."""
    case, rng = Case(operator, 0.05), Draws(2, tuple(range(SLICES)))
    solver, sigmas = make_solver("ddrm", eta_b=eta_b), [20.0, 1.0, 0.2, 0.07, 0.04, 0.0]
    got = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=rng).reshape(SLICES, case.n).numpy()
    like = torch.zeros(1, SLICES, *case.prior.mean.shape, dtype=torch.float64)
    draws = [rng.normal(k, like).reshape(SLICES, case.n).numpy() for k in range(len(sigmas) - 1)]
    u, values, vt = np.linalg.svd(case.a)
    for i, y in enumerate(case.y):
        x = np.zeros(case.n)
        for j, v in enumerate(vt):
            ratio = case.noise / values[j] if j < len(values) and values[j] > 1e-9 else np.inf
            z = v @ draws[0][i]
            x = x + v * ((u.T @ y)[j] / values[j] + math.sqrt(400 - ratio**2) * z if ratio < 20 else 20 * z)
        s = Symbols(case.n, 1)
        for k, (sigma, after) in enumerate(pairwise(sigmas)):
            m = ddrm(case, y, s, sigma, after, k, eta=0.85, eta_b=eta_b)
            x = m @ np.concatenate([x, [1], draws[min(k + 1, len(draws) - 1)][i]])
        assert np.abs(got[i] - x).max() < 1e-6 * np.abs(x).max()


@pytest.mark.parametrize("first", [0.15, 0.07])
def test_ddrm_starts_from_the_data_where_their_noise_is_below_the_first_level(first):
    """yb + sqrt(sigma^2 - sigma_y^2) z on pixels that were measured, where sigma > sigma_y, else sigma z."""
    case, rng = Case("mask", 0.1), Draws(5, tuple(range(SLICES)))
    x = make_solver("ddrm").init(case.problem, case.prior, [first, 0.0], rng).x
    z = rng.normal(0, x)
    measured = torch.from_numpy(case.a.sum(0) > 0).reshape(SIDE, SIDE)
    known = torch.from_numpy(case.y @ case.a).reshape(x.shape)
    from_data = known + math.sqrt(max(0.0, first**2 - 0.1**2)) * z
    want = torch.where(measured, from_data, first * z) if first > 0.1 else first * z
    assert (x - want).abs().max() < 1e-9


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_singular_values_that_are_rounding_are_zero(kind):
    """A mean of three pixels of six has no frequency 2 / 6, in any of six rows."""
    y = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=kind)
    basis = spectral(whiten(y, Blur((6, 6), torch.ones(1, 3) / 3, "circular"), 0.01), "ddrm")
    zero = basis.singular == 0
    assert zero[..., 2].all() and zero.sum() == zero[..., 2].numel() and (basis.known[zero] == 0).all()


@pytest.mark.parametrize("name", ["ddnm", "ddrm"])
def test_an_operator_without_singular_values_is_refused_before_the_run(name):
    for operator in ("average", "ct"):
        with pytest.raises(UsageError, match=f"'{name}' needs singular values in closed form, which Dense has not"):
            make_solver(name).require(Case(operator, 0.1).problem)
    make_solver(name).require(Case("fft", 0.1).problem)


@pytest.mark.parametrize("name", ["mask", "average", "ct"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("scaling", ["rows", "norm"])
def test_red_diff_is_adam_on_the_published_loss(name, weighting, scaling):
    """Autograd and torch's own Adam on the loss in VP variables, for a forward map of rows or norm 1 as published."""
    case = Case(name, 0.05)
    case.a = case.a / (np.linalg.norm(case.a, 2) if scaling == "norm" else np.linalg.norm(case.a) / len(case.a) ** 0.5)
    problem = whiten(torch.from_numpy(case.y), Dense(case.a), 0.05**2)
    solver, rng = make_solver("reddiff", weighting=weighting, scaling=scaling), Draws(3, tuple(range(SLICES)))
    *_, final = iterate(solver, problem, case.prior, PUBLISHED, rng)
    start = solver.init(problem, case.prior, PUBLISHED, rng).x
    mu, a = start.clone().requires_grad_(), torch.from_numpy(case.a)
    adam = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99))
    for k, sigma in enumerate(PUBLISHED[:-1]):
        at, w = vp(sigma), {"linear": sigma, "sqrt": sigma**0.5, "square": sigma**2, "log": math.log(1 + sigma)}
        w |= {"clip": min(sigma, 1), "power": sigma ** (2 / 3), "const": 1.0}
        eps = rng.normal(k + 1, start)
        xt = (math.sqrt(at) * mu + math.sqrt(1 - at) * eps).detach()
        predicted = (xt - math.sqrt(at) * case.prior.denoise(xt / math.sqrt(at), sigma)) / math.sqrt(1 - at)
        residual = torch.from_numpy(case.y) - mu.flatten(-3) @ a.T
        loss = 0.5 * residual.square().mean(-1) + 0.25 * w[weighting] * ((predicted - eps) * mu).flatten(-3).mean(-1)
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    assert (start - mu).abs().max() > 0.01
    assert torch.allclose(final.x0, mu.detach(), atol=1e-6)


@pytest.mark.parametrize("rho", [0.026, 0.0])
@pytest.mark.parametrize("name", ["blur", "fft"])
def test_mbir_is_the_published_chain(name, rho):
    """Predictor, corrector and ADMM on the stack by hand; corrector norms per slice, Neumann differences."""
    case, lam, snr = Case(name, 0.1), 2e-3, 0.16
    solver, rng = make_solver("mbir", rho=rho, lam=lam, snr=snr), Draws(3, tuple(range(SLICES)))
    *_, final = iterate(solver, case.problem, case.prior, PUBLISHED, rng)
    shape = (1, SLICES, *case.prior.mean.shape)
    draw = lambda k: rng.normal(k, torch.zeros(shape, dtype=torch.float64)).reshape(SLICES, case.n).numpy()  # noqa: E731
    score = lambda x, t: (np.stack([case.denoise(v, t, 1.0) for v in x[..., None]])[..., 0] - x) / t**2  # noqa: E731
    soft = lambda v, t: np.sign(v) * np.maximum(np.abs(v) - t, 0)  # noqa: E731
    a, d = case.a / case.noise, np.array([[-1.0, 1.0], [0.0, 0.0]])
    largest = np.linalg.norm(a, 2) ** 2
    x, split, dual = PUBLISHED[0] * draw(0), np.zeros((SLICES, case.n)), np.zeros((SLICES, case.n))
    for k, (sigma, after) in enumerate(pairwise(PUBLISHED)):
        gap = sigma**2 - after**2
        x = x + gap * score(x, sigma) + (math.sqrt(gap) * draw(2 * k + 1) if after else 0)
        if after:
            z, g = draw(2 * k + 2), score(x, sigma)
            step = 2 * (snr * np.linalg.norm(z, axis=1) / np.linalg.norm(g, axis=1))[:, None] ** 2
            x = x + step * g + np.sqrt(2 * step) * z
        normal = lambda v: v @ a.T @ a + rho * largest * d.T @ d @ v  # noqa: E731
        r = case.y / case.noise @ a + rho * largest * d.T @ (split - dual) - normal(x)
        alone = np.eye(SLICES) if rho == 0 else np.ones((SLICES, SLICES))  # one inner product for the coupled stack
        x = x + ((alone @ (r * r).sum(1)) / (alone @ (r * normal(r)).sum(1)))[:, None] * r
        if rho:
            split, dual = (v := soft(d @ x + dual, lam / rho)), dual + d @ x - v
    assert np.abs(final.x0.reshape(SLICES, case.n).numpy() - x).max() < 1e-6 * np.abs(x).max()


@pytest.mark.parametrize("operator", ["mask", "blur"])
def test_pigdm_with_exact_covariance_reaches_the_posterior(operator):
    """A white prior of the spread that the solver is told: r^2 I is the covariance of x0 given x, and Tweedie's weight
    makes the chain that of the conditional score, whose limit of many steps is the posterior."""
    case = Case(operator, 0.2, white=True)
    sigmas, options = log_snr(600, 30.0, 0.005), {"eta": 1.0, "adaptive": False, "sigma_data": 0.4}
    for s in range(SLICES):
        mean, covariance = law(case, case.y[s], pigdm, sigmas, 1, **options)
        truth, spread = case.posterior(s)
        assert np.linalg.norm(mean - truth) < 0.01 * np.linalg.norm(truth)
        assert 0.95 < np.trace(covariance) / np.trace(spread) < 1.05
    mean, covariance = law(case, case.y[0], pigdm, sigmas, 1, eta=1.0, sigma_data=0.4)  # published weight
    seen = lambda c: np.trace(case.a @ c @ case.a.T)  # noqa: E731
    assert seen(covariance) < 0.5 * seen(case.posterior(0)[1])


def options_for(name):
    """Converged data steps and little work."""
    exact = EXACT if name in ("diffpir", "pigdm") else {}
    return {**exact, **({"langevin": 3, "ode_steps": 2} if name == "daps" else {"rho": 0.0} if name == "mbir" else {})}


@pytest.mark.parametrize("name", ALL)
def test_a_slice_alone_gives_what_it_gives_in_the_stack(name):
    """Catches norms over the batch, chunks that drop a slice, draws that depend on the position."""
    operator = "blur" if name in ("ddnm", "ddrm") else "ct"
    case, sigmas, solver = Case(operator, 0.1), log_snr(5, 1.0, 0.1), make_solver(name, **options_for(name))
    rng = Draws(0, (4, 7), (0, 1))
    together = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=rng)
    alone = solve(solver, case.problem.restrict(slice(1, 2)), case.prior, sigmas=sigmas, rng=rng.restrict(slice(1, 2)))
    single = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=Draws(0, (4, 7), (1,)))
    assert together.shape == (2, SLICES, 1, SIDE, SIDE) and together.isfinite().all()
    assert torch.allclose(together[:, 1:], alone, atol=1e-9) and torch.allclose(together[1:], single, atol=1e-9)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_resuming_from_a_state_gives_the_same_bits(name):
    case, sigmas, solver = Case("mask", 0.1), log_snr(6, 1.0, 0.1), make_solver(name)
    states = list(iterate(solver, case.problem, case.prior, sigmas))
    resumed = list(iterate(solver, case.problem, case.prior, sigmas, state=states[2]))
    assert torch.equal(states[-1].x0, resumed[-1].x0) and len(states) == 6


@pytest.mark.parametrize("name", ALL)
def test_an_operator_of_the_whole_stack_gives_what_its_slices_give(name):
    """Block-diagonal over two slices of equal weight: the one operator acts on the stack, the other slice by slice."""
    case = Case("mask", 0.1)
    stacked = whiten(torch.from_numpy(case.y.ravel()), Stacked(torch.from_numpy(np.kron(np.eye(2), case.a))), 0.1**2)
    solver, sigmas = make_solver(name, **options_for(name)), log_snr(5, 1.0, 0.1)
    if name == "mbir":  # one CG iteration, with one inner product for the stack: more of them agree
        solver = make_solver(name, rho=0.0, cg_iterations=60)
    if "warm" in solver.__dataclass_fields__:  # the warm start stops its CG early
        solver = make_solver(name, **options_for(name), warm=False)
    slicewise = solve(solver, case.problem, case.prior, sigmas=sigmas)
    assert torch.allclose(solve(solver, stacked, case.prior, sigmas=sigmas), slicewise, atol=1e-6)


@pytest.mark.parametrize("name", ["diffpir", "pigdm"])
def test_slice_coupling_draws_neighbours_together(name):
    case, sigmas = Case("average", 0.1), log_snr(8, 1.0, 0.1)
    rng = Draws(0, (0, 1), shared=True)
    plain = solve(make_solver(name), case.problem, case.prior, sigmas=sigmas, rng=rng)
    coupled = solve(make_solver(name, coupling=TVz(weight=5.0)), case.problem, case.prior, sigmas=sigmas, rng=rng)
    assert difference(coupled).abs().sum() < 0.8 * difference(plain).abs().sum()
    again = solve(make_solver(name, coupling=TVz(weight=0.0)), case.problem, case.prior, sigmas=sigmas, rng=rng)
    assert (again - plain).abs().max() < 0.5 * (coupled - plain).abs().max()


@pytest.mark.parametrize("name", ALL)
def test_single_precision_is_kept_and_close(name):
    case, sigmas, solver = Case("blur", 0.1), log_snr(5, 1.0, 0.1), make_solver(name, **options_for(name))
    prior = GaussianPrior(case.prior.mean.float(), case.prior.covariance.float())
    prior.chunk = 1
    problem = whiten(torch.from_numpy(case.y).float(), Dense(case.a), 0.01)
    state = solver.init(problem, prior, sigmas, rng := Draws(0, (0, 1)))
    x = solver.step(problem, prior, state, sigmas[0], sigmas[1], rng).x
    assert x.dtype == state.x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("langevin", [100, 1000])
def test_daps_at_once_explains_exact_data_as_its_steps_do(monkeypatch, langevin):
    """In single precision, data a thousand times more exact than the start is near: in units of their noise."""
    case = Case("mask", 1e-4)
    problem = whiten(torch.from_numpy(case.y).float(), Dense(case.a), 1e-8)
    prior = GaussianPrior(case.prior.mean.float(), case.prior.covariance.float())
    solver, sigmas = make_solver("daps", langevin=langevin, rate_end=1.0), [1.0, 0.3, 0.1, 0.0]
    chi_squared = []
    for terms in (None, [(0.0, 0.0)] * 2000):
        if terms:
            monkeypatch.setattr("invdiff.solvers.daps.law", lambda *_, terms=terms: terms)  # step by step
        result = solve(solver, problem, prior, sigmas=sigmas, rng=Draws(0, (0, 1), tuple(range(40))))
        chi_squared.append(float((problem.operator(result) - problem.y).square().mean()))
    assert chi_squared[0] == pytest.approx(chi_squared[1], rel=0.15)


def test_daps_stays_finite_whatever_the_scale_of_the_operator():
    """The step follows |A|: the published number diverges for |A| = 1000."""
    case = Case("ct", 0.05)
    problem = whiten(torch.from_numpy(1e4 * case.y), Dense(1e4 * case.a), (1e4 * 0.05) ** 2)
    for part in (problem, case.problem):
        result = solve(make_solver("daps", langevin=20), part, case.prior, sigmas=[10.0, 3.0, 1.0, 0.1, 0.0])
        assert result.abs().max() < 3


@pytest.mark.parametrize(
    "name, options",
    [
        ("diffpir", {"zeta": 1.5}),
        ("diffpir", {"lam": 0.0}),
        ("pigdm", {"eta": 2.0}),
        ("pigdm", {"sigma_data": 0.0}),
        ("reddiff", {"lr": 0.0}),
        ("reddiff", {"weighting": "magic"}),
        ("reddiff", {"scaling": "magic"}),
        ("mbir", {"cg_iterations": 0}),
        ("ddrm", {"eta_b": 1.1}),
        ("ddnm", {"eta": 1.1}),
        ("daps", {"rate": 2.0}),
        ("daps", {"langevin": 0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options):
    (key,) = options
    with pytest.raises(UsageError, match=key):
        make_solver(name, **options)
