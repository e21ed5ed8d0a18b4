"""MetaImage (``.mha``, ``.mhd``): lines of text, then voxels, plain or deflated; LPS+ mm, as in ITK."""

import zlib
from pathlib import Path

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import LABEL, LPS, Image, Wanted
from invdiff.formats.stream import data_beside, open_stream, read_head, take_array, write_slices

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_OTHER_NAMES = {
    "Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix", "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip


def read(path: Path, wanted: Wanted) -> Image:
    """A MetaImage with its voxels inside, or in one file beside it; read to the last byte.

    Raises:
        InputError: damaged, truncated, too long, too large, several numbers per voxel, or ASCII.
    """
    name = show(path)
    try:
        fields, start = _header(read_head(path))
        shape = _shape(fields)
        dtype, packing = _voxel_type(fields)
        affine, notes = _affine(fields, len(_numbers(fields, "DimSize")))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    source = path
    if fields["ElementDataFile"].upper() != "LOCAL":
        source, start = data_beside(path, fields["ElementDataFile"]), 0
    with open_stream(source, start, packing) as stream:
        stored = take_array(stream, dtype, shape, wanted)
    return Image(stored, affine, notes=notes)


def _header(head: bytes) -> tuple[dict[str, str], int]:
    """Fields by their usual names, and where the voxels start."""
    fields: dict[str, str] = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", at)
        key, equals, value = head[at : max(end, at)].decode("latin-1").partition("=")
        if end < 0 or not equals:
            what = "is not MetaImage" if "ObjectType" not in fields and "NDims" not in fields else "is damaged"
            raise InputError(f"{what} (no 'ElementDataFile' in its header); {AGAIN}")
        key = key.strip()
        fields[_OTHER_NAMES.get(key, key)] = value.strip()
        at = end + 1
    if missing := [key for key in ("NDims", "DimSize", "ElementType") if key not in fields]:
        raise InputError(f"is damaged (no '{missing[0]}' in its header); {AGAIN}")
    return fields, at


def _numbers(fields: dict[str, str], key: str, kind: type = float, default: str = "") -> list:
    text = fields.get(key, default)
    try:
        return [kind(word) for word in text.split()]
    except ValueError:
        raise InputError(f"is damaged ({key} '{show(text)[:40]}'); {AGAIN}") from None


def _shape(fields: dict[str, str]) -> tuple[int, ...]:
    sizes = _numbers(fields, "DimSize", int)
    if [len(sizes)] != _numbers(fields, "NDims", int) or not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        said = f"NDims {show(fields['NDims'])[:9]}, DimSize {show(fields['DimSize'])[:40]}"
        raise InputError(f"is damaged or no volume ({said}); give three axes")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise InputError("has several numbers per voxel; convert it to one grey value per voxel first")
    return (*sizes, 1) if len(sizes) == 2 else tuple(sizes[: 3 if sizes[3:] == [1] else 4])


def _voxel_type(fields: dict[str, str]) -> tuple[np.dtype, str]:
    if fields["ElementType"] not in TYPES:
        raise InputError(f"has voxel type '{show(fields['ElementType'])[:30]}'; convert it to MET_FLOAT first")
    if fields.get("BinaryData", "True").lower() != "true" or fields.get("HeaderSize", "0") != "0":
        raise InputError("holds its voxels as text or behind a foreign header; convert it to a plain .mha")
    big = fields.get("BinaryDataByteOrderMSB", "False").lower() == "true"
    packing = "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw"
    return np.dtype((">" if big else "<") + TYPES[fields["ElementType"]]), packing


def _affine(fields: dict[str, str], rank: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Voxel index to RAS+ mm: row n of TransformMatrix is the direction of axis n, in LPS."""
    sizes = _numbers(fields, "ElementSpacing", default=fields.get("ElementSize", "1 " * rank))
    rows = _numbers(fields, "TransformMatrix", default=" ".join(str(float(v)) for v in np.eye(rank).ravel()))
    offset = _numbers(fields, "Offset", default="0 " * rank)
    if (len(sizes), len(rows), len(offset)) != (rank, rank**2, rank):
        raise InputError(f"is damaged (ElementSpacing, TransformMatrix or Offset of another length); {AGAIN}")
    if not np.isfinite([*sizes, *rows, *offset]).all():
        raise InputError(f"is damaged (ElementSpacing, TransformMatrix or Offset not finite); {AGAIN}")
    n = min(rank, 3)
    affine = np.eye(4)
    affine[:n, :n] = (np.reshape(rows, (rank, rank)) * np.array(sizes)[:, None])[:n, :n].T
    affine[:n, 3] = offset[:n]
    notes = () if "TransformMatrix" in fields else ("no orientation in the header; left and right are a guess",)
    return LPS @ affine, notes


def write(part: Path, image: Image, suffix: str) -> None:
    """float32, deflated, in one file; equal images give equal bytes; no text of the source."""
    packer, packed = zlib.compressobj(4), []

    class Packed:
        write = staticmethod(lambda raw: packed.append(packer.compress(raw)))

    write_slices(Packed, image.data)
    packed.append(packer.flush())
    affine = LPS @ image.affine
    size = np.linalg.norm(affine[:3, :3], axis=0)

    def line(key: str, values) -> str:
        return f"{key} = {' '.join(repr(float(v)) for v in np.ravel(values))}"

    lines = ["ObjectType = Image", "NDims = 3", f"Comment = {LABEL}", "BinaryData = True"]
    lines += [
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {sum(map(len, packed))}",
    ]
    lines += [line("TransformMatrix", (affine[:3, :3] / size).T), line("Offset", affine[:3, 3])]
    lines += ["CenterOfRotation = 0 0 0", line("ElementSpacing", size)]
    lines += ["DimSize = " + " ".join(map(str, image.data.shape)), "ElementType = MET_FLOAT", "ElementDataFile = LOCAL"]
    with open(part, "wb") as out:
        out.write(("\n".join(lines) + "\n").encode("ascii"))
        out.writelines(packed)
