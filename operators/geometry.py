"""What scans of a slice have in common: views, a row of detector elements, and how views share the circle."""

import abc
import logging
import math
from dataclasses import MISSING, asdict, fields
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import UsageError

_log = logging.getLogger("invdiff")


MOST = 1e12  # mm or degrees; squares of it still are single-precision numbers


def finite(name: str, *values: float) -> None:
    """Refuse by name NaN, infinity, and what is beyond ``MOST``."""
    got = values[0] if len(values) == 1 else values
    if not all(math.isfinite(v) for v in values):
        raise UsageError(f"{name} must be finite, got {got}")
    if not all(abs(v) <= MOST for v in values):
        raise UsageError(f"{name} must be at most {MOST:g}, got {got}")


def positive(name: str, value: float) -> None:
    """Refuse by name what is not a positive length in mm."""
    finite(name, value)
    if value <= 0:
        raise UsageError(f"{name} must be positive, in mm, got {value}")


def like_radians(views_deg: tuple[float, ...]) -> bool:
    """Whether 16 views or more cover pi or 2 pi within 2 %, with or without a last view at the end."""
    span, n = max(views_deg) - min(views_deg), len(views_deg)
    return n >= 16 and any(abs(s / turn - 1) < 0.02 for s in (span, span * n / (n - 1)) for turn in (math.pi, math.tau))


class ScanGeometry(abc.ABC):
    """A 2D scan as a value: final classes are frozen dataclasses with these attributes and their own.

    Attributes:
        kind: name in files and on the command line.
        turn_deg: angle that a full scan covers; beyond it lines are measured again.
        views_deg: angle of each view, in degrees.
        detector_count: detector elements per view.
        detector_pitch_mm: distance between the centres of neighbouring elements, at the detector, in mm.
        detector_offset_mm: shift of the detector's middle along its axis, in mm.
        axis_offset_mm: distance of the axis of rotation, which is the middle of the slice, from the midline of source
            and detector, along the detector's axis, in mm.
    """

    kind: ClassVar[str]
    turn_deg: ClassVar[float]
    views_deg: tuple[float, ...]
    detector_count: int
    detector_pitch_mm: float
    detector_offset_mm: float
    axis_offset_mm: float = 0.0

    def _check_scan(self) -> None:
        """Plain numbers of the right type, for ``__post_init__``; refuses what is not one."""
        object.__setattr__(self, "views_deg", tuple(float(v) for v in self.views_deg))
        object.__setattr__(self, "detector_pitch_mm", float(self.detector_pitch_mm))
        object.__setattr__(self, "detector_offset_mm", float(self.detector_offset_mm))
        object.__setattr__(self, "axis_offset_mm", float(self.axis_offset_mm))
        if not self.views_deg:
            raise UsageError("a scan needs at least one view")
        if int(self.detector_count) != self.detector_count or self.detector_count < 1:
            raise UsageError(f"detector_count must be a positive whole number, got {self.detector_count}")
        object.__setattr__(self, "detector_count", int(self.detector_count))
        finite("view angles", *self.views_deg)
        if like_radians(self.views_deg):
            raise UsageError(
                f"{len(self.views_deg)} views from {self.views_deg[0]:.4g} to {self.views_deg[-1]:.4g} look like "
                "radians: give angles in degrees, 180 / pi times as large"
            )
        positive("detector_pitch", self.detector_pitch_mm)
        finite("detector_offset", self.detector_offset_mm)
        finite("axis_offset", self.axis_offset_mm)

    @classmethod
    def from_dict(cls, d: dict):
        """Inverse of :meth:`as_dict`."""
        own = fields(cls)  # type: ignore[arg-type]
        known = {"geometry", *(f.name for f in own)}
        missing = [f.name for f in own if f.default is MISSING and f.name not in d]
        if d.get("geometry", "parallel") != cls.kind or set(d) - known or missing:
            raise UsageError(f"not a {cls.kind}-beam geometry: needs {sorted(known)}, got {sorted(d)}")
        return cls(**{k: v for k, v in d.items() if k != "geometry"})

    def as_dict(self) -> dict:
        """Plain JSON values; every key names its unit."""
        return {"geometry": self.kind, **asdict(self), "views_deg": list(self.views_deg)}  # type: ignore[call-overload]

    def describe(self) -> str:
        """One paragraph for people."""
        views = self.views_deg
        angles = f"from {views[0]:g} to {views[-1]:g} degrees" if len(views) > 1 else f"at {views[0]:g} degrees"
        offset = f", shifted by {self.detector_offset_mm:g} mm" if self.detector_offset_mm else ""
        axis = f" The axis of rotation lies {self.axis_offset_mm:g} mm off the midline." if self.axis_offset_mm else ""
        return (
            f"{self.kind.capitalize()} beam, {len(views)} view{'s' * (len(views) > 1)} {angles}, "
            f"{self.detector_count} detector elements of {self.detector_pitch_mm:g} mm "
            f"({self.detector_count * self.detector_pitch_mm:g} mm wide{offset}).{axis}"
        )

    def elements_mm(self) -> Tensor:
        """Position of each element along the detector, ``(detector_count,)`` in mm, float64."""
        k = torch.arange(self.detector_count, dtype=torch.float64)
        return (k - (self.detector_count - 1) / 2) * self.detector_pitch_mm + self.detector_offset_mm

    def doubts(self) -> tuple[str, ...]:
        """Remarks on angles that may have been meant in radians; one line each, none as a rule."""
        first, span, found = self.views_deg[0], max(self.views_deg) - min(self.views_deg), []
        if len(self.views_deg) >= 16 and 0 < span < math.tau:
            found.append(f"the views cover only {span:.4g} degrees: angles are in degrees, were radians meant?")
        if any(abs(abs(first) - k * math.pi / 4) < 2e-3 for k in range(1, 9)):
            found.append(f"the first view is at {first:.4g} degrees: angles are in degrees, were radians meant?")
        return tuple(found)

    def reach(self, u: Tensor) -> Tensor:
        """Signed distance from the axis of the lines seen at positions ``u`` along the detector, in mm."""
        return u - self.axis_offset_mm

    def seen_mm(self) -> tuple[float, float]:
        """Signed distances from the axis, in mm, of the outermost lines that the detector sees, least first."""
        half = self.detector_count * self.detector_pitch_mm / 2
        ends = torch.tensor([-half, half], dtype=torch.float64) + self.detector_offset_mm
        low, high = sorted(self.reach(ends).tolist())
        return low, high

    @property
    def field_of_view_mm(self) -> float:
        """Diameter of the circle around the axis that lies inside the beam in every view; 0 where none does."""
        low, high = self.seen_mm()
        return 2 * max(0.0, min(-low, high))

    def missing_deg(self) -> tuple[tuple[float, float], ...]:
        """Angles, modulo 180 degrees, of lines through the axis that no view measures, as (start, end)."""
        if len({round(v % 180.0, 9) for v in self.views_deg}) == 1:
            first = self.views_deg[0] % 180.0
            return ((first, first + 180.0),)
        arcs = sorted((start % 180.0, length) for start, length in covered(self.views_deg, 180.0)[1])
        starts = [start for start, _ in arcs[1:]] + [start + 180.0 for start, _ in arcs[:1]]
        missing = [(start + length, after) for (start, length), after in zip(arcs, starts, strict=True)]
        return tuple((a - 180.0 * (a >= 180.0), b - 180.0 * (a >= 180.0)) for a, b in missing)

    @abc.abstractmethod
    def rays(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rays of views ``first:last``, view by view, ``(views * detector_count, 4)``: point and direction in mm."""

    @abc.abstractmethod
    def crossings(self, shape: tuple[int, int], pixel_mm: tuple[float, float]) -> float:
        """Joseph steps per pixel, summed over views: half of the matrix entries per pixel."""

    @abc.abstractmethod
    def check_object(self, radius_mm: float) -> None:
        """Refuse a circle of this radius around the axis where the scanner has no room for it."""

    @abc.abstractmethod
    def locate(self, x: Tensor, y: Tensor, views: slice) -> tuple[Tensor, Tensor | None]:
        """Where the rays through points meet the detector.

        Args:
            x, y: coordinates in mm, float64, broadcastable to ``(..., 1)``.
            views: which views.

        Returns:
            Position in elements, 0 at the centre of the first, ``(..., views)``; and what a view weighs there in
            filtered backprojection, same shape, or None for 1.
        """

    @abc.abstractmethod
    def view_weights(self) -> tuple[float, ...]:
        """Angle in radians that each view stands for in filtered backprojection."""

    def ray_weights(self) -> Tensor:
        """Factor of each ray before filtering, broadcastable to ``(views, detector_count)``, float64."""
        return torch.ones(1, 1, dtype=torch.float64)

    @property
    def filter_pitch_mm(self) -> float:
        """Distance of the elements that the ramp filter is built for."""
        return self.detector_pitch_mm

    @property
    def filter_step_rad(self) -> float:
        """Angle between neighbouring elements seen from the source, where they lie on an arc; 0 on a line."""
        return 0.0

    def missed(self, shape: tuple[int, int], pixel_mm: tuple[float, float]) -> float:
        """Share of the rays through the slice, at the spacing of the elements, that the detector is too small for.

        Args:
            shape: (H, W).
            pixel_mm: (row spacing, column spacing) in mm.
        """
        half = [n * d / 2 for n, d in zip(shape, pixel_mm, strict=True)]
        x = torch.tensor([half[1], half[1], -half[1], -half[1]], dtype=torch.float64)[:, None]
        y = torch.tensor([half[0], -half[0], half[0], -half[0]], dtype=torch.float64)[:, None]
        at, _ = self.locate(x, y, slice(None))
        low, high = at.min(0).values, at.max(0).values  # the slice is convex: its corners bound its shadow
        seen = (high.clamp(max=self.detector_count - 0.5) - low.clamp(min=-0.5)).clamp(min=0)
        return float(1 - seen.sum() / (high - low).sum())


_announced: set[str] = set()  # one warning for the copies of an operator
NOTICEABLE = 0.001  # share of rays whose loss is worth a warning


def truncation(what: str, share: float) -> tuple[str, ...]:
    """A note on the ``share`` of rays that a detector misses, where it is worth one."""
    if share <= NOTICEABLE:
        return ()
    percent = f"{100 * share:.2g}" if share < 0.995 else "100"
    return (f"the detector is too small for the {what}: {percent} % of the rays through it miss the detector",)


def announce(*notes: str) -> tuple[str, ...]:
    """The notes of an operator; each new one is a warning too."""
    for note in notes:
        if note not in _announced:
            _announced.add(note)
            _log.warning(note)
    return notes


def covered(views_deg: tuple[float, ...], turn_deg: float) -> tuple[tuple[float, ...], tuple[tuple[float, float], ...]]:
    """How views share a circle: half the gap to each neighbour, so that views measured twice share their weight.

    A gap over three times the median one is a missing wedge, not a coarse sampling: its two ends get the median gap.

    Args:
        views_deg: angles in degrees, in any order.
        turn_deg: the circle, 180 or 360 degrees.

    Returns:
        The share of each view in radians, and the arcs between missing wedges as (start, length) in degrees: none where
        the views go all the way round.
    """
    n, turn = len(views_deg), turn_deg
    # 1e-9 degrees: views that are opposite but for rounding must not fall on two sides of the seam.
    folded = [round(v % turn, 9) % turn for v in views_deg]
    order = sorted(range(n), key=folded.__getitem__)
    ahead = [(folded[order[(i + 1) % n]] - folded[order[i]]) % turn for i in range(n)]
    if not any(ahead):
        return (math.radians(turn) / n,) * n, ()
    gaps = sorted(g for g in ahead if g > 0)
    median = gaps[(len(gaps) - 1) // 2]
    wedges = [i for i in range(n) if ahead[i] > 3 * median]
    arcs = []
    for k, i in enumerate(wedges):  # an arc runs from the end of one wedge to the start of the next
        start, end = folded[order[(i + 1) % n]], folded[order[wedges[(k + 1) % len(wedges)]]]
        arcs.append((start - median / 2, (end - start) % turn + median))
    ahead = [median if g > 3 * median else g for g in ahead]
    weights = [0.0] * n
    for i, view in enumerate(order):
        weights[view] = math.radians(ahead[i] + ahead[i - 1]) / 2
    return tuple(weights), tuple(arcs)
