"""Inpainting: pixels that are measured, and pixels that are missing."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.files import show
from invdiff.formats.plain import read_array
from invdiff.linalg import one_by_one
from invdiff.operators.base import ArrayLike, Matched, check_channels, check_plane, numbers

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
FORMS = "random:FRACTION, box:SIZE, stripes:WIDTH or a mask file"


class Mask(Matched):
    """``y = m x``: images and results ``(..., channels, H, W)``, zero where the mask is 0.

    A mask for each slice takes images ``(..., slices, channels, H, W)`` and is cut by :meth:`restrict`. A missing pixel
    may hold anything, NaN included.

    Args:
        mask: (H, W) for all slices, or (slices, H, W); 1 or True where a pixel is measured, 0 where it is missing.
        channels: channels of an image.
        device: see :meth:`to`.

    Raises:
        InputError: a mask of other axes, empty, or with values other than 0 and 1.
    """

    pinv_kind = "fill"

    def __init__(self, mask: ArrayLike, channels: int = 1, device: torch.device | str = "cpu"):
        self.mask = _binary(mask).contiguous().to(device)  # else results would take its layout
        self.channels = check_channels(channels)
        shape = (channels, *self.mask.shape[-2:])
        super().__init__(shape, shape, device)
        self._slices = len(self.mask) if self.mask.ndim == 3 else None
        self._keep = self.mask if self._slices is None else self.mask[:, None]
        self._bits: dict[torch.dtype, Tensor] = {}

    def _arguments(self) -> tuple:
        return self.mask.cpu(), self.channels

    @cached_property
    def measured_fraction(self) -> float:  # type: ignore[override]
        """Share of measured pixels."""
        return float(self.mask.double().mean())

    def restrict(self, slices: slice) -> "Mask":
        """The mask of those slices; the same operator where all slices have the same mask."""
        return self if self._slices is None else Mask(self.mask[slices], self.channels, self.device)

    def _require(self, x: Tensor) -> None:
        super()._require(x)
        if self._slices is not None and (x.ndim < 4 or x.shape[-4] != self._slices):
            want = ", ".join(map(str, (self._slices, *self.in_shape)))
            raise ShapeError(f"Mask with a mask per slice expects (..., {want}), got {tuple(x.shape)}: use restrict")

    def _probe(self) -> Tensor:
        probe = super()._probe()
        return probe if self._slices is None else probe.expand(self._slices, *self.in_shape)

    def _direct(self, x: Tensor) -> Tensor:
        """Bitwise and with -1 or 0: what ``where`` gives, also for NaN, and more than ten times as fast."""
        kind = _BITS[x.dtype]
        if kind not in self._bits:
            self._bits[kind] = -self._keep.to(kind)
        out = torch.empty_like(x)
        torch.bitwise_and(x.view(kind), self._bits[kind], out=out.view(kind))
        return out

    def _transposed(self, y: Tensor) -> Tensor:
        return self._direct(y)

    def pinv(self, y: Tensor) -> Tensor:
        """A right inverse of A: missing pixels are filled from their neighbours.

        By normalised convolution (Knutsson & Westin 1993) with Gaussians of 1, 2, 4, ... pixels, each pixel by the
        narrowest one that finds a twentieth of its weight on measured pixels. Linear in y.
        """
        y, keep = self.adjoint(y), self._keep
        filled = keep.expand(y.shape)
        out, sigma, full = y, 1.0, max(self.in_shape[-2:])
        while sigma < 4 * full:
            near, found = self._smooth(y, sigma), self._smooth(keep.to(y.dtype), sigma)
            reached = (found > (0.05 if sigma < full else 0.0)).expand(y.shape) & ~filled
            out = torch.where(reached, near / found.clamp_min(1e-12), out)
            filled, sigma = filled | reached, 2 * sigma
        return out

    @staticmethod
    def _smooth(x: Tensor, sigma: float) -> Tensor:
        """Gaussian of ``sigma`` pixels, zero beyond the edges, one slice at a time."""
        radius = min(int(4 * sigma) + 1, 2 * max(x.shape[-2:]))
        t = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        g = torch.exp(-(t**2) / (2 * sigma**2))

        def along(u: Tensor) -> Tensor:
            index = torch.arange(u.shape[-1], device=x.device)
            lag = index[:, None] - index[None]
            return u @ torch.where(lag.abs() <= radius, g[lag.clamp(-radius, radius) + radius], 0.0)

        return one_by_one(lambda u: along(along(u).mT.contiguous()).mT, 2, x)

    def prox(self, z: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2: ``(y + weight z) / (1 + weight)`` if measured, z if missing.

        Args:
            z: ``(..., channels, H, W)``.
            y: measurements, same shape.
            weight: positive; a number, or a tensor that broadcasts, one per slice.

        Raises:
            ShapeError: z or y of another shape.
        """
        self(z)  # checks
        return torch.where(self._keep, (self.adjoint(y) + weight * z) / (1 + weight), z)

    @cached_property
    def norm(self) -> float:
        """1, unless everything is missing."""
        return float(self.mask.any())

    @property
    def mean_square(self) -> float:
        """Share of measured pixels."""
        return self.measured_fraction


def _binary(mask: ArrayLike, name: str = "the mask") -> Tensor:
    value = torch.as_tensor(mask).detach()
    if value.ndim not in (2, 3) or 0 in value.shape[-2:]:
        raise InputError(f"{name} has the shape {tuple(value.shape)}: give (H, W), or (slices, H, W)")
    if value.dtype == torch.bool:
        return value
    wrong = value[(value != 0) & (value != 1)]
    if wrong.numel():
        raise InputError(
            f"{name} must hold 1 (measured) and 0 (missing) only, found {float(wrong[0]):g} "
            f"({wrong.numel()} such values): threshold it"
        )
    return value != 0


def _random(shape, rest, seed) -> Tensor:
    (fraction,) = numbers(rest, 1, "random:FRACTION")
    if not 0 < fraction < 1:
        raise UsageError(f"the share removed by a random mask must lie between 0 and 1, got {fraction:g}")
    count = shape[0] * shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (order >= round(fraction * count)).reshape(shape)


def _box(shape, rest, _) -> Tensor:
    (size,) = numbers(rest, 1, "box:SIZE")
    if not (size.is_integer() and 1 <= size < min(shape)):
        raise UsageError(f"the side of a box must be a whole number of pixels, 1 to {min(shape) - 1}, got {size:g}")
    keep = torch.ones(shape, dtype=torch.bool)
    top, left = ((n - int(size)) // 2 for n in shape)
    keep[top : top + int(size), left : left + int(size)] = False
    return keep


def _stripes(shape, rest, _) -> Tensor:
    (width,) = numbers(rest, 1, "stripes:WIDTH")
    if not (width.is_integer() and 1 <= width < shape[0]):
        raise UsageError(f"the width of stripes must be a whole number of rows, 1 to {shape[0] - 1}, got {width:g}")
    return (torch.arange(shape[0]) // int(width) % 2 == 0)[:, None].expand(shape).clone()


_PATTERNS = {"random": _random, "box": _box, "stripes": _stripes}


def inpaint(shape, pixel_mm, *, mask="random:0.5", seed=0) -> Mask:
    """Missing pixels in slices (H, W).

    Args:
        shape: (H, W).
        pixel_mm: pixel size in mm; not used.
        mask: ``random:FRACTION`` (share of the pixels removed, exactly and alike in all slices), ``box:SIZE`` (a
            centred square of SIZE pixels removed), ``stripes:WIDTH`` (every other stripe of WIDTH rows removed, the
            first one stays), a file with 1 where a pixel is measured and 0 where it is missing, or such an array.
        seed: of ``random``.

    Raises:
        UsageError: a form that is none of these, or a number out of range.
        InputError: a file that cannot be read; a mask of another size, not binary, or without a measured pixel.
    """
    shape, _ = check_plane(shape, pixel_mm)
    name, _, rest = mask.partition(":") if isinstance(mask, str) else ("", "", "")
    what = "the mask"
    if name in _PATTERNS:
        mask = _PATTERNS[name](shape, rest, int(seed))
    elif isinstance(mask, str):
        if not Path(mask).is_file():
            raise UsageError(f"mask '{show(mask)[-200:]}' is not a file: give {FORMS}")
        mask, what = read_array(mask, "mask"), f"mask file {mask}"
    keep = _binary(mask, what)
    if tuple(keep.shape[-2:]) != shape:
        raise InputError(
            f"{what} is {' x '.join(map(str, keep.shape))}, the slices are {shape[0]} x {shape[1]}: "
            "make a mask of the same size"
        )
    if not bool(keep.any()):
        raise InputError(f"{what} removes every pixel: 1 stands for measured, 0 for missing")
    return Mask(keep)
