"""Solvers against exact answers: a Gaussian prior whose posterior is known, dense matrices, hand-computed steps."""

import math
from dataclasses import replace

import pytest
import torch

from invdiff.coupling import QuadraticZ, TVz, difference, difference_adjoint
from invdiff.data_step import data_step, point_spectrum
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.operator import LinearOperator
from invdiff.priors.base import Prior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import Problem, whiten
from invdiff.schedule import log_snr
from invdiff.solvers import make_solver
from invdiff.solvers.base import State, iterate, solve
from invdiff.solvers.dds import DDS
from invdiff.solvers.dps import DPS
from invdiff.solvers.pnp import PnP

SIDE = 6
N = SIDE * SIDE


class Dense(LinearOperator):
    """A dense matrix acting on each slice."""

    def __init__(self, matrix):
        self.matrix, self.in_shape, self.out_shape = matrix, (1, SIDE, SIDE), (len(matrix),)

    def forward(self, x):
        return x.reshape(*x.shape[:-3], N) @ self.matrix.T.to(x.dtype)

    def _probe(self):
        return super()._probe().double()


@pytest.fixture
def setup():
    g = torch.Generator().manual_seed(3)
    rows, cols = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    p = torch.stack([rows.flatten(), cols.flatten()], 1).double()
    distance = torch.cdist(p, p)
    covariance = 0.16 * torch.exp(-0.5 * (distance / 2) ** 2) + 1e-3 * torch.eye(N, dtype=torch.float64)
    mean = torch.linspace(-0.5, 0.5, N, dtype=torch.float64).reshape(1, SIDE, SIDE)
    prior = GaussianPrior(mean, covariance)
    matrix = torch.randn(14, N, generator=g, dtype=torch.float64) / 2
    truth = mean + (torch.linalg.cholesky(covariance) @ torch.randn(3, N, 1, generator=g, dtype=torch.float64)).reshape(
        3, 1, SIDE, SIDE
    )
    noise_std = 0.1
    y = Dense(matrix)(truth) + noise_std * torch.randn(3, 14, generator=g, dtype=torch.float64)
    return prior, matrix / noise_std, whiten(y, Dense(matrix), noise_std**2), y


def posterior_means(prior, matrix, problem):
    return torch.stack([prior.posterior(matrix, y)[0] for y in problem.y])


def test_whitening_divides_rows_and_data_by_the_noise(setup):
    _, matrix, problem, y = setup
    x = torch.randn(3, 1, SIDE, SIDE, dtype=torch.float64)
    assert torch.allclose(problem.operator(x), x.reshape(3, N) @ matrix.T)
    assert torch.allclose(problem.y, y / 0.1)
    v = torch.randn_like(problem.y)
    assert torch.allclose((problem.operator(x) * v).sum(), (x * problem.operator.adjoint(v)).sum())
    wrong = whiten(y, problem.base, 0.04, model_error=0.3)  # of the operator, relative to the data
    assert torch.allclose(wrong.y, y / (0.04 + (0.3 * y) ** 2).sqrt())


def test_whitening_maps_the_image_range_exactly(setup):
    _, _, problem, y = setup
    mapped = whiten(y, problem.base, 0.01, scale=2.0, shift=0.3)
    u = torch.randn(3, 1, SIDE, SIDE, dtype=torch.float64)
    assert torch.allclose(mapped.operator(u) - mapped.y, (problem.base(2 * u + 0.3) - y) / 0.1)


def test_chi_squared_is_one_for_the_truth_of_many_data():
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(4000, N, generator=g, dtype=torch.float64)
    x = torch.randn(2, 1, SIDE, SIDE, generator=g, dtype=torch.float64)
    y = Dense(matrix)(x) + 0.2 * torch.randn(2, 4000, generator=g, dtype=torch.float64)
    problem = whiten(y, Dense(matrix), 0.04)
    assert problem.chi_squared(x[None]) == pytest.approx(1, abs=0.06)
    both = torch.stack([x, x + 0.1])  # samples: their mean
    assert problem.chi_squared(both) == pytest.approx(sum(problem.chi_squared(one[None]) for one in both) / 2)


@pytest.mark.parametrize("spectrum", [False, True])
def test_data_step_solves_the_normal_equations_slice_by_slice(setup, spectrum):
    _, matrix, problem, _ = setup
    z = torch.randn(1, 3, 1, SIDE, SIDE, dtype=torch.float64)
    pre = point_spectrum(problem) if spectrum else None
    x, _ = data_step(problem, z, 2.5, z, iterations=200, tolerance=1e-13, spectrum=pre)
    system = matrix.T @ matrix + 2.5 * torch.eye(N, dtype=torch.float64)
    want = torch.linalg.solve(system, (problem.y @ matrix + 2.5 * z.reshape(3, N)).T).T
    assert torch.allclose(x.reshape(3, N), want, atol=1e-9)


def test_point_spectrum_is_the_spectrum_of_a_convolution():
    shifts = [(i, j) for i in range(SIDE) for j in range(SIDE)]
    kernel = torch.rand(SIDE, SIDE, dtype=torch.float64)
    matrix = torch.stack([kernel.roll(s, (0, 1)).flatten() for s in shifts])
    problem = whiten(torch.zeros(1, N, dtype=torch.float64), Dense(matrix), 1.0)
    want = torch.fft.rfft2(kernel).abs().square()
    assert torch.allclose(point_spectrum(problem)[0, 0, 0], want)


def test_pnp_at_one_sigma_reaches_the_fixed_point_of_half_quadratic_splitting(setup):
    """The fixed point x = data(D(x)) of a Gaussian prior, computed densely; it is not the posterior mean."""
    prior, matrix, problem, _ = setup
    sigma = 0.2
    solver = PnP(
        lam=1.0, sigma_max=sigma, sigma_min=sigma, cg_iterations=200, cg_tolerance=1e-13, turns=False, cg_error=0.0
    )
    x = solve(solver, problem, prior, sigmas=[sigma] * 400 + [0.0])[0].reshape(3, N)
    eye = torch.eye(N, dtype=torch.float64)
    w = 1 / sigma**2
    gain = prior.covariance @ torch.linalg.inv(prior.covariance + sigma**2 * eye)
    data = torch.linalg.inv(matrix.T @ matrix + w * eye)
    mean = prior.mean.flatten()
    # fixed point of x = data (A'y + w (mean + gain (x - mean)))
    rhs = (data @ (matrix.T @ problem.y.T + w * ((eye - gain) @ mean)[:, None])).T
    want = torch.linalg.solve(eye - w * data @ gain, rhs.T).T
    assert torch.allclose(x, want, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_pnp_is_denoising_and_then_data_at_the_same_level(setup, momentum):
    """Equations 6 and 7 densely along three levels, the denoiser ahead of the iterate from the third on."""
    prior, matrix, problem, _ = setup
    exact = {"cg_iterations": 200, "cg_tolerance": 1e-13, "cg_reduction": 0.0, "cg_error": 0.0}
    solver = PnP(lam=0.4, momentum=momentum, turns=False, **exact)
    x, before = solver.init(problem, prior, [0.5], None).x[0], None
    for sigma in (0.5, 0.2, 0.1):
        ahead = x if before is None else x + momentum * (x - before)
        z, w = prior.denoise(ahead, sigma).reshape(3, N), 0.4 / sigma**2
        system = matrix.T @ matrix + w * torch.eye(N, dtype=torch.float64)
        before = x if sigma < 0.5 else None
        x = torch.linalg.solve(system, (problem.y @ matrix + w * z).T).T.reshape(3, 1, SIDE, SIDE)
    assert torch.allclose(solve(solver, problem, prior, sigmas=[0.5, 0.2, 0.1, 0.0])[0], x, atol=1e-8)


def test_pnp_starts_its_data_steps_from_what_the_last_one_fitted(setup, monkeypatch):
    prior, _, problem, _ = setup
    seen = []
    monkeypatch.setattr(
        "invdiff.solvers.pnp.data_step", lambda problem, z, weight, start, **options: seen.append((z, start)) or (z, {})
    )
    solver, x = PnP(turns=False, coupling=None), torch.randn(1, 3, 1, SIDE, SIDE, dtype=torch.float64)
    state = solver.step(problem, prior, State(x, x, 0, {"spectrum": x}), 0.5, 0.2, None)
    z = seen[0][0]
    moved = replace(state, x=state.x + 0.1 * x, memory=state.memory | {"spectrum": x})
    solver.step(problem, prior, moved, 0.2, 0.1, None)
    assert torch.equal(seen[0][1], z) and torch.allclose(seen[1][1], moved.x + seen[1][0] - z, atol=1e-12)


def test_pnp_first_sees_slices_as_they_are_and_in_eight_steps_all_ways_round(setup):
    prior, _, problem, _ = setup
    seen = []
    prior.denoise_turned = lambda x, sigma, turn: seen.append(turn % 8) or x
    for turns in (True, False):
        solve(PnP(turns=turns), problem, prior, sigmas=log_snr(8, 0.3, 0.1))
    assert seen[0] == 0 and sorted(seen) == list(range(8))


def test_pnp_with_annealing_comes_near_the_posterior_mean(setup):
    prior, matrix, problem, _ = setup
    want = posterior_means(prior, matrix, problem)
    x = solve(PnP(lam=1.0, sigma_max=2.0, sigma_min=0.02, cg_iterations=100, turns=False), problem, prior,
              sigmas=log_snr(400, 2.0, 0.02))[0]  # fmt: skip
    start = solve(PnP(turns=False), problem, prior, sigmas=[0.3, 0.0])[0]
    assert (x - want).norm() < 0.15 * want.norm()
    assert (x - want).norm() < 0.5 * (start - want).norm()


def test_dds_with_many_steps_comes_near_the_posterior_mean(setup):
    prior, matrix, problem, _ = setup
    want = posterior_means(prior, matrix, problem)
    options = {"eta": 1.0, "gamma": 1.0, "cg_iterations": 60, "cg_error": 0.0}
    solver = DDS(**options, sigma_max=10.0, sigma_min=0.01, sigma_data=0.4, warm=False)
    draws = Draws(0, (0, 1, 2), tuple(range(64)))
    mean = solve(solver, problem, prior, sigmas=log_snr(100, 10.0, 0.01), rng=draws).mean(0)
    assert (mean - want).norm() < 0.25 * want.norm()


def test_dps_step_is_the_published_one_in_vp_variables(setup):
    """One step computed by hand in the variables of the paper: x_VP = x / sqrt(1 + sigma^2)."""
    prior, matrix, problem, _ = setup
    s, t = 1.3, 0.9
    a_t, a_s = 1 / (1 + s**2), 1 / (1 + t**2)
    g = torch.Generator().manual_seed(5)
    x_vp = torch.randn(1, 3, 1, SIDE, SIDE, generator=g, dtype=torch.float64)
    rng = Draws(11, (0, 1, 2))
    z = rng.normal(1, x_vp)
    leaf = x_vp.clone().requires_grad_()
    x0 = prior.denoise(leaf / math.sqrt(a_t), s)
    residual = (problem.y - problem.operator(x0)).reshape(3, -1).norm(dim=1)
    (grad,) = torch.autograd.grad(residual.sum(), leaf)
    beta = 1 - a_t / a_s
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x0.detach() + math.sqrt(1 - beta) * (1 - a_s) / (1 - a_t) * x_vp
    std = math.sqrt(beta * (1 - a_s) / (1 - a_t))
    norms = torch.stack([torch.linalg.matrix_norm(matrix, 2)] * 3).view(3, 1, 1, 1)
    want = mean + std * z - 0.7 / norms * grad
    start = DPS(zeta=0.7).init(problem, prior, [s], rng)
    assert torch.allclose(start.memory["norm"], norms, rtol=1e-2)
    start = State(x_vp / math.sqrt(a_t), x_vp, 0, {"norm": norms})
    state = DPS(zeta=0.7).step(problem, prior, start, s, t, rng)
    assert torch.allclose(state.x * math.sqrt(a_s), want, atol=1e-10)


def test_dds_step_is_the_published_one_in_vp_variables(setup):
    prior, matrix, problem, _ = setup
    s, t, eta = 1.3, 0.9, 0.4
    a_t, a_s = 1 / (1 + s**2), 1 / (1 + t**2)
    x_vp = torch.randn(1, 3, 1, SIDE, SIDE, dtype=torch.float64)
    rng = Draws(11, (0, 1, 2))
    solver = DDS(eta=eta, gamma=1.0, cg_iterations=200, cg_error=0.0, sigma_data=0.5)
    x0 = prior.denoise(x_vp / math.sqrt(a_t), s)
    eps = (x_vp - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
    w = (s**2 + 0.25) / (s * 0.5) ** 2
    system = matrix.T @ matrix + w * torch.eye(N, dtype=torch.float64)
    corrected = torch.linalg.solve(system, (problem.y @ matrix + w * x0[0].reshape(3, N)).T).T.reshape(x0.shape)
    noise = eta * rng.normal(1, x0) + math.sqrt(1 - eta**2) * eps
    want = math.sqrt(a_s) * corrected + math.sqrt(1 - a_s) * noise
    start = State(x_vp / math.sqrt(a_t), x_vp, 0, {"spectrum": point_spectrum(problem)})
    assert torch.allclose(solver.step(problem, prior, start, s, t, rng).x * math.sqrt(a_s), want, atol=1e-8)


@pytest.mark.parametrize("name", ["pnp", "dds", "dps"])
def test_a_slice_alone_gives_what_it_gives_in_the_stack(setup, name):
    """Catches norms over the batch and inner products that couple slices."""
    prior, _, problem, _ = setup
    converged = {"pnp": {"cg_iterations": 200, "cg_tolerance": 1e-12}, "dds": {"cg_iterations": 200, "cg_error": 0.0}}
    solver = make_solver(name, **converged.get(name, {}))  # rounding stays small
    sigmas = log_snr(6, 1.0, 0.1)
    together = solve(solver, problem, prior, sigmas=sigmas)
    alone = solve(solver, problem.restrict(slice(1, 2)), prior, sigmas=sigmas, rng=Draws(0, (1,)))
    assert torch.allclose(together[:, 1:2], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["pnp", "dds", "dps"])
def test_resuming_from_a_state_gives_the_same_bits(setup, name):
    prior, _, problem, _ = setup
    solver, sigmas = make_solver(name), log_snr(6, 1.0, 0.1)
    states = list(iterate(solver, problem, prior, sigmas))
    resumed = list(iterate(solver, problem, prior, sigmas, state=states[2]))
    assert torch.equal(states[-1].x0, resumed[-1].x0)


@pytest.mark.parametrize("name", ["pnp", "dds"])
def test_slice_coupling_draws_neighbours_together(setup, name):
    prior, _, problem, _ = setup
    sigmas = log_snr(8, 1.0, 0.1)
    plain = solve(make_solver(name), problem, prior, sigmas=sigmas)
    coupled = solve(make_solver(name, coupling=TVz(weight=5.0)), problem, prior, sigmas=sigmas)
    assert difference(coupled).abs().sum() < 0.8 * difference(plain).abs().sum()


def test_coupled_data_step_converges_to_the_tv_z_solution(setup):
    """Many ADMM iterations against the optimality conditions of 1/2|Au-y|^2 + w/2|u-z|^2 + c|Dz u|_1."""
    _, _, problem, _ = setup
    z = torch.randn(1, 3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    c, w = 3.0, 2.0
    memory, x = None, z
    for _ in range(250):
        x, memory = data_step(
            problem, z, w, x, iterations=40, tolerance=1e-12, coupling=TVz(c / w**0.5, 3.0), memory=memory
        )
    subgradient = memory["tvz_dual"]
    force = problem.operator.adjoint(problem.operator(x) - problem.y) + w * (x - z) + difference_adjoint(subgradient)
    assert force.abs().max() < 1e-6
    assert subgradient.abs().max() < c + 1e-9
    jumps = difference(x).abs() > 1e-6
    assert jumps.any() and torch.allclose(subgradient[jumps], c * difference(x)[jumps].sign(), atol=1e-6)


def test_quadratic_coupling_is_part_of_the_data_step(setup):
    """Optimality of 1/2|Au-y|^2 + w/2|u-z|^2 + c/2 |Dz u|^2; half as strong a bond where slices lie twice as far."""
    _, _, problem, _ = setup
    far = replace(problem, spacing=(2.0, 1.0, 1.0))
    z = torch.randn(1, 3, 1, SIDE, SIDE, dtype=torch.float64)
    for part, c in ((problem, 6.0), (far, 1.5)):
        coupling = QuadraticZ(3.0)
        x, memory = data_step(part, z, 2.0, z, iterations=200, tolerance=1e-13, coupling=coupling)
        force = part.operator.adjoint(part.operator(x) - part.y) + 2.0 * (x - z)
        assert (force + c * difference_adjoint(difference(x))).abs().max() < 1e-7 and not memory


def test_difference_and_its_adjoint():
    u, v = torch.randn(2, 5, 1, 3, 4, dtype=torch.float64), torch.randn(2, 5, 1, 3, 4, dtype=torch.float64)
    assert torch.allclose((difference(u) * v).sum(), (u * difference_adjoint(v)).sum())
    assert torch.equal(difference(u)[:, -1], torch.zeros(2, 1, 3, 4, dtype=torch.float64))  # Neumann, not circular


def test_draws_depend_on_seed_sample_slice_and_step_alone():
    like = torch.zeros(2, 3, 1, 4, 4)
    whole = Draws(5, (7, 8, 9), (0, 1)).normal(2, like)
    assert torch.equal(Draws(5, (8,), (1,)).normal(2, like[:1, :1])[0, 0], whole[1, 1])
    others = [Draws(6, (7, 8, 9), (0, 1)), Draws(5, (8, 7, 9), (0, 1)), Draws(5, (7, 8, 9), (1, 0))]
    assert not any(torch.equal(d.normal(2, like), whole) for d in others)
    assert not torch.equal(Draws(5, (7, 8, 9), (0, 1)).normal(3, like), whole)
    shared = Draws(5, (7, 8), shared=True).normal(0, like[:1, :2])
    assert torch.equal(shared[0, 0], shared[0, 1])


def test_gaussian_prior_denoises_by_bayes_rule(setup):
    prior, _, _, _ = setup
    x, sigma = torch.randn(1, SIDE, SIDE, dtype=torch.float64), 0.7
    want, _ = prior.posterior(torch.eye(N, dtype=torch.float64) / sigma, x.flatten() / sigma)
    assert torch.allclose(prior.denoise(x, sigma), want)
    assert torch.allclose(prior.denoise(x, 1e-6), x, atol=1e-6)


def test_turns_are_undone_for_every_one_of_eight():
    class Identity(Prior):
        def denoise(self, x, sigma):
            return x * torch.arange(x.shape[-1])  # singles out columns: turns must show

    x = torch.randn(1, 2, 1, 5, 7)
    results = [Identity().denoise_turned(x, 0.1, k) for k in range(8)]
    columns, rows = torch.arange(7.0), torch.arange(5.0)[:, None]
    want = [x * columns, x * columns.flip(0), x * columns, x * columns.flip(0)]
    want += [x * rows, x * rows, x * rows.flip(0), x * rows.flip(0)]
    for k, (got, expected) in enumerate(zip(results, want, strict=True)):
        if k < 4:
            assert torch.equal(got, expected), k
        else:
            assert any(torch.equal(got, w) for w in want[4:]), k


def test_unknown_names_list_the_choices():
    with pytest.raises(
        UsageError, match=r"choose one of bicubic, biharmonic, cgls, .*dds, .*pnp, reddiff, sense-cg, sirt, tv"
    ):
        make_solver("magic")
    with pytest.raises(UsageError, match=r"no option 'zeta': its options are .*lam"):
        make_solver("pnp", zeta=1)
    with pytest.raises(UsageError, match=r"unknown solver 'reddif': .*\(did you mean 'reddiff'\?\)"):
        make_solver("reddif")
    with pytest.raises(UsageError, match=r"\(did you mean 'cg_iterations'\?\)"):
        make_solver("pnp", cg_iteration=3)
    with pytest.raises(UsageError, match="takes a float"):
        make_solver("pnp", lam="much")


def test_problem_restrict_keeps_the_weights_of_its_slices(setup):
    _, _, problem, y = setup
    variance = 0.01 * torch.arange(1.0, 4.0, dtype=torch.float64)[:, None].expand(3, 14)
    weighted: Problem = whiten(y, problem.base, variance)
    part = weighted.restrict(slice(2, 3))
    assert torch.allclose(part.y, y[2:] / math.sqrt(0.03))


def test_pnp_leaves_data_alone_that_have_less_noise_than_the_prior_knows(setup):
    prior, _, problem, _ = setup
    prior.info = replace(prior.info, sigma_min=0.01)
    level = problem.operator.mean_square**-0.5
    for polish, polished in ((0.02 / level, True), (0.009 / level, False)):
        plain, more = (solve(PnP(polish=p), problem, prior, sigmas=[0.3, 0.1, 0.0]) for p in (0.0, polish))
        assert torch.equal(plain, more) is not polished


def test_pnp_turns_no_image_of_unequal_sides_under_a_prior_of_one_shape():
    class First(LinearOperator):
        in_shape, out_shape = (1, 3, 5), (1, 3, 2)

        def forward(self, x):
            return x[..., :2]

    prior = GaussianPrior(torch.zeros(1, 3, 5, dtype=torch.float64), torch.eye(15, dtype=torch.float64))
    problem = whiten(torch.zeros(2, 1, 3, 2, dtype=torch.float64), First(), 1.0)
    assert solve(PnP(), problem, prior).shape == (1, 2, 1, 3, 5)
