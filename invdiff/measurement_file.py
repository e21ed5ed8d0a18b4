"""The measurement file: HDF5 with ``/y``, ``/operator``, ``/volume``, ``/noise``, ``/weights`` if known, and arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import atomic_write, sha256_file, show
from invdiff.hdf5 import DAMAGE, MAX_BYTES, check_size, opened, own
from invdiff.measurement import ARRAYS, FORMAT_VERSION, Measurement

FORMAT = "invdiff-measurement"
MAX_JSON_BYTES = 2**24
_REQUIRED = ("y", "operator", "volume", "noise")


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
            for name, values in {"y": measurement.y, "weights": measurement.weights, **measurement.arrays}.items():
                if values is not None:
                    data = _stored(name, values)
                    file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]), fletcher32=True)
        return sha256_file(part)


def _stored(name: str, values: np.ndarray) -> np.ndarray:
    """As the file holds it: masks as bytes, complex numbers as a last axis of real and imaginary part."""
    if ARRAYS.get(name) == "c":
        return np.stack([values.real, values.imag], -1).astype(np.float32)
    return values.astype(np.uint8) if ARRAYS.get(name) == "b" else values


def _write_text(file, name: str, text: bytes) -> None:
    """One fixed-length text; small ones inside the checksummed metadata (which create_dataset cannot do)."""
    from h5py import h5d, h5p, h5s, h5t

    value, layout = np.array(np.bytes_(text)), h5p.create(h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)  # the same measurement gives the same bytes
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
    if path.is_file() and not h5py.is_hdf5(path):
        raise InputError(f"{show(path)}: is not HDF5; give a measurement file, or pass an image volume with --simulate")
    with opened(path) as file:
        version = _check_layout(file)
        parts = {key: _read_json(file[key], key) for key in ("operator", "volume", "noise")}
        arrays = {key: _read_array(file[key], key, max_bytes) for key in ("y", "weights", *ARRAYS) if key in file}
        y, weights = arrays.pop("y"), arrays.pop("weights", None)
        return Measurement(y, weights=weights, format_version=version, arrays=arrays, **parts)


def operator_name(path) -> str | None:
    """The operator that a measurement file names; None where the file cannot say (loading it says why)."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            name = _read_json(file["operator"], "operator").get("name") if _check_layout(file) else None
    except (InputError, *DAMAGE):
        return None
    return name if isinstance(name, str) else None


def _text(value) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _check_layout(file) -> int:
    """Only plain datasets at the top, all that are needed; returns the format version."""
    if _text(file.attrs.get("format")) != FORMAT:
        raise InputError("is HDF5 but no invdiff measurement; write it with `invdiff simulate` or save_measurement")
    version = file.attrs.get("format_version")
    if not isinstance(version, int | np.integer) or version != FORMAT_VERSION:
        raise InputError(f"has format version {repr(version)[:20]}, this is for {FORMAT_VERSION}; update invdiff")
    for key in file.keys():  # noqa: SIM118
        own(file, key)
    if missing := [key for key in _REQUIRED if key not in file]:
        raise InputError(f"has no /{', /'.join(missing)}; write it with `invdiff simulate` or save_measurement")
    return int(version)


def _read_array(dataset, name: str, max_bytes: int) -> np.ndarray:
    if dataset.dtype.kind not in "fiu" or dataset.shape is None:
        raise InputError(f"/{name} has dtype {dataset.dtype}, not float32; convert it (complex: real, imaginary)")
    check_size(dataset, name, max_bytes=max_bytes)
    if ARRAYS.get(name) != "c":
        return dataset[()]
    if dataset.ndim < 2 or dataset.shape[-1] != 2:
        raise InputError(f"/{name} has shape {dataset.shape}; a last axis of 2 holds real and imaginary part")
    pair = np.asarray(dataset[()], np.float32)
    return np.ascontiguousarray(pair).view(np.complex64)[..., 0]


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
