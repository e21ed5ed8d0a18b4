"""Fan beam: dense weights from source and detector points, ASTRA, chords of discs, the parallel limit, FBP, files."""

import copy
import json
import logging
import math
import pickle
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.errors import UsageError
from invdiff.operators import build, resolve
from invdiff.operators.ct import CTFan, CTParallel, scanner_from_dict
from invdiff.operators.fan import FanGeometry, line_shares
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
    assert relative(measured, chords(g, discs)) < 0.05  # pixels are no discs
    wrong = [chords(replace(g, views_deg=tuple(-v for v in g.views_deg)), discs), chords(g, discs).flip(-1)]
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
    entries = [predicted_entries(op.shape, op.pixel_mm, op.geometry) for op in (fan, parallel)]
    assert entries[0] == pytest.approx(entries[1], rel=1e-6)


SCANS = {  # views, arc
    "full": (360, 360.0),
    "short": (320, 180.0 + 2 * 31.0),  # the half fan of the detector is 30.6 (flat) and 30 degrees (curved)
    "long": (320, 300.0),
    "short of the detector, not of the object": (320, 238.0),
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
    fine = replace(g, detector_count=4 * count, detector_pitch_mm=pitch / 4)  # elements have a width
    y = chords(fine, parts).reshape(*op.out_shape, 4).mean(-1).float()
    hu = 1000 * (op.fbp(y) / MU_WATER - 1)[0]
    for cx, cy, r, truth in ((-12, 10, 7, 0), (17, 6, 5, 1000), (-12, -18, 4, -800), (-35, 30, 8, -1000)):
        roi = hu[disc_image(*grid, [(cx, cy, r, 1.0)])[0] == 1]
        assert abs(float(roi.mean()) - truth) < 1, (truth, float(roi.mean()))
        assert float(roi.std()) < 15


@pytest.mark.parametrize("length", [90.0, 170.0, 200.0, 238.0, 260.0, 330.0])
def test_both_measurements_of_a_line_share_one_weight(length):
    arcs, half = [(20.0, length)], 30.0
    views, fan = torch.linspace(20.1, 19.9 + length, 97)[:, None].double(), torch.linspace(-half, half, 31).double()
    share, again = line_shares(views, fan, arcs, half), views + 180.0 - 2 * fan
    measured = (again - 20.0).remainder(360.0) < length
    total = share + torch.where(measured, line_shares(again, -fan, arcs, half), 0.0)
    assert (total - 1).abs().max() < 1e-9 and share.min() >= 0
    assert bool(measured.any()) == (length > 120)


def test_refusals_are_one_line_and_name_the_reason():
    good = {"geometry": "fan", **TINY[0][2].as_dict()}
    bad = [
        ({"source_axis_mm": 31.0}, "must lie beyond the axis"),
        ({"source_axis_mm": -5.0}, "source-axis distance must be positive, in mm, got -5"),
        ({"source_detector_mm": math.nan}, "source-detector distance must be finite"),
        ({"detector_shape": "round"}, "unknown detector shape 'round': choose one of curved, flat"),
        ({"rotation": "left"}, "unknown rotation 'left'"),
        ({"detector_shape": "curved", "detector_pitch_mm": 6.0}, "reaches 100.5 degrees from its middle"),
        ({"detector_pitch_mm": 0.0}, "detector_pitch must be positive"),
        ({"views_deg": ()}, "at least one view"),
        ({"geometry": "parallel"}, "not a fan-beam geometry"),
        ({"sod_mm": 4.0}, "not a fan-beam geometry"),
    ]
    for change, message in bad:
        with pytest.raises(UsageError, match=message) as caught:
            FanGeometry.from_dict(good | change)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"the source, 17 mm from the axis, would be inside the circle .*--sod"):
        CTFan((30, 30), 1.0, TINY[0][2])
    with pytest.raises(UsageError, match="CTParallel needs a ParallelGeometry, got FanGeometry"):
        CTParallel(*TINY[0])
    with pytest.raises(UsageError, match="unknown geometry 'helix'"):
        scanner_from_dict({**CTFan(*TINY[0]).as_dict(), "geometry": "helix"})


def test_a_detector_too_small_is_announced_once_with_its_share(caplog):
    g = FanGeometry(equispaced(7, 360), 11, 2.0, 40.0, 80.0)
    with caplog.at_level(logging.WARNING, "invdiff"):
        op = CTFan((20, 20), 1.0, g)
        strip_projections(np.zeros((1, 20, 20), np.float32), op)
    (note,) = op.notes
    assert [r.message for r in caplog.records] == [note]
    fine = replace(g, detector_count=6001, detector_pitch_mm=0.02)  # counts rays through the slice, seen or not
    hit = CTFan((20, 20), 1.0, fine)(torch.ones(1, 20, 20))[0] > 0
    seen = hit & ((fine.elements_mm().abs() < 11)[None])
    share = 1 - float(seen.sum() / hit.sum())
    assert g.missed((20, 20), (1.0, 1.0)) == pytest.approx(share, abs=0.02) and "59 % of the rays" in note
    assert not build("ct-sparse", (20, 20), 1.0, geometry="fan").notes


def test_json_pickle_and_description():
    for case in TINY:
        op = CTFan(*case)
        again = scanner_from_dict(json.loads(json.dumps({"name": "ct-sparse", "photons": 1e5, **op.as_dict()})))
        assert type(again) is CTFan and again.geometry == op.geometry
        assert (again.shape, again.pixel_mm) == (op.shape, op.pixel_mm)
        x = gaussian(*op.in_shape)
        y, data = op(x), pickle.dumps(op)
        cache.clear()
        assert len(data) < 2000 and torch.equal(pickle.loads(data)(x), y)
        assert torch.equal(copy.deepcopy(op)(x), y) and torch.equal(op.to("cpu")(x), y)
    assert "Fan beam, 9 views" in CTFan(*TINY[0]).describe() and "17 mm from the axis" in CTFan(*TINY[0]).describe()


def test_the_matrix_is_as_large_as_predicted():
    for shape in ("flat", "curved"):
        op = build("ct-sparse", (48, 40), (0.9, 1.2), geometry="fan", views=24, detector_shape=shape)
        cache.clear()
        entries = cache.get(op._scan, torch.float32).direct.values.numel()
        assert entries == pytest.approx(predicted_entries(op.shape, op.pixel_mm, op.geometry), rel=0.05)


def test_table_options():
    op = build("ct-sparse", (30, 40), 0.8, geometry="fan")
    g = op.geometry
    assert (type(op), len(g.views_deg), g.views_deg[-1]) == (CTFan, 60, 354.0)
    assert (g.source_axis_mm, g.source_detector_mm, g.detector_pitch_mm) == pytest.approx((80, 144, 1.44))
    curved = build("ct-sparse", (30, 40), 0.8, geometry="fan", detector_shape="curved", sod=100, rotation="clockwise")
    assert curved.geometry.detector_shape == "curved" and curved.geometry.source_detector_mm == 180
    assert curved.geometry.detector_count < g.detector_count and not curved.notes
    assert build("ct-sparse", (30, 40), 0.8, geometry="fan", sdd=180).geometry.source_axis_mm == 100
    assert build("ct-lowdose", (30, 40), 0.8, geometry="fan").geometry.views_deg[-1] == 358.0
    assert build("ct-limited", (30, 40), 0.8, geometry="fan").geometry.views_deg[-1] == 89.0
    assert build("ct-sparse", (30, 40), 0.8, detector_offset=0.2).geometry.detector_offset_mm == 0.2
    assert "sod" not in resolve("ct-sparse") and resolve("ct-sparse", geometry="fan")["detector_shape"] == "flat"
    bad = [({"sod": 500.0}, "sod: geometry 'parallel' has no such option; add --geometry fan or cone, or drop it")]
    bad += [({"geometry": "fan", "sod": 19.0}, "inside the circle"), ({"geometry": "fan", "sod": "far"}, "sod must be")]
    bad += [({"geometry": "fan", "sdd": 150.0, "sod": 200.0}, "beyond the axis")]
    bad += [({"geometry": "fan", "detector_pitch": 1e-9}, "detector elements, the limit is")]
    for options, message in bad:
        with pytest.raises(UsageError, match=message):
            build("ct-sparse", (30, 40), 0.8, **options)


def test_command_line_from_volume_and_from_file(run, world, here):
    fan = ("--op", "ct-sparse", "--geometry", "fan", "--views", "40", "--detector-shape", "curved", "--sod", "900")
    assert run("simulate", "$/ct.nii.gz", *fan, "-o", "m.h5", "--quiet")[0] == 0
    assert run("reconstruct", "m.h5", "--solver", "fbp", "-o", "a.nii.gz", "--quiet") == (0, "", "")
    done = run("reconstruct", "$/ct.nii.gz", *fan, "--simulate", "--solver", "fbp", "-o", "b.nii.gz", "--quiet")
    assert done == (0, "", "")
    a, b = (np.asarray(nib.load(here / name).dataobj) for name in ("a.nii.gz", "b.nii.gz"))
    np.testing.assert_array_equal(a, b)
    truth = np.asarray(nib.load(world / "ct.nii.gz").dataobj)
    assert np.corrcoef(a.ravel(), truth.ravel())[0, 1] > 0.93  # neither flipped nor turned
    code, _, err = run("simulate", "$/ct.nii.gz", "--op", "ct-sparse", "--sod", "900", "-o", "c.h5")
    assert code == 2 and "add --geometry fan" in err and err.count("\n") == 1
    code, _, err = run("simulate", "$/ct.nii.gz", *fan[:-1], "100", "-o", "c.h5")
    assert code == 2 and "inside the circle" in err and err.count("\n") == 1
