"""DICOM files one by one: data sets that can be read and are images, and what is wrong with others in our own words."""

import logging
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invdiff.errors import InputError, UsageError
from invdiff.files import show
from invdiff.formats.codestream import decode

SUFFIXES = (".dcm", ".ima")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MOST_INFLATED = 2**28  # bytes of one file


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and logs of pydicom, which quote what headers hold, maybe a name."""
    from pydicom.config import disable_value_validation

    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def headers(files: list[Path], tags: list[str]) -> tuple[list[tuple[Path, Any]], int]:
    """Headers with ``tags`` of the images among ``files``, without pixels; and how many are none.

    Raises:
        InputError: a file that is damaged, or should be an image by its name.
    """
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import UID

    found, left = [], 0
    for file in files:
        try:
            header = open_dicom(file, stop_before_pixels=True, specific_tags=tags)
            if "Rows" in header and "Columns" in header:
                found.append((file, header))
                continue
            kind = UID(str(header.file_meta.get("MediaStorageSOPClassUID", "")))
            other = kind.name not in ("", str(kind)) and "Image Storage" not in kind.name  # reports, directories, ...
        except InvalidDicomError:
            known = file.suffix.lower() in SUFFIXES
            other = not known and re.fullmatch(r"[^\W\d]+(\.[^\W\d]\w*)?", file.name) is not None
        if not other:
            raise InputError(f"{show(file.name)}: is no DICOM image, perhaps truncated; remove it or export it again")
        left += 1
    return found, left


def open_dicom(file: Path, **options: Any) -> Any:
    """A data set; what is wrong with it is said without its words, which may name a patient.

    Raises:
        InvalidDicomError: not DICOM.
        InputError: damaged in whatever way, or deflated beyond measure.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with quiet():
            meta = pydicom.filereader.read_file_meta_info(file)
            if meta.get("TransferSyntaxUID") == _DEFLATED:
                _check_deflated(file)
            data = pydicom.dcmread(file, **options)
            for element in (*data.file_meta, *(data if options else ())):  # values are converted here and now
                _ = element.value
            return data
    except (InvalidDicomError, InputError):
        raise
    except Exception as error:  # damage shows in many ways, too deep nesting as a RecursionError
        raise InputError(f"{show(file.name)}: is damaged DICOM ({type(error).__name__}); export it again") from None


def _check_deflated(file: Path) -> None:
    """Inflate a deflated data set once, piece by piece, before pydicom does it as a whole."""
    inflater, total = zlib.decompressobj(-15), 0
    with open(file, "rb") as stream:
        stream.seek(140)
        stream.seek(144 + int.from_bytes(stream.read(4), "little"))
        while not inflater.eof and (piece := inflater.unconsumed_tail or stream.read(2**16)):
            total += len(inflater.decompress(piece, 2**20))
            if total > _MOST_INFLATED:
                most = _MOST_INFLATED >> 20
                raise InputError(f"{show(file.name)}: inflates to more than {most} MiB; convert it with dcmconv +te")


def frame_pixels(data: Any, name: str, frame: int | None) -> Any:
    """Stored pixels ``(rows, columns)`` of a data set, or of one of its frames, counted from 0.

    Raises:
        InputError: none there, damaged or too few.
        UsageError: a decoder is missing.
    """
    if "PixelData" not in data and "FloatPixelData" not in data:
        raise InputError(f"{name}: holds no pixels; export it again")
    syntax = data.file_meta.get("TransferSyntaxUID")
    try:
        with quiet():
            return decode(data, frame)
    except InputError as error:
        raise InputError(f"{name}: is damaged or truncated ({error}); export it again") from None
    except Exception as error:  # decoders raise what they like
        if syntax is not None and "missing dependencies" in str(error):
            raise UsageError(f"{name}: {syntax.name} needs a decoder: pip install 'invdiff[dicom]'") from None
        why = show(" ".join(str(error).split()))[:80]
        raise InputError(f"{name}: is damaged or truncated ({why}); export it again") from None
