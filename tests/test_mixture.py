"""Weights of the two modes that guided solvers give to a mixture of Gaussians, whose posterior is known.

Images have two pixels, of which the first is measured; the modes differ by 1.2 in the second one, 12 standard
deviations. In the case "evidence" they differ in the first pixel too, by twice its standard deviation, and are equally
likely before the data and 0.8 to 0.2 after. In the case "none" the data say nothing of the mode: 0.3 to 0.7 before and
after. What the solvers can promise was derived before they were run:

near a mode   All of them: each step ends in a denoised image, and at low noise D(x) lies near one mode or the other.
weights       None is exact for a mixture with evidence. A sample chooses its mode while sigma is about 0.6, when the
              evidence of the first pixel drowns in the noise of the chain. "overwrites": data change the first pixel
              alone, so that the mode hears of them through D of a noisy pixel: weights lie between prior and posterior.
              "guides": the gradient of D carries them over; how much depends on the covariance of x0 given x that is
              assumed, between prior and posterior if it is too wide. DPS knows neither noise nor covariance: its zeta
              sets the weight, anywhere between the prior and 1.
no evidence   The second pixel is then sampled as without data. Ancestral and DDIM chains, and the predictor of
              DiffusionMBIR, are right up to their finite steps. Chains that mix old and fresh noise at every step,
              c e + sqrt(1 - c^2) z, are Langevin steps at the temperature T = (1 + c) / 2: until hops freeze they
              sample p^(1 / T), so that the heavier mode weighs more, at most as in p^(1 / T). DAPS adds noise of
              sigma^2 that its next level does not know of: hops go on for longer and even the weights. RED-diff seeks a
              mode: most runs end in the heavier one.
one point     pnp draws nothing: one image, in the mode in whose basin it starts.

Weights measured (4000 samples, standard error 0.008) stand in the table; moment matching, with the covariance of x0
given x itself, comes nearest.
"""

import math
from functools import cache

import pytest
import torch

from invdiff.draws import Draws
from invdiff.operators.mask import Mask
from invdiff.priors.base import Prior, PriorInfo
from invdiff.problem import whiten
from invdiff.solvers import SOLVERS, make_solver
from invdiff.solvers.base import solve

COUNT, NOISE = 1000, 0.1


class Mixture(Prior):
    """x0 ~ sum_k w_k N(mean_k, covariance) on flattened images; denoiser and posterior in closed form."""

    def __init__(self, weights, means, covariance):
        self.weights, self.means, self.covariance = (torch.tensor(v).double() for v in (weights, means, covariance))
        self.info = PriorInfo("mixture", sigma_min=0.0, sigma_max=math.inf)

    def denoise(self, x, sigma, context=None):
        total = self.covariance + sigma**2 * torch.eye(2).double()
        away = x.flatten(-3)[..., None, :] - self.means  # (..., modes, pixels)
        solved = away @ torch.linalg.inv(total)
        modes = (self.weights.log() - 0.5 * (away * solved).sum(-1)).softmax(-1)
        return (modes[..., None] * (self.means + solved @ self.covariance)).sum(-2).reshape(x.shape)

    def posterior(self, y):
        """Weights, means and covariance given the first pixel, y, with noise."""
        total = self.covariance[0, 0] + NOISE**2
        gain, away = self.covariance[:, 0] / total, y - self.means[:, 0]
        weights = (self.weights.log() - 0.5 * away**2 / total).softmax(-1)
        return weights, self.means + away[:, None] * gain, self.covariance - total * gain[:, None] * gain


class Batch(Draws):
    """All samples from one generator per step, which is faster."""

    def normal(self, step, like):
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(step), dtype=like.dtype)


CASES = {  # prior, measured
    "evidence": (Mixture([0.5, 0.5], [[0.1, 0.6], [-0.1, -0.6]], [[0.01, 0.005], [0.005, 0.01]]), 0.1 * math.log(4)),
    "none": (Mixture([0.3, 0.7], [[0.0, 0.6], [0.0, -0.6]], [[0.01, 0.0], [0.0, 0.01]]), 0.14),
}


def run(name, options, case):
    """Samples ``(count, 2)``, and the posterior."""
    prior, y = CASES[case]
    data = torch.tensor([[[[y, 0.0]]]], dtype=torch.float64)
    problem = whiten(data, Mask(torch.tensor([[1, 0]])), NOISE**2)
    solver = make_solver(name, **{key: value for key, value in options.items() if key != "steps"})
    sigmas = solver.sigmas(options.get("steps", solver.default_steps), problem, prior)
    samples = solve(solver, problem, prior, sigmas=sigmas, rng=Batch(0, (0,), tuple(range(COUNT))))
    return samples.reshape(-1, 2), prior.posterior(y)


def cooled(weight, kept):
    """The lighter weight of p^(1 / T), T = (1 + c) / 2, c the share of old noise."""
    light, heavy = (w ** (2 / (1 + kept)) for w in (weight, 1 - weight))
    return light / (light + heavy)


TABLE = {  # options, weight of the first mode: with evidence (bounds, measured), without (bounds, measured)
    "dps": ({"zeta": 0.1}, (0.5, 1.0), 0.65, (0.3, 0.3), 0.30),
    "pigdm": ({"eta": 1.0, "sigma_data": 1.0}, (0.5, 0.8), 0.66, (0.3, 0.3), 0.30),
    "mm": ({"sampler": "ddim:eta=1"}, (0.5, 0.8), 0.77, (0.3, 0.3), 0.30),
    "dds": ({"eta": 1.0, "gamma": 1.0}, (0.5, 0.8), 0.57, (cooled(0.3, 0.0), 0.3), 0.23),
    "diffpir": ({"zeta": 0.3, "lam": 1.75, "sigma_max": 20.0}, (0.5, 0.8), 0.53, (cooled(0.3, 0.7**0.5), 0.3), 0.29),
    "ddnm": ({"eta": 0.85}, (0.5, 0.8), 0.55, (cooled(0.3, (1 - 0.85**2) ** 0.5), 0.3), 0.27),
    "ddrm": ({"eta": 0.85}, (0.5, 0.8), 0.52, (cooled(0.3, (1 - 0.85**2) ** 0.5), 0.3), 0.26),
    "mbir": ({"snr": 0.0}, (0.5, 0.8), 0.52, (0.3, 0.3), 0.30),
    "daps": ({"steps": 20}, (0.5, 0.8), 0.54, (0.3, 0.5), 0.38),
    "reddiff": ({"lam": 0.25, "lr": 0.1}, (0.5, 1.0), 0.60, (0.0, 0.3), 0.08),
}


NEAR = {"daps": 0.96}  # its last Langevin steps add sigma_min^2 to the variance; all others 0.99


@cache
def row(name, case):
    """Of a row of the table: share of samples near a mode, weight of the first mode, posterior weight."""
    x, (weights, means, _) = run(name, TABLE[name][0], case)
    assert len(x) == COUNT
    distance = (x[:, None] - means).norm(dim=-1)
    near, first = distance.amin(-1) < 0.45, distance.argmin(-1) == 0  # halfway is 0.6 from both
    return float(near.double().mean()), float(first.double().mean()), float(weights[0])


def solver_rows():
    missing = pytest.mark.skip(reason="no such solver in the table")
    return [pytest.param(name, marks=[] if name in SOLVERS else missing) for name in TABLE]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", solver_rows())
def test_samples_lie_near_the_modes_with_the_weights_that_theory_allows(name, case):
    _, *expected = TABLE[name]
    (low, high), measured = expected[:2] if case == "evidence" else expected[2:]
    near, weight, truth = row(name, case)
    print(f"{name} {case}: {weight:.4f}, posterior {truth:.3f}, near {near:.4f}")
    assert near > NEAR.get(name, 0.99)
    slack = 4 * math.sqrt(measured * (1 - measured) / COUNT) + 0.01  # chance; finite steps
    assert low - slack < weight < high + slack
    assert abs(weight - measured) < slack


@pytest.mark.parametrize("case", CASES)
def test_pnp_gives_one_image_in_one_mode(case):
    x, (_, means, covariance) = run("pnp", {"turns": False}, case)  # pixels are not alike
    assert len(x) == 1 and (x - means).norm(dim=-1).min() < 2 * covariance.trace().sqrt()


def test_evidence_counts_for_more_the_larger_zeta_of_dps_is():
    """Its weight is no posterior's but what zeta makes of it."""
    low, high = (float((run("dps", {"zeta": z}, "evidence")[0][:, 1] > 0).double().mean()) for z in (0.01, 0.4))
    assert 0.45 < low < 0.55 and 0.6 < row("dps", "evidence")[1] < 0.7 and high > 0.75


def test_the_covariance_of_the_denoiser_comes_nearer_to_the_posterior_than_that_of_pigdm():
    if "mm" not in SOLVERS:
        pytest.skip("no solver mm in the table")
    (_, matched, truth), (_, assumed, _) = row("mm", "evidence"), row("pigdm", "evidence")
    assert abs(matched - truth) < 0.05 + 4 * 0.013 and abs(matched - truth) < abs(assumed - truth)


def test_the_mixture_denoises_and_has_the_posterior_of_bayes_rule():
    """Against sums over a grid."""
    prior, y = CASES["evidence"]
    axis = torch.linspace(-1.5, 1.5, 601).double()
    grid = torch.cartesian_prod(axis, axis)
    modes = torch.distributions.MultivariateNormal(prior.means, prior.covariance)
    density = (prior.weights * modes.log_prob(grid[:, None]).exp()).sum(-1)
    x, sigma = torch.tensor([0.07, -0.2]).double(), 0.4
    seen = density * torch.exp(-0.5 * (grid - x).square().sum(-1) / sigma**2)
    want = (seen[:, None] * grid).sum(0) / seen.sum()
    assert torch.allclose(prior.denoise(x.reshape(1, 1, 2), sigma).flatten(), want, atol=1e-6)
    seen = density * torch.exp(-0.5 * (grid[:, 0] - y) ** 2 / NOISE**2)
    weights, means, _ = prior.posterior(y)
    assert float(seen[grid[:, 1] > 0].sum() / seen.sum()) == pytest.approx(float(weights[0]), abs=1e-6)
    assert torch.allclose((seen[:, None] * grid).sum(0) / seen.sum(), weights @ means, atol=1e-6)
    assert float(weights[0]) == pytest.approx(0.8)
