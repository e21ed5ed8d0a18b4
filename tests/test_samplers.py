"""Samplers against exact answers: probability flow in closed form, affine recursions, published steps by hand."""

import math
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.priors.base import PriorInfo
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.samplers import SAMPLERS, make_sampler
from invdiff.samplers.adams import tab_weights
from invdiff.schedule import (
    SCHEDULES,
    check_sigmas,
    cosine_sigma,
    discrete,
    linear_betas,
    log_snr,
    make_schedule,
    table_sigmas,
    vp_sigma,
    vp_time,
)
from invdiff.solvers.base import State, iterate, solve
from invdiff.solvers.dps import DPS
from invdiff.solvers.unconditional import Nothing, Unconditional, no_data

F64 = torch.float64
ORDERS = {
    **{"ddim": 1, "euler": 1, "dpmpp-1": 1, "dpm-1": 1, "heun": 2, "dpmpp-2m": 2, "dpm-2": 2, "deis-tab1": 2},
    **{"pndm": 2, "plms": 2, "dpmpp-3m": 3, "dpm-3": 3, "deis-tab2": 3, "deis-tab3": 4},
}
NOISY = {"ddpm": {}, "ddim": {"eta": 1.0}, "euler": {"churn": 0.3}, "heun": {"churn": 0.3}}
WEIGHTS, CENTRES, SPREADS = (0.3, 0.7), (-0.6, 0.5), (0.15, 0.25)
NONE = Draws(0, (0,))


def tensor(*values):
    """Values as images (1, 1, 1, rows, 2)."""
    return torch.tensor(values, dtype=F64).reshape(1, 1, 1, -1, 2)


@pytest.fixture
def gaussian():
    g = torch.Generator().manual_seed(1)
    root = torch.randn(4, 4, generator=g, dtype=F64) / 3
    return GaussianPrior(tensor(0.2, -0.4, 0.7, 0.0)[0, 0], root @ root.T + 0.01 * torch.eye(4, dtype=F64))


def gaussian_flow(prior, x, sigma, sigma_next):
    """Probability flow of a Gaussian: every axis is stretched with its standard deviation."""
    z = (x - prior.mean).reshape(-1, 4) @ prior.axes
    z = z * ((prior.variances + sigma_next**2) / (prior.variances + sigma**2)).sqrt()
    return prior.mean + (z @ prior.axes.T).reshape(x.shape)


def mixture(x, sigma):
    """E[x0 | x] where each pixel is one of two Gaussians."""
    v = [s * s + sigma * sigma for s in SPREADS]
    parts = list(zip(WEIGHTS, CENTRES, SPREADS, v, strict=True))
    share = torch.softmax(
        torch.stack([math.log(w) - 0.5 * math.log(u) - 0.5 * (x - c) ** 2 / u for w, c, _, u in parts]), 0
    )
    return sum(p * (c + s * s / u * (x - c)) for p, (_, c, s, u) in zip(share, parts, strict=True))


def mixture_flow(x, sigma, sigma_next):
    """Probability flow in one dimension keeps quantiles: F'(x') = F(x), by bisection."""

    def cdf(x, s):
        parts = zip(WEIGHTS, CENTRES, SPREADS, strict=True)
        return sum(w / 2 * torch.erfc(-(x - c) / math.sqrt(2 * (t * t + s * s))) for w, c, t in parts)

    want, low, high = cdf(x, sigma), torch.full_like(x, -1e3), torch.full_like(x, 1e3)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, sigma_next) < want
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def walk(sampler, x, denoise, sigmas, rng=NONE, memory=None):
    memory = memory or {}
    for sigma, sigma_next in pairwise(sigmas):
        x, memory = sampler.step(x, denoise, sigma, sigma_next, memory, rng)
    return x, memory


def flow_error(sampler, steps, start, denoise, flow):
    """Relative error at sigma 0.02 from 10; the first three steps are set on the exact flow, as history for multistep
    samplers, whose published start is of lower order.
    """
    sigmas, memory, x = log_snr(steps + 1, 10.0, 0.02)[:-1], {}, start
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = flow(start, sigmas[0], sigma) if k <= 3 else x
        x, memory = sampler.step(x, denoise, sigma, sigma_next, memory, NONE)
    want = flow(start, sigmas[0], sigmas[-1])
    return float((x - want).norm() / want.norm())


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_the_exact_flow_of_a_mixture(name):
    start = 10 * torch.linspace(-2, 2, 16, dtype=F64).reshape(1, 1, 1, 4, 4)
    errors = [flow_error(make_sampler(name), n, start, mixture, mixture_flow) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15)
    assert errors[1] < {1: 6e-3, 2: 3e-4, 3: 2e-5, 4: 2e-6}[ORDERS[name]]  # DDIM 5.6e-3


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_the_exact_flow_of_a_gaussian(name, gaussian):
    def flow(x, a, b):
        return gaussian_flow(gaussian, x, a, b)

    start = 10 * tensor(1.0, -0.4, 0.3, 1.5)
    errors = [flow_error(make_sampler(name), n, start, gaussian.denoise, flow) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) > ORDERS[name] - 0.15


def test_the_published_third_order_is_of_second_order():
    """Half the curvature: second order, and far less exact."""
    start = 10 * torch.linspace(-2, 2, 16, dtype=F64).reshape(1, 1, 1, 4, 4)
    published = make_sampler("dpmpp-3m", published=True)
    errors = [flow_error(published, n, start, mixture, mixture_flow) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)
    assert errors[1] > 10 * flow_error(make_sampler("dpmpp-3m"), 160, start, mixture, mixture_flow)


def test_euler_ddim_and_both_first_orders_are_one_step():
    x = tensor(1.0, -0.7, 0.4, 2.0)
    want = x + (0.8 - 1.3) * (x - mixture(x, 1.3)) / 1.3
    for name in ("ddim", "euler", "dpmpp-1", "dpm-1"):
        assert torch.allclose(make_sampler(name).step(x, mixture, 1.3, 0.8, {}, NONE)[0], want, atol=1e-14)


class Impulses:
    """Draws where sample k sees a one in draw k and zero in the others: x ends as the coefficients of all draws."""

    def normal(self, step, like):
        out = torch.zeros_like(like)
        out[step] = 1
        return out


def variance_by_hand(kind, sigmas, v, churn):
    """Variance of the last x, by the affine recursion of N(0, v): D = g x."""
    total = sigmas[0] ** 2
    for s, t in pairwise(sigmas):
        if kind.startswith("ddpm") or kind == "ddim":
            g = v / (v + s * s)
            fresh = (s * s - t * t) * (t * t / (s * s))
            if kind == "ddpm large":
                fresh = (s * s - t * t) * (1 + t * t) / (1 + s * s) if t else 0.0
            total = (g + t * t / (s * s) * (1 - g)) ** 2 * total + fresh
        else:
            raised = s * (1 + churn)
            total += raised**2 - s * s
            g, g1 = v / (v + raised**2), v / (v + t * t)
            slope = (1 - g) / raised
            if kind == "heun" and t:
                ahead = 1 + (t - raised) * slope
                slope = (slope + ahead * (1 - g1) / t) / 2
            total *= (1 + (t - raised) * slope) ** 2
    return total


@pytest.mark.parametrize("kind", ["ddpm", "ddpm large", "ddim", "euler", "heun"])
def test_noise_has_the_variance_of_the_affine_recursion(kind):
    """The response to every draw, squared and summed, is the variance; it comes near that of the prior."""
    v, name = 0.25, kind.split()[0]
    for steps, tolerance in ((6, None), (300, 0.04)):
        churn = 1.8 / steps  # S_churn of the paper is 1.8
        options = {"ddpm": {}, "ddpm large": {"variance": "large"}, "ddim": {"eta": 1.0}}.get(kind, {"churn": churn})
        sampler, sigmas = make_sampler(name, **options), log_snr(steps, 20.0, 0.01)
        assert sampler.stochastic
        x, memory = sampler.init(torch.zeros(steps + 1, 1, 1, 1, 1, dtype=F64), sigmas[0], Impulses())
        x, _ = walk(sampler, x, lambda x, s: v / (v + s * s) * x, sigmas, Impulses(), memory)
        total = float(x.square().sum())
        assert total == pytest.approx(variance_by_hand(kind, sigmas, v, churn), rel=1e-10)
        if tolerance:
            assert total == pytest.approx(v, rel=tolerance)


class Silence:
    def normal(self, step, like):
        return torch.zeros_like(like)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_mean_of_the_prior_stays(name, gaussian):
    """Without noise the mean is a fixed point."""
    sampler, sigmas = make_sampler(name), log_snr(30, 5.0, 0.01)
    x, _ = walk(sampler, gaussian.mean.expand(1, 1, 1, 2, 2), gaussian.denoise, sigmas, Silence())
    assert torch.allclose(x[0, 0], gaussian.mean, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_modes_of_a_mixture_have_their_weights(name):
    """4096 pixels: the share of a mode has a standard deviation of 0.007."""
    sampler, sigmas = make_sampler(name, **NOISY.get(name, {})), log_snr(60, 40.0, 0.01)
    x, memory = sampler.init(torch.zeros(1, 1, 1, 64, 64, dtype=F64), sigmas[0], NONE)
    x, _ = walk(sampler, x, mixture, sigmas, NONE, memory)
    low = x[x < -0.15]  # the modes meet here: 0.998 and 0.995 of them lie on their own side
    assert low.numel() / x.numel() == pytest.approx(0.3, abs=0.025)
    assert float(low.mean()) == pytest.approx(-0.6, abs=0.03)
    assert float(low.std()) == pytest.approx(0.15, abs=0.03)


# Published formulas in the variables of their papers, x_VP = alpha x; a_t, a_s: products of 1 - beta at both ends.
S, T, U = 1.3, 0.9, 1.8  # sigma, the next one, the one before
X = tensor(1.0, -0.7, 0.4, 2.0)


def vp(sigma):
    """alpha and standard deviation of the noise."""
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def eps_vp(x, sigma):
    """The noise that a network of the papers predicts from x_VP."""
    alpha, std = vp(sigma)
    return (x - alpha * mixture(x / alpha, sigma)) / std


def transfer(x, e, s, t):
    """DDIM (Song et al. 2021, equation 12 with eta 0)."""
    (alpha_s, std_s), (alpha_t, std_t) = vp(s), vp(t)
    return alpha_t * (x - std_s * e) / alpha_s + std_t * e


def second_step(name, **options):
    """The step S -> T after one from U, and x_VP at S and U."""
    sampler = make_sampler(name, **options)
    x, memory = sampler.step(X, mixture, U, S, {}, NONE)
    return sampler.step(x, mixture, S, T, memory, NONE)[0] * vp(T)[0], x * vp(S)[0], X * vp(U)[0]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_step_is_the_published_one(variance):
    (alpha_s, std_s), (alpha_t, std_t), z = vp(S), vp(T), NONE.normal(1, X)
    beta = 1 - alpha_s**2 / alpha_t**2
    x = alpha_s * X
    mean = (x - beta / std_s * eps_vp(x, S)) / math.sqrt(1 - beta)  # algorithm 2, line 4
    want = mean + math.sqrt(beta * (std_t**2 / std_s**2 if variance == "small" else 1)) * z
    got = make_sampler("ddpm", variance=variance).step(X, mixture, S, T, {}, NONE)[0]
    assert torch.allclose(alpha_t * got, want, atol=1e-13)


def test_ddim_step_is_the_published_one():
    (alpha_s, std_s), (alpha_t, std_t), eta, z = vp(S), vp(T), 0.6, NONE.normal(1, X)
    x, e = alpha_s * X, eps_vp(alpha_s * X, S)
    std = eta * std_t / std_s * math.sqrt(1 - alpha_s**2 / alpha_t**2)  # equation 16
    want = alpha_t * (x - std_s * e) / alpha_s + math.sqrt(std_t**2 - std**2) * e + std * z  # equation 12
    got = make_sampler("ddim", eta=eta).step(X, mixture, S, T, {}, NONE)[0]
    assert torch.allclose(alpha_t * got, want, atol=1e-13)


def test_ddpm_is_ddim_with_eta_one_and_the_chain_of_dps(gaussian):
    a = make_sampler("ddpm").step(X, gaussian.denoise, S, T, {}, NONE)[0]
    b = make_sampler("ddim", eta=1.0).step(X, gaussian.denoise, S, T, {}, NONE)[0]
    problem = whiten(torch.zeros(1, 4, dtype=F64), Flat(), 1.0)
    c = DPS(zeta=0.0).step(problem, gaussian, State(X, X, 0, {"norm": torch.ones(1)}), S, T, NONE).x
    assert torch.allclose(a, b, atol=1e-14) and torch.allclose(a, c, atol=1e-14)


class Flat(Nothing):
    def __init__(self):
        self.in_shape, self.out_shape = (1, 2, 2), (4,)

    def forward(self, x):
        return x.flatten(-3)


def test_heun_step_with_churn_is_the_published_one():
    gamma, z = 0.2, NONE.normal(1, X)
    raised = S + gamma * S
    stirred = X + math.sqrt(raised**2 - S**2) * 1.003 * z
    d = (stirred - mixture(stirred, raised)) / raised
    ahead = stirred + (T - raised) * d
    want = stirred + (T - raised) * (d / 2 + (ahead - mixture(ahead, T)) / T / 2)
    options = {"churn": gamma, "churn_noise": 1.003}
    assert torch.allclose(make_sampler("heun", **options).step(X, mixture, S, T, {}, NONE)[0], want, atol=1e-13)
    assert torch.allclose(make_sampler("euler", **options).step(X, mixture, S, T, {}, NONE)[0], ahead, atol=1e-13)
    outside = make_sampler("heun", churn=9.0, churn_max=1.0).step(X, mixture, S, T, {}, NONE)[0]
    assert torch.equal(outside, make_sampler("heun").step(X, mixture, S, T, {}, NONE)[0])


def test_dpm_solver_pp_2m_step_is_the_published_one():
    got, x, x_before = second_step("dpmpp-2m")
    h_before, h = math.log(U / S), math.log(S / T)
    r = h_before / h
    now, before = mixture(x / vp(S)[0], S), mixture(x_before / vp(U)[0], U)
    mean = (1 + 1 / (2 * r)) * now - before / (2 * r)  # algorithm 2
    want = vp(T)[1] / vp(S)[1] * x - vp(T)[0] * math.expm1(-h) * mean
    assert torch.allclose(got, want, atol=1e-13)


def test_dpm_solver_pp_3m_integrates_a_parabola_exactly():
    """D quadratic in ln sigma, whatever x: x' = r x + integral of e^-(h - u) D(u), in closed form."""
    lam = [-math.log(s) for s in (2.5, U, S, T)]
    c = (0.3, -0.5, 0.8)
    denoise = lambda x, s: torch.full_like(x, sum(c[k] * (-math.log(s)) ** k for k in range(3)))  # noqa: E731
    sampler, memory, x = make_sampler("dpmpp-3m"), {}, X
    for sigma, sigma_next in pairwise((2.5, U, S, T)):
        start = x
        x, memory = sampler.step(x, denoise, sigma, sigma_next, memory, NONE)
    # e^-u times the antiderivative of e^u (c0 + c1 u + c2 u^2)
    inner = lambda u: c[0] + c[1] * (u - 1) + c[2] * (u * u - 2 * u + 2)  # noqa: E731
    want = T / S * start + inner(lam[3]) - T / S * inner(lam[2])
    assert torch.allclose(x, want, atol=1e-13)


def test_dpm_solver_steps_are_the_published_ones():
    (alpha_s, _), (alpha_t, std_t), h = vp(S), vp(T), math.log(S / T)
    x, e = alpha_s * X, eps_vp(alpha_s * X, S)
    middle = S * math.exp(-h / 2)
    alpha, std = vp(middle)
    u = alpha / alpha_s * x - std * math.expm1(h / 2) * e  # algorithm 1
    want = alpha_t / alpha_s * x - std_t * math.expm1(h) * eps_vp(u, middle)
    assert torch.allclose(make_sampler("dpm-2").step(X, mixture, S, T, {}, NONE)[0] * alpha_t, want, atol=1e-13)
    r1, r2 = 1 / 3, 2 / 3  # algorithm 2
    s1, s2 = S * math.exp(-r1 * h), S * math.exp(-r2 * h)
    u1 = vp(s1)[0] / alpha_s * x - vp(s1)[1] * math.expm1(r1 * h) * e
    d1 = eps_vp(u1, s1) - e
    u2 = vp(s2)[0] / alpha_s * x - vp(s2)[1] * math.expm1(r2 * h) * e
    u2 = u2 - vp(s2)[1] * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = eps_vp(u2, s2) - e
    want = alpha_t / alpha_s * x - std_t * math.expm1(h) * e - std_t / r2 * (math.expm1(h) / h - 1) * d2
    assert torch.allclose(make_sampler("dpm-3").step(X, mixture, S, T, {}, NONE)[0] * alpha_t, want, atol=1e-13)


def test_deis_step_is_the_published_one():
    got, x, x_before = second_step("deis-tab1")
    now, before = eps_vp(x, S), eps_vp(x_before, U)
    times = torch.linspace(vp_time(S), vp_time(T), 20001, dtype=F64)  # equation 15 by the trapezoidal rule
    sigma = torch.tensor([vp_sigma(float(t)) for t in times], dtype=F64)
    line = (times - vp_time(U)) / (vp_time(S) - vp_time(U))
    c0, c1 = torch.trapezoid(line, sigma), torch.trapezoid(1 - line, sigma)
    want = vp(T)[0] * (x / vp(S)[0] + c0 * now + c1 * before)
    assert torch.allclose(got, want, atol=1e-8)


def test_deis_weights_integrate_polynomials_in_time():
    """The weights sum to sigma' - sigma, also where sigma falls by many orders."""
    for nodes in ((157.0, 300.0), (1.0, 2.0, 5.0), (0.02, 0.05, 0.1, 0.3)):
        sigma_next = nodes[0] / 100
        assert sum(tab_weights(nodes[0], sigma_next, nodes[1:])) == pytest.approx(sigma_next - nodes[0], rel=1e-9)


def test_plms_and_pndm_steps_are_the_published_ones():
    sigmas = [vp_sigma(t) for t in (0.5, 0.45, 0.4, 0.35, 0.3)]
    x, noises, xs = X * vp(sigmas[0])[0], [], [X]
    for k, (s, t) in enumerate(pairwise(sigmas)):
        e = eps_vp(x, s)
        noises.insert(0, e)
        if k == 0:
            mean = (e + eps_vp(transfer(x, e, s, t), t)) / 2
        else:
            table = {1: (3, -1, 2), 2: (23, -16, 5, 12), 3: (55, -59, 37, -9, 24)}[k]
            mean = sum(w * n for w, n in zip(table[:-1], noises, strict=True)) / table[-1]
        x = transfer(x, mean, s, t)
        xs.append(x / vp(t)[0])
    assert torch.allclose(walk(make_sampler("plms"), X, mixture, sigmas)[0], xs[-1], atol=1e-12)
    x, noises = X * vp(sigmas[0])[0], []
    for k, (s, t) in enumerate(pairwise(sigmas)):
        m = vp_sigma((vp_time(s) + vp_time(t)) / 2)
        e1 = eps_vp(x, s)
        noises.insert(0, e1)
        e2 = eps_vp(transfer(x, e1, s, m), m)
        e3 = eps_vp(transfer(x, e2, s, m), m)
        mean = (e1 + 2 * e2 + 2 * e3 + eps_vp(transfer(x, e3, s, t), t)) / 6
        if k == 3:
            mean = (55 * noises[0] - 59 * noises[1] + 37 * noises[2] - 9 * noises[3]) / 24
        x = transfer(x, mean, s, t)
    assert torch.allclose(walk(make_sampler("pndm"), X, mixture, sigmas)[0], x / vp(sigmas[-1])[0], atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_gives_the_estimate_and_calls_are_counted(name):
    count = [0]

    def denoise(x, sigma):
        assert sigma > 0
        count[0] += 1
        return mixture(x, sigma)

    sampler, sigmas = make_sampler(name), log_snr(7, 3.0, 0.05)
    x, memory = walk(sampler, X, denoise, sigmas[:-1], NONE)
    last, memory = sampler.step(x, denoise, sigmas[-2], 0.0, memory, NONE)
    assert count[0] == sampler.calls(7)
    want = mixture(x, sigmas[-2])
    assert torch.allclose(memory["x0"], want)
    if name in ("plms", "pndm"):  # published to the end with the weights of four steps
        past = [memory["eps"], memory["eps_1"], memory["eps_2"]]
        assert torch.allclose(past[0], (x - want) / sigmas[-2], atol=1e-12)
        assert (last - want).abs().max() < 3 * sigmas[-2]
    else:
        assert torch.allclose(last, want, atol=1e-14)
    count[0] = 0
    alone, _ = sampler.step(X, denoise, S, 0.0, {}, NONE)
    assert count[0] == sampler.calls(1) == 1 and torch.allclose(alone, mixture(X, S), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_results_do_not_depend_on_batching_or_on_a_stop(name, dtype):
    sampler, sigmas = make_sampler(name, **NOISY.get(name, {})), log_snr(8, 5.0, 0.05)

    class Mixture(GaussianPrior):
        def __init__(self):
            self.info = PriorInfo("mixture", sigma_min=0.05, sigma_max=5.0)

        def denoise(self, x, sigma, context=None):
            return mixture(x, sigma)

    def run(slices, samples, state=None):
        problem = no_data((1, 8, 8), len(slices), dtype=dtype)  # 64 pixels: whole vectors of the processor
        return list(iterate(Unconditional(sampler), problem, Mixture(), sigmas, Draws(3, slices, samples), state))

    whole = run((0, 1, 2), (0, 1))
    assert whole[-1].x0.dtype == dtype and whole[-1].x0.shape == (2, 3, 1, 8, 8)
    assert torch.equal(run((2,), (1,))[-1].x0[0, 0], whole[-1].x0[1, 2])
    assert torch.equal(run((0, 1, 2), (0, 1), whole[3])[-1].x0, whole[-1].x0)
    assert len(torch.unique(whole[-1].x0[..., 0, 0])) == 6
    handed_on = sampler.step(whole[0].x, mixture, 1.0, 0.5, {**whole[0].memory, "dual": torch.ones(1)}, Silence())[1]
    assert torch.equal(handed_on["dual"], torch.ones(1))


def test_samples_of_a_gaussian_prior_have_its_moments(gaussian):
    solver = Unconditional(make_sampler("dpmpp-2m"))
    draws = Draws(0, (0,), tuple(range(3000)))
    x = solve(solver, no_data((1, 2, 2), dtype=F64), gaussian, sigmas=log_snr(40, 50.0, 0.005), rng=draws).reshape(
        -1, 4
    )
    assert torch.allclose(x.mean(0), gaussian.mean.flatten(), atol=0.04)  # four standard deviations
    assert torch.allclose(x.T.cov(), gaussian.covariance, atol=0.05)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_decreases_from_end_to_end(name):
    sigmas = make_schedule(name, 9, 12.0, 0.02)
    assert check_sigmas(sigmas) == sigmas and len(sigmas) == 10
    tolerance = 0.05 if name == "ddpm" else 1e-12  # entries of a table
    assert sigmas[0] == pytest.approx(12, rel=tolerance) and sigmas[-2] == pytest.approx(0.02, rel=10 * tolerance)
    assert len(make_schedule(name, 1, 12.0, 0.02)) == 2
    for wrong in ((0, 1.0, 0.1), (4, 0.1, 1.0), (4, math.inf, 0.1), (4, 1.0, 0.0), (2.5, 1.0, 0.1)):
        with pytest.raises(UsageError, match=r"steps|sigma_min"):
            make_schedule(name, *wrong)


def test_schedules_are_even_in_what_they_say():
    def even(values):
        return np.ptp(np.diff(values)) < 1e-9 * abs(values[0] - values[-1])

    s = {name: make_schedule(name, 12, 30.0, 0.01)[:-1] for name in SCHEDULES}
    assert even(np.log(s["log-snr"])) and even(np.array(s["karras"]) ** (1 / 7))
    a = 1 / (1 + np.array(s["uniform-time"]) ** 2)
    t = (-0.1 + np.sqrt(0.01 - 2 * 19.9 * np.log(a))) / 19.9  # ln a = -19.9 t^2 / 2 - 0.1 t
    assert even(t)
    a = 1 / (1 + np.array(s["quadratic"]) ** 2)
    assert even(np.sqrt((-0.1 + np.sqrt(0.01 - 2 * 19.9 * np.log(a))) / 19.9))
    a = 1 / (1 + np.array(s["cosine"]) ** 2)
    f0 = np.cos(np.pi / 2 * 0.008 / 1.008) ** 2
    assert even(np.arccos(np.sqrt(a * f0)))
    assert cosine_sigma(0.5) == pytest.approx(math.sqrt(f0 / np.cos(np.pi / 2 * 0.508 / 1.008) ** 2 - 1))


def test_the_table_of_ddpm():
    table = table_sigmas(linear_betas())
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(table, np.sqrt((1 - a) / a), rtol=1e-12)
    assert discrete(1000, 1e3, 1e-3)[:-1] == table[::-1]
    assert discrete(4, 1e3, 1e-3)[:-1] == [table[999], table[666], table[333], table[0]]
    with pytest.raises(UsageError, match="table of betas has 1000 entries"):
        discrete(1001, 1e3, 1e-3)
    with pytest.raises(UsageError, match="betas must lie"):
        table_sigmas([0.1, 1.0])


@pytest.mark.parametrize("sigmas", [[], [0.0], [1.0, 0.5], [1.0, 1.0, 0.0], [math.nan, 0.0], [math.inf, 1.0, 0.0]])
def test_lists_that_are_no_schedule_are_refused(sigmas):
    with pytest.raises(UsageError, match="decreasing list of finite sigmas that ends in 0"):
        check_sigmas(sigmas)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UsageError, match=r"unknown sampler 'magic': choose one of ddim, ddpm, deis-tab1"):
        make_sampler("magic")
    with pytest.raises(UsageError, match=r"unknown schedule 'magic': choose one of cosine"):
        make_schedule("magic", 5, 1.0, 0.1)
    with pytest.raises(UsageError, match="sampler 'ddim' has no option 'order': its options are eta"):
        make_sampler("ddim", order=2)
    for name, key, value, words in (
        ("ddim", "eta", "much", "takes a float"),
        ("ddim", "eta", "nan", "eta must lie"),
        ("ddpm", "variance", "huge", "small or large"),
        ("dpmpp-2m", "order", 4, "1, 2 or 3"),
        ("dpmpp-2m", "published", "maybe", "value of published"),
        ("dpm-2", "order", "0", "1, 2 or 3"),
        ("deis-tab1", "degree", 5, "degree must be"),
        ("plms", "order", 1, "2, 3 or 4"),
        ("heun", "churn", -1.0, "churn >= 0"),
    ):
        with pytest.raises(UsageError, match=words):
            make_sampler(name, **{key: value})
    assert make_sampler("dpmpp-3m", published="true").published and make_sampler("ddim", eta="0.5").eta == 0.5


def diffusers_run(scheduler, steps, x, **options):
    """A scheduler of diffusers on x_VP with the noise of the mixture: its sigmas, x at each, and the end."""
    scheduler.set_timesteps(steps)
    table = table_sigmas(linear_betas())
    seen = []
    for t in scheduler.timesteps:
        sigma = table[int(t)]
        seen.append((sigma, x / vp(sigma)[0]))
        x = scheduler.step(eps_vp(x, sigma), t, x, **options).prev_sample
    return [s for s, _ in seen], [x for _, x in seen], x


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
        ("dpmpp-2m", "DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
        ("dpmpp-3m", "DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
    ],
)
def test_equal_to_diffusers(name, kind, options):
    """Same betas, same noise; diffusers keeps its tables in float32. Its third order is the published one."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    other = getattr(schedulers, kind)(beta_start=1e-4, beta_end=0.02, **options)
    start = X * 20
    sigmas, xs, end = diffusers_run(other, 20, start.clone())
    ours, memory = make_sampler(name, **({"published": True} if name == "dpmpp-3m" else {})), {}
    x = start / vp(sigmas[0])[0]
    for k, (sigma, sigma_next) in enumerate(pairwise([*sigmas, 0.0])):
        assert torch.allclose(x, xs[k], rtol=2e-4, atol=2e-4), k
        x, memory = ours.step(x, mixture, sigma, sigma_next, memory, NONE)
    assert torch.allclose(x, end, atol=2e-4)


def test_command_line(run, here):
    args = ("priors", "sample", "$/prior", "--steps", "3", "--size", "20,24", "--quiet")
    assert run(*args, "--count", "3", "-o", "s.nii.gz") == (0, "", "")
    volume = nib.load(here / "s.nii.gz")
    assert volume.shape == (24, 20, 3) and np.isfinite(volume.get_fdata()).all()
    assert run(*args, "--count", "1", "-o", "one.nii")[0] == 0
    np.testing.assert_array_equal(nib.load(here / "one.nii").get_fdata()[..., 0], volume.get_fdata()[..., 0])
    assert run(*args, "--count", "1", "--sampler", "ddim", "--set", "sampler.eta=1", "-o", "noisy.nii")[0] == 0
    assert abs(nib.load(here / "noisy.nii").get_fdata() - nib.load(here / "one.nii").get_fdata()).max() > 1e-3
    code, out, _ = run(*args[:-1], "--sampler", "heun", "--schedule", "karras", "--count", "2", "-o", "s.png")
    assert code == 0 and "s.png: tiny: heun, 3 steps (5 calls), karras, seed 0" in out
    assert (here / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("unknown sampler 'magic'|dpmpp-2m", ("--sampler", "magic")),
        ("unknown schedule 'magic'|karras", ("--schedule", "magic")),
        ("--size '3'|H,W", ("--size", "3")),
        ("--set 'eta=1'|sampler.NAME=VALUE", ("--set", "eta=1")),
        ("has no option 'eta'", ("--set", "sampler.eta=1")),
        ("table of betas|fewer steps", ("--schedule", "ddpm", "--steps", "990")),
    ],
)
def test_command_line_refuses(refused, words, args):
    refused(2, words, "priors", "sample", "$/prior", "-o", "s.png", *args)


def test_command_line_writes_over_nothing(run, refused, here):
    (here / "s.png").write_bytes(b"mine")
    refused(2, "exists already|--overwrite", "priors", "sample", "$/prior", "-o", "s.png")
