"""Reconstructions without a prior, against exact answers: total variation, filtered backprojection, SIRT."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from invdiff.intensity import MU_WATER_PER_MM
from invdiff.linalg import largest_eigenvalue, slice_dot, total_dot
from invdiff.operator import LinearOperator
from invdiff.operators import build
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate
from invdiff.solvers.tv import add_gradient_, gradient, gradient_adjoint

SIDE = 12


class Dense(LinearOperator):
    """A given matrix, the same for every slice."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.in_shape, self.out_shape = (1, SIDE, SIDE), (1, 1, len(matrix))

    def forward(self, x):
        return (x.flatten(-3) @ self.matrix.T.to(x.dtype))[..., None, None, :]

    def _adjoint(self, y):
        return (y[..., 0, 0, :] @ self.matrix.to(y.dtype)).unflatten(-1, self.in_shape)

    def pinv(self, y):
        return 0.1 * self._adjoint(y)  # any start will do


def dense_problem(slices=1, spacing=(1.0, 1.0, 1.0), rows=90):
    """An underdetermined 12 x 12 problem with unequal noise; ``(problem, matrix)``."""
    g = torch.Generator().manual_seed(3)
    matrix = torch.rand(rows, SIDE**2, generator=g, dtype=torch.float64) / SIDE
    truth = torch.zeros(slices, 1, SIDE, SIDE, dtype=torch.float64)
    for s in range(slices):
        truth[s, :, 2 : 7 + s, 4:9] = 0.7
        truth[s, :, 8:, : 3 + s] = -0.4
    operator = Dense(matrix)
    variance = 10 ** (-4 + torch.rand(slices, 1, 1, rows, generator=g, dtype=torch.float64))
    y = operator(truth) + variance.sqrt() * torch.randn(variance.shape, generator=g, dtype=torch.float64)
    return whiten(y, operator, variance, spacing=spacing)


@pytest.mark.parametrize("evenness", [0.0, 0.85, 1.0])
def test_tv_takes_dual_steps_that_even_out_the_weights_of_the_data(evenness):
    """w^-evenness, of the mean that the option says in every slice; no weight counts as less than 1e-3 of the mean."""
    problem = dense_problem(2)
    variance = problem.operator.root_weights**-2
    variance[0, 0, 0, 3] = 1e9
    problem = whiten(problem.measured, problem.base, variance)
    w = np.maximum(w := 1 / variance.numpy(), 1e-3 * w.mean(-1, keepdims=True)) ** -evenness
    found = make_solver("tv", evenness=evenness, data_step=0.2).init(problem, None, [], None).memory["dual_step"]
    assert np.allclose(found, 0.2 * w / w.mean(-1, keepdims=True))


def explicit(problem, z_factor):
    """The whitened operator and the differences as dense matrices, from loops over pixels and not from the package."""
    n, px = len(problem.y), SIDE**2
    blocks = [(problem.operator.root_weights[s].flatten()[:, None] * problem.base.matrix).numpy() for s in range(n)]
    a = np.zeros((problem.y.numel(), n * px))
    rows = len(blocks[0])
    d = np.zeros((3, n * px, n * px))
    for s in range(n):
        a[s * rows : (s + 1) * rows, s * px : (s + 1) * px] = blocks[s]
        for i in range(SIDE):
            for j in range(SIDE):
                k = s * px + i * SIDE + j
                for axis, ok, step, size in (
                    (0, i + 1 < SIDE, SIDE, 1),
                    (1, j + 1 < SIDE, 1, 1),
                    (2, s + 1 < n, px, z_factor),
                ):
                    if ok:
                        d[axis, k, k + step], d[axis, k, k] = size, -size
    return a, csr_matrix(d.reshape(-1, n * px))


def energy(a, d, y, weight, u):
    return 0.5 * np.sum((a @ u - y) ** 2) + weight * np.sqrt(np.sum((d @ u).reshape(3, -1) ** 2, 0)).sum()


def reference(a, d, y, weight, rho=300.0, iterations=6000):
    """Minimiser by ADMM with a dense factorisation (Boyd et al. 2011, section 3.1)."""
    inverse = np.linalg.inv(a.T @ a + rho * (d.T @ d).toarray())
    split, dual, rhs = np.zeros(d.shape[0]), np.zeros(d.shape[0]), a.T @ y
    for _ in range(iterations):
        u = inverse @ (rhs + rho * d.T @ (split - dual))
        mixed = 1.8 * (d @ u) - 0.8 * split  # over-relaxation, section 3.4.3
        new = (mixed + dual).reshape(3, -1)
        shrink = np.maximum(1 - weight / rho / np.maximum(np.sqrt((new**2).sum(0)), 1e-300), 0)
        old, split = split, (shrink * new).ravel()
        dual = new.ravel() - split
        if max(np.abs(d @ u - split).max(), np.abs(split - old).max()) < 1e-9:
            break
    assert max(np.abs(d @ u - split).max(), np.abs(split - old).max()) < 1e-7
    return u


CASES = [(1, False, (1.0, 1.0, 1.0), 0.0), (3, True, (2.0, 1.0, 1.0), 0.5)]


@pytest.mark.parametrize(("slices", "volumetric", "spacing", "z_factor"), CASES)
def test_tv_is_the_minimiser_and_its_gap_bounds_the_excess(slices, volumetric, spacing, z_factor):
    problem = dense_problem(slices, spacing)
    a, d = explicit(problem, z_factor)
    y, weight = problem.y.numpy().ravel(), 5.0
    best = reference(a, d, y, weight)
    lowest = energy(a, d, y, weight, best)
    tv = make_solver("tv", weight=weight, volumetric=volumetric, gap=1e-7, radius=2.0)
    checked = 0
    for state in iterate(tv, problem):
        u = state.x0.numpy().ravel()
        value = energy(a, d, y, weight, u)
        if np.abs(u - best).max() <= tv.radius:
            checked += 1
            assert value - lowest <= float(state.memory["gap"]) * value + 1e-10 * value
    assert checked > 5
    assert float(state.memory["gap"]) <= tv.gap and state.step < tv.default_steps
    assert value / lowest - 1 < tv.gap
    assert np.abs(u - best).max() < 1e-4


def disc(side=48, pixel=2.0, value=0.0):
    """A disc of ``value`` HU in air, ``(1, H, W)``, and its mask well inside."""
    r = np.hypot(*np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j])
    return np.where(r < 0.7, value, -1000.0).astype(np.float32)[None], (r < 0.5)[None]


def ct_problem(slices=1, views=40, sigma=0.02, side=48):
    """Discs of different density and noise (deviation sigma, 3 sigma, ...) in the slices; images are HU / 1000."""
    hu = np.concatenate([disc(side, value=60.0 + 300 * s)[0] for s in range(slices)])
    operator = build("ct-sparse", (side, side), (2.0, 2.0), views=views)
    mu = torch.from_numpy((1 + hu / 1000) * MU_WATER_PER_MM)[:, None]
    g = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(operator.out_shape, generator=g) for _ in range(slices)])
    deviation = sigma * (1 + 2 * torch.arange(slices)[:, None, None, None])
    y = operator(mu) + deviation * noise
    return whiten(y, operator, deviation**2, scale=MU_WATER_PER_MM, shift=MU_WATER_PER_MM), hu


@pytest.mark.parametrize("z_factor", [0.0, 0.4])
def test_gradient_and_its_adjoint(z_factor):
    g = torch.Generator().manual_seed(0)
    u = torch.randn(1, 4, 1, 7, 5, generator=g, dtype=torch.float64)
    p = torch.randn(3 if z_factor else 2, *u.shape, generator=g, dtype=torch.float64)
    grad = gradient(u, z_factor)
    assert math.isclose(float((grad * p).sum()), float((u * gradient_adjoint(p, z_factor)).sum()), rel_tol=1e-12)
    assert torch.allclose(add_gradient_(p.clone(), u, 3.0, z_factor), p + 3 * grad, atol=1e-12)
    ramp = (
        torch.arange(5.0).expand(1, 4, 1, 7, 5)
        + 10 * torch.arange(7.0)[:, None]
        + 100 * torch.arange(4.0)[:, None, None, None]
    )
    rows, columns, *slices = gradient(ramp, z_factor)
    assert (rows[..., :-1, :] == 10).all() and (rows[..., -1, :] == 0).all()
    assert (columns[..., :-1] == 1).all() and (columns[..., -1] == 0).all()
    for component in slices:
        assert torch.allclose(component[:, :-1], torch.tensor(40.0)) and (component[:, -1] == 0).all()


def test_tv_stops_on_the_gap_and_says_when_it_did_not():
    problem, _ = ct_problem()
    counts = {}
    for gap in (1e-2, 1e-3):
        tv = make_solver("tv", gap=gap)
        states = list(iterate(tv, problem))
        counts[gap] = len(states)
        assert float(states[-1].memory["gap"]) <= gap
        assert all(float(s.memory["gap"]) > gap for s in states[:-1])
    assert counts[1e-2] < counts[1e-3] < make_solver("tv").default_steps
    tv = make_solver("tv", gap=1e-4)
    cut = list(iterate(tv, problem, sigmas=[2.0, 1.0, 0.0]))[-1]  # the safety bound comes first
    assert cut.step == 2 and not tv.finished(cut) and float(cut.memory["gap"]) > tv.gap


def test_tv_slices_neither_feel_their_neighbours_nor_cost_after_they_stop():
    problem, _ = ct_problem(slices=3)
    faint = replace(problem, y=problem.y * torch.tensor([1.0, 0.02, 1.0])[:, None, None, None])  # stops at another time
    tv = make_solver("tv", gap=1e-3)
    states = list(iterate(tv, faint))
    stop = [next(k for k, s in enumerate(states) if s.memory["gaps"][i] <= tv.gap) for i in range(3)]
    assert len(set(stop)) > 1
    for i in range(3):
        alone = list(iterate(tv, faint.restrict(slice(i, i + 1))))
        assert len(alone) == stop[i] + 1
        assert torch.allclose(states[-1].x0[:, i], alone[-1].x0[:, 0], atol=2e-6)
        assert torch.equal(states[-1].x0[:, i], states[stop[i]].x0[:, i])


@pytest.mark.parametrize("dot", [slice_dot, total_dot])
def test_tv_steps_are_below_the_bound_even_where_one_start_would_not_see_it(dot):
    """A start that holds next to nothing of the leading eigenvector must not let the steps grow."""
    g = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64)).Q
    values = torch.linspace(0.1, 0.9, 60, dtype=torch.float64)
    values[-1] = 1.0
    start = (q @ torch.cat([torch.ones(59), torch.tensor([5e-5])]).double()).view(1, 1, 1, 1, 60)
    normal = lambda u: (q @ (values * (q.T @ u.flatten()))).view_as(u)  # noqa: E731
    found = largest_eigenvalue(normal, start, 40, tolerance=0.0, dot=dot)
    assert found.shape == (1, 1, 1, 1, 1) and 0.98 < float(found) <= 1 + 1e-9


def test_data_of_no_weight_do_not_disturb():
    problem, _ = ct_problem()
    variance = torch.full_like(problem.measured, 0.02**2)
    variance[..., 3, 20] = 1e12
    y = problem.measured.clone()
    y[..., 3, 20] = 0
    dead = whiten(y, problem.base, variance, scale=problem.scale, shift=problem.shift)
    for name in ("tv", "sirt"):
        want, got = (list(iterate(make_solver(name), p))[-1] for p in (problem, dead))
        assert (got.x0 - want.x0).square().mean().sqrt() < 0.01, name
        if name == "tv":
            assert got.memory["gap"] <= 1e-4


@pytest.mark.parametrize("name", ["tv", "sirt"])
def test_a_slice_alone_has_the_bits_it_has_together(name):
    problem, _ = ct_problem(slices=3, side=37)
    solver = make_solver(name, **({"gap": 1e-3} if name == "tv" else {}))
    together = list(iterate(solver, problem))[-1].x0
    for i in range(3):
        assert torch.equal(together[:, i : i + 1], list(iterate(solver, problem.restrict(slice(i, i + 1))))[-1].x0)


def test_tv_resumes_and_leaves_its_state_alone():
    problem, _ = ct_problem()
    tv = make_solver("tv", gap=1e-3)
    whole = list(iterate(tv, problem))
    kept = {k: v.clone() for k, v in whole[1].memory.items()}
    again = list(iterate(tv, problem, state=whole[1]))
    assert torch.equal(again[-1].x0, whole[-1].x0) and len(again) == len(whole) - 2
    assert all(torch.equal(v, whole[1].memory[k]) for k, v in kept.items())


@pytest.mark.parametrize("window", ["hann", "ramp"])
def test_fbp_has_the_right_amplitude_in_hu(window):
    problem, _ = ct_problem(views=90, sigma=1e-4)
    state = list(iterate(make_solver("fbp", window=window), problem))[-1]
    image = 1000 * state.x0[0, :, 0].numpy()
    inside = disc()[1]
    assert abs(image[inside].mean() - 60.0) < 10.0
    r = np.hypot(*np.mgrid[-1 : 1 : 48 * 1j, -1 : 1 : 48 * 1j])[None]
    assert abs(image[(r > 0.85) & (r < 1)].mean() + 1000.0) < 15.0


def test_sirt_lowers_its_residual_and_stops_by_the_discrepancy_principle():
    problem, _ = ct_problem()
    sirt = make_solver("sirt")
    states = list(iterate(sirt, problem))
    chi2 = [float(s.memory["chi2"]) for s in states]
    assert all(b < a for a, b in pairwise(chi2))
    assert len(states) < sirt.default_steps and len(states) % sirt.check == 0
    assert chi2[-1] <= 1.0 < chi2[-1 - sirt.check]
    before = states[-2].x0[0]  # the residual is that of the iterate before the step
    assert math.isclose(chi2[-1], problem.chi_squared(before), rel_tol=1e-4)
