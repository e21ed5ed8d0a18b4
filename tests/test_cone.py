"""Cone beam: dense weights from source and panel points, chords of balls, the fan of the middle plane."""

import logging
from dataclasses import replace

import pytest
import torch
from cone_cases import BLOBS, TINY, ball_image, blob_image, blobs, chords, gaussian, joseph_by_hand, relative

from invdiff.operators import build, lines
from invdiff.operators.cone import ConeGeometry
from invdiff.operators.ct import CTFan
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.rays import equispaced


@pytest.fixture(params=["torch", "numba"])
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(lines, "_compiled", lambda: None)


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_every_column_equals_the_dense_matrix(backend, case, dtype, tolerance):
    op, dense = CTCone(*case), joseph_by_hand(*case)
    m, n = dense.shape
    direct = op(torch.eye(n, dtype=dtype).reshape(n, *op.in_shape)).reshape(n, m).T
    transposed = op.adjoint(torch.eye(m, dtype=dtype).reshape(m, *op.out_shape)).reshape(m, n)
    assert (direct.double() - dense).abs().max() < tolerance * dense.max()
    assert (transposed.double() - dense).abs().max() < tolerance * dense.max()
    assert op.mean_square == pytest.approx(float(dense.square().sum() / n), rel=1e-9)
    assert op.norm == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-3)
    rows, columns = op.sensitivities(torch.float64)
    assert torch.allclose(rows.flatten(), dense.sum(1)) and torch.allclose(columns.flatten(), dense.sum(0))


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_linear_and_adjoint(backend, case, dtype, tolerance):
    op = CTCone(*case)
    x, z = (gaussian(2, *op.in_shape, seed=s, dtype=dtype) for s in (1, 2))
    y = gaussian(2, *op.out_shape, seed=3, dtype=dtype)
    assert relative(op(2 * x - 3 * z), 2 * op(x) - 3 * op(z)) < tolerance
    for a, u, v in ((op, x, y), (op._backprojection, y, x)):
        left, right = (a(u).double() * v.double()).sum(), (u.double() * a.adjoint(v).double()).sum()
        assert abs(left - right) < tolerance * a(u).double().norm() * v.double().norm()
    assert torch.equal(op.normal(x, y.abs()), op.adjoint(y.abs() * op(x)))
    assert torch.equal(op(x[:1]), op(x)[:1]) and torch.equal(op.adjoint(y[0]), op.adjoint(y)[0])
    assert torch.equal(op.fbp(y[0]), op.fbp(y)[0]) and op(x[:0]).shape == (0, *op.out_shape)


def test_gradients(backend):
    op = CTCone((3, 3, 4), (1.0, 1.2, 0.9), ConeGeometry(equispaced(3, 360), 4, 3, 2.0, 1.5, 9.0, 14.0))
    x = gaussian(*op.in_shape, dtype=torch.float64).requires_grad_()
    y = gaussian(*op.out_shape, dtype=torch.float64).requires_grad_()
    for f, v in ((op, x), (op.adjoint, y), (op.fbp, y)):
        assert torch.autograd.gradcheck(f, (v,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: op(v.square()), (x,), fast_mode=True)


def test_numba_equals_torch_with_any_number_of_threads(monkeypatch):
    pytest.importorskip("numba")
    op = build("ct-sparse", (12, 24, 20), (1.5, 1.0, 1.1), geometry="cone", views=10)
    assert lines._backend(op._walks[0].lines, torch.zeros(1)) is not lines.Torch
    inputs, threads = (
        (gaussian(*op.in_shape), gaussian(*op.out_shape), gaussian(*op.out_shape)),
        torch.get_num_threads(),
    )
    results = {}
    for count in (1, 3):
        torch.set_num_threads(count)
        results[count] = [f(v) for f, v in zip((op, op.adjoint, op.fbp), inputs, strict=True)]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))
    monkeypatch.setattr(lines, "_compiled", lambda: None)
    for f, v, expected in zip((op, op.adjoint, op.fbp), inputs, results[1], strict=True):
        assert relative(f(v), expected) < 1e-6


def test_torch_in_blocks_and_chunks_equals_torch_at_once(monkeypatch):
    monkeypatch.setattr(lines, "_compiled", lambda: None)
    op = CTCone(*TINY[0])
    x, y = gaussian(*op.in_shape, dtype=torch.float64), gaussian(*op.out_shape, dtype=torch.float64)
    whole = op(x), op.adjoint(y), op.fbp(y)
    monkeypatch.setattr(lines, "BLOCK", 40)
    monkeypatch.setattr(lines, "TABLE", 100)
    assert all(relative(a, b) < 1e-14 for a, b in zip((op(x), op.adjoint(y), op.fbp(y)), whole, strict=True))


def test_a_hint_appears_once_where_numba_would_help(monkeypatch, caplog):
    monkeypatch.setattr(lines, "_compiled", lambda: None)
    monkeypatch.setattr(lines, "LARGE", 0)
    lines._hint.cache_clear()
    op = CTCone(*TINY[0])
    with caplog.at_level(logging.WARNING, "invdiff"):
        op(torch.zeros(2, *op.in_shape))
    assert [r.message for r in caplog.records if "invdiff[fast]" in r.message] == [
        "cone beam on the CPU is 6 to 11 times as fast with numba: pip install 'invdiff[fast]'"
    ]


@pytest.mark.parametrize("rotation", ["counterclockwise", "clockwise"])
def test_chords_of_balls_fix_angle_sense_and_detector_directions(rotation):
    balls = [(11.0, 16.0, 5.0, 6.0, 1.0), (-18.0, -5.0, -7.0, 5.0, 2.0)]
    g = ConeGeometry(equispaced(7, 360, 4), 71, 31, 2.4, 2.2, 90.0, 160.0, 0.3, 1.1, rotation)
    shape, voxel = (26, 56, 70), (1.2, 1.0, 0.8)
    measured = CTCone(shape, voxel, g)(ball_image(shape, voxel, balls))
    assert relative(measured, chords(g, balls)) < 0.1  # balls of 5 and 6 voxels; see the blobs below
    wrong = [chords(replace(g, views_deg=tuple(-v for v in g.views_deg)), balls), chords(g, balls).flip(-1)]
    wrong += [chords(g, balls).flip(0), chords(replace(g, detector_row_offset_mm=-1.1), balls)]
    assert min(relative(measured, other) for other in wrong) > 0.3


@pytest.mark.parametrize("axis", [0.0, 5.0])
def test_line_integrals_of_blobs_are_right_to_second_order(axis):
    g = ConeGeometry(equispaced(5, 360, 9), 41, 25, 2.2, 2.3, 60.0, 110.0, 0.4, -0.6, axis_offset_mm=axis)
    exact, errors = blobs(g, BLOBS), []
    for n in (1, 2):
        shape, voxel = (24 * n, 30 * n, 28 * n), (1.2 / n, 1.0 / n, 1.1 / n)
        errors.append(relative(CTCone(shape, voxel, g)(blob_image(shape, voxel, BLOBS)), exact))
    assert errors[0] < 0.02 and 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("axis", [0.0, 1.3])
def test_the_middle_plane_is_the_fan_beam(axis):
    (_, *plane), (_, *pixel), g = TINY[0]
    g = replace(g, detector_row_offset_mm=0.0, axis_offset_mm=axis)
    cone, fan = CTCone((5, *plane), (1.1, *pixel), g), CTFan(tuple(plane), tuple(pixel), g.fan)
    x, y = gaussian(2, *cone.in_shape, dtype=torch.float64), gaussian(2, *cone.out_shape, dtype=torch.float64)
    assert relative(cone(x)[:, 2], fan(x[:, 2])) < 1e-8  # the fan beam drops weights below 1e-9
    assert relative(cone.fbp(y)[:, 2], fan.fbp(y[:, 2])) < 1e-12
    shifted = CTCone((5, *plane), (1.1, *pixel), replace(g, detector_row_offset_mm=3.4))  # two rows
    assert relative(shifted(x)[:, 0], fan(x[:, 2])) < 1e-8
