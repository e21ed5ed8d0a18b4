"""Samplers against exact answers: probability flow in closed form, affine recursions, batching, moments."""

import math
from itertools import pairwise

import pytest
import torch
from sampler_cases import CENTRES, F64, NONE, SPREADS, WEIGHTS, S, X, mixture, tensor, walk

from invdiff.draws import Draws
from invdiff.priors.base import PriorInfo
from invdiff.priors.gaussian import GaussianPrior
from invdiff.samplers import SAMPLERS, make_sampler
from invdiff.samples import sample_prior
from invdiff.schedule import log_snr
from invdiff.solvers.base import iterate, solve
from invdiff.solvers.unconditional import Unconditional, no_data

ORDERS = {
    **{"ddim": 1, "euler": 1, "dpmpp-1": 1, "dpm-1": 1, "heun": 2, "dpmpp-2m": 2, "dpm-2": 2, "deis-tab1": 2},
    **{"pndm": 2, "plms": 2, "dpmpp-3m": 3, "dpm-3": 3, "deis-tab2": 3, "deis-tab3": 4},
}


NOISY = {"ddpm": {}, "ddim": {"eta": 1.0}, "euler": {"churn": 0.3}, "heun": {"churn": 0.3}}


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
        assert sampler.stochastic and not make_sampler("ddim").stochastic and not make_sampler("heun").stochastic
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


HELD = {"plms": 1 + 3, "pndm": 1 + 3, "dpmpp-2m": 1, "dpmpp-3m": 2}
HELD |= {f"deis-tab{k}": 1 + k for k in (1, 2, 3)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_remembers_no_more_images_than_it_needs(name):
    """The estimate, and the noises (or estimates) of the last steps that its weights reach."""
    _, memory = walk(make_sampler(name), X, mixture, log_snr(7, 3.0, 0.05)[:-1], NONE)
    assert sum(value.shape == X.shape for value in memory.values()) == HELD.get(name, 1)


@pytest.mark.parametrize("name", ["plms", "heun"])
def test_the_estimate_of_a_sample_is_that_of_the_denoiser_and_at_the_end_the_sample(name, gaussian):
    sampler, sigmas, draws = make_sampler(name), log_snr(5, 3.0, 0.05), Draws(0, (0,))
    states = list(iterate(Unconditional(sampler), no_data((1, 2, 2), dtype=F64), gaussian, sigmas, draws))
    for before, state, sigma in zip(states[:-1], states[1:-1], sigmas[1:], strict=False):
        assert torch.equal(state.x0, gaussian.denoise(before.x, sigma))
    assert torch.equal(states[-1].x0, states[-1].x)
    assert name == "heun" or not torch.equal(states[-1].x0, states[-1].memory["x0"])


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


def test_samples_of_a_prior_are_those_of_its_seed_and_their_number(gaussian):
    solver, gaussian.info = Unconditional(make_sampler("ddpm")), PriorInfo("gaussian", sigma_min=0.05, sigma_max=5.0)
    *_, last = sample_prior(gaussian, solver, 3, 2, (2, 2), seed=5)
    problem = no_data((1, 2, 2))
    want = solve(solver, problem, gaussian, sigmas=solver.sigmas(3, problem, gaussian), rng=Draws(5, (0,), (0, 1)))
    assert torch.equal(last, want[:, 0])


def test_samples_of_a_gaussian_prior_have_its_moments(gaussian):
    solver = Unconditional(make_sampler("dpmpp-2m"))
    draws = Draws(0, (0,), tuple(range(3000)))
    x = solve(solver, no_data((1, 2, 2), dtype=F64), gaussian, sigmas=log_snr(40, 50.0, 0.005), rng=draws).reshape(
        -1, 4
    )
    assert torch.allclose(x.mean(0), gaussian.mean.flatten(), atol=0.04)  # four standard deviations
    assert torch.allclose(x.T.cov(), gaussian.covariance, atol=0.05)
