"""Non-Cartesian MRI: laws against the direct sum, Toeplitz products, trajectories and their units, gridding."""

import math
import pickle
import sys

import numpy as np
import pytest
import torch

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operators.mri import CartesianMRI, birdcage_maps
from invdiff.operators.trajectories import (
    check_trajectory,
    nyquist_spokes,
    radial,
    read_trajectory,
    spiral,
    spoke_spacing,
)

pytest.importorskip("finufft", reason="finufft is not installed (extra noncartesian)")

from invdiff.operators import nufft
from invdiff.operators.density import pipe_menon, ramp
from invdiff.operators.noncartesian import NonCartesianMRI, mri_radial


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_maps(*shape, seed=0):
    z = np.random.default_rng(seed).normal(size=(2, *shape))
    return z[0] + 1j * z[1]


def scattered(shots, samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (shots, samples, 2))


CASES = {  # (trajectory, shape, maps): odd and rectangular sizes, both ends of k-space, one coil or several
    "radial": (radial((5, 5), 4, 7, start_deg=10), (5, 5), None),
    "scattered": (scattered(3, 5), (6, 3), None),
    "one row": (scattered(2, 4, 1), (1, 4), None),
    "multi": (spiral((5, 4), 2, 9, 1.5), (5, 4), random_maps(3, 5, 4)),
    "slice-maps": (scattered(2, 6, 2), (4, 3), random_maps(3, 2, 4, 3)),
}
EACH = pytest.mark.parametrize("case", CASES)


def build(case):
    return NonCartesianMRI(*CASES[case])


def stack(op):
    return () if op.slices is None else (op.slices,)


def dense(trajectory, shape, maps):
    """Real matrix of one slice from the definition alone: rows (re, im) per coil, columns (re, im)."""
    rows, columns = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    k = trajectory.reshape(-1, 2)
    fourier = np.exp(-2j * np.pi * (np.outer(k[:, 0], rows) + np.outer(k[:, 1], columns))) / np.sqrt(rows.size)
    maps = np.ones((1, *shape)) if maps is None else maps
    a = np.concatenate([fourier * s.reshape(1, -1) for s in maps])
    return torch.from_numpy(np.block([[a.real, -a.imag], [a.imag, a.real]]))


def matrices(case):
    trajectory, shape, maps = CASES[case]
    return [dense(trajectory, shape, m) for m in (maps if maps is not None and maps.ndim == 4 else [maps])]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@EACH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_column_equals_the_direct_sum(case, dtype, tolerance):
    op = build(case)

    def columns(f, shape):
        unit = torch.eye(math.prod(shape), dtype=dtype).reshape(-1, *[1 for _ in stack(op)], *shape)
        out = f(unit.expand(-1, *stack(op), *shape))
        assert out.dtype == dtype
        out = out if stack(op) else out[:, None]
        return out.movedim(1, 0).flatten(2).double().mT

    direct, transposed = columns(op, op.in_shape), columns(op.adjoint, op.out_shape)
    normal, weights = columns(op.normal, op.in_shape), gaussian(*op.out_shape[1:], dtype=dtype).square()
    shared = columns(lambda x: op.normal(x, weights.expand(*x.shape[:-3], *op.out_shape)), op.in_shape)
    w = torch.diag(weights.double().flatten().repeat(op.out_shape[0]))
    for i, a in enumerate(matrices(case)):
        top = a.abs().max()
        assert (direct[i] - a).abs().max() < tolerance * top
        assert (transposed[i] - a.mT).abs().max() < tolerance * top
        for found, exact in ((normal[i], a.mT @ a), (shared[i], a.mT @ w @ a)):
            assert (found - exact).abs().max() < 2 * tolerance * exact.abs().max()


@EACH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_linear_and_adjoint(case, dtype, tolerance):
    op = build(case)
    x, z = (gaussian(2, *stack(op), *op.in_shape, seed=s, dtype=dtype) for s in (1, 2))
    y = gaussian(2, *stack(op), *op.out_shape, seed=3, dtype=dtype)
    assert relative(op(2 * x - 3 * z), 2 * op(x) - 3 * op(z)) < 2 * tolerance
    left, right = (op(x).double() * y.double()).sum(), (x.double() * op.adjoint(y).double()).sum()
    assert abs(left - right) < tolerance * op(x).double().norm() * y.double().norm()
    w = y.abs()
    assert torch.equal(op.normal(x, w), op.adjoint(w * op(x)))  # differ between coils: the direct way


@pytest.mark.parametrize("points", [radial((64, 48), 40), spiral((64, 48), 4, turns=6)])
@pytest.mark.parametrize("dtype, exact, adjoint", [(torch.float32, 2e-5, 1e-6), (torch.float64, 1e-12, 1e-12)])
def test_samples_are_exact_and_the_pair_adjoint_at_working_size(points, dtype, exact, adjoint):
    op = NonCartesianMRI(points, (64, 48), birdcage_maps((64, 48), 3))
    x, y = gaussian(*op.in_shape, dtype=dtype), gaussian(*op.out_shape, seed=1, dtype=dtype)
    left, right = (op(x).double() * y.double()).sum(), (x.double() * op.adjoint(y).double()).sum()
    assert abs(left - right) < adjoint * op(x).double().norm() * y.double().norm()
    some = points[1:2, ::9]
    found = NonCartesianMRI(points, (64, 48))(x)[:, 1:2, ::9].flatten().double()
    direct = dense(some, (64, 48), None) @ x.double().flatten()
    assert (found - direct).norm() < exact * direct.norm()


@pytest.mark.parametrize("shape", [(12, 9), (7, 8)])
def test_on_the_grid_it_is_cartesian_mri(shape):
    k = [(np.arange(n) - n // 2) / n for n in shape]
    grid, maps = np.stack(np.meshgrid(*k, indexing="ij"), -1), random_maps(2, *shape)
    for m in (None, maps):
        ours, full = NonCartesianMRI(grid, shape, m), CartesianMRI(np.ones(shape), m)
        x = gaussian(2, *full.in_shape, dtype=torch.float64)
        assert ours.out_shape == full.out_shape and relative(ours(x), full(x)) < 1e-12
        assert relative(ours.pinv(full(x)), x) < 1e-5  # every sample stands for 1 / (H W)
        assert ours.mean_square == pytest.approx(full.mean_square) and ours.norm == pytest.approx(full.norm, rel=1e-3)


@EACH
def test_norm_and_mean_square_equal_the_dense_ones(case):
    op, exact = build(case), matrices(case)
    assert op.norm == pytest.approx(max(float(torch.linalg.matrix_norm(a, 2)) for a in exact), rel=1e-4)
    assert op.mean_square == pytest.approx(np.mean([float(a.square().sum() / a.shape[1]) for a in exact]), rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("coils", [1, 3])
def test_toeplitz_products_equal_forward_and_adjoint(dtype, tolerance, coils):
    op = mri_radial((48, 40), 1.0, spokes=30, coils=coils)
    x = gaussian(2, *op.in_shape, dtype=dtype)
    assert relative(op.normal(x), op.adjoint(op(x))) < tolerance
    for seed in (0, 1):  # the kernel follows the weights
        weights = gaussian(*op.out_shape[1:], seed=seed, dtype=dtype).square().expand(2, *op.out_shape)
        assert relative(op.normal(x, weights), op.adjoint(weights * op(x))) < tolerance
    mixed = weights.clone()
    mixed[1, 0, 3, 5] += 1
    assert torch.equal(op.normal(x, mixed), op.adjoint(mixed * op(x)))
    assert relative(op.normal(x), op.adjoint(op(x))) < tolerance


@EACH
def test_gradients_of_both_orders_and_pickle(case):
    op = build(case)
    x = gaussian(1, *stack(op), *op.in_shape, dtype=torch.float64).requires_grad_()
    y = gaussian(1, *stack(op), *op.out_shape, dtype=torch.float64).requires_grad_()
    for f, v in ((op, x), (op.adjoint, y), (op.normal, x), (lambda v: op(v) ** 2, x)):
        assert torch.autograd.gradcheck(f, (v,), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (v,), fast_mode=True)
    weights = torch.ones_like(y).detach().requires_grad_()
    assert torch.autograd.gradcheck(op.normal, (x, weights), fast_mode=True)
    again = pickle.loads(pickle.dumps(op))
    assert torch.equal(again(x), op(x)) and torch.equal(op.to("cpu").adjoint(y), op.adjoint(y))
    assert again.norm == op.norm and torch.equal(again.pinv(y), op.pinv(y))


def test_restrict_cuts_maps_per_slice():
    op = build("slice-maps")
    x, y = gaussian(2, 3, *op.in_shape), gaussian(2, 3, *op.out_shape)
    assert op.norm > 0 and op.mean_square > 0  # cached: must not go along
    for part in (slice(0, 2), slice(2, 3), slice(0, 3, 2)):
        cut = op.restrict(part)
        for name in ("__call__", "adjoint", "normal", "pinv"):
            v = x if name in ("__call__", "normal") else y
            assert torch.equal(getattr(cut, name)(v[:, part]), getattr(op, name)(v)[:, part]), (part, name)
    cut, exact = op.restrict(slice(1, 2)), matrices("slice-maps")[1]
    assert cut.slices == 1 and cut.mean_square == pytest.approx(float(exact.square().sum() / exact.shape[1]), rel=1e-6)
    assert cut.norm == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)), rel=1e-4)
    assert np.array_equal(pickle.loads(pickle.dumps(cut)).maps, CASES["slice-maps"][2][1:2])
    op = build("multi")
    assert op.restrict(slice(1, 2)) is op and np.array_equal(op.maps, CASES["multi"][2])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape, coils", [((32, 24), 1), ((33, 25), 3)])
def test_a_slice_is_the_same_bits_in_any_group_and_with_any_threads(threads, shape, coils):
    op = mri_radial(shape, 1.0, spokes=20, coils=coils)
    x, y = gaussian(7, *op.in_shape), gaussian(7, *op.out_shape)
    for f, v in ((op, x), (op.adjoint, y), (op.normal, x), (op.pinv, y)):
        threads(1)
        alone = f(v)
        for count in (1, 3):
            threads(count)
            for group in (1, 3, 7):
                assert torch.equal(torch.cat([f(part) for part in v.split(group)]), alone), (f, group, count)
    assert op(x[:0]).shape == (0, *op.out_shape) and op.adjoint(y[:0]).shape == op.normal(x[:0]).shape == x[:0].shape


def disc(shape, radius=0.7):
    y, x = (np.arange(n) - n // 2 for n in shape)
    return torch.from_numpy((np.hypot(x, y[:, None]) < radius * min(shape) / 2).astype(np.float32))


@pytest.mark.parametrize("trajectory", ["radial", "golden", "spiral"])
@pytest.mark.parametrize("coils", [1, 4])
def test_gridding_returns_a_disc_at_its_value(trajectory, coils):
    shape = (64, 64)
    op = mri_radial(shape, 1.0, trajectory=trajectory, spokes=8 if trajectory == "spiral" else 120, coils=coils)
    x = torch.stack([disc(shape), -0.5 * disc(shape)])
    found, inside = op.pinv(op(x)), disc(shape, 0.5) > 0
    assert abs(float(found[0][inside].mean()) - 1) < 0.02 and abs(float(found[1][inside].mean()) + 0.5) < 0.01
    assert abs(float(found[0][disc(shape, 0.9) == 0].mean())) < 0.02
    assert op.pinv_kind == "zero-filled"


def test_areas_of_spokes_are_the_band_limited_ramp():
    for points in (radial((40, 30), 7), radial((40, 30), 12, 81, golden=True, start_deg=5), radial((3, 3), 3, 10)):
        (_, radius, step), area = spoke_spacing(points), ramp(points)
        assert area.sum() == pytest.approx(np.pi / 4, rel=1e-12) and (area > 0).all()  # of the whole disc
        n = len(radius)
        lag = np.arange(n) - n // 2
        kernel = np.where(
            lag % 2, -1 / (np.pi * np.where(lag, lag, 1)) ** 2, 0.25 * (lag == 0)
        )  # of filtered backprojection
        exact = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(kernel))).real * step
        assert np.allclose(area / area.sum(1, keepdims=True), exact / exact.sum())
    angle = [0, 10, 50, 120]  # each spoke stands for half the way to its neighbours: 120 to 180 + 0, and so on
    points = np.concatenate([radial((8, 8), 1, start_deg=a) for a in angle])
    assert np.allclose(ramp(points).sum(1) / np.pi * 720, [35, 25, 55, 65])
    assert np.allclose(ramp(points[::-1]), ramp(points)[::-1])
    twice = np.concatenate([points, points])
    assert np.allclose(ramp(twice).reshape(2, 4, -1).sum(0), ramp(points))  # measured twice: half each
    with pytest.raises(UsageError, match="evenly sampled spokes"):
        ramp(spiral((40, 30), 3))


def test_pipe_menon_agrees_with_closed_forms_and_is_a_fixed_point():
    shape = (48, 48)
    points = radial(shape, 90)
    k, found, exact = np.hypot(*np.moveaxis(points, -1, 0)), pipe_menon(points, shape), ramp(points)
    middle = (k > 0.05) & (k < 0.4)
    assert np.abs(found / exact - 1)[middle].mean() < 0.02 and found.sum() == pytest.approx(np.pi / 4, rel=0.04)
    points = spiral(shape, 4)
    near = np.hypot(*(points[:, :, None] - points[2, 100:140]).transpose(3, 0, 1, 2)) < 0.08
    area = pipe_menon(points, shape)
    for j in range(40):  # samples within a small disc stand for its area
        assert area[near[..., j]].sum() == pytest.approx(np.pi * 0.08**2, rel=0.1)
    assert area.sum() == pytest.approx(np.pi / 4, rel=0.02)


def test_density_is_an_option():
    points = radial((20, 20), 30)
    own = NonCartesianMRI(points, (20, 20), density=2 * ramp(points))
    plain, pipe = (NonCartesianMRI(points, (20, 20), density=name) for name in ("auto", "pipe"))
    y = own(gaussian(*own.in_shape))
    assert torch.equal(own.pinv(y), 2 * plain.pinv(y)) and relative(pipe.pinv(y), plain.pinv(y)) < 0.2
    assert plain.density is plain.density and np.array_equal(plain.density, ramp(points))
    with pytest.raises(UsageError, match=r"unknown density 'voronoi': choose one of auto, pipe, ramp"):
        NonCartesianMRI(points, (20, 20), density="voronoi")
    with pytest.raises(ShapeError, match=r"one area per sample, \(30, 40\), got \(40, 30\)"):
        NonCartesianMRI(points, (20, 20), density=ramp(points).T)
    with pytest.raises(InputError, match="finite, not negative"):
        NonCartesianMRI(points, (20, 20), density=-ramp(points))


def test_pinv_is_zero_where_no_coil_sees():
    trajectory, shape, maps = CASES["multi"]
    maps = maps.copy()
    maps[:, 1, 2] = 0
    op = NonCartesianMRI(trajectory, shape, maps)
    y = gaussian(*op.out_shape, dtype=torch.float64)
    x, total = op.pinv(y), torch.from_numpy((abs(maps) ** 2).sum(0))
    assert torch.isfinite(x).all() and not x[:, 1, 2].any()
    assert torch.allclose(x * total, op.adjoint(20 * op.density * y), atol=1e-12)


def test_spokes_run_through_the_centre_at_their_angles():
    points = radial((6, 8), 4, start_deg=30)
    assert points.shape == (4, 16, 2) and np.abs(points).max() <= 0.5 and not points[:, 8].any()
    assert np.allclose(points[1, :, 1], np.cos(np.deg2rad(75)) * (np.arange(16) - 8) / 16)
    assert np.allclose(points[1, :, 0], np.sin(np.deg2rad(75)) * (np.arange(16) - 8) / 16)
    angle = np.rad2deg(spoke_spacing(radial((6, 8), 5, golden=True))[0])
    assert np.allclose(angle, 111.24611797 * np.arange(5) % 180)
    assert spoke_spacing(points + 0.01) is None and spoke_spacing(points[:, 8:]) is None
    assert mri_radial((6, 8), 1.0, spokes=4).acceleration == pytest.approx(np.pi) == nyquist_spokes((6, 8)) / 4


def test_spirals_reach_the_edge_in_steps_of_the_grid():
    points = spiral((64, 48), 4, start_deg=20)
    radius, steps = np.hypot(*np.moveaxis(points, -1, 0)), np.linalg.norm(np.diff(points, axis=1), axis=-1)
    assert not points[:, 0].any() and np.allclose(radius[:, -1], 0.5)
    assert (steps < 1.001 / 64).all() and steps[:, 10:].min() > 0.99 / 64  # constant speed; chords cut the inmost bends
    turn = np.unwrap(np.arctan2(points[0, 1:, 0], points[0, 1:, 1]))
    assert turn[-1] == pytest.approx(np.deg2rad(20) + 2 * np.pi * 8, abs=1e-6)  # 4 x 8 turns: 1 / 64 apart
    turned = points[0] @ np.array([[0, -1], [1, 0]])  # by 90 degrees
    assert np.allclose(points[1], turned, atol=1e-12) or np.allclose(points[1], -turned, atol=1e-12)
    full, half = (mri_radial((64, 64), 1.0, trajectory="spiral", spokes=4, turns=t) for t in (8, 4))
    assert full.acceleration == pytest.approx(1, rel=0.05) and half.acceleration == pytest.approx(2, rel=0.05)


def test_other_units_are_refused_by_name():
    points = radial((64, 48), 5)
    for factor, words in (
        (2 * np.pi, r"reaches 3\.142: probably radians per pixel, divide it by 2 pi"),
        (2, "relative to the largest frequency, divide it by 2"),
        (64, "cycles per field of view, divide it by the 64 pixels"),
        (1 / 0.001, "probably 1/m, multiply it by the pixel size in m"),
    ):
        with pytest.raises(InputError, match=words):
            NonCartesianMRI(factor * points, (64, 48))
    assert np.array_equal(check_trajectory(points.astype(np.float32), (64, 48)), points.astype(np.float32))


def test_bad_trajectories_are_refused(tmp_path):
    points = radial((8, 8), 3)
    for bad in (points[0], points[..., :1], points[:, :0]):
        with pytest.raises(ShapeError, match=r"is \(shots, samples, 2\)"):
            NonCartesianMRI(bad, (8, 8))
    for bad in (np.where(points == 0, np.nan, points), points.astype(complex)):
        with pytest.raises(InputError, match="must be real and finite"):
            NonCartesianMRI(bad, (8, 8))
    np.save(tmp_path / "k.npy", points)
    assert np.array_equal(read_trajectory(tmp_path / "k.npy", (8, 8)), points)
    for name in ("none.npy", "k.txt", "rosette"):
        with pytest.raises(InputError, match="trajectory file .*" + name):
            mri_radial((8, 8), 1.0, trajectory=str(tmp_path / name))
    for options, words in (
        ({"spokes": 0}, "spokes must be a whole number from 1, got 0"),
        ({"spokes": 2.5}, "got 2.5"),
        ({"samples": 0}, "samples per spoke must be a whole number from 2"),
        ({"start": math.nan}, "must be finite, in degrees"),
        ({"trajectory": "spiral", "turns": 0}, "turns of a spiral must be positive"),
        ({"turns": 3}, "turns: trajectory 'radial' has no such option"),
        ({"trajectory": str(tmp_path / "k.npy"), "spokes": 3, "start": 0.0}, "spokes, start: trajectory .* drop"),
        ({"coils": 0}, "coils must be a whole number from 1"),
    ):
        with pytest.raises(UsageError, match=words):
            mri_radial((8, 8), 1.0, **options)
    from_file = mri_radial((8, 8), 1.0, trajectory=str(tmp_path / "k.npy"))
    assert np.array_equal(from_file.trajectory, points) and "3 shots of 16 samples, 8 x 8" in from_file.describe()


def test_bad_input_is_refused(monkeypatch):
    trajectory, shape, maps = CASES["slice-maps"]
    op = build("slice-maps")
    for f in (op, op.normal):
        with pytest.raises(
            ShapeError, match=r"NonCartesianMRI expects images \(\.\.\., 3, 2, 4, 3\), got \(2, 2, 4, 3"
        ):
            f(torch.zeros(2, 2, 4, 3))
        with pytest.raises(UsageError, match=r"float32 or float64, got torch\.float16"):
            f(torch.zeros(3, 2, 4, 3, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"expects measurements \(\.\.\., 3, 4, 2, 6\), got \(1, 4, 2, 6\)"):
        op.adjoint(torch.zeros(1, 4, 2, 6))
    with pytest.raises(UsageError, match="is on cpu and its input on meta"):
        op(torch.zeros(3, 2, 4, 3, device="meta"))
    with pytest.raises(ShapeError, match=r"NonCartesianMRI expects coil maps \(coils, 4, 3\)"):
        NonCartesianMRI(trajectory, shape, maps.transpose(0, 1, 3, 2))
    with pytest.raises(UsageError, match="must be complex"):
        NonCartesianMRI(trajectory, shape, maps.real)
    with pytest.raises(UsageError, match=r"shape must be \(H, W\)"):
        NonCartesianMRI(trajectory, (4, 3, 1))
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(UsageError, match=r"needs finufft, which is not installed: pip install invdiff\[noncartesian\]"):
        mri_radial((8, 8), 1.0)

    def broken(name):
        raise ImportError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(nufft, "import_module", broken)
    with pytest.raises(UsageError, match=r"needs finufft, which cannot be loaded \(libcudart.so.12: .* file\): pip"):
        mri_radial((8, 8), 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_agrees_with_cpu():
    pytest.importorskip("cufinufft", reason="cufinufft cannot be used (extra noncartesian-cuda)", exc_type=ImportError)
    for coils in (1, 3):
        op = mri_radial((48, 40), 1.0, spokes=30, coils=coils)
        there = op.to("cuda")
        for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-11)):
            x, y = gaussian(5, *op.in_shape, dtype=dtype), gaussian(5, *op.out_shape, dtype=dtype)
            for name, v in (("forward", x), ("adjoint", y), ("normal", x), ("pinv", y)):
                assert relative(getattr(there, name)(v.cuda()).cpu(), getattr(op, name)(v)) < tolerance, name
