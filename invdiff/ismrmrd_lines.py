"""Acquisitions of ISMRMRD: their headers, flags and samples, noise scans, partitions, and where slices lie.

Source: S. J. Inati et al., ISMRM Raw data format, Magn Reson Med 77 (2017) 411-421; https://ismrmrd.readthedocs.io.
"""

import math
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN
from invdiff.hdf5 import MAX_BYTES
from invdiff.ismrmrd_header import Encoding

NOISE, CALIBRATION, BOTH, REVERSE, PHASE = 19, 20, 21, 22, 24  # numbers of flags, from 1
ASIDE = (23, 26, 27, 28, 29, 30, 31)  # navigators, feedback, dummies, surface coils, stabilisation: no k-space lines
_FIELDS = ("flags", "number_of_samples", "active_channels", "center_sample", "discard_pre", "discard_post",
           "encoding_space_ref", "trajectory_dimensions", "sample_time_us", "position", "read_dir", "phase_dir",
           "slice_dir", "idx")  # fmt: skip
_MOST_LINES = 2**22


def has(flags: np.ndarray, number: int) -> np.ndarray:
    """Which acquisitions have the flag ``number``."""
    return (flags >> np.uint64(number - 1)) & np.uint64(1) == 1


def read_heads(stored: Any, size: int) -> np.ndarray:
    """The headers of all acquisitions, without their samples, whose lengths are compared with the file first.

    Args:
        stored: the open dataset.
        size: of the file, in bytes.

    Raises:
        InputError: no acquisitions of this format, too many, or more samples than the file has bytes.
    """
    import h5py

    names = stored.dtype.names or ()
    head = stored.dtype["head"] if "head" in names else None
    samples = h5py.check_vlen_dtype(stored.dtype["data"]) if "data" in names else None
    if head is None or samples != np.float32 or not set(_FIELDS) <= set(head.names or ()) or stored.ndim != 1:
        raise InputError("/data holds no acquisitions of ISMRMRD; check the file")
    if not 0 < len(stored) <= _MOST_LINES:
        raise InputError(f"/data holds {len(stored)} acquisitions, the limit is {_MOST_LINES}; check the file")
    if stored.chunks is not None and stored.id.get_num_chunks() < math.ceil(len(stored) / stored.chunks[0]):
        raise InputError(f"/data is incomplete (declared but never written); {AGAIN}")
    heads = stored.fields("head")[()]
    if heads["flags"].dtype != np.uint64 or heads["position"].shape[1:] != (3,) or not heads["idx"].dtype.names:
        raise InputError("/data holds no acquisitions of ISMRMRD; check the file")
    heads = heads[list(_FIELDS)]
    wanted = 8 * np.sum(heads["number_of_samples"].astype(np.int64) * heads["active_channels"])
    if wanted > size:
        raise InputError(f"/data declares {wanted / 1e6:.3g} MB in a file of {size / 1e6:.3g} MB; {AGAIN}")
    if wanted > MAX_BYTES:
        raise InputError(f"declares {wanted / 1e9:.3g} GB of k-space, the limit is {MAX_BYTES / 1e9:.3g}; split it")
    return heads


def one_number_of_coils(heads: np.ndarray, image: np.ndarray) -> int:
    """Coils of the lines of the image.

    Raises:
        InputError: several numbers, none, or more than 1024.
    """
    coils = np.unique(heads["active_channels"][image])
    if len(coils) != 1 or not 0 < coils[0] <= 1024:
        raise InputError(f"has lines of {coils[:4].tolist()} coils; give lines of one number of coils")
    return int(coils[0])


def samples_of(stored: Any, heads: np.ndarray, n: int) -> np.ndarray:
    """Samples of acquisition n, complex ``(coils, samples)``, in the order of time.

    Raises:
        InputError: fewer or more than its header says, or not finite.
    """
    samples = np.asarray(stored.fields("data")[n], np.float32)
    shape = int(heads["active_channels"][n]), int(heads["number_of_samples"][n])
    if samples.size != 2 * math.prod(shape):
        raise InputError(
            f"acquisition {n} holds {samples.size} numbers, its header says {2 * math.prod(shape)}; {AGAIN}"
        )
    if not np.isfinite(samples).all():
        raise InputError(f"acquisition {n} holds NaN or infinite values; remove or repair it")
    return samples.view(np.complex64).reshape(shape)


def positions_of(stored: Any, heads: np.ndarray, n: int) -> np.ndarray:
    """The trajectory of acquisition n, ``(samples, dimensions)``, in the unit of the file; empty where there is none.

    Raises:
        InputError: fewer or more than its header says, or not finite.
    """
    shape = int(heads["number_of_samples"][n]), int(heads["trajectory_dimensions"][n])
    if "traj" not in stored.dtype.names or shape[1] == 0:
        return np.zeros((shape[0], 0))
    k = np.asarray(stored.fields("traj")[n], np.float64)
    if k.size != math.prod(shape) or not np.isfinite(k).all():
        raise InputError(
            f"acquisition {n} has a trajectory of {k.size} numbers, its header says {math.prod(shape)}, "
            f"or not all are finite; {AGAIN}"
        )
    return k.reshape(shape)


def noise_of(stored: Any, heads: np.ndarray, noise: np.ndarray, image: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Samples without signal ``(coils, samples)``, as large as they are in a line of the image.

    The variance of a sample is as the bandwidth, 1 / sampling time; the filters of the receiver take a share of it.

    Raises:
        InputError: scans of another number of coils.
    """
    lines = [samples_of(stored, heads, n) for n in np.flatnonzero(noise).tolist()]
    if len({len(line) for line in lines}) != 1 or len(lines[0]) != heads["active_channels"][image][0]:
        raise InputError("has noise scans of another number of coils than the image; remove them")
    times = [np.unique(heads["sample_time_us"][which]) for which in (noise, image)]
    ratio = 1.0
    if all(len(t) == 1 and np.isfinite(t[0]) and t[0] > 0 for t in times):
        ratio = float(times[0][0] / times[1][0])
    return np.concatenate(lines, 1) * np.float32(math.sqrt(ratio / encoding.bandwidth))


def in_space(heads: np.ndarray, image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the slices in the order of their positions along the slice direction; as they are without any.

    Raises:
        InputError: some slices, but not all, at the same place.
    """
    first = np.array([np.flatnonzero(image & (heads["idx"]["slice"] == n))[0] for n in numbers])
    along = heads["position"][first].astype(float) @ heads["slice_dir"][first[0]].astype(float)
    distinct = len(np.unique(along.round(3))) if np.isfinite(along).all() else 1
    if 1 < distinct < len(numbers):
        raise InputError(f"has {len(numbers)} slices at {distinct} positions; remove those that lie twice at a place")
    return numbers[np.argsort(along)] if distinct > 1 else numbers


def partitions_to_slices(kspace: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Slices of the reconstructed field of view from all partitions, by the centred orthonormal inverse FFT.

    Noise stays as large as it is; partition ``n // 2`` has frequency 0, slice ``n // 2`` the position of the slab.

    Args:
        kspace: complex ``(partitions, coils, ...)``, overwritten.

    Returns:
        ``(slices, coils, ...)``, a view of ``kspace``.
    """
    for coil in range(kspace.shape[1]):
        image = np.fft.ifft(np.fft.ifftshift(kspace[:, coil], 0), axis=0, norm="ortho")
        kspace[:, coil] = np.fft.fftshift(image, 0)
    start = first_kept(encoding)
    return kspace[start : start + encoding.kept(2)]


def first_kept(encoding: Encoding) -> int:
    """The first slice of a slab inside the reconstructed field of view."""
    return encoding.matrix[2] // 2 - encoding.kept(2) // 2


def placed(
    heads: np.ndarray, first: np.ndarray, positions: np.ndarray, size: tuple[int, int], pixel: tuple[float, float],
    slice_mm: float,
) -> dict[str, Any]:  # fmt: skip
    """Pixel sizes; and where the slices lie, if the file says it without contradiction.

    Args:
        first: an acquisition of each slice, for its directions.
        positions: of the middle of each slice in LPS+ mm, ``(slices, 3)``.
        size: rows and columns.
        pixel: their distances in mm.
        slice_mm: distance of slices, where there is only one.

    Returns:
        ``pixel_mm``, ``slice_mm`` and, if known, ``affine``, of ``measurement_from_kspace``.

    Raises:
        InputError: slices at uneven distances.
    """
    options: dict[str, Any] = {"pixel_mm": pixel, "slice_mm": slice_mm}
    turned = np.stack([heads[name][first] for name in ("phase_dir", "read_dir", "slice_dir")], -1).astype(float)
    orthogonal = np.allclose(turned.transpose(0, 2, 1) @ turned, np.eye(3), atol=1e-3)
    if not orthogonal or not np.isfinite(positions).all() or not np.allclose(turned, turned[0], atol=1e-4):
        return options
    step = turned[0, :, 2] * slice_mm
    if len(positions) > 1:
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
        even = positions[0] + np.arange(len(positions))[:, None] * step
        if not np.linalg.norm(step) > 1e-3:
            return options
        if abs(positions - even).max() > 0.02 * np.linalg.norm(step):
            raise InputError("has slices at uneven distances; take an even part of them with --slices")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = turned[0, :, 0] * pixel[1], turned[0, :, 1] * pixel[0], step
    affine[:3, 3] = positions[0] - affine[:3, :2] @ (size[1] // 2, size[0] // 2)
    return options | {"affine": np.diag([-1.0, -1, 1, 1]) @ affine}
