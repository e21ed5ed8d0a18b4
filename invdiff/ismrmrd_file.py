"""ISMRMRD raw data: k-space of single slices, sorted from lines, partitions or trajectories; noise scans told apart."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from invdiff.errors import InputError
from invdiff.hdf5 import MAX_BYTES, looks, opened, own
from invdiff.ismrmrd_header import Encoding, header_text, read_header
from invdiff.ismrmrd_lines import (
    ASIDE,
    BOTH,
    CALIBRATION,
    NOISE,
    PHASE,
    REVERSE,
    first_kept,
    has,
    in_space,
    noise_of,
    one_number_of_coils,
    partitions_to_slices,
    placed,
    positions_of,
    read_heads,
    samples_of,
)
from invdiff.ismrmrd_shots import TRAJECTORIES, sorted_shots

GROUP = "dataset"
_COUNTERS = ("contrast", "phase", "repetition", "set")


class Raw(NamedTuple):
    """What an ISMRMRD file holds.

    Attributes:
        kspace: complex64 ``(slices, coils, readout, phase)``, centred, or ``(slices, coils, shots, samples)``.
        options: of ``measurement_from_kspace``, or (with ``trajectory``) of ``measurement_from_shots``.
        scan: the first slice, and how many the scan has.
        told: for the description of the measurement: lines turned round and correction lines left out.
    """

    kspace: np.ndarray
    options: dict[str, Any]
    scan: tuple[int, int]
    told: dict[str, int]


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


def read_ismrmrd(path: Path, slices: tuple[int, int] | None) -> Raw:
    """K-space of one image per slice.

    Lines lie where their counter says, against the centre of the encoding limits, or where their trajectory says;
    partitions of a 3D encoding are transformed to slices; lines read backwards are turned round; averages are averaged;
    separate calibration lines, navigators and the like are left out. A noise scan is scaled to the sampling time and
    bandwidth of the image.

    Raises:
        InputError: damaged, links, too large, partitions or trajectories that are not understood, EPI sampled on
            ramps, or several images per slice.
    """
    with opened(path) as file:
        group = own(file, GROUP, "Group")
        encoding = read_header(header_text(own(group, "xml"), "xml"))
        stored = own(group, "data")
        heads = read_heads(stored, path.stat().st_size)
        flags, idx = heads["flags"], heads["idx"]
        aside = np.any([has(flags, n) for n in ASIDE], axis=0) | has(flags, PHASE)
        noise = has(flags, NOISE)
        outside = has(flags, CALIBRATION) & ~has(flags, BOTH) & (not encoding.embedded)
        image = ~(noise | aside | outside) & (heads["encoding_space_ref"] == 0)
        _check(encoding, heads, image)
        order = in_space(heads, image, np.unique(idx["slice"][image]))
        volume = encoding.matrix[2] > 1
        if volume and len(order) > 1:
            raise InputError(
                f"has {len(order)} slabs or slices of {encoding.matrix[2]} partitions; cut out one of them"
            )
        count = encoding.kept(2) if volume else len(order)
        a, b = slice_range(slices, count)
        places = np.arange(encoding.matrix[2]) if volume else order[a:b]
        along = encoding.trajectory in TRAJECTORIES
        sort = sorted_shots if along else _sorted
        kspace, averages, options, size = sort(stored, heads, image, encoding, places, volume)
        if volume:
            kspace = partitions_to_slices(kspace, encoding)[a:b]
        where = _middles(heads, image, encoding, order if volume else places, (a, b))
        pixel = options.pop("pixel")
        options |= placed(heads, *where, size, pixel, encoding.encoded_mm[2] / encoding.matrix[2])
        if noise.any():
            options["noise"] = noise_of(stored, heads, noise, image, encoding) / math.sqrt(averages)
        turned = has(flags, REVERSE)
        told = {"reversed_lines": int((turned & image).sum()), "correction_lines": int(has(flags, PHASE).sum())}
    return Raw(kspace, options, (a, count), told if told["reversed_lines"] and not along else {})


def _check(encoding: Encoding, heads: np.ndarray, image: np.ndarray) -> None:
    """Refuse what is no k-space of one image per slice."""
    if encoding.trajectory not in ("", "cartesian", "epi", *TRAJECTORIES):
        raise InputError(f"has a trajectory '{encoding.trajectory[:20]}', which is not known; grid it first")
    kinds = np.sum([has(heads["flags"], n) for n in (NOISE, PHASE, *ASIDE)], axis=0)
    if (kinds > 1).any():
        raise InputError(f"acquisition {kinds.argmax()} is flagged as several things at once; check the file")
    if not image.any():
        raise InputError("holds no lines of an image; check the file")
    for name in _COUNTERS:
        if (count := len(np.unique(heads["idx"][name][image]))) > 1:
            raise InputError(f"holds {count} values of '{name}', several images of a slice; cut out one of them first")
    if encoding.ramps and encoding.trajectory == "epi":
        raise InputError(
            "is EPI sampled on the ramps of its gradient (trajectoryDescription); regrid the lines and say cartesian"
        )


def _middles(
    heads: np.ndarray, image: np.ndarray, encoding: Encoding, order: np.ndarray, part: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """An acquisition of each slice, and the middles of slices in LPS+ mm ``(slices, 3)``."""
    first = np.array([np.flatnonzero(image & (heads["idx"]["slice"] == n))[0] for n in order])
    positions = heads["position"][first].astype(float)
    if encoding.matrix[2] == 1:
        return first, positions
    from_middle = first_kept(encoding) + np.arange(*part) - encoding.matrix[2] // 2
    along = heads["slice_dir"][first].astype(float) * encoding.encoded_mm[2] / encoding.matrix[2]
    return np.repeat(first, len(from_middle)), positions + from_middle[:, None] * along


def _sorted(
    stored: Any, heads: np.ndarray, image: np.ndarray, encoding: Encoding, places: np.ndarray, volume: bool
) -> tuple[np.ndarray, int, dict[str, Any], tuple[int, int]]:
    """K-space ``(places, coils, readout, phase)`` of slices or partitions; averages; options; rows and columns."""
    readout, phase = encoding.matrix[:2]
    shape = len(places), one_number_of_coils(heads, image), readout, phase
    if 8 * math.prod(shape) > MAX_BYTES:
        raise InputError(f"declares {8e-9 * math.prod(shape):.3g} GB of k-space; take part of it with --slices")
    kspace, count = np.zeros(shape, np.complex64), np.zeros((shape[0], phase), int)
    place = {int(number): s for s, number in enumerate(places)}
    for n in np.flatnonzero(image).tolist():
        idx = heads["idx"][n]
        number = int(idx["kspace_encode_step_2"]) - encoding.centre_2 + encoding.matrix[2] // 2
        s = place.get(number if volume else int(idx["slice"]))
        if s is None and not volume:
            continue
        kept, start = _line(stored, heads, n, encoding)
        row = int(idx["kspace_encode_step_1"]) - encoding.centre + phase // 2
        inside = 0 <= row < phase and start >= 0 and 0 < kept.shape[1] <= readout - start
        if s is None or not inside or not 0 <= number < encoding.matrix[2]:
            raise InputError(f"acquisition {n} lies outside the encoded matrix {encoding.matrix}; check the file")
        kspace[s, :, start : start + kept.shape[1], row] += kept
        count[s, row] += 1
    averages = _averages(count, volume)
    rows = round(readout / encoding.oversampling)
    pixel = encoding.encoded_mm[0] / encoding.oversampling / rows, encoding.encoded_mm[1] / phase
    options = {"oversampling": encoding.oversampling, "pixel": pixel}
    kspace /= np.float32(averages)
    return kspace, averages, options, (rows, phase)


def _line(stored: Any, heads: np.ndarray, n: int, encoding: Encoding) -> tuple[np.ndarray, int]:
    """The samples of acquisition n that count, with rising frequency, and where the first lies in the readout.

    A line read backwards is turned round, with the centre of its echo: between samples ``c - 1`` and ``c`` before.
    """
    line, pre, post = samples_of(stored, heads, n), int(heads["discard_pre"][n]), int(heads["discard_post"][n])
    centre = int(heads["center_sample"][n])
    if encoding.trajectory == "epi" and heads["trajectory_dimensions"][n]:
        steps = np.diff(positions_of(stored, heads, n)[:, 0])
        if len(steps) and np.abs(steps - steps.mean()).max() > 0.02 * abs(steps.mean()):
            raise InputError("is EPI sampled unevenly along its lines (on ramps); regrid the lines and say cartesian")
    if has(heads["flags"][n : n + 1], REVERSE)[0]:
        line, pre, post, centre = line[:, ::-1], post, pre, line.shape[1] - centre
    return line[:, pre : line.shape[1] - post], encoding.matrix[0] // 2 - centre + pre


def _averages(count: np.ndarray, volume: bool) -> int:
    """How often every measured line was measured; ``count`` is ``(places, phase)``."""
    lines = (count > 0).sum(1)
    if volume and (count > 0).sum() < (whole := int((count > 0).any(0).sum()) * len(count)):
        raise InputError(
            f"is encoded in 3D with {int((count > 0).sum())} of {whole} lines, undersampled along the partitions; fill "
            "these first (e.g. by GRAPPA along them), or reconstruct it in 3D with another program"
        )
    if 2 * lines.min() < lines.max():
        raise InputError(
            f"has {lines.min()} lines in slice {lines.argmin()} and {lines.max()} in others; check the file"
        )
    averages = np.unique(count[count > 0])
    if len(averages) != 1 or not count.any(1).all():
        raise InputError(f"has lines of {averages[:4].tolist()} averages, or none in a slice; average them first")
    return int(averages[0])
