"""Non-Cartesian trajectories through k-space: where the samples of a scan lie, as pure functions, and their checks.

A trajectory is float64 ``(shots, samples, 2)`` in cycles per pixel, (row, column), in [-0.5, 0.5]: 0.5 is the largest
frequency that the pixels of the image hold, and -0.5 is the same.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.formats.plain import read_array
from invdiff.operators.base import check_sizes

GOLDEN_DEG = 360 / (1 + math.sqrt(5))  # 111.246
LIMIT = 0.5 * (1 + 1e-6)  # rounding of float32 files

Trajectory = NDArray[np.float64]


def radial(
    shape: tuple[int, int], spokes: int, samples: int | None = None, golden: bool = False, start_deg: float = 0.0
) -> Trajectory:
    """Spokes through the centre, whole diameters from -0.5 towards 0.5.

    Sample j lies at ``(j - samples // 2) / samples`` along the spoke, so that each has a sample at k = 0.

    Args:
        shape: (H, W) of the image.
        spokes: number of them, evenly over 180 degrees.
        samples: per spoke; None for ``2 max(H, W)``, the usual twofold oversampling of the readout.
        golden: steps of 111.246 degrees instead, which cover evenly whatever the number of spokes.
        start_deg: angle of the first spoke, in degrees, from the columns' axis (row frequency 0) towards the rows'.

    Raises:
        UsageError: a shape, a count or an angle that cannot be.

    Source: S. Winkelmann et al., IEEE Trans. Med. Imaging 26 (2007) 68-76, for the golden angle.
    """
    size = max(_plane(shape))
    spokes = _count("spokes", spokes, 1)
    samples = _count("samples per spoke", 2 * size if samples is None else samples, 2)
    step = GOLDEN_DEG if golden else 180 / spokes
    angle = np.deg2rad(_angle(start_deg) + step * np.arange(spokes))[:, None]
    k = (np.arange(samples) - samples // 2) / samples
    return np.stack([k * np.sin(angle), k * np.cos(angle)], -1)


def spiral(
    shape: tuple[int, int],
    interleaves: int,
    samples: int | None = None,
    turns: float | None = None,
    start_deg: float = 0.0,
) -> Trajectory:
    """Archimedean spirals from the centre out to 0.5, the same turned by 360 degrees / interleaves, at constant speed.

    ``k = a theta``, ``a = 0.5 / (2 pi turns)``, sampled evenly along its length
    ``a / 2 (theta sqrt(1 + theta^2) + asinh theta)``.

    Args:
        shape: (H, W) of the image.
        interleaves: number of spirals.
        samples: per spiral; None for steps of ``1 / max(H, W)``, those of the grid.
        turns: of each; None for ``max(H, W) / (2 interleaves)``, which puts turns 1 / max(H, W) apart. Fewer turns
            undersample.
        start_deg: angle of the first spiral, in degrees, from the columns' axis towards the rows'.

    Raises:
        UsageError: a shape, a count or an angle that cannot be.
    """
    size = max(_plane(shape))
    interleaves = _count("interleaves", interleaves, 1)
    turns = size / (2 * interleaves) if turns is None else turns
    if not 0 < turns < math.inf:
        raise UsageError(f"turns of a spiral must be positive, got {turns}")
    last = 2 * math.pi * turns
    theta = np.linspace(0, last, max(1000, math.ceil(200 * turns)))
    length = 0.25 / last * (theta * np.sqrt(1 + theta**2) + np.arcsinh(theta))
    samples = _count("samples per spiral", math.ceil(size * length[-1]) + 1 if samples is None else samples, 2)
    theta = np.interp(np.linspace(0, length[-1], samples), length, theta)
    angle = theta + np.deg2rad(_angle(start_deg) + 360 / interleaves * np.arange(interleaves))[:, None]
    k = 0.5 * theta / last
    return np.stack([k * np.sin(angle), k * np.cos(angle)], -1)


def read_trajectory(path: str | Path, shape: tuple[int, int]) -> Trajectory:
    """A trajectory ``(shots, samples, 2)`` from a ``.npy`` file, checked by :func:`check_trajectory`.

    Raises:
        InputError: no such file, another type, damaged, or not a trajectory.
    """
    if Path(path).suffix.lower() != ".npy":
        raise InputError(f"trajectory file {path}: its type is unknown; use radial, golden, spiral or a .npy file")
    array = read_array(path, "trajectory")
    try:
        return check_trajectory(array, shape)
    except InputError as error:
        raise type(error)(f"trajectory file {path}: {error}") from None


def check_trajectory(trajectory: ArrayLike, shape: tuple[int, int]) -> Trajectory:
    """The trajectory in float64.

    Args:
        trajectory: ``(shots, samples, 2)``.
        shape: (H, W) of the image.

    Raises:
        ShapeError: another shape, or no sample.
        InputError: values that are not real and finite, or not in cycles per pixel; names the likely unit.
    """
    k = np.asarray(trajectory)
    if k.ndim != 3 or k.shape[-1] != 2 or k.size == 0:
        raise ShapeError(f"a trajectory is (shots, samples, 2), (row, column) frequencies, got {k.shape}")
    if k.dtype.kind not in "fiu" or not np.isfinite(k).all():
        raise InputError(f"a trajectory must be real and finite, got {k.dtype}: remove samples without a position")
    largest = float(np.abs(k).max())
    if largest > LIMIT:
        raise InputError(
            f"a trajectory is in cycles per pixel, at most 0.5, and this one reaches {largest:.4g}: "
            f"{_likely_unit(largest, max(shape))}"
        )
    return k.astype(np.float64)


def _likely_unit(largest: float, size: int) -> str:
    """What a trajectory that reaches ``largest`` probably is in, and how to convert it."""
    if largest <= 1.01:
        return "probably relative to the largest frequency, divide it by 2 (or 1/mm, multiply by the pixel size in mm)"
    if 0.9 * math.pi < largest < 1.01 * math.pi:
        return "probably radians per pixel, divide it by 2 pi"
    if 0.45 * size <= largest <= 0.55 * size:
        return f"probably cycles per field of view, divide it by the {size} pixels"
    return "probably 1/m, multiply it by the pixel size in m"


def nyquist_spokes(shape: tuple[int, ...]) -> float:
    """``pi / 2 max(H, W)``: spokes whose ends lie as far apart as the samples of the grid."""
    return math.pi / 2 * max(shape)


def spoke_spacing(trajectory: Trajectory) -> tuple[NDArray[np.float64], NDArray[np.float64], float] | None:
    """Angles ``(shots,)`` in rad modulo pi, signed radii ``(samples,)`` and their step in cycles per pixel.

    None for anything but diameters through the centre, sampled evenly and all alike (to a thousandth of the step).
    """
    along = trajectory[:, -1] - trajectory[:, 0]
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    if trajectory.shape[1] < 2 or (length == 0).any():
        return None
    along = along / length
    radius = (trajectory * along[:, None]).sum(-1)
    step = float(length.mean()) / (trajectory.shape[1] - 1)
    even = radius[0, 0] + step * np.arange(trajectory.shape[1])
    aside = trajectory[..., 0] * along[:, None, 1] - trajectory[..., 1] * along[:, None, 0]
    whole = abs(even[0] + even[-1]) < 1.5 * step  # as far on one side as on the other
    if not whole or max(np.abs(radius - even).max(), np.abs(aside).max()) > 1e-3 * step:
        return None
    return np.arctan2(along[:, 0], along[:, 1]) % np.pi, even, step


def _plane(shape) -> tuple[int, ...]:
    if len(shape) != 2:
        raise UsageError(f"shape must be (H, W) with positive whole numbers, got {tuple(shape)}")
    return check_sizes(shape)


def _count(what: str, value: float, least: int) -> int:
    if not math.isfinite(value) or int(value) != value or value < least:
        raise UsageError(f"{what} must be a whole number from {least}, got {value}")
    return int(value)


def _angle(degrees: float) -> float:
    if not math.isfinite(degrees):
        raise UsageError(f"the first angle must be finite, in degrees, got {degrees}")
    return degrees
