"""Linear algebra against known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solver_cases import SIDE, SLICES, Case, Dense, Stacked

from invdiff.coupling import QuadraticZ, difference, difference_adjoint
from invdiff.data_step import circulant, data_step, point_spectrum, preconditioner
from invdiff.linalg import cg, largest_eigenvalue, slice_dot, total_dot
from invdiff.operators.ct import CTParallel
from invdiff.operators.rays import ParallelGeometry, equispaced
from invdiff.problem import whiten


def test_cg_is_exact_per_slice_whatever_the_neighbours():
    g = torch.Generator().manual_seed(0)
    m = torch.randn(9, 9, generator=g, dtype=torch.float64)
    m = m @ m.T + 0.1 * torch.eye(9, dtype=torch.float64)
    apply = lambda v: (v.reshape(-1, 9) @ m).reshape(v.shape)  # noqa: E731
    rhs = torch.randn(4, 1, 3, 3, generator=g, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e3, 0]).view(4, 1, 1, 1)
    x = cg(apply, rhs, torch.zeros_like(rhs), iterations=60, tolerance=1e-12, dot=slice_dot)
    assert torch.allclose(x.reshape(4, 9), torch.linalg.solve(m, rhs.reshape(4, 9).T).T, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("bound", ["tolerance", "reduction"])
def test_cg_stops_each_slice_at_the_first_iterate_that_meets_its_bound(bound):
    """The residual relative to the right-hand side, and that of the preconditioner relative to the start; the first
    slice starts within the one bound."""
    g = torch.Generator().manual_seed(0)
    scale = 1 + 80 * torch.rand(3, 1, 4, 4, generator=g, dtype=torch.float64)
    rhs = torch.randn(3, 1, 4, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 5, 1e-2]).view(3, 1, 1, 1)
    start = rhs / scale * (1 - torch.tensor([0.04, 1, 0.2]).view(3, 1, 1, 1))
    rough = lambda r: r / scale.sqrt()  # noqa: E731
    run = lambda **options: cg(lambda v: scale * v, rhs, start, precondition=rough, **options)  # noqa: E731
    iterates = [run(iterations=k) for k in range(14)]
    left = [rhs - scale * x for x in iterates]
    if bound == "tolerance":
        share = torch.stack([(slice_dot(r, r) / slice_dot(rhs, rhs)).flatten() for r in left])
    else:
        share = torch.stack([(slice_dot(r, rough(r)) / slice_dot(left[0], rough(left[0]))).flatten() for r in left])
    found, stops = run(iterations=60, **{bound: 0.05}), []
    for s in range(3):
        stops.append(next(k for k in range(14) if share[k, s] <= 0.05**2))
        assert torch.equal(found[s], iterates[stops[-1]][s])
    assert (stops[0] == 0) == (bound == "tolerance") and stops[1] > 2 and stops[2] > 0


def test_cg_leaves_a_slice_alone_where_the_map_is_not_positive():
    scale = torch.tensor([2.0, -3.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    rhs = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    found = cg(lambda v: scale * v, rhs, torch.zeros_like(rhs), iterations=5)
    assert torch.equal(found[0], rhs[0] / 2) and torch.equal(found[1], torch.zeros_like(rhs[1]))


def test_the_largest_eigenvalue_of_each_slice_is_its_own():
    """Lanczos' method is exact after as many iterations as there are different eigenvalues."""
    scale = torch.tensor([[3.0, 1.0, 0.5, 2.0], [1e-3, 7.0, 0.1, 6.0]], dtype=torch.float64).reshape(2, 1, 2, 2)
    start = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).reshape(1, 2, 2).expand(2, 1, 2, 2)
    found = largest_eigenvalue(lambda v: scale * v, start, 4, dot=slice_dot)
    assert torch.allclose(found.flatten(), torch.tensor([3.0, 7.0], dtype=torch.float64), rtol=1e-12)
    assert largest_eigenvalue(lambda v: -v, start, 1, dot=slice_dot).eq(0).all()  # not below 0


def test_largest_eigenvalue_of_a_known_matrix():
    d = torch.tensor([3.0, 1.0, 0.5])
    assert largest_eigenvalue(lambda v: d * v, torch.ones(3), 200, 1e-9) == pytest.approx(3, rel=1e-5)


@pytest.fixture(scope="module")
def scan():
    """A disk seen by 20 views whose rays through it weigh up to 400 times less than those beside it."""
    n = 32
    ct = CTParallel((n, n), 1.0, ParallelGeometry(equispaced(20), 46, 1.0))
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    disk = (((rows - 15.5) ** 2 + (columns - 15.5) ** 2).sqrt() < 11).double()[None, None] * 0.27
    y = ct(disk)
    matrix = torch.stack([ct(e.reshape(1, n, n)).flatten() for e in torch.eye(n * n, dtype=torch.float64)], 1)
    return matrix, whiten(y, ct, 1e-4 * y.exp()), disk


def test_certainty_is_the_mean_weight_of_the_rays_through_a_pixel(scan):
    matrix, problem, _ = scan
    weights = problem.operator.root_weights.flatten() ** 2
    mean = ((matrix.T @ weights) / matrix.sum(0)).reshape(32, 32)
    assert torch.allclose(problem.operator.certainty[0, 0], mean / mean[16, 16], rtol=1e-10)
    assert float(problem.operator.certainty.max() / problem.operator.certainty.min()) > 100


def test_cg_can_be_differentiated():
    """Iterates that a gradient needs are not written over."""
    weights = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 3, 3)

    def solved(rhs):
        return cg(lambda v: weights * v + v.flip(-1) / 4, rhs, torch.zeros_like(rhs), iterations=5)

    rhs = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(solved, rhs.requires_grad_())


def test_scaled_preconditioner_solves_the_same_system_in_fewer_iterations(scan):
    matrix, problem, disk = scan
    spectrum, weight = point_spectrum(problem), 50.0
    z = disk[None] + 0.1 * torch.randn(1, *disk.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def system(v):
        return problem.operator.normal(v) + weight * v

    rhs = problem.operator.adjoint(problem.y) + weight * z
    whole = (matrix.T * problem.operator.root_weights.flatten() ** 2) @ matrix + weight * torch.eye(z.numel())
    exact = torch.linalg.solve(whole, rhs.flatten()).reshape(z.shape)

    def error(converges):
        precondition = preconditioner(problem, spectrum, weight, converges)
        e = cg(system, rhs, z, iterations=24, precondition=precondition) - exact
        return float((e * system(e)).sum().sqrt())

    found = data_step(problem, z, weight, z, iterations=5000, tolerance=1e-15, spectrum=spectrum)[0]
    assert float((found - exact).abs().max()) < 1e-7
    assert error(True) < 0.8 * error(False)
    for bound, converges in (({}, False), *(({name: 1e-30}, True) for name in ("tolerance", "reduction"))):
        few = cg(system, rhs, z, iterations=10, precondition=preconditioner(problem, spectrum, weight, converges))
        found = data_step(problem, z, weight, z, iterations=10, spectrum=spectrum, **bound)[0]
        assert float((found - few).abs().max()) < 1e-12 * float(few.abs().max())


def test_the_scaled_preconditioner_is_its_formula(scan):
    """E^-1 K E^-1, E^2 = (c s + w) / (s + w), s the mean of the spectrum."""
    _, problem, disk = scan
    spectrum, w = point_spectrum(problem), 50.0
    s = spectrum.mean()
    e = ((problem.operator.certainty * s + w) / (s + w)).sqrt()
    r = torch.randn(1, *disk.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for converges, scale in ((True, e), (False, 1.0)):
        want = torch.fft.irfft2(torch.fft.rfft2(r / scale) / (spectrum + w)) / scale
        assert torch.allclose(preconditioner(problem, spectrum, w, converges)(r), want, rtol=0, atol=1e-12)


def test_certainty_of_slices_is_computed_once_in_a_run(monkeypatch):
    ct = CTParallel((8, 8), 1.0, ParallelGeometry(equispaced(6), 12, 1.0))
    y = ct(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    whole = whiten(y, ct, 0.01 * y.exp())
    problem = replace(whiten(y, ct, 0.01 * y.exp()), block=2)
    of_weights, adjoint = [], CTParallel.adjoint

    def counted(op, v):
        of_weights.append(len(v)) if not v.equal(torch.ones_like(v)) else None
        return adjoint(op, v)

    parts = [problem.restrict(b).operator for b in problem.blocks()]
    monkeypatch.setattr(CTParallel, "adjoint", counted)
    for part in (*parts, *(problem.restrict(b).operator for b in problem.blocks())):
        assert part.certainty is not None
    assert parts[0].restrict(slice(1, 2)).certainty.equal(whole.operator.certainty[1:2])
    assert parts[1].restrict(slice(1, 2)).certainty.equal(whole.operator.certainty[3:4])
    assert of_weights == [2, 2, 1, 1, 5, 1]
    assert torch.equal(torch.cat([part.certainty for part in parts]), whole.operator.certainty)
    turned = problem.restrict(torch.tensor([4, 0])).operator
    assert torch.equal(turned.certainty, whole.operator.certainty[[4, 0]])
    assert torch.equal(problem.restrict(slice(0, 5, 2)).operator.certainty, whole.operator.certainty[::2])


def test_the_certainty_of_fewer_slices_at_a_time_takes_the_place_of_that_of_more():
    ct = CTParallel((8, 8), 1.0, ParallelGeometry(equispaced(6), 12, 1.0))
    y = ct(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    whole = whiten(y, ct, 0.01 * y.exp()).operator.certainty
    problem = replace(whiten(y, ct, 0.01 * y.exp()), block=4)
    for block, spans in ((4, {(0, 4)}), (2, {(0, 2), (2, 4)}), (1, {(k, k + 1) for k in range(4)})):
        problem = replace(problem, block=block)
        parts = [problem.restrict(b).operator for b in problem.blocks()]
        assert torch.equal(torch.cat([part.certainty for part in parts]), whole)
        assert set(problem.operator._certain) == spans


def test_data_of_one_weight_have_no_certainty(scan):
    _, problem, _ = scan
    assert whiten(problem.measured, problem.base, 0.01).operator.certainty is None


def test_cg_stops_each_slice_once_its_energy_is_enough():
    scale = torch.linspace(1, 9, 16, dtype=torch.float64).reshape(1, 4, 4)
    rhs = torch.ones(2, 1, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    start, normal = torch.zeros_like(rhs), lambda v: scale * v
    first = float(slice_dot(rhs, rhs)[0])
    found = cg(normal, rhs, start, iterations=1, enough=first)
    assert found[0].eq(0).all() and found[1].ne(0).all()  # enough for the first from the start, at equality
    found = cg(normal, rhs, start, iterations=50, enough=torch.full((2, 1, 1, 1), 1e-3, dtype=torch.float64))
    left = slice_dot(rhs - normal(found), rhs - normal(found)).flatten()
    assert (left <= 1e-3).all() and (left > 1e-12).all()


@pytest.mark.parametrize("block", [1, 2, 8])
def test_a_data_step_gives_each_slice_its_own_weight(block):
    case = Case("ct", 0.1)
    problem = replace(whiten(torch.from_numpy(np.tile(case.y, (2, 1))), Dense(case.a), 0.01), block=block)
    z = torch.randn(1, 4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 30, 5, 0.2], dtype=torch.float64).reshape(4, 1, 1, 1)
    found = data_step(problem, z, weights, z, iterations=100, tolerance=1e-14)[0]
    a, eye = torch.from_numpy(case.a) / 0.1, torch.eye(case.n, dtype=torch.float64)
    for s, w in enumerate(weights.flatten()):
        want = torch.linalg.solve(a.T @ a + w * eye, a.T @ problem.y[s] + w * z[0, s].flatten())
        assert torch.allclose(found[0, s].flatten(), want, atol=1e-9)
    spectrum = point_spectrum(problem) * torch.tensor([1.0, 9, 0.1, 3]).reshape(1, 4, 1, 1, 1)
    few = data_step(problem, z, weights, z, iterations=2, spectrum=spectrum)[0]
    for s in range(4):
        b = slice(s, s + 1)
        alone = data_step(problem.restrict(b), z[:, b], weights[b], z[:, b], iterations=2, spectrum=spectrum[:, b])[0]
        assert torch.allclose(few[:, b], alone, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True])
def test_a_circulant_gives_every_slice_the_bits_that_it_has_alone(whole):
    """At a size at which FFTs of a batch have other bits than those of its items, on processors where they do."""
    r = torch.randn(2, 5, 2 if whole else 1, 24, 24, generator=torch.Generator().manual_seed(0))
    spectrum = 1 + torch.rand(1, 5, 1, 24, 24 if whole else 13, generator=torch.Generator().manual_seed(1))
    together = circulant(spectrum, whole)(r)
    for k in range(5):
        assert circulant(spectrum[:, k : k + 1], whole)(r[:1, k : k + 1]).equal(together[:1, k : k + 1])
    one = circulant(spectrum[:, :1], whole)(r)
    assert one[:, :1].equal(together[:, :1]) and not one.equal(together)


@pytest.mark.parametrize("kind", ["slices", "stack", "coupled"])
def test_a_data_step_stops_once_its_energy_is_that_of_the_error(kind):
    """<r, K r> <= weight n error^2, n the pixels of what has one CG: a slice, or the stack."""
    case, weight = Case("ct", 0.1), 30.0
    whole = Stacked(torch.from_numpy(np.kron(np.eye(SLICES), case.a)))
    problem = whiten(torch.from_numpy(case.y.ravel()), whole, 0.01) if kind == "stack" else case.problem
    coupling = QuadraticZ(0.5) if kind == "coupled" else None
    z = torch.randn(1, *problem.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum, dot = point_spectrum(problem), slice_dot if kind == "slices" else total_dot
    run = lambda **bounds: data_step(problem, z, weight, z, spectrum=spectrum, coupling=coupling, **bounds)[0]  # noqa: E731
    iterates, energies = [run(iterations=k) for k in range(7)], []
    for x in iterates:
        r = problem.operator.adjoint(problem.y) - problem.operator.normal(x) + weight * (z - x)
        r = r if coupling is None else r - 0.5 * weight * difference_adjoint(difference(x))
        energies.append(dot(r, preconditioner(problem, spectrum, weight)(r))[0, 0].item())
    pixels = SIDE**2 * (1 if kind == "slices" else SLICES)
    for k in range(5):
        for near in (0.9, 1.1):
            found = run(iterations=20, error=(near * energies[k] / (weight * pixels)) ** 0.5)
            first = next(j for j in range(7) if energies[j] <= near * energies[k])
            assert torch.equal(found[:, 0], iterates[first][:, 0])
