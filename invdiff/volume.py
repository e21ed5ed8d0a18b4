"""A 3D image with its place in the patient: files in, files out, and slices the way a radiologist sees them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError, NumericalError, ShapeError, UsageError
from invdiff.files import label, show, split_suffix
from invdiff.formats import FORMATS, WRITES, Image, Wanted, is_dicom, read_image, write_image
from invdiff.intensity import fill_nonfinite, guess_modality

MAX_VOXELS = 2**30  # 4 GiB as float32
_PLANES = ("sagittal", "coronal", "axial")  # by the RAS axis that runs through the slices
_DISPLAY = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}  # RAS axes of (slice, row, column)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image on a regular grid.

    Attributes:
        data: float32 ``(i, j, k)`` in ``units``.
        affine: float64 ``(4, 4)``, voxel index to RAS+ mm, invertible.
        units: ``"HU"``, ``"1"``, ...
        modality: ``"CT"``, ``"MR"`` or ``"image"``.
        header: what the format of the source writes back: geometry (NIfTI) or references (DICOM), no free text.
        path: the file or folder it came from.
        notes: remarks for the terminal and the manifest (conflicting orientations, filled voxels, ...).

    Raises:
        ShapeError: ``data`` is not 3D or empty.
        InputError: the affine is not finite or not invertible.
    """

    data: np.ndarray = field(repr=False)
    affine: np.ndarray
    units: str = "1"
    modality: str = "image"
    header: Any = field(default=None, repr=False)
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        data = np.asarray(self.data, dtype=np.float32)
        if data.ndim != 3 or data.size == 0:
            raise ShapeError(f"Volume expects data (i, j, k), got {data.shape}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not (abs(affine) < 1e9).all() or np.any(affine[3] != (0, 0, 0, 1)):
            raise InputError("the affine is not a finite 4x4 matrix that ends in 0 0 0 1; repair the header")
        size = np.linalg.norm(affine[:3, :3], axis=0)
        if not 1e-6 < min(size) <= max(size) < 1e6 or abs(np.linalg.det(affine[:3, :3] / size)) < 1e-6:
            raise InputError(f"the affine cannot be inverted (voxel size {np.round(size, 6)} mm); repair the header")
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "affine", affine)

    @property
    def voxel_mm(self) -> np.ndarray:
        """Voxel size along the array axes, mm, ``(3,)``."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def is_part_of_series(path: Path) -> bool:
    """Whether a file can be one of a folder that is one volume: a picture, or DICOM, by its name or its start.

    Raises:
        InputError, OSError: it cannot be read.
    """
    if path.name.lower().endswith((*FORMATS["pictures"].suffixes, *FORMATS["dicom"].suffixes)):
        return True
    return path.name != "DICOMDIR" and path.is_file() and is_dicom(path)


def load_volume(
    path,
    volume_index: int | None = None,
    nan: str = "refuse",
    max_voxels: int = MAX_VOXELS,
    modality: str | None = None,
    series: str | None = None,
    accept: tuple[str, ...] = (),
) -> Volume:
    """Read a volume of any format of ``invdiff.formats.FORMATS``, checked as far as the format allows.

    Args:
        path: a file, or the folder of a DICOM series or of numbered pictures.
        volume_index: which 3D volume of a 4D file, from 0.
        nan: ``"refuse"``, or ``"fill"`` to replace NaN and infinite voxels by the smallest finite value.
        max_voxels: refuse files that declare more, before anything is allocated.
        modality: ``"CT"``, ``"MR"`` or ``"image"``; None asks the file, and tells CT by its values where it is silent.
        series: which DICOM series of a folder, or array of an ``.npz``.
        accept: irregularities of a series to repair, of ``invdiff.formats.base.ACCEPT``.

    Raises:
        UsageError: an unknown choice, or a package that the format needs is missing.
        InputError: missing, of no known format, damaged, truncated, too long, an unsupported kind of voxel, no usable
            orientation, too large, not finite, or an irregular series.
    """
    if nan not in ("refuse", "fill"):
        raise UsageError(f"unknown choice '{nan}' for --nan: choose one of fill, refuse")
    path = Path(path)
    image = read_image(path, Wanted(volume_index, max_voxels, series, tuple(accept)))
    notes, data = list(image.notes), np.ascontiguousarray(image.data, dtype=np.float32)
    try:
        if bad := int(np.sum(~np.isfinite(data))):
            if nan == "refuse":
                remedy = "repair them, or pass --nan fill (reconstruct, simulate)"
                raise InputError(f"{bad} voxels are NaN or infinite; {remedy}")
            data, note = fill_nonfinite(data)
            notes.insert(0, note)
        modality = modality or image.modality or guess_modality(data)
        notes = [f"{label(path)}: {note}" for note in notes]
        units = "HU" if modality == "CT" else "1"
        return Volume(data, image.affine, units, modality, image.header, path, tuple(notes))
    except InputError as error:
        raise InputError(f"{show(path)}: {error}") from None


def save_volume(volume: Volume, path, overwrite: bool = False) -> str:
    """Write the format that the name of ``path`` asks for, atomically: float32 where the format has it.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        UsageError: a suffix of no format, a missing package, or the file exists and ``overwrite`` is false.
        NumericalError: voxels are NaN or infinite.
        ResourceError: the file could not be written; an old one is left as it was.
    """
    split_suffix(path, WRITES)
    if bad := int(np.sum(~np.isfinite(volume.data))):
        raise NumericalError(f"{show(path)}: not written, {bad} voxels are NaN or infinite; use fewer or smaller steps")
    return write_image(Path(path), Image(volume.data, volume.affine, volume.modality, volume.header), overwrite)


@dataclass(frozen=True, eq=False)
class SliceStack:
    """Slices of a volume in display orientation, the same for every storage order of the same volume.

    Axial and coronal: columns grow towards patient left (radiological); sagittal: towards posterior.
    Rows grow towards posterior (axial) or inferior. Slices grow towards superior, anterior or right.

    Attributes:
        data: float32 ``(S, H, W)``.
        affine: float64 ``(4, 4)``, (slice, row, column) to RAS+ mm.
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``, whichever is nearest.
        axes: array axis of the source along slices, rows, columns.
        flips: which of the three run against the array.
        slices: ``(a, b)``, the range taken along array axis ``axes[0]``.
        source: the volume they were cut from.
    """

    data: np.ndarray = field(repr=False)
    affine: np.ndarray
    plane: str
    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    slices: tuple[int, int]
    source: Volume = field(repr=False)

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance of rows and of columns, mm."""
        _, row, column = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(row), float(column)

    @property
    def _normal(self) -> np.ndarray:
        step, row, column = self.affine[:3, :3].T
        normal = np.cross(row, column)
        return normal / np.linalg.norm(normal) * np.sign(normal @ step)

    @property
    def spacing_mm(self) -> float:
        """Distance between neighbouring slices along their normal, mm."""
        return float(self._normal @ self.affine[:3, 0])

    @property
    def slice_positions(self) -> np.ndarray:
        """Position of each slice along the normal, mm, increasing, ``(S,)``."""
        return self._normal @ self.affine[:3, 3] + self.spacing_mm * np.arange(len(self.data))


def _nearest_axes(affine: np.ndarray) -> tuple[list[int], list[bool]]:
    """For right, anterior, superior: the array axis nearest to it, and whether it points the same way.

    All six assignments are compared: nibabel's greedy choice depends on the storage order of oblique volumes.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(permutations(range(3)), key=lambda order: sum(abs(cosines[ras, axis]) for ras, axis in enumerate(order)))
    return list(best), [bool(cosines[ras, axis] > 0) for ras, axis in enumerate(best)]


def _flip(array: np.ndarray, flips: Sequence[bool]) -> np.ndarray:
    array = np.asarray(array)
    back = [flip and size > 1 for flip, size in zip(flips, array.shape, strict=True)]  # size 1 would keep its stride
    return array[tuple(slice(None, None, -1 if turned else 1) for turned in back)]


def in_order_of(volume: Volume, like: Volume) -> Volume:
    """``volume`` in the storage order that comes nearest to that of ``like``: the same voxels at the same places."""
    (mine, ahead), (theirs, like_ahead) = _nearest_axes(volume.affine), _nearest_axes(like.affine)
    axes = [mine[theirs.index(axis)] for axis in range(3)]
    flips = [ahead[mine.index(axis)] != like_ahead[theirs.index(n)] for n, axis in enumerate(axes)]
    last = np.where(flips, np.array(volume.data.shape)[axes] - 1, 0)
    affine = volume.affine[:, [*axes, 3]]
    affine[:3, 3] += affine[:3, :3] @ last
    affine[:3, :3] *= np.where(flips, -1, 1)
    return replace(
        volume, data=np.ascontiguousarray(_flip(volume.data.transpose(axes), flips)), affine=affine, header=None
    )


def _auto_plane(volume: Volume, nearest: list[int]) -> int:
    """RAS axis through the slices: superior for CT, else the largest voxel size, superior within 20 %."""
    right, anterior, superior = volume.voxel_mm[nearest].round(4)
    if volume.modality == "CT" or 1.2 * superior >= max(right, anterior):
        return 2
    return 1 if anterior >= right else 0


def to_slices(
    volume: Volume, axis: str | int = "auto", slices: tuple[int, int] | None = None, allow_shear: bool = False
) -> SliceStack:
    """Cut ``volume`` into slices along an array axis.

    Args:
        axis: 0, 1, 2 (array axis of ``volume.data``) or ``"auto"``: nearest to superior-inferior for CT, else the
            largest voxel size, ties within 20 % to superior-inferior.
        slices: ``(a, b)``, ``a <= index < b`` along that array axis; None takes all.
        allow_shear: accept array axes that are not orthogonal.

    Raises:
        UsageError: unknown axis.
        InputError: a range outside the volume, or a sheared affine.
    """
    nearest, along = _nearest_axes(volume.affine)
    cosines = volume.affine[:3, :3] / volume.voxel_mm
    skew = abs(cosines.T @ cosines - np.eye(3)).max()
    if not allow_shear and skew > 1e-3:
        said = f"off by {np.degrees(np.arcsin(min(skew, 1))):.3g} degrees, gantry tilt?"
        raise InputError(f"the array axes are not orthogonal ({said}); resample first, or pass --allow-shear")
    if str(axis) not in ("auto", "0", "1", "2"):
        raise UsageError(f"unknown slice axis '{axis}': choose one of auto, 0, 1, 2")
    through = _auto_plane(volume, nearest) if axis == "auto" else nearest.index(int(axis))
    axes = [nearest[ras] for ras in _DISPLAY[through]]
    flips = [not along[through], *(along[ras] for ras in _DISPLAY[through][1:])]
    count = volume.data.shape[axes[0]]
    a, b = slices or (0, count)
    if not 0 <= a < b <= count:
        raise InputError(f"slices {a}:{b}: array axis {axes[0]} has {count}; give A:B with 0 <= A < B <= {count}")
    cut = volume.data.transpose(axes)[a:b]
    data = _flip(cut, flips)
    first, last = np.array([a, 0, 0]), np.array([a, 0, 0]) + cut.shape - 1
    affine = np.eye(4)
    affine[:3, :3] = volume.affine[:3, axes] * np.where(flips, -1, 1)
    affine[:3, 3] = volume.affine[:3, axes] @ np.where(flips, last, first) + volume.affine[:3, 3]
    return SliceStack(np.ascontiguousarray(data), affine, _PLANES[through], tuple(axes), tuple(flips), (a, b), volume)


def from_slices(stack_array: np.ndarray, reference: SliceStack) -> Volume:
    """The volume in the storage order of ``reference.source``, lying where its slices were cut.

    Raises:
        ShapeError: ``stack_array`` is not shaped like ``reference.data``.
    """
    if np.shape(stack_array) != reference.data.shape:
        raise ShapeError(f"from_slices expects (S, H, W) = {reference.data.shape}, got {np.shape(stack_array)}")
    data = _flip(stack_array, reference.flips).transpose(np.argsort(reference.axes))
    affine = reference.source.affine.copy()
    affine[:3, 3] += reference.slices[0] * affine[:3, reference.axes[0]]
    return replace(reference.source, data=np.ascontiguousarray(data), affine=affine)
