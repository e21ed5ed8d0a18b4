"""The manifest: what was run, on what, with which result. Holds no names of patients."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from invdiff import __version__
from invdiff.files import atomic_write, label, sha256_file, show

SCHEMA_VERSION = 1
DISCLAIMER = "research use only, not for diagnosis"
_PACKAGES = ("torch", "numpy", "scipy", "deepinv", "astra-toolbox", "nibabel", "h5py", "matplotlib")


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str | None]:
    """Version of invdiff and of installed distributions by name, None where absent; imports none of them."""
    found: dict[str, str | None] = {"invdiff": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_platform() -> dict[str, Any]:
    """Python, operating system, processor architecture and number of usable cores; no host or user name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}"
    return {"python": platform.python_version(), "system": system, "machine": platform.machine(), "cores": cores}


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MB (1e6 bytes); device memory is not included; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """File name (without folders, which may name people), size and SHA-256; a folder of images as a whole."""
    files = [file for file in Path(path).iterdir() if file.is_file()] if Path(path).is_dir() else [Path(path)]
    return {"name": label(path), "bytes": sum(f.stat().st_size for f in files), "sha256": sha256_file(path)}


def describe_volume(volume) -> dict[str, Any]:
    """Geometry of a ``Volume``: shape, voxel size, affine, units and modality; no header text."""
    return {
        "shape": list(volume.data.shape),
        "voxel_mm": [float(size) for size in volume.voxel_mm],
        "affine": volume.affine.tolist(),
        "units": volume.units,
        "modality": volume.modality,
    }


class Timings:
    """Seconds spent in named phases; a phase entered twice adds up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under ``name``, also when it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def manifest(
    options: Mapping[str, Any],
    *,
    inputs: Mapping[str, str | os.PathLike] | None = None,
    device: str = "cpu",
    timings: Mapping[str, float] | None = None,
    warnings: tuple[str, ...] | list[str] = (),
    **sections: Any,
) -> dict[str, Any]:
    """The record of one run.

    Args:
        options: every option as resolved, defaults included.
        inputs: role (``"input"``, ``"reference"``, ``"prior"``) to file; each is hashed.
        device: where it ran, e.g. ``"cuda:0 NVIDIA H100"``.
        timings: seconds by phase.
        warnings: remarks and overrides, one line each.
        sections: further parts by name: ``geometry``, ``intensity``, ``metrics``, ``output``, ...
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": DISCLAIMER,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": package_versions(),
        "platform": {**describe_platform(), "device": device},
        "options": dict(options),
        "inputs": {role: describe_file(path) for role, path in (inputs or {}).items()},
        "timings_s": {name: round(seconds, 3) for name, seconds in (timings or {}).items()},
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "warnings": list(warnings),
        **sections,
    }


def plain(value: Any) -> Any:
    """``value`` in types that strict JSON holds: NaN and infinities become ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    return show(value) if isinstance(value, os.PathLike) else str(value)


def write_json(path: str | os.PathLike, content: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write strict JSON (ASCII, no NaN literals), atomically.

    Raises:
        UsageError: the file exists and ``overwrite`` is false.
        ResourceError: the file could not be written.
    """
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=True)
    with atomic_write(path, overwrite) as part:
        part.write_text(text + "\n", encoding="ascii")
