"""The scans of the operator table: few views, a limited arc, low dose, for every geometry."""

import math
from dataclasses import replace

from invdiff.errors import UsageError, choose
from invdiff.operators import MOST
from invdiff.operators.base import check_plane, check_stack
from invdiff.operators.cone import ConeGeometry
from invdiff.operators.ct import CT, CTFan, CTParallel
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.fan import FanGeometry
from invdiff.operators.geometry import positive
from invdiff.operators.rays import ParallelGeometry, equispaced

MAGNIFICATION = 1.8
"""Source-detector over source-axis distance where neither says otherwise, as in clinical scanners."""


def _elements(width_mm: float, pitch_mm: float, count: int | None, name: str = "detector_pitch") -> int:
    """Elements asked for, or the smallest odd number that covers a width, with one to spare on each side."""
    positive(name, pitch_mm)
    count = (math.ceil(width_mm / pitch_mm) + 2) | 1 if count is None else count
    if count > MOST:
        raise UsageError(f"{name} of {pitch_mm:g} mm makes {count:g} detector elements, the limit is {MOST}")
    return count


def _parallel(
    shape, spacing, views_deg, detector_pitch=None, detector_count=None, detector_offset=0.0, axis_offset=0.0
) -> CTParallel:
    diagonal = math.hypot(shape[0] * spacing[0], shape[1] * spacing[1])
    pitch = min(spacing) if detector_pitch is None else detector_pitch
    count = _elements(diagonal + 2 * abs(detector_offset - axis_offset), pitch, detector_count)
    return CTParallel(shape, spacing, ParallelGeometry(views_deg, count, pitch, detector_offset, axis_offset))


def _fan(shape, spacing, views_deg, **scanner) -> CTFan:
    return CTFan(shape, spacing, _fan_geometry(shape, spacing, views_deg, **scanner))


def _fan_geometry(
    shape,
    spacing,
    views_deg,
    detector_pitch=None,
    detector_count=None,
    detector_offset=0.0,
    axis_offset=0.0,
    sod=None,
    sdd=None,
    detector_shape="flat",
    rotation="counterclockwise",
) -> FanGeometry:
    """Left open: the source two diagonals from the axis, elements of one pixel at the axis that cover the circle."""
    diagonal = math.hypot(shape[0] * spacing[0], shape[1] * spacing[1])
    if sod is None:
        sod = 2 * diagonal if sdd is None else sdd / MAGNIFICATION
    sdd = MAGNIFICATION * sod if sdd is None else sdd
    geometry = FanGeometry(views_deg, 1, 1.0, sod, sdd, detector_shape, 0.0, rotation, axis_offset)
    geometry.check_object(diagonal / 2)
    fan = math.asin(diagonal / 2 / math.hypot(sod, axis_offset))
    edges = (geometry.axis_rad - fan, geometry.axis_rad + fan)
    width = 2 * max(
        abs(sdd * (edge if detector_shape == "curved" else math.tan(edge)) - detector_offset) for edge in edges
    )
    pitch = min(spacing) * sdd / sod if detector_pitch is None else detector_pitch
    count = _elements(width, pitch, detector_count)
    return replace(geometry, detector_count=count, detector_pitch_mm=pitch, detector_offset_mm=detector_offset)


def _cone(
    shape, spacing, views_deg, detector_rows=None, detector_row_pitch=None, detector_row_offset=0.0, **scanner
) -> CTCone:
    """The fan beam of the middle plane; left open: rows of one slice at the axis that cover the volume."""
    fan = _fan_geometry(shape[1:], spacing[1:], views_deg, **scanner)
    sod, sdd = fan.source_axis_mm, fan.source_detector_mm
    pitch = spacing[0] * sdd / sod if detector_row_pitch is None else detector_row_pitch
    nearest = sod - math.hypot(shape[1] * spacing[1], shape[2] * spacing[2]) / 2  # where the volume's shadow is highest
    height = shape[0] * spacing[0] * sdd / nearest + 2 * abs(detector_row_offset)
    rows = _elements(height, pitch, detector_rows, "detector_row_pitch")
    geometry = ConeGeometry(
        fan.views_deg,
        fan.detector_count,
        rows,
        fan.detector_pitch_mm,
        pitch,
        sod,
        sdd,
        fan.detector_offset_mm,
        detector_row_offset,
        fan.rotation,
        fan.axis_offset_mm,
    )
    return CTCone(shape, spacing, geometry)


# The check of the grid, and the angle of a full scan.
_GEOMETRIES = {
    "parallel": (_parallel, check_plane, 180.0),
    "fan": (_fan, check_plane, 360.0),
    "cone": (_cone, check_stack, 360.0),
}


def _scan(geometry, shape, pixel_mm, views, arc, start, scanner) -> CT | CTCone:
    """One row of ``_GEOMETRIES``; an ``arc`` of None is the full scan."""
    make, check, turn = choose(geometry, _GEOMETRIES, "geometry")
    shape, spacing = check(shape, pixel_mm)
    return make(shape, spacing, equispaced(views, turn if arc is None else arc, start), **scanner)


def ct_sparse(shape, pixel_mm, *, views=60, start=0.0, geometry="parallel", **scanner) -> CT | CTCone:
    """Few views over 180 degrees, fan and cone beam 360.

    Args:
        shape: (H, W); (slices, H, W) for a cone beam.
        pixel_mm: (row, column) spacing in mm; (slice, row, column) for a cone beam.
        views, start, geometry: as in the table.
        **scanner: the table's options of the geometry, in mm.
    """
    return _scan(geometry, shape, pixel_mm, views, None, start, scanner)


def ct_limited(shape, pixel_mm, *, arc=90.0, views=90, start=0.0, geometry="parallel", **scanner) -> CT | CTCone:
    """Views over a limited arc, in degrees. Options as :func:`ct_sparse`."""
    return _scan(geometry, shape, pixel_mm, views, arc, start, scanner)


def ct_lowdose(shape, pixel_mm, *, views=180, start=0.0, geometry="parallel", **scanner) -> CT | CTCone:
    """Many views over 180 degrees, fan and cone beam 360; the low dose is in the noise. Options: :func:`ct_sparse`."""
    return _scan(geometry, shape, pixel_mm, views, None, start, scanner)
