"""Raw k-space as other programs store it: fastMRI HDF5, ISMRMRD and BART ``.cfl``, as a measurement."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError, UsageError
from invdiff.files import AGAIN, show
from invdiff.hdf5 import MAX_BYTES, check_size, looks, opened, own
from invdiff.ismrmrd_file import is_ismrmrd, read_ismrmrd, slice_range
from invdiff.ismrmrd_header import header_text, read_header
from invdiff.kspace import measurement_from_kspace, measurement_from_shots
from invdiff.measurement import Measurement

_MAX_TEXT = 2**20
_BART_AXES, _COIL, _SLICE = 16, 3, 13  # BART: read, phase 1, phase 2, coils, ..., slices as axis 13


def is_raw(path: Path) -> bool:
    """Whether a file is k-space of another program rather than a measurement file."""
    if path.suffix.lower() == ".cfl":
        return True
    return looks(path, lambda file: "kspace" in file.keys() and "format" not in file.attrs) or is_ismrmrd(path)  # noqa: SIM118


def load_raw(path, slices: tuple[int, int] | None = None) -> Measurement:
    """A fastMRI or ISMRMRD file or a BART pair as a measurement; noise from its scan or estimated, maps by ESPIRiT.

    Args:
        slices: ``(a, b)``, only these are read.

    Raises:
        InputError: missing, damaged, too large, links to elsewhere, or no k-space of slices.
        UsageError: several coils, and sigpy (or finufft, for trajectories) is not installed.
    """
    path = Path(path)
    try:
        told: dict[str, int] = {}
        if path.suffix.lower() == ".cfl":
            kspace, options, scan = _bart(path, slices)
        elif is_ismrmrd(path):
            kspace, options, scan, told = read_ismrmrd(path, slices)
        else:
            kspace, options, scan = _fastmri(path, slices)
        if bad := int(np.sum(~np.isfinite(kspace))):
            raise InputError(f"k-space holds {bad} NaN or infinite values; repair them, or set them to 0")
        if "trajectory" in options:
            measurement = measurement_from_shots(kspace, **options)
        else:
            measurement = measurement_from_kspace(kspace, calibration=_calibration(kspace), **options)
    except InputError as error:
        named = str(error).startswith(show(path))
        raise InputError(str(error) if named else f"{show(path)}: {error}") from None
    except UsageError as error:
        raise UsageError(f"{show(path)}: {error}") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # what h5py raises for damage of any kind
        why = show(" ".join(str(error).split()))[:120]
        raise InputError(f"{show(path)}: is damaged or truncated ({why}); {AGAIN}") from None
    measurement.operator.update(told)
    measurement.volume.update(first_slice=scan[0], slices_of_scan=scan[1])
    return measurement


def _calibration(kspace: np.ndarray) -> int:
    """Side of the fully sampled centre, at most 24: ESPIRiT gains nothing from more."""
    columns = (kspace != 0).any((0, 1, 2))
    middle = len(columns) // 2
    left = int(np.argmin(np.append(columns[:middle][::-1], False)))
    right = int(np.argmin(np.append(columns[middle:], False)))
    return max(2, min(24, 2 * min(left, right), 2 * (kspace.shape[2] // 2)))


def _check_bytes(shape: tuple[int, ...], itemsize: int) -> None:
    if (size := math.prod(shape) * itemsize) > MAX_BYTES:
        limit = f"the limit is {MAX_BYTES / 1e9:.3g}"
        raise InputError(f"declares {size / 1e9:.3g} GB of k-space, {limit}; take part of it with --slices")


def _fastmri(path: Path, slices: tuple[int, int] | None) -> tuple[np.ndarray, dict[str, Any], tuple[int, int]]:
    """``/kspace`` ``(slices, [coils,] readout, phase)``, centred and orthonormal, and the header of ISMRMRD.

    Source: J. Zbontar et al., fastMRI, arXiv:1811.08839.
    """
    with opened(path) as file:
        stored, text = own(file, "kspace"), own(file, "ismrmrd_header")
        if stored.dtype.kind != "c" or stored.shape is None or stored.ndim not in (3, 4):
            raise InputError(f"/kspace is {stored.dtype} {stored.shape}, not complex (slices, [coils,] readout, phase)")
        a, b = slice_range(slices, stored.shape[0])
        check_size(stored, "kspace", (b - a, *stored.shape[1:]))
        header = header_text(text, "ismrmrd_header")
        kspace = stored[a:b].astype(np.complex64)
        count = stored.shape[0]
    kspace = kspace[:, None] if kspace.ndim == 3 else kspace
    encoding = read_header(header)
    field = encoding.encoded_mm
    options = {"oversampling": encoding.oversampling, "slice_mm": field[2] / encoding.matrix[2]}
    return kspace, options | {"pixel_mm": (field[0] / kspace.shape[2], field[1] / kspace.shape[3])}, (a, count)


def _bart(path: Path, slices: tuple[int, int] | None) -> tuple[np.ndarray, dict[str, Any], tuple[int, int]]:
    """``NAME.hdr`` with up to 16 dimensions, ``NAME.cfl`` with complex64, first dimension fastest; 1 mm pixels.

    Source: BART (M. Uecker et al.), src/misc/io.c and mri.h.
    """
    header = path.with_suffix(".hdr")
    if not path.is_file() or not header.is_file():
        raise InputError("needs both NAME.cfl and NAME.hdr beside each other; check the path")
    with open(header, "rb") as file:
        lines = file.read(_MAX_TEXT).decode("latin-1").splitlines()
    after = [line for before, line in pairwise(lines) if before.strip() == "# Dimensions"]
    dims = [int(word) for word in after[0].split()] if after else []
    if not dims or min(dims) < 1 or len(dims) > _BART_AXES:
        raise InputError(f"its header has dimensions {dims}; {AGAIN}")
    dims += [1] * (_BART_AXES - len(dims))
    if path.stat().st_size != 8 * math.prod(dims):
        raise InputError(f"has {path.stat().st_size} bytes, its header says {8 * math.prod(dims)}; {AGAIN}")
    extra = [n for n, size in enumerate(dims) if size > 1 and n not in (0, 1, _COIL, _SLICE)]
    if extra:
        raise InputError(f"has {dims[extra[0]]} entries along dimension {extra[0]}; give 2D k-space, coils and slices")
    a, b = slice_range(slices, dims[_SLICE])
    _check_bytes((b - a, *dims[:4]), 8)
    each = math.prod(dims[:4])
    flat = np.fromfile(path, "<c8", count=(b - a) * each, offset=8 * a * each)
    kspace = flat.reshape(dims[0], dims[1], dims[_COIL], b - a, order="F").transpose(3, 2, 0, 1)
    return kspace, {}, (a, dims[_SLICE])
