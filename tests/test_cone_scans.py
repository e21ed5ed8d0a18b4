"""Cone-beam scans: FDK, simulation, refusals, and the scan as JSON, in words and in the table."""

import json
import logging
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from cone_cases import BLOBS, MU_WATER, TINY, ball_image, blob_image, blobs, chords, ends, gaussian, relative

from invdiff.errors import UsageError
from invdiff.operators import build, resolve
from invdiff.operators.cone import ConeGeometry
from invdiff.operators.ct import scanner_from_dict
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.rays import equispaced
from invdiff.simulate import panel_projections, simulate_ct

FULL = (360, 360.0, "counterclockwise", 0.0, 0.25, 0.0)  # views, arc, rotation, start, offset in columns, axis in mm


SHORT = (320, 180.0 + 2 * 31.0, "clockwise", 77.0, 0.0, 0.0)
OFF_AXIS = (360, 360.0, "clockwise", 5.0, 0.0, 6.3)


@pytest.mark.parametrize(
    "views, arc, rotation, start, offset, axis", [FULL, SHORT, OFF_AXIS], ids=["full", "short", "axis"]
)
def test_fdk_is_right_in_hu(views, arc, rotation, start, offset, axis):
    balls = [(2.0, -4.0, 0.0, 34.0, MU_WATER), (17.0, 6.0, 2.0, 8.0, MU_WATER)]
    balls += [(-14.0, -14.0, -2.0, 8.0, -0.8 * MU_WATER), (-10.0, 12.0, 0.0, 8.0, 0.05 * MU_WATER)]
    g = ConeGeometry(equispaced(views, arc, start), 147, 9, 1.8, 1.8, 125.0, 225.0, 1.8 * offset, 0.9, rotation, axis)
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
    assert (
        build("ct-sparse", (10, 30, 40), (2.0, 0.8, 0.8), geometry="cone", axis_offset=1.5).geometry.fan.axis_offset_mm
        == 1.5
    )
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
