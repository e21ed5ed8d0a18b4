"""DPS against the published formulas, by autograd and dense matrices."""

import math

import numpy as np
import pytest
import torch
from solver_cases import SIDE, SLICES, Case, Dense, Stacked, vp

from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.noise import BeerLambert, Poisson
from invdiff.priors.base import PriorInfo
from invdiff.problem import whiten
from invdiff.schedule import log_snr
from invdiff.solvers import make_solver
from invdiff.solvers.base import State, solve

RNG = Draws(3, tuple(range(SLICES)))


def dps_by_hand(case, x, sigma, after, z, *, zeta, eta, clip, norm):
    """The published step in its variables, on one slice ``x`` (n,), the gradient by autograd.

    ``norm`` is that of the residual of x0; ``clip`` the range, or None. Posterior mean and variance are written as
    DDIM's (Song et al. 2021, equation 16).
    """
    at, as_ = vp(sigma), vp(after)
    leaf = (math.sqrt(at) * x).clone().requires_grad_()
    x0 = case.prior.denoise(leaf.reshape(case.prior.mean.shape) / math.sqrt(at), sigma).flatten()
    if clip:
        x0 = torch.minimum(torch.maximum(x0, torch.tensor(clip[0])), torch.tensor(clip[1]))
    (grad,) = torch.autograd.grad(norm(x0), leaf)
    x0, leaf = x0.detach(), leaf.detach()
    c1 = eta * math.sqrt((1 - at / as_) * (1 - as_) / (1 - at))
    c2 = math.sqrt(1 - as_ - c1**2)
    eps = (leaf - math.sqrt(at) * x0) / math.sqrt(1 - at)
    return (math.sqrt(as_) * x0 + c1 * z + c2 * eps - zeta * grad) / math.sqrt(as_)


@pytest.mark.parametrize("after", [0.9, 0.0])
@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.4, False), (1.0, True), (0.4, True)])
def test_dps_has_the_ddim_chain_and_clips_inside_the_graph(eta, clip, after):
    case, sigma, limits = Case("average", 0.05), 1.3, (-0.2, 0.1)
    case.prior.info = PriorInfo("gaussian", value_range=limits)
    solver = make_solver("dps", zeta=0.7, eta=eta, clip=clip)
    x = 1.5 * RNG.normal(5, torch.zeros(1, SLICES, 1, SIDE, SIDE, dtype=torch.float64))
    memory = solver.init(case.problem, case.prior, [sigma, 0.0], RNG).memory
    got = solver.step(case.problem, case.prior, State(x, x, 0, memory), sigma, after, RNG)
    a, largest = torch.from_numpy(case.a), np.linalg.norm(case.a, 2)
    for s in range(SLICES):
        distance = lambda x0, s=s: torch.linalg.vector_norm(torch.from_numpy(case.y[s]) - a @ x0)  # noqa: E731
        z = RNG.normal(1, x)[0, s].flatten()
        options = {"zeta": 0.7 / largest, "eta": eta, "clip": limits if clip else None, "norm": distance}
        want = dps_by_hand(case, x[0, s].flatten(), sigma, after, z, **options)
        assert torch.allclose(got.x[0, s].flatten(), want, atol=1e-9)
    below, above = (got.x0 <= limits[0]).double().mean(), (got.x0 >= limits[1]).double().mean()
    assert below > 0.05 and above > 0.05 and below + above < 0.9  # the range matters
    assert not (clip and after) or (got.x0.min(), got.x0.max()) == limits


@pytest.mark.parametrize("sigma, after", [(157.41, 84.3), (0.01, 0.0)])
def test_dps_makes_the_first_and_the_last_published_step(sigma, after):
    """zeta 0.3 on the unsquared norm, ancestral, at the ends of the linear chain of 1000 steps."""
    case = Case("average", 0.05)
    solver = make_solver("dps", zeta=0.3, eta=1.0)
    x = math.hypot(1, sigma) * RNG.normal(5, torch.zeros(1, SLICES, 1, SIDE, SIDE, dtype=torch.float64))
    memory = solver.init(case.problem, case.prior, [sigma, 0.0], RNG).memory
    got = solver.step(case.problem, case.prior, State(x, x, 0, memory), sigma, after, RNG)
    a, largest = torch.from_numpy(case.a), np.linalg.norm(case.a, 2)
    for s in range(SLICES):
        distance = lambda x0, s=s: torch.linalg.vector_norm(torch.from_numpy(case.y[s]) - a @ x0)  # noqa: E731
        options = {"zeta": 0.3 / largest, "eta": 1.0, "clip": None, "norm": distance}
        want = dps_by_hand(case, x[0, s].flatten(), sigma, after, RNG.normal(1, x)[0, s].flatten(), **options)
        assert torch.allclose(got.x[0, s].flatten(), want, rtol=1e-9, atol=1e-9)


def test_dps_has_one_norm_for_a_stack_that_the_operator_couples():
    """|y - A x0| of both slices together, for a matrix that mixes them."""
    case, sigma, after = Case("average", 0.05), 1.3, 0.9
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(9, SLICES * case.n)))
    problem = whiten(torch.from_numpy(np.random.default_rng(1).normal(size=9)), Stacked(a), 0.04)
    solver = make_solver("dps", zeta=0.7, eta=0.0)
    x = RNG.normal(5, torch.zeros(1, SLICES, 1, SIDE, SIDE, dtype=torch.float64)).expand(2, -1, -1, -1, -1).clone()
    x[1] *= 2  # two samples have a norm each
    memory = solver.init(problem, case.prior, [sigma, 0.0], RNG).memory
    got = solver.step(problem, case.prior, State(x, x, 0, memory), sigma, after, RNG).x
    leaf = x.clone().requires_grad_()
    x0 = case.prior.denoise(leaf, sigma)
    distances = (problem.measured - x0.flatten(1) @ a.T).norm(dim=1)
    (grad,) = torch.autograd.grad(distances.sum(), leaf)
    step = 0.7 * math.sqrt((1 + sigma**2) * (1 + after**2)) / torch.linalg.matrix_norm(a, 2)
    want = x0.detach() + after / sigma * (x - x0.detach()) - step * grad
    assert torch.allclose(got, want, atol=1e-6)  # the norm of A, by Lanczos


def test_dps_on_whitened_poisson_data_has_the_weighted_norm_of_the_paper():
    """Equation 20: |r|_Lambda, Lambda = diag(1 / (2 y)) in counts, for an operator whose norm in that metric is 1."""
    case, noise, sigma, after = Case("average", 0.05), Poisson(peak=200.0, full=1.0, zero=-1.0), 1.3, 0.9
    counts = torch.tensor(np.random.default_rng(0).poisson(120.0, (SLICES, len(case.a))), dtype=torch.float64)
    y, a = noise.zero + noise.gain * counts, torch.from_numpy(case.a)
    problem = whiten(y, Dense(case.a), noise.variance(y))
    solver = make_solver("dps", zeta=0.3)
    x = RNG.normal(5, torch.zeros(1, SLICES, 1, SIDE, SIDE, dtype=torch.float64))
    memory = solver.init(problem, case.prior, [sigma, 0.0], RNG).memory
    got = solver.step(problem, case.prior, State(x, x, 0, memory), sigma, after, RNG).x
    for s in range(SLICES):
        weights = torch.diag(1 / (2 * counts[s]))

        def distance(x0, s=s, weights=weights):
            r = counts[s] - (a @ x0 - noise.zero) / noise.gain
            return (r @ weights @ r).sqrt()

        largest = torch.linalg.matrix_norm(weights.sqrt() @ a / noise.gain, 2)
        z = RNG.normal(1, x)[0, s].flatten()
        want = dps_by_hand(
            case, x[0, s].flatten(), sigma, after, z, zeta=0.3 / largest, eta=1.0, clip=None, norm=distance
        )
        assert torch.allclose(got[0, s].flatten(), want, atol=1e-9)
    photons = torch.tensor([20.0, 400.0], dtype=torch.float64)  # of line integrals the weight is the count
    assert torch.allclose(1 / BeerLambert(1e3).variance(torch.log(1e3 / photons)), photons)


def test_dps_of_nothing_measured_is_the_prior_alone():
    case = Case("mask", 0.1)
    problem = whiten(torch.from_numpy(case.y), Dense(0 * case.a), 0.01)
    sigmas = log_snr(4, 2.0, 0.1)
    free = solve(make_solver("dps", zeta=0.0), problem, case.prior, sigmas=sigmas)
    assert torch.equal(solve(make_solver("dps"), problem, case.prior, sigmas=sigmas), free) and free.isfinite().all()


def test_clipping_needs_an_image_of_real_values():
    make_solver("dps").require(Case("fft", 0.1).problem)
    with pytest.raises(UsageError, match="dps: clip needs a known range"):
        make_solver("dps", clip=True).require(Case("fft", 0.1).problem)
