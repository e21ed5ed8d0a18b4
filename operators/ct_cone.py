"""Cone-beam computed tomography of a volume: attenuation in 1/mm to line integrals on a flat panel."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.linalg import largest_eigenvalue
from invdiff.operator import _check
from invdiff.operators.base import Matched, check_stack
from invdiff.operators.cone import ConeGeometry
from invdiff.operators.fbp import ramp_filter
from invdiff.operators.geometry import announce, truncation
from invdiff.operators.lines import Lines, advice


class _Walk(NamedTuple):
    """Ray columns, one per view and detector column, that step through the volume along one axis of the slices."""

    columns: Tensor  # which, (n,)
    lines: Lines


class CTCone(Matched):
    """Projection of a volume along the rays of a circular cone-beam scan, with its exact adjoint.

    ``y[r, v, u] = integral of x along the ray of view v to row r and column u of the panel``: attenuation in 1/mm,
    ``(..., S, 1, H, W)``, gives line integrals ``(..., detector_rows, 1, views, detector_count)``, dimensionless, in
    the dtype of the input. Slices and detector rows grow along z, rows and columns of a slice and angles are those of
    :class:`CTFan`, which a ray in the middle plane equals. Differentiable any number of times; a volume gives the same
    bits alone and in a batch.

    Joseph's method: a ray steps through the planes of rows or columns, whichever its column crosses more often, and
    interpolates in the plane, linearly along both axes. ``notes`` holds the share of rays that a panel too small for
    the volume misses, which is also a warning of the logger "invdiff".

    Args:
        shape: (S, H, W).
        voxel_mm: (slice, row, column) spacing in mm.
        geometry: the scan.
        device: see :meth:`to`.

    Raises:
        UsageError: an empty volume, a spacing that is not positive, another geometry, or one that has no room for the
            circle around the slices and a pixel more.

    Source: P. M. Joseph, IEEE Trans. Med. Imaging 1 (1982) 192-196.
    """

    geometry_type = ConeGeometry
    grid = ("slices", "rows", "columns", "voxel_mm")
    slicewise = False
    pinv_kind = "fbp"

    def __init__(
        self,
        shape: tuple[int, int, int],
        voxel_mm: tuple[float, float, float],
        geometry: ConeGeometry,
        device: torch.device | str = "cpu",
    ):
        self.shape, self.voxel_mm = check_stack(shape, voxel_mm)
        if not isinstance(geometry, ConeGeometry):
            raise UsageError(f"CTCone needs a ConeGeometry, got {type(geometry).__name__}")
        geometry.fan.check_object(self._radius_mm)
        self.geometry = geometry
        slices, height, width = self.shape
        out_shape = (geometry.detector_rows, 1, len(geometry.views_deg), geometry.detector_count)
        super().__init__((slices, 1, height, width), out_shape, device)
        self._inverse_cosines = (1 / geometry.cosines()).to(self.device)
        self._walks, self._lengths = self._trace()
        self.notes = announce(*truncation("volume", geometry.missed(self.shape, self.voxel_mm)), *geometry.fan.doubts())

    @property
    def advice(self) -> tuple[str, ...]:  # type: ignore[override]
        """A hint to install numba, on the CPU without it."""
        return advice(self.device)

    @property
    def _radius_mm(self) -> float:
        """Of the circle around the slices with half a pixel of margin, within which voxels are interpolated."""
        return math.hypot(*((n + 1) * d for n, d in zip(self.shape[1:], self.voxel_mm[1:], strict=True))) / 2

    def _arguments(self) -> tuple:
        return self.shape, self.voxel_mm, self.geometry

    def _trace(self) -> tuple[tuple[_Walk, ...], Tensor]:
        """The ray columns by the axis along which they walk, and the length in mm of a step of each, in float64."""
        g, (slices, height, width), (dz, dy, dx) = self.geometry, self.shape, self.voxel_mm
        x, y, right, up = g.fan.rays().T
        row, column, drow, dcolumn = (height - 1) / 2 - y / dy, (width - 1) / 2 + x / dx, -up / dy, right / dx
        by_rows = drow.abs() >= dcolumn.abs()
        fan = g.fan.fan_rad().repeat(len(g.views_deg))
        cosine, foot = fan.cos(), g.source_axis_mm * fan.cos() + g.axis_offset_mm * fan.sin()  # from source to foot
        pitch, sdd = g.detector_row_pitch_mm, g.source_detector_mm
        affine = (pitch / dz, (slices - 1) / 2, float(g.rows_mm()[0]) / dz)
        least = pitch / dz * (g.source_axis_mm - self._radius_mm) / sdd
        walks = []
        for chosen, planes, across, *path in (
            (by_rows, height, width, row, column, drow, dcolumn),
            (~by_rows, width, height, column, row, dcolumn, drow),
        ):
            columns = chosen.nonzero()[:, 0]
            here, there, along, over, c, far = (t[columns] for t in (*path, cosine, foot))
            slope, step = over / along, c / along / sdd
            near = far * c / sdd - here * step
            table = _straight(planes, *(t.to(self.device) for t in (there - slope * here, slope, near, step)))
            lines = Lines(planes, across, slices, len(columns), g.detector_rows, table, affine, least)
            walks.append(_Walk(columns.to(self.device), lines))
        return tuple(walks), (1 / torch.maximum(drow.abs(), dcolumn.abs())).to(self.device)

    def _direct(self, x: Tensor) -> Tensor:
        return _each(self._project, self.out_shape, x)

    def _transposed(self, y: Tensor) -> Tensor:
        return _each(self._backproject, self.in_shape, y)

    def _project(self, x: Tensor) -> Tensor:
        rows, _, views, count = self.out_shape
        planes = x[:, 0].permute(1, 2, 0)
        y = x.new_empty(views * count, rows)
        for walk, volume in zip(self._walks, (planes, planes.transpose(0, 1)), strict=True):
            y[walk.columns] = walk.lines.sample(volume.contiguous())
        y = self._scaled(y.view(views, count, rows))
        return y.permute(2, 0, 1)[:, None].contiguous()

    def _backproject(self, y: Tensor) -> Tensor:
        y = self._scaled(y[:, 0].permute(1, 2, 0)).flatten(0, 1)
        by_rows, by_columns = (walk.lines.spread(y[walk.columns]) for walk in self._walks)
        return (by_rows + by_columns.transpose(0, 1)).permute(2, 0, 1)[:, None].contiguous()

    def _scaled(self, y: Tensor) -> Tensor:
        """``(views, columns, rows)`` times the length of a step of each ray."""
        lengths = self._cast("_lengths", y).view(*y.shape[:2], 1)
        return y * lengths * self._cast("_inverse_cosines", y)

    @cached_property
    def norm(self) -> float:
        """Largest singular value of A in mm, by power iteration from ones (A is non-negative, hence not orthogonal)."""
        return math.sqrt(float(largest_eigenvalue(self.normal, torch.ones(self.in_shape, device=self.device))))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n in mm^2, exactly."""
        lengths = self._lengths.view(*self.out_shape[2:], 1) * self._inverse_cosines
        squares = lengths.square().flatten(0, 1)
        return sum(walk.lines.square_sum(squares[walk.columns]) for walk in self._walks) / math.prod(self.shape)

    def sensitivities(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Row sums A 1 ``(detector_rows, 1, views, detector_count)`` and column sums A^T 1 ``(S, 1, H, W)``, in mm."""
        ones = torch.ones(1, dtype=dtype, device=self.device)
        return self(ones.expand(self.in_shape)), self.adjoint(ones.expand(self.out_shape))

    def fbp(self, y: Tensor, window: str = "ramp") -> Tensor:
        """Reconstruction of Feldkamp, Davis and Kress (FDK), linear in y, differentiable.

        Rays are weighted by their cosine and, as in :meth:`CTFan.fbp`, by their share of lines in the middle plane that
        are measured twice (Parker's weights for a short scan); rows are filtered by the ramp; every view is
        interpolated at each voxel and weighted by the squared distance from the source.

        Exact in the middle plane, where the views cover the fan densely. Away from it a circular orbit lacks
        information: values drop with the cone angle where the object changes along z.

        Args:
            y: line integrals ``(..., detector_rows, 1, views, detector_count)``.
            window: "ramp", or "hann" for less noise at a lower resolution.

        Returns:
            Attenuation in 1/mm, ``(..., S, 1, H, W)``.

        Raises:
            UsageError: an unknown window.
            ShapeError: for y of another shape.

        Source: L. A. Feldkamp, L. C. Davis and J. W. Kress, J. Opt. Soc. Am. A 1 (1984) 612-619.
        """
        _check("CTCone", "measurements", y, self.out_shape)
        self._require(y)
        g, weights = self.geometry, self._cast("_ray_weights", y)
        shares = torch.tensor(g.fan.view_weights(), dtype=y.dtype, device=y.device)[:, None]
        filtered = _each(lambda v: shares * ramp_filter(weights * v, g.fan.filter_pitch_mm, window), self.out_shape, y)
        return self._backprojection(filtered)

    @cached_property
    def _ray_weights(self) -> Tensor:
        """What multiplies rays before filtering, ``(detector_rows, 1, views, detector_count)`` float64."""
        return (self.geometry.fan.ray_weights() * self.geometry.cosines().T[:, None, None]).to(self.device)

    @cached_property
    def _backprojection(self) -> "Backprojection":
        return Backprojection(self.shape, self.voxel_mm, self.geometry, self.device)

    def pinv(self, y: Tensor) -> Tensor:
        """Approximate inverse: :meth:`fbp` with the plain ramp."""
        return self.fbp(y)

    def describe(self) -> str:
        """One paragraph for people."""
        size = " x ".join(map(str, self.shape))
        spacing = " x ".join(f"{d:g}" for d in self.voxel_mm)
        return f"{self.geometry.describe()} Volume of {size} voxels of {spacing} mm (slices x rows x columns)."

    def as_dict(self) -> dict:
        """Plain JSON values from which :meth:`from_dict` builds the operator again; every key names its unit."""
        slices, height, width = self.shape
        grid = {"slices": slices, "rows": height, "columns": width, "voxel_mm": list(self.voxel_mm)}
        return {**grid, **self.geometry.as_dict()}

    @classmethod
    def from_dict(cls, d: dict, **options) -> "CTCone":
        """Inverse of :meth:`as_dict`; ``options`` are further arguments of the constructor."""
        if any(key not in d for key in cls.grid):
            raise UsageError(f"a cone-beam operator needs {', '.join(cls.grid)}, got {', '.join(sorted(d))}")
        geometry = ConeGeometry.from_dict({k: v for k, v in d.items() if k not in cls.grid})
        return cls((d["slices"], d["rows"], d["columns"]), tuple(d["voxel_mm"]), geometry, **options)


class Backprojection(Matched):
    """Sum over views of what lies on the ray through each voxel, times ``(SOD / U)^2`` of :meth:`FanGeometry.locate`.

    ``(..., detector_rows, 1, views, detector_count)`` gives ``(..., S, 1, H, W)``, interpolated linearly along rows and
    columns of the panel.

    Args:
        shape, voxel_mm, geometry, device: those of :class:`CTCone`.
    """

    slicewise = False

    def __init__(self, shape, voxel_mm, geometry: ConeGeometry, device: torch.device | str = "cpu"):
        self.shape, self.voxel_mm, self.geometry = shape, voxel_mm, geometry
        slices, height, width = shape
        (dz, dy, dx), g = voxel_mm, geometry
        views, count, rows = len(g.views_deg), g.detector_count, g.detector_rows
        super().__init__((rows, 1, views, count), (slices, 1, height, width), device)
        pitch, first, sod = g.detector_row_pitch_mm, float(g.rows_mm()[0]), g.source_axis_mm
        magnification = g.source_detector_mm / sod
        affine = (dz / pitch, -first / pitch, -(slices - 1) / 2 * dz / pitch)
        least = dz / pitch * g.source_detector_mm / (sod + math.hypot(height * dy, width * dx))
        self._lines = Lines(views, count, rows, height * width, slices, self._table, affine, least, 2)
        self._factor = magnification**-2

    def _arguments(self) -> tuple:
        return self.shape, self.voxel_mm, self.geometry

    def _table(self, items: slice) -> tuple[Tensor, Tensor]:
        """Detector column and magnification of columns of voxels, numbered row by row, in every view."""
        (_, height, width), (_, dy, dx), g = self.shape, self.voxel_mm, self.geometry
        n = torch.arange(items.start, items.stop, device=self.device)
        x = ((n % width).double() - (width - 1) / 2) * dx
        y = ((height - 1) / 2 - (n // width).double()) * dy
        return g.fan.shadow(x[:, None], y[:, None], slice(None))

    def _direct(self, y: Tensor) -> Tensor:
        return _each(self._backproject, self.out_shape, y)

    def _transposed(self, x: Tensor) -> Tensor:
        return _each(self._project, self.in_shape, x)

    def _backproject(self, y: Tensor) -> Tensor:
        x = self._factor * self._lines.sample(y[:, 0].permute(1, 2, 0).contiguous())
        return x.T.reshape(self.out_shape)

    def _project(self, x: Tensor) -> Tensor:
        y = self._lines.spread(self._factor * x.flatten(1).T.contiguous())
        return y.permute(2, 0, 1)[:, None].contiguous()


def _straight(planes: int, *lines: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Table of rays: place and distance in every plane from (start, slope, near, step) in it, each ``(n,)`` float64."""

    def table(items: slice) -> tuple[Tensor, Tensor]:
        start, slope, near, step = (t[items, None] for t in lines)
        i = torch.arange(planes, dtype=torch.float64, device=start.device)
        return start + slope * i, near + step * i

    return table


def _each(f: Callable[[Tensor], Tensor], shape: tuple[int, ...], x: Tensor) -> Tensor:
    """``f`` on each volume (the last four axes) of ``x`` by itself; ``shape`` is that of its result."""
    batch = x.shape[:-4]
    if math.prod(batch) == 0:
        return x.new_zeros(*batch, *shape)
    return torch.stack([f(v) for v in x.reshape(-1, *x.shape[-4:])]).reshape(*batch, *shape)
