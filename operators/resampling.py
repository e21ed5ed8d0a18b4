"""Matrices that make a row of pixels coarser or finer; every row has the sum 1, so that constants stay."""

import math
from numbers import Real

import torch
from torch import Tensor

from invdiff.errors import UsageError


def _box(t: Tensor) -> Tensor:
    return (t.abs() < 0.5).double()


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, as in MATLAB's imresize and in torch with antialias=True."""
    t = t.abs()
    inner, outer = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t < 1, inner, torch.where(t < 2, outer, 0.0))


def _gaussian(t: Tensor) -> Tensor:
    """Full width at half maximum of one coarse pixel, cut at 4 standard deviations."""
    sigma = 1 / (2 * math.sqrt(2 * math.log(2)))
    return torch.where(t.abs() <= 4 * sigma, torch.exp(-(t**2) / (2 * sigma**2)), 0.0)


FILTERS = {"average": _box, "bicubic": _cubic, "gaussian": _gaussian}
PROFILES = {"average": _box, "gaussian": _gaussian}


def _centres(count: int, spacing: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) * spacing


def _normal_rows(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)


def decimation(size: int, factor: int, weight) -> Tensor:
    """``(size / factor, size)`` matrix: coarse pixel i lies in the middle of fine pixels ``i factor`` and following.

    Args:
        size: fine pixels.
        factor: fine pixels in a coarse one; 1 gives the identity.
        weight: function of the distance in coarse pixels; cut at the edges, rows scaled to sum 1.
    """
    if factor == 1:
        return torch.eye(size, dtype=torch.float64)
    distance = _centres(size, 1)[None, :] - _centres(size // factor, factor)[:, None]
    return _normal_rows(weight(distance / factor))


def stencil(matrix: Tensor, factor: int) -> tuple[Tensor, int, int]:
    """The band of a :func:`decimation` matrix: ``y[i] = sum_k taps[k, i] x[i factor + k - before]``.

    Returns:
        ``taps`` (k, size / factor), and how many zeros to put ``before`` and after x.
    """
    count, size = matrix.shape
    padded = torch.nn.functional.pad(matrix, (size, size))
    rows = torch.stack([padded[i, i * factor : i * factor + 2 * size] for i in range(count)])  # offset - size
    used = (rows != 0).any(0).nonzero().flatten()
    low, high = min(int(used[0]) - size, 0), max(int(used[-1]) - size, factor - 1)
    return rows[:, low + size : high + size + 1].T.contiguous(), -low, high - factor + 1


def banded(taps: Tensor, factor: int, block: int = 16) -> Tensor:
    """A :func:`stencil` as small dense matrices, ``(blocks, (block - 1) factor + k, block)``: ``block`` neighbouring
    coarse pixels each from the window of fine ones that they meet; what lies beyond the last pixel is zero."""
    reach, count = taps.shape
    blocks = -(-count // block)
    taps = torch.nn.functional.pad(taps, (0, blocks * block - count)).unflatten(1, (blocks, block))
    out = taps.new_zeros(blocks, (block - 1) * factor + reach, block)
    for pixel in range(block):
        out[:, pixel * factor : pixel * factor + reach, pixel] = taps[:, :, pixel].T
    return out


def apply_banded(x: Tensor, matrices: Tensor, factor: int, before: int, count: int) -> Tensor:
    """Coarse rows ``(..., H, count)`` from fine rows ``x`` ``(..., H, W)``, by the matrices of :func:`banded`."""
    blocks, window, block = matrices.shape
    needed = (blocks - 1) * block * factor + window
    padded = torch.nn.functional.pad(x, (before, needed - before - x.shape[-1])).flatten(0, -2)
    windows = padded.unfold(-1, window, block * factor).transpose(0, 1)
    rows = (windows @ matrices).transpose(0, 1).reshape(*x.shape[:-1], blocks * block)
    return rows[..., :count]


def interpolation(size: int, factor: int) -> Tensor:
    """``(size, size / factor)`` matrix of cubic interpolation between the centres of coarse pixels."""
    distance = _centres(size, 1)[:, None] - _centres(size // factor, factor)[None, :]
    return _normal_rows(_cubic(distance / factor))


def sum_of_blocks(x: Tensor, factor: int) -> Tensor:
    """Sums over ``factor`` x ``factor`` pixels, rows first: whole rows are added fastest."""
    for axis in (-2, -1):
        parts = x.unflatten(axis, (-1, factor)).unbind(axis)
        x = parts[0].clone()
        for part in parts[1:]:
            x += part
    return x


def check_factor(name: str, factor, sizes: tuple[int, ...], what: str) -> int:
    """A positive whole number that divides all ``sizes``, or a UsageError that says what would fit."""
    if isinstance(factor, bool) or not isinstance(factor, Real) or not float(factor).is_integer() or factor < 1:
        raise UsageError(f"the factor of {name} must be a whole number of at least 1, got {factor}")
    factor = int(float(factor))
    if any(n % factor for n in sizes):
        down = f"crop to {' x '.join(str(n - n % factor) for n in sizes)} or " if min(sizes) >= factor else ""
        up = " x ".join(str(n + -n % factor) for n in sizes)
        raise UsageError(
            f"{name} by {factor} does not fit {' x '.join(map(str, sizes))} {what}: "
            f"{down}pad to {up}, or choose a factor that divides the size"
        )
    return factor
