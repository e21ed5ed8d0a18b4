"""An axis of rotation that misses the midline of source and detector: where points fall, and FBP that undoes it."""

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.errors import UsageError
from invdiff.measurement_file import load_measurement, save_measurement
from invdiff.operators import build, resolve
from invdiff.operators.ct import CTFan, CTParallel, scanner_from_dict
from invdiff.operators.fan import FanGeometry
from invdiff.operators.rays import ParallelGeometry, equispaced

MU_WATER = 0.0193  # 1/mm
OFF = 6.3  # mm


def scan(kind, views=24, arc=360.0, axis=OFF, **change):
    angles = equispaced(views, arc, 3.0)
    if kind == "parallel":
        return replace(ParallelGeometry(angles, 161, 0.8, 0.3, axis), **change)
    return replace(FanGeometry(angles, 161, 1.4, 120.0, 210.0, kind, 0.3, "counterclockwise", axis), **change)


def operator(geometry, shape=(72, 80), pixel=(1.0, 0.9)):
    return (CTParallel if geometry.kind == "parallel" else CTFan)(shape, pixel, geometry)


def in_scanner(g, x, y):
    """Where a point lies in the frame of source and detector, by rotating it about the axis and shifting it by c.

    Returns the coordinate across the midline and the one along it, from the axis's foot on the midline to the detector.
    """
    b = np.deg2rad(g.views_deg) * (-1 if getattr(g, "rotation", "") == "clockwise" else 1)
    return x * np.cos(b) + y * np.sin(b) + g.axis_offset_mm, y * np.cos(b) - x * np.sin(b)


def chords(g, discs):
    """Lengths of rays in discs (x, y, radius, value) times the values: source and elements stand, the discs turn."""
    u = (np.arange(g.detector_count) - (g.detector_count - 1) / 2) * g.detector_pitch_mm + g.detector_offset_mm
    total = 0
    for x, y, r, value in discs:
        across, along = (p[:, None] for p in in_scanner(g, x, y))
        if g.kind == "parallel":
            distance = across - u
        else:
            angle = u / g.source_detector_mm if g.detector_shape == "curved" else np.arctan(u / g.source_detector_mm)
            distance = across * np.cos(angle) - (along + g.source_axis_mm) * np.sin(angle)
        total = total + 2 * value * np.sqrt(np.maximum(r**2 - distance**2, 0))
    return torch.from_numpy(total)[None]


def disc(shape, pixel, x, y, r, fine=6):
    (h, w), (dy, dx) = shape, pixel
    px = (np.arange(w * fine) - (w * fine - 1) / 2) * dx / fine
    py = ((h * fine - 1) / 2 - np.arange(h * fine)) * dy / fine
    inside = (px[None] - x) ** 2 + (py[:, None] - y) ** 2 < r**2
    return torch.from_numpy(inside.reshape(h, fine, w, fine).mean((1, 3)))


@pytest.mark.parametrize("kind", ["parallel", "flat", "curved"])
def test_the_sinusoid_of_a_point(kind):
    """The middle of its shadow: x cos a + y sin a + c, for a fan magnified by the distance from the source."""
    g = scan(kind)
    row, column = 20, 61
    x, y = (column - 39.5) * 0.9, (35.5 - row) * 1.0
    image = torch.zeros(1, 72, 80, dtype=torch.float64)
    image[0, row, column] = 1.0

    def middle(g):
        shadow = operator(g)(image)[0].numpy()
        return shadow @ g.elements_mm().numpy() / shadow.sum(1)

    across, along = in_scanner(g, x, y)
    expected = across if kind == "parallel" else across / (along + 120.0) * 210.0
    if kind == "curved":
        expected = np.arctan2(across, along + 120.0) * 210.0
    assert abs(middle(g) - expected).max() < 0.25  # a fifth of an element
    assert abs(middle(replace(g, axis_offset_mm=0.0)) - expected).min() > 5  # without it all shadows lie elsewhere


@pytest.mark.parametrize("kind", ["parallel", "flat", "curved"])
@pytest.mark.parametrize("rotation", ["counterclockwise", "clockwise"])
def test_chords_of_discs(kind, rotation):
    g = scan(kind, **({} if kind == "parallel" else {"rotation": rotation}))
    op = operator(g)
    discs = [(14.0, 18.0, 6.0, 1.0), (-20.0, -6.0, 5.0, 2.0)]
    image = sum(v * disc(op.shape, op.pixel_mm, x, y, r) for x, y, r, v in discs)[None]
    measured, expected = op(image), chords(g, discs)
    assert (measured - expected).norm() < 0.05 * expected.norm()  # pixels are no discs
    for wrong in (-OFF, 0.0):
        other = chords(replace(g, axis_offset_mm=wrong), discs)
        assert (measured - other).norm() > 0.4 * other.norm()


def test_a_parallel_beam_cannot_tell_it_from_a_shifted_detector():
    g = scan("parallel")
    same = replace(g, axis_offset_mm=0.0, detector_offset_mm=g.detector_offset_mm - OFF)
    assert torch.equal(g.rays(), same.rays()) and g.seen_mm() == pytest.approx(same.seen_mm())
    y = torch.randn(1, *operator(g).out_shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(operator(g).fbp(y), operator(same).fbp(y))
    assert torch.equal(operator(g).adjoint(y), operator(same).adjoint(y))


def test_a_fan_can_tell_but_for_a_curved_detector_it_is_another_fan():
    """Seen from the axis, the source is hypot(SOD, c) away and an arc of elements turned by atan(c / SOD)."""
    curved, turned = scan("curved"), math.atan(OFF / 120.0)
    same = replace(
        curved,
        views_deg=tuple(v - math.degrees(turned) for v in curved.views_deg),
        source_axis_mm=math.hypot(120.0, OFF),
        detector_offset_mm=curved.detector_offset_mm - 210.0 * turned,
        axis_offset_mm=0.0,
    )
    assert (curved.rays() - same.rays()).abs().max() < 1e-9
    y = torch.randn(1, *operator(curved).out_shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = operator(curved).fbp(y), operator(same).fbp(y)
    assert (a - b).norm() < 1e-9 * b.norm()
    flat = scan("flat")
    shifted = [replace(flat, axis_offset_mm=0.0, detector_offset_mm=0.3 - s * OFF) for s in (1.0, 1.75)]
    assert min(float((flat.rays() - other.rays()).abs().max()) for other in shifted) > 0.05


@pytest.mark.parametrize("kind", ["parallel", "flat", "curved"])
@pytest.mark.parametrize("arc", ["full", "short"])
@pytest.mark.parametrize("rotation", ["counterclockwise", "clockwise"])
def test_fbp_puts_it_back_and_keeps_hu(kind, arc, rotation):
    degrees = {"full": 180.0 if kind == "parallel" else 360.0, "short": 180.0 + 2 * 32.0}[arc]
    if kind == "parallel" and (arc == "short" or rotation == "clockwise"):
        pytest.skip("a parallel beam has neither")
    g = scan(kind, 360, degrees, **({} if kind == "parallel" else {"rotation": rotation}))
    op = operator(g)
    discs = [(4.0, -5.0, 28.0, MU_WATER), (16.0, 5.0, 8.0, MU_WATER), (-9.0, -14.0, 7.0, -0.8 * MU_WATER)]
    fine = replace(g, detector_count=4 * 161, detector_pitch_mm=g.detector_pitch_mm / 4)  # elements have a width
    y = chords(fine, discs).reshape(*op.out_shape, 4).mean(-1).float()
    hu = 1000 * (op.fbp(y) / MU_WATER - 1)[0]
    for x, z, r, truth in ((-8, 10, 6, 0), (16, 5, 5, 1000), (-9, -14, 4, -800), (-30, 28, 5, -1000)):
        inside = hu[disc(op.shape, op.pixel_mm, x, z, r) == 1]
        assert abs(float(inside.mean()) - truth) < 2 and float(inside.std()) < 20, (truth, float(inside.mean()))
    ignored = 1000 * (operator(replace(g, axis_offset_mm=0.0)).fbp(y) / MU_WATER - 1)[0]
    assert float((ignored - hu).square().mean().sqrt()) > 100


def test_the_default_detector_covers_the_slice_and_the_field_of_view_follows():
    for options in ({}, {"geometry": "fan"}, {"geometry": "fan", "detector_shape": "curved"}):
        op = build("ct-sparse", (30, 40), 0.8, axis_offset=9.0, **options)
        low, high = op.geometry.seen_mm()
        assert op.geometry.axis_offset_mm == 9.0 and not op.notes
        assert min(-low, high) >= 20.0  # half a diagonal of the slice
        assert op.geometry.missed(op.shape, op.pixel_mm) == pytest.approx(0, abs=1e-12)
    assert "axis of rotation lies 9 mm off the midline" in op.describe()
    edges = scan("flat", axis=2.0, detector_offset_mm=0.0)
    fan = math.atan(161 * 1.4 / 2 / 210)
    expected = [s * 120 * math.sin(fan) - 2 * math.cos(fan) for s in (-1, 1)]
    assert edges.seen_mm() == pytest.approx(expected)


def test_old_files_are_read_and_new_ones_keep_it(run, here, world):
    for kind in ("parallel", "flat"):
        stored = operator(scan(kind)).as_dict()
        assert scanner_from_dict(json.loads(json.dumps(stored))).geometry == scan(kind)
        old = {k: v for k, v in stored.items() if k != "axis_offset_mm"}
        assert scanner_from_dict(old).geometry == scan(kind, axis=0.0)
    options = ("--op", "ct-sparse", "--views", "60", "--axis-offset", "30")
    assert run("simulate", "$/ct.nii.gz", *options, "-o", "m.h5", "--quiet")[0] == 0
    kept = load_measurement(here / "m.h5")
    assert kept.operator["axis_offset_mm"] == 30.0
    save_measurement(here / "old.h5", replace(kept, operator=kept.operator | {"axis_offset_mm": 0.0}))
    truth, errors = np.asarray(nib.load(world / "ct.nii.gz").dataobj), []
    for name in ("m.h5", "old.h5"):
        args = ("--solver", "fbp", "-o", "r.nii.gz", "--quiet", "--overwrite")
        assert run("reconstruct", name, *args) == (0, "", "")
        errors.append(np.sqrt(np.mean((np.asarray(nib.load(here / "r.nii.gz").dataobj) - truth) ** 2)))
    assert errors[0] < 0.6 * errors[1]


def test_refusals():
    for bad in (math.nan, math.inf, "left"):
        with pytest.raises(UsageError, match="axis_offset must be a finite number"):
            resolve("ct-sparse", axis_offset=bad)
    with pytest.raises(UsageError, match="axis_offset must be finite, got nan"):
        scan("flat", axis=math.nan)
