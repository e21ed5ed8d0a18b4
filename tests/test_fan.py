"""Fan beam: dense weights from source and detector points, ASTRA, chords of discs, the parallel limit, FBP, files."""

import copy
import json
import logging
import math
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.errors import UsageError
from invdiff.operators import build, resolve
from invdiff.operators.ct import CTFan, CTParallel, scanner_from_dict
from invdiff.operators.fan import FanGeometry, _parker
from invdiff.operators.projector import cache, predicted_entries
from invdiff.operators.rays import ParallelGeometry, equispaced
from invdiff.simulate import strip_projections

MU_WATER = 0.0193  # 1/mm
TINY = [  # shape, pixel (row, column) mm, geometry: odd, rectangular, anisotropic, shifted, truncated
    ((7, 10), (1.3, 0.8), FanGeometry(equispaced(9, 360, 5), 19, 1.4, 17.0, 31.0, "flat", 0.35)),
    ((9, 4), (0.5, 1.0), FanGeometry((0.0, 90.0, -30.0, 200.0), 6, 1.1, 3.4, 5.0, "curved", -0.9, "clockwise")),
    ((5, 5), (1.0, 1.0), FanGeometry(equispaced(8, 240), 9, 1.5, 9.0, 14.0, "curved")),
]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ends(g):
    """Source and element positions by the definition alone, ``(views, 1, 2)`` and ``(views, count, 2)`` in mm."""
    b = np.deg2rad(g.views_deg)[:, None, None] * (-1 if g.rotation == "clockwise" else 1)
    u = (np.arange(g.detector_count) - (g.detector_count - 1) / 2)[None, :, None] * g.detector_pitch_mm
    u, sdd = u + g.detector_offset_mm, g.source_detector_mm
    away, across = (sdd * np.cos(u / sdd), sdd * np.sin(u / sdd)) if g.detector_shape == "curved" else (sdd, u)
    down, right = np.concatenate([np.sin(b), -np.cos(b)], -1), np.concatenate([np.cos(b), np.sin(b)], -1)
    source = g.source_axis_mm * down
    return source, source - away * down + across * right


def joseph_by_hand(shape, pixel, geometry):
    """Dense A: where each ray meets the pixel rows (or columns), hat functions of the distance to the centres."""
    (height, width), (dy, dx) = shape, pixel
    x, y = (np.arange(width) - (width - 1) / 2) * dx, ((height - 1) / 2 - np.arange(height)) * dy
    source, element = ends(geometry)
    rows = []
    for s, e in zip(np.broadcast_to(source, element.shape).reshape(-1, 2), element.reshape(-1, 2), strict=True):
        (rx, ry), length = e - s, math.hypot(*(e - s))
        if abs(ry) / dy >= abs(rx) / dx:
            distance = np.abs(s[0] + (y[:, None] - s[1]) * rx / ry - x[None]) / dx
            rows.append(np.maximum(0, 1 - distance) * dy * length / abs(ry))
        else:
            distance = np.abs(s[1] + (x[None] - s[0]) * ry / rx - y[:, None]) / dy
            rows.append(np.maximum(0, 1 - distance) * dx * length / abs(rx))
    return torch.from_numpy(np.stack(rows).reshape(-1, height * width))


def chords(geometry, parts):
    """Lengths of rays inside discs (x, y, radius, value) times their values, ``(1, views, count)``."""
    source, element = ends(geometry)
    e = (element - source) / np.linalg.norm(element - source, axis=-1, keepdims=True)
    total = 0
    for x, y, r, value in parts:
        c = np.array([x, y]) - source
        distance = c[..., 0] * e[..., 1] - c[..., 1] * e[..., 0]
        total = total + 2 * value * np.sqrt(np.maximum(r**2 - distance**2, 0))
    return torch.from_numpy(total)[None]


def disc_image(shape, pixel, parts, fine=6):
    (h, w), (dy, dx) = shape, pixel
    x = (np.arange(w * fine) - (w * fine - 1) / 2) * dx / fine
    y = ((h * fine - 1) / 2 - np.arange(h * fine)) * dy / fine
    image = sum(v * ((x[None] - cx) ** 2 + (y[:, None] - cy) ** 2 < r**2) for cx, cy, r, v in parts)
    return torch.from_numpy(image.reshape(h, fine, w, fine).mean((1, 3)))[None]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_every_column_equals_the_dense_matrix(case, limit, dtype, tolerance):
    op, dense = CTFan(*case, memory_limit_bytes=limit), joseph_by_hand(*case)
    n, m = dense.shape[1], dense.shape[0]
    assert op.backend == ("matrix" if limit is None else "on-the-fly")
    direct = op(torch.eye(n, dtype=dtype).reshape(n, *op.in_shape)).reshape(n, m).T
    transposed = op.adjoint(torch.eye(m, dtype=dtype).reshape(m, *op.out_shape)).reshape(m, n)
    assert (direct.double() - dense).abs().max() < tolerance * dense.max()
    assert (transposed.double() - dense).abs().max() < tolerance * dense.max()
    assert op.mean_square == pytest.approx(float(dense.square().sum() / n), rel=1e-6)


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_linear_and_adjoint(case, dtype, tolerance):
    op = CTFan(*case)
    x, z = (gaussian(2, 3, *op.in_shape, seed=s, dtype=dtype) for s in (1, 2))
    y = gaussian(2, 3, *op.out_shape, seed=3, dtype=dtype)
    assert relative(op(2 * x - 3 * z), 2 * op(x) - 3 * op(z)) < tolerance
    left, right = (op(x).double() * y.double()).sum(), (x.double() * op.adjoint(y).double()).sum()
    assert abs(left - right) < tolerance * op(x).double().norm() * y.double().norm()
    w = y.abs()
    assert torch.equal(op.normal(x, w), op.adjoint(w * op(x)))


def test_gradients():
    op = CTFan(*TINY[0])
    y = gaussian(2, *op.out_shape, dtype=torch.float64).requires_grad_()
    for f in (op.adjoint, op.fbp):
        assert torch.autograd.gradcheck(f, (y,), fast_mode=True)


@pytest.mark.parametrize("shape", ["flat", "curved"])
@pytest.mark.parametrize("rotation", ["counterclockwise", "clockwise"])
def test_chords_of_discs_fix_angle_sense_and_detector_direction(shape, rotation):
    discs = [(14.0, 20.0, 6.0, 1.0), (-23.0, -6.0, 5.0, 2.0)]
    g = FanGeometry(equispaced(17, 360, 4), 141, 1.2, 90.0, 160.0, shape, 0.3, rotation)
    op = CTFan((72, 88), (1.0, 0.8), g)
    measured = op(disc_image((72, 88), (1.0, 0.8), discs))
    assert relative(measured, chords(g, discs)) < 0.02
    turned = FanGeometry(tuple(-v for v in g.views_deg), *list(g.__dict__.values())[1:])
    wrong = [chords(turned, discs), chords(g, discs).flip(-1)]
    for change in (lambda a, b: (b, a), lambda a, b: (-a, b), lambda a, b: (a, -b)):
        wrong.append(chords(g, [(*change(a, b), r, v) for a, b, r, v in discs]))
    assert min(relative(measured, other) for other in wrong) > 0.5


def test_agrees_with_astra():
    astra = pytest.importorskip("astra")
    shape, pixel, count, pitch, angles = (56, 72), 0.7, 121, 1.1, equispaced(13, 360, 7)
    sod, sdd = 80.0, 140.0
    op = CTFan(shape, pixel, FanGeometry(angles, count, pitch, sod, sdd))
    image = disc_image(shape, (pixel, pixel), [(3, -6, 12, 1.0), (-9, 5, 6, 2.0), (8, 9, 4, -0.5)]).float()
    (h, w), strips = shape, strip_projections(image.numpy(), op)[0, 0]
    volume = astra.create_vol_geom(h, w, -w * pixel / 2, w * pixel / 2, -h * pixel / 2, h * pixel / 2)
    scan = astra.create_proj_geom("fanflat", pitch, count, np.deg2rad(angles), sod, sdd - sod)
    for kind, ours, tolerance in (("line_fanflat", op(image)[0].numpy(), 1e-2), ("strip_fanflat", strips, 1e-2)):
        identifier = astra.create_projector(kind, scan, volume)
        expected = np.zeros((len(angles), count), np.float32)
        astra.projector.direct_FP(identifier, image[0].numpy(), out=expected)
        astra.projector.delete(identifier)
        assert np.linalg.norm(ours - expected) < tolerance * np.linalg.norm(expected), kind


@pytest.mark.parametrize("shape", ["flat", "curved"])
def test_a_source_far_away_makes_a_parallel_scan(shape):
    angles, far = equispaced(12, 360, 3), 1e8
    fan = CTFan((12, 15), (1.0, 0.9), FanGeometry(angles, 27, 0.9, far, 2 * far, shape, 0.2))
    parallel = CTParallel((12, 15), (1.0, 0.9), ParallelGeometry(angles, 27, 0.45, 0.1))
    x, y = gaussian(2, *fan.in_shape, dtype=torch.float64), gaussian(2, *fan.out_shape, dtype=torch.float64)
    assert relative(fan(x), parallel(x)) < 1e-6
    assert relative(fan.fbp(y), parallel.fbp(y)) < 1e-6
    assert predicted_entries(fan.shape, fan.pixel_mm, fan.geometry) == pytest.approx(
        predicted_entries(parallel.shape, parallel.pixel_mm, parallel.geometry), rel=1e-6
    )


SCANS = {  # views, arc
    "full": (240, 360.0),
    "short": (200, 180.0 + 2 * 31.0),  # the half fan of the detector is 30.6 (flat) and 30 degrees (curved)
    "long": (200, 300.0),
    "short of the detector, not of the object": (200, 238.0),
}


@pytest.mark.parametrize("shape", ["flat", "curved"])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("rotation, start, offset", [("counterclockwise", 0.0, 0.25), ("clockwise", 77.0, 0.0)])
def test_fbp_is_right_in_hu(shape, scan, rotation, start, offset):
    parts = [(5.0, -8.0, 35.0, MU_WATER), (17.0, 6.0, 9.0, MU_WATER), (-12.0, -18.0, 8.0, -0.8 * MU_WATER)]
    views, arc = SCANS[scan]
    pitch, count = (1.8, 147) if shape == "flat" else (1.8, 131)
    g = FanGeometry(equispaced(views, arc, start), count, pitch, 125.0, 225.0, shape, offset * pitch, rotation)
    grid = ((88, 80), (1.0, 1.1))
    op = CTFan(*grid, g)
    y = chords(g, parts).float()
    hu = 1000 * (op.fbp(y) / MU_WATER - 1)[0]
    for cx, cy, r, truth in ((-12, 10, 7, 0), (17, 6, 5, 1000), (-12, -18, 4, -800), (-40, 36, 3, -1000)):
        roi = hu[disc_image(*grid, [(cx, cy, r, 1.0)])[0] == 1]
        print(scan, shape, truth, float(roi.mean()) - truth, float(roi.std()))
        assert abs(float(roi.mean()) - truth) < 1.2, (truth, float(roi.mean()))
        assert float(roi.std()) < 30
