"""Classical solvers against exact answers: CGLS, OS-SART, wavelets, biharmonic filling, vectorial TV, their weights."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsqr
from skimage.restoration import inpaint_biharmonic

from invdiff.errors import InputError, UsageError
from invdiff.operator import LinearOperator
from invdiff.operators.blur import blur
from invdiff.operators.identity import Identity
from invdiff.operators.mask import Mask
from invdiff.operators.mri import mri, mri_multicoil
from invdiff.operators.scans import ct_sparse
from invdiff.operators.superres import sr
from invdiff.problem import whiten
from invdiff.solvers import make_solver, tv, wavelet
from invdiff.solvers.base import iterate, solve
from invdiff.solvers.residual import strength
from invdiff.solvers.sart import interleaved


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Matrix(LinearOperator):
    """A given matrix on images of ``in_shape``."""

    def __init__(self, matrix, in_shape):
        self.matrix, self.in_shape, self.out_shape = matrix, in_shape, (1, 1, len(matrix))

    def forward(self, x):
        return (x.flatten(-3) @ self.matrix.T)[..., None, None, :]


def dense(problem):
    """The whitened operator of one slice as a matrix."""
    n = math.prod(problem.image_shape[1:])
    unit = torch.eye(n, dtype=problem.y.dtype).reshape(n, 1, *problem.image_shape[1:])
    return problem.restrict(slice(0, 1)).operator(unit).reshape(n, -1).T


def matrix_problem(noise=0.01, seed=0, slices=2):
    """30 unknowns, 40 data of a decaying spectrum; images are 2 u - 1."""
    q = torch.linalg.qr(gaussian(40, 30, seed=seed)).Q
    r = torch.linalg.qr(gaussian(30, 30, seed=seed + 1)).Q
    operator = Matrix(q @ torch.diag(0.8 ** torch.arange(30.0).double()) @ r, (1, 5, 6))
    variance = noise**2 * (1 + torch.arange(slices)[:, None, None, None].double())
    truth = gaussian(slices, 1, 5, 6, seed=seed + 2)
    y = operator(truth) + variance.sqrt() * gaussian(slices, 1, 1, 40, seed=seed + 3)
    return whiten(y, operator, variance, scale=2.0, shift=-1.0)


def ct_problem(slices=2, views=24, side=24, sigma=0.02, geometry="parallel"):
    operator = ct_sparse((side, side), 2.0, views=views, geometry=geometry)
    g = np.random.default_rng(0)
    image = torch.from_numpy(0.02 * (g.uniform(size=(slices, 1, side, side)) > 0.4)).float()
    noise = sigma * gaussian(slices, *operator.out_shape, dtype=torch.float32)
    return whiten(operator(image) + noise, operator, sigma**2, scale=0.0193, shift=0.0193)


def test_cgls_makes_the_iterates_of_lsqr():
    problem = matrix_problem()
    start = -problem.shift / problem.scale
    states = list(
        iterate(make_solver("cgls", discrepancy=0.0, stall=0.0), problem, sigmas=[float(k) for k in range(9)])
    )
    for s in range(2):
        a, y = dense(problem.restrict(slice(s, s + 1))).numpy(), problem.y[s].flatten().numpy()
        for steps, tolerance in ((1, 1e-10), (4, 1e-8), (8, 1e-5)):
            found = states[steps - 1].x0[0, s].flatten().numpy() - start
            best = lsqr(a, y - a @ np.full(30, start), atol=0, btol=0, conlim=0, iter_lim=steps)[0]
            assert np.allclose(found, best, rtol=0, atol=tolerance), (s, steps)


def test_cgls_stops_by_the_discrepancy_or_where_it_stalls():
    problem = matrix_problem(noise=0.1)
    states = list(iterate(make_solver("cgls"), problem))
    chi2 = torch.stack([s.memory["chi2"].flatten() for s in states])
    for s in range(2):
        stop = int((chi2[:, s] <= 1).nonzero()[0, 0])
        assert stop == 0 or chi2[stop - 1, s] > 1
        assert torch.equal(states[-1].x0[:, s], states[stop].x0[:, s])
        part = problem.restrict(slice(s, s + 1))
        assert float(chi2[stop, s]) == pytest.approx(part.chi_squared(states[stop].x0[:, s : s + 1]))
    g = matrix_problem(noise=0.1)
    loud = whiten(g.measured, g.base, 1e-4, scale=2.0)  # noise ten times what is said
    solver = make_solver("cgls")
    last = list(iterate(solver, loud))[-1]
    assert solver.finished(last) and last.step < 100 and float(last.memory["chi2"].min()) > 5


@pytest.mark.parametrize("check", [3, 5])
def test_cgls_compares_chi_squared_with_that_of_so_many_steps_before(check):
    """At multiples of ``check`` alone; of data whose noise is ten times what is said."""
    g = matrix_problem(noise=0.1)
    problem, stall = whiten(g.measured, g.base, 1e-4, scale=2.0), 0.15
    on = make_solver("cgls", discrepancy=0.0, check=1000)  # stops nowhere
    states = list(iterate(on, problem, sigmas=[float(k) for k in range(41)]))
    first = on.init(problem, None, [], None).memory["chi2"]
    chi2 = torch.stack([first, *(s.memory["chi2"] for s in states)]).reshape(41, -1)
    last = list(iterate(make_solver("cgls", discrepancy=0.0, stall=stall, check=check), problem))[-1]
    for s in range(2):
        stop = next(k for k in range(check, 41, check) if chi2[k, s] > (1 - stall) * chi2[k - check, s])
        assert torch.equal(last.x0[:, s], states[stop - 1].x0[:, s])


@pytest.mark.parametrize("name", ["cgls", "os-sart", "wavelet"])
def test_a_slice_alone_has_the_bits_it_has_together(name):
    problem, solver = ct_problem(slices=3), make_solver(name, **({"change": 0.03} if name == "wavelet" else {}))
    problem = whiten(problem.measured * torch.tensor([1.0, 0.3, 1.0])[:, None, None, None], problem.base, 4e-4,
                     scale=0.0193, shift=0.0193)  # fmt: skip
    together = list(iterate(solver, problem))
    assert solver.finished(together[-1]) and len(together) < solver.default_steps
    for i in range(3):
        alone = list(iterate(solver, problem.restrict(slice(i, i + 1))))
        assert torch.equal(together[-1].x0[:, i], alone[-1].x0[:, 0])
    resumed = list(iterate(solver, problem, state=together[0]))[-1]
    assert torch.equal(resumed.x0, together[-1].x0)


def test_sense_cg_solves_the_least_squares_of_all_coils():
    operator = mri_multicoil((9, 8), 1.0, coils=4, acceleration=2, center_fraction=0.2)
    truth = gaussian(2, 2, 9, 8)
    y = operator(truth)
    problem = whiten(y, operator, 1e-12)
    found = solve(make_solver("sense-cg", stall=0.0), problem)[0]
    best = torch.linalg.lstsq(dense(problem), problem.y.flatten(1).T).solution.T.reshape(truth.shape)
    assert torch.allclose(found, best, atol=1e-4) and torch.allclose(best, truth, atol=1e-6)
    noisy = whiten(operator(truth) + 0.05 * gaussian(*y.shape, seed=5) * operator.mask, operator, 0.05**2)
    state = list(iterate(make_solver("sense-cg"), noisy))[-1]
    assert state.memory["chi2"].max() <= 1  # of the sampled data only
    assert noisy.chi_squared(state.x0) == pytest.approx(float(state.memory["chi2"].mean()), rel=1e-6)


def test_views_of_a_subset_are_those_of_the_whole():
    for geometry in ("parallel", "fan"):
        operator = ct_sparse((9, 10), 2.0, views=7, geometry=geometry)
        x, y = gaussian(2, *operator.in_shape), gaussian(2, *operator.out_shape)
        total, norm = 0, operator.norm
        for t in range(3):
            part, views = operator.subset(slice(t, None, 3)), slice(t, None, 3)
            assert torch.allclose(part(x), operator(x)[..., views, :], atol=1e-12)
            total = total + part.adjoint(y[..., views, :])
            assert part.norm < norm and part.mean_square < operator.mean_square
        assert torch.allclose(total, operator.adjoint(y), atol=1e-12)
        assert operator.norm == norm and len(operator.geometry.views_deg) == 7


def test_os_sart_with_one_subset_is_sirt():
    problem = ct_problem()
    few = [4.0, 3.0, 2.0, 1.0, 0.0]
    sirt = list(iterate(make_solver("sirt", relaxation=1.0, discrepancy=0.0), problem, sigmas=few))
    sart = list(iterate(make_solver("os-sart", subsets=1, discrepancy=0.0, stall=0.0), problem, sigmas=few))
    assert torch.allclose(sart[-1].x0, sirt[-1].x0, atol=1e-4)
    assert torch.allclose(sart[2].memory["chi2"], sirt[2].memory["chi2"], rtol=1e-4)


def test_os_sart_pass_is_its_formula():
    problem = ct_problem(slices=1, views=6, side=8)
    order = interleaved(3)
    assert sorted(order) == [0, 1, 2] and sorted(interleaved(10)) == list(range(10)) and interleaved(1) == [0]
    assert min(abs(a - b) for a, b in zip(interleaved(10), interleaved(10)[1:], strict=False)) > 1
    a = (dense(problem) / problem.operator.root_weights.flatten()[:, None] / problem.scale).double()
    a, y = a.reshape(6, -1, 64), problem.measured.reshape(6, -1).double()
    mu = torch.zeros(64).double()
    for t in order:
        rows, data = a[t::3].reshape(-1, 64), y[t::3].flatten()
        seen = rows.sum(1) > 1e-6 * a.sum(2).max()
        update = torch.where(seen, (data - rows @ mu) / rows.sum(1).clamp_min(1e-9), 0.0)
        mu = mu + 0.7 * (rows.T @ update) / rows.sum(0).clamp_min(1e-9)
    step = next(iter(iterate(make_solver("os-sart", subsets=3, relaxation=0.7), problem)))
    found = problem.scale * step.x0.flatten().double() + problem.shift
    assert torch.allclose(found, mu, rtol=1e-3, atol=1e-6)


def test_os_sart_needs_fewer_passes_than_sirt_and_ends_where_subsets_disagree():
    problem = ct_problem()
    passes = [list(iterate(make_solver("os-sart", subsets=n), problem)) for n in (1, 8)]
    assert len(passes[1]) < len(passes[0]) / 3 and passes[1][-1].memory["chi2"].max() <= 1
    loud = whiten(problem.measured, problem.base, 1e-6, scale=problem.scale, shift=problem.shift)
    solver = make_solver("os-sart")
    last = list(iterate(solver, loud))[-1]
    assert solver.finished(last) and last.step < solver.default_steps and last.memory["chi2"].min() > 1


def test_daubechies_filter_is_the_published_one():
    published = [0.2303778133, 0.7148465706, 0.6308807679, -0.0279837694]
    published += [-0.1870348117, 0.0308413818, 0.0328830117, -0.0105974018]
    assert np.allclose(wavelet.daubechies(), published, atol=1e-9)  # Daubechies 1992, table 6.1, N = 4
    assert np.allclose(wavelet.daubechies(1), np.sqrt(0.5) * np.ones(2))
    for moment in range(4):  # the high-pass filter does not see polynomials
        assert sum(h * k**moment for k, h in enumerate(wavelet._HIGH)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("shape", [(16, 32), (48, 16)])
def test_the_wavelet_transform_is_orthonormal(shape):
    n = math.prod(shape)
    unit = torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)
    *details, coarse = wavelet.transform(unit)
    parts = [d.movedim(0, 1).flatten(1) for d in details] + [coarse.flatten(1)]
    matrix = torch.cat(parts, 1).T
    assert matrix.shape == (n, n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = gaussian(2, 3, 1, *shape)
    assert torch.allclose(wavelet.inverse(wavelet.transform(x)), x, atol=1e-12)


def test_wavelet_denoising_is_soft_thresholding():
    y = gaussian(2, 2, 32, 16)
    problem = whiten(y, Identity((2, 32, 16)), 0.25)
    solver = make_solver("wavelet", spin=False, weight=3.0, change=1e-9, penalty=1.0)
    found = solve(solver, problem)[0]
    *details, coarse = wavelet.transform(y)
    kept = [d * (1 - 0.75 / d.square().sum(-3, keepdim=True).sqrt()).clamp_min(0) for d in details]  # weight * variance
    assert torch.allclose(found, wavelet.inverse([*kept, coarse]), atol=1e-7)
    assert 0 < sum(int((d == 0).sum()) for d in kept) < 0.99 * y.numel()


def test_wavelet_meets_its_optimality_conditions():
    """The gradient of the data term is no larger than the weight, opposite to every coefficient, 0 for the mean."""
    operator = blur((16, 16), 1.0, kernel="gaussian:1")
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 4:10, 5:14] = 1
    problem = whiten(operator(x) + 0.05 * gaussian(*x.shape), operator, 0.05**2)
    u = solve(make_solver("wavelet", spin=False, weight=6.0, change=1e-4, penalty=3.0), problem)[0]
    *slopes, mean = wavelet.transform(problem.operator.adjoint(problem.operator(u) - problem.y))
    *details, _ = wavelet.transform(u)
    assert mean.abs().max() < 1e-2
    for d, g in zip(details, slopes, strict=True):
        active = d.abs() > 1e-6
        assert g.abs().max() < 6 * (1 + 1e-3)
        assert torch.allclose(g[active], -6 * d[active].sign(), atol=6e-3)
    assert any((d.abs() > 1e-6).any() for d in details[:2])


@pytest.mark.parametrize("name", ["wavelet", "tv"])
def test_complex_images_may_have_any_phase(name):
    """Turning every value by one phase turns the result by it; odd sizes."""
    operator = Mask(gaussian(19, 22) > -0.3, channels=2)
    y = operator(torch.nn.functional.avg_pool2d(gaussian(1, 2, 19, 22), 3, 1, 1) + 0.1 * gaussian(1, 2, 19, 22, seed=2))
    c, s = math.cos(0.7), math.sin(0.7)
    turned = torch.stack([c * y[:, 0] - s * y[:, 1], s * y[:, 0] + c * y[:, 1]], 1)
    solver, few = make_solver(name, weight=20.0), [3.0, 2.0, 1.0, 0.0]  # wavelets keep the symmetry at every step
    if name == "tv":
        solver, few = make_solver(name, weight=20.0, gap=1e-7), None
    u, v = (solve(solver, whiten(d, operator, 1e-3), sigmas=few)[0] for d in (y, turned))
    expected = torch.stack([c * u[:, 0] - s * u[:, 1], s * u[:, 0] + c * u[:, 1]], 1)
    known = operator.mask  # what total variation puts on missing pixels need not be unique
    assert torch.allclose(v[..., known], expected[..., known], atol=1e-5)
    assert (u[:, 0] - u[:, 0].mean()).abs().max() > 0.05


def test_tv_of_two_channels_is_joint():
    """Denoising against projected gradients on the dual (Chambolle 2004), the field of both channels projected."""
    y, weight = gaussian(1, 2, 10, 12), 0.8
    y[:, 1] = 0.5 * y[:, 0] + 0.3 * y[:, 1]
    problem = whiten(y, Identity((2, 10, 12)), 1e-3)
    solver = make_solver("tv", weight=1e3 * weight, gap=1e-6)
    state = list(iterate(solver, problem))[-1]
    p = torch.zeros(2, *y.shape, dtype=torch.float64)
    for _ in range(1500):
        p = p + 0.12 * tv.gradient(y - tv.gradient_adjoint(p, 0.0), 0.0)
        p = p / (p.square().sum((0, -3), keepdim=True).sqrt() / weight).clamp_min(1)
    best = y - tv.gradient_adjoint(p, 0.0)
    assert solver.finished(state) and torch.allclose(state.x0[0], best, atol=5e-3)
    apart = torch.cat([solve(solver, whiten(y[:, c : c + 1], Identity((1, 10, 12)), 1e-3))[0] for c in (0, 1)], 1)
    assert (apart - best).abs().max() > 0.05


@pytest.mark.parametrize("hole", ["box", "scattered", "corner"])
def test_biharmonic_filling_agrees_with_scikit_image(hole):
    r, c = np.mgrid[:20, :23] / 20.0
    image = 0.5 + 0.2 * np.sin(3 * r) * np.cos(2 * c)
    missing = np.random.default_rng(0).uniform(size=image.shape) < 0.5
    if hole != "scattered":
        missing[:] = False
        missing[(slice(7, 13), slice(9, 15)) if hole == "box" else (slice(0, 4), slice(0, 5))] = True
    operator = Mask(torch.from_numpy(~missing))
    y = operator(torch.from_numpy(image)[None, None])
    found = solve(make_solver("biharmonic"), whiten(y, operator, 1e-4, scale=0.5, shift=0.25))[0, 0, 0]
    physical = (0.5 * found + 0.25).numpy()
    filled = inpaint_biharmonic(np.where(missing, 0, image), missing)
    inside = (filled > image[~missing].min()) & (filled < image[~missing].max())  # it clips to what was measured
    assert np.allclose(physical[inside], filled[inside], atol=1e-8) and inside.mean() > 0.95
    assert np.allclose(physical[~missing], image[~missing], atol=1e-14)


def test_filling_of_several_slices_with_their_own_masks():
    ramp = (torch.arange(12.0)[:, None] + 2 * torch.arange(9.0)).double()
    keep = torch.ones(3, 12, 9, dtype=torch.bool)
    keep[0, 4:7, 3:6] = keep[2, 5:8, 2:5] = False
    operator = Mask(keep)
    y = operator(ramp.expand(3, 1, 12, 9))
    y[2] *= 3
    for order in (1, 2):  # a plane is harmonic
        found = solve(make_solver("biharmonic", order=order), whiten(y, operator, 1.0))[0]
        assert torch.allclose(found, ramp * torch.tensor([1.0, 1, 3])[:, None, None, None], atol=1e-9)
        single = solve(make_solver("biharmonic", order=order), whiten(y.float(), operator, 1.0))[0]
        assert single.dtype == torch.float32 and torch.allclose(single.double(), found, atol=1e-4)
    empty = keep.clone()
    empty[1] = False
    with pytest.raises(InputError, match="no measured pixel"):
        solve(make_solver("biharmonic"), whiten(Mask(empty)(y), Mask(empty), 1.0))


def test_default_weights_follow_the_strength_of_each_slice():
    problem = matrix_problem()
    exact = [dense(problem.restrict(slice(s, s + 1))).square().sum() / 30 for s in range(2)]
    found = strength(problem, coupled=False, probes=4000).flatten()
    assert torch.allclose(found, torch.stack(exact).sqrt(), rtol=0.02)
    assert float(strength(problem, coupled=True, probes=4000)) == pytest.approx(float(sum(exact) / 2) ** 0.5, rel=0.02)
    for name, module in (("tv", tv), ("wavelet", wavelet)):
        solver = make_solver(name)
        memory = solver.init(problem, None, [1.0, 0.0], None).memory
        assert torch.allclose(memory["weight"], module.WEIGHT * strength(problem, coupled=False).sqrt())
        assert make_solver(name, weight="2.5").weight == 2.5 and make_solver(name, weight=3).weight == 3
        given = make_solver(name, weight="2.5").init(problem, None, [1.0, 0.0], None).memory["weight"]
        assert (given == 2.5).all() and given.dtype == torch.float64
        for wrong in ("heavy", "0", "nan", "-1", 0.0):
            with pytest.raises(UsageError, match="auto or a positive number"):
                make_solver(name, weight=wrong)


REFUSED = {
    "os-sart": ("needs an operator with views", [blur, sr, mri]),
    "sense-cg": ("needs an MRI operator", [blur, ct_sparse]),
    "biharmonic": ("fills missing pixels", [blur, ct_sparse, mri]),
    "zero-filled": ("does not invert", [blur, ct_sparse]),
    "fbp": ("needs a CT operator", [mri]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_solvers_refuse_operators_they_do_not_fit(name):
    words, factories = REFUSED[name]
    for factory in factories:
        operator = factory((24, 24), 1.0)
        problem = whiten(torch.zeros(1, *operator.out_shape), operator, 1.0)
        with pytest.raises(UsageError, match=words):
            make_solver(name).require(problem)


def test_options_out_of_range_are_refused():
    for name, options in {
        "cgls": {"check": 0},
        "os-sart": {"relaxation": 2.0},
        "wavelet": {"penalty": 0.0},
        "biharmonic": {"order": 3},
    }.items():
        with pytest.raises(UsageError):
            make_solver(name, **options)
