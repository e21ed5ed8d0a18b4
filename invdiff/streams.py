"""Files that are read once from front to back, plain or compressed by gzip."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from invdiff.errors import InputError
from invdiff.files import AGAIN, show

_CHUNK = 2**24


@dataclass(frozen=True)
class Stream:
    """The content of a plain or gzip file, read once from front to back; a shortfall is an InputError.

    Attributes:
        raw: the decompressed bytes.
        name: what messages call the file.
        most_bytes: no honest file of this size holds more; compare before allocating.
    """

    raw: BinaryIO | gzip.GzipFile
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
        """Demand the end of the file, and with it the gzip checksum."""
        if self.raw.read(1):
            raise InputError(f"{self.name}: is damaged (longer than its header says); {AGAIN}")


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a plain or gzip file, told apart by content.

    Raises:
        InputError: missing, a folder, empty, unreadable, or a damaged gzip stream, also while it is being read.
    """
    name = show(path)
    if not path.exists():
        raise InputError(f"{name}: does not exist; check the path")
    if not path.is_file():
        raise InputError(f"{name}: is not a file; name a file, and convert a DICOM folder with dcm2niix first")
    if not (size := path.stat().st_size):
        raise InputError(f"{name}: is empty; {AGAIN}")
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                yield Stream(file, name, size)
            else:
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield Stream(unzipped, name, 1100 * size)  # deflate cannot do better than 1032:1
    except EOFError:
        raise InputError(f"{name}: is truncated (the gzip stream ends early); {AGAIN}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: is damaged ({str(error)[:60]}); {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the file and its permissions") from None
