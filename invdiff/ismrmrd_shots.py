"""Trajectories in ISMRMRD: spokes, spirals and others, stored with the acquisitions in a unit that no header names."""

import math
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.hdf5 import MAX_BYTES
from invdiff.ismrmrd_header import Encoding
from invdiff.ismrmrd_lines import one_number_of_coils, positions_of, samples_of

TRAJECTORIES = ("radial", "goldenangle", "spiral", "other")
_REACH = (0.9, 1.01)  # of the edge of k-space, in the right unit
_LEAST = 0.7  # along either axis


def sorted_shots(
    stored: Any, heads: np.ndarray, image: np.ndarray, encoding: Encoding, places: np.ndarray, volume: bool
) -> tuple[np.ndarray, int, dict[str, Any], tuple[int, int]]:
    """K-space ``(places, coils, shots, samples)`` of slices or partitions, shots in the order of their counter.

    Averages stay shots of their own.

    Returns:
        K-space; 1 average; options ``trajectory`` ``(shots, samples, 2)``, (row, column) in cycles per pixel, ``shape``
        and ``pixel``; rows and columns.

    Raises:
        InputError: no trajectory, one of three dimensions, one that differs between slices or partitions, shots of
            different lengths, or a unit that cannot be told.
    """
    size = encoding.kept(0), encoding.kept(1)
    _check(stored, heads, image, len(places) * math.prod(size))
    numbers = heads["idx"]["slice"].astype(int)
    if volume:
        numbers = heads["idx"]["kspace_encode_step_2"].astype(int) - encoding.centre_2 + encoding.matrix[2] // 2
    shots = [np.flatnonzero(image & (numbers == n)) for n in places]
    if len(counts := {len(which) for which in shots}) != 1 or (volume and sum(map(len, shots)) != image.sum()):
        what = "partitions" if volume else "slices"
        raise InputError(f"has {what} of {min(counts)} to {max(counts)} shots; only equally sampled ones are read")
    lengths = {int(n) for n in (heads["number_of_samples"].astype(int) - _cut(heads))[np.concatenate(shots)]}
    shape = len(places), one_number_of_coils(heads, image), len(shots[0]), max(lengths)
    if len(lengths) != 1 or 8 * math.prod(shape) > MAX_BYTES or not shape[-1] > 0:
        raise InputError(f"has shots of {min(lengths)} to {max(lengths)} samples, or too many; give equal ones")
    kspace, common = np.empty(shape, np.complex64), np.empty(0)
    for s, found in enumerate(shots):
        which = found[np.argsort(heads["idx"]["kspace_encode_step_1"][found], kind="stable")]
        k = np.stack([_shot(positions_of(stored, heads, n).T, heads, n).T for n in which.tolist()])
        common = k if s == 0 else common
        if np.abs(k - common).max() > 1e-4 * np.abs(common).max():
            raise InputError(
                "has trajectories that differ between slices or partitions; take one slice at a time with --slices"
            )
        for j, n in enumerate(which.tolist()):
            kspace[s, :, j] = _shot(samples_of(stored, heads, n), heads, n)
    pixel = encoding.encoded_mm[0] / encoding.matrix[0], encoding.encoded_mm[1] / encoding.matrix[1]
    options = {"trajectory": in_cycles_per_pixel(_plane(common), encoding), "shape": size, "pixel": pixel}
    return kspace, 1, options, size


def _check(stored: Any, heads: np.ndarray, image: np.ndarray, pixels: int) -> None:
    import h5py

    dimensions = np.unique(heads["trajectory_dimensions"][image])
    floats = "traj" in stored.dtype.names and h5py.check_vlen_dtype(stored.dtype["traj"]) == np.float32
    if len(dimensions) != 1 or not floats or dimensions[0] not in (2, 3):
        raise InputError(
            f"says it is not Cartesian and has trajectories of {dimensions[:4].tolist()} dimensions; store 2 with "
            "every acquisition, from -0.5 to 0.5"
        )
    if (size := 8 * pixels * one_number_of_coils(heads, image)) > MAX_BYTES:
        raise InputError(f"declares {1e-9 * size:.3g} GB of images of its coils; take part of it with --slices")


def _cut(heads: np.ndarray) -> np.ndarray:
    return heads["discard_pre"].astype(int) + heads["discard_post"]


def _shot(values: np.ndarray, heads: np.ndarray, n: int) -> np.ndarray:
    """The samples that count of ``(..., samples)``."""
    return values[:, int(heads["discard_pre"][n]) : values.shape[1] - int(heads["discard_post"][n])]


def _plane(k: np.ndarray) -> np.ndarray:
    """The first two coordinates; the third must be 0."""
    if k.shape[-1] == 3 and np.abs(k[..., 2]).max() > 1e-3 * np.abs(k[..., :2]).max():
        raise InputError("has a trajectory in three dimensions; only planes are read, reconstruct it in 3D elsewhere")
    return k[..., :2]


def in_cycles_per_pixel(k: np.ndarray, encoding: Encoding) -> np.ndarray:
    """A trajectory in cycles per pixel of the encoded matrix, from whichever unit takes it to the edge of k-space.

    The format fixes no unit. In use are cycles (or radians) per pixel, cycles per encoded or reconstructed field of
    view, and cycles (or radians) per metre. A unit fits if in it the trajectory ends between 0.9 and 1.01 of the
    highest frequency of the encoded matrix, and at 0.7 at least along either axis.

    Args:
        k: ``(shots, samples, 2)``, readout and phase direction.

    Raises:
        InputError: no unit fits, or several that mean different frequencies do.
    """
    matrix, field, recon = (np.array(v[:2], float) for v in (encoding.matrix, encoding.encoded_mm, encoding.recon_mm))
    pixel = field / matrix
    factors = {"cycles per encoded field of view": 1 / matrix, "cycles per field of view": pixel / recon}
    factors |= {"1/m": pixel / 1000, "rad/m": pixel / (2000 * math.pi)}
    if abs(pixel[0] / pixel[1] - 1) < 0.01:  # else a pixel could mean either
        factors |= {"cycles per pixel": np.ones(2), "radians per pixel": np.full(2, 1 / (2 * math.pi))}
    ends = np.abs(k).max((0, 1))
    reach = {name: 2 * ends * factor for name, factor in factors.items()}
    fits = [n for n, r in reach.items() if _REACH[0] <= r.max() <= _REACH[1] and r.min() >= _LEAST]
    if not fits or any(not np.allclose(factors[n], factors[fits[0]], rtol=0.005) for n in fits):
        why = f"fits {' and '.join(fits)}" if fits else "fits no unit that is in use"
        raise InputError(
            f"has a trajectory that ends at {ends[0]:.4g} and {ends[1]:.4g}, which {why} for an encoded matrix of "
            f"{encoding.matrix[0]} x {encoding.matrix[1]}; store it in cycles per pixel, from -0.5 to 0.5"
        )
    k = k * factors[fits[0]]
    # Beyond the edge by more than rounding: one cycle on it is the same sample, since pixels are whole numbers.
    return np.where(np.abs(k) > 0.5 * (1 + 5e-7), k - np.round(k), k)
