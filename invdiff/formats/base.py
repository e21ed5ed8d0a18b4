"""What every format gives and takes: numbers, a place in the patient, and what the file says about them."""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from invdiff.errors import InputError, UsageError
from invdiff.files import show

LABEL = "invdiff, research use only, not for diagnosis"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS+ mm to and from the LPS+ mm of DICOM, NRRD and MetaImage
ACCEPT = {
    "gaps": "fill missing or uneven slices by linear interpolation",
    "duplicates": "keep the first of several slices at one position",
    "mixed": "keep the largest group of slices of one size and orientation",
}


@dataclass(frozen=True)
class Wanted:
    """What to take from a file.

    Attributes:
        index: which 3D volume of a 4D file, from 0; None for the only one.
        max_voxels: refuse more, before anything is allocated.
        series: which DICOM series (its number in the list, or the start of its UID), or array of an ``.npz``.
        accept: names from ``ACCEPT``: irregularities of a series that are repaired instead of refused.
    """

    index: int | None = None
    max_voxels: int = 2**30
    series: str | None = None
    accept: tuple[str, ...] = ()

    def __post_init__(self):
        if wrong := [name for name in self.accept if name not in ACCEPT]:
            raise UsageError(f"unknown choice '{wrong[0]}' for --accept: choose from {', '.join(ACCEPT)}")


@dataclass(frozen=True, eq=False)
class Image:
    """One 3D image, as a reader gives it and a writer takes it.

    Attributes:
        data: ``(i, j, k)``, real; slope and intercept of the file are applied. Finite, for a writer.
        affine: float64 ``(4, 4)``, voxel index to RAS+ mm, of whatever quality the file has.
        modality: ``"CT"``, ``"MR"`` or ``"image"``; None where the file does not say.
        header: what a writer of the same format takes over: geometry and references, no free text.
        notes: remarks for terminal and manifest.
    """

    data: np.ndarray = field(repr=False)
    affine: np.ndarray
    modality: str | None = None
    header: Any = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


def library(name: str, extra: str, what: str) -> ModuleType:
    """The module ``name``, which ``pip install invdiff[extra]`` brings.

    Raises:
        UsageError: it is missing or cannot be loaded.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing or damaged
        reason = "is not installed"
        if not isinstance(error, ModuleNotFoundError):
            reason = f"cannot be loaded ({str(error).partition(chr(10))[0][:80]})"
        raise UsageError(f"{what} needs {name}, which {reason}: pip install 'invdiff[{extra}]'") from None


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, by name, without hidden ones.

    Raises:
        InputError: it cannot be read, or a link in it leads nowhere.
    """
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        if lost := [p for p in entries if p.is_symlink() and not p.exists()]:
            raise InputError(f"{show(folder)}: {show(lost[0].name)} is a link to nowhere; restore or remove it")
        return [p for p in entries if p.is_file()]
    except OSError as error:
        raise InputError(f"{show(folder)}: cannot be read ({error.strerror}); check its permissions") from None


def check_count(name: str, voxels: int, max_voxels: int) -> None:
    """Refuse more voxels than the limit."""
    if voxels > max_voxels:
        raise InputError(f"{name}: declares {voxels:.3g} voxels, more than the limit {max_voxels:.3g}; crop it first")


def pick_volume(name: str, volumes: int, shape: tuple[int, ...], index: int | None) -> int:
    """Which of ``volumes`` is meant; a file with several needs an answer."""
    if index is None and volumes > 1:
        remedy = f"save one alone, or choose one with --volume-index 0 ... {volumes - 1}"
        raise InputError(f"{name}: holds {volumes} volumes {shape}; {remedy}")
    if index is not None and not 0 <= index < volumes:
        raise InputError(f"{name}: has no volume {index}; --volume-index can be 0 ... {volumes - 1}")
    return index or 0


def flat_affine(column_mm: float = 1.0, row_mm: float = 1.0, slice_mm: float = 1.0) -> np.ndarray:
    """Where pictures without a place are put: columns to the left, rows to the back, slices upwards, from 0."""
    return np.diag([-column_mm, -row_mm, slice_mm, 1.0])


def to_steps(data: np.ndarray, steps: int) -> tuple[np.ndarray, float, float]:
    """``(stored, slope, intercept)`` with ``data = slope * stored + intercept`` and whole ``stored`` in 0 ... steps.

    Whole numbers keep slope 1 where they fit, and intercept 0 where none is negative; anything else is spread over all
    steps, off by half a step at most.
    """
    low, high = float(data.min()), float(data.max())
    slope = (high - low) / steps or 1.0
    if high - low <= steps and np.array_equal(data, np.rint(data)):
        slope, low = 1.0, 0.0 if low >= 0 and high <= steps else low
    stored = np.empty(data.shape, np.uint16)
    for k in range(data.shape[-1]):  # slice by slice: the double-precision copy stays small
        stored[..., k] = np.clip(np.rint((data[..., k].astype(np.float64) - low) / slope), 0, steps)
    return stored, slope, low
