"""How images go on beyond their edges: the rules, padding by them and its transpose, kernels longer than an image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def _circular(index: Tensor, size: int) -> Tensor:
    return index % size


def _reflect(index: Tensor, size: int) -> Tensor:
    folded = index % (2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


def _replicate(index: Tensor, size: int) -> Tensor:
    return index.clamp(0, size - 1)


#: The pixel that stands at an index, inside or outside, of an axis of so many pixels.
BOUNDARIES = {"circular": _circular, "reflect": _reflect, "replicate": _replicate}


def place(x: Tensor, axes: Sequence[int], sizes: Sequence[int], starts: Sequence[int]) -> Tensor:
    """Zeros of ``sizes`` along ``axes`` (negative numbers) with x at ``starts``; left to the FFT, this takes as long
    as the transform.
    """
    zeros = [0, 0] * -min(axes)
    for axis, size, start in zip(axes, sizes, starts, strict=True):
        zeros[-2 * axis - 2 : -2 * axis] = start, size - start - x.shape[axis]
    return functional.pad(x, zeros) if any(zeros) else x


def frame(x: Tensor, radii: tuple[int, ...], boundary: str) -> Tensor:
    """Planes ``(n, m, H, W)`` continued on all sides: ``(n, m, H + 2 r, W + 2 s)``."""
    if boundary == "circular":  # torch's "reflect" does not repeat the edge, its "replicate" takes twice as long
        return functional.pad(x, (radii[1], radii[1], radii[0], radii[0]), mode="circular")
    sizes = tuple(n + 2 * r for n, r in zip(x.shape[-2:], radii, strict=True))
    out = x.new_empty(*x.shape[:-2], *sizes)
    out[..., radii[0] : radii[0] + x.shape[-2], radii[1] : radii[1] + x.shape[-1]] = x
    return continue_(out, (-2, -1), x.shape[-2:], radii, boundary)


def continue_(out: Tensor, axes: Sequence[int], sizes: Sequence[int], radii: Sequence[int], boundary: str) -> Tensor:
    """An image of ``sizes`` that lies at ``radii`` of ``out``, continued on either side as far, in place."""
    for axis, size, radius in zip(axes, sizes, radii, strict=True):
        if radius:
            width = 1 if boundary == "replicate" else radius
            before, after = out.narrow(axis, radius, width), out.narrow(axis, radius + size - width, width)
            if boundary == "circular":
                before, after = after, before
            elif boundary == "reflect":
                before, after = before.flip(axis), after.flip(axis)
            out.narrow(axis, 0, radius).copy_(before)
            out.narrow(axis, radius + size, radius).copy_(after)
    return out


def fold_(x: Tensor, axes: Sequence[int], sizes: Sequence[int], radii: Sequence[int], boundary: str) -> Tensor:
    """Transpose of :func:`continue_` after that of cutting the image out: a view of ``x``, which is overwritten."""
    for axis, size, radius in zip(axes, sizes, radii, strict=True):
        if radius:
            before, after = x.narrow(axis, 0, radius), x.narrow(axis, size + radius, radius)
            if boundary == "circular":
                before, after = after, before
            elif boundary == "reflect":
                before, after = before.flip(axis), after.flip(axis)
            else:
                before, after = (edge.sum(axis, keepdim=True) for edge in (before, after))
            x = x.narrow(axis, radius, size)
            width = before.shape[axis]
            x.narrow(axis, 0, width).add_(before)
            x.narrow(axis, size - width, width).add_(after)
    return x


def shortened(kernel: Tensor, sizes: Sequence[int], boundary: str) -> Tensor:
    """The kernel that does the same to images of ``sizes`` and reaches no farther than a continuation needs.

    A continued image has the period n ("circular") or 2 n ("reflect"), so that offsets which differ by it meet the
    same pixel: their weights add up. Beyond the edge of "replicate" all offsets from n - 1 meet the last pixel.

    Args:
        kernel: odd sides, offsets from its middle.
        sizes: as many as the kernel has axes.
        boundary: of ``BOUNDARIES``.

    Returns:
        Odd sides, with a reach of at most n / 2, n and n - 1 pixels; the offsets -n / 2 and n / 2 (-n and n), which
        are the same, have equal weights.
    """
    for axis, size in enumerate(sizes):
        reach = kernel.shape[axis] // 2
        most = {"circular": size // 2, "reflect": size, "replicate": size - 1}[boundary]
        if reach <= most:
            continue
        offset = torch.arange(-reach, reach + 1)
        period = size if boundary == "circular" else 2 * size
        index = offset.clamp(-most, most) + most if boundary == "replicate" else (offset + most) % period
        short = list(kernel.shape)
        short[axis] = 2 * most + 1
        kernel = kernel.new_zeros(short).index_add_(axis, index, kernel)
        if boundary != "replicate" and period == 2 * most:
            half = kernel.narrow(axis, 0, 1).div_(2)
            kernel.narrow(axis, 2 * most, 1).copy_(half)
    return kernel
