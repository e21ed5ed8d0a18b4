"""``.npy`` and ``.npz``: arrays of numbers (no pickle), slices x rows x columns as in pictures."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import Image, Wanted, check_count, flat_affine, pick_volume
from invdiff.formats.stream import read_head

_OTHERS = ("affine", "modality")
_MODALITIES = ("CT", "MR", "image")


def read(path: Path, wanted: Wanted) -> Image:
    """``(slices, rows, columns)``, ``(rows, columns)``, or several volumes of slices along a first axis.

    Columns run to the left of the patient, rows to the back, slices upwards, 1 mm each; in an ``.npz``, ``affine``
    (4 x 4, from column, row, slice to RAS+ mm) and ``modality`` say otherwise, and an array ``hu`` is CT.

    Raises:
        InputError: damaged, too large, no array of real numbers, or several of them and no ``wanted.series``.
    """
    name = show(path)
    try:
        if read_head(path, 6) == b"\x93NUMPY":
            with open(path, "rb") as file:
                return _image(read_array(file, os.fstat(file.fileno()).st_size, wanted), {}, "", wanted)
        with zipfile.ZipFile(path) as archive:
            entries = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            members = {m.filename.removesuffix(".npy"): m for m in entries}
            if len(members) < len(entries):
                raise InputError("holds two arrays of one name; save it again with numpy.savez")
            chosen = _choose(list(members), wanted.series)
            found = {}
            for key in (chosen, *(other for other in _OTHERS if other in members)):
                with archive.open(members[key]) as file:
                    found[key] = read_array(file, members[key].file_size, wanted)
            return _image(found.pop(chosen), found, chosen, wanted)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:  # what damage raises differs between versions of numpy and zipfile
        why = show(" ".join(f"{type(error).__name__}: {error}".split()))[:80]
        raise InputError(f"{name}: is damaged or no array ({why}); {AGAIN}") from None


def _choose(names: list[str], wanted: str | None) -> str:
    """The array that is asked for, the only one, or the one called data or hu."""
    images = [name for name in names if name not in _OTHERS]
    if wanted is not None:
        if wanted not in images:
            raise InputError(f"has no array '{show(wanted)[:40]}'; --series can be {_listed(images)}")
        return wanted
    usual = [name for name in images if name in ("data", "hu")]
    if len(usual) != 1 and len(images) != 1:
        raise InputError(f"holds {len(images)} arrays; choose one with --series {_listed(images)}")
    return usual[0] if len(usual) == 1 else images[0]


def _listed(names: list[str]) -> str:
    return ", ".join(show(name)[:40] for name in names[:12]) or "nothing: it is empty"


def read_array(file: Any, size: int, wanted: Wanted) -> np.ndarray:
    """One array of plain numbers or text, of any shape; its size is known before it is read.

    Args:
        file: where the array starts.
        size: of the whole, header included, in bytes.
        wanted: how many numbers at most.

    Raises:
        InputError: objects, records, complex numbers, too large, truncated or too long.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise InputError(f"is of version {version} of the array format; save it again with numpy.save")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject or dtype.fields is not None:
        raise InputError("holds Python objects or records, which are not read; save plain numbers")
    if dtype.kind == "c":
        raise InputError("has complex values; save the magnitude, or give k-space as a measurement")
    if dtype.kind not in "biufU":
        raise InputError(f"has values of type {dtype}; save plain numbers")
    check_count("the array", math.prod(shape) * max(1, dtype.itemsize // 8), wanted.max_voxels)
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise InputError(f"is truncated or too long for shape {shape} of {dtype}; {AGAIN}")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # in an .npz, reading to the end compares the checksum
        raise InputError(f"is longer than its header says; {AGAIN}")
    return array


def _image(array: np.ndarray, others: dict[str, np.ndarray], name: str, wanted: Wanted) -> Image:
    if array.dtype.kind == "U" or not 2 <= array.ndim <= 4 or array.size == 0:
        raise InputError(f"has shape {array.shape} of {array.dtype}, not (slices, rows, columns); save a 3D array")
    index = pick_volume("the array", len(array), array.shape, wanted.index) if array.ndim == 4 else 0
    data = (array[index] if array.ndim == 4 else array[None] if array.ndim == 2 else array).transpose(2, 1, 0)
    modality = str(others["modality"]) if "modality" in others else "CT" if name == "hu" else None
    if modality not in (None, *_MODALITIES):
        raise InputError(f"has modality '{show(modality)[:20]}'; it can be {', '.join(_MODALITIES)}")
    with np.errstate(over="ignore"):  # infinity is refused by whoever takes the image
        data = data.astype(np.float32)
    if "affine" not in others:
        notes = ("no place in the file: voxels of 1 mm, columns to the left of the patient and rows to the back",)
        return Image(data, flat_affine(), modality, notes=notes)
    return Image(data, np.asarray(others["affine"], dtype=float), modality)


def write(part: Path, image: Image, suffix: str) -> None:
    """float32 ``(slices, rows, columns)``; ``.npz`` with ``affine`` and ``modality``, ``.npy`` without a place."""
    data = np.ascontiguousarray(image.data.transpose(2, 1, 0), "<f4")
    if suffix == ".npy":
        with open(part, "wb") as out:
            np.lib.format.write_array(out, data, allow_pickle=False)
        return
    arrays = {"data": data, "affine": image.affine, "modality": np.array(image.modality or "image")}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # equal volumes give equal bytes
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as out:
                np.lib.format.write_array(out, array, allow_pickle=False)
