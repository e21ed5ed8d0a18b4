"""Guided solvers against deepinv 0.5 in one run: same prior, operator, data, noise levels and draws.

Where the formulas agree the results agree to rounding. Where they do not, the test names the term, puts it right on one
side and finds the results equal again. deepinv's images lie in [0, 1] and its chain in [-1, 1]: ``whiten(scale=0.5,
shift=0.5)`` here. Its float32 is lifted to float64, so that rounding stays below 1e-9.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from deepinv_cases import (
    COUNT,
    DRAWS,
    EXACT,
    LIKE,
    NOISE,
    SHAPE,
    SIGMAS,
    TIMES,
    Case,
    Clipped,
    Exact,
    Given,
    Torch,
    chain,
    close,
    draw,
)

from invdiff.data_step import point_spectrum
from invdiff.draws import Draws
from invdiff.schedule import linear_betas, table_sigmas, vp_sigma
from invdiff.solvers import make_solver
from invdiff.solvers.base import State, iterate, solve

dinv = pytest.importorskip("deepinv")


def zeta_of(weight, state, sigma, after):
    """Our zeta that does what deepinv's weight of the norm does: it steps by weight (sigma^2 - sigma'^2)."""
    unit = float(state.memory["norm"].flatten()[0]) * NOISE  # |A| for images in [-1, 1]
    return weight * unit * (sigma**2 - after**2) / math.sqrt((1 + sigma**2) * (1 + after**2))


@pytest.mark.parametrize("name", ["inpaint", "blur", "matrix"])
def test_dps_is_deepinvs_where_zeta_follows_its_weight(name, monkeypatch):
    case, weight = Case(name), 30.0
    want = chain(case, dinv.sampling.DPSDataFidelity(weight=weight), TIMES, monkeypatch=monkeypatch)
    options = lambda k, state, now, after: {"zeta": zeta_of(weight, state, now, after)}  # noqa: E731
    assert close(case.steps(("dps", {}), SIGMAS, options), want)
    free = case.steps(("dps", {"zeta": 0.0}), SIGMAS)
    assert (free - want).norm() > 0.1 * want.norm()  # the guidance is felt


def test_deepinvs_whole_dps_is_the_chain_of_these_tests(monkeypatch):
    """Its own loop, start and end."""
    case = Case("blur")
    monkeypatch.setattr("deepinv.sampling.noisy_datafidelity.torch", Torch(draw))
    model = dinv.sampling.DPS(Exact(case.prior), solver=Given(TIMES, 1.0), weight=30.0)
    start = model.sde.scale_t(1.0) * model.sde.sigma_t(1.0) * draw(0)
    got = 2 * model(case.y.expand(COUNT, *SHAPE), case.physics, x_init=start) - 1
    want = chain(case, dinv.sampling.DPSDataFidelity(weight=30.0), TIMES, monkeypatch=monkeypatch)
    assert close(got, want)


def test_default_weight_of_deepinvs_dps_leaves_the_data_aside(monkeypatch):
    """Weight 1 in 1000 steps, its defaults, is a zeta of 0.01 and less; published are 0.3 to 1 at every step.

    The zetas of weight 1 add up to half the integral of beta(t), whatever the number of steps: 100 will do.
    """
    case, times = Case("inpaint"), torch.linspace(1, 0, 101, dtype=torch.float64)
    sigmas, sums = [vp_sigma(float(t)) for t in times], {}
    norm = make_solver("dps").init(case.problem, case.prior, sigmas, DRAWS)
    for steps in (100, 1000):
        levels = [vp_sigma(k / steps) for k in range(steps, -1, -1)]
        zetas = [zeta_of(1.0, norm, now, after) for now, after in pairwise(levels)]
        sums[steps] = sum(zetas)
    assert max(zetas) == zetas[0] == pytest.approx(0.01, rel=0.01) and min(zetas) < 1e-4
    assert sums[1000] == pytest.approx(5.0, rel=0.01) and sums[100] == pytest.approx(5.0, rel=0.1)
    want = chain(case, dinv.sampling.DPSDataFidelity(), times, monkeypatch=monkeypatch)
    free, guided = (case.steps(("dps", {"zeta": zeta}), sigmas) for zeta in (0.0, 1.0))
    fit = [case.problem.chi_squared(x[:, None]) for x in (free, want, guided)]
    assert (want - free).norm() < 0.1 * (guided - free).norm()
    assert fit[1] > 0.9 * fit[0] and fit[2] < 1


def test_what_deepinvs_dps_adds_is_that_it_clips_the_estimate(monkeypatch):
    """To [-1, 1] of images in [0, 1], that is to [-3, 1] here: no gradient comes from pixels that are cut off."""
    clipped = type("Clipped", (Clipped,), {"low": -3.0})
    ours, theirs = Case("blur", mean=0.9, prior=clipped), Case("blur", mean=0.9)
    options = lambda k, state, now, after: {"zeta": zeta_of(30.0, state, now, after)}  # noqa: E731
    fidelity = dinv.sampling.DPSDataFidelity(weight=30.0, clip=[-1.0, 1.0])
    want = chain(theirs, fidelity, TIMES, monkeypatch=monkeypatch)
    assert close(ours.steps(("dps", {}), SIGMAS, options), want)
    assert not close(theirs.steps(("dps", {}), SIGMAS, options), want, 0.02)


def test_annealed_guidance_of_deepinv_is_the_norms_with_another_length(monkeypatch):
    """grad |r|^2 / (2 (noise^2 + sigma^2 / 4)) is |r| / (noise^2 + sigma^2 / 4) grad |r|: one zeta per residual."""
    case, times, sigmas = Case("blur"), TIMES[7:9], SIGMAS[7:9]
    fidelity = dinv.sampling.DPSDataFidelity(guidance="annealed")
    want = chain(case, fidelity, times, monkeypatch=monkeypatch)
    x0 = case.prior.denoise(sigmas[0] * DRAWS.normal(0, LIKE), sigmas[0])
    residual = NOISE * (case.problem.operator(x0) - case.problem.y).flatten(2).norm(dim=-1)
    weights = (residual / (NOISE**2 + sigmas[0] ** 2 / 4)).flatten().tolist()
    for i, weight in enumerate(weights):
        got = step_once(case, sigmas, lambda state: {"zeta": zeta_of(weight, state, *sigmas)})  # noqa: B023
        assert close(got[i], want[i] / math.sqrt(1 / (1 + sigmas[1] ** 2)))


def step_once(case, sigmas, options):
    """The chain after one step, ``(samples, C, H, W)``."""
    state = make_solver("dps").init(case.problem, case.prior, sigmas, DRAWS)
    state = State(sigmas[0] * DRAWS.normal(0, LIKE), LIKE, 0, state.memory)
    return make_solver("dps", **options(state)).step(case.problem, case.prior, state, *sigmas, DRAWS).x[:, 0]


def pigdm(case, monkeypatch, eta=1.0, weights=None, eps=1e-300):
    """deepinv's Pi-GDM; ``eps`` is what its CG adds to denominators, 1e-8, which keeps it from converging."""
    cg = partial(dinv.optim.linear.conjugate_gradient, eps=eps)
    monkeypatch.setattr("deepinv.sampling.noisy_datafidelity.conjugate_gradient", cg)
    fidelity = dinv.sampling.PiGDMDataFidelity(cg_max_iter=60, cg_tol=1e-12)
    return chain(case, fidelity, TIMES, eta, weights, monkeypatch)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("name", ["inpaint", "blur", "matrix"])
def test_pigdm_with_tweedies_weight_is_deepinvs(name, eta, monkeypatch):
    """deepinv's spread of 1 is that of images in [0, 1], 2 in [-1, 1]."""
    case = Case(name)
    options = EXACT | {"adaptive": False, "eta": eta, "sigma_data": 2.0}
    assert close(case.steps(("pigdm", options), SIGMAS), pigdm(case, monkeypatch, eta))


@pytest.mark.parametrize("name", ["inpaint", "matrix"])
def test_pigdm_with_the_papers_spread_is_deepinvs_in_the_papers_range(name, monkeypatch):
    case = Case(name, scale=1.0)
    options = EXACT | {"adaptive": False, "sigma_data": 1.0}
    assert close(case.steps(("pigdm", options), SIGMAS), pigdm(case, monkeypatch))
    inside = Case(name)
    assert not close(inside.steps(("pigdm", options), SIGMAS), pigdm(inside, monkeypatch), 1e-3)


def test_what_is_left_of_pigdm_is_the_constant_in_deepinvs_cg(monkeypatch):
    """Added to denominators that fall below it, whatever the tolerance; 3 iterations, the default, are further off."""
    case = Case("matrix")
    want = case.steps(("pigdm", EXACT | {"adaptive": False, "sigma_data": 2.0}), SIGMAS)
    theirs = pigdm(case, monkeypatch, eps=1e-8)
    assert close(theirs, want, 1e-3) and not close(theirs, want, 1e-6)
    default = chain(case, dinv.sampling.PiGDMDataFidelity(), TIMES, monkeypatch=monkeypatch)
    assert not close(default, want, 1e-2)


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_pigdm_of_the_authors_is_deepinvs_with_their_weight(eta, monkeypatch):
    """The whole of g at every step, where the conditional score has (1 - c2 / sigma) sigma^2 / r^2 of it."""
    case, weights = Case("blur", scale=1.0), []
    for sigma, after in pairwise(SIGMAS):
        old = math.sqrt(after**2 * (1 - eta**2 * (sigma**2 - after**2) / sigma**2))
        weights.append(sigma**2 / (1 + sigma**2) / ((1 - old / sigma) * sigma**2))
    ours = case.steps(("pigdm", EXACT | {"eta": eta}), SIGMAS)
    assert close(ours, pigdm(case, monkeypatch, eta, weights))
    assert not close(ours, pigdm(case, monkeypatch, eta), 0.02)


LEVELS = [10.0, 3.0, 1.0, 0.4, 0.15, 0.05, 0.02]  # sigmas of images in [-1, 1]


def ddrm(case, monkeypatch, draws=None, **options):
    """Images of deepinv's DDRM, in the prior's range, without the constant that it adds to denominators."""
    monkeypatch.setattr("deepinv.sampling.diffusion.torch", Torch(draws or draw))
    scale = case.problem.scale
    model = dinv.sampling.DDRM(Exact(case.prior, 1 / scale), [s * scale for s in LEVELS], **{"eps": 0.0} | options)
    return (model(case.y.expand(COUNT, *SHAPE).clone(), case.physics) - case.problem.shift) / scale


def ours_ddrm(case, rng=DRAWS, **options):
    return solve(make_solver("ddrm", **options), case.problem, case.prior, sigmas=[*LEVELS, 0.0], rng=rng)[:, 0]


class Scaled(Draws):
    """Draws divided by sqrt(2)."""

    def normal(self, step, like):
        return super().normal(step, like) / math.sqrt(2)


@pytest.mark.parametrize("eta, eta_b", [(0.85, 1.0), (0.4, 0.6)])
def test_ddrm_is_deepinvs_for_pixels_where_deepinv_halves_the_variance_of_its_draws(eta, eta_b, monkeypatch):
    """It divides every draw by sqrt(2), which the paper does not: samples have half the variance that they should."""
    case = Case("inpaint", scale=1.0)
    want = ddrm(case, monkeypatch, eta=eta, etab=eta_b)
    narrow = ours_ddrm(case, Scaled(4, (0,), tuple(range(COUNT))), eta=eta, eta_b=eta_b)
    assert close(narrow, want) and not close(ours_ddrm(case, eta=eta, eta_b=eta_b), want, 0.02)
    centre = ddrm(case, monkeypatch, lambda k: torch.zeros(COUNT, *SHAPE).double(), eta=eta, etab=eta_b)
    ours = ours_ddrm(case, eta=eta, eta_b=eta_b)
    assert close((ours - centre).square(), 2 * (want - centre).square(), 1e-8)
    assert close(ddrm(case, monkeypatch, eta=eta, etab=eta_b, eps=1e-6), want, 1e-4)  # the constant of deepinv


@pytest.mark.parametrize("name", ["blur", "blur, strong"])
def test_ddrm_of_frequencies_is_deepinvs_with_draws_of_white_images(name, monkeypatch):
    """Complex draws divided by sqrt(2) are right except where the transform of an image is real. Singular values below
    the noise deepinv takes for zeros."""
    case = Case(name, scale=1.0)
    white = lambda k: math.sqrt(2) * case.physics.V_adjoint(draw(k))  # noqa: E731
    want, solver = ddrm(case, monkeypatch, white), make_solver("ddrm")
    weak = (case.physics.mask > 0) & (case.physics.mask < NOISE)
    assert bool(weak.any()) == (name != "blur")
    assert close(ours_ddrm(case), want) == (name == "blur")
    state = solver.init(case.problem, case.prior, LEVELS, DRAWS)
    seen = state.memory["singular"] > 1
    x, z = (torch.fft.rfft2(image, norm="ortho") for image in (state.x, DRAWS.normal(0, LIKE)))
    x = torch.fft.irfft2(torch.where(seen, x, LEVELS[0] * z), norm="ortho", s=SHAPE[1:])
    state = State(x, LIKE, 0, {key: torch.where(seen, value, 0) for key, value in state.memory.items()})
    *_, last = iterate(solver, case.problem, case.prior, [*LEVELS, 0.0], DRAWS, state)
    assert close(last.x0[:, 0], want)


LAM = 7.0  # deepinv's default


def diffpir(case, monkeypatch, lam=LAM, zeta=0.3, steps=12):
    """deepinv's DiffPIR: image in [-1, 1], noise levels, our start of the same chain."""
    monkeypatch.setattr("deepinv.sampling.diffusion.torch", Torch(draw))
    fidelity = dinv.optim.data_fidelity.L2()
    model = dinv.sampling.DiffPIR(Exact(case.prior), fidelity, NOISE, steps, zeta, lam)
    out = model(case.y.expand(COUNT, *case.y.shape[1:]), case.physics)
    levels = [float(model.sigmas[i]) for i in model.seq]
    start = 2 * case.physics.A_adjoint(case.y) - 1 + math.sqrt(levels[0] ** 2 - 4 * NOISE**2) * DRAWS.normal(0, LIKE)
    return 2 * out - 1, levels, State(start, start, 0, {"spectrum": point_spectrum(case.problem)})


def ours_diffpir(case, levels, start, lam, zeta=0.3):
    """The last noisy image of our chain and our result."""
    solver = make_solver("diffpir", lam=lam, zeta=zeta, **EXACT)
    states = list(iterate(solver, case.problem, case.prior, [*levels, 0.0], DRAWS, start))
    return states[-2].x[:, 0], states[-1].x0[:, 0]


@pytest.mark.parametrize("zeta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["inpaint", "blur"])
def test_diffpir_is_deepinvs_but_for_its_weight_and_its_end(name, zeta, monkeypatch):
    """The published weight is lam / 4 in our units (images in [0, 1], sigma of those in [-1, 1]); deepinv's is lam / 2,
    for it hands 1 / (2 rho) to the prox of half the squared residual. And it returns the last noisy image, scaled to
    variance 1, where ours denoises it and fits the data. Levels are those of the table of 1000 betas on both sides."""
    case = Case(name)
    theirs, levels, start = diffpir(case, monkeypatch, zeta=zeta)
    table = table_sigmas(linear_betas())
    assert len(levels) == 12 and all(min(abs(s / t - 1) for t in table) < 1e-9 for s in levels)
    assert levels[0] == pytest.approx(max(table)) and levels[-1] == pytest.approx(min(table))
    noisy, clean = ours_diffpir(case, levels, start, LAM / 2, zeta)
    assert close(noisy / math.sqrt(1 + levels[-1] ** 2), theirs)
    denoised = case.prior.denoise(theirs * math.sqrt(1 + levels[-1] ** 2), levels[-1])
    step = levels[-1] ** 2 / (2 * LAM * NOISE**2)
    assert close(2 * case.physics.prox_l2((denoised + 1) / 2, case.y, step) - 1, clean)
    assert not close(denoised, clean, 1e-4)
    published = ours_diffpir(case, levels, start, LAM / 4, zeta)[1]
    assert not close(published, clean, 0.02)  # the weight
    assert 0.05 * levels[-1] < (theirs - clean).square().mean().sqrt() < levels[-1]  # the end: noise of the last level


def test_deepinvs_diffpir_clips_the_estimate_before_the_data_step(monkeypatch):
    case = Case("blur", mean=0.9)
    theirs, levels, start = diffpir(case, monkeypatch)
    noisy = ours_diffpir(Case("blur", mean=0.9, prior=Clipped), levels, start, LAM / 2)[0]
    assert close(noisy / math.sqrt(1 + levels[-1] ** 2), theirs)
    assert not close(ours_diffpir(case, levels, start, LAM / 2)[0], theirs, 0.02)
