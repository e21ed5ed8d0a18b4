"""A 3D image with its place in the patient: NIfTI in, NIfTI out, and slices the way a radiologist sees them."""

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError, NumericalError, ShapeError, UsageError
from invdiff.files import AGAIN, Stream, atomic_write, open_stream, sha256_file, show, split_suffix
from invdiff.intensity import fill_nonfinite, guess_modality, rescale

MAX_VOXELS = 2**30  # 4 GiB as float32
_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # spatial part of xyzt_units: unknown, m, mm, um
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
        header: nibabel header that holds nothing but the geometry of the source (sform, qform, their codes).
        path: the file it came from.
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


def load_volume(
    path,
    volume_index: int | None = None,
    nan: str = "refuse",
    max_voxels: int = MAX_VOXELS,
    modality: str | None = None,
) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file (``.nii``, ``.nii.gz``) to its last byte, checksum included.

    Args:
        path: the file; what counts is its content, not its name.
        volume_index: which 3D volume of a 4D file, from 0.
        nan: ``"refuse"``, or ``"fill"`` to replace NaN and infinite voxels by the smallest finite value.
        max_voxels: refuse files that declare more, before anything is allocated.
        modality: ``"CT"``, ``"MR"`` or ``"image"``; None tells CT from the rest by its values.

    Raises:
        InputError: missing, not NIfTI, damaged, truncated, too long, an unsupported kind of voxel, no usable
            orientation, too large, or not finite.
    """
    if nan not in ("refuse", "fill"):
        raise UsageError(f"unknown choice '{nan}' for --nan: choose one of fill, refuse")
    path = Path(path)
    name, notes = show(path), []
    with open_stream(path) as stream:
        header = _read_header(stream)
        stored = _read_voxels(stream, header, volume_index, max_voxels)
    try:
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
        data = rescale(stored, slope, intercept)
        if slope < 0:
            notes.append(f"{name}: the rescale slope is negative ({slope:g}); applied")
        if bad := int(np.sum(~np.isfinite(data))):
            if nan == "refuse":
                raise InputError(f"{bad} voxels are NaN or infinite; repair them, or pass --nan fill")
            data, note = fill_nonfinite(data)
            notes.append(f"{name}: {note}")
        geometry, affine, remarks = _geometry(header, stored.shape)
        notes += [f"{name}: {remark}" for remark in remarks]
        modality = modality or guess_modality(data)
        return Volume(data, affine, "HU" if modality == "CT" else "1", modality, geometry, path, tuple(notes))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _read_header(stream: Stream):
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    start = stream.take(4)
    for kind in (Nifti1Header, Nifti2Header):
        for endian in "<>":
            if start != np.array(kind.sizeof_hdr, endian + "i4").tobytes():
                continue
            header = kind(start + stream.take(kind.sizeof_hdr - 4), endianness=endian, check=False)
            if header["magic"].item() == kind.pair_magic:
                raise InputError(f"{stream.name}: is half of a .hdr/.img pair; convert it to a single .nii file")
            if header["magic"].item() in (kind.single_magic, kind.single_magic[:3]):
                return header
    raise InputError(f"{stream.name}: is not NIfTI; convert it first, DICOM with dcm2niix")


def _shape(header, name: str) -> tuple[int, ...]:
    """The declared shape, 3 or 4 dimensions, in Python integers."""
    rank, *sizes = (int(n) for n in header["dim"])
    shape = [*sizes[: max(rank, 0)], 1, 1][: max(rank, 3)]
    if not 1 <= rank <= 7 or min(shape) < 1:
        raise InputError(f"{name}: is damaged (the header says {rank} dimensions {tuple(shape)}); {AGAIN}")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 4:
        raise InputError(f"{name}: has shape {tuple(shape)}, not one or several 3D volumes; extract one volume first")
    return tuple(shape)


def _dtype(header, name: str) -> np.dtype:
    from nibabel.spatialimages import HeaderDataError

    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        raise InputError(f"{name}: has unknown voxel type {header['datatype']}; convert it to float32 first") from None
    if dtype.kind == "c":
        raise InputError(f"{name}: has complex voxels; save the magnitude, or give the k-space file instead")
    if dtype.kind not in "iuf":
        raise InputError(f"{name}: has RGB or bit voxels; convert it to one grey value per voxel first")
    return dtype


def _read_voxels(stream: Stream, header, index: int | None, max_voxels: int) -> np.ndarray:
    """One 3D volume as stored; all the rest of the file is read as well, so that damage shows."""
    name, dtype = stream.name, _dtype(header, stream.name)
    shape = _shape(header, name)
    voxels, volumes = math.prod(shape[:3]), math.prod(shape[3:])
    size, offset = voxels * dtype.itemsize, float(header["vox_offset"])
    if not header.sizeof_hdr + 4 <= offset < 2**31 or offset % 1:
        raise InputError(f"{name}: is damaged (voxels at byte {offset:g}); {AGAIN}")
    if offset + size * volumes > stream.most_bytes:
        raise InputError(f"{name}: is truncated (too small for shape {shape}); {AGAIN}")
    if voxels > max_voxels:
        raise InputError(f"{name}: declares {voxels:.3g} voxels, more than the limit {max_voxels:.3g}; crop it first")
    if index is None and volumes > 1:
        raise InputError(f"{name}: holds {volumes} volumes {shape}; choose one with --volume-index 0 ... {volumes - 1}")
    if index is not None and not 0 <= index < volumes:
        raise InputError(f"{name}: has no volume {index}; --volume-index can be 0 ... {volumes - 1}")
    stream.skip(int(offset) - header.sizeof_hdr + (index or 0) * size)
    stored = np.empty(size, np.uint8)
    stream.into(stored.data)
    stream.skip((volumes - 1 - (index or 0)) * size)
    stream.finish()
    return stored.view(dtype).reshape(shape[:3], order="F")


_GEOMETRY = ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
             "qoffset_z", "srow_x", "srow_y", "srow_z")  # fmt: skip


def _geometry(header, shape: tuple[int, ...]) -> tuple[Any, np.ndarray, list[str]]:
    """A fresh header with the geometry alone, in mm (None if the file has none); the affine; what is odd about it."""
    from nibabel.spatialimages import HeaderDataError

    fresh, remarks = type(header)(endianness="<"), []
    for name in _GEOMETRY:
        fresh[name] = header[name]
    pixdim, scale = fresh["pixdim"], np.diag([_TO_MM.get(int(header["xyzt_units"]) & 7, 1.0)] * 3 + [1])
    if not all(0 <= int(header[code]) <= 5 for code in ("sform_code", "qform_code")):
        raise InputError(f"is damaged (unknown sform or qform code); {AGAIN}")
    if (pixdim[1:4] < 0).any():
        remarks.append("voxel sizes are negative; the sign is ignored")
    pixdim[:] = (pixdim[0] if pixdim[0] in (-1, 1) else 1, *abs(pixdim[1:4]), 1, 1, 1, 1)[: len(pixdim)]
    fresh.set_xyzt_units("mm")
    sform = fresh.get_sform(coded=True)[0]
    try:
        qform = fresh.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError):
        if sform is None:
            raise InputError("the orientation (qform) is not a rotation; repair the header") from None
        qform, fresh["qform_code"] = None, 0
        remarks.append("the qform is not a rotation; the sform is used")
    if scale[0, 0] != 1:
        remarks.append(f"lengths were converted to mm (x {scale[0, 0]:g})")
        sform, qform = (None if form is None else scale @ form for form in (sform, qform))
        _set_forms(fresh, sform, qform)
    if sform is not None and qform is not None:
        corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])])
        if (apart := abs((sform - qform) @ corners.T).max()) > 0.01 * abs(pixdim[1:4]).min():
            remarks.append(f"qform and sform disagree by up to {apart:.3g} mm; the sform is used")
    if sform is None and qform is None:
        remarks.append("no orientation in the header; left and right are a guess")
        header = header.copy()
        header["pixdim"][:4] = pixdim[:4]
        return None, scale @ header.get_base_affine(), remarks
    return fresh, sform if sform is not None else qform, remarks


def _set_forms(header, sform: np.ndarray | None, qform: np.ndarray | None) -> None:
    """Replace the forms that are given; their codes stay."""
    if qform is not None:
        header.set_qform(qform, int(header["qform_code"]))
    if sform is not None:
        header.set_sform(sform, int(header["sform_code"]))


def _header_for(volume: Volume):
    """A float32 header; both forms of the source are moved along when the affine moved (cut slices)."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    kind = type(volume.header) if volume.header is not None else Nifti1Header
    header = (Nifti2Header if max(volume.data.shape) > 32767 else kind)(endianness="<")
    header.set_xyzt_units("mm")
    if volume.header is None:
        header["sform_code"] = 2  # "aligned": no claim that these are scanner coordinates
        _set_forms(header, volume.affine, None)
    else:
        for name in _GEOMETRY:
            header[name] = volume.header[name]
        (sform, code), (qform, _) = header.get_sform(coded=True), header.get_qform(coded=True)
        move = np.linalg.inv(sform if code else qform) @ volume.affine
        if not np.allclose(move, np.eye(4), atol=1e-7):
            _set_forms(header, *(None if form is None else form @ move for form in (sform, qform)))
    if not header["qform_code"]:
        header["pixdim"][1:4] = volume.voxel_mm
    header.set_data_dtype("<f4")
    header.set_data_shape(volume.data.shape)
    header.set_slope_inter(1, 0)
    header["vox_offset"], header["descrip"] = header.sizeof_hdr + 4, b"invdiff, research use only"
    return header


def save_volume(volume: Volume, path, overwrite: bool = False) -> str:
    """Write float32 NIfTI (``.nii`` or ``.nii.gz``), atomically; equal volumes give equal bytes.

    Geometry and form codes are those of ``volume.header``, moved to ``volume.affine``; nothing else is copied.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        UsageError: wrong suffix, or the file exists and ``overwrite`` is false.
        NumericalError: voxels are NaN or infinite.
        ResourceError: the file could not be written; an old one is left as it was.
    """
    zipped = split_suffix(path)[1].lower() == ".nii.gz"
    if bad := int(np.sum(~np.isfinite(volume.data))):
        raise NumericalError(f"{show(path)}: not written, {bad} voxels are NaN or infinite; use fewer or smaller steps")
    header = _header_for(volume)
    with atomic_write(path, overwrite) as part:
        with open(part, "wb") as raw:
            out = gzip.GzipFile("", "wb", 4, raw, mtime=0) if zipped else raw
            out.write(header.binaryblock + bytes(4))
            for k in range(volume.data.shape[2]):
                out.write(volume.data[:, :, k].astype("<f4").tobytes(order="F"))
            if zipped:
                out.close()
        return sha256_file(part)


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
    return np.asarray(array)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


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
    if not allow_shear and abs(cosines.T @ cosines - np.eye(3)).max() > 1e-3:
        raise InputError("the array axes are not orthogonal (gantry tilt?); resample first, or pass --allow-shear")
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
