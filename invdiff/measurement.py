"""The measurement file: HDF5 with ``/y``, ``/operator``, ``/volume``, ``/noise`` and, if known, ``/weights``."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, atomic_write, sha256_file, show

FORMAT = "invdiff-measurement"
FORMAT_VERSION = 1
MAX_BYTES = 2**33
MAX_JSON_BYTES = 2**24
_REQUIRED = ("y", "operator", "volume", "noise")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a scanner, or a simulation of one, delivered.

    Attributes:
        y: float32 ``(slices, channels, views, detectors)``; CT has one channel of line integrals (dimensionless). A
            cone beam has detector rows in the place of slices, growing as slices are shown (axial: to superior).
        operator: ``name`` and every parameter, units in the key names (``views_deg``, ``detector_pitch_mm``).
        volume: the grid to reconstruct on: ``shape`` (i, j, k), ``affine`` 4x4 to RAS+ mm, ``units``, ``modality``;
            optionally ``slice_axis``, the array axis along which y has its slices.
        noise: ``model`` and its level (``photons``, ``std``, ...).
        weights: inverse variance of every element of y, same shape, or None.
        format_version: of the file.

    Raises:
        InputError: parts missing, y not float or not finite, numbers of angles and projections that differ,
            angles in radians, counts instead of line integrals.
    """

    y: np.ndarray = field(repr=False)
    operator: dict[str, Any]
    volume: dict[str, Any]
    noise: dict[str, Any]
    weights: np.ndarray | None = field(default=None, repr=False)
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if not isinstance(self.operator.get("name"), str):
            raise InputError("/operator has no 'name'; name the operator, e.g. ct-sparse")
        if self.is_ct:
            _check_line_integrals(np.asarray(self.y))
        object.__setattr__(self, "y", _float32(self.y, "y"))
        _check_grid(self.volume, self.y.shape, self.is_cone or self.operator.get("axis") == "through-plane")
        if self.is_ct:
            _check_views(self.operator, self.y.shape)
        if not isinstance(self.noise.get("model"), str):
            raise InputError("/noise has no 'model'; name it, e.g. gaussian, poisson or none")
        _check_numbers("operator", self.operator)
        _check_numbers("noise", self.noise)
        if self.weights is not None:
            weights = _float32(self.weights, "weights")
            if weights.shape != self.y.shape or weights.min() < 0 or weights.max() == 0:
                raise InputError(f"/weights must be >= 0, not all 0, and shaped like y {self.y.shape}; recompute them")
            object.__setattr__(self, "weights", weights)

    @property
    def is_ct(self) -> bool:
        """Whether the operator is one of the ``ct-*`` family."""
        return self.operator["name"].split("-")[0] == "ct"

    @property
    def is_cone(self) -> bool:
        """Whether y has detector rows in the place of slices."""
        return self.is_ct and self.operator.get("geometry") == "cone"


def _float32(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind != "f":
        raise InputError(f"/{name} has dtype {values.dtype}, not float32; convert it (complex: stack real, imaginary)")
    if values.ndim != 4 or not values.size:
        raise InputError(f"/{name} must be (slices, channels, views, detectors), got {values.shape}; reshape it")
    values = values.astype(np.float32, copy=False)
    if bad := int(np.sum(~np.isfinite(values))):
        raise InputError(f"/{name} holds {bad} NaN or infinite values; repair them, or give them weight 0 and value 0")
    return values


def _check_line_integrals(y: np.ndarray) -> None:
    if y.size and (y.dtype.kind in "iu" or (y.dtype.kind == "f" and np.nanmin(y) > 50)):
        raise InputError("/y looks like photon counts, not line integrals; store -log(counts / counts without object)")


def _check_grid(volume: dict[str, Any], y_shape: tuple[int, ...], thick: bool = False) -> None:
    if missing := [key for key in ("shape", "affine", "units", "modality") if key not in volume]:
        raise InputError(f"/volume has no {', '.join(missing)}; describe the grid to reconstruct on")
    shape = volume["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"/volume shape is {str(shape)[:40]}; give three positive integers")
    try:
        affine = np.asarray(volume["affine"], dtype=np.float64)
    except (TypeError, ValueError):
        affine = np.empty(0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise InputError("/volume affine is not an invertible 4x4 matrix; give voxel index to RAS+ mm")
    axis = volume.get("slice_axis")
    if axis is not None and (type(axis) is not int or not 0 <= axis <= 2):
        raise InputError(f"/volume slice_axis is {str(axis)[:40]}; give 0, 1 or 2")
    if not thick and y_shape[0] not in (shape if axis is None else [shape[axis]]):
        raise InputError(f"y has {y_shape[0]} slices, the volume is {tuple(shape)}; give the grid of just those slices")


def _check_views(operator: dict[str, Any], y_shape: tuple[int, ...]) -> None:
    if y_shape[1] != 1:
        raise InputError(f"CT has one channel, /y is {y_shape}; reshape it to (slices, 1, views, detectors)")
    if "angles_rad" in operator:
        raise InputError("/operator gives angles_rad; convert to degrees and store views_deg")
    if "views_deg" in operator:
        try:
            angles = np.asarray(operator["views_deg"], dtype=np.float64).ravel()
        except (TypeError, ValueError):
            raise InputError("/operator views_deg is not a list of numbers; repair it") from None
        if len(angles) != y_shape[2]:
            raise InputError(f"{len(angles)} angles but {y_shape[2]} projections; make /operator and /y agree")
        if len(angles) >= 16 and _like_radians(angles):
            raise InputError(f"views_deg end at {angles.max():.4g}, like radians; convert them to degrees")
    count = operator.get("detector_count", y_shape[3])
    rows = operator.get("detector_rows", y_shape[0])
    if rows != y_shape[0]:
        raise InputError(f"{str(rows)[:40]} detector rows but {y_shape[0]} in /y; make /operator and /y agree")
    if count != y_shape[3]:
        raise InputError(f"{str(count)[:40]} detector bins but {y_shape[3]} columns; make /operator and /y agree")


def _like_radians(angles: np.ndarray) -> bool:
    """Whether the views cover pi or 2 pi, with or without a last view at the end."""
    span = float(np.ptp(angles))
    covered = (span, span * len(angles) / (len(angles) - 1))
    return any(abs(c - turn) < 0.02 * turn for c in covered for turn in (math.pi, 2 * math.pi))


_POSITIVE = ("mu_water_per_mm", "photons", "std")
_NOT_NEGATIVE = ("model_error", "electronic_counts")


def _check_numbers(part: str, parameters: dict[str, Any]) -> None:
    """The numbers that turn y into a whitened problem."""
    for key in set(parameters) & {*_POSITIVE, *_NOT_NEGATIVE}:
        value = parameters[key]
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key in _POSITIVE):
            what = "positive" if key in _POSITIVE else "0 or larger"
            raise InputError(f"/{part} {key} is {str(value)[:40]}; give a finite number, {what}")


def save_measurement(path, measurement: Measurement, overwrite: bool = False) -> str:
    """Write the file atomically, arrays with checksums; returns its SHA-256, hexadecimal.

    Raises:
        UsageError: the file exists and ``overwrite`` is false.
        InputError: a parameter that JSON cannot hold (NaN, objects).
        ResourceError: the file could not be written.
    """
    import h5py

    texts = {name: _to_json(getattr(measurement, name), name) for name in ("operator", "volume", "noise")}
    with atomic_write(path, overwrite) as part:
        # Checksums on everything: format 1.10 metadata, texts of fixed length inside it, chunks with fletcher32.
        # Elsewhere (older formats, variable-length texts) a flipped bit can crash or hang the HDF5 library itself.
        with h5py.File(part, "w", libver=("v110", "v110")) as file:
            file.attrs["format"], file.attrs["format_version"] = np.bytes_(FORMAT), measurement.format_version
            for name, text in texts.items():
                _write_text(file, name, text)
            for name in ("y", "weights"):
                if (values := getattr(measurement, name)) is not None:
                    file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), fletcher32=True)
        return sha256_file(part)


def _write_text(file, name: str, text: bytes) -> None:
    """One fixed-length text; small ones inside the checksummed metadata (which create_dataset cannot do)."""
    from h5py import h5d, h5p, h5s, h5t

    value, layout = np.array(np.bytes_(text)), h5p.create(h5p.DATASET_CREATE)
    if len(text) < 60_000:
        layout.set_layout(h5d.COMPACT)
    kind, scalar = h5t.py_create(value.dtype, logical=True), h5s.create(h5s.SCALAR)
    h5d.create(file.id, name.encode(), kind, scalar, layout).write(h5s.ALL, h5s.ALL, value)


def _to_json(part: dict[str, Any], name: str) -> bytes:
    def plain(value):
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is not a number, text or list")

    try:
        return json.dumps(part, allow_nan=False, default=plain).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"/{name} cannot be stored: {error}; use finite numbers, texts and lists") from None


def load_measurement(path, max_bytes: int = MAX_BYTES) -> Measurement:
    """Read and check a measurement file.

    Args:
        path: HDF5 file.
        max_bytes: refuse files that declare larger arrays, before anything is allocated.

    Raises:
        InputError: missing, not HDF5, truncated, damaged, links, another format version, datasets missing or too
            large, or anything :class:`Measurement` refuses.
    """
    import h5py

    path = Path(path)
    name = show(path)
    if not path.is_file():
        raise InputError(f"{name}: {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        if not h5py.is_hdf5(path):
            raise InputError("is not HDF5; give a measurement file, or pass an image volume with --simulate")
        with h5py.File(path, "r") as file:
            version = _check_layout(file)
            parts = {key: _read_json(file[key], key) for key in ("operator", "volume", "noise")}
            arrays = {key: _read_array(file[key], key, max_bytes) for key in ("y", "weights") if key in file}
        return Measurement(y=arrays["y"], weights=arrays.get("weights"), format_version=version, **parts)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for damage of any kind
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{name}: is damaged or truncated ({why}); {AGAIN}") from None


def operator_name(path) -> str | None:
    """The operator that a measurement file names; None where the file cannot say (loading it says why)."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            name = _read_json(file["operator"], "operator").get("name") if _check_layout(file) else None
    except (InputError, OSError, RuntimeError, KeyError):
        return None
    return name if isinstance(name, str) else None


def _text(value) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _check_layout(file) -> int:
    """Only plain datasets at the top, all that are needed; returns the format version."""
    import h5py

    if _text(file.attrs.get("format")) != FORMAT:
        raise InputError("is HDF5 but no invdiff measurement; write it with `invdiff simulate` or save_measurement")
    version = file.attrs.get("format_version")
    if not isinstance(version, int | np.integer) or version != FORMAT_VERSION:
        raise InputError(f"has format version {repr(version)[:20]}, this is for {FORMAT_VERSION}; update invdiff")
    for key in file:
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise InputError(f"/{key[:40]} is a link to elsewhere, which is not followed; store the data itself")
        if file.get(key, getclass=True) is not h5py.Dataset:
            raise InputError(f"/{key[:40]} is not a dataset; keep the file flat")
        if file[key].external or file[key].is_virtual:
            raise InputError(f"/{key[:40]} has its data in another file, which is not read; store the data itself")
    if missing := [key for key in _REQUIRED if key not in file]:
        raise InputError(f"has no /{', /'.join(missing)}; write it with `invdiff simulate` or save_measurement")
    return int(version)


def _read_array(dataset, name: str, max_bytes: int) -> np.ndarray:
    if dataset.dtype.kind not in "fiu" or dataset.shape is None:
        raise InputError(f"/{name} has dtype {dataset.dtype}, not float32; convert it (complex: real, imaginary)")
    size = math.prod(dataset.shape) * max(dataset.dtype.itemsize, 4)
    if size > max_bytes:
        raise InputError(f"/{name} declares {size / 1e9:.3g} GB, the limit is {max_bytes / 1e9:.3g}; split the file")
    if dataset.chunks is None:
        written = dataset.id.get_storage_size() >= math.prod(dataset.shape) * dataset.dtype.itemsize
    else:
        pieces = [math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
        written = dataset.id.get_num_chunks() == math.prod(pieces)
    if not written:
        raise InputError(f"/{name} is incomplete (declared but never written); {AGAIN}")
    return dataset[()]


def _read_json(dataset, name: str) -> dict[str, Any]:
    import h5py

    info = h5py.check_string_dtype(dataset.dtype)
    if info is None or dataset.shape != ():
        raise InputError(f"/{name} is not one JSON text; write it with save_measurement")
    stored = dataset.dtype.itemsize if info.length is not None else dataset.file.id.get_filesize()
    if stored > MAX_JSON_BYTES and (info.length is not None or len(dataset[()]) > MAX_JSON_BYTES):
        raise InputError(f"/{name} is larger than {MAX_JSON_BYTES >> 20} MiB; store parameters only")

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(dataset[()], parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"/{name} is not JSON ({str(error)[:80]}); write it with save_measurement") from None
    if not isinstance(value, dict):
        raise InputError(f"/{name} is JSON but not an object; write it with save_measurement")
    return value
