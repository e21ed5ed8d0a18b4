"""Options of RED-diff and DiffusionMBIR against the published formulas, in numpy with dense matrices."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from solver_cases import PUBLISHED, SIDE, SLICES, Case, Dense, Local, Stacked, law, law_of, vp
from torch.multiprocessing.reductions import StorageWeakRef

from invdiff.configure import tuned
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.operators import build
from invdiff.problem import whiten
from invdiff.schedule import log_snr
from invdiff.solvers import make_solver
from invdiff.solvers.base import State, iterate, solve
from invdiff.solvers.reddiff import OPTIMIZERS, Optimizer

RNG = Draws(3, tuple(range(SLICES)))


@pytest.mark.parametrize("name", ["dps", "pigdm"])
def test_an_operator_of_the_whole_stack_holds_the_activations_of_one_chunk(name):
    alive, most = [], [0]

    class Watched(Local):
        def denoise(self, x, sigma, context=None):
            most[0] = max(most[0], sum(not ref.expired() for ref in alive))
            activation = torch.exp(-x * x)  # saved for the gradient
            alive.append(StorageWeakRef(activation.untyped_storage()))
            return x * activation / (1 + sigma)

    case = Case("mask", 0.1)
    matrix = torch.from_numpy(np.kron(np.eye(2), case.a) + 0.1)
    stacked = whiten(torch.from_numpy(case.y.ravel()), Stacked(matrix), 0.1**2)
    sigmas, results = [2.0, 1.0, 0.0], []
    for chunk in (1, SLICES):
        alive.clear()
        results.append(solve(make_solver(name), stacked, Watched(chunk), sigmas=sigmas))
        assert len(alive) == (2 if chunk == SLICES else 4 * SLICES)  # one more evaluation for the gradient
    assert most[0] == 0
    assert torch.allclose(*results, atol=1e-9)


def levels_by_hand(times, sigmas, k, batch):
    """Noise levels of step k, from 0."""
    if times == "random":
        z = Draws(RNG.seed, (0,), (0,)).normal(-k - 1, torch.zeros(1, 1, 1, 1, batch, dtype=torch.float64)).flatten()
        return [sigmas[:-1][int(0.5 * (1 + math.erf(v / math.sqrt(2))) * (len(sigmas) - 1))] for v in z.tolist()]
    start, stop = math.log(sigmas[k]), math.log(sigmas[k + 1] or sigmas[k])
    return [math.exp(start + j * (stop - start) / batch) for j in range(batch)]


def torch_optimizer(name, mu, lr, curvature):
    """torch's own, with a step in units of the curvature where it has the unit of one."""
    plain = {"sgd": {}, "momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}}
    if name in plain:
        return torch.optim.SGD([mu], lr=lr / curvature, **plain[name])
    if name == "rmsprop":
        return torch.optim.RMSprop([mu], lr=lr, alpha=0.99, eps=1e-8)
    return torch.optim.Adagrad([mu], lr=lr, eps=1e-8) if name == "adagrad" else torch.optim.Adam([mu], lr, (0.9, 0.99))


VARIANTS = [(name, "descending", 1) for name in OPTIMIZERS if name != "adam"]
VARIANTS += [("adam", "random", 1), ("adam", "descending", 3), ("momentum", "random", 4)]


@pytest.mark.parametrize("scaling", ["rows", "norm"])
@pytest.mark.parametrize("optimizer, times, batch", VARIANTS)
def test_red_diff_is_the_optimizer_on_the_published_loss(optimizer, times, batch, scaling):
    """Autograd and torch.optim on the loss in VP variables, for a forward map of rows or norm 1 as published."""
    case, lr = Case("average", 0.05), 0.3
    case.a = np.diag([1.0, 0.5, 2.0, 1.0]) @ case.a  # rows differ
    case.a = case.a / (np.linalg.norm(case.a, 2) if scaling == "norm" else np.linalg.norm(case.a) / len(case.a) ** 0.5)
    problem = whiten(torch.from_numpy(case.y), Dense(case.a), 0.05**2)
    options = {"optimizer": optimizer, "times": times, "batch": batch, "lr": lr, "scaling": scaling, "lam": 0.7}
    solver = make_solver("reddiff", **options)
    *_, final = iterate(solver, problem, case.prior, PUBLISHED, RNG)
    start = solver.init(problem, case.prior, PUBLISHED, RNG).x
    mu, a = start.clone().requires_grad_(), torch.from_numpy(case.a)
    rule = torch_optimizer(optimizer, mu, lr, np.linalg.norm(case.a, 2) ** 2 / len(case.a))
    for k in range(len(PUBLISHED) - 1):
        residual = torch.from_numpy(case.y) - mu.flatten(-3) @ a.T
        loss = 0.5 * residual.square().mean(-1)
        for j, sigma in enumerate(levels_by_hand(times, PUBLISHED, k, batch)):
            at, eps = vp(sigma), RNG.normal(k * batch + j + 1, start)
            xt = (math.sqrt(at) * mu + math.sqrt(1 - at) * eps).detach()
            predicted = (xt - math.sqrt(at) * case.prior.denoise(xt / math.sqrt(at), sigma)) / math.sqrt(1 - at)
            loss = loss + 0.7 * sigma * ((predicted - eps) * mu).flatten(-3).mean(-1) / batch
        rule.zero_grad()
        loss.sum().backward()
        rule.step()
    assert (start - mu).abs().max() > 0.01
    assert torch.allclose(final.x0, mu.detach(), atol=1e-6)


def test_red_diff_takes_any_optimizer_with_a_row(monkeypatch):
    """Signs of the gradient: every pixel moves by lr in every step."""
    signs = Optimizer(lambda g, moments, k, beta1, beta2: (g.sign(), moments), (), adaptive=True)
    monkeypatch.setitem(OPTIMIZERS, "signs", signs)
    case, solver = Case("average", 0.05), make_solver("reddiff", optimizer="signs", lr=0.125)
    states = [s.x for s in iterate(solver, case.problem, case.prior, log_snr(5, 2.0, 0.1), RNG)]
    assert all(torch.allclose((b - a).abs(), torch.full_like(a, 0.125)) for a, b in pairwise(states))


def test_random_levels_have_equal_chances_and_are_shared_by_slices_and_samples():
    case, sigmas = Case("mask", 0.1), log_snr(8, 20.0, 0.01)
    solver = make_solver("reddiff", times="random", batch=5)
    seen = []
    for steps, rng in ((160, RNG), (20, Draws(3, (7, 9), (4, 5)))):
        prior = Local()
        state = solver.init(case.problem, prior, sigmas, rng)
        for _ in range(steps):
            state = solver.step(case.problem, prior, state, 1.0, 0.5, rng)
        seen.append(prior.seen)
    assert seen[0][:100] == seen[1] and len(seen[0]) == 800
    counts = [seen[0].count(sigma) for sigma in sigmas[:-1]]
    assert sum(counts) == 800 and all(abs(c - 100) < 4 * math.sqrt(100 * 7 / 8) for c in counts)


def denoised(case, y, s, sigma, after, k, *, eta):
    """D(x), the image nearest to it that fits the data (CG from it, to the end), and DDIM's noise in VP variables."""
    at, as_ = vp(sigma), vp(after)
    x = math.sqrt(at) * s.x
    x0 = case.denoise(x / math.sqrt(at), sigma, s.one)
    eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
    fitted = x0 + np.linalg.pinv(case.a, rcond=1e-9) @ (np.outer(y, s.one) - case.a @ x0)
    c1 = eta * math.sqrt(max(0.0, (1 - at / as_) * (1 - as_) / (1 - at)))
    c2 = math.sqrt(max(0.0, 1 - as_ - c1**2))
    return (math.sqrt(as_) * fitted + c1 * s.z[0] + c2 * eps) / math.sqrt(as_)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("operator", ["mask", "blur", "average", "ct", "fft"])
def test_mbir_on_the_denoised_image_has_the_mean_and_covariance_of_its_chain(operator, eta):
    case = Case(operator, 0.1)
    solver = make_solver("mbir", on="denoised", eta=eta, rho=0.0, cg_iterations=60)
    mean, covariance = law_of(solver, case, PUBLISHED, len(PUBLISHED))
    for s in range(SLICES):
        want, spread = law(case, case.y[s], denoised, PUBLISHED, 1, eta=eta)
        assert np.abs(mean[s] - want).max() < 1e-6 * np.abs(want).max()
        assert np.abs(covariance[s] - spread).max() < 1e-6 * max(np.abs(spread).max(), 1e-6)


def noisy(case, y, s, sigma, after, k):
    """The reverse diffusion predictor, and of what it gives the image nearest to it that fits the data."""
    gap = sigma**2 - after**2
    x = s.x + gap * (case.denoise(s.x, sigma, s.one) - s.x) / sigma**2 + (math.sqrt(gap) * s.z[0] if after else 0.0)
    return x + np.linalg.pinv(case.a, rcond=1e-9) @ (np.outer(y, s.one) - case.a @ x)


@pytest.mark.parametrize("operator", ["mask", "blur", "average", "ct", "fft"])
def test_mbir_without_corrector_has_the_mean_and_covariance_of_its_chain(operator):
    case = Case(operator, 0.1)
    solver = make_solver("mbir", snr=0.0, rho=0.0, cg_iterations=60)
    mean, covariance = law_of(solver, case, PUBLISHED, 2 * len(PUBLISHED))
    for s in range(SLICES):
        want, spread = law(case, case.y[s], noisy, PUBLISHED, 2)
        assert np.abs(mean[s] - want).max() < 1e-6 * np.abs(want).max()
        assert np.abs(covariance[s] - spread).max() < 1e-6 * max(np.abs(spread).max(), 1e-6)


@pytest.mark.parametrize("rho", [0.026, 0.0])
@pytest.mark.parametrize("name", ["blur", "fft"])
def test_mbir_on_the_denoised_image_is_admm_between_two_levels(name, rho):
    """One CG iteration and the soft threshold on the stack by hand, DDIM's noise of eta = 0.6."""
    case, lam, eta = Case(name, 0.1), 2e-3, 0.6
    *_, final = iterate(
        make_solver("mbir", on="denoised", rho=rho, lam=lam, eta=eta), case.problem, case.prior, PUBLISHED, RNG
    )
    shape = (1, SLICES, *case.prior.mean.shape)
    draw = lambda k: RNG.normal(k, torch.zeros(shape, dtype=torch.float64)).reshape(SLICES, case.n).numpy()  # noqa: E731
    a, d = case.a / case.noise, np.array([[-1.0, 1.0], [0.0, 0.0]])
    largest = np.linalg.norm(a, 2) ** 2
    x, split, dual = PUBLISHED[0] * draw(0), np.zeros((SLICES, case.n)), np.zeros((SLICES, case.n))
    for k, (sigma, after) in enumerate(pairwise(PUBLISHED)):
        x0 = np.stack([case.denoise(v, sigma, 1.0) for v in x[..., None]])[..., 0]
        normal = lambda v: v @ a.T @ a + rho * largest * d.T @ d @ v  # noqa: E731
        r = case.y / case.noise @ a + rho * largest * d.T @ (split - dual) - normal(x0)
        alone = np.eye(SLICES) if rho == 0 else np.ones((SLICES, SLICES))  # one inner product for the coupled stack
        better = x0 + ((alone @ (r * r).sum(1)) / (alone @ (r * normal(r)).sum(1)))[:, None] * r
        if rho:
            v = d @ better + dual
            split = np.sign(v) * np.maximum(np.abs(v) - lam / rho, 0)
            dual = v - split
        fresh = eta * after * math.sqrt(sigma**2 - after**2) / sigma
        x = better + math.sqrt(after**2 - fresh**2) * (x - x0) / sigma + fresh * draw(k + 1)
    assert np.abs(final.x0.reshape(SLICES, case.n).numpy() - x).max() < 1e-6 * np.abs(x).max()


def test_mbir_takes_the_largest_norm_of_the_slices_for_the_stack():
    case = Case("average", 0.1)
    root = torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(2, len(case.a))
    problem = whiten(torch.from_numpy(case.y), Dense(case.a), root**-2)
    found = make_solver("mbir").init(problem, case.prior, [1.0, 0.0], RNG).memory["norm2"]
    assert float(found) == pytest.approx(9 * np.linalg.norm(case.a, 2) ** 2, rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 5, 50])
def test_mbir_leaves_what_is_not_measured_to_the_prior_in_single_precision(iterations):
    """CG on a singular matrix goes on along rounding errors once it is done; a mask needs one iteration."""
    case = Case("mask", 0.05)
    problem = whiten(torch.from_numpy(case.y).float(), Dense(case.a), 0.05**2)
    solver = make_solver("mbir", on="denoised", rho=0.0, cg_iterations=iterations)
    x = RNG.normal(0, torch.zeros(1, SLICES, 1, SIDE, SIDE))
    memory = solver.init(problem, Local(), [0.5, 0.0], RNG).memory
    got = solver.step(problem, Local(), State(x, x, 0, memory), 0.5, 0.0, RNG).x0.reshape(SLICES, -1)
    unseen = case.a.sum(0) == 0
    assert torch.allclose(got[:, unseen], Local().denoise(x, 0.5).reshape(SLICES, -1)[:, unseen], atol=1e-6)
    assert torch.allclose(got.double() @ torch.from_numpy(case.a).T, torch.from_numpy(case.y), atol=1e-5)


def test_network_calls_are_those_of_a_run():
    case, sigmas = Case("mask", 0.1), log_snr(5, 1.0, 0.1)
    for name, options, calls in (
        ("mbir", {}, 9),  # no corrector at the end
        ("mbir", {"snr": 0.0}, 5),
        ("mbir", {"on": "denoised"}, 5),
        ("reddiff", {"batch": 3}, 15),
        ("daps", {"ode_steps": 3}, 15),
        ("dps", {}, 5),
        ("dps", {"sampler": "heun"}, 9),
    ):
        prior, solver = Local(), make_solver(name, **options)
        solve(solver, case.problem, prior, sigmas=sigmas)
        assert prior.calls == SLICES * calls == SLICES * solver.calls(5)


OPTIONS = [
    ("dps", {}),
    ("dps", {"eta": 0.0}),
    ("dps", {"clip": True, "eta": 0.5}),
    *[("reddiff", {"optimizer": name}) for name in OPTIMIZERS],
    ("reddiff", {"times": "random"}),
    ("reddiff", {"times": "random", "batch": 3, "scaling": "norm"}),
    ("reddiff", {"batch": 2, "optimizer": "momentum"}),
    ("mbir", {"rho": 0.0}),
    ("mbir", {"on": "denoised", "rho": 0.0, "cg_iterations": 5}),
    ("mbir", {"on": "denoised", "rho": 0.0, "eta": 0.0}),
]


@pytest.fixture(scope="module")
def scan():
    """CT of three slices in single precision, weights that differ."""
    operator = build("ct-sparse", (16, 16), (1.0, 1.0), views=8)
    g = torch.Generator().manual_seed(0)
    truth = torch.rand((3, 1, 16, 16), generator=g)
    variance = 0.01 + 0.02 * torch.rand((3, *operator.out_shape), generator=g)
    y = operator(truth)
    return whiten(y + variance.sqrt() * torch.randn(y.shape, generator=g), operator, variance)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_slice_alone_gives_the_bits_that_it_gives_in_the_stack(scan, name, options):
    cold = {} if name == "mbir" else {"warm": False}  # the FFT of the warm start rounds by the number of slices
    sigmas, solver = log_snr(5, 2.0, 0.1), make_solver(name, **options, **cold)
    rng = Draws(0, (4, 7, 8), (0, 1))
    together = solve(solver, scan, Local(2), sigmas=sigmas, rng=rng)
    alone = solve(solver, scan.restrict(slice(1, 2)), Local(2), sigmas=sigmas, rng=rng.restrict(slice(1, 2)))
    single = solve(solver, scan, Local(2), sigmas=sigmas, rng=Draws(0, (4, 7, 8), (1,)))
    assert together.dtype == torch.float32 and together.isfinite().all()
    assert torch.equal(together[:, 1:2], alone) and torch.equal(together[1:], single)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["daps", "reddiff", "dps", "mbir"])
def test_blocks_of_slices_change_nothing_but_rounding(scan, name):
    options = {"daps": {"langevin": 3}, "reddiff": {"scaling": "norm"}, "mbir": {"rho": 0.0}}.get(name, {})
    solver, sigmas = make_solver(name, **options), [1.0, 0.5, 0.0]
    whole, parts = (solve(solver, replace(scan, block=block), Local(2), sigmas=sigmas) for block in (32, 1))
    assert torch.allclose(whole, parts, atol=1e-5) and whole.isfinite().all()


@pytest.mark.parametrize("name", ["pigdm", "mm", "dds", "diffpir"])
def test_a_slice_has_its_own_preconditioner(name):
    """Few iterations for slices of unequal weight, in network calls of two: the same as alone, to rounding."""
    case = Case("ct", 0.1)
    y = torch.from_numpy(np.concatenate([case.y, case.y[:1]]))
    root = 10 ** torch.linspace(0, 2, 3 * len(case.a), dtype=torch.float64).reshape(3, -1)
    problem, rng = whiten(y, Dense(case.a), 0.1 / root), Draws(0, (4, 7, 8))
    solver, sigmas = make_solver(name, warm=False, cg_iterations=2), [2.0, 1.0, 0.0]
    together = solve(solver, problem, Local(2), sigmas=sigmas, rng=rng)
    for k in range(3):
        b = slice(k, k + 1)
        alone = solve(solver, problem.restrict(b), Local(2), sigmas=sigmas, rng=rng.restrict(b))
        assert torch.allclose(together[:, b], alone, atol=1e-9)


@pytest.mark.parametrize("name, options", [*OPTIONS, ("mbir", {}), ("mbir", {"on": "denoised"})])
def test_resuming_from_a_state_gives_the_same_bits(scan, name, options):
    sigmas, solver = log_snr(5, 2.0, 0.1), make_solver(name, **options)
    states = list(iterate(solver, scan, Local(), sigmas))
    kept = {k: v.clone() for k, v in states[1].memory.items()}  # what a file would hold
    saved = State(states[1].x.clone(), states[1].x0.clone(), states[1].step, kept)
    *_, resumed = iterate(solver, scan, Local(), sigmas, state=saved)
    assert torch.equal(states[-1].x0, resumed.x0) and len(states) == 5


@pytest.mark.parametrize("name, options", [o for o in OPTIONS if o[0] != "dps"])
def test_an_operator_of_the_whole_stack_gives_what_its_slices_give(name, options):
    """Block-diagonal over two slices of equal weight; DPS has one norm for the stack and is left out."""
    case, sigmas = Case("mask", 0.1), log_snr(5, 1.0, 0.1)
    stacked = whiten(torch.from_numpy(case.y.ravel()), Stacked(torch.from_numpy(np.kron(np.eye(2), case.a))), 0.1**2)
    exact = {"cg_iterations": 60} if name == "mbir" else {"warm": False}  # CG has one inner product for the stack
    solver = make_solver(name, **options | exact)
    slicewise = solve(solver, case.problem, case.prior, sigmas=sigmas)
    assert torch.allclose(solve(solver, stacked, case.prior, sigmas=sigmas), slicewise, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("dps", {"eta": 1.5}),
        ("dds", {"sigma_data": 0.0}),
        ("reddiff", {"optimizer": "magic"}),
        ("reddiff", {"times": "magic"}),
        ("reddiff", {"batch": 0}),
        ("mbir", {"on": "magic"}),
        ("mbir", {"eta": 1.5}),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options):
    ((key, value),) = options.items()
    with pytest.raises(UsageError, match=str(value) if isinstance(value, str) else key):
        make_solver(name, **options)


def test_large_pixels_start_the_annealing_of_pnp_higher():
    for factor, axis, expected in ((2, "inplane", ({}, None)), (3, "inplane", ({"sigma_max": 1.0}, 40))):
        assert tuned({"name": "sr", "factor": factor, "axis": axis}, "pnp") == expected
    through = {"name": "sr", "factor": 4, "axis": "through-plane"}
    assert tuned(through, "pnp") == ({"lam": 0.5, "start_blur": 0.0}, None)
