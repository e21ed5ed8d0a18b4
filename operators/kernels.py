"""Blur kernels: built or read, as float64 tensors with odd sides, centred on the middle element, of sum 1 or 0."""

import math
from pathlib import Path

import torch
from torch import Tensor

from invdiff.errors import InputError, UsageError
from invdiff.files import show
from invdiff.formats.plain import read_array
from invdiff.operators.base import ArrayLike, numbers

LONGEST = 4096  # of a kernel, in pixels
FORMS = "gaussian:SIGMA, gaussian3d:SIGMA, motion:LENGTH:ANGLE or a kernel file"
ZERO = 1e-6  # a sum below this share of the sum of magnitudes is rounding


def gaussian_kernel(sigma_px: float | tuple[float, ...], truncate: float = 4.0) -> Tensor:
    """Sampled Gaussian ``exp(-|d|^2 / (2 sigma^2))``, cut at ``truncate`` standard deviations, of sum 1.

    Args:
        sigma_px: standard deviation in pixels, or one per axis: (row, column) or (slice, row, column).
        truncate: half width in standard deviations.

    Returns:
        ``(2 r + 1, ...)`` with ``r = round(truncate sigma)``.

    Raises:
        UsageError: a standard deviation that is not positive, or too large.
    """
    kernel = torch.ones((), dtype=torch.float64)
    for sigma in (sigma_px, sigma_px) if isinstance(sigma_px, (int, float)) else sigma_px:
        if not (math.isfinite(sigma) and sigma >= 1e-3 and truncate * sigma < LONGEST / 2):
            most = LONGEST / (2 * truncate)
            raise UsageError(
                f"the sigma of a Gaussian kernel must lie between 0.001 and {most:g} pixels, got {sigma:g}"
            )
        radius = int(truncate * sigma + 0.5)
        d = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = kernel[..., None] * torch.exp(-(d**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def motion_kernel(length_px: float, angle_deg: float) -> Tensor:
    """Uniform motion along a straight segment, sampled by linear interpolation, of sum 1.

    Args:
        length_px: length of the segment in pixels, positive.
        angle_deg: in degrees, counter-clockwise from the direction of growing columns (rows grow downwards).

    Returns:
        ``(rows, columns)``, point-symmetric, odd sides; cut to what is not zero.

    Raises:
        UsageError: a length that is not positive, or too large, or an angle that is not finite.
    """
    if not (math.isfinite(length_px) and 0 < length_px < LONGEST and math.isfinite(angle_deg)):
        raise UsageError(f"a motion kernel needs a positive length in pixels and an angle, got {length_px}:{angle_deg}")
    count = math.ceil(64 * length_px)
    along = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * (length_px / count)
    radius = math.ceil(length_px / 2) + 1
    angle = math.radians(angle_deg)
    grid = torch.arange(-radius, radius + 1, dtype=torch.float64)
    rows, columns = (
        (1 - (grid[:, None] - part * along).abs()).clamp_min(0) for part in (-math.sin(angle), math.cos(angle))
    )
    kernel = rows @ columns.T
    kernel = (kernel + kernel.flip(0, 1)) / (2 * kernel.sum())
    kernel = torch.where(kernel > 1e-9, kernel, 0.0)
    top, left = (int(kernel.sum(axis).nonzero()[0]) for axis in (1, 0))
    kernel = kernel[top : len(kernel) - top, left : len(kernel) - left]
    return kernel / kernel.sum()


def load_kernel(path: str | Path) -> Tensor:
    """A kernel file, see :func:`invdiff.formats.plain.read_array`, as :func:`normalised` makes it.

    Args:
        path: ``.npy``, ``.png`` (grayscale), ``.nii`` or ``.nii.gz``; 2D (rows, columns) or 3D (slices, rows, columns).

    Raises:
        InputError: a file that cannot be read, or see :func:`normalised`.
    """
    return normalised(read_array(path, "kernel"), f"kernel file {path}")


def normalised(kernel: ArrayLike, name: str = "the kernel") -> Tensor:
    """``kernel`` as float64 on the CPU, divided by its sum; as it is where the sum is 0 (an edge filter).

    Raises:
        InputError: not two or three axes, an even side, values that are not finite, all zero, or of negative sum.
    """
    value = torch.as_tensor(kernel).detach().to("cpu", torch.float64)
    shape = " x ".join(map(str, value.shape))
    if value.ndim not in (2, 3):
        raise InputError(f"{name} has {value.ndim} axes: give (rows, columns), or (slices, rows, columns) for 3D")
    if any(n % 2 == 0 for n in value.shape):
        raise InputError(f"{name} is {shape}: an even side has no middle; crop or pad it with zeros to odd sides")
    broken = int((~torch.isfinite(value)).sum())
    if broken:
        raise InputError(f"{name} holds {broken} values that are not finite: replace them, e.g. by zeros")
    if not bool(value.any()):
        raise InputError(f"{name} is zero everywhere: nothing would be measured; check it")
    total = value.sum()
    if _sums_to_zero(value):
        return value
    if total < 0:
        raise InputError(f"{name} has the sum {float(total):.3g}, which must not be negative: change its sign")
    return value if abs(float(total) - 1) < 1e-12 else value / total  # twice gives the same bits


def _sums_to_zero(value: Tensor) -> bool:
    return bool(value.sum().abs() <= ZERO * value.abs().sum())


def remarks(kernel: ArrayLike, name: str = "the kernel") -> tuple[str, ...]:
    """What :func:`normalised` did to the scale of ``kernel``, for people; nothing where the sum was 1 within 0.1 %."""
    value = torch.as_tensor(kernel).detach().double()
    if _sums_to_zero(value):
        return (
            f"{name} has the sum 0 and is used as it is, not scaled to 1: the data hold nothing of the mean of the "
            "image, which comes from the prior alone",
        )
    total = float(value.sum())
    return () if abs(total - 1) < 1e-3 else (f"{name} has the sum {total:.4g} and was scaled to 1",)


def is_volumetric(text: str | ArrayLike) -> bool:
    """Whether a kernel, given as to :func:`parse_kernel`, has three axes and blurs the stack as a whole.

    Raises:
        InputError: a file that cannot be read.
    """
    if not isinstance(text, str):
        return torch.as_tensor(text).ndim == 3
    form = text.partition(":")[0]
    if form in ("gaussian", "gaussian3d", "motion"):
        return form == "gaussian3d"
    return Path(text).is_file() and read_array(text, "kernel").ndim == 3


def parse_kernel(text: str | ArrayLike, spacing_mm: tuple[float, ...], unit: str) -> tuple[Tensor, tuple[str, ...]]:
    """A kernel from ``gaussian:SIGMA``, ``gaussian3d:SIGMA``, ``motion:LENGTH:ANGLE``, a file name or an array.

    Args:
        text: as above; SIGMA and LENGTH in ``unit``, ANGLE in degrees.
        spacing_mm: ([slice,] row, column) spacing in mm.
        unit: "px" or "mm".

    Returns:
        The kernel, and what :func:`remarks` says about a file or an array.

    Raises:
        UsageError: a form that is none of these, a number out of range, or an unknown unit.
        InputError: a kernel that cannot be used.
    """
    if unit not in ("px", "mm"):
        raise UsageError(f"unknown unit '{unit}' of a kernel: choose one of mm, px")
    if not isinstance(text, str):
        return normalised(text), remarks(text)
    steps = spacing_mm if unit == "mm" else (1.0,) * len(spacing_mm)
    dy, dx = steps[-2:]
    name, _, rest = text.partition(":")
    if name == "gaussian":
        (sigma,) = numbers(rest, 1, "gaussian:SIGMA")
        return gaussian_kernel((sigma / dy, sigma / dx)), ()
    if name == "gaussian3d":
        (sigma,) = numbers(rest, 1, "gaussian3d:SIGMA")
        return gaussian_kernel(tuple(sigma / step for step in steps)), ()
    if name == "motion":
        length, angle = numbers(rest, 2, "motion:LENGTH:ANGLE")
        across, down = math.cos(math.radians(angle)) / dx, math.sin(math.radians(angle)) / dy
        return motion_kernel(length * math.hypot(across, down), math.degrees(math.atan2(down, across))), ()
    if not Path(text).is_file():
        raise UsageError(f"kernel '{show(text)[-200:]}' is not a file: give {FORMS}")
    return load_kernel(text), remarks(read_array(text, "kernel"), f"kernel file {text}")
