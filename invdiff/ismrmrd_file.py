"""ISMRMRD raw data: Cartesian 2D k-space, sorted from its acquisitions; noise scans told apart.

Source: S. J. Inati et al., ISMRM Raw data format, Magn Reson Med 77 (2017) 411-421; https://ismrmrd.readthedocs.io.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN
from invdiff.hdf5 import MAX_BYTES, looks, opened, own
from invdiff.ismrmrd_header import Encoding, header_text, read_header

GROUP = "dataset"
_NOISE, _CALIBRATION, _BOTH, _REVERSE, _PHASE = 19, 20, 21, 22, 24  # numbers of flags, from 1
_ASIDE = (23, 26, 27, 28, 29, 30, 31)  # navigators, feedback, dummies, surface coils, stabilisation: no k-space lines
_COUNTERS = ("contrast", "phase", "repetition", "set")
_FIELDS = ("flags", "number_of_samples", "active_channels", "center_sample", "discard_pre", "discard_post",
           "encoding_space_ref", "sample_time_us", "position", "read_dir", "phase_dir", "slice_dir", "idx")  # fmt: skip
_MOST_LINES = 2**22


def is_ismrmrd(path: Path) -> bool:
    """Whether an HDF5 file has the group of ISMRMRD, with a header and acquisitions."""
    import h5py

    def asked(file) -> bool:
        group = file.get(GROUP, getlink=True) if GROUP in file.keys() else None  # noqa: SIM118
        return isinstance(group, h5py.HardLink) and {"xml", "data"} <= set(file[GROUP].keys())

    return looks(path, asked)


def slice_range(slices: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """``(a, b)`` of ``count`` slices, all for None.

    Raises:
        InputError: a range outside them.
    """
    a, b = slices or (0, count)
    if not 0 <= a < b <= count:
        raise InputError(f"slices {a}:{b}: there are {count}; give A:B with 0 <= A < B <= {count}")
    return a, b


def read_ismrmrd(path: Path, slices: tuple[int, int] | None) -> tuple[np.ndarray, dict[str, Any], tuple[int, int]]:
    """Cartesian k-space of one image per slice.

    Lines lie where their counter says, against the centre of the encoding limits; averages are averaged; separate
    calibration lines, navigators and the like are left out. A noise scan is scaled to the sampling time and bandwidth
    of the image.

    Returns:
        ``(slices, coils, readout, phase)`` complex64, centred; options of ``measurement_from_kspace``; the first slice
        and how many the scan has.

    Raises:
        InputError: damaged, links, too large, 3D, not Cartesian, EPI, or several images per slice.
    """
    with opened(path) as file:
        group = own(file, GROUP, "Group")
        encoding = read_header(header_text(own(group, "xml"), "xml"))
        stored = own(group, "data")
        heads = _heads(stored, path.stat().st_size)
        _check(encoding, heads)
        flags, idx = heads["flags"], heads["idx"]
        aside = np.any([_has(flags, n) for n in _ASIDE], axis=0) | _has(flags, _PHASE)
        noise = _has(flags, _NOISE)
        outside = _has(flags, _CALIBRATION) & ~_has(flags, _BOTH) & (not encoding.embedded)
        image = ~(noise | aside | outside) & (heads["encoding_space_ref"] == 0)
        if not image.any():
            raise InputError("holds no lines of an image; check the file")
        numbers = np.unique(idx["slice"][image])
        order = _in_space(heads, image, numbers)
        a, b = slice_range(slices, len(order))
        kspace, averages = _sorted(stored, heads, image, encoding, order[a:b])
        options = _place(heads, image, encoding, order[a:b], kspace.shape)
        if noise.any():
            options["noise"] = _noise(stored, heads, noise, image, encoding) / math.sqrt(averages)
    return kspace, options, (a, len(order))


def _has(flags: np.ndarray, number: int) -> np.ndarray:
    return (flags >> np.uint64(number - 1)) & np.uint64(1) == 1


def _heads(stored: Any, size: int) -> np.ndarray:
    """The headers of all acquisitions, without their samples, whose lengths are compared with the file first."""
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


def _check(encoding: Encoding, heads: np.ndarray) -> None:
    """Refuse what is no Cartesian 2D k-space of one image per slice."""
    if encoding.trajectory not in ("", "cartesian"):
        raise InputError(f"has a trajectory '{encoding.trajectory[:20]}', not Cartesian; grid it first")
    idx = heads["idx"]
    if encoding.matrix[2] > 1 or (idx["kspace_encode_step_2"] > 0).any():
        raise InputError("is encoded in 3D; transform it along the slices and give 2D k-space")
    for name in _COUNTERS:
        if (count := len(np.unique(idx[name][~_has(heads["flags"], _NOISE)]))) > 1:
            raise InputError(f"holds {count} values of '{name}', several images of a slice; cut out one of them first")
    kinds = np.sum([_has(heads["flags"], n) for n in (_NOISE, _PHASE, *_ASIDE)], axis=0)
    if (kinds > 1).any():
        raise InputError(f"acquisition {kinds.argmax()} is flagged as several things at once; check the file")
    if (_has(heads["flags"], _REVERSE) & ~_has(heads["flags"], _PHASE)).any():
        raise InputError("has lines read backwards (EPI), whose phase must be corrected; reconstruct k-space first")


def _in_space(heads: np.ndarray, image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the slices in the order of their positions along the slice direction; as they are without any."""
    first = np.array([np.flatnonzero(image & (heads["idx"]["slice"] == n))[0] for n in numbers])
    along = heads["position"][first].astype(float) @ heads["slice_dir"][first[0]].astype(float)
    distinct = len(np.unique(along.round(3))) if np.isfinite(along).all() else 1
    if 1 < distinct < len(numbers):
        raise InputError(f"has {len(numbers)} slices at {distinct} positions; remove those that lie twice at a place")
    return numbers[np.argsort(along)] if distinct > 1 else numbers


def _line(stored: Any, heads: np.ndarray, n: int) -> np.ndarray:
    """Samples of acquisition n, complex ``(coils, samples)``."""
    samples = np.asarray(stored.fields("data")[n], np.float32)
    shape = int(heads["active_channels"][n]), int(heads["number_of_samples"][n])
    if samples.size != 2 * math.prod(shape):
        raise InputError(
            f"acquisition {n} holds {samples.size} numbers, its header says {2 * math.prod(shape)}; {AGAIN}"
        )
    if not np.isfinite(samples).all():
        raise InputError(f"acquisition {n} holds NaN or infinite values; remove or repair it")
    return samples.view(np.complex64).reshape(shape)


def _sorted(
    stored: Any, heads: np.ndarray, image: np.ndarray, encoding: Encoding, order: np.ndarray
) -> tuple[np.ndarray, int]:
    """K-space ``(slices, coils, readout, phase)`` of the slices in ``order``, and of how many averages."""
    coils = np.unique(heads["active_channels"][image])
    if len(coils) != 1 or not 0 < coils[0] <= 1024:
        raise InputError(f"has lines of {coils[:4].tolist()} coils; give lines of one number of coils")
    readout, phase = encoding.matrix[:2]
    shape = len(order), int(coils[0]), readout, phase
    if 8 * math.prod(shape) > MAX_BYTES:
        raise InputError(f"declares {8e-9 * math.prod(shape):.3g} GB of k-space; take part of it with --slices")
    kspace, count = np.zeros(shape, np.complex64), np.zeros((shape[0], phase), int)
    place = {int(number): s for s, number in enumerate(order)}
    for n in np.flatnonzero(image).tolist():
        if (s := place.get(int(heads["idx"]["slice"][n]))) is None:
            continue
        pre, post = int(heads["discard_pre"][n]), int(heads["discard_post"][n])
        line = _line(stored, heads, n)
        kept = line[:, pre : line.shape[1] - post]
        start = readout // 2 - int(heads["center_sample"][n]) + pre
        row = int(heads["idx"]["kspace_encode_step_1"][n]) - encoding.centre + phase // 2
        if not (0 <= row < phase and start >= 0 and 0 < kept.shape[1] <= readout - start):
            raise InputError(f"acquisition {n} lies outside the encoded matrix {encoding.matrix}; check the file")
        kspace[s, :, start : start + kept.shape[1], row] += kept
        count[s, row] += 1
    lines = (count > 0).sum(1)
    if 2 * lines.min() < lines.max():
        raise InputError(
            f"has {lines.min()} lines in slice {lines.argmin()} and {lines.max()} in others; check the file"
        )
    averages = np.unique(count[count > 0])
    if len(averages) != 1 or not count.any(1).all():
        raise InputError(f"has lines of {averages[:4].tolist()} averages, or none in a slice; average them first")
    return kspace / np.float32(averages[0]), int(averages[0])


def _noise(stored: Any, heads: np.ndarray, noise: np.ndarray, image: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Samples without signal ``(coils, samples)``, as large as they are in a line of the image.

    The variance of a sample is as the bandwidth, 1 / sampling time; the filters of the receiver take a share of it.
    """
    lines = [_line(stored, heads, n) for n in np.flatnonzero(noise).tolist()]
    if len({len(line) for line in lines}) != 1 or len(lines[0]) != heads["active_channels"][image][0]:
        raise InputError("has noise scans of another number of coils than the image; remove them")
    times = [np.unique(heads["sample_time_us"][which]) for which in (noise, image)]
    ratio = 1.0
    if all(len(t) == 1 and np.isfinite(t[0]) and t[0] > 0 for t in times):
        ratio = float(times[0][0] / times[1][0])
    return np.concatenate(lines, 1) * np.float32(math.sqrt(ratio / encoding.bandwidth))


def _place(
    heads: np.ndarray, image: np.ndarray, encoding: Encoding, order: np.ndarray, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Pixel sizes; and where the slices lie, if the file says it without contradiction."""
    field, size = encoding.encoded_mm, encoding.matrix
    rows = round(shape[2] / encoding.oversampling)
    pixel = field[0] / encoding.oversampling / rows, field[1] / shape[3]
    options: dict[str, Any] = {"oversampling": encoding.oversampling, "pixel_mm": pixel}
    options["slice_mm"] = field[2] / size[2]
    first = [int(np.flatnonzero(image & (heads["idx"]["slice"] == n))[0]) for n in order]
    turned = np.stack([heads[name][first] for name in ("phase_dir", "read_dir", "slice_dir")], -1).astype(float)
    positions = heads["position"][first].astype(float)
    orthogonal = np.allclose(turned.transpose(0, 2, 1) @ turned, np.eye(3), atol=1e-3)
    if not orthogonal or not np.isfinite(positions).all() or not np.allclose(turned, turned[0], atol=1e-4):
        return options
    step = turned[0, :, 2] * options["slice_mm"]
    if len(order) > 1:
        step = (positions[-1] - positions[0]) / (len(order) - 1)
        even = positions[0] + np.arange(len(order))[:, None] * step
        if not np.linalg.norm(step) > 1e-3:
            return options
        if abs(positions - even).max() > 0.02 * np.linalg.norm(step):
            raise InputError("has slices at uneven distances; take an even part of them with --slices")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = turned[0, :, 0] * pixel[1], turned[0, :, 1] * pixel[0], step
    affine[:3, 3] = positions[0] - affine[:3, :2] @ (shape[3] // 2, rows // 2)
    return options | {"affine": np.diag([-1.0, -1, 1, 1]) @ affine}
