"""NRRD: a text header, then voxels, plain or zipped (http://teem.sourceforge.net/nrrd/format.html)."""

import gzip
import math
import re
from pathlib import Path

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import LABEL, LPS, Image, Wanted, flat_affine
from invdiff.formats.stream import data_beside, open_stream, read_head, take_array, write_slices

_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
TYPES = {name: code for code, names in _TYPES.items() for name in names.split(", ")}
PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_SPACES = {  # to RAS+: signs of the three axes
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
_TO_MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "": 1.0, "???": 1.0}
_NOT_GREY = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "complex", "vector", "covariant-vector", "normal",
             "3-vector", "4-vector", "quaternion")  # fmt: skip


def read(path: Path, wanted: Wanted) -> Image:
    """An NRRD file with its voxels inside, or in one file beside it; read to the last byte.

    Raises:
        InputError: damaged, truncated, too long, too large, several numbers per voxel, another encoding or space.
    """
    name = show(path)
    try:
        fields, start = _header(read_head(path))
        shape, at = _shape(fields)
        dtype, packing = _voxel_type(fields)
        affine, notes = _affine(fields, at)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    named = fields.get("data file", fields.get("datafile"))
    source, skip = path, 0
    if named is not None:
        source, start = data_beside(path, named), 0
    try:
        skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    except ValueError:
        skip = -1
    if skip < 0 or fields.get("line skip", fields.get("lineskip", "0")) != "0":
        raise InputError(f"{name}: skips lines or counts bytes from the end; convert it to a plain .nrrd")
    with open_stream(source, start, packing) as stream:
        stream.skip(skip)
        stored = take_array(stream, dtype, shape, wanted)
    return Image(stored, affine, notes=tuple(notes))


def _header(head: bytes) -> tuple[dict[str, str], int]:
    """Fields in lower case, and where the voxels start."""
    if not head.startswith(b"NRRD000"):
        raise InputError("is not NRRD; check the file")
    end = re.search(rb"\r?\n\r?\n", head)
    text = head[: end.start()] if end else head
    if not end and len(head) >= 2**20:
        raise InputError(f"is damaged (its header does not end); {AGAIN}")
    fields: dict[str, str] = {}
    for line in text.decode("latin-1").splitlines()[1:]:
        if line.startswith("#") or ":=" in line or not line.strip():
            continue  # comments and free text
        key, colon, value = line.partition(":")
        if not colon or key.strip().lower() in fields:
            raise InputError(f"is damaged (header line '{show(line)[:40]}'); {AGAIN}")
        fields[key.strip().lower()] = value.strip()
    if missing := [key for key in ("type", "dimension", "sizes", "encoding") if key not in fields]:
        raise InputError(f"is damaged (no '{missing[0]}' in its header); {AGAIN}")
    return fields, end.end() if end else len(head)


def _numbers(text: str, kind: type = float) -> list:
    try:
        return [kind(word) for word in text.replace(",", " ").strip("()").split()]
    except ValueError:
        raise InputError(f"is damaged ('{show(text)[:40]}' in its header); {AGAIN}") from None


def _shape(fields: dict[str, str]) -> tuple[tuple[int, ...], list[int]]:
    """``(i, j, k)`` or ``(i, j, k, volumes)``, and which axes of the file are the three in space."""
    sizes = _numbers(fields["sizes"], int)
    if [len(sizes)] != _numbers(fields["dimension"], int) or not sizes or min(sizes) < 1:
        raise InputError(f"is damaged (dimension {fields['dimension'][:20]}, sizes {fields['sizes'][:40]}); {AGAIN}")
    kinds = fields.get("kinds", "").lower().split()
    if any(kind in _NOT_GREY for kind in kinds) or fields["type"] == "block":
        raise InputError("has several numbers per voxel; convert it to one grey value per voxel first")
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""))
    others = [axis for axis, text in enumerate(directions) if text == "none"]
    if not directions and len(sizes) > 3:
        others = list(range(3, len(sizes)))
    if directions and len(directions) != len(sizes):
        raise InputError(f"is damaged ({len(directions)} space directions for {len(sizes)} axes); {AGAIN}")
    volumes = math.prod(sizes[axis] for axis in others)
    at = [axis for axis in range(len(sizes)) if axis not in others]
    if volumes > 1 and (len(others) > 1 or others[0] != len(sizes) - 1):
        raise InputError(f"has axes {tuple(sizes)}, those in space not first; extract one volume first")
    if len(at) > 3:
        raise InputError(f"has {len(at)} axes in space; extract one volume first")
    shape = [sizes[axis] for axis in at] + [1] * (3 - len(at))
    return (*shape, volumes) if volumes > 1 else tuple(shape), at


def _voxel_type(fields: dict[str, str]) -> tuple[np.dtype, str]:
    kind, packing = fields["type"].lower(), PACKINGS.get(fields["encoding"].lower())
    if kind not in TYPES:
        raise InputError(f"has unknown voxel type '{show(kind)[:30]}'; convert it to float first")
    if packing is None:
        raise InputError(f"has encoding '{show(fields['encoding'])[:20]}'; convert it to gzip or raw")
    endian = fields.get("endian", "little").lower()
    if endian not in ("little", "big"):
        raise InputError(f"is damaged (endian '{show(endian)[:20]}'); {AGAIN}")
    return np.dtype(("<" if endian == "little" else ">") + TYPES[kind]), packing


def _affine(fields: dict[str, str], at: list[int]) -> tuple[np.ndarray, list[str]]:
    """Voxel index to RAS+ mm, and what is odd about it."""
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""))
    if not directions:
        spacings = _numbers(fields.get("spacings", "1 " * 3).replace("nan", "1").replace("NaN", "1"))[:3]
        sizes = [abs(s) for s in spacings] + [1.0] * (3 - len(spacings))
        return flat_affine(*sizes), ["no orientation in the header; left and right are a guess"]
    space = fields.get("space", "").lower()
    if space not in _SPACES:
        raise InputError(f"has space '{show(space)[:40]}', not left-posterior-superior or the like; convert it first")
    units = re.findall(r'"([^"]*)"', fields.get("space units", "")) or ["mm"]
    if len(set(units)) > 1 or units[0] not in _TO_MM:
        raise InputError(f"has space units {show(fields['space units'])[:40]}; convert them to mm")
    columns = [_numbers(directions[axis]) for axis in at]
    origin = _numbers(fields.get("space origin", "(0,0,0)"))
    if len(at) < 3 or any(len(v) != 3 for v in (*columns, origin)):
        raise InputError("does not lie in a space of three dimensions; convert it first")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.transpose(columns), origin
    affine[:3] *= np.array(_SPACES[space])[:, None] * _TO_MM[units[0]]
    notes = ["no origin in the header; it is taken as 0"] if "space origin" not in fields else []
    if _TO_MM[units[0]] != 1:
        notes.append(f"lengths were converted to mm (x {_TO_MM[units[0]]:g})")
    return affine, notes


def write(part: Path, image: Image, suffix: str) -> None:
    """float32, zipped, left-posterior-superior; equal images give equal bytes; no text of the source."""
    affine = LPS @ image.affine
    vectors = ["(" + ",".join(repr(float(v)) for v in column) + ")" for column in affine[:3].T]
    lines = ["NRRD0004", f"# {LABEL}", "type: float", "dimension: 3", "space: left-posterior-superior"]
    lines += ["sizes: " + " ".join(map(str, image.data.shape)), "space directions: " + " ".join(vectors[:3])]
    lines += ["kinds: domain domain domain", "endian: little", "encoding: gzip", f"space origin: {vectors[3]}"]
    with open(part, "wb") as raw:
        raw.write(("\n".join(lines) + "\n\n").encode("ascii"))
        with gzip.GzipFile("", "wb", 4, raw, mtime=0) as out:
            write_slices(out, image.data)
