"""Computed tomography: laws, independent dense weights, ASTRA, analytic projections, HU, grouping of slices."""

import copy
import importlib.util
import json
import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff.errors import ShapeError, UsageError
from invdiff.operators import OPERATORS, build, resolve
from invdiff.operators import projector as projector_module
from invdiff.operators.ct import CTParallel
from invdiff.operators.fbp import ramp_filter
from invdiff.operators.projector import cache, multiply, predicted_bytes, predicted_entries
from invdiff.operators.rays import ParallelGeometry, equispaced, joseph_csr, transpose, transpose_by_sorting

MU_WATER = 0.0193  # 1/mm
TINY = [  # shape, pixel (row, column) mm, geometry: odd, rectangular, anisotropic, shifted, truncated
    ((7, 10), (1.3, 0.8), ParallelGeometry(equispaced(9, 180, 5), 19, 0.7, 0.2)),
    ((9, 4), (0.5, 1.0), ParallelGeometry((0.0, 90.0, -30.0, 200.0, 45.0), 6, 1.1, -0.9)),
    ((5, 5), (1.0, 1.0), ParallelGeometry(equispaced(8), 9, 1.0)),
]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(shape=(24, 20), views=12, **options):
    return build("ct-sparse", shape, 1.0, views=views, start=3.0, **options)


def joseph_by_hand(shape, pixel, geometry):
    """Dense A from x cos a + y sin a = u alone: hat functions of the distance to each pixel centre."""
    (height, width), (dy, dx) = shape, pixel
    x, y = (np.arange(width) - (width - 1) / 2) * dx, ((height - 1) / 2 - np.arange(height)) * dy
    rows = []
    for angle in np.deg2rad(geometry.views_deg):
        c, s = np.cos(angle), np.sin(angle)
        for k in range(geometry.detector_count):
            u = (k - (geometry.detector_count - 1) / 2) * geometry.detector_pitch_mm + geometry.detector_offset_mm
            if dx * abs(c) >= dy * abs(s):
                distance = np.abs((u - y[:, None] * s) / c - x[None, :]) / dx
                rows.append(np.maximum(0, 1 - distance) * dy / abs(c))
            else:
                distance = np.abs((u - x[None, :] * c) / s - y[:, None]) / dy
                rows.append(np.maximum(0, 1 - distance) * dx / abs(s))
    return torch.from_numpy(np.stack(rows).reshape(-1, height * width))


def discs(u, angles_deg, parts):
    """Analytic projections ``(views, u)`` of discs (x, y, radius, value), lengths in mm."""
    a = np.deg2rad(np.asarray(angles_deg))[:, None]
    return sum(2 * v * np.sqrt(np.maximum(r**2 - (u - x * np.cos(a) - y * np.sin(a)) ** 2, 0)) for x, y, r, v in parts)


def detector(op):
    g = op.geometry
    return (np.arange(g.detector_count) - (g.detector_count - 1) / 2) * g.detector_pitch_mm + g.detector_offset_mm


def disc_image(shape, pixel, parts, fine=8):
    """Discs averaged over the pixels of a grid."""
    (h, w), (dy, dx) = shape, pixel
    x = (np.arange(w * fine) - (w * fine - 1) / 2) * dx / fine
    y = ((h * fine - 1) / 2 - np.arange(h * fine)) * dy / fine
    image = sum(v * ((x[None] - cx) ** 2 + (y[:, None] - cy) ** 2 < r**2) for cx, cy, r, v in parts)
    return torch.from_numpy(image.reshape(h, fine, w, fine).mean((1, 3)))[None]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_every_column_equals_the_dense_matrix(case, dtype, tolerance):
    op, dense = CTParallel(*case), joseph_by_hand(*case)
    n, m = dense.shape[1], dense.shape[0]
    direct = op(torch.eye(n, dtype=dtype).reshape(n, *op.in_shape)).reshape(n, m).T
    transposed = op.adjoint(torch.eye(m, dtype=dtype).reshape(m, *op.out_shape)).reshape(m, n)
    assert direct.dtype == transposed.dtype == dtype
    assert (direct.double() - dense).abs().max() < tolerance * dense.max()
    assert (transposed.double() - dense).abs().max() < tolerance * dense.max()


@pytest.mark.parametrize("case", TINY)
def test_norm_mean_square_and_sensitivities_equal_the_dense_ones(case):
    op, dense = CTParallel(*case), joseph_by_hand(*case)
    assert op.norm == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-3)
    assert op.mean_square == pytest.approx(float(dense.square().sum() / dense.shape[1]), rel=1e-6)
    rows, columns = op.sensitivities(torch.float64)
    assert torch.allclose(rows.flatten(), dense.sum(1), rtol=1e-8, atol=1e-8)
    assert torch.allclose(columns.flatten(), dense.sum(0), rtol=1e-8, atol=1e-8)


def test_refusals_name_the_operator_and_both_shapes():
    op = small()
    with pytest.raises(ShapeError, match=r"CTParallel expects images \(\.\.\., 1, 24, 20\), got \(3, 1, 20, 24\)"):
        op(torch.zeros(3, 1, 20, 24))
    with pytest.raises(ShapeError, match=r"CTParallel expects measurements \(\.\.\., 1, 12, \d+\), got \(12, 20\)"):
        op.adjoint(torch.zeros(12, 20))
    with pytest.raises(ShapeError, match="weights"):
        op.normal(torch.zeros(op.in_shape), torch.ones(1, 12, 1))
    with pytest.raises(UsageError, match=r"float32 or float64, got torch\.int64"):
        op(torch.zeros(op.in_shape, dtype=torch.int64))
    with pytest.raises(UsageError, match="is on cpu and its input on meta"):
        op(torch.zeros(op.in_shape, device="meta"))
    with pytest.raises(UsageError, match="pixel_mm"):
        CTParallel((4, 4), 0.0, op.geometry)
    with pytest.raises(UsageError, match=r"shape must be \(H, W\)"):
        CTParallel((1, 4, 4), 1.0, op.geometry)


def test_empty_stacks_and_rays_that_miss_the_slice():
    op = small()
    assert op(torch.zeros(0, *op.in_shape)).shape == (0, *op.out_shape)
    assert op.normal(torch.zeros(0, *op.in_shape), torch.ones(op.out_shape)).shape == (0, *op.in_shape)
    away = CTParallel((4, 4), 1.0, ParallelGeometry((0.0, 30.0), 3, 1.0, 1e6))
    assert not away(torch.ones(2, 1, 4, 4)).any() and not away.adjoint(torch.ones(2, 1, 2, 3)).any()


def test_pickle_is_small_and_exact():
    op = build("ct-sparse", (64, 64), 1.0)
    x = gaussian(2, *op.in_shape)
    y, norm = op(x), op.norm
    data = pickle.dumps(op)
    assert len(data) < 2000
    cache.clear()
    again = pickle.loads(data)
    assert torch.equal(again(x), y) and again.norm == norm
    assert torch.equal(copy.deepcopy(op)(x), y) and torch.equal(op.to("cpu")(x), y)


def test_gradients_of_first_and_second_order():
    op = CTParallel(*TINY[0])
    x = gaussian(2, *op.in_shape, dtype=torch.float64).requires_grad_()
    y = gaussian(2, *op.out_shape, dtype=torch.float64).requires_grad_()
    w = gaussian(*op.out_shape, dtype=torch.float64).abs()
    for f, v in ((op, x), (op.adjoint, y), (lambda t: op.normal(t, w), x), (op.fbp, y)):
        assert torch.autograd.gradcheck(f, (v,))
        assert torch.autograd.gradgradcheck(f, (v,), fast_mode=True)
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: op.normal(x, t), (w,), fast_mode=True)


@pytest.mark.parametrize("shape", [(96, 128), (75, 61)])
def test_agrees_with_astra(shape):
    astra = pytest.importorskip("astra")
    pixel, count, pitch, angles = 0.7, 171, 0.65, equispaced(23, 180, 7)
    op = CTParallel(shape, pixel, ParallelGeometry(angles, count, pitch))
    image = disc_image(shape, (pixel, pixel), [(3, -8, 14, 1.0), (-9, 5, 6, 2.0), (8, 11, 4, -0.5)]).float()
    (h, w), y = shape, op(image)[0].numpy()
    volume = astra.create_vol_geom(h, w, -w * pixel / 2, w * pixel / 2, -h * pixel / 2, h * pixel / 2)
    scan = astra.create_proj_geom("parallel", pitch, count, np.deg2rad(angles))
    for kind, tolerance in (("linear", 3e-4), ("line", 1e-2)):
        identifier = astra.create_projector(kind, scan, volume)
        expected = np.zeros((len(angles), count), np.float32)
        astra.projector.direct_FP(identifier, image[0].numpy(), out=expected)
        astra.projector.delete(identifier)
        assert np.linalg.norm(y - expected) < tolerance * np.linalg.norm(expected), kind


def test_analytic_projection_fixes_angle_sense_rows_and_columns():
    blobs = [(14.0, 22.0, 5.0, 1.0), (-25.0, -6.0, 4.0, 2.0)]  # x, y, width of a Gaussian in mm, value

    def exact(u, angles_deg, parts):
        a = np.deg2rad(np.asarray(angles_deg))[:, None]
        lines = [
            v * math.sqrt(2 * math.pi) * s * np.exp(-((u - x * np.cos(a) - y * np.sin(a)) ** 2) / (2 * s**2))
            for x, y, s, v in parts
        ]
        return torch.from_numpy(sum(lines))

    op = CTParallel((90, 110), (1.1, 0.8), ParallelGeometry(equispaced(31, 180, 4), 151, 0.8, 0.3))
    x, y, u, angles = (np.arange(110) - 54.5) * 0.8, (44.5 - np.arange(90)) * 1.1, detector(op), op.geometry.views_deg
    image = sum(v * np.exp(-((x - a) ** 2 + (y[:, None] - b) ** 2) / (2 * s**2)) for a, b, s, v in blobs)
    measured = op(torch.from_numpy(image)[None])[0]
    assert relative(measured, exact(u, angles, blobs)) < 5e-3
    wrong = [exact(u, np.negative(angles), blobs), exact(-u, angles, blobs), exact(u, np.add(angles, 90), blobs)]
    for change in (lambda a, b: (b, a), lambda a, b: (-a, b), lambda a, b: (a, -b)):
        wrong.append(exact(u, angles, [(*change(a, b), s, v) for a, b, s, v in blobs]))
    assert min(relative(measured, other) for other in wrong) > 0.5


@pytest.mark.parametrize("window", ["ramp", "hann"])
@pytest.mark.parametrize("arc, views, pitch", [(180, 180, 1.0), (360, 240, 1.0), (270, 270, 1.0), (180, 180, 2.0)])
def test_fbp_is_right_in_hu(window, arc, views, pitch):
    parts = [(5.0, -8.0, 45.0, MU_WATER), (20.0, 6.0, 12.0, MU_WATER), (-14.0, -22.0, 10.0, -0.8 * MU_WATER)]
    geometry = ParallelGeometry(equispaced(views, arc), int(190 / pitch), pitch, 1.7)
    op = CTParallel((128, 120), (1.0, 1.1), geometry)
    y = torch.from_numpy(discs(detector(op), op.geometry.views_deg, parts)).float()[None]
    hu = 1000 * (op.fbp(y, window) / MU_WATER - 1)[0]
    for cx, cy, r, truth in ((-15, 10, 8, 0), (20, 6, 6, 1000), (-14, -22, 4, -800), (-53, 50, 5, -1000)):
        roi = hu[disc_image((128, 120), (1.0, 1.1), [(cx, cy, r, 1.0)])[0] == 1]
        assert abs(float(roi.mean()) - truth) < 1.2 * pitch**1.5, (truth, float(roi.mean()))
        assert float(roi.std()) < 25 * pitch  # ringing at the edges of the discs
    assert torch.equal(op.pinv(y), op.fbp(y))


@pytest.mark.parametrize("case", TINY)
def test_fbp_interpolates_each_filtered_view(case):
    op, ((h, w), (dy, dx), geometry) = CTParallel(*case), case
    y = gaussian(*op.out_shape, dtype=torch.float64)
    filtered, u = ramp_filter(y, geometry.detector_pitch_mm)[0].numpy(), detector(op)
    u = np.concatenate([[u[0] - geometry.detector_pitch_mm], u, [u[-1] + geometry.detector_pitch_mm]])
    px, py = (np.arange(w) - (w - 1) / 2) * dx, (((h - 1) / 2 - np.arange(h)) * dy)[:, None]
    expected = sum(
        weight * np.interp(px * np.cos(a) + py * np.sin(a), u, np.pad(q, 1))  # zero beyond the detector
        for weight, a, q in zip(geometry.view_weights(), np.deg2rad(geometry.views_deg), filtered, strict=True)
    )
    assert np.allclose(op.fbp(y)[0].numpy(), expected, atol=1e-12)


def test_fbp_weights_of_views_and_windows():
    def weights(angles):
        return np.degrees(ParallelGeometry(angles, 3, 1.0).view_weights())

    assert np.allclose(weights(equispaced(60)), 3) and np.allclose(weights(equispaced(60, 360)), 3)
    assert np.allclose(weights(equispaced(90, 90, 20)), 1)  # the missing wedge is given to nobody
    assert np.allclose(weights((0, 10, 30, 100, 110)), [15, 15, 20, 15, 15])  # two gaps of 70 count as the median, 20
    assert weights((0, 20, 60, 90, 120, 150)).sum() == pytest.approx(180)
    op = small()
    noise = gaussian(*op.out_shape)
    assert op.fbp(noise, "hann").std() < 0.6 * op.fbp(noise).std()
    with pytest.raises(UsageError, match="unknown window 'hamming': choose one of hann, ramp"):
        op.fbp(noise, "hamming")


@pytest.mark.parametrize("limit", [0, 300_000])
def test_on_the_fly_equals_the_matrix(caplog, limit):
    stored = small((40, 33), 11)
    with caplog.at_level(logging.WARNING, "invdiff"):
        ops = [CTParallel((40, 33), 1.0, stored.geometry, memory_limit_bytes=limit) for _ in range(2)]
        assert (stored.backend, ops[0].backend) == ("matrix", "on-the-fly")
        assert not caplog.records  # a run that is refused for its size has one line to show
        for op in (*ops, ops[0].subset(slice(0, None, 2))):
            op(torch.zeros(op.in_shape))
    projector_module._announced.clear()
    assert sum("memory_limit_bytes" in r.message for r in caplog.records) == 1
    x, y = gaussian(3, *stored.in_shape), gaussian(3, *stored.out_shape)
    w = gaussian(3, *stored.out_shape).abs()
    assert torch.equal(ops[0](x), stored(x))
    assert relative(ops[0].adjoint(y), stored.adjoint(y)) < 5e-7
    assert relative(ops[0].normal(x, w), stored.normal(x, w)) < 5e-7
    assert relative(ops[0].gram(y), stored.gram(y)) < 5e-7
    assert ops[0].norm == pytest.approx(stored.norm, rel=1e-6)
    assert ops[0].mean_square == pytest.approx(stored.mean_square, rel=1e-6)


def test_predicted_memory_and_shared_bounded_cache(monkeypatch):
    op = build("ct-sparse", (100, 80), (0.9, 1.2), views=30)
    cache.clear()
    part = cache.get(op._scan, torch.float32)
    assert part.direct.values.numel() == pytest.approx(predicted_entries(op.shape, op.pixel_mm, op.geometry), rel=0.02)
    size = part.nbytes
    assert size == pytest.approx(predicted_bytes(op.shape, op.pixel_mm, op.geometry), rel=0.02)
    assert cache.get(build("ct-sparse", (100, 80), (0.9, 1.2), views=30)._scan, torch.float32) is part
    monkeypatch.setattr(projector_module, "default_memory_limit", lambda device: int(1.5 * size))
    cache.get(op._scan, torch.float64)
    assert cache.get(op._scan, torch.float32) is not part  # the larger one pushed it out
    cache.clear()


def test_both_transposes_are_the_transpose():
    shape, pixel, geometry = TINY[0]
    matrix = joseph_csr(geometry.rays(), shape, pixel, torch.float64)
    ours = [transpose(matrix, 70), transpose_by_sorting(matrix, 70)]
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))
    rows = len(matrix.offsets) - 1
    assert torch.equal(
        multiply(ours[0], torch.eye(rows, dtype=torch.float64)), multiply(matrix, torch.eye(70).double()).T
    )


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_slice_is_the_same_bits_in_any_group_and_with_any_threads(threads):
    op = build("ct-sparse", (40, 33), 1.0, views=12)
    x, y = gaussian(37, *op.in_shape), gaussian(37, *op.out_shape)
    w = gaussian(37, *op.out_shape, seed=4).abs()
    together = {}
    for count in (1, 2):
        threads(count)
        for f, v in ((op, x), (op.adjoint, y), (op.fbp, y)):
            together[count, f] = whole = f(v)
            for group in (1, 3, 12, 32):
                assert torch.equal(torch.cat([f(part) for part in v.split(group)]), whole), (f, group, count)
        whole = together[count, "normal"] = op.normal(x, w)
        assert torch.equal(torch.cat([op.normal(a, b) for a, b in zip(x.split(3), w.split(3), strict=True)]), whole)
    assert all(torch.equal(value, together[2, key[1]]) for key, value in together.items())


def test_weighted_normal_equals_its_parts():
    op = small()
    x, w = gaussian(2, 3, *op.in_shape), gaussian(2, 3, *op.out_shape).abs()
    assert torch.equal(op.normal(x), op.adjoint(op(x)))
    for weights in (w, w[0, 0], w[:1, :1], w[0], w[:, :1]):
        assert torch.equal(op.normal(x, weights), op.adjoint(weights * op(x)))


def test_geometry_and_operator_survive_json():
    assert equispaced(4) == (0.0, 45.0, 90.0, 135.0) and equispaced(3, 90, 10) == (10.0, 40.0, 70.0)
    op = CTParallel(*TINY[0])
    text = json.dumps(op.as_dict())
    again = CTParallel.from_dict(json.loads(text))
    assert (again.geometry, again.shape, again.pixel_mm) == (op.geometry, op.shape, op.pixel_mm)
    assert "9 views from 5 to 165 degrees" in op.describe() and "7 x 10 pixels of 1.3 x 0.8 mm" in op.describe()
    bad = [{"views_deg": ()}, {"detector_count": 0}, {"detector_count": 2.5}, {"detector_pitch_mm": 0.0}]
    bad += [{"detector_offset_mm": math.nan}, {"views_deg": (0.0, math.inf)}, {"geometry": "fan"}, {"sod_mm": 500}]
    for change in bad:
        with pytest.raises(UsageError):
            ParallelGeometry.from_dict({**op.geometry.as_dict(), **change})
    for views, arc in ((0, 180), (2.5, 180), (3, 0), (3, 361), (3, math.nan)):
        with pytest.raises(UsageError):
            equispaced(views, arc)


def test_table_builds_and_refuses():
    sparse, limited, low = (build(name, (32, 24), 0.8) for name in ("ct-sparse", "ct-limited", "ct-lowdose"))
    assert [op.out_shape[1] for op in (sparse, limited, low)] == [60, 90, 180]
    assert limited.geometry.views_deg[-1] == 89.0 and low.geometry.views_deg[-1] == 179.0
    assert sparse.geometry.detector_pitch_mm == 0.8 and sparse.geometry.detector_count == 43  # diagonal 40 pixels
    assert build("ct-sparse", (32, 24), 0.8, photons=1e3, detector_count=9, views=None).out_shape == (1, 60, 9)
    assert resolve("ct-lowdose")["photons"] == 2e4 and resolve("ct-sparse", start=2.0)["start"] == 2.0
    with pytest.raises(UsageError, match="'ct-sparse' has no option 'arc': its options are views, "):
        build("ct-sparse", (32, 24), 0.8, arc=90)
    with pytest.raises(UsageError, match=r"unknown operator 'ct': choose one of .*ct-limited"):
        build("ct", (32, 24), 0.8)
    with pytest.raises(UsageError, match="unknown geometry 'helix': choose one of cone, fan, parallel"):
        build("ct-sparse", (32, 24), 0.8, geometry="helix")
    assert all(help_text for entry in OPERATORS.values() for _, help_text in entry.options.values())


def test_table_is_light_and_has_one_identity():
    code = "import sys, invdiff.operators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    path = Path(projector_module.__file__).with_name("__init__.py")
    spec = importlib.util.spec_from_file_location("operators", path)
    with pytest.raises(ImportError, match=r"import invdiff\.operators, not operators"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
