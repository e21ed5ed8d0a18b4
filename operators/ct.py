"""X-ray computed tomography of single slices: attenuation in 1/mm to line integrals."""

import copy
import math
from dataclasses import fields, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import UsageError, choose
from invdiff.linalg import largest_eigenvalue
from invdiff.operator import LinearOperator, _check
from invdiff.operators.base import check_plane
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.differentiable import gram, normal, project
from invdiff.operators.fan import FanGeometry
from invdiff.operators.fbp import backprojector, ramp_filter
from invdiff.operators.geometry import ScanGeometry, announce, truncation
from invdiff.operators.projector import (
    Projector,
    Scan,
    announce_on_the_fly,
    default_memory_limit,
    joseph_projector,
    predicted_bytes,
    predicted_entries,
)
from invdiff.operators.rays import ParallelGeometry


class CT(LinearOperator):
    """Projection of slices along the rays of a scan by Joseph's method, with its exact adjoint.

    The shared half of :class:`CTParallel` and :class:`CTFan`, which fix the class of the geometry.

    ``y[v, u] = integral of x along the ray of view v and element u``: images ``(..., 1, H, W)`` of attenuation in 1/mm
    give line integrals ``(..., 1, views, detector_count)``, dimensionless, in the dtype of the input (float32 or
    float64). Rows grow downwards and columns to the right, angles as in the geometry. Differentiable any number of
    times. The result of a slice is the same bit for bit however slices are grouped.

    The matrix and its transpose are built at first use and shared by the operators of a process. Where they would need
    more than ``memory_limit_bytes`` they are rebuilt for a few views at a time at every call: ``backend`` is then
    "on-the-fly" instead of "matrix", the weights are the same, and a warning goes to the logger "invdiff". So does one
    with the share of rays that a detector too small for the slice misses, and one where angles look like radians;
    ``notes`` keeps them.

    Args:
        shape: (H, W) of a slice.
        pixel_mm: pixel size in mm, or (row spacing, column spacing).
        geometry: the scan.
        memory_limit_bytes: for the matrix and its transpose in float32; default a quarter of the physical memory, or of
            the GPU's.
        device: where the matrix lives; see :meth:`to`.

    Raises:
        UsageError: an empty slice, a pixel size that is not positive, a geometry of another class, or one that has no
            room for the circle around the slice.

    Source: P. M. Joseph, IEEE Trans. Med. Imaging 1 (1982) 192-196.
    """

    geometry_type: ClassVar[type[ScanGeometry]]
    grid: ClassVar[tuple[str, ...]] = ("rows", "columns", "pixel_mm")
    pinv_kind = "fbp"

    def __init__(
        self,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        geometry: ScanGeometry,
        memory_limit_bytes: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.shape, self.pixel_mm = check_plane(shape, pixel_mm)
        if not isinstance(geometry, self.geometry_type):
            raise UsageError(f"{self._name} needs a {self.geometry_type.__name__}, got {type(geometry).__name__}")
        geometry.check_object(math.hypot(*self._size_mm) / 2)
        self.geometry = geometry
        self.in_shape = (1, *self.shape)
        self.out_shape = (1, len(geometry.views_deg), geometry.detector_count)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.memory_limit_bytes = memory_limit_bytes
        self._limit = default_memory_limit(self.device) if memory_limit_bytes is None else memory_limit_bytes
        self._scan = Scan(geometry, self.shape, self.pixel_mm, self.device)
        needed = predicted_bytes(self.shape, self.pixel_mm, geometry)
        # 32-bit row pointers end at 2**31 entries.
        fits = needed <= self._limit and predicted_entries(self.shape, self.pixel_mm, geometry) < 2**31
        self.backend = "matrix" if fits else "on-the-fly"
        self._whole = self._scan, needed  # all views, and the bytes of their matrix
        self._projectors: dict[torch.dtype, Projector] = {}
        self.notes = announce(*truncation("slice", geometry.missed(self.shape, self.pixel_mm)), *geometry.doubts())

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _size_mm(self) -> tuple[float, float]:
        return self.shape[0] * self.pixel_mm[0], self.shape[1] * self.pixel_mm[1]

    def __reduce__(self):
        return type(self), (self.shape, self.pixel_mm, self.geometry, self.memory_limit_bytes, str(self.device))

    def to(self, device: torch.device | str) -> "CT":
        """The same operator for tensors on ``device``; the matrix is built there."""
        return type(self)(self.shape, self.pixel_mm, self.geometry, self.memory_limit_bytes, device)

    def subset(self, views: slice) -> "CT":
        """The operator of some of the views, say every tenth: it measures ``y[..., views, :]``."""
        part = copy.copy(self)
        for name in ("norm", "mean_square", "row_squares"):
            part.__dict__.pop(name, None)
        part.geometry = replace(self.geometry, views_deg=self.geometry.views_deg[views])  # type: ignore[type-var]
        part.out_shape = (1, len(part.geometry.views_deg), self.out_shape[-1])
        part._scan, part._projectors = self._scan._replace(geometry=part.geometry), {}
        return part

    def _require(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"{self._name} works in float32 or float64, got {x.dtype}")
        if x.device != self.device:
            raise UsageError(f"{self._name} is on {self.device} and its input on {x.device}: move one with .to(device)")

    def _projector(self, x: Tensor) -> Projector:
        self._require(x)
        if x.dtype not in self._projectors:
            if self.backend == "on-the-fly":
                announce_on_the_fly(*self._whole, self._limit)
            self._projectors[x.dtype] = joseph_projector(self._scan, x.dtype, self.backend == "matrix", self._limit)
        return self._projectors[x.dtype]

    def _probe(self) -> Tensor:
        return super()._probe().to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-3]
        y = project(x.reshape(-1, self._scan.pixels), self._projector(x))
        return y.reshape(*batch, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[:-3]
        x = project(y.reshape(-1, self._scan.rays), self._projector(y), adjoint=True)
        return x.reshape(*batch, *self.in_shape)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``A^T (w * A x)`` at the cost of one change of layout; the same bits as by ``forward`` and ``adjoint``.

        Args:
            x: ``(..., 1, H, W)``.
            weights: ``(..., 1, views, detector_count)``, broadcast over leading axes; None for 1.

        Raises:
            ShapeError: for x or weights of another shape.
        """
        _check(self._name, "images", x, self.in_shape)
        if weights is not None:
            _check(self._name, "weights", weights, self.out_shape)
            if weights.requires_grad or x[..., 0, 0].numel() == 0:
                return self.adjoint(weights * self(x))
            weights = self._flat_weights(x, weights)
        flat = x.reshape(-1, self._scan.pixels)
        return normal(flat, self._projector(x), weights).reshape(x.shape)

    def gram(self, y: Tensor) -> Tensor:
        """``A A^T y``, ``(..., 1, views, detector_count)``, without a change of layout of the images between.

        Raises:
            ShapeError: for y of another shape.
        """
        _check(self._name, "measurements", y, self.out_shape)
        return gram(y.reshape(-1, self._scan.rays), self._projector(y)).reshape(y.shape)

    def _flat_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        weights = weights.detach().to(x)
        if weights[..., 0, 0, 0].numel() > 1:
            weights = weights.expand(*x.shape[:-3], *self.out_shape)
        return weights.reshape(-1, self._scan.rays)

    @cached_property
    def norm(self) -> float:
        """Largest singular value of A in mm, by Lanczos' method from ones (A is non-negative, hence not orthogonal)."""
        return math.sqrt(float(largest_eigenvalue(self.normal, torch.ones(self.in_shape, device=self.device))))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n in mm^2, exactly."""
        return self._projector(torch.zeros((), device=self.device)).square_sum() / self._scan.pixels

    def sensitivities(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Row sums A 1 ``(1, views, detector_count)`` and column sums A^T 1 ``(1, H, W)``, in mm, for SIRT."""
        ones = torch.ones(1, dtype=dtype, device=self.device)
        return self(ones.expand(self.in_shape)), self.adjoint(ones.expand(self.out_shape))

    def fbp(self, y: Tensor, window: str = "ramp") -> Tensor:
        """Filtered backprojection, ``x(r) = sum_v w_v q_v(r) (h * (p_v y_v))(u_v(r))``, linear in y, differentiable.

        Parallel beam: p = q = 1. Fan beam: p holds the cosine and the weights of lines measured twice, q the squared
        distance from the source; see :meth:`FanGeometry.ray_weights` and :meth:`FanGeometry.locate`.

        Args:
            y: line integrals ``(..., 1, views, detector_count)``.
            window: "ramp", or "hann" for less noise at a lower resolution.

        Returns:
            Attenuation in 1/mm, ``(..., 1, H, W)``. The amplitude is right where the views cover 180 degrees densely,
            for a fan beam 180 degrees and the fan; a missing wedge stays missing (see :func:`geometry.covered`).

        Raises:
            UsageError: an unknown window.
            ShapeError: for y of another shape.

        Source: A. C. Kak and M. Slaney, Principles of Computerized Tomographic Imaging, 1988, sections 3.3 and 3.4.
        """
        _check(self._name, "measurements", y, self.out_shape)
        self._require(y)
        g = self.geometry
        weights = torch.tensor(g.view_weights(), dtype=y.dtype, device=y.device)[:, None]
        weighted = g.ray_weights().to(y) * y
        filtered = weights * ramp_filter(weighted, g.filter_pitch_mm, window, g.filter_step_rad)
        flat = filtered.reshape(-1, self._scan.rays)
        x = project(flat, backprojector(self._scan, y.dtype), adjoint=True)
        return x.reshape(*y.shape[:-3], *self.in_shape)

    def pinv(self, y: Tensor) -> Tensor:
        """Approximate inverse: :meth:`fbp` with the plain ramp."""
        return self.fbp(y)

    def describe(self) -> str:
        """One paragraph for people."""
        (height, width), (dy, dx) = self.shape, self.pixel_mm
        size = f"{height} x {width} pixels of {dy:g} x {dx:g} mm (rows x columns)"
        return f"{self.geometry.describe()} Slices of {size}; projector: Joseph, {self.backend}."

    def as_dict(self) -> dict:
        """Plain JSON values from which :meth:`from_dict` builds the operator again; every key names its unit."""
        (height, width), (dy, dx) = self.shape, self.pixel_mm
        return {"rows": height, "columns": width, "pixel_mm": [dy, dx], **self.geometry.as_dict()}

    @classmethod
    def from_dict(cls, d: dict, **options) -> "CT":
        """Inverse of :meth:`as_dict`; ``options`` are further arguments of the constructor."""
        if any(key not in d for key in cls.grid):
            raise UsageError(f"a CT operator needs {', '.join(cls.grid)}, got {', '.join(sorted(d))}")
        geometry = cls.geometry_type.from_dict({k: v for k, v in d.items() if k not in cls.grid})
        return cls((d["rows"], d["columns"]), tuple(d["pixel_mm"]), geometry, **options)


class CTParallel(CT):
    """Parallel-beam projection of slices: :class:`CT` with a :class:`ParallelGeometry`."""

    geometry_type = ParallelGeometry


class CTFan(CT):
    """Fan-beam projection of slices: :class:`CT` with a :class:`FanGeometry`."""

    geometry_type = FanGeometry


SCANNERS: dict[str, type[CT] | type[CTCone]] = {
    scanner.geometry_type.kind: scanner for scanner in (CTParallel, CTFan, CTCone)
}


def scanner_from_dict(d: dict, **options) -> CT | CTCone:
    """The operator that :meth:`CT.as_dict` describes, of the class that its ``geometry`` names.

    Args:
        d: as written by ``as_dict``; further keys, such as the physics beside it in a file, are left out.
        **options: further arguments of the constructor.

    Raises:
        UsageError: an unknown geometry, or what ``from_dict`` of the operator and the geometry refuse.
    """
    scanner = choose(d.get("geometry", "parallel"), SCANNERS, "geometry")
    own = {f.name for s in SCANNERS.values() for f in fields(s.geometry_type)}  # type: ignore[arg-type]
    known = {"geometry", *scanner.grid, *own}
    return scanner.from_dict({k: v for k, v in d.items() if k in known}, **options)
