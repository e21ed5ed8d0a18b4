"""Apply line integrals to stacks of slices, from a stored matrix or from one rebuilt block by block.

Stacks come as ``(slices, H * W)`` images or ``(slices, rays)`` projections. Inside, slices are the fastest axis, in
blocks of a few fixed widths: each entry of the matrix then serves a whole block. The sum of one ray or pixel runs over
its entries in their stored order in every block, so that a slice's result depends neither on its neighbours nor on
threads.
"""

import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.operators.geometry import ScanGeometry
from invdiff.operators.rays import NOTHING, SparseRows, joseph_csr, transpose

_log = logging.getLogger("invdiff")

WIDTHS = (4, 8, 16, 32)
"""Slices per block: full blocks are 32 wide, a rest is padded with zeros to the next width.

Measured on 256^2 x 60 views: 64 is no faster than 32, 16 takes 1.6 times as long per slice, and 1 saves nothing over 4.
"""

PART_BYTES = 256 * 2**20
"""Matrix held at a time where none is stored."""


class Scan(NamedTuple):
    """What determines the matrix: the geometry and the image grid, on one device."""

    geometry: ScanGeometry
    shape: tuple[int, int]
    pixel_mm: tuple[float, float]
    device: torch.device

    @property
    def rays(self) -> int:
        return len(self.geometry.views_deg) * self.geometry.detector_count

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


class Part(NamedTuple):
    """The rows of A for some rays, and their transpose."""

    rays: slice
    direct: SparseRows
    transposed: SparseRows

    @property
    def nbytes(self) -> int:
        return self.direct.nbytes + self.transposed.nbytes


PartBuilder = Callable[[Scan, torch.dtype, slice, bool, bool], Part]


def predicted_entries(shape: tuple[int, int], pixel_mm: tuple[float, float], geometry: ScanGeometry) -> int:
    """Number of non-zeros of A, an upper bound but for edges: two per step of a ray, 1.80 per pixel and view."""
    return math.ceil(2 * shape[0] * shape[1] * geometry.crossings(shape, pixel_mm))


def predicted_bytes(
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    geometry: ScanGeometry,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Memory of the stored matrix and its transpose, in bytes; building them takes up to 1.7 times as much.

    Args:
        shape: (H, W).
        pixel_mm: (row spacing, column spacing) in mm.
        geometry: the scan.
        dtype: of the weights.
    """
    entry = 4 + dtype.itemsize
    pointers = 4 * (len(geometry.views_deg) * geometry.detector_count + shape[0] * shape[1] + 2)
    return 2 * entry * predicted_entries(shape, pixel_mm, geometry) + pointers


def default_memory_limit(device: torch.device) -> int:
    """A quarter of the memory of the GPU, or of the physical memory of this machine or container, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(name) as f:
                total = min(total, int(f.read()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return total // 4


class _Cache:
    """Matrices of this process, least recently used out first, bounded by the default memory limit of the device."""

    def __init__(self):
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[Scan, torch.dtype], Part] = OrderedDict()

    def get(self, scan: Scan, dtype: torch.dtype) -> Part:
        with self._lock:
            key = (scan, dtype)
            if key not in self._parts:
                self._parts[key] = joseph_part(scan, dtype, slice(0, len(scan.geometry.views_deg)), True, True)
            self._parts.move_to_end(key)
            self._shrink(scan.device)
            return self._parts[key]

    def _shrink(self, device: torch.device) -> None:
        limit = default_memory_limit(device)
        keys = [k for k in self._parts if k[0].device == device]
        size = {k: self._parts[k].nbytes for k in keys}
        while len(keys) > 1 and sum(size[k] for k in keys) > limit:
            del self._parts[keys.pop(0)]

    def clear(self) -> None:
        with self._lock:
            self._parts.clear()


cache = _Cache()


def joseph_part(scan: Scan, dtype: torch.dtype, views: slice, direct: bool, transposed: bool) -> Part:
    """Joseph's line integrals for the rays of some views; what is not asked for is ``NOTHING``."""
    rays = scan.geometry.rays(views.start, views.stop).to(scan.device)
    count = scan.geometry.detector_count
    matrix = joseph_csr(rays, scan.shape, scan.pixel_mm, dtype)
    flipped = transpose(matrix, scan.pixels) if transposed else NOTHING
    return Part(slice(views.start * count, views.stop * count), matrix if direct else NOTHING, flipped)


def joseph_projector(scan: Scan, dtype: torch.dtype, stored: bool, memory_limit_bytes: int) -> "Projector":
    """Projector by Joseph's method.

    Args:
        scan: geometry, grid and device.
        dtype: torch.float32 or torch.float64.
        stored: keep the matrix; otherwise build it for a few views at a time at every call, with the same weights.
        memory_limit_bytes: bound of one such block of views, though never less than one view.
    """
    views = len(scan.geometry.views_deg)
    if stored:
        return Projector(scan, dtype, joseph_part, views, cache.get(scan, dtype))
    per_view = 2 * predicted_bytes(scan.shape, scan.pixel_mm, scan.geometry, dtype) / views
    return Projector(scan, dtype, joseph_part, max(1, int(min(memory_limit_bytes, PART_BYTES) / per_view)))


class Projector:
    """A and A^T of one scan in one dtype, for ``(slices, n)`` stacks.

    Args:
        scan: geometry, grid and device.
        dtype: torch.float32 or torch.float64.
        build: makes the :class:`Part` of a range of views.
        step: views per part.
        stored: the whole matrix, where it is kept.
    """

    def __init__(self, scan: Scan, dtype: torch.dtype, build: PartBuilder, step: int, stored: Part | None = None):
        self.scan, self.dtype = scan, dtype
        self._build, self._step, self._stored = build, step, stored

    def parts(self, direct: bool, transposed: bool) -> Iterator[Part]:
        """The matrix, or its parts one after another; at least what is asked for."""
        if self._stored is not None:
            yield self._stored
            return
        views = len(self.scan.geometry.views_deg)
        for first in range(0, views, self._step):
            yield self._build(self.scan, self.dtype, slice(first, min(first + self._step, views)), direct, transposed)

    def apply(self, x: Tensor, adjoint: bool) -> Tensor:
        """``A x``: (slices, pixels) -> (slices, rays); with ``adjoint`` ``A^T x``, the other way."""
        x = x.detach()
        out = x.new_empty(len(x), self.scan.pixels if adjoint else self.scan.rays)
        for part in self.parts(not adjoint, adjoint):
            for at, width in _blocks(len(x)):
                if adjoint:
                    _add(out[at], multiply(part.transposed, _columns(x[at, part.rays], width)), part)
                else:
                    rows = multiply(part.direct, _columns(x[at], width))
                    out[at, part.rays] = rows[:, : at.stop - at.start].T
        return out

    def normal(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """``A^T (w * A x)`` without leaving the inner layout; ``weights`` (1 or slices, rays) or None."""
        x = x.detach()
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in self.parts(True, True):
            for at, width in _blocks(len(x)):
                rows = multiply(part.direct, _columns(x[at], width))
                if weights is not None:
                    chosen = weights if len(weights) == 1 else weights[at]
                    rows *= _columns(chosen[:, part.rays], 1 if len(chosen) == 1 else width)
                _add(out[at], multiply(part.transposed, rows), part)
        return out

    def gram(self, y: Tensor) -> Tensor:
        """``A A^T y``, (slices, rays), without leaving the inner layout."""
        y = y.detach()
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for at, width in _blocks(len(y)):
            spread = (multiply(p.transposed, _columns(y[at, p.rays], width)) for p in self.parts(False, True))
            image = next(spread)
            for more in spread:
                image += more
            for part in self.parts(True, False):
                out[at, part.rays] = multiply(part.direct, image)[:, : at.stop - at.start].T
        return out

    def square_sum(self) -> float:
        """Sum of all squared weights, trace(A^T A)."""
        total = 0.0
        for part in self.parts(True, False):
            total += float(part.direct.values.double().square().sum())
        return total


def multiply(matrix: SparseRows, columns: Tensor) -> Tensor:
    """Sparse matrix times a dense ``(n, width)`` matrix.

    An embedding bag is the fastest sparse-dense product in torch: each row of the result is a weighted sum of rows.
    """
    return F.embedding_bag(
        matrix.columns, columns, matrix.offsets, mode="sum", per_sample_weights=matrix.values, include_last_offset=True
    )


def _blocks(slices: int) -> Iterator[tuple[slice, int]]:
    """Cut a stack into (range, padded width)."""
    for first in range(0, slices, WIDTHS[-1]):
        at = slice(first, min(first + WIDTHS[-1], slices))
        yield at, next(w for w in WIDTHS if w >= at.stop - first)


def _columns(x: Tensor, width: int) -> Tensor:
    """``(k, n)`` rows to contiguous ``(n, width)`` columns, padded with zeros."""
    # A clone, not .contiguous(): a single slice transposed counts as contiguous with strides that embedding_bag
    # answers by another kernel, ten times slower and rounding differently.
    if len(x) == width:
        return x.T.clone(memory_format=torch.contiguous_format)
    out = x.new_zeros(x.shape[1], width)
    out[:, : len(x)] = x.T
    return out


def _add(out: Tensor, columns: Tensor, part: Part) -> None:
    rows = columns[:, : len(out)].T
    if part.rays.start == 0:
        out.copy_(rows)
    else:
        out += rows


_announced: set[Scan] = set()


def announce_on_the_fly(scan: Scan, needed: int, limit: int) -> None:
    """Warn once per scan that its matrix is not stored."""
    if scan in _announced:
        return
    _announced.add(scan)
    _log.warning(
        "CT matrix of %.3g GB exceeds the limit of %.3g GB: rebuilt at every projection, exact but many times slower; "
        "allow more with memory_limit_bytes, or use fewer views or a coarser grid",
        needed / 1e9,
        limit / 1e9,
    )
