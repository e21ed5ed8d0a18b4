"""Super-resolution: averaging and sampling in the slice plane, or across slices (thick slices)."""

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from invdiff.errors import UsageError, choose
from invdiff.linalg import one_by_one
from invdiff.operator import _check
from invdiff.operators.base import Matched, check_channels, check_plane, check_sizes, spread
from invdiff.operators.resampling import (
    FILTERS,
    PROFILES,
    apply_banded,
    banded,
    check_factor,
    decimation,
    interpolation,
    stencil,
    sum_of_blocks,
)


class Downsample(Matched):
    """``y = R x C^T``: every ``factor`` x ``factor`` block of pixels becomes one, centred where the block is.

    Images ``(..., channels, H, W)`` give ``(..., channels, H / factor, W / factor)``, each slice by itself; the first
    coarse pixel's centre lies (factor - 1) / 2 fine pixels from the first fine one's. A constant keeps its value: rows
    of R and C have the sum 1, also at the edges, where the filter is cut.

    Args:
        shape: (H, W), multiples of ``factor``.
        factor: fine pixels in a coarse one, along both axes.
        filter: "average" of the block; "bicubic" with anti-aliasing, equal to
            ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``; "gaussian" with a full width at half
            maximum of one coarse pixel.
        channels: channels of an image.
        device: see :meth:`to`.

    Raises:
        UsageError: a factor that is no positive whole number or does not divide the size, or an unknown filter.

    Source of the cubic: R. G. Keys, IEEE Trans. Acoust. Speech Signal Process. 29 (1981) 1153-1160.
    """

    pinv_kind = "bicubic"

    def __init__(
        self,
        shape: tuple[int, int],
        factor: int,
        filter: str = "bicubic",
        channels: int = 1,
        device: torch.device | str = "cpu",
    ):
        weight = choose(filter, FILTERS, "filter")
        if len(shape) != 2:
            raise UsageError(f"Downsample takes the shape (H, W), got {tuple(shape)}")
        self.shape, self.filter, self.channels = check_sizes(shape), filter, check_channels(channels)
        self.factor = check_factor("Downsample", factor, self.shape, "pixels")
        coarse = tuple(n // self.factor for n in self.shape)
        super().__init__((channels, *self.shape), (channels, *coarse), device)
        self._rows, self._columns = (decimation(n, self.factor, weight).to(device) for n in self.shape)
        taps, *self._margins = stencil(self._rows.cpu(), self.factor)
        self._taps = taps[:, :, None].to(device)
        taps, self._left_margin, _ = stencil(self._columns.cpu(), self.factor)
        self._blocks = banded(taps, self.factor).to(device)

    def _arguments(self) -> tuple:
        return self.shape, self.factor, self.filter, self.channels

    def _bands(self, padded: Tensor) -> list[Tensor]:
        """Views of the rows that each tap of the filter meets: R is a narrow band, a dense product takes longer."""
        reach = self.out_shape[1] * self.factor
        return [padded[..., k : k + reach : self.factor, :] for k in range(len(self._taps))]

    def _direct(self, x: Tensor) -> Tensor:
        if self.filter == "average":
            return sum_of_blocks(x, self.factor) / self.factor**2
        taps, blocks = self._cast("_taps", x), self._cast("_blocks", x)

        def measure(u: Tensor) -> Tensor:
            first, *rest = self._bands(functional.pad(u, (0, 0, *self._margins)))
            coarse = taps[0] * first
            for tap, band in zip(taps[1:], rest, strict=True):
                coarse.addcmul_(tap, band)
            return apply_banded(coarse, blocks, self.factor, self._left_margin, self.out_shape[2])

        return one_by_one(measure, 3, x)

    def _transposed(self, y: Tensor) -> Tensor:
        if self.filter == "average":
            f = self.factor
            blocks = (y / f**2)[..., :, None, :, None].expand(*y.shape[:-1], f, y.shape[-1], f)
            return blocks.reshape(*y.shape[:-2], *self.shape)
        taps, c = self._cast("_taps", y), self._cast("_columns", y)
        before, after = self._margins

        def spread_out(u: Tensor) -> Tensor:
            coarse = u @ c
            fine = coarse.new_zeros(*u.shape[:-2], before + self.shape[0] + after, self.shape[1])
            for tap, band in zip(taps, self._bands(fine), strict=True):
                band.addcmul_(tap, coarse)
            return fine.narrow(-2, before, self.shape[0]).contiguous()

        return one_by_one(spread_out, 3, y)

    @cached_property
    def _modes(self) -> tuple:
        """Eigenvalues and eigenvectors of R R^T and of C C^T."""
        return tuple(torch.linalg.eigh(m @ m.T) for m in (self._rows, self._columns))

    @cached_property
    def _values(self) -> Tensor:
        (rows, _), (columns, _) = self._modes
        return rows[:, None] * columns

    @cached_property
    def _left(self) -> Tensor:
        return self._modes[0][1]

    @cached_property
    def _right(self) -> Tensor:
        return self._modes[1][1]

    def prox(self, z: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2 = ``z + A^T (A A^T + weight)^-1 (y - A z)``.

        Exact for every filter: A A^T is the product of two small matrices; it is 1 / factor^2 for "average".

        Args:
            z: ``(..., channels, H, W)``.
            y: measurements.
            weight: positive; a number, or one per slice with singleton axes.

        Raises:
            ShapeError: z or y of another shape.
        """
        _check("Downsample", "measurements", y, self.out_shape)
        residual = y - self(z)
        w = spread(weight, residual, 3)
        if self.filter == "average":
            return z + self.adjoint(residual / (w + 1 / self.factor**2))
        left, right, values = (self._cast(name, z) for name in ("_left", "_right", "_values"))
        solved = one_by_one(lambda r, v: (left @ ((left.T @ (r @ right)) / (values + v))) @ right.T, 3, residual, w)
        return z + self.adjoint(solved)

    @cached_property
    def _fill(self) -> list[Tensor]:
        return [interpolation(n, self.factor).to(self.device) for n in self.shape]

    def pinv(self, y: Tensor) -> Tensor:
        """Approximate inverse: bicubic interpolation, aligned (each coarse pixel lies in the middle of its block).

        Raises:
            ShapeError: y of another shape.
        """
        _check("Downsample", "measurements", y, self.out_shape)
        self._require(y)
        r, c = (matrix.to(y.dtype) for matrix in self._fill)
        return one_by_one(lambda u: r @ (u @ c.T), 3, y)

    @cached_property
    def norm(self) -> float:
        """Largest singular value, exactly; 1 / factor for "average"."""
        return math.sqrt(float(self._modes[0][0].max() * self._modes[1][0].max()))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n, exactly."""
        return float(self._rows.square().sum() * self._columns.square().sum()) / math.prod(self.shape)


class DownsampleZ(Matched):
    """``y = M x`` along the slices: every ``factor`` thin slices become a thick one, centred where they are.

    Images ``(..., slices, channels, H, W)`` give ``(..., slices / factor, channels, H, W)``; the first thick slice's
    centre lies (factor - 1) / 2 thin slices from the first thin one's. A constant keeps its value.

    Args:
        shape: (slices, H, W), slices a multiple of ``factor``.
        factor: thin slices in a thick one.
        profile: slice profile: "average" of the slices, or "gaussian" with a full width at half maximum of one thick
            slice; cut at the ends of the stack.
        channels: channels of an image.
        device: see :meth:`to`.

    Raises:
        UsageError: a factor that is no positive whole number or does not divide the slices, or an unknown profile.
    """

    slicewise = False
    through_plane = True

    pinv_kind = "bicubic"

    def __init__(
        self,
        shape: tuple[int, int, int],
        factor: int,
        profile: str = "average",
        channels: int = 1,
        device: torch.device | str = "cpu",
    ):
        weight = choose(profile, PROFILES, "slice profile")
        if len(shape) != 3:
            raise UsageError(f"DownsampleZ takes the shape (slices, H, W), got {tuple(shape)}")
        self.shape, self.profile, self.channels = check_sizes(shape), profile, check_channels(channels)
        slices, plane = self.shape[0], (channels, *self.shape[1:])
        self.factor = check_factor("DownsampleZ", factor, (slices,), "slices")
        super().__init__((slices, *plane), (slices // self.factor, *plane), device)
        self._matrix = decimation(slices, self.factor, weight).to(device)

    def _arguments(self) -> tuple:
        return self.shape, self.factor, self.profile, self.channels

    @staticmethod
    def _along(matrix: Tensor, x: Tensor) -> Tensor:
        return one_by_one(lambda u: (matrix @ u.flatten(-3)).unflatten(-1, u.shape[-3:]), 4, x)

    def _direct(self, x: Tensor) -> Tensor:
        return self._along(self._cast("_matrix", x), x)

    def _transposed(self, y: Tensor) -> Tensor:
        return self._along(self._cast("_matrix", y).T, y)

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of M M^T."""
        values, vectors = torch.linalg.eigh(self._matrix @ self._matrix.T)
        return values, vectors

    @cached_property
    def _values(self) -> Tensor:
        return self._modes[0][:, None, None, None]

    @cached_property
    def _vectors(self) -> Tensor:
        return self._modes[1]

    def prox(self, z: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2 = ``z + A^T (M M^T + weight)^-1 (y - A z)``, exactly.

        Args:
            z: ``(..., slices, channels, H, W)``.
            y: measurements.
            weight: positive; a number, or one per stack with singleton axes.

        Raises:
            ShapeError: z or y of another shape.
        """
        _check("DownsampleZ", "measurements", y, self.out_shape)
        residual = y - self(z)
        w = spread(weight, residual, 4)
        vectors, values = self._cast("_vectors", z), self._cast("_values", z)
        return z + self.adjoint(self._along(vectors, self._along(vectors.T, residual) / (values + w)))

    @cached_property
    def _fill(self) -> Tensor:
        return interpolation(self.shape[0], self.factor).to(self.device)

    def pinv(self, y: Tensor) -> Tensor:
        """Approximate inverse: cubic interpolation across slices, aligned.

        Raises:
            ShapeError: y of another shape.
        """
        _check("DownsampleZ", "measurements", y, self.out_shape)
        self._require(y)
        return self._along(self._cast("_fill", y), y)

    @cached_property
    def norm(self) -> float:
        """Largest singular value, exactly; 1 / sqrt(factor) for "average"."""
        return math.sqrt(float(self._modes[0].max()))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n, exactly."""
        return float(self._matrix.square().sum()) / self.shape[0]


def sr(shape, pixel_mm, *, factor=2, filter="auto", axis="inplane") -> Downsample | DownsampleZ:
    """Super-resolution; ``pixel_mm`` is of the fine grid.

    Args:
        shape: (H, W) of a slice; (slices, H, W) through the plane.
        pixel_mm: pixel size in mm, or (row spacing, column spacing).
        factor: fine pixels per coarse one.
        filter: as :class:`Downsample` or the profile of :class:`DownsampleZ`; "auto": bicubic or average.
        axis: "inplane" or "through-plane".

    Raises:
        UsageError: options that cannot be used.
    """
    if choose(axis, {"inplane": False, "through-plane": True}, "axis of super-resolution"):
        return DownsampleZ(shape, factor, "average" if filter == "auto" else filter)
    shape, _ = check_plane(shape, pixel_mm)
    return Downsample(shape, factor, "bicubic" if filter == "auto" else filter)
