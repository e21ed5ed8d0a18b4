"""Files read once from front to back, to the last byte, or refused."""

import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import Wanted, check_count, pick_volume

_CHUNK, _PIECE = 2**24, 2**20


@dataclass(frozen=True)
class Stream:
    """The content of a plain or gzip file, read once from front to back; a shortfall is an InputError.

    Attributes:
        raw: the decompressed bytes.
        name: what messages call the file.
        most_bytes: no honest file of this size holds more; compare before allocating.
    """

    raw: BinaryIO | gzip.GzipFile | io.RawIOBase
    name: str
    most_bytes: int

    def into(self, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes."""
        done = 0
        while done < len(buffer):
            got = self.raw.readinto(buffer[done : done + _CHUNK])  # type: ignore[union-attr]
            if not got:
                raise InputError(f"{self.name}: is truncated ({len(buffer) - done} bytes are missing); {AGAIN}")
            done += got

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        buffer = bytearray(count)
        self.into(memoryview(buffer))
        return bytes(buffer)

    def skip(self, count: int) -> None:
        """Read ``count`` bytes and forget them."""
        while count > 0:
            count -= len(self.take(min(count, _CHUNK)))

    def finish(self) -> None:
        """Demand the end of the file, and with it the checksum of a compressed one."""
        if self.raw.read(1):
            raise InputError(f"{self.name}: is damaged (longer than its header says); {AGAIN}")


class _Inflated(io.RawIOBase):
    """A zlib stream (as in MetaImage) as a file to read; ends with its checksum."""

    def __init__(self, file: BinaryIO):
        self._file, self._zlib, self._rest = file, zlib.decompressobj(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fill ``buffer`` as far as one piece of the file goes; 0 at the end."""
        got = b""
        while not got and not self._zlib.eof:
            piece = self._rest or self._file.read(_PIECE)
            if not piece:
                raise EOFError
            got = self._zlib.decompress(piece, len(buffer))
            self._rest = self._zlib.unconsumed_tail
        if not got and (self._zlib.unused_data or self._file.read(1)):
            raise zlib.error("bytes after the end")
        buffer[: len(got)] = got
        return len(got)


def check_file(path: Path) -> int:
    """The size of a file that can be read, in bytes.

    Raises:
        InputError: missing, a folder, or empty.
    """
    name = show(path)
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        raise InputError(f"{name}: does not exist; check the path")
    if not path.is_file():
        raise InputError(f"{name}: is not a file; name a file, or a folder that holds one DICOM series")
    if not (size := path.stat().st_size):
        raise InputError(f"{name}: is empty; {AGAIN}")
    return size


@contextmanager
def open_stream(path: Path, offset: int = 0, packing: str = "auto") -> Iterator[Stream]:
    """Open a file from byte ``offset`` on.

    Args:
        packing: ``"raw"``, ``"gzip"``, ``"zlib"``, or ``"auto"`` to tell plain from gzip by content.

    Raises:
        InputError: missing, a folder, empty, unreadable, or a damaged compressed stream, also while it is being read.
    """
    name, size = show(path), check_file(path) - offset
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            if packing == "auto":
                packing = "gzip" if file.peek(2)[:2] == b"\x1f\x8b" else "raw"
            if packing == "raw":
                yield Stream(file, name, size)
                return
            unzipped = gzip.GzipFile(fileobj=file) if packing == "gzip" else _Inflated(file)
            with unzipped:
                yield Stream(unzipped, name, 1100 * size)  # deflate cannot do better than 1032:1
    except EOFError:
        raise InputError(f"{name}: is truncated (the compressed stream ends early); {AGAIN}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: is damaged ({str(error)[:60]}); {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the file and its permissions") from None


def read_head(path: Path, limit: int = 2**20) -> bytes:
    """The first ``limit`` bytes of a file, fewer of a shorter one.

    Raises:
        InputError: missing, a folder, empty or unreadable.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read ({error.strerror}); check the permissions") from None


def take_array(stream: Stream, dtype: np.dtype, shape: tuple[int, ...], wanted: Wanted) -> np.ndarray:
    """The rest of ``stream`` as one array in Fortran order: all of it, to the last byte and no further.

    Args:
        shape: three axes, or four of which the last counts volumes; then ``wanted.index`` says which is kept.

    Raises:
        InputError: truncated, too long, too many voxels, or no such volume.
    """
    name, voxels, volumes = stream.name, math.prod(shape[:3]), math.prod(shape[3:])
    size = voxels * dtype.itemsize
    if size * volumes > stream.most_bytes:
        raise InputError(f"{name}: is truncated (too small for shape {shape}); {AGAIN}")
    check_count(name, voxels, wanted.max_voxels)
    index = pick_volume(name, volumes, shape, wanted.index)
    stream.skip(index * size)
    stored = np.empty(size, np.uint8)
    stream.into(stored.data)
    stream.skip((volumes - 1 - index) * size)
    stream.finish()
    return stored.view(dtype).reshape(shape[:3], order="F")


def data_beside(path: Path, named: str) -> Path:
    """The file of voxels that a header names, which must lie beside the header.

    Raises:
        InputError: it lies elsewhere, is missing, or is a list or pattern of files.
    """
    if named in ("", "..") or named != Path(named).name or "%" in named or named.upper().startswith("LIST"):
        raise InputError(f"{show(path)}: names the voxels '{show(named)[:60]}'; put all in one file beside the header")
    if not os.path.isfile(path.parent / named):
        raise InputError(f"{show(path)}: names the voxels '{show(named)[:60]}', which are not beside it; find the file")
    return path.parent / named


def write_slices(out, data: np.ndarray) -> None:
    """``(i, j, k)`` as little-endian float32, i fastest, slice by slice."""
    for k in range(data.shape[2]):
        out.write(data[:, :, k].astype("<f4").tobytes(order="F"))
