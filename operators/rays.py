"""Rays in the plane and Joseph's line integrals as a sparse matrix.

Every 2D scanner reduces to a list of rays (ox, oy, dx, dy): a point on the ray and its direction, in mm, float64. Axes:
x to the right (growing column), y up (falling row), the origin in the middle of the slice,
``x = (column - (W - 1) / 2) * dx`` and ``y = ((H - 1) / 2 - row) * dy``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.operators.geometry import ScanGeometry, covered, finite


@dataclass(frozen=True)
class ParallelGeometry(ScanGeometry):
    """Parallel-beam scan; the angle sense is that of ASTRA's ``parallel`` geometry.

    In the view at angle a the detector axis points along (cos a, sin a) and rays run along (sin a, -cos a): at 0
    degrees element u sums the image column x = u, at 90 degrees the row y = u.

    Attributes:
        views_deg: angle of each view, in degrees.
        detector_count: detector elements per view.
        detector_pitch_mm: distance between the centres of neighbouring elements, in mm.
        detector_offset_mm: shift of the detector's middle along its axis, in mm.
        axis_offset_mm: position on that axis onto which the axis of rotation falls, in mm: the middle of the slice. The
            same as a detector shifted the other way.

    Raises:
        UsageError: no view, no element, a pitch that is not positive, a number that is not finite.
    """

    kind: ClassVar[str] = "parallel"
    turn_deg: ClassVar[float] = 180.0

    views_deg: tuple[float, ...]
    detector_count: int
    detector_pitch_mm: float
    detector_offset_mm: float = 0.0
    axis_offset_mm: float = 0.0

    def __post_init__(self):
        self._check_scan()

    def rays(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rays of views ``first:last``, view by view, ``(views * detector_count, 4)`` in mm, float64."""
        views = self.views_deg[first:last]
        return parallel_rays(views, self.detector_count, self.detector_pitch_mm, self._offset_mm)

    @property
    def _offset_mm(self) -> float:
        """From the axis of rotation to the middle of the detector, along it."""
        return self.detector_offset_mm - self.axis_offset_mm

    def crossings(self, shape: tuple[int, int], pixel_mm: tuple[float, float]) -> float:
        """``sum over views of max(dx |cos a|, dy |sin a|) / pitch``; 0.90 per view for square pixels of one pitch."""
        dy, dx = pixel_mm
        angles = map(math.radians, self.views_deg)
        return sum(max(dx * abs(math.cos(a)), dy * abs(math.sin(a))) for a in angles) / self.detector_pitch_mm

    def check_object(self, radius_mm: float) -> None:
        """Any object fits between a source and a detector that are infinitely far away."""

    def locate(self, x: Tensor, y: Tensor, views: slice) -> tuple[Tensor, Tensor | None]:
        """``u = x cos a + y sin a``, in elements; every pixel weighs the same."""
        angles = torch.deg2rad(torch.tensor(self.views_deg[views], dtype=torch.float64, device=x.device))
        pitch, offset = self.detector_pitch_mm, self._offset_mm
        u = x * (angles.cos() / pitch) + (y * (angles.sin() / pitch) - offset / pitch)
        return u.add_((self.detector_count - 1) / 2), None

    def view_weights(self) -> tuple[float, ...]:
        """Angle in radians that each view stands for, modulo 180 degrees; see :func:`geometry.covered`."""
        return covered(self.views_deg, 180.0)[0]


def equispaced(views: int, arc: float = 180.0, start: float = 0.0) -> tuple[float, ...]:
    """``views`` angles in degrees, ``start + arc * k / views``: the end of the arc is not a view.

    Args:
        views: number of views, at least 1.
        arc: angle covered, degrees, in (0, 360].
        start: first angle, degrees.

    Raises:
        UsageError: a value out of range.
    """
    if int(views) != views or views < 1:
        raise UsageError(f"views must be a positive whole number, got {views}")
    if not 0 < arc <= 360:
        raise UsageError(f"arc must be in (0, 360] degrees, got {arc}")
    finite("start", start)
    return tuple(start + arc * k / int(views) for k in range(int(views)))


def parallel_rays(views_deg, count: int, pitch_mm: float, offset_mm: float = 0.0) -> Tensor:
    """Rays of a parallel-beam scan.

    Args:
        views_deg: angles in degrees.
        count: detector elements per view.
        pitch_mm: distance between elements, mm.
        offset_mm: shift of the detector along its axis, mm.

    Returns:
        ``(views * count, 4)`` float64: a point on the ray (mm) and the unit direction.
    """
    u = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * pitch_mm + offset_mm
    a = torch.deg2rad(torch.as_tensor(views_deg, dtype=torch.float64))[:, None]
    c, s = a.cos(), a.sin()
    return torch.stack([c * u, s * u, (s + 0 * u), (-c + 0 * u)], -1).reshape(-1, 4)


class SparseRows(NamedTuple):
    """A sparse matrix by rows: row r holds ``values[offsets[r]:offsets[r + 1]]`` at ``columns[...]``."""

    offsets: Tensor  # (rows + 1,), int32 where the number of entries allows
    columns: Tensor  # (entries,), same dtype
    values: Tensor  # (entries,)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


NOTHING = SparseRows(*(torch.empty(0, dtype=t) for t in (torch.int32, torch.int32, torch.float32)))
"""In place of a matrix that was not asked for; not even a valid one."""


def _rows(counts: Tensor, columns: Tensor, values: Tensor) -> SparseRows:
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    index = torch.int32 if values.numel() < 2**31 else torch.int64
    return SparseRows(offsets.to(index), columns.to(index), values)


def floor_from(x: Tensor, least: int) -> Tensor:
    """Floor of numbers that are at least ``least``, int32.

    Not ``torch.floor``: MKL splits even small pieces between threads, a thousand times slower on a busy machine. Nor is
    a tensor indexed by a mask here, for the same reason.
    """
    return (x - least).to(torch.int32).add_(least)


def _joseph_chunk(rays: Tensor, shape: tuple[int, int], pixel_mm: tuple[float, float]):
    """Weights of a few rays: (entries per ray, pixel index, weight in mm), entries of a ray in walking order."""
    (height, width), (dy, dx) = shape, pixel_mm
    row0, col0 = (height - 1) / 2 - rays[:, 1] / dy, (width - 1) / 2 + rays[:, 0] / dx
    drow, dcol = -rays[:, 3] / dy, rays[:, 2] / dx
    by_rows = drow.abs() >= dcol.abs()  # walk along the axis that the ray crosses more often
    slope = torch.where(by_rows, dcol / drow, drow / dcol)[:, None]
    start = torch.where(by_rows, col0, row0)[:, None] - slope * torch.where(by_rows, row0, col0)[:, None]
    length = torch.hypot(rays[:, 2], rays[:, 3]) / torch.maximum(drow.abs(), dcol.abs())  # mm per step
    by_rows = by_rows[:, None]
    steps, across = torch.where(by_rows, height, width), torch.where(by_rows, width, height)
    walk = torch.arange(max(shape), dtype=torch.int32, device=rays.device)[None]
    place = (start + slope * walk).clamp_(-2, max(shape))  # rays far outside must not overflow the integers
    low = floor_from(place, -2)
    part = (place - low).clamp_(0, 1)
    # Neighbours that get less than 1e-9 of a step are rounding of rays through pixel centres.
    last = torch.where(walk < steps, across, -9)  # nothing is inside beyond the last step
    keep = torch.stack(
        [(low >= 0) & (low < last) & (part < 1 - 1e-9), (low >= -1) & (low < last - 1) & (part > 1e-9)], -1
    )
    stride = torch.where(by_rows, 1, width).int()
    first = low * stride + walk * torch.where(by_rows, width, 1).int()
    pixel = torch.stack([first, first + stride], -1)
    weight = torch.stack([1 - part, part], -1) * length[:, None, None]
    return keep.sum((1, 2)), pixel.masked_select(keep), weight.masked_select(keep)


def joseph_csr(
    rays: Tensor, shape: tuple[int, int], pixel_mm: tuple[float, float], dtype: torch.dtype = torch.float32
) -> SparseRows:
    """Line integrals along rays by Joseph's method: linear interpolation across the ray's main axis.

    Args:
        rays: ``(R, 4)`` float64 (ox, oy, dx, dy) in mm, on the device that is to hold the matrix.
        shape: (H, W) of the slice.
        pixel_mm: (row spacing, column spacing) in mm.
        dtype: of the weights; positions are always computed in float64.

    Returns:
        R rows over H * W pixels (row-major), weights in mm.

    Source: P. M. Joseph, IEEE Trans. Med. Imaging 1 (1982) 192-196.
    """
    # On the CPU pieces that torch does not split between threads: in cache, and no slower on a busy machine.
    size = max(1, (2**13 if rays.device.type == "cpu" else 2**22) // max(shape))
    counts, columns, values = [], [], []
    for chunk in rays.split(size):
        count, column, value = _joseph_chunk(chunk, shape, pixel_mm)
        counts.append(count)
        columns.append(column.to(torch.int32))
        values.append(value.to(dtype))
    return _rows(torch.cat(counts), torch.cat(columns), torch.cat(values))


def transpose(matrix: SparseRows, columns: int) -> SparseRows:
    """The transposed matrix, stored by rows; within a row the order of the original rows is kept.

    Args:
        matrix: any matrix by rows.
        columns: its number of columns.
    """
    rows = matrix.offsets.numel() - 1
    if matrix.values.device.type == "cpu":
        from scipy.sparse import csr_matrix  # a counting sort, ten times faster than sorting

        parts = (matrix.values.numpy(), matrix.columns.numpy(), matrix.offsets.numpy())
        flipped = csr_matrix(parts, shape=(rows, columns), copy=False).tocsc()
        return SparseRows(*(torch.from_numpy(a) for a in (flipped.indptr, flipped.indices, flipped.data)))
    return transpose_by_sorting(matrix, columns)


def transpose_by_sorting(matrix: SparseRows, columns: int) -> SparseRows:
    """As :func:`transpose`, on any device."""
    rows = matrix.offsets.numel() - 1
    counts = (matrix.offsets[1:] - matrix.offsets[:-1]).to(torch.int64)
    row = torch.repeat_interleave(torch.arange(rows, dtype=torch.int32, device=counts.device), counts)
    order = torch.sort(matrix.columns, stable=True).indices
    per_column = torch.bincount(matrix.columns, minlength=columns)
    return _rows(per_column, row[order], matrix.values[order])
