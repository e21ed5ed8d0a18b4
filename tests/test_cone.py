"""Cone beam: dense weights from source and panel points, chords of balls, the fan of the middle plane, FDK, files."""

import json
import logging
import math
import pickle
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.coupling import data_step, point_spectrum
from invdiff.errors import UsageError
from invdiff.operators import build, lines, resolve
from invdiff.operators.cone import ConeGeometry
from invdiff.operators.ct import CTFan, scanner_from_dict
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.rays import equispaced
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.simulate import panel_projections, simulate_ct
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate

MU_WATER = 0.0193  # 1/mm
TINY = [  # shape, voxel (slice, row, column) mm, geometry: odd, rectangular, anisotropic, shifted, truncated, steep
    ((3, 4, 5), (1.1, 1.3, 0.8), ConeGeometry(equispaced(4, 360, 5), 7, 5, 1.9, 1.7, 17.0, 31.0, 0.35, -0.4)),
    ((3, 5, 3), (0.4, 0.5, 1.0), ConeGeometry((0.0, 90.0, -30.0), 5, 4, 1.1, 0.5, 4.4, 6.0, -0.9, 0.7, "clockwise")),
    ((4, 3, 3), (1.6, 1.0, 1.0), ConeGeometry(equispaced(2, 240), 5, 12, 1.5, 0.3, 9.0, 14.0)),
    ((1, 4, 4), (1.0, 1.0, 1.0), ConeGeometry(equispaced(3, 180), 5, 1, 1.5, 3.0, 9.0, 14.0)),
]


@pytest.fixture(params=["torch", "numba"])
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(lines, "_compiled", lambda: None)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def ends(g):
    """Source ``(views, 3)`` and panel points ``(rows, views, columns, 3)`` by the definition alone, (x, y, z) in mm."""
    b = np.deg2rad(g.views_deg) * (-1 if g.rotation == "clockwise" else 1)
    down, right = np.stack([np.sin(b), -np.cos(b), 0 * b], -1), np.stack([np.cos(b), np.sin(b), 0 * b], -1)
    u = (np.arange(g.detector_count) - (g.detector_count - 1) / 2) * g.detector_pitch_mm + g.detector_offset_mm
    v = (np.arange(g.detector_rows) - (g.detector_rows - 1) / 2) * g.detector_row_pitch_mm + g.detector_row_offset_mm
    source = g.source_axis_mm * down
    middle = source - g.source_detector_mm * down
    panel = middle[None, :, None] + u[:, None] * right[None, :, None]
    return source, panel + v[:, None, None, None] * np.array([0, 0, 1.0])


def joseph_by_hand(shape, voxel, geometry):
    """Dense A: where each ray meets the planes of rows (or columns), products of hat functions of the distances."""
    (slices, height, width), (dz, dy, dx) = shape, voxel
    z, x = (np.arange(slices) - (slices - 1) / 2) * dz, (np.arange(width) - (width - 1) / 2) * dx
    y = ((height - 1) / 2 - np.arange(height)) * dy
    source, panel = ends(geometry)
    rows = []
    for (_, v, _), e in zip(np.ndindex(*panel.shape[:3]), panel.reshape(-1, 3), strict=True):
        s, r = source[v], e - source[v]
        by_rows = abs(r[1]) / dy >= abs(r[0]) / dx
        at = (y - s[1]) / r[1] if by_rows else (x - s[0]) / r[0]
        other = (s[0] + at * r[0])[:, None] - x if by_rows else (s[1] + at * r[1])[:, None] - y
        hat = np.maximum(0, 1 - np.abs(other) / (dx if by_rows else dy))
        hat = hat if by_rows else hat.T  # (H, W)
        deep = np.maximum(0, 1 - np.abs((s[2] + at * r[2])[None] - z[:, None]) / dz)  # (S, planes)
        deep = deep[:, :, None] if by_rows else deep[:, None, :]
        length = np.linalg.norm(r) * (dy / abs(r[1]) if by_rows else dx / abs(r[0]))
        rows.append((length * deep * hat).ravel())
    return torch.from_numpy(np.stack(rows))


def chords(geometry, balls):
    """Lengths of rays inside balls (x, y, z, radius, value) times their values, shaped like a measurement."""
    source, panel = ends(geometry)
    e = panel - source[None, :, None]
    e = e / np.linalg.norm(e, axis=-1, keepdims=True)
    total = 0
    for x, y, z, r, value in balls:
        c = np.array([x, y, z]) - source[None, :, None]
        distance = np.linalg.norm(np.cross(c, e), axis=-1)
        total = total + 2 * value * np.sqrt(np.maximum(r**2 - distance**2, 0))
    return torch.from_numpy(total)[:, None]


def ball_image(shape, voxel, balls, fine=3):
    axes = [(np.arange(n * fine) - (n * fine - 1) / 2) * d / fine for n, d in zip(shape, voxel, strict=True)]
    z, y, x = axes[0][:, None, None], -axes[1][:, None], axes[2]
    image = sum(v * ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < r**2) for cx, cy, cz, r, v in balls)
    s, h, w = shape
    return torch.from_numpy(image.reshape(s, fine, h, fine, w, fine).mean((1, 3, 5)))[:, None]


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


@pytest.mark.parametrize(
    ("compiled", "geometry", "large"), [(None, "cone", 0), (None, "cone", 10**9), (None, "fan", 0), (1, "cone", 0)]
)
def test_a_run_says_once_that_numba_would_help(run, here, monkeypatch, caplog, compiled, geometry, large):
    """On the terminal and in the manifest, only for a cone beam on the CPU without numba."""
    caplog.set_level(logging.WARNING, "invdiff")
    if compiled is None:
        monkeypatch.setattr(lines, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
    monkeypatch.setattr(lines, "LARGE", large)
    lines._hint.cache_clear()
    options = ("--op", "ct-sparse", "--views", "8", "--geometry", geometry, "--simulate", "--solver", "fbp")
    code, out, err = run("reconstruct", "$/ct.nii.gz", *options, "-o", "r.nii.gz")
    expected = compiled is None and geometry == "cone"
    assert (code, out.count("invdiff[fast]"), err) == (0, int(expected), "")
    assert json.loads((here / "r.json").read_text())["warnings"].count(lines.HINT) == int(expected)


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


def blobs(g, parts):
    """Line integrals of Gaussian blobs (x, y, z, sigma, value), shaped like a measurement."""
    source, panel = ends(g)
    e = panel - source[None, :, None]
    e = e / np.linalg.norm(e, axis=-1, keepdims=True)
    total = 0
    for x, y, z, sigma, value in parts:
        distance = np.linalg.norm(np.cross(np.array([x, y, z]) - source[None, :, None], e), axis=-1)
        total = total + value * sigma * math.sqrt(2 * math.pi) * np.exp(-(distance**2) / (2 * sigma**2))
    return torch.from_numpy(total)[:, None]


def blob_image(shape, voxel, parts):
    z, y, x = ((np.arange(n) - (n - 1) / 2) * d for n, d in zip(shape, voxel, strict=True))
    z, y, square = z[:, None, None], -y[:, None], lambda t: t**2
    image = sum(
        value * np.exp(-(square(x - cx) + square(y - cy) + square(z - cz)) / (2 * sigma**2))
        for cx, cy, cz, sigma, value in parts
    )
    return torch.from_numpy(image)[:, None]


BLOBS = [(4.0, -6.0, 3.0, 3.0, MU_WATER), (-7.0, 5.0, -4.0, 2.5, 2 * MU_WATER)]


def test_line_integrals_of_blobs_are_right_to_second_order():
    g = ConeGeometry(equispaced(5, 360, 9), 41, 25, 2.2, 2.3, 60.0, 110.0, 0.4, -0.6)
    exact, errors = blobs(g, BLOBS), []
    for n in (1, 2):
        shape, voxel = (24 * n, 30 * n, 28 * n), (1.2 / n, 1.0 / n, 1.1 / n)
        errors.append(relative(CTCone(shape, voxel, g)(blob_image(shape, voxel, BLOBS)), exact))
    assert errors[0] < 0.02 and 3.5 < errors[0] / errors[1] < 4.5


def test_the_middle_plane_is_the_fan_beam():
    (_, *plane), (_, *pixel), g = TINY[0]
    g = replace(g, detector_row_offset_mm=0.0)
    cone, fan = CTCone((5, *plane), (1.1, *pixel), g), CTFan(tuple(plane), tuple(pixel), g.fan)
    x, y = gaussian(2, *cone.in_shape, dtype=torch.float64), gaussian(2, *cone.out_shape, dtype=torch.float64)
    assert relative(cone(x)[:, 2], fan(x[:, 2])) < 1e-8  # the fan beam drops weights below 1e-9
    assert relative(cone.fbp(y)[:, 2], fan.fbp(y[:, 2])) < 1e-12
    shifted = CTCone((5, *plane), (1.1, *pixel), replace(g, detector_row_offset_mm=3.4))  # two rows
    assert relative(shifted(x)[:, 0], fan(x[:, 2])) < 1e-8


FULL = (360, 360.0, "counterclockwise", 0.0, 0.25)  # views, arc, rotation, start, offset in columns
SHORT = (320, 180.0 + 2 * 31.0, "clockwise", 77.0, 0.0)


@pytest.mark.parametrize("views, arc, rotation, start, offset", [FULL, SHORT], ids=["full", "short"])
def test_fdk_is_right_in_hu(views, arc, rotation, start, offset):
    balls = [(2.0, -4.0, 0.0, 34.0, MU_WATER), (17.0, 6.0, 2.0, 8.0, MU_WATER)]
    balls += [(-14.0, -14.0, -2.0, 8.0, -0.8 * MU_WATER), (-10.0, 12.0, 0.0, 8.0, 0.05 * MU_WATER)]
    g = ConeGeometry(equispaced(views, arc, start), 147, 9, 1.8, 1.8, 125.0, 225.0, 1.8 * offset, 0.9, rotation)
    grid = ((3, 80, 76), (1.0, 1.0, 1.1))
    op = CTCone(*grid, g)
    fine = replace(g, detector_count=3 * 147, detector_pitch_mm=0.6)  # elements have a width
    y = chords(fine, balls).unflatten(-1, (147, 3)).mean(-1).float()
    hu = 1000 * (op.fbp(y) / MU_WATER - 1)[1, 0]
    for cx, cy, r, truth in ((2, -20, 5, 0), (17, 6, 5, 1000), (-14, -14, 5, -800), (-10, 12, 5, 50)):
        roi = hu[ball_image(*grid, [(cx, cy, 0.0, r, 1.0)])[1, 0] == 1]
        assert abs(float(roi.mean()) - truth) < 3, (truth, float(roi.mean()))
    assert float(hu[2:8, 2:8].mean()) == pytest.approx(-1000, abs=3)  # air


def test_fdk_keeps_the_place_of_a_ball_off_the_middle_plane():
    balls = [(0.0, 0.0, 0.0, 24.0, MU_WATER), (8.0, -6.0, 9.0, 5.0, MU_WATER)]
    op = build("ct-sparse", (40, 56, 56), 3 * (1.0,), geometry="cone", views=120, sod=200)
    hu = 1000 * (op.fbp(chords(op.geometry, balls).float()) / MU_WATER - 1)[:, 0]
    seen = float(hu[26:31, 31:37, 33:38].mean())  # the ball: slice 28.5, row 33.5, column 35.5
    assert abs(seen - 1000) < 60
    assert float(hu[9:14, 31:37, 33:38].mean()) == pytest.approx(0, abs=60)  # its mirror image


def test_simulation_averages_over_elements_on_a_finer_grid():
    shape, voxel = (24, 30, 28), (1.2, 1.0, 1.1)
    op = build("ct-sparse", shape, voxel, geometry="cone", views=6, sod=80)
    mu = blob_image(shape, voxel, BLOBS)[:, 0].float().numpy()
    measured, g = torch.from_numpy(panel_projections(mu, op)), op.geometry
    fine = replace(
        g,
        detector_count=g.detector_count * 4,
        detector_pitch_mm=g.detector_pitch_mm / 4,
        detector_rows=g.detector_rows * 4,
        detector_row_pitch_mm=g.detector_row_pitch_mm / 4,
    )
    exact = blobs(fine, BLOBS).unflatten(-1, (-1, 4)).unflatten(0, (-1, 4)).mean((1, -1))
    assert relative(measured, exact) < 0.01
    assert 5e-3 < relative(op(torch.from_numpy(mu)[:, None]), measured) < 0.1  # another grid and other rays
    hu = 1000 * (mu / MU_WATER - 1)
    first, again, other = (simulate_ct(hu, op, 1e4, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.y, again.y)
    assert first.y.shape == op.out_shape and (first.y != other.y).any(axis=(1, 2, 3)).all()


def test_refusals_are_one_line_and_name_the_reason():
    good = TINY[0][2].as_dict()
    bad = [
        ({"source_axis_mm": 31.0}, "must lie beyond the axis"),
        ({"source_detector_mm": math.nan}, "source-detector distance must be finite"),
        ({"rotation": "left"}, "unknown rotation 'left'"),
        ({"detector_pitch_mm": 0.0}, "detector_pitch must be positive"),
        ({"detector_row_pitch_mm": -1.0}, "detector_row_pitch must be positive, in mm, got -1"),
        ({"detector_row_offset_mm": math.inf}, "detector_row_offset must be finite"),
        ({"detector_rows": 2.5}, "detector_rows must be a positive whole number, got 2.5"),
        ({"detector_rows": 50}, r"seen at 53.* degrees from the middle plane, the limit is 45: .*--sdd"),
        ({"views_deg": ()}, "at least one view"),
        ({"geometry": "fan"}, "not a cone-beam geometry"),
        ({"detector_shape": "flat"}, "not a cone-beam geometry"),
    ]
    for change, message in bad:
        with pytest.raises(UsageError, match=message) as caught:
            ConeGeometry.from_dict(good | change)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"the source, 17 mm from the axis, would be inside the circle .*--sod"):
        CTCone((3, 30, 30), (1.0, 1.0, 1.0), TINY[0][2])
    with pytest.raises(UsageError, match="CTCone needs a ConeGeometry, got FanGeometry"):
        CTCone(*TINY[0][:2], TINY[0][2].fan)
    with pytest.raises(UsageError, match=r"shape must be \(slices, H, W\)"):
        CTCone((5, 7), (1.0, 1.0, 1.0), TINY[0][2])
    with pytest.raises(UsageError, match=r"positive, in mm, one size or \(slice, row, column\) spacing, got -1.0"):
        CTCone((3, 4, 5), -1.0, TINY[0][2])
    op = CTCone(*TINY[0])
    with pytest.raises(UsageError, match="CTCone works in float32 or float64"):
        op(torch.zeros(op.in_shape, dtype=torch.float16))
    with pytest.raises(UsageError, match="unknown window"):
        op.fbp(torch.zeros(op.out_shape), "box")


def test_a_panel_too_small_is_announced_with_its_share(caplog):
    shape, voxel = (12, 20, 24), (1.5, 1.0, 1.0)
    g = ConeGeometry(equispaced(5, 360), 21, 9, 2.0, 2.0, 40.0, 80.0, 1.0, 2.0)
    with caplog.at_level(logging.WARNING, "invdiff"):
        op = CTCone(shape, voxel, g)
    (note,) = op.notes
    assert [r.message for r in caplog.records] == [note]
    fine = ConeGeometry(g.views_deg, 301, 201, 0.3, 0.3, 40.0, 80.0)  # counts rays through the volume, seen or not
    source, panel = ends(fine)
    s, e = source[None, :, None], panel - source[None, :, None]
    with np.errstate(divide="ignore"):
        sides = [(np.array([12.0, 10.0, 9.0]) * k - s) / e for k in (-1, 1)]
    enter, leave = np.minimum(*sides).max(-1), np.maximum(*sides).min(-1)
    hit = torch.from_numpy(enter < leave)
    seen = ((fine.fan.elements_mm() - 1.0).abs() < 21)[None, None] & ((fine.rows_mm() - 2.0).abs() < 9)[:, None, None]
    share = 1 - float((hit & seen).sum() / hit.sum())
    assert g.missed(shape, voxel) == pytest.approx(share, abs=0.01) and f"{100 * g.missed(shape, voxel):.2g} %" in note
    for options in ({}, {"sod": 300.0, "sdd": 400.0}):
        assert not build("ct-sparse", (12, 20, 24), voxel, geometry="cone", **options).notes


def test_json_pickle_and_description():
    for case in TINY:
        op = CTCone(*case)
        again = scanner_from_dict(json.loads(json.dumps({"name": "ct-sparse", "photons": 1e5, **op.as_dict()})))
        assert type(again) is CTCone and again.geometry == op.geometry
        assert (again.shape, again.voxel_mm) == (op.shape, op.voxel_mm)
        x = gaussian(*op.in_shape)
        assert torch.equal(pickle.loads(pickle.dumps(op))(x), op(x)) and torch.equal(op.to("cpu")(x), op(x))
    words = CTCone(*TINY[0]).describe()
    assert "Cone beam, 4 views" in words and "5 detector rows of 1.7 mm (8.5 mm high, shifted by -0.4 mm)" in words
    with pytest.raises(UsageError, match="a cone-beam operator needs slices, rows, columns, voxel_mm"):
        CTCone.from_dict(TINY[0][2].as_dict())


def test_table_options():
    op = build("ct-sparse", (10, 30, 40), (2.0, 0.8, 0.8), geometry="cone")
    g = op.geometry
    assert (type(op), len(g.views_deg), g.views_deg[-1], op.slicewise) == (CTCone, 60, 354.0, False)
    distances = (g.source_axis_mm, g.source_detector_mm, g.detector_pitch_mm, g.detector_row_pitch_mm)
    assert distances == pytest.approx((80, 144, 1.44, 3.6)) and g.detector_rows == 17
    options = {"detector_rows": 5, "detector_row_pitch": 2.0, "detector_row_offset": 1.0, "detector_count": 31}
    g = build("ct-limited", (10, 30, 40), (2.0, 0.8, 0.8), geometry="cone", rotation="clockwise", **options).geometry
    assert (g.detector_rows, g.detector_row_pitch_mm, g.detector_row_offset_mm) == (5, 2.0, 1.0)
    assert (g.detector_count, g.rotation, g.views_deg[-1]) == (31, "clockwise", 89.0)
    assert "detector_rows" not in resolve("ct-sparse", geometry="fan") and "sod" in resolve(
        "ct-sparse", geometry="cone"
    )
    bad = [
        (
            {"geometry": "fan", "detector_rows": 3},
            "detector_rows: geometry 'fan' has no such option; add --geometry cone",
        )
    ]
    bad += [({"geometry": "cone", "detector_shape": "flat"}, "detector_shape: geometry 'cone' has no such option")]
    bad += [({"geometry": "cone", "detector_rows": 2.5}, "detector_rows must be a positive whole number")]
    bad += [({"geometry": "cone", "detector_row_pitch": 1e-9}, "detector_row_pitch of 1e-09 mm makes")]
    bad += [({"geometry": "cone", "detector_row_pitch": -1.0}, "detector_row_pitch must be positive")]
    for change, message in bad:
        with pytest.raises(UsageError, match=message):
            build("ct-sparse", (10, 30, 40), (2.0, 0.8, 0.8), **change)


CONE = ("--op", "ct-sparse", "--geometry", "cone", "--views", "16")


def test_command_line_from_volume_and_from_file(run, world, here):
    image = nib.load(world / "ct.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("RPI"))  # stored the other way up
    nib.save(turned, here / "turned.nii.gz")
    for name in ("$/ct.nii.gz", "turned.nii.gz"):
        assert run("simulate", name, *CONE, "-o", "m.h5", "--quiet", "--overwrite")[0] == 0
        assert run("reconstruct", "m.h5", "--solver", "fbp", "-o", "a.nii.gz", "--quiet", "--overwrite") == (0, "", "")
        done = run(
            "reconstruct", name, *CONE, "--simulate", "--solver", "fbp", "-o", "b.nii.gz", "--quiet", "--overwrite"
        )
        assert done == (0, "", "")
        a, b = (nib.as_closest_canonical(nib.load(here / n)).get_fdata() for n in ("a.nii.gz", "b.nii.gz"))
        np.testing.assert_array_equal(a, b)
        truth = nib.as_closest_canonical(image).get_fdata()[..., 1:-1]  # the ends are not seen by all views
        scores = [np.corrcoef(a[..., 1:-1].ravel(), t.ravel())[0, 1] for t in (truth, truth[..., ::-1])]
        assert scores[0] > 0.85 and scores[0] > scores[1]
    code, out, _ = run("simulate", "$/ct.nii.gz", *CONE, "-o", "c.h5")
    assert code == 0 and "data of 9 x 1 x 16 x " in out
    code, _, err = run("reconstruct", "m.h5", "--solver", "fbp", "--slices", "1:3", "-o", "c.nii.gz")
    assert code == 3 and "a cone beam measures all 5 slices together; drop --slices" in err and err.count("\n") == 1


def small_problem(std=0.002, shape=(4, 9, 9)):
    op = build("ct-sparse", shape, (2.0, 1.5, 1.5), geometry="cone", views=8)
    truth = ball_image(op.shape, op.voxel_mm, [(0.5, -0.7, 0.3, 4.0, 0.02)])
    y = op(truth) + std * gaussian(*op.out_shape, seed=6, dtype=torch.float64)
    return op, whiten(y, op, std**2, scale=0.02, spacing=(2.0, 1.5, 1.5)), truth / 0.02


def test_the_data_step_is_that_of_the_whole_stack():
    op, problem, _ = small_problem(0.01, (3, 5, 4))
    n, m = math.prod(op.in_shape), math.prod(op.out_shape)
    a = problem.operator(torch.eye(n, dtype=torch.float64).reshape(n, *op.in_shape)).reshape(n, m).T
    z = gaussian(1, *op.in_shape, dtype=torch.float64)
    expected = torch.linalg.solve(a.T @ a + 7 * torch.eye(n), a.T @ problem.y.flatten() + 7 * z.flatten())
    found, _ = data_step(problem, z, 7.0, z, iterations=300, tolerance=1e-12, spectrum=point_spectrum(problem))
    assert relative(found.flatten(), expected) < 1e-8


def test_tv_takes_the_stack():
    _, problem, truth = small_problem()
    *_, fbp = iterate(make_solver("fbp"), problem)
    solver = make_solver("tv", volumetric=True, gap=1e-2, check=10)
    *_, state = iterate(solver, problem)
    assert solver.finished(state) and state.memory["gaps"].shape == (1,)  # the duality gap of the whole stack
    assert relative(state.x0[0], truth) < 0.7 * relative(fbp.x0[0], truth)


def test_sirt_takes_published_steps_and_stops_with_the_stack():
    op, problem, _ = small_problem(0.01)
    first, *_, last = iterate(solver := make_solver("sirt"), problem)
    rows, columns = op.sensitivities(torch.float64)
    residual = torch.where(rows > 1e-6 * rows.max(), problem.measured / rows, 0.0)
    expected = solver.relaxation / problem.scale * op.adjoint(residual) / columns
    assert relative(first.x0[0], expected) < 1e-12
    assert solver.finished(last) and last.memory["chi2"].shape == (1, 1, 1, 1)
    assert problem.chi_squared(last.x0) < 1.01


@pytest.mark.parametrize("name, steps", [("pnp", 2), ("dds", 8), ("dps", 4)])
def test_solvers_with_a_prior_take_the_stack(name, steps):
    _, problem, _ = small_problem()
    prior = GaussianPrior(torch.full((1, 9, 9), 0.3).double(), 0.1 * torch.eye(81).double())
    solver = make_solver(name)
    *_, state = iterate(solver, problem, prior, solver.sigmas(steps, problem, prior))
    assert state.x0.shape == (1, *problem.image_shape) and bool(state.x0.isfinite().all())
    assert name == "dps" or 0.5 < problem.chi_squared(state.x0) < 1.5


def test_plug_and_play_on_the_command_line(run, world, here):
    options = ("--simulate", "--prior", "$/prior", "--steps", "2", "-o", "a.nii.gz", "--quiet")
    options += ("--set", "solver.cg_iterations=5")
    assert run("reconstruct", "$/ct.nii.gz", *CONE, *options) == (0, "", "")
    assert json.loads((here / "a.json").read_text())["operator"]["geometry"] == "cone"
