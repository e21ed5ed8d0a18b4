"""Fan-beam scans: a point source that turns with a flat or curved row of detector elements.

Every ray of a fan is a ray of a parallel scan: element angle g in view b lies on the line of view ``a = b - g`` at the
signed distance ``t = SOD sin g`` from the axis. A full turn meets each line twice, at (b, g) and (b + 180 - 2 g, -g).
Where the axis of rotation lies c off the midline, at the angle d = atan(c / SOD) of the fan, these are
``t = SOD sin g - c cos g`` and (b + 180 - 2 (g - d), 2 d - g).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import UsageError, choose
from invdiff.operators.geometry import ScanGeometry, covered, positive

SHAPES = {"flat": "line", "curved": "arc around the source"}
SENSES = {"counterclockwise": 1.0, "clockwise": -1.0}
TAPER_DEG = 10.0
"""Width of the smooth ends of an arc that is shorter than a short scan; F. Noo et al. (2002) use the same."""


@dataclass(frozen=True)
class FanGeometry(ScanGeometry):
    """Fan-beam scan; at the default sense of rotation the angles are those of ASTRA's ``fanflat`` geometry.

    In the view at angle b the source is at ``SOD (sin b, -cos b)``, below the slice at 0 degrees and to its right at
    90, and the detector axis points along (cos b, sin b), as in :class:`ParallelGeometry`: the limit of a far source is
    the parallel scan of the same angles. Clockwise scans take the views at ``-b``.

    Attributes:
        views_deg: angle of each view, in degrees.
        detector_count: detector elements per view.
        detector_pitch_mm: distance between neighbouring elements at the detector, along the line or arc, in mm.
        source_axis_mm: from the source to the axis of rotation (SOD), in mm; the axis is the middle of the slice.
        source_detector_mm: from the source to the detector (SDD), in mm; the radius of a curved one.
        detector_shape: "flat", or "curved" on an arc around the source (equal angles).
        detector_offset_mm: shift of the detector's middle along its line or arc, in mm; a quarter of the pitch makes
            opposite views of a full turn sample between each other.
        rotation: sense in which the source turns with growing angle, seen with rows downwards: "counterclockwise" or
            "clockwise".
        axis_offset_mm: distance of the axis of rotation, the middle of the slice, from the line through the source and
            the middle of an unshifted detector, along the detector's axis, in mm. Unlike a shifted detector it moves
            the source as well, and lines with it.

    Raises:
        UsageError: no view, no element, lengths that are not positive, a detector no further than the axis, elements
            of an arc at 90 degrees or more, an unknown shape or sense.

    Source: A. C. Kak and M. Slaney, Principles of Computerized Tomographic Imaging, 1988, section 3.4.
    """

    kind: ClassVar[str] = "fan"
    turn_deg: ClassVar[float] = 360.0

    views_deg: tuple[float, ...]
    detector_count: int
    detector_pitch_mm: float
    source_axis_mm: float
    source_detector_mm: float
    detector_shape: str = "flat"
    detector_offset_mm: float = 0.0
    rotation: str = "counterclockwise"
    axis_offset_mm: float = 0.0

    def __post_init__(self):
        self._check_scan()
        for key, name in (
            ("source_axis_mm", "source-axis distance"),
            ("source_detector_mm", "source-detector distance"),
        ):
            object.__setattr__(self, key, float(getattr(self, key)))
            positive(name, getattr(self, key))
        choose(self.detector_shape, SHAPES, "detector shape")
        choose(self.rotation, SENSES, "rotation")
        sod, sdd = self.source_axis_mm, self.source_detector_mm
        if sdd <= sod:
            raise UsageError(f"the detector, {sdd:g} mm from the source, must lie beyond the axis, {sod:g} mm from it")
        if self.half_fan_rad >= math.pi / 2:
            fan = math.degrees(self.half_fan_rad)
            raise UsageError(
                f"the curved detector reaches {fan:.4g} degrees from its middle, the limit is 90: shorten it"
            )

    def describe(self) -> str:
        """One paragraph for people."""
        seen, directions = len(self.views_deg), len({round(v % 180.0, 6) % 180.0 for v in self.views_deg})
        twice = f" Opposite views pair up: {directions} directions of lines at the axis." if directions < seen else ""
        return (
            f"{super().describe()} Source {self.source_axis_mm:g} mm from the axis and {self.source_detector_mm:g} mm "
            f"from the {self.detector_shape} detector, turning {self.rotation}; half fan "
            f"{math.degrees(self.half_fan_rad):.4g} degrees.{twice}"
        )

    def fan_rad(self) -> Tensor:
        """Angle of each element from the midline, ``(detector_count,)`` in rad, float64."""
        return self._angle(self.elements_mm())

    def _angle(self, u: Tensor) -> Tensor:
        u = u / self.source_detector_mm
        return u if self.detector_shape == "curved" else u.atan()

    def _distance(self, fan: Tensor) -> Tensor:
        """Signed distance of rays from the axis, in mm."""
        return self.source_axis_mm * fan.sin() - self.axis_offset_mm * fan.cos()

    def reach(self, u: Tensor) -> Tensor:
        """Signed distance from the axis of the lines seen at positions ``u`` along the detector, in mm."""
        return self._distance(self._angle(u))

    @property
    def axis_rad(self) -> float:
        """Angle at which the source sees the axis of rotation, from the midline."""
        return math.atan(self.axis_offset_mm / self.source_axis_mm)

    @property
    def half_fan_rad(self) -> float:
        """Largest angle of an element from the midline."""
        ends = [
            (side * (self.detector_count - 1) / 2) * self.detector_pitch_mm + self.detector_offset_mm
            for side in (-1, 1)
        ]
        u = max(map(abs, ends)) / self.source_detector_mm
        return u if self.detector_shape == "curved" else math.atan(u)

    def _turns(self, views: slice) -> Tensor:
        return SENSES[self.rotation] * torch.deg2rad(torch.tensor(self.views_deg[views], dtype=torch.float64))

    def rays(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rays of views ``first:last``, ``(views * detector_count, 4)`` float64.

        Each starts at its point nearest to the axis, in mm, which keeps its digits when the source is far away, and
        points from the source to the detector.
        """
        fan = self.fan_rad()
        a, t = self._turns(slice(first, last))[:, None] - fan, self._distance(fan)
        return torch.stack([t * a.cos(), t * a.sin(), -a.sin(), a.cos()], -1).reshape(-1, 4)

    def _polar(self, x: Tensor, y: Tensor, views: slice) -> tuple[Tensor, Tensor]:
        """Points as seen from the source: mm along the middle of the fan, mm across it."""
        b = self._turns(views).to(x.device)
        return y * b.cos() - x * b.sin() + self.source_axis_mm, x * b.cos() + y * b.sin() + self.axis_offset_mm

    def locate(self, x: Tensor, y: Tensor, views: slice) -> tuple[Tensor, Tensor | None]:
        """Detector position in elements, and the weight ``(SOD / U)^2`` of a flat or ``(SOD / L)^2`` of a curved one.

        U is the distance of the point from the source along the middle of the fan, L the distance itself: Kak and
        Slaney 1988, equations 3.97-3.104 and 3.115-3.122.
        """
        along, across = self._polar(x, y, views)
        if self.detector_shape == "curved":
            u, square = torch.atan2(across, along), along.square() + across.square()
        else:
            u, square = across / along, along.square()
        u = (u * self.source_detector_mm - self.detector_offset_mm) / self.detector_pitch_mm
        return u.add_((self.detector_count - 1) / 2), self.source_axis_mm**2 / square

    def crossings(self, shape: tuple[int, int], pixel_mm: tuple[float, float]) -> float:
        """As for a parallel scan, with the direction and distance of rays at 9 x 9 points and up to 360 views."""
        (dy, dx), grid = pixel_mm, (torch.arange(9, dtype=torch.float64) - 4) / 9
        x, y = (shape[1] * dx * grid)[None, :, None], (shape[0] * dy * grid)[:, None, None]
        views = slice(None, None, max(1, len(self.views_deg) // 360))
        along, across = self._polar(x, y, views)
        angle = self._turns(views) - torch.atan2(across, along)
        distance = torch.hypot(along, across) * (self.detector_pitch_mm / self.source_detector_mm)
        if self.detector_shape == "flat":
            distance *= along.square() / (along.square() + across.square())
        steps = torch.maximum(dx * angle.cos().abs(), dy * angle.sin().abs()) / distance
        return float(steps.mean()) * len(self.views_deg)

    def check_object(self, radius_mm: float) -> None:
        """Refuse a source that would run into the circle around the slice."""
        distance = math.hypot(self.source_axis_mm, self.axis_offset_mm)
        if distance <= radius_mm:
            raise UsageError(
                f"the source, {distance:g} mm from the axis, would be inside the circle around the slice, "
                f"of {radius_mm:.4g} mm radius: give a larger source-axis distance (--sod)"
            )

    def view_weights(self) -> tuple[float, ...]:
        """Angle in radians that each view stands for, of 360 degrees; see :func:`geometry.covered`."""
        return covered(self.views_deg, 360.0)[0]

    def ray_weights(self) -> Tensor:
        """``(dt / dg) / SOD`` times the share of each ray in its line, ``(views, detector_count)`` float64.

        The first factor is the cosine of the fan angle; an axis off the midline by c adds ``c / SOD sin g``: G. T.
        Gullberg et al., IEEE Trans. Med. Imaging 5 (1986) 23-29.
        """
        fan, arcs = self.fan_rad(), covered(self.views_deg, 360.0)[1]
        views, around = torch.tensor(self.views_deg, dtype=torch.float64)[:, None], (fan - self.axis_rad).rad2deg()
        share = line_shares(views, SENSES[self.rotation] * around, arcs, float(around.abs().max()))
        return (fan.cos() + self.axis_offset_mm / self.source_axis_mm * fan.sin()) * share

    @property
    def filter_pitch_mm(self) -> float:
        """Distance of the elements at the axis."""
        return self.detector_pitch_mm * self.source_axis_mm / self.source_detector_mm

    @property
    def filter_step_rad(self) -> float:
        """Angle between neighbouring elements of an arc; 0 on a line."""
        return self.detector_pitch_mm / self.source_detector_mm if self.detector_shape == "curved" else 0.0


def line_shares(views: Tensor, fan: Tensor, arcs, half_fan: float) -> Tensor:
    """Weights of rays that sum to one over the measurements of a line, in two views or one; all angles in degrees.

    Full turn: half each. One arc of at least 180 degrees and the fan: Parker's weights, for the arc at hand. Less: the
    smooth profile of the arcs, divided by the sum of its values at both places of the line, so that lines measured
    once count fully and those never measured stay missing.

    Args:
        views: angles inside the arcs, ``(views, 1)``.
        fan: angle of each element from the axis; its line is met again at ``views + 180 - 2 fan``.
        arcs: (start, length) of what the views cover; none for the full turn.
        half_fan: largest fan angle of the detector.

    Source: D. L. Parker, Med. Phys. 9 (1982) 254-257; F. Noo et al., Phys. Med. Biol. 47 (2002) 2525-2546.
    """
    if not arcs:
        return torch.full((1, 1), 0.5, dtype=torch.float64)
    excess = (arcs[0][1] - 180.0) / 2
    if len(arcs) == 1 and excess >= half_fan - 1e-9:
        return _parker((views - arcs[0][0]).remainder(360.0), fan, excess)
    here, there = _profile(views, arcs), _profile(views + 180.0 - 2 * fan, arcs)
    return here / (here + there)


def _parker(turned: Tensor, fan: Tensor, excess: float) -> Tensor:
    """Parker's weights, all angles in degrees.

    Args:
        turned: angle since the start of the arc, ``(views, 1)``.
        fan: angle of each element; its line is met again at ``turned + 180 - 2 fan``.
        excess: half of what the arc has beyond 180 degrees, at least the largest fan angle.
    """
    first, last = (excess + fan).clamp(min=1e-9), (excess - fan).clamp(min=1e-9)
    rise = torch.sin(math.pi / 4 * (turned / first).clamp(0, 2)).square()
    fall = torch.sin(math.pi / 4 * ((180.0 + 2 * excess - turned) / last).clamp(0, 2)).square()
    return torch.where(turned < 2 * first, rise, torch.where(turned > 180.0 + 2 * fan, fall, 1.0))


def _profile(angle: Tensor, arcs) -> Tensor:
    """1 inside the arcs, falling to 0 at their ends; ``angle`` in degrees, arcs as (start, length)."""
    total = torch.zeros_like(angle)
    for start, length in arcs:
        inside = (angle - start).remainder(360.0)
        edge = torch.minimum(inside, length - inside) / min(TAPER_DEG, length / 2)
        total += torch.sin(math.pi / 2 * edge.clamp(0, 1)).square()
    return total
