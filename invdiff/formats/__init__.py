"""Formats of volumes: one table of names, and reading and writing by it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from invdiff.errors import InputError
from invdiff.files import atomic_write, sha256_file, show, split_suffix
from invdiff.formats.base import Image, Wanted, files_in, library
from invdiff.formats.stream import read_head


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        text: what messages and tables call it.
        suffixes: endings of names that are read.
        writes: endings of names that are written.
        module: has ``read(path, wanted) -> Image`` and ``write(part, image, suffix)``.
        packages: modules that it needs beyond invdiff's own dependencies.
        extra: ``pip install invdiff[extra]`` brings them.
        magic: ``(offset, bytes)`` that tell it by content where a name says nothing.
        folder: it is written as a folder of files.
        writer: the module that has ``write``, where it is another.
    """

    text: str
    suffixes: tuple[str, ...]
    writes: tuple[str, ...]
    module: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    magic: tuple[tuple[int, bytes], ...] = ()
    folder: bool = False
    writer: str = ""


FORMATS = {
    "nifti": Format(
        "NIfTI",
        (".nii.gz", ".nii"),
        (".nii.gz", ".nii"),
        "nifti",
        magic=((344, b"n+1\0"), (4, b"n+2\0"), (0, b"\x1f\x8b")),
    ),
    "nrrd": Format("NRRD", (".nrrd", ".nhdr"), (".nrrd",), "nrrd", magic=((0, b"NRRD000"),)),
    "metaimage": Format("MetaImage", (".mha", ".mhd"), (".mha",), "metaimage", magic=((0, b"ObjectType = Image"),)),
    "dicom": Format(
        "DICOM", (".dcm", ".ima"), (".dcm",), "dicom", ("pydicom",), "dicom", ((128, b"DICM"),), True, "dicom_write"
    ),
    "pictures": Format(
        "PNG, TIFF",
        (".png", ".tif", ".tiff"),
        (".png", ".tif", ".tiff"),
        "pictures",
        magic=((0, b"\x89PNG\r\n"), (0, b"II*\0"), (0, b"MM\0*")),
    ),
    "arrays": Format("NumPy", (".npy", ".npz"), (".npy", ".npz"), "arrays", magic=((0, b"\x93NUMPY"),)),
}
READS = tuple(suffix for entry in FORMATS.values() for suffix in entry.suffixes)
NO_PLACE = (".npy",)  # of those that are written
WRITES = tuple(suffix for entry in FORMATS.values() for suffix in entry.writes)


def find_format(path: Path) -> Format:
    """The format of a file or folder that exists: by its name, or by its content where the name says nothing.

    Raises:
        InputError: missing, or no format of the table.
    """
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        raise InputError(f"{show(path)}: does not exist; check the path")
    for entry in FORMATS.values():
        if path.name.lower().endswith(entry.suffixes) and path.is_file():
            return entry
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        for entry in FORMATS.values():
            if _has_magic(path, entry):
                return entry
    raise InputError(f"{show(path)}: is of no known format; give a DICOM folder, or a file {', '.join(READS)}")


def _has_magic(path: Path, entry: Format) -> bool:
    head = read_head(path, 400)
    return any(head[at : at + len(word)] == word for at, word in entry.magic)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    return path.stat().st_size > 0 and _has_magic(path, FORMATS["dicom"])


def _of_folder(path: Path) -> Format:
    files = files_in(path)
    others = [file for file in files if not file.name.lower().endswith(FORMATS["pictures"].suffixes)]
    if files and not others:
        return FORMATS["pictures"]
    if not any(map(is_dicom, files)):
        if len(others) < len(files):
            raise InputError(
                f"{show(path)}: holds pictures and other files, first {show(others[0].name)}; leave the pictures alone "
                "in the folder"
            )
        raise InputError(f"{show(path)}: holds no DICOM images; name the folder that holds the files of one series")
    return FORMATS["dicom"]


def read_image(path: Path, wanted: Wanted) -> Image:
    """Read one 3D image from a file or folder of any format of the table.

    Raises:
        UsageError: a package that the format needs is not installed.
        InputError: what its reader refuses, or no format of the table.
    """
    entry = find_format(path)
    for package in entry.packages:
        library(package, entry.extra, entry.text)
    read: Callable[[Path, Wanted], Image] = import_module(f"invdiff.formats.{entry.module}").read
    return read(path, wanted)


def check_writer(path: str | os.PathLike) -> tuple[str, ...]:
    """Find out before a long run that its result can be written in the format that ``path`` asks for.

    Returns:
        A remark where the format loses something.

    Raises:
        UsageError: no format of the table, or a package that it needs is not installed.
    """
    entry = _writer(path)
    for package in entry.packages:
        library(package, entry.extra, entry.text)
    if split_suffix(path, WRITES)[1].lower() in NO_PLACE:
        return (f"{show(Path(path).name)}: holds neither place nor units; name a .nii.gz or .npz to keep them",)
    return ()


def _writer(path: str | os.PathLike) -> Format:
    suffix = split_suffix(path, WRITES)[1].lower()
    return next(entry for entry in FORMATS.values() if suffix in entry.writes)


def write_image(path: Path, image: Image, overwrite: bool = False) -> str:
    """Write ``image`` in the format that the name of ``path`` asks for, atomically; returns its SHA-256.

    Raises:
        UsageError: no format of the table, a missing package, or it exists and ``overwrite`` is false.
        ResourceError: it could not be written; an old one is left as it was.
    """
    check_writer(path)
    entry, suffix = _writer(path), split_suffix(path, WRITES)[1].lower()
    write: Callable[[Path, Image, str], None] = import_module(f"invdiff.formats.{entry.writer or entry.module}").write
    with atomic_write(path, overwrite, entry.folder) as part:
        write(part, image, suffix)
        return sha256_file(part)
