"""Single steps of the samplers against the published formulas, and whole runs against diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from sampler_cases import F64, NONE, S, T, U, X, mixture, tensor, walk

from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.samplers import make_sampler
from invdiff.samplers.adams import tab_weights
from invdiff.schedule import linear_betas, table_sigmas, vp_sigma, vp_time
from invdiff.solvers.base import State
from invdiff.solvers.dps import DPS
from invdiff.solvers.unconditional import Nothing


@pytest.fixture
def gaussian():
    g = torch.Generator().manual_seed(1)
    root = torch.randn(4, 4, generator=g, dtype=F64) / 3
    return GaussianPrior(tensor(0.2, -0.4, 0.7, 0.0)[0, 0], root @ root.T + 0.01 * torch.eye(4, dtype=F64))


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
    step = lambda **options: make_sampler("euler", **options).step(X, mixture, S, T, {}, NONE)[0]  # noqa: E731
    assert torch.equal(step(churn=9.0, churn_min=2 * S), step()) and not torch.equal(step(churn=9.0), step())
    assert torch.equal(step(churn=9.0), step(churn=math.sqrt(2) - 1))  # the most that the paper adds


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


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_equal_to_diffusers(monkeypatch, variance):
    """With its draws taken from ours."""
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    taken = iter(range(1, 21))
    monkeypatch.setattr(ddpm, "randn_tensor", lambda *_, **__: NONE.normal(next(taken), X))
    options = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "variance_type": f"fixed_{variance}"}
    start = X * 20
    sigmas, xs, end = diffusers_run(ddpm.DDPMScheduler(**options), 20, start.clone())
    x, memory, sampler = start / vp(sigmas[0])[0], {}, make_sampler("ddpm", variance=variance)
    for k, (sigma, sigma_next) in enumerate(pairwise([*sigmas, 0.0])):
        assert torch.allclose(x, xs[k], rtol=2e-4, atol=2e-4), k
        x, memory = sampler.step(x, mixture, sigma, sigma_next, memory, NONE)
    assert torch.allclose(x, end, atol=2e-4)


def test_plms_is_equal_to_diffusers():
    """Which asks for the second level twice, for the first step, as ours does within it."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    options = {"beta_start": 1e-4, "beta_end": 0.02, "skip_prk_steps": True, "set_alpha_to_one": True}
    start = X * 20
    sigmas, _, end = diffusers_run(schedulers.PNDMScheduler(**options), 20, start.clone())
    assert len(sigmas) == 21 and sigmas[1] == sigmas[2]
    levels = [*dict.fromkeys(sigmas), 0.0]
    assert torch.allclose(walk(make_sampler("plms"), start / vp(sigmas[0])[0], mixture, levels)[0], end, atol=2e-4)


def test_deis_of_diffusers_is_linear_in_log_sigma_and_not_in_time():
    """Zhang and Chen name both; tAB, which is ours, takes the time. Checked on one step in the middle of a run."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    other = schedulers.DEISMultistepScheduler(beta_start=1e-4, beta_end=0.02, solver_order=2)
    sigmas, xs, _ = diffusers_run(other, 8, X)
    before, sigma, after = sigmas[5:8]
    first, second, third = xs[5:8]
    s = torch.linspace(sigma, after, 20001, dtype=F64)

    def weights(node):
        share = (node(s) - node(before)) / (node(sigma) - node(before))
        return [float(torch.trapezoid(v, s)) for v in (share, 1 - share)]

    noises = [(x - mixture(x, level)) / level for x, level in ((second, sigma), (first, before))]
    step = {
        name: second + sum(c * eps for c, eps in zip(weights(node), noises, strict=True))
        for name, node in {
            "log sigma": lambda v: torch.as_tensor(v, dtype=F64).log(),
            "time": lambda v: torch.tensor([vp_time(float(u)) for u in torch.as_tensor(v).flatten()], dtype=F64),
        }.items()
    }
    ours = make_sampler("deis-tab1")
    memory = ours.step(first, mixture, before, sigma, {}, NONE)[1]
    x = ours.step(second, mixture, sigma, after, memory, NONE)[0]
    assert torch.allclose(third, step["log sigma"], atol=1e-4)
    assert torch.allclose(x, step["time"], atol=1e-4)
    assert ((x - third).abs() > 1e-3).all()


@pytest.mark.parametrize(("name", "kind"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_equal_to_diffusers_in_sigma(name, kind):
    """The steps of Karras et al. 2022; those of diffusers run in x itself, with the noise that the network predicts."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    other = getattr(schedulers, kind)(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    other.set_timesteps(12)
    levels = [s for k, s in enumerate(other.sigmas.tolist()) if k == 0 or s != other.sigmas[k - 1]]
    start = X * levels[0]
    x = start.clone()
    for t in other.timesteps:
        other.scale_model_input(x, t)
        sigma = float(other.sigmas[other.step_index])
        x = other.step((x - mixture(x, sigma)) / sigma, t, x).prev_sample.to(X)
    assert len(levels) == 13 and levels[-1] == 0
    assert torch.allclose(walk(make_sampler(name), start, mixture, levels)[0], x, rtol=1e-5, atol=1e-5)
