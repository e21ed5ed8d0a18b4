"""The data step in the space of the data: exact minimisers, where CG ends, its start, and where it is taken."""

import math
from dataclasses import replace

import pytest
import torch
from cone_cases import TINY
from test_fitting import Local

from invdiff.configure import tuned
from invdiff.data_space import FIT, Bounds, few_data, through_data
from invdiff.data_step import FEWEST, data_step, point_spectrum
from invdiff.operators import build
from invdiff.operators.ct_cone import CTCone
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.common import at_once, chunks

TIGHT = Bounds(2000, 1e-14, 0.0, 0.0)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(problem):
    """A whitened, of each slice or of the stack, ``(k, data, pixels)``, and the data as columns."""
    a, slices = problem.operator, len(problem.y) if problem.operator.slicewise else 1
    units = torch.eye(math.prod(a.in_shape), dtype=torch.float64).reshape(-1, *a.in_shape)
    images = [a(e.expand(problem.image_shape)).reshape(slices, -1) for e in units]
    return torch.stack(images, -1), problem.y.reshape(slices, -1, 1)


def problem_of(kind):
    """Two slices of 12 x 12 seen by 5 views, or a volume in a cone; rays of very unequal weight."""
    if kind == "cone":
        operator, lead = CTCone(*TINY[2]), ()
    else:
        operator, lead = build("ct-sparse", (12, 12), (1.0, 1.0), views=5, geometry=kind), (2,)
    y = gaussian(*lead, *operator.out_shape, seed=1)
    return whiten(y, operator, torch.exp(2 * gaussian(*y.shape, seed=2)), scale=0.7)


@pytest.mark.parametrize("kind", ["parallel", "fan", "cone"])
def test_it_is_the_dense_minimiser(kind):
    problem, weight = problem_of(kind), 3.0
    matrix, y = dense(problem)
    z = gaussian(2, *problem.image_shape, seed=3)
    found, memory = through_data(problem, z, weight, {"other": y}, TIGHT)
    for sample in range(2):
        own = z[sample].reshape(len(matrix), -1, 1)
        exact = own + torch.linalg.solve(
            matrix.mT @ matrix + weight * torch.eye(matrix.shape[-1]), matrix.mT @ (y - matrix @ own)
        )
        assert torch.allclose(found[sample].reshape(exact.shape), exact, rtol=0, atol=1e-9)
    assert memory["other"] is y
    assert torch.allclose(z + problem.operator.adjoint(memory[FIT]), found)


def test_weights_and_spectra_of_slices():
    problem = problem_of("parallel")
    z, weight = gaussian(1, *problem.image_shape, seed=3), torch.tensor([0.5, 40.0]).reshape(2, 1, 1, 1).double()
    both = through_data(problem, z, weight, {}, TIGHT)[0]
    for k in range(2):
        alone = through_data(problem.restrict(slice(k, k + 1)), z[:, k : k + 1], float(weight[k]), {}, TIGHT)[0]
        assert torch.allclose(both[:, k : k + 1], alone, atol=1e-10)
    spectrum = point_spectrum(problem)
    through_images = data_step(problem, z, weight, z, iterations=2000, tolerance=1e-14, spectrum=spectrum)[0]
    assert torch.allclose(both, through_images, atol=1e-8)


def test_cg_ends_where_the_error_is_small_and_not_much_before():
    operator = build("ct-sparse", (32, 32), (1.0, 1.0), views=10)
    truth = gaussian(1, *operator.in_shape, seed=4)
    y = operator(truth)
    problem = whiten(y, operator, torch.exp(2 * gaussian(*y.shape, seed=5)))
    z, weight = truth[None] + 0.5 * gaussian(1, *truth.shape, seed=6), 4.0
    exact = through_data(problem, z, weight, {}, TIGHT)[0]
    before = 0.0
    for error in (1e-4, 1e-3, 1e-2):
        found = through_data(problem, z, weight, {}, Bounds(2000, 0.0, 0.0, error))[0]
        rms = float((found - exact).square().mean().sqrt())
        assert max(before, error / 50) < rms < error
        before = rms


def test_the_data_are_explained_where_that_is_asked_for():
    operator = build("ct-sparse", (32, 32), (1.0, 1.0), views=10)
    truth = gaussian(2, *operator.in_shape, seed=4)
    y = operator(truth)
    problem = whiten(y, operator, 1e-8 * torch.exp(2 * gaussian(*y.shape, seed=5)))
    z = truth[None] + 0.5 * gaussian(1, *truth.shape, seed=6)

    def chi2(residual):
        found = through_data(problem, z, 1.0, {}, Bounds(5000, 0.0, 0.02, 0.1, residual))[0]
        return [problem.restrict(slice(k, k + 1)).chi_squared(found[:, k : k + 1]) for k in range(2)]

    assert min(chi2(0.0)) > 10 and max(chi2(0.5)) < 1


def test_rays_that_miss_everything_weigh_nothing():
    operator = build("ct-sparse", (8, 8), (1.0, 1.0), views=3, detector_count=4, detector_offset=500.0)
    assert operator.row_squares.eq(0).all() and " 100 % of the rays" in operator.notes[0]
    problem = whiten(gaussian(1, *operator.out_shape), operator, 1.0)
    z = gaussian(1, *problem.image_shape)
    assert torch.equal(through_data(problem, z, 1.0, {}, TIGHT)[0], z)


def test_it_starts_from_the_fit_of_the_step_before():
    problem = problem_of("parallel")
    z = gaussian(1, *problem.image_shape, seed=3)
    exact, memory = through_data(problem, z, 3.0, {}, TIGHT)
    found, kept = through_data(problem, z, 3.0, memory, TIGHT._replace(iterations=1, tolerance=1e-9))
    assert torch.equal(kept[FIT], memory[FIT]) and torch.allclose(found, exact, atol=1e-12)
    cold = through_data(problem, z, 3.0, {}, TIGHT._replace(iterations=1))[0]
    assert not torch.allclose(cold, exact, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "few"),
    [("ct-sparse", {"views": 5}, True), ("ct-sparse", {"views": 30}, False), ("inpaint", {}, False), ("sr", {}, False)],
)
def test_it_is_taken_where_data_are_few_and_an_error_is_allowed(name, options, few):
    operator = build(name, (16, 16), (1.0, 1.0), **options)
    problem = whiten(gaussian(1, *operator.out_shape), operator, 1.0)
    assert few_data(problem) == few
    z, spectrum = gaussian(1, *problem.image_shape), point_spectrum(problem)
    for bound, taken in (({"error": 1e-3}, few), ({"tolerance": 1e-3}, False), ({}, False)):
        memory = data_step(problem, z, 1.0, z, iterations=FEWEST, spectrum=spectrum, **bound)[1]
        assert (FIT in memory) == taken
    few_iterations = data_step(problem, z, 1.0, z, iterations=FEWEST - 1, spectrum=spectrum, error=1e-3)[1]
    assert FIT not in few_iterations


def test_the_weight_of_the_prior_follows_the_number_of_views():
    def lam(views, side=256):
        described = {"name": "ct-sparse", "views_deg": list(range(views)), "rows": side, "columns": side}
        return tuned(described, "pnp")[0]["lam"]

    assert lam(30) == pytest.approx(0.45 * (30 / 256) ** 0.7)
    assert lam(15) < lam(30) < lam(60) == lam(30, 128) < lam(1000) == 0.4


@pytest.mark.parametrize("kind", ["parallel", "fan"])
@pytest.mark.parametrize("name", ["pigdm", "mm"])
def test_guidance_through_the_data_is_that_through_the_images(name, kind):
    """The estimate of both ways, CG to its end; coarser where that is allowed, and no other in groups of slices."""
    two, prior = problem_of(kind), Local(1, chunk=1)
    problem = whiten(two.y.repeat(3, 1, 1, 1), two.base, 1.0)
    x = gaussian(2, *problem.image_shape, seed=7)
    memory = {"spectrum": point_spectrum(problem)}

    def estimate(error, together=1):
        prior.together = together
        solver = make_solver(name, cg_iterations=400, cg_tolerance=1e-13, cg_error=error)
        return solver.estimate(problem, prior, x, 0.6, memory)

    exact, found = estimate(0.0)[0], estimate(1e-9)[0]
    assert torch.allclose(exact, found, atol=1e-6)
    coarse, kept = estimate(0.1)
    assert 1e-6 < float((coarse - exact).square().mean().sqrt()) < 0.1
    for together in (4, 16):
        grouped, again = estimate(0.1, together)
        assert torch.equal(coarse, grouped)
        if name == "pigdm":
            assert torch.equal(kept[FIT], again[FIT]) and kept[FIT].shape == (2, *problem.y.shape)


def test_slices_that_are_differentiated_together():
    problem, prior = replace(problem_of("parallel"), block=3), Local(1, chunk=2)
    assert (at_once(problem, prior), chunks(problem, prior)) == (2, [slice(0, 2)])
    prior.together = 4
    assert at_once(problem, prior) == 3  # no more than a data step takes
    prior.chunk = 8
    assert at_once(problem, prior) == 8
