"""Cone-beam scans: a point source on a circle with a flat panel that turns with it."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.operators.fan import FanGeometry
from invdiff.operators.geometry import finite, positive

STEEPEST_DEG = 45.0
"""Rays step from plane to plane along rows or columns of the slices and must be less steep than this."""


@dataclass(frozen=True)
class ConeGeometry:
    """Circular cone-beam scan; its middle plane is a :class:`FanGeometry` with a flat detector, angles included.

    The source turns in the plane of the middle of the volume. z grows with the slices, and so do the rows of the panel:
    row r is at ``v = (r - (rows - 1) / 2) * row pitch + row offset``, in mm.

    Attributes:
        views_deg: angle of each view, in degrees.
        detector_count: columns of the panel, the elements of a row.
        detector_rows: rows of the panel.
        detector_pitch_mm: distance between neighbouring columns, in mm.
        detector_row_pitch_mm: distance between neighbouring rows, in mm.
        source_axis_mm: from the source to the axis of rotation (SOD), in mm.
        source_detector_mm: from the source to the panel (SDD), in mm.
        detector_offset_mm: shift of the panel's middle along its rows, in mm; see :class:`FanGeometry`.
        detector_row_offset_mm: shift of the panel's middle along z, in mm.
        rotation: sense in which the source turns, "counterclockwise" or "clockwise"; see :class:`FanGeometry`.
        axis_offset_mm: distance of the axis of rotation from the midline of source and panel; see :class:`FanGeometry`.

    Raises:
        UsageError: what :class:`FanGeometry` refuses, no row, a row pitch that is not positive, or rows that are seen
            from the source at 45 degrees or more from the middle plane.

    Source: L. A. Feldkamp, L. C. Davis and J. W. Kress, J. Opt. Soc. Am. A 1 (1984) 612-619.
    """

    kind: ClassVar[str] = "cone"

    views_deg: tuple[float, ...]
    detector_count: int
    detector_rows: int
    detector_pitch_mm: float
    detector_row_pitch_mm: float
    source_axis_mm: float
    source_detector_mm: float
    detector_offset_mm: float = 0.0
    detector_row_offset_mm: float = 0.0
    rotation: str = "counterclockwise"
    axis_offset_mm: float = 0.0

    def __post_init__(self):
        for f in fields(FanGeometry):  # checked and made plain there
            if f.name != "detector_shape":
                object.__setattr__(self, f.name, getattr(self.fan, f.name))
        for name in ("detector_row_pitch_mm", "detector_row_offset_mm"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if int(self.detector_rows) != self.detector_rows or self.detector_rows < 1:
            raise UsageError(f"detector_rows must be a positive whole number, got {self.detector_rows}")
        object.__setattr__(self, "detector_rows", int(self.detector_rows))
        positive("detector_row_pitch", self.detector_row_pitch_mm)
        finite("detector_row_offset", self.detector_row_offset_mm)
        if self.half_cone_deg >= STEEPEST_DEG:
            raise UsageError(
                f"the outer detector rows are seen at {self.half_cone_deg:.4g} degrees from the middle plane, "
                f"the limit is {STEEPEST_DEG:g}: use fewer rows or a larger source-detector distance (--sdd)"
            )

    @cached_property
    def fan(self) -> FanGeometry:
        """The scan of the middle plane."""
        return FanGeometry(
            self.views_deg,
            self.detector_count,
            self.detector_pitch_mm,
            self.source_axis_mm,
            self.source_detector_mm,
            "flat",
            self.detector_offset_mm,
            self.rotation,
            self.axis_offset_mm,
        )

    @property
    def half_cone_deg(self) -> float:
        """Largest angle of a detector row from the middle plane, in the middle of the fan, in degrees."""
        ends = [abs(float(v)) for v in self.rows_mm()[[0, -1]]]
        return math.degrees(math.atan(max(ends) / self.source_detector_mm))

    @classmethod
    def from_dict(cls, d: dict) -> "ConeGeometry":
        """Inverse of :meth:`as_dict`."""
        known = {"geometry", *(f.name for f in fields(cls))}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in d]
        if d.get("geometry") != cls.kind or set(d) - known or missing:
            raise UsageError(f"not a cone-beam geometry: needs {sorted(known)}, got {sorted(d)}")
        return cls(**{k: v for k, v in d.items() if k != "geometry"})

    def as_dict(self) -> dict:
        """Plain JSON values; every key names its unit."""
        return {"geometry": self.kind, **asdict(self), "views_deg": list(self.views_deg)}

    def describe(self) -> str:
        """One paragraph for people."""
        offset = f", shifted by {self.detector_row_offset_mm:g} mm" if self.detector_row_offset_mm else ""
        return (
            f"{self.fan.describe().replace('Fan', 'Cone', 1)} {self.detector_rows} detector rows of "
            f"{self.detector_row_pitch_mm:g} mm ({self.detector_rows * self.detector_row_pitch_mm:g} mm high{offset}); "
            f"half cone {self.half_cone_deg:.4g} degrees."
        )

    def rows_mm(self) -> Tensor:
        """Position of each detector row along z, ``(detector_rows,)`` in mm, float64."""
        k = torch.arange(self.detector_rows, dtype=torch.float64)
        return (k - (self.detector_rows - 1) / 2) * self.detector_row_pitch_mm + self.detector_row_offset_mm

    def cosines(self) -> Tensor:
        """Cosine of each ray's angle with the middle plane, ``(detector_count, detector_rows)`` float64."""
        inside = torch.hypot(self.fan.elements_mm(), torch.tensor(self.source_detector_mm, dtype=torch.float64))[
            :, None
        ]
        return inside / torch.hypot(inside, self.rows_mm())

    def missed(self, shape: tuple[int, int, int], voxel_mm: tuple[float, float, float]) -> float:
        """Share of the rays through the volume, at the spacing of the elements, that the panel is too small for.

        Args:
            shape: (S, H, W).
            voxel_mm: (slice, row, column) spacing in mm.
        """
        top, half_y, half_x = (n * d / 2 for n, d in zip(shape, voxel_mm, strict=True))
        x, y = ([s * h for s in signs] for h, signs in ((half_x, (1, 1, -1, -1)), (half_y, (1, -1, 1, -1))))
        corners = [torch.tensor(c, dtype=torch.float64)[:, None] for c in (x, y)]
        at, magnification = self.fan.shadow(corners[0], corners[1], slice(None))
        high = top * magnification
        # The shadow of a box is convex: it reaches up to the chords between the shadows of its corners.
        ends = at.min(0).values, at.max(0).values
        u = torch.lerp(ends[0], ends[1], (torch.arange(64, dtype=torch.float64)[:, None] + 0.5) / 64)
        reach = torch.zeros_like(u)
        for i, j in combinations(range(4), 2):
            part = ((u - at[i]) / (at[j] - at[i])).nan_to_num(-1.0, -1.0, -1.0)
            reach = torch.where(
                (part >= 0) & (part <= 1), torch.maximum(reach, torch.lerp(high[i], high[j], part)), reach
            )
        edge = self.detector_rows * self.detector_row_pitch_mm / 2
        low, up = self.detector_row_offset_mm - edge, self.detector_row_offset_mm + edge
        seen = (reach.clamp(max=up) - (-reach).clamp(min=low)).clamp(min=0)
        seen = seen * ((u >= -0.5) & (u <= self.detector_count - 0.5))
        step = ends[1] - ends[0]
        return float(1 - (seen * step).sum() / (2 * reach * step).sum())
