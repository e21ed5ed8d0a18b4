"""Laws of every operator: linear, adjoint, dense, normal, prox, pinv, norms, refusals, copies, groups, restriction."""

import pickle

import numpy as np
import pytest
import torch
from operator_registry import BY_HAND, LIBRARY, NAMES, TABLE, VARIANTS, case
from torch.autograd import forward_ad

from invdiff.errors import ShapeError
from invdiff.operators import OPERATORS
from invdiff.operators.blur import WIENER, Blur
from invdiff.operators.mri import CartesianMRI

PRECISION = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
EVERY = pytest.mark.parametrize("name", [*NAMES, *LIBRARY])
BOTH = pytest.mark.parametrize("dtype, tolerance", PRECISION)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_nothing_of_the_table_is_left_out():
    assert {name for name, *_ in TABLE} == set(OPERATORS) and len(set(NAMES)) == len(NAMES)
    for name, entry in OPERATORS.items():
        for option in set(VARIANTS) & set(entry.options):
            tried = {options.get(option, entry.options[option][0]) for n, _, options in TABLE if n == name}
            assert set(VARIANTS[option]) <= tried, (name, option)
    assert {type(case(name).op) for name in [*NAMES, *LIBRARY]} == set(BY_HAND)


@EVERY
@BOTH
def test_linear_and_adjoint(name, dtype, tolerance):
    c = case(name)
    x, z, y = c.x(2, 3, dtype=dtype), c.x(2, 3, seed=3, dtype=dtype), c.y(2, 3, dtype=dtype)
    ax, aty = c.op(x), c.op.adjoint(y)
    assert ax.dtype == aty.dtype == dtype and ax.shape == y.shape and aty.shape == x.shape and ax.device == x.device
    assert relative(c.op(2 * x - 3 * z), 2 * ax - 3 * c.op(z)) < tolerance
    left, right = (ax.double() * y.double()).sum(), (x.double() * aty.double()).sum()
    assert abs(left - right) < tolerance * ax.double().norm() * y.double().norm()
    assert relative(c.op.vjp(x, y), aty) < tolerance


@EVERY
@BOTH
def test_every_column_and_every_row_equals_the_dense_matrix(name, dtype, tolerance):
    c = case(name)
    tolerance = max(tolerance, c.tolerance)
    direct = c.columns(c.op, c.op.in_shape, c.op.out_shape, dtype)
    transposed = c.columns(c.op.adjoint, c.op.out_shape, c.op.in_shape, dtype)
    assert len(direct) == len(c.matrices)
    for a, found, back in zip(c.matrices, direct, transposed, strict=True):
        assert (found - a).abs().max() < tolerance * a.abs().max()
        assert (back - a.T).abs().max() < tolerance * a.abs().max()


@EVERY
def test_norm_and_mean_square_equal_the_dense_ones(name):
    c = case(name)
    exact = max(float(torch.linalg.matrix_norm(a, 2)) for a in c.matrices)
    assert c.op.norm == pytest.approx(exact, rel=1e-9 if c.closed else 1e-3)
    mean = np.mean([float(a.square().sum() / a.shape[1]) for a in c.matrices])
    assert c.op.mean_square == pytest.approx(mean, rel=1e-9 if c.closed else 1e-6)


@EVERY
@BOTH
def test_normal_is_adjoint_times_weights_times_forward(name, dtype, tolerance):
    c = case(name)
    x, w = c.x(2, dtype=dtype), c.y(2, dtype=dtype).abs()
    assert relative(c.op.normal(x), c.op.adjoint(c.op(x))) < tolerance
    assert relative(c.op.normal(x, w), c.op.adjoint(w * c.op(x))) < tolerance


@EVERY
@BOTH
def test_gram_is_forward_times_adjoint(name, dtype, tolerance):
    c = case(name)
    y = c.y(2, dtype=dtype)
    assert relative(c.op.gram(y), c.op(c.op.adjoint(y))) < tolerance


@EVERY
def test_row_squares_are_the_diagonal_of_gram(name):
    c = case(name)
    if c.op.row_squares is None:
        assert not hasattr(getattr(c.op, "operator", c.op), "sensitivities")
        return
    dense = torch.stack([a.square().sum(1) for a in c.matrices]).reshape(-1, *c.op.out_shape)
    rows = c.op.row_squares.double().reshape(-1, *c.op.out_shape)
    assert float(rows.sum()) == pytest.approx(float(dense.sum()), rel=1e-5)
    assert relative(rows, dense) < 0.3


@pytest.mark.parametrize("name", [name for name in [*NAMES, *LIBRARY] if case(name).claims("prox")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_prox_is_the_dense_minimiser(name, dtype, tolerance):
    c = case(name)
    closed = c.closed or (isinstance(c.op, CartesianMRI) and c.op.maps is None)
    tolerance = tolerance if closed else max(tolerance, 1e-8)  # else by conjugate gradients
    z, y = c.x(3, dtype=dtype), c.y(3, dtype=dtype)
    flat_z, flat_y = c.per_slice(z, c.op.in_shape), c.per_slice(y, c.op.out_shape)
    for weight in (0.3, 1.7):
        u = c.op.prox(z, y, weight)
        assert u.dtype == dtype and u.shape == z.shape
        for a, found, zs, ys in zip(c.matrices, c.per_slice(u, c.op.in_shape), flat_z, flat_y, strict=True):
            system = a.T @ a + weight * torch.eye(a.shape[1], dtype=torch.float64)
            assert relative(found, torch.linalg.solve(system, (ys @ a + weight * zs).T).T) < tolerance
    each = torch.tensor([0.3, 0.7, 1.7], dtype=dtype).reshape(3, *[1 for _ in (*c.batch, *c.op.in_shape)])
    parts = torch.stack([c.op.prox(z[k], y[k], float(each[k].flatten()[0])) for k in range(3)])
    assert relative(c.op.prox(z, y, each), parts) < max(tolerance, 1e-6)


@pytest.mark.parametrize("name", [name for name in [*NAMES, *LIBRARY] if case(name).claims("pinv")])
@BOTH
def test_pinv_is_what_its_kind_says(name, dtype, tolerance):
    """Linear always; an exact statement for every kind but fbp and bicubic, which are approximations (test_ct, ...)."""
    c, op = case(name), case(name).op
    y, other = c.y(2, dtype=dtype), c.y(2, seed=3, dtype=dtype)
    u = op.pinv(y)
    assert u.dtype == dtype and u.shape == c.x(2).shape
    loose = isinstance(op, Blur) and not op.closed_form  # by conjugate gradients
    assert relative(op.pinv(2 * y - 3 * other), 2 * u - 3 * op.pinv(other)) < (1e-4 if loose else 3 * tolerance)
    flat_u, flat_y = c.per_slice(u, op.in_shape), c.per_slice(y, op.out_shape)
    for a, found, data in zip(c.matrices, flat_u, flat_y, strict=True):
        if op.pinv_kind == "wiener":
            w = WIENER * op._gain
            system = a.T @ a + w * torch.eye(len(a.T), dtype=torch.float64)
            exact = torch.linalg.solve(system, (data @ a + w * data).T).T
            assert relative(found, exact) < max(
                20 * tolerance, 1e-7 if loose else 0, 1e-4 if dtype.itemsize == 4 else 0
            )
        if op.pinv_kind == "fill":
            assert relative(found @ a.T, data @ a.T) < tolerance
        if op.pinv_kind == "measured" or (isinstance(op, CartesianMRI) and op.maps is None):
            assert relative(found, data @ torch.linalg.pinv(a).T) < tolerance


@EVERY
def test_refusals_name_the_operator_and_both_shapes(name):
    op = case(name).op
    for f, what, shape in ((op, "images", op.in_shape), (op.adjoint, "measurements", op.out_shape)):
        for got in ((2, *shape[:-1], shape[-1] + 1), shape[1:]):
            want = ", ".join(map(str, shape))
            with pytest.raises(ShapeError) as refused:
                f(torch.zeros(got))
            assert str(refused.value) == f"{type(op).__name__} expects {what} (..., {want}), got {tuple(got)}"


@EVERY
def test_pickled_and_moved_it_is_the_same(name):
    c = case(name)
    x, y = c.x(2), c.y(2)
    for other in (pickle.loads(pickle.dumps(c.op)), c.op.to("cpu")):
        assert torch.equal(other(x), c.op(x)) and torch.equal(other.adjoint(y), c.op.adjoint(y))
        assert (other.in_shape, other.out_shape, other.slicewise) == (c.op.in_shape, c.op.out_shape, c.op.slicewise)
        assert other.norm == c.op.norm


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_is_the_same_bits_in_any_group(name, dtype):
    for f, v in case(name).maps(dtype):
        assert torch.equal(torch.cat([f(part) for part in v.split([1, 3, 1])]), f(v))


@EVERY
def test_restrict_cuts_the_parameters_of_slices(name):
    c = case(name)
    if c.slices is None:
        assert c.op.restrict(slice(0, 1))(c.x(2)).equal(c.op(c.x(2)))
        return
    norm, mean = c.op.norm, c.op.mean_square  # cached: must not go along
    for part in (slice(0, 2), slice(2, 3), slice(0, 3, 2)):
        cut = c.op.restrict(part)
        x, y = c.x(2), c.y(2)
        for f, g, v in ((c.op, cut, x), (c.op.adjoint, cut.adjoint, y), (c.op.normal, cut.normal, x)):
            assert torch.equal(g(v[:, part]), f(v)[:, part])
        mine = c.matrices[part]
        assert cut.norm == pytest.approx(max(float(torch.linalg.matrix_norm(a, 2)) for a in mine), rel=1e-3)
        assert cut.mean_square == pytest.approx(np.mean([float(a.square().sum() / a.shape[1]) for a in mine]), rel=1e-6)
    assert (c.op.norm, c.op.mean_square) == (norm, mean)


@EVERY
def test_empty_batches_and_gradients(name):
    c = case(name)
    assert c.op(c.x(0)).shape == c.y(0).shape and c.op.adjoint(c.y(0)).shape == c.x(0).shape
    x, y = c.x(1).requires_grad_(), c.y(1).requires_grad_()
    for f, v in ((c.op, x), (c.op.adjoint, y)):
        assert torch.autograd.gradcheck(f, (v,), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (v,), fast_mode=True)


def tangent(op, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(x, v))).tangent


@EVERY
@pytest.mark.parametrize("gradients", [True, False])
def test_derivatives_of_other_kinds_are_refused_or_right(name, gradients):
    """Forward mode and the transforms of torch.func, which ask for derivatives without gradients, too."""
    c = case(name)
    x, v = c.x(2), c.x(2, seed=4)
    expected = c.op(x.clone().requires_grad_()).detach(), c.op(v)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(c.op(x), expected[0])
        for k, derive in (
            (1, lambda: tangent(c.op, x, v)),
            (1, lambda: torch.func.jvp(c.op, (x,), (v,))[1]),
            (0, lambda: torch.func.vmap(c.op)(x)),
        ):
            try:
                found = derive()
            except (NotImplementedError, RuntimeError) as error:
                assert "autograd.Function" in str(error), error
            else:
                assert relative(found, expected[k]) < 1e-10
