"""NIfTI files byte by byte: headers, voxels and geometry, refused by name when they are damaged or ambiguous."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import Image, Wanted
from invdiff.formats.stream import Stream, open_stream, take_array, write_slices
from invdiff.intensity import rescale

_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # spatial part of xyzt_units: unknown, m, mm, um
_GEOMETRY = ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
             "qoffset_z", "srow_x", "srow_y", "srow_z")  # fmt: skip


def read(path: Path, wanted: Wanted) -> Image:
    """A NIfTI-1 or NIfTI-2 file, checked to its last byte, checksum included; its content counts, not its name.

    Raises:
        InputError: not NIfTI, damaged, truncated, too long, an unsupported kind of voxel, no usable orientation, or
            too large.
    """
    notes = []
    with open_stream(path) as stream:
        header = read_header(stream)
        stored = read_voxels(stream, header, wanted)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope < 0:
        notes.append(f"the rescale slope is negative ({slope:g}); applied")
    try:
        data = rescale(stored, slope, intercept)
        geometry, affine, remarks = read_geometry(header, stored.shape)
    except InputError as error:
        raise InputError(f"{show(path)}: {error}") from None
    return Image(data, affine, None, geometry, (*notes, *remarks))


def write(part: Path, image: Image, suffix: str) -> None:
    """float32 NIfTI, zipped for ``.nii.gz``; equal images give equal bytes.

    Geometry and form codes are those of ``image.header``, moved to ``image.affine``; nothing else is copied.
    """
    header = float_header(image.header, image.data.shape, image.affine)
    with open(part, "wb") as raw:
        out = gzip.GzipFile("", "wb", 4, raw, mtime=0) if suffix == ".nii.gz" else raw
        out.write(header.binaryblock + bytes(4))
        write_slices(out, image.data)
        if out is not raw:
            out.close()


def read_header(stream: Stream) -> Any:
    """The NIfTI-1 or NIfTI-2 header at the start of ``stream``, either byte order, unchecked.

    Raises:
        InputError: not NIfTI, or half of a pair of files.
    """
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


def _shape(header: Any, name: str) -> tuple[int, ...]:
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


def _dtype(header: Any, name: str) -> np.dtype:
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


def read_voxels(stream: Stream, header: Any, wanted: Wanted) -> np.ndarray:
    """One 3D volume as stored; all the rest of the file is read as well, so that damage shows.

    Args:
        stream: the file, just behind its header.
        header: from ``read_header``.
        wanted: which volume, and how large at most.

    Returns:
        ``(i, j, k)`` in the stored type, before slope and intercept.

    Raises:
        InputError: damaged, truncated, too large, an unsupported kind of voxel, or no such volume.
    """
    name, dtype = stream.name, _dtype(header, stream.name)
    shape = _shape(header, name)
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr + 4 <= offset < 2**31 or offset % 1:
        raise InputError(f"{name}: is damaged (voxels at byte {offset:g}); {AGAIN}")
    if offset > stream.most_bytes:
        raise InputError(f"{name}: is truncated (too small for shape {shape}); {AGAIN}")
    stream.skip(int(offset) - header.sizeof_hdr)
    return take_array(stream, dtype, shape, wanted)


def read_geometry(header: Any, shape: tuple[int, ...]) -> tuple[Any, np.ndarray, list[str]]:
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


def _set_forms(header: Any, sform: np.ndarray | None, qform: np.ndarray | None) -> None:
    """Replace the forms that are given; their codes stay."""
    if qform is not None:
        header.set_qform(qform, int(header["qform_code"]))
    if sform is not None:
        header.set_sform(sform, int(header["sform_code"]))


def float_header(source: Any, shape: tuple[int, ...], affine: np.ndarray) -> Any:
    """A float32 header; both forms of the source are moved along when the affine moved (cut slices).

    Args:
        source: geometry from ``read_geometry``; anything else (another format's) counts as None.
        shape: ``(i, j, k)`` to be written.
        affine: ``(4, 4)``, voxel index to RAS+ mm.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    source = source if isinstance(source, Nifti1Header) else None  # NIfTI-2 is a kind of it
    kind = type(source) if source is not None else Nifti1Header
    header = (Nifti2Header if max(shape) > 32767 else kind)(endianness="<")
    header.set_xyzt_units("mm")
    if source is None:
        header["sform_code"] = 2  # "aligned": no claim that these are scanner coordinates
        _set_forms(header, affine, None)
    else:
        for name in _GEOMETRY:
            header[name] = source[name]
        (sform, code), (qform, _) = header.get_sform(coded=True), header.get_qform(coded=True)
        move = np.linalg.inv(sform if code else qform) @ affine
        if not np.allclose(move, np.eye(4), atol=1e-7):
            _set_forms(header, *(None if form is None else form @ move for form in (sform, qform)))
    if not header["qform_code"]:
        header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_data_dtype("<f4")
    header.set_data_shape(shape)
    header.set_slope_inter(1, 0)
    header["vox_offset"], header["descrip"] = header.sizeof_hdr + 4, b"invdiff, research use only"
    return header
