"""Non-Cartesian MRI: laws against the direct sum, Toeplitz products, maps that differ by slice."""

import math
import pickle
import sys

import numpy as np
import pytest
import torch
from noncartesian_cases import CASES, dense, gaussian, random_maps, relative

from invdiff.errors import ShapeError, UsageError
from invdiff.operators import nufft
from invdiff.operators.mri import CartesianMRI, birdcage_maps
from invdiff.operators.noncartesian import NonCartesianMRI, mri_radial
from invdiff.operators.trajectories import radial, spiral

EACH = pytest.mark.parametrize("case", CASES)


def build(case):
    return NonCartesianMRI(*CASES[case])


def stack(op):
    return () if op.slices is None else (op.slices,)


def matrices(case):
    trajectory, shape, maps = CASES[case]
    return [dense(trajectory, shape, m) for m in (maps if maps is not None and maps.ndim == 4 else [maps])]


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
