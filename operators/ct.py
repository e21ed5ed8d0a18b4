"""X-ray computed tomography of single slices: attenuation in 1/mm to line integrals."""

import math
from functools import cached_property

import torch
from torch import Tensor

from invdiff.errors import UsageError, choose
from invdiff.linalg import largest_eigenvalue
from invdiff.operator import LinearOperator, _check
from invdiff.operators import MOST
from invdiff.operators.fbp import backprojector, ramp_filter
from invdiff.operators.projector import (
    Projector,
    Scan,
    announce_on_the_fly,
    default_memory_limit,
    joseph_projector,
    predicted_bytes,
    predicted_entries,
)
from invdiff.operators.rays import ParallelGeometry, equispaced


class _Project(torch.autograd.Function):
    """A or A^T; the derivative of each is the other."""

    @staticmethod
    def forward(ctx, x, projector, adjoint):
        ctx.projector, ctx.adjoint = projector, adjoint
        return projector.apply(x, adjoint)

    @staticmethod
    def backward(ctx, g):
        return _Project.apply(g, ctx.projector, not ctx.adjoint), None, None


class _Normal(torch.autograd.Function):
    """A^T W A, symmetric: its derivative is itself. W is a constant."""

    @staticmethod
    def forward(ctx, x, projector, weights):
        ctx.projector, ctx.weights = projector, weights
        return projector.normal(x, weights)

    @staticmethod
    def backward(ctx, g):
        return _Normal.apply(g, ctx.projector, ctx.weights), None, None


class CTParallel(LinearOperator):
    """Parallel-beam projection of slices by Joseph's method, with its exact adjoint.

    ``y[v, u] = integral of x along the ray of view v and element u``: images ``(..., 1, H, W)`` of attenuation in 1/mm
    give line integrals ``(..., 1, views, detector_count)``, dimensionless, in the dtype of the input (float32 or
    float64). Rows grow downwards and columns to the right, angles as in :class:`ParallelGeometry`. Differentiable any
    number of times. The result of a slice is the same bit for bit however slices are grouped.

    The matrix and its transpose are built at first use and shared by the operators of a process. Where they would need
    more than ``memory_limit_bytes`` they are rebuilt for a few views at a time at every call: ``backend`` is then
    "on-the-fly" instead of "matrix", the weights are the same, and a warning goes to the logger "invdiff".

    Args:
        shape: (H, W) of a slice.
        pixel_mm: pixel size in mm, or (row spacing, column spacing).
        geometry: the scan.
        memory_limit_bytes: for the matrix and its transpose in float32; default a quarter of the physical memory, or of
            the GPU's.
        device: where the matrix lives; see :meth:`to`.

    Raises:
        UsageError: an empty slice or a pixel size that is not positive.

    Source: P. M. Joseph, IEEE Trans. Med. Imaging 1 (1982) 192-196.
    """

    pinv_kind = "fbp"

    def __init__(
        self,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        geometry: ParallelGeometry,
        memory_limit_bytes: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.shape, self.pixel_mm = _grid(shape, pixel_mm)
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
        if not fits:
            announce_on_the_fly(self._scan, needed, self._limit)
        self._projectors: dict[torch.dtype, Projector] = {}

    def __reduce__(self):
        return CTParallel, (self.shape, self.pixel_mm, self.geometry, self.memory_limit_bytes, str(self.device))

    def to(self, device: torch.device | str) -> "CTParallel":
        """The same operator for tensors on ``device``; the matrix is built there."""
        return CTParallel(self.shape, self.pixel_mm, self.geometry, self.memory_limit_bytes, device)

    def _require(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"CTParallel works in float32 or float64, got {x.dtype}")
        if x.device != self.device:
            raise UsageError(f"CTParallel is on {self.device} and its input on {x.device}: move one with .to(device)")

    def _projector(self, x: Tensor) -> Projector:
        self._require(x)
        if x.dtype not in self._projectors:
            self._projectors[x.dtype] = joseph_projector(self._scan, x.dtype, self.backend == "matrix", self._limit)
        return self._projectors[x.dtype]

    def _probe(self) -> Tensor:
        return super()._probe().to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-3]
        y = _Project.apply(x.reshape(-1, self._scan.pixels), self._projector(x), False)
        return y.reshape(*batch, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[:-3]
        x = _Project.apply(y.reshape(-1, self._scan.rays), self._projector(y), True)
        return x.reshape(*batch, *self.in_shape)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``A^T (w * A x)`` at the cost of one change of layout; the same bits as by ``forward`` and ``adjoint``.

        Args:
            x: ``(..., 1, H, W)``.
            weights: ``(..., 1, views, detector_count)``, broadcast over leading axes; None for 1.

        Raises:
            ShapeError: for x or weights of another shape.
        """
        _check("CTParallel", "images", x, self.in_shape)
        if weights is not None:
            _check("CTParallel", "weights", weights, self.out_shape)
            if weights.requires_grad or x[..., 0, 0].numel() == 0:
                return self.adjoint(weights * self(x))
            weights = self._flat_weights(x, weights)
        flat = x.reshape(-1, self._scan.pixels)
        return _Normal.apply(flat, self._projector(x), weights).reshape(x.shape)

    def _flat_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        weights = weights.detach().to(x)
        if weights[..., 0, 0, 0].numel() > 1:
            weights = weights.expand(*x.shape[:-3], *self.out_shape)
        return weights.reshape(-1, self._scan.rays)

    @cached_property
    def norm(self) -> float:
        """Largest singular value of A in mm, by power iteration from ones (A is non-negative, hence not orthogonal)."""
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
        """Filtered backprojection, ``x(r) = sum_v w_v (h * y_v)(r . e_v)``, linear in y and differentiable.

        Args:
            y: line integrals ``(..., 1, views, detector_count)``.
            window: "ramp", or "hann" for less noise at a lower resolution.

        Returns:
            Attenuation in 1/mm, ``(..., 1, H, W)``. The amplitude is right where the views cover 180 degrees densely;
            a missing wedge stays missing (see :meth:`ParallelGeometry.view_weights`).

        Raises:
            UsageError: an unknown window.
            ShapeError: for y of another shape.

        Source: A. C. Kak and M. Slaney, Principles of Computerized Tomographic Imaging, 1988, section 3.3.
        """
        _check("CTParallel", "measurements", y, self.out_shape)
        self._require(y)
        weights = torch.tensor(self.geometry.view_weights(), dtype=y.dtype, device=y.device)[:, None]
        filtered = weights * ramp_filter(y, self.geometry.detector_pitch_mm, window)
        flat = filtered.reshape(-1, self._scan.rays)
        return _Project.apply(flat, backprojector(self._scan, y.dtype), True).reshape(*y.shape[:-3], *self.in_shape)

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
    def from_dict(cls, d: dict, **options) -> "CTParallel":
        """Inverse of :meth:`as_dict`; ``options`` are further arguments of the constructor."""
        grid = ("rows", "columns", "pixel_mm")
        if any(key not in d for key in grid):
            raise UsageError(f"a CT operator needs {', '.join(grid)}, got {', '.join(sorted(d))}")
        geometry = ParallelGeometry.from_dict({k: v for k, v in d.items() if k not in grid})
        return cls((d["rows"], d["columns"]), tuple(d["pixel_mm"]), geometry, **options)


def _grid(shape, pixel_mm) -> tuple[tuple[int, int], tuple[float, float]]:
    if len(shape) != 2 or any(int(n) != n or n < 1 for n in shape):
        raise UsageError(f"shape must be (H, W) with positive whole numbers, got {tuple(shape)}")
    spacing = (pixel_mm, pixel_mm) if isinstance(pixel_mm, (int, float)) else tuple(pixel_mm)
    if len(spacing) != 2 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UsageError(f"pixel_mm must be a positive size in mm, or (row, column) spacing, got {pixel_mm}")
    return (int(shape[0]), int(shape[1])), (float(spacing[0]), float(spacing[1]))


def _covering_count(shape: tuple[int, int], pixel_mm: tuple[float, float], pitch_mm: float) -> int:
    """Smallest odd number of elements that covers the diagonal, with one to spare on each side."""
    diagonal = math.hypot(shape[0] * pixel_mm[0], shape[1] * pixel_mm[1])
    return (math.ceil(diagonal / pitch_mm) + 2) | 1


def _parallel(shape, pixel_mm, views_deg, detector_pitch=None, detector_count=None) -> CTParallel:
    shape, spacing = _grid(shape, pixel_mm)
    pitch = min(spacing) if detector_pitch is None else detector_pitch
    if not (math.isfinite(pitch) and pitch > 0):
        raise UsageError(f"detector_pitch must be positive, in mm, got {pitch}")
    count = _covering_count(shape, spacing, pitch) if detector_count is None else detector_count
    if count > MOST:
        raise UsageError(f"detector_pitch of {pitch:g} mm makes {count:g} detector elements, the limit is {MOST}")
    return CTParallel(shape, spacing, ParallelGeometry(views_deg, count, pitch))


_GEOMETRIES = {"parallel": _parallel}


def ct_sparse(shape, pixel_mm, *, views=60, start=0.0, geometry="parallel", **detector) -> CTParallel:
    """Few views over 180 degrees. Options as in the table; ``detector``: detector_pitch (mm), detector_count."""
    return choose(geometry, _GEOMETRIES, "geometry")(shape, pixel_mm, equispaced(views, 180.0, start), **detector)


def ct_limited(shape, pixel_mm, *, arc=90.0, views=90, start=0.0, geometry="parallel", **detector) -> CTParallel:
    """Views over a limited arc, in degrees. Options as :func:`ct_sparse`."""
    return choose(geometry, _GEOMETRIES, "geometry")(shape, pixel_mm, equispaced(views, arc, start), **detector)


def ct_lowdose(shape, pixel_mm, *, views=180, start=0.0, geometry="parallel", **detector) -> CTParallel:
    """Many views over 180 degrees; the low dose is in the noise, not here. Options as :func:`ct_sparse`."""
    return choose(geometry, _GEOMETRIES, "geometry")(shape, pixel_mm, equispaced(views, 180.0, start), **detector)
