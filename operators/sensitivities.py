"""Sensitivities of the coils that operators of MRI share: their checks, the division by them, simulated ones."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from invdiff.errors import InputError, ShapeError, UsageError


def by_sensitivity(x: Tensor, total: Tensor) -> Tensor:
    """``x / total``, and 0 where the coils see next to nothing: measured maps fade instead of ending."""
    least = 1e-4 * total.amax((-2, -1), keepdim=True)
    return torch.where(total > least, x / total.clamp_min(torch.finfo(x.dtype).tiny), 0.0)


def tensor(values: ArrayLike | Tensor) -> Tensor:
    """A tensor as it is, an array as a copy."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))  # a copy: writable, contiguous


def checked_maps(maps: Tensor, shape: tuple[int, ...], name: str = "CartesianMRI") -> Tensor:
    """Complex maps ``(coils, H, W)`` or ``(slices, coils, H, W)`` for images of ``shape`` (H, W), as they are.

    Raises:
        ShapeError, UsageError, InputError: another shape, real, not finite or all zero; names the operator ``name``.
    """
    want = ", ".join(map(str, shape))
    if maps.ndim not in (3, 4) or tuple(maps.shape[-2:]) != shape or 0 in maps.shape:
        raise ShapeError(
            f"{name} expects coil maps (coils, {want}) or (slices, coils, {want}), got {tuple(maps.shape)}"
        )
    if not maps.is_complex():
        raise UsageError(f"coil maps must be complex, got {maps.dtype}")
    if not bool(torch.isfinite(torch.view_as_real(maps)).all() and maps.any()):
        raise InputError("coil maps must be finite and not all zero: check how they were estimated")
    return maps


def birdcage_maps(shape: tuple[int, int], coils: int) -> NDArray[np.complex64]:
    """Smooth simulated sensitivities with ``sum_c |S_c|^2 = 1`` everywhere, complex64 ``(coils, H, W)``.

    Coil c is a wire through the point at angle ``2 pi c / coils`` on a circle of 1.5 half sides around the slice: its
    magnitude falls as 1 / distance and its phase is the direction from the wire, less the angle of the coil.

    Raises:
        UsageError: fewer than one coil, or no (H, W).
    """
    if len(shape) != 2 or any(int(n) != n or n < 1 for n in (*shape, coils)):
        raise UsageError(f"coil maps need a shape (H, W) and at least one coil, got {tuple(shape)} and {coils}")
    y, x = (2 * (np.arange(n) - (n - 1) / 2) / n for n in shape)
    angle = (2 * np.pi * np.arange(int(coils)) / int(coils))[:, None, None]
    offset = (x - 1.5 * np.cos(angle)) + 1j * (y[:, None] - 1.5 * np.sin(angle))
    maps = np.exp(-1j * angle) * offset / np.abs(offset) ** 2
    return (maps / np.sqrt((np.abs(maps) ** 2).sum(0))).astype(np.complex64)
